//! Kill -9 under load, again and again; and SIGTERM, which must be no worse.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;

use crate::support::fixture::{BrokerKind, Fixture};
use crate::support::http::Client;
use crate::support::load::{Load, Manner, Received};
use crate::support::wait::SOON;
use crate::support::{TestApp, eventually};

/// How long all of it may take.
const BOUND: Duration = Duration::from_secs(120);

/// Which topics a consumer wants; `None` is a broadcast.
type Wants = fn(Option<&str>) -> bool;

/// A consumer: what it wants, and what it got.
struct Consumer {
    client: Client,
    wants: Wants,
    received: Received,
}

async fn consumers(app: &mut TestApp) -> Vec<Consumer> {
    let kinds: [(&str, &[&str], Wants); 3] = [
        ("a-only", &["load.a.*"], |topic| topic.is_none_or(|topic| topic.starts_with("load.a."))),
        ("b-only", &["*.b.#", "load.b.2"], |topic| topic.is_none_or(|topic| topic.starts_with("load.b."))),
        ("all", &["#"], |_| true),
    ];
    let mut consumers = Vec::new();
    for (id, patterns, wants) in kinds {
        consumers.push(Consumer { client: app.onboard(id, patterns).await, wants, received: Received::default() });
    }
    consumers
}

/// How a run goes.
#[derive(Debug, Clone, Copy)]
struct Run {
    /// SIGKILL, or SIGTERM with a graceful end.
    killed: bool,
    /// Whether the consumers work from the start; else there is a backlog, and they start at the end.
    consuming: bool,
    /// How often the router ends.
    ends: usize,
    /// How many messages are accepted in a life at least, from a few to this many.
    per_life: usize,
}

async fn end_under_load(kind: BrokerKind, run: Run) {
    let since = Instant::now();
    let mut app = TestApp::start_with(kind, &[]).await;
    let consumers = consumers(&mut app).await;
    let (load, done) = (Load::default(), Rc::new(Cell::new(false)));
    let mut producers = Vec::new();
    for (id, topic, manner) in [
        ("single", "load.a.1", Manner::Single),
        ("batch", "load.b.1", Manner::Batch(10)),
        ("own", "load.b.2", Manner::OwnIds(5)),
        ("own-single", "load.a.2", Manner::OwnIds(1)),
        ("notify", "", Manner::Notify),
    ] {
        let client = app.onboard(id, &[]).await;
        let load = load.clone();
        producers.push(actix_rt::spawn(async move { load.produce(client, topic.to_owned(), manner).await }));
    }
    let start = |consumer: &Consumer| {
        let (load, client, received) = (load.clone(), consumer.client.clone(), consumer.received.clone());
        let done = Rc::clone(&done);
        actix_rt::spawn(async move { load.consume(client, received, done).await })
    };
    let mut tasks: Vec<_> = consumers.iter().filter(|_| run.consuming).map(start).collect();
    for end in 0..run.ends {
        // At a different point of each life, always with calls under way.
        let goal = load.accepted() + 20 + run.per_life * (end % 7) / 6;
        eventually("there is load", SOON, async || (load.accepted() >= goal).then_some(())).await;
        if run.killed { app.kill_and_restart().await } else { app.restart().await }
    }
    load.stop();
    for producer in producers {
        producer.await.expect("a producer");
    }
    if !run.consuming {
        tasks = consumers.iter().map(start).collect();
    }
    eventually("all that was accepted is received", SOON, async || {
        // Not a count: messages whose sender had no answer come as well, perhaps before the last accepted ones.
        let complete = |consumer: &Consumer| load.missing(&consumer.received, consumer.wants).is_empty();
        consumers.iter().all(complete).then_some(())
    })
    .await;
    for consumer in &consumers {
        consumer.client.wait_for_depth("inbox", 0).await;
    }
    done.set(true);
    for task in tasks {
        task.await.expect("a consumer");
    }
    for consumer in &consumers {
        // On a broker of its own, a kill of the router returns what was handed out behind what was not.
        let ordered = kind == BrokerKind::Embedded;
        load.reckon(&consumer.client.id, &consumer.received, consumer.wants, ordered);
        let (all, distinct) = (consumer.received.len(), consumer.received.distinct());
        println!("{}: {distinct} messages, {} copies more", consumer.client.id, all - distinct);
    }
    println!("{run:?}: {} accepted in {:?}", load.accepted(), since.elapsed());
    assert!(since.elapsed() < BOUND, "took {:?}", since.elapsed());
    app.finish().await;
}

/// What the administrator knows of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Known {
    /// Created, with this secret.
    There(String),
    /// Deleted, or never created.
    Gone,
    /// A call had no answer.
    Open,
}

/// Creates and deletes clients until the router does not answer any more; notes what is certain.
async fn come_and_go(app: &TestApp, known: &RefCell<BTreeMap<String, Known>>, life: usize) {
    for n in 0.. {
        let id = format!("client-{life}-{n}");
        known.borrow_mut().insert(id.clone(), Known::Open);
        let body = json!({"client_id": id, "subscriptions": ["x"]});
        let Ok(created) = app.admin(Method::POST, "/clients").json(&body).try_send().await else { return };
        if created.status != 201 {
            created.problem(503, "shutting_down");
            return;
        }
        let secret = created.json()["secret"].as_str().expect("a secret").to_owned();
        known.borrow_mut().insert(id.clone(), Known::There(secret));
        if n % 3 == 1 {
            known.borrow_mut().insert(id.clone(), Known::Open);
            let Ok(deleted) = app.admin(Method::DELETE, &format!("/clients/{id}")).try_send().await else { return };
            assert_eq!(deleted.status, 204, "{deleted:?}");
            known.borrow_mut().insert(id, Known::Gone);
        }
    }
}

broker_tests! {
    async fn heavy_nothing_accepted_is_lost_through_twenty_kills(kind: &mut BrokerKind) {
        end_under_load(*kind, Run { killed: true, consuming: true, ends: 20, per_life: 600 }).await;
    }

    async fn heavy_nothing_accepted_is_lost_through_kills_with_a_backlog(kind: &mut BrokerKind) {
        end_under_load(*kind, Run { killed: true, consuming: false, ends: 6, per_life: 3000 }).await;
    }

    async fn heavy_nothing_accepted_is_lost_through_graceful_restarts(kind: &mut BrokerKind) {
        end_under_load(*kind, Run { killed: false, consuming: true, ends: 8, per_life: 600 }).await;
    }

    async fn heavy_clients_are_what_was_answered_after_a_kill(kind: &mut BrokerKind) {
        let mut app = TestApp::start_with(*kind, &[]).await;
        let sender = app.onboard("sender", &[]).await;
        let known = RefCell::new(BTreeMap::new());
        for life in 0..6 {
            let goal = known.borrow().len() + 4 + 3 * life;
            let killer = async {
                eventually("clients come and go", SOON, async || (known.borrow().len() >= goal).then_some(())).await;
                // Not `router.kill()`, which needs it for itself.
                app.router.kill_without_waiting();
            };
            futures_util::join!(come_and_go(&app, &known, life), killer);
            app.router.restart().await;
            let ids = app.client_ids().await;
            for (id, known) in known.borrow().iter() {
                match known {
                    Known::There(_) => assert!(ids.contains(id), "{id} was created"),
                    Known::Gone => assert!(!ids.contains(id), "{id} was deleted"),
                    Known::Open => {}
                }
            }
        }
        // Those that are there work, and what is open can be settled either way.
        sender.send("x", json!("hello")).await;
        let known = known.into_inner();
        for (id, known) in known {
            match known {
                Known::There(secret) => {
                    let client = Client { api: app.api.clone(), id, secret };
                    assert_eq!(client.receive_exactly(1, "").await[0]["message"], "hello");
                }
                Known::Gone => drop(app.onboard(&id, &[]).await),
                Known::Open => {
                    let deleted = app.admin(Method::DELETE, &format!("/clients/{id}")).send().await;
                    assert!(matches!(deleted.status, 204 | 404), "{deleted:?}");
                    app.onboard(&id, &[]).await;
                }
            }
        }
        app.finish().await;
    }
}
