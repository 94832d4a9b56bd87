//! Inbox limits: past `max_inbox_messages` and `inbox_ttl_s` the oldest become dead letters.
//!
//! Limits change by PATCH, and arguments of a queue cannot; and what RabbitMQ drops by itself it dead-letters without
//! a confirm. So limited inboxes are looked at every [`SWEEP_EVERY`]: a limit holds to within about a second or two.
//! Times count from when a message came into the inbox, and are kept in whole seconds, never too early.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::time::Instant;

use super::Shared;
use super::clients::Client;
use super::error::unavailable;
use super::harvest::Harvest;
use super::held::Held;
use super::settle::bury;
use super::topology;
use super::wire;
use crate::broker::{BrokerError, DeadReason, Payload};

/// How often limited inboxes are looked at.
pub(super) const SWEEP_EVERY: Duration = Duration::from_millis(500);

/// Limited inboxes looked at in a second, at most: with more than half as many of them a limit holds less tightly, and
/// RabbitMQ is not kept busy by counting.
const LOOKS_PER_SECOND: u32 = 200;

/// Inboxes looked at side by side.
const AT_ONCE: usize = 8;

/// Messages moved at a time.
const CHUNK: usize = 500;

/// How often that is done for one inbox before others have their turn.
const CHUNKS_MAX: usize = 20;

/// The front of an inbox is looked at again after this at the latest, although what was there had time left: an older
/// message may have been given back.
const LOOK_AGAIN_S: u64 = 30;

/// Looks at every limited inbox once.
pub(super) async fn sweep(shared: &Arc<Shared>) {
    let mut limited = shared.clients.all();
    limited.retain(|client| {
        let limits = client.limits();
        limits.max_inbox_messages.is_some() || limits.inbox_ttl_s.is_some()
    });
    let looks = u32::try_from(limited.len()).unwrap_or(u32::MAX);
    let not_before = Instant::now() + Duration::from_secs(1).saturating_mul(looks) / LOOKS_PER_SECOND;
    futures_util::stream::iter(limited)
        .for_each_concurrent(AT_ONCE, |client| async move {
            if let Err(error) = sweep_one(shared, &client).await
                && !client.is_gone()
            {
                log::debug!("the limits of {} are enforced later: {error}", client.id);
            }
        })
        .await;
    tokio::time::sleep_until(not_before).await;
}

async fn sweep_one(shared: &Arc<Shared>, client: &Client) -> Result<(), BrokerError> {
    let limits = client.limits();
    let depth = shared.inbox_depth(client).await?;
    if let Some(ttl_s) = limits.inbox_ttl_s {
        expire(shared, client, ttl_s, depth.ready).await?;
    }
    if let Some(most) = limits.max_inbox_messages {
        let depth = if limits.inbox_ttl_s.is_some() { shared.inbox_depth(client).await? } else { depth };
        let excess = (depth.ready + depth.held).saturating_sub(most);
        push_out(shared, client, excess, depth.ready).await?;
    }
    Ok(())
}

/// Makes dead letters of what has waited too long.
async fn expire(shared: &Arc<Shared>, client: &Client, ttl_s: u64, ready: u64) -> Result<(), BrokerError> {
    let now_s = wire::now_s();
    let expires_s = |held: &Held| expires_s(held, ttl_s);
    if let Some(puller) = client.puller() {
        let old = puller.take_waiting(|held| expires_s(held) <= now_s);
        bury(shared, &client.id, with_attempts(old), DeadReason::Expired).await?;
    }
    // While somebody reads the inbox the rest is judged as it comes: to look at the front meanwhile would cost the order.
    if ready == 0 || now_s < client.next_look_s() || client.is_inbox_read() {
        return Ok(());
    }
    let mut harvest = Harvest::of_inbox(shared, client).await;
    if client.is_inbox_read() {
        return Ok(());
    }
    for _ in 0..CHUNKS_MAX {
        let Chunk { dying, next, is_end, .. } = take_chunk(shared, client, &mut harvest, CHUNK, |held| {
            let expires_s = expires_s(held);
            if expires_s <= now_s { Ok(()) } else { Err(expires_s) }
        })
        .await?;
        client.set_next_look_s(next.unwrap_or(0).min(now_s + LOOK_AGAIN_S));
        bury_if_taken(shared, client, dying, DeadReason::Expired).await?;
        if is_end || next.is_some() {
            break;
        }
    }
    harvest.finish().await;
    Ok(())
}

/// When a message in an inbox has waited too long, in seconds since the epoch.
fn expires_s(held: &Held, ttl_s: u64) -> u64 {
    // A second more: the times are cut off.
    held.counts.since_s.saturating_add(ttl_s).saturating_add(1)
}

/// Whether a message in the client's inbox has waited too long.
pub(super) fn is_expired(client: &Client, held: &Held) -> bool {
    client.inbox_ttl_s().is_some_and(|ttl_s| expires_s(held, ttl_s) <= wire::now_s())
}

/// Makes dead letters of the oldest that nobody has taken.
async fn push_out(shared: &Arc<Shared>, client: &Client, excess: u64, ready: u64) -> Result<(), BrokerError> {
    let mut left = excess;
    if left == 0 {
        return Ok(());
    }
    if let Some(puller) = client.puller() {
        let oldest = puller.take_waiting(|_| {
            let dies = left > 0;
            left -= u64::from(dies);
            dies
        });
        bury(shared, &client.id, with_attempts(oldest), DeadReason::InboxFull).await?;
    }
    let mut left = left.min(ready);
    if left == 0 {
        return Ok(());
    }
    let mut harvest = Harvest::of_inbox(shared, client).await;
    for _ in 0..CHUNKS_MAX {
        if left == 0 {
            break;
        }
        let most = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let Chunk { dying, dropped, is_end, .. } = take_chunk(shared, client, &mut harvest, most, |_| Ok(())).await?;
        left = left.saturating_sub((dying.len() + dropped) as u64);
        bury_if_taken(shared, client, dying, DeadReason::InboxFull).await?;
        if is_end {
            break;
        }
    }
    harvest.finish().await;
    Ok(())
}

struct Chunk {
    /// Those that die; everything else is given back.
    dying: Vec<Held>,
    /// How many were dropped, because they are for nobody any more.
    dropped: usize,
    /// When the first that does not die is to be looked at again.
    next: Option<u64>,
    /// There was no more.
    is_end: bool,
}

/// Takes the next messages off the front, up to the first that need not die.
async fn take_chunk(
    shared: &Arc<Shared>,
    client: &Client,
    harvest: &mut Harvest<'_>,
    most: usize,
    judge: impl Fn(&Held) -> Result<(), u64>,
) -> Result<Chunk, BrokerError> {
    let (deliveries, channel) = harvest.next(most).await?;
    let is_end = deliveries.is_empty();
    let (mut dying, mut dropped, mut next) = (Vec::with_capacity(deliveries.len()), Vec::new(), None);
    let name = topology::inbox(&client.id);
    for delivery in deliveries {
        let held = Held::new(delivery, &channel, &name, None, &shared.memory);
        if client.is_of_another(held.counts) {
            dropped.push(held.tag);
            continue;
        }
        let verdict = if next.is_none() { judge(&held) } else { Err(0) };
        match verdict {
            // What is no message is dealt with when it is read.
            Ok(()) if matches!(held.payload, Payload::Message(_)) && !held.is_gone => dying.push(held),
            verdict => {
                // Looking at it does not count as handing it out.
                shared.memory.note(held.key, held.before);
                next = next.or(verdict.err());
            }
        }
    }
    let tags: Vec<u64> = dying.iter().map(|held| held.tag).collect();
    harvest.release(&channel, &tags);
    if !dropped.is_empty() {
        // When the channel is gone they come again.
        harvest.acknowledge(&channel, &dropped);
    }
    Ok(Chunk { dying, dropped: dropped.len(), next, is_end })
}

/// Makes dead letters of these. When RabbitMQ ceases to take messages meanwhile that is not waited for: it goes on by
/// itself, and the inbox can be read.
async fn bury_if_taken(
    shared: &Arc<Shared>,
    client: &Client,
    dying: Vec<Held>,
    reason: DeadReason,
) -> Result<(), BrokerError> {
    let action = || format!("make dead letters of {}", client.id);
    let mut blocked = shared.session(&action())?.blocked_changes();
    let (task, id) = (Arc::clone(shared), client.id.clone());
    let burying = shared.thread.spawn(async move { bury(&task, &id, with_attempts(dying), reason).await });
    tokio::select! {
        buried = burying => buried.unwrap_or_else(|_| Err(unavailable(action()))).map(drop),
        _ = blocked.wait_for(Option::is_some) => Err(unavailable(action())),
    }
}

fn with_attempts(held: Vec<Held>) -> Vec<(Held, u32)> {
    held.into_iter()
        .map(|held| {
            let attempts = held.counts.attempts;
            (held, attempts)
        })
        .collect()
}
