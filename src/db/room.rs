//! How much room the disk has: a reserve is kept, so that a full disk refuses senders before it stops receivers.

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
        let directory = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned();
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

/// What is kept free on the file system of `directory`, in bytes; the most when it cannot say how large it is.
pub(super) fn reserve_bytes(directory: &Path) -> u64 {
    match rustix::fs::statvfs(directory) {
        Ok(stat) => reserve_of(stat.f_blocks * stat.f_frsize),
        Err(_) => RESERVE_MAX_BYTES,
    }
}

fn reserve_of(total: u64) -> u64 {
    (total / 20).clamp(RESERVE_MIN_BYTES, RESERVE_MAX_BYTES)
}

fn has_reserve(directory: &Path) -> bool {
    match rustix::fs::statvfs(directory) {
        Ok(stat) => stat.f_bavail * stat.f_frsize > reserve_of(stat.f_blocks * stat.f_frsize),
        // A file system that cannot say how full it is will say so when it is written to.
        Err(_) => true,
    }
}
