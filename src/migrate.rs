//! Moving house: everything that lies in one broker goes to the other, while no router runs on the data directory.
//!
//! # How
//! Queue by queue, batch by batch: read at the source, write at the target and wait until it is durable there, then
//! remove at the source. So the source itself says how far it has come, and a run that was killed is simply done again.
//! What was written and not removed when it was killed is written again:
//!
//! - into the embedded broker not even that, because it notes in the same transaction what it takes in;
//! - into RabbitMQ at most one batch, under the same ids.
//!
//! Own ids are copied before the first message is moved, with whether a message of theirs still waits in its sender's
//! queue, and once more at the end, with those that came meanwhile by AMQP.
//!
//! What is under way is noted among the registry's settings: a router does not start on half of a move (see
//! [`check_start`]), and another move does not begin. Memory: one batch.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::actors::describe;
use crate::app;
use crate::broker::amqp::{self, AmqpStock};
use crate::broker::embedded::EmbeddedStock;
use crate::broker::stock::{Kind, Shelf, Stock};
use crate::broker::{BrokerError, Queue};
use crate::client::{ClientId, ClientRecord};
use crate::config::{BrokerChoice, Config};
use crate::db::{Db, DbError, DbErrorKind};
use crate::store::Store;
use crate::telemetry;
use crate::time::Timestamp;

/// The setting in which a move is noted.
const SETTING: &str = "migration";

/// How long RabbitMQ may take to be there.
const CONNECT_PATIENCE: Duration = Duration::from_secs(20);

/// Own ids copied at a time.
const IDS_PER_STEP: usize = 2_000;

/// How often is told how far it is.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// Queues named in an error.
const NAMED_MAX: usize = 5;

/// Where to move from and to.
#[derive(Debug, Clone)]
pub struct Move {
    /// The broker that has the messages.
    pub from: BrokerChoice,
    /// The broker that gets them.
    pub to: BrokerChoice,
    /// Whether the target may hold other data already.
    pub append: bool,
}

/// What is told while it goes on.
#[derive(Debug)]
pub enum Event<'a> {
    /// It begins, or goes on.
    Begun {
        /// Messages to move.
        messages: u64,
        /// Whether an earlier run was interrupted.
        resumed: bool,
    },
    /// So many messages have been moved in this run.
    Progress {
        /// In all.
        moved: u64,
        /// From this one.
        shelf: &'a Shelf,
    },
    /// A queue is empty now.
    ShelfDone {
        /// Which.
        shelf: &'a Shelf,
        /// Messages that were in it.
        messages: u64,
    },
}

/// What was done.
#[derive(Debug)]
pub struct Summary {
    /// Where the messages were, without a password.
    pub from: String,
    /// Where they are.
    pub to: String,
    /// Clients that were declared.
    pub clients: usize,
    /// Messages moved, runs that were interrupted included.
    pub moved: Vec<(Kind, u64)>,
    /// An earlier run had moved everything.
    pub was_done: bool,
}

/// Why nothing, or not everything, was moved; says what to do.
#[derive(Debug, thiserror::Error)]
pub enum MigrateError {
    /// A router, or another move, has the file.
    #[error("{} is in use: stop the router that runs on {}, then try again", .path.display(), .data_dir.display())]
    Running {
        /// The file.
        path: PathBuf,
        /// The data directory.
        data_dir: PathBuf,
    },
    /// There is no file.
    #[error("there is no {}: set DATA_DIR to the router's data directory", .0.display())]
    NoData(PathBuf),
    /// Both ends are of the same kind.
    #[error("messages move between the embedded broker and RabbitMQ; from {from} to {to} there is nothing to move")]
    SameKind {
        /// One.
        from: String,
        /// The other.
        to: String,
    },
    /// Another move is under way.
    #[error("a move from {from} to {to} was interrupted: finish it first, with `backbone migrate --to {}`", to_argument(.to))]
    Other {
        /// Where from.
        from: String,
        /// Where to.
        to: String,
    },
    /// The target is not empty.
    #[error("{target} holds {messages} messages already ({queues}): {advice}")]
    NotEmpty {
        /// The target.
        target: String,
        /// How many.
        messages: u64,
        /// Some of the queues.
        queues: String,
        /// What to do.
        advice: &'static str,
    },
    /// Another router uses RabbitMQ.
    #[error("a router is at work on {place} ({routers} consume soar-publish): stop it, then try again")]
    RouterAtWork {
        /// Where.
        place: String,
        /// How many.
        routers: u32,
    },
    /// Somebody reads a queue by AMQP, and may hold messages of it.
    #[error("queue {queue} is being consumed on {place}: stop the clients that read RabbitMQ directly, then try again")]
    Consumed {
        /// Which.
        queue: String,
        /// Where.
        place: String,
    },
    /// Someone's queue who is no client.
    #[error("queue {0} belongs to no client of the registry: empty it or delete it, then try again")]
    Stranger(String),
    /// A secret or the data directory cannot be read.
    #[error("{0}")]
    Start(String),
    /// The file failed.
    #[error("{action}: {source}; what was moved stays moved: mend that, then run it again to go on")]
    File {
        /// What was done.
        action: &'static str,
        /// Why it failed.
        source: DbError,
    },
    /// A broker failed.
    #[error("{}; nothing is lost: mend that, then run it again to go on", describe(.0))]
    Broker(#[from] BrokerError),
}

fn to_argument(place: &str) -> String {
    if place == EMBEDDED { place.into() } else { "amqp://…".to_owned() + &format!(" (the URL of {place})") }
}

/// How the embedded broker is named.
const EMBEDDED: &str = "embedded";

const EMPTY_RABBITMQ: &str = "let a router deliver them, or empty these queues with `rabbitmqctl purge_queue`, or add \
    to them with --append; then try again";
const EMPTY_EMBEDDED: &str = "let a router with SOAR_BROKER_URL=embedded deliver them, or add to them with --append; \
    then try again";

/// How far a move has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Phase {
    /// Clients are declared and own ids copied; no message is moved yet.
    Preparing,
    /// Messages are moved.
    Moving,
    /// The target has everything.
    Done,
}

/// What is noted of a move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    from: String,
    to: String,
    phase: Phase,
    at: Timestamp,
}

fn place(choice: &BrokerChoice) -> Result<String, BrokerError> {
    match choice {
        BrokerChoice::Embedded => Ok(EMBEDDED.into()),
        BrokerChoice::Amqp(url) => AmqpStock::place(url),
    }
}

async fn read_note(store: &Store) -> Result<Option<Note>, DbError> {
    // One that cannot be read is of a later version, which may mean anything: better not to start than to guess.
    let parse = |text: String| {
        serde_json::from_str(&text)
            .map_err(|error| DbError { kind: DbErrorKind::Internal, detail: format!("the note of a move: {error}") })
    };
    store.setting(SETTING).await?.map(parse).transpose()
}

/// Why a router must not start, if so: its queues are on their way elsewhere. Warns when they were moved to a broker of
/// the other kind.
///
/// # Errors
/// When the note cannot be read.
pub async fn check_start(store: &Store, config: &Config) -> Result<Option<String>, DbError> {
    let Some(note) = read_note(store).await? else { return Ok(None) };
    if note.phase != Phase::Done {
        return Ok(Some(format!(
            "moving the queues from {} to {} was interrupted: run `backbone migrate --to {}` again, then start",
            note.from,
            note.to,
            to_argument(&note.to)
        )));
    }
    if (note.to == EMBEDDED) != (config.broker == BrokerChoice::Embedded) {
        log::warn!(
            "the queues were moved to {} at {}, and SOAR_BROKER_URL names another broker: what is there stays there",
            note.to,
            note.at
        );
    }
    Ok(None)
}

/// Both ends of a move.
struct Ends {
    embedded: EmbeddedStock,
    amqp: AmqpStock,
    to_amqp: bool,
}

impl Ends {
    fn source(&self) -> &dyn Stock {
        if self.to_amqp { &self.embedded } else { &self.amqp }
    }

    fn target(&self) -> &dyn Stock {
        if self.to_amqp { &self.amqp } else { &self.embedded }
    }
}

/// Moves everything. When the future is dropped, or the process is killed, nothing is lost: it goes on when it is run
/// again.
///
/// # Errors
/// [`MigrateError`]; what was moved by then stays moved.
pub async fn run(config: &Config, plan: &Move, mut tell: impl FnMut(Event<'_>)) -> Result<Summary, MigrateError> {
    let (from, to) = (place(&plan.from)?, place(&plan.to)?);
    let url = match (&plan.from, &plan.to) {
        (BrokerChoice::Embedded, BrokerChoice::Amqp(url)) | (BrokerChoice::Amqp(url), BrokerChoice::Embedded) => url,
        _ => return Err(MigrateError::SameKind { from, to }),
    };
    let path = config.database_path();
    if !path.is_file() {
        return Err(MigrateError::NoData(path));
    }
    let db = Db::open(&path).map_err(|source| match source.kind {
        DbErrorKind::Locked => MigrateError::Running { path: path.clone(), data_dir: config.data_dir.clone() },
        _ => MigrateError::File { action: "open the file", source },
    })?;
    let done = Mover { config, plan, from, to, db: db.clone() }.run(url, &mut tell).await;
    db.close();
    done
}

struct Mover<'a> {
    config: &'a Config,
    plan: &'a Move,
    from: String,
    to: String,
    db: Db,
}

impl Mover<'_> {
    async fn run(&self, url: &str, tell: &mut impl FnMut(Event<'_>)) -> Result<Summary, MigrateError> {
        let file = |action| move |source| MigrateError::File { action, source };
        let secret = app::token_secret(self.config).map_err(|error| MigrateError::Start(error.to_string()))?;
        let store = Store::open(self.db.clone(), &secret).await.map_err(file("open the registry"))?;
        let loaded = store.load().await.map_err(file("read the registry"))?;
        let clients: Vec<ClientRecord> = loaded.clients.into_iter().map(|client| client.record).collect();
        let note = read_note(&store).await.map_err(file("read how far an earlier move has come"))?;
        let resumed = match &note {
            Some(note) if note.phase != Phase::Done => {
                if (&note.from, &note.to) != (&self.from, &self.to) {
                    return Err(MigrateError::Other { from: note.from.clone(), to: note.to.clone() });
                }
                Some(note.phase)
            }
            _ => None,
        };
        let embedded = EmbeddedStock::open(self.db.clone()).await?;
        let amqp = self.connect(url, &clients).await?;
        let ends = Ends { embedded, amqp, to_amqp: self.plan.from == BrokerChoice::Embedded };
        let result = self.with(&ends, &store, &clients, loaded.unfinished, note, resumed, tell).await;
        ends.amqp.close().await;
        result
    }

    async fn connect(&self, url: &str, clients: &[ClientRecord]) -> Result<AmqpStock, BrokerError> {
        let options = amqp::Options {
            url: url.to_owned(),
            queue_type: self.config.queue_type,
            management_url: self.config.rabbitmq_management_url.clone(),
            dedup_window: self.config.dedup_window,
            held_for: amqp::HELD_FOR,
        };
        let (db, max) = (self.db.clone(), self.config.max_message_bytes);
        AmqpStock::connect(options, db, telemetry::new(0), clients, max, CONNECT_PATIENCE).await
    }

    #[expect(clippy::too_many_arguments, reason = "what was found at the start, each used once")]
    async fn with(
        &self,
        ends: &Ends,
        store: &Store,
        clients: &[ClientRecord],
        unfinished: Vec<ClientId>,
        note: Option<Note>,
        resumed: Option<Phase>,
        tell: &mut impl FnMut(Event<'_>),
    ) -> Result<Summary, MigrateError> {
        if let Some((shelf, consumers)) = ends.amqp.consumed(!ends.to_amqp).await? {
            let place = if ends.to_amqp { self.to.clone() } else { self.from.clone() };
            return Err(match shelf {
                Shelf::Queue(Queue::Publish) => MigrateError::RouterAtWork { place, routers: consumers },
                shelf => MigrateError::Consumed { queue: shelf.to_string(), place },
            });
        }
        let mut waiting = ends.source().shelves().await?;
        if resumed.is_none() {
            let is_same = note.is_some_and(|note| (&note.from, &note.to) == (&self.from, &self.to));
            if is_same && waiting.is_empty() {
                return self.summary(ends, clients.len(), true).await;
            }
            self.refuse_other_data(ends).await?;
        }
        if !unfinished.is_empty() {
            delete_unfinished(ends, store, unfinished).await?;
            // What they had on their shelves went with them.
            waiting = ends.source().shelves().await?;
        }
        let messages = waiting.iter().map(|(_, messages)| messages).sum();
        tell(Event::Begun { messages, resumed: resumed.is_some() });
        if resumed != Some(Phase::Moving) {
            if resumed.is_none() {
                ends.embedded.begin_count().await?;
            }
            self.note(store, Phase::Preparing).await?;
            ends.target().prepare(clients).await?;
            if !self.plan.append {
                ends.target().forget_own_ids().await?;
            }
            if ends.to_amqp {
                ends.embedded.note_waiting_ids().await?;
            }
            copy_own_ids(ends).await?;
            self.note(store, Phase::Moving).await?;
        }
        move_all(ends, clients, waiting, tell).await?;
        copy_own_ids(ends).await?;
        ends.source().emptied().await?;
        self.note(store, Phase::Done).await?;
        self.summary(ends, clients.len(), false).await
    }

    async fn refuse_other_data(&self, ends: &Ends) -> Result<(), MigrateError> {
        let shelves = ends.target().shelves().await?;
        if shelves.is_empty() || self.plan.append {
            return Ok(());
        }
        let mut queues: Vec<String> =
            shelves.iter().take(NAMED_MAX).map(|(shelf, messages)| format!("{shelf} {messages}")).collect();
        if shelves.len() > NAMED_MAX {
            queues.push(format!("{} more queues", shelves.len() - NAMED_MAX));
        }
        Err(MigrateError::NotEmpty {
            target: if ends.to_amqp { self.to.clone() } else { "the embedded broker".into() },
            messages: shelves.iter().map(|(_, messages)| messages).sum(),
            queues: queues.join(", "),
            advice: if ends.to_amqp { EMPTY_RABBITMQ } else { EMPTY_EMBEDDED },
        })
    }

    async fn note(&self, store: &Store, phase: Phase) -> Result<(), MigrateError> {
        let note = Note { from: self.from.clone(), to: self.to.clone(), phase, at: Timestamp::now() };
        let text = serde_json::to_string(&note).expect("plain data is always JSON");
        let noted = store.set_setting(SETTING, text).await;
        noted.map_err(|source| MigrateError::File { action: "note how far the move has come", source })
    }

    async fn summary(&self, ends: &Ends, clients: usize, was_done: bool) -> Result<Summary, MigrateError> {
        let moved = ends.embedded.moved().await?;
        Ok(Summary { from: self.from.clone(), to: self.to.clone(), clients, moved, was_done })
    }
}

/// Deletes what is left of clients whose creation or deletion was cut short, as the next start would.
async fn delete_unfinished(ends: &Ends, store: &Store, unfinished: Vec<ClientId>) -> Result<(), MigrateError> {
    for id in unfinished {
        ends.source().delete_client(&id).await?;
        store.remove(&id).await.map_err(|source| MigrateError::File { action: "remove a client", source })?;
    }
    Ok(())
}

async fn copy_own_ids(ends: &Ends) -> Result<(), BrokerError> {
    let mut after = None;
    loop {
        let (ids, next) = ends.source().own_ids(after, IDS_PER_STEP).await?;
        if !ids.is_empty() {
            ends.target().put_own_ids(ids).await?;
        }
        match next {
            Some(next) => after = Some(next),
            None => return Ok(()),
        }
    }
}

/// Empties the source, shelf by shelf, until there is nothing on any.
async fn move_all(
    ends: &Ends,
    clients: &[ClientRecord],
    mut waiting: Vec<(Shelf, u64)>,
    tell: &mut impl FnMut(Event<'_>),
) -> Result<(), MigrateError> {
    let known: HashMap<&str, ()> = clients.iter().map(|client| (client.client_id.as_str(), ())).collect();
    let mut told = Instant::now();
    let mut moved = 0;
    loop {
        for (shelf, _) in &waiting {
            if owner(shelf).is_some_and(|owner| !known.contains_key(owner)) {
                return Err(MigrateError::Stranger(shelf.to_string()));
            }
            let before = moved;
            loop {
                let batch = ends.source().read(shelf).await?;
                if batch.is_end() {
                    break;
                }
                let messages = batch.items().len() as u64;
                if messages > 0 {
                    ends.target().put(shelf, batch.items()).await?;
                }
                batch.remove().await?;
                moved += messages;
                if told.elapsed() >= TELL_EVERY {
                    tell(Event::Progress { moved, shelf });
                    told = Instant::now();
                }
            }
            if moved > before {
                tell(Event::ShelfDone { shelf, messages: moved - before });
            }
        }
        waiting = ends.source().shelves().await?;
        if waiting.is_empty() && !ends.to_amqp {
            ends.amqp.settle_down().await;
            waiting = ends.source().shelves().await?;
        }
        if waiting.is_empty() {
            return Ok(());
        }
    }
}

fn owner(shelf: &Shelf) -> Option<&str> {
    match shelf {
        Shelf::Dead(id) | Shelf::Queue(Queue::Outbox(id) | Queue::Notify(id) | Queue::Inbox(id)) => Some(id.as_str()),
        Shelf::Queue(Queue::Publish | Queue::Unrouted) | Shelf::Retry(_) => None,
    }
}
