//! A broker and the control plane on it, in this process and without HTTP: what only its own messages can ask for, such as
//! a panic.

use std::sync::Arc;
use std::time::Duration;

use actix::Addr;
use backbone::actors::ActorKind;
use backbone::actors::registry::{
    ActorState, ActorStates, ClientRegistry, CreateClient, GetActorStates, GetReadiness, InjectPanic, Readiness,
    RegistryParts, Shutdown,
};
use backbone::client::{ClientId, Limits};
use backbone::db::Db;
use backbone::directory::Directory;
use backbone::store::Store;
use backbone::telemetry::Telemetry;
use backbone::token::TokenSecret;
use backbone::topic::Pattern;
use tempfile::TempDir;

use super::BrokerEnv;
use super::env::client_id;
use super::fixture::{BrokerKind, Fixture};
use super::wait::{SOON, eventually, soon};

/// The control plane on a broker.
pub(crate) struct ControlPlane {
    pub(crate) env: BrokerEnv,
    pub(crate) registry: Addr<ClientRegistry>,
    pub(crate) telemetry: Telemetry,
    db: Db,
    _directory: TempDir,
}

impl Fixture for ControlPlane {
    async fn start(kind: BrokerKind) -> Self {
        Self::start_with_retention(kind, Duration::from_secs(86_400)).await
    }

    async fn finish(self) {
        let shutdown = self.registry.send(Shutdown { within: SOON });
        soon("the actors stop", shutdown).await.expect("the registry answers");
        self.env.finish().await;
        self.db.close();
    }
}

impl ControlPlane {
    /// One that keeps dead letters for this long.
    pub(crate) async fn start_with_retention(kind: BrokerKind, retention: Duration) -> Self {
        let env = BrokerEnv::start(kind).await;
        let directory = tempfile::tempdir().expect("a temporary directory");
        let db = Db::open(&directory.path().join("clients.db")).expect("opens the file");
        let store = Store::open(db.clone(), &TokenSecret::generate()).await.expect("opens the store");
        let loaded = store.load().await.expect("loads");
        let telemetry = backbone::telemetry::new(0);
        let parts = RegistryParts {
            broker: env.broker(),
            store,
            directory: Arc::new(Directory::default()),
            telemetry: telemetry.clone(),
            max_message_bytes: 1 << 20,
            retention,
            pusher: None,
            attempts: None,
        };
        let registry = ClientRegistry::start(parts, loaded).expect("starts threads");
        Self { env, registry, telemetry, db, _directory: directory }
    }

    /// Onboards a client.
    pub(crate) async fn onboard(&self, name: &str, subscriptions: &[&str]) -> ClientId {
        let client_id = client_id(name);
        let subscriptions = subscriptions.iter().map(|text| Pattern::parse(text).expect("a pattern")).collect();
        let create = CreateClient {
            client_id: client_id.clone(),
            name: None,
            subscriptions,
            webhook: None,
            limits: Limits::default(),
        };
        self.registry.send(create).await.expect("the registry answers").expect("creates the client");
        client_id
    }

    /// Makes an actor panic; false when there is none just now.
    pub(crate) async fn panic(&self, client: Option<&ClientId>, kind: ActorKind) -> bool {
        let inject = InjectPanic { client: client.cloned(), kind };
        self.registry.send(inject).await.expect("the registry answers")
    }

    /// The states of a client's actors.
    pub(crate) async fn states(&self, client: &ClientId) -> ActorStates {
        let states = self.registry.send(GetActorStates(client.clone())).await.expect("the registry answers");
        states.expect("there is the client")
    }

    /// Whether all that should run does.
    pub(crate) async fn readiness(&self) -> Readiness {
        self.registry.send(GetReadiness).await.expect("the registry answers")
    }

    /// Waits until an actor of a client is in this state.
    pub(crate) async fn wait_for_state(&self, client: &ClientId, kind: ActorKind, state: ActorState) {
        eventually(&format!("the {kind} of {client} is {state:?}"), SOON, async || {
            (state_of(&self.states(client).await, kind) == state).then_some(())
        })
        .await;
    }
}

/// One of them.
pub(crate) fn state_of(states: &ActorStates, kind: ActorKind) -> ActorState {
    match kind {
        ActorKind::Forwarder => states.forwarder,
        ActorKind::Broadcaster => states.broadcaster,
        ActorKind::Subscriber => states.subscriber,
        ActorKind::Pusher => states.pusher,
        ActorKind::Publisher => panic!("the publisher is nobody's"),
    }
}
