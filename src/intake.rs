//! Intake of what clients put into their outbox or notify queue by AMQP: from raw bytes to a [`Message`]. Pure.
//!
//! HTTP has its own, richer validation, which names every wrong field; here the first error is enough, as it becomes
//! a dead letter's reason.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::broker::Foreign;
use crate::client::ClientId;
use crate::envelope::{Draft, Message, MessageId, MessageIdError};
use crate::time::Timestamp;
use crate::topic::{Topic, TopicError};

/// What the queue that it came through makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An outbox: it must have a topic.
    Topic,
    /// A notify queue: it goes to everyone, and a `topic` is ignored.
    Broadcast,
}

/// Why it cannot be read as a message.
#[derive(Debug, thiserror::Error)]
pub enum IntakeError {
    /// Not a JSON object with the right members.
    #[error("body is not {{\"topic\",\"message\",\"id\"?}}: {0}")]
    Json(#[from] serde_json::Error),
    /// An outbox message without a topic.
    #[error("topic is missing")]
    NoTopic,
    /// Not a topic.
    #[error("topic {0}")]
    Topic(#[from] TopicError),
    /// Not an id.
    #[error("id {0}")]
    Id(#[from] MessageIdError),
    /// `message` is longer than `SOAR_MAX_MESSAGE_BYTES`.
    #[error("message has {bytes} bytes, at most {max} are taken")]
    TooLarge {
        /// Its length.
        bytes: usize,
        /// The limit.
        max: usize,
    },
}

#[derive(Deserialize)]
struct Body<'a> {
    topic: Option<String>,
    #[serde(borrow)]
    message: &'a RawValue,
    id: Option<String>,
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
    let body: Body<'_> = serde_json::from_slice(&foreign.body)?;
    let bytes = body.message.get().len();
    if bytes > max_message_bytes {
        return Err(IntakeError::TooLarge { bytes, max: max_message_bytes });
    }
    let topic = match kind {
        Kind::Topic => Some(Topic::parse(body.topic.as_deref().ok_or(IntakeError::NoTopic)?)?),
        Kind::Broadcast => None,
    };
    let id = body.id.as_deref().or(foreign.message_id.as_deref()).map(MessageId::parse).transpose()?;
    let traceparent = foreign.traceparent.as_deref().and_then(parse_traceparent);
    Ok(Message::accept(sender, Draft { id, topic, message: body.message, traceparent }, now))
}

/// Longest `traceparent` that is carried on, in bytes. Version 00 has 55; later ones may add to it.
const TRACEPARENT_BYTES_MAX: usize = 128;

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
        for body in [r#"{"message":1}"#, r#"{"message":1,"topic":"..."}"#] {
            assert_eq!(read(body, Kind::Broadcast).expect("is a message").topic, None);
        }
    }

    #[test]
    fn what_cannot_be_read_is_an_error_with_its_reason() {
        for (body, why) in [
            ("", "body is not"),
            ("[]", "body is not"),
            ("{\"topic\":\"a\"}", "missing field `message`"),
            ("{\"message\":1}", "topic is missing"),
            ("{\"message\":1,\"topic\":\"a..b\"}", "topic must not"),
            ("{\"message\":1,\"topic\":7}", "invalid type"),
            ("{\"message\":1,\"topic\":\"a\",\"id\":\"a.b\"}", "id must be"),
            ("{\"message\":\"12345678901234567890\",\"topic\":\"a\"}", "22 bytes"),
            ("{\"message\":1,\"message\":2,\"topic\":\"a\"}", "duplicate field"),
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
    fn depth_does_not_overflow_the_stack() {
        let deep = format!("{{\"topic\":\"a\",\"message\":{}{}}}", "[".repeat(500_000), "]".repeat(500_000));
        let foreign = Foreign { body: deep.into(), message_id: None, traceparent: None };
        let sender = ClientId::parse("a").expect("test id");
        assert!(parse_foreign(&foreign, &sender, Kind::Topic, 1 << 20, Timestamp::from_millis(0)).is_ok());
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
