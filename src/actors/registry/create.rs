//! Onboarding: a client is there whole, or not at all.
//!
//! Order: note in the store that its queues are being made, make and bind them, store the client, start its actors. A
//! crash before the client is stored leaves the note, and the next start deletes what was made.

use std::rc::Rc;
use std::time::Duration;

use super::core::{Core, store_error};
use super::messages::{CreateClient, Created, RegistryError};
use crate::broker::BrokerError;
use crate::client::{ClientId, ClientRecord, Limits};
use crate::secret::{Secret, SecretSlots, WebhookSecrets};
use crate::store::StoredClient;
use crate::time::Timestamp;
use crate::topic::Pattern;

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
    // Side by side, so that both may share a commit. Once either fails, whatever was made is to go.
    let (noted, made) = futures_util::future::join(
        core.store.mark_unfinished(&id),
        make_queues(&core, &id, &request.limits, &request.subscriptions),
    )
    .await;
    if let Err(error) = noted.map_err(store_error(&id)).and(made.map_err(RegistryError::from)) {
        abandon(&core, &id).await;
        return Err(error);
    }
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
    if let Err(error) = core.store.put(&stored).await {
        abandon(&core, &id).await;
        return Err(store_error(&id)(error));
    }
    let record = stored.record.clone();
    core.adopt(stored, true);
    if !core.wait_until_ready(&id, Duration::from_secs(READY_WITHIN_S)).await {
        log::warn!("client {id} was created, but its actors do not run yet");
    }
    log::info!("client {id} was created");
    Ok(Created { record, secret, webhook_secret: webhook_secrets.map(|secrets| secrets.current().to_owned()) })
}

async fn make_queues(core: &Core, id: &ClientId, limits: &Limits, patterns: &[Pattern]) -> Result<(), BrokerError> {
    core.shared.broker.declare_client(id, limits).await?;
    core.shared.broker.bind(id, patterns).await
}

/// What could not be made whole is deleted; now, or when the broker is back.
async fn abandon(core: &Core, id: &ClientId) {
    core.leftovers.borrow_mut().insert(id.clone());
    if let Err(error) = super::delete::clear_leftovers(core, id).await {
        log::warn!("the queues of {id}, which was not created, are deleted later: {error}");
    }
}
