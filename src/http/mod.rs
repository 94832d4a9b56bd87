//! HTTP: what the handlers share, and the server.

use std::net::TcpListener;
use std::sync::Arc;

use actix::Addr;
use actix_web::dev::Server;
use actix_web::{App, HttpResponse, HttpServer, web};

use crate::actors::registry::{ClientRegistry, GetReadiness};
use crate::app::ShutdownSignal;
use crate::broker::{Broker, Health};
use crate::config::Config;
use crate::directory::Directory;
use crate::secret::SecretHash;
use crate::telemetry::Telemetry;
use crate::token::Tokens;

/// What every handler may use.
#[derive(Clone)]
pub struct State {
    /// The broker.
    pub broker: Arc<dyn Broker>,
    /// The control plane.
    pub registry: Addr<ClientRegistry>,
    /// The clients.
    pub directory: Arc<Directory>,
    /// Metrics and traces.
    pub telemetry: Telemetry,
    /// The configuration.
    pub config: Arc<Config>,
    /// Mints and verifies tokens.
    pub tokens: Arc<Tokens>,
    /// Hash of the admin token.
    pub admin: SecretHash,
    /// Becomes true when the program begins to stop.
    pub shutdown: ShutdownSignal,
}

/// Sockets that are bound and listening.
#[derive(Debug)]
pub struct Listeners {
    /// For the API.
    pub api: TcpListener,
    /// For metrics and health only.
    pub metrics: Option<TcpListener>,
}

/// Starts the server. It does not look at signals: the caller stops it.
///
/// # Errors
/// When its threads cannot be started.
pub fn start(state: State, listeners: Listeners) -> std::io::Result<Server> {
    let server = HttpServer::new(move || {
        let health = || {
            App::new()
                .app_data(web::Data::new(state.clone()))
                .route("/livez", web::get().to(HttpResponse::Ok))
                .route("/readyz", web::get().to(ready))
        };
        health()
    })
    .disable_signals()
    .listen(listeners.api)?;
    let server = match listeners.metrics {
        Some(listener) => server.listen(listener)?,
        None => server,
    };
    Ok(server.run())
}

async fn ready(state: web::Data<State>) -> HttpResponse {
    let readiness = state.registry.send(GetReadiness).await;
    let broker = state.broker.health() == Health::Ready;
    match readiness {
        Ok(readiness) if readiness.ready && broker => HttpResponse::Ok().finish(),
        _ => HttpResponse::ServiceUnavailable().finish(),
    }
}
