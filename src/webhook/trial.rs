//! `POST /clients/{id}/webhook/test`: one signed example, sent at once, past the inbox.
//!
//! It is an attempt like any other: guarded, timed, logged. It spends nobody's retries and moves no breaker, and it
//! works while the webhook is switched off, which is when it is needed.

use std::sync::Arc;
use std::time::Instant;

use serde_json::value::RawValue;

use super::attempts::Attempt;
use super::endpoint::Endpoint;
use super::failure::{Failure, FailureKind};
use super::push::{Means, send};
use super::signature::Signer;
use crate::client::{ClientId, Webhook};
use crate::envelope::{Draft, Message};
use crate::secret::WebhookSecrets;
use crate::time::Timestamp;
use crate::topic::Topic;

/// What the example says.
const EXAMPLE: &str = r#"{"test":true,"text":"If you can read this and the signature fits, your webhook works."}"#;

/// Sends an example to the client's webhook and tells what came back. Takes no longer than the webhook's `timeout_s`.
/// Stays on one thread.
pub async fn run(means: &Means, client: &ClientId, webhook: &Webhook, secrets: &WebhookSecrets) -> Attempt {
    let began = Timestamp::now();
    let message = Arc::new(example(client, began));
    let since = Instant::now();
    let result = match (Endpoint::new(&means.sender, webhook), Signer::from_texts(secrets.valid_at(began))) {
        (Ok(endpoint), Ok(signer)) => match endpoint.slot() {
            Some(slot) => send(&endpoint, slot, &signer, &message, began).await,
            None => Err(Failure::new(FailureKind::Connect, "too many connections are open; try again")),
        },
        (Err(failure), _) => Err(failure),
        (_, Err(error)) => {
            Err(Failure::new(FailureKind::Refused, format!("the webhook secret cannot be used: {error}")))
        }
    };
    let id = means.log.next_id(began);
    let attempt = Attempt::new(id, message.id.as_str(), began, since.elapsed(), &result);
    means.log.note(client, attempt.clone());
    attempt
}

fn example(client: &ClientId, now: Timestamp) -> Message {
    let body: &RawValue = serde_json::from_str(EXAMPLE).expect("the example is JSON");
    let topic = Topic::parse(&format!("soar.backbone.{client}.webhook-test"));
    let topic = topic.expect("client ids are words of a topic, and short");
    Message::accept(
        &ClientId::backbone(),
        Draft { id: None, topic: Some(topic), message: body, traceparent: None },
        now,
    )
}
