//! From the body of a send to messages: all are checked first, every mistake is named, and the values of `message` pass
//! byte for byte (contract, sections 3 and 4).
//!
//! A [`Batch`] is fed a JSON body, or NDJSON line by line as it comes in: a line's bytes are let go as soon as its
//! envelope is made.

use std::fmt;
use std::io::BufRead as _;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::body::not_json;
use super::error::{Errors, Problem};
use crate::client::ClientId;
use crate::envelope::{Draft, Message};
use crate::intake::{self, Item, ItemVisitor, Kind, Members, Mistake};
use crate::time::Timestamp;

/// Most messages in one request. Each costs some hundred bytes besides its own, so bytes alone bound nothing.
pub(crate) const MESSAGES_MAX: usize = 100_000;

/// Messages being read and checked.
pub(crate) struct Batch {
    sender: ClientId,
    kind: Kind,
    now: Timestamp,
    traceparent: Option<Box<str>>,
    message_bytes_max: usize,
    /// Where the messages stand in what the caller sent.
    under: &'static str,
    seen: usize,
    messages: Vec<Message>,
    ids: String,
    errors: Errors,
    /// What refuses the whole request with another answer than 422.
    refusal: Option<Problem>,
}

/// A batch in which nothing was wrong.
#[derive(Debug)]
pub(crate) struct Checked {
    /// In the order in which they were sent; never empty.
    pub(crate) messages: Vec<Message>,
    /// Their ids as JSON strings, separated by commas.
    pub(crate) ids: String,
}

impl Batch {
    pub(crate) fn new(
        sender: ClientId,
        kind: Kind,
        now: Timestamp,
        traceparent: Option<Box<str>>,
        message_bytes_max: usize,
    ) -> Self {
        Self {
            sender,
            kind,
            now,
            traceparent,
            message_bytes_max,
            under: "",
            seen: 0,
            messages: Vec::new(),
            ids: String::new(),
            errors: Errors::default(),
            refusal: None,
        }
    }

    /// Says that the messages stand under this JSON pointer in what the caller sent.
    pub(crate) fn is_under(&mut self, pointer: &'static str) {
        self.under = pointer;
    }

    /// Reads a whole JSON body: one message or an array of them.
    ///
    /// # Errors
    /// When it is not JSON, or refused as a whole; what is wrong inside is for [`Batch::finish`].
    pub(crate) fn json(&mut self, body: &[u8]) -> Result<(), Problem> {
        let body = super::body::utf8(body)?;
        let mut deserializer = serde_json::Deserializer::from_str(body);
        let read = Body(self).deserialize(&mut deserializer).and_then(|()| deserializer.end());
        match (read, self.refusal.take()) {
            (_, Some(refusal)) => Err(refusal),
            (Err(error), None) => Err(not_json(&error)),
            (Ok(()), None) => Ok(()),
        }
    }

    /// Reads one line of NDJSON. Blank lines are none.
    ///
    /// # Errors
    /// As [`Batch::json`].
    pub(crate) fn line(&mut self, line: &[u8]) -> Result<(), Problem> {
        let line = line.trim_ascii();
        if line.is_empty() {
            return Ok(());
        }
        let bad = |detail: String| Problem::invalid_json(format!("message {} is not JSON: {detail}", self.seen));
        let line = std::str::from_utf8(line).map_err(|_| bad("it is not UTF-8".into()))?;
        let item = serde_json::from_str(line).map_err(|error| bad(error.to_string()))?;
        self.add(Some(self.seen), item);
        match self.refusal.take() {
            Some(refusal) => Err(refusal),
            None => Ok(()),
        }
    }

    /// The messages, when nothing was wrong.
    ///
    /// # Errors
    /// 422 with every mistake.
    pub(crate) fn finish(mut self) -> Result<Checked, Problem> {
        if self.seen == 0 {
            self.errors.add(self.under, "must have at least one message");
        }
        self.errors.into_result()?;
        self.ids.pop(); // the last comma
        Ok(Checked { messages: self.messages, ids: self.ids })
    }

    /// Checks one message; `index` is its place in the request, when there can be several.
    fn add(&mut self, index: Option<usize>, item: Item<'_>) {
        self.seen += 1;
        if self.seen > MESSAGES_MAX && self.errors.is_empty() {
            self.refuse(Problem::too_large(format!("a request takes at most {MESSAGES_MAX} messages; send several")));
            return;
        }
        let members = match item {
            Item::Object(members) => members,
            Item::NotAnObject => {
                let what = if index.is_some() { "must be an object" } else { "must be an object or an array of them" };
                self.wrong(index, "", what);
                return;
            }
        };
        if let Some(draft) = self.check(index, &members) {
            let message = Message::accept(&self.sender, draft, self.now);
            self.ids.push('"');
            for c in message.id.as_str().chars() {
                if matches!(c, '"' | '\\') {
                    self.ids.push('\\');
                }
                self.ids.push(c);
            }
            self.ids.push_str("\",");
            self.messages.push(message);
        }
    }

    fn check<'a>(&mut self, index: Option<usize>, members: &Members<'a>) -> Option<Draft<'a>> {
        let checked = intake::check(members, self.kind, self.message_bytes_max);
        let draft = checked.map_err(|mistakes| mistakes.into_iter().for_each(|mistake| self.note(index, mistake))).ok();
        if !self.errors.is_empty() || self.refusal.is_some() {
            // Nothing will be taken: no envelopes are needed any more, only the remaining mistakes.
            self.messages = Vec::new();
            self.ids = String::new();
            return None;
        }
        draft.map(|draft| Draft { traceparent: self.traceparent.clone(), ..draft })
    }

    fn note(&mut self, index: Option<usize>, mistake: Mistake) {
        let at = self.pointer(index, "message");
        match mistake {
            Mistake::Member { name, detail } => self.wrong(index, name, detail),
            Mistake::TooLarge { max, .. } => {
                self.refuse(Problem::too_large(format!("`message` at {at} must not be longer than {max} bytes")));
            }
            Mistake::TooDeep => {
                self.refuse(Problem::invalid_json(format!("`message` at {at} is nested too deep to be read as JSON")));
            }
        }
    }

    fn pointer(&self, index: Option<usize>, name: &str) -> String {
        format!("{}{}", self.under, pointer(index, name))
    }

    fn wrong(&mut self, index: Option<usize>, name: &str, detail: impl Into<String>) {
        self.errors.add(self.pointer(index, name), detail);
    }

    fn refuse(&mut self, problem: Problem) {
        self.refusal.get_or_insert(problem);
    }
}

fn pointer(index: Option<usize>, name: &str) -> String {
    match (index, name) {
        (Some(index), "") => format!("/{index}"),
        (Some(index), name) => format!("/{index}/{name}"),
        (None, "") => String::new(),
        (None, name) => format!("/{name}"),
    }
}

/// Reads a body into a batch as it is parsed, element by element.
struct Body<'b>(&'b mut Batch);

impl<'de> DeserializeSeed<'de> for Body<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// A body that is neither an array nor an object.
macro_rules! scalar {
    ($($method:ident: $type:ty),*) => { $(
        fn $method<E>(self, _: $type) -> Result<(), E> {
            self.0.add(None, Item::NotAnObject);
            Ok(())
        }
    )* };
}

impl<'de> Visitor<'de> for Body<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(item) = seq.next_element::<Item<'de>>()? {
            self.0.add(Some(self.0.seen), item);
            if self.0.refusal.is_some() {
                return Ok(()); // the rest changes nothing; the trailing-characters error is not looked at
            }
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<(), A::Error> {
        self.0.add(None, ItemVisitor.visit_map(map)?);
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        self.0.add(None, Item::NotAnObject);
        Ok(())
    }

    scalar!(visit_bool: bool, visit_i64: i64, visit_u64: u64, visit_f64: f64, visit_str: &str);
}

/// Splits a stream into lines, holding back only the one that is not complete yet.
#[derive(Default)]
pub(crate) struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    /// Calls `line` with each line that `chunk` completes, without its line feed.
    pub(crate) fn feed(
        &mut self,
        mut chunk: &[u8],
        mut line: impl FnMut(&[u8]) -> Result<(), Problem>,
    ) -> Result<(), Problem> {
        loop {
            // The standard library's only public way to its memchr.
            let length = (&mut &*chunk).skip_until(b'\n').expect("memory can be read");
            let (head, tail) = chunk.split_at(length);
            let Some(head) = head.strip_suffix(b"\n") else {
                self.rest.extend_from_slice(head);
                return Ok(());
            };
            if self.rest.is_empty() {
                line(head)?;
            } else {
                self.rest.extend_from_slice(head);
                line(&self.rest)?;
                self.rest.clear();
            }
            chunk = tail;
        }
    }

    /// The last line, when no line feed ended it.
    pub(crate) fn finish(self, mut line: impl FnMut(&[u8]) -> Result<(), Problem>) -> Result<(), Problem> {
        line(&self.rest)
    }
}

#[cfg(test)]
#[path = "batch_tests.rs"]
mod tests;
