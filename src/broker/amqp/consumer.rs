//! A consumer of one queue, which outlives the sessions that serve it.
//!
//! Deliveries are read on the task of whoever consumes, straight from lapin. RabbitMQ hands out as many as the prefetch
//! in advance; they wait in a buffer here. When the session breaks, or the queue is deleted under it, the consumer
//! subscribes again by itself; it ends only with its client or with the broker.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, oneshot};

use super::Shared;
use super::channel::IntakeChannel;
use super::clients::Client;
use super::hand::{Order, Renewing, State};
use super::held::Held;
use super::intake::{Left, Subscription};
use super::link::wait_up;
use super::settle;
use super::window::Broken;
use crate::broker::{BrokerError, Consume, Delivery, Queue, Settle, Settlement};

/// Largest prefetch that the protocol can name.
const PREFETCH_MAX: u32 = u16::MAX as u32;

/// Bytes that a consumer should hold at most, and messages that it may hold however long they are. A prefetch counts
/// messages; without this a backlog of long ones would be in memory a thousand at a time.
const HELD_BYTES: usize = 16 << 20;
const HELD_MIN: usize = 16;

/// How long a message is taken to be before one was seen, in bytes: long, so that the first batch cannot be too much.
const SIZE_AT_FIRST: usize = 256 << 10;

/// For how long a count of messages waits for those that are in transit.
const LANDED_WITHIN: Duration = Duration::from_secs(1);

/// Time before a failed subscription is tried again; doubled up to the second.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(3);

/// The part of a consumer that its deliveries hold on to.
pub(super) struct ConsumerCore {
    pub(super) shared: Arc<Shared>,
    pub(super) queue: Queue,
    /// The queue's name.
    pub(super) name: String,
    /// Whose queue it is, if it is somebody's.
    pub(super) client: Option<Arc<Client>>,
    prefetch: AtomicU32,
    /// How long its messages are, in bytes: an average of the last ones; 0 when none was seen.
    average_size: AtomicUsize,
    /// Something that `next` waits for has changed.
    changed: Notify,
    /// Nothing is in transit any more.
    landed: Notify,
    state: Mutex<State>,
    /// Batches are published in the order in which they were settled.
    pub(super) turn: Arc<Semaphore>,
    me: std::sync::Weak<Self>,
}

impl ConsumerCore {
    /// Makes `next` look again.
    pub(super) fn wake(&self) {
        self.changed.notify_one();
    }

    /// Whether RabbitMQ hands it deliveries, or is about to.
    pub(super) fn is_subscribed(&self) -> bool {
        let state = self.state.lock();
        state.subscription.is_some() || state.in_transit.is_some()
    }

    /// When the oldest of what it holds came into the queue, in seconds since the epoch.
    pub(super) fn oldest_s(&self) -> Option<u64> {
        let state = self.state.lock();
        let held = state.buffer.iter().chain(state.unsettled.values()).map(|held| held.counts.since_s);
        held.chain(state.moving.values().copied()).min()
    }

    /// Messages of the queue that are ready in RabbitMQ, if it could be asked, and those that are here.
    pub(super) async fn depth(&self) -> Result<(Option<u64>, u64), lapin::Error> {
        loop {
            let landed = self.landed.notified();
            let (in_transit, channel) = {
                let state = self.state.lock();
                (state.in_transit, state.subscription.as_ref().map(|subscription| Arc::clone(&subscription.channel)))
            };
            if let Some(since) = in_transit {
                if tokio::time::timeout_at((since + LANDED_WITHIN).into(), landed).await.is_ok() {
                    continue;
                }
                // Nobody asks for it for now; what is here is better than nothing.
                return Ok((None, self.state.lock().outstanding() as u64));
            }
            let ready = match channel {
                // Asked this way, nothing is left between the two.
                Some(channel) if channel.is_alive() => Some(channel.round_trip(&self.name).await?),
                _ => None,
            };
            let mut state = self.state.lock();
            self.take_in(&mut state, None);
            // Looking has taken the place of whoever waits for deliveries; it has to look again.
            self.wake();
            if state.in_transit.is_none() {
                return Ok((ready, state.outstanding() as u64));
            }
        }
    }

    /// The answer to a subscription has come.
    fn begin(&self, subscription: Option<Subscription>) {
        let mut state = self.state.lock();
        if subscription.is_some() {
            state.subscription = subscription;
            state.first_place = state.next_place;
            state.is_open = true;
        }
        self.land(&mut state);
    }

    fn land(&self, state: &mut State) {
        state.in_transit = None;
        self.landed.notify_waiters();
    }

    /// Takes what RabbitMQ has handed over into the buffer. Returns false when the subscription has ended: lapin says so
    /// once.
    fn take_in(&self, state: &mut State, context: Option<&mut std::task::Context<'_>>) -> bool {
        let mut nobody = std::task::Context::from_waker(std::task::Waker::noop());
        let context = context.unwrap_or(&mut nobody);
        loop {
            let Some(subscription) = &mut state.subscription else { return true };
            match subscription.consumer.poll_next_unpin(context) {
                Poll::Ready(Some(Ok(delivery))) => {
                    let channel = Arc::clone(&subscription.channel);
                    self.arrive(state, delivery, &channel);
                }
                Poll::Pending if subscription.channel.is_alive() => return true,
                Poll::Ready(Some(Err(_)) | None) | Poll::Pending => {
                    self.lose(state);
                    return false;
                }
            }
        }
    }

    fn arrive(&self, state: &mut State, delivery: lapin::message::Delivery, channel: &Arc<IntakeChannel>) {
        self.note_size(delivery.data.len());
        let shared = &self.shared;
        let held = Held::new(delivery, channel, &self.name, shared.trusted(&self.queue), &shared.memory);
        if let Some(held) = settle::admit(shared, &self.queue, held) {
            let settled = state.arrive(held);
            if let (Some(held), Queue::Inbox(client)) = (&settled, &self.queue) {
                settle::note_delivered(shared, client, std::slice::from_ref(held));
            }
            settle::acknowledge(settled);
        }
    }

    fn note_size(&self, size: usize) {
        let average = match self.average_size.load(Ordering::Relaxed) {
            // None was seen before.
            0 => size,
            average => (average * 7 + size) / 8,
        };
        self.average_size.store(average.max(1), Ordering::Relaxed);
    }

    /// Hands out up to `max`, as far as the prefetch allows.
    fn hand_out(&self, state: &mut State, max: usize) -> Vec<Delivery> {
        // What came on a channel that is gone comes again.
        if state.buffer.front().is_some_and(|held| !held.channel.is_alive()) {
            state.buffer.retain(|held| held.channel.is_alive());
        }
        if self.forwards() && state.awaits_stale() {
            return Vec::new();
        }
        let prefetch = self.prefetch.load(Ordering::Relaxed) as usize;
        let room = prefetch.saturating_sub(state.unsettled.len() + state.renewing.len() + state.moving.len());
        let count = max.min(room).min(state.buffer.len());
        let me = if count > 0 { self.me.upgrade() } else { None };
        let Some(me) = me else { return Vec::new() };
        let batch = state.buffer.drain(..count).collect::<Vec<_>>();
        let mut deliveries = Vec::with_capacity(batch.len());
        for held in batch {
            let tag = state.next_tag;
            state.next_tag += 1;
            let settle = Arc::clone(&me) as Arc<dyn Settle>;
            let payload = held.payload.clone();
            deliveries.push(Delivery::new(payload, held.before + 1, held.counts.attempts, tag, settle));
            state.unsettled.insert(tag, held);
        }
        deliveries
    }

    /// What was handed out under this tag, taken out of what is unsettled.
    pub(super) fn take(&self, tag: u64) -> Option<Held> {
        self.state.lock().unsettled.remove(&tag)
    }

    /// Settles one that is being taken again. Returns whether it is known what becomes of it: one that is not gone for
    /// good is handed out anew.
    pub(super) fn settle_renewing(&self, tag: u64, is_complete: bool) -> bool {
        let mut state = self.state.lock();
        let Some(key) = state.renewing.iter().find(|(_, renewing)| renewing.tag == tag).map(|(key, _)| *key) else {
            return false;
        };
        if is_complete && let Some(renewing) = state.renewing.get_mut(&key) {
            renewing.is_complete = true;
        } else {
            state.renewing.remove(&key);
        }
        is_complete
    }

    /// Whether what it hands out goes on in order.
    fn forwards(&self) -> bool {
        !matches!(self.queue, Queue::Inbox(_))
    }

    /// The present order.
    pub(super) fn order(&self) -> Order {
        self.state.lock().order.clone()
    }

    /// Gives messages back that could not go on; nothing that was handed out behind them goes on before them, and nothing
    /// is handed out until all of that is back as well.
    pub(super) fn return_failed(&self, held: impl IntoIterator<Item = Held>) {
        let mut state = self.state.lock();
        state.order.broken.store(true, Ordering::Relaxed);
        state.order = Order { broken: Broken::default(), from: state.next_tag };
        state.is_stale = true;
        drop(state);
        self.return_handed(held);
    }

    /// Room was made.
    pub(super) fn settled(&self) {
        self.changed.notify_one();
    }

    /// Gives messages back that were handed out. They are the next that this consumer hands out, in their old order:
    /// through RabbitMQ they would come behind what it was handed meanwhile. When the consumer goes, they go back to the
    /// queue with all that it holds.
    pub(super) fn return_handed(&self, held: impl IntoIterator<Item = Held>) {
        let mut state = self.state.lock();
        for mut held in held {
            held.before += 1;
            if state.is_open && held.channel.is_alive() {
                state.put_back(held);
            } else {
                self.shared.give_back(&held);
            }
        }
        drop(state);
        self.changed.notify_one();
    }

    /// The subscription has ended by itself: its channel was closed, or its queue deleted. What nobody has seen comes
    /// again, or is gone with the queue.
    fn lose(&self, state: &mut State) {
        let ended = state.subscription.take();
        self.shared.returned.note(&self.name, 0);
        for held in state.buffer.drain(..) {
            self.shared.give_back(&held);
        }
        state.was_cancelled |= ended.is_some_and(|subscription| subscription.channel.is_alive());
        // Whoever waits for deliveries waits in vain.
        self.changed.notify_one();
    }

    /// Ends the subscription, and gives back what nobody has seen.
    fn unsubscribe(&self, state: &mut State) {
        let shared = &self.shared;
        state.is_open = false;
        let outstanding = state.outstanding_here();
        let buffer = std::mem::take(&mut state.buffer);
        match state.subscription.take() {
            Some(subscription) => shared.end_subscription(&self.queue, subscription, buffer, outstanding, None),
            None => shared.give_back_in_turn(&self.queue, buffer, state.rest.take(), None),
        }
    }

    /// Gives everything back when something has not been settled for long: in its old order, as what comes behind may
    /// not be handed out first. What was handed out is taken again, and stays with whoever has it.
    pub(super) fn refresh(&self) {
        let now = Instant::now();
        let options = &self.shared.options;
        let is_old = |held: &Held| now.duration_since(held.since) > options.held_for;
        let mut state = self.state.lock();
        state.renewing.retain(|_, renewing| renewing.until > now);
        let old: Vec<u64> = state.unsettled.iter().filter(|(_, held)| is_old(held)).map(|(tag, _)| *tag).collect();
        if old.is_empty() && !state.buffer.front().is_some_and(is_old) {
            return;
        }
        for tag in old {
            let Some(mut held) = state.unsettled.remove(&tag) else { continue };
            // What came on a channel that is gone has come again.
            if held.channel.is_alive() {
                let until = now + options.look_every();
                let renewing = Renewing { tag, before: held.before, is_complete: false, until };
                state.renewing.insert(held.key, renewing);
                // In case that somebody else is handed it.
                held.before += 1;
                state.put_back(held);
            }
        }
        self.unsubscribe(&mut state);
        drop(state);
        self.wake();
    }

    /// Begins the subscription anew, at a queue that was deleted and is there again.
    pub(super) fn resubscribe(&self) {
        let mut state = self.state.lock();
        self.unsubscribe(&mut state);
        drop(state);
        self.wake();
    }

    /// The prefetch to ask RabbitMQ for.
    fn wanted(&self) -> u16 {
        let asked = self.prefetch.load(Ordering::Relaxed).min(PREFETCH_MAX);
        u16::try_from(asked).expect("it was bounded").min(self.largest_prefetch())
    }

    /// The most that it may be handed at a time, as long as messages are.
    fn largest_prefetch(&self) -> u16 {
        let size = match self.average_size.load(Ordering::Relaxed) {
            0 => SIZE_AT_FIRST,
            size => size,
        };
        u16::try_from((HELD_BYTES / size).max(HELD_MIN)).unwrap_or(u16::MAX)
    }

    /// Whether RabbitMQ is to be told anew: when more may be held, and when less fits by far. Otherwise
    /// handing out less is enough, and a consumer that comes and goes with every change of sizes helps nobody.
    fn is_unfit(&self, current: u16) -> bool {
        if self.average_size.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let wanted = self.wanted();
        let asked = self.prefetch.load(Ordering::Relaxed).min(PREFETCH_MAX);
        let is_more = wanted > current && (u32::from(wanted) == asked || wanted / 2 >= current);
        is_more || wanted <= current / 4 && u32::from(current) <= asked
    }

    /// Begins the subscription anew when another prefetch fits better, and it has all that it may have. Otherwise RabbitMQ
    /// may be handing out more, would give that back by itself when the consumer is cancelled, and the next one would be
    /// handed what is behind.
    fn renew_if_unfit(&self, state: &mut State) {
        let Some(current) = state.subscription.as_ref().map(|subscription| subscription.prefetch) else { return };
        if !self.is_unfit(current) {
            return;
        }
        self.take_in(state, None);
        if state.outstanding_here() >= usize::from(current) {
            self.renew(state);
        }
    }

    /// To be called before deliveries are acknowledged that were moved on. A consumer that settles as fast as it can is
    /// full at no other time; and once they are acknowledged RabbitMQ may hand out more.
    pub(super) fn about_to_acknowledge(&self, places: impl IntoIterator<Item = u64>) {
        let mut state = self.state.lock();
        self.renew_if_unfit(&mut state);
        for place in places {
            state.moving.remove(&place);
        }
    }

    /// These deliveries are being moved on.
    pub(super) fn begin_moving<'a>(&self, held: impl IntoIterator<Item = &'a Held>) {
        self.state.lock().moving.extend(held.into_iter().map(|held| (held.place, held.counts.since_s)));
    }

    /// They are settled.
    pub(super) fn end_moving(&self, places: &[u64]) {
        let mut state = self.state.lock();
        for place in places {
            state.moving.remove(place);
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Ends the subscription to begin another, and keeps what it has brought.
    fn renew(&self, state: &mut State) {
        let Some(mut subscription) = state.subscription.take() else { return };
        // Here and not in its turn: what is acknowledged next would make room, and RabbitMQ hand out more.
        subscription.cancel();
        let channel = Arc::clone(&subscription.channel);
        let (sender, rest) = oneshot::channel();
        self.shared.intake(&self.queue).end(&self.shared.thread, subscription, Left::Kept(sender));
        // What came back is here, and stays here.
        self.shared.returned.note(&self.name, 0);
        state.rest = Some((channel, rest));
        state.in_transit = Some(Instant::now());
    }

    fn has_ended(&self) -> bool {
        self.shared.is_closed() || self.client.as_ref().is_some_and(|client| client.is_gone())
    }
}

#[async_trait]
impl Settle for ConsumerCore {
    async fn settle(&self, settlements: Vec<Settlement>) -> Result<(), BrokerError> {
        match self.me.upgrade() {
            Some(me) => settle::settle(me, settlements).await,
            None => Ok(()),
        }
    }

    fn give_back(&self, tag: u64) {
        match self.take(tag) {
            Some(held) => self.return_handed([held]),
            // It comes again, and is handed out anew.
            None => drop(self.settle_renewing(tag, false)),
        }
    }
}

/// What an ended subscription had on its way, when that is known; and where it came.
pub(super) type Rest = (Arc<IntakeChannel>, oneshot::Receiver<Vec<lapin::message::Delivery>>);

/// A subscription that is under way.
pub(super) type Pending = oneshot::Receiver<Result<Subscription, lapin::Error>>;

/// See the module.
pub(super) struct AmqpConsumer {
    core: Arc<ConsumerCore>,
    /// What the subscription before had on its way, taken out of the state.
    rest: Option<Rest>,
    /// The answer to a subscription that is under way: kept here, so that nothing is lost when `next` is dropped.
    pending: Option<Pending>,
    failures: u32,
}

impl AmqpConsumer {
    /// A consumer of a queue that exists.
    pub(super) fn new(shared: Arc<Shared>, queue: Queue, client: Option<Arc<Client>>, prefetch: u32) -> Self {
        let core = Arc::new_cyclic(|me| ConsumerCore {
            shared,
            name: queue.to_string(),
            queue,
            client,
            prefetch: AtomicU32::new(prefetch),
            average_size: AtomicUsize::new(0),
            changed: Notify::new(),
            landed: Notify::new(),
            state: Mutex::default(),
            turn: Arc::new(Semaphore::new(1)),
            me: me.clone(),
        });
        match &core.client {
            Some(client) => client.add_consumer(&core),
            None => core.shared.add_consumer(&core),
        }
        Self { core, rest: None, pending: None, failures: 0 }
    }

    /// Subscribes, or waits for what is in the way of that. Safe to drop.
    async fn subscribe(&mut self) {
        let core = Arc::clone(&self.core);
        let shared = &core.shared;
        if let Some((channel, rest)) = &mut self.rest {
            let rest = rest.await.unwrap_or_default();
            let mut state = core.state.lock();
            for delivery in rest {
                core.arrive(&mut state, delivery, channel);
            }
            core.land(&mut state);
            drop(state);
            self.rest = None;
            // It may have been paused meanwhile.
            return;
        }
        if self.pending.is_none() {
            if self.failures > 0 {
                let wait = RETRY_MIN.saturating_mul(1 << (self.failures - 1).min(10)).min(RETRY_MAX);
                tokio::select! {
                    () = tokio::time::sleep(wait) => {}
                    () = core.changed.notified() => {}
                }
            }
            let up = {
                let mut link = shared.link.subscribe();
                tokio::select! {
                    up = wait_up(&mut link) => up,
                    () = core.changed.notified() => return,
                }
            };
            if up.is_none() {
                return;
            }
            let was_cancelled = core.state.lock().was_cancelled;
            if was_cancelled && !core.has_ended() {
                // Subscribing to a queue that is not there would close the channel under all its consumers.
                log::warn!("RabbitMQ ended the consumer of {}; the queue is declared again", core.name);
                shared.repair(core.client.as_deref()).await;
                core.state.lock().was_cancelled = false;
            }
            core.state.lock().in_transit = Some(Instant::now());
            let (wanted, most) = (core.wanted(), core.largest_prefetch());
            self.pending = shared.intake(&core.queue).subscribe(&core.name, wanted, most).await;
        }
        let Some(pending) = &mut self.pending else { return core.land(&mut core.state.lock()) };
        let answer = tokio::select! {
            answer = pending => answer,
            () = core.changed.notified() => return,
        };
        self.pending = None;
        let (subscription, error) = match answer {
            Ok(Ok(subscription)) => (Some(subscription), None),
            Ok(Err(error)) => (None, Some(error)),
            Err(_) => (None, None),
        };
        self.failures = if subscription.is_some() { 0 } else { self.failures + 1 };
        core.begin(subscription);
        if let Some(error) = error
            && !core.has_ended()
        {
            log::debug!("consume {}: {error}; trying again", core.name);
            shared.repair_queue(&core.queue, &error).await;
        }
    }

    /// Waits until something can be handed out, or everything must be looked at again.
    async fn ready(&self, max: usize) -> Option<Vec<Delivery>> {
        let core = &self.core;
        let mut changed = std::pin::pin!(core.changed.notified());
        std::future::poll_fn(|context| {
            let mut state = core.state.lock();
            if !core.take_in(&mut state, Some(context)) {
                return Poll::Ready(None);
            }
            let batch = core.hand_out(&mut state, max);
            if !batch.is_empty() {
                return Poll::Ready(Some(batch));
            }
            drop(state);
            changed.as_mut().poll(context).map(|()| None)
        })
        .await
    }
}

#[async_trait]
impl Consume for AmqpConsumer {
    async fn next(&mut self, max: usize) -> Option<Vec<Delivery>> {
        loop {
            if self.core.has_ended() {
                let mut state = self.core.state.lock();
                self.core.unsubscribe(&mut state);
                return None;
            }
            let wanted = self.core.wanted();
            let subscribed = {
                let mut state = self.core.state.lock();
                if wanted == 0 {
                    self.core.unsubscribe(&mut state);
                } else {
                    self.core.renew_if_unfit(&mut state);
                }
                // A subscription that ended meanwhile has left something.
                self.rest = self.rest.take().or_else(|| state.rest.take());
                state.subscription.is_some()
            };
            if wanted == 0 && self.pending.is_none() && self.rest.is_none() {
                self.core.changed.notified().await;
            } else if !subscribed {
                self.subscribe().await;
            } else if let Some(batch) = self.ready(max.max(1)).await {
                return Some(batch);
            }
        }
    }

    fn set_prefetch(&self, prefetch: u32) {
        self.core.prefetch.store(prefetch, Ordering::Relaxed);
        self.core.changed.notify_one();
    }
}

impl Drop for AmqpConsumer {
    fn drop(&mut self) {
        let mut state = self.core.state.lock();
        if state.subscription.is_some() {
            return self.core.unsubscribe(&mut state);
        }
        state.is_open = false;
        self.core.land(&mut state);
        let (buffer, rest) = (std::mem::take(&mut state.buffer), self.rest.take().or_else(|| state.rest.take()));
        self.core.shared.give_back_in_turn(&self.core.queue, buffer, rest, self.pending.take());
    }
}
