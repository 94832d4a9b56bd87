//! The pusher's loop: one client's inbox to its endpoint.
//!
//! ```text
//!  inbox ──consume──► waiting ──gates──► under way ──► verdict ──► settled: completed, delayed, dead
//!                                 │
//!                                 └ head of an ordered webhook, Retry-After storm, breaker, rate, connections
//! ```
//!
//! Bounded in every part, by the webhook's `concurrency` and by bytes. A retry waits in the broker ([`Outcome::Delay`]),
//! not here, and keeps its count there. Before a longer wait of the whole endpoint (breaker, storm) the loop gives
//! everything back and stops consuming, so that nothing stays unsettled through it.
//!
//! A probe of the breaker is made with a message that has not failed yet, if there is one near (`probe.rs`).
//!
//! An ordered webhook has one message in hand, the head. While it waits for its retry it stays in hand, because on no
//! broker would it be first again after a delay; its count is noted in the registry's file instead, and from time to
//! time it is given back and taken again, which keeps its place and stays below the broker's acknowledgement timeout.
//!
//! A crash loses nothing: what is unsettled comes back. An attempt under way then is made again, with the same id.

mod ends;
mod job;
mod notes;
mod probe;

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use parking_lot::RwLock;
use tokio::sync::oneshot;

use super::attempts::AttemptLog;
use super::breaker::{Breaker, BreakerState, Gate, Try};
use super::breakers::{Breakers, ShownBreaker};
use super::endpoint::{Endpoint, Sender};
use super::failure::Failure;
use super::hand::{AllHands, Hand, Held};
use super::pacer::Pacer;
use super::throttle::Throttle;
use super::verdict::OffReason;
use crate::broker::{BrokerError, BrokerErrorKind, Consumer, DeadReason, Delivery, Outcome, Payload};
use crate::client::{ClientId, Webhook};
use crate::db::webhooks::{EndpointNotes, WebhookTables};
use crate::db::{Db, DbError};
use crate::envelope::SharedMessage;
use crate::secret::WebhookSecrets;
use crate::telemetry::Telemetry;
use crate::time::Timestamp;

pub(crate) use job::send;
use job::{Finished, Job, Signing};
use probe::Look;

/// A webhook that does nothing but fail, at least once a day, is switched off after this long.
pub const DISABLE_AFTER: Duration = Duration::from_secs(5 * 86_400);
/// A wait of the whole endpoint longer than this is made without anything in hand.
const SHORT_WAIT: Duration = Duration::from_secs(2);
/// How long the head of an ordered webhook is kept in hand before it is given back and taken again. RabbitMQ's
/// acknowledgement timeout is 30 minutes.
const HOLD_MAX: Duration = Duration::from_secs(15 * 60);
/// How long attempts under way may take to end when the pusher is stopped; then they are given up. Below the time after
/// which the registry aborts an actor.
const STOP_GRACE: Duration = Duration::from_secs(4);
/// How often connections that are not used are looked at.
const IDLE_CHECK_EVERY: Duration = Duration::from_secs(15);
/// How soon a connection is asked for again when there was none.
const NO_SLOT_WAIT: Duration = Duration::from_millis(25);
/// Waits before consuming again after the broker failed, from and to.
const REOPEN_WAIT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Seconds' worth of messages that a rate-limited webhook has in hand.
const RATE_IN_HAND_S: u32 = 10;

/// What all pushers share.
#[derive(Clone)]
pub struct Means {
    /// Sends.
    pub sender: Sender,
    /// Remembers attempts, and what must survive a restart.
    pub log: Arc<AttemptLog>,
    /// Shows the breakers.
    pub breakers: Arc<Breakers>,
    /// Counts and traces.
    pub telemetry: Telemetry,
    /// Counts the bytes that all pushers hold.
    pub hands: Arc<AllHands>,
    /// [`DISABLE_AFTER`], or less in tests.
    pub disable_after: Duration,
}

impl Means {
    /// What pushers work with, on the tables in `db`. Attempts are kept for `retention`. Somebody must run the
    /// [log](AttemptLog::run).
    ///
    /// # Errors
    /// When the tables cannot be opened.
    pub async fn open(db: Db, sender: Sender, retention: Duration, telemetry: Telemetry) -> Result<Self, DbError> {
        let log = AttemptLog::new(WebhookTables::open(db).await?, retention);
        let breakers = Breakers::new(telemetry.clone());
        Ok(Self { sender, log, breakers, telemetry, hands: Arc::default(), disable_after: DISABLE_AFTER })
    }
}

/// How a pusher fares, for whoever runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// It consumes, or waits for its endpoint.
    AtWork,
    /// It waits for the broker.
    Waiting,
    /// Its inbox is not there.
    QueueMissing,
}

/// Boxed, because every consumer is opened through it and few are.
pub type Opening = Pin<Box<dyn Future<Output = Result<Consumer, BrokerError>>>>;

/// What a pusher asks of whoever runs it.
pub trait Host {
    /// Consumes the inbox with this prefetch.
    fn open(&self, prefetch: u32) -> Opening;
    /// Hears how it fares.
    fn report(&self, condition: Condition);
}

/// Why the loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It was told to stop.
    Stopped,
    /// The webhook is to be switched off.
    SwitchOff(OffReason),
}

struct Waiting {
    delivery: Delivery,
    message: SharedMessage,
    /// Which consumer it is of: deliveries are settled by consumer.
    consumer: u32,
    /// Attempts made before.
    attempts: u32,
    _held: Held,
}

type UnderWay = Pin<Box<dyn Future<Output = Finished>>>;
type Settling = Pin<Box<dyn Future<Output = Result<(), BrokerError>>>>;

/// See the module. Not `Send`: lives on its actor's thread.
pub struct Push<H> {
    host: H,
    means: Means,
    client: ClientId,
    webhook: Webhook,
    endpoint: Rc<Endpoint>,
    signing: Signing,
    breaker: Breaker,
    look: Look,
    shown: ShownBreaker,
    throttle: Throttle,
    pacer: Pacer,

    // Dropped before their consumer, which takes along what comes back to it.
    waiting: VecDeque<Waiting>,
    under_way: FuturesUnordered<UnderWay>,
    settling: FuturesUnordered<Settling>,
    /// Decided, not settled yet: emptied in each turn.
    outcomes: Vec<(u32, Delivery, Outcome)>,

    consumer: Option<Consumer>,
    opening: Option<Opening>,
    reopen_at: Option<Instant>,
    reopen_failures: u32,
    /// Number of the present consumer.
    consumers: u32,
    prefetch: u32,
    hand: Hand,

    /// The head of an ordered webhook, when it has failed before.
    head: Option<Head>,
    /// Since when the head is in hand.
    held_since: Option<Instant>,
    /// Since when every attempt has failed, and when the last one did.
    failing_since: Option<Timestamp>,
    last_failure: Option<Timestamp>,
    /// What the file says.
    noted: EndpointNotes,
    /// Until when there is no use in asking for a connection.
    no_slot_until: Option<Instant>,
    idle_check_at: Option<Instant>,
    stop_at: Option<Instant>,
    switch_off: Option<OffReason>,
}

struct Head {
    key: String,
    attempts: u32,
    due: Timestamp,
    due_at: Instant,
}

impl<H: Host> Push<H> {
    /// A loop for this client's webhook.
    ///
    /// # Errors
    /// When the URL cannot be used at all, which [`super::validate`] refuses.
    pub fn new(
        host: H,
        means: Means,
        client: ClientId,
        webhook: Webhook,
        secrets: Arc<RwLock<WebhookSecrets>>,
    ) -> Result<Self, Failure> {
        let endpoint = Rc::new(Endpoint::new(&means.sender, &webhook)?);
        Ok(Self {
            shown: means.breakers.show(client.clone()),
            pacer: Pacer::new(webhook.rate_limit_per_s),
            signing: Signing::new(secrets),
            hand: Hand::new(Arc::clone(&means.hands)),
            host,
            means,
            client,
            webhook,
            endpoint,
            breaker: Breaker::default(),
            look: Look::default(),
            throttle: Throttle::default(),
            consumer: None,
            opening: None,
            reopen_at: None,
            reopen_failures: 0,
            consumers: 0,
            prefetch: 0,
            waiting: VecDeque::new(),
            under_way: FuturesUnordered::new(),
            settling: FuturesUnordered::new(),
            outcomes: Vec::new(),
            head: None,
            held_since: None,
            failing_since: None,
            last_failure: None,
            noted: EndpointNotes::default(),
            no_slot_until: None,
            idle_check_at: None,
            stop_at: None,
            switch_off: None,
        })
    }

    /// Runs until it is told to stop (or whoever could tell it is gone), or the webhook is to be switched off.
    /// Dropped, everything in hand goes back.
    pub async fn run(mut self, mut stop: oneshot::Receiver<()>) -> Ending {
        self.load_notes().await;
        loop {
            let now = Instant::now();
            if self.idle_check_at.is_some_and(|at| at <= now) {
                self.check_idle();
            }
            self.arrange_consumer(now);
            self.start_attempts();
            self.save_notes().await;
            if let Some(ending) = self.ending(now) {
                return ending;
            }
            let wake = self.wake_at(now);
            let room = self.room();
            tokio::select! {
                biased;
                Some(finished) = self.under_way.next() => self.finish_all(finished),
                Some(settled) = self.settling.next() => self.note_settled(settled),
                batch = next_batch(&mut self.consumer, room), if self.consumer.is_some() && room > 0 => {
                    self.receive(batch);
                }
                opened = opened(&mut self.opening), if self.opening.is_some() => self.note_opened(opened),
                () = tokio::time::sleep_until(wake.unwrap_or(now).into()), if wake.is_some() => {}
                _ = &mut stop, if self.stop_at.is_none() => {
                    self.stop_at = Some(Instant::now() + STOP_GRACE);
                    self.let_go();
                }
            }
        }
    }

    fn is_ending(&self) -> bool {
        self.stop_at.is_some() || self.switch_off.is_some()
    }

    fn ending(&self, now: Instant) -> Option<Ending> {
        let is_idle = self.under_way.is_empty() && self.settling.is_empty();
        match (self.stop_at, self.switch_off) {
            (_, Some(reason)) if is_idle => Some(Ending::SwitchOff(reason)),
            (Some(at), _) if is_idle || now >= at => Some(Ending::Stopped),
            _ => None,
        }
    }

    // What is in hand.

    fn concurrency(&self) -> usize {
        if self.webhook.ordered { 1 } else { self.webhook.concurrency.max(1) as usize }
    }

    /// Messages that may be in hand: twice what is under way, so that the next are there when one ends, and no more than
    /// fit in memory.
    fn prefetch_wanted(&self) -> u32 {
        if self.is_looking() {
            let under_way = u32::try_from(self.under_way.len()).unwrap_or(u32::MAX);
            return self.hand.fitting(under_way.saturating_add(1 + probe::LOOK_AT_ONCE));
        }
        if self.webhook.ordered || self.breaker.state() != BreakerState::Closed || self.throttle.is_on() {
            return 1;
        }
        let twice = self.webhook.concurrency.max(1).saturating_mul(2);
        let rate = self.webhook.rate_limit_per_s.map_or(u32::MAX, |rate| rate.saturating_mul(RATE_IN_HAND_S).max(1));
        self.hand.fitting(twice.min(rate))
    }

    fn room(&self) -> usize {
        if self.is_ending() || self.hand.is_full() {
            return 0;
        }
        (self.prefetch as usize).saturating_sub(self.waiting.len() + self.under_way.len())
    }

    /// Gives everything back that is not under way, and stops consuming.
    fn let_go(&mut self) {
        self.waiting.clear();
        self.held_since = None;
        self.consumer = None;
        self.opening = None;
    }

    fn gate(&self, now: Instant) -> Gate {
        let head_due = self.head.as_ref().filter(|_| self.webhook.ordered).map(|head| head.due_at);
        let head_gate = head_due.filter(|due| *due > now).map_or(Gate::Open, Gate::Until);
        let pacer_gate = self.pacer.blocked_until(now).map_or(Gate::Open, Gate::Until);
        let slot_gate = self.no_slot_until.filter(|until| *until > now).map_or(Gate::Open, Gate::Until);
        let throttle_gate = self.throttle.gate(now, self.under_way.len());
        let gates = [head_gate, throttle_gate, self.breaker.gate(now), pacer_gate, slot_gate];
        gates.into_iter().reduce(Gate::stricter).unwrap_or(Gate::Open)
    }

    /// Sees to it that there is a consumer with the right prefetch when one is of use.
    fn arrange_consumer(&mut self, now: Instant) {
        if self.is_ending() {
            return;
        }
        if let (Gate::Until(until), false) = (self.gate(now), self.webhook.ordered)
            && until - now > SHORT_WAIT
        {
            self.let_go();
            return;
        }
        if let Some(since) = self.held_since
            && now - since >= HOLD_MAX
            && self.under_way.is_empty()
        {
            self.waiting.clear();
            self.held_since = None;
        }
        let wanted = self.prefetch_wanted();
        match &self.consumer {
            // What a broker has handed over in advance lies in this process. Told to hand out less it may keep that; a
            // new consumer has no more than it asks for.
            Some(_) if self.hand.fitting(self.prefetch) <= self.prefetch / 4 => {
                self.consumer = None;
                self.prefetch = wanted;
                self.opening = Some(self.host.open(wanted));
            }
            Some(consumer) if wanted != self.prefetch => {
                consumer.set_prefetch(wanted);
                self.prefetch = wanted;
            }
            Some(_) => {}
            None if self.opening.is_none() && self.reopen_at.is_none_or(|at| at <= now) => {
                self.prefetch = wanted;
                self.opening = Some(self.host.open(wanted));
            }
            None => {}
        }
    }

    /// When the loop must look again by itself. `now` is when it last did: what opened since then was not seen.
    fn wake_at(&self, now: Instant) -> Option<Instant> {
        let gate = match self.gate(now).stricter(self.look_gate(now)) {
            _ if self.is_ending() => None,
            // Then it consumes again.
            Gate::Until(until) if until - now > SHORT_WAIT && !self.webhook.ordered => Some(until - SHORT_WAIT),
            Gate::Until(until) => Some(until),
            Gate::Open | Gate::OneAtATime => None,
        };
        let reopen = self.reopen_at.filter(|at| *at > now && self.consumer.is_none() && self.opening.is_none());
        let hold = self.held_since.map(|since| since + HOLD_MAX);
        [gate, reopen, hold, self.idle_check_at, self.stop_at].into_iter().flatten().min()
    }

    // Consuming.

    fn note_opened(&mut self, opened: Result<Consumer, BrokerError>) {
        self.opening = None;
        match opened {
            Ok(consumer) => {
                self.consumer = Some(consumer);
                self.consumers = self.consumers.wrapping_add(1);
                self.reopen_failures = 0;
                self.reopen_at = None;
                self.host.report(Condition::AtWork);
            }
            Err(error) => {
                let missing = error.kind == BrokerErrorKind::NotFound;
                self.log_broker("consume its inbox", &error);
                self.reopen_later(if missing { Condition::QueueMissing } else { Condition::Waiting });
            }
        }
    }

    fn reopen_later(&mut self, condition: Condition) {
        self.let_go();
        self.host.report(condition);
        let (from, to) = REOPEN_WAIT;
        let wait = from.saturating_mul(1 << self.reopen_failures.min(10)).min(to).mul_f64(0.75 + 0.5 * roll());
        self.reopen_failures = self.reopen_failures.saturating_add(1);
        self.reopen_at = Some(Instant::now() + wait);
    }

    /// Once for each trouble; and quietly when it is one that the broker itself reports.
    fn log_broker(&self, what: &str, error: &BrokerError) {
        let known = matches!(error.kind, BrokerErrorKind::Unavailable | BrokerErrorKind::Closed);
        let level = if known || self.reopen_failures > 0 { log::Level::Debug } else { log::Level::Warn };
        log::log!(level, "pusher of {} cannot {what}: {error}; it tries again", self.client);
    }

    fn receive(&mut self, batch: Option<Vec<Delivery>>) {
        let Some(batch) = batch else {
            // The inbox was deleted, or the broker closed.
            self.reopen_later(Condition::Waiting);
            return;
        };
        for delivery in batch {
            let Payload::Message(message) = &delivery.payload else {
                // Put there past the backbone: no envelope, so nothing to deliver.
                let outcome = Outcome::Dead { reason: DeadReason::InvalidMessage, attempts: 0 };
                self.outcomes.push((self.consumers, delivery, outcome));
                continue;
            };
            let message = Arc::clone(message);
            let attempts = self.attempts_before(&delivery, &message);
            self.held_since = self.webhook.ordered.then(Instant::now);
            let held = self.hand.take(message.envelope.len());
            self.waiting.push_back(Waiting { delivery, message, consumer: self.consumers, attempts, _held: held });
        }
        self.look_on();
        self.look_past_failed();
        self.settle_outcomes();
    }

    /// Attempts that were made of a message, by the broker's count or by the note of an ordered webhook's head.
    fn attempts_before(&mut self, delivery: &Delivery, message: &SharedMessage) -> u32 {
        let Some(head) = &self.head else { return delivery.attempts };
        let is_head = head.key == key_of(message);
        let attempts = if is_head { head.attempts.max(delivery.attempts) } else { delivery.attempts };
        if is_head != self.webhook.ordered {
            // The head before was taken away (it expired, or somebody pulled it); or the webhook is ordered no longer,
            // and the broker counts from here on.
            self.head = None;
        }
        attempts
    }

    // Attempts.

    fn start_attempts(&mut self) {
        while !self.waiting.is_empty() && self.under_way.len() < self.concurrency() && !self.is_ending() {
            let now = Instant::now();
            if self.gate(now).stricter(self.look_gate(now)) != Gate::Open {
                return;
            }
            let Some(slot) = self.endpoint.slot() else {
                self.no_slot_until = Some(now + NO_SLOT_WAIT);
                return;
            };
            let Some(waiting) = self.take_next() else { return };
            self.held_since = None;
            self.pacer.count(now);
            let ticket = self.breaker.begin(if waiting.attempts == 0 { Try::First } else { Try::Again });
            self.shown.set(self.breaker.state());
            let began = Timestamp::now();
            let job = Job {
                endpoint: Rc::clone(&self.endpoint),
                signer: self.signing.signer(began),
                log: Arc::clone(&self.means.log),
                slot,
                ticket,
                began,
                waiting,
            };
            self.under_way.push(Box::pin(job.run()));
        }
    }
}

async fn next_batch(consumer: &mut Option<Consumer>, room: usize) -> Option<Vec<Delivery>> {
    match consumer {
        Some(consumer) => consumer.next(room).await,
        None => std::future::pending().await,
    }
}

async fn opened(opening: &mut Option<Opening>) -> Result<Consumer, BrokerError> {
    match opening {
        Some(opening) => opening.await,
        None => std::future::pending().await,
    }
}

fn key_of(message: &SharedMessage) -> String {
    format!("{}:{}", message.sender, message.id)
}

fn roll() -> f64 {
    rand::random()
}
