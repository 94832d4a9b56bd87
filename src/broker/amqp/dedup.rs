//! Senders' own ids: each is routed once within the dedup window (guarantee G5).
//!
//! Two facts are kept of an id, in the file: that a message with it was accepted, and that one was routed. The first
//! answers a sender who sends it again. The second is what counts: it is looked at when a message leaves the outbox,
//! and noted when the next queue has confirmed it. So an id is routed once also when two copies of it are in the
//! outbox, because a confirm was cut off and the sender tried again, or because a client put them there by AMQP.
//! A kill between the confirm and the note routes a message twice, under the same id.
//!
//! Copies that are on their way at the same time wait for one another. Memory: the ids on their way.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rusqlite::{Connection, params};
use sha2::{Digest as _, Sha256};
use tokio::sync::Notify;

use crate::broker::stock::{self, OwnIdCursor, OwnIdPage};
use crate::db::{Db, DbError};
use crate::envelope::Message;
use crate::time::Timestamp;

const CREATE: &str = "
CREATE TABLE IF NOT EXISTS dedup_amqp_id (
    -- When it was noted, in parts of the window: old ids go by slot, without a scan.
    slot INTEGER NOT NULL,
    hash BLOB NOT NULL,
    -- When the message was accepted, in milliseconds since the epoch.
    at INTEGER NOT NULL,
    routed INTEGER NOT NULL,
    PRIMARY KEY (slot, hash)
) WITHOUT ROWID;
";

/// Slots in one window.
const SLOTS_PER_WINDOW: i64 = 4;

/// Old ids deleted in one transaction.
const DELETE_AT_ONCE: u32 = 500;

/// Half of SHA-256 over sender and id.
pub(super) type IdHash = [u8; 16];

/// A message's own id as it is looked up: its hash, and when the message was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OwnId {
    pub(super) hash: IdHash,
    at_ms: i64,
}

impl OwnId {
    /// Of a message whose sender chose its id.
    pub(super) fn of(message: &Message) -> Self {
        let mut digest = Sha256::new();
        digest.update(message.sender.as_str());
        digest.update([0]);
        digest.update(message.id.as_str());
        let full: [u8; 32] = digest.finalize().into();
        let hash = full[..16].try_into().expect("half of 32 bytes");
        Self { hash, at_ms: message.sent_at.as_millis() }
    }
}

/// The two facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fact {
    /// It was accepted from its sender.
    Accepted,
    /// It was routed.
    Routed,
}

/// See the module.
pub(super) struct Dedup {
    db: Db,
    window_ms: i64,
    accepting: Arc<Claims>,
    routing: Arc<Claims>,
}

/// Ids that are on their way past one fact.
#[derive(Default)]
pub(super) struct Claims {
    taken: Mutex<HashSet<IdHash>>,
    changed: Notify,
}

/// Ids that nobody else may take past the same fact. Freed when it is dropped.
pub(super) struct Claim {
    claims: Arc<Claims>,
    hashes: Vec<IdHash>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut taken = self.claims.taken.lock();
        for hash in &self.hashes {
            taken.remove(hash);
        }
        drop(taken);
        self.claims.changed.notify_waiters();
    }
}

impl Dedup {
    /// Opens the window.
    pub(super) async fn open(db: Db, window: Duration) -> Result<Self, DbError> {
        db.write(|connection| connection.execute_batch(CREATE)).await?;
        let window_ms = i64::try_from(window.as_millis()).unwrap_or(i64::MAX);
        let dedup = Self { db, window_ms, accepting: Arc::default(), routing: Arc::default() };
        // Slots are as long as the window makes them. What was noted under another is kept for as long as this one.
        let last = dedup.slot(Timestamp::now());
        dedup
            .db
            .write(move |connection| {
                let mut renumber = connection
                    .prepare("UPDATE OR IGNORE dedup_amqp_id SET slot = ?2 WHERE slot NOT BETWEEN ?1 AND ?2")?;
                renumber.execute(params![last - SLOTS_PER_WINDOW, last])
            })
            .await?;
        Ok(dedup)
    }

    /// Takes these ids, all at once; waits while another has one of them.
    pub(super) async fn claim(&self, fact: Fact, ids: &[OwnId]) -> Claim {
        let claims = match fact {
            Fact::Accepted => &self.accepting,
            Fact::Routed => &self.routing,
        };
        let mut hashes: Vec<IdHash> = ids.iter().map(|id| id.hash).collect();
        hashes.sort_unstable();
        hashes.dedup();
        loop {
            // Listening begins before the claims are looked at, so no change is missed.
            let mut changed = std::pin::pin!(claims.changed.notified());
            changed.as_mut().enable();
            {
                let mut taken = claims.taken.lock();
                if !hashes.iter().any(|hash| taken.contains(hash)) {
                    taken.extend(&hashes);
                    return Claim { claims: Arc::clone(claims), hashes };
                }
            }
            changed.await;
        }
    }

    /// For each id, whether the fact is known of it. An accepted id counts as seen when it was routed, too.
    pub(super) async fn known(&self, fact: Fact, ids: Vec<OwnId>) -> Result<Vec<bool>, DbError> {
        let (window_ms, first) = (self.window_ms, self.slot(Timestamp::now()) - SLOTS_PER_WINDOW);
        let least = i64::from(fact == Fact::Routed);
        self.db
            .read(move |connection| {
                let mut select = connection.prepare_cached(
                    "SELECT EXISTS (SELECT 1 FROM dedup_amqp_id WHERE slot BETWEEN ?1 AND ?2 AND hash = ?3
                     AND at BETWEEN ?4 - ?5 AND ?4 + ?5 AND routed >= ?6)",
                )?;
                let mut known = Vec::with_capacity(ids.len());
                for id in ids {
                    // Slot by slot, so that each is one look at the primary key.
                    let mut found = false;
                    for slot in first..=first + SLOTS_PER_WINDOW {
                        let values = params![slot, slot, id.hash, id.at_ms, window_ms, least];
                        found = found || select.query_row(values, |row| row.get(0))?;
                    }
                    known.push(found);
                }
                Ok(known)
            })
            .await
    }

    /// Notes the fact of these ids; resolves when that is durable.
    pub(super) async fn note(&self, fact: Fact, ids: Vec<OwnId>) -> Result<(), DbError> {
        let slot = self.slot(Timestamp::now());
        self.db.write(move |connection| note(connection, slot, fact, &ids)).await
    }

    /// A page of what is remembered, for another broker; see [`crate::broker::stock`].
    pub(super) async fn page(&self, after: Option<OwnIdCursor>, limit: usize) -> Result<OwnIdPage, DbError> {
        let (slot, hash) = after.unwrap_or((i64::MIN, [0; 16]));
        self.db
            .read(move |connection| {
                let mut select = connection.prepare_cached(
                    "SELECT slot, hash, at, routed FROM dedup_amqp_id WHERE (slot, hash) > (?1, ?2)
                     ORDER BY slot, hash LIMIT ?3",
                )?;
                let rows = select.query_map(params![slot, hash, limit], |row| {
                    let id = stock::OwnId { hash: row.get(1)?, at_ms: row.get(2)?, routed: row.get(3)? };
                    Ok(((row.get(0)?, id.hash), id))
                })?;
                let rows = rows.collect::<rusqlite::Result<Vec<(OwnIdCursor, stock::OwnId)>>>()?;
                let next = rows.last().filter(|_| rows.len() == limit).map(|(cursor, _)| *cursor);
                Ok((rows.into_iter().map(|(_, id)| id).collect(), next))
            })
            .await
    }

    /// Takes in what another broker remembered.
    pub(super) async fn adopt(&self, ids: Vec<stock::OwnId>) -> Result<(), DbError> {
        let slot = self.slot(Timestamp::now());
        let (routed, accepted): (Vec<_>, Vec<_>) = ids.into_iter().partition(|id| id.routed);
        let strip = |ids: Vec<stock::OwnId>| -> Vec<OwnId> {
            ids.into_iter().map(|id| OwnId { hash: id.hash, at_ms: id.at_ms }).collect()
        };
        let (routed, accepted) = (strip(routed), strip(accepted));
        self.db
            .write(move |connection| {
                note(connection, slot, Fact::Routed, &routed)?;
                note(connection, slot, Fact::Accepted, &accepted)
            })
            .await
    }

    /// Forgets everything.
    pub(super) async fn clear(&self) -> Result<(), DbError> {
        self.delete_before(i64::MAX).await
    }

    /// Deletes ids that count no more. Called now and then.
    pub(super) async fn forget_old(&self) -> Result<(), DbError> {
        self.delete_before(self.slot(Timestamp::now()) - SLOTS_PER_WINDOW).await
    }

    async fn delete_before(&self, before: i64) -> Result<(), DbError> {
        loop {
            let deleted = self
                .db
                .write(move |connection| {
                    let mut delete = connection.prepare_cached(
                        "DELETE FROM dedup_amqp_id WHERE (slot, hash) IN
                         (SELECT slot, hash FROM dedup_amqp_id WHERE slot < ?1 LIMIT ?2)",
                    )?;
                    delete.execute(params![before, DELETE_AT_ONCE])
                })
                .await?;
            if deleted == 0 {
                return Ok(());
            }
        }
    }

    fn slot(&self, now: Timestamp) -> i64 {
        now.as_millis() / (self.window_ms / SLOTS_PER_WINDOW).max(1)
    }
}

fn note(connection: &Connection, slot: i64, fact: Fact, ids: &[OwnId]) -> rusqlite::Result<()> {
    let mut upsert = connection.prepare_cached(
        "INSERT INTO dedup_amqp_id (slot, hash, at, routed) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (slot, hash) DO UPDATE SET routed = max(routed, excluded.routed)",
    )?;
    for id in ids {
        upsert.execute(params![slot, id.hash, id.at_ms, fact == Fact::Routed])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: u8, at_ms: i64) -> OwnId {
        OwnId { hash: [name; 16], at_ms }
    }

    async fn open(window: Duration) -> (tempfile::TempDir, Db, Dedup) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let db = Db::open(&directory.path().join("test.db")).expect("opens");
        let dedup = Dedup::open(db.clone(), window).await.expect("opens");
        (directory, db, dedup)
    }

    #[actix_rt::test]
    async fn facts_are_told_apart() {
        let (_directory, _db, dedup) = open(Duration::from_secs(600)).await;
        let now = Timestamp::now().as_millis();
        dedup.note(Fact::Accepted, vec![id(1, now), id(2, now)]).await.expect("notes");
        dedup.note(Fact::Routed, vec![id(2, now), id(3, now)]).await.expect("notes");
        dedup.note(Fact::Accepted, vec![id(3, now)]).await.expect("a later acceptance does not undo the routing");
        let all = [1, 2, 3, 4].map(|n| id(n, now));
        assert_eq!(dedup.known(Fact::Accepted, all.into()).await.expect("looks"), [true, true, true, false]);
        assert_eq!(dedup.known(Fact::Routed, all.into()).await.expect("looks"), [false, true, true, false]);
    }

    #[actix_rt::test]
    async fn ids_count_for_the_window_and_then_go() {
        let (_directory, db, dedup) = open(Duration::from_millis(400)).await;
        let now = Timestamp::now().as_millis();
        dedup.note(Fact::Routed, vec![id(1, now - 1000), id(2, now)]).await.expect("notes");
        // Accepted longer ago than the window: another message, although it was routed just now.
        assert_eq!(dedup.known(Fact::Routed, vec![id(1, now), id(2, now)]).await.expect("looks"), [false, true]);
        assert_eq!(dedup.known(Fact::Routed, vec![id(1, now - 1000)]).await.expect("looks"), [true]);
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        loop {
            dedup.forget_old().await.expect("forgets");
            let left: i64 = db
                .read(|c| c.query_row("SELECT count(*) FROM dedup_amqp_id", [], |row| row.get(0)))
                .await
                .expect("counts");
            if left == 0 {
                break;
            }
            assert!(std::time::Instant::now() < deadline, "{left} are left");
            actix_rt::time::sleep(Duration::from_millis(20)).await;
        }
    }

    #[actix_rt::test]
    async fn ids_are_known_under_another_window() {
        let (_directory, db, dedup) = open(Duration::from_secs(600)).await;
        let now = Timestamp::now().as_millis();
        dedup.note(Fact::Routed, vec![id(1, now)]).await.expect("notes");
        for seconds in [86_400, 60, 600] {
            let dedup = Dedup::open(db.clone(), Duration::from_secs(seconds)).await.expect("opens");
            assert_eq!(dedup.known(Fact::Routed, vec![id(1, now)]).await.expect("looks"), [true], "{seconds} s");
        }
    }

    #[actix_rt::test]
    async fn copies_wait_for_one_another() {
        let (_directory, _db, dedup) = open(Duration::from_secs(600)).await;
        let first = dedup.claim(Fact::Routed, &[id(1, 0), id(1, 0), id(2, 0)]).await;
        let other = dedup.claim(Fact::Accepted, &[id(1, 0)]).await;
        let ids = [id(2, 0), id(3, 0)];
        let mut second = Box::pin(dedup.claim(Fact::Routed, &ids));
        assert!(futures_util::poll!(&mut second).is_pending());
        // It holds nothing while it waits.
        drop(dedup.claim(Fact::Routed, &[id(3, 0)]).await);
        drop((first, other));
        second.await;
    }
}
