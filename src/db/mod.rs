//! The one SQLite file under `DATA_DIR`: a writer thread with group commit, and a few reader threads.
//!
//! Everything durable goes through here: the embedded broker's queues, the registry's clients, and what else must
//! survive a restart. Jobs that wait while a commit is under way share the next one, so that the cost of an fsync is
//! split among them. SQLite runs in WAL mode with `synchronous=FULL`: a job that was told `Ok` survives a power cut
//! (<https://www.sqlite.org/pragma.html#pragma_synchronous>).
//!
//! # Invariants
//! - One connection writes, on one thread, so jobs take effect in the order in which they were submitted.
//! - A job that fails alone fails alone: the transaction is rolled back and its other jobs are run again.
//! - A job may be run more than once before it is done, but takes effect at most once.

mod room;
pub mod webhooks;

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use rusqlite::Connection;
use tokio::sync::oneshot;

use room::Room;

/// Jobs that one transaction takes at most: bounds how long a commit can get.
const JOBS_PER_COMMIT_MAX: usize = 1024;

/// Jobs that may wait for the writer; a submitter beyond that blocks until there is room again.
const JOBS_QUEUED_MAX: usize = 16_384;

/// Reads that may wait for a reader: more than there are queues that can want a page at once on one machine.
const READS_QUEUED_MAX: usize = 65_536;

/// Reader threads. Reads are short (a page of a queue), so two keep a slow one from delaying the rest.
const READER_THREADS: usize = 2;

/// Bytes in a database page. Larger than SQLite's 4,096: messages of 1 KiB then mostly stay off overflow pages.
const PAGE_BYTES: u32 = 8192;

/// The WAL is folded into the file when it has this part of the reserve, so that there is room for both; at most
/// 32 MiB. Rarer checkpoints write a hot page once instead of often.
const CHECKPOINT_PART_OF_RESERVE: u64 = 4;

/// `PRAGMA auto_vacuum`: free pages are given back when asked.
const AUTO_VACUUM_INCREMENTAL: u32 = 2;

/// Memory for the page cache of one connection, in KiB.
const CACHE_KIB: i32 = 8192;

/// Free pages given back to the file system in one step; a step of 1,000 took up to 336 ms, so it is small.
const VACUUM_PAGES_PER_STEP: u32 = 64;

/// Pause between two such steps when there is nothing else to do, in milliseconds; and under load, in commits.
const VACUUM_EVERY_MS: u64 = 5;
const VACUUM_EVERY_COMMITS: u32 = 64;

/// Free pages are kept for reuse rather than given back up to this part of the reserve: at most 16 MiB, and less on a
/// small disk, because the file system counts them as taken.
const KEPT_PART_OF_RESERVE: u64 = 8;

/// What kind of failure a [`DbError`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DbErrorKind {
    /// No room on the disk. Nothing was written.
    Full,
    /// The database was closed.
    Closed,
    /// Another process holds the file.
    Locked,
    /// Anything else: an I/O error, a broken file, a bug.
    Internal,
}

/// A failed read or write: kind and SQLite's own words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct DbError {
    /// What kind of failure it is.
    pub kind: DbErrorKind,
    /// SQLite's message, or what was being done.
    pub detail: String,
}

impl DbError {
    fn closed() -> Self {
        Self { kind: DbErrorKind::Closed, detail: "the database is closed".into() }
    }
}

impl From<rusqlite::Error> for DbError {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode;
        let kind = match error.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => DbErrorKind::Full,
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => DbErrorKind::Locked,
            _ => DbErrorKind::Internal,
        };
        Self { kind, detail: error.to_string() }
    }
}

/// One unit of work for the writer.
pub trait WriteJob: Send {
    /// Writes, inside a transaction. May be called again after the transaction was rolled back.
    fn run(&mut self, connection: &Connection) -> rusqlite::Result<()>;

    /// Called once, after the commit (`Ok`: it is durable) or after it failed for good.
    fn done(self: Box<Self>, result: Result<(), DbError>);
}

/// Who has something to write whenever a transaction begins: the embedded broker's commit window.
pub trait StandingJob: Send + Sync {
    /// What there is to write now. Called when the jobs of a transaction are known, and run before them; so what a
    /// job's submitter did before it submitted is written before the job runs, unless it is put off after a failure.
    fn begin(&self) -> Turn;
}

/// What the standing job has for a transaction.
pub enum Turn {
    /// Nothing: it is asked again after the next [`Db::nudge`] or job.
    Nothing,
    /// This is to be written.
    Write(Box<dyn WriteJob>),
    /// Nothing before this moment, after which it is asked again whether or not anyone nudges.
    NotBefore(Instant),
}

/// What reaches the writer.
enum ToWriter {
    Job(Box<dyn WriteJob>),
    /// The standing job has something to write.
    Nudge,
}

type ReadJob = Box<dyn FnOnce(&Connection) + Send>;

/// The open file. Cheap to clone.
#[derive(Clone)]
pub struct Db {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    writer: RwLock<Option<mpsc::SyncSender<ToWriter>>>,
    standing: Arc<OnceLock<Arc<dyn StandingJob>>>,
    readers: RwLock<Option<mpsc::SyncSender<ReadJob>>>,
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
    room: Room,
    // Held for as long as the file is open, so that a second router on the same directory stops at its start.
    lock: Mutex<Option<std::fs::File>>,
}

impl Db {
    /// Opens, or creates, the file at `path`. Does not read what is in it.
    ///
    /// # Errors
    /// [`DbErrorKind::Locked`] when another process has it open; else what SQLite or the file system says.
    pub fn open(path: &Path) -> Result<Self, DbError> {
        let io = |error: std::io::Error| DbError {
            kind: if error.kind() == std::io::ErrorKind::StorageFull {
                DbErrorKind::Full
            } else {
                DbErrorKind::Internal
            },
            detail: format!("open {}: {error}", path.display()),
        };
        let lock = std::fs::File::create(path.with_extension("lock")).map_err(io)?;
        lock.try_lock().map_err(|_| DbError {
            kind: DbErrorKind::Locked,
            detail: format!("{} is in use by another process", path.display()),
        })?;
        let connection = open_connection(path)?;
        let standing = Arc::new(OnceLock::<Arc<dyn StandingJob>>::new());
        let (writer, jobs) = mpsc::sync_channel(JOBS_QUEUED_MAX);
        let (readers, reads) = mpsc::sync_channel::<ReadJob>(READS_QUEUED_MAX);
        let db = Self {
            inner: Arc::new(Inner {
                path: path.to_owned(),
                writer: RwLock::new(Some(writer)),
                standing: Arc::clone(&standing),
                readers: RwLock::new(Some(readers)),
                threads: Mutex::new(Vec::new()),
                room: Room::new(path),
                lock: Mutex::new(Some(lock)),
            }),
        };
        let mut threads = db.inner.threads.lock();
        let reads = Arc::new(Mutex::new(reads));
        for n in 0..READER_THREADS {
            let connection = open_connection(path)?;
            connection.pragma_update(None, "query_only", true)?;
            let reads = Arc::clone(&reads);
            threads.push(spawn(&format!("db-read-{n}"), move || read_loop(&connection, &reads))?);
        }
        let space = Space::new(path);
        threads.push(spawn("db-write", move || write_loop(&connection, space, &jobs, &standing))?);
        drop(threads);
        Ok(db)
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Whether the disk has room for more messages. False a while before the disk is really full, so that what
    /// frees room (settling, deleting) can still be written.
    pub fn has_room(&self) -> bool {
        self.inner.room.is_there()
    }

    /// Hands a job to the writer. Blocks while [`JOBS_QUEUED_MAX`] jobs wait.
    pub fn submit(&self, job: Box<dyn WriteJob>) {
        let sender = self.inner.writer.read().clone();
        match sender {
            Some(sender) => {
                if let Err(mpsc::SendError(ToWriter::Job(job))) = sender.send(ToWriter::Job(job)) {
                    job.done(Err(DbError::closed()));
                }
            }
            None => job.done(Err(DbError::closed())),
        }
    }

    /// Names the standing job; once, by the embedded broker.
    pub fn set_standing_job(&self, job: Arc<dyn StandingJob>) {
        if self.inner.standing.set(job).is_err() {
            log::error!("the database has a standing job already; the second is ignored");
        }
    }

    /// Wakes the writer because the standing job has something to write. Never blocks: a writer with a full queue
    /// is awake, and asks the standing job before it sleeps.
    pub fn nudge(&self) {
        if let Some(sender) = self.inner.writer.read().as_ref() {
            let _ = sender.try_send(ToWriter::Nudge);
        }
    }

    /// Hands a job to a reader thread, without waiting for it; blocks while [`READS_QUEUED_MAX`] wait. Returns false
    /// when the database is closed.
    pub fn submit_read(&self, job: impl FnOnce(&Connection) + Send + 'static) -> bool {
        let sender = self.inner.readers.read().clone();
        sender.is_some_and(|readers| readers.send(Box::new(job)).is_ok())
    }

    /// Runs `work` in a transaction; resolves when it is durable. Carried out even when the future is dropped.
    /// `work` may run more than once, and takes effect at most once.
    ///
    /// # Errors
    /// What SQLite says; nothing was written then.
    pub async fn write<R, F>(&self, work: F) -> Result<R, DbError>
    where
        R: Send + 'static,
        F: FnMut(&Connection) -> rusqlite::Result<R> + Send + 'static,
    {
        self.write_then(work, |value| value).await
    }

    /// Like [`Db::write`], and calls `then` on the writer thread right after the commit, before the next transaction
    /// begins: for memory that must follow the file whether or not anyone still waits.
    ///
    /// # Errors
    /// What SQLite says; nothing was written then, and `then` is not called.
    pub async fn write_then<R, F, T>(&self, work: F, then: impl FnOnce(R) -> T + Send + 'static) -> Result<T, DbError>
    where
        R: Send + 'static,
        T: Send + 'static,
        F: FnMut(&Connection) -> rusqlite::Result<R> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        self.submit(Box::new(Closure { work, value: None, then, sender }));
        receiver.await.unwrap_or_else(|_| Err(DbError::closed()))
    }

    /// Runs `work` on a reader thread, on what is committed now.
    ///
    /// # Errors
    /// What SQLite says.
    pub async fn read<R, F>(&self, work: F) -> Result<R, DbError>
    where
        R: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<R> + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let sent = self.submit_read(move |connection| {
            // The asker may have gone; then nobody needs the answer.
            let _ = sender.send(work(connection).map_err(DbError::from));
        });
        if !sent {
            return Err(DbError::closed());
        }
        receiver.await.unwrap_or_else(|_| Err(DbError::closed()))
    }

    /// Runs what was submitted, closes the file and joins the threads. Later calls fail with
    /// [`DbErrorKind::Closed`]. Blocks.
    pub fn close(&self) {
        self.inner.writer.write().take();
        self.inner.readers.write().take();
        let threads = std::mem::take(&mut *self.inner.threads.lock());
        for thread in threads {
            if thread.join().is_err() {
                log::error!("a database thread panicked");
            }
        }
        self.inner.lock.lock().take();
    }
}

impl std::fmt::Debug for Db {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Db").field("path", &self.inner.path).finish_non_exhaustive()
    }
}

struct Closure<R, F, N, T> {
    work: F,
    value: Option<R>,
    then: N,
    sender: oneshot::Sender<Result<T, DbError>>,
}

impl<R, F, N, T> WriteJob for Closure<R, F, N, T>
where
    R: Send,
    T: Send,
    F: FnMut(&Connection) -> rusqlite::Result<R> + Send,
    N: FnOnce(R) -> T + Send,
{
    fn run(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        self.value = Some((self.work)(connection)?);
        Ok(())
    }

    fn done(self: Box<Self>, result: Result<(), DbError>) {
        let Self { value, then, sender, .. } = *self;
        let answer = result.and_then(|()| value.ok_or_else(DbError::closed)).map(then);
        // The asker may have gone; the work is done all the same.
        let _ = sender.send(answer);
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<std::thread::JoinHandle<()>, DbError> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(|error| DbError { kind: DbErrorKind::Internal, detail: format!("start thread {name}: {error}") })
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn open_connection(path: &Path) -> Result<Connection, DbError> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    // Page size and auto_vacuum must be set before the first table is made.
    connection.pragma_update(None, "page_size", PAGE_BYTES)?;
    // Only where it is not set: setting it writes to the file, which an old one on a full disk could not take.
    if connection.query_row("PRAGMA auto_vacuum", [], |row| row.get::<_, u32>(0))? != AUTO_VACUUM_INCREMENTAL {
        connection.pragma_update(None, "auto_vacuum", AUTO_VACUUM_INCREMENTAL)?;
    }
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    let wal_bytes = room::reserve_bytes(directory_of(path)) / CHECKPOINT_PART_OF_RESERVE;
    connection.pragma_update(None, "wal_autocheckpoint", wal_bytes / u64::from(PAGE_BYTES))?;
    connection.pragma_update(None, "journal_size_limit", wal_bytes)?;
    connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

fn read_loop(connection: &Connection, jobs: &Mutex<mpsc::Receiver<ReadJob>>) {
    loop {
        // The lock is held while waiting: the other readers wait for the lock instead, which comes to the same.
        let job = jobs.lock().recv();
        match job {
            Ok(job) => job(connection),
            Err(mpsc::RecvError) => return,
        }
    }
}

fn write_loop(
    connection: &Connection,
    mut space: Space,
    jobs: &mpsc::Receiver<ToWriter>,
    standing: &OnceLock<Arc<dyn StandingJob>>,
) {
    let mut batch: Vec<Box<dyn WriteJob>> = Vec::new();
    let mut open = true;
    loop {
        while batch.len() < JOBS_PER_COMMIT_MAX {
            match jobs.try_recv() {
                Ok(ToWriter::Job(job)) => batch.push(job),
                Ok(ToWriter::Nudge) => {}
                Err(mpsc::TryRecvError::Empty) => break,
                Err(mpsc::TryRecvError::Disconnected) => {
                    open = false;
                    break;
                }
            }
        }
        let mut again = None;
        match standing.get().map_or(Turn::Nothing, |standing| standing.begin()) {
            Turn::Nothing => {}
            Turn::Write(job) => batch.insert(0, job),
            Turn::NotBefore(at) => again = Some(at),
        }
        if !batch.is_empty() {
            commit(connection, &mut batch);
            space.after_commit(connection);
        } else if !open {
            break;
        } else {
            let until_again = again.map_or(Duration::MAX, |at| at.saturating_duration_since(Instant::now()));
            match jobs.recv_timeout(until_again.min(space.patience())) {
                Ok(ToWriter::Job(job)) => batch.push(job),
                Ok(ToWriter::Nudge) | Err(mpsc::RecvTimeoutError::Disconnected) => {}
                // On a full disk too: that may be what makes room for the next try.
                Err(mpsc::RecvTimeoutError::Timeout) if space.surplus => space.give_back(connection),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
        }
    }
    // Folds the WAL into the file, so that what is left is one file.
    if let Err(error) = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())) {
        log::warn!("cannot checkpoint at closing: {error}");
    }
}

fn commit(connection: &Connection, batch: &mut Vec<Box<dyn WriteJob>>) {
    match transact(connection, batch) {
        Ok(()) => batch.drain(..).for_each(|job| job.done(Ok(()))),
        Err(error) if batch.len() == 1 => batch.drain(..).for_each(|job| job.done(Err(error.clone()))),
        // One of several failed: each on its own, so that only the guilty one fails.
        Err(_) => {
            for mut job in batch.drain(..) {
                let result = transact(connection, std::slice::from_mut(&mut job));
                job.done(result);
            }
        }
    }
}

fn transact(connection: &Connection, jobs: &mut [Box<dyn WriteJob>]) -> Result<(), DbError> {
    let run = || -> rusqlite::Result<()> {
        connection.prepare_cached("BEGIN IMMEDIATE")?.execute([])?;
        for job in jobs {
            job.run(connection)?;
        }
        connection.prepare_cached("COMMIT")?.execute([])?;
        Ok(())
    };
    let result = run();
    if result.is_err() && !connection.is_autocommit() {
        // Some errors have rolled back already; then there is nothing to do.
        if let Err(error) = connection.execute_batch("ROLLBACK") {
            log::error!("cannot roll back: {error}");
        }
    }
    let result = result.map_err(DbError::from);
    if result.as_ref().is_err_and(|error| error.kind == DbErrorKind::Full) {
        // What was written for the transaction lies in the WAL, and no longer counts: give it back.
        if let Err(error) = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())) {
            log::debug!("cannot shorten the WAL on a full disk: {error}");
        }
    }
    result
}

/// Gives free pages back to the file system: when there is nothing else to do, and now and then under load.
struct Space {
    /// Free pages that are kept.
    kept: u64,
    commits: u32,
    /// Whether there may be more free pages than are kept.
    surplus: bool,
    /// Pages were given back of which the file system knows only after a checkpoint.
    is_pending: bool,
}

impl Space {
    fn new(path: &Path) -> Self {
        let kept = room::reserve_bytes(directory_of(path)) / KEPT_PART_OF_RESERVE / u64::from(PAGE_BYTES);
        Self { kept, commits: 0, surplus: false, is_pending: false }
    }

    /// How long the writer may sleep before it looks at the free pages again.
    fn patience(&self) -> Duration {
        if self.surplus { Duration::from_millis(VACUUM_EVERY_MS) } else { Duration::from_secs(3600) }
    }

    fn after_commit(&mut self, connection: &Connection) {
        self.surplus = true;
        self.commits += 1;
        if self.commits.is_multiple_of(VACUUM_EVERY_COMMITS) {
            self.give_back(connection);
        }
    }

    fn give_back(&mut self, connection: &Connection) {
        let mut step = || -> rusqlite::Result<bool> {
            let free: u64 = connection.prepare_cached("PRAGMA freelist_count")?.query_row([], |row| row.get(0))?;
            if free <= self.kept {
                // Nothing may be written any more that would bring one about: on a full disk that is refused.
                self.is_pending = self.is_pending && !checkpoint(connection)?;
                return Ok(self.is_pending);
            }
            self.is_pending = true;
            let mut statement = connection.prepare(&format!("PRAGMA incremental_vacuum({VACUUM_PAGES_PER_STEP})"))?;
            let mut rows = statement.query([])?;
            while rows.next()?.is_some() {}
            Ok(true)
        };
        self.surplus = step().unwrap_or_else(|error| {
            log::warn!("cannot give free space back to the file system: {error}");
            false
        });
    }
}

/// Folds the WAL into the file as far as nobody reads from it. Returns whether that was all of it; the file has its true
/// length then.
fn checkpoint(connection: &Connection) -> rusqlite::Result<bool> {
    let counts = |row: &rusqlite::Row<'_>| Ok((row.get::<_, i64>(1)?, row.get::<_, i64>(2)?));
    let (frames, folded) = connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], counts)?;
    Ok(frames == folded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> (tempfile::TempDir, Db) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let db = Db::open(&directory.path().join("test.db")).expect("opens");
        (directory, db)
    }

    #[actix_rt::test]
    async fn a_job_that_fails_fails_alone() {
        let (_directory, db) = open();
        db.write(|c| c.execute_batch("CREATE TABLE t (x INTEGER PRIMARY KEY)")).await.expect("creates");
        let writes = (0..100).map(|n| {
            let db = db.clone();
            async move { db.write(move |c| c.execute("INSERT INTO t VALUES (?1)", [n / 2])).await }
        });
        let results = futures_util::future::join_all(writes).await;
        assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 50);
        let rows: i64 = db.read(|c| c.query_row("SELECT count(*) FROM t", [], |r| r.get(0))).await.expect("reads");
        assert_eq!(rows, 50);
    }

    #[actix_rt::test]
    async fn freed_space_goes_back_to_the_file_system_when_idle() {
        let (directory, db) = open();
        let fill =
            "CREATE TABLE t (x BLOB); WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 40000)
            INSERT INTO t SELECT zeroblob(1000) FROM n;";
        db.write(move |c| c.execute_batch(fill)).await.expect("fills");
        db.write(|c| c.execute_batch("DELETE FROM t")).await.expect("empties");
        let bytes = |path: &Path| std::fs::metadata(path).map(|meta| meta.len()).expect("the file is there");
        let kept = Space::new(&directory.path().join("test.db")).kept;
        let deadline = Instant::now() + Duration::from_secs(30);
        // Without another write, and without closing it.
        let kept = (kept + 100) * u64::from(PAGE_BYTES);
        while bytes(&directory.path().join("test.db")) > kept {
            assert!(Instant::now() < deadline, "the file is not given back");
            tokio::task::yield_now().await;
        }
    }

    /// Puts its work off, as after a failed commit; then has it done.
    struct PutOff {
        until: Instant,
        done: Mutex<Option<oneshot::Sender<Instant>>>,
    }

    struct Told(oneshot::Sender<Instant>);

    impl StandingJob for PutOff {
        fn begin(&self) -> Turn {
            if Instant::now() < self.until {
                return Turn::NotBefore(self.until);
            }
            self.done.lock().take().map_or(Turn::Nothing, |done| Turn::Write(Box::new(Told(done))))
        }
    }

    impl WriteJob for Told {
        fn run(&mut self, _: &Connection) -> rusqlite::Result<()> {
            Ok(())
        }

        fn done(self: Box<Self>, result: Result<(), DbError>) {
            result.expect("commits");
            let _ = self.0.send(Instant::now());
        }
    }

    #[actix_rt::test]
    async fn what_the_standing_job_puts_off_is_done_without_a_nudge() {
        let (_directory, db) = open();
        let (sender, done) = oneshot::channel();
        let until = Instant::now() + Duration::from_millis(50);
        db.set_standing_job(Arc::new(PutOff { until, done: Mutex::new(Some(sender)) }));
        // Somebody has just been there, so that the writer sleeps on what it was told.
        db.nudge();
        let done = tokio::time::timeout(Duration::from_secs(20), done).await.expect("is asked again").expect("is told");
        assert!(done >= until);
        db.close();
    }

    #[actix_rt::test]
    async fn a_second_opener_is_refused_and_closing_lets_go() {
        let (directory, db) = open();
        let path = directory.path().join("test.db");
        assert_eq!(Db::open(&path).expect_err("locked").kind, DbErrorKind::Locked);
        db.close();
        assert_eq!(db.write(|_| Ok(())).await.expect_err("closed").kind, DbErrorKind::Closed);
        drop(db);
        Db::open(&path).expect("opens again").close();
    }
}
