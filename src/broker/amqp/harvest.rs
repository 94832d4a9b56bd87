//! Looking at the front of a queue without a standing consumer: dead letters, and inboxes past their limits.
//!
//! A chunk at a time is handed over; what is not wanted is given back, in order, when the harvest ends.

use std::collections::HashSet;
use std::sync::Arc;

use futures_util::{FutureExt as _, StreamExt as _};
use lapin::message::Delivery;

use super::admin::set_apart_if_refused;
use super::clients::Client;
use super::error::{broker_error, unavailable};
use super::intake::{Intake, IntakeChannel, Subscription};
use super::{Shared, topology};
use crate::broker::BrokerError;

/// Deliveries in one chunk: bounds what is in memory at a time.
const CHUNK: u16 = 500;

/// See the module.
pub(super) struct Harvest<'a> {
    shared: &'a Shared,
    intake: &'a Intake,
    queue: String,
    /// Whose inbox it is, if it is one.
    owner: Option<&'a Client>,
    /// Deliveries that are neither acknowledged nor given back.
    kept: Vec<(Arc<IntakeChannel>, u64)>,
}

impl<'a> Harvest<'a> {
    /// Begins at the front of a queue that exists.
    pub(super) fn new(shared: &'a Shared, queue: String) -> Self {
        Self { shared, intake: shared.chores(&queue, None), queue, owner: None, kept: Vec::new() }
    }

    /// Begins at the front of a client's inbox, which others may read as well, or keep from being read.
    pub(super) fn of_inbox(shared: &'a Shared, client: &'a Client) -> Self {
        let queue = topology::inbox(&client.id);
        Self { shared, intake: shared.chores(&queue, Some(client)), queue, owner: Some(client), kept: Vec::new() }
    }

    /// The next deliveries, at most this many; none when the end is reached.
    pub(super) async fn next(&mut self, most: usize) -> Result<(Vec<Delivery>, Arc<IntakeChannel>), BrokerError> {
        let action = || format!("read queue {}", self.queue);
        let prefetch = CHUNK.min(u16::try_from(most.max(1)).unwrap_or(CHUNK));
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
        self.intake.end(&self.shared.thread, subscription, drop, Some(sender));
        let _ = ended.await;
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
}

impl Drop for Harvest<'_> {
    fn drop(&mut self) {
        for (channel, tag) in self.kept.drain(..) {
            channel.give_back([tag]);
        }
    }
}
