//! Many clients on one router: connections, memory, onboarding, and how soon all consumers are back after the broker
//! was restarted.

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use reqwest::Method;
use serde_json::json;

use crate::support::fixture::BrokerKind;
use crate::support::http::Client;
use crate::support::memory::resident_bytes;
use crate::support::rabbitmq::Node;
use crate::support::{TestApp, eventually};

/// Clients onboarded side by side.
const AT_ONCE: usize = 16;
const CONNECTIONS_MAX: usize = 32;
const RESIDENT_MAX: usize = 200 << 20;
/// Measured with the release build, it is several times that; this is for a debug build on a busy machine.
const ONBOARDED_PER_S_MIN: f64 = 50.0;
/// Counted from when the broker takes connections again.
const BACK: Duration = Duration::from_secs(15);
/// How long a broker with thousands of queues may take to start.
const BOOT: Duration = Duration::from_secs(90);

#[actix_rt::test]
async fn heavy_two_thousand_clients_are_back_after_a_restart_of_the_broker() {
    many(BrokerKind::RabbitmqClassic, 2000).await;
}

async fn many(kind: BrokerKind, count: usize) {
    let mut node = Node::start().await;
    let app = TestApp::start_on(kind, node.url(), &[]).await;
    let begun = Instant::now();
    let clients: Vec<Client> =
        futures_util::stream::iter(0..count).map(|n| onboard(&app, n)).buffered(AT_ONCE).collect().await;
    let per_s = count as f64 / begun.elapsed().as_secs_f64();
    println!("{per_s:.0} clients onboarded a second");
    assert!(per_s >= ONBOARDED_PER_S_MIN, "{per_s:.0} a second");
    everybody_is_reached(&clients).await;
    let resident = resident_bytes(app.router.pid());
    let connections = evaluate(&node, "length(rabbit_networking:connections()).").await;
    println!("{connections} connections, {} MiB", resident >> 20);
    assert!(connections <= CONNECTIONS_MAX, "{connections} connections");
    assert!(resident <= RESIDENT_MAX, "{} MiB", resident >> 20);

    let wanted = consumers(&node).await;
    assert!(wanted > 2 * count, "each client's outbox and notify queue are consumed: {wanted}");
    node.kill();
    node.spawn();
    let takes_connections = async || std::net::TcpStream::connect(node.amqp_address()).ok();
    eventually("the broker takes connections", BOOT, takes_connections).await;
    let up = Instant::now();
    eventually(&format!("{wanted} consumers are back"), BOOT, async || {
        (consumers(&node).await >= wanted).then_some(())
    })
    .await;
    let after = up.elapsed();
    println!("{wanted} consumers are back {after:?} after the broker took connections");
    assert!(after < BACK, "it took {after:?}");
    everybody_is_reached(&clients).await;
    let resident = resident_bytes(app.router.pid());
    println!("{} MiB after the restart", resident >> 20);
    assert!(resident <= RESIDENT_MAX, "{} MiB", resident >> 20);
}

async fn onboard(app: &TestApp, n: usize) -> Client {
    let id = format!("client-{n}");
    let body = json!({"client_id": id, "subscriptions": [format!("to.{id}")]});
    let created = app.admin(Method::POST, "/clients").json(&body).send().await.ok(201);
    let secret = created["secret"].as_str().expect("a secret").to_owned();
    Client { api: app.api.clone(), id, secret }
}

/// Each sends to its neighbour, and each receives from its other neighbour.
async fn everybody_is_reached(clients: &[Client]) {
    let pairs = clients.iter().zip(clients.iter().cycle().skip(1));
    futures_util::stream::iter(pairs)
        .for_each_concurrent(AT_ONCE, |(client, neighbour)| async move {
            client.send(&format!("to.{}", neighbour.id), json!(client.id)).await;
            assert_eq!(neighbour.receive_exactly(1, "").await[0]["sender"], client.id.as_str());
        })
        .await;
}

/// How many consumers all queues have, asked of the node itself: the management API is seconds late.
async fn consumers(node: &Node) -> usize {
    let count = "length([1 || V <- rabbit_vhost:list_names(), _ <- rabbit_amqqueue:consumers_all(V)]).";
    evaluate(node, count).await
}

async fn evaluate(node: &Node, expression: &str) -> usize {
    let said = node.ctl(&["eval", expression]).await;
    said.trim().parse().unwrap_or_else(|_| panic!("a number: {said}"))
}
