//! A receiver of webhooks for the load generator: as lean as one can be that checks signatures, so that what is measured
//! is the sender.

use std::cell::{Cell, RefCell};
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{AbortHandle, JoinSet};

use crate::cli::error::CliError;
use crate::time::Timestamp;
use crate::webhook::signature::{SigningSecret, verify};

/// Every how many-th signature of a connection is checked: a check costs as much as signing does.
const CHECKED_EVERY: u64 = 16;

/// Bytes made room for before a read.
const READ_BYTES: usize = 16 * 1024;

/// Header lines of a request that are looked at.
const HEADERS_MAX: usize = 64;

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";

/// See the module. Closes when dropped.
pub(super) struct Receiver {
    address: SocketAddr,
    state: Rc<State>,
    serving: AbortHandle,
}

/// Called with the body of each request.
type Seen = dyn Fn(&[u8]);

struct State {
    secret: RefCell<Option<SigningSecret>>,
    seen: Box<Seen>,
    checked: Cell<u64>,
    wrong: RefCell<Option<String>>,
}

impl Receiver {
    /// Listens on a free port of loopback, and calls `seen` with the body of each request.
    pub(super) async fn listen(seen: impl Fn(&[u8]) + 'static) -> Result<Self, CliError> {
        let cannot = |error| CliError::failed(format!("cannot listen for webhooks: {error}"));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(cannot)?;
        let address = listener.local_addr().map_err(cannot)?;
        let state = State {
            secret: RefCell::default(),
            seen: Box::new(seen),
            checked: Cell::new(0),
            wrong: RefCell::default(),
        };
        let state = Rc::new(state);
        let serving = tokio::task::spawn_local(accept(listener, Rc::clone(&state))).abort_handle();
        Ok(Self { address, state, serving })
    }

    /// `host:port`.
    pub(super) fn address(&self) -> String {
        self.address.to_string()
    }

    /// Checks signatures under this secret, `whsec_…`, from now on.
    pub(super) fn expect(&self, secret: &str) -> Result<(), CliError> {
        let secret =
            SigningSecret::parse(secret).map_err(|error| CliError::failed(format!("the webhook secret {error}")))?;
        *self.state.secret.borrow_mut() = Some(secret);
        Ok(())
    }

    /// The judgement over what the ledger says and over the signatures.
    pub(super) fn verdict(&self, ledger: Result<String, String>) -> Result<String, String> {
        match self.state.wrong.borrow().as_ref() {
            Some(wrong) => Err(wrong.clone()),
            None => ledger.map(|text| format!("{text}; {} signatures checked", self.state.checked.get())),
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn accept(listener: TcpListener, state: Rc<State>) {
    // Ended with this task.
    let mut connections = JoinSet::new();
    // An accept fails for want of file descriptors, which the sender sees as a connection that does not open.
    while let Ok((stream, _)) = listener.accept().await {
        connections.spawn_local(serve(stream, Rc::clone(&state)));
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(mut stream: TcpStream, state: Rc<State>) {
    // Without it an answer waits for more; nothing else depends on it.
    let _ = stream.set_nodelay(true);
    let (mut buffer, mut answers, mut count) = (Vec::new(), Vec::new(), 0);
    loop {
        let mut at = 0;
        answers.clear();
        while let Some(request) = Request::parse(&buffer[at..]) {
            let request = match request {
                Ok(request) => request,
                Err(why) => {
                    state.wrong.borrow_mut().get_or_insert(format!("a webhook was not HTTP: {why}"));
                    return;
                }
            };
            if count % CHECKED_EVERY == 0 {
                state.check(&request);
            }
            count += 1;
            (state.seen)(request.body);
            answers.extend_from_slice(OK);
            at += request.bytes;
        }
        buffer.drain(..at);
        if !answers.is_empty() && stream.write_all(&answers).await.is_err() {
            return;
        }
        buffer.reserve(READ_BYTES);
        if !matches!(stream.read_buf(&mut buffer).await, Ok(1..)) {
            return;
        }
    }
}

impl State {
    fn check(&self, request: &Request<'_>) {
        if let Some(secret) = &*self.secret.borrow() {
            self.checked.set(self.checked.get() + 1);
            let Request { id, timestamp, signature, body, .. } = request;
            if let Err(error) = verify(secret, id, timestamp, signature, body, Timestamp::now()) {
                self.wrong.borrow_mut().get_or_insert(format!("a webhook's signature is wrong: {error}"));
            }
        }
    }
}

/// A request, as far as a receiver of webhooks looks at it.
#[derive(Debug, PartialEq, Eq)]
struct Request<'a> {
    id: &'a str,
    timestamp: &'a str,
    signature: &'a str,
    body: &'a [u8],
    bytes: usize,
}

impl<'a> Request<'a> {
    /// The request at the front, once it is whole.
    fn parse(buffer: &'a [u8]) -> Option<Result<Self, &'static str>> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut parsed = httparse::Request::new(&mut headers);
        let head = match parsed.parse(buffer) {
            Ok(httparse::Status::Complete(bytes)) => bytes,
            Ok(httparse::Status::Partial) => return None,
            Err(_) => return Some(Err("the head cannot be read")),
        };
        let header = |name: &str| {
            let found = parsed.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
            found.and_then(|header| std::str::from_utf8(header.value).ok()).unwrap_or_default()
        };
        let Ok(length) = header("content-length").parse::<usize>() else { return Some(Err("no content-length")) };
        let (id, timestamp) = (header("webhook-id"), header("webhook-timestamp"));
        let signature = header("webhook-signature");
        let bytes = head + length;
        let body = buffer.get(head..bytes)?;
        Some(Ok(Self { id, timestamp, signature, body, bytes }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_once_it_is_whole() {
        let text = b"POST / HTTP/1.1\r\nWebhook-Id: a:1\r\nwebhook-timestamp: 7\r\nwebhook-signature: v1,x\r\n\
            content-length: 2\r\n\r\n{}POST";
        let request = Request { id: "a:1", timestamp: "7", signature: "v1,x", body: b"{}", bytes: text.len() - 4 };
        for cut in 0..text.len() - 4 {
            assert_eq!(Request::parse(&text[..cut]), None, "{cut}");
        }
        assert_eq!(Request::parse(text), Some(Ok(request)));
        assert!(matches!(Request::parse(b"POST / HTTP/1.1\r\n\r\n"), Some(Err(_))));
    }
}
