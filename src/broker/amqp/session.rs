//! One set of connections to RabbitMQ, from logging in to the first of them breaking.
//!
//! Five connections, whatever the number of clients. They are apart because RabbitMQ stops reading a connection that
//! publishes while it is short of memory or disk: acknowledgements, declarations and deliveries must not wait behind
//! that. And what clients put in (ingress) must not hold up what is on its way out (relay).
//!
//! A session ends as a whole: after any break everything is declared again before messages flow, so that no binding is
//! missing when the first one is published.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use lapin::options::{BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions};
use lapin::uri::AMQPUri;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, Event};
use parking_lot::Mutex;
use tokio::sync::{OwnedMutexGuard, Semaphore, watch};

use super::wire::short;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Declaring, binding, counting, looking at dead letters. Never publishes.
    Control,
    /// Publishing what clients send.
    Ingress,
    /// Publishing from hop to hop.
    Relay,
    /// Consuming outboxes, notify queues and `soar-publish`.
    Pipeline,
    /// Consuming inboxes.
    Inboxes,
}

impl Role {
    const ALL: [Self; 5] = [Self::Control, Self::Ingress, Self::Relay, Self::Pipeline, Self::Inboxes];

    fn name(self) -> &'static str {
        match self {
            Self::Control => "control",
            Self::Ingress => "ingress",
            Self::Relay => "relay",
            Self::Pipeline => "pipeline",
            Self::Inboxes => "inboxes",
        }
    }
}

/// Control calls under way at once, each on a channel of its own.
const CONTROL_CHANNELS: usize = 16;

/// Calls after which a control channel is replaced: lapin keeps a note of every queue that was declared on a channel.
const CALLS_PER_CHANNEL: u32 = 500;

/// How long one connection may take to be made.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long one control call may take. Declaring a quorum queue on a busy cluster takes seconds.
pub(super) const CONTROL_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a queue may take to answer. RabbitMQ itself gives up after five seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long after logging in a queue may have no leader yet. On a node that has just started it takes about half a second
/// to elect one.
const LEADERS_WITHIN: Duration = Duration::from_secs(5);

/// A set of connections. See the module.
pub(super) struct Session {
    uri: AMQPUri,
    connections: [Connection; 5],
    idle: Mutex<Vec<(Channel, u32)>>,
    /// Control channels on which an answer is still to come that nobody waits for, and since when.
    abandoned: Mutex<Vec<(Channel, Instant)>>,
    turns: Semaphore,
    /// Why RabbitMQ takes no messages, while it does not.
    blocked: watch::Sender<Option<Arc<str>>>,
    /// When RabbitMQ last confirmed anything, in milliseconds since the session began.
    last_sign_ms: AtomicU64,
    /// Whether it has not for so long that nobody should wait for it.
    silent: watch::Sender<bool>,
    /// Retry queues that are known to be there.
    retries: Mutex<BTreeSet<u64>>,
    /// Whose turn it is to declare one.
    retry_turn: Arc<tokio::sync::Mutex<()>>,
    /// An exchange was not there: nothing is moved on until everything is declared again.
    suspect: watch::Sender<bool>,
    since: Instant,
    /// Set when it is given up. Lapin tells those who wait for an answer nothing while the other end is silent.
    ended: watch::Sender<bool>,
    /// Queues that were made in this session, so that they are known to have a leader; until that shows.
    led: Mutex<BTreeSet<String>>,
}

impl Session {
    /// Logs in.
    pub(super) async fn open(uri: &AMQPUri) -> Result<Self, lapin::Error> {
        let [a, b, c, d, e] = Role::ALL.map(|role| connect(uri, role.name()));
        // One first: whoever takes connections and does not answer is not asked five times.
        let a = a.await?;
        let (b, c, d, e) = futures_util::try_join!(b, c, d, e)?;
        Ok(Self {
            uri: uri.clone(),
            connections: [a, b, c, d, e],
            idle: Mutex::new(Vec::new()),
            abandoned: Mutex::new(Vec::new()),
            turns: Semaphore::new(CONTROL_CHANNELS),
            blocked: watch::Sender::new(None),
            last_sign_ms: AtomicU64::new(0),
            silent: watch::Sender::new(false),
            retries: Mutex::default(),
            retry_turn: Arc::default(),
            suspect: watch::Sender::new(false),
            since: Instant::now(),
            ended: watch::Sender::new(false),
            led: Mutex::default(),
        })
    }

    fn connection(&self, role: Role) -> &Connection {
        &self.connections[Role::ALL.iter().position(|r| *r == role).expect("ALL has every role")]
    }

    /// A new channel on the connection for `role`.
    pub(super) async fn channel(&self, role: Role) -> Result<Channel, lapin::Error> {
        within(CONTROL_TIMEOUT, self.connection(role).create_channel()).await
    }

    /// A new channel that confirms what is published on it.
    pub(super) async fn publisher(&self, role: Role) -> Result<Channel, lapin::Error> {
        let channel = self.channel(role).await?;
        within(CONTROL_TIMEOUT, channel.confirm_select(ConfirmSelectOptions::default())).await?;
        Ok(channel)
    }

    /// Runs `work` on a control channel. An error closes the channel, so it is not used again. When RabbitMQ falls
    /// silent it is not waited for.
    pub(super) async fn control<T>(
        &self,
        work: impl AsyncFnOnce(&Channel) -> Result<T, lapin::Error>,
    ) -> Result<T, lapin::Error> {
        let _turn = self.turns.acquire().await.expect("the semaphore is never closed");
        let mut silences = self.silences();
        let call = async {
            let idle = self.idle.lock().pop();
            let (channel, calls) = match idle {
                Some((channel, calls)) if channel.status().connected() => (channel, calls),
                _ => (self.channel(Role::Control).await?, 0),
            };
            let call = Call { session: self, channel: Some(channel) };
            let done = within(CONTROL_TIMEOUT, work(call.channel())).await?;
            if calls < CALLS_PER_CHANNEL {
                self.idle.lock().push((call.end(), calls + 1));
            }
            Ok(done)
        };
        tokio::select! {
            result = call => result,
            Ok(_) = silences.wait_for(|silent| *silent) => Err(late("it gives no sign of life")),
        }
    }

    /// Whether a queue answers when it is asked for a message. Asked on a connection of its own, because RabbitMQ closes
    /// the whole connection when it does not.
    pub(super) async fn answers(&self, queue: &str) -> bool {
        let ask = async {
            let connection = connect(&self.uri, "check").await?;
            let channel = connection.create_channel().await?;
            let message = channel.basic_get(short(queue), BasicGetOptions::default()).await?;
            // Closing gives it back.
            drop(message);
            connection.close(200, short("bye")).await
        };
        within(ANSWER_TIMEOUT, ask).await.is_ok()
    }

    /// Whether every connection is up.
    pub(super) fn is_alive(&self) -> bool {
        self.connections.iter().all(|connection| connection.status().connected())
    }

    /// Whether what a quorum queue says of its messages can be believed. After a restart of RabbitMQ it has no leader for
    /// a moment, and then says that it has none; and for another moment it has one that has not read all.
    pub(super) fn counts_are_sure(&self, queue: &str) -> bool {
        self.since.elapsed() > LEADERS_WITHIN || self.led.lock().contains(queue)
    }

    /// Notes queues that were made in this session.
    pub(super) fn note_led(&self, queues: impl IntoIterator<Item = String>) {
        let mut led = self.led.lock();
        if self.since.elapsed() <= LEADERS_WITHIN {
            led.extend(queues);
        } else {
            led.clear();
        }
    }

    /// Whether the retry queue for this delay is known to be there.
    pub(super) fn has_retry(&self, seconds: u64) -> bool {
        self.retries.lock().contains(&seconds)
    }

    /// Waits until nobody else declares a retry queue.
    pub(super) async fn take_retry_turn(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.retry_turn).lock_owned().await
    }

    /// Notes that it is.
    pub(super) fn note_retry(&self, seconds: u64) {
        self.retries.lock().insert(seconds);
    }

    /// Notes whether an exchange was not there, and is to be declared again with all that is bound to it.
    pub(super) fn set_suspect(&self, suspect: bool) {
        if suspect {
            self.forget_retries();
        }
        self.suspect.send_replace(suspect);
    }

    /// A retry queue was not there: each is declared again before it is used.
    pub(super) fn forget_retries(&self) {
        self.retries.lock().clear();
    }

    /// Tells when that changes.
    pub(super) fn suspicions(&self) -> watch::Receiver<bool> {
        self.suspect.subscribe()
    }

    /// Why RabbitMQ takes no messages now, if so.
    pub(super) fn blocked(&self) -> Option<Arc<str>> {
        self.blocked.borrow().clone()
    }

    /// Tells when that changes.
    pub(super) fn blocked_changes(&self) -> watch::Receiver<Option<Arc<str>>> {
        self.blocked.subscribe()
    }

    /// RabbitMQ has confirmed something: it is there, and takes messages.
    pub(super) fn note_sign(&self) {
        let now_ms = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_sign_ms.store(now_ms, Ordering::Relaxed);
        self.silent.send_if_modified(std::mem::take);
    }

    /// For how long RabbitMQ has confirmed nothing.
    pub(super) fn silence(&self) -> Duration {
        let last = Duration::from_millis(self.last_sign_ms.load(Ordering::Relaxed));
        self.since.elapsed().saturating_sub(last)
    }

    /// Nobody should wait for RabbitMQ until it gives a sign. Returns whether that is news.
    pub(super) fn set_silent(&self) -> bool {
        self.silent.send_if_modified(|silent| !std::mem::replace(silent, true))
    }

    /// Whether RabbitMQ is asked for a sign of life, and has given none for seconds.
    pub(super) fn is_silent(&self) -> bool {
        *self.silent.borrow()
    }

    /// Tells when that changes.
    pub(super) fn silences(&self) -> watch::Receiver<bool> {
        self.silent.subscribe()
    }

    /// Tells when it is given up.
    pub(super) fn end(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }

    /// Follows alarms until the session ends. Resolves when a connection breaks.
    pub(super) async fn watch(&self) {
        let publishing = [Role::Ingress, Role::Relay].map(|role| self.connection(role));
        let events = self.connections.iter().map(|connection| Box::pin(connection.events_listener()));
        let mut events = futures_util::stream::select_all(events);
        let mut ticks = tokio::time::interval(Duration::from_millis(250));
        while self.is_alive() {
            tokio::select! {
                event = events.next() => match event {
                    Some(Event::ConnectionBlocked(reason)) => {
                        log::warn!("RabbitMQ takes no messages: {reason}");
                        self.blocked.send_replace(Some(reason.into()));
                    }
                    Some(Event::ConnectionUnblocked) if !publishing.iter().any(|c| c.status().blocked()) => {
                        log::info!("RabbitMQ takes messages again");
                        self.blocked.send_replace(None);
                    }
                    Some(_) => {}
                    None => return,
                },
                // Not every way for a connection to end is an event.
                _ = ticks.tick() => self.abandoned.lock().retain(|(channel, since)| {
                    channel.status().connected() && since.elapsed() < 2 * CONTROL_TIMEOUT
                }),
            }
        }
    }

    /// Publishes to nowhere on the ingress connection and waits for the confirm: shows an alarm, or a peer that has
    /// gone silent, although no client sends anything.
    pub(super) async fn probe(&self, channel: &Channel) -> Result<(), lapin::Error> {
        let options = BasicPublishOptions::default();
        let publish = channel.basic_publish(short(""), short("soar-probe"), options, b"", BasicProperties::default());
        publish.await?.await?;
        self.note_sign();
        Ok(())
    }

    /// Closes every connection, as far as that can be told to the other end.
    pub(super) async fn close(&self) {
        let close = self.connections.iter().map(|connection| connection.close(200, short("bye")));
        // Who does not answer is gone, or stuck behind an alarm; dropping the connection is all that is left.
        let _ = tokio::time::timeout(Duration::from_secs(2), futures_util::future::join_all(close)).await;
        self.ended.send_replace(true);
    }
}

/// A call on a control channel. When it fails or is given up, its channel is kept until the answer has come: lapin 4.12
/// closes a channel that is dropped, and takes it for an error of the whole connection when RabbitMQ has just done so.
struct Call<'a> {
    session: &'a Session,
    /// Until it has ended well.
    channel: Option<Channel>,
}

impl Call<'_> {
    fn channel(&self) -> &Channel {
        self.channel.as_ref().expect("it has not ended")
    }

    fn end(mut self) -> Channel {
        self.channel.take().expect("it ends once")
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if let Some(channel) = self.channel.take() {
            self.session.abandoned.lock().push((channel, Instant::now()));
        }
    }
}

/// One connection, named after what it is for.
pub(super) async fn connect(uri: &AMQPUri, what_for: &str) -> Result<Connection, lapin::Error> {
    let name = format!("communications-backbone {what_for}");
    let properties = ConnectionProperties::default().with_connection_name(name.into());
    within(CONNECT_TIMEOUT, Connection::connect_uri(uri.clone(), properties)).await
}

/// `call`, or a timeout as an I/O error.
pub(super) async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<T, lapin::Error>>,
) -> Result<T, lapin::Error> {
    let call = tokio::time::timeout(limit, call).await;
    call.unwrap_or_else(|_| Err(late(&format!("no answer within {limit:?}"))))
}

pub(super) fn late(why: &str) -> lapin::Error {
    std::io::Error::new(std::io::ErrorKind::TimedOut, why).into()
}
