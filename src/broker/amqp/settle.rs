//! How deliveries end: what goes on is published and confirmed first, then acknowledged where it came from.

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use super::Shared;
use super::channel::IntakeChannel;
use super::consumer::ConsumerCore;
use super::dedup::{Claim, Fact, OwnId};
use super::delay;
use super::error::{db_error, unavailable};
use super::hand::Order;
use super::held::Held;
use super::limits;
use super::topology;
use super::window::{Fate, Outgoing, Refusal};
use super::wire::{self, Counts, short};
use crate::broker::{
    BrokerError, BrokerErrorKind, DeadLetter, DeadReason, Origin, Outcome, Payload, Queue, Settlement, Target,
};
use crate::client::ClientId;
use crate::envelope::SharedMessage;
use crate::telemetry::Step;
use crate::telemetry::traces::ROUTED_KEPT;
use crate::time::Timestamp;

/// Settles deliveries of one consumer, in order. Carried out even when the future is dropped.
pub(super) async fn settle(core: Arc<ConsumerCore>, settlements: Vec<Settlement>) -> Result<(), BrokerError> {
    let mut done = Vec::new();
    let mut back = Vec::new();
    let mut moves = Vec::new();
    let mut late = Vec::new();
    let mut all_known = true;
    let order = core.order();
    for Settlement { tag, outcome, .. } in settlements {
        let Some(held) = core.take(tag) else {
            let is_known = core.settle_renewing(tag, matches!(outcome, Outcome::Complete));
            all_known &= is_known || matches!(outcome, Outcome::Requeue);
            continue;
        };
        match outcome {
            Outcome::Complete => done.push(held),
            Outcome::Requeue => back.push(held),
            Outcome::Forward(..) if !order.covers(tag) => late.push(held),
            Outcome::Forward(target, message) => moves.push((held, Onward::Forward(target, message))),
            Outcome::Delay { delay, attempts } => moves.push((held, Onward::Delay { delay, attempts })),
            Outcome::Dead { reason, attempts } => moves.push((held, Onward::Dead { reason, attempts })),
        }
    }
    let action = format!("settle deliveries of queue {}", core.name);
    core.return_handed(back);
    if let Queue::Inbox(client) = &core.queue {
        note_delivered(&core.shared, client, &done);
    }
    let all_go = acknowledge(&done) && late.is_empty() && all_known;
    // Something before them could not go on, and has come back meanwhile.
    core.return_handed(late);
    core.settled();
    let moved = if moves.is_empty() {
        Ok(())
    } else {
        let shared = Arc::clone(&core.shared);
        let places: Vec<u64> = moves.iter().map(|(held, _)| held.place).collect();
        core.begin_moving(moves.iter().map(|(held, _)| held));
        let moved = async move {
            let moved = move_on(&core, order, moves).await;
            core.end_moving(&places);
            moved
        };
        shared.thread.carry(moved).await
    };
    // Or the channel that they came on is gone; RabbitMQ hands them out again.
    if all_go { moved } else { moved.and(Err(unavailable(action))) }
}

/// Where a delivery goes.
enum Onward {
    Forward(Target, SharedMessage),
    Delay { delay: std::time::Duration, attempts: u32 },
    Dead { reason: DeadReason, attempts: u32 },
}

/// One delivery on its way.
struct Move {
    held: Held,
    onward: Onward,
    /// To be noted when it was routed.
    id: Option<OwnId>,
}

async fn move_on(core: &Arc<ConsumerCore>, order: Order, moves: Vec<(Held, Onward)>) -> Result<(), BrokerError> {
    let shared = Arc::clone(&core.shared);
    let action = format!("settle deliveries of queue {}", core.name);
    // One batch after the other, in the order of the calls, until this one is in line.
    let turn = Arc::clone(&core.turn).acquire_owned().await;
    let (mut moves, lost): (Vec<_>, Vec<_>) = moves.into_iter().partition(|(held, _)| held.channel.is_alive());
    core.return_handed(lost.into_iter().map(|(held, _)| held));
    if let Err(error) = prepare(core, &moves).await {
        core.return_failed(moves.drain(..).map(|(held, _)| held));
        return Err(error);
    }
    let own_ids = match OwnIds::look_up(core, &moves).await {
        Ok(own_ids) => own_ids,
        Err(error) => {
            core.return_failed(moves.into_iter().map(|(held, _)| held));
            return Err(error);
        }
    };
    let (mut going, mut messages) = (Vec::with_capacity(moves.len()), Vec::with_capacity(moves.len()));
    let (mut known, mut repeated) = (Vec::new(), Vec::new());
    for (index, (held, onward)) in moves.into_iter().enumerate() {
        match own_ids.verdict(index) {
            Verdict::Goes(id) => {
                messages.push(outgoing(core, &held, &onward));
                going.push(Move { held, onward, id });
            }
            Verdict::WasRouted => known.push(held),
            Verdict::Repeats(id) => repeated.push((id, held)),
        }
    }
    let forwards = going.iter().any(|one| matches!(one.onward, Onward::Forward(..)));
    let broken = forwards.then_some(order.broken);
    let fates = shared.publish_in_turn(shared.relay(&core.name), messages, broken, turn).await;
    let routed: Vec<OwnId> =
        going.iter().zip(&fates).filter_map(|(one, fate)| one.id.filter(|_| fate.is_ok())).collect();
    let (ended, unsure): (Vec<_>, Vec<_>) = repeated.into_iter().partition(|(id, _)| routed.contains(id));
    core.return_handed(unsure.into_iter().map(|(_, held)| held));
    known.extend(ended.into_iter().map(|(_, held)| held));
    if !routed.is_empty() {
        // Noted before it is acknowledged: what comes again after a kill is then known.
        if let Err(error) = shared.dedup.note(Fact::Routed, routed).await {
            log::error!("{action}: cannot note own ids, so a copy of a message may be routed again: {error}");
        }
    }
    drop(own_ids);
    count_duplicates(&shared, &known);
    let result = finish(core, going, fates, &action).await;
    let acked = acknowledge(known);
    if acked { result } else { result.and(Err(unavailable(action))) }
}

/// A client's AMQP publishes count as accepted, and as duplicates, here; those that came by HTTP were counted when they
/// were taken.
fn count_duplicates(shared: &Shared, held: &[Held]) {
    let foreign = held.iter().filter(|held| matches!(held.payload, Payload::Foreign(_))).count();
    shared.telemetry.metrics.accepted.inc_by(foreign as u64);
    shared.telemetry.metrics.duplicates.inc_by(foreign as u64);
}

/// Whatever must be there before it is published to.
async fn prepare(core: &ConsumerCore, moves: &[(Held, Onward)]) -> Result<(), BrokerError> {
    let mut delays: BTreeMap<u64, u64> = BTreeMap::new();
    for (_, onward) in moves {
        if let Onward::Delay { delay, .. } = onward {
            *delays.entry(delay::seconds_for(*delay)).or_default() += 1;
        }
    }
    if delays.is_empty() {
        return Ok(());
    }
    let (shared, client) = (Arc::clone(&core.shared), core.client.clone());
    let prepared = async move { shared.prepare_delays(client.as_deref(), delays).await };
    core.shared.thread.run("delay messages", prepared).await
}

/// What is to be done with one delivery of a batch, as far as its id goes.
#[derive(Debug, Clone, Copy)]
enum Verdict {
    /// It goes on; noted under its own id, if it has one.
    Goes(Option<OwnId>),
    /// One with this id was routed before.
    WasRouted,
    /// An earlier one of this batch has the same id.
    Repeats(OwnId),
}

/// Own ids on their way out of a queue of their sender. While it lives, no other batch moves on one of them.
struct OwnIds {
    _claim: Option<Claim>,
    verdicts: Vec<Verdict>,
}

impl OwnIds {
    async fn look_up(core: &ConsumerCore, moves: &[(Held, Onward)]) -> Result<Self, BrokerError> {
        let of_sender = matches!(core.queue, Queue::Outbox(_) | Queue::Notify(_));
        let own = |onward: &Onward| match onward {
            Onward::Forward(_, message) if of_sender && message.own_id => Some(OwnId::of(message)),
            _ => None,
        };
        let ids: Vec<OwnId> = moves.iter().filter_map(|(_, onward)| own(onward)).collect();
        if ids.is_empty() {
            return Ok(Self { _claim: None, verdicts: Vec::new() });
        }
        let claim = core.shared.dedup.claim(Fact::Routed, &ids).await;
        let known = core.shared.dedup.known(Fact::Routed, ids).await;
        let known = known.map_err(|error| db_error(format!("look up own ids in queue {}", core.name), error))?;
        let (mut known, mut here) = (known.into_iter(), HashSet::new());
        let verdict = |(_, onward): &(Held, Onward)| match own(onward) {
            None => Verdict::Goes(None),
            Some(_) if known.next() == Some(true) => Verdict::WasRouted,
            Some(id) if here.insert(id.hash) => Verdict::Goes(Some(id)),
            Some(id) => Verdict::Repeats(id),
        };
        Ok(Self { verdicts: moves.iter().map(verdict).collect(), _claim: Some(claim) })
    }

    fn verdict(&self, index: usize) -> Verdict {
        self.verdicts.get(index).copied().unwrap_or(Verdict::Goes(None))
    }
}

/// What is published for a delivery.
fn outgoing(core: &ConsumerCore, held: &Held, onward: &Onward) -> Outgoing {
    let user = core.shared.user();
    match onward {
        Onward::Forward(target, message) => {
            let payload = Payload::Message(Arc::clone(message));
            let (exchange, key) = match target {
                Target::Publish => ("", topology::PUBLISH),
                Target::Topic => (topology::TOPIC, message.topic.as_ref().map_or("", |topic| topic.as_str())),
                Target::Broadcast => (topology::BROADCAST, ""),
            };
            let properties = wire::properties(&payload, Counts::fresh(), user);
            Outgoing { exchange: short(exchange), key: short(key), properties, body: wire::body(&payload) }
        }
        Onward::Delay { delay, attempts } => {
            let counts = Counts { attempts: *attempts, deliveries: held.before + 1, ..held.counts };
            delayed(&held.payload, counts, *delay, &core.name, user)
        }
        Onward::Dead { reason, attempts } => match origin(&core.queue) {
            Some((client, origin)) => dead_letter(client, origin, *reason, *attempts, &held.payload, user),
            // Nobody's queue, so it is kept with what found no way.
            None => Outgoing {
                exchange: short(topology::UNROUTED),
                key: short(""),
                properties: wire::properties(&held.payload, held.counts, user),
                body: wire::body(&held.payload),
            },
        },
    }
}

/// A message as it is put into a retry queue, to come back to the queue `name`.
pub(super) fn delayed(
    payload: &Payload,
    counts: Counts,
    delay: std::time::Duration,
    name: &str,
    user: Option<&str>,
) -> Outgoing {
    let counts = Counts { delayed_at_ms: Timestamp::now().as_millis(), ..counts };
    Outgoing {
        exchange: short(&topology::retry(delay::seconds_for(delay))),
        key: short(name),
        properties: wire::properties(payload, counts, user),
        body: wire::body(payload),
    }
}

/// A message as it is put among a client's dead letters.
pub(super) fn dead_letter(
    client: &ClientId,
    origin: Origin,
    reason: DeadReason,
    attempts: u32,
    payload: &Payload,
    user: Option<&str>,
) -> Outgoing {
    let dead = DeadLetter {
        id: uuid::Uuid::now_v7().to_string(),
        origin,
        reason,
        attempts,
        died_at: Timestamp::now(),
        payload: payload.clone(),
    };
    Outgoing {
        exchange: topology::default_exchange(),
        key: short(&topology::dead(client)),
        properties: wire::dead_properties(&dead, user),
        body: wire::body(payload),
    }
}

fn origin(queue: &Queue) -> Option<(&ClientId, Origin)> {
    match queue {
        Queue::Inbox(client) => Some((client, Origin::Inbox)),
        Queue::Outbox(client) => Some((client, Origin::Outbox)),
        Queue::Notify(client) => Some((client, Origin::Notify)),
        Queue::Publish | Queue::Unrouted => None,
    }
}

/// Acknowledges what went on, and gives back what did not.
async fn finish(core: &ConsumerCore, moves: Vec<Move>, fates: Vec<Fate>, action: &str) -> Result<(), BrokerError> {
    let shared = &core.shared;
    let (mut moved, mut back) = (Vec::with_capacity(moves.len()), Vec::new());
    let mut refusal = None;
    for (one, fate) in moves.into_iter().zip(fates) {
        let fate = match fate {
            // Nobody is there to hear a broadcast; it is kept with what found no way.
            Err(Refusal::Unroutable) if matches!(one.onward, Onward::Forward(Target::Broadcast, _)) => {
                shared.keep_unrouted(outgoing(core, &one.held, &one.onward)).await
            }
            fate => fate,
        };
        match fate {
            Ok(()) => moved.push(one),
            Err(why) => {
                refusal.get_or_insert_with(|| (why, outgoing(core, &one.held, &one.onward)));
                back.push(with_its_id(shared, one));
            }
        }
    }
    if !back.is_empty() {
        core.return_failed(back);
    }
    core.about_to_acknowledge(moved.iter().map(|one| one.held.place));
    // First this, as it makes room for more.
    let acked = acknowledge(moved.iter().map(|one| &one.held));
    for one in &moved {
        note_moved(core, one);
    }
    match refusal {
        Some((why, outgoing)) => {
            let target = target_of(&outgoing);
            if matches!(why, Refusal::Unroutable) {
                let (shared, client) = (Arc::clone(shared), core.client.clone());
                let restore = async move { shared.restore(&outgoing, client.as_deref()).await };
                // Once it ends, one way or the other.
                let _ = core.shared.thread.spawn(restore).await;
            }
            Err(refused(action, &why, &target))
        }
        None if acked => Ok(()),
        None => Err(unavailable(action)),
    }
}

/// What could not go on, or is not known to have. Where its sender gave it no id it keeps the one that it was given.
fn with_its_id(shared: &Shared, one: Move) -> Held {
    let mut held = one.held;
    if let (Payload::Foreign(foreign), Onward::Forward(_, message)) = (&mut held.payload, &one.onward)
        && !message.own_id
    {
        shared.memory.note_id(held.key, message.id.as_str());
        foreign.message_id = Some(message.id.as_str().to_owned());
    }
    held
}

/// Where a message was to go, for people.
fn target_of(outgoing: &Outgoing) -> String {
    match outgoing.exchange.as_str() {
        "" => outgoing.key.to_string(),
        exchange => exchange.to_owned(),
    }
}

/// Why something was not published, as an error.
pub(super) fn refused(action: &str, why: &Refusal, target: &str) -> BrokerError {
    match why {
        Refusal::Unroutable => unavailable(format!("{action}: nothing was behind {target:?}; it is declared again")),
        Refusal::Refused => unavailable(format!("{action}: RabbitMQ refused a message for {target:?}")),
        Refusal::Lost(error) => unavailable(format!("{action}: {error}")),
        Refusal::Closed => BrokerError::new(BrokerErrorKind::Closed, action),
    }
}

/// Acknowledges deliveries. False when a channel is gone that some came on.
pub(super) fn acknowledge(held: impl IntoIterator<Item: Borrow<Held>>) -> bool {
    // Each channel is told, whatever became of the others.
    by_channel(held).into_iter().fold(true, |all, (channel, tags)| channel.ack(&tags) && all)
}

fn by_channel(held: impl IntoIterator<Item: Borrow<Held>>) -> Vec<(Arc<IntakeChannel>, Vec<u64>)> {
    let mut channels: Vec<(Arc<IntakeChannel>, Vec<u64>)> = Vec::with_capacity(1);
    for held in held {
        let held = held.borrow();
        match channels.iter_mut().find(|(channel, _)| Arc::ptr_eq(channel, &held.channel)) {
            Some((_, tags)) => tags.push(held.tag),
            None => channels.push((Arc::clone(&held.channel), vec![held.tag])),
        }
    }
    channels
}

/// Acknowledges what was handed over, and waits until that has left for RabbitMQ.
pub(super) async fn acknowledge_and_flush(shared: &Shared, held: Vec<Held>) -> Result<(), lapin::Error> {
    shared.memory.note_gone(held.iter().map(|held| held.key));
    for (channel, tags) in by_channel(held) {
        channel.ack_and_flush(&tags).await?;
    }
    Ok(())
}

/// Counts and traces what receivers have settled, and remembers it.
pub(super) fn note_delivered(shared: &Shared, client: &ClientId, held: &[Held]) {
    shared.memory.note_gone(held.iter().map(|held| held.key));
    shared.telemetry.metrics.delivered.inc_by(held.len() as u64);
    // Latencies and rates come from it as well, whether or not ways are kept.
    for message in held.iter().filter_map(|held| held.payload.message()) {
        shared.telemetry.traces.record(message, Step::Delivered(client.clone()));
    }
}

fn note_moved(core: &ConsumerCore, one: &Move) {
    let shared = &core.shared;
    if let Onward::Forward(_, message) = &one.onward
        && matches!(one.held.payload, Payload::Foreign(_))
    {
        shared.telemetry.metrics.accepted.inc();
        shared.telemetry.traces.record(message, Step::Accepted);
    }
    match &one.onward {
        Onward::Forward(Target::Publish, message) => shared.telemetry.traces.record(message, Step::Forwarded),
        Onward::Forward(target, message) => {
            shared.telemetry.traces.record(message, Step::Published);
            note_routed(shared, *target, message);
        }
        Onward::Delay { .. } => {}
        Onward::Dead { reason, .. } => {
            if let Some((client, _)) = origin(&core.queue) {
                note_dead(shared, client, *reason, &one.held.payload);
            }
        }
    }
}

/// Counts and traces a dead letter.
pub(super) fn note_dead(shared: &Shared, client: &ClientId, reason: DeadReason, payload: &Payload) {
    shared.telemetry.metrics.dead(reason).inc();
    if let Some(message) = payload.message().filter(|_| shared.telemetry.traces.is_on()) {
        shared.telemetry.traces.record(message, Step::Dead(client.clone(), reason));
    }
}

/// Counts and traces where a message landed, as far as this router knows the bindings.
fn note_routed(shared: &Shared, target: Target, message: &SharedMessage) {
    let (metrics, traces) = (&shared.telemetry.metrics, &shared.telemetry.traces);
    let topic = match (target, &message.topic) {
        (Target::Topic, Some(topic)) => topic,
        (Target::Topic, None) => return,
        (Target::Publish | Target::Broadcast, _) => {
            let (count, first) = shared.clients.first(if traces.is_on() { ROUTED_KEPT } else { 0 });
            metrics.routed.inc_by(count as u64);
            return traces.record_routed(message, count, first.into_iter().map(|id| (id, None)));
        }
    };
    let (count, first) = shared.clients.matching(topic.as_str(), if traces.is_on() { ROUTED_KEPT } else { 0 });
    metrics.routed.inc_by(count as u64);
    if count == 0 {
        metrics.unrouted.inc();
        traces.record(message, Step::Unrouted);
    } else {
        traces.record_routed(message, count, first.into_iter().map(|(client, pattern)| (client, Some(pattern))));
    }
}

/// Lets a delivery pass, or deals with one that is for nobody: what is no message in an inbox, or has waited too long,
/// becomes a dead letter; what its receiver has settled, or was delayed for an earlier client of the same name, is dropped.
pub(super) fn admit(shared: &Arc<Shared>, queue: &Queue, held: Held) -> Option<Held> {
    let Queue::Inbox(id) = queue else { return Some(held) };
    let Some(client) = shared.clients.get(id) else {
        // Nobody's any more; but RabbitMQ counts it as outstanding on its channel.
        shared.give_back(&held);
        return None;
    };
    if held.is_gone || client.is_of_another(held.counts) {
        acknowledge(vec![held]);
        return None;
    }
    let reason = match held.payload {
        Payload::Message(_) if !limits::is_expired(&client, &held) => return Some(held),
        Payload::Message(_) => DeadReason::Expired,
        Payload::Foreign(_) => DeadReason::InvalidMessage,
    };
    let (task, attempts) = (Arc::clone(shared), held.counts.attempts);
    shared.thread.spawn(async move {
        if let Err(error) = bury(&task, &client.id, vec![(held, attempts)], reason).await {
            log::warn!("what should be a dead letter stays in the inbox of {} for now: {error}", client.id);
        }
    });
    None
}

/// Makes dead letters of what is held of a client's inbox, with the attempts made; what cannot be is given back.
pub(super) async fn bury(
    shared: &Arc<Shared>,
    client: &ClientId,
    held: Vec<(Held, u32)>,
    reason: DeadReason,
) -> Result<u64, BrokerError> {
    let user = shared.user();
    let letter =
        |(held, attempts): &(Held, u32)| dead_letter(client, Origin::Inbox, reason, *attempts, &held.payload, user);
    let messages: Vec<Outgoing> = held.iter().map(letter).collect();
    let held = held.into_iter().map(|(held, _)| held).collect();
    let (gone, refusal) = publish_held(shared, client, held, messages).await;
    gone.iter().for_each(|held| note_dead(shared, client, reason, &held.payload));
    let count = gone.len() as u64;
    acknowledge(gone);
    match refusal {
        Some(why) => {
            if matches!(why, Refusal::Unroutable) {
                shared.repair(shared.clients.get(client).as_deref()).await;
            }
            Err(refused(&format!("make dead letters of {client}"), &why, &topology::dead(client)))
        }
        None => Ok(count),
    }
}

/// Publishes what is made of deliveries of a client's inbox. Returns those that went on, to be acknowledged; what could
/// not is given back, with why the last of it could not.
pub(super) async fn publish_held(
    shared: &Shared,
    client: &ClientId,
    held: Vec<Held>,
    messages: Vec<Outgoing>,
) -> (Vec<Held>, Option<Refusal>) {
    let fates = shared.publish_on(shared.relay(&topology::inbox(client)), messages).await;
    let (mut gone, mut refusal) = (Vec::with_capacity(held.len()), None);
    for (held, fate) in held.into_iter().zip(fates) {
        match fate {
            Ok(()) => gone.push(held),
            Err(why) => {
                refusal = Some(why);
                shared.give_back(&held);
            }
        }
    }
    (gone, refusal)
}

impl Shared {
    /// Declares again what a message was published to in vain: somebody else has deleted it.
    async fn restore(&self, outgoing: &Outgoing, client: Option<&super::clients::Client>) {
        let is_retry = topology::is_retry(outgoing.exchange.as_str());
        if is_retry && let Ok(session) = self.session("declare a retry queue again") {
            // It is declared before the next one is delayed.
            return session.forget_retries();
        }
        if outgoing.exchange.as_str().is_empty() && outgoing.key.as_str() == topology::PUBLISH {
            return self.restore_queue(&Queue::Publish).await;
        }
        let is_internal = !outgoing.exchange.as_str().is_empty();
        log::warn!("queue {} was deleted by somebody else; it is declared again", target_of(outgoing));
        self.repair(client.filter(|_| !is_internal)).await;
    }

    /// Sees to it that retry queues are there, and notes what is about to be delayed for a client.
    pub(super) async fn prepare_delays(
        &self,
        client: Option<&super::clients::Client>,
        delays: BTreeMap<u64, u64>,
    ) -> Result<(), BrokerError> {
        if delays.is_empty() {
            return Ok(());
        }
        let session = self.session("delay messages")?;
        for seconds in delays.keys() {
            self.retry_queue(&session, *seconds).await?;
        }
        let Some(client) = client else { return Ok(()) };
        let now_s = Timestamp::now().as_millis().div_euclid(1000) + 1;
        let due: BTreeMap<i64, u64> =
            delays.into_iter().map(|(seconds, messages)| (now_s.saturating_add_unsigned(seconds), messages)).collect();
        client.add_delayed(&due);
        let noted = super::state::note_delayed(&self.db, &client.id, due).await;
        noted.map_err(|error| db_error(format!("note what is delayed for {}", client.id), error))
    }
}
