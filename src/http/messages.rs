//! `GET /messages/{id}`: the way of a recent message.

use actix_web::HttpResponse;
use serde::Serialize;
use utoipa::ToSchema;

use super::auth::Who;
use super::error::{Challenge, Problem};
use super::openapi::{ClientProblems, InvalidProblem, NotFoundProblem};
use super::query::Query;
use super::route::{Answer, Call};
use crate::client::ClientId;
use crate::envelope::MessageId;
use crate::telemetry::Step;
use crate::telemetry::traces::{Hop, Trace};
use crate::time::Timestamp;

/// The way of a message.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MessageTrace)]
pub(crate) struct TraceView {
    /// The message's id.
    #[schema(example = "01937b5e-7c1c-7a53-8a3e-0d6f3a4b5c6d")]
    id: String,
    /// Who sent it.
    #[schema(example = "noc-c2")]
    sender: String,
    /// Its topic; `null` for a broadcast.
    #[schema(example = "soar.noc.slocum")]
    topic: Option<String>,
    state: TraceStateView,
    /// Its steps, in order of time. Of a message to very many inboxes only the first are kept.
    hops: Vec<HopView>,
    /// Steps that were counted, not kept.
    hops_left_out: u64,
    /// Copies put into inboxes.
    routed: u64,
    /// Copies that their receivers settled.
    delivered: u64,
    /// Times that a copy became a dead letter.
    dead: u64,
    /// For the admin: others who sent a message with this id of their own; `?sender=` shows theirs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    others: Vec<String>,
}

/// Where a message is, as far as is known.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MessageState)]
#[serde(rename_all = "snake_case")]
pub(crate) enum TraceStateView {
    /// In the sender's outbox or notify queue.
    Accepted,
    /// On the way to its exchange.
    Forwarded,
    /// Given to its exchange; some inbox still holds it.
    Published,
    /// Settled by every receiver.
    Delivered,
    /// No subscription matched.
    Unrouted,
    /// A dead letter of at least one client.
    Dead,
}

/// A step and its time.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MessageHop)]
pub(crate) struct HopView {
    /// When, RFC 3339 in UTC.
    #[schema(value_type = String, format = "date-time", example = "2026-11-23T18:09:00.123Z")]
    at: Timestamp,
    /// `accepted`, `forwarded`, `published`, `routed`, `unrouted`, `attempt_failed`, `delivered` or `dead`.
    #[schema(example = "routed")]
    step: &'static str,
    /// Whose inbox, where the step is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "glider-ops")]
    inbox: Option<String>,
    /// The subscription that matched; absent for a broadcast.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "soar.noc.#")]
    pattern: Option<String>,
    /// Why it became a dead letter.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "delivery_failed")]
    reason: Option<&'static str>,
}

/// The way of a recent message: every step with its time, the inboxes it landed in and why, and its end.
///
/// For the admin, and for whoever sent it. The most recent messages are remembered (`SOAR_TRACE_MESSAGES`), in memory.
#[utoipa::path(
    get, path = "/messages/{id}", operation_id = "trace_message", tag = "messages",
    params(
        ("id" = String, Path, description = "Message id", example = "01937b5e-7c1c-7a53-8a3e-0d6f3a4b5c6d"),
        ("sender" = Option<String>, Query, pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", description = "For the admin: whose message, where several chose the same id."),
    ),
    responses((status = 200, description = "Its way", body = TraceView), ClientProblems, NotFoundProblem, InvalidProblem),
    security(("admin" = []), ("basic" = []), ("token" = []), ("query_id" = [], "query_secret" = [])),
)]
pub(crate) async fn show(call: Call) -> Answer {
    let who = call.identify(Challenge::BasicOrBearer)?;
    let mut query = Query::new(call.request.query_string());
    let sender = query.parsed("sender", |text| ClientId::parse(text).map_err(|error| error.to_string()));
    query.finish()?;
    let view = match who {
        Who::Admin => for_admin(&call, sender.as_ref())?,
        Who::Client(entry) => for_sender(&call, &entry.record.client_id)?,
    };
    Ok(HttpResponse::Ok().insert_header(("cache-control", "no-store")).json(view))
}

fn not_found() -> Problem {
    Problem::not_found("no message with this id is remembered; only the most recent are (SOAR_TRACE_MESSAGES)")
}

fn for_admin(call: &Call, sender: Option<&ClientId>) -> Result<TraceView, Problem> {
    let id = MessageId::parse(&call.path_decoded("id")).map_err(|_| not_found())?;
    let mut found = call.api.state.telemetry.traces.find(&id);
    let at = match sender {
        Some(sender) => found.iter().position(|trace| trace.sender == *sender),
        None => (!found.is_empty()).then_some(0),
    };
    let trace = found.swap_remove(at.ok_or_else(not_found)?);
    let others = found.into_iter().map(|other| other.sender.to_string()).collect();
    Ok(TraceView { others, ..TraceView::from(trace) })
}

fn for_sender(call: &Call, sender: &ClientId) -> Result<TraceView, Problem> {
    let id = MessageId::parse(&call.path_decoded("id")).map_err(|_| not_found())?;
    let traces = &call.api.state.telemetry.traces;
    match traces.find_of(sender, &id) {
        Some(trace) => Ok(trace.into()),
        None if traces.find(&id).is_empty() => Err(not_found()),
        None => Err(Problem::forbidden("another client sent the message with this id")),
    }
}

impl From<Trace> for TraceView {
    fn from(trace: Trace) -> Self {
        use crate::telemetry::traces::TraceState;
        Self {
            id: trace.id.to_string(),
            sender: trace.sender.to_string(),
            topic: trace.topic.map(|topic| topic.as_str().to_owned()),
            state: match trace.state {
                TraceState::Accepted => TraceStateView::Accepted,
                TraceState::Forwarded => TraceStateView::Forwarded,
                TraceState::Published => TraceStateView::Published,
                TraceState::Delivered => TraceStateView::Delivered,
                TraceState::Unrouted => TraceStateView::Unrouted,
                TraceState::Dead => TraceStateView::Dead,
            },
            hops: trace.hops.into_iter().map(HopView::from).collect(),
            hops_left_out: trace.hops_left_out,
            routed: trace.routed,
            delivered: trace.delivered,
            dead: trace.dead,
            others: Vec::new(),
        }
    }
}

impl From<Hop> for HopView {
    fn from(hop: Hop) -> Self {
        let step = hop.step.name();
        let (inbox, pattern, reason) = match hop.step {
            Step::Accepted | Step::Forwarded | Step::Published | Step::Unrouted => (None, None, None),
            Step::Routed(inbox, pattern) => (Some(inbox), pattern, None),
            Step::AttemptFailed(inbox) | Step::Delivered(inbox) => (Some(inbox), None, None),
            Step::Dead(inbox, reason) => (Some(inbox), None, Some(reason.as_str())),
        };
        let pattern = pattern.map(|pattern| pattern.as_str().to_owned());
        Self { at: hop.at, step, inbox: inbox.map(|inbox| inbox.to_string()), pattern, reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::DeadReason;

    #[test]
    fn a_hop_names_inbox_pattern_and_reason_where_it_has_them() {
        let hop = |step| {
            let view = HopView::from(Hop { at: Timestamp::from_millis(0), step });
            serde_json::to_value(view).expect("JSON")
        };
        let b = ClientId::parse("b").expect("test client");
        let pattern = crate::topic::Pattern::parse("a.#").expect("test pattern");
        let at = "1970-01-01T00:00:00.000Z";
        assert_eq!(hop(Step::Published), serde_json::json!({"at": at, "step": "published"}));
        assert_eq!(
            hop(Step::Routed(b.clone(), Some(pattern))),
            serde_json::json!({"at": at, "step": "routed", "inbox": "b", "pattern": "a.#"})
        );
        assert_eq!(
            hop(Step::Dead(b, DeadReason::Expired)),
            serde_json::json!({"at": at, "step": "dead", "inbox": "b", "reason": "expired"})
        );
    }
}
