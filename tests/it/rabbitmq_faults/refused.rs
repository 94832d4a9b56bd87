//! A queue that takes no messages because an operator's policy says so.

use std::collections::BTreeMap;

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::fixture::{BrokerKind, Fixture as _};
use crate::support::http::Client;
use crate::support::rabbitmq::VirtualHost;
use crate::support::wait::SOON;
use crate::support::{TestApp, eventually};

/// More than there are channels to publish on: some of them share the first one's.
const SENDERS: usize = 8;

/// Messages of each sender.
const ROUNDS: u64 = 20;

/// Sends one; false when it was refused, and the sender told to come again.
async fn is_accepted(sender: &Client, message: u64) -> bool {
    let sent = sender.post("/send").json(&json!({"topic": "a.b", "message": message})).send().await;
    if sent.status == 503 {
        sent.problem(503, "broker_unavailable");
        return false;
    }
    sent.ok(202);
    true
}

/// Classic, because a quorum queue refuses only when it is too long, and an outbox is empty.
#[actix_rt::test]
async fn an_outbox_that_refuses_messages_holds_up_no_other_sender() {
    let host = VirtualHost::create().await;
    let mut app = TestApp::start_on(BrokerKind::RabbitmqClassic, host.url(), &[]).await;
    let bob = app.onboard("bob", &["a.b"]).await;
    let refused = app.onboard("refused", &[]).await;
    let mut senders = Vec::new();
    for n in 0..SENDERS {
        senders.push(app.onboard(&format!("sender-{n}"), &[]).await);
    }
    let mut accepted: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let mut next = 0;

    let policy = format!("policies/{}/full", host.name());
    let definition = json!({"max-length": 0, "overflow": "reject-publish"});
    let full = json!({"pattern": "^refused-outbox$", "apply-to": "queues", "definition": definition});
    host.manage(Method::PUT, &policy, Some(full)).await;
    eventually("the queue refuses messages", SOON, async || {
        next += 1;
        if !is_accepted(&refused, next).await {
            return Some(());
        }
        accepted.entry(refused.id.clone()).or_default().push(next);
        None
    })
    .await;
    for round in 0..ROUNDS {
        next += 1;
        assert!(!is_accepted(&refused, next).await, "in round {round}");
        for sender in &senders {
            sender.send("a.b", json!(round)).await;
            accepted.entry(sender.id.clone()).or_default().push(round);
        }
    }
    eventually("the log says what is done about it", SOON, async || {
        app.router.log().contains("RabbitMQ refuses messages; another channel is opened for them").then_some(())
    })
    .await;
    host.manage(Method::DELETE, &policy, None).await;
    eventually("the queue takes messages again", SOON, async || {
        next += 1;
        is_accepted(&refused, next).await.then_some(())
    })
    .await;
    accepted.entry(refused.id.clone()).or_default().push(next);

    let count = accepted.values().map(Vec::len).sum();
    let mut arrived: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for envelope in bob.receive_exactly(count, "").await {
        let sender = envelope["sender"].as_str().expect("a sender").to_owned();
        arrived.entry(sender).or_default().push(envelope["message"].as_u64().expect("a number"));
    }
    assert_eq!(arrived, accepted, "what was accepted, of each sender in order, and nothing that was refused");
    assert_eq!(bob.receive("max=1").await, Vec::<Value>::new());
    app.finish().await;
}
