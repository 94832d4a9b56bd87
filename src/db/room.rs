//! How much room the disk has: a reserve is kept, so that a full disk refuses senders before it stops receivers.
//!
//! What SQLite takes besides must fit into the reserve: a WAL, and the growth of the file when a checkpoint moves that
//! WAL into it. On a small disk both are kept small in proportion, and so are the free pages that are not given back,
//! which the file system counts as taken.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// How often the file system is asked, in milliseconds.
const CHECK_EVERY_MS: u64 = 50;

/// The reserve: a twentieth of the file system, within these bounds in bytes. It must hold a WAL that is being written
/// while the last accepted requests (16 MiB at the most, by default) are committed.
const RESERVE_MIN_BYTES: u64 = 8 << 20;
const RESERVE_MAX_BYTES: u64 = 128 << 20;

pub(super) struct Room {
    directory: PathBuf,
    since: Instant,
    checked_at_ms: AtomicU64,
    there: AtomicBool,
}

impl Room {
    pub(super) fn new(file: &Path) -> Self {
        let directory = directory_of(file).to_owned();
        let there = AtomicBool::new(has_reserve(&directory));
        Self { directory, since: Instant::now(), checked_at_ms: AtomicU64::new(0), there }
    }

    pub(super) fn is_there(&self) -> bool {
        let now_ms = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        let checked = self.checked_at_ms.load(Ordering::Relaxed);
        let due = now_ms.saturating_sub(checked) >= CHECK_EVERY_MS;
        if due && self.checked_at_ms.compare_exchange(checked, now_ms, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.there.store(has_reserve(&self.directory), Ordering::Relaxed);
        }
        self.there.load(Ordering::Relaxed)
    }
}

/// Bytes of the reserve on the file system that holds `file`.
pub(super) fn reserve(file: &Path) -> u64 {
    // A file system that cannot say how large it is will say when it is full.
    let total = rustix::fs::statvfs(directory_of(file)).map_or(u64::MAX, |stat| stat.f_blocks * stat.f_frsize);
    reserve_of(total)
}

fn reserve_of(total: u64) -> u64 {
    (total / 20).clamp(RESERVE_MIN_BYTES, RESERVE_MAX_BYTES)
}

fn directory_of(file: &Path) -> &Path {
    file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn has_reserve(directory: &Path) -> bool {
    match rustix::fs::statvfs(directory) {
        Ok(stat) => stat.f_bavail * stat.f_frsize > reserve_of(stat.f_blocks * stat.f_frsize),
        // A file system that cannot say how full it is will say so when it is written to.
        Err(_) => true,
    }
}
