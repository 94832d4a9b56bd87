//! Signatures by Standard Webhooks
//! (<https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md>).
//!
//! Signed is `{webhook-id}.{webhook-timestamp}.{body}`, with HMAC-SHA256 under each secret that is valid; the header
//! holds one `v1,` + base64 for each, separated by spaces. So a receiver that knows the old or the new secret accepts
//! what is sent during a rotation.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac};
use sha2::Sha256;

use crate::time::Timestamp;

/// What a webhook secret begins with.
const PREFIX: &str = "whsec_";
/// How far a receiver lets the timestamp lie from its own clock, in milliseconds: five minutes, as in the reference
/// libraries.
const TOLERANCE_MS: i64 = 5 * 60 * 1000;

/// A webhook secret, decoded. Not `Display`, and `Debug` hides it.
#[derive(Clone, PartialEq, Eq)]
pub struct SigningSecret(Vec<u8>);

/// The text is no webhook secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("must be whsec_ and the base64 of at least one byte")]
pub struct SecretError;

impl SigningSecret {
    /// Parses `whsec_…`.
    ///
    /// # Errors
    /// [`SecretError`] when the prefix is not there or the rest is not base64.
    pub fn parse(text: &str) -> Result<Self, SecretError> {
        let encoded = text.strip_prefix(PREFIX).ok_or(SecretError)?;
        let bytes = STANDARD.decode(encoded).map_err(|_| SecretError)?;
        if bytes.is_empty() { Err(SecretError) } else { Ok(Self(bytes)) }
    }

    fn key(&self) -> Hmac<Sha256> {
        Hmac::new_from_slice(&self.0).expect("HMAC takes keys of any length")
    }
}

impl std::fmt::Debug for SigningSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SigningSecret(…)")
    }
}

/// Signs under one or several secrets. Holds the keys ready, so that a signature costs the hash of the body only.
#[derive(Clone)]
pub struct Signer {
    keys: Vec<Hmac<Sha256>>,
}

impl Signer {
    /// A signer under these secrets.
    pub fn new<'a>(secrets: impl IntoIterator<Item = &'a SigningSecret>) -> Self {
        Self { keys: secrets.into_iter().map(SigningSecret::key).collect() }
    }

    /// A signer under these secrets, `whsec_…` each.
    ///
    /// # Errors
    /// [`SecretError`] when one of them is no webhook secret.
    pub fn from_texts<'a>(secrets: impl IntoIterator<Item = &'a str>) -> Result<Self, SecretError> {
        let keys = secrets.into_iter().map(|text| SigningSecret::parse(text).map(|secret| secret.key()));
        Ok(Self { keys: keys.collect::<Result<_, _>>()? })
    }

    /// The header `webhook-signature`; `timestamp_s` is what `webhook-timestamp` says.
    pub fn sign(&self, webhook_id: &str, timestamp_s: &str, body: &[u8]) -> String {
        let mut header = String::with_capacity(self.keys.len() * 48);
        for key in &self.keys {
            if !header.is_empty() {
                header.push(' ');
            }
            header.push_str("v1,");
            let mac = feed(key.clone(), webhook_id, timestamp_s, body);
            STANDARD.encode_string(mac.finalize().into_bytes(), &mut header);
        }
        header
    }
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signer").field("keys", &self.keys.len()).finish()
    }
}

fn feed(mut mac: Hmac<Sha256>, webhook_id: &str, timestamp_s: &str, body: &[u8]) -> Hmac<Sha256> {
    for part in [webhook_id.as_bytes(), b".", timestamp_s.as_bytes(), b"."] {
        mac.update(part);
    }
    mac.update(body);
    mac
}

/// Why a receiver should refuse what came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// The timestamp is no whole number of seconds.
    #[error("webhook-timestamp is not a number of seconds")]
    Timestamp,
    /// It lies more than five minutes away: replayed, or a clock is wrong.
    #[error("webhook-timestamp is more than five minutes from now")]
    Stale,
    /// No `v1` signature fits.
    #[error("no signature in webhook-signature fits the secret")]
    Mismatch,
}

/// What a receiver does: checks the three headers and the body against its secret, in constant time.
///
/// # Errors
/// [`VerifyError`] says what does not fit.
pub fn verify(
    secret: &SigningSecret,
    webhook_id: &str,
    timestamp_s: &str,
    signatures: &str,
    body: &[u8],
    now: Timestamp,
) -> Result<(), VerifyError> {
    let seconds: i64 = timestamp_s.parse().map_err(|_| VerifyError::Timestamp)?;
    if seconds.saturating_mul(1000).abs_diff(now.as_millis()) > TOLERANCE_MS.unsigned_abs() {
        return Err(VerifyError::Stale);
    }
    let mac = feed(secret.key(), webhook_id, timestamp_s, body);
    let fits = signatures
        .split(' ')
        .filter_map(|signature| signature.strip_prefix("v1,"))
        .filter_map(|encoded| STANDARD.decode(encoded).ok())
        .any(|candidate| mac.clone().verify_slice(&candidate).is_ok());
    if fits { Ok(()) } else { Err(VerifyError::Mismatch) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::WebhookSecrets;

    const NOW: Timestamp = Timestamp::from_millis(1_614_265_330_000);

    fn fresh() -> SigningSecret {
        SigningSecret::parse(WebhookSecrets::generate().current()).expect("made to be one")
    }

    /// The example of the Standard Webhooks reference libraries' own tests.
    #[test]
    fn reference_vector_is_met() {
        let secret = SigningSecret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").expect("a secret");
        let body = br#"{"test": 2432232314}"#;
        let signature = Signer::new([&secret]).sign("msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", body);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn two_secrets_sign_so_that_either_fits() {
        let (old, new, other) = (fresh(), fresh(), fresh());
        let both = Signer::new([&new, &old]).sign("a:b", "1614265330", b"{}");
        for secret in [&old, &new] {
            assert_eq!(verify(secret, "a:b", "1614265330", &both, b"{}", NOW), Ok(()));
        }
        assert_eq!(verify(&other, "a:b", "1614265330", &both, b"{}", NOW), Err(VerifyError::Mismatch));
    }

    #[test]
    fn what_was_changed_or_is_old_is_refused() {
        let secret = fresh();
        let signature = Signer::new([&secret]).sign("id", "1614265330", b"{}");
        let check = |id: &str, timestamp: &str, signatures: &str, body: &[u8], later_ms| {
            verify(&secret, id, timestamp, signatures, body, NOW.plus_millis(later_ms))
        };
        assert_eq!(check("id", "1614265330", &signature, b"{}", 299_000), Ok(()));
        assert_eq!(check("id", "1614265330", &format!("v1a,x v1,AAAA {signature}"), b"{}", 0), Ok(()));
        assert_eq!(check("ie", "1614265330", &signature, b"{}", 0), Err(VerifyError::Mismatch));
        assert_eq!(check("id", "1614265331", &signature, b"{}", 0), Err(VerifyError::Mismatch));
        assert_eq!(check("id", "1614265330", &signature, b"{ }", 0), Err(VerifyError::Mismatch));
        assert_eq!(check("id", "1614265330", "", b"{}", 0), Err(VerifyError::Mismatch));
        assert_eq!(check("id", "1614265330", &signature, b"{}", 301_000), Err(VerifyError::Stale));
        assert_eq!(check("id", "1614265330", &signature, b"{}", -301_000), Err(VerifyError::Stale));
        assert_eq!(check("id", "soon", &signature, b"{}", 0), Err(VerifyError::Timestamp));
    }

    #[test]
    fn what_is_no_secret_is_refused_and_debug_hides_what_is() {
        let text = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
        let shown = format!("{:?} {:?}", SigningSecret::parse(text), Signer::from_texts([text]));
        assert!(!shown.contains(&text[6..]) && shown.contains("Ok"), "{shown}");
        for bad in ["", "whsec_", "whsec_*", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"] {
            assert_eq!(SigningSecret::parse(bad), Err(SecretError), "{bad}");
            assert!(Signer::from_texts([text, bad]).is_err(), "{bad}");
        }
    }
}
