//! What the AMQP broker keeps in the file: its clients with their limits and bindings, and what is delayed.
//!
//! RabbitMQ cannot be asked by AMQP which bindings a queue has, or how much is delayed for it. And a router that starts
//! must know its clients before anybody declares them again, because messages flow as soon as there is a connection.

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension as _, params};

use crate::client::{ClientId, Limits};
use crate::db::{Db, DbError};
use crate::topic::Pattern;

const CREATE: &str = "
CREATE TABLE IF NOT EXISTS amqp_client (
    id TEXT PRIMARY KEY,
    -- When its queues were first declared, in milliseconds since the epoch: what was delayed before is another's.
    since INTEGER NOT NULL,
    max_messages INTEGER,
    ttl_s INTEGER,
    -- 1 once its queues would survive a kill of the broker.
    sealed INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
-- Bindings that there may be: noted before they are made, forgotten after they are gone.
CREATE TABLE IF NOT EXISTS amqp_binding (
    client TEXT NOT NULL,
    pattern TEXT NOT NULL,
    -- 0 when it is only not known to be gone yet.
    wanted INTEGER NOT NULL,
    PRIMARY KEY (client, pattern)
) WITHOUT ROWID;
-- Messages that wait in retry queues, by the second in which they are due.
CREATE TABLE IF NOT EXISTS amqp_delayed (
    client TEXT NOT NULL,
    due INTEGER NOT NULL,
    messages INTEGER NOT NULL,
    PRIMARY KEY (client, due)
) WITHOUT ROWID;
-- Quorum queues that belong to no client and would survive a kill of the broker.
CREATE TABLE IF NOT EXISTS amqp_sealed (
    queue TEXT PRIMARY KEY
) WITHOUT ROWID;
-- Those that are being made for the first time: nothing was ever put into them.
CREATE TABLE IF NOT EXISTS amqp_making (
    queue TEXT PRIMARY KEY
) WITHOUT ROWID;
-- Retry queues that were ever declared.
CREATE TABLE IF NOT EXISTS amqp_retry (seconds INTEGER PRIMARY KEY);
-- Stand-ins for inboxes that are gone while something is delayed for them. Kept when the client is forgotten, and when
-- there is another of its name: that one may be gone before the last of it is due.
CREATE TABLE IF NOT EXISTS amqp_stand_in (
    client TEXT PRIMARY KEY,
    -- For how long it lives when nothing uses it.
    expires_s INTEGER NOT NULL,
    -- As long after the second in which the last message is due.
    until INTEGER NOT NULL
) WITHOUT ROWID;
";

/// A client as the file knows it.
#[derive(Debug)]
pub(super) struct StoredClient {
    pub(super) id: ClientId,
    pub(super) since_ms: i64,
    pub(super) limits: Limits,
    /// Patterns, and whether they are wanted still.
    pub(super) bindings: Vec<(Pattern, bool)>,
    /// Delayed messages by the second in which they are due.
    pub(super) delayed: BTreeMap<i64, u64>,
}

/// Makes the tables, and reads what is in them.
pub(super) async fn open(db: &Db, now_s: i64) -> Result<Vec<StoredClient>, DbError> {
    db.write(move |connection| {
        connection.execute_batch(CREATE)?;
        connection.execute("DELETE FROM amqp_delayed WHERE due <= ?1", [now_s])?;
        Ok(())
    })
    .await?;
    db.read(load).await
}

fn load(connection: &Connection) -> rusqlite::Result<Vec<StoredClient>> {
    let mut clients = BTreeMap::new();
    let mut select = connection.prepare("SELECT id, since, max_messages, ttl_s FROM amqp_client")?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let name: String = row.get(0)?;
        let Ok(id) = ClientId::parse(&name) else {
            log::error!("the stored client {name:?} has no valid id");
            continue;
        };
        let limits = Limits { send_per_s: None, max_inbox_messages: row.get(2)?, inbox_ttl_s: row.get(3)? };
        let since_ms = row.get(1)?;
        let client = StoredClient { id, since_ms, limits, bindings: Vec::new(), delayed: BTreeMap::new() };
        clients.insert(name, client);
    }
    let mut select = connection.prepare("SELECT client, pattern, wanted FROM amqp_binding")?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let (client, pattern): (String, String) = (row.get(0)?, row.get(1)?);
        if let (Some(client), Ok(pattern)) = (clients.get_mut(&client), Pattern::parse(&pattern)) {
            client.bindings.push((pattern, row.get(2)?));
        }
    }
    let mut select = connection.prepare("SELECT client, due, messages FROM amqp_delayed")?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        let client: String = row.get(0)?;
        if let Some(client) = clients.get_mut(&client) {
            client.delayed.insert(row.get(1)?, row.get(2)?);
        }
    }
    Ok(clients.into_values().collect())
}

/// Notes a client and its limits. Returns since when it is there, and whether its queues are sealed.
pub(super) async fn note_client(
    db: &Db,
    client: &ClientId,
    limits: &Limits,
    now_ms: i64,
) -> Result<(i64, bool), DbError> {
    let (id, limits) = (client.as_str().to_owned(), limits.clone());
    db.write(move |connection| {
        let mut upsert = connection.prepare_cached(
            "INSERT INTO amqp_client (id, since, max_messages, ttl_s) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (id) DO UPDATE SET max_messages = excluded.max_messages, ttl_s = excluded.ttl_s
             RETURNING since, sealed",
        )?;
        let values = params![id, now_ms, limits.max_inbox_messages, limits.inbox_ttl_s];
        upsert.query_row(values, |row| Ok((row.get(0)?, row.get(1)?)))
    })
    .await
}

/// Notes that a client's queues would survive a kill.
pub(super) async fn note_sealed(db: &Db, client: &ClientId) -> Result<(), DbError> {
    let id = client.as_str().to_owned();
    db.write(move |connection| {
        connection.prepare_cached("UPDATE amqp_client SET sealed = 1 WHERE id = ?1")?.execute([&id])?;
        Ok(())
    })
    .await
}

/// Whether a queue that belongs to no client is known to survive a kill.
pub(super) async fn is_sealed(db: &Db, queue: &str) -> Result<bool, DbError> {
    let queue = queue.to_owned();
    db.read(move |connection| {
        let mut select = connection.prepare_cached("SELECT EXISTS (SELECT 1 FROM amqp_sealed WHERE queue = ?1)")?;
        select.query_row([&queue], |row| row.get(0))
    })
    .await
}

/// Notes that it would.
pub(super) async fn note_queue_sealed(db: &Db, queue: &str) -> Result<(), DbError> {
    let queue = queue.to_owned();
    db.write(move |connection| {
        connection.prepare_cached("INSERT OR IGNORE INTO amqp_sealed (queue) VALUES (?1)")?.execute([&queue])?;
        connection.prepare_cached("DELETE FROM amqp_making WHERE queue = ?1")?.execute([&queue])?;
        Ok(())
    })
    .await
}

/// Notes that a queue that is not there is about to be made.
pub(super) async fn note_making(db: &Db, queue: &str) -> Result<(), DbError> {
    let queue = queue.to_owned();
    db.write(move |connection| {
        connection.prepare_cached("INSERT OR IGNORE INTO amqp_making (queue) VALUES (?1)")?.execute([&queue])?;
        Ok(())
    })
    .await
}

/// Whether a queue's making has begun and did not come to its end.
pub(super) async fn is_making(db: &Db, queue: &str) -> Result<bool, DbError> {
    let queue = queue.to_owned();
    db.read(move |connection| {
        let mut select = connection.prepare_cached("SELECT EXISTS (SELECT 1 FROM amqp_making WHERE queue = ?1)")?;
        select.query_row([&queue], |row| row.get(0))
    })
    .await
}

/// Notes which bindings are wanted; those that were there before are kept as unwanted until [`forget_unwanted`].
/// Returns the unwanted ones.
pub(super) async fn note_bindings(db: &Db, client: &ClientId, wanted: &[Pattern]) -> Result<Vec<Pattern>, DbError> {
    let (id, wanted) = (client.as_str().to_owned(), wanted.to_vec());
    db.write(move |connection| {
        connection.prepare_cached("UPDATE amqp_binding SET wanted = 0 WHERE client = ?1")?.execute([&id])?;
        let mut upsert = connection.prepare_cached(
            "INSERT INTO amqp_binding (client, pattern, wanted) VALUES (?1, ?2, 1)
             ON CONFLICT (client, pattern) DO UPDATE SET wanted = 1",
        )?;
        for pattern in &wanted {
            upsert.execute(params![id, pattern.as_str()])?;
        }
        let mut select =
            connection.prepare_cached("SELECT pattern FROM amqp_binding WHERE client = ?1 AND wanted = 0")?;
        let unwanted: Vec<String> = select.query_map([&id], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
        Ok(unwanted.iter().filter_map(|pattern| Pattern::parse(pattern).ok()).collect())
    })
    .await
}

/// Forgets bindings that are gone.
pub(super) async fn forget_unwanted(db: &Db, client: &ClientId) -> Result<(), DbError> {
    let id = client.as_str().to_owned();
    db.write(move |connection| {
        connection.prepare_cached("DELETE FROM amqp_binding WHERE client = ?1 AND wanted = 0")?.execute([&id])?;
        Ok(())
    })
    .await
}

/// How much longer than the last delayed message the stand-in for an inbox is kept, in seconds: RabbitMQ tries every
/// three minutes what it could not dead-letter.
const STAND_IN_MARGIN_S: u64 = 600;

/// Notes that the inbox of a client that goes needs a stand-in, if something is delayed for it, or for one of its name
/// that was there before. Returns for how many seconds.
pub(super) async fn note_stand_in(db: &Db, client: &ClientId, now_s: i64) -> Result<Option<u64>, DbError> {
    let id = client.as_str().to_owned();
    db.write(move |connection| {
        // A stand-in that was noted may not have been made, so its messages may wait although they were due.
        let last = "SELECT max(due) FROM (
                SELECT due FROM amqp_delayed WHERE client = ?1 AND due >= ?2
                UNION ALL SELECT max(until - expires_s, ?2) FROM amqp_stand_in WHERE client = ?1
            )";
        let due: Option<i64> = connection.prepare_cached(last)?.query_row(params![id, now_s], |row| row.get(0))?;
        let Some(due) = due else { return Ok(None) };
        let expires_s = due.abs_diff(now_s) + STAND_IN_MARGIN_S;
        let upsert = "INSERT INTO amqp_stand_in (client, expires_s, until) VALUES (?1, ?2, ?3)
            ON CONFLICT (client) DO UPDATE SET expires_s = excluded.expires_s, until = excluded.until";
        let until = due.saturating_add_unsigned(expires_s);
        connection.prepare_cached(upsert)?.execute(params![id, expires_s, until])?;
        Ok(Some(expires_s))
    })
    .await
}

/// How long the stand-in lives that may be in the place of a client's inbox, in seconds.
pub(super) async fn stand_in(db: &Db, client: &ClientId) -> Result<Option<u64>, DbError> {
    let id = client.as_str().to_owned();
    db.read(move |connection| {
        let mut select = connection.prepare_cached("SELECT expires_s FROM amqp_stand_in WHERE client = ?1")?;
        select.query_row([&id], |row| row.get(0)).optional()
    })
    .await
}

/// Forgets a client with all that is noted of it, but for how long its inbox has a stand-in.
pub(super) async fn forget_client(db: &Db, client: &ClientId) -> Result<(), DbError> {
    let id = client.as_str().to_owned();
    db.write(move |connection| {
        for delete in [
            "DELETE FROM amqp_delayed WHERE client = ?1",
            "DELETE FROM amqp_binding WHERE client = ?1",
            "DELETE FROM amqp_client WHERE id = ?1",
        ] {
            connection.prepare_cached(delete)?.execute([&id])?;
        }
        Ok(())
    })
    .await
}

/// Notes delayed messages, before they are.
pub(super) async fn note_delayed(db: &Db, client: &ClientId, due: BTreeMap<i64, u64>) -> Result<(), DbError> {
    let id = client.as_str().to_owned();
    db.write(move |connection| {
        let mut upsert = connection.prepare_cached(
            "INSERT INTO amqp_delayed (client, due, messages) VALUES (?1, ?2, ?3)
             ON CONFLICT (client, due) DO UPDATE SET messages = messages + excluded.messages",
        )?;
        for (due, messages) in &due {
            upsert.execute(params![id, due, messages])?;
        }
        Ok(())
    })
    .await
}

/// Forgets what was due.
pub(super) async fn forget_due(db: &Db, now_s: i64) -> Result<(), DbError> {
    db.write(move |connection| {
        connection.prepare_cached("DELETE FROM amqp_delayed WHERE due <= ?1")?.execute([now_s])?;
        // A client that is there may be one whose deletion was cut off, and then it is wanted still.
        let stand_ins = "DELETE FROM amqp_stand_in WHERE until <= ?1 AND client NOT IN (SELECT id FROM amqp_client)";
        connection.prepare_cached(stand_ins)?.execute([now_s])?;
        Ok(())
    })
    .await
}

/// Notes a retry queue, before it is declared.
pub(super) async fn note_retry(db: &Db, seconds: u64) -> Result<(), DbError> {
    db.write(move |connection| {
        connection.prepare_cached("INSERT OR IGNORE INTO amqp_retry (seconds) VALUES (?1)")?.execute([seconds])?;
        Ok(())
    })
    .await
}

/// The retry queues that there may be.
pub(super) async fn retries(db: &Db) -> Result<Vec<u64>, DbError> {
    db.read(|connection| {
        let mut select = connection.prepare("SELECT seconds FROM amqp_retry ORDER BY seconds")?;
        select.query_map([], |row| row.get(0))?.collect()
    })
    .await
}

/// Nothing is delayed any more.
pub(super) async fn forget_delayed(db: &Db) -> Result<(), DbError> {
    db.write(|connection| connection.execute("DELETE FROM amqp_delayed", []).map(|_| ())).await
}
