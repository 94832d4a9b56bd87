//! Many clients on one router: connections, memory, onboarding, and how soon all consumers are back after the broker
//! was restarted.

use std::time::{Duration, Instant};

use backbone::broker::amqp::bare::Grounds;
use backbone::config::QueueType;
use futures_util::StreamExt as _;
use reqwest::Method;
use serde_json::json;

use crate::support::endpoint::{FakeEndpoint, Reply};
use crate::support::fixture::BrokerKind;
use crate::support::http::Client;
use crate::support::memory::resident_bytes;
use crate::support::rabbitmq::Node;
use crate::support::wait::SOON;
use crate::support::{TestApp, eventually};

/// Clients onboarded side by side.
const AT_ONCE: usize = 16;
const CONNECTIONS_MAX: usize = 32;
const RESIDENT_MAX: usize = 200 << 20;
const ONBOARDED_PER_S_MIN: f64 = 50.0;
/// On a machine where RabbitMQ itself declares clients' queues so slowly that this is more: a debug build and its client
/// share two cores with it.
const OF_BARE_MIN: f64 = 0.25;
/// Clients whose queues are declared without a router first.
const BARE: u64 = 200;
/// Counted from when the broker takes connections again.
const BACK: Duration = Duration::from_secs(15);
/// How long a broker with thousands of queues may take to start.
const BOOT: Duration = Duration::from_secs(90);

#[actix_rt::test]
async fn heavy_two_thousand_clients_are_back_after_a_restart_of_the_broker() {
    many(BrokerKind::RabbitmqClassic, 2000).await;
}

/// Each costs RabbitMQ tens of milliseconds, during which nothing else moves.
#[actix_rt::test]
async fn endpoints_that_fail_at_once_make_each_retry_queue_once() {
    const ENDPOINTS: usize = 24;
    let node = Node::start().await;
    let mut app = TestApp::start_on(BrokerKind::RabbitmqQuorum, node.url(), &[]).await;
    let failing = FakeEndpoint::start(|_, _| Reply::Status(500));
    let sender = app.onboard("sender", &[]).await;
    for n in 0..ENDPOINTS {
        let webhook = json!({"url": failing.url(), "retry_schedule_s": [40]});
        app.onboard_with(json!({"client_id": format!("c-{n}"), "subscriptions": ["x"], "webhook": webhook})).await;
    }
    let before = queues_created(&node).await;
    sender.send("x", json!(1)).await;
    let queues = "length([1 || Q <- rabbit_amqqueue:list(), {_, _, _, N} <- [element(2, Q)], \
                  binary:part(N, 0, min(byte_size(N), 11)) =:= <<\"soar-retry-\">>]).";
    // All wait in a retry queue: none is on its way any more.
    let waiting = "lists:sum([M || Q <- rabbit_amqqueue:list(), {_, _, _, N} <- [element(2, Q)], \
                   binary:part(N, 0, min(byte_size(N), 11)) =:= <<\"soar-retry-\">>, \
                   {messages, M} <- rabbit_amqqueue:info(Q, [messages])]).";
    eventually("all wait for a retry", SOON, async || (evaluate(&node, waiting).await == ENDPOINTS).then_some(()))
        .await;
    let (made, queues) = (queues_created(&node).await - before, evaluate(&node, queues).await);
    // 40 s give or take a fifth, in whole seconds.
    assert!((2..=17).contains(&queues), "{queues} retry queues");
    // Each with its seal.
    assert_eq!(made, 2 * queues, "queues were made for {queues} delays");
}

async fn many(kind: BrokerKind, count: usize) {
    let mut node = Node::start().await;
    let bare_per_s = bare_rate(&node).await;
    let app = TestApp::start_on(kind, node.url(), &[]).await;
    let begun = Instant::now();
    let clients: Vec<Client> =
        futures_util::stream::iter(0..count).map(|n| onboard(&app, n)).buffered(AT_ONCE).collect().await;
    let per_s = count as f64 / begun.elapsed().as_secs_f64();
    println!("{per_s:.0} clients onboarded a second; bare queues {bare_per_s:.0}");
    assert!(per_s >= ONBOARDED_PER_S_MIN.min(bare_per_s * OF_BARE_MIN), "{per_s:.0} a second");
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

/// Clients a second whose queues are declared side by side without a router.
async fn bare_rate(node: &Node) -> f64 {
    let grounds = Grounds::open(&node.url(), QueueType::Classic, "bare").await.expect("RabbitMQ is there");
    let declarers = futures_util::stream::iter(0..AT_ONCE).then(|_| grounds.declarer());
    let declarers: Vec<_> = declarers.map(|declarer| declarer.expect("a channel")).collect().await;
    let begun = Instant::now();
    let shares = declarers.iter().enumerate().map(async |(n, declarer)| {
        for client in (n as u64..BARE).step_by(AT_ONCE) {
            declarer.declare(client).await.expect("RabbitMQ declares them");
        }
    });
    futures_util::future::join_all(shares).await;
    let per_s = BARE as f64 / begun.elapsed().as_secs_f64();
    grounds.close(BARE).await.expect("RabbitMQ deletes them");
    per_s
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

/// How many queues the node has ever made.
async fn queues_created(node: &Node) -> usize {
    evaluate(node, "element(7, hd(ets:lookup(connection_churn_metrics, node()))).").await
}

async fn evaluate(node: &Node, expression: &str) -> usize {
    let said = node.ctl(&["eval", expression]).await;
    said.trim().parse().unwrap_or_else(|_| panic!("a number: {said}"))
}
