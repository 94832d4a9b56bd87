//! Kill -9 under load, again and again; and SIGTERM, which must be no worse.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::json;

use crate::support::fixture::{BrokerKind, Fixture};
use crate::support::http::Client;
use crate::support::load::Traffic;
use crate::support::wait::SOON;
use crate::support::{TestApp, eventually};

/// How long all of it may take.
const BOUND: Duration = Duration::from_secs(120);

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
    let traffic = Traffic::start(&mut app, run.consuming).await;
    let load = traffic.load.clone();
    for end in 0..run.ends {
        // At a different point of each life, always with calls under way.
        let goal = load.accepted() + 20 + run.per_life * (end % 7) / 6;
        eventually("there is load", SOON, async || (load.accepted() >= goal).then_some(())).await;
        if run.killed { app.kill_and_restart().await } else { app.restart().await }
    }
    // On a broker of its own, a kill of the router returns what was handed out behind what was not.
    traffic.finish(kind == BrokerKind::Embedded).await;
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
