//! What is counted and what is remembered of the messages' ways: metrics, traces, the live tail and the last hour,
//! behind one handle that every part of the backbone shares.
//!
//! # Layout
//! - [`metrics`]: counters, gauges and histograms for Prometheus; fields are the handles that the hot path increments.
//! - [`traces`]: the ways of the most recent messages, in a bounded ring; also what feeds latencies, rates by client
//!   and the live tail, so that a pipeline reports each step of a message once.
//! - [`rates`]: what each client sent and received, counted.
//! - [`tail`]: messages as they pass, for whoever watches a pattern.
//! - [`history`]: the last hour in samples, for the console's plots.
//! - [`observer`]: asks for what cannot be counted (depths, states), for the gauges and the console's board.
//! - [`process`]: this process's memory, processor time and files.

pub mod history;
pub mod metrics;
pub mod observer;
pub mod process;
pub mod rates;
pub mod tail;
pub mod traces;

use std::sync::Arc;

pub use history::History;
pub use metrics::Metrics;
pub use observer::{Board, Observer};
pub use rates::ClientRates;
pub use tail::Tail;
pub use traces::{Step, Traces};

/// Shared by every part that counts or traces.
pub type Telemetry = Arc<TelemetryParts>;

/// Metrics and traces.
#[derive(Debug)]
pub struct TelemetryParts {
    /// Counters, gauges, histograms.
    pub metrics: Metrics,
    /// The ways of recent messages.
    pub traces: Traces,
    /// What each client sent and received; fed by the traces' steps.
    pub rates: Arc<ClientRates>,
    /// Messages as they pass; fed by the traces' steps.
    pub tail: Arc<Tail>,
    /// The last hour.
    pub history: History,
    /// What an [`Observer`] found last.
    pub board: Board,
}

/// A telemetry that remembers the ways of `trace_messages` messages (`SOAR_TRACE_MESSAGES`; 0 for none).
pub fn new(trace_messages: usize) -> Telemetry {
    let metrics = Metrics::new();
    let (rates, tail) = (Arc::new(ClientRates::default()), Arc::new(Tail::default()));
    let traces = Traces::new(trace_messages, metrics.steps().clone(), Arc::clone(&rates), Arc::clone(&tail));
    Arc::new(TelemetryParts { metrics, traces, rates, tail, history: History::default(), board: Board::default() })
}
