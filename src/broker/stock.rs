//! What lies in a broker, message by message: how it moves house. See [`crate::migrate`], which no router runs beside.
//!
//! A [`Stock`] is read from the front of each queue, batch by batch. What a batch holds stays where it is until
//! [`Batch::remove`], which is called when the other stock has it for good. Killed in between, the batch is read again:
//! at least once, under the same ids.

use async_trait::async_trait;

use super::{BrokerError, DeadLetter, Payload, Queue};
use crate::client::{ClientId, ClientRecord};
use crate::time::Timestamp;

/// Somewhere to read from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Shelf {
    /// A queue.
    Queue(Queue),
    /// A client's dead letters.
    Dead(ClientId),
    /// What is delayed for this many seconds and lies apart from its queue meanwhile (RabbitMQ).
    Retry(u64),
}

impl std::fmt::Display for Shelf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Queue(queue) => queue.fmt(f),
            Self::Dead(client) => write!(f, "{client}-dead"),
            Self::Retry(seconds) => write!(f, "soar-retry-{seconds}"),
        }
    }
}

/// What a message is, for people who count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// In an outbox.
    Outbox,
    /// In a notify queue.
    Notify,
    /// In an inbox, ready.
    Inbox,
    /// Waiting for its time, wherever it waits.
    Delayed,
    /// A dead letter.
    Dead,
    /// In `soar-publish`.
    Publish,
    /// In `soar-unrouted`.
    Unrouted,
}

impl Kind {
    /// Every kind, in the order in which they are shown.
    pub const ALL: [Self; 7] =
        [Self::Outbox, Self::Notify, Self::Inbox, Self::Delayed, Self::Dead, Self::Publish, Self::Unrouted];

    /// Its name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Outbox => "outbox",
            Self::Notify => "notify",
            Self::Inbox => "inbox",
            Self::Delayed => "delayed",
            Self::Dead => "dead",
            Self::Publish => "publish",
            Self::Unrouted => "unrouted",
        }
    }
}

/// One message with all that is known of it, and where it belongs.
#[derive(Debug, Clone)]
pub enum Parcel {
    /// It lies in a queue.
    Message {
        /// Which.
        queue: Queue,
        /// The message.
        payload: Payload,
        /// How often it was handed out.
        deliveries: u32,
        /// Attempts noted by the last delay.
        attempts: u32,
        /// Since when it waits there.
        since: Timestamp,
        /// Not to be handed out before this.
        due: Option<Timestamp>,
    },
    /// It is a dead letter of this client.
    Dead(ClientId, DeadLetter),
}

impl Parcel {
    /// What it counts as.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Dead(..) => Kind::Dead,
            Self::Message { due: Some(_), .. } => Kind::Delayed,
            Self::Message { queue, .. } => match queue {
                Queue::Outbox(_) => Kind::Outbox,
                Queue::Notify(_) => Kind::Notify,
                Queue::Inbox(_) => Kind::Inbox,
                Queue::Publish => Kind::Publish,
                Queue::Unrouted => Kind::Unrouted,
            },
        }
    }
}

/// A parcel as it was read.
#[derive(Debug, Clone)]
pub struct Item {
    /// What it is.
    pub parcel: Parcel,
    /// What it is recognised by when it is read again.
    pub mark: Mark,
    /// It was handed out before, so the other stock may have it.
    pub again: bool,
}

/// A digest of a message as it lies in its queue; the same for copies that nothing tells apart.
pub type Mark = [u8; 32];

/// A sender's own id, as it is remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnId {
    /// Half of SHA-256 over sender, a zero byte, and id.
    pub hash: [u8; 16],
    /// When the message was accepted, in milliseconds since the epoch.
    pub at_ms: i64,
    /// False while a message with it waits in its sender's outbox or notify queue.
    pub routed: bool,
}

/// The front of a shelf. Dropped, it stays there.
#[async_trait]
pub trait Batch: Send {
    /// Its messages, in order. Fewer than it removes, when some are for nobody any more.
    fn items(&self) -> &[Item];

    /// Whether this is all that there is to see: the shelf is empty.
    fn is_end(&self) -> bool;

    /// Removes them where they were, durably.
    async fn remove(self: Box<Self>) -> Result<(), BrokerError>;
}

/// Everything that lies in one broker.
#[async_trait]
pub trait Stock: Send + Sync {
    /// What is there: shelves that are not empty, with how much is on them.
    async fn shelves(&self) -> Result<Vec<(Shelf, u64)>, BrokerError>;

    /// Makes it ready to take what belongs to these clients: queues, limits and bindings are theirs, and whoever else is
    /// known, and holds nothing, is forgotten.
    async fn prepare(&self, clients: &[ClientRecord]) -> Result<(), BrokerError>;

    /// Deletes what is left of a client whose creation or deletion was cut short.
    async fn delete_client(&self, client: &ClientId) -> Result<(), BrokerError>;

    /// The front of a shelf: a bounded number of messages, and about as many bytes.
    async fn read(&self, shelf: &Shelf) -> Result<Box<dyn Batch>, BrokerError>;

    /// Appends what was read from a shelf of the other stock; resolves when it is durable.
    async fn put(&self, from: &Shelf, items: &[Item]) -> Result<(), BrokerError>;

    /// Own ids that are remembered, at most `limit`, after the one that was returned last.
    async fn own_ids(&self, after: Option<OwnIdCursor>, limit: usize) -> Result<OwnIdPage, BrokerError>;

    /// Forgets all own ids, before those of the other stock come in.
    async fn forget_own_ids(&self) -> Result<(), BrokerError>;

    /// Remembers own ids of the other stock; those that are known stay as they are.
    async fn put_own_ids(&self, ids: Vec<OwnId>) -> Result<(), BrokerError>;

    /// All that was here is elsewhere: notes about it go.
    async fn emptied(&self) -> Result<(), BrokerError>;

    /// Closes it.
    async fn close(&self);
}

/// Where a page of own ids ended.
pub type OwnIdCursor = (i64, [u8; 16]);

/// A page of own ids; the cursor is `None` at the end.
pub type OwnIdPage = (Vec<OwnId>, Option<OwnIdCursor>);
