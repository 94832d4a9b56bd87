//! Clients that come and go on RabbitMQ: what is still delayed for one that is gone, and who is in the way of whom.

use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use backbone::broker::{BrokerErrorKind, Outcome, PullMode, Queue};
use backbone::client::{ClientId, Limits};
use backbone::db::Db;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::env::{BrokerEnv, bodies, client_id, next_exactly, settle_all};
use crate::support::fixture::{BrokerKind, Fixture as _};
use crate::support::rabbitmq::VirtualHost;
use crate::support::wait::{SOON, soon};
use crate::support::{eventually, stays_pending};

/// A client's queues with their arguments, by name.
async fn queues_of(host: &VirtualHost, client: &ClientId) -> Vec<(String, Value)> {
    let all = host.manage(Method::GET, &format!("queues/{}?columns=name,arguments", host.name()), None).await;
    let all = all.as_array().expect("a list").iter();
    let all = all.map(|queue| (queue["name"].as_str().expect("a name").to_owned(), queue["arguments"].clone()));
    all.filter(|(name, _)| name.starts_with(&format!("{client}-"))).collect()
}

/// Waits until all that is left of a client is what takes the place of its inbox for longer than this.
async fn only_a_stand_in_is_left(when: &str, host: &VirtualHost, client: &ClientId, delay: Duration) {
    let delay_ms = u64::try_from(delay.as_millis()).expect("fits");
    eventually(&format!("there is a stand-in {when}"), SOON, async || match &queues_of(host, client).await[..] {
        [(name, arguments)] if *name == format!("{client}-inbox") => {
            let is_so = arguments["x-max-length"] == 0 && arguments["x-expires"].as_u64() > Some(delay_ms);
            is_so.then_some(())
        }
        _ => None,
    })
    .await;
}

/// Routes messages to a client and delays them, all in one.
async fn delay(env: &BrokerEnv, client: &ClientId, topic: &str, bodies: &[&str], delay: Duration) {
    env.route(client, topic, bodies).await;
    let mut consumer = env.consume(&Queue::Inbox(client.clone()), 100).await;
    let batch = next_exactly(&mut consumer, bodies.len()).await;
    settle_all(batch, Outcome::Delay { delay, attempts: 1 }).await;
}

/// Keeps everybody from writing to the file until what is returned is dropped.
async fn hold(file: Db) -> Sender<()> {
    let ((release, held), (begin, begun)) = (channel(), channel());
    actix_rt::spawn(async move {
        file.write(move |_| {
            // It may be run again, when nobody waits for this any more.
            let _ = begin.send(());
            // Nothing is sent: it ends when that is dropped.
            held.recv().or(Ok(()))
        })
        .await
    });
    eventually("the file is held", SOON, async || begun.try_recv().ok()).await;
    release
}

queue_type_tests! {
    /// Without one RabbitMQ would hold what is delayed for it, and after some of that what is delayed for anybody.
    async fn a_deleted_inbox_has_a_stand_in_whatever_becomes_of_its_name(kind: BrokerKind) {
        const DELAY: Duration = Duration::from_secs(3600);
        let mut env = BrokerEnv::start(kind).await;
        let a = env.client("a", &["x"]).await;
        delay(&env, &a, "x", &["0"], DELAY).await;
        for when in ["once", "twice"] {
            env.broker().delete_client(&a).await.expect("deletes");
            only_a_stand_in_is_left(when, env.virtual_host(), &a, DELAY).await;
        }
        env.client("a", &["x"]).await;
        env.route(&a, "x", &["1"]).await;
        assert_eq!(bodies(&env.pull_exactly(&a, 1, PullMode::Auto).await), ["1"], "it is a real inbox again");
        env.restart().await;
        env.broker().delete_client(&a).await.expect("deletes");
        only_a_stand_in_is_left("after the second client of the name", env.virtual_host(), &a, DELAY).await;
        // A third that is not made whole, and is deleted for it.
        let other = if kind == BrokerKind::RabbitmqClassic { "quorum" } else { "classic" };
        let outbox = format!("queues/{}/a-outbox", env.virtual_host().name());
        let body = json!({"durable": true, "arguments": {"x-queue-type": other}});
        env.virtual_host().manage(Method::PUT, &outbox, Some(body)).await;
        env.broker().declare_client(&a, &Limits::default()).await.expect_err("something is in the way");
        env.broker().delete_client(&a).await.expect("deletes");
        only_a_stand_in_is_left("after a creation that failed", env.virtual_host(), &a, DELAY).await;
        env.client("a", &["x"]).await;
        assert_eq!(env.depths(&a).await, backbone::broker::Depths::default());
        env.finish().await;
    }

    async fn what_was_delayed_for_another_client_of_the_name_is_no_dead_letter(kind: BrokerKind) {
        const DELAY: Duration = Duration::from_secs(4);
        let env = BrokerEnv::start(kind).await;
        let (a, b) = (env.client("a", &["a"]).await, env.client("b", &["b"]).await);
        delay(&env, &a, "a", &["0", "1", "2"], DELAY).await;
        delay(&env, &b, "b", &["3"], DELAY).await;
        env.broker().delete_client(&a).await.expect("deletes");
        env.client_with("a", &["a"], &Limits { max_inbox_messages: Some(1), ..Limits::default() }).await;
        // It was delayed after the others, so those are in the inbox.
        assert_eq!(bodies(&env.pull_exactly(&b, 1, PullMode::Auto).await), ["3"]);
        env.route(&a, "a", &["4"]).await;
        let depths = eventually("the limit holds", SOON, async || {
            let depths = env.depths(&a).await;
            (depths.inbox == 1).then_some(depths)
        })
        .await;
        assert_eq!(depths.dead, 0);
        assert_eq!(bodies(&env.pull_exactly(&a, 1, PullMode::Auto).await), ["4"]);
        env.finish().await;
    }

    async fn a_declaration_that_is_late_does_not_bring_a_client_back(kind: BrokerKind) {
        let env = BrokerEnv::start(kind).await;
        let (broker, limits) = (env.broker(), Limits::default());
        let a = env.client("a", &["x"]).await;
        let mut consumer = env.consume(&Queue::Outbox(a.clone()), 1).await;
        // It comes while the client is being deleted.
        let held = hold(env.db()).await;
        let mut deletion = broker.delete_client(&a);
        stays_pending("the deletion waits for the file", &mut deletion).await;
        assert!(soon("the deletion has begun", consumer.next(1)).await.is_none());
        let mut declaration = broker.declare_client(&a, &limits);
        stays_pending("the declaration waits", &mut declaration).await;
        drop(held);
        let (deleted, declared) = futures_util::join!(deletion, declaration);
        deleted.expect("deletes");
        assert_eq!(declared.expect_err("it is gone").kind, BrokerErrorKind::NotFound);
        assert_eq!(queues_of(env.virtual_host(), &a).await, []);
        // It has begun before, of a client that is not known yet.
        let b = client_id("b");
        let held = hold(env.db()).await;
        let mut declaration = broker.declare_client(&b, &limits);
        stays_pending("the declaration waits for the file", &mut declaration).await;
        let mut deletion = broker.delete_client(&b);
        stays_pending("the deletion waits", &mut deletion).await;
        drop(held);
        let (declared, deleted) = futures_util::join!(declaration, deletion);
        declared.expect("declares");
        deleted.expect("deletes");
        assert_eq!(queues_of(env.virtual_host(), &b).await, []);
        assert_eq!(broker.depths(&b).await.expect_err("it is gone").kind, BrokerErrorKind::NotFound);
        env.finish().await;
    }
}
