//! What is told of the actors' states.

use std::time::Duration;

use super::core::Core;
use super::messages::{ActorCensus, ActorState, ActorStates, Readiness};
use crate::actors::ActorKind;
use crate::broker::Health;
use crate::client::ClientId;

/// Reasons that readiness names at most.
const REASONS_MAX: usize = 20;

/// Clients that a census names at most.
const TROUBLED_MAX: usize = 1000;

/// How long a client's actor may take to start before that counts against readiness, in seconds.
const START_GRACE_S: u64 = 5;

impl Core {
    /// The states of a client's actors. While the broker is away none is at work, also one that had nothing to do when
    /// it went, and so has not noticed.
    pub(super) fn states(&self, id: &ClientId) -> Option<ActorStates> {
        let states = self.with(id, |client| client.states())?;
        let is_away = matches!(self.shared.broker.health(), Health::Unreachable(_));
        Some(if is_away { states.waiting() } else { states })
    }

    /// See [`ActorCensus`]. Looks at every actor: a millisecond for ten thousand clients.
    pub(super) fn census(&self) -> ActorCensus {
        let mut counts = [[0_u64; ActorState::ALL.len()]; ActorKind::PER_CLIENT.len()];
        let mut troubled = Vec::new();
        for (id, client) in self.clients.borrow().iter() {
            let mut is_troubled = false;
            for (kind, counts) in ActorKind::PER_CLIENT.into_iter().zip(&mut counts) {
                let state = client.child(kind).state;
                counts[state as usize] += 1;
                is_troubled |= matches!(state, ActorState::Starting | ActorState::Restarting | ActorState::Failing);
            }
            if is_troubled && troubled.len() < TROUBLED_MAX {
                troubled.push((id.clone(), client.states()));
            }
        }
        let per_client = ActorKind::PER_CLIENT.into_iter().zip(counts).flat_map(|(kind, counts)| {
            ActorState::ALL.into_iter().map(move |state| (kind, state, counts[state as usize]))
        });
        let publisher = (ActorKind::Publisher, self.publisher.borrow().state, 1);
        let counts = per_client.chain([publisher]).filter(|(_, _, count)| *count > 0).collect();
        ActorCensus { counts, troubled }
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
}
