//! Tokens: PASETO v4.local (<https://github.com/paseto-standard/paseto-spec>), encrypted and authenticated under the
//! token secret, which is kept as PASERK `k4.local.…`.
//!
//! A token names a client and its incarnation. It outlives a rotation of the client's secret, not the client: whoever
//! verifies one compares the incarnation with the client's present one.

use std::time::Duration;

use hmac::{Hmac, Mac as _};
use pasetors::keys::{Generate as _, SymmetricKey};
use pasetors::paserk::FormatAsPaserk as _;
use pasetors::token::UntrustedToken;
use pasetors::version4::{LocalToken, V4};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use crate::client::ClientId;
use crate::time::Timestamp;

/// PASETO's implicit assertion: authenticated but not sent, it binds our tokens to this use of the key.
const USE: &[u8] = b"communications-backbone client token v1";

/// Longest token that is looked at, in characters; ours have about 330.
const TOKEN_CHARS_MAX: usize = 1024;

/// The key behind the tokens. Other keys are derived from it, each under a label of its own.
pub struct TokenSecret(SymmetricKey<V4>);

/// The text is not a PASERK `k4.local` key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a PASERK k4.local key")]
pub struct TokenSecretError;

impl TokenSecret {
    /// A fresh one.
    pub fn generate() -> Self {
        Self(SymmetricKey::generate().expect("the operating system has random bytes"))
    }

    /// Parses `k4.local.…` (PASERK, type local).
    ///
    /// # Errors
    /// [`TokenSecretError`]; it does not repeat the text.
    pub fn parse(paserk: &str) -> Result<Self, TokenSecretError> {
        SymmetricKey::try_from(paserk).map(Self).map_err(|_| TokenSecretError)
    }

    /// The key itself as PASERK, to be written into a file or shown by `backbone token-key`.
    pub fn to_paserk(&self) -> String {
        let mut text = String::new();
        self.0.fmt(&mut text).expect("a growing string takes any text");
        text
    }

    /// A key for another use: HMAC-SHA256 of `label` under this one.
    pub(crate) fn derive(&self, label: &str) -> [u8; 32] {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.0.as_bytes()).expect("HMAC takes keys of any length");
        mac.update(label.as_bytes());
        mac.finalize().into_bytes().into()
    }
}

impl std::fmt::Debug for TokenSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenSecret(…)")
    }
}

/// What a token says, in PASETO's registered names where there is one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Whose token it is.
    #[serde(rename = "sub")]
    pub client_id: ClientId,
    /// Which client of that id: see [`ClientEntry::incarnation`](crate::directory::ClientEntry::incarnation).
    #[serde(rename = "inc")]
    pub incarnation: u64,
    /// When it was minted.
    #[serde(rename = "iat")]
    pub issued_at: Timestamp,
    /// From when on it is refused.
    #[serde(rename = "exp")]
    pub expires_at: Timestamp,
}

/// Why a token is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not a token of this backbone: another key, altered, or no token at all.
    #[error("token is not valid here")]
    Invalid,
    /// It was valid once.
    #[error("token has expired")]
    Expired,
}

/// Mints and verifies tokens.
#[derive(Debug)]
pub struct Tokens {
    secret: TokenSecret,
    lifetime: Duration,
}

impl Tokens {
    /// Tokens under `secret` that live for `lifetime`.
    pub fn new(secret: TokenSecret, lifetime: Duration) -> Self {
        Self { secret, lifetime }
    }

    /// A new token for a client; also returns when it expires.
    pub fn mint(&self, client_id: &ClientId, incarnation: u64, now: Timestamp) -> (String, Timestamp) {
        let lifetime_ms = i64::try_from(self.lifetime.as_millis()).unwrap_or(i64::MAX);
        let expires_at = now.plus_millis(lifetime_ms);
        let claims = Claims { client_id: client_id.clone(), incarnation, issued_at: now, expires_at };
        let json = serde_json::to_vec(&claims).expect("claims are plain data");
        let token = LocalToken::encrypt(&self.secret.0, &json, None, Some(USE))
            .expect("the operating system has random bytes and the claims are not empty");
        (token, expires_at)
    }

    /// The claims of a token that is valid at `now`. Whether its client is still that client is for the caller to see.
    ///
    /// # Errors
    /// [`TokenError`] says whether it ever was valid.
    pub fn verify(&self, token: &str, now: Timestamp) -> Result<Claims, TokenError> {
        if token.len() > TOKEN_CHARS_MAX {
            return Err(TokenError::Invalid);
        }
        let untrusted = UntrustedToken::try_from(token).map_err(|_| TokenError::Invalid)?;
        let trusted =
            LocalToken::decrypt(&self.secret.0, &untrusted, None, Some(USE)).map_err(|_| TokenError::Invalid)?;
        let claims: Claims = serde_json::from_str(trusted.payload()).map_err(|_| TokenError::Invalid)?;
        if now >= claims.expires_at { Err(TokenError::Expired) } else { Ok(claims) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> Tokens {
        Tokens::new(TokenSecret::generate(), Duration::from_secs(3600))
    }

    fn id() -> ClientId {
        ClientId::parse("noc-c2").expect("test id")
    }

    #[test]
    fn a_token_says_who_and_until_when() {
        let tokens = tokens();
        let now = Timestamp::from_millis(1_795_457_340_123);
        let (token, expires_at) = tokens.mint(&id(), u64::MAX >> 1, now);
        assert!(token.starts_with("v4.local."), "{token}");
        assert_eq!(expires_at, now.plus_millis(3_600_000));
        let claims = tokens.verify(&token, expires_at.plus_millis(-1)).expect("valid");
        assert_eq!((claims.client_id, claims.incarnation, claims.issued_at), (id(), u64::MAX >> 1, now));
        assert_eq!(tokens.verify(&token, expires_at), Err(TokenError::Expired));
    }

    #[test]
    fn what_another_key_made_or_somebody_altered_is_refused() {
        let (a, b) = (tokens(), tokens());
        let now = Timestamp::now();
        let (token, _) = a.mint(&id(), 1, now);
        assert_eq!(b.verify(&token, now), Err(TokenError::Invalid));
        let mut altered = token.clone().into_bytes();
        let at = altered.len() / 2;
        altered[at] = if altered[at] == b'A' { b'B' } else { b'A' };
        let altered = String::from_utf8(altered).expect("ASCII");
        for bad in ["", "v4.local.", "v4.local.AAAA", "v4.public.AAAA", &altered, &"x".repeat(5000)] {
            assert_eq!(a.verify(bad, now), Err(TokenError::Invalid), "{bad}");
        }
    }

    #[test]
    fn the_secret_survives_its_text_form_and_hides_from_debug() {
        let secret = TokenSecret::generate();
        let text = secret.to_paserk();
        assert!(text.starts_with("k4.local."));
        let again = TokenSecret::parse(&text).expect("reads what it wrote");
        assert_eq!(again.derive("x"), secret.derive("x"));
        assert_ne!(secret.derive("x"), secret.derive("y"));
        assert!(!format!("{secret:?}").contains(&text[10..]));
        for bad in ["", "k4.local.", "k4.secret.AAAA", "k3.local.AAAA"] {
            assert!(TokenSecret::parse(bad).is_err(), "{bad}");
        }
    }
}
