//! Request bodies: content types, lengths, and reading within bounds of memory and time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix_web::dev::Payload;
use actix_web::http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use serde_json::Value;

use super::budget::{BodyRoom, Budget, FREE_BYTES};
use super::error::{Code, Errors, Problem};
use super::route::Call;
use crate::client::ClientId;

/// Longest body of a call that changes settings, in bytes.
pub(crate) const SETTINGS_BYTES_MAX: usize = 4 << 20;

/// Longest list of receipts or dead-letter ids, in bytes of the body.
pub(crate) const LIST_BYTES_MAX: usize = 2 << 20;

/// How many times `SOAR_MAX_MESSAGE_BYTES` a request with messages may be long (contract, section 4).
pub(crate) const REQUEST_PER_MESSAGE: usize = 16;

/// How long a body may stand still.
pub(crate) const CHUNK_TIMEOUT: Duration = Duration::from_secs(30);

/// What a body may take in any case, and the slowest it may be after that, in bytes a second. A body that drips holds
/// its room for a bounded time.
const BODY_GRACE: Duration = Duration::from_secs(30);
const BODY_BYTES_PER_S_MIN: u64 = 64 << 10;

/// The longest that so many bytes of a body may take.
pub(crate) fn slowest(bytes: usize) -> Duration {
    BODY_GRACE + Duration::from_secs(bytes as u64 / BODY_BYTES_PER_S_MIN)
}

/// What a body says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Media {
    Json,
    NdJson,
    MergePatch,
}

impl Media {
    const fn name(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::NdJson => "application/x-ndjson",
            Self::MergePatch => "application/merge-patch+json",
        }
    }
}

/// The body's content type, when it is one of these; otherwise 415.
pub(crate) fn media(headers: &HeaderMap, taken: &[Media]) -> Result<Media, Problem> {
    let refuse = || {
        let names: Vec<_> = taken.iter().map(|media| media.name()).collect();
        Problem::new(Code::UnsupportedMediaType, format!("send `content-type: {}`", names.join("` or `")))
    };
    if headers.get(CONTENT_ENCODING).is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity")) {
        return Err(Problem::new(Code::UnsupportedMediaType, "send the body without a content-encoding"));
    }
    let value = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).ok_or_else(refuse)?;
    let (essence, parameters) = value.split_once(';').unwrap_or((value, ""));
    // JSON is UTF-8 (RFC 8259, section 8.1): a charset parameter means nothing, unless it says otherwise.
    let utf8 = parameters.split(';').filter_map(|parameter| parameter.split_once('=')).all(|(name, value)| {
        !name.trim().eq_ignore_ascii_case("charset") || value.trim().trim_matches('"').eq_ignore_ascii_case("utf-8")
    });
    let known = taken.iter().copied().find(|media| essence.trim().eq_ignore_ascii_case(media.name()));
    known.filter(|_| utf8).ok_or_else(refuse)
}

/// A body being read.
pub(crate) struct Body {
    payload: Payload,
    limit: usize,
    declared: Option<usize>,
    read: usize,
    started: Instant,
    payer: Option<(Arc<Budget>, ClientId)>,
    room: Option<BodyRoom>,
}

impl Body {
    /// Starts reading a body of at most `limit` bytes. One that says it is longer is refused at once. What is large is
    /// on the client's share; the admin (`None`) sends only what is small.
    pub(crate) async fn open(call: &mut Call, limit: usize, client: Option<&ClientId>) -> Result<Self, Problem> {
        let declared = call.request.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let mut body = Self {
            payload: std::mem::replace(&mut call.payload, Payload::None),
            limit,
            declared,
            read: 0,
            started: Instant::now(),
            payer: client.map(|client| (Arc::clone(&call.api.budget), client.clone())),
            room: None,
        };
        if let Some(declared) = declared {
            body.check(declared)?;
            body.take_room(declared, declared).await?;
        }
        Ok(body)
    }

    fn check(&self, length: usize) -> Result<(), Problem> {
        if length > self.limit {
            return Err(Problem::too_large(format!("the body must not be longer than {} bytes", self.limit)));
        }
        Ok(())
    }

    async fn take_room(&mut self, length: usize, cost: usize) -> Result<(), Problem> {
        if let Some((budget, client)) = self.payer.as_ref().filter(|_| self.room.is_none() && length > FREE_BYTES) {
            self.room = Some(budget.body(client, cost).await?);
        }
        Ok(())
    }

    /// The next piece; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Problem> {
        let too_slow = || Problem::invalid_json("the body stopped coming, or came too slowly, before it was complete");
        let chunk = match tokio::time::timeout(CHUNK_TIMEOUT, self.payload.next()).await {
            Err(_) => return Err(too_slow()),
            Ok(None) => return Ok(None),
            Ok(Some(Err(_))) => return Err(Problem::invalid_json("the body was cut off")),
            Ok(Some(Ok(chunk))) => chunk,
        };
        self.read += chunk.len();
        self.check(self.read)?;
        if self.started.elapsed() > slowest(self.read) {
            return Err(too_slow());
        }
        // A body that did not say how long it is may get as long as it may.
        self.take_room(self.read, self.limit).await?;
        Ok(Some(chunk))
    }

    /// Bytes read so far.
    pub(crate) fn length(&self) -> usize {
        self.read
    }

    /// All of it. A body that came in one piece is not copied.
    pub(crate) async fn all(&mut self) -> Result<Bytes, Problem> {
        let Some(first) = self.next().await? else { return Ok(Bytes::new()) };
        if self.declared == Some(first.len()) {
            return Ok(first);
        }
        let mut all = BytesMut::with_capacity(self.declared.unwrap_or(first.len() * 2));
        all.extend_from_slice(&first);
        while let Some(chunk) = self.next().await? {
            all.extend_from_slice(&chunk);
        }
        Ok(all.freeze())
    }
}

/// A body that must be one JSON value.
pub(crate) fn json(body: &[u8]) -> Result<Value, Problem> {
    let text = utf8(body)?;
    serde_json::from_str(text).map_err(|error| not_json(&error))
}

/// A body that must be a JSON object.
pub(crate) fn object(body: &[u8]) -> Result<serde_json::Map<String, Value>, Problem> {
    match json(body)? {
        Value::Object(object) => Ok(object),
        _ => {
            let mut errors = Errors::default();
            errors.add("", "must be an object");
            Err(Problem::invalid(errors))
        }
    }
}

pub(crate) fn utf8(body: &[u8]) -> Result<&str, Problem> {
    std::str::from_utf8(body).map_err(|error| {
        Problem::invalid_json(format!("the body is not JSON: byte {} is not UTF-8", error.valid_up_to() + 1))
    })
}

pub(crate) fn not_json(error: &serde_json::Error) -> Problem {
    Problem::invalid_json(format!("the body is not JSON: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::http::header::HeaderValue;

    fn media_of(value: &'static str) -> Option<Media> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(value));
        media(&headers, &[Media::Json, Media::NdJson]).ok()
    }

    #[test]
    fn content_types_are_compared_by_their_essence() {
        for json in ["application/json", "Application/JSON", "application/json; charset=utf-8", "application/json;a=b"]
        {
            assert_eq!(media_of(json), Some(Media::Json), "{json}");
        }
        assert_eq!(media_of("application/x-ndjson"), Some(Media::NdJson));
        for other in ["text/plain", "", "application/jsonx", "application/json; charset=latin1", "json"] {
            assert_eq!(media_of(other), None, "{other}");
        }
        let absent = media(&HeaderMap::new(), &[Media::Json]).expect_err("a body says what it is");
        assert_eq!(absent.code(), Code::UnsupportedMediaType);
    }

    #[test]
    fn a_content_encoding_is_refused_rather_than_misread() {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        assert!(media(&headers, &[Media::Json]).is_err());
    }

    #[test]
    fn hostile_json_is_a_400() {
        let deep = "[".repeat(100_000);
        for body in [b"".as_slice(), b"{", b"\xff", b"{\"a\":\"\xc3\x28\"}", b"{\"a\":\"\0\"}", b"nul", deep.as_bytes()]
        {
            assert_eq!(object(body).expect_err("not JSON").code(), Code::InvalidJson);
        }
        assert_eq!(object(b"[]").expect_err("not an object").code(), Code::Invalid);
    }
}
