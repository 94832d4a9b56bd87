//! `GET /receive`: a client pulls its inbox.
//!
//! A long poll waits inside [`crate::broker::Broker::pull`], and ends with 409 when a webhook is set meanwhile. When its peer hangs up, the connection drops this
//! handler's future, and with it the pull, before anything was taken; see [`super::server`].

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use actix_web::HttpResponse;
use futures_util::future::{Either, select};
use serde::Serialize;
use utoipa::ToSchema;

use super::envelopes;
use super::error::{Code, Problem};
use super::openapi::{ClientProblems, InvalidProblem, PulledProblem, UnavailableProblems};
use super::query::Query;
use super::route::{Answer, Call};
use crate::broker::{BrokerError, Health, PullMode, Pulled};
use crate::client::ClientRecord;
use crate::directory::{ClientEntry, Directory};

/// What a pull that has already taken something gets to finish in when it is to end, so that its batch is answered and
/// not lost.
const CLOSING_GRACE: Duration = Duration::from_millis(100);

/// What a client receives.
#[derive(ToSchema, Serialize)]
#[allow(dead_code, reason = "describes the answer; it is written from ready envelopes")]
pub(crate) struct Messages {
    /// Oldest first; empty when there is none.
    messages: Vec<ReceivedMessage>,
}

/// An envelope, and what settles it.
#[derive(ToSchema, Serialize)]
#[allow(dead_code, reason = "describes the answer; it is written from ready envelopes")]
pub(crate) struct ReceivedMessage {
    #[serde(flatten)]
    envelope: EnvelopeView,
    /// Settles this delivery by `POST /ack` or `POST /nack`. With `ack=manual` only.
    #[serde(skip_serializing_if = "Option::is_none")]
    receipt: Option<String>,
    /// How often it was handed out, this time included.
    #[schema(minimum = 1, example = 1)]
    deliveries: u32,
}

/// What a client receives of a message.
#[derive(ToSchema, Serialize)]
#[schema(as = Envelope)]
#[allow(dead_code, reason = "describes the answer; it is written from ready envelopes")]
pub(crate) struct EnvelopeView {
    /// The same on every copy and every retry: deduplicate on `sender` and `id`.
    #[schema(example = "01937b5e-7c1c-7a53-8a3e-0d6f3a4b5c6d")]
    id: String,
    /// Absent on a broadcast.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(example = "soar.noc.slocum")]
    topic: Option<String>,
    /// `true` on a broadcast, absent otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    broadcast: Option<bool>,
    /// The client that sent it.
    #[schema(example = "noc-c2")]
    sender: String,
    /// When the backbone accepted it, RFC 3339 in UTC.
    #[schema(format = "date-time", example = "2026-11-23T18:09:00.123Z")]
    sent_at: String,
    /// Byte for byte what was sent.
    #[schema(value_type = Value)]
    message: serde_json::Value,
}

/// Receive messages.
///
/// Oldest first, `[]` when there is none within `wait` seconds. `ack=auto` removes them as they are handed over: a lost
/// answer is a lost batch. `ack=manual` leases them: settle them with `POST /ack` or `POST /nack` within `lease` seconds,
/// or they come back. A large batch may have fewer than `max` messages although more are there.
#[utoipa::path(
    get, path = "/receive", tag = "messages",
    params(
        ("max" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Messages at most; 100 unless given."),
        ("wait" = Option<u32>, Query, minimum = 0, maximum = 30, description = "Seconds to wait for the first; 0 unless given."),
        ("ack" = Option<super::openapi::AckMode>, Query, description = "`auto` unless given."),
        ("lease" = Option<u32>, Query, minimum = 1, maximum = 3600, description = "Seconds of a manual lease; 60 unless given."),
    ),
    responses(
        (status = 200, description = "Messages, or none", body = Messages),
        ClientProblems, InvalidProblem, PulledProblem, UnavailableProblems,
    ),
    security(("basic" = []), ("token" = []), ("query_id" = [], "query_secret" = [])),
)]
pub(crate) async fn receive(call: Call) -> Answer {
    let client = call.client()?;
    let mut query = Query::new(call.request.query_string());
    let max = query.integer("max", 1..=1000, 100) as usize;
    let wait = Duration::from_secs(query.integer("wait", 0..=30, 0).into());
    let manual = query.choice("ack", &[("auto", false), ("manual", true)], false);
    let lease = Duration::from_secs(query.integer("lease", 1..=3600, 60).into());
    query.finish()?;
    refuse_when_pushed(&client.record)?;
    call.api.refuse_when_closing()?;
    if let Health::Unreachable(_) = call.api.state.broker.health() {
        return Err(Problem::broker_unavailable());
    }

    let mode = if manual { PullMode::Lease(lease) } else { PullMode::Auto };
    let (api, id) = (&call.api, &client.record.client_id);
    // First what is there, in turn, because it may be large; then, without a turn, a wait for what comes.
    let turn = api.budget.pull(id).await?;
    let mut pulled = api.state.broker.pull(id, max, Duration::ZERO, mode).await?;
    if pulled.is_empty() && !wait.is_zero() {
        drop(turn);
        let _place = api.budget.poll(id)?;
        pulled = while_it_may(&call, &client, api.state.broker.pull(id, max, wait, mode)).await?;
        // What it took just before is handed over all the same: it may have been removed.
        if pulled.is_empty()
            && let Some(now) = api.state.directory.get(id.as_str())
        {
            refuse_when_pushed(&now.record)?;
        }
    }
    let body = envelopes::body(pulled, |bytes| api.budget.answer(id, bytes));
    Ok(HttpResponse::Ok().content_type("application/json").insert_header(("cache-control", "no-store")).body(body))
}

/// Waits for a pull, or until there is nothing more to wait for: the backbone shuts down, or the inbox is a webhook's.
async fn while_it_may(
    call: &Call,
    client: &Arc<ClientEntry>,
    pull: impl Future<Output = Result<Vec<Pulled>, BrokerError>>,
) -> Result<Vec<Pulled>, BrokerError> {
    let mut shutdown = call.api.state.shutdown.clone();
    let closing = pin!(shutdown.wait_for(|closing| *closing));
    let pushed = pin!(until_pushed(&call.api.state.directory, Arc::clone(client)));
    match select(pin!(pull), select(closing, pushed)).await {
        Either::Left((pulled, _)) => pulled,
        Either::Right((_, pull)) => tokio::time::timeout(CLOSING_GRACE, pull).await.unwrap_or(Ok(Vec::new())),
    }
}

/// Waits until the client has a webhook.
async fn until_pushed(directory: &Directory, mut client: Arc<ClientEntry>) {
    while !client.record.is_pushed() {
        client.replaced().await;
        match directory.get(client.record.client_id.as_str()) {
            Some(entry) => client = entry,
            // The broker tells whoever pulls from an inbox that was deleted.
            None => std::future::pending().await,
        }
    }
}

fn refuse_when_pushed(record: &ClientRecord) -> Result<(), Problem> {
    if record.is_pushed() {
        return Err(Problem::new(
            Code::WebhookConfigured,
            "the inbox is pushed to the client's webhook; have the admin remove it, or switch it off, to pull",
        ));
    }
    Ok(())
}
