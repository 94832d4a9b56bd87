//! A consumer of one queue, which outlives the sessions that serve it.
//!
//! Deliveries are read on the task of whoever consumes, straight from lapin. RabbitMQ hands out as many as the prefetch
//! in advance; they wait in a buffer here. When the session breaks, or the queue is deleted under it, the consumer
//! subscribes again by itself; it ends only with its client or with the broker.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::Poll;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::StreamExt as _;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, oneshot};

use super::Shared;
use super::clients::Client;
use super::held::Held;
use super::intake::Subscription;
use super::link::wait_up;
use super::settle;
use crate::broker::{BrokerError, Consume, Delivery, Queue, Settle, Settlement};

/// Largest prefetch that the protocol can name.
const PREFETCH_MAX: u32 = u16::MAX as u32;

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
    /// Something that `next` waits for has changed.
    changed: Notify,
    state: Mutex<State>,
    /// Batches are published in the order in which they were settled.
    pub(super) turn: Arc<Semaphore>,
    me: std::sync::Weak<Self>,
}

#[derive(Default)]
struct State {
    subscription: Option<Subscription>,
    /// Handed to this process, not to anybody in it.
    buffer: VecDeque<Held>,
    /// Handed out and not settled.
    unsettled: HashMap<u64, Held>,
    next_tag: u64,
}

impl ConsumerCore {
    /// Makes `next` look again.
    pub(super) fn wake(&self) {
        self.changed.notify_one();
    }

    /// Messages of the queue that are ready in RabbitMQ, if it could be asked, and those that are here.
    pub(super) async fn depth(&self) -> Result<(Option<u64>, u64), lapin::Error> {
        let channel = self.state.lock().subscription.as_ref().map(|subscription| Arc::clone(&subscription.channel));
        let ready = match channel {
            // Asked this way, nothing is left between the two.
            Some(channel) if channel.is_alive() => Some(channel.round_trip(&self.name).await?),
            _ => None,
        };
        let mut state = self.state.lock();
        self.take_in(&mut state, None);
        // Looking has taken the place of whoever waits for deliveries; it has to look again.
        self.wake();
        Ok((ready, (state.buffer.len() + state.unsettled.len()) as u64))
    }

    /// Takes what RabbitMQ has handed over into the buffer. Returns false when the subscription has ended.
    fn take_in(&self, state: &mut State, context: Option<&mut std::task::Context<'_>>) -> bool {
        let State { subscription, buffer, .. } = state;
        let Some(subscription) = subscription else { return true };
        let mut nobody = std::task::Context::from_waker(std::task::Waker::noop());
        let context = context.unwrap_or(&mut nobody);
        loop {
            match subscription.consumer.poll_next_unpin(context) {
                Poll::Ready(Some(Ok(delivery))) => {
                    let (shared, channel) = (&self.shared, &subscription.channel);
                    let trusted = shared.trusted(&self.queue);
                    let held = Held::new(delivery, channel, &self.name, trusted, &shared.memory);
                    if let Some(held) = settle::admit(shared, &self.queue, held) {
                        buffer.push_back(held);
                    }
                }
                Poll::Ready(Some(Err(_)) | None) => return false,
                Poll::Pending => return true,
            }
        }
    }

    /// Hands out up to `max`, as far as the prefetch allows.
    fn hand_out(&self, state: &mut State, max: usize) -> Vec<Delivery> {
        let prefetch = self.prefetch.load(Ordering::Relaxed) as usize;
        let room = prefetch.saturating_sub(state.unsettled.len());
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

    /// Room was made.
    pub(super) fn settled(&self) {
        self.changed.notify_one();
    }

    /// Gives messages back that were handed out.
    pub(super) fn return_handed(&self, held: impl IntoIterator<Item = Held>) {
        for held in held {
            self.shared.memory.note(held.key, held.before + 1);
            held.channel.give_back([held.tag]);
        }
    }

    /// The subscription has ended by itself: its channel was closed, or its queue deleted. What nobody has seen comes
    /// again, or is gone with the queue. Returns whether it was not the channel.
    fn lose(&self, state: &mut State) -> bool {
        let ended = state.subscription.take();
        for held in state.buffer.drain(..) {
            self.shared.memory.note(held.key, held.before);
            held.channel.give_back([held.tag]);
        }
        ended.is_some_and(|subscription| subscription.channel.is_alive())
    }

    /// Ends the subscription, and gives back what nobody has seen.
    fn unsubscribe(&self, state: &mut State) {
        let shared = &self.shared;
        for held in state.buffer.drain(..) {
            shared.memory.note(held.key, held.before);
            held.channel.give_back([held.tag]);
        }
        if let Some(subscription) = state.subscription.take() {
            shared.end_subscription(&self.queue, subscription, None);
        }
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
        if let Some(held) = self.take(tag) {
            self.return_handed([held]);
            self.settled();
        }
    }
}

/// See the module.
pub(super) struct AmqpConsumer {
    core: Arc<ConsumerCore>,
    /// The answer to a subscription that is under way: kept here, so that nothing is lost when `next` is dropped.
    pending: Option<oneshot::Receiver<Result<Subscription, lapin::Error>>>,
    failures: u32,
    /// RabbitMQ ended the subscription although the channel is there: the queue may be gone.
    was_cancelled: bool,
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
            changed: Notify::new(),
            state: Mutex::default(),
            turn: Arc::new(Semaphore::new(1)),
            me: me.clone(),
        });
        match &core.client {
            Some(client) => client.add_consumer(&core),
            None => core.shared.add_consumer(&core),
        }
        Self { core, pending: None, failures: 0, was_cancelled: false }
    }

    /// The prefetch to ask RabbitMQ for.
    fn wanted(&self) -> u16 {
        let prefetch = self.core.prefetch.load(Ordering::Relaxed).min(PREFETCH_MAX);
        u16::try_from(prefetch).expect("it was bounded")
    }

    /// Subscribes, or waits for what is in the way of that. Safe to drop.
    async fn subscribe(&mut self) {
        let core = Arc::clone(&self.core);
        let shared = &core.shared;
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
            if self.was_cancelled && !core.has_ended() {
                // Subscribing to a queue that is not there would close the channel under all its consumers.
                log::warn!("RabbitMQ ended the consumer of {}; the queue is declared again", core.name);
                shared.repair(core.client.as_deref()).await;
                self.was_cancelled = false;
            }
            self.pending = shared.intake(&core.queue).subscribe(&core.name, self.wanted()).await;
        }
        let Some(pending) = &mut self.pending else { return };
        let answer = tokio::select! {
            answer = pending => answer,
            () = core.changed.notified() => return,
        };
        self.pending = None;
        match answer {
            Ok(Ok(subscription)) => {
                self.failures = 0;
                core.state.lock().subscription = Some(subscription);
            }
            Ok(Err(error)) => {
                self.failures += 1;
                if !core.has_ended() {
                    log::debug!("consume {}: {error}; trying again", core.name);
                    shared.repair_queue(&core.queue, &error).await;
                }
            }
            Err(_) => self.failures += 1,
        }
    }

    /// Waits until something can be handed out, or everything must be looked at again.
    async fn ready(&mut self, max: usize) -> Option<Vec<Delivery>> {
        let core = &self.core;
        let mut changed = std::pin::pin!(core.changed.notified());
        let mut was_cancelled = false;
        let batch = std::future::poll_fn(|context| {
            let mut state = core.state.lock();
            if !core.take_in(&mut state, Some(context)) {
                was_cancelled = core.lose(&mut state);
                return Poll::Ready(None);
            }
            let batch = core.hand_out(&mut state, max);
            if !batch.is_empty() {
                return Poll::Ready(Some(batch));
            }
            drop(state);
            changed.as_mut().poll(context).map(|()| None)
        })
        .await;
        self.was_cancelled |= was_cancelled;
        batch
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
            let wanted = self.wanted();
            let subscribed = {
                let mut state = self.core.state.lock();
                let current = state.subscription.as_ref().map(|subscription| subscription.prefetch);
                // Paused, or to be handed more than RabbitMQ was told: it is told anew. For less, handing out less is
                // enough.
                if current.is_some_and(|current| wanted == 0 || wanted > current) {
                    self.core.unsubscribe(&mut state);
                }
                state.subscription.is_some()
            };
            if wanted == 0 && self.pending.is_none() {
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
        self.core.unsubscribe(&mut state);
        // A subscription that is under way is ended by its channel's task when it finds nobody to give it to.
        self.pending = None;
    }
}
