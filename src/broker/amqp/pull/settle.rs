//! How leases end: acknowledged, given back, delayed, or made dead letters.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::Leased;
use crate::broker::amqp::clients::Client;
use crate::broker::amqp::error::broker_error;
use crate::broker::amqp::held::Held;
use crate::broker::amqp::window::Refusal;
use crate::broker::amqp::wire::Counts;
use crate::broker::amqp::{Shared, delay, settle, topology};
use crate::broker::{BrokerError, BrokerErrorKind, DeadReason, PullOutcome, Receipt};
use crate::client::ClientId;

/// See [`crate::broker::Broker::settle_pulled`].
pub(in super::super) async fn settle_pulled(
    shared: &Arc<Shared>,
    id: &ClientId,
    receipts: Vec<Receipt>,
    outcome: PullOutcome,
) -> Result<Vec<Receipt>, BrokerError> {
    let action = format!("settle messages pulled from {}", topology::inbox(id));
    let client = shared.clients.get(id).ok_or_else(|| BrokerError::new(BrokerErrorKind::NotFound, &action))?;
    match outcome {
        PullOutcome::Ack | PullOutcome::Nack(None) => shared.session(&action)?,
        // These are published.
        PullOutcome::Nack(Some(_)) | PullOutcome::Reject => shared.open_session(&action)?,
    };
    let Some(puller) = client.puller() else { return Ok(receipts) };
    let (ended, unknown) = puller.end_leases(receipts);
    match outcome {
        PullOutcome::Ack => {
            let held: Vec<Held> = ended.into_iter().map(Leased::into_held).collect();
            settle::note_delivered(shared, id, &held);
            if let Err(error) = settle::acknowledge_and_flush(shared, held).await {
                return Err(broker_error(action, error));
            }
        }
        PullOutcome::Nack(delay) => match delay.filter(|delay| !delay.is_zero()) {
            None => puller.put_back(ended),
            Some(delay) => delay_pulled(shared, &client, ended, delay, &action).await?,
        },
        PullOutcome::Reject => {
            let with_attempts = |leased: Leased| {
                let held = leased.into_counted();
                let attempts = held.before;
                (held, attempts)
            };
            let held = ended.into_iter().map(with_attempts).collect();
            settle::bury(shared, id, held, DeadReason::Rejected).await?;
        }
    }
    Ok(unknown)
}

async fn delay_pulled(
    shared: &Arc<Shared>,
    client: &Client,
    ended: Vec<Leased>,
    delay: Duration,
    action: &str,
) -> Result<(), BrokerError> {
    let held: Vec<Held> = ended.into_iter().map(Leased::into_counted).collect();
    let delays = BTreeMap::from([(delay::seconds_for(delay), held.len() as u64)]);
    if let Err(error) = shared.prepare_delays(Some(client), delays).await {
        held.iter().for_each(|held| shared.give_back(held));
        return Err(error);
    }
    let name = topology::inbox(&client.id);
    let message = |held: &Held| {
        let counts = Counts { deliveries: held.before, ..held.counts };
        settle::delayed(&held.payload, counts, delay, &name, shared.user())
    };
    let messages = held.iter().map(message).collect();
    let (gone, refusal) = settle::publish_held(shared, &client.id, held, messages).await;
    settle::acknowledge(gone);
    let Some(why) = refusal else { return Ok(()) };
    if matches!(why, Refusal::Unroutable)
        && let Ok(session) = shared.session(action)
    {
        session.forget_retries();
    }
    Err(settle::refused(action, &why, "a retry queue"))
}
