//! The task behind an inbox that is pulled: subscribes while there are pulls, ends leases, gives back what is not
//! wanted, and ends when there is nothing left to do.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;

use super::{Inner, Phase, Puller};
use crate::broker::amqp::held::Held;

/// For how long after a pull the buffer is kept for the next one. Short: what is in it no AMQP reader can get.
pub(super) const LINGER: Duration = Duration::from_millis(300);

/// Deliveries that the consumer may have unsettled, at least and at most.
const PREFETCH_MIN: usize = 8;
const PREFETCH_MAX: usize = 1000;

/// Bytes that a buffer should hold at most: bounds the prefetch by how long the messages are.
const BUFFER_BYTES: usize = 16 << 20;

/// Messages that may be taken in to come to those that leases wait for: then they are given up.
const RENEWED_BEHIND_MAX: usize = 4 * PREFETCH_MAX;

/// Time before a failed subscription is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(200);

/// What is to be done next.
enum Next {
    /// Subscribe, with this prefetch.
    Subscribe(u16),
    /// Nothing before this time, unless something happens.
    Wait(Instant),
    /// Nothing any more.
    Stop,
}

pub(super) async fn run(puller: Arc<Puller>) {
    let mut retry_at = Instant::now();
    loop {
        let until = match puller.step(retry_at) {
            Next::Stop => return,
            Next::Subscribe(prefetch) => {
                if std::mem::take(&mut puller.inner.lock().was_cancelled) {
                    // To subscribe to a queue that is not there would close the channel under all its consumers.
                    log::warn!("RabbitMQ ended the consumer of {}; the queue is declared again", puller.name);
                    puller.shared.repair(puller.client.upgrade().as_deref()).await;
                }
                let intake = puller.shared.intake(&puller.queue);
                let most = largest_prefetch(&puller.inner.lock()).max(prefetch);
                match intake.subscribe(&puller.name, prefetch, most).await {
                    Some(pending) => puller.inner.lock().phase = Phase::Subscribing(pending),
                    None => return puller.inner.lock().is_running = false,
                }
                continue;
            }
            Next::Wait(until) => until,
        };
        tokio::select! {
            failed = std::future::poll_fn(|context| puller.poll(context)) => {
                puller.changed.0.notify_waiters();
                if let Some(error) = failed {
                    retry_at = Instant::now() + RETRY_AFTER;
                    if !puller.is_gone() && !puller.shared.is_closed() {
                        log::debug!("consume {}: {error}; trying again", puller.name);
                        puller.shared.repair_queue(&puller.queue, &error).await;
                    }
                }
            }
            () = puller.work.notified() => {}
            () = tokio::time::sleep_until(until) => {}
        }
    }
}

impl Puller {
    /// Ready when anything came, or a phase ended; with the error of a subscription that failed.
    fn poll(&self, context: &mut Context<'_>) -> Poll<Option<lapin::Error>> {
        let mut inner = self.inner.lock();
        let is_pulled = inner.pulls > 0;
        match &mut inner.phase {
            Phase::Idle => Poll::Pending,
            // They look themselves.
            Phase::Subscribed(_) if is_pulled => Poll::Pending,
            Phase::Subscribed(_) => {
                if self.take_in(&mut inner, Some(context)) {
                    Poll::Ready(None)
                } else {
                    Poll::Pending
                }
            }
            Phase::Ending(ended) => std::pin::Pin::new(ended).poll(context).map(|_| {
                inner.phase = Phase::Idle;
                None
            }),
            Phase::Subscribing(pending) => {
                let Poll::Ready(answer) = std::pin::Pin::new(pending).poll(context) else { return Poll::Pending };
                match answer {
                    Ok(Ok(subscription)) => {
                        inner.store.begin();
                        inner.is_partial = true;
                        inner.phase = Phase::Subscribed(Box::new(subscription));
                        Poll::Ready(None)
                    }
                    Ok(Err(error)) => {
                        inner.phase = Phase::Idle;
                        Poll::Ready(Some(error))
                    }
                    // The channel's task has ended, and so will everything.
                    Err(_) => {
                        inner.phase = Phase::Idle;
                        Poll::Ready(None)
                    }
                }
            }
        }
    }

    /// Does what is due.
    fn step(&self, retry_at: Instant) -> Next {
        let now = Instant::now();
        let mut inner = self.inner.lock();
        let ended = self.is_gone() || self.shared.is_closed();
        inner.store.drop_dead();
        if inner.store.expire(now.into_std()) {
            self.changed.0.notify_waiters();
        }
        inner.store.renew(now.into_std(), &mut |held| self.shared.give_back(held));
        if ended {
            // RabbitMQ counts them as outstanding on the channel although their queue is gone.
            inner.store.end_all_leases().iter().for_each(|held| self.shared.give_back(held));
        }
        let renewing = inner.store.renewing();
        let is_wanted = !ended && (inner.pulls > 0 || renewing > 0);
        let lingers_until = inner.lingers_until();
        let is_left = !is_wanted && (ended || now >= lingers_until);
        let prefetch = self.prefetch_with(&inner, renewing);
        let is_short = match &inner.phase {
            // Leases wait for messages that are behind what it has brought.
            Phase::Subscribed(subscription) if renewing > 0 => {
                inner.store.waiting() < RENEWED_BEHIND_MAX
                    && inner.store.outstanding() >= usize::from(subscription.prefetch)
            }
            // Too few for a pull, and RabbitMQ gives no more on this one: because leases take up its prefetch, or
            // because it was meant for smaller pulls. While it is not full it brings whatever there is; and to end it
            // then would cost the order, as RabbitMQ gives back by itself, in front of all, what is on its way.
            Phase::Subscribed(subscription) => {
                inner.pulls > 0
                    && inner.store.waiting() < inner.wanted.min(usize::from(prefetch))
                    && inner.store.outstanding() >= usize::from(subscription.prefetch)
            }
            _ => false,
        };
        if is_left {
            let outstanding = inner.store.outstanding();
            let buffer = inner.store.take_while(|_| true);
            self.unsubscribe(&mut inner, buffer, outstanding);
        } else if is_short {
            let outstanding = inner.store.outstanding();
            self.unsubscribe(&mut inner, Vec::new(), outstanding);
        }
        if is_wanted && matches!(inner.phase, Phase::Idle) && now >= retry_at {
            return Next::Subscribe(prefetch);
        }
        let is_idle = matches!(inner.phase, Phase::Idle) && inner.store.len() == 0;
        if is_idle && !is_wanted || ended && matches!(inner.phase, Phase::Idle) {
            inner.is_running = false;
            return Next::Stop;
        }
        let mut until = now + self.shared.options.look_every();
        if let Some(deadline) = inner.store.next_deadline() {
            until = until.min(Instant::from_std(deadline));
        }
        // Where one pull follows the other as well: it is then not woken by each.
        if now < lingers_until {
            until = until.min(lingers_until);
        }
        if is_wanted && matches!(inner.phase, Phase::Idle) {
            until = until.min(retry_at);
        }
        inner.looks_at = until;
        Next::Wait(until)
    }

    /// The prefetch for the present pulls; for leases that wait for their messages, all of these and what may be in front
    /// of them.
    fn prefetch_with(&self, inner: &Inner, renewing: usize) -> u16 {
        let prefetch = prefetch(inner);
        if renewing == 0 {
            return prefetch;
        }
        let returned = self.shared.returned.count(&self.name).unwrap_or(0);
        prefetch.max(u16::try_from(renewing + returned + PREFETCH_MIN).unwrap_or(u16::MAX))
    }

    /// Ends the subscription. The buffer, and what it was handed and nobody looked at, goes back.
    fn unsubscribe(&self, inner: &mut Inner, buffer: Vec<Held>, outstanding: usize) {
        let subscription = match std::mem::replace(&mut inner.phase, Phase::Idle) {
            Phase::Subscribed(subscription) => *subscription,
            other => {
                inner.phase = other;
                buffer.iter().for_each(|held| self.shared.give_back(held));
                return;
            }
        };
        let (sender, ended) = tokio::sync::oneshot::channel();
        inner.phase = Phase::Ending(ended);
        self.shared.end_subscription(&self.queue, subscription, buffer, outstanding, Some(sender));
    }
}

/// The prefetch that the present pulls ask for.
pub(super) fn prefetch(inner: &Inner) -> u16 {
    let wanted = u16::try_from(inner.wanted.clamp(PREFETCH_MIN, PREFETCH_MAX)).expect("the bound fits");
    wanted.min(largest_prefetch(inner))
}

/// The most that may be handed over at a time, as long as messages are.
fn largest_prefetch(inner: &Inner) -> u16 {
    let fitting = BUFFER_BYTES / inner.store.average_size().max(1);
    u16::try_from(fitting.clamp(PREFETCH_MIN, PREFETCH_MAX)).expect("the bound fits")
}
