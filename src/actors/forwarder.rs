//! The forwarder: a client's outbox to `soar-publish`. One per client, so that a client's own traffic waits for nobody
//! else's, and its order is that of its outbox.
//!
//! What an AMQP client put into the outbox is read here, and becomes a message of the outbox's owner or a dead letter.
//! Messages, state, crash and order: see [`pipeline`](super::pipeline).

use std::borrow::Cow;
use std::sync::Arc;

use super::pipeline::{Pipeline, Stage};
use super::{Identity, Shared};
use crate::broker::{DeadReason, Delivery, Foreign, Outcome, Payload, Queue, Target};
use crate::client::ClientId;
use crate::intake::{self, Kind};
use crate::time::Timestamp;

/// See the module.
pub(super) type Forwarder = Pipeline<Forward>;

pub(super) struct Forward {
    client: ClientId,
    max_message_bytes: usize,
}

pub(super) fn new(client: ClientId, shared: Arc<Shared>, identity: Identity) -> Forwarder {
    let max_message_bytes = shared.max_message_bytes;
    Pipeline::new(Forward { client, max_message_bytes }, shared, identity)
}

impl Stage for Forward {
    fn queue(&self) -> Queue {
        Queue::Outbox(self.client.clone())
    }

    fn decide(&self, delivery: &Delivery) -> Outcome {
        match &delivery.payload {
            Payload::Message(message) if message.sender == self.client => {
                Outcome::Forward(Target::Publish, Arc::clone(message))
            }
            other => admit(other, &self.client, Kind::Topic, self.max_message_bytes, Target::Publish),
        }
    }
}

/// What was not put there by the backbone, as a message of the queue's owner on its way, or as a dead letter of it.
///
/// That may be an envelope with all the marks of the backbone's own: an AMQP client that logs in as the backbone's user
/// takes it from an inbox and puts it into an outbox as it is. It is then the outbox's owner who says it.
pub(super) fn admit(payload: &Payload, owner: &ClientId, kind: Kind, max_bytes: usize, target: Target) -> Outcome {
    let foreign = match payload {
        Payload::Foreign(foreign) => Cow::Borrowed(foreign),
        Payload::Message(message) => Cow::Owned(Foreign {
            body: message.envelope.clone(),
            message_id: None,
            traceparent: message.traceparent.as_deref().map(Into::into),
        }),
    };
    match intake::parse_foreign(&foreign, owner, kind, max_bytes, Timestamp::now()) {
        Ok(message) => Outcome::Forward(target, Arc::new(message)),
        Err(error) => {
            log::debug!("{owner} sent by AMQP what cannot be read: {error}");
            Outcome::Dead { reason: DeadReason::InvalidMessage, attempts: 0 }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::envelope::{Draft, Message};
    use crate::topic::Topic;

    fn admitted(body: &'static str) -> Outcome {
        let foreign = Payload::Foreign(Foreign { body: body.into(), message_id: None, traceparent: None });
        let owner = ClientId::parse("noc-c2").expect("test id");
        admit(&foreign, &owner, Kind::Topic, 100, Target::Publish)
    }

    #[test]
    fn a_foreign_message_is_forwarded_as_its_queues_owners() {
        match admitted(r#"{"topic":"a.b","message":1}"#) {
            Outcome::Forward(Target::Publish, message) => assert_eq!(message.sender.as_str(), "noc-c2"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn another_senders_envelope_is_said_anew_by_the_queues_owner() {
        let other = ClientId::parse("other").expect("test id");
        let raw = serde_json::from_str("[1.0]").expect("JSON");
        let draft =
            Draft { id: None, topic: Some(Topic::parse("a.b").expect("a topic")), message: raw, traceparent: None };
        let message = Message::accept(&other, draft, Timestamp::now());
        let owner = ClientId::parse("noc-c2").expect("test id");
        let (id, payload) = (message.id.clone(), Payload::Message(Arc::new(message)));
        match admit(&payload, &owner, Kind::Topic, 100, Target::Publish) {
            Outcome::Forward(Target::Publish, said) => {
                assert_eq!((said.sender.as_str(), &said.id, said.body()), ("noc-c2", &id, &b"[1.0]"[..]));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_cannot_be_read_is_a_dead_letter() {
        for body in ["", "{", r#"{"message":1}"#] {
            let outcome = admitted(body);
            assert!(matches!(outcome, Outcome::Dead { reason: DeadReason::InvalidMessage, .. }), "{body}: {outcome:?}");
        }
    }
}
