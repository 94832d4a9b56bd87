//! Standing consumers of a queue: they take from the front in batches, and settle under the broker's lock.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::Poll;

use async_trait::async_trait;

use super::Shared;
use super::core::Core;
use super::queue::{BodyRef, Holder, Slot};
use crate::broker::{
    BrokerError, BrokerErrorKind, Consume, DeadReason, Delivery, Outcome, Payload, Queue, Settle, Settlement,
};
use crate::telemetry::Step;
use crate::time::Timestamp;

/// Bytes of messages in one batch, about.
const BATCH_BYTES_MAX: usize = 4 << 20;

/// The side that waits for deliveries.
pub(super) struct EmbeddedConsumer {
    source: Arc<Source>,
}

/// The side that settles; shared by all its deliveries.
struct Source {
    shared: Arc<Shared>,
    queue: u32,
    name: Queue,
    number: u64,
    holder: Holder,
    prefetch: AtomicU32,
    unsettled: AtomicU32,
}

impl EmbeddedConsumer {
    pub(super) fn new(shared: Arc<Shared>, name: Queue, prefetch: u32) -> Result<Self, BrokerError> {
        let (queue, number) = {
            let mut core = shared.core.lock();
            let queue = core.by_name.get(&name).copied();
            let queue = queue
                .ok_or_else(|| BrokerError::new(BrokerErrorKind::NotFound, format!("consume from queue {name}")))?;
            if let Some(queue) = core.queues.get_mut(&queue) {
                queue.consumers += 1;
            }
            (queue, core.holder_number())
        };
        let source = Source {
            shared,
            queue,
            name,
            number,
            holder: Holder::Consumer(number),
            prefetch: AtomicU32::new(prefetch),
            unsettled: AtomicU32::new(0),
        };
        Ok(Self { source: Arc::new(source) })
    }

    fn take(&self, core: &mut Core, max: usize) -> Vec<(Payload, Slot)> {
        let source = &self.source;
        let credit = source.prefetch.load(Ordering::Relaxed).saturating_sub(source.unsettled.load(Ordering::Relaxed));
        let max = max.min(credit as usize);
        if max == 0 {
            return Vec::new();
        }
        let slots = core.take(source.queue, max, BATCH_BYTES_MAX, Timestamp::now().as_millis());
        source.unsettled.fetch_add(u32::try_from(slots.len()).unwrap_or(u32::MAX), Ordering::Relaxed);
        let outside = matches!(source.name, Queue::Inbox(_));
        let mut taken = Vec::with_capacity(slots.len());
        for slot in slots {
            let BodyRef::Hot(body) = &slot.body else { unreachable!("only slots with a body in memory are taken") };
            let payload = body.payload.clone();
            let mut held = slot.clone();
            if outside {
                // The delivery holds the message; the queue need not. Pipelines do need theirs, to forward it.
                held.body = held.body.cooled();
            }
            core.hand_out(source.queue, held, source.holder);
            taken.push((payload, slot));
        }
        taken
    }
}

impl Drop for EmbeddedConsumer {
    fn drop(&mut self) {
        self.source.shared.with_core(|core| {
            core.stop_waiting(self.source.queue, self.source.number);
            if let Some(queue) = core.queues.get_mut(&self.source.queue) {
                queue.consumers = queue.consumers.saturating_sub(1);
            }
        });
    }
}

#[async_trait]
impl Consume for EmbeddedConsumer {
    async fn next(&mut self, max: usize) -> Option<Vec<Delivery>> {
        let source = Arc::clone(&self.source);
        let taken = poll_fn(|context| {
            source.shared.with_core(|core| {
                if core.is_closed || !core.queues.contains_key(&source.queue) {
                    return Poll::Ready(None);
                }
                let taken = self.take(core, max);
                if taken.is_empty() {
                    core.wait(source.queue, source.number, context.waker());
                    return Poll::Pending;
                }
                Poll::Ready(Some(taken))
            })
        })
        .await?;
        let deliver = |(payload, slot): (Payload, Slot)| {
            let settle: Arc<dyn Settle> = Arc::clone(&self.source) as Arc<dyn Settle>;
            Delivery::new(payload, slot.deliveries, slot.attempts, slot.pos, settle)
        };
        Some(taken.into_iter().map(deliver).collect())
    }

    fn set_prefetch(&self, prefetch: u32) {
        self.source.prefetch.store(prefetch, Ordering::Relaxed);
        self.source.wake();
    }
}

impl Source {
    /// Lets the consumer look again: it has credit that it did not have.
    fn wake(&self) {
        self.shared.with_core(|core| core.wake_readers(self.queue));
    }

    /// Counts a delivery as settled; true when the consumer had no credit before.
    fn regain_credit(&self, settled: u32) -> bool {
        let before = self.unsettled.fetch_sub(settled, Ordering::Relaxed);
        before >= self.prefetch.load(Ordering::Relaxed)
    }

    fn apply(&self, core: &mut Core, settlement: &Settlement, now_ms: i64) {
        let pos = settlement.tag;
        match &settlement.outcome {
            Outcome::Complete => {
                let held = core.complete(self.queue, pos, self.holder).is_some();
                if let (true, Queue::Inbox(client), Payload::Message(message)) = (held, &self.name, &settlement.payload)
                {
                    self.shared.telemetry.metrics.delivered.inc();
                    core.report(message, Step::Delivered(client.clone()));
                }
            }
            Outcome::Forward(target, message) => {
                // Nothing happens when it is not held any more: then it came back before.
                if let Some(slot) = core.take_in_flight(self.queue, pos, self.holder) {
                    core.forward(self.queue, &slot, message, *target, now_ms);
                }
            }
            Outcome::Requeue => {
                core.give_back(self.queue, pos, self.holder);
            }
            Outcome::Delay { delay, attempts } => {
                if let Some(slot) = core.take_in_flight(self.queue, pos, self.holder) {
                    let delay_ms = i64::try_from(delay.as_millis()).unwrap_or(i64::MAX);
                    core.delay(self.queue, slot, now_ms.saturating_add(delay_ms), *attempts);
                }
            }
            Outcome::Dead { reason, attempts } => self.bury(core, settlement, *reason, *attempts, now_ms),
        }
    }

    fn bury(&self, core: &mut Core, settlement: &Settlement, reason: DeadReason, attempts: u32, now_ms: i64) {
        let pos = settlement.tag;
        let inbox = match &self.name {
            Queue::Outbox(client) | Queue::Notify(client) | Queue::Inbox(client) => core.client(client),
            Queue::Publish | Queue::Unrouted => None,
        };
        let Some(queues) = inbox else {
            log::error!("a message in {} cannot be a dead letter: no client owns it", self.name);
            core.give_back(self.queue, pos, self.holder);
            return;
        };
        if let Some(mut slot) = core.take_in_flight(self.queue, pos, self.holder) {
            // Tried again, its body is on the disk only; what is told of its end is known here.
            slot.leased = slot.leased.or_else(|| settlement.payload.message().cloned());
            core.bury(self.queue, queues.inbox, &slot, reason, attempts, now_ms);
        }
    }
}

#[async_trait]
impl Settle for Source {
    /// Completions and forwards take effect in memory at once: what they lead to is seen outside only when it is
    /// durable, and windows commit in order. Delays and dead letters are no less safe than the entry was.
    async fn settle(&self, settlements: Vec<Settlement>) -> Result<(), BrokerError> {
        let now_ms = Timestamp::now().as_millis();
        self.shared.with_core(|core| {
            for settlement in &settlements {
                self.apply(core, settlement, now_ms);
            }
            if self.regain_credit(u32::try_from(settlements.len()).unwrap_or(u32::MAX)) {
                core.wake_readers(self.queue);
            }
        });
        Ok(())
    }

    fn give_back(&self, tag: u64) {
        self.shared.with_core(|core| {
            core.give_back(self.queue, tag, self.holder);
            if self.regain_credit(1) {
                core.wake_readers(self.queue);
            }
        });
    }
}
