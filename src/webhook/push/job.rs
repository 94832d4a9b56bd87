//! One attempt: signed, posted, timed.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::RwLock;

use super::Waiting;
use crate::envelope::SharedMessage;
use crate::secret::WebhookSecrets;
use crate::time::Timestamp;
use crate::webhook::answer::Answer;
use crate::webhook::attempts::{Attempt, AttemptLog};
use crate::webhook::breaker::Ticket;
use crate::webhook::endpoint::{Endpoint, Post, Slot};
use crate::webhook::failure::{Failure, FailureKind};
use crate::webhook::signature::Signer;

/// What came of an attempt.
pub(super) struct Finished {
    pub(super) waiting: Waiting,
    pub(super) ticket: Ticket,
    pub(super) attempt: Attempt,
    pub(super) latency: Duration,
    pub(super) result: Result<Answer, Failure>,
}

/// The webhook's signer, made anew when the secrets change.
pub(super) struct Signing {
    secrets: Arc<RwLock<WebhookSecrets>>,
    valid: Vec<String>,
    signer: Rc<Signer>,
}

impl Signing {
    pub(super) fn new(secrets: Arc<RwLock<WebhookSecrets>>) -> Self {
        Self { secrets, valid: Vec::new(), signer: Rc::new(Signer::new([])) }
    }

    pub(super) fn signer(&mut self, now: Timestamp) -> Rc<Signer> {
        let secrets = self.secrets.read();
        if !secrets.valid_at(now).eq(self.valid.iter().map(String::as_str)) {
            self.valid = secrets.valid_at(now).map(str::to_owned).collect();
            let made = Signer::from_texts(self.valid.iter().map(String::as_str));
            self.signer = Rc::new(made.expect("the backbone makes webhook secrets itself, and stores them encrypted"));
        }
        Rc::clone(&self.signer)
    }
}

/// One attempt and all that it needs.
pub(super) struct Job {
    pub(super) endpoint: Rc<Endpoint>,
    pub(super) signer: Rc<Signer>,
    pub(super) log: Arc<AttemptLog>,
    pub(super) slot: Slot,
    pub(super) ticket: Ticket,
    pub(super) began: Timestamp,
    pub(super) waiting: Waiting,
}

impl Job {
    pub(super) async fn run(self) -> Finished {
        let Self { endpoint, signer, log, slot, ticket, began, waiting } = self;
        let message = &waiting.message;
        let id = log.next_id(began);
        let since = Instant::now();
        let result = send(&endpoint, slot, &signer, message, began).await;
        let latency = since.elapsed();
        let attempt = Attempt::new(id, message.id.as_str(), began, latency, &result);
        Finished { waiting, ticket, attempt, latency, result }
    }
}

/// Signs a message and posts it.
pub(crate) async fn send(
    endpoint: &Endpoint,
    slot: Slot,
    signer: &Signer,
    message: &SharedMessage,
    now: Timestamp,
) -> Result<Answer, Failure> {
    let webhook_id = message.webhook_id();
    let mut digits = itoa::Buffer::new();
    let timestamp_s = digits.format(now.as_millis().div_euclid(1000));
    let signature = signer.sign(&webhook_id, timestamp_s, &message.envelope);
    let post = Post {
        webhook_id: &webhook_id,
        timestamp_s,
        signature: &signature,
        traceparent: message.traceparent.as_deref(),
        body: &message.envelope,
    };
    endpoint.post(slot, &post).await
}

/// The class of an attempt in the metrics.
pub(super) fn class_of(result: &Result<Answer, Failure>) -> &'static str {
    match result {
        Ok(answer) => match answer.status {
            200..300 => "2xx",
            300..400 => "3xx",
            400..500 => "4xx",
            500..600 => "5xx",
            _ => "other",
        },
        Err(failure) => match failure.kind {
            FailureKind::Timeout => "timeout",
            FailureKind::Dns | FailureKind::Connect => "connect",
            FailureKind::Refused => "refused",
            FailureKind::Tls | FailureKind::Closed | FailureKind::Malformed => "other",
        },
    }
}
