//! What lies in RabbitMQ, read and written while no router is at work on it: see [`crate::broker::stock`].
//!
//! A batch is consumed and stays unacknowledged until it is removed; so a kill gives it back. What comes in is published
//! with confirms, in order, under the properties that the broker itself would give it.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::{StreamExt as _, TryStreamExt as _};
use lapin::message::Delivery;

use super::address::Addresses;
use super::channel::IntakeChannel;
use super::dedup::{Fact, OwnId};
use super::error::{Fault, broker_error, db_error, fault_of, unavailable};
use super::harvest::Harvest;
use super::settle::{delayed, refused};
use super::window::Outgoing;
use super::wire::{self, Counts, short};
use super::{AmqpBroker, Options, Shared, delay, start, state, topology};
use crate::broker::stock::{Batch, Item, Mark, OwnId as StockId, OwnIdCursor, OwnIdPage, Parcel, Shelf, Stock};
use crate::broker::{Broker as _, BrokerError, DeadLetter, DeadReason, Health, Origin, Payload, Queue};
use crate::client::{ClientId, ClientRecord};
use crate::db::Db;
use crate::envelope::Message;
use crate::intake::{Kind as IntakeKind, parse_foreign};
use crate::telemetry::Telemetry;
use crate::time::Timestamp;

/// Messages in one batch at most; fewer where they are large, see [`AmqpStock::next_batch`].
const BATCH_MESSAGES: usize = 256;

/// Bytes of messages in one batch, about.
const BATCH_BYTES: usize = 8 << 20;

/// Messages of the first batch, before their size is known.
const FIRST_BATCH: usize = 16;

/// Questions to RabbitMQ under way at once.
const AT_ONCE: usize = 16;

/// How long RabbitMQ may be away, or refuse everything, before the move is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long RabbitMQ may take to notice that a process is gone. After a cut network it takes longer, and the move is
/// refused until then.
const GONE_PATIENCE: Duration = Duration::from_secs(5);

/// Time between two attempts.
const PAUSE: Duration = Duration::from_millis(200);

/// What is due between a look at the retry queues and one at the inboxes may be on its way: RabbitMQ moves it within
/// this time, and cannot be asked whether it has.
const ON_ITS_WAY: Duration = Duration::from_millis(1500);

/// See the module.
pub struct AmqpStock {
    broker: AmqpBroker,
    /// Those of the registry.
    registered: Arc<HashSet<ClientId>>,
    /// Whose queues there may be.
    clients: Vec<ClientId>,
    max_message_bytes: usize,
    /// How many messages the next batch may have, by the size of those in the last one.
    next_batch: AtomicUsize,
}

impl AmqpStock {
    /// Connects, and waits until RabbitMQ is there. `clients` are those of the registry.
    ///
    /// # Errors
    /// When it is not there within `patience`, or refuses what is declared; says why.
    pub async fn connect(
        options: Options,
        db: Db,
        telemetry: Telemetry,
        clients: &[ClientRecord],
        max_message_bytes: usize,
        patience: Duration,
    ) -> Result<Self, BrokerError> {
        let shared = start(options, db, telemetry).await?;
        let registered = Arc::new(clients.iter().map(|client| client.client_id.clone()).collect::<HashSet<_>>());
        let mut all: Vec<ClientId> = shared.clients.all().iter().map(|client| client.id.clone()).collect();
        all.extend(registered.iter().cloned());
        all.sort();
        all.dedup();
        let broker = AmqpBroker { shared };
        let next_batch = AtomicUsize::new(FIRST_BATCH);
        let stock = Self { broker, registered, clients: all, max_message_bytes, next_batch };
        stock.wait_until_ready(patience).await?;
        Ok(stock)
    }

    /// Host, port and virtual host, without a password: what is noted of where the queues are.
    ///
    /// # Errors
    /// When the URL cannot be read.
    pub fn place(url: &str) -> Result<String, BrokerError> {
        let addresses = Addresses::parse(url)?;
        let all: Vec<String> = (0..addresses.count()).map(|n| Addresses::display(addresses.nth(n))).collect();
        Ok(all.join(","))
    }

    /// Waits until nobody consumes `soar-publish`, or, of a source, any of the queues: whoever does may hold messages,
    /// which are seen only when they are back. What a process that was killed held is back when RabbitMQ has noticed.
    /// Returns a queue that is consumed all the same, and by how many.
    ///
    /// # Errors
    /// When RabbitMQ cannot be asked.
    pub async fn consumed(&self, is_source: bool) -> Result<Option<(Shelf, u32)>, BrokerError> {
        let mut shelves = vec![Shelf::Queue(Queue::Publish)];
        if is_source {
            shelves.extend(self.all_shelves().await?);
        }
        let until = Instant::now() + GONE_PATIENCE;
        loop {
            let looked_at = futures_util::stream::iter(shelves).map(|shelf| async move {
                let (_, consumers) = self.look_at(&shelf.to_string()).await?;
                Ok::<_, BrokerError>((shelf, consumers))
            });
            let mut consumed: Vec<(Shelf, u32)> = looked_at.buffered(AT_ONCE).try_collect().await?;
            consumed.retain(|(_, consumers)| *consumers > 0);
            if consumed.is_empty() || Instant::now() >= until {
                return Ok(consumed.into_iter().next());
            }
            shelves = consumed.into_iter().map(|(shelf, _)| shelf).collect();
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Every shelf that there may be.
    async fn all_shelves(&self) -> Result<Vec<Shelf>, BrokerError> {
        let retries = state::retries(&self.shared().db).await;
        let retries = retries.map_err(|error| db_error("see which retry queues there are", error))?;
        // First, since what is due while this runs goes from them into the inboxes.
        let mut shelves: Vec<Shelf> = retries.into_iter().map(Shelf::Retry).collect();
        for id in &self.clients {
            let queues = [Queue::Outbox(id.clone()), Queue::Notify(id.clone()), Queue::Inbox(id.clone())];
            shelves.extend(queues.map(Shelf::Queue));
            shelves.push(Shelf::Dead(id.clone()));
        }
        shelves.extend([Queue::Publish, Queue::Unrouted].map(Shelf::Queue));
        Ok(shelves)
    }

    /// Waits until what was on its way from a retry queue to an inbox is there.
    pub async fn settle_down(&self) {
        tokio::time::sleep(ON_ITS_WAY).await;
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.broker.shared
    }

    async fn wait_until_ready(&self, patience: Duration) -> Result<(), BrokerError> {
        let until = Instant::now() + patience;
        loop {
            let why = match self.broker.health() {
                Health::Ready => return Ok(()),
                Health::Blocked(why) | Health::Unreachable(why) => why,
            };
            if Instant::now() >= until {
                return Err(unavailable(why));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Messages that are ready in a queue, and how many consume it; none when it is not there.
    async fn look_at(&self, name: &str) -> Result<(u64, u32), BrokerError> {
        let action = || format!("count queue {name}");
        let session = self.shared().session(&action())?;
        match session.control(async |channel| topology::look_at(channel, name).await).await {
            Err(error) if fault_of(&error) == Fault::NotFound => Ok((0, 0)),
            // Just after RabbitMQ has started it may not know.
            Ok((0, consumers)) => Ok((self.shared().count_ready(name).await?, consumers)),
            counted => counted.map_err(|error| broker_error(action(), error)),
        }
    }

    /// Publishes until everything is confirmed, or nothing has been for a while.
    async fn publish(&self, from: &Shelf, messages: Vec<Outgoing>) -> Result<(), BrokerError> {
        let action = format!("publish what was in {from}");
        let lane = self.shared().relay(&from.to_string());
        let (mut left, mut until) = (messages, Instant::now() + PATIENCE);
        loop {
            self.wait_until_ready(until.saturating_duration_since(Instant::now())).await?;
            let fates = self.shared().publish_on(lane, left.clone()).await;
            let before = left.len();
            let refusals: Vec<_> =
                left.into_iter().zip(fates).filter_map(|(one, fate)| Some((one, fate.err()?))).collect();
            let Some((first, why)) = refusals.first() else { return Ok(()) };
            let error = refused(&action, why, &first.key.to_string());
            if refusals.len() < before {
                until = Instant::now() + PATIENCE;
            } else if Instant::now() >= until || !error.is_retryable() {
                return Err(error);
            }
            log::warn!("{error}; trying again");
            tokio::time::sleep(PAUSE).await;
            left = refusals.into_iter().map(|(one, _)| one).collect();
        }
    }

    /// A parcel as it is published. Retry queues must have been declared.
    fn outgoing(&self, parcel: &Parcel, now: Timestamp) -> Outgoing {
        let user = self.shared().user();
        let (key, properties, payload) = match parcel {
            Parcel::Message { queue, payload, deliveries, attempts, since, due } => {
                let since_s = u64::try_from(since.as_millis() / 1000).unwrap_or(0);
                let counts = Counts { attempts: *attempts, deliveries: *deliveries, since_s, delayed_at_ms: 0 };
                if let Some(left) = due.and_then(|due| time_left(due, now)) {
                    return delayed(payload, counts, left, &queue.to_string(), user);
                }
                (queue.to_string(), wire::properties(payload, counts, user), payload)
            }
            Parcel::Dead(client, letter) => {
                (topology::dead(client), wire::dead_properties(letter, user), &letter.payload)
            }
        };
        let exchange = topology::default_exchange();
        Outgoing { exchange, key: short(&key), properties, body: wire::body(payload) }
    }

    /// Declares the retry queues that a batch needs, and notes what is delayed for whom.
    async fn prepare_delays(&self, items: &[Item], now: Timestamp) -> Result<(), BrokerError> {
        let mut delays: BTreeMap<Option<ClientId>, BTreeMap<u64, u64>> = BTreeMap::new();
        for item in items {
            if let Parcel::Message { queue, due: Some(due), .. } = &item.parcel
                && let Some(left) = time_left(*due, now)
            {
                let owner = owner(queue).cloned();
                *delays.entry(owner).or_default().entry(delay::seconds_for(left)).or_default() += 1;
            }
        }
        for (owner, delays) in delays {
            let client = owner.and_then(|id| self.shared().clients.get(&id));
            self.shared().prepare_delays(client.as_deref(), delays).await?;
        }
        Ok(())
    }

    /// How many messages the next batch may have, by those of this one: twice as many at most, and no more than would
    /// fit if all were as large as these.
    fn learn(&self, messages: usize, bytes: usize) {
        let fitting = if messages == 0 { FIRST_BATCH } else { BATCH_BYTES * messages / bytes.max(1) };
        let now = self.next_batch.load(Ordering::Relaxed);
        self.next_batch.store(fitting.min(now * 2).clamp(1, BATCH_MESSAGES), Ordering::Relaxed);
    }
}

fn time_left(due: Timestamp, now: Timestamp) -> Option<Duration> {
    u64::try_from(due.as_millis() - now.as_millis()).ok().filter(|left| *left > 0).map(Duration::from_millis)
}

fn owner(queue: &Queue) -> Option<&ClientId> {
    match queue {
        Queue::Outbox(id) | Queue::Notify(id) | Queue::Inbox(id) => Some(id),
        Queue::Publish | Queue::Unrouted => None,
    }
}

/// The queue of a client with this name.
fn queue_named(name: &str) -> Option<Queue> {
    let (id, kind) = name.rsplit_once('-')?;
    let id = ClientId::parse(id).ok()?;
    match kind {
        "outbox" => Some(Queue::Outbox(id)),
        "notify" => Some(Queue::Notify(id)),
        "inbox" => Some(Queue::Inbox(id)),
        _ => None,
    }
}

/// What one delivery of a shelf is; `None` when it is for nobody any more.
struct Reading<'a> {
    shared: &'a Shared,
    registered: &'a HashSet<ClientId>,
    shelf: &'a Shelf,
    max_message_bytes: usize,
}

impl Reading<'_> {
    fn item(&self, delivery: Delivery) -> Option<Item> {
        let (mark, again) = (mark_of(&delivery), delivery.redelivered);
        self.parcel(delivery).map(|parcel| Item { parcel, mark, again })
    }

    fn parcel(&self, delivery: Delivery) -> Option<Parcel> {
        let redelivered = delivery.redelivered;
        let queue = match self.shelf {
            Shelf::Dead(client) => {
                return Some(Parcel::Dead(client.clone(), wire::read_dead(&delivery.properties, delivery.data)));
            }
            Shelf::Queue(queue) => queue.clone(),
            // What is delayed for a client that is deleted lies there until it is due.
            Shelf::Retry(_) => queue_named(delivery.routing_key.as_str())
                .filter(|queue| owner(queue).is_some_and(|id| self.registered.contains(id)))?,
        };
        let trusted = match self.shelf {
            Shelf::Queue(queue) => self.shared.trusted(queue),
            // Only the backbone publishes into a retry queue.
            Shelf::Dead(_) | Shelf::Retry(_) => None,
        };
        let read = wire::read(&delivery.properties, delivery.data, trusted);
        // A delay that ends comes back from RabbitMQ with what it was delayed with.
        if owner(&queue).and_then(|id| self.shared.clients.get(id)).is_some_and(|it| it.is_of_another(read.counts)) {
            return None;
        }
        let due = match self.shelf {
            Shelf::Retry(seconds) => {
                let delay_ms = i64::try_from(seconds * 1000).unwrap_or(i64::MAX);
                Some(Timestamp::from_millis(read.counts.delayed_at_ms.saturating_add(delay_ms)))
            }
            Shelf::Queue(_) | Shelf::Dead(_) => None,
        };
        // As the router itself would count after a restart.
        let returned = if redelivered { read.returned.unwrap_or(1) } else { 0 };
        let deliveries = read.counts.deliveries.saturating_add(returned);
        let since = Timestamp::from_millis(i64::try_from(read.counts.since_s.saturating_mul(1000)).unwrap_or(i64::MAX));
        let dead = |origin, client: &ClientId, payload| {
            let letter = DeadLetter {
                id: uuid::Uuid::now_v7().to_string(),
                origin,
                reason: DeadReason::InvalidMessage,
                attempts: 0,
                died_at: Timestamp::now(),
                payload,
            };
            Some(Parcel::Dead(client.clone(), letter))
        };
        let payload = match (read.payload, &queue) {
            (Payload::Foreign(foreign), Queue::Outbox(id) | Queue::Notify(id)) => {
                let (kind, origin) = match &queue {
                    Queue::Outbox(_) => (IntakeKind::Topic, Origin::Outbox),
                    _ => (IntakeKind::Broadcast, Origin::Notify),
                };
                match parse_foreign(&foreign, id, kind, self.max_message_bytes, Timestamp::now()) {
                    Ok(message) => Payload::Message(message.into()),
                    Err(_) => return dead(origin, id, Payload::Foreign(foreign)),
                }
            }
            (Payload::Foreign(foreign), Queue::Inbox(id)) => {
                return dead(Origin::Inbox, id, Payload::Foreign(foreign));
            }
            (payload, _) => payload,
        };
        let attempts = read.counts.attempts;
        Some(Parcel::Message { queue, payload, deliveries, attempts, since, due })
    }
}

fn mark_of(delivery: &Delivery) -> Mark {
    use sha2::{Digest as _, Sha256};
    let properties = &delivery.properties;
    let text = |text: &Option<lapin::types::ShortString>| text.as_ref().map_or(String::new(), ToString::to_string);
    let parts =
        [text(properties.message_id()), text(properties.kind()), text(properties.user_id())].map(String::into_bytes);
    let mut digest = Sha256::new();
    for part in parts.iter().map(Vec::as_slice).chain([delivery.data.as_slice()]) {
        digest.update(part.len().to_le_bytes());
        digest.update(part);
    }
    digest.finalize().into()
}

/// The message of a parcel in its sender's outbox or notify queue, when it has an id of its sender's own.
fn own_message(parcel: &Parcel) -> Option<&Message> {
    match parcel {
        Parcel::Message { queue: Queue::Outbox(_) | Queue::Notify(_), payload: Payload::Message(message), .. } => {
            Some(message.as_ref()).filter(|message| message.own_id)
        }
        _ => None,
    }
}

struct AmqpBatch {
    shared: Arc<Shared>,
    name: String,
    /// `None` at the end.
    channel: Option<Arc<IntakeChannel>>,
    tags: Vec<u64>,
    items: Vec<Item>,
}

impl AmqpBatch {
    fn own_ids(&self) -> Vec<OwnId> {
        self.items.iter().filter_map(|item| own_message(&item.parcel)).map(OwnId::of).collect()
    }
}

impl Drop for AmqpBatch {
    fn drop(&mut self) {
        if let Some(channel) = &self.channel {
            channel.give_back(self.tags.drain(..));
        }
    }
}

#[async_trait]
impl Batch for AmqpBatch {
    fn items(&self) -> &[Item] {
        &self.items
    }

    fn is_end(&self) -> bool {
        self.channel.is_none()
    }

    async fn remove(mut self: Box<Self>) -> Result<(), BrokerError> {
        let action = format!("remove from queue {} what was moved", self.name);
        // What comes again, because a kill was faster than the acknowledgement, is known by this, too.
        let ids = self.own_ids();
        if !ids.is_empty() {
            let noted = self.shared.dedup.note(Fact::Routed, ids).await;
            noted.map_err(|error| db_error(&action, error))?;
        }
        let (Some(channel), tags) = (self.channel.take(), std::mem::take(&mut self.tags)) else { return Ok(()) };
        let (name, shared) = (self.name.clone(), Arc::clone(&self.shared));
        let task = async move {
            let flushed = channel.ack_and_flush(&tags).await;
            flushed.map_err(|error| broker_error(format!("acknowledge messages of queue {name}"), error))?;
            // Answered after it has taken what came before.
            let answer = channel.round_trip(&name).await;
            answer.map(|_| ()).map_err(|error| broker_error(format!("acknowledge messages of queue {name}"), error))
        };
        shared.thread.run(&action, task).await
    }
}

#[async_trait]
impl Stock for AmqpStock {
    async fn shelves(&self) -> Result<Vec<(Shelf, u64)>, BrokerError> {
        let counted = futures_util::stream::iter(self.all_shelves().await?).map(|shelf| async move {
            let (messages, _) = self.look_at(&shelf.to_string()).await?;
            Ok::<_, BrokerError>((shelf, messages))
        });
        let counted: Vec<(Shelf, u64)> = counted.buffered(AT_ONCE).try_collect().await?;
        Ok(counted.into_iter().filter(|(_, messages)| *messages > 0).collect())
    }

    async fn prepare(&self, clients: &[ClientRecord]) -> Result<(), BrokerError> {
        let known: HashSet<&ClientId> = clients.iter().map(|client| &client.client_id).collect();
        for stranger in self.shared().clients.all().iter().filter(|client| !known.contains(&client.id)) {
            self.broker.delete_client(&stranger.id).await?;
        }
        let declare = |client: ClientRecord| async move {
            self.broker.declare_client(&client.client_id, &client.limits).await?;
            self.broker.bind(&client.client_id, &client.subscriptions).await
        };
        let declared = futures_util::stream::iter(clients.to_vec()).map(declare).buffer_unordered(AT_ONCE);
        declared.try_collect().await
    }

    async fn delete_client(&self, client: &ClientId) -> Result<(), BrokerError> {
        self.broker.delete_client(client).await
    }

    async fn read(&self, shelf: &Shelf) -> Result<Box<dyn Batch>, BrokerError> {
        let (shared, registered, shelf) = (Arc::clone(self.shared()), Arc::clone(&self.registered), shelf.clone());
        let (most, max_message_bytes) = (self.next_batch.load(Ordering::Relaxed), self.max_message_bytes);
        let action = format!("read queue {shelf}");
        let task = async move {
            let name = shelf.to_string();
            let mut harvest = Harvest::new(&shared, name.clone());
            let (chunk, channel) = harvest.next(most).await?;
            let tags: Vec<u64> = chunk.iter().map(|delivery| delivery.delivery_tag).collect();
            harvest.release(&channel, &tags);
            drop(harvest);
            let is_end = chunk.is_empty();
            let bytes: usize = chunk.iter().map(|delivery| delivery.data.len()).sum();
            let messages = chunk.len();
            let reading = Reading { shared: &shared, registered: &registered, shelf: &shelf, max_message_bytes };
            let items = chunk.into_iter().filter_map(|delivery| reading.item(delivery)).collect();
            let channel = (!is_end).then_some(channel);
            let batch = AmqpBatch { shared: Arc::clone(&shared), name, channel, tags, items };
            Ok((batch, messages, bytes))
        };
        let (mut batch, messages, bytes) = self.shared().thread.run(&action, task).await?;
        self.learn(messages, bytes);
        // One that was routed before, or taken in when it was read for the first time, is not taken again.
        let ids = batch.own_ids();
        if !ids.is_empty() {
            let known = self.shared().dedup.known(Fact::Routed, ids.clone()).await;
            let mut known = ids.into_iter().zip(known.map_err(|error| db_error(&action, error))?);
            let mut here = HashSet::new();
            batch.items.retain(|item| match own_message(&item.parcel).and_then(|_| known.next()) {
                Some((id, is_known)) => !is_known && here.insert(id.hash),
                None => true,
            });
        }
        Ok(Box::new(batch))
    }

    async fn put(&self, from: &Shelf, items: &[Item]) -> Result<(), BrokerError> {
        let now = Timestamp::now();
        self.wait_until_ready(PATIENCE).await?;
        self.prepare_delays(items, now).await?;
        let messages = items.iter().map(|item| self.outgoing(&item.parcel, now)).collect();
        self.publish(from, messages).await
    }

    async fn own_ids(&self, after: Option<OwnIdCursor>, limit: usize) -> Result<OwnIdPage, BrokerError> {
        self.shared().dedup.page(after, limit).await.map_err(|error| db_error("read own ids", error))
    }

    async fn forget_own_ids(&self) -> Result<(), BrokerError> {
        self.shared().dedup.clear().await.map_err(|error| db_error("forget own ids", error))
    }

    async fn put_own_ids(&self, ids: Vec<StockId>) -> Result<(), BrokerError> {
        self.shared().dedup.adopt(ids).await.map_err(|error| db_error("note own ids", error))
    }

    async fn emptied(&self) -> Result<(), BrokerError> {
        let delayed = state::forget_delayed(&self.shared().db).await;
        delayed.map_err(|error| db_error("forget what was delayed", error))?;
        self.forget_own_ids().await
    }

    async fn close(&self) {
        self.broker.close().await;
    }
}

impl std::fmt::Debug for AmqpStock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AmqpStock").field("clients", &self.clients.len()).finish_non_exhaustive()
    }
}
