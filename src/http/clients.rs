//! `/clients` and `/clients/{id}`: onboarding, looking, changing, removing. The registry actor does the work.

use std::time::Duration;

use actix::dev::ToEnvelope;
use actix_web::HttpResponse;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::body::{self, Body, Media, SETTINGS_BYTES_MAX, media};
use super::client_body;
use super::client_view::ClientView;
use super::error::Problem;
use super::openapi::{
    AdminProblems, BodyProblems, ExistsProblem, InvalidProblem, NotFoundProblem, PatternText, StorageProblem,
    UnavailableProblems,
};
use super::query::Query;
use super::route::{Answer, Call};
use crate::actors::registry::{ClientRegistry, DeleteClient, GetActorStates, RegistryError};
use crate::broker::Depths;
use crate::client::{ClientId, ClientRecord};

/// How long the broker may take to say how deep a client's queues are, before the record is shown without.
const DEPTHS_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the long polls of a client whose webhook is set get to end.
const POLLS_END_WITHIN: Duration = Duration::from_secs(1);

/// A client to onboard.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({"client_id": "noc-c2", "name": "NOC, C2 desk", "subscriptions": ["soar.noc.#"]}))]
#[allow(dead_code, reason = "describes the body; it is read by hand, to name every mistake")]
pub(crate) struct NewClient {
    /// A DNS label; `soar` is reserved.
    #[schema(pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", max_length = 63)]
    client_id: String,
    /// A name for people.
    #[schema(max_length = 200)]
    name: Option<String>,
    /// Patterns of the topics that are to land in its inbox: topics in which a word may be `*` or `#`.
    #[schema(value_type = Option<Vec<PatternText>>, max_items = 10_000, nullable = false)]
    subscriptions: Option<Vec<String>>,
    webhook: Option<WebhookSettings>,
    limits: Option<LimitsPatch>,
}

/// What changes of a client (JSON merge patch, RFC 7396): `null` clears, what is absent stays.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(example = json!({"subscriptions": ["soar.noc.#", "soar.weather.*"], "paused": false}))]
#[allow(dead_code, reason = "describes the body; it is read by hand, to name every mistake")]
pub(crate) struct ClientPatch {
    #[schema(max_length = 200)]
    name: Option<String>,
    #[schema(value_type = Option<Vec<PatternText>>, max_items = 10_000)]
    subscriptions: Option<Vec<String>>,
    webhook: Option<WebhookPatch>,
    limits: Option<LimitsPatch>,
    /// While true nothing is forwarded, broadcast or pushed for it; its queues fill.
    paused: Option<bool>,
}

/// What changes of a webhook: `null` is the default again, what is absent stays.
#[derive(Debug, Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the body; it is read by hand, to name every mistake")]
pub(crate) struct WebhookPatch {
    /// Required when there is no webhook yet.
    #[schema(
        example = "https://example.org/hook",
        max_length = 2048,
        pattern = "^[hH][tT][tT][pP][sS]?:",
        nullable = false
    )]
    url: Option<String>,
    /// `null` removes a header.
    headers: Option<std::collections::BTreeMap<String, Option<String>>>,
    #[schema(minimum = 1, maximum = 60)]
    timeout_s: Option<u32>,
    #[schema(max_items = 30)]
    retry_schedule_s: Option<Vec<RetryWait>>,
    #[schema(minimum = 1, maximum = 256)]
    concurrency: Option<u32>,
    #[schema(minimum = 1, maximum = 100_000)]
    rate_limit_per_s: Option<u32>,
    ordered: Option<bool>,
    /// Switches pushing on again after the backbone switched it off, or off.
    enabled: Option<bool>,
}

/// Seconds to wait before a retry.
#[derive(Debug, Deserialize, ToSchema)]
#[schema(value_type = u32, minimum = 0, maximum = 1_209_600)]
#[allow(dead_code, reason = "describes the body; it is read by hand, to name every mistake")]
pub(crate) struct RetryWait(u32);

/// What changes of the limits: `null` lifts one, what is absent stays.
#[derive(Debug, Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the body; it is read by hand, to name every mistake")]
pub(crate) struct LimitsPatch {
    #[schema(minimum = 1, maximum = 1_000_000)]
    send_per_s: Option<u32>,
    #[schema(minimum = 1, maximum = 9_007_199_254_740_992_i64)]
    max_inbox_messages: Option<u64>,
    #[schema(minimum = 1, maximum = 31_536_000)]
    inbox_ttl_s: Option<u64>,
}

/// Where the inbox is pushed to, and how.
#[derive(Debug, Deserialize, ToSchema)]
#[allow(dead_code, reason = "describes the body; it is read by hand, to name every mistake")]
pub(crate) struct WebhookSettings {
    /// `https://…`, or `http://…` where `SOAR_WEBHOOK_ALLOW` admits it.
    #[schema(example = "https://example.org/hook", max_length = 2048, pattern = "^[hH][tT][tT][pP][sS]?:")]
    url: String,
    /// Sent with every call.
    #[schema(nullable = false)]
    headers: Option<std::collections::BTreeMap<String, String>>,
    /// Seconds for one whole attempt; 15 unless given.
    #[schema(minimum = 1, maximum = 60, nullable = false)]
    timeout_s: Option<u32>,
    /// Seconds to wait before each retry; total attempts are 1 and its length.
    #[schema(example = json!([5, 300, 1800, 7200, 18000, 36000, 36000]), max_items = 30, nullable = false)]
    retry_schedule_s: Option<Vec<RetryWait>>,
    /// Attempts in flight at once; 8 unless given.
    #[schema(minimum = 1, maximum = 256, nullable = false)]
    concurrency: Option<u32>,
    /// Attempts a second at most.
    #[schema(minimum = 1, maximum = 100_000)]
    rate_limit_per_s: Option<u32>,
    /// One at a time; the head blocks until it is delivered or dead.
    #[schema(nullable = false)]
    ordered: Option<bool>,
    /// Whether the backbone pushes; true unless given.
    #[schema(nullable = false)]
    enabled: Option<bool>,
}

/// A page of clients, by id.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ClientPage {
    clients: Vec<ClientView>,
    /// For `after`; `null` on the last page.
    next: Option<String>,
}

/// Onboard a client.
///
/// When it answers, the client's queues, bindings and actors are ready. Its secret is shown here and on rotation only.
#[utoipa::path(
    post, path = "/clients", operation_id = "create_client", tag = "clients",
    request_body = NewClient,
    responses(
        (status = 201, description = "Onboarded", body = ClientView,
            headers(("location" = String, description = "Path of the record"))),
        AdminProblems, BodyProblems, ExistsProblem, UnavailableProblems, StorageProblem,
    ),
    security(("admin" = [])),
)]
pub(crate) async fn create(mut call: Call) -> Answer {
    call.admin()?;
    media(call.request.headers(), &[Media::Json])?;
    let body = settings(&mut call).await?;
    let create = client_body::create(&body, &call.api.state.config.webhook_allow)?;
    let made = ask(&call, create).await??;
    let location = format!("/clients/{}", made.record.client_id);
    let view = ClientView::new(&made.record).with_secrets(Some(made.secret.reveal().to_owned()), made.webhook_secret);
    Ok(HttpResponse::Created()
        .insert_header(("location", location))
        .insert_header(("cache-control", "no-store"))
        .json(view))
}

/// List clients.
#[utoipa::path(
    get, path = "/clients", operation_id = "list_clients", tag = "clients",
    params(
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Clients at most; 100 unless given."),
        ("after" = Option<String>, Query, pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", description = "The `next` of the page before."),
    ),
    responses((status = 200, description = "A page", body = ClientPage), AdminProblems, InvalidProblem),
    security(("admin" = [])),
)]
pub(crate) async fn list(call: Call) -> Answer {
    call.admin()?;
    let mut query = Query::new(call.request.query_string());
    let limit = query.integer("limit", 1..=1000, 100) as usize;
    let after = query.cursor("after", |text| ClientId::parse(text).is_ok());
    query.finish()?;
    // One more than asked for says whether there is a next page.
    let mut entries = call.api.state.directory.page(after.as_deref(), limit + 1);
    let more = entries.len() > limit;
    entries.truncate(limit);
    let next = entries.last().filter(|_| more).map(|last| last.record.client_id.to_string());
    let clients = entries.iter().map(|entry| view(&call, &entry.record)).collect();
    Ok(HttpResponse::Ok().json(ClientPage { clients, next }))
}

/// Look at a client: its record, the depths of its queues, the states of its actors.
#[utoipa::path(
    get, path = "/clients/{id}", operation_id = "show_client", tag = "clients",
    params(("id" = String, Path, description = "Client id")),
    responses((status = 200, description = "The record", body = ClientView), AdminProblems, NotFoundProblem, UnavailableProblems),
    security(("admin" = []), ("basic" = []), ("token" = []), ("query_id" = [], "query_secret" = [])),
)]
pub(crate) async fn show(call: Call) -> Answer {
    let entry = call.admin_or_owner()?;
    let id = &entry.record.client_id;
    let Some(actors) = ask(&call, GetActorStates(id.clone())).await? else {
        return Err(Problem::not_found("there is no such client"));
    };
    let view = view(&call, &entry.record).with_live(depths(&call, id).await, actors);
    Ok(HttpResponse::Ok().insert_header(("cache-control", "no-store")).json(view))
}

/// The depths of its queues; `None` while the broker is away: the rest of the record is then what people look for.
async fn depths(call: &Call, id: &ClientId) -> Option<Depths> {
    match tokio::time::timeout(DEPTHS_TIMEOUT, call.api.state.broker.depths(id)).await {
        Ok(Ok(depths)) => Some(depths),
        Ok(Err(error)) => {
            log::debug!("depths of the queues of {id}: {error}");
            None
        }
        Err(_) => None,
    }
}

/// Change a client (JSON merge patch).
///
/// `null` clears a member, what is absent stays. A first webhook answers with its `webhook_secret`.
#[utoipa::path(
    patch, path = "/clients/{id}", operation_id = "change_client", tag = "clients",
    params(("id" = String, Path, description = "Client id")),
    request_body(content((ClientPatch = "application/merge-patch+json"), (ClientPatch = "application/json"))),
    responses(
        (status = 200, description = "The record as it is now", body = ClientView),
        AdminProblems, BodyProblems, NotFoundProblem, UnavailableProblems, StorageProblem,
    ),
    security(("admin" = [])),
)]
pub(crate) async fn patch(mut call: Call) -> Answer {
    call.admin()?;
    call.existing(call.path("id"))?;
    media(call.request.headers(), &[Media::MergePatch, Media::Json])?;
    let body = settings(&mut call).await?;
    let patched = loop {
        let entry = call.existing(call.path("id"))?;
        let patch = client_body::patch(&entry.record, &body, &call.api.state.config.webhook_allow)?;
        match ask(&call, patch).await? {
            // Each time another change was carried out, so this ends.
            Err(RegistryError::Changed(_)) => {}
            answer => break answer?,
        }
    };
    if patched.record.is_pushed() {
        // Long polls end over it; from the answer on the inbox is the webhook's alone.
        let ended = call.api.budget.polls_ended(&patched.record.client_id);
        if tokio::time::timeout(POLLS_END_WITHIN, ended).await.is_err() {
            log::warn!("a long poll of {} goes on although a webhook is set", patched.record.client_id);
        }
    }
    let view = view(&call, &patched.record).with_secrets(None, patched.webhook_secret);
    Ok(HttpResponse::Ok().insert_header(("cache-control", "no-store")).json(view))
}

/// Remove a client.
///
/// What its outbox and notify queue still hold is forwarded first; its inbox and dead letters are deleted.
#[utoipa::path(
    delete, path = "/clients/{id}", operation_id = "remove_client", tag = "clients",
    params(("id" = String, Path, description = "Client id")),
    responses((status = 204, description = "Removed"), AdminProblems, NotFoundProblem, UnavailableProblems, StorageProblem),
    security(("admin" = [])),
)]
pub(crate) async fn delete(call: Call) -> Answer {
    call.admin()?;
    // Not looked up here: of a client that is no more the registry may have something left to delete.
    let id = ClientId::parse(call.path("id")).map_err(|_| Problem::not_found("there is no such client"))?;
    ask(&call, DeleteClient(id)).await??;
    Ok(HttpResponse::NoContent().finish())
}

/// The record, and how the webhook fares.
fn view(call: &Call, record: &ClientRecord) -> ClientView {
    ClientView::new(record).with_breaker(call.api.state.webhooks.breakers.get(&record.client_id))
}

async fn settings(call: &mut Call) -> Result<serde_json::Map<String, serde_json::Value>, Problem> {
    let bytes = Body::open(call, SETTINGS_BYTES_MAX, None).await?.all().await?;
    body::object(&bytes)
}

/// Asks the registry. What was asked is carried out also when the caller hangs up meanwhile.
pub(crate) async fn ask<M>(call: &Call, message: M) -> Result<M::Result, Problem>
where
    M: actix::Message + Send + 'static,
    M::Result: Send,
    ClientRegistry: actix::Handler<M>,
    <ClientRegistry as actix::Actor>::Context: ToEnvelope<ClientRegistry, M>,
{
    let registry = call.api.state.registry.clone();
    match actix_web::rt::spawn(async move { registry.send(message).await }).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(actix::MailboxError::Closed)) if *call.api.state.shutdown.borrow() => Err(Problem::shutting_down()),
        Ok(Err(error)) => Err(Problem::internal(format!("ask the registry: {error}"))),
        Err(error) => Err(Problem::internal(format!("ask the registry: {error}"))),
    }
}
