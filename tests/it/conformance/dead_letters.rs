//! G11 dead letters, G12 limits.

use std::collections::HashSet;
use std::time::Duration;

use backbone::broker::{DeadLetter, DeadReason, Origin, Outcome, PullMode, Queue};
use backbone::client::{ClientId, Limits};
use backbone::time::Timestamp;

use crate::support::env::{KillableEnv, bodies, delivered_bodies, next_exactly, numbered, numbers, settle_all};
use crate::support::wait::SOON;
use crate::support::{BrokerEnv, eventually};

fn texts(dead: &[DeadLetter]) -> Vec<String> {
    let text =
        |dead: &DeadLetter| String::from_utf8_lossy(dead.payload.message().expect("a message").body()).into_owned();
    dead.iter().map(text).collect()
}

/// All dead letters, once there are `count`.
async fn dead_letters(env: &BrokerEnv, client: &ClientId, count: usize) -> Vec<DeadLetter> {
    eventually("the dead letters are there", SOON, async || {
        let page = env.broker().dead_letters(client, None, 1000).await.expect("lists");
        assert!(page.dead_letters.len() <= count, "{:?}", page.dead_letters);
        (page.dead_letters.len() == count).then_some(page.dead_letters)
    })
    .await
}

/// Makes `count` dead letters of what is put into the inbox.
async fn bury(env: &BrokerEnv, client: &ClientId, count: usize) {
    let all = numbers(count);
    env.route(client, "x", &all.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut consumer = env.consume(&Queue::Inbox(client.clone()), 1000).await;
    let batch = next_exactly(&mut consumer, count).await;
    settle_all(batch, Outcome::Dead { reason: DeadReason::DeliveryFailed, attempts: 8 }).await;
}

broker_tests! {
    async fn g11_a_dead_letter_keeps_what_is_known_of_it(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        let before = Timestamp::now();
        bury(env, &a, 3).await;
        for restarted in [false, true] {
            if restarted {
                env.restart().await;
            }
            let dead = dead_letters(env, &a, 3).await;
            assert_eq!(texts(&dead), numbers(3));
            for dead in &dead {
                assert_eq!((dead.origin, dead.reason, dead.attempts), (Origin::Inbox, DeadReason::DeliveryFailed, 8));
                assert!(dead.died_at >= before.plus_millis(-1) && dead.died_at <= Timestamp::now().plus_millis(1));
                let message = dead.payload.message().expect("a message");
                assert_eq!(message.topic.as_ref().map(|topic| topic.as_str()), Some("x"));
                assert_ne!(dead.id, message.id.as_str(), "its id is its own");
            }
            assert_eq!(dead.iter().map(|dead| &dead.id).collect::<HashSet<_>>().len(), 3);
            let depths = env.depths(&a).await;
            assert_eq!((depths.inbox, depths.dead), (0, 3));
        }
    }

    async fn g11_pages_follow_one_another(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        bury(env, &a, 7).await;
        dead_letters(env, &a, 7).await;
        let (mut all, mut after) = (Vec::new(), None);
        for size in [3, 3, 1] {
            let page = env.broker().dead_letters(&a, after.as_deref(), 3).await.expect("lists");
            assert_eq!(page.dead_letters.len(), size);
            assert_eq!(page.next.is_some(), all.len() + size < 7, "there is a next page until the end");
            all.extend(texts(&page.dead_letters));
            after = page.next;
        }
        assert_eq!(all, numbers(7));
    }

    async fn g11_replay_puts_them_back_where_they_died(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        bury(env, &a, 5).await;
        let dead = dead_letters(env, &a, 5).await;
        let some = [dead[1].id.clone(), dead[3].id.clone(), "no such id".to_owned()];
        assert_eq!(env.broker().replay_dead(&a, Some(&some)).await.expect("replays"), 2);
        let mut back = bodies(&env.pull_exactly(&a, 2, PullMode::Auto).await);
        back.sort();
        assert_eq!(back, ["1", "3"]);
        assert_eq!(texts(&dead_letters(env, &a, 3).await), ["0", "2", "4"]);
        assert_eq!(env.broker().replay_dead(&a, Some(&some)).await.expect("replays"), 0, "they are gone");
        assert_eq!(env.broker().replay_dead(&a, None).await.expect("replays"), 3);
        assert_eq!(env.broker().replay_dead(&a, None).await.expect("replays"), 0);
        env.restart().await;
        let mut back = bodies(&env.pull_exactly(&a, 3, PullMode::Auto).await);
        back.sort();
        assert_eq!(back, ["0", "2", "4"]);
        assert!(dead_letters(env, &a, 0).await.is_empty());
    }

    async fn g11_what_died_in_an_outbox_goes_back_there(env: &mut BrokerEnv) {
        let a = env.client("a", &[]).await;
        let queues = [Queue::Outbox(a.clone()), Queue::Notify(a.clone())];
        for queue in &queues {
            env.publish(queue, numbered(&a, "x", 1)).await;
            let mut consumer = env.consume(queue, 10).await;
            let batch = next_exactly(&mut consumer, 1).await;
            settle_all(batch, Outcome::Dead { reason: DeadReason::InvalidMessage, attempts: 0 }).await;
        }
        let dead = dead_letters(env, &a, 2).await;
        let origins: Vec<_> = dead.iter().map(|dead| (dead.origin, dead.reason)).collect();
        assert_eq!(origins, [Origin::Outbox, Origin::Notify].map(|origin| (origin, DeadReason::InvalidMessage)));
        assert_eq!(env.broker().replay_dead(&a, None).await.expect("replays"), 2);
        for queue in &queues {
            let mut consumer = env.consume(queue, 10).await;
            assert_eq!(delivered_bodies(&next_exactly(&mut consumer, 1).await), ["0"], "{queue}");
        }
    }

    async fn g11_purged_ones_are_gone(env: &mut KillableEnv) {
        let (a, b) = (env.client("a", &["x"]).await, env.client("b", &["x"]).await);
        bury(env, &a, 3).await;
        dead_letters(env, &a, 3).await;
        let between = Timestamp::now().plus_millis(1);
        eventually("the clock moves on", SOON, async || (Timestamp::now() > between).then_some(())).await;
        bury(env, &a, 2).await;
        dead_letters(env, &a, 5).await;
        assert_eq!(env.broker().purge_dead(&b, None).await.expect("purges"), 0, "another's are not touched");
        assert_eq!(env.broker().purge_dead(&a, Some(between)).await.expect("purges"), 3);
        assert_eq!(dead_letters(env, &a, 2).await.len(), 2);
        assert_eq!(env.broker().purge_dead(&a, None).await.expect("purges"), 2);
        env.kill().await;
        assert_eq!(env.depths(&a).await.dead, 0);
        assert_eq!(env.broker().replay_dead(&a, None).await.expect("replays"), 0);
    }

    async fn g12_past_the_limit_the_oldest_die(env: &mut BrokerEnv) {
        let limits = Limits { max_inbox_messages: Some(3), ..Limits::default() };
        let a = env.client_with("a", &["x"], &limits).await;
        env.route(&a, "x", &["0", "1", "2", "3", "4"]).await;
        let dead = dead_letters(env, &a, 2).await;
        assert_eq!(texts(&dead), ["0", "1"]);
        assert!(dead.iter().all(|dead| dead.reason == DeadReason::InboxFull && dead.origin == Origin::Inbox));
        assert_eq!(bodies(&env.pull_exactly(&a, 3, PullMode::Auto).await), ["2", "3", "4"]);
    }

    async fn g12_a_new_limit_counts_for_what_is_there(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        env.route(&a, "x", &["0", "1", "2"]).await;
        let limits = Limits { max_inbox_messages: Some(1), ..Limits::default() };
        env.broker().declare_client(&a, &limits).await.expect("declares");
        let dead = dead_letters(env, &a, 2).await;
        assert_eq!(texts(&dead), ["0", "1"]);
        env.broker().declare_client(&a, &Limits::default()).await.expect("declares");
        env.route(&a, "x", &["3", "4"]).await;
        assert_eq!(bodies(&env.pull_exactly(&a, 3, PullMode::Auto).await), ["2", "3", "4"]);
    }

    async fn g12_what_waits_too_long_dies(env: &mut BrokerEnv) {
        let limits = Limits { inbox_ttl_s: Some(1), ..Limits::default() };
        let a = env.client_with("a", &["x"], &limits).await;
        let b = env.client("b", &["x"]).await;
        env.route(&a, "x", &["0", "1"]).await;
        let dead = dead_letters(env, &a, 2).await;
        assert_eq!(texts(&dead), ["0", "1"]);
        assert!(dead.iter().all(|dead| dead.reason == DeadReason::Expired && dead.origin == Origin::Inbox));
        assert!(env.pull(&a, 10, Duration::ZERO, PullMode::Auto).await.is_empty());
        assert_eq!(bodies(&env.pull_exactly(&b, 2, PullMode::Auto).await), ["0", "1"], "others keep theirs");
    }

    async fn g12_time_to_live_runs_on_while_the_broker_is_down(env: &mut BrokerEnv) {
        let limits = Limits { inbox_ttl_s: Some(1), ..Limits::default() };
        let a = env.client_with("a", &["x"], &limits).await;
        env.route(&a, "x", &["0"]).await;
        env.restart().await;
        let dead = dead_letters(env, &a, 1).await;
        assert_eq!(dead[0].reason, DeadReason::Expired);
    }

    async fn g12_what_was_taken_neither_expires_nor_is_pushed_out(env: &mut BrokerEnv) {
        let limits = Limits { inbox_ttl_s: Some(1), max_inbox_messages: Some(2), ..Limits::default() };
        let a = env.client_with("a", &["x"], &limits).await;
        env.route(&a, "x", &["0"]).await;
        let held = env.pull_exactly(&a, 1, PullMode::Lease(Duration::from_secs(3600))).await;
        env.route(&a, "x", &["1", "2", "3"]).await;
        // Whatever became of the others, the one that is held can be settled.
        eventually("the others have died", SOON, async || {
            let depths = env.depths(&a).await;
            (depths.dead == 3).then_some(())
        })
        .await;
        let receipt = held[0].receipt.clone().expect("a lease has a receipt");
        let outcome = backbone::broker::PullOutcome::Ack;
        assert!(env.broker().settle_pulled(&a, vec![receipt], outcome).await.expect("settles").is_empty());
        assert_eq!(env.depths(&a).await.inbox, 0);
    }
}
