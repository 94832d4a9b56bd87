//! The API on its own broker and registry, over real connections: what only a connection can show.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use actix_web::dev::ServerHandle;
use actix_web::http::StatusCode;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::{State, start};
use crate::actors::registry::{ClientRegistry, RegistryParts};
use crate::broker::embedded;
use crate::config::Config;
use crate::db::Db;
use crate::directory::Directory;
use crate::secret::{Secret, SecretHash};
use crate::store::Store;
use crate::token::{TokenSecret, Tokens};

/// How long anything may take on a busy machine.
const SOON: Duration = Duration::from_secs(20);

struct Running {
    address: SocketAddr,
    metrics: SocketAddr,
    admin: String,
    shutdown: watch::Sender<bool>,
    handles: Vec<ServerHandle>,
    db: Db,
    _directory: tempfile::TempDir,
}

fn listener() -> (std::net::TcpListener, SocketAddr) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.set_nonblocking(true).expect("non-blocking");
    let address = listener.local_addr().expect("an address");
    (listener, address)
}

async fn run() -> Running {
    let directory = tempfile::tempdir().expect("a directory");
    let db = Db::open(&directory.path().join("backbone.db")).expect("a database");
    let telemetry = crate::telemetry::new(10);
    let config = Arc::new(Config { max_message_bytes: 10_000, ..Config::default() });
    let options = embedded::Options { dedup_window: config.dedup_window };
    let broker = embedded::open(db.clone(), options, telemetry.clone()).await.expect("a broker");
    let secret = TokenSecret::generate();
    let store = Store::open(db.clone(), &secret).await.expect("a store");
    let loaded = store.load().await.expect("an empty store");
    let clients = Arc::new(Directory::default());
    let parts = RegistryParts {
        broker: Arc::clone(&broker),
        store,
        directory: Arc::clone(&clients),
        telemetry: telemetry.clone(),
        max_message_bytes: config.max_message_bytes,
        retention: config.attempt_retention,
        pusher: None,
        attempts: None,
    };
    let registry = ClientRegistry::start(parts, loaded).expect("a registry");
    let connector = crate::webhook::tls::connector(None).expect("no bundle");
    let sender = crate::webhook::Sender::new(config.webhook_allow.clone(), connector);
    let webhooks = crate::webhook::Means::open(db.clone(), sender, config.attempt_retention, telemetry.clone());
    let webhooks = webhooks.await.expect("webhooks' tables");
    let admin = Secret::generate().reveal().to_owned();
    let (shutdown, closing) = watch::channel(false);
    let state = State {
        broker,
        registry,
        directory: clients,
        telemetry,
        tokens: Arc::new(Tokens::new(secret, config.token_lifetime)),
        config,
        admin: SecretHash::of(&admin),
        shutdown: closing,
        webhooks,
    };
    let ((api, address), (metrics_listener, metrics)) = (listener(), listener());
    let servers = start(state, api, Some(metrics_listener), None).expect("servers");
    let handles = servers.iter().map(actix_web::dev::Server::handle).collect();
    servers.into_iter().for_each(|server| drop(actix_rt::spawn(server)));
    Running { address, metrics, admin, shutdown, handles, db, _directory: directory }
}

struct Reply {
    status: StatusCode,
    head: String,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }
}

/// Reads one answer; its body by `content-length`, unless it answers a HEAD.
async fn reply(stream: &mut TcpStream, head_only: bool) -> io::Result<Reply> {
    let read = async {
        let mut bytes = Vec::new();
        let end = loop {
            if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                break at;
            }
            if stream.read_buf(&mut bytes).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        };
        let head = String::from_utf8(bytes[..end].to_vec()).expect("a head is ASCII");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        let mut reply = Reply { status, head, body: String::new() };
        let length: usize = reply.header("content-length").map_or(0, |length| length.parse().expect("a length"));
        let mut body = bytes.split_off(end + 4);
        while !head_only && body.len() < length {
            if stream.read_buf(&mut body).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        reply.body = String::from_utf8(body).expect("a body is UTF-8");
        Ok(reply)
    };
    tokio::time::timeout(SOON, read).await.expect("it answers in time")
}

impl Running {
    async fn open(&self, request: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.expect("it accepts");
        stream.write_all(request.as_bytes()).await.expect("it reads");
        stream
    }

    async fn call(&self, request: &str) -> Reply {
        let mut stream = self.open(request).await;
        reply(&mut stream, request.starts_with("HEAD")).await.expect("it answers")
    }

    async fn admin(&self, method_and_path: &str, body: &Value) -> Reply {
        let body = body.to_string();
        let auth = format!("authorization: Bearer {}\r\n", self.admin);
        self.call(&request(method_and_path, &auth, &body)).await
    }

    /// Onboards a client that hears of `x`; returns its credentials as a query.
    async fn onboard(&self, id: &str) -> String {
        let made = self.admin("POST /clients", &json!({"client_id": id, "subscriptions": ["x"]})).await;
        assert_eq!(made.status, 201, "{}", made.body);
        assert_eq!(made.header("location"), Some(format!("/clients/{id}").as_str()));
        format!("client_id={id}&secret={}", made.json()["secret"].as_str().expect("a secret"))
    }

    async fn send(&self, who: &str, message: &Value) -> Reply {
        self.call(&request(&format!("POST /send?{who}"), "", &json!({"topic": "x", "message": message}).to_string()))
            .await
    }

    async fn stop(self) {
        for handle in &self.handles {
            handle.stop(false).await;
        }
        self.db.close();
    }
}

fn request(method_and_path: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "{method_and_path} HTTP/1.1\r\nhost: x\r\n{headers}content-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
}

#[actix_rt::test]
async fn what_is_sent_is_received() {
    let running = run().await;
    let who = running.onboard("a").await;
    let sent = running.send(&who, &json!({"n": 1})).await;
    assert_eq!(sent.status, 202, "{}", sent.body);
    assert_eq!((&sent.json()["accepted"], &sent.json()["duplicates"]), (&json!(1), &json!(0)));
    let received = running.call(&request(&format!("GET /receive?wait=20&{who}"), "", "")).await.json();
    let envelope = &received["messages"][0];
    assert_eq!(envelope["message"], json!({"n": 1}));
    assert_eq!((&envelope["id"], &envelope["deliveries"]), (&sent.json()["ids"][0], &json!(1)));
    let record = running.admin("GET /clients/a", &json!({})).await.json();
    assert_eq!(record["queues"]["inbox"], 0, "{record}");
    assert!(record["actors"]["forwarder"].is_string(), "{record}");
    running.stop().await;
}

#[actix_rt::test]
async fn a_long_poll_whose_peer_has_closed_takes_nothing() {
    let running = run().await;
    let who = running.onboard("a").await;
    let poll = request(&format!("GET /receive?wait=30&{who}"), "", "");
    for _ in 0..50 {
        let mut gone = running.open(&poll).await;
        // Half closed is enough; the other half waits for the server to notice, and so does this test.
        gone.shutdown().await.expect("closes");
        let mut rest = Vec::new();
        let read = tokio::time::timeout(SOON, gone.read_to_end(&mut rest)).await.expect("it notices in time");
        assert_eq!((read.ok(), rest.len()), (Some(0), 0), "nobody is answered");
    }
    assert_eq!(running.send(&who, &json!(1)).await.status, 202);
    let received = running.call(&poll).await.json();
    assert_eq!(received["messages"][0]["message"], 1, "{received}");
    running.stop().await;
}

#[actix_rt::test]
async fn a_long_poll_ends_when_the_backbone_shuts_down() {
    let running = run().await;
    let who = running.onboard("a").await;
    let mut poll = running.open(&request(&format!("GET /receive?wait=30&{who}"), "", "")).await;
    // The same connection's worker answers this only after it has begun the poll; the other one's may be earlier, and
    // then the poll is refused instead.
    running.call(&request("GET /livez", "", "")).await;
    running.shutdown.send_replace(true);
    let ended = reply(&mut poll, false).await.expect("it answers");
    if ended.status == 503 {
        assert_eq!(ended.json()["code"], "shutting_down");
    } else {
        assert_eq!((ended.status.as_u16(), ended.json()), (200, json!({"messages": []})));
    }
    let refused = running.send(&who, &json!(1)).await;
    assert_eq!((refused.status.as_u16(), &refused.json()["code"]), (503, &json!("shutting_down")));
    assert!(refused.header("retry-after").is_some());
    let unready = running.call(&request("GET /readyz", "", "")).await;
    assert_eq!(unready.status, 503);
    running.stop().await;
}

#[actix_rt::test]
async fn a_request_that_is_too_long_is_refused_before_it_is_sent() {
    let running = run().await;
    let who = running.onboard("a").await;
    let head = format!("POST /send?{who} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n");
    let declared = running.call(&format!("{head}content-length: 160001\r\n\r\n")).await;
    assert_eq!((declared.status.as_u16(), &declared.json()["code"]), (413, &json!("too_large")));

    let mut endless = running.open(&format!("{head}transfer-encoding: chunked\r\n\r\n")).await;
    let chunk = format!("1000\r\n{}\r\n", "[".repeat(0x1000));
    let mut sent = 0;
    let refused = loop {
        // Whatever it does, it reads no more than a few times the limit.
        assert!(sent < 100 * chunk.len() * 10, "it reads for ever");
        if endless.write_all(chunk.as_bytes()).await.is_err() {
            break reply(&mut endless, false).await;
        }
        sent += chunk.len();
        if let Ok(answer) = tokio::time::timeout(Duration::from_millis(1), endless.readable()).await {
            answer.expect("it is open");
            break reply(&mut endless, false).await;
        }
    };
    assert_eq!(refused.expect("it answers").status, 413);
    running.stop().await;
}

#[actix_rt::test]
async fn methods_are_those_of_the_table() {
    let running = run().await;
    let who = running.onboard("a").await;
    let put = running.call(&request("PUT /clients/a", "", "")).await;
    assert_eq!((put.status.as_u16(), &put.json()["code"]), (405, &json!("method_not_allowed")));
    assert_eq!(put.header("allow"), Some("GET, HEAD, PATCH, DELETE, OPTIONS"));
    let options = running.call(&request("OPTIONS /send", "", "")).await;
    assert_eq!((options.status.as_u16(), options.header("allow")), (204, Some("POST, OPTIONS")));
    let head = running.call(&request("HEAD /livez", "", "")).await;
    assert_eq!((head.status.as_u16(), head.body.as_str()), (200, ""));
    // It would take messages and show none of them.
    let head = running.call(&request(&format!("HEAD /receive?{who}"), "", "")).await;
    assert_eq!(head.status, 405);
    let absent = running.call(&request("GET /nothing", "x-request-id: mine\r\n", "")).await;
    assert_eq!((absent.status.as_u16(), &absent.json()["request_id"]), (404, &json!("mine")));
    assert_eq!(absent.header("x-request-id"), Some("mine"));
    running.stop().await;
}

#[actix_rt::test]
async fn metrics_are_open_on_their_own_listener_only() {
    let running = run().await;
    assert_eq!(running.call(&request("GET /metrics", "", "")).await.status, 401);
    let mut stream = TcpStream::connect(running.metrics).await.expect("it accepts");
    stream.write_all(request("GET /metrics", "", "").as_bytes()).await.expect("it reads");
    let metrics = reply(&mut stream, false).await.expect("it answers");
    assert_eq!(metrics.status, 200);
    assert!(metrics.body.contains(r#"backbone_requests_total{route="/metrics",status="401"} 1"#), "{}", metrics.body);
    stream.write_all(request("GET /clients", "", "").as_bytes()).await.expect("it reads");
    assert_eq!(reply(&mut stream, false).await.expect("it answers").status, 404);
    running.stop().await;
}
