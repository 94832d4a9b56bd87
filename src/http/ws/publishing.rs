//! Sends of one connection that wait for the broker, in order.
//!
//! A publish begins as soon as the one before has its place in the queue, so that order holds (promise 3) and nobody
//! waits for a confirm but who is told of it. What comes while none may begin joins the next one.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::future::{LocalBoxFuture, OptionFuture};
use futures_util::stream::FuturesOrdered;
use futures_util::{FutureExt as _, StreamExt as _};
use serde_json::value::RawValue;

use super::outgoing::Outgoing;
use crate::broker::{Broker, GivenOn, Queue, Turn};
use crate::client::ClientId;
use crate::directory::SendPermit;
use crate::envelope::Message;
use crate::http::batch::Checked;
use crate::http::budget::BodyRoom;
use crate::http::error::Problem;
use crate::http::send::PUBLISH_TIMEOUT;
use crate::intake::Kind;

/// Frames that wait or are under way, and their bytes: a connection with more is not read from.
const FRAMES_MAX: usize = 2_048;
const BYTES_MAX: usize = 8 << 20;

/// Publishes under way. A broker's confirm may take tens of milliseconds, and somebody may send a message every one.
const UNDER_WAY_MAX: usize = 64;

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

/// A frame of a publish under way: what its answer needs.
struct Sent {
    reference: Option<Box<RawValue>>,
    messages: usize,
    bytes: usize,
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
    under_way: FuturesOrdered<LocalBoxFuture<'static, Done>>,
    /// Whether the last one that was begun has its place.
    placed: Option<GivenOn>,
    /// Of what waits and what is under way.
    frames: usize,
    bytes: usize,
}

impl Publishing {
    pub(super) fn new(broker: Arc<dyn Broker>, client: ClientId) -> Self {
        let (waiting, under_way) = (VecDeque::new(), FuturesOrdered::new());
        Self { broker, client, waiting, under_way, placed: None, frames: 0, bytes: 0 }
    }

    /// Whether more frames may come.
    pub(super) fn has_room(&self) -> bool {
        self.frames < FRAMES_MAX && self.bytes < BYTES_MAX
    }

    /// Whether nothing waits for the broker.
    pub(super) fn is_idle(&self) -> bool {
        self.under_way.is_empty() && self.waiting.is_empty()
    }

    /// Nobody is left to be told: what is under way is carried on by the broker, what waits was not accepted.
    pub(super) fn abandon(&mut self) {
        self.under_way = FuturesOrdered::new();
        self.waiting.clear();
        self.placed = None;
        (self.frames, self.bytes) = (0, 0);
    }

    /// Takes a frame's messages.
    pub(super) fn push(&mut self, waiting: Waiting) {
        self.frames += 1;
        self.bytes += waiting.bytes;
        self.waiting.push_back(waiting);
    }

    /// Begins publishes for what waits, and waits for the oldest. Waits for ever when there is none. Safe to drop: the
    /// publishes are kept.
    pub(super) async fn next(&mut self) -> Done {
        loop {
            while !self.waiting.is_empty() && self.may_begin() {
                let mut publish = self.begin();
                // The first poll gives it its place, where there is room.
                let publish = match publish.as_mut().now_or_never() {
                    Some(done) => std::future::ready(done).boxed_local(),
                    None => publish,
                };
                self.under_way.push_back(publish);
            }
            let waits_for_place = !self.waiting.is_empty() && self.under_way.len() < UNDER_WAY_MAX;
            tokio::select! {
                Some(done) = self.under_way.next() => {
                    self.frames -= done.sent.len();
                    self.bytes -= done.sent.iter().map(|sent| sent.bytes).sum::<usize>();
                    return done;
                }
                Some(()) = OptionFuture::from(self.placed.as_mut()), if waits_for_place => {}
                else => std::future::pending().await,
            }
        }
    }

    /// Whether nothing that is begun now could come before what was accepted. Where the last publish came to nothing its
    /// place matters no more: the broker may be stuck with it, and the next is to be told so in its own time.
    fn may_begin(&mut self) -> bool {
        let is_placed = self.placed.as_mut().is_none_or(|placed| placed.now_or_never().is_some());
        self.under_way.is_empty() || is_placed && self.under_way.len() < UNDER_WAY_MAX
    }

    /// A publish of what waits, as much of it as goes together.
    fn begin(&mut self) -> LocalBoxFuture<'static, Done> {
        let (mut sent, mut messages): (Vec<Sent>, Vec<Message>) = (Vec::new(), Vec::new());
        let kind = self.waiting.front().map_or(Kind::Topic, |first| first.kind);
        while let Some(next) = self.waiting.front()
            && next.kind == kind
            && (messages.is_empty() || messages.len() + next.checked.messages.len() <= TOGETHER_MAX)
            && let Some(next) = self.waiting.pop_front()
        {
            sent.push(Sent {
                reference: next.reference,
                messages: next.checked.messages.len(),
                bytes: next.bytes,
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
        let (turn, placed) = Turn::new();
        self.placed = Some(placed);
        Box::pin(async move {
            let publish = broker.publish_in_turn(&queue, messages, turn);
            let result = match tokio::time::timeout(PUBLISH_TIMEOUT, publish).await {
                Ok(published) => published.map(|published| published.duplicates).map_err(Problem::from),
                Err(_) => Err(Problem::broker_unavailable()),
            };
            Done { sent, result }
        })
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
