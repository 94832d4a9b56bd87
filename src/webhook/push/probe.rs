//! Which message the breaker's probe is made with: one that has not failed yet, if there is one near.
//!
//! Those that failed before come first when they are due, or stand together in the inbox. Some of them may never be
//! taken, and probing with one after the other would leave an endpoint alone that takes everything else. So while the
//! breaker is open and only such are in hand, they are put back to wait a while in the broker, with the count that they
//! have, and others are read, until one comes that is new, nothing comes, or the search has taken long enough.

use std::time::{Duration, Instant};

use super::{Host, Push, Waiting};
use crate::broker::Outcome;
use crate::webhook::breaker::{BreakerState, Gate, Probe};

/// Messages that are read at once in search of one that is new.
pub(super) const LOOK_AT_ONCE: u32 = 32;
/// Messages that are looked past for one probe.
const LOOK_PAST: u32 = 1000;
/// When nothing has come for this long, there is nothing else.
const LOOK_WAIT: Duration = Duration::from_millis(250);
/// How long a search may keep a probe waiting that could be made.
const LOOK_MAX: Duration = Duration::from_secs(1);
/// Messages are put back for this many times as long as the breaker waits, so that the next searches get past them. They
/// also wait that long when the endpoint works again before.
const ASIDE_WAITS: u32 = 3;
/// The longest that messages are put back for.
const ASIDE_MAX: Duration = Duration::from_secs(128);

/// The search for one probe.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// When it began.
    began: Option<Instant>,
    /// How many were looked past.
    past: u32,
    /// Until when to wait for another.
    until: Option<Instant>,
}

impl<H: Host> Push<H> {
    /// Whether what is in hand, and there is something, has all failed before, and another would be the better probe.
    pub(super) fn is_looking(&self) -> bool {
        self.breaker.state() == BreakerState::Open
            && !self.webhook.ordered
            && self.look.past < LOOK_PAST
            && !self.waiting.is_empty()
            && self.waiting.iter().all(|waiting| waiting.attempts > 0)
    }

    /// Keeps a probe waiting while a better one may come.
    pub(super) fn look_gate(&self, now: Instant) -> Gate {
        let Some(probe) = self.breaker.next_probe().filter(|_| self.is_looking()) else { return Gate::Open };
        // What is being put back is in hand until it is settled: no others come before.
        let until = if self.settling.is_empty() { self.look.until } else { self.look.began.map(|at| last(at, probe)) };
        until.filter(|until| now < *until).map_or(Gate::Open, Gate::Until)
    }

    /// Something came, or can come now that something is settled: waits for more.
    pub(super) fn look_on(&mut self) {
        if let Some(probe) = self.breaker.next_probe() {
            let now = Instant::now();
            let began = *self.look.began.get_or_insert(now);
            self.look.until = Some((now + LOOK_WAIT).min(last(began, probe)));
        }
    }

    /// Puts back to wait what has failed before, all but the one that failed least, when only such are in hand.
    pub(super) fn look_past_failed(&mut self) {
        let Some(Probe { wait, .. }) = self.breaker.next_probe().filter(|_| self.is_looking()) else { return };
        // Few values, because a broker may have a queue for each.
        let delay_s = (wait * ASIDE_WAITS).as_secs().saturating_add(1).next_power_of_two();
        let delay = Duration::from_secs(delay_s).min(ASIDE_MAX);
        if let Some(least) = self.failed_least() {
            self.waiting.swap(0, least);
        }
        while self.waiting.len() > 1 && self.look.past < LOOK_PAST {
            let Some(Waiting { delivery, consumer, attempts, .. }) = self.waiting.pop_back() else { return };
            self.look.past += 1;
            self.outcomes.push((consumer, delivery, Outcome::Delay { delay, attempts }));
        }
    }

    /// The message to attempt next: the first, or for a probe the first of those that failed least.
    pub(super) fn take_next(&mut self) -> Option<Waiting> {
        if self.webhook.ordered || self.breaker.state() == BreakerState::Closed {
            return self.waiting.pop_front();
        }
        self.waiting.remove(self.failed_least()?)
    }

    fn failed_least(&self) -> Option<usize> {
        let (least, _) = self.waiting.iter().enumerate().min_by_key(|(_, waiting)| waiting.attempts)?;
        Some(least)
    }
}

/// When a search that began then has taken long enough.
fn last(began: Instant, probe: Probe) -> Instant {
    began.max(probe.at) + LOOK_MAX
}
