//! What only RabbitMQ can do to its broker: things that somebody else declared, or deleted under us.

use std::time::Duration;

use backbone::broker::{BrokerErrorKind, DeadReason, Health, Outcome, PullMode, Queue, Target};
use backbone::client::{ClientId, Limits};
use reqwest::Method;
use serde_json::json;

use crate::support::amqp::{Peer, outgoing};
use crate::support::env::{
    BrokerEnv, bodies, client_id, delivered_bodies, message, next_exactly, numbered, numbers, settle_all,
    try_forward_all,
};
use crate::support::eventually;
use crate::support::fixture::{BrokerKind, Fixture};
use crate::support::rabbitmq::VirtualHost;
use crate::support::wait::{SOON, soon};

/// Declares a queue of a type, as somebody else would.
async fn declare(host: &VirtualHost, queue: &str, kind: &str) {
    let body = json!({"durable": true, "arguments": {"x-queue-type": kind}});
    host.manage(Method::PUT, &format!("queues/{}/{queue}", host.name()), Some(body)).await;
}

async fn delete(host: &VirtualHost, what: &str, name: &str) {
    host.manage(Method::DELETE, &format!("{what}/{}/{name}", host.name()), None).await;
}

#[actix_rt::test]
async fn a_queue_of_another_type_is_named_with_the_way_out() {
    for (kind, other) in [(BrokerKind::RabbitmqQuorum, "classic"), (BrokerKind::RabbitmqClassic, "quorum")] {
        let mut env = BrokerEnv::start(kind).await;
        let host = env.virtual_host();
        let a = env.client("a", &["x"]).await;
        // One of the backbone's own: nothing works, and health says what to do.
        delete(host, "queues", "soar-publish").await;
        declare(host, "soar-publish", other).await;
        env.restart_unready().await;
        let why = eventually("it says what is wrong", SOON, async || match env.broker().health() {
            Health::Unreachable(why) if why.contains("soar-publish") => Some(why),
            _ => None,
        })
        .await;
        assert!(why.contains("SOAR_QUEUE_TYPE") && why.contains("rabbitmqctl delete_queue"), "{why}");
        // The way out, taken while it runs.
        delete(env.virtual_host(), "queues", "soar-publish").await;
        eventually("it comes up", SOON, async || (env.broker().health() == Health::Ready).then_some(())).await;
        env.route(&a, "x", &["0"]).await;
        assert_eq!(bodies(&env.pull_exactly(&a, 1, PullMode::Auto).await), ["0"]);
        // One of a client's: declaring it is refused with the reason, and others are not concerned.
        declare(env.virtual_host(), "b-outbox", other).await;
        let refused = env.broker().declare_client(&client_id("b"), &Limits::default()).await.expect_err("in the way");
        assert_eq!(refused.kind, BrokerErrorKind::Conflict);
        let text = refused.to_string();
        assert!(text.contains("b-outbox") && text.contains("SOAR_QUEUE_TYPE"), "{text}");
        assert!(!refused.is_retryable());
        env.route(&a, "x", &["1"]).await;
        assert_eq!(bodies(&env.pull_exactly(&a, 1, PullMode::Auto).await), ["1"]);
        delete(env.virtual_host(), "queues", "b-outbox").await;
        let b = env.client("b", &["x"]).await;
        env.route(&a, "x", &["2"]).await;
        assert_eq!(bodies(&env.pull_exactly(&b, 1, PullMode::Auto).await), ["2"]);
        env.finish().await;
    }
}

/// What was handed out behind messages that could not go on does not go on before them.
#[actix_rt::test]
async fn nothing_overtakes_what_could_not_be_forwarded() {
    for kind in [BrokerKind::RabbitmqClassic, BrokerKind::RabbitmqQuorum] {
        let env = BrokerEnv::start(kind).await;
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        env.publish(&outbox, numbered(&a, "x", 10)).await;
        let mut consumer = env.consume(&outbox, 10).await;
        let first = next_exactly(&mut consumer, 5).await;
        let second = next_exactly(&mut consumer, 5).await;
        delete(env.virtual_host(), "queues", "soar-publish").await;
        try_forward_all(first, Target::Publish).await.expect_err("there is no next queue");
        // It is there again now, but these are behind the others.
        try_forward_all(second, Target::Publish).await.expect_err("others are before them");
        assert_eq!(delivered_bodies(&next_exactly(&mut consumer, 10).await), numbers(10), "{kind:?}");
        env.finish().await;
    }
}

/// More than may be on its way to a confirm, from many senders at once: each batch is answered, and none overtakes another
/// of its sender.
#[actix_rt::test]
async fn batches_beyond_the_window_are_taken_in_order() {
    const BATCH: usize = 400;
    const BATCHES: usize = 3;
    let env = BrokerEnv::start(BrokerKind::RabbitmqClassic).await;
    let mut senders = Vec::new();
    for n in 0..8 {
        senders.push(env.client(&format!("sender-{n}"), &[]).await);
    }
    let broker = env.broker();
    let mut publishing = Vec::new();
    for batch in 0..BATCHES {
        for sender in &senders {
            let numbers = batch * BATCH..(batch + 1) * BATCH;
            let messages = numbers.map(|n| message(sender, Some("x"), &n.to_string())).collect();
            let (broker, outbox) = (&broker, Queue::Outbox(sender.clone()));
            publishing.push(async move { broker.publish(&outbox, messages).await });
        }
    }
    for taken in soon("all are answered", futures_util::future::join_all(publishing)).await {
        taken.expect("it is taken");
    }
    for sender in &senders {
        let mut consumer = env.consume(&Queue::Outbox(sender.clone()), 2000).await;
        let came = next_exactly(&mut consumer, BATCH * BATCHES).await;
        assert_eq!(delivered_bodies(&came), numbers(BATCH * BATCHES), "{sender}");
        settle_all(came, Outcome::Complete).await;
    }
    env.finish().await;
}

/// Deletes each of the backbone's own things and uses it; the broker declares it again. What was in a queue that somebody
/// deletes is gone; everything that comes afterwards is not.
#[actix_rt::test]
async fn what_somebody_deletes_is_declared_again() {
    let env = BrokerEnv::start(BrokerKind::RabbitmqQuorum).await;
    let host = env.virtual_host();
    let a = env.client("a", &["x"]).await;
    let (outbox, inbox) = (Queue::Outbox(a.clone()), Queue::Inbox(a.clone()));

    // A sender's queue, which nobody consumes.
    delete(host, "queues", "a-outbox").await;
    env.publish(&outbox, numbered(&a, "x", 3)).await;
    // The queues and exchanges on its way, one after the other, each while messages wait before it.
    delete(host, "queues", "soar-publish").await;
    forward_at_last(&env, &outbox, Target::Publish).await;
    delete(host, "exchanges", "soar-topic").await;
    forward_at_last(&env, &Queue::Publish, Target::Topic).await;
    // Bound again after the exchange came back; what was forwarded in between found no way and was kept.
    eventually("the inbox is bound again", SOON, async || {
        env.route(&a, "x", &["3"]).await;
        let came = bodies(&env.pull(&a, 100, Duration::ZERO, PullMode::Auto).await);
        came.contains(&"3".to_owned()).then_some(())
    })
    .await;

    delete(host, "exchanges", "soar-broadcast").await;
    let notify = Queue::Notify(a.clone());
    env.publish(&notify, vec![message(&a, None, "4")]).await;
    forward_at_last(&env, &notify, Target::Broadcast).await;
    delete(host, "queues", "soar-unrouted").await;
    env.publish(&Queue::Publish, vec![message(&a, Some("nobody"), "5")]).await;
    forward_at_last(&env, &Queue::Publish, Target::Topic).await;
    assert_eq!(env.internal_depth("soar-unrouted").await, 1);

    // The inbox, under a consumer of it.
    let mut consumer = env.consume(&inbox, 10).await;
    while env.depths(&a).await.inbox > 0 {
        settle_all(next_exactly(&mut consumer, 1).await, Outcome::Complete).await;
    }
    delete(host, "queues", "a-inbox").await;
    let batch = eventually("the inbox is there again", SOON, async || {
        env.route(&a, "x", &["6"]).await;
        let batch = actix_rt::time::timeout(Duration::from_millis(300), consumer.next(1)).await.ok()?;
        Some(batch.expect("the consumer goes on"))
    })
    .await;
    assert_eq!(delivered_bodies(&batch), ["6"]);
    // Where it goes from there.
    for (queue, outcome) in [
        ("soar-retry-1", Outcome::Delay { delay: Duration::from_secs(1), attempts: 1 }),
        ("a-dead", Outcome::Dead { reason: DeadReason::DeliveryFailed, attempts: 1 }),
    ] {
        if queue == "soar-retry-1" {
            // Once, so that it is there.
            env.route(&a, "x", &["7"]).await;
            let delivery = next_exactly(&mut consumer, 1).await.remove(0);
            delivery.settle(outcome.clone()).await.expect("delays");
        }
        delete(host, "queues", queue).await;
        env.route(&a, "x", &["8"]).await;
        eventually("it is settled at last", SOON, async || {
            let delivery = next_exactly(&mut consumer, 1).await.remove(0);
            delivery.settle(outcome.clone()).await.ok()
        })
        .await;
    }
    let dead = env.broker().dead_letters(&a, None, 10).await.expect("lists").dead_letters;
    assert!(!dead.is_empty());
    drop((consumer, batch));
    env.finish().await;
}

/// Forwards what is in a queue until it is empty, as a pipeline does: what fails comes back and is tried again.
async fn forward_at_last(env: &BrokerEnv, queue: &Queue, target: Target) {
    let mut consumer = env.consume(queue, 100).await;
    let mut forwarded = false;
    eventually("it is forwarded", SOON, async || {
        let next = actix_rt::time::timeout(Duration::from_millis(500), consumer.next(100));
        // Silence says that it is empty only when something came before: a busy broker may be slow to begin.
        let Ok(batch) = next.await else { return forwarded.then_some(()) };
        let batch = batch.expect("the queue is there");
        let outcomes = batch.into_iter().map(|delivery| {
            let message = delivery.payload.message().expect("a message").clone();
            (delivery, Outcome::Forward(target, message))
        });
        forwarded |= backbone::broker::settle(outcomes.collect()).await.is_ok();
        None
    })
    .await;
}

/// A queue that somebody made without saying of which type is a classic one.
#[actix_rt::test]
async fn a_classic_queue_without_a_declared_type_is_told_as_well() {
    let env = BrokerEnv::start(BrokerKind::RabbitmqQuorum).await;
    let host = env.virtual_host();
    host.manage(Method::PUT, &format!("queues/{}/b-inbox", host.name()), Some(json!({"durable": true}))).await;
    let refused = env.broker().declare_client(&client_id("b"), &Limits::default()).await.expect_err("in the way");
    assert_eq!(refused.kind, BrokerErrorKind::Conflict);
    assert!(refused.to_string().contains("b-inbox"), "{refused}");
    env.finish().await;
}

/// Ids of a client's dead letters, page by page; `replay` puts each page back before the next one is asked for.
async fn paged(env: &BrokerEnv, client: &ClientId, limit: usize, replay: bool) -> Vec<String> {
    let (mut all, mut after) = (Vec::new(), None);
    for _ in 0..20 {
        let page = env.broker().dead_letters(client, after.as_deref(), limit).await.expect("lists");
        let ids: Vec<String> = page.dead_letters.into_iter().map(|dead| dead.id).collect();
        if replay {
            let replayed = env.broker().replay_dead(client, Some(&ids)).await.expect("replays");
            assert_eq!(replayed, ids.len() as u64, "{ids:?}");
        }
        all.extend(ids);
        if page.next.is_none() {
            return all;
        }
        after = page.next;
    }
    panic!("pages by {limit} never end: {all:?}");
}

rabbitmq_tests! {
    async fn pages_of_dead_letters_end_and_leave_none_out_whatever_their_ids(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        let mut peer = Peer::connect(&env.virtual_host().url()).await;
        // Somebody else's, whose id is greater than all others; then what died here; then what keeps the id that it had
        // elsewhere, and does not ascend.
        peer.put("a-dead", "somebody else's").await;
        env.route(&a, "x", &["0", "1", "2"]).await;
        let mut consumer = env.consume(&Queue::Inbox(a.clone()), 10).await;
        let batch = next_exactly(&mut consumer, 3).await;
        settle_all(batch, Outcome::Dead { reason: DeadReason::DeliveryFailed, attempts: 1 }).await;
        drop(consumer);
        let elsewhere = ["0000000000000003", "0000000000000002", "0000000000000001"];
        for id in elsewhere {
            peer.publish_all(vec![outgoing("", "a-dead", id, json!({"headers": {"soar-dead-id": id}}))]).await;
        }
        let all = eventually("all are there", SOON, async || {
            let page = env.broker().dead_letters(&a, None, 1000).await.expect("lists");
            (page.dead_letters.len() == 7).then_some(page.dead_letters)
        })
        .await;
        let all: Vec<String> = all.into_iter().map(|dead| dead.id).collect();
        assert!(all[0].starts_with("foreign-") && all.ends_with(&elsewhere.map(str::to_owned)), "{all:?}");
        for limit in 1..=4 {
            assert_eq!(paged(env, &a, limit, false).await, all, "by {limit}");
        }
        assert_eq!(paged(env, &a, 2, true).await, all);
        assert_eq!(paged(env, &a, 2, false).await, [""; 0]);
    }

    async fn dead_letters_with_the_same_id_are_on_pages_of_their_own(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        let mut peer = Peer::connect(&env.virtual_host().url()).await;
        // Ids are made of the bodies.
        let bodies = ["same", "same", "same", "other", "same"];
        peer.publish_all(bodies.map(|body| outgoing("", "a-dead", body, json!({}))).to_vec()).await;
        let all = paged(env, &a, 1000, false).await;
        assert_eq!(all.iter().map(|id| *id == all[0]).collect::<Vec<_>>(), [true, true, true, false, true]);
        for limit in 1..=4 {
            assert_eq!(paged(env, &a, limit, false).await, all, "by {limit}");
        }
    }
}
