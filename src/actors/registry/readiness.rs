//! What is told of the actors' states.

use std::time::Duration;

use super::core::Core;
use super::messages::{ActorState, ActorStates, Readiness};
use crate::actors::ActorKind;
use crate::client::ClientId;

/// Reasons that readiness names at most.
const REASONS_MAX: usize = 20;

/// How long a client's actor may take to start before that counts against readiness, in seconds.
const START_GRACE_S: u64 = 5;

impl Core {
    /// The states of a client's actors.
    pub(super) fn states(&self, id: &ClientId) -> Option<ActorStates> {
        self.with(id, |client| client.states())
    }

    /// See [`Readiness`].
    pub(super) fn readiness(&self) -> Readiness {
        let mut reasons = Vec::new();
        if self.stopping.get() {
            reasons.push("shutting down".to_owned());
        }
        let publisher = self.publisher.borrow().state;
        if publisher != ActorState::Running {
            reasons.push(format!("publisher is {}", publisher.as_str()));
        }
        let clients = self.clients.borrow();
        if !self.started.get() {
            let waiting = clients.values().filter(|client| !client.is_ready(self.pushes())).count();
            if waiting > 0 {
                reasons.push(format!("starting: {} of {} clients are ready", clients.len() - waiting, clients.len()));
            } else if reasons.is_empty() {
                self.started.set(true);
            }
        }
        let grace = Duration::from_secs(START_GRACE_S);
        for (id, client) in clients.iter() {
            for kind in ActorKind::PER_CLIENT {
                let child = client.child(kind);
                let bad = match child.state {
                    ActorState::Failing => true,
                    ActorState::Starting | ActorState::Restarting => child.since.elapsed() > grace,
                    ActorState::Running | ActorState::Paused | ActorState::Stopped => false,
                };
                if bad && reasons.len() < REASONS_MAX {
                    reasons.push(format!("{kind} of {id} is {}", child.state.as_str()));
                }
            }
        }
        Readiness { ready: reasons.is_empty(), reasons }
    }

    /// See [`super::GetCensus`].
    pub(super) fn census(&self) -> Vec<(&'static str, &'static str, u64)> {
        let mut counts = [[0_u64; ActorState::ALL.len()]; KINDS.len()];
        let index = |state| ActorState::ALL.iter().position(|known| *known == state).unwrap_or_default();
        for client in self.clients.borrow().values() {
            for (kind, counts) in ActorKind::PER_CLIENT.iter().zip(&mut counts) {
                counts[index(client.child(*kind).state)] += 1;
            }
        }
        counts[KINDS.len() - 1][index(self.publisher.borrow().state)] += 1;
        let named = |(kind, counts): (&ActorKind, [u64; ActorState::ALL.len()])| {
            let kind = kind.as_str();
            ActorState::ALL.iter().zip(counts).map(move |(state, count)| (kind, state.as_str(), count))
        };
        KINDS.iter().zip(counts).flat_map(named).collect()
    }
}

/// Every kind: those of which each client has one, then the publisher.
const KINDS: [ActorKind; 5] = [
    ActorKind::PER_CLIENT[0],
    ActorKind::PER_CLIENT[1],
    ActorKind::PER_CLIENT[2],
    ActorKind::PER_CLIENT[3],
    ActorKind::Publisher,
];
