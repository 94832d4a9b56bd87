//! `POST /token`: a client gets a token, to be sent instead of its secret.

use actix_web::HttpResponse;
use serde::Serialize;
use utoipa::ToSchema;

use super::openapi::ClientProblems;
use super::route::{Answer, Call};
use crate::time::Timestamp;

/// A token.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Token {
    /// PASETO v4.local, for `Authorization: Bearer …`.
    #[schema(example = "v4.local.…")]
    token: String,
    /// RFC 3339 in UTC.
    #[schema(value_type = String, format = "date-time")]
    expires_at: Timestamp,
}

/// Get a token.
///
/// Valid for `SOAR_TOKEN_LIFETIME` hours. It outlives a rotation of the secret, not the client.
#[utoipa::path(
    post, path = "/token", tag = "messages",
    responses((status = 200, description = "A token", body = Token), ClientProblems),
    security(("basic" = []), ("token" = []), ("query_id" = [], "query_secret" = [])),
)]
pub(crate) async fn token(call: Call) -> Answer {
    let client = call.client()?;
    let tokens = &call.api.state.tokens;
    let (token, expires_at) = tokens.mint(&client.record.client_id, client.incarnation, Timestamp::now());
    Ok(HttpResponse::Ok().insert_header(("cache-control", "no-store")).json(Token { token, expires_at }))
}
