//! Client secrets: made, hashed, compared. Shown once; only hashes are kept (promise 9).

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::time::Timestamp;

/// A secret of 256 random bits, for the one answer that shows it. Not `Display`, and `Debug` hides it.
pub struct Secret(String);

impl Secret {
    /// A fresh one: 43 characters of URL-safe base64.
    pub fn generate() -> Self {
        use base64::Engine as _;
        let bytes: [u8; 32] = rand::random();
        Self(base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes))
    }

    /// The secret itself, to be shown once.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// SHA-256 of a secret. Enough for 256 random bits: there is nothing to guess, so nothing to slow down.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretHash([u8; 32]);

impl SecretHash {
    /// Hashes a secret.
    pub fn of(secret: &str) -> Self {
        Self(Sha256::digest(secret.as_bytes()).into())
    }

    /// A hash that no known secret has: compared against when the client does not exist, so that the answer takes the
    /// same time.
    pub const fn nobody() -> Self {
        Self([0; 32])
    }

    fn matches(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl std::fmt::Debug for SecretHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SecretHash(…)")
    }
}

/// The secrets that are valid: the current one and, during a rotation's overlap, the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretSlots {
    /// The newest.
    pub current: SecretHash,
    /// The one before, until when.
    pub previous: Option<(SecretHash, i64)>,
}

impl SecretSlots {
    /// Slots with one secret.
    pub fn new(secret: &Secret) -> Self {
        Self { current: SecretHash::of(secret.reveal()), previous: None }
    }

    /// Slots for a client that does not exist: [`SecretSlots::verify`] refuses everything in the same time.
    pub const fn nobody() -> Self {
        Self { current: SecretHash::nobody(), previous: None }
    }

    /// A new current secret; the one before stays valid until `previous_valid_until`.
    #[must_use]
    pub fn rotated(&self, secret: &Secret, previous_valid_until: Timestamp) -> Self {
        Self {
            current: SecretHash::of(secret.reveal()),
            previous: Some((self.current, previous_valid_until.as_millis())),
        }
    }

    /// Whether `secret` is valid at `now`. Compares with both slots in any case, in constant time.
    pub fn verify(&self, secret: &str, now: Timestamp) -> bool {
        let hash = SecretHash::of(secret);
        let (previous, until) = self.previous.unwrap_or((SecretHash::nobody(), i64::MIN));
        let current_fits = self.current.matches(&hash);
        let previous_fits = previous.matches(&hash) & (now.as_millis() < until);
        current_fits | previous_fits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn previous_secret_is_valid_until_its_time() {
        let (old, new) = (Secret::generate(), Secret::generate());
        let slots = SecretSlots::new(&old).rotated(&new, Timestamp::from_millis(1000));
        assert!(slots.verify(new.reveal(), Timestamp::from_millis(5000)));
        assert!(slots.verify(old.reveal(), Timestamp::from_millis(999)));
        assert!(!slots.verify(old.reveal(), Timestamp::from_millis(1000)));
        assert!(!slots.verify("", Timestamp::from_millis(0)));
        assert!(!SecretSlots::nobody().verify("", Timestamp::from_millis(0)));
    }

    #[test]
    fn debug_hides_secrets() {
        let secret = Secret::generate();
        let shown = format!("{secret:?} {:?}", SecretSlots::new(&secret));
        assert!(!shown.contains(secret.reveal()));
    }
}
