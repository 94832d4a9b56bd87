//! Actors: at work, dying, paused, waiting for the broker.

use std::sync::atomic::Ordering;

use parking_lot::Mutex;

use super::*;
use crate::actors::registry::ActorState;
use crate::actors::{ActorKind, supervision};

#[actix_rt::test]
async fn messages_travel_from_outbox_to_inbox_in_order_and_broadcasts_to_everyone() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    world.create("a", &[]).await;
    world.create("b", &["soar.#"]).await;
    let messages = (0..1000).map(|n| message("a", Some("soar.x"), &n.to_string())).collect();
    world.broker.publish(&Queue::Outbox(id("a")), messages).await.expect("publishes");
    assert_eq!(world.receive("b", 1000).await, (0..1000).map(|n| n.to_string()).collect::<Vec<_>>());
    world.send("a", None, "\"all\"").await;
    assert_eq!(world.receive("a", 1).await, ["\"all\""]);
    assert_eq!(world.receive("b", 1).await, ["\"all\""]);
    assert_eq!(world.depths("a").await, Depths::default());
    world.close().await;
}

#[actix_rt::test]
async fn every_kind_of_actor_is_back_after_a_panic_and_nothing_is_lost() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    world.create("a", &["a.*"]).await;
    world.create("b", &["a.*"]).await;
    let victims = [
        (Some("a"), ActorKind::Forwarder),
        (Some("a"), ActorKind::Broadcaster),
        (Some("b"), ActorKind::Subscriber),
        (None, ActorKind::Publisher),
    ];
    let mut sent = Vec::new();
    for (round, (client, kind)) in victims.into_iter().enumerate() {
        let restarts = world.telemetry.metrics.actor_restarts.with_label_values(&[kind.as_str()]);
        for n in 0..50 {
            let body = format!("{}", round * 100 + n);
            world.send("a", Some("a.x"), &body).await;
            sent.push(body);
            if n == 25 {
                let panic = InjectPanic { client: client.map(id), kind };
                assert!(world.registry.send(panic).await.expect("answers"), "{kind} is there");
            }
        }
        until("restart", async || restarts.get() == 1).await;
    }
    let mut received = world.receive("b", sent.len()).await;
    received.sort_by_key(|body| body.parse::<u32>().expect("a number"));
    received.dedup();
    assert_eq!(received, sent);
    world.until_ready().await;
    for client in ["a", "b"] {
        until("running again", async || {
            let states = world.states(client).await;
            [states.forwarder, states.broadcaster, states.subscriber] == [ActorState::Running; 3]
        })
        .await;
    }
    assert_eq!(world.states("a").await.pusher, ActorState::Stopped);
    world.close().await;
}

#[actix_rt::test]
async fn a_panic_that_nobody_has_is_not_injected() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    world.create("a", &[]).await;
    for (client, kind) in [
        (Some(id("a")), ActorKind::Pusher),
        (Some(id("nobody")), ActorKind::Forwarder),
        (Some(id("a")), ActorKind::Publisher),
        (None, ActorKind::Pusher),
    ] {
        let injected = world.registry.send(InjectPanic { client, kind }).await.expect("answers");
        assert!(!injected, "{kind}");
    }
    world.close().await;
}

#[actix_rt::test]
async fn a_paused_client_forwards_nothing_until_it_goes_on() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    world.create("a", &[]).await;
    world.create("b", &["#"]).await;
    world.patch(PatchClient { paused: Some(true), ..patch("a") }).await;
    let states = world.states("a").await;
    assert_eq!((states.forwarder, states.broadcaster), (ActorState::Paused, ActorState::Paused));
    assert_eq!(states.subscriber, ActorState::Running);
    for n in 0..10 {
        world.send("a", Some("x"), &n.to_string()).await;
    }
    world.send("a", None, "\"all\"").await;
    // A message of another client goes all the way; those of the paused one could have, too.
    world.send("b", Some("x"), "\"b\"").await;
    assert_eq!(world.receive("b", 1).await, ["\"b\""]);
    assert_eq!((world.depths("a").await.outbox, world.depths("a").await.notify), (10, 1));
    let readiness = world.registry.send(GetReadiness).await.expect("answers");
    assert!(readiness.ready, "{readiness:?}");
    world.patch(PatchClient { paused: Some(false), ..patch("a") }).await;
    let mut received = world.receive("b", 11).await;
    received.retain(|body| body != "\"all\"");
    assert_eq!(received, (0..10).map(|n| n.to_string()).collect::<Vec<_>>());
    world.close().await;
}

#[actix_rt::test]
async fn a_batch_that_cannot_be_settled_comes_again_in_order() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    world.create("a", &[]).await;
    world.create("b", &["#"]).await;
    world.broker.faults.settle.store(true, Ordering::SeqCst);
    let messages = (0..2000).map(|n| message("a", Some("x"), &n.to_string())).collect();
    world.broker.publish(&Queue::Outbox(id("a")), messages).await.expect("publishes");
    until("it notices", async || world.states("a").await.forwarder == ActorState::Starting).await;
    world.broker.faults.settle.store(false, Ordering::SeqCst);
    assert_eq!(world.receive("b", 2000).await, (0..2000).map(|n| n.to_string()).collect::<Vec<_>>());
    assert_eq!(world.states("a").await.forwarder, ActorState::Running);
    world.close().await;
}

#[actix_rt::test]
async fn a_broker_that_is_away_at_the_start_is_waited_for() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    world.create("a", &[]).await;
    world.create("b", &["#"]).await;
    world.close().await;

    let world = World::open(directory.path()).await;
    world.broker.faults.bind.store(true, Ordering::SeqCst);
    world.broker.faults.consume.store(true, Ordering::SeqCst);
    assert_eq!(world.directory.len(), 2);
    let readiness = world.registry.send(GetReadiness).await.expect("answers");
    assert!(readiness.reasons.iter().any(|reason| reason.starts_with("starting: ")), "{readiness:?}");
    world.send("a", Some("x"), "1").await;
    world.broker.faults.bind.store(false, Ordering::SeqCst);
    world.broker.faults.consume.store(false, Ordering::SeqCst);
    world.until_ready().await;
    assert_eq!(world.receive("b", 1).await, ["1"]);
    world.close().await;
}

#[actix_rt::test]
async fn after_shutting_down_nothing_runs_and_nothing_is_begun() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let world = World::open(directory.path()).await;
    for n in 0..20 {
        world.create(&format!("c{n}"), &[]).await;
    }
    world.registry.send(Shutdown { within: DEADLINE }).await.expect("answers");
    let census = world.registry.send(GetActorCensus).await.expect("answers");
    let counts = census.counts.iter();
    let stopped: u64 = counts.filter(|(_, state, _)| *state == ActorState::Stopped).map(|(_, _, count)| count).sum();
    assert_eq!(stopped, 20 * 4 + 1, "{census:?}");
    let refused = world.registry.send(new_client("late", &[])).await.expect("answers");
    assert!(matches!(refused, Err(RegistryError::ShuttingDown)), "{refused:?}");
    world.broker.close().await;
    world.db.close();
}

/// A pusher that only says that it is there.
struct QuietPusher {
    seed: PusherSeed,
}

impl Actor for QuietPusher {
    type Context = Context<Self>;
    fn started(&mut self, _: &mut Self::Context) {
        self.seed.shared.report_ready(&self.seed.identity);
    }
}

impl Handler<Control> for QuietPusher {
    type Result = ();
    fn handle(&mut self, control: Control, ctx: &mut Self::Context) {
        control.obey(&self.seed.identity, ctx);
    }
}

#[actix_rt::test]
async fn a_pusher_runs_exactly_while_there_is_an_enabled_webhook_and_no_pause() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let started = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&started);
    let factory: PusherFactory = Arc::new(move |arbiter, seed, on_exit| {
        seen.lock().push((seed.webhook.url.clone(), seed.identity.clone(), Arc::clone(&seed.secrets)));
        let (addr, lifeline) = supervision::start(arbiter, move || QuietPusher { seed }, on_exit);
        (addr.recipient(), lifeline)
    });
    let key = TokenSecret::parse(KEY).expect("test key");
    let world = World::open_with(directory.path(), &key, Some(factory)).await;
    let webhook = |url: &str| serde_json::from_value(serde_json::json!({ "url": url })).expect("test webhook");
    let created = world.registry.send(CreateClient { webhook: Some(webhook("https://one")), ..new_client("a", &[]) });
    let created = created.await.expect("answers").expect("creates");
    assert!(created.webhook_secret.as_ref().is_some_and(|secret| secret.starts_with("whsec_")));
    assert_eq!(world.states("a").await.pusher, ActorState::Running);

    world.patch(PatchClient { paused: Some(true), ..patch("a") }).await;
    assert_eq!(world.states("a").await.pusher, ActorState::Paused);
    world.patch(PatchClient { paused: Some(false), ..patch("a") }).await;
    until("pushes again", async || world.states("a").await.pusher == ActorState::Running).await;

    let moved = world.patch(PatchClient { webhook: Some(Some(webhook("https://two"))), ..patch("a") }).await;
    assert_eq!(moved.webhook_secret, None);
    until("pushes elsewhere", async || started.lock().last().is_some_and(|(url, _, _)| url == "https://two")).await;
    until("runs", async || world.states("a").await.pusher == ActorState::Running).await;

    let rotate = RotateSecret { client_id: id("a"), kind: SecretKind::Webhook, overlap_s: 60 };
    let rotated = world.registry.send(rotate).await.expect("answers").expect("rotates");
    let secrets = started.lock().last().map(|(_, _, secrets)| Arc::clone(secrets)).expect("was started");
    assert_eq!(secrets.read().current(), rotated.secret);
    assert_eq!(secrets.read().valid_at(Timestamp::now()).count(), 2);

    let (stale, present) = {
        let started = started.lock();
        (started[0].1.clone(), started.last().expect("was started").1.clone())
    };
    let disable = |identity| DisableWebhook { identity, reason: "410".into() };
    world.registry.send(disable(stale)).await.expect("answers");
    assert_eq!(world.states("a").await.pusher, ActorState::Running);
    world.registry.send(disable(present)).await.expect("answers");
    until("stops", async || world.states("a").await.pusher == ActorState::Stopped).await;
    let record = &world.directory.get("a").expect("there").record;
    let webhook = record.webhook.as_ref().expect("has one");
    assert_eq!((webhook.enabled, webhook.disabled_reason.as_deref()), (false, Some("410")));
    world.close().await;
}
