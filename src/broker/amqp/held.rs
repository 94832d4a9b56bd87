//! A delivery that RabbitMQ handed to this process and that is not settled, and how often it was handed out.
//!
//! RabbitMQ counts returns on quorum queues, and not at all on classic ones. And it counts what this process had only
//! taken in advance, and gave back before anyone saw it. So what comes back is remembered here for a while with its
//! true count; only what is not remembered (after a restart, or from long ago) goes by RabbitMQ's.
//!
//! An acknowledgement is not confirmed, and a broker that is killed forgets the last of them. So what receivers have
//! settled is remembered as well, and dropped when it comes again.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Instant;

use lapin::message::Delivery;
use parking_lot::Mutex;

use super::channel::IntakeChannel;
use super::wire::{self, Counts, Read, Trusted};
use crate::broker::Payload;

/// Returned messages whose counts are remembered, and settled ones that are remembered as such.
const REMEMBERED_MAX: usize = 100_000;

/// Ids that are remembered of messages that were sent without one.
const IDS_REMEMBERED_MAX: usize = 10_000;

/// See the module.
pub(super) struct Held {
    /// What came.
    pub(super) payload: Payload,
    /// What it carried.
    pub(super) counts: Counts,
    /// How often it was handed out before.
    pub(super) before: u32,
    /// Where it must be settled.
    pub(super) channel: Arc<IntakeChannel>,
    /// Under this tag.
    pub(super) tag: u64,
    /// It had come back to the queue before.
    pub(super) came_back: bool,
    /// What it is remembered by.
    pub(super) key: u64,
    /// Its place among what its consumer was handed.
    pub(super) place: u64,
    /// When it came.
    pub(super) since: Instant,
    /// It was settled for good before, and RabbitMQ lost that.
    pub(super) is_gone: bool,
}

impl Held {
    /// Takes a delivery in. `queue` is where it came from.
    pub(super) fn new(
        delivery: Delivery,
        channel: &Arc<IntakeChannel>,
        queue: &str,
        trusted: Option<&Trusted>,
        memory: &ReturnMemory,
    ) -> Self {
        let Delivery { delivery_tag: tag, redelivered, properties, data, .. } = delivery;
        let read = wire::read(&properties, data, trusted);
        let key = key_of(queue, &read);
        let before = if redelivered { memory.recall(key, &read) } else { read.counts.deliveries };
        // Not only what is marked as redelivered: a classic queue that was killed may have lost the mark as well.
        let is_gone = memory.is_gone(key);
        let Read { mut payload, counts, .. } = read;
        if let (true, Payload::Foreign(foreign)) = (redelivered, &mut payload)
            && foreign.message_id.is_none()
        {
            foreign.message_id = memory.recall_id(key);
        }
        let channel = Arc::clone(channel);
        Self {
            payload,
            counts,
            before,
            channel,
            tag,
            came_back: redelivered,
            key,
            place: 0,
            since: Instant::now(),
            is_gone,
        }
    }
}

/// What a message is recognised by when it comes back: the queue, and its sender, id and time. The time tells it from a
/// later one for which the sender chose the same id, after the dedup window. Foreign ones by their bytes.
fn key_of(queue: &str, read: &Read) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    queue.hash(&mut hasher);
    match &read.payload {
        Payload::Message(message) => (&message.sender, &message.id, message.sent_at.as_millis()).hash(&mut hasher),
        Payload::Foreign(foreign) => (&foreign.body, &foreign.message_id).hash(&mut hasher),
    }
    hasher.finish()
}

/// How often messages were handed out that went back to their queues. Forgets the oldest.
#[derive(Default)]
pub(super) struct ReturnMemory {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    counts: HashMap<u64, u32>,
    order: VecDeque<u64>,
    gone: HashSet<u64>,
    gone_order: VecDeque<u64>,
    /// Those of several messages that nothing tells apart, in the order in which they went back.
    ids: HashMap<u64, VecDeque<String>>,
    ids_order: VecDeque<u64>,
}

impl Inner {
    /// Takes out the oldest id that is remembered for a key.
    fn recall_id(&mut self, key: u64) -> Option<String> {
        let Entry::Occupied(mut ids) = self.ids.entry(key) else { return None };
        let id = ids.get_mut().pop_front();
        if ids.get().is_empty() {
            ids.remove();
        }
        id
    }
}

impl ReturnMemory {
    /// Notes that a message goes back, after it was handed out so often.
    pub(super) fn note(&self, key: u64, handed_out: u32) {
        let mut inner = self.inner.lock();
        if inner.counts.insert(key, handed_out).is_none() {
            inner.order.push_back(key);
        }
        // What was recalled meanwhile is in the order still; it goes when its turn comes.
        while inner.order.len() > REMEMBERED_MAX {
            if let Some(oldest) = inner.order.pop_front() {
                inner.counts.remove(&oldest);
            }
        }
    }

    /// Notes that a delivery goes back that nobody has looked at.
    pub(super) fn note_unseen(&self, delivery: Delivery, queue: &str, trusted: Option<&Trusted>) {
        let Delivery { redelivered, properties, data, .. } = delivery;
        let read = wire::read(&properties, data, trusted);
        let key = key_of(queue, &read);
        self.note(key, if redelivered { self.recall(key, &read) } else { read.counts.deliveries });
    }

    /// Notes the id that a message without one was given, as it may have gone on although it comes back.
    pub(super) fn note_id(&self, key: u64, id: &str) {
        let mut inner = self.inner.lock();
        inner.ids.entry(key).or_default().push_back(id.to_owned());
        inner.ids_order.push_back(key);
        // What was recalled meanwhile is in the order still, as with the counts.
        while inner.ids_order.len() > IDS_REMEMBERED_MAX {
            if let Some(oldest) = inner.ids_order.pop_front() {
                inner.recall_id(oldest);
            }
        }
    }

    fn recall_id(&self, key: u64) -> Option<String> {
        self.inner.lock().recall_id(key)
    }

    /// Notes messages that were settled for good.
    pub(super) fn note_gone(&self, keys: impl IntoIterator<Item = u64>) {
        let mut inner = self.inner.lock();
        for key in keys {
            if inner.gone.insert(key) {
                inner.gone_order.push_back(key);
            }
            if inner.gone_order.len() > REMEMBERED_MAX
                && let Some(oldest) = inner.gone_order.pop_front()
            {
                inner.gone.remove(&oldest);
            }
        }
    }

    /// Takes that back: they were not handed to anybody after all.
    pub(super) fn forget_gone(&self, keys: impl IntoIterator<Item = u64>) {
        let mut inner = self.inner.lock();
        for key in keys {
            // It is in the order still, and goes when its turn comes.
            inner.gone.remove(&key);
        }
    }

    fn is_gone(&self, key: u64) -> bool {
        self.inner.lock().gone.contains(&key)
    }

    /// How often a message that came back was handed out before.
    fn recall(&self, key: u64, read: &Read) -> u32 {
        let remembered = self.inner.lock().counts.remove(&key);
        remembered.unwrap_or_else(|| read.counts.deliveries.saturating_add(read.returned.unwrap_or(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::Foreign;

    fn read(returned: Option<u32>) -> Read {
        let foreign = Foreign { body: "x".into(), message_id: None, traceparent: None };
        let counts = Counts { deliveries: 2, ..Counts::fresh() };
        Read { payload: Payload::Foreign(foreign), counts, returned }
    }

    #[test]
    fn what_is_remembered_counts_more_than_what_the_broker_says() {
        let memory = ReturnMemory::default();
        let key = key_of("a-inbox", &read(None));
        memory.note(key, 5);
        assert_eq!(memory.recall(key, &read(Some(9))), 5);
        // Recalled once, then the broker's word counts, or else the bare fact that it came back.
        assert_eq!(memory.recall(key, &read(Some(9))), 11);
        assert_eq!(memory.recall(key, &read(None)), 3);
        assert_ne!(key, key_of("b-inbox", &read(None)));
    }

    #[test]
    fn the_id_that_a_message_was_given_is_remembered_once() {
        let memory = ReturnMemory::default();
        for key in 0..=IDS_REMEMBERED_MAX as u64 {
            memory.note_id(key, "an-id");
        }
        assert_eq!(memory.recall_id(0), None, "the oldest is forgotten");
        assert_eq!(memory.recall_id(1).as_deref(), Some("an-id"));
        assert_eq!(memory.recall_id(1), None);
    }

    #[test]
    fn messages_that_nothing_tells_apart_keep_an_id_each() {
        let memory = ReturnMemory::default();
        for id in ["first", "second"] {
            memory.note_id(7, id);
        }
        assert_eq!([7, 7, 7].map(|key| memory.recall_id(key)), [Some("first".into()), Some("second".into()), None]);
        assert!(memory.inner.lock().ids.is_empty());
    }

    #[test]
    fn memory_is_bounded() {
        let memory = ReturnMemory::default();
        for key in 0..REMEMBERED_MAX as u64 + 10 {
            memory.note(key, 1);
        }
        let inner = memory.inner.lock();
        assert_eq!((inner.counts.len(), inner.order.len()), (REMEMBERED_MAX, REMEMBERED_MAX));
        assert!(!inner.counts.contains_key(&9) && inner.counts.contains_key(&10));
    }
}
