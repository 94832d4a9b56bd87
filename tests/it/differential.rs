//! The same few thousand random patterns, topics and messages through both brokers: the same inboxes, message for
//! message.
//!
//! One seed makes one script; it is printed, and `BACKBONE_TEST_SEED` takes it again.

use std::collections::BTreeMap;

use backbone::broker::{PullMode, Queue, Target};
use backbone::client::ClientId;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use crate::support::BrokerEnv;
use crate::support::env::{client_id, delivered_bodies, forward_from, message, next, settle_all};
use crate::support::fixture::{BrokerKind, Fixture as _};

/// Rounds of a script. In each, clients come, go and bind anew; then messages are sent.
const ROUNDS: usize = 30;
/// Messages under topics in one round, and to everyone.
const TOPICS: usize = 100;
const BROADCASTS: usize = 3;
/// Clients that there are at most.
const CLIENTS: usize = 9;
/// Patterns of one client.
const PATTERNS_MAX: usize = 10;

/// Few words, so that patterns match: case counts, and so do `-` and `_`.
const WORDS: [&str; 8] = ["a", "b", "c", "A", "dd", "a-1", "_", "0"];

#[derive(Debug, Clone)]
enum Act {
    Create(String, Vec<String>),
    Bind(String, Vec<String>),
    Delete(String),
    /// Topics; the bodies are numbers that go on from the round before.
    Send(Vec<String>),
    Broadcast(usize),
}

fn topic(random: &mut StdRng) -> String {
    if random.random_ratio(1, 60) {
        // As long as a topic may be: 255 bytes in 128 words.
        return vec![*["a", "b"].choose(random).expect("there are some"); 128].join(".");
    }
    let words = random.random_range(1..=6);
    (0..words).map(|_| *WORDS.choose(random).expect("there are some")).collect::<Vec<_>>().join(".")
}

fn pattern(random: &mut StdRng) -> String {
    let words = random.random_range(1..=6);
    let mut hashes = 0;
    let word = |_| match random.random_range(0..10) {
        0 | 1 => "*",
        2 | 3 if hashes < 2 => {
            hashes += 1;
            "#"
        }
        _ => *WORDS.choose(random).expect("there are some"),
    };
    (0..words).map(word).collect::<Vec<_>>().join(".")
}

fn patterns(random: &mut StdRng) -> Vec<String> {
    let count = random.random_range(0..=PATTERNS_MAX);
    // The same one twice is allowed to happen.
    (0..count).map(|_| pattern(random)).collect()
}

/// The whole script of a seed. The first client sends, and stays.
fn script(seed: u64) -> Vec<Act> {
    let mut random = StdRng::seed_from_u64(seed);
    // At first nobody listens.
    let nobody = (0..TOPICS).map(|_| topic(&mut random)).collect();
    let mut acts = vec![Act::Create("sender".into(), Vec::new()), Act::Send(nobody)];
    let mut there: Vec<String> = Vec::new();
    for round in 0..ROUNDS {
        let names: Vec<String> = (0..CLIENTS).map(|n| format!("client-{n}")).collect();
        if let Some(name) =
            names.iter().find(|name| !there.contains(name)).filter(|_| round < CLIENTS || round % 3 == 0)
        {
            acts.push(Act::Create(name.clone(), patterns(&mut random)));
            there.push(name.clone());
        }
        if round % 4 == 3 {
            let gone = there.swap_remove(random.random_range(0..there.len()));
            acts.push(Act::Delete(gone));
        }
        for name in &there {
            if random.random_bool(0.4) {
                acts.push(Act::Bind(name.clone(), patterns(&mut random)));
            }
        }
        acts.push(Act::Send((0..TOPICS).map(|_| topic(&mut random)).collect()));
        acts.push(Act::Broadcast(BROADCASTS));
    }
    acts
}

/// What each inbox got, by client and life, and what nobody got.
type Inboxes = BTreeMap<String, Vec<String>>;

async fn play(env: &BrokerEnv, acts: &[Act]) -> Inboxes {
    let sender = client_id("sender");
    let mut inboxes = Inboxes::new();
    let mut there: BTreeMap<String, (ClientId, usize)> = BTreeMap::new();
    let mut sent = 0..;
    // Standing ones, as the router's. What a quorum queue hands to a consumer that is just ending it gives back a moment
    // later, when the next one may have been handed what is behind.
    let mut publisher = env.consume(&Queue::Publish, 256).await;
    let mut broadcaster = None;
    for (at, act) in acts.iter().enumerate() {
        match act {
            Act::Create(name, patterns) => {
                let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
                there.insert(name.clone(), (env.client(name, &patterns).await, at));
            }
            Act::Bind(name, patterns) => {
                let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
                env.bind(&there[name].0, &patterns).await;
            }
            Act::Delete(name) => {
                let (id, since) = there.remove(name).expect("the script deletes what there is");
                inboxes.insert(format!("{name} of act {since}"), drained(env, &id).await);
                env.broker().delete_client(&id).await.expect("deletes");
            }
            Act::Send(topics) => {
                let number = |topic: &String| message(&sender, Some(topic), &sent.next().expect("endless").to_string());
                let messages = topics.iter().map(number).collect();
                env.publish(&Queue::Publish, messages).await;
                forward_from(&mut publisher, Target::Topic, topics.len()).await;
            }
            Act::Broadcast(count) => {
                let number = |n| message(&sender, None, &format!("\"to all {n}\""));
                let notify = Queue::Notify(sender.clone());
                env.publish(&notify, sent.by_ref().take(*count).map(number).collect()).await;
                if broadcaster.is_none() {
                    broadcaster = Some(env.consume(&notify, 256).await);
                }
                forward_from(broadcaster.as_mut().expect("was just made"), Target::Broadcast, *count).await;
            }
        }
    }
    for (name, (id, since)) in there {
        inboxes.insert(format!("{name} of act {since}"), drained(env, &id).await);
    }
    let mut unrouted = Vec::new();
    let mut left = env.internal_depth("soar-unrouted").await;
    let mut consumer = env.consume(&Queue::Unrouted, 500).await;
    while left > 0 {
        let batch = next(&mut consumer, 500).await;
        left -= batch.len() as u64;
        unrouted.extend(delivered_bodies(&batch));
        settle_all(batch, backbone::broker::Outcome::Complete).await;
    }
    inboxes.insert("nobody".into(), unrouted);
    inboxes
}

/// Topic and body of everything in an inbox, in order.
async fn drained(env: &BrokerEnv, id: &ClientId) -> Vec<String> {
    let depth = env.depths(id).await.inbox;
    let all = env.pull_exactly(id, usize::try_from(depth).expect("fits"), PullMode::Auto).await;
    let more = env.drain(id).await;
    assert!(more.is_empty(), "{id} counts {depth} messages and has {} more", more.len());
    let line = |pulled: &backbone::broker::Pulled| {
        let topic = pulled.message.topic.as_ref().map_or("everyone", |topic| topic.as_str());
        format!("{topic} {}", String::from_utf8_lossy(pulled.message.body()))
    };
    all.iter().map(line).collect()
}

async fn routes_as_the_embedded_broker(kind: BrokerKind) {
    #[expect(clippy::disallowed_methods, reason = "a failed run is repeated with its seed")]
    let given = std::env::var("BACKBONE_TEST_SEED").ok();
    let seed = given.map_or_else(rand::random, |seed| seed.parse().expect("BACKBONE_TEST_SEED is a number"));
    println!("BACKBONE_TEST_SEED={seed}");
    let acts = script(seed);
    let mut found = Vec::new();
    for kind in [BrokerKind::Embedded, kind] {
        let env = BrokerEnv::start(kind).await;
        found.push(play(&env, &acts).await);
        env.finish().await;
    }
    let (other, embedded) = (found.pop().expect("two"), found.pop().expect("two"));
    let messages: usize = embedded.values().map(Vec::len).sum();
    let unrouted = embedded["nobody"].len();
    assert!(messages > ROUNDS * TOPICS && unrouted > 0, "a script that says something: {messages}, {unrouted}");
    assert_eq!(embedded.keys().collect::<Vec<_>>(), other.keys().collect::<Vec<_>>());
    for (inbox, expected) in &embedded {
        let came = &other[inbox];
        let differs = (0..expected.len().max(came.len())).find(|at| expected.get(*at) != came.get(*at));
        if let Some(at) = differs {
            panic!(
                "seed {seed}: message {at} of {inbox} is {:?} on RabbitMQ and {:?} in the embedded broker, of {} and {}",
                came.get(at),
                expected.get(at),
                came.len(),
                expected.len()
            );
        }
    }
}

#[actix_rt::test]
async fn rabbitmq_classic_routes_as_the_embedded_broker() {
    routes_as_the_embedded_broker(BrokerKind::RabbitmqClassic).await;
}

#[actix_rt::test]
async fn rabbitmq_quorum_routes_as_the_embedded_broker() {
    routes_as_the_embedded_broker(BrokerKind::RabbitmqQuorum).await;
}
