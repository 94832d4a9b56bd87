//! Tables of webhooks: the attempts of each client, and what must be known of its endpoint after a restart.
//!
//! Attempts are kept in two rings of [`RING_ROWS`] slots a client, one of deliveries and one of failures, so that the
//! file does not grow with traffic, and the failures of a busy client are not washed away by its successes.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::{Db, DbError, DbErrorKind};
use crate::client::ClientId;
use crate::time::Timestamp;
use crate::webhook::attempts::{Attempt, AttemptId};

/// Attempts that are kept of one client: this many deliveries, and this many failures.
pub const RING_ROWS: u16 = 1000;

/// Clients whose old attempts are deleted in one transaction: a step takes some milliseconds at most.
const CLIENTS_PER_STEP: usize = 16;

const COMPONENT: &str = "webhooks";
const VERSION: u32 = 1;

const TABLES: &str = "
    CREATE TABLE webhook_attempts (
        client_id TEXT NOT NULL,
        failed INTEGER NOT NULL,       -- which ring
        slot INTEGER NOT NULL,
        id INTEGER NOT NULL,           -- grows with time
        message_id TEXT NOT NULL,
        at_ms INTEGER NOT NULL,
        status INTEGER,
        error TEXT,
        latency_ms INTEGER NOT NULL,
        response TEXT NOT NULL,
        PRIMARY KEY (client_id, failed, slot)
    ) WITHOUT ROWID;
    CREATE TABLE webhook_endpoints (
        client_id TEXT PRIMARY KEY,
        url TEXT NOT NULL,             -- what is noted here is of this endpoint only
        failing_since_ms INTEGER,
        head TEXT,                     -- ordered: the message that blocks the others
        head_attempts INTEGER NOT NULL,
        head_due_ms INTEGER NOT NULL
    ) WITHOUT ROWID;
";

/// What must be known of an endpoint after a restart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EndpointNotes {
    /// Since when every attempt has failed, if that is so for a while.
    pub failing_since: Option<Timestamp>,
    /// The message at the head of an ordered webhook, when it has failed before.
    pub head: Option<HeadNote>,
}

/// How far the head of an ordered webhook has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadNote {
    /// Sender and id of the message.
    pub key: String,
    /// Attempts made.
    pub attempts: u32,
    /// When the next is due.
    pub due: Timestamp,
}

/// For each client the slots that are written next: of deliveries, of failures.
type Rings = HashMap<ClientId, [u16; 2]>;

/// The tables. Cheap to clone.
#[derive(Debug, Clone)]
pub struct WebhookTables {
    db: Db,
    /// Bounded by the number of clients.
    rings: Arc<Mutex<Rings>>,
}

impl WebhookTables {
    /// Opens the tables in `db`, or makes them.
    ///
    /// # Errors
    /// When they were written by a newer version, or SQLite fails.
    pub async fn open(db: Db) -> Result<Self, DbError> {
        let found = db.write(|c| crate::store::schema_version(c, COMPONENT, VERSION, TABLES)).await?;
        if found > VERSION {
            return Err(DbError {
                kind: DbErrorKind::Internal,
                detail: format!("webhook tables are of version {found}, this program knows {VERSION}: run a newer one"),
            });
        }
        Ok(Self { db, rings: Arc::default() })
    }

    /// Writes attempts, oldest first.
    ///
    /// # Errors
    /// What SQLite says; none is written then.
    pub async fn append(&self, rows: Vec<(ClientId, Attempt)>) -> Result<(), DbError> {
        let rings = Arc::clone(&self.rings);
        self.db
            .write(move |connection| {
                let mut rings = rings.lock();
                let mut insert = connection.prepare_cached(
                    "INSERT OR REPLACE INTO webhook_attempts VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
                )?;
                for (client, attempt) in &rows {
                    let failed = !attempt.is_delivery();
                    let slot = next_slot(&mut rings, connection, client, failed)?;
                    insert.execute(params![
                        client.as_str(),
                        failed,
                        slot,
                        attempt.id.as_i64(),
                        &*attempt.message_id,
                        attempt.at.as_millis(),
                        attempt.status,
                        attempt.error.as_deref(),
                        attempt.latency_ms,
                        &*attempt.response,
                    ])?;
                }
                Ok(())
            })
            .await
    }

    /// A client's attempts before `before` (all, when `None`), newest first.
    ///
    /// # Errors
    /// What SQLite says.
    pub async fn page(
        &self,
        client: &ClientId,
        before: Option<AttemptId>,
        limit: usize,
    ) -> Result<Vec<Attempt>, DbError> {
        let client = client.clone();
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        self.db
            .read(move |connection| {
                connection
                    .prepare_cached(
                        "SELECT id, message_id, at_ms, status, error, latency_ms, response FROM webhook_attempts
                         WHERE client_id = ?1 AND id < ?2 ORDER BY id DESC LIMIT ?3",
                    )?
                    .query_map(
                        params![client.as_str(), before.map_or(i64::MAX, AttemptId::as_i64), limit],
                        read_attempt,
                    )?
                    .collect()
            })
            .await
    }

    /// Forgets a client's attempts and endpoint.
    ///
    /// # Errors
    /// What SQLite says.
    pub async fn forget(&self, client: &ClientId) -> Result<(), DbError> {
        let (client, rings) = (client.clone(), Arc::clone(&self.rings));
        self.db
            .write(move |connection| {
                rings.lock().remove(&client);
                connection.execute("DELETE FROM webhook_attempts WHERE client_id = ?1", [client.as_str()])?;
                connection.execute("DELETE FROM webhook_endpoints WHERE client_id = ?1", [client.as_str()])?;
                Ok(())
            })
            .await
    }

    /// Deletes attempts made before `before`, a few clients at a time. Returns how many.
    ///
    /// # Errors
    /// What SQLite says; what was deleted stays deleted.
    pub async fn expire(&self, before: Timestamp) -> Result<usize, DbError> {
        let (mut after, mut deleted) = (String::new(), 0);
        loop {
            let from = std::mem::take(&mut after);
            let step = self.db.write(move |connection| expire_step(connection, &from, before)).await?;
            deleted += step.1;
            match step.0 {
                Some(last) => after = last,
                None => return Ok(deleted),
            }
        }
    }

    /// What was noted of the client's endpoint, unless that is another URL by now.
    ///
    /// # Errors
    /// What SQLite says.
    pub async fn notes(&self, client: &ClientId, url: &str) -> Result<EndpointNotes, DbError> {
        let (client, url) = (client.clone(), url.to_owned());
        let notes = self
            .db
            .read(move |connection| {
                connection
                    .query_row(
                        "SELECT failing_since_ms, head, head_attempts, head_due_ms FROM webhook_endpoints
                         WHERE client_id = ?1 AND url = ?2",
                        [client.as_str(), &url],
                        |row| {
                            let since: Option<i64> = row.get(0)?;
                            let head: Option<String> = row.get(1)?;
                            let (attempts, due) = (row.get(2)?, Timestamp::from_millis(row.get(3)?));
                            Ok(EndpointNotes {
                                failing_since: since.map(Timestamp::from_millis),
                                head: head.map(|key| HeadNote { key, attempts, due }),
                            })
                        },
                    )
                    .optional()
            })
            .await?;
        Ok(notes.unwrap_or_default())
    }

    /// When the client's last attempt failed that is still kept.
    ///
    /// # Errors
    /// What SQLite says.
    pub async fn last_failure(&self, client: &ClientId) -> Result<Option<Timestamp>, DbError> {
        let client = client.clone();
        self.db
            .read(move |connection| {
                connection
                    .prepare_cached("SELECT max(at_ms) FROM webhook_attempts WHERE client_id = ?1 AND failed")?
                    .query_row([client.as_str()], |row| row.get::<_, Option<i64>>(0))
            })
            .await
            .map(|at_ms| at_ms.map(Timestamp::from_millis))
    }

    /// Notes, or clears when there is nothing to note.
    ///
    /// # Errors
    /// What SQLite says.
    pub async fn note(&self, client: &ClientId, url: &str, notes: &EndpointNotes) -> Result<(), DbError> {
        let (client, url, notes) = (client.clone(), url.to_owned(), notes.clone());
        self.db
            .write(move |connection| {
                if notes == EndpointNotes::default() {
                    connection
                        .prepare_cached("DELETE FROM webhook_endpoints WHERE client_id = ?1")?
                        .execute([client.as_str()])?;
                    return Ok(());
                }
                let since = notes.failing_since.map(Timestamp::as_millis);
                let (key, attempts, due) = match &notes.head {
                    Some(head) => (Some(&head.key), head.attempts, head.due.as_millis()),
                    None => (None, 0, 0),
                };
                connection
                    .prepare_cached("INSERT OR REPLACE INTO webhook_endpoints VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?
                    .execute(params![client.as_str(), url, since, key, attempts, due])?;
                Ok(())
            })
            .await
    }
}

/// The slot to write, and the one after it noted for the next time. Runs again after a rollback: that skips slots,
/// which then hold what they held before.
fn next_slot(rings: &mut Rings, connection: &Connection, client: &ClientId, failed: bool) -> rusqlite::Result<u16> {
    if !rings.contains_key(client) {
        let mut slots = [0; 2];
        for (failed, slot) in slots.iter_mut().enumerate() {
            let newest: Option<u16> = connection
                .prepare_cached(
                    "SELECT slot FROM webhook_attempts WHERE client_id = ?1 AND failed = ?2 ORDER BY id DESC LIMIT 1",
                )?
                .query_row(params![client.as_str(), failed], |row| row.get(0))
                .optional()?;
            *slot = newest.map_or(0, |newest| (newest + 1) % RING_ROWS);
        }
        rings.insert(client.clone(), slots);
    }
    let slots = rings.get_mut(client).expect("was put there just now");
    let slot = &mut slots[usize::from(failed)];
    let taken = *slot;
    *slot = (taken + 1) % RING_ROWS;
    Ok(taken)
}

fn read_attempt(row: &Row<'_>) -> rusqlite::Result<Attempt> {
    let message_id: String = row.get(1)?;
    let response: String = row.get(6)?;
    Ok(Attempt {
        id: AttemptId::from_i64(row.get(0)?),
        message_id: message_id.into(),
        at: Timestamp::from_millis(row.get(2)?),
        status: row.get(3)?,
        error: row.get(4)?,
        latency_ms: row.get(5)?,
        response: response.into(),
    })
}

/// Deletes old attempts of the next few clients after `from`. Returns the last of them, unless none was left.
fn expire_step(connection: &Connection, from: &str, before: Timestamp) -> rusqlite::Result<(Option<String>, usize)> {
    // One seek a client: there may be thousands of attempts between one client and the next.
    let mut next = connection
        .prepare_cached("SELECT client_id FROM webhook_attempts WHERE client_id > ?1 ORDER BY client_id LIMIT 1")?;
    let mut delete = connection.prepare_cached("DELETE FROM webhook_attempts WHERE client_id = ?1 AND at_ms < ?2")?;
    let (mut last, mut deleted) = (from.to_owned(), 0);
    for _ in 0..CLIENTS_PER_STEP {
        let client: Option<String> = next.query_row([&last], |row| row.get(0)).optional()?;
        let Some(client) = client else { return Ok((None, deleted)) };
        deleted += delete.execute(params![client, before.as_millis()])?;
        last = client;
    }
    Ok((Some(last), deleted))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn open() -> (tempfile::TempDir, WebhookTables) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let db = Db::open(&directory.path().join("test.db")).expect("opens");
        (directory, WebhookTables::open(db).await.expect("opens"))
    }

    fn client(id: &str) -> ClientId {
        ClientId::parse(id).expect("test id")
    }

    fn attempt(id: i64, status: Option<u16>) -> Attempt {
        Attempt {
            id: AttemptId::from_i64(id),
            message_id: format!("m{id}").into(),
            at: Timestamp::from_millis(id),
            status,
            error: status.is_none().then(|| "no answer".into()),
            latency_ms: 3,
            response: "ok".into(),
        }
    }

    fn ids(page: &[Attempt]) -> Vec<i64> {
        page.iter().map(|attempt| attempt.id.as_i64()).collect()
    }

    #[actix_rt::test]
    async fn attempts_are_paged_newest_first_and_the_rings_do_not_grow() {
        let (_directory, tables) = open().await;
        let (a, b) = (client("a"), client("b"));
        let rows = i64::from(RING_ROWS);
        tables.append(vec![(b.clone(), attempt(1, Some(200)))]).await.expect("appends");
        // Failures first, so that more deliveries than there are slots would wash them away if they could.
        tables.append((1..=5).map(|n| (a.clone(), attempt(n, None))).collect()).await.expect("appends");
        tables.append((6..=rows + 10).map(|n| (a.clone(), attempt(n, Some(204)))).collect()).await.expect("appends");
        let first = tables.page(&a, None, 3).await.expect("reads");
        assert_eq!(ids(&first), [rows + 10, rows + 9, rows + 8]);
        assert_eq!(first[0], attempt(rows + 10, Some(204)));
        let next = tables.page(&a, Some(first[2].id), 2).await.expect("reads");
        assert_eq!(ids(&next), [rows + 7, rows + 6]);
        let all = ids(&tables.page(&a, None, 10_000).await.expect("reads"));
        assert_eq!(all.len(), usize::from(RING_ROWS) + 5);
        assert_eq!(all[all.len() - 6..], [11, 5, 4, 3, 2, 1]);
        assert_eq!(ids(&tables.page(&b, None, 10).await.expect("reads")), [1]);
    }

    #[actix_rt::test]
    async fn a_ring_goes_on_where_it_was_after_a_restart() {
        let (_directory, tables) = open().await;
        let a = client("a");
        tables.append((1..=3).map(|n| (a.clone(), attempt(n, Some(200)))).collect()).await.expect("appends");
        let reopened = WebhookTables::open(tables.db.clone()).await.expect("opens");
        reopened.append(vec![(a.clone(), attempt(4, Some(200)))]).await.expect("appends");
        assert_eq!(ids(&reopened.page(&a, None, 10).await.expect("reads")), [4, 3, 2, 1]);
    }

    #[actix_rt::test]
    async fn old_attempts_expire_and_a_client_is_forgotten() {
        let (_directory, tables) = open().await;
        for n in 0..50 {
            let client = client(&format!("c{n}"));
            tables.append((1..=4).map(|n| (client.clone(), attempt(n, None))).collect()).await.expect("appends");
        }
        assert_eq!(tables.expire(Timestamp::from_millis(3)).await, Ok(100));
        assert_eq!(ids(&tables.page(&client("c7"), None, 10).await.expect("reads")), [4, 3]);
        tables.forget(&client("c7")).await.expect("forgets");
        assert_eq!(tables.page(&client("c7"), None, 10).await, Ok(vec![]));
    }

    #[actix_rt::test]
    async fn notes_are_of_one_endpoint() {
        let (_directory, tables) = open().await;
        let a = client("a");
        let notes = EndpointNotes {
            failing_since: Some(Timestamp::from_millis(7)),
            head: Some(HeadNote { key: "b:1".into(), attempts: 2, due: Timestamp::from_millis(9) }),
        };
        tables.note(&a, "https://a.example/", &notes).await.expect("notes");
        assert_eq!(tables.notes(&a, "https://a.example/").await, Ok(notes));
        assert_eq!(tables.notes(&a, "https://b.example/").await, Ok(EndpointNotes::default()));
        tables.note(&a, "https://a.example/", &EndpointNotes::default()).await.expect("clears");
        assert_eq!(tables.notes(&a, "https://a.example/").await, Ok(EndpointNotes::default()));
    }
}
