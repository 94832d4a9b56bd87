//! G1 durable publish, G5 own ids, G14 bounded.

use std::collections::HashSet;
use std::time::Duration;

use backbone::broker::{BrokerErrorKind, Outcome, Queue, Target};
use backbone::client::Limits;
use futures_util::FutureExt as _;

use crate::support::env::{
    KillableEnv, client_id, delivered_bodies, message, next_exactly, numbered, numbers, own_message, settle_all,
};
use crate::support::memory::resident_bytes;
use crate::support::wait::SOON;
use crate::support::{BrokerEnv, eventually, stays_pending};

broker_tests! {
    async fn g1_what_was_published_survives_a_kill(env: &mut KillableEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        env.publish(&outbox, numbered(&a, "x.y", 50)).await;
        env.publish(&outbox, vec![message(&a, Some("x.y"), "50")]).await;
        env.publish(&Queue::Notify(a.clone()), vec![message(&a, None, "\"to all\"")]).await;
        env.kill().await;
        let mut consumer = env.consume(&outbox, 100).await;
        assert_eq!(delivered_bodies(&next_exactly(&mut consumer, 51).await), numbers(51));
        let mut consumer = env.consume(&Queue::Notify(a), 100).await;
        let batch = next_exactly(&mut consumer, 1).await;
        let noted = batch[0].payload.message().expect("a message");
        assert_eq!((noted.topic.as_ref(), noted.body()), (None, &b"\"to all\""[..]));
    }

    async fn g1_a_message_is_read_as_it_was_written(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        let big = format!("\"{}\"", "x".repeat(900_000));
        let bodies = ["null", r#"{"b":1.0e0,  "a":[1,2 ,3]}"#, "\"\\u0000 \u{1F600}\"", "12345678901234567890.10", &big];
        let mut sent: Vec<_> = bodies.iter().map(|body| message(&a, Some("A_b.0-z"), body)).collect();
        sent.push(own_message(&a, "{}\"\\!~", Some("x"), "1"));
        env.publish(&outbox, sent.clone()).await;
        env.restart().await;
        let mut consumer = env.consume(&outbox, 100).await;
        let came = next_exactly(&mut consumer, sent.len()).await;
        for (sent, came) in sent.iter().zip(&came) {
            assert_eq!(came.payload.message().expect("a message").as_ref(), sent);
        }
    }

    async fn g1_a_refused_batch_leaves_nothing(env: &mut BrokerEnv) {
        let nobody = client_id("nobody");
        let outbox = Queue::Outbox(nobody.clone());
        let refused = env.broker().publish(&outbox, numbered(&nobody, "x", 3)).await.expect_err("there is no queue");
        assert_eq!(refused.kind, BrokerErrorKind::NotFound);
        assert!(!refused.is_retryable());
        env.client("nobody", &[]).await;
        assert_eq!(env.depths(&nobody).await.outbox, 0);
    }

    async fn g1_a_dropped_publish_is_carried_out_or_not_at_all(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        for n in 0..20 {
            let batch = (0..5).map(|_| message(&a, Some("x"), &n.to_string())).collect();
            let broker = env.broker();
            let mut publish = broker.publish(&outbox, batch);
            // Polled a few times, then dropped: an HTTP client that hangs up. It may be done before.
            for _ in 0..n % 4 {
                if (&mut publish).now_or_never().is_some() {
                    break;
                }
            }
        }
        env.publish(&outbox, vec![message(&a, Some("x"), "\"last\"")]).await;
        let mut consumer = env.consume(&outbox, 1000).await;
        let mut came = Vec::new();
        while came.last().is_none_or(|last| last != "\"last\"") {
            let batch = next_exactly(&mut consumer, 1).await;
            came.extend(delivered_bodies(&batch));
            settle_all(batch, Outcome::Complete).await;
        }
        for n in 0..20 {
            let copies = came.iter().filter(|body| **body == n.to_string()).count();
            assert!(copies == 0 || copies == 5, "{copies} of 5 messages of a dropped publish");
        }
    }

    async fn g5_an_own_id_is_routed_once(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let b = env.client("b", &["x"]).await;
        let own = |id: &str, body: &str| own_message(&a, id, Some("x"), body);
        let outbox = Queue::Outbox(a.clone());
        let first = env.publish(&outbox, vec![own("1", "1"), own("2", "2"), own("1", "3")]).await;
        assert_eq!(first.duplicates, [false, false, true]);
        let second = env.publish(&outbox, vec![own("2", "4"), message(&a, Some("x"), "5"), own("3", "6")]).await;
        assert_eq!(second.duplicates, [true, false, false]);
        env.forward(&outbox, Target::Publish, 4).await;
        env.forward(&Queue::Publish, Target::Topic, 4).await;
        let came = env.pull_exactly(&b, 4, backbone::broker::PullMode::Auto).await;
        assert_eq!(crate::support::env::bodies(&came), ["1", "2", "5", "6"]);
        assert_eq!(env.depths(&a).await.outbox, 0);
    }

    async fn g5_ids_belong_to_their_sender_and_span_its_queues(env: &mut BrokerEnv) {
        let (a, b) = (env.client("a", &[]).await, env.client("b", &[]).await);
        let publish = async |queue: Queue, message| env.publish(&queue, vec![message]).await.duplicates[0];
        assert!(!publish(Queue::Outbox(a.clone()), own_message(&a, "1", Some("x"), "1")).await);
        assert!(!publish(Queue::Outbox(b.clone()), own_message(&b, "1", Some("x"), "1")).await, "another sender's");
        assert!(publish(Queue::Notify(a.clone()), own_message(&a, "1", None, "1")).await, "one window for both");
    }

    async fn g5_own_ids_survive_restart_and_kill(env: &mut KillableEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        for (round, id) in ["1", "2", "3"].into_iter().enumerate() {
            assert_eq!(env.publish(&outbox, vec![own_message(&a, id, Some("x"), "0")]).await.duplicates, [false]);
            if round == 1 { env.restart().await } else { env.kill().await }
        }
        let again = ["1", "2", "3", "4"].map(|id| own_message(&a, id, Some("x"), "0"));
        assert_eq!(env.publish(&outbox, again.into()).await.duplicates, [true, true, true, false]);
    }

    async fn g5_a_refused_publish_leaves_no_trace_of_its_ids(env: &mut BrokerEnv) {
        let a = client_id("a");
        let outbox = Queue::Outbox(a.clone());
        let own = || vec![own_message(&a, "1", Some("x"), "1")];
        assert!(env.broker().publish(&outbox, own()).await.is_err());
        env.broker().declare_client(&a, &Limits::default()).await.expect("declares");
        assert_eq!(env.publish(&outbox, own()).await.duplicates, [false]);
    }

    async fn g5_an_id_is_forgotten_after_the_window(env: &mut BrokerEnv) {
        env.restart_with_dedup_window(Duration::from_secs(1)).await;
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        let publish = async || env.publish(&outbox, vec![own_message(&a, "1", Some("x"), "1")]).await.duplicates[0];
        assert!(!publish().await);
        assert!(publish().await, "within the window");
        eventually("the id is new again", SOON, async || (!publish().await).then_some(())).await;
    }

    async fn g5_an_id_used_again_after_the_window_is_another_message(env: &mut BrokerEnv) {
        env.restart_with_dedup_window(Duration::from_secs(1)).await;
        let a = env.client("a", &["x"]).await;
        let (outbox, inbox) = (Queue::Outbox(a.clone()), Queue::Inbox(a.clone()));
        for round in 0..2 {
            let body = round.to_string();
            eventually("the id is new", SOON, async || {
                let own = own_message(&a, "1", Some("x"), &body);
                (!env.publish(&outbox, vec![own]).await.duplicates[0]).then_some(())
            })
            .await;
            env.forward(&outbox, Target::Publish, 1).await;
            env.forward(&Queue::Publish, Target::Topic, 1).await;
            // Settled by its receiver the first time; the second one, given back once, is not taken for that.
            for is_last in [false, true] {
                let mut consumer = env.consume(&inbox, 10).await;
                let batch = next_exactly(&mut consumer, 1).await;
                assert_eq!(delivered_bodies(&batch), std::slice::from_ref(&body));
                if is_last {
                    settle_all(batch, Outcome::Complete).await;
                }
            }
        }
    }

    async fn g5_the_same_id_at_the_same_time_is_taken_once(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        let publishes = (0..40).map(|n| {
            let (broker, outbox) = (env.broker(), outbox.clone());
            let own = own_message(&a, &format!("{}", n % 4), Some("x"), "1");
            async move { broker.publish(&outbox, vec![own]).await.expect("publishes").duplicates[0] }
        });
        let duplicates = futures_util::future::join_all(publishes).await;
        assert_eq!(duplicates.iter().filter(|duplicate| !**duplicate).count(), 4);
        assert_eq!(env.depths(&a).await.outbox, 4);
    }

    async fn g14_a_deep_backlog_stays_out_of_memory(env: &mut BrokerEnv) {
        const MESSAGES: usize = 16_000;
        const BODY_BYTES: usize = 8 << 10;
        let a = env.client("a", &[]).await;
        let outbox = Queue::Outbox(a.clone());
        let before = resident_bytes(std::process::id());
        for start in (0..MESSAGES).step_by(500) {
            let body = |n: usize| format!("\"{n:0>BODY_BYTES$}\"");
            let batch = (start..start + 500).map(|n| message(&a, Some("x"), &body(n))).collect();
            env.publish(&outbox, batch).await;
        }
        let grown = resident_bytes(std::process::id()).saturating_sub(before);
        assert_eq!(env.depths(&a).await.outbox, MESSAGES as u64);
        // 125 MiB are queued. Other tests' memory is in it when they run in the same process, so the bound is wide.
        assert!(grown < 64 << 20, "a backlog of {} MiB takes {} MiB", (MESSAGES * BODY_BYTES) >> 20, grown >> 20);
        // And all of it is there, in order.
        let mut consumer = env.consume(&outbox, 1000).await;
        let mut seen = HashSet::new();
        while seen.len() < MESSAGES {
            let batch = next_exactly(&mut consumer, 500).await;
            for body in delivered_bodies(&batch) {
                let n: usize = body.trim_matches('"').parse().expect("a number");
                assert_eq!(n, seen.len());
                seen.insert(n);
            }
            settle_all(batch, Outcome::Complete).await;
        }
        stays_pending("an empty queue gave something", consumer.next(1)).await;
    }
}
