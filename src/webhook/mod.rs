//! Webhooks: what is delivered to a client's endpoint, and how (contract, section 5).
//!
//! # Layout
//! Pure parts, each a decision without I/O: [`settings`] (what of a webhook makes no sense), [`address`] (where it may
//! go), [`signature`], [`answer`] (what came back), [`failure`] (why nothing did), [`verdict`] (what that means for the
//! message), [`retry`] (when it is tried again); and what holds all attempts up: [`breaker`] (the endpoint only fails),
//! [`throttle`] (it asks to be left alone), [`pacer`] (its rate).
//!
//! I/O around them: [`tls`], [`dial`] (a connection to an address that may be dialled), [`budget`] (how many), [`hand`] (how
//! many bytes in memory),
//! [`endpoint`] (the POST of one message over kept-alive connections), [`attempts`] (the log), [`breakers`] (their
//! states, for all to see), [`trial`] (an example, on demand), and [`push`], the loop that brings one client's inbox to
//! its endpoint.

pub mod address;
pub mod answer;
pub mod attempts;
pub mod breaker;
pub mod breakers;
pub mod budget;
pub mod dial;
pub mod endpoint;
pub mod failure;
pub mod hand;
pub mod pacer;
pub mod push;
pub mod retry;
pub mod settings;
pub mod signature;
pub mod throttle;
pub mod tls;
pub mod trial;
pub mod verdict;

pub use address::Guard;
pub use attempts::AttemptLog;
pub use breaker::BreakerState;
pub use breakers::Breakers;
pub use endpoint::{Endpoint, Post, Sender};
pub use push::Means;
pub use settings::validate;
