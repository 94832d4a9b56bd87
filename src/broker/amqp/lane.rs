//! Publishing: one channel, a window of confirms, and a task that judges them.
//!
//! What is handed to a lane leaves in that order. While there is room in the window whoever publishes puts its messages
//! in line itself: a thread between would cost more time than all the rest of a hop. Otherwise they wait for the task.
//! A message counts as published when RabbitMQ has confirmed it and did not return it. A returned message comes attached
//! to any confirm, so it is matched by what it is (its target and its id), and a confirm is judged only after every
//! confirm that was there with it.

use std::collections::HashMap;
use std::hash::{Hash as _, Hasher as _};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};

use super::error::{Fault, fault_of};
use super::link::{Link, wait_up};
use super::runtime::AmqpThread;
use super::session::{Role, Session};
use super::wire::short;

/// Messages that may be on their way to a confirm, on one channel.
const WINDOW_MESSAGES: usize = 1024;

/// Their bytes.
const WINDOW_BYTES: usize = 16 << 20;

/// Batches that may wait for room in the window; further senders wait to hand theirs over.
const JOBS_WAITING: usize = 64;

/// A confirm that takes longer means that its queue has no leader or the channel is stuck: a channel that first
/// publishes to a quorum queue just when its leader's node dies is never told of the next leader, and waits for ever
/// (RabbitMQ 3.10). The channel is then given up, and what was on it comes again on another.
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);

/// With more than this on its way a lane is busy: it lets confirms gather before it judges them, because to be woken by
/// each of them costs more than all the rest of it. Others' throughput gains by it, and no message waits longer, as the
/// next queue has it long before its confirm is here.
const BUSY: usize = 32;
const GATHER: Duration = Duration::from_millis(1);

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

struct Job {
    messages: Vec<Outgoing>,
    broken: Option<Broken>,
    done: Done,
}

/// See the module.
pub(super) struct Lane {
    jobs: mpsc::Sender<Job>,
    front: Arc<Front>,
    /// Batches that were handed over and whose fate is not known.
    pending: Arc<AtomicUsize>,
}

/// What whoever publishes and the lane's task have in common.
#[derive(Default)]
struct Front {
    state: Mutex<State>,
    /// Wakes the task, which has to look at its window again.
    task: Arc<Wakeup>,
}

#[derive(Default)]
struct State {
    /// The channel and what is on its way on it, while it is open.
    live: Option<Live>,
    /// Batches that wait for the task, or for room to do so: those that come after them go behind them.
    queued: usize,
}

struct Live {
    channel: Arc<Channel>,
    window: Window,
    /// Whether nothing may be put in line although there is room.
    suspect: watch::Receiver<bool>,
    role: Role,
}

impl Live {
    /// Whether messages may be put in line. What is moved on goes through exchanges; what comes in does not.
    fn is_open(&self) -> bool {
        self.role != Role::Relay || !*self.suspect.borrow()
    }

    /// Puts messages in line, as many as there is room for. Batches whose last message met its fate go to `ended`.
    fn fill(&mut self, context: &mut Context<'_>, ended: &mut Vec<Ended>) {
        if self.is_open() {
            self.window.fill(&self.channel, context, ended);
        }
    }
}

/// The waker of confirms that the task has not seen yet.
#[derive(Default)]
struct Wakeup(Notify);

impl std::task::Wake for Wakeup {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }
}

impl Front {
    /// Puts a batch in line when nothing is before it. Gives it back when it has to wait for the task; it is then
    /// counted as queued.
    fn put_in_line(&self, job: Job) -> Result<(), Job> {
        let waker = Waker::from(Arc::clone(&self.task));
        let mut ended = Vec::new();
        let mut state = self.state.lock();
        let is_first = state.queued == 0;
        let live = state.live.as_mut().filter(|live| is_first && live.is_open() && live.window.takes_jobs());
        let Some(live) = live else {
            state.queued += 1;
            return Err(job);
        };
        live.window.add(job, &mut ended);
        live.fill(&mut Context::from_waker(&waker), &mut ended);
        drop(state);
        tell(ended);
        Ok(())
    }

    /// The task has taken a batch that was queued.
    fn unqueue(&self) {
        self.state.lock().queued -= 1;
    }
}

/// A batch on its way to the task. Counted as queued until the task has it; or, dropped, until nobody hands it over.
struct Queued<'a>(Option<&'a Front>);

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        if let Some(front) = self.0 {
            front.unqueue();
        }
    }
}

/// A batch whose fates are known.
type Ended = (Done, Vec<Fate>);

fn tell(ended: Vec<Ended>) {
    for (done, fates) in ended {
        done(fates);
    }
}

impl Lane {
    /// Starts a lane on the connection for `role` of each session.
    pub(super) fn start(thread: &AmqpThread, role: Role, link: watch::Receiver<Link>) -> Self {
        let (sender, jobs) = mpsc::channel(JOBS_WAITING);
        let front = Arc::<Front>::default();
        thread.spawn(run(role, Arc::clone(&front), link, jobs));
        Self { jobs: sender, front, pending: Arc::default() }
    }

    /// Whether nothing is on its way.
    pub(super) fn is_idle(&self) -> bool {
        self.pending.load(Ordering::Acquire) == 0
    }

    /// Hands a batch over. When the future is dropped, all of the batch was handed over, or none. `done` is called in
    /// either case that it was.
    ///
    /// # Errors
    /// When the broker is closed.
    pub(super) async fn send(
        &self,
        messages: Vec<Outgoing>,
        broken: Option<Broken>,
        done: Done,
    ) -> Result<(), Refusal> {
        let pending = Arc::clone(&self.pending);
        pending.fetch_add(1, Ordering::AcqRel);
        let counted = Pending(pending);
        let done = Box::new(move |fates| {
            done(fates);
            drop(counted);
        });
        let Err(job) = self.front.put_in_line(Job { messages, broken, done }) else { return Ok(()) };
        let mut queued = Queued(Some(&self.front));
        let permit = self.jobs.reserve().await.map_err(|_| Refusal::Closed)?;
        permit.send(job);
        // The task counts it from here on.
        queued.0 = None;
        Ok(())
    }
}

/// Counts a batch that was handed over.
struct Pending(Arc<AtomicUsize>);

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

async fn run(role: Role, front: Arc<Front>, mut link: watch::Receiver<Link>, mut jobs: mpsc::Receiver<Job>) {
    loop {
        let state = link.borrow_and_update().clone();
        match state {
            Link::Up(session) => {
                if let Err(error) = serve(role, &front, &session, &mut link, &mut jobs).await {
                    log::warn!("a publishing channel is opened again: {error}");
                    if !session.is_alive() {
                        // Its end is about to be told; until then there is no use in trying.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
            Link::Down(why) => {
                // Nothing waits for a broker that is away: senders are told to come again.
                tokio::select! {
                    _ = link.changed() => {}
                    job = jobs.recv() => match job {
                        Some(job) => refuse(&front, job, &Refusal::Lost(Arc::clone(&why))),
                        None => return,
                    }
                }
            }
            Link::Closed => break,
        }
        if jobs.is_closed() {
            break;
        }
        if wait_up(&mut link.clone()).now_or_never().is_some_and(|up| up.is_none()) {
            break;
        }
    }
    jobs.close();
    while let Some(job) = jobs.recv().await {
        refuse(&front, job, &Refusal::Closed);
    }
}

fn refuse(front: &Front, job: Job, why: &Refusal) {
    front.unqueue();
    if let Some(broken) = &job.broken {
        broken.store(true, Ordering::Relaxed);
    }
    (job.done)(vec![Err(why.clone()); job.messages.len()]);
}

/// Publishes on one channel until that, or the session, ends.
async fn serve(
    role: Role,
    front: &Front,
    session: &Session,
    link: &mut watch::Receiver<Link>,
    jobs: &mut mpsc::Receiver<Job>,
) -> Result<(), lapin::Error> {
    let channel = Arc::new(session.publisher(role).await?);
    let mut suspect = session.suspicions();
    let live =
        Live { channel: Arc::clone(&channel), window: Window::default(), suspect: session.suspicions(), role };
    front.state.lock().live = Some(live);
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut gathers = false;
    let why = loop {
        let (mut ended, mut takes_jobs) = (Vec::new(), false);
        suspect.borrow_and_update();
        std::future::poll_fn(|context| {
            front.with_window(|live| {
                live.fill(context, &mut ended);
                takes_jobs = live.is_open() && live.window.takes_jobs();
            });
            Poll::Ready(())
        })
        .await;
        tell(std::mem::take(&mut ended));
        tokio::select! {
            // What others have put in line is seen here for the first time once it wakes the task.
            is_sign = std::future::poll_fn(|context| front.poll_confirms(context, &mut ended)), if !gathers => {
                gathers = front.with_window(|live| live.window.flights.len() > BUSY);
                if is_sign {
                    session.note_sign();
                }
                tell(std::mem::take(&mut ended));
                if !channel.status().connected() && front.with_window(|live| live.window.confirms.is_empty()) {
                    break "it was closed";
                }
            }
            () = front.task.0.notified(), if !gathers => {}
            () = tokio::time::sleep(GATHER), if gathers => gathers = false,
            Ok(()) = suspect.changed() => {}
            job = jobs.recv(), if takes_jobs => match job {
                Some(job) => {
                    front.unqueue();
                    front.with_window(|live| live.window.add(job, &mut ended));
                    tell(ended);
                }
                None => break "the broker was closed",
            },
            _ = ticks.tick() => {
                if !channel.status().connected() {
                    break "it was closed";
                }
                if session.blocked().is_some() {
                    front.with_window(|live| live.window.wait_on());
                } else if front.with_window(|live| live.window.is_stuck()) {
                    log::warn!("RabbitMQ has not confirmed a message within {CONFIRM_TIMEOUT:?}: what is on its way is published again");
                    break "a confirm did not come";
                }
            }
            // The end of a session shows in its channels as well; this says it when nothing is under way.
            _ = link.changed() => break "the session ended",
        }
    };
    // From here on nobody puts anything in line.
    let window = front.state.lock().live.take().map(|live| live.window).unwrap_or_default();
    // Lapin fails what is pending on a dead channel; a stuck one is closed, which does the same.
    if channel.status().connected() && session.is_alive() {
        let _ = tokio::time::timeout(Duration::from_secs(1), channel.close(200, ShortString::from("stuck"))).await;
    }
    if window.give_up(why).await {
        session.set_suspect(true);
    }
    Ok(())
}

impl Front {
    /// Works on the window of the channel that is open.
    fn with_window<T: Default>(&self, work: impl FnOnce(&mut Live) -> T) -> T {
        // Only the task takes it away, and only the task calls this.
        self.state.lock().live.as_mut().map(work).unwrap_or_default()
    }

    /// Ready when confirms came: they are judged. Says whether one of them is a sign of life.
    fn poll_confirms(&self, context: &mut Context<'_>, ended: &mut Vec<Ended>) -> Poll<bool> {
        self.with_window(|live| {
            let Poll::Ready(Some(first)) = live.window.confirms.poll_next_unpin(context) else { return None };
            let is_sign = first.1.is_ok();
            live.window.settle(first, ended);
            Some(is_sign)
        })
        .map_or(Poll::Pending, Poll::Ready)
    }
}

type Confirm = Pin<Box<dyn Future<Output = (u64, Result<Confirmation, lapin::Error>)> + Send>>;

/// What is on its way.
#[derive(Default)]
struct Window {
    confirms: FuturesUnordered<Confirm>,
    flights: HashMap<u64, Flight>,
    bytes: usize,
    next_flight: u64,
    batches: HashMap<u64, Batch>,
    next_batch: u64,
    /// The batch that is being put in line, and what is left of it.
    current: Option<(u64, usize, std::vec::IntoIter<Outgoing>)>,
    /// Returned messages that no confirm was judged by yet.
    returned: HashMap<u64, u32>,
    /// The channel was closed because an exchange is not there.
    is_suspect: bool,
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
    fn takes_jobs(&self) -> bool {
        self.current.is_none() && self.has_room()
    }

    fn has_room(&self) -> bool {
        self.flights.len() < WINDOW_MESSAGES && self.bytes < WINDOW_BYTES
    }

    /// While RabbitMQ takes no messages it confirms none; their time begins when it does.
    fn wait_on(&mut self) {
        self.flights.values_mut().for_each(|flight| flight.since = Instant::now());
    }

    fn is_stuck(&self) -> bool {
        self.flights.values().any(|flight| flight.since.elapsed() > CONFIRM_TIMEOUT)
    }

    fn add(&mut self, job: Job, ended: &mut Vec<Ended>) {
        let count = job.messages.len();
        if count == 0 {
            return ended.push((job.done, Vec::new()));
        }
        let number = self.next_batch;
        self.next_batch += 1;
        let batch = Batch { fates: vec![None; count], left: count, broken: job.broken, done: job.done };
        self.batches.insert(number, batch);
        self.current = Some((number, 0, job.messages.into_iter()));
    }

    /// Puts messages of the current batch in line, as many as there is room for.
    fn fill(&mut self, channel: &Arc<Channel>, context: &mut Context<'_>, ended: &mut Vec<Ended>) {
        while self.has_room() {
            let Some((batch, index, rest)) = &mut self.current else { return };
            let Some(message) = rest.next() else {
                self.current = None;
                return;
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
                Poll::Ready(result) => self.settle(result, ended),
                Poll::Pending => self.confirms.push(confirm),
            }
        }
    }

    /// Judges this confirm and all that are there with it.
    ///
    /// Lapin attaches a returned message to whichever confirm it completes next. It completes them one after the other
    /// on one thread, so when one came without a message, every message that was returned before it has been attached
    /// to a confirm that is complete as well; and those are taken here until there is no more.
    fn settle(&mut self, first: (u64, Result<Confirmation, lapin::Error>), ended: &mut Vec<Ended>) {
        let mut acked = Vec::new();
        let mut next = Some(first);
        while let Some((flight, result)) = next {
            match result {
                Ok(confirmation) => {
                    let fate = if confirmation.is_nack() { Err(Refusal::Refused) } else { Ok(()) };
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
            next = self.confirms.next().now_or_never().flatten();
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
    async fn give_up(mut self, why: &str) -> bool {
        let last = tokio::time::sleep(Duration::from_secs(2));
        tokio::pin!(last);
        let mut ended = Vec::new();
        while !self.confirms.is_empty() {
            tokio::select! {
                Some(confirm) = self.confirms.next() => self.settle(confirm, &mut ended),
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
