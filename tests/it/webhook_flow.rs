//! Webhooks through the whole router: from `POST /clients` to a verified delivery, and everything that an operator does
//! meanwhile.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::endpoint::{Authority, FakeEndpoint, Hit, Reply};
use crate::support::http::Client;
use crate::support::wait::SOON;
use crate::support::{TestApp, eventually};

/// A sender, and a receiver of everything under `x` with a webhook; the receiver's webhook secret.
async fn onboard(app: &mut TestApp, url: &str, settings: Value) -> (Client, Client, String) {
    let mut webhook = json!({"url": url, "timeout_s": 2, "retry_schedule_s": [1, 1]});
    settings.as_object().expect("members").iter().for_each(|(key, value)| webhook[key] = value.clone());
    let body = json!({"client_id": "receiver", "subscriptions": ["x.#"], "webhook": webhook});
    let created = app.admin(Method::POST, "/clients").json(&body).send().await.ok(201);
    let text = |name: &str| created[name].as_str().unwrap_or_else(|| panic!("{name}: {created}")).to_owned();
    let (secret, webhook_secret) = (text("secret"), text("webhook_secret"));
    app.note_secret(&secret);
    app.note_secret(&webhook_secret);
    app.note_secret(webhook_secret.trim_start_matches("whsec_"));
    let sender = app.onboard("sender", &[]).await;
    let receiver = Client { api: app.api.clone(), id: "receiver".into(), secret };
    (sender, receiver, webhook_secret)
}

async fn send(sender: &Client, from: u64, to: u64) {
    let batch: Vec<Value> = (from..to).map(|n| json!({"topic": "x.y", "message": n})).collect();
    sender.call(Method::POST, "/send").json(&Value::Array(batch)).send().await.ok(202);
}

async fn record(app: &TestApp) -> Value {
    app.admin(Method::GET, "/clients/receiver").send().await.ok(200)
}

async fn record_shows(app: &TestApp, what: &str, shows: impl Fn(&Value) -> bool) -> Value {
    eventually(what, SOON, async || Some(record(app).await).filter(|record| shows(record))).await
}

fn numbers(hits: &[Hit]) -> BTreeSet<u64> {
    hits.iter().map(Hit::number).collect()
}

broker_tests! {
    async fn a_webhook_is_called_and_its_attempts_are_shown(app: &mut TestApp) {
        let endpoint = FakeEndpoint::start(|hit, before| match (hit.number(), before) {
            (0, 0) => Reply::Full { status: 500, headers: vec![], body: "ouch ü".repeat(400).into_bytes() },
            _ => Reply::Status(204),
        });
        let (sender, receiver, _) = onboard(app, &endpoint.url(), json!({"concurrency": 1})).await;
        send(&sender, 0, 3).await;
        endpoint.wait_for(4).await;
        let attempts = eventually("four attempts", SOON, async || {
            let page = receiver.call(Method::GET, "/clients/receiver/attempts?limit=3").send().await.ok(200);
            (page["attempts"].as_array().is_some_and(|a| a.len() == 3) && !page["next"].is_null()).then_some(page)
        })
        .await;
        let after = attempts["next"].as_str().expect("a cursor");
        let path = format!("/clients/receiver/attempts?limit=3&after={after}");
        let rest = app.admin(Method::GET, &path).send().await.ok(200);
        assert_eq!(rest["next"], Value::Null);
        let first = &rest["attempts"][0];
        assert_eq!(first["status"], 500);
        assert_eq!(first["response"].as_str().map(str::len), Some(1024));
        assert!(first["error"].as_str().is_some_and(|words| words.contains("500")), "{first}");
        assert!(first["latency_ms"].is_u64() && first["at"].is_string() && first["message_id"].is_string());
        let last = &attempts["attempts"][0];
        assert_eq!((&last["status"], &last["error"]), (&json!(204), &Value::Null));
        let shown = record_shows(app, "empty", |record| record["queues"]["inbox"] == 0).await;
        assert_eq!(shown["webhook"]["breaker"], "closed");
        assert_eq!(shown["actors"]["pusher"], "running");
        assert!(app.metric("backbone_webhook_attempts_total").await >= 4.0);
    }

    async fn pushing_and_pulling_take_turns_and_lose_nothing(app: &mut TestApp) {
        let endpoint = FakeEndpoint::healthy();
        let (sender, receiver, _) = onboard(app, &endpoint.url(), json!({})).await;
        let mut pulled = BTreeSet::new();
        for round in 0..6 {
            send(&sender, round * 50, round * 50 + 50).await;
            app.patch("receiver", json!({"webhook": {"enabled": false}})).await;
            let batch = receiver.call(Method::GET, "/receive?max=20").send().await.ok(200);
            pulled.extend(batch["messages"].as_array().expect("messages").iter().map(|m| {
                m["message"].as_u64().expect("a number")
            }));
            let on = app.patch("receiver", json!({"webhook": {"enabled": true}})).await;
            assert_eq!((&on["webhook"]["enabled"], on["webhook"].get("disabled_reason")), (&json!(true), None));
            receiver.call(Method::GET, "/receive").send().await.problem(409, "webhook_configured");
        }
        eventually("all came one way or the other", SOON, async || {
            let all: BTreeSet<u64> = numbers(&endpoint.hits()).union(&pulled).copied().collect();
            (all == (0..300).collect()).then_some(())
        })
        .await;
        record_shows(app, "empty", |record| record["queues"]["inbox"] == 0).await;
    }

    async fn gone_switches_the_webhook_off_for_all_to_see(app: &mut TestApp) {
        let endpoint = FakeEndpoint::start(|_, before| Reply::Status(if before == 0 { 410 } else { 200 }));
        let operator = app.onboard("operator", &["soar.backbone.#"]).await;
        let (sender, receiver, _) = onboard(app, &endpoint.url(), json!({"concurrency": 1})).await;
        send(&sender, 0, 5).await;
        let off = record_shows(app, "off", |record| record["webhook"]["enabled"] == false).await;
        assert!(off["webhook"]["disabled_reason"].as_str().is_some_and(|reason| reason.contains("410")), "{off}");
        // Those that were still on their way come in as well.
        receiver.wait_for_depth("inbox", 5).await;
        let heard = operator.call(Method::GET, "/receive?wait=30").send().await.ok(200);
        let event = &heard["messages"][0];
        assert_eq!(event["topic"], "soar.backbone.receiver.webhook-disabled");
        assert_eq!((&event["sender"], &event["message"]["reason"]), (&json!("soar"), &json!("gone")));
        assert_eq!(app.metric("backbone_webhooks_disabled_total").await as u64, 1);
        assert!(app.router.log().contains("webhook of client receiver was switched off"));
        // Off, the inbox can be pulled; on again, the rest is pushed.
        let pulled = receiver.call(Method::GET, "/receive?max=2").send().await.ok(200);
        assert_eq!(pulled["messages"].as_array().map(Vec::len), Some(2));
        app.patch("receiver", json!({"webhook": {"enabled": true}})).await;
        endpoint.wait_for(4).await;
        record_shows(app, "empty", |record| record["queues"]["inbox"] == 0).await;
        assert_eq!(endpoint.count(), 4);
    }

    async fn retries_survive_kills_of_the_router_with_their_count(app: &mut TestApp) {
        let endpoint = FakeEndpoint::start(|_, _| Reply::Status(500));
        let (sender, _, _) = onboard(app, &endpoint.url(), json!({"retry_schedule_s": [2, 2]})).await;
        // So few that the breaker opens late, if at all, whatever comes twice.
        send(&sender, 0, 1).await;
        endpoint.wait_for(1).await;
        // An attempt is counted durably within moments; what was sent after it is durable when it is answered.
        send(&sender, 1, 2).await;
        endpoint.wait_for(2).await;
        let since = Instant::now();
        app.kill_and_restart().await;
        // What was under way when it was killed may have been made again, and on RabbitMQ what was copied into the retry
        // queue and not acknowledged in the inbox is there twice.
        record_shows(app, "both are dead", |record| {
            record["queues"]["inbox"] == 0 && record["queues"]["dead"].as_u64().is_some_and(|dead| dead >= 2)
        })
        .await;
        assert!(since.elapsed() >= Duration::from_secs(3), "{:?}", since.elapsed());
        let letters = app.admin(Method::GET, "/clients/receiver/dead-letters").send().await.ok(200);
        let letters = letters["dead_letters"].as_array().expect("letters");
        let distinct: BTreeSet<_> = letters.iter().map(|letter| letter["envelope"]["id"].as_str()).collect();
        assert_eq!((distinct.len(), letters.len() <= 6), (2, true), "{letters:?}");
        for letter in letters {
            assert_eq!((&letter["reason"], &letter["attempts"]), (&json!("delivery_failed"), &json!(3)), "{letter}");
        }
        assert!((6..=18).contains(&endpoint.count()), "{}", endpoint.count());
    }

    async fn a_rotation_of_the_secret_reaches_the_pusher_at_once(app: &mut TestApp) {
        let endpoint = FakeEndpoint::healthy();
        let (sender, receiver, _) = onboard(app, &endpoint.url(), json!({})).await;
        send(&sender, 0, 1).await;
        assert_eq!(endpoint.wait_for(1).await[0].headers["webhook-signature"].split(' ').count(), 1);
        let rotated = receiver.call(Method::POST, "/clients/receiver/webhook-secret").send().await.ok(200);
        app.note_secret(rotated["secret"].as_str().expect("a secret"));
        send(&sender, 1, 2).await;
        assert_eq!(endpoint.wait_for(2).await[1].headers["webhook-signature"].split(' ').count(), 2);
    }

    async fn a_paused_client_is_not_pushed_to(app: &mut TestApp) {
        let endpoint = FakeEndpoint::healthy();
        let (sender, _, _) = onboard(app, &endpoint.url(), json!({})).await;
        app.patch("receiver", json!({"paused": true})).await;
        send(&sender, 0, 5).await;
        record_shows(app, "five wait", |record| record["queues"]["inbox"] == 5).await;
        assert_eq!(endpoint.count(), 0);
        app.patch("receiver", json!({"paused": false})).await;
        endpoint.wait_for(5).await;
    }

    async fn a_test_call_says_what_came_back(app: &mut TestApp) {
        let endpoint = FakeEndpoint::start(|_, before| match before {
            0 => Reply::Full { status: 200, headers: vec![], body: b"hello".to_vec() },
            _ => Reply::HangBefore,
        });
        let (_, receiver, _) = onboard(app, &endpoint.url(), json!({"enabled": true})).await;
        app.patch("receiver", json!({"webhook": {"enabled": false}})).await;
        let attempt = receiver.call(Method::POST, "/clients/receiver/webhook/test").send().await.ok(200);
        assert_eq!((&attempt["status"], &attempt["response"]), (&json!(200), &json!("hello")));
        assert_eq!(endpoint.hits()[0].json()["message"]["test"], true);
        let attempt = app.admin(Method::POST, "/clients/receiver/webhook/test").send().await.ok(200);
        assert_eq!(attempt["status"], Value::Null);
        assert!(attempt["error"].as_str().is_some_and(|words| words.contains("no answer within 2 s")), "{attempt}");
        let log = receiver.call(Method::GET, "/clients/receiver/attempts").send().await.ok(200);
        assert_eq!(log["attempts"].as_array().map(Vec::len), Some(2));
        app.onboard("plain", &[]).await;
        app.admin(Method::POST, "/clients/plain/webhook/test").send().await.problem(404, "not_found");
        receiver.call(Method::POST, "/clients/plain/webhook/test").send().await.problem(403, "forbidden");
    }

    async fn a_deleted_clients_attempts_are_forgotten(app: &mut TestApp) {
        let endpoint = FakeEndpoint::healthy();
        let (sender, _, _) = onboard(app, &endpoint.url(), json!({})).await;
        send(&sender, 0, 5).await;
        endpoint.wait_for(5).await;
        app.delete("receiver").await;
        app.delete("sender").await;
        let (_, receiver, _) = onboard(app, &endpoint.url(), json!({})).await;
        let log = receiver.call(Method::GET, "/clients/receiver/attempts").send().await.ok(200);
        assert_eq!(log["attempts"].as_array().map(Vec::len), Some(0));
    }
}

#[actix_rt::test]
async fn https_is_trusted_by_an_added_authority_only() {
    use crate::support::fixture::{BrokerKind, Fixture};
    let (authority, stranger) = (Authority::new(), Authority::new());
    let directory = tempfile::tempdir().expect("a temporary directory");
    let bundle = directory.path().join("ca.pem");
    std::fs::write(&bundle, authority.pem()).expect("writes");
    let bundle = bundle.to_str().expect("text");
    let mut app = TestApp::start_with(BrokerKind::Embedded, &[("SOAR_WEBHOOK_CA", bundle)]).await;
    let trusted = FakeEndpoint::start_tls(&authority.leaf(&["127.0.0.1"]), |_, _| Reply::Status(200));
    let strange = FakeEndpoint::start_tls(&stranger.leaf(&["127.0.0.1"]), |_, _| Reply::Status(200));
    let (sender, _, _) = onboard(&mut app, &trusted.url(), json!({})).await;
    send(&sender, 0, 3).await;
    trusted.wait_for(3).await;
    app.patch("receiver", json!({"webhook": {"url": strange.url()}})).await;
    let attempt = app.admin(Method::POST, "/clients/receiver/webhook/test").send().await.ok(200);
    assert!(attempt["error"].as_str().is_some_and(|words| words.contains("known authority")), "{attempt}");
    assert_eq!(strange.count(), 0);
    app.finish().await;
}

#[actix_rt::test]
async fn nothing_but_public_addresses_is_reached_unless_listed() {
    use crate::support::fixture::{BrokerKind, Fixture};
    let mut app = TestApp::start_with(BrokerKind::Embedded, &[("SOAR_WEBHOOK_ALLOW", "")]).await;
    let endpoint = FakeEndpoint::healthy();
    let port = endpoint.port();
    let body = |url: String| json!({"client_id": "r", "webhook": {"url": url}});
    let refused = app.admin(Method::POST, "/clients").json(&body(endpoint.url())).send().await;
    refused.problem(422, "invalid");
    app.onboard_with(body(format!("https://127.0.0.1:{port}/"))).await;
    for host in ["127.0.0.1", "localhost", "0x7f.1", "2130706433", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254"] {
        let url = format!("https://{host}:{port}/");
        app.patch("r", json!({"webhook": {"url": url}})).await;
        let attempt = app.admin(Method::POST, "/clients/r/webhook/test").send().await.ok(200);
        assert!(attempt["error"].as_str().is_some_and(|words| words.contains("public address")), "{host}: {attempt}");
    }
    assert_eq!(endpoint.connections(), 0);
    app.finish().await;
}
