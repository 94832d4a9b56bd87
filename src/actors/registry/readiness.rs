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
            reasons.push(format!("publisher is {}", state_name(publisher)));
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
                    reasons.push(format!("{kind} of {id} is {}", state_name(child.state)));
                }
            }
        }
        Readiness { ready: reasons.is_empty(), reasons }
    }
}

fn state_name(state: ActorState) -> &'static str {
    match state {
        ActorState::Starting => "starting",
        ActorState::Running => "running",
        ActorState::Paused => "paused",
        ActorState::Restarting => "restarting",
        ActorState::Failing => "failing: it keeps dying",
        ActorState::Stopped => "stopped",
    }
}
