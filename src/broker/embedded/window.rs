//! The commit window: what changed since the last transaction, net, and how it is written.
//!
//! An entry that came and went within one window leaves nothing to write: its insert is cancelled. So a message that
//! runs ahead through outbox, `soar-publish` and the exchange before the commit costs one body and one row per inbox.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use rusqlite::{Connection, params};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::dedup::IdHash;
use super::queue::{Body, BodyRef, Counts};
use super::schema;
use crate::broker::{BrokerError, DeadReason, Origin};
use crate::db::DbError;

/// A new row in `entry`.
#[derive(Debug)]
pub(super) struct Insert {
    pub(super) queue: u32,
    pub(super) pos: u64,
    pub(super) body: BodyRef,
    pub(super) at: i64,
    pub(super) deliveries: u32,
    pub(super) attempts: u32,
    /// Delayed until then, in milliseconds since the epoch.
    pub(super) due: Option<i64>,
    /// This row brings its body along. Set when the window is taken.
    pub(super) with_body: bool,
}

/// What becomes of the body of a row that goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BodyFate {
    /// It lies elsewhere too, or its references are counted in [`Window::shared`].
    Keep,
    /// It goes with its only row.
    Drop,
}

/// A row of `entry` that goes.
#[derive(Debug)]
pub(super) struct Delete {
    pub(super) queue: u32,
    pub(super) pos: u64,
    pub(super) body: u64,
    pub(super) fate: BodyFate,
}

/// What a row of `entry` says from now on.
#[derive(Debug)]
pub(super) struct Update {
    pub(super) deliveries: u32,
    pub(super) attempts: u32,
    pub(super) due: Option<i64>,
}

/// A new row in `dead`.
#[derive(Debug)]
pub(super) struct DeadInsert {
    /// The client's inbox queue.
    pub(super) queue: u32,
    pub(super) pos: u64,
    pub(super) body: BodyRef,
    pub(super) origin: Origin,
    pub(super) reason: DeadReason,
    pub(super) attempts: u32,
    pub(super) died_at: i64,
    pub(super) with_body: bool,
}

/// A sender's own id that was accepted.
#[derive(Debug)]
pub(super) struct OwnId {
    pub(super) generation: u32,
    pub(super) hash: IdHash,
    pub(super) at: i64,
}

/// Told when the window is durable, or why it is not.
pub(super) type Waiter = oneshot::Sender<Result<(), BrokerError>>;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Window {
    pub(super) number: u64,
    pub(super) inserts: Vec<Option<Insert>>,
    pub(super) deletes: Vec<Delete>,
    /// Runs of rows that go without their bodies: queue, first and last position.
    pub(super) delete_ranges: Vec<(u32, u64, u64)>,
    /// Rows that change, by queue and position; only the last change counts, so a message that comes back again and
    /// again while nothing can be written costs no more than one.
    pub(super) updates: BTreeMap<(u32, u64), Update>,
    /// Bodies that go although no single row takes them along: of ranges, of dead letters, and of entries whose last
    /// row never reached the disk.
    pub(super) body_drops: Vec<u64>,
    /// Changes in the references of shared bodies.
    pub(super) shared: HashMap<u64, (i64, Option<Arc<Body>>)>,
    pub(super) dead_inserts: Vec<DeadInsert>,
    /// Rows of `dead` that go, by queue and position.
    pub(super) dead_deletes: Vec<(u32, u64)>,
    /// Queues whose counts may have changed.
    pub(super) touched: Vec<u32>,
    /// Their counts, taken with the window.
    pub(super) counts: Vec<(u32, Counts)>,
    /// Own ids accepted in it.
    pub(super) own_ids: Vec<OwnId>,
    /// Generations of own ids that begin in it: number and time.
    pub(super) generations: Vec<(u32, i64)>,
    /// Inboxes to wake when it is durable.
    pub(super) wake: Vec<u32>,
    pub(super) waiters: Vec<Waiter>,
    /// Given back with the window: they bound what is accepted and not durable.
    pub(super) permits: Vec<OwnedSemaphorePermit>,
    /// The next free number for positions and bodies.
    pub(super) next_number: u64,
}

impl Window {
    pub(super) fn new(number: u64) -> Self {
        Self { number, ..Self::default() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.inserts.is_empty()
            && self.deletes.is_empty()
            && self.delete_ranges.is_empty()
            && self.updates.is_empty()
            && self.body_drops.is_empty()
            && self.shared.is_empty()
            && self.dead_inserts.is_empty()
            && self.dead_deletes.is_empty()
            && self.own_ids.is_empty()
            && self.waiters.is_empty()
    }

    /// How many rows it will write, about.
    pub(super) fn weight(&self) -> usize {
        self.inserts.len() + self.deletes.len() + self.dead_inserts.len()
    }

    /// Notes that a shared body has this many references more (or fewer).
    pub(super) fn change_refs(&mut self, body: &BodyRef, change: i64) {
        let (delta, hot) = self.shared.entry(body.id()).or_default();
        *delta += change;
        if let BodyRef::Hot(body) = body {
            hot.get_or_insert_with(|| Arc::clone(body));
        }
    }

    /// Settles which rows bring their bodies along. Called under the broker's lock, when the window is taken.
    pub(super) fn seal(&mut self) {
        for insert in self.inserts.iter_mut().flatten() {
            if let BodyRef::Hot(body) = &insert.body {
                insert.with_body |= body.mark_stored();
            }
        }
        for insert in &mut self.dead_inserts {
            if let BodyRef::Hot(body) = &insert.body {
                insert.with_body |= body.mark_stored();
            }
        }
        // A shared body that came and went within the window never was.
        self.shared.retain(|_, (delta, body)| *delta != 0 || body.as_ref().is_none_or(|body| body.is_stored()));
    }

    /// Writes it. May be called again after a rollback.
    pub(super) fn write(&self, connection: &Connection) -> rusqlite::Result<()> {
        self.write_entries(connection)?;
        self.write_dead(connection)?;
        self.write_shared(connection)?;
        let mut drop_body = connection.prepare_cached(schema::DELETE_BODY)?;
        for body in &self.body_drops {
            drop_body.execute([body])?;
        }
        let mut set_counts = connection.prepare_cached(schema::SET_COUNTS)?;
        for (queue, counts) in &self.counts {
            set_counts.execute(params![queue, counts.depth, counts.delayed, counts.dead])?;
        }
        let mut remember = connection.prepare_cached(schema::INSERT_OWN_ID)?;
        for own in &self.own_ids {
            remember.execute(params![own.generation, &own.hash[..], own.at])?;
        }
        let mut begin = connection.prepare_cached(schema::INSERT_GENERATION)?;
        for (generation, started_at) in &self.generations {
            begin.execute(params![generation, started_at])?;
        }
        connection.prepare_cached(schema::SET_NEXT_NUMBER)?.execute([self.next_number])?;
        Ok(())
    }

    fn write_entries(&self, connection: &Connection) -> rusqlite::Result<()> {
        let mut insert_entry = connection.prepare_cached(schema::INSERT_ENTRY)?;
        for insert in self.inserts.iter().flatten() {
            if insert.with_body {
                insert_body(connection, &insert.body)?;
            }
            insert_entry.execute(params![
                insert.queue,
                insert.pos,
                insert.body.id(),
                insert.at,
                insert.deliveries,
                insert.attempts,
                insert.due,
            ])?;
        }
        let mut update = connection.prepare_cached(schema::UPDATE_ENTRY)?;
        for ((queue, pos), change) in &self.updates {
            update.execute(params![queue, pos, change.deliveries, change.attempts, change.due])?;
        }
        let mut delete_range = connection.prepare_cached(schema::DELETE_RANGE)?;
        for range in &self.delete_ranges {
            delete_range.execute(*range)?;
        }
        let mut delete_entry = connection.prepare_cached(schema::DELETE_ENTRY)?;
        let mut delete_body = connection.prepare_cached(schema::DELETE_BODY)?;
        for delete in &self.deletes {
            delete_entry.execute(params![delete.queue, delete.pos])?;
            if delete.fate == BodyFate::Drop {
                delete_body.execute([delete.body])?;
            }
        }
        Ok(())
    }

    fn write_dead(&self, connection: &Connection) -> rusqlite::Result<()> {
        let mut insert_dead = connection.prepare_cached(schema::INSERT_DEAD)?;
        for dead in &self.dead_inserts {
            if dead.with_body {
                insert_body(connection, &dead.body)?;
            }
            insert_dead.execute(params![
                dead.queue,
                dead.pos,
                dead.body.id(),
                schema::origin_code(dead.origin),
                dead.reason.as_str(),
                dead.attempts,
                dead.died_at,
            ])?;
        }
        let mut delete_dead = connection.prepare_cached(schema::DELETE_DEAD)?;
        for (queue, pos) in &self.dead_deletes {
            delete_dead.execute(params![queue, pos])?;
        }
        Ok(())
    }

    fn write_shared(&self, connection: &Connection) -> rusqlite::Result<()> {
        let mut change = connection.prepare_cached(schema::CHANGE_REFS)?;
        let mut drop_refs = connection.prepare_cached(schema::DELETE_REFS)?;
        let mut drop_body = connection.prepare_cached(schema::DELETE_BODY)?;
        // In the order of their keys, so that neighbours share a page.
        let ordered: BTreeMap<u64, i64> = self.shared.iter().map(|(body, (delta, _))| (*body, *delta)).collect();
        for (body, delta) in ordered {
            let refs: i64 = change.query_row(params![body, delta], |row| row.get(0))?;
            if refs <= 0 {
                drop_refs.execute([body])?;
                drop_body.execute([body])?;
            }
        }
        Ok(())
    }

    /// After a failed commit: takes over what must still be written from the window that failed. What was accepted in
    /// it is void; everything else happened in memory and is tried again.
    pub(super) fn take_over(&mut self, failed: Self) {
        debug_assert!(failed.waiters.is_empty(), "waiters are answered first");
        let alive = |body: &BodyRef| !body.is_cancelled();
        for slot in &mut self.inserts {
            if slot.as_ref().is_some_and(|insert| !alive(&insert.body)) {
                *slot = None;
            }
        }
        // Behind, not before: slots know their inserts in this window by index. Within a transaction all inserts run
        // before all deletes, so the order among the windows does not matter.
        self.inserts.extend(failed.inserts.into_iter().flatten().filter(|i| alive(&i.body)).map(Some));
        let newer = std::mem::replace(&mut self.updates, failed.updates);
        self.updates.extend(newer);
        self.deletes.extend(failed.deletes);
        self.delete_ranges.extend(failed.delete_ranges);
        self.body_drops.extend(failed.body_drops);
        self.dead_inserts.extend(failed.dead_inserts);
        self.dead_inserts.retain(|dead| alive(&dead.body));
        self.dead_deletes.extend(failed.dead_deletes);
        for (body, (delta, hot)) in failed.shared {
            let entry = self.shared.entry(body).or_default();
            entry.0 += delta;
            entry.1 = entry.1.take().or(hot);
        }
        self.shared.retain(|_, (_, body)| body.as_ref().is_none_or(|body| !body.is_cancelled()));
        // Later own ids may belong to a generation that began in the window that failed.
        self.generations.extend(failed.generations);
    }
}

fn insert_body(connection: &Connection, body: &BodyRef) -> rusqlite::Result<()> {
    let BodyRef::Hot(body) = body else { return Ok(()) };
    let (head, data) = schema::encode_payload(&body.payload);
    connection.prepare_cached(schema::INSERT_BODY)?.execute(params![body.id, head, &data[..]])?;
    Ok(())
}

/// What a failed commit means to whoever waits for it.
pub(super) fn broker_error(action: &str, error: &DbError) -> BrokerError {
    use crate::broker::BrokerErrorKind as Kind;
    use crate::db::DbErrorKind;
    let kind = match error.kind {
        DbErrorKind::Full => Kind::DiskFull,
        DbErrorKind::Closed => Kind::Closed,
        DbErrorKind::Locked | DbErrorKind::Internal => Kind::Unavailable,
    };
    BrokerError::new(kind, action).caused_by(error.clone())
}
