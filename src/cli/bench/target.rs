//! The router that is measured: one of our own in a temporary directory, or one that runs already.

use std::cell::RefCell;
use std::time::Duration;

use base64::Engine as _;
use futures_util::{StreamExt as _, stream};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::wire::{Answer, Wire};
use super::{Options, Variant};
use crate::cli::api::{Api, Call, Who};
use crate::cli::child::{Router, Settings};
use crate::cli::context::Context;
use crate::cli::error::CliError;
use crate::cli::progress;
use crate::websocket::WebSocket;

/// Clients removed at once when the bench tidies up.
const REMOVED_AT_ONCE: usize = 16;

/// How long an answer may take, the time that a receiver waits for messages included.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest head of the answer to a handshake, in bytes.
const HEAD_BYTES_MAX: usize = 8 * 1024;

/// A router under load.
pub(super) struct Target {
    /// `host:port`.
    pub(super) address: String,
    /// For everything but the hot loops.
    pub(super) api: Api,
    admin: Who,
    /// Our own, if it is.
    pub(super) router: Option<Router>,
    /// Names everything that this run makes, so that it meets nobody else's.
    pub(super) run: String,
    /// Whether what it makes outlives it, and must be removed.
    leaves_traces: bool,
    made: RefCell<Vec<String>>,
}

/// A client of the bench.
pub(super) struct Party {
    /// Its id.
    pub(super) id: String,
    authorization: String,
}

/// A connection that makes one kind of call, over and over.
pub(super) struct Caller {
    wire: Wire,
    prefix: Vec<u8>,
    request: Vec<u8>,
}

impl Target {
    /// Starts a router, or looks at the one that `--url` names.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub(super) async fn open(context: &Context, options: &Options, variant: Variant) -> Result<Self, CliError> {
        let run = format!("{:06x}", rand::random::<u32>() & 0x00ff_ffff);
        let (api, admin, router, leaves_traces) = if context.url_was_typed {
            (context.api()?, context.admin()?, None, true)
        } else {
            let settings = Settings {
                what: "bench",
                parent: options.dir.as_deref(),
                broker: options.broker.as_deref(),
                queue_type: options.queue_type.as_deref(),
                // For webhooks to the bench itself.
                webhook_allow: Some("127.0.0.1"),
                trace_messages: (!variant.is_traced).then_some("0"),
                ..Settings::default()
            };
            let router = Router::start(&settings).await?;
            let broker_is_shared = options.broker.as_deref().is_some_and(|broker| broker != "embedded");
            (Api::new(router.url(), None)?, router.admin()?, Some(router), broker_is_shared)
        };
        let url = api.url();
        let (Some(host), "http", "/") = (url.host_str(), url.scheme(), url.path()) else {
            return Err(CliError::usage("bench speaks plain HTTP to http://HOST:PORT: measure behind the TLS proxy"));
        };
        let address = format!("{host}:{}", url.port_or_known_default().unwrap_or(80));
        Ok(Self { address, api, admin, router, run, leaves_traces, made: RefCell::default() })
    }

    /// A topic of this run.
    pub(super) fn topic(&self, name: &str) -> String {
        format!("bench.{}.{name}", self.run)
    }

    /// Onboards a client of the bench.
    ///
    /// # Errors
    /// What the router says.
    pub(super) async fn onboard(&self, name: &str, subscriptions: &[String]) -> Result<Party, CliError> {
        Ok(self.onboard_as(name, json!({"subscriptions": subscriptions})).await?.0)
    }

    /// Onboards a client with these properties. Returns also the router's answer.
    ///
    /// # Errors
    /// What the router says.
    pub(super) async fn onboard_as(&self, name: &str, mut client: Value) -> Result<(Party, Value), CliError> {
        let id = format!("bench-{}-{name}", self.run);
        client["client_id"] = json!(id);
        let call = Call::new(Method::POST, &["clients"], &self.admin).json(client.to_string());
        let record: Value = self.api.fetch(&call).await?;
        self.note_made(id.clone());
        let secret = record["secret"].as_str().unwrap_or_default();
        Ok((Party::new(id, secret), record))
    }

    /// Something to remove afterwards.
    pub(super) fn note_made(&self, id: String) {
        if self.leaves_traces {
            self.made.borrow_mut().push(id);
        }
    }

    /// Removes every client that this run has made, where they would stay otherwise.
    ///
    /// # Errors
    /// What the router says; the others are removed nevertheless.
    pub(super) async fn tidy_up(&self, json: bool) -> Result<(), CliError> {
        let made = self.made.take();
        if made.is_empty() {
            return Ok(());
        }
        let bar = progress::bar(Some(made.len() as u64), "removing the bench's clients", json);
        let removals = stream::iter(made)
            .map(|id| async move { self.api.call(&Call::new(Method::DELETE, &["clients", &id], &self.admin)).await });
        let mut removals = removals.buffer_unordered(REMOVED_AT_ONCE);
        let mut outcome = Ok(());
        while let Some(removed) = removals.next().await {
            bar.inc(1);
            if let Err(failure) = removed
                && outcome.is_ok()
            {
                outcome =
                    Err(CliError::failed(format!("could not remove all clients bench-{}-…: {failure}", self.run)));
            }
        }
        bar.finish_and_clear();
        outcome
    }

    /// The router's resident memory, if it is ours.
    pub(super) fn resident_bytes(&mut self) -> Option<u64> {
        self.router.as_mut()?.process().resident_bytes()
    }

    /// A connection over which the operator onboards clients.
    pub(super) fn onboarder(&self) -> Caller {
        Caller::post(&self.address, "/clients", &self.operator(), "application/json")
    }

    /// A connection over which a client sends one message, or many as NDJSON.
    pub(super) fn sender(&self, party: &Party) -> Caller {
        Caller::post(&self.address, "/send", &party.authorization, "application/x-ndjson")
    }

    /// A connection over which a client sends a single JSON object.
    pub(super) fn single_sender(&self, party: &Party) -> Caller {
        Caller::post(&self.address, "/send", &party.authorization, "application/json")
    }

    /// A connection over which the operator asks for the metrics.
    pub(super) fn scraper(&self) -> Caller {
        Caller::new(&self.address, "GET", "/metrics", &format!("authorization: {}\r\n", self.operator()))
    }

    fn operator(&self) -> String {
        let Who::Admin(token) = &self.admin else { unreachable!("the bench asks as the operator") };
        format!("Bearer {token}")
    }

    /// The feed of the console, with a page of clients and a tail of messages.
    ///
    /// # Errors
    /// When the router refuses it.
    pub(super) async fn console_feed(&self, tail: &str) -> Result<TcpStream, CliError> {
        let path = format!("/console/feed?clients=1&tail={tail}").replace('#', "%23");
        self.stream(&path, &format!("authorization: {}\r\n", self.operator()), 200).await
    }

    /// A client's WebSocket.
    ///
    /// # Errors
    /// When the router refuses it.
    pub(super) async fn socket(&self, party: &Party) -> Result<WebSocket<TcpStream>, CliError> {
        let key = base64::engine::general_purpose::STANDARD.encode(rand::random::<[u8; 16]>());
        let headers = format!(
            "authorization: {}\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
             sec-websocket-key: {key}\r\n",
            party.authorization
        );
        Ok(WebSocket::over(self.stream("/ws", &headers, 101).await?))
    }

    /// A connection on which the answer to a GET goes on after its head, which is read here.
    async fn stream(&self, path: &str, headers: &str, status: u16) -> Result<TcpStream, CliError> {
        let cannot = |error| CliError::failed(format!("cannot open {path}: {error}"));
        let mut stream = TcpStream::connect(&self.address).await.map_err(cannot)?;
        stream.set_nodelay(true).map_err(cannot)?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: {}\r\n{headers}\r\n", self.address);
        stream.write_all(request.as_bytes()).await.map_err(cannot)?;
        let mut head = Vec::new();
        // Byte by byte: what follows is not ours to read.
        while !head.ends_with(b"\r\n\r\n") && head.len() < HEAD_BYTES_MAX {
            head.push(stream.read_u8().await.map_err(cannot)?);
        }
        if !head.starts_with(format!("HTTP/1.1 {status} ").as_bytes()) {
            let said = String::from_utf8_lossy(&head);
            let line = said.lines().next().unwrap_or_default();
            return Err(CliError::failed(format!("cannot open {path}: the router answered {line}")));
        }
        Ok(stream)
    }

    /// A connection over which a client reads its inbox, waiting up to `wait_s`.
    pub(super) fn receiver(&self, party: &Party, wait_s: u32) -> Caller {
        let path = format!("/receive?max=1000&wait={wait_s}&ack=auto");
        Caller::new(&self.address, "GET", &path, &format!("authorization: {}\r\n", party.authorization))
    }
}

impl Party {
    /// A client by its credentials.
    pub(super) fn new(id: String, secret: &str) -> Self {
        let credentials = base64::engine::general_purpose::STANDARD.encode(format!("{id}:{secret}"));
        Self { id, authorization: format!("Basic {credentials}") }
    }
}

impl Caller {
    /// POSTs of bodies of one kind.
    pub(super) fn post(address: &str, path: &str, authorization: &str, content_type: &str) -> Self {
        let headers = format!("authorization: {authorization}\r\ncontent-type: {content_type}\r\n");
        Self::new(address, "POST", path, &headers)
    }

    fn new(address: &str, method: &str, path: &str, headers: &str) -> Self {
        let prefix = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\n{headers}").into_bytes();
        Self { wire: Wire::new(address), prefix, request: Vec::new() }
    }

    /// Makes the call with a body.
    ///
    /// # Errors
    /// When there is no answer.
    pub(super) async fn call(&mut self, body: &[u8]) -> Result<Answer<'_>, CliError> {
        self.call_with("", body).await
    }

    /// Makes the call with more headers, a line each.
    ///
    /// # Errors
    /// When there is no answer.
    pub(super) async fn call_with(&mut self, headers: &str, body: &[u8]) -> Result<Answer<'_>, CliError> {
        self.request.clear();
        self.request.extend_from_slice(&self.prefix);
        self.request.extend_from_slice(headers.as_bytes());
        if !body.is_empty() {
            self.request.extend_from_slice(b"content-length: ");
            self.request.extend_from_slice(itoa::Buffer::new().format(body.len()).as_bytes());
            self.request.extend_from_slice(b"\r\n");
        }
        self.request.extend_from_slice(b"\r\n");
        self.request.extend_from_slice(body);
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, self.wire.exchange(&self.request)).await;
        answer
            .map_err(|_| CliError::failed(format!("the router did not answer for {} s", ANSWER_TIMEOUT.as_secs())))?
            .map_err(|error| CliError::failed(format!("the connection to the router broke under load: {error}")))
    }
}

/// An answer that is none of those that a scenario knows.
pub(super) fn unexpected(answer: &Answer<'_>) -> CliError {
    let said: String = String::from_utf8_lossy(answer.body).chars().take(300).collect();
    CliError::failed(format!("the router answered {} under load: {said}", answer.status))
}
