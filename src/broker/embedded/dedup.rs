//! Senders' own ids: each is taken once within the dedup window (guarantee G5).
//!
//! The truth is a table on disk, in generations, so that it survives a restart and old ids go without a scan. A Bloom
//! filter for each generation says for nearly every fresh id that there is no need to look. Memory is bounded: what
//! was accepted but is not durable yet, and the filters.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension as _};
use sha2::{Digest, Sha256};

use crate::broker::stock::OwnId;
use crate::envelope::Message;

/// Half of SHA-256 over sender and id: collisions are out of the question, within one window and between senders.
pub(super) type IdHash = [u8; 16];

/// Ids in one generation at most.
const GENERATION_IDS_MAX: u32 = 1 << 20;

/// A generation takes ids for this part of the window, and for this long at least, in milliseconds: each has a filter.
const GENERATIONS_PER_WINDOW: u32 = 4;
const GENERATION_MS_MIN: i64 = 50;

/// Ids that are adopted within this time share a generation, in milliseconds.
const ADOPTED_MS: i64 = 10_000;

/// Bits of a filter: ten for each id, which with four probes lets about 1 % of fresh ids through to a look-up.
const FILTER_BITS: u64 = GENERATION_IDS_MAX as u64 * 10;

pub(super) fn hash_of(message: &Message) -> IdHash {
    let mut digest = Sha256::new();
    digest.update(message.sender.as_str());
    digest.update([0]);
    digest.update(message.id.as_str());
    let full: [u8; 32] = digest.finalize().into();
    full[..16].try_into().expect("half of 32 bytes")
}

#[derive(Debug)]
struct Filter(Vec<u64>);

impl Filter {
    fn new() -> Self {
        Self(vec![0; usize::try_from(FILTER_BITS / 64).expect("a few megabits")])
    }

    fn probes(hash: &IdHash) -> impl Iterator<Item = (usize, u64)> {
        let part = |at: usize| u64::from_le_bytes(hash[at..at + 8].try_into().expect("eight bytes"));
        let (a, b) = (part(0), part(8) | 1);
        // Double hashing (Kirsch and Mitzenmacher, "Less hashing, same performance").
        (0..4u64).map(move |i| {
            let bit = a.wrapping_add(i.wrapping_mul(b)) % FILTER_BITS;
            (usize::try_from(bit / 64).expect("a few megabits"), 1 << (bit % 64))
        })
    }

    fn insert(&mut self, hash: &IdHash) {
        for (word, bit) in Self::probes(hash) {
            self.0[word] |= bit;
        }
    }

    fn may_contain(&self, hash: &IdHash) -> bool {
        Self::probes(hash).all(|(word, bit)| self.0[word] & bit != 0)
    }
}

#[derive(Debug)]
struct Generation {
    id: u32,
    started_at: i64,
    ids: u32,
    /// `None`: from before a restart, so every id is looked up in it.
    filter: Option<Filter>,
}

/// What is known of an id that is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// Someone is looking it up on disk.
    Checking,
    /// Accepted in a window that is not durable yet.
    Accepted,
}

/// See the module. Lives under the broker's lock.
#[derive(Debug)]
pub(super) struct Dedup {
    window_ms: i64,
    generations: VecDeque<Generation>,
    /// Never used before, not even by a generation whose ids are still being deleted.
    next_generation: u32,
    pub(super) claims: HashMap<IdHash, Claim>,
}

impl Dedup {
    pub(super) fn new(window: Duration, stored: &[(u32, i64)]) -> Self {
        let generations = stored
            .iter()
            .map(|&(id, started_at)| Generation { id, started_at, ids: GENERATION_IDS_MAX, filter: None })
            .collect();
        let window_ms = i64::try_from(window.as_millis()).unwrap_or(i64::MAX);
        let next_generation = stored.iter().map(|&(id, _)| id + 1).max().unwrap_or(1);
        Self { window_ms, generations, next_generation, claims: HashMap::new() }
    }

    fn span_ms(&self) -> i64 {
        (self.window_ms / i64::from(GENERATIONS_PER_WINDOW)).max(GENERATION_MS_MIN)
    }

    /// The earliest acceptance that still counts.
    pub(super) fn horizon(&self, now_ms: i64) -> i64 {
        now_ms.saturating_sub(self.window_ms)
    }

    /// Generations in which the id may be; none for nearly every fresh id.
    pub(super) fn candidates(&self, hash: &IdHash) -> Vec<u32> {
        let may = |g: &&Generation| g.filter.as_ref().is_none_or(|filter| filter.may_contain(hash));
        self.generations.iter().filter(may).map(|generation| generation.id).collect()
    }

    /// Remembers an accepted id. Returns the generation that it belongs to, and the new generation's start when it is
    /// the first of one.
    pub(super) fn remember(&mut self, hash: IdHash, now_ms: i64) -> (u32, Option<i64>) {
        let span_ms = self.span_ms();
        let is_fresh = |g: &Generation| g.ids < GENERATION_IDS_MAX && now_ms < g.started_at.saturating_add(span_ms);
        let mut started = None;
        if !self.generations.back().is_some_and(is_fresh) {
            let id = self.next_generation;
            self.next_generation += 1;
            let filter = Some(Filter::new());
            self.generations.push_back(Generation { id, started_at: now_ms, ids: 0, filter });
            started = Some(now_ms);
        }
        let newest = self.generations.back_mut().expect("one was just added unless there was one");
        newest.ids += 1;
        if let Some(filter) = &mut newest.filter {
            filter.insert(&hash);
        }
        self.claims.insert(hash, Claim::Accepted);
        (newest.id, started)
    }

    /// Forgets the oldest generation when all its ids are too old to count; returns it, to be deleted.
    pub(super) fn expire(&mut self, now_ms: i64) -> Option<u32> {
        let horizon = self.horizon(now_ms);
        let span_ms = self.span_ms();
        let oldest = self.generations.front()?;
        // Ids come into a generation until the next one starts, at the latest a span after its own start.
        let ended_at =
            self.generations.get(1).map_or(oldest.started_at.saturating_add(span_ms), |next| next.started_at);
        if ended_at.max(oldest.started_at) >= horizon {
            return None;
        }
        self.generations.pop_front().map(|generation| generation.id)
    }
}

/// Looks an id up in generations; the time it was accepted, if it was.
pub(super) fn find(connection: &Connection, hash: &IdHash, generations: &[u32]) -> rusqlite::Result<Option<i64>> {
    let mut select = connection.prepare_cached("SELECT at FROM own_id WHERE generation = ?1 AND hash = ?2")?;
    let mut newest = None;
    for generation in generations {
        let at: Option<i64> = select.query_row((generation, &hash[..]), |row| row.get(0)).optional()?;
        newest = newest.max(at);
    }
    Ok(newest)
}

/// Takes in ids that another broker remembered: into a generation of their own, which ends now and so is kept for as
/// long as the youngest of them counts.
pub(super) fn adopt(connection: &Connection, ids: &[OwnId], now_ms: i64) -> rusqlite::Result<()> {
    let newest = "SELECT max(id) FROM own_id_generation WHERE started_at >= ?1";
    let recent: Option<u32> = connection.query_row(newest, [now_ms - ADOPTED_MS], |row| row.get(0))?;
    let generation = match recent {
        Some(generation) => generation,
        None => {
            let next = "SELECT coalesce(max(id), 0) + 1 FROM own_id_generation";
            let next = connection.query_row(next, [], |row| row.get(0))?;
            connection.prepare_cached(super::schema::INSERT_GENERATION)?.execute((next, now_ms))?;
            next
        }
    };
    let insert = "INSERT INTO own_id (generation, hash, at) VALUES (?1, ?2, ?3)
        ON CONFLICT (generation, hash) DO UPDATE SET at = max(at, excluded.at)";
    let mut insert = connection.prepare_cached(insert)?;
    ids.iter().try_for_each(|id| insert.execute((generation, &id.hash[..], id.at_ms)).map(|_| ()))
}

/// Deletes up to `limit` ids of a generation. Returns whether there are more.
pub(super) fn delete_some(connection: &Connection, generation: u32, limit: usize) -> rusqlite::Result<bool> {
    let deleted = connection
        .prepare_cached(
            "DELETE FROM own_id WHERE generation = ?1 AND hash IN (SELECT hash FROM own_id WHERE generation = ?1 LIMIT ?2)",
        )?
        .execute((generation, limit))?;
    if deleted < limit {
        connection.prepare_cached("DELETE FROM own_id_generation WHERE id = ?1")?.execute([generation])?;
    }
    Ok(deleted == limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(n: u64) -> IdHash {
        Sha256::digest(n.to_le_bytes())[..16].try_into().expect("sixteen bytes")
    }

    #[test]
    fn fresh_ids_are_rarely_looked_up_and_known_ones_always() {
        let mut dedup = Dedup::new(Duration::from_secs(600), &[]);
        for n in 0..100_000 {
            dedup.remember(hash(n), 0);
        }
        assert!((0..100_000).all(|n| dedup.candidates(&hash(n)) == [1]));
        let looked_up = (100_000..200_000).filter(|n| !dedup.candidates(&hash(*n)).is_empty()).count();
        assert!(looked_up < 2_000, "{looked_up}");
    }

    #[test]
    fn generations_end_and_expire() {
        let mut dedup = Dedup::new(Duration::from_millis(400), &[(7, 0)]);
        assert_eq!(dedup.candidates(&hash(1)), [7], "one from before the restart is always asked");
        assert_eq!(dedup.remember(hash(1), 50), (8, Some(50)));
        assert_eq!(dedup.remember(hash(2), 149), (8, None));
        assert_eq!(dedup.remember(hash(3), 150), (9, Some(150)));
        assert_eq!(dedup.expire(450), None, "an id of 50 ms counts until 450 ms");
        assert_eq!(dedup.expire(451), Some(7));
        assert_eq!(dedup.expire(550), None);
        assert_eq!(dedup.expire(551), Some(8));
        assert_eq!(dedup.expire(551), None);
        assert_eq!(dedup.expire(10_000), Some(9));
        assert_eq!(dedup.remember(hash(4), 10_000), (10, Some(10_000)), "the ids of 9 may still be being deleted");
    }

    #[test]
    fn without_a_window_few_filters_are_made() {
        let mut dedup = Dedup::new(Duration::ZERO, &[]);
        assert_eq!((0..1000).filter(|n| dedup.remember(hash(*n), 0).1.is_some()).count(), 1);
    }
}
