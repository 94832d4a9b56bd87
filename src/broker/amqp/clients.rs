//! The clients that the broker knows, and their patterns.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::consumer::ConsumerCore;
use super::link::Told;
use super::pull::Puller;
use super::state::StoredClient;
use super::wire::Counts;
use crate::broker::Queue;
use crate::client::{ClientId, Limits};
use crate::topic::{Pattern, Trie};

/// One client.
pub(super) struct Client {
    pub(super) id: ClientId,
    /// Its number in the trie; never used again.
    number: u32,
    /// When its queues were first declared; what was delayed before is not for it.
    pub(super) since_ms: i64,
    limits: Mutex<Limits>,
    /// Patterns that its inbox is bound by, and those of which it is not known that they are gone.
    patterns: Mutex<(Vec<Pattern>, Vec<Pattern>)>,
    /// Delayed messages by the second in which they are due.
    delayed: Mutex<BTreeMap<i64, u64>>,
    /// Before this second the front of its inbox need not be looked at for what has waited too long.
    next_look_s: AtomicU64,
    /// Deleted: its consumers end.
    gone: AtomicBool,
    /// RabbitMQ has refused to let its inbox be read. See [`Client::set_apart`].
    apart: AtomicBool,
    consumers: Mutex<Vec<Weak<ConsumerCore>>>,
    puller: Mutex<Option<Arc<Puller>>>,
    /// What the log was told of trouble with its queues.
    told: Mutex<Told>,
    /// Declaring, binding and deleting take turns: none undoes what another has done meanwhile.
    admin_turn: Semaphore,
    /// Looking at dead letters, replaying and purging take turns.
    pub(super) dead_turn: Semaphore,
}

impl Client {
    fn new(id: ClientId, number: u32, since_ms: i64, limits: Limits) -> Self {
        Self {
            id,
            number,
            since_ms,
            limits: Mutex::new(limits),
            patterns: Mutex::default(),
            delayed: Mutex::default(),
            next_look_s: AtomicU64::new(0),
            gone: AtomicBool::new(false),
            apart: AtomicBool::new(false),
            consumers: Mutex::default(),
            puller: Mutex::default(),
            told: Mutex::default(),
            admin_turn: Semaphore::new(1),
            dead_turn: Semaphore::new(1),
        }
    }

    /// Its limits.
    pub(super) fn limits(&self) -> Limits {
        self.limits.lock().clone()
    }

    /// Changes its limits.
    pub(super) fn set_limits(&self, limits: &Limits) {
        *self.limits.lock() = limits.clone();
        self.set_next_look_s(0);
    }

    /// How long a message may wait in its inbox, if there is a limit.
    pub(super) fn inbox_ttl_s(&self) -> Option<u64> {
        self.limits.lock().inbox_ttl_s
    }

    /// Whether somebody is being handed what is in its inbox.
    pub(super) fn is_inbox_read(&self) -> bool {
        let is_consumed = |core: &Arc<ConsumerCore>| matches!(core.queue, Queue::Inbox(_)) && core.is_subscribed();
        self.consumers().iter().any(is_consumed) || self.puller().is_some_and(|puller| puller.is_subscribed())
    }

    /// Patterns that its inbox is to be bound by, and those that it is to be rid of.
    pub(super) fn patterns(&self) -> (Vec<Pattern>, Vec<Pattern>) {
        self.patterns.lock().clone()
    }

    /// See [`Client::set_next_look_s`].
    pub(super) fn next_look_s(&self) -> u64 {
        self.next_look_s.load(Ordering::Relaxed)
    }

    /// Before this second the front of its inbox need not be looked at for what has waited too long.
    pub(super) fn set_next_look_s(&self, second: u64) {
        self.next_look_s.store(second, Ordering::Relaxed);
    }

    /// Logs trouble with its queues, unless that was just done.
    pub(super) fn tell(&self, trouble: &str) {
        if self.told.lock().is_news(trouble) {
            log::error!("{trouble}");
        }
    }

    /// Its queues are all right.
    pub(super) fn is_well(&self) {
        self.told.lock().forget();
    }

    /// Whether it was deleted.
    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// Its inbox is read on a channel apart from now on, for as long as this process lives: a client that keeps its
    /// inbox to itself (an exclusive AMQP consumer) has RabbitMQ close the channel on which anybody else tries to read
    /// it, under all consumers of that channel. Returns whether this is new.
    pub(super) fn set_apart(&self) -> bool {
        !self.apart.swap(true, Ordering::AcqRel)
    }

    /// Whether its inbox is read on a channel apart.
    pub(super) fn is_apart(&self) -> bool {
        self.apart.load(Ordering::Acquire)
    }

    /// Whether a message in its inbox was delayed for an earlier client of this name, and so is for nobody any more.
    pub(super) fn is_of_another(&self, counts: Counts) -> bool {
        counts.delayed_at_ms > 0 && counts.delayed_at_ms < self.since_ms
    }

    /// Ends its consumers and its pulls.
    pub(super) fn end(&self) {
        self.gone.store(true, Ordering::Release);
        self.wake();
    }

    /// Waits for the turn to change what RabbitMQ has of it.
    pub(super) async fn take_admin_turn(&self) -> SemaphorePermit<'_> {
        self.admin_turn.acquire().await.expect("the semaphore is never closed")
    }

    /// Wakes its consumers and its pulls, to look again at what has changed.
    pub(super) fn wake(&self) {
        for core in self.consumers() {
            core.wake();
        }
        if let Some(puller) = self.puller.lock().as_ref() {
            puller.wake();
        }
    }

    /// Its consumers of all queues.
    pub(super) fn consumers(&self) -> Vec<Arc<ConsumerCore>> {
        let mut consumers = self.consumers.lock();
        consumers.retain(|core| core.strong_count() > 0);
        consumers.iter().filter_map(Weak::upgrade).collect()
    }

    /// Adds a consumer to wake and to count.
    pub(super) fn add_consumer(&self, core: &Arc<ConsumerCore>) {
        let mut consumers = self.consumers.lock();
        consumers.retain(|core| core.strong_count() > 0);
        consumers.push(Arc::downgrade(core));
    }

    /// The one that serves its pulls, if there were any lately.
    pub(super) fn puller(&self) -> Option<Arc<Puller>> {
        self.puller.lock().clone()
    }

    /// The one that serves its pulls, made if need be.
    pub(super) fn puller_or(&self, make: impl FnOnce() -> Arc<Puller>) -> Arc<Puller> {
        Arc::clone(self.puller.lock().get_or_insert_with(make))
    }

    /// Messages that are delayed at this second.
    pub(super) fn delayed(&self, now_s: i64) -> u64 {
        let mut delayed = self.delayed.lock();
        // What is due is in the inbox, and counted there.
        *delayed = delayed.split_off(&(now_s + 1));
        delayed.values().sum()
    }

    /// Notes more delayed messages, by the second in which they are due.
    pub(super) fn add_delayed(&self, due: &BTreeMap<i64, u64>) {
        let mut delayed = self.delayed.lock();
        for (due, messages) in due {
            *delayed.entry(*due).or_default() += messages;
        }
    }
}

/// All clients.
#[derive(Default)]
pub(super) struct Clients {
    all: RwLock<HashMap<ClientId, Arc<Client>>>,
    patterns: RwLock<Patterns>,
    next_number: AtomicU32,
}

/// Patterns of all clients, by the clients' numbers.
#[derive(Default)]
struct Patterns {
    trie: Trie<u32>,
    names: HashMap<u32, ClientId>,
}

impl Clients {
    /// Takes in what was stored.
    pub(super) fn load(&self, stored: Vec<StoredClient>) {
        for stored in stored {
            let client = self.known_or(&stored.id, stored.since_ms, &stored.limits);
            client.add_delayed(&stored.delayed);
            let (wanted, unwanted): (Vec<_>, Vec<_>) = stored.bindings.into_iter().partition(|(_, wanted)| *wanted);
            let strip = |bindings: Vec<(Pattern, bool)>| bindings.into_iter().map(|(pattern, _)| pattern).collect();
            self.set_patterns(&client, strip(wanted), strip(unwanted));
        }
    }

    /// The client, if it is known.
    pub(super) fn get(&self, id: &ClientId) -> Option<Arc<Client>> {
        self.all.read().get(id).cloned()
    }

    /// The client whose queue it is, if it is known.
    pub(super) fn owner(&self, queue: &Queue) -> Option<Arc<Client>> {
        match queue {
            Queue::Outbox(id) | Queue::Notify(id) | Queue::Inbox(id) => self.get(id),
            Queue::Publish | Queue::Unrouted => None,
        }
    }

    /// All of them, for a walk.
    pub(super) fn all(&self) -> Vec<Arc<Client>> {
        self.all.read().values().cloned().collect()
    }

    /// The client; when it is not known it is added, with these limits.
    pub(super) fn known_or(&self, id: &ClientId, since_ms: i64, limits: &Limits) -> Arc<Client> {
        let make = || {
            let number = self.next_number.fetch_add(1, Ordering::Relaxed);
            Arc::new(Client::new(id.clone(), number, since_ms, limits.clone()))
        };
        Arc::clone(self.all.write().entry(id.clone()).or_insert_with(make))
    }

    /// Changes the patterns under which it is found; `unwanted` are those that may be bound still.
    pub(super) fn set_patterns(&self, client: &Client, wanted: Vec<Pattern>, unwanted: Vec<Pattern>) {
        let mut all = self.patterns.write();
        let mut patterns = client.patterns.lock();
        for pattern in &patterns.0 {
            all.trie.remove(pattern, &client.number);
        }
        for pattern in &wanted {
            all.trie.insert(pattern, client.number);
        }
        if wanted.is_empty() {
            all.names.remove(&client.number);
        } else {
            all.names.insert(client.number, client.id.clone());
        }
        *patterns = (wanted, unwanted);
    }

    /// Forgets it.
    pub(super) fn remove(&self, id: &ClientId) {
        if let Some(client) = self.get(id) {
            client.end();
            self.set_patterns(&client, Vec::new(), Vec::new());
        }
        self.all.write().remove(id);
    }

    /// How many clients have patterns that match; and the first `most` of them, each with the first pattern that does.
    pub(super) fn matching(&self, topic: &str, most: usize) -> (usize, Vec<(ClientId, Pattern)>) {
        let patterns = self.patterns.read();
        let mut found: Vec<(u32, Pattern)> = Vec::new();
        patterns.trie.for_each_match(topic, |pattern, number| found.push((number, pattern.clone())));
        found.sort_unstable_by_key(|(number, _)| *number);
        found.dedup_by_key(|(number, _)| *number);
        let name = |(number, pattern)| Some((patterns.names.get(&number)?.clone(), pattern));
        (found.len(), found.into_iter().filter_map(name).take(most).collect())
    }

    /// How many clients there are, and some of them.
    pub(super) fn first(&self, most: usize) -> (usize, Vec<ClientId>) {
        let all = self.all.read();
        (all.len(), all.keys().take(most).cloned().collect())
    }
}
