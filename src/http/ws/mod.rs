//! `GET /ws`: a client's WebSocket (RFC 6455), to send, notify and receive over one connection. The frames are in
//! `docs/websocket.md`.
//!
//! # Layout
//! - [`frame`]: frames as text: what a client says, what it is told.
//! - [`intake`]: the incoming bytes, within the client's share of memory.
//! - [`outgoing`]: the outgoing bytes, in chunks that wait for the peer.
//! - [`publishing`]: sends that wait for the broker, in order.
//! - [`session`]: one connection, from the first frame to its close.
//!
//! # Bounds
//! A connection holds at most one incoming frame of 16 × `SOAR_MAX_MESSAGE_BYTES`, a few sends that wait for the broker,
//! a few chunks that wait for the peer, and deliveries up to the client's credit and [`UNSETTLED_BYTES`]. A peer that
//! does not read is not read from and gets nothing; one that is gone is noticed within [`SILENCE_MAX`]. Large incoming
//! messages are within the client's share of [`crate::http::budget`].

mod frame;
mod intake;
mod outgoing;
mod publishing;
mod session;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use actix_web::HttpRequest;
use actix_web::body::{BodyStream, BoxBody};
use actix_web::http::header::{AUTHORIZATION, HeaderValue, SEC_WEBSOCKET_PROTOCOL};
use actix_web::web::Payload;
use actix_web::{FromRequest as _, dev};
use dashmap::DashMap;

use super::edge::RequestId;
use super::error::{Errors, Problem};
use super::openapi::{ClientProblems, InvalidProblem, UnavailableProblems};
use super::route::{Answer, Call};
use crate::client::ClientId;
use outgoing::Outgoing;
use session::Session;

/// Connections at once, of one client and in all.
const SOCKETS_PER_CLIENT: usize = 1_000;
const SOCKETS_MAX: usize = 10_000;

/// Bytes of unsettled messages that one connection holds, whatever its credit.
const UNSETTLED_BYTES: usize = 16 << 20;

/// Bytes of unsettled messages that all connections hold before each is cut down to [`UNSETTLED_BYTES_SCARCE`].
const UNSETTLED_BYTES_ALL: usize = 256 << 20;
const UNSETTLED_BYTES_SCARCE: usize = 1 << 20;

/// After this long without a word from the peer it is pinged.
const PING_AFTER: Duration = Duration::from_secs(15);

/// After this long without a word it is gone.
const SILENCE_MAX: Duration = Duration::from_secs(45);

/// The subprotocol that a browser offers beside its token, so that the answer need not repeat the token.
const PROTOCOL: &str = "backbone";

/// What all connections share.
#[derive(Default)]
pub(crate) struct Sockets {
    by_client: DashMap<ClientId, usize>,
    all: AtomicUsize,
    unsettled_bytes: AtomicUsize,
}

/// One connection's place; given back when it is dropped.
pub(super) struct Place {
    sockets: Arc<Sockets>,
    client: ClientId,
}

impl Sockets {
    fn take(self: &Arc<Self>, client: &ClientId) -> Result<Place, Problem> {
        let all = self.all.fetch_add(1, Ordering::Relaxed);
        let own = {
            let mut own = self.by_client.entry(client.clone()).or_insert(0);
            *own += 1;
            *own
        };
        // Counted first, so that dropping the place takes back what was counted, also when it is refused.
        let place = Place { sockets: Arc::clone(self), client: client.clone() };
        if own > SOCKETS_PER_CLIENT || all >= SOCKETS_MAX {
            return Err(Problem::rate_limited("too many WebSockets at once", Duration::from_secs(5)));
        }
        Ok(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.sockets.all.fetch_sub(1, Ordering::Relaxed);
        if let Some(mut own) = self.sockets.by_client.get_mut(&self.client) {
            *own -= 1;
        }
        self.sockets.by_client.remove_if(&self.client, |_, own| *own == 0);
    }
}

/// Send, notify and receive over a WebSocket.
///
/// Every text frame is one JSON object: `send`, `notify`, `credit`, `ack`, `nack` from the client; `accepted`, `message`,
/// `settled`, `error` from the server. `docs/websocket.md` has each of them. A browser, which cannot send a header, offers
/// the subprotocols `backbone` and `bearer.<token>` with a token of `POST /token`.
#[utoipa::path(
    get, path = "/ws", tag = "messages",
    params(("sec-websocket-protocol" = Option<String>, Header, description = "`backbone, bearer.<token>`, instead of other credentials.")),
    responses(
        (status = 101, description = "The connection is a WebSocket from here on"),
        ClientProblems, InvalidProblem, UnavailableProblems,
    ),
    security(("basic" = []), ("token" = []), ("query_id" = [], "query_secret" = [])),
)]
pub(crate) async fn ws(mut call: Call) -> Answer {
    let offered = Offered::of(&call.request);
    let client = call.client_or_bearer(offered.token.as_deref())?;
    call.api.refuse_when_closing()?;
    let place = call.api.sockets.take(&client.record.client_id)?;
    let frame_bytes_max = call.api.request_bytes_max();
    let intake = intake::Intake::new(Arc::clone(&call.api.budget), client.record.client_id.clone(), frame_bytes_max);
    let mut payload = dev::Payload::Stream { payload: intake.meter(call.payload.take()) };
    let payload = Payload::from_request(&call.request, &mut payload)
        .await
        .map_err(|error| Problem::internal(format!("take the connection: {error}")))?;
    // What `actix_ws` makes for sending is set aside for a sender that waits by bytes, not by messages; it is kept until
    // the end, because its own end is what tells the incoming side that the connection is gone.
    let (answer, _, incoming) = actix_ws::handle(&call.request, payload).map_err(|error| not_a_websocket(&error))?;
    let incoming =
        incoming.max_frame_size(frame_bytes_max).aggregate_continuations().max_continuation_size(frame_bytes_max);
    let (outgoing, body) = Outgoing::new();
    let mut answer = answer.map_body(|_, kept| BoxBody::new(BodyStream::new(body.keeping(kept))));
    if let Some(protocol) = offered.answer {
        answer.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, protocol);
    }
    let request_id = call.request_id();
    actix_web::rt::spawn(Session::new(call, client, request_id, place, intake, outgoing).run(incoming));
    Ok(answer)
}

fn not_a_websocket(error: &actix_web::Error) -> Problem {
    let mut errors = Errors::default();
    errors.add("upgrade", format!("connect by a WebSocket client (RFC 6455): {error}"));
    Problem::invalid(errors)
}

/// The subprotocols that a client offers.
struct Offered {
    token: Option<String>,
    /// What the answer names: browsers insist on one of those that they offered.
    answer: Option<HeaderValue>,
}

impl Offered {
    fn of(request: &HttpRequest) -> Self {
        let offered: Vec<&str> = (request.headers().get_all(SEC_WEBSOCKET_PROTOCOL))
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .map(str::trim)
            .collect();
        let bearer = offered.iter().copied().find(|protocol| protocol.starts_with("bearer."));
        let answer = offered.iter().copied().find(|protocol| *protocol == PROTOCOL).or(bearer);
        Self {
            token: bearer.and_then(|bearer| bearer.strip_prefix("bearer.")).map(str::to_owned),
            answer: answer.and_then(|answer| HeaderValue::from_str(answer).ok()),
        }
    }
}

impl Call {
    /// As [`Call::client`]; a token beside the headers counts where there is no `Authorization`.
    fn client_or_bearer(&self, token: Option<&str>) -> Result<Arc<crate::directory::ClientEntry>, Problem> {
        match token {
            Some(token) if !self.request.headers().contains_key(AUTHORIZATION) => self.client_by_token(token),
            _ => self.client(),
        }
    }

    fn request_id(&self) -> String {
        use actix_web::HttpMessage as _;
        let extensions = self.request.extensions();
        let id = extensions.get::<RequestId>().and_then(|id| id.0.to_str().ok());
        id.unwrap_or_default().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::test::TestRequest;

    #[test]
    fn the_token_is_a_subprotocol_and_need_not_be_repeated() {
        let offered = |value: &'static str| {
            Offered::of(&TestRequest::default().insert_header((SEC_WEBSOCKET_PROTOCOL, value)).to_http_request())
        };
        let both = offered("bearer.v4.local.abc, backbone");
        assert_eq!(both.token.as_deref(), Some("v4.local.abc"));
        assert_eq!(both.answer, Some(HeaderValue::from_static("backbone")));
        let one = offered("bearer.v4.local.abc");
        assert_eq!(one.answer, Some(HeaderValue::from_static("bearer.v4.local.abc")));
        let other = offered("chat");
        assert!(other.token.is_none() && other.answer.is_none());
    }

    #[test]
    fn places_come_back() {
        let sockets = Arc::new(Sockets::default());
        let (a, b) = (ClientId::parse("a").expect("test client"), ClientId::parse("b").expect("test client"));
        let places: Vec<_> = (0..SOCKETS_PER_CLIENT).map(|_| sockets.take(&a).expect("a place")).collect();
        assert!(sockets.take(&a).is_err());
        assert!(sockets.take(&b).is_ok());
        drop(places);
        assert_eq!((sockets.all.load(Ordering::Relaxed), sockets.by_client.len()), (0, 0));
        assert!(sockets.take(&a).is_ok());
    }
}
