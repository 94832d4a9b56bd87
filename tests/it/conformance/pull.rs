//! G9 leases, G10 auto, and pulling in general.

use std::time::{Duration, Instant};

use backbone::broker::{BrokerErrorKind, DeadReason, PullMode, PullOutcome, Pulled, Receipt};

use crate::support::env::{KillableEnv, bodies, client_id, numbers};
use crate::support::wait::{A_WHILE, SOON, soon};
use crate::support::{BrokerEnv, eventually, stays_pending};

const LONG: PullMode = PullMode::Lease(Duration::from_secs(3600));

fn receipts(pulled: &[Pulled]) -> Vec<Receipt> {
    pulled.iter().map(|pulled| pulled.receipt.clone().expect("a lease has a receipt")).collect()
}

broker_tests! {
    async fn g9_an_expired_lease_brings_the_message_back(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        env.route(&a, "x", &["0", "1"]).await;
        let since = Instant::now();
        let lease = Duration::from_secs(1);
        let first = env.pull_exactly(&a, 2, PullMode::Lease(lease)).await;
        assert_eq!(first.iter().map(|pulled| pulled.deliveries).collect::<Vec<_>>(), [1, 1]);
        assert!(env.pull(&a, 10, Duration::ZERO, LONG).await.is_empty(), "leased ones are nobody else's");
        let again = env.pull_exactly(&a, 2, LONG).await;
        assert!(since.elapsed() >= lease, "came back after {:?}", since.elapsed());
        assert_eq!(bodies(&again), numbers(2));
        assert!(again.iter().all(|pulled| pulled.deliveries == 2));
        // The late acknowledgement is unknown and settles nothing.
        let late = receipts(&first);
        let unknown = env.broker().settle_pulled(&a, late.clone(), PullOutcome::Ack).await.expect("answers");
        assert_eq!(unknown, late);
        let unknown = env.broker().settle_pulled(&a, receipts(&again), PullOutcome::Ack).await.expect("settles");
        assert!(unknown.is_empty());
        assert_eq!(env.depths(&a).await.inbox, 0);
    }

    async fn g9_a_receipt_settles_once(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        env.route(&a, "x", &["0", "1"]).await;
        let receipts = receipts(&env.pull_exactly(&a, 2, LONG).await);
        for outcome in [PullOutcome::Ack, PullOutcome::Nack(None), PullOutcome::Reject] {
            let unknown = env.broker().settle_pulled(&a, vec![receipts[0].clone()], outcome).await.expect("answers");
            assert_eq!(unknown.is_empty(), outcome == PullOutcome::Ack, "{outcome:?}");
        }
        let twice = vec![receipts[1].clone(), receipts[1].clone()];
        let unknown = env.broker().settle_pulled(&a, twice, PullOutcome::Ack).await.expect("answers");
        assert_eq!(unknown, receipts[1..]);
        let depths = env.depths(&a).await;
        assert_eq!((depths.inbox, depths.dead), (0, 0));
    }

    async fn g9_a_receipt_is_good_for_its_inbox_only(env: &mut BrokerEnv) {
        let (a, b) = (env.client("a", &["x"]).await, env.client("b", &["x"]).await);
        env.route(&a, "x", &["0"]).await;
        let mine = receipts(&env.pull_exactly(&a, 1, LONG).await);
        let unknown = env.broker().settle_pulled(&b, mine.clone(), PullOutcome::Ack).await.expect("answers");
        assert_eq!(unknown, mine);
        assert_eq!(env.depths(&b).await.inbox, 1, "the other's copy is untouched");
        let unknown = env.broker().settle_pulled(&a, mine, PullOutcome::Ack).await.expect("settles");
        assert!(unknown.is_empty());
    }

    async fn g9_receipts_that_nobody_gave_out_are_unknown(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        env.route(&a, "x", &["0"]).await;
        let good = receipts(&env.pull_exactly(&a, 1, LONG).await);
        let mut made_up: Vec<Receipt> =
            ["", "-", "0-0", "1", "ffffffffffffffffffffffff-1", "\u{1F600}", &"9".repeat(1000)]
                .map(|text| Receipt(text.to_owned()))
                .into();
        made_up.push(Receipt(format!("{}0", good[0].0)));
        made_up.push(Receipt(format!(" {}", good[0].0)));
        let unknown = env.broker().settle_pulled(&a, made_up.clone(), PullOutcome::Ack).await.expect("answers");
        assert_eq!(unknown, made_up);
        assert_eq!(env.depths(&a).await.inbox, 1);
    }

    async fn g9_a_receipt_ends_with_the_broker(env: &mut KillableEnv) {
        let a = env.client("a", &["x"]).await;
        env.route(&a, "x", &["0"]).await;
        let before = receipts(&env.pull_exactly(&a, 1, LONG).await);
        env.kill().await;
        // Whether the lease ends with the broker or not: a receipt is never that of another lease.
        let again = env.pull(&a, 1, Duration::from_secs(2), LONG).await;
        if !again.is_empty() {
            let unknown = env.broker().settle_pulled(&a, before.clone(), PullOutcome::Ack).await.expect("answers");
            assert_eq!(unknown, before);
            assert_eq!(env.depths(&a).await.inbox, 1);
        }
    }

    async fn g9_nack_brings_it_back_at_once_or_later(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        env.route(&a, "x", &["0"]).await;
        let first = env.pull_exactly(&a, 1, LONG).await;
        let nack = async |pulled: &[Pulled], delay| {
            let outcome = PullOutcome::Nack(delay);
            let unknown = env.broker().settle_pulled(&a, receipts(pulled), outcome).await.expect("settles");
            assert!(unknown.is_empty());
        };
        nack(&first, None).await;
        let second = env.pull_exactly(&a, 1, LONG).await;
        assert_eq!(second[0].deliveries, 2);
        let since = Instant::now();
        let delay = Duration::from_secs(1);
        nack(&second, Some(delay)).await;
        assert!(env.pull(&a, 1, Duration::ZERO, LONG).await.is_empty(), "it is delayed");
        let third = env.pull_exactly(&a, 1, LONG).await;
        assert!(since.elapsed() >= delay, "came back after {:?}", since.elapsed());
        assert_eq!(third[0].deliveries, 3);
    }

    async fn g9_reject_makes_a_dead_letter(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        env.route(&a, "x", &["0"]).await;
        let pulled = env.pull_exactly(&a, 1, LONG).await;
        env.broker().settle_pulled(&a, receipts(&pulled), PullOutcome::Reject).await.expect("settles");
        eventually("the dead letter is there", SOON, async || {
            let page = env.broker().dead_letters(&a, None, 10).await.expect("lists");
            let dead = page.dead_letters.first()?;
            assert_eq!(dead.reason, DeadReason::Rejected);
            assert_eq!(dead.payload.message(), Some(&pulled[0].message));
            Some(())
        })
        .await;
        assert_eq!(env.depths(&a).await.inbox, 0);
    }

    async fn g9_a_settled_lease_stays_settled_after_a_kill(env: &mut KillableEnv) {
        let a = env.client("a", &["x"]).await;
        env.route(&a, "x", &["0", "1", "2"]).await;
        let pulled = env.pull_exactly(&a, 3, LONG).await;
        let first_two = receipts(&pulled[..2]);
        assert!(env.broker().settle_pulled(&a, first_two, PullOutcome::Ack).await.expect("settles").is_empty());
        env.kill_rabbitmq().await;
        let left = env.pull_exactly(&a, 1, LONG).await;
        assert_eq!(bodies(&left), ["2"]);
        assert!(env.pull(&a, 10, A_WHILE, LONG).await.is_empty());
    }

    async fn g10_auto_is_gone_for_good(env: &mut KillableEnv) {
        let a = env.client("a", &["x"]).await;
        env.route(&a, "x", &["0", "1", "2"]).await;
        let pulled = env.pull_exactly(&a, 2, PullMode::Auto).await;
        assert!(pulled.iter().all(|pulled| pulled.receipt.is_none() && pulled.deliveries == 1));
        env.kill_rabbitmq().await;
        assert_eq!(bodies(&env.pull_exactly(&a, 1, PullMode::Auto).await), ["2"]);
        assert!(env.pull(&a, 10, A_WHILE, PullMode::Auto).await.is_empty());
    }

    async fn a_pull_takes_the_oldest_and_at_most_max(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        let all: Vec<String> = numbers(25);
        env.route(&a, "x", &all.iter().map(String::as_str).collect::<Vec<_>>()).await;
        let mut came = Vec::new();
        while came.len() < 25 {
            let batch = env.pull(&a, 10, SOON, PullMode::Auto).await;
            assert!((1..=10).contains(&batch.len()));
            came.extend(bodies(&batch));
        }
        assert_eq!(came, all);
    }

    async fn a_first_pull_for_all_there_is_gets_it(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        // More than is asked of RabbitMQ before it is known how long the messages are.
        let all = numbers(300);
        env.route(&a, "x", &all.iter().map(String::as_str).collect::<Vec<_>>()).await;
        let came = env.pull(&a, 1000, Duration::ZERO, PullMode::Auto).await;
        assert_eq!(bodies(&came), all);
    }

    async fn a_waiting_pull_answers_when_something_comes(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        let since = Instant::now();
        assert!(env.pull(&a, 10, A_WHILE, PullMode::Auto).await.is_empty());
        assert!(since.elapsed() >= A_WHILE, "gave up after {:?}", since.elapsed());
        let broker = env.broker();
        let waiting = broker.pull(&a, 10, SOON, PullMode::Auto);
        let sending = env.route(&a, "x", &["0"]);
        let (came, ()) = futures_util::join!(waiting, sending);
        assert_eq!(bodies(&came.expect("pulls")), ["0"]);
    }

    async fn a_dropped_pull_takes_nothing_with_it(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        for mode in [LONG, PullMode::Auto] {
            for _ in 0..5 {
                stays_pending("an empty inbox gave something", env.broker().pull(&a, 10, SOON, mode)).await;
            }
            env.route(&a, "x", &["0", "1"]).await;
            let came = soon("they come", env.pull_exactly(&a, 2, PullMode::Auto)).await;
            assert_eq!(bodies(&came), ["0", "1"]);
        }
    }

    async fn several_waiting_pulls_share_what_comes(env: &mut BrokerEnv) {
        let a = env.client("a", &["x"]).await;
        let broker = env.broker();
        let pulls = (0..4).map(|_| broker.pull(&a, 1, SOON, PullMode::Auto));
        let sending = env.route(&a, "x", &["0", "1", "2", "3"]);
        let (came, ()) = futures_util::join!(futures_util::future::join_all(pulls), sending);
        let mut came: Vec<String> = came.into_iter().flat_map(|came| bodies(&came.expect("pulls"))).collect();
        came.sort();
        assert_eq!(came, numbers(4));
    }

    async fn pulling_from_nobody_is_refused(env: &mut BrokerEnv) {
        let nobody = client_id("nobody");
        let pull = env.broker().pull(&nobody, 1, Duration::ZERO, PullMode::Auto).await;
        assert_eq!(pull.map(|_| ()).expect_err("no inbox").kind, BrokerErrorKind::NotFound);
        let settled = env.broker().settle_pulled(&nobody, vec![Receipt("1-1".into())], PullOutcome::Ack).await;
        assert_eq!(settled.expect_err("no inbox").kind, BrokerErrorKind::NotFound);
        assert_eq!(env.broker().depths(&nobody).await.expect_err("no queues").kind, BrokerErrorKind::NotFound);
    }
}
