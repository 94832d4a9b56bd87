//! How messages look on RabbitMQ. Pure.
//!
//! The body is the envelope, so that a client reads its inbox by AMQP as it does by HTTP. What the envelope does not
//! say is in the properties: `type` tells a message of the backbone and whether its sender chose the id, headers carry
//! the trace context and the counts. Every hop publishes with properties made here: nothing that a client put into
//! its own is carried on.
//!
//! # Trust
//! In an outbox or notify queue a message counts as the backbone's own only when its `user_id` is the backbone's user:
//! RabbitMQ lets nobody set that property to a user other than its own. Anything else is [`Foreign`]. Clients that log
//! in as the backbone's own user could forge it, as they could write to any queue.

use std::borrow::Cow;

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use crate::broker::{DeadLetter, DeadReason, Foreign, Origin, Payload};
use crate::client::{BACKBONE_SENDER, ClientId};
use crate::envelope::{Message, MessageId};
use crate::intake::TRACEPARENT_BYTES_MAX;
use crate::time::Timestamp;
use crate::topic::Topic;

/// `type` of a message whose id the backbone gave.
const KIND: &str = "soar";
/// `type` of a message whose id its sender chose.
const KIND_OWN_ID: &str = "soar.own-id";
/// `type` of a dead letter that could not be read: the body is what the client sent.
const KIND_RAW: &str = "soar.raw";

/// W3C trace context.
const TRACEPARENT: &str = "traceparent";
/// Delivery attempts made, noted by the last delay.
const ATTEMPTS: &str = "soar-attempts";
/// Deliveries made before it was published here.
const DELIVERIES: &str = "soar-deliveries";
/// When it was delayed, in milliseconds since the epoch.
const DELAYED_AT: &str = "soar-delayed-at";
/// A dead letter's own id.
const DEAD_ID: &str = "soar-dead-id";
/// Why it died.
const DEAD_REASON: &str = "soar-reason";
/// The queue in which it died.
const DEAD_ORIGIN: &str = "soar-origin";
/// When it died, in milliseconds since the epoch.
const DEAD_AT: &str = "soar-died-at";
/// How often a quorum queue returned it to the queue.
const DELIVERY_COUNT: &str = "x-delivery-count";
/// The same since RabbitMQ 4, returns that were nobody's fault included.
const ACQUIRED_COUNT: &str = "x-acquired-count";

/// RabbitMQ's `delivery_mode` of a persistent message.
const PERSISTENT: u8 = 2;

/// What a copy carries besides the message.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Attempts noted by the last delay.
    pub(super) attempts: u32,
    /// Times it was handed out.
    pub(super) deliveries: u32,
    /// Since when it waits in its inbox, in seconds since the epoch.
    pub(super) since_s: u64,
    /// When it was delayed, in milliseconds since the epoch; 0 when it was not.
    pub(super) delayed_at_ms: i64,
}

impl Counts {
    /// Of a message that is new where it is put.
    pub(super) fn fresh() -> Self {
        Self { since_s: now_s(), ..Self::default() }
    }
}

/// What was read from a queue.
#[derive(Debug, Clone)]
pub(super) struct Read {
    /// The message, or what is not one.
    pub(super) payload: Payload,
    /// What it carries.
    pub(super) counts: Counts,
    /// How often the broker says that it came back, where it says so.
    pub(super) returned: Option<u32>,
}

/// The present in seconds since the epoch, the resolution of the property `timestamp`.
pub(super) fn now_s() -> u64 {
    u64::try_from(Timestamp::now().as_millis() / 1000).unwrap_or(0)
}

/// A text as a short string, cut off at the 255 bytes that one holds.
pub(super) fn short(text: &str) -> ShortString {
    ShortString::try_new(text).unwrap_or_else(|_| {
        let end = (0..=255).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        ShortString::from(&text[..end])
    })
}

/// The properties under which a payload is published. `user` is the backbone's own, where it is known.
pub(super) fn properties(payload: &Payload, counts: Counts, user: Option<&str>) -> BasicProperties {
    let mut properties = BasicProperties::default().with_delivery_mode(PERSISTENT).with_timestamp(counts.since_s);
    let mut headers = FieldTable::default();
    let traceparent = match payload {
        Payload::Message(message) => {
            let kind = if message.own_id { KIND_OWN_ID } else { KIND };
            properties = properties
                .with_content_type(short("application/json"))
                .with_message_id(short(message.id.as_str()))
                .with_type(short(kind));
            if let Some(user) = user {
                properties = properties.with_user_id(short(user));
            }
            message.traceparent.as_deref()
        }
        Payload::Foreign(foreign) => {
            if let Some(id) = &foreign.message_id {
                properties = properties.with_message_id(short(id));
            }
            foreign.traceparent.as_deref()
        }
    };
    if let Some(traceparent) = traceparent {
        headers.insert(short(TRACEPARENT), AMQPValue::LongString(traceparent.into()));
    }
    for (name, count) in [(ATTEMPTS, counts.attempts), (DELIVERIES, counts.deliveries)] {
        if count > 0 {
            headers.insert(short(name), AMQPValue::LongLongInt(i64::from(count)));
        }
    }
    if counts.delayed_at_ms > 0 {
        headers.insert(short(DELAYED_AT), AMQPValue::LongLongInt(counts.delayed_at_ms));
    }
    if headers.inner().is_empty() { properties } else { properties.with_headers(headers) }
}

/// The body of a payload.
pub(super) fn body(payload: &Payload) -> Bytes {
    match payload {
        Payload::Message(message) => message.envelope.clone(),
        Payload::Foreign(foreign) => foreign.body.clone(),
    }
}

/// Reads what came out of a queue. `trusted` is the user that a message of the backbone must name, in queues that
/// clients may write to; `None` where they may not.
pub(super) fn read(properties: &BasicProperties, body: Vec<u8>, trusted: Option<&Trusted>) -> Read {
    let headers = properties.headers().as_ref();
    let integer = |name: &str| headers.and_then(|headers| headers.inner().get(name)).and_then(as_integer);
    let count = |name: &str| integer(name).and_then(|n| u32::try_from(n).ok());
    let counts = Counts {
        attempts: count(ATTEMPTS).unwrap_or(0),
        deliveries: count(DELIVERIES).unwrap_or(0),
        since_s: properties.timestamp().unwrap_or_else(now_s),
        delayed_at_ms: integer(DELAYED_AT).unwrap_or(0),
    };
    let returned = count(ACQUIRED_COUNT).max(count(DELIVERY_COUNT));
    let body = Bytes::from(body);
    let traceparent = headers.and_then(|headers| headers.inner().get(TRACEPARENT)).and_then(as_text);
    // Anybody can put anything there, and it goes on with what the backbone adds: together they must fit into a frame.
    let traceparent = traceparent.filter(|text| text.len() <= TRACEPARENT_BYTES_MAX);
    let is_own = trusted.is_none_or(|trusted| trusted.names(properties));
    let kind = properties.kind().as_ref().map(ShortString::as_str);
    let own_id = match kind {
        Some(KIND) => Some(false),
        Some(KIND_OWN_ID) => Some(true),
        _ => None,
    };
    let message = own_id.filter(|_| is_own).and_then(|own_id| message(&body, own_id, traceparent.clone()));
    let payload = match message {
        Some(message) => Payload::Message(message.into()),
        None => Payload::Foreign(Foreign {
            body,
            message_id: properties.message_id().as_ref().map(ToString::to_string),
            traceparent: traceparent.map(Into::into),
        }),
    };
    // A client could set the counts of what it sends itself; they are only believed of the backbone's own.
    let counts = if matches!(payload, Payload::Message(_)) { counts } else { Counts::fresh() };
    Read { payload, counts, returned }
}

/// Whom to believe in a queue that clients may write to.
#[derive(Debug, Clone)]
pub(super) enum Trusted {
    /// Messages under this user.
    User(Box<str>),
    /// None: the backbone's user is not known, because it does not log in by name.
    Nobody,
}

impl Trusted {
    fn names(&self, properties: &BasicProperties) -> bool {
        match self {
            Self::User(user) => properties.user_id().as_ref().is_some_and(|id| id.as_str() == &**user),
            Self::Nobody => false,
        }
    }
}

/// Headers of a dead letter, for its owner's `-dead` queue.
pub(super) fn dead_properties(dead: &DeadLetter, user: Option<&str>) -> BasicProperties {
    let counts = Counts { attempts: dead.attempts, ..Counts::fresh() };
    let properties = properties(&dead.payload, counts, user);
    let mut headers = properties.headers().clone().unwrap_or_default();
    let mut text = |name: &str, value: &str| {
        headers.insert(short(name), AMQPValue::LongString(value.into()));
    };
    text(DEAD_ID, &dead.id);
    text(DEAD_REASON, dead.reason.as_str());
    text(DEAD_ORIGIN, origin_name(dead.origin));
    headers.insert(short(DEAD_AT), AMQPValue::LongLongInt(dead.died_at.as_millis()));
    let properties = properties.with_headers(headers);
    match dead.payload {
        Payload::Message(_) => properties,
        Payload::Foreign(_) => properties.with_type(short(KIND_RAW)),
    }
}

/// Reads a dead letter. What somebody else put into the queue counts as one that could not be read.
pub(super) fn read_dead(properties: &BasicProperties, body: Vec<u8>) -> DeadLetter {
    let headers = properties.headers().as_ref();
    let text = |name: &str| headers.and_then(|headers| headers.inner().get(name)).and_then(as_text);
    let died_at = headers.and_then(|headers| headers.inner().get(DEAD_AT)).and_then(as_integer).unwrap_or(0);
    let (id, reason, origin) = (text(DEAD_ID), text(DEAD_REASON), text(DEAD_ORIGIN));
    let id = id.map_or_else(|| made_up_id(&body), Into::into);
    let Read { payload, counts, .. } = read(properties, body, None);
    let attempts = headers.and_then(|headers| headers.inner().get(ATTEMPTS)).and_then(as_integer);
    DeadLetter {
        id,
        origin: match origin.as_deref() {
            Some("outbox") => Origin::Outbox,
            Some("notify") => Origin::Notify,
            _ => Origin::Inbox,
        },
        reason: reason.and_then(|name| DeadReason::from_name(&name)).unwrap_or(DeadReason::InvalidMessage),
        attempts: attempts.and_then(|n| u32::try_from(n).ok()).unwrap_or(counts.attempts),
        died_at: Timestamp::from_millis(died_at),
        payload,
    }
}

fn origin_name(origin: Origin) -> &'static str {
    match origin {
        Origin::Inbox => "inbox",
        Origin::Outbox => "outbox",
        Origin::Notify => "notify",
    }
}

/// An id for what has none: the same each time it is looked at.
fn made_up_id(body: &[u8]) -> String {
    use sha2::{Digest as _, Sha256};
    use std::fmt::Write as _;
    let mut id = String::from("foreign-");
    for byte in &Sha256::digest(body)[..8] {
        write!(id, "{byte:02x}").expect("writing to a string");
    }
    id
}

fn as_text(value: &AMQPValue) -> Option<Box<str>> {
    match value {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok().map(Into::into),
        AMQPValue::ShortString(text) => Some(text.as_str().into()),
        _ => None,
    }
}

fn as_integer(value: &AMQPValue) -> Option<i64> {
    match value {
        AMQPValue::ShortShortInt(n) => Some(i64::from(*n)),
        AMQPValue::ShortShortUInt(n) => Some(i64::from(*n)),
        AMQPValue::ShortInt(n) => Some(i64::from(*n)),
        AMQPValue::ShortUInt(n) => Some(i64::from(*n)),
        AMQPValue::LongInt(n) => Some(i64::from(*n)),
        AMQPValue::LongUInt(n) => Some(i64::from(*n)),
        AMQPValue::LongLongInt(n) => Some(*n),
        AMQPValue::Timestamp(n) => i64::try_from(*n).ok(),
        _ => None,
    }
}

/// The message whose envelope this is. Reads only what [`Message::accept`] writes, in its order.
fn message(envelope: &Bytes, own_id: bool, traceparent: Option<Box<str>>) -> Option<Message> {
    let mut rest = Rest(envelope);
    rest.skip(b"{\"id\":\"")?;
    let id = rest.until_quote()?;
    let id = MessageId::parse(&unescaped(id)).ok()?;
    let topic = if rest.skip(b",\"broadcast\":true").is_some() {
        None
    } else {
        rest.skip(b",\"topic\":\"")?;
        Some(Topic::parse(rest.until_quote()?).ok()?)
    };
    rest.skip(b",\"sender\":\"")?;
    let sender = match rest.until_quote()? {
        BACKBONE_SENDER => ClientId::backbone(),
        sender => ClientId::parse(sender).ok()?,
    };
    rest.skip(b",\"sent_at\":\"")?;
    let sent_at: jiff::Timestamp = rest.until_quote()?.parse().ok()?;
    let sent_at = Timestamp::from_millis(sent_at.as_millisecond());
    rest.skip(b",\"message\":")?;
    Some(Message { id, own_id, sender, topic, sent_at, traceparent, envelope: envelope.clone() })
}

/// An id has no other escapes than those of `"` and `\`.
fn unescaped(id: &str) -> Cow<'_, str> {
    if !id.contains('\\') {
        return id.into();
    }
    let mut plain = String::with_capacity(id.len());
    let mut characters = id.chars();
    while let Some(character) = characters.next() {
        plain.extend(if character == '\\' { characters.next() } else { Some(character) });
    }
    plain.into()
}

struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn skip(&mut self, expected: &[u8]) -> Option<()> {
        self.0 = self.0.strip_prefix(expected)?;
        Some(())
    }

    /// What comes before the next quotation mark that is not escaped; goes on after it.
    fn until_quote(&mut self) -> Option<&'a str> {
        let mut at = 0;
        loop {
            match *self.0.get(at)? {
                b'"' => break,
                b'\\' => at += 2,
                _ => at += 1,
            }
        }
        let text = std::str::from_utf8(&self.0[..at]).ok()?;
        self.0 = &self.0[at + 1..];
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::value::RawValue;

    use super::*;
    use crate::envelope::Draft;

    fn message(id: Option<&str>, topic: Option<&str>, body: &str) -> Payload {
        let raw: &RawValue = serde_json::from_str(body).expect("test JSON");
        let draft = Draft {
            id: id.map(|id| MessageId::parse(id).expect("test id")),
            topic: topic.map(|topic| Topic::parse(topic).expect("test topic")),
            message: raw,
            traceparent: id.map(|_| "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into()),
        };
        let sender = ClientId::parse("noc-c2").expect("test client");
        Payload::Message(Message::accept(&sender, draft, Timestamp::now()).into())
    }

    fn backbone() -> Trusted {
        Trusted::User("backbone".into())
    }

    #[test]
    fn what_is_published_is_read() {
        let counts = Counts { attempts: 3, deliveries: 4, since_s: 17, delayed_at_ms: 18 };
        for payload in [
            message(None, None, "null"),
            message(Some("a\"b\\c\\\""), Some("soar.noc"), r#"{"message":"x,\"message\":",  "n":1.0e0}"#),
        ] {
            let properties = properties(&payload, counts, Some("backbone"));
            let read = read(&properties, body(&payload).to_vec(), Some(&backbone()));
            assert_eq!(read.payload.message(), payload.message());
            assert_eq!((read.counts, read.returned), (counts, None));
        }
    }

    #[test]
    fn only_the_backbone_is_believed() {
        let payload = message(None, Some("x"), "1");
        let counts = Counts { attempts: 9, ..Counts::fresh() };
        for user in [None, Some("noc-c2"), Some("")] {
            let forged = read(&properties(&payload, counts, user), body(&payload).to_vec(), Some(&backbone()));
            assert!(forged.payload.message().is_none(), "{user:?}");
            assert_eq!(forged.counts.attempts, 0, "nor are the counts");
        }
        let own = properties(&payload, counts, Some("backbone"));
        assert!(read(&own, body(&payload).to_vec(), Some(&Trusted::Nobody)).payload.message().is_none());
        let unknown = read(&own.with_type(short("other")), body(&payload).to_vec(), Some(&backbone()));
        assert!(unknown.payload.message().is_none());
    }

    #[test]
    fn what_is_no_envelope_is_foreign_whatever_its_properties_say() {
        let payload = message(Some("1"), Some("x"), "1");
        let properties = properties(&payload, Counts::fresh(), Some("backbone"));
        let whole = body(&payload);
        for cut in 0..whole.len() - 2 {
            let read = read(&properties, whole[..cut].to_vec(), None);
            let foreign = matches!(read.payload, Payload::Foreign(_));
            assert!(foreign || cut >= whole.len() - 3, "{:?}", &whole[..cut]);
        }
        for bad in [
            r#"{"id":"a.b","topic":"x","sender":"a","sent_at":"2026-11-23T18:09:00.123Z","message":1}"#,
            r#"{"id":"a","topic":"x..y","sender":"a","sent_at":"2026-11-23T18:09:00.123Z","message":1}"#,
            r#"{"id":"a","topic":"x","sender":"-","sent_at":"2026-11-23T18:09:00.123Z","message":1}"#,
            r#"{"id":"a","topic":"x","sender":"a","sent_at":"yesterday","message":1}"#,
            r#"{"id":"\"#,
        ] {
            assert!(read(&properties, bad.into(), None).payload.message().is_none(), "{bad}");
        }
    }

    #[test]
    fn dead_letters_keep_everything() {
        let foreign = Payload::Foreign(Foreign {
            body: Bytes::from_static(b"\xff{"),
            message_id: Some("theirs".into()),
            traceparent: None,
        });
        for (payload, reason, origin) in [
            (message(Some("1"), Some("x"), "1"), DeadReason::Expired, Origin::Inbox),
            (foreign, DeadReason::InvalidMessage, Origin::Notify),
        ] {
            let died_at = Timestamp::from_millis(1_795_457_340_123);
            let dead = DeadLetter { id: "d1".into(), origin, reason, attempts: 7, died_at, payload };
            let back = read_dead(&dead_properties(&dead, Some("backbone")), body(&dead.payload).to_vec());
            assert_eq!((&back.id, back.origin, back.reason), (&dead.id, origin, reason));
            assert_eq!((back.attempts, back.died_at), (7, died_at));
            match (&back.payload, &dead.payload) {
                (Payload::Message(back), Payload::Message(dead)) => assert_eq!(back, dead),
                (Payload::Foreign(back), Payload::Foreign(dead)) => assert_eq!(back, dead),
                (back, dead) => panic!("{back:?} is not {dead:?}"),
            }
        }
        let stray = read_dead(&BasicProperties::default(), b"what is this".to_vec());
        assert_eq!(stray.reason, DeadReason::InvalidMessage);
        assert_eq!(stray.id, read_dead(&BasicProperties::default(), b"what is this".to_vec()).id);
    }

    #[test]
    fn short_strings_are_cut_at_a_character() {
        assert_eq!(short(&"ä".repeat(200)).as_str(), "ä".repeat(127));
    }
}
