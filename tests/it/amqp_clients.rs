//! Clients that speak AMQP, with Python's pika: what they put into their queues travels like an HTTP send, what of it
//! cannot be read blocks nothing, and inboxes are read by AMQP as by HTTP.
//!
//! The peer logs in as a RabbitMQ user of its own that may do everything, as clients do where the backbone makes no
//! users: what it cannot do here nobody can.

use std::collections::{BTreeSet, HashMap};
use std::hash::{Hash as _, Hasher as _};
use std::ops::{Deref, DerefMut};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::amqp::{Peer, Received, outgoing};
use crate::support::fixture::{BrokerKind, Fixture, Provision};
use crate::support::http::{Client, messages, receipts};
use crate::support::rabbitmq::VirtualHost;
use crate::support::wait::{SOON, pace};
use crate::support::{TestApp, eventually};

/// A router on a virtual host, and a peer there.
struct AmqpApp {
    app: TestApp,
    host: VirtualHost,
    peer: Peer,
    kind: BrokerKind,
}

const PASSWORD: &str = "peers-password";

/// Short, so that a message beyond it is quickly made.
const MAX_MESSAGE_BYTES: usize = 2000;

impl AmqpApp {
    fn user(&self) -> String {
        format!("peer-{}", self.host.name())
    }

    /// Waits until a counter is exactly here.
    async fn counts(&self, name: &str, expected: f64) {
        let what = format!("{name} is {expected}");
        eventually(&what, SOON, async || ((self.metric(name).await - expected).abs() < f64::EPSILON).then_some(()))
            .await;
    }
}

impl Fixture for AmqpApp {
    async fn start(kind: BrokerKind) -> Self {
        let host = VirtualHost::create().await;
        let provision = Provision { router_env: kind.router_env(host.url()), _keep: None };
        let directory = tempfile::tempdir().expect("a temporary directory");
        let data_dir = directory.path().join("data");
        std::fs::create_dir(&data_dir).expect("a data directory");
        let most = MAX_MESSAGE_BYTES.to_string();
        let app =
            TestApp::start_provisioned(provision, directory, &data_dir, &[("SOAR_MAX_MESSAGE_BYTES", &most)]).await;
        let user = format!("peer-{}", host.name());
        host.make_user(&user, PASSWORD).await;
        let peer = Peer::connect(&host.url_of(&user, PASSWORD)).await;
        Self { app, host, peer, kind }
    }

    async fn finish(self) {
        let Self { app, host, peer, .. } = self;
        drop(peer);
        app.finish().await;
        drop(host);
    }
}

impl Deref for AmqpApp {
    type Target = TestApp;

    fn deref(&self) -> &TestApp {
        &self.app
    }
}

impl DerefMut for AmqpApp {
    fn deref_mut(&mut self) -> &mut TestApp {
        &mut self.app
    }
}

/// The text of the first envelope that the client receives.
async fn raw_envelope(client: &Client) -> String {
    let answer = client.get("/receive?wait=30&max=1").send().await;
    assert_eq!(answer.status, 200, "{answer:?}");
    String::from_utf8(answer.body.to_vec()).expect("UTF-8")
}

/// `sender`'s message under `x`, to be waited for: what was put in before it has gone its way.
fn marker() -> Value {
    json!({"topic": "x", "message": "marker"})
}

/// What a delivery by HTTP says besides the envelope.
fn without_delivery(mut envelope: Value) -> Value {
    let members = envelope.as_object_mut().expect("an object");
    members.remove("deliveries").expect("deliveries");
    members.remove("receipt");
    envelope
}

/// Which of the router's sixteen channels for inboxes this one is read on, unless it is read apart.
fn channel_of(client: &str) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    format!("{client}-inbox").hash(&mut hasher);
    hasher.finish() % 16
}

rabbitmq_tests! {
    async fn what_is_put_into_an_outbox_travels_like_a_send(app: &mut AmqpApp) {
        app.onboard("sender", &[]).await;
        let receiver = app.onboard("receiver", &["soar.#"]).await;
        let body = r#"{"extra":1, "message": {"z":1.0e0,  "a":[1,2 ,3],"big":12345678901234567890.10,"é":"\u00e9"} ,"topic":"soar.noc"}"#;
        app.peer.put("sender-outbox", body).await;
        let text = raw_envelope(&receiver).await;
        let message = r#""message":{"z":1.0e0,  "a":[1,2 ,3],"big":12345678901234567890.10,"é":"\u00e9"}"#;
        assert!(text.contains(message), "byte for byte: {text}");
        let envelope: Value = serde_json::from_str::<Value>(&text).expect("JSON")["messages"][0].clone();
        assert_eq!((&envelope["topic"], &envelope["sender"]), (&json!("soar.noc"), &json!("sender")));
        let id = envelope["id"].as_str().expect("an id");
        assert_eq!(uuid::Uuid::parse_str(id).expect("a UUID").get_version_num(), 7);
        assert!(envelope.get("broadcast").is_none() && envelope.get("extra").is_none(), "{envelope}");
        let sent_at: jiff::Timestamp = envelope["sent_at"].as_str().expect("a time").parse().expect("RFC 3339");
        assert!(sent_at.duration_until(jiff::Timestamp::now()).as_secs().abs() < 120, "{sent_at}");
        // Seen, counted and traced as what came by HTTP; the router notes that when the next queue has confirmed it, which
        // may be after the receiver has it.
        let wanted = BTreeSet::from(["accepted", "forwarded", "published", "routed"]);
        eventually("its way is known", SOON, async || {
            let answer = app.admin(Method::GET, &format!("/messages/{id}")).send().await;
            if answer.status == 404 {
                return None;
            }
            let trace = answer.ok(200);
            let hops = trace["hops"].as_array().expect("hops");
            let steps: BTreeSet<&str> = hops.iter().filter_map(|hop| hop["step"].as_str()).collect();
            steps.is_superset(&wanted).then_some(())
        })
        .await;
        app.counts("backbone_messages_accepted_total", 1.0).await;
    }

    async fn what_is_put_into_a_notify_queue_goes_to_everyone(app: &mut AmqpApp) {
        let sender = app.onboard("sender", &[]).await;
        let other = app.onboard("other", &["x"]).await;
        // A topic is ignored there, even one that is none.
        for topic in [json!("not a topic"), json!(7)] {
            app.peer.put("sender-notify", json!({"message": ["to", "all"], "topic": topic}).to_string()).await;
            for receiver in [&sender, &other] {
                let came = receiver.receive_exactly(1, "").await;
                assert_eq!((&came[0]["broadcast"], &came[0]["sender"]), (&json!(true), &json!("sender")));
                assert!(came[0].get("topic").is_none(), "{came:?}");
                assert_eq!(came[0]["message"], json!(["to", "all"]));
            }
        }
    }

    async fn order_is_kept_through_amqp(app: &mut AmqpApp) {
        app.onboard("sender", &[]).await;
        let receiver = app.onboard("receiver", &["x"]).await;
        let all = (0..300).map(|n| outgoing("", "sender-outbox", json!({"topic": "x", "message": n}).to_string(), json!({})));
        app.peer.publish_all(all.collect()).await;
        let came = receiver.receive_exactly(300, "").await;
        assert_eq!(messages(&came), (0..300).map(Value::from).collect::<Vec<_>>());
    }

    async fn own_ids_are_deduplicated_in_one_window_with_http(app: &mut AmqpApp) {
        let sender = app.onboard("sender", &[]).await;
        let receiver = app.onboard("receiver", &["x"]).await;
        let own = |id: &str, n: u32| json!({"topic": "x", "message": n, "id": id}).to_string();
        let put = |body: String, properties: Value| outgoing("", "sender-outbox", body, properties);
        // By AMQP first, in the body.
        app.peer.publish_all(vec![put(own("one", 1), json!({})), put(own("one", 2), json!({}))]).await;
        let mut came = receiver.receive_exactly(1, "").await;
        // Counted when it is known durably that the first was routed.
        app.counts("backbone_messages_duplicates_total", 1.0).await;
        assert_eq!(sender.send_all(json!({"topic": "x", "message": 3, "id": "one"})).await["duplicates"], 1);
        // By HTTP first, then as the property; the body's own word wins over that.
        assert_eq!(sender.send_all(json!({"topic": "x", "message": 4, "id": "two"})).await["duplicates"], 0);
        app.peer.publish_all(vec![
            put(json!({"topic": "x", "message": 5}).to_string(), json!({"message_id": "two"})),
            put(json!({"topic": "x", "message": 6}).to_string(), json!({"message_id": "three"})),
            put(own("four", 7), json!({"message_id": "three"})),
            // One window for both queues.
            outgoing("", "sender-outbox", marker().to_string(), json!({})),
        ]).await;
        came.extend(receiver.receive_exactly(4, "").await);
        let ids: Vec<&str> = came.iter().take(4).map(|envelope| envelope["id"].as_str().expect("an id")).collect();
        assert_eq!(ids, ["one", "two", "three", "four"]);
        assert_eq!(messages(&came), [json!(1), json!(4), json!(6), json!(7), json!("marker")]);
        app.peer.put("sender-notify", json!({"message": 8, "id": "one"}).to_string()).await;
        app.peer.put("sender-notify", json!({"message": "marker"}).to_string()).await;
        assert_eq!(messages(&receiver.receive_exactly(1, "").await), [json!("marker")]);
        // 2 and 5 on their way, 3 when HTTP looked, 8 on its way.
        app.counts("backbone_messages_duplicates_total", 4.0).await;
    }

    async fn only_what_the_backbone_knows_is_carried_on(app: &mut AmqpApp) {
        let sender = app.onboard("sender", &[]).await;
        app.onboard("receiver", &["x"]).await;
        let victim = app.onboard("victim", &[]).await;
        // Through an exchange that RabbitMQ routes by no key, so that the message is in the outbox with all that it
        // has; through the default exchange RabbitMQ itself would follow CC and BCC.
        app.peer.call("exchange_declare", json!({"exchange": "own", "exchange_type": "fanout"})).await.expect("declares");
        app.peer.call("queue_bind", json!({"queue": "sender-outbox", "exchange": "own"})).await.expect("binds");
        let traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let tricks = json!({
            "headers": {
                "CC": ["victim-inbox", "victim-outbox", "soar-publish"], "BCC": ["victim-inbox"], "x-own": "1",
                "soar-attempts": 99, "soar-deliveries": 99, "soar-delayed-at": 1, "soar-reason": "expired",
                "x-death": "no", "x-delay": 100_000, "traceparent": traceparent,
            },
            "expiration": "3600000", "priority": 9, "reply_to": "victim-inbox", "correlation_id": "c",
            "type": "soar", "app_id": "a", "content_type": "text/plain", "content_encoding": "gzip",
            "delivery_mode": 1, "timestamp": 1, "cluster_id": "z",
        });
        app.peer.publish_all(vec![
            outgoing("own", "", json!({"topic": "x", "message": 1}).to_string(), tricks.clone()),
            outgoing("own", "", "not JSON", tricks),
        ]).await;
        let came = app.peer.receive("receiver-inbox", 1).await.remove(0);
        let properties = came.properties.as_object().expect("properties");
        let names: BTreeSet<&str> = properties.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            BTreeSet::from(["content_type", "delivery_mode", "headers", "message_id", "timestamp", "type", "user_id"]),
            "{properties:?}"
        );
        assert_eq!((&properties["content_type"], &properties["delivery_mode"]), (&json!("application/json"), &json!(2)));
        assert_eq!(properties["headers"], json!({ "traceparent": traceparent }));
        assert!(properties["timestamp"].as_u64().expect("seconds") > 1_700_000_000);
        assert_eq!(properties["message_id"], came.json()["id"]);
        // The dead letter went without them, too; and nobody else has got anything.
        let dead = sender.dead_letters(1).await.remove(0);
        assert_eq!((&dead["reason"], &dead["queue"], &dead["attempts"]), (&json!("invalid_message"), &json!("outbox"), &json!(0)));
        assert_eq!(victim.record().await["queues"], json!({"outbox": 0, "notify": 0, "inbox": 0, "dead": 0}));
    }

    async fn the_backbones_own_marks_cannot_be_forged(app: &mut AmqpApp) {
        app.onboard("sender", &[]).await;
        app.onboard("victim", &[]).await;
        let receiver = app.onboard("receiver", &["x"]).await;
        let forged = r#"{"id":"forged","topic":"x","sender":"victim","sent_at":"2000-01-01T00:00:00.000Z","message":1}"#;
        // As the backbone's user, which RabbitMQ lets nobody claim to be.
        for kind in ["soar", "soar.own-id"] {
            let properties = json!({"user_id": "tests", "type": kind});
            let refused = app.peer.publish(outgoing("", "sender-outbox", forged, properties)).await.expect_err("is refused");
            assert_eq!((refused.of.as_str(), refused.code), ("channel", 406), "{refused:?}");
        }
        // As who it is, or as nobody: then it is a message of the outbox's owner.
        let user = app.user();
        for properties in [json!({"user_id": user, "type": "soar"}), json!({"type": "soar.own-id"})] {
            app.peer.publish_all(vec![outgoing("", "sender-outbox", forged.replace("forged", "a"), properties)]).await;
        }
        app.peer.put("sender-outbox", marker().to_string()).await;
        let came = receiver.receive_exactly(2, "").await;
        assert_eq!(messages(&came), [json!(1), json!("marker")], "the second had the first one's id");
        assert_eq!((&came[0]["sender"], &came[0]["id"]), (&json!("sender"), &json!("a")));
        assert_ne!(came[0]["sent_at"], "2000-01-01T00:00:00.000Z");
        // Clients that still log in as the backbone's user, and pass on what they read as it is, properties and all.
        let mut insider = Peer::connect(&app.host.url()).await;
        for (queue, message) in [("sender-outbox", 2), ("sender-notify", 3)] {
            let body = forged.replace("forged", &format!("own-{message}")).replace(":1}", &format!(":{message}}}"));
            insider.publish_all(vec![outgoing("", queue, body, json!({"user_id": "tests", "type": "soar.own-id"}))]).await;
            let came = receiver.receive_exactly(1, "").await;
            assert_eq!((&came[0]["sender"], &came[0]["message"]), (&json!("sender"), &json!(message)));
        }
    }

    async fn a_header_as_long_as_a_frame_goes_no_further(app: &mut AmqpApp) {
        let sender = app.onboard("sender", &[]).await;
        let receiver = app.onboard("receiver", &["x"]).await;
        // It fits into a frame as it comes. With what the backbone adds it would not, and RabbitMQ ends the connection.
        let long = json!({"headers": {"traceparent": "0".repeat(130_900)}});
        app.peer.publish_all(vec![
            outgoing("", "sender-outbox", "not JSON", long.clone()),
            outgoing("", "sender-outbox", json!({"topic": "x", "message": 1}).to_string(), long),
        ]).await;
        assert_eq!(messages(&receiver.receive_exactly(1, "").await), [json!(1)]);
        assert_eq!(sender.dead_letters(1).await[0]["reason"], "invalid_message");
        let log = app.router.log();
        assert!(!log.contains("trying again"), "no connection ended:\n{log}");
    }

    async fn what_cannot_be_read_is_a_dead_letter_and_blocks_nothing(app: &mut AmqpApp) {
        let sender = app.onboard("sender", &[]).await;
        let receiver = app.onboard("receiver", &["x"]).await;
        let long = "y".repeat(MAX_MESSAGE_BYTES);
        let too_long = |with: &str| format!(r#"{{{with}"message":"{long}"}}"#).into_bytes();
        let deep = [b"{\"message\":".to_vec(), b"[".repeat(200_000)].concat();
        let nested = |levels| format!("{{\"topic\":\"x\",\"message\":{}{}}}", "[".repeat(levels), "]".repeat(levels)).into_bytes();
        let anywhere: Vec<Vec<u8>> = vec![
            b"".to_vec(), b"not JSON".to_vec(), b"\xff\xfe\x00binary".to_vec(), b"null".to_vec(), b"[]".to_vec(),
            b"{}".to_vec(), b"{\"topic\":\"x\"}".to_vec(), b"{\"message\":\"\xff\"}".to_vec(), deep,
            nested(129), b"{\"topic\":\"x\",\"message\":1,\"id\":null}".to_vec(),
            b"{\"topic\":\"x\",\"message\":1,\"id\":5}".to_vec(), b"{\"topic\":\"x\",\"message\":1,\"id\":\"a.b\"}".to_vec(),
            b"{\"topic\":\"x\",\"message\":1,\"id\":\"\"}".to_vec(), b"{\"topic\":\"x\",\"message\":1} trailing".to_vec(),
            b"{\"topic\":\"x\",\"message\":NaN}".to_vec(), b"{\"topic\":\"x\",\"message\":1,\"message\":2}".to_vec(),
        ];
        let mut outbox = anywhere.clone();
        outbox.extend([
            b"{\"message\":1}".to_vec(), b"{\"topic\":7,\"message\":1}".to_vec(), b"{\"topic\":null,\"message\":1}".to_vec(),
            b"{\"topic\":\"\",\"message\":1}".to_vec(), b"{\"topic\":\"a..b\",\"message\":1}".to_vec(),
            b"{\"topic\":\"a b\",\"message\":1}".to_vec(), b"{\"topic\":\"a.*\",\"message\":1}".to_vec(),
            format!(r#"{{"topic":"{}","message":1}}"#, "t".repeat(256)).into_bytes(), too_long(r#""topic":"x","#),
        ]);
        let mut notify = anywhere;
        notify.push(too_long(""));
        let mut expected: HashMap<(&str, Vec<u8>), usize> = HashMap::new();
        for (queue, bodies) in [("outbox", &outbox), ("notify", &notify)] {
            let name = format!("sender-{queue}");
            let mut all: Vec<Value> = Vec::new();
            for (n, body) in bodies.iter().enumerate() {
                all.push(outgoing("", &name, body, json!({})));
                all.push(outgoing("", &name, json!({"topic": "x", "message": n}).to_string(), json!({})));
                *expected.entry((queue, body.clone())).or_default() += 1;
            }
            app.peer.publish_all(all).await;
            let came = receiver.receive_exactly(bodies.len(), "").await;
            assert_eq!(messages(&came), (0..bodies.len()).map(Value::from).collect::<Vec<_>>(), "{queue}");
        }
        let letters = sender.dead_letters(outbox.len() + notify.len()).await;
        let mut found: HashMap<(&str, Vec<u8>), usize> = HashMap::new();
        for letter in &letters {
            assert_eq!((&letter["reason"], &letter["attempts"]), (&json!("invalid_message"), &json!(0)), "{letter}");
            assert!(letter.get("envelope").is_none(), "{letter}");
            let raw = STANDARD.decode(letter["raw"].as_str().expect("raw")).expect("base64");
            *found.entry((letter["queue"].as_str().expect("a queue"), raw)).or_default() += 1;
        }
        assert_eq!(found, expected);
        app.counts("backbone_messages_dead_total", letters.len() as f64).await;
        // Replayed, they die again, as themselves; purged, they are gone.
        let ids: Vec<&Value> = letters.iter().take(3).map(|letter| &letter["id"]).collect();
        let replayed = sender.post("/clients/sender/dead-letters/replay").json(&json!({ "ids": ids })).send().await.ok(200);
        assert_eq!(replayed, json!({"replayed": 3}));
        let again = sender.dead_letters(letters.len()).await;
        let bodies = |letters: &[Value]| {
            let mut raw: Vec<String> = letters.iter().map(|letter| format!("{} {}", letter["queue"], letter["raw"])).collect();
            raw.sort();
            raw
        };
        assert_eq!(bodies(&again), bodies(&letters));
        sender.call(Method::DELETE, "/clients/sender/dead-letters").send().await.ok(200);
        // Its own broadcasts are what it has left.
        let left = json!({"outbox": 0, "notify": 0, "inbox": notify.len(), "dead": 0});
        eventually("nothing else is left", SOON, async || (sender.record().await["queues"] == left).then_some(())).await;
    }

    async fn looking_now_and_then_takes_no_more_and_more_out_of_a_queue(app: &mut AmqpApp) {
        let client = app.onboard("client", &["x"]).await;
        let batch: Vec<Value> = (0..1000).map(|n| json!({"topic": "x", "message": n})).collect();
        client.send_all(batch.clone().into()).await;
        for some in receipts(&client.receive_exactly(1000, "ack=manual").await).chunks(200) {
            client.post("/nack").json(&json!({"receipts": some, "dead": true})).send().await.ok(200);
        }
        for _ in 0..8 {
            assert_eq!(client.dead_letters_up_to(10).await.len(), 10);
        }
        client.send_all(batch.into()).await;
        client.wait_for_depth("inbox", 1000).await;
        // Apart, as a client that looks now and then: what was read ahead for one pull goes back before the next.
        let mut rest = pace(Duration::from_millis(400));
        for _ in 0..8 {
            rest.tick().await;
            assert_eq!(client.receive("max=10").await.len(), 10);
        }
        let came_back = |all: Vec<Received>| all.iter().filter(|one| one.redelivered).count();
        let dead = came_back(app.peer.receive("client-dead", 1000).await);
        assert!(dead < 200, "{dead} dead letters were taken out to show ten");
        let pulled = came_back(app.peer.receive("client-inbox", 920).await);
        assert!(pulled < 20, "{pulled} messages were taken out to hand out ten");
    }

    async fn an_inbox_is_read_by_amqp_as_by_http(app: &mut AmqpApp) {
        let sender = app.onboard("sender", &[]).await;
        let by_http = app.onboard("by-http", &["x"]).await;
        app.onboard("by-amqp", &["x"]).await;
        sender.post("/send").body("application/json", r#"{"topic":"x","message":{"b":1.50,  "a":"\u00e9"}}"#).send().await.ok(202);
        sender.send_all(json!({"topic": "x", "message": 2, "id": "own"})).await;
        sender.notify(json!("all")).await;
        let mut by_amqp = HashMap::new();
        for message in app.peer.receive("by-amqp-inbox", 3).await {
            let envelope = message.json();
            assert_eq!(message.properties["content_type"], "application/json");
            assert_eq!(message.properties["message_id"], envelope["id"]);
            assert_eq!(message.properties["delivery_mode"], 2);
            assert!(!message.redelivered);
            let text = String::from_utf8(message.body.clone()).expect("UTF-8");
            assert!(envelope["message"] != json!({"b": 1.5, "a": "é"}) || text.contains(r#""message":{"b":1.50,  "a":"\u00e9"}"#), "{text}");
            by_amqp.insert(envelope["id"].to_string(), envelope);
        }
        let http: HashMap<String, Value> = by_http
            .receive_exactly(3, "")
            .await
            .into_iter()
            .map(|envelope| (envelope["id"].to_string(), without_delivery(envelope)))
            .collect();
        assert_eq!(by_amqp, http);
    }

    async fn amqp_and_http_share_an_inbox(app: &mut AmqpApp) {
        let sender = app.onboard("sender", &[]).await;
        let receiver = app.onboard("receiver", &["x"]).await;
        let all: Vec<Value> = (0..200).map(|n| json!({"topic": "x", "message": n})).collect();
        sender.send_all(json!(all)).await;
        receiver.wait_for_depth("inbox", 200).await;
        let leased = receiver.receive("max=50&ack=manual&lease=3600").await;
        let mut seen = messages(&leased);
        // Leased ones are not to be had by AMQP; what the router had fetched in advance comes back to RabbitMQ.
        for message in app.peer.receive("receiver-inbox", 100).await {
            seen.push(message.json()["message"].clone());
        }
        seen.extend(messages(&receiver.receive_exactly(50, "").await));
        let mut numbers: Vec<u64> = seen.iter().map(|n| n.as_u64().expect("a number")).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..200).collect::<Vec<_>>());
        assert_eq!(receiver.settle("/ack", &receipts(&leased)).await, json!({"settled": 50, "unknown": []}));
        receiver.wait_for_depth("inbox", 0).await;
    }

    async fn what_an_amqp_reader_did_not_acknowledge_comes_back(app: &mut AmqpApp) {
        let sender = app.onboard("sender", &[]).await;
        let receiver = app.onboard("receiver", &["x"]).await;
        sender.send_all(json!([{"topic": "x", "message": 1}, {"topic": "x", "message": 2}])).await;
        let mut reader = Peer::connect(&app.host.url_of(&app.user(), PASSWORD)).await;
        let held = reader.call("hold", json!({"queue": "receiver-inbox", "count": 2})).await.expect("consumes");
        assert_eq!(held.as_array().map(Vec::len), Some(2));
        assert!(receiver.receive("").await.is_empty(), "they are the reader's");
        drop(reader);
        let came = receiver.receive_exactly(2, "").await;
        assert_eq!(messages(&came), [json!(1), json!(2)]);
        assert_eq!(came[0]["deliveries"], 2, "{came:?}");
    }

    async fn what_is_no_envelope_in_an_inbox_is_a_dead_letter(app: &mut AmqpApp) {
        let sender = app.onboard("sender", &[]).await;
        let receiver = app.onboard("receiver", &["x"]).await;
        app.peer.put("receiver-inbox", "garbage").await;
        sender.send("x", json!(1)).await;
        assert_eq!(messages(&receiver.receive_exactly(1, "").await), [json!(1)]);
        let letters = receiver.dead_letters(1).await;
        assert_eq!((&letters[0]["queue"], &letters[0]["reason"]), (&json!("inbox"), &json!("invalid_message")));
        assert_eq!(letters[0]["raw"], STANDARD.encode("garbage"));
    }

    async fn who_keeps_an_inbox_to_itself_disturbs_nobody_else(app: &mut AmqpApp) {
        let selfish = app.onboard("selfish", &["x"]).await;
        let name = (0..).map(|n| format!("neighbour-{n}")).find(|name| channel_of(name) == channel_of("selfish"));
        let neighbour = app.onboard(&name.expect("sixteen channels"), &["x"]).await;
        let sender = app.onboard("sender", &[]).await;
        let mut reader = Peer::connect(&app.host.url_of(&app.user(), PASSWORD)).await;
        reader.call("hold", json!({"queue": "selfish-inbox", "count": 0, "exclusive": true})).await.expect("consumes");
        // The first time that the router is refused, the channel goes, and what was leased on it comes back.
        let refused = selfish.get("/receive?wait=1").send().await;
        assert!(refused.status == 200 || refused.status == 503, "{refused:?}");
        sender.send("x", json!(1)).await;
        let leased = neighbour.receive_exactly(1, "ack=manual&lease=3600").await;
        // From then on it is refused apart.
        for _ in 0..3 {
            let refused = selfish.get("/receive?wait=1").send().await;
            assert!(refused.status == 200 || refused.status == 503, "{refused:?}");
        }
        assert_eq!(neighbour.settle("/ack", &receipts(&leased)).await, json!({"settled": 1, "unknown": []}));
        drop(reader);
        assert_eq!(messages(&selfish.receive_exactly(1, "").await), [json!(1)], "{:?}", app.kind);
    }
}
