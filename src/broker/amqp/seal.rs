//! Whether a queue that was just declared would survive a kill of RabbitMQ, and what to do when it did not.
//!
//! A quorum queue is known to its node by an entry in Ra's registry. The last entry that was made stays in memory until
//! the registry is looked at again, or has rested for half a second (RabbitMQ 3.10, `ra_directory`, which is a DETS
//! table with `auto_save`). A node that is killed before comes back with a queue that can be declared and never
//! answers. So a client counts as created only when one more queue has been registered after its own: the seal, which
//! is deleted at once. All creations that wait share one. The same holds for the backbone's own queues, before anything
//! is put into them: `soar-publish`, and each retry queue. That their making has begun is noted, so that one whose making
//! was cut off by a kill is known to be empty, and is made anew as soon as it has had time to find a leader.
//!
//! RabbitMQ 4 has another Ra, which need not have this weakness; a seal costs a few milliseconds there as well.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lapin::Channel;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::Shared;
use super::error::{Fault, broker_error, db_error, fault_of};
use super::session::Session;
use super::{state, topology};
use crate::broker::BrokerError;
use crate::client::ClientId;
use crate::config::QueueType;

/// How long a queue that may hold messages is asked for an answer before it is taken for one that will never give any.
const ANSWERS_WITHIN: Duration = Duration::from_secs(60);

/// The same for one that was never used.
const UNUSED_ANSWERS_WITHIN: Duration = Duration::from_secs(8);

/// After a retry queue was made, the next waits so many times as long as that took: four fifths of the time RabbitMQ has
/// for messages.
const RESTS: u32 = 4;

/// And no longer.
const REST_MAX: Duration = Duration::from_millis(500);

type Waiter = oneshot::Sender<Result<(), BrokerError>>;

/// Those who wait for a seal.
#[derive(Default)]
pub(super) struct Sealer {
    inner: Mutex<(Vec<Waiter>, bool)>,
}

/// What belongs to no client.
#[derive(Debug, Clone, Copy)]
pub(super) enum Own {
    /// What is there from the start, with queues of this type.
    Internal(QueueType),
    /// The queue for this delay, in seconds.
    Retry(u64),
}

impl Own {
    async fn declare(self, channel: &Channel) -> Result<(), lapin::Error> {
        match self {
            Self::Internal(kind) => topology::declare_internal(channel, kind).await,
            Self::Retry(seconds) => topology::declare_retry(channel, seconds).await,
        }
    }
}

impl Shared {
    /// Resolves when every queue that was declared before the call would survive a kill.
    pub(super) async fn seal(self: &Arc<Self>) -> Result<(), BrokerError> {
        if self.options.queue_type == QueueType::Classic {
            return Ok(());
        }
        let (sender, sealed) = oneshot::channel();
        let is_first = {
            let mut inner = self.sealer.inner.lock();
            inner.0.push(sender);
            !std::mem::replace(&mut inner.1, true)
        };
        if is_first {
            let shared = Arc::clone(self);
            self.thread.spawn(async move { shared.make_seals().await });
        }
        let closed = || BrokerError::new(crate::broker::BrokerErrorKind::Closed, "seal queues");
        sealed.await.unwrap_or_else(|_| Err(closed()))
    }

    async fn make_seals(&self) {
        loop {
            let waiters = {
                let mut inner = self.sealer.inner.lock();
                if inner.0.is_empty() {
                    inner.1 = false;
                    return;
                }
                std::mem::take(&mut inner.0)
            };
            let result = match self.session("seal queues") {
                Ok(session) => make_seal(&session).await,
                Err(error) => Err(error),
            };
            for waiter in waiters {
                // Who gave up needs no answer.
                let _ = waiter.send(result.clone());
            }
        }
    }

    /// To be called before a quorum queue that belongs to no client is declared, and then [`Shared::seal_own`].
    pub(super) async fn note_own(&self, session: &Session, name: &str) -> Result<(), BrokerError> {
        let action = || format!("look for queue {name}");
        if state::is_sealed(&self.db, name).await.map_err(|error| db_error(action(), error))? {
            return Ok(());
        }
        match session.control(async |channel| topology::check_queue(channel, name).await).await {
            // It may be of a router whose file is lost, and hold messages.
            Ok(()) => Ok(()),
            Err(error) if fault_of(&error) == Fault::NotFound => {
                state::note_making(&self.db, name).await.map_err(|error| db_error(action(), error))
            }
            Err(error) => Err(broker_error(action(), error)),
        }
    }

    /// Sees to it that a quorum queue that belongs to no client, and was just declared, would survive a kill: once for
    /// all.
    pub(super) async fn seal_own(&self, session: &Session, name: &str, of: Own) -> Result<(), BrokerError> {
        let action = || format!("seal queue {name}");
        if state::is_sealed(&self.db, name).await.map_err(|error| db_error(action(), error))? {
            return Ok(());
        }
        let is_empty = state::is_making(&self.db, name).await.map_err(|error| db_error(action(), error))?;
        let patience = if is_empty { UNUSED_ANSWERS_WITHIN } else { ANSWERS_WITHIN };
        if !answers_within(session, name, patience).await {
            log::warn!("queue {name} does not answer, as when RabbitMQ is killed while one is made; it is made again");
            let again = session.control(async |channel| {
                topology::delete_queue(channel, name).await?;
                of.declare(channel).await
            });
            again.await.map_err(|error| broker_error(action(), error))?;
        }
        make_seal(session).await?;
        state::note_queue_sealed(&self.db, name).await.map_err(|error| db_error(action(), error))
    }

    /// Sees to it that the queue for this delay is there, and stays.
    ///
    /// They are made one at a time, with a rest after each: each keeps RabbitMQ busy for tens of milliseconds, and when
    /// many endpoints fail at once, with jitter in their delays, many are wanted at once. What is for healthy endpoints
    /// does not wait for them.
    pub(super) async fn retry_queue(&self, session: &Session, seconds: u64) -> Result<(), BrokerError> {
        if session.has_retry(seconds) {
            return Ok(());
        }
        let turn = session.take_retry_turn().await;
        if session.has_retry(seconds) {
            return Ok(());
        }
        let began = Instant::now();
        let name = topology::retry(seconds);
        let noted = state::note_retry(&self.db, seconds).await;
        noted.map_err(|error| db_error(format!("note queue {name}"), error))?;
        self.note_own(session, &name).await?;
        let declared = session.control(async |channel| topology::declare_retry(channel, seconds).await).await;
        declared.map_err(|error| broker_error(format!("declare queue {name}"), error))?;
        self.seal_own(session, &name, Own::Retry(seconds)).await?;
        session.note_retry(seconds);
        let rest = (RESTS * began.elapsed()).min(REST_MAX);
        self.thread.spawn(async move {
            tokio::time::sleep(rest).await;
            drop(turn);
        });
        Ok(())
    }

    /// Sees to it that queues of a client whose creation was cut off answer. Those that do not are empty, because
    /// nobody was told of them, and are made anew.
    pub(super) async fn mend(&self, session: &Session, client: &ClientId) -> Result<(), lapin::Error> {
        for name in topology::client_queues(client) {
            if session.answers(&name).await {
                continue;
            }
            log::warn!("queue {name} does not answer since RabbitMQ was killed while it was made; it is made again");
            let kind = self.options.queue_type;
            session
                .control(async |channel| {
                    topology::delete_queue(channel, &name).await?;
                    topology::declare_queue(channel, &name, kind).await
                })
                .await?;
        }
        Ok(())
    }
}

/// Whether a queue answers, asked again for that long: one that has no leader for a moment may hold messages.
async fn answers_within(session: &Session, name: &str, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    while !session.answers(name).await {
        if !session.is_alive() || Instant::now() >= until {
            return !session.is_alive();
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    true
}

async fn make_seal(session: &Session) -> Result<(), BrokerError> {
    // A name that was never registered, or it would seal nothing.
    let name = format!("soar-seal-{}", uuid::Uuid::now_v7().simple());
    let sealed = session.control(async |channel| topology::declare_seal(channel, &name).await).await;
    sealed.map_err(|error| broker_error("seal queues", error))
}
