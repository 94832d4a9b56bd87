//! A broker that is not there when the router starts, or cannot be trusted.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;

use crate::support::endpoint::Authority;
use crate::support::fixture::{BrokerKind, Fixture};
use crate::support::rabbitmq::Node;
use crate::support::wait::SOON;
use crate::support::{TestApp, eventually};

/// How soon a caller is told that the broker is away.
const PROMPTLY: Duration = Duration::from_secs(1);

async fn wait_for_reason(app: &TestApp, reason: &str) {
    eventually(&format!("/readyz says {reason:?}"), SOON, async || {
        let ready = app.api.get("/readyz").send().await.problem(503, "broker_unavailable");
        ready["reasons"].to_string().contains(reason).then_some(())
    })
    .await;
}

#[actix_rt::test]
async fn a_router_waits_for_a_broker_that_is_not_there_when_it_starts() {
    let mut node = Node::prepare("");
    let mut app = TestApp::start_away_from(BrokerKind::RabbitmqQuorum, node.url(), &[]).await;
    wait_for_reason(&app, &node.amqp_address().to_string()).await;
    assert!(!app.router.log().contains("tests-password"), "the log names the broker without its password");

    let (begun, body) = (Instant::now(), json!({"client_id": "early", "subscriptions": ["#"]}));
    let refused = app.admin(Method::POST, "/clients").json(&body).send().await;
    refused.problem(503, "broker_unavailable");
    assert!(begun.elapsed() < PROMPTLY, "refused after {:?}", begun.elapsed());

    node.spawn();
    node.wait_until_up().await;
    app.router.wait_until_ready().await;
    let early = app.onboard_with(body).await;
    early.send("a.b", json!("first")).await;
    assert_eq!(early.receive_exactly(1, "").await[0]["message"], "first");

    // Asked to stop without a broker it stops; and it starts without one with the clients that it has.
    early.send("a.b", json!("second")).await;
    early.wait_for_depth("inbox", 1).await;
    node.kill();
    app.router.terminate();
    let status = app.router.wait_for_exit(Duration::from_secs(20)).await;
    assert!(status.success(), "SIGTERM ends it well: {status}");
    app.router.spawn();
    app.router.wait_until_alive().await;
    wait_for_reason(&app, "RabbitMQ").await;
    let sent = early.post("/send").json(&json!({"topic": "a.b", "message": "third"})).send().await;
    sent.problem(503, "broker_unavailable");
    node.spawn();
    node.wait_until_up().await;
    app.router.wait_until_ready().await;
    assert_eq!(early.receive_exactly(1, "").await[0]["message"], "second", "it was accepted");
    app.finish().await;
}

#[actix_rt::test]
async fn a_broker_is_reached_by_tls_only_when_its_certificate_is_trusted() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = |name: &str| directory.path().join(name).display().to_string();
    let (authority, other) = (Authority::new(), Authority::new());
    let mut node = Node::prepare("");
    let host = node.amqp_address().ip().to_string();
    let (certificate, key) = authority.leaf(&[&host]).pem();
    for (name, text) in [
        ("certificate.pem", &*certificate),
        ("key.pem", &*key),
        ("ca.pem", authority.pem()),
        ("other.pem", other.pem()),
    ] {
        std::fs::write(path(name), text).expect("writes");
    }
    node.configure(&format!(
        "listeners.ssl.1 = {host}:5671\nssl_options.cacertfile = {}\nssl_options.certfile = {}\n\
         ssl_options.keyfile = {}\nssl_options.verify = verify_none\nssl_options.fail_if_no_peer_cert = false",
        path("ca.pem"),
        path("certificate.pem"),
        path("key.pem"),
    ));
    node.spawn();
    node.wait_until_up().await;
    let url = node.url().replace("amqp://", "amqps://").replace(":5672", ":5671");

    let (trusted, other) = (path("ca.pem"), path("other.pem"));
    let trust = [("SSL_CERT_FILE", other.as_str())];
    let wary = TestApp::start_away_from(BrokerKind::RabbitmqQuorum, url.clone(), &trust).await;
    wait_for_reason(&wary, "certificate").await;
    wary.finish().await;

    let trust = [("SSL_CERT_FILE", trusted.as_str())];
    let mut app = TestApp::start_on(BrokerKind::RabbitmqQuorum, url, &trust).await;
    let client = app.onboard("secure", &["#"]).await;
    client.send("a.b", json!("over TLS")).await;
    assert_eq!(client.receive_exactly(1, "").await[0]["message"], "over TLS");
    app.finish().await;
}
