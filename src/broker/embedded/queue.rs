//! One queue in memory: the front of it, what is handed out, and how much more is on disk.
//!
//! A queue's messages are ordered by position, a number that only grows. In memory is a front part (`slots`); what
//! lies behind it (`tail`) is on disk only. Slots are in order of their positions, and everything at or before
//! `loaded_to` is accounted for in memory: as a slot, handed out, delayed, or gone.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::Waker;
use std::time::Instant;

use crate::broker::{Payload, Queue};
use crate::envelope::SharedMessage;

/// Slots that a queue keeps in memory at most; what comes after goes to disk only.
pub(super) const SLOTS_MAX: usize = if cfg!(test) { 16 } else { 4096 };

/// Bytes of messages that a queue keeps in memory at most.
pub(super) const HOT_BYTES_MAX: usize = if cfg!(test) { 16 << 10 } else { 4 << 20 };

/// What one slot costs besides its message, in bytes, about.
pub(super) const SLOT_BYTES: usize = 64;

/// A message body: stored once, however many queues it lies in.
#[derive(Debug)]
pub(super) struct Body {
    /// Its key on disk.
    pub(super) id: u64,
    pub(super) payload: Payload,
    /// The window in which it was accepted: nobody outside may see it before that window is durable. 0 when it came
    /// from disk.
    pub(super) accepted_in: u64,
    /// Slots of queues that hold it in memory: it is counted once, as long as there is one.
    holders: AtomicU32,
    /// Changed under the broker's lock only; atomics because the commit thread reads them.
    flags: AtomicU32,
}

const STORED: u32 = 1;
const SHARED: u32 = 2;
const CANCELLED: u32 = 4;

impl Body {
    pub(super) fn new(id: u64, payload: Payload, accepted_in: u64) -> Self {
        Self { id, payload, accepted_in, holders: AtomicU32::new(0), flags: AtomicU32::new(0) }
    }

    /// A body that was read back.
    pub(super) fn loaded(id: u64, payload: Payload, shared: bool) -> Self {
        let flags = if shared { STORED | SHARED } else { STORED };
        Self { id, payload, accepted_in: 0, holders: AtomicU32::new(0), flags: AtomicU32::new(flags) }
    }

    fn has(&self, flag: u32) -> bool {
        self.flags.load(Ordering::Relaxed) & flag != 0
    }

    /// Whether it is on disk, or in a window that is being written.
    pub(super) fn is_stored(&self) -> bool {
        self.has(STORED)
    }

    /// Whether several entries may refer to it, so that its references are counted on disk.
    pub(super) fn is_shared(&self) -> bool {
        self.has(SHARED)
    }

    /// Whether its acceptance failed: its entries are void.
    pub(super) fn is_cancelled(&self) -> bool {
        self.has(CANCELLED)
    }

    /// Marks it stored; returns whether it was not before.
    pub(super) fn mark_stored(&self) -> bool {
        self.flags.fetch_or(STORED, Ordering::Relaxed) & STORED == 0
    }

    pub(super) fn mark_shared(&self) {
        self.flags.fetch_or(SHARED, Ordering::Relaxed);
    }

    pub(super) fn mark_cancelled(&self) {
        self.flags.fetch_or(CANCELLED, Ordering::Relaxed);
    }

    fn size(&self) -> usize {
        match &self.payload {
            Payload::Message(message) => message.size(),
            Payload::Foreign(foreign) => foreign.body.len() + 64,
        }
    }

    /// One slot more holds it; returns the bytes that are in memory only now.
    fn hold(&self) -> usize {
        if self.holders.fetch_add(1, Ordering::Relaxed) == 0 { self.size() } else { 0 }
    }

    /// One slot less holds it; returns the bytes that nobody holds any more.
    fn let_go(&self) -> usize {
        if self.holders.fetch_sub(1, Ordering::Relaxed) == 1 { self.size() } else { 0 }
    }
}

/// A slot's body: in memory, or on disk only.
#[derive(Debug, Clone)]
pub(super) enum BodyRef {
    Hot(Arc<Body>),
    Cold { id: u64, shared: bool },
}

impl BodyRef {
    pub(super) fn id(&self) -> u64 {
        match self {
            Self::Hot(body) => body.id,
            Self::Cold { id, .. } => *id,
        }
    }

    pub(super) fn is_shared(&self) -> bool {
        match self {
            Self::Hot(body) => body.is_shared(),
            Self::Cold { shared, .. } => *shared,
        }
    }

    pub(super) fn is_stored(&self) -> bool {
        match self {
            Self::Hot(body) => body.is_stored(),
            Self::Cold { .. } => true,
        }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        matches!(self, Self::Hot(body) if body.is_cancelled())
    }

    /// The same for an entry that is one of several with this body.
    pub(super) fn into_shared(self) -> Self {
        match self {
            Self::Hot(body) => {
                body.mark_shared();
                Self::Hot(body)
            }
            Self::Cold { id, .. } => Self::Cold { id, shared: true },
        }
    }

    /// The same, without holding the body in memory, if it can be read back.
    pub(super) fn cooled(self) -> Self {
        match self {
            Self::Hot(body) if body.is_stored() => Self::Cold { id: body.id, shared: body.is_shared() },
            other => other,
        }
    }
}

/// One message in one queue.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub(super) pos: u64,
    pub(super) body: BodyRef,
    /// When it came into this queue, in milliseconds since the epoch.
    pub(super) at: i64,
    /// How often it was handed out.
    pub(super) deliveries: u32,
    pub(super) attempts: u32,
    /// The window that its row is part of (0: of one long ago), and where in it.
    pub(super) window: u64,
    pub(super) index: u32,
    /// While it is leased: the message without its envelope, for reports.
    pub(super) leased: Option<SharedMessage>,
}

impl Slot {
    /// What it adds to the memory of its queue, in bytes: all of its message, which may be the only one that needs it.
    pub(super) fn cost(&self) -> usize {
        SLOT_BYTES + self.size()
    }

    /// A queue holds it from now on; returns what that adds to the memory of all queues together, in bytes.
    #[must_use]
    pub(super) fn hold(&self) -> usize {
        SLOT_BYTES
            + match &self.body {
                BodyRef::Hot(body) => body.hold(),
                BodyRef::Cold { .. } => 0,
            }
    }

    /// Its queue holds it no longer; returns what that frees, in bytes.
    #[must_use]
    pub(super) fn let_go(&self) -> usize {
        SLOT_BYTES
            + match &self.body {
                BodyRef::Hot(body) => body.let_go(),
                BodyRef::Cold { .. } => 0,
            }
    }

    pub(super) fn size(&self) -> usize {
        match &self.body {
            BodyRef::Hot(body) => body.size(),
            BodyRef::Cold { .. } => 0,
        }
    }
}

/// Who holds a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holder {
    /// A consumer, by its number.
    Consumer(u64),
    /// A lease of a pull, by its number.
    Lease(u64),
}

/// A delivery that is handed out.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) slot: Slot,
    pub(super) holder: Holder,
}

/// A pull's lease on several messages.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) until: Instant,
    /// Positions that it was given for; some may be settled by now.
    pub(super) positions: Vec<u64>,
    pub(super) unsettled: usize,
}

/// What of a queue is kept in its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Counts {
    /// Entries in all.
    pub(super) depth: u64,
    /// Those of them that are delayed.
    pub(super) delayed: u64,
    /// Dead letters of the client (inbox queues only).
    pub(super) dead: u64,
}

/// Positions are spread evenly enough by one multiplication; SipHash costs more than the rest of a settlement.
#[derive(Default)]
pub(super) struct PositionHasher(u64);

impl Hasher for PositionHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte) ^ self.0);
        }
    }

    fn write_u64(&mut self, n: u64) {
        // Fibonacci hashing: 2^64 divided by the golden ratio; the high bits are the well mixed ones.
        self.0 = n.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_right(32);
    }
}

pub(super) type ByPosition<V> = HashMap<u64, V, BuildHasherDefault<PositionHasher>>;

/// See the module.
#[derive(Debug)]
pub(super) struct QueueState {
    pub(super) name: Queue,
    pub(super) counts: Counts,
    /// What its row says.
    pub(super) counts_stored: Counts,
    /// Whether it is on the open window's list of changed queues.
    pub(super) is_touched: bool,
    pub(super) slots: VecDeque<Slot>,
    /// Entries behind `loaded_to`, on disk only.
    pub(super) tail: u64,
    pub(super) loaded_to: u64,
    /// Highest position ever taken from the front, or back from a delay: what lies at or before it may be on disk
    /// otherwise than here, and is not left to the disk again.
    pub(super) popped_to: u64,
    /// Entries behind `loaded_to` that came back from a delay before the page that they lie in was loaded.
    pub(super) injected: BTreeSet<u64>,
    pub(super) in_flight: ByPosition<InFlight>,
    pub(super) leases: BTreeMap<u64, Lease>,
    pub(super) hot_bytes: usize,
    /// A page is being read for it.
    pub(super) is_loading: bool,
    /// Someone asked for a page while one was being read.
    pub(super) load_again: bool,
    /// Readers that found nothing, by their numbers.
    pub(super) waiters: Vec<(u64, Waker)>,
    /// Standing consumers that it has.
    pub(super) consumers: u32,
    pub(super) max_messages: Option<u64>,
    pub(super) ttl_ms: Option<i64>,
    /// The routing that reached it last: a message lands once, however many patterns match.
    pub(super) last_route: u64,
    pub(super) patterns: Vec<crate::topic::Pattern>,
}

impl QueueState {
    pub(super) fn new(name: Queue, counts: Counts) -> Self {
        Self {
            name,
            counts,
            counts_stored: counts,
            is_touched: false,
            slots: VecDeque::new(),
            tail: counts.depth.saturating_sub(counts.delayed),
            loaded_to: 0,
            popped_to: 0,
            injected: BTreeSet::new(),
            in_flight: ByPosition::default(),
            leases: BTreeMap::new(),
            hot_bytes: 0,
            is_loading: false,
            load_again: false,
            waiters: Vec::new(),
            consumers: 0,
            max_messages: None,
            ttl_ms: None,
            last_route: 0,
            patterns: Vec::new(),
        }
    }

    /// Whether only the outside reads it, which must not see what is not durable.
    pub(super) fn is_inbox(&self) -> bool {
        matches!(self.name, Queue::Inbox(_))
    }

    /// Whether new entries go to disk only.
    pub(super) fn is_paged(&self) -> bool {
        self.tail > 0 || self.slots.len() >= SLOTS_MAX || self.hot_bytes >= HOT_BYTES_MAX
    }

    /// Puts a slot that came back, or was released, where its position belongs.
    pub(super) fn insert_in_order(&mut self, slot: Slot) {
        self.hot_bytes += slot.cost();
        let at = self.slots.partition_point(|other| other.pos < slot.pos);
        self.slots.insert(at, slot);
    }

    /// Appends a new slot, of the highest position so far, to a queue that has no tail.
    pub(super) fn push_back(&mut self, slot: Slot) {
        self.hot_bytes += slot.cost();
        self.loaded_to = slot.pos;
        // All that came back from a delay lies before it.
        self.injected.clear();
        self.slots.push_back(slot);
    }

    pub(super) fn pop_front(&mut self) -> Option<Slot> {
        let slot = self.slots.pop_front()?;
        self.hot_bytes = self.hot_bytes.saturating_sub(slot.cost());
        self.popped_to = self.popped_to.max(slot.pos);
        // An idle queue keeps no memory.
        if self.slots.is_empty() && self.slots.capacity() > 64 {
            self.slots.shrink_to(16);
        }
        Some(slot)
    }

    /// Drops from memory what can be read back: whole slots where the disk has them as they are, else their bodies.
    /// Returns the bytes freed, of the memory of all queues together.
    pub(super) fn evict(&mut self, durable_window: u64) -> usize {
        if self.is_loading {
            return 0;
        }
        let mut freed = 0;
        while let Some(last) = self.slots.back() {
            let on_disk = last.window <= durable_window && last.body.is_stored();
            if last.pos <= self.popped_to || !on_disk {
                break;
            }
            if let Some(slot) = self.slots.pop_back() {
                self.hot_bytes = self.hot_bytes.saturating_sub(slot.cost());
                freed += slot.let_go();
                self.loaded_to = slot.pos - 1;
                self.tail += 1;
            }
        }
        for slot in &mut self.slots {
            let BodyRef::Hot(body) = &slot.body else { continue };
            if body.is_stored() && body.accepted_in <= durable_window {
                self.hot_bytes = self.hot_bytes.saturating_sub(body.size());
                freed += body.let_go();
                slot.body = slot.body.clone().cooled();
            }
        }
        self.slots.shrink_to(16);
        freed
    }
}
