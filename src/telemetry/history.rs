//! The last hour in samples: what the console's plots show. Made by an observer, read by anyone.

use std::collections::VecDeque;

use parking_lot::RwLock;
use prometheus::Histogram;
use prometheus::core::Collector as _;
use serde::Serialize;

use crate::telemetry::metrics::Metrics;
use crate::time::Timestamp;

/// Seconds between two samples that are kept.
pub const SAMPLE_EVERY_S: u64 = 5;

/// Samples kept: one hour.
const SAMPLES_KEPT: usize = 3600 / SAMPLE_EVERY_S as usize;

/// Rates and latencies over one interval, and what was there at its end.
#[derive(Debug, Clone, PartialEq, Default, Serialize, utoipa::ToSchema)]
pub struct Sample {
    /// End of the interval.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// Messages accepted a second, duplicates included.
    pub accepted: f64,
    /// Broadcasts among them.
    pub accepted_broadcasts: f64,
    /// Messages a second that reached `soar-publish`.
    pub forwarded: f64,
    /// Messages a second given to the topic exchange.
    pub published: f64,
    /// Messages a second given to the broadcast exchange.
    pub broadcasts: f64,
    /// Copies a second put into inboxes.
    pub routed: f64,
    /// Copies of broadcasts among them.
    pub routed_broadcasts: f64,
    /// Copies a second settled by their receivers.
    pub delivered: f64,
    /// Messages a second that no pattern matched.
    pub unrouted: f64,
    /// Dead letters a second.
    pub dead: f64,
    /// Webhook attempts a second.
    pub attempts: f64,
    /// Those of them that delivered.
    pub pushed: f64,
    /// Median time from acceptance to the exchange, in milliseconds; `None` without messages.
    pub hop_p50_ms: Option<f64>,
    /// 99th percentile of the same.
    pub hop_p99_ms: Option<f64>,
    /// Median time from acceptance to settlement by a receiver, in milliseconds.
    pub end_p50_ms: Option<f64>,
    /// 99th percentile of the same.
    pub end_p99_ms: Option<f64>,
    /// 99th percentile of commits, in milliseconds.
    pub commit_p99_ms: Option<f64>,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
    /// Messages in all inboxes.
    pub inbox: u64,
    /// Messages in all outboxes and notify queues.
    pub outbox: u64,
    /// Dead letters.
    pub dead_letters: u64,
}

/// The counters as they were at some time; two of them make a [`Sample`].
#[derive(Debug, Clone, Default)]
pub struct Counts {
    at: Timestamp,
    accepted: u64,
    routed: u64,
    delivered: u64,
    unrouted: u64,
    dead: u64,
    attempts: u64,
    pushed: u64,
    accepted_broadcasts: u64,
    routed_broadcasts: u64,
    forwarded_hop: Buckets,
    published_hop: Buckets,
    broadcast_hop: Buckets,
    end: Buckets,
    commit: Buckets,
}

/// A histogram's cumulative counts by upper bound, and its count of all.
#[derive(Debug, Clone, Default)]
struct Buckets {
    bounds: Vec<(f64, u64)>,
    all: u64,
}

impl Buckets {
    fn of(histogram: &Histogram) -> Self {
        let families = histogram.collect();
        let found = families.first().and_then(|family| family.get_metric().first());
        let Some(found) = found else { return Self::default() };
        let histogram = found.get_histogram();
        let bounds = histogram.get_bucket().iter().map(|b| (b.upper_bound(), b.cumulative_count())).collect();
        Self { bounds, all: histogram.get_sample_count() }
    }

    /// The quantile of what was observed since `before`, in milliseconds, linear within its bucket. `None` when
    /// nothing was.
    fn quantile_ms(&self, before: &Self, quantile: f64) -> Option<f64> {
        let all = self.all.saturating_sub(before.all);
        if all == 0 {
            return None;
        }
        let rank = quantile * all as f64;
        let (mut low, mut below) = (0.0, 0.0);
        for (index, (bound, count)) in self.bounds.iter().enumerate() {
            let earlier = before.bounds.get(index).map_or(0, |(_, count)| *count);
            let here = count.saturating_sub(earlier) as f64;
            if here >= rank && here > below {
                return Some((low + (bound - low) * (rank - below) / (here - below)) * 1000.0);
            }
            (low, below) = (*bound, here);
        }
        // Beyond the last bound all that is known is that it is beyond.
        Some(low * 1000.0)
    }
}

impl Counts {
    /// Reads the counters now. Locks each histogram for microseconds.
    pub fn read(metrics: &Metrics, at: Timestamp) -> Self {
        let steps = metrics.steps();
        let classes = crate::telemetry::metrics::ATTEMPT_CLASSES;
        Self {
            at,
            accepted: metrics.accepted.get(),
            routed: metrics.routed.get(),
            delivered: metrics.delivered.get(),
            unrouted: metrics.unrouted.get(),
            dead: metrics.dead_total(),
            attempts: classes.iter().map(|c| metrics.webhook_attempts.with_label_values(&[c]).get()).sum(),
            pushed: metrics.webhook_attempts.with_label_values(&["2xx"]).get(),
            accepted_broadcasts: steps.broadcasts_accepted.get(),
            routed_broadcasts: steps.broadcasts_routed.get(),
            forwarded_hop: Buckets::of(&steps.forwarded),
            published_hop: Buckets::of(&steps.published),
            broadcast_hop: Buckets::of(&steps.broadcast),
            end: Buckets::of(&steps.delivered),
            commit: Buckets::of(&metrics.commit_latency),
        }
    }

    /// What happened since `before`, as rates and quantiles. Depths and memory are left at 0.
    pub fn since(&self, before: &Self) -> Sample {
        let seconds = (self.at.as_millis() - before.at.as_millis()).max(1) as f64 / 1000.0;
        let rate = |now: u64, then: u64| now.saturating_sub(then) as f64 / seconds;
        Sample {
            at: self.at,
            accepted: rate(self.accepted, before.accepted),
            forwarded: rate(self.forwarded_hop.all, before.forwarded_hop.all),
            published: rate(self.published_hop.all, before.published_hop.all),
            routed: rate(self.routed, before.routed),
            delivered: rate(self.delivered, before.delivered),
            accepted_broadcasts: rate(self.accepted_broadcasts, before.accepted_broadcasts),
            broadcasts: rate(self.broadcast_hop.all, before.broadcast_hop.all),
            routed_broadcasts: rate(self.routed_broadcasts, before.routed_broadcasts),
            unrouted: rate(self.unrouted, before.unrouted),
            dead: rate(self.dead, before.dead),
            attempts: rate(self.attempts, before.attempts),
            pushed: rate(self.pushed, before.pushed),
            hop_p50_ms: self.published_hop.quantile_ms(&before.published_hop, 0.5),
            hop_p99_ms: self.published_hop.quantile_ms(&before.published_hop, 0.99),
            end_p50_ms: self.end.quantile_ms(&before.end, 0.5),
            end_p99_ms: self.end.quantile_ms(&before.end, 0.99),
            commit_p99_ms: self.commit.quantile_ms(&before.commit, 0.99),
            ..Sample::default()
        }
    }
}

/// The samples of the last hour, oldest first.
#[derive(Debug, Default)]
pub struct History {
    samples: RwLock<VecDeque<Sample>>,
}

impl History {
    /// Adds the newest sample; the oldest goes when the hour is full.
    pub fn push(&self, sample: Sample) {
        let mut samples = self.samples.write();
        if samples.len() >= SAMPLES_KEPT {
            samples.pop_front();
        }
        samples.push_back(sample);
    }

    /// The newest sample.
    pub fn last(&self) -> Option<Sample> {
        self.samples.read().back().cloned()
    }

    /// All samples, oldest first.
    pub fn all(&self) -> Vec<Sample> {
        self.samples.read().iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_readings_make_rates_and_quantiles() {
        let metrics = Metrics::new();
        let before = Counts::read(&metrics, Timestamp::from_millis(0));
        metrics.accepted.inc_by(500);
        metrics.dead(crate::broker::DeadReason::Expired).inc();
        for _ in 0..100 {
            metrics.steps().delivered.observe(0.0015);
        }
        let after = Counts::read(&metrics, Timestamp::from_millis(5000));
        let sample = after.since(&before);
        assert_eq!((sample.accepted, sample.dead), (100.0, 0.2));
        let p50 = sample.end_p50_ms.expect("there were messages");
        assert!((1.0..=2.0).contains(&p50), "{p50}");
        assert_eq!(after.since(&after).end_p50_ms, None);
    }

    #[test]
    fn the_hour_is_bounded() {
        let history = History::default();
        for millis in 0..1000 {
            history.push(Sample { at: Timestamp::from_millis(millis), ..Sample::default() });
        }
        let all = history.all();
        assert_eq!(all.len(), SAMPLES_KEPT);
        assert_eq!(all.last().map(|sample| sample.at), Some(Timestamp::from_millis(999)));
    }
}
