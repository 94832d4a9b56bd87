//! What is noted of an endpoint, so that it survives a restart: since when it only fails, and how far the head of an
//! ordered webhook has come.

use std::time::{Duration, Instant};

use super::{Head, Host, Push};
use crate::db::webhooks::{EndpointNotes, HeadNote};
use crate::time::Timestamp;

/// How long failing must last before it is noted: an endpoint that stumbles costs no write.
const NOTE_FAILING_AFTER_MS: i64 = 60_000;

impl<H: Host> Push<H> {
    pub(super) async fn load_notes(&mut self) {
        match self.means.log.tables().notes(&self.client, &self.webhook.url).await {
            Ok(notes) => self.noted = notes,
            Err(error) => log::warn!("cannot read what was noted of the webhook of {}: {error}", self.client),
        }
        self.failing_since = self.noted.failing_since;
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
