//! Producers and consumers that note every message and every answer, and the reckoning at the end: what promise 2, 3 and
//! 4 of the contract come to when the router or the broker is killed in the middle.
//!
//! [`Traffic`] is a whole set of them: each manner of sending, and inboxes with patterns of several kinds.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;
use std::time::Duration;

use serde_json::{Value, json};

use super::app::TestApp;
use super::http::{Client, receipts};
use super::wait::{SOON, eventually};

/// How long a producer or consumer waits before it tries a router again that did not answer. The pace of the load: no
/// condition ends it, because calls must be under way at whatever moment the router goes and comes back.
const TRY_AGAIN: Duration = Duration::from_millis(20);

/// How a producer sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manner {
    /// One message a call, to a topic; a call without an answer may or may not have been taken.
    Single,
    /// Several a call.
    Batch(usize),
    /// Several a call as NDJSON, with own ids; a call without an answer is repeated until it has one.
    OwnIds(usize),
    /// One message a call, to everyone.
    Notify,
}

/// What became of one message, as its sender knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// A 202.
    Accepted,
    /// No answer: it may arrive.
    Unknown,
}

/// A message by its sender and the sender's count.
type Name = (String, u64);

/// What all producers and consumers of a run share.
#[derive(Clone, Default)]
pub(crate) struct Load {
    stopped: Rc<Cell<bool>>,
    accepted: Rc<Cell<usize>>,
    sent: Rc<RefCell<BTreeMap<Name, Sent>>>,
}

struct Sent {
    fate: Fate,
    /// The id that the 202 gave, or the sender's own.
    id: Option<String>,
    /// Under which topic; `None` for a broadcast.
    topic: Option<String>,
}

/// Everything that one client received, in order.
#[derive(Clone, Default)]
pub(crate) struct Received(Rc<RefCell<Vec<Value>>>);

impl Load {
    /// How many messages have a 202 so far.
    pub(crate) fn accepted(&self) -> usize {
        self.accepted.get()
    }

    /// Ends producers after their call.
    pub(crate) fn stop(&self) {
        self.stopped.set(true);
    }

    /// Sends until stopped.
    pub(crate) async fn produce(&self, client: Client, topic: String, manner: Manner) {
        let mut next = 0_u64;
        while !self.stopped.get() {
            let size = match manner {
                Manner::Single | Manner::Notify => 1,
                Manner::Batch(size) | Manner::OwnIds(size) => size as u64,
            };
            let count = next..next + size;
            next += size;
            let topic = (manner != Manner::Notify).then_some(topic.as_str());
            let items: Vec<Value> = count.clone().map(|n| item(&client.id, n, topic, manner)).collect();
            self.note(&client.id, count.clone(), Fate::Unknown, topic, &Value::Null);
            if let Some(ids) = self.send(&client, &items, manner).await {
                self.accepted.set(self.accepted.get() + items.len());
                self.note(&client.id, count, Fate::Accepted, topic, &ids);
            } else {
                actix_rt::time::sleep(TRY_AGAIN).await;
            }
        }
    }

    /// Sends one body; the ids when there is a 202.
    async fn send(&self, client: &Client, items: &[Value], manner: Manner) -> Option<Value> {
        let path = if manner == Manner::Notify { "/notify" } else { "/send" };
        eventually(&format!("{}: an answer", client.id), SOON, async || {
            let call = client.post(path);
            let call = match manner {
                Manner::Single | Manner::Notify => call.json(&items[0]),
                Manner::Batch(_) => call.json(&json!(items)),
                Manner::OwnIds(_) => {
                    let lines: String = items.iter().map(|item| format!("{item}\n")).collect();
                    call.body("application/x-ndjson", lines)
                }
            };
            let repeat = match call.try_send().await {
                Ok(answer) if answer.status == 202 => return Some(Some(answer.json()["ids"].clone())),
                // Nothing was taken, says the contract, except that 503 leaves it open.
                Ok(answer) => {
                    assert!(matches!(answer.status, 503 | 507), "{answer:?}");
                    matches!(manner, Manner::OwnIds(_)) || answer.status == 507
                }
                Err(error) => matches!(manner, Manner::OwnIds(_)) || error.is_connect(),
            };
            (!repeat).then_some(None)
        })
        .await
    }

    fn note(&self, sender: &str, count: std::ops::Range<u64>, fate: Fate, topic: Option<&str>, ids: &Value) {
        let mut sent = self.sent.borrow_mut();
        for (place, n) in count.enumerate() {
            let id = ids[place].as_str().map(str::to_owned);
            sent.insert((sender.to_owned(), n), Sent { fate, id, topic: topic.map(str::to_owned) });
        }
    }

    /// Receives with leases and acknowledges, until `done`.
    pub(crate) async fn consume(&self, client: Client, received: Received, done: Rc<Cell<bool>>) {
        while !done.get() {
            let poll = client.get("/receive?max=200&wait=1&ack=manual&lease=3600").try_send().await;
            let envelopes = match poll {
                Ok(answer) if answer.status == 200 => answer.json()["messages"].as_array().expect("messages").clone(),
                away => {
                    if let Ok(answer) = away {
                        assert_eq!(answer.status, 503, "{answer:?}");
                    }
                    actix_rt::time::sleep(TRY_AGAIN).await;
                    continue;
                }
            };
            if envelopes.is_empty() {
                continue;
            }
            let settled = json!({"receipts": receipts(&envelopes)});
            received.0.borrow_mut().extend(envelopes);
            // Without an answer they come again, which the reckoning allows.
            if let Ok(answer) = client.post("/ack").json(&settled).try_send().await {
                assert!(matches!(answer.status, 200 | 503), "{answer:?}");
            }
        }
    }

    /// Accepted messages that a client has not received although it wants their topics (`None`: a broadcast).
    pub(crate) fn missing(&self, received: &Received, wants: impl Fn(Option<&str>) -> bool) -> Vec<Name> {
        let received = received.0.borrow();
        let names: HashSet<Name> = received.iter().map(|envelope| name_of(&envelope["message"])).collect();
        let sent = self.sent.borrow();
        let accepted = sent.iter().filter(|(_, sent)| sent.fate == Fate::Accepted && wants(sent.topic.as_deref()));
        accepted.map(|(name, _)| name).filter(|name| !names.contains(*name)).cloned().collect()
    }

    /// Holds what a client received against what was sent: nothing accepted is missing, nothing came that was not sent
    /// or is not for it, copies have one id, and each sender's messages came first in the order in which they were sent.
    pub(crate) fn reckon(
        &self,
        client: &str,
        received: &Received,
        wants: impl Fn(Option<&str>) -> bool,
        ordered: bool,
    ) {
        let sent = self.sent.borrow();
        let mut first: HashMap<Name, String> = HashMap::new();
        let mut last: HashMap<String, u64> = HashMap::new();
        for envelope in received.0.borrow().iter() {
            let name = name_of(&envelope["message"]);
            assert_eq!(envelope["sender"], name.0.as_str(), "{client}: {envelope}");
            let known = sent.get(&name).unwrap_or_else(|| panic!("{client} got a phantom: {envelope}"));
            assert_eq!(envelope["topic"].as_str(), known.topic.as_deref(), "{client}: {envelope}");
            assert!(wants(known.topic.as_deref()), "{client} got what is not its own: {envelope}");
            let id = envelope["id"].as_str().expect("an id");
            if let Some(given) = &known.id {
                assert_eq!(id, given, "{client}: the id that the 202 gave: {envelope}");
            }
            match first.get(&name) {
                Some(before) => assert_eq!(id, before, "{client}: copies have one id: {envelope}"),
                None => {
                    if ordered && let Some(last) = last.insert(name.0.clone(), name.1) {
                        assert!(last < name.1, "{client}: {name:?} came after {last}");
                    }
                    first.insert(name, id.to_owned());
                }
            }
        }
        let missing = self.missing(received, wants);
        assert!(
            missing.is_empty(),
            "{client}: {} accepted ones are missing: {:?}",
            missing.len(),
            &missing[..missing.len().min(10)]
        );
    }
}

impl Received {
    /// How many different messages.
    pub(crate) fn distinct(&self) -> usize {
        let received = self.0.borrow();
        let names = received.iter().map(|envelope| envelope["message"].to_string());
        names.collect::<std::collections::HashSet<_>>().len()
    }

    /// How many in all.
    pub(crate) fn len(&self) -> usize {
        self.0.borrow().len()
    }
}

fn name_of(message: &Value) -> Name {
    (message["from"].as_str().expect("a sender").to_owned(), message["n"].as_u64().expect("a count"))
}

/// Which topics a consumer wants; `None` is a broadcast.
type Wants = fn(Option<&str>) -> bool;

/// A consumer: what it wants, and what it got.
struct Consumer {
    client: Client,
    wants: Wants,
    received: Received,
}

/// Producers of every manner, and consumers that want some of it or all.
pub(crate) struct Traffic {
    pub(crate) load: Load,
    consumers: Vec<Consumer>,
    producers: Vec<actix_rt::task::JoinHandle<()>>,
    tasks: Vec<actix_rt::task::JoinHandle<()>>,
    done: Rc<Cell<bool>>,
}

impl Traffic {
    /// Onboards them all and starts the producers; also the consumers when `consuming`, else a backlog grows.
    pub(crate) async fn start(app: &mut TestApp, consuming: bool) -> Self {
        let kinds: [(&str, &[&str], Wants); 3] = [
            ("a-only", &["load.a.*"], |topic| topic.is_none_or(|topic| topic.starts_with("load.a."))),
            ("b-only", &["*.b.#", "load.b.2"], |topic| topic.is_none_or(|topic| topic.starts_with("load.b."))),
            ("all", &["#"], |_| true),
        ];
        let mut consumers = Vec::new();
        for (id, patterns, wants) in kinds {
            consumers.push(Consumer { client: app.onboard(id, patterns).await, wants, received: Received::default() });
        }
        let load = Load::default();
        let mut producers = Vec::new();
        for (id, topic, manner) in [
            ("single", "load.a.1", Manner::Single),
            ("batch", "load.b.1", Manner::Batch(10)),
            ("own", "load.b.2", Manner::OwnIds(5)),
            ("own-single", "load.a.2", Manner::OwnIds(1)),
            ("notify", "", Manner::Notify),
        ] {
            let client = app.onboard(id, &[]).await;
            let load = load.clone();
            producers.push(actix_rt::spawn(async move { load.produce(client, topic.to_owned(), manner).await }));
        }
        let mut traffic = Self { load, consumers, producers, tasks: Vec::new(), done: Rc::default() };
        if consuming {
            traffic.consume();
        }
        traffic
    }

    fn consume(&mut self) {
        for consumer in &self.consumers {
            let (load, client, received) = (self.load.clone(), consumer.client.clone(), consumer.received.clone());
            let done = Rc::clone(&self.done);
            self.tasks.push(actix_rt::spawn(async move { load.consume(client, received, done).await }));
        }
    }

    /// How many messages came in all, copies included.
    pub(crate) fn received(&self) -> usize {
        self.consumers.iter().map(|consumer| consumer.received.len()).sum()
    }

    /// Ends the producers, waits until everything has come, and holds it against what was sent. `ordered`: nothing was
    /// delivered again, so each sender's messages came in order.
    pub(crate) async fn finish(mut self, ordered: bool) {
        self.load.stop();
        for producer in std::mem::take(&mut self.producers) {
            producer.await.expect("a producer");
        }
        if self.tasks.is_empty() {
            self.consume();
        }
        let mut before = 0;
        eventually("all that was accepted is received", SOON, async || {
            // Looked at when nothing more comes, because that takes the time of whoever receives.
            if std::mem::replace(&mut before, self.received()) != self.received() {
                return None;
            }
            // Not a count: messages whose sender had no answer come as well, perhaps before the last accepted ones.
            let complete = |consumer: &Consumer| self.load.missing(&consumer.received, consumer.wants).is_empty();
            self.consumers.iter().all(complete).then_some(())
        })
        .await;
        for consumer in &self.consumers {
            consumer.client.wait_for_depth("inbox", 0).await;
        }
        self.done.set(true);
        for task in self.tasks {
            task.await.expect("a consumer");
        }
        for consumer in &self.consumers {
            self.load.reckon(&consumer.client.id, &consumer.received, consumer.wants, ordered);
            let (all, distinct) = (consumer.received.len(), consumer.received.distinct());
            println!("{}: {distinct} messages, {} copies more", consumer.client.id, all - distinct);
        }
        println!("{} accepted", self.load.accepted());
    }
}

fn item(sender: &str, n: u64, topic: Option<&str>, manner: Manner) -> Value {
    let mut item = json!({"message": {"from": sender, "n": n, "filler": "x".repeat(200)}});
    if let Some(topic) = topic {
        item["topic"] = topic.into();
    }
    if let Manner::OwnIds(_) = manner {
        item["id"] = format!("{sender}/{n}").into();
    }
    item
}
