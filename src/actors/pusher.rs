//! The pusher: a client's inbox to its webhook. One per client that has a webhook which is on; ended and made anew when
//! the webhook changes.
//!
//! Receives [`Control`]. Tells the registry when it is at work and when it waits for the broker; asks it to switch the
//! webhook off ([`DisableWebhook`]) after a 410, or when it did nothing but fail for days, and publishes that as an
//! operational event. The work itself is [`push`](crate::webhook::push): a loop in the actor's own context, so that it
//! ends with the actor, by whatever end.
//!
//! State: none that a crash would lose. What is unsettled goes back to the inbox; attempts under way are made again
//! with the same id. Told to stop, it waits a few seconds for attempts under way, so that as few as possible are.
//!
//! Order: as the inbox hands out; kept only by an ordered webhook.

use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use parking_lot::RwLock;
use serde_json::value::RawValue;
use tokio::sync::oneshot;

use super::registry::{DisableWebhook, OnExit, PusherFactory, PusherSeed};
use super::supervision::{self, Lifeline};
use super::{ChildNews, Control, Identity, Shared};
use crate::broker::Queue;
use crate::client::{ClientId, Webhook};
use crate::envelope::{Draft, Message as Accepted};
use crate::secret::WebhookSecrets;
use crate::time::Timestamp;
use crate::topic::Topic;
use crate::webhook::push::{Condition, Ending, Host, Means, Opening, Push};
use crate::webhook::verdict::OffReason;

/// How often the operational event is offered to the broker before it is given up, with backoff in between: about two
/// minutes.
const EVENT_TRIES: u32 = 10;

/// How the registry starts pushers with these means.
pub fn factory(means: Means) -> PusherFactory {
    Arc::new(move |arbiter: &ArbiterHandle, seed: PusherSeed, on_exit: OnExit| -> (Recipient<Control>, Lifeline) {
        let means = means.clone();
        let (addr, lifeline) = supervision::start(arbiter, move || Pusher::new(means, seed), on_exit);
        (addr.recipient(), lifeline)
    })
}

/// See the module.
pub struct Pusher {
    means: Means,
    client: ClientId,
    webhook: Webhook,
    secrets: Arc<RwLock<WebhookSecrets>>,
    shared: Arc<Shared>,
    identity: Identity,
    /// Tells the loop to stop, by being dropped.
    stop: Option<oneshot::Sender<()>>,
}

impl Pusher {
    fn new(means: Means, seed: PusherSeed) -> Self {
        let PusherSeed { client, webhook, secrets, shared, identity } = seed;
        Self { means, client, webhook, secrets, shared, identity, stop: None }
    }

    fn switch_off(&self, reason: OffReason, ctx: &mut Context<Self>) {
        let work = switch_off(Arc::clone(&self.shared), self.identity.clone(), self.client.clone(), reason);
        // On its own, because the registry ends this actor as a part of it.
        let done = actix_rt::spawn(work);
        ctx.spawn(done.into_actor(self).map(|_, _, ctx| ctx.stop()));
    }
}

impl Actor for Pusher {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        let host =
            Supervised { shared: Arc::clone(&self.shared), identity: self.identity.clone(), queue: self.queue() };
        let (client, webhook, secrets) = (self.client.clone(), self.webhook.clone(), Arc::clone(&self.secrets));
        let push = match Push::new(host, self.means.clone(), client, webhook, secrets) {
            Ok(push) => push,
            Err(failure) => {
                // The API refuses such a webhook; a record from elsewhere shows as an actor that fails.
                log::error!("{} cannot work: {failure}", self.identity);
                ctx.stop();
                return;
            }
        };
        let (stop, stopped) = oneshot::channel();
        self.stop = Some(stop);
        ctx.spawn(push.run(stopped).into_actor(self).map(|ending, this, ctx| match ending {
            Ending::Stopped => ctx.stop(),
            Ending::SwitchOff(reason) => {
                this.stop = None;
                this.switch_off(reason, ctx);
            }
        }));
    }
}

impl Pusher {
    fn queue(&self) -> Queue {
        Queue::Inbox(self.client.clone())
    }
}

impl Handler<Control> for Pusher {
    type Result = ();

    fn handle(&mut self, control: Control, ctx: &mut Self::Context) {
        match control {
            // The loop hears of it, ends what is under way, and then the actor stops.
            Control::Stop if self.stop.is_some() => drop(self.stop.take()),
            other => other.obey(&self.identity, ctx),
        }
    }
}

/// What the loop asks for, by way of what all actors share.
struct Supervised {
    shared: Arc<Shared>,
    identity: Identity,
    queue: Queue,
}

impl Host for Supervised {
    fn open(&self, prefetch: u32) -> Opening {
        let (shared, queue) = (Arc::clone(&self.shared), self.queue.clone());
        Box::pin(async move { shared.set_up(shared.broker.consume(&queue, prefetch)).await })
    }

    fn report(&self, condition: Condition) {
        match condition {
            Condition::AtWork => self.shared.report_ready(&self.identity),
            Condition::Waiting => self.shared.report_waiting(&self.identity),
            Condition::QueueMissing => {
                self.shared.report(self.identity.clone(), ChildNews::QueueMissing);
                self.shared.report_waiting(&self.identity);
            }
        }
    }
}

/// Has the webhook switched off, and tells the world. The registry says so in the log.
async fn switch_off(shared: Arc<Shared>, identity: Identity, client: ClientId, reason: OffReason) {
    let request = DisableWebhook { identity, reason: reason.words().into() };
    if shared.registry.send(request).await.is_err() {
        // The registry is gone: so is the program, or nearly.
        return;
    }
    let webhook = shared.directory.get(client.as_str()).and_then(|entry| entry.record.webhook.clone());
    let is_done =
        webhook.is_some_and(|webhook| !webhook.enabled && webhook.disabled_reason.as_deref() == Some(reason.words()));
    if !is_done {
        // Somebody changed it meanwhile, or it could not be stored: then the pusher starts again and will ask again.
        return;
    }
    shared.telemetry.metrics.webhooks_disabled.with_label_values(&[reason.as_str()]).inc();
    for attempt in 0..EVENT_TRIES {
        let event = event(&client, reason, Timestamp::now());
        match shared.broker.publish(&Queue::Publish, vec![event]).await {
            Ok(_) => return,
            Err(error) if error.is_retryable() && attempt + 1 < EVENT_TRIES => {
                actix_rt::time::sleep(supervision::random_backoff(attempt).min(Duration::from_secs(30))).await;
            }
            Err(error) => {
                log::warn!("cannot publish that the webhook of {client} was switched off: {error}");
                return;
            }
        }
    }
}

/// The operational event, for whoever subscribed to `soar.backbone.#`.
fn event(client: &ClientId, reason: OffReason, now: Timestamp) -> Accepted {
    let body = serde_json::json!({
        "event": "webhook-disabled",
        "client_id": client,
        "reason": reason.as_str(),
        "detail": reason.words(),
        "at": now,
    });
    let body = RawValue::from_string(body.to_string()).expect("what serde_json writes is JSON");
    let topic = Topic::parse(&format!("soar.backbone.{client}.webhook-disabled"));
    let topic = topic.expect("client ids are words of a topic, and short");
    Accepted::accept(
        &ClientId::backbone(),
        Draft { id: None, topic: Some(topic), message: &body, traceparent: None },
        now,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_event_names_client_and_reason_and_comes_from_the_backbone() {
        let client = ClientId::parse("noc-c2").expect("test id");
        let event = event(&client, OffReason::Gone, Timestamp::from_millis(0));
        assert_eq!(event.sender, ClientId::backbone());
        assert_eq!(event.topic.as_ref().map(Topic::as_str), Some("soar.backbone.noc-c2.webhook-disabled"));
        let envelope: serde_json::Value = serde_json::from_slice(&event.envelope).expect("an envelope");
        assert_eq!(envelope["message"]["client_id"], "noc-c2");
        assert_eq!(envelope["message"]["reason"], "gone");
    }
}
