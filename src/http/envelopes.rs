//! The body of `GET /receive`: envelopes as they are, joined, with receipt and deliveries put in before each last brace.
//!
//! A large batch is written piece by piece as the caller reads it, and is let go when the caller stops reading.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use actix_web::body::{BodySize, BoxBody, MessageBody};
use bytes::{BufMut, Bytes, BytesMut};

use super::budget::{AnswerNote, FREE_BYTES};
use crate::broker::Pulled;

/// Bytes written in one piece, about.
const PIECE_BYTES: usize = 64 << 10;

/// How long a caller may read nothing, and how long it may take in all, in such steps.
const STALL: Duration = Duration::from_secs(30);
const STALLS_IN_ALL: usize = 20;

const HEAD: &[u8] = b"{\"messages\":[";
const TAIL: &[u8] = b"]}";

/// The body for these messages. `note` is told the bytes of a large one, which are counted until it is sent.
pub(crate) fn body(pulled: Vec<Pulled>, note: impl FnOnce(usize) -> AnswerNote) -> BoxBody {
    let commas = pulled.len().saturating_sub(1);
    let size = HEAD.len() + TAIL.len() + commas + pulled.iter().map(size_of_one).sum::<usize>();
    let mut unsent = Unsent { head: Some(HEAD), messages: pulled.into_iter(), first: true, pieces: 0, _note: None };
    if size <= FREE_BYTES {
        return BoxBody::new(unsent.piece(size).unwrap_or_default());
    }
    unsent._note = Some(note(size));
    let unsent = Rc::new(RefCell::new(Some(unsent)));
    let watch = actix_web::rt::spawn(let_go_when_stalled(Rc::downgrade(&unsent)));
    BoxBody::new(Large { size: size as u64, left: size, unsent, watch })
}

/// `,"receipt":"…","deliveries":n}`: what takes the place of the envelope's last brace.
fn suffix(pulled: &Pulled) -> String {
    match &pulled.receipt {
        Some(receipt) => {
            let receipt = serde_json::Value::String(receipt.0.clone());
            format!(r#","receipt":{receipt},"deliveries":{}}}"#, pulled.deliveries)
        }
        None => format!(r#","deliveries":{}}}"#, pulled.deliveries),
    }
}

fn size_of_one(pulled: &Pulled) -> usize {
    pulled.message.envelope.len() - 1 + suffix(pulled).len()
}

/// What is still to be sent.
struct Unsent {
    head: Option<&'static [u8]>,
    messages: std::vec::IntoIter<Pulled>,
    first: bool,
    pieces: usize,
    _note: Option<AnswerNote>,
}

impl Unsent {
    /// The next piece, of about `bytes`; `None` after the last.
    fn piece(&mut self, bytes: usize) -> Option<Bytes> {
        if self.head.is_none() && self.messages.as_slice().is_empty() {
            return None;
        }
        self.pieces += 1;
        let mut piece = BytesMut::with_capacity(bytes);
        piece.put_slice(self.head.take().unwrap_or_default());
        for pulled in self.messages.by_ref() {
            if !std::mem::take(&mut self.first) {
                piece.put_u8(b',');
            }
            let envelope = &pulled.message.envelope;
            piece.put_slice(&envelope[..envelope.len() - 1]);
            piece.put_slice(suffix(&pulled).as_bytes());
            if piece.len() >= bytes {
                break;
            }
        }
        if self.messages.as_slice().is_empty() {
            piece.put_slice(TAIL);
        }
        Some(piece.freeze())
    }
}

/// A large batch.
struct Large {
    size: u64,
    left: usize,
    /// `None` once it was let go.
    unsent: Rc<RefCell<Option<Unsent>>>,
    watch: actix_web::rt::task::JoinHandle<()>,
}

impl MessageBody for Large {
    type Error = io::Error;

    fn size(&self) -> BodySize {
        BodySize::Sized(self.size)
    }

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Bytes, Self::Error>>> {
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let piece = self.unsent.borrow_mut().as_mut().and_then(|unsent| unsent.piece(PIECE_BYTES));
        let Some(piece) = piece else {
            return Poll::Ready(Some(Err(io::Error::new(io::ErrorKind::TimedOut, "the caller read too slowly"))));
        };
        self.left = self.left.saturating_sub(piece.len());
        Poll::Ready(Some(Ok(piece)))
    }
}

impl Drop for Large {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

/// The connection does not ask for a piece while its peer takes none, so the body cannot notice by itself. Without this
/// a caller that asks for batches and reads none would hold them all.
async fn let_go_when_stalled(unsent: Weak<RefCell<Option<Unsent>>>) {
    let mut before = 0;
    for _ in 0..STALLS_IN_ALL {
        tokio::time::sleep(STALL).await;
        let Some(unsent) = unsent.upgrade() else { return };
        let pieces = unsent.borrow().as_ref().map_or(before, |unsent| unsent.pieces);
        if pieces == before {
            unsent.borrow_mut().take();
            return;
        }
        before = pieces;
    }
    if let Some(unsent) = unsent.upgrade() {
        unsent.borrow_mut().take();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures_util::future::poll_fn;

    use super::*;
    use crate::broker::Receipt;
    use crate::client::ClientId;
    use crate::envelope::{Draft, Message};
    use crate::http::budget::Budget;
    use crate::time::Timestamp;

    fn pulled(json: &str, receipt: Option<&str>) -> Pulled {
        let draft =
            Draft { id: None, topic: None, message: serde_json::from_str(json).expect("test JSON"), traceparent: None };
        let sender = ClientId::parse("a").expect("test client");
        let message = Arc::new(Message::accept(&sender, draft, Timestamp::from_millis(0)));
        Pulled { message, deliveries: 2, receipt: receipt.map(|receipt| Receipt(receipt.into())) }
    }

    async fn sent(messages: Vec<Pulled>) -> serde_json::Value {
        let budget = Arc::new(Budget::new(1 << 20));
        let client = ClientId::parse("a").expect("test client");
        let mut body = body(messages, |bytes| budget.answer(&client, bytes));
        let BodySize::Sized(size) = body.size() else { panic!("a size is known") };
        let mut all = Vec::new();
        while let Some(piece) = poll_fn(|cx| Pin::new(&mut body).poll_next(cx)).await {
            all.extend_from_slice(&piece.expect("it is read in time"));
        }
        assert_eq!(all.len() as u64, size);
        serde_json::from_slice(&all).expect("the body is JSON")
    }

    #[actix_rt::test]
    async fn none_one_and_several_are_one_json_object() {
        assert_eq!(sent(Vec::new()).await, serde_json::json!({"messages": []}));
        let body = sent(vec![pulled(r#"{"x":1}"#, Some("r\"1")), pulled("2", None)]).await;
        assert_eq!(body["messages"][0]["message"], serde_json::json!({"x": 1}));
        assert_eq!(body["messages"][0]["receipt"], "r\"1");
        assert_eq!(body["messages"][1]["deliveries"], 2);
        assert!(body["messages"][1].get("receipt").is_none());
    }

    #[actix_rt::test]
    async fn a_large_batch_is_written_in_pieces() {
        let json = format!("\"{}\"", "x".repeat(1000));
        let body = sent((0..500).map(|_| pulled(&json, Some("r"))).collect()).await;
        assert_eq!(body["messages"].as_array().map(Vec::len), Some(500));
    }
}
