//! Who calls: the admin by token, or a client by id and secret or by PASETO token (contract, section 4).
//!
//! Wrong credentials get the same answer in the same time whether or not the id exists, and are slowed down by address;
//! right ones always pass, so that nobody can lock a client out by guessing.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use actix_web::http::header::{AUTHORIZATION, HeaderMap};
use actix_web::web::Query;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::error::{Challenge, Problem};
use super::route::Call;
use crate::directory::ClientEntry;
use crate::secret::SecretSlots;
use crate::time::Timestamp;

/// Longest decoded `client_id:secret`. A secret has 43 characters, an id 63.
const BASIC_BYTES_MAX: usize = 512;

/// Longest bearer token looked at.
const BEARER_BYTES_MAX: usize = 4096;

/// A caller whose credentials were right.
#[derive(Debug, Clone)]
pub(crate) enum Who {
    Admin,
    Client(Arc<ClientEntry>),
}

/// What a request brings to say who it is.
#[derive(Debug, PartialEq, Eq)]
enum Credentials<'a> {
    None,
    Client {
        id: Cow<'a, str>,
        secret: Cow<'a, str>,
    },
    Bearer(&'a str),
    /// An `Authorization` header that is neither.
    Unreadable,
}

impl Call {
    /// For a client's call: the calling client.
    pub(crate) fn client(&self) -> Result<Arc<ClientEntry>, Problem> {
        match self.identify(Challenge::BasicOrBearer)? {
            Who::Client(entry) => Ok(entry),
            Who::Admin => Err(not_for_the_admin()),
        }
    }

    /// For an admin's call.
    pub(crate) fn admin(&self) -> Result<(), Problem> {
        match self.identify(Challenge::Bearer)? {
            Who::Admin => Ok(()),
            Who::Client(_) => Err(Problem::forbidden("this is the admin's call; use the admin token")),
        }
    }

    /// For a call on `/clients/{id}…` that the admin and that client may make. Another client's is refused whether or
    /// not it exists. Returns the entry, which for the admin may not exist: 404.
    pub(crate) fn admin_or_owner(&self) -> Result<Arc<ClientEntry>, Problem> {
        let id = self.path("id");
        match self.identify(Challenge::BasicOrBearer)? {
            Who::Client(entry) if entry.record.client_id.as_str() == id => Ok(entry),
            Who::Client(_) => Err(Problem::forbidden("this is another client's; a client may only use its own")),
            Who::Admin => self.existing(id),
        }
    }

    /// The client of this id, or 404.
    pub(crate) fn existing(&self, id: &str) -> Result<Arc<ClientEntry>, Problem> {
        self.api.state.directory.get(id).ok_or_else(|| Problem::not_found("there is no such client"))
    }

    /// Who calls.
    pub(crate) fn identify(&self, challenge: Challenge) -> Result<Who, Problem> {
        let query = self.api.state.config.query_auth.then(|| self.request.query_string());
        let credentials = read(self.request.headers(), query.unwrap_or_default());
        if credentials == Credentials::None {
            return Err(Problem::unauthorized(challenge));
        }
        match self.check(&credentials) {
            Some(who) => Ok(who),
            None => Err(self.wrong(challenge)),
        }
    }

    /// For a client's call that brings its token elsewhere than in `Authorization`.
    pub(crate) fn client_by_token(&self, token: &str) -> Result<Arc<ClientEntry>, Problem> {
        let short_enough = token.len() <= BEARER_BYTES_MAX;
        match short_enough.then(|| self.check(&Credentials::Bearer(token))).flatten() {
            Some(Who::Client(entry)) => Ok(entry),
            Some(Who::Admin) => Err(not_for_the_admin()),
            None => Err(self.wrong(Challenge::BasicOrBearer)),
        }
    }

    /// The answer to wrong credentials; too many of them are told to wait.
    fn wrong(&self, challenge: Challenge) -> Problem {
        match self.api.guesses.note_wrong(network(self.request.peer_addr().map(|peer| peer.ip()))) {
            Ok(()) => Problem::unauthorized(challenge),
            Err(wait) => Problem::rate_limited("too many wrong credentials from this address", wait),
        }
    }

    fn check(&self, credentials: &Credentials<'_>) -> Option<Who> {
        let state = &self.api.state;
        let now = Timestamp::now();
        match credentials {
            Credentials::Client { id, secret } => {
                let entry = state.directory.get(id);
                let nobody = SecretSlots::nobody();
                let slots = entry.as_ref().map_or(&nobody, |entry| &entry.secrets);
                let fits = slots.verify(secret, now);
                entry.filter(|_| fits).map(Who::Client)
            }
            Credentials::Bearer(token) => {
                if (SecretSlots { current: state.admin, ..SecretSlots::nobody() }).verify(token, now) {
                    return Some(Who::Admin);
                }
                let claims = state.tokens.verify(token, now).ok()?;
                let entry = state.directory.get(claims.client_id.as_str())?;
                (entry.incarnation == claims.incarnation).then_some(Who::Client(entry))
            }
            Credentials::None | Credentials::Unreadable => None,
        }
    }
}

fn not_for_the_admin() -> Problem {
    Problem::forbidden("this is a client's call; use a client's credentials, not the admin's")
}

/// Reads credentials: the `Authorization` header first; the query (empty when that is switched off) only without one.
fn read<'a>(headers: &'a HeaderMap, query: &str) -> Credentials<'a> {
    let Some(header) = headers.get(AUTHORIZATION) else {
        return if query.contains("secret=") { from_query(query) } else { Credentials::None };
    };
    let Some((scheme, rest)) = header.to_str().ok().and_then(|text| text.split_once(' ')) else {
        return Credentials::Unreadable;
    };
    let rest = rest.trim();
    if scheme.eq_ignore_ascii_case("basic") {
        from_basic(rest).unwrap_or(Credentials::Unreadable)
    } else if scheme.eq_ignore_ascii_case("bearer") && rest.len() <= BEARER_BYTES_MAX {
        Credentials::Bearer(rest)
    } else {
        Credentials::Unreadable
    }
}

/// RFC 7617: base64 of `id:secret`, split at the first colon.
fn from_basic<'a>(encoded: &str) -> Option<Credentials<'a>> {
    let mut buffer = [0; BASIC_BYTES_MAX];
    let length = STANDARD.decode_slice(encoded, &mut buffer).ok()?;
    let (id, secret) = std::str::from_utf8(&buffer[..length]).ok()?.split_once(':')?;
    Some(Credentials::Client { id: Cow::Owned(id.to_owned()), secret: Cow::Owned(secret.to_owned()) })
}

fn from_query<'a>(query: &str) -> Credentials<'a> {
    let pairs = Query::<Vec<(String, String)>>::from_query(query).map(Query::into_inner).unwrap_or_default();
    let (mut id, mut secret) = (None, None);
    for (name, value) in pairs {
        match name.as_str() {
            "client_id" => id = Some(value),
            "secret" => secret = Some(value),
            _ => {}
        }
    }
    match (id, secret) {
        (Some(id), Some(secret)) => Credentials::Client { id: Cow::Owned(id), secret: Cow::Owned(secret) },
        _ => Credentials::None,
    }
}

/// What wrong guesses are counted under: the address, or the /64 that an IPv6 host can choose its addresses from.
fn network(address: Option<IpAddr>) -> IpAddr {
    match address {
        Some(IpAddr::V6(v6)) => match v6.to_ipv4_mapped() {
            Some(v4) => IpAddr::V4(v4),
            None => IpAddr::V6(Ipv6Addr::from(u128::from(v6) & !u128::from(u64::MAX))),
        },
        Some(v4) => v4,
        None => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::http::header::HeaderValue;

    fn with(header: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, HeaderValue::from_str(header).expect("a header value"));
        headers
    }

    fn client(id: &str, secret: &str) -> Credentials<'static> {
        Credentials::Client { id: id.to_owned().into(), secret: secret.to_owned().into() }
    }

    #[test]
    fn basic_is_split_at_the_first_colon() {
        let headers = with(&format!("Basic {}", STANDARD.encode("noc-c2:a:b")));
        assert_eq!(read(&headers, ""), client("noc-c2", "a:b"));
        let headers = with(&format!("bAsIc {}", STANDARD.encode("noc-c2:")));
        assert_eq!(read(&headers, ""), client("noc-c2", ""));
    }

    #[test]
    fn what_cannot_be_read_is_wrong_not_absent() {
        let long = format!("Basic {}", STANDARD.encode("x".repeat(BASIC_BYTES_MAX + 1)));
        for header in ["Basic", "Basic !!!", "Basic bm9jb2xvbg==", "Digest x", "", &long, "Basic /////w=="] {
            assert_eq!(read(&with(header), ""), Credentials::Unreadable, "{header}");
        }
        assert_eq!(read(&HeaderMap::new(), ""), Credentials::None);
    }

    #[test]
    fn the_query_counts_only_without_a_header() {
        let query = "wait=3&client_id=noc-c2&secret=a%2Bb";
        assert_eq!(read(&HeaderMap::new(), query), client("noc-c2", "a+b"));
        let bearer = with("Bearer t");
        assert_eq!(read(&bearer, query), Credentials::Bearer("t"));
        assert_eq!(read(&HeaderMap::new(), "client_id=noc-c2"), Credentials::None);
    }

    #[test]
    fn an_ipv6_host_counts_as_its_network() {
        let address = |text: &str| network(text.parse().ok());
        assert_eq!(address("2001:db8::1:2:3"), address("2001:db8::4:5:6"));
        assert_eq!(address("::ffff:192.0.2.1"), address("192.0.2.1"));
        assert_ne!(address("192.0.2.1"), address("192.0.2.2"));
    }
}
