//! The subscriber: holds a client's queues and its inbox's bindings.
//!
//! Receives [`Rebind`] (from the registry, when the patterns change), [`Redeclare`] (when a queue has gone missing) and
//! [`Control`]. Tells the registry when the inbox is bound. At its start it declares and binds unless that has just been
//! done; what fails is tried again with backoff until it is done.
//!
//! A crash loses nothing: the broker holds the bindings, and the directory the patterns that the next life binds.

use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;

use super::pipeline::describe;
use super::{Control, Identity, Shared, supervision};
use crate::broker::{BrokerError, BrokerErrorKind};
use crate::client::ClientId;
use crate::topic::Pattern;

/// Attempts after which the backoff grows no more.
const ATTEMPTS_COUNTED_MAX: u32 = 6;

/// Makes these, and only these, the inbox's bindings. Answers when it is done or has failed; after a failure the
/// subscriber tries again by itself, with whatever patterns it was given last.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), BrokerError>")]
pub(super) struct Rebind(pub(super) Vec<Pattern>);

/// Declares the queues and binds the inbox again.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub(super) struct Redeclare;

/// See the module.
pub(super) struct Subscriber {
    client: ClientId,
    patterns: Vec<Pattern>,
    /// Whether queues and bindings are known to be there.
    done: bool,
    retrying: bool,
    failures: u32,
    shared: Arc<Shared>,
    identity: Identity,
}

impl Subscriber {
    /// A subscriber of `client`; `done` says that its queues are there and bound to `patterns`.
    pub(super) fn new(
        client: ClientId,
        patterns: Vec<Pattern>,
        done: bool,
        shared: Arc<Shared>,
        identity: Identity,
    ) -> Self {
        Self { client, patterns, done, retrying: false, failures: 0, shared, identity }
    }

    /// Declares and binds. The mailbox waits meanwhile, so that changes are carried out one after the other.
    fn restore(&mut self, ctx: &mut Context<Self>) {
        let (shared, client, patterns) = (Arc::clone(&self.shared), self.client.clone(), self.patterns.clone());
        let work = async move {
            shared
                .set_up(async {
                    let limits = shared.directory.get(client.as_str()).map(|entry| entry.record.limits.clone());
                    // Not in the directory: it is being deleted, and nothing is to be declared any more.
                    let Some(limits) = limits else { return Ok(()) };
                    shared.broker.declare_client(&client, &limits).await?;
                    shared.broker.bind(&client, &patterns).await
                })
                .await
        };
        ctx.wait(work.into_actor(self).map(|result, this, ctx| this.note(&result, ctx)));
    }

    fn note(&mut self, result: &Result<(), BrokerError>, ctx: &mut Context<Self>) {
        match result {
            Ok(()) => {
                self.done = true;
                self.failures = 0;
                self.shared.report_ready(&self.identity);
            }
            Err(error) => {
                let known = matches!(error.kind, BrokerErrorKind::Unavailable | BrokerErrorKind::Closed);
                let level = if known || self.failures > 0 { log::Level::Debug } else { log::Level::Warn };
                log::log!(level, "{} cannot bind: {}; it tries again", self.identity, describe(error));
                self.done = false;
                self.shared.report_waiting(&self.identity);
                self.retry_later(ctx);
            }
        }
    }

    fn retry_later(&mut self, ctx: &mut Context<Self>) {
        if self.retrying {
            return;
        }
        self.retrying = true;
        let wait: Duration = supervision::random_backoff(self.failures.min(ATTEMPTS_COUNTED_MAX));
        self.failures = self.failures.saturating_add(1);
        ctx.run_later(wait, |this, ctx| {
            this.retrying = false;
            if !this.done {
                this.restore(ctx);
            }
        });
    }
}

impl Actor for Subscriber {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        if self.done {
            self.shared.report_ready(&self.identity);
        } else {
            self.restore(ctx);
        }
    }
}

impl Handler<Rebind> for Subscriber {
    type Result = AtomicResponse<Self, Result<(), BrokerError>>;

    fn handle(&mut self, Rebind(patterns): Rebind, _: &mut Self::Context) -> Self::Result {
        self.patterns.clone_from(&patterns);
        let (shared, client) = (Arc::clone(&self.shared), self.client.clone());
        let bind = async move { shared.set_up(shared.broker.bind(&client, &patterns)).await };
        AtomicResponse::new(Box::pin(bind.into_actor(self).map(|result, this, ctx| {
            this.note(&result, ctx);
            result
        })))
    }
}

impl Handler<Redeclare> for Subscriber {
    type Result = ();

    fn handle(&mut self, _: Redeclare, ctx: &mut Self::Context) {
        self.done = false;
        self.restore(ctx);
    }
}

impl Handler<Control> for Subscriber {
    type Result = ();

    fn handle(&mut self, control: Control, ctx: &mut Self::Context) {
        control.obey(&self.identity, ctx);
    }
}
