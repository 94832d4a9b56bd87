//! What only the embedded broker has: paging, net effects, restarts. The guarantees are tested in `tests/it`.

use std::time::Duration;

use super::{Options, open};
use crate::broker::{Broker, Outcome, PullMode, PullOutcome, Queue, Target, settle};
use crate::client::{ClientId, Limits};
use crate::db::Db;
use crate::envelope::{Draft, Message, MessageId};
use crate::time::Timestamp;
use crate::topic::{Pattern, Topic};
use std::sync::Arc;

struct Bench {
    directory: tempfile::TempDir,
    db: Db,
    broker: Arc<dyn Broker>,
}

impl Bench {
    async fn start(directory: tempfile::TempDir) -> Self {
        let db = Db::open(&directory.path().join("backbone.db")).expect("opens");
        let options = Options { dedup_window: Duration::from_secs(600) };
        let broker = open(db.clone(), options, crate::telemetry::new(0)).await.expect("opens");
        Self { directory, db, broker }
    }

    async fn new() -> Self {
        Self::start(tempfile::tempdir().expect("a directory")).await
    }

    /// Stops without a word, as a kill does, and opens again.
    async fn restart(self) -> Self {
        self.broker.close().await;
        drop(self.broker);
        self.db.close();
        drop(self.db);
        Self::start(self.directory).await
    }

    async fn client(&self, name: &str, patterns: &[&str]) -> ClientId {
        let id = ClientId::parse(name).expect("an id");
        self.broker.declare_client(&id, &Limits::default()).await.expect("declares");
        let patterns: Vec<Pattern> = patterns.iter().map(|p| Pattern::parse(p).expect("a pattern")).collect();
        self.broker.bind(&id, &patterns).await.expect("binds");
        id
    }

    /// Forwards what is in a queue until `count` messages went on.
    async fn forward(&self, queue: Queue, target: Target, count: usize) {
        let mut consumer = self.broker.consume(&queue, 1000).await.expect("consumes");
        let mut done = 0;
        while done < count {
            let batch = consumer.next(256).await.expect("the queue is there");
            done += batch.len();
            let outcomes = batch
                .into_iter()
                .map(|delivery| {
                    let message = delivery.payload.message().expect("a message").clone();
                    (delivery, Outcome::Forward(target, message))
                })
                .collect();
            settle(outcomes).await.expect("forwards");
        }
    }

    async fn pull(&self, client: &ClientId, mode: PullMode) -> Vec<crate::broker::Pulled> {
        self.broker.pull(client, 1000, Duration::from_secs(5), mode).await.expect("pulls")
    }
}

fn message(sender: &ClientId, id: Option<&str>, topic: &str, n: usize, bytes: usize) -> Message {
    let json = format!("{{\"n\":{n},\"pad\":\"{}\"}}", "x".repeat(bytes));
    let raw: &serde_json::value::RawValue = serde_json::from_str(&json).expect("JSON");
    let draft = Draft {
        id: id.map(|id| MessageId::parse(id).expect("an id")),
        topic: Some(Topic::parse(topic).expect("a topic")),
        message: raw,
        traceparent: None,
    };
    Message::accept(sender, draft, Timestamp::now())
}

fn number(message: &Message) -> usize {
    let value: serde_json::Value = serde_json::from_slice(message.body()).expect("JSON");
    value["n"].as_u64().expect("a number") as usize
}

#[actix_rt::test]
async fn deep_inbox_is_paged_drained_in_order_and_leaves_no_rows() {
    const COUNT: usize = 20_000;
    let bench = Bench::new().await;
    let (a, b) = (bench.client("a", &[]).await, bench.client("b", &["t.#"]).await);
    for start in (0..COUNT).step_by(500) {
        let batch = (start..start + 500).map(|n| message(&a, None, "t.x", n, 1000)).collect();
        bench.broker.publish(&Queue::Outbox(a.clone()), batch).await.expect("publishes");
        bench.forward(Queue::Outbox(a.clone()), Target::Publish, 500).await;
        bench.forward(Queue::Publish, Target::Topic, 500).await;
    }
    assert_eq!(bench.broker.depths(&b).await.expect("depths").inbox, COUNT as u64);
    let bench = bench.restart().await;
    assert_eq!(bench.broker.depths(&b).await.expect("depths").inbox, COUNT as u64);
    let mut seen = Vec::new();
    while seen.len() < COUNT {
        let pulled = bench
            .pull(&b, if seen.len() % 2000 < 1000 { PullMode::Auto } else { PullMode::Lease(Duration::from_secs(60)) })
            .await;
        assert!(!pulled.is_empty(), "after {}", seen.len());
        seen.extend(pulled.iter().map(|p| number(&p.message)));
        let receipts: Vec<_> = pulled.into_iter().filter_map(|p| p.receipt).collect();
        if !receipts.is_empty() {
            assert!(bench.broker.settle_pulled(&b, receipts, PullOutcome::Ack).await.expect("acks").is_empty());
        }
    }
    assert_eq!(seen, (0..COUNT).collect::<Vec<_>>());
    assert_eq!(bench.broker.depths(&b).await.expect("depths").inbox, 0);
    let rows: (i64, i64, i64) = bench
        .db
        .read(|c| {
            let count = |t: &str| c.query_row(&format!("SELECT count(*) FROM {t}"), [], |r| r.get(0));
            Ok((count("entry")?, count("body")?, count("body_refs")?))
        })
        .await
        .expect("counts");
    assert_eq!(rows, (0, 0, 0));
}

#[actix_rt::test]
async fn fan_out_stores_a_body_once_and_drops_it_with_the_last_copy() {
    let bench = Bench::new().await;
    let a = bench.client("a", &[]).await;
    let mut receivers = Vec::new();
    for n in 0..10 {
        receivers.push(bench.client(&format!("r{n}"), &["t", "#"]).await);
    }
    for round in 0..50 {
        let batch = vec![message(&a, None, "t", round, 100)];
        bench.broker.publish(&Queue::Outbox(a.clone()), batch).await.expect("publishes");
        bench.forward(Queue::Outbox(a.clone()), Target::Publish, 1).await;
        bench.forward(Queue::Publish, Target::Topic, 1).await;
    }
    let bench = bench.restart().await;
    for (n, receiver) in receivers.iter().enumerate() {
        let bodies: i64 =
            bench.db.read(|c| c.query_row("SELECT count(*) FROM body", [], |r| r.get(0))).await.expect("counts");
        assert_eq!(bodies, 50, "before receiver {n}");
        let pulled = bench.pull(receiver, PullMode::Auto).await;
        assert_eq!(pulled.iter().map(|p| number(&p.message)).collect::<Vec<_>>(), (0..50).collect::<Vec<_>>());
    }
    let bodies: i64 =
        bench.db.read(|c| c.query_row("SELECT count(*) FROM body", [], |r| r.get(0))).await.expect("counts");
    assert_eq!(bodies, 0);
}

#[actix_rt::test]
async fn own_ids_are_taken_once_across_a_restart() {
    let bench = Bench::new().await;
    let a = bench.client("a", &["t"]).await;
    let batch = |ids: &[&str]| ids.iter().map(|id| message(&a, Some(id), "t", 0, 10)).collect::<Vec<_>>();
    let outbox = Queue::Outbox(a.clone());
    let first = bench.broker.publish(&outbox, batch(&["x", "y", "x"])).await.expect("publishes");
    assert_eq!(first.duplicates, [false, false, true]);
    let second = bench.broker.publish(&outbox, batch(&["y", "z"])).await.expect("publishes");
    assert_eq!(second.duplicates, [true, false]);
    let bench = bench.restart().await;
    let third = bench.broker.publish(&outbox, batch(&["z", "x", "new"])).await.expect("publishes");
    assert_eq!(third.duplicates, [true, true, false]);
    assert_eq!(bench.broker.depths(&a).await.expect("depths").outbox, 4);
}
