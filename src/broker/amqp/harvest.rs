//! Looking at the front of a queue without a standing consumer: dead letters, and inboxes past their limits.
//!
//! A chunk at a time is handed over; what is not wanted is given back, in order, when the harvest ends. Giving back is
//! not confirmed, and until RabbitMQ has done it the queue counts as shorter than it is: [`Harvest::finish`] waits for
//! that.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{FutureExt as _, StreamExt as _};
use lapin::message::Delivery;

use super::admin::set_apart_if_refused;
use super::clients::Client;
use super::error::{broker_error, unavailable};
use super::intake::{BackTo, Intake, IntakeChannel, Left, Subscription};
use super::{Shared, topology};
use crate::broker::BrokerError;

/// Deliveries in one chunk, at most and at least, and their bytes: bounds what is in memory at a time.
const CHUNK_MAX: usize = 500;
const CHUNK_MIN: usize = 8;
const CHUNK_BYTES: usize = 16 << 20;

/// How long a message is taken to be before one was seen, in bytes.
const SIZE_AT_FIRST: usize = 128 << 10;

/// How long what was given back may take to be counted as ready again.
const BACK_WITHIN: Duration = Duration::from_secs(2);

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
}

impl<'a> Harvest<'a> {
    /// Begins at the front of a queue that exists.
    pub(super) fn new(shared: &'a Shared, queue: String) -> Self {
        let intake = shared.chores(&queue, None);
        Self { shared, intake, queue, owner: None, kept: Vec::new(), size: SIZE_AT_FIRST }
    }

    /// Begins at the front of a client's inbox, which others may read as well, or keep from being read.
    pub(super) fn of_inbox(shared: &'a Shared, client: &'a Client) -> Self {
        let queue = topology::inbox(&client.id);
        let intake = shared.chores(&queue, Some(client));
        Self { shared, intake, queue, owner: Some(client), kept: Vec::new(), size: SIZE_AT_FIRST }
    }

    /// The next deliveries, at most this many; none when the end is reached.
    pub(super) async fn next(&mut self, most: usize) -> Result<(Vec<Delivery>, Arc<IntakeChannel>), BrokerError> {
        let action = || format!("read queue {}", self.queue);
        let fitting = (CHUNK_BYTES / self.size.max(1)).clamp(CHUNK_MIN, CHUNK_MAX);
        let prefetch = u16::try_from(most.clamp(1, fitting)).expect("the bound fits");
        let pending = self.intake.subscribe(&self.queue, prefetch).await.ok_or_else(|| unavailable(action()))?;
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
        let (sender, ended) = tokio::sync::oneshot::channel();
        // What came too late is given back before the next chunk is asked for, so that order holds.
        let outstanding = chunk.len();
        let to = BackTo::from(self.shared.options.queue_type);
        let left = Left::Back { to, first: Vec::new(), outstanding, note: Box::new(|_| ()), ended: Some(sender) };
        self.intake.end(&self.shared.thread, subscription, left);
        let _ = ended.await;
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
        channel.ack(&mut tags.to_vec())
    }

    /// Ends it: gives back what was not settled, and waits until RabbitMQ counts it as ready again.
    pub(super) async fn finish(mut self) {
        let count = self.kept.len() as u64;
        if count == 0 {
            return;
        }
        let before = self.shared.count_ready(&self.queue).await;
        self.give_back();
        let Ok(before) = before else { return };
        let until = Instant::now() + BACK_WITHIN;
        // More than that may be there, when somebody put it there meanwhile; less only when somebody took it.
        while self.shared.count_ready(&self.queue).await.is_ok_and(|ready| ready < before + count)
            && Instant::now() < until
        {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    fn give_back(&mut self) {
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
