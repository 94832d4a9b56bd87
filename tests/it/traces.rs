//! The way of every kind of message (`GET /messages/{id}`), and the W3C trace context that a message carries along.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::endpoint::{FakeEndpoint, Reply};
use crate::support::fixture::{BrokerKind, Fixture};
use crate::support::http::{Client, receipts};
use crate::support::rabbitmq::VirtualHost;
use crate::support::socket::Socket;
use crate::support::wait::SOON;
use crate::support::{TestApp, eventually};

/// The example of the W3C recommendation.
const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// What is no `traceparent`, and is treated as if there were none.
const NO_TRACES: [&str; 7] = [
    "",
    "nonsense",
    "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
    "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
    "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
    "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
];

/// The way of a message that `sender` sent, once it is in this state.
async fn way(sender: &Client, id: &str, state: &str) -> Value {
    let path = format!("/messages/{id}");
    let what = format!("{id} is {state}");
    let way = eventually(&what, SOON, async || {
        let answer = sender.get(&path).send().await;
        if answer.status == 404 {
            return None;
        }
        let way = answer.ok(200);
        // A hop may be noted a moment after the next one has its message.
        let has = |step: &str| way["hops"].as_array().is_some_and(|hops| hops.iter().any(|hop| hop["step"] == step));
        let is_whole =
            (has("forwarded") || way["topic"].is_null()) && has("published") && (has("routed") || has("unrouted"));
        (way["state"] == state && is_whole).then_some(way)
    });
    match actix_rt::time::timeout(SOON / 2, way).await {
        Ok(way) => way,
        Err(_) => panic!("{id} is not {state}: {}", sender.get(&path).send().await.json()),
    }
}

/// Its steps, each with its inbox, pattern and reason where it has them.
fn steps(way: &Value) -> Vec<String> {
    let hops = way["hops"].as_array().unwrap_or_else(|| panic!("{way}"));
    let mut last = "";
    for hop in hops {
        let at = hop["at"].as_str().expect("every step has its time");
        assert!(last <= at, "in order of time: {way}");
        last = at;
    }
    let text = |hop: &Value, name: &str| hop[name].as_str().map(|text| format!(" {text}")).unwrap_or_default();
    let shown = |hop: &Value| {
        let (inbox, pattern, reason) = (text(hop, "inbox"), text(hop, "pattern"), text(hop, "reason"));
        format!("{}{inbox}{pattern}{reason}", hop["step"].as_str().expect("a step"))
    };
    hops.iter().map(shown).collect()
}

/// Sends with this `traceparent` and returns the id.
async fn send_traced(sender: &Client, path: &str, body: Value, traceparent: &str) -> String {
    let answer = sender.post(path).header("traceparent", traceparent).json(&body).send().await.ok(202);
    answer["ids"][0].as_str().expect("an id").to_owned()
}

broker_tests! {
    async fn it_says_in_which_inboxes_a_message_is_and_why(app: &mut TestApp) {
        let sender = app.onboard("sender", &[]).await;
        let one = app.onboard("one", &["x.#", "never"]).await;
        app.onboard("two", &["*.y"]).await;
        app.onboard("three", &["y.x"]).await;
        let id = sender.send("x.y", json!(1)).await;
        one.receive_exactly(1, "").await;
        let way = eventually("one has it", SOON, async || {
            let way = way(&sender, &id, "published").await;
            (way["delivered"] == 1).then_some(way)
        })
        .await;
        let steps = steps(&way);
        assert_eq!(steps[..3], ["accepted", "forwarded", "published"], "{way}");
        let mut routed = steps[3..5].to_vec();
        routed.sort();
        assert_eq!((routed, &steps[5..]), (vec!["routed one x.#".into(), "routed two *.y".into()], &["delivered one".to_owned()][..]));
        assert_eq!((&way["routed"], &way["dead"], &way["hops_left_out"]), (&json!(2), &json!(0), &json!(0)));
    }

    async fn what_nobody_subscribed_to_ends_unrouted(app: &mut TestApp) {
        let sender = app.onboard("sender", &["x"]).await;
        let id = sender.send("nobody.listens", json!(1)).await;
        assert_eq!(steps(&way(&sender, &id, "unrouted").await), ["accepted", "forwarded", "published", "unrouted"]);
    }

    async fn a_broadcast_goes_to_every_inbox_and_says_so(app: &mut TestApp) {
        let sender = app.onboard("sender", &[]).await;
        let other = app.onboard("other", &[]).await;
        let id = sender.notify(json!("all")).await;
        sender.receive_exactly(1, "").await;
        other.receive_exactly(1, "").await;
        let way = way(&sender, &id, "delivered").await;
        assert_eq!(way["topic"], Value::Null);
        let mut steps = steps(&way);
        assert_eq!(steps[..2], ["accepted", "published"], "{way}");
        steps[2..].sort();
        assert_eq!(steps[2..], ["delivered other", "delivered sender", "routed other", "routed sender"], "{way}");
    }

    async fn attempts_and_the_end_of_a_webhooks_message_are_on_its_way(app: &mut TestApp) {
        let endpoint = FakeEndpoint::start(|_, before| Reply::Status(if before < 2 { 500 } else { 200 }));
        let sender = app.onboard("sender", &[]).await;
        let webhook = json!({"url": endpoint.url(), "retry_schedule_s": [1]});
        app.onboard_with(json!({"client_id": "hooked", "subscriptions": ["x"], "webhook": webhook})).await;
        let id = sender.send("x", json!(1)).await;
        let dead = way(&sender, &id, "dead").await;
        let failed = "attempt_failed hooked".to_owned();
        assert_eq!(steps(&dead)[4..], [failed.clone(), failed, "dead hooked delivery_failed".into()], "{dead}");
        // What is replayed may be delivered yet.
        let replayed = app.admin(Method::POST, "/clients/hooked/dead-letters/replay").send().await.ok(200);
        assert_eq!(replayed["replayed"], 1);
        let delivered = way(&sender, &id, "delivered").await;
        assert_eq!(steps(&delivered).last().map(String::as_str), Some("delivered hooked"), "{delivered}");
    }

    async fn a_rejected_and_an_expired_message_are_dead_and_it_says_of_what(app: &mut TestApp) {
        let sender = app.onboard("sender", &[]).await;
        let reader = app.onboard("reader", &["x"]).await;
        let limits = json!({"inbox_ttl_s": 1});
        app.onboard_with(json!({"client_id": "late", "subscriptions": ["y"], "limits": limits})).await;
        let (rejected, expired) = (sender.send("x", json!(1)).await, sender.send("y", json!(2)).await);
        let taken = reader.receive_exactly(1, "ack=manual").await;
        reader.post("/nack").json(&json!({"receipts": receipts(&taken), "dead": true})).send().await.ok(200);
        let way_of = way(&sender, &rejected, "dead").await;
        assert_eq!(steps(&way_of).last().map(String::as_str), Some("dead reader rejected"), "{way_of}");
        let way_of = way(&sender, &expired, "dead").await;
        assert_eq!(steps(&way_of).last().map(String::as_str), Some("dead late expired"), "{way_of}");
    }

    async fn only_the_admin_and_the_sender_may_ask(app: &mut TestApp) {
        let (a, b) = (app.onboard("a", &["x"]).await, app.onboard("b", &["x"]).await);
        let own = json!({"topic": "x", "message": 1, "id": "same"});
        a.send_all(own.clone()).await;
        way(&a, "same", "published").await;
        b.get("/messages/same").send().await.problem(403, "forbidden");
        app.api.get("/messages/same").send().await.problem(401, "unauthorized");
        b.get("/messages/never-sent").send().await.problem(404, "not_found");
        // The same id of two senders: each sees its own, the admin is told of both.
        b.send_all(own).await;
        assert_eq!(way(&b, "same", "published").await["sender"], "b");
        assert_eq!(way(&a, "same", "published").await["sender"], "a");
        let newest = app.admin(Method::GET, "/messages/same").send().await.ok(200);
        let other = newest["others"][0].as_str().expect("there is another").to_owned();
        assert_ne!(newest["sender"], other.as_str());
        let asked = app.admin(Method::GET, &format!("/messages/same?sender={other}")).send().await.ok(200);
        assert_eq!(asked["sender"], other.as_str());
        app.admin(Method::GET, "/messages/same?sender=nobody").send().await.problem(404, "not_found");
        app.admin(Method::GET, "/messages/same?sender=No!").send().await.names(&["sender"]);
    }

    async fn a_trace_context_reaches_the_webhook_and_a_broken_one_does_not(app: &mut TestApp) {
        let endpoint = FakeEndpoint::healthy();
        let sender = app.onboard("sender", &[]).await;
        let webhook = json!({"url": endpoint.url(), "concurrency": 1});
        app.onboard_with(json!({"client_id": "hooked", "subscriptions": ["x.#"], "webhook": webhook})).await;
        let mut sent = 0;
        let mut arrives = async |what: &str, expected: Option<&str>| {
            sent += 1;
            let hit = endpoint.wait_for(sent).await.remove(sent - 1);
            assert_eq!(hit.headers.get("traceparent").map(String::as_str), expected, "{what}");
        };
        send_traced(&sender, "/send", json!({"topic": "x.1", "message": 1}), TRACE).await;
        arrives("POST /send", Some(TRACE)).await;
        send_traced(&sender, "/notify", json!({"message": 1}), TRACE).await;
        arrives("POST /notify", Some(TRACE)).await;
        let mut socket = Socket::open(&sender).await;
        socket.ask(json!({"type": "send", "topic": "x.2", "message": 1, "traceparent": TRACE})).await;
        arrives("send over a socket", Some(TRACE)).await;
        socket.ask(json!({"type": "notify", "message": 1, "traceparent": TRACE})).await;
        arrives("notify over a socket", Some(TRACE)).await;
        for broken in NO_TRACES {
            send_traced(&sender, "/send", json!({"topic": "x.3", "message": 1}), broken).await;
            arrives(broken, None).await;
            socket.ask(json!({"type": "send", "topic": "x.3", "message": 1, "traceparent": broken})).await;
            arrives(broken, None).await;
        }
        socket.ask(json!({"type": "send", "topic": "x.3", "message": 1, "traceparent": 7})).await;
        arrives("of a wrong type", None).await;
    }
}

#[actix_rt::test]
async fn each_step_of_a_traced_message_is_logged() {
    let env = [("RUST_LOG", "info,backbone::trace=debug")];
    let mut app = TestApp::start_with(BrokerKind::Embedded, &env).await;
    let sender = app.onboard("sender", &["x"]).await;
    let id = send_traced(&sender, "/send", json!({"topic": "x", "message": 1}), TRACE).await;
    let untraced = sender.send("x", json!(2)).await;
    sender.receive_exactly(2, "").await;
    way(&sender, &id, "delivered").await;
    let log = app.router.log();
    for step in ["accepted", "forwarded", "published", "routed", "delivered"] {
        let line = format!("message {id} of sender {step}, traceparent {TRACE}");
        assert!(log.contains(&line), "{line} is not in the log:\n{log}");
    }
    assert!(!log.contains(&untraced), "{log}");
    app.finish().await;
}

#[actix_rt::test]
async fn no_more_ways_are_kept_than_asked_for() {
    for (kept, remembered) in [("0", false), ("50", true)] {
        let mut app = TestApp::start_with(BrokerKind::Embedded, &[("SOAR_TRACE_MESSAGES", kept)]).await;
        let sender = app.onboard("sender", &["x"]).await;
        let first = sender.send("x", json!(0)).await;
        sender.receive_exactly(1, "").await;
        if remembered {
            way(&sender, &first, "delivered").await;
        }
        let batch: Vec<_> = (0..100).map(|n| json!({"topic": "x", "message": n})).collect();
        let last = sender.send_all(json!(batch)).await["ids"][99].as_str().expect("an id").to_owned();
        sender.receive_exactly(100, "").await;
        let gone = sender.get(&format!("/messages/{first}")).send().await.problem(404, "not_found");
        assert!(gone["detail"].as_str().is_some_and(|detail| detail.contains("SOAR_TRACE_MESSAGES")), "{gone}");
        if remembered {
            // Of a batch that is longer than what is kept, the first hops have made room for the later ones.
            let path = format!("/messages/{last}");
            eventually("the last is delivered", SOON, async || {
                let way = sender.get(&path).send().await;
                (way.status == 200 && way.json()["state"] == "delivered").then_some(())
            })
            .await;
        }
        app.finish().await;
    }
}

/// What RabbitMQ holds of a message is what an AMQP client is given.
#[actix_rt::test]
async fn rabbitmq_carries_the_trace_context_as_a_header_and_takes_one_from_amqp_clients() {
    let host = VirtualHost::create().await;
    let env = BrokerKind::RabbitmqQuorum.router_env(host.url());
    let env: Vec<_> = env.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let mut app = TestApp::start_with(BrokerKind::Embedded, &env).await;
    let sender = app.onboard("sender", &[]).await;
    let reader = app.onboard("reader", &["x.#"]).await;
    send_traced(&sender, "/send", json!({"topic": "x.1", "message": 1}), TRACE).await;
    reader.wait_for_depth("inbox", 1).await;
    let get = json!({"count": 1, "ackmode": "ack_requeue_false", "encoding": "auto"});
    let path = format!("queues/{}/reader-inbox/get", host.name());
    let got = host.manage(Method::POST, &path, Some(get.clone())).await;
    assert_eq!(got[0]["properties"]["headers"]["traceparent"], TRACE, "{got}");

    // And the way of what an AMQP client puts into its outbox.
    let publish = json!({
        "properties": {"delivery_mode": 2, "headers": {"traceparent": TRACE, "unknown": "dropped"}},
        "routing_key": "sender-outbox",
        "payload": json!({"topic": "x.2", "message": 2, "id": "by-amqp"}).to_string(),
        "payload_encoding": "string",
    });
    let path_of_publish = format!("exchanges/{}/amq.default/publish", host.name());
    assert_eq!(host.manage(Method::POST, &path_of_publish, Some(publish)).await["routed"], true);
    reader.wait_for_depth("inbox", 1).await;
    let got = host.manage(Method::POST, &path, Some(get)).await;
    assert_eq!(got[0]["properties"]["headers"]["traceparent"], TRACE, "{got}");
    assert_eq!(got[0]["properties"]["headers"]["unknown"], Value::Null, "{got}");
    let by_amqp = way(&sender, "by-amqp", "published").await;
    assert_eq!(steps(&by_amqp), ["accepted", "forwarded", "published", "routed reader x.#"], "{by_amqp}");
    app.finish().await;
}
