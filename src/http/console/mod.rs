//! What keeps the operators' console live: `GET /console/feed`, server-sent events with the state of the backbone, the
//! clients that the page shows, and the messages that it watches. The page itself is in [`super::pages`].
//!
//! The feed reads what the [`Observer`](crate::telemetry::Observer) found; only what one page shows is asked for anew.
//! It is made as it is read: a browser that does not read costs nothing but its place.

mod rows;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::body::BodyStream;
use bytes::Bytes;
use futures_util::future::{Either, select};
use futures_util::stream;
use serde::Serialize;
use serde_json::json;
use tokio::sync::watch;

use super::client_view::ClientView;
use super::clients::ask;
use super::error::Problem;
use super::openapi::{AdminProblems, InvalidProblem, PatternText, UnavailableProblems};
use super::query::Query;
use super::route::{Answer, Call};
use crate::actors::registry::{ActorStates, GetActorStates};
use crate::broker::Health;
use crate::client::ClientId;
use crate::telemetry::observer::Overview;
use crate::telemetry::tail::{TailEvent, Watch};
use crate::topic::Pattern;
use rows::Page;
pub(crate) use rows::Sort;

/// Feeds at once; more are refused.
const FEEDS_MAX: usize = 32;

/// Clients and the one client are sent every so many seconds.
const CLIENTS_EVERY_S: u64 = 2;

/// The tail's events are sent together, as often as this.
const TAIL_EVERY: Duration = Duration::from_millis(200);

/// Messages of the tail in one event.
const TAIL_BATCH_MAX: usize = 100;

/// The last millisecond that RFC 3339 can write.
const SINCE_MS_MAX: u64 = 253_402_300_799_999;

/// How long the broker and the registry may take to tell of one client.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);

/// Feeds that are open.
static FEEDS: AtomicUsize = AtomicUsize::new(0);

/// A place for a feed; given back when it is dropped.
struct Place;

impl Place {
    fn take() -> Result<Self, Problem> {
        let open = FEEDS.fetch_add(1, Ordering::Relaxed);
        // Counted first, so that dropping the place takes back what was counted, also when it is refused.
        let place = Self;
        if open >= FEEDS_MAX {
            let wait = Duration::from_secs(5);
            return Err(Problem::rate_limited(format!("more than {FEEDS_MAX} feeds at once"), wait));
        }
        Ok(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        FEEDS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a page wants to see, and what has been sent.
struct Feed {
    call: Call,
    page: Option<Page>,
    client: Option<ClientId>,
    tail: Option<Watch>,
    overview: watch::Receiver<Arc<Overview>>,
    shutdown: watch::Receiver<bool>,
    seconds: u64,
    /// Until when the page has the samples, in milliseconds; taken by the greeting.
    since_ms: Option<u64>,
    _place: Place,
}

/// The console's feed (server-sent events).
///
/// Sends `hello` once (version, broker, the samples of the last hour, or those since `since`), `overview` every second, `sample` every five,
/// and what is asked for: `clients` (a page of clients with depths and rates), `client` (one, with its actors; or
/// `gone`; `last_attempt` is the id of its newest webhook attempt), `tail` (messages as they are published, at most 200 a second). Each event's data is one JSON object.
#[utoipa::path(
    get, path = "/console/feed", operation_id = "console_feed", tag = "operation",
    params(
        ("clients" = Option<u32>, Query, minimum = 0, maximum = 1, description = "1 for a page of clients."),
        ("q" = Option<String>, Query, description = "Only clients with this in their id or name."),
        ("sort" = Option<Sort>, Query, description = "What the clients are sorted by."),
        ("order" = Option<super::openapi::SortOrder>, Query, description = "`asc` unless given."),
        ("offset" = Option<u32>, Query, minimum = 0, maximum = 10_000_000, description = "Clients to skip."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 200, description = "Clients at most; 50 unless given."),
        ("client" = Option<String>, Query, pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", description = "One client by its id."),
        ("since" = Option<i64>, Query, minimum = 0, maximum = 253_402_300_799_999_i64,
            description = "The page has the samples until then (Unix time in milliseconds): only newer ones are sent."),
        ("tail" = Option<PatternText>, Query, description = "A pattern of topics to watch; `#` shows broadcasts too."),
    ),
    responses(
        (status = 200, description = "Events, until the caller hangs up", body = String, content_type = "text/event-stream"),
        AdminProblems, InvalidProblem, UnavailableProblems,
    ),
    security(("admin" = [])),
)]
pub(crate) async fn feed(call: Call) -> Answer {
    call.admin()?;
    call.api.refuse_when_closing()?;
    let place = Place::take()?;
    let mut query = Query::new(call.request.query_string());
    let wanted = query.integer("clients", 0..=1, 0) == 1;
    let page = Page {
        search: query.text("q").unwrap_or_default().to_lowercase(),
        sort: query.choice("sort", &Sort::ALL, Sort::ClientId),
        descending: query.choice("order", &[("asc", false), ("desc", true)], false),
        offset: query.integer("offset", 0..=10_000_000, 0) as usize,
        limit: query.integer("limit", 1..=200, 50) as usize,
    };
    let since_ms = query.parsed("since", |text| {
        let ms = text.parse().ok().filter(|ms| *ms <= SINCE_MS_MAX);
        ms.ok_or_else(|| format!("must be a time in milliseconds, 0 to {SINCE_MS_MAX}"))
    });
    let client = query.parsed("client", |text| ClientId::parse(text).map_err(|error| error.to_string()));
    let pattern = query.parsed("tail", |text| Pattern::parse(text).map_err(|error| error.to_string()));
    query.finish()?;
    let tail =
        match pattern {
            Some(pattern) => {
                Some(call.api.state.telemetry.tail.watch(&pattern).ok_or_else(|| {
                    Problem::rate_limited("too many tails are watched already", Duration::from_secs(5))
                })?)
            }
            None => None,
        };
    let feed = Feed {
        page: wanted.then_some(page),
        client,
        tail,
        overview: call.api.state.telemetry.board.overview(),
        shutdown: call.api.state.shutdown.clone(),
        seconds: 0,
        since_ms: Some(since_ms.unwrap_or(0)),
        _place: place,
        call,
    };
    let body = stream::unfold(feed, |mut feed| async move {
        let events = feed.next().await?;
        Some((Ok::<_, actix_web::Error>(events), feed))
    });
    Ok(HttpResponse::Ok()
        .content_type("text/event-stream")
        .insert_header(("cache-control", "no-store"))
        .insert_header(("x-accel-buffering", "no")) // a proxy that collects answers would collect this one for ever
        .body(BodyStream::new(Box::pin(body))))
}

/// What a feed waits for.
enum News {
    Closing,
    Second,
    Message(TailEvent),
}

impl Feed {
    /// The next events; `None` once the backbone shuts down.
    async fn next(&mut self) -> Option<Bytes> {
        if *self.shutdown.borrow() {
            return None;
        }
        if let Some(since_ms) = self.since_ms.take() {
            let mut events = self.hello(since_ms);
            self.each_second(&mut events).await;
            return Some(events.into());
        }
        let mut events = String::new();
        match self.wait().await {
            News::Closing => return None,
            News::Second => {
                self.seconds += 1;
                self.each_second(&mut events).await;
            }
            News::Message(first) => self.tail(first, &mut events).await,
        }
        Some(events.into())
    }

    /// Waits for something to tell. Safe to drop.
    async fn wait(&mut self) -> News {
        let message = async {
            match self.tail.as_mut() {
                Some(watch) => watch.next().await,
                None => None,
            }
        };
        let message = async {
            match message.await {
                Some(event) => News::Message(event),
                None => std::future::pending().await,
            }
        };
        let second = async { self.overview.changed().await.map_or(News::Closing, |()| News::Second) };
        let closing = async {
            // An error is the backbone being gone already.
            let _ = self.shutdown.changed().await;
            News::Closing
        };
        let (closing, second) = (pin!(closing), pin!(second));
        match select(select(closing, second), pin!(message)).await {
            Either::Left((Either::Left((news, _)) | Either::Right((news, _)), _)) | Either::Right((news, _)) => news,
        }
    }

    fn hello(&self, since_ms: u64) -> String {
        let state = &self.call.api.state;
        let mut events = String::new();
        let mut history = state.telemetry.history.all();
        history.retain(|sample| u64::try_from(sample.at.as_millis()).is_ok_and(|at_ms| at_ms > since_ms));
        let hello = json!({"version": env!("CARGO_PKG_VERSION"), "broker": state.broker.name(), "history": history});
        event(&mut events, "hello", &hello);
        events
    }

    async fn each_second(&mut self, events: &mut String) {
        let overview = Arc::clone(&self.overview.borrow_and_update());
        event(events, "overview", &overview_json(&overview));
        if self.seconds > 0
            && self.seconds.is_multiple_of(crate::telemetry::history::SAMPLE_EVERY_S)
            && let Some(sample) = self.call.api.state.telemetry.history.last()
        {
            event(events, "sample", &sample);
        }
        if !self.seconds.is_multiple_of(CLIENTS_EVERY_S) {
            return;
        }
        let state = &self.call.api.state;
        if let Some(page) = &self.page {
            let breakers = &state.webhooks.breakers;
            event(events, "clients", &page.show(&state.directory, &state.telemetry.board, &overview, breakers));
        }
        if let Some(client) = &self.client {
            self.one_client(client, events).await;
        }
    }

    async fn one_client(&self, id: &ClientId, events: &mut String) {
        let state = &self.call.api.state;
        let Some(entry) = state.directory.get(id.as_str()) else {
            return event(events, "gone", &json!({"client_id": id}));
        };
        let depths = tokio::time::timeout(ASK_TIMEOUT, state.broker.depths(id)).await;
        let actors = tokio::time::timeout(ASK_TIMEOUT, ask(&self.call, GetActorStates(id.clone()))).await;
        let actors: Option<ActorStates> = actors.ok().and_then(Result::ok).flatten();
        // The newest one's id: the page looks for more when it changes.
        let last_attempt = match entry.record.webhook {
            Some(_) => tokio::time::timeout(ASK_TIMEOUT, state.webhooks.log.page(id, None, 1)).await.ok(),
            None => None,
        };
        let last_attempt = last_attempt.and_then(Result::ok).and_then(|page| page.attempts.first().map(|last| last.id));
        let stats = state.telemetry.board.client(id.as_str());
        let breaker = state.webhooks.breakers.get(id);
        let mut view = ClientView::new(&entry.record).with_breaker(breaker);
        if let Some(actors) = actors {
            view = view.with_live(depths.ok().and_then(Result::ok), actors);
        }
        let shown = json!({
            "record": view,
            "state": rows::state(&entry.record, actors.as_ref(), breaker).as_str(),
            "sent_per_s": stats.sent_per_s,
            "received_per_s": stats.received_per_s,
            "last_attempt": last_attempt,
        });
        event(events, "client", &shown);
    }

    /// Collects for a moment: a browser draws ten messages at once as quickly as one.
    async fn tail(&mut self, first: TailEvent, events: &mut String) {
        tokio::time::sleep(TAIL_EVERY).await;
        let Some(watch) = self.tail.as_mut() else { return };
        let mut shown = vec![tail_json(&first)];
        while shown.len() < TAIL_BATCH_MAX
            && let Some(next) = watch.try_next()
        {
            shown.push(tail_json(&next));
        }
        event(events, "tail", &json!({"events": shown, "skipped": watch.take_skipped()}));
    }
}

fn tail_json(event: &TailEvent) -> serde_json::Value {
    json!({
        "id": event.id, "sender": event.sender, "topic": event.topic, "sent_at": event.sent_at,
        "bytes": event.bytes, "preview": String::from_utf8_lossy(&event.preview),
    })
}

fn overview_json(overview: &Overview) -> serde_json::Value {
    let (health, reason) = match &overview.health {
        None => ("starting", None),
        Some(Health::Ready) => ("ready", None),
        Some(Health::Blocked(why)) => ("blocked", Some(why)),
        Some(Health::Unreachable(why)) => ("unreachable", Some(why)),
    };
    let actors: Vec<_> = (overview.actors.counts.iter())
        .map(|(actor, state, count)| json!({"actor": actor.as_str(), "state": state.as_str(), "count": count}))
        .collect();
    json!({
        "sample": overview.sample, "queues": overview.queues, "clients": overview.clients,
        "health": health, "reason": reason, "actors": actors,
    })
}

/// Appends one event (HTML, section 9.2): JSON has no line feeds outside its strings, and escapes those inside.
fn event(events: &mut String, name: &str, data: &impl Serialize) {
    match serde_json::to_string(data) {
        Ok(data) => {
            events.push_str("event: ");
            events.push_str(name);
            events.push_str("\ndata: ");
            events.push_str(&data);
            events.push_str("\n\n");
        }
        Err(error) => log::error!("an event of the console's feed cannot be written: {error}"),
    }
}
