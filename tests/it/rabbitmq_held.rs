//! Deliveries that are held for long, for which RabbitMQ would close their channel, and what others meet meanwhile.

use std::time::{Duration, Instant};

use backbone::broker::{Outcome, PullMode, PullOutcome, Queue};
use backbone::client::ClientId;
use reqwest::Method;

use crate::support::env::{BrokerEnv, bodies, delivered_bodies, next, next_exactly, numbers, settle_all};
use crate::support::eventually;
use crate::support::wait::{SOON, soon};

/// Instead of twenty minutes.
const HELD_FOR: Duration = Duration::from_secs(2);

/// Longer than any test.
const LEASE: PullMode = PullMode::Lease(Duration::from_secs(600));

/// Sends so many numbers to whoever wants `x`.
async fn route(env: &BrokerEnv, sender: &ClientId, count: usize) {
    let numbers = numbers(count);
    let numbers: Vec<&str> = numbers.iter().map(String::as_str).collect();
    env.route(sender, "x", &numbers).await;
}

/// Waits until RabbitMQ has handed so many deliveries of an inbox out again.
async fn handed_out_again(env: &BrokerEnv, client: &ClientId, count: u64) {
    let host = env.virtual_host();
    let path = format!("queues/{}/{client}-inbox", host.name());
    eventually("they are given back and taken again", SOON, async || {
        let queue = host.manage(Method::GET, &path, None).await;
        (queue["message_stats"]["redeliver"].as_u64() >= Some(count)).then_some(())
    })
    .await;
}

/// Waits until an inbox has so many consumers, those included that are cancelled and hold something still (quorum).
async fn consumed_by(env: &BrokerEnv, client: &ClientId, count: u64) {
    let host = env.virtual_host();
    let path = format!("queues/{}/{client}-inbox", host.name());
    eventually("it is consumed", SOON, async || {
        let queue = host.manage(Method::GET, &path, None).await;
        (queue["consumers"].as_u64() >= Some(count)).then_some(())
    })
    .await;
}

rabbitmq_tests! {
    async fn leases_outlive_the_time_that_rabbitmq_waits(env: &mut BrokerEnv) {
        env.restart_with_held_for(HELD_FOR).await;
        let a = env.client("a", &["x"]).await;
        route(env, &a, 330).await;
        let mut leased = Vec::new();
        // More than one pull's worth, and more behind them.
        for _ in 0..3 {
            leased.extend(env.pull_exactly(&a, 100, LEASE).await);
        }
        leased.extend(env.pull_exactly(&a, 1, LEASE).await);
        handed_out_again(env, &a, 301).await;
        // What nobody has taken can be read, and nothing else.
        assert_eq!(bodies(&env.drain(&a).await), numbers(330)[301..]);
        let receipts = leased.iter().filter_map(|pulled| pulled.receipt.clone()).collect();
        let invalid = env.broker().settle_pulled(&a, receipts, PullOutcome::Ack).await.expect("settles");
        assert_eq!(invalid, [], "of 301");
        assert!(env.drain(&a).await.is_empty());
        assert_eq!(env.depths(&a).await.inbox, 0);
    }

    async fn what_a_consumer_holds_for_long_stays_with_it(env: &mut BrokerEnv) {
        env.restart_with_held_for(HELD_FOR).await;
        let a = env.client("a", &["x"]).await;
        route(env, &a, 3).await;
        let mut consumer = env.consume(&Queue::Inbox(a.clone()), 1).await;
        for (body, again) in [("0", 1), ("1", 2)] {
            let held = next(&mut consumer, 1).await;
            assert_eq!((delivered_bodies(&held), held[0].deliveries), (vec![body.to_owned()], 1));
            tokio::select! {
                _ = consumer.next(1) => panic!("something was handed out beyond the prefetch"),
                () = handed_out_again(env, &a, again) => {}
            }
            settle_all(held, Outcome::Complete).await;
        }
        settle_all(next_exactly(&mut consumer, 1).await, Outcome::Complete).await;
        drop(consumer);
        eventually("all are gone", SOON, async || (env.depths(&a).await.inbox == 0).then_some(())).await;
    }

    async fn a_consumer_that_does_not_look_learns_that_its_queue_was_deleted(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        let mut consumer = env.consume(&Queue::Inbox(a.clone()), 1000).await;
        route(env, &a, 1).await;
        // It has seen how long messages are, and is to have more at a time: it looks at that first.
        settle_all(next_exactly(&mut consumer, 1).await, Outcome::Complete).await;
        // One that looks is told in the same moment, and declares the queue again. Not the test: of a queue that is there
        // again before it has told, RabbitMQ 3.10 does not tell at all (quorum).
        let (broker, puller) = (env.broker(), a.clone());
        let pull = actix_rt::spawn(async move { broker.pull(&puller, 1, SOON * 2, PullMode::Auto).await });
        consumed_by(env, &a, 2).await;
        let host = env.virtual_host();
        host.manage(Method::DELETE, &format!("queues/{}/a-inbox", host.name()), None).await;
        eventually("it is declared again", SOON, async || {
            let queues = host.manage(Method::GET, &format!("queues/{}?columns=name", host.name()), None).await;
            queues.as_array()?.iter().any(|queue| queue["name"] == "a-inbox").then_some(())
        })
        .await;
        // It gives back what it is handed still.
        pull.abort();
        env.bind(&a, &["x"]).await;
        env.route(&a, "x", &["1"]).await;
        let held = next_exactly(&mut consumer, 1).await;
        assert_eq!(delivered_bodies(&held), ["1"]);
        settle_all(held, Outcome::Complete).await;
    }

    async fn what_one_lets_go_comes_to_another_at_once(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        let inbox = Queue::Inbox(a.clone());
        let mut first = env.consume(&inbox, 200).await;
        route(env, &a, 200).await;
        let held = next_exactly(&mut first, 200).await;
        let mut second = env.consume(&inbox, 1000).await;
        // It subscribes when it is asked.
        tokio::select! {
            _ = second.next(1) => panic!("all are taken"),
            () = consumed_by(env, &a, 2) => {}
        }
        let begun = Instant::now();
        // As a WebSocket that ends.
        settle_all(held, Outcome::Requeue).await;
        drop(first);
        let rest = next_exactly(&mut second, 200).await;
        let took = begun.elapsed();
        // A second for each sixteen that it has room for (64 at first), if each waited to be seen in the queue.
        assert!(took < Duration::from_secs(3), "it took {took:?}");
        settle_all(rest, Outcome::Complete).await;
    }

    async fn a_deleted_inbox_that_is_pulled_costs_nobody_a_lease(env: &mut BrokerEnv) {
        // Enough that some share a channel with the one that is deleted.
        let mut holders = Vec::new();
        for n in 0..48 {
            let holder = env.client(&format!("holder-{n}"), &["held"]).await;
            holders.push(holder);
        }
        let victim = env.client("victim", &["x"]).await;
        env.route(&victim, "held", &["0"]).await;
        let mut leases = Vec::new();
        for holder in holders {
            let leased = env.pull_exactly(&holder, 1, LEASE).await;
            leases.push((holder, leased[0].receipt.clone().expect("a lease")));
        }
        let broker = env.broker();
        let (puller, host) = (victim.clone(), env.virtual_host());
        let pull = actix_rt::spawn(async move { broker.pull(&puller, 1, SOON, PullMode::Auto).await });
        consumed_by(env, &victim, 1).await;
        host.manage(Method::DELETE, &format!("queues/{}/victim-inbox", host.name()), None).await;
        // Bound again as well: nothing is routed to it before.
        let arrived = eventually("the inbox is there again", SOON, async || {
            env.route(&victim, "x", &["1"]).await;
            pull.is_finished().then_some(())
        });
        arrived.await;
        let pulled = soon("the pull ends", pull).await.expect("no panic").expect("pulls");
        assert_eq!(bodies(&pulled), ["1"]);
        for (holder, receipt) in leases {
            let invalid = env.broker().settle_pulled(&holder, vec![receipt], PullOutcome::Ack).await.expect("settles");
            assert_eq!(invalid, [], "{holder}");
        }
    }
}
