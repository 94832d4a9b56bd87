//! The breakers' states, for the client's record and the metrics.

use std::sync::Arc;

use dashmap::DashMap;

use super::breaker::BreakerState;
use crate::client::ClientId;
use crate::telemetry::Telemetry;

/// The state of each webhook's breaker, while its pusher lives. Bounded by the number of clients.
#[derive(Debug)]
pub struct Breakers {
    states: DashMap<ClientId, BreakerState>,
    telemetry: Telemetry,
}

impl Breakers {
    /// None yet.
    pub fn new(telemetry: Telemetry) -> Arc<Self> {
        Arc::new(Self { states: DashMap::new(), telemetry })
    }

    /// The state of this client's; `None` when nothing is pushed to it.
    pub fn get(&self, client: &ClientId) -> Option<BreakerState> {
        self.states.get(client).map(|state| *state)
    }

    /// Shows the state of a pusher's breaker for as long as what is returned lives. The last one shown for a client
    /// counts.
    pub fn show(self: &Arc<Self>, client: ClientId) -> ShownBreaker {
        let mut shown = ShownBreaker { breakers: Arc::clone(self), client, state: None };
        shown.set(BreakerState::Closed);
        shown
    }

    fn count(&self, state: BreakerState, change: i64) {
        self.telemetry.metrics.webhook_breakers.with_label_values(&[state.as_str()]).add(change);
    }
}

/// One breaker's place in [`Breakers`].
#[derive(Debug)]
pub struct ShownBreaker {
    breakers: Arc<Breakers>,
    client: ClientId,
    state: Option<BreakerState>,
}

impl ShownBreaker {
    /// Shows another state.
    pub fn set(&mut self, state: BreakerState) {
        if self.state == Some(state) {
            return;
        }
        if let Some(before) = self.state.replace(state) {
            self.breakers.count(before, -1);
        }
        self.breakers.count(state, 1);
        self.breakers.states.insert(self.client.clone(), state);
    }
}

impl Drop for ShownBreaker {
    fn drop(&mut self) {
        if let Some(state) = self.state.take() {
            self.breakers.count(state, -1);
            self.breakers.states.remove(&self.client);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_shown_and_counted_while_the_pusher_lives() {
        let telemetry = crate::telemetry::new(0);
        let gauge = |state: &str| telemetry.metrics.webhook_breakers.with_label_values(&[state]).get();
        let breakers = Breakers::new(telemetry.clone());
        let client = ClientId::parse("a").expect("test id");
        let mut shown = breakers.show(client.clone());
        assert_eq!(breakers.get(&client), Some(BreakerState::Closed));
        shown.set(BreakerState::Open);
        shown.set(BreakerState::Open);
        assert_eq!((gauge("closed"), gauge("open")), (0, 1));
        assert_eq!(breakers.get(&client), Some(BreakerState::Open));
        drop(shown);
        assert_eq!((gauge("open"), breakers.get(&client)), (0, None));
    }
}
