//! `POST /ack` and `POST /nack`: a client settles what it leased.

use std::collections::HashSet;
use std::time::Duration;

use actix_web::HttpResponse;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::body::{self, Body, LIST_BYTES_MAX, Media, media};
use super::error::{Errors, Problem};
use super::fields::Fields;
use super::openapi::{BodyProblems, ClientProblems, UnavailableProblems};
use super::route::{Answer, Call};
use crate::broker::{PullOutcome, Receipt};

/// Longest delay of a nack, in seconds: 30 days, the most that a broker keeps a message back for.
pub(crate) const DELAY_S_MAX: u64 = 30 * 86_400;

/// Receipts of messages that were handled.
#[derive(Debug, Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the body; it is read by hand, to name every mistake")]
pub(crate) struct AckBody {
    /// As `GET /receive?ack=manual` gave them.
    receipts: Vec<String>,
}

/// Receipts of messages that were not handled.
#[derive(Debug, Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the body; it is read by hand, to name every mistake")]
pub(crate) struct NackBody {
    /// As `GET /receive?ack=manual` gave them.
    receipts: Vec<String>,
    /// Seconds after which the messages are there again; at once unless given.
    #[schema(minimum = 0, maximum = 2_592_000, nullable = false)]
    delay_s: Option<u32>,
    /// Into the dead letters instead, as `rejected`.
    #[schema(nullable = false)]
    dead: Option<bool>,
}

/// What was settled.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Settled {
    /// Receipts that were valid.
    settled: usize,
    /// Receipts that were not, or no longer: settled before, expired, or of another inbox.
    #[schema(value_type = Vec<String>)]
    unknown: Vec<Receipt>,
}

/// Acknowledge messages.
///
/// They are done and leave the inbox for good.
#[utoipa::path(
    post, path = "/ack", tag = "messages",
    request_body(content = AckBody, example = json!({"receipts": ["…"]})),
    responses((status = 200, description = "Settled", body = Settled), ClientProblems, BodyProblems, UnavailableProblems),
    security(("basic" = []), ("token" = []), ("query_id" = [], "query_secret" = [])),
)]
pub(crate) async fn ack(call: Call) -> Answer {
    settle(call, |_| PullOutcome::Ack).await
}

/// Give messages back.
///
/// They are there again at once or after `delay_s` seconds, or become dead letters.
#[utoipa::path(
    post, path = "/nack", tag = "messages",
    request_body(content = NackBody, example = json!({"receipts": ["…"], "delay_s": 30})),
    responses((status = 200, description = "Settled", body = Settled), ClientProblems, BodyProblems, UnavailableProblems),
    security(("basic" = []), ("token" = []), ("query_id" = [], "query_secret" = [])),
)]
pub(crate) async fn nack(call: Call) -> Answer {
    settle(call, nack_outcome).await
}

async fn settle(mut call: Call, outcome: impl FnOnce(&mut Fields<'_>) -> PullOutcome) -> Answer {
    let client = call.client()?;
    media(call.request.headers(), &[Media::Json])?;
    let id = &client.record.client_id;
    let mut body = Body::open(&mut call, LIST_BYTES_MAX, Some(id)).await?;
    let (receipts, outcome) = read(&body.all().await?, outcome)?;
    if receipts.is_empty() {
        return Ok(HttpResponse::Ok().json(Settled { settled: 0, unknown: Vec::new() }));
    }
    let count = receipts.len();
    let unknown = call.api.state.broker.settle_pulled(id, receipts, outcome).await?;
    Ok(HttpResponse::Ok().json(Settled { settled: count.saturating_sub(unknown.len()), unknown }))
}

fn read(
    body: &[u8],
    outcome: impl FnOnce(&mut Fields<'_>) -> PullOutcome,
) -> Result<(Vec<Receipt>, PullOutcome), Problem> {
    let object = body::object(body)?;
    let mut errors = Errors::default();
    let mut fields = Fields::new(&object, "", &mut errors);
    let receipts = receipts(fields.required("receipts"), fields.errors());
    let outcome = outcome(&mut fields);
    errors.into_result()?;
    Ok((receipts, outcome))
}

/// The receipts, each once: the same one twice settles once.
fn receipts(value: Option<&Value>, errors: &mut Errors) -> Vec<Receipt> {
    let Some(value) = value else { return Vec::new() };
    let Value::Array(values) = value else {
        errors.add("/receipts", "must be an array of strings");
        return Vec::new();
    };
    let mut seen = HashSet::with_capacity(values.len());
    let mut receipts = Vec::with_capacity(values.len());
    for (index, value) in values.iter().enumerate() {
        match value {
            Value::String(text) if seen.insert(text.as_str()) => receipts.push(Receipt(text.clone())),
            Value::String(_) => {}
            _ => errors.add(format!("/receipts/{index}"), "must be a string"),
        }
    }
    receipts
}

fn nack_outcome(fields: &mut Fields<'_>) -> PullOutcome {
    let delay_s = fields.integer("delay_s", 0..=DELAY_S_MAX).unwrap_or(0);
    if fields.boolean("dead").unwrap_or(false) {
        PullOutcome::Reject
    } else {
        PullOutcome::Nack((delay_s > 0).then(|| Duration::from_secs(delay_s)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receipt_given_twice_settles_once() {
        let (receipts, outcome) = read(br#"{"receipts":["a","b","a"]}"#, |_| PullOutcome::Ack).expect("valid");
        assert_eq!(receipts, [Receipt("a".into()), Receipt("b".into())]);
        assert_eq!(outcome, PullOutcome::Ack);
    }

    #[test]
    fn a_nack_delays_or_rejects() {
        let outcome = |body: &str| read(body.as_bytes(), nack_outcome).map(|(_, outcome)| outcome).expect(body);
        assert_eq!(outcome(r#"{"receipts":[]}"#), PullOutcome::Nack(None));
        assert_eq!(outcome(r#"{"receipts":[],"delay_s":3}"#), PullOutcome::Nack(Some(Duration::from_secs(3))));
        assert_eq!(outcome(r#"{"receipts":[],"dead":true,"delay_s":3}"#), PullOutcome::Reject);
    }

    #[test]
    fn every_wrong_member_is_named() {
        let body = br#"{"receipts":["a",7],"delay_s":-1,"dead":"yes"}"#;
        let problem = read(body, nack_outcome).expect_err("invalid");
        let body: Value = serde_json::from_slice(&problem.to_json("")).expect("a problem is JSON");
        let pointers: Vec<_> = body["errors"].as_array().into_iter().flatten().map(|e| e["pointer"].clone()).collect();
        assert_eq!(pointers, ["/receipts/1", "/delay_s", "/dead"]);
    }
}
