//! Deletion: what the client sent is forwarded first, then everything of it goes.
//!
//! Order: take it out of the directory, close its gate and take its login at the broker away, so that nothing more is
//! accepted from it; forward what its outbox and notify queue hold, paused or not; note in the store that it is going;
//! stop its actors, delete its queues, delete its record. A crash before the note leaves the client as it was; one after
//! it is finished at the next start.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::core::{Core, Phase, store_error};
use super::messages::RegistryError;
use crate::broker::{BrokerError, BrokerErrorKind, Health};
use crate::client::ClientId;
use crate::directory::ClientEntry;

/// Forwarding that makes no progress for this long, in seconds, fails the deletion.
const STALL_S: u64 = 10;

/// Forwarding that always makes progress is still given up after this long, in seconds: an AMQP client could fill its
/// outbox as fast as it is emptied, and must not prevent its own deletion by that.
const DRAIN_MAX_S: u64 = 300;

/// How long actors have to stop, in seconds.
const STOP_WITHIN_S: u64 = 5;

/// Between two looks at the depths, in milliseconds: at first, and at the longest.
const POLL_MIN_MS: u64 = 2;
const POLL_MAX_MS: u64 = 100;

pub(super) async fn delete(core: Rc<Core>, id: ClientId) -> Result<(), RegistryError> {
    let _turn = core.turns.take(&id).await;
    core.check_open()?;
    let Some(entry) = core.with(&id, |client| Arc::clone(&client.entry)) else {
        // Its deletion may have failed half-way; asked again, it goes on.
        let gone = !core.leftovers.borrow().contains(&id);
        return if gone { Err(RegistryError::NotFound(id)) } else { clear_leftovers(&core, &id).await };
    };
    core.shared.directory.remove(&id);
    entry.gate.close();
    if let Err(error) = core.shared.broker.lock_out(&id).await {
        log::debug!("{id} may write by AMQP until its queues are deleted: {error}");
    }
    let drained = match drain(&core, &id, &entry).await {
        Ok(()) => core.store.mark_unfinished(&id).await.map_err(store_error(&id)),
        Err(error) => Err(error.into()),
    };
    if let Err(error) = drained {
        entry.gate.open();
        core.shared.directory.put(entry);
        core.set_phase(&id, Phase::Present);
        if let Some(password) = &core.with(&id, |client| client.entry.secrets.broker_password).flatten() {
            core.shared.broker.expect_passwords(vec![(id.clone(), *password)]);
            if let Err(error) = core.shared.broker.set_password(&id, password).await {
                log::warn!("{id} cannot log in at the broker until that is tried again: {error}");
            }
        }
        log::warn!("client {id} was not deleted: {error}");
        return Err(error);
    }
    core.set_phase(&id, Phase::Closing);
    core.wait_until_calm(&id, Duration::from_secs(STOP_WITHIN_S)).await;
    core.forget(&id);
    core.leftovers.borrow_mut().insert(id.clone());
    clear_leftovers(&core, &id).await?;
    log::info!("client {id} was deleted");
    Ok(())
}

/// Waits until every publish that was let in is answered, and all that is in the outbox and the notify queue is
/// forwarded; then nothing forwards it any more. One that kept filling them is given up.
async fn drain(core: &Core, id: &ClientId, entry: &ClientEntry) -> Result<(), BrokerError> {
    let begun = Instant::now();
    let mut least = u64::MAX;
    let mut progress_at = begun;
    let mut poll_ms = POLL_MIN_MS;
    core.set_phase(id, Phase::Draining);
    loop {
        if let Health::Unreachable(why) = core.shared.broker.health() {
            return Err(BrokerError::new(BrokerErrorKind::Unavailable, format!("forward what {id} sent: {why}")));
        }
        // In this order: a publish that has left the gate is in the queue.
        let under_way = entry.gate.under_way();
        let depths = core.shared.broker.depths(id).await.map(|depths| depths.outbox + depths.notify);
        let mut left = under_way + if_any(depths)?;
        if left == 0 {
            // What has left a queue may not have reached its actor. Without actors the queues say all there is.
            core.set_phase(id, Phase::Counting);
            core.wait_until_calm(id, Duration::from_secs(STOP_WITHIN_S)).await;
            left = if_any(core.shared.broker.left_to_forward(id).await)?;
            if left == 0 {
                return Ok(());
            }
            core.set_phase(id, Phase::Draining);
        }
        if left < least {
            (least, progress_at) = (left, Instant::now());
        }
        if progress_at.elapsed() > Duration::from_secs(STALL_S) {
            let action =
                format!("forward what {id} sent: {left} messages or other consumers are left, and nothing moves");
            return Err(BrokerError::new(BrokerErrorKind::Unavailable, action));
        }
        if begun.elapsed() > Duration::from_secs(DRAIN_MAX_S) {
            log::warn!(
                "client {id} is deleted with {left} messages in its outbox and notify queue: it kept filling them"
            );
            return Ok(());
        }
        actix_rt::time::sleep(Duration::from_millis(poll_ms)).await;
        poll_ms = (poll_ms * 2).min(POLL_MAX_MS);
    }
}

/// Messages in a client's queues; none, when the broker does not know it.
fn if_any(counted: Result<u64, BrokerError>) -> Result<u64, BrokerError> {
    match counted {
        Err(error) if error.kind == BrokerErrorKind::NotFound => Ok(0),
        counted => counted,
    }
}

/// Deletes the queues and the note of a client that is no more, if it left any. Whoever calls has its turn.
pub(super) async fn clear_leftovers(core: &Core, id: &ClientId) -> Result<(), RegistryError> {
    if !core.leftovers.borrow().contains(id) {
        return Ok(());
    }
    core.shared.broker.delete_client(id).await?;
    if let Some(attempts) = &core.attempts {
        attempts.forget(id).await.map_err(store_error(id))?;
    }
    core.store.remove(id).await.map_err(store_error(id))?;
    core.leftovers.borrow_mut().remove(id);
    Ok(())
}

/// Tries once more to clear what all clients that are no more have left.
pub(super) async fn sweep(core: Rc<Core>) {
    let ids: Vec<ClientId> = core.leftovers.borrow().iter().cloned().collect();
    for id in ids {
        let _turn = core.turns.take(&id).await;
        match clear_leftovers(&core, &id).await {
            Ok(()) => log::info!("what client {id} had left was deleted"),
            Err(error) => log::debug!("what client {id} left is deleted later: {error}"),
        }
    }
}
