//! Looking at the front of a queue without a standing consumer: dead letters, and inboxes past their limits.
//!
//! A chunk at a time is handed over; [`Harvest::finish`] gives back what is not wanted, in order, and waits until
//! RabbitMQ counts it again. One that is dropped before, because of an error, gives it back in no order.

use std::collections::HashSet;
use std::sync::Arc;

use futures_util::{FutureExt as _, StreamExt as _};
use lapin::message::Delivery;
use tokio::sync::oneshot;

use super::admin::set_apart_if_refused;
use super::channel::IntakeChannel;
use super::clients::Client;
use super::error::{broker_error, unavailable};
use super::intake::{self, Intake, Left, Note, Subscription};
use super::{Shared, returned};
use crate::broker::{BrokerError, Queue};
use crate::config::QueueType;

/// Deliveries in one chunk, at most and at least, and their bytes: bounds what is in memory at a time.
const CHUNK_MAX: usize = 500;
const CHUNK_MIN: usize = 8;
const CHUNK_BYTES: usize = 16 << 20;

/// How long a message is taken to be before one was seen, in bytes.
const SIZE_AT_FIRST: usize = 128 << 10;

/// See the module.
pub(super) struct Harvest<'a> {
    shared: &'a Shared,
    intake: &'a Intake,
    queue: String,
    /// Whose inbox it is, if it is one.
    owner: Option<&'a Client>,
    /// Deliveries that are neither acknowledged nor given back.
    kept: Vec<(Arc<IntakeChannel>, u64)>,
    /// How long its messages are on average.
    size: usize,
    /// The last that was read had been given back before, and so may those be that are behind it.
    came_back: bool,
    /// Deliveries that were read.
    read: usize,
    /// The last chunk was smaller than it might have been: RabbitMQ may have handed out more while it was cancelled.
    is_short: bool,
    /// Told of what is read only to be given back.
    note: Note,
    /// Keeps others from beginning to read it meanwhile.
    _alone: Option<oneshot::Sender<()>>,
}

impl<'a> Harvest<'a> {
    /// Begins at the front of a queue that exists.
    pub(super) fn new(shared: &'a Shared, queue: String) -> Self {
        let intake = shared.chores(&queue, None);
        Self::begin(shared, intake, queue, None, intake::forget(), None)
    }

    /// Begins at the front of a client's inbox, which others may read as well, or keep from being read. Until it is
    /// dropped nobody begins to.
    pub(super) async fn of_inbox(shared: &'a Arc<Shared>, client: &'a Client) -> Self {
        let queue = Queue::Inbox(client.id.clone());
        let (name, note) = (queue.to_string(), shared.note_of(&queue));
        // One that is read apart is looked at on the same channel as it is read, and would wait for itself.
        let alone = if client.is_apart() { None } else { Some(shared.intake(&queue).hold(&name).await) };
        let intake = shared.chores(&name, Some(client));
        Self::begin(shared, intake, name, Some(client), note, alone)
    }

    fn begin(
        shared: &'a Shared,
        intake: &'a Intake,
        queue: String,
        owner: Option<&'a Client>,
        note: Note,
        alone: Option<oneshot::Sender<()>>,
    ) -> Self {
        let (kept, size, came_back, read, is_short) = (Vec::new(), SIZE_AT_FIRST, false, 0, false);
        Self { shared, intake, queue, owner, kept, size, came_back, read, is_short, note, _alone: alone }
    }

    /// The next deliveries, at most this many; none when the end is reached.
    pub(super) async fn next(&mut self, most: usize) -> Result<(Vec<Delivery>, Arc<IntakeChannel>), BrokerError> {
        let action = || format!("read queue {}", self.queue);
        let fitting = (CHUNK_BYTES / self.size.max(1)).clamp(CHUNK_MIN, CHUNK_MAX);
        let prefetch = u16::try_from(most.clamp(1, fitting)).expect("the bound fits");
        let pending =
            self.intake.subscribe(&self.queue, prefetch, prefetch).await.ok_or_else(|| unavailable(action()))?;
        let subscription = pending.await.map_err(|_| unavailable(action()))?;
        let mut subscription = subscription.map_err(|error| {
            if let Some(client) = self.owner {
                set_apart_if_refused(client, &self.queue, &error);
            }
            broker_error(action(), error)
        })?;
        let channel = Arc::clone(&subscription.channel);
        let mut chunk = Vec::with_capacity(usize::from(prefetch));
        let result = self.fill(&mut subscription, &mut chunk).await;
        let (sender, rest) = oneshot::channel();
        self.intake.end(&self.shared.thread, subscription, Left::Kept(sender));
        // When it is dropped the channel is gone, and everything with it.
        chunk.extend(rest.await.unwrap_or_default());
        self.came_back = chunk.last().is_some_and(|delivery| delivery.redelivered);
        self.is_short = chunk.len() < usize::from(prefetch);
        self.read += chunk.len();
        if !chunk.is_empty() {
            self.size = chunk.iter().map(|delivery| delivery.data.len()).sum::<usize>() / chunk.len();
        }
        self.kept.extend(chunk.iter().map(|delivery| (Arc::clone(&channel), delivery.delivery_tag)));
        result.map_err(|error| broker_error(action(), error))?;
        Ok((chunk, channel))
    }

    /// Gathers deliveries until there are no more, or as many as may be had.
    async fn fill(&self, subscription: &mut Subscription, chunk: &mut Vec<Delivery>) -> Result<(), lapin::Error> {
        let mut patience = 0;
        loop {
            while let Some(Some(next)) = subscription.consumer.next().now_or_never() {
                chunk.push(next?);
            }
            if chunk.len() >= usize::from(subscription.prefetch) || patience == 3 {
                return Ok(());
            }
            let before = chunk.len();
            let ready = subscription.channel.round_trip(&self.queue).await?;
            while let Some(Some(next)) = subscription.consumer.next().now_or_never() {
                chunk.push(next?);
            }
            if ready == 0 {
                return Ok(());
            }
            // RabbitMQ says that there is more, but another consumer may be faster.
            patience = if chunk.len() > before { 0 } else { patience + 1 };
        }
    }

    /// Takes these out of what is given back at the end: whoever has them settles them.
    pub(super) fn release(&mut self, channel: &Arc<IntakeChannel>, tags: &[u64]) {
        let tags: HashSet<u64> = tags.iter().copied().collect();
        self.kept.retain(|(other, tag)| !(Arc::ptr_eq(other, channel) && tags.contains(tag)));
    }

    /// Acknowledges these.
    pub(super) fn acknowledge(&mut self, channel: &Arc<IntakeChannel>, tags: &[u64]) -> bool {
        self.release(channel, tags);
        channel.ack(tags)
    }

    /// Ends it: gives back what was not settled, and waits until RabbitMQ counts it as ready again.
    pub(super) async fn finish(mut self) {
        if self.shared.options.queue_type == QueueType::Quorum {
            self.read_on().await;
        }
        for (channel, tags) in by_channel(std::mem::take(&mut self.kept)) {
            returned::give_back(&channel, &self.queue, &tags).await;
        }
    }

    /// Reads, of a quorum queue, whatever else was given back before. It is younger than what this is about to give
    /// back, and would be in front of that.
    async fn read_on(&mut self) {
        let before = self.shared.returned.count(&self.queue);
        let more = |this: &Self| match before {
            Some(before) if before > this.read => before - this.read,
            Some(before) if before == this.read => 0,
            // It was not known, as after a restart, or somebody else has given something back.
            Some(_) | None if this.came_back => CHUNK_MAX,
            Some(_) | None => 0,
        };
        if self.kept.is_empty() {
            return self.shared.returned.note(&self.queue, before.map_or(0, |before| before.saturating_sub(self.read)));
        }
        while more(self) > 0 {
            match self.next(more(self).min(CHUNK_MAX)).await {
                Ok((chunk, _)) if chunk.is_empty() => break,
                Ok((chunk, _)) => (self.note)(chunk),
                Err(error) => {
                    log::debug!("{error}; what it holds may be in another order from now on");
                    return self.shared.returned.note(&self.queue, 0);
                }
            }
        }
        if self.is_short
            && let Some((channel, _)) = self.kept.last()
        {
            let channel = Arc::clone(channel);
            let tags = returned::take_returned(&channel, &self.queue, &self.note).await;
            self.kept.extend(tags.into_iter().map(|tag| (Arc::clone(&channel), tag)));
        }
        self.shared.returned.note(&self.queue, self.kept.len());
    }

    fn give_back(&mut self) {
        if !self.kept.is_empty() {
            self.shared.returned.note(&self.queue, 0);
        }
        for (channel, tag) in self.kept.drain(..) {
            channel.give_back([tag]);
        }
    }
}

impl Drop for Harvest<'_> {
    fn drop(&mut self) {
        self.give_back();
    }
}

fn by_channel(kept: Vec<(Arc<IntakeChannel>, u64)>) -> Vec<(Arc<IntakeChannel>, Vec<u64>)> {
    let mut channels: Vec<(Arc<IntakeChannel>, Vec<u64>)> = Vec::with_capacity(1);
    for (channel, tag) in kept {
        match channels.last_mut() {
            Some((last, tags)) if Arc::ptr_eq(last, &channel) => tags.push(tag),
            _ => channels.push((channel, vec![tag])),
        }
    }
    channels
}
