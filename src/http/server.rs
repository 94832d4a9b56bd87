//! The listening side: workers, connections, timeouts. One server for the API, and one for the metrics if they have a
//! listener of their own, so that Prometheus gets through when the API is full.

use std::future::Future;
use std::net::TcpListener;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use actix_web::{App, HttpRequest, HttpServer, dev, web};

use super::edge::Edge;
use super::error::Problem;
use super::route::{Answer, At};
use super::{Api, tls};
use crate::config::TlsFiles;

/// How long an idle connection is kept. Longer than the 60 s after which many proxies drop their side, so that they do,
/// and no request crosses our close.
const KEEP_ALIVE: Duration = Duration::from_secs(75);

/// How long a connection may take to send its first request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a connection may take to go once it is to be closed.
const DISCONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Connections that one worker holds at most.
const CONNECTIONS_MAX: usize = 25_000;

/// Open files left for everything that is not a caller: the database, the broker, webhooks.
const FILES_KEPT: usize = 512;

/// Sockets that are bound and listening.
#[derive(Debug)]
pub struct Listeners {
    /// For the API.
    pub api: TcpListener,
    /// For metrics and health only.
    pub metrics: Option<TcpListener>,
}

/// The running servers. Resolves when they have ended; it must be polled for them to stop.
pub struct Server(Vec<dev::Server>);

/// Stops a [`Server`].
#[derive(Clone)]
pub struct ServerHandle(Vec<dev::ServerHandle>);

impl Server {
    pub(super) fn start(
        api: &web::Data<Api>,
        listeners: Listeners,
        routes: fn() -> Vec<At>,
        metrics_routes: fn() -> Vec<At>,
    ) -> std::io::Result<Self> {
        let mut servers = vec![serve(api, listeners.api, api.state.config.tls.as_ref(), routes)?];
        if let Some(listener) = listeners.metrics {
            servers.push(serve(api, listener, None, metrics_routes)?);
        }
        Ok(Self(servers))
    }

    /// A handle to stop it by.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle(self.0.iter().map(dev::Server::handle).collect())
    }
}

impl ServerHandle {
    /// Takes no more connections. Gracefully, requests under way end first, within `SOAR_SHUTDOWN_TIMEOUT`; the metrics
    /// stay until then.
    pub async fn stop(&self, graceful: bool) {
        for handle in &self.0 {
            handle.stop(graceful).await;
        }
    }
}

impl Future for Server {
    type Output = std::io::Result<()>;

    /// All of them are polled each time: there are two at the most, and each wakes this rarely.
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut index = 0;
        while index < self.0.len() {
            match Pin::new(&mut self.0[index]).poll(cx) {
                Poll::Ready(Ok(())) => drop(self.0.swap_remove(index)),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => index += 1,
            }
        }
        if self.0.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }
}

fn serve(
    api: &web::Data<Api>,
    listener: TcpListener,
    tls: Option<&TlsFiles>,
    routes: fn() -> Vec<At>,
) -> std::io::Result<dev::Server> {
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
        Some(files) => server.listen_rustls_0_23(listener, tls::server_config(files)?)?,
        None => server.listen(listener)?,
    };
    Ok(server.run())
}

/// Connections for one worker: what the limit of open files allows, so that running out of files stops accepting and
/// not the database.
fn connections_max(workers: usize) -> usize {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    let files = usize::try_from(files).unwrap_or(usize::MAX);
    (files.saturating_sub(FILES_KEPT) / workers).clamp(64, CONNECTIONS_MAX)
}

async fn no_such_path(_: HttpRequest) -> Answer {
    Err(Problem::not_found("there is nothing at this path; GET /openapi.json lists what there is"))
}
