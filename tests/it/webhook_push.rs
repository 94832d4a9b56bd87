//! The pusher's loop between a real broker and a real endpoint, on every broker: what becomes of each message.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use actix_rt::task::JoinHandle;
use backbone::broker::{Broker, DeadLetter, DeadReason, Outcome, PullMode, Queue, settle};
use backbone::client::{ClientId, Webhook};
use backbone::db::Db;
use backbone::db::webhooks::WebhookTables;
use backbone::secret::WebhookSecrets;
use backbone::time::Timestamp;
use backbone::webhook::push::{Condition, DISABLE_AFTER, Ending, Host, Opening, Push};
use backbone::webhook::signature::{SigningSecret, verify};
use backbone::webhook::verdict::OffReason;
use backbone::webhook::{AttemptLog, BreakerState, Breakers, Means, Sender, tls, trial};
use parking_lot::{Mutex, RwLock};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::oneshot;

use crate::support::endpoint::{FakeEndpoint, Hit, Reply};
use crate::support::env::{KillableEnv, client_id, message, own_message};
use crate::support::wait::{A_WHILE, SOON, soon};
use crate::support::{BrokerEnv, eventually};

/// What a pusher needs besides broker and endpoint.
struct Rig {
    means: Means,
    secrets: Arc<RwLock<WebhookSecrets>>,
    reports: Arc<Mutex<Vec<Condition>>>,
    _directory: TempDir,
}

impl Rig {
    async fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let db = Db::open(&directory.path().join("webhooks.db")).expect("opens");
        let telemetry = backbone::telemetry::new(1000);
        let tables = WebhookTables::open(db).await.expect("opens the tables");
        let means = Means {
            sender: Sender::new(vec!["127.0.0.0/8".parse().expect("a CIDR")], tls::connector(None).expect("no bundle")),
            log: AttemptLog::new(tables, Duration::from_secs(86_400)),
            breakers: Breakers::new(telemetry.clone()),
            telemetry,
            hands: Arc::default(),
            disable_after: DISABLE_AFTER,
        };
        let secrets = Arc::new(RwLock::new(WebhookSecrets::generate()));
        Self { means, secrets, reports: Arc::default(), _directory: directory }
    }

    /// Starts a pusher of this client on this endpoint; `settings` are the webhook's other members.
    fn push(&self, env: &BrokerEnv, client: &ClientId, url: &str, settings: Value) -> Pushing {
        let mut webhook = json!({"url": url, "timeout_s": 2, "retry_schedule_s": [1, 1]});
        settings.as_object().expect("members").iter().for_each(|(key, value)| webhook[key] = value.clone());
        let webhook: Webhook = serde_json::from_value(webhook).expect("a webhook of the test");
        assert_eq!(backbone::webhook::validate(&webhook, &["127.0.0.0/8".parse().expect("a CIDR")]), []);
        let host =
            TestHost { broker: env.broker(), inbox: Queue::Inbox(client.clone()), reports: self.reports.clone() };
        let push = Push::new(host, self.means.clone(), client.clone(), webhook, Arc::clone(&self.secrets));
        let (stop, stopped) = oneshot::channel();
        Pushing { stop, task: actix_rt::spawn(push.expect("a URL of the test").run(stopped)) }
    }

    fn breaker(&self, client: &ClientId) -> Option<BreakerState> {
        self.means.breakers.get(client)
    }

    async fn attempts(&self, client: &ClientId) -> Vec<Value> {
        let page = self.means.log.page(client, None, 5000).await.expect("reads the log");
        page.attempts.iter().map(|attempt| serde_json::to_value(attempt).expect("JSON")).collect()
    }
}

struct TestHost {
    broker: Arc<dyn Broker>,
    inbox: Queue,
    reports: Arc<Mutex<Vec<Condition>>>,
}

impl Host for TestHost {
    fn open(&self, prefetch: u32) -> Opening {
        let (broker, inbox) = (Arc::clone(&self.broker), self.inbox.clone());
        Box::pin(async move { broker.consume(&inbox, prefetch).await })
    }

    fn report(&self, condition: Condition) {
        self.reports.lock().push(condition);
    }
}

struct Pushing {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Ending>,
}

impl Pushing {
    async fn stop(self) {
        drop(self.stop);
        assert_eq!(soon("the pusher stops", self.task).await.expect("no panic"), Ending::Stopped);
    }

    /// Ends it where it stands, as a crash would.
    async fn crash(self) {
        self.task.abort();
        assert!(self.task.await.is_err());
    }

    async fn ends(self) -> Ending {
        soon("the pusher ends", self.task).await.expect("no panic")
    }
}

/// A receiver of everything under `x`, with these messages in its inbox.
async fn receiver(env: &BrokerEnv, count: u64) -> ClientId {
    let receiver = env.client("receiver", &["x"]).await;
    env.client("sender", &[]).await;
    send(env, 0, count).await;
    receiver
}

/// Sends the numbers from `from` up to `to`.
async fn send(env: &BrokerEnv, from: u64, to: u64) {
    let bodies: Vec<String> = (from..to).map(|n| n.to_string()).collect();
    let bodies: Vec<&str> = bodies.iter().map(String::as_str).collect();
    env.route(&client_id("sender"), "x", &bodies).await;
}

/// Waits until everything settled so far survives a kill; until then a message that was forwarded may be back where it
/// was (G2), and here nobody forwards it again. What is published after it is durable when this resolves, and so is it.
async fn become_durable(env: &BrokerEnv) {
    let sender = client_id("sender");
    env.publish(&Queue::Outbox(sender.clone()), vec![message(&sender, Some("y"), "0")]).await;
}

async fn inbox_is_empty(env: &BrokerEnv, client: &ClientId) {
    eventually("the inbox is empty", SOON, async || (env.depths(client).await.inbox == 0).then_some(())).await;
}

async fn dead(env: &BrokerEnv, client: &ClientId, count: u64) {
    let what = format!("{count} dead letters");
    eventually(&what, SOON, async || (env.depths(client).await.dead >= count).then_some(())).await;
}

/// How often each number came.
fn tally(hits: &[Hit]) -> BTreeMap<u64, usize> {
    let mut tally = BTreeMap::new();
    hits.iter().for_each(|hit| *tally.entry(hit.number()).or_default() += 1);
    tally
}

/// The arrivals of one message.
fn arrivals(hits: &[Hit], number: u64) -> Vec<Instant> {
    hits.iter().filter(|hit| hit.number() == number).map(|hit| hit.at).collect()
}

/// An endpoint that answers 500 until it is told to work.
fn fails_until_told() -> (FakeEndpoint, Arc<AtomicBool>) {
    let works = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&works);
    let endpoint = FakeEndpoint::start(move |_, _| Reply::Status(if told.load(Ordering::SeqCst) { 200 } else { 500 }));
    (endpoint, works)
}

/// An endpoint that is well, but refuses the numbers below this one.
fn takes_none_below(first: u64) -> FakeEndpoint {
    FakeEndpoint::start(move |hit, _| Reply::Status(if hit.number() < first { 500 } else { 200 }))
}

/// Fails `count` messages of an inbox for the first time. They are due again 1 to 3 s later.
async fn fail_once(env: &BrokerEnv, client: &ClientId, count: usize) {
    let mut consumer = env.broker().consume(&Queue::Inbox(client.clone()), 500).await.expect("consumes");
    let mut failed = 0;
    while failed < count {
        let batch = soon("messages", consumer.next(500)).await.expect("is open");
        assert!(batch.iter().all(|delivery| delivery.attempts == 0), "the machine is too slow for this test");
        let outcome = |n: usize| {
            let delay = Duration::from_millis(1000 + 2000 * n as u64 / count as u64);
            Outcome::Delay { delay, attempts: 1 }
        };
        let outcomes = batch.into_iter().enumerate().map(|(n, delivery)| (delivery, outcome(failed + n)));
        let outcomes: Vec<_> = outcomes.collect();
        failed += outcomes.len();
        settle(outcomes).await.expect("settles");
    }
}

/// Waits until `count` messages are in an inbox and due, and leaves them there.
async fn due(env: &BrokerEnv, client: &ClientId, count: usize) {
    let mut consumer = env.broker().consume(&Queue::Inbox(client.clone()), 500).await.expect("consumes");
    let mut due = Vec::new();
    while due.len() < count {
        due.extend(soon("messages", consumer.next(500)).await.expect("is open"));
    }
}

fn check_signature(hit: &Hit, secret: &str) -> bool {
    let header = |name: &str| hit.headers[name].as_str();
    let secret = SigningSecret::parse(secret).expect("a webhook secret");
    let (id, timestamp) = (header("webhook-id"), header("webhook-timestamp"));
    verify(&secret, id, timestamp, header("webhook-signature"), &hit.body, Timestamp::now()).is_ok()
}

broker_tests! {
    async fn messages_are_delivered_signed_and_gone(env: &mut BrokerEnv) {
        let (rig, endpoint) = (Rig::new().await, FakeEndpoint::healthy());
        let client = receiver(env, 100).await;
        let pushing = rig.push(env, &client, &endpoint.url(), json!({}));
        let hits = endpoint.wait_for(100).await;
        assert_eq!(tally(&hits), (0..100).map(|n| (n, 1)).collect());
        let secret = rig.secrets.read().current().to_owned();
        for hit in &hits {
            assert!(check_signature(hit, &secret));
            assert_eq!(hit.headers["webhook-id"], hit.json()["id"].as_str().expect("an id"));
        }
        assert!(endpoint.most_under_way() <= 8, "{}", endpoint.most_under_way());
        assert!(endpoint.connections() <= 8, "{}", endpoint.connections());
        inbox_is_empty(env, &client).await;
        pushing.stop().await;
        let attempts = rig.attempts(&client).await;
        assert_eq!(attempts.len(), 100);
        assert!(attempts.iter().all(|attempt| attempt["status"] == 200 && attempt["error"] == Value::Null));
        assert_eq!(rig.reports.lock()[..], [Condition::AtWork]);
        assert_eq!(rig.breaker(&client), None);
    }

    async fn an_own_id_is_signed_under_its_sender(env: &mut BrokerEnv) {
        let (rig, endpoint) = (Rig::new().await, FakeEndpoint::healthy());
        let client = receiver(env, 0).await;
        let message = own_message(&client_id("sender"), "order-7", Some("x"), "1");
        env.publish(&Queue::Publish, vec![message]).await;
        env.forward(&Queue::Publish, backbone::broker::Target::Topic, 1).await;
        let pushing = rig.push(env, &client, &endpoint.url(), json!({}));
        let hit = &endpoint.wait_for(1).await[0];
        assert_eq!(hit.headers["webhook-id"], "sender:order-7");
        assert!(check_signature(hit, rig.secrets.read().current()));
        pushing.stop().await;
    }

    async fn a_rotation_signs_with_both_secrets_at_once(env: &mut BrokerEnv) {
        let (rig, endpoint) = (Rig::new().await, FakeEndpoint::healthy());
        let client = receiver(env, 1).await;
        let pushing = rig.push(env, &client, &endpoint.url(), json!({}));
        endpoint.wait_for(1).await;
        let old = rig.secrets.read().clone();
        let now = Timestamp::now();
        let new = old.rotated(now, now.plus_millis(3_600_000));
        *rig.secrets.write() = new.clone();
        send(env, 1, 2).await;
        let hits = endpoint.wait_for(2).await;
        assert!(check_signature(&hits[1], old.current()) && check_signature(&hits[1], new.current()));
        assert!(check_signature(&hits[0], old.current()) && !check_signature(&hits[0], new.current()));
        pushing.stop().await;
    }

    async fn failures_are_retried_on_the_schedule_and_then_dead(env: &mut BrokerEnv) {
        let rig = Rig::new().await;
        let endpoint = FakeEndpoint::start(|hit, _| Reply::Status(if hit.number() == 0 { 500 } else { 200 }));
        let client = receiver(env, 3).await;
        let since = Instant::now();
        let pushing = rig.push(env, &client, &endpoint.url(), json!({}));
        dead(env, &client, 1).await;
        let hits = endpoint.hits();
        assert_eq!(tally(&hits), BTreeMap::from([(0, 3), (1, 1), (2, 1)]));
        // The others did not wait for it.
        assert!(arrivals(&hits, 2)[0] < arrivals(&hits, 0)[1]);
        for pair in arrivals(&hits, 0).windows(2) {
            assert!(pair[1] - pair[0] >= Duration::from_millis(800), "{:?}", pair[1] - pair[0]);
        }
        assert!(since.elapsed() >= Duration::from_millis(1600));
        let page = env.broker().dead_letters(&client, None, 10).await.expect("lists");
        assert_eq!((page.dead_letters[0].reason, page.dead_letters[0].attempts), (DeadReason::DeliveryFailed, 3));
        // Replayed, it starts anew.
        assert_eq!(env.broker().replay_dead(&client, None).await.expect("replays"), 1);
        endpoint.wait_for(6).await;
        pushing.stop().await;
        let statuses: Vec<_> = rig.attempts(&client).await.iter().map(|a| a["status"].as_u64()).collect();
        assert_eq!(statuses.iter().filter(|status| **status == Some(500)).count(), 4);
    }

    async fn attempts_are_counted_through_kills(env: &mut KillableEnv) {
        let (rig, endpoint) = (Rig::new().await, FakeEndpoint::start(|_, _| Reply::Status(503)));
        let client = receiver(env, 1).await;
        for attempt in 1..=3 {
            let pushing = rig.push(env, &client, &endpoint.url(), json!({}));
            endpoint.wait_for(attempt).await;
            if attempt < 3 {
                pushing.stop().await;
                become_durable(env).await;
                env.kill().await;
            } else {
                dead(env, &client, 1).await;
                pushing.stop().await;
            }
        }
        // RabbitMQ does not confirm acknowledgements: a kill of the node may bring back what was acknowledged just before
        // it, beside the copy that waits, and both come to their end.
        let most = if env.broker().name() == "embedded" { 3 } else { 9 };
        assert!((3..=most).contains(&endpoint.count()), "{}", endpoint.count());
        let page = env.broker().dead_letters(&client, None, 10).await.expect("lists");
        assert_eq!(page.dead_letters[0].attempts, 3);
    }

    async fn retry_after_is_not_undercut(env: &mut BrokerEnv) {
        let rig = Rig::new().await;
        let endpoint = FakeEndpoint::start(|_, before| match before {
            0 => Reply::retry_after(429, 3),
            1 => {
                let at = std::time::SystemTime::now() + Duration::from_secs(3);
                Reply::retry_after(503, httpdate::fmt_http_date(at))
            }
            _ => Reply::Status(200),
        });
        let client = receiver(env, 1).await;
        let pushing = rig.push(env, &client, &endpoint.url(), json!({}));
        let at = arrivals(&endpoint.wait_for(3).await, 0);
        assert!(at[1] - at[0] >= Duration::from_secs(3), "{:?}", at[1] - at[0]);
        // A date has no fractions of a second.
        assert!(at[2] - at[1] >= Duration::from_secs(2), "{:?}", at[2] - at[1]);
        assert!(at[2] - at[0] < Duration::from_secs(20));
        pushing.stop().await;
    }

    async fn a_storm_of_429_costs_few_calls_and_no_message(env: &mut BrokerEnv) {
        let rig = Rig::new().await;
        let over = Instant::now() + Duration::from_secs(4);
        let endpoint = FakeEndpoint::start(move |_, _| {
            if Instant::now() < over { Reply::retry_after(429, 1) } else { Reply::Status(200) }
        });
        let client = receiver(env, 200).await;
        let pushing = rig.push(env, &client, &endpoint.url(), json!({}));
        inbox_is_empty(env, &client).await;
        assert_eq!(env.depths(&client).await.dead, 0);
        let refused = endpoint.hits().iter().filter(|hit| hit.at < over).count();
        assert!(refused <= 30, "{refused} calls in four seconds of 429");
        assert!(tally(&endpoint.hits()).values().all(|times| *times <= 3));
        pushing.stop().await;
    }

    async fn gone_ends_it_and_leaves_the_messages_in_the_inbox(env: &mut BrokerEnv) {
        let rig = Rig::new().await;
        let endpoint = FakeEndpoint::start(|_, before| Reply::Status(if before == 0 { 410 } else { 200 }));
        let client = receiver(env, 10).await;
        let pushing = rig.push(env, &client, &endpoint.url(), json!({"concurrency": 1}));
        assert_eq!(pushing.ends().await, Ending::SwitchOff(OffReason::Gone));
        assert_eq!(endpoint.count(), 1);
        let pulled = env.pull_exactly(&client, 10, PullMode::Auto).await;
        assert_eq!(pulled.len(), 10);
        assert_eq!(env.depths(&client).await.dead, 0);
    }

    async fn nothing_but_failure_for_long_ends_it(env: &mut BrokerEnv) {
        let mut rig = Rig::new().await;
        rig.means.disable_after = Duration::from_secs(2);
        let endpoint = FakeEndpoint::start(|hit, _| if hit.number() == 0 { Reply::Status(200) } else { Reply::Close });
        let client = receiver(env, 6).await;
        let pushing = rig.push(env, &client, &endpoint.url(), json!({"concurrency": 1, "retry_schedule_s": [1, 1, 1, 1, 1]}));
        assert_eq!(pushing.ends().await, Ending::SwitchOff(OffReason::Failing));
        let hits = endpoint.hits();
        let failing = hits[hits.len() - 1].at - hits[1].at;
        assert!(failing >= Duration::from_millis(1900), "{failing:?}");
        eventually("all are back", SOON, async || {
            (env.depths(&client).await.inbox == 5).then_some(())
        }).await;
    }

    async fn failing_long_ago_and_now_is_not_failing_in_between(env: &mut BrokerEnv) {
        use backbone::db::webhooks::EndpointNotes;
        use backbone::webhook::attempts::{Attempt, AttemptId};

        let rig = Rig::new().await;
        let endpoint = FakeEndpoint::start(|_, _| Reply::Status(500));
        let client = receiver(env, 1).await;
        let (now, hour_ms) = (Timestamp::now(), 3_600_000);
        let failing_since = Some(now.plus_millis(-6 * 24 * hour_ms));
        let notes = EndpointNotes { failing_since, head: None };
        let tables = rig.means.log.tables();
        tables.note(&client, &endpoint.url(), &notes).await.expect("notes");
        let pushing = rig.push(env, &client, &endpoint.url(), json!({"retry_schedule_s": [1]}));
        dead(env, &client, 1).await;
        pushing.stop().await;
        assert_eq!(endpoint.count(), 2, "six days without a call are not six days of failure");

        tables.note(&client, &endpoint.url(), &notes).await.expect("notes");
        let at = now.plus_millis(-20 * hour_ms);
        let failure = Attempt {
            id: AttemptId::from_i64(1),
            message_id: "m".into(),
            at,
            status: Some(500),
            error: Some("answered 500".into()),
            latency_ms: 1,
            response: "".into(),
        };
        tables.append(vec![(client.clone(), failure)]).await.expect("appends");
        send(env, 1, 2).await;
        let pushing = rig.push(env, &client, &endpoint.url(), json!({}));
        assert_eq!(pushing.ends().await, Ending::SwitchOff(OffReason::Failing));
        assert_eq!(endpoint.count(), 3);
    }

    async fn the_breaker_spares_an_endpoint_that_only_fails_and_spends_no_attempts(env: &mut BrokerEnv) {
        let (rig, (endpoint, works)) = (Rig::new().await, fails_until_told());
        let client = receiver(env, 300).await;
        let pushing = rig.push(env, &client, &endpoint.url(), json!({"concurrency": 4}));
        eventually("it opens", SOON, async || (rig.breaker(&client) == Some(BreakerState::Open)).then_some(())).await;
        assert!((10..=13).contains(&endpoint.count()), "{}", endpoint.count());
        // Open for 0.5 s, 0.75 s, 1.1 s, 1.7 s …: four probes or so.
        let until = Instant::now() + Duration::from_secs(5);
        eventually("probes", SOON, async || (Instant::now() > until).then_some(())).await;
        assert!(endpoint.count() <= 20, "{}", endpoint.count());
        works.store(true, Ordering::SeqCst);
        inbox_is_empty(env, &client).await;
        assert_eq!(env.depths(&client).await.dead, 0);
        assert_eq!(rig.breaker(&client), Some(BreakerState::Closed));
        pushing.stop().await;
    }

    async fn what_is_never_taken_keeps_no_others_waiting(env: &mut BrokerEnv) {
        let (rig, endpoint) = (Rig::new().await, takes_none_below(200));
        let client = receiver(env, 0).await;
        let settings = json!({"concurrency": 4, "retry_schedule_s": vec![1; 20]});
        let pushing = rig.push(env, &client, &endpoint.url(), settings);
        // In turn, so that the breaker stays closed while each fails once.
        for n in 0..50 {
            let pair = [n.to_string(), (1000 + n).to_string()];
            env.route(&client_id("sender"), "x", &[&pair[0], &pair[1]]).await;
        }
        eventually("each was tried", SOON, async || (tally(&endpoint.hits()).len() == 100).then_some(())).await;
        eventually("closed", SOON, async || (rig.breaker(&client) == Some(BreakerState::Closed)).then_some(())).await;
        let refused = |hits: &[Hit]| hits.iter().filter(|hit| hit.number() < 200).count();
        let before = refused(&endpoint.hits());
        let mut sent = HashMap::new();
        let mut tick = tokio::time::interval(Duration::from_millis(100));
        for n in 2000..2060 {
            tick.tick().await;
            send(env, n, n + 1).await;
            sent.insert(n, Instant::now());
            assert_ne!(rig.breaker(&client), Some(BreakerState::Open));
        }
        eventually("all others come", SOON, async || {
            (tally(&endpoint.hits()).keys().filter(|n| **n >= 1000).count() == 110).then_some(())
        })
        .await;
        let hits = endpoint.hits();
        let slowest = sent.iter().map(|(n, at)| arrivals(&hits, *n)[0].saturating_duration_since(*at)).max();
        assert!(slowest < Some(Duration::from_secs(2)), "{slowest:?}");
        // Each second, or each other second where delays are rounded up.
        assert!(refused(&hits) - before > 50 * 2, "they are tried again meanwhile");
        pushing.stop().await;
    }

    async fn a_probe_is_made_with_what_has_not_failed_yet(env: &mut BrokerEnv) {
        let (rig, endpoint) = (Rig::new().await, takes_none_below(200));
        let client = receiver(env, 200).await;
        fail_once(env, &client, 200).await;
        due(env, &client, 200).await;
        send(env, 200, 210).await;
        let settings = json!({"concurrency": 32, "retry_schedule_s": [1, 1]});
        let pushing = rig.push(env, &client, &endpoint.url(), settings);
        eventually("one that is new", SOON, async || {
            endpoint.hits().iter().any(|hit| hit.number() >= 200).then_some(())
        })
        .await;
        let before = endpoint.hits().iter().take_while(|hit| hit.number() < 200).count();
        // As many as are under way when ten have failed, and a probe or two that come before the search has ended.
        assert!((10..=48).contains(&before), "{before} of those that failed before came first");
        // Nothing is lost, and none spent an attempt by being put back. Others keep the breaker from opening for long.
        let mut next = 210;
        eventually("200 dead letters", SOON * 2, async || {
            send(env, next, next + 1).await;
            next += 1;
            (env.depths(&client).await.dead >= 200).then_some(())
        })
        .await;
        let letters = env.broker().dead_letters(&client, None, 1000).await.expect("reads").dead_letters;
        assert_eq!(letters.len(), 200);
        assert!(letters.iter().all(|letter| letter.attempts == 3));
        inbox_is_empty(env, &client).await;
        let tally = tally(&endpoint.hits());
        assert_eq!(tally, (0..200).map(|n| (n, 2)).chain((200..next).map(|n| (n, 1))).collect());
        pushing.stop().await;
    }

    async fn a_probe_is_made_with_what_has_failed_when_there_is_nothing_else(env: &mut BrokerEnv) {
        let (rig, (endpoint, works)) = (Rig::new().await, fails_until_told());
        let client = receiver(env, 100).await;
        fail_once(env, &client, 100).await;
        let settings = json!({"concurrency": 1, "retry_schedule_s": [1, 600]});
        let pushing = rig.push(env, &client, &endpoint.url(), settings);
        // Ten open it. The probe after 0.5 s is a second late at the most, however many come due one after the other.
        let hits = endpoint.wait_for(11).await;
        let waited = hits[10].at - hits[9].at;
        assert!(waited < Duration::from_secs(5), "{waited:?}");
        works.store(true, Ordering::SeqCst);
        // Those that were tried wait for ten minutes; the others, also those that were put back, for some seconds.
        eventually("the others are taken", SOON * 2, async || (endpoint.count() >= 100).then_some(())).await;
        assert_eq!(rig.breaker(&client), Some(BreakerState::Closed));
        assert_eq!(tally(&endpoint.hits()), (0..100).map(|n| (n, 1)).collect());
        pushing.stop().await;
    }

    async fn concurrency_is_used_and_not_exceeded(env: &mut BrokerEnv) {
        let rig = Rig::new().await;
        let endpoint =
            FakeEndpoint::start(|_, _| Reply::After(Duration::from_millis(20), Box::new(Reply::Status(200))));
        let client = receiver(env, 300).await;
        let pushing = rig.push(env, &client, &endpoint.url(), json!({"concurrency": 16}));
        inbox_is_empty(env, &client).await;
        assert_eq!(endpoint.most_under_way(), 16);
        assert_eq!(endpoint.count(), 300);
        pushing.stop().await;
    }

    async fn a_rate_limit_spaces_attempts(env: &mut BrokerEnv) {
        let (rig, endpoint) = (Rig::new().await, FakeEndpoint::healthy());
        let client = receiver(env, 41).await;
        let pushing = rig.push(env, &client, &endpoint.url(), json!({"rate_limit_per_s": 20}));
        let hits = endpoint.wait_for(41).await;
        let took = hits[40].at - hits[0].at;
        assert!(took >= Duration::from_millis(1950) && took < Duration::from_secs(6), "{took:?}");
        for window in hits.windows(22) {
            assert!(window[21].at - window[0].at >= Duration::from_millis(990));
        }
        pushing.stop().await;
    }

    async fn an_ordered_webhook_keeps_order_through_failures_and_crashes(env: &mut KillableEnv) {
        let rig = Rig::new().await;
        let seen = Mutex::new(HashMap::<u64, usize>::new());
        // Every fourth message fails twice.
        let endpoint = FakeEndpoint::start(move |hit, _| {
            let mut seen = seen.lock();
            let times = seen.entry(hit.number()).or_default();
            *times += 1;
            Reply::Status(if hit.number() % 4 == 1 && *times <= 2 { 500 } else { 200 })
        });
        let client = receiver(env, 12).await;
        become_durable(env).await;
        let settings = json!({"ordered": true, "concurrency": 64, "retry_schedule_s": [1, 1, 1]});
        let pushing = rig.push(env, &client, &endpoint.url(), settings.clone());
        endpoint.wait_for(2).await;
        // The failure is noted before anything else is done.
        eventually("the head is noted", SOON, async || {
            let notes = rig.means.log.tables().notes(&client, &endpoint.url()).await.expect("reads");
            notes.head.filter(|head| head.attempts == 1)
        }).await;
        pushing.crash().await;
        env.kill().await;
        let pushing = rig.push(env, &client, &endpoint.url(), settings);
        eventually("the last one came", SOON, async || {
            endpoint.hits().iter().any(|hit| hit.number() == 11).then_some(())
        }).await;
        inbox_is_empty(env, &client).await;
        pushing.stop().await;
        let hits = endpoint.hits();
        let mut order: Vec<u64> = hits.iter().map(Hit::number).collect();
        order.dedup();
        // A kill may bring back what was delivered just before it.
        let tail = order.iter().rposition(|n| *n == 0).expect("the first came");
        assert_eq!(endpoint.most_under_way(), 1);
        if env.broker().name() != "embedded" {
            // A quorum queue whose node is killed while a message goes back may hand out the next one before it. It is
            // the one at the head then, and its count is forgotten; nothing else changes its place.
            let mut seen = std::collections::BTreeSet::new();
            let first: Vec<u64> = order.iter().copied().filter(|n| seen.insert(*n)).collect();
            assert_eq!(first, (0..12).collect::<Vec<_>>());
            return;
        }
        assert_eq!(order[tail..], (0..12).collect::<Vec<_>>());
        // The crash did not make it forget the first attempt: it waited out the second.
        let at = arrivals(&hits, 1);
        assert_eq!(at.len(), 3);
        assert!(at[1] - at[0] >= Duration::from_millis(800), "{:?}", at[1] - at[0]);
        let notes = rig.means.log.tables().notes(&client, &endpoint.url()).await.expect("reads");
        assert_eq!(notes.head, None);
    }

    async fn an_ordered_head_blocks_until_it_is_dead(env: &mut BrokerEnv) {
        let rig = Rig::new().await;
        let endpoint = FakeEndpoint::start(|hit, _| Reply::Status(if hit.number() == 0 { 400 } else { 200 }));
        let client = receiver(env, 3).await;
        let pushing = rig.push(env, &client, &endpoint.url(), json!({"ordered": true}));
        let order: Vec<u64> = endpoint.wait_for(5).await.iter().map(Hit::number).collect();
        assert_eq!(order, [0, 0, 0, 1, 2]);
        dead(env, &client, 1).await;
        pushing.stop().await;
    }

    async fn stopping_hands_back_what_is_in_hand(env: &mut BrokerEnv) {
        let (rig, endpoint) = (Rig::new().await, FakeEndpoint::start(|_, _| Reply::HangBefore));
        let client = receiver(env, 50).await;
        let settings = json!({"concurrency": 4, "timeout_s": 60});
        let pushing = rig.push(env, &client, &endpoint.url(), settings);
        endpoint.wait_for(4).await;
        pushing.stop().await;
        assert_eq!(env.pull_exactly(&client, 50, PullMode::Auto).await.len(), 50);
    }

    async fn stopping_waits_for_what_is_under_way(env: &mut BrokerEnv) {
        let rig = Rig::new().await;
        let endpoint =
            FakeEndpoint::start(|_, _| Reply::After(Duration::from_millis(300), Box::new(Reply::Status(200))));
        let client = receiver(env, 20).await;
        let pushing = rig.push(env, &client, &endpoint.url(), json!({"concurrency": 4}));
        endpoint.wait_for(4).await;
        pushing.stop().await;
        let (pushed, left) = (endpoint.count(), env.drain(&client).await.len());
        assert_eq!(pushed + left, 20, "each is either delivered or still there");
    }

    async fn a_hanging_endpoint_holds_nobody_else_up(env: &mut BrokerEnv) {
        let rig = Rig::new().await;
        let (hanging, healthy) = (FakeEndpoint::start(|_, _| Reply::HangBefore), FakeEndpoint::healthy());
        let slow = env.client("slow", &["x"]).await;
        let quick = receiver(env, 200).await;
        let a = rig.push(env, &slow, &hanging.url(), json!({"concurrency": 64}));
        let b = rig.push(env, &quick, &healthy.url(), json!({}));
        let since = Instant::now();
        healthy.wait_for(200).await;
        inbox_is_empty(env, &quick).await;
        assert!(since.elapsed() < Duration::from_secs(10));
        assert_eq!(env.depths(&slow).await.inbox, 200);
        a.stop().await;
        b.stop().await;
    }

    async fn a_deleted_inbox_is_reported_and_waited_for(env: &mut BrokerEnv) {
        let (rig, endpoint) = (Rig::new().await, FakeEndpoint::healthy());
        let client = receiver(env, 1).await;
        let pushing = rig.push(env, &client, &endpoint.url(), json!({}));
        endpoint.wait_for(1).await;
        inbox_is_empty(env, &client).await;
        env.broker().delete_client(&client).await.expect("deletes");
        eventually("it is reported", SOON, async || {
            rig.reports.lock().contains(&Condition::QueueMissing).then_some(())
        }).await;
        env.client("receiver", &["x"]).await;
        send(env, 1, 2).await;
        endpoint.wait_for(2).await;
        pushing.stop().await;
    }

    async fn every_message_has_one_end_whatever_the_endpoint_does(env: &mut KillableEnv) {
        const COUNT: u64 = 1500;
        let rig = Rig::new().await;
        // Each message has its fate: most are delivered at once, some later, some never.
        let seen = Mutex::new(HashMap::<u64, u64>::new());
        let endpoint = FakeEndpoint::start(move |hit, _| {
            let n = hit.number();
            let mut seen = seen.lock();
            let times = seen.entry(n).or_default();
            *times += 1;
            if n % 250 == 0 { Reply::Status(500) } else { Reply::by_fate(n, *times) }
        });
        let client = receiver(env, COUNT).await;
        become_durable(env).await;
        let pushing = rig.push(env, &client, &endpoint.url(), json!({"concurrency": 32}));
        endpoint.wait_for(200).await;
        pushing.crash().await;
        env.kill().await;
        let pushing = rig.push(env, &client, &endpoint.url(), json!({"concurrency": 32}));
        let fated: BTreeSet<u64> = (0..COUNT).filter(|n| n % 250 == 0).collect();
        // On RabbitMQ a kill may leave a copy in the retry queue and the message in the inbox: one id, one end, twice.
        eventually("each came, and the fated ones are dead", SOON * 3, async || {
            let came = tally(&endpoint.hits()).len() as u64;
            (came == COUNT && dead_numbers(env, &client).await == fated).then_some(())
        }).await;
        inbox_is_empty(env, &client).await;
        pushing.stop().await;
        assert_eq!(dead_numbers(env, &client).await, fated);
        let tally = tally(&endpoint.hits());
        assert_eq!(tally.len() as u64, COUNT, "each came");
        assert!(tally.values().all(|times| (1..=8).contains(times)), "{tally:?}");
    }

    async fn a_test_call_tells_what_came_back(env: &mut BrokerEnv) {
        let rig = Rig::new().await;
        let endpoint = FakeEndpoint::start(|_, _| Reply::Full { status: 418, headers: vec![], body: b"short".to_vec() });
        let client = receiver(env, 0).await;
        let webhook: Webhook = serde_json::from_value(json!({"url": endpoint.url()})).expect("a webhook");
        let secrets = rig.secrets.read().clone();
        let attempt = trial::run(&rig.means, &client, &webhook, &secrets).await;
        assert_eq!((attempt.status, &*attempt.response), (Some(418), "short"));
        assert!(check_signature(&endpoint.hits()[0], secrets.current()));
        assert_eq!(endpoint.hits()[0].json()["topic"], "soar.backbone.receiver.webhook-test");
        assert_eq!(rig.attempts(&client).await.len(), 1);
    }

    async fn the_reference_library_accepts_what_is_sent(env: &mut BrokerEnv) {
        let (rig, endpoint) = (Rig::new().await, FakeEndpoint::healthy());
        let client = receiver(env, 3).await;
        let old = rig.secrets.read().clone();
        let now = Timestamp::now();
        *rig.secrets.write() = old.rotated(now, now.plus_millis(60_000));
        let pushing = rig.push(env, &client, &endpoint.url(), json!({}));
        let hits = endpoint.wait_for(3).await;
        pushing.stop().await;
        for secret in [old.current(), rig.secrets.read().current()] {
            for hit in &hits {
                verify_with_reference(secret, hit);
            }
        }
    }
}

/// The numbers of a client's dead letters.
async fn dead_numbers(env: &mut KillableEnv, client: &ClientId) -> BTreeSet<u64> {
    let letters = env.broker().dead_letters(client, None, 1000).await.expect("lists").dead_letters;
    let number = |letter: &DeadLetter| {
        let body = letter.payload.message().expect("a message").body().to_vec();
        String::from_utf8(body).expect("text").parse().expect("a number")
    };
    letters.iter().map(number).collect()
}

/// Has Python's `standardwebhooks` verify what came. `scripts/test.sh` says where that Python is.
fn verify_with_reference(secret: &str, hit: &Hit) {
    const SCRIPT: &str = "
import json, sys
from standardwebhooks.webhooks import Webhook
given = json.load(sys.stdin)
assert Webhook(given['secret']).verify(given['body'], given['headers'])['message'] is not None
try:
    Webhook(given['secret']).verify(given['body'] + ' ', given['headers'])
except Exception:
    sys.exit(0)
sys.exit('accepts what was changed')
";
    #[expect(clippy::disallowed_methods, reason = "set by scripts/test.sh, for the tests only")]
    let python = std::env::var("BACKBONE_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let body = String::from_utf8(hit.body.clone()).expect("JSON is text");
    let given = json!({"secret": secret, "body": body, "headers": hit.headers}).to_string();
    let mut child = Command::new(python)
        .args(["-c", SCRIPT])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .expect("there is a Python with standardwebhooks: run scripts/test.sh");
    std::io::Write::write_all(&mut child.stdin.take().expect("piped"), given.as_bytes()).expect("writes");
    assert!(child.wait().expect("ends").success(), "the reference library refuses it");
}

#[test]
fn waiting_is_shorter_than_retrying() {
    // The tests above tell a retry from none by this.
    assert!(A_WHILE < Duration::from_millis(800));
}
