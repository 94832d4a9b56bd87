//! `GET /livez`, `GET /readyz` and `GET /metrics`: for probes and for Prometheus.

use std::time::Duration;

use actix_web::HttpResponse;
use serde::Serialize;
use utoipa::ToSchema;

use super::clients::ask;
use super::error::Problem;
use super::openapi::{AdminProblems, UnavailableProblems};
use super::route::{Answer, Call};
use crate::actors::registry::GetReadiness;
use crate::broker::Health;

/// How long the registry may take to say whether its actors run.
const REGISTRY_TIMEOUT: Duration = Duration::from_secs(2);

/// Prometheus text format, version 0.0.4.
const PROMETHEUS_TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// That it is so.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = HealthStatus)]
pub(crate) struct Status {
    #[schema(example = "ok")]
    status: &'static str,
}

/// Whether the process is up.
#[utoipa::path(
    get, path = "/livez", tag = "operation",
    responses((status = 200, description = "It is", body = Status)),
    security(()),
)]
pub(crate) async fn livez(_: Call) -> Answer {
    Ok(HttpResponse::Ok().insert_header(("cache-control", "no-store")).json(Status { status: "ok" }))
}

/// Whether the backbone can do its work: the broker is reachable and all actors run.
///
/// 503 says why not, in `reasons`.
#[utoipa::path(
    get, path = "/readyz", tag = "operation",
    responses((status = 200, description = "It can", body = Status), UnavailableProblems),
    security(()),
)]
pub(crate) async fn readyz(call: Call) -> Answer {
    if *call.api.state.shutdown.borrow() {
        return Err(Problem::shutting_down().reasons(vec!["shutting down".into()]));
    }
    let mut reasons = Vec::new();
    match call.api.state.broker.health() {
        Health::Ready => {}
        Health::Blocked(why) => reasons.push(format!("the broker takes no messages: {why}")),
        Health::Unreachable(why) => reasons.push(format!("the broker cannot be reached: {why}")),
    }
    match tokio::time::timeout(REGISTRY_TIMEOUT, ask(&call, GetReadiness)).await {
        Ok(Ok(readiness)) if readiness.ready => {}
        Ok(Ok(readiness)) => reasons.extend(readiness.reasons),
        Ok(Err(_)) | Err(_) => reasons.push("the client registry does not answer".into()),
    }
    if reasons.is_empty() {
        return Ok(HttpResponse::Ok().insert_header(("cache-control", "no-store")).json(Status { status: "ready" }));
    }
    Err(Problem::not_ready(reasons))
}

/// Metrics for Prometheus.
///
/// For the admin; for anyone on `SOAR_METRICS_BIND`.
#[utoipa::path(
    get, path = "/metrics", tag = "operation",
    responses((status = 200, description = "Metrics", body = String, content_type = "text/plain; version=0.0.4; charset=utf-8"), AdminProblems),
    security(("admin" = [])),
)]
pub(crate) async fn metrics(call: Call) -> Answer {
    call.admin()?;
    open_metrics(call).await
}

/// The same on the listener that is for Prometheus only.
pub(crate) async fn open_metrics(call: Call) -> Answer {
    Ok(HttpResponse::Ok().content_type(PROMETHEUS_TEXT).body(call.api.state.telemetry.metrics.render()))
}
