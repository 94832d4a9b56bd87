//! The address guard from outside: what a webhook's URL may be, at `POST /clients` and when connecting, in the real
//! program. How each address is judged is in `backbone::webhook::address`; that every fault of an endpoint is survived,
//! in `webhook_send`.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use backbone::client::Webhook;
use backbone::webhook::dial::Resolver;
use backbone::webhook::failure::FailureKind;
use backbone::webhook::{Endpoint, Post, Sender, tls};
use parking_lot::Mutex;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::TestApp;
use crate::support::endpoint::FakeEndpoint;
use crate::support::fixture::{BrokerKind, Fixture};

/// Hosts that reach this machine, or something else that is not public, if the guard lets them.
const INWARD: [&str; 84] = [
    // Loopback in every spelling that a URL parser or a resolver knows.
    "127.0.0.1",
    "127.0.0.1.",
    "127.1",
    "127.0.1",
    "127.255.255.254",
    "2130706433",
    "0x7f000001",
    "0X7F000001",
    "0x7f.1",
    "0x7f.0.0.1",
    "0x7F.0x0.0x0.0x1",
    "017700000001",
    "0177.0.0.1",
    "0177.1",
    "00000177.0.0.01",
    "0x7f.0.1",
    "0177.0x0.0.1",
    "%31%32%37.0.0.1",
    "127%2e0%2e0%2e1",
    "１２７.０.０.１",
    "127。0。0。1",
    "①②⑦.⓪.⓪.①",
    "localhost",
    "LOCALHOST",
    "LocalHost",
    "localhost.",
    "[::1]",
    "[0:0:0:0:0:0:0:1]",
    "[0000:0000:0000:0000:0000:0000:0000:0001]",
    "[::0001]",
    // The unspecified address reaches the host itself.
    "0.0.0.0",
    "0",
    "0x0",
    "00.00.00.00",
    "[::]",
    // IPv4 inside IPv6: mapped, compatible, translated, 6to4, Teredo, NAT64, ISATAP.
    "[::ffff:127.0.0.1]",
    "[::FFFF:7F00:1]",
    "[0:0:0:0:0:ffff:7f00:0001]",
    "[::ffff:0.0.0.0]",
    "[::ffff:10.0.0.1]",
    "[::ffff:169.254.169.254]",
    "[::127.0.0.1]",
    "[::7f00:1]",
    "[::ffff:0:127.0.0.1]",
    "[2002:7f00:1::]",
    "[2002:a9fe:a9fe::1]",
    "[2001:0:7f00:1::]",
    "[2001:0:808:808:0:0:80ff:fffe]",
    "[64:ff9b::127.0.0.1]",
    "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::808:808]",
    "[2a00:1450::5efe:10.0.0.1]",
    // Metadata services.
    "169.254.169.254",
    "0xa9fea9fe",
    "2852039166",
    "0251.0376.0251.0376",
    "100.100.100.200",
    "192.0.0.192",
    "168.63.129.16",
    "[fd00:ec2::254]",
    // Private, shared, link-local, unique local, site-local.
    "10.0.0.1",
    "10.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.0.1",
    "100.64.0.1",
    "100.127.255.255",
    "[fe80::1]",
    "[fec0::1]",
    "[fc00::1]",
    "[fdff::1]",
    // Multicast, broadcast, reserved, benchmarking, documentation, protocol assignments.
    "224.0.0.1",
    "239.255.255.250",
    "[ff02::1]",
    "255.255.255.255",
    "240.0.0.1",
    "198.18.0.1",
    "198.19.255.255",
    "192.0.2.1",
    "203.0.113.9",
    "192.0.0.8",
    "192.88.99.1",
    "[2001:db8::1]",
    "[100::1]",
];

/// URLs that are refused as soon as they are set.
const NO_URL: [&str; 24] = [
    "https://[fe80::1%25eth0]/",
    "https://[fe80::1%eth0]/",
    "https://[::1%lo]/",
    "https://8.8.8.8@127.0.0.1/",
    "https://8.8.8.8:443@127.0.0.1/",
    "https://@127.0.0.1/",
    "https://127.0.0.1#@8.8.8.8/",
    "https://256.256.256.256/",
    "https://1.2.3.4.5/",
    "https://0x100000000/",
    "https://[::ffff:0x7f.0.0.1]/",
    "https://127.0.0.08/",
    "https://exa mple.com/",
    "https://example.com\t/",
    "https://%00/",
    "http://8.8.8.8/",
    "http://example.com/",
    "http://127.0.0.1/",
    "http://[::1]/",
    "ftp://example.com/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "//127.0.0.1/",
    "https:///",
];

/// Some of the ports that no web server listens on.
const NO_WEB_SERVERS: [u16; 8] = [0, 22, 23, 25, 53, 111, 2049, 6667];

#[actix_rt::test]
async fn no_spelling_of_an_inward_address_is_reached() {
    let app = TestApp::start_with(BrokerKind::Embedded, &[("SOAR_WEBHOOK_ALLOW", "")]).await;
    let endpoint = FakeEndpoint::healthy();
    let port = endpoint.port();
    assert_eq!(BTreeSet::from(INWARD).len(), INWARD.len(), "each once");
    for host in INWARD {
        let url = format!("https://{host}:{port}/");
        let body = json!({"client_id": "r", "webhook": {"url": url, "timeout_s": 2}});
        app.admin(Method::POST, "/clients").json(&body).send().await.ok(201);
        let attempt = app.admin(Method::POST, "/clients/r/webhook/test").send().await.ok(200);
        assert_eq!(attempt["status"], Value::Null, "{host}: {attempt}");
        let words = attempt["error"].as_str().expect("an error");
        // Not every system knows `localhost.`, with the dot.
        let is_unknown = host == "localhost." && words.contains("cannot be resolved");
        assert!(words.contains("not at a public address") || is_unknown, "{host}: {attempt}");
        app.delete("r").await;
    }
    assert_eq!(endpoint.connections(), 0);
    app.finish().await;
}

#[actix_rt::test]
async fn what_makes_no_sense_is_refused_at_once_and_named() {
    let app = TestApp::start_with(BrokerKind::Embedded, &[("SOAR_WEBHOOK_ALLOW", "")]).await;
    let create = |webhook: Value| {
        let body = json!({"client_id": "r", "webhook": webhook});
        app.admin(Method::POST, "/clients").json(&body).send()
    };
    for url in NO_URL {
        create(json!({"url": url})).await.names(&["/webhook/url"]);
    }
    for port in NO_WEB_SERVERS {
        create(json!({"url": format!("https://example.com:{port}/")})).await.names(&["/webhook/url"]);
    }
    for (name, value) in [
        ("Host", "inside.example"),
        ("Content-Length", "5"),
        ("Transfer-Encoding", "chunked"),
        ("Connection", "close"),
        ("Webhook-Signature", "v1,mine"),
        ("x-a b", "x"),
        ("x-break", "a\r\nhost: b"),
        ("x-ü", "x"),
        ("x-utf8", "ü"),
    ] {
        let headers = json!({name: value});
        let answer = create(json!({"url": "https://example.com/", "headers": headers})).await;
        answer.names(&[&format!("/webhook/headers/{name}")]);
    }
    // The same for PATCH.
    create(json!({"url": "https://example.com/"})).await.ok(201);
    let patch = json!({"webhook": {"url": "https://example.com:25/", "headers": {"host": "x"}, "timeout_s": 61}});
    let call = app.admin(Method::PATCH, "/clients/r").body("application/merge-patch+json", patch.to_string());
    call.send().await.names(&["/webhook/url", "/webhook/headers/host", "/webhook/timeout_s"]);
    app.finish().await;
}

#[actix_rt::test]
async fn proxies_of_the_environment_are_not_used() {
    let (proxy, endpoint) = (FakeEndpoint::healthy(), FakeEndpoint::healthy());
    let url = proxy.url();
    let names = ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
    let env: Vec<(&str, &str)> = names.iter().map(|name| (*name, url.as_str())).collect();
    let mut app = TestApp::start_with(BrokerKind::Embedded, &env).await;
    let body = json!({"client_id": "r", "subscriptions": ["x"], "webhook": {"url": endpoint.url()}});
    app.onboard_with(body).await;
    let attempt = app.admin(Method::POST, "/clients/r/webhook/test").send().await.ok(200);
    assert_eq!(attempt["status"], 200, "{attempt}");
    let sender = app.onboard("sender", &[]).await;
    sender.call(Method::POST, "/send").json(&json!({"topic": "x", "message": 1})).send().await.ok(202);
    endpoint.wait_for(2).await;
    assert_eq!(proxy.connections(), 0);
    app.finish().await;
}

/// Posts to `url` with names resolved by `resolver` and nothing listed; what kind of failure that is.
async fn refusal(url: &str, allow: &str, resolver: Resolver) -> FailureKind {
    let allow = allow.split(',').filter(|net| !net.is_empty()).map(|net| net.parse().expect("a CIDR")).collect();
    let sender = Sender::new(allow, tls::connector(None).expect("no bundle")).with_resolver(resolver);
    let webhook: Webhook = serde_json::from_value(json!({"url": url, "timeout_s": 2})).expect("a webhook");
    let endpoint = Endpoint::new(&sender, &webhook).expect("a URL of the test");
    let post = Post { webhook_id: "1", timestamp_s: "1", signature: "v1,x", traceparent: None, body: b"{}" };
    endpoint.post(endpoint.slot().expect("a connection"), &post).await.expect_err("refused").kind
}

#[actix_rt::test]
async fn names_are_judged_by_what_they_resolve_to() {
    let endpoint = FakeEndpoint::healthy();
    let port = endpoint.port();
    for (name, addresses) in [
        // What clouds answer for their metadata services' names.
        ("metadata.google.internal", &["169.254.169.254"][..]),
        ("metadata", &["169.254.169.254"]),
        ("instance-data.ec2.internal", &["169.254.169.254", "fd00:ec2::254"]),
        ("metadata.azure.internal", &["168.63.129.16"]),
        ("kubernetes.default.svc", &["10.96.0.1"]),
        ("host.docker.internal", &["192.168.65.2"]),
        ("127.0.0.1.nip.example", &["127.0.0.1"]),
        ("mapped.example", &["::ffff:127.0.0.1"]),
        ("all-zero.example", &["0.0.0.0", "::"]),
        ("xn--bcher-kva.example", &["127.0.0.1"]),
        ("bücher.example", &["::1"]),
        ("trailing.example.", &["127.0.0.1"]),
        ("several.example", &["10.0.0.1", "127.0.0.1", "fe80::1", "::1"]),
    ] {
        let all: Vec<IpAddr> = addresses.iter().map(|address| address.parse().expect("an address")).collect();
        let resolver: Resolver = Arc::new(move |_, port| Ok(all.iter().map(|a| SocketAddr::new(*a, port)).collect()));
        let kind = refusal(&format!("https://{name}:{port}/"), "", resolver).await;
        assert_eq!(kind, FailureKind::Refused, "{name}");
    }
    assert_eq!(endpoint.connections(), 0);
}

/// An answer that is good when it is looked at and bad when it is used: the classic of DNS rebinding. There is no time
/// between the two here, because what is judged is what is dialled; so the fake endpoint, which is listed at one address
/// only, is never reached by the other.
#[actix_rt::test]
async fn an_answer_that_changes_with_every_question_gains_nothing() {
    let endpoint = FakeEndpoint::healthy();
    let port = endpoint.port();
    let asked = Arc::new(AtomicUsize::new(0));
    let sender = {
        let asked = Arc::clone(&asked);
        let resolver: Resolver = Arc::new(move |_, _| {
            // Listed, inside, listed, inside …
            let n = asked.fetch_add(1, Ordering::SeqCst);
            let address = if n.is_multiple_of(2) { [127, 9, 9, 9] } else { [127, 0, 0, 1] };
            Ok(vec![SocketAddr::from((address, port))])
        });
        let allow = vec!["127.9.9.9/32".parse().expect("a CIDR")];
        Sender::new(allow, tls::connector(None).expect("no bundle")).with_resolver(resolver)
    };
    let url = format!("http://rebinding.example:{port}/");
    let webhook: Webhook = serde_json::from_value(json!({"url": url, "timeout_s": 1})).expect("a webhook");
    let mut kinds = Vec::new();
    for _ in 0..6 {
        let endpoint = Endpoint::new(&sender, &webhook).expect("a URL of the test");
        let post = Post { webhook_id: "1", timestamp_s: "1", signature: "v1,x", traceparent: None, body: b"{}" };
        kinds.push(endpoint.post(endpoint.slot().expect("a connection"), &post).await.expect_err("no answer").kind);
    }
    assert_eq!(asked.load(Ordering::SeqCst), 6);
    // Nothing listens at the listed one; the other is not dialled.
    assert_eq!(kinds, [FailureKind::Connect, FailureKind::Refused].repeat(3));
    assert_eq!(endpoint.connections(), 0);
}

#[actix_rt::test]
async fn a_name_that_resolves_to_nothing_or_too_late_is_a_failure_in_time() {
    let nothing: Resolver = Arc::new(|_, _| Ok(vec![]));
    assert_eq!(refusal("https://empty.example/", "", nothing).await, FailureKind::Dns);
    let since = std::time::Instant::now();
    let (let_go, gate) = std::sync::mpsc::channel::<()>();
    let slow: Resolver = {
        let gate = Mutex::new(gate);
        Arc::new(move |_, port| {
            // Ends when the sender is dropped.
            let _ = gate.lock().recv();
            Ok(vec![SocketAddr::from(([127, 0, 0, 1], port))])
        })
    };
    assert_eq!(refusal("https://slow.example/", "", slow).await, FailureKind::Timeout);
    drop(let_go);
    assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
}
