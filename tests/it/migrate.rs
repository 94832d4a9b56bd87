//! `backbone migrate`: everything that lies in the embedded broker is in RabbitMQ afterwards, and the reverse, whatever
//! interrupts it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use backbone::broker::{Broker, DeadReason, Delivery, Health, Outcome, Payload, PullMode, PullOutcome, Queue, Target};
use backbone::client::{ClientId, ClientRecord, Limits};
use backbone::db::Db;
use backbone::secret::{Secret, SecretSlots};
use backbone::store::{Store, StoredClient};
use backbone::time::Timestamp;
use backbone::token::TokenSecret;
use backbone::topic::Pattern;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::TestApp;
use crate::support::env::{client_id, message, next, next_exactly, numbered, own_message};
use crate::support::fixture::{BrokerKind, Fixture as _};
use crate::support::process::RouterProcess;
use crate::support::rabbitmq::VirtualHost;
use crate::support::wait::{SOON, eventually, soon};

/// Runs each test against RabbitMQ with queues of each type.
macro_rules! on_each_rabbitmq {
    ($($name:ident),* $(,)?) => {
        mod rabbitmq_classic { $(#[actix_rt::test] async fn $name() { super::$name(super::BrokerKind::RabbitmqClassic).await; })* }
        mod rabbitmq_quorum { $(#[actix_rt::test] async fn $name() { super::$name(super::BrokerKind::RabbitmqQuorum).await; })* }
    };
}

on_each_rabbitmq!(
    everything_is_moved_to_rabbitmq_and_the_window_of_own_ids_works_on,
    what_was_moved_there_and_back_is_what_it_was,
    killed_again_and_again_it_loses_nothing_and_doubles_nothing_but_ids,
    what_is_there_for_nobody_any_more_is_not_moved,
);

/// For how long what is delayed is.
const DELAY: Duration = Duration::from_secs(8);

/// A data directory of a router that was stopped, and a RabbitMQ to move to.
struct House {
    directory: TempDir,
    token_secret: String,
    kind: BrokerKind,
    host: VirtualHost,
}

/// A broker that is open on the house's file.
struct Open {
    db: Db,
    broker: Arc<dyn Broker>,
}

impl Open {
    async fn close(self) {
        soon("the broker closes", self.broker.close()).await;
        drop(self.broker);
        self.db.close();
    }
}

impl House {
    async fn new(kind: BrokerKind) -> Self {
        Self {
            directory: tempfile::tempdir().expect("a temporary directory"),
            token_secret: TokenSecret::generate().to_paserk(),
            kind,
            host: VirtualHost::create().await,
        }
    }

    fn db(&self) -> Db {
        Db::open(&self.directory.path().join("backbone.db")).expect("opens the file")
    }

    async fn registry(&self) -> (Db, Store) {
        let db = self.db();
        let secret = TokenSecret::parse(&self.token_secret).expect("a token secret");
        let store = Store::open(db.clone(), &secret).await.expect("opens the registry");
        (db, store)
    }

    /// Registers clients.
    async fn register(&self, clients: &[(&str, &[&str], Limits)]) {
        let (db, store) = self.registry().await;
        for (id, patterns, limits) in clients {
            let record = ClientRecord {
                client_id: client_id(id),
                name: None,
                subscriptions: patterns.iter().map(|text| Pattern::parse(text).expect("a pattern")).collect(),
                webhook: None,
                limits: limits.clone(),
                paused: false,
                created_at: Timestamp::now(),
            };
            let secrets = SecretSlots::new(&Secret::generate());
            let client = StoredClient { record, secrets, incarnation: 1, webhook_secrets: None };
            store.put(&client).await.expect("registers");
        }
        db.close();
    }

    async fn embedded(&self) -> Open {
        let db = self.db();
        let options = backbone::broker::embedded::Options { dedup_window: Duration::from_secs(600) };
        let telemetry = backbone::telemetry::new(0);
        let broker = backbone::broker::embedded::open(db.clone(), options, telemetry).await.expect("opens");
        Open { db, broker }
    }

    async fn rabbitmq(&self) -> Open {
        let db = self.db();
        let options = backbone::broker::amqp::Options {
            url: self.host.url(),
            queue_type: self.kind.queue_type(),
            management_url: None,
            dedup_window: Duration::from_secs(600),
            held_for: backbone::broker::amqp::HELD_FOR,
        };
        let telemetry = backbone::telemetry::new(0);
        let broker = backbone::broker::amqp::connect(options, db.clone(), telemetry).await.expect("opens");
        eventually("RabbitMQ is reached", SOON, async || (broker.health() == Health::Ready).then_some(())).await;
        Open { db, broker }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_backbone"));
        command
            .env_clear()
            .env("DATA_DIR", self.directory.path())
            .env("SOAR_TOKEN_SECRET", &self.token_secret)
            .env("RUST_BACKTRACE", "1")
            .envs(self.kind.router_env(self.host.url()))
            .current_dir(self.directory.path())
            .arg("migrate")
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    fn to_rabbitmq(&self, more: &[&str]) -> Command {
        let url = self.host.url();
        self.command(&[&["--to", &url], more].concat())
    }

    fn to_embedded(&self, more: &[&str]) -> Command {
        self.command(&[&["--to", "embedded"], more].concat())
    }
}

/// Runs it to its end, which must be a good one, and returns what it printed.
async fn done(command: Command) -> String {
    let (code, stdout, stderr) = ran(command).await;
    assert_eq!(code, Some(0), "{stderr}");
    stdout
}

/// Runs it to its end, which must be a refusal, and returns the one line that says why.
async fn refused(command: Command) -> String {
    let (code, stdout, stderr) = ran(command).await;
    assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
    stderr.lines().last().unwrap_or_default().to_owned()
}

async fn ran(mut command: Command) -> (Option<i32>, String, String) {
    let run = actix_rt::task::spawn_blocking(move || command.output());
    let output = run.await.expect("does not panic").expect("the program starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("a line is a JSON document")).collect()
}

/// What there is to know of a message in a queue.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Seen {
    sender: String,
    id: String,
    own_id: bool,
    topic: Option<String>,
    envelope: Vec<u8>,
    traceparent: Option<String>,
    /// Before it was looked at.
    deliveries: u32,
    attempts: u32,
}

fn seen(delivery: &Delivery) -> Seen {
    let Payload::Message(message) = &delivery.payload else { panic!("no message: {:?}", delivery.payload) };
    Seen {
        sender: message.sender.to_string(),
        id: message.id.to_string(),
        own_id: message.own_id,
        topic: message.topic.as_ref().map(ToString::to_string),
        envelope: message.envelope.to_vec(),
        traceparent: message.traceparent.as_deref().map(Into::into),
        deliveries: delivery.deliveries - 1,
        attempts: delivery.attempts,
    }
}

/// Everything that lies in a broker, by queue and in order; what is delayed apart from it. Takes it all out.
#[derive(Debug, Default, PartialEq, Eq)]
struct Contents {
    queues: BTreeMap<String, Vec<Seen>>,
    delayed: BTreeSet<Seen>,
    dead: BTreeMap<String, Vec<SeenDead>>,
}

/// A dead letter: id, origin, reason, attempts, time, body.
type SeenDead = (String, String, String, u32, i64, Vec<u8>);

/// The broker's own count is believed, but for inboxes when it is known what should be in them: RabbitMQ counts what is
/// delayed to the second.
async fn take_everything(
    broker: &Arc<dyn Broker>,
    clients: &[&str],
    due_ms: i64,
    expected: Option<&Contents>,
) -> Contents {
    let mut contents = Contents::default();
    let mut consumers = Vec::new();
    let mut internal: BTreeMap<&str, u64> = broker.internal_depths().await.expect("counts").into_iter().collect();
    let mut queues = vec![
        (Queue::Publish, internal.remove("soar-publish").expect("is there"), 0),
        (Queue::Unrouted, internal.remove("soar-unrouted").expect("is there"), 0),
    ];
    for id in clients.iter().map(|name| client_id(name)) {
        let depths = broker.depths(&id).await.expect("counts");
        queues.push((Queue::Outbox(id.clone()), depths.outbox, 0));
        queues.push((Queue::Notify(id.clone()), depths.notify, 0));
        queues.push((Queue::Inbox(id.clone()), depths.inbox, depths.dead));
    }
    for (queue, depth, dead) in queues {
        if let Queue::Inbox(id) = &queue {
            let letters = dead_letters(broker, id).await;
            assert_eq!(letters.len() as u64, dead, "dead letters of {id}");
            contents.dead.insert(id.to_string(), letters);
        }
        let mut consumer = broker.consume(&queue, 2000).await.expect("consumes");
        let list = contents.queues.entry(queue.to_string()).or_default();
        let depth = match (&queue, expected) {
            (Queue::Inbox(id), Some(expected)) => {
                let delayed = if id.as_str() == "beta" { expected.delayed.len() } else { 0 };
                expected.queues[&queue.to_string()].len() + delayed
            }
            _ => usize::try_from(depth).expect("fits"),
        };
        for _ in 0..depth {
            let delivery = next_exactly(&mut consumer, 1).await.remove(0);
            let one = seen(&delivery);
            if one.attempts > 0 {
                assert!(Timestamp::now().as_millis() >= due_ms, "{queue}: {one:?} came too early");
                contents.delayed.insert(one);
            } else {
                list.push(one);
            }
            delivery.settle(Outcome::Complete).await.expect("completes");
        }
        consumers.push((queue, consumer));
    }
    for (queue, mut consumer) in consumers {
        crate::support::stays_pending(&format!("{queue} has more than was counted"), consumer.next(1)).await;
    }
    contents
}

async fn dead_letters(broker: &Arc<dyn Broker>, id: &ClientId) -> Vec<(String, String, String, u32, i64, Vec<u8>)> {
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        // Small pages, so that the cursor is used.
        let page = broker.dead_letters(id, after.as_deref(), 2).await.expect("lists");
        all.extend(page.dead_letters.into_iter().map(|letter| {
            let body = match letter.payload {
                Payload::Message(message) => message.envelope.to_vec(),
                Payload::Foreign(foreign) => foreign.body.to_vec(),
            };
            let origin = format!("{:?}", letter.origin);
            (letter.id, origin, letter.reason.as_str().to_owned(), letter.attempts, letter.died_at.as_millis(), body)
        }));
        match page.next {
            Some(next) => after = Some(next),
            None => return all,
        }
    }
}

const CLIENTS: [&str; 3] = ["alpha", "beta", "gamma"];

/// Fills every kind of queue. Returns when the delayed messages are due.
async fn fill(house: &House) -> i64 {
    let limits = Limits { send_per_s: None, max_inbox_messages: Some(5000), inbox_ttl_s: None };
    house
        .register(&[
            ("alpha", &["a.*"], limits.clone()),
            ("beta", &["a.#", "b.#"], Limits::default()),
            ("gamma", &[], Limits::default()),
        ])
        .await;
    let open = house.embedded().await;
    let broker = &open.broker;
    let (alpha, beta, gamma) = (client_id("alpha"), client_id("beta"), client_id("gamma"));
    for (id, patterns, limits) in
        [(&alpha, &["a.*"][..], limits), (&beta, &["a.#", "b.#"], Limits::default()), (&gamma, &[], Limits::default())]
    {
        broker.declare_client(id, &limits).await.expect("declares");
        let patterns: Vec<Pattern> = patterns.iter().map(|text| Pattern::parse(text).expect("a pattern")).collect();
        broker.bind(id, &patterns).await.expect("binds");
    }
    let publish = async |queue: Queue, messages| broker.publish(&queue, messages).await.expect("publishes");
    // Inboxes of two, under one body each, and what nobody wants.
    publish(Queue::Publish, numbered(&gamma, "a.x", 620)).await;
    publish(Queue::Publish, numbered(&gamma, "b.x.y", 15)).await;
    publish(Queue::Publish, numbered(&gamma, "c", 12)).await;
    let mut consumer = broker.consume(&Queue::Publish, 1000).await.expect("consumes");
    crate::support::env::forward_all(next_exactly(&mut consumer, 647).await, Target::Topic).await;
    drop(consumer);
    // Own ids that went through, and one that waits.
    publish(Queue::Outbox(gamma.clone()), vec![own_message(&gamma, "went-through", Some("c"), "1")]).await;
    let mut consumer = broker.consume(&Queue::Outbox(gamma.clone()), 10).await.expect("consumes");
    crate::support::env::forward_all(next_exactly(&mut consumer, 1).await, Target::Publish).await;
    // What its sender's queue died of.
    publish(Queue::Outbox(gamma.clone()), numbered(&gamma, "dead", 2)).await;
    let batch = next_exactly(&mut consumer, 2).await;
    crate::support::env::settle_all(batch, Outcome::Dead { reason: DeadReason::InvalidMessage, attempts: 0 }).await;
    drop(consumer);
    // Order, odd bytes, a long message, and own ids among the others.
    let long = format!("\"{}\"", "x".repeat(900_000));
    let odd = ["null", r#"{"b":1.0e0,  "a":[1,2 ,3]}"#, "\"\\u0000 \u{1F600}\"", "12345678901234567890.10", &long];
    let mut sent = numbered(&alpha, "a.out", 700);
    sent.extend(odd.iter().map(|body| message(&alpha, Some("a.odd"), body)));
    sent.push(own_message(&alpha, "waits", Some("a.own"), "1"));
    sent.push(own_message(&alpha, "{}\"\\!~", Some("a.own"), "2"));
    for part in sent.chunks(300) {
        publish(Queue::Outbox(alpha.clone()), part.to_vec()).await;
    }
    publish(Queue::Notify(beta.clone()), (0..20).map(|n| message(&beta, None, &n.to_string())).collect()).await;
    publish(Queue::Publish, numbered(&gamma, "a.later", 30)).await;
    // Handed out and given back.
    let leased =
        broker.pull(&alpha, 10, Duration::ZERO, PullMode::Lease(Duration::from_secs(60))).await.expect("pulls");
    assert_eq!(leased.len(), 10);
    let receipts = leased.into_iter().filter_map(|pulled| pulled.receipt).collect();
    broker.settle_pulled(&alpha, receipts, PullOutcome::Nack(None)).await.expect("nacks");
    // Dead letters, and what waits for its time.
    let mut consumer = broker.consume(&Queue::Inbox(beta.clone()), 10).await.expect("consumes");
    for reason in [DeadReason::DeliveryFailed, DeadReason::Expired, DeadReason::Rejected] {
        let batch = next_exactly(&mut consumer, 1).await;
        crate::support::env::settle_all(batch, Outcome::Dead { reason, attempts: 7 }).await;
    }
    let due_ms = Timestamp::now().as_millis() + i64::try_from(DELAY.as_millis()).expect("fits");
    let batch = next_exactly(&mut consumer, 4).await;
    crate::support::env::settle_all(batch, Outcome::Delay { delay: DELAY, attempts: 3 }).await;
    drop(consumer);
    open.close().await;
    due_ms
}

/// What is in a copy of the embedded broker's file.
async fn contents_of_a_copy(house: &House, due_ms: i64) -> Contents {
    let copy = tempfile::tempdir().expect("a temporary directory");
    std::fs::copy(house.directory.path().join("backbone.db"), copy.path().join("backbone.db")).expect("copies");
    let db = Db::open(&copy.path().join("backbone.db")).expect("opens the file");
    let options = backbone::broker::embedded::Options { dedup_window: Duration::from_secs(600) };
    let broker =
        backbone::broker::embedded::open(db.clone(), options, backbone::telemetry::new(0)).await.expect("opens");
    let open = Open { db, broker };
    let contents = take_everything(&open.broker, &CLIENTS, due_ms, None).await;
    open.close().await;
    contents
}

fn assert_same(came: &Contents, expected: &Contents) {
    for (queue, list) in &expected.queues {
        let other = &came.queues[queue];
        assert_eq!(other.len(), list.len(), "{queue}");
        for (at, (one, other)) in list.iter().zip(other).enumerate() {
            assert!(one == other, "{queue}, message {at}: {other:?} instead of {one:?}");
        }
    }
    assert_eq!(came.dead, expected.dead);
    assert_eq!(came.delayed, expected.delayed);
    assert_eq!(came.queues.len(), expected.queues.len());
}

async fn everything_is_moved_to_rabbitmq_and_the_window_of_own_ids_works_on(kind: BrokerKind) {
    let house = House::new(kind).await;
    let due_ms = fill(&house).await;
    let expected = contents_of_a_copy(&house, due_ms).await;
    let events = json_lines(&done(house.to_rabbitmq(&["--json"])).await);
    let last = events.last().expect("says that it is done");
    assert_eq!((&last["event"], &last["from"]), (&json!("done"), &json!("embedded")), "{last}");
    assert!(!last.to_string().contains("password"), "{last}");
    let moved = json!({
        "outbox": 707, "notify": 20, "inbox": 620 + 635 - 3 - 4, "delayed": 4, "dead": 5, "publish": 31, "unrouted": 12
    });
    assert_eq!(last["moved"], moved, "{last}");
    assert_eq!(events[0]["event"], "begun");
    assert!(events.iter().any(|event| event["event"] == "queue_moved" && event["queue"] == "alpha-outbox"));

    let open = house.rabbitmq().await;
    // The window goes on: one id went through before, and one waits in the outbox, where it counts as well.
    let (alpha, gamma) = (client_id("alpha"), client_id("gamma"));
    for (client, id, known) in [(&gamma, "went-through", true), (&alpha, "waits", true), (&gamma, "waits", false)] {
        let again = vec![own_message(client, id, Some("c"), "9")];
        let published = open.broker.publish(&Queue::Outbox(client.clone()), again).await.expect("publishes");
        assert_eq!(published.duplicates, [known], "{client} {id}");
    }
    let mut consumer = open.broker.consume(&Queue::Outbox(gamma.clone()), 10).await.expect("consumes");
    crate::support::env::settle_all(next_exactly(&mut consumer, 1).await, Outcome::Complete).await;
    drop(consumer);
    // What waits goes its way, although its id is known.
    let mut consumer = open.broker.consume(&Queue::Outbox(alpha.clone()), 1000).await.expect("consumes");
    let batch = next_exactly(&mut consumer, 707).await;
    let outbox: Vec<Seen> = batch.iter().map(seen).collect();
    crate::support::env::forward_all(batch, Target::Publish).await;
    drop(consumer);
    let mut came = take_everything(&open.broker, &CLIENTS, due_ms, Some(&expected)).await;
    let forwarded = came.queues.get_mut("soar-publish").expect("is there").split_off(31);
    assert_eq!(
        forwarded.iter().map(|one| &one.id).collect::<Vec<_>>(),
        outbox.iter().map(|one| &one.id).collect::<Vec<_>>()
    );
    came.queues.insert("alpha-outbox".into(), outbox);
    assert_same(&came, &expected);
    open.close().await;
}

async fn what_was_moved_there_and_back_is_what_it_was(kind: BrokerKind) {
    let house = House::new(kind).await;
    let due_ms = fill(&house).await;
    let expected = contents_of_a_copy(&house, due_ms).await;
    let table = done(house.to_rabbitmq(&[])).await;
    assert!(table.contains("in outboxes") && table.contains("total"), "{table}");
    // Once more changes nothing.
    let again = json_lines(&done(house.to_rabbitmq(&["--json"])).await);
    assert_eq!(again.last().expect("a line")["was_done"], true, "{again:?}");
    let events = json_lines(&done(house.to_embedded(&["--json"])).await);
    let last = events.last().expect("says that it is done");
    assert_eq!((&last["event"], &last["to"]), (&json!("done"), &json!("embedded")), "{last}");
    let open = house.embedded().await;
    let gamma = client_id("gamma");
    let again = vec![own_message(&gamma, "went-through", Some("c"), "9")];
    let published = open.broker.publish(&Queue::Outbox(gamma), again).await.expect("publishes");
    assert_eq!(published.duplicates, [true], "the window of own ids goes on");
    // Limits and bindings are those of the registry.
    let (alpha, beta) = (client_id("alpha"), client_id("beta"));
    let came = take_everything(&open.broker, &CLIENTS, due_ms, None).await;
    let moved = |contents: &Contents| contents.delayed.iter().map(|one| one.id.clone()).collect::<BTreeSet<_>>();
    assert_eq!(moved(&came), moved(&expected));
    assert_same(&came, &expected);
    open.broker.publish(&Queue::Publish, numbered(&alpha, "a.b.c", 1)).await.expect("publishes");
    let mut consumer = open.broker.consume(&Queue::Publish, 1).await.expect("consumes");
    crate::support::env::forward_all(next(&mut consumer, 1).await, Target::Topic).await;
    let depths = (open.broker.depths(&alpha).await.expect("counts"), open.broker.depths(&beta).await.expect("counts"));
    assert_eq!((depths.0.inbox, depths.1.inbox), (0, 1));
    // A dead letter is found by the id that it has kept.
    let letters = dead_letters(&open.broker, &beta).await;
    let replayed = open.broker.replay_dead(&beta, Some(&[letters[1].0.clone()])).await.expect("replays");
    assert_eq!(replayed, 1);
    let left: Vec<String> = dead_letters(&open.broker, &beta).await.into_iter().map(|letter| letter.0).collect();
    assert_eq!(left, [letters[0].0.clone(), letters[2].0.clone()]);
    open.close().await;
}

/// Runs it, and kills it when it has told so often that it goes on. Returns whether it came to its end before.
async fn killed_after(mut command: Command, lines: usize) -> bool {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let run = move || {
        let mut child = command.spawn().expect("the program starts");
        let mut told = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let mut told = told.by_ref().take(lines).map(|line| line.expect("UTF-8"));
        let ended = told.any(|line| line.contains("\"done\""));
        if !ended {
            // It may have failed, which is not what is asked for.
            let early = child.try_wait().expect("a child can be waited for");
            assert!(early.is_none(), "it ended by itself: {early:?}");
            child.kill().expect("a child can be killed");
        }
        let output = child.wait_with_output().expect("a child can be waited for");
        assert!(!ended || output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        ended
    };
    actix_rt::task::spawn_blocking(run).await.expect("does not panic")
}

/// Runs it until it is done, killed over and over; fails when it was not killed often enough to mean anything.
async fn done_in_spite_of_kills(command: impl Fn() -> Command) {
    // At the beginning, then later and later.
    for (kills, lines) in [1, 2, 3, 4, 6, 9, 13, 19, 28, 42, 63, 95, 142].into_iter().enumerate() {
        if killed_after(command(), lines).await {
            assert!(kills >= 4, "it was killed {kills} times only");
            return;
        }
    }
    panic!("it comes to no end");
}

async fn killed_again_and_again_it_loses_nothing_and_doubles_nothing_but_ids(kind: BrokerKind) {
    let house = House::new(kind).await;
    let due_ms = fill(&house).await;
    let open = house.embedded().await;
    let gamma = client_id("gamma");
    for start in 0..6 {
        let own = (0..500).map(|n| own_message(&gamma, &format!("{start}-{n}"), Some("c.own"), &n.to_string()));
        open.broker.publish(&Queue::Outbox(gamma.clone()), own.collect()).await.expect("publishes");
        open.broker.publish(&Queue::Outbox(gamma.clone()), numbered(&gamma, "c.out", 500)).await.expect("publishes");
    }
    open.close().await;
    let expected = contents_of_a_copy(&house, due_ms).await;

    done_in_spite_of_kills(|| house.to_rabbitmq(&["--json"])).await;
    let open = house.rabbitmq().await;
    let depths = |open: &Open| {
        let broker = Arc::clone(&open.broker);
        async move {
            let mut all = Vec::new();
            for id in CLIENTS.map(client_id) {
                all.push(broker.depths(&id).await.expect("counts"));
            }
            (all, broker.internal_depths().await.expect("counts"))
        }
    };
    // What is delayed is in its inbox then, and counted once; and nobody looks through an inbox for what has expired.
    let there = eventually("everything is there to be counted", SOON, async || {
        let found = depths(&open).await;
        let is_due = Timestamp::now().as_millis() > due_ms + 4_000;
        let inboxes = ["alpha-inbox", "beta-inbox"].map(|name| expected.queues[name].len() as u64);
        let all = found.0[0].inbox >= inboxes[0] && found.0[1].inbox >= inboxes[1] + expected.delayed.len() as u64;
        (is_due && all).then_some(found)
    })
    .await;
    open.close().await;

    done_in_spite_of_kills(|| house.to_embedded(&["--json"])).await;
    let open = house.embedded().await;
    let mut back = depths(&open).await;
    // Copies of an own id that waits in its sender's queue are recognised on the way back.
    let doubled_ids = there.0[2].outbox - back.0[2].outbox;
    assert!(doubled_ids <= 3000, "{there:?} {back:?}");
    back.0[2].outbox += doubled_ids;
    assert_eq!(back, there, "nothing is lost or doubled on the way back");
    let came = take_everything(&open.broker, &CLIENTS, due_ms, None).await;
    open.close().await;
    for (queue, list) in &expected.queues {
        let mut known = BTreeSet::new();
        let once: Vec<&Seen> = came.queues[queue].iter().filter(|one| known.insert(one.id.clone())).collect();
        assert_eq!(once.len(), list.len(), "{queue}");
        // A kill hands out again what was on its way; apart from that all is as it was, and in order.
        for (one, other) in list.iter().zip(once) {
            assert!(
                Seen { deliveries: 0, ..one.clone() } == Seen { deliveries: 0, ..other.clone() },
                "{queue}: {other:?} is not {one:?}"
            );
            assert!(other.deliveries >= one.deliveries, "{queue}: {other:?}");
        }
    }
    let strip = |list: &BTreeSet<Seen>| list.iter().map(|one| (one.id.clone(), one.attempts)).collect::<BTreeSet<_>>();
    assert_eq!(strip(&came.delayed), strip(&expected.delayed));
    for (client, letters) in &expected.dead {
        let once: BTreeSet<_> = came.dead[client].iter().cloned().collect();
        assert_eq!(once, letters.iter().cloned().collect(), "dead letters of {client}");
    }
}

async fn what_is_there_for_nobody_any_more_is_not_moved(kind: BrokerKind) {
    let house = House::new(kind).await;
    let [stays, gone, half] = ["stays", "gone", "half"].map(client_id);
    house.register(&[("stays", &["x"], Limits::default())]).await;
    let open = house.rabbitmq().await;
    let broker = &open.broker;
    for id in [&stays, &gone, &half] {
        broker.declare_client(id, &Limits::default()).await.expect("declares");
        broker.bind(id, &[Pattern::parse("x").expect("a pattern")]).await.expect("binds");
    }
    broker.publish(&Queue::Publish, numbered(&stays, "x", 1)).await.expect("publishes");
    let mut consumer = broker.consume(&Queue::Publish, 1).await.expect("consumes");
    crate::support::env::forward_all(next_exactly(&mut consumer, 1).await, Target::Topic).await;
    for id in [&stays, &gone] {
        let mut consumer = broker.consume(&Queue::Inbox(id.clone()), 1).await.expect("consumes");
        let delay = Outcome::Delay { delay: Duration::from_secs(600), attempts: 1 };
        crate::support::env::settle_all(next_exactly(&mut consumer, 1).await, delay).await;
    }
    // One is deleted while something is delayed for it; of the other the deletion was cut off before its queues went.
    broker.delete_client(&gone).await.expect("deletes");
    drop(consumer);
    open.close().await;
    let (db, store) = house.registry().await;
    store.mark_unfinished(&half).await.expect("marks");
    db.close();

    let events = json_lines(&done(house.to_embedded(&["--json"])).await);
    let last = events.last().expect("says that it is done");
    assert_eq!((&last["moved"]["delayed"], &last["total"]), (&json!(1), &json!(1)), "{last}");
    let open = house.embedded().await;
    assert_eq!(open.broker.depths(&stays).await.expect("counts").inbox, 1);
    for id in [&gone, &half] {
        let unknown = open.broker.depths(id).await.expect_err("it is gone");
        assert_eq!(unknown.kind, backbone::broker::BrokerErrorKind::NotFound);
    }
    open.close().await;
}

/// What a refused or interrupted move says, and leaves.
#[actix_rt::test]
async fn rabbitmq_it_refuses_what_would_go_wrong_and_says_what_to_do() {
    let house = House::new(BrokerKind::RabbitmqClassic).await;
    let nothing = refused(house.to_rabbitmq(&[])).await;
    assert!(nothing.contains("set DATA_DIR"), "{nothing}");
    fill(&house).await;
    let (code, _, stderr) = ran(house.to_rabbitmq(&["--from", &house.host.url()])).await;
    assert_eq!(code, Some(2), "{stderr}");
    let (code, _, stderr) = ran(house.command(&["--to", "amqpx://me:hidden@x"])).await;
    assert!(code == Some(2) && !stderr.contains("hidden"), "{stderr}");

    let open = house.embedded().await;
    let running = refused(house.to_rabbitmq(&[])).await;
    assert!(running.contains("stop the router"), "{running}");
    open.close().await;

    // RabbitMQ has a queue of that name with something in it.
    let queue = format!("queues/{}/alpha-inbox", house.host.name());
    let body = json!({"durable": true, "arguments": {"x-queue-type": "classic"}});
    house.host.manage(reqwest::Method::PUT, &queue, Some(body)).await;
    let publish = format!("exchanges/{}/amq.default/publish", house.host.name());
    let body = json!({"properties": {}, "routing_key": "alpha-inbox", "payload": "x", "payload_encoding": "string"});
    house.host.manage(reqwest::Method::POST, &publish, Some(body)).await;
    let other = refused(house.to_rabbitmq(&[])).await;
    assert!(other.contains("1 messages already (alpha-inbox 1)") && other.contains("purge_queue"), "{other}");
    assert!(!other.contains("password"), "{other}");
    house.host.manage(reqwest::Method::DELETE, &format!("{queue}/contents"), None).await;

    // Interrupted: no router starts on half of it, and nothing but the same move goes on.
    assert!(!killed_after(house.to_rabbitmq(&["--json"]), 2).await);
    let mut serve = house.command(&[]);
    serve = {
        let mut plain = Command::new(serve.get_program());
        plain.env_clear().envs(serve.get_envs().filter_map(|(name, value)| Some((name, value?))));
        plain.env("SOAR_BIND", "127.0.0.1:0").arg("serve").stdin(Stdio::null()).current_dir(house.directory.path());
        plain
    };
    let (code, _, stderr) = ran(serve).await;
    assert!(code == Some(1) && stderr.contains("backbone migrate --to"), "{stderr}");
    let reverse = refused(house.to_embedded(&[])).await;
    assert!(reverse.contains("finish it first"), "{reverse}");
    done(house.to_rabbitmq(&[])).await;

    // A router on that RabbitMQ, from another data directory.
    let elsewhere = tempfile::tempdir().expect("a temporary directory");
    let data = elsewhere.path().join("data");
    std::fs::create_dir(&data).expect("a data directory");
    let router = RouterProcess::start(&data, house.kind.router_env(house.host.url())).await;
    let at_work = refused(house.to_embedded(&[])).await;
    assert!(at_work.contains("a router is at work"), "{at_work}");
    drop(router);
}

/// The whole way of somebody who outgrows one process: clients, secrets and messages are there afterwards.
#[actix_rt::test]
async fn rabbitmq_a_router_goes_on_where_it_was() {
    let mut app = TestApp::start(BrokerKind::Embedded).await;
    let sender = app.onboard("sender", &[]).await;
    let receiver = app.onboard("receiver", &["x.#"]).await;
    for n in 0..20 {
        sender.send("x.y", json!(n)).await;
    }
    receiver.wait_for_depth("inbox", 20).await;
    let (address, token) = (app.router.address(), app.admin_token().to_owned());
    app.router.terminate();
    assert!(app.router.wait_for_exit(SOON).await.success());

    let host = VirtualHost::create().await;
    let data = app.directory().join("data");
    let mut migrate = Command::new(env!("CARGO_BIN_EXE_backbone"));
    migrate.env_clear().env("DATA_DIR", &data).current_dir(app.directory()).args(["migrate", "--to", &host.url()]);
    let told = ran(migrate).await;
    assert_eq!(told.0, Some(0), "{}", told.2);
    assert!(
        told.2.contains("receiver-inbox: 20 messages moved") && told.2.contains("set SOAR_BROKER_URL"),
        "{}",
        told.2
    );

    let env = BrokerKind::RabbitmqQuorum.router_env(host.url());
    let router = RouterProcess::start(&data, env).await;
    assert_ne!(router.address(), address);
    assert_eq!(router.admin_token(), token);
    let api = crate::support::http::Api::new(router.address());
    let receiver = crate::support::http::Client { api: api.clone(), ..receiver };
    let sender = crate::support::http::Client { api, ..sender };
    sender.send("x.z", json!(20)).await;
    let came = receiver.receive_exactly(21, "ack=auto").await;
    assert_eq!(crate::support::http::messages(&came), (0..21).map(|n| json!(n)).collect::<Vec<_>>());
    drop(router);
}
