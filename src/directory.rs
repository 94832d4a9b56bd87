//! The directory: what the message path needs to know of the clients, kept in memory by the registry.
//!
//! The `ClientRegistry` actor is the only writer; HTTP handlers and pipelines read. So no message ever waits for the
//! control plane. An entry is immutable: a change puts a new entry in its place.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::RwLock;

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
    pub fn put(&self, entry: ClientEntry) {
        self.clients.write().insert(entry.record.client_id.clone(), Arc::new(entry));
    }

    /// For the registry: removes.
    pub fn remove(&self, id: &ClientId) {
        self.clients.write().remove(id);
    }
}
