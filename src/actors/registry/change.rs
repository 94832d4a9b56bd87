//! Changes to a client: PATCH, rotation of its secrets, and a webhook that is switched off.
//!
//! Order: what the broker must do (limits, bindings) comes first, since it may refuse; then the store; then the
//! directory and the actors, which cannot. What was done is undone when a later step fails.

use std::num::NonZeroU32;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::core::{Core, store_error};
use super::messages::{
    ActorState, DisableWebhook, PatchClient, Patched, RegistryError, RotateSecret, Rotated, SecretKind,
};
use crate::actors::subscriber::Rebind;
use crate::broker::{BrokerError, BrokerErrorKind};
use crate::client::{ClientId, Limits, Webhook};
use crate::limits::SendLimiter;
use crate::secret::{Secret, WebhookSecrets};
use crate::store::StoredClient;
use crate::time::Timestamp;
use crate::topic::Pattern;

/// How long a change waits for the subscriber, in seconds.
const BIND_WITHIN_S: u64 = 20;

/// How long actors that are not wanted any more have to stop, in seconds.
const STOP_WITHIN_S: u64 = 5;

/// What a webhook that was switched off by a request says.
const SWITCHED_OFF: &str = "switched off by request";

/// What a webhook says whose secrets cannot be read.
pub(super) const SECRET_UNREADABLE: &str =
    "its secret cannot be read because SOAR_TOKEN_SECRET has changed: rotate the webhook secret";

pub(super) async fn patch(core: Rc<Core>, patch: PatchClient) -> Result<Patched, RegistryError> {
    let Some(id) = patch.client_id.clone() else { return Err(RegistryError::NotFound(ClientId::backbone())) };
    let _turn = core.turns.take(&id).await;
    core.check_open()?;
    let old = core.stored(&id)?;
    // Whole values replace whole values: what another change has made of them in between must not be undone.
    if patch.merged_with.as_ref().is_some_and(|record| *record != old.record) {
        return Err(RegistryError::Changed(id));
    }
    let (new, webhook_secret) = patched(&old, patch);
    if new.record == old.record && webhook_secret.is_none() {
        return Ok(Patched { record: new.record, webhook_secret });
    }
    let bound_by = tell_broker(&core, &id, &old, &new).await?;
    if let Err(error) = core.store.put(&new).await {
        undo(&core, &id, &old, &new).await;
        return Err(store_error(&id)(error));
    }
    let record = new.record.clone();
    core.update(&id, new, bound_by);
    core.wait_until_calm(&id, Duration::from_secs(STOP_WITHIN_S)).await;
    log::info!("client {id} was changed");
    Ok(Patched { record, webhook_secret })
}

/// The client after the patch, and the secret that its first webhook gets.
fn patched(old: &StoredClient, patch: PatchClient) -> (StoredClient, Option<String>) {
    let mut new = old.clone();
    let record = &mut new.record;
    if let Some(name) = patch.name {
        record.name = name;
    }
    if let Some(subscriptions) = patch.subscriptions {
        record.subscriptions = subscriptions;
    }
    if let Some(limits) = patch.limits {
        record.limits = limits;
    }
    if let Some(paused) = patch.paused {
        record.paused = paused;
    }
    let mut first_secret = None;
    if let Some(webhook) = patch.webhook {
        let had_one = old.record.webhook.is_some();
        record.webhook = webhook.map(normalised);
        match (&record.webhook, had_one) {
            (None, _) => new.webhook_secrets = None,
            (Some(_), true) => {}
            (Some(_), false) => {
                let secrets = WebhookSecrets::generate();
                first_secret = Some(secrets.current().to_owned());
                new.webhook_secrets = Some(secrets);
            }
        }
    }
    (new, first_secret)
}

/// A webhook says why it is off exactly when it is.
pub(super) fn normalised(mut webhook: Webhook) -> Webhook {
    if webhook.enabled {
        webhook.disabled_reason = None;
    } else {
        webhook.disabled_reason.get_or_insert_with(|| SWITCHED_OFF.to_owned());
    }
    webhook
}

/// What enforces `send_per_s`; the one there is, when the rate is still the same.
pub(super) fn limiter(limits: &Limits, present: Option<&Arc<SendLimiter>>) -> Option<Arc<SendLimiter>> {
    let per_s = limits.send_per_s.and_then(NonZeroU32::new)?;
    match present {
        Some(present) if present.per_s() == per_s.get() => Some(Arc::clone(present)),
        _ => Some(Arc::new(SendLimiter::new(per_s))),
    }
}

fn inbox_limits(limits: &Limits) -> (Option<u64>, Option<u64>) {
    (limits.max_inbox_messages, limits.inbox_ttl_s)
}

/// Limits and bindings. Returns which life of the subscriber has bound new patterns.
async fn tell_broker(
    core: &Core,
    id: &ClientId,
    old: &StoredClient,
    new: &StoredClient,
) -> Result<Option<u32>, RegistryError> {
    if inbox_limits(&new.record.limits) != inbox_limits(&old.record.limits) {
        core.shared.broker.declare_client(id, &new.record.limits).await?;
    }
    if new.record.subscriptions == old.record.subscriptions {
        return Ok(None);
    }
    match rebind(core, id, &new.record.subscriptions).await {
        Ok(bound_by) => Ok(Some(bound_by)),
        Err(error) => {
            undo(core, id, old, new).await;
            Err(error.into())
        }
    }
}

/// Has the subscriber bind new patterns; when it dies over it, its next life is asked.
async fn rebind(core: &Core, id: &ClientId, patterns: &[Pattern]) -> Result<u32, BrokerError> {
    let unavailable =
        |why: &str| BrokerError::new(BrokerErrorKind::Unavailable, format!("bind the inbox of {id}: {why}"));
    let ask = async {
        loop {
            if let Some((subscriber, generation)) = core.subscriber(id) {
                match subscriber.send(Rebind(patterns.to_vec())).await {
                    Ok(result) => return result.map(|()| generation),
                    Err(mailbox) => log::debug!("the subscriber of {id} does not answer: {mailbox}"),
                }
            }
            let alive = |client: &super::core::Client| {
                let child = client.child(crate::actors::ActorKind::Subscriber);
                child.life.is_some() && child.state == ActorState::Running
            };
            core.wait_until(id, Duration::from_secs(BIND_WITHIN_S), alive).await;
        }
    };
    match tokio::time::timeout(Duration::from_secs(BIND_WITHIN_S), ask).await {
        Ok(result) => result,
        Err(_) => Err(unavailable("its subscriber does not answer in time")),
    }
}

/// Gives limits and bindings their old values back after a failure. The subscriber tries until it has them.
async fn undo(core: &Core, id: &ClientId, old: &StoredClient, new: &StoredClient) {
    if inbox_limits(&new.record.limits) != inbox_limits(&old.record.limits)
        && let Err(error) = core.shared.broker.declare_client(id, &old.record.limits).await
    {
        log::warn!(
            "the limits of {id} are as the failed change wanted them until its queues are declared again: {error}"
        );
    }
    if new.record.subscriptions != old.record.subscriptions
        && let Some((subscriber, _)) = core.subscriber(id)
        && subscriber.try_send(Rebind(old.record.subscriptions.clone())).is_err()
    {
        // Its next life binds what the directory has, which is the old.
        log::debug!("the subscriber of {id} does not listen");
    }
}

pub(super) async fn rotate(core: Rc<Core>, request: RotateSecret) -> Result<Rotated, RegistryError> {
    let id = request.client_id;
    let _turn = core.turns.take(&id).await;
    core.check_open()?;
    let mut stored = core.stored(&id)?;
    let old_password = stored.secrets.broker_password;
    let now = Timestamp::now();
    let previous_valid_until = now.plus_millis(i64::from(request.overlap_s) * 1000);
    let secret = match request.kind {
        SecretKind::Client => {
            let secret = Secret::generate();
            stored.secrets = stored.secrets.rotated(&secret, now, previous_valid_until);
            secret.reveal().to_owned()
        }
        SecretKind::Webhook => {
            let Some(webhook) = &mut stored.record.webhook else { return Err(RegistryError::NoWebhook(id)) };
            let secrets = match &stored.webhook_secrets {
                Some(present) => present.rotated(now, previous_valid_until),
                None => WebhookSecrets::generate(),
            };
            if webhook.disabled_reason.as_deref() == Some(SECRET_UNREADABLE) {
                webhook.enabled = true;
                webhook.disabled_reason = None;
            }
            let secret = secrets.current().to_owned();
            stored.webhook_secrets = Some(secrets);
            secret
        }
    };
    let password = stored.secrets.broker_password.filter(|password| Some(*password) != old_password);
    if let Some(password) = &password {
        core.shared.broker.set_password(&id, password).await?;
    }
    if let Err(error) = core.store.put(&stored).await {
        if let Some(old) = old_password.filter(|_| password.is_some())
            && let Err(error) = core.shared.broker.set_password(&id, &old).await
        {
            log::warn!("the broker has a password of {id} that nobody knows, until the next rotation: {error}");
        }
        return Err(store_error(&id)(error));
    }
    core.update(&id, stored, None);
    let which = if request.kind == SecretKind::Client { "secret" } else { "webhook secret" };
    log::info!("the {which} of client {id} was rotated");
    Ok(Rotated { secret, previous_valid_until })
}

/// A pusher has switched its webhook off.
pub(super) async fn disable_webhook(core: Rc<Core>, request: DisableWebhook) {
    let Some(id) = request.identity.client.clone() else { return };
    let _turn = core.turns.take(&id).await;
    let present = core.with(&id, |client| client.child(request.identity.kind).generation);
    let Ok(mut stored) = core.stored(&id) else { return };
    if core.check_open().is_err() || present != Some(request.identity.generation) {
        return;
    }
    let Some(webhook) = stored.record.webhook.as_mut().filter(|webhook| webhook.enabled) else { return };
    webhook.enabled = false;
    webhook.disabled_reason = Some(request.reason.clone());
    if let Err(error) = core.store.put(&stored).await {
        // It goes on calling, and will ask again.
        log::error!("the webhook of {id} cannot be switched off: {error}");
        return;
    }
    core.update(&id, stored, None);
    log::warn!("the webhook of client {id} was switched off: {}", request.reason);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::ClientRecord;
    use crate::secret::SecretSlots;

    fn client() -> StoredClient {
        StoredClient {
            record: ClientRecord {
                client_id: ClientId::parse("a").expect("test id"),
                name: Some("A".into()),
                subscriptions: vec![],
                webhook: None,
                limits: Limits::default(),
                paused: false,
                created_at: Timestamp::from_millis(0),
            },
            secrets: SecretSlots::new(&Secret::generate()),
            incarnation: 1,
            webhook_secrets: None,
        }
    }

    fn webhook(json: &str) -> Webhook {
        serde_json::from_str(json).expect("test webhook")
    }

    #[test]
    fn a_patch_changes_what_it_names_and_a_first_webhook_gets_a_secret() {
        let old = client();
        let (new, secret) = patched(&old, PatchClient { name: Some(None), ..PatchClient::default() });
        assert_eq!((new.record.name, secret), (None, None));

        let set = PatchClient { webhook: Some(Some(webhook(r#"{"url":"https://x"}"#))), ..PatchClient::default() };
        let (with, secret) = patched(&old, set);
        assert_eq!(secret.as_deref(), with.webhook_secrets.as_ref().map(WebhookSecrets::current));
        assert!(secret.is_some());

        let off = PatchClient {
            webhook: Some(Some(webhook(r#"{"url":"https://y","enabled":false}"#))),
            ..PatchClient::default()
        };
        let (off, secret) = patched(&with, off);
        assert_eq!(secret, None);
        assert_eq!(off.webhook_secrets, with.webhook_secrets);
        let reason = off.record.webhook.as_ref().and_then(|webhook| webhook.disabled_reason.clone());
        assert_eq!(reason.as_deref(), Some(SWITCHED_OFF));

        let (gone, _) = patched(&off, PatchClient { webhook: Some(None), ..PatchClient::default() });
        assert_eq!((gone.record.webhook, gone.webhook_secrets), (None, None));
    }

    #[test]
    fn a_webhook_that_is_on_gives_no_reason_for_being_off() {
        let on = normalised(webhook(r#"{"url":"https://x","enabled":true,"disabled_reason":"old"}"#));
        assert_eq!(on.disabled_reason, None);
    }

    #[test]
    fn an_unchanged_rate_keeps_its_limiter() {
        let limits = Limits { send_per_s: Some(5), ..Limits::default() };
        let first = limiter(&limits, None).expect("limited");
        assert!(Arc::ptr_eq(&first, &limiter(&limits, Some(&first)).expect("limited")));
        let other = Limits { send_per_s: Some(6), ..Limits::default() };
        assert_eq!(limiter(&other, Some(&first)).expect("limited").per_s(), 6);
        assert!(limiter(&Limits::default(), Some(&first)).is_none());
    }
}
