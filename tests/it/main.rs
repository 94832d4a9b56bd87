//! Integration tests: the real program, the real brokers, and claims about them.
//!
//! # Layout
//!
//! - `support`: starts routers and brokers, talks to them, waits for conditions. Start reading there.
//! - `browser…`: the operators' console and the API's page in a real browser.
//! - `cli`: the command line as a person or a script meets it.
//! - `conformance`: the guarantees G1 to G14 of `backbone::broker`, on every broker.
//! - `crash`, `disk_full`, `hostile`, `panic`: what must not hurt.
//! - `ws`: the WebSocket.
//! - `flow`: messages from sender to receivers, through the whole router. `http_…`: each part of the API.
//! - `webhook_…`: the sender, the pusher's loop, and both in the whole router.
//!
//! A test inside `broker_tests!` runs once on each broker; see `support::fixture`.

// First, because its macro is known only below.
#[macro_use]
mod support;

mod browser;
mod browser_brokers;
mod browser_looks;
mod browser_safety;
mod browser_scale;
mod cli;
mod conformance;
mod crash;
mod disk_full;
mod flow;
mod hostile;
mod http_auth;
mod http_clients;
mod http_problems;
mod http_receive;
mod http_send;
mod panic;
mod webhook_flow;
mod webhook_push;
mod webhook_send;
mod ws;
