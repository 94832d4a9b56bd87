//! A client as the API shows it: flat, and never a secret but where one was just made (contract, section 10).

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use crate::actors::registry::{ActorState, ActorStates};
use crate::broker::Depths;
use crate::client::{ClientRecord, Limits, Webhook};
use crate::time::Timestamp;
use crate::topic::Pattern;
use crate::webhook::BreakerState;

/// A client's record.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Client)]
pub(crate) struct ClientView {
    /// A DNS label.
    #[schema(example = "noc-c2")]
    client_id: String,
    /// A name for people.
    name: Option<String>,
    /// Patterns of the topics that land in its inbox.
    #[schema(value_type = Vec<String>, example = json!(["soar.noc.#"]))]
    subscriptions: Vec<Pattern>,
    /// Where its inbox is pushed to.
    webhook: Option<WebhookView>,
    limits: LimitsView,
    /// While true nothing is forwarded, broadcast or pushed for it; its queues fill.
    paused: bool,
    /// When it was onboarded, RFC 3339 in UTC.
    #[schema(value_type = String, format = "date-time")]
    created_at: Timestamp,
    /// How many messages its queues hold, in `GET /clients/{id}`; `null` while the broker cannot tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<QueuesView>)]
    queues: Option<Option<QueuesView>>,
    /// What its actors do, in `GET /clients/{id}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    actors: Option<ActorsView>,
    /// The client's secret: only when the client is created.
    #[serde(skip_serializing_if = "Option::is_none")]
    secret: Option<String>,
    /// The secret that signs its webhooks: only when it was just made.
    #[serde(skip_serializing_if = "Option::is_none")]
    webhook_secret: Option<String>,
}

/// Messages waiting, handed out and delayed together.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Queues)]
pub(crate) struct QueuesView {
    outbox: u64,
    notify: u64,
    inbox: u64,
    dead: u64,
}

/// States of a client's actors.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Actors)]
pub(crate) struct ActorsView {
    #[schema(value_type = ActorStateView)]
    forwarder: ActorState,
    #[schema(value_type = ActorStateView)]
    broadcaster: ActorState,
    #[schema(value_type = ActorStateView)]
    subscriber: ActorState,
    #[schema(value_type = ActorStateView)]
    pusher: ActorState,
}

/// What an actor does.
#[derive(ToSchema)]
#[schema(as = ActorState, rename_all = "snake_case")]
#[allow(dead_code, reason = "names the states in the document; the states themselves are the registry's")]
pub(crate) enum ActorStateView {
    Starting,
    Running,
    Paused,
    Restarting,
    Failing,
    Stopped,
}

/// Limits; what is absent is not limited.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Limits)]
pub(crate) struct LimitsView {
    /// Messages a second that it may send.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 1_000_000)]
    send_per_s: Option<u32>,
    /// Messages that its inbox may hold; past it the oldest become dead letters (`inbox_full`).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 9_007_199_254_740_992_i64)]
    max_inbox_messages: Option<u64>,
    /// Seconds that a message may wait in its inbox; then it becomes a dead letter (`expired`).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 31_536_000)]
    inbox_ttl_s: Option<u64>,
}

/// A webhook's settings, and how it is doing.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Webhook)]
pub(crate) struct WebhookView {
    url: String,
    headers: BTreeMap<String, String>,
    timeout_s: u32,
    retry_schedule_s: Vec<u32>,
    concurrency: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    rate_limit_per_s: Option<u32>,
    ordered: bool,
    /// Whether the backbone pushes. Switched off by 410, by 5 days of nothing but failure, or by PATCH.
    enabled: bool,
    /// Why it is off, when it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    disabled_reason: Option<String>,
    /// `closed` (calls go out), `open` (the endpoint only fails and is left alone) or `half_open` (being probed).
    #[schema(value_type = BreakerView)]
    breaker: BreakerState,
}

/// What a circuit breaker does.
#[derive(ToSchema)]
#[schema(as = Breaker, rename_all = "snake_case")]
#[allow(dead_code, reason = "names the states in the document; the states themselves are the breaker's")]
pub(crate) enum BreakerView {
    Closed,
    Open,
    HalfOpen,
}

impl ClientView {
    pub(crate) fn new(record: &ClientRecord) -> Self {
        let ClientRecord { client_id, name, subscriptions, webhook, limits, paused, created_at } = record;
        Self {
            client_id: client_id.to_string(),
            name: name.clone(),
            subscriptions: subscriptions.clone(),
            webhook: webhook.as_ref().map(WebhookView::from),
            limits: limits.into(),
            paused: *paused,
            created_at: *created_at,
            queues: None,
            actors: None,
            secret: None,
            webhook_secret: None,
        }
    }

    pub(crate) fn with_secrets(mut self, secret: Option<String>, webhook_secret: Option<String>) -> Self {
        (self.secret, self.webhook_secret) = (secret, webhook_secret);
        self
    }

    /// Shows the webhook's breaker; it is closed as long as nothing is pushed.
    pub(crate) fn with_breaker(mut self, state: Option<BreakerState>) -> Self {
        if let (Some(webhook), Some(state)) = (&mut self.webhook, state) {
            webhook.breaker = state;
        }
        self
    }

    pub(crate) fn with_live(mut self, queues: Option<Depths>, actors: ActorStates) -> Self {
        let queues = queues.map(|Depths { outbox, notify, inbox, dead }| QueuesView { outbox, notify, inbox, dead });
        let ActorStates { forwarder, broadcaster, subscriber, pusher } = actors;
        self.queues = Some(queues);
        self.actors = Some(ActorsView { forwarder, broadcaster, subscriber, pusher });
        self
    }
}

impl From<&Limits> for LimitsView {
    fn from(limits: &Limits) -> Self {
        let Limits { send_per_s, max_inbox_messages, inbox_ttl_s } = *limits;
        Self { send_per_s, max_inbox_messages, inbox_ttl_s }
    }
}

impl From<&Webhook> for WebhookView {
    fn from(webhook: &Webhook) -> Self {
        let webhook = webhook.clone();
        Self {
            url: webhook.url,
            headers: webhook.headers,
            timeout_s: webhook.timeout_s,
            retry_schedule_s: webhook.retry_schedule_s,
            concurrency: webhook.concurrency,
            rate_limit_per_s: webhook.rate_limit_per_s,
            ordered: webhook.ordered,
            enabled: webhook.enabled,
            disabled_reason: webhook.disabled_reason,
            breaker: BreakerState::Closed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::ClientId;

    #[test]
    fn a_record_is_flat_and_shows_no_secret_unless_given_one() {
        let record = ClientRecord {
            client_id: ClientId::parse("a").expect("test client"),
            name: None,
            subscriptions: vec![Pattern::parse("x.#").expect("test pattern")],
            webhook: None,
            limits: Limits::default(),
            paused: false,
            created_at: Timestamp::from_millis(0),
        };
        let plain = serde_json::json!({"client_id": "a", "name": null, "subscriptions": ["x.#"], "webhook": null,
            "limits": {}, "paused": false, "created_at": "1970-01-01T00:00:00.000Z"});
        assert_eq!(serde_json::to_value(ClientView::new(&record)).expect("JSON"), plain);
        let state = ActorState::Running;
        let actors =
            ActorStates { forwarder: state, broadcaster: state, subscriber: state, pusher: ActorState::Stopped };
        let shown =
            ClientView::new(&record).with_live(Some(Depths::default()), actors).with_secrets(Some("s".into()), None);
        let shown = serde_json::to_value(shown).expect("JSON");
        assert_eq!(shown["queues"], serde_json::json!({"outbox": 0, "notify": 0, "inbox": 0, "dead": 0}));
        assert_eq!(shown["actors"]["pusher"], "stopped");
        assert_eq!(shown["secret"], "s");
        assert!(shown.get("webhook_secret").is_none() && shown.get("live").is_none());
    }
}
