//! A panic in each kind of actor, under load: it is back, nothing is lost, siblings and other clients go on.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backbone::actors::ActorKind;
use backbone::actors::registry::ActorState;
use backbone::broker::{Broker, PullMode, Queue};
use backbone::client::ClientId;

use crate::support::control::{ControlPlane, state_of};
use crate::support::env::message;
use crate::support::eventually;
use crate::support::wait::{SOON, pace};

/// How long a bystander's message may take while others' actors panic. Debug builds on a busy machine are slow; what a
/// restart with backoff would add is seconds.
const UNHARMED: Duration = Duration::from_secs(3);

/// Publishes numbered messages until stopped; returns how many.
async fn publish(
    broker: Arc<dyn Broker>,
    queue: Queue,
    sender: ClientId,
    topic: Option<&str>,
    stop: Rc<Cell<bool>>,
) -> usize {
    let mut sent = 0;
    // Lets the others work, and does not build a backlog that takes minutes.
    let mut ticks = pace(Duration::from_millis(5));
    while !stop.get() {
        let batch = (sent..sent + 5).map(|n| message(&sender, topic, &n.to_string())).collect();
        broker.publish(&queue, batch).await.expect("publishes");
        sent += 5;
        ticks.tick().await;
    }
    sent
}

/// Receives until told that `sent` were sent and all have come; checks that copies have one id.
async fn collect(broker: Arc<dyn Broker>, client: ClientId, sent: Rc<Cell<Option<usize>>>) {
    let mut ids: HashMap<String, String> = HashMap::new();
    let until = Instant::now() + 2 * SOON;
    while sent.get().is_none_or(|sent| ids.len() < sent) {
        assert!(Instant::now() < until, "{client} has {} of {:?} messages", ids.len(), sent.get());
        let pulled = broker.pull(&client, 100, Duration::from_millis(50), PullMode::Auto).await.expect("pulls");
        for pulled in pulled {
            let body = String::from_utf8_lossy(pulled.message.body()).into_owned();
            let id = pulled.message.id.as_str().to_owned();
            let before = ids.entry(body).or_insert_with(|| id.clone());
            assert_eq!(*before, id, "copies have one id");
        }
    }
    assert_eq!(Some(ids.len()), sent.get(), "nothing came that was not sent");
}

/// A message from one bystander to another, again and again; the longest that it took.
async fn bystander(plane: &ControlPlane, from: &ClientId, to: &ClientId, stop: &Cell<bool>) -> Duration {
    let mut longest = Duration::ZERO;
    let mut n = 0;
    while !stop.get() {
        let since = Instant::now();
        plane.env.publish(&Queue::Outbox(from.clone()), vec![message(from, Some("bystander"), &n.to_string())]).await;
        let came = plane.env.pull_exactly(to, 1, PullMode::Auto).await;
        assert_eq!(came[0].message.body(), n.to_string().as_bytes());
        longest = longest.max(since.elapsed());
        n += 1;
    }
    longest
}

broker_tests! {
    async fn a_panic_of_each_kind_of_actor_loses_nothing_and_harms_nobody(plane: &mut ControlPlane) {
        let loud = plane.onboard("loud", &[]).await;
        let listener = plane.onboard("listener", &["loud.*"]).await;
        let (from, to) = (plane.onboard("from", &[]).await, plane.onboard("to", &["bystander"]).await);
        let (stop, done) = (Rc::new(Cell::new(false)), Cell::new(false));
        let sent = Rc::new(Cell::new(None));
        let broker = plane.env.broker();
        let publishing = actix_rt::spawn(publish(
            Arc::clone(&broker), Queue::Outbox(loud.clone()), loud.clone(), Some("loud.x"), Rc::clone(&stop),
        ));
        let collecting = actix_rt::spawn(collect(broker, listener.clone(), Rc::clone(&sent)));
        let panics = async {
            for round in 0..2 {
                for (client, kind) in [
                    (Some(&loud), ActorKind::Forwarder),
                    (Some(&loud), ActorKind::Broadcaster),
                    (Some(&listener), ActorKind::Subscriber),
                    (Some(&listener), ActorKind::Forwarder),
                ] {
                    let restarts = plane.telemetry.metrics.actor_restarts.with_label_values(&[kind.as_str()]);
                    let before = restarts.get();
                    assert!(plane.panic(client, kind).await, "there is a {kind}");
                    eventually(&format!("the {kind} is restarted, round {round}"), SOON, async || {
                        (restarts.get() > before).then_some(())
                    })
                    .await;
                    if let Some(client) = client {
                        plane.wait_for_state(client, kind, ActorState::Running).await;
                    }
                }
            }
            done.set(true);
        };
        let (longest, ()) = futures_util::join!(bystander(plane, &from, &to, &done), panics);
        // The publisher is everybody's: nobody is a bystander of its panic, and all the same nothing is lost.
        let restarts = plane.telemetry.metrics.actor_restarts.with_label_values(&["publisher"]);
        for expected in 1..=2 {
            assert!(plane.panic(None, ActorKind::Publisher).await, "there is a publisher");
            eventually("the publisher is restarted", SOON, async || (restarts.get() >= expected).then_some(())).await;
            eventually("the publisher runs", SOON, async || plane.readiness().await.ready.then_some(())).await;
        }
        stop.set(true);
        sent.set(Some(publishing.await.expect("publishes to the end")));
        collecting.await.expect("everything that was sent came");
        println!("{} messages; a bystander's took {longest:?} at most", sent.get().unwrap_or(0));
        assert!(longest < UNHARMED, "a bystander's message took {longest:?}");
    }

    async fn a_broadcast_survives_its_broadcasters_panic(plane: &mut ControlPlane) {
        let loud = plane.onboard("loud", &[]).await;
        let deaf = plane.onboard("deaf", &[]).await;
        for n in 0..3 {
            let notes = (0..20).map(|m| message(&loud, None, &(n * 20 + m).to_string())).collect();
            plane.env.publish(&Queue::Notify(loud.clone()), notes).await;
            eventually("there is a broadcaster", SOON, async || {
                plane.panic(Some(&loud), ActorKind::Broadcaster).await.then_some(())
            })
            .await;
        }
        for client in [&loud, &deaf] {
            let mut came = HashSet::new();
            eventually(&format!("{client} hears all"), SOON, async || {
                for pulled in plane.env.drain(client).await {
                    came.insert(String::from_utf8_lossy(pulled.message.body()).into_owned());
                }
                (came.len() == 60).then_some(())
            })
            .await;
        }
    }

    async fn an_actor_that_keeps_dying_is_reported_and_its_siblings_go_on(plane: &mut ControlPlane) {
        let sick = plane.onboard("sick", &["x"]).await;
        eventually("all is well", SOON, async || plane.readiness().await.ready.then_some(())).await;
        eventually("it is reported", SOON, async || {
            if state_of(&plane.states(&sick).await, ActorKind::Forwarder) == ActorState::Running {
                // It may have died since; then there is nothing to do.
                plane.panic(Some(&sick), ActorKind::Forwarder).await;
            }
            let readiness = plane.readiness().await;
            let reported = readiness.reasons.iter().any(|reason| reason.contains("sick") && reason.contains("forwarder"));
            let failing = state_of(&plane.states(&sick).await, ActorKind::Forwarder) == ActorState::Failing;
            (!readiness.ready && reported && failing).then_some(())
        })
        .await;
        let states = plane.states(&sick).await;
        assert_eq!((states.broadcaster, states.subscriber), (ActorState::Running, ActorState::Running));
        let well = plane.onboard("well", &["y"]).await;
        plane.env.publish(&Queue::Outbox(well.clone()), vec![message(&well, Some("x"), "1")]).await;
        assert_eq!(plane.env.pull_exactly(&sick, 1, PullMode::Auto).await.len(), 1, "its inbox works");
    }

    async fn what_does_not_exist_does_not_panic(plane: &mut ControlPlane) {
        let a = plane.onboard("a", &[]).await;
        let inject = |client: Option<ClientId>, kind| backbone::actors::registry::InjectPanic { client, kind };
        assert!(!plane.registry.send(inject(Some(a), ActorKind::Pusher)).await.expect("answers"), "there is no webhook");
        let nobody = crate::support::env::client_id("nobody");
        assert!(!plane.registry.send(inject(Some(nobody), ActorKind::Forwarder)).await.expect("answers"));
    }
}
