//! The embedded broker: durable queues in the process, in one SQLite file.
//!
//! # Layout
//!
//! - `queue`: one queue in memory, and what a body, a slot and a lease are.
//! - `core`: all queues under one lock, and every operation on them.
//! - `window`: what changed since the last commit, net, and how it is written. `commit` makes transactions of it.
//! - `consumer`, `pull`, `dead`: the three ways to read; `publish` the one to write, with `dedup` for own ids.
//! - `stock` is what lies in the file when no broker is open on it: for moving to another broker and back.
//! - `load` reads the front of deep queues back; `timer` ends leases and delays; `schema` has the tables.
//!
//! # How it stays ahead of the disk
//!
//! An operation changes memory and the open window at once; the window is written as one transaction while the next
//! one fills. A message may run through outbox, `soar-publish` and the exchange before its fsync, because nothing of
//! that is seen outside: [`Broker::publish`] resolves after the commit, and an inbox hands out only messages whose
//! acceptance is durable. What came and went within a window is not written at all. Windows commit in order, so after
//! a kill the file holds a state that the memory was in, and what was handed out but not settled durably comes back.
//!
//! # Invariants
//!
//! - The core's lock is never held across I/O or an await; wakers are called after it is released.
//! - A commit that fails voids what was accepted in it (nobody was told otherwise) and keeps the rest for the next.
//! - Memory: [`core::HOT_BYTES_TOTAL`] of messages, a window of bounded size, and a few words for each queue.
//!
//! Unit tests run with far smaller bounds (`cfg!(test)`), so that a few messages reach paging, eviction and the steps;
//! the suites in `tests/` run with the real ones.

mod chores;
mod commit;
mod consumer;
mod core;
mod dead;
mod dedup;
mod load;
#[cfg(test)]
mod model_tests;
mod publish;
mod pull;
mod queue;
mod schema;
mod stock;
#[cfg(test)]
mod tests;
mod timer;
mod window;

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use parking_lot::Mutex;
use rusqlite::{Connection, params};
use tokio::sync::{Notify, Semaphore, oneshot};

use self::core::{Core, Report};
use self::queue::QueueState;
use self::schema::StoredName;
pub use self::stock::EmbeddedStock;
use self::window::broker_error;
use crate::broker::{
    Broker, BrokerError, BrokerErrorKind, Consumer, DeadPage, Depths, Health, Published, PullMode, PullOutcome, Pulled,
    Queue, Receipt, Turn,
};
use crate::client::{ClientId, Limits};
use crate::db::Db;
use crate::envelope::Message;
use crate::telemetry::Telemetry;
use crate::time::Timestamp;
use crate::topic::Pattern;

/// Settings of the embedded broker.
#[derive(Debug, Clone)]
pub struct Options {
    /// For how long own ids are remembered.
    pub dedup_window: Duration,
}

/// Bytes of messages that may be accepted and not durable yet, in KiB: a publisher beyond that waits.
const PENDING_KIB_MAX: usize = 64 << 10;

/// What all parts of the broker share.
struct Shared {
    core: Mutex<Core>,
    db: Db,
    telemetry: Telemetry,
    /// KiB of messages that may still be accepted before the next commit.
    pending: Arc<Semaphore>,
    /// Someone's look-up of an own id has ended.
    claims_changed: Notify,
    /// Replays and purges take turns.
    dead_turn: tokio::sync::Mutex<()>,
    /// When a failed commit may be tried again.
    retry_at: Mutex<Option<Instant>>,
    chores: Mutex<chores::Chores>,
    me: Weak<Shared>,
}

impl Shared {
    /// Runs `work` under the lock, and after it what it left to do.
    fn with_core<R>(&self, work: impl FnOnce(&mut Core) -> R) -> R {
        let (result, after) = {
            let mut core = self.core.lock();
            let result = work(&mut core);
            (result, core.take_after())
        };
        for waker in after.wakers {
            waker.wake();
        }
        for report in after.reports {
            match report {
                Report::Step(message, step) => self.telemetry.traces.record(&message, step),
                Report::Routed(message, count, first) => self.telemetry.traces.record_routed(&message, count, first),
            }
        }
        for load in after.loads {
            if let Some(shared) = self.me.upgrade() {
                load::start(&shared, load);
            }
        }
        if after.nudge {
            self.db.nudge();
        }
        result
    }

    /// Waits until everything that was done so far is durable.
    async fn barrier(&self, action: &str) -> Result<(), BrokerError> {
        let durable = self.with_core(|core| {
            let clean = core.open.is_empty() && core.flushing == 0;
            (!clean).then(|| core.wait_for_open())
        });
        match durable {
            Some(durable) => self.committed(durable, action).await,
            None => Ok(()),
        }
    }

    /// Waits for a window's end.
    async fn committed(
        &self,
        durable: oneshot::Receiver<Result<(), BrokerError>>,
        action: &str,
    ) -> Result<(), BrokerError> {
        durable.await.unwrap_or_else(|_| Err(BrokerError::new(BrokerErrorKind::Closed, action)))
    }

    fn has_backlog(&self, queue: u32) -> bool {
        self.core.lock().queues.get(&queue).is_some_and(|queue| queue.tail > 0 || !queue.slots.is_empty())
    }
}

/// See the module.
struct Embedded {
    shared: Arc<Shared>,
}

/// Opens the embedded broker on `db`. Finds the queues that are there; does not read the messages.
///
/// # Errors
/// When the file cannot be read, or is of a newer version.
pub async fn open(db: Db, options: Options, telemetry: Telemetry) -> Result<Arc<dyn Broker>, BrokerError> {
    Ok(Arc::new(Embedded { shared: start(db, options, telemetry).await? }))
}

async fn start(db: Db, options: Options, telemetry: Telemetry) -> Result<Arc<Shared>, BrokerError> {
    let action = "open the embedded broker";
    let fail = |error: crate::db::DbError| broker_error(action, &error);
    let version = db.write(schema::create).await.map_err(fail)?;
    if !schema::is_known(version) {
        let what = format!("{action}: {} is of version {version}, newer than this program", db.path().display());
        return Err(BrokerError::new(BrokerErrorKind::Conflict, what));
    }
    let stored = db.read(schema::load).await.map_err(fail)?;
    let dedup = dedup::Dedup::new(options.dedup_window, &stored.generations);
    let mut core = Core::new(stored.next_number, dedup, stored.next_due, telemetry.clone());
    let mut chores = chores::Chores::default();
    for queue in stored.queues {
        match queue.name {
            StoredName::Queue(name) => {
                if name == Queue::Publish {
                    core.publish = queue.id;
                }
                let is_inbox = matches!(name, Queue::Inbox(_));
                core.add_queue(queue.id, QueueState::new(name, queue.counts));
                // Earlier files have the limits in the rows of outbox and notify queue, too.
                if is_inbox {
                    core.set_limits(queue.id, queue.max_messages, queue.ttl_ms);
                }
            }
            StoredName::Unrouted => {
                core.unrouted = queue.id;
                core.add_queue(queue.id, QueueState::new(Queue::Unrouted, queue.counts));
            }
            StoredName::Deleted => chores.add(chores::Chore::DeletedQueue(queue.id)),
        }
    }
    let mut patterns: HashMap<u32, Vec<Pattern>> = HashMap::new();
    for (queue, pattern) in stored.bindings {
        match Pattern::parse(&pattern) {
            Ok(pattern) => patterns.entry(queue).or_default().push(pattern),
            Err(error) => log::error!("{action}: the stored pattern {pattern:?} {error}"),
        }
    }
    for (queue, patterns) in patterns {
        core.bind(queue, patterns);
    }
    let shared = Arc::new_cyclic(|me| Shared {
        core: Mutex::new(core),
        db,
        telemetry,
        pending: Arc::new(Semaphore::new(PENDING_KIB_MAX)),
        claims_changed: Notify::new(),
        dead_turn: tokio::sync::Mutex::new(()),
        retry_at: Mutex::new(None),
        chores: Mutex::new(chores),
        me: me.clone(),
    });
    shared.db.set_standing_job(Arc::new(commit::Committer(Arc::downgrade(&shared))));
    timer::start(&shared).map_err(|error| BrokerError::new(BrokerErrorKind::Internal, action).caused_by(error))?;
    Ok(shared)
}

#[async_trait]
impl Broker for Embedded {
    fn name(&self) -> &'static str {
        "embedded"
    }

    fn health(&self) -> Health {
        if self.shared.db.has_room() { Health::Ready } else { Health::Blocked("the disk is nearly full".into()) }
    }

    async fn declare_client(&self, client: &ClientId, limits: &Limits) -> Result<(), BrokerError> {
        let max_messages = limits.max_inbox_messages;
        let ttl_ms = limits.inbox_ttl_s.map(|s| i64::try_from(s.saturating_mul(1000)).unwrap_or(i64::MAX));
        let names = [Queue::Outbox(client.clone()), Queue::Notify(client.clone()), Queue::Inbox(client.clone())];
        let (rows, owner) = (names.clone(), client.clone());
        let write = move |connection: &Connection| -> rusqlite::Result<Vec<u32>> {
            let mut insert = connection.prepare_cached(schema::DECLARE)?;
            rows.iter()
                .map(|name| {
                    let limits = match name {
                        Queue::Inbox(_) => (max_messages, ttl_ms),
                        _ => (None, None),
                    };
                    let row = params![owner.as_str(), schema::kind_of(name), limits.0, limits.1];
                    insert.query_row(row, |row| row.get(0))
                })
                .collect()
        };
        let shared = Arc::clone(&self.shared);
        let then = move |ids: Vec<u32>| {
            shared.with_core(|core| {
                for (name, id) in names.into_iter().zip(ids) {
                    if !core.queues.contains_key(&id) {
                        core.add_queue(id, QueueState::new(name.clone(), queue::Counts::default()));
                    }
                    if matches!(name, Queue::Inbox(_)) {
                        core.set_limits(id, max_messages, ttl_ms);
                    }
                }
            });
        };
        let done = self.shared.db.write_then(write, then).await;
        done.map_err(|error| broker_error(&format!("declare the queues of {client}"), &error))
    }

    async fn bind(&self, client: &ClientId, patterns: &[Pattern]) -> Result<(), BrokerError> {
        let action = format!("bind queue {client}-inbox");
        let queues = self.shared.core.lock().client(client);
        let inbox = queues.ok_or_else(|| BrokerError::new(BrokerErrorKind::NotFound, &action))?.inbox;
        let mut patterns = patterns.to_vec();
        patterns.sort();
        patterns.dedup();
        let rows = patterns.clone();
        let write = move |connection: &Connection| {
            // The client may have been deleted since; its queue must not get bindings that nobody deletes.
            let is_there = connection
                .prepare_cached("SELECT 1 FROM queue WHERE id = ?1 AND client IS NOT NULL")?
                .exists([inbox])?;
            if !is_there {
                return Ok(false);
            }
            connection.prepare_cached("DELETE FROM binding WHERE queue = ?1")?.execute([inbox])?;
            let mut insert = connection.prepare_cached("INSERT INTO binding (queue, pattern) VALUES (?1, ?2)")?;
            for pattern in &rows {
                insert.execute(params![inbox, pattern.as_str()])?;
            }
            Ok(true)
        };
        let shared = Arc::clone(&self.shared);
        let then = move |is_there| {
            if is_there {
                shared.with_core(|core| core.bind(inbox, patterns));
            }
            is_there
        };
        let done = self.shared.db.write_then(write, then).await;
        match done.map_err(|error| broker_error(&action, &error))? {
            true => Ok(()),
            false => Err(BrokerError::new(BrokerErrorKind::NotFound, &action)),
        }
    }

    async fn delete_client(&self, client: &ClientId) -> Result<(), BrokerError> {
        let owner = client.clone();
        let write = move |connection: &Connection| -> rusqlite::Result<Vec<u32>> {
            let ids: Vec<u32> = connection
                .prepare_cached("UPDATE queue SET client = NULL, kind = 'deleted' WHERE client = ?1 RETURNING id")?
                .query_map([owner.as_str()], |row| row.get(0))?
                .collect::<rusqlite::Result<_>>()?;
            for id in &ids {
                connection.prepare_cached("DELETE FROM binding WHERE queue = ?1")?.execute([id])?;
            }
            Ok(ids)
        };
        let shared = Arc::clone(&self.shared);
        let then = move |ids: Vec<u32>| {
            shared.with_core(|core| ids.iter().for_each(|id| core.remove_queue(*id)));
            let mut chores = shared.chores.lock();
            ids.into_iter().for_each(|id| chores.add(chores::Chore::DeletedQueue(id)));
        };
        let done = self.shared.db.write_then(write, then).await;
        done.map_err(|error| broker_error(&format!("delete the queues of {client}"), &error))
    }

    async fn publish_in_turn(
        &self,
        queue: &Queue,
        messages: Vec<Message>,
        turn: Turn,
    ) -> Result<Published, BrokerError> {
        publish::publish(&self.shared, queue, messages, turn).await
    }

    async fn consume(&self, queue: &Queue, prefetch: u32) -> Result<Consumer, BrokerError> {
        Ok(Box::new(consumer::EmbeddedConsumer::new(Arc::clone(&self.shared), queue.clone(), prefetch)?))
    }

    async fn pull(
        &self,
        client: &ClientId,
        max: usize,
        wait: Duration,
        mode: PullMode,
    ) -> Result<Vec<Pulled>, BrokerError> {
        pull::pull(&self.shared, client, max, wait, mode).await
    }

    async fn settle_pulled(
        &self,
        client: &ClientId,
        receipts: Vec<Receipt>,
        outcome: PullOutcome,
    ) -> Result<Vec<Receipt>, BrokerError> {
        pull::settle(&self.shared, client, receipts, outcome).await
    }

    async fn depths(&self, client: &ClientId) -> Result<Depths, BrokerError> {
        let depths = self.shared.core.lock().depths(client);
        depths.ok_or_else(|| BrokerError::new(BrokerErrorKind::NotFound, format!("count the messages of {client}")))
    }

    async fn oldest(&self, queue: &Queue) -> Result<Option<Timestamp>, BrokerError> {
        Ok(self.shared.core.lock().oldest(queue).map(Timestamp::from_millis))
    }

    async fn dead_letters(
        &self,
        client: &ClientId,
        after: Option<&str>,
        limit: usize,
    ) -> Result<DeadPage, BrokerError> {
        self.shared.dead_letters(client, after, limit).await
    }

    async fn replay_dead(&self, client: &ClientId, ids: Option<&[String]>) -> Result<u64, BrokerError> {
        self.shared.replay_dead(client, ids).await
    }

    async fn purge_dead(&self, client: &ClientId, before: Option<Timestamp>) -> Result<u64, BrokerError> {
        self.shared.purge_dead(client, before).await
    }

    async fn internal_depths(&self) -> Result<Vec<(&'static str, u64)>, BrokerError> {
        let core = self.shared.core.lock();
        let depth = |id: u32| core.queues.get(&id).map_or(0, |queue| queue.counts.depth);
        Ok(vec![("soar-publish", depth(core.publish)), ("soar-unrouted", depth(core.unrouted))])
    }

    async fn close(&self) {
        self.shared.with_core(Core::close);
        if let Err(error) = self.shared.barrier("close the embedded broker").await {
            log::error!("what was settled last may be handed out again after the next start: {error}");
        }
    }
}
