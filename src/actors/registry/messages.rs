//! The registry's messages: the control plane's interface to HTTP, to the pusher, and to the program around it.

use std::time::Duration;

use actix::prelude::*;
use serde::Serialize;

use crate::actors::{ActorKind, Identity};
use crate::broker::BrokerError;
use crate::client::{ClientId, ClientRecord, Limits, Webhook};
use crate::secret::{Secret, WebhookSecrets};
use crate::time::Timestamp;
use crate::topic::Pattern;

/// Onboards a client. Answers when its queues, bindings and actors are ready.
#[derive(Debug, Message)]
#[rtype(result = "Result<Created, RegistryError>")]
pub struct CreateClient {
    /// Its id.
    pub client_id: ClientId,
    /// A name for people.
    pub name: Option<String>,
    /// What lands in its inbox.
    pub subscriptions: Vec<Pattern>,
    /// Where its inbox is pushed to.
    pub webhook: Option<Webhook>,
    /// Its limits.
    pub limits: Limits,
}

/// The answer to [`CreateClient`]: the only one, with rotation, that shows secrets.
#[derive(Debug)]
pub struct Created {
    /// The client's record.
    pub record: ClientRecord,
    /// Its secret.
    pub secret: Secret,
    /// `whsec_…`, when it has a webhook.
    pub webhook_secret: Option<String>,
}

/// What PATCH changes: `None` leaves a field, an inner `None` clears it. The HTTP layer applies the JSON merge patch
/// to the record and validates the result, so these are whole new values.
#[derive(Debug, Default, Message)]
#[rtype(result = "Result<Patched, RegistryError>")]
pub struct PatchClient {
    /// Whose.
    pub client_id: Option<ClientId>,
    /// The record that the patch was merged with: refused when it is another one by now.
    pub merged_with: Option<ClientRecord>,
    /// New name.
    pub name: Option<Option<String>>,
    /// New subscriptions.
    pub subscriptions: Option<Vec<Pattern>>,
    /// New webhook.
    pub webhook: Option<Option<Webhook>>,
    /// New limits.
    pub limits: Option<Limits>,
    /// Whether it is paused.
    pub paused: Option<bool>,
}

/// The answer to [`PatchClient`].
#[derive(Debug)]
pub struct Patched {
    /// The client's record now.
    pub record: ClientRecord,
    /// `whsec_…`, when this gave it its first webhook.
    pub webhook_secret: Option<String>,
}

/// Forwards what the client's outbox and notify queue hold, stops its actors, deletes its queues.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), RegistryError>")]
pub struct DeleteClient(pub ClientId);

/// Which secret a rotation makes anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretKind {
    /// The client's own.
    Client,
    /// The one that signs its webhooks.
    Webhook,
}

/// Rotates a secret; the one before stays valid for `overlap_s` seconds.
#[derive(Debug, Clone, Message)]
#[rtype(result = "Result<Rotated, RegistryError>")]
pub struct RotateSecret {
    /// Whose.
    pub client_id: ClientId,
    /// Which.
    pub kind: SecretKind,
    /// Seconds, 0 to 604,800.
    pub overlap_s: u32,
}

/// The answer to [`RotateSecret`].
#[derive(Debug)]
pub struct Rotated {
    /// The new secret (`whsec_…` for a webhook).
    pub secret: String,
    /// Until when the one before is valid.
    pub previous_valid_until: Timestamp,
}

/// Asks for the states of a client's actors.
#[derive(Debug, Message)]
#[rtype(result = "Option<ActorStates>")]
pub struct GetActorStates(pub ClientId);

/// What an actor is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ActorState {
    /// Being started, or waiting for the broker.
    Starting,
    /// At work.
    Running,
    /// Not at work because the client is paused.
    Paused,
    /// Died; waiting to be started again.
    Restarting,
    /// Died so often in a short time that it is reported; it is still started again, at the longest backoff.
    Failing,
    /// There is none: a pusher without a webhook, or one that is switched off.
    Stopped,
}

impl ActorState {
    /// Every state.
    pub const ALL: [Self; 6] =
        [Self::Starting, Self::Running, Self::Paused, Self::Restarting, Self::Failing, Self::Stopped];

    /// Its name in the API and the metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Restarting => "restarting",
            Self::Failing => "failing",
            Self::Stopped => "stopped",
        }
    }
}

/// The states of a client's actors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ActorStates {
    /// Outbox to `soar-publish`.
    pub forwarder: ActorState,
    /// Notify queue to `soar-broadcast`.
    pub broadcaster: ActorState,
    /// Holds the inbox's bindings.
    pub subscriber: ActorState,
    /// Inbox to webhook.
    pub pusher: ActorState,
}

impl ActorStates {
    /// The same, but those at work wait for the broker.
    pub(super) fn waiting(self) -> Self {
        let waits = |state| if state == ActorState::Running { ActorState::Starting } else { state };
        Self {
            forwarder: waits(self.forwarder),
            broadcaster: waits(self.broadcaster),
            subscriber: waits(self.subscriber),
            pusher: waits(self.pusher),
        }
    }
}

/// Asks how all actors are, in numbers; for metrics and the console.
#[derive(Debug, Message)]
#[rtype(result = "ActorCensus")]
pub struct GetActorCensus;

/// The answer to [`GetActorCensus`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ActorCensus {
    /// How many actors of a kind are in a state; those that are none are left out.
    pub counts: Vec<(ActorKind, ActorState, u64)>,
    /// Clients with an actor that is not simply at work, paused or not wanted; at most 1,000.
    pub troubled: Vec<(ClientId, ActorStates)>,
}

/// Asks whether all actors run, for `/readyz`.
#[derive(Debug, Message)]
#[rtype(result = "Readiness")]
pub struct GetReadiness;

/// The answer to [`GetReadiness`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readiness {
    /// Whether every actor that should run does. One client's actor that is being started or restarted does not count
    /// until that has taken five seconds or the actor is failing: others are not to be turned away for its sake.
    pub ready: bool,
    /// Why not, one line each, at most 20.
    pub reasons: Vec<String>,
}

/// Why the registry refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The id is taken.
    #[error("client {0} exists")]
    Exists(ClientId),
    /// There is no such client.
    #[error("no client {0}")]
    NotFound(ClientId),
    /// Its record is not the one that the patch was merged with: merge again.
    #[error("client {0} has changed")]
    Changed(ClientId),
    /// It has no webhook, so there is no webhook secret to rotate.
    #[error("client {0} has no webhook")]
    NoWebhook(ClientId),
    /// The backbone is shutting down.
    #[error("shutting down")]
    ShuttingDown,
    /// The broker could not.
    #[error(transparent)]
    Broker(#[from] BrokerError),
    /// The registry's store could not.
    #[error("store client {client_id}")]
    Store {
        /// Whose record.
        client_id: ClientId,
        /// Why.
        #[source]
        source: crate::db::DbError,
    },
}

/// Asks for what signs a client's webhooks now.
#[derive(Debug, Message)]
#[rtype(result = "Option<WebhookSecrets>")]
pub struct GetWebhookSecrets(pub ClientId);

/// From a pusher: switches its client's webhook off. Ignored when the pusher has been replaced since, because whoever
/// changed the webhook knows better.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct DisableWebhook {
    /// The pusher that asks.
    pub identity: Identity,
    /// Why, for people: becomes `disabled_reason`.
    pub reason: String,
}

/// Takes no more operations, waits for those under way, and stops all actors. Answers when they have ended, or have been
/// aborted because they did not in time.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Shutdown {
    /// For how long to wait.
    pub within: Duration,
}

/// For tests, in the process only: makes an actor panic. Answers whether there was such an actor.
#[doc(hidden)]
#[derive(Debug, Message)]
#[rtype(result = "bool")]
pub struct InjectPanic {
    /// Whose; `None` for the publisher.
    pub client: Option<ClientId>,
    /// Which of its actors.
    pub kind: ActorKind,
}
