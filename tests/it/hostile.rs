//! Input that means harm: the named answer, the process alive, memory bounded, and nobody else any the worse for it.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::http::{Client, messages};
use crate::support::memory::resident_bytes;
use crate::support::wait::{SOON, pace, soon};
use crate::support::{TestApp, eventually};

/// Memory that hostile input may cost, at most. Above what requests may hold at once; far below what they try.
const MEMORY_MAX: usize = 160 << 20;

/// A body of `bytes` bytes that never exists as a whole.
fn endless(bytes: usize) -> reqwest::Body {
    let chunk = bytes::Bytes::from(vec![b' '; 64 << 10]);
    let chunks = bytes / chunk.len();
    reqwest::Body::wrap_stream(futures_util::stream::iter(
        (0..chunks).map(move |_| Ok::<_, std::io::Error>(chunk.clone())),
    ))
}

/// Others are served as if nothing were the matter.
async fn others_are_served(sender: &Client, receiver: &Client) {
    let since = Instant::now();
    let id = sender.send("quiet", json!("please")).await;
    let came = receiver.receive_exactly(1, "").await;
    assert_eq!(came[0]["id"], json!(id));
    assert!(since.elapsed() < Duration::from_secs(10), "took {:?}", since.elapsed());
}

/// How many files, sockets included, a process has open.
fn open_files(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).expect("the process is there").count()
}

broker_tests! {
    async fn huge_ids_topics_and_credentials_are_refused(app: &mut TestApp) {
        let client = app.onboard("client", &["#"]).await;
        let huge = "x".repeat(300_000);
        client.post("/send").json(&json!({"topic": huge, "message": 1})).send().await.names(&["/topic"]);
        client.post("/send").json(&json!({"topic": "x", "message": 1, "id": huge})).send().await.names(&["/id"]);
        let body = json!({"client_id": huge, "name": huge, "subscriptions": [huge]});
        let answer = app.admin(Method::POST, "/clients").json(&body).send().await;
        let problem = answer.problem(422, "invalid").to_string();
        assert!(problem.len() < 10_000, "an answer does not repeat what was sent: {} bytes", problem.len());
        let ids = json!({"receipts": [huge]});
        assert_eq!(client.post("/ack").json(&ids).send().await.ok(200)["settled"], 0);
        for header in ["authorization", "x-request-id", "content-type", "traceparent"] {
            let answer = app.api.post("/send").header(header, &"x".repeat(20_000)).try_send().await;
            assert!(answer.is_err() || answer.is_ok_and(|answer| (400..500).contains(&answer.status)), "{header}");
        }
        let path = format!("/clients/{}", "x".repeat(100_000));
        let answer = app.admin(Method::GET, &path).try_send().await;
        assert!(answer.is_err() || answer.is_ok_and(|answer| (400..500).contains(&answer.status)));
        others_are_served(&client, &client).await;
    }

    async fn deep_json_is_data_like_any_other(app: &mut TestApp) {
        let client = app.onboard("client", &["#"]).await;
        let deep = format!("{}1{}", "[".repeat(200_000), "]".repeat(200_000));
        let body = format!("{{\"topic\":\"x\",\"message\":{deep}}}");
        let answer = client.post("/send").body("application/json", body).send().await;
        match answer.status {
            202 => {
                let raw = client.get("/receive?wait=30").send().await;
                assert!(raw.body.windows(deep.len()).any(|window| window == deep.as_bytes()), "byte for byte");
            }
            400 => drop(answer.problem(400, "invalid_json")),
            _ => drop(answer.problem(422, "invalid")),
        }
        for (method, path) in [(Method::POST, "/clients"), (Method::PATCH, "/clients/client")] {
            let answer = app.admin(method, path).body("application/json", deep.clone()).send().await;
            assert!(matches!(answer.status, 400 | 422), "{answer:?}");
        }
        let answer = client.post("/ack").body("application/json", format!("{{\"receipts\":{deep}}}")).send().await;
        assert!(matches!(answer.status, 400 | 422), "{answer:?}");
        others_are_served(&client, &client).await;
    }

    async fn bodies_of_100_mb_cost_bounded_memory(app: &mut TestApp) {
        let client = app.onboard("client", &["#"]).await;
        let before = resident_bytes(app.router.pid());
        let hostile = (0..16).map(|n| {
            let (client, bytes) = (client.clone(), 100 << 20);
            async move {
                let path = ["/send", "/notify", "/ack", "/clients/client/dead-letters/replay"][n % 4];
                let content_type = if n % 3 == 0 && n % 4 < 2 { "application/x-ndjson" } else { "application/json" };
                // Without a length: it is known to be too long only when it has been.
                client.post(path).body(content_type, endless(bytes)).try_send().await
            }
        });
        let mut peak = before;
        let attack = futures_util::future::join_all(hostile);
        futures_util::pin_mut!(attack);
        // Memory tells nobody when it grows: looked at again and again while the bodies come.
        let mut looks = pace(Duration::from_millis(5));
        let answers = loop {
            tokio::select! {
                answers = &mut attack => break answers,
                _ = looks.tick() => peak = peak.max(resident_bytes(app.router.pid())),
            }
        };
        // An answer may be lost when the router closes before all was sent; one that comes says why.
        for answer in answers.into_iter().flatten() {
            match answer.status {
                429 => drop(answer.problem(429, "rate_limited")),
                _ => drop(answer.problem(413, "too_large")),
            }
        }
        let grown = peak - before;
        assert!(grown < MEMORY_MAX, "16 bodies of 100 MB took {} MiB", grown >> 20);
        others_are_served(&client, &client).await;
    }

    async fn a_length_that_is_too_long_is_refused_before_the_body(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        let mut stream = TcpStream::connect(app.router.address()).await.expect("connects");
        let head = format!(
            "POST /send HTTP/1.1\r\nhost: x\r\nauthorization: Basic {}\r\ncontent-type: application/json\r\ncontent-length: 104857600\r\n\r\n",
            base64(&format!("client:{}", client.secret))
        );
        stream.write_all(head.as_bytes()).await.expect("writes");
        let mut answer = vec![0; 12];
        soon("an answer to the head alone", stream.read_exact(&mut answer)).await.expect("reads");
        assert_eq!(answer, b"HTTP/1.1 413");
    }

    async fn a_batch_of_junk_gets_a_bounded_answer(app: &mut TestApp) {
        let client = app.onboard("client", &["#"]).await;
        let before = resident_bytes(app.router.pid());
        for count in [50_000, 2_000_000] {
            let array = format!("[{}0]", "{},".repeat(count));
            let lines = "[]\n".repeat(count);
            for (content_type, body) in [("application/json", array), ("application/x-ndjson", lines)] {
                let answer = client.post("/send").body(content_type, body).send().await;
                // The number of messages in a request is bounded as well.
                match answer.status {
                    413 => drop(answer.problem(413, "too_large")),
                    _ => drop(answer.problem(422, "invalid")),
                }
                assert!(answer.body.len() < 4 << 20, "an answer of {} bytes", answer.body.len());
            }
        }
        let grown = resident_bytes(app.router.pid()).saturating_sub(before);
        assert!(grown < MEMORY_MAX, "took {} MiB", grown >> 20);
        others_are_served(&client, &client).await;
    }

    async fn slow_heads_and_slow_bodies_hold_nobody_up(app: &mut TestApp) {
        let client = app.onboard("client", &["#"]).await;
        let files = open_files(app.router.pid());
        let basic = base64(&format!("client:{}", client.secret));
        let mut connections = Vec::new();
        for n in 0..400 {
            let mut stream = TcpStream::connect(app.router.address()).await.expect("connects");
            let start = match n % 3 {
                0 => "POST /se".to_owned(),
                1 => "POST /send HTTP/1.1\r\nhost: x\r\nx-slow: ".to_owned(),
                _ => format!(
                    "POST /send HTTP/1.1\r\nhost: x\r\nauthorization: Basic {basic}\r\ncontent-type: application/json\r\ncontent-length: 1000000\r\n\r\n{{"
                ),
            };
            stream.write_all(start.as_bytes()).await.expect("writes");
            connections.push(stream);
        }
        for _ in 0..3 {
            for stream in &mut connections {
                // Some may have been closed by now, which is as well.
                let _ = stream.write_all(b" ").await;
            }
            others_are_served(&client, &client).await;
        }
        // A head that does not come is not waited for for ever.
        eventually("unfinished heads are given up", SOON, async || {
            (open_files(app.router.pid()) < files + 300).then_some(())
        })
        .await;
        drop(connections);
        eventually("nothing of them is left", SOON, async || {
            (open_files(app.router.pid()) < files + 50).then_some(())
        })
        .await;
    }

    async fn long_polls_by_the_thousand_cost_little_and_leave_nothing(app: &mut TestApp) {
        let polled = app.onboard("polled", &["polled"]).await;
        let client = app.onboard("client", &["quiet"]).await;
        let (before, files) = (resident_bytes(app.router.pid()), open_files(app.router.pid()));
        let basic = base64(&format!("polled:{}", polled.secret));
        let mut connections = Vec::new();
        for _ in 0..1500 {
            let mut stream = TcpStream::connect(app.router.address()).await.expect("connects");
            let head = format!("GET /receive?wait=30 HTTP/1.1\r\nhost: x\r\nauthorization: Basic {basic}\r\n\r\n");
            stream.write_all(head.as_bytes()).await.expect("writes");
            connections.push(stream);
        }
        others_are_served(&client, &client).await;
        let grown = resident_bytes(app.router.pid()).saturating_sub(before);
        assert!(grown < MEMORY_MAX, "1,500 long polls took {} MiB", grown >> 20);
        drop(connections);
        eventually("the router knows that they are gone", SOON, async || {
            (open_files(app.router.pid()) < files + 100).then_some(())
        })
        .await;
        // Nobody who is gone takes a batch.
        let batch: Vec<_> = (0..50).map(|n| json!({"topic": "polled", "message": n})).collect();
        client.send_all(batch.into()).await;
        let came = messages(&polled.receive_exactly(50, "").await);
        assert_eq!(came, (0..50).map(Value::from).collect::<Vec<_>>());
    }

    async fn peers_that_ask_and_never_read_cost_bounded_memory(app: &mut TestApp) {
        let glutton = app.onboard("glutton", &["big"]).await;
        let client = app.onboard("client", &["quiet"]).await;
        let big: Vec<_> = (0..10).map(|_| json!({"topic": "big", "message": "x".repeat(1_000_000)})).collect();
        for _ in 0..6 {
            client.send_all(big.clone().into()).await;
        }
        glutton.wait_for_depth("inbox", 60).await;
        let before = resident_bytes(app.router.pid());
        let basic = base64(&format!("glutton:{}", glutton.secret));
        let mut connections = Vec::new();
        for _ in 0..50 {
            let mut stream = TcpStream::connect(app.router.address()).await.expect("connects");
            let head = format!("GET /receive?max=1000&ack=manual&lease=1 HTTP/1.1\r\nhost: x\r\nauthorization: Basic {basic}\r\n\r\n");
            stream.write_all(head.as_bytes()).await.expect("writes");
            connections.push(stream);
        }
        let mut peak = before;
        for _ in 0..20 {
            others_are_served(&client, &client).await;
            peak = peak.max(resident_bytes(app.router.pid()));
        }
        let grown = peak - before;
        assert!(grown < MEMORY_MAX, "50 answers that nobody reads took {} MiB", grown >> 20);
        drop(connections);
        let mut seen = 0;
        eventually("nothing of it is lost", SOON, async || {
            seen += glutton.receive("max=1000&wait=2").await.len();
            (seen >= 60).then_some(())
        })
        .await;
    }

    async fn what_is_not_http_is_answered_or_closed(app: &mut TestApp) {
        let client = app.onboard("client", &["#"]).await;
        for junk in [&b"\0\0\0\0\0\0\0\0\r\n\r\n"[..], b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"AMQP\x00\x00\x09\x01\r\n\r\n", b"GET / HTTP/1.1\r\ncontent-length: -1\r\n\r\n", b"POST /send HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n"] {
            let mut stream = TcpStream::connect(app.router.address()).await.expect("connects");
            stream.write_all(junk).await.expect("writes");
            stream.shutdown().await.expect("closes its side");
            let mut answer = Vec::new();
            let _ = soon("an answer, or the end", stream.read_to_end(&mut answer)).await;
            let text = String::from_utf8_lossy(&answer);
            assert!(text.is_empty() || text.starts_with("HTTP/1.1 4") || text.starts_with("HTTP/1.0 4"), "{text}");
        }
        others_are_served(&client, &client).await;
    }
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}
