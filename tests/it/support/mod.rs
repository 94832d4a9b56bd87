//! What the tests stand on.
//!
//! - `fixture`: the brokers, and `broker_tests!`, which runs a test on each.
//! - `env`: a broker without a router, for the conformance suite.
//! - `memory`: how much a process has.
//! - `wait`: waiting for a condition with a deadline, and for nothing to happen.

#[macro_use]
pub(crate) mod fixture;
pub(crate) mod env;
pub(crate) mod memory;
pub(crate) mod wait;

pub(crate) use env::BrokerEnv;
pub(crate) use wait::{eventually, stays_pending};
