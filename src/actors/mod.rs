//! The actors: every pipeline of the backbone, and who sends what to whom.
//!
//! ```text
//!                 HTTP ── CreateClient, PatchClient, DeleteClient, RotateSecret, GetReadiness … ──► ClientRegistry
//!                                                                                                   │        ▲
//!     (supervision: starts each actor on an arbiter, awaits its end, reports it)   Control, Rebind  │        │ ChildEvent
//!                                                                                                   ▼        │
//!   per client  {id}-outbox ─► Forwarder ─► soar-publish      {id}-notify ─► Broadcaster ─► soar-broadcast ──┤
//!               Subscriber: holds the queues and the inbox's bindings         Pusher: {id}-inbox ─► webhook ─┤
//!   one         soar-publish ─► Publisher ─► soar-topic ──────────────────────────────────────────────────────┘
//! ```
//!
//! Messages of clients never travel through a mailbox: they are consumed from the broker's queues, in batches bounded by
//! a prefetch, and are settled there. Mailboxes carry control only. So a mailbox is never the home of a message that was
//! accepted, and an actor that dies takes nothing with it: what it held unsettled goes back to its queue.
//!
//! Order: one actor consumes a queue, settles a batch before it looks at the next, and forwards a batch in its order. A
//! batch that cannot be forwarded goes back, with all that the consumer had prefetched, before the queue is consumed
//! again.

mod broadcaster;
mod forwarder;
mod pipeline;
mod publisher;
pub mod pusher;
pub mod registry;
mod subscriber;
pub mod supervision;

use std::fmt;
use std::sync::Arc;

use actix::prelude::*;
use tokio::sync::Semaphore;

use crate::broker::Broker;
use crate::client::ClientId;
use crate::directory::Directory;
use crate::telemetry::Telemetry;

pub(crate) use pipeline::describe;
use registry::ClientRegistry;
use supervision::Exit;

/// Calls that set an actor up (declare, bind, consume) and may be under way at once. Ten thousand clients start
/// together; the broker is not to be flooded by that.
const SETUPS_MAX: usize = 128;

/// The kinds of actors that are supervised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ActorKind {
    /// Outbox to `soar-publish`.
    Forwarder,
    /// Notify queue to `soar-broadcast`.
    Broadcaster,
    /// The client's queues and its inbox's bindings.
    Subscriber,
    /// Inbox to webhook.
    Pusher,
    /// `soar-publish` to `soar-topic`.
    Publisher,
}

impl ActorKind {
    /// The kinds of which each client has one, in the order in which the registry keeps them.
    pub const PER_CLIENT: [Self; 4] = [Self::Forwarder, Self::Broadcaster, Self::Subscriber, Self::Pusher];

    /// Its name for people and metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Forwarder => "forwarder",
            Self::Broadcaster => "broadcaster",
            Self::Subscriber => "subscriber",
            Self::Pusher => "pusher",
            Self::Publisher => "publisher",
        }
    }
}

impl fmt::Display for ActorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One life of one actor: what it is, whose, and the how manyeth of its kind. Late news of an earlier life are told
/// from those of the present one by the generation.
#[derive(Debug, Clone)]
pub struct Identity {
    /// What it is.
    pub kind: ActorKind,
    /// Whose; `None` for the publisher.
    pub client: Option<ClientId>,
    /// Grows with every start.
    pub generation: u32,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.client {
            Some(client) => write!(f, "{} of {client}", self.kind),
            None => write!(f, "{}", self.kind),
        }
    }
}

/// What the registry tells an actor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Message)]
#[rtype(result = "()")]
pub enum Control {
    /// Finish what is being settled, then stop.
    Stop,
    /// For tests: panic, here and now.
    Panic,
}

impl Control {
    /// What every actor does when it is told so.
    pub(crate) fn obey<A: Actor<Context = Context<A>>>(self, identity: &Identity, ctx: &mut Context<A>) {
        match self {
            Self::Stop => ctx.stop(),
            Self::Panic => panic!("{identity} was told to panic"),
        }
    }
}

/// What happens to an actor, as the registry is told.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(crate) struct ChildEvent {
    pub(crate) identity: Identity,
    pub(crate) what: ChildNews,
}

#[derive(Debug)]
pub(crate) enum ChildNews {
    /// It is at work.
    Ready,
    /// It waits for the broker.
    Waiting,
    /// Its queue is not there: somebody deleted it behind the backbone's back.
    QueueMissing,
    /// It has ended.
    Exited(Exit),
}

/// What all actors share.
pub struct Shared {
    /// The broker.
    pub broker: Arc<dyn Broker>,
    /// The clients as they are now.
    pub directory: Arc<Directory>,
    /// Metrics and traces.
    pub telemetry: Telemetry,
    /// `SOAR_MAX_MESSAGE_BYTES`, for what comes by AMQP.
    pub max_message_bytes: usize,
    /// See [`SETUPS_MAX`].
    setups: Semaphore,
    registry: Addr<ClientRegistry>,
}

impl Shared {
    fn new(
        broker: Arc<dyn Broker>,
        directory: Arc<Directory>,
        telemetry: Telemetry,
        max_message_bytes: usize,
        registry: Addr<ClientRegistry>,
    ) -> Self {
        Self { broker, directory, telemetry, max_message_bytes, setups: Semaphore::new(SETUPS_MAX), registry }
    }

    /// Tells the registry that an actor is at work.
    pub fn report_ready(&self, identity: &Identity) {
        self.report(identity.clone(), ChildNews::Ready);
    }

    /// Tells the registry that an actor waits for the broker, or for whatever else it cannot work without.
    pub fn report_waiting(&self, identity: &Identity) {
        self.report(identity.clone(), ChildNews::Waiting);
    }

    /// Never waits, whatever is in the registry's mailbox: that is bounded by the number of actors, each of which has a
    /// few events at most under way. When the registry is gone, nobody needs to know.
    #[expect(clippy::disallowed_methods, reason = "bounded by the number of actors, as said above")]
    pub(crate) fn report(&self, identity: Identity, what: ChildNews) {
        self.registry.do_send(ChildEvent { identity, what });
    }

    /// Runs a set-up call (declare, bind, consume) when it is its turn.
    pub async fn set_up<T>(&self, call: impl Future<Output = T>) -> T {
        let _turn = self.setups.acquire().await.expect("the semaphore is never closed");
        call.await
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("broker", &self.broker.name()).finish_non_exhaustive()
    }
}
