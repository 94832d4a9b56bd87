//! Broker users: each client one of its own, through RabbitMQ's management API.
//!
//! The user's name is the client's id, its password the client's secret. It may write to one exchange, `{id}-exchange`,
//! which leads to its outbox (routing key `outbox`) and its notify queue (`notify`), and read its own inbox; it may
//! declare nothing. It cannot be given the default exchange, through which it could write to every queue.
//!
//! RabbitMQ knows one password for a user: the one before a rotation ends at once for AMQP, whatever its overlap. The
//! salted hash that RabbitMQ itself would make of the secret is sent and kept, never the secret; so users can be made
//! again after the broker has lost them.

use std::time::Duration;

use base64::Engine as _;
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::address::Addresses;
use super::topology;
use crate::broker::{BrokerError, BrokerErrorKind};
use crate::client::ClientId;

/// Tag of the users that the backbone made. Others of the same name are left alone.
const TAG: &str = "soar-client";

/// How long the management API may take to answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The management API of one broker.
#[derive(Debug, Clone)]
pub(super) struct Management {
    http: reqwest::Client,
    /// Without a slash at its end.
    base: String,
    user: String,
    password: String,
    vhost: String,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    tags: Tags,
}

/// A list since RabbitMQ 3.9, one text with commas before.
#[derive(Deserialize)]
#[serde(untagged)]
enum Tags {
    List(Vec<String>),
    Text(String),
}

impl Default for Tags {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

impl Tags {
    fn has(&self, tag: &str) -> bool {
        match self {
            Self::List(tags) => tags.iter().any(|one| one == tag),
            Self::Text(tags) => tags.split(',').any(|one| one.trim() == tag),
        }
    }
}

/// The hash of a secret as RabbitMQ keeps it: four bytes of salt, then SHA-256 of salt and secret
/// (<https://www.rabbitmq.com/docs/passwords>).
pub(super) fn password_hash(secret: &str) -> String {
    let salt: [u8; 4] = rand::random();
    let mut digest = Sha256::new();
    digest.update(salt);
    digest.update(secret);
    let mut hash = salt.to_vec();
    hash.extend_from_slice(&digest.finalize());
    base64::engine::general_purpose::STANDARD.encode(hash)
}

/// Percent-encodes one segment of a path (RFC 3986, section 2.1).
fn encoded(segment: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            write!(out, "%{byte:02X}").expect("writing to a string");
        }
    }
    out
}

/// Undoes percent-encoding, for the credentials in a URL.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let hex = tail.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()).filter(|_| *first == b'%') {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Management {
    /// The API at `url`, which may hold user and password; else those of the AMQP URL are taken.
    pub(super) fn new(url: &str, addresses: &Addresses) -> Result<Self, BrokerError> {
        // The text itself is not repeated: it holds a password.
        let wrong =
            || BrokerError::new(BrokerErrorKind::Conflict, "read SOAR_RABBITMQ_MANAGEMENT_URL: not http(s)://…");
        let (scheme, rest) =
            url.split_once("://").filter(|(scheme, _)| matches!(*scheme, "http" | "https")).ok_or_else(wrong)?;
        let (credentials, host) = match rest.rsplit_once('@') {
            Some((credentials, host)) => (Some(credentials), host),
            None => (None, rest),
        };
        let (user, password) = match credentials.map(|one| one.split_once(':').unwrap_or((one, ""))) {
            Some((user, password)) => (decoded(user), decoded(password)),
            None => addresses.credentials(),
        };
        let http = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().redirect(reqwest::redirect::Policy::none());
        let http = http.build().map_err(|error| {
            BrokerError::new(BrokerErrorKind::Internal, "set up the client of the management API").caused_by(error)
        })?;
        let base = format!("{scheme}://{}", host.trim_end_matches('/'));
        Ok(Self { http, base, user, password, vhost: addresses.vhost().to_owned() })
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<serde_json::Value>,
        action: &str,
    ) -> Result<reqwest::Response, BrokerError> {
        let mut request = self.http.request(method, format!("{}/api/{path}", self.base));
        request = request.basic_auth(&self.user, Some(&self.password));
        if let Some(body) = body {
            request = request.json(&body);
        }
        // Without the URL: it may hold a password.
        request
            .send()
            .await
            .map_err(|error| BrokerError::new(BrokerErrorKind::Unavailable, action).caused_by(error.without_url()))
    }

    async fn change(
        &self,
        method: Method,
        path: &str,
        body: Option<serde_json::Value>,
        action: &str,
    ) -> Result<(), BrokerError> {
        let answer = self.call(method.clone(), path, body, action).await?;
        let status = answer.status();
        // What is to be deleted may be gone.
        if status.is_success() || (method == Method::DELETE && status == StatusCode::NOT_FOUND) {
            return Ok(());
        }
        Err(refused(action, status))
    }

    /// Makes the client's user, or changes its password.
    ///
    /// # Errors
    /// [`BrokerErrorKind::Conflict`] when there is a user of this name that the backbone did not make.
    pub(super) async fn put_user(&self, client: &ClientId, password_hash: &str) -> Result<(), BrokerError> {
        let action = format!("set the broker user {client}");
        let path = format!("users/{}", encoded(client.as_str()));
        self.check_is_ours(client, &action).await?;
        let user = serde_json::json!({
            "password_hash": password_hash,
            "hashing_algorithm": "rabbit_password_hashing_sha256",
            "tags": TAG,
        });
        self.change(Method::PUT, &path, Some(user), &action).await?;
        let path = format!("permissions/{}/{}", encoded(&self.vhost), encoded(client.as_str()));
        // Client ids have no character that means anything in a regular expression but the hyphen, which does not
        // outside of brackets.
        let permissions = serde_json::json!({
            "configure": "^$",
            "write": format!("^{}$", topology::entrance(client)),
            "read": format!("^{}$", topology::inbox(client)),
        });
        self.change(Method::PUT, &path, Some(permissions), &action).await
    }

    /// Removes the client's user; its connections end.
    pub(super) async fn delete_user(&self, client: &ClientId) -> Result<(), BrokerError> {
        let action = format!("delete the broker user {client}");
        match self.check_is_ours(client, &action).await {
            // Somebody else's user of the same name stays.
            Err(error) if error.kind == BrokerErrorKind::Conflict => return Ok(()),
            checked => checked?,
        }
        self.change(Method::DELETE, &format!("users/{}", encoded(client.as_str())), None, &action).await
    }

    async fn check_is_ours(&self, client: &ClientId, action: &str) -> Result<(), BrokerError> {
        let answer = self.call(Method::GET, &format!("users/{}", encoded(client.as_str())), None, action).await?;
        match answer.status() {
            StatusCode::NOT_FOUND => Ok(()),
            status if !status.is_success() => Err(refused(action, status)),
            _ => {
                let user: User = answer.json().await.map_err(|error| {
                    BrokerError::new(BrokerErrorKind::Internal, action).caused_by(error.without_url())
                })?;
                if user.tags.has(TAG) {
                    return Ok(());
                }
                let what = format!(
                    "{action}: RabbitMQ has a user of this name already, which is not the backbone's; \
                    choose another client id, or delete that user"
                );
                Err(BrokerError::new(BrokerErrorKind::Conflict, what))
            }
        }
    }
}

fn refused(action: &str, status: StatusCode) -> BrokerError {
    let kind = match status {
        status if status.is_server_error() => BrokerErrorKind::Unavailable,
        _ => BrokerErrorKind::Internal,
    };
    BrokerError::new(kind, format!("{action}: the management API answered {status}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_of_the_url_win() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let addresses = Addresses::parse("amqp://amqp:secret@rabbit").expect("an address");
        let own = Management::new("http://me:p%40ss%2f@rabbit:15672/", &addresses).expect("a URL");
        assert_eq!(
            (own.base.as_str(), own.user.as_str(), own.password.as_str()),
            ("http://rabbit:15672", "me", "p@ss/")
        );
        let other = Management::new("http://rabbit:15672", &addresses).expect("a URL");
        assert_eq!((other.user.as_str(), other.password.as_str()), ("amqp", "secret"));
        let error = Management::new("ftp://me:hidden@rabbit", &addresses).expect_err("not http");
        assert!(!error.to_string().contains("hidden"));
    }

    #[test]
    fn a_hash_is_salted_and_checked_as_rabbitmq_does() {
        let (one, two) = (password_hash("secret"), password_hash("secret"));
        assert_ne!(one, two);
        let bytes = base64::engine::general_purpose::STANDARD.decode(one).expect("base64");
        let mut digest = Sha256::new();
        digest.update(&bytes[..4]);
        digest.update("secret");
        assert_eq!(bytes[4..], digest.finalize()[..]);
    }

    #[test]
    fn paths_are_encoded() {
        assert_eq!(encoded("/"), "%2F");
        assert_eq!(encoded("a-b_c.d~e"), "a-b_c.d~e");
        assert_eq!(decoded("%zz%4"), "%zz%4");
    }

    #[test]
    fn tags_are_read_in_both_forms() {
        for (json, ours) in [
            (r#"{"tags":["soar-client"]}"#, true),
            (r#"{"tags":"a, soar-client"}"#, true),
            (r#"{"tags":[]}"#, false),
            ("{}", false),
        ] {
            let user: User = serde_json::from_str(json).expect("a user");
            assert_eq!(user.tags.has(TAG), ours, "{json}");
        }
    }
}
