//! Integration tests: the real program, the real brokers, and claims about them.
//!
//! # Layout
//!
//! - `support`: starts routers and brokers, talks to them, waits for conditions. Start reading there.
//! - `browser…`: the operators' console and the API's page in a real browser.
//! - `cli`: the command line as a person or a script meets it.
//! - `conformance`: the guarantees G1 to G14 of `backbone::broker`, on every broker.
//! - `amqp_clients`, `amqp_users`: what clients do by AMQP, and what they may not.
//! - `differential`: both brokers route alike. `migrate`: from one broker to the other and back.
//! - `crash`, `disk_full`, `hostile`, `panic`: what must not hurt.
//! - `rabbitmq_broker`: what only RabbitMQ can do to its broker.
//! - `rabbitmq_clients`: clients that come and go there.
//! - `rabbitmq_faults`: what brokers and networks do, under load.
//! - `rabbitmq_held`: deliveries that are held for long.
//! - `deploy`: what `deploy/` and `.env.example` say of the settings.
//! - `ws`: the WebSocket.
//! - `openapi`: the document against the live server. `metrics`: what Prometheus sees, and what `deploy/` asks of it.
//! - `traces`: the way of every kind of message, and W3C trace context.
//! - `flow`: messages from sender to receivers, through the whole router. `http_…`: each part of the API.
//! - `webhook_…`: the sender, the pusher's loop, and both in the whole router.
//!
//! A test inside `broker_tests!` runs once on each broker; see `support::fixture`.

// First, because its macro is known only below.
#[macro_use]
mod support;

mod amqp_clients;
mod amqp_users;
mod browser;
mod browser_brokers;
mod browser_looks;
mod browser_safety;
mod browser_scale;
mod cli;
mod conformance;
mod crash;
mod deploy;
mod differential;
mod disk_full;
mod flow;
mod hostile;
mod http_auth;
mod http_clients;
mod http_problems;
mod http_receive;
mod http_send;
mod metrics;
mod migrate;
mod openapi;
mod panic;
mod rabbitmq_broker;
mod rabbitmq_clients;
mod rabbitmq_faults;
mod rabbitmq_held;
mod traces;
mod webhook_contract;
mod webhook_flow;
mod webhook_guard;
mod webhook_listen;
mod webhook_load;
mod webhook_push;
mod webhook_send;
mod ws;
