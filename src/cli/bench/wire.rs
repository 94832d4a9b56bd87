//! A lean HTTP/1.1 connection for the hot loops of the load generator: one request at a time, kept alive, on one
//! thread. reqwest costs as much as the router answers, and both share the machine.
//!
//! Only what the bench needs: whole requests in, answers framed by content-length, by chunks or by the end of the
//! connection out (RFC 9112, section 6.3).

use std::io;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// Longest head of an answer, in bytes.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// Longest body of an answer, in bytes.
const BODY_BYTES_MAX: usize = 256 << 20;

/// Bytes made room for before a read.
const READ_BYTES: usize = 64 * 1024;

/// Header lines of an answer that are looked at.
const HEADERS_MAX: usize = 64;

/// A connection, opened again when the other side closes it between two answers.
pub(super) struct Wire {
    address: String,
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
    body: Vec<u8>,
}

/// An answer. The body is valid until the next request.
#[derive(Debug)]
pub(super) struct Answer<'a> {
    /// HTTP status.
    pub(super) status: u16,
    /// The whole body.
    pub(super) body: &'a [u8],
}

/// How the end of a body is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Length(usize),
    Chunked,
    UntilClose,
}

/// The head of an answer.
#[derive(Debug, PartialEq, Eq)]
struct Head {
    status: u16,
    bytes: usize,
    framing: Framing,
    closes: bool,
}

impl Wire {
    /// A connection to `address` (`host:port`), not opened yet.
    pub(super) fn new(address: &str) -> Self {
        Self { address: address.to_owned(), stream: None, buffer: Vec::new(), body: Vec::new() }
    }

    /// Sends a whole request and reads the whole answer.
    ///
    /// # Errors
    /// When the connection cannot be opened or breaks, or the answer is not HTTP/1.1. The connection is then dropped.
    pub(super) async fn exchange(&mut self, request: &[u8]) -> io::Result<Answer<'_>> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(&self.address).await?;
                stream.set_nodelay(true)?;
                stream
            }
        };
        stream.write_all(request).await?;
        self.buffer.clear();
        let head = loop {
            match parse_head(&self.buffer)? {
                // Interim answers (1xx) are followed by the real one.
                Some(head) if head.status < 200 => drop(self.buffer.drain(..head.bytes)),
                Some(head) => break head,
                None if self.buffer.len() > HEAD_BYTES_MAX => return Err(invalid("the head is too long")),
                None => more(&mut stream, &mut self.buffer).await?,
            }
        };
        let body = match head.framing {
            Framing::Length(length) => {
                let end = head.bytes + length;
                self.buffer.reserve(end.saturating_sub(self.buffer.len()));
                while self.buffer.len() < end {
                    more(&mut stream, &mut self.buffer).await?;
                }
                &self.buffer[head.bytes..end]
            }
            Framing::Chunked => {
                self.body.clear();
                let mut at = head.bytes;
                while !take_chunks(&self.buffer, &mut at, &mut self.body)? {
                    more(&mut stream, &mut self.buffer).await?;
                }
                &self.body[..]
            }
            Framing::UntilClose => {
                while self.buffer.len() <= BODY_BYTES_MAX && read(&mut stream, &mut self.buffer).await? > 0 {}
                &self.buffer[head.bytes..]
            }
        };
        if !head.closes {
            self.stream = Some(stream);
        }
        Ok(Answer { status: head.status, body })
    }
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

async fn read(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<usize> {
    buffer.reserve(READ_BYTES);
    stream.read_buf(buffer).await
}

async fn more(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<()> {
    match read(stream, buffer).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// The head, once it is complete.
fn parse_head(buffer: &[u8]) -> io::Result<Option<Head>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let bytes = match response.parse(buffer) {
        Ok(httparse::Status::Complete(bytes)) => bytes,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(invalid("the answer is not HTTP")),
    };
    let status = response.code.unwrap_or(0);
    let mut framing = if matches!(status, 204 | 304) { Framing::Length(0) } else { Framing::UntilClose };
    let mut closes = response.version == Some(0);
    for header in response.headers.iter() {
        let value = std::str::from_utf8(header.value).map_err(|_| invalid("a header is not text"))?.trim();
        if header.name.eq_ignore_ascii_case("content-length") && framing == Framing::UntilClose {
            let length = value.parse().map_err(|_| invalid("content-length is no number"))?;
            if length > BODY_BYTES_MAX {
                return Err(invalid("the body is too long"));
            }
            framing = Framing::Length(length);
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") && value.eq_ignore_ascii_case("chunked") {
            framing = Framing::Chunked;
        } else if header.name.eq_ignore_ascii_case("connection") && value.eq_ignore_ascii_case("close") {
            closes = true;
        }
    }
    Ok(Some(Head { status, bytes, framing, closes: closes || framing == Framing::UntilClose }))
}

/// Appends the chunks of `buffer` from `at` on that are complete; true after the last one and its trailer.
fn take_chunks(buffer: &[u8], at: &mut usize, body: &mut Vec<u8>) -> io::Result<bool> {
    loop {
        let (digits, size) = match httparse::parse_chunk_size(&buffer[*at..]) {
            Ok(httparse::Status::Complete(found)) => found,
            Ok(httparse::Status::Partial) => return Ok(false),
            Err(_) => return Err(invalid("a chunk's size is no number")),
        };
        let size = usize::try_from(size).map_err(|_| invalid("a chunk is too long"))?;
        if size.saturating_add(body.len()) > BODY_BYTES_MAX {
            return Err(invalid("the body is too long"));
        }
        let data = *at + digits;
        if size == 0 {
            // Trailer lines, if any, end with an empty one.
            let rest = &buffer[data..];
            return Ok(rest.starts_with(b"\r\n") || rest.windows(4).any(|window| window == b"\r\n\r\n"));
        }
        if buffer.len() < data + size + 2 {
            return Ok(false);
        }
        body.extend_from_slice(&buffer[data..data + size]);
        *at = data + size + 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    #[test]
    fn heads_say_how_the_body_ends() {
        let head = |text: &str| parse_head(text.as_bytes()).expect("HTTP").expect("complete");
        assert_eq!(
            head("HTTP/1.1 202 Accepted\r\nContent-Length: 12\r\n\r\n"),
            Head { status: 202, bytes: 45, framing: Framing::Length(12), closes: false }
        );
        assert_eq!(head("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").framing, Framing::Chunked);
        assert!(head("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 1\r\n\r\n").closes);
        assert_eq!(head("HTTP/1.1 204 No Content\r\n\r\n").framing, Framing::Length(0));
        let until_close = head("HTTP/1.1 200 OK\r\n\r\n");
        assert!(until_close.framing == Framing::UntilClose && until_close.closes);
        assert_eq!(parse_head(b"HTTP/1.1 200 OK\r\nconten").expect("so far"), None);
        assert!(parse_head(b"SSH-2.0-x\r\n").is_err());
    }

    /// Serves `answers` one after the other on one connection each, in pieces of `piece` bytes.
    async fn server(answers: Vec<&'static [u8]>, piece: usize) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("the test connects");
            stream.set_nodelay(true).expect("a TCP socket");
            for answer in answers {
                let mut scrap = [0; 4];
                stream.read_exact(&mut scrap).await.expect("the test asks");
                for part in answer.chunks(piece) {
                    stream.write_all(part).await.expect("the test reads");
                    tokio::task::yield_now().await;
                }
            }
        });
        address
    }

    #[tokio::test]
    async fn answers_are_read_however_they_are_cut() {
        for piece in [1, 3, 7, 1000] {
            let address = server(
                vec![
                    b"HTTP/1.1 202 Accepted\r\ncontent-length: 5\r\n\r\nhello",
                    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n",
                    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
                    b"HTTP/1.1 200 OK\r\n\r\nto the end",
                ],
                piece,
            )
            .await;
            let mut wire = Wire::new(&address);
            for (status, body) in [(202, "hello"), (200, "abc0123456789"), (204, ""), (200, "to the end")] {
                let answer = wire.exchange(b"ask!").await.expect("an answer");
                assert_eq!((answer.status, answer.body), (status, body.as_bytes()), "in pieces of {piece}");
            }
        }
    }

    #[tokio::test]
    async fn a_cut_answer_is_an_error() {
        for answer in [&b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort"[..], b"HTTP/1.1 200", b""] {
            let address = server(vec![answer], 100).await;
            assert!(Wire::new(&address).exchange(b"ask!").await.is_err());
        }
    }
}
