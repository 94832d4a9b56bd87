//! Actors.
pub mod registry;
