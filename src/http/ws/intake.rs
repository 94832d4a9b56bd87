//! The incoming bytes of a connection, within the client's share of the memory for large requests.
//!
//! `actix_ws` looks at a frame when all of it is there, so the headers are read here first (RFC 6455, section 5.2): a
//! message that would be too long is refused before it is read, and a large one is read when [`Budget`] has room for it;
//! until then the peer waits. It holds its room for a bounded time, as a request's body does. Small ones, pings and pongs
//! are free.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{Error, ErrorKind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use actix_web::dev::Payload;
use actix_web::error::PayloadError;
use bytes::Bytes;
use futures_util::stream::{self, Stream, StreamExt as _};

use crate::client::ClientId;
use crate::http::body::{CHUNK_TIMEOUT, slowest};
use crate::http::budget::{BodyRoom, Budget, FREE_BYTES};

/// See the module. Shared by the stream that reads and the session that is handed whole messages.
#[derive(Clone)]
pub(super) struct Intake {
    inner: Rc<Inner>,
}

struct Inner {
    budget: Arc<Budget>,
    client: ClientId,
    reading: RefCell<Reading>,
    /// When the peer was last heard.
    heard: Cell<Instant>,
}

/// Why a connection is not read any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// The message is longer than messages may be.
    TooLong,
    /// A large message stopped coming, or comes too slowly.
    TooSlow,
    /// There is no room for it.
    NoRoom,
}

impl Stop {
    fn error(self) -> PayloadError {
        let (kind, text) = match self {
            Self::TooLong => (ErrorKind::FileTooLarge, "the frame is too long"),
            Self::TooSlow => (ErrorKind::TimedOut, "the frame comes too slowly"),
            Self::NoRoom => (ErrorKind::OutOfMemory, "too many large frames at once"),
        };
        PayloadError::Io(Error::new(kind, text))
    }

    /// Why, when `error` of the stream is one of these.
    pub(super) fn of(error: &Error) -> Option<Self> {
        // Wrapped by `actix_ws`.
        let Some(PayloadError::Io(error)) = error.get_ref()?.downcast_ref() else { return None };
        match error.kind() {
            ErrorKind::FileTooLarge => Some(Self::TooLong),
            ErrorKind::TimedOut => Some(Self::TooSlow),
            ErrorKind::OutOfMemory => Some(Self::NoRoom),
            _ => None,
        }
    }
}

/// How far the incoming frames are read.
struct Reading {
    /// Longest message.
    bytes_max: usize,
    /// The header that is being read, and how much of it is there: at most 2 bytes, 8 of length and 4 of mask.
    header: [u8; 14],
    header_bytes: usize,
    /// Bytes of the frame's payload that are still to come, and what kind of frame it is.
    left: u64,
    is_control: bool,
    is_last: bool,
    /// The message that the frame belongs to: bytes announced, bytes read, its room, and since when it has that.
    announced: u64,
    read: usize,
    room: Option<BodyRoom>,
    since: Instant,
    /// Whole messages; how many of them were taken; and the room of each that took some, until it is taken.
    whole: u64,
    taken: u64,
    rooms: VecDeque<(u64, BodyRoom)>,
}

impl Reading {
    fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            header: [0; 14],
            header_bytes: 0,
            left: 0,
            is_control: false,
            is_last: true,
            announced: 0,
            read: 0,
            room: None,
            since: Instant::now(),
            whole: 0,
            taken: 0,
            rooms: VecDeque::new(),
        }
    }

    /// Reads on, to the end of `bytes` or to a message that needs room: then says how much.
    fn advance(&mut self, bytes: &mut &[u8]) -> Result<Option<usize>, Stop> {
        while let Some((first, rest)) = bytes.split_first() {
            if self.left > 0 {
                let here = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
                *bytes = &bytes[here..];
                self.left -= here as u64;
                if !self.is_control {
                    self.read += here;
                }
            } else {
                self.header[self.header_bytes] = *first;
                self.header_bytes += 1;
                *bytes = rest;
                let Some(length) = self.payload_length() else { continue };
                self.header_bytes = 0;
                self.left = length;
                // The opcodes from 8 on; the first bit says that it is the message's last frame.
                self.is_control = self.header[0] & 0x08 != 0;
                self.is_last = self.header[0] & 0x80 != 0;
                if !self.is_control
                    && let Some(needed) = self.announce(length)?
                {
                    return Ok(Some(needed));
                }
            }
            if self.left == 0 {
                self.end_of_frame();
            }
        }
        Ok(None)
    }

    /// The length in the header; `None` while that is not complete.
    fn payload_length(&self) -> Option<u64> {
        let header = &self.header[..self.header_bytes];
        let second = *header.get(1)?;
        let extended = match second & 0x7f {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        let mask = if second & 0x80 == 0 { 0 } else { 4 };
        let extension = header.get(2..2 + extended)?;
        if header.len() < 2 + extended + mask {
            return None;
        }
        let length = extension.iter().fold(0, |length, byte| length << 8 | u64::from(*byte));
        Some(if extended == 0 { u64::from(second & 0x7f) } else { length })
    }

    /// Another frame of the message. Says how much room that needs, when it has none.
    fn announce(&mut self, length: u64) -> Result<Option<usize>, Stop> {
        let is_whole = self.announced == 0 && self.is_last;
        self.announced = self.announced.saturating_add(length);
        let announced = usize::try_from(self.announced).unwrap_or(usize::MAX);
        if announced > self.bytes_max {
            return Err(Stop::TooLong);
        }
        if announced <= FREE_BYTES || self.room.is_some() {
            return Ok(None);
        }
        // One in fragments may get as long as it may: room is asked for once, or two could wait for one another.
        Ok(Some(if is_whole { announced } else { self.bytes_max }))
    }

    fn end_of_frame(&mut self) {
        if self.is_control || !self.is_last {
            return;
        }
        if let Some(room) = self.room.take() {
            self.rooms.push_back((self.whole, room));
        }
        self.whole += 1;
        (self.announced, self.read) = (0, 0);
    }

    fn is_too_slow(&self) -> bool {
        self.room.is_some() && self.since.elapsed() > slowest(self.read)
    }
}

impl Intake {
    pub(super) fn new(budget: Arc<Budget>, client: ClientId, message_bytes_max: usize) -> Self {
        let (reading, heard) = (RefCell::new(Reading::new(message_bytes_max)), Cell::new(Instant::now()));
        Self { inner: Rc::new(Inner { budget, client, reading, heard }) }
    }

    /// The next whole message is the caller's now: so is the room that it took, to be held for as long as the message is.
    pub(super) fn take_room(&self) -> Option<BodyRoom> {
        let mut reading = self.inner.reading.borrow_mut();
        let number = reading.taken;
        reading.taken += 1;
        let is_next = reading.rooms.front().is_some_and(|(of, _)| *of == number);
        if is_next { reading.rooms.pop_front().map(|(_, room)| room) } else { None }
    }

    /// When the peer was last heard, be it in the middle of a message.
    pub(super) fn heard(&self) -> Instant {
        self.inner.heard.get()
    }

    /// The payload, waiting for room where a message needs it.
    pub(super) fn meter(&self, payload: Payload) -> Pin<Box<dyn Stream<Item = Result<Bytes, PayloadError>>>> {
        let metered = Metered { payload, inner: Rc::clone(&self.inner), rest: Bytes::new(), needed: None };
        Box::pin(stream::unfold(metered, |mut metered| async move {
            let next = metered.next().await?;
            Some((next, metered))
        }))
    }
}

/// An incoming stream that waits for room.
struct Metered<S> {
    payload: S,
    inner: Rc<Inner>,
    /// What was read behind the header of a message that needs room.
    rest: Bytes,
    needed: Option<usize>,
}

impl<S: Stream<Item = Result<Bytes, PayloadError>> + Unpin> Metered<S> {
    async fn next(&mut self) -> Option<Result<Bytes, PayloadError>> {
        if let Some(needed) = self.needed.take() {
            // What came before the message has been handed over: a room that it holds comes back without this one.
            let Ok(room) = self.inner.budget.body(&self.inner.client, needed).await else {
                return Some(Err(Stop::NoRoom.error()));
            };
            let mut reading = self.inner.reading.borrow_mut();
            (reading.room, reading.since) = (Some(room), Instant::now());
        }
        let mut chunk = std::mem::take(&mut self.rest);
        if chunk.is_empty() {
            let has_room = self.inner.reading.borrow().room.is_some();
            let next = if has_room {
                let next = tokio::time::timeout(CHUNK_TIMEOUT, self.payload.next()).await;
                next.unwrap_or_else(|_| Some(Err(Stop::TooSlow.error())))?
            } else {
                self.payload.next().await?
            };
            match next {
                Ok(next) => chunk = next,
                Err(error) => return Some(Err(error)),
            }
            self.inner.heard.set(Instant::now());
        }
        let mut behind = &chunk[..];
        let mut reading = self.inner.reading.borrow_mut();
        match reading.advance(&mut behind) {
            Ok(_) if reading.is_too_slow() => return Some(Err(Stop::TooSlow.error())),
            Ok(needed) => self.needed = needed,
            Err(stop) => return Some(Err(stop.error())),
        }
        let read = chunk.len() - behind.len();
        self.rest = chunk.split_off(read);
        Some(Ok(chunk))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: u8 = 1;
    const PONG: u8 = 10;

    /// A masked frame's header.
    fn header(opcode: u8, is_last: bool, length: usize) -> Vec<u8> {
        let mut header = vec![opcode | if is_last { 0x80 } else { 0 }];
        match length {
            0..126 => header.push(0x80 | length as u8),
            126..65_536 => {
                header.push(0x80 | 126);
                header.extend((length as u16).to_be_bytes());
            }
            _ => {
                header.push(0x80 | 127);
                header.extend((length as u64).to_be_bytes());
            }
        }
        header.extend([1, 2, 3, 4]);
        header
    }

    fn frame(opcode: u8, is_last: bool, length: usize) -> Vec<u8> {
        let mut frame = header(opcode, is_last, length);
        frame.resize(frame.len() + length, 7);
        frame
    }

    /// Reads all pieces of a stream as a session does: what is whole is taken, and its room given back. Says of each
    /// message whether it had some; and why it stopped, if it did.
    async fn read(budget: &Arc<Budget>, bytes_max: usize, pieces: Vec<Bytes>) -> (Vec<bool>, Option<Stop>) {
        let intake = Intake::new(Arc::clone(budget), ClientId::parse("a").expect("test client"), bytes_max);
        let payload = stream::iter(pieces.into_iter().map(Ok));
        let mut metered = Metered { payload, inner: Rc::clone(&intake.inner), rest: Bytes::new(), needed: None };
        let mut rooms = Vec::new();
        while let Some(next) = metered.next().await {
            if let Err(error) = next {
                return (rooms, Stop::of(&Error::other(error)));
            }
            let whole = intake.inner.reading.borrow().whole;
            rooms.extend((rooms.len() as u64..whole).map(|_| intake.take_room().is_some()));
            // Others read meanwhile.
            tokio::task::yield_now().await;
        }
        (rooms, None)
    }

    fn pieces(bytes: &[u8], length: usize) -> Vec<Bytes> {
        bytes.chunks(length).map(Bytes::copy_from_slice).collect()
    }

    #[actix_rt::test]
    async fn each_message_has_the_room_that_it_took() {
        let budget = Arc::new(Budget::new(16 << 20));
        let mut stream = frame(TEXT, true, FREE_BYTES);
        stream.extend(frame(TEXT, true, FREE_BYTES + 1));
        stream.extend(frame(PONG, true, 125));
        stream.extend(frame(TEXT, true, 0));
        // In fragments, with a pong between.
        stream.extend(frame(TEXT, false, FREE_BYTES));
        stream.extend(frame(PONG, true, 0));
        stream.extend(frame(0, true, 200));
        stream.extend(frame(TEXT, true, 130));
        // However it is cut.
        for piece in [1, 7, 4096, stream.len()] {
            let read = read(&budget, 16 << 20, pieces(&stream, piece)).await;
            assert_eq!(read, (vec![false, true, false, true, false], None), "in pieces of {piece}");
        }
    }

    #[actix_rt::test]
    async fn the_longest_messages_take_turns_one_behind_the_other_and_side_by_side() {
        let budget = Arc::new(Budget::new(16 << 20));
        let long = frame(TEXT, true, 16 << 20);
        let fragments = [frame(TEXT, false, 1 << 20), frame(0, true, 15 << 20)].concat();
        // No piece ends where a message does.
        let both = pieces(&[long, fragments].concat(), (1 << 20) - 1000);
        let began = Instant::now();
        let read = || read(&budget, 16 << 20, both.clone());
        let (a, b, c) = futures_util::join!(read(), read(), read());
        for rooms in [a, b, c] {
            assert_eq!(rooms, (vec![true, true], None));
        }
        assert!(began.elapsed() < std::time::Duration::from_secs(5), "nobody waited for itself or another");
    }

    #[actix_rt::test]
    async fn what_would_be_too_long_is_refused_before_it_is_read() {
        let budget = Arc::new(Budget::new(1 << 20));
        let stopped = async |bytes: &[u8]| read(&budget, 1 << 20, vec![Bytes::copy_from_slice(bytes)]).await;
        assert_eq!(stopped(&header(TEXT, true, 1 << 40)).await, (vec![], Some(Stop::TooLong)));
        let fragment = frame(TEXT, false, 1 << 20);
        assert_eq!(stopped(&[&fragment[..], &header(0, true, 0)].concat()).await, (vec![true], None));
        assert_eq!(stopped(&[&fragment[..], &header(0, true, 1)].concat()).await, (vec![], Some(Stop::TooLong)));
        assert_eq!(Stop::of(&Error::other("another")), None);
    }

    #[actix_rt::test]
    async fn small_messages_are_free_however_many() {
        let budget = Arc::new(Budget::new(1 << 20));
        let small = pieces(&frame(TEXT, true, 100).repeat(100_000), 100_000);
        assert_eq!(read(&budget, 1 << 20, small).await, (vec![false; 100_000], None));
    }
}
