//! Publishing: own ids are claimed, then a batch is appended as a whole and waited for.

use std::collections::HashMap;
use std::sync::Arc;

use super::core::Core;
use super::dedup::{Claim, IdHash, find, hash_of};
use super::window::{OwnId, broker_error};
use super::{PENDING_KIB_MAX, Shared};
use crate::broker::{BrokerError, BrokerErrorKind, Payload, Published, Queue, Turn};
use crate::envelope::{Message, SharedMessage};
use crate::telemetry::Step;
use crate::time::Timestamp;

pub(super) async fn publish(
    shared: &Arc<Shared>,
    queue: &Queue,
    messages: Vec<Message>,
    turn: Turn,
) -> Result<Published, BrokerError> {
    let refuse = |kind: BrokerErrorKind| BrokerError::new(kind, format!("append to queue {queue}"));
    if !shared.db.has_room() {
        return Err(refuse(BrokerErrorKind::DiskFull));
    }
    let kib = messages.iter().map(Message::size).sum::<usize>() / 1024 + 1;
    let permits = u32::try_from(kib.min(PENDING_KIB_MAX)).expect("the bound fits");
    let pending = Arc::clone(&shared.pending).acquire_many_owned(permits).await;
    let pending = pending.map_err(|_| refuse(BrokerErrorKind::Closed))?;
    let now_ms = Timestamp::now().as_millis();
    let mut claims = Claims::new(shared, &messages);
    claims.check(now_ms).await?;
    let (durable, duplicates) = shared.with_core(|core| {
        if core.is_closed {
            return Err(refuse(BrokerErrorKind::Closed));
        }
        let id = core.by_name.get(queue).copied().ok_or_else(|| refuse(BrokerErrorKind::NotFound))?;
        let duplicates = append_all(core, id, messages, &mut claims, Timestamp::now().as_millis());
        core.open.permits.push(pending);
        Ok((core.wait_for_open(), duplicates))
    })?;
    drop(turn);
    let count = duplicates.len() as u64;
    let duplicate_count = duplicates.iter().filter(|duplicate| **duplicate).count() as u64;
    shared.committed(durable, "append to a queue").await?;
    shared.telemetry.metrics.accepted.inc_by(count);
    shared.telemetry.metrics.duplicates.inc_by(duplicate_count);
    Ok(Published { duplicates })
}

fn append_all(core: &mut Core, queue: u32, messages: Vec<Message>, claims: &mut Claims<'_>, now_ms: i64) -> Vec<bool> {
    let mut duplicates = Vec::with_capacity(messages.len());
    for message in messages {
        if message.own_id {
            let hash = hash_of(&message);
            if !claims.is_fresh(&hash) {
                duplicates.push(true);
                continue;
            }
            // The same id again in this very batch is a duplicate of this one.
            claims.fresh.remove(&hash);
            let (generation, started_at) = core.dedup.remember(hash, now_ms);
            core.open.own_ids.push(OwnId { generation, hash, at: now_ms });
            core.open.generations.extend(started_at.map(|at| (generation, at)));
        }
        duplicates.push(false);
        let message = SharedMessage::new(message);
        core.report(&message, Step::Accepted);
        let body = core.accept(Payload::Message(message));
        core.append(queue, body, now_ms);
    }
    duplicates
}

/// The own ids of one batch, on their way through the check. Dropped before they are accepted, they are free again.
struct Claims<'a> {
    shared: &'a Shared,
    hashes: Vec<IdHash>,
    /// Claimed by this batch, and not seen before.
    fresh: HashMap<IdHash, ()>,
}

impl<'a> Claims<'a> {
    fn new(shared: &'a Shared, messages: &[Message]) -> Self {
        let mut hashes: Vec<IdHash> = messages.iter().filter(|message| message.own_id).map(hash_of).collect();
        hashes.sort_unstable();
        hashes.dedup();
        Self { shared, hashes, fresh: HashMap::new() }
    }

    fn is_fresh(&self, hash: &IdHash) -> bool {
        self.fresh.contains_key(hash)
    }

    /// Claims every id that was not seen before; looks on disk where the filters cannot tell.
    async fn check(&mut self, now_ms: i64) -> Result<(), BrokerError> {
        if self.hashes.is_empty() {
            return Ok(());
        }
        let look_ups = loop {
            // Listening begins before the claims are looked at, so no change is missed.
            let mut changed = std::pin::pin!(self.shared.claims_changed.notified());
            changed.as_mut().enable();
            match self.claim() {
                Some(look_ups) => break look_ups,
                None => changed.await,
            }
        };
        if look_ups.is_empty() {
            return Ok(());
        }
        let (horizon, ask) = (self.shared.core.lock().dedup.horizon(now_ms), look_ups.clone());
        let found = self
            .shared
            .db
            .read(move |connection| {
                ask.iter().map(|(hash, generations)| find(connection, hash, generations)).collect::<Result<Vec<_>, _>>()
            })
            .await
            .map_err(|error| broker_error("look up own ids", &error))?;
        let mut core = self.shared.core.lock();
        for ((hash, _), at) in look_ups.into_iter().zip(found) {
            if at.is_some_and(|at| at > horizon) {
                self.fresh.remove(&hash);
                core.dedup.claims.remove(&hash);
            }
        }
        drop(core);
        self.shared.claims_changed.notify_waiters();
        Ok(())
    }

    /// Claims all ids at once, or none when one of them is on its way: whether it is a duplicate of something that was
    /// taken, or of something that was refused, is known only then. Returns which must be looked up.
    fn claim(&mut self) -> Option<Vec<(IdHash, Vec<u32>)>> {
        let mut core = self.shared.core.lock();
        if self.hashes.iter().any(|hash| core.dedup.claims.contains_key(hash)) {
            return None;
        }
        let mut look_ups = Vec::new();
        for hash in &self.hashes {
            let candidates = core.dedup.candidates(hash);
            core.dedup.claims.insert(*hash, Claim::Checking);
            self.fresh.insert(*hash, ());
            if !candidates.is_empty() {
                look_ups.push((*hash, candidates));
            }
        }
        Some(look_ups)
    }
}

impl Drop for Claims<'_> {
    fn drop(&mut self) {
        if self.fresh.is_empty() {
            return;
        }
        // Not accepted: a refused or abandoned publish leaves no trace of its ids.
        let mut core = self.shared.core.lock();
        for hash in self.fresh.keys() {
            if core.dedup.claims.get(hash) == Some(&Claim::Checking) {
                core.dedup.claims.remove(hash);
            }
        }
        drop(core);
        self.shared.claims_changed.notify_waiters();
    }
}
