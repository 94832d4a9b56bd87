//! Tokens: PASETO v4.local.
