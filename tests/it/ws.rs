//! `GET /ws`: the frames of docs/websocket.md, and what happens when a peer goes.

use backbone::websocket::ConnectError;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::support::TestApp;
use crate::support::fixture::BrokerKind;
use crate::support::http::{messages, receipts};
use crate::support::socket::Socket;
use crate::support::wait::{SOON, eventually};

/// The pointers that a refusal names.
fn pointers(frame: &Value) -> Vec<&str> {
    let errors = frame["problem"]["errors"].as_array().unwrap_or_else(|| panic!("{frame}"));
    errors.iter().map(|error| error["pointer"].as_str().expect("a pointer")).collect()
}

/// What a handshake is answered with.
async fn refusal(request: reqwest::RequestBuilder) -> (u16, String) {
    match Socket::over(request).await {
        Err(ConnectError::Refused(answer)) => {
            let status = answer.status().as_u16();
            let problem: Value = answer.json().await.expect("a problem");
            (status, problem["code"].as_str().expect("a code").to_owned())
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was let in"),
    }
}

broker_tests! {
    async fn sends_are_answered_by_their_reference_and_routed(app: &mut TestApp) {
        let a = app.onboard("a", &[]).await;
        let b = app.onboard("b", &["x.#"]).await;
        let mut socket = Socket::open(&a).await;
        let one = socket.ask(json!({"type": "send", "ref": "r-1", "topic": "x.y", "message": {"n": 1}})).await;
        assert_eq!(one["type"], "accepted");
        assert_eq!((&one["ref"], &one["accepted"], &one["duplicates"]), (&json!("r-1"), &json!(1), &json!(0)));
        assert_eq!(one["ids"].as_array().map(Vec::len), Some(1));
        let several = json!([{"topic": "x.y", "message": 2, "id": "own"}, {"topic": "x.z", "message": 3}]);
        let two = socket.ask(json!({"type": "send", "ref": {"any": [1.5]}, "messages": several})).await;
        assert_eq!((&two["ref"], &two["accepted"], &two["ids"][0]), (&json!({"any": [1.5]}), &json!(2), &json!("own")));
        let again = socket.ask(json!({"type": "send", "topic": "x.y", "message": 2, "id": "own"})).await;
        assert_eq!((&again["ref"], &again["accepted"], &again["duplicates"]), (&Value::Null, &json!(1), &json!(1)));
        let noted = socket.ask(json!({"type": "notify", "message": "all"})).await;
        assert_eq!(noted["type"], "accepted");
        let received = b.receive_exactly(4, "").await;
        let mut bodies = messages(&received);
        // A broadcast takes another way; topics keep their order.
        bodies.retain(|body| body != "all");
        assert_eq!(bodies, [json!({"n": 1}), json!(2), json!(3)]);
        assert_eq!(a.receive_exactly(1, "").await[0]["broadcast"], true);
        socket.close().await;
    }

    async fn a_message_passes_byte_for_byte(app: &mut TestApp) {
        let a = app.onboard("a", &["x"]).await;
        let mut socket = Socket::open(&a).await;
        socket.credit(1).await;
        socket.send_text(r#"{"type":"send","message":{"b":1.0e0,  "a":[1,2 ,"\u00e9"]},"topic":"x"}"#).await;
        let (one, other) = (socket.next_text().await, socket.next_text().await);
        let message = if one.contains(r#""type":"message""#) { one } else { other };
        assert!(message.contains(r#""message":{"b":1.0e0,  "a":[1,2 ,"\u00e9"]},"receipt":""#), "{message}");
    }

    async fn nothing_comes_before_the_first_credit_and_never_more_than_it(app: &mut TestApp) {
        let a = app.onboard("a", &["x"]).await;
        let mut socket = Socket::open(&a).await;
        let batch: Vec<Value> = (0..10).map(|n| json!({"topic": "x", "message": n})).collect();
        a.send_all(json!(batch)).await;
        a.wait_for_depth("inbox", 10).await;
        socket.is_silent().await;
        socket.credit(3).await;
        let first = socket.messages(3).await;
        assert_eq!(messages(&first), [json!(0), json!(1), json!(2)]);
        assert!(first.iter().all(|message| message["deliveries"] == 1), "{first:?}");
        socket.is_silent().await;
        // Credit is absolute: 5 is two more, 2 is none until there are fewer.
        socket.credit(5).await;
        let more = socket.messages(2).await;
        socket.credit(2).await;
        socket.settle("ack", &receipts(&first)).await;
        socket.is_silent().await;
        socket.settle("ack", &receipts(&more[..1])).await;
        assert_eq!(messages(&socket.messages(1).await), [json!(5)]);
        socket.is_silent().await;
    }

    async fn what_is_acknowledged_is_gone_and_what_is_not_comes_back_at_the_close(app: &mut TestApp) {
        let a = app.onboard("a", &["x"]).await;
        let batch: Vec<Value> = (0..5).map(|n| json!({"topic": "x", "message": n})).collect();
        a.send_all(json!(batch)).await;
        let mut socket = Socket::open(&a).await;
        socket.credit(100).await;
        let all = socket.messages(5).await;
        let settled = socket.settle("ack", &receipts(&all[..2])).await;
        assert_eq!((&settled["settled"], &settled["unknown"]), (&json!(2), &json!([])));
        a.wait_for_depth("inbox", 3).await;
        drop(socket);
        let back = a.receive_exactly(3, "").await;
        assert_eq!(messages(&back), [json!(2), json!(3), json!(4)]);
        assert!(back.iter().all(|message| message["deliveries"] == 2), "{back:?}");
    }

    async fn a_nack_gives_back_at_once_or_later_or_for_good(app: &mut TestApp) {
        let a = app.onboard("a", &["x"]).await;
        let mut socket = Socket::open(&a).await;
        socket.credit(10).await;
        let id = a.send("x", json!("m")).await;
        let first = socket.messages(1).await.remove(0);
        assert_eq!(first["id"], id);
        socket.send(json!({"type": "nack", "receipts": [first["receipt"]]})).await;
        let frames = [socket.next().await, socket.next().await];
        let again = frames.iter().find(|frame| frame["type"] == "message").expect("it is back").clone();
        assert_eq!((&again["id"], &again["deliveries"]), (&json!(id), &json!(2)));
        socket.send(json!({"type": "nack", "receipts": [again["receipt"]], "delay_s": 1})).await;
        socket.expect("settled").await;
        socket.is_silent().await;
        let later = socket.messages(1).await.remove(0);
        assert_eq!(later["id"], id);
        socket.send(json!({"type": "nack", "receipts": [later["receipt"]], "dead": true})).await;
        socket.expect("settled").await;
        let dead = a.dead_letters(1).await;
        assert_eq!((&dead[0]["reason"], &dead[0]["envelope"]["id"]), (&json!("rejected"), &json!(id)));
        assert_eq!((&later["deliveries"], &dead[0]["attempts"]), (&json!(3), &json!(3)));
    }

    async fn only_this_connections_receipts_settle_and_only_once(app: &mut TestApp) {
        let a = app.onboard("a", &["x"]).await;
        a.send_all(json!([{"topic": "x", "message": 1}, {"topic": "x", "message": 2}])).await;
        let mut socket = Socket::open(&a).await;
        let mut other = Socket::open(&a).await;
        socket.credit(2).await;
        let receipts = receipts(&socket.messages(2).await);
        let settled = other.settle("ack", &receipts).await;
        assert_eq!((&settled["settled"], &settled["unknown"]), (&json!(0), &json!(receipts)));
        let settled = socket.settle("ack", &[receipts[0].clone(), receipts[0].clone(), "nonsense".into()]).await;
        assert_eq!((&settled["settled"], &settled["unknown"]), (&json!(1), &json!(["nonsense"])));
        let settled = socket.settle("ack", &receipts).await;
        assert_eq!((&settled["settled"], &settled["unknown"]), (&json!(1), &json!(receipts[..1])));
    }

    async fn several_connections_share_an_inbox(app: &mut TestApp) {
        let a = app.onboard("a", &["x"]).await;
        let (mut one, mut two) = (Socket::open(&a).await, Socket::open(&a).await);
        one.credit(2).await;
        two.credit(2).await;
        let batch: Vec<Value> = (0..4).map(|n| json!({"topic": "x", "message": n})).collect();
        a.send_all(json!(batch)).await;
        let mut bodies = messages(&[one.messages(2).await, two.messages(2).await].concat());
        bodies.sort_by_key(Value::as_u64);
        assert_eq!(bodies, [json!(0), json!(1), json!(2), json!(3)]);
    }

    async fn a_wrong_frame_is_answered_and_the_connection_stays(app: &mut TestApp) {
        let a = app.onboard("a", &[]).await;
        let mut socket = Socket::open(&a).await;
        socket.refused("{nope", 400, "invalid_json").await;
        for (text, named) in [
            ("[]", vec![""]),
            (r#"{"type":"sing","ref":1}"#, vec!["/type"]),
            (r#"{"type":"credit","credit":0}"#, vec!["/credit"]),
            (r#"{"type":"ack"}"#, vec!["/receipts"]),
            (r#"{"type":"send","topic":"a..b"}"#, vec!["/topic", "/message"]),
            (r#"{"type":"send","messages":[]}"#, vec!["/messages"]),
            (r#"{"type":"send","messages":[{"topic":"a","message":1},{"topic":7,"message":1,"id":""}]}"#,
                vec!["/messages/1/topic", "/messages/1/id"]),
        ] {
            assert_eq!(pointers(&socket.refused(text, 422, "invalid").await), named, "{text}");
        }
        let named = socket.refused(r#"{"type":"send","ref":"r","topic":"","message":1}"#, 422, "invalid").await;
        assert_eq!(named["ref"], "r");
        assert_eq!(socket.ask(json!({"type": "notify", "message": 1})).await["type"], "accepted");
    }

    async fn only_the_right_credentials_get_in_and_a_token_may_be_a_subprotocol(app: &mut TestApp) {
        let a = app.onboard("a", &[]).await;
        let get = || crate::support::http::client().get(a.api.url("/ws"));
        assert_eq!(refusal(get()).await, (401, "unauthorized".into()));
        assert_eq!(refusal(get().basic_auth("a", Some("wrong"))).await, (401, "unauthorized".into()));
        assert_eq!(refusal(get().basic_auth("nobody", Some("wrong"))).await, (401, "unauthorized".into()));
        assert_eq!(refusal(get().bearer_auth(app.admin_token())).await, (403, "forbidden".into()));
        let protocol = |token: &str| get().header("sec-websocket-protocol", format!("backbone, bearer.{token}"));
        assert_eq!(refusal(protocol("v4.local.nonsense")).await, (401, "unauthorized".into()));
        assert_eq!(refusal(protocol(app.admin_token())).await, (403, "forbidden".into()));
        let token = a.post("/token").send().await.ok(200)["token"].as_str().expect("a token").to_owned();
        for request in [
            protocol(&token),
            get().bearer_auth(&token),
            crate::support::http::client().get(a.api.url(&format!("/ws?client_id=a&secret={}", a.secret))),
        ] {
            let mut socket = Socket::over(request).await.expect("it is let in");
            assert_eq!(socket.ask(json!({"type": "notify", "message": 1})).await["type"], "accepted");
        }
        a.get("/ws").send().await.names(&["upgrade"]);
    }

    async fn a_webhook_ends_the_reading_not_the_sending(app: &mut TestApp) {
        let hook = json!({"url": "http://127.0.0.1:18099/hook"});
        let a = app.onboard("a", &["x"]).await;
        let mut socket = Socket::open(&a).await;
        socket.credit(5).await;
        a.send("x", json!(1)).await;
        let held = socket.messages(1).await;
        app.patch("a", json!({"paused": true, "webhook": hook})).await;
        let told = socket.expect("error").await;
        assert_eq!((&told["problem"]["status"], &told["problem"]["code"]), (&json!(409), &json!("webhook_configured")));
        socket.refused(r#"{"type":"credit","credit":5}"#, 409, "webhook_configured").await;
        assert_eq!(socket.settle("ack", &receipts(&held)).await["settled"], 1);
        assert_eq!(socket.ask(json!({"type": "send", "topic": "y", "message": 1})).await["type"], "accepted");
        app.patch("a", json!({"paused": false, "webhook": null})).await;
        a.send("x", json!(2)).await;
        socket.credit(5).await;
        assert_eq!(messages(&socket.messages(1).await), [json!(2)]);
    }

    async fn a_deleted_client_is_shown_out(app: &mut TestApp) {
        let a = app.onboard("a", &["x"]).await;
        let (mut idle, mut reading) = (Socket::open(&a).await, Socket::open(&a).await);
        reading.credit(5).await;
        app.delete("a").await;
        assert_eq!(idle.closed().await, 1008);
        assert_eq!(reading.closed().await, 1008);
    }

    async fn messages_in_single_frames_keep_their_order(app: &mut TestApp) {
        const COUNT: usize = 2_000;
        let a = app.onboard("a", &["x"]).await;
        let b = app.onboard("b", &["x"]).await;
        let mut sender = Socket::open(&a).await;
        let mut receiver = Socket::open(&b).await;
        receiver.credit(300).await;
        for n in 0..=COUNT {
            let mut frame = json!({"type": "send", "ref": n, "topic": "x", "message": n});
            if n % 5 == 0 {
                // Looked up before it is taken; what comes behind waits for that.
                frame["id"] = json!(format!("own-{n}"));
            }
            // A few at a time, so that many publishes are under way.
            if n % 3 == COUNT % 3 {
                sender.send(frame).await;
            } else {
                sender.queue(&frame);
            }
        }
        let mut unsettled = Vec::new();
        for n in 0..=COUNT {
            let message = loop {
                let frame = receiver.next().await;
                if frame["type"] == "message" {
                    break frame;
                }
            };
            assert_eq!(message["message"], json!(n));
            unsettled.push(message["receipt"].clone());
            if unsettled.len() == 100 {
                receiver.send(json!({"type": "ack", "receipts": std::mem::take(&mut unsettled)})).await;
            }
        }
        for n in 0..=COUNT {
            assert_eq!(sender.expect("accepted").await["ref"], json!(n));
        }
    }

    async fn the_way_of_what_came_over_a_socket_is_known(app: &mut TestApp) {
        let a = app.onboard("a", &[]).await;
        let b = app.onboard("b", &["x.#"]).await;
        let mut socket = Socket::open(&b).await;
        socket.credit(1).await;
        let id = a.send("x.y", json!(1)).await;
        let message = socket.messages(1).await;
        socket.settle("ack", &receipts(&message)).await;
        // RabbitMQ hands out what it has not confirmed yet, so the hops before may be noted a moment after the last.
        eventually("its whole way is known", SOON, async || {
            let trace = a.get(&format!("/messages/{id}")).send().await.ok(200);
            let steps: Vec<_> = trace["hops"].as_array().expect("hops").iter().map(|hop| hop["step"].clone()).collect();
            (steps == ["accepted", "forwarded", "published", "routed", "delivered"]).then_some(())
        })
        .await;
    }
}

/// A router with limits of its own.
async fn with(env: &[(&str, &str)]) -> TestApp {
    TestApp::start_with(BrokerKind::Embedded, env).await
}

#[actix_rt::test]
async fn a_message_that_is_too_long_is_refused_and_a_frame_that_is_closes() {
    let mut app = with(&[("SOAR_MAX_MESSAGE_BYTES", "1024")]).await;
    let a = app.onboard("a", &[]).await;
    let mut socket = Socket::open(&a).await;
    let send = |length: usize| json!({"type": "send", "topic": "x", "message": "y".repeat(length)}).to_string();
    socket.refused(&send(1023), 413, "too_large").await;
    assert_eq!(
        socket.ask(json!({"type": "send", "topic": "x", "message": "y".repeat(1022)})).await["type"],
        "accepted"
    );
    socket.send_text(&send(16 * 1024)).await;
    assert_eq!(socket.closed().await, 1009);
}

#[actix_rt::test]
async fn frames_are_as_long_as_requests_may_be() {
    let mut app = with(&[]).await;
    let a = app.onboard("a", &["x"]).await;
    let (mut socket, mut other) = (Socket::open(&a).await, Socket::open(&a).await);
    // With its quotes, exactly the longest message.
    let longest = "y".repeat((1 << 20) - 2);
    let send = |message: &str| json!({"type": "send", "topic": "x", "message": message}).to_string();
    // Side by side: none has to wait for the end of the other's connection.
    for socket in [&mut socket, &mut other] {
        socket.send_text(&send(&longest)).await;
    }
    for socket in [&mut socket, &mut other] {
        assert_eq!(socket.next().await["type"], "accepted");
    }
    let four = json!({"type": "send", "messages": vec![json!({"topic": "x", "message": longest}); 4]});
    assert_eq!(socket.ask(four).await["type"], "accepted");
    socket.refused(&send(&"y".repeat((1 << 20) - 1)), 413, "too_large").await;
    assert_eq!(a.receive_exactly(6, "").await[5]["message"], json!(longest));
    socket.send_text(&send(&"y".repeat(17 << 20))).await;
    assert_eq!(socket.closed().await, 1009);
}

#[actix_rt::test]
async fn the_rate_of_a_client_holds_on_a_socket_too() {
    let mut app = with(&[]).await;
    let a = app.onboard_with(json!({"client_id": "a", "limits": {"send_per_s": 2}})).await;
    let mut socket = Socket::open(&a).await;
    let four: Vec<Value> = (0..4).map(|n| json!({"topic": "x", "message": n})).collect();
    assert_eq!(socket.ask(json!({"type": "send", "messages": four})).await["type"], "accepted");
    let refused = socket.refused(r#"{"type":"send","ref":9,"topic":"x","message":1}"#, 429, "rate_limited").await;
    assert!(refused["retry_after_s"].as_u64().is_some_and(|seconds| seconds >= 1), "{refused}");
    assert_eq!(refused["ref"], 9);
}

#[actix_rt::test]
async fn a_shutdown_closes_with_1001_and_what_was_unsettled_is_there_again() {
    let mut app = with(&[]).await;
    let a = app.onboard("a", &["x"]).await;
    a.send("x", json!("kept")).await;
    let mut socket = Socket::open(&a).await;
    socket.credit(5).await;
    socket.messages(1).await;
    app.router.terminate();
    assert_eq!(socket.closed().await, 1001);
    assert!(app.router.wait_for_exit(SOON).await.success());
    app.router.restart().await;
    assert_eq!(messages(&a.receive_exactly(1, "").await), [json!("kept")]);
}

/// A peer by hand, which does only what it is told: no pongs, no reading.
struct RawPeer(tokio::net::TcpStream);

impl RawPeer {
    async fn open(app: &TestApp, client: &crate::support::http::Client, credit: u32) -> Self {
        use base64::Engine as _;
        let login = base64::engine::general_purpose::STANDARD.encode(format!("{}:{}", client.id, client.secret));
        let mut stream = tokio::net::TcpStream::connect(app.router.address()).await.expect("connects");
        let handshake = format!(
            "GET /ws HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
             sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nauthorization: Basic {login}\r\n\r\n"
        );
        stream.write_all(handshake.as_bytes()).await.expect("writes");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.expect("the handshake is answered"));
        }
        assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
        // One masked text frame; a mask of zeros changes nothing.
        let text = json!({"type": "credit", "credit": credit}).to_string();
        let mut frame = vec![0x81, 0x80 | u8::try_from(text.len()).expect("short"), 0, 0, 0, 0];
        frame.extend_from_slice(text.as_bytes());
        stream.write_all(&frame).await.expect("writes");
        Self(stream)
    }
}

/// 45 seconds of silence are 45 seconds, so all kinds of peers in one test.
async fn half_dead_peers_are_noticed(kind: BrokerKind) {
    let mut app = TestApp::start_with(kind, &[]).await;
    let mut client = async |id: &str| app.onboard(id, &[id]).await;
    let (silent, deaf, idle) = (client("silent").await, client("deaf").await, client("idle").await);
    silent.send("silent", json!("comes back")).await;
    let mut gone = RawPeer::open(&app, &silent, 5).await;
    gone.0.read_u8().await.expect("the message arrives");
    // More than the buffers between hold, so that the router has to wait with it.
    let body = "x".repeat(500_000);
    for n in 0..24 {
        deaf.send("deaf", json!([n, body])).await;
    }
    let never_reads = RawPeer::open(&app, &deaf, 1000).await;
    // One that only answers pings, as every library does, is left alone.
    let mut alive = Socket::open(&idle).await;
    alive.credit(5).await;
    let first = actix_rt::spawn(async move { alive.next_at_last().await });
    let back = eventually("the silent peer's message comes back", SOON * 4, async || {
        let mut messages = silent.receive("wait=5").await;
        messages.pop()
    });
    let back = back.await;
    assert_eq!((&back["message"], &back["deliveries"]), (&json!("comes back"), &json!(2)));
    let mut numbers = Vec::new();
    eventually("what the deaf peer held comes back", SOON * 4, async || {
        numbers.extend(deaf.receive("wait=5").await.iter().map(|message| message["message"][0].clone()));
        (numbers.len() == 24).then_some(())
    })
    .await;
    numbers.sort_by_key(Value::as_u64);
    assert_eq!(numbers, (0..24).map(Value::from).collect::<Vec<_>>());
    idle.send("idle", json!("still there")).await;
    let still = actix_rt::time::timeout(SOON, first).await.expect("it comes soon").expect("no panic");
    assert_eq!((&still["message"], &still["deliveries"]), (&json!("still there"), &json!(1)));
    drop((gone, never_reads));
    crate::support::fixture::Fixture::finish(app).await;
}

#[actix_rt::test]
async fn half_dead_peers_are_noticed_and_what_they_held_comes_back() {
    half_dead_peers_are_noticed(BrokerKind::Embedded).await;
}

#[actix_rt::test]
async fn half_dead_peers_are_noticed_on_rabbitmq_too() {
    half_dead_peers_are_noticed(BrokerKind::RabbitmqQuorum).await;
}
