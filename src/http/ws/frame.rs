//! Frames as text: one JSON object each (contract, section 4).

use serde::Deserialize;
use serde_json::value::RawValue;

use super::outgoing::Outgoing;
use crate::broker::{Delivery, Outcome, Payload};
use crate::http::error::{Errors, Problem};
use crate::http::settle;
use crate::intake::{Kind, parse_traceparent};

/// Most unsettled messages that a client may ask for.
pub(super) const CREDIT_MAX: u32 = 10_000;

/// Longest `ref`, in bytes of JSON.
const REFERENCE_BYTES_MAX: usize = 1024;

/// What a client says.
#[derive(Debug)]
pub(super) enum Frame {
    /// Messages: the JSON to read them from, and where in the frame that lies.
    Publish { kind: Kind, several: Option<Box<RawValue>>, traceparent: Option<Box<str>> },
    /// At most so many unsettled messages.
    Credit(u32),
    /// These are settled so.
    Settle { receipts: Vec<String>, how: How },
}

/// How receipts settle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// Done.
    Ack,
    /// Back, at once or after so many seconds.
    Nack(u64),
    /// Into the dead letters.
    Reject,
}

impl How {
    /// For a delivery.
    pub(super) fn outcome(self, delivery: &Delivery) -> Outcome {
        match self {
            Self::Ack => Outcome::Complete,
            Self::Nack(0) => Outcome::Requeue,
            Self::Nack(delay_s) => {
                Outcome::Delay { delay: std::time::Duration::from_secs(delay_s), attempts: delivery.attempts }
            }
            Self::Reject => {
                Outcome::Dead { reason: crate::broker::DeadReason::Rejected, attempts: delivery.deliveries }
            }
        }
    }
}

/// A frame that cannot be carried out, and what it was called.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) reference: Option<Box<RawValue>>,
    pub(super) problem: Problem,
}

/// The members of all kinds of frames; others are ignored, and those of a single message are read later.
#[derive(Deserialize)]
struct Members<'a> {
    #[serde(borrow)]
    r#type: Option<&'a RawValue>,
    #[serde(borrow)]
    r#ref: Option<&'a RawValue>,
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
    #[serde(borrow)]
    traceparent: Option<&'a RawValue>,
    #[serde(borrow)]
    credit: Option<&'a RawValue>,
    #[serde(borrow)]
    receipts: Option<&'a RawValue>,
    #[serde(borrow)]
    delay_s: Option<&'a RawValue>,
    #[serde(borrow)]
    dead: Option<&'a RawValue>,
}

/// Reads a frame, and the name that its answer is to carry.
///
/// # Errors
/// With everything that is wrong in it.
pub(super) fn read(text: &str) -> Result<(Option<Box<RawValue>>, Frame), Refused> {
    let refused = |problem| Refused { reference: None, problem };
    // An array would be read as the members in their order.
    if !text.trim_start().starts_with('{') {
        let read = serde_json::from_str::<serde::de::IgnoredAny>(text);
        return Err(refused(read.map_or_else(|error| not_json(&error), |_| only("must be a JSON object"))));
    }
    let members: Members<'_> = serde_json::from_str(text)
        .map_err(|error| refused(if error.is_data() { only("has a member twice") } else { not_json(&error) }))?;
    let mut errors = Errors::default();
    if members.r#ref.is_some_and(|reference| reference.get().len() > REFERENCE_BYTES_MAX) {
        errors.add("/ref", format!("must not be longer than {REFERENCE_BYTES_MAX} bytes"));
        return Err(Refused { reference: None, problem: Problem::invalid(errors) });
    }
    let reference = members.r#ref.map(ToOwned::to_owned);
    match members.read(&mut errors) {
        Some(frame) if errors.is_empty() => Ok((reference, frame)),
        _ => Err(Refused { reference, problem: Problem::invalid(errors) }),
    }
}

fn only(detail: &str) -> Problem {
    let mut errors = Errors::default();
    errors.add("", detail);
    Problem::invalid(errors)
}

fn not_json(error: &serde_json::Error) -> Problem {
    Problem::invalid_json(format!("the frame is not JSON: {error}"))
}

impl Members<'_> {
    fn read(&self, errors: &mut Errors) -> Option<Frame> {
        let name: Option<String> = self.r#type.and_then(|name| serde_json::from_str(name.get()).ok());
        match name.as_deref() {
            Some("send") => self.publish(Kind::Topic, errors),
            Some("notify") => self.publish(Kind::Broadcast, errors),
            Some("credit") => self.credit(errors),
            Some("ack") => Some(Frame::Settle { receipts: self.receipts(errors)?, how: How::Ack }),
            Some("nack") => {
                let how = self.nack(errors);
                Some(Frame::Settle { receipts: self.receipts(errors)?, how })
            }
            _ => {
                let what = if self.r#type.is_none() { "is required: " } else { "must be " };
                errors.add("/type", format!("{what}send, notify, credit, ack or nack"));
                None
            }
        }
    }

    fn publish(&self, kind: Kind, errors: &mut Errors) -> Option<Frame> {
        if self.messages.is_some_and(|messages| !messages.get().starts_with('[')) {
            errors.add("/messages", "must be an array of messages");
            return None;
        }
        let traceparent: Option<String> = self.traceparent.and_then(|text| serde_json::from_str(text.get()).ok());
        let traceparent = traceparent.and_then(|text| parse_traceparent(&text));
        Some(Frame::Publish { kind, several: self.messages.map(ToOwned::to_owned), traceparent })
    }

    fn credit(&self, errors: &mut Errors) -> Option<Frame> {
        let credit = self.credit.and_then(|credit| credit.get().parse().ok());
        match credit.filter(|credit| (1..=CREDIT_MAX).contains(credit)) {
            Some(credit) => Some(Frame::Credit(credit)),
            None => {
                errors.add("/credit", format!("must be a whole number, 1 to {CREDIT_MAX}"));
                None
            }
        }
    }

    fn nack(&self, errors: &mut Errors) -> How {
        let delay_s = self.delay_s.map_or(Some(0), |delay| delay.get().parse().ok());
        let delay_s = delay_s.filter(|delay| *delay <= settle::DELAY_S_MAX).unwrap_or_else(|| {
            errors.add("/delay_s", format!("must be a whole number, 0 to {}", settle::DELAY_S_MAX));
            0
        });
        match self.dead.map(RawValue::get) {
            None | Some("false") => How::Nack(delay_s),
            Some("true") => How::Reject,
            Some(_) => {
                errors.add("/dead", "must be true or false");
                How::Reject
            }
        }
    }

    /// The receipts, each once: the same one twice settles once.
    fn receipts(&self, errors: &mut Errors) -> Option<Vec<String>> {
        let Some(receipts) = self.receipts else {
            errors.add("/receipts", "is required");
            return None;
        };
        match serde_json::from_str::<Vec<String>>(receipts.get()) {
            Ok(mut receipts) => {
                let mut seen = std::collections::HashSet::with_capacity(receipts.len());
                receipts.retain(|receipt| seen.insert(receipt.clone()));
                Some(receipts)
            }
            Err(_) => {
                errors.add("/receipts", "must be an array of strings");
                None
            }
        }
    }
}

/// Writes what a client is told.
impl Outgoing {
    /// A message; `false` when it is none: an inbox holds nothing else.
    pub(super) fn message(&mut self, delivery: &Delivery, receipt: &str) -> bool {
        let Payload::Message(message) = &delivery.payload else { return false };
        // The envelope is an object, ready rendered: its members stand between its braces.
        let members = &message.envelope[1..message.envelope.len() - 1];
        let mut digits = itoa::Buffer::new();
        self.text(&[
            br#"{"type":"message","#,
            members,
            br#","receipt":""#,
            receipt.as_bytes(),
            br#"","deliveries":"#,
            digits.format(delivery.deliveries).as_bytes(),
            b"}",
        ]);
        true
    }

    /// What was sent is durable. `ids` are JSON strings, separated by commas.
    pub(super) fn accepted(&mut self, reference: Option<&RawValue>, accepted: usize, duplicates: usize, ids: &str) {
        let reference = reference.map_or("null", RawValue::get);
        let counts = format!(r#","accepted":{accepted},"duplicates":{duplicates},"ids":["#);
        self.text(&[br#"{"type":"accepted","ref":"#, reference.as_bytes(), counts.as_bytes(), ids.as_bytes(), b"]}"]);
    }

    /// So many receipts were valid; these were not, or no longer.
    pub(super) fn settled(&mut self, reference: Option<&RawValue>, settled: usize, unknown: &[String]) {
        let unknown = serde_json::to_string(unknown).expect("strings are JSON");
        let settled = format!(r#"{{"type":"settled","settled":{settled},"unknown":{unknown}"#);
        self.with_reference(&settled, reference);
    }

    /// A frame could not be carried out.
    pub(super) fn error(&mut self, reference: Option<&RawValue>, problem: &Problem, request_id: &str) {
        let mut text = String::from(r#"{"type":"error","problem":"#);
        text.push_str(&String::from_utf8_lossy(&problem.to_json(request_id)));
        if let Some((_, seconds)) = problem.headers().into_iter().find(|(name, _)| *name == "retry-after") {
            text.push_str(r#","retry_after_s":"#);
            text.push_str(&seconds);
        }
        self.with_reference(&text, reference);
    }

    fn with_reference(&mut self, text: &str, reference: Option<&RawValue>) {
        match reference {
            Some(reference) => self.text(&[text.as_bytes(), br#","ref":"#, reference.get().as_bytes(), b"}"]),
            None => self.text(&[text.as_bytes(), b"}"]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pointers(text: &str) -> Vec<String> {
        let refused = read(text).expect_err("it is wrong");
        let body: serde_json::Value = serde_json::from_slice(&refused.problem.to_json("")).expect("JSON");
        let errors = body["errors"].as_array().cloned().unwrap_or_default();
        errors.iter().map(|error| error["pointer"].as_str().unwrap_or_default().to_owned()).collect()
    }

    #[test]
    fn every_kind_of_frame_is_read() {
        let frame = |text: &str| read(text).expect("it is a frame").1;
        assert!(matches!(frame(r#"{"type":"credit","credit":10000}"#), Frame::Credit(10_000)));
        assert!(matches!(
            frame(r#"{"type":"send","topic":"a","message":1}"#),
            Frame::Publish { kind: Kind::Topic, several: None, .. }
        ));
        assert!(matches!(
            frame(r#"{"messages":[{"message":1}],"type":"notify"}"#),
            Frame::Publish { kind: Kind::Broadcast, several: Some(_), .. }
        ));
        for (text, wanted) in [
            (r#"{"type":"ack","receipts":["a","b","a"]}"#, How::Ack),
            (r#"{"type":"nack","receipts":["a","b"]}"#, How::Nack(0)),
            (r#"{"type":"nack","receipts":["a","b"],"delay_s":3}"#, How::Nack(3)),
            (r#"{"type":"nack","receipts":["a","b"],"delay_s":3,"dead":true}"#, How::Reject),
        ] {
            let Frame::Settle { receipts, how } = frame(text) else { panic!("{text}") };
            assert_eq!((receipts, how), (vec!["a".to_owned(), "b".to_owned()], wanted));
        }
    }

    #[test]
    fn a_reference_comes_back_as_it_was() {
        let (reference, _) = read(r#"{"type":"credit","credit":1,"ref": {"a":1.0} }"#).expect("a frame");
        assert_eq!(reference.expect("it has one").get(), r#"{"a":1.0}"#);
        let refused = read(r#"{"type":"credit","ref":7}"#).expect_err("no credit");
        assert_eq!(refused.reference.expect("it has one").get(), "7");
    }

    #[test]
    fn everything_wrong_is_named() {
        for (text, wanted) in [
            ("{}", vec!["/type"]),
            (r#"{"type":"sing"}"#, vec!["/type"]),
            (r#"{"type":7}"#, vec!["/type"]),
            (r#"{"type":"credit","credit":0}"#, vec!["/credit"]),
            (r#"{"type":"credit","credit":10001}"#, vec!["/credit"]),
            (r#"{"type":"credit","credit":"1"}"#, vec!["/credit"]),
            (r#"{"type":"ack"}"#, vec!["/receipts"]),
            (r#"{"type":"ack","receipts":[1]}"#, vec!["/receipts"]),
            (r#"{"type":"nack","receipts":7,"delay_s":-1,"dead":1}"#, vec!["/delay_s", "/dead", "/receipts"]),
            (r#"{"type":"send","messages":{}}"#, vec!["/messages"]),
            ("[]", vec![""]),
            ("7", vec![""]),
        ] {
            assert_eq!(pointers(text), wanted, "{text}");
        }
        let refused = read("{").expect_err("it is not JSON");
        assert_eq!(refused.problem.code(), crate::http::error::Code::InvalidJson);
    }
}
