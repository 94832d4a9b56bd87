//! Onboarding: a client is there whole, or not at all.
//!
//! Its record is stored while its queues are made and bound, side by side, so that they share a commit; then its actors
//! start. A crash in between leaves a record, and the next start makes what is missing; or none, and what was made of
//! its queues is made again by whoever takes the id. When a step fails, all of it is deleted, if need be at the next
//! start.

use std::rc::Rc;
use std::time::Duration;

use super::core::{Core, store_error};
use super::messages::{CreateClient, Created, RegistryError};
use crate::broker::BrokerError;
use crate::client::{ClientId, ClientRecord};
use crate::secret::{Secret, SecretSlots, WebhookSecrets};
use crate::store::StoredClient;
use crate::time::Timestamp;

/// How long the answer waits for the actors, in seconds. They normally take a millisecond; when they take longer than
/// this, the client exists all the same, and its secret must be told.
const READY_WITHIN_S: u64 = 10;

pub(super) async fn create(core: Rc<Core>, request: CreateClient) -> Result<Created, RegistryError> {
    let id = request.client_id.clone();
    let _turn = core.turns.take(&id).await;
    core.check_open()?;
    if core.exists(&id) {
        return Err(RegistryError::Exists(id));
    }
    super::delete::clear_leftovers(&core, &id).await?;
    let secret = Secret::generate();
    let webhook_secrets = request.webhook.as_ref().map(|_| WebhookSecrets::generate());
    let stored = StoredClient {
        record: ClientRecord {
            client_id: id.clone(),
            name: request.name,
            subscriptions: request.subscriptions,
            webhook: request.webhook.map(super::change::normalised),
            limits: request.limits,
            paused: false,
            created_at: Timestamp::now(),
        },
        secrets: SecretSlots::new(&secret),
        // SQLite's integers are signed.
        incarnation: rand::random::<u64>() >> 1,
        webhook_secrets: webhook_secrets.clone(),
    };
    let (put, made) = futures_util::future::join(core.store.put(&stored), make_queues(&core, &stored)).await;
    if let Err(error) = put.map_err(store_error(&id)).and(made.map_err(RegistryError::from)) {
        abandon(&core, &id).await;
        return Err(error);
    }
    let record = stored.record.clone();
    core.adopt(stored, true);
    if !core.wait_until_ready(&id, Duration::from_secs(READY_WITHIN_S)).await {
        log::warn!("client {id} was created, but its actors do not run yet");
    }
    log::info!("client {id} was created");
    Ok(Created { record, secret, webhook_secret: webhook_secrets.map(|secrets| secrets.current().to_owned()) })
}

/// Its queues, and its user where the broker has users.
async fn make_queues(core: &Core, stored: &StoredClient) -> Result<(), BrokerError> {
    let (broker, record) = (&core.shared.broker, &stored.record);
    broker.declare_client(&record.client_id, &record.limits).await?;
    broker.bind(&record.client_id, &record.subscriptions).await?;
    match &stored.secrets.broker_password {
        Some(password) => broker.set_password(&record.client_id, password).await,
        None => Ok(()),
    }
}

/// What could not be made whole is deleted: now, or when the broker is back, or at the next start.
async fn abandon(core: &Core, id: &ClientId) {
    core.leftovers.borrow_mut().insert(id.clone());
    if let Err(error) = core.store.mark_unfinished(id).await {
        log::warn!("{id} could not be created, and the next start may find it all the same: {error}");
    }
    if let Err(error) = super::delete::clear_leftovers(core, id).await {
        log::warn!("the queues of {id}, which was not created, are deleted later: {error}");
    }
}
