//! The outgoing bytes of a connection: frames are written one after the other into a buffer, which goes to the peer in
//! chunks. At most [`CHUNKS`] chunks wait for a slow peer; whoever has more to say waits with it.

use std::pin::Pin;
use std::task::{Context, Poll};

use actix_web::body::BoxBody;
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::stream::Stream;
use tokio::sync::mpsc;

/// Chunks on their way to the peer.
const CHUNKS: usize = 2;

/// A buffer as long as this takes no more messages.
const BUFFER_BYTES: usize = 64 << 10;

/// First byte of an unfragmented frame, by opcode (RFC 6455, section 5.2).
const TEXT: u8 = 0x81;
const CLOSE: u8 = 0x88;
const PING: u8 = 0x89;
const PONG: u8 = 0x8A;

/// Longest payload of a control frame (RFC 6455, section 5.5).
const CONTROL_BYTES_MAX: usize = 125;

/// Why a connection ends, as its close frame says it (RFC 6455, section 7.4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CloseCode {
    /// The peer closed.
    Normal = 1000,
    /// The backbone shuts down.
    GoingAway = 1001,
    /// The peer broke the protocol.
    ProtocolError = 1002,
    /// A text frame is not UTF-8.
    NotUtf8 = 1007,
    /// The client was deleted, or its credentials are none any more.
    Policy = 1008,
    /// A frame is too long.
    TooBig = 1009,
    /// Too much at once; later it may work.
    TryLater = 1013,
}

/// The writing side.
pub(super) struct Outgoing {
    buffer: BytesMut,
    chunks: mpsc::Sender<Bytes>,
}

/// The side that the connection reads.
pub(super) struct Body {
    chunks: mpsc::Receiver<Bytes>,
    _kept: Option<BoxBody>,
}

impl Outgoing {
    pub(super) fn new() -> (Self, Body) {
        let (sender, chunks) = mpsc::channel(CHUNKS);
        (Self { buffer: BytesMut::new(), chunks: sender }, Body { chunks, _kept: None })
    }

    /// Whether there is room for messages.
    pub(super) fn has_room(&self) -> bool {
        self.buffer.len() < BUFFER_BYTES
    }

    /// Bytes that messages may still take, about.
    pub(super) fn room(&self) -> usize {
        BUFFER_BYTES.saturating_sub(self.buffer.len())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Writes a text frame whose payload is these parts.
    pub(super) fn text(&mut self, parts: &[&[u8]]) {
        let length = parts.iter().map(|part| part.len()).sum();
        self.header(TEXT, length);
        for part in parts {
            self.buffer.put_slice(part);
        }
    }

    /// Writes a ping.
    pub(super) fn ping(&mut self) {
        self.header(PING, 0);
    }

    /// Answers a ping with its own payload.
    pub(super) fn pong(&mut self, payload: &[u8]) {
        let payload = &payload[..payload.len().min(CONTROL_BYTES_MAX)];
        self.header(PONG, payload.len());
        self.buffer.put_slice(payload);
    }

    /// Writes the last frame. `why` is ASCII, and short.
    pub(super) fn close(&mut self, code: CloseCode, why: &str) {
        let why = &why.as_bytes()[..why.len().min(CONTROL_BYTES_MAX - 2)];
        self.header(CLOSE, why.len() + 2);
        self.buffer.put_u16(code as u16);
        self.buffer.put_slice(why);
    }

    fn header(&mut self, first: u8, length: usize) {
        self.buffer.reserve(length + 10);
        self.buffer.put_u8(first);
        match length {
            0..126 => self.buffer.put_u8(length as u8),
            126..65_536 => {
                self.buffer.put_u8(126);
                self.buffer.put_u16(length as u16);
            }
            _ => {
                self.buffer.put_u8(127);
                self.buffer.put_u64(length as u64);
            }
        }
    }

    /// Hands the buffer on as soon as the peer is ready for it; `false` when the connection is gone. Safe to drop.
    pub(super) async fn flush(&mut self) -> bool {
        match self.chunks.reserve().await {
            Ok(place) => {
                place.send(self.buffer.split().freeze());
                true
            }
            Err(_) => false,
        }
    }
}

impl Body {
    /// Keeps `kept` until the end.
    pub(super) fn keeping(self, kept: BoxBody) -> Self {
        Self { _kept: Some(kept), ..self }
    }
}

impl Stream for Body {
    type Item = Result<Bytes, actix_web::Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.chunks.poll_recv(cx).map(|chunk| chunk.map(Ok))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    fn written(write: impl FnOnce(&mut Outgoing)) -> Vec<u8> {
        let (mut outgoing, _body) = Outgoing::new();
        write(&mut outgoing);
        outgoing.buffer.to_vec()
    }

    #[test]
    fn frames_have_the_length_in_the_form_that_fits() {
        assert_eq!(written(|out| out.text(&[b"a", b"bc"])), b"\x81\x03abc");
        assert_eq!(written(|out| out.text(&[&[b'x'; 126]]))[..4], [0x81, 126, 0, 126]);
        assert_eq!(written(|out| out.text(&[&[b'x'; 65_536]]))[..10], [0x81, 127, 0, 0, 0, 0, 0, 1, 0, 0]);
        assert_eq!(written(|out| out.close(CloseCode::GoingAway, "bye")), b"\x88\x05\x03\xe9bye");
        assert_eq!(written(|out| out.pong(&[7; 200])).len(), 127);
    }

    #[actix_rt::test]
    async fn a_peer_that_does_not_read_is_waited_for() {
        let (mut outgoing, mut body) = Outgoing::new();
        for _ in 0..CHUNKS {
            outgoing.text(&[b"x"]);
            assert!(outgoing.flush().await);
        }
        outgoing.text(&[b"y"]);
        assert!(outgoing.flush().now_or_never().is_none());
        assert!(body.chunks.recv().await.is_some());
        assert!(outgoing.flush().await);
        drop(body);
        assert!(!outgoing.flush().await);
    }
}
