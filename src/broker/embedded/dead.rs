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
pub(super) fn id_of(pos: u64) -> String {
    format!("{pos:016x}")
}

/// The position that an id is made of; SQLite's integers are signed, and none lies beyond them.
fn pos_of(id: &str) -> Option<u64> {
    u64::from_str_radix(id, 16).ok().filter(|pos| i64::try_from(*pos).is_ok())
}

/// Where the dead letter with this id is: one that came from another broker kept the id that it had there.
fn find(connection: &Connection, inbox: u32, id: &str) -> rusqlite::Result<Option<u64>> {
    let found = connection.prepare_cached(schema::DEAD_BY_ID)?.query_row((inbox, id), |row| row.get(0)).optional()?;
    Ok(found.or_else(|| pos_of(id)))
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
        let after = after.map(str::to_owned);
        let read = move |connection: &Connection| {
            // A page ends at a position. One that came from another broker may have an id that looks like another's.
            let after = after.map(|id| pos_of(&id).map_or_else(|| find(connection, inbox, &id), |pos| Ok(Some(pos))));
            page(connection, inbox, after.transpose()?.flatten().unwrap_or(0), limit)
        };
        let (dead_letters, last) = self.db.read(read).await.map_err(|error| broker_error(action, &error))?;
        Ok(DeadPage { dead_letters, next: last.map(id_of) })
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
                    let ids = step.to_vec();
                    replayed += self.take_dead(client, action, true, move |c, inbox| named(c, inbox, &ids)).await?;
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

/// Up to `limit` dead letters, fewer when they are large, and where the last one is when there are more.
fn page(
    connection: &Connection,
    inbox: u32,
    after: u64,
    limit: usize,
) -> rusqlite::Result<(Vec<DeadLetter>, Option<u64>)> {
    let mut select = connection.prepare_cached(schema::DEAD_PAGE)?;
    let mut rows = select.query((inbox, after, limit + 1))?;
    let (mut page, mut bytes, mut last) = (Vec::new(), 0, None);
    while let Some(row) = rows.next()? {
        if page.len() == limit || bytes > PAGE_BYTES_MAX {
            return Ok((page, last));
        }
        let (head, reason): (Vec<u8>, String) = (row.get(6)?, row.get(3)?);
        let (data, id): (Vec<u8>, Option<String>) = (row.get(7)?, row.get(9)?);
        let pos = row.get(0)?;
        bytes += data.len();
        last = Some(pos);
        page.push(DeadLetter {
            id: id.unwrap_or_else(|| id_of(pos)),
            origin: schema::origin_from_code(row.get(2)?),
            reason: DeadReason::from_name(&reason).unwrap_or(DeadReason::Rejected),
            attempts: row.get(4)?,
            died_at: Timestamp::from_millis(row.get(5)?),
            payload: schema::decode_payload(&head, data)?,
        });
    }
    Ok((page, None))
}

fn oldest(connection: &Connection, inbox: u32, until: u64, before: i64) -> rusqlite::Result<Vec<Row>> {
    connection.prepare_cached(schema::DEAD_ROWS)?.query_map((inbox, until, before, STEP), row)?.collect()
}

fn named(connection: &Connection, inbox: u32, ids: &[String]) -> rusqlite::Result<Vec<Row>> {
    let mut positions = Vec::with_capacity(ids.len());
    for id in ids {
        positions.extend(find(connection, inbox, id)?);
    }
    positions.sort_unstable();
    positions.dedup();
    let mut select = connection.prepare_cached(schema::DEAD_ROW)?;
    let mut rows = Vec::new();
    for pos in positions {
        rows.extend(select.query_row((inbox, pos), row).optional()?);
    }
    Ok(rows)
}
