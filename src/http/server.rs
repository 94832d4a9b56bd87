//! The listening side: workers, connections, timeouts.

use std::net::TcpListener;
use std::time::Duration;

use actix_web::dev::Server;
use actix_web::{App, HttpRequest, HttpServer, web};
use rustls::ServerConfig;

use super::Api;
use super::edge::Edge;
use super::error::Problem;
use super::route::{Answer, At};

/// How long an idle connection is kept. Longer than the 60 s after which many proxies drop their side, so that they do,
/// and no request crosses our close.
const KEEP_ALIVE: Duration = Duration::from_secs(75);

/// How long a connection may take to send its first request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection may take to go once it is to be closed.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Connections that one worker holds at most.
const CONNECTIONS_MAX: usize = 25_000;

/// Open files left for everything that is neither caller nor webhook: the database, the broker.
const FILES_KEPT: usize = 512;

/// Starts serving `routes` on a listening socket, by https when `tls` is given.
pub(super) fn serve(
    api: &web::Data<Api>,
    listener: TcpListener,
    tls: Option<ServerConfig>,
    routes: fn() -> Vec<At>,
) -> std::io::Result<Server> {
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
    let server = match tls {
        Some(tls) => server.listen_rustls_0_23(listener, tls)?,
        None => server.listen(listener)?,
    };
    Ok(server.run())
}

/// Connections for one worker: what the limit of open files allows, so that running out of files stops accepting and
/// not the database.
fn connections_max(workers: usize) -> usize {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    let files = usize::try_from(files).unwrap_or(usize::MAX);
    // Webhooks may take half of them.
    ((files / 2).saturating_sub(FILES_KEPT) / workers).clamp(64, CONNECTIONS_MAX)
}

async fn no_such_path(_: HttpRequest) -> Answer {
    Err(Problem::not_found("there is nothing at this path; GET /openapi.json lists what there is"))
}
