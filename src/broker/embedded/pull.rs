//! Pulling from an inbox: hand over at once, or lease and settle by receipt.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use super::Shared;
use super::core::Core;
use super::queue::{BodyRef, Holder, Slot};
use crate::broker::{BrokerError, BrokerErrorKind, DeadReason, Payload, PullMode, PullOutcome, Pulled, Receipt};
use crate::client::ClientId;
use crate::telemetry::Step;
use crate::time::Timestamp;

/// Bytes of messages that one pull hands over, about; more stay for the next.
const PULL_BYTES_MAX: usize = 16 << 20;

/// Messages of one inbox that may be leased at once.
pub(super) const LEASED_MAX: usize = if cfg!(test) { 40 } else { 100_000 };

/// A receipt: position and lease, in hexadecimal.
fn receipt(pos: u64, lease: u64) -> Receipt {
    Receipt(format!("{pos:x}-{lease:x}"))
}

fn parse_receipt(receipt: &Receipt) -> Option<(u64, Holder)> {
    let (pos, lease) = receipt.0.split_once('-')?;
    Some((u64::from_str_radix(pos, 16).ok()?, Holder::Lease(u64::from_str_radix(lease, 16).ok()?)))
}

fn no_inbox(client: &ClientId) -> BrokerError {
    BrokerError::new(BrokerErrorKind::NotFound, format!("pull from queue {client}-inbox"))
}

/// A pull that may be waiting: it is forgotten when it ends, however it ends.
struct Waiting<'a> {
    shared: &'a Shared,
    inbox: u32,
    reader: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.shared.with_core(|core| core.stop_waiting(self.inbox, self.reader));
    }
}

/// What a pull took under the lock.
struct Taken {
    slots: Vec<Slot>,
    lease: Option<u64>,
    /// When the removal is durable ([`PullMode::Auto`]).
    removed: Option<tokio::sync::oneshot::Receiver<Result<(), BrokerError>>>,
}

fn take(core: &mut Core, inbox: u32, max: usize, mode: PullMode) -> Option<Taken> {
    let leased: usize = core.queues.get(&inbox).map_or(0, |queue| queue.in_flight.len());
    let max = max.min(LEASED_MAX.saturating_sub(leased));
    let slots = core.take(inbox, max, PULL_BYTES_MAX, Timestamp::now().as_millis());
    if slots.is_empty() {
        return None;
    }
    Some(match mode {
        PullMode::Auto => {
            core.finish_taken(inbox, &slots);
            Taken { slots, lease: None, removed: Some(core.wait_for_open()) }
        }
        PullMode::Lease(lease) => {
            let number = core.lease(inbox, &slots, lease);
            Taken { slots, lease: Some(number), removed: None }
        }
    })
}

pub(super) async fn pull(
    shared: &Shared,
    client: &ClientId,
    max: usize,
    wait: Duration,
    mode: PullMode,
) -> Result<Vec<Pulled>, BrokerError> {
    let (inbox, reader) = {
        let mut core = shared.core.lock();
        (core.client(client).ok_or_else(|| no_inbox(client))?.inbox, core.holder_number())
    };
    let _waiting = Waiting { shared, inbox, reader };
    let try_take = |waker: Option<&std::task::Waker>| {
        shared.with_core(|core| {
            if core.is_closed {
                return Some(Err(BrokerError::new(BrokerErrorKind::Closed, format!("pull from queue {client}-inbox"))));
            }
            if !core.queues.contains_key(&inbox) {
                return Some(Err(no_inbox(client)));
            }
            let taken = take(core, inbox, max, mode);
            if taken.is_none()
                && let Some(waker) = waker
            {
                core.wait(inbox, reader, waker);
            }
            taken.map(Ok)
        })
    };
    // The first look waits a moment even without `wait`: the front may have to be read from disk first.
    let patience = if wait.is_zero() && shared.has_backlog(inbox) { Duration::from_secs(1) } else { wait };
    let taken = if patience.is_zero() {
        try_take(None)
    } else {
        let look = poll_fn(|context| match try_take(Some(context.waker())) {
            Some(result) => Poll::Ready(result),
            None => Poll::Pending,
        });
        tokio::time::timeout(patience, look).await.ok()
    };
    let Some(taken) = taken.transpose()? else { return Ok(Vec::new()) };
    if let Some(removed) = taken.removed {
        // A failed commit is tried again until it holds; the messages have been taken in any case.
        if let Ok(Err(error)) = removed.await {
            log::warn!("{client}: messages handed over before their removal was durable: {error}");
        }
        shared.telemetry.metrics.delivered.inc_by(taken.slots.len() as u64);
    }
    Ok(hand_over(shared, client, taken.slots, taken.lease))
}

fn hand_over(shared: &Shared, client: &ClientId, slots: Vec<Slot>, lease: Option<u64>) -> Vec<Pulled> {
    let mut pulled = Vec::with_capacity(slots.len());
    for slot in slots {
        let BodyRef::Hot(body) = &slot.body else { unreachable!("only slots with a body in memory are taken") };
        let Payload::Message(message) = &body.payload else {
            log::error!("{client}: the inbox held something that is not a message; it is left out");
            continue;
        };
        if lease.is_none() {
            shared.telemetry.traces.record(message, Step::Delivered(client.clone()));
        }
        pulled.push(Pulled {
            message: message.clone(),
            deliveries: slot.deliveries,
            receipt: lease.map(|lease| receipt(slot.pos, lease)),
        });
    }
    pulled
}

pub(super) async fn settle(
    shared: &Shared,
    client: &ClientId,
    receipts: Vec<Receipt>,
    outcome: PullOutcome,
) -> Result<Vec<Receipt>, BrokerError> {
    let now_ms = Timestamp::now().as_millis();
    let mut unknown = Vec::new();
    let mut acked = 0;
    let durable = shared.with_core(|core| {
        let inbox = core.client(client).ok_or_else(|| no_inbox(client))?.inbox;
        for receipt in receipts {
            let held = parse_receipt(&receipt).and_then(|(pos, holder)| core.take_in_flight(inbox, pos, holder));
            let Some(slot) = held else {
                unknown.push(receipt);
                continue;
            };
            match outcome {
                PullOutcome::Ack => {
                    acked += 1;
                    if let Some(message) = &slot.leased {
                        core.report(message, Step::Delivered(client.clone()));
                    }
                    core.finish_taken(inbox, std::slice::from_ref(&slot));
                }
                PullOutcome::Nack(None) => core.return_slot(inbox, slot),
                PullOutcome::Nack(Some(delay)) => {
                    let delay_ms = i64::try_from(delay.as_millis()).unwrap_or(i64::MAX);
                    let attempts = slot.attempts;
                    core.delay(inbox, slot, now_ms.saturating_add(delay_ms), attempts);
                }
                PullOutcome::Reject => {
                    let attempts = slot.deliveries;
                    core.bury(inbox, inbox, &slot, DeadReason::Rejected, attempts, now_ms);
                }
            }
        }
        Ok(core.wait_for_open())
    })?;
    shared.telemetry.metrics.delivered.inc_by(acked);
    shared.committed(durable, "settle pulled messages").await?;
    Ok(unknown)
}
