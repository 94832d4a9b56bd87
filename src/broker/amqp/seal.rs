//! Whether a queue that was just declared would survive a kill of RabbitMQ, and what to do when it did not.
//!
//! A quorum queue is known to its node by an entry in Ra's registry. The last entry that was made stays in memory until
//! the registry is looked at again, or has rested for half a second (RabbitMQ 3.10, `ra_directory`, which is a DETS
//! table with `auto_save`). A node that is killed before comes back with a queue that can be declared and never
//! answers. So a client counts as created only when one more queue has been registered after its own: the seal, which
//! is deleted at once. All creations that wait share one.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::Shared;
use super::error::broker_error;
use super::session::Session;
use super::topology;
use crate::broker::BrokerError;
use crate::client::ClientId;
use crate::config::QueueType;

type Waiter = oneshot::Sender<Result<(), BrokerError>>;

/// Those who wait for a seal.
#[derive(Default)]
pub(super) struct Sealer {
    inner: Mutex<(Vec<Waiter>, bool)>,
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
            let result = self.make_seal().await;
            for waiter in waiters {
                // Who gave up needs no answer.
                let _ = waiter.send(result.clone());
            }
        }
    }

    async fn make_seal(&self) -> Result<(), BrokerError> {
        let session = self.session("seal queues")?;
        // A name that was never registered, or it would seal nothing.
        let name = format!("soar-seal-{}", uuid::Uuid::now_v7().simple());
        let sealed = session.control(async |channel| topology::declare_seal(channel, &name).await).await;
        sealed.map_err(|error| broker_error("seal queues", error))
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
