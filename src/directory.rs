//! The directory: what the message path needs to know of the clients, kept in memory by the registry.
//!
//! The `ClientRegistry` actor is the only writer; HTTP handlers and pipelines read. So no message ever waits for the
//! control plane. An entry is immutable: a change puts a new entry in its place.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;
use tokio::sync::watch;

use crate::client::{ClientId, ClientRecord};
use crate::secret::SecretSlots;

/// Everything the message path knows of one client.
#[derive(Debug)]
pub struct ClientEntry {
    /// The record as the API shows it.
    pub record: ClientRecord,
    /// Hashes of the secrets that are valid now.
    pub secrets: SecretSlots,
    /// Told apart from an earlier client of the same id: tokens name it, so they do not outlive the client.
    pub incarnation: u64,
    /// `send_per_s`, enforced; shared by the entries that follow unless the limit changes.
    pub send_limiter: Option<Arc<crate::limits::SendLimiter>>,
    /// Whoever publishes for the client passes it first; shared by the entries that follow.
    pub gate: Arc<SendGate>,
    /// Set by the directory when another entry takes the place of this one.
    pub replaced: watch::Sender<bool>,
}

impl ClientEntry {
    /// Waits until another entry has taken the place of this one. Safe to drop.
    pub async fn replaced(&self) {
        // The sender is this entry's own, so it is there.
        let _ = self.replaced.subscribe().wait_for(|replaced| *replaced).await;
    }
}

/// Counts the publishes of one client that are under way, and is closed when the client is deleted: what was let in
/// before is waited for and forwarded, so that no message with a 202 is deleted with its queue.
#[derive(Debug, Default)]
pub struct SendGate(AtomicU64);

/// Set in a gate that is closed; the rest is the count.
const CLOSED: u64 = 1 << 63;

/// A publish under way. Held until the broker has answered.
#[derive(Debug)]
pub struct SendPermit(Arc<SendGate>);

impl SendGate {
    /// Lets a publish in; `None` when the client is being deleted.
    pub fn enter(self: &Arc<Self>) -> Option<SendPermit> {
        let permit = (self.0.fetch_add(1, Ordering::SeqCst) & CLOSED == 0).then(|| SendPermit(Arc::clone(self)));
        if permit.is_none() {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
        permit
    }

    /// For the registry: lets nobody in any more.
    pub(crate) fn close(&self) {
        self.0.fetch_or(CLOSED, Ordering::SeqCst);
    }

    /// For the registry: the client stays after all.
    pub(crate) fn open(&self) {
        self.0.fetch_and(!CLOSED, Ordering::SeqCst);
    }

    /// How many publishes are under way.
    pub fn under_way(&self) -> u64 {
        self.0.load(Ordering::SeqCst) & !CLOSED
    }
}

impl Drop for SendPermit {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// All clients, by id in order. Cheap to share.
#[derive(Debug, Default)]
pub struct Directory {
    clients: RwLock<BTreeMap<ClientId, Arc<ClientEntry>>>,
}

impl Directory {
    /// The client's entry, if there is such a client.
    pub fn get(&self, id: &str) -> Option<Arc<ClientEntry>> {
        self.clients.read().get(id).cloned()
    }

    /// Up to `limit` entries in order of their ids, after `after`.
    pub fn page(&self, after: Option<&str>, limit: usize) -> Vec<Arc<ClientEntry>> {
        use std::ops::Bound;
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.clients.read().range::<str, _>((from, Bound::Unbounded)).take(limit).map(|(_, e)| Arc::clone(e)).collect()
    }

    /// How many clients there are.
    pub fn len(&self) -> usize {
        self.clients.read().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// For the registry: adds or replaces.
    pub fn put(&self, entry: impl Into<Arc<ClientEntry>>) {
        let entry = entry.into();
        let before = self.clients.write().insert(entry.record.client_id.clone(), entry);
        if let Some(before) = before {
            before.replaced.send_replace(true);
        }
    }

    /// For the registry: removes.
    pub fn remove(&self, id: &ClientId) {
        self.clients.write().remove(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_gate_lets_nobody_in_and_knows_who_is_still_inside() {
        let gate = Arc::new(SendGate::default());
        let permit = gate.enter().expect("open");
        gate.close();
        assert!(gate.enter().is_none());
        assert_eq!(gate.under_way(), 1);
        drop(permit);
        assert_eq!(gate.under_way(), 0);
        gate.open();
        assert!(gate.enter().is_some());
    }
}
