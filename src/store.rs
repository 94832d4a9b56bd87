//! The registry's store: clients, their secrets, and a few settings, in the one SQLite file.
//!
//! # Invariants
//! - Secrets of clients are stored as hashes; webhook secrets, which must be known to sign, are encrypted with
//!   XChaCha20-Poly1305 under a key derived from the token secret, bound to their client.
//! - A client is whole or not at all: while its queues are being made or deleted its row is a [`Stage::Unfinished`]
//!   one, which the next start cleans up.
//! - A file written by a newer version is refused, not guessed at.

use std::sync::Arc;

use chacha20poly1305::aead::{Aead as _, Payload};
use chacha20poly1305::{KeyInit as _, XChaCha20Poly1305, XNonce};
use rusqlite::{Connection, OptionalExtension as _, params};

use crate::client::{ClientId, ClientRecord};
use crate::db::{Db, DbError, DbErrorKind};
use crate::secret::{SecretSlots, WebhookSecrets};
use crate::token::TokenSecret;

/// Version of the tables below.
const VERSION: u32 = 1;

/// This component's name in the table `schema`.
const COMPONENT: &str = "registry";

/// Domain separation of the key that encrypts webhook secrets.
const KEY_LABEL: &str = "communications-backbone webhook secrets v1";

/// Bytes of an XChaCha20 nonce. At 192 bits random ones do not repeat.
const NONCE_BYTES: usize = 24;

/// A client as it is stored.
#[derive(Debug, Clone)]
pub struct StoredClient {
    /// The record.
    pub record: ClientRecord,
    /// Hashes of its secrets.
    pub secrets: SecretSlots,
    /// Told apart from an earlier client of the same id. Below 2^63: SQLite's integers are signed.
    pub incarnation: u64,
    /// What signs its webhooks, when it has one.
    pub webhook_secrets: Option<WebhookSecrets>,
}

/// What is found in the store at the start.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Clients that exist.
    pub clients: Vec<StoredClient>,
    /// Clients whose creation or deletion a crash cut short: their queues are to be deleted, then the row.
    pub unfinished: Vec<ClientId>,
    /// Clients whose webhook secrets cannot be read because the token secret is another one now. They are loaded
    /// without.
    pub unreadable: Vec<ClientId>,
}

/// How far a row has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The client exists.
    Whole = 0,
    /// It is being made or deleted.
    Unfinished = 1,
}

/// The registry's tables. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    db: Db,
    cipher: Arc<XChaCha20Poly1305>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("db", &self.db).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens the tables in `db`, or makes them.
    ///
    /// # Errors
    /// When they were written by a newer version, or SQLite fails.
    pub async fn open(db: Db, token_secret: &TokenSecret) -> Result<Self, DbError> {
        let found = db.write(|connection| schema_version(connection, COMPONENT, VERSION, TABLES)).await?;
        if found > VERSION {
            return Err(DbError {
                kind: DbErrorKind::Internal,
                detail: format!(
                    "{} was written by a newer version (registry tables {found}, this program knows {VERSION}): \
                     run that version, or a newer one",
                    db.path().display()
                ),
            });
        }
        let cipher = XChaCha20Poly1305::new(&token_secret.derive(KEY_LABEL).into());
        Ok(Self { db, cipher: Arc::new(cipher) })
    }

    /// Everything that is stored.
    ///
    /// # Errors
    /// What SQLite says, or a row that cannot be read.
    pub async fn load(&self) -> Result<Loaded, DbError> {
        let rows = self.db.read(read_rows).await?;
        let mut loaded = Loaded::default();
        for (stage, row) in rows {
            let broken = |what: &str| DbError {
                kind: DbErrorKind::Internal,
                detail: format!("read client {}: {what}", row.client_id),
            };
            if stage != Stage::Whole as i64 {
                loaded.unfinished.push(ClientId::parse(&row.client_id).map_err(|error| broken(&error.to_string()))?);
                continue;
            }
            let record: ClientRecord = serde_json::from_str(&row.record).map_err(|e| broken(&e.to_string()))?;
            let secrets = serde_json::from_str(&row.secrets).map_err(|e| broken(&e.to_string()))?;
            let webhook_secrets = match &row.webhook_secrets {
                None => None,
                Some(sealed) => {
                    let opened = self.unseal(&record.client_id, sealed);
                    if opened.is_none() {
                        loaded.unreadable.push(record.client_id.clone());
                    }
                    opened
                }
            };
            let incarnation = u64::try_from(row.incarnation).map_err(|_| broken("negative incarnation"))?;
            loaded.clients.push(StoredClient { record, secrets, incarnation, webhook_secrets });
        }
        Ok(loaded)
    }

    /// Notes that the client is being made or deleted: if nothing follows, the next start deletes what is left of it.
    ///
    /// # Errors
    /// What SQLite says.
    pub async fn mark_unfinished(&self, client_id: &ClientId) -> Result<(), DbError> {
        let id = client_id.clone();
        self.db
            .write(move |connection| {
                connection
                    .prepare_cached(
                        "INSERT INTO registry_clients (client_id, stage, record, secrets, incarnation)
                         VALUES (?1, ?2, '', '', 0) ON CONFLICT (client_id) DO UPDATE SET stage = ?2",
                    )?
                    .execute(params![id.as_str(), Stage::Unfinished as i64])?;
                Ok(())
            })
            .await
    }

    /// Adds or replaces a client, whole.
    ///
    /// # Errors
    /// What SQLite says.
    pub async fn put(&self, client: &StoredClient) -> Result<(), DbError> {
        let id = client.record.client_id.clone();
        let record = to_json(&client.record);
        let secrets = to_json(&client.secrets);
        let sealed = client.webhook_secrets.as_ref().map(|secrets| self.seal(&id, secrets));
        let incarnation = i64::try_from(client.incarnation)
            .map_err(|_| DbError { kind: DbErrorKind::Internal, detail: "an incarnation is below 2^63".into() })?;
        self.db
            .write(move |connection| {
                connection
                    .prepare_cached(
                        "INSERT OR REPLACE INTO registry_clients
                         (client_id, stage, record, secrets, incarnation, webhook_secrets)
                         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
                    )?
                    .execute(params![id.as_str(), Stage::Whole as i64, record, secrets, incarnation, sealed])?;
                Ok(())
            })
            .await
    }

    /// Removes a client.
    ///
    /// # Errors
    /// What SQLite says.
    pub async fn remove(&self, client_id: &ClientId) -> Result<(), DbError> {
        let id = client_id.clone();
        self.db
            .write(move |connection| {
                connection.prepare_cached("DELETE FROM registry_clients WHERE client_id = ?1")?.execute([id.as_str()])
            })
            .await
            .map(|_| ())
    }

    /// A setting, if it was ever made.
    ///
    /// # Errors
    /// What SQLite says.
    pub async fn setting(&self, key: &'static str) -> Result<Option<String>, DbError> {
        self.db
            .read(move |connection| {
                connection
                    .query_row("SELECT value FROM registry_settings WHERE key = ?1", [key], |row| row.get(0))
                    .optional()
            })
            .await
    }

    /// Makes or changes a setting.
    ///
    /// # Errors
    /// What SQLite says.
    pub async fn set_setting(&self, key: &'static str, value: String) -> Result<(), DbError> {
        self.db
            .write(move |connection| {
                connection
                    .execute("INSERT OR REPLACE INTO registry_settings (key, value) VALUES (?1, ?2)", [key, &value])
            })
            .await
            .map(|_| ())
    }

    fn seal(&self, client_id: &ClientId, secrets: &WebhookSecrets) -> Vec<u8> {
        let nonce: [u8; NONCE_BYTES] = rand::random();
        let plain = to_json(secrets);
        let payload = Payload { msg: plain.as_bytes(), aad: client_id.as_str().as_bytes() };
        let sealed = self
            .cipher
            .encrypt(XNonce::from_slice(&nonce), payload)
            .expect("a few hundred bytes are within the cipher's limit of 256 GiB");
        [&nonce[..], &sealed].concat()
    }

    fn unseal(&self, client_id: &ClientId, sealed: &[u8]) -> Option<WebhookSecrets> {
        let (nonce, sealed) = sealed.split_at_checked(NONCE_BYTES)?;
        let payload = Payload { msg: sealed, aad: client_id.as_str().as_bytes() };
        let plain = self.cipher.decrypt(XNonce::from_slice(nonce), payload).ok()?;
        serde_json::from_slice(&plain).ok()
    }
}

const TABLES: &str = "
    CREATE TABLE registry_clients (
        client_id TEXT PRIMARY KEY,
        stage INTEGER NOT NULL,
        record TEXT NOT NULL,          -- JSON, as the API shows it
        secrets TEXT NOT NULL,         -- JSON, hashes only
        incarnation INTEGER NOT NULL,
        webhook_secrets BLOB           -- nonce and ciphertext
    ) WITHOUT ROWID;
    CREATE TABLE registry_settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
";

/// The version of a component's tables in this file; makes them, as `version`, when there are none. Each component of
/// the file has a version of its own here, because `PRAGMA user_version` is one for the whole file.
pub(crate) fn schema_version(
    connection: &Connection,
    component: &str,
    version: u32,
    tables: &str,
) -> rusqlite::Result<u32> {
    connection.execute_batch(
        "CREATE TABLE IF NOT EXISTS schema (component TEXT PRIMARY KEY, version INTEGER NOT NULL) WITHOUT ROWID",
    )?;
    let found = connection
        .query_row("SELECT version FROM schema WHERE component = ?1", [component], |row| row.get(0))
        .optional()?;
    if let Some(found) = found {
        return Ok(found);
    }
    connection.execute_batch(tables)?;
    connection.execute("INSERT INTO schema (component, version) VALUES (?1, ?2)", params![component, version])?;
    Ok(version)
}

struct Row {
    client_id: String,
    record: String,
    secrets: String,
    incarnation: i64,
    webhook_secrets: Option<Vec<u8>>,
}

fn read_rows(connection: &Connection) -> rusqlite::Result<Vec<(i64, Row)>> {
    let mut statement = connection.prepare(
        "SELECT stage, client_id, record, secrets, incarnation, webhook_secrets FROM registry_clients
         ORDER BY client_id",
    )?;
    let rows = statement.query_map([], |row| {
        let stage = row.get(0)?;
        let (client_id, record, secrets) = (row.get(1)?, row.get(2)?, row.get(3)?);
        Ok((stage, Row { client_id, record, secrets, incarnation: row.get(4)?, webhook_secrets: row.get(5)? }))
    })?;
    rows.collect()
}

fn to_json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("plain data with string keys is always JSON")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Limits;
    use crate::secret::Secret;
    use crate::time::Timestamp;
    use crate::topic::Pattern;

    fn client(id: &str, webhook_secrets: Option<WebhookSecrets>) -> StoredClient {
        StoredClient {
            record: ClientRecord {
                client_id: ClientId::parse(id).expect("test id"),
                name: Some("Ä \"name\"".into()),
                subscriptions: vec![Pattern::parse("soar.#").expect("test pattern")],
                webhook: None,
                limits: Limits { send_per_s: Some(5), ..Limits::default() },
                paused: true,
                created_at: Timestamp::from_millis(1_795_457_340_123),
            },
            secrets: SecretSlots::new(&Secret::generate()),
            incarnation: u64::MAX >> 1,
            webhook_secrets,
        }
    }

    #[actix_rt::test]
    async fn what_is_put_is_loaded_by_the_next_opener() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("test.db");
        let key = TokenSecret::generate();
        let (a, b) = (client("a", None), client("b", Some(WebhookSecrets::generate())));
        let db = Db::open(&path).expect("opens");
        let store = Store::open(db.clone(), &key).await.expect("opens");
        for client in [&a, &b, &client("c", None)] {
            store.put(client).await.expect("puts");
        }
        store.remove(&client("c", None).record.client_id).await.expect("removes");
        store.mark_unfinished(&client("d", None).record.client_id).await.expect("marks");
        store.set_setting("k", "v".into()).await.expect("sets");
        db.close();
        drop((db, store));

        let db = Db::open(&path).expect("opens again");
        let store = Store::open(db.clone(), &key).await.expect("opens again");
        let loaded = store.load().await.expect("loads");
        assert_eq!(loaded.clients.len(), 2);
        for (loaded, put) in loaded.clients.iter().zip([&a, &b]) {
            assert_eq!(loaded.record, put.record);
            assert_eq!(loaded.secrets, put.secrets);
            assert_eq!(loaded.incarnation, put.incarnation);
            assert_eq!(loaded.webhook_secrets, put.webhook_secrets);
        }
        assert_eq!(loaded.unfinished, [client("d", None).record.client_id]);
        assert!(loaded.unreadable.is_empty());
        assert_eq!(store.setting("k").await.expect("reads"), Some("v".into()));
        assert_eq!(store.setting("other").await.expect("reads"), None);
    }

    #[actix_rt::test]
    async fn webhook_secrets_are_not_in_the_file_and_need_the_key() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("test.db");
        let secrets = WebhookSecrets::generate();
        let db = Db::open(&path).expect("opens");
        let store = Store::open(db.clone(), &TokenSecret::generate()).await.expect("opens");
        store.put(&client("b", Some(secrets.clone()))).await.expect("puts");
        db.close();
        drop((db, store));
        let file = std::fs::read(&path).expect("reads the file");
        let needle = secrets.current().as_bytes();
        assert!(!file.windows(needle.len()).any(|window| window == needle));

        let store = Store::open(Db::open(&path).expect("opens"), &TokenSecret::generate()).await.expect("opens");
        let loaded = store.load().await.expect("loads");
        assert_eq!(loaded.unreadable, [client("b", None).record.client_id]);
        assert_eq!(loaded.clients[0].webhook_secrets, None);
    }

    #[actix_rt::test]
    async fn sealed_secrets_do_not_open_for_another_client() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let db = Db::open(&directory.path().join("test.db")).expect("opens");
        let store = Store::open(db, &TokenSecret::generate()).await.expect("opens");
        let (a, b) = (client("a", None).record.client_id, client("b", None).record.client_id);
        let sealed = store.seal(&a, &WebhookSecrets::generate());
        assert!(store.unseal(&a, &sealed).is_some());
        assert!(store.unseal(&b, &sealed).is_none());
        assert!(store.unseal(&a, &sealed[..10]).is_none());
    }

    #[actix_rt::test]
    async fn a_newer_file_is_refused() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let db = Db::open(&directory.path().join("test.db")).expect("opens");
        Store::open(db.clone(), &TokenSecret::generate()).await.expect("opens");
        db.write(|c| c.execute("UPDATE schema SET version = 99 WHERE component = 'registry'", []))
            .await
            .expect("writes");
        let error = Store::open(db, &TokenSecret::generate()).await.expect_err("newer");
        assert!(error.detail.contains("newer version"), "{error}");
    }
}
