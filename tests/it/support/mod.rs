//! What the tests stand on.
//!
//! - `fixture`: the brokers, and `broker_tests!`, which runs a test on each.
//! - `app`: `TestApp`, a router on a broker; `http` talks to it, `process` is the program as a child process.
//! - `env`: `BrokerEnv`, a broker without a router, for the conformance suite.
//! - `browser`: a real browser, over WebDriver.
//! - `control`: `ControlPlane`, a broker and the registry on it, without HTTP.
//! - `endpoint`: `FakeEndpoint`, a webhook endpoint with every fault.
//! - `proxy`: a network between a router and RabbitMQ that can be cut, slowed and silenced.
//! - `rabbitmq`: private nodes, clusters, and virtual hosts on a node that tests share.
//! - `load`: producers and consumers that note everything, and the reckoning.
//! - `amqp`: a client that speaks AMQP, in Python.
//! - `socket`: a client's WebSocket.
//! - `wait`: waiting for a condition with a deadline, and for nothing to happen. `memory`: how much a process has.

#[macro_use]
pub(crate) mod fixture;
pub(crate) mod amqp;
pub(crate) mod app;
pub(crate) mod browser;
pub(crate) mod console;
pub(crate) mod control;
pub(crate) mod endpoint;
pub(crate) mod env;
pub(crate) mod http;
pub(crate) mod load;
pub(crate) mod memory;
pub(crate) mod process;
pub(crate) mod proxy;
pub(crate) mod rabbitmq;
pub(crate) mod socket;
pub(crate) mod wait;

pub(crate) use app::TestApp;
pub(crate) use env::BrokerEnv;
pub(crate) use wait::{eventually, stays_pending};
