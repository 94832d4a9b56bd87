//! What a puller has: a buffer of what can be handed out, and leases on what was.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::super::channel::IntakeChannel;
use super::super::held::Held;
use crate::broker::{Payload, PullMode};
use crate::envelope::SharedMessage;

/// Bytes of leased messages of one client; past it a pull gets no more until some are settled.
const LEASED_BYTES_MAX: usize = 64 << 20;

/// The same once all clients together have leased this much.
const LEASED_BYTES_SHARED: usize = 256 << 20;
const LEASED_BYTES_MAX_THEN: usize = 1 << 20;

/// How long a message is taken to be before the first one was seen, in bytes: long, so that a first batch cannot be
/// too much.
const SIZE_AT_FIRST: usize = 256 << 10;

/// A message that can be handed out.
pub(super) struct Waiting {
    pub(super) held: Held,
    /// The subscription that it came by.
    pub(super) generation: u64,
}

impl Waiting {
    pub(super) fn new(held: Held, generation: u64) -> Self {
        Self { held, generation }
    }

    fn size(&self) -> usize {
        match &self.held.payload {
            Payload::Message(message) => message.size(),
            Payload::Foreign(foreign) => foreign.body.len(),
        }
    }
}

struct Lease {
    waiting: Waiting,
    until: Instant,
    /// It was given back to be taken again, and is expected until then.
    renewed: Option<Instant>,
}

/// One message as it is handed out.
pub(super) struct Taken {
    pub(super) message: SharedMessage,
    pub(super) deliveries: u32,
    /// To be acknowledged, in auto mode.
    pub(super) held: Option<Held>,
    /// Its lease.
    pub(super) lease: Option<u64>,
}

/// See the module.
pub(super) struct Store {
    /// Oldest first.
    buffer: VecDeque<Waiting>,
    leases: HashMap<u64, Lease>,
    leased_bytes: usize,
    deadlines: BTreeSet<(Instant, u64)>,
    average_size: usize,
    /// Present subscription's number, and how many of its deliveries are not settled.
    generation: u64,
    outstanding: usize,
    /// Leased bytes of all clients.
    leased_by_all: Arc<AtomicUsize>,
    /// Leases that wait for their message to come again, by what it is recognised by.
    renewing: HashMap<u64, u64>,
    /// How long a delivery is held, and how often it is looked for one that is held for longer; one that was given back may
    /// take half of that to come again, or its lease is given up at the next look.
    held_for: Duration,
    look_every: Duration,
    next_renewal: Instant,
    /// Channels that something here came on.
    channels: Vec<Arc<IntakeChannel>>,
}

impl Store {
    pub(super) fn new(leased_by_all: Arc<AtomicUsize>, held_for: Duration, look_every: Duration) -> Self {
        Self {
            buffer: VecDeque::new(),
            leases: HashMap::new(),
            leased_bytes: 0,
            deadlines: BTreeSet::new(),
            average_size: SIZE_AT_FIRST,
            generation: 0,
            outstanding: 0,
            leased_by_all,
            renewing: HashMap::new(),
            held_for,
            look_every,
            next_renewal: Instant::now() + look_every,
            channels: Vec::new(),
        }
    }

    /// Messages that can be handed out.
    pub(super) fn waiting(&self) -> usize {
        self.buffer.len()
    }

    /// Messages that can be handed out, or are leased.
    pub(super) fn len(&self) -> usize {
        self.buffer.len() + self.leases.len()
    }

    /// When the oldest of them came into the inbox, in seconds since the epoch.
    pub(super) fn oldest_s(&self) -> Option<u64> {
        let leased = self.leases.values().map(|lease| &lease.waiting);
        self.buffer.iter().chain(leased).map(|waiting| waiting.held.counts.since_s).min()
    }

    /// How long the messages of this inbox are, in bytes: an average of the last ones.
    pub(super) fn average_size(&self) -> usize {
        self.average_size
    }

    /// Deliveries of the present subscription that are not settled.
    pub(super) fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// A new subscription begins; returns its number.
    pub(super) fn begin(&mut self) -> u64 {
        self.generation += 1;
        self.outstanding = 0;
        self.generation
    }

    /// A delivery of the present subscription came.
    pub(super) fn arrive(&mut self, held: Held) {
        self.outstanding += 1;
        let mut waiting = Waiting::new(held, self.generation);
        self.average_size = (self.average_size * 7 + waiting.size()) / 8;
        if !self.channels.iter().any(|channel| Arc::ptr_eq(channel, &waiting.held.channel)) {
            self.channels.push(Arc::clone(&waiting.held.channel));
        }
        let renewed = self.renewing.remove(&waiting.held.key);
        if let Some(lease) = renewed.and_then(|number| self.leases.get_mut(&number)) {
            // A lease waits for it, and goes on.
            waiting.held.before = lease.waiting.held.before;
            lease.waiting = waiting;
            lease.renewed = None;
        } else {
            self.put(waiting);
        }
    }

    /// One delivery is settled.
    fn settled(&mut self, generation: u64) {
        if generation == self.generation {
            self.outstanding = self.outstanding.saturating_sub(1);
        }
    }

    /// Into the buffer where it belongs: RabbitMQ numbers the deliveries of a channel by age.
    fn put(&mut self, waiting: Waiting) {
        let tag = waiting.held.tag;
        let at = self.buffer.iter().rposition(|other| other.held.tag < tag).map_or(0, |before| before + 1);
        self.buffer.insert(at, waiting);
    }

    /// Puts a message back that was handed out.
    pub(super) fn put_back(&mut self, mut waiting: Waiting) {
        if waiting.generation == self.generation {
            self.outstanding += 1;
        }
        waiting.held.before += 1;
        self.put(waiting);
    }

    fn pop(&mut self) -> Option<Waiting> {
        self.buffer.pop_front()
    }

    /// Takes up to `max`, oldest first. `number` gives the next lease's number.
    pub(super) fn take(&mut self, max: usize, mode: PullMode, mut number: impl FnMut() -> u64) -> Vec<Taken> {
        self.drop_dead();
        let mut taken = Vec::new();
        while taken.len() < max {
            if matches!(mode, PullMode::Lease(_)) && !self.may_lease() {
                break;
            }
            let Some(waiting) = self.pop() else { break };
            let Payload::Message(message) = &waiting.held.payload else { continue };
            let (message, deliveries) = (Arc::clone(message), waiting.held.before + 1);
            match mode {
                PullMode::Auto => {
                    self.settled(waiting.generation);
                    taken.push(Taken { message, deliveries, held: Some(waiting.held), lease: None });
                }
                PullMode::Lease(lease) => {
                    let number = number();
                    self.lease(number, waiting, Instant::now() + lease);
                    taken.push(Taken { message, deliveries, held: None, lease: Some(number) });
                }
            }
        }
        taken
    }

    /// Whether the next may be leased, as far as memory goes. One may always.
    fn may_lease(&self) -> bool {
        let all = self.leased_by_all.load(Ordering::Relaxed);
        let most = if all < LEASED_BYTES_SHARED { LEASED_BYTES_MAX } else { LEASED_BYTES_MAX_THEN };
        let next = self.buffer.front().map_or(0, Waiting::size);
        self.leased_bytes == 0 || self.leased_bytes + next <= most
    }

    fn lease(&mut self, number: u64, waiting: Waiting, until: Instant) {
        let size = waiting.size();
        self.leased_bytes += size;
        self.leased_by_all.fetch_add(size, Ordering::Relaxed);
        self.deadlines.insert((until, number));
        self.leases.insert(number, Lease { waiting, until, renewed: None });
    }

    fn remove_lease(&mut self, number: u64) -> Option<Lease> {
        let lease = self.leases.remove(&number)?;
        self.deadlines.remove(&(lease.until, number));
        if lease.renewed.is_some() {
            self.renewing.remove(&lease.waiting.held.key);
        }
        let size = lease.waiting.size();
        self.leased_bytes -= size;
        self.leased_by_all.fetch_sub(size, Ordering::Relaxed);
        Some(lease)
    }

    /// Ends a lease before its time. `None` when there is none, or it has run out.
    pub(super) fn end_lease(&mut self, number: u64) -> Option<Waiting> {
        // One that has just run out goes back into the buffer by itself.
        let lease = self.leases.get(&number).filter(|lease| lease.until > Instant::now())?;
        let is_good = lease.renewed.is_none() && lease.waiting.held.channel.is_alive();
        let waiting = self.remove_lease(number).filter(|_| is_good)?.waiting;
        self.settled(waiting.generation);
        Some(waiting)
    }

    /// Ends every lease; returns what was leased and has not gone back.
    pub(super) fn end_all_leases(&mut self) -> Vec<Held> {
        let numbers: Vec<u64> = self.leases.keys().copied().collect();
        let ended = numbers.into_iter().filter_map(|number| self.remove_lease(number));
        ended.filter(|lease| lease.renewed.is_none()).map(|lease| lease.waiting.held).collect()
    }

    /// Leases that have run out go back into the buffer. Returns whether there were any.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let mut any = false;
        while let Some((until, number)) = self.deadlines.first().copied()
            && until <= now
        {
            let Some(Lease { waiting, renewed, .. }) = self.remove_lease(number) else { continue };
            // One that was given back to be taken again comes by itself.
            if renewed.is_none() && waiting.held.channel.is_alive() {
                any = true;
                self.settled(waiting.generation);
                self.put_back(waiting);
            }
        }
        any
    }

    /// Deliveries that have been unacknowledged for long. Those in the buffer are taken out of it, to be given back;
    /// those that are leased stay leased, and are expected to come again. Returns what is to be given back.
    pub(super) fn renew(&mut self, now: Instant, give_back: &mut impl FnMut(&Held)) {
        if now < self.next_renewal {
            return;
        }
        self.next_renewal = now + self.look_every;
        let held_for = self.held_for;
        let is_old = |waiting: &Waiting| now.duration_since(waiting.held.since) > held_for;
        while self.buffer.front().is_some_and(is_old) {
            let Some(waiting) = self.pop() else { break };
            give_back(&waiting.held);
            self.settled(waiting.generation);
        }
        let mut lost = Vec::new();
        for (number, lease) in &mut self.leases {
            match lease.renewed {
                Some(expected) if expected <= now => lost.push(*number),
                None if is_old(&lease.waiting) => {
                    // In case that somebody else is handed it.
                    lease.waiting.held.before += 1;
                    give_back(&lease.waiting.held);
                    lease.waiting.held.before -= 1;
                    lease.renewed = Some(now + self.look_every / 2);
                    self.renewing.insert(lease.waiting.held.key, *number);
                    if lease.waiting.generation == self.generation {
                        self.outstanding = self.outstanding.saturating_sub(1);
                    }
                }
                Some(_) | None => {}
            }
        }
        for number in lost {
            self.remove_lease(number);
        }
    }

    /// Leases that wait for their message to come again.
    pub(super) fn renewing(&self) -> usize {
        self.renewing.len()
    }

    /// When something here is due, the oldest lease's renewal included.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(until, _)| *until)
    }

    /// Forgets what came on channels that are gone: it comes again, and receipts for it are worth nothing.
    pub(super) fn drop_dead(&mut self) {
        if self.channels.iter().all(|channel| channel.is_alive()) {
            return;
        }
        self.channels.retain(|channel| channel.is_alive());
        self.buffer.retain(|waiting| waiting.held.channel.is_alive());
        let dead = |lease: &Lease| lease.renewed.is_none() && !lease.waiting.held.channel.is_alive();
        let dead: Vec<u64> = self.leases.iter().filter(|(_, lease)| dead(lease)).map(|(number, _)| *number).collect();
        for number in dead {
            self.remove_lease(number);
        }
    }

    /// Takes the oldest of what nobody has taken, as long as `dies` says so.
    pub(super) fn take_while(&mut self, mut dies: impl FnMut(&Held) -> bool) -> Vec<Held> {
        self.drop_dead();
        let mut taken = Vec::new();
        while self.buffer.front().is_some_and(|waiting| dies(&waiting.held)) {
            let Some(waiting) = self.pop() else { break };
            self.settled(waiting.generation);
            taken.push(waiting.held);
        }
        taken
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.leased_by_all.fetch_sub(self.leased_bytes, Ordering::Relaxed);
    }
}
