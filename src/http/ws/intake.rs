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
    rooms: RefCell<Vec<BodyRoom>>,
}

impl Intake {
    pub(super) fn new(budget: Arc<Budget>, client: ClientId) -> Self {
        let inner = Inner { budget, client, pending: Cell::new(0), rooms: RefCell::default() };
        Self { inner: Rc::new(inner) }
    }

    /// A frame is whole: the room that it took is the caller's now, to be held for as long as the frame is.
    pub(super) fn take_rooms(&self) -> Vec<BodyRoom> {
        self.inner.pending.set(0);
        self.inner.rooms.take()
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
        let rooms = self.rooms.borrow().len();
        let needed = match pending {
            0..=FREE_BYTES => return Ok(()),
            _ if pending <= FIRST_ROOM_BYTES => (rooms < 1).then_some(FIRST_ROOM_BYTES),
            // As much as the longest frame takes.
            _ => (rooms < 2).then_some(usize::MAX),
        };
        if let Some(needed) = needed {
            let room = self.budget.body(&self.client, needed).await;
            self.rooms.borrow_mut().push(room.map_err(|problem| {
                PayloadError::Io(std::io::Error::new(std::io::ErrorKind::OutOfMemory, problem.to_string()))
            })?);
        }
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
        assert!(intake.inner.rooms.borrow().is_empty());
        intake.inner.admit(1).await.expect("there is room");
        intake.inner.admit(1).await.expect("there is room");
        assert_eq!(intake.take_rooms().len(), 1);
        intake.inner.admit(FREE_BYTES).await.expect("free again");
        assert!(intake.take_rooms().is_empty());
    }
}
