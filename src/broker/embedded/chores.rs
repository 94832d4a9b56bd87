//! Getting rid of rows in the background, a few at a time, so that no commit is held up by a large deletion.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use super::{Shared, dedup, schema};
use crate::db::{DbError, WriteJob};

/// Rows deleted for one chore in one step.
const ROWS_PER_STEP: usize = if cfg!(test) { 7 } else { 1000 };

/// Chores in one step; most have few rows, and those behind one with many wait for the next.
const CHORES_PER_STEP: usize = 32;

/// How long to wait after a step that failed, in milliseconds.
const RETRY_MS: u64 = 1000;

/// Rows that are no longer needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Chore {
    /// Those of a queue that was deleted.
    DeletedQueue(u32),
    /// A generation of own ids.
    OwnIds(u32),
}

/// What is to be done. What is lost in a kill is found again: deleted queues by their rows, generations by their age.
#[derive(Debug, Default)]
pub(super) struct Chores {
    waiting: VecDeque<Chore>,
    is_running: bool,
    /// After a failure: when to try again.
    not_before: Option<Instant>,
}

impl Chores {
    pub(super) fn add(&mut self, chore: Chore) {
        self.waiting.push_back(chore);
    }
}

/// One step's work.
struct Step {
    shared: Arc<Shared>,
    chores: Vec<Chore>,
    unfinished: Vec<Chore>,
}

/// Starts a step unless one is under way.
pub(super) fn step(shared: &Arc<Shared>) {
    let chores = {
        let mut list = shared.chores.lock();
        if list.is_running || list.waiting.is_empty() || list.not_before.is_some_and(|at| Instant::now() < at) {
            return;
        }
        list.is_running = true;
        let count = list.waiting.len().min(CHORES_PER_STEP);
        list.waiting.drain(..count).collect()
    };
    shared.db.submit(Box::new(Step { shared: Arc::clone(shared), chores, unfinished: Vec::new() }));
}

impl WriteJob for Step {
    fn run(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        self.unfinished.clear();
        // What is left of a failed window may hold rows of a queue that was deleted since, and changes to them. Those
        // come first: a row that came later would stay forever, and a reference would be dropped twice.
        let mut must_wait = self.shared.retry_at.lock().is_some();
        for &chore in &self.chores {
            if must_wait {
                self.unfinished.push(chore);
                continue;
            }
            let more = match chore {
                Chore::DeletedQueue(queue) => schema::delete_some(connection, queue, ROWS_PER_STEP)?,
                Chore::OwnIds(generation) => dedup::delete_some(connection, generation, ROWS_PER_STEP)?,
            };
            if more {
                self.unfinished.push(chore);
                must_wait = true;
            }
        }
        Ok(())
    }

    fn done(self: Box<Self>, result: Result<(), DbError>) {
        let Self { shared, chores, unfinished } = *self;
        let (again, not_before) = match result {
            Ok(()) => (unfinished, None),
            Err(error) => {
                log::warn!("delete old rows: {error}; tried again later");
                (chores, Some(Instant::now() + Duration::from_millis(RETRY_MS)))
            }
        };
        let mut list = shared.chores.lock();
        (list.is_running, list.not_before) = (false, not_before);
        list.waiting.extend(again);
    }
}
