//! The composition root: what is built in which order, and taken down in which.
//!
//! Up: data directory, database, secrets, store, broker, registry (which brings up the actors), HTTP. The directory has
//! every client before the first request is taken; `/readyz` says when their actors are at work.
//!
//! Down, on SIGTERM or SIGINT: readiness off, and long polls answer; no new connections, requests under way end; the
//! actors stop, and what they held goes back; the broker makes durable what it took; the database closes. All within
//! `SOAR_SHUTDOWN_TIMEOUT`: what has not ended by then is left where it stands, which costs nothing that was accepted.

mod error;
mod signals;

use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::Addr;
use actix_rt::task::JoinHandle;
use actix_web::dev::ServerHandle;
use futures_util::future::{join_all, try_join_all};
use tokio::sync::{oneshot, watch};

use crate::actors::pusher;
use crate::actors::registry::{ClientRegistry, GetActorCensus, RegistryParts, Shutdown};
use crate::broker::{Broker, BrokerError, embedded};
use crate::config::{BrokerChoice, Config, TlsFiles};
use crate::db::Db;
use crate::directory::Directory;
use crate::http;
use crate::migrate;
use crate::secret::{self, Secret, SecretHash};
use crate::store::Store;
use crate::telemetry::{self, Observer, Telemetry};
use crate::token::{TokenSecret, Tokens};
use crate::webhook;

pub use error::AppError;
use signals::Signals;

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 4096;

/// Becomes true when the program begins to stop; then nothing new is begun, and what waits answers.
pub type ShutdownSignal = watch::Receiver<bool>;

/// A running backbone.
pub struct App {
    config: Arc<Config>,
    db: Db,
    broker: Arc<dyn Broker>,
    directory: Arc<Directory>,
    telemetry: Telemetry,
    registry: Addr<ClientRegistry>,
    admin_token: String,
    address: SocketAddr,
    metrics_address: Option<SocketAddr>,
    servers: Vec<ServerHandle>,
    servers_end: JoinHandle<std::io::Result<()>>,
    observer: JoinHandle<()>,
    attempts: Arc<webhook::AttemptLog>,
    attempts_run: JoinHandle<()>,
    closing: watch::Sender<bool>,
}

impl App {
    /// Builds and starts everything. When it returns, requests are taken; port 0 in the configuration takes a free one.
    ///
    /// # Errors
    /// [`AppError`]; whatever was started before has then ended.
    pub async fn build(config: Config) -> Result<Self, AppError> {
        // One provider for every TLS connection in the process. A second call, by another router in it, changes nothing.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let config = Arc::new(config);
        let tls = config.tls.as_ref().map(load_tls).transpose()?;
        // Before anything is opened: the likeliest mistake is an address that is taken.
        let (listener, address) = listen("SOAR_BIND", config.bind).await?;
        let metrics = match config.metrics_bind {
            Some(bind) => Some(listen("SOAR_METRICS_BIND", bind).await?),
            None => None,
        };
        make_data_dir(&config)?;
        let path = config.database_path();
        let database = |source| AppError::Database { path: path.clone(), source };
        let db = Db::open(&path).map_err(database)?;
        let admin_token = match &config.admin_token {
            Some(token) => token.clone(),
            None => secret_file(config.admin_token_path(), || Secret::generate().reveal().to_owned())?,
        };
        let token_secret = token_secret(&config)?;
        let telemetry = telemetry::new(config.trace_messages);
        let store = Store::open(db.clone(), &token_secret).await.map_err(database)?;
        let loaded = store.load().await.map_err(database)?;
        if let Some(why) = migrate::check_start(&store, &config).await.map_err(database)? {
            return Err(AppError::Moving(why));
        }
        let broker = open_broker(&config, &db, &telemetry).await.map_err(AppError::Broker)?;
        let connector = webhook::tls::connector(config.webhook_ca.as_deref()).map_err(AppError::WebhookCa)?;
        let sender = webhook::Sender::new(config.webhook_allow.clone(), connector);
        let webhooks = webhook::Means::open(db.clone(), sender, config.attempt_retention, Arc::clone(&telemetry));
        let webhooks = webhooks.await.map_err(database)?;
        let directory = Arc::new(Directory::default());
        let parts = RegistryParts {
            broker: Arc::clone(&broker),
            store,
            directory: Arc::clone(&directory),
            telemetry: Arc::clone(&telemetry),
            max_message_bytes: config.max_message_bytes,
            retention: config.attempt_retention,
            pusher: Some(pusher::factory(webhooks.clone())),
            attempts: Some(Arc::clone(&webhooks.log)),
        };
        let registry = ClientRegistry::start(parts, loaded)
            .map_err(|source| AppError::Start { what: "the actors' threads", source })?;
        let (closing, shutdown) = watch::channel(false);
        let (metrics_listener, metrics_address) = metrics.unzip();
        let state = http::State {
            broker: Arc::clone(&broker),
            registry: registry.clone(),
            directory: Arc::clone(&directory),
            telemetry: Arc::clone(&telemetry),
            config: Arc::clone(&config),
            tokens: Arc::new(Tokens::new(token_secret, config.token_lifetime)),
            admin: SecretHash::of(&admin_token),
            shutdown,
            webhooks: webhooks.clone(),
        };
        let servers = http::start(state, listener, metrics_listener, tls)
            .map_err(|source| AppError::Start { what: "the HTTP server", source })?;
        let observer = observe(&broker, &directory, &telemetry, &registry);
        Ok(Self {
            config,
            db,
            broker,
            directory,
            telemetry,
            registry,
            admin_token,
            address,
            metrics_address,
            servers: servers.iter().map(actix_web::dev::Server::handle).collect(),
            servers_end: actix_rt::spawn(async move { try_join_all(servers).await.map(|_| ()) }),
            observer,
            attempts_run: actix_rt::spawn(Arc::clone(&webhooks.log).run()),
            attempts: webhooks.log,
            closing,
        })
    }

    /// Where the API listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where `SOAR_METRICS_BIND` listens.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// The API's URL, for who is on this machine.
    pub fn url(&self) -> String {
        let scheme = if self.config.tls.is_some() { "https" } else { "http" };
        let mut address = self.address;
        if address.ip().is_unspecified() {
            let loopback: std::net::IpAddr =
                if address.is_ipv4() { [127, 0, 0, 1].into() } else { std::net::Ipv6Addr::LOCALHOST.into() };
            address.set_ip(loopback);
        }
        format!("{scheme}://{address}")
    }

    /// The admin token.
    pub fn admin_token(&self) -> &str {
        &self.admin_token
    }

    /// The broker.
    pub fn broker(&self) -> &Arc<dyn Broker> {
        &self.broker
    }

    /// The registry.
    pub fn registry(&self) -> &Addr<ClientRegistry> {
        &self.registry
    }

    /// The clients.
    pub fn directory(&self) -> &Arc<Directory> {
        &self.directory
    }

    /// Metrics and traces.
    pub fn telemetry(&self) -> &Telemetry {
        &self.telemetry
    }

    /// Says where it listens and what to try next.
    pub fn log_banner(&self) {
        let url = self.url();
        let token = match &self.config.admin_token {
            Some(_) => "in SOAR_ADMIN_TOKEN".to_owned(),
            None => format!("in {}", self.config.admin_token_path().display()),
        };
        let bearer = match &self.config.admin_token {
            Some(_) => "$SOAR_ADMIN_TOKEN".to_owned(),
            None => format!("$(cat {})", self.config.admin_token_path().display()),
        };
        for warning in &self.config.warnings {
            log::warn!("{warning}");
        }
        log::info!("Communications Backbone {} listens on {url} (console: {url}/, API: {url}/docs)", crate::VERSION);
        if let Some(address) = self.metrics_address {
            log::info!("metrics and health on http://{address}/metrics");
        }
        log::info!(
            "broker: {}; data in {}; {} clients",
            self.broker.name(),
            self.config.data_dir.display(),
            self.directory.len()
        );
        log::info!("admin token: {token}");
        log::info!(
            "try next: curl -H \"Authorization: Bearer {bearer}\" -H 'Content-Type: application/json' \
             -d '{{\"client_id\":\"noc-c2\",\"subscriptions\":[\"soar.#\"]}}' {url}/clients"
        );
    }

    /// Runs until SIGTERM or SIGINT, or until the HTTP server ends by itself, and then takes everything down. A second
    /// signal ends the waiting.
    ///
    /// # Errors
    /// When the server ended by itself, or signals cannot be received.
    pub async fn run_until_stopped(mut self) -> Result<(), AppError> {
        let mut signals = Signals::new().map_err(|source| AppError::Start { what: "receiving signals", source })?;
        let result = tokio::select! {
            name = signals.next() => {
                log::info!("{name}: shutting down; what is under way has {} s", self.config.shutdown_timeout.as_secs());
                Ok(())
            }
            end = &mut self.servers_end => Err(AppError::Server(match end {
                Ok(Ok(())) => "unasked".into(),
                Ok(Err(error)) => error.to_string(),
                Err(error) => error.to_string(),
            })),
        };
        tokio::select! {
            () = self.stop() => {}
            name = signals.next() => log::warn!("{name} again: leaving at once"),
        }
        result
    }

    /// Takes everything down, within `SOAR_SHUTDOWN_TIMEOUT`.
    pub async fn stop(self) {
        let begun = Instant::now();
        let deadline = begun + self.config.shutdown_timeout;
        let left = || deadline.saturating_duration_since(Instant::now());
        self.closing.send_replace(true);
        self.observer.abort();
        // Half of the time for requests: the rest is for what makes them durable.
        within(left() / 2, "requests", join_all(self.servers.iter().map(|server| server.stop(true)))).await;
        if !self.servers_end.is_finished() {
            self.servers_end.abort();
        }
        let actors = left() * 2 / 3;
        let shutdown = self.registry.send(Shutdown { within: actors });
        if let Some(Err(error)) = within(actors + Duration::from_secs(1), "actors", shutdown).await {
            log::error!("the registry cannot stop the actors: {error}");
        }
        self.attempts_run.abort();
        if let Some(Err(error)) = within(left() / 2, "the log of webhook attempts", self.attempts.flush()).await {
            log::warn!("cannot write the last webhook attempts: {error}");
        }
        within(left(), "the broker", self.broker.close()).await;
        let (closed, is_closed) = oneshot::channel();
        let db = self.db.clone();
        // Joins threads, so on one of its own.
        let closer = std::thread::Builder::new().name("db-close".into()).spawn(move || {
            db.close();
            let _ = closed.send(());
        });
        match closer {
            Ok(_) => {
                within(left(), "the database", is_closed).await;
            }
            Err(error) => log::error!("cannot close the database in order: {error}"),
        }
        log::info!("stopped after {} ms", begun.elapsed().as_millis());
    }
}

/// Waits for a part to end, but not for ever.
async fn within<T>(limit: Duration, what: &str, end: impl Future<Output = T>) -> Option<T> {
    let ended = tokio::time::timeout(limit, end).await.ok();
    if ended.is_none() {
        log::warn!("{what} did not end within {} ms and is left where it stands", limit.as_millis());
    }
    ended
}

/// Runs the program until it is told to stop: `backbone serve`. Blocks.
///
/// # Errors
/// When it cannot start, or the HTTP server ended by itself.
pub fn serve(config: Config) -> Result<(), AppError> {
    crate::logging::init(&config.log_filter);
    raise_file_limit();
    // Messages and hashes are the owner's alone, whatever the data directory's own mode is.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    actix_rt::System::new().block_on(async {
        let app = App::build(config).await?;
        app.log_banner();
        app.run_until_stopped().await
    })
}

/// Every connection is an open file, and the soft limit is often 1,024 where the hard one is many times that.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if limit.current != limit.maximum
        && let Err(error) = setrlimit(Resource::Nofile, raised)
    {
        log::warn!("cannot raise the limit of open files from {:?}: {error}", limit.current);
    }
}

async fn listen(variable: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), AppError> {
    let open = || {
        let socket =
            if address.is_ipv4() { tokio::net::TcpSocket::new_v4()? } else { tokio::net::TcpSocket::new_v6()? };
        // A restart is not to wait for the connections of the run before.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let listener = socket.listen(BACKLOG)?;
        let bound = listener.local_addr()?;
        Ok((listener.into_std()?, bound))
    };
    open().map_err(|source| AppError::Bind { variable, address, source })
}

fn load_tls(files: &TlsFiles) -> Result<rustls::ServerConfig, AppError> {
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let fail = |path: &Path, detail: String| AppError::Tls { path: path.to_owned(), detail };
    let chain = CertificateDer::pem_file_iter(&files.cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| fail(&files.cert, error.to_string()))?;
    if chain.is_empty() {
        return Err(fail(&files.cert, "it has no certificate".into()));
    }
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| fail(&files.key, error.to_string()))?;
    rustls::ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| fail(&files.key, error.to_string()))
}

fn make_data_dir(config: &Config) -> Result<(), AppError> {
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&config.data_dir);
    made.map_err(|source| AppError::DataDir { path: config.data_dir.clone(), source })
}

fn secret_file(path: PathBuf, generate: impl FnOnce() -> String) -> Result<String, AppError> {
    secret::read_or_create(&path, generate).map_err(|source| AppError::SecretFile { path, source })
}

/// The secret behind tokens and sealed webhook secrets, made if there is none yet.
pub(crate) fn token_secret(config: &Config) -> Result<TokenSecret, AppError> {
    let (text, origin) = match &config.token_secret {
        Some(text) => (text.clone(), "SOAR_TOKEN_SECRET".to_owned()),
        None => {
            let path = config.token_key_path();
            let origin = path.display().to_string();
            (secret_file(path, || TokenSecret::generate().to_paserk())?, origin)
        }
    };
    TokenSecret::parse(&text).map_err(|source| AppError::TokenSecret { origin, source })
}

async fn open_broker(config: &Config, db: &Db, telemetry: &Telemetry) -> Result<Arc<dyn Broker>, BrokerError> {
    match &config.broker {
        BrokerChoice::Embedded => {
            let options = embedded::Options { dedup_window: config.dedup_window };
            embedded::open(db.clone(), options, Arc::clone(telemetry)).await
        }
        BrokerChoice::Amqp(url) => {
            let options = crate::broker::amqp::Options {
                url: url.clone(),
                queue_type: config.queue_type,
                management_url: config.rabbitmq_management_url.clone(),
                dedup_window: config.dedup_window,
                held_for: crate::broker::amqp::HELD_FOR,
            };
            crate::broker::amqp::connect(options, db.clone(), Arc::clone(telemetry)).await
        }
    }
}

fn observe(
    broker: &Arc<dyn Broker>,
    directory: &Arc<Directory>,
    telemetry: &Telemetry,
    registry: &Addr<ClientRegistry>,
) -> JoinHandle<()> {
    let registry = registry.clone();
    let census: telemetry::observer::Census = Arc::new(move || {
        let registry = registry.clone();
        Box::pin(async move { registry.send(GetActorCensus).await.unwrap_or_default() })
    });
    let observer = Observer::new(Arc::clone(broker), Arc::clone(directory), Arc::clone(telemetry), Some(census));
    actix_rt::spawn(observer.run())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(directory: &std::path::Path) -> Config {
        Config {
            data_dir: directory.join("data"),
            bind: ([127, 0, 0, 1], 0).into(),
            metrics_bind: Some(([127, 0, 0, 1], 0).into()),
            ..Config::default()
        }
    }

    async fn status(address: SocketAddr, path: &str) -> u16 {
        let client = reqwest::Client::builder().no_proxy().build().expect("a client");
        let answer = client.get(format!("http://{address}{path}")).send().await.expect("answers");
        answer.status().as_u16()
    }

    #[actix_rt::test]
    async fn it_starts_on_free_ports_keeps_its_secrets_and_stops() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let app = App::build(config(directory.path())).await.expect("starts");
        let metrics = app.metrics_address().expect("is configured");
        assert_ne!(app.address().port(), metrics.port());
        assert_eq!(status(app.address(), "/livez").await, 200);
        assert_eq!(status(metrics, "/metrics").await, 200);
        assert_eq!(status(metrics, "/clients").await, 404);
        let token = app.admin_token().to_owned();
        assert_eq!(std::fs::read_to_string(directory.path().join("data/admin-token")).expect("reads").trim(), token);

        let second = App::build(config(directory.path())).await.err().expect("the directory is in use");
        assert!(matches!(second, AppError::Database { .. }), "{second}");
        let taken = App::build(Config { bind: app.address(), ..config(directory.path()) }).await.err();
        assert!(matches!(taken, Some(AppError::Bind { variable: "SOAR_BIND", .. })), "{taken:?}");
        app.stop().await;

        let app = App::build(config(directory.path())).await.expect("starts again");
        assert_eq!(app.admin_token(), token);
        app.stop().await;
    }

    #[actix_rt::test]
    async fn a_token_secret_file_that_holds_something_else_is_named() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let config = config(directory.path());
        std::fs::create_dir(&config.data_dir).expect("makes");
        std::fs::write(config.token_key_path(), "k4.local.short").expect("writes");
        let error = App::build(config).await.err().expect("refused").to_string();
        assert!(error.contains("token-key") && !error.contains("short"), "{error}");
    }
}
