//! Prometheus metrics, prefixed `backbone_` (contract, section 10). Cardinality does not grow with clients.

use prometheus::{Encoder as _, IntCounter, IntCounterVec, Opts, Registry, TextEncoder};

use crate::broker::DeadReason;

/// All metrics. Fields are the handles that the hot path increments.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Messages accepted with a 202, duplicates included.
    pub accepted: IntCounter,
    /// Own ids that had been seen before.
    pub duplicates: IntCounter,
    /// Copies put into inboxes.
    pub routed: IntCounter,
    /// Messages settled by their receivers (pulled, pushed, acknowledged).
    pub delivered: IntCounter,
    /// Messages that no pattern matched.
    pub unrouted: IntCounter,
    /// Dead letters, by reason.
    dead: Vec<IntCounter>,
    /// HTTP requests by route pattern and status.
    pub requests: IntCounterVec,
    /// Actor restarts, by kind of actor.
    pub actor_restarts: IntCounterVec,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let registry = Registry::new();
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(format!("backbone_{name}"), help).expect("metric names are constants");
            registry.register(Box::new(counter.clone())).expect("each metric is registered once");
            counter
        };
        let vec = |name: &str, help: &str, labels: &[&str]| {
            let vec = IntCounterVec::new(Opts::new(format!("backbone_{name}"), help), labels)
                .expect("metric names are constants");
            registry.register(Box::new(vec.clone())).expect("each metric is registered once");
            vec
        };
        let dead_by_reason = vec("messages_dead_total", "Messages that became dead letters, by reason.", &["reason"]);
        Self {
            accepted: counter("messages_accepted_total", "Messages accepted, duplicates included."),
            duplicates: counter("messages_duplicates_total", "Messages whose own id had been seen before."),
            routed: counter("messages_routed_total", "Copies put into inboxes."),
            delivered: counter("messages_delivered_total", "Copies settled by their receivers."),
            unrouted: counter("messages_unrouted_total", "Messages that no subscription matched."),
            dead: DeadReason::ALL.iter().map(|reason| dead_by_reason.with_label_values(&[reason.as_str()])).collect(),
            requests: vec("requests_total", "HTTP requests, by route and status.", &["route", "status"]),
            actor_restarts: vec("actor_restarts_total", "Restarts of actors, by kind.", &["actor"]),
            registry,
        }
    }

    /// Dead letters of one reason.
    pub fn dead(&self, reason: DeadReason) -> &IntCounter {
        &self.dead[DeadReason::ALL.iter().position(|r| *r == reason).expect("ALL has every reason")]
    }

    /// The Prometheus text format, version 0.0.4.
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("writing to memory");
        String::from_utf8(text).expect("the text format is UTF-8")
    }
}
