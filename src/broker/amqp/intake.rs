//! Consuming: a fixed set of channels, which all consumers share.
//!
//! A channel is opened when it is first needed and again after it was closed; its consumers then subscribe again. Each
//! has a task that subscribes and unsubscribes; for one queue one after the other, so that order holds from one consumer
//! to the next. Acknowledgements do not go through the task (see [`IntakeChannel`]).

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::{FutureExt as _, StreamExt as _};
use lapin::Consumer;
use lapin::message::Delivery;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use tokio::sync::{mpsc, oneshot, watch};

use super::channel::{Done, IntakeChannel, Sent};
use super::link::Link;
use super::returned::{BackTo, Returned, give_back_all};
use super::runtime::AmqpThread;
use super::session::Role;
use super::wire::short;

/// Commands that may wait for a channel's task.
const COMMANDS_WAITING: usize = 256;

/// A consumer that RabbitMQ hands deliveries to. Must be ended by [`Intake::end`], or what it has been handed, and was
/// not looked at, stays with it.
pub(super) struct Subscription {
    /// Its deliveries.
    pub(super) consumer: Consumer,
    /// Its channel.
    pub(super) channel: Arc<IntakeChannel>,
    /// How much it may be handed unsettled.
    pub(super) prefetch: u16,
    /// That includes all that had come back to the queue when it began.
    has_all_returned: bool,
    /// The queue's name.
    queue: String,
    /// The answer to its being cancelled, when that has begun.
    cancelled: Option<Sent>,
}

impl Subscription {
    /// Puts its end in line, before whatever is acknowledged on its channel after this. [`Intake::end`] does the rest.
    pub(super) fn cancel(&mut self) {
        self.channel.send_gathered();
        let (channel, tag) = (self.channel.channel.clone(), self.consumer.tag());
        let mut sent: Sent = Box::pin(async move { channel.basic_cancel(tag, BasicCancelOptions::default()).await });
        // The first poll puts the frame in line.
        self.cancelled = Some(match sent.as_mut().now_or_never() {
            Some(answer) => Box::pin(std::future::ready(answer)),
            None => sent,
        });
    }
}

/// What becomes of what a subscription was handed and nobody took, when it ends.
pub(super) enum Left {
    /// It goes back to the queue: these first, which were taken out of it and not settled; then what nobody looked at,
    /// once that has been noted. `outstanding` were taken out and are not settled, these included.
    Back { to: BackTo, first: First, outstanding: usize, note: Note, ended: Option<oneshot::Sender<()>> },
    /// What nobody looked at is wanted still, on the same channel.
    Kept(oneshot::Sender<Vec<Delivery>>),
}

/// Deliveries that were taken out of a subscription and are not settled, in order.
#[derive(Default)]
pub(super) struct First {
    /// Their tags.
    pub(super) tags: Vec<u64>,
    /// Whether the last of them had come back to the queue before.
    pub(super) came_back: bool,
}

impl Left {
    /// Everything goes back; nobody has looked at anything, and nobody can say what kind of queue it is.
    fn all() -> Self {
        Self::Back { to: BackTo::Quorum, first: First::default(), outstanding: 0, note: forget(), ended: None }
    }
}

enum Command {
    Subscribe { queue: String, prefetch: u16, most: u16, reply: oneshot::Sender<Result<Subscription, lapin::Error>> },
    End { subscription: Box<Subscription>, left: Left },
    GiveBack(Box<GivenBack>),
    Turn { queue: String, begun: oneshot::Sender<()>, until: Option<oneshot::Receiver<()>> },
}

/// What a consumer leaves that goes while its subscription is being made anew.
pub(super) struct GivenBack {
    /// The queue's name.
    pub(super) queue: String,
    /// What the subscription before had brought and was kept: its channel and tags, in order.
    pub(super) first: Option<(Arc<IntakeChannel>, First)>,
    /// What comes behind that, and was not looked at.
    pub(super) rest: Option<oneshot::Receiver<Vec<Delivery>>>,
    /// The next subscription, with what comes behind that.
    pub(super) pending: Option<oneshot::Receiver<Result<Subscription, lapin::Error>>>,
    /// Notes what was not looked at.
    pub(super) note: Note,
    /// See [`Left::Back`].
    pub(super) to: BackTo,
}

impl GivenBack {
    /// What it waits for had its turn before.
    async fn give_back(self, returned: &Returned) {
        let Self { queue, first, rest, pending, note, to } = self;
        let rest = match rest {
            Some(rest) => rest.await.unwrap_or_default(),
            None => Vec::new(),
        };
        let subscription = match pending {
            Some(pending) => pending.await.ok().and_then(Result::ok),
            None => None,
        };
        let (channel, first) = first.unzip();
        let First { mut tags, came_back } = first.unwrap_or_default();
        let came_back = rest.last().map_or(came_back, |last| last.redelivered);
        tags.extend(tags_of(&rest));
        note(rest);
        match (subscription, channel) {
            (Some(subscription), Some(channel)) if Arc::ptr_eq(&subscription.channel, &channel) => {
                // None of these counts against its prefetch.
                let first = First { tags, came_back };
                end(subscription, Left::Back { to, first, outstanding: 0, note, ended: None }, returned).await;
            }
            // What came on an earlier channel went back with that.
            (Some(subscription), _) => {
                let left = Left::Back { to, first: First::default(), outstanding: 0, note, ended: None };
                end(subscription, left, returned).await;
            }
            (None, Some(channel)) => give_back_all(&channel, &queue, tags, to, true, &note, returned).await,
            (None, None) => {}
        }
    }
}

/// Told of what goes back and was not looked at.
pub(super) type Note = Box<dyn Fn(Vec<Delivery>) + Send + Sync>;

/// How long the end of a subscription waits for what RabbitMQ may hand out still.
const GATHER_WITHIN: Duration = Duration::from_secs(2);

/// One channel of the set, with its task.
pub(super) struct Intake {
    commands: mpsc::Sender<(Command, Done)>,
    /// Commands that are not carried out yet, and acknowledgements that gather.
    under_way: Arc<AtomicUsize>,
}

impl Intake {
    /// Starts one on the connection for `role` of each session.
    pub(super) fn start(
        thread: &AmqpThread,
        role: Role,
        link: watch::Receiver<Link>,
        returned: &Arc<Returned>,
    ) -> Self {
        let (sender, commands) = mpsc::channel(COMMANDS_WAITING);
        let under_way = Arc::new(AtomicUsize::new(0));
        thread.spawn(run(thread.handle(), role, link, Arc::clone(returned), Arc::clone(&under_way), commands));
        Self { commands: sender, under_way }
    }

    /// Subscribes to a queue that is known to exist: if it does not, the channel is closed under all of its consumers.
    /// The prefetch may be larger than asked, up to `most`, so that all that came back is handed out together.
    /// The receiver must be kept until it resolves, or what the subscription is handed stays with it.
    pub(super) async fn subscribe(
        &self,
        queue: &str,
        prefetch: u16,
        most: u16,
    ) -> Option<oneshot::Receiver<Result<Subscription, lapin::Error>>> {
        let (reply, receiver) = oneshot::channel();
        let command = Command::Subscribe { queue: queue.to_owned(), prefetch, most, reply };
        self.commands.send((command, Done::after(&self.under_way))).await.ok().map(|()| receiver)
    }

    /// Ends a subscription.
    pub(super) fn end(&self, thread: &AmqpThread, subscription: Subscription, left: Left) {
        self.tell(thread, Command::End { subscription: Box::new(subscription), left });
    }

    /// Waits until what was asked for a queue before this is done.
    pub(super) async fn turn(&self, queue: &str) {
        self.take_turn(queue, None).await;
    }

    /// The same; and nobody subscribes to it here while what this returns is there.
    pub(super) async fn hold(&self, queue: &str) -> oneshot::Sender<()> {
        let (held, until) = oneshot::channel();
        self.take_turn(queue, Some(until)).await;
        held
    }

    async fn take_turn(&self, queue: &str, until: Option<oneshot::Receiver<()>>) {
        let (begun, receiver) = oneshot::channel();
        let command = Command::Turn { queue: queue.to_owned(), begun, until };
        if self.commands.send((command, Done::after(&self.under_way))).await.is_ok() {
            // Dropped, not sent.
            let _ = receiver.await;
        }
    }

    /// Gives back what a subscription had brought that was ended before.
    pub(super) fn give_back(&self, thread: &AmqpThread, back: GivenBack) {
        self.tell(thread, Command::GiveBack(Box::new(back)));
    }

    /// Whether no command is being carried out, and no acknowledgement gathers.
    pub(super) fn is_idle(&self) -> bool {
        self.under_way.load(Ordering::Acquire) == 0
    }

    fn tell(&self, thread: &AmqpThread, command: Command) {
        let command = (command, Done::after(&self.under_way));
        let commands = self.commands.clone();
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

/// The channel of an intake while it is open, and the prefetch that its next consumer would get.
type Open = Arc<tokio::sync::Mutex<Option<(Arc<IntakeChannel>, u16)>>>;

async fn run(
    handle: tokio::runtime::Handle,
    role: Role,
    link: watch::Receiver<Link>,
    returned: Arc<Returned>,
    under_way: Arc<AtomicUsize>,
    mut commands: mpsc::Receiver<(Command, Done)>,
) {
    let open = Open::default();
    let mut turns = Turns::default();
    while let Some((command, done)) = commands.recv().await {
        match command {
            Command::Subscribe { queue, prefetch, most, reply } => {
                let (turn, open, link) = (turns.next(&queue), Arc::clone(&open), link.clone());
                let (returned, under_way) = (Arc::clone(&returned), Arc::clone(&under_way));
                handle.spawn(async move {
                    let _turn = (turn.begin().await, done);
                    let prefetch = returned.prefetch(&queue, prefetch, most);
                    let has_all_returned = returned.count(&queue).is_some_and(|count| count <= usize::from(prefetch));
                    let answer = subscribe(role, &link, &open, &queue, prefetch, &under_way).await;
                    let answer = answer.map(|subscription| Subscription { has_all_returned, ..subscription });
                    // Nobody waits for it any more, or is told.
                    if let Err(Ok(orphan)) = reply.send(answer) {
                        end(orphan, Left::all(), &returned).await;
                    }
                });
            }
            Command::End { subscription, left } => {
                let (turn, returned) = (turns.next(&subscription.queue), Arc::clone(&returned));
                handle.spawn(async move {
                    let _turn = (turn.begin().await, done);
                    end(*subscription, left, &returned).await;
                });
            }
            Command::GiveBack(given) => {
                let (turn, returned) = (turns.next(&given.queue), Arc::clone(&returned));
                handle.spawn(async move {
                    let _turn = (turn.begin().await, done);
                    given.give_back(&returned).await;
                });
            }
            Command::Turn { queue, begun, until } => {
                let turn = turns.next(&queue);
                handle.spawn(async move {
                    let _turn = (turn.begin().await, done);
                    drop(begun);
                    if let Some(until) = until {
                        // Dropped, not sent.
                        let _ = until.await;
                    }
                });
            }
        }
    }
}

/// Commands for one queue are carried out one after the other. A consumer that begins while what an earlier one was
/// handed is still on its way back would be handed what is behind that first, and order would be lost.
#[derive(Default)]
struct Turns {
    last: HashMap<String, oneshot::Receiver<()>>,
    /// Those that are over are forgotten when there are more than this.
    forget_at: usize,
}

struct Turn {
    before: Option<oneshot::Receiver<()>>,
    /// Dropped when the turn is over.
    over: oneshot::Sender<()>,
}

impl Turns {
    fn next(&mut self, queue: &str) -> Turn {
        if self.last.len() > self.forget_at {
            self.last.retain(|_, over| matches!(over.try_recv(), Err(oneshot::error::TryRecvError::Empty)));
            self.forget_at = 2 * self.last.len() + 16;
        }
        let (over, receiver) = oneshot::channel();
        Turn { before: self.last.insert(queue.to_owned(), receiver), over }
    }
}

impl Turn {
    /// Resolves when it is its turn; what it returns is dropped at the end of the turn.
    async fn begin(self) -> oneshot::Sender<()> {
        if let Some(before) = self.before {
            // Dropped, not sent.
            let _ = before.await;
        }
        self.over
    }
}

async fn subscribe(
    role: Role,
    link: &watch::Receiver<Link>,
    open: &Open,
    queue: &str,
    prefetch: u16,
    under_way: &Arc<AtomicUsize>,
) -> Result<Subscription, lapin::Error> {
    let session = match &*link.borrow() {
        Link::Up(session) => Arc::clone(session),
        Link::Down(_) | Link::Closed => return Err(std::io::Error::from(std::io::ErrorKind::NotConnected).into()),
    };
    let begun = {
        let mut open = open.lock().await;
        if open.as_ref().is_none_or(|(channel, _)| !channel.is_alive()) {
            let channel = session.channel(role).await?;
            let session_ended = session.end();
            *open = Some((Arc::new(IntakeChannel::new(channel, role, session_ended, under_way)), 0));
        }
        let (channel, current) = open.as_mut().expect("it was opened above");
        (Arc::clone(channel), begin(channel, current, queue, prefetch))
    };
    let (channel, begun) = begun;
    channel.change(begun).await
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
    let (consumer, name, queue) = (channel.channel.clone(), short(queue), queue.to_owned());
    let mut consume = Box::pin(async move {
        consumer.basic_consume(name, tag, BasicConsumeOptions::default(), FieldTable::default()).await
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
        Ok(Subscription { consumer, channel, prefetch, has_all_returned: false, queue, cancelled: None })
    }
}

async fn end(mut subscription: Subscription, left: Left, returned: &Returned) {
    let channel = Arc::clone(&subscription.channel);
    let mut rest = Vec::new();
    if let Left::Back { outstanding, to: BackTo::Classic | BackTo::Quorum, .. } = &left {
        gather(&mut subscription, *outstanding, &mut rest).await;
    }
    if subscription.cancelled.is_none() && channel.is_alive() {
        subscription.cancel();
    }
    if let Some(cancelled) = subscription.cancelled.take() {
        // A channel that cannot even cancel is dead, or will be; then its deliveries come back by themselves.
        let _ = channel.change(cancelled).await;
    }
    drain(&mut subscription, &mut rest);
    let queue = &subscription.queue;
    match left {
        Left::Kept(wanted) => {
            if let Err(rest) = wanted.send(rest) {
                give_back_all(&channel, queue, tags_of(&rest), BackTo::Quorum, true, &forget(), returned).await;
            }
        }
        Left::Back { to, first, outstanding, note, ended } => {
            // Only what nobody else can settle: when others have made room, RabbitMQ has handed out more.
            let firm = outstanding.min(first.tags.len()) + rest.len();
            let is_full = firm >= usize::from(subscription.prefetch);
            let came_back = rest.last().map_or(first.came_back, |last| last.redelivered);
            let tags: Vec<u64> = first.tags.into_iter().chain(tags_of(&rest)).collect();
            note(rest);
            // To one that is full RabbitMQ hands out nothing, and so has nothing to give back by itself.
            let may_be_more = !is_full || came_back && !subscription.has_all_returned;
            give_back_all(&channel, queue, tags, to, may_be_more, &note, returned).await;
            if let Some(ended) = ended {
                // Who asked may be gone.
                let _ = ended.send(());
            }
        }
    }
}

/// Waits for what is on its way to a subscription before it is cancelled: what RabbitMQ then gives back by itself must
/// be taken again one by one.
async fn gather(subscription: &mut Subscription, outstanding: usize, rest: &mut Vec<Delivery>) {
    let until = Instant::now() + GATHER_WITHIN;
    loop {
        drain(subscription, rest);
        if outstanding + rest.len() >= usize::from(subscription.prefetch) || Instant::now() >= until {
            return;
        }
        match subscription.channel.round_trip(&subscription.queue).await {
            Ok(ready) if ready > 0 => {}
            Ok(_) | Err(_) => return drain(subscription, rest),
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn drain(subscription: &mut Subscription, rest: &mut Vec<Delivery>) {
    while let Some(Some(next)) = subscription.consumer.next().now_or_never() {
        rest.extend(next.ok());
    }
}

fn tags_of(deliveries: &[Delivery]) -> Vec<u64> {
    deliveries.iter().map(|delivery| delivery.delivery_tag).collect()
}

/// For deliveries of which nothing need be noted.
pub(super) fn forget() -> Note {
    Box::new(|_| ())
}
