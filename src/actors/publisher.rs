//! The publisher: `soar-publish` to the exchange `soar-topic`, which puts a message into every inbox that has a matching
//! pattern.
//!
//! There is one. Several would be competing consumers of one queue, and then two messages of one sender could reach an
//! inbox in the wrong order (promise 3).
//!
//! Messages, state, crash and order: see [`pipeline`](super::pipeline).

use std::sync::Arc;

use super::pipeline::{Pipeline, Stage};
use super::{Identity, Shared};
use crate::broker::{DeadReason, Delivery, Outcome, Payload, Queue, Target};

/// See the module.
pub(super) type Publisher = Pipeline<Publish>;

pub(super) struct Publish;

pub(super) fn new(shared: Arc<Shared>, identity: Identity) -> Publisher {
    Pipeline::new(Publish, shared, identity)
}

impl Stage for Publish {
    fn queue(&self) -> Queue {
        Queue::Publish
    }

    fn decide(&self, delivery: &Delivery) -> Outcome {
        match &delivery.payload {
            // Only an operator's own tools could put a broadcast here; it goes where it belongs.
            Payload::Message(message) if message.topic.is_none() => {
                Outcome::Forward(Target::Broadcast, Arc::clone(message))
            }
            Payload::Message(message) => Outcome::Forward(Target::Topic, Arc::clone(message)),
            // Not written by a forwarder. Nobody owns it; the broker keeps it aside.
            Payload::Foreign(_) => Outcome::Dead { reason: DeadReason::InvalidMessage, attempts: 0 },
        }
    }
}
