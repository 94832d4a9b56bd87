//! The incoming bytes of a connection, within the client's share of the memory for large requests.
//!
//! Small frames are free. A frame that grows takes room as [`Budget`] gives it; until it does, the peer waits.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use actix_web::dev::Payload;
use actix_web::error::PayloadError;
use bytes::Bytes;
use futures_util::stream::{self, Stream, StreamExt as _};

use crate::client::ClientId;
use crate::http::budget::{BodyRoom, Budget, FREE_BYTES};

/// How long a frame may get on the first room that it is given; most never need the second.
const FIRST_ROOM_BYTES: usize = 1 << 20;

/// See the module. Shared by the stream that reads and the session that is handed whole frames.
#[derive(Clone)]
pub(super) struct Intake {
    inner: Rc<Inner>,
}

struct Inner {
    budget: Arc<Budget>,
    client: ClientId,
    /// Bytes that were read since the last whole frame.
    pending: Cell<usize>,
    room: RefCell<Option<Room>>,
}

/// What a growing frame holds, and how long it may get on it.
struct Room {
    bytes: usize,
    room: BodyRoom,
}

impl Intake {
    pub(super) fn new(budget: Arc<Budget>, client: ClientId) -> Self {
        let inner = Inner { budget, client, pending: Cell::new(0), room: RefCell::default() };
        Self { inner: Rc::new(inner) }
    }

    /// A frame is whole: the room that it took is the caller's now, to be held for as long as the frame is.
    pub(super) fn take_room(&self) -> Option<BodyRoom> {
        self.inner.pending.set(0);
        self.inner.room.take().map(|held| held.room)
    }

    /// The payload, waiting for room where a frame needs it.
    pub(super) fn meter(&self, payload: Payload) -> Pin<Box<dyn Stream<Item = Result<Bytes, PayloadError>>>> {
        let inner = Rc::clone(&self.inner);
        Box::pin(stream::unfold((payload, inner), |(mut payload, inner)| async move {
            let chunk = payload.next().await?;
            let chunk = match chunk {
                Ok(chunk) => inner.admit(chunk.len()).await.map(|()| chunk),
                Err(error) => Err(error),
            };
            Some((chunk, (payload, inner)))
        }))
    }
}

impl Inner {
    async fn admit(&self, bytes: usize) -> Result<(), PayloadError> {
        let pending = self.pending.get() + bytes;
        self.pending.set(pending);
        let held = self.room.borrow().as_ref().map_or(FREE_BYTES, |room| room.bytes);
        if pending <= held {
            return Ok(());
        }
        // Most never need more than the first; the second is as much as the longest frame takes.
        let bytes = if pending <= FIRST_ROOM_BYTES { FIRST_ROOM_BYTES } else { usize::MAX };
        // Given back before more is asked for: two frames that each hold some would wait for one another, and a frame that
        // takes the client's whole share for itself.
        self.room.take();
        let room = self.budget.body(&self.client, bytes).await.map_err(|problem| {
            PayloadError::Io(std::io::Error::new(std::io::ErrorKind::OutOfMemory, problem.to_string()))
        })?;
        self.room.replace(Some(Room { bytes, room }));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[actix_rt::test]
    async fn a_growing_frame_takes_room_and_a_whole_one_hands_it_over() {
        let client = ClientId::parse("a").expect("test client");
        let intake = Intake::new(Arc::new(Budget::new(16 << 20)), client);
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
            let intake = Intake::new(Arc::clone(&budget), client.clone());
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
}
