//! What the registry knows and decides: which actors each client should have, and which it has.
//!
//! All of it lives on the registry's own thread. Operations run there as tasks of their own and share it through an
//! `Rc`; a borrow never lasts across an await.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use actix::prelude::*;
use parking_lot::RwLock;
use tokio::sync::Notify;

use super::PusherFactory;
use super::child::Child;
use super::messages::{ActorState, ActorStates, RegistryError};
use super::turns::Turns;
use crate::actors::subscriber::{Rebind, Subscriber};
use crate::actors::supervision::Arbiters;
use crate::actors::{ActorKind, Shared};
use crate::client::ClientId;
use crate::db::DbError;
use crate::directory::ClientEntry;
use crate::secret::WebhookSecrets;
use crate::store::{Store, StoredClient};
use crate::webhook::AttemptLog;

/// See the module.
pub(super) struct Core {
    pub(super) shared: Arc<Shared>,
    pub(super) store: Store,
    pub(super) turns: Turns,
    pub(super) pusher: Option<PusherFactory>,
    pub(super) attempts: Option<Arc<AttemptLog>>,
    pub(super) arbiters: Arbiters,
    pub(super) clients: RefCell<HashMap<ClientId, Client>>,
    pub(super) publisher: RefCell<Child>,
    /// Clients that are gone but for queues that could not be deleted yet.
    pub(super) leftovers: RefCell<BTreeSet<ClientId>>,
    /// Actors that live, for shutting down.
    pub(super) living: Cell<usize>,
    pub(super) all_ended: Notify,
    pub(super) stopping: Cell<bool>,
    /// Whether all clients that were there at the start have been ready once.
    pub(super) started: Cell<bool>,
    pub(super) me: Weak<Core>,
}

/// A client and its actors.
pub(super) struct Client {
    pub(super) entry: Arc<ClientEntry>,
    pub(super) webhook_secrets: Option<Arc<RwLock<WebhookSecrets>>>,
    pub(super) arbiter: usize,
    pub(super) children: [Child; ActorKind::PER_CLIENT.len()],
    /// Whether its queues are known to be there and bound.
    pub(super) bound: bool,
    phase: Phase,
    /// Made by who waits for its actors.
    changed: Option<Rc<Notify>>,
}

/// Where a client is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// It is there.
    Present,
    /// It is being deleted, and its outbox and notify queue are being forwarded, paused or not.
    Draining,
    /// It is being deleted, and what is left in its outbox and notify queue is being counted: nothing forwards it.
    Counting,
    /// Its actors are being stopped.
    Closing,
}

/// What is wanted of an actor.
enum Wanted {
    Life,
    Idle(ActorState),
}

impl Client {
    pub(super) fn child(&self, kind: ActorKind) -> &Child {
        &self.children[slot(kind)]
    }

    fn wanted(&self, kind: ActorKind, pushes: bool) -> Wanted {
        let record = &self.entry.record;
        match kind {
            _ if self.phase == Phase::Closing => Wanted::Idle(ActorState::Stopped),
            ActorKind::Subscriber => Wanted::Life,
            ActorKind::Pusher if !record.is_pushed() || !pushes || self.webhook_secrets.is_none() => {
                Wanted::Idle(ActorState::Stopped)
            }
            ActorKind::Forwarder | ActorKind::Broadcaster if self.phase == Phase::Draining => Wanted::Life,
            ActorKind::Forwarder | ActorKind::Broadcaster if self.phase == Phase::Counting => {
                Wanted::Idle(ActorState::Stopped)
            }
            _ if record.paused => Wanted::Idle(ActorState::Paused),
            _ if !self.bound => Wanted::Idle(ActorState::Starting),
            _ => Wanted::Life,
        }
    }

    /// Whether no actor lives that should not.
    pub(super) fn is_calm(&self, pushes: bool) -> bool {
        ActorKind::PER_CLIENT.iter().all(|kind| match self.wanted(*kind, pushes) {
            Wanted::Life => true,
            Wanted::Idle(_) => self.child(*kind).life.is_none(),
        })
    }

    /// Whether every actor that should be at work is.
    pub(super) fn is_ready(&self, pushes: bool) -> bool {
        ActorKind::PER_CLIENT.iter().all(|kind| match self.wanted(*kind, pushes) {
            Wanted::Life => self.child(*kind).state == ActorState::Running,
            Wanted::Idle(state) => state != ActorState::Starting,
        })
    }

    pub(super) fn states(&self) -> ActorStates {
        ActorStates {
            forwarder: self.child(ActorKind::Forwarder).state,
            broadcaster: self.child(ActorKind::Broadcaster).state,
            subscriber: self.child(ActorKind::Subscriber).state,
            pusher: self.child(ActorKind::Pusher).state,
        }
    }

    pub(super) fn announce(&self) {
        if let Some(changed) = &self.changed {
            changed.notify_waiters();
        }
    }
}

pub(super) fn slot(kind: ActorKind) -> usize {
    match kind {
        ActorKind::Forwarder => 0,
        ActorKind::Broadcaster => 1,
        ActorKind::Subscriber => 2,
        ActorKind::Pusher => 3,
        ActorKind::Publisher => unreachable!("the publisher is no client's"),
    }
}

impl Core {
    pub(super) fn new(
        shared: Arc<Shared>,
        store: Store,
        arbiters: Arbiters,
        pusher: Option<PusherFactory>,
        attempts: Option<Arc<AttemptLog>>,
    ) -> Rc<Self> {
        Rc::new_cyclic(|me| Self {
            shared,
            store,
            turns: Turns::default(),
            pusher,
            attempts,
            arbiters,
            clients: RefCell::default(),
            publisher: RefCell::default(),
            leftovers: RefCell::default(),
            living: Cell::new(0),
            all_ended: Notify::new(),
            stopping: Cell::new(false),
            started: Cell::new(false),
            me: me.clone(),
        })
    }

    pub(super) fn pushes(&self) -> bool {
        self.pusher.is_some()
    }

    /// Refuses an operation while shutting down.
    pub(super) fn check_open(&self) -> Result<(), RegistryError> {
        if self.stopping.get() { Err(RegistryError::ShuttingDown) } else { Ok(()) }
    }

    /// Whether there is such a client, though it may be about to go.
    pub(super) fn exists(&self, id: &ClientId) -> bool {
        self.clients.borrow().contains_key(id)
    }

    /// Something of a client.
    pub(super) fn with<R>(&self, id: &ClientId, look: impl FnOnce(&mut Client) -> R) -> Option<R> {
        self.clients.borrow_mut().get_mut(id).map(look)
    }

    /// The client as the store has it.
    pub(super) fn stored(&self, id: &ClientId) -> Result<StoredClient, RegistryError> {
        let client = self.with(id, |client| StoredClient {
            record: client.entry.record.clone(),
            secrets: client.entry.secrets.clone(),
            incarnation: client.entry.incarnation,
            webhook_secrets: client.webhook_secrets.as_ref().map(|secrets| secrets.read().clone()),
        });
        client.ok_or_else(|| RegistryError::NotFound(id.clone()))
    }

    /// Takes a stored client in: into the directory, and to work. `bound` says that its queues have just been made.
    pub(super) fn adopt(&self, stored: StoredClient, bound: bool) {
        let id = stored.record.client_id.clone();
        let webhook_secrets = stored.webhook_secrets.map(|secrets| Arc::new(RwLock::new(secrets)));
        let entry = Arc::new(ClientEntry {
            send_limiter: super::change::limiter(&stored.record.limits, None),
            record: stored.record,
            secrets: stored.secrets,
            incarnation: stored.incarnation,
            gate: Arc::default(),
            replaced: Default::default(),
        });
        self.shared.directory.put(Arc::clone(&entry));
        let client = Client {
            entry,
            webhook_secrets,
            arbiter: self.arbiters.assign(),
            children: Default::default(),
            bound,
            phase: Phase::Present,
            changed: None,
        };
        self.clients.borrow_mut().insert(id.clone(), client);
        self.reconcile(&id);
    }

    /// Forgets a client whose actors have ended.
    pub(super) fn forget(&self, id: &ClientId) {
        self.clients.borrow_mut().remove(id);
    }

    /// Starts what should live and does not, ends what lives and should not.
    pub(super) fn reconcile(&self, id: &ClientId) {
        self.with(id, |client| {
            for kind in ActorKind::PER_CLIENT {
                let wanted = if self.stopping.get() {
                    Wanted::Idle(ActorState::Stopped)
                } else {
                    client.wanted(kind, self.pushes())
                };
                match wanted {
                    Wanted::Idle(state) => {
                        client.children[slot(kind)].end(state);
                    }
                    Wanted::Life => {
                        let child = client.child(kind);
                        if child.life.is_none() && !child.restart_pending {
                            self.launch(id, client, kind);
                        }
                    }
                }
            }
            client.announce();
        });
    }

    /// The client's subscriber, if it lives, and which life that is.
    pub(super) fn subscriber(&self, id: &ClientId) -> Option<(Addr<Subscriber>, u32)> {
        self.with(id, |client| {
            let child = client.child(ActorKind::Subscriber);
            let addr = child.life.as_ref().filter(|life| !life.ending)?.subscriber.clone()?;
            Some((addr, child.generation))
        })
        .flatten()
    }

    /// Puts a changed client in the place of the present one and lets its actors follow. `bound_by` is the
    /// subscriber's life that has bound new patterns, if they are new.
    pub(super) fn update(&self, id: &ClientId, stored: StoredClient, bound_by: Option<u32>) {
        let changed = self.with(id, |client| {
            let old = Arc::clone(&client.entry);
            let entry = Arc::new(ClientEntry {
                send_limiter: super::change::limiter(&stored.record.limits, old.send_limiter.as_ref()),
                record: stored.record,
                secrets: stored.secrets,
                incarnation: stored.incarnation,
                gate: Arc::clone(&old.gate),
                replaced: Default::default(),
            });
            // Secrets change in place: a pusher at work takes the new ones with its next attempt.
            match (&client.webhook_secrets, stored.webhook_secrets) {
                (Some(place), Some(secrets)) => *place.write() = secrets,
                (_, secrets) => client.webhook_secrets = secrets.map(|secrets| Arc::new(RwLock::new(secrets))),
            }
            let webhook_changed = old.record.webhook != entry.record.webhook;
            client.entry = Arc::clone(&entry);
            let pusher = &mut client.children[slot(ActorKind::Pusher)];
            if webhook_changed && pusher.life.is_some() {
                // Ended, it is started again with the new settings if it is still wanted.
                pusher.end(ActorState::Stopped);
            }
            if client.phase == Phase::Present {
                self.shared.directory.put(Arc::clone(&entry));
            }
            entry
        });
        let Some(entry) = changed else { return };
        self.reconcile(id);
        if let (Some(bound_by), Some((subscriber, generation))) = (bound_by, self.subscriber(id))
            && bound_by != generation
        {
            // It died in between, and its next life began with the old patterns.
            if subscriber.try_send(Rebind(entry.record.subscriptions.clone())).is_err() {
                log::error!("the subscriber of {id} cannot be told its new patterns; it is started again");
                self.with(id, |client| client.children[slot(ActorKind::Subscriber)].cut());
            }
        }
    }

    /// Changes a client's phase.
    pub(super) fn set_phase(&self, id: &ClientId, phase: Phase) {
        self.with(id, |client| client.phase = phase);
        self.reconcile(id);
    }

    /// Waits until `reached` of the client, or until `within` has passed; says which.
    pub(super) async fn wait_until(&self, id: &ClientId, within: Duration, reached: impl Fn(&Client) -> bool) -> bool {
        let wait = async {
            loop {
                let changed = self.with(id, |client| {
                    if reached(client) { None } else { Some(Rc::clone(client.changed.get_or_insert_default())) }
                });
                match changed {
                    None => return false,
                    Some(None) => return true,
                    Some(Some(changed)) => changed.notified().await,
                }
            }
        };
        tokio::time::timeout(within, wait).await.unwrap_or(false)
    }

    /// Waits until every actor of the client that should be at work is.
    pub(super) async fn wait_until_ready(&self, id: &ClientId, within: Duration) -> bool {
        self.wait_until(id, within, |client| client.is_ready(self.pushes())).await
    }

    /// Waits until no actor of the client lives that should not; aborts those that do not end in time.
    pub(super) async fn wait_until_calm(&self, id: &ClientId, within: Duration) {
        let calm = |client: &Client| client.is_calm(self.pushes());
        if self.wait_until(id, within, calm).await {
            return;
        }
        self.with(id, |client| {
            log::warn!("actors of {id} did not stop within {} s and are aborted", within.as_secs());
            client
                .children
                .iter_mut()
                .filter(|child| child.life.as_ref().is_some_and(|life| life.ending))
                .for_each(Child::cut);
        });
        if self.exists(id) && !self.wait_until(id, within, calm).await {
            log::error!("actors of {id} cannot be aborted: their thread is busy");
        }
    }
}

/// A store's failure as the registry's.
pub(super) fn store_error(id: &ClientId) -> impl FnOnce(DbError) -> RegistryError {
    let client_id = id.clone();
    move |source| RegistryError::Store { client_id, source }
}
