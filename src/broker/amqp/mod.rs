//! RabbitMQ behind the broker's trait, over AMQP 0-9-1.
//!
//! # Layout
//!
//! - `address`, `session`, `link`: where RabbitMQ is, the five connections to it, and the loop that makes them anew.
//!   `runtime` is the thread on which all of that runs.
//! - `topology`: names and arguments of everything that is declared. `wire`: how a message looks on RabbitMQ.
//! - `lane`: publishing with confirms, `window` what is on its way. `publish` takes messages from senders, `settle` moves deliveries on, both with
//!   `dedup` for own ids.
//! - `intake`: the channels that all consumers share, with `acks`. `consumer` is a standing one; `pull` makes long
//!   polls and leases of one; `harvest` looks at the front of a queue, for `dead` letters and `limits`. `held` is a
//!   delivery in this process, `back` how it goes back, and `returned` how order holds then.
//! - `clients`, `state`: the clients that are known, in memory and in the file. `admin` declares, binds and deletes them;
//!   `seal` sees to it that a new queue survives a kill; `users` gives them users of their own, through `management`.
//! - `chores`: what is done from time to time.
//! - `stock`: everything that lies in RabbitMQ, for moving it to another broker and back.
//! - `bare`: the same three queues without a router, for the bench to compare with.
//!
//! # Invariants
//!
//! - Nothing is acknowledged before the next queue has confirmed it.
//! - After any break everything is declared again before messages flow.
//! - What came on a channel is settled there or nowhere: a delivery of an earlier session cannot touch a later one.
//! - Connections and channels do not grow with clients. Memory: prefetches, windows of confirms, leases (bounded in
//!   bytes), and a few words for each client.
//!
//! # What is weaker than with the embedded broker
//!
//! A batch that was cut off by a break may be taken in part: the sender is told to send it again under the same ids.
//! Acknowledgements are not confirmed by the protocol: those of the last milliseconds before RabbitMQ *and* this process
//! are killed at once may be lost, and what they settled comes again. From hop to hop they may be gathering in this
//! process as well, so that a message is forwarded again, under its id, when that alone is killed. And a channel of
//! RabbitMQ sends a quorum queue 32 of them and keeps the others until it has an answer: when the router is stopped just
//! then they are lost with the channel, and what they settled comes again. How often a message was handed out is known
//! exactly while this process lives; after that by RabbitMQ's count, which classic queues do not have.

mod acks;
mod address;
mod admin;
mod back;
pub mod bare;
mod channel;
mod chores;
mod clients;
mod consumer;
mod dead;
mod dedup;
mod delay;
mod error;
mod hand;
mod harvest;
mod held;
mod intake;
mod lane;
mod limits;
mod link;
mod management;
mod publish;
mod pull;
mod returned;
mod runtime;
mod seal;
mod session;
mod settle;
mod state;
mod stock;
mod topology;
mod users;
mod window;
mod wire;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};

use self::address::Addresses;
use self::clients::{Client, Clients};
use self::consumer::{AmqpConsumer, ConsumerCore};
use self::dedup::Dedup;
use self::error::db_error;
use self::held::ReturnMemory;
use self::intake::Intake;
use self::lane::Lane;
use self::link::Link;
use self::management::Management;
use self::pull::Puller;
use self::returned::Returned;
use self::runtime::AmqpThread;
use self::session::{Role, Session};
pub use self::stock::AmqpStock;
use self::users::Users;
use self::wire::Trusted;
use crate::broker::{
    Broker, BrokerError, BrokerErrorKind, Consumer, DeadPage, Depths, Health, Published, PullMode, PullOutcome, Pulled,
    Queue, Receipt, Turn,
};
use crate::client::{ClientId, Limits};
use crate::config::QueueType;
use crate::db::Db;
use crate::envelope::Message;
use crate::secret::SaltedHash;
use crate::telemetry::Telemetry;
use crate::time::Timestamp;
use crate::topic::Pattern;

/// Settings of the AMQP broker.
#[derive(Clone)]
pub struct Options {
    /// `amqp://…` or `amqps://…`; several, for the nodes of a cluster, with commas between. Holds a password.
    pub url: String,
    /// Type of the queues.
    pub queue_type: QueueType,
    /// The management API, when each client is to have a broker user of its own. May hold a password.
    pub management_url: Option<String>,
    /// For how long own ids are remembered.
    pub dedup_window: Duration,
    /// For how long a delivery stays unacknowledged before it is given back and taken again, whoever holds it:
    /// [`HELD_FOR`], or less.
    pub held_for: Duration,
}

/// A delivery must not stay unacknowledged for RabbitMQ's 30 minutes (`consumer_timeout`), or its channel is closed under
/// all who share it.
pub const HELD_FOR: Duration = Duration::from_secs(20 * 60);

impl Options {
    /// How often it is looked for what has been held for long.
    fn look_every(&self) -> Duration {
        self.held_for / 20
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { queue_type, dedup_window, .. } = self;
        let mut debug = f.debug_struct("Options");
        debug.field("queue_type", queue_type).field("dedup_window", dedup_window).finish_non_exhaustive()
    }
}

/// Publishing channels of each kind. A sender's messages always take the same one.
const LANES: usize = 4;

/// Channels that consumers share. Those of inboxes are more, because leases and webhooks hold deliveries for long, and
/// an acknowledgement costs RabbitMQ by what is outstanding on its channel.
const PIPELINE_INTAKES: usize = 8;
const INBOX_INTAKES: usize = 16;
const CHORE_INTAKES: usize = 2;

/// How long closing waits until what was handed to this process has been given back.
const GIVE_BACK_TIMEOUT: Duration = Duration::from_secs(3);

/// How long closing waits for what is on its way.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// What all parts of the broker share.
struct Shared {
    options: Options,
    addresses: Addresses,
    trusted: Trusted,
    users: Option<Users>,
    thread: AmqpThread,
    db: Db,
    telemetry: Telemetry,
    link: watch::Sender<Link>,
    clients: Clients,
    /// Consumers of queues that belong to no client.
    consumers: Mutex<Vec<Weak<ConsumerCore>>>,
    ingress: Vec<Lane>,
    /// The last one of each is for `soar-publish` alone.
    relay: Vec<Lane>,
    pipeline_intakes: Vec<Intake>,
    inbox_intakes: Vec<Intake>,
    /// For inboxes of clients that are set apart.
    apart_intake: Intake,
    chore_intakes: Vec<Intake>,
    returned: Arc<Returned>,
    /// Declaring the backbone's own again.
    internal_turn: tokio::sync::Mutex<()>,
    dedup: Dedup,
    memory: ReturnMemory,
    sealer: seal::Sealer,
    /// KiB of messages that may still wait for their confirm.
    pending: Arc<Semaphore>,
    /// Bytes of leased messages of all clients.
    leased_bytes: Arc<AtomicUsize>,
    /// Tells this process's receipts from those of another.
    nonce: u64,
    is_closing: AtomicBool,
}

/// Which of `count` a name belongs to.
fn share_of(name: &str, count: usize) -> usize {
    use std::hash::{Hash as _, Hasher as _};
    let mut hasher = std::hash::DefaultHasher::new();
    name.hash(&mut hasher);
    usize::try_from(hasher.finish() % count as u64).expect("less than a count")
}

impl Shared {
    /// The present session.
    fn session(&self, action: &str) -> Result<Arc<Session>, BrokerError> {
        self.link.borrow().session(action)
    }

    /// The present session, in which messages can be published.
    fn open_session(&self, action: &str) -> Result<Arc<Session>, BrokerError> {
        let session = self.session(action)?;
        match session.blocked() {
            Some(why) => Err(BrokerError::new(BrokerErrorKind::Blocked, format!("{action}: {why}"))),
            None => Ok(session),
        }
    }

    fn set_link(&self, link: Link) {
        // Once closed it stays so.
        self.link.send_if_modified(|current| {
            let open = !current.is_closed();
            if open {
                *current = link;
            }
            open
        });
    }

    fn is_closed(&self) -> bool {
        self.link.borrow().is_closed()
    }

    fn is_closing(&self) -> bool {
        self.is_closing.load(Ordering::Acquire)
    }

    /// The user under which messages are published.
    fn user(&self) -> Option<&str> {
        self.addresses.user()
    }

    /// Whom to believe in a queue; `None`: everyone, as no client may write to it.
    fn trusted(&self, queue: &Queue) -> Option<&Trusted> {
        match queue {
            Queue::Outbox(_) | Queue::Notify(_) => Some(&self.trusted),
            Queue::Inbox(_) | Queue::Publish | Queue::Unrouted => None,
        }
    }

    /// The lane for what senders put into this queue.
    fn ingress(&self, queue: &str) -> &Lane {
        &self.ingress[share_of(queue, self.ingress.len())]
    }

    /// The lane for what leaves this queue.
    fn relay(&self, queue: &str) -> &Lane {
        &self.relay[if queue == topology::PUBLISH { LANES } else { share_of(queue, LANES) }]
    }

    /// The channel for consumers of this queue.
    fn intake(&self, queue: &Queue) -> &Intake {
        let name = queue.to_string();
        match queue {
            Queue::Publish | Queue::Unrouted => &self.pipeline_intakes[PIPELINE_INTAKES],
            Queue::Outbox(_) | Queue::Notify(_) => &self.pipeline_intakes[share_of(&name, PIPELINE_INTAKES)],
            Queue::Inbox(id) if self.clients.get(id).is_some_and(|client| client.is_apart()) => &self.apart_intake,
            Queue::Inbox(_) => &self.inbox_intakes[share_of(&name, INBOX_INTAKES)],
        }
    }

    /// The channel for a look at the front of this queue; `owner` is the client that may keep others from reading it.
    fn chores(&self, queue: &str, owner: Option<&Client>) -> &Intake {
        match owner {
            Some(client) if client.is_apart() => &self.apart_intake,
            _ => &self.chore_intakes[share_of(queue, CHORE_INTAKES)],
        }
    }

    fn add_consumer(&self, core: &Arc<ConsumerCore>) {
        let mut consumers = self.consumers.lock();
        consumers.retain(|core| core.strong_count() > 0);
        consumers.push(Arc::downgrade(core));
    }

    /// Consumers of queues that belong to no client.
    fn standing_consumers(&self) -> Vec<Arc<ConsumerCore>> {
        self.consumers.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// Consumers of a queue that belongs to no client.
    fn consumers_of(&self, name: &str) -> Vec<Arc<ConsumerCore>> {
        self.standing_consumers().into_iter().filter(|core| core.name == name).collect()
    }

    /// Whether nothing is being given back, and no puller has anything.
    fn holds_nothing(&self) -> bool {
        let intakes = self.pipeline_intakes.iter().chain(&self.inbox_intakes).chain(&self.chore_intakes);
        intakes.chain([&self.apart_intake]).all(Intake::is_idle)
            && self.clients.all().iter().all(|client| client.puller().is_none_or(|puller| !puller.is_running()))
    }

    fn wake_all(&self) {
        self.standing_consumers().iter().for_each(|core| core.wake());
        for client in self.clients.all() {
            client.wake();
        }
    }
}

/// See the module.
struct AmqpBroker {
    shared: Arc<Shared>,
}

/// Opens the AMQP broker. Returns at once, whether RabbitMQ can be reached or not: [`Broker::health`] says how it
/// stands.
///
/// # Errors
/// [`BrokerErrorKind::Conflict`] when a URL cannot be read; else what the file says.
pub async fn connect(options: Options, db: Db, telemetry: Telemetry) -> Result<Arc<dyn Broker>, BrokerError> {
    let shared = start(options, db, telemetry).await?;
    shared.thread.spawn(chores::run(Arc::clone(&shared)));
    Ok(Arc::new(AmqpBroker { shared }))
}

/// Everything but the chores.
async fn start(options: Options, db: Db, telemetry: Telemetry) -> Result<Arc<Shared>, BrokerError> {
    let action = "open the AMQP broker";
    // For amqps and https; a second call, by whoever, changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let addresses = Addresses::parse(&options.url)?;
    let users = match &options.management_url {
        Some(url) => Some(Users::new(Management::new(url, &addresses)?)),
        None => None,
    };
    let now_s = Timestamp::now().as_millis().div_euclid(1000);
    let stored = state::open(&db, now_s).await.map_err(|error| db_error(action, error))?;
    let dedup = Dedup::open(db.clone(), options.dedup_window).await.map_err(|error| db_error(action, error))?;
    let thread = AmqpThread::start()?;
    let link = watch::Sender::new(Link::Down("not connected yet".into()));
    let returned = Arc::new(Returned::default());
    let lanes = |role, count| (0..count).map(|_| Lane::start(&thread, role, link.subscribe())).collect();
    let intakes = |role, count| (0..count).map(|_| Intake::start(&thread, role, link.subscribe(), &returned)).collect();
    let shared = Arc::new(Shared {
        trusted: addresses.trusted(),
        addresses,
        users,
        ingress: lanes(Role::Ingress, LANES),
        relay: lanes(Role::Relay, LANES + 1),
        pipeline_intakes: intakes(Role::Pipeline, PIPELINE_INTAKES + 1),
        inbox_intakes: intakes(Role::Inboxes, INBOX_INTAKES),
        apart_intake: Intake::start(&thread, Role::Inboxes, link.subscribe(), &returned),
        chore_intakes: intakes(Role::Control, CHORE_INTAKES),
        returned,
        internal_turn: tokio::sync::Mutex::default(),
        options,
        thread,
        db,
        telemetry,
        link,
        clients: Clients::default(),
        consumers: Mutex::default(),
        dedup,
        memory: ReturnMemory::default(),
        sealer: seal::Sealer::default(),
        pending: Arc::new(Semaphore::new(publish::PENDING_KIB_MAX)),
        leased_bytes: Arc::default(),
        nonce: rand::random(),
        is_closing: AtomicBool::new(false),
    });
    shared.clients.load(stored);
    shared.thread.spawn(link::keep(Arc::clone(&shared)));
    Ok(shared)
}

#[async_trait]
impl Broker for AmqpBroker {
    fn name(&self) -> &'static str {
        "amqp"
    }

    fn health(&self) -> Health {
        self.shared.link.borrow().health()
    }

    async fn declare_client(&self, client: &ClientId, limits: &Limits) -> Result<(), BrokerError> {
        let (shared, client, limits) = (Arc::clone(&self.shared), client.clone(), limits.clone());
        let task = async move { shared.declare_client(client, limits).await };
        self.shared.thread.run("declare a client", task).await
    }

    async fn bind(&self, client: &ClientId, patterns: &[Pattern]) -> Result<(), BrokerError> {
        let (shared, client, patterns) = (Arc::clone(&self.shared), client.clone(), patterns.to_vec());
        self.shared.thread.run("bind an inbox", async move { shared.bind(client, patterns).await }).await
    }

    async fn delete_client(&self, client: &ClientId) -> Result<(), BrokerError> {
        let (shared, client) = (Arc::clone(&self.shared), client.clone());
        self.shared.thread.run("delete a client", async move { shared.delete_client(client).await }).await
    }

    async fn set_password(&self, client: &ClientId, password: &SaltedHash) -> Result<(), BrokerError> {
        if self.shared.users.is_none() {
            return Ok(());
        }
        let (shared, client, password) = (Arc::clone(&self.shared), client.clone(), *password);
        let task = async move {
            match &shared.users {
                Some(users) => users.set(&client, &password).await,
                None => Ok(()),
            }
        };
        self.shared.thread.run("set a broker user", task).await
    }

    async fn lock_out(&self, client: &ClientId) -> Result<(), BrokerError> {
        let (shared, client) = (Arc::clone(&self.shared), client.clone());
        let task = async move {
            match &shared.users {
                Some(users) => users.remove(&client).await,
                None => Ok(()),
            }
        };
        self.shared.thread.run("lock a broker user out", task).await
    }

    fn expect_passwords(&self, passwords: Vec<(ClientId, SaltedHash)>) {
        if let Some(users) = &self.shared.users {
            users.expect(passwords);
        }
    }

    async fn publish_in_turn(
        &self,
        queue: &Queue,
        messages: Vec<Message>,
        turn: Turn,
    ) -> Result<Published, BrokerError> {
        publish::publish(&self.shared, queue, messages, turn).await
    }

    async fn consume(&self, queue: &Queue, prefetch: u32) -> Result<Consumer, BrokerError> {
        let action = format!("consume queue {queue}");
        self.shared.session(&action)?;
        let client = self.shared.clients.owner(queue);
        if client.is_none() && !matches!(queue, Queue::Publish | Queue::Unrouted) {
            return Err(BrokerError::new(BrokerErrorKind::NotFound, action));
        }
        Ok(Box::new(AmqpConsumer::new(Arc::clone(&self.shared), queue.clone(), client, prefetch)))
    }

    async fn pull(
        &self,
        client: &ClientId,
        max: usize,
        wait: Duration,
        mode: PullMode,
    ) -> Result<Vec<Pulled>, BrokerError> {
        let action = || format!("pull from queue {}", topology::inbox(client));
        self.shared.session(&action())?;
        let known = self.shared.clients.get(client);
        let known = known.ok_or_else(|| BrokerError::new(BrokerErrorKind::NotFound, action()))?;
        let puller = known.puller_or(|| Puller::new(Arc::clone(&self.shared), &known));
        puller.pull(max, wait, mode).await
    }

    async fn settle_pulled(
        &self,
        client: &ClientId,
        receipts: Vec<Receipt>,
        outcome: PullOutcome,
    ) -> Result<Vec<Receipt>, BrokerError> {
        let (shared, client) = (Arc::clone(&self.shared), client.clone());
        let task = async move { pull::settle_pulled(&shared, &client, receipts, outcome).await };
        self.shared.thread.run("settle pulled messages", task).await
    }

    async fn depths(&self, client: &ClientId) -> Result<Depths, BrokerError> {
        let (shared, client) = (Arc::clone(&self.shared), client.clone());
        self.shared.thread.run("count messages", async move { shared.depths(&client).await }).await
    }

    async fn left_to_forward(&self, client: &ClientId) -> Result<u64, BrokerError> {
        let (shared, client) = (Arc::clone(&self.shared), client.clone());
        self.shared.thread.run("count messages", async move { shared.left_to_forward(&client).await }).await
    }

    /// Of what this process was handed: RabbitMQ does not say it of the rest.
    async fn oldest(&self, queue: &Queue) -> Result<Option<Timestamp>, BrokerError> {
        let shared = &self.shared;
        let client = shared.clients.owner(queue);
        let consumers = client.as_ref().map_or_else(|| shared.standing_consumers(), |client| client.consumers());
        let held = consumers.iter().filter(|core| core.queue == *queue).filter_map(|core| core.oldest_s());
        let pulled = client.filter(|_| matches!(queue, Queue::Inbox(_))).and_then(|client| client.puller()?.oldest_s());
        let oldest_s = held.chain(pulled).min().and_then(|at_s| i64::try_from(at_s).ok());
        Ok(oldest_s.map(|at_s| Timestamp::from_millis(at_s.saturating_mul(1000))))
    }

    async fn dead_letters(
        &self,
        client: &ClientId,
        after: Option<&str>,
        limit: usize,
    ) -> Result<DeadPage, BrokerError> {
        let after = after.map(str::to_owned);
        let task = Arc::clone(&self.shared).dead_letters(client.clone(), after, limit);
        self.shared.thread.run("list dead letters", task).await
    }

    async fn replay_dead(&self, client: &ClientId, ids: Option<&[String]>) -> Result<u64, BrokerError> {
        let ids = ids.map(<[String]>::to_vec);
        let task = Arc::clone(&self.shared).replay_dead(client.clone(), ids);
        self.shared.thread.run("replay dead letters", task).await
    }

    async fn purge_dead(&self, client: &ClientId, before: Option<Timestamp>) -> Result<u64, BrokerError> {
        let task = Arc::clone(&self.shared).purge_dead(client.clone(), before);
        self.shared.thread.run("purge dead letters", task).await
    }

    async fn internal_depths(&self) -> Result<Vec<(&'static str, u64)>, BrokerError> {
        let shared = Arc::clone(&self.shared);
        self.shared.thread.run("count messages", async move { shared.internal_depths().await }).await
    }

    async fn close(&self) {
        let shared = &self.shared;
        shared.is_closing.store(true, Ordering::Release);
        let lanes = || shared.ingress.iter().chain(&shared.relay);
        let idle = async {
            while !lanes().all(Lane::is_idle) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if shared.session("close").is_ok() && tokio::time::timeout(CLOSE_TIMEOUT, idle).await.is_err() {
            log::warn!("closing: RabbitMQ has not confirmed everything; what was not comes again");
        }
        let session = shared.session("close").ok();
        shared.set_link(Link::Closed);
        shared.wake_all();
        if let Some(session) = session {
            // What is held goes back in order; RabbitMQ gives back the rest of a channel that ends, but a consumer that
            // begins at once may be handed what is behind that.
            let quiet = async {
                while !shared.holds_nothing() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            if tokio::time::timeout(GIVE_BACK_TIMEOUT, quiet).await.is_err() {
                log::debug!("closing: RabbitMQ gives back by itself what is still held");
            }
            let close = async move {
                session.close().await;
                Ok(())
            };
            let _ = shared.thread.run("close", close).await;
        }
        shared.thread.stop();
    }
}

impl Drop for AmqpBroker {
    fn drop(&mut self) {
        // Dropped without having been closed, it must not go on by itself.
        self.shared.set_link(Link::Closed);
        self.shared.wake_all();
    }
}
