//! Dead letters, in each client's `-dead` queue.
//!
//! A queue can only be read from its front, so listing reads up to the page and gives everything back; that is for
//! people, who look at the first pages.

use std::collections::HashSet;
use std::sync::Arc;

use super::Shared;
use super::clients::Client;
use super::error::broker_error;
use super::harvest::Harvest;
use super::settle::refused;
use super::topology;
use super::window::{Outgoing, Refusal};
use super::wire::{self, Counts, short};
use crate::broker::{BrokerError, BrokerErrorKind, DeadLetter, DeadPage, Origin, Queue};
use crate::client::ClientId;
use crate::time::Timestamp;

/// Dead letters read at a time.
const CHUNK: usize = 500;

/// Bytes of a page; beyond that it ends early.
const PAGE_BYTES_MAX: usize = 16 << 20;

impl Shared {
    fn dead_of(&self, id: &ClientId, action: &str) -> Result<Arc<Client>, BrokerError> {
        self.session(action)?;
        self.clients.get(id).ok_or_else(|| BrokerError::new(BrokerErrorKind::NotFound, action))
    }

    /// How many there are. Their queue, when somebody else has deleted it, is declared again.
    async fn count_dead(&self, client: &Client) -> Result<u64, BrokerError> {
        let queue = topology::dead(&client.id);
        match self.count_ready(&queue).await {
            Err(error) if error.kind == BrokerErrorKind::NotFound => {
                log::warn!("queue {queue} was deleted by somebody else; it is declared again");
                self.repair(Some(client)).await;
                self.count_ready(&queue).await
            }
            counted => counted,
        }
    }

    /// See [`crate::broker::Broker::dead_letters`].
    pub(super) async fn dead_letters(
        self: Arc<Self>,
        id: ClientId,
        after: Option<String>,
        limit: usize,
    ) -> Result<DeadPage, BrokerError> {
        let action = format!("list dead letters of {id}");
        let client = self.dead_of(&id, &action)?;
        let _turn = client.dead_turn.acquire().await;
        if self.count_dead(&client).await? == 0 {
            return Ok(DeadPage::default());
        }
        let mut harvest = Harvest::new(&self, topology::dead(&id));
        let mut page = DeadPage::default();
        let (mut is_there, mut bytes) = (after.is_none(), 0);
        loop {
            let (chunk, _) = harvest.next(CHUNK).await?;
            if chunk.is_empty() {
                harvest.finish().await;
                return Ok(page);
            }
            for delivery in chunk {
                let dead = wire::read_dead(&delivery.properties, delivery.data);
                // Ids grow with time. One that is greater shows that the cursor itself was purged or replayed.
                is_there = is_there || after.as_deref().is_some_and(|after| dead.id.as_str() > after);
                if !is_there {
                    is_there = after.as_deref() == Some(dead.id.as_str());
                    continue;
                }
                if page.dead_letters.len() == limit || bytes >= PAGE_BYTES_MAX {
                    page.next = page.dead_letters.last().map(|last| last.id.clone());
                    harvest.finish().await;
                    return Ok(page);
                }
                bytes += wire::body(&dead.payload).len();
                page.dead_letters.push(dead);
            }
        }
    }

    /// See [`crate::broker::Broker::replay_dead`].
    pub(super) async fn replay_dead(
        self: Arc<Self>,
        id: ClientId,
        ids: Option<Vec<String>>,
    ) -> Result<u64, BrokerError> {
        let action = format!("replay dead letters of {id}");
        self.open_session(&action)?;
        let client = self.dead_of(&id, &action)?;
        let _turn = client.dead_turn.acquire().await;
        let mut wanted: Option<HashSet<String>> = ids.map(|ids| ids.into_iter().collect());
        // Those that are there now: what dies again meanwhile stays.
        let mut left = self.count_dead(&client).await?;
        let mut harvest = Harvest::new(&self, topology::dead(&id));
        let mut replayed = 0;
        while left > 0 && wanted.as_ref().is_none_or(|wanted| !wanted.is_empty()) {
            let (chunk, channel) = harvest.next(usize::try_from(left).unwrap_or(CHUNK).min(CHUNK)).await?;
            if chunk.is_empty() {
                break;
            }
            left = left.saturating_sub(chunk.len() as u64);
            let mut chosen = Vec::new();
            for delivery in chunk {
                let tag = delivery.delivery_tag;
                let dead = wire::read_dead(&delivery.properties, delivery.data);
                if wanted.as_mut().is_none_or(|wanted| wanted.remove(&dead.id)) {
                    chosen.push((tag, dead));
                }
            }
            let messages: Vec<Outgoing> = chosen.iter().map(|(_, dead)| self.revived(&id, dead)).collect();
            let fates = self.publish_on(self.relay(&topology::inbox(&id)), messages).await;
            let mut refusal = None;
            let mut done = Vec::with_capacity(chosen.len());
            for ((tag, dead), fate) in chosen.into_iter().zip(fates) {
                match fate {
                    Ok(()) => done.push(tag),
                    Err(why) => refusal = Some((why, dead.origin)),
                }
            }
            harvest.acknowledge(&channel, &done);
            replayed += done.len() as u64;
            if let Some((why, origin)) = refusal {
                if matches!(why, Refusal::Unroutable) {
                    self.repair(Some(&client)).await;
                }
                return Err(refused(&action, &why, &home(&id, origin).to_string()));
            }
        }
        harvest.finish().await;
        Ok(replayed)
    }

    /// A dead letter as it is put back into the queue that it died in.
    fn revived(&self, client: &ClientId, dead: &DeadLetter) -> Outgoing {
        Outgoing {
            exchange: topology::default_exchange(),
            key: short(&home(client, dead.origin).to_string()),
            properties: wire::properties(&dead.payload, Counts::fresh(), self.user()),
            body: wire::body(&dead.payload),
        }
    }

    /// See [`crate::broker::Broker::purge_dead`].
    pub(super) async fn purge_dead(
        self: Arc<Self>,
        id: ClientId,
        before: Option<Timestamp>,
    ) -> Result<u64, BrokerError> {
        let action = format!("purge dead letters of {id}");
        let client = self.dead_of(&id, &action)?;
        let _turn = client.dead_turn.acquire().await;
        let queue = topology::dead(&id);
        let mut left = self.count_dead(&client).await?;
        let Some(before) = before else {
            let session = self.session(&action)?;
            let purged = session.control(async |channel| topology::purge(channel, &queue).await).await;
            return purged.map_err(|error| broker_error(action, error));
        };
        let mut harvest = Harvest::new(&self, queue);
        let mut purged = 0;
        while left > 0 {
            let (chunk, channel) = harvest.next(usize::try_from(left).unwrap_or(CHUNK).min(CHUNK)).await?;
            if chunk.is_empty() {
                break;
            }
            left = left.saturating_sub(chunk.len() as u64);
            let mut old = Vec::with_capacity(chunk.len());
            let mut is_end = false;
            for delivery in chunk {
                let tag = delivery.delivery_tag;
                let dead = wire::read_dead(&delivery.properties, delivery.data);
                if dead.died_at < before {
                    old.push(tag);
                } else {
                    // They are in the order in which they died, but for the few milliseconds that publishing takes.
                    is_end |= dead.died_at > before.plus_millis(60_000);
                }
            }
            harvest.acknowledge(&channel, &old);
            purged += old.len() as u64;
            if is_end {
                break;
            }
        }
        harvest.finish().await;
        Ok(purged)
    }
}

fn home(client: &ClientId, origin: Origin) -> Queue {
    match origin {
        Origin::Inbox => Queue::Inbox(client.clone()),
        Origin::Outbox => Queue::Outbox(client.clone()),
        Origin::Notify => Queue::Notify(client.clone()),
    }
}
