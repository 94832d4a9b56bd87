//! G2 no loss, G3 order, G6 prefetch, G7 deliveries, G8 delay.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use backbone::broker::{BrokerErrorKind, DeadReason, Outcome, Queue, Target, Turn, settle};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};

use crate::support::env::{
    KillableEnv, client_id, delivered_bodies, forward_all, message, next, next_exactly, numbered, numbers, own_message,
    settle_all,
};
use crate::support::wait::{A_WHILE, SOON};
use crate::support::{BrokerEnv, eventually, stays_pending};

broker_tests! {
    async fn g2_a_dropped_delivery_comes_back(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        env.publish(&outbox, numbered(&a, "x", 3)).await;
        let mut consumer = env.consume(&outbox, 10).await;
        let mut batch = next_exactly(&mut consumer, 3).await;
        let dropped = batch.remove(1);
        drop(dropped);
        settle_all(batch, Outcome::Complete).await;
        let again = next_exactly(&mut consumer, 1).await;
        assert_eq!((delivered_bodies(&again), again[0].deliveries), (vec!["1".to_owned()], 2));
        settle_all(again, Outcome::Complete).await;
        eventually("the queue is empty", SOON, async || (env.depths(&a).await.outbox == 0).then_some(())).await;
    }

    async fn g2_what_a_vanished_consumer_had_goes_to_another(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        env.publish(&outbox, numbered(&a, "x", 20)).await;
        let mut first = env.consume(&outbox, 10).await;
        let held = next(&mut first, 3).await;
        drop((first, held));
        let mut second = env.consume(&outbox, 100).await;
        let came: HashSet<String> = delivered_bodies(&next_exactly(&mut second, 20).await).into_iter().collect();
        assert_eq!(came.len(), 20, "each once: {came:?}");
    }

    async fn g2_a_consumer_that_goes_at_once_takes_nothing_with_it(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        env.publish(&outbox, numbered(&a, "x", 20)).await;
        for n in 0..20_u64 {
            // Gone while it subscribes, when it just has, or with its first deliveries.
            let mut consumer = env.consume(&outbox, 100).await;
            let _ = actix_rt::time::timeout(Duration::from_micros(n * 500), consumer.next(5)).await;
        }
        let mut last = env.consume(&outbox, 100).await;
        assert_eq!(delivered_bodies(&next_exactly(&mut last, 20).await), numbers(20));
    }

    async fn g2_a_delivery_outlives_its_consumer(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        env.publish(&outbox, numbered(&a, "x", 1)).await;
        let mut consumer = env.consume(&outbox, 10).await;
        let batch = next_exactly(&mut consumer, 1).await;
        drop(consumer);
        settle_all(batch, Outcome::Complete).await;
        eventually("it is settled", SOON, async || (env.depths(&a).await.outbox == 0).then_some(())).await;
    }

    async fn g2_only_what_was_not_settled_comes_back(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        // Few enough that RabbitMQ keeps none of their acknowledgements waiting (`backbone::broker::amqp`, what is weaker).
        env.publish(&outbox, numbered(&a, "x", 30)).await;
        let mut consumer = env.consume(&outbox, 100).await;
        let (mut kept, mut settled) = (Vec::new(), [Vec::new(), Vec::new()]);
        for (at, delivery) in next_exactly(&mut consumer, 30).await.into_iter().enumerate() {
            if at % 10 == 5 { kept.push(delivery) } else { settled[at % 2].push(delivery) }
        }
        for delivery in settled.into_iter().flatten() {
            delivery.settle(Outcome::Complete).await.expect("settles");
        }
        // At once: acknowledgements may be on their way.
        env.restart().await;
        drop((consumer, kept));
        env.publish(&outbox, vec![message(&a, Some("x"), "\"last\"")]).await;
        let mut consumer = env.consume(&outbox, 100).await;
        assert_eq!(delivered_bodies(&next_exactly(&mut consumer, 4).await), ["5", "15", "25", "\"last\""]);
    }

    async fn g2_the_unsettled_come_back_after_a_kill(env: &mut KillableEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        env.publish(&outbox, numbered(&a, "x", 5)).await;
        let mut consumer = env.consume(&outbox, 10).await;
        let held = next_exactly(&mut consumer, 5).await;
        env.kill().await;
        drop((consumer, held));
        let mut consumer = env.consume(&outbox, 10).await;
        assert_eq!(delivered_bodies(&next_exactly(&mut consumer, 5).await), numbers(5));
    }

    async fn g2_forwarded_messages_are_never_between_two_queues(env: &mut KillableEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        env.publish(&outbox, numbered(&a, "x", 60)).await;
        for _ in 0..3 {
            env.forward(&outbox, Target::Publish, 20).await;
            env.kill().await;
            // What the kill undid is in the outbox again, and goes on again; what it did not is in the next queue.
            let mut consumers = [env.consume(&outbox, 1000).await, env.consume(&Queue::Publish, 1000).await];
            let mut all = Vec::new();
            eventually("every message is in one of them", SOON, async || {
                for consumer in &mut consumers {
                    if let Ok(batch) = actix_rt::time::timeout(A_WHILE, consumer.next(1000)).await {
                        all.extend(batch.expect("goes on"));
                    }
                }
                let distinct: HashSet<_> = delivered_bodies(&all).into_iter().collect();
                (distinct.len() == 60).then_some(())
            })
            .await;
            drop((all, consumers));
            eventually("what was looked at is back", SOON, async || {
                let outbox = env.depths(&a).await.outbox;
                (outbox + env.internal_depth("soar-publish").await >= 60).then_some(())
            })
            .await;
        }
    }

    async fn g2_delayed_and_dead_ones_survive_a_kill(env: &mut KillableEnv) {
        let a = env.client("a", &["x"]).await;
        let inbox = Queue::Inbox(a.clone());
        env.route(&a, "x", &["0", "1"]).await;
        let mut consumer = env.consume(&inbox, 10).await;
        let mut batch = next_exactly(&mut consumer, 2).await;
        let dead = batch.pop().expect("two");
        let delayed = batch.pop().expect("two");
        let outcomes = vec![
            (delayed, Outcome::Delay { delay: Duration::from_secs(2), attempts: 1 }),
            (dead, Outcome::Dead { reason: DeadReason::DeliveryFailed, attempts: 2 }),
        ];
        settle(outcomes).await.expect("settles");
        env.kill().await;
        // As safe as they were before: dead and, when the delay is over, back; or still where they came from. While it
        // waits on RabbitMQ nobody counts it after a kill.
        eventually("neither is lost", SOON, async || {
            let (depths, publish) = (env.depths(&a).await, env.internal_depth("soar-publish").await);
            (depths.inbox + depths.dead + publish >= 2).then_some(())
        })
        .await;
    }

    async fn g3_one_consumer_sees_the_order_of_publishing(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        let mut n = 0;
        for size in [1, 7, 1, 30, 2, 100, 1] {
            let batch = (n..n + size).map(|n| message(&a, Some("x"), &n.to_string())).collect();
            env.publish(&outbox, batch).await;
            n += size;
        }
        let mut consumer = env.consume(&outbox, 16).await;
        let mut came = Vec::new();
        while came.len() < n {
            let batch = next(&mut consumer, 10).await;
            came.extend(delivered_bodies(&batch));
            settle_all(batch, Outcome::Complete).await;
        }
        assert_eq!(came, numbers(n));
    }

    async fn g3_order_holds_for_a_source_that_does_not_wait(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        let broker = env.broker();
        let (mut sent, mut under_way) = (0, FuturesUnordered::new());
        for n in 0..300 {
            // More than may be on its way at once; and own ids, which are looked up first.
            let batch = (0..n % 20 + 1).map(|at| match (n + at) % 50 {
                0 => own_message(&a, &format!("own-{}", sent + at), Some("x"), &(sent + at).to_string()),
                _ => message(&a, Some("x"), &(sent + at).to_string()),
            });
            let batch: Vec<_> = batch.collect();
            sent += batch.len();
            let (turn, mut given_on) = Turn::new();
            under_way.push(broker.publish_in_turn(&outbox, batch, turn));
            loop {
                tokio::select! {
                    biased;
                    () = &mut given_on => break,
                    Some(published) = under_way.next() => drop(published.expect("publishes")),
                }
            }
        }
        while let Some(published) = under_way.next().await {
            published.expect("publishes");
        }
        let mut consumer = env.consume(&outbox, 1000).await;
        let mut came = Vec::new();
        while came.len() < sent {
            let batch = next(&mut consumer, 1000).await;
            came.extend(delivered_bodies(&batch));
            settle_all(batch, Outcome::Complete).await;
        }
        assert_eq!(came, numbers(sent));
    }

    async fn g3_the_turn_is_given_on_before_the_result_is_known(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        // Whatever is opened with the first message is open now.
        env.publish(&outbox, numbered(&a, "x", 1)).await;
        let broker = env.broker();
        let (turn, given_on) = Turn::new();
        let mut publish = broker.publish_in_turn(&outbox, vec![message(&a, Some("x"), "1")], turn);
        let early = (&mut publish).now_or_never();
        assert_eq!(given_on.now_or_never(), Some(()), "one look is enough");
        match early {
            Some(published) => drop(published.expect("publishes")),
            None => drop(publish.await.expect("publishes")),
        }
        let (turn, given_on) = Turn::new();
        let nobody = client_id("nobody");
        let refused = broker.publish_in_turn(&Queue::Outbox(nobody.clone()), numbered(&nobody, "x", 1), turn).await;
        assert_eq!(refused.expect_err("there is no queue").kind, BrokerErrorKind::NotFound);
        assert_eq!(given_on.now_or_never(), Some(()), "one that is refused has its turn as well");
    }

    async fn g3_order_holds_from_hop_to_hop(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let b = env.client("b", &["#"]).await;
        let outbox = Queue::Outbox(a.clone());
        env.publish(&outbox, numbered(&a, "x.y", 500)).await;
        // Both hops at once, with batches of odd sizes.
        let mut first = env.consume(&outbox, 64).await;
        let mut second = env.consume(&Queue::Publish, 64).await;
        let to_publish = async {
            let mut left = 500;
            while left > 0 {
                let batch = next(&mut first, 7).await;
                left -= batch.len();
                forward_all(batch, Target::Publish).await;
            }
        };
        let to_topic = async {
            let mut left = 500;
            while left > 0 {
                let batch = next(&mut second, 13).await;
                left -= batch.len();
                forward_all(batch, Target::Topic).await;
            }
        };
        futures_util::join!(to_publish, to_topic);
        let came = env.pull_exactly(&b, 500, backbone::broker::PullMode::Auto).await;
        assert_eq!(crate::support::env::bodies(&came), numbers(500));
    }

    async fn g3_order_holds_from_one_consumer_to_the_next(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        env.publish(&outbox, numbered(&a, "x", 204)).await;
        for round in 0..20 {
            // It has been handed far more than it takes when it goes; and some of what it took goes back with it.
            let mut consumer = env.consume(&outbox, 64).await;
            let mut batch = next_exactly(&mut consumer, 14).await;
            let first = round * 10;
            assert_eq!(delivered_bodies(&batch), numbers(first + 14)[first..], "round {round}");
            let back = batch.split_off(10);
            settle_all(batch, Outcome::Complete).await;
            drop(back);
        }
    }

    async fn g3_order_holds_across_a_restart(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        env.publish(&outbox, numbered(&a, "x", 300)).await;
        let mut consumer = env.consume(&outbox, 100).await;
        settle_all(next_exactly(&mut consumer, 100).await, Outcome::Complete).await;
        drop(consumer);
        env.restart().await;
        let mut consumer = env.consume(&outbox, 1000).await;
        assert_eq!(delivered_bodies(&next_exactly(&mut consumer, 200).await), numbers(300)[100..]);
    }

    async fn g6_no_more_unsettled_than_the_prefetch(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        env.publish(&outbox, numbered(&a, "x", 10)).await;
        let mut consumer = env.consume(&outbox, 3).await;
        let mut held = next_exactly(&mut consumer, 3).await;
        stays_pending("a fourth delivery with a prefetch of 3", consumer.next(10)).await;
        held.remove(0).settle(Outcome::Complete).await.expect("settles");
        held.extend(next(&mut consumer, 10).await);
        assert_eq!(delivered_bodies(&held), ["1", "2", "3"]);
        stays_pending("one was settled, one came", consumer.next(10)).await;
    }

    async fn g6_prefetch_changes_and_zero_pauses(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        env.publish(&outbox, numbered(&a, "x", 10)).await;
        let mut consumer = env.consume(&outbox, 0).await;
        stays_pending("a paused consumer", consumer.next(10)).await;
        consumer.set_prefetch(4);
        let held = next_exactly(&mut consumer, 4).await;
        consumer.set_prefetch(0);
        settle_all(held, Outcome::Complete).await;
        stays_pending("a paused consumer", consumer.next(10)).await;
        consumer.set_prefetch(100);
        assert_eq!(delivered_bodies(&next_exactly(&mut consumer, 6).await), numbers(10)[4..]);
    }

    async fn g7_deliveries_count_from_one_and_grow(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        env.publish(&outbox, numbered(&a, "x", 1)).await;
        let mut consumer = env.consume(&outbox, 10).await;
        for deliveries in 1..=4 {
            let delivery = next_exactly(&mut consumer, 1).await.remove(0);
            assert_eq!((delivery.deliveries, delivery.attempts), (deliveries, 0));
            if deliveries % 2 == 0 {
                drop(delivery);
            } else {
                delivery.settle(Outcome::Requeue).await.expect("requeues");
            }
        }
    }

    async fn g7_attempts_are_what_the_last_delay_set(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        let inbox = Queue::Inbox(a.clone());
        env.route(&a, "x", &["0"]).await;
        for attempts in [1, 2, 7] {
            let mut consumer = env.consume(&inbox, 10).await;
            let delivery = next_exactly(&mut consumer, 1).await.remove(0);
            delivery.settle(Outcome::Delay { delay: Duration::from_millis(20), attempts }).await.expect("delays");
            let back = next_exactly(&mut consumer, 1).await.remove(0);
            assert_eq!(back.attempts, attempts);
            assert!(back.deliveries > 1);
            back.settle(Outcome::Requeue).await.expect("requeues");
            drop(consumer);
            env.restart().await;
            let mut consumer = env.consume(&inbox, 10).await;
            let after = next_exactly(&mut consumer, 1).await.remove(0);
            assert_eq!(after.attempts, attempts, "after a restart");
            after.settle(Outcome::Requeue).await.expect("requeues");
        }
    }

    async fn g8_a_delayed_message_comes_no_earlier_and_holds_nothing_up(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        let inbox = Queue::Inbox(a.clone());
        env.route(&a, "x", &["0", "1", "2"]).await;
        let mut consumer = env.consume(&inbox, 10).await;
        let mut batch = next_exactly(&mut consumer, 3).await;
        let since = Instant::now();
        let long = Outcome::Delay { delay: Duration::from_millis(1200), attempts: 1 };
        let short = Outcome::Delay { delay: Duration::from_millis(400), attempts: 1 };
        let (second, first) = (batch.remove(1), batch.remove(0));
        settle(vec![(first, long), (second, short)]).await.expect("delays");
        settle_all(batch, Outcome::Complete).await;
        env.route(&a, "x", &["3"]).await;
        let mut came = Vec::new();
        for _ in 0..3 {
            let delivery = next_exactly(&mut consumer, 1).await;
            came.push((delivered_bodies(&delivery).remove(0), since.elapsed()));
            settle_all(delivery, Outcome::Complete).await;
        }
        let order: Vec<_> = came.iter().map(|(body, _)| body.as_str()).collect();
        assert_eq!(order, ["3", "1", "0"]);
        assert!(came[1].1 >= Duration::from_millis(400) && came[2].1 >= Duration::from_millis(1200), "{came:?}");
    }

    async fn g8_a_delay_survives_a_restart(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        let inbox = Queue::Inbox(a.clone());
        env.route(&a, "x", &["0"]).await;
        let mut consumer = env.consume(&inbox, 10).await;
        let delivery = next_exactly(&mut consumer, 1).await.remove(0);
        let since = Instant::now();
        let delay = Duration::from_secs(3);
        delivery.settle(Outcome::Delay { delay, attempts: 1 }).await.expect("delays");
        drop(consumer);
        env.restart().await;
        assert_eq!(env.depths(&a).await.inbox, 1, "the delayed are counted");
        let mut consumer = env.consume(&inbox, 10).await;
        let back = next_exactly(&mut consumer, 1).await.remove(0);
        assert!(since.elapsed() >= delay, "came after {:?}", since.elapsed());
        assert_eq!(back.attempts, 1);
    }

    async fn settling_takes_a_delivery_once_and_for_all(env: &mut BrokerEnv) {
        // What a delivery cannot do twice the types forbid; what is gone stays gone.
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        env.publish(&outbox, numbered(&a, "x", 5)).await;
        let mut consumer = env.consume(&outbox, 10).await;
        settle_all(next_exactly(&mut consumer, 5).await, Outcome::Complete).await;
        drop(consumer);
        env.restart().await;
        let mut consumer = env.consume(&outbox, 10).await;
        stays_pending("a completed message came back", consumer.next(1)).await;
    }

    async fn consuming_what_is_not_there_is_refused(env: &mut BrokerEnv) {
        let nobody = crate::support::env::client_id("nobody");
        let refused = env.broker().consume(&Queue::Outbox(nobody), 1).await.map(|_| ()).expect_err("no such queue");
        assert_eq!(refused.kind, BrokerErrorKind::NotFound);
    }
}
