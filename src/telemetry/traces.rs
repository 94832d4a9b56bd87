//! The ways of the most recent messages, in memory (`GET /messages/{id}`). Bounded by `SOAR_TRACE_MESSAGES`.

use crate::broker::DeadReason;
use crate::client::ClientId;
use crate::envelope::Message;
use crate::topic::Pattern;

/// A step on a message's way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Durable in the sender's outbox or notify queue.
    Accepted,
    /// In `soar-publish`.
    Forwarded,
    /// Given to its exchange.
    Published,
    /// In an inbox, because of a pattern (`None` for a broadcast).
    Routed(ClientId, Option<Pattern>),
    /// No pattern matched.
    Unrouted,
    /// A webhook attempt failed; it will be tried again.
    AttemptFailed(ClientId),
    /// Settled by the receiver.
    Delivered(ClientId),
    /// Became a dead letter of this client.
    Dead(ClientId, DeadReason),
}

/// The ways of recent messages.
#[derive(Debug)]
pub struct Traces {
    capacity: usize,
}

impl Traces {
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity }
    }

    /// Whether steps are remembered at all: lets callers skip the work of making one.
    pub fn is_on(&self) -> bool {
        self.capacity > 0
    }

    /// Notes that `message` made a step now.
    pub fn record(&self, _message: &Message, _step: Step) {}
}
