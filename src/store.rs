//! The registry's store.
