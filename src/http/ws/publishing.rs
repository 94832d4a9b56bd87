//! Sends of one connection that wait for the broker, in order.
//!
//! One publish is under way at a time, so that order holds (promise 3); what comes meanwhile joins the next one, so that
//! a client that sends message after message shares commits as one that sends batches does.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::future::LocalBoxFuture;
use serde_json::value::RawValue;

use super::outgoing::Outgoing;
use crate::broker::{Broker, Queue};
use crate::client::ClientId;
use crate::directory::SendPermit;
use crate::envelope::Message;
use crate::http::batch::Checked;
use crate::http::budget::BodyRoom;
use crate::http::error::Problem;
use crate::http::send::PUBLISH_TIMEOUT;
use crate::intake::Kind;

/// Frames that wait, and their bytes: a connection with more is not read from.
const WAITING_MAX: usize = 1_024;
const WAITING_BYTES_MAX: usize = 4 << 20;

/// Messages that one publish takes at most, unless they came in one frame.
const TOGETHER_MAX: usize = 10_000;

/// A frame's messages, checked.
pub(super) struct Waiting {
    pub(super) reference: Option<Box<RawValue>>,
    pub(super) kind: Kind,
    pub(super) checked: Checked,
    /// Length of the frame.
    pub(super) bytes: usize,
    /// Held until the broker has answered.
    pub(super) room: Option<BodyRoom>,
    pub(super) permit: SendPermit,
}

/// A frame of the publish under way: what its answer needs.
struct Sent {
    reference: Option<Box<RawValue>>,
    messages: usize,
    ids: String,
    _room: Option<BodyRoom>,
    _permit: SendPermit,
}

/// What a publish came to: the frames, and for each message whether it was a duplicate.
pub(super) struct Done {
    sent: Vec<Sent>,
    result: Result<Vec<bool>, Problem>,
}

/// See the module.
pub(super) struct Publishing {
    broker: Arc<dyn Broker>,
    client: ClientId,
    waiting: VecDeque<Waiting>,
    waiting_bytes: usize,
    under_way: Option<LocalBoxFuture<'static, Done>>,
}

impl Publishing {
    pub(super) fn new(broker: Arc<dyn Broker>, client: ClientId) -> Self {
        Self { broker, client, waiting: VecDeque::new(), waiting_bytes: 0, under_way: None }
    }

    /// Whether more frames may come.
    pub(super) fn has_room(&self) -> bool {
        self.waiting.len() < WAITING_MAX && self.waiting_bytes < WAITING_BYTES_MAX
    }

    /// Whether nothing waits for the broker.
    pub(super) fn is_idle(&self) -> bool {
        self.under_way.is_none() && self.waiting.is_empty()
    }

    /// Nobody is left to be told: what is under way is carried on by the broker, what waits was not accepted.
    pub(super) fn abandon(&mut self) {
        self.under_way = None;
        self.waiting.clear();
        self.waiting_bytes = 0;
    }

    /// Takes a frame's messages.
    pub(super) fn push(&mut self, waiting: Waiting) {
        self.waiting_bytes += waiting.bytes;
        self.waiting.push_back(waiting);
    }

    /// Waits for the publish under way, beginning one when something waits. Waits for ever when nothing does. Safe to
    /// drop: the publish is kept.
    pub(super) async fn next(&mut self) -> Done {
        if self.under_way.is_none() {
            self.begin();
        }
        match self.under_way.as_mut() {
            Some(publish) => {
                let done = publish.await;
                self.under_way = None;
                done
            }
            None => std::future::pending().await,
        }
    }

    fn begin(&mut self) {
        let Some(kind) = self.waiting.front().map(|first| first.kind) else { return };
        let (mut sent, mut messages): (Vec<Sent>, Vec<Message>) = (Vec::new(), Vec::new());
        while let Some(next) = self.waiting.front()
            && next.kind == kind
            && (messages.is_empty() || messages.len() + next.checked.messages.len() <= TOGETHER_MAX)
            && let Some(next) = self.waiting.pop_front()
        {
            self.waiting_bytes -= next.bytes;
            sent.push(Sent {
                reference: next.reference,
                messages: next.checked.messages.len(),
                ids: next.checked.ids,
                _room: next.room,
                _permit: next.permit,
            });
            if messages.is_empty() {
                messages = next.checked.messages;
            } else {
                messages.extend(next.checked.messages);
            }
        }
        let queue = match kind {
            Kind::Topic => Queue::Outbox(self.client.clone()),
            Kind::Broadcast => Queue::Notify(self.client.clone()),
        };
        let broker = Arc::clone(&self.broker);
        self.under_way = Some(Box::pin(async move {
            let result = match tokio::time::timeout(PUBLISH_TIMEOUT, broker.publish(&queue, messages)).await {
                Ok(published) => published.map(|published| published.duplicates).map_err(Problem::from),
                Err(_) => Err(Problem::broker_unavailable()),
            };
            Done { sent, result }
        }));
    }
}

impl Done {
    /// Tells the client of each of its frames.
    pub(super) fn answer(&self, outgoing: &mut Outgoing, request_id: &str) {
        let mut rest: &[bool] = self.result.as_deref().unwrap_or_default();
        for sent in &self.sent {
            let reference = sent.reference.as_deref();
            match &self.result {
                Ok(_) => {
                    let (own, others) = rest.split_at(sent.messages.min(rest.len()));
                    rest = others;
                    let duplicates = own.iter().filter(|seen| **seen).count();
                    outgoing.accepted(reference, sent.messages, duplicates, &sent.ids);
                }
                Err(problem) => outgoing.error(reference, problem, request_id),
            }
        }
    }

    /// What is to be logged, when it failed for a reason that the client is not told.
    pub(super) fn cause(&self) -> Option<&str> {
        self.result.as_ref().err().and_then(Problem::cause)
    }
}
