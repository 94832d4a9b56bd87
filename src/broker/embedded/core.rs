//! The broker's state in memory, under one lock, and the operations on it.
//!
//! Every operation changes the queues and notes in the open window what that means for the disk, in one critical
//! section; so the windows, written in order, always describe a state that the memory was in. Nothing here waits or
//! does I/O.

use std::collections::{BTreeSet, BinaryHeap, HashMap};
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use super::dedup::Dedup;
use super::queue::{Body, BodyRef, Holder, InFlight, Lease, QueueState, SLOTS_MAX, Slot};
use super::window::{BodyFate, DeadInsert, Delete, Insert, Update, Waiter, Window};
use crate::broker::{DeadReason, Depths, Origin, Payload, Queue, Target};
use crate::client::ClientId;
use crate::envelope::SharedMessage;
use crate::telemetry::traces::ROUTED_KEPT;
use crate::telemetry::{Step, Telemetry};
use crate::time::Timestamp;
use crate::topic::{Pattern, Trie};

/// Memory for messages of all queues together, in bytes; past it, queues that nobody reads keep theirs on disk only.
pub(super) const HOT_BYTES_TOTAL: usize = if cfg!(test) { 64 << 10 } else { 64 << 20 };

/// Rows in one window past which pipelines wait for the next: bounds memory and the length of a commit.
const WINDOW_ROWS_MAX: usize = if cfg!(test) { 60 } else { 100_000 };

/// Messages kept in `soar-unrouted`; past it the oldest go.
pub(super) const UNROUTED_MAX: u64 = if cfg!(test) { 10 } else { 10_000 };

/// Rows that are worth a statement of their own to delete them by range.
const RANGE_MIN: usize = 4;

/// The client's queues, by their numbers.
#[derive(Debug, Clone, Copy)]
pub(super) struct ClientQueues {
    pub(super) outbox: u32,
    pub(super) notify: u32,
    pub(super) inbox: u32,
}

/// A queue that wants a page read, and from where.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Load {
    pub(super) queue: u32,
    /// Bodies that are missing in the front slots.
    pub(super) bodies: Vec<u64>,
    /// Read the page behind this position.
    pub(super) page_after: Option<u64>,
}

/// What happened to a message, to be reported to the telemetry.
#[derive(Debug)]
pub(super) enum Report {
    Step(SharedMessage, Step),
    /// Into how many inboxes, and the first of them with the pattern that matched.
    Routed(SharedMessage, usize, Vec<(ClientId, Option<Pattern>)>),
}

/// Things to do once the lock is released.
#[derive(Debug, Default)]
pub(super) struct After {
    pub(super) reports: Vec<Report>,
    pub(super) wakers: Vec<Waker>,
    pub(super) loads: Vec<Load>,
    /// The open window has something to write, and nobody was told.
    pub(super) nudge: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) queues: HashMap<u32, QueueState>,
    pub(super) by_name: HashMap<Queue, u32>,
    pub(super) publish: u32,
    pub(super) unrouted: u32,
    inboxes: BTreeSet<u32>,
    trie: Trie<u32>,
    route: u64,
    next_number: u64,
    next_holder: u64,
    pub(super) open: Window,
    /// The window that is being written, 0 when none is.
    pub(super) flushing: u64,
    /// Inboxes to wake when the flushing window is durable.
    pub(super) flushing_wake: Vec<u32>,
    pub(super) durable: u64,
    /// The last window failed: pipelines move nothing on until what is left of it is durable.
    is_failing: bool,
    /// Queues that may have to be read from disk; see [`Core::want_load`].
    wanting: Vec<u32>,
    pub(super) dedup: Dedup,
    hot_bytes: usize,
    evict_hand: u32,
    /// Leases that may run out: when, queue, number.
    pub(super) lease_ends: BTreeSet<(Instant, u32, u64)>,
    /// Queues with a time to live.
    pub(super) with_ttl: BTreeSet<u32>,
    /// Earliest delay that may be over, in milliseconds since the epoch.
    pub(super) next_due: Option<i64>,
    /// Delays noted in windows that were not durable when the disk was last asked, earliest first.
    pub(super) recent_dues: BinaryHeap<std::cmp::Reverse<(i64, u64)>>,
    /// Ended delays are being read, or made ready in a window that is not durable yet.
    pub(super) is_releasing: bool,
    /// The window in which the last ones were made ready; 0 when none waits to be durable.
    pub(super) released_in: u64,
    /// Entries of the open window that a pipeline is about to forward: taken now, they would be written in vain.
    pub(super) in_transit: usize,
    /// Queues whose readers wait for the open window to be taken, or for commits to succeed again.
    stalled: BTreeSet<u32>,
    /// Queues whose page could not be read: tried again by the timer.
    failed_loads: BTreeSet<u32>,
    pub(super) is_closed: bool,
    telemetry: Telemetry,
    after: After,
}

impl Core {
    pub(super) fn new(next_number: u64, dedup: Dedup, next_due: Option<i64>, telemetry: Telemetry) -> Self {
        Self {
            queues: HashMap::new(),
            by_name: HashMap::new(),
            publish: 0,
            unrouted: 0,
            inboxes: BTreeSet::new(),
            trie: Trie::new(),
            route: 0,
            next_number,
            // Receipts name it: one from before a restart must not fit a lease of now.
            next_holder: u64::try_from(Timestamp::now().as_millis()).unwrap_or(0) << 16,
            open: Window::new(1),
            flushing: 0,
            flushing_wake: Vec::new(),
            durable: 0,
            is_failing: false,
            wanting: Vec::new(),
            dedup,
            hot_bytes: 0,
            evict_hand: 0,
            lease_ends: BTreeSet::new(),
            with_ttl: BTreeSet::new(),
            next_due,
            recent_dues: BinaryHeap::new(),
            is_releasing: false,
            released_in: 0,
            in_transit: 0,
            stalled: BTreeSet::new(),
            failed_loads: BTreeSet::new(),
            is_closed: false,
            telemetry,
            after: After::default(),
        }
    }

    // ---- topology

    pub(super) fn add_queue(&mut self, id: u32, state: QueueState) {
        if state.is_inbox() {
            self.inboxes.insert(id);
        }
        self.by_name.insert(state.name.clone(), id);
        self.queues.insert(id, state);
    }

    pub(super) fn client(&self, client: &ClientId) -> Option<ClientQueues> {
        let id = |queue: Queue| self.by_name.get(&queue).copied();
        Some(ClientQueues {
            outbox: id(Queue::Outbox(client.clone()))?,
            notify: id(Queue::Notify(client.clone()))?,
            inbox: id(Queue::Inbox(client.clone()))?,
        })
    }

    pub(super) fn set_limits(&mut self, inbox: u32, max_messages: Option<u64>, ttl_ms: Option<i64>) {
        let Some(queue) = self.queues.get_mut(&inbox) else { return };
        (queue.max_messages, queue.ttl_ms) = (max_messages, ttl_ms);
        if ttl_ms.is_some() {
            self.with_ttl.insert(inbox)
        } else {
            self.with_ttl.remove(&inbox)
        };
        self.enforce_limit(inbox);
    }

    pub(super) fn bind(&mut self, inbox: u32, patterns: Vec<Pattern>) {
        let Some(queue) = self.queues.get_mut(&inbox) else { return };
        for old in std::mem::replace(&mut queue.patterns, patterns.clone()) {
            self.trie.remove(&old, &inbox);
        }
        for pattern in patterns {
            self.trie.insert(&pattern, inbox);
        }
    }

    /// Forgets a queue and all that it holds; its rows are deleted by the caller.
    pub(super) fn remove_queue(&mut self, id: u32) {
        self.bind(id, Vec::new());
        let Some(queue) = self.queues.remove(&id) else { return };
        self.by_name.remove(&queue.name);
        self.inboxes.remove(&id);
        self.with_ttl.remove(&id);
        let freed: usize = queue.slots.iter().map(Slot::let_go).sum();
        self.hot_bytes = self.hot_bytes.saturating_sub(freed);
        self.failed_loads.remove(&id);
        for (number, lease) in queue.leases {
            self.lease_ends.remove(&(lease.until, id, number));
        }
        self.after.wakers.extend(queue.waiters.into_iter().map(|(_, waker)| waker));
    }

    pub(super) fn depths(&self, client: &ClientId) -> Option<Depths> {
        let queues = self.client(client)?;
        let depth = |id: u32| self.queues.get(&id).map_or(0, |queue| queue.counts.depth);
        let dead = self.queues.get(&queues.inbox).map_or(0, |queue| queue.counts.dead);
        Some(Depths { outbox: depth(queues.outbox), notify: depth(queues.notify), inbox: depth(queues.inbox), dead })
    }

    /// When the oldest message that is in memory came into the queue, in milliseconds. Positions only grow, so what
    /// waits at the front is the oldest that waits; a long queue's front is in memory.
    pub(super) fn oldest(&self, queue: &Queue) -> Option<i64> {
        let queue = self.queues.get(self.by_name.get(queue)?)?;
        let handed_out = queue.in_flight.values().map(|entry| entry.slot.at).min();
        handed_out.into_iter().chain(queue.slots.front().map(|slot| slot.at)).min()
    }

    // ---- numbers

    fn number(&mut self) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        number
    }

    /// A number for a new consumer or lease.
    pub(super) fn holder_number(&mut self) -> u64 {
        self.next_holder += 1;
        self.next_holder
    }

    /// All that was given a number so far is below this.
    pub(super) fn next_number(&self) -> u64 {
        self.next_number
    }

    // ---- entries come and go

    /// A new body, accepted in the open window.
    pub(super) fn accept(&mut self, payload: Payload) -> BodyRef {
        let id = self.number();
        BodyRef::Hot(Arc::new(Body::new(id, payload, self.open.number)))
    }

    /// Appends an entry. Its row is part of the open window.
    pub(super) fn append(&mut self, queue_id: u32, body: BodyRef, now_ms: i64) {
        let pos = self.number();
        self.touch(queue_id);
        let Some(queue) = self.queues.get_mut(&queue_id) else { return };
        queue.counts.depth += 1;
        let index = u32::try_from(self.open.inserts.len()).expect("a window has far fewer rows");
        let window = self.open.number;
        self.open.inserts.push(Some(Insert {
            queue: queue_id,
            pos,
            body: body.clone(),
            at: now_ms,
            deliveries: 0,
            attempts: 0,
            due: None,
            with_body: false,
        }));
        if queue.consumers > 0 && !queue.is_inbox() {
            self.in_transit += 1;
        }
        if queue.is_paged() {
            queue.tail += 1;
        } else {
            let slot = Slot { pos, body, at: now_ms, deliveries: 0, attempts: 0, window, index, leased: None };
            self.hot_bytes += slot.hold();
            queue.push_back(slot);
        }
        self.enforce_bounds(queue_id);
        self.wake_when_visible(queue_id);
    }

    /// Registers a reader that found nothing to take, by its number; it is woken when there may be something.
    pub(super) fn wait(&mut self, queue_id: u32, reader: u64, waker: &Waker) {
        let stalled = self.is_stalled(queue_id);
        let Some(queue) = self.queues.get_mut(&queue_id) else { return };
        match queue.waiters.iter_mut().find(|(number, _)| *number == reader) {
            Some((_, known)) => known.clone_from(waker),
            None => queue.waiters.push((reader, waker.clone())),
        }
        if stalled {
            self.stalled.insert(queue_id);
        } else if let Some(Slot { body: BodyRef::Hot(body), .. }) = queue.slots.front()
            && queue.is_inbox()
            && body.accepted_in > self.durable
        {
            self.wake_when_visible(queue_id);
        }
        // What is visible was left because its reader has no credit: it is woken when it has.
    }

    /// Forgets a reader that waits no longer.
    pub(super) fn stop_waiting(&mut self, queue_id: u32, reader: u64) {
        if let Some(queue) = self.queues.get_mut(&queue_id) {
            queue.waiters.retain(|(number, _)| *number != reader);
        }
    }

    /// Wakes everyone who waits for a queue.
    pub(super) fn wake_readers(&mut self, queue_id: u32) {
        if let Some(queue) = self.queues.get_mut(&queue_id) {
            self.after.wakers.extend(queue.waiters.drain(..).map(|(_, waker)| waker));
        }
    }

    /// Whether a pipeline must wait, because what it forwards may multiply: the open window is full, or nothing can be
    /// written at present and what is to be written would pile up.
    fn is_stalled(&self, queue_id: u32) -> bool {
        let is_piling_up = self.is_failing && (self.flushing != 0 || !self.open.is_empty());
        (is_piling_up || self.open.weight() > WINDOW_ROWS_MAX)
            && self.queues.get(&queue_id).is_some_and(|queue| !queue.is_inbox())
    }

    /// Lets those who had to wait look again.
    fn wake_stalled(&mut self) {
        for id in std::mem::take(&mut self.stalled) {
            self.wake_readers(id);
        }
    }

    /// Wakes readers of a queue now, or when what it got is durable.
    fn wake_when_visible(&mut self, queue_id: u32) {
        let Some(queue) = self.queues.get_mut(&queue_id) else { return };
        if queue.waiters.is_empty() {
            return;
        }
        let accepted_in = match queue.slots.front() {
            Some(Slot { body: BodyRef::Hot(body), .. }) if queue.is_inbox() => body.accepted_in,
            _ => 0,
        };
        if accepted_in <= self.durable {
            self.wake_readers(queue_id);
        } else if accepted_in == self.flushing {
            self.flushing_wake.push(queue_id);
        } else {
            self.open.wake.push(queue_id);
        }
    }

    /// The row of an entry goes; its body stays.
    fn drop_row(&mut self, queue: u32, slot: &Slot) {
        if slot.window == self.open.number {
            self.open.inserts[slot.index as usize] = None;
            if self.queues.get(&queue).is_some_and(|queue| queue.consumers > 0 && !queue.is_inbox()) {
                self.in_transit = self.in_transit.saturating_sub(1);
            }
        } else {
            self.open.deletes.push(Delete { queue, pos: slot.pos, body: slot.body.id(), fate: BodyFate::Keep });
        }
    }

    /// An entry goes for good, and its body with it unless that lies elsewhere too.
    fn finish(&mut self, queue_id: u32, slot: &Slot) {
        self.touch(queue_id);
        if let Some(queue) = self.queues.get_mut(&queue_id) {
            queue.counts.depth = queue.counts.depth.saturating_sub(1);
        }
        if slot.body.is_cancelled() {
            return;
        }
        if slot.body.is_shared() {
            self.drop_row(queue_id, slot);
            self.open.change_refs(&slot.body, -1);
        } else if slot.window == self.open.number {
            self.open.inserts[slot.index as usize] = None;
            if slot.body.is_stored() {
                self.open.body_drops.push(slot.body.id());
            }
        } else {
            let delete = Delete { queue: queue_id, pos: slot.pos, body: slot.body.id(), fate: BodyFate::Drop };
            self.open.deletes.push(delete);
        }
    }

    /// An entry leaves one queue for some others; its body is shared from now on if they are several.
    fn move_to(&mut self, from: u32, slot: &Slot, targets: &[u32], now_ms: i64) {
        self.touch(from);
        if let Some(queue) = self.queues.get_mut(&from) {
            queue.counts.depth = queue.counts.depth.saturating_sub(1);
        }
        if slot.body.is_cancelled() {
            return;
        }
        self.drop_row(from, slot);
        let references = i64::try_from(targets.len()).expect("there are far fewer queues");
        let mut body = slot.body.clone();
        if body.is_shared() {
            self.open.change_refs(&body, references - 1);
        } else if targets.len() > 1 {
            body = body.into_shared();
            self.open.change_refs(&body, references);
        }
        for target in targets {
            self.append(*target, body.clone(), now_ms);
        }
    }

    // ---- routing

    /// Reports a step on a message's way, once the lock is released.
    pub(super) fn report(&mut self, message: &SharedMessage, step: Step) {
        self.after.reports.push(Report::Step(SharedMessage::clone(message), step));
    }

    /// Forwards a slot that was taken from its holder, and holds this message.
    pub(super) fn forward(&mut self, from: u32, slot: &Slot, message: &SharedMessage, target: Target, now_ms: i64) {
        let mut targets: Vec<u32> = Vec::new();
        match target {
            Target::Publish => targets.push(self.publish),
            Target::Broadcast => targets.extend(&self.inboxes),
            Target::Topic => {
                self.route += 1;
                let (route, queues) = (self.route, &mut self.queues);
                if let Some(topic) = &message.topic {
                    self.trie.for_each_match(topic.as_str(), |_, inbox| {
                        // Once, however many of its patterns match.
                        if let Some(queue) = queues.get_mut(&inbox)
                            && queue.last_route != route
                        {
                            queue.last_route = route;
                            targets.push(inbox);
                        }
                    });
                }
            }
        }
        match target {
            Target::Publish => self.report(message, Step::Forwarded),
            Target::Topic | Target::Broadcast => self.report_routing(message, &targets, target),
        }
        if targets.is_empty() {
            if target == Target::Broadcast {
                // To everyone, and there is no one.
                return self.finish(from, slot);
            }
            targets.push(self.unrouted);
        }
        self.move_to(from, slot, &targets, now_ms);
    }

    fn report_routing(&mut self, message: &SharedMessage, inboxes: &[u32], target: Target) {
        self.telemetry.metrics.routed.inc_by(inboxes.len() as u64);
        self.report(message, Step::Published);
        if inboxes.is_empty() {
            self.telemetry.metrics.unrouted.inc();
            self.report(message, Step::Unrouted);
        } else if self.telemetry.traces.is_on() {
            let topic = message.topic.as_ref().filter(|_| target == Target::Topic);
            let named = inboxes.iter().take(ROUTED_KEPT).filter_map(|inbox| {
                let queue = self.queues.get(inbox)?;
                let Queue::Inbox(client) = &queue.name else { return None };
                let pattern = topic.and_then(|topic| match &queue.patterns[..] {
                    [only] => Some(only.clone()),
                    several => several.iter().find(|pattern| pattern.matches(topic)).cloned(),
                });
                Some((client.clone(), pattern))
            });
            let named = named.collect();
            self.after.reports.push(Report::Routed(SharedMessage::clone(message), inboxes.len(), named));
        }
    }

    fn trim_unrouted(&mut self) {
        let id = self.unrouted;
        while let Some(queue) = self.queues.get_mut(&id)
            && queue.counts.depth > UNROUTED_MAX
        {
            match queue.pop_front() {
                Some(slot) => {
                    self.hot_bytes = self.hot_bytes.saturating_sub(slot.let_go());
                    self.finish(id, &slot);
                }
                None => return self.want_load(id),
            }
        }
    }

    // ---- handing out

    /// Takes up to `max` deliveries of at most `max_bytes` from the front, to hand out. Asks for a page when the front
    /// is short.
    pub(super) fn take(&mut self, queue_id: u32, max: usize, max_bytes: usize, now_ms: i64) -> Vec<Slot> {
        let mut taken = Vec::new();
        self.expire_front(queue_id, now_ms);
        if self.is_stalled(queue_id) {
            return taken;
        }
        let Some(queue) = self.queues.get_mut(&queue_id) else { return taken };
        let (inbox, durable) = (queue.is_inbox(), self.durable);
        let mut bytes = 0;
        while taken.len() < max && bytes < max_bytes {
            let visible = match queue.slots.front() {
                Some(Slot { body: BodyRef::Hot(body), .. }) => !inbox || body.accepted_in <= durable,
                Some(_) | None => false,
            };
            if !visible {
                break;
            }
            let Some(mut slot) = queue.pop_front() else { break };
            self.hot_bytes = self.hot_bytes.saturating_sub(slot.let_go());
            slot.deliveries += 1;
            bytes += slot.size();
            taken.push(slot);
        }
        self.want_load(queue_id);
        taken
    }

    /// Notes that a taken slot is with `holder`.
    pub(super) fn hand_out(&mut self, queue_id: u32, slot: Slot, holder: Holder) {
        if let Some(queue) = self.queues.get_mut(&queue_id) {
            queue.in_flight.insert(slot.pos, InFlight { slot, holder });
        }
    }

    /// Takes a delivery back from `holder`, to settle it; `None` when it does not have it.
    pub(super) fn take_in_flight(&mut self, queue_id: u32, pos: u64, holder: Holder) -> Option<Slot> {
        let queue = self.queues.get_mut(&queue_id)?;
        let entry = queue.in_flight.get(&pos)?;
        if entry.holder != holder {
            return None;
        }
        let was_full = queue.in_flight.len() >= super::pull::LEASED_MAX;
        let slot = queue.in_flight.remove(&pos)?.slot;
        if queue.in_flight.is_empty() && queue.in_flight.capacity() > 64 {
            queue.in_flight.shrink_to(16);
        }
        if let Holder::Lease(number) = holder
            && let Some(lease) = queue.leases.get_mut(&number)
        {
            lease.unsettled -= 1;
            if lease.unsettled == 0 {
                let until = lease.until;
                queue.leases.remove(&number);
                self.lease_ends.remove(&(until, queue_id, number));
            }
        }
        if was_full {
            self.wake_readers(queue_id);
        }
        Some(slot)
    }

    /// A lease on what was just taken. Returns its number.
    pub(super) fn lease(&mut self, queue_id: u32, slots: &[Slot], lease: Duration) -> u64 {
        let number = self.holder_number();
        let until = Instant::now() + lease;
        for slot in slots {
            let mut held = slot.clone();
            if let BodyRef::Hot(body) = &held.body {
                held.leased = body.payload.message().map(|message| message.without_envelope().into());
            }
            held.body = held.body.cooled();
            self.hand_out(queue_id, held, Holder::Lease(number));
        }
        if let Some(queue) = self.queues.get_mut(&queue_id) {
            let positions = slots.iter().map(|slot| slot.pos).collect();
            queue.leases.insert(number, Lease { until, positions, unsettled: slots.len() });
            self.lease_ends.insert((until, queue_id, number));
        }
        number
    }

    // ---- settling

    /// Settles for good. Returns the slot when `holder` had it.
    pub(super) fn complete(&mut self, queue_id: u32, pos: u64, holder: Holder) -> Option<Slot> {
        let slot = self.take_in_flight(queue_id, pos, holder)?;
        self.finish(queue_id, &slot);
        Some(slot)
    }

    /// Removes slots that were taken to be handed over at once.
    pub(super) fn finish_taken(&mut self, queue_id: u32, slots: &[Slot]) {
        let (Some(first), Some(last), Some(queue)) = (slots.first(), slots.last(), self.queues.get_mut(&queue_id))
        else {
            return;
        };
        // When nothing else of the queue can lie between them, one statement deletes all their rows.
        let nothing_between = queue.in_flight.is_empty() && queue.counts.delayed == 0 && last.pos <= queue.loaded_to;
        let all_written = slots.iter().all(|slot| slot.window < self.open.number && !slot.body.is_cancelled());
        if slots.len() < RANGE_MIN || !nothing_between || !all_written {
            slots.iter().for_each(|slot| self.finish(queue_id, slot));
            return;
        }
        queue.counts.depth = queue.counts.depth.saturating_sub(slots.len() as u64);
        self.open.delete_ranges.push((queue_id, first.pos, last.pos));
        self.touch(queue_id);
        for slot in slots {
            if slot.body.is_shared() {
                self.open.change_refs(&slot.body, -1);
            } else {
                self.open.body_drops.push(slot.body.id());
            }
        }
    }

    /// Back to the front.
    pub(super) fn give_back(&mut self, queue_id: u32, pos: u64, holder: Holder) -> bool {
        let Some(slot) = self.take_in_flight(queue_id, pos, holder) else { return false };
        self.return_slot(queue_id, slot);
        true
    }

    /// Puts a slot that was taken from its holder back to the front.
    pub(super) fn return_slot(&mut self, queue_id: u32, mut slot: Slot) {
        slot.leased = None;
        if slot.body.is_cancelled() {
            return;
        }
        if slot.window == self.open.number {
            if let Some(insert) = &mut self.open.inserts[slot.index as usize] {
                insert.deliveries = slot.deliveries;
            }
        } else {
            let (deliveries, attempts) = (slot.deliveries, slot.attempts);
            self.open.updates.insert((queue_id, slot.pos), Update { deliveries, attempts, due: None });
        }
        let Some(queue) = self.queues.get_mut(&queue_id) else { return };
        self.hot_bytes += slot.hold();
        queue.insert_in_order(slot);
        self.want_load(queue_id);
        self.wake_when_visible(queue_id);
    }

    /// Away until `due`, in milliseconds since the epoch.
    pub(super) fn delay(&mut self, queue_id: u32, mut slot: Slot, due: i64, attempts: u32) {
        slot.attempts = attempts;
        if slot.body.is_cancelled() {
            return;
        }
        if slot.window == self.open.number {
            if let Some(insert) = &mut self.open.inserts[slot.index as usize] {
                (insert.due, insert.attempts, insert.deliveries) = (Some(due), attempts, slot.deliveries);
            }
        } else {
            let deliveries = slot.deliveries;
            self.open.updates.insert((queue_id, slot.pos), Update { deliveries, attempts, due: Some(due) });
        }
        self.touch(queue_id);
        if let Some(queue) = self.queues.get_mut(&queue_id) {
            queue.counts.delayed += 1;
        }
        self.recent_dues.push(std::cmp::Reverse((due, self.open.number)));
        self.next_due = Some(self.next_due.map_or(due, |next| next.min(due)));
    }

    /// A delay is over: the entry is ready again, where it was.
    pub(super) fn release(&mut self, queue_id: u32, slot: Slot) {
        let Some(queue) = self.queues.get_mut(&queue_id) else { return };
        queue.counts.delayed = queue.counts.delayed.saturating_sub(1);
        if slot.pos > queue.loaded_to {
            queue.injected.insert(slot.pos);
        }
        // Its row says that it is ready only when the open window is durable.
        queue.popped_to = queue.popped_to.max(slot.pos);
        self.touch(queue_id);
        self.return_slot(queue_id, slot);
    }

    /// Into the dead letters of the client that owns `inbox`.
    pub(super) fn bury(&mut self, from: u32, inbox: u32, slot: &Slot, reason: DeadReason, attempts: u32, now_ms: i64) {
        self.touch(from);
        self.touch(inbox);
        let mut origin = Origin::Inbox;
        let mut owner = None;
        if let Some(queue) = self.queues.get_mut(&from) {
            queue.counts.depth = queue.counts.depth.saturating_sub(1);
            (origin, owner) = match &queue.name {
                Queue::Outbox(client) => (Origin::Outbox, Some(client.clone())),
                Queue::Notify(client) => (Origin::Notify, Some(client.clone())),
                Queue::Inbox(client) => (Origin::Inbox, Some(client.clone())),
                Queue::Publish | Queue::Unrouted => (Origin::Outbox, None),
            };
        }
        if slot.body.is_cancelled() {
            return;
        }
        self.drop_row(from, slot);
        let pos = self.number();
        if let Some(queue) = self.queues.get_mut(&inbox) {
            queue.counts.dead += 1;
        }
        self.telemetry.metrics.dead(reason).inc();
        let message = match &slot.body {
            BodyRef::Hot(body) => body.payload.message(),
            BodyRef::Cold { .. } => slot.leased.as_ref(),
        };
        if let (Some(message), Some(client)) = (message, owner) {
            self.report(message, Step::Dead(client, reason));
        }
        self.open.dead_inserts.push(DeadInsert {
            queue: inbox,
            pos,
            body: slot.body.clone(),
            origin,
            reason,
            attempts,
            died_at: now_ms,
            with_body: false,
        });
    }

    /// A row of `dead` goes; with `back_into`, its body becomes an entry there.
    pub(super) fn unbury(&mut self, inbox: u32, pos: u64, body: BodyRef, back_into: Option<u32>, now_ms: i64) {
        self.touch(inbox);
        self.open.dead_deletes.push((inbox, pos));
        if let Some(queue) = self.queues.get_mut(&inbox) {
            queue.counts.dead = queue.counts.dead.saturating_sub(1);
        }
        match back_into {
            Some(queue) => self.append(queue, body, now_ms),
            None if body.is_shared() => self.open.change_refs(&body, -1),
            None => self.open.body_drops.push(body.id()),
        }
    }

    // ---- limits

    /// Whatever bound the queue has.
    fn enforce_bounds(&mut self, queue_id: u32) {
        if queue_id == self.unrouted {
            self.trim_unrouted();
        } else if self.queues.get(&queue_id).is_some_and(QueueState::is_inbox) {
            self.enforce_limit(queue_id);
        }
    }

    /// Past `max_inbox_messages` the oldest that nobody holds become dead letters.
    fn enforce_limit(&mut self, inbox: u32) {
        loop {
            let Some(queue) = self.queues.get_mut(&inbox) else { return };
            if queue.max_messages.is_none_or(|max| queue.counts.depth <= max) {
                return;
            }
            let Some(slot) = queue.pop_front() else { return self.want_load(inbox) };
            self.hot_bytes = self.hot_bytes.saturating_sub(slot.let_go());
            let attempts = slot.attempts;
            let now_ms = Timestamp::now().as_millis();
            self.bury(inbox, inbox, &slot, DeadReason::InboxFull, attempts, now_ms);
        }
    }

    /// Past `inbox_ttl_s` they do, too.
    pub(super) fn expire_front(&mut self, inbox: u32, now_ms: i64) {
        loop {
            let Some(queue) = self.queues.get_mut(&inbox) else { return };
            let Some(ttl_ms) = queue.ttl_ms else { return };
            match queue.slots.front() {
                Some(front) if front.at.saturating_add(ttl_ms) <= now_ms => {}
                Some(_) => return,
                None => return self.want_load(inbox),
            }
            let Some(slot) = queue.pop_front() else { return };
            self.hot_bytes = self.hot_bytes.saturating_sub(slot.let_go());
            let attempts = slot.attempts;
            self.bury(inbox, inbox, &slot, DeadReason::Expired, attempts, now_ms);
        }
    }

    // ---- pages

    /// Asks for what is missing at the front of a queue. Looked at when the lock is released, so that what comes back
    /// together is read together.
    pub(super) fn want_load(&mut self, queue_id: u32) {
        if self.wanting.last() != Some(&queue_id) {
            self.wanting.push(queue_id);
        }
    }

    fn begin_loads(&mut self) {
        let mut wanting = std::mem::take(&mut self.wanting);
        wanting.sort_unstable();
        wanting.dedup();
        for queue_id in wanting.drain(..) {
            self.begin_load(queue_id);
        }
        wanting.shrink_to(1024);
        self.wanting = wanting;
    }

    /// Has what is missing at the front of a queue read, unless that is under way.
    fn begin_load(&mut self, queue_id: u32) {
        /// Slots below which a queue that is being read wants a page.
        const LOW: usize = SLOTS_MAX / 2;
        /// Bodies read back for one load at most.
        const BODIES: usize = SLOTS_MAX / 8;
        let Some(queue) = self.queues.get_mut(&queue_id) else { return };
        if queue.tail == 0 && queue.slots.is_empty() {
            return;
        }
        if queue.is_loading {
            queue.load_again = true;
            return;
        }
        let cold = |slot: &Slot| match slot.body {
            BodyRef::Cold { id, .. } => Some(id),
            BodyRef::Hot(_) => None,
        };
        let bodies: Vec<u64> = match queue.slots.front() {
            Some(front) if cold(front).is_some() => queue.slots.iter().take(BODIES).filter_map(cold).collect(),
            _ => Vec::new(),
        };
        let short = queue.slots.len() < LOW && queue.hot_bytes < super::queue::HOT_BYTES_MAX / 2;
        let page_after = (queue.tail > 0 && short).then_some(queue.loaded_to);
        if bodies.is_empty() && page_after.is_none() {
            return;
        }
        (queue.is_loading, queue.load_again) = (true, false);
        self.after.loads.push(Load { queue: queue_id, bodies, page_after });
    }

    /// Puts what was read into its queue. `page` is in order; bodies that are missing are gone from disk.
    pub(super) fn loaded(&mut self, load: &Load, bodies: Vec<Arc<Body>>, page: Vec<Slot>) {
        let Some(queue) = self.queues.get_mut(&load.queue) else { return };
        queue.is_loading = false;
        let found = !bodies.is_empty() || !page.is_empty();
        let missing: Vec<u64> =
            load.bodies.iter().filter(|id| bodies.iter().all(|body| body.id != **id)).copied().collect();
        let mut by_id: HashMap<u64, Arc<Body>> = bodies.into_iter().map(|body| (body.id, body)).collect();
        if !by_id.is_empty() {
            for slot in queue.slots.iter_mut().take(load.bodies.len() * 2 + 64) {
                if let BodyRef::Cold { id, shared } = slot.body
                    && let Some(body) = by_id.remove(&id)
                {
                    if shared {
                        // The disk may not know yet.
                        body.mark_shared();
                    }
                    self.hot_bytes = self.hot_bytes.saturating_sub(slot.let_go());
                    queue.hot_bytes = queue.hot_bytes.saturating_sub(slot.cost());
                    slot.body = BodyRef::Hot(body);
                    self.hot_bytes += slot.hold();
                    queue.hot_bytes += slot.cost();
                }
            }
        }
        for slot in page {
            if slot.pos <= queue.loaded_to {
                // Accounted for by now.
                continue;
            }
            queue.loaded_to = slot.pos;
            if queue.injected.remove(&slot.pos) {
                // It is here already: its delay was over before its page was read. It was never part of the tail.
                continue;
            }
            queue.tail = queue.tail.saturating_sub(1);
            self.hot_bytes += slot.hold();
            // Where it belongs: what came back from a delay may lie behind it.
            queue.insert_in_order(slot);
        }
        let loaded_to = queue.loaded_to;
        queue.injected.retain(|pos| *pos > loaded_to);
        let (id, again) = (load.queue, queue.load_again);
        self.drop_without_body(id, &missing);
        if found {
            self.wake_readers(id);
            self.enforce_bounds(id);
        } else if again {
            // What was not committed when the page was read may be by now.
            self.want_load(id);
        }
    }

    /// Entries whose bodies the disk has lost cannot be delivered, and must not block those behind them.
    fn drop_without_body(&mut self, queue_id: u32, missing: &[u64]) {
        for body in missing {
            let Some(queue) = self.queues.get_mut(&queue_id) else { return };
            let is_it = |slot: &Slot| matches!(slot.body, BodyRef::Cold { id, .. } if id == *body);
            let Some(slot) = queue.slots.iter().position(is_it).and_then(|at| queue.slots.remove(at)) else { continue };
            log::error!("{}: body {body} of entry {} is missing; the entry is dropped", queue.name, slot.pos);
            queue.hot_bytes = queue.hot_bytes.saturating_sub(slot.cost());
            self.hot_bytes = self.hot_bytes.saturating_sub(slot.let_go());
            self.finish(queue_id, &slot);
            self.wake_readers(queue_id);
        }
    }

    /// A read failed: the timer asks again.
    pub(super) fn load_failed(&mut self, queue_id: u32) {
        if let Some(queue) = self.queues.get_mut(&queue_id) {
            queue.is_loading = false;
            self.failed_loads.insert(queue_id);
        }
    }

    /// Asks again for pages that could not be read.
    pub(super) fn retry_loads(&mut self) {
        for id in std::mem::take(&mut self.failed_loads) {
            self.want_load(id);
        }
    }

    /// Keeps the memory of all queues together within its bound, at the cost of those that nobody waits for.
    fn evict(&mut self) {
        if self.hot_bytes <= HOT_BYTES_TOTAL {
            return;
        }
        let mut ids: Vec<u32> = self.queues.iter().filter(|(_, q)| q.hot_bytes > 0).map(|(id, _)| *id).collect();
        ids.sort_unstable();
        let start = ids.partition_point(|id| *id <= self.evict_hand);
        ids.rotate_left(start);
        // Those that nobody waits for come first; a reader that waits has no credit, or will find it on disk.
        ids.sort_by_key(|id| self.queues.get(id).is_some_and(|queue| !queue.waiters.is_empty()));
        for id in ids {
            if self.hot_bytes <= HOT_BYTES_TOTAL * 3 / 4 {
                return;
            }
            if let Some(queue) = self.queues.get_mut(&id) {
                self.hot_bytes = self.hot_bytes.saturating_sub(queue.evict(self.durable));
                self.evict_hand = id;
            }
        }
    }

    // ---- windows

    fn touch(&mut self, queue_id: u32) {
        if let Some(queue) = self.queues.get_mut(&queue_id)
            && !queue.is_touched
        {
            queue.is_touched = true;
            self.open.touched.push(queue_id);
        }
    }

    /// Closes the open window and returns it, to be written.
    pub(super) fn take_window(&mut self) -> Option<Window> {
        if self.open.is_empty() {
            return None;
        }
        let next = Window::new(self.open.number + 1);
        let mut window = std::mem::replace(&mut self.open, next);
        window.seal();
        for id in &window.touched {
            let Some(queue) = self.queues.get_mut(id) else { continue };
            queue.is_touched = false;
            if queue.counts != queue.counts_stored {
                queue.counts_stored = queue.counts;
                window.counts.push((*id, queue.counts));
            }
        }
        window.next_number = self.next_number;
        self.in_transit = 0;
        self.wake_stalled();
        self.flushing = window.number;
        self.flushing_wake = std::mem::take(&mut window.wake);
        Some(window)
    }

    /// The flushing window is durable.
    pub(super) fn window_durable(&mut self, window: &Window) {
        self.durable = window.number;
        self.flushing = 0;
        self.is_failing = false;
        if self.released_in == window.number {
            (self.released_in, self.is_releasing) = (0, false);
        }
        if !self.is_releasing {
            // The next reading finds them on disk; one that is under way may have begun before.
            self.recent_dues.retain(|std::cmp::Reverse((_, noted_in))| *noted_in > window.number);
        }
        for own in &window.own_ids {
            self.dedup.claims.remove(&own.hash);
        }
        for id in std::mem::take(&mut self.flushing_wake) {
            self.wake_readers(id);
        }
        self.wake_stalled();
        for id in &window.touched {
            // What was not found on disk before may be there now.
            let Some(queue) = self.queues.get(id).filter(|queue| queue.tail > 0) else { continue };
            if !queue.waiters.is_empty() {
                self.want_load(*id);
            }
            self.enforce_bounds(*id);
        }
        self.evict();
    }

    /// The flushing window failed for good: what was accepted in it is void, the rest goes into the open window.
    pub(super) fn window_failed(&mut self, mut window: Window) -> Vec<Waiter> {
        self.flushing = 0;
        self.is_failing = true;
        for own in &window.own_ids {
            self.dedup.claims.remove(&own.hash);
        }
        let accepted = |body: &BodyRef| match body {
            BodyRef::Hot(body) => (body.accepted_in == window.number).then(|| Arc::clone(body)),
            BodyRef::Cold { .. } => None,
        };
        for insert in window.inserts.iter().chain(&self.open.inserts).flatten() {
            if let Some(body) = accepted(&insert.body) {
                body.mark_cancelled();
            }
        }
        for dead in window.dead_inserts.iter().chain(&self.open.dead_inserts) {
            if let Some(body) = accepted(&dead.body) {
                body.mark_cancelled();
            }
        }
        let void: Vec<(u32, u64, bool)> = window
            .inserts
            .iter()
            .chain(&self.open.inserts)
            .flatten()
            .filter(|insert| insert.body.is_cancelled())
            .map(|insert| {
                let update = self.open.updates.get(&(insert.queue, insert.pos));
                let is_delayed = insert.due.is_some() || update.is_some_and(|update| update.due.is_some());
                (insert.queue, insert.pos, is_delayed)
            })
            .collect();
        for (id, pos, is_delayed) in void {
            self.remove_void(id, pos, is_delayed);
        }
        let void_dead: Vec<u32> = window
            .dead_inserts
            .iter()
            .chain(&self.open.dead_inserts)
            .filter(|dead| dead.body.is_cancelled())
            .map(|dead| dead.queue)
            .collect();
        for inbox in void_dead {
            self.touch(inbox);
            if let Some(queue) = self.queues.get_mut(&inbox) {
                queue.counts.dead = queue.counts.dead.saturating_sub(1);
            }
        }
        // Counts were not written: whoever is on the list is on the next one.
        for (id, _) in std::mem::take(&mut window.counts) {
            if let Some(queue) = self.queues.get_mut(&id) {
                queue.counts_stored = super::queue::Counts { depth: u64::MAX, ..queue.counts };
            }
        }
        for id in std::mem::take(&mut window.touched) {
            self.touch(id);
        }
        let waiters = std::mem::take(&mut window.waiters);
        self.open.wake.append(&mut self.flushing_wake);
        self.open.wake.sort_unstable();
        self.open.wake.dedup();
        if self.released_in == window.number {
            self.released_in = self.open.number;
        }
        // Delays that were noted in it are written with the open window.
        let (failed, open) = (window.number, self.open.number);
        let moved = |std::cmp::Reverse((due, noted_in))| {
            std::cmp::Reverse((due, if noted_in == failed { open } else { noted_in }))
        };
        self.recent_dues = std::mem::take(&mut self.recent_dues).into_iter().map(moved).collect();
        // Nothing that is left was accepted in it.
        self.durable = window.number;
        self.open.take_over(window);
        self.wake_stalled();
        waiters
    }

    /// Removes an entry of a message that was never accepted, wherever it is by now.
    fn remove_void(&mut self, queue_id: u32, pos: u64, is_delayed: bool) {
        self.touch(queue_id);
        let Some(queue) = self.queues.get_mut(&queue_id) else { return };
        if is_delayed {
            queue.counts.delayed = queue.counts.delayed.saturating_sub(1);
            queue.counts.depth = queue.counts.depth.saturating_sub(1);
            return;
        }
        let at = queue.slots.partition_point(|slot| slot.pos < pos);
        if queue.slots.get(at).is_some_and(|slot| slot.pos == pos) {
            if let Some(slot) = queue.slots.remove(at) {
                queue.hot_bytes = queue.hot_bytes.saturating_sub(slot.cost());
                self.hot_bytes = self.hot_bytes.saturating_sub(slot.let_go());
            }
        } else if queue.in_flight.remove(&pos).is_none() {
            if pos <= queue.loaded_to {
                // It went on already; its next place is on the list as well.
                return;
            }
            queue.tail = queue.tail.saturating_sub(1);
        }
        queue.counts.depth = queue.counts.depth.saturating_sub(1);
    }

    /// A waiter for the open window.
    pub(super) fn wait_for_open(&mut self) -> tokio::sync::oneshot::Receiver<Result<(), crate::broker::BrokerError>> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        self.open.waiters.push(sender);
        receiver
    }

    // ---- after the lock

    /// What is to be done once the lock is released.
    pub(super) fn take_after(&mut self) -> After {
        self.begin_loads();
        self.after.nudge = self.flushing == 0 && !self.open.is_empty();
        std::mem::take(&mut self.after)
    }

    /// Wakes everyone who waits for anything: the broker closes.
    pub(super) fn close(&mut self) {
        self.is_closed = true;
        for queue in self.queues.values_mut() {
            self.after.wakers.extend(queue.waiters.drain(..).map(|(_, waker)| waker));
        }
    }
}

#[cfg(test)]
impl Core {
    /// What must hold whenever the lock is free.
    pub(super) fn check(&self) {
        let mut bodies = std::collections::HashMap::new();
        let mut slots = 0;
        for (id, queue) in &self.queues {
            let name = &queue.name;
            assert!(queue.slots.iter().is_sorted_by(|a, b| a.pos < b.pos), "{name}: slots out of order");
            let in_memory = queue.slots.len() + queue.in_flight.len();
            let counts = queue.counts;
            assert_eq!(counts.depth, in_memory as u64 + queue.tail + counts.delayed, "{name}: depth, {queue:?}");
            assert_eq!(queue.hot_bytes, queue.slots.iter().map(Slot::cost).sum::<usize>(), "{name}: bytes");
            for slot in &queue.slots {
                assert!(slot.pos <= queue.loaded_to || queue.injected.contains(&slot.pos), "{name}: {}", slot.pos);
                assert!(!slot.body.is_cancelled(), "{name}: {} was refused", slot.pos);
                if let BodyRef::Hot(body) = &slot.body {
                    bodies.insert(Arc::as_ptr(body), slot.size());
                }
                slots += 1;
            }
            for (number, lease) in &queue.leases {
                assert!(self.lease_ends.contains(&(lease.until, *id, *number)), "{name}: a lease without an end");
                let held = queue.in_flight.values().filter(|entry| entry.holder == Holder::Lease(*number)).count();
                assert_eq!(held, lease.unsettled, "{name}: lease {number}");
            }
        }
        let ends: usize = self.queues.values().map(|queue| queue.leases.len()).sum();
        assert_eq!(ends, self.lease_ends.len(), "ends of leases that are gone");
        assert_eq!(self.hot_bytes, slots * super::queue::SLOT_BYTES + bodies.values().sum::<usize>(), "bytes in all");
    }
}
