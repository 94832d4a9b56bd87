//! Faults of the node itself.

use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::Scene;
use crate::support::TestApp;
use crate::support::process::is_full_size;
use crate::support::rabbitmq::Node;

/// How long an alarm lasts, and a hang.
const LONG: Duration = Duration::from_secs(10);

/// Kills of the broker; a run at full size takes the ten that the project promises.
fn kills() -> usize {
    if is_full_size() { 10 } else { 3 }
}

/// How long the router may take to come back after a broker that takes connections again.
const BACK: Duration = Duration::from_secs(15);

queue_type_tests! {
    async fn heavy_nothing_accepted_is_lost_through_kills_of_the_broker(kind: BrokerKind) {
        let mut node = Node::start().await;
        let scene = Scene::start(TestApp::start_on(kind, node.url(), &[]).await).await;
        for kill in 0..kills() {
            node.kill();
            let restart = async {
                node.restart().await;
                Instant::now()
            };
            // The first time with an eye on what users see.
            let up = if kill == 0 {
                scene.is_away("RabbitMQ", Duration::from_secs(1)).await;
                restart.await
            } else {
                restart.await
            };
            scene.flows("after a kill").await;
            println!("kill {kill}: messages flow {:?} after the broker was up", up.elapsed());
            assert!(up.elapsed() < BACK, "it took {:?}", up.elapsed());
        }
        scene.finish().await;
    }

    async fn heavy_nothing_accepted_is_lost_through_an_alarm_and_what_operators_do(kind: BrokerKind) {
        let mut node = Node::start().await;
        let scene = Scene::start(TestApp::start_on(kind, node.url(), &[]).await).await;

        node.ctl(&["stop_app"]).await;
        scene.is_away("RabbitMQ", Duration::from_secs(1)).await;
        node.ctl(&["start_app"]).await;
        println!("start_app: messages flow after {:?}", scene.flows("after start_app").await);

        node.ctl(&["close_all_connections", "--global", "an operator closes them"]).await;
        println!("closed connections: messages flow after {:?}", scene.flows("after its connections were closed").await);

        node.ctl(&["set_vm_memory_high_watermark", "absolute", "1MB"]).await;
        scene.is_blocked("takes no messages", LONG).await;
        node.ctl(&["set_vm_memory_high_watermark", "0.8"]).await;
        println!("alarm: messages flow after {:?}", scene.flows("after an alarm").await);

        node.signal(Signal::STOP);
        scene.is_away("no sign of life", LONG).await;
        node.signal(Signal::CONT);
        println!("hang: messages flow after {:?}", scene.flows("after the broker hung").await);
        scene.finish().await;
        node.kill();
    }
}
