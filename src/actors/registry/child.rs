//! One supervised actor as the registry sees it: which life it lives, and what its news mean. No I/O.

use std::time::{Duration, Instant};

use actix::prelude::*;

use super::messages::ActorState;
use crate::actors::subscriber::Subscriber;
use crate::actors::supervision::{Exit, Lifeline, RestartHistory};
use crate::actors::{ChildNews, Control};

/// A running actor.
pub(super) struct Life {
    pub(super) control: Recipient<Control>,
    /// Its address, when it is a subscriber.
    pub(super) subscriber: Option<Addr<Subscriber>>,
    /// `None` once cut.
    pub(super) lifeline: Option<Lifeline>,
    pub(super) started: Instant,
    /// Whether its end is wanted.
    pub(super) ending: bool,
}

/// See the module.
pub(super) struct Child {
    pub(super) state: ActorState,
    /// Since when it is in that state.
    pub(super) since: Instant,
    /// Grows with every start; 0 before the first.
    pub(super) generation: u32,
    pub(super) life: Option<Life>,
    /// Whether a timer runs that will start it again.
    pub(super) restart_pending: bool,
    /// It died too often; until it has been up for a while it is reported.
    failing: bool,
    /// Made with the first unexpected end: most actors never have one.
    history: Option<Box<RestartHistory>>,
}

/// What the registry is to do after an actor's news.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing.
    Nothing,
    /// It is at work: look whether others waited for that.
    Ready,
    /// Its queue is gone: the subscriber should declare it.
    Redeclare,
    /// It ended as wanted: look what is wanted now.
    Ended,
    /// It died: start it again after this long.
    Restart(Duration),
}

impl Default for Child {
    fn default() -> Self {
        Self {
            state: ActorState::Stopped,
            since: Instant::now(),
            generation: 0,
            life: None,
            restart_pending: false,
            failing: false,
            history: None,
        }
    }
}

impl Child {
    /// Changes its state; a failing actor stays failing until it has recovered.
    pub(super) fn set_state(&mut self, state: ActorState) {
        let state = match state {
            ActorState::Starting | ActorState::Running | ActorState::Restarting if self.failing => ActorState::Failing,
            other => other,
        };
        if state != self.state {
            self.state = state;
            self.since = Instant::now();
        }
    }

    /// A new life has begun. Returns nothing: its number is [`Child::generation`], raised before.
    pub(super) fn begin(&mut self, life: Life) {
        self.life = Some(life);
        self.restart_pending = false;
        self.set_state(ActorState::Starting);
    }

    /// It is not wanted: asks it to stop, or forgets its restart. True when there is still somebody to wait for.
    pub(super) fn end(&mut self, idle: ActorState) -> bool {
        match &mut self.life {
            Some(life) => {
                if !life.ending {
                    life.ending = true;
                    // A mailbox that is full of control has somebody in it who does not answer.
                    if life.control.try_send(Control::Stop).is_err() {
                        self.cut();
                    }
                }
                true
            }
            None => {
                self.failing = false;
                self.restart_pending = false;
                self.set_state(idle);
                false
            }
        }
    }

    /// Ends it where it stands, if it lives.
    pub(super) fn cut(&mut self) {
        if let Some(lifeline) = self.life.as_mut().and_then(|life| life.lifeline.take()) {
            lifeline.cut();
        }
    }

    /// What news of its present life mean. `jitter` is a random number from 0 to 1.
    pub(super) fn hear(&mut self, news: &ChildNews, now: Instant, jitter: f64) -> Next {
        match news {
            ChildNews::Ready => {
                self.set_state(ActorState::Running);
                Next::Ready
            }
            ChildNews::Waiting => {
                self.set_state(ActorState::Starting);
                Next::Nothing
            }
            ChildNews::QueueMissing => Next::Redeclare,
            ChildNews::Exited(_) => self.bury(now, jitter),
        }
    }

    fn bury(&mut self, now: Instant, jitter: f64) -> Next {
        let Some(life) = self.life.take() else { return Next::Nothing };
        if life.ending {
            return Next::Ended;
        }
        let restart =
            self.history.get_or_insert_default().note_exit(now, now.saturating_duration_since(life.started), jitter);
        self.failing |= restart.failing;
        self.restart_pending = true;
        self.set_state(ActorState::Restarting);
        Next::Restart(restart.after)
    }

    /// It has been up for long enough: it is forgiven. True when it had been failing.
    pub(super) fn recover(&mut self) -> bool {
        let recovered = self.failing;
        self.failing = false;
        self.history = None;
        if recovered {
            self.set_state(ActorState::Running);
        }
        recovered
    }

    /// Whether it has died at all lately.
    pub(super) fn has_history(&self) -> bool {
        self.history.is_some()
    }
}

/// An exit in words, for the log.
pub(super) fn words(exit: &Exit) -> String {
    match exit {
        Exit::Stopped => "stopped unasked".into(),
        Exit::Panicked(words) => format!("panicked: {words}"),
        Exit::Aborted => "was aborted".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nobody;

    impl Actor for Nobody {
        type Context = Context<Self>;
    }

    impl Handler<Control> for Nobody {
        type Result = ();
        fn handle(&mut self, _: Control, _: &mut Self::Context) {}
    }

    fn life() -> Life {
        Life {
            control: Nobody.start().recipient(),
            subscriber: None,
            lifeline: None,
            started: Instant::now(),
            ending: false,
        }
    }

    fn died() -> ChildNews {
        ChildNews::Exited(Exit::Panicked("x".into()))
    }

    #[actix_rt::test]
    async fn a_death_is_a_restart_and_a_wanted_end_is_not() {
        let mut child = Child::default();
        child.begin(life());
        assert_eq!(child.state, ActorState::Starting);
        assert_eq!(child.hear(&ChildNews::Ready, Instant::now(), 0.5), Next::Ready);
        assert_eq!(child.state, ActorState::Running);
        assert!(matches!(child.hear(&died(), Instant::now(), 0.5), Next::Restart(_)));
        assert_eq!((child.state, child.restart_pending), (ActorState::Restarting, true));

        child.begin(life());
        assert!(child.end(ActorState::Paused));
        assert_eq!(child.hear(&ChildNews::Exited(Exit::Stopped), Instant::now(), 0.5), Next::Ended);
        assert!(!child.end(ActorState::Paused));
        assert_eq!(child.state, ActorState::Paused);
    }

    #[actix_rt::test]
    async fn a_child_that_keeps_dying_is_failing_until_it_has_recovered() {
        let mut child = Child::default();
        for _ in 0..6 {
            child.begin(life());
            child.hear(&died(), Instant::now(), 0.5);
        }
        assert_eq!(child.state, ActorState::Failing);
        child.begin(life());
        child.hear(&ChildNews::Ready, Instant::now(), 0.5);
        assert_eq!(child.state, ActorState::Failing);
        assert!(child.recover());
        assert_eq!(child.state, ActorState::Running);
        assert!(!child.has_history());
    }
}
