//! The broker: queues, two exchanges, and the promises that every pipeline builds on.
//!
//! Two brokers stand behind [`Broker`]: `embedded` (durable, in the process) and `amqp` (RabbitMQ). Both
//! pass one conformance suite, `tests/it/conformance.rs`, which has a test of each number below.
//!
//! # Guarantees
//!
//! - **G1 durable publish.** [`Broker::publish`] resolves `Ok` only when every message of the batch would survive a
//!   kill of the process and of the broker. All of a batch is taken, or none.
//! - **G2 no loss.** A message leaves its queue only when it was settled for good: completed, forwarded (durable at
//!   its target first), delayed or dead-lettered (likewise). A [`Delivery`] that is dropped, or whose consumer goes
//!   away, comes back.
//! - **G3 order.** One consumer sees a queue's messages in the order in which they were published, as long as nothing
//!   comes back; forwarding a batch keeps its order.
//! - **G4 exchanges.** A message forwarded to [`Target::Topic`] lands once in every inbox that has at least one
//!   matching pattern (RabbitMQ's topic exchange, to the letter), and in `soar-unrouted` when there is none; one
//!   forwarded to [`Target::Broadcast`] lands once in every inbox.
//! - **G5 own ids.** A sender's own id, published again within the dedup window, is reported as a duplicate and routed
//!   once. Survives a restart. A refused publish leaves no trace of its ids.
//! - **G6 prefetch.** A consumer never holds more unsettled deliveries than its prefetch.
//! - **G7 deliveries.** [`Delivery::deliveries`] counts from 1 and grows each time the message comes back;
//!   [`Delivery::attempts`] is what the last [`Outcome::Delay`] set, and survives restarts.
//! - **G8 delay.** A delayed message is handed out no earlier than asked, survives restarts, and holds no other up.
//! - **G9 leases.** A pulled message that is not settled within its lease comes back; its receipt is then unknown, as
//!   is one that was settled before, or that is another inbox's.
//! - **G10 auto.** What a pull in [`PullMode::Auto`] hands over is gone for good when the pull resolves.
//! - **G11 dead letters.** A dead letter keeps message, origin, reason, attempts and time; replayed, it is back in the
//!   queue that it died in; purged, it is gone.
//! - **G12 limits.** Past `max_inbox_messages` the oldest become dead letters (`inbox_full`); past `inbox_ttl_s` they
//!   do (`expired`). Nothing is dropped without a dead letter.
//! - **G13 idempotent topology.** Declaring what exists, binding what is bound and deleting what is gone succeed, and
//!   what they did would survive a kill when they resolve.
//! - **G14 bounded.** Memory is bounded whatever the backlog; a publisher that outruns the broker waits or is refused.
//!
//! Brokers report the steps of each message ([`crate::telemetry::Step`]) to the telemetry; their callers need not.
//!
//! Futures may be dropped at any time: a publish that was begun is carried out or not at all, and a delivery that
//! was taken but not returned comes back (or, for a pull in [`PullMode::Auto`], may be gone: at most once).

pub mod amqp;
pub mod embedded;
pub mod stock;
mod turn;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use serde::Serialize;

use crate::client::{ClientId, Limits};
use crate::envelope::{Message, SharedMessage};
use crate::secret::SaltedHash;
use crate::time::Timestamp;
use crate::topic::Pattern;

pub use turn::{GivenOn, Turn};

/// A queue by what it is for. Its name on a real broker is its [`Display`](fmt::Display) form (contract, section 6).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Queue {
    /// `{id}-outbox`: what the client sends under topics.
    Outbox(ClientId),
    /// `{id}-notify`: what the client sends to everyone.
    Notify(ClientId),
    /// `{id}-inbox`: what the client receives.
    Inbox(ClientId),
    /// `soar-publish`: between forwarders and publishers.
    Publish,
    /// `soar-unrouted`: what no pattern matched, the last of it.
    Unrouted,
}

impl fmt::Display for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Outbox(id) => write!(f, "{id}-outbox"),
            Self::Notify(id) => write!(f, "{id}-notify"),
            Self::Inbox(id) => write!(f, "{id}-inbox"),
            Self::Publish => f.write_str("soar-publish"),
            Self::Unrouted => f.write_str("soar-unrouted"),
        }
    }
}

/// Where a delivery is forwarded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The queue `soar-publish`.
    Publish,
    /// The topic exchange `soar-topic`, under the message's topic.
    Topic,
    /// The fanout exchange `soar-broadcast`.
    Broadcast,
}

/// Why a message became a dead letter (contract, section 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DeadReason {
    /// The last webhook attempt failed.
    DeliveryFailed,
    /// It waited longer than `inbox_ttl_s`.
    Expired,
    /// The inbox was at `max_inbox_messages`, and it was the oldest.
    InboxFull,
    /// The receiver refused it (`nack` with `dead`).
    Rejected,
    /// An AMQP client sent what cannot be read as a message.
    InvalidMessage,
}

impl DeadReason {
    /// Every reason, for metrics and documents.
    pub const ALL: [Self; 5] =
        [Self::DeliveryFailed, Self::Expired, Self::InboxFull, Self::Rejected, Self::InvalidMessage];

    /// The name that the API shows.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::DeliveryFailed => "delivery_failed",
            Self::Expired => "expired",
            Self::InboxFull => "inbox_full",
            Self::Rejected => "rejected",
            Self::InvalidMessage => "invalid_message",
        }
    }

    /// Reads what [`DeadReason::as_str`] wrote.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == name)
    }
}

/// What was consumed.
#[derive(Debug, Clone)]
pub enum Payload {
    /// A message that the backbone accepted before.
    Message(SharedMessage),
    /// What a client put into its outbox or notify queue by AMQP, not read yet.
    Foreign(Foreign),
}

impl Payload {
    /// The message, when it is one.
    pub fn message(&self) -> Option<&SharedMessage> {
        match self {
            Self::Message(message) => Some(message),
            Self::Foreign(_) => None,
        }
    }
}

/// A client's own AMQP publish, as it came: only the properties that the backbone knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreign {
    /// The body, which should be `{"topic":…,"message":…,"id"?}`.
    pub body: Bytes,
    /// The AMQP property `message_id`.
    pub message_id: Option<String>,
    /// The header `traceparent`.
    pub traceparent: Option<String>,
}

/// How a delivery ends.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// Done: remove it.
    Complete,
    /// Durable at the target first, then removed here. The message is the delivery's own, or what was read from a
    /// [`Foreign`] one.
    Forward(Target, SharedMessage),
    /// Back to the front of its queue, where the broker can.
    Requeue,
    /// Back into its queue after this time, with this many attempts on its count.
    Delay {
        /// How long to wait, at most 30 days.
        delay: Duration,
        /// What [`Delivery::attempts`] will say.
        attempts: u32,
    },
    /// Into the owner's dead letters.
    Dead {
        /// Why.
        reason: DeadReason,
        /// Attempts made in all.
        attempts: u32,
    },
}

/// One delivery's end, for the broker that handed it out.
#[derive(Debug)]
pub struct Settlement {
    /// The consumer's name for the delivery.
    pub tag: u64,
    /// What was delivered.
    pub payload: Payload,
    /// How it ends.
    pub outcome: Outcome,
}

/// The side of a consumer that settles; a broker implements it once per consumer.
#[async_trait]
pub trait Settle: Send + Sync {
    /// Settles deliveries of this consumer by their tags, in order; calls that overlap, in the order in which they were
    /// first polled. Resolves when [`Outcome::Forward`]ed,
    /// [`Outcome::Delay`]ed and [`Outcome::Dead`] ones are as safe as they were before (G2); completions may become
    /// durable later. On an error the unsettled ones come back by themselves.
    async fn settle(&self, settlements: Vec<Settlement>) -> Result<(), BrokerError>;

    /// Gives one back to the front of its queue without waiting: called when a [`Delivery`] is dropped.
    fn give_back(&self, tag: u64);
}

/// One message handed out to a consumer. It is settled once, through [`settle`] or [`Delivery::settle`], which take
/// it; dropped unsettled, it goes back to its queue.
pub struct Delivery {
    /// What came.
    pub payload: Payload,
    /// How often it was handed out, this time included (G7).
    pub deliveries: u32,
    /// Attempts that the last [`Outcome::Delay`] noted; 0 at first.
    pub attempts: u32,
    tag: u64,
    /// `None` once settled.
    source: Option<Arc<dyn Settle>>,
}

impl Delivery {
    /// For brokers: a delivery of the consumer behind `source`, known to it by `tag`.
    pub fn new(payload: Payload, deliveries: u32, attempts: u32, tag: u64, source: Arc<dyn Settle>) -> Self {
        Self { payload, deliveries, attempts, tag, source: Some(source) }
    }

    /// Settles it. See [`Settle::settle`].
    ///
    /// # Errors
    /// When the broker could not; the delivery then comes back.
    pub async fn settle(self, outcome: Outcome) -> Result<(), BrokerError> {
        settle(vec![(self, outcome)]).await
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if let Some(source) = self.source.take() {
            source.give_back(self.tag);
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery").field("tag", &self.tag).field("deliveries", &self.deliveries).finish_non_exhaustive()
    }
}

/// Settles several deliveries of **one** consumer, in order, in one go.
///
/// # Errors
/// When the broker could not settle all; those that it could not come back.
///
/// # Panics
/// When the deliveries are of different consumers: a bug of the caller.
pub async fn settle(outcomes: Vec<(Delivery, Outcome)>) -> Result<(), BrokerError> {
    let mut source: Option<Arc<dyn Settle>> = None;
    let mut settlements = Vec::with_capacity(outcomes.len());
    for (mut delivery, outcome) in outcomes {
        let own = delivery.source.take().expect("a delivery is settled once: settling takes it");
        match &source {
            None => source = Some(own),
            Some(first) => assert!(Arc::ptr_eq(first, &own), "one settle call, one consumer"),
        }
        settlements.push(Settlement { tag: delivery.tag, payload: delivery.payload.clone(), outcome });
    }
    match source {
        Some(source) => source.settle(settlements).await,
        None => Ok(()),
    }
}

/// A standing subscription to one queue.
#[async_trait]
pub trait Consume: Send {
    /// Waits for at least one delivery and returns up to `max` (at least 1), oldest first; `None` when the queue was
    /// deleted or the broker closed. Safe to drop: nothing is lost.
    async fn next(&mut self, max: usize) -> Option<Vec<Delivery>>;

    /// Changes the prefetch: at most this many unsettled deliveries from now on (what is out stays out). 0 pauses.
    fn set_prefetch(&self, prefetch: u32);
}

/// See [`Consume`]. Dropped, its unsettled deliveries stay valid until they are settled or dropped themselves.
pub type Consumer = Box<dyn Consume>;

/// How [`Broker::pull`] hands messages over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullMode {
    /// Removed as they are handed over: at most once.
    Auto,
    /// Kept until settled by receipt; back after this long.
    Lease(Duration),
}

/// An opaque string that settles one leased delivery.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(transparent)]
pub struct Receipt(pub String);

/// One pulled message.
#[derive(Debug, Clone)]
pub struct Pulled {
    /// The message.
    pub message: SharedMessage,
    /// How often it was handed out, this time included.
    pub deliveries: u32,
    /// Settles it; `None` in [`PullMode::Auto`].
    pub receipt: Option<Receipt>,
}

/// How a pulled message is settled by receipt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullOutcome {
    /// Remove it.
    Ack,
    /// Back into the inbox, at once or after this long.
    Nack(Option<Duration>),
    /// Into the dead letters, as [`DeadReason::Rejected`].
    Reject,
}

/// What [`Broker::publish`] took.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Published {
    /// For each message of the batch, in order: whether its own id had been seen before (G5).
    pub duplicates: Vec<bool>,
}

/// Messages in a client's queues: waiting, handed out and delayed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Depths {
    /// In the outbox.
    pub outbox: u64,
    /// In the notify queue.
    pub notify: u64,
    /// In the inbox.
    pub inbox: u64,
    /// Dead letters.
    pub dead: u64,
}

/// The queue in which a dead letter died.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// It could not be delivered to the client.
    Inbox,
    /// The client sent it under a topic, and it could not be read.
    Outbox,
    /// The client sent it to everyone, and it could not be read.
    Notify,
}

/// A message that could not be delivered, or not be read.
#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// Its own id, not the message's; also the paging cursor.
    pub id: String,
    /// Where it died.
    pub origin: Origin,
    /// Why.
    pub reason: DeadReason,
    /// Delivery attempts made: calls of the webhook, or how often whoever rejected it was handed it.
    pub attempts: u32,
    /// When.
    pub died_at: Timestamp,
    /// The message, or the raw bytes that could not be read.
    pub payload: Payload,
}

/// A page of dead letters, oldest first.
#[derive(Debug, Default)]
pub struct DeadPage {
    /// The dead letters.
    pub dead_letters: Vec<DeadLetter>,
    /// The cursor for the next page; `None` at the end.
    pub next: Option<String>,
}

/// Whether the broker can take and hand out messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It can.
    Ready,
    /// It can hand out, not take: no disk space, or a broker alarm. Says why, for operators.
    Blocked(String),
    /// Neither. Says why, for operators.
    Unreachable(String),
}

/// A message router's storage. See the module's guarantees.
#[async_trait]
pub trait Broker: Send + Sync + 'static {
    /// `embedded` or `amqp`, for people.
    fn name(&self) -> &'static str;

    /// Whether it can work now; cheap.
    fn health(&self) -> Health;

    /// Creates what a client needs, or finds it there (G13), and sets its limits.
    async fn declare_client(&self, client: &ClientId, limits: &Limits) -> Result<(), BrokerError>;

    /// Makes these, and only these, the inbox's bindings to the topic exchange (G13). The inbox is bound to the
    /// broadcast exchange as long as it exists.
    async fn bind(&self, client: &ClientId, patterns: &[Pattern]) -> Result<(), BrokerError>;

    /// Deletes the client's queues with all that they hold (G13).
    async fn delete_client(&self, client: &ClientId) -> Result<(), BrokerError>;

    /// Lets the client log in at the broker itself with the secret that this is the hash of, and from now on with no
    /// other, where the broker has users of its own (RabbitMQ, when its management API is known). Elsewhere nothing is
    /// to be done. [`Broker::delete_client`] takes the user away.
    async fn set_password(&self, _client: &ClientId, _password: &SaltedHash) -> Result<(), BrokerError> {
        Ok(())
    }

    /// Takes the client's login at the broker away, so that it can write nothing more; [`Broker::set_password`] gives it
    /// back.
    async fn lock_out(&self, _client: &ClientId) -> Result<(), BrokerError> {
        Ok(())
    }

    /// At the start: the passwords of all clients that there are. Users that are missing or differ are made in the
    /// background, now and whenever the broker has lost them; those of clients that are gone are deleted.
    fn expect_passwords(&self, _passwords: Vec<(ClientId, SaltedHash)>) {}

    /// Appends messages to a queue, all or none (G1, G5). Messages of one call keep their order (G3).
    async fn publish(&self, queue: &Queue, messages: Vec<Message>) -> Result<Published, BrokerError> {
        self.publish_in_turn(queue, messages, Turn::default()).await
    }

    /// The same for a source that has more to publish and does not wait for the result of each: what is published once
    /// `turn` was given on lies behind these messages (G3).
    async fn publish_in_turn(
        &self,
        queue: &Queue,
        messages: Vec<Message>,
        turn: Turn,
    ) -> Result<Published, BrokerError>;

    /// Subscribes to a queue (G3, G6). Several consumers of one queue share its messages.
    async fn consume(&self, queue: &Queue, prefetch: u32) -> Result<Consumer, BrokerError>;

    /// Takes up to `max` messages from the client's inbox, oldest first (G9, G10); waits up to `wait` for the first,
    /// and resolves to none when there is none.
    async fn pull(
        &self,
        client: &ClientId,
        max: usize,
        wait: Duration,
        mode: PullMode,
    ) -> Result<Vec<Pulled>, BrokerError>;

    /// Settles pulled messages; returns the receipts that are not, or no longer, valid (G9).
    async fn settle_pulled(
        &self,
        client: &ClientId,
        receipts: Vec<Receipt>,
        outcome: PullOutcome,
    ) -> Result<Vec<Receipt>, BrokerError>;

    /// How much is in the client's queues.
    async fn depths(&self, client: &ClientId) -> Result<Depths, BrokerError>;

    /// Messages in the client's outbox and notify queue, to be asked when nothing consumes them any more: what the last
    /// consumers held is waited for, and none that is on its way between a queue and a consumer is overlooked. Where the
    /// broker knows of a consumer that may hold some unseen, there is at least one.
    async fn left_to_forward(&self, client: &ClientId) -> Result<u64, BrokerError> {
        let depths = self.depths(client).await?;
        Ok(depths.outbox + depths.notify)
    }

    /// When the message that is in the queue longest came into it, where the broker knows that without reading the
    /// queue; for metrics.
    async fn oldest(&self, _queue: &Queue) -> Result<Option<Timestamp>, BrokerError> {
        Ok(None)
    }

    /// Dead letters, oldest first, at most `limit`, after the cursor.
    async fn dead_letters(&self, client: &ClientId, after: Option<&str>, limit: usize)
    -> Result<DeadPage, BrokerError>;

    /// Puts dead letters back into the queue they died in (G11): those with these ids, or all. Returns how many.
    async fn replay_dead(&self, client: &ClientId, ids: Option<&[String]>) -> Result<u64, BrokerError>;

    /// Deletes a client's dead letters that died before this time (all, when `None`). Returns how many.
    async fn purge_dead(&self, client: &ClientId, before: Option<Timestamp>) -> Result<u64, BrokerError>;

    /// Messages in the internal queues `soar-publish` and `soar-unrouted`, by name.
    async fn internal_depths(&self) -> Result<Vec<(&'static str, u64)>, BrokerError>;

    /// Takes no more work, makes what was taken durable, and stops. Consumers end.
    async fn close(&self);
}

/// What kind of failure a [`BrokerError`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BrokerErrorKind {
    /// The broker is away, or went away; nothing is known to be taken.
    Unavailable,
    /// The broker takes no messages now (alarm).
    Blocked,
    /// No room on the disk; nothing was taken.
    DiskFull,
    /// No such queue.
    NotFound,
    /// The broker is closing.
    Closed,
    /// Something exists with other properties; the text says what and the way out.
    Conflict,
    /// A bug or a broken file.
    Internal,
}

/// A failed broker call: kind, what was being done, and the cause.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{action}")]
pub struct BrokerError {
    /// What kind of failure it is.
    pub kind: BrokerErrorKind,
    /// What was being done, with its input: `append to queue noc-c2-outbox`.
    pub action: String,
    /// The cause, if there is one below.
    #[source]
    pub source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl BrokerError {
    /// An error without a deeper cause.
    pub fn new(kind: BrokerErrorKind, action: impl Into<String>) -> Self {
        Self { kind, action: action.into(), source: None }
    }

    /// The same with its cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.source = Some(Arc::new(source));
        self
    }

    /// Whether the same call may succeed later without anyone changing anything but the broker's state.
    pub fn is_retryable(&self) -> bool {
        match self.kind {
            BrokerErrorKind::Unavailable | BrokerErrorKind::Blocked | BrokerErrorKind::DiskFull => true,
            BrokerErrorKind::NotFound
            | BrokerErrorKind::Closed
            | BrokerErrorKind::Conflict
            | BrokerErrorKind::Internal => false,
        }
    }
}
