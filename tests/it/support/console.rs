//! `Console`: a router, and an operator's browser on it; and what flows meanwhile.

use std::time::Duration;

use serde_json::json;

use super::TestApp;
use super::browser::Browser;
use super::fixture::{BrokerKind, Fixture};
use super::http::Client;
use super::wait::pace;

/// A router and a browser that is signed in to its console.
pub(crate) struct Console {
    pub(crate) app: TestApp,
    pub(crate) browser: Browser,
}

impl Console {
    /// Starts both; the browser shows the form that asks for the token. `name` stands before its screenshots' names.
    pub(crate) async fn closed(kind: BrokerKind, name: &str) -> Self {
        let app = TestApp::start(kind).await;
        let mut browser = Browser::start(name, &app.api.url("")).await;
        browser.open("/").await;
        Self { app, browser }
    }

    /// The same, signed in.
    pub(crate) async fn open(kind: BrokerKind, name: &str) -> Self {
        let mut console = Self::closed(kind, name).await;
        console.sign_in().await;
        console
    }

    /// Gives the admin token.
    pub(crate) async fn sign_in(&mut self) {
        self.browser.fill("#token", self.app.admin_token()).await;
        self.browser.press_button("Sign in").await;
        self.browser.sees("[role=status] .pill", "ready").await;
    }
}

impl Fixture for Console {
    async fn start(kind: BrokerKind) -> Self {
        let name = match kind {
            BrokerKind::Embedded => "embedded",
            BrokerKind::RabbitmqClassic => "rabbitmq-classic",
            BrokerKind::RabbitmqQuorum => "rabbitmq-quorum",
        };
        Self::open(kind, name).await
    }

    async fn finish(mut self) {
        let token = self.app.admin_token();
        let told = self.browser.requests().await.iter().any(|url| url.contains(token));
        assert!(!told, "the admin token is in a URL");
        self.browser.finish().await;
        self.app.finish().await;
    }
}

/// How long the sender rests between batches, and a receiver before it asks a router again that does not answer: the pace
/// of the traffic, which goes on whatever happens to the router.
const PACE: Duration = Duration::from_millis(50);

/// Messages on their way until it is dropped.
pub(crate) struct Traffic(Vec<actix_rt::task::JoinHandle<()>>);

impl Traffic {
    /// `sender` sends batches under `topic`, some hundred messages a second; `receivers` read them.
    pub(crate) fn between(sender: &Client, topic: &str, receivers: &[&Client]) -> Self {
        let (sender, topic) = (sender.clone(), topic.to_owned());
        let sending = actix_rt::spawn(async move {
            let mut ticks = pace(PACE);
            for n in 0_u64.. {
                let batch: Vec<_> = (0..20).map(|k| json!({"topic": topic, "message": {"n": n * 20 + k}})).collect();
                // A router that is stopped by the test refuses.
                let _ = sender.post("/send").json(&json!(batch)).try_send().await;
                ticks.tick().await;
            }
        });
        let reading = receivers.iter().map(|&receiver| {
            let receiver = receiver.clone();
            actix_rt::spawn(async move {
                let mut ticks = pace(PACE);
                loop {
                    if receiver.get("/receive?max=1000&wait=5").try_send().await.is_err() {
                        ticks.tick().await;
                    }
                }
            })
        });
        Self(reading.chain([sending]).collect())
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.0.iter().for_each(|task| task.abort());
    }
}
