//! `POST /send` and `POST /notify`: messages into the client's outbox or notify queue. 202 once they are durable.

use std::time::Duration;

use actix_web::HttpResponse;
use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::{ArrayBuilder, OneOfBuilder};
use utoipa::openapi::{Ref, RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use super::batch::{Batch, Checked, Lines, MESSAGES_MAX};
use super::body::{Body, Media, REQUEST_PER_MESSAGE, media};
use super::error::{Challenge, Problem};
use super::openapi::{BodyProblems, ClientProblems, StorageProblem, Traced, UnavailableProblems};
use super::route::{Answer, Call};
use crate::broker::{Health, Published, Queue};
use crate::directory::ClientEntry;
use crate::envelope::Message;
use crate::intake::{Kind, parse_traceparent};
use crate::time::Timestamp;

/// Bodies from this length on are checked off the workers' threads, where they would hold up other calls for tens of
/// milliseconds.
pub(crate) const CHECK_APART_BYTES: usize = 256 << 10;

/// How long a publish may take. Past it the caller is told to send again; what was begun may still be delivered, once
/// for an own id.
pub(crate) const PUBLISH_TIMEOUT: Duration = Duration::from_secs(30);

/// A message to send under a topic.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct SendMessage {
    /// Dot-separated words of `A-Z a-z 0-9 _ -`, at most 255 bytes.
    #[schema(
        max_length = 255,
        min_length = 1,
        pattern = r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$",
        example = "soar.noc.slocum"
    )]
    topic: String,
    /// Any JSON value; passed on byte for byte. At most `SOAR_MAX_MESSAGE_BYTES` bytes long and 128 levels deep.
    #[schema(value_type = Value, example = json!({"depth_m": 42.5}))]
    message: serde_json::Value,
    /// The sender's own id: sent again within `SOAR_DEDUP_WINDOW`, the message is routed once. Visible ASCII without `.`.
    #[schema(max_length = 128, min_length = 1, pattern = r"^[!-\-/-~]+$", example = "dive-7", nullable = false)]
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
}

/// A message to every client.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub(crate) struct NotifyMessage {
    /// Any JSON value; passed on byte for byte. At most `SOAR_MAX_MESSAGE_BYTES` bytes long and 128 levels deep.
    #[schema(value_type = Value, example = json!({"maintenance": "at noon"}))]
    message: serde_json::Value,
    /// The sender's own id: sent again within `SOAR_DEDUP_WINDOW`, the message is routed once. Visible ASCII without `.`.
    #[schema(max_length = 128, min_length = 1, pattern = r"^[!-\-/-~]+$", example = "note-1", nullable = false)]
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
}

/// Declares the schema of a body: one message or several, which `utoipa`'s derive cannot bound.
macro_rules! one_or_several {
    ($body:ident, $message:ident) => {
        /// One message or several.
        pub(crate) struct $body;

        impl PartialSchema for $body {
            fn schema() -> RefOr<Schema> {
                let one = || Ref::from_schema_name(stringify!($message));
                let several = ArrayBuilder::new().items(one()).min_items(Some(1)).max_items(Some(MESSAGES_MAX));
                OneOfBuilder::new().item(one()).item(several).description(Some("One message or several.")).into()
            }
        }

        impl ToSchema for $body {
            fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
                schemas.push((stringify!($message).into(), $message::schema()));
                $message::schemas(schemas);
            }
        }
    };
}

one_or_several!(SendBody, SendMessage);
one_or_several!(NotifyBody, NotifyMessage);

/// The messages are durable and will be delivered.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Accepted {
    /// Every message of the request.
    #[schema(example = 1)]
    accepted: usize,
    /// Those among them whose own id was seen before; they are not routed again.
    #[schema(example = 0)]
    duplicates: usize,
    /// The messages' ids, in order.
    #[schema(example = json!(["dive-7"]))]
    ids: Vec<String>,
}

/// Send messages under topics.
///
/// One message, an array of messages, or one message per line (`application/x-ndjson`). All are checked first, and all
/// or none are taken. 202 says that they are on disk (or confirmed by the broker); send again with the same `id` when
/// the answer is lost. At most 100,000 messages a request.
#[utoipa::path(
    post, path = "/send", tag = "messages",
    params(Traced),
    request_body(content(
        (SendBody = "application/json", example = json!({"topic": "soar.noc.slocum", "message": {"depth_m": 42.5}})),
        (SendMessage = "application/x-ndjson"),
    )),
    responses(
        (status = 202, description = "Accepted: durable", body = Accepted),
        ClientProblems, BodyProblems, UnavailableProblems, StorageProblem,
    ),
    security(("basic" = []), ("token" = []), ("query_id" = [], "query_secret" = [])),
)]
pub(crate) async fn send(call: Call) -> Answer {
    publish(call, Kind::Topic).await
}

/// Send messages to every client, the sender included.
///
/// As `POST /send`, without topics.
#[utoipa::path(
    post, path = "/notify", tag = "messages",
    params(Traced),
    request_body(content(
        (NotifyBody = "application/json", example = json!({"message": {"maintenance": "at noon"}})),
        (NotifyMessage = "application/x-ndjson"),
    )),
    responses(
        (status = 202, description = "Accepted: durable", body = Accepted),
        ClientProblems, BodyProblems, UnavailableProblems, StorageProblem,
    ),
    security(("basic" = []), ("token" = []), ("query_id" = [], "query_secret" = [])),
)]
pub(crate) async fn notify(call: Call) -> Answer {
    publish(call, Kind::Broadcast).await
}

async fn publish(mut call: Call, kind: Kind) -> Answer {
    let client = call.client()?;
    call.api.refuse_when_closing()?;
    let form = media(call.request.headers(), &[Media::Json, Media::NdJson])?;
    if let Health::Unreachable(_) = call.api.state.broker.health() {
        return Err(Problem::broker_unavailable());
    }
    // Held until the broker has the messages: they are what the room is for.
    let limit = call.api.request_bytes_max();
    let mut body = Body::open(&mut call, limit, Some(&client.record.client_id)).await?;
    let Checked { messages, ids } = read(&call, &client, kind, form, &mut body).await?;
    if let Some(limiter) = &client.send_limiter {
        let over = |wait| Problem::rate_limited(format!("more than {} messages a second", limiter.per_s()), wait);
        limiter.take(messages.len()).map_err(over)?;
    }
    // Deleted meanwhile, the client's credentials are none any more. Until the broker has answered, the registry waits.
    let _permit = client.gate.enter().ok_or_else(|| Problem::unauthorized(Challenge::BasicOrBearer))?;
    let accepted = messages.len();
    let published = into_queue(&call, &client, kind, messages).await?;
    let duplicates = published.duplicates.iter().filter(|seen| **seen).count();
    let text = format!(r#"{{"accepted":{accepted},"duplicates":{duplicates},"ids":[{ids}]}}"#);
    Ok(HttpResponse::Accepted().content_type("application/json").body(text))
}

async fn read(call: &Call, client: &ClientEntry, kind: Kind, form: Media, body: &mut Body) -> Result<Checked, Problem> {
    let sender = client.record.client_id.clone();
    let traceparent =
        call.request.headers().get("traceparent").and_then(|value| parse_traceparent(value.to_str().ok()?));
    let message_bytes_max = call.api.state.config.max_message_bytes;
    let mut batch = Batch::new(sender, kind, Timestamp::now(), traceparent, message_bytes_max);
    if form == Media::NdJson {
        let mut lines = Lines::default();
        while let Some(chunk) = body.next().await? {
            lines.feed(&chunk, |line| batch.line(line))?;
        }
        lines.finish(|line| batch.line(line))?;
        return batch.finish();
    }
    let bytes = body.all().await?;
    let check = move || {
        batch.json(&bytes)?;
        batch.finish()
    };
    if body.length() < CHECK_APART_BYTES {
        return check();
    }
    actix_web::web::block(check).await.map_err(|_| Problem::internal("the blocking pool dropped a check"))?
}

async fn into_queue(
    call: &Call,
    client: &ClientEntry,
    kind: Kind,
    messages: Vec<Message>,
) -> Result<Published, Problem> {
    let id = client.record.client_id.clone();
    let queue = match kind {
        Kind::Topic => Queue::Outbox(id),
        Kind::Broadcast => Queue::Notify(id),
    };
    match tokio::time::timeout(PUBLISH_TIMEOUT, call.api.state.broker.publish(&queue, messages)).await {
        Ok(published) => Ok(published?),
        Err(_) => Err(Problem::broker_unavailable()),
    }
}

/// Longest request with messages, in bytes.
pub(crate) fn request_bytes_max(max_message_bytes: usize) -> usize {
    max_message_bytes.saturating_mul(REQUEST_PER_MESSAGE)
}
