//! Section 5 of the contract, line by line, through the whole router: every row of the status table, five days of
//! failure, changes at any time, what is kept and for how long.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backbone::broker::{DeadReason, Outcome, Queue};
use backbone::client::ClientId;
use backbone::db::Db;
use backbone::db::webhooks::{EndpointNotes, RING_ROWS, WebhookTables};
use backbone::time::Timestamp;
use backbone::webhook::AttemptLog;
use backbone::webhook::answer::Answer;
use backbone::webhook::attempts::{Attempt, AttemptId};
use base64::Engine as _;
use parking_lot::Mutex;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::control::ControlPlane;
use crate::support::endpoint::{FakeEndpoint, Hit, Reply};
use crate::support::env::{client_id, next_exactly, settle_all};
use crate::support::fixture::BrokerKind;
use crate::support::http::Client;
use crate::support::wait::SOON;
use crate::support::{TestApp, eventually};

/// Each time as the contract counts it: an attempt that was made is a hit.
fn by_number(hits: &[Hit]) -> BTreeMap<u64, Vec<&Hit>> {
    let mut all: BTreeMap<u64, Vec<&Hit>> = BTreeMap::new();
    hits.iter().for_each(|hit| all.entry(hit.number()).or_default().push(hit));
    all
}

/// A sender, and a receiver of everything under `x` whose webhook is at `url`, with these settings besides.
async fn onboard(app: &mut TestApp, url: &str, settings: Value) -> (Client, Client) {
    let mut webhook = json!({"url": url, "timeout_s": 1, "retry_schedule_s": [1, 1]});
    settings.as_object().expect("members").iter().for_each(|(key, value)| webhook[key] = value.clone());
    let body = json!({"client_id": "receiver", "subscriptions": ["x.#"], "webhook": webhook});
    let receiver = app.onboard_with(body).await;
    (app.onboard("sender", &[]).await, receiver)
}

async fn send(sender: &Client, numbers: impl IntoIterator<Item = u64>) {
    let batch: Vec<Value> = numbers.into_iter().map(|n| json!({"topic": "x.y", "message": n})).collect();
    sender.send_all(Value::Array(batch)).await;
}

async fn record_shows(client: &Client, what: &str, shows: impl Fn(&Value) -> bool) -> Value {
    eventually(what, SOON, async || Some(client.record().await).filter(|record| shows(record))).await
}

/// How an endpoint treats the first attempt of a message, and what the contract says that means.
#[derive(Clone)]
struct Row {
    name: &'static str,
    first: Reply,
    delivered: bool,
    /// The least that is waited before the next attempt.
    wait: Duration,
}

fn table() -> Vec<Row> {
    let row = |name, first, delivered| Row { name, first, delivered, wait: Duration::from_millis(800) };
    let status = |name, status, delivered| row(name, Reply::Status(status), delivered);
    let asked = |name, status, value: String, wait_s| Row {
        wait: Duration::from_secs(wait_s),
        ..row(name, Reply::retry_after(status, value), false)
    };
    let location = |to: &str| vec![("location", to.to_owned())];
    let redirect = |name, status, to| row(name, Reply::Full { status, headers: location(to), body: vec![] }, false);
    let in_4_s = httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(4));
    vec![
        status("200", 200, true),
        status("201", 201, true),
        status("202", 202, true),
        status("204", 204, true),
        status("299", 299, true),
        redirect("301 to metadata", 301, "http://169.254.169.254/latest/meta-data/"),
        redirect("302", 302, "https://example.com/"),
        redirect("303", 303, "/elsewhere"),
        redirect("307 to metadata by name", 307, "http://metadata.google.internal/"),
        redirect("308", 308, "http://[::1]/"),
        status("304", 304, false),
        status("400", 400, false),
        status("401", 401, false),
        status("403", 403, false),
        status("404", 404, false),
        status("405", 405, false),
        status("408", 408, false),
        status("409", 409, false),
        status("413", 413, false),
        status("422", 422, false),
        status("429", 429, false),
        asked("429 and seconds", 429, "2".into(), 2),
        // When it is asked for, some of that is over; `webhook_push` measures it.
        row("429 and a date", Reply::retry_after(429, in_4_s), false),
        status("500", 500, false),
        status("502", 502, false),
        status("503", 503, false),
        asked("503 and seconds", 503, "2".into(), 2),
        status("504", 504, false),
        status("599", 599, false),
        row("no answer", Reply::HangBefore, false),
        row("half an answer", Reply::HangInside, false),
        // On a connection that was used before, this is what a connection looks like that was closed meanwhile: the same
        // attempt goes on over a fresh one. On a fresh one it is a failure: see `webhook_send`.
        Row { wait: Duration::ZERO, ..row("closed", Reply::Close, false) },
        Row { wait: Duration::ZERO, ..row("reset", Reply::Reset, false) },
        row("cut off", Reply::CutInside, false),
        row("no HTTP", Reply::Garbage, false),
        row("headers without end", Reply::EndlessHeaders, false),
        row("a body without end", Reply::EndlessBody, true),
        row("bytewise", Reply::Bytewise, true),
        row("200, then closed", Reply::OkThenClose, true),
    ]
}

broker_tests! {
    async fn every_row_of_the_status_table_is_kept(app: &mut TestApp) {
        let rows = table();
        let seen = Mutex::new(BTreeSet::new());
        let plan = rows.clone();
        // Every other message is healthy, so that the breaker does not open.
        let endpoint = FakeEndpoint::start(move |hit, _| {
            let n = usize::try_from(hit.number()).expect("few");
            let is_first = seen.lock().insert(n);
            if is_first && n.is_multiple_of(2) { plan[n / 2].first.clone() } else { Reply::Status(200) }
        });
        let count = 2 * rows.len() as u64;
        let (sender, receiver) = onboard(app, &endpoint.url(), json!({"concurrency": 4})).await;
        send(&sender, 0..count).await;
        endpoint.wait_for(rows.len() + rows.iter().map(|row| if row.delivered { 1 } else { 2 }).sum::<usize>()).await;
        let record = record_shows(&receiver, "empty", |record| record["queues"]["inbox"] == 0).await;
        assert_eq!((&record["queues"]["dead"], &record["webhook"]["enabled"]), (&json!(0), &json!(true)));
        let hits = endpoint.hits();
        let by_number = by_number(&hits);
        assert_eq!(by_number.len() as u64, count);
        for (n, row) in (0..).step_by(2).zip(&rows) {
            let hits = &by_number[&n];
            let name = row.name;
            assert_eq!(hits.len(), if row.delivered { 1 } else { 2 }, "{name}");
            assert_eq!(by_number[&(n + 1)].len(), 1, "the one after {name}");
            for pair in hits.windows(2) {
                let wait = pair[1].at - pair[0].at;
                assert!(wait >= row.wait, "{name}: tried again after {wait:?}");
                assert_eq!(pair[0].headers["webhook-id"], pair[1].headers["webhook-id"], "{name}");
                assert_eq!(pair[0].body, pair[1].body, "{name}");
            }
        }
        // Each is in the log with what came back, in words.
        let path = "/clients/receiver/attempts?limit=1000";
        let log = receiver.get(path).send().await.ok(200);
        let attempts = log["attempts"].as_array().expect("attempts");
        let failed: Vec<&Value> = attempts.iter().filter(|attempt| !attempt["error"].is_null()).collect();
        let failures = rows.iter().filter(|row| !row.delivered && !row.wait.is_zero()).count();
        assert!((failures..=failures + 3).contains(&failed.len()), "{} of {failures}", failed.len());
        for words in ["redirects are not followed", "answered 429, Retry-After: 2", "no answer within 1 s", "did not end within 1 s", "not a valid HTTP", "before the answer was complete"] {
            assert!(failed.iter().any(|attempt| attempt["error"].as_str().is_some_and(|error| error.contains(words))), "{words}");
        }
    }

    async fn five_days_of_nothing_but_failure_switch_it_off(app: &mut TestApp) {
        let works = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let endpoint = {
            let works = Arc::clone(&works);
            FakeEndpoint::start(move |_, _| {
                Reply::Status(if works.load(std::sync::atomic::Ordering::SeqCst) { 200 } else { 500 })
            })
        };
        let operator = app.onboard("operator", &["soar.backbone.*.webhook-disabled"]).await;
        let (sender, receiver) = onboard(app, &endpoint.url(), json!({"concurrency": 1})).await;
        // As if it had failed since then: what was noted of the endpoint survives a restart.
        app.router.terminate();
        assert!(app.router.wait_for_exit(SOON).await.success());
        let file = app.directory().join("data/backbone.db");
        let db = Db::open(&file).expect("opens");
        let tables = WebhookTables::open(db.clone()).await.expect("opens");
        let since = Timestamp::now().plus_millis(-(5 * 86_400_000 + 1000));
        let notes = EndpointNotes { failing_since: Some(since), head: None };
        tables.note(&client_id("receiver"), &endpoint.url(), &notes).await.expect("writes");
        // It failed in between as well: two failures far apart say nothing of the days between them.
        let yesterday = Attempt {
            id: AttemptId::from_i64(1),
            message_id: "an-id".into(),
            at: Timestamp::now().plus_millis(-20 * 3_600_000),
            status: Some(500),
            error: Some("it answered 500".into()),
            latency_ms: 1,
            response: "".into(),
        };
        tables.append(vec![(client_id("receiver"), yesterday)]).await.expect("writes");
        db.close();
        app.router.restart().await;
        send(&sender, 0..3).await;
        let off = record_shows(&receiver, "it is off", |record| record["webhook"]["enabled"] == false).await;
        assert!(off["webhook"]["disabled_reason"].as_str().is_some_and(|reason| reason.contains("5 days")), "{off}");
        assert_eq!(endpoint.count(), 1);
        // Published when everything else is done.
        let heard = operator.receive_exactly(1, "").await;
        assert_eq!(app.metric("backbone_webhooks_disabled_total").await as u64, 1);
        assert!(app.router.log().contains("webhook of client receiver was switched off"));
        assert_eq!(heard[0]["topic"], "soar.backbone.receiver.webhook-disabled");
        assert_eq!((&heard[0]["sender"], &heard[0]["message"]["reason"]), (&json!("soar"), &json!("failing")));
        // Nothing is lost by it, and nothing is held against the endpoint when it is switched on again.
        app.patch("receiver", json!({"webhook": {"enabled": true}})).await;
        endpoint.wait_for(2).await;
        let on = receiver.record().await;
        assert_eq!((&on["webhook"]["enabled"], on["webhook"].get("disabled_reason")), (&json!(true), None), "{on}");
        works.store(true, std::sync::atomic::Ordering::SeqCst);
        record_shows(&receiver, "all are delivered", |record| record["queues"]["inbox"] == 0).await;
        assert_eq!(by_number(&endpoint.hits()).len(), 3);
    }

    async fn changes_at_any_time_lose_nothing(app: &mut TestApp) {
        const COUNT: u64 = 400;
        let plan = |hit: &Hit, before: usize| {
            let reply = if before % 7 == 3 { Reply::Status(500) } else { Reply::Status(200) };
            Reply::After(Duration::from_millis(hit.number() % 40), Box::new(reply))
        };
        let came = |one: &FakeEndpoint, other: &FakeEndpoint, pulled: &[Value]| {
            let pushed = one.hits().into_iter().chain(other.hits()).map(|hit| hit.number());
            let pulled = pulled.iter().map(|envelope| envelope["message"].as_u64().expect("a number"));
            pushed.chain(pulled).collect::<BTreeSet<u64>>().len() as u64
        };
        let (one, other) = (FakeEndpoint::start(plan), FakeEndpoint::start(plan));
        let (sender, receiver) = onboard(app, &one.url(), json!({"retry_schedule_s": [1, 1, 1, 1, 1, 1]})).await;
        let sending = actix_rt::spawn({
            let sender = sender.clone();
            async move {
                for from in (0..COUNT).step_by(10) {
                    send(&sender, from..from + 10).await;
                }
            }
        });
        let mut pulled: Vec<Value> = Vec::new();
        let webhook = json!({"url": one.url(), "timeout_s": 1, "retry_schedule_s": [1, 1, 1, 1, 1, 1]});
        let changes = [
            json!({"webhook": {"url": other.url()}}),
            json!({"webhook": {"enabled": false}}),
            json!({"webhook": {"enabled": true, "concurrency": 2}}),
            json!({"webhook": {"ordered": true}}),
            json!({"webhook": null}),
            json!({"webhook": webhook}),
            json!({"paused": true}),
            json!({"webhook": {"rate_limit_per_s": 200}}),
            json!({"paused": false, "webhook": {"rate_limit_per_s": null}}),
            json!({"webhook": {"headers": {"x-round": "again"}}}),
        ];
        for _round in 0..3 {
            for change in &changes {
                let record = app.patch("receiver", change.clone()).await;
                if let Some(secret) = record["webhook_secret"].as_str() {
                    app.note_secret(secret);
                }
                if record["webhook"].is_null() || record["webhook"]["enabled"] == false {
                    // Handed over, leased and settled, leased and left to come back: all kinds of pulling.
                    pulled.extend(receiver.receive("max=5").await);
                    let leased = receiver.receive("max=5&ack=manual&lease=3600").await;
                    let receipts = crate::support::http::receipts(&leased);
                    receiver.settle("/ack", &receipts[..receipts.len() / 2]).await;
                    pulled.extend_from_slice(&leased[..receipts.len() / 2]);
                    receiver.settle("/nack", &receipts[receipts.len() / 2..]).await;
                }
                // Long enough for some deliveries of each configuration.
                let seen = one.count() + other.count();
                let until = Instant::now() + Duration::from_millis(200);
                eventually("some are delivered, or none", SOON, async || {
                    (one.count() + other.count() > seen + 3 || Instant::now() > until).then_some(())
                }).await;
            }
        }
        app.patch("receiver", json!({"paused": false, "webhook": {"enabled": true, "url": one.url(), "ordered": false, "concurrency": 16}})).await;
        sending.await.expect("all are sent");
        eventually("each came", SOON, async || (came(&one, &other, &pulled) == COUNT).then_some(())).await;
        record_shows(&receiver, "empty", |record| record["queues"]["inbox"] == 0).await;
        assert_eq!(receiver.record().await["queues"]["dead"], 0);
        let mut ids: HashMap<u64, BTreeSet<String>> = HashMap::new();
        for hit in one.hits().iter().chain(&other.hits()) {
            ids.entry(hit.number()).or_default().insert(hit.headers["webhook-id"].clone());
        }
        for envelope in &pulled {
            let id = envelope["id"].as_str().expect("an id").to_owned();
            ids.entry(envelope["message"].as_u64().expect("a number")).or_default().insert(id);
        }
        assert_eq!(ids.len() as u64, COUNT, "each came");
        assert!(ids.values().all(|ids| ids.len() == 1), "whatever came again came under the same id");
    }

    async fn dead_letters_of_a_webhook_are_replayed_one_many_and_all(app: &mut TestApp) {
        let works = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let endpoint = {
            let works = Arc::clone(&works);
            FakeEndpoint::start(move |_, _| {
                Reply::Status(if works.load(std::sync::atomic::Ordering::SeqCst) { 200 } else { 400 })
            })
        };
        let (sender, receiver) = onboard(app, &endpoint.url(), json!({"retry_schedule_s": []})).await;
        send(&sender, 0..8).await;
        let dead = receiver.dead_letters(8).await;
        assert_eq!(endpoint.count(), 8);
        for letter in &dead {
            assert_eq!((&letter["reason"], &letter["attempts"], &letter["queue"]), (&json!("delivery_failed"), &json!(1), &json!("inbox")));
        }
        works.store(true, std::sync::atomic::Ordering::SeqCst);
        let mut arrived = 8;
        let number = |letter: &Value| letter["envelope"]["message"].as_u64().expect("a number");
        for (letters, replayed) in [(&dead[2..3], 1), (&dead[4..7], 3)] {
            let ids: Vec<&Value> = letters.iter().map(|letter| &letter["id"]).collect();
            let answer = receiver.post("/clients/receiver/dead-letters/replay").json(&json!({ "ids": ids })).send().await.ok(200);
            assert_eq!(answer["replayed"], replayed);
            arrived += letters.len();
            let hits = endpoint.wait_for(arrived).await;
            let came: BTreeSet<u64> = hits[arrived - letters.len()..].iter().map(Hit::number).collect();
            assert_eq!(came, letters.iter().map(number).collect());
        }
        receiver.dead_letters(4).await;
        let answer = app.admin(Method::POST, "/clients/receiver/dead-letters/replay").json(&json!({})).send().await.ok(200);
        assert_eq!(answer["replayed"], 4);
        endpoint.wait_for(16).await;
        record_shows(&receiver, "empty", |record| record["queues"]["inbox"] == 0 && record["queues"]["dead"] == 0).await;
        works.store(false, std::sync::atomic::Ordering::SeqCst);
        send(&sender, 8..10).await;
        receiver.dead_letters(2).await;
        assert_eq!(receiver.call(Method::DELETE, "/clients/receiver/dead-letters").send().await.ok(200)["purged"], 2);
        receiver.dead_letters(0).await;
    }

    async fn secrets_are_in_no_file(app: &mut TestApp) {
        let endpoint = FakeEndpoint::healthy();
        let webhook = json!({"url": endpoint.url(), "headers": {"x-tenant": "found me"}});
        let created = app.admin(Method::POST, "/clients")
            .json(&json!({"client_id": "receiver", "subscriptions": ["x.#"], "webhook": webhook})).send().await.ok(201);
        let rotated = app.admin(Method::POST, "/clients/receiver/webhook-secret").send().await.ok(200);
        let again = app.admin(Method::POST, "/clients/receiver/secret").send().await.ok(200);
        let sender = app.onboard("sender", &[]).await;
        send(&sender, 0..1).await;
        assert_eq!(endpoint.wait_for(1).await[0].headers["webhook-signature"].split(' ').count(), 2);
        let data = app.directory().join("data");
        for restarted in [false, true] {
            if restarted {
                app.restart().await;
                send(&sender, 1..2).await;
                let hits = endpoint.wait_for(2).await;
                assert_eq!(hits[1].headers["webhook-signature"].split(' ').count(), 2, "both are known again");
            }
            assert!(is_in_a_file(&data, b"found me"), "the search finds what is there");
            for secret in [&created["secret"], &created["webhook_secret"], &rotated["secret"], &again["secret"]] {
                let text = secret.as_str().expect("a secret");
                assert!(!is_in_a_file(&data, text.as_bytes()), "a secret is in a file");
                if let Some(encoded) = text.strip_prefix("whsec_") {
                    let raw = base64::engine::general_purpose::STANDARD.decode(encoded).expect("base64");
                    assert!(!is_in_a_file(&data, encoded.as_bytes()) && !is_in_a_file(&data, &raw), "a webhook secret is in a file");
                }
            }
        }
    }

    async fn dead_letters_do_not_outlive_their_retention(kind: &mut BrokerKind) {
        use crate::support::fixture::Fixture as _;
        let control = ControlPlane::start_with_retention(*kind, Duration::from_secs(2)).await;
        let receiver = control.onboard("receiver", &["x"]).await;
        control.onboard("sender", &[]).await;
        let broker = control.env.broker();
        let messages = crate::support::env::numbered(&client_id("sender"), "x", 20);
        control.env.publish(&Queue::Outbox(client_id("sender")), messages).await;
        let mut consumer = control.env.consume(&Queue::Inbox(receiver.clone()), 20).await;
        let since = Instant::now();
        let batch = next_exactly(&mut consumer, 20).await;
        settle_all(batch, Outcome::Dead { reason: DeadReason::DeliveryFailed, attempts: 8 }).await;
        assert_eq!(broker.dead_letters(&receiver, None, 100).await.expect("lists").dead_letters.len(), 20);
        eventually("they are purged", SOON, async || {
            (broker.depths(&receiver).await.expect("counts").dead == 0).then_some(())
        }).await;
        // RabbitMQ shows nothing of a queue that is being looked through, so there it may seem to be earlier.
        let is_early = since.elapsed() < Duration::from_secs(2);
        assert!(kind.is_rabbitmq() || !is_early, "not before their time: {:?}", since.elapsed());
        drop(consumer);
        control.finish().await;
    }
}

/// Whether these bytes are in any file under `directory`.
fn is_in_a_file(directory: &Path, bytes: &[u8]) -> bool {
    let finder = |haystack: &[u8]| haystack.windows(bytes.len()).any(|window| window == bytes);
    let mut files = 0;
    let found = std::fs::read_dir(directory).expect("a directory").any(|entry| {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            return is_in_a_file(&path, bytes);
        }
        files += 1;
        finder(&std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    });
    assert!(found || files > 0, "{} has files", directory.display());
    found
}

async fn open_log(path: &Path, retention: Duration) -> (Db, Arc<AttemptLog>) {
    let db = Db::open(path).expect("opens");
    let tables = WebhookTables::open(db.clone()).await.expect("opens the tables");
    (db, AttemptLog::new(tables, retention))
}

fn note(log: &AttemptLog, client: &ClientId, status: u16) {
    let now = Timestamp::now();
    let answer = Answer { status, retry_after: None, body: vec![b'x'; 1024] };
    let attempt = Attempt::new(log.next_id(now), "0197-some-message", now, Duration::from_millis(3), &Ok(answer));
    log.note(client, attempt);
}

/// Bytes of all files of a database.
fn size_of(path: &Path) -> u64 {
    let name = path.file_name().expect("a file").to_str().expect("text");
    let with = |suffix: &str| path.with_file_name(format!("{name}{suffix}"));
    ["", "-wal"].iter().filter_map(|suffix| std::fs::metadata(with(suffix)).ok()).map(|file| file.len()).sum()
}

#[actix_rt::test]
async fn attempts_do_not_outlive_their_retention() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (db, log) = open_log(&directory.path().join("backbone.db"), Duration::from_secs(1)).await;
    let running = actix_rt::spawn(Arc::clone(&log).run());
    let client = client_id("receiver");
    let since = Instant::now();
    (0..50).for_each(|n| note(&log, &client, if n % 2 == 0 { 200 } else { 500 }));
    assert_eq!(log.page(&client, None, 100).await.expect("reads").attempts.len(), 50);
    eventually("they expire", SOON, async || {
        log.page(&client, None, 100).await.expect("reads").attempts.is_empty().then_some(())
    })
    .await;
    assert!(since.elapsed() >= Duration::from_secs(1), "not before their time: {:?}", since.elapsed());
    running.abort();
    db.close();
}

#[actix_rt::test]
async fn the_file_does_not_grow_with_attempts() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("backbone.db");
    let (db, log) = open_log(&path, Duration::from_secs(86_400)).await;
    let client = client_id("receiver");
    let mut sizes = Vec::new();
    for _round in 0..8 {
        for _some in 0..4 {
            (0..RING_ROWS).for_each(|_| note(&log, &client, 200));
            (0..RING_ROWS).for_each(|_| note(&log, &client, 500));
            log.flush().await.expect("writes");
        }
        sizes.push(size_of(&path));
    }
    // Each kept attempt is a little more than its KiB; the write-ahead log comes on top, up to where it goes around.
    let page = log.page(&client, None, 5000).await.expect("reads");
    assert_eq!(page.attempts.len(), 2 * usize::from(RING_ROWS));
    assert!(sizes[7] <= sizes[4] + (1 << 20), "it grows: {sizes:?}");
    assert!(sizes[7] <= 40 << 20, "{sizes:?}");
    db.close();
}
