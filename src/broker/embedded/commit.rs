//! Commit windows become transactions: the broker is the database's standing job.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::Shared;
use super::window::{Window, broker_error};
use crate::db::{DbError, DbErrorKind, StandingJob, Turn, WriteJob};

/// How long to wait after a failed commit before the next, in milliseconds.
const RETRY_MS: u64 = if cfg!(test) { 10 } else { 100 };

/// How long a commit waits for pipelines at most, and between two looks, in microseconds. A hop takes some ten.
const TRANSIT_US_MAX: u64 = 400;
const TRANSIT_STEP_US: u64 = 20;

/// The window that is being written.
struct Flush {
    shared: Arc<Shared>,
    window: Window,
    began: Instant,
}

/// What the database asks for work.
///
/// Weak, because the database is part of what the broker shares: neither must keep the other alive.
pub(super) struct Committer(pub(super) Weak<Shared>);

impl StandingJob for Committer {
    fn begin(&self) -> Turn {
        let Some(shared) = self.0.upgrade() else { return Turn::Nothing };
        if let Some(at) = shared.retry_at.lock().filter(|at| Instant::now() < *at) {
            return Turn::NotBefore(at);
        }
        let_pipelines_run(&shared);
        match shared.with_core(super::core::Core::take_window) {
            Some(window) => Turn::Write(Box::new(Flush { shared, window, began: Instant::now() })),
            None => {
                // Nothing is left of what failed: all of it was refused.
                *shared.retry_at.lock() = None;
                Turn::Nothing
            }
        }
    }
}

/// Waits, shortly, until the pipelines have forwarded what was accepted: then only where it ended up is written.
fn let_pipelines_run(shared: &Shared) {
    let until = Instant::now() + Duration::from_micros(TRANSIT_US_MAX);
    while shared.core.lock().in_transit > 0 && Instant::now() < until {
        std::thread::park_timeout(Duration::from_micros(TRANSIT_STEP_US));
    }
}

impl WriteJob for Flush {
    fn run(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        self.window.write(connection)
    }

    fn done(self: Box<Self>, result: Result<(), DbError>) {
        let Self { shared, mut window, began } = *self;
        match result {
            Ok(()) => {
                shared.telemetry.metrics.commit_latency.observe(began.elapsed().as_secs_f64());
                *shared.retry_at.lock() = None;
                shared.with_core(|core| core.window_durable(&window));
                // Whoever stopped waiting needs no answer.
                for waiter in window.waiters.drain(..) {
                    let _ = waiter.send(Ok(()));
                }
            }
            Err(error) => {
                if error.kind == DbErrorKind::Full {
                    log::warn!("commit: the disk is full; what was sent is refused until there is room");
                } else {
                    log::error!("commit: {error}");
                }
                *shared.retry_at.lock() = Some(Instant::now() + Duration::from_millis(RETRY_MS));
                let waiters = shared.with_core(|core| core.window_failed(window));
                let error = broker_error("commit", &error);
                for waiter in waiters {
                    let _ = waiter.send(Err(error.clone()));
                }
            }
        }
        // Whoever sent an own id of this window again can look now whether it was taken.
        shared.claims_changed.notify_waiters();
    }
}
