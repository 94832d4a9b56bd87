//! Faults of the network between router and broker.

use std::time::Duration;

use serde_json::json;

use super::Scene;
use crate::support::TestApp;
use crate::support::http::receipts;
use crate::support::proxy::{Network, Proxy};
use crate::support::rabbitmq::VirtualHost;
use crate::support::socket::Socket;

/// How long a fault lasts.
const LONG: Duration = Duration::from_secs(10);

queue_type_tests! {
    async fn heavy_nothing_accepted_is_lost_through_a_cut_and_a_half_open_network(kind: BrokerKind) {
        let host = VirtualHost::create().await;
        let proxy = Proxy::start(host.amqp_address()).await;
        let scene = Scene::start(TestApp::start_on(kind, host.url_through(proxy.address()), &[]).await).await;

        // A cut of ten seconds.
        proxy.set(Network::Closed);
        proxy.cut();
        scene.is_away("RabbitMQ", LONG).await;
        proxy.set(Network::Good);
        println!("cut: messages flow after {:?}", scene.flows("after a cut").await);

        // A short one, again and again: what was on its way to its confirm has none.
        for _ in 0..5 {
            proxy.cut();
            scene.flows("after a short cut").await;
        }

        // Half open: nothing is closed, and nothing arrives.
        proxy.set(Network::Silent);
        scene.is_away("no sign of life", LONG).await;
        proxy.set(Network::Good);
        println!("half open: messages flow after {:?}", scene.flows("after a half-open network").await);

        // What is published arrives; the confirms do not, and then there is a cut.
        proxy.set(Network::Deaf);
        scene.is_away("no sign of life", Duration::from_secs(1)).await;
        proxy.cut();
        proxy.set(Network::Good);
        println!("deaf: messages flow after {:?}", scene.flows("after confirms were lost").await);
        scene.finish().await;
    }

    async fn a_settlement_that_waits_for_the_broker_holds_no_other_frame_up(kind: BrokerKind) {
        let host = VirtualHost::create().await;
        let proxy = Proxy::start(host.amqp_address()).await;
        let mut app = TestApp::start_on(kind, host.url_through(proxy.address()), &[]).await;
        let client = app.onboard("client", &["x"]).await;
        client.send("x", json!(1)).await;
        let mut socket = Socket::open(&client).await;
        socket.credit(1).await;
        let held = socket.messages(1).await;
        proxy.set(Network::Silent);
        socket.send(json!({"type": "nack", "receipts": receipts(&held), "delay_s": 1})).await;
        socket.send(json!({"type": "ack", "receipts": [], "ref": "after it"})).await;
        // Answered at once, as what needs no broker is.
        socket.refused("{", 400, "invalid_json").await;
        proxy.set(Network::Good);
        assert_eq!(socket.expect("settled").await["settled"], 1);
        assert_eq!(socket.expect("settled").await["ref"], "after it");
        let again = socket.messages(1).await;
        assert_eq!((&again[0]["message"], &again[0]["deliveries"]), (&json!(1), &json!(2)));
        crate::support::fixture::Fixture::finish(app).await;
    }

    async fn heavy_a_connection_that_the_network_forgot_is_noticed(kind: BrokerKind) {
        let host = VirtualHost::create().await;
        let proxy = Proxy::start(host.amqp_address()).await;
        let scene = Scene::start(TestApp::start_on(kind, host.url_through(proxy.address()), &[]).await).await;
        proxy.forget();
        scene.is_away("no sign of life", Duration::from_secs(1)).await;
        println!("forgotten: messages flow after {:?}", scene.flows("over new connections").await);
        proxy.set(Network::Slow(Duration::from_millis(20)));
        println!("slow: messages flow after {:?}", scene.flows("over a slow network").await);
        proxy.set(Network::Good);
        scene.finish().await;
    }
}
