//! Why the program cannot start, or stopped by itself.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::broker::BrokerError;
use crate::db::DbError;
use crate::token::TokenSecretError;

/// Why the program cannot start, or stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// `DATA_DIR` cannot be made.
    #[error("cannot make the data directory {path}: {source}")]
    DataDir {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file in it cannot be opened.
    #[error("cannot open {path}: {source}")]
    Database {
        /// Which.
        path: PathBuf,
        /// Why.
        source: DbError,
    },
    /// A file with a secret can be neither read nor made.
    #[error("cannot read or make the secret in {path}: {source}")]
    SecretFile {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file with the token secret, or `SOAR_TOKEN_SECRET`, does not hold one.
    #[error("the token secret in {origin} is {source}")]
    TokenSecret {
        /// The file or the variable.
        origin: String,
        /// Why.
        source: TokenSecretError,
    },
    /// `SOAR_TLS_CERT` or `SOAR_TLS_KEY` cannot be used.
    #[error("cannot use {path} for https: {detail}")]
    Tls {
        /// Which file.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// The file in `SOAR_WEBHOOK_CA` cannot be used.
    #[error("cannot use SOAR_WEBHOOK_CA: {0}")]
    WebhookCa(crate::webhook::tls::CaError),
    /// The queues are on their way to another broker.
    #[error("{0}")]
    Moving(String),
    /// The broker cannot be opened.
    #[error("cannot open the broker: {}", crate::actors::describe(.0))]
    Broker(BrokerError),
    /// The address is taken, or not ours.
    #[error("cannot listen on {address} ({variable}): {source}")]
    Bind {
        /// Where it is configured.
        variable: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// Threads or the HTTP server cannot be started.
    #[error("cannot start {what}: {source}")]
    Start {
        /// What.
        what: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// The HTTP server ended by itself.
    #[error("the HTTP server ended: {0}")]
    Server(String),
}
