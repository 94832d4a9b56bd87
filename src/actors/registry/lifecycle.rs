//! How actors start, end and come back. See [`supervision`] for what one start means.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;

use super::child::{Child, Life, Next, words};
use super::core::{Client, Core, slot};
use super::messages::ActorState;
use super::{OnExit, PusherSeed};
use crate::actors::subscriber::{Redeclare, Subscriber};
use crate::actors::supervision::{self, Lifeline, STABLE_AFTER_S};
use crate::actors::{ActorKind, ChildEvent, ChildNews, Control, Identity, broadcaster, forwarder, publisher};
use crate::client::{ClientId, Webhook};
use crate::store::{Loaded, StoredClient};

impl Core {
    /// Takes in what the store holds: every client, and the publisher.
    pub(super) fn take_in(self: &std::rc::Rc<Self>, loaded: Loaded) {
        for id in &loaded.unreadable {
            log::error!("the webhook secret of {id} cannot be read: SOAR_TOKEN_SECRET has changed; its webhook is off");
        }
        let password = |client: &StoredClient| Some((client.record.client_id.clone(), client.secrets.broker_password?));
        self.shared.broker.expect_passwords(loaded.clients.iter().filter_map(password).collect());
        self.launch_publisher();
        for mut client in loaded.clients {
            // One that was off before stays so for its own reason, which a rotation does not mend.
            let unreadable = |webhook: &&mut Webhook| webhook.enabled && client.webhook_secrets.is_none();
            if let Some(webhook) = client.record.webhook.as_mut().filter(unreadable) {
                webhook.enabled = false;
                webhook.disabled_reason = Some(super::change::SECRET_UNREADABLE.to_owned());
            }
            self.adopt(client, false);
        }
        if !loaded.unfinished.is_empty() {
            self.leftovers.borrow_mut().extend(loaded.unfinished);
            actix_rt::spawn(super::delete::sweep(std::rc::Rc::clone(self)));
        }
    }

    pub(super) fn launch(&self, id: &ClientId, client: &mut Client, kind: ActorKind) {
        let generation = client.child(kind).generation + 1;
        let identity = Identity { kind, client: Some(id.clone()), generation };
        let arbiter = self.arbiters.get(client.arbiter);
        let on_exit = self.reporter(identity.clone());
        let (shared, owner) = (Arc::clone(&self.shared), id.clone());
        let mut subscriber_addr = None;
        let (control, lifeline): (Recipient<Control>, Lifeline) = match kind {
            ActorKind::Forwarder => {
                let make = move || forwarder::new(owner, shared, identity);
                let (addr, lifeline) = supervision::start(arbiter, make, on_exit);
                (addr.recipient(), lifeline)
            }
            ActorKind::Broadcaster => {
                let make = move || broadcaster::new(owner, shared, identity);
                let (addr, lifeline) = supervision::start(arbiter, make, on_exit);
                (addr.recipient(), lifeline)
            }
            ActorKind::Subscriber => {
                let patterns = client.entry.record.subscriptions.clone();
                // Only the first life of a client that was made just now finds its work done.
                let done = client.bound && generation == 1;
                let make = move || Subscriber::new(owner, patterns, done, shared, identity);
                let (addr, lifeline) = supervision::start(arbiter, make, on_exit);
                subscriber_addr = Some(addr.clone());
                (addr.recipient(), lifeline)
            }
            ActorKind::Pusher => {
                let webhook = client.entry.record.webhook.clone();
                let (Some(factory), Some(webhook), Some(secrets)) = (&self.pusher, webhook, &client.webhook_secrets)
                else {
                    return;
                };
                let seed = PusherSeed { client: owner, webhook, secrets: Arc::clone(secrets), shared, identity };
                factory(arbiter, seed, on_exit)
            }
            ActorKind::Publisher => unreachable!("the publisher is no client's"),
        };
        let life = Life {
            control,
            subscriber: subscriber_addr,
            lifeline: Some(lifeline),
            started: Instant::now(),
            ending: false,
        };
        let child = &mut client.children[slot(kind)];
        child.generation = generation;
        child.begin(life);
        self.living.set(self.living.get() + 1);
    }

    /// Starts the publisher.
    pub(super) fn launch_publisher(&self) {
        let mut child = self.publisher.borrow_mut();
        if child.life.is_some() || self.stopping.get() {
            return;
        }
        child.generation += 1;
        let identity = Identity { kind: ActorKind::Publisher, client: None, generation: child.generation };
        let (shared, on_exit) = (Arc::clone(&self.shared), self.reporter(identity.clone()));
        let make = move || publisher::new(shared, identity);
        let (addr, lifeline) = supervision::start(self.arbiters.get(0), make, on_exit);
        child.begin(Life {
            control: addr.recipient(),
            subscriber: None,
            lifeline: Some(lifeline),
            started: Instant::now(),
            ending: false,
        });
        self.living.set(self.living.get() + 1);
    }

    fn reporter(&self, identity: Identity) -> OnExit {
        let shared = Arc::clone(&self.shared);
        Box::new(move |exit| shared.report(identity, ChildNews::Exited(exit)))
    }

    /// An actor's news.
    pub(super) fn hear(&self, event: &ChildEvent) {
        let ChildEvent { identity, what } = event;
        if let ChildNews::Exited(_) = what {
            self.living.set(self.living.get().saturating_sub(1));
            if self.living.get() == 0 {
                self.all_ended.notify_waiters();
            }
        }
        let next = match &identity.client {
            None => {
                let mut publisher = self.publisher.borrow_mut();
                let next = Self::hear_child(&mut publisher, event);
                if next == Next::Ended {
                    // Its end is wanted only when everything ends.
                    publisher.end(ActorState::Stopped);
                }
                next
            }
            Some(id) => {
                let next = self.with(id, |client| {
                    let next = Self::hear_child(&mut client.children[slot(identity.kind)], event);
                    let first_bound = next == Next::Ready && identity.kind == ActorKind::Subscriber && !client.bound;
                    client.bound |= first_bound;
                    client.announce();
                    (next, first_bound)
                });
                let Some((next, first_bound)) = next else { return };
                if next == Next::Ended || first_bound {
                    self.reconcile(id);
                }
                next
            }
        };
        match next {
            Next::Nothing | Next::Ended => {}
            Next::Ready => self.forgive_later(identity),
            Next::Redeclare => self.redeclare(identity),
            Next::Restart(after) => self.later(after, identity, Self::restart),
        }
    }

    fn hear_child(child: &mut Child, event: &ChildEvent) -> Next {
        let ChildEvent { identity, what } = event;
        if child.generation != identity.generation {
            return Next::Nothing;
        }
        let next = child.hear(what, Instant::now(), rand::random());
        if let (ChildNews::Exited(exit), Next::Restart(after)) = (what, next) {
            let failing = if child.state == ActorState::Failing { "; it keeps dying" } else { "" };
            log::error!("{identity} {}; started again in {} ms{failing}", words(exit), after.as_millis());
        }
        next
    }

    fn later(&self, wait: Duration, identity: &Identity, then: fn(&Self, &Identity)) {
        let (me, identity) = (self.me.clone(), identity.clone());
        actix_rt::spawn(async move {
            actix_rt::time::sleep(wait).await;
            if let Some(core) = me.upgrade() {
                then(&core, &identity);
            }
        });
    }

    fn restart(&self, identity: &Identity) {
        let due = |child: &mut Child| {
            let due = child.restart_pending && child.generation == identity.generation;
            child.restart_pending &= !due;
            due
        };
        let due = match &identity.client {
            None => due(&mut self.publisher.borrow_mut()),
            Some(id) => self.with(id, |client| due(&mut client.children[slot(identity.kind)])).unwrap_or(false),
        };
        if !due || self.stopping.get() {
            return;
        }
        self.shared.telemetry.metrics.actor_restarts.with_label_values(&[identity.kind.as_str()]).inc();
        match &identity.client {
            None => self.launch_publisher(),
            Some(id) => self.reconcile(id),
        }
    }

    /// An actor that has died lately and is at work is forgiven when it has been for a while.
    fn forgive_later(&self, identity: &Identity) {
        let has_history = match &identity.client {
            None => self.publisher.borrow().has_history(),
            Some(id) => self.with(id, |client| client.child(identity.kind).has_history()).unwrap_or(false),
        };
        if has_history {
            self.later(Duration::from_secs(STABLE_AFTER_S), identity, Self::forgive);
        }
    }

    fn forgive(&self, identity: &Identity) {
        let forgive = |child: &mut Child| {
            let same = child.generation == identity.generation && child.life.is_some();
            let up_for = child.life.as_ref().map_or(Duration::ZERO, |life| life.started.elapsed());
            same && up_for >= Duration::from_secs(STABLE_AFTER_S) && child.recover()
        };
        let recovered = match &identity.client {
            None => forgive(&mut self.publisher.borrow_mut()),
            Some(id) => self.with(id, |client| forgive(&mut client.children[slot(identity.kind)])).unwrap_or(false),
        };
        if recovered {
            log::info!("{identity} has recovered");
        }
    }

    fn redeclare(&self, identity: &Identity) {
        let Some(id) = &identity.client else { return };
        let subscriber = self.subscriber(id).map(|(addr, _)| addr);
        // A subscriber that is dead or busy declares at its next start, or is just at it.
        if let Some(subscriber) = subscriber
            && subscriber.try_send(Redeclare).is_err()
        {
            log::debug!("the subscriber of {id} is busy; its queues are declared later");
        }
    }

    /// See [`super::Shutdown`].
    pub(super) async fn shut_down(&self, within: Duration) {
        let deadline = Instant::now() + within;
        let left = || deadline.saturating_duration_since(Instant::now());
        self.stopping.set(true);
        if tokio::time::timeout(left() / 2, self.turns.idle()).await.is_err() {
            log::warn!("operations on clients are still under way; what they have not done is done at the next start");
        }
        let ids: Vec<ClientId> = self.clients.borrow().keys().cloned().collect();
        ids.iter().for_each(|id| self.reconcile(id));
        self.publisher.borrow_mut().end(ActorState::Stopped);
        if !self.wait_for_end(left()).await {
            log::warn!("{} actors did not stop in time and are aborted", self.living.get());
            self.clients.borrow_mut().values_mut().flat_map(|client| &mut client.children).for_each(Child::cut);
            self.publisher.borrow_mut().cut();
            self.wait_for_end(Duration::from_secs(1)).await;
        }
        self.arbiters.stop();
    }

    async fn wait_for_end(&self, within: Duration) -> bool {
        let end = async {
            loop {
                let ended = self.all_ended.notified();
                if self.living.get() == 0 {
                    return;
                }
                ended.await;
            }
        };
        tokio::time::timeout(within, end).await.is_ok()
    }

    /// For tests: makes an actor panic. Says whether there was one.
    pub(super) fn inject_panic(&self, client: Option<&ClientId>, kind: ActorKind) -> bool {
        let tell =
            |child: &Child| child.life.as_ref().is_some_and(|life| life.control.try_send(Control::Panic).is_ok());
        match client {
            None => kind == ActorKind::Publisher && tell(&self.publisher.borrow()),
            Some(_) if kind == ActorKind::Publisher => false,
            Some(id) => self.with(id, |client| tell(client.child(kind))).unwrap_or(false),
        }
    }
}
