//! When a message is tried again: the schedule with jitter, and `Retry-After`.

use std::time::Duration;

use super::settings::RETRY_S_MAX;
use crate::time::Timestamp;

/// The longest `Retry-After` that is honoured: 14 days, as the longest wait of a schedule. An endpoint that asks for more
/// is tried again then, so that a mistaken header cannot park a message for good.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(RETRY_S_MAX as u64);

/// Jitter of a scheduled wait, up and down; of a `Retry-After`, up only.
const JITTER: f64 = 0.2;

/// How long to wait after `attempts` attempts (at least 1) have failed; `None` when that was the last one.
///
/// `schedule_s` holds the waits in seconds, so a message is attempted 1 + its length times in all. The wait is
/// the scheduled one ±20 %, and no less than `retry_after`, to which jitter only adds. `roll` is random, 0 to 1.
pub fn next_wait(schedule_s: &[u32], attempts: u32, retry_after: Option<Duration>, roll: f64) -> Option<Duration> {
    let index = usize::try_from(attempts.max(1) - 1).ok()?;
    let scheduled = Duration::from_secs(u64::from(*schedule_s.get(index)?));
    let roll = roll.clamp(0.0, 1.0);
    let jittered = scheduled.mul_f64(1.0 - JITTER + 2.0 * JITTER * roll);
    Some(retry_after.map_or(jittered, |asked| lengthen(asked, roll).max(jittered)))
}

/// What an endpoint asked for, bounded, and jitter on top. `roll` is random, 0 to 1.
pub fn lengthen(retry_after: Duration, roll: f64) -> Duration {
    retry_after.min(RETRY_AFTER_MAX).mul_f64(1.0 + JITTER * roll.clamp(0.0, 1.0))
}

/// Reads `Retry-After` (RFC 9110, section 10.2.3): whole seconds, or an HTTP date in any of its three forms. A date
/// that has passed is no wait; what cannot be read is `None`.
pub fn parse_retry_after(value: &str, now: Timestamp) -> Option<Duration> {
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit()) {
        // More digits than fit are a long time, not nonsense.
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::MAX)).min(RETRY_AFTER_MAX));
    }
    let at = httpdate::parse_http_date(value).ok()?;
    let at_ms = at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_millis();
    let now_ms = u128::try_from(now.as_millis()).unwrap_or(0);
    let wait_ms = u64::try_from(at_ms.saturating_sub(now_ms)).unwrap_or(u64::MAX);
    Some(Duration::from_millis(wait_ms).min(RETRY_AFTER_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn waits_follow_the_schedule_within_a_fifth_and_then_end() {
        let schedule = [5, 300];
        for (attempts, middle_s) in [(1, 5.0), (2, 300.0)] {
            for (roll, factor) in [(0.0, 0.8), (0.5, 1.0), (1.0, 1.2)] {
                let wait = next_wait(&schedule, attempts, None, roll).expect("a retry is left").as_secs_f64();
                assert!((wait - middle_s * factor).abs() < 1e-6, "{wait}");
            }
        }
        assert_eq!(next_wait(&schedule, 3, None, 0.5), None);
        assert_eq!(next_wait(&schedule, u32::MAX, None, 0.5), None);
        assert_eq!(next_wait(&[], 1, Some(SECOND), 0.5), None);
        assert_eq!(next_wait(&[0], 1, None, 0.5), Some(Duration::ZERO));
    }

    #[test]
    fn retry_after_is_never_undercut_and_bounded() {
        for roll in [0.0, 0.3, 1.0] {
            let wait = next_wait(&[5], 1, Some(SECOND * 60), roll).expect("a retry is left");
            assert!(wait >= SECOND * 60 && wait <= SECOND * 72, "{wait:?}");
            let two_weeks = SECOND * 1_209_600;
            let wait = next_wait(&[5], 1, Some(two_weeks), roll).expect("a retry is left");
            assert!(wait >= two_weeks && wait <= two_weeks.mul_f64(1.2), "{wait:?}");
            let wait = next_wait(&[5], 1, Some(SECOND * 10_000_000), roll).expect("a retry is left");
            assert!(wait >= RETRY_AFTER_MAX && wait <= RETRY_AFTER_MAX.mul_f64(1.2), "{wait:?}");
        }
        // A shorter one does not shorten the schedule.
        assert_eq!(next_wait(&[5], 1, Some(SECOND), 0.5), Some(SECOND * 5));
    }

    #[test]
    fn retry_after_is_read_in_all_its_forms() {
        // 1994-11-06T08:49:00Z, 37 seconds before the dates of RFC 9110, section 5.6.7.
        let now = Timestamp::from_millis(784_111_740_000);
        for (value, wait) in [
            ("120", Some(SECOND * 120)),
            ("1209600", Some(SECOND * 1_209_600)),
            (" 0 ", Some(Duration::ZERO)),
            ("99999999999999999999999", Some(RETRY_AFTER_MAX)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(SECOND * 37)),
            ("Sunday, 06-Nov-94 08:49:37 GMT", Some(SECOND * 37)),
            ("Sun Nov  6 08:49:37 1994", Some(SECOND * 37)),
            ("Sun, 06 Nov 1994 08:48:00 GMT", Some(Duration::ZERO)),
            ("Fri, 06 Nov 2093 08:49:37 GMT", Some(RETRY_AFTER_MAX)),
            ("", None),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
            ("Sun, 36 Nov 1994 08:49:37 GMT", None),
        ] {
            assert_eq!(parse_retry_after(value, now), wait, "{value}");
        }
    }
}
