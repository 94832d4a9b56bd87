//! What an attempt's result means for the message (contract, section 5). Pure.

use std::time::Duration;

use super::answer::Answer;
use super::failure::Failure;
use super::retry;
use crate::time::Timestamp;

/// Why a webhook is switched off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OffReason {
    /// The endpoint answered 410.
    Gone,
    /// It did nothing but fail for days.
    Failing,
}

impl OffReason {
    /// The name in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Failing => "failing",
        }
    }

    /// For people: becomes the webhook's `disabled_reason`.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Gone => "the endpoint answered 410 Gone",
            Self::Failing => "every attempt failed for 5 days",
        }
    }
}

/// What becomes of the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is delivered.
    Delivered,
    /// It is tried again after this long.
    Retry {
        /// How long.
        wait: Duration,
        /// How long everything should wait, when the endpoint asked for that.
        asked: Option<Duration>,
    },
    /// That was the last attempt.
    Dead,
    /// It stays in the inbox, and the webhook is switched off.
    SwitchOff,
}

/// The verdict after `attempts` attempts, this one included. `roll` is random, 0 to 1.
pub fn of(result: &Result<Answer, Failure>, schedule_s: &[u32], attempts: u32, now: Timestamp, roll: f64) -> Verdict {
    let asked = match result {
        Ok(answer) if answer.is_success() => return Verdict::Delivered,
        Ok(answer) if answer.status == 410 => return Verdict::SwitchOff,
        Ok(answer) if matches!(answer.status, 429 | 503) => {
            answer.retry_after.as_deref().and_then(|value| retry::parse_retry_after(value, now))
        }
        _ => None,
    };
    match retry::next_wait(schedule_s, attempts, asked, roll) {
        Some(wait) => Verdict::Retry { wait, asked: asked.map(|asked| retry::lengthen(asked, roll)) },
        None => Verdict::Dead,
    }
}

#[cfg(test)]
mod tests {
    use super::super::failure::FailureKind;
    use super::*;

    const NOW: Timestamp = Timestamp::from_millis(784_111_740_000);

    fn answered(status: u16, retry_after: Option<&str>) -> Result<Answer, Failure> {
        Ok(Answer { status, retry_after: retry_after.map(Into::into), body: vec![] })
    }

    fn wait_s(result: &Result<Answer, Failure>) -> u64 {
        match of(result, &[5, 300], 1, NOW, 0.5) {
            Verdict::Retry { wait, .. } => wait.as_secs(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_row_of_the_status_table() {
        for status in [200, 201, 202, 204, 299] {
            assert_eq!(of(&answered(status, None), &[], 1, NOW, 0.5), Verdict::Delivered, "{status}");
        }
        assert_eq!(of(&answered(410, None), &[5], 1, NOW, 0.5), Verdict::SwitchOff);
        for status in [101, 300, 301, 302, 303, 307, 308, 400, 401, 403, 404, 408, 418, 422, 500, 502, 504, 599, 999] {
            // Retry-After is for 429 and 503.
            assert_eq!(wait_s(&answered(status, Some("60"))), 5, "{status}");
        }
        for status in [429, 503] {
            assert_eq!(wait_s(&answered(status, None)), 5, "{status}");
            assert_eq!(wait_s(&answered(status, Some("soon"))), 5, "{status}");
            assert_eq!(wait_s(&answered(status, Some("60"))), 66, "{status}");
            assert_eq!(wait_s(&answered(status, Some("Sun, 06 Nov 1994 08:49:40 GMT"))), 44, "{status}");
        }
        for kind in FailureKind::ALL {
            assert_eq!(wait_s(&Err(Failure::new(kind, "x"))), 5, "{kind:?}");
        }
    }

    #[test]
    fn the_last_attempt_is_the_end() {
        for result in [answered(500, None), answered(503, Some("60")), Err(Failure::new(FailureKind::Timeout, "x"))] {
            assert!(matches!(of(&result, &[5, 300], 2, NOW, 0.5), Verdict::Retry { .. }));
            assert_eq!(of(&result, &[5, 300], 3, NOW, 0.5), Verdict::Dead);
            assert_eq!(of(&result, &[], 1, NOW, 0.5), Verdict::Dead);
        }
    }
}
