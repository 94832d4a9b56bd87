//! The pipeline: what forwarder, broadcaster and publisher have in common.
//!
//! Consumes one queue in batches, lets its [`Stage`] decide each delivery, and settles the batches in the order in which
//! they came, so that order holds. A batch does not wait until the one before is safe at its target: how many are on
//! their way is bounded. Receives [`Control`]; tells the registry when it is at work and when it waits.
//!
//! A crash loses nothing: unsettled deliveries go back to their queue. A batch that cannot be settled (the broker is
//! away, or blocked) ends the consumer, so that all that was prefetched goes back as well and comes again in order; the
//! queue is consumed anew after a backoff. A stop, and a new consumer, wait for what is on its way: nothing overtakes it.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use futures_util::future::LocalBoxFuture;
use futures_util::{FutureExt as _, StreamExt as _, stream};
use tokio::sync::oneshot;

use super::{ChildNews, Control, Identity, Shared, supervision};
use crate::broker::{self, BrokerError, BrokerErrorKind, Consumer, Delivery, Outcome, Queue};

/// Unsettled deliveries that a pipeline may hold.
const PREFETCH: u32 = 1024;

/// Deliveries that are settled in one go. Smaller than the prefetch, so that the broker fetches the next batch
/// meanwhile.
const BATCH_MAX: usize = 256;

/// Batches that may be on their way to their target at once.
const BATCHES_AT_ONCE: usize = 24;

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
    stage: Rc<S>,
    shared: Arc<Shared>,
    identity: Identity,
    /// Failures since a batch was last settled.
    failures: u32,
    /// There is a consumer, or batches of it are on their way.
    is_attached: bool,
    /// While it is there, the consumer is asked for more.
    goes_on: Option<oneshot::Sender<()>>,
    /// Told to stop while it was attached.
    is_stopping: bool,
}

impl<S: Stage> Pipeline<S> {
    pub(super) fn new(stage: S, shared: Arc<Shared>, identity: Identity) -> Self {
        Self {
            stage: Rc::new(stage),
            shared,
            identity,
            failures: 0,
            is_attached: false,
            goes_on: None,
            is_stopping: false,
        }
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
        let (goes_on, given_up) = oneshot::channel();
        (self.is_attached, self.goes_on) = (true, Some(goes_on));
        let batches = stream::unfold(consumer, |mut consumer| async move {
            consumer.next(BATCH_MAX).await.map(|batch| (batch, consumer))
        });
        let stage = Rc::clone(&self.stage);
        let settled = batches.take_until(given_up).map(move |batch| settle(&*stage, batch)).buffered(BATCHES_AT_ONCE);
        ctx.add_stream(settled.map(Settled));
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
            // What became of the others that were on their way with a failed batch says nothing new.
            _ if self.goes_on.is_none() => {}
            Ok(()) if self.failures == 0 => {}
            Ok(()) => {
                log::info!("{} is at work again", self.identity);
                self.failures = 0;
            }
            Err(error) => {
                self.log_failure("settle", &error);
                self.goes_on = None;
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
        if control == Control::Stop && self.is_attached {
            (self.is_stopping, self.goes_on) = (true, None);
        } else {
            control.obey(&self.identity, ctx);
        }
    }
}

/// Decides a batch and hands it over.
fn settle<S: Stage>(stage: &S, batch: Vec<Delivery>) -> LocalBoxFuture<'static, Result<(), BrokerError>> {
    let decided = batch.into_iter().map(|delivery| {
        let outcome = stage.decide(&delivery);
        (delivery, outcome)
    });
    let mut settling = broker::settle(decided.collect()).boxed_local();
    // The first poll puts the batch in line, behind those before it.
    match settling.as_mut().now_or_never() {
        Some(result) => std::future::ready(result).boxed_local(),
        None => settling,
    }
}

/// What became of a batch.
struct Settled(Result<(), BrokerError>);

impl<S: Stage> StreamHandler<Settled> for Pipeline<S> {
    fn handle(&mut self, Settled(result): Settled, _: &mut Self::Context) {
        self.settled(result);
    }

    /// The queue was deleted, the broker closed, a batch could not be settled, or it is to stop; and nothing is on its
    /// way any more.
    fn finished(&mut self, ctx: &mut Self::Context) {
        (self.is_attached, self.goes_on) = (false, None);
        if self.is_stopping {
            ctx.stop();
        } else {
            self.reconnect_later(ctx);
        }
    }
}
