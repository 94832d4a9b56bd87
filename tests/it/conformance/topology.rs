//! G13 idempotent topology, closing, and what health says.

use std::time::Duration;

use backbone::broker::{BrokerErrorKind, Health, Outcome, PullMode, Queue, Target};
use backbone::client::Limits;

use crate::support::BrokerEnv;
use crate::support::env::{KillableEnv, bodies, message, next_exactly, numbered, settle_all};
use crate::support::wait::soon;

broker_tests! {
    async fn g13_declaring_again_keeps_everything(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        env.publish(&Queue::Outbox(a.clone()), numbered(&a, "x", 2)).await;
        env.route(&a, "x", &["0"]).await;
        for _ in 0..3 {
            env.broker().declare_client(&a, &Limits::default()).await.expect("declares again");
            env.bind(&a, &["x"]).await;
        }
        env.route(&a, "x", &["1"]).await;
        assert_eq!(env.depths(&a).await.outbox, 2);
        assert_eq!(bodies(&env.pull_exactly(&a, 2, PullMode::Auto).await), ["0", "1"]);
        assert!(env.drain(&a).await.is_empty(), "bound twice is bound once");
    }

    async fn g13_the_topology_survives_a_kill(env: &mut KillableEnv) {
        let a = env.client("a", &["x.*", "y"]).await;
        let gone = env.client("gone", &["#"]).await;
        env.bind(&a, &["y", "z"]).await;
        env.broker().delete_client(&gone).await.expect("deletes");
        env.kill().await;
        env.route(&a, "x.1", &["0"]).await;
        env.route(&a, "y", &["1"]).await;
        env.route(&a, "z", &["2"]).await;
        assert_eq!(bodies(&env.pull_exactly(&a, 2, PullMode::Auto).await), ["1", "2"]);
        assert_eq!(env.internal_depth("soar-unrouted").await, 1);
        assert_eq!(env.broker().depths(&gone).await.expect_err("it is gone").kind, BrokerErrorKind::NotFound);
    }

    async fn g13_deleting_what_is_gone_succeeds(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        env.route(&a, "x", &["0"]).await;
        for _ in 0..3 {
            env.broker().delete_client(&a).await.expect("deletes");
        }
        env.broker().delete_client(&crate::support::env::client_id("never-was")).await.expect("deletes nothing");
    }

    async fn g13_a_client_of_the_same_name_starts_empty(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        env.publish(&Queue::Outbox(a.clone()), numbered(&a, "x", 2)).await;
        env.publish(&Queue::Notify(a.clone()), vec![message(&a, None, "0")]).await;
        env.route(&a, "x", &["0", "1"]).await;
        let mut consumer = env.consume(&Queue::Inbox(a.clone()), 1).await;
        let dead = Outcome::Dead { reason: backbone::broker::DeadReason::DeliveryFailed, attempts: 1 };
        settle_all(next_exactly(&mut consumer, 1).await, dead).await;
        let held = next_exactly(&mut consumer, 1).await;
        env.broker().delete_client(&a).await.expect("deletes");
        let again = env.client("a", &[]).await;
        // A delivery of the queue that was deleted can no more reach the new one.
        drop(held);
        assert_eq!(env.depths(&again).await, backbone::broker::Depths::default());
        env.route(&again, "x", &["2"]).await;
        assert!(env.drain(&again).await.is_empty(), "old bindings are gone with the client");
        env.restart().await;
        assert_eq!(env.depths(&again).await, backbone::broker::Depths::default());
    }

    async fn g13_a_consumer_ends_when_its_queue_is_deleted(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        let mut consumer = env.consume(&Queue::Outbox(a.clone()), 10).await;
        let broker = env.broker();
        let (ended, deleted) = futures_util::join!(soon("the consumer ends", consumer.next(1)), broker.delete_client(&a));
        deleted.expect("deletes");
        assert!(ended.is_none());
        let pull = env.broker().pull(&a, 1, Duration::ZERO, PullMode::Auto).await;
        assert_eq!(pull.map(|_| ()).expect_err("no inbox").kind, BrokerErrorKind::NotFound);
    }

    async fn g13_deleting_a_client_takes_nothing_of_another(env: &mut KillableEnv) {
        let (a, b) = (env.client("a", &["x"]).await, env.client("b", &["x"]).await);
        env.route(&a, "x", &["0"]).await;
        env.publish(&Queue::Publish, vec![message(&a, Some("x"), "1")]).await;
        env.broker().delete_client(&a).await.expect("deletes");
        env.kill().await;
        // What it had sent before is on its way still. RabbitMQ does not confirm acknowledgements: the kill may bring back
        // what was forwarded just before.
        let left = env.internal_depth("soar-publish").await as usize;
        assert!(left == 1 || left == 2 && env.broker().name() != "embedded", "{left}");
        env.forward(&Queue::Publish, Target::Topic, left).await;
        let mut came = bodies(&env.pull_exactly(&b, 1 + left, PullMode::Auto).await);
        came.dedup();
        assert_eq!(came, ["0", "1"]);
    }

    async fn a_closed_broker_ends_its_consumers_and_takes_no_more(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        let outbox = Queue::Outbox(a.clone());
        assert_eq!(env.broker().health(), Health::Ready);
        let mut consumer = env.consume(&outbox, 10).await;
        let broker = env.broker();
        let waiting = broker.pull(&a, 1, crate::support::wait::SOON, PullMode::Auto);
        let (ended, pulled, ()) = futures_util::join!(
            soon("the consumer ends", consumer.next(1)),
            soon("the pull ends", waiting),
            broker.close()
        );
        assert!(ended.is_none());
        assert!(pulled.is_err() || pulled.is_ok_and(|pulled| pulled.is_empty()));
        let refused = broker.publish(&outbox, numbered(&a, "x", 1)).await.expect_err("it is closed");
        assert_eq!(refused.kind, BrokerErrorKind::Closed);
        env.restart().await;
        assert_eq!(env.depths(&a).await.outbox, 0);
    }
}
