//! The HTTP API (contract, sections 4 and 10). [`routes`] reads as the API.
//!
//! # Layout
//! - [`edge`] is around everything: request ids, problems, counters. [`route`] is a path with its methods, and what a
//!   handler gets and returns. [`error`] is the problem; [`auth`] says who calls; [`server`] listens.
//! - [`body`], [`query`], [`fields`] read requests and name every mistake; [`batch`] reads messages;
//!   [`budget`] bounds what large bodies, large answers and long polls may take.
//! - One file per resource: [`send`], [`receive`] (with [`envelopes`]), [`settle`], [`token`], [`clients`] (with
//!   [`client_body`] and [`client_view`]), [`secrets`], [`webhooks`], [`dead_letters`], [`health`], [`openapi`].
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
mod console;
mod dead_letters;
mod edge;
mod envelopes;
mod error;
mod fields;
mod health;
mod messages;
mod openapi;
mod pages;
mod query;
mod receive;
mod route;
mod secrets;
mod send;
mod server;
mod settle;
#[cfg(test)]
mod tests;
mod token;
mod webhooks;
mod ws;

use std::net::TcpListener;
use std::sync::Arc;

use actix::Addr;
use actix_web::dev::Server;
use actix_web::web;
use bytes::Bytes;
use tokio::sync::watch;

use budget::Budget;
use error::Problem;
use route::{At, at};
use server::serve;

use crate::actors::registry::ClientRegistry;
use crate::broker::Broker;
use crate::config::Config;
use crate::directory::Directory;
use crate::limits::GuessLimiter;
use crate::secret::SecretHash;
use crate::telemetry::Telemetry;
use crate::token::Tokens;
use crate::webhook::Means;

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
    /// Sends webhooks, and knows how they fare.
    pub webhooks: Means,
}

/// What all calls share.
pub(crate) struct Api {
    state: State,
    guesses: GuessLimiter,
    budget: Arc<Budget>,
    sockets: Arc<ws::Sockets>,
    tests: webhooks::Tests,
    openapi: Bytes,
}

impl Api {
    fn new(state: State) -> Self {
        let openapi = openapi::document().to_json().expect("the document is plain data");
        let budget = Arc::new(Budget::new(send::request_bytes_max(state.config.max_message_bytes)));
        Self {
            state,
            guesses: GuessLimiter::default(),
            budget,
            sockets: Arc::default(),
            tests: webhooks::Tests::default(),
            openapi: openapi.into(),
        }
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
        at("/ws").take(ws::ws),
        at("/token").post(token::token),
        at("/clients").get(clients::list).post(clients::create),
        at("/clients/{id}").get(clients::show).patch(clients::patch).delete(clients::delete),
        at("/clients/{id}/secret").post(secrets::rotate_client),
        at("/clients/{id}/webhook-secret").post(secrets::rotate_webhook),
        at("/clients/{id}/attempts").get(webhooks::attempts),
        at("/clients/{id}/webhook/test").post(webhooks::test),
        at("/clients/{id}/dead-letters").get(dead_letters::list).delete(dead_letters::purge),
        at("/clients/{id}/dead-letters/replay").post(dead_letters::replay),
        at("/messages/{id}").get(messages::show),
        at("/").get(pages::console),
        at("/docs").get(pages::docs),
        at("/console/feed").take(console::feed),
        at("/console/{file}").get(pages::asset),
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

/// Serves the API on `listener`, by https when `tls` is given, and the metrics on `metrics_listener`: apart, so that
/// Prometheus gets through when the API is full. Both are bound and listen. Returns the servers, to be awaited or
/// spawned; each stops by its handle, gracefully within `SOAR_SHUTDOWN_TIMEOUT`. Signals are the caller's.
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
    let mut servers = vec![serve(&api, listener, tls, routes)?];
    if let Some(listener) = metrics_listener {
        servers.push(serve(&api, listener, None, metrics_routes)?);
    }
    Ok(servers)
}
