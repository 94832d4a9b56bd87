//! The guarantees of `backbone::broker`, each number with its tests, on every broker.
//!
//! A test that kills the broker allows what at-least-once allows: a message that came is there again. It never allows
//! one that is gone.

mod dead_letters;
mod deliveries;
mod exchanges;
mod publish;
mod pull;
mod topology;
