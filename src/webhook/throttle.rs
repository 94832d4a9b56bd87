//! An endpoint that asks to be left alone: 429 or 503 with `Retry-After`, again and again.
//!
//! One such answer delays its own message. Several in a row without a success in between are a statement about the
//! endpoint: everything then waits as long as it asked, spending no attempts, and goes on one at a time until one
//! succeeds. A storm of 429 thus costs an endpoint one call each time, not one for each message.

use std::time::{Duration, Instant};

use super::breaker::Gate;

/// Such answers in a row that make everything wait.
const STRIKES: u32 = 3;

/// See the module. Time is handed in.
#[derive(Debug, Default)]
pub struct Throttle {
    strikes: u32,
    until: Option<Instant>,
}

impl Throttle {
    /// The endpoint asked to wait.
    pub fn asked(&mut self, now: Instant, wait: Duration) {
        self.strikes = self.strikes.saturating_add(1);
        if self.strikes >= STRIKES {
            self.until = self.until.max(Some(now + wait));
        }
    }

    /// An attempt succeeded.
    pub fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// Whether everything waits, or goes one at a time.
    pub fn is_on(&self) -> bool {
        self.until.is_some()
    }

    /// Whether an attempt may be made, with so many under way.
    pub fn gate(&self, now: Instant, under_way: usize) -> Gate {
        match self.until {
            None => Gate::Open,
            Some(until) if now < until => Gate::Until(until),
            Some(_) if under_way > 0 => Gate::OneAtATime,
            Some(_) => Gate::Open,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn one_answer_holds_nobody_else_up() {
        let (mut throttle, now) = (Throttle::default(), Instant::now());
        for _ in 0..10 {
            throttle.asked(now, MINUTE);
            throttle.asked(now, MINUTE);
            assert_eq!(throttle.gate(now, 5), Gate::Open);
            throttle.succeeded();
        }
    }

    #[test]
    fn a_storm_makes_everything_wait_and_then_go_one_at_a_time() {
        let (mut throttle, now) = (Throttle::default(), Instant::now());
        (0..3).for_each(|_| throttle.asked(now, MINUTE));
        throttle.asked(now, MINUTE / 2);
        assert_eq!(throttle.gate(now, 0), Gate::Until(now + MINUTE));
        let later = now + MINUTE;
        assert_eq!(throttle.gate(later, 0), Gate::Open);
        assert_eq!(throttle.gate(later, 1), Gate::OneAtATime);
        throttle.asked(later, MINUTE);
        assert_eq!(throttle.gate(later, 0), Gate::Until(later + MINUTE));
        throttle.succeeded();
        assert_eq!(throttle.gate(later, 100), Gate::Open);
    }
}
