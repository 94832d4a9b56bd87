//! What happens by itself: leases run out, delays are over, messages expire, own ids are forgotten.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::chores::Chore;
use super::core::Core;
use super::queue::{Holder, Slot};
use super::{Shared, chores, schema};
use crate::time::Timestamp;

/// How often it looks, in milliseconds: the precision of leases and delays.
const TICK_MS: u64 = if cfg!(test) { 5 } else { 20 };

/// How often it looks at what may wait longer, in ticks.
const SLOW_TICKS: u64 = 25;

/// Delays released in one step.
const RELEASE_STEP: usize = if cfg!(test) { 3 } else { 1000 };

/// Starts the thread; it ends when the broker closes or is gone.
pub(super) fn start(shared: &Arc<Shared>) -> std::io::Result<()> {
    let weak = Arc::downgrade(shared);
    std::thread::Builder::new().name("broker-timer".into()).spawn(move || run(&weak))?;
    Ok(())
}

fn run(weak: &Weak<Shared>) {
    let mut ticks: u64 = 0;
    loop {
        std::thread::park_timeout(Duration::from_millis(TICK_MS));
        let Some(shared) = weak.upgrade() else { return };
        if shared.core.lock().is_closed {
            return;
        }
        ticks += 1;
        let now_ms = Timestamp::now().as_millis();
        shared.with_core(|core| end_leases(core, Instant::now()));
        release_due(&shared, now_ms);
        if ticks.is_multiple_of(SLOW_TICKS) {
            shared.with_core(|core| {
                core.retry_loads();
                for inbox in core.with_ttl.clone() {
                    core.expire_front(inbox, now_ms);
                }
            });
            forget_own_ids(&shared, now_ms);
        }
        chores::step(&shared);
    }
}

fn end_leases(core: &mut Core, now: Instant) {
    while let Some(&(until, queue, number)) = core.lease_ends.first()
        && until <= now
    {
        core.lease_ends.pop_first();
        let lease = core.queues.get_mut(&queue).and_then(|queue| queue.leases.remove(&number));
        for pos in lease.into_iter().flat_map(|lease| lease.positions) {
            core.give_back(queue, pos, Holder::Lease(number));
        }
    }
}

/// Reads what is due and makes it ready. One reading at a time, and the next only when what the last one changed is
/// durable: so no row is released twice.
fn release_due(shared: &Arc<Shared>, now_ms: i64) {
    let since = {
        let mut core = shared.core.lock();
        let due = core.next_due.is_some_and(|due| due <= now_ms);
        if !due || core.is_releasing {
            return;
        }
        core.is_releasing = true;
        core.durable
    };
    let job_shared = Arc::clone(shared);
    let submitted = shared.db.submit_read(move |connection| {
        let read = read_due(connection, now_ms);
        job_shared.with_core(|core| match read {
            Ok((due, next)) => released(core, due, next, since),
            Err(error) => {
                log::error!("read delayed messages: {error}");
                core.is_releasing = false;
            }
        });
    });
    if !submitted {
        shared.core.lock().is_releasing = false;
    }
}

/// Entries whose delay is over, and when the next one is.
type Due = (Vec<(u32, Slot)>, Option<i64>);

fn read_due(connection: &Connection, now_ms: i64) -> rusqlite::Result<Due> {
    let rows: Vec<(u32, Slot)> = connection
        .prepare_cached(schema::DUE)?
        .query_map((now_ms, RELEASE_STEP), |row| {
            let slot = Slot {
                pos: row.get(1)?,
                body: schema::cold(row.get(2)?, row.get(7)?),
                at: row.get(3)?,
                deliveries: row.get(4)?,
                attempts: row.get(5)?,
                window: 0,
                index: 0,
                leased: None,
            };
            Ok((row.get(0)?, slot))
        })?
        .collect::<rusqlite::Result<_>>()?;
    let next = if rows.len() == RELEASE_STEP {
        Some(now_ms)
    } else {
        connection.prepare_cached(schema::NEXT_DUE)?.query_row([now_ms], |row| row.get(0))?
    };
    Ok((rows, next))
}

fn released(core: &mut Core, due: Vec<(u32, Slot)>, next: Option<i64>, since: u64) {
    // What was delayed in a window that was not durable when the reading began may have been missed.
    core.recent_dues.retain(|std::cmp::Reverse((_, window))| *window > since);
    let recent = core.recent_dues.peek().map(|std::cmp::Reverse((due, _))| *due);
    core.next_due = match (next, recent) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    if due.is_empty() {
        core.is_releasing = false;
        return;
    }
    for (queue, slot) in due {
        core.release(queue, slot);
    }
    if core.open.is_empty() {
        // They were of queues that have gone.
        core.is_releasing = false;
        return;
    }
    // The next reading must see that these are ready.
    core.released_in = core.open.number;
}

/// Deletes own ids that no longer count, a step at a time.
fn forget_own_ids(shared: &Arc<Shared>, now_ms: i64) {
    while let Some(generation) = shared.with_core(|core| core.dedup.expire(now_ms)) {
        shared.chores.lock().add(Chore::OwnIds(generation));
    }
}
