//! Three nodes, quorum queues, and one node killed after the other.

use std::time::{Duration, Instant};

use super::Scene;
use crate::support::TestApp;
use crate::support::fixture::BrokerKind;
use crate::support::rabbitmq::Cluster;

/// How long messages may stand still after a node was killed: the other two elect leaders, and the router looks for
/// one of them.
const BACK: Duration = Duration::from_secs(20);

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
    }
    scene.finish().await;
}
