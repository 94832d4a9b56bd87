//! How deliveries go back to a queue of RabbitMQ so that order holds.
//!
//! A classic queue puts them where they were. A quorum queue hands out first what came back to it, in the order in which
//! it came back: so whoever gives something back must have all that came back before, which is younger, and give that
//! back behind it. How much that is, is counted here; the next subscription is large enough for it, and seldom anything
//! need be taken singly.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::future::FusedFuture as _;
use lapin::message::Delivery;
use lapin::options::BasicGetOptions;
use parking_lot::Mutex;

use super::channel::IntakeChannel;
use super::intake::Note;
use super::wire::short;
use crate::config::QueueType;

/// Deliveries given back at a time. RabbitMQ's channel sends a quorum queue no more than 32 commands without an answer;
/// what comes then it keeps for later, and puts back in no order at all.
const BACK_AT_ONCE: usize = 16;

/// How long these may take to be in their queue again, until the next ones follow anyway; then the rest follows faster, as
/// somebody takes them as they come back.
const BACK_WITHIN: Duration = Duration::from_secs(1);

/// How deliveries go back to their queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BackTo {
    /// A queue that puts them where they were.
    Classic,
    /// A queue that puts each behind those that came back before.
    Quorum,
    /// A queue that is about to be deleted, or was: their order is of no interest, and asking for it would close the
    /// channel.
    Nowhere,
}

impl From<QueueType> for BackTo {
    fn from(kind: QueueType) -> Self {
        match kind {
            QueueType::Classic => Self::Classic,
            QueueType::Quorum => Self::Quorum,
        }
    }
}

/// How many messages came back to each quorum queue, where that is known.
#[derive(Default)]
pub(super) struct Returned(Mutex<HashMap<String, usize>>);

impl Returned {
    /// Messages that came back to a queue and are in front of all others there.
    pub(super) fn count(&self, queue: &str) -> Option<usize> {
        self.0.lock().get(queue).copied()
    }

    /// So many came back; none means that it is not known.
    pub(super) fn note(&self, queue: &str, count: usize) {
        let mut counts = self.0.lock();
        if count == 0 {
            counts.remove(queue);
        } else {
            counts.insert(queue.to_owned(), count);
        }
    }

    /// The prefetch for a subscription: as much as it asks for, or all that came back, within what it may have.
    pub(super) fn prefetch(&self, queue: &str, asked: u16, most: u16) -> u16 {
        let all = self.count(queue).map_or(0, |count| u16::try_from(count).unwrap_or(u16::MAX));
        asked.max(all.min(most))
    }
}

/// Gives back what a subscription was handed, in order, so that it is in the queue again when this resolves. Nobody
/// consumes it on this channel meanwhile. `may_be_more` says whether younger messages may have come back before.
pub(super) async fn give_back_all(
    channel: &Arc<IntakeChannel>,
    queue: &str,
    mut tags: Vec<u64>,
    to: BackTo,
    may_be_more: bool,
    note: &Note,
    returned: &Returned,
) {
    match to {
        // It has given everything back already.
        _ if !channel.is_alive() => returned.note(queue, 0),
        BackTo::Nowhere => {
            returned.note(queue, 0);
            channel.give_back(tags);
        }
        BackTo::Classic => give_back(channel, queue, &tags).await,
        BackTo::Quorum => {
            if may_be_more && !tags.is_empty() {
                tags.extend(take_returned(channel, queue, note).await);
            }
            returned.note(queue, tags.len());
            give_back(channel, queue, &tags).await;
        }
    }
}

/// Gives deliveries back in order, so that they are in the queue again, in that order, when this resolves.
pub(super) async fn give_back(channel: &IntakeChannel, queue: &str, tags: &[u64]) {
    if tags.is_empty() {
        return;
    }
    let mut ready = channel.count(queue).await.ok();
    let mut within = BACK_WITHIN;
    for chunk in tags.chunks(BACK_AT_ONCE) {
        channel.give_back(chunk.iter().copied());
        let Some(before) = ready else { continue };
        let until = Instant::now() + within;
        // What is published meanwhile counts as well, so this may be over early; the next question is another delay.
        loop {
            ready = channel.count(queue).await.ok();
            if ready.is_none_or(|ready| ready >= before + chunk.len() as u64) {
                break;
            }
            if Instant::now() >= until {
                within = Duration::ZERO;
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Takes what came back to a quorum queue before, up to the first message that was never handed out: what an earlier
/// consumer left, and what RabbitMQ gives back by itself. That is what it had handed out to a consumer, and the channel
/// came to after the consumer was cancelled. Returns the tags, that first one's included.
pub(super) async fn take_returned(channel: &Arc<IntakeChannel>, queue: &str, note: &Note) -> Vec<u64> {
    let mut tags = Vec::new();
    // No question comes first: what is ready is counted before, and a message asked for after, what the channel has
    // just given back has reached the queue.
    while let Some(next) = take_one(channel, queue).await {
        let came_back = next.redelivered;
        tags.push(next.delivery_tag);
        note(vec![next]);
        if !came_back {
            break;
        }
    }
    tags
}

/// Takes the first message of a queue, if there is one. One that comes too late goes back.
async fn take_one(channel: &Arc<IntakeChannel>, queue: &str) -> Option<Delivery> {
    let (asked, name) = (channel.channel.clone(), short(queue));
    let mut get = Box::pin(async move { asked.basic_get(name, BasicGetOptions::default()).await }.fuse());
    match channel.answer(&mut get).await {
        Ok(message) => message.map(|message| message.delivery),
        Err(error) => {
            log::debug!("a message of {queue} does not come: {error}");
            if !get.is_terminated() {
                let channel = Arc::clone(channel);
                tokio::spawn(async move {
                    if let Ok(Some(late)) = get.await {
                        channel.give_back([late.delivery.delivery_tag]);
                    }
                });
            }
            None
        }
    }
}
