//! Operations: whole or not at all, one after the other, and what a crash or a failure leaves.

use std::sync::atomic::Ordering;

use futures_util::future::join_all;

use super::*;
use crate::actors::registry::ActorState;
use crate::broker::BrokerErrorKind;

#[actix_rt::test]
async fn an_id_is_taken_once() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    let attempts = join_all((0..10).map(|_| world.registry.send(new_client("a", &["x"])))).await;
    let created = attempts.into_iter().filter(|attempt| matches!(attempt, Ok(Ok(_)))).count();
    assert_eq!(created, 1);
    let again = world.registry.send(new_client("a", &[])).await.expect("answers");
    assert!(matches!(again, Err(RegistryError::Exists(_))), "{again:?}");
    world.close().await;
}

#[actix_rt::test]
async fn clients_survive_a_restart_with_their_secrets_and_incarnations() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    let created = world.create("a", &["x.#"]).await;
    world.patch(PatchClient { paused: Some(true), name: Some(Some("A".into())), ..patch("a") }).await;
    world.send("a", Some("x.y"), "1").await;
    let before = world.directory.get("a").expect("there");
    world.close().await;

    let world = World::open(directory.path()).await;
    let after = world.directory.get("a").expect("there at once");
    assert_eq!(after.record, before.record);
    assert_eq!(after.incarnation, before.incarnation);
    assert!(after.secrets.verify(created.secret.reveal(), Timestamp::now()));
    world.until_ready().await;
    assert_eq!(world.states("a").await.forwarder, ActorState::Paused);
    world.patch(PatchClient { paused: Some(false), ..patch("a") }).await;
    assert_eq!(world.receive("a", 1).await, ["1"]);
    world.close().await;
}

#[actix_rt::test]
async fn new_patterns_hold_when_the_answer_comes() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    world.create("a", &["old"]).await;
    world.patch(PatchClient { subscriptions: Some(patterns(&["new", "other.#"])), ..patch("a") }).await;
    for topic in ["old", "new", "other.x"] {
        world.send("a", Some(topic), &format!("\"{topic}\"")).await;
    }
    assert_eq!(world.receive("a", 2).await, ["\"new\"", "\"other.x\""]);
    assert_eq!(world.depths("a").await.inbox, 0);
    world.close().await;
}

#[actix_rt::test]
async fn a_change_that_the_broker_refuses_changes_nothing() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    world.create("a", &["old"]).await;
    world.broker.faults.bind.store(true, Ordering::SeqCst);
    let change = PatchClient { subscriptions: Some(patterns(&["new"])), ..patch("a") };
    let refused = world.registry.send(change).await.expect("answers");
    assert!(matches!(&refused, Err(RegistryError::Broker(e)) if e.kind == BrokerErrorKind::Unavailable), "{refused:?}");
    world.broker.faults.bind.store(false, Ordering::SeqCst);
    assert_eq!(world.directory.get("a").expect("there").record.subscriptions, patterns(&["old"]));
    until("bound as before", async || world.states("a").await.subscriber == ActorState::Running).await;
    world.send("a", Some("new"), "1").await;
    world.send("a", Some("old"), "2").await;
    assert_eq!(world.receive("a", 1).await, ["2"]);
    world.close().await;
}

#[actix_rt::test]
async fn a_client_that_cannot_be_made_whole_is_not_made() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    world.broker.faults.bind.store(true, Ordering::SeqCst);
    let refused = world.registry.send(new_client("a", &["x"])).await.expect("answers");
    assert!(matches!(refused, Err(RegistryError::Broker(_))), "{refused:?}");
    assert!(world.directory.is_empty());
    let left = world.broker.depths(&id("a")).await.expect_err("no queues are left");
    assert_eq!(left.kind, BrokerErrorKind::NotFound);
    world.broker.faults.bind.store(false, Ordering::SeqCst);
    world.create("a", &["x"]).await;
    world.close().await;
}

#[actix_rt::test]
async fn a_secret_that_the_broker_does_not_take_is_none() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    let created = world.create("a", &["x"]).await;
    world.broker.faults.password.store(true, Ordering::SeqCst);
    let rotate = RotateSecret { client_id: id("a"), kind: SecretKind::Client, overlap_s: 0 };
    let refused = world.registry.send(rotate.clone()).await.expect("answers");
    assert!(matches!(refused, Err(RegistryError::Broker(_))), "{refused:?}");
    let verifies = |secret: &str| world.directory.get("a").expect("there").secrets.verify(secret, Timestamp::now());
    assert!(verifies(created.secret.reveal()));
    let refused = world.registry.send(new_client("b", &[])).await.expect("answers");
    assert!(matches!(refused, Err(RegistryError::Broker(_))), "{refused:?}");
    assert!(world.directory.get("b").is_none() && world.broker.depths(&id("b")).await.is_err());
    world.broker.faults.password.store(false, Ordering::SeqCst);
    let rotated = world.registry.send(rotate).await.expect("answers").expect("rotates");
    assert!(verifies(&rotated.secret) && !verifies(created.secret.reveal()));
    world.close().await;
}

#[actix_rt::test]
async fn what_a_crash_left_of_a_creation_is_deleted_at_the_next_start() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    let store = Store::open(world.db.clone(), &TokenSecret::parse(KEY).expect("test key")).await.expect("opens");
    store.mark_unfinished(&id("half")).await.expect("notes");
    world.broker.declare_client(&id("half"), &Limits::default()).await.expect("declares");
    world.close().await;

    let world = World::open(directory.path()).await;
    assert!(world.directory.is_empty());
    until("queues are gone", async || world.broker.depths(&id("half")).await.is_err()).await;
    world.create("half", &["x"]).await;
    world.close().await;
    let world = World::open(directory.path()).await;
    assert_eq!(world.directory.len(), 1);
    world.close().await;
}

#[actix_rt::test]
async fn an_asker_that_goes_away_does_not_stop_half_way() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    let asked = world.registry.send(new_client("a", &["x"]));
    // Long enough for the registry to have begun, too short for it to have finished.
    let _ = tokio::time::timeout(Duration::from_micros(50), asked).await;
    world.create("b", &[]).await;
    until("all or nothing", async || {
        let stored = world.directory.get("a").is_some();
        let queues = world.broker.depths(&id("a")).await.is_ok();
        stored == queues
    })
    .await;
    world.close().await;
}

#[actix_rt::test]
async fn a_deleted_client_has_its_messages_forwarded_and_leaves_nothing() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    let first = world.create("a", &["#"]).await;
    world.create("b", &["#"]).await;
    // Paused, so that there is something left to forward.
    world.patch(PatchClient { paused: Some(true), ..patch("a") }).await;
    for n in 0..500 {
        world.send("a", Some("x"), &n.to_string()).await;
    }
    world.send("a", None, "\"all\"").await;
    world.registry.send(DeleteClient(id("a"))).await.expect("answers").expect("deletes");
    let mut received = world.receive("b", 501).await;
    received.retain(|body| body != "\"all\"");
    assert_eq!(received, (0..500).map(|n| n.to_string()).collect::<Vec<_>>());
    assert!(world.directory.get("a").is_none());
    assert_eq!(world.registry.send(GetActorStates(id("a"))).await.expect("answers"), None);
    let again = world.registry.send(DeleteClient(id("a"))).await.expect("answers");
    assert!(matches!(again, Err(RegistryError::NotFound(_))), "{again:?}");

    let second = world.create("a", &["#"]).await;
    assert_eq!(world.depths("a").await, Depths::default());
    let entry = world.directory.get("a").expect("there");
    assert!(!entry.secrets.verify(first.secret.reveal(), Timestamp::now()));
    assert!(entry.secrets.verify(second.secret.reveal(), Timestamp::now()));
    world.close().await;
}

#[actix_rt::test]
async fn a_publish_that_was_let_in_is_waited_for() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    world.create("a", &[]).await;
    world.create("b", &["#"]).await;
    let permit = world.directory.get("a").expect("there").gate.enter().expect("open");
    let entry = world.directory.get("a").expect("there");
    let mut deletion = std::pin::pin!(world.registry.send(DeleteClient(id("a"))));
    until("it has begun", async || {
        assert!(futures_util::poll!(deletion.as_mut()).is_pending());
        world.directory.get("a").is_none()
    })
    .await;
    assert!(entry.gate.enter().is_none());
    world.send("a", Some("x"), "1").await;
    drop(permit);
    deletion.await.expect("answers").expect("deletes");
    assert_eq!(world.receive("b", 1).await, ["1"]);
    world.close().await;
}

#[actix_rt::test]
async fn a_deletion_that_the_broker_cuts_short_goes_on_when_asked_again() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    world.create("a", &["x"]).await;
    world.broker.faults.delete.store(true, Ordering::SeqCst);
    let failed = world.registry.send(DeleteClient(id("a"))).await.expect("answers");
    assert!(matches!(failed, Err(RegistryError::Broker(_))), "{failed:?}");
    assert!(world.directory.get("a").is_none());
    world.broker.faults.delete.store(false, Ordering::SeqCst);
    world.registry.send(DeleteClient(id("a"))).await.expect("answers").expect("deletes");
    assert!(world.broker.depths(&id("a")).await.is_err());
    world.close().await;
}

#[actix_rt::test]
async fn a_rotated_secret_is_valid_beside_the_old_one_for_a_while() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    let created = world.create("a", &[]).await;
    let incarnation = world.directory.get("a").expect("there").incarnation;
    let rotate = RotateSecret { client_id: id("a"), kind: SecretKind::Client, overlap_s: 60 };
    let rotated = world.registry.send(rotate).await.expect("answers").expect("rotates");
    let entry = world.directory.get("a").expect("there");
    assert_eq!(entry.incarnation, incarnation);
    let now = Timestamp::now();
    assert!(entry.secrets.verify(created.secret.reveal(), now) && entry.secrets.verify(&rotated.secret, now));
    assert!(!entry.secrets.verify(created.secret.reveal(), rotated.previous_valid_until));
    let webhook = RotateSecret { client_id: id("a"), kind: SecretKind::Webhook, overlap_s: 0 };
    let none = world.registry.send(webhook).await.expect("answers");
    assert!(matches!(none, Err(RegistryError::NoWebhook(_))), "{none:?}");
    world.close().await;
}

#[actix_rt::test]
async fn another_token_secret_switches_webhooks_off_until_their_secret_is_rotated() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    let webhook = serde_json::from_str(r#"{"url":"https://x"}"#).expect("test webhook");
    let create = CreateClient { webhook: Some(webhook), ..new_client("a", &[]) };
    world.registry.send(create).await.expect("answers").expect("creates");
    world.close().await;

    let world = World::open_with(directory.path(), &TokenSecret::generate(), None).await;
    let off = |world: &World| world.directory.get("a").expect("there").record.webhook.clone().expect("has one");
    assert!(!off(&world).enabled && off(&world).disabled_reason.is_some());
    assert_eq!(world.registry.send(GetWebhookSecrets(id("a"))).await.expect("answers"), None);
    world.close().await;

    let world = World::open(directory.path()).await;
    assert!(off(&world).enabled, "with the old key it is as it was");
    world.close().await;

    let world = World::open_with(directory.path(), &TokenSecret::generate(), None).await;
    let rotate = RotateSecret { client_id: id("a"), kind: SecretKind::Webhook, overlap_s: 0 };
    let rotated = world.registry.send(rotate).await.expect("answers").expect("rotates");
    let secrets = world.registry.send(GetWebhookSecrets(id("a"))).await.expect("answers").expect("has");
    assert_eq!(secrets.current(), rotated.secret);
    assert!(off(&world).enabled && off(&world).disabled_reason.is_none());

    // One that is off for another reason stays off.
    let reason = Some("the endpoint answered 410 Gone".to_owned());
    let webhook = Webhook { enabled: false, disabled_reason: reason.clone(), ..off(&world) };
    world.patch(PatchClient { webhook: Some(Some(webhook)), ..patch("a") }).await;
    world.close().await;
    let world = World::open_with(directory.path(), &TokenSecret::generate(), None).await;
    let rotate = RotateSecret { client_id: id("a"), kind: SecretKind::Webhook, overlap_s: 0 };
    world.registry.send(rotate).await.expect("answers").expect("rotates");
    assert!(!off(&world).enabled);
    assert_eq!(off(&world).disabled_reason, reason);
    world.close().await;
}

#[actix_rt::test]
async fn a_patch_that_was_merged_with_another_record_is_refused() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    let record = world.create("a", &["x"]).await.record;
    let merged = || PatchClient { merged_with: Some(record.clone()), ..patch("a") };
    world.patch(PatchClient { name: Some(Some("first".into())), ..merged() }).await;
    let second = PatchClient { limits: Some(Limits::default()), ..merged() };
    let refused = world.registry.send(second).await.expect("answers");
    assert!(matches!(refused, Err(RegistryError::Changed(_))), "{refused:?}");
    assert_eq!(world.directory.get("a").expect("there").record.name.as_deref(), Some("first"));
    world.close().await;
}
