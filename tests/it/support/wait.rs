//! Waiting: for a condition, until a deadline.

use std::future::Future;
use std::time::{Duration, Instant};

/// How often a condition is looked at.
const POLL_EVERY: Duration = Duration::from_millis(10);

/// How long a test waits for what must happen. Generous: it is only ever used up by a failure, and the machine may be
/// busy with other tests.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// How long a test watches that something does *not* happen. It can miss a fault, never invent one.
pub(crate) const A_WHILE: Duration = Duration::from_millis(150);

/// The pace of something that is done again and again, as traffic is: a tick that comes late moves the next ones.
pub(crate) fn pace(period: Duration) -> actix_rt::time::Interval {
    let mut pace = actix_rt::time::interval(period);
    pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    pace
}

/// Looks again and again until `condition` gives something, and returns it.
///
/// # Panics
/// When it has not after `deadline`; `what` says what was waited for.
pub(crate) async fn eventually<T>(what: &str, deadline: Duration, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let until = Instant::now() + deadline;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(Instant::now() < until, "not within {deadline:?}: {what}");
        actix_rt::time::sleep(POLL_EVERY).await;
    }
}

/// Asserts that `future` is not ready for [`A_WHILE`], and drops it.
pub(crate) async fn stays_pending<F: Future>(what: &str, future: F)
where
    F::Output: std::fmt::Debug,
{
    if let Ok(value) = actix_rt::time::timeout(A_WHILE, future).await {
        panic!("{what}: {value:?}");
    }
}

/// Awaits `future`, at most [`SOON`].
///
/// # Panics
/// When it takes longer.
pub(crate) async fn soon<F: Future>(what: &str, future: F) -> F::Output {
    match actix_rt::time::timeout(SOON, future).await {
        Ok(value) => value,
        Err(_) => panic!("not within {SOON:?}: {what}"),
    }
}
