//! Configuration: the only reader of the environment (contract, section 8).
//!
//! [`Config::from_env`] reads every variable, then judges them all, so that one start reports every wrong value. An empty
//! variable counts as not set: `.env` files and Compose write `NAME=` for that.

mod parse;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

pub use parse::{ConfigError, ConfigErrors, admin_token_path};

/// Everything that can be configured, validated. Made by `Config::from_env`, or by hand in tests.
#[derive(Debug, Clone)]
pub struct Config {
    /// `DATA_DIR`: where the file and the admin token lie.
    pub data_dir: PathBuf,
    /// `SOAR_BIND`. Port 0 takes a free one.
    pub bind: SocketAddr,
    /// `SOAR_TLS_CERT` and `SOAR_TLS_KEY`: PEM files, both or none.
    pub tls: Option<TlsFiles>,
    /// `SOAR_BROKER_URL`.
    pub broker: BrokerChoice,
    /// `SOAR_QUEUE_TYPE` (AMQP).
    pub queue_type: QueueType,
    /// `SOAR_RABBITMQ_MANAGEMENT_URL`: broker users are managed when it is set.
    pub rabbitmq_management_url: Option<String>,
    /// `SOAR_ADMIN_TOKEN`; made at the first start when absent.
    pub admin_token: Option<String>,
    /// `SOAR_TOKEN_LIFETIME`, given in hours.
    pub token_lifetime: Duration,
    /// `SOAR_TOKEN_SECRET`: a PASERK `k4.local.…`; made at the first start when absent.
    pub token_secret: Option<String>,
    /// `SOAR_QUERY_AUTH`: whether credentials in the query string are taken.
    pub query_auth: bool,
    /// `SOAR_MAX_MESSAGE_BYTES`: of one `message`; a request may be 16 times as long.
    pub max_message_bytes: usize,
    /// `SOAR_DEDUP_WINDOW`, given in seconds.
    pub dedup_window: Duration,
    /// `SOAR_TRACE_MESSAGES`; 0 turns traces off.
    pub trace_messages: usize,
    /// `SOAR_METRICS_BIND`.
    pub metrics_bind: Option<SocketAddr>,
    /// `SOAR_WEBHOOK_ALLOW`: comma-separated CIDRs.
    pub webhook_allow: Vec<ipnet::IpNet>,
    /// `SOAR_WEBHOOK_CA`: a PEM bundle trusted besides the system's, for webhook endpoints.
    pub webhook_ca: Option<PathBuf>,
    /// `SOAR_ATTEMPT_RETENTION`, given in days.
    pub attempt_retention: Duration,
    /// `SOAR_SHUTDOWN_TIMEOUT`, given in seconds.
    pub shutdown_timeout: Duration,
    /// `RUST_LOG`: env_logger's filter.
    pub log_filter: String,
    /// What was odd but not wrong in the environment, to be logged once there is a log.
    pub warnings: Vec<String>,
}

/// Which broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BrokerChoice {
    /// In the process, in the file under `DATA_DIR`.
    Embedded,
    /// `amqp://…` or `amqps://…`. Holds a password: never shown.
    Amqp(String),
}

/// Type of the client queues on RabbitMQ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QueueType {
    /// Replicated (<https://www.rabbitmq.com/docs/quorum-queues>).
    #[default]
    Quorum,
    /// On one node.
    Classic,
}

/// Files for https.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Certificate chain, PEM.
    pub cert: PathBuf,
    /// Private key, PEM.
    pub key: PathBuf,
}

impl Default for Config {
    /// The contract's defaults.
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("./data"),
            bind: SocketAddr::new(IpAddr::from([127, 0, 0, 1]), 3000),
            tls: None,
            broker: BrokerChoice::Embedded,
            queue_type: QueueType::Quorum,
            rabbitmq_management_url: None,
            admin_token: None,
            token_lifetime: Duration::from_secs(24 * 3600),
            token_secret: None,
            query_auth: true,
            max_message_bytes: 1 << 20,
            dedup_window: Duration::from_secs(600),
            trace_messages: 100_000,
            metrics_bind: None,
            webhook_allow: Vec::new(),
            webhook_ca: None,
            attempt_retention: Duration::from_secs(7 * 86_400),
            shutdown_timeout: Duration::from_secs(30),
            log_filter: "info".into(),
            warnings: Vec::new(),
        }
    }
}
