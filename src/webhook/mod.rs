//! Webhooks: what is delivered to a client's endpoint, and how (contract, section 5).
//!
//! Pure parts first, each a file: [`settings`] says what of a webhook makes no sense, [`address`] which addresses may be
//! dialled.

pub mod address;
pub mod settings;

pub use address::Guard;
pub use settings::validate;
