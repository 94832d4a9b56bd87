//! A broker that fails when it is told to.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;

use crate::broker::{
    self, Broker, BrokerError, BrokerErrorKind, Consume, Consumer, DeadPage, Delivery, Depths, Health, Published,
    PullMode, PullOutcome, Pulled, Queue, Receipt, Settle, Settlement, Turn,
};
use crate::client::{ClientId, Limits};
use crate::envelope::Message;
use crate::secret::SaltedHash;
use crate::time::Timestamp;
use crate::topic::Pattern;

/// What fails now.
#[derive(Debug, Default)]
pub(super) struct Faults {
    pub(super) bind: AtomicBool,
    pub(super) consume: AtomicBool,
    pub(super) settle: AtomicBool,
    pub(super) delete: AtomicBool,
    pub(super) password: AtomicBool,
}

/// See the module.
pub(super) struct Flaky {
    inner: Arc<dyn Broker>,
    pub(super) faults: Arc<Faults>,
}

fn fail(fault: &AtomicBool, action: &str) -> Result<(), BrokerError> {
    if fault.load(Ordering::SeqCst) { Err(BrokerError::new(BrokerErrorKind::Unavailable, action)) } else { Ok(()) }
}

impl Flaky {
    pub(super) fn new(inner: Arc<dyn Broker>) -> Self {
        Self { inner, faults: Arc::default() }
    }
}

struct FlakyConsumer {
    inner: Consumer,
    source: Arc<FlakySource>,
}

struct FlakySource {
    faults: Arc<Faults>,
    next_tag: AtomicU64,
    held: Mutex<HashMap<u64, Delivery>>,
}

#[async_trait]
impl Consume for FlakyConsumer {
    async fn next(&mut self, max: usize) -> Option<Vec<Delivery>> {
        let batch = self.inner.next(max).await?;
        let wrap = |delivery: Delivery| {
            let tag = self.source.next_tag.fetch_add(1, Ordering::Relaxed);
            let (payload, deliveries, attempts) = (delivery.payload.clone(), delivery.deliveries, delivery.attempts);
            self.source.held.lock().insert(tag, delivery);
            Delivery::new(payload, deliveries, attempts, tag, Arc::clone(&self.source) as Arc<dyn Settle>)
        };
        Some(batch.into_iter().map(wrap).collect())
    }

    fn set_prefetch(&self, prefetch: u32) {
        self.inner.set_prefetch(prefetch);
    }
}

#[async_trait]
impl Settle for FlakySource {
    async fn settle(&self, settlements: Vec<Settlement>) -> Result<(), BrokerError> {
        let take = |tag| self.held.lock().remove(&tag).expect("is held");
        let outcomes: Vec<_> = settlements.into_iter().map(|s| (take(s.tag), s.outcome)).collect();
        fail(&self.faults.settle, "settle")?;
        broker::settle(outcomes).await
    }

    fn give_back(&self, tag: u64) {
        self.held.lock().remove(&tag);
    }
}

#[async_trait]
impl Broker for Flaky {
    fn name(&self) -> &'static str {
        "flaky"
    }

    fn health(&self) -> Health {
        self.inner.health()
    }

    async fn declare_client(&self, client: &ClientId, limits: &Limits) -> Result<(), BrokerError> {
        self.inner.declare_client(client, limits).await
    }

    async fn bind(&self, client: &ClientId, patterns: &[Pattern]) -> Result<(), BrokerError> {
        fail(&self.faults.bind, "bind")?;
        self.inner.bind(client, patterns).await
    }

    async fn delete_client(&self, client: &ClientId) -> Result<(), BrokerError> {
        fail(&self.faults.delete, "delete")?;
        self.inner.delete_client(client).await
    }

    async fn set_password(&self, _client: &ClientId, _password: &SaltedHash) -> Result<(), BrokerError> {
        fail(&self.faults.password, "set a password")
    }

    async fn publish_in_turn(
        &self,
        queue: &Queue,
        messages: Vec<Message>,
        turn: Turn,
    ) -> Result<Published, BrokerError> {
        self.inner.publish_in_turn(queue, messages, turn).await
    }

    async fn consume(&self, queue: &Queue, prefetch: u32) -> Result<Consumer, BrokerError> {
        fail(&self.faults.consume, "consume")?;
        let inner = self.inner.consume(queue, prefetch).await?;
        let source =
            FlakySource { faults: Arc::clone(&self.faults), next_tag: AtomicU64::new(0), held: Mutex::default() };
        Ok(Box::new(FlakyConsumer { inner, source: Arc::new(source) }))
    }

    async fn pull(
        &self,
        client: &ClientId,
        max: usize,
        wait: Duration,
        mode: PullMode,
    ) -> Result<Vec<Pulled>, BrokerError> {
        self.inner.pull(client, max, wait, mode).await
    }

    async fn settle_pulled(
        &self,
        client: &ClientId,
        receipts: Vec<Receipt>,
        outcome: PullOutcome,
    ) -> Result<Vec<Receipt>, BrokerError> {
        self.inner.settle_pulled(client, receipts, outcome).await
    }

    async fn depths(&self, client: &ClientId) -> Result<Depths, BrokerError> {
        self.inner.depths(client).await
    }

    async fn dead_letters(
        &self,
        client: &ClientId,
        after: Option<&str>,
        limit: usize,
    ) -> Result<DeadPage, BrokerError> {
        self.inner.dead_letters(client, after, limit).await
    }

    async fn replay_dead(&self, client: &ClientId, ids: Option<&[String]>) -> Result<u64, BrokerError> {
        self.inner.replay_dead(client, ids).await
    }

    async fn purge_dead(&self, client: &ClientId, before: Option<Timestamp>) -> Result<u64, BrokerError> {
        self.inner.purge_dead(client, before).await
    }

    async fn internal_depths(&self) -> Result<Vec<(&'static str, u64)>, BrokerError> {
        self.inner.internal_depths().await
    }

    async fn close(&self) {
        self.inner.close().await;
    }
}
