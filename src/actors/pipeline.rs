//! The pipeline: what forwarder, broadcaster and publisher have in common.
//!
//! Consumes one queue in batches, lets its [`Stage`] decide each delivery, and settles the batch before it looks at the
//! next, so that order holds. Receives [`Control`]; tells the registry when it is at work and when it waits.
//!
//! A crash loses nothing: unsettled deliveries go back to their queue. A batch that cannot be settled (the broker is
//! away, or blocked) ends the consumer, so that all that was prefetched goes back as well and comes again in order;
//! the queue is consumed anew after a backoff.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use futures_util::stream;

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
    /// Ends the present consumer's stream before its next batch.
    give_up: Rc<Cell<bool>>,
}

impl<S: Stage> Pipeline<S> {
    pub(super) fn new(stage: S, shared: Arc<Shared>, identity: Identity) -> Self {
        Self { stage, shared, identity, failures: 0, give_up: Rc::default() }
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
        let give_up = Rc::clone(&self.give_up);
        let batches = stream::unfold(consumer, move |mut consumer| {
            let give_up = give_up.get();
            async move {
                if give_up {
                    return None;
                }
                consumer.next(BATCH_MAX).await.map(|batch| (Batch(batch), consumer))
            }
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

    fn settled(&mut self, result: Result<(), BrokerError>) {
        match result {
            Ok(()) if self.failures == 0 => {}
            Ok(()) => {
                log::info!("{} is at work again", self.identity);
                self.failures = 0;
            }
            Err(error) => {
                self.log_failure("settle", &error);
                self.give_up.set(true);
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
        control.obey(&self.identity, ctx);
    }
}

/// What the consumer hands out at once.
struct Batch(Vec<Delivery>);

impl<S: Stage> StreamHandler<Batch> for Pipeline<S> {
    fn handle(&mut self, Batch(deliveries): Batch, ctx: &mut Self::Context) {
        let outcomes = deliveries
            .into_iter()
            .map(|delivery| {
                let outcome = self.stage.decide(&delivery);
                (delivery, outcome)
            })
            .collect();
        // While this waits, neither the stream nor the mailbox is looked at: the next batch follows in order, and a
        // stop comes after what was begun.
        ctx.wait(broker::settle(outcomes).into_actor(self).map(|result, this, _| this.settled(result)));
    }

    /// The queue was deleted, the broker closed, or a batch could not be settled.
    fn finished(&mut self, ctx: &mut Self::Context) {
        self.reconnect_later(ctx);
    }
}
