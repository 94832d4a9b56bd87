//! What a lane has on its way: the confirms that it waits for, and the batches that they belong to.
//!
//! A message counts as published when RabbitMQ has confirmed it and did not return it. A returned message comes attached
//! to any confirm, so it is matched by what it is (its target and its id), and a confirm is judged only after every
//! confirm that was there with it.

use std::collections::{HashMap, VecDeque};
use std::hash::{Hash as _, Hasher as _};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation};

use super::error::{Fault, fault_of};
use super::wire::short;

/// Messages that may be on their way to a confirm, on one channel.
const WINDOW_MESSAGES: usize = 1024;

/// Their bytes.
const WINDOW_BYTES: usize = 16 << 20;

/// A message whose confirm takes longer, while nothing else is confirmed or what left seconds later is, waits for ever: its
/// channel published to a quorum queue for the first time just when the node of its leader died, and is never told of the
/// next leader (RabbitMQ 3.10). The channel is given up, and what was on it comes again on another.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);

/// However slow RabbitMQ is.
const CONFIRM_TIMEOUT_MAX: Duration = Duration::from_secs(30);

/// With more than this on its way a lane is busy.
const BUSY: usize = 32;

/// A message to be published.
#[derive(Debug, Clone)]
pub(super) struct Outgoing {
    /// Empty: the default exchange.
    pub(super) exchange: ShortString,
    /// Routing key.
    pub(super) key: ShortString,
    /// See `wire`.
    pub(super) properties: BasicProperties,
    /// Its body.
    pub(super) body: Bytes,
}

/// No queue has this name.
const NOWHERE: &str = "soar-probe";

impl Outgoing {
    /// One that no queue takes: it is confirmed when all before it on its channel is where it belongs.
    pub(super) fn to_nowhere() -> Self {
        let properties = BasicProperties::default();
        Self { exchange: short(""), key: short(NOWHERE), properties, body: Bytes::new() }
    }
}

/// Why a message was not published.
#[derive(Debug, Clone)]
pub(super) enum Refusal {
    /// It reached no queue.
    Unroutable,
    /// RabbitMQ refused it.
    Refused,
    /// The channel or the connection broke first: it may have been published or not.
    Lost(Arc<str>),
    /// The broker was closed.
    Closed,
}

/// What became of a message.
pub(super) type Fate = Result<(), Refusal>;

/// Called with the fate of each message of a batch, in order. Must not block.
pub(super) type Done = Box<dyn FnOnce(Vec<Fate>) + Send>;

/// Set when a message of a source could not be published. Those of its later batches that are not on their way yet are
/// then refused, so that they do not overtake it.
pub(super) type Broken = Arc<AtomicBool>;

/// A batch that is handed over.
pub(super) struct Job {
    pub(super) messages: Vec<Outgoing>,
    pub(super) broken: Option<Broken>,
    pub(super) done: Done,
}

/// A batch whose fates are known.
pub(super) type Ended = (Done, Vec<Fate>);

/// Tells of what has ended.
pub(super) fn tell(ended: Vec<Ended>) {
    for (done, fates) in ended {
        done(fates);
    }
}

/// What became of a flight.
type Confirmed = (u64, Result<Confirmation, lapin::Error>);
type Confirm = Pin<Box<dyn Future<Output = Confirmed> + Send>>;

/// What is on its way.
#[derive(Default)]
pub(super) struct Window {
    confirms: FuturesUnordered<Confirm>,
    flights: HashMap<u64, Flight>,
    bytes: usize,
    next_flight: u64,
    batches: HashMap<u64, Batch>,
    next_batch: u64,
    /// Batches that are being put in line, in this order, and what is left of them.
    entering: VecDeque<(u64, usize, std::vec::IntoIter<Outgoing>)>,
    /// Returned messages that no confirm was judged by yet.
    returned: HashMap<u64, u32>,
    /// The channel was closed because an exchange is not there.
    is_suspect: bool,
    /// A message was refused.
    has_refused: bool,
    /// When a message was last confirmed, and when the youngest of those left.
    confirmed_at: Option<Instant>,
    confirmed_since: Option<Instant>,
}

/// One message on its way.
struct Flight {
    batch: u64,
    index: usize,
    what: u64,
    bytes: usize,
    since: Instant,
}

/// A batch whose messages are on their way.
struct Batch {
    fates: Vec<Option<Fate>>,
    left: usize,
    broken: Option<Broken>,
    done: Done,
}

impl Window {
    /// Whether the next batch may come.
    pub(super) fn takes_jobs(&self) -> bool {
        self.entering.is_empty() && self.has_room()
    }

    /// Whether confirms come faster than it is worth to look at each.
    pub(super) fn is_busy(&self) -> bool {
        self.flights.len() > BUSY
    }

    /// Whether RabbitMQ has refused a message.
    pub(super) fn has_refused(&self) -> bool {
        self.has_refused
    }

    /// Whether nothing is on its way.
    pub(super) fn is_empty(&self) -> bool {
        self.confirms.is_empty()
    }

    /// Ready when confirms came: they are judged. Says whether one of them is a sign of life.
    pub(super) fn poll_confirms(&mut self, context: &mut Context<'_>, ended: &mut Vec<Ended>) -> Poll<bool> {
        let Poll::Ready(Some(first)) = self.confirms.poll_next_unpin(context) else { return Poll::Pending };
        let is_sign = first.1.is_ok();
        self.settle(first, context, ended);
        Poll::Ready(is_sign)
    }

    fn has_room(&self) -> bool {
        self.flights.len() < WINDOW_MESSAGES && self.bytes < WINDOW_BYTES
    }

    /// While RabbitMQ takes no messages it confirms none; their time begins when it does.
    pub(super) fn wait_on(&mut self) {
        self.flights.values_mut().for_each(|flight| flight.since = Instant::now());
    }

    /// Whether a confirm does not come.
    pub(super) fn is_stuck(&self) -> bool {
        let is_quiet = self.confirmed_at.is_none_or(|at| at.elapsed() > CONFIRM_TIMEOUT);
        let overtaken = |since: Instant| self.confirmed_since.is_some_and(|other| other > since + CONFIRM_TIMEOUT / 2);
        self.flights.values().any(|flight| {
            let age = flight.since.elapsed();
            age > CONFIRM_TIMEOUT && (is_quiet || overtaken(flight.since)) || age > CONFIRM_TIMEOUT_MAX
        })
    }

    /// Takes a batch, to be put in line.
    pub(super) fn add(&mut self, job: Job, ended: &mut Vec<Ended>) {
        let count = job.messages.len();
        if count == 0 {
            return ended.push((job.done, Vec::new()));
        }
        let number = self.next_batch;
        self.next_batch += 1;
        let batch = Batch { fates: vec![None; count], left: count, broken: job.broken, done: job.done };
        self.batches.insert(number, batch);
        self.entering.push_back((number, 0, job.messages.into_iter()));
    }

    /// Puts messages in line, as many as there is room for.
    pub(super) fn fill(&mut self, channel: &Arc<Channel>, context: &mut Context<'_>, ended: &mut Vec<Ended>) {
        while self.has_room() {
            let Some((batch, index, rest)) = self.entering.front_mut() else { return };
            let Some(message) = rest.next() else {
                self.entering.pop_front();
                continue;
            };
            let (batch, at) = (*batch, *index);
            *index += 1;
            let is_broken = |batch: &Batch| batch.broken.as_ref().is_some_and(|it| it.load(Ordering::Relaxed));
            if self.batches.get(&batch).is_some_and(is_broken) {
                self.end(batch, at, Err(Refusal::Lost("one before it was not published".into())), ended);
                continue;
            }
            let flight = self.next_flight;
            self.next_flight += 1;
            let what = identity(&message.exchange, &message.key, &message.properties);
            let bytes = message.body.len();
            self.flights.insert(flight, Flight { batch, index: at, what, bytes, since: Instant::now() });
            self.bytes += bytes;
            let mut confirm = publish(flight, Arc::clone(channel), message);
            // Polled here for the first time: that puts its frames in line, so messages leave in this order.
            match confirm.as_mut().poll(context) {
                Poll::Ready(result) => self.settle(result, context, ended),
                Poll::Pending => self.confirms.push(confirm),
            }
        }
    }

    /// Judges this confirm and all that are there with it.
    ///
    /// Lapin attaches a returned message to whichever confirm it completes next. It completes them one after the other
    /// on one thread, so when one came without a message, every message that was returned before it has been attached
    /// to a confirm that is complete as well; and those are taken here until there is no more. A set that is not ready,
    /// and has woken us meanwhile, may have more ([`FuturesUnordered`] yields now and then).
    fn settle(&mut self, first: Confirmed, context: &mut Context<'_>, ended: &mut Vec<Ended>) {
        let woken = Arc::new(Woken { is_woken: AtomicBool::new(false), task: context.waker().clone() });
        let waker = Waker::from(Arc::clone(&woken));
        let context = &mut Context::from_waker(&waker);
        let mut acked = Vec::new();
        let mut next = Some(first);
        while let Some((flight, result)) = next {
            match result {
                Ok(confirmation) => {
                    let is_refused = confirmation.is_nack();
                    self.has_refused |= is_refused;
                    let fate = if is_refused { Err(Refusal::Refused) } else { Ok(()) };
                    if let Some(message) = confirmation.take_message() {
                        let delivery = &message.delivery;
                        let what = identity(&delivery.exchange, &delivery.routing_key, &delivery.properties);
                        *self.returned.entry(what).or_default() += 1;
                    }
                    acked.push((flight, fate));
                }
                Err(error) => {
                    self.is_suspect |= fault_of(&error) == Fault::NotFound;
                    self.land(flight, Err(Refusal::Lost(error.to_string().into())), ended);
                }
            }
            next = loop {
                match self.confirms.poll_next_unpin(context) {
                    Poll::Ready(next) => break next,
                    Poll::Pending if woken.is_woken.swap(false, Ordering::AcqRel) => {}
                    Poll::Pending => break None,
                }
            };
        }
        for (flight, mut fate) in acked {
            let what = self.flights.get(&flight).map(|flight| flight.what);
            if let Some(what) = what.filter(|_| fate.is_ok() && !self.returned.is_empty())
                && let std::collections::hash_map::Entry::Occupied(mut count) = self.returned.entry(what)
            {
                fate = Err(Refusal::Unroutable);
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
            self.land(flight, fate, ended);
        }
    }

    /// A message has met its fate.
    fn land(&mut self, flight: u64, fate: Fate, ended: &mut Vec<Ended>) {
        let Some(flight) = self.flights.remove(&flight) else { return };
        self.bytes -= flight.bytes;
        if fate.is_ok() {
            self.confirmed_at = Some(Instant::now());
            self.confirmed_since = self.confirmed_since.max(Some(flight.since));
        }
        self.end(flight.batch, flight.index, fate, ended);
    }

    /// Notes the fate of one message of a batch, which has ended when that was the last.
    fn end(&mut self, batch: u64, index: usize, fate: Fate, ended: &mut Vec<Ended>) {
        let std::collections::hash_map::Entry::Occupied(mut batch) = self.batches.entry(batch) else { return };
        // One that found no queue was judged; there is nothing to wait for.
        if let (Err(Refusal::Refused | Refusal::Lost(_) | Refusal::Closed), Some(broken)) = (&fate, &batch.get().broken)
        {
            broken.store(true, Ordering::Relaxed);
        }
        batch.get_mut().fates[index] = Some(fate);
        batch.get_mut().left -= 1;
        if batch.get().left == 0 {
            let batch = batch.remove();
            let fates = batch.fates.into_iter().map(|fate| fate.unwrap_or(Err(Refusal::Closed)));
            ended.push((batch.done, fates.collect()));
        }
    }

    /// The channel has ended: everything that is on its way, or waiting for it, is lost. Returns whether an exchange was
    /// missing.
    pub(super) async fn give_up(mut self, why: &str) -> bool {
        let last = tokio::time::sleep(Duration::from_secs(2));
        tokio::pin!(last);
        let mut ended = Vec::new();
        while !self.confirms.is_empty() {
            tokio::select! {
                _ = std::future::poll_fn(|context| self.poll_confirms(context, &mut ended)) => {}
                () = &mut last => break,
            }
        }
        tell(ended);
        for (_, batch) in self.batches.drain() {
            if let Some(broken) = &batch.broken {
                broken.store(true, Ordering::Relaxed);
            }
            let lost = || Err(Refusal::Lost(why.into()));
            (batch.done)(batch.fates.into_iter().map(|fate| fate.unwrap_or_else(lost)).collect());
        }
        self.is_suspect
    }
}

/// Wakes a task, and knows that it did.
struct Woken {
    is_woken: AtomicBool,
    task: Waker,
}

impl std::task::Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.is_woken.store(true, Ordering::Release);
        self.task.wake_by_ref();
    }
}

/// Publishes and waits for the confirm.
fn publish(flight: u64, channel: Arc<Channel>, message: Outgoing) -> Confirm {
    Box::pin(async move {
        let Outgoing { exchange, key, properties, body } = message;
        let options = BasicPublishOptions { mandatory: key.as_str() != NOWHERE, ..BasicPublishOptions::default() };
        let result = match channel.basic_publish(exchange, key, options, &body, properties).await {
            Ok(confirm) => confirm.await,
            Err(error) => Err(error),
        };
        (flight, result)
    })
}

/// What a returned message is recognised by.
fn identity(exchange: &ShortString, key: &ShortString, properties: &BasicProperties) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    exchange.as_str().hash(&mut hasher);
    key.as_str().hash(&mut hasher);
    properties.message_id().as_ref().map(ShortString::as_str).hash(&mut hasher);
    hasher.finish()
}
