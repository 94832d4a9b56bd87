//! Random operations, checked against a model of where every message must be.
//!
//! The model knows for each accepted message in which queues its copies lie; a dead letter counts as lying in the queue
//! that it died in. It does not predict what depends on time (which messages a limit buries, when a lease ends): it
//! checks that what happens is allowed, that nothing is lost, doubled or invented, and that the file agrees with it.
//!
//! What consumers settle takes effect at once and is durable later. So the model remembers for each message where it
//! was since the last operation that waited for the disk: after an abrupt restart it must be at one of these places.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rusqlite::Connection;

use super::core::UNROUTED_MAX;
use super::tests::{cap_file, message, number};
use super::{Embedded, Options, Shared, schema, start};
use crate::broker::{
    Broker, BrokerErrorKind, DeadReason, Delivery, Origin, Outcome, Payload, PullMode, PullOutcome, Queue, Receipt,
    Target, settle,
};
use crate::client::{ClientId, Limits};
use crate::db::Db;
use crate::topic::{Pattern, Topic};

/// Sequences that are tried, and operations in one.
const CASES: u32 = 40;
const OPERATIONS: std::ops::Range<usize> = 20..70;

/// Longer than anything takes: what takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(20);

/// A lease that runs out soon, one that does not, and a delay.
const SHORT: Duration = Duration::from_millis(15);
const LONG: Duration = Duration::from_secs(3000);
const DELAY: Duration = Duration::from_millis(12);

const CLIENTS: [&str; 3] = ["a", "b", "c"];
const TOPICS: [&str; 3] = ["t.x", "t.y", "u"];
const PATTERNS: [&[&str]; 5] = [&[], &["t.#"], &["#"], &["u", "t.*"], &["t.x", "t.#", "u"]];

/// One message to publish: its own id, its topic, and how long it is.
type Sent = (Option<u8>, usize, bool);

#[derive(Debug, Clone)]
enum Op {
    /// With `ahead`, pipelines run before the publish is durable.
    Publish {
        client: usize,
        notify: bool,
        sent: Vec<Sent>,
        ahead: bool,
    },
    /// The same own id several times at once.
    Race {
        client: usize,
        id: u8,
        times: usize,
        large: bool,
    },
    /// Consumes a queue: outbox and notify queue of each client, and `soar-publish`.
    Forward {
        from: usize,
        max: usize,
        ends: Vec<u8>,
    },
    /// All that there is, all the way.
    ForwardAll,
    Pull {
        client: usize,
        max: usize,
        lease: Option<bool>,
    },
    Settle {
        count: usize,
        how: u8,
    },
    Consume {
        client: usize,
        max: usize,
        ends: Vec<u8>,
    },
    SettleKept {
        count: usize,
        end: u8,
    },
    Limit {
        client: usize,
        max: Option<u64>,
    },
    Bind {
        client: usize,
        patterns: usize,
    },
    Replay {
        client: usize,
        count: Option<usize>,
    },
    Purge {
        client: usize,
    },
    Exist {
        client: usize,
    },
    Restart,
    Crash {
        publish: bool,
    },
    Cap {
        pages: u32,
    },
    Uncap,
    /// Until delays and short leases are over.
    Elapse,
    Check,
}

fn op() -> impl Strategy<Value = Op> {
    let client = 0..CLIENTS.len();
    let sent = (proptest::option::weighted(0.2, 0u8..6), 0..TOPICS.len(), proptest::bool::weighted(0.2));
    let ends = |weights: [u32; 7]| {
        let end = prop_oneof![
            weights[0] => Just(0u8), weights[1] => Just(1u8), weights[2] => Just(2u8), weights[3] => Just(3u8),
            weights[4] => Just(4u8), weights[5] => Just(5u8), weights[6] => Just(6u8)
        ];
        proptest::collection::vec(end, 8)
    };
    prop_oneof![
        12 => (client.clone(), proptest::bool::weighted(0.3), proptest::collection::vec(sent, 1..14), any::<bool>())
            .prop_map(|(client, notify, sent, ahead)| Op::Publish { client, notify, sent, ahead }),
        2 => (client.clone(), 0u8..6, 2..5usize, any::<bool>())
            .prop_map(|(client, id, times, large)| Op::Race { client, id, times, large }),
        6 => (0..7usize, 1..30usize, ends([30, 1, 2, 2, 2, 1, 1]))
            .prop_map(|(from, max, ends)| Op::Forward { from, max, ends }),
        10 => Just(Op::ForwardAll),
        9 => (client.clone(), 1..40usize, proptest::option::weighted(0.6, any::<bool>()))
            .prop_map(|(client, max, lease)| Op::Pull { client, max, lease }),
        5 => (1..30usize, 0u8..4).prop_map(|(count, how)| Op::Settle { count, how }),
        6 => (client.clone(), 1..20usize, ends([0, 6, 3, 4, 3, 3, 3]))
            .prop_map(|(client, max, ends)| Op::Consume { client, max, ends }),
        3 => (1..10usize, 0u8..7).prop_map(|(count, end)| Op::SettleKept { count, end }),
        2 => (client.clone(), proptest::option::weighted(0.5, 0u64..40))
            .prop_map(|(client, max)| Op::Limit { client, max }),
        2 => (client.clone(), 0..PATTERNS.len()).prop_map(|(client, patterns)| Op::Bind { client, patterns }),
        2 => (client.clone(), proptest::option::of(0..6usize)).prop_map(|(client, count)| Op::Replay { client, count }),
        1 => client.clone().prop_map(|client| Op::Purge { client }),
        1 => client.prop_map(|client| Op::Exist { client }),
        2 => Just(Op::Restart),
        2 => any::<bool>().prop_map(|publish| Op::Crash { publish }),
        2 => (0u32..6).prop_map(|pages| Op::Cap { pages }),
        2 => Just(Op::Uncap),
        2 => Just(Op::Elapse),
        2 => Just(Op::Check),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Place {
    Outbox(usize),
    Notify(usize),
    Inbox(usize),
    Publish,
    Unrouted,
}

impl Place {
    fn owner(self) -> Option<usize> {
        match self {
            Self::Outbox(client) | Self::Notify(client) | Self::Inbox(client) => Some(client),
            Self::Publish | Self::Unrouted => None,
        }
    }

    fn queue(self) -> Queue {
        match self {
            Self::Outbox(client) => Queue::Outbox(id_of(client)),
            Self::Notify(client) => Queue::Notify(id_of(client)),
            Self::Inbox(client) => Queue::Inbox(id_of(client)),
            Self::Publish => Queue::Publish,
            Self::Unrouted => Queue::Unrouted,
        }
    }
}

type Places = BTreeSet<Place>;

fn id_of(client: usize) -> ClientId {
    ClientId::parse(CLIENTS[client]).expect("an id")
}

#[derive(Debug, Default)]
struct Model {
    next: usize,
    /// Where the copies of each accepted message are.
    at: BTreeMap<usize, Places>,
    /// Where they were since an operation last waited for the disk.
    was: HashMap<usize, Vec<Places>>,
    /// Where each came in, and under which topic.
    sent: HashMap<usize, (Place, usize)>,
    ids: HashSet<(usize, u8)>,
    exists: [bool; CLIENTS.len()],
    /// Whether a limit may bury something of the client's at any time.
    limited: [bool; CLIENTS.len()],
    patterns: [usize; CLIENTS.len()],
    /// Those that were handed out and came back, or may have: they are in no order.
    came_back: HashSet<usize>,
    /// The last one that an inbox handed out, by where it came in.
    handed_out: HashMap<(Place, usize), usize>,
    delayed: HashMap<(Place, usize), Instant>,
}

impl Model {
    fn relocate(&mut self, n: usize, from: Place, to: &[Place]) {
        let at = self.at.get_mut(&n).expect("it was accepted");
        self.was.entry(n).or_default().push(at.clone());
        assert!(at.remove(&from), "{n} is not in {from:?}");
        at.extend(to);
        self.delayed.remove(&(from, n));
    }

    /// Everything that was done so far is durable.
    fn all_durable(&mut self) {
        self.was.clear();
    }

    fn targets(&self, from: Place, n: usize) -> Vec<Place> {
        let inboxes = (0..CLIENTS.len()).filter(|client| self.exists[*client]);
        match from {
            Place::Outbox(_) => vec![Place::Publish],
            Place::Notify(_) => inboxes.map(Place::Inbox).collect(),
            _ => {
                let topic = Topic::parse(TOPICS[self.sent[&n].1]).expect("a topic");
                let matches = |client: &usize| {
                    let mut patterns = PATTERNS[self.patterns[*client]].iter();
                    patterns.any(|pattern| Pattern::parse(pattern).expect("a pattern").matches(&topic))
                };
                let inboxes: Vec<Place> = inboxes.filter(matches).map(Place::Inbox).collect();
                if inboxes.is_empty() { vec![Place::Unrouted] } else { inboxes }
            }
        }
    }

    /// It is handed out: it must be there, and in order.
    fn take(&mut self, from: Place, n: usize, deliveries: u32) {
        let is_there = self.at.get(&n).is_some_and(|at| at.contains(&from));
        assert!(is_there, "{from:?} hands out {n}, which is at {:?}", self.at.get(&n));
        if let Some(until) = self.delayed.remove(&(from, n)) {
            assert!(Instant::now() >= until, "{n} comes back to {from:?} before its delay is over");
        }
        if let (1, Place::Inbox(client), false) = (deliveries, from, self.came_back.contains(&n)) {
            let last = self.handed_out.insert((self.sent[&n].0, client), n);
            assert!(last.is_none_or(|last| last < n), "{from:?} hands out {n} after {last:?}");
        }
    }

    fn in_queues_of(&self, client: usize) -> Vec<usize> {
        let is_here = |at: &Places| at.iter().any(|place| place.owner() == Some(client));
        self.at.iter().filter(|(_, at)| is_here(at)).map(|(n, _)| *n).collect()
    }
}

/// A delivery that is not settled yet.
struct Kept {
    from: Place,
    n: usize,
    delivery: Delivery,
}

/// A leased message.
struct Held {
    client: usize,
    n: usize,
    receipt: Receipt,
    until: Option<Instant>,
}

struct World {
    directory: tempfile::TempDir,
    db: Db,
    broker: Arc<Embedded>,
    model: Model,
    kept: Vec<Kept>,
    held: Vec<Held>,
    /// Receipts that must be unknown.
    stale: Vec<(usize, Receipt)>,
    capped: bool,
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} hangs"))
}

/// Copies the files as they are at one moment, as a kill leaves them. As long as somebody reads, SQLite neither shortens
/// the write-ahead log nor begins it anew; what is appended to it meanwhile counts or does not, as with a kill.
async fn copy_at_once(db: &Db, from: &Path, to: &Path) {
    let (from, to) = (from.to_owned(), to.to_owned());
    let copy = move |connection: &rusqlite::Connection| {
        let _reading = connection.unchecked_transaction()?;
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(()))?;
        for name in ["backbone.db-wal", "backbone.db"] {
            std::fs::copy(from.join(name), to.join(name)).expect("copies");
        }
        Ok(())
    };
    db.read(copy).await.expect("reads");
}

async fn open(directory: &Path) -> (Db, Arc<Embedded>) {
    let db = Db::open(&directory.join("backbone.db")).expect("opens");
    let options = Options { dedup_window: Duration::from_secs(600) };
    let shared = start(db.clone(), options, crate::telemetry::new(0)).await.expect("opens");
    (db, Arc::new(Embedded { shared }))
}

impl World {
    async fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let (db, broker) = open(directory.path()).await;
        let model = Model::default();
        let (kept, held, stale) = (Vec::new(), Vec::new(), Vec::new());
        let mut world = Self { directory, db, broker, model, kept, held, stale, capped: false };
        for client in 0..CLIENTS.len() {
            world.declare(client, None).await;
            world.bind(client, client + 1).await;
        }
        world
    }

    fn shared(&self) -> &Shared {
        &self.broker.shared
    }

    /// An operation that a full disk may refuse, and nothing else.
    fn done<T>(&self, what: &str, result: Result<T, crate::broker::BrokerError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                assert!(self.capped && error.kind == BrokerErrorKind::DiskFull, "{what}: {error:?}");
                None
            }
        }
    }

    async fn run(&mut self, op: Op) {
        match op {
            Op::Publish { client, notify, sent, ahead } => self.publish(client, notify, &sent, ahead).await,
            Op::Race { client, id, times, large } => self.race(client, id, times, large).await,
            Op::Forward { from, max, ends } => {
                let from = [Place::Outbox, Place::Notify]
                    .get(from / CLIENTS.len())
                    .map_or(Place::Publish, |place| place(from % CLIENTS.len()));
                self.consume(from, max, &ends).await;
            }
            Op::ForwardAll => self.forward_all().await,
            Op::Pull { client, max, lease } => self.pull(client, max, lease).await,
            Op::Settle { count, how } => self.settle(count, how).await,
            Op::Consume { client, max, ends } => {
                self.consume(Place::Inbox(client), max, &ends).await;
            }
            Op::SettleKept { count, end } => self.settle_kept(count, end).await,
            Op::Limit { client, max } => {
                if self.model.exists[client] {
                    self.declare(client, max).await;
                }
            }
            Op::Bind { client, patterns } => {
                if self.model.exists[client] {
                    self.bind(client, patterns).await;
                }
            }
            Op::Replay { client, count } => self.replay(client, count).await,
            Op::Purge { client } => self.purge(client).await,
            Op::Exist { client } => self.exist(client).await,
            Op::Restart => self.restart().await,
            Op::Crash { publish } => self.crash(publish).await,
            Op::Cap { pages } => {
                cap_file(&self.db, Some(pages)).await;
                self.capped = true;
            }
            Op::Uncap => self.uncap().await,
            Op::Elapse => self.elapse().await,
            Op::Check => self.check().await,
        }
        self.shared().core.lock().check();
    }

    // ---- clients

    async fn declare(&mut self, client: usize, max: Option<u64>) {
        let limits = Limits { max_inbox_messages: max, ..Limits::default() };
        let done = soon("declare", self.broker.declare_client(&id_of(client), &limits)).await;
        if self.done("declare", done).is_some() {
            self.model.exists[client] = true;
            self.model.limited[client] = max.is_some();
        }
    }

    async fn bind(&mut self, client: usize, patterns: usize) {
        let parsed: Vec<Pattern> = PATTERNS[patterns].iter().map(|p| Pattern::parse(p).expect("a pattern")).collect();
        let done = soon("bind", self.broker.bind(&id_of(client), &parsed)).await;
        if self.done("bind", done).is_some() {
            self.model.patterns[client] = patterns;
        }
    }

    /// Deletes the client, or creates it again.
    async fn exist(&mut self, client: usize) {
        if !self.model.exists[client] {
            self.declare(client, None).await;
            if self.model.exists[client] {
                self.model.patterns[client] = 0;
                self.bind(client, 2).await;
            }
            return;
        }
        let done = soon("delete", self.broker.delete_client(&id_of(client))).await;
        if self.done("delete", done).is_none() {
            return;
        }
        let model = &mut self.model;
        model.exists[client] = false;
        let stays = |place: &Place| place.owner() != Some(client);
        for places in model.at.values_mut().chain(model.was.values_mut().flatten()) {
            places.retain(stays);
        }
        model.delayed.retain(|(place, _), _| stays(place));
        self.kept.retain(|kept| stays(&kept.from));
        self.forget_leases(|held| held.client == client);
    }

    fn forget_leases(&mut self, which: impl Fn(&Held) -> bool) {
        for held in std::mem::take(&mut self.held) {
            if which(&held) {
                self.stale.push((held.client, held.receipt));
            } else {
                self.held.push(held);
            }
        }
    }

    // ---- publishing

    async fn publish(&mut self, client: usize, notify: bool, sent: &[Sent], ahead: bool) {
        if !self.model.exists[client] {
            let missing = self.broker.publish(&Queue::Outbox(id_of(client)), Vec::new()).await;
            assert_eq!(missing.expect_err("there is no such queue").kind, BrokerErrorKind::NotFound);
            return;
        }
        let place = if notify { Place::Notify(client) } else { Place::Outbox(client) };
        let (mut batch, mut duplicates, mut fresh, mut new_ids) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (id, topic, large) in sent {
            let (n, own) = (self.number(place, *topic), id.map(|id| (client, id)));
            batch.push(self.message(client, *id, *topic, n, *large));
            let is_known = own.is_some_and(|own| self.model.ids.contains(&own) || new_ids.contains(&own));
            duplicates.push(is_known);
            if !is_known {
                new_ids.extend(own);
                fresh.push(n);
                self.model.at.insert(n, [place].into());
            }
        }
        let (broker, queue) = (Arc::clone(&self.broker), place.queue());
        let publishing = actix_rt::spawn(async move { broker.publish(&queue, batch).await });
        if ahead {
            for _ in 0..3 {
                tokio::task::yield_now().await;
            }
            self.forward_what_is_there(place).await;
            self.forward_what_is_there(Place::Publish).await;
        }
        let published = soon("publish", publishing).await.expect("does not panic");
        match self.done("publish", published) {
            Some(published) => {
                assert_eq!(published.duplicates, duplicates);
                self.model.ids.extend(new_ids);
                if !ahead {
                    self.model.all_durable();
                }
            }
            None => fresh.iter().for_each(|n| self.forget(*n)),
        }
    }

    fn number(&mut self, place: Place, topic: usize) -> usize {
        let n = self.model.next;
        self.model.next += 1;
        self.model.sent.insert(n, (place, topic));
        n
    }

    fn message(&self, client: usize, id: Option<u8>, topic: usize, n: usize, large: bool) -> crate::envelope::Message {
        let id = id.map(|id| format!("own-{id}"));
        message(&id_of(client), id.as_deref(), TOPICS[topic], n, if large { 6000 } else { 20 })
    }

    /// It was refused.
    fn forget(&mut self, n: usize) {
        self.model.at.remove(&n);
        self.model.was.remove(&n);
        self.model.delayed.retain(|(_, delayed), _| *delayed != n);
        self.kept.retain(|kept| kept.n != n);
    }

    /// Several at once with the same own id, each with a message of its own besides.
    async fn race(&mut self, client: usize, id: u8, times: usize, large: bool) {
        if !self.model.exists[client] {
            return;
        }
        let place = Place::Outbox(client);
        let mut numbers = Vec::new();
        let mut publishing = Vec::new();
        for _ in 0..times {
            let (n, besides) = (self.number(place, 0), self.number(place, 0));
            let batch =
                vec![self.message(client, Some(id), 0, n, large), self.message(client, None, 0, besides, large)];
            let (broker, queue) = (Arc::clone(&self.broker), place.queue());
            publishing.push(actix_rt::spawn(async move { broker.publish(&queue, batch).await }));
            numbers.push((n, besides));
            // Sometimes into the next window.
            if n % 3 == 0 {
                tokio::time::timeout(Duration::from_micros(500), std::future::pending::<()>())
                    .await
                    .expect_err("waits");
            }
        }
        let (mut taken, mut duplicates) = (0, 0);
        for (published, (n, besides)) in publishing.into_iter().zip(numbers) {
            let published = soon("publish", published).await.expect("does not panic");
            let Some(published) = self.done("publish", published) else { continue };
            // Which was first is not known.
            self.model.came_back.extend([n, besides]);
            self.model.at.insert(besides, [place].into());
            assert!(!published.duplicates[1]);
            if published.duplicates[0] {
                duplicates += 1;
            } else {
                taken += 1;
                self.model.at.insert(n, [place].into());
            }
        }
        if self.model.ids.contains(&(client, id)) {
            assert_eq!(taken, 0, "a known id was taken");
        } else {
            assert!(taken <= 1 && (taken == 1 || duplicates == 0), "{taken} taken, {duplicates} duplicates of nothing");
            if taken == 1 {
                self.model.ids.insert((client, id));
            }
        }
    }

    // ---- consuming

    async fn forward_all(&mut self) {
        for client in 0..CLIENTS.len() {
            self.forward_what_is_there(Place::Outbox(client)).await;
            self.forward_what_is_there(Place::Notify(client)).await;
        }
        self.forward_what_is_there(Place::Publish).await;
    }

    async fn forward_what_is_there(&mut self, from: Place) {
        while self.consume(from, 100, &[0]).await > 0 {}
    }

    /// Whether a queue has something to hand out, as far as the broker knows.
    fn has_some(&self, place: Place) -> bool {
        let id = self.shared().core.lock().by_name.get(&place.queue()).copied();
        id.is_some_and(|id| self.shared().has_backlog(id))
    }

    /// Takes up to `max` and settles them, the first as the first of `ends` says, and so on. Returns how many.
    async fn consume(&mut self, from: Place, max: usize, ends: &[u8]) -> usize {
        let exists = from.owner().is_none_or(|client| self.model.exists[client]);
        let consumer = self.broker.consume(&from.queue(), u32::try_from(max).expect("few")).await;
        if !exists {
            assert_eq!(consumer.err().expect("there is no such queue").kind, BrokerErrorKind::NotFound);
            return 0;
        }
        let mut consumer = consumer.expect("consumes");
        let limited = matches!(from, Place::Inbox(client) if self.model.limited[client]);
        // Pipelines wait while nothing can be written, and a limit may bury all that there is.
        let sure = self.has_some(from) && !self.capped && !limited;
        if !self.has_some(from) {
            return 0;
        }
        let batch = if sure {
            soon(&format!("consuming {from:?}"), consumer.next(max)).await.expect("the queue is there")
        } else {
            match tokio::time::timeout(Duration::from_millis(30), consumer.next(max)).await {
                Ok(batch) => batch.expect("the queue is there"),
                Err(_) => return 0,
            }
        };
        drop(consumer);
        assert!(!batch.is_empty() && batch.len() <= max);
        let count = batch.len();
        let mut outcomes = Vec::new();
        for (delivery, end) in batch.into_iter().zip(ends.iter().cycle()) {
            let n = number(delivery.payload.message().expect("a message"));
            self.assert_free(from, n);
            self.model.take(from, n, delivery.deliveries);
            self.end(from, n, delivery, *end, &mut outcomes);
        }
        soon("settle", settle(outcomes)).await.expect("settles");
        count
    }

    /// Nobody else may have it.
    fn assert_free(&mut self, from: Place, n: usize) {
        assert!(self.kept.iter().all(|kept| (kept.from, kept.n) != (from, n)), "{from:?} hands out {n} twice");
        let Place::Inbox(client) = from else { return };
        for held in self.held.iter().filter(|held| (held.client, held.n) == (client, n)) {
            assert!(held.until.is_some_and(|until| Instant::now() >= until), "{from:?} hands out {n}, which is leased");
        }
        self.forget_leases(|held| (held.client, held.n) == (client, n));
    }

    fn end(&mut self, from: Place, n: usize, delivery: Delivery, end: u8, outcomes: &mut Vec<(Delivery, Outcome)>) {
        let model = &mut self.model;
        let is_inbox = matches!(from, Place::Inbox(_));
        if end != 0 || is_inbox {
            model.came_back.insert(n);
        }
        match end {
            0 if !is_inbox => {
                let target = match from {
                    Place::Outbox(_) => Target::Publish,
                    Place::Notify(_) => Target::Broadcast,
                    _ => Target::Topic,
                };
                model.relocate(n, from, &model.targets(from, n));
                let message = delivery.payload.message().expect("a message").clone();
                outcomes.push((delivery, Outcome::Forward(target, message)));
            }
            0 | 1 => {
                model.relocate(n, from, &[]);
                outcomes.push((delivery, Outcome::Complete));
            }
            2 => outcomes.push((delivery, Outcome::Requeue)),
            3 => {
                let attempts = delivery.attempts + 1;
                outcomes.push((delivery, Outcome::Delay { delay: DELAY, attempts }));
                // The broker counts in whole milliseconds.
                model.delayed.insert((from, n), Instant::now() + DELAY - Duration::from_millis(2));
            }
            4 => drop(delivery),
            5 => self.kept.push(Kept { from, n, delivery }),
            _ if from.owner().is_none() => outcomes.push((delivery, Outcome::Requeue)),
            _ => {
                let dead = Outcome::Dead { reason: DeadReason::Rejected, attempts: 1 };
                outcomes.push((delivery, dead));
            }
        }
    }

    async fn settle_kept(&mut self, count: usize, end: u8) {
        for _ in 0..count.min(self.kept.len()) {
            let Kept { from, n, delivery } = self.kept.swap_remove(0);
            let mut outcomes = Vec::new();
            self.end(from, n, delivery, end, &mut outcomes);
            soon("settle", settle(outcomes)).await.expect("settles");
        }
    }

    // ---- pulling

    async fn pull(&mut self, client: usize, max: usize, lease: Option<bool>) {
        let from = Place::Inbox(client);
        let mode = match lease {
            None => PullMode::Auto,
            Some(true) => PullMode::Lease(SHORT),
            Some(false) => PullMode::Lease(LONG),
        };
        let in_flight =
            |core: &super::core::Core| core.client(&id_of(client)).map(|q| core.queues[&q.inbox].in_flight.len());
        let full = in_flight(&self.shared().core.lock()).is_some_and(|held| held >= super::pull::LEASED_MAX);
        let sure = self.has_some(from) && !full && !self.capped && !self.model.limited[client];
        let wait = if sure { PATIENCE } else { Duration::ZERO };
        let began = Instant::now();
        let pulled = soon("pull", self.broker.pull(&id_of(client), max, wait, mode)).await;
        if !self.model.exists[client] {
            assert_eq!(pulled.expect_err("there is no such queue").kind, BrokerErrorKind::NotFound);
            return;
        }
        let pulled = pulled.expect("pulls, even from a full disk");
        assert!(!sure || !pulled.is_empty(), "{from:?} has something and hands out nothing");
        assert!(pulled.len() <= max);
        for message in pulled {
            let n = number(&message.message);
            self.assert_free(from, n);
            self.model.take(from, n, message.deliveries);
            match message.receipt {
                None => self.model.relocate(n, from, &[]),
                Some(receipt) => {
                    self.model.came_back.insert(n);
                    let until = (mode == PullMode::Lease(SHORT)).then_some(began + SHORT);
                    self.held.push(Held { client, n, receipt, until });
                }
            }
        }
    }

    async fn settle(&mut self, count: usize, how: u8) {
        let Some(client) = self.held.first().map(|held| held.client) else { return };
        let mut chosen = Vec::new();
        for held in std::mem::take(&mut self.held) {
            // Whether a short lease is over is not known when the disk is full and nothing is answered.
            if held.client == client && chosen.len() < count && !(self.capped && held.until.is_some()) {
                chosen.push(held);
            } else {
                self.held.push(held);
            }
        }
        let outcome = match how {
            0 => PullOutcome::Ack,
            1 => PullOutcome::Nack(None),
            2 => PullOutcome::Nack(Some(DELAY)),
            _ => PullOutcome::Reject,
        };
        let stale: Vec<Receipt> = self.stale.iter().filter(|(of, _)| *of == client).map(|(_, r)| r.clone()).collect();
        let receipts = chosen.iter().map(|held| held.receipt.clone()).chain(stale.clone()).collect();
        let began = Instant::now();
        let settled = soon("settle", self.broker.settle_pulled(&id_of(client), receipts, outcome)).await;
        let unknown = match self.done("settle", settled) {
            Some(unknown) => {
                self.model.all_durable();
                assert!(stale.iter().all(|receipt| unknown.contains(receipt)), "an old receipt is still good");
                unknown
            }
            None => Vec::new(),
        };
        for held in chosen {
            let place = Place::Inbox(client);
            if unknown.contains(&held.receipt) {
                assert!(held.until.is_some(), "{}: the receipt for {} is unknown", id_of(client), held.n);
                continue;
            }
            match outcome {
                PullOutcome::Ack => {
                    self.model.relocate(held.n, place, &[]);
                    // It waits for the disk, and then it is durable.
                    if !self.capped {
                        self.model.was.remove(&held.n);
                    }
                }
                PullOutcome::Nack(Some(delay)) => {
                    self.model.delayed.insert((place, held.n), began + delay - Duration::from_millis(2));
                }
                PullOutcome::Nack(None) | PullOutcome::Reject => {}
            }
            self.stale.push((client, held.receipt));
        }
    }

    // ---- dead letters

    /// All of a client's dead letters: their own ids, where they died, and their numbers.
    async fn dead_letters(&mut self, client: usize) -> Option<Vec<(String, Place, usize)>> {
        let mut dead = Vec::new();
        let mut after: Option<String> = None;
        loop {
            let page = soon("list", self.broker.dead_letters(&id_of(client), after.as_deref(), 3)).await;
            let page = self.done("list dead letters", page)?;
            self.model.all_durable();
            for letter in page.dead_letters {
                let place = match letter.origin {
                    Origin::Inbox => Place::Inbox(client),
                    Origin::Outbox => Place::Outbox(client),
                    Origin::Notify => Place::Notify(client),
                };
                dead.push((letter.id, place, number(letter.payload.message().expect("a message"))));
            }
            match page.next {
                Some(next) => after = Some(next),
                None => return Some(dead),
            }
        }
    }

    async fn replay(&mut self, client: usize, count: Option<usize>) {
        if !self.model.exists[client] {
            return;
        }
        let Some(dead) = self.dead_letters(client).await else { return };
        let ids: Option<Vec<String>> =
            count.map(|count| dead.iter().take(count).map(|(id, _, _)| id.clone()).collect());
        let here = self.model.in_queues_of(client);
        self.model.came_back.extend(here);
        let replayed = soon("replay", self.broker.replay_dead(&id_of(client), ids.as_deref())).await;
        let Some(replayed) = self.done("replay", replayed) else { return };
        self.model.all_durable();
        let expected = ids.map_or(dead.len(), |ids| ids.len()) as u64;
        assert!(replayed == expected || self.model.limited[client] && replayed > expected, "{replayed} of {expected}");
    }

    async fn purge(&mut self, client: usize) {
        if !self.model.exists[client] || self.capped {
            return;
        }
        let deadline = Instant::now() + PATIENCE;
        while self.is_over_limit(client) {
            assert!(Instant::now() < deadline, "the limit of {client} is not kept");
            tokio::task::yield_now().await;
        }
        let dead = self.dead_letters(client).await.expect("the disk has room");
        let purged = soon("purge", self.broker.purge_dead(&id_of(client), None)).await.expect("the disk has room");
        assert_eq!(purged, dead.len() as u64);
        for (_, place, n) in dead {
            self.model.relocate(n, place, &[]);
        }
        self.model.all_durable();
    }

    /// Whether something is still to be buried, which may have to be read first.
    fn is_over_limit(&self, client: usize) -> bool {
        let core = self.shared().core.lock();
        let Some(queue) = core.client(&id_of(client)).and_then(|queues| core.queues.get(&queues.inbox)) else {
            return false;
        };
        let is_over = queue.max_messages.is_some_and(|max| queue.counts.depth > max);
        is_over && (queue.tail > 0 || !queue.slots.is_empty())
    }

    // ---- time, disk, restarts

    async fn uncap(&mut self) {
        if self.capped {
            cap_file(&self.db, None).await;
            self.capped = false;
            // What failed is tried again after a while; then all is as usual.
            soon("barrier", self.shared().barrier("wait")).await.expect("the disk has room");
            self.model.all_durable();
        }
    }

    /// Waits until all delays and short leases are over.
    async fn elapse(&mut self) {
        if self.capped {
            return;
        }
        let deadline = Instant::now() + PATIENCE;
        let is_over = |core: &super::core::Core| {
            let soon = Instant::now() + Duration::from_secs(60);
            core.queues.values().all(|q| q.counts.delayed == 0 && q.leases.values().all(|lease| lease.until > soon))
        };
        while !is_over(&self.shared().core.lock()) {
            assert!(Instant::now() < deadline, "a delay or a lease does not end");
            tokio::task::yield_now().await;
        }
        self.model.delayed.clear();
        self.forget_leases(|held| held.until.is_some());
    }

    async fn restart(&mut self) {
        self.kept.clear();
        self.forget_leases(|_| true);
        soon("close", self.broker.close()).await;
        self.db.close();
        let was_capped = std::mem::take(&mut self.capped);
        if was_capped {
            self.model.delayed.clear();
        } else {
            self.model.all_durable();
        }
        (self.db, self.broker) = open(self.directory.path()).await;
        self.reconcile().await;
    }

    /// What a kill leaves behind: the files as they are while all goes on.
    async fn crash(&mut self, publish: bool) {
        let client = (0..CLIENTS.len()).find(|client| self.model.exists[*client]).filter(|_| publish);
        let mut begun = Vec::new();
        if let Some(client) = client {
            let place = Place::Outbox(client);
            begun = (0..3).map(|_| self.number(place, 0)).collect();
            let batch = begun.iter().map(|n| self.message(client, None, 0, *n, n % 2 == 0)).collect();
            let (broker, queue) = (Arc::clone(&self.broker), place.queue());
            actix_rt::spawn(async move { broker.publish(&queue, batch).await.map(drop) });
            tokio::task::yield_now().await;
        }
        let copy = tempfile::tempdir().expect("a directory");
        copy_at_once(&self.db, self.directory.path(), copy.path()).await;
        self.kept.clear();
        self.forget_leases(|_| true);
        self.shared().core.lock().is_closed = true;
        self.db.close();
        self.capped = false;
        self.model.delayed.clear();
        (self.db, self.broker) = open(copy.path()).await;
        self.directory = copy;
        let rows = self.rows().await;
        let there = begun.iter().filter(|n| rows.contains_key(n)).count();
        assert!(there == 0 || there == begun.len(), "{there} of a batch of {}", begun.len());
        for n in begun.into_iter().take(there) {
            self.model.at.insert(n, [self.model.sent[&n].0].into());
        }
        self.reconcile().await;
    }

    /// After a restart: each message must be where it was last, or where it was when that was not durable yet.
    async fn reconcile(&mut self) {
        let mut rows = self.rows().await;
        let unrouted_full = rows.values().filter(|at| at.contains(&Place::Unrouted)).count() as u64 == UNROUTED_MAX;
        let was = std::mem::take(&mut self.model.was);
        for (n, at) in &mut self.model.at {
            let found = rows.remove(n).unwrap_or_default();
            let is_trimmed = unrouted_full && found.is_empty();
            let fits = |places: &Places| *places == found || is_trimmed && places.contains(&Place::Unrouted);
            let is_allowed = fits(at) || was.get(n).into_iter().flatten().any(fits);
            assert!(is_allowed, "{n} was at {:?}, then at {at:?}, and is at {found:?} after a restart", was.get(n));
            *at = found;
        }
        assert!(rows.is_empty(), "nobody was told that these were taken: {rows:?}");
        self.model.came_back.extend(was.into_keys());
    }

    /// Where the messages are according to the file.
    async fn rows(&self) -> BTreeMap<usize, Places> {
        let rows = self.db.read(|connection| {
            let snapshot = connection.unchecked_transaction()?;
            Ok((read_rows(&snapshot)?, faults_of(&snapshot)?))
        });
        let (rows, faults) = rows.await.expect("reads");
        assert!(faults.is_empty(), "{faults:?}");
        let mut places: BTreeMap<usize, Places> = BTreeMap::new();
        for (n, place) in rows {
            assert!(places.entry(n).or_default().insert(place), "{n} is twice in {place:?}");
        }
        places
    }

    /// The file says what the model says.
    async fn check(&mut self) {
        if self.capped {
            return;
        }
        let deadline = Instant::now() + PATIENCE;
        let deleted = "SELECT count(*) FROM queue WHERE kind = 'deleted'";
        while self.db.read(move |c| c.query_row(deleted, [], |row| row.get::<_, u64>(0))).await.expect("reads") > 0 {
            assert!(Instant::now() < deadline, "a deleted queue keeps its rows");
            tokio::task::yield_now().await;
        }
        soon("barrier", self.shared().barrier("check")).await.expect("the disk has room");
        self.model.all_durable();
        self.reconcile().await;
    }

    /// Everything that is anywhere comes out, and nothing else, to readers that waited for it.
    async fn drain(mut self) {
        self.uncap().await;
        self.kept.clear();
        while !self.held.is_empty() {
            self.settle(100, 1).await;
        }
        self.elapse().await;
        self.check().await;
        let mut owed: BTreeSet<(usize, usize)> = BTreeSet::new();
        let (sender, mut seen) = tokio::sync::mpsc::channel(1000);
        let mut readers = Vec::new();
        for client in (0..CLIENTS.len()).filter(|client| self.model.exists[*client]) {
            let mut consumer = self.broker.consume(&Queue::Inbox(id_of(client)), 3).await.expect("consumes");
            let sender = sender.clone();
            readers.push(actix_rt::spawn(async move {
                while let Some(batch) = consumer.next(2).await {
                    for delivery in batch {
                        let n = number(delivery.payload.message().expect("a message"));
                        sender.send((client, n)).await.expect("someone listens");
                        delivery.settle(Outcome::Complete).await.expect("settles");
                    }
                }
            }));
        }
        for client in 0..CLIENTS.len() {
            if self.model.exists[client] {
                self.declare(client, None).await;
                self.replay(client, None).await;
            }
        }
        self.forward_all().await;
        for (n, at) in &self.model.at {
            owed.extend(at.iter().filter_map(|place| match place {
                Place::Inbox(client) => Some((*client, *n)),
                Place::Unrouted => None,
                other => panic!("{n} stays at {other:?}"),
            }));
        }
        while !owed.is_empty() {
            let next = tokio::time::timeout(PATIENCE, seen.recv()).await;
            let got = next.unwrap_or_else(|_| panic!("these do not come: {owed:?}")).expect("readers are there");
            assert!(owed.remove(&got), "{got:?} is nobody's");
        }
        let deadline = Instant::now() + PATIENCE;
        for client in (0..CLIENTS.len()).filter(|client| self.model.exists[*client]) {
            while self.broker.depths(&id_of(client)).await.expect("is there").inbox > 0 {
                assert!(Instant::now() < deadline, "an inbox is counted wrong");
                tokio::task::yield_now().await;
            }
        }
        for reader in &readers {
            reader.abort();
        }
        for reader in readers {
            assert!(reader.await.expect_err("was stopped").is_cancelled());
        }
        for at in self.model.at.values_mut() {
            at.retain(|place| *place == Place::Unrouted);
        }
        self.restart().await;
        self.check().await;
        self.shared().core.lock().check();
        self.broker.close().await;
        self.db.close();
    }
}

/// The messages of all entries and dead letters of queues that are there.
fn read_rows(connection: &Connection) -> rusqlite::Result<Vec<(usize, Place)>> {
    let mut select = connection.prepare(
        "SELECT q.kind, q.client, NULL, b.head, b.data FROM entry e JOIN queue q ON q.id = e.queue
            JOIN body b ON b.id = e.body WHERE q.kind <> 'deleted'
         UNION ALL SELECT q.kind, q.client, d.origin, b.head, b.data FROM dead d JOIN queue q ON q.id = d.queue
            JOIN body b ON b.id = d.body WHERE q.kind <> 'deleted'",
    )?;
    let rows = select.query_map([], |row| {
        let (kind, client, origin): (String, Option<String>, Option<u8>) = (row.get(0)?, row.get(1)?, row.get(2)?);
        let client = CLIENTS.iter().position(|name| Some(*name) == client.as_deref()).unwrap_or_default();
        let place = match (kind.as_str(), origin.map(schema::origin_from_code)) {
            ("publish", None) => Place::Publish,
            ("unrouted", None) => Place::Unrouted,
            ("outbox", None) | ("inbox", Some(Origin::Outbox)) => Place::Outbox(client),
            ("notify", None) | ("inbox", Some(Origin::Notify)) => Place::Notify(client),
            ("inbox", None | Some(Origin::Inbox)) => Place::Inbox(client),
            other => panic!("a row of {other:?}"),
        };
        let head: Vec<u8> = row.get(3)?;
        match schema::decode_payload(&head, row.get(4)?)? {
            Payload::Message(message) => Ok((number(&message), place)),
            Payload::Foreign(foreign) => panic!("{foreign:?}"),
        }
    })?;
    rows.collect()
}

/// Where counts, bodies and references do not agree with the rows.
fn faults_of(connection: &Connection) -> rusqlite::Result<Vec<String>> {
    let mut faults = Vec::new();
    let nothing = [
        (
            "counts that differ from the rows",
            "SELECT kind || ' of ' || ifnull(client, '') || ': depth ' || depth || ', delayed ' || delayed || ', dead ' ||
                dead || '; rows ' || (SELECT count(*) FROM entry WHERE queue = q.id) || ', ' ||
                (SELECT count(*) FROM entry WHERE queue = q.id AND due IS NOT NULL) || ', ' ||
                (SELECT count(*) FROM dead WHERE queue = q.id)
             FROM queue q WHERE kind <> 'deleted' AND (depth <> (SELECT count(*) FROM entry WHERE queue = q.id)
                OR delayed <> (SELECT count(*) FROM entry WHERE queue = q.id AND due IS NOT NULL)
                OR dead <> (SELECT count(*) FROM dead WHERE queue = q.id))",
        ),
        (
            "entries without a body or a queue",
            "SELECT queue || ' ' || pos FROM entry WHERE body NOT IN (SELECT id FROM body)
                OR queue NOT IN (SELECT id FROM queue)",
        ),
        (
            "dead letters without a body or a queue",
            "SELECT queue || ' ' || pos FROM dead WHERE body NOT IN (SELECT id FROM body)
                OR queue NOT IN (SELECT id FROM queue WHERE kind IN ('inbox', 'deleted'))",
        ),
        (
            "bodies with another number of references",
            "SELECT b.id || ': ' || ifnull(r.refs, 'one') FROM body b LEFT JOIN body_refs r ON r.id = b.id
             WHERE ifnull(r.refs, 1) <> (SELECT count(*) FROM entry WHERE body = b.id)
                + (SELECT count(*) FROM dead WHERE body = b.id)",
        ),
        ("references to no body", "SELECT '' || id FROM body_refs WHERE id NOT IN (SELECT id FROM body)"),
        ("bindings of no queue", "SELECT '' || queue FROM binding WHERE queue NOT IN (SELECT id FROM queue)"),
    ];
    for (what, query) in nothing {
        let mut select = connection.prepare(query)?;
        let found = select.query_map([], |row| row.get::<_, String>(0))?;
        faults.extend(found.map(|found| found.map(|found| format!("{what}: {found}"))).collect::<Result<Vec<_>, _>>()?);
    }
    Ok(faults)
}

#[test]
fn whatever_happens_every_message_is_where_it_must_be() {
    let config = Config { cases: CASES, failure_persistence: None, max_shrink_iters: 400, ..Config::default() };
    let longest = Cell::new(Duration::ZERO);
    let run = |ops: Vec<Op>| {
        let began = Instant::now();
        actix_rt::System::new().block_on(async {
            let mut world = World::new().await;
            for op in ops {
                world.run(op).await;
            }
            world.drain().await;
        });
        longest.set(longest.get().max(began.elapsed()));
        Ok(())
    };
    let operations = proptest::collection::vec(op(), OPERATIONS);
    if let Err(failure) = TestRunner::new(config).run(&operations, run) {
        panic!("{failure}");
    }
    println!("the longest case took {:?}", longest.get());
}
