//! Publishing: one channel, a window of confirms, and a task that judges them.
//!
//! What is handed to a lane leaves in that order. While there is room in the window whoever publishes puts its messages
//! in line itself: a thread between would cost more time than all the rest of a hop. Otherwise they wait for the task.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::FutureExt as _;
use lapin::Channel;
use lapin::types::ShortString;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;

use super::link::{Link, wait_up};
use super::runtime::AmqpThread;
use super::session::{Role, Session};
use super::window::{Broken, Done, Ended, Job, Outgoing, Refusal, Window, tell};

/// Batches that may wait for room in the window; further senders wait to hand theirs over.
const JOBS_WAITING: usize = 64;

/// How long confirms from hop to hop gather before they are judged: to be woken by each of them costs more than all the
/// rest of it. No message waits for that, as the next queue has it long before its confirm is here.
const GATHER: Duration = Duration::from_millis(2);

/// How long those of what clients send gather while there are many: each has somebody who waits for it.
const GATHER_INGRESS: Duration = Duration::from_millis(1);

/// How long what is on its way on a channel that RabbitMQ refused a message on may take to be confirmed: then it is lost,
/// and published again.
const RETIRES_WITHIN: Duration = Duration::from_secs(2);

/// See the module.
pub(super) struct Lane {
    jobs: mpsc::Sender<Job>,
    front: Arc<Front>,
    /// Batches that were handed over and whose fate is not known.
    pending: Arc<AtomicUsize>,
}

/// What whoever publishes and the lane's task have in common.
#[derive(Default)]
struct Front {
    state: Mutex<State>,
    /// Wakes the task, which has to look at its window again.
    task: Arc<Wakeup>,
}

#[derive(Default)]
struct State {
    /// The channel and what is on its way on it, while it is open.
    live: Option<Live>,
    /// Batches that wait for the task, or for room to do so: those that come after them go behind them.
    queued: usize,
}

struct Live {
    channel: Arc<Channel>,
    window: Window,
    /// Whether nothing may be put in line although there is room.
    suspect: watch::Receiver<bool>,
    role: Role,
    /// Since when nothing is put in line any more; another channel takes its place when nothing is on its way on this one.
    retired: Option<Instant>,
}

impl Live {
    /// Whether messages may be put in line. What is moved on goes through exchanges; what comes in does not.
    fn is_open(&self) -> bool {
        let is_suspect = self.role == Role::Relay && *self.suspect.borrow();
        self.channel.status().connected() && !is_suspect && self.retired.is_none()
    }

    /// Whether nothing comes of it any more.
    fn is_over(&self) -> bool {
        (self.retired.is_some() || !self.channel.status().connected()) && self.window.is_empty()
    }

    /// Retires the channel when RabbitMQ has refused a message on it. One that publishes to a quorum queue for the first
    /// time while the node of its leader is down goes on asking that node, and refuses whatever is for the queue for as
    /// long as the node is away (RabbitMQ 3.10, `rabbit_fifo_client`); a channel that is opened later knows the next
    /// leader. Returns whether that is news.
    fn retire_if_refused(&mut self) -> bool {
        let is_news = self.window.has_refused() && self.retired.is_none();
        if is_news {
            self.retired = Some(Instant::now());
        }
        is_news
    }

    /// Whether what is on its way on a retired channel keeps everybody waiting.
    fn lingers(&self) -> bool {
        self.retired.is_some_and(|since| since.elapsed() > RETIRES_WITHIN)
    }

    /// How long confirms are to gather from the first on.
    fn gather(&self) -> Option<Duration> {
        match self.role {
            Role::Relay => Some(GATHER),
            _ => self.window.is_busy().then_some(GATHER_INGRESS),
        }
    }

    /// Puts messages in line, as many as there is room for. Batches whose last message met its fate go to `ended`.
    fn fill(&mut self, context: &mut Context<'_>, ended: &mut Vec<Ended>) {
        if self.is_open() {
            self.window.fill(&self.channel, context, ended);
        }
    }
}

/// The waker of all confirms. While they gather, the task does not listen to it, and sleeps on.
#[derive(Default)]
struct Wakeup(Notify);

impl std::task::Wake for Wakeup {
    fn wake(self: Arc<Self>) {
        self.0.notify_one();
    }
}

impl Front {
    /// Puts a batch in line when nothing is before it. Gives it back when it has to wait for the task; it is then
    /// counted as queued.
    fn put_in_line(&self, job: Job) -> Result<(), Job> {
        let waker = Waker::from(Arc::clone(&self.task));
        let mut ended = Vec::new();
        let mut state = self.state.lock();
        let is_first = state.queued == 0;
        let live = state.live.as_mut().filter(|live| is_first && live.is_open() && live.window.takes_jobs());
        let Some(live) = live else {
            state.queued += 1;
            return Err(job);
        };
        live.window.add(job, &mut ended);
        live.fill(&mut Context::from_waker(&waker), &mut ended);
        if live.is_over() {
            self.task.0.notify_one();
        }
        drop(state);
        tell(ended);
        Ok(())
    }

    /// The task takes a batch that was queued: behind it others may put theirs in line themselves.
    fn take_queued(&self, job: Job, ended: &mut Vec<Ended>) {
        let mut state = self.state.lock();
        state.queued -= 1;
        // There is one: only the task, which is in this call, takes it away.
        if let Some(live) = &mut state.live {
            live.window.add(job, ended);
        }
    }

    /// A batch that was queued goes nowhere.
    fn unqueue(&self) {
        self.state.lock().queued -= 1;
    }
}

/// A batch on its way to the task. Counted as queued until the task has it; or, dropped, until nobody hands it over.
struct Queued<'a>(Option<&'a Front>);

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        if let Some(front) = self.0 {
            front.unqueue();
        }
    }
}

impl Lane {
    /// Starts a lane on the connection for `role` of each session.
    pub(super) fn start(thread: &AmqpThread, role: Role, link: watch::Receiver<Link>) -> Self {
        let (sender, jobs) = mpsc::channel(JOBS_WAITING);
        let front = Arc::<Front>::default();
        thread.spawn(run(role, Arc::clone(&front), link, jobs));
        Self { jobs: sender, front, pending: Arc::default() }
    }

    /// Whether nothing is on its way.
    pub(super) fn is_idle(&self) -> bool {
        self.pending.load(Ordering::Acquire) == 0
    }

    /// Hands a batch over. When the future is dropped, all of the batch was handed over, or none. `done` is called in
    /// either case that it was.
    ///
    /// # Errors
    /// When the broker is closed.
    pub(super) async fn send(
        &self,
        messages: Vec<Outgoing>,
        broken: Option<Broken>,
        done: Done,
    ) -> Result<(), Refusal> {
        let pending = Arc::clone(&self.pending);
        pending.fetch_add(1, Ordering::AcqRel);
        let counted = Pending(pending);
        let done = Box::new(move |fates| {
            done(fates);
            drop(counted);
        });
        let Err(job) = self.front.put_in_line(Job { messages, broken, done }) else { return Ok(()) };
        let mut queued = Queued(Some(&self.front));
        let permit = self.jobs.reserve().await.map_err(|_| Refusal::Closed)?;
        permit.send(job);
        // The task counts it from here on.
        queued.0 = None;
        Ok(())
    }
}

/// Counts a batch that was handed over.
struct Pending(Arc<AtomicUsize>);

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

async fn run(role: Role, front: Arc<Front>, mut link: watch::Receiver<Link>, mut jobs: mpsc::Receiver<Job>) {
    loop {
        let state = link.borrow_and_update().clone();
        match state {
            Link::Up(session) => {
                if let Err(error) = serve(role, &front, &session, &mut link, &mut jobs).await {
                    log::warn!("a publishing channel is opened again: {error}");
                    if !session.is_alive() {
                        // Its end is about to be told; until then there is no use in trying.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
            Link::Down(why) => {
                // Nothing waits for a broker that is away: senders are told to come again.
                tokio::select! {
                    _ = link.changed() => {}
                    job = jobs.recv() => match job {
                        Some(job) => refuse(&front, job, &Refusal::Lost(Arc::clone(&why))),
                        None => return,
                    }
                }
            }
            Link::Closed => break,
        }
        if jobs.is_closed() {
            break;
        }
        if wait_up(&mut link.clone()).now_or_never().is_some_and(|up| up.is_none()) {
            break;
        }
    }
    jobs.close();
    while let Some(job) = jobs.recv().await {
        refuse(&front, job, &Refusal::Closed);
    }
}

fn refuse(front: &Front, job: Job, why: &Refusal) {
    front.unqueue();
    if let Some(broken) = &job.broken {
        broken.store(true, Ordering::Relaxed);
    }
    (job.done)(vec![Err(why.clone()); job.messages.len()]);
}

/// Publishes on one channel until that, or the session, ends.
async fn serve(
    role: Role,
    front: &Front,
    session: &Session,
    link: &mut watch::Receiver<Link>,
    jobs: &mut mpsc::Receiver<Job>,
) -> Result<(), lapin::Error> {
    let channel = tokio::select! {
        opened = session.publisher(role) => Arc::new(opened?),
        // A session that falls silent is given up before its answers are late.
        _ = link.changed() => return Ok(()),
    };
    let mut suspect = session.suspicions();
    let live = Live {
        channel: Arc::clone(&channel),
        window: Window::default(),
        suspect: session.suspicions(),
        role,
        retired: None,
    };
    front.state.lock().live = Some(live);
    let open = Open(front);
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let waker = Waker::from(Arc::clone(&front.task));
    let (mut gathers_until, mut is_due) = (None, false);
    let why = loop {
        let (mut ended, mut takes_jobs, mut is_over) = (Vec::new(), false, false);
        let mut is_sign = false;
        suspect.borrow_and_update();
        front.with_window(|live| {
            let context = &mut Context::from_waker(&waker);
            if std::mem::take(&mut is_due) {
                is_sign = live.window.poll_confirms(context, &mut ended) == Poll::Ready(true);
            }
            live.fill(context, &mut ended);
            takes_jobs = live.is_open() && live.window.takes_jobs();
            is_over = live.is_over();
        });
        if is_sign {
            session.note_sign();
        }
        tell(std::mem::take(&mut ended));
        if is_over {
            break "it was closed";
        }
        tokio::select! {
            () = front.task.0.notified(), if gathers_until.is_none() => {
                gathers_until = front.with_window(|live| live.gather()).map(|wait| Instant::now() + wait);
                is_due = gathers_until.is_none();
            }
            () = tokio::time::sleep_until(gathers_until.unwrap_or_else(Instant::now)), if gathers_until.is_some() => {
                // Told of what is about to be looked at.
                let _ = front.task.0.notified().now_or_never();
                (gathers_until, is_due) = (None, true);
            }
            Ok(()) = suspect.changed() => {}
            job = jobs.recv(), if takes_jobs => match job {
                Some(job) => {
                    front.take_queued(job, &mut ended);
                    tell(ended);
                }
                None => break "the broker was closed",
            },
            _ = ticks.tick() => {
                if !channel.status().connected() {
                    break "it was closed";
                }
                if front.with_window(Live::retire_if_refused) {
                    log::warn!("RabbitMQ refuses messages; another channel is opened for them");
                }
                if front.with_window(|live| live.lingers()) {
                    break "RabbitMQ refuses messages";
                }
                // One that gives no sign of life is dealt with as a whole.
                if session.blocked().is_some() || session.is_silent() {
                    front.with_window(|live| live.window.wait_on());
                } else if front.with_window(|live| live.window.is_stuck()) {
                    log::warn!("RabbitMQ does not confirm a message; what is on its way with it is published again");
                    break "a confirm did not come";
                }
            }
            // The end of a session shows in its channels as well; this says it when nothing is under way.
            _ = link.changed() => break "the session ended",
        }
    };
    // From here on nobody puts anything in line.
    let window = open.end();
    // Lapin fails what is pending on a dead channel; a stuck one is closed, which does the same.
    if channel.status().connected() && session.is_alive() {
        let _ = tokio::time::timeout(Duration::from_secs(1), channel.close(200, ShortString::from("stuck"))).await;
    }
    if window.give_up(why).await {
        session.set_suspect(true);
    }
    Ok(())
}

/// The channel that is open. Dropped with the task, everything that waits for it is told.
struct Open<'a>(&'a Front);

impl Open<'_> {
    fn end(self) -> Window {
        self.0.state.lock().live.take().map(|live| live.window).unwrap_or_default()
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let live = self.0.state.lock().live.take();
        // Not under the lock: whoever is told may publish again.
        drop(live);
    }
}

impl Front {
    /// Works on the window of the channel that is open.
    fn with_window<T: Default>(&self, work: impl FnOnce(&mut Live) -> T) -> T {
        // Only the task takes it away, and only the task calls this.
        self.state.lock().live.as_mut().map(work).unwrap_or_default()
    }
}
