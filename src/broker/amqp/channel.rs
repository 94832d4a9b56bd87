//! A channel that consumers share, and what is settled on it.
//!
//! Acknowledgements are put in line by whoever settles. Between hops they may gather first, and go out as one frame; what
//! else is settled, or asked, on the channel goes behind those that have gathered.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use lapin::Channel;
use lapin::options::{BasicAckOptions, BasicNackOptions};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::acks::AckTracker;
use super::session::{Role, late, within};
use super::topology;
use super::wire::short;

/// How long RabbitMQ may take to answer on a channel.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// How long acknowledgements between hops gather when they come thick and fast, about: both ends work for each frame. Not
/// those of receivers, which may have asked for so little at a time that they wait for more meanwhile.
const GATHER: Duration = Duration::from_millis(1);

/// How long it may take to begin or end a consumer: RabbitMQ itself waits for a quorum queue without a leader for 65 s
/// (`rabbit_fifo_client`, the net tick and 5 s).
const CHANGE_TIMEOUT: Duration = Duration::from_secs(75);

/// Frames that are in line. Resolves when they have left for RabbitMQ.
pub(super) type Sent = Pin<Box<dyn Future<Output = Result<(), lapin::Error>> + Send>>;

/// One open channel, for as long as it is open. Deliveries hold on to theirs: what came on a channel can only be
/// settled there.
pub(super) struct IntakeChannel {
    pub(super) channel: Channel,
    acks: Mutex<Acks>,
    /// Whether acknowledgements gather, and where they are then sent.
    gathers: Option<Handle>,
    /// See [`super::intake::Intake::is_idle`].
    under_way: Arc<AtomicUsize>,
    /// Whether its session was given up.
    session_ended: watch::Receiver<bool>,
    /// It is being closed, as nobody knows who is handed what on it.
    is_condemned: AtomicBool,
}

/// What is acknowledged on a channel.
#[derive(Default)]
struct Acks {
    tracker: AckTracker,
    /// Settled, and left to be acknowledged.
    gathered: Vec<u64>,
    /// When some were last acknowledged.
    sent_at: Option<Instant>,
}

impl Acks {
    /// Puts in line what has gathered. To be called under the lock: a frame that covers several must not overtake one
    /// that it counts on. Resolves when all of it has left for RabbitMQ.
    fn send(&mut self, channel: &Channel) -> Sent {
        let mut last: Sent = Box::pin(std::future::ready(Ok(())));
        if self.gathered.is_empty() {
            return last;
        }
        self.sent_at = Some(Instant::now());
        for ack in self.tracker.ack(&mut std::mem::take(&mut self.gathered)) {
            let (channel, options) = (channel.clone(), BasicAckOptions { multiple: ack.multiple });
            let mut sent: Sent = Box::pin(async move { channel.basic_ack(ack.tag, options).await });
            // The first poll puts the frame in line.
            last = match sent.as_mut().now_or_never() {
                Some(Err(error)) => return Box::pin(std::future::ready(Err(error))),
                Some(Ok(())) => last,
                None => sent,
            };
        }
        last
    }
}

impl IntakeChannel {
    /// One that was just opened on the connection for `role`.
    pub(super) fn new(
        channel: Channel,
        role: Role,
        session_ended: watch::Receiver<bool>,
        under_way: &Arc<AtomicUsize>,
    ) -> Self {
        let gathers = (role == Role::Pipeline).then(Handle::current);
        Self {
            channel,
            acks: Mutex::default(),
            gathers,
            under_way: Arc::clone(under_way),
            session_ended,
            is_condemned: AtomicBool::new(false),
        }
    }

    /// Whether what came on it can still be settled.
    pub(super) fn is_alive(&self) -> bool {
        self.channel.status().connected() && !*self.session_ended.borrow() && !self.is_condemned.load(Ordering::Relaxed)
    }

    /// Waits for an answer on it; not beyond the end of its session.
    pub(super) async fn answer<T>(
        &self,
        call: impl Future<Output = Result<T, lapin::Error>>,
    ) -> Result<T, lapin::Error> {
        let mut ended = self.session_ended.clone();
        tokio::select! {
            answer = within(CALL_TIMEOUT, call) => answer,
            _ = ended.wait_for(|ended| *ended) => Err(late("its session was given up")),
        }
    }

    /// Waits for the answer to a consumer's beginning or end. Without one the channel is closed: a consumer of which nobody
    /// knows would keep what it is handed from everybody else.
    pub(super) async fn change<T>(
        &self,
        call: impl Future<Output = Result<T, lapin::Error>>,
    ) -> Result<T, lapin::Error> {
        let mut ended = self.session_ended.clone();
        let late = tokio::select! {
            answer = tokio::time::timeout(CHANGE_TIMEOUT, call) => match answer {
                Ok(answer) => return answer,
                Err(_) => late(&format!("no answer within {CHANGE_TIMEOUT:?}; its channel is closed")),
            },
            _ = ended.wait_for(|ended| *ended) => return Err(late("its session was given up")),
        };
        if !self.is_condemned.swap(true, Ordering::Relaxed) {
            log::warn!("RabbitMQ does not answer on a channel of consumers; it is opened again");
            let channel = self.channel.clone();
            tokio::spawn(async move {
                if let Err(error) = channel.close(200, short("late")).await {
                    log::debug!("close a channel of consumers: {error}");
                }
            });
        }
        Err(late)
    }

    /// Acknowledges: at once, or soon when others were acknowledged just now. Returns whether the channel took it; a dead
    /// one has given everything back already.
    pub(super) fn ack(self: &Arc<Self>, tags: &[u64]) -> bool {
        let mut acks = self.acks.lock();
        let is_gathering = !acks.gathered.is_empty();
        acks.gathered.extend(tags);
        if is_gathering {
            return self.is_alive();
        }
        let wait = acks.sent_at.and_then(|at| GATHER.checked_sub(at.elapsed()));
        let (Some(handle), Some(wait)) = (&self.gathers, wait) else {
            return !matches!(acks.send(&self.channel).now_or_never(), Some(Err(_)));
        };
        let (channel, done) = (Arc::clone(self), Done::after(&self.under_way));
        handle.spawn(async move {
            tokio::time::sleep(wait).await;
            channel.send_gathered();
            drop(done);
        });
        self.is_alive()
    }

    /// Puts acknowledgements in line that have gathered.
    pub(super) fn send_gathered(&self) {
        // That they left is of no interest here; a dead channel has given everything back already.
        drop(self.acks.lock().send(&self.channel));
    }

    /// Acknowledges, and waits until that has left for RabbitMQ.
    pub(super) async fn ack_and_flush(&self, tags: &[u64]) -> Result<(), lapin::Error> {
        let sent = {
            let mut acks = self.acks.lock();
            acks.gathered.extend(tags);
            acks.send(&self.channel)
        };
        self.answer(sent).await
    }

    /// Gives deliveries back to the queue, in this order.
    pub(super) fn give_back(&self, tags: impl IntoIterator<Item = u64>) {
        let mut acks = self.acks.lock();
        drop(acks.send(&self.channel));
        for tag in tags {
            acks.tracker.settle(tag);
            let options = BasicNackOptions { multiple: false, requeue: true };
            // A dead channel has given it back already.
            let _ = self.channel.basic_nack(tag, options).now_or_never();
        }
    }

    /// Messages that are ready in a queue.
    pub(super) async fn count(&self, queue: &str) -> Result<u64, lapin::Error> {
        self.answer(topology::count(&self.channel, queue)).await
    }

    /// Resolves when everything is here that RabbitMQ had put on its way from `queue` to this channel's consumers when
    /// this was called.
    /// Returns how many more were ready.
    pub(super) async fn round_trip(&self, queue: &str) -> Result<u64, lapin::Error> {
        self.send_gathered();
        // The first question goes to the queue, which answers it after what it has handed out; but its channel may pass
        // the answer on first. The second is for the channel itself, which comes to it after what it was handed.
        let ready = self.count(queue).await?;
        self.answer(topology::check_exchange(&self.channel, topology::BROADCAST)).await?;
        Ok(ready)
    }
}

/// Counts something as under way until it is dropped.
pub(super) struct Done(Arc<AtomicUsize>);

impl Done {
    /// One more.
    pub(super) fn after(under_way: &Arc<AtomicUsize>) -> Self {
        under_way.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(under_way))
    }
}

impl Drop for Done {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
