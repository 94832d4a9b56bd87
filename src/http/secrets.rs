//! `POST /clients/{id}/secret` and `POST /clients/{id}/webhook-secret`: rotation with overlap.

use actix_web::HttpResponse;
use serde::Serialize;
use utoipa::ToSchema;

use super::clients::ask;
use super::openapi::{AdminProblems, InvalidProblem, NotFoundProblem, StorageProblem, UnavailableProblems};
use super::query::Query;
use super::route::{Answer, Call};
use crate::actors::registry::{RotateSecret, SecretKind};
use crate::time::Timestamp;

/// Longest and default overlap, in seconds.
const OVERLAP_S_MAX: u32 = 604_800;
const OVERLAP_S_DEFAULT: u32 = 86_400;

/// A new secret, shown once.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct NewSecret {
    /// The new secret (`whsec_…` for a webhook's).
    secret: String,
    /// Until when the one before stays valid, RFC 3339 in UTC.
    #[schema(value_type = String, format = "date-time")]
    previous_valid_until: Timestamp,
}

/// Rotate a client's secret.
///
/// The one before stays valid for `overlap_s` seconds, and earlier ones as long as was promised; 0 ends all but the new
/// one. Tokens outlive a rotation.
#[utoipa::path(
    post, path = "/clients/{id}/secret", operation_id = "rotate_secret", tag = "clients",
    params(
        ("id" = String, Path, description = "Client id"),
        ("overlap_s" = Option<u32>, Query, minimum = 0, maximum = 604_800, description = "Seconds; 86,400 unless given."),
    ),
    responses(
        (status = 200, description = "Rotated", body = NewSecret),
        AdminProblems, NotFoundProblem, InvalidProblem, UnavailableProblems, StorageProblem,
    ),
    security(("admin" = []), ("basic" = []), ("token" = []), ("query_id" = [], "query_secret" = [])),
)]
pub(crate) async fn rotate_client(call: Call) -> Answer {
    rotate(call, SecretKind::Client).await
}

/// Rotate the secret that signs a client's webhooks.
///
/// Deliveries are signed with the one before as well for `overlap_s` seconds, and with earlier ones as long as was
/// promised; 0 ends all but the new one.
#[utoipa::path(
    post, path = "/clients/{id}/webhook-secret", operation_id = "rotate_webhook_secret", tag = "clients",
    params(
        ("id" = String, Path, description = "Client id"),
        ("overlap_s" = Option<u32>, Query, minimum = 0, maximum = 604_800, description = "Seconds; 86,400 unless given."),
    ),
    responses(
        (status = 200, description = "Rotated", body = NewSecret),
        AdminProblems, NotFoundProblem, InvalidProblem, UnavailableProblems, StorageProblem,
    ),
    security(("admin" = []), ("basic" = []), ("token" = []), ("query_id" = [], "query_secret" = [])),
)]
pub(crate) async fn rotate_webhook(call: Call) -> Answer {
    rotate(call, SecretKind::Webhook).await
}

async fn rotate(call: Call, kind: SecretKind) -> Answer {
    let entry = call.admin_or_owner()?;
    let mut query = Query::new(call.request.query_string());
    let overlap_s = query.integer("overlap_s", 0..=OVERLAP_S_MAX, OVERLAP_S_DEFAULT);
    query.finish()?;
    let client_id = entry.record.client_id.clone();
    let rotated = ask(&call, RotateSecret { client_id, kind, overlap_s }).await??;
    let answer = NewSecret { secret: rotated.secret, previous_valid_until: rotated.previous_valid_until };
    Ok(HttpResponse::Ok().insert_header(("cache-control", "no-store")).json(answer))
}
