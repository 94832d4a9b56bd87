//! `/clients/{id}/dead-letters`: look at what could not be delivered or read, replay it, purge it.

use actix_web::HttpResponse;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use utoipa::ToSchema;

use super::body::{self, Body, LIST_BYTES_MAX, Media, media};
use super::error::{Errors, Problem};
use super::openapi::{AdminProblems, BodyProblems, InvalidProblem, NotFoundProblem, UnavailableProblems};
use super::query::Query;
use super::receive::EnvelopeView;
use super::route::{Answer, Call};
use crate::broker::{BrokerError, BrokerErrorKind, DeadLetter, DeadReason, Origin, Payload};
use crate::time::Timestamp;

/// A page of dead letters, oldest first.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DeadLetterPage {
    dead_letters: Vec<DeadLetterView>,
    /// For `after`; `null` on the last page.
    next: Option<String>,
}

/// A message that could not be delivered, or not be read.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DeadLetter)]
pub(crate) struct DeadLetterView {
    /// Its own id, not the message's.
    id: String,
    /// Where it died.
    #[schema(value_type = OriginView)]
    queue: Origin,
    #[schema(value_type = ReasonView)]
    reason: DeadReason,
    /// Delivery attempts made: calls of the webhook; of a `rejected` one its `deliveries`.
    attempts: u32,
    /// RFC 3339 in UTC.
    #[schema(value_type = String, format = "date-time")]
    died_at: Timestamp,
    /// The message, when it could be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<EnvelopeView>)]
    envelope: Option<Box<RawValue>>,
    /// Base64 of what could not be read as a message.
    #[serde(skip_serializing_if = "Option::is_none")]
    raw: Option<String>,
}

/// A queue of the client's.
#[derive(ToSchema)]
#[schema(as = DeadLetterQueue, rename_all = "snake_case")]
#[allow(dead_code, reason = "names the queues in the document; the origin itself is the broker's")]
pub(crate) enum OriginView {
    Inbox,
    Outbox,
    Notify,
}

/// Why it died.
#[derive(ToSchema)]
#[schema(as = DeadLetterReason, rename_all = "snake_case")]
#[allow(dead_code, reason = "names the reasons in the document; the reason itself is the broker's")]
pub(crate) enum ReasonView {
    DeliveryFailed,
    Expired,
    InboxFull,
    Rejected,
    InvalidMessage,
}

/// Which dead letters to replay; all, without a body or without `ids`.
#[derive(Debug, Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the body; it is read by hand, to name every mistake")]
pub(crate) struct ReplayBody {
    /// Ids of dead letters; unknown ones are ignored.
    #[schema(nullable = false)]
    ids: Option<Vec<String>>,
}

/// How many were put back.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Replayed {
    replayed: u64,
}

/// How many were deleted.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Purged {
    purged: u64,
}

/// Look at dead letters.
///
/// Oldest first. A page may have fewer than `limit` when they are large; `next` says whether there are more.
#[utoipa::path(
    get, path = "/clients/{id}/dead-letters", operation_id = "list_dead_letters", tag = "dead letters",
    params(
        ("id" = String, Path, description = "Client id"),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Dead letters at most; 100 unless given."),
        ("after" = Option<String>, Query, description = "The `next` of the page before."),
    ),
    responses(
        (status = 200, description = "A page", body = DeadLetterPage),
        AdminProblems, NotFoundProblem, InvalidProblem, UnavailableProblems,
    ),
    security(("admin" = []), ("basic" = []), ("token" = []), ("query_id" = [], "query_secret" = [])),
)]
pub(crate) async fn list(call: Call) -> Answer {
    let entry = call.admin_or_owner()?;
    let mut query = Query::new(call.request.query_string());
    let limit = query.integer("limit", 1..=1000, 100) as usize;
    // What a cursor looks like is the broker's; none at all is the beginning.
    let after = query.cursor("after", |_| true).filter(|text| !text.is_empty());
    query.finish()?;
    let id = &entry.record.client_id;
    let _turn = call.api.budget.pull(id).await?;
    let page = call.api.state.broker.dead_letters(id, after.as_deref(), limit).await.map_err(gone)?;
    let dead_letters = page.dead_letters.into_iter().map(DeadLetterView::try_from).collect::<Result<_, _>>()?;
    let answer = DeadLetterPage { dead_letters, next: page.next };
    Ok(HttpResponse::Ok().insert_header(("cache-control", "no-store")).json(answer))
}

/// Replay dead letters: put them back into the queue that they died in.
#[utoipa::path(
    post, path = "/clients/{id}/dead-letters/replay", operation_id = "replay_dead_letters", tag = "dead letters",
    params(("id" = String, Path, description = "Client id")),
    request_body(content = Option<ReplayBody>, example = json!({"ids": ["…"]})),
    responses(
        (status = 200, description = "Replayed", body = Replayed),
        AdminProblems, NotFoundProblem, BodyProblems, UnavailableProblems,
    ),
    security(("admin" = []), ("basic" = []), ("token" = []), ("query_id" = [], "query_secret" = [])),
)]
pub(crate) async fn replay(mut call: Call) -> Answer {
    let entry = call.admin_or_owner()?;
    let id = &entry.record.client_id;
    let mut body = Body::open(&mut call, LIST_BYTES_MAX, Some(id)).await?;
    let bytes = body.all().await?;
    let ids = if bytes.is_empty() {
        None
    } else {
        media(call.request.headers(), &[Media::Json])?;
        replay_ids(&bytes)?
    };
    let replayed = call.api.state.broker.replay_dead(id, ids.as_deref()).await.map_err(gone)?;
    Ok(HttpResponse::Ok().json(Replayed { replayed }))
}

fn replay_ids(body: &[u8]) -> Result<Option<Vec<String>>, Problem> {
    let body = body::json(body)?;
    let mut errors = Errors::default();
    let value = match &body {
        Value::Null => return Ok(None),
        Value::Object(object) => object.get("ids"),
        _ => {
            errors.add("", "must be an object");
            return Err(Problem::invalid(errors));
        }
    };
    let Some(value) = value else { return Ok(None) };
    let mut ids = Vec::new();
    match value {
        Value::Array(values) => {
            for (index, value) in values.iter().enumerate() {
                match value {
                    Value::String(id) => ids.push(id.clone()),
                    _ => errors.add(format!("/ids/{index}"), "must be a string"),
                }
            }
        }
        _ => errors.add("/ids", "must be an array of strings; leave it out to replay all"),
    }
    errors.into_result()?;
    Ok(Some(ids))
}

/// Purge dead letters: delete them for good.
#[utoipa::path(
    delete, path = "/clients/{id}/dead-letters", operation_id = "purge_dead_letters", tag = "dead letters",
    params(("id" = String, Path, description = "Client id")),
    responses((status = 200, description = "Purged", body = Purged), AdminProblems, NotFoundProblem, UnavailableProblems),
    security(("admin" = []), ("basic" = []), ("token" = []), ("query_id" = [], "query_secret" = [])),
)]
pub(crate) async fn purge(call: Call) -> Answer {
    let entry = call.admin_or_owner()?;
    let purged = call.api.state.broker.purge_dead(&entry.record.client_id, None).await.map_err(gone)?;
    Ok(HttpResponse::Ok().json(Purged { purged }))
}

/// Here a missing queue is a missing client, also for the admin.
fn gone(error: BrokerError) -> Problem {
    match error.kind {
        BrokerErrorKind::NotFound => Problem::not_found("there is no such client"),
        _ => error.into(),
    }
}

impl TryFrom<DeadLetter> for DeadLetterView {
    type Error = Problem;

    fn try_from(letter: DeadLetter) -> Result<Self, Problem> {
        let (envelope, raw) = match letter.payload {
            Payload::Message(message) => {
                // Checked when it was accepted; checked again, as one broken letter must not break the page's JSON.
                let text = std::str::from_utf8(&message.envelope).map_err(|error| unreadable(&letter.id, &error))?;
                let envelope =
                    RawValue::from_string(text.to_owned()).map_err(|error| unreadable(&letter.id, &error))?;
                (Some(envelope), None)
            }
            Payload::Foreign(foreign) => (None, Some(STANDARD.encode(&foreign.body))),
        };
        Ok(Self {
            id: letter.id,
            queue: letter.origin,
            reason: letter.reason,
            attempts: letter.attempts,
            died_at: letter.died_at,
            envelope,
            raw,
        })
    }
}

fn unreadable(id: &str, error: &dyn std::error::Error) -> Problem {
    Problem::internal(format!("read the envelope of dead letter {id}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::Foreign;

    #[test]
    fn what_could_not_be_read_is_shown_as_base64() {
        let payload = Payload::Foreign(Foreign { body: "\u{0}{".into(), message_id: None, traceparent: None });
        let letter = DeadLetter {
            id: "7".into(),
            origin: Origin::Outbox,
            reason: DeadReason::InvalidMessage,
            attempts: 0,
            died_at: Timestamp::from_millis(0),
            payload,
        };
        let view = serde_json::to_value(DeadLetterView::try_from(letter).expect("shown")).expect("JSON");
        let shown = serde_json::json!({"id": "7", "queue": "outbox", "reason": "invalid_message", "attempts": 0,
            "died_at": "1970-01-01T00:00:00.000Z", "raw": "AHs="});
        assert_eq!(view, shown);
    }

    #[test]
    fn a_replay_is_of_some_or_of_all() {
        assert_eq!(replay_ids(b"{}").expect("all"), None);
        assert_eq!(replay_ids(b"null").expect("all"), None);
        assert_eq!(replay_ids(br#"{"ids":["a"]}"#).expect("some"), Some(vec!["a".to_owned()]));
        assert_eq!(replay_ids(br#"{"ids":[]}"#).expect("none"), Some(Vec::new()));
        for wrong in [&br#"{"ids":null}"#[..], br#"{"ids":"a"}"#, br#"{"ids":["a",1]}"#, b"[]"] {
            assert!(replay_ids(wrong).is_err());
        }
    }
}
