//! A broker without a router, for the conformance suite: it can be closed, killed and opened again.

use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use backbone::broker::{
    Broker, BrokerError, Consumer, Delivery, Depths, Health, Outcome, Published, PullMode, Pulled, Queue, Target,
    settle,
};
use backbone::client::{ClientId, Limits};
use backbone::db::Db;
use backbone::envelope::{Draft, Message, MessageId};
use backbone::time::Timestamp;
use backbone::topic::{Pattern, Topic};
use serde_json::value::RawValue;
use tempfile::TempDir;

use super::fixture::{BrokerKind, Fixture};
use super::rabbitmq::{Node, VirtualHost};
use super::wait::{SOON, eventually, soon};

/// A broker under test, and what a test does with it all the time.
pub(crate) struct BrokerEnv {
    times: Times,
    /// Whether opening it waits until it can be used.
    wait_ready: bool,
    backend: Backend,
}

enum Backend {
    Embedded {
        directory: TempDir,
        db: Db,
        broker: Arc<dyn Broker>,
    },
    /// Closed, and not open again yet.
    Reopening,
    Rabbitmq {
        place: Place,
        kind: BrokerKind,
        directory: TempDir,
        db: Db,
        broker: Arc<dyn Broker>,
    },
}

/// Where on RabbitMQ.
enum Place {
    /// For tests that kill it.
    Node(Node),
    Shared(VirtualHost),
}

/// Settings that tests change.
#[derive(Clone, Copy)]
struct Times {
    /// For how long own ids are remembered.
    dedup_window: Duration,
    /// For how long RabbitMQ's deliveries are held.
    held_for: Duration,
}

impl Default for Times {
    fn default() -> Self {
        Self { dedup_window: Duration::from_secs(600), held_for: backbone::broker::amqp::HELD_FOR }
    }
}

async fn open_embedded(directory: TempDir, Times { dedup_window, .. }: Times) -> Backend {
    let db = Db::open(&directory.path().join("backbone.db")).expect("opens the file");
    let options = backbone::broker::embedded::Options { dedup_window };
    let telemetry = backbone::telemetry::new(1000);
    let broker = backbone::broker::embedded::open(db.clone(), options, telemetry).await.expect("opens the broker");
    Backend::Embedded { directory, db, broker }
}

/// Begins to connect to RabbitMQ, with what this process knows of it in a file in `directory`.
async fn open_rabbitmq(place: Place, kind: BrokerKind, directory: TempDir, times: Times) -> Backend {
    let db = Db::open(&directory.path().join("backbone.db")).expect("opens the file");
    let url = match &place {
        Place::Node(node) => node.url(),
        Place::Shared(host) => host.url(),
    };
    let Times { dedup_window, held_for } = times;
    let options = backbone::broker::amqp::Options {
        url,
        queue_type: kind.queue_type(),
        management_url: None,
        dedup_window,
        held_for,
    };
    let telemetry = backbone::telemetry::new(1000);
    let broker = backbone::broker::amqp::connect(options, db.clone(), telemetry).await.expect("opens the broker");
    Backend::Rabbitmq { place, kind, directory, db, broker }
}

impl Backend {
    async fn wait_ready(&self) {
        if let Self::Rabbitmq { broker, .. } = self {
            eventually("RabbitMQ is reached", SOON, async || (broker.health() == Health::Ready).then_some(())).await;
        }
    }
}

/// Copies the files as they are at one moment, as a kill leaves them. As long as somebody reads, SQLite neither shortens
/// the write-ahead log nor begins it anew; what is appended to it meanwhile counts or does not, as with a kill.
async fn copy_at_once(db: &Db, from: &Path, to: &Path) {
    let (from, to) = (from.to_owned(), to.to_owned());
    let copied = db.read(move |connection| {
        let _reading = connection.unchecked_transaction()?;
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
        copy_files(&from, &to);
        Ok(())
    });
    copied.await.expect("reads");
}

/// Copies the files of a database, the write-ahead log first: what a checkpoint moves meanwhile is then in both.
fn copy_files(from: &Path, to: &Path) {
    for name in ["backbone.db-wal", "backbone.db"] {
        match std::fs::copy(from.join(name), to.join(name)) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => panic!("copy {name}: {error}"),
        }
    }
}

impl Fixture for BrokerEnv {
    async fn start(kind: BrokerKind) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let backend = match kind {
            BrokerKind::Embedded => open_embedded(directory, Times::default()).await,
            BrokerKind::RabbitmqClassic | BrokerKind::RabbitmqQuorum => {
                let place = Place::Shared(VirtualHost::create().await);
                open_rabbitmq(place, kind, directory, Times::default()).await
            }
        };
        backend.wait_ready().await;
        Self { times: Times::default(), wait_ready: true, backend }
    }

    async fn finish(self) {
        match self.backend {
            Backend::Embedded { db, broker, .. } | Backend::Rabbitmq { db, broker, .. } => {
                soon("the broker closes", broker.close()).await;
                drop(broker);
                db.close();
            }
            Backend::Reopening => {}
        }
    }
}

/// A [`BrokerEnv`] for tests that kill the broker: RabbitMQ on a node of its own.
pub(crate) struct KillableEnv(BrokerEnv);

impl Fixture for KillableEnv {
    async fn start(kind: BrokerKind) -> Self {
        if !kind.is_rabbitmq() {
            return Self(BrokerEnv::start(kind).await);
        }
        let directory = tempfile::tempdir().expect("a temporary directory");
        let place = Place::Node(Node::start_plain().await);
        let backend = open_rabbitmq(place, kind, directory, Times::default()).await;
        backend.wait_ready().await;
        Self(BrokerEnv { times: Times::default(), wait_ready: true, backend })
    }

    async fn finish(self) {
        self.0.finish().await;
    }
}

impl Deref for KillableEnv {
    type Target = BrokerEnv;

    fn deref(&self) -> &BrokerEnv {
        &self.0
    }
}

impl DerefMut for KillableEnv {
    fn deref_mut(&mut self) -> &mut BrokerEnv {
        &mut self.0
    }
}

impl KillableEnv {
    /// Kills the broker (and, if that is a process of its own, the connection to it) at this very moment, and opens
    /// what is left. For the embedded broker that is a copy of its files as they are now: to a file a kill of the
    /// process is nothing but the end of writing. Real kills of a real process are in `crash`.
    pub(crate) async fn kill(&mut self) {
        self.0.reopen(true).await;
    }

    /// Kills RabbitMQ alone; this process lives, and finds its way back. The embedded broker is in the process, so it is
    /// killed with it.
    ///
    /// For what a receiver has settled: RabbitMQ does not confirm acknowledgements, so the last of them may be undone
    /// when both are killed in the same moment, and only then (`backbone::broker::amqp`, what is weaker).
    pub(crate) async fn kill_rabbitmq(&mut self) {
        let Backend::Rabbitmq { place, broker, .. } = &mut self.0.backend else { return self.kill().await };
        let Place::Node(node) = place else { panic!("a shared node is not killed") };
        node.kill();
        eventually("the broker notices", SOON, async || (broker.health() != Health::Ready).then_some(())).await;
        node.spawn();
        node.wait_until_up().await;
        eventually("RabbitMQ is reached", SOON, async || (broker.health() == Health::Ready).then_some(())).await;
    }
}

impl BrokerEnv {
    /// The broker.
    pub(crate) fn broker(&self) -> Arc<dyn Broker> {
        match &self.backend {
            Backend::Embedded { broker, .. } | Backend::Rabbitmq { broker, .. } => Arc::clone(broker),
            Backend::Reopening => panic!("opening it again failed"),
        }
    }

    /// The file in which the broker keeps what it knows.
    pub(crate) fn db(&self) -> Db {
        match &self.backend {
            Backend::Embedded { db, .. } | Backend::Rabbitmq { db, .. } => db.clone(),
            Backend::Reopening => panic!("opening it again failed"),
        }
    }

    /// Where it is on RabbitMQ, when that is a place that many tests share.
    pub(crate) fn virtual_host(&self) -> &VirtualHost {
        match &self.backend {
            Backend::Rabbitmq { place: Place::Shared(host), .. } => host,
            _ => panic!("it has no virtual host"),
        }
    }

    /// Closes the broker and opens it again. Consumers and deliveries of before are dead.
    pub(crate) async fn restart(&mut self) {
        self.reopen(false).await;
    }

    /// The same without waiting for RabbitMQ.
    pub(crate) async fn restart_unready(&mut self) {
        self.wait_ready = false;
        self.reopen(false).await;
        self.wait_ready = true;
    }

    /// Opens again with another dedup window.
    pub(crate) async fn restart_with_dedup_window(&mut self, window: Duration) {
        self.times.dedup_window = window;
        self.reopen(false).await;
    }

    /// Opens again with deliveries that are held for so long on RabbitMQ.
    pub(crate) async fn restart_with_held_for(&mut self, time: Duration) {
        self.times.held_for = time;
        self.reopen(false).await;
    }

    async fn reopen(&mut self, killed: bool) {
        let backend = std::mem::replace(&mut self.backend, Backend::Reopening);
        self.backend = match backend {
            Backend::Reopening => panic!("opening it again failed before"),
            Backend::Rabbitmq { mut place, kind, directory, db, broker } => {
                let copy = tempfile::tempdir().expect("a temporary directory");
                if killed {
                    let Place::Node(node) = &mut place else { panic!("a shared node is not killed") };
                    node.kill();
                    copy_at_once(&db, directory.path(), copy.path()).await;
                    node.spawn();
                }
                // After the kill and before RabbitMQ is back, so that what was killed does nothing any more.
                soon("the broker closes", broker.close()).await;
                db.close();
                match &mut place {
                    Place::Node(node) if killed => node.wait_until_up().await,
                    _ => copy_files(directory.path(), copy.path()),
                }
                open_rabbitmq(place, kind, copy, self.times).await
            }
            Backend::Embedded { directory, db, broker } => {
                // A copy in both cases: what a test still holds of the old broker holds the old file as well.
                let copy = tempfile::tempdir().expect("a temporary directory");
                if killed {
                    copy_at_once(&db, directory.path(), copy.path()).await;
                }
                soon("the broker closes", broker.close()).await;
                db.close();
                if !killed {
                    copy_files(directory.path(), copy.path());
                }
                open_embedded(copy, self.times).await
            }
        };
        if self.wait_ready {
            self.backend.wait_ready().await;
        }
    }

    /// Declares a client without limits, bound to these patterns.
    pub(crate) async fn client(&self, name: &str, patterns: &[&str]) -> ClientId {
        self.client_with(name, patterns, &Limits::default()).await
    }

    /// Declares a client with limits, bound to these patterns.
    pub(crate) async fn client_with(&self, name: &str, patterns: &[&str], limits: &Limits) -> ClientId {
        let id = client_id(name);
        self.broker().declare_client(&id, limits).await.expect("declares the client");
        self.bind(&id, patterns).await;
        id
    }

    /// Makes these its only bindings.
    pub(crate) async fn bind(&self, client: &ClientId, patterns: &[&str]) {
        let patterns: Vec<Pattern> =
            patterns.iter().map(|text| Pattern::parse(text).expect("a pattern of the test")).collect();
        self.broker().bind(client, &patterns).await.expect("binds");
    }

    /// Publishes.
    pub(crate) async fn publish(&self, queue: &Queue, messages: Vec<Message>) -> Published {
        self.broker().publish(queue, messages).await.expect("publishes")
    }

    /// Subscribes.
    pub(crate) async fn consume(&self, queue: &Queue, prefetch: u32) -> Consumer {
        self.broker().consume(queue, prefetch).await.expect("consumes")
    }

    /// Takes exactly `count` messages off a queue's front and forwards them.
    pub(crate) async fn forward(&self, queue: &Queue, target: Target, count: usize) {
        let mut consumer = self.consume(queue, 256).await;
        forward_from(&mut consumer, target, count).await;
    }

    /// Puts one message for each body into the inboxes that `topic` leads to, in order.
    pub(crate) async fn route(&self, sender: &ClientId, topic: &str, bodies: &[&str]) {
        let messages = bodies.iter().map(|body| message(sender, Some(topic), body)).collect();
        self.publish(&Queue::Publish, messages).await;
        self.forward(&Queue::Publish, Target::Topic, bodies.len()).await;
    }

    /// What is in the inbox now, taken out of it. Gathers until there is nothing more at once.
    pub(crate) async fn drain(&self, client: &ClientId) -> Vec<Pulled> {
        let mut all = Vec::new();
        loop {
            let batch = self.pull(client, 1000, Duration::ZERO, PullMode::Auto).await;
            if batch.is_empty() {
                return all;
            }
            all.extend(batch);
        }
    }

    /// `count` messages from the inbox, waiting for them.
    pub(crate) async fn pull_exactly(&self, client: &ClientId, count: usize, mode: PullMode) -> Vec<Pulled> {
        let mut all = Vec::new();
        while all.len() < count {
            // As many as the API hands over at most.
            let most = (count - all.len()).min(1000);
            let more = self.pull(client, most, super::wait::SOON, mode).await;
            assert!(!more.is_empty(), "{} of {count} messages came", all.len());
            all.extend(more);
        }
        all
    }

    /// One pull.
    pub(crate) async fn pull(&self, client: &ClientId, max: usize, wait: Duration, mode: PullMode) -> Vec<Pulled> {
        self.broker().pull(client, max, wait, mode).await.expect("pulls")
    }

    /// The client's depths.
    pub(crate) async fn depths(&self, client: &ClientId) -> Depths {
        self.broker().depths(client).await.expect("counts")
    }

    /// Depth of an internal queue.
    pub(crate) async fn internal_depth(&self, name: &str) -> u64 {
        let depths = self.broker().internal_depths().await.expect("counts");
        depths.into_iter().find(|(queue, _)| *queue == name).unwrap_or_else(|| panic!("there is no {name}")).1
    }
}

/// A client id.
pub(crate) fn client_id(name: &str) -> ClientId {
    ClientId::parse(name).expect("a client id of the test")
}

/// A message under a topic, or to everyone; `body` is JSON.
pub(crate) fn message(sender: &ClientId, topic: Option<&str>, body: &str) -> Message {
    draft(sender, None, topic, body)
}

/// The same with the sender's own id.
pub(crate) fn own_message(sender: &ClientId, id: &str, topic: Option<&str>, body: &str) -> Message {
    draft(sender, Some(id), topic, body)
}

fn draft(sender: &ClientId, id: Option<&str>, topic: Option<&str>, body: &str) -> Message {
    let raw: &RawValue = serde_json::from_str(body).expect("JSON of the test");
    let draft = Draft {
        id: id.map(|id| MessageId::parse(id).expect("an id of the test")),
        topic: topic.map(|topic| Topic::parse(topic).expect("a topic of the test")),
        message: raw,
        traceparent: None,
    };
    Message::accept(sender, draft, Timestamp::now())
}

/// Messages `0`, `1`, … up to `count`.
pub(crate) fn numbered(sender: &ClientId, topic: &str, count: usize) -> Vec<Message> {
    (0..count).map(|n| message(sender, Some(topic), &n.to_string())).collect()
}

/// The next batch: at least one.
pub(crate) async fn next(consumer: &mut Consumer, max: usize) -> Vec<Delivery> {
    let batch = soon("a delivery", consumer.next(max)).await.expect("the queue is there");
    assert!(!batch.is_empty() && batch.len() <= max, "asked for 1 to {max}, got {}", batch.len());
    batch
}

/// Exactly `count` deliveries, in order, all unsettled.
pub(crate) async fn next_exactly(consumer: &mut Consumer, count: usize) -> Vec<Delivery> {
    let mut all = Vec::new();
    while all.len() < count {
        all.extend(next(consumer, count - all.len()).await);
    }
    all
}

/// Forwards the next `count` messages of a consumer, as they are.
pub(crate) async fn forward_from(consumer: &mut Consumer, target: Target, count: usize) {
    let mut left = count;
    while left > 0 {
        let batch = next(consumer, left.min(256)).await;
        left -= batch.len();
        forward_all(batch, target).await;
    }
}

/// Forwards each delivery's own message.
pub(crate) async fn forward_all(batch: Vec<Delivery>, target: Target) {
    try_forward_all(batch, target).await.expect("forwards");
}

/// The same, where it may fail.
pub(crate) async fn try_forward_all(batch: Vec<Delivery>, target: Target) -> Result<(), BrokerError> {
    let outcomes = batch.into_iter().map(|delivery| {
        let message = Arc::clone(delivery.payload.message().expect("a message"));
        (delivery, Outcome::Forward(target, message))
    });
    settle(outcomes.collect()).await
}

/// Settles all alike.
pub(crate) async fn settle_all(batch: Vec<Delivery>, outcome: Outcome) {
    settle(batch.into_iter().map(|delivery| (delivery, outcome.clone())).collect()).await.expect("settles");
}

/// What was sent, as text.
pub(crate) fn bodies(pulled: &[Pulled]) -> Vec<String> {
    pulled.iter().map(|pulled| String::from_utf8_lossy(pulled.message.body()).into_owned()).collect()
}

/// What was sent, as text.
pub(crate) fn delivered_bodies(deliveries: &[Delivery]) -> Vec<String> {
    let body = |delivery: &Delivery| {
        String::from_utf8_lossy(delivery.payload.message().expect("a message").body()).into_owned()
    };
    deliveries.iter().map(body).collect()
}

/// `0`, `1`, … up to `count`, as text.
pub(crate) fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|n| n.to_string()).collect()
}
