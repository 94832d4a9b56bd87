//! Prometheus metrics, prefixed `backbone_` (contract, section 10). Cardinality does not grow with clients.
//!
//! Named by Prometheus' conventions (<https://prometheus.io/docs/practices/naming/>): base units, `_total` on counters.
//! What can be counted is counted where it happens; what must be asked for (depths, the broker's state) is set by
//! whoever asks, through [`Metrics::set_gauges`]; what the kernel knows is read when the metrics are.

use std::time::Duration;

use prometheus::core::Collector;
use prometheus::{
    Counter, Encoder as _, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::actors::registry::ActorState;
use crate::broker::{DeadReason, Health};
use crate::telemetry::process;

/// Bounds of the latency histograms in seconds: fine where the backbone itself is, coarse where a message waits for
/// its receiver.
const LATENCY_BOUNDS_S: [f64; 19] = [
    0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 1800.0,
    7200.0,
];

/// Bounds of the histogram of commits and confirms in seconds.
const COMMIT_BOUNDS_S: [f64; 12] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// Classes of webhook attempts, for [`Metrics::webhook_attempts`]: the status' hundred, or why there was none.
pub const ATTEMPT_CLASSES: [&str; 8] = ["2xx", "3xx", "4xx", "5xx", "timeout", "connect", "refused", "other"];

/// States of a webhook's circuit breaker, for [`Metrics::webhook_breakers`].
pub const BREAKER_STATES: [&str; 3] = ["closed", "open", "half_open"];

/// Kinds of actors, for [`Metrics::actor_restarts`].
pub const ACTOR_KINDS: [&str; 5] = ["forwarder", "publisher", "broadcaster", "subscriber", "pusher"];

/// Kinds of queues whose oldest message has an age, for [`Metrics::set_oldest`].
const QUEUES_WITH_AGES: [&str; 3] = ["outbox", "notify", "inbox"];

const BROKER_STATES: [&str; 3] = ["ready", "blocked", "unreachable"];

/// What the steps of messages feed. Latencies count from a message's acceptance.
#[derive(Debug, Clone)]
pub struct StepMetrics {
    /// Until it was in `soar-publish`.
    pub forwarded: Histogram,
    /// Until the topic exchange had it.
    pub published: Histogram,
    /// Until the broadcast exchange had it.
    pub broadcast: Histogram,
    /// Until its receiver settled it: end to end.
    pub delivered: Histogram,
    /// Broadcasts among the accepted messages.
    pub broadcasts_accepted: IntCounter,
    /// Copies of broadcasts among those put into inboxes.
    pub broadcasts_routed: IntCounter,
}

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
    /// Copies settled by their receivers (pulled, pushed, acknowledged).
    pub delivered: IntCounter,
    /// Messages that no pattern matched.
    pub unrouted: IntCounter,
    /// Dead letters, by reason.
    dead: Vec<IntCounter>,
    /// HTTP requests by route pattern and status. Routes are the router's patterns, never a path as it came.
    pub requests: IntCounterVec,
    /// Restarts of actors, by [kind](ACTOR_KINDS).
    pub actor_restarts: IntCounterVec,
    /// Webhook attempts by [class](ATTEMPT_CLASSES).
    pub webhook_attempts: IntCounterVec,
    /// Seconds that webhook attempts took.
    pub webhook_latency: Histogram,
    /// Webhooks by the [state](BREAKER_STATES) of their breaker: whoever moves a breaker takes one from the old state
    /// and adds one to the new.
    pub webhook_breakers: IntGaugeVec,
    /// Webhooks switched off by the backbone, by reason: `gone` (410) or `failing`.
    pub webhooks_disabled: IntCounterVec,
    /// Seconds until what was handed to the broker was durable: a commit (embedded) or a confirm (AMQP).
    pub commit_latency: Histogram,
    /// Connections to the broker that were lost and made again.
    pub broker_reconnects: IntCounter,
    /// Open WebSocket connections.
    pub websockets: IntGauge,
    steps: StepMetrics,
    asked: Asked,
    process: Process,
}

/// Gauges that must be asked for.
#[derive(Debug)]
struct Asked {
    clients: IntGauge,
    queue_messages: IntGaugeVec,
    oldest_age: GaugeVec,
    broker_up: IntGauge,
    broker_state: IntGaugeVec,
    actors: IntGaugeVec,
}

#[derive(Debug)]
struct Process {
    resident: IntGauge,
    virtual_memory: IntGauge,
    cpu: Counter,
    open_fds: IntGauge,
    threads: IntGauge,
}

/// What an observer found when it asked; see [`Metrics::set_gauges`].
#[derive(Debug, Clone)]
pub struct Gauges {
    /// Clients on the backbone.
    pub clients: u64,
    /// Messages by kind of queue: `outbox`, `notify`, `inbox`, `dead`, `publish`, `unrouted`. All clients together.
    pub queue_messages: Vec<(&'static str, u64)>,
    /// The broker's state.
    pub health: Health,
    /// Actors by kind and state.
    pub actors: Vec<(&'static str, &'static str, u64)>,
}

/// Makes and registers metrics, each once, under constant names.
struct Maker(Registry);

impl Maker {
    fn register<M: Collector + Clone + 'static>(&self, metric: prometheus::Result<M>) -> M {
        let metric = metric.expect("names, labels and bounds are constants that fit");
        self.0.register(Box::new(metric.clone())).expect("each metric is registered once");
        metric
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.register(IntCounter::new(format!("backbone_{name}"), help))
    }

    /// A counter by one label, of which some values are known: these are shown from the start, so that a rate over
    /// the first increment is not lost.
    fn counters(&self, name: &str, help: &str, labels: &[&str], known: &[&str]) -> IntCounterVec {
        let vec = self.register(IntCounterVec::new(Opts::new(format!("backbone_{name}"), help), labels));
        known.iter().for_each(|value| drop(vec.with_label_values(&[value])));
        vec
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.register(IntGauge::new(format!("backbone_{name}"), help))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str], known: &[&str]) -> IntGaugeVec {
        let vec = self.register(IntGaugeVec::new(Opts::new(format!("backbone_{name}"), help), labels));
        known.iter().for_each(|value| drop(vec.with_label_values(&[value])));
        vec
    }

    fn histogram(&self, name: &str, help: &str, bounds: &[f64]) -> Histogram {
        let options = HistogramOpts::new(format!("backbone_{name}"), help).buckets(bounds.to_vec());
        self.register(Histogram::with_opts(options))
    }

    fn steps(&self) -> StepMetrics {
        let options = HistogramOpts::new(
            "backbone_hop_latency_seconds",
            "Time from a message's acceptance until it reached a hop. Includes waiting for a paused client.",
        )
        .buckets(LATENCY_BOUNDS_S.to_vec());
        let hops = self.register(HistogramVec::new(options, &["hop"]));
        StepMetrics {
            forwarded: hops.with_label_values(&["forwarded"]),
            published: hops.with_label_values(&["published"]),
            broadcast: hops.with_label_values(&["broadcast"]),
            delivered: self.histogram(
                "end_to_end_latency_seconds",
                "Time from a message's acceptance until a receiver settled its copy. Includes waiting to be asked for.",
                &LATENCY_BOUNDS_S,
            ),
            broadcasts_accepted: self
                .counter("broadcasts_accepted_total", "Broadcasts among the accepted messages, duplicates left out."),
            broadcasts_routed: self
                .counter("broadcasts_routed_total", "Copies of broadcasts among those put into inboxes."),
        }
    }

    fn asked(&self) -> Asked {
        Asked {
            clients: self.gauge("clients", "Clients on the backbone."),
            queue_messages: self.gauges(
                "queue_messages",
                "Messages in queues of a kind, all clients together: waiting, handed out and delayed.",
                &["queue"],
                &[],
            ),
            oldest_age: self.register(GaugeVec::new(
                Opts::new("backbone_oldest_message_age_seconds", "Age of the oldest message in queues of a kind."),
                &["queue"],
            )),
            broker_up: self.gauge("broker_up", "Whether the broker takes and hands out messages (1) or not (0)."),
            broker_state: self.gauges(
                "broker_state",
                "The broker's state: 1 for the one that it is in.",
                &["state"],
                &BROKER_STATES,
            ),
            actors: self.gauges("actors", "Actors by kind and state.", &["actor", "state"], &[]),
        }
    }

    fn process(&self) -> Process {
        Process {
            resident: self.gauge("process_resident_memory_bytes", "Resident memory of the process."),
            virtual_memory: self.gauge("process_virtual_memory_bytes", "Address space of the process."),
            cpu: self.register(Counter::new(
                "backbone_process_cpu_seconds_total",
                "Processor time that the process used, user and system.",
            )),
            open_fds: self.gauge("process_open_fds", "Open file descriptors of the process."),
            threads: self.gauge("process_threads", "Threads of the process."),
        }
    }

    fn build_info_and_start(&self) {
        let info = self.gauges("build_info", "Always 1; its label says what was built.", &["version"], &[]);
        info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let start: Gauge = self.register(Gauge::new(
            "backbone_process_start_time_seconds",
            "When the process started, in seconds since the Unix epoch.",
        ));
        start.set(crate::time::Timestamp::now().as_millis() as f64 / 1000.0);
    }
}

impl Metrics {
    pub(super) fn new() -> Self {
        let make = Maker(Registry::new());
        make.build_info_and_start();
        let reasons = DeadReason::ALL.map(DeadReason::as_str);
        let dead = make.counters(
            "messages_dead_total",
            "Messages that became dead letters, by reason.",
            &["reason"],
            &reasons,
        );
        Self {
            accepted: make.counter("messages_accepted_total", "Messages accepted, duplicates included."),
            duplicates: make.counter("messages_duplicates_total", "Messages whose own id had been seen before."),
            routed: make.counter("messages_routed_total", "Copies put into inboxes."),
            delivered: make.counter("messages_delivered_total", "Copies settled by their receivers."),
            unrouted: make.counter("messages_unrouted_total", "Messages that no subscription matched."),
            dead: reasons.iter().map(|reason| dead.with_label_values(&[reason])).collect(),
            requests: make.counters(
                "requests_total",
                "HTTP requests, by route pattern and status. Refused ones are those of 400 and above.",
                &["route", "status"],
                &[],
            ),
            actor_restarts: make.counters(
                "actor_restarts_total",
                "Restarts of actors, by kind.",
                &["actor"],
                &ACTOR_KINDS,
            ),
            webhook_attempts: make.counters(
                "webhook_attempts_total",
                "Webhook attempts, by class of answer.",
                &["class"],
                &ATTEMPT_CLASSES,
            ),
            webhook_latency: make.histogram(
                "webhook_attempt_duration_seconds",
                "Duration of webhook attempts.",
                &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0],
            ),
            webhook_breakers: make.gauges(
                "webhook_breakers",
                "Webhooks by the state of their circuit breaker.",
                &["state"],
                &BREAKER_STATES,
            ),
            webhooks_disabled: make.counters(
                "webhooks_disabled_total",
                "Webhooks that the backbone switched off, by reason.",
                &["reason"],
                &["gone", "failing"],
            ),
            commit_latency: make.histogram(
                "commit_latency_seconds",
                "Time until what was handed to the broker was durable: a commit or a confirm.",
                &COMMIT_BOUNDS_S,
            ),
            broker_reconnects: make.counter("broker_reconnects_total", "Broker connections lost and made again."),
            websockets: make.gauge("websocket_connections", "Open WebSocket connections."),
            steps: make.steps(),
            asked: make.asked(),
            process: make.process(),
            registry: make.0,
        }
    }

    /// Dead letters of one reason.
    pub fn dead(&self, reason: DeadReason) -> &IntCounter {
        &self.dead[DeadReason::ALL.iter().position(|r| *r == reason).expect("ALL has every reason")]
    }

    /// Dead letters of all reasons.
    pub fn dead_total(&self) -> u64 {
        self.dead.iter().map(IntCounter::get).sum()
    }

    /// What the steps of messages feed, through [`Traces`](super::Traces).
    pub fn steps(&self) -> &StepMetrics {
        &self.steps
    }

    /// Sets what must be asked for rather than counted. Called by an observer every few seconds.
    pub fn set_gauges(&self, gauges: &Gauges) {
        let int = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        self.asked.clients.set(int(gauges.clients));
        for (queue, messages) in &gauges.queue_messages {
            self.asked.queue_messages.with_label_values(&[queue]).set(int(*messages));
        }
        let state = match gauges.health {
            Health::Ready => BROKER_STATES[0],
            Health::Blocked(_) => BROKER_STATES[1],
            Health::Unreachable(_) => BROKER_STATES[2],
        };
        self.asked.broker_up.set(i64::from(gauges.health == Health::Ready));
        for name in BROKER_STATES {
            self.asked.broker_state.with_label_values(&[name]).set(i64::from(name == state));
        }
        // Each of them, also those that are none: whoever scrapes meanwhile must not find a gap, which ends an alert.
        for actor in ACTOR_KINDS {
            for state in ActorState::ALL.map(ActorState::as_str) {
                let found = gauges.actors.iter().filter(|(a, s, _)| (*a, *s) == (actor, state));
                self.asked.actors.with_label_values(&[actor, state]).set(int(found.map(|(.., count)| count).sum()));
            }
        }
    }

    /// Sets the age of the oldest message by kind of queue, where the broker knows it.
    pub fn set_oldest(&self, ages: &[(&'static str, Duration)]) {
        for queue in QUEUES_WITH_AGES {
            match ages.iter().find(|(found, _)| *found == queue) {
                Some((_, age)) => self.asked.oldest_age.with_label_values(&[queue]).set(age.as_secs_f64()),
                // A queue that became empty has no oldest message any more; that it had none before is no error.
                None => drop(self.asked.oldest_age.remove_label_values(&[queue])),
            }
        }
    }

    /// The Prometheus text format, version 0.0.4.
    pub fn render(&self) -> String {
        self.refresh_process();
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).expect("writing to memory");
        String::from_utf8(text).expect("the text format is UTF-8")
    }

    fn refresh_process(&self) {
        let int = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let stats = process::read();
        self.process.resident.set(int(stats.resident_bytes));
        self.process.virtual_memory.set(int(stats.virtual_bytes));
        // Two scrapes at once may both add the same seconds; reading again mends neither, so only ever upwards.
        self.process.cpu.inc_by((stats.cpu_s - self.process.cpu.get()).max(0.0));
        self.process.open_fds.set(int(stats.open_fds));
        self.process.threads.set(int(stats.threads));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    /// The rules that `promtool check metrics` applies (prometheus/client_golang's promlint), for what we expose.
    fn lint(text: &str) -> Vec<String> {
        let (mut helps, mut types) = (BTreeSet::new(), BTreeMap::new());
        let mut faults = Vec::new();
        for line in text.lines() {
            if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
                if help.trim().is_empty() || !helps.insert(name) {
                    faults.push(format!("{name}: no help text, or twice"));
                }
            } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
                types.insert(name, kind);
            }
        }
        for (name, kind) in &types {
            let mut fault = |what: &str| faults.push(format!("{name}: {what}"));
            if !helps.contains(name) {
                fault("no help text");
            }
            if !name.starts_with("backbone_") || !name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') {
                fault("not backbone_snake_case");
            }
            if (*kind == "counter") != name.ends_with("_total") {
                fault("counters, and only counters, end in _total");
            }
            if ["_count", "_sum", "_bucket", "_info_total"].iter().any(|end| name.ends_with(end)) {
                fault("ends like a histogram's own series");
            }
            for part in name.split('_') {
                if ["counter", "gauge", "histogram", "summary"].contains(&part) {
                    fault("names its type");
                }
                if ["ms", "milliseconds", "minutes", "hours", "kb", "mb", "kilobytes", "percent", "s"].contains(&part) {
                    fault("not a base unit");
                }
            }
        }
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let series = line.split(['{', ' ']).next().unwrap_or_default();
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|end| series.strip_suffix(end));
            if !types.contains_key(series) && base.is_none_or(|base| types.get(base) != Some(&"histogram")) {
                faults.push(format!("{series}: no type"));
            }
        }
        faults
    }

    fn filled() -> Metrics {
        let metrics = Metrics::new();
        metrics.requests.with_label_values(&["/send", "202"]).inc();
        metrics.set_oldest(&[("inbox", Duration::from_millis(1500))]);
        metrics.set_gauges(&Gauges {
            clients: 2,
            queue_messages: vec![("inbox", 5)],
            health: Health::Blocked("disk".into()),
            actors: vec![("pusher", "running", 1)],
        });
        metrics
    }

    #[test]
    fn the_names_follow_the_conventions() {
        assert_eq!(lint(&filled().render()), Vec::<String>::new());
        assert_eq!(lint("# HELP a_ms x\n# TYPE a_ms counter\nb 1\n").len(), 4);
    }

    #[test]
    fn gauges_show_what_was_found_last() {
        let metrics = filled();
        let text = metrics.render();
        for line in [
            "backbone_queue_messages{queue=\"inbox\"} 5",
            "backbone_oldest_message_age_seconds{queue=\"inbox\"} 1.5",
            "backbone_broker_up 0",
            "backbone_broker_state{state=\"blocked\"} 1",
            "backbone_broker_state{state=\"ready\"} 0",
            "backbone_messages_dead_total{reason=\"expired\"} 0",
            "backbone_actors{actor=\"pusher\",state=\"running\"} 1",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        metrics.set_oldest(&[]);
        metrics.set_gauges(&Gauges {
            clients: 0,
            queue_messages: vec![("inbox", 0)],
            health: Health::Ready,
            actors: vec![],
        });
        let text = metrics.render();
        assert!(!text.contains("oldest_message_age_seconds{"), "{text}");
        assert!(text.contains("backbone_broker_up 1"), "{text}");
    }
}
