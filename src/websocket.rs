//! A WebSocket client (RFC 6455), as small as the command line needs it: text frames over a connection that `reqwest` has
//! upgraded, so that TLS, addresses and credentials are those of every other call. The server's side is `http::ws`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use reqwest::header::{CONNECTION, HeaderMap, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE};
use reqwest::{RequestBuilder, Response, StatusCode};
use sha1::{Digest as _, Sha1};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Longest frame that is taken from a server, in bytes. A message is at most `SOAR_MAX_MESSAGE_BYTES` and its envelope;
/// whoever raised that raised it below this.
const FRAME_BYTES_MAX: u64 = 256 << 20;

/// What the server proves that it knows (RFC 6455, section 1.3).
const ACCEPT_SUFFIX: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

const TEXT: u8 = 0x1;
const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xA;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No answer came.
    #[error(transparent)]
    Unreachable(#[from] reqwest::Error),
    /// The server refused; its answer says why.
    #[error("the server answered {}", .0.status())]
    Refused(Box<Response>),
    /// It answered, but not as a WebSocket server does.
    #[error("the answer is not a WebSocket server's: {0}")]
    NotAWebSocket(&'static str),
}

/// What comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Incoming {
    /// A text frame.
    Text(Bytes),
    /// The server closes, with this code (1005 when it gave none) and reason.
    Closed(u16, String),
}

/// An open connection.
#[derive(Debug)]
pub struct WebSocket<Io = reqwest::Upgraded> {
    io: Io,
    incoming: BytesMut,
    outgoing: BytesMut,
}

impl WebSocket {
    /// Connects: `request` is a `GET` of the `http://` or `https://` URL with its credentials.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn connect(request: RequestBuilder) -> Result<Self, ConnectError> {
        let key = STANDARD.encode(rand::random::<[u8; 16]>());
        let mut headers = HeaderMap::new();
        for (name, value) in [
            (CONNECTION, "upgrade"),
            (UPGRADE, "websocket"),
            (SEC_WEBSOCKET_VERSION, "13"),
            (SEC_WEBSOCKET_KEY, key.as_str()),
        ] {
            headers.insert(name, value.parse().expect("base64 and constants are visible ASCII"));
        }
        let answer = request.headers(headers).send().await?;
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(ConnectError::Refused(Box::new(answer)));
        }
        let proof = STANDARD.encode(Sha1::digest(format!("{key}{ACCEPT_SUFFIX}")));
        if answer.headers().get(SEC_WEBSOCKET_ACCEPT).is_none_or(|given| given.as_bytes() != proof.as_bytes()) {
            return Err(ConnectError::NotAWebSocket("sec-websocket-accept is not what the key makes"));
        }
        Ok(Self::over(answer.upgrade().await?))
    }
}

impl<Io: AsyncRead + AsyncWrite + Unpin> WebSocket<Io> {
    /// Over a connection on which the handshake is done.
    pub fn over(io: Io) -> Self {
        Self { io, incoming: BytesMut::new(), outgoing: BytesMut::new() }
    }

    /// Writes a text frame into the buffer; [`WebSocket::flush`] sends it.
    pub fn queue(&mut self, text: &str) {
        self.frame(TEXT, text.as_bytes());
    }

    /// Bytes in the buffer.
    pub fn queued(&self) -> usize {
        self.outgoing.len()
    }

    /// Sends what is in the buffer. Safe to drop: what was not sent is still there.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn flush(&mut self) -> std::io::Result<()> {
        while !self.outgoing.is_empty() {
            let sent = self.io.write(&self.outgoing).await?;
            if sent == 0 {
                return Err(std::io::ErrorKind::WriteZero.into());
            }
            self.outgoing.advance(sent);
        }
        self.io.flush().await
    }

    /// Sends one text frame.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn send(&mut self, text: &str) -> std::io::Result<()> {
        self.queue(text);
        self.flush().await
    }

    /// The next frame; pings are answered on the way. Safe to drop.
    ///
    /// # Errors
    /// When the connection is gone, or the server breaks the protocol.
    pub async fn next(&mut self) -> std::io::Result<Incoming> {
        loop {
            if let Some((opcode, payload)) = self.decode()? {
                match opcode {
                    TEXT => return Ok(Incoming::Text(payload)),
                    PING => {
                        self.frame(PONG, &payload);
                        self.flush().await?;
                    }
                    PONG => {}
                    CLOSE => return Ok(closed(&payload)),
                    _ => return Err(broken("a frame that is neither text nor control")),
                }
                continue;
            }
            self.incoming.reserve(16 << 10);
            if self.io.read_buf(&mut self.incoming).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Closes: tells the server, and waits for its word or the connection's end.
    ///
    /// # Errors
    /// When the connection is gone already.
    pub async fn close(mut self) -> std::io::Result<()> {
        self.frame(CLOSE, &1000_u16.to_be_bytes());
        self.flush().await?;
        loop {
            match self.next().await {
                Ok(Incoming::Text(_)) => {}
                Ok(Incoming::Closed(..)) | Err(_) => return Ok(()),
            }
        }
    }

    /// Writes a frame, masked as a client's must be (section 5.3).
    fn frame(&mut self, opcode: u8, payload: &[u8]) {
        const MASKED: u8 = 0x80;
        self.outgoing.reserve(payload.len() + 14);
        self.outgoing.put_u8(0x80 | opcode);
        match payload.len() {
            length @ 0..126 => self.outgoing.put_u8(MASKED | length as u8),
            length @ 126..65_536 => {
                self.outgoing.put_u8(MASKED | 126);
                self.outgoing.put_u16(length as u16);
            }
            length => {
                self.outgoing.put_u8(MASKED | 127);
                self.outgoing.put_u64(length as u64);
            }
        }
        let mask: [u8; 4] = rand::random();
        self.outgoing.put_slice(&mask);
        let start = self.outgoing.len();
        self.outgoing.put_slice(payload);
        for chunk in self.outgoing[start..].chunks_mut(4) {
            for (byte, mask) in chunk.iter_mut().zip(mask) {
                *byte ^= mask;
            }
        }
    }

    /// Takes a whole frame out of what has come, if there is one. A server sends unmasked, and ours never fragments.
    fn decode(&mut self) -> std::io::Result<Option<(u8, Bytes)>> {
        let head = &self.incoming[..];
        let [first, second, rest @ ..] = head else { return Ok(None) };
        let (opcode, short) = (first & 0x0F, second & 0x7F);
        if first & 0xF0 != 0x80 || second & 0x80 != 0 || !matches!(opcode, TEXT | BINARY | CLOSE | PING | PONG) {
            return Err(broken("a frame that is fragmented, masked or of an unknown kind"));
        }
        let (header, length) = match (short, rest) {
            (126, [a, b, ..]) => (4, u64::from(u16::from_be_bytes([*a, *b]))),
            (127, [a, b, c, d, e, f, g, h, ..]) => (10, u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h])),
            (126 | 127, _) => return Ok(None),
            (short, _) => (2, u64::from(short)),
        };
        if length > FRAME_BYTES_MAX {
            return Err(broken("a frame that is too long"));
        }
        let length = usize::try_from(length).expect("it is below the limit");
        if self.incoming.len() < header + length {
            self.incoming.reserve(header + length - self.incoming.len());
            return Ok(None);
        }
        self.incoming.advance(header);
        Ok(Some((opcode, self.incoming.split_to(length).freeze())))
    }
}

fn closed(payload: &[u8]) -> Incoming {
    match payload {
        [a, b, reason @ ..] => {
            Incoming::Closed(u16::from_be_bytes([*a, *b]), String::from_utf8_lossy(reason).into_owned())
        }
        _ => Incoming::Closed(1005, String::new()),
    }
}

fn broken(what: &str) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidData, format!("the server sent {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[actix_rt::test]
    async fn a_frame_of_every_length_is_masked_and_can_be_unmasked() {
        for length in [0, 1, 125, 126, 65_535, 65_536] {
            let (near, mut far) = tokio::io::duplex(1 << 20);
            let mut socket = WebSocket::over(near);
            socket.send(&"x".repeat(length)).await.expect("sent");
            drop(socket);
            let mut sent = Vec::new();
            far.read_to_end(&mut sent).await.expect("read");
            let header = sent.len() - length - 4;
            assert_eq!((sent[0], sent[1] & 0x80), (0x81, 0x80));
            let mask: Vec<u8> = sent[header..header + 4].to_vec();
            assert!(sent[header + 4..].iter().enumerate().all(|(at, byte)| byte ^ mask[at % 4] == b'x'));
        }
    }

    #[actix_rt::test]
    async fn frames_come_whole_however_they_are_cut_and_pings_are_answered() {
        let (near, mut far) = tokio::io::duplex(64);
        let writer = actix_rt::spawn(async move {
            for byte in b"\x81\x02ab\x89\x01!\x81\x7e\x00\x80".iter().copied().chain([b'y'; 128]) {
                far.write_all(&[byte]).await.expect("written");
            }
            far.write_all(b"\x88\x05\x03\xe9bye").await.expect("written");
            let mut pong = [0; 7];
            far.read_exact(&mut pong).await.expect("a pong");
            assert_eq!((pong[0], pong[1], pong[6] ^ pong[2]), (0x8A, 0x81, b'!'));
        });
        let mut socket = WebSocket::over(near);
        assert_eq!(socket.next().await.expect("text"), Incoming::Text("ab".into()));
        assert_eq!(socket.next().await.expect("text"), Incoming::Text("y".repeat(128).into()));
        assert_eq!(socket.next().await.expect("close"), Incoming::Closed(1001, "bye".into()));
        writer.await.expect("the server's side ends well");
    }

    #[actix_rt::test]
    async fn what_is_no_websocket_is_an_error() {
        for bytes in [b"\x01\x00".as_slice(), b"\x81\x80", b"\x83\x00", b"\x81\x7f\xff\x00\x00\x00\x00\x00\x00\x00"] {
            let (near, mut far) = tokio::io::duplex(64);
            far.write_all(bytes).await.expect("written");
            assert!(WebSocket::over(near).next().await.is_err(), "{bytes:?}");
        }
    }
}
