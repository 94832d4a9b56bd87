//! Rate limits: `send_per_s` of a client, and wrong credentials by address.

use std::num::NonZeroU32;
use std::time::Duration;

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota};
use parking_lot::Mutex;
use std::time::Instant;

/// A client's `send_per_s`: so many messages at once, and then as many a second. A batch beyond that is taken whole when
/// the rate has recovered altogether; then it must recover from all of it (contract, section 10).
#[derive(Debug)]
pub struct SendLimiter {
    per_s: NonZeroU32,
    /// Until when the last batches use up the rate. A virtual-scheduling leaky bucket (GCRA) with a burst of one
    /// second.
    busy_until: Mutex<Instant>,
}

impl SendLimiter {
    /// A limiter of `per_s` messages a second.
    pub fn new(per_s: NonZeroU32) -> Self {
        Self { per_s, busy_until: Mutex::new(Instant::now()) }
    }

    /// The rate that it enforces, in messages a second.
    pub fn per_s(&self) -> u32 {
        self.per_s.get()
    }

    /// Takes `messages` at once.
    ///
    /// # Errors
    /// How long to wait, when the rate has not recovered from what was taken before.
    pub fn take(&self, messages: usize) -> Result<(), Duration> {
        let now = Instant::now();
        let mut busy_until = self.busy_until.lock();
        let burst = Duration::from_secs(1);
        // Rounded down, so that single messages never cost more than a batch of them.
        let cost = Duration::from_nanos((messages as u64).saturating_mul(1_000_000_000) / u64::from(self.per_s.get()));
        let free = (*busy_until).max(now);
        let wait = (free + cost.min(burst)).saturating_duration_since(now + burst);
        if !wait.is_zero() {
            return Err(wait);
        }
        *busy_until = free + cost;
        Ok(())
    }
}

/// Slows down whoever guesses: wrong credentials from one address. Right ones are never refused, so that an attacker
/// cannot lock a client out.
pub struct GuessLimiter {
    per_address: dashmap::DashMap<std::net::IpAddr, DefaultDirectRateLimiter>,
}

/// Wrong credentials a minute from one address before it is told to wait.
const GUESSES_PER_MINUTE: NonZeroU32 = NonZeroU32::new(60).expect("not zero");

/// Addresses remembered at most; past it all are forgotten, which only gives guessers a fresh minute.
const ADDRESSES_MAX: usize = 10_000;

impl Default for GuessLimiter {
    fn default() -> Self {
        Self { per_address: dashmap::DashMap::new() }
    }
}

impl GuessLimiter {
    /// Notes a wrong guess from `address`.
    ///
    /// # Errors
    /// How long to wait before the next, when there were too many.
    pub fn note_wrong(&self, address: std::net::IpAddr) -> Result<(), Duration> {
        if self.per_address.len() >= ADDRESSES_MAX {
            self.per_address.clear();
        }
        let limiter = self
            .per_address
            .entry(address)
            .or_insert_with(|| DefaultDirectRateLimiter::direct(Quota::per_minute(GUESSES_PER_MINUTE)));
        limiter.check().map_err(|not_until| not_until.wait_time_from(DefaultClock::default().now()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_taken_whole_and_then_the_rate_recovers() {
        let limiter = SendLimiter::new(NonZeroU32::new(10).expect("not zero"));
        assert_eq!(limiter.take(100), Ok(()));
        let wait = limiter.take(1).expect_err("the batch used up ten seconds");
        assert!(wait > Duration::from_secs(8) && wait <= Duration::from_secs(10), "{wait:?}");
    }

    #[test]
    fn what_is_within_the_rate_is_taken_and_no_more() {
        for per_s in [1, 3, 7, 100, 1_000_000] {
            let limiter = || SendLimiter::new(NonZeroU32::new(per_s).expect("not zero"));
            let singles = limiter();
            let taken = (0..per_s).filter(|_| singles.take(1).is_ok()).count();
            assert_eq!(taken, per_s as usize);
            let batches = limiter();
            assert_eq!(batches.take(per_s as usize), Ok(()));
            let wait = batches.take(per_s as usize).expect_err("the first used up the second");
            assert!(wait > Duration::from_millis(500) && wait <= Duration::from_secs(1), "{wait:?}");
        }
        let slow = SendLimiter::new(NonZeroU32::new(5).expect("not zero"));
        assert_eq!((0..10).filter(|_| slow.take(1).is_ok()).count(), 5);
        assert_eq!(SendLimiter::new(NonZeroU32::new(5).expect("not zero")).take(6), Ok(()));
    }

    #[test]
    fn guessers_are_slowed_by_address() {
        let limiter = GuessLimiter::default();
        let (a, b) = ([127, 0, 0, 1].into(), [127, 0, 0, 2].into());
        let refused = (0..200).filter(|_| limiter.note_wrong(a).is_err()).count();
        assert!(refused >= 100, "{refused}");
        assert_eq!(limiter.note_wrong(b), Ok(()));
    }
}
