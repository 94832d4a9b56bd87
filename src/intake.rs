//! Intake: what makes a message right, for whatever way it comes by. Pure.
//!
//! HTTP and WebSocket name every mistake; of what clients put into their outbox or notify queue by AMQP the first one is
//! enough, as it ends up in the log.

mod item;

use serde_json::value::RawValue;

pub(crate) use self::item::{Item, ItemVisitor, Members};
use self::item::{is_too_deep, text};
use crate::broker::Foreign;
use crate::client::ClientId;
use crate::envelope::{Draft, Message, MessageId};
use crate::time::Timestamp;
use crate::topic::Topic;

/// What the queue that it came through makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An outbox: it must have a topic.
    Topic,
    /// A notify queue: it goes to everyone, and a `topic` is ignored.
    Broadcast,
}

/// One thing that is wrong with a message.
#[derive(Debug, thiserror::Error)]
pub enum Mistake {
    /// A member is missing, or not what it should be.
    #[error("{name} {detail}")]
    Member {
        /// Which.
        name: &'static str,
        /// What is wrong with it.
        detail: String,
    },
    /// `message` is longer than `SOAR_MAX_MESSAGE_BYTES`.
    #[error("message has {bytes} bytes, at most {max} are taken")]
    TooLarge {
        /// Its length.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// Many a JSON reader could not read `message`.
    #[error("message is nested too deep")]
    TooDeep,
}

/// Why it cannot be read as a message.
#[derive(Debug, thiserror::Error)]
pub enum IntakeError {
    /// Not UTF-8, which JSON is.
    #[error("body is not UTF-8")]
    NotUtf8(#[from] std::str::Utf8Error),
    /// Not JSON.
    #[error("body is not JSON: {0}")]
    NotJson(#[from] serde_json::Error),
    /// JSON of another type.
    #[error("body is not an object")]
    NotAnObject,
    /// It has not the right members.
    #[error(transparent)]
    Mistake(#[from] Mistake),
}

/// Judges a message by its members.
///
/// # Errors
/// Every [`Mistake`], at least one.
pub(crate) fn check<'a>(
    members: &Members<'a>,
    kind: Kind,
    max_message_bytes: usize,
) -> Result<Draft<'a>, Vec<Mistake>> {
    let mut mistakes = Vec::new();
    let mut wrong = |name: &'static str, detail: String| mistakes.push(Mistake::Member { name, detail });
    for name in &members.repeated {
        wrong(name, "is given more than once".into());
    }
    let topic = match (kind, members.topic) {
        (Kind::Broadcast, _) => Ok(None),
        (Kind::Topic, None) => Err("is required".into()),
        (Kind::Topic, Some(raw)) => parsed(raw, Topic::parse).map(Some),
    };
    let topic = topic.map_err(|detail| wrong("topic", detail)).ok();
    let id = members.id.map(|raw| parsed(raw, MessageId::parse)).transpose();
    let id = id.map_err(|detail| wrong("id", detail)).ok();
    match members.message {
        None => wrong("message", "is required".into()),
        Some(message) if message.get().len() > max_message_bytes => {
            mistakes.push(Mistake::TooLarge { bytes: message.get().len(), max: max_message_bytes });
        }
        Some(message) if is_too_deep(message.get()) => mistakes.push(Mistake::TooDeep),
        Some(_) => {}
    }
    match (topic, id, members.message) {
        (Some(topic), Some(id), Some(message)) if mistakes.is_empty() => {
            Ok(Draft { id, topic, message, traceparent: None })
        }
        _ => Err(mistakes),
    }
}

/// A member that must be a string, parsed.
fn parsed<T, E: ToString>(raw: &RawValue, parse: impl Fn(&str) -> Result<T, E>) -> Result<T, String> {
    let text = text(raw).ok_or("must be a string")?;
    parse(&text).map_err(|error| error.to_string())
}

/// Reads a foreign publish as a message of `sender`, the owner of the queue that it came through. The sender's own id
/// is the member `id` or else the AMQP property `message_id`.
///
/// # Errors
/// [`IntakeError`]: the first thing that is wrong.
pub fn parse_foreign(
    foreign: &Foreign,
    sender: &ClientId,
    kind: Kind,
    max_message_bytes: usize,
    now: Timestamp,
) -> Result<Message, IntakeError> {
    let Item::Object(members) = serde_json::from_str(std::str::from_utf8(&foreign.body)?)? else {
        return Err(IntakeError::NotAnObject);
    };
    let draft = check(&members, kind, max_message_bytes).map_err(|mut mistakes| mistakes.swap_remove(0))?;
    let property = || {
        let parsed = foreign.message_id.as_deref().map(MessageId::parse).transpose();
        parsed.map_err(|error| Mistake::Member { name: "id", detail: error.to_string() })
    };
    let id = if draft.id.is_some() { draft.id } else { property()? };
    let traceparent = foreign.traceparent.as_deref().and_then(parse_traceparent);
    Ok(Message::accept(sender, Draft { id, traceparent, ..draft }, now))
}

/// Longest `traceparent` that is carried on, in bytes. Version 00 has 55; later ones may add to it.
pub(crate) const TRACEPARENT_BYTES_MAX: usize = 128;

/// A W3C `traceparent` that can be carried on, or `None`: a broken one is dropped, as if there had been none
/// (Trace Context, section 3.2.2).
pub fn parse_traceparent(text: &str) -> Option<Box<str>> {
    let hex = |part: &str, len: usize| {
        part.len() == len && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let zero = |part: &str| part.bytes().all(|b| b == b'0');
    let mut parts = text.splitn(5, '-');
    let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let shape = hex(version, 2) && hex(trace, 32) && hex(parent, 16) && hex(flags, 2);
    let rest = match parts.next() {
        None => true,
        Some(rest) => version != "00" && rest.bytes().all(|b| b.is_ascii_graphic()),
    };
    let fits = text.len() <= TRACEPARENT_BYTES_MAX;
    (shape && rest && fits && version != "ff" && !zero(trace) && !zero(parent)).then(|| text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn read(body: &str, kind: Kind) -> Result<Message, IntakeError> {
        let foreign = Foreign {
            body: body.to_owned().into(),
            message_id: Some("property".into()),
            traceparent: Some(TRACE.into()),
        };
        let sender = ClientId::parse("noc-c2").expect("test id");
        parse_foreign(&foreign, &sender, kind, 20, Timestamp::from_millis(0))
    }

    #[test]
    fn what_an_amqp_client_writes_becomes_a_message_of_the_queues_owner() {
        let message = read(r#"{"topic":"a.b","message":{"x" : 1.0},"sender":"forged","id":"own"}"#, Kind::Topic)
            .expect("is a message");
        assert_eq!((message.id.as_str(), message.own_id), ("own", true));
        assert_eq!(message.sender.as_str(), "noc-c2");
        assert_eq!(message.topic.as_ref().map(Topic::as_str), Some("a.b"));
        assert_eq!(message.body(), br#"{"x" : 1.0}"#);
        assert_eq!(message.traceparent.as_deref(), Some(TRACE));
    }

    #[test]
    fn the_property_is_the_id_when_the_body_has_none() {
        let message = read(r#"{"topic":"a","message":null}"#, Kind::Topic).expect("is a message");
        assert_eq!(message.id.as_str(), "property");
    }

    #[test]
    fn a_broadcast_needs_no_topic_and_ignores_one() {
        for body in [r#"{"message":1}"#, r#"{"message":1,"topic":"..."}"#, r#"{"message":1,"topic":7}"#] {
            assert_eq!(read(body, Kind::Broadcast).expect("is a message").topic, None);
        }
    }

    #[test]
    fn what_cannot_be_read_is_an_error_with_its_reason() {
        for (body, why) in [
            ("", "body is not"),
            ("[]", "body is not"),
            ("null", "body is not"),
            ("{\"topic\":\"a\"}", "message is required"),
            ("{\"message\":1}", "topic is required"),
            ("{\"message\":1,\"topic\":\"a..b\"}", "topic must not"),
            ("{\"message\":1,\"topic\":7}", "topic must be a string"),
            ("{\"message\":1,\"topic\":\"a\",\"id\":null}", "id must be a string"),
            ("{\"message\":1,\"topic\":\"a\",\"id\":\"a.b\"}", "id must be"),
            ("{\"message\":\"12345678901234567890\",\"topic\":\"a\"}", "22 bytes"),
            ("{\"message\":1,\"message\":2,\"topic\":\"a\"}", "message is given more than once"),
            ("{\"message\":1,\"topic\":\"a\"} x", "trailing"),
        ] {
            let error = read(body, Kind::Topic).expect_err(body).to_string();
            assert!(error.contains(why), "{body}: {error}");
        }
        let invalid_utf8 = Foreign {
            body: bytes::Bytes::from_static(b"{\"topic\":\"a\",\"message\":\"\xff\"}"),
            message_id: None,
            traceparent: None,
        };
        let sender = ClientId::parse("a").expect("test id");
        assert!(parse_foreign(&invalid_utf8, &sender, Kind::Topic, 100, Timestamp::from_millis(0)).is_err());
    }

    #[test]
    fn what_is_nested_deeper_than_readers_go_is_refused_without_a_deep_stack() {
        let sender = ClientId::parse("a").expect("test id");
        for (levels, taken) in [(128, true), (129, false), (500_000, false)] {
            let deep = format!("{{\"topic\":\"a\",\"message\":{}{}}}", "[".repeat(levels), "]".repeat(levels));
            let foreign = Foreign { body: deep.into(), message_id: None, traceparent: None };
            let read = parse_foreign(&foreign, &sender, Kind::Topic, 1 << 20, Timestamp::from_millis(0));
            assert_eq!(read.is_ok(), taken, "{levels}");
            assert!(taken || matches!(read, Err(IntakeError::Mistake(Mistake::TooDeep))), "{read:?}");
        }
    }

    #[test]
    fn only_whole_trace_contexts_are_carried_on() {
        assert!(parse_traceparent(TRACE).is_some());
        assert!(parse_traceparent(&TRACE.replace("00-4b", "cc-4b").replace("-01", "-01-more")).is_some());
        for bad in [
            "",
            "00",
            &TRACE[..54],
            &TRACE.replace("00-4b", "ff-4b"),
            &TRACE.to_uppercase(),
            &format!("{TRACE}-more"),
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            &format!("01-{}-{}", &TRACE[3..], "x".repeat(200)),
        ] {
            assert!(parse_traceparent(bad).is_none(), "{bad}");
        }
    }
}
