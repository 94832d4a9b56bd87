//! `latency`: from the moment a message should leave its sender to its arrival in a long poll, at a steady rate.
//!
//! Messages are due by the clock, not by the answers to earlier ones, and are timed from when they are due: a router
//! that stops for a moment is charged for everyone who had to wait meanwhile.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::Options;
use super::load::{Run, Tasks, receive};
use super::payload::Payload;
use super::report::Report;
use super::scenarios::report;
use super::target::{Caller, Target, unexpected};
use crate::cli::error::CliError;
use crate::cli::interrupt::Interrupt;

/// How often due messages are looked for: tokio's finest.
const TICK: Duration = Duration::from_millis(1);

/// Due messages that may wait for a connection, as a multiple of a second's; then the router is too slow for the rate.
const BEHIND_S_MAX: u64 = 10;

/// Messages a second, unless told otherwise.
pub(super) const RATE: u64 = 1000;

/// Messages that are not timed, in seconds of the rate: a router that has just started is not at its steady rate yet.
const WARM_UP_S: u64 = 1;

/// Nor more of them than one in so many of all.
const WARM_UP_SHARE: u64 = 5;

/// Seconds of a long poll.
const POLL_S: u32 = 5;

/// Messages that are due, and when each was.
#[derive(Default)]
pub(super) struct Due {
    waiting: RefCell<VecDeque<u64>>,
    since: RefCell<Vec<Instant>>,
    more: Notify,
    is_over: Cell<bool>,
    /// The first so many are not timed.
    warm_up: u64,
}

impl Due {
    /// For messages that come due at `rate` messages a second until `run` is over.
    pub(super) fn at(rate: u64, run: &Run) -> Self {
        Self { warm_up: warm_up(rate, run.planned(rate)), ..Self::default() }
    }

    /// Resolves when more are due, or there will be no more. To be made before looking, so that nothing that comes due
    /// between is slept through.
    pub(super) fn more(&self) -> impl Future<Output = ()> {
        self.more.notified()
    }

    /// The next.
    pub(super) fn take(&self) -> Option<u64> {
        self.waiting.borrow_mut().pop_front()
    }

    /// Whether no more come due.
    pub(super) fn is_over(&self) -> bool {
        self.is_over.get() && self.waiting.borrow().is_empty()
    }

    /// Times one that has arrived, unless it belongs to the warm-up.
    pub(super) fn arrived(&self, run: &Run, number: u64) {
        if let Some(since) = self.since.borrow().get(number as usize)
            && number >= self.warm_up
        {
            run.times.borrow_mut().add(since.elapsed());
        }
    }
}

/// Runs the scenario.
pub(super) async fn latency(target: &Target, options: &Options, interrupt: &Interrupt) -> Result<Report, CliError> {
    let (connections, rate) = (options.connections.unwrap_or(16), options.rate.unwrap_or(RATE));
    let topic = target.topic("latency");
    let receiver = target.onboard("latency-in", std::slice::from_ref(&topic)).await?;
    let sender = target.onboard("latency-out", &[]).await?;
    let payload = Rc::new(Payload::new(&topic, options.bytes));
    let run = Run::begin(options, options.seconds, 1, interrupt);
    let due = Rc::new(Due::at(rate, &run));
    let mut tasks = Tasks::new(&run);
    tasks.spawn_sender(tick(Rc::clone(&run), Rc::clone(&due), rate));
    for _ in 0..connections {
        let caller = target.single_sender(&sender);
        tasks.spawn_sender(send_due(Rc::clone(&run), Rc::clone(&due), caller, Rc::clone(&payload), |_| ()));
    }
    let caller = target.receiver(&receiver, POLL_S);
    let arrivals = Rc::clone(&due);
    let seen = move |run: &Run, number| arrivals.arrived(run, number);
    tasks.spawn(receive(Rc::clone(&run), caller, 0, payload.message_bytes(), seen));
    tasks.finish("at a steady rate", options.json, |run| run.ledger.borrow().arrived()).await?;
    let took = run.last_accepted.get() - run.started;
    let what = format!("send to long-poll receive at {rate} messages/s over {connections} connections");
    Ok(report("latency", what, &run, "messages", run.accepted.get(), took, "send to receive"))
}

/// Makes messages due.
pub(super) async fn tick(run: Rc<Run>, due: Rc<Due>, rate: u64) -> Result<(), CliError> {
    let mut beat = tokio::time::interval(TICK);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    let mut made = 0;
    let outcome = loop {
        beat.tick().await;
        let now = Instant::now();
        let target = (now - run.started).as_micros() as u64 * rate / 1_000_000;
        let Some(numbers) = (if target > made {
            run.take(target - made)
        } else if run.is_over() {
            None
        } else {
            Some(0..0)
        }) else {
            break Ok(());
        };
        made += numbers.end - numbers.start;
        for number in numbers {
            due.since.borrow_mut().push(now);
            due.waiting.borrow_mut().push_back(number);
            due.more.notify_one();
        }
        if due.waiting.borrow().len() as u64 > rate * BEHIND_S_MAX {
            break Err(CliError::failed(format!(
                "the router cannot keep up with {rate} messages/s; try a lower --rate"
            )));
        }
    };
    due.is_over.set(true);
    due.more.notify_waiters();
    outcome
}

/// Sends what is due over one connection, and calls `accepted` with the number of each.
pub(super) async fn send_due(
    run: Rc<Run>,
    due: Rc<Due>,
    mut caller: Caller,
    payload: Rc<Payload>,
    accepted: impl Fn(u64),
) -> Result<(), CliError> {
    let mut body = Vec::new();
    loop {
        let more = due.more();
        let Some(number) = due.take() else {
            if due.is_over() {
                return Ok(());
            }
            more.await;
            continue;
        };
        body.clear();
        payload.write(number..number + 1, &mut body);
        let answer = caller.call(&body).await?;
        if answer.status != 202 {
            return Err(unexpected(&answer));
        }
        accepted(number);
        run.accept(number..number + 1);
    }
}

/// How many of `planned` messages are not timed.
fn warm_up(rate: u64, planned: u64) -> u64 {
    (rate * WARM_UP_S).min(planned / WARM_UP_SHARE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_second_is_not_timed_nor_more_than_a_fifth() {
        assert_eq!(warm_up(1000, 10_000), 1000);
        assert_eq!(warm_up(1000, 2000), 400);
        assert_eq!(warm_up(1000, 4), 0);
    }
}
