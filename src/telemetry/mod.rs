//! What is counted and what is remembered of the messages' ways: metrics and traces, behind one handle.

pub mod metrics;
pub mod traces;

use std::sync::Arc;

pub use metrics::Metrics;
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
}

/// A telemetry that remembers the ways of `trace_messages` messages (`SOAR_TRACE_MESSAGES`; 0 for none).
pub fn new(trace_messages: usize) -> Telemetry {
    Arc::new(TelemetryParts { metrics: Metrics::new(), traces: Traces::new(trace_messages) })
}
