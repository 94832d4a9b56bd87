//! What the scenarios share: how long they go on, tasks that fail together, sending, and receiving into the ledger.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::ops::Range;
use std::rc::Rc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use indicatif::ProgressBar;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinHandle};

use super::Options;
use super::payload::{Ledger, Payload, numbers};
use super::report::Times;
use super::target::{Caller, unexpected};
use crate::cli::error::CliError;
use crate::cli::interrupt::Interrupt;
use crate::cli::progress;

/// How long a sender waits that was told 429 or 503: the router's way to say that it is full for now.
const REFUSED_PAUSE: Duration = Duration::from_millis(50);

/// How long nothing may arrive before what is missing counts as missing.
const SILENCE: Duration = Duration::from_secs(15);

/// How often the progress bar learns of progress.
pub(super) const SHOWN_EVERY: Duration = Duration::from_millis(200);

/// The state of one scenario, shared by its tasks on one thread.
pub(super) struct Run {
    deadline: Instant,
    limit: u64,
    next: Cell<u64>,
    stopped: Cell<bool>,
    interrupt: Interrupt,
    /// Messages with a 202.
    pub(super) accepted: Cell<u64>,
    /// Answers 429 and 503.
    pub(super) refused: Cell<u64>,
    /// When the last 202 came.
    pub(super) last_accepted: Cell<Instant>,
    /// When the last message arrived.
    pub(super) last_arrived: Cell<Instant>,
    /// Who got what.
    pub(super) ledger: RefCell<Ledger>,
    /// How long whatever took.
    pub(super) times: RefCell<Times>,
    /// Something arrived, or the sending is over.
    pub(super) moved: Notify,
    senders_left: Cell<usize>,
    /// When it began.
    pub(super) started: Instant,
}

impl Run {
    /// Begins now; `seconds` and the number of messages bound it, whichever comes first.
    pub(super) fn begin(options: &Options, seconds: f64, inboxes: usize, interrupt: &Interrupt) -> Rc<Self> {
        let now = Instant::now();
        Rc::new(Self {
            deadline: now + Duration::from_secs_f64(seconds),
            limit: options.messages.unwrap_or(u64::MAX),
            next: Cell::new(0),
            stopped: Cell::new(false),
            interrupt: interrupt.clone(),
            accepted: Cell::new(0),
            refused: Cell::new(0),
            last_accepted: Cell::new(now),
            last_arrived: Cell::new(now),
            ledger: RefCell::new(Ledger::new(inboxes)),
            times: RefCell::new(Times::new()),
            moved: Notify::new(),
            senders_left: Cell::new(0),
            started: now,
        })
    }

    /// The next up to `many` numbers, or `None` when it is over.
    pub(super) fn take(&self, many: u64) -> Option<Range<u64>> {
        let from = self.next.get();
        let to = from.saturating_add(many).min(self.limit);
        if from >= to || self.is_over() {
            return None;
        }
        self.next.set(to);
        Some(from..to)
    }

    /// How many messages it is going to be at `rate` messages a second.
    pub(super) fn planned(&self, rate: u64) -> u64 {
        let by_the_clock = (self.deadline - self.started).as_secs_f64() * rate as f64;
        (by_the_clock as u64).min(self.limit)
    }

    /// How many numbers were taken.
    pub(super) fn taken(&self) -> u64 {
        self.next.get()
    }

    /// Whether no more is to be sent.
    pub(super) fn is_over(&self) -> bool {
        self.stopped.get() || self.interrupt.is_set() || Instant::now() >= self.deadline
    }

    /// Ends the sending at once.
    pub(super) fn stop(&self) {
        self.stopped.set(true);
    }

    /// A 202 for these.
    pub(super) fn accept(&self, numbers: Range<u64>) {
        self.accepted.set(self.accepted.get() + (numbers.end - numbers.start));
        self.last_accepted.set(Instant::now());
        self.ledger.borrow_mut().accept(numbers);
    }

    /// Whether all senders are done and all that they sent is here.
    pub(super) fn is_complete(&self) -> bool {
        self.senders_left.get() == 0 && self.ledger.borrow().is_even(self.accepted.get())
    }

    /// Whether it makes no sense to wait any longer for what has not arrived.
    pub(super) fn is_silent(&self) -> bool {
        self.stopped.get()
            || self.senders_left.get() == 0 && self.last_arrived.get().max(self.last_accepted.get()).elapsed() > SILENCE
    }

    /// Whether there are messages left that `take` could give.
    pub(super) fn has_more(&self) -> bool {
        self.next.get() < self.limit
    }

    /// Something arrived.
    pub(super) fn arrived_now(&self) {
        self.last_arrived.set(Instant::now());
        self.moved.notify_waiters();
    }

    /// Whether at most `window` messages are under way to the slowest inbox.
    pub(super) fn is_within(&self, window: u64) -> bool {
        self.next.get().saturating_sub(self.ledger.borrow().slowest()) <= window
    }

    /// Waits until at most `window` messages are under way to the slowest inbox: bounds the backlog.
    pub(super) async fn wait_for_window(&self, window: u64) {
        while !self.is_within(window) && !self.is_over() {
            // Looks at the clock now and then, too: the time may be up while nothing moves, and that is no error here.
            let _ = tokio::time::timeout(SHOWN_EVERY, self.moved.notified()).await;
        }
    }
}

/// Tasks of a scenario on this thread. The first that fails ends them all.
pub(super) struct Tasks {
    run: Rc<Run>,
    handles: Vec<JoinHandle<Result<(), CliError>>>,
}

impl Tasks {
    /// None yet.
    pub(super) fn new(run: &Rc<Run>) -> Self {
        Self { run: Rc::clone(run), handles: Vec::new() }
    }

    /// Starts one.
    pub(super) fn spawn(&mut self, task: impl Future<Output = Result<(), CliError>> + 'static) {
        let run = Rc::clone(&self.run);
        self.handles.push(tokio::task::spawn_local(async move {
            let outcome = task.await;
            if outcome.is_err() {
                run.stop();
                run.moved.notify_waiters();
            }
            outcome
        }));
    }

    /// Starts one that sends: the scenario is complete only after it.
    pub(super) fn spawn_sender(&mut self, task: impl Future<Output = Result<(), CliError>> + 'static) {
        let run = Rc::clone(&self.run);
        run.senders_left.set(run.senders_left.get() + 1);
        self.spawn(async move {
            let outcome = task.await;
            run.senders_left.set(run.senders_left.get() - 1);
            run.moved.notify_waiters();
            outcome
        });
    }

    /// Waits for all of them, while a progress bar shows what `progress` counts.
    ///
    /// # Errors
    /// The first failure.
    pub(super) async fn finish(
        self,
        what: &'static str,
        json: bool,
        progress: impl Fn(&Run) -> u64 + 'static,
    ) -> Result<(), CliError> {
        let bar = progress::bar((self.run.limit < u64::MAX).then_some(self.run.limit), what, json);
        let shown = tokio::task::spawn_local(show(bar.clone(), Rc::clone(&self.run), progress));
        let aborts: Vec<_> = self.handles.iter().map(JoinHandle::abort_handle).collect();
        let mut ended: FuturesUnordered<_> = self.handles.into_iter().collect();
        let mut outcome = Ok(());
        while let Some(done) = ended.next().await {
            outcome = done.unwrap_or_else(|error| Err(CliError::failed(format!("the bench failed: {error}"))));
            if outcome.is_err() {
                // The others may wait for answers that never come.
                aborts.iter().for_each(AbortHandle::abort);
                break;
            }
        }
        shown.abort();
        bar.finish_and_clear();
        if outcome.is_ok() && self.run.interrupt.is_set() {
            return Err(CliError::failed("interrupted; nothing was measured to the end"));
        }
        outcome
    }
}

async fn show(bar: ProgressBar, run: Rc<Run>, progress: impl Fn(&Run) -> u64) {
    loop {
        tokio::time::sleep(SHOWN_EVERY).await;
        bar.set_position(progress(&run));
    }
}

/// Sends batches of `batch` messages over one connection until the run is over, and times each request.
///
/// # Errors
/// An answer other than 202, 429, 503.
pub(super) async fn send(
    run: Rc<Run>,
    mut caller: Caller,
    payload: Rc<Payload>,
    batch: u64,
    window: u64,
) -> Result<(), CliError> {
    let mut body = Vec::new();
    loop {
        run.wait_for_window(window).await;
        let Some(numbers) = run.take(batch) else { return Ok(()) };
        body.clear();
        payload.write(numbers.clone(), &mut body);
        loop {
            let asked = Instant::now();
            let answer = caller.call(&body).await?;
            match answer.status {
                202 => {
                    run.times.borrow_mut().add(asked.elapsed());
                    run.accept(numbers);
                    break;
                }
                429 | 503 if !run.is_over() => {
                    run.refused.set(run.refused.get() + 1);
                    tokio::time::sleep(REFUSED_PAUSE).await;
                }
                // The run is over and the router has not taken it: it does not count.
                429 | 503 => return Ok(()),
                _ => return Err(unexpected(&answer)),
            }
        }
    }
}

/// Receives over one connection until everything that was sent is here, and calls `seen` for each message.
///
/// # Errors
/// An answer other than 200.
pub(super) async fn receive(
    run: Rc<Run>,
    mut caller: Caller,
    inbox: usize,
    message_bytes: usize,
    seen: impl Fn(&Run, u64),
) -> Result<(), CliError> {
    while !run.is_complete() && !run.is_silent() {
        let answer = caller.call(&[]).await?;
        if answer.status != 200 {
            return Err(unexpected(&answer));
        }
        let mut any = false;
        numbers(answer.body, message_bytes, |number| {
            any = true;
            seen(&run, number);
            run.ledger.borrow_mut().arrive(inbox, number);
        });
        if any {
            run.arrived_now();
        }
    }
    Ok(())
}
