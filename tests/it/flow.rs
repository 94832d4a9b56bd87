//! From sender to receivers, through every hop, on every broker.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::http::{Client, messages, receipts};
use crate::support::wait::SOON;
use crate::support::{TestApp, eventually};

fn numbers(range: std::ops::Range<usize>) -> Vec<Value> {
    range.map(Value::from).collect()
}

/// The next message that a client gets is this one: what its sender sent before has not come, and will not.
async fn next_is(client: &Client, message: &str) {
    let came = client.receive_exactly(1, "").await;
    assert_eq!(messages(&came), [json!(message)], "{}", client.id);
}

broker_tests! {
    async fn message_reaches_every_matching_inbox(app: &mut TestApp) {
        let sender = app.onboard("noc-c2", &[]).await;
        let mut receivers = Vec::new();
        for (id, patterns) in [
            ("exact", &["soar.noc.slocum.unit-397"][..]),
            ("star", &["soar.*.slocum.*"]),
            ("hash", &["soar.#"]),
            ("both-ends", &["#.unit-397"]),
            ("overlapping", &["#", "soar.#", "*.*.*.*"]),
        ] {
            receivers.push(app.onboard(id, patterns).await);
        }
        let id = sender.send("soar.noc.slocum.unit-397", json!({"depth": 12.5})).await;
        for receiver in &receivers {
            let came = receiver.receive_exactly(1, "").await;
            assert_eq!(came[0]["id"], json!(id), "{}", receiver.id);
            assert!(receiver.receive("").await.is_empty(), "{} got it twice", receiver.id);
        }
    }

    async fn message_reaches_nobody_else(app: &mut TestApp) {
        let sender = app.onboard("sender", &[]).await;
        let mut others = Vec::new();
        for (id, pattern) in [("shorter", "soar.noc"), ("longer", "soar.noc.slocum.*"), ("star", "*"), ("other", "soar.rutgers.#")] {
            others.push(app.onboard_with(json!({"client_id": id, "subscriptions": [pattern, "marker"]})).await);
        }
        sender.send("soar.noc.slocum", json!("not for you")).await;
        sender.send("marker", json!("marker")).await;
        for other in &others {
            next_is(other, "marker").await;
        }
        // The sender is a receiver only of what it subscribed to.
        assert!(sender.receive("").await.is_empty());
    }

    async fn an_envelope_is_what_the_contract_says(app: &mut TestApp) {
        let sender = app.onboard("sender", &["#"]).await;
        let body = r#"{"topic":"a.b","message": {"z":1.0e0,  "a":[1,2 ,3],"big":12345678901234567890.10,"é":"\u00e9\ud83d\ude00"} }"#;
        let answer = sender.post("/send").body("application/json", body).send().await.ok(202);
        let raw = sender.get("/receive?wait=30").send().await;
        let text = String::from_utf8(raw.body.to_vec()).expect("UTF-8");
        let message = r#""message":{"z":1.0e0,  "a":[1,2 ,3],"big":12345678901234567890.10,"é":"\u00e9\ud83d\ude00"}"#;
        assert!(text.contains(message), "byte for byte: {text}");
        let envelope = raw.json()["messages"][0].clone();
        assert_eq!(envelope["id"], answer["ids"][0]);
        assert_eq!((envelope["topic"].as_str(), envelope["sender"].as_str()), (Some("a.b"), Some("sender")));
        let sent_at = envelope["sent_at"].as_str().expect("a time");
        let parsed: jiff::Timestamp = sent_at.parse().expect("RFC 3339");
        assert!(sent_at.ends_with('Z') && parsed.duration_until(jiff::Timestamp::now()).as_secs().abs() < 120, "{sent_at}");
        assert!(envelope.get("broadcast").is_none() && envelope.get("receipt").is_none(), "{envelope}");
        let id = envelope["id"].as_str().expect("an id");
        assert_eq!(uuid::Uuid::parse_str(id).expect("a UUID").get_version_num(), 7, "{id}");
    }

    async fn broadcast_reaches_everyone_incl_sender(app: &mut TestApp) {
        let sender = app.onboard("sender", &["x"]).await;
        let deaf = app.onboard("deaf", &[]).await;
        let all = app.onboard("all", &["#"]).await;
        let id = sender.notify(json!(["to", "all"])).await;
        for receiver in [&sender, &deaf, &all] {
            let came = receiver.receive_exactly(1, "").await;
            assert_eq!(came[0]["id"], json!(id));
            assert_eq!((&came[0]["broadcast"], &came[0]["sender"]), (&json!(true), &json!("sender")));
            assert!(came[0].get("topic").is_none(), "{came:?}");
            assert_eq!(came[0]["message"], json!(["to", "all"]));
            assert!(receiver.receive("").await.is_empty(), "{} got it twice", receiver.id);
        }
    }

    async fn a_sender_cannot_be_forged(app: &mut TestApp) {
        let sender = app.onboard("sender", &["x"]).await;
        app.onboard("victim", &[]).await;
        let forged = json!({"topic": "x", "message": 1, "sender": "victim", "sent_at": "2000-01-01T00:00:00Z", "broadcast": true});
        sender.send_all(forged).await;
        let came = sender.receive_exactly(1, "").await;
        assert_eq!(came[0]["sender"], "sender");
        assert_ne!(came[0]["sent_at"], "2000-01-01T00:00:00Z");
        assert!(came[0].get("broadcast").is_none());
    }

    async fn a_pull_of_long_messages_gets_what_fits_at_once(app: &mut TestApp) {
        let client = app.onboard("client", &["x"]).await;
        let long = "y".repeat(700_000);
        for batch in 0..3 {
            let batch: Vec<Value> = (0..16).map(|n| json!({"topic": "x", "message": format!("{}{long}", batch * 16 + n)})).collect();
            client.send_all(batch.into()).await;
        }
        client.wait_for_depth("inbox", 48).await;
        let mut came = 0;
        while came < 48 {
            let begun = Instant::now();
            let messages = client.receive("max=100").await;
            assert!(!messages.is_empty() && begun.elapsed() < Duration::from_secs(8), "{came} came before");
            for envelope in messages {
                assert!(envelope["message"].as_str().expect("text").starts_with(&format!("{came}y")));
                came += 1;
            }
        }
    }

    async fn own_id_sent_twice_is_routed_once(app: &mut TestApp) {
        let sender = app.onboard("sender", &[]).await;
        let receiver = app.onboard("receiver", &["x"]).await;
        let own = |id: &str| json!({"topic": "x", "message": 1, "id": id});
        let first = sender.send_all(own("order-1")).await;
        assert_eq!(first, json!({"accepted": 1, "duplicates": 0, "ids": ["order-1"]}));
        let again = sender.send_all(own("order-1")).await;
        assert_eq!(again, json!({"accepted": 1, "duplicates": 1, "ids": ["order-1"]}));
        let mixed = sender.send_all(json!([own("order-1"), own("order-2"), own("order-2")])).await;
        assert_eq!(mixed, json!({"accepted": 3, "duplicates": 2, "ids": ["order-1", "order-2", "order-2"]}));
        // One window for both ways of sending.
        let note = sender.post("/notify").json(&json!({"message": 1, "id": "order-1"})).send().await.ok(202);
        assert_eq!(note["duplicates"], 1);
        sender.send_all(json!({"topic": "x", "message": "marker"})).await;
        let came = receiver.receive_exactly(3, "").await;
        let ids: Vec<_> = came.iter().map(|envelope| envelope["id"].as_str().expect("an id")).collect();
        assert_eq!(ids[..2], ["order-1", "order-2"]);
        assert_eq!(came[2]["message"], "marker");
        assert!(app.metric("backbone_messages_duplicates_total").await >= 4.0);
    }

    async fn own_ids_belong_to_their_sender(app: &mut TestApp) {
        let (a, b) = (app.onboard("a", &["x"]).await, app.onboard("b", &[]).await);
        for sender in [&a, &b] {
            let taken = sender.send_all(json!({"topic": "x", "message": 1, "id": "1"})).await;
            assert_eq!(taken["duplicates"], 0, "{}", sender.id);
        }
        assert_eq!(a.receive_exactly(2, "").await.len(), 2);
    }

    async fn own_ids_are_remembered_through_a_restart_and_a_kill(app: &mut TestApp) {
        let sender = app.onboard("sender", &["x"]).await;
        let own = json!({"topic": "x", "message": 1, "id": "1"});
        assert_eq!(sender.send_all(own.clone()).await["duplicates"], 0);
        app.restart().await;
        assert_eq!(sender.send_all(own.clone()).await["duplicates"], 1);
        app.kill_and_restart().await;
        assert_eq!(sender.send_all(own).await["duplicates"], 1);
        assert_eq!(sender.receive_exactly(1, "").await[0]["id"], "1");
        // What RabbitMQ had moved on just before the kill it may hand out again, under the same id.
        assert!(sender.receive("").await.iter().all(|copy| copy["id"] == "1"));
    }

    async fn one_senders_order_holds(app: &mut TestApp) {
        let sender = app.onboard("sender", &[]).await;
        let (a, b) = (app.onboard("a", &["x.#"]).await, app.onboard("b", &["#"]).await);
        let mut n = 0;
        for size in [1, 1, 50, 1, 200, 3, 1, 43] {
            let batch: Vec<_> = (n..n + size).map(|n| json!({"topic": "x.y", "message": n})).collect();
            sender.send_all(if size == 1 { batch[0].clone() } else { batch.into() }).await;
            n += size;
        }
        for receiver in [&a, &b] {
            assert_eq!(messages(&receiver.receive_exactly(n, "").await), numbers(0..n), "{}", receiver.id);
        }
    }

    async fn paused_client_still_sends_and_pulls(app: &mut TestApp) {
        let paused = app.onboard("paused", &["#"]).await;
        let other = app.onboard("other", &["#"]).await;
        other.send("x", json!("before")).await;
        paused.wait_for_depth("inbox", 1).await;
        assert_eq!(app.patch("paused", json!({"paused": true})).await["paused"], true);
        let batch: Vec<_> = (0..5).map(|n| json!({"topic": "y", "message": n})).collect();
        paused.send_all(batch.into()).await;
        paused.notify(json!(5)).await;
        // It pulls; what it sends waits.
        assert_eq!(messages(&paused.receive_exactly(1, "").await), [json!("before")]);
        assert_eq!(messages(&other.receive_exactly(1, "").await), [json!("before")]);
        paused.wait_for_depth("outbox", 5).await;
        paused.wait_for_depth("notify", 1).await;
        other.send("x", json!("meanwhile")).await;
        assert_eq!(messages(&paused.receive_exactly(1, "").await), [json!("meanwhile")]);
        assert_eq!(messages(&other.receive_exactly(1, "").await), [json!("meanwhile")]);
        let record = paused.record().await;
        assert_eq!(record["actors"]["forwarder"], "paused", "{record}");
        // It waits through a restart as well.
        app.restart().await;
        paused.wait_for_depth("outbox", 5).await;
        app.patch("paused", json!({"paused": false})).await;
        let came = messages(&other.receive_exactly(6, "").await);
        let of_outbox: Vec<_> = came.iter().filter(|message| **message != 5).cloned().collect();
        assert_eq!(of_outbox, numbers(0..5));
    }

    async fn deleted_clients_outbox_is_forwarded_first(app: &mut TestApp) {
        let stays = app.onboard("stays", &["x"]).await;
        // Often: what is on its way from a queue to an actor that has just begun is easily overlooked.
        for round in 0..25 {
            let leaver = app.onboard("leaver", &["#"]).await;
            // Paused, so that there is something to forward.
            app.patch("leaver", json!({"paused": true})).await;
            let batch: Vec<_> = (0..20).map(|n| json!({"topic": "x", "message": n})).collect();
            leaver.send_all(batch.into()).await;
            leaver.notify(json!("farewell")).await;
            app.delete("leaver").await;
            let came = messages(&stays.receive_exactly(21, "").await);
            let of_outbox: Vec<_> = came.iter().filter(|message| message.is_number()).cloned().collect();
            assert_eq!(of_outbox, numbers(0..20), "round {round}");
            assert!(came.contains(&json!("farewell")), "round {round}");
        }
    }

    async fn a_deleted_client_is_gone_and_its_id_starts_afresh(app: &mut TestApp) {
        let first = app.onboard("phoenix", &["#"]).await;
        let other = app.onboard("other", &[]).await;
        other.send("x", json!("for the first")).await;
        first.wait_for_depth("inbox", 1).await;
        let token = first.post("/token").send().await.ok(200)["token"].as_str().expect("a token").to_owned();
        app.note_secret(&token);
        app.delete("phoenix").await;
        first.get("/receive").send().await.problem(401, "unauthorized");
        app.api.get("/receive").bearer(&token).send().await.problem(401, "unauthorized");
        app.admin(Method::GET, "/clients/phoenix").send().await.problem(404, "not_found");
        app.admin(Method::DELETE, "/clients/phoenix").send().await.problem(404, "not_found");
        let second = app.onboard("phoenix", &["y"]).await;
        assert_ne!(first.secret, second.secret);
        first.get("/receive").send().await.problem(401, "unauthorized");
        app.api.get("/receive").bearer(&token).send().await.problem(401, "unauthorized");
        other.send("x", json!("still for the first")).await;
        other.send("y", json!("for the second")).await;
        next_is(&second, "for the second").await;
    }

    async fn subscriptions_change_while_traffic_flows(app: &mut TestApp) {
        let sender = app.onboard("sender", &[]).await;
        let receiver = app.onboard("receiver", &["old"]).await;
        sender.send("new", json!("too early")).await;
        sender.send("old", json!(1)).await;
        assert_eq!(messages(&receiver.receive_exactly(1, "").await), [json!(1)]);
        app.patch("receiver", json!({"subscriptions": ["new", "other.*"]})).await;
        sender.send("old", json!("too late")).await;
        sender.send("new", json!(2)).await;
        sender.send("other.x", json!(3)).await;
        assert_eq!(messages(&receiver.receive_exactly(2, "").await), [json!(2), json!(3)]);
        app.patch("receiver", json!({"subscriptions": []})).await;
        sender.send("new", json!("nobody listens")).await;
        sender.notify(json!("all")).await;
        assert_eq!(messages(&receiver.receive_exactly(1, "").await), [json!("all")]);
    }

    async fn a_client_is_ready_when_its_creation_answers(app: &mut TestApp) {
        let sender = app.onboard("sender", &[]).await;
        for n in 0..10 {
            let receiver = app.onboard(&format!("receiver-{n}"), &["x"]).await;
            sender.send("x", json!(n)).await;
            assert_eq!(messages(&receiver.receive_exactly(1, "").await), [json!(n)]);
        }
    }

    async fn clients_come_and_go_while_others_traffic_flows(app: &mut TestApp) {
        let sender = app.onboard("sender", &[]).await;
        let receiver = app.onboard("receiver", &["steady"]).await;
        let (count, batch) = (1000, 20);
        let traffic = async {
            for start in (0..count).step_by(batch) {
                let messages: Vec<_> = (start..start + batch).map(|n| json!({"topic": "steady", "message": n})).collect();
                sender.send_all(messages.into()).await;
            }
        };
        let come_and_go = async {
            for n in 0..15 {
                let id = format!("guest-{n}");
                let guest = app.onboard(&id, &["steady", "guest"]).await;
                guest.send("guest", json!(n)).await;
                app.patch(&id, json!({"subscriptions": ["#"]})).await;
                app.delete(&id).await;
            }
        };
        let (came, (), ()) = futures_util::join!(receiver.receive_exactly(count, ""), traffic, come_and_go);
        assert_eq!(messages(&came), numbers(0..count));
    }

    async fn what_matches_nobody_is_counted_as_unrouted(app: &mut TestApp) {
        let sender = app.onboard("sender", &["x"]).await;
        let before = app.metric("backbone_messages_unrouted_total").await;
        let id = sender.send("nobody.listens", json!(1)).await;
        sender.send("x", json!("marker")).await;
        next_is(&sender, "marker").await;
        eventually("it is counted", SOON, async || {
            (app.metric("backbone_messages_unrouted_total").await - before == 1.0).then_some(())
        })
        .await;
        let way = sender.get(&format!("/messages/{id}")).send().await.ok(200);
        assert_eq!(way["state"], "unrouted", "{way}");
    }

    async fn a_messages_way_is_known(app: &mut TestApp) {
        let sender = app.onboard("sender", &[]).await;
        let receiver = app.onboard("receiver", &["x.*"]).await;
        let id = sender.send("x.y", json!(1)).await;
        receiver.receive_exactly(1, "").await;
        let path = format!("/messages/{id}");
        // On RabbitMQ a message may be with its receiver before its publisher hears that it was routed.
        let way = eventually("it is delivered, and known to be published", SOON, async || {
            let way = sender.get(&path).send().await.ok(200);
            let is_published = way["hops"].as_array().expect("hops").iter().any(|hop| hop["step"] == "published");
            (way["state"] == "delivered" && is_published).then_some(way)
        })
        .await;
        assert_eq!((&way["id"], &way["sender"], &way["topic"]), (&json!(id), &json!("sender"), &json!("x.y")));
        let hops = way["hops"].as_array().expect("hops");
        assert!(hops.iter().all(|hop| hop["at"].is_string() && hop["step"].is_string()), "{way}");
        let routed = hops.iter().find(|hop| hop["inbox"] == "receiver" && hop["pattern"] == "x.*");
        assert!(routed.is_some(), "it is known where it landed and why: {way}");
        let steps: Vec<_> = hops.iter().map(|hop| hop["step"].as_str().expect("a step")).collect();
        assert_eq!(steps[0], "accepted", "{way}");
        assert_eq!(app.admin(Method::GET, &path).send().await.ok(200)["id"], json!(id));
        receiver.get(&path).send().await.problem(403, "forbidden");
        app.admin(Method::GET, "/messages/no-such-message").send().await.problem(404, "not_found");
    }

    async fn everything_is_there_after_a_restart_and_after_a_kill(app: &mut TestApp) {
        let sender = app.onboard("sender", &[]).await;
        let limits = json!({"max_inbox_messages": 1000});
        let body = json!({"client_id": "receiver", "name": "R", "subscriptions": ["x.#"], "limits": limits});
        let receiver = app.onboard_with(body).await;
        let paused = app.onboard("paused", &[]).await;
        app.patch("paused", json!({"paused": true})).await;
        paused.send("x", json!("waits")).await;
        sender.send("x.1", json!("dies")).await;
        let leased = receiver.receive_exactly(1, "ack=manual&lease=3600").await;
        let nack = json!({"receipts": receipts(&leased), "dead": true});
        assert_eq!(receiver.post("/nack").json(&nack).send().await.ok(200)["settled"], 1);
        receiver.dead_letters(1).await;
        let batch: Vec<_> = (0..100).map(|n| json!({"topic": "x.2", "message": n})).collect();
        sender.send_all(batch.into()).await;
        receiver.wait_for_depth("inbox", 100).await;
        let mut next = 0;
        for killed in [false, true] {
            let before = receiver.record().await;
            if killed { app.kill_and_restart().await } else { app.restart().await }
            let after = receiver.record().await;
            for member in ["client_id", "name", "subscriptions", "webhook", "limits", "paused", "created_at"] {
                assert_eq!(before[member], after[member], "{member}");
            }
            assert_eq!(receiver.dead_letters(1).await[0]["envelope"]["message"], "dies");
            paused.wait_for_depth("outbox", 1).await;
            let came = receiver.receive_exactly(50, "").await;
            assert_eq!(messages(&came), numbers(next..next + 50));
            next += 50;
            // And it goes on.
            sender.send("y", json!("unrouted")).await;
        }
        sender.send("x", json!("goes on")).await;
        next_is(&receiver, "goes on").await;
    }

    async fn sigterm_answers_what_waits_and_takes_nothing_away(app: &mut TestApp) {
        let sender = app.onboard("sender", &[]).await;
        let receiver = app.onboard("receiver", &["x"]).await;
        let polls = (0..20).map(|_| receiver.get("/receive?wait=30").try_send());
        let polls = futures_util::future::join_all(polls);
        let stop = async {
            sender.send("x", json!(1)).await;
            app.restart().await;
        };
        let (answers, ()) = futures_util::join!(polls, stop);
        let mut came = 0;
        for answer in answers {
            // A connection that was just being made may be refused; an answer that comes is whole and well-formed.
            let Ok(answer) = answer else { continue };
            match answer.status {
                200 => came += answer.json()["messages"].as_array().expect("messages").len(),
                _ => drop(answer.problem(503, "shutting_down")),
            }
        }
        // What was accepted last may still be on its way.
        if came == 0 {
            came = receiver.receive_exactly(1, "").await.len();
        }
        assert_eq!(came + receiver.receive("").await.len(), 1);
    }

    async fn readiness_and_states_show_what_runs(app: &mut TestApp) {
        let client = app.onboard("client", &["x"]).await;
        assert_eq!(app.api.get("/livez").send().await.status, 200);
        assert_eq!(app.api.get("/readyz").send().await.status, 200);
        let record = client.record().await;
        let actors: BTreeMap<String, String> =
            serde_json::from_value(record["actors"].clone()).expect("states by actor");
        let expected = [("broadcaster", "running"), ("forwarder", "running"), ("pusher", "stopped"), ("subscriber", "running")];
        let actors: Vec<_> = actors.iter().map(|(actor, state)| (actor.as_str(), state.as_str())).collect();
        assert_eq!(actors, expected);
        assert_eq!(record["queues"], json!({"outbox": 0, "notify": 0, "inbox": 0, "dead": 0}));
    }

    async fn one_clients_backlog_slows_no_other(app: &mut TestApp) {
        let sender = app.onboard("sender", &[]).await;
        let slow = app.onboard("slow", &["flood"]).await;
        let quick = app.onboard("quick", &["quick"]).await;
        let big = "x".repeat(10_000);
        let flood: Vec<_> = (0..200).map(|_| json!({"topic": "flood", "message": big})).collect();
        for _ in 0..5 {
            sender.send_all(flood.clone().into()).await;
        }
        let since = std::time::Instant::now();
        sender.send("quick", json!("quick")).await;
        next_is(&quick, "quick").await;
        assert!(since.elapsed() < Duration::from_secs(10), "took {:?} behind a backlog of another", since.elapsed());
        slow.wait_for_depth("inbox", 1000).await;
    }
}
