//! RabbitMQ users of clients' own, when the router knows the management API: what one may do, and every way out of it
//! that a client might try, with Python's pika.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use reqwest::Method;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::amqp::{Broken, Peer, outgoing};
use crate::support::fixture::{BrokerKind, Fixture, Provision};
use crate::support::http::{Client, messages};
use crate::support::rabbitmq::{Node, VirtualHost};
use crate::support::wait::{SOON, soon};
use crate::support::{TestApp, eventually};

/// A router that makes users, on a virtual host. Users belong to the whole node, which other tests share: so every name
/// has an ending of this test's own.
struct UsersApp {
    app: TestApp,
    host: VirtualHost,
    ending: String,
    _directory: TempDir,
}

async fn start(kind: BrokerKind, url: String, directory: &TempDir, management_url: Option<&str>) -> TestApp {
    let provision = Provision { router_env: kind.router_env(url), _keep: None };
    let data_dir = directory.path().join("data");
    std::fs::create_dir_all(&data_dir).expect("a data directory");
    let env: Vec<_> = management_url.map(|url| ("SOAR_RABBITMQ_MANAGEMENT_URL", url)).into_iter().collect();
    TestApp::start_provisioned(provision, temporary(), &data_dir, &env).await
}

fn temporary() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

impl Fixture for UsersApp {
    async fn start(kind: BrokerKind) -> Self {
        let host = VirtualHost::create().await;
        let directory = temporary();
        let app = start(kind, host.url(), &directory, Some(host.management_url())).await;
        let ending = host.name().chars().rev().take(12).collect();
        Self { app, host, ending, _directory: directory }
    }

    async fn finish(self) {
        for id in self.app.client_ids().await {
            self.app.delete(&id).await;
        }
        let Self { app, host, .. } = self;
        app.finish().await;
        assert_eq!(users(&host).await, [] as [String; 0], "clients' users go with them");
    }
}

impl Deref for UsersApp {
    type Target = TestApp;

    fn deref(&self) -> &TestApp {
        &self.app
    }
}

impl DerefMut for UsersApp {
    fn deref_mut(&mut self) -> &mut TestApp {
        &mut self.app
    }
}

impl UsersApp {
    fn id(&self, name: &str) -> String {
        format!("{name}-{}", self.ending)
    }

    async fn client(&mut self, name: &str, patterns: &[&str]) -> Client {
        let id = self.id(name);
        self.app.onboard(&id, patterns).await
    }

    async fn log_in(&self, id: &str, secret: &str) -> Result<Peer, Broken> {
        Peer::try_connect(&self.host.url_of(id, secret)).await
    }

    async fn peer(&self, client: &Client) -> Peer {
        self.log_in(&client.id, &client.secret).await.expect("logs in")
    }
}

/// Users that the backbone made for this virtual host.
async fn users(host: &VirtualHost) -> Vec<String> {
    let all = host.manage(Method::GET, &format!("vhosts/{}/permissions", host.name()), None).await;
    let names = all.as_array().expect("permissions").iter().map(|one| one["user"].as_str().expect("a user").to_owned());
    names.filter(|name| name != "tests").collect()
}

fn assert_refused(what: &str, result: Result<Value, Broken>) {
    match result {
        Err(broken) => assert_eq!((broken.of.as_str(), broken.code), ("channel", 403), "{what}: {broken:?}"),
        Ok(answer) => panic!("{what} is allowed: {answer}"),
    }
}

fn assert_login_refused(result: Result<Peer, Broken>) {
    match result {
        Err(broken) => {
            assert!(broken.text.contains("ACCESS_REFUSED") || broken.text.contains("Authentication"), "{broken:?}")
        }
        Ok(_) => panic!("it logs in"),
    }
}

rabbitmq_tests! {
    async fn a_client_sends_and_reads_with_its_id_and_secret(app: &mut UsersApp) {
        let (one, two) = (app.client("one", &[]).await, app.client("two", &["x"]).await);
        let (mut sender, mut receiver) = (app.peer(&one).await, app.peer(&two).await);
        let exchange = format!("{}-exchange", one.id);
        let body = |n: u32| json!({"topic": "x", "message": n}).to_string();
        sender.publish_all(vec![
            outgoing(&exchange, "outbox", body(1), json!({})),
            outgoing(&exchange, &format!("{}-outbox", one.id), body(2), json!({"user_id": one.id})),
        ]).await;
        let inbox = format!("{}-inbox", two.id);
        let came = receiver.receive(&inbox, 2).await;
        let envelopes: Vec<Value> = came.iter().map(|one| one.json()).collect();
        assert_eq!(messages(&envelopes), [json!(1), json!(2)]);
        assert_eq!(envelopes[0]["sender"], json!(one.id));
        sender.publish_all(vec![
            outgoing(&exchange, "notify", body(3), json!({})),
            outgoing(&exchange, &format!("{}-notify", one.id), body(4), json!({})),
        ]).await;
        let came: Vec<Value> = receiver.receive(&inbox, 2).await.iter().map(|one| one.json()).collect();
        assert_eq!(messages(&came), [json!(3), json!(4)]);
        // What goes nowhere is said, to who asks for it.
        let lost = sender.publish(outgoing(&exchange, "outbx", body(5), json!({}))).await.expect_err("goes nowhere");
        assert_eq!(lost.text, "UnroutableError");
        sender.publish_all(vec![outgoing(&exchange, "outbox", "not JSON", json!({}))]).await;
        assert_eq!(one.dead_letters(1).await[0]["queue"], "outbox");
    }

    async fn a_client_cannot_break_out(app: &mut UsersApp) {
        let (own, victim) = (app.client("own", &[]).await, app.client("victim", &["victim.#"]).await);
        let sender = app.client("sender", &[]).await;
        sender.send("victim.x", json!("secret")).await;
        victim.wait_for_depth("inbox", 1).await;
        sender.notify(json!("for all")).await;
        own.wait_for_depth("inbox", 1).await;
        let mut peer = app.peer(&own).await;
        let of = |client: &Client, kind: &str| format!("{}-{kind}", client.id);
        let body = json!({"topic": "victim.x", "message": "forged"}).to_string();

        for (exchange, key) in [
            (String::new(), of(&victim, "inbox")), (String::new(), of(&victim, "outbox")), (String::new(), of(&own, "outbox")),
            (String::new(), "soar-publish".into()), (String::new(), "soar-unrouted".into()),
            (of(&victim, "exchange"), "outbox".into()), ("soar-topic".into(), "victim.x".into()),
            ("soar-broadcast".into(), String::new()), ("soar-unrouted".into(), String::new()),
            ("soar-retry-5".into(), of(&victim, "inbox")), ("amq.topic".into(), "victim.x".into()),
            ("amq.direct".into(), "x".into()), ("amq.fanout".into(), String::new()), ("amq.headers".into(), String::new()),
            ("amq.match".into(), String::new()),
        ] {
            let result = peer.publish(outgoing(&exchange, &key, &body, json!({}))).await.map(|()| Value::Null);
            assert_refused(&format!("publishing to exchange {exchange:?} under {key}"), result);
        }
        let others: Vec<String> = ["inbox", "outbox", "notify", "dead"].map(|kind| of(&victim, kind)).into();
        let unread: Vec<String> = ["outbox", "notify", "dead"].map(|kind| of(&own, kind)).into();
        let internal: Vec<String> = vec!["soar-publish".into(), "soar-unrouted".into()];
        for queue in others.iter().chain(&unread).chain(&internal) {
            assert_refused(&format!("getting from {queue}"), peer.call("get", json!({ "queue": queue })).await);
            let consume = json!({"queue": queue, "count": 1, "wait_s": 1});
            assert_refused(&format!("consuming {queue}"), peer.call("receive", consume).await);
            assert_refused(&format!("purging {queue}"), peer.call("queue_purge", json!({ "queue": queue })).await);
        }
        for queue in others.iter().chain(&unread).chain(&internal).chain([&of(&own, "inbox")]) {
            assert_refused(&format!("deleting {queue}"), peer.call("queue_delete", json!({ "queue": queue })).await);
            let declare = json!({"queue": queue, "durable": true});
            assert_refused(&format!("declaring {queue}"), peer.call("queue_declare", declare).await);
        }
        for declare in [
            json!({"queue": of(&own, "more")}), json!({"queue": ""}), json!({"queue": "", "exclusive": true}),
            json!({"queue": of(&own, "exchange")}),
            json!({"queue": "x", "arguments": {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": of(&victim, "inbox")}}),
        ] {
            assert_refused(&format!("declaring {declare}"), peer.call("queue_declare", declare.clone()).await);
        }
        for exchange in ["mine", &of(&own, "exchange"), &of(&own, "inbox"), "soar-topic"] {
            let declare = json!({"exchange": exchange, "exchange_type": "fanout", "durable": true});
            assert_refused(&format!("declaring exchange {exchange}"), peer.call("exchange_declare", declare).await);
            assert_refused(&format!("deleting exchange {exchange}"), peer.call("exchange_delete", json!({ "exchange": exchange })).await);
        }
        let exchange = of(&own, "exchange");
        for (queue, from) in [
            (of(&own, "inbox"), "soar-topic"), (of(&own, "inbox"), "soar-unrouted"), (of(&own, "inbox"), &exchange),
            (of(&own, "inbox"), "amq.topic"), (of(&own, "outbox"), "soar-broadcast"), (of(&victim, "inbox"), &exchange),
            (of(&victim, "outbox"), &exchange), ("soar-publish".into(), &exchange),
        ] {
            let bind = json!({"queue": queue, "exchange": from, "routing_key": "#"});
            assert_refused(&format!("binding {queue} to {from}"), peer.call("queue_bind", bind.clone()).await);
            assert_refused(&format!("unbinding {queue} from {from}"), peer.call("queue_unbind", bind).await);
        }
        for (destination, source) in [
            (&*exchange, "soar-topic"), (&exchange, "soar-broadcast"), (&exchange, "amq.topic"), (&exchange, &exchange),
            ("soar-topic", &exchange), ("soar-broadcast", &exchange), (&of(&victim, "exchange"), &exchange),
            (&exchange, &of(&victim, "exchange")),
        ] {
            let bind = json!({"destination": destination, "source": source, "routing_key": "#"});
            assert_refused(&format!("binding exchange {destination} to {source}"), peer.call("exchange_bind", bind.clone()).await);
            assert_refused(&format!("unbinding exchange {destination} from {source}"), peer.call("exchange_unbind", bind).await);
        }
        for user in ["tests", &victim.id] {
            let claim = outgoing(&exchange, "outbox", &body, json!({"user_id": user, "type": "soar"}));
            let refused = peer.publish(claim).await.expect_err("is somebody else");
            assert_eq!((refused.of.as_str(), refused.code), ("channel", 406), "{refused:?}");
        }
        // RabbitMQ follows these through the client's own exchange, which leads nowhere else.
        let copies = [of(&victim, "inbox"), of(&victim, "outbox"), "soar-publish".into(), "victim.x".into()];
        let tricks = json!({"headers": {"CC": copies, "BCC": copies}, "reply_to": of(&victim, "inbox"), "expiration": "60000"});
        peer.publish_all(vec![outgoing(&exchange, "outbox", json!({"topic": "other", "message": 1}).to_string(), tricks)]).await;
        own.wait_for_depth("outbox", 0).await;

        // Everything is as it was: its own inbox is its own, the victim has got what was sent to it and nothing else.
        let mine = peer.receive(&of(&own, "inbox"), 1).await;
        assert_eq!(mine[0].json()["message"], "for all");
        let theirs = victim.receive_exactly(2, "").await;
        assert_eq!(messages(&theirs), [json!("secret"), json!("for all")]);
        assert!(theirs.iter().all(|envelope| envelope["sender"] == json!(sender.id)), "{theirs:?}");
        assert_eq!(victim.record().await["queues"], json!({"outbox": 0, "notify": 0, "inbox": 0, "dead": 0}));
        // Nor anywhere else on the node.
        let elsewhere = app.host.url_of(&own.id, &own.secret).replace(app.host.name(), "%2f");
        assert!(Peer::try_connect(&elsewhere).await.is_err(), "another virtual host");
        let whoami = app.host.management_url().split_once('@').expect("credentials").1;
        let http = crate::support::http::client();
        let answer = http.get(format!("http://{whoami}/api/whoami")).basic_auth(&own.id, Some(&own.secret)).send().await.expect("answers");
        assert_eq!(answer.status(), 401, "the management API");
        // Not its own, but RabbitMQ has no permission for it (the contract says so): how much is in a queue.
        let depth = peer.call("queue_declare", json!({"queue": of(&victim, "inbox"), "passive": true})).await.expect("is told");
        assert_eq!(depth["message_count"], 0);
    }

    async fn a_rotation_changes_the_password_at_once(app: &mut UsersApp) {
        let client = app.client("client", &["x"]).await;
        let mut before = app.peer(&client).await;
        let path = format!("/clients/{}/secret", client.id);
        let rotated = client.post(&path).send().await.ok(200);
        let secret = rotated["secret"].as_str().expect("a secret").to_owned();
        app.note_secret(&secret);
        assert_login_refused(app.log_in(&client.id, &client.secret).await);
        let mut peer = app.log_in(&client.id, &secret).await.expect("logs in");
        client.send("x", json!("the old secret is good for HTTP")).await;
        let exchange = format!("{}-exchange", client.id);
        peer.publish_all(vec![outgoing(&exchange, "outbox", json!({"topic": "x", "message": 2}).to_string(), json!({}))]).await;
        // A connection outlives it, as a token does.
        before.call("alive", json!({})).await.expect("is there");
        assert_eq!(before.receive(&format!("{}-inbox", client.id), 2).await.len(), 2);
    }

    async fn a_deleted_clients_user_is_gone_and_its_connections_with_it(app: &mut UsersApp) {
        let client = app.client("client", &["x"]).await;
        let mut peer = app.peer(&client).await;
        peer.call("alive", json!({})).await.expect("is there");
        app.delete(&client.id).await;
        eventually("its connection is closed", SOON, async || peer.call("alive", json!({})).await.err()).await;
        assert_login_refused(app.log_in(&client.id, &client.secret).await);
        assert_eq!(users(&app.host).await, [] as [String; 0]);
        // The next of that name is another.
        let next = app.client("client", &["x"]).await;
        assert_login_refused(app.log_in(&client.id, &client.secret).await);
        app.peer(&next).await;
    }

    async fn a_client_that_goes_on_sending_is_deleted_and_what_was_confirmed_arrives(app: &mut UsersApp) {
        let sender = app.client("sender", &[]).await;
        let receiver = app.client("receiver", &["x"]).await;
        let mut peer = app.peer(&sender).await;
        let exchange = format!("{}-exchange", sender.id);
        let confirmed = Rc::new(Cell::new(0));
        let sending = actix_rt::spawn({
            let confirmed = Rc::clone(&confirmed);
            async move {
                for n in 0.. {
                    let body = json!({"topic": "x", "message": n}).to_string();
                    if peer.publish(outgoing(&exchange, "outbox", body, json!({}))).await.is_err() {
                        return;
                    }
                    confirmed.set(n + 1);
                }
            }
        });
        eventually("it sends", SOON, async || (confirmed.get() > 50).then_some(())).await;
        app.delete(&sender.id).await;
        soon("its connection ends", sending).await.expect("does not panic");
        let mut came = Vec::new();
        eventually("all that was confirmed has come", SOON, async || {
            came.extend(messages(&receiver.receive("max=1000").await));
            (came.len() >= confirmed.get()).then_some(())
        })
        .await;
        let in_order: Vec<Value> = (0..came.len()).map(Value::from).collect();
        assert_eq!(came, in_order);
    }

    async fn the_name_of_somebody_elses_user_is_taken(app: &mut UsersApp) {
        let id = app.id("theirs");
        app.host.make_user(&id, "their-password").await;
        let body = json!({ "client_id": id });
        let refused = app.admin(Method::POST, "/clients").json(&body).send().await.problem(409, "client_exists");
        assert!(refused["detail"].as_str().is_some_and(|detail| detail.contains("RabbitMQ has a user of this name")), "{refused}");
        assert_eq!(app.client_ids().await, [] as [String; 0]);
        app.log_in(&id, "their-password").await.expect("it is theirs still");
        app.host.manage(Method::DELETE, &format!("users/{id}"), None).await;
        let client = app.client("theirs", &[]).await;
        app.peer(&client).await;
    }

    async fn clients_that_were_there_before_get_their_users_and_those_of_others_go(kind: &mut BrokerKind) {
        let host = VirtualHost::create().await;
        let ending: String = host.name().chars().rev().take(12).collect();
        let directory = temporary();
        let mut app = start(*kind, host.url(), &directory, None).await;
        let client = app.onboard(&format!("client-{ending}"), &["x"]).await;
        assert_login_refused(Peer::try_connect(&host.url_of(&client.id, &client.secret)).await);
        let gone = format!("gone-{ending}");
        let tags = format!("soar-client-of:{}", host.name());
        host.manage(Method::PUT, &format!("users/{gone}"), Some(json!({"password": "p", "tags": tags}))).await;
        app.finish().await;

        let app = start(*kind, host.url(), &directory, Some(host.management_url())).await;
        let url = host.url_of(&client.id, &client.secret);
        let mut peer = eventually("it has a user", SOON, async || Peer::try_connect(&url).await.ok()).await;
        let exchange = format!("{}-exchange", client.id);
        let body = json!({"topic": "x", "message": 1}).to_string();
        peer.publish_all(vec![outgoing(&exchange, "outbox", body, json!({}))]).await;
        assert_eq!(peer.receive(&format!("{}-inbox", client.id), 1).await[0].json()["message"], 1);
        eventually("a stranger with the tag is gone", SOON, async || {
            let users = host.manage(Method::GET, "users", None).await;
            let names = users.as_array().expect("users").iter().map(|user| user["name"].clone());
            (!names.collect::<Vec<_>>().contains(&json!(gone))).then_some(())
        })
        .await;
        app.delete(&client.id).await;
        app.finish().await;
    }
}

/// The management API goes away, and RabbitMQ loses everything. On a node of its own, once for all of it.
#[actix_rt::test]
async fn rabbitmq_users_through_an_outage_and_a_reset() {
    let node = Node::start().await;
    let directory = temporary();
    let mut app = start(BrokerKind::RabbitmqQuorum, node.url(), &directory, Some(&node.management_url())).await;
    let client = app.onboard("client", &["x"]).await;
    let doomed = app.onboard("doomed", &["x"]).await;
    let url = |client: &Client| node.url().replace("tests:tests-password", &format!("{}:{}", client.id, client.secret));
    let queues = async || {
        let listed = node.ctl(&["-q", "list_queues", "name"]).await;
        listed.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    Peer::connect(&url(&client)).await;

    node.ctl(&["eval", "application:stop(rabbitmq_management)."]).await;
    let body = json!({"client_id": "unborn", "subscriptions": ["x"]});
    app.admin(Method::POST, "/clients").json(&body).send().await.problem(503, "broker_unavailable");
    app.admin(Method::GET, "/clients/unborn").send().await.problem(404, "not_found");
    assert!(!queues().await.iter().any(|name| name.starts_with("unborn")), "it leaves nothing behind");
    // A secret that RabbitMQ has not heard of is none.
    let path = format!("/clients/{}/secret?overlap_s=0", client.id);
    client.post(&path).send().await.problem(503, "broker_unavailable");
    client.send("x", json!(1)).await;
    assert_eq!(messages(&client.receive_exactly(1, "").await), [json!(1)]);
    Peer::connect(&url(&client)).await;
    // A client is deleted as far as can be; asked again, it goes on.
    app.admin(Method::DELETE, "/clients/doomed").send().await.problem(503, "broker_unavailable");
    doomed.get("/receive").send().await.problem(401, "unauthorized");
    assert!(!queues().await.iter().any(|name| name.starts_with("doomed")));
    node.ctl(&["eval", "application:start(rabbitmq_management)."]).await;
    app.delete("doomed").await;
    assert!(Peer::try_connect(&url(&doomed)).await.is_err());
    app.onboard("unborn", &["x"]).await;

    node.ctl(&["stop_app"]).await;
    node.ctl(&["reset"]).await;
    node.ctl(&["start_app"]).await;
    let mut peer = eventually("its user is back", SOON, async || Peer::try_connect(&url(&client)).await.ok()).await;
    let body = json!({"topic": "x", "message": 2}).to_string();
    let send = outgoing("client-exchange", "outbox", body, json!({}));
    eventually("its exchange is back", SOON, async || peer.publish(send.clone()).await.ok()).await;
    assert_eq!(messages(&client.receive_exactly(1, "").await), [json!(2)]);
    app.finish().await;
}
