//! RabbitMQ's management API, as far as users are concerned.
//!
//! The user's name is the client's id, its password the client's secret. It may write to one exchange, `{id}-exchange`,
//! which leads to its outbox (routing key `outbox`) and its notify queue (`notify`), and read its own inbox; it may
//! declare nothing. It cannot be given the default exchange, through which it could write to every queue.
//!
//! Users are RabbitMQ's, not a virtual host's. A tag says which users are the backbone's, and of which virtual host:
//! others of the same name are left alone, and their names are taken.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::future::try_join3;
use reqwest::{Method, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::address::Addresses;
use super::topology;
use crate::broker::{BrokerError, BrokerErrorKind};
use crate::client::ClientId;
use crate::secret::SaltedHash;

/// First part of the tag of the users that the backbone made; the virtual host follows.
const TAG: &str = "soar-client-of:";

/// Connections and channels that one client may have. Plenty for any client, and few enough that a broken or hostile
/// one does not use up RabbitMQ's memory and file handles, which are everybody's.
const CONNECTIONS_MAX: u32 = 64;
const CHANNELS_MAX: u32 = 1024;

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
    name: String,
    #[serde(default)]
    password_hash: String,
    #[serde(default)]
    tags: Tags,
}

#[derive(Deserialize)]
struct Permission {
    user: String,
    #[serde(flatten)]
    patterns: Permissions,
}

/// Regular expressions of the names that a user may declare, write to, and read.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, serde::Serialize)]
struct Permissions {
    configure: String,
    write: String,
    read: String,
}

impl Permissions {
    fn of(client: &ClientId) -> Self {
        // Client ids have no character that means anything in a regular expression but the hyphen, which does not
        // outside of brackets.
        Self {
            configure: "^$".into(),
            write: format!("^{}$", topology::entrance(client)),
            read: format!("^{}$", topology::inbox(client)),
        }
    }
}

/// A user that the backbone made, as RabbitMQ has it.
#[derive(Debug, Default)]
pub(super) struct Found {
    password_hash: String,
    permissions: Option<Permissions>,
}

impl Found {
    /// Whether it is what the client's user should be.
    pub(super) fn is_as_wanted(&self, client: &ClientId, password: &SaltedHash) -> bool {
        self.password_hash == password.to_base64() && self.permissions == Some(Permissions::of(client))
    }
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

    async fn list<T: DeserializeOwned>(&self, path: &str, action: &str) -> Result<Vec<T>, BrokerError> {
        let answer = self.call(Method::GET, path, None, action).await?;
        if !answer.status().is_success() {
            return Err(refused(action, answer.status()));
        }
        answer.json().await.map_err(|error| unreadable(action, error))
    }

    /// The tag of users of this virtual host.
    fn tag(&self) -> String {
        format!("{TAG}{}", encoded(&self.vhost))
    }

    /// The users that the backbone made here.
    pub(super) async fn users(&self) -> Result<HashMap<String, Found>, BrokerError> {
        let action = "list the broker's users";
        let tag = self.tag();
        let users: Vec<User> = self.list("users", action).await?;
        let ours = users.into_iter().filter(|user| user.tags.has(&tag));
        let found = |user: User| (user.name, Found { password_hash: user.password_hash, permissions: None });
        let mut found: HashMap<String, Found> = ours.map(found).collect();
        let path = format!("vhosts/{}/permissions", encoded(&self.vhost));
        for permission in self.list::<Permission>(&path, action).await? {
            if let Some(found) = found.get_mut(&permission.user) {
                found.permissions = Some(permission.patterns);
            }
        }
        Ok(found)
    }

    /// Makes the client's user, or changes its password.
    ///
    /// # Errors
    /// [`BrokerErrorKind::Conflict`] when there is a user of this name that the backbone did not make.
    pub(super) async fn put_user(&self, client: &ClientId, password: &SaltedHash) -> Result<(), BrokerError> {
        let action = format!("set the broker user {client}");
        let name = encoded(client.as_str());
        self.check_is_ours(client, &action).await?;
        let user = json!({
            "password_hash": password.to_base64(),
            "hashing_algorithm": "rabbit_password_hashing_sha256",
            "tags": self.tag(),
        });
        self.change(Method::PUT, &format!("users/{name}"), Some(user), &action).await?;
        let permissions = json!(Permissions::of(client));
        let path = format!("permissions/{}/{name}", encoded(&self.vhost));
        try_join3(
            self.change(Method::PUT, &path, Some(permissions), &action),
            self.limit(&name, "max-connections", CONNECTIONS_MAX, &action),
            self.limit(&name, "max-channels", CHANNELS_MAX, &action),
        )
        .await
        .map(|_| ())
    }

    async fn limit(&self, name: &str, limit: &str, value: u32, action: &str) -> Result<(), BrokerError> {
        let path = format!("user-limits/{name}/{limit}");
        self.change(Method::PUT, &path, Some(json!({ "value": value })), action).await
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
                let user: User = answer.json().await.map_err(|error| unreadable(action, error))?;
                if user.tags.has(&self.tag()) {
                    return Ok(());
                }
                let what = format!(
                    "{action}: RabbitMQ has a user of this name that is not this backbone's; \
                    choose another client id, or delete that user"
                );
                Err(BrokerError::new(BrokerErrorKind::Conflict, what))
            }
        }
    }
}

fn unreadable(action: &str, error: reqwest::Error) -> BrokerError {
    BrokerError::new(BrokerErrorKind::Internal, action).caused_by(error.without_url())
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
    fn paths_are_encoded() {
        assert_eq!(encoded("/"), "%2F");
        assert_eq!(encoded("a-b_c.d~e"), "a-b_c.d~e");
        assert_eq!(decoded("%zz%4"), "%zz%4");
    }

    #[test]
    fn tags_are_read_in_both_forms_and_name_the_virtual_host() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let addresses = Addresses::parse("amqp://rabbit/%2f").expect("an address");
        let tag = Management::new("http://rabbit", &addresses).expect("a URL").tag();
        assert_eq!(tag, "soar-client-of:%2F");
        for (json, ours) in [
            (r#"{"tags":["soar-client-of:%2F"]}"#, true),
            (r#"{"tags":"a, soar-client-of:%2F"}"#, true),
            (r#"{"tags":["soar-client-of:other"]}"#, false),
            (r#"{"tags":[]}"#, false),
            ("{}", false),
        ] {
            let user: User = serde_json::from_str(json).expect("a user");
            assert_eq!(user.tags.has(&tag), ours, "{json}");
        }
    }

    #[test]
    fn a_user_that_differs_is_told_from_one_that_does_not() {
        let client = ClientId::parse("noc-c2").expect("test id");
        let (password, other) = (SaltedHash::of("secret"), SaltedHash::of("secret"));
        let permissions = Permissions::of(&client);
        assert_eq!((&*permissions.write, &*permissions.read), ("^noc-c2-exchange$", "^noc-c2-inbox$"));
        let found = Found { password_hash: password.to_base64(), permissions: Some(permissions.clone()) };
        assert!(found.is_as_wanted(&client, &password) && !found.is_as_wanted(&client, &other));
        let wider = Some(Permissions { read: ".*".into(), ..permissions });
        assert!(!Found { permissions: wider, ..found }.is_as_wanted(&client, &password));
    }
}
