//! The registry and its actors at work, on the embedded broker.

mod flaky;
mod lifecycle;
mod operations;
mod scale;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use serde_json::value::RawValue;

use super::*;
use crate::broker::{Broker, Depths, PullMode, Queue, embedded};
use crate::client::{ClientId, Limits};
use crate::db::Db;
use crate::envelope::{Draft, Message, MessageId};
use crate::topic::{Pattern, Topic};
use flaky::Flaky;

/// How long a test waits for what must come.
const DEADLINE: Duration = Duration::from_secs(20);

/// A backbone without HTTP.
struct World {
    db: Db,
    broker: Arc<Flaky>,
    directory: Arc<Directory>,
    telemetry: Telemetry,
    registry: Addr<ClientRegistry>,
}

impl World {
    async fn open(directory: &Path) -> Self {
        Self::open_with(directory, &TokenSecret::parse(KEY).expect("test key"), None).await
    }

    async fn open_with(directory: &Path, key: &TokenSecret, pusher: Option<PusherFactory>) -> Self {
        let db = Db::open(&directory.join("backbone.db")).expect("opens");
        let telemetry = crate::telemetry::new(1000);
        let store = Store::open(db.clone(), key).await.expect("opens");
        let options = embedded::Options { dedup_window: Duration::from_secs(60) };
        let inner = embedded::open(db.clone(), options, Arc::clone(&telemetry)).await.expect("opens");
        let broker = Arc::new(Flaky::new(inner));
        let directory = Arc::new(Directory::default());
        let loaded = store.load().await.expect("loads");
        let parts = RegistryParts {
            broker: Arc::clone(&broker) as Arc<dyn Broker>,
            store,
            directory: Arc::clone(&directory),
            telemetry: Arc::clone(&telemetry),
            max_message_bytes: 1 << 20,
            retention: Duration::from_secs(86_400),
            pusher,
            attempts: None,
        };
        let registry = ClientRegistry::start(parts, loaded).expect("starts");
        Self { db, broker, directory, telemetry, registry }
    }

    async fn close(self) {
        self.registry.send(Shutdown { within: DEADLINE }).await.expect("answers");
        self.broker.close().await;
        self.db.close();
    }

    async fn create(&self, id: &str, patterns: &[&str]) -> Created {
        self.registry.send(new_client(id, patterns)).await.expect("answers").expect("creates")
    }

    async fn patch(&self, patch: PatchClient) -> Patched {
        self.registry.send(patch).await.expect("answers").expect("changes")
    }

    async fn send(&self, sender: &str, topic: Option<&str>, body: &str) {
        let queue = if topic.is_some() { Queue::Outbox(id(sender)) } else { Queue::Notify(id(sender)) };
        self.broker.publish(&queue, vec![message(sender, topic, body)]).await.expect("publishes");
    }

    /// The bodies of the next `count` messages in an inbox.
    async fn receive(&self, client: &str, count: usize) -> Vec<String> {
        let mut bodies = Vec::new();
        let deadline = Instant::now() + DEADLINE;
        let client = &id(client);
        while bodies.len() < count {
            assert!(Instant::now() < deadline, "{client} received only {} of {count}", bodies.len());
            let pulled = self.broker.pull(client, count - bodies.len(), Duration::from_millis(500), PullMode::Auto);
            let texts = pulled.await.expect("pulls").into_iter().map(|pulled| body_of(&pulled.message));
            bodies.extend(texts);
        }
        bodies
    }

    async fn depths(&self, client: &str) -> Depths {
        self.broker.depths(&id(client)).await.expect("counts")
    }

    async fn states(&self, client: &str) -> ActorStates {
        self.registry.send(GetActorStates(id(client))).await.expect("answers").expect("is there")
    }

    async fn until_ready(&self) {
        let mut last = Vec::new();
        let deadline = Instant::now() + DEADLINE;
        while Instant::now() < deadline {
            let readiness = self.registry.send(GetReadiness).await.expect("answers");
            if readiness.ready {
                return;
            }
            last = readiness.reasons;
            actix_rt::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("not ready: {last:?}");
    }
}

const KEY: &str = "k4.local.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

use crate::token::TokenSecret;

fn id(text: &str) -> ClientId {
    ClientId::parse(text).expect("test id")
}

fn patterns(texts: &[&str]) -> Vec<Pattern> {
    texts.iter().map(|text| Pattern::parse(text).expect("test pattern")).collect()
}

fn new_client(text: &str, subscriptions: &[&str]) -> CreateClient {
    CreateClient {
        client_id: id(text),
        name: None,
        subscriptions: patterns(subscriptions),
        webhook: None,
        limits: Limits::default(),
    }
}

fn patch(client: &str) -> PatchClient {
    PatchClient { client_id: Some(id(client)), ..PatchClient::default() }
}

fn message(sender: &str, topic: Option<&str>, body: &str) -> Message {
    let raw: &RawValue = serde_json::from_str(body).expect("test JSON");
    let draft = Draft {
        id: None::<MessageId>,
        topic: topic.map(|topic| Topic::parse(topic).expect("test topic")),
        message: raw,
        traceparent: None,
    };
    Message::accept(&id(sender), draft, Timestamp::now())
}

fn body_of(message: &Message) -> String {
    String::from_utf8(message.body().to_vec()).expect("JSON is UTF-8")
}

/// Waits until `condition` holds.
async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition().await {
        assert!(Instant::now() < deadline, "{what}: did not come");
        actix_rt::time::sleep(Duration::from_millis(2)).await;
    }
}
