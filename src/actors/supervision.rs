//! Supervision: starts actors on arbiters, waits for their end, and decides when they are started again.
//!
//! actix's own `Supervisor` restarts an actor that stops, not one that panics: a panic ends actor and supervisor
//! together, and nobody hears of it. So each actor's context is run here as a task of its own, which is awaited; however
//! it ends, its owner is told. Whoever owns the actor then asks [`RestartHistory`] when to start it again.
//!
//! # Semantics
//! - [`start`] returns at once. The actor is made on its arbiter's thread; a panic while it is made, started or at work
//!   ends it alone.
//! - Exactly one [`Exit`] is reported for each start, also when the arbiter goes away.
//! - An actor that is asked to stop finishes the batch that it is settling. One that does not stop in time is aborted:
//!   what it held unsettled goes back to its queue.

use std::any::Any;
use std::cell::Cell;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

use actix::dev::channel;
use actix::prelude::*;
use tokio::sync::oneshot;

/// Messages in an actor's mailbox. They are control only: a stop, a change of patterns.
const MAILBOX_CAPACITY: usize = 16;

/// Wait before the first restart, in milliseconds; doubled for each that follows.
const BACKOFF_MIN_MS: u64 = 100;

/// The longest wait before a restart, in milliseconds.
const BACKOFF_MAX_MS: u64 = 30_000;

/// Restart intensity: more exits than this...
const EXITS_MAX: usize = 5;

/// ...in this time, in seconds, and the actor is failing.
const EXITS_WINDOW_S: u64 = 60;

/// An actor that was up for this long has recovered, in seconds: its backoff starts anew.
pub const STABLE_AFTER_S: u64 = 10;

/// How an actor ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// It stopped by itself, or because it was asked to.
    Stopped,
    /// It panicked; the panic's own words.
    Panicked(String),
    /// It was aborted, or its arbiter ended.
    Aborted,
}

/// A running actor's lifeline.
#[derive(Debug)]
pub struct Lifeline(oneshot::Sender<()>);

impl Lifeline {
    /// Ends the actor where it stands. Dropping the lifeline does the same.
    pub fn cut(self) {
        drop(self.0);
    }
}

/// Reports an exit once, even when the task that should do it is dropped.
struct Reporter<F: FnOnce(Exit)>(Option<F>);

impl<F: FnOnce(Exit)> Reporter<F> {
    fn report(&mut self, exit: Exit) {
        if let Some(report) = self.0.take() {
            report(exit);
        }
    }
}

impl<F: FnOnce(Exit)> Drop for Reporter<F> {
    fn drop(&mut self) {
        self.report(Exit::Aborted);
    }
}

/// Starts the actor that `make` makes on `arbiter`; `on_exit` is called once, when it has ended.
pub fn start<A, M, F>(arbiter: &ArbiterHandle, make: M, on_exit: F) -> (Addr<A>, Lifeline)
where
    A: Actor<Context = Context<A>>,
    M: FnOnce() -> A + Send + 'static,
    F: FnOnce(Exit) + Send + 'static,
{
    let (sender, receiver) = channel::channel(MAILBOX_CAPACITY);
    let (lifeline, mut cut) = oneshot::channel();
    let mut reporter = Reporter(Some(on_exit));
    let task = async move {
        let mut life = actix_rt::spawn(async move { Context::with_receiver(receiver).into_future(make()).await });
        let end = tokio::select! {
            end = &mut life => end,
            // Never completed, only dropped: the owner cut the lifeline, or is gone.
            _ = &mut cut => {
                life.abort();
                life.await
            }
        };
        reporter.report(match end {
            Ok(()) => Exit::Stopped,
            Err(error) if error.is_panic() => Exit::Panicked(words_of(&*error.into_panic())),
            Err(_) => Exit::Aborted,
        });
    };
    // When the arbiter is gone the task is dropped here, and with it the reporter, which reports.
    arbiter.spawn(task);
    (Addr::new(sender), Lifeline(lifeline))
}

fn words_of(panic: &(dyn Any + Send)) -> String {
    let words = panic.downcast_ref::<&str>().map(|words| (*words).to_owned());
    words.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no words".into())
}

/// When to start an actor again, and whether it dies too often.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restart {
    /// How long to wait.
    pub after: Duration,
    /// Whether it exceeds the restart intensity. It is started all the same, at the longest backoff.
    pub failing: bool,
}

/// The recent exits of one actor.
#[derive(Debug, Default)]
pub struct RestartHistory {
    recent: VecDeque<Instant>,
    /// Exits since it last was up for [`STABLE_AFTER_S`].
    in_a_row: u32,
}

impl RestartHistory {
    /// Notes an exit after it was up for `up_for`. `jitter` is a random number from 0 to 1.
    pub fn note_exit(&mut self, now: Instant, up_for: Duration, jitter: f64) -> Restart {
        if up_for >= Duration::from_secs(STABLE_AFTER_S) {
            self.in_a_row = 0;
        }
        self.in_a_row = self.in_a_row.saturating_add(1);
        self.recent.retain(|exit| now.duration_since(*exit) < Duration::from_secs(EXITS_WINDOW_S));
        if self.recent.len() > EXITS_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(now);
        let failing = self.recent.len() > EXITS_MAX;
        let attempt = if failing { u32::MAX } else { self.in_a_row - 1 };
        Restart { after: backoff(attempt, jitter), failing }
    }
}

/// How long to wait before attempt number `attempt` (from 0): doubled each time within bounds, and spread by `jitter`
/// (0 to 1) over three quarters to five quarters of that, so that what failed together does not come back together.
pub fn backoff(attempt: u32, jitter: f64) -> Duration {
    let doubled = BACKOFF_MIN_MS.saturating_mul(1_u64.checked_shl(attempt).unwrap_or(u64::MAX)).min(BACKOFF_MAX_MS);
    Duration::from_millis(doubled).mul_f64(0.75 + jitter.clamp(0.0, 1.0) / 2.0)
}

/// [`backoff`] with a jitter of its own.
pub fn random_backoff(attempt: u32) -> Duration {
    backoff(attempt, rand::random())
}

/// The threads that the actors are spread over. A client's actors share one.
#[derive(Debug)]
pub struct Arbiters {
    arbiters: Vec<Arbiter>,
    handles: Vec<ArbiterHandle>,
    next: Cell<usize>,
}

impl Arbiters {
    /// As many as there are cores, and at least two, so that one busy actor does not hold up all others.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start() -> std::io::Result<Self> {
        let count = std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 64));
        let arbiters = (0..count).map(|_| Arbiter::try_new()).collect::<std::io::Result<Vec<_>>>()?;
        let handles = arbiters.iter().map(Arbiter::handle).collect();
        Ok(Self { arbiters, handles, next: Cell::new(0) })
    }

    /// The number of the arbiter for the next client: each in turn.
    pub fn assign(&self) -> usize {
        let number = self.next.get();
        self.next.set((number + 1) % self.handles.len());
        number
    }

    /// An arbiter by the number that [`Arbiters::assign`] gave.
    pub fn get(&self, number: usize) -> &ArbiterHandle {
        &self.handles[number % self.handles.len()]
    }

    /// Stops the threads. What still runs on them is dropped.
    pub fn stop(&self) {
        for arbiter in &self.arbiters {
            arbiter.stop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Mortal;

    #[derive(Message)]
    #[rtype(result = "()")]
    enum Die {
        Stop,
        Panic,
    }

    impl Actor for Mortal {
        type Context = Context<Self>;
    }

    impl Handler<Die> for Mortal {
        type Result = ();
        fn handle(&mut self, how: Die, ctx: &mut Self::Context) {
            match how {
                Die::Stop => ctx.stop(),
                Die::Panic => panic!("as asked"),
            }
        }
    }

    fn start_mortal(
        make: impl FnOnce() -> Mortal + Send + 'static,
    ) -> (Addr<Mortal>, Lifeline, oneshot::Receiver<Exit>) {
        let (sender, exit) = oneshot::channel();
        let (addr, lifeline) = start(&Arbiter::current(), make, move |exit| {
            let _ = sender.send(exit);
        });
        (addr, lifeline, exit)
    }

    #[actix_rt::test]
    async fn every_end_is_reported() {
        let (addr, _lifeline, exit) = start_mortal(|| Mortal);
        addr.send(Die::Stop).await.expect("alive");
        assert_eq!(exit.await, Ok(Exit::Stopped));

        let (addr, _lifeline, exit) = start_mortal(|| Mortal);
        addr.send(Die::Panic).await.expect_err("dies of it");
        assert_eq!(exit.await, Ok(Exit::Panicked("as asked".into())));

        let (_addr, _lifeline, exit) = start_mortal(|| panic!("while made: {}", 1));
        assert_eq!(exit.await, Ok(Exit::Panicked("while made: 1".into())));

        let (_addr, lifeline, exit) = start_mortal(|| Mortal);
        lifeline.cut();
        assert_eq!(exit.await, Ok(Exit::Aborted));
    }

    #[actix_rt::test]
    async fn a_start_on_an_arbiter_that_is_gone_is_reported_too() {
        let arbiter = Arbiter::new();
        let handle = arbiter.handle();
        arbiter.stop();
        arbiter.join().expect("ends");
        let (sender, exit) = oneshot::channel();
        let (_addr, _lifeline) = start(
            &handle,
            || Mortal,
            move |exit| {
                let _ = sender.send(exit);
            },
        );
        assert_eq!(exit.await, Ok(Exit::Aborted));
    }

    #[test]
    fn restarts_back_off_and_an_actor_that_keeps_dying_is_failing() {
        let mut history = RestartHistory::default();
        let start = Instant::now();
        let at = |s: u64| start + Duration::from_secs(s);
        let ms: Vec<u128> = (0..5)
            .map(|n| {
                let restart = history.note_exit(at(n), Duration::ZERO, 0.5);
                assert!(!restart.failing);
                restart.after.as_millis()
            })
            .collect();
        assert_eq!(ms, [100, 200, 400, 800, 1600]);
        let sixth = history.note_exit(at(5), Duration::ZERO, 0.5);
        assert_eq!(sixth, Restart { after: Duration::from_secs(30), failing: true });
        let much_later = history.note_exit(at(500), Duration::from_secs(400), 0.5);
        assert_eq!(much_later, Restart { after: Duration::from_millis(100), failing: false });
    }

    #[test]
    fn backoff_is_bounded_and_spread() {
        assert_eq!(backoff(0, 0.0), Duration::from_millis(75));
        assert_eq!(backoff(0, 1.0), Duration::from_millis(125));
        assert_eq!(backoff(u32::MAX, 0.5), Duration::from_secs(30));
    }
}
