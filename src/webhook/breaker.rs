//! The circuit breaker of one endpoint: stops calling what only fails, and probes it.
//!
//! ```text
//!            10 failures in a row                 the open time is over
//!  closed ───────────────────────► open ───────────────────────────────► half-open: one probe
//!    ▲                              ▲                                       │          │
//!    │                              └── it fails: open for longer ──────────┘          │
//!    └───────────────────────────────────────── it succeeds ──────────────────────────┘
//! ```
//!
//! A message that waits behind it spends no attempt; the probe is an attempt like any other.
//!
//! A message that has failed before may fail because of what it is. While the endpoint takes others, the answer that
//! refuses it again says little about the endpoint, and the first hundred do not count: some messages that are never
//! taken, due together, would otherwise keep all others waiting.
//!
//! A pure state machine: time and chance are handed in.

use std::time::{Duration, Instant};

use serde::Serialize;

/// Failures in a row that open the breaker.
pub const FAILURES_TO_OPEN: u32 = 10;
/// How long it is open at first.
const OPEN_MIN: Duration = Duration::from_millis(500);
/// How much longer it is open after each probe that fails.
const OPEN_GROWTH: f64 = 1.5;
/// How long it is open at the most.
const OPEN_MAX: Duration = Duration::from_secs(60);
/// Open times vary by this much, up and down, so that endpoints of one server are not probed together.
const JITTER: f64 = 0.2;
/// How long it is open at the most when what came for the first time was taken, and only what had failed before fails.
const OPEN_MAX_WELL: Duration = Duration::from_secs(5);
/// How many refusals of what had failed before do not count after a message was taken at its first attempt.
const EXCUSED: u32 = 100;

/// What the breaker does with attempts; shown in the client's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BreakerState {
    /// Attempts are made.
    Closed,
    /// None is made for now.
    Open,
    /// One is made, to see.
    HalfOpen,
}

impl BreakerState {
    /// Every state, for metrics.
    pub const ALL: [Self; 3] = [Self::Closed, Self::Open, Self::HalfOpen];

    /// The name that the API shows.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
        }
    }
}

/// Whether an attempt may be made now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Yes.
    Open,
    /// Not before this time.
    Until(Instant),
    /// Not before an attempt that is under way has ended.
    OneAtATime,
}

impl Gate {
    /// What both admit.
    #[must_use]
    pub fn stricter(self, other: Self) -> Self {
        match (self, other) {
            (Self::Open, gate) | (gate, Self::Open) => gate,
            (Self::Until(a), Self::Until(b)) => Self::Until(a.max(b)),
            // A time can be waited for; an attempt that ends makes everyone look again.
            (Self::Until(until), Self::OneAtATime) | (Self::OneAtATime, Self::Until(until)) => Self::Until(until),
            (Self::OneAtATime, Self::OneAtATime) => Self::OneAtATime,
        }
    }
}

/// Ties a result to the state in which its attempt began: what began before the breaker opened says nothing about the
/// endpoint now, if it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket {
    epoch: u64,
    try_of: Try,
}

/// How an attempt failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The endpoint answered, and refused the message.
    Refused,
    /// No answer came.
    Silent,
}

/// Which attempt of its message an attempt is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Try {
    /// The first.
    First,
    /// A later one: the message has failed before.
    Again,
}

/// The next probe of an open breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// The earliest that it may be made.
    pub at: Instant,
    /// How long that is after the breaker opened.
    pub wait: Duration,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Closed { failures: u32 },
    Open(Probe),
    HalfOpen,
}

/// See the module.
#[derive(Debug)]
pub struct Breaker {
    state: State,
    /// Times that it was open for longer than before without a success in between.
    openings: i32,
    /// Whether the last first attempt succeeded, and the endpoint has answered since.
    is_well: bool,
    /// Refusals that need not count.
    excused: u32,
    /// Grows with every change of state.
    epoch: u64,
}

impl Default for Breaker {
    fn default() -> Self {
        Self { state: State::Closed { failures: 0 }, openings: 0, is_well: false, excused: 0, epoch: 0 }
    }
}

impl Breaker {
    /// The state, as shown.
    pub fn state(&self) -> BreakerState {
        match self.state {
            State::Closed { .. } => BreakerState::Closed,
            State::Open(_) => BreakerState::Open,
            State::HalfOpen => BreakerState::HalfOpen,
        }
    }

    /// Whether an attempt may be made.
    pub fn gate(&self, now: Instant) -> Gate {
        match self.state {
            State::Open(Probe { at, .. }) if now < at => Gate::Until(at),
            State::HalfOpen => Gate::OneAtATime,
            State::Closed { .. } | State::Open(_) => Gate::Open,
        }
    }

    /// The next probe; `None` when the breaker is not open.
    pub fn next_probe(&self) -> Option<Probe> {
        if let State::Open(probe) = self.state { Some(probe) } else { None }
    }

    /// Begins an attempt, which [`Breaker::gate`] must have admitted. Its result is reported by
    /// [`Breaker::succeeded`] or [`Breaker::failed`].
    pub fn begin(&mut self, try_of: Try) -> Ticket {
        if !matches!(self.state, State::Closed { .. }) {
            self.enter(State::HalfOpen);
        }
        Ticket { epoch: self.epoch, try_of }
    }

    /// An attempt succeeded. The endpoint works, whenever the attempt began.
    pub fn succeeded(&mut self, ticket: Ticket) {
        self.openings = 0;
        if ticket.try_of == Try::First {
            (self.is_well, self.excused) = (true, EXCUSED);
        }
        match &mut self.state {
            State::Closed { failures } => *failures = 0,
            State::Open(_) | State::HalfOpen => self.enter(State::Closed { failures: 0 }),
        }
    }

    /// An attempt failed. `roll` is random, 0 to 1.
    pub fn failed(&mut self, ticket: Ticket, fault: Fault, now: Instant, roll: f64) {
        if ticket.epoch != self.epoch {
            return;
        }
        if ticket.try_of == Try::First || fault == Fault::Silent {
            (self.is_well, self.excused) = (false, 0);
        }
        match &mut self.state {
            // Only what was refused at a later attempt finds any left.
            State::Closed { .. } if self.excused > 0 => self.excused -= 1,
            State::Closed { failures } => {
                *failures += 1;
                if *failures >= FAILURES_TO_OPEN {
                    self.open(now, roll);
                }
            }
            State::HalfOpen => self.open(now, roll),
            State::Open(_) => {}
        }
    }

    fn open(&mut self, now: Instant, roll: f64) {
        let longest = if self.is_well { OPEN_MAX_WELL } else { OPEN_MAX };
        let grown = OPEN_MIN.mul_f64(OPEN_GROWTH.powi(self.openings)).min(longest);
        let wait = grown.mul_f64(1.0 - JITTER + 2.0 * JITTER * roll.clamp(0.0, 1.0));
        if grown < longest {
            self.openings += 1;
        }
        self.enter(State::Open(Probe { at: now + wait, wait }));
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.epoch += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn go(breaker: &mut Breaker, now: Instant) -> Ticket {
        assert_eq!(breaker.gate(now), Gate::Open);
        breaker.begin(Try::First)
    }

    fn fail_at(breaker: &mut Breaker, try_of: Try, now: Instant, times: u32) {
        for _ in 0..times {
            assert_eq!(breaker.gate(now), Gate::Open);
            let ticket = breaker.begin(try_of);
            breaker.failed(ticket, Fault::Refused, now, 0.5);
        }
    }

    fn fail(breaker: &mut Breaker, now: Instant, times: u32) {
        fail_at(breaker, Try::First, now, times);
    }

    fn succeed(breaker: &mut Breaker, now: Instant) {
        let ticket = go(breaker, now);
        breaker.succeeded(ticket);
    }

    #[test]
    fn opens_after_ten_failures_in_a_row_and_no_earlier() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        for _ in 0..100 {
            fail(&mut breaker, now, FAILURES_TO_OPEN - 1);
            assert_eq!(breaker.state(), BreakerState::Closed);
            succeed(&mut breaker, now);
        }
        fail(&mut breaker, now, FAILURES_TO_OPEN);
        assert_eq!(breaker.state(), BreakerState::Open);
        assert_eq!(breaker.gate(now), Gate::Until(now + OPEN_MIN));
    }

    #[test]
    fn one_probe_at_a_time_and_each_failure_lengthens_the_wait() {
        let (mut breaker, mut now) = (Breaker::default(), Instant::now());
        fail(&mut breaker, now, FAILURES_TO_OPEN);
        for expected_ms in [500, 750, 1125, 1687, 2531, 3796, 5695, 8542, 12814, 19221, 28832, 43248, 60000, 60000] {
            let Gate::Until(until) = breaker.gate(now) else { panic!("open") };
            assert_eq!((until - now).as_millis(), expected_ms);
            now = until;
            let probe = go(&mut breaker, now);
            assert_eq!(breaker.state(), BreakerState::HalfOpen);
            assert_eq!(breaker.gate(now), Gate::OneAtATime);
            breaker.failed(probe, Fault::Refused, now, 0.5);
        }
        now += OPEN_MAX;
        succeed(&mut breaker, now);
        assert_eq!(breaker.state(), BreakerState::Closed);
        fail(&mut breaker, now, FAILURES_TO_OPEN);
        assert_eq!(breaker.gate(now), Gate::Until(now + OPEN_MIN));
    }

    #[test]
    fn late_failures_say_nothing_and_late_successes_close() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        let late = [go(&mut breaker, now), go(&mut breaker, now), go(&mut breaker, now)];
        fail(&mut breaker, now, FAILURES_TO_OPEN);
        let Gate::Until(until) = breaker.gate(now) else { panic!("open") };
        breaker.failed(late[0], Fault::Refused, now, 1.0);
        assert_eq!(breaker.gate(now), Gate::Until(until));
        let probe = go(&mut breaker, until);
        breaker.failed(late[1], Fault::Refused, until, 1.0);
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        breaker.succeeded(late[2]);
        assert_eq!(breaker.state(), BreakerState::Closed);
        // The probe fails after another attempt succeeded: that is no reason to open.
        breaker.failed(probe, Fault::Refused, until, 0.5);
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn open_times_vary_by_a_fifth() {
        for (roll, factor) in [(0.0, 0.8), (1.0, 1.2)] {
            let (mut breaker, now) = (Breaker::default(), Instant::now());
            for _ in 0..FAILURES_TO_OPEN {
                let ticket = go(&mut breaker, now);
                breaker.failed(ticket, Fault::Refused, now, roll);
            }
            assert_eq!(breaker.gate(now), Gate::Until(now + OPEN_MIN.mul_f64(factor)));
            let wait = OPEN_MIN.mul_f64(factor);
            assert_eq!(breaker.next_probe(), Some(Probe { at: now + wait, wait }));
        }
    }

    #[test]
    fn what_has_failed_before_does_not_count_while_the_endpoint_takes_others() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        for _ in 0..10 {
            succeed(&mut breaker, now);
            fail_at(&mut breaker, Try::Again, now, EXCUSED);
            assert_eq!(breaker.state(), BreakerState::Closed);
        }
        fail_at(&mut breaker, Try::Again, now, FAILURES_TO_OPEN - 1);
        assert_eq!(breaker.state(), BreakerState::Closed);
        fail_at(&mut breaker, Try::Again, now, 1);
        assert_eq!(breaker.state(), BreakerState::Open);
    }

    #[test]
    fn no_answer_counts_always() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        succeed(&mut breaker, now);
        for _ in 0..FAILURES_TO_OPEN {
            let ticket = breaker.begin(Try::Again);
            breaker.failed(ticket, Fault::Silent, now, 0.5);
        }
        assert_eq!(breaker.state(), BreakerState::Open);
    }

    #[test]
    fn while_all_that_is_new_is_taken_it_is_not_open_for_long() {
        let (mut breaker, mut now) = (Breaker::default(), Instant::now());
        succeed(&mut breaker, now);
        fail_at(&mut breaker, Try::Again, now, EXCUSED + FAILURES_TO_OPEN);
        for _ in 0..20 {
            let Some(probe) = breaker.next_probe() else { panic!("open") };
            assert!(probe.wait <= OPEN_MAX_WELL);
            now = probe.at;
            fail_at(&mut breaker, Try::Again, now, 1);
        }
        // From there it grows as ever.
        now += OPEN_MAX_WELL;
        fail(&mut breaker, now, 1);
        assert!(breaker.next_probe().is_some_and(|probe| probe.wait.as_secs() == 5 && probe.wait > OPEN_MAX_WELL));
    }

    #[test]
    fn what_has_failed_before_counts_once_something_new_failed() {
        let (mut breaker, now) = (Breaker::default(), Instant::now());
        fail_at(&mut breaker, Try::Again, now, FAILURES_TO_OPEN);
        assert_eq!(breaker.state(), BreakerState::Open, "nothing is known of the endpoint");
        let mut breaker = Breaker::default();
        succeed(&mut breaker, now);
        fail(&mut breaker, now, 1);
        fail_at(&mut breaker, Try::Again, now, FAILURES_TO_OPEN - 1);
        assert_eq!(breaker.state(), BreakerState::Open);
        // One that had failed before and is taken now closes it, but says nothing of the next.
        let mut breaker = Breaker::default();
        fail(&mut breaker, now, FAILURES_TO_OPEN - 1);
        let ticket = breaker.begin(Try::Again);
        breaker.succeeded(ticket);
        fail_at(&mut breaker, Try::Again, now, FAILURES_TO_OPEN);
        assert_eq!(breaker.state(), BreakerState::Open);
    }
}
