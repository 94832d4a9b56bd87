//! The tables of the embedded broker, and their statements.
//!
//! A body is stored once. An entry is a body's place in a queue: moving a message touches small rows only. Bodies in
//! several queues have their references counted in a table of their own, so that settling one of a hundred copies
//! does not rewrite a page of message data. Counts are kept with the queue: opening reads no backlog.

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension as _};

use super::queue::{BodyRef, Counts};
use crate::broker::{Foreign, Origin, Payload, Queue};
use crate::client::ClientId;
use crate::envelope::Message;

/// Version of the tables below.
const VERSION: u32 = 1;

const TABLES: &str = "
    CREATE TABLE broker_meta (version INTEGER NOT NULL, next_number INTEGER NOT NULL);
    CREATE TABLE queue (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        client TEXT,                -- NULL: an internal queue, or one whose rows are being deleted
        kind TEXT NOT NULL,         -- outbox, notify, inbox, publish, unrouted, deleted
        depth INTEGER NOT NULL DEFAULT 0,
        delayed INTEGER NOT NULL DEFAULT 0,
        dead INTEGER NOT NULL DEFAULT 0,
        max_messages INTEGER,
        ttl_ms INTEGER,
        UNIQUE (client, kind)
    );
    CREATE TABLE binding (queue INTEGER NOT NULL, pattern TEXT NOT NULL, PRIMARY KEY (queue, pattern)) WITHOUT ROWID;
    CREATE TABLE body (id INTEGER PRIMARY KEY, head BLOB NOT NULL, data BLOB NOT NULL);
    CREATE TABLE body_refs (id INTEGER PRIMARY KEY, refs INTEGER NOT NULL);
    CREATE TABLE entry (
        queue INTEGER NOT NULL,
        pos INTEGER NOT NULL,
        body INTEGER NOT NULL,
        at INTEGER NOT NULL,
        deliveries INTEGER NOT NULL,
        attempts INTEGER NOT NULL,
        due INTEGER,                -- delayed until then; NULL: ready
        PRIMARY KEY (queue, pos)
    ) WITHOUT ROWID;
    CREATE INDEX entry_due ON entry (due) WHERE due IS NOT NULL;
    CREATE TABLE dead (
        queue INTEGER NOT NULL,
        pos INTEGER NOT NULL,
        body INTEGER NOT NULL,
        origin INTEGER NOT NULL,
        reason TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        died_at INTEGER NOT NULL,
        id TEXT,                    -- the id that it came with from another broker; NULL: made of its position
        PRIMARY KEY (queue, pos)
    ) WITHOUT ROWID;
    CREATE TABLE own_id (
        generation INTEGER NOT NULL,
        hash BLOB NOT NULL,
        at INTEGER NOT NULL,
        PRIMARY KEY (generation, hash)
    ) WITHOUT ROWID;
    CREATE TABLE own_id_generation (id INTEGER PRIMARY KEY, started_at INTEGER NOT NULL);
    INSERT INTO queue (kind) VALUES ('publish'), ('unrouted');
";

pub(super) const DECLARE: &str = "INSERT INTO queue (client, kind, max_messages, ttl_ms) VALUES (?1, ?2, ?3, ?4)
    ON CONFLICT (client, kind) DO UPDATE SET max_messages = excluded.max_messages, ttl_ms = excluded.ttl_ms
    RETURNING id";
pub(super) const INSERT_BODY: &str = "INSERT INTO body (id, head, data) VALUES (?1, ?2, ?3)";
pub(super) const DELETE_BODY: &str = "DELETE FROM body WHERE id = ?1";
pub(super) const INSERT_ENTRY: &str =
    "INSERT INTO entry (queue, pos, body, at, deliveries, attempts, due) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
pub(super) const DELETE_ENTRY: &str = "DELETE FROM entry WHERE queue = ?1 AND pos = ?2";
pub(super) const DELETE_RANGE: &str = "DELETE FROM entry WHERE queue = ?1 AND pos BETWEEN ?2 AND ?3";
pub(super) const UPDATE_ENTRY: &str =
    "UPDATE entry SET deliveries = ?3, attempts = ?4, due = ?5 WHERE queue = ?1 AND pos = ?2";
pub(super) const INSERT_DEAD: &str =
    "INSERT INTO dead (queue, pos, body, origin, reason, attempts, died_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)";
pub(super) const INSERT_DEAD_WITH_ID: &str = "INSERT INTO dead (queue, pos, body, origin, reason, attempts, died_at, id) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
pub(super) const DELETE_DEAD: &str = "DELETE FROM dead WHERE queue = ?1 AND pos = ?2";
pub(super) const CHANGE_REFS: &str = "INSERT INTO body_refs (id, refs) VALUES (?1, ?2)
    ON CONFLICT (id) DO UPDATE SET refs = refs + excluded.refs RETURNING refs";
pub(super) const DELETE_REFS: &str = "DELETE FROM body_refs WHERE id = ?1";
pub(super) const SET_COUNTS: &str = "UPDATE queue SET depth = ?2, delayed = ?3, dead = ?4 WHERE id = ?1";
pub(super) const SET_NEXT_NUMBER: &str = "UPDATE broker_meta SET next_number = ?1";
pub(super) const INSERT_OWN_ID: &str = "INSERT OR REPLACE INTO own_id (generation, hash, at) VALUES (?1, ?2, ?3)";
pub(super) const INSERT_GENERATION: &str = "INSERT OR IGNORE INTO own_id_generation (id, started_at) VALUES (?1, ?2)";

/// A page of a queue behind a position: ready entries with their bodies.
pub(super) const PAGE: &str = "SELECT e.pos, e.body, e.at, e.deliveries, e.attempts, b.head, b.data, r.id IS NOT NULL
    FROM entry e JOIN body b ON b.id = e.body LEFT JOIN body_refs r ON r.id = e.body
    WHERE e.queue = ?1 AND e.pos > ?2 AND e.due IS NULL ORDER BY e.pos LIMIT ?3";
pub(super) const BODY: &str =
    "SELECT b.head, b.data, r.id IS NOT NULL FROM body b LEFT JOIN body_refs r ON r.id = b.id WHERE b.id = ?1";
pub(super) const DUE: &str = "SELECT e.queue, e.pos, e.body, e.at, e.deliveries, e.attempts, e.due, r.id IS NOT NULL
    FROM entry e JOIN queue q ON q.id = e.queue AND q.kind <> 'deleted' LEFT JOIN body_refs r ON r.id = e.body
    WHERE e.due IS NOT NULL AND e.due <= ?1 ORDER BY e.due LIMIT ?2";
pub(super) const NEXT_DUE: &str = "SELECT min(due) FROM entry WHERE due IS NOT NULL AND due > ?1";
pub(super) const DEAD_PAGE: &str =
    "SELECT d.pos, d.body, d.origin, d.reason, d.attempts, d.died_at, b.head, b.data, r.id IS NOT NULL, d.id
    FROM dead d JOIN body b ON b.id = d.body LEFT JOIN body_refs r ON r.id = d.body
    WHERE d.queue = ?1 AND d.pos > ?2 ORDER BY d.pos LIMIT ?3";
pub(super) const DEAD_ROWS: &str = "SELECT d.pos, d.body, d.origin, r.id IS NOT NULL
    FROM dead d LEFT JOIN body_refs r ON r.id = d.body
    WHERE d.queue = ?1 AND d.pos < ?2 AND d.died_at < ?3 ORDER BY d.pos LIMIT ?4";
pub(super) const DEAD_ROW: &str = "SELECT d.pos, d.body, d.origin, r.id IS NOT NULL
    FROM dead d LEFT JOIN body_refs r ON r.id = d.body WHERE d.queue = ?1 AND d.pos = ?2";
pub(super) const DEAD_BY_ID: &str = "SELECT pos FROM dead WHERE id = ?2 AND queue = ?1";

/// Ids that dead letters came with from another broker.
const DEAD_IDS: &str = "CREATE INDEX IF NOT EXISTS dead_id ON dead (id) WHERE id IS NOT NULL";

/// A queue as it was found at the opening.
pub(super) struct StoredQueue {
    pub(super) id: u32,
    pub(super) name: StoredName,
    pub(super) counts: Counts,
    pub(super) max_messages: Option<u64>,
    pub(super) ttl_ms: Option<i64>,
}

/// What a stored queue is for.
pub(super) enum StoredName {
    Queue(Queue),
    Unrouted,
    /// Its rows are still to be deleted.
    Deleted,
}

/// Everything that is read at the opening.
pub(super) struct Stored {
    pub(super) queues: Vec<StoredQueue>,
    pub(super) bindings: Vec<(u32, String)>,
    pub(super) next_number: u64,
    pub(super) next_due: Option<i64>,
    pub(super) generations: Vec<(u32, i64)>,
}

/// Makes the tables unless they are there; returns the version that is.
pub(super) fn create(connection: &Connection) -> rusqlite::Result<u32> {
    let exists: bool = connection
        .query_row("SELECT count(*) FROM sqlite_schema WHERE name = 'broker_meta'", [], |row| row.get(0))
        .map(|n: u32| n > 0)?;
    if !exists {
        connection.execute_batch(TABLES)?;
        connection.execute("INSERT INTO broker_meta (version, next_number) VALUES (?1, 1)", [VERSION])?;
    }
    // A column that earlier programs do not miss, so the version stays.
    let has_ids = "SELECT count(*) FROM pragma_table_info('dead') WHERE name = 'id'";
    if connection.query_row(has_ids, [], |row| row.get::<_, u32>(0))? == 0 {
        connection.execute_batch("ALTER TABLE dead ADD COLUMN id TEXT")?;
    }
    connection.execute_batch(DEAD_IDS)?;
    connection.query_row("SELECT version FROM broker_meta", [], |row| row.get(0))
}

/// Whether this program knows tables of that version.
pub(super) fn is_known(version: u32) -> bool {
    version == VERSION
}

/// Reads what is there, but no entries.
pub(super) fn load(connection: &Connection) -> rusqlite::Result<Stored> {
    let queues = connection
        .prepare("SELECT id, client, kind, depth, delayed, dead, max_messages, ttl_ms FROM queue")?
        .query_map([], |row| {
            let client: Option<String> = row.get(1)?;
            let kind: String = row.get(2)?;
            let client = client.and_then(|text| ClientId::parse(&text).ok());
            let name = match (kind.as_str(), client) {
                ("publish", _) => StoredName::Queue(Queue::Publish),
                ("unrouted", _) => StoredName::Unrouted,
                ("outbox", Some(id)) => StoredName::Queue(Queue::Outbox(id)),
                ("notify", Some(id)) => StoredName::Queue(Queue::Notify(id)),
                ("inbox", Some(id)) => StoredName::Queue(Queue::Inbox(id)),
                _ => StoredName::Deleted,
            };
            let counts = Counts { depth: row.get(3)?, delayed: row.get(4)?, dead: row.get(5)? };
            Ok(StoredQueue { id: row.get(0)?, name, counts, max_messages: row.get(6)?, ttl_ms: row.get(7)? })
        })?
        .collect::<rusqlite::Result<_>>()?;
    let bindings = connection
        .prepare("SELECT queue, pattern FROM binding")?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    let generations = connection
        .prepare("SELECT id, started_at FROM own_id_generation ORDER BY id")?
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    Ok(Stored {
        queues,
        bindings,
        generations,
        next_number: connection.query_row("SELECT next_number FROM broker_meta", [], |row| row.get(0))?,
        next_due: connection.query_row(NEXT_DUE, [i64::MIN], |row| row.get(0)).optional()?.flatten(),
    })
}

/// The row kind of a client's queue.
pub(super) fn kind_of(queue: &Queue) -> &'static str {
    match queue {
        Queue::Outbox(_) => "outbox",
        Queue::Notify(_) => "notify",
        Queue::Inbox(_) => "inbox",
        Queue::Publish => "publish",
        Queue::Unrouted => "unrouted",
    }
}

pub(super) fn origin_code(origin: Origin) -> u8 {
    match origin {
        Origin::Inbox => 0,
        Origin::Outbox => 1,
        Origin::Notify => 2,
    }
}

pub(super) fn origin_from_code(code: u8) -> Origin {
    match code {
        1 => Origin::Outbox,
        2 => Origin::Notify,
        _ => Origin::Inbox,
    }
}

/// First byte of the head of a body that is not a message.
const FOREIGN_HEAD: u8 = 0;

/// Head and data of a body.
pub(super) fn encode_payload(payload: &Payload) -> (Vec<u8>, Bytes) {
    match payload {
        Payload::Message(message) => (message.encode_head(), message.envelope.clone()),
        Payload::Foreign(foreign) => {
            let parts = (&foreign.message_id, &foreign.traceparent);
            let mut head = vec![FOREIGN_HEAD];
            head.extend(serde_json::to_vec(&parts).expect("two optional strings are JSON"));
            (head, foreign.body.clone())
        }
    }
}

/// Reads what [`encode_payload`] wrote.
pub(super) fn decode_payload(head: &[u8], data: Vec<u8>) -> rusqlite::Result<Payload> {
    let broken = |what: &str| {
        rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Blob, format!("{what} of a body").into())
    };
    if head.first() == Some(&FOREIGN_HEAD) {
        let (message_id, traceparent) = serde_json::from_slice(&head[1..]).map_err(|_| broken("foreign head"))?;
        return Ok(Payload::Foreign(Foreign { body: data.into(), message_id, traceparent }));
    }
    let message = Message::decode(head, data.into()).map_err(|_| broken("head"))?;
    Ok(Payload::Message(message.into()))
}

/// Deletes up to `limit` rows of a deleted queue, with bodies that nothing else refers to. Returns whether there are
/// more.
pub(super) fn delete_some(connection: &Connection, queue: u32, limit: usize) -> rusqlite::Result<bool> {
    let rows: Vec<(u64, u64, bool, bool)> = connection
        .prepare_cached(
            "SELECT e.pos, e.body, r.id IS NOT NULL, 0 FROM entry e LEFT JOIN body_refs r ON r.id = e.body
                WHERE e.queue = ?1
             UNION ALL SELECT d.pos, d.body, r.id IS NOT NULL, 1 FROM dead d LEFT JOIN body_refs r ON r.id = d.body
                WHERE d.queue = ?1
             LIMIT ?2",
        )?
        .query_map((queue, limit), |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?)))?
        .collect::<rusqlite::Result<_>>()?;
    for (pos, body, shared, is_dead) in &rows {
        connection.prepare_cached(if *is_dead { DELETE_DEAD } else { DELETE_ENTRY })?.execute((queue, pos))?;
        let refs: i64 =
            if *shared { connection.prepare_cached(CHANGE_REFS)?.query_row((body, -1), |row| row.get(0))? } else { 0 };
        if refs <= 0 {
            connection.prepare_cached(DELETE_REFS)?.execute([body])?;
            connection.prepare_cached(DELETE_BODY)?.execute([body])?;
        }
    }
    let more = rows.len() == limit;
    if !more {
        connection.prepare_cached("DELETE FROM queue WHERE id = ?1")?.execute([queue])?;
    }
    Ok(more)
}

/// A cold reference to a stored body.
pub(super) fn cold(id: u64, shared: bool) -> BodyRef {
    BodyRef::Cold { id, shared }
}
