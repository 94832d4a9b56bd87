//! `POST /send` and `POST /notify`: what is taken, what is refused, and that nothing is taken by halves.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::TestApp;
use crate::support::fixture::{BrokerKind, Fixture};
use crate::support::http::{Client, messages};

/// What follows was sent after everything that was refused: so nothing of that came.
async fn nothing_was_taken(client: &Client) {
    client.send("marker", json!("marker")).await;
    assert_eq!(messages(&client.receive_exactly(1, "").await), [json!("marker")]);
}

broker_tests! {
    async fn an_object_an_array_and_ndjson_are_taken(app: &mut TestApp) {
        let client = app.onboard("client", &["x"]).await;
        let one = json!({"topic": "x", "message": 0});
        let answer = client.send_all(one.clone()).await;
        assert_eq!((&answer["accepted"], &answer["duplicates"]), (&json!(1), &json!(0)));
        let answer = client.send_all(json!([one, {"topic": "x", "message": 1, "id": "own"}])).await;
        assert_eq!((&answer["accepted"], &answer["ids"][1]), (&json!(2), &json!("own")));
        for (n, end) in [(2, ""), (4, "\n"), (6, "\r\n")] {
            let lines = format!("{{\"topic\":\"x\",\"message\":{n}}}\n{{\"topic\":\"x\",\"message\":{}}}{end}", n + 1);
            let answer = client.post("/send").body("application/x-ndjson", lines).send().await.ok(202);
            assert_eq!((&answer["accepted"], answer["ids"].as_array().map(Vec::len)), (&json!(2), Some(2)));
        }
        let came = messages(&client.receive_exactly(9, "").await);
        assert_eq!(came, [0, 0, 1, 2, 3, 4, 5, 6, 7].map(Value::from));
    }

    async fn notify_takes_the_same_without_topic(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        client.notify(json!(0)).await;
        let batch = json!([{"message": 1}, {"message": 2, "id": "own"}]);
        let answer = client.post("/notify").json(&batch).send().await.ok(202);
        assert_eq!((&answer["accepted"], &answer["ids"][1]), (&json!(2), &json!("own")));
        let lines = "{\"message\":3}\n{\"message\":4}\n";
        assert_eq!(client.post("/notify").body("application/x-ndjson", lines).send().await.ok(202)["accepted"], 2);
        assert_eq!(messages(&client.receive_exactly(5, "").await), [0, 1, 2, 3, 4].map(Value::from));
    }

    async fn ids_given_on_acceptance_are_unique_and_in_order(app: &mut TestApp) {
        let client = app.onboard("client", &["x"]).await;
        let batch: Vec<_> = (0..500).map(|n| json!({"topic": "x", "message": n})).collect();
        let answer = client.send_all(batch.into()).await;
        let ids: Vec<&str> = answer["ids"].as_array().expect("ids").iter().filter_map(Value::as_str).collect();
        assert_eq!(ids.len(), 500);
        let came = client.receive_exactly(500, "").await;
        let received: Vec<&str> = came.iter().map(|envelope| envelope["id"].as_str().expect("an id")).collect();
        assert_eq!(ids, received);
        let mut distinct = ids.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), 500);
    }

    async fn any_json_value_is_a_message(app: &mut TestApp) {
        let client = app.onboard("client", &["x"]).await;
        let values = [json!(null), json!(false), json!(0), json!(""), json!([]), json!({}), json!({"message": {"message": 1}})];
        for value in &values {
            client.send("x", value.clone()).await;
        }
        assert_eq!(messages(&client.receive_exactly(values.len(), "").await), values);
    }

    async fn unknown_members_are_ignored(app: &mut TestApp) {
        let client = app.onboard("client", &["x"]).await;
        client.send_all(json!({"topic": "x", "message": 1, "priority": 9, "headers": {"CC": ["y"]}, "": null})).await;
        assert_eq!(messages(&client.receive_exactly(1, "").await), [json!(1)]);
    }

    async fn every_wrong_field_is_named_and_nothing_is_taken(app: &mut TestApp) {
        let client = app.onboard("client", &["#"]).await;
        let send = async |body: Value| client.post("/send").json(&body).send().await;
        for topic in ["", ".", "a.", ".a", "a..b", "a b", "a.*", "#", "ä", &"x".repeat(256)] {
            send(json!({"topic": topic, "message": 1})).await.names(&["/topic"]);
        }
        for id in ["", "a.b", "a b", "ä", "\u{7f}", &"x".repeat(129)] {
            send(json!({"topic": "x", "message": 1, "id": id})).await.names(&["/id"]);
        }
        send(json!({})).await.names(&["/topic", "/message"]);
        send(json!({"topic": 1, "message": 1, "id": 2})).await.names(&["/topic", "/id"]);
        send(json!({"topic": null, "message": 1})).await.names(&["/topic"]);
        let batch = json!([{"topic": "x", "message": 1}, {"topic": "a..b"}, 5, {"topic": "x", "message": 1, "id": "."}]);
        send(batch).await.names(&["/1/topic", "/1/message", "/2", "/3/id"]);
        let lines = "{\"topic\":\"x\",\"message\":1}\n{\"topic\":\"\",\"message\":1}\n[]\n";
        client.post("/send").body("application/x-ndjson", lines).send().await.names(&["/1/topic", "/2"]);
        let notes = json!([{"id": "a b", "message": 1}, {}]);
        client.post("/notify").json(&notes).send().await.names(&["/0/id", "/1/message"]);
        nothing_was_taken(&client).await;
    }

    async fn wrong_json_types_and_empty_batches_are_invalid(app: &mut TestApp) {
        let client = app.onboard("client", &["#"]).await;
        for path in ["/send", "/notify"] {
            for body in ["[]", "5", "\"x\"", "null", "true", "[[]]", "[1]"] {
                client.post(path).body("application/json", body).send().await.problem(422, "invalid");
            }
            client.post(path).body("application/x-ndjson", "").send().await.problem(422, "invalid");
        }
        nothing_was_taken(&client).await;
    }

    async fn what_is_not_json_is_refused(app: &mut TestApp) {
        let client = app.onboard("client", &["#"]).await;
        let bodies: [&[u8]; 8] = [
            b"", b"{", b"{\"topic\":\"x\",\"message\":1}}", b"{\"topic\":\"x\",\"message\":}", b"{'topic':'x'}", b"\xff\xfe",
            b"{\"topic\":\"x\",\"message\":\"\xff\"}", b"[{\"topic\":\"x\",\"message\":1},",
        ];
        for body in bodies {
            client.post("/send").body("application/json", body).send().await.problem(400, "invalid_json");
        }
        let lines: [&[u8]; 3] =
            [b"{\"topic\":\"x\",\"message\":1}\n{\"topic\":", b"{\"topic\":\"x\",\"message\":1}\nnonsense\n", b"\xff\n"];
        for body in lines {
            client.post("/send").body("application/x-ndjson", body).send().await.problem(400, "invalid_json");
        }
        nothing_was_taken(&client).await;
    }

    async fn other_content_types_are_refused(app: &mut TestApp) {
        let client = app.onboard("client", &["#"]).await;
        let body = json!({"topic": "x", "message": 1}).to_string();
        for content_type in ["text/plain", "application/xml", "application/x-www-form-urlencoded", "json", ""] {
            client.post("/send").body(content_type, body.clone()).send().await.problem(415, "unsupported_media_type");
        }
        nothing_was_taken(&client).await;
        let taken = client.post("/send").body("Application/JSON; charset=UTF-8", body).send().await;
        taken.ok(202);
    }

    async fn too_long_messages_and_requests_are_refused(kind: &mut BrokerKind) {
        let mut app = TestApp::start_with(*kind, &[("SOAR_MAX_MESSAGE_BYTES", "1000")]).await;
        let client = app.onboard("client", &["#"]).await;
        // The bytes of `message`: a string of n characters has two quotation marks besides.
        client.send("x", json!("x".repeat(998))).await;
        assert_eq!(client.receive_exactly(1, "").await.len(), 1);
        let send = async |body: Value| client.post("/send").json(&body).send().await;
        send(json!({"topic": "x", "message": "x".repeat(999)})).await.problem(413, "too_large");
        let batch = json!([{"topic": "x", "message": 1}, {"topic": "x", "message": "x".repeat(999)}]);
        send(batch.clone()).await.problem(413, "too_large");
        client.post("/notify").json(&json!({"message": "x".repeat(999)})).send().await.problem(413, "too_large");
        let many: Vec<_> = (0..30).map(|_| json!({"topic": "x", "message": "x".repeat(900)})).collect();
        send(many.into()).await.problem(413, "too_large");
        let lines = format!("{{\"topic\":\"x\",\"message\":1}}\n{}\n", batch[1]);
        client.post("/send").body("application/x-ndjson", lines).send().await.problem(413, "too_large");
        nothing_was_taken(&client).await;
        app.finish().await;
    }

    async fn a_batch_beyond_the_rate_is_taken_whole_and_then_the_rate_recovers(app: &mut TestApp) {
        let body = json!({"client_id": "client", "subscriptions": ["x"], "limits": {"send_per_s": 10}});
        let client = app.onboard_with(body).await;
        let other = app.onboard("other", &[]).await;
        let batch: Vec<_> = (0..50).map(|n| json!({"topic": "x", "message": n})).collect();
        assert_eq!(client.send_all(batch.into()).await["accepted"], 50);
        let refused = client.post("/send").json(&json!({"topic": "x", "message": 1})).send().await;
        refused.problem(429, "rate_limited");
        let wait: u64 = refused.header("retry-after").and_then(|s| s.parse().ok()).expect("seconds");
        assert!((1..=5).contains(&wait), "50 messages at 10 a second, waits {wait} s");
        client.post("/notify").json(&json!({"message": 1})).send().await.problem(429, "rate_limited");
        other.send("y", json!("others are not held back")).await;
        crate::support::eventually("the rate recovers", Duration::from_secs(30), async || {
            let answer = client.post("/send").json(&json!({"topic": "x", "message": "again"})).send().await;
            (answer.status == 202).then_some(())
        })
        .await;
        assert_eq!(client.receive_exactly(51, "").await.len(), 51);
    }

    async fn within_a_second_no_more_than_the_rate_is_taken(app: &mut TestApp) {
        let client = app.onboard_with(json!({"client_id": "client", "limits": {"send_per_s": 1}})).await;
        let sends = [0, 1].map(|n| client.post("/send").json(&json!({"topic": "x", "message": n})).send());
        let answers = futures_util::future::join_all(sends).await;
        let mut statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
        statuses.sort_unstable();
        assert_eq!(statuses, [202, 429]);
    }

    async fn many_senders_at_once_lose_nothing(app: &mut TestApp) {
        let receiver = app.onboard("receiver", &["x.*"]).await;
        let mut senders = Vec::new();
        for n in 0..8 {
            senders.push(app.onboard(&format!("sender-{n}"), &[]).await);
        }
        let work = senders.iter().enumerate().map(|(n, sender)| async move {
            for m in 0..25 {
                sender.send(&format!("x.{n}"), json!([n, m])).await;
            }
        });
        futures_util::future::join_all(work).await;
        let came = receiver.receive_exactly(200, "").await;
        for n in 0..8 {
            let of_one: Vec<Value> = messages(&came).into_iter().filter(|message| message[0] == n).collect();
            let expected: Vec<Value> = (0..25).map(|m| json!([n, m])).collect();
            assert_eq!(of_one, expected);
        }
    }
}
