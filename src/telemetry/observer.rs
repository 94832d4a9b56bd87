//! Asks for what cannot be counted as it happens, and keeps the answers for whoever looks: the gauges, the last hour,
//! and the board that the console draws.
//!
//! One task, off the message path. It never asks faster than a tenth of its time: on a broker where a depth costs a
//! round trip, ten thousand clients' depths are minutes old rather than a load on the broker.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use parking_lot::RwLock;
use serde::Serialize;
use tokio::sync::watch;

use super::history::{Counts, SAMPLE_EVERY_S, Sample};
use super::metrics::Gauges;
use super::rates::Totals;
use super::{Telemetry, process};
use crate::actors::registry::ActorCensus;
use crate::broker::{Broker, Depths, Health, Queue};
use crate::client::ClientId;
use crate::directory::Directory;
use crate::time::Timestamp;

/// How often rates are made and gauges are set.
const TICK: Duration = Duration::from_secs(1);

/// Clients asked for in one go, before the task lets others work.
const CLIENTS_PER_STEP: usize = 128;

/// Shortest time between the starts of two rounds over all clients.
const ROUND_MIN: Duration = Duration::from_secs(2);

/// For each unit of time spent asking, this many are spent not asking.
const REST_FACTOR: u32 = 9;

/// Asks the registry how its actors are; at each tick.
pub type Census = Arc<dyn Fn() -> BoxFuture<'static, ActorCensus> + Send + Sync>;

/// What is known of one client without asking.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ClientStats {
    /// Its queues, when they were asked for last; `None` before the first time.
    pub depths: Option<Depths>,
    /// Messages a second accepted from it.
    pub sent_per_s: f64,
    /// Copies a second that it received.
    pub received_per_s: f64,
    totals: Totals,
}

/// Messages by kind of queue, all clients together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, utoipa::ToSchema)]
pub struct QueueTotals {
    /// In outboxes.
    pub outbox: u64,
    /// In notify queues.
    pub notify: u64,
    /// In inboxes.
    pub inbox: u64,
    /// Dead letters.
    pub dead: u64,
    /// In `soar-publish`.
    pub publish: u64,
    /// In `soar-unrouted`.
    pub unrouted: u64,
}

/// The state of the whole backbone at a second.
#[derive(Debug, Clone, Default)]
pub struct Overview {
    /// Rates and latencies of the last second.
    pub sample: Sample,
    /// Messages in queues.
    pub queues: QueueTotals,
    /// Clients on the backbone.
    pub clients: u64,
    /// `ready`, `blocked` or `unreachable`, and why.
    pub health: Option<Health>,
    /// Actors by kind and state, and the clients that have one in trouble.
    pub actors: ActorCensus,
}

/// What the observer found, for the console.
#[derive(Debug)]
pub struct Board {
    clients: RwLock<HashMap<ClientId, ClientStats>>,
    overview: watch::Sender<Arc<Overview>>,
}

impl Default for Board {
    fn default() -> Self {
        Self { clients: RwLock::default(), overview: watch::Sender::new(Arc::default()) }
    }
}

impl Board {
    /// What is known of a client.
    pub fn client(&self, client: &str) -> ClientStats {
        self.clients.read().get(client).copied().unwrap_or_default()
    }

    /// Calls `look` with what is known of every client, under a lock: be short.
    pub fn with_clients<R>(&self, look: impl FnOnce(&HashMap<ClientId, ClientStats>) -> R) -> R {
        look(&self.clients.read())
    }

    /// The overview, new every second. A receiver always sees the newest.
    pub fn overview(&self) -> watch::Receiver<Arc<Overview>> {
        self.overview.subscribe()
    }
}

/// See the module.
pub struct Observer {
    broker: Arc<dyn Broker>,
    directory: Arc<Directory>,
    telemetry: Telemetry,
    census: Option<Census>,
}

impl Observer {
    /// An observer of these; [`Observer::run`] sets it to work.
    pub fn new(
        broker: Arc<dyn Broker>,
        directory: Arc<Directory>,
        telemetry: Telemetry,
        census: Option<Census>,
    ) -> Self {
        Self { broker, directory, telemetry, census }
    }

    /// Observes until it is dropped. Safe to drop at any time: it holds nothing but what it looks at.
    pub async fn run(self) {
        futures_util::future::join(self.tick_forever(), self.ask_forever()).await;
    }

    async fn tick_forever(&self) {
        let mut last = Counts::read(&self.telemetry.metrics, Timestamp::now());
        let mut kept = last.clone();
        let mut ticks = tokio::time::interval(TICK);
        // After a stall: one tick, not a burst of them with the same counts.
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        ticks.tick().await;
        for tick in 1_u64.. {
            ticks.tick().await;
            let now = Counts::read(&self.telemetry.metrics, Timestamp::now());
            let mut overview = self.look().await;
            overview.sample = overview.sample_with(now.since(&last));
            if tick % SAMPLE_EVERY_S == 0 {
                self.telemetry.history.push(overview.sample_with(now.since(&kept)));
                kept = now.clone();
            }
            last = now;
            self.telemetry.board.overview.send_replace(Arc::new(overview));
        }
    }

    /// The state now, without rates; sets the gauges.
    async fn look(&self) -> Overview {
        let health = self.broker.health();
        let mut queues = self.sum_of_depths();
        if !matches!(health, Health::Unreachable(_))
            && let Ok(Ok(internal)) = tokio::time::timeout(TICK, self.broker.internal_depths()).await
        {
            for (name, depth) in internal {
                match name {
                    "soar-publish" => queues.publish = depth,
                    _ => queues.unrouted = depth,
                }
            }
        }
        let actors = match &self.census {
            Some(census) => tokio::time::timeout(TICK, census()).await.unwrap_or_default(),
            None => ActorCensus::default(),
        };
        let overview = Overview {
            sample: Sample { resident_bytes: process::read().resident_bytes, ..Sample::default() },
            queues,
            clients: self.directory.len() as u64,
            health: Some(health.clone()),
            actors,
        };
        self.telemetry.metrics.set_gauges(&Gauges {
            clients: overview.clients,
            queue_messages: overview.queues.by_kind().to_vec(),
            health,
            actors: overview.actors.counts.iter().map(|(kind, state, n)| (kind.as_str(), state.as_str(), *n)).collect(),
        });
        overview
    }

    fn sum_of_depths(&self) -> QueueTotals {
        let mut sum = QueueTotals::default();
        self.telemetry.board.with_clients(|clients| {
            for depths in clients.values().filter_map(|client| client.depths) {
                sum.outbox += depths.outbox;
                sum.notify += depths.notify;
                sum.inbox += depths.inbox;
                sum.dead += depths.dead;
            }
        });
        sum
    }

    /// Round after round over all clients: depths, ages, rates.
    async fn ask_forever(&self) {
        let mut round_before = Instant::now();
        loop {
            let started = Instant::now();
            let mut oldest = Oldest::default();
            let mut after: Option<ClientId> = None;
            loop {
                let page = self.directory.page(after.as_ref().map(ClientId::as_str), CLIENTS_PER_STEP);
                let Some(last) = page.last() else { break };
                after = Some(last.record.client_id.clone());
                let step = Instant::now();
                for entry in &page {
                    self.ask(&entry.record.client_id, &mut oldest).await;
                }
                let rest = step.elapsed() * REST_FACTOR;
                tokio::time::sleep(rest.min(Duration::from_secs(30))).await;
            }
            self.make_rates(started.duration_since(round_before));
            self.telemetry.metrics.set_oldest(&oldest.ages(Timestamp::now()));
            round_before = started;
            tokio::time::sleep(ROUND_MIN.saturating_sub(started.elapsed())).await;
        }
    }

    async fn ask(&self, client: &ClientId, oldest: &mut Oldest) {
        // An error is the broker being away, or a client deleted just now: what was known stays, or goes with the
        // client.
        let Ok(depths) = self.broker.depths(client).await else { return };
        let queues = [
            (Queue::Outbox(client.clone()), depths.outbox, &mut oldest.outbox),
            (Queue::Notify(client.clone()), depths.notify, &mut oldest.notify),
            (Queue::Inbox(client.clone()), depths.inbox, &mut oldest.inbox),
        ];
        for (queue, depth, oldest) in queues {
            if depth > 0
                && let Ok(Some(at)) = self.broker.oldest(&queue).await
            {
                *oldest = Some(oldest.map_or(at, |other| at.min(other)));
            }
        }
        if let Some(stats) = self.telemetry.board.clients.write().get_mut(client) {
            stats.depths = Some(depths);
            return;
        }
        let stats = ClientStats {
            depths: Some(depths),
            totals: self.telemetry.rates.totals(client.as_str()),
            ..ClientStats::default()
        };
        self.telemetry.board.clients.write().insert(client.clone(), stats);
    }

    /// Rates of the clients over the last round; forgets those that are gone.
    fn make_rates(&self, round: Duration) {
        let seconds = round.max(ROUND_MIN / 2).as_secs_f64();
        let exists = |client: &ClientId| self.directory.get(client.as_str()).is_some();
        let mut clients = self.telemetry.board.clients.write();
        clients.retain(|client, stats| {
            let now = self.telemetry.rates.totals(client.as_str());
            stats.sent_per_s = now.sent.saturating_sub(stats.totals.sent) as f64 / seconds;
            stats.received_per_s = now.received.saturating_sub(stats.totals.received) as f64 / seconds;
            stats.totals = now;
            exists(client)
        });
        drop(clients);
        self.telemetry.rates.retain(exists);
    }
}

/// When the oldest message came, by kind of queue.
#[derive(Debug, Default)]
struct Oldest {
    outbox: Option<Timestamp>,
    notify: Option<Timestamp>,
    inbox: Option<Timestamp>,
}

impl Oldest {
    fn ages(&self, now: Timestamp) -> Vec<(&'static str, Duration)> {
        [("outbox", self.outbox), ("notify", self.notify), ("inbox", self.inbox)]
            .into_iter()
            .filter_map(|(kind, at)| {
                let millis = now.as_millis().saturating_sub(at?.as_millis());
                Some((kind, Duration::from_millis(u64::try_from(millis).unwrap_or(0))))
            })
            .collect()
    }
}

impl QueueTotals {
    /// By kind, for the metrics.
    fn by_kind(&self) -> [(&'static str, u64); 6] {
        [
            ("outbox", self.outbox),
            ("notify", self.notify),
            ("inbox", self.inbox),
            ("dead", self.dead),
            ("publish", self.publish),
            ("unrouted", self.unrouted),
        ]
    }
}

impl Overview {
    /// Rates together with what there is.
    fn sample_with(&self, rates: Sample) -> Sample {
        Sample {
            resident_bytes: self.sample.resident_bytes,
            inbox: self.queues.inbox,
            outbox: self.queues.outbox + self.queues.notify,
            dead_letters: self.queues.dead,
            ..rates
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::embedded::{Options, open};
    use crate::client::{ClientRecord, Limits};
    use crate::directory::ClientEntry;
    use crate::secret::SecretSlots;

    fn entry(id: &ClientId) -> ClientEntry {
        ClientEntry {
            record: ClientRecord {
                client_id: id.clone(),
                name: None,
                subscriptions: Vec::new(),
                webhook: None,
                limits: Limits::default(),
                paused: false,
                created_at: Timestamp::now(),
            },
            secrets: SecretSlots::nobody(),
            incarnation: 1,
            send_limiter: None,
            gate: std::sync::Arc::default(),
            replaced: Default::default(),
        }
    }

    #[actix_rt::test]
    async fn what_lies_in_queues_is_found_and_the_deleted_are_forgotten() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let db = crate::db::Db::open(&directory.path().join("test.db")).expect("opens");
        let telemetry = crate::telemetry::new(10);
        let options = Options { dedup_window: Duration::from_secs(60) };
        let broker = open(db.clone(), options, Arc::clone(&telemetry)).await.expect("opens");
        let clients = Arc::new(Directory::default());
        let client = ClientId::parse("a").expect("an id");
        broker.declare_client(&client, &Limits::default()).await.expect("declares");
        clients.put(entry(&client));
        let message = crate::telemetry::traces::tests::message("a", Some("x.y"));
        telemetry.traces.record(&message, crate::telemetry::Step::Accepted);
        broker.publish(&Queue::Outbox(client.clone()), vec![message]).await.expect("publishes");

        let observer = Observer::new(Arc::clone(&broker), Arc::clone(&clients), Arc::clone(&telemetry), None);
        let mut oldest = Oldest::default();
        observer.ask(&client, &mut oldest).await;
        assert_eq!(oldest.ages(Timestamp::now().plus_millis(5000)).len(), 1);
        assert_eq!(telemetry.board.client("a").depths.map(|depths| depths.outbox), Some(1));
        let overview = observer.look().await;
        assert_eq!((overview.queues.outbox, overview.clients), (1, 1));
        assert!(telemetry.metrics.render().contains("backbone_queue_messages{queue=\"outbox\"} 1"));

        clients.remove(&client);
        observer.make_rates(Duration::from_secs(2));
        assert_eq!(telemetry.board.client("a"), ClientStats::default());
        assert_eq!(telemetry.rates.totals("a"), Totals::default());
        broker.close().await;
        db.close();
    }
}
