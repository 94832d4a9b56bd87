//! Dead letters: listed from disk, replayed and purged in steps.

use rusqlite::{Connection, OptionalExtension as _};

use super::queue::BodyRef;
use super::window::broker_error;
use super::{Shared, schema};
use crate::broker::{BrokerError, BrokerErrorKind, DeadLetter, DeadPage, DeadReason, Origin};
use crate::client::ClientId;
use crate::time::Timestamp;

/// Dead letters replayed or purged in one step: bounds the memory of a step and the length of its commit.
const STEP: usize = if cfg!(test) { 4 } else { 1000 };

/// Bytes of messages on one page, about.
const PAGE_BYTES_MAX: usize = 16 << 20;

/// A dead letter's id: its position, in hexadecimal of fixed width, so that it sorts as it was written.
fn id_of(pos: u64) -> String {
    format!("{pos:016x}")
}

/// The position that an id names; SQLite's integers are signed, and none lies beyond them.
fn pos_of(id: &str) -> Option<u64> {
    u64::from_str_radix(id, 16).ok().filter(|pos| i64::try_from(*pos).is_ok())
}

/// One row, without its body.
struct Row {
    pos: u64,
    body: BodyRef,
    origin: Origin,
}

fn row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
    Ok(Row {
        pos: row.get(0)?,
        body: schema::cold(row.get(1)?, row.get(3)?),
        origin: schema::origin_from_code(row.get(2)?),
    })
}

impl Shared {
    fn inbox_of(&self, client: &ClientId, action: &str) -> Result<u32, BrokerError> {
        let queues = self.core.lock().client(client);
        let missing = || BrokerError::new(BrokerErrorKind::NotFound, format!("{action} {client}"));
        Ok(queues.ok_or_else(missing)?.inbox)
    }

    pub(super) async fn dead_letters(
        &self,
        client: &ClientId,
        after: Option<&str>,
        limit: usize,
    ) -> Result<DeadPage, BrokerError> {
        let action = "list dead letters of";
        let inbox = self.inbox_of(client, action)?;
        // What died a moment ago is on the page, too.
        self.barrier(action).await?;
        let after = after.and_then(pos_of).unwrap_or(0);
        let read = move |connection: &Connection| page(connection, inbox, after, limit);
        let (dead_letters, more) = self.db.read(read).await.map_err(|error| broker_error(action, &error))?;
        let next = if more { dead_letters.last().map(|dead| dead.id.clone()) } else { None };
        Ok(DeadPage { dead_letters, next })
    }

    pub(super) async fn replay_dead(&self, client: &ClientId, ids: Option<&[String]>) -> Result<u64, BrokerError> {
        let action = "replay dead letters of";
        // One at a time, each reading only when the one before is durable: no dead letter is replayed twice.
        let _turn = self.dead_turn.lock().await;
        // What dies meanwhile, be it because of what is put back, is not put back again.
        let until = self.core.lock().next_number();
        let mut replayed = 0;
        match ids {
            Some(ids) => {
                for step in ids.chunks(STEP) {
                    let mut positions: Vec<u64> = step.iter().filter_map(|id| pos_of(id)).collect();
                    positions.sort_unstable();
                    positions.dedup();
                    replayed +=
                        self.take_dead(client, action, true, move |c, inbox| named(c, inbox, &positions)).await?;
                }
            }
            None => loop {
                let step =
                    self.take_dead(client, action, true, move |c, inbox| oldest(c, inbox, until, i64::MAX)).await?;
                replayed += step;
                if step < STEP as u64 {
                    break;
                }
            },
        }
        Ok(replayed)
    }

    pub(super) async fn purge_dead(&self, client: &ClientId, before: Option<Timestamp>) -> Result<u64, BrokerError> {
        let action = "purge dead letters of";
        let _turn = self.dead_turn.lock().await;
        let until = self.core.lock().next_number();
        let before = before.map_or(i64::MAX, Timestamp::as_millis);
        let mut purged = 0;
        loop {
            let step = self.take_dead(client, action, false, move |c, inbox| oldest(c, inbox, until, before)).await?;
            purged += step;
            if step < STEP as u64 {
                return Ok(purged);
            }
        }
    }

    /// Takes the rows that `select` finds out of the dead letters; back into their queues, or away.
    async fn take_dead(
        &self,
        client: &ClientId,
        action: &'static str,
        replay: bool,
        select: impl FnOnce(&Connection, u32) -> rusqlite::Result<Vec<Row>> + Send + 'static,
    ) -> Result<u64, BrokerError> {
        let inbox = self.inbox_of(client, action)?;
        self.barrier(action).await?;
        let rows = self.db.read(move |c| select(c, inbox)).await.map_err(|error| broker_error(action, &error))?;
        let taken = rows.len() as u64;
        let durable = self.with_core(|core| {
            // A client that was created again since has none of these.
            let queues = core.client(client).filter(|queues| queues.inbox == inbox)?;
            let now_ms = Timestamp::now().as_millis();
            for row in rows {
                let back_into = replay.then_some(match row.origin {
                    Origin::Inbox => queues.inbox,
                    Origin::Outbox => queues.outbox,
                    Origin::Notify => queues.notify,
                });
                core.unbury(queues.inbox, row.pos, row.body, back_into, now_ms);
            }
            Some(core.wait_for_open())
        });
        let gone = || BrokerError::new(BrokerErrorKind::NotFound, format!("{action} {client}"));
        self.committed(durable.ok_or_else(gone)?, action).await?;
        Ok(taken)
    }
}

/// Up to `limit` dead letters, fewer when they are large, and whether there are more.
fn page(connection: &Connection, inbox: u32, after: u64, limit: usize) -> rusqlite::Result<(Vec<DeadLetter>, bool)> {
    let mut select = connection.prepare_cached(schema::DEAD_PAGE)?;
    let mut rows = select.query((inbox, after, limit + 1))?;
    let (mut page, mut bytes) = (Vec::new(), 0);
    while let Some(row) = rows.next()? {
        if page.len() == limit || bytes > PAGE_BYTES_MAX {
            return Ok((page, true));
        }
        let (head, reason): (Vec<u8>, String) = (row.get(6)?, row.get(3)?);
        let data: Vec<u8> = row.get(7)?;
        bytes += data.len();
        page.push(DeadLetter {
            id: id_of(row.get(0)?),
            origin: schema::origin_from_code(row.get(2)?),
            reason: DeadReason::from_name(&reason).unwrap_or(DeadReason::Rejected),
            attempts: row.get(4)?,
            died_at: Timestamp::from_millis(row.get(5)?),
            payload: schema::decode_payload(&head, data)?,
        });
    }
    Ok((page, false))
}

fn oldest(connection: &Connection, inbox: u32, until: u64, before: i64) -> rusqlite::Result<Vec<Row>> {
    connection.prepare_cached(schema::DEAD_ROWS)?.query_map((inbox, until, before, STEP), row)?.collect()
}

fn named(connection: &Connection, inbox: u32, positions: &[u64]) -> rusqlite::Result<Vec<Row>> {
    let mut select = connection.prepare_cached(schema::DEAD_ROW)?;
    let mut rows = Vec::new();
    for pos in positions {
        rows.extend(select.query_row((inbox, pos), row).optional()?);
    }
    Ok(rows)
}
