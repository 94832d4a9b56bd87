//! `rate_limit_per_s`: spaces attempts evenly. Time is handed in.

use std::time::{Duration, Instant};

/// Attempts may lag this much behind their even spacing and catch up: timers are no finer than a millisecond.
const SLACK: Duration = Duration::from_millis(5);

/// Spaces attempts so that no more than a rate of them are made in a second (and as many more as fall in 5 ms).
#[derive(Debug)]
pub struct Pacer {
    interval: Duration,
    /// When the next attempt is due by even spacing.
    next: Option<Instant>,
}

impl Pacer {
    /// A pacer of `per_s` attempts a second; `None` is no limit.
    pub fn new(per_s: Option<u32>) -> Self {
        Self { interval: per_s.map_or(Duration::ZERO, |per_s| Duration::from_secs(1) / per_s.max(1)), next: None }
    }

    /// Until when the next attempt must wait, if it must.
    pub fn blocked_until(&self, now: Instant) -> Option<Instant> {
        self.next.filter(|next| *next > now)
    }

    /// Counts an attempt that is made now.
    pub fn count(&mut self, now: Instant) {
        if !self.interval.is_zero() {
            let earliest = now.checked_sub(SLACK).unwrap_or(now);
            self.next = Some(self.next.map_or(now, |next| next.max(earliest)) + self.interval);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Attempts in the first second when asked every `step`.
    fn attempts_in_a_second(per_s: Option<u32>, step: Duration) -> usize {
        let (start, mut pacer, mut made) = (Instant::now(), Pacer::new(per_s), 0);
        let mut now = start;
        while now < start + Duration::from_secs(1) {
            while made < 1_000_000 && pacer.blocked_until(now).is_none() {
                pacer.count(now);
                made += 1;
            }
            now += step;
        }
        made
    }

    #[test]
    fn attempts_are_spaced_and_lateness_does_not_slow_them() {
        let millisecond = Duration::from_millis(1);
        assert_eq!(attempts_in_a_second(Some(1), millisecond), 1);
        assert_eq!(attempts_in_a_second(Some(10), millisecond), 10);
        for per_s in [150, 1000, 20_000] {
            let made = attempts_in_a_second(Some(per_s), millisecond * 2);
            let most = per_s as usize + per_s as usize / 200 + 1;
            assert!(made <= most && made >= per_s as usize * 9 / 10, "{per_s}: {made}");
        }
        assert_eq!(attempts_in_a_second(None, millisecond * 999), 1_000_000);
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let (now, mut pacer) = (Instant::now(), Pacer::new(Some(10)));
        pacer.count(now);
        let later = now + Duration::from_secs(60);
        assert_eq!(pacer.blocked_until(later), None);
        pacer.count(later);
        assert_eq!(pacer.blocked_until(later), Some(later + Duration::from_millis(100) - SLACK));
    }
}
