//! The HTTP API (contract, sections 4 and 10). [`routes`] reads as the API.
//!
//! # Layout
//! - [`edge`] is around everything: request ids, problems, counters. [`route`] is a path with its methods, and what a
//!   handler gets and returns. [`error`] is the problem; [`auth`] says who calls.
//! - [`body`], [`query`], [`fields`] read requests and name every mistake; [`item`] and [`batch`] read messages;
//!   [`budget`] bounds what large bodies, large answers and long polls may take.
//! - One file per resource: [`send`], [`receive`] (with [`envelopes`]), [`settle`], [`token`], [`clients`] (with
//!   [`client_body`] and [`client_view`]), [`secrets`], [`dead_letters`], [`health`], [`openapi`].
//!
//! # Invariants
//! - No message waits for the control plane: the message calls read the directory and ask the broker only.
//! - A handler's future may be dropped at any await: the caller hung up. Nothing it began is half done then; see the
//!   guarantees of [`crate::broker`].
//! - Nothing is read or kept without a bound in bytes, in number and in time.

mod auth;
mod batch;
mod body;
mod budget;
mod client_body;
mod client_view;
mod clients;
mod dead_letters;
mod edge;
mod envelopes;
mod error;
mod fields;
mod health;
mod item;
mod openapi;
mod query;
mod receive;
mod route;
mod secrets;
mod send;
mod settle;
mod token;

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use actix::Addr;
use actix_web::dev::Server;
use actix_web::{App, HttpRequest, HttpServer, web};
use bytes::Bytes;
use tokio::sync::watch;

use budget::Budget;
use edge::Edge;
use error::Problem;
use route::{Answer, At, at};

use crate::actors::registry::ClientRegistry;
use crate::broker::Broker;
use crate::config::Config;
use crate::directory::Directory;
use crate::limits::GuessLimiter;
use crate::secret::SecretHash;
use crate::telemetry::Telemetry;
use crate::token::Tokens;

/// How long an idle connection is kept. Longer than the 60 s after which many proxies drop their side, so that they do,
/// and no request crosses our close.
const KEEP_ALIVE: Duration = Duration::from_secs(75);

/// How long a connection may take to send its first request's head, and to go once it is to be closed.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Connections that the kernel holds until they are accepted (it caps this at `net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// Connections that one worker holds at most, and descriptors left for everything else.
const CONNECTIONS_MAX: usize = 25_000;
const DESCRIPTORS_KEPT: usize = 200;

/// What the API is made from.
#[derive(Clone)]
pub struct State {
    /// Queues and exchanges.
    pub broker: Arc<dyn Broker>,
    /// The control plane.
    pub registry: Addr<ClientRegistry>,
    /// What the message calls need to know of the clients.
    pub directory: Arc<Directory>,
    /// Metrics and traces.
    pub telemetry: Telemetry,
    /// The configuration.
    pub config: Arc<Config>,
    /// Mints and verifies clients' tokens.
    pub tokens: Arc<Tokens>,
    /// SHA-256 of the admin token.
    pub admin: SecretHash,
    /// True once the backbone shuts down: long polls end, and no new work is taken.
    pub shutdown: watch::Receiver<bool>,
}

/// What all calls share.
pub(crate) struct Api {
    state: State,
    guesses: GuessLimiter,
    budget: Arc<Budget>,
    openapi: Bytes,
}

impl Api {
    fn new(state: State) -> Self {
        let openapi = openapi::document().to_json().expect("the document is plain data");
        let budget = Arc::new(Budget::new(send::request_bytes_max(state.config.max_message_bytes)));
        Self { state, guesses: GuessLimiter::default(), budget, openapi: openapi.into() }
    }

    fn request_bytes_max(&self) -> usize {
        send::request_bytes_max(self.state.config.max_message_bytes)
    }

    fn refuse_when_closing(&self) -> Result<(), Problem> {
        if *self.state.shutdown.borrow() { Err(Problem::shutting_down()) } else { Ok(()) }
    }
}

/// The API. `take` is a `GET` that takes something, so without a `HEAD`.
fn routes() -> Vec<At> {
    vec![
        at("/send").post(send::send),
        at("/notify").post(send::notify),
        at("/receive").take(receive::receive),
        at("/ack").post(settle::ack),
        at("/nack").post(settle::nack),
        at("/token").post(token::token),
        at("/clients").get(clients::list).post(clients::create),
        at("/clients/{id}").get(clients::show).patch(clients::patch).delete(clients::delete),
        at("/clients/{id}/secret").post(secrets::rotate_client),
        at("/clients/{id}/webhook-secret").post(secrets::rotate_webhook),
        at("/clients/{id}/dead-letters").get(dead_letters::list).delete(dead_letters::purge),
        at("/clients/{id}/dead-letters/replay").post(dead_letters::replay),
        at("/livez").get(health::livez),
        at("/readyz").get(health::readyz),
        at("/metrics").get(health::metrics),
        at("/openapi.json").get(openapi::openapi),
    ]
}

/// What `SOAR_METRICS_BIND` serves, to anyone.
fn metrics_routes() -> Vec<At> {
    vec![at("/livez").get(health::livez), at("/readyz").get(health::readyz), at("/metrics").get(health::open_metrics)]
}

/// Serves the API on `listener`, by https when `tls` is given, and the metrics on `metrics_listener`. Returns the
/// servers, to be awaited or spawned; each stops by its handle, gracefully within `SOAR_SHUTDOWN_TIMEOUT`.
///
/// # Errors
/// When a listener cannot be used.
pub fn start(
    state: State,
    listener: TcpListener,
    metrics_listener: Option<TcpListener>,
    tls: Option<rustls::ServerConfig>,
) -> std::io::Result<Vec<Server>> {
    let api = web::Data::new(Api::new(state));
    let mut servers = Vec::with_capacity(2);
    servers.push(serve(&api, listener, tls, routes)?);
    if let Some(listener) = metrics_listener {
        servers.push(serve(&api, listener, None, metrics_routes)?);
    }
    Ok(servers)
}

fn serve(
    api: &web::Data<Api>,
    listener: TcpListener,
    tls: Option<rustls::ServerConfig>,
    routes: fn() -> Vec<At>,
) -> std::io::Result<Server> {
    // The standard library listens with a backlog of 128, which a burst of connections overruns for a second and more.
    rustix::net::listen(&listener, BACKLOG)?;
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let shutdown_timeout_s = api.state.config.shutdown_timeout.as_secs();
    let api = api.clone();
    let server = HttpServer::new(move || {
        let requests = api.state.telemetry.metrics.requests.clone();
        App::new()
            .app_data(api.clone())
            .configure(|app| routes().into_iter().for_each(|at| at.register(app, &requests)))
            .default_service(web::to(no_such_path))
            .wrap(Edge::new(requests.clone()))
    })
    .workers(workers)
    .max_connections(connections_max(workers))
    .keep_alive(KEEP_ALIVE)
    .client_request_timeout(HEAD_TIMEOUT)
    .client_disconnect_timeout(DISCONNECT_TIMEOUT)
    // A peer that closes its side is gone, as for most servers: the connection drops the handler's future at once, so
    // that a long poll takes no batch for nobody.
    .h1_allow_half_closed(false)
    .tcp_nodelay(true)
    // The process has its own: the shutdown order is not the HTTP server's to decide.
    .disable_signals()
    .shutdown_timeout(shutdown_timeout_s);
    Ok(match tls {
        Some(tls) => server.listen_rustls_0_23(listener, tls)?,
        None => server.listen(listener)?,
    }
    .run())
}

/// Connections for one worker: what the limit of open files allows, so that running out of descriptors stops accepting
/// and not the database.
fn connections_max(workers: usize) -> usize {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    let files = usize::try_from(files).unwrap_or(usize::MAX);
    (files.saturating_sub(DESCRIPTORS_KEPT) / workers).clamp(64, CONNECTIONS_MAX)
}

async fn no_such_path(request: HttpRequest) -> Answer {
    let hint = "GET /openapi.json lists what there is";
    Err(Problem::not_found(format!("there is nothing at {}; {hint}", request.path())))
}
