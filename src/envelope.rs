//! Messages and their envelopes (contract, section 3).
//!
//! A [`Message`] is made once, when the backbone accepts it, and is then shared by every queue it lands in. It holds
//! the envelope ready rendered, so that a delivery writes bytes instead of building JSON, and the sender's own
//! `message` passes through byte for byte.

use std::fmt;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::client::ClientId;
use crate::time::Timestamp;
use crate::topic::Topic;

/// Longest message id that a sender may choose, in characters.
pub const MAX_MESSAGE_ID_CHARS: usize = 128;

/// A message id: a UUIDv7 (RFC 9562) given on acceptance, or the sender's own, 1 to 128 visible ASCII characters
/// without `.` (which separates the parts of what a webhook signature covers).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct MessageId(Box<str>);

/// Why a string is not a [`MessageId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be 1 to {MAX_MESSAGE_ID_CHARS} visible ASCII characters without '.'")]
pub struct MessageIdError;

impl MessageId {
    /// Parses a sender's own id.
    ///
    /// # Errors
    /// [`MessageIdError`] when it is empty, too long, or has a character outside `!`..`~` or a `.`.
    pub fn parse(text: &str) -> Result<Self, MessageIdError> {
        let fits = (1..=MAX_MESSAGE_ID_CHARS).contains(&text.len());
        if fits && text.bytes().all(|b| b.is_ascii_graphic() && b != b'.') {
            Ok(Self(text.into()))
        } else {
            Err(MessageIdError)
        }
    }

    /// A fresh UUIDv7.
    pub fn generate() -> Self {
        let mut buffer = Uuid::encode_buffer();
        Self((&*Uuid::now_v7().hyphenated().encode_lower(&mut buffer)).into())
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for MessageId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// One accepted message, as it travels inside the backbone. Immutable; shared through an `Arc`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The same on every copy and every retry.
    pub id: MessageId,
    /// True when the sender chose the id: it is then deduplicated within `SOAR_DEDUP_WINDOW`, and the webhook id is
    /// `{sender}:{id}`.
    pub own_id: bool,
    /// The client that owns the outbox or notify queue that it came through.
    pub sender: ClientId,
    /// Its topic; `None` on a broadcast.
    pub topic: Option<Topic>,
    /// When the backbone accepted it.
    pub sent_at: Timestamp,
    /// W3C trace context of the request that brought it, carried along (Trace Context, section 3.2).
    pub traceparent: Option<Box<str>>,
    /// The envelope, rendered: one JSON object.
    pub envelope: Bytes,
}

/// What a sender hands in: everything of a [`Message`] that is not the backbone's to say.
#[derive(Debug)]
pub struct Draft<'a> {
    /// The sender's own id, if it gave one.
    pub id: Option<MessageId>,
    /// `None` for a broadcast.
    pub topic: Option<Topic>,
    /// The JSON value, exactly as sent.
    pub message: &'a RawValue,
    /// W3C trace context, if the request had one.
    pub traceparent: Option<Box<str>>,
}

impl Message {
    /// Accepts a draft: gives it an id unless it has one, and renders the envelope.
    pub fn accept(sender: &ClientId, draft: Draft<'_>, now: Timestamp) -> Self {
        let own_id = draft.id.is_some();
        let id = draft.id.unwrap_or_else(MessageId::generate);
        let envelope = render(&id, sender, draft.topic.as_ref(), now, draft.message.get());
        Self {
            id,
            own_id,
            sender: sender.clone(),
            topic: draft.topic,
            sent_at: now,
            traceparent: draft.traceparent,
            envelope,
        }
    }

    /// The `webhook-id` header: the id, or `{sender}:{id}` for a sender's own (contract, section 5).
    pub fn webhook_id(&self) -> String {
        if self.own_id { format!("{}:{}", self.sender, self.id) } else { self.id.to_string() }
    }

    /// The sender's JSON value inside the envelope, byte for byte. Empty only if the envelope was tampered with.
    pub fn body(&self) -> &[u8] {
        // The value is the last member, and no earlier member can hold this key: ids, topics and client ids cannot
        // contain a quotation mark (ids can, but then it is escaped as \").
        const KEY: &[u8] = b",\"message\":";
        let all = &self.envelope[..];
        match all.windows(KEY.len()).position(|window| window == KEY) {
            Some(at) => &all[at + KEY.len()..all.len() - 1],
            None => &[],
        }
    }

    /// Encodes everything but the envelope, for storage beside it. Read back by [`Message::decode`].
    pub fn encode_head(&self) -> Vec<u8> {
        let topic = self.topic.as_ref().map_or("", Topic::as_str);
        let trace = self.traceparent.as_deref().unwrap_or("");
        let parts = [self.id.as_str(), self.sender.as_str(), topic, trace];
        let mut out = Vec::with_capacity(10 + parts.iter().map(|part| part.len() + 1).sum::<usize>());
        out.push(ENCODING_VERSION);
        out.push(u8::from(self.own_id) | u8::from(self.topic.is_none()) << 1);
        out.put_i64_le(self.sent_at.as_millis());
        for part in parts {
            out.push(u8::try_from(part.len()).expect("ids, topics and trace contexts are at most 255 bytes"));
            out.extend_from_slice(part.as_bytes());
        }
        out
    }

    /// Decodes what [`Message::encode_head`] wrote, with the envelope that it was stored beside.
    ///
    /// # Errors
    /// [`DecodeError`] when the head is of another version or cut off.
    pub fn decode(head: &[u8], envelope: Bytes) -> Result<Self, DecodeError> {
        let mut at = 10;
        if head.len() < at || head[0] != ENCODING_VERSION {
            return Err(DecodeError);
        }
        let flags = head[1];
        let millis = i64::from_le_bytes(head[2..10].try_into().map_err(|_| DecodeError)?);
        let mut part = || -> Result<&str, DecodeError> {
            let len = usize::from(*head.get(at).ok_or(DecodeError)?);
            let text = head.get(at + 1..at + 1 + len).ok_or(DecodeError)?;
            at += 1 + len;
            std::str::from_utf8(text).map_err(|_| DecodeError)
        };
        let (id, sender, topic, trace) = (part()?, part()?, part()?, part()?);
        Ok(Self {
            id: MessageId(id.into()),
            own_id: flags & 1 != 0,
            sender: match sender {
                crate::client::BACKBONE_SENDER => ClientId::backbone(),
                client => ClientId::parse(client).map_err(|_| DecodeError)?,
            },
            topic: if flags & 2 != 0 { None } else { Some(Topic::parse(topic).map_err(|_| DecodeError)?) },
            sent_at: Timestamp::from_millis(millis),
            traceparent: if trace.is_empty() { None } else { Some(trace.into()) },
            envelope,
        })
    }

    /// Who sent what and when, without the content: a few words of memory however large the message is.
    #[must_use]
    pub fn without_envelope(&self) -> Self {
        Self { envelope: Bytes::new(), ..self.clone() }
    }

    /// Memory that it holds, about, in bytes.
    pub fn size(&self) -> usize {
        self.envelope.len() + 160
    }
}

/// First byte of an encoded head.
const ENCODING_VERSION: u8 = 1;

/// The bytes are not an encoded message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stored message is cut off or of an unknown version")]
pub struct DecodeError;

/// A delivery's message, shared.
pub type SharedMessage = Arc<Message>;

fn render(id: &MessageId, sender: &ClientId, topic: Option<&Topic>, now: Timestamp, message: &str) -> Bytes {
    use std::fmt::Write as _;
    let mut out =
        BytesMut::with_capacity(message.len() + id.as_str().len() + 160 + topic.map_or(0, |t| t.as_str().len()));
    out.put_slice(b"{\"id\":\"");
    put_escaped(&mut out, id.as_str());
    match topic {
        Some(topic) => {
            out.put_slice(b"\",\"topic\":\"");
            out.put_slice(topic.as_str().as_bytes());
            out.put_slice(b"\",\"sender\":\"");
        }
        None => out.put_slice(b"\",\"broadcast\":true,\"sender\":\""),
    }
    out.put_slice(sender.as_str().as_bytes());
    out.put_slice(b"\",\"sent_at\":\"");
    write!(out, "{now}").expect("a growing buffer takes any text");
    out.put_slice(b"\",\"message\":");
    out.put_slice(message.as_bytes());
    out.put_u8(b'}');
    out.freeze()
}

/// Only `"` and `\` need an escape: ids are visible ASCII, topics and client ids a subset of it.
fn put_escaped(out: &mut BytesMut, text: &str) {
    for byte in text.bytes() {
        if byte == b'"' || byte == b'\\' {
            out.put_u8(b'\\');
        }
        out.put_u8(byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(id: Option<&str>, topic: Option<&str>, json: &str) -> Message {
        let raw: &RawValue = serde_json::from_str(json).expect("test JSON");
        let draft = Draft {
            id: id.map(|id| MessageId::parse(id).expect("test id")),
            topic: topic.map(|topic| Topic::parse(topic).expect("test topic")),
            message: raw,
            traceparent: Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into()),
        };
        Message::accept(
            &ClientId::parse("noc-c2").expect("test client"),
            draft,
            Timestamp::from_millis(1_795_457_340_123),
        )
    }

    #[test]
    fn envelope_carries_the_message_byte_for_byte() {
        let json = r#"{"b":1.0e0,  "a":[1,2 ,3],"message":"x,\"message\":"}"#;
        let message = message(Some("a\"b\\c"), Some("soar.noc"), json);
        assert_eq!(message.body(), json.as_bytes());
        let value: serde_json::Value = serde_json::from_slice(&message.envelope).expect("envelope is JSON");
        assert_eq!(value["id"], "a\"b\\c");
        assert_eq!(value["topic"], "soar.noc");
        assert_eq!(value["sender"], "noc-c2");
        assert_eq!(value["sent_at"], "2026-11-23T18:09:00.123Z");
    }

    #[test]
    fn broadcast_has_no_topic() {
        let value: serde_json::Value =
            serde_json::from_slice(&message(None, None, "1").envelope).expect("envelope is JSON");
        assert_eq!(value["broadcast"], true);
        assert!(value.get("topic").is_none());
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        for message in [message(None, None, "null"), message(Some("x"), Some("a.b"), "[1, 2]")] {
            assert_eq!(Message::decode(&message.encode_head(), message.envelope.clone()), Ok(message));
        }
        assert_eq!(Message::decode(b"\x01\x00", Bytes::new()), Err(DecodeError));
        assert_eq!(Message::decode(b"\x02\x00aaaaaaaaaaaaaaaa", Bytes::new()), Err(DecodeError));
    }

    #[test]
    fn own_ids_are_visible_ascii_without_a_dot() {
        for good in ["a", "{}\"\\!~", &"x".repeat(128)] {
            assert!(MessageId::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "a.b", "a b", "ä", "\u{7f}", &"x".repeat(129)] {
            assert!(MessageId::parse(bad).is_err(), "{bad}");
        }
    }
}
