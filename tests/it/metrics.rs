//! `/metrics`: every family is filled by what it is about, on every broker; names and bounds are Prometheus'; and what
//! `deploy/` asks of Prometheus is what the router shows.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::endpoint::{FakeEndpoint, Reply};
use crate::support::fixture::BrokerKind;
use crate::support::http::receipts;
use crate::support::socket::Socket;
use crate::support::wait::SOON;
use crate::support::{TestApp, eventually};

/// What must be above zero once there was traffic of every kind.
const FILLED: &[&str] = &[
    "backbone_messages_accepted_total",
    "backbone_messages_routed_total",
    "backbone_messages_delivered_total",
    "backbone_messages_unrouted_total",
    "backbone_messages_duplicates_total",
    "backbone_messages_dead_total{reason=\"rejected\"}",
    "backbone_messages_dead_total{reason=\"delivery_failed\"}",
    "backbone_broadcasts_accepted_total",
    "backbone_broadcasts_routed_total",
    "backbone_requests_total{route=\"/send\",status=\"202\"}",
    "backbone_requests_total{route=\"/send\",status=\"401\"}",
    "backbone_requests_total{route=\"/send\",status=\"422\"}",
    "backbone_requests_total{route=\"unmatched\",status=\"404\"}",
    "backbone_webhook_attempts_total{class=\"2xx\"}",
    "backbone_webhook_attempts_total{class=\"5xx\"}",
    "backbone_webhook_attempt_duration_seconds_count",
    "backbone_webhook_breakers{state=\"closed\"}",
    "backbone_hop_latency_seconds_count{hop=\"forwarded\"}",
    "backbone_hop_latency_seconds_count{hop=\"published\"}",
    "backbone_hop_latency_seconds_count{hop=\"broadcast\"}",
    "backbone_end_to_end_latency_seconds_count",
    "backbone_commit_latency_seconds_count",
    "backbone_websocket_connections",
    "backbone_clients",
    "backbone_queue_messages{queue=\"inbox\"}",
    "backbone_queue_messages{queue=\"dead\"}",
    "backbone_queue_messages{queue=\"unrouted\"}",
    "backbone_oldest_message_age_seconds{queue=\"inbox\"}",
    "backbone_broker_up",
    "backbone_broker_state{state=\"ready\"}",
    "backbone_actors{actor=\"forwarder\",state=\"running\"}",
    "backbone_actors{actor=\"publisher\",state=\"running\"}",
    "backbone_process_resident_memory_bytes",
    "backbone_process_virtual_memory_bytes",
    "backbone_process_cpu_seconds_total",
    "backbone_process_open_fds",
    "backbone_process_threads",
    "backbone_process_start_time_seconds",
    "backbone_build_info",
];

/// What is there from the start, at zero when all is well.
const PRESENT: &[&str] = &[
    "backbone_messages_dead_total{reason=\"expired\"} 0",
    "backbone_messages_dead_total{reason=\"inbox_full\"} 0",
    "backbone_messages_dead_total{reason=\"invalid_message\"} 0",
    "backbone_actor_restarts_total{actor=\"pusher\"} 0",
    "backbone_broker_reconnects_total 0",
    "backbone_broker_state{state=\"unreachable\"} 0",
    "backbone_webhook_breakers{state=\"open\"} 0",
    "backbone_webhooks_disabled_total{reason=\"gone\"} 0",
];

async fn metrics(app: &TestApp) -> String {
    let answer = app.admin(Method::GET, "/metrics").send().await;
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/plain; version=0.0.4; charset=utf-8")));
    String::from_utf8(answer.body.to_vec()).expect("metrics are text")
}

/// The value of a series, named with its labels; one of any labels where it is named without.
fn value(text: &str, series: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| {
        let rest = line.strip_prefix(series)?;
        (rest.starts_with(' ') || !series.ends_with('}') && rest.starts_with('{')).then_some(rest)
    })?;
    rest.rsplit(' ').next()?.parse().ok()
}

/// Names and labels of all series, without their values.
fn series(text: &str) -> BTreeSet<String> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.rsplit_once(' ')).map(|(series, _)| series.to_owned()).collect()
}

/// Prometheus' own tool, which scripts/setup.sh installs.
fn promtool(arguments: &[&str], directory: &Path, stdin: &str) {
    let mut child = Command::new("promtool")
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("there is a promtool: run scripts/setup.sh");
    std::io::Write::write_all(&mut child.stdin.take().expect("a pipe"), stdin.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("a child can be waited for");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "promtool {arguments:?}: {said}");
    // `check metrics` only warns of some things, and says so.
    assert!(arguments[1] != "metrics" || said.is_empty(), "promtool {arguments:?}: {said}");
}

/// Traffic of every kind; what it leaves is in the inbox of `reader`.
async fn traffic(app: &mut TestApp) -> (Socket, FakeEndpoint) {
    let endpoint = FakeEndpoint::start(|hit, _| Reply::Status(if hit.json()["topic"] == "x.bad" { 500 } else { 200 }));
    let sender = app.onboard("sender", &[]).await;
    let reader = app.onboard("reader", &["x.#"]).await;
    let webhook = json!({"url": endpoint.url(), "retry_schedule_s": []});
    app.onboard_with(json!({"client_id": "hooked", "subscriptions": ["x.#"], "webhook": webhook})).await;
    sender.send_all(json!([{"topic": "x.good", "message": 1, "id": "own"}, {"topic": "x.bad", "message": 2}])).await;
    sender.send_all(json!({"topic": "x.good", "message": 1, "id": "own"})).await;
    sender.send("nobody.listens", json!(3)).await;
    sender.notify(json!("all")).await;
    let taken = reader.receive_exactly(2, "ack=manual").await;
    let (dead, good) = taken.split_at(1);
    reader.post("/nack").json(&json!({"receipts": receipts(dead), "dead": true})).send().await.ok(200);
    reader.settle("/ack", &receipts(good)).await;
    app.api.post("/send").basic("sender", "wrong").json(&json!({})).send().await.problem(401, "unauthorized");
    sender.post("/send").json(&json!({"topic": ""})).send().await.problem(422, "invalid");
    app.api.get("/nothing/of/the/kind").send().await.problem(404, "not_found");
    // Two good ones, a bad one, and the broadcast.
    endpoint.wait_for(3).await;
    sender.send("x.stays", json!(4)).await;
    (Socket::open(&reader).await, endpoint)
}

broker_tests! {
    async fn every_family_is_filled_by_traffic(app: &mut TestApp) {
        let _open = traffic(app).await;
        // RabbitMQ does not say how old a queue's first message is.
        let on_rabbitmq = app.router.log().contains("broker: amqp");
        let filled: Vec<_> =
            FILLED.iter().filter(|series| !on_rabbitmq || !series.contains("oldest_message_age")).collect();
        let text = eventually("every family is filled", SOON, async || {
            let text = metrics(app).await;
            filled.iter().all(|series| value(&text, series).is_some_and(|value| value > 0.0)).then_some(text)
        });
        let text = match actix_rt::time::timeout(SOON / 2, text).await {
            Ok(text) => text,
            Err(_) => {
                let text = metrics(app).await;
                let empty = filled.iter().filter(|series| value(&text, series).is_none_or(|value| value <= 0.0));
                panic!("empty: {:?}\n{text}", empty.collect::<Vec<_>>());
            }
        };
        for line in PRESENT {
            assert!(text.lines().any(|shown| shown == *line), "{line} is not in\n{text}");
        }
        assert_eq!(value(&text, "backbone_messages_duplicates_total"), Some(1.0));
        assert_eq!(value(&text, "backbone_messages_unrouted_total"), Some(1.0));
        promtool(&["check", "metrics"], app.directory(), &text);
    }
}

#[actix_rt::test]
async fn series_do_not_grow_with_clients_topics_or_messages() {
    let mut app = TestApp::start_with(BrokerKind::Embedded, &[]).await;
    let first = app.onboard("first", &["x.#"]).await;
    let use_everything = async |client: &crate::support::http::Client, topic: &str| {
        client.send(topic, json!(1)).await;
        client.notify(json!(2)).await;
        client.record().await;
        client.get(&format!("/clients/{}/dead-letters", client.id)).send().await.ok(200);
        client.get(&format!("/clients/{}/attempts", client.id)).send().await.ok(200);
        client.get(&format!("/messages/{topic}")).send().await.problem(404, "not_found");
        client.get(&format!("/no/such/path/{topic}")).send().await.problem(404, "not_found");
        first.receive_exactly(2, "").await;
        client.receive("max=1000").await;
    };
    use_everything(&first, "x.y").await;
    let settled = async || {
        eventually("the observer has seen them all", SOON, async || {
            let text = metrics(&app).await;
            let clients = app.client_ids().await.len() as f64;
            let seen = value(&text, "backbone_clients") == Some(clients)
                && value(&text, "backbone_actors{actor=\"forwarder\",state=\"running\"}") == Some(clients);
            (seen && !text.contains("oldest_message_age_seconds{")).then_some(text)
        })
        .await
    };
    let before = series(&settled().await);
    for n in 0..100 {
        let body = json!({"client_id": format!("client-{n}"), "subscriptions": [format!("own.{n}.#")]});
        let created = app.admin(Method::POST, "/clients").json(&body).send().await.ok(201);
        if n % 10 == 0 {
            let secret = created["secret"].as_str().expect("a secret").to_owned();
            let client = crate::support::http::Client { api: app.api.clone(), id: format!("client-{n}"), secret };
            use_everything(&client, &format!("x.topic-{n}")).await;
        }
    }
    for n in 0..100 {
        // What the broadcasts left, so that the ages of queues are as before.
        app.admin(Method::DELETE, &format!("/clients/client-{n}")).send().await;
        if n >= 50 {
            app.admin(Method::POST, "/clients").json(&json!({"client_id": format!("client-{n}")})).send().await.ok(201);
        }
    }
    let after = series(&settled().await);
    let grown: Vec<_> = after.difference(&before).filter(|series| !is_of_new_routes(series)).collect();
    assert!(grown.is_empty(), "{grown:?}");
    assert!(after.iter().all(|series| !series.contains("client-") && !series.contains("topic-")), "{after:?}");
    assert!(after.len() < 400, "{}", after.len());
    crate::support::fixture::Fixture::finish(app).await;
}

/// A route's status that was answered for the first time: bounded by routes and statuses.
fn is_of_new_routes(series: &str) -> bool {
    series.starts_with("backbone_requests_total{route=\"/clients")
}

/// Every metric's name in `text`.
fn names(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_lowercase() || c == '_';
    let mut names = BTreeSet::new();
    for (at, _) in text.match_indices("backbone_") {
        // Not inside a longer word, such as a label's.
        if !text[..at].ends_with(is_part) {
            names.insert(text[at..].chars().take_while(|c| is_part(*c)).collect());
        }
    }
    names
}

/// `labels` that a query compares, by metric: `backbone_x{a="b",c=~"d"}` gives `a` and `c` for `backbone_x`.
fn selectors(query: &str) -> Vec<(String, Vec<String>)> {
    let mut found = Vec::new();
    for name in names(query) {
        for (at, _) in query.match_indices(&format!("{name}{{")) {
            let inside = query[at + name.len() + 1..].split('}').next().expect("a first part");
            let labels = inside.split(',').filter_map(|pair| pair.split(['=', '!']).next());
            let labels =
                labels.map(|label| label.trim().to_owned()).filter(|label| !label.is_empty() && !label.contains('"'));
            found.push((name.clone(), labels.collect()));
        }
    }
    found
}

fn expressions(value: &Value, into: &mut Vec<String>) {
    match value {
        Value::Object(members) => members.iter().for_each(|(name, value)| match value {
            Value::String(text) if name == "expr" || name == "query" => into.push(text.clone()),
            _ => expressions(value, into),
        }),
        Value::Array(values) => values.iter().for_each(|value| expressions(value, into)),
        _ => {}
    }
}

#[actix_rt::test]
async fn dashboard_and_alerts_ask_for_what_there_is() {
    let deploy = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("deploy");
    let mut app = TestApp::start_with(BrokerKind::Embedded, &[]).await;
    let _open = traffic(&mut app).await;
    let text = eventually("every family is filled", SOON, async || {
        let text = metrics(&app).await;
        FILLED.iter().all(|series| value(&text, series).is_some_and(|value| value > 0.0)).then_some(text)
    })
    .await;
    let shown = series(&text);
    let read =
        |path: &str| std::fs::read_to_string(deploy.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    let rules = read("prometheus/alerts.yml");
    let dashboard: Value = serde_json::from_str(&read("grafana/backbone.json")).expect("a dashboard is JSON");
    let mut queries = Vec::new();
    expressions(&dashboard, &mut queries);
    assert!(queries.len() > 30, "{queries:?}");
    for (file, query) in
        queries.iter().map(|query| ("the dashboard", query.as_str())).chain([("the alerts", rules.as_str())])
    {
        for name in names(query) {
            let is_there = shown.iter().any(|series| series.split('{').next() == Some(name.as_str()));
            assert!(is_there, "{file}: there is no {name}: {query}");
        }
        for (name, labels) in selectors(query) {
            let of_it: Vec<_> = shown.iter().filter(|series| series.starts_with(&format!("{name}{{"))).collect();
            for label in labels.iter().filter(|label| *label != "instance") {
                let has = of_it.iter().any(|series| series.contains(&format!("{label}=\"")));
                assert!(has, "{file}: {name} has no label {label}: {query}");
            }
        }
    }
    // The other way round: what is shown is on the dashboard, or it is of no use to anybody.
    let asked: BTreeSet<String> = queries.iter().flat_map(|query| names(query)).collect();
    for series in &shown {
        let name = series.split('{').next().expect("a first part");
        let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        assert!(asked.iter().any(|asked| asked.starts_with(base)), "{name} is on no panel");
    }
    let prometheus = deploy.join("prometheus");
    promtool(&["check", "rules", "alerts.yml"], &prometheus, "");
    promtool(&["test", "rules", "alerts-test.yml"], &prometheus, "");
    promtool(&["check", "config", "prometheus.yml"], &prometheus, "");
    crate::support::fixture::Fixture::finish(app).await;
}
