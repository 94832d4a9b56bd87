//! Kill -9 under load, again and again.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::support::fixture::{BrokerKind, Fixture};
use crate::support::http::Client;
use crate::support::load::{Load, Manner, Received};
use crate::support::wait::SOON;
use crate::support::{TestApp, eventually};

/// How often the router is killed.
const KILLS: usize = 20;

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

async fn kill_under_load(kind: BrokerKind) {
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
    let tasks: Vec<_> = consumers
        .iter()
        .map(|consumer| {
            let (load, client, received) = (load.clone(), consumer.client.clone(), consumer.received.clone());
            let done = Rc::clone(&done);
            actix_rt::spawn(async move { load.consume(client, received, done).await })
        })
        .collect();
    for kill in 0..KILLS {
        // At a different point of each life, always with calls under way.
        let goal = load.accepted() + 20 + 37 * (kill % 7);
        eventually("there is load", SOON, async || (load.accepted() >= goal).then_some(())).await;
        app.kill_and_restart().await;
    }
    load.stop();
    for producer in producers {
        producer.await.expect("a producer");
    }
    eventually("all that was accepted is received", SOON, async || {
        let complete = |consumer: &Consumer| consumer.received.distinct() >= load.expected(consumer.wants);
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
        println!("{}: {distinct} messages, {} of them more than once", consumer.client.id, all - distinct);
    }
    println!("{} accepted through {KILLS} kills in {:?}", load.accepted(), since.elapsed());
    assert!(since.elapsed() < BOUND, "took {:?}", since.elapsed());
    app.finish().await;
}

broker_tests! {
    async fn heavy_nothing_accepted_is_lost_through_twenty_kills(kind: &mut BrokerKind) {
        kill_under_load(*kind).await;
    }
}
