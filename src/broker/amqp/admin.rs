//! Declaring, binding, deleting and counting.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;

use super::clients::Client;
use super::error::{Fault, broker_error, db_error, fault_of, with_cause};
use super::seal::Own;
use super::session::Session;
use super::window::Outgoing;
use super::{Shared, state, topology};
use crate::broker::{BrokerError, BrokerErrorKind, Depths, Queue};
use crate::client::{ClientId, Limits};
use crate::config::QueueType;
use crate::time::Timestamp;
use crate::topic::Pattern;

/// Clients declared side by side after a reconnect.
const DECLARE_AT_ONCE: usize = 16;

/// How soon a queue is counted again whose leader may still be reading what it has.
const COUNT_AGAIN_AFTER: Duration = Duration::from_millis(50);

/// How often it is.
const LOOKS_MAX: u32 = 4;

/// How long counting waits for somebody who looks at the client's dead letters.
const DEAD_TURN_WITHIN: Duration = Duration::from_secs(2);

/// Messages of an inbox.
#[derive(Debug, Clone, Copy)]
pub(super) struct InboxDepth {
    /// In RabbitMQ, for anyone to take.
    pub(super) ready: u64,
    /// Handed to this process and not settled.
    pub(super) held: u64,
}

impl Shared {
    /// See [`crate::broker::Broker::declare_client`].
    pub(super) async fn declare_client(self: &Arc<Self>, id: ClientId, limits: Limits) -> Result<(), BrokerError> {
        let action = format!("declare the queues of {id}");
        let session = self.session(&action)?;
        let now_ms = Timestamp::now().as_millis();
        // Known from now on, so that a deletion that begins meanwhile waits for this, or this finds that it is gone.
        let client = self.clients.known_or(&id, now_ms, &limits);
        let _turn = client.take_admin_turn().await;
        if client.is_gone() {
            return Err(BrokerError::new(BrokerErrorKind::NotFound, action));
        }
        let noted = state::note_client(&self.db, &id, &limits, now_ms).await;
        let (since_ms, is_sealed) = noted.map_err(|error| db_error(&action, error))?;
        let fail = |error| broker_error(&action, error);
        self.declare_queues(&session, &id).await.map_err(fail)?;
        if !is_sealed {
            if since_ms != now_ms {
                self.mend(&session, &id).await.map_err(fail)?;
                self.declare_queues(&session, &id).await.map_err(fail)?;
            }
            self.seal().await?;
            session.note_led(topology::client_queues(&id));
            state::note_sealed(&self.db, &id).await.map_err(|error| db_error(&action, error))?;
        }
        client.set_limits(&limits);
        client.wake();
        Ok(())
    }

    /// Declares a client's queues, and what else is its own.
    async fn declare_queues(&self, session: &Session, id: &ClientId) -> Result<(), lapin::Error> {
        let (kind, has_users) = (self.options.queue_type, self.users.is_some());
        let declared = session.control(async |channel| topology::declare_client(channel, id, kind).await).await;
        match declared {
            // The stand-in for an earlier client of this name, if that is what is in the way.
            Err(error) if fault_of(&error) == Fault::Conflict && self.remove_stand_in(session, id).await => {
                session.control(async |channel| topology::declare_client(channel, id, kind).await).await?;
            }
            declared => declared?,
        }
        if has_users {
            session.control(async |channel| topology::declare_entrance(channel, id).await).await?;
        }
        Ok(())
    }

    /// Deletes the stand-in of an earlier client's inbox. Returns whether there was one.
    async fn remove_stand_in(&self, session: &Session, id: &ClientId) -> bool {
        let name = topology::inbox(id);
        // Declaring it once more succeeds only when that is what it is.
        let is_stand_in = match state::stand_in(&self.db, id).await {
            Ok(Some(expires_s)) => {
                let check =
                    session.control(async |channel| topology::declare_stand_in(channel, id, expires_s).await).await;
                check.is_ok()
            }
            Ok(None) => false,
            Err(error) => {
                log::warn!("cannot tell what queue {name} is: {error}");
                false
            }
        };
        is_stand_in && session.control(async |channel| topology::delete_queue(channel, &name).await).await.is_ok()
    }

    /// See [`crate::broker::Broker::bind`].
    pub(super) async fn bind(&self, id: ClientId, patterns: Vec<Pattern>) -> Result<(), BrokerError> {
        let action = format!("bind queue {}", topology::inbox(&id));
        let session = self.session(&action)?;
        let client = self.clients.get(&id).ok_or_else(|| BrokerError::new(BrokerErrorKind::NotFound, &action))?;
        let _turn = client.take_admin_turn().await;
        if client.is_gone() {
            return Err(BrokerError::new(BrokerErrorKind::NotFound, action));
        }
        let unwanted = state::note_bindings(&self.db, &id, &patterns).await;
        let unwanted = unwanted.map_err(|error| db_error(&action, error))?;
        self.clients.set_patterns(&client, patterns, unwanted);
        self.make_bindings(&session, &client).await.map_err(|error| broker_error(&action, error))
    }

    /// Makes a client's bindings what they should be.
    async fn make_bindings(&self, session: &Session, client: &Client) -> Result<(), lapin::Error> {
        let (wanted, unwanted) = client.patterns();
        if wanted.is_empty() && unwanted.is_empty() {
            return Ok(());
        }
        let inbox = topology::inbox(&client.id);
        session
            .control(async |channel| {
                // New ones first: a message that matches an old pattern and a new one is not to miss both.
                let binds = wanted.iter().map(|p| topology::bind(channel, &inbox, topology::TOPIC, p.as_str()));
                futures_util::future::try_join_all(binds).await?;
                let unbinds = unwanted.iter().map(|p| topology::unbind(channel, &inbox, topology::TOPIC, p.as_str()));
                futures_util::future::try_join_all(unbinds).await.map(|_| ())
            })
            .await?;
        if !unwanted.is_empty() {
            match state::forget_unwanted(&self.db, &client.id).await {
                Ok(()) => self.clients.set_patterns(client, wanted, Vec::new()),
                // They are taken away once more after the next reconnect.
                Err(error) => log::warn!("cannot forget bindings of {} that are gone: {error}", client.id),
            }
        }
        Ok(())
    }

    /// See [`crate::broker::Broker::delete_client`].
    pub(super) async fn delete_client(self: &Arc<Self>, id: ClientId) -> Result<(), BrokerError> {
        let action = format!("delete the queues of {id}");
        // What is on its way to the inbox is waited for; nothing would arrive.
        let session = self.open_session(&action)?;
        // One that is not known may just be being declared.
        let client = self.clients.known_or(&id, Timestamp::now().as_millis(), &Limits::default());
        client.end();
        // A consumer that has just ended asks its queue for what is on its way; without the queue that would cost its
        // channel, and all who share it. Before the next turn: whoever looks at the inbox may need that.
        for queue in [Queue::Outbox(id.clone()), Queue::Notify(id.clone()), Queue::Inbox(id.clone())] {
            let name = queue.to_string();
            self.intake(&queue).turn(&name).await;
            self.returned.note(&name, 0);
        }
        self.returned.note(&topology::dead(&id), 0);
        let _turn = client.take_admin_turn().await;
        // First, so that it cannot write any more. When that cannot be done now, everything else is all the same.
        let without_user = match &self.users {
            Some(users) => users.remove(&id).await,
            None => Ok(()),
        };
        let fail = |error| broker_error(&action, error);
        // Noted before the inbox is gone, so that a deletion that is cut off and done again knows of it; and once more
        // with what was just being delayed.
        self.note_stand_in(&id, &action).await?;
        self.detach_inbox(&session, &id).await.map_err(fail)?;
        session.control(async |channel| topology::delete_client(channel, &id).await).await.map_err(fail)?;
        if let Some(expires_s) = self.note_stand_in(&id, &action).await? {
            let made = session.control(async |channel| topology::declare_stand_in(channel, &id, expires_s).await).await;
            made.map_err(fail)?;
        }
        without_user?;
        state::forget_client(&self.db, &id).await.map_err(|error| db_error(&action, error))?;
        self.clients.remove(&id);
        Ok(())
    }

    /// See [`state::note_stand_in`].
    async fn note_stand_in(&self, id: &ClientId, action: &str) -> Result<Option<u64>, BrokerError> {
        let now_s = Timestamp::now().as_millis().div_euclid(1000);
        state::note_stand_in(&self.db, id, now_s).await.map_err(|error| db_error(action, error))
    }

    /// Takes an inbox that is about to be deleted out of the exchanges, and waits until whatever was routed to it before
    /// has arrived. A channel that puts its first message into a quorum queue while that is being deleted is ended by
    /// RabbitMQ 3.10 with 541, and its connection with it: one client's deletion would disturb all.
    async fn detach_inbox(&self, session: &Session, id: &ClientId) -> Result<(), lapin::Error> {
        let (wanted, unwanted) = self.clients.get(id).map(|client| client.patterns()).unwrap_or_default();
        let inbox = topology::inbox(id);
        let unbound = session
            .control(async |channel| {
                topology::unbind(channel, &inbox, topology::BROADCAST, "").await?;
                let patterns = wanted.iter().chain(&unwanted);
                let unbinds = patterns.map(|p| topology::unbind(channel, &inbox, topology::TOPIC, p.as_str()));
                futures_util::future::try_join_all(unbinds).await
            })
            .await;
        match unbound {
            Err(error) if fault_of(&error) != Fault::NotFound => return Err(error),
            // Gone already, with its bindings.
            Ok(_) | Err(_) => {}
        }
        // A channel works in order: when it has confirmed this one, it has put all before it into their queues.
        let barriers = self.relay.iter().map(|lane| self.publish_on(lane, vec![Outgoing::to_nowhere()]));
        futures_util::future::join_all(barriers).await;
        Ok(())
    }

    /// Declares all that there should be: before messages flow in a new session.
    pub(super) async fn declare_everything(self: &Arc<Self>, session: &Arc<Session>) -> Result<(), BrokerError> {
        let kind = self.options.queue_type;
        let quorum: &[&str] = if kind == QueueType::Quorum { &[topology::PUBLISH, topology::UNROUTED] } else { &[] };
        for name in quorum {
            self.note_own(session, name).await?;
        }
        let internal = session.control(async |channel| topology::declare_internal(channel, kind).await).await;
        internal.map_err(|error| broker_error("declare the backbone's own queues and exchanges", error))?;
        for name in quorum {
            self.seal_own(session, name, Own::Internal(kind)).await?;
        }
        // One whose deletion is not finished yet is to have nothing again.
        let clients: Vec<_> = self.clients.all().into_iter().filter(|client| !client.is_gone()).collect();
        let mut declared = futures_util::stream::iter(clients)
            .map(|client| async move {
                let declared = self.declare_again(session, &client).await;
                declared.map_err(|error| (client, error))
            })
            .buffer_unordered(DECLARE_AT_ONCE);
        while let Some(result) = declared.next().await {
            let Err((client, error)) = result else { continue };
            if fault_of(&error) == Fault::Connection {
                return Err(broker_error(format!("declare the queues of {}", client.id), error));
            }
            // One client's trouble is not everybody's.
            let error = broker_error(format!("declare the queues of {}", client.id), error);
            client.tell(&with_cause(&error));
        }
        Ok(())
    }

    /// Declares a known client again.
    async fn declare_again(&self, session: &Session, client: &Client) -> Result<(), lapin::Error> {
        let _turn = client.take_admin_turn().await;
        if client.is_gone() {
            return Ok(());
        }
        self.declare_queues(session, &client.id).await?;
        self.make_bindings(session, client).await
    }

    /// Something was not there: declares the client's things again, or the backbone's own.
    pub(super) async fn repair(&self, client: Option<&Client>) {
        let Ok(session) = self.session("declare again") else { return };
        let kind = self.options.queue_type;
        match client {
            Some(client) => match self.declare_again(&session, client).await {
                Ok(()) => client.is_well(),
                Err(error) if fault_of(&error) == Fault::Connection => {
                    log::debug!("declaring the queues of {} again waits: {error}", client.id);
                }
                Err(error) => {
                    let error = broker_error(format!("declare the queues of {}", client.id), error);
                    client.tell(&with_cause(&error));
                }
            },
            None => {
                // One after the other, as with a client: of a quorum queue that another is just declaring RabbitMQ says
                // that it is there, and ends the connection of whoever then consumes it (3.10).
                let _turn = self.internal_turn.lock().await;
                let declared = session.control(async |channel| topology::declare_internal(channel, kind).await).await;
                if let Err(error) = declared {
                    let error = broker_error("declare the backbone's own queues and exchanges again", error);
                    log::warn!("{}", with_cause(&error));
                }
            }
        }
    }

    /// Somebody else has deleted this queue: declares it again. When that follows at once, RabbitMQ may not tell those
    /// who consume it (3.10, quorum queues), so they begin anew.
    pub(super) async fn restore_queue(&self, queue: &Queue) {
        log::warn!("queue {queue} was deleted by somebody else; it is declared again");
        let client = self.clients.owner(queue);
        self.repair(client.as_deref()).await;
        let consumers = client.map_or_else(|| self.consumers_of(&queue.to_string()), |client| client.consumers());
        for core in consumers.into_iter().filter(|core| core.queue == *queue) {
            core.resubscribe();
        }
    }

    /// After an error of a consumer: declares its queue again when that was the reason.
    pub(super) async fn repair_queue(&self, queue: &Queue, error: &lapin::Error) {
        match fault_of(error) {
            Fault::NotFound => {
                log::warn!("queue {queue} was deleted by somebody else; it is declared again");
                self.repair(self.clients.owner(queue).as_deref()).await;
            }
            Fault::Refused => {
                if let Some(client) = self.clients.owner(queue) {
                    set_apart_if_refused(&client, &queue.to_string(), error);
                }
            }
            Fault::Conflict | Fault::Channel | Fault::Connection => {}
        }
    }

    /// Messages that are ready in a queue.
    pub(super) async fn count_ready(&self, name: &str) -> Result<u64, BrokerError> {
        let action = format!("count queue {name}");
        let mut looks = 0;
        loop {
            let session = self.session(&action)?;
            let counted = session.control(async |channel| topology::count(channel, name).await).await;
            let ready = counted.map_err(|error| broker_error(&action, error))?;
            if self.options.queue_type == QueueType::Classic || session.counts_are_sure(name) {
                return Ok(ready);
            }
            if ready == 0 && session.answers(name).await {
                session.note_led([name.to_owned()]);
                continue;
            }
            tokio::time::sleep(COUNT_AGAIN_AFTER).await;
            let again = session.control(async |channel| topology::count(channel, name).await).await;
            looks += 1;
            // One that is busy never says the same twice.
            if ready > 0 && (looks > LOOKS_MAX || again.is_ok_and(|again| again == ready)) {
                return Ok(ready);
            }
        }
    }

    /// Messages of a queue that has no puller: ready, and in consumers of this process.
    async fn count(&self, queue: &Queue, client: Option<&Client>) -> Result<u64, BrokerError> {
        let name = queue.to_string();
        let consumers = match client {
            Some(client) => client.consumers().into_iter().filter(|core| core.queue == *queue).collect(),
            None => self.consumers_of(&name),
        };
        let (mut ready, mut held) = (None, 0);
        for core in consumers {
            let (asked, here) =
                core.depth().await.map_err(|error| broker_error(format!("count queue {name}"), error))?;
            ready = asked.or(ready);
            held += here;
        }
        match ready {
            Some(ready) => Ok(ready + held),
            None => Ok(self.count_ready(&name).await? + held),
        }
    }

    /// Messages of an inbox, but for those that are delayed.
    pub(super) async fn inbox_depth(&self, client: &Client) -> Result<InboxDepth, BrokerError> {
        let queue = Queue::Inbox(client.id.clone());
        let action = || format!("count queue {queue}");
        let (mut ready, mut held) = (None, 0);
        if let Some(puller) = client.puller() {
            (ready, held) = puller.depth().await.map_err(|error| broker_error(action(), error))?;
        }
        for core in client.consumers().into_iter().filter(|core| core.queue == queue) {
            let (asked, here) = core.depth().await.map_err(|error| broker_error(action(), error))?;
            ready = asked.or(ready);
            held += here;
        }
        let ready = match ready {
            Some(ready) => ready,
            None => self.count_ready(&queue.to_string()).await?,
        };
        Ok(InboxDepth { ready, held })
    }

    /// See [`crate::broker::Broker::depths`].
    pub(super) async fn depths(&self, id: &ClientId) -> Result<Depths, BrokerError> {
        let action = format!("count the messages of {id}");
        self.session(&action)?;
        let client = self.clients.get(id).ok_or_else(|| BrokerError::new(BrokerErrorKind::NotFound, action))?;
        // While somebody looks at its dead letters they are not ready; what is told then is as it was, or too little.
        let _turn = tokio::time::timeout(DEAD_TURN_WITHIN, client.dead_turn.acquire()).await;
        let counted = self.count_all(&client).await;
        match counted {
            Err(error) if error.kind == BrokerErrorKind::NotFound => {
                log::warn!("a queue of {id} was deleted by somebody else; it is declared again");
                self.repair(Some(&client)).await;
                // Which one it was is not known.
                client.consumers().iter().for_each(|core| core.resubscribe());
                self.count_all(&client).await
            }
            counted => counted,
        }
    }

    /// See [`crate::broker::Broker::left_to_forward`].
    pub(super) async fn left_to_forward(&self, id: &ClientId) -> Result<u64, BrokerError> {
        let action = format!("count what {id} sent");
        let session = self.session(&action)?;
        let client = self.clients.get(id);
        let client = client.ok_or_else(|| BrokerError::new(BrokerErrorKind::NotFound, action.clone()))?;
        let mut left = 0;
        for queue in [Queue::Outbox(id.clone()), Queue::Notify(id.clone())] {
            let name = queue.to_string();
            self.intake(&queue).turn(&name).await;
            let counted = self.count(&queue, Some(&client)).await;
            let looked = session.control(async |channel| topology::look_at(channel, &name).await).await;
            match (counted, looked.map_err(|error| broker_error(&action, error))) {
                // A consumer may be one of a connection that was lost, and RabbitMQ does not know that yet.
                (Ok(messages), Ok((ready, consumers))) => left += messages.max(ready).max(u64::from(consumers)),
                (Err(error), _) | (_, Err(error)) if error.kind == BrokerErrorKind::NotFound => {}
                (Err(error), _) | (_, Err(error)) => return Err(error),
            }
        }
        Ok(left)
    }

    async fn count_all(&self, client: &Client) -> Result<Depths, BrokerError> {
        let (outbox, notify) = (Queue::Outbox(client.id.clone()), Queue::Notify(client.id.clone()));
        let dead = topology::dead(&client.id);
        let (outbox, notify, inbox, dead) = futures_util::try_join!(
            self.count(&outbox, Some(client)),
            self.count(&notify, Some(client)),
            self.inbox_depth(client),
            self.count_ready(&dead),
        )?;
        let delayed = client.delayed(Timestamp::now().as_millis().div_euclid(1000));
        Ok(Depths { outbox, notify, inbox: inbox.ready + inbox.held + delayed, dead })
    }

    /// See [`crate::broker::Broker::internal_depths`].
    pub(super) async fn internal_depths(&self) -> Result<Vec<(&'static str, u64)>, BrokerError> {
        let publish = self.count(&Queue::Publish, None).await?;
        let unrouted = self.count(&Queue::Unrouted, None).await?;
        Ok(vec![(topology::PUBLISH, publish), (topology::UNROUTED, unrouted)])
    }
}

/// Sets a client apart that has kept its queue from being read.
pub(super) fn set_apart_if_refused(client: &Client, queue: &str, error: &lapin::Error) {
    // All that wait for an answer on a channel are told the error that closed it; it names the one whose fault it is.
    let is_its_own = fault_of(error) == Fault::Refused && error.to_string().contains(&format!("'{queue}'"));
    if is_its_own && client.set_apart() {
        log::warn!("{queue} cannot be read: {error}; it is read apart from others from now on");
    }
}
