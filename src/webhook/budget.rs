//! How many connections webhooks may hold open together, so that file descriptors are bounded.
//!
//! The last of them are kept for endpoints that hold few: an endpoint that hangs on all its attempts cannot take the
//! connection away from one that needs its first.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bounds of the default: connections for webhooks.
const MAX_BOUNDS: (usize, usize) = (64, 16_384);
/// An endpoint with fewer connections than this is taken care of until three quarters are in use.
const FEW: usize = 8;

/// A shared allowance of connections.
#[derive(Debug)]
pub struct Budget {
    max: usize,
    open: AtomicUsize,
}

/// One connection's share; given back when dropped.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
}

impl Budget {
    /// At most `max` connections.
    pub fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { max, open: AtomicUsize::new(0) })
    }

    /// Half of the file descriptors that the process may open.
    pub fn from_process_limit() -> Arc<Self> {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let files = limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
        Self::new((files / 2).clamp(MAX_BOUNDS.0, MAX_BOUNDS.1))
    }

    /// A share for an endpoint that holds `held` already; `None` when it must wait. Up to half of the budget is for
    /// everyone, up to three quarters for those that hold few, the rest for those that hold none.
    pub fn take(self: &Arc<Self>, held: usize) -> Option<Share> {
        let limit = match held {
            0 => self.max,
            1..FEW => self.max / 4 * 3,
            _ => self.max / 2,
        };
        self.open
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |open| (open < limit).then_some(open + 1))
            .ok()
            .map(|_| Share { budget: Arc::clone(self) })
    }

    /// Whether connections should be closed rather than kept for later.
    pub fn is_scarce(&self) -> bool {
        self.open() >= self.max / 2
    }

    /// Connections open now.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_endpoints_leave_connections_for_the_others() {
        let budget = Budget::new(100);
        let greedy: Vec<Share> = (0..1000).map_while(|held| budget.take(held)).collect();
        assert_eq!(greedy.len(), 50);
        let modest: Vec<Share> = (0..1000).filter_map(|_| budget.take(1)).collect();
        assert_eq!(modest.len(), 25);
        let first: Vec<Share> = (0..1000).filter_map(|_| budget.take(0)).collect();
        assert_eq!(first.len(), 25);
        assert!(budget.is_scarce());
        drop((greedy, modest, first));
        assert_eq!(budget.open(), 0);
        assert!(!budget.is_scarce());
    }
}
