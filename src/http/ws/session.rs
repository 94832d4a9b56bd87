//! One connection, from its first frame to its close.
//!
//! One task does everything: it reads frames while there is room for what they ask, publishes in order, settles in order,
//! takes deliveries while the client has credit and the peer reads, and looks once a second whether peer and client are
//! still there. Deliveries that are unsettled when it ends go back to the inbox.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use actix_ws::{AggregatedMessage, AggregatedMessageStream, ProtocolError};
use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::LocalBoxFuture;
use serde_json::value::RawValue;

use super::frame::{self, Frame, How, Refused};
use super::intake::{Intake, Stop};
use super::outgoing::{CloseCode, Outgoing};
use super::publishing::{Publishing, Waiting};
use super::{PING_AFTER, Place, SILENCE_MAX, UNSETTLED_BYTES, UNSETTLED_BYTES_ALL, UNSETTLED_BYTES_SCARCE};
use crate::broker::{self, Consumer, Delivery, Health, Outcome, Queue};
use crate::directory::ClientEntry;
use crate::http::batch::{Batch, Checked};
use crate::http::error::{Code, Problem};
use crate::http::route::Call;
use crate::http::send::CHECK_APART_BYTES;
use crate::intake::Kind;
use crate::time::Timestamp;

/// How often the session looks whether peer and client are still there.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long the last bytes, and what waits for the broker, have at the end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a settlement may take.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(30);

/// Frames with settlements that wait for the broker, and their bytes: a connection with more is not read from.
const SETTLING_MAX: usize = 64;
const SETTLING_BYTES_MAX: usize = 1 << 20;

/// Frames handled before the other sides get a turn.
const FRAMES_AT_ONCE: usize = 64;

/// Deliveries taken at once.
const DELIVERIES_AT_ONCE: usize = 256;

/// How long a message is thought to be before the first, in bytes: careful with memory until it is known.
const MESSAGE_BYTES_GUESSED: usize = 16 << 10;

/// Why a session ends.
enum End {
    /// With a close frame.
    Close(CloseCode, &'static str),
    /// The peer is gone: there is no one to tell.
    Gone,
}

/// What a settlement came to.
struct Settled {
    reference: Option<Box<RawValue>>,
    count: usize,
    unknown: Vec<String>,
    /// Bytes of messages that it held.
    held_bytes: usize,
    result: Result<(), Problem>,
}

/// Settlements, each with the length of its frame; only the first is under way, so that they are carried out in order.
type Settling = VecDeque<(usize, LocalBoxFuture<'static, Settled>)>;

/// See the module.
pub(super) struct Session {
    call: Call,
    client: std::sync::Arc<ClientEntry>,
    request_id: String,
    intake: Intake,
    outgoing: Outgoing,
    publishing: Publishing,
    settling: Settling,
    /// By number, which is what the receipt names; oldest first. Dropped before its consumer, which takes it along.
    unsettled: BTreeMap<u64, (Delivery, usize)>,
    unsettled_bytes: usize,
    inbox: Option<Consumer>,
    credit: u32,
    /// The prefetch that the inbox's consumer has.
    prefetch: u32,
    /// Length of recent messages, about.
    message_bytes: usize,
    next_receipt: u64,
    /// Tells this connection's receipts from those of others.
    nonce: u64,
    heard: Instant,
    pinged: bool,
    _place: Place,
}

impl Session {
    pub(super) fn new(
        call: Call,
        client: std::sync::Arc<ClientEntry>,
        request_id: String,
        place: Place,
        intake: Intake,
        outgoing: Outgoing,
    ) -> Self {
        let broker = std::sync::Arc::clone(&call.api.state.broker);
        let publishing = Publishing::new(broker, client.record.client_id.clone());
        call.api.state.telemetry.metrics.websockets.inc();
        Self {
            call,
            client,
            request_id,
            intake,
            outgoing,
            publishing,
            settling: VecDeque::new(),
            unsettled: BTreeMap::new(),
            unsettled_bytes: 0,
            inbox: None,
            credit: 0,
            prefetch: 0,
            message_bytes: MESSAGE_BYTES_GUESSED,
            next_receipt: 0,
            nonce: rand::random(),
            heard: Instant::now(),
            pinged: false,
            _place: place,
        }
    }

    /// Serves the connection until it ends.
    pub(super) async fn run(mut self, mut incoming: AggregatedMessageStream) {
        let end = self.serve(&mut incoming).await;
        if !matches!(end, End::Close(CloseCode::GoingAway, _)) {
            self.publishing.abandon();
        }
        // What it settled before it went is settled; what cannot be comes back.
        let settle_the_rest = async {
            while !self.settling.is_empty() {
                let settled = first(&mut self.settling).await;
                self.note_settled(settled);
            }
        };
        if tokio::time::timeout(SETTLE_TIMEOUT, settle_the_rest).await.is_err() {
            self.settling.clear();
        }
        // Before its consumer ends: what comes back to that goes back to the inbox in one piece, in order.
        self.give_all_back().await;
        self.inbox = None;
        if let End::Close(code, why) = end {
            // Whoever was told "accepted" late was told: the answers that are under way go out before the close.
            let last_words = async {
                if code == CloseCode::GoingAway {
                    while !self.publishing.is_idle() {
                        let done = self.publishing.next().await;
                        done.answer(&mut self.outgoing, &self.request_id);
                    }
                }
                self.outgoing.close(code, why);
                while !self.outgoing.is_empty() && self.outgoing.flush().await {}
            };
            // A peer that does not read its close frame in time closes without.
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, last_words).await;
        }
    }

    async fn serve(&mut self, incoming: &mut AggregatedMessageStream) -> End {
        let mut shutdown = self.call.api.state.shutdown.clone();
        let mut look = tokio::time::interval(LOOK_EVERY);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let reads = self.has_room() && self.outgoing.has_room();
            let takes = self.takes();
            let end = tokio::select! {
                _ = shutdown.wait_for(|closing| *closing) => Some(End::Close(CloseCode::GoingAway, "shutting down")),
                _ = look.tick() => self.look(),
                frame = incoming.recv(), if reads => self.hear_all(frame, incoming).await,
                done = self.publishing.next() => {
                    if let Some(cause) = done.cause() {
                        log::error!("publish for {} failed: {cause} (request {})", self.name(), self.request_id);
                    }
                    done.answer(&mut self.outgoing, &self.request_id);
                    None
                }
                settled = first(&mut self.settling) => {
                    self.note_settled(settled);
                    None
                }
                deliveries = next(&mut self.inbox, takes), if takes > 0 => self.deliver(deliveries),
                there = self.outgoing.flush(), if !self.outgoing.is_empty() => (!there).then_some(End::Gone),
            };
            if let Some(end) = end {
                return end;
            }
        }
    }

    /// Whether the broker is not too far behind to be asked for more.
    fn has_room(&self) -> bool {
        let settling_bytes: usize = self.settling.iter().map(|(bytes, _)| bytes).sum();
        self.publishing.has_room() && self.settling.len() < SETTLING_MAX && settling_bytes < SETTLING_BYTES_MAX
    }

    fn name(&self) -> &str {
        self.client.record.client_id.as_str()
    }

    // ---- the peer and the client

    /// Once a second: is the peer there, is the client what it was?
    fn look(&mut self) -> Option<End> {
        if !self.has_room() {
            // It is not read from because the broker is behind: what it may be saying is not silence.
            self.heard = Instant::now();
        }
        let silent = self.heard.max(self.intake.heard()).elapsed();
        if silent > SILENCE_MAX {
            return Some(End::Gone);
        }
        if silent > PING_AFTER && !self.pinged {
            self.outgoing.ping();
            self.pinged = true;
        }
        if let Some(end) = self.refresh() {
            return Some(end);
        }
        if self.inbox.is_some() && self.client.record.is_pushed() {
            self.stop_reading();
        }
        None
    }

    /// The client as it is now; an end when it is not the one that connected.
    fn refresh(&mut self) -> Option<End> {
        match self.call.api.state.directory.get(self.name()) {
            Some(entry) if entry.incarnation == self.client.incarnation => {
                self.client = entry;
                None
            }
            _ => Some(End::Close(CloseCode::Policy, "the client was deleted")),
        }
    }

    /// A webhook was set: the inbox is the pusher's now.
    fn stop_reading(&mut self) {
        self.inbox = None;
        self.credit = 0;
        self.refuse(None, &Problem::new(Code::WebhookConfigured, "a webhook is set now: the inbox is pushed to it"));
    }

    // ---- frames

    async fn hear_all(
        &mut self,
        first: Option<Result<AggregatedMessage, ProtocolError>>,
        incoming: &mut AggregatedMessageStream,
    ) -> Option<End> {
        if let Some(end) = self.refresh() {
            return Some(end);
        }
        if let Some(end) = self.hear(first).await {
            return Some(end);
        }
        for _ in 1..FRAMES_AT_ONCE {
            // What has arrived already is handled at once: its sends then share a commit.
            if !self.has_room() || !self.outgoing.has_room() {
                break;
            }
            let Some(next) = incoming.recv().now_or_never() else { break };
            if let Some(end) = self.hear(next).await {
                return Some(end);
            }
        }
        None
    }

    async fn hear(&mut self, message: Option<Result<AggregatedMessage, ProtocolError>>) -> Option<End> {
        self.heard = Instant::now();
        self.pinged = false;
        let Some(message) = message else { return Some(End::Gone) };
        match message {
            Ok(AggregatedMessage::Text(text)) => {
                let room = self.intake.take_room();
                let text: Bytes = text.into_bytes();
                match self.obey(&text, room).await {
                    Ok(()) => {}
                    Err(Refused { reference, problem }) => self.refuse(reference.as_deref(), &problem),
                }
                None
            }
            Ok(AggregatedMessage::Binary(_)) => {
                drop(self.intake.take_room());
                self.refuse(
                    None,
                    &Problem::new(Code::UnsupportedMediaType, "send text frames: each is one JSON object"),
                );
                None
            }
            Ok(AggregatedMessage::Ping(payload)) => {
                self.outgoing.pong(&payload);
                None
            }
            Ok(AggregatedMessage::Pong(_)) => None,
            Ok(AggregatedMessage::Close(_)) => Some(End::Close(CloseCode::Normal, "")),
            Err(error) => Some(broken(&error)),
        }
    }

    /// Carries out a frame.
    async fn obey(&mut self, text: &Bytes, room: Option<crate::http::budget::BodyRoom>) -> Result<(), Refused> {
        let (reference, frame) = frame::read(
            std::str::from_utf8(text)
                .map_err(|_| Refused { reference: None, problem: Problem::invalid_json("the frame is not UTF-8") })?,
        )?;
        match frame {
            Frame::Publish { kind, several, traceparent } => {
                match self.check(kind, text, several.as_deref(), traceparent).await {
                    Ok((checked, permit)) => {
                        let bytes = text.len();
                        self.publishing.push(Waiting { reference, kind, checked, bytes, room, permit });
                        Ok(())
                    }
                    Err(problem) => Err(Refused { reference, problem }),
                }
            }
            Frame::Credit(credit) => self.credit(credit).await.map_err(|problem| Refused { reference, problem }),
            Frame::Settle { receipts, how } => {
                self.settle(reference, receipts, how, text.len());
                Ok(())
            }
        }
    }

    fn refuse(&mut self, reference: Option<&RawValue>, problem: &Problem) {
        if let Some(cause) = problem.cause() {
            log::error!("a frame of {} failed: {cause} (request {})", self.name(), self.request_id);
        }
        self.outgoing.error(reference, problem, &self.request_id);
    }

    /// Checks a send as `POST /send` does.
    async fn check(
        &self,
        kind: Kind,
        text: &Bytes,
        several: Option<&RawValue>,
        traceparent: Option<Box<str>>,
    ) -> Result<(Checked, crate::directory::SendPermit), Problem> {
        self.call.api.refuse_when_closing()?;
        if let Health::Unreachable(_) = self.call.api.state.broker.health() {
            return Err(Problem::broker_unavailable());
        }
        let message_bytes_max = self.call.api.state.config.max_message_bytes;
        let sender = self.client.record.client_id.clone();
        let mut batch = Batch::new(sender, kind, Timestamp::now(), traceparent, message_bytes_max);
        let json = match several {
            Some(several) => {
                batch.is_under("/messages");
                Bytes::copy_from_slice(several.get().as_bytes())
            }
            None => text.clone(),
        };
        let length = json.len();
        let check = move || batch.json(&json).and_then(|()| batch.finish());
        let checked = if length < CHECK_APART_BYTES {
            check()?
        } else {
            // Off this thread, where it would hold up other calls.
            actix_web::web::block(check).await.map_err(|_| Problem::internal("the blocking pool dropped a check"))??
        };
        if let Some(limiter) = &self.client.send_limiter {
            let over = |wait| Problem::rate_limited(format!("more than {} messages a second", limiter.per_s()), wait);
            limiter.take(checked.messages.len()).map_err(over)?;
        }
        let permit = self.client.gate.enter();
        Ok((checked, permit.ok_or_else(|| Problem::forbidden("the client is being deleted"))?))
    }

    // ---- receiving

    async fn credit(&mut self, credit: u32) -> Result<(), Problem> {
        if self.client.record.is_pushed() {
            let why = "a webhook is set: the inbox is pushed to it; remove it, or switch it off, to read here";
            return Err(Problem::new(Code::WebhookConfigured, why));
        }
        self.credit = credit;
        let prefetch = self.wanted_prefetch();
        match &self.inbox {
            Some(inbox) => inbox.set_prefetch(prefetch),
            None => {
                let queue = Queue::Inbox(self.client.record.client_id.clone());
                self.inbox = Some(self.call.api.state.broker.consume(&queue, prefetch).await?);
            }
        }
        self.prefetch = prefetch;
        Ok(())
    }

    /// The credit, as far as memory carries it: a broker hands that many messages over at once.
    fn wanted_prefetch(&self) -> u32 {
        let fits = UNSETTLED_BYTES / self.message_bytes.max(1);
        self.credit.min(u32::try_from(fits).unwrap_or(u32::MAX)).max(1)
    }

    /// How many deliveries may be taken now.
    fn takes(&self) -> usize {
        if self.inbox.is_none() || !self.outgoing.has_room() {
            return 0;
        }
        let all = self.call.api.sockets.unsettled_bytes.load(Ordering::Relaxed);
        let limit = if all < UNSETTLED_BYTES_ALL { UNSETTLED_BYTES } else { UNSETTLED_BYTES_SCARCE };
        if self.unsettled_bytes >= limit {
            return 0;
        }
        let credit = (self.credit as usize).saturating_sub(self.unsettled.len());
        let fits = (self.outgoing.room() / self.message_bytes.max(1)).max(1);
        credit.min(fits).min(DELIVERIES_AT_ONCE)
    }

    fn deliver(&mut self, deliveries: Option<Vec<Delivery>>) -> Option<End> {
        let Some(deliveries) = deliveries else {
            // The inbox is gone, or the broker is closing.
            self.inbox = None;
            return self.refresh().or(Some(End::Close(CloseCode::GoingAway, "the inbox is closed")));
        };
        for delivery in deliveries {
            let bytes = delivery.payload.message().map_or(0, |message| message.size());
            self.next_receipt += 1;
            let receipt = self.receipt(self.next_receipt);
            if !self.outgoing.message(&delivery, &receipt) {
                log::error!("the inbox of {} holds what is no message; it is left there", self.name());
                continue;
            }
            self.message_bytes = (self.message_bytes * 7 + bytes) / 8;
            self.unsettled.insert(self.next_receipt, (delivery, bytes));
            self.hold(bytes);
        }
        let wanted = self.wanted_prefetch();
        // Messages vary in length; only what makes a difference is worth telling the broker.
        if (wanted > self.prefetch.saturating_mul(2) || wanted < self.prefetch / 2)
            && let Some(inbox) = &self.inbox
        {
            inbox.set_prefetch(wanted);
            self.prefetch = wanted;
        }
        None
    }

    fn receipt(&self, number: u64) -> String {
        format!("{:016x}-{number:x}", self.nonce)
    }

    /// The number of a receipt that this connection gave.
    fn number(&self, receipt: &str) -> Option<u64> {
        let (nonce, number) = receipt.split_once('-')?;
        let own = nonce.len() == 16 && u64::from_str_radix(nonce, 16).ok()? == self.nonce;
        let number = u64::from_str_radix(number, 16).ok()?;
        // One delivery, one receipt: no other spelling of it.
        (own && self.receipt(number) == receipt).then_some(number)
    }

    /// Takes a frame's receipts, to be settled after those of the frames before.
    fn settle(&mut self, reference: Option<Box<RawValue>>, receipts: Vec<String>, how: How, frame_bytes: usize) {
        let (mut known, mut unknown, mut held_bytes) = (Vec::with_capacity(receipts.len()), Vec::new(), 0);
        for receipt in receipts {
            match self.number(&receipt).and_then(|number| self.unsettled.remove(&number)) {
                Some((delivery, bytes)) => {
                    held_bytes += bytes;
                    let outcome = how.outcome(&delivery);
                    known.push((delivery, outcome));
                }
                None => unknown.push(receipt),
            }
        }
        let work = async move {
            let count = known.len();
            let result = match tokio::time::timeout(SETTLE_TIMEOUT, broker::settle(known)).await {
                Ok(result) => result.map_err(Problem::from),
                Err(_) => Err(Problem::broker_unavailable()),
            };
            Settled { reference, count, unknown, held_bytes, result }
        };
        self.settling.push_back((frame_bytes, Box::pin(work)));
    }

    /// Tells the client what became of the first of its settlements.
    fn note_settled(&mut self, settled: Settled) {
        self.settling.pop_front();
        self.let_go(settled.held_bytes);
        match settled.result {
            Ok(()) => self.outgoing.settled(settled.reference.as_deref(), settled.count, &settled.unknown),
            Err(problem) => self.refuse(settled.reference.as_deref(), &problem),
        }
    }

    fn hold(&mut self, bytes: usize) {
        self.unsettled_bytes += bytes;
        self.call.api.sockets.unsettled_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn let_go(&mut self, bytes: usize) {
        self.unsettled_bytes -= bytes;
        self.call.api.sockets.unsettled_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Gives back what is unsettled, all at once, so that whoever reads next sees it in order.
    async fn give_all_back(&mut self) {
        let unsettled = std::mem::take(&mut self.unsettled);
        let bytes = unsettled.values().map(|(_, bytes)| bytes).sum();
        let all = unsettled.into_values().map(|(delivery, _)| (delivery, Outcome::Requeue)).collect();
        // What cannot be given back so comes back by itself (G2).
        if let Ok(Err(error)) = tokio::time::timeout(SETTLE_TIMEOUT, broker::settle(all)).await {
            log::debug!("deliveries of {} come back by themselves: {error}", self.name());
        }
        self.let_go(bytes);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // A task that is dropped halfway drops its deliveries, which gives them back one by one.
        self.let_go(self.unsettled_bytes);
        self.call.api.state.telemetry.metrics.websockets.dec();
    }
}

/// The end of the first settlement, for ever when there is none. Safe to drop: the settlement is kept.
async fn first(settling: &mut Settling) -> Settled {
    match settling.front_mut() {
        Some((_, work)) => work.await,
        None => std::future::pending().await,
    }
}

/// The next deliveries, for ever when there is no inbox.
async fn next(inbox: &mut Option<Consumer>, max: usize) -> Option<Vec<Delivery>> {
    match inbox {
        Some(inbox) => inbox.next(max.max(1)).await,
        None => std::future::pending().await,
    }
}

/// How a connection ends whose bytes cannot be read.
fn broken(error: &ProtocolError) -> End {
    match error {
        ProtocolError::Overflow => End::Close(CloseCode::TooBig, "the frame is too long"),
        ProtocolError::Io(error) => match (Stop::of(error), error.kind()) {
            (Some(Stop::TooLong), _) => End::Close(CloseCode::TooBig, "the frame is too long"),
            (Some(Stop::TooSlow), _) => End::Close(CloseCode::TryLater, "the frame came too slowly"),
            (Some(Stop::NoRoom), _) => End::Close(CloseCode::TryLater, "too many large frames at once"),
            (None, std::io::ErrorKind::InvalidData) => {
                End::Close(CloseCode::NotUtf8, "not UTF-8, or reserved bits are set")
            }
            (None, std::io::ErrorKind::Other)
                if error.get_ref().is_some_and(|e| e.to_string().starts_with("Exceeded")) =>
            {
                End::Close(CloseCode::TooBig, "the message is too long")
            }
            (None, _) => End::Gone,
        },
        _ => End::Close(CloseCode::ProtocolError, "not the WebSocket protocol"),
    }
}
