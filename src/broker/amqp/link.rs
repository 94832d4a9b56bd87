//! Whether RabbitMQ can be reached, and the loop that keeps it so.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::Shared;
use super::address::Addresses;
use super::error::{broker_error, unavailable, with_cause};
use super::session::{Role, Session};
use crate::broker::{BrokerError, BrokerErrorKind, Health};

/// Where things stand.
#[derive(Clone)]
pub(super) enum Link {
    /// There is no session. Says why, for operators.
    Down(Arc<str>),
    /// There is one, and everything is declared.
    Up(Arc<Session>),
    /// The broker was closed.
    Closed,
}

impl Link {
    /// The session, if there is one that answers.
    ///
    /// # Errors
    /// Unavailable or closed.
    pub(super) fn session(&self, action: &str) -> Result<Arc<Session>, BrokerError> {
        match self {
            Self::Up(session) if session.is_silent() => Err(unavailable(action)),
            Self::Up(session) => Ok(Arc::clone(session)),
            Self::Down(_) => Err(unavailable(action)),
            Self::Closed => Err(BrokerError::new(BrokerErrorKind::Closed, action)),
        }
    }

    /// Whether the broker was closed.
    pub(super) fn is_closed(&self) -> bool {
        matches!(self, Self::Closed)
    }

    /// For [`crate::broker::Broker::health`].
    pub(super) fn health(&self) -> Health {
        match self {
            Self::Up(session) => match session.blocked() {
                Some(reason) => Health::Blocked(format!("RabbitMQ takes no messages: {reason}")),
                None if session.is_silent() => Health::Unreachable("RabbitMQ gives no sign of life".into()),
                None if session.is_alive() => Health::Ready,
                None => Health::Unreachable("the connection to RabbitMQ broke".into()),
            },
            Self::Down(why) => Health::Unreachable(why.to_string()),
            Self::Closed => Health::Unreachable("the broker is closed".into()),
        }
    }
}

/// Time before the second attempt; doubled up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(100);

/// Longest time between two attempts: RabbitMQ is back for this long at most before we are.
const BACKOFF_MAX: Duration = Duration::from_secs(3);

/// How often the same trouble is logged again.
const REMIND_EVERY: Duration = Duration::from_secs(60);

/// How often RabbitMQ is asked for a sign of life.
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// Without one for this long, nobody waits for it any more: senders are told to come again.
const SILENT_AFTER: Duration = Duration::from_secs(3);

/// And after this the connections are made anew. Later, because TCP mends a network that is back soon by itself, and
/// what is on its way is then published once.
const DEAD_AFTER: Duration = Duration::from_secs(20);

/// How often an answer that is late is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Waits for a session. Ends with an error when the broker is closed.
pub(super) async fn wait_up(link: &mut watch::Receiver<Link>) -> Option<Arc<Session>> {
    let up = link.wait_for(|link| !matches!(link, Link::Down(_))).await.ok()?;
    match &*up {
        Link::Up(session) => Some(Arc::clone(session)),
        Link::Down(_) | Link::Closed => None,
    }
}

/// Makes sessions one after the other until the broker is closed.
pub(super) async fn keep(shared: Arc<Shared>) {
    let mut closed = shared.link.subscribe();
    let work = async {
        let mut log = Trouble::default();
        loop {
            let started = Instant::now();
            let trouble = one_session(&shared, &mut log).await;
            shared.set_link(Link::Down(trouble.as_str().into()));
            log.note(&trouble);
            if started.elapsed() > BACKOFF_MAX {
                log.failures = 0;
            }
            tokio::time::sleep(log.backoff()).await;
        }
    };
    tokio::select! {
        _ = closed.wait_for(Link::is_closed) => {}
        () = work => {}
    }
}

/// Logs in, declares everything, and stays until a connection breaks. Returns what went wrong.
async fn one_session(shared: &Arc<Shared>, log: &mut Trouble) -> String {
    let uri = shared.addresses.nth(log.attempts);
    log.attempts = log.attempts.wrapping_add(1);
    let at = Addresses::display(uri);
    let session = match Session::open(uri).await {
        Ok(session) => Arc::new(session),
        Err(error) => return format!("cannot log in to RabbitMQ at {at}: {error}"),
    };
    if let Err(error) = shared.declare_everything(&session).await {
        session.close().await;
        return format!("RabbitMQ at {at}: {}", with_cause(&error));
    }
    log::info!("connected to RabbitMQ at {at}");
    log.connected();
    shared.set_link(Link::Up(Arc::clone(&session)));
    tokio::select! {
        () = session.watch() => {}
        error = probe(&session) => log::warn!("RabbitMQ at {at} is given up: {error}"),
    }
    shared.set_link(Link::Down(format!("the connection to RabbitMQ at {at} broke").into()));
    session.close().await;
    // Their channels are dead. Where the other end is silent, lapin tells nobody until heartbeats are missed as well.
    shared.wake_all();
    format!("the connection to RabbitMQ at {at} broke")
}

/// Asks for signs of life until one is missing.
async fn probe(session: &Session) -> BrokerError {
    let action = "probe RabbitMQ";
    let channel = match session.publisher(Role::Ingress).await {
        Ok(channel) => channel,
        Err(error) => return broker_error(action, error),
    };
    let mut ticks = tokio::time::interval(PROBE_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let mut sign = std::pin::pin!(session.probe(&channel));
        loop {
            match tokio::time::timeout(LOOK_EVERY, &mut sign).await {
                Ok(Ok(())) => break,
                Ok(Err(error)) => return broker_error(action, error),
                // While an alarm is on there is no answer, and that is known.
                Err(_) if session.blocked().is_some() => session.note_sign(),
                Err(_) if session.silence() >= DEAD_AFTER => {
                    return unavailable(format!("{action}: no answer for {DEAD_AFTER:?}"));
                }
                Err(_) if session.silence() >= SILENT_AFTER => {
                    if session.set_silent() {
                        log::warn!("RabbitMQ gives no sign of life; what clients send is refused until it does");
                    }
                }
                Err(_) => {}
            }
        }
    }
}

/// The last trouble of which the log was told: the same again is told once a minute.
#[derive(Default)]
pub(super) struct Told(Option<(String, Instant)>);

impl Told {
    /// Whether the log should be told of this; notes that it is.
    pub(super) fn is_news(&mut self, trouble: &str) -> bool {
        let is_known = self.0.as_ref().is_some_and(|(told, at)| told == trouble && at.elapsed() < REMIND_EVERY);
        if !is_known {
            self.0 = Some((trouble.to_owned(), Instant::now()));
        }
        !is_known
    }

    /// The trouble is over.
    pub(super) fn forget(&mut self) {
        self.0 = None;
    }
}

/// Attempts at a session.
#[derive(Default)]
struct Trouble {
    attempts: usize,
    failures: u32,
    told: Told,
}

impl Trouble {
    fn connected(&mut self) {
        self.told.forget();
    }

    fn note(&mut self, trouble: &str) {
        self.failures = self.failures.saturating_add(1);
        if self.told.is_news(trouble) {
            log::warn!("{trouble}; trying again");
        }
    }

    /// With jitter, so that many routers do not come back at the same moment.
    fn backoff(&self) -> Duration {
        let doubled = BACKOFF_MIN.saturating_mul(1 << self.failures.saturating_sub(1).min(10));
        doubled.min(BACKOFF_MAX).mul_f64(rand::random_range(0.75..1.0))
    }
}
