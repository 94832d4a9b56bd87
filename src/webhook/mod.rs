//! Webhooks: what is delivered to a client's endpoint, and how (contract, section 5).
//!
//! # Layout
//! Pure parts, each a decision without I/O: [`settings`] (what of a webhook makes no sense), [`address`] (where it may
//! go), [`signature`], [`retry`] (when it is tried again), [`breaker`] (when it is not), [`answer`] (what came back),
//! [`failure`] (why nothing did).
//!
//! I/O around them: [`tls`], [`dial`] (a connection to an address that may be dialled), [`budget`] (how many),
//! [`endpoint`] (the POST of one message over kept-alive connections).

pub mod address;
pub mod answer;
pub mod breaker;
pub mod budget;
pub mod dial;
pub mod endpoint;
pub mod failure;
pub mod retry;
pub mod settings;
pub mod signature;
pub mod tls;

pub use address::Guard;
pub use endpoint::{Endpoint, Post, Sender};
pub use settings::validate;
