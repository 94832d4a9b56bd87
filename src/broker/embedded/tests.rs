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

    /// Routes so many messages to a client whose inbox takes `max`: the oldest become dead letters.
    async fn overfill(&self, client: &ClientId, max: u64, count: usize) {
        let limits = Limits { max_inbox_messages: Some(max), ..Limits::default() };
        self.broker.declare_client(client, &limits).await.expect("declares again");
        let batch = (0..count).map(|n| message(client, None, "t", n, 10)).collect();
        self.broker.publish(&Queue::Outbox(client.clone()), batch).await.expect("publishes");
        self.forward(Queue::Outbox(client.clone()), Target::Publish, count).await;
        self.forward(Queue::Publish, Target::Topic, count).await;
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

pub(super) fn message(sender: &ClientId, id: Option<&str>, topic: &str, n: usize, bytes: usize) -> Message {
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

pub(super) fn number(message: &Message) -> usize {
    let value: serde_json::Value = serde_json::from_slice(message.body()).expect("JSON");
    value["n"].as_u64().expect("a number") as usize
}

#[actix_rt::test]
async fn deep_inbox_is_paged_drained_in_order_and_leaves_no_rows() {
    const COUNT: usize = 1_000;
    let bench = Bench::new().await;
    let (a, b) = (bench.client("a", &[]).await, bench.client("b", &["t.#"]).await);
    for start in (0..COUNT).step_by(500) {
        let batch = (start..start + 500).map(|n| message(&a, None, "t.x", n, 100)).collect();
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
            .pull(&b, if seen.len() % 50 < 25 { PullMode::Auto } else { PullMode::Lease(Duration::from_secs(60)) })
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
        let mut seen = Vec::new();
        while seen.len() < 50 {
            seen.extend(bench.pull(receiver, PullMode::Auto).await.iter().map(|p| number(&p.message)));
        }
        assert_eq!(seen, (0..50).collect::<Vec<_>>());
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

/// Caps the file a few pages above its present size: SQLite then answers `SQLITE_FULL`, as on a full disk.
pub(super) async fn cap_file(db: &Db, spare_pages: Option<u32>) {
    db.write(move |connection| {
        let pages: u32 = connection.query_row("PRAGMA page_count", [], |row| row.get(0))?;
        let cap = spare_pages.map_or(u32::MAX - 1, |spare| pages + spare);
        connection.query_row(&format!("PRAGMA max_page_count = {cap}"), [], |_| Ok(()))
    })
    .await
    .expect("caps");
}

#[actix_rt::test]
async fn full_disk_refuses_whole_batches_and_keeps_the_rest() {
    let bench = Bench::new().await;
    let (a, b) = (bench.client("a", &[]).await, bench.client("b", &["t"]).await);
    let pipelines = [
        forever(Arc::clone(&bench.broker), Queue::Outbox(a.clone()), Target::Publish),
        forever(Arc::clone(&bench.broker), Queue::Publish, Target::Topic),
    ]
    .map(actix_rt::spawn);
    let mut accepted = Vec::new();
    let mut refused = 0;
    let outbox = Queue::Outbox(a.clone());
    let send = |n: usize| {
        let batch = (0..10).map(|i| message(&a, Some(&format!("m{n}-{i}")), "t", n * 10 + i, 2000)).collect();
        bench.broker.publish(&outbox, batch)
    };
    for n in 0..20 {
        send(n).await.expect("there is room");
        accepted.extend(n * 10..n * 10 + 10);
    }
    cap_file(&bench.db, Some(40)).await;
    for n in 20..60 {
        match send(n).await {
            Ok(_) => accepted.extend(n * 10..n * 10 + 10),
            Err(error) => {
                assert_eq!(error.kind, crate::broker::BrokerErrorKind::DiskFull);
                refused += 1;
            }
        }
    }
    assert!(refused > 10, "{refused} refused");
    // Receiving frees room although the disk is full.
    let early = bench.pull(&b, PullMode::Auto).await;
    cap_file(&bench.db, None).await;
    // The ids of what was refused are free.
    for n in 60..80 {
        let published = send(n).await.expect("there is room again");
        assert!(published.duplicates.iter().all(|duplicate| !duplicate));
        accepted.extend(n * 10..n * 10 + 10);
    }
    for n in 20..60 {
        let first = n * 10;
        let expected = accepted.contains(&first);
        let published = send(n).await.expect("there is room again");
        assert!(published.duplicates.iter().all(|duplicate| *duplicate == expected), "batch {n}");
        if !expected {
            accepted.extend(first..first + 10);
        }
    }
    let mut seen: Vec<usize> = early.iter().map(|pulled| number(&pulled.message)).collect();
    while seen.len() < accepted.len() {
        let pulled = bench.pull(&b, PullMode::Auto).await;
        assert!(!pulled.is_empty(), "{} of {}", seen.len(), accepted.len());
        seen.extend(pulled.iter().map(|pulled| number(&pulled.message)));
    }
    assert_eq!(seen, accepted);
    for pipeline in pipelines {
        pipeline.abort();
    }
    let bench = bench.restart().await;
    assert_eq!(bench.broker.depths(&b).await.expect("depths").inbox, 0);
    assert_eq!(bench.broker.depths(&a).await.expect("depths").outbox, 0);
    let rows: (i64, i64) = bench
        .db
        .read(|c| {
            let count = |t: &str| c.query_row(&format!("SELECT count(*) FROM {t}"), [], |r| r.get(0));
            Ok((count("entry")?, count("body")?))
        })
        .await
        .expect("counts");
    assert_eq!(rows, (0, 0));
}

async fn forever(broker: Arc<dyn Broker>, queue: Queue, target: Target) {
    let mut consumer = broker.consume(&queue, 1000).await.expect("consumes");
    while let Some(batch) = consumer.next(64).await {
        let outcomes = batch.into_iter().map(|delivery| {
            let message = delivery.payload.message().expect("a message").clone();
            (delivery, Outcome::Forward(target, message))
        });
        settle(outcomes.collect()).await.expect("forwards");
    }
}

#[actix_rt::test]
async fn delays_and_leases_end_and_counts_survive_a_restart() {
    let bench = Bench::new().await;
    let a = bench.client("a", &["t"]).await;
    let batch = (0..4).map(|n| message(&a, None, "t", n, 10)).collect();
    bench.broker.publish(&Queue::Outbox(a.clone()), batch).await.expect("publishes");
    bench.forward(Queue::Outbox(a.clone()), Target::Publish, 4).await;
    bench.forward(Queue::Publish, Target::Topic, 4).await;
    let mut consumer = bench.broker.consume(&Queue::Inbox(a.clone()), 3).await.expect("consumes");
    let mut batch = consumer.next(10).await.expect("there");
    assert_eq!(batch.len(), 3, "prefetch bounds what is out");
    let third = batch.pop().expect("three");
    let delay = Outcome::Delay { delay: Duration::from_millis(300), attempts: 2 };
    let outcomes = batch.drain(..).map(|delivery| (delivery, delay.clone())).collect();
    settle(outcomes).await.expect("delays");
    drop(third);
    drop(consumer);
    let bench = bench.restart().await;
    assert_eq!(bench.broker.depths(&a).await.expect("depths").inbox, 4);
    let first = bench.pull(&a, PullMode::Lease(Duration::from_millis(50))).await;
    let (numbers, deliveries): (Vec<_>, Vec<_>) = first.iter().map(|p| (number(&p.message), p.deliveries)).unzip();
    assert_eq!((numbers, deliveries), (vec![2, 3], vec![2, 1]), "the delayed ones hold nobody up");
    let mut consumer = bench.broker.consume(&Queue::Inbox(a.clone()), 100).await.expect("consumes");
    let mut seen = Vec::new();
    while seen.len() < 4 {
        let batch = consumer.next(10).await.expect("there");
        for delivery in batch {
            seen.push((number(delivery.payload.message().expect("a message")), delivery.deliveries, delivery.attempts));
            delivery.settle(Outcome::Complete).await.expect("completes");
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, [(0, 2, 2), (1, 2, 2), (2, 3, 0), (3, 2, 0)]);
    let late = first.into_iter().filter_map(|p| p.receipt).collect::<Vec<_>>();
    assert_eq!(bench.broker.settle_pulled(&a, late.clone(), PullOutcome::Ack).await.expect("answers"), late);
    assert_eq!(bench.broker.depths(&a).await.expect("depths").inbox, 0);
}

#[actix_rt::test]
async fn limits_bury_the_oldest_and_replay_brings_them_back() {
    let bench = Bench::new().await;
    let a = bench.client("a", &["t"]).await;
    bench.overfill(&a, 3, 10).await;
    let page = bench.broker.dead_letters(&a, None, 4).await.expect("lists");
    let numbers = |page: &crate::broker::DeadPage| -> Vec<usize> {
        page.dead_letters.iter().map(|dead| number(dead.payload.message().expect("a message"))).collect()
    };
    assert_eq!(numbers(&page), [0, 1, 2, 3]);
    let rest = bench.broker.dead_letters(&a, page.next.as_deref(), 4).await.expect("lists");
    assert_eq!(numbers(&rest), [4, 5, 6]);
    assert_eq!(rest.next, None);
    bench.broker.declare_client(&a, &Limits::default()).await.expect("declares again");
    let ids: Vec<String> = page.dead_letters.iter().take(2).map(|dead| dead.id.clone()).collect();
    assert_eq!(bench.broker.replay_dead(&a, Some(&ids)).await.expect("replays"), 2);
    assert_eq!(bench.broker.replay_dead(&a, Some(&ids)).await.expect("replays"), 0);
    let bench = bench.restart().await;
    assert_eq!(bench.broker.purge_dead(&a, None).await.expect("purges"), 5);
    let pulled = bench.pull(&a, PullMode::Auto).await;
    assert_eq!(pulled.iter().map(|p| number(&p.message)).collect::<Vec<_>>(), [7, 8, 9, 0, 1]);
    let bodies: i64 =
        bench.db.read(|c| c.query_row("SELECT count(*) FROM body", [], |r| r.get(0))).await.expect("counts");
    assert_eq!(bodies, 0);
}

/// What came from another broker keeps its id, be that the position that another has here.
#[actix_rt::test]
async fn pages_of_dead_letters_go_by_position_whatever_ids_they_came_with() {
    let bench = Bench::new().await;
    let a = bench.client("a", &["t"]).await;
    bench.overfill(&a, 0, 4).await;
    let letters = bench.broker.dead_letters(&a, None, 10).await.expect("lists").dead_letters;
    let ids: Vec<String> = letters.into_iter().map(|letter| letter.id).collect();
    assert_eq!(ids.len(), 4);
    let came_with: Vec<String> = ids.iter().rev().cloned().collect();
    let rename = "UPDATE dead SET id = ?2 WHERE printf('%016x', pos) = ?1";
    let renamed: Vec<_> = ids.into_iter().zip(came_with.clone()).collect();
    let update =
        move |c: &rusqlite::Connection| renamed.iter().try_for_each(|(id, to)| c.execute(rename, (id, to)).map(drop));
    bench.db.write(update).await.expect("renames");
    let (mut listed, mut after) = (Vec::new(), None);
    for _ in 0..4 {
        let page = bench.broker.dead_letters(&a, after.as_deref(), 1).await.expect("lists");
        listed.extend(page.dead_letters.into_iter().map(|letter| letter.id));
        after = page.next;
    }
    assert_eq!((listed, after), (came_with, None));
}

#[actix_rt::test]
async fn what_comes_back_together_is_pulled_together() {
    let bench = Bench::new().await;
    let a = bench.client("a", &["t"]).await;
    let batch = (0..2).map(|n| message(&a, None, "t", n, 10)).collect();
    bench.broker.publish(&Queue::Outbox(a.clone()), batch).await.expect("publishes");
    bench.forward(Queue::Outbox(a.clone()), Target::Publish, 2).await;
    bench.forward(Queue::Publish, Target::Topic, 2).await;
    let mut leased = Vec::new();
    while leased.len() < 2 {
        leased.extend(bench.pull(&a, PullMode::Lease(Duration::from_secs(600))).await);
    }
    // Their bodies are on disk alone now; both are read before the first is handed out again.
    let receipts = leased.into_iter().filter_map(|pulled| pulled.receipt).collect();
    bench.broker.settle_pulled(&a, receipts, PullOutcome::Nack(None)).await.expect("gives back");
    let again = bench.pull(&a, PullMode::Lease(Duration::from_millis(20))).await;
    assert_eq!(again.iter().map(|pulled| number(&pulled.message)).collect::<Vec<_>>(), [0, 1]);
    // The same when their lease ends.
    let again = bench.pull(&a, PullMode::Auto).await;
    assert_eq!(again.iter().map(|pulled| number(&pulled.message)).collect::<Vec<_>>(), [0, 1]);
}

#[actix_rt::test]
async fn what_was_deleted_goes_although_the_last_commit_failed() {
    let bench = Bench::new().await;
    let (a, b) = (bench.client("a", &[]).await, bench.client("b", &["t"]).await);
    let waits = vec![message(&b, None, "t", 0, 10)];
    bench.broker.publish(&Queue::Outbox(b.clone()), waits).await.expect("there is room");
    cap_file(&bench.db, Some(0)).await;
    let outbox = Queue::Outbox(a.clone());
    for n in 0.. {
        let batch = (0..10).map(|i| message(&a, None, "t", n * 10 + i, 2000)).collect();
        let Err(error) = bench.broker.publish(&outbox, batch).await else { continue };
        assert_eq!(error.kind, crate::broker::BrokerErrorKind::DiskFull);
        break;
    }
    cap_file(&bench.db, None).await;
    // All of what failed was refused: no commit comes by itself. The rows of a deleted queue wait for none.
    bench.broker.delete_client(&b).await.expect("deletes");
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    let deleted = "SELECT count(*) FROM queue WHERE kind = 'deleted'";
    while bench.db.read(move |c| c.query_row(deleted, [], |row| row.get::<_, u64>(0))).await.expect("reads") > 0 {
        assert!(std::time::Instant::now() < deadline, "its rows are still there");
        tokio::task::yield_now().await;
    }
}
