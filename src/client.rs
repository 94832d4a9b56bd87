//! Clients: their ids, records, limits and webhook settings. Parsed, valid by construction, no I/O.
//!
//! Contract sections 2, 4, 5 and 10. A [`ClientRecord`] is what the API shows; it never holds a secret.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::topic::Pattern;

/// Longest client id in bytes: a DNS label (RFC 1035, section 2.3.4).
pub const MAX_CLIENT_ID_BYTES: usize = 63;

/// The sender of the backbone's own operational events. No client may take this id.
pub const BACKBONE_SENDER: &str = "soar";

/// A client's id: a DNS label, `^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`.
///
/// Cheap to clone; used as a map key by `&str` through [`Borrow`].
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct ClientId(Arc<str>);

/// Why a string is not a [`ClientId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientIdError {
    /// It is empty or longer than [`MAX_CLIENT_ID_BYTES`].
    #[error("must be 1 to {MAX_CLIENT_ID_BYTES} characters long, is {0}")]
    Length(usize),
    /// It has a character that a DNS label has not, or a hyphen at an end.
    #[error("must be a DNS label: a-z, 0-9 and inner hyphens only")]
    Character,
    /// It is the backbone's own, or would make a queue name that the backbone uses itself.
    #[error("is reserved for the backbone")]
    Reserved,
}

impl ClientId {
    /// Parses a client id.
    ///
    /// # Errors
    /// [`ClientIdError`] says which rule is broken.
    pub fn parse(text: &str) -> Result<Self, ClientIdError> {
        let bytes = text.as_bytes();
        if bytes.is_empty() || bytes.len() > MAX_CLIENT_ID_BYTES {
            return Err(ClientIdError::Length(text.chars().count()));
        }
        let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let ends_ok = alnum(bytes[0]) && alnum(bytes[bytes.len() - 1]);
        if !ends_ok || !bytes.iter().all(|&b| alnum(b) || b == b'-') {
            return Err(ClientIdError::Character);
        }
        if text == BACKBONE_SENDER {
            return Err(ClientIdError::Reserved);
        }
        Ok(Self(text.into()))
    }

    /// The id under which the backbone itself publishes operational events; see [`BACKBONE_SENDER`].
    pub fn backbone() -> Self {
        Self(BACKBONE_SENDER.into())
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Borrow<str> for ClientId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for ClientId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == BACKBONE_SENDER {
            return Ok(Self::backbone());
        }
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// Limits of one client. `None` means unlimited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Messages a second that the client may send, over HTTP, WebSocket and notify together; at least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub send_per_s: Option<u32>,
    /// Messages that its inbox may hold; past it the oldest become dead letters (`inbox_full`). At least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_inbox_messages: Option<u64>,
    /// Seconds that a message may wait in the inbox; then it becomes a dead letter (`expired`). At least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inbox_ttl_s: Option<u64>,
}

/// A client's webhook: where its inbox is pushed to, and how (contract, section 5).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Webhook {
    /// Endpoint, `https://…` (or `http://…` where `SOAR_WEBHOOK_ALLOW` admits it).
    pub url: String,
    /// Headers sent with every call.
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    /// Seconds for one whole attempt, 1 to 60.
    #[serde(default = "Webhook::default_timeout_s")]
    pub timeout_s: u32,
    /// Seconds to wait before each retry; total attempts are 1 + its length.
    #[serde(default = "Webhook::default_retry_schedule_s")]
    pub retry_schedule_s: Vec<u32>,
    /// Attempts in flight at once, 1 to 256.
    #[serde(default = "Webhook::default_concurrency")]
    pub concurrency: u32,
    /// Attempts a second at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit_per_s: Option<u32>,
    /// One at a time, the head blocks until delivered or dead.
    #[serde(default)]
    pub ordered: bool,
    /// Whether the backbone pushes; switched off by 410, by 5 days of failure, or by PATCH.
    #[serde(default = "Webhook::default_enabled")]
    pub enabled: bool,
    /// Why the webhook is off, when it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disabled_reason: Option<String>,
}

impl Webhook {
    /// Default of `timeout_s`, in seconds.
    pub fn default_timeout_s() -> u32 {
        15
    }

    /// Default of `retry_schedule_s`: the schedule that Standard Webhooks recommends, in seconds.
    pub fn default_retry_schedule_s() -> Vec<u32> {
        vec![5, 300, 1800, 7200, 18_000, 36_000, 36_000]
    }

    /// Default of `concurrency`.
    pub fn default_concurrency() -> u32 {
        8
    }

    fn default_enabled() -> bool {
        true
    }
}

/// A client as the registry stores it and the API shows it. Never a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClientRecord {
    /// Its id.
    pub client_id: ClientId,
    /// A name for people.
    pub name: Option<String>,
    /// Patterns of the topics that land in its inbox.
    pub subscriptions: Vec<Pattern>,
    /// Where its inbox is pushed to, if it wants that.
    pub webhook: Option<Webhook>,
    /// Its limits.
    #[serde(default)]
    pub limits: Limits,
    /// While true nothing is forwarded, broadcast or pushed for it; its queues fill.
    #[serde(default)]
    pub paused: bool,
    /// When it was onboarded, RFC 3339 in UTC.
    pub created_at: crate::time::Timestamp,
}

impl ClientRecord {
    /// True while its inbox belongs to the pusher: pulling is then refused (contract, section 4, 409).
    pub fn is_pushed(&self) -> bool {
        self.webhook.as_ref().is_some_and(|webhook| webhook.enabled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn client_id_is_a_dns_label() {
        for good in ["a", "0", "noc-c2", "a-0", &"x".repeat(63)] {
            assert!(ClientId::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "ä", "soar", &"x".repeat(64)] {
            assert!(ClientId::parse(bad).is_err(), "{bad}");
        }
    }
}
