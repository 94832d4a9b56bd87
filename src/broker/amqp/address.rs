//! Where RabbitMQ is: the URL, or several, one for each node of a cluster.

use lapin::uri::{AMQPUri, SASLMechanism};

use super::wire::Trusted;
use crate::broker::{BrokerError, BrokerErrorKind};

/// Largest frame, in bytes: RabbitMQ's own default. Naming it keeps lapin from making buffers for the largest frame
/// that there could be, 7.8 MiB for each connection instead of 0.1.
const FRAME_BYTES_MAX: u32 = 131_072;

/// Seconds between heartbeats, unless the URL says otherwise. A dead peer is noticed after twice this.
const HEARTBEAT_S: u16 = 10;

/// One or more addresses of the same broker.
#[derive(Debug, Clone)]
pub(super) struct Addresses {
    uris: Vec<AMQPUri>,
}

impl Addresses {
    /// Parses `amqp://…` or `amqps://…`, or several of them with commas between, which are then tried in turn.
    pub(super) fn parse(url: &str) -> Result<Self, BrokerError> {
        // The text itself is not repeated: it holds a password.
        let wrong = |why: &str| BrokerError::new(BrokerErrorKind::Conflict, format!("read the broker's URL: {why}"));
        let mut uris = Vec::new();
        for part in url.split(',') {
            let mut uri: AMQPUri = part.trim().parse().map_err(|why: String| wrong(&why))?;
            if uri.vhost.is_empty() {
                // `amqp://host/` names the virtual host "", which nobody has; `/` is meant.
                uri.vhost = "/".into();
            }
            uri.query.frame_max.get_or_insert(FRAME_BYTES_MAX);
            uri.query.heartbeat.get_or_insert(HEARTBEAT_S);
            uris.push(uri);
        }
        if uris.is_empty() { Err(wrong("it is empty")) } else { Ok(Self { uris }) }
    }

    /// The address to try at the `attempt`th time.
    pub(super) fn nth(&self, attempt: usize) -> &AMQPUri {
        &self.uris[attempt % self.uris.len()]
    }

    /// How many addresses there are: one a node.
    pub(super) fn count(&self) -> usize {
        self.uris.len()
    }

    /// Host and port, for people. Never the password.
    pub(super) fn display(uri: &AMQPUri) -> String {
        format!("{}://{}:{}/{}", uri.scheme, uri.authority.host, uri.authority.port, uri.vhost.trim_start_matches('/'))
    }

    /// The user under which the backbone publishes, where it logs in by name.
    pub(super) fn user(&self) -> Option<&str> {
        let uri = &self.uris[0];
        let by_name = matches!(uri.query.auth_mechanism, None | Some(SASLMechanism::Plain | SASLMechanism::AMQPlain));
        by_name.then_some(uri.authority.userinfo.username.as_str())
    }

    /// Whom to believe in queues that clients may write to.
    pub(super) fn trusted(&self) -> Trusted {
        self.user().map_or(Trusted::Nobody, |user| Trusted::User(user.into()))
    }

    /// User and password.
    pub(super) fn credentials(&self) -> (String, String) {
        let userinfo = &self.uris[0].authority.userinfo;
        (userinfo.username.clone(), userinfo.password.clone())
    }

    /// The virtual host.
    pub(super) fn vhost(&self) -> &str {
        &self.uris[0].vhost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_filled_in_and_what_is_given_stays() {
        let one = Addresses::parse("amqp://me:secret@rabbit:5673/%2f").expect("an address");
        assert_eq!((one.uris.len(), one.user(), one.vhost()), (1, Some("me"), "/"));
        assert_eq!(one.nth(5).query.frame_max, Some(FRAME_BYTES_MAX));
        assert_eq!(one.nth(0).query.heartbeat, Some(HEARTBEAT_S));
        assert_eq!(Addresses::display(one.nth(0)), "amqp://rabbit:5673/");
        let given = Addresses::parse("amqps://rabbit/soar?heartbeat=60&frame_max=4096").expect("an address");
        assert_eq!((given.nth(0).query.heartbeat, given.nth(0).query.frame_max), (Some(60), Some(4096)));
        assert_eq!(given.vhost(), "soar");
        for short in ["amqp://rabbit", "amqp://rabbit/"] {
            assert_eq!(Addresses::parse(short).expect("an address").vhost(), "/");
        }
    }

    #[test]
    fn several_are_tried_in_turn() {
        let three = Addresses::parse("amqp://a,amqp://b, amqp://c").expect("addresses");
        let hosts: Vec<_> = (0..4).map(|n| three.nth(n).authority.host.clone()).collect();
        assert_eq!(hosts, ["a", "b", "c", "a"]);
    }

    #[test]
    fn a_wrong_url_is_told_without_its_password() {
        let error = Addresses::parse("http://me:secret@rabbit").expect_err("not AMQP");
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}
