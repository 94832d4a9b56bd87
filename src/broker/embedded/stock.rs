//! What lies in the embedded broker's file, read and written while no broker is open on it: see
//! [`crate::broker::stock`].
//!
//! Every step is one transaction. So the count of what was moved is exact, and what comes in for a second time, because
//! a kill kept it from being removed where it was, is recognised.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension as _, params};

use super::window::broker_error;
use super::{dedup, schema};
use crate::broker::stock::{Batch, Item, Kind, Mark, OwnId, OwnIdCursor, OwnIdPage, Parcel, Shelf, Stock};
use crate::broker::{BrokerError, BrokerErrorKind, DeadLetter, DeadReason, Payload, Queue};
use crate::client::{ClientId, ClientRecord};
use crate::db::{Db, DbError};
use crate::time::Timestamp;

/// Messages in one batch.
const BATCH_MESSAGES: usize = 500;

/// Bytes of messages in one batch, about.
const BATCH_BYTES: usize = 4 << 20;

/// Rows of notes deleted, or clients declared, in one transaction.
const STEP: usize = 5_000;

/// Notes of a move that is under way, and of the last one.
const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS move_count (kind TEXT PRIMARY KEY, messages INTEGER NOT NULL) WITHOUT ROWID;
    -- What was taken in last of each shelf elsewhere: it may not have been removed there.
    CREATE TABLE IF NOT EXISTS move_last (
        shelf TEXT NOT NULL,
        mark BLOB NOT NULL,
        copies INTEGER NOT NULL,
        PRIMARY KEY (shelf, mark)
    ) WITHOUT ROWID;
    -- Own ids of messages that waited in their sender's queues when the move began.
    CREATE TABLE IF NOT EXISTS move_waiting (hash BLOB PRIMARY KEY) WITHOUT ROWID;
";

/// See the module.
#[derive(Clone)]
pub struct EmbeddedStock {
    db: Db,
    /// By shelf: what an earlier run took in last, and has not come again in this one.
    last: Arc<Mutex<HashMap<String, Marks>>>,
}

/// Marks, and how many messages have each.
type Marks = HashMap<Mark, u32>;

fn fail(action: impl std::fmt::Display) -> impl FnOnce(DbError) -> BrokerError {
    let action = action.to_string();
    move |error| broker_error(&action, &error)
}

impl EmbeddedStock {
    /// Opens it; makes the tables where there are none.
    ///
    /// # Errors
    /// When the file is of a newer version, or what SQLite says.
    pub async fn open(db: Db) -> Result<Self, BrokerError> {
        let create = |connection: &Connection| {
            connection.execute_batch(TABLES)?;
            schema::create(connection)
        };
        let version = db.write(create).await.map_err(fail("open the embedded broker's file"))?;
        if !schema::is_known(version) {
            let what = format!("{} is of version {version}, newer than this program", db.path().display());
            return Err(BrokerError::new(BrokerErrorKind::Conflict, what));
        }
        Ok(Self { db, last: Arc::default() })
    }

    /// Begins a new count.
    ///
    /// # Errors
    /// What SQLite says.
    pub async fn begin_count(&self) -> Result<(), BrokerError> {
        let clear = "DELETE FROM move_count; DELETE FROM move_last;";
        self.db.write(move |connection| connection.execute_batch(clear)).await.map_err(fail("begin to count"))
    }

    /// What was moved, out of here or into here, since [`EmbeddedStock::begin_count`].
    ///
    /// # Errors
    /// What SQLite says.
    pub async fn moved(&self) -> Result<Vec<(Kind, u64)>, BrokerError> {
        let read = |connection: &Connection| {
            let mut select = connection.prepare("SELECT messages FROM move_count WHERE kind = ?1")?;
            let mut one = |kind: Kind| -> rusqlite::Result<(Kind, u64)> {
                Ok((kind, select.query_row([kind.as_str()], |row| row.get(0)).optional()?.unwrap_or(0)))
            };
            Kind::ALL.into_iter().map(&mut one).collect::<rusqlite::Result<Vec<_>>>()
        };
        self.db.read(read).await.map_err(fail("count what was moved"))
    }

    /// Notes which own ids belong to messages that wait in their sender's outbox or notify queue. Before the first of
    /// them is moved; asked again, it begins anew.
    ///
    /// # Errors
    /// What SQLite says.
    pub async fn note_waiting_ids(&self) -> Result<(), BrokerError> {
        let action = "note which own ids wait";
        self.clear("move_waiting").await?;
        let mut after = (0, 0);
        loop {
            let page = move |connection: &Connection| heads_of_senders(connection, after);
            let (hashes, next) = self.db.read(page).await.map_err(fail(action))?;
            let insert = move |connection: &Connection| {
                let mut insert = connection.prepare_cached("INSERT OR IGNORE INTO move_waiting (hash) VALUES (?1)")?;
                hashes.iter().try_for_each(|hash| insert.execute([&hash[..]]).map(|_| ()))
            };
            self.db.write(insert).await.map_err(fail(action))?;
            match next {
                Some(next) => after = next,
                None => return Ok(()),
            }
        }
    }

    /// Of what comes in from a shelf, what is not here; and what may come again after a kill.
    async fn fresh<'a>(&self, from: &str, items: &'a [Item]) -> Result<(Vec<&'a Item>, Marks), BrokerError> {
        if !self.last.lock().contains_key(from) {
            let shelf = from.to_owned();
            let read = move |connection: &Connection| {
                let mut select = connection.prepare_cached("SELECT mark, copies FROM move_last WHERE shelf = ?1")?;
                select.query_map([shelf], |row| Ok((row.get(0)?, row.get(1)?)))?.collect()
            };
            let marks = self.db.read(read).await.map_err(fail(format_args!("see what came last from {from}")))?;
            self.last.lock().insert(from.to_owned(), marks);
        }
        let mut all = self.last.lock();
        let last = all.entry(from.to_owned()).or_default();
        let is_here = |item: &&Item| {
            let copies = last.get_mut(&item.mark).filter(|copies| item.again && **copies > 0);
            copies.map(|copies| *copies -= 1).is_some()
        };
        let (known, fresh): (Vec<&Item>, Vec<&Item>) = items.iter().partition(is_here);
        if known.is_empty() {
            // Messages come again in their order, so none of that is to come any more.
            last.clear();
        }
        let mut marks = last.clone();
        for item in items {
            *marks.entry(item.mark).or_default() += 1;
        }
        Ok((fresh, marks))
    }

    /// Empties a table of notes, a step at a time.
    async fn clear(&self, table: &'static str) -> Result<(), BrokerError> {
        let key = if table == "own_id" { "generation, hash" } else { "hash" };
        let delete = format!("DELETE FROM {table} WHERE ({key}) IN (SELECT {key} FROM {table} LIMIT {STEP})");
        loop {
            let delete = delete.clone();
            let deleted = self.db.write(move |connection| connection.execute(&delete, [])).await;
            if deleted.map_err(fail(format_args!("empty table {table}")))? < STEP {
                return Ok(());
            }
        }
    }
}

/// Where a walk over senders' queues is: queue and position.
type SenderCursor = (u32, u64);

/// Hashes of the own ids of a page of messages in outboxes and notify queues, and where the next page begins.
fn heads_of_senders(
    connection: &Connection,
    after: SenderCursor,
) -> rusqlite::Result<(Vec<dedup::IdHash>, Option<SenderCursor>)> {
    let mut select = connection.prepare_cached(
        "SELECT e.queue, e.pos, b.head FROM entry e JOIN queue q ON q.id = e.queue JOIN body b ON b.id = e.body
         WHERE q.kind IN ('outbox', 'notify') AND (e.queue, e.pos) > (?1, ?2) ORDER BY e.queue, e.pos LIMIT ?3",
    )?;
    let mut rows = select.query((after.0, after.1, STEP))?;
    let (mut hashes, mut count, mut last) = (Vec::new(), 0, None);
    while let Some(row) = rows.next()? {
        count += 1;
        last = Some((row.get(0)?, row.get(1)?));
        let head: Vec<u8> = row.get(2)?;
        if let Payload::Message(message) = schema::decode_payload(&head, Vec::new())?
            && message.own_id
        {
            hashes.push(dedup::hash_of(&message));
        }
    }
    Ok((hashes, last.filter(|_| count == STEP)))
}

/// A row that was read: position, body, whether that is shared, and whether it was delayed.
#[derive(Debug, Clone, Copy)]
struct Row {
    pos: u64,
    body: u64,
    shared: bool,
    delayed: bool,
}

struct EmbeddedBatch {
    db: Db,
    /// The number of the queue in the file.
    queue: u32,
    is_dead: bool,
    rows: Vec<Row>,
    items: Vec<Item>,
}

#[async_trait]
impl Batch for EmbeddedBatch {
    fn items(&self) -> &[Item] {
        &self.items
    }

    fn is_end(&self) -> bool {
        self.rows.is_empty()
    }

    async fn remove(self: Box<Self>) -> Result<(), BrokerError> {
        let Self { db, queue, is_dead, rows, items } = *self;
        let kinds: Vec<Kind> = items.iter().map(|item| item.parcel.kind()).collect();
        drop(items);
        let remove = move |connection: &Connection| {
            let table = if is_dead { schema::DELETE_DEAD } else { schema::DELETE_ENTRY };
            let mut delete = connection.prepare_cached(table)?;
            for row in &rows {
                delete.execute((queue, row.pos))?;
                drop_body(connection, row)?;
            }
            let count = i64::try_from(rows.len()).unwrap_or(0);
            let delayed = i64::try_from(rows.iter().filter(|row| row.delayed).count()).unwrap_or(0);
            let gone = if is_dead { [0, 0, -count] } else { [-count, -delayed, 0] };
            change_counts(connection, queue, gone)?;
            note_moved(connection, &kinds)
        };
        db.write(remove).await.map_err(fail("remove what was moved"))
    }
}

/// A body goes with the last row that refers to it.
fn drop_body(connection: &Connection, row: &Row) -> rusqlite::Result<()> {
    let refs: i64 = if row.shared {
        connection.prepare_cached(schema::CHANGE_REFS)?.query_row((row.body, -1), |row| row.get(0))?
    } else {
        0
    };
    if refs <= 0 {
        connection.prepare_cached(schema::DELETE_REFS)?.execute([row.body])?;
        connection.prepare_cached(schema::DELETE_BODY)?.execute([row.body])?;
    }
    Ok(())
}

/// Adds to depth, delayed and dead of a queue.
fn change_counts(connection: &Connection, queue: u32, by: [i64; 3]) -> rusqlite::Result<()> {
    connection
        .prepare_cached(
            "UPDATE queue SET depth = max(depth + ?2, 0), delayed = max(delayed + ?3, 0), dead = max(dead + ?4, 0)
             WHERE id = ?1",
        )?
        .execute((queue, by[0], by[1], by[2]))
        .map(|_| ())
}

fn note_moved(connection: &Connection, kinds: &[Kind]) -> rusqlite::Result<()> {
    let mut upsert = connection.prepare_cached(
        "INSERT INTO move_count (kind, messages) VALUES (?1, ?2)
         ON CONFLICT (kind) DO UPDATE SET messages = messages + excluded.messages",
    )?;
    for kind in Kind::ALL {
        let messages = kinds.iter().filter(|other| **other == kind).count();
        if messages > 0 {
            upsert.execute(params![kind.as_str(), messages])?;
        }
    }
    Ok(())
}

/// The number of a queue in the file, if it is there. Dead letters are numbered with the inbox.
fn number_of(connection: &Connection, queue: &Queue) -> rusqlite::Result<Option<u32>> {
    let owner = match queue {
        Queue::Outbox(id) | Queue::Notify(id) | Queue::Inbox(id) => Some(id.as_str()),
        Queue::Publish | Queue::Unrouted => None,
    };
    connection
        .prepare_cached("SELECT id FROM queue WHERE client IS ?1 AND kind = ?2")?
        .query_row(params![owner, schema::kind_of(queue)], |row| row.get(0))
        .optional()
}

/// Queues and dead letters that have rows, whatever their counts say, with those counts.
fn filled(connection: &Connection) -> rusqlite::Result<Vec<(Shelf, u64)>> {
    let mut select = connection.prepare(
        "SELECT client, kind, depth, dead, EXISTS (SELECT 1 FROM entry WHERE queue = q.id),
                EXISTS (SELECT 1 FROM dead WHERE queue = q.id)
         FROM queue q WHERE kind <> 'deleted' ORDER BY id",
    )?;
    let mut rows = select.query([])?;
    let mut shelves = Vec::new();
    while let Some(row) = rows.next()? {
        let (client, kind): (Option<String>, String) = (row.get(0)?, row.get(1)?);
        let client = client.and_then(|id| ClientId::parse(&id).ok());
        let queue = match (kind.as_str(), client) {
            ("publish", _) => Queue::Publish,
            ("unrouted", _) => Queue::Unrouted,
            ("outbox", Some(id)) => Queue::Outbox(id),
            ("notify", Some(id)) => Queue::Notify(id),
            ("inbox", Some(id)) => Queue::Inbox(id),
            _ => continue,
        };
        let (depth, dead): (u64, u64) = (row.get(2)?, row.get(3)?);
        let (has_entries, has_dead): (bool, bool) = (row.get(4)?, row.get(5)?);
        if let Queue::Inbox(client) = &queue
            && has_dead
        {
            shelves.push((Shelf::Dead(client.clone()), dead.max(1)));
        }
        if has_entries {
            shelves.push((Shelf::Queue(queue), depth.max(1)));
        }
    }
    Ok(shelves)
}

fn read_queue(connection: &Connection, queue: &Queue, number: u32) -> rusqlite::Result<(Vec<Row>, Vec<Parcel>)> {
    let mut select = connection.prepare_cached(
        "SELECT e.pos, e.body, r.id IS NOT NULL, e.due, e.at, e.deliveries, e.attempts, b.head, b.data
         FROM entry e JOIN body b ON b.id = e.body LEFT JOIN body_refs r ON r.id = e.body
         WHERE e.queue = ?1 ORDER BY e.pos LIMIT ?2",
    )?;
    let mut found = select.query((number, BATCH_MESSAGES))?;
    let (mut rows, mut parcels, mut bytes) = (Vec::new(), Vec::new(), 0);
    while bytes < BATCH_BYTES
        && let Some(row) = found.next()?
    {
        let (due, head): (Option<i64>, Vec<u8>) = (row.get(3)?, row.get(7)?);
        let data: Vec<u8> = row.get(8)?;
        bytes += data.len();
        rows.push(Row { pos: row.get(0)?, body: row.get(1)?, shared: row.get(2)?, delayed: due.is_some() });
        parcels.push(Parcel::Message {
            queue: queue.clone(),
            payload: schema::decode_payload(&head, data)?,
            deliveries: row.get(5)?,
            attempts: row.get(6)?,
            since: Timestamp::from_millis(row.get(4)?),
            due: due.map(Timestamp::from_millis),
        });
    }
    Ok((rows, parcels))
}

fn read_dead(connection: &Connection, client: &ClientId, inbox: u32) -> rusqlite::Result<(Vec<Row>, Vec<Parcel>)> {
    let mut select = connection.prepare_cached(schema::DEAD_PAGE)?;
    let mut found = select.query((inbox, 0, BATCH_MESSAGES))?;
    let (mut rows, mut parcels, mut bytes) = (Vec::new(), Vec::new(), 0);
    while bytes < BATCH_BYTES
        && let Some(row) = found.next()?
    {
        let (pos, reason): (u64, String) = (row.get(0)?, row.get(3)?);
        let (head, id): (Vec<u8>, Option<String>) = (row.get(6)?, row.get(9)?);
        let data: Vec<u8> = row.get(7)?;
        bytes += data.len();
        rows.push(Row { pos, body: row.get(1)?, shared: row.get(8)?, delayed: false });
        let letter = DeadLetter {
            id: id.unwrap_or_else(|| super::dead::id_of(pos)),
            origin: schema::origin_from_code(row.get(2)?),
            reason: DeadReason::from_name(&reason).unwrap_or(DeadReason::Rejected),
            attempts: row.get(4)?,
            died_at: Timestamp::from_millis(row.get(5)?),
            payload: schema::decode_payload(&head, data)?,
        };
        parcels.push(Parcel::Dead(client.clone(), letter));
    }
    Ok((rows, parcels))
}

/// A parcel with its body encoded.
struct Encoded {
    parcel: Parcel,
    head: Vec<u8>,
    data: bytes::Bytes,
}

impl Encoded {
    fn new(parcel: &Parcel) -> Self {
        let payload = match parcel {
            Parcel::Message { payload, .. } => payload,
            Parcel::Dead(_, letter) => &letter.payload,
        };
        let (head, data) = schema::encode_payload(payload);
        Self { parcel: parcel.clone(), head, data }
    }
}

/// Writes a batch, and what it is recognised by.
fn write_batch(connection: &Connection, from: &str, batch: &[Encoded], marks: &Marks) -> rusqlite::Result<()> {
    let mut number: u64 = connection.query_row("SELECT next_number FROM broker_meta", [], |row| row.get(0))?;
    for encoded in batch {
        write_one(connection, encoded, number, number + 1)?;
        number += 2;
    }
    connection.prepare_cached(schema::SET_NEXT_NUMBER)?.execute([number])?;
    connection.prepare_cached("DELETE FROM move_last WHERE shelf = ?1")?.execute([from])?;
    let mut insert = connection.prepare_cached("INSERT INTO move_last (shelf, mark, copies) VALUES (?1, ?2, ?3)")?;
    for (mark, copies) in marks.iter().filter(|(_, copies)| **copies > 0) {
        insert.execute(params![from, &mark[..], copies])?;
    }
    let kinds: Vec<Kind> = batch.iter().map(|encoded| encoded.parcel.kind()).collect();
    note_moved(connection, &kinds)
}

fn write_one(connection: &Connection, encoded: &Encoded, body: u64, pos: u64) -> rusqlite::Result<()> {
    let queue = match &encoded.parcel {
        Parcel::Message { queue, .. } => queue.clone(),
        Parcel::Dead(client, _) => Queue::Inbox(client.clone()),
    };
    let number = number_of(connection, &queue)?.ok_or(rusqlite::Error::QueryReturnedNoRows)?;
    connection.prepare_cached(schema::INSERT_BODY)?.execute(params![body, encoded.head, &encoded.data[..]])?;
    match &encoded.parcel {
        Parcel::Message { deliveries, attempts, since, due, .. } => {
            let due = due.map(Timestamp::as_millis);
            let row = params![number, pos, body, since.as_millis(), deliveries, attempts, due];
            connection.prepare_cached(schema::INSERT_ENTRY)?.execute(row)?;
            change_counts(connection, number, [1, i64::from(due.is_some()), 0])
        }
        Parcel::Dead(_, letter) => {
            let origin = schema::origin_code(letter.origin);
            let (reason, died_at) = (letter.reason.as_str(), letter.died_at.as_millis());
            let row = params![number, pos, body, origin, reason, letter.attempts, died_at, letter.id];
            connection.prepare_cached(schema::INSERT_DEAD_WITH_ID)?.execute(row)?;
            change_counts(connection, number, [0, 0, 1])
        }
    }
}

/// Declares clients with their limits and bindings.
fn declare(connection: &Connection, clients: &[ClientRecord]) -> rusqlite::Result<()> {
    for client in clients {
        let id = &client.client_id;
        let ttl_ms = client.limits.inbox_ttl_s.map(|s| i64::try_from(s.saturating_mul(1000)).unwrap_or(i64::MAX));
        for queue in [Queue::Outbox(id.clone()), Queue::Notify(id.clone())] {
            let row = params![id.as_str(), schema::kind_of(&queue), None::<u64>, None::<i64>];
            connection.prepare_cached(schema::DECLARE)?.query_row(row, |_| Ok(()))?;
        }
        let row = params![id.as_str(), "inbox", client.limits.max_inbox_messages, ttl_ms];
        let inbox: u32 = connection.prepare_cached(schema::DECLARE)?.query_row(row, |row| row.get(0))?;
        connection.prepare_cached("DELETE FROM binding WHERE queue = ?1")?.execute([inbox])?;
        let mut bind = connection.prepare_cached("INSERT OR IGNORE INTO binding (queue, pattern) VALUES (?1, ?2)")?;
        for pattern in &client.subscriptions {
            bind.execute(params![inbox, pattern.as_str()])?;
        }
    }
    Ok(())
}

/// Marks a client's queues as deleted: the next start deletes their rows.
fn mark_deleted(connection: &Connection, client: &str) -> rusqlite::Result<()> {
    connection
        .prepare_cached("DELETE FROM binding WHERE queue IN (SELECT id FROM queue WHERE client = ?1)")?
        .execute([client])?;
    connection
        .prepare_cached("UPDATE queue SET client = NULL, kind = 'deleted' WHERE client = ?1")?
        .execute([client])
        .map(|_| ())
}

#[async_trait]
impl Stock for EmbeddedStock {
    async fn shelves(&self) -> Result<Vec<(Shelf, u64)>, BrokerError> {
        self.db.read(filled).await.map_err(fail("see what the embedded broker holds"))
    }

    async fn prepare(&self, clients: &[ClientRecord]) -> Result<(), BrokerError> {
        let action = "declare the clients in the embedded broker's file";
        let known: std::collections::HashSet<String> =
            clients.iter().map(|client| client.client_id.as_str().to_owned()).collect();
        let forget = move |connection: &Connection| {
            let mut select = connection.prepare(
                "SELECT client FROM queue WHERE client IS NOT NULL GROUP BY client HAVING sum(depth) + sum(dead) = 0",
            )?;
            let names: Vec<String> = select.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
            names.iter().filter(|name| !known.contains(*name)).try_for_each(|name| mark_deleted(connection, name))
        };
        self.db.write(forget).await.map_err(fail(action))?;
        for step in clients.chunks(STEP) {
            let step = step.to_vec();
            self.db.write(move |connection| declare(connection, &step)).await.map_err(fail(action))?;
        }
        Ok(())
    }

    async fn delete_client(&self, client: &ClientId) -> Result<(), BrokerError> {
        let id = client.clone();
        let delete = move |connection: &Connection| mark_deleted(connection, id.as_str());
        self.db.write(delete).await.map_err(fail(format_args!("delete the queues of {client}")))
    }

    async fn read(&self, shelf: &Shelf) -> Result<Box<dyn Batch>, BrokerError> {
        let (queue, dead) = match shelf {
            Shelf::Queue(queue) => (queue.clone(), None),
            Shelf::Dead(client) => (Queue::Inbox(client.clone()), Some(client.clone())),
            // What is delayed lies in its queue.
            Shelf::Retry(_) => (Queue::Publish, None),
        };
        let is_dead = dead.is_some();
        let is_nothing = matches!(shelf, Shelf::Retry(_));
        let read = move |connection: &Connection| -> rusqlite::Result<(u32, Vec<Row>, Vec<Parcel>)> {
            let number = number_of(connection, &queue)?.filter(|_| !is_nothing);
            let Some(number) = number else { return Ok((0, Vec::new(), Vec::new())) };
            let (rows, parcels) = match &dead {
                Some(client) => read_dead(connection, client, number)?,
                None => read_queue(connection, &queue, number)?,
            };
            Ok((number, rows, parcels))
        };
        let (queue, rows, parcels) = self.db.read(read).await.map_err(fail(format_args!("read {shelf}")))?;
        // What was read is not told apart from what is read again: the other stock could not be asked.
        let items = parcels.into_iter().map(|parcel| Item { parcel, mark: [0; 32], again: false }).collect();
        Ok(Box::new(EmbeddedBatch { db: self.db.clone(), queue, is_dead, rows, items }))
    }

    async fn put(&self, from: &Shelf, items: &[Item]) -> Result<(), BrokerError> {
        if !self.db.has_room() {
            let what = format!("the disk under {} is nearly full", self.db.path().display());
            return Err(BrokerError::new(BrokerErrorKind::DiskFull, what));
        }
        let shelf = from.to_string();
        let (fresh, marks) = self.fresh(&shelf, items).await?;
        let batch: Vec<Encoded> = fresh.into_iter().map(|item| Encoded::new(&item.parcel)).collect();
        let write = move |connection: &Connection| write_batch(connection, &shelf, &batch, &marks);
        self.db.write(write).await.map_err(fail(format_args!("take in what was in {from}")))
    }

    async fn own_ids(&self, after: Option<OwnIdCursor>, limit: usize) -> Result<OwnIdPage, BrokerError> {
        let (generation, hash) = after.unwrap_or((i64::MIN, [0; 16]));
        let read = move |connection: &Connection| -> rusqlite::Result<OwnIdPage> {
            let mut select = connection.prepare_cached(
                "SELECT o.generation, o.hash, o.at, w.hash IS NULL FROM own_id o LEFT JOIN move_waiting w
                 ON w.hash = o.hash WHERE (o.generation, o.hash) > (?1, ?2) ORDER BY o.generation, o.hash LIMIT ?3",
            )?;
            let rows = select.query_map(params![generation, &hash[..], limit], |row| {
                let id = OwnId { hash: row.get(1)?, at_ms: row.get(2)?, routed: row.get(3)? };
                Ok(((row.get(0)?, id.hash), id))
            })?;
            let rows = rows.collect::<rusqlite::Result<Vec<(OwnIdCursor, OwnId)>>>()?;
            let next = rows.last().filter(|_| rows.len() == limit).map(|(cursor, _)| *cursor);
            Ok((rows.into_iter().map(|(_, id)| id).collect(), next))
        };
        self.db.read(read).await.map_err(fail("read own ids"))
    }

    async fn forget_own_ids(&self) -> Result<(), BrokerError> {
        self.clear("own_id").await?;
        let delete = |connection: &Connection| connection.execute("DELETE FROM own_id_generation", []);
        self.db.write(delete).await.map(|_| ()).map_err(fail("forget own ids"))
    }

    async fn put_own_ids(&self, ids: Vec<OwnId>) -> Result<(), BrokerError> {
        let write = move |connection: &Connection| dedup::adopt(connection, &ids, Timestamp::now().as_millis());
        self.db.write(write).await.map_err(fail("note own ids"))
    }

    async fn emptied(&self) -> Result<(), BrokerError> {
        self.clear("move_waiting").await?;
        self.forget_own_ids().await
    }

    async fn close(&self) {}
}
