//! Queues and exchanges that somebody else deletes under a running router.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;

use crate::support::fixture::Fixture;
use crate::support::http::Client;
use crate::support::rabbitmq::VirtualHost;
use crate::support::wait::SOON;
use crate::support::{TestApp, eventually};

/// How long it may take until messages arrive again.
const MENDED: Duration = Duration::from_secs(10);

queue_type_tests! {
    async fn what_somebody_deletes_is_there_again(kind: BrokerKind) {
        let host = VirtualHost::create().await;
        let mut app = TestApp::start_on(kind, host.url(), &[]).await;
        let (alice, bob) = (app.onboard("alice", &[]).await, app.onboard("bob", &["a.b"]).await);
        let mut next = 0;
        for what in [
            "queues/alice-outbox",
            "queues/alice-notify",
            "queues/bob-inbox",
            "queues/soar-publish",
            "exchanges/soar-topic",
            "exchanges/soar-broadcast",
            "exchanges/soar-unrouted",
            "queues/soar-unrouted",
        ] {
            let (class, name) = what.split_once('/').expect("a class and a name");
            host.manage(Method::DELETE, &format!("{class}/{}/{name}", host.name()), None).await;
            if name == "soar-topic" {
                // With the exchange went its bindings; what is sent now must wait until they are there again.
                for n in next..next + 10 {
                    alice.send("a.b", json!(n)).await;
                }
                let numbers: BTreeSet<u64> = arrived(&bob, next, 10).await.into_iter().collect();
                assert_eq!(numbers, (next..next + 10).collect(), "after {what} was deleted");
                next += 10;
            }
            let since = Instant::now();
            next = flows_again(what, &alice, &bob, next).await;
            println!("{what}: messages arrive again after {:?}", since.elapsed());
            // From then on nothing is amiss: all arrive, in order.
            for n in next..next + 20 {
                alice.send("a.b", json!(n)).await;
            }
            let numbers: Vec<u64> = arrived(&bob, next, 20).await;
            assert_eq!(numbers, (next..next + 20).collect::<Vec<_>>(), "after {what} was deleted");
            next += 20;
            alice.wait_for_depth("outbox", 0).await;
            alice.wait_for_depth("notify", 0).await;
            bob.wait_for_depth("inbox", 0).await;
        }
        // A queue that nobody uses is looked after as well.
        host.manage(Method::DELETE, &format!("queues/{}/bob-dead", host.name()), None).await;
        eventually("the dead letters' queue is there again", SOON, async || {
            let queues = host.manage(Method::GET, &format!("queues/{}?columns=name", host.name()), None).await;
            queues.as_array()?.iter().any(|queue| queue["name"] == "bob-dead").then_some(())
        })
        .await;
        app.router.wait_until_ready().await;
        let log = app.router.log();
        for told in ["alice-outbox", "soar-publish", "exchange was deleted by somebody else"] {
            assert!(log.contains(told), "the log tells of {told}:\n{log}");
        }
        app.finish().await;
    }

    async fn whoever_asks_first_for_dead_letters_does_not_find_their_queue_missing(kind: BrokerKind) {
        let host = VirtualHost::create().await;
        let mut app = TestApp::start_on(kind, host.url(), &[]).await;
        let bob = app.onboard("bob", &[]).await;
        for (method, path, answer) in [
            (Method::GET, "", json!({"dead_letters": [], "next": null})),
            (Method::POST, "/replay", json!({"replayed": 0})),
            (Method::DELETE, "", json!({"purged": 0})),
        ] {
            host.manage(Method::DELETE, &format!("queues/{}/bob-dead", host.name()), None).await;
            let path = format!("/clients/bob/dead-letters{path}");
            assert_eq!(bob.call(method, &path).send().await.ok(200), answer, "{path}");
        }
        app.finish().await;
    }
}

/// Sends and broadcasts until both arrive. Returns the number after the last that was sent.
async fn flows_again(what: &str, alice: &Client, bob: &Client, first: u64) -> u64 {
    let until = Instant::now() + MENDED;
    let (mut next, mut topic, mut broadcast) = (first, false, false);
    while !(topic && broadcast) {
        assert!(
            Instant::now() < until,
            "{what} was deleted, and since then topics arrive: {topic}, broadcasts: {broadcast}"
        );
        for (path, body) in [("/send", json!({"topic": "a.b", "message": next})), ("/notify", json!({"message": next}))]
        {
            let sent = alice.post(path).json(&body).send().await;
            if sent.status != 202 {
                sent.problem(503, "broker_unavailable");
            }
        }
        next += 1;
        for envelope in bob.receive("max=1000&wait=1").await {
            assert_eq!(envelope["sender"], "alice");
            topic |= envelope["topic"] == "a.b";
            broadcast |= envelope["broadcast"] == true;
        }
    }
    // What is still on its way arrives before what is sent next.
    alice.wait_for_depth("outbox", 0).await;
    alice.wait_for_depth("notify", 0).await;
    next
}

/// The next `count` numbers from `first` on under the topic `a.b`; broadcasts and what was sent before are passed over.
async fn arrived(bob: &Client, first: u64, count: usize) -> Vec<u64> {
    let mut numbers = Vec::new();
    let until = Instant::now() + SOON;
    while numbers.len() < count {
        assert!(Instant::now() < until, "only {numbers:?} arrived");
        let envelopes = bob.receive("max=1000&wait=1").await;
        numbers.extend(
            envelopes
                .iter()
                .filter(|e| e["topic"] == "a.b")
                .filter_map(|e| e["message"].as_u64())
                .filter(|n| *n >= first),
        );
    }
    numbers
}
