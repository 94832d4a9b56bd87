//! What a webhook's sender does with every kind of endpoint: real sockets, real TLS, no broker.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backbone::client::Webhook;
use backbone::webhook::answer::{Answer, KEPT_BYTES};
use backbone::webhook::budget::Budget;
use backbone::webhook::dial::Resolver;
use backbone::webhook::failure::{Failure, FailureKind};
use backbone::webhook::{Endpoint, Post, Sender, tls};
use futures_util::future::join_all;
use serde_json::json;

use crate::support::endpoint::{Authority, FakeEndpoint, Reply};
use crate::support::eventually;
use crate::support::wait::SOON;

fn sender(allow: &[&str], authority: Option<&Authority>) -> Sender {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let bundle = authority.map(|authority| {
        let path = directory.path().join("ca.pem");
        std::fs::write(&path, authority.pem()).expect("writes");
        path
    });
    let connector = tls::connector(bundle.as_deref()).expect("a bundle of the test");
    Sender::new(allow.iter().map(|net| net.parse().expect("a CIDR")).collect(), connector)
}

fn local() -> Sender {
    sender(&["127.0.0.0/8"], None)
}

fn webhook(url: &str) -> Webhook {
    serde_json::from_value(json!({"url": url, "timeout_s": 1})).expect("defaults for the rest")
}

fn endpoint(sender: &Sender, url: &str) -> Endpoint {
    Endpoint::new(sender, &webhook(url)).expect("a URL of the test")
}

async fn post(endpoint: &Endpoint, body: &[u8]) -> Result<Answer, Failure> {
    let post = Post { webhook_id: "id-1", timestamp_s: "1", signature: "v1,x", traceparent: Some("00-a-b-01"), body };
    endpoint.post(endpoint.slot().expect("a connection is to be had"), &post).await
}

async fn post_once(reply: Reply) -> (Result<Answer, Failure>, FakeEndpoint) {
    let fake = FakeEndpoint::start(move |_, _| reply.clone());
    let result = post(&endpoint(&local(), &fake.url()), b"{}").await;
    (result, fake)
}

fn kind(result: &Result<Answer, Failure>) -> FailureKind {
    result.as_ref().expect_err("no answer").kind
}

#[actix_rt::test]
async fn the_request_carries_what_the_contract_says() {
    let fake = FakeEndpoint::healthy();
    let mut webhook = webhook(&fake.url());
    webhook.headers.insert("X-Tenant".into(), "soar 7".into());
    let endpoint = Endpoint::new(&local(), &webhook).expect("a URL of the test");
    let answer = post(&endpoint, b"{\"a\":1}").await.expect("answered");
    assert_eq!(answer.status, 200);
    let hit = &fake.hits()[0];
    assert_eq!(hit.request_line, "POST /hook?x=1 HTTP/1.1");
    assert_eq!(hit.body, b"{\"a\":1}");
    for (name, value) in [
        ("host", format!("127.0.0.1:{}", fake.port()).as_str()),
        ("content-type", "application/json"),
        ("content-length", "7"),
        ("webhook-id", "id-1"),
        ("webhook-timestamp", "1"),
        ("webhook-signature", "v1,x"),
        ("traceparent", "00-a-b-01"),
        ("x-tenant", "soar 7"),
    ] {
        assert_eq!(hit.headers.get(name).map(String::as_str), Some(value), "{name}");
    }
}

#[actix_rt::test]
async fn connections_are_kept_and_used_again() {
    let body = "x".repeat(2000);
    let fake = FakeEndpoint::start(move |_, _| Reply::Full {
        status: 200,
        headers: vec![("content-type", "text/plain".into())],
        body: body.clone().into(),
    });
    let endpoint = endpoint(&local(), &fake.url());
    for _ in 0..50 {
        assert_eq!(post(&endpoint, b"{}").await.expect("answered").body.len(), KEPT_BYTES);
    }
    assert_eq!((fake.count(), fake.connections()), (50, 1));
    join_all((0..20).map(|_| post(&endpoint, b"{}"))).await;
    assert!(fake.connections() <= 20, "{}", fake.connections());
    drop(endpoint);
    eventually("connections close with their endpoint", SOON, async || (fake.open_connections() == 0).then_some(()))
        .await;
}

#[actix_rt::test]
async fn a_chunked_answer_that_comes_bytewise_is_read_and_the_connection_kept() {
    let (fake, sender) = (FakeEndpoint::start(|_, _| Reply::Bytewise), local());
    let endpoint = endpoint(&sender, &fake.url());
    for _ in 0..3 {
        assert_eq!(post(&endpoint, b"{}").await.expect("answered").body, b"hello");
    }
    assert_eq!(fake.connections(), 1);
}

#[actix_rt::test]
async fn a_connection_that_was_closed_meanwhile_costs_no_attempt() {
    let (fake, sender) = (FakeEndpoint::start(|_, _| Reply::OkThenClose), local());
    let endpoint = endpoint(&sender, &fake.url());
    for _ in 0..20 {
        assert_eq!(post(&endpoint, b"{}").await.expect("answered").status, 200);
    }
    assert_eq!(fake.count(), 20);
}

#[actix_rt::test]
async fn an_endpoint_that_hangs_takes_no_longer_than_the_timeout() {
    for (reply, words) in [(Reply::HangBefore, "no answer within 1 s"), (Reply::HangInside, "did not end within 1 s")] {
        let since = Instant::now();
        let (result, fake) = post_once(reply).await;
        assert!(since.elapsed() < Duration::from_secs(5), "{:?}", since.elapsed());
        assert_eq!(kind(&result), FailureKind::Timeout);
        assert!(result.expect_err("timed out").words.contains(words));
        eventually("it is closed", SOON, async || (fake.open_connections() == 0).then_some(())).await;
    }
}

#[actix_rt::test]
async fn broken_connections_are_said_to_be_closed() {
    for reply in [Reply::Close, Reply::Reset] {
        let (result, fake) = post_once(reply).await;
        assert_eq!(kind(&result), FailureKind::Closed);
        assert!(result.expect_err("closed").words.contains("before an answer came"));
        // A fresh connection: nothing is sent twice.
        assert_eq!(fake.count(), 1);
    }
    let (result, _fake) = post_once(Reply::CutInside).await;
    assert!(result.expect_err("cut").words.contains("before the answer was complete"));
}

#[actix_rt::test]
async fn endless_answers_are_cut_off() {
    let (result, fake) = post_once(Reply::EndlessBody).await;
    let answer = result.expect("a 200 is a 200");
    assert_eq!((answer.status, answer.body.len()), (200, KEPT_BYTES));
    eventually("it is closed", SOON, async || (fake.open_connections() == 0).then_some(())).await;
    let (result, _fake) = post_once(Reply::EndlessHeaders).await;
    assert_eq!(kind(&result), FailureKind::Malformed);
}

#[actix_rt::test]
async fn what_is_no_http_is_said_to_be() {
    let (result, _fake) = post_once(Reply::Garbage).await;
    assert_eq!(kind(&result), FailureKind::Malformed);
    assert!(result.expect_err("no HTTP").words.contains("not a valid HTTP"));
}

#[actix_rt::test]
async fn redirects_are_not_followed() {
    for location in ["http://169.254.169.254/latest/meta-data", "http://127.0.0.1:1/"] {
        let headers = vec![("location", location.to_owned())];
        let (result, fake) = post_once(Reply::Full { status: 307, headers, body: vec![] }).await;
        assert_eq!(result.expect("answered").status, 307);
        assert_eq!(fake.count(), 1);
    }
}

#[actix_rt::test]
async fn nothing_listening_is_a_refused_connection() {
    let url = FakeEndpoint::healthy().url();
    let result = post(&endpoint(&local(), &url), b"{}").await;
    assert_eq!(kind(&result), FailureKind::Connect);
    assert!(result.expect_err("refused").words.contains("nothing listens"));
}

#[actix_rt::test]
async fn large_bodies_arrive_whole_and_an_early_answer_to_one_is_heard() {
    let body = vec![b'7'; 3 << 20];
    let fake = FakeEndpoint::healthy();
    assert_eq!(post(&endpoint(&local(), &fake.url()), &body).await.expect("answered").status, 200);
    assert!(fake.hits()[0].body == body);
    let fake = FakeEndpoint::hasty(413);
    let answer = post(&endpoint(&local(), &fake.url()), &body).await.expect("answered");
    assert_eq!((answer.status, answer.body), (413, b"too long".to_vec()));
}

#[actix_rt::test]
async fn certificates_are_verified_in_every_respect() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let resolver: Resolver = Arc::new(|_, port| Ok(vec![SocketAddr::from(([127, 0, 0, 1], port))]));
    let sender = sender(&["127.0.0.0/8"], Some(&authority)).with_resolver(resolver);
    let names = &["127.0.0.1", "hooks.example"];
    for (leaf, host, words) in [
        (authority.leaf(names), "127.0.0.1", None),
        (authority.leaf(names), "hooks.example", None),
        (authority.leaf(names), "hooks.example.", None),
        (stranger.leaf(names), "127.0.0.1", Some("not signed by a known authority")),
        (authority.expired_leaf(names), "127.0.0.1", Some("has expired")),
        (authority.leaf(&["other.example"]), "hooks.example", Some("is for another name")),
    ] {
        let fake = FakeEndpoint::start_tls(&leaf, |_, _| Reply::Status(200));
        let endpoint = endpoint(&sender, &fake.url_at(host));
        let result = post(&endpoint, b"{}").await;
        match words {
            None => {
                assert_eq!(result.expect("trusted").status, 200);
                assert_eq!(post(&endpoint, b"{}").await.expect("trusted").status, 200);
                assert_eq!(fake.connections(), 1, "kept alive");
            }
            Some(words) => {
                assert_eq!(kind(&result), FailureKind::Tls);
                let failure = result.expect_err("not trusted");
                assert!(failure.words.contains(words), "{failure}");
                assert_eq!(fake.count(), 0, "nothing is sent to it");
            }
        }
    }
}

#[actix_rt::test]
async fn https_to_a_port_without_tls_says_so() {
    let fake = FakeEndpoint::start(|_, _| Reply::Garbage);
    let url = fake.url().replace("http://", "https://");
    let result = post(&endpoint(&local(), &url), b"{}").await;
    // The port waits for a request line and says nothing: either it times out, or it says something that is not TLS.
    assert!(matches!(kind(&result), FailureKind::Tls | FailureKind::Timeout), "{result:?}");
}

#[actix_rt::test]
async fn addresses_that_are_not_public_are_not_dialled() {
    let fake = FakeEndpoint::healthy();
    let none = sender(&[], None);
    let port = fake.port();
    for host in [
        "127.0.0.1",
        "localhost",
        "localhost.",
        "127.1",
        "0x7f.1",
        "2130706433",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
    ] {
        for scheme in ["https", "http"] {
            let result = post(&endpoint(&none, &format!("{scheme}://{host}:{port}/")), b"{}").await;
            // Not every system knows `localhost.`.
            let is_refused = kind(&result) == FailureKind::Refused;
            assert!(is_refused || (host == "localhost." && kind(&result) == FailureKind::Dns), "{scheme} {host}");
            let words = result.expect_err("refused").words;
            assert!(!words.contains("127."), "says nothing of the inside: {words}");
        }
    }
    assert_eq!(fake.connections(), 0);
}

#[actix_rt::test]
async fn names_that_do_not_resolve_are_named() {
    let resolver: Resolver = Arc::new(|_, _| Err(std::io::Error::other("NXDOMAIN")));
    let result = post(&endpoint(&local().with_resolver(resolver), "https://hooks.example/"), b"{}").await;
    assert_eq!(kind(&result), FailureKind::Dns);
    assert!(result.expect_err("unknown").words.contains("hooks.example cannot be resolved"));
}

#[actix_rt::test]
async fn a_name_that_moves_to_the_inside_is_refused_there() {
    let fake = FakeEndpoint::start(|_, _| Reply::OkThenClose);
    let port = fake.port();
    let turn = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let resolver: Resolver = Arc::new(move |_, _| {
        let first = turn.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 0;
        let host = if first { [127, 0, 0, 1] } else { [10, 0, 0, 1] };
        Ok(vec![SocketAddr::from((host, port))])
    });
    let sender = sender(&["127.0.0.1/32"], None).with_resolver(resolver);
    let url = fake.url_at("hooks.example");
    assert_eq!(post(&endpoint(&sender, &url), b"{}").await.expect("listed").status, 200);
    // Another endpoint of the same name looks it up again.
    assert_eq!(kind(&post(&endpoint(&sender, &url), b"{}").await), FailureKind::Refused);
}

#[actix_rt::test]
async fn connections_are_bounded_over_all_endpoints() {
    let (hanging, healthy) = (FakeEndpoint::start(|_, _| Reply::HangBefore), FakeEndpoint::healthy());
    let budget = Budget::new(16);
    let sender = local().with_budget(Arc::clone(&budget));
    let greedy = endpoint(&sender, &hanging.url());
    let slots: Vec<_> = (0..100).map_while(|_| greedy.slot()).collect();
    assert_eq!(slots.len(), 8);
    // Whoever has none gets one all the same.
    assert_eq!(post(&endpoint(&sender, &healthy.url()), b"{}").await.expect("answered").status, 200);
    drop(slots);
    assert_eq!(budget.open(), 0);
}
