//! Pulling: leases and long polls, built from unacknowledged deliveries.
//!
//! While a client pulls, and for a moment after, a consumer of its inbox fills a buffer here (`task`); a pull takes
//! from the buffer. In auto mode what is taken is acknowledged first. A lease is a delivery that stays unacknowledged;
//! when it runs out, the message goes back into the buffer, so that it is the next to be handed out, and when nobody
//! pulls any more, back to RabbitMQ, where an AMQP client may read it (`state`).
//!
//! A pull that finds less than it asks for makes sure first that RabbitMQ has no more to give: otherwise how much it
//! got would depend on how fast the first deliveries are.

mod settle;
mod state;
mod task;

pub(super) use self::settle::settle_pulled;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::StreamExt as _;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use self::state::{Store, Taken, Waiting};
use super::Shared;
use super::channel::IntakeChannel;
use super::clients::Client;
use super::error::unavailable;
use super::held::Held;
use super::intake::Subscription;
use super::settle::{acknowledge_and_flush, admit};
use super::topology;
use crate::broker::{BrokerError, BrokerErrorKind, PullMode, Pulled, Queue, Receipt};
use crate::client::ClientId;
use crate::telemetry::Step;

/// How long a pull waits for a consumer to be there, also when it need not wait for messages.
const SUBSCRIBE_WITHIN: Duration = Duration::from_secs(10);

/// For how long a pull believes RabbitMQ that there is more, when nothing comes.
const MORE_WITHIN: Duration = Duration::from_secs(2);

/// How often it asks again meanwhile.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(10);

/// How long messages may gather for a pull, when the one before has got this many and that is not longer ago: pull after
/// pull for a few messages each would cost everybody more than it brings.
const GATHER: Duration = Duration::from_millis(1);
const THICK: usize = 4;

/// See the module. One for each client that pulls.
pub(super) struct Puller {
    shared: Arc<Shared>,
    /// Weak: the client has this.
    client: Weak<Client>,
    id: ClientId,
    name: String,
    queue: Queue,
    inner: Mutex<Inner>,
    changed: Arc<Changed>,
    /// For the task that fills the buffer.
    work: Notify,
}

/// Something came, or everything must be looked at again. Also the waker of deliveries while there are pulls: the task,
/// on another thread, would only have to pass it on.
#[derive(Default)]
struct Changed(Notify);

impl std::task::Wake for Changed {
    fn wake(self: Arc<Self>) {
        self.0.notify_waiters();
    }
}

struct Inner {
    store: Store,
    phase: Phase,
    /// RabbitMQ may have more for us than is here, although there is room for it.
    is_partial: bool,
    /// Pulls under way.
    pulls: usize,
    /// The most that one of them asks for.
    wanted: usize,
    last_pull: Instant,
    /// How many the last one got, and when.
    last_taken: (usize, Instant),
    /// When the task looks again by itself.
    looks_at: Instant,
    /// Whether the task runs.
    is_running: bool,
    /// RabbitMQ ended the subscription although the channel is there: the queue may be gone.
    was_cancelled: bool,
}

impl Inner {
    /// Until when the buffer is kept for a next pull.
    fn lingers_until(&self) -> Instant {
        self.last_pull + task::LINGER
    }
}

enum Phase {
    Idle,
    Subscribing(oneshot::Receiver<Result<Subscription, lapin::Error>>),
    Subscribed(Box<Subscription>),
    /// What was not taken is being given back.
    Ending(oneshot::Receiver<()>),
}

/// What is known of what could be pulled.
enum View {
    /// All that there is, or at least enough.
    Complete,
    /// This channel may be bringing more.
    Partial(Arc<IntakeChannel>),
    /// Nothing: there is no consumer that could bring more.
    None,
}

/// How long a pull waits.
///
/// For messages as long as it was told to. For a consumer longer: there is none for a moment in the midst of a pull as
/// well, when one that may bring more takes the place of the first.
struct Patience {
    begun: Instant,
    wait: Duration,
    /// Since when there is no consumer.
    without: Option<Instant>,
}

impl Patience {
    fn new(wait: Duration) -> Self {
        Self { begun: Instant::now(), wait, without: None }
    }

    /// What a look has shown.
    fn note(&mut self, view: &View) {
        self.without = match view {
            View::None => self.without.or_else(|| Some(Instant::now())),
            View::Complete | View::Partial(_) => None,
        };
    }

    /// When the wait for what is missing ends.
    fn ends_at(&self) -> Instant {
        let for_messages = self.begun + self.wait;
        self.without.map_or(for_messages, |since| for_messages.max(since + SUBSCRIBE_WITHIN))
    }

    fn is_over(&self) -> bool {
        Instant::now() >= self.ends_at()
    }
}

/// Receipts of this process; counted for all inboxes together, so that one is good for its own only.
static NEXT_RECEIPT: AtomicU64 = AtomicU64::new(1);

fn receipt(number: u64, nonce: u64) -> Receipt {
    Receipt(format!("{nonce:016x}-{number:x}"))
}

fn number_of(receipt: &Receipt, nonce: u64) -> Option<u64> {
    let (_, number) = receipt.0.split_once('-')?;
    let number = u64::from_str_radix(number, 16).ok()?;
    (self::receipt(number, nonce) == *receipt).then_some(number)
}

impl Puller {
    pub(super) fn new(shared: Arc<Shared>, client: &Arc<Client>) -> Arc<Self> {
        let inner = Inner {
            store: Store::new(Arc::clone(&shared.leased_bytes), shared.options.held_for, shared.options.look_every()),
            phase: Phase::Idle,
            is_partial: false,
            pulls: 0,
            wanted: 0,
            last_pull: Instant::now(),
            last_taken: (0, Instant::now()),
            looks_at: Instant::now(),
            is_running: false,
            was_cancelled: false,
        };
        Arc::new(Self {
            shared,
            id: client.id.clone(),
            name: topology::inbox(&client.id),
            queue: Queue::Inbox(client.id.clone()),
            client: Arc::downgrade(client),
            inner: Mutex::new(inner),
            changed: Arc::default(),
            work: Notify::new(),
        })
    }

    /// Whether the client was deleted.
    fn is_gone(&self) -> bool {
        self.client.upgrade().is_none_or(|client| client.is_gone())
    }

    /// Whether RabbitMQ hands it deliveries, or is about to, or some are on their way back.
    pub(super) fn is_subscribed(&self) -> bool {
        !matches!(self.inner.lock().phase, Phase::Idle)
    }

    /// When the oldest of what it holds came into the inbox, in seconds since the epoch.
    pub(super) fn oldest_s(&self) -> Option<u64> {
        self.inner.lock().store.oldest_s()
    }

    /// Whether there is anything that it has or waits for.
    pub(super) fn is_running(&self) -> bool {
        self.inner.lock().is_running
    }

    /// Makes everybody look again.
    pub(super) fn wake(&self) {
        self.work.notify_one();
        self.changed.0.notify_waiters();
    }

    /// See [`crate::broker::Broker::pull`].
    pub(super) async fn pull(
        self: &Arc<Self>,
        max: usize,
        wait: Duration,
        mode: PullMode,
    ) -> Result<Vec<Pulled>, BrokerError> {
        let action = || format!("pull from queue {}", self.name);
        let _pull = self.enter(max);
        let mut patience = Patience::new(wait);
        let mut link = self.shared.link.subscribe();
        let mut has_gathered = false;
        loop {
            // Listening begins before anything is looked at, so no change is missed.
            let mut changed = std::pin::pin!(self.changed.0.notified());
            changed.as_mut().enable();
            if self.is_gone() {
                return Err(BrokerError::new(BrokerErrorKind::NotFound, action()));
            }
            link.borrow_and_update().session(&action())?;
            let view = self.look(max);
            patience.note(&view);
            let until = match view {
                View::Complete => {
                    if !has_gathered && self.comes_thick(max) {
                        has_gathered = true;
                        tokio::time::sleep(GATHER).await;
                        continue;
                    }
                    let taken = self.take(max, mode);
                    if !taken.is_empty() {
                        return self.hand_over(taken, mode, &action()).await;
                    }
                    if patience.is_over() {
                        return Ok(Vec::new());
                    }
                    patience.ends_at()
                }
                View::Partial(channel) => {
                    if self.ask(&channel, patience.begun).await {
                        continue;
                    }
                    Instant::now() + ASK_AGAIN_AFTER
                }
                View::None if patience.is_over() => return Err(unavailable(action())),
                View::None => {
                    // It subscribes.
                    self.work.notify_one();
                    patience.ends_at()
                }
            };
            tokio::select! {
                () = changed => {}
                _ = link.changed() => {}
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }

    fn enter(self: &Arc<Self>, max: usize) -> Pull {
        let mut inner = self.inner.lock();
        inner.pulls += 1;
        inner.wanted = if inner.pulls == 1 { max } else { inner.wanted.max(max) };
        self.start(&mut inner);
        // To wake the task costs more than all the rest of a pull.
        let is_idle = matches!(inner.phase, Phase::Idle);
        drop(inner);
        if is_idle {
            self.work.notify_one();
        }
        Pull(Arc::clone(self))
    }

    fn start(self: &Arc<Self>, inner: &mut Inner) {
        if !inner.is_running {
            inner.is_running = true;
            self.shared.thread.spawn(task::run(Arc::clone(self)));
        }
    }

    fn look(&self, max: usize) -> View {
        let mut inner = self.inner.lock();
        self.take_in(&mut inner, None);
        // What is taken is acknowledged, and makes room: RabbitMQ would hand out more to the consumer that is ending.
        if matches!(inner.phase, Phase::Ending(_)) {
            return View::None;
        }
        // Long messages fill what may be held before they are as many as were asked for.
        if inner.store.waiting() >= max.min(usize::from(task::prefetch(&inner))) {
            return View::Complete;
        }
        match &inner.phase {
            Phase::Subscribed(subscription) if inner.is_partial => View::Partial(Arc::clone(&subscription.channel)),
            Phase::Subscribed(subscription) if inner.store.outstanding() < usize::from(subscription.prefetch) => {
                View::Complete
            }
            // All that it may have unsettled is unsettled: it must be told that we want more.
            _ => View::None,
        }
    }

    /// Asks RabbitMQ whether everything is here that it had for us. Returns whether that is known now.
    async fn ask(&self, channel: &Arc<IntakeChannel>, since: Instant) -> bool {
        let ready = match channel.round_trip(&self.name).await {
            Ok(ready) => ready,
            Err(error) => {
                log::debug!("{}: {error}", self.name);
                return false;
            }
        };
        let mut inner = self.inner.lock();
        self.take_in(&mut inner, None);
        let Phase::Subscribed(subscription) = &inner.phase else { return true };
        if !Arc::ptr_eq(&subscription.channel, channel) {
            return true;
        }
        // Quorum queues hand out more only when they have written down what was acknowledged before.
        let has_room = inner.store.outstanding() < usize::from(subscription.prefetch);
        inner.is_partial = ready > 0 && has_room && since.elapsed() < MORE_WITHIN;
        !inner.is_partial
    }

    /// Takes deliveries in. Returns whether anything changed. The next delivery wakes the pulls, or else whose `context`
    /// this is.
    fn take_in(&self, inner: &mut Inner, context: Option<&mut Context<'_>>) -> bool {
        let waker = context.map_or_else(|| Arc::clone(&self.changed).into(), |context| context.waker().clone());
        let mut context = Context::from_waker(&waker);
        let Inner { store, phase, is_partial, was_cancelled, .. } = inner;
        let mut has_changed = false;
        while let Phase::Subscribed(subscription) = phase {
            match subscription.consumer.poll_next_unpin(&mut context) {
                Poll::Ready(Some(Ok(delivery))) => {
                    let memory = &self.shared.memory;
                    let held = Held::new(delivery, &subscription.channel, &self.name, None, memory);
                    if let Some(held) = admit(&self.shared, &self.queue, held) {
                        store.arrive(held);
                        *is_partial |= store.outstanding() >= usize::from(subscription.prefetch);
                    }
                    has_changed = true;
                }
                Poll::Pending if subscription.channel.is_alive() => break,
                Poll::Ready(Some(Err(_)) | None) | Poll::Pending => {
                    *was_cancelled |= subscription.channel.is_alive();
                    *phase = Phase::Idle;
                    self.shared.returned.note(&self.name, 0);
                    store.drop_dead();
                    has_changed = true;
                    // It subscribes again.
                    self.work.notify_one();
                }
            }
        }
        has_changed
    }

    /// Whether there is less than is asked for and more may be expected at once.
    fn comes_thick(&self, max: usize) -> bool {
        let inner = self.inner.lock();
        let (count, at) = inner.last_taken;
        let most = max.min(usize::from(task::prefetch(&inner)));
        (1..most).contains(&inner.store.waiting()) && count >= THICK && at.elapsed() < GATHER
    }

    fn take(&self, max: usize, mode: PullMode) -> Vec<Taken> {
        let mut inner = self.inner.lock();
        let taken = inner.store.take(max, mode, || NEXT_RECEIPT.fetch_add(1, Ordering::Relaxed));
        inner.last_taken = (taken.len(), Instant::now());
        let is_due_sooner = inner.store.next_deadline().is_some_and(|at| at < inner.looks_at.into_std());
        drop(inner);
        if is_due_sooner {
            self.work.notify_one();
        }
        taken
    }

    /// What was taken, as the answer. In auto mode it is gone for good first.
    async fn hand_over(&self, taken: Vec<Taken>, mode: PullMode, action: &str) -> Result<Vec<Pulled>, BrokerError> {
        let shared = &self.shared;
        let mut pulled = Vec::with_capacity(taken.len());
        let mut gone = Vec::new();
        for Taken { message, deliveries, held, lease } in taken {
            let receipt = lease.map(|number| receipt(number, shared.nonce));
            pulled.push(Pulled { message, deliveries, receipt });
            gone.extend(held);
        }
        if mode == PullMode::Auto {
            let keys: Vec<u64> = gone.iter().map(|held| held.key).collect();
            if let Err(error) = acknowledge_and_flush(shared, gone).await {
                // Whether they are gone is not known. Handed to nobody they may come again.
                shared.memory.forget_gone(keys);
                return Err(unavailable(format!("{action}: {error}")));
            }
            shared.telemetry.metrics.delivered.inc_by(pulled.len() as u64);
            // Latencies and rates come from it as well, whether or not ways are kept.
            for one in &pulled {
                shared.telemetry.traces.record(&one.message, Step::Delivered(self.id.clone()));
            }
        }
        Ok(pulled)
    }

    /// Takes leases out by their receipts; returns them, and the receipts that are not valid.
    pub(super) fn end_leases(&self, receipts: Vec<Receipt>) -> (Vec<Leased>, Vec<Receipt>) {
        let mut inner = self.inner.lock();
        let (mut ended, mut unknown) = (Vec::new(), Vec::new());
        for receipt in receipts {
            match number_of(&receipt, self.shared.nonce).and_then(|number| inner.store.end_lease(number)) {
                Some(waiting) => ended.push(Leased(waiting)),
                None => unknown.push(receipt),
            }
        }
        drop(inner);
        self.work.notify_one();
        (ended, unknown)
    }

    /// Makes messages the next to be handed out again.
    pub(super) fn put_back(self: &Arc<Self>, ended: Vec<Leased>) {
        let mut inner = self.inner.lock();
        for Leased(waiting) in ended {
            inner.store.put_back(waiting);
        }
        inner.store.drop_dead();
        self.start(&mut inner);
        drop(inner);
        self.wake();
    }

    /// Takes the oldest of what nobody has taken, as long as `dies` says so.
    pub(super) fn take_waiting(&self, dies: impl FnMut(&Held) -> bool) -> Vec<Held> {
        self.inner.lock().store.take_while(dies)
    }

    /// Messages of the inbox that are ready in RabbitMQ, if that was asked, and those that are here.
    pub(super) async fn depth(&self) -> Result<(Option<u64>, u64), lapin::Error> {
        let channel = match &self.inner.lock().phase {
            Phase::Subscribed(subscription) if subscription.channel.is_alive() => {
                Some(Arc::clone(&subscription.channel))
            }
            _ => None,
        };
        let ready = match channel {
            Some(channel) => Some(channel.round_trip(&self.name).await?),
            None => None,
        };
        let mut inner = self.inner.lock();
        self.take_in(&mut inner, None);
        inner.store.drop_dead();
        let here = inner.store.len() as u64;
        drop(inner);
        // Looking has taken the task's place.
        self.wake();
        Ok((ready, here))
    }
}

/// A lease that was ended.
pub(super) struct Leased(Waiting);

impl Leased {
    /// The delivery behind it.
    pub(super) fn into_held(self) -> Held {
        self.0.held
    }

    /// The delivery behind it, which counts as one more that was handed out.
    pub(super) fn into_counted(self) -> Held {
        let held = self.into_held();
        Held { before: held.before + 1, ..held }
    }
}

/// A pull under way.
struct Pull(Arc<Puller>);

impl Drop for Pull {
    fn drop(&mut self) {
        let mut inner = self.0.inner.lock();
        inner.pulls -= 1;
        inner.last_pull = Instant::now();
        let is_due_sooner = inner.looks_at > inner.lingers_until();
        drop(inner);
        // Others may have to look at what it has left.
        self.0.changed.0.notify_waiters();
        if is_due_sooner {
            self.0.work.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receipt_is_read_as_it_was_written_only() {
        let good = receipt(0x1f, 7);
        assert_eq!(number_of(&good, 7), Some(0x1f));
        for bad in ["", "-", "0000000000000007-", "7-1f", "0000000000000007-1F", "0000000000000007-01f", " "] {
            assert_eq!(number_of(&Receipt(bad.into()), 7), None, "{bad}");
        }
        assert_eq!(number_of(&good, 8), None);
    }

    #[test]
    fn a_pull_that_need_not_wait_for_messages_waits_for_a_consumer_that_takes_another_ones_place() {
        let begun = Instant::now() - Duration::from_secs(1);
        let mut patience = Patience { begun, wait: Duration::ZERO, without: None };
        assert!(patience.is_over(), "for messages");
        patience.note(&View::None);
        assert!(!patience.is_over() && patience.ends_at() > Instant::now() + SUBSCRIBE_WITHIN / 2);
        let since = patience.without;
        patience.note(&View::None);
        assert_eq!(patience.without, since, "it does not begin again");
        patience.note(&View::Complete);
        assert!(patience.is_over(), "for messages, with a consumer");
        patience.without = begun.checked_sub(SUBSCRIBE_WITHIN);
        patience.note(&View::None);
        assert!(patience.is_over(), "without a consumer for too long");
    }

    #[test]
    fn a_long_poll_waits_as_long_as_it_was_told_to() {
        let wait = 2 * SUBSCRIBE_WITHIN;
        let mut patience = Patience::new(wait);
        let until = patience.begun + wait;
        assert_eq!(patience.ends_at(), until);
        patience.note(&View::None);
        assert_eq!(patience.ends_at(), until);
    }
}
