//! Consuming: a fixed set of channels, which all consumers share.
//!
//! A channel is opened when it is first needed and again after it was closed; its consumers then subscribe again. Each
//! has a task that subscribes and unsubscribes, one after the other, because a prefetch is set for the next consumer of
//! a channel. Acknowledgements do not go through the task: they are put in line by whoever settles.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::{FutureExt as _, StreamExt as _};
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Consumer};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};

use super::acks::AckTracker;
use super::link::Link;
use super::runtime::AmqpThread;
use super::session::{Role, Session, within};
use super::topology;
use super::wire::short;

/// Commands that may wait for a channel's task.
const COMMANDS_WAITING: usize = 256;

/// How long RabbitMQ may take to answer on a channel.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// One open channel, for as long as it is open. Deliveries hold on to theirs: what came on a channel can only be
/// settled there.
pub(super) struct IntakeChannel {
    channel: Channel,
    tracker: Mutex<AckTracker>,
}

impl IntakeChannel {
    /// Whether what came on it can still be settled.
    pub(super) fn is_alive(&self) -> bool {
        self.channel.status().connected()
    }

    /// Acknowledges. Returns whether the channel took it; a dead one has given everything back already.
    pub(super) fn ack(&self, tags: &mut [u64]) -> bool {
        // Put in line under the lock: a frame that covers several must not overtake one that it counts on.
        let mut tracker = self.tracker.lock();
        tracker.ack(tags).into_iter().all(|ack| {
            let options = BasicAckOptions { multiple: ack.multiple };
            // The first poll puts the frame in line; that it left is of no interest here.
            !matches!(self.channel.basic_ack(ack.tag, options).now_or_never(), Some(Err(_)))
        })
    }

    /// Acknowledges, and waits until that has left for RabbitMQ.
    pub(super) async fn ack_and_flush(&self, tags: &mut [u64]) -> Result<(), lapin::Error> {
        let mut last = None;
        {
            let mut tracker = self.tracker.lock();
            for ack in tracker.ack(tags) {
                let options = BasicAckOptions { multiple: ack.multiple };
                let mut sent = Box::pin(self.channel.basic_ack(ack.tag, options));
                match sent.as_mut().now_or_never() {
                    Some(Err(error)) => return Err(error),
                    Some(Ok(())) => {}
                    None => last = Some(sent),
                }
            }
        }
        match last {
            Some(sent) => sent.await,
            None => Ok(()),
        }
    }

    /// Gives deliveries back to the queue, in this order.
    pub(super) fn give_back(&self, tags: impl IntoIterator<Item = u64>) {
        let mut tracker = self.tracker.lock();
        for tag in tags {
            tracker.settle(tag);
            let options = BasicNackOptions { multiple: false, requeue: true };
            // A dead channel has given it back already.
            let _ = self.channel.basic_nack(tag, options).now_or_never();
        }
    }

    /// Resolves when everything is here that RabbitMQ had put on its way from `queue` to this channel's consumers when
    /// this was called.
    /// Returns how many more were ready.
    pub(super) async fn round_trip(&self, queue: &str) -> Result<u64, lapin::Error> {
        // The first question goes to the queue, which answers it after what it has handed out; but its channel may pass
        // the answer on first. The second is for the channel itself, which comes to it after what it was handed.
        let ready = within(CALL_TIMEOUT, topology::count(&self.channel, queue)).await?;
        within(CALL_TIMEOUT, topology::check_exchange(&self.channel, topology::BROADCAST)).await?;
        Ok(ready)
    }
}

/// A consumer that RabbitMQ hands deliveries to. Must be ended by [`Intake::end`], or what it has been handed, and was
/// not looked at, stays with it.
pub(super) struct Subscription {
    /// Its deliveries.
    pub(super) consumer: Consumer,
    /// Its channel.
    pub(super) channel: Arc<IntakeChannel>,
    /// How much it may be handed unsettled.
    pub(super) prefetch: u16,
}

/// What to do with deliveries that nobody looked at, before they are given back.
type Left = Box<dyn FnOnce(Vec<Delivery>) + Send>;

enum Command {
    Subscribe { queue: String, prefetch: u16, reply: oneshot::Sender<Result<Subscription, lapin::Error>> },
    End { subscription: Subscription, left: Left, ended: Option<oneshot::Sender<()>> },
}

/// One channel of the set, with its task.
pub(super) struct Intake {
    commands: mpsc::Sender<Command>,
}

impl Intake {
    /// Starts one on the connection for `role` of each session.
    pub(super) fn start(thread: &AmqpThread, role: Role, link: watch::Receiver<Link>) -> Self {
        let (sender, commands) = mpsc::channel(COMMANDS_WAITING);
        thread.spawn(run(thread.handle(), role, link, commands));
        Self { commands: sender }
    }

    /// Subscribes to a queue that is known to exist: if it does not, the channel is closed under all of its consumers.
    /// The receiver must be kept until it resolves, or what the subscription is handed stays with it.
    pub(super) async fn subscribe(
        &self,
        queue: &str,
        prefetch: u16,
    ) -> Option<oneshot::Receiver<Result<Subscription, lapin::Error>>> {
        let (reply, receiver) = oneshot::channel();
        let command = Command::Subscribe { queue: queue.to_owned(), prefetch, reply };
        self.commands.send(command).await.ok().map(|()| receiver)
    }

    /// Ends a subscription. What it was handed and nobody looked at is given to `left`, in order, then given back; then
    /// `ended` is told.
    pub(super) fn end(
        &self,
        thread: &AmqpThread,
        subscription: Subscription,
        left: impl FnOnce(Vec<Delivery>) + Send + 'static,
        ended: Option<oneshot::Sender<()>>,
    ) {
        let commands = self.commands.clone();
        let command = Command::End { subscription, left: Box::new(left), ended };
        if let Err(error) = commands.try_send(command) {
            let (mpsc::error::TrySendError::Full(command) | mpsc::error::TrySendError::Closed(command)) = error;
            thread.spawn(async move {
                // When the task is gone so are the channel and all its deliveries.
                let _ = commands.send(command).await;
            });
        }
    }
}

/// Tells consumers apart; unique, so that a late answer cannot be taken for another's.
static NEXT_TAG: AtomicU64 = AtomicU64::new(1);

async fn run(
    handle: tokio::runtime::Handle,
    role: Role,
    link: watch::Receiver<Link>,
    mut commands: mpsc::Receiver<Command>,
) {
    let mut open: Option<(Arc<IntakeChannel>, u16)> = None;
    while let Some(command) = commands.recv().await {
        match command {
            Command::Subscribe { queue, prefetch, reply } => {
                let session = match &*link.borrow() {
                    Link::Up(session) => Some(Arc::clone(session)),
                    Link::Down(_) | Link::Closed => None,
                };
                let channel = match session {
                    Some(session) => opened(role, &session, &mut open).await,
                    None => Err(std::io::Error::from(std::io::ErrorKind::NotConnected).into()),
                };
                match channel {
                    Ok((channel, current)) => {
                        let begun = begin(channel, current, &queue, prefetch);
                        handle.spawn(async move {
                            if let Err(Ok(orphan)) = reply.send(begun.await) {
                                end(orphan, drop).await;
                            }
                        });
                    }
                    // Nobody waits for it any more, or is told that it failed.
                    Err(error) => drop(reply.send(Err(error))),
                }
            }
            Command::End { subscription, left, ended } => {
                handle.spawn(async move {
                    end(subscription, left).await;
                    if let Some(ended) = ended {
                        // Who asked may be gone.
                        let _ = ended.send(());
                    }
                });
            }
        }
    }
}

/// The open channel, and the prefetch that its next consumer would get.
async fn opened<'a>(
    role: Role,
    session: &Session,
    open: &'a mut Option<(Arc<IntakeChannel>, u16)>,
) -> Result<(&'a Arc<IntakeChannel>, &'a mut u16), lapin::Error> {
    if open.as_ref().is_none_or(|(channel, _)| !channel.is_alive()) {
        let channel = session.channel(role).await?;
        *open = Some((Arc::new(IntakeChannel { channel, tracker: Mutex::default() }), 0));
    }
    match open {
        Some((channel, current)) => Ok((channel, current)),
        None => unreachable!("it was opened above"),
    }
}

/// Puts prefetch and consumer in line, and returns what waits for the answer. Nobody can come in between.
fn begin(
    channel: &Arc<IntakeChannel>,
    current: &mut u16,
    queue: &str,
    prefetch: u16,
) -> impl Future<Output = Result<Subscription, lapin::Error>> + Send + 'static {
    let channel = Arc::clone(channel);
    let set_prefetch = (*current != prefetch).then(|| {
        *current = prefetch;
        let channel = channel.channel.clone();
        // Not global: it counts for each consumer that is begun after it.
        let mut qos = Box::pin(async move { channel.basic_qos(prefetch, BasicQosOptions { global: false }).await });
        (qos.as_mut().now_or_never(), qos)
    });
    let tag = short(&format!("backbone-{}", NEXT_TAG.fetch_add(1, Ordering::Relaxed)));
    let (consumer, queue) = (channel.channel.clone(), short(queue));
    let mut consume = Box::pin(async move {
        consumer.basic_consume(queue, tag, BasicConsumeOptions::default(), FieldTable::default()).await
    });
    let early = consume.as_mut().now_or_never();
    async move {
        if let Some((early, qos)) = set_prefetch {
            match early {
                Some(result) => result?,
                None => qos.await?,
            }
        }
        let consumer = match early {
            Some(result) => result?,
            None => consume.await?,
        };
        Ok(Subscription { consumer, channel, prefetch })
    }
}

async fn end(mut subscription: Subscription, left: impl FnOnce(Vec<Delivery>)) {
    let channel = &subscription.channel;
    if channel.is_alive() {
        let cancel = channel.channel.basic_cancel(subscription.consumer.tag(), BasicCancelOptions::default());
        // A channel that cannot even cancel is dead, or will be; then its deliveries come back by themselves.
        let _ = within(CALL_TIMEOUT, cancel).await;
    }
    let mut rest = Vec::new();
    while let Some(Some(next)) = subscription.consumer.next().now_or_never() {
        rest.extend(next.ok());
    }
    let tags: Vec<u64> = rest.iter().map(|delivery| delivery.delivery_tag).collect();
    left(rest);
    channel.give_back(tags);
}
