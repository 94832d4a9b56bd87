//! Taking messages: own ids are looked up, then a batch is published and waited for.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::OwnedSemaphorePermit;

use super::Shared;
use super::dedup::{Fact, OwnId};
use super::error::{db_error, unavailable};
use super::lane::Lane;
use super::settle::refused;
use super::topology;
use super::window::{Broken, Fate, Outgoing, Refusal};
use super::wire::{self, Counts, short};
use crate::broker::{BrokerError, BrokerErrorKind, Payload, Published, Queue, Turn};
use crate::envelope::{Message, SharedMessage};
use crate::telemetry::Step;

/// How long a sender waits for RabbitMQ before it is told to come again: this, and for long batches as long as a slow
/// broker takes for so many messages and bytes. Less than an HTTP call may take.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);
const PUBLISH_TIMEOUT_MAX: Duration = Duration::from_secs(25);
const SLOW_MESSAGES_PER_S: usize = 2000;
const SLOW_KIB_PER_S: usize = 2 << 10;

fn timeout_for(messages: usize, kib: usize) -> Duration {
    let seconds = (messages / SLOW_MESSAGES_PER_S).max(kib / SLOW_KIB_PER_S);
    (PUBLISH_TIMEOUT + Duration::from_secs(seconds as u64)).min(PUBLISH_TIMEOUT_MAX)
}

/// KiB of messages that may wait for their confirm: a sender beyond that waits for room.
pub(super) const PENDING_KIB_MAX: usize = 64 << 10;

/// Publishes a batch. Carried out even when the future is dropped.
pub(super) async fn publish(
    shared: &Arc<Shared>,
    queue: &Queue,
    messages: Vec<Message>,
    turn: Turn,
) -> Result<Published, BrokerError> {
    let action = format!("append to queue {queue}");
    let session = shared.open_session(&action)?;
    if shared.is_closing() {
        return Err(BrokerError::new(BrokerErrorKind::Closed, action));
    }
    if !matches!(queue, Queue::Publish | Queue::Unrouted) && shared.clients.owner(queue).is_none() {
        return Err(BrokerError::new(BrokerErrorKind::NotFound, action));
    }
    let blocked = |why: &str| BrokerError::new(BrokerErrorKind::Blocked, format!("{action}: {why}"));
    let silent = || unavailable(format!("{action}: RabbitMQ gives no sign of life"));
    let kib = messages.iter().map(Message::size).sum::<usize>() / 1024 + 1;
    let timeout = timeout_for(messages.len(), kib);
    let slow = || unavailable(format!("{action}: no confirm within {timeout:?}"));
    let (mut alarms, mut silences) = (session.blocked_changes(), session.silences());
    let work = async {
        let permits = u32::try_from(kib.min(PENDING_KIB_MAX)).expect("the bound fits");
        let room = Arc::clone(&shared.pending).acquire_many_owned(permits).await;
        let room = room.map_err(|_| BrokerError::new(BrokerErrorKind::Closed, &action))?;
        let task = take(Arc::clone(shared), queue.clone(), messages, room, turn);
        shared.thread.carry(task).await
    };
    tokio::select! {
        taken = work => taken,
        () = tokio::time::sleep(timeout) => Err(slow()),
        // What was sent before the alarm is still confirmed; what was not waits until it is over, and nobody for it.
        Ok(why) = alarms.wait_for(Option::is_some) => Err(blocked(why.as_deref().unwrap_or("an alarm"))),
        Ok(_) = silences.wait_for(|silent| *silent) => Err(silent()),
    }
}

async fn take(
    shared: Arc<Shared>,
    queue: Queue,
    messages: Vec<Message>,
    _room: OwnedSemaphorePermit,
    turn: Turn,
) -> Result<Published, BrokerError> {
    let action = format!("append to queue {queue}");
    let of_sender = matches!(queue, Queue::Outbox(_) | Queue::Notify(_));
    let ids: Vec<OwnId> = messages.iter().filter(|m| of_sender && m.own_id).map(OwnId::of).collect();
    let claim = if ids.is_empty() { None } else { Some(shared.dedup.claim(Fact::Accepted, &ids).await) };
    let known = if ids.is_empty() { Ok(Vec::new()) } else { shared.dedup.known(Fact::Accepted, ids.clone()).await };
    let known = known.map_err(|error| db_error(format!("{action}: look up own ids"), error))?;
    let mut known = ids.into_iter().zip(known);
    let (mut here, mut fresh_ids, mut fresh) = (HashSet::new(), Vec::new(), Vec::with_capacity(messages.len()));
    let mut duplicates = Vec::with_capacity(messages.len());
    for message in messages {
        let id = if of_sender && message.own_id { known.next() } else { None };
        // The same id again in this very batch is a duplicate of the first.
        let is_duplicate = id.is_some_and(|(id, is_known)| is_known || !here.insert(id.hash));
        duplicates.push(is_duplicate);
        if !is_duplicate {
            fresh_ids.extend(id.map(|(id, _)| id));
            fresh.push(Arc::new(message));
        }
    }
    append(&shared, &queue, &fresh, &action, turn).await?;
    if !fresh_ids.is_empty() {
        let noted = shared.dedup.note(Fact::Accepted, fresh_ids).await;
        noted.map_err(|error| db_error(format!("{action}: note own ids"), error))?;
    }
    drop(claim);
    let metrics = &shared.telemetry.metrics;
    metrics.accepted.inc_by(duplicates.len() as u64);
    metrics.duplicates.inc_by(duplicates.iter().filter(|duplicate| **duplicate).count() as u64);
    for message in &fresh {
        shared.telemetry.traces.record(message, Step::Accepted);
    }
    Ok(Published { duplicates })
}

/// Publishes messages to their queue. When that was deleted under us, it is declared again and they are published once
/// more; but not where others may be in line behind them by then: their sender is told to come again.
async fn append(
    shared: &Arc<Shared>,
    queue: &Queue,
    messages: &[SharedMessage],
    action: &str,
    turn: Turn,
) -> Result<(), BrokerError> {
    let name = queue.to_string();
    let outgoing = |message: &SharedMessage| {
        let payload = Payload::Message(Arc::clone(message));
        let properties = wire::properties(&payload, Counts::fresh(), shared.user());
        let body = wire::body(&payload);
        Outgoing { exchange: topology::default_exchange(), key: short(&name), properties, body }
    };
    let mut left: Vec<&SharedMessage> = messages.iter().collect();
    let is_followed = turn.is_awaited();
    let mut turn = Some(turn);
    for is_last in [false, true] {
        let batch = left.iter().map(|message| outgoing(message)).collect();
        let fates = shared.publish_in_turn(shared.ingress(&name), batch, None, turn.take()).await;
        let refusals: Vec<_> = left.into_iter().zip(fates).filter_map(|(one, fate)| Some((one, fate.err()?))).collect();
        let Some((_, why)) = refusals.first() else { return Ok(()) };
        if is_last || refusals.iter().any(|(_, why)| !matches!(why, Refusal::Unroutable)) {
            return Err(refused(action, why, &name));
        }
        let (on, queue) = (Arc::clone(shared), queue.clone());
        let restore = async move { on.restore_queue(&queue).await };
        // Once it ends, one way or the other.
        let _ = shared.thread.spawn(restore).await;
        if is_followed {
            return Err(refused(action, why, &name));
        }
        left = refusals.into_iter().map(|(one, _)| one).collect();
    }
    unreachable!("the last round returns")
}

impl Shared {
    /// Publishes messages on a lane, and returns the fate of each.
    pub(super) async fn publish_on(&self, lane: &Lane, messages: Vec<Outgoing>) -> Vec<Fate> {
        self.publish_in_turn(lane, messages, None, ()).await
    }

    /// Publishes messages that others of their source follow. `turn` is given on as soon as they are in line.
    pub(super) async fn publish_in_turn(
        &self,
        lane: &Lane,
        messages: Vec<Outgoing>,
        broken: Option<Broken>,
        turn: impl Send,
    ) -> Vec<Fate> {
        let count = messages.len();
        if count == 0 {
            return Vec::new();
        }
        let began = Instant::now();
        let (sender, fates) = tokio::sync::oneshot::channel();
        // Nobody may wait for it any more; it is published all the same.
        let handed = lane.send(messages, broken, Box::new(|fates| drop(sender.send(fates)))).await;
        drop(turn);
        let fates = match handed {
            Ok(()) => fates.await.unwrap_or_else(|_| vec![Err(Refusal::Closed); count]),
            Err(why) => vec![Err(why); count],
        };
        if fates.iter().all(Result::is_ok) {
            self.telemetry.metrics.commit_latency.observe(began.elapsed().as_secs_f64());
        }
        fates
    }

    /// Puts a message among those that found no way.
    pub(super) async fn keep_unrouted(&self, message: Outgoing) -> Fate {
        let message = Outgoing { exchange: short(topology::UNROUTED), key: short(""), ..message };
        self.telemetry.metrics.unrouted.inc();
        self.publish_on(self.relay(topology::UNROUTED), vec![message]).await.pop().unwrap_or(Ok(()))
    }
}
