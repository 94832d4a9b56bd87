//! Getting rid of rows in the background, a few at a time, so that no commit is held up by a large deletion.

use std::collections::VecDeque;
use std::sync::Arc;

use rusqlite::Connection;

use super::{Shared, dedup, schema};
use crate::db::{DbError, WriteJob};

/// Rows deleted for one chore in one step.
const ROWS_PER_STEP: usize = 1000;

/// Chores in one step; most have few rows.
const CHORES_PER_STEP: usize = 32;

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
        if list.is_running || list.waiting.is_empty() {
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
        for &chore in &self.chores {
            let more = match chore {
                Chore::DeletedQueue(queue) => schema::delete_some(connection, queue, ROWS_PER_STEP)?,
                Chore::OwnIds(generation) => dedup::delete_some(connection, generation, ROWS_PER_STEP)?,
            };
            if more {
                self.unfinished.push(chore);
            }
        }
        Ok(())
    }

    fn done(self: Box<Self>, result: Result<(), DbError>) {
        let Self { shared, chores, unfinished } = *self;
        let again = match result {
            Ok(()) => unfinished,
            Err(error) => {
                log::warn!("delete old rows: {error}; tried again later");
                chores
            }
        };
        let mut list = shared.chores.lock();
        list.is_running = false;
        list.waiting.extend(again);
    }
}
