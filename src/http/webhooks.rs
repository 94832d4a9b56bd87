//! `/clients/{id}/attempts` and `/clients/{id}/webhook/test`: what a receiver's developer needs.

use std::collections::HashSet;
use std::time::Duration;

use actix_web::HttpResponse;
use parking_lot::Mutex;
use serde::Serialize;
use utoipa::ToSchema;

use super::clients::ask;
use super::error::Problem;
use super::openapi::{AdminProblems, InvalidProblem, NotFoundProblem, UnavailableProblems};
use super::query::Query;
use super::route::{Answer, Call};
use crate::actors::registry::GetWebhookSecrets;
use crate::client::ClientId;
use crate::time::Timestamp;
use crate::webhook::attempts::{Attempt, AttemptId};
use crate::webhook::trial;

/// A page of attempts, newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AttemptPageView {
    attempts: Vec<AttemptView>,
    /// For `after`; `null` on the last page.
    next: Option<String>,
}

/// One webhook attempt.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Attempt)]
pub(crate) struct AttemptView {
    /// Its own id.
    id: String,
    /// The message's.
    message_id: String,
    /// When it began, RFC 3339 in UTC.
    #[schema(value_type = String, format = "date-time")]
    at: Timestamp,
    /// The answer's status; `null` when there was no complete answer.
    status: Option<u16>,
    /// What was wrong, in words; `null` when the message was delivered.
    error: Option<String>,
    /// How long it took.
    latency_ms: u32,
    /// The first KiB of the answer.
    response: String,
}

impl From<Attempt> for AttemptView {
    fn from(attempt: Attempt) -> Self {
        Self {
            id: attempt.id.to_string(),
            message_id: attempt.message_id.into(),
            at: attempt.at,
            status: attempt.status,
            error: attempt.error,
            latency_ms: attempt.latency_ms,
            response: attempt.response.into(),
        }
    }
}

/// Clients whose webhook is being tested. One test a client at a time, so that nobody turns the backbone against an
/// endpoint with it. Bounded by the number of clients.
#[derive(Debug, Default)]
pub(crate) struct Tests(Mutex<HashSet<ClientId>>);

/// One client's place among them.
struct TestPlace<'a>(&'a Tests, ClientId);

impl Tests {
    fn begin(&self, client: &ClientId) -> Result<TestPlace<'_>, Problem> {
        if self.0.lock().insert(client.clone()) {
            Ok(TestPlace(self, client.clone()))
        } else {
            let detail = "a test of this webhook is under way; wait for its answer";
            Err(Problem::rate_limited(detail, Duration::from_secs(1)))
        }
    }
}

impl Drop for TestPlace<'_> {
    fn drop(&mut self) {
        self.0.0.lock().remove(&self.1);
    }
}

/// Look at webhook attempts.
///
/// Newest first. Of each client the newest 1,000 deliveries and the newest 1,000 failures are kept.
#[utoipa::path(
    get, path = "/clients/{id}/attempts", operation_id = "list_attempts", tag = "webhooks",
    params(
        ("id" = String, Path, description = "Client id"),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Attempts at most; 100 unless given."),
        ("after" = Option<String>, Query, pattern = "^[0-7][0-9a-f]{15}$", description = "The `next` of the page before."),
    ),
    responses(
        (status = 200, description = "A page", body = AttemptPageView),
        AdminProblems, NotFoundProblem, InvalidProblem,
    ),
    security(("admin" = []), ("basic" = []), ("token" = []), ("query_id" = [], "query_secret" = [])),
)]
pub(crate) async fn attempts(call: Call) -> Answer {
    let entry = call.admin_or_owner()?;
    let mut query = Query::new(call.request.query_string());
    let limit = query.integer("limit", 1..=1000, 100) as usize;
    let after = query.cursor("after", |text| AttemptId::parse(text).is_some());
    query.finish()?;
    let after = after.as_deref().and_then(AttemptId::parse);
    let id = &entry.record.client_id;
    let page = call.api.state.webhooks.log.page(id, after, limit).await;
    let page = page.map_err(|error| Problem::internal(format!("read the webhook attempts of {id}: {error}")))?;
    let attempts = page.attempts.into_iter().map(AttemptView::from).collect();
    let answer = AttemptPageView { attempts, next: page.next };
    Ok(HttpResponse::Ok().insert_header(("cache-control", "no-store")).json(answer))
}

/// Test a webhook: send a signed example to it now, and see what comes back.
///
/// Answers 200 whatever the endpoint does; `status` and `error` say what that was. Works while the webhook is switched
/// off.
#[utoipa::path(
    post, path = "/clients/{id}/webhook/test", operation_id = "test_webhook", tag = "webhooks",
    params(("id" = String, Path, description = "Client id")),
    responses((status = 200, description = "The attempt", body = AttemptView), AdminProblems, NotFoundProblem, UnavailableProblems),
    security(("admin" = []), ("basic" = []), ("token" = []), ("query_id" = [], "query_secret" = [])),
)]
pub(crate) async fn test(call: Call) -> Answer {
    let entry = call.admin_or_owner()?;
    let id = &entry.record.client_id;
    let no_webhook = || Problem::not_found(format!("client {id} has no webhook to test; PATCH /clients/{id} sets one"));
    let webhook = entry.record.webhook.as_ref().ok_or_else(no_webhook)?;
    call.api.refuse_when_closing()?;
    let secrets = ask(&call, GetWebhookSecrets(id.clone())).await?.ok_or_else(no_webhook)?;
    let _place = call.api.tests.begin(id)?;
    let attempt = trial::run(&call.api.state.webhooks, id, webhook, &secrets).await;
    Ok(HttpResponse::Ok().insert_header(("cache-control", "no-store")).json(AttemptView::from(attempt)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_test_of_a_webhook_at_a_time() {
        let tests = Tests::default();
        let (a, b) = (ClientId::parse("a").expect("test id"), ClientId::parse("b").expect("test id"));
        let place = tests.begin(&a);
        assert!(place.is_ok() && tests.begin(&a).is_err() && tests.begin(&b).is_ok());
        drop(place);
        assert!(tests.begin(&a).is_ok());
    }
}
