//! A webhook endpoint that a test owns: real HTTP or HTTPS on a free port, on a thread of its own, with every fault
//! that an endpoint can have.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsAcceptor;

use super::wait::{SOON, eventually};

/// How an endpoint treats one request.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// An answer with this status, these headers and this body; the connection stays open.
    Status(u16),
    /// The same with headers and a body.
    Full { status: u16, headers: Vec<(&'static str, String)>, body: Vec<u8> },
    /// The answer after this long.
    After(Duration, Box<Reply>),
    /// Nothing, ever.
    HangBefore,
    /// A head and half a body, then nothing.
    HangInside,
    /// Closes the connection without a word.
    Close,
    /// Resets the connection.
    Reset,
    /// Half a body, then the end.
    CutInside,
    /// 200 and a body without an end.
    EndlessBody,
    /// 200 and headers without an end.
    EndlessHeaders,
    /// 200 and chunks, sent bytewise.
    Bytewise,
    /// No HTTP.
    Garbage,
    /// 200, and the connection closed without having said so.
    OkThenClose,
}

impl Reply {
    /// A status with `Retry-After`.
    pub(crate) fn retry_after(status: u16, value: impl ToString) -> Self {
        Self::Full { status, headers: vec![("retry-after", value.to_string())], body: vec![] }
    }

    /// How message `n` fares the first time, the second, and so on: of fifty, six are refused once, three are taken in an
    /// odd way, and the others are simply taken.
    pub(crate) fn by_fate(n: u64, times: u64) -> Self {
        match (n % 50, times) {
            (1, 1) => Self::Reset,
            (2, 1) => Self::Close,
            (3, 1) => Self::Garbage,
            (4, 1) => Self::CutInside,
            (5, 1) => Self::Status(302),
            (6, 1) => Self::Status(404),
            (7, _) => Self::EndlessBody,
            (8, _) => Self::OkThenClose,
            (9, _) => Self::Bytewise,
            _ => Self::Status(204),
        }
    }
}

/// One request that came.
#[derive(Debug, Clone)]
pub(crate) struct Hit {
    pub(crate) at: Instant,
    pub(crate) request_line: String,
    /// Names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Hit {
    /// The envelope.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("an envelope")
    }

    /// The number that is the message in the envelope.
    pub(crate) fn number(&self) -> u64 {
        self.json()["message"].as_u64().expect("a number of the test")
    }
}

type Plan = dyn Fn(&Hit, usize) -> Reply + Send + Sync;

struct Shared {
    plan: Box<Plan>,
    /// Answers with this status before the body was read, and reads no further.
    early: Option<u16>,
    hits: Mutex<Vec<Hit>>,
    /// Counts all, also while hits are not kept.
    count: AtomicUsize,
    opened: AtomicUsize,
    open: AtomicUsize,
    under_way: AtomicUsize,
    most_under_way: AtomicUsize,
}

/// See the module. Gone when dropped.
pub(crate) struct FakeEndpoint {
    address: SocketAddr,
    scheme: &'static str,
    shared: Arc<Shared>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl FakeEndpoint {
    /// Over HTTP; `plan` says how each request is treated, given the request and how many came before.
    pub(crate) fn start(plan: impl Fn(&Hit, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::listen(None, None, Box::new(plan))
    }

    /// One that answers with this status before it has read the body, and reads no further.
    pub(crate) fn hasty(status: u16) -> Self {
        Self::listen(None, Some(status), Box::new(|_, _| Reply::Close))
    }

    /// One that answers 200 to everything.
    pub(crate) fn healthy() -> Self {
        Self::start(|_, _| Reply::Status(200))
    }

    /// Over HTTPS with this certificate.
    pub(crate) fn start_tls(certificate: &Leaf, plan: impl Fn(&Hit, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::listen(Some(certificate.acceptor()), None, Box::new(plan))
    }

    fn listen(tls: Option<TlsAcceptor>, early: Option<u16>, plan: Box<Plan>) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
        listener.set_nonblocking(true).expect("a listener can be non-blocking");
        let address = listener.local_addr().expect("bound");
        let shared = Arc::new(Shared {
            plan,
            early,
            hits: Mutex::default(),
            count: AtomicUsize::new(0),
            opened: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            under_way: AtomicUsize::new(0),
            most_under_way: AtomicUsize::new(0),
        });
        let scheme = if tls.is_some() { "https" } else { "http" };
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let own = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                tokio::select! {
                    () = accept(listener, tls, own) => {}
                    _ = stopped => {}
                }
            });
        });
        Self { address, scheme, shared, stop: Some(stop), thread: Some(thread) }
    }

    /// Its URL, by address.
    pub(crate) fn url(&self) -> String {
        format!("{}://{}/hook?x=1", self.scheme, self.address)
    }

    /// Its URL under this name.
    pub(crate) fn url_at(&self, name: &str) -> String {
        format!("{}://{name}:{}/hook", self.scheme, self.address.port())
    }

    /// Its port.
    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    /// All requests so far, in the order in which they came.
    pub(crate) fn hits(&self) -> Vec<Hit> {
        self.shared.hits.lock().clone()
    }

    /// How many requests came.
    pub(crate) fn count(&self) -> usize {
        self.shared.count.load(Ordering::SeqCst)
    }

    /// Connections that were ever opened.
    pub(crate) fn connections(&self) -> usize {
        self.shared.opened.load(Ordering::SeqCst)
    }

    /// Connections that are open now.
    pub(crate) fn open_connections(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// The most requests that were under way at once.
    pub(crate) fn most_under_way(&self) -> usize {
        self.shared.most_under_way.load(Ordering::SeqCst)
    }

    /// Waits until `count` requests came, and returns them all.
    pub(crate) async fn wait_for(&self, count: usize) -> Vec<Hit> {
        eventually(&format!("{count} requests, so far {}", self.count()), SOON, async || {
            (self.count() >= count).then(|| self.hits())
        })
        .await
    }
}

impl Drop for FakeEndpoint {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn accept(listener: std::net::TcpListener, tls: Option<TlsAcceptor>, shared: Arc<Shared>) {
    let listener = tokio::net::TcpListener::from_std(listener).expect("a listener of this thread");
    loop {
        let Ok((stream, _)) = listener.accept().await else { continue };
        stream.set_nodelay(true).expect("a TCP socket");
        shared.opened.fetch_add(1, Ordering::SeqCst);
        shared.open.fetch_add(1, Ordering::SeqCst);
        let (shared, tls) = (Arc::clone(&shared), tls.clone());
        tokio::spawn(async move {
            match tls {
                None => serve(stream, &shared).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        serve(stream, &shared).await;
                    }
                }
            }
            shared.open.fetch_sub(1, Ordering::SeqCst);
        });
    }
}

/// Whether what is under a stream can be reset.
trait Socket: AsyncRead + AsyncWrite + Unpin {
    fn reset(&self);
}

impl Socket for tokio::net::TcpStream {
    fn reset(&self) {
        // Closing with lingering set to nothing sends RST.
        self.set_zero_linger().expect("a TCP socket");
    }
}

impl Socket for tokio_rustls::server::TlsStream<tokio::net::TcpStream> {
    fn reset(&self) {
        self.get_ref().0.reset();
    }
}

async fn serve(mut stream: impl Socket, shared: &Shared) {
    let mut buffer = Vec::new();
    loop {
        let Some((hit, length)) = read_head(&mut stream, &mut buffer).await else { return };
        if let Some(status) = shared.early {
            shared.count.fetch_add(1, Ordering::SeqCst);
            shared.hits.lock().push(hit);
            let _ = answer(&mut stream, status, &[("connection", "close".into())], b"too long").await;
            let _ = stream.shutdown().await;
            // Until the other side has gone, so that what it still sends does not reset what it is to read.
            let mut rest = [0; 4096];
            while matches!(stream.read(&mut rest).await, Ok(1..)) {}
            return;
        }
        while buffer.len() < length {
            if !matches!(stream.read_buf(&mut buffer).await, Ok(1..)) {
                return;
            }
        }
        let hit = Hit { body: buffer.drain(..length).collect(), ..hit };
        let now = shared.under_way.fetch_add(1, Ordering::SeqCst) + 1;
        shared.most_under_way.fetch_max(now, Ordering::SeqCst);
        let reply = (shared.plan)(&hit, shared.count.load(Ordering::SeqCst));
        shared.hits.lock().push(hit);
        shared.count.fetch_add(1, Ordering::SeqCst);
        let goes_on = Box::pin(treat(&mut stream, reply)).await;
        shared.under_way.fetch_sub(1, Ordering::SeqCst);
        if !goes_on {
            return;
        }
    }
}

async fn read_head(stream: &mut impl Socket, buffer: &mut Vec<u8>) -> Option<(Hit, usize)> {
    let end = loop {
        if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        if !matches!(stream.read_buf(buffer).await, Ok(1..)) {
            return None;
        }
    };
    let head = String::from_utf8(buffer.drain(..end).collect()).expect("the backbone's heads are text");
    let mut lines = head.lines();
    let request_line = lines.next().expect("a request line").to_owned();
    let headers: BTreeMap<String, String> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
        .collect();
    let length = headers["content-length"].parse().expect("a length");
    Some((Hit { at: Instant::now(), request_line, headers, body: Vec::new() }, length))
}

async fn answer(
    stream: &mut impl Socket,
    status: u16,
    headers: &[(&'static str, String)],
    body: &[u8],
) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {status} Whatever\r\ncontent-length: {}\r\n", body.len());
    headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
    head.push_str("\r\n");
    stream.write_all(&[head.as_bytes(), body].concat()).await?;
    stream.flush().await
}

/// Treats one request; whether the connection goes on.
async fn treat(stream: &mut impl Socket, reply: Reply) -> bool {
    match reply {
        Reply::Status(status) => answer(stream, status, &[], b"").await.is_ok(),
        Reply::Full { status, headers, body } => answer(stream, status, &headers, &body).await.is_ok(),
        Reply::After(wait, reply) => {
            tokio::time::sleep(wait).await;
            Box::pin(treat(stream, *reply)).await
        }
        Reply::HangBefore => {
            hang(stream).await;
            false
        }
        Reply::HangInside => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n12345").await;
            let _ = stream.flush().await;
            hang(stream).await;
            false
        }
        Reply::CutInside => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n12345").await;
            let _ = stream.flush().await;
            false
        }
        Reply::Close => false,
        Reply::Reset => {
            stream.reset();
            false
        }
        Reply::EndlessBody => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
            while stream.write_all(&[b'x'; 1000]).await.is_ok() {}
            false
        }
        Reply::EndlessHeaders => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n").await;
            while stream.write_all(b"x-more: and more\r\n").await.is_ok() {}
            false
        }
        Reply::Bytewise => {
            let text = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
            for byte in text {
                if stream.write_all(&[*byte]).await.is_err() || stream.flush().await.is_err() {
                    return false;
                }
                tokio::task::yield_now().await;
            }
            true
        }
        Reply::Garbage => {
            let _ = stream.write_all(b"220 mail.example ESMTP ready\r\n\r\n").await;
            let _ = stream.flush().await;
            false
        }
        Reply::OkThenClose => {
            let _ = answer(stream, 200, &[], b"").await;
            false
        }
    }
}

/// Waits until the other side has gone.
async fn hang(stream: &mut impl Socket) {
    let mut rest = [0; 64];
    while matches!(stream.read(&mut rest).await, Ok(1..)) {}
}

/// An authority of the test's own.
pub(crate) struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key.
pub(crate) struct Leaf {
    chain: Vec<rustls::pki_types::CertificateDer<'static>>,
    key: Vec<u8>,
}

impl Authority {
    /// A fresh one.
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "an authority of a test");
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate");
        Self { pem: certificate.pem(), issuer: Issuer::new(params, key) }
    }

    /// Its certificate, to be trusted.
    pub(crate) fn pem(&self) -> &str {
        &self.pem
    }

    /// A certificate for these names and addresses.
    pub(crate) fn leaf(&self, names: &[&str]) -> Leaf {
        self.sign(names, 2100)
    }

    /// One that has expired.
    pub(crate) fn expired_leaf(&self, names: &[&str]) -> Leaf {
        self.sign(names, 2001)
    }

    fn sign(&self, names: &[&str], until_year: i32) -> Leaf {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names of the test");
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(until_year, 1, 1);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        Leaf { chain: vec![certificate.der().clone()], key: key.serialize_der() }
    }
}

impl Leaf {
    /// The certificate in PEM, and its key.
    pub(crate) fn pem(&self) -> (String, String) {
        use base64::Engine as _;
        let pem = |label: &str, der: &[u8]| {
            let text = base64::engine::general_purpose::STANDARD.encode(der);
            let lines: Vec<&str> = text.as_bytes().chunks(64).filter_map(|line| str::from_utf8(line).ok()).collect();
            format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
        };
        (pem("CERTIFICATE", &self.chain[0]), pem("PRIVATE KEY", &self.key))
    }

    fn acceptor(&self) -> TlsAcceptor {
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.key.clone()));
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("ring has them")
            .with_no_client_auth()
            .with_single_cert(self.chain.clone(), key)
            .expect("the key is the certificate's");
        TlsAcceptor::from(Arc::new(config))
    }
}
