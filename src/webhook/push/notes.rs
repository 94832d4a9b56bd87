//! What is noted of an endpoint, so that it survives a restart: since when it only fails, and how far the head of an
//! ordered webhook has come.

use std::time::{Duration, Instant};

use super::{Head, Host, Push};
use crate::db::webhooks::{EndpointNotes, HeadNote};
use crate::time::Timestamp;

/// How long failing must last before it is noted: an endpoint that stumbles costs no write.
const NOTE_FAILING_AFTER_MS: i64 = 60_000;

/// Two failures further apart than this, in milliseconds, say nothing of the time between them: a day. Longer than the
/// longest wait of the usual schedule.
const FAILURES_APART_MAX_MS: i64 = 86_400_000;

/// Since when an endpoint only fails that fails now, after it failed `last`, and only failed since `since`.
pub(super) fn failing_since(since: Option<Timestamp>, last: Option<Timestamp>, now: Timestamp) -> Timestamp {
    let goes_on = last.is_some_and(|last| now.as_millis().saturating_sub(last.as_millis()) <= FAILURES_APART_MAX_MS);
    since.filter(|_| goes_on).unwrap_or(now)
}

impl<H: Host> Push<H> {
    pub(super) async fn load_notes(&mut self) {
        match self.means.log.tables().notes(&self.client, &self.webhook.url).await {
            Ok(notes) => self.noted = notes,
            Err(error) => log::warn!("cannot read what was noted of the webhook of {}: {error}", self.client),
        }
        self.failing_since = self.noted.failing_since;
        if self.failing_since.is_some() {
            match self.means.log.tables().last_failure(&self.client).await {
                Ok(last) => self.last_failure = last,
                Err(error) => log::warn!("cannot read when the webhook of {} failed last: {error}", self.client),
            }
        }
        let (now, clock) = (Instant::now(), Timestamp::now());
        self.head = self.noted.head.as_ref().map(|note| {
            let wait_ms = note.due.as_millis().saturating_sub(clock.as_millis());
            let due_at = now + Duration::from_millis(u64::try_from(wait_ms).unwrap_or(0));
            Head { key: note.key.clone(), attempts: note.attempts, due: note.due, due_at }
        });
    }

    pub(super) async fn save_notes(&mut self) {
        let long_ago = Timestamp::now().plus_millis(-NOTE_FAILING_AFTER_MS);
        // A webhook that is switched off starts anew when it is switched on again.
        let failing_since = self.failing_since.filter(|since| *since <= long_ago && self.switch_off.is_none());
        let head = self.head.as_ref();
        let is_same = self.noted.failing_since == failing_since
            && match (&self.noted.head, head) {
                (None, None) => true,
                (Some(noted), Some(head)) => {
                    (noted.attempts, noted.due) == (head.attempts, head.due) && noted.key == head.key
                }
                _ => false,
            };
        if is_same {
            return;
        }
        let head = head.map(|head| HeadNote { key: head.key.clone(), attempts: head.attempts, due: head.due });
        self.noted = EndpointNotes { failing_since, head };
        if let Err(error) = self.means.log.tables().note(&self.client, &self.webhook.url, &self.noted).await {
            log::warn!("cannot note how the webhook of {} fares: {error}", self.client);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_with_long_silence_between_them_are_not_failing_for_long() {
        const HOUR: i64 = 3_600_000;
        let at = |hours: i64| Timestamp::from_millis(hours * HOUR);
        let (mut since, mut last) = (None, None);
        for (now, expected) in [(0, 0), (10, 0), (34, 0), (59, 59), (200, 200), (201, 200)] {
            since = Some(failing_since(since, last, at(now)));
            last = Some(at(now));
            assert_eq!(since, Some(at(expected)), "{now} h");
        }
        assert_eq!(failing_since(Some(at(0)), None, at(1)), at(1), "it is not known whether it failed in between");
    }
}
