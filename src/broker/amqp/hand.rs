//! What a consumer holds: what waits here, what is handed out, what is on its way on, and in which order.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Instant;

use super::consumer::Rest;
use super::held::Held;
use super::intake::Subscription;
use super::window::Broken;

/// See the module.
#[derive(Default)]
pub(super) struct State {
    pub(super) subscription: Option<Subscription>,
    /// What the subscription before had on its way.
    pub(super) rest: Option<Rest>,
    /// RabbitMQ may have handed over what cannot be seen here yet: to a subscription that has just begun, or by one that
    /// is being made anew. Since then.
    pub(super) in_transit: Option<Instant>,
    /// Whether it may keep what comes back: until it is paused or dropped.
    pub(super) is_open: bool,
    /// Handed to this process, not to anybody in it, in the order in which it came.
    pub(super) buffer: VecDeque<Held>,
    /// Handed out and not settled.
    pub(super) unsettled: HashMap<u64, Held>,
    /// The same, but given back to be taken again; by what they are recognised by.
    pub(super) renewing: HashMap<u64, Renewing>,
    /// The places of those that are being moved on (settled, and not acknowledged yet), and since when they are in the
    /// queue, in seconds since the epoch.
    pub(super) moving: BTreeMap<u64, u64>,
    /// The place of the first that the present subscription has brought.
    pub(super) first_place: u64,
    pub(super) next_place: u64,
    pub(super) next_tag: u64,
    pub(super) order: Order,
    /// Something of an earlier order may still be on its way, or come back.
    pub(super) is_stale: bool,
    /// RabbitMQ ended the subscription although the channel is there: the queue may be gone.
    pub(super) was_cancelled: bool,
}

/// A delivery that is handed out still, and comes again to be acknowledged.
pub(super) struct Renewing {
    pub(super) tag: u64,
    /// How often it was handed out before.
    pub(super) before: u32,
    /// Whether it was settled for good meanwhile.
    pub(super) is_complete: bool,
    /// When somebody else has got it.
    pub(super) until: Instant,
}

/// What keeps later deliveries from being forwarded before an earlier one that could not be.
#[derive(Clone, Default)]
pub(super) struct Order {
    /// Set once such a one is on its way back.
    pub(super) broken: Broken,
    /// The first tag that is handed out after it.
    pub(super) from: u64,
}

impl Order {
    /// Whether the delivery was handed out since the last one came back that could not be forwarded.
    pub(super) fn covers(&self, tag: u64) -> bool {
        tag >= self.from
    }
}

impl State {
    /// What RabbitMQ has handed out and waits for.
    pub(super) fn outstanding(&self) -> usize {
        self.buffer.len() + self.unsettled.len() + self.moving.len()
    }

    /// The same of the present subscription: what counts against its prefetch.
    pub(super) fn outstanding_here(&self) -> usize {
        let is_here = |held: &&Held| held.place >= self.first_place;
        let waiting = self.buffer.iter().chain(self.unsettled.values()).filter(is_here).count();
        waiting + self.moving.range(self.first_place..).count()
    }

    /// A delivery has come. Returns one that was settled meanwhile.
    pub(super) fn arrive(&mut self, held: Held) -> Option<Held> {
        let held = Held { place: self.next_place, ..held };
        self.next_place += 1;
        match self.renewing.remove(&held.key) {
            None => self.buffer.push_back(held),
            Some(renewing) if renewing.is_complete => return Some(held),
            // Whoever was handed it has it still.
            Some(Renewing { tag, before, .. }) => drop(self.unsettled.insert(tag, Held { before, ..held })),
        }
        None
    }

    /// Whether something may come back that is in front of whatever would be handed out.
    pub(super) fn awaits_stale(&mut self) -> bool {
        let from = self.order.from;
        self.is_stale = self.is_stale && (!self.moving.is_empty() || self.unsettled.keys().any(|tag| *tag < from));
        self.is_stale
    }

    /// One that was handed out goes back to its place.
    pub(super) fn put_back(&mut self, held: Held) {
        let at = self.buffer.partition_point(|other| other.place < held.place);
        self.buffer.insert(at, held);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_handed_out_while_an_earlier_order_is_on_its_way() {
        let mut state = State::default();
        assert!(!state.awaits_stale());
        (state.is_stale, state.order.from) = (true, 5);
        state.moving.extend([(1, 0), (2, 0)]);
        assert!(state.awaits_stale());
        state.moving.remove(&1);
        assert!(state.awaits_stale());
        state.moving.clear();
        assert!(!state.awaits_stale());
        // What goes on after that is of the order that is.
        state.moving.insert(3, 0);
        assert!(!state.awaits_stale());
    }
}
