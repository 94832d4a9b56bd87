//! The broadcaster: a client's notify queue to the exchange `soar-broadcast`, which every inbox is bound to. One per
//! client, as the [forwarder](super::forwarder) is, and it reads what AMQP clients put there likewise.
//!
//! Messages, state, crash and order: see [`pipeline`](super::pipeline).

use std::sync::Arc;

use super::forwarder::admit;
use super::pipeline::{Pipeline, Stage};
use super::{Identity, Shared};
use crate::broker::{Delivery, Outcome, Payload, Queue, Target};
use crate::client::ClientId;
use crate::intake::Kind;

/// See the module.
pub(super) type Broadcaster = Pipeline<Broadcast>;

pub(super) struct Broadcast {
    client: ClientId,
    max_message_bytes: usize,
}

pub(super) fn new(client: ClientId, shared: Arc<Shared>, identity: Identity) -> Broadcaster {
    let max_message_bytes = shared.max_message_bytes;
    Pipeline::new(Broadcast { client, max_message_bytes }, shared, identity)
}

impl Stage for Broadcast {
    fn queue(&self) -> Queue {
        Queue::Notify(self.client.clone())
    }

    fn decide(&self, delivery: &Delivery) -> Outcome {
        match &delivery.payload {
            Payload::Message(message) if message.sender == self.client => {
                Outcome::Forward(Target::Broadcast, Arc::clone(message))
            }
            other => admit(other, &self.client, Kind::Broadcast, self.max_message_bytes, Target::Broadcast),
        }
    }
}
