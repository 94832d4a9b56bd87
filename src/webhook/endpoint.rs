//! One endpoint: its kept-alive connections, and the POST of one message.
//!
//! An [`Endpoint`] stays on its pusher's thread and shares no lock with any other, so that a slow one costs nobody
//! else; what they share is the [`Sender`]: the guard, TLS, and the allowance of connections.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use reqwest::Url;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead as _, AsyncReadExt as _, ReadBuf};
use tokio_rustls::TlsConnector;

use super::address::{self, Guard};
use super::answer::{Answer, AnswerReader};
use super::budget::{Budget, Share};
use super::dial::{Dialer, Host, Lookups, Resolver, Stream, system_resolver};
use super::failure::{Failure, FailureKind, Phase};
use crate::client::Webhook;

/// Longest time for a connection and its TLS session; part of the attempt's own time.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an unused connection is kept.
const IDLE_FOR: Duration = Duration::from_secs(30);
/// How old a connection gets, so that a name that moved is followed.
const AGE_MAX: Duration = Duration::from_secs(300);
/// Bytes read at once.
const READ_BYTES: usize = 4096;
/// A body up to this long is written together with the head.
const COPIED_BODY_BYTES: usize = 8192;

/// What all endpoints share. Made once.
#[derive(Clone)]
pub struct Sender {
    guard: Arc<Guard>,
    tls: TlsConnector,
    budget: Arc<Budget>,
    resolver: Resolver,
    lookups: Arc<Lookups>,
}

impl Sender {
    /// A sender that may reach public addresses and `allow`, and trusts what `tls` does.
    pub fn new(allow: Vec<IpNet>, tls: TlsConnector) -> Self {
        Self {
            guard: Arc::new(Guard::new(allow)),
            tls,
            budget: Budget::from_process_limit(),
            resolver: system_resolver(),
            lookups: Arc::default(),
        }
    }

    /// The same with another resolver, for tests.
    #[must_use]
    pub fn with_resolver(mut self, resolver: Resolver) -> Self {
        self.resolver = resolver;
        self
    }

    /// The same with another allowance of connections, for tests.
    #[must_use]
    pub fn with_budget(mut self, budget: Arc<Budget>) -> Self {
        self.budget = budget;
        self
    }

    /// Connections to endpoints that are open now.
    pub fn open_connections(&self) -> usize {
        self.budget.open()
    }
}

impl std::fmt::Debug for Sender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender").field("guard", &self.guard).field("budget", &self.budget).finish_non_exhaustive()
    }
}

/// One message to be sent.
#[derive(Debug)]
pub struct Post<'a> {
    /// The header `webhook-id`.
    pub webhook_id: &'a str,
    /// The header `webhook-timestamp`.
    pub timestamp_s: &'a str,
    /// The header `webhook-signature`.
    pub signature: &'a str,
    /// The header `traceparent`, if the message came with one.
    pub traceparent: Option<&'a str>,
    /// The envelope.
    pub body: &'a [u8],
}

struct Connection {
    stream: Box<dyn Stream>,
    opened: Instant,
    used: Instant,
    hold: Hold,
}

/// A connection's share of the allowance, counted in its endpoint's `held`.
struct Hold {
    held: Rc<Cell<usize>>,
    _share: Share,
}

impl Hold {
    fn new(held: &Rc<Cell<usize>>, share: Share) -> Self {
        held.set(held.get() + 1);
        Self { held: Rc::clone(held), _share: share }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.held.set(self.held.get() - 1);
    }
}

/// The right to make one attempt: a connection, or the share for a new one.
pub struct Slot(Lease);

enum Lease {
    Kept(Connection),
    New(Hold),
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.0 {
            Lease::Kept(_) => "Slot(kept)",
            Lease::New(_) => "Slot(new)",
        })
    }
}

/// See the module. Not `Send`.
pub struct Endpoint {
    dialer: Dialer,
    /// Request line and the headers that are the same each time.
    head: Vec<u8>,
    timeout: Duration,
    budget: Arc<Budget>,
    /// Unused connections, the last used at the end.
    idle: RefCell<Vec<Connection>>,
    /// Connections that exist, idle ones included.
    held: Rc<Cell<usize>>,
    buffers: RefCell<Vec<Buffers>>,
}

#[derive(Default)]
struct Buffers {
    out: Vec<u8>,
    input: Vec<u8>,
}

impl Endpoint {
    /// The endpoint of a webhook.
    ///
    /// # Errors
    /// When the URL or a header makes no sense: [`super::validate`] refuses those before they get here.
    pub fn new(sender: &Sender, webhook: &Webhook) -> Result<Self, Failure> {
        let unusable = |what: &str| Failure::new(FailureKind::Refused, format!("the URL cannot be used: {what}"));
        let url = Url::parse(&webhook.url).map_err(|error| unusable(&error.to_string()))?;
        let name = url.host_str().ok_or_else(|| unusable("no host"))?;
        let port = url.port_or_known_default().ok_or_else(|| unusable("no port"))?;
        let literal = address::literal(&url);
        let host = literal.map_or_else(|| Host::Name(name.into()), Host::Literal);
        let tls = match url.scheme() {
            "https" => {
                // A name may end in a dot; a certificate never does.
                let server = match literal {
                    Some(address) => ServerName::from(address),
                    None => ServerName::try_from(name.trim_end_matches('.').to_owned())
                        .map_err(|_| unusable("its host is no name"))?,
                };
                Some((sender.tls.clone(), server))
            }
            "http" => None,
            _ => return Err(unusable("neither https nor http")),
        };
        Ok(Self {
            dialer: Dialer::new(
                host,
                port,
                tls,
                Arc::clone(&sender.guard),
                Arc::clone(&sender.resolver),
                &sender.lookups,
            ),
            head: render_head(&url, webhook),
            timeout: Duration::from_secs(u64::from(webhook.timeout_s.max(1))),
            budget: Arc::clone(&sender.budget),
            idle: RefCell::default(),
            held: Rc::default(),
            buffers: RefCell::default(),
        })
    }

    /// The right to make an attempt; `None` while there are too many connections, of this endpoint's or of all.
    pub fn slot(&self) -> Option<Slot> {
        let mut idle = self.idle.borrow_mut();
        while let Some(mut connection) = idle.pop() {
            if connection.used.elapsed() < IDLE_FOR && is_quiet(&mut connection.stream) {
                return Some(Slot(Lease::Kept(connection)));
            }
        }
        let share = self.budget.take(self.held.get())?;
        Some(Slot(Lease::New(Hold::new(&self.held, share))))
    }

    /// Closes connections that were not used for a while, and those that the endpoint closed. Returns whether some
    /// are left.
    pub fn close_idle(&self) -> bool {
        let mut idle = self.idle.borrow_mut();
        idle.retain_mut(|connection| connection.used.elapsed() < IDLE_FOR && is_quiet(&mut connection.stream));
        !idle.is_empty()
    }

    /// Sends one message and reads the answer. Never takes longer than the webhook's `timeout_s`. Safe to drop: the
    /// connection is then closed.
    ///
    /// # Errors
    /// [`Failure`] when there was no complete answer, in words.
    pub async fn post(&self, slot: Slot, post: &Post<'_>) -> Result<Answer, Failure> {
        let phase = Cell::new(Phase::Waiting);
        let mut buffers = self.buffers.borrow_mut().pop().unwrap_or_default();
        let work = self.attempt(slot, post, &phase, &mut buffers);
        let result = match tokio::time::timeout(self.timeout, work).await {
            Ok(result) => result,
            Err(_) => Err(Failure::timeout(phase.get(), self.timeout)),
        };
        if buffers.out.capacity() <= 2 * COPIED_BODY_BYTES {
            self.buffers.borrow_mut().push(buffers);
        }
        result
    }

    async fn attempt(
        &self,
        slot: Slot,
        post: &Post<'_>,
        phase: &Cell<Phase>,
        buffers: &mut Buffers,
    ) -> Result<Answer, Failure> {
        self.render(post, &mut buffers.out);
        let body = if post.body.len() > COPIED_BODY_BYTES { post.body } else { &[] };
        let (mut connection, was_kept) = match slot.0 {
            Lease::Kept(connection) => (connection, true),
            Lease::New(hold) => (self.open(hold, phase).await?, false),
        };
        let mut exchanged = exchange(&mut *connection.stream, &buffers.out, body, &mut buffers.input, phase).await;
        if was_kept && matches!(&exchanged, Err((_, Begun::No))) {
            // The endpoint closed the connection just as it was used again. Sending anew on a fresh one is safe: the
            // id is the same, and this is no answer that would count as an attempt.
            let Connection { hold, .. } = connection;
            connection = self.open(hold, phase).await?;
            exchanged = exchange(&mut *connection.stream, &buffers.out, body, &mut buffers.input, phase).await;
        }
        let (answer, reusable) = exchanged.map_err(|(failure, _)| failure)?;
        let (is_scarce, is_spare) = (self.budget.is_scarce(), self.held.get() > 1);
        if reusable && connection.opened.elapsed() < AGE_MAX && !(is_scarce && is_spare) {
            connection.used = Instant::now();
            self.idle.borrow_mut().push(connection);
        }
        Ok(answer)
    }

    async fn open(&self, hold: Hold, phase: &Cell<Phase>) -> Result<Connection, Failure> {
        let limit = CONNECT_TIMEOUT.min(self.timeout);
        let stream = tokio::time::timeout(limit, self.dialer.dial(phase))
            .await
            .unwrap_or_else(|_| Err(Failure::timeout(phase.get(), limit)))?;
        let now = Instant::now();
        Ok(Connection { stream, opened: now, used: now, hold })
    }

    fn render(&self, post: &Post<'_>, out: &mut Vec<u8>) {
        out.clear();
        out.extend_from_slice(&self.head);
        let mut number = itoa::Buffer::new();
        for (name, value) in [
            ("webhook-id", post.webhook_id),
            ("webhook-timestamp", post.timestamp_s),
            ("webhook-signature", post.signature),
            ("content-length", number.format(post.body.len())),
        ] {
            put_header(out, name, value);
        }
        if let Some(traceparent) = post.traceparent {
            put_header(out, "traceparent", traceparent);
        }
        out.extend_from_slice(b"\r\n");
        if post.body.len() <= COPIED_BODY_BYTES {
            out.extend_from_slice(post.body);
        }
    }
}

impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoint").field("dialer", &self.dialer).field("held", &self.held).finish_non_exhaustive()
    }
}

fn render_head(url: &Url, webhook: &Webhook) -> Vec<u8> {
    let mut head = Vec::with_capacity(256);
    let query = url.query().map(|query| format!("?{query}")).unwrap_or_default();
    head.extend_from_slice(format!("POST {}{query} HTTP/1.1\r\n", url.path()).as_bytes());
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => put_header(&mut head, "host", &format!("{host}:{port}")),
        None => put_header(&mut head, "host", host),
    }
    put_header(&mut head, "content-type", "application/json");
    for (name, value) in [("user-agent", USER_AGENT), ("accept", "*/*")] {
        if !webhook.headers.keys().any(|own| own.eq_ignore_ascii_case(name)) {
            put_header(&mut head, name, value);
        }
    }
    for (name, value) in &webhook.headers {
        put_header(&mut head, name, value);
    }
    head
}

/// How the backbone names itself to endpoints.
const USER_AGENT: &str = concat!("communications-backbone/", env!("CARGO_PKG_VERSION"));

/// A header line. Control characters, of which none should get here, are left out rather than sent.
fn put_header(out: &mut Vec<u8>, name: &str, value: &str) {
    let clean = |text: &str, out: &mut Vec<u8>| {
        out.extend(text.bytes().filter(|b| *b == b'\t' || (*b >= b' ' && *b != 0x7f)));
    };
    clean(name, out);
    out.extend_from_slice(b": ");
    clean(value, out);
    out.extend_from_slice(b"\r\n");
}

/// Whether an unused connection has nothing to say: an end or stray bytes make it useless.
fn is_quiet(stream: &mut Box<dyn Stream>) -> bool {
    let mut byte = [0; 1];
    let mut context = Context::from_waker(std::task::Waker::noop());
    Pin::new(stream).poll_read(&mut context, &mut ReadBuf::new(&mut byte)).is_pending()
}

/// Whether anything of an answer had come when an exchange failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begun {
    Yes,
    No,
}

type Exchanged = Result<(Answer, bool), (Failure, Begun)>;

/// Writes the request and reads the answer.
async fn exchange(
    stream: &mut dyn Stream,
    head: &[u8],
    body: &[u8],
    input: &mut Vec<u8>,
    phase: &Cell<Phase>,
) -> Exchanged {
    phase.set(Phase::Waiting);
    input.clear();
    let mut unsent = [head, body];
    // An error while writing may come with an answer that says why (413 before the body was read), so it is read
    // in any case.
    let all_sent = poll_fn(|cx| poll_send(stream, &mut unsent, input, cx)).await;
    let mut reader = AnswerReader::default();
    let mut first = true;
    loop {
        if !first || input.is_empty() {
            input.clear();
            input.reserve(READ_BYTES);
            // An error and an end come to the same: what was read is all there is. Endpoints that leave out TLS's
            // close_notify are common.
            if !matches!(stream.read_buf(input).await, Ok(1..)) {
                let begun = if reader.has_begun() { Begun::Yes } else { Begun::No };
                return if reader.finish() {
                    Ok((reader.into_answer().0, false))
                } else {
                    Err((Failure::closed(phase.get()), begun))
                };
            }
        }
        first = false;
        let done = reader.feed(input).map_err(|failure| (failure, Begun::Yes))?;
        if reader.has_begun() {
            phase.set(Phase::Reading);
        }
        if done {
            let (answer, reusable) = reader.into_answer();
            return Ok((answer, reusable && all_sent));
        }
    }
}

/// Writes what is unsent; ready with true when all is, with false when that failed or an answer came before.
fn poll_send(
    stream: &mut dyn Stream,
    unsent: &mut [&[u8]; 2],
    input: &mut Vec<u8>,
    cx: &mut Context<'_>,
) -> Poll<bool> {
    let mut stream = Pin::new(stream);
    while let Some(part) = unsent.iter_mut().find(|part| !part.is_empty()) {
        match stream.as_mut().poll_write(cx, part) {
            Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(false),
            Poll::Ready(Ok(written)) => *part = &part[written..],
            Poll::Pending => return poll_early(stream, input, cx),
        }
    }
    match stream.as_mut().poll_flush(cx) {
        Poll::Ready(flushed) => Poll::Ready(flushed.is_ok()),
        Poll::Pending => poll_early(stream, input, cx),
    }
}

/// Looks for an answer that comes before everything was sent; ready with false when there is one, or an end.
fn poll_early(stream: Pin<&mut dyn Stream>, input: &mut Vec<u8>, cx: &mut Context<'_>) -> Poll<bool> {
    input.resize(READ_BYTES, 0);
    let mut buffer = ReadBuf::new(input);
    let read = stream.poll_read(cx, &mut buffer);
    let filled = buffer.filled().len();
    input.truncate(filled);
    read.map(|_| false)
}
