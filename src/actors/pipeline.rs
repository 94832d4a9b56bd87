//! The pipeline: what forwarder, broadcaster and publisher have in common.
//!
//! Consumes one queue in batches, lets its [`Stage`] decide each delivery, and settles batch after batch in the order in
//! which they came, so that order holds. It does not wait for one batch to be durable at its target before it hands over
//! the next: how much is under way is bounded by the prefetch. Receives [`Control`]; tells the registry when it is at
//! work and when it waits.
//!
//! A crash loses nothing: unsettled deliveries go back to their queue. A batch that cannot be settled (the broker is
//! away, or blocked) ends the consumer, so that all that was prefetched and not handed over goes back as well and comes
//! again in order; the queue is consumed anew after a backoff.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use futures_util::{FutureExt as _, stream};
use tokio::sync::Notify;

use super::{ChildNews, Control, Identity, Shared, supervision};
use crate::broker::{self, BrokerError, BrokerErrorKind, Consumer, Delivery, Outcome, Queue};

/// Unsettled deliveries that a pipeline may hold.
const PREFETCH: u32 = 1024;

/// Deliveries that are settled in one go. Smaller than the prefetch, so that the broker fetches the next batch
/// meanwhile.
const BATCH_MAX: usize = 256;

/// Attempts after which the backoff grows no more, so that a pipeline is back soon after a broker that was away long:
/// the seventh wait is 6.4 s.
const ATTEMPTS_COUNTED_MAX: u32 = 6;

/// What a pipeline does with the deliveries of its queue.
pub(super) trait Stage: Unpin + 'static {
    /// The queue that it consumes.
    fn queue(&self) -> Queue;

    /// How one delivery ends.
    fn decide(&self, delivery: &Delivery) -> Outcome;
}

/// An actor that moves messages from a queue on.
pub(super) struct Pipeline<S> {
    stage: S,
    shared: Arc<Shared>,
    identity: Identity,
    /// Failures since a batch was last settled.
    failures: u32,
    /// Ends the present consumer's stream.
    give_up: Rc<GiveUp>,
    /// Batches that are being settled.
    under_way: usize,
    /// What follows when nothing is under way any more.
    then: Then,
}

/// What a pipeline does once all that it had handed over is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// It goes on.
    GoOn,
    /// It consumes anew: what comes then must not be put in line before what is under way.
    Reconnect,
    /// It stops.
    Stop,
}

/// Whether a consumer is given up.
#[derive(Default)]
struct GiveUp {
    is_set: Cell<bool>,
    changed: Notify,
}

impl GiveUp {
    fn set(&self) {
        self.is_set.set(true);
        self.changed.notify_one();
    }

    /// Resolves once it is set. One at a time may wait.
    async fn wait(&self) {
        while !self.is_set.get() {
            self.changed.notified().await;
        }
    }
}

impl<S: Stage> Pipeline<S> {
    pub(super) fn new(stage: S, shared: Arc<Shared>, identity: Identity) -> Self {
        Self { stage, shared, identity, failures: 0, give_up: Rc::default(), under_way: 0, then: Then::GoOn }
    }

    fn connect(&mut self, ctx: &mut Context<Self>) {
        let (shared, queue) = (Arc::clone(&self.shared), self.stage.queue());
        let consume = async move { shared.set_up(shared.broker.consume(&queue, PREFETCH)).await };
        ctx.spawn(consume.into_actor(self).map(|result, this, ctx| match result {
            Ok(consumer) => this.attach(consumer, ctx),
            Err(error) => {
                if error.kind == BrokerErrorKind::NotFound {
                    this.shared.report(this.identity.clone(), ChildNews::QueueMissing);
                }
                this.log_failure("consume", &error);
                this.reconnect_later(ctx);
            }
        }));
    }

    fn attach(&mut self, consumer: Consumer, ctx: &mut Context<Self>) {
        self.give_up = Rc::default();
        let state = (consumer, Rc::clone(&self.give_up));
        let batches = stream::unfold(state, |(mut consumer, give_up)| async move {
            let batch = tokio::select! {
                biased;
                () = give_up.wait() => None,
                batch = consumer.next(BATCH_MAX) => batch,
            };
            batch.map(|batch| (Batch(batch), (consumer, give_up)))
        });
        ctx.add_stream(batches);
        self.shared.report_ready(&self.identity);
    }

    fn reconnect_later(&mut self, ctx: &mut Context<Self>) {
        self.shared.report_waiting(&self.identity);
        let wait: Duration = supervision::random_backoff(self.failures.min(ATTEMPTS_COUNTED_MAX));
        self.failures = self.failures.saturating_add(1);
        ctx.run_later(wait, |this, ctx| this.connect(ctx));
    }

    /// Nothing is under way any more.
    fn go_on(&mut self, ctx: &mut Context<Self>) {
        match std::mem::replace(&mut self.then, Then::GoOn) {
            Then::GoOn => {}
            Then::Reconnect => self.reconnect_later(ctx),
            Then::Stop => ctx.stop(),
        }
    }

    /// A batch was settled, or could not be. `consumer` is the one that it came from.
    fn settled(&mut self, result: Result<(), BrokerError>, consumer: &GiveUp) {
        match result {
            // What became of the others that were under way with a failed batch says nothing new.
            _ if consumer.is_set.get() => {}
            Ok(()) if self.failures == 0 => {}
            Ok(()) => {
                log::info!("{} is at work again", self.identity);
                self.failures = 0;
            }
            Err(error) => {
                self.log_failure("settle", &error);
                consumer.set();
            }
        }
    }

    /// Once for each trouble; and not for one that the broker itself reports once for all.
    fn log_failure(&self, what: &str, error: &BrokerError) {
        let known = matches!(error.kind, BrokerErrorKind::Unavailable | BrokerErrorKind::Closed);
        let level = if known || self.failures > 0 { log::Level::Debug } else { log::Level::Warn };
        log::log!(level, "{} cannot {what}: {}; it tries again", self.identity, describe(error));
    }
}

/// An error with its causes.
pub(crate) fn describe(error: &BrokerError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

impl<S: Stage> Actor for Pipeline<S> {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.connect(ctx);
    }
}

impl<S: Stage> Handler<Control> for Pipeline<S> {
    type Result = ();

    fn handle(&mut self, control: Control, ctx: &mut Self::Context) {
        if control == Control::Stop && self.under_way > 0 {
            // What is not being settled goes back.
            self.then = Then::Stop;
            self.give_up.set();
        } else {
            control.obey(&self.identity, ctx);
        }
    }
}

/// What the consumer hands out at once.
struct Batch(Vec<Delivery>);

impl<S: Stage> StreamHandler<Batch> for Pipeline<S> {
    fn handle(&mut self, Batch(deliveries): Batch, ctx: &mut Self::Context) {
        if self.give_up.is_set.get() {
            // Dropped, they go back: nothing overtakes the batch that could not be settled.
            return;
        }
        let outcomes = deliveries
            .into_iter()
            .map(|delivery| {
                let outcome = self.stage.decide(&delivery);
                (delivery, outcome)
            })
            .collect();
        // Polled here for the first time, which puts the batch in line behind those before it; actix polls what it is
        // given in no particular order.
        let mut settling = Box::pin(broker::settle(outcomes));
        let consumer = Rc::clone(&self.give_up);
        match settling.as_mut().now_or_never() {
            Some(result) => self.settled(result, &consumer),
            None => {
                self.under_way += 1;
                ctx.spawn(settling.into_actor(self).map(move |result, this, ctx| {
                    this.under_way -= 1;
                    this.settled(result, &consumer);
                    if this.under_way == 0 {
                        this.go_on(ctx);
                    }
                }));
            }
        }
    }

    /// The queue was deleted, the broker closed, or a batch could not be settled.
    fn finished(&mut self, ctx: &mut Self::Context) {
        if self.then == Then::GoOn {
            self.then = Then::Reconnect;
        }
        if self.under_way == 0 {
            self.go_on(ctx);
        }
    }
}
