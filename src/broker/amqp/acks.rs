//! Which acknowledgements of a channel can go out as one. Pure.
//!
//! `basic.ack` with `multiple` covers every delivery of its channel up to its tag, those of other consumers included.
//! So it may be used only when all of them are settled. RabbitMQ numbers deliveries from 1 without gaps, so this can be
//! known: a tag that was not settled yet is a hole.

use std::collections::BTreeSet;

/// The tags of one channel that are settled, as far as this end has sent it.
#[derive(Debug, Default)]
pub(super) struct AckTracker {
    /// Highest tag that was settled.
    highest: u64,
    /// Tags below it that were not. At most as many as the channel has deliveries outstanding.
    holes: BTreeSet<u64>,
}

/// One `basic.ack`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ack {
    /// Its delivery tag.
    pub(super) tag: u64,
    /// Whether it covers all before it.
    pub(super) multiple: bool,
}

impl AckTracker {
    /// Notes that these tags are acknowledged now, and returns the frames that say so, to be sent in this order and
    /// before any other settlement of the channel. `tags` need not be sorted.
    pub(super) fn ack(&mut self, tags: &mut [u64]) -> Vec<Ack> {
        tags.sort_unstable();
        for tag in tags.iter() {
            self.settle(*tag);
        }
        // All up to here are settled; what of it was settled earlier has been sent, so one frame covers the new ones.
        let settled_to = self.holes.first().map_or(self.highest, |hole| hole - 1);
        let covered = tags.partition_point(|tag| *tag <= settled_to);
        let mut acks = Vec::with_capacity(1 + tags.len() - covered);
        if let Some(last) = tags[..covered].last() {
            acks.push(Ack { tag: *last, multiple: covered > 1 });
        }
        acks.extend(tags[covered..].iter().map(|tag| Ack { tag: *tag, multiple: false }));
        acks
    }

    /// Notes that a tag is settled in another way, by a `basic.nack` of its own.
    pub(super) fn settle(&mut self, tag: u64) {
        if tag > self.highest {
            self.holes.extend(self.highest + 1..tag);
            self.highest = tag;
        } else {
            self.holes.remove(&tag);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one(tag: u64) -> Ack {
        Ack { tag, multiple: false }
    }

    fn up_to(tag: u64) -> Ack {
        Ack { tag, multiple: true }
    }

    #[test]
    fn what_has_no_holes_is_one_frame() {
        let mut tracker = AckTracker::default();
        assert_eq!(tracker.ack(&mut [1, 2, 3]), [up_to(3)]);
        assert_eq!(tracker.ack(&mut [4]), [one(4)]);
        assert_eq!(tracker.ack(&mut [8, 6]), [one(6), one(8)]);
        assert_eq!(tracker.ack(&mut [5]), [one(5)]);
        tracker.settle(7);
        assert_eq!(tracker.ack(&mut [10, 9]), [up_to(10)]);
    }

    proptest! {
        /// A model of RabbitMQ's side: after any sequence of settlements exactly the settled ones are gone, and no
        /// frame names a tag that is not outstanding (which would close the channel).
        #[test]
        fn frames_settle_exactly_what_was_settled(
            order in Just((1..=60_u64).collect::<Vec<_>>()).prop_shuffle(),
            sizes in prop::collection::vec(1..8_usize, 1..60),
            nacks in prop::collection::vec(any::<bool>(), 60),
        ) {
            let mut tracker = AckTracker::default();
            let mut outstanding: BTreeSet<u64> = (1..=60).collect();
            let mut expected = outstanding.clone();
            let mut rest = &order[..];
            for size in sizes {
                let (batch, left) = rest.split_at(size.min(rest.len()));
                rest = left;
                let Some(first) = batch.first() else { break };
                if nacks[usize::try_from(*first).expect("small") - 1] {
                    tracker.settle(*first);
                    prop_assert!(outstanding.remove(first));
                    expected.remove(first);
                    continue;
                }
                for ack in tracker.ack(&mut batch.to_vec()) {
                    prop_assert!(outstanding.contains(&ack.tag), "{ack:?} is unknown");
                    outstanding.retain(|tag| if ack.multiple { *tag > ack.tag } else { *tag != ack.tag });
                }
                batch.iter().for_each(|tag| { expected.remove(tag); });
                // A nacked batch settles only its first; the others stay outstanding.
                prop_assert_eq!(&outstanding, &expected);
            }
        }
    }
}
