//! Which retry queue a delay goes through. Pure.
//!
//! A retry queue delays by its TTL, so there is one for each delay. Delays come in any length (jitter sees to that), so
//! they are rounded up to two significant digits of seconds: a message waits at most a tenth longer than asked, never
//! less, and there are at most [`QUEUES_MAX`] such queues.

use std::time::Duration;

/// Longest delay, in seconds: 30 days.
const SECONDS_MAX: u64 = 30 * 86_400;

/// Retry queues that there can be: 1 to 99 each, then 90 for each power of ten.
#[cfg(test)]
const QUEUES_MAX: usize = 99 + 90 + 90 + 90 + 90 + 17;

/// The whole seconds for which a retry queue holds a message that asked for `delay`. At least 1.
pub(super) fn seconds_for(delay: Duration) -> u64 {
    let whole = delay.as_secs() + u64::from(delay.subsec_nanos() > 0);
    let seconds = whole.clamp(1, SECONDS_MAX);
    let mut unit = 1;
    while seconds.div_ceil(unit) > 99 {
        unit *= 10;
    }
    seconds.div_ceil(unit) * unit
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_delay_is_never_cut_and_at_most_a_tenth_longer() {
        let mut queues = BTreeSet::new();
        for seconds in 1..=SECONDS_MAX {
            let chosen = seconds_for(Duration::from_secs(seconds));
            assert!(chosen >= seconds && chosen * 10 <= seconds * 11, "{seconds} s became {chosen} s");
            queues.insert(chosen);
        }
        assert!(queues.len() <= QUEUES_MAX, "{} queues", queues.len());
    }

    #[test]
    fn the_usual_delays_have_their_own_queue() {
        for seconds in [1, 5, 60, 99, 300, 1800, 7200, 18_000, 36_000, 86_000] {
            assert_eq!(seconds_for(Duration::from_secs(seconds)), seconds);
        }
        assert_eq!(seconds_for(Duration::ZERO), 1);
        assert_eq!(seconds_for(Duration::from_millis(1001)), 2);
        assert_eq!(seconds_for(Duration::from_secs(u64::MAX)), 2_600_000);
    }
}
