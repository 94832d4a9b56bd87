//! The `ClientRegistry`: spawns, supervises and restarts every other actor, and carries out the control plane's
//! operations. It is never asked on the message path; that reads the [`Directory`].
//!
//! # Layout
//! - `messages`: what it is told and asked.
//! - `core`: the clients, which actors each should have, and which it has. `lifecycle`: how they start, end and come
//!   back. `child`: one of them. `readiness`: what is told of their states.
//! - `create`, `change`, `delete`: the operations, each in an order that a crash may cut anywhere.
//! - `turns`: operations on one client follow one another.
//!
//! # Semantics
//! - An operation runs as a task of its own on the registry's thread. An asker that goes away before its message is
//!   looked at cancels it whole; after that it is carried out.
//! - Operations under way are bounded; the mailbox, and behind it the askers, wait.
//! - A panic in an operation ends that operation: its asker gets an error, its client's turn is the next one's. A panic
//!   over an actor's news is caught and logged: the registry holds every actor's lifeline and must not die.

mod change;
mod child;
mod core;
mod create;
mod delete;
mod lifecycle;
mod messages;
mod readiness;
#[cfg(test)]
mod tests;
mod turns;

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use futures_util::StreamExt as _;
use futures_util::stream;
use parking_lot::RwLock;
use tokio::sync::Semaphore;

use self::core::Core;
pub use messages::{
    ActorCensus, ActorState, ActorStates, CreateClient, Created, DeleteClient, DisableWebhook, GetActorCensus,
    GetActorStates, GetReadiness, GetWebhookSecrets, InjectPanic, PatchClient, Patched, Readiness, RegistryError,
    RotateSecret, Rotated, SecretKind, Shutdown,
};

use super::supervision::{Arbiters, Exit, Lifeline};
use super::{ChildEvent, Control, Identity, Shared};
use crate::broker::Broker;
use crate::client::{ClientId, Webhook};
use crate::directory::Directory;
use crate::secret::WebhookSecrets;
use crate::store::{Loaded, Store};
use crate::telemetry::Telemetry;
use crate::time::Timestamp;
use crate::webhook::AttemptLog;

/// Messages in the registry's mailbox; askers beyond that wait. News of actors are not counted.
const MAILBOX_CAPACITY: usize = 256;

/// Operations under way at once.
const OPERATIONS_MAX: usize = 256;

/// Between two purges of old dead letters, in seconds.
const PURGE_EVERY_S: u64 = 3600;

/// The first purge, in seconds after the start: not while the actors are being started.
const FIRST_PURGE_AFTER_S: u64 = 30;

/// Clients whose dead letters are purged at once.
const PURGES_MAX: usize = 4;

/// Between two attempts to delete what clients that are no more have left, in seconds.
const SWEEP_EVERY_S: u64 = 30;

/// Called once, when an actor has ended.
pub type OnExit = Box<dyn FnOnce(Exit) + Send>;

/// Everything that a pusher is made of. When the webhook changes, the pusher is ended and another one is made; the
/// secrets change in place.
#[derive(Debug)]
pub struct PusherSeed {
    /// Whose inbox it consumes.
    pub client: ClientId,
    /// Where to, and how.
    pub webhook: Webhook,
    /// What signs.
    pub secrets: Arc<RwLock<WebhookSecrets>>,
    /// What all actors share; a pusher reports through it when it is ready.
    pub shared: Arc<Shared>,
    /// Which life of it this is.
    pub identity: Identity,
}

/// Starts a pusher on an arbiter, by [`supervision::start`](super::supervision::start).
pub type PusherFactory =
    Arc<dyn Fn(&ArbiterHandle, PusherSeed, OnExit) -> (Recipient<Control>, Lifeline) + Send + Sync>;

/// What the registry works with.
pub struct RegistryParts {
    /// The broker.
    pub broker: Arc<dyn Broker>,
    /// The clients' records.
    pub store: Store,
    /// The clients, for the message path. The registry is the only writer.
    pub directory: Arc<Directory>,
    /// Metrics and traces.
    pub telemetry: Telemetry,
    /// `SOAR_MAX_MESSAGE_BYTES`.
    pub max_message_bytes: usize,
    /// `SOAR_ATTEMPT_RETENTION`.
    pub retention: Duration,
    /// Makes pushers; without it no webhook is called.
    pub pusher: Option<PusherFactory>,
    /// The log of webhook attempts, where a deleted client is to be forgotten.
    pub attempts: Option<Arc<AttemptLog>>,
}

/// See the module.
pub struct ClientRegistry {
    core: Rc<Core>,
    operations: Arc<Semaphore>,
    retention: Duration,
    purging: bool,
}

impl ClientRegistry {
    /// Starts the registry on this thread, and the actors of the clients that the store holds on others. When it
    /// returns, the directory has all clients; their actors follow.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(parts: RegistryParts, loaded: Loaded) -> std::io::Result<Addr<Self>> {
        let arbiters = Arbiters::start()?;
        let retention = parts.retention;
        let mut ready = None;
        let addr = Self::create(|ctx| {
            ctx.set_mailbox_capacity(MAILBOX_CAPACITY);
            let RegistryParts { broker, directory, telemetry, max_message_bytes, .. } = parts;
            let shared = Shared::new(broker, directory, telemetry, max_message_bytes, ctx.address());
            let core = Core::new(Arc::new(shared), parts.store, arbiters, parts.pusher, parts.attempts);
            ready = Some(Rc::clone(&core));
            Self { core, operations: Arc::new(Semaphore::new(OPERATIONS_MAX)), retention, purging: false }
        });
        if let Some(core) = ready {
            core.take_in(loaded);
        }
        Ok(addr)
    }

    /// An operation: runs by itself from here on, when there is room for it.
    fn operate<T: 'static, F>(&self, operation: impl FnOnce(Rc<Core>) -> F) -> ResponseFuture<T>
    where
        F: Future<Output = T> + 'static,
    {
        let operation = operation(Rc::clone(&self.core));
        let operations = Arc::clone(&self.operations);
        Box::pin(async move {
            let _room = operations.acquire_owned().await.expect("the semaphore is never closed");
            operation.await
        })
    }

    fn purge(&mut self, ctx: &mut Context<Self>) {
        if self.purging {
            return;
        }
        self.purging = true;
        let (core, retention) = (Rc::clone(&self.core), self.retention);
        ctx.spawn(async move { purge_expired(&core, retention).await }.into_actor(self).map(|(), this, _| {
            this.purging = false;
        }));
    }
}

/// Purges the dead letters of all clients that are older than `retention`.
async fn purge_expired(core: &Core, retention: Duration) {
    let before = Timestamp::now().plus_millis(-i64::try_from(retention.as_millis()).unwrap_or(i64::MAX));
    let ids = core.shared.directory.page(None, usize::MAX);
    let purges = stream::iter(ids).map(|entry| {
        let broker = Arc::clone(&core.shared.broker);
        async move {
            let id = &entry.record.client_id;
            match broker.purge_dead(id, Some(before)).await {
                Ok(0) => {}
                Ok(purged) => log::info!("{purged} dead letters of {id} were too old and are gone"),
                Err(error) => log::debug!("dead letters of {id} are purged later: {error}"),
            }
        }
    });
    purges.buffer_unordered(PURGES_MAX).collect::<()>().await;
}

impl Actor for ClientRegistry {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        // A retention that is shorter than these, as in tests, is looked after as often.
        ctx.run_later(Duration::from_secs(FIRST_PURGE_AFTER_S).min(self.retention), Self::purge);
        ctx.run_interval(Duration::from_secs(PURGE_EVERY_S).min(self.retention), Self::purge);
        ctx.run_interval(Duration::from_secs(SWEEP_EVERY_S), |this, _| {
            if !this.core.leftovers.borrow().is_empty() && this.core.check_open().is_ok() {
                actix_rt::spawn(delete::sweep(Rc::clone(&this.core)));
            }
        });
    }
}

impl Handler<CreateClient> for ClientRegistry {
    type Result = ResponseFuture<Result<Created, RegistryError>>;

    fn handle(&mut self, request: CreateClient, _: &mut Self::Context) -> Self::Result {
        self.operate(|core| create::create(core, request))
    }
}

impl Handler<PatchClient> for ClientRegistry {
    type Result = ResponseFuture<Result<Patched, RegistryError>>;

    fn handle(&mut self, request: PatchClient, _: &mut Self::Context) -> Self::Result {
        self.operate(|core| change::patch(core, request))
    }
}

impl Handler<DeleteClient> for ClientRegistry {
    type Result = ResponseFuture<Result<(), RegistryError>>;

    fn handle(&mut self, DeleteClient(id): DeleteClient, _: &mut Self::Context) -> Self::Result {
        self.operate(|core| delete::delete(core, id))
    }
}

impl Handler<RotateSecret> for ClientRegistry {
    type Result = ResponseFuture<Result<Rotated, RegistryError>>;

    fn handle(&mut self, request: RotateSecret, _: &mut Self::Context) -> Self::Result {
        self.operate(|core| change::rotate(core, request))
    }
}

impl Handler<DisableWebhook> for ClientRegistry {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, request: DisableWebhook, _: &mut Self::Context) -> Self::Result {
        self.operate(|core| change::disable_webhook(core, request))
    }
}

impl Handler<GetWebhookSecrets> for ClientRegistry {
    type Result = Option<WebhookSecrets>;

    fn handle(&mut self, GetWebhookSecrets(id): GetWebhookSecrets, _: &mut Self::Context) -> Self::Result {
        self.core.stored(&id).ok()?.webhook_secrets
    }
}

impl Handler<GetActorStates> for ClientRegistry {
    type Result = Option<ActorStates>;

    fn handle(&mut self, GetActorStates(id): GetActorStates, _: &mut Self::Context) -> Self::Result {
        self.core.states(&id)
    }
}

impl Handler<GetReadiness> for ClientRegistry {
    type Result = MessageResult<GetReadiness>;

    fn handle(&mut self, _: GetReadiness, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.core.readiness())
    }
}

impl Handler<GetActorCensus> for ClientRegistry {
    type Result = MessageResult<GetActorCensus>;

    fn handle(&mut self, _: GetActorCensus, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.core.census())
    }
}

impl Handler<ChildEvent> for ClientRegistry {
    type Result = ();

    fn handle(&mut self, event: ChildEvent, _: &mut Self::Context) {
        // Borrows end while unwinding, and what was half decided is decided again with the client's next news.
        let heard = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.core.hear(&event)));
        if heard.is_err() {
            log::error!("the registry panicked over news of the {}", event.identity);
        }
    }
}

impl Handler<InjectPanic> for ClientRegistry {
    type Result = bool;

    fn handle(&mut self, request: InjectPanic, _: &mut Self::Context) -> Self::Result {
        self.core.inject_panic(request.client.as_ref(), request.kind)
    }
}

impl Handler<Shutdown> for ClientRegistry {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, Shutdown { within }: Shutdown, _: &mut Self::Context) -> Self::Result {
        let core = Rc::clone(&self.core);
        Box::pin(async move { core.shut_down(within).await })
    }
}
