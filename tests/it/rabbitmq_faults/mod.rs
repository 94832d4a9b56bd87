//! What RabbitMQ and the network before it do to a router, while clients send and receive: contract, section 7.
//!
//! - `broker`: a node that is killed, stopped, blocked, hung, or closes its connections.
//! - `network`: cut, silent, one-way and slow, by a proxy.
//! - `deleted`: queues and exchanges deleted by somebody else.
//! - `refused`: a queue that takes no messages.
//! - `absent`: a broker that is not there when the router starts, and TLS.
//! - `cluster`: a node of three is killed.
//! - `many`: two thousand clients.
//!
//! kill -9 of the router is in `crash`, on every broker.

mod absent;
mod broker;
mod cluster;
mod deleted;
mod many;
mod network;
mod refused;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::http::Client;
use crate::support::load::Traffic;
use crate::support::wait::{SOON, pace};
use crate::support::{TestApp, eventually};

/// How soon a sender is told that the broker is away.
const PROMPTLY: Duration = Duration::from_secs(1);

/// How often a wait that takes long says what is missing.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// A router under load, and a client that looks at it meanwhile.
struct Scene {
    app: TestApp,
    traffic: Traffic,
    witness: Client,
}

impl Scene {
    /// Begins the load.
    async fn start(mut app: TestApp) -> Self {
        let traffic = Traffic::start(&mut app, true).await;
        let witness = app.onboard("witness", &[]).await;
        let scene = Self { app, traffic, witness };
        scene.flows("before any fault").await;
        scene
    }

    /// Waits until it is ready, takes messages and hands them out.
    async fn flows(&self, after: &str) -> Duration {
        let since = Instant::now();
        let (accepted, received) = (self.traffic.load.accepted() + 100, self.traffic.received() + 100);
        let mut told = since;
        eventually(&format!("messages flow {after}"), SOON, async || {
            let (now_accepted, now_received) = (self.traffic.load.accepted(), self.traffic.received());
            let readiness = self.app.api.get("/readyz").send().await;
            // For whoever looks for what is in the way.
            if told.elapsed() > TELL_EVERY {
                told = Instant::now();
                println!(
                    "still {} to be accepted, {} to be received; {}",
                    accepted.saturating_sub(now_accepted),
                    received.saturating_sub(now_received),
                    readiness.json()
                );
            }
            (now_accepted >= accepted && now_received >= received && readiness.status == 200).then_some(())
        })
        .await;
        since.elapsed()
    }

    /// Waits until the router has noticed that the broker is away; then, for `duration`, asserts what its users see of
    /// that.
    async fn is_away(&self, reason: &str, duration: Duration) {
        self.is_out(reason, duration, async || {
            let received = self.witness.get("/receive?wait=1").send().await;
            received.problem(503, "broker_unavailable");
            let record = self.witness.record().await;
            assert_eq!(record["queues"], Value::Null, "{record}");
            assert_eq!(record["actors"]["forwarder"], "starting", "it waits for the broker: {record}");
        })
        .await;
    }

    /// The same while RabbitMQ takes no messages. What is there may still be counted, received and settled.
    async fn is_blocked(&self, reason: &str, duration: Duration) {
        self.is_out(reason, duration, async || {
            self.witness.receive("max=1").await;
            let record = self.witness.record().await;
            assert!(record["queues"]["inbox"].is_u64(), "{record}");
        })
        .await;
    }

    async fn is_out(&self, reason: &str, duration: Duration, look: impl AsyncFn()) {
        let since = Instant::now();
        eventually(&format!("/readyz says {reason:?}"), SOON, async || {
            let answer = self.app.api.get("/readyz").send().await;
            (answer.status == 503 && answer.json()["reasons"].to_string().contains(reason)).then_some(())
        })
        .await;
        let noticed = since.elapsed();
        let (mut slowest, mut calls) = (Duration::ZERO, 0);
        let mut ticks = pace(Duration::from_millis(100));
        let until = Instant::now() + duration;
        loop {
            let body = json!({"topic": "load.none", "message": "is anybody there"});
            let begun = Instant::now();
            let sent = self.witness.post("/send").json(&body).send().await;
            slowest = slowest.max(begun.elapsed());
            sent.problem(503, "broker_unavailable");
            look().await;
            let ready = self.app.api.get("/readyz").send().await.problem(503, "broker_unavailable");
            assert!(ready["reasons"].to_string().contains(reason), "{ready}");
            calls += 1;
            if Instant::now() >= until {
                break;
            }
            // The pace of the calls: what must hold is asserted of each, all the while.
            ticks.tick().await;
        }
        println!("{reason}: noticed after {noticed:?}; the slowest refusal of {calls} took {slowest:?}");
        assert!(slowest < PROMPTLY, "a refusal took {slowest:?}");
    }

    /// Ends the load and holds what came against what was sent.
    async fn finish(self) {
        self.traffic.finish(false).await;
        crate::support::fixture::Fixture::finish(self.app).await;
    }
}
