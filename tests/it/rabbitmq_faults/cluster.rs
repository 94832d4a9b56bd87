//! Three nodes, quorum queues, and one node killed after the other.

use std::time::{Duration, Instant};

use super::Scene;
use crate::support::fixture::BrokerKind;
use crate::support::rabbitmq::Cluster;
use crate::support::{TestApp, eventually};

/// How long messages may stand still after a node was killed: the other two elect leaders, and the router looks for
/// one of them.
const BACK: Duration = Duration::from_secs(20);

/// How long a node may take to catch up, on a machine that has other things to do.
const CAUGHT_UP_WITHIN: Duration = Duration::from_secs(120);

#[actix_rt::test]
async fn heavy_nothing_accepted_is_lost_when_a_node_of_three_is_killed() {
    let begun = Instant::now();
    let mut cluster = Cluster::start(3).await;
    println!("three nodes form a cluster after {:?}", begun.elapsed());
    let app = TestApp::start_on(BrokerKind::RabbitmqQuorum, cluster.url(), &[]).await;
    let scene = Scene::start(app).await;
    for killed in 0..cluster.nodes.len() {
        cluster.nodes[killed].kill();
        let after = scene.flows("with two of three nodes").await;
        println!("node {killed} was killed: messages flow after {after:?}");
        assert!(after < BACK, "it took {after:?}");
        cluster.nodes[killed].restart().await;
        println!("node {killed} is back: messages flow after {:?}", scene.flows("with three nodes again").await);
        let returned = Instant::now();
        caught_up(&cluster, killed).await;
        println!("node {killed} has what it missed after {:?}", returned.elapsed());
    }
    scene.finish().await;
}

/// Waits until each node has all that `soar-publish`, through which everything goes, had been given when this began. A
/// node that lacks some of it is of no use to a majority until it has caught up: RabbitMQ takes and hands out nothing
/// when another one goes before that (<https://www.rabbitmq.com/docs/quorum-queues>).
async fn caught_up(cluster: &Cluster, node: usize) {
    let indices = async || -> Vec<u64> {
        let said =
            cluster.nodes[node].ctl(&["eval", r#"rabbit_quorum_queue:status(<<"/">>, <<"soar-publish">>)."#]).await;
        let after = said.split("Commit Index").skip(1);
        after
            .filter_map(|text| text.split(|c: char| !c.is_ascii_digit()).find(|word| !word.is_empty())?.parse().ok())
            .collect()
    };
    let first = indices().await;
    let all = first.iter().copied().max().expect("indices of the queue's members");
    eventually(&format!("all three have up to {all} ({first:?} at first)"), CAUGHT_UP_WITHIN, async || {
        let now = indices().await;
        (now.len() == cluster.nodes.len() && now.iter().all(|index| *index >= all)).then_some(())
    })
    .await;
}
