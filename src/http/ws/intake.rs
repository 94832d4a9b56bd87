//! The incoming bytes of a connection, within the client's share of the memory for large requests.
//!
//! Small frames are free. A frame that grows takes room as [`Budget`] gives it; until it does, the peer waits. What it
//! holds it holds for a bounded time: a frame that comes too slowly, or gets too long, ends the connection. (`actix_ws`
//! looks at a frame's length when all of it is there.)

use std::cell::{Cell, RefCell};
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

/// How long a frame may get on the first room that it is given; most never need the second.
const FIRST_ROOM_BYTES: usize = 1 << 20;

/// Header and mask of a short frame from a client (RFC 6455, section 5.2).
const SHORT_HEADER_BYTES: usize = 6;

/// See the module. Shared by the stream that reads and the session that is handed whole frames.
#[derive(Clone)]
pub(super) struct Intake {
    inner: Rc<Inner>,
}

struct Inner {
    budget: Arc<Budget>,
    client: ClientId,
    /// Longest frame.
    frame_bytes_max: usize,
    /// Bytes that were read since the last whole frame, and when the first of them came.
    pending: Cell<usize>,
    since: Cell<Instant>,
    room: RefCell<Option<Room>>,
}

/// What a growing frame holds, and how long it may get on it.
struct Room {
    bytes: usize,
    room: BodyRoom,
}

/// Why a connection is not read any further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// The frame is longer than frames may be.
    TooLong,
    /// The frame stopped coming, or comes too slowly.
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

impl Intake {
    pub(super) fn new(budget: Arc<Budget>, client: ClientId, frame_bytes_max: usize) -> Self {
        let (pending, since, room) = (Cell::new(0), Cell::new(Instant::now()), RefCell::default());
        Self { inner: Rc::new(Inner { budget, client, frame_bytes_max, pending, since, room }) }
    }

    /// A frame is whole: the room that it took is the caller's now, to be held for as long as the frame is.
    pub(super) fn take_room(&self) -> Option<BodyRoom> {
        self.inner.pending.set(0);
        self.inner.room.take().map(|held| held.room)
    }

    /// A ping or pong came, with so many bytes in it: it is no part of the frame that may be growing around it.
    pub(super) fn note_control(&self, bytes: usize) {
        let pending = self.inner.pending.get().saturating_sub(SHORT_HEADER_BYTES + bytes);
        self.inner.pending.set(pending);
    }

    /// The payload, waiting for room where a frame needs it.
    pub(super) fn meter(&self, payload: Payload) -> Pin<Box<dyn Stream<Item = Result<Bytes, PayloadError>>>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(stream::unfold((payload, inner), |(mut payload, inner)| async move {
            let chunk = if inner.room.borrow().is_some() {
                let next = tokio::time::timeout(CHUNK_TIMEOUT, payload.next()).await;
                next.unwrap_or_else(|_| Some(Err(Stop::TooSlow.error())))?
            } else {
                payload.next().await?
            };
            let chunk = match chunk {
                Ok(chunk) => inner.admit(chunk.len()).await.map(|()| chunk).map_err(Stop::error),
                Err(error) => Err(error),
            };
            Some((chunk, (payload, inner)))
        }))
    }
}

impl Inner {
    async fn admit(&self, bytes: usize) -> Result<(), Stop> {
        if self.pending.get() == 0 {
            self.since.set(Instant::now());
        }
        let pending = self.pending.get() + bytes;
        self.pending.set(pending);
        // A sixteenth for the headers of its fragments, and what came with its end belongs to the next.
        if pending > self.frame_bytes_max + self.frame_bytes_max / 16 + FREE_BYTES {
            return Err(Stop::TooLong);
        }
        let held = self.room.borrow().as_ref().map(|room| room.bytes);
        if held.is_some() && self.since.get().elapsed() > slowest(pending) {
            return Err(Stop::TooSlow);
        }
        if pending <= held.unwrap_or(FREE_BYTES) {
            return Ok(());
        }
        // Most never need more than the first; the second is as much as the longest frame takes.
        let bytes = if pending <= FIRST_ROOM_BYTES { FIRST_ROOM_BYTES } else { usize::MAX };
        // Given back before more is asked for: two frames that each hold some would wait for one another, and a frame that
        // takes the client's whole share for itself. What those that wait have read is bounded by their places.
        let place = match self.room.take() {
            Some(_) => Some(self.budget.grow(&self.client).ok_or(Stop::NoRoom)?),
            None => None,
        };
        let room = self.budget.body(&self.client, bytes).await.map_err(|_| Stop::NoRoom)?;
        drop(place);
        self.room.replace(Some(Room { bytes, room }));
        // The wait was not the peer's.
        self.since.set(Instant::now());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[actix_rt::test]
    async fn a_growing_frame_takes_room_and_a_whole_one_hands_it_over() {
        let client = ClientId::parse("a").expect("test client");
        let intake = Intake::new(Arc::new(Budget::new(16 << 20)), client, 16 << 20);
        intake.inner.admit(FREE_BYTES).await.expect("free");
        assert!(intake.inner.room.borrow().is_none());
        intake.inner.admit(1).await.expect("there is room");
        intake.inner.admit(1).await.expect("there is room");
        assert!(intake.take_room().is_some());
        intake.inner.admit(FREE_BYTES).await.expect("free again");
        assert!(intake.take_room().is_none());
    }

    #[actix_rt::test]
    async fn frames_that_grow_to_the_greatest_length_side_by_side_take_turns() {
        let client = ClientId::parse("a").expect("test client");
        let budget = Arc::new(Budget::new(16 << 20));
        let grow = async || {
            let intake = Intake::new(Arc::clone(&budget), client.clone(), 16 << 20);
            for _ in 0..16 {
                intake.inner.admit(1 << 20).await.expect("there is room in turn");
                // The others come as far.
                tokio::task::yield_now().await;
            }
            drop(intake.take_room().expect("it held some"));
        };
        let began = std::time::Instant::now();
        futures_util::join!(grow(), grow(), grow());
        assert!(began.elapsed() < std::time::Duration::from_secs(5), "nobody waited for itself or another");
    }

    #[actix_rt::test]
    async fn a_frame_without_end_is_stopped_and_control_frames_are_not_part_of_it() {
        let client = ClientId::parse("a").expect("test client");
        let intake = Intake::new(Arc::new(Budget::new(64 << 10)), client, 64 << 10);
        // Years of pongs.
        for _ in 0..100_000 {
            intake.inner.admit(SHORT_HEADER_BYTES).await.expect("is short");
            intake.note_control(0);
        }
        assert!(intake.inner.room.borrow().is_none());
        let mut read = 0;
        let stopped = loop {
            match intake.inner.admit(1 << 10).await {
                Ok(()) => read += 1 << 10,
                Err(stop) => break stop,
            }
        };
        assert_eq!(stopped, Stop::TooLong);
        assert!((64 << 10..=136 << 10).contains(&read), "{read}");
        assert_eq!(Stop::of(&Error::other(stopped.error())), Some(Stop::TooLong));
        assert_eq!(Stop::of(&Error::other("another")), None);
    }

    #[actix_rt::test]
    async fn only_a_few_frames_wait_for_more_room_at_once() {
        let client = ClientId::parse("a").expect("test client");
        let budget = Arc::new(Budget::new(16 << 20));
        let frames: Vec<_> = (0..9).map(|_| Intake::new(Arc::clone(&budget), client.clone(), 16 << 20)).collect();
        for frame in &frames {
            frame.inner.admit(FREE_BYTES + 1).await.expect("there is room for nine");
        }
        let grown = frames.into_iter().map(|frame| async move { frame.inner.admit(1 << 20).await });
        let grown = futures_util::future::join_all(grown).await;
        assert_eq!(grown.iter().filter(|grown| **grown == Err(Stop::NoRoom)).count(), 1);
        assert_eq!(grown.iter().filter(|grown| grown.is_ok()).count(), 8);
    }
}
