//! The log of attempts: what a receiver's developer looks at (`GET /clients/{id}/attempts`).
//!
//! Attempts are noted in memory and written together, four times a second, so that ten thousand a second cost one
//! transaction each time. Of each client the newest thousand deliveries and the newest thousand failures are kept, for
//! `SOAR_ATTEMPT_RETENTION` days; what would be overwritten before it is written is not written at all. It is a log for
//! people, not an account: a crash loses the last quarter of a second of it, and messages are never settled by it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Serialize, Serializer};

use super::answer::Answer;
use super::failure::Failure;
use crate::client::ClientId;
use crate::db::DbError;
use crate::db::webhooks::{RING_ROWS, WebhookTables};
use crate::time::Timestamp;

/// How often what was noted is written.
const FLUSH_EVERY: Duration = Duration::from_millis(250);
/// How often old attempts are deleted; more often when they are kept for less than that, as in tests.
const EXPIRE_EVERY: Duration = Duration::from_secs(3600);
/// Attempts in one transaction.
const ROWS_PER_WRITE: usize = 2000;
/// Attempts that wait to be written at most: about 20 MB if every answer is long. Beyond that the newest are left out,
/// counted and said in the log.
const WAITING_MAX: usize = 16_384;

/// An attempt's own id: grows with time, so that it is a cursor as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct AttemptId(i64);

impl AttemptId {
    /// From what [`AttemptId::as_i64`] gave.
    pub const fn from_i64(id: i64) -> Self {
        Self(id)
    }

    /// As a number.
    pub const fn as_i64(self) -> i64 {
        self.0
    }

    /// Reads what its `Display` wrote.
    pub fn parse(text: &str) -> Option<Self> {
        let is_hex = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if is_hex { i64::from_str_radix(text, 16).ok().map(Self) } else { None }
    }
}

impl std::fmt::Display for AttemptId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl Serialize for AttemptId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One attempt, as the API shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Attempt {
    /// Its own id.
    pub id: AttemptId,
    /// The message's.
    pub message_id: Box<str>,
    /// When it began.
    pub at: Timestamp,
    /// The answer's status; `None` when there was no complete answer.
    pub status: Option<u16>,
    /// What was wrong, in words; `None` for a 2xx.
    pub error: Option<String>,
    /// Milliseconds that it took.
    pub latency_ms: u32,
    /// The first KiB of the answer, as UTF-8.
    pub response: Box<str>,
}

impl Attempt {
    /// An attempt that began at `at` and took `latency`.
    pub fn new(
        id: AttemptId,
        message_id: &str,
        at: Timestamp,
        latency: Duration,
        result: &Result<Answer, Failure>,
    ) -> Self {
        let (status, error, response) = match result {
            Ok(answer) => {
                (Some(answer.status), words_for(answer), String::from_utf8_lossy(&answer.body).into_owned().into())
            }
            Err(failure) => (None, Some(failure.words.clone()), "".into()),
        };
        let latency_ms = u32::try_from(latency.as_millis()).unwrap_or(u32::MAX);
        Self { id, message_id: message_id.into(), at, status, error, latency_ms, response }
    }

    /// Whether the message was delivered by it.
    pub fn is_delivery(&self) -> bool {
        self.status.is_some_and(|status| (200..300).contains(&status))
    }
}

/// What an answer means, when it is no success.
fn words_for(answer: &Answer) -> Option<String> {
    let status = answer.status;
    let asked = answer.retry_after.as_ref().filter(|_| matches!(status, 429 | 503));
    match (status, asked) {
        (200..300, _) => None,
        (300..400, _) => Some(format!("answered {status}: redirects are not followed, set the webhook to the new URL")),
        (410, _) => Some("answered 410: the endpoint is gone, and the webhook is switched off".into()),
        (_, Some(asked)) => {
            Some(format!("answered {status}, Retry-After: {}", asked.chars().take(64).collect::<String>()))
        }
        _ => Some(format!("answered {status}: only a 2xx counts as delivered")),
    }
}

/// Attempts that wait to be written.
#[derive(Debug, Default)]
struct Waiting {
    clients: HashMap<ClientId, [VecDeque<Attempt>; 2]>,
    rows: usize,
    left_out: u64,
}

/// See the module.
#[derive(Debug)]
pub struct AttemptLog {
    tables: WebhookTables,
    retention: Duration,
    waiting: Mutex<Waiting>,
    /// The last id given.
    last_id: AtomicI64,
    /// One flush at a time, so that rows are written in order.
    flushing: tokio::sync::Mutex<()>,
}

impl AttemptLog {
    /// A log in these tables. Somebody must [`run`](AttemptLog::run) it.
    pub fn new(tables: WebhookTables, retention: Duration) -> Arc<Self> {
        Arc::new(Self {
            tables,
            retention,
            waiting: Mutex::default(),
            last_id: AtomicI64::new(0),
            flushing: tokio::sync::Mutex::new(()),
        })
    }

    /// A fresh id for an attempt that begins now: microseconds since the epoch, or one more than the last.
    pub fn next_id(&self, now: Timestamp) -> AttemptId {
        let micros = now.as_millis().saturating_mul(1000);
        let later = |last: i64| Some(micros.max(last.saturating_add(1)));
        let last = self.last_id.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later).unwrap_or(micros);
        AttemptId(micros.max(last.saturating_add(1)))
    }

    /// Notes an attempt. Never waits.
    pub fn note(&self, client: &ClientId, attempt: Attempt) {
        let mut waiting = self.waiting.lock();
        let waiting = &mut *waiting;
        let ring = usize::from(!attempt.is_delivery());
        if let Some(rings) = waiting.clients.get_mut(client)
            && rings[ring].len() >= usize::from(RING_ROWS)
        {
            // It would be overwritten in the file as well.
            rings[ring].pop_front();
            rings[ring].push_back(attempt);
        } else if waiting.rows >= WAITING_MAX {
            waiting.left_out += 1;
        } else {
            waiting.rows += 1;
            waiting.clients.entry(client.clone()).or_default()[ring].push_back(attempt);
        }
    }

    /// Writes what was noted. Resolves when it is durable.
    ///
    /// # Errors
    /// What SQLite says. What could not be written is gone.
    pub async fn flush(&self) -> Result<(), DbError> {
        let _turn = self.flushing.lock().await;
        let waiting = std::mem::take(&mut *self.waiting.lock());
        if waiting.left_out > 0 {
            log::warn!("{} webhook attempts are not in the log: the disk does not keep up", waiting.left_out);
        }
        let mut rows = waiting.clients.into_iter().flat_map(|(client, rings)| {
            rings.into_iter().flatten().map(move |attempt| (client.clone(), attempt)).collect::<Vec<_>>()
        });
        loop {
            let some: Vec<_> = rows.by_ref().take(ROWS_PER_WRITE).collect();
            if some.is_empty() {
                return Ok(());
            }
            self.tables.append(some).await?;
        }
    }

    /// Writes and expires, for ever. Dropped, it stops; [`flush`](AttemptLog::flush) what is left.
    pub async fn run(self: Arc<Self>) {
        let mut expire_at = tokio::time::Instant::now();
        let mut failed = false;
        loop {
            tokio::time::sleep(FLUSH_EVERY).await;
            let result = self.flush().await;
            match (&result, failed) {
                (Err(error), false) => log::warn!("cannot write the log of webhook attempts: {error}"),
                (Ok(()), true) => log::info!("the log of webhook attempts is written again"),
                _ => {}
            }
            failed = result.is_err();
            if tokio::time::Instant::now() >= expire_at {
                expire_at = tokio::time::Instant::now() + EXPIRE_EVERY.min(self.retention);
                let kept_ms = i64::try_from(self.retention.as_millis()).unwrap_or(i64::MAX);
                if let Err(error) = self.tables.expire(Timestamp::now().plus_millis(-kept_ms)).await {
                    log::warn!("cannot delete old webhook attempts: {error}");
                }
            }
        }
    }

    /// A client's attempts, newest first, at most `limit`; `after` is the last one of the page before. What was noted
    /// until now is in it.
    ///
    /// # Errors
    /// What SQLite says.
    pub async fn page(
        &self,
        client: &ClientId,
        after: Option<AttemptId>,
        limit: usize,
    ) -> Result<AttemptPage, DbError> {
        if self.waiting.lock().clients.contains_key(client) {
            self.flush().await?;
        }
        let mut attempts = self.tables.page(client, after, limit.saturating_add(1)).await?;
        let has_more = attempts.len() > limit;
        attempts.truncate(limit);
        let next = attempts.last().filter(|_| has_more).map(|last| last.id.to_string());
        Ok(AttemptPage { attempts, next })
    }

    /// Forgets a client that was deleted; its pusher must have ended.
    ///
    /// # Errors
    /// What SQLite says.
    pub async fn forget(&self, client: &ClientId) -> Result<(), DbError> {
        let _turn = self.flushing.lock().await;
        {
            let mut waiting = self.waiting.lock();
            if let Some(rings) = waiting.clients.remove(client) {
                waiting.rows -= rings.iter().map(VecDeque::len).sum::<usize>();
            }
        }
        self.tables.forget(client).await
    }

    /// The tables below, for the pushers' own notes.
    pub fn tables(&self) -> &WebhookTables {
        &self.tables
    }
}

/// A page of attempts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AttemptPage {
    /// Newest first.
    pub attempts: Vec<Attempt>,
    /// The cursor for the next page; `None` at the end.
    pub next: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::Db;

    async fn open() -> (tempfile::TempDir, Arc<AttemptLog>) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let db = Db::open(&directory.path().join("test.db")).expect("opens");
        let tables = WebhookTables::open(db).await.expect("opens");
        (directory, AttemptLog::new(tables, Duration::from_secs(86_400)))
    }

    fn answered(status: u16) -> Result<Answer, Failure> {
        Ok(Answer { status, retry_after: None, body: b"caf\xc3\xa9 \xff".to_vec() })
    }

    fn note(log: &AttemptLog, client: &ClientId, message_id: &str, result: &Result<Answer, Failure>) {
        let now = Timestamp::now();
        log.note(client, Attempt::new(log.next_id(now), message_id, now, Duration::from_millis(12), result));
    }

    #[actix_rt::test]
    async fn a_page_has_what_was_noted_just_now_and_a_cursor_that_goes_on() {
        let (_directory, log) = open().await;
        let client = ClientId::parse("a").expect("test id");
        for n in 0..5 {
            note(&log, &client, &format!("m{n}"), &answered(if n == 2 { 500 } else { 200 }));
        }
        let first = log.page(&client, None, 3).await.expect("reads");
        let shown: Vec<_> = first.attempts.iter().map(|a| (&*a.message_id, a.status)).collect();
        assert_eq!(shown, [("m4", Some(200)), ("m3", Some(200)), ("m2", Some(500))]);
        assert_eq!(&*first.attempts[0].response, "café \u{fffd}");
        let after = first.next.as_deref().and_then(AttemptId::parse);
        let second = log.page(&client, after, 3).await.expect("reads");
        assert_eq!(second.attempts.len(), 2);
        assert_eq!(second.next, None);
    }

    #[actix_rt::test]
    async fn what_waits_is_bounded_by_client_and_in_all() {
        let (_directory, log) = open().await;
        let busy = ClientId::parse("busy").expect("test id");
        for _ in 0..3 * RING_ROWS {
            note(&log, &busy, "m", &answered(200));
        }
        assert_eq!(log.waiting.lock().rows, usize::from(RING_ROWS));
        for n in 0..2 * WAITING_MAX {
            let client = ClientId::parse(&format!("c{}", n % 1000)).expect("test id");
            note(&log, &client, "m", &answered(200));
        }
        assert_eq!(log.waiting.lock().rows, WAITING_MAX);
        assert!(log.waiting.lock().left_out > 0);
        log.flush().await.expect("writes");
        assert_eq!(log.page(&busy, None, 5000).await.expect("reads").attempts.len(), usize::from(RING_ROWS));
        log.forget(&busy).await.expect("forgets");
        assert!(log.page(&busy, None, 1).await.expect("reads").attempts.is_empty());
    }

    #[test]
    fn ids_grow_whatever_the_clock_does_and_are_read_back() {
        let runtime = actix_rt::Runtime::new().expect("a runtime");
        let (_directory, log) = runtime.block_on(open());
        let now = Timestamp::now();
        let ids: Vec<AttemptId> = [0, 0, 5, -1000, 1].map(|later| log.next_id(now.plus_millis(later))).to_vec();
        assert!(ids.is_sorted_by(|a, b| a < b), "{ids:?}");
        assert_eq!(AttemptId::parse(&ids[0].to_string()), Some(ids[0]));
        for bad in ["", "x", "+000000000000001", "00"] {
            assert_eq!(AttemptId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn failures_are_said_in_words() {
        let words = |status, retry_after: Option<&str>| {
            words_for(&Answer { status, retry_after: retry_after.map(Into::into), body: vec![] })
        };
        assert_eq!(words(204, None), None);
        assert!(words(302, None).is_some_and(|w| w.contains("redirects are not followed")));
        assert!(words(429, Some("30")).is_some_and(|w| w.contains("Retry-After: 30")));
        assert!(words(500, None).is_some_and(|w| w.contains("500")));
    }
}
