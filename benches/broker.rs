//! What a broker itself does, without HTTP and actors: durable publish, forward, route, pull.
//!
//! `cargo bench --bench broker` prints messages a second of the embedded broker; with `-- --broker amqp://…`, and
//! `--queue-type classic` if it is not to be quorum, of RabbitMQ, on which nothing is left behind. Every figure is of
//! 1 KiB messages, durable, through outbox, `soar-publish` and the topic exchange into inboxes. Not a test: it asserts
//! only that everything arrived.

#![allow(clippy::unwrap_used, missing_docs)]
#![allow(clippy::disallowed_methods, reason = "a bench is told by the environment how long to run")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use backbone::broker::{Broker, Health, Outcome, PullMode, Queue, Target, amqp, embedded, settle};
use backbone::client::{ClientId, Limits};
use backbone::config::QueueType;
use backbone::db::Db;
use backbone::envelope::{Draft, Message};
use backbone::time::Timestamp;
use backbone::topic::{Pattern, Topic};

fn message(sender: &ClientId, body: &serde_json::value::RawValue, topic: &Topic) -> Message {
    let draft = Draft { id: None, topic: Some(topic.clone()), message: body, traceparent: None };
    Message::accept(sender, draft, Timestamp::now())
}

/// What is measured.
#[derive(Clone)]
enum Subject {
    Embedded,
    RabbitMq { url: String, queue_type: QueueType },
}

impl Subject {
    /// From the arguments; cargo adds some of its own.
    fn from_arguments() -> Self {
        let arguments: Vec<String> = std::env::args().collect();
        let after = |name: &str| arguments.iter().skip_while(|argument| *argument != name).nth(1).cloned();
        match after("--broker").filter(|broker| broker != "embedded") {
            None => Self::Embedded,
            Some(url) => {
                let is_classic = after("--queue-type").is_some_and(|kind| kind == "classic");
                Self::RabbitMq { url, queue_type: if is_classic { QueueType::Classic } else { QueueType::Quorum } }
            }
        }
    }

    async fn open(&self, db: &Db) -> Arc<dyn Broker> {
        let dedup_window = Duration::from_secs(600);
        let telemetry = backbone::telemetry::new(0);
        match self {
            Self::Embedded => embedded::open(db.clone(), embedded::Options { dedup_window }, telemetry).await.unwrap(),
            Self::RabbitMq { url, queue_type } => {
                let (url, queue_type) = (url.clone(), *queue_type);
                let options =
                    amqp::Options { url, queue_type, management_url: None, dedup_window, held_for: amqp::HELD_FOR };
                let broker = amqp::connect(options, db.clone(), telemetry).await.unwrap();
                let deadline = Instant::now() + Duration::from_secs(30);
                while broker.health() != Health::Ready {
                    assert!(Instant::now() < deadline, "no connection: {:?}", broker.health());
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                broker
            }
        }
    }
}

async fn forward(broker: Arc<dyn Broker>, queue: Queue, target: Target) {
    let mut consumer = broker.consume(&queue, 1024).await.unwrap();
    while let Some(batch) = consumer.next(256).await {
        let outcomes = batch.into_iter().map(|delivery| {
            let message = delivery.payload.message().unwrap().clone();
            (delivery, Outcome::Forward(target, message))
        });
        settle(outcomes.collect()).await.unwrap();
    }
}

fn run(subject: &Subject, name: &str, inboxes: usize, publishers: usize, batch: usize, seconds: u64) {
    let directory = tempfile::tempdir_in(".").unwrap();
    let db = Db::open(&directory.path().join("backbone.db")).unwrap();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let broker = runtime().block_on(subject.open(&db));
    let sender = ClientId::parse("sender").unwrap();
    let topic = Topic::parse("soar.noc.slocum.unit-397").unwrap();
    runtime().block_on(async {
        broker.declare_client(&sender, &Limits::default()).await.unwrap();
        for n in 0..inboxes {
            let id = ClientId::parse(&format!("r{n}")).unwrap();
            broker.declare_client(&id, &Limits::default()).await.unwrap();
            broker.bind(&id, &[Pattern::parse("soar.#").unwrap()]).await.unwrap();
        }
    });
    let pipelines = std::thread::spawn({
        let (broker, sender) = (Arc::clone(&broker), sender.clone());
        move || {
            runtime().block_on(async {
                tokio::join!(
                    forward(Arc::clone(&broker), Queue::Outbox(sender), Target::Publish),
                    forward(Arc::clone(&broker), Queue::Publish, Target::Topic),
                );
            });
        }
    });
    let until = Instant::now() + Duration::from_secs(seconds);
    let publishing = std::thread::spawn({
        let (broker, sender) = (Arc::clone(&broker), sender);
        move || {
            runtime().block_on(async {
                let json = format!("\"{}\"", "x".repeat(1022));
                let body: &serde_json::value::RawValue = serde_json::from_str(&json).unwrap();
                let outbox = Queue::Outbox(sender.clone());
                let one = || async {
                    let mut sent = 0;
                    while Instant::now() < until {
                        let messages = (0..batch).map(|_| message(&sender, body, &topic)).collect();
                        broker.publish(&outbox, messages).await.unwrap();
                        sent += batch;
                    }
                    sent
                };
                futures_util::future::join_all((0..publishers).map(|_| one())).await.iter().sum::<usize>()
            })
        }
    });
    let started = Instant::now();
    let expected = Arc::new(std::sync::OnceLock::new());
    let pulling = std::thread::spawn({
        let (broker, expected) = (Arc::clone(&broker), Arc::clone(&expected));
        move || {
            runtime().block_on(async {
                let one = |n: usize| {
                    let (broker, expected) = (Arc::clone(&broker), Arc::clone(&expected));
                    async move {
                        let id = ClientId::parse(&format!("r{n}")).unwrap();
                        let mut received: usize = 0;
                        while expected.get() != Some(&received) {
                            let wait = Duration::from_millis(100);
                            let pulled = broker.pull(&id, 1000, wait, PullMode::Auto).await.unwrap();
                            received += pulled.len();
                        }
                        received
                    }
                };
                futures_util::future::join_all((0..inboxes).map(one)).await.iter().sum::<usize>()
            })
        }
    });
    let sent = publishing.join().unwrap();
    expected.set(sent).unwrap();
    let received = pulling.join().unwrap();
    let elapsed = started.elapsed().as_secs_f64();
    assert_eq!(received, sent * inboxes, "everything arrives");
    println!(
        "{name:<28} {:>9.0} messages/s in {:>9.0} deliveries/s out",
        sent as f64 / elapsed,
        received as f64 / elapsed
    );
    runtime().block_on(async {
        let receivers = (0..inboxes).map(|n| ClientId::parse(&format!("r{n}")).unwrap());
        for client in receivers.chain([ClientId::parse("sender").unwrap()]) {
            broker.delete_client(&client).await.unwrap();
        }
        broker.close().await;
    });
    pipelines.join().unwrap();
    drop(broker);
    db.close();
}

fn resident_mib() -> f64 {
    let pages: f64 =
        std::fs::read_to_string("/proc/self/statm").unwrap().split_whitespace().nth(1).unwrap().parse().unwrap();
    pages * 4096.0 / 1048576.0
}

/// A million messages in one inbox: memory, opening, draining, and the file afterwards.
fn deep(count: usize) {
    let directory = tempfile::tempdir_in(".").unwrap();
    let path = directory.path().join("backbone.db");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let open = || {
        let db = Db::open(&path).unwrap();
        let options = embedded::Options { dedup_window: Duration::from_secs(600) };
        let broker = runtime.block_on(embedded::open(db.clone(), options, backbone::telemetry::new(0))).unwrap();
        (db, broker)
    };
    let id = ClientId::parse("deep").unwrap();
    let topic = Topic::parse("soar.deep").unwrap();
    let json = format!("\"{}\"", "x".repeat(1022));
    let body: &serde_json::value::RawValue = serde_json::from_str(&json).unwrap();
    let (db, broker) = open();
    runtime.block_on(async {
        broker.declare_client(&id, &Limits::default()).await.unwrap();
        for _ in 0..count / 1000 {
            let messages = (0..1000).map(|_| message(&id, body, &topic)).collect();
            broker.publish(&Queue::Inbox(id.clone()), messages).await.unwrap();
        }
        broker.close().await;
    });
    println!("deep inbox: resident with {count} queued  {:>8.0} MiB", resident_mib());
    drop(broker);
    db.close();
    let started = Instant::now();
    let (db, broker) = open();
    println!("deep inbox: opened in                   {:>8.1} ms", started.elapsed().as_secs_f64() * 1e3);
    let started = Instant::now();
    let mut drained = 0;
    while drained < count {
        let wait = Duration::from_secs(5);
        drained += runtime.block_on(broker.pull(&id, 1000, wait, PullMode::Auto)).unwrap().len();
    }
    println!(
        "deep inbox: drained at                  {:>8.0} messages/s",
        count as f64 / started.elapsed().as_secs_f64()
    );
    println!("deep inbox: resident after              {:>8.0} MiB", resident_mib());
    runtime.block_on(broker.close());
    println!(
        "deep inbox: file after                  {:>8.0} MiB",
        std::fs::metadata(&path).unwrap().len() as f64 / 1048576.0
    );
    drop(broker);
    db.close();
}

fn main() {
    let seconds = std::env::var("SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(3);
    let subject = Subject::from_arguments();
    if seconds >= 3 && matches!(subject, Subject::Embedded) {
        deep(1_000_000);
    }
    run(&subject, "64 publishers, single", 1, 64, 1, seconds);
    run(&subject, "8 publishers, batches of 100", 1, 8, 100, seconds);
    run(&subject, "fan-out to 100 inboxes", 100, 4, 10, seconds);
}
