//! The ways of the most recent messages, in memory (`GET /messages/{id}`). Bounded by `SOAR_TRACE_MESSAGES`.
//!
//! A pipeline reports each step of a message here, once; from the same report come the latency histograms, the rates
//! by client and the live tail. Each report costs a hash, a short lock and no allocation beyond the first steps of a
//! message, so that it can be left on.
//!
//! # Bounds
//! Messages are kept in shards by their id, each a ring that overwrites its oldest. Of one message
//! [`ROUTED_KEPT`] inboxes and [`HOPS_KEPT`] hops are kept; the rest is counted, so that a broadcast to 10,000 inboxes
//! costs no more memory than one to a few. A report for a message that is not (or no longer) remembered starts its
//! trace anew: after a restart the way is shown from there.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, BuildHasherDefault, Hasher};
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use crate::broker::DeadReason;
use crate::client::ClientId;
use crate::envelope::{Message, MessageId};
use crate::telemetry::metrics::StepMetrics;
use crate::telemetry::rates::ClientRates;
use crate::telemetry::tail::Tail;
use crate::time::Timestamp;
use crate::topic::{Pattern, Topic};

/// Inboxes of one message that are kept by name; further ones are counted.
pub const ROUTED_KEPT: usize = 32;

/// Hops of one message that are kept after its publishing, [`ROUTED_KEPT`] included.
pub const HOPS_KEPT: usize = 96;

/// Messages that make a shard worth having: below it fewer shards keep "the most recent" exact.
const MESSAGES_PER_SHARD_MIN: usize = 256;

/// Shards at most, a power of two.
const SHARDS_MAX: usize = 64;

/// Hops for which a recycled trace keeps its memory.
const HOPS_RECYCLED: usize = 8;

/// A step on a message's way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Durable in the sender's outbox or notify queue.
    Accepted,
    /// In `soar-publish`.
    Forwarded,
    /// Given to its exchange.
    Published,
    /// In an inbox, because of a pattern (`None` for a broadcast).
    Routed(ClientId, Option<Pattern>),
    /// No pattern matched.
    Unrouted,
    /// A webhook attempt failed; it will be tried again.
    AttemptFailed(ClientId),
    /// Settled by the receiver.
    Delivered(ClientId),
    /// Became a dead letter of this client.
    Dead(ClientId, DeadReason),
}

impl Step {
    /// How far along the way it is: no step of a stage follows one of a later stage.
    const fn stage(&self) -> u8 {
        match self {
            Self::Accepted => 0,
            Self::Forwarded => 1,
            Self::Published => 2,
            Self::Routed(..) | Self::Unrouted => 3,
            Self::AttemptFailed(_) | Self::Delivered(_) | Self::Dead(..) => 4,
        }
    }

    /// Its name in the API.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Forwarded => "forwarded",
            Self::Published => "published",
            Self::Routed(..) => "routed",
            Self::Unrouted => "unrouted",
            Self::AttemptFailed(_) => "attempt_failed",
            Self::Delivered(_) => "delivered",
            Self::Dead(..) => "dead",
        }
    }
}

/// A step and its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    /// When.
    pub at: Timestamp,
    /// What.
    pub step: Step,
}

/// Where a message is, as far as its hops say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TraceState {
    /// In the sender's outbox or notify queue.
    Accepted,
    /// In `soar-publish`.
    Forwarded,
    /// Given to its exchange; some inbox still holds it.
    Published,
    /// Settled by every receiver.
    Delivered,
    /// No pattern matched.
    Unrouted,
    /// A dead letter of at least one client.
    Dead,
}

impl TraceState {
    /// Its name in the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Forwarded => "forwarded",
            Self::Published => "published",
            Self::Delivered => "delivered",
            Self::Unrouted => "unrouted",
            Self::Dead => "dead",
        }
    }
}

/// The way of one message.
#[derive(Debug, Clone)]
pub struct Trace {
    /// The message's id.
    pub id: MessageId,
    /// Who sent it.
    pub sender: ClientId,
    /// Its topic; `None` for a broadcast.
    pub topic: Option<Topic>,
    /// Where it is.
    pub state: TraceState,
    /// Its steps, in order of time.
    pub hops: Vec<Hop>,
    /// Steps that were counted, not kept.
    pub hops_left_out: u64,
    /// Copies put into inboxes.
    pub routed: u64,
    /// Copies settled by their receivers.
    pub delivered: u64,
    /// Copies that became dead letters.
    pub dead: u64,
}

/// The ways of recent messages.
#[derive(Debug)]
pub struct Traces {
    capacity: usize,
    shards: Box<[Mutex<Shard>]>,
    hasher: RandomState,
    metrics: StepMetrics,
    rates: Arc<ClientRates>,
    tail: Arc<Tail>,
}

/// A ring of traces and where to find them.
#[derive(Debug, Default)]
struct Shard {
    /// Grows to `capacity`, then its oldest is overwritten.
    ring: Vec<Entry>,
    capacity: usize,
    /// The oldest, once the ring is full.
    next: usize,
    by_key: HashMap<u64, u32, BuildHasherDefault<KeyIsHash>>,
}

/// A trace as it is kept.
#[derive(Debug)]
struct Entry {
    key: u64,
    id: KeptId,
    sender: ClientId,
    topic: Option<Topic>,
    accepted: Timestamp,
    forwarded: Option<Timestamp>,
    published: Option<Timestamp>,
    hops: Vec<Hop>,
    left_out: u32,
    routed: u32,
    delivered: u32,
    dead: u32,
}

/// An id without a heap allocation, where it is the backbone's own kind.
#[derive(Debug, PartialEq, Eq)]
enum KeptId {
    Uuid(Uuid),
    Own(MessageId),
}

impl KeptId {
    fn of(message: &Message) -> Self {
        if !message.own_id
            && let Ok(uuid) = Uuid::try_parse_ascii(message.id.as_str().as_bytes())
        {
            return Self::Uuid(uuid);
        }
        Self::Own(message.id.clone())
    }

    fn is(&self, id: &MessageId) -> bool {
        match self {
            Self::Uuid(uuid) => uuid.hyphenated().encode_lower(&mut Uuid::encode_buffer()) == id.as_str(),
            Self::Own(own) => own == id,
        }
    }

    fn to_id(&self) -> MessageId {
        match self {
            Self::Uuid(uuid) => MessageId::parse(uuid.hyphenated().encode_lower(&mut Uuid::encode_buffer()))
                .expect("a UUID is visible ASCII"),
            Self::Own(own) => own.clone(),
        }
    }
}

/// The keys are hashes already, made with a random key.
#[derive(Debug, Default)]
struct KeyIsHash(u64);

impl Hasher for KeyIsHash {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only u64 keys are hashed");
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }
}

impl Traces {
    pub(super) fn new(capacity: usize, metrics: StepMetrics, rates: Arc<ClientRates>, tail: Arc<Tail>) -> Self {
        let count = (capacity / MESSAGES_PER_SHARD_MIN).clamp(1, SHARDS_MAX);
        // A power of two, so that a hash is masked; rounded down, so that small shards stay big enough.
        let count = if count.is_power_of_two() { count } else { count.next_power_of_two() / 2 };
        let per_shard = capacity.div_ceil(count).min(u32::MAX as usize);
        let shards = (0..count).map(|_| Mutex::new(Shard { capacity: per_shard, ..Shard::default() })).collect();
        Self { capacity, shards, hasher: RandomState::new(), metrics, rates, tail }
    }

    /// Whether ways are kept or watched now: lets callers skip what is made for them alone, such as the pattern of a
    /// [`Step::Routed`]. The other steps are reported always: latencies and rates come from them.
    pub fn is_on(&self) -> bool {
        self.capacity > 0 || self.tail.is_on()
    }

    /// Notes that `message` made a step now.
    pub fn record(&self, message: &Message, step: Step) {
        self.record_at(Timestamp::now(), message, step);
    }

    /// Notes a step of each of several messages, all now. One reading of the clock for all.
    pub fn record_many<'a>(&self, steps: impl IntoIterator<Item = (&'a Message, Step)>) {
        let now = Timestamp::now();
        for (message, step) in steps {
            self.record_at(now, message, step);
        }
    }

    /// Notes that `message` was put into `inboxes` inboxes now. `first` names them and why; no more than
    /// [`ROUTED_KEPT`] of it are asked for.
    pub fn record_routed(
        &self,
        message: &Message,
        inboxes: usize,
        first: impl IntoIterator<Item = (ClientId, Option<Pattern>)>,
    ) {
        if message.topic.is_none() {
            self.metrics.broadcasts_routed.inc_by(inboxes as u64);
        }
        log_traced(message, "routed");
        if self.capacity == 0 {
            return;
        }
        let now = Timestamp::now();
        self.with_entry(message, |entry| {
            let before = entry.routed;
            entry.routed = before.saturating_add(u32::try_from(inboxes).unwrap_or(u32::MAX));
            let room = ROUTED_KEPT.saturating_sub(before as usize).min(HOPS_KEPT - entry.hops.len().min(HOPS_KEPT));
            let mut kept = 0_u32;
            for (inbox, pattern) in first.into_iter().take(room.min(inboxes)) {
                entry.hops.push(Hop { at: now, step: Step::Routed(inbox, pattern) });
                kept += 1;
            }
            entry.left_out += entry.routed - before - kept;
        });
    }

    fn record_at(&self, now: Timestamp, message: &Message, step: Step) {
        self.feed_others(now, message, &step);
        log_traced(message, step.name());
        if self.capacity > 0 {
            self.with_entry(message, |entry| entry.note(now, step));
        }
    }

    fn feed_others(&self, now: Timestamp, message: &Message, step: &Step) {
        let age_s = || (now.as_millis() - message.sent_at.as_millis()).max(0) as f64 / 1000.0;
        match step {
            Step::Accepted => {
                self.rates.note_sent(&message.sender, 1);
                if message.topic.is_none() {
                    self.metrics.broadcasts_accepted.inc();
                }
            }
            Step::Forwarded => self.metrics.forwarded.observe(age_s()),
            Step::Published => {
                let hop = if message.topic.is_some() { &self.metrics.published } else { &self.metrics.broadcast };
                hop.observe(age_s());
                self.tail.offer(message, now);
            }
            Step::Delivered(client) => {
                self.metrics.delivered.observe(age_s());
                self.rates.note_received(client, 1);
            }
            Step::Routed(..) | Step::Unrouted | Step::AttemptFailed(_) | Step::Dead(..) => {}
        }
    }

    fn with_entry(&self, message: &Message, change: impl FnOnce(&mut Entry)) {
        let hash = self.hasher.hash_one(message.id.as_str());
        let key = key(hash, &message.sender);
        let mut shard = self.shards[hash as usize & (self.shards.len() - 1)].lock();
        change(shard.entry(key, message));
    }

    /// The way of the message with this id that `sender` sent.
    pub fn find_of(&self, sender: &ClientId, id: &MessageId) -> Option<Trace> {
        let hash = self.hasher.hash_one(id.as_str());
        let shard = self.shards[hash as usize & (self.shards.len() - 1)].lock();
        let slot = *shard.by_key.get(&key(hash, sender))?;
        let entry = &shard.ring[slot as usize];
        (entry.sender == *sender && entry.id.is(id)).then(|| entry.to_trace())
    }

    /// The ways of all messages with this id, newest first: a sender's own id may be another's too. Looks through one
    /// shard, a 64th of what is kept when much is.
    pub fn find(&self, id: &MessageId) -> Vec<Trace> {
        let hash = self.hasher.hash_one(id.as_str());
        let shard = self.shards[hash as usize & (self.shards.len() - 1)].lock();
        let mut found: Vec<Trace> = shard.ring.iter().filter(|e| e.id.is(id)).map(Entry::to_trace).collect();
        drop(shard);
        found.sort_by_key(|trace| std::cmp::Reverse(trace.hops.first().map(|hop| hop.at)));
        found
    }
}

/// What belongs to somebody's trace is logged step by step, under a target of its own (`RUST_LOG=backbone::trace=debug`).
fn log_traced(message: &Message, step: &str) {
    if let Some(traceparent) = &message.traceparent {
        log::debug!(target: "backbone::trace", "message {} of {} {step}, traceparent {traceparent}", message.id, message.sender);
    }
}

/// The key of a message: its id's hash, which is random to whoever chooses ids, and its sender, whom only an operator
/// can choose and who therefore needs no such care.
fn key(id_hash: u64, sender: &ClientId) -> u64 {
    let mut key = id_hash;
    for chunk in sender.as_str().as_bytes().chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        key = (key ^ u64::from_le_bytes(word)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
    }
    key
}

impl Shard {
    /// The entry of a message: its own, or a fresh one in place of the oldest.
    fn entry(&mut self, key: u64, message: &Message) -> &mut Entry {
        if let Some(&slot) = self.by_key.get(&key) {
            return &mut self.ring[slot as usize];
        }
        let slot = if self.ring.len() < self.capacity {
            self.ring.push(Entry::new(key, message, Vec::new()));
            self.ring.len() - 1
        } else {
            let slot = self.next;
            self.next = (slot + 1) % self.capacity;
            let old = &mut self.ring[slot];
            self.by_key.remove(&old.key);
            let mut hops = std::mem::take(&mut old.hops);
            hops.clear();
            if hops.capacity() > HOPS_RECYCLED {
                hops = Vec::new();
            }
            *old = Entry::new(key, message, hops);
            slot
        };
        self.by_key.insert(key, u32::try_from(slot).expect("the capacity of a shard fits"));
        &mut self.ring[slot]
    }
}

impl Entry {
    fn new(key: u64, message: &Message, hops: Vec<Hop>) -> Self {
        Self {
            key,
            id: KeptId::of(message),
            sender: message.sender.clone(),
            topic: message.topic.clone(),
            accepted: message.sent_at,
            forwarded: None,
            published: None,
            hops,
            left_out: 0,
            routed: 0,
            delivered: 0,
            dead: 0,
        }
    }

    fn note(&mut self, now: Timestamp, step: Step) {
        let keep = match &step {
            // Durable now; accepted, as the envelope says it, when it came.
            Step::Accepted => return,
            // A hop that was made again after a crash keeps the time of its first.
            Step::Forwarded => {
                self.forwarded.get_or_insert(now);
                return;
            }
            Step::Published => {
                self.published.get_or_insert(now);
                return;
            }
            Step::Routed(..) => {
                self.routed += 1;
                self.routed as usize <= ROUTED_KEPT
            }
            Step::Delivered(_) => {
                self.delivered += 1;
                true
            }
            Step::Dead(..) => {
                self.dead += 1;
                true
            }
            Step::Unrouted | Step::AttemptFailed(_) => true,
        };
        if keep && self.hops.len() < HOPS_KEPT {
            if self.hops.capacity() == 0 {
                // One inbox and its end: most messages need no more.
                self.hops.reserve_exact(2);
            }
            self.hops.push(Hop { at: now, step });
        } else {
            self.left_out += 1;
        }
    }

    fn to_trace(&self) -> Trace {
        let steps = [
            (Some(self.accepted), Step::Accepted),
            (self.forwarded, Step::Forwarded),
            (self.published, Step::Published),
        ];
        let mut hops: Vec<Hop> = Vec::with_capacity(self.hops.len() + 3);
        hops.extend(steps.into_iter().filter_map(|(at, step)| Some(Hop { at: at?, step })));
        hops.extend(self.hops.iter().cloned());
        // In the order of the way, then of time: threads report at once, and the clock is read when they do.
        hops.sort_by_key(|hop| (hop.step.stage(), hop.at));
        let mut next = Timestamp::from_millis(i64::MAX);
        for hop in hops.iter_mut().rev() {
            hop.at = hop.at.min(next);
            next = hop.at;
        }
        Trace {
            id: self.id.to_id(),
            sender: self.sender.clone(),
            topic: self.topic.clone(),
            state: self.state(),
            hops,
            hops_left_out: self.left_out.into(),
            routed: self.routed.into(),
            delivered: self.delivered.into(),
            dead: self.dead.into(),
        }
    }

    fn state(&self) -> TraceState {
        // What became of each kept copy last: a dead letter that was replayed and then delivered is delivered.
        let mut ends: HashMap<&ClientId, bool> = HashMap::new();
        for hop in &self.hops {
            match &hop.step {
                Step::Delivered(inbox) => drop(ends.insert(inbox, true)),
                Step::Dead(inbox, _) => drop(ends.insert(inbox, false)),
                _ => {}
            }
        }
        let delivered = ends.values().filter(|delivered| **delivered).count();
        let kept_all = self.left_out == 0;
        if ends.len() > delivered || (!kept_all && self.dead > 0 && ends.is_empty()) {
            TraceState::Dead
        } else if kept_all && delivered > 0 && delivered >= self.routed as usize
            || !kept_all && self.routed > 0 && self.delivered >= self.routed
        {
            TraceState::Delivered
        } else if self.hops.iter().any(|hop| hop.step == Step::Unrouted) {
            TraceState::Unrouted
        } else if self.published.is_some() || self.routed > 0 {
            TraceState::Published
        } else if self.forwarded.is_some() {
            TraceState::Forwarded
        } else {
            TraceState::Accepted
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::envelope::Draft;

    pub(in crate::telemetry) fn message(sender: &str, topic: Option<&str>) -> Message {
        with_id(sender, None, topic)
    }

    fn with_id(sender: &str, id: Option<&str>, topic: Option<&str>) -> Message {
        let draft = Draft {
            id: id.map(|id| MessageId::parse(id).expect("an id")),
            topic: topic.map(|topic| Topic::parse(topic).expect("a topic")),
            message: serde_json::value::RawValue::NULL,
            traceparent: None,
        };
        Message::accept(&client(sender), draft, Timestamp::now())
    }

    fn client(id: &str) -> ClientId {
        ClientId::parse(id).expect("a client id")
    }

    fn routed(inbox: &str) -> Step {
        Step::Routed(client(inbox), Some(Pattern::parse("a.#").expect("a pattern")))
    }

    fn state(telemetry: &crate::telemetry::TelemetryParts, message: &Message) -> &'static str {
        telemetry.traces.find_of(&message.sender, &message.id).expect("it is remembered").state.as_str()
    }

    #[test]
    fn a_message_is_followed_from_acceptance_to_its_end() {
        let telemetry = crate::telemetry::new(1000);
        let traces = &telemetry.traces;
        let m = message("x", Some("a.b"));
        let mut states = Vec::new();
        for step in [
            Step::Accepted,
            Step::Forwarded,
            Step::Published,
            routed("p"),
            routed("q"),
            Step::Delivered(client("p")),
            Step::AttemptFailed(client("q")),
            Step::Dead(client("q"), DeadReason::DeliveryFailed),
            Step::Delivered(client("q")),
        ] {
            traces.record(&m, step);
            states.push(state(&telemetry, &m));
        }
        let published = "published";
        assert_eq!(
            states,
            ["accepted", "forwarded", published, published, published, published, published, "dead", "delivered"]
        );
        let found = traces.find(&m.id);
        assert_eq!(found.len(), 1);
        let names: Vec<&str> = found[0].hops.iter().map(|hop| hop.step.name()).collect();
        assert_eq!(
            names,
            [
                "accepted",
                "forwarded",
                "published",
                "routed",
                "routed",
                "delivered",
                "attempt_failed",
                "dead",
                "delivered"
            ]
        );
        assert_eq!(telemetry.rates.totals("x").sent, 1);
        assert_eq!(telemetry.rates.totals("q").received, 1);
        assert_eq!(telemetry.metrics.steps().delivered.get_sample_count(), 2);
    }

    #[test]
    fn the_same_own_id_of_two_senders_is_two_ways() {
        let telemetry = crate::telemetry::new(1000);
        let (a, b) = (with_id("a", Some("1"), None), with_id("b", Some("1"), None));
        telemetry.traces.record_many([(&a, Step::Accepted), (&b, Step::Accepted), (&b, Step::Forwarded)]);
        assert_eq!(telemetry.traces.find(&a.id).len(), 2);
        assert_eq!(state(&telemetry, &a), "accepted");
        assert_eq!(state(&telemetry, &b), "forwarded");
        assert!(telemetry.traces.find_of(&client("c"), &a.id).is_none());
    }

    #[test]
    fn the_oldest_are_forgotten_first() {
        let telemetry = crate::telemetry::new(10);
        let messages: Vec<Message> = (0..25).map(|_| message("x", None)).collect();
        for m in &messages {
            telemetry.traces.record(m, Step::Accepted);
        }
        let kept: Vec<bool> = messages.iter().map(|m| !telemetry.traces.find(&m.id).is_empty()).collect();
        assert_eq!(kept, (0..25).map(|n| n >= 15).collect::<Vec<_>>());
    }

    #[test]
    fn shards_together_keep_what_was_asked_for() {
        let telemetry = crate::telemetry::new(100_000);
        assert_eq!(telemetry.traces.shards.len(), SHARDS_MAX);
        for _ in 0..200_000 {
            telemetry.traces.record(&message("x", None), Step::Accepted);
        }
        let kept: usize = telemetry.traces.shards.iter().map(|shard| shard.lock().ring.len()).sum();
        let indexed: usize = telemetry.traces.shards.iter().map(|shard| shard.lock().by_key.len()).sum();
        assert!((100_000..=100_064).contains(&kept), "{kept}");
        assert_eq!(kept, indexed);
    }

    #[test]
    fn a_broadcast_to_very_many_is_bounded_and_still_counted() {
        let telemetry = crate::telemetry::new(10);
        let m = message("x", None);
        let inboxes: Vec<ClientId> = (0..10_000).map(|n| client(&format!("c{n}"))).collect();
        telemetry.traces.record_many([(&m, Step::Accepted), (&m, Step::Published)]);
        telemetry.traces.record_routed(&m, inboxes.len(), inboxes.iter().map(|inbox| (inbox.clone(), None)));
        for inbox in &inboxes[..9_999] {
            telemetry.traces.record(&m, Step::Delivered(inbox.clone()));
        }
        let trace = telemetry.traces.find_of(&m.sender, &m.id).expect("remembered");
        assert_eq!((trace.routed, trace.delivered, trace.hops.len()), (10_000, 9_999, HOPS_KEPT + 2));
        assert_eq!(trace.hops_left_out, 19_999 - HOPS_KEPT as u64);
        assert_eq!(trace.state, TraceState::Published);
        telemetry.traces.record(&m, Step::Delivered(inboxes[9_999].clone()));
        assert_eq!(state(&telemetry, &m), "delivered");
    }

    #[test]
    fn switched_off_only_the_ways_are_not_kept() {
        let telemetry = crate::telemetry::new(0);
        let m = message("x", Some("a"));
        assert!(!telemetry.traces.is_on());
        let watch = telemetry.tail.watch(&Pattern::parse("#").expect("a pattern"));
        assert!(telemetry.traces.is_on());
        telemetry.traces.record_many([(&m, Step::Accepted), (&m, Step::Published)]);
        assert!(watch.expect("room").try_next().is_some());
        assert!(telemetry.traces.find(&m.id).is_empty());
        assert_eq!(telemetry.metrics.steps().published.get_sample_count(), 1);
    }
}
