//! Communications Backbone: a message router between the command-and-control systems of partner organisations.
pub mod actors;
pub mod app;
pub mod broker;
pub mod cli;
pub mod client;
pub mod config;
pub mod db;
pub mod directory;
pub mod envelope;
pub mod http;
pub mod intake;
pub mod limits;
pub mod logging;
pub mod migrate;
pub mod secret;
pub mod store;
pub mod telemetry;
pub mod time;
pub mod token;
pub mod topic;
pub mod webhook;
pub mod websocket;

/// This version, as the banner and the API name it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
