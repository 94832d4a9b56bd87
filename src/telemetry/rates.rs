//! What each client sent and received since the start: two counters a client, from which the console makes rates.
//!
//! Kept apart from the metrics, whose cardinality must not grow with clients. Bounded by the number of clients: the
//! registry's removal of a client calls [`ClientRates::forget`], and only known senders and inboxes are counted.

use std::sync::atomic::{AtomicU64, Ordering};

use dashmap::DashMap;

use crate::client::ClientId;

/// Counters by client.
#[derive(Debug, Default)]
pub struct ClientRates {
    by_client: DashMap<ClientId, Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    sent: AtomicU64,
    received: AtomicU64,
}

/// What a client sent and received since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Messages accepted from it.
    pub sent: u64,
    /// Copies that it settled or was pushed.
    pub received: u64,
}

impl ClientRates {
    /// Counts messages accepted from a client.
    pub fn note_sent(&self, client: &ClientId, messages: u64) {
        self.with(client, |counters| counters.sent.fetch_add(messages, Ordering::Relaxed));
    }

    /// Counts copies that a client received.
    pub fn note_received(&self, client: &ClientId, copies: u64) {
        self.with(client, |counters| counters.received.fetch_add(copies, Ordering::Relaxed));
    }

    /// What a client sent and received.
    pub fn totals(&self, client: &str) -> Totals {
        self.by_client.get(client).map_or_else(Totals::default, |counters| Totals {
            sent: counters.sent.load(Ordering::Relaxed),
            received: counters.received.load(Ordering::Relaxed),
        })
    }

    /// Forgets a client that was deleted.
    pub fn forget(&self, client: &ClientId) {
        self.by_client.remove(client);
    }

    /// Forgets every client for which `exists` says no: what was counted for a deleted client's last messages.
    pub fn retain(&self, exists: impl Fn(&ClientId) -> bool) {
        self.by_client.retain(|client, _| exists(client));
    }

    fn with<R>(&self, client: &ClientId, count: impl FnOnce(&Counters) -> R) {
        // A known client, nearly always: reads share the shard's lock.
        if let Some(counters) = self.by_client.get(client) {
            count(&counters);
            return;
        }
        count(&self.by_client.entry(client.clone()).or_default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_counted_apart_and_forgotten() {
        let rates = ClientRates::default();
        let (a, b) = (ClientId::parse("a").expect("an id"), ClientId::parse("b").expect("an id"));
        rates.note_sent(&a, 3);
        rates.note_received(&b, 2);
        rates.note_sent(&a, 1);
        assert_eq!(rates.totals("a"), Totals { sent: 4, received: 0 });
        assert_eq!(rates.totals("b"), Totals { sent: 0, received: 2 });
        rates.retain(|client| client.as_str() == "b");
        assert_eq!(rates.totals("a"), Totals::default());
        rates.forget(&b);
        assert_eq!(rates.totals("b"), Totals::default());
    }
}
