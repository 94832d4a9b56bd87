//! `backbone demo`: a router in a temporary directory, three clients, and live traffic to look at.

use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use clap::Args;
use futures_util::future::{Either, select};
use reqwest::Method;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::api::{Api, Call, Failure, Who};
use super::child::{Router, Settings};
use super::context::Context;
use super::error::CliError;
use super::interrupt::Interrupt;
use super::output::printable;

/// The parties, as in the field: the network's command and control, who fly the gliders, who run the ship.
const CLIENTS: [(&str, &str, &[&str]); 3] = [
    ("noc-c2", "Network operations, command and control", &["soar.*.status.#", "soar.ship.science"]),
    ("glider-ops", "Glider operations", &["soar.noc.slocum.#", "soar.ship.position"]),
    ("ship-ops", "Research ship operations", &["soar.noc.ship.*", "soar.glider.position.*"]),
];

/// Events that may wait to be printed; senders and receivers wait when it is full.
const EVENTS_WAITING: usize = 256;

/// Messages whose arrival is still awaited for the printed delay; older ones are forgotten.
const SENT_REMEMBERED: usize = 1000;

/// Watch a router at work: three clients and live traffic in a temporary directory
///
/// Ctrl-C stops it and removes everything.
#[derive(Debug, Args)]
pub(crate) struct Demo {
    /// Listen on this port of 127.0.0.1 [default: a free one]
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "PORT")]
    port: u16,
    /// End by itself after this many seconds
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<u64>,
    /// Milliseconds between messages
    #[arg(long, value_name = "MS", default_value_t = 700, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    every_ms: u64,
}

/// Something to print.
enum Event {
    /// A message was accepted.
    Sent { id: String, started: Instant, sender: &'static str, topic: Option<&'static str>, message: Value },
    /// A client has it.
    Arrived { id: String, at: Instant, client: &'static str },
    /// It cannot go on.
    Failed(CliError),
}

#[derive(Deserialize)]
struct Batch<'a> {
    #[serde(borrow)]
    messages: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
struct Arrived {
    id: String,
    receipt: String,
}

impl Demo {
    pub(crate) async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let mut interrupt = Interrupt::listen()?;
        let router =
            match interrupt.or(Router::start(&Settings { what: "demo", port: self.port, ..Settings::default() })).await
            {
                Some(router) => router?,
                None => return Ok(()),
            };
        let shown = tokio::task::LocalSet::new().run_until(self.show(context, &router, &mut interrupt)).await;
        if shown.is_ok() {
            context.out.note("\nstopping the router and removing its directory");
        }
        router.stop().await;
        shown
    }

    async fn show(&self, context: &mut Context, router: &Router, interrupt: &mut Interrupt) -> Result<(), CliError> {
        let api = Rc::new(Api::new(router.url(), None)?);
        let admin = router.admin()?;
        self.introduce(context, router);
        let (events, mut arrivals) = mpsc::channel(EVENTS_WAITING);
        let mut senders = Vec::new();
        for (id, name, subscriptions) in CLIENTS {
            let who = onboard(&api, &admin, id, name, subscriptions).await?;
            context.out.note(format!("  {id:<11} {name}; subscribed to {}", subscriptions.join(", ")));
            tokio::task::spawn_local(receive(Rc::clone(&api), id, who.clone(), events.clone()));
            senders.push((id, who));
        }
        context.out.note("");
        tokio::task::spawn_local(send(api, senders, Duration::from_millis(self.every_ms), events));
        let end = tokio::time::sleep(Duration::from_secs(self.seconds.unwrap_or(u64::from(u32::MAX))));
        let mut end = std::pin::pin!(end);
        let mut stage = Stage::default();
        loop {
            let next = std::pin::pin!(arrivals.recv());
            match interrupt.or(select(next, end.as_mut())).await {
                Some(Either::Left((Some(Event::Failed(error)), _))) => return Err(error),
                Some(Either::Left((Some(event), _))) => {
                    for line in stage.lines(event, context.out.json) {
                        context.out.line(line)?;
                    }
                    context.out.flush()?;
                }
                _ => return Ok(()),
            }
        }
    }

    fn introduce(&self, context: &Context, router: &Router) {
        let (url, dir) = (router.url(), router.dir().path().display());
        context
            .out
            .note(format!("A router listens at {url}; its admin token is in {}.", router.admin_token_path().display()));
        context.out.note(format!("Console: {url}/   API: {url}/docs   Ctrl-C stops it all."));
        context.out.note("In another terminal:");
        context.out.note(format!("  export SOAR_URL={url} DATA_DIR={dir}"));
        context
            .out
            .note("  eval \"$(backbone client add you --subscribe 'soar.#' --export)\"; backbone receive --follow");
        context.out.note("\nThree clients:");
    }
}

async fn onboard(api: &Api, admin: &Who, id: &str, name: &str, subscriptions: &[&str]) -> Result<Who, CliError> {
    let body = json!({"client_id": id, "name": name, "subscriptions": subscriptions}).to_string();
    let record: Value = api.fetch(&Call::new(Method::POST, &["clients"], admin).json(body)).await?;
    match record["secret"].as_str() {
        Some(secret) => Ok(Who::Client { id: id.to_owned(), secret: secret.to_owned() }),
        None => Err(CliError::failed("the router did not show the client's secret")),
    }
}

/// The next message of the story.
fn scene(number: u64) -> (&'static str, Option<&'static str>, Value) {
    // Positions in whole thousandths of a degree, so that they are shown as a person would write them.
    let (drift, thousandth) = ((number % 97) as f64, |n: f64| n.round() / 1000.0);
    let (lat, lon, ship_lat) =
        (thousandth(57_250.0 + drift), thousandth(-9750.0 - drift), thousandth(57_350.0 + drift));
    match number % 6 {
        0 => {
            ("noc-c2", Some("soar.noc.slocum.unit-397"), json!({"waypoint": {"lat": lat, "lon": lon}, "depth_m": 950}))
        }
        1 => (
            "glider-ops",
            Some("soar.glider.status.unit-397"),
            json!({"battery_v": thousandth(14_900.0 - drift), "state": "diving"}),
        ),
        2 => {
            ("ship-ops", Some("soar.ship.position"), json!({"lat": ship_lat, "lon": lon, "heading": 40 + number % 20}))
        }
        3 => (
            "glider-ops",
            Some("soar.glider.position.unit-397"),
            json!({"lat": lat, "lon": lon, "depth_m": number % 950}),
        ),
        4 => ("noc-c2", Some("soar.noc.ship.request"), json!({"hold_station": true, "minutes": 30})),
        _ => ("noc-c2", None, json!({"notice": "next situation report at the full hour"})),
    }
}

async fn send(api: Rc<Api>, senders: Vec<(&'static str, Who)>, every: Duration, events: mpsc::Sender<Event>) {
    let mut beat = tokio::time::interval(every);
    for number in 0.. {
        beat.tick().await;
        let (sender, topic, message) = scene(number);
        let Some((_, who)) = senders.iter().find(|(id, _)| *id == sender) else { continue };
        let (path, body) = match topic {
            Some(topic) => ("send", json!({"topic": topic, "message": message})),
            None => ("notify", json!({"message": message})),
        };
        let started = Instant::now();
        let event = match api.fetch::<Value>(&Call::new(Method::POST, &[path], who).json(body.to_string())).await {
            Ok(answer) => {
                let id = answer["ids"][0].as_str().unwrap_or_default().to_owned();
                Event::Sent { id, started, sender, topic, message }
            }
            Err(failure) => Event::Failed(failure.into()),
        };
        if events.send(event).await.is_err() {
            return;
        }
    }
}

async fn receive(api: Rc<Api>, client: &'static str, who: Who, events: mpsc::Sender<Event>) {
    let poll = Call::new(Method::GET, &["receive"], &who).query("wait", 30).query("ack", "manual");
    let poll = poll.waiting(Duration::from_secs(30));
    loop {
        let event = match take(&api, &poll, &who).await {
            Ok(ids) => {
                let at = Instant::now();
                for id in ids {
                    if events.send(Event::Arrived { id, at, client }).await.is_err() {
                        return;
                    }
                }
                continue;
            }
            Err(failure) => Event::Failed(failure.into()),
        };
        // It ends with the first failure; so does the demo.
        let _ = events.send(event).await;
        return;
    }
}

async fn take(api: &Api, poll: &Call, who: &Who) -> Result<Vec<String>, Failure> {
    let answer = api.call(poll).await?;
    let unreadable = |error: serde_json::Error| Failure::Broken(format!("the router's answer cannot be read: {error}"));
    let batch: Batch<'_> = serde_json::from_slice(&answer).map_err(unreadable)?;
    let arrived: Vec<Arrived> =
        batch.messages.iter().map(|m| serde_json::from_str(m.get())).collect::<Result<_, _>>().map_err(unreadable)?;
    let (ids, receipts): (Vec<String>, Vec<String>) = arrived.into_iter().map(|a| (a.id, a.receipt)).unzip();
    if !receipts.is_empty() {
        api.call(&Call::new(Method::POST, &["ack"], who).json(json!({"receipts": receipts}).to_string())).await?;
    }
    Ok(ids)
}

/// Puts the two halves of what happens in order: an arrival may be heard of before the 202 of its own message.
#[derive(Default)]
struct Stage {
    sent: HashMap<String, Instant>,
    early: HashMap<String, Vec<(&'static str, Instant)>>,
}

impl Stage {
    fn lines(&mut self, event: Event, json: bool) -> Vec<String> {
        match event {
            Event::Sent { id, started, sender, topic, message } => {
                let mut lines = vec![if json {
                    json!({"event": "sent", "id": id, "sender": sender, "topic": topic, "message": message}).to_string()
                } else {
                    let at = crate::time::Timestamp::now().to_string();
                    let to = topic.unwrap_or("everyone (notify)");
                    format!("{}  {sender:<10} ──▶ {to:<30} {}", clock(&at), printable(&message.to_string()))
                }];
                for (client, at) in self.early.remove(&id).unwrap_or_default() {
                    lines.push(arrival(&id, client, at.saturating_duration_since(started), json));
                }
                if self.sent.len() >= SENT_REMEMBERED {
                    self.sent.clear();
                    self.early.clear();
                }
                self.sent.insert(id, started);
                lines
            }
            Event::Arrived { id, at, client } => match self.sent.get(&id) {
                Some(started) => vec![arrival(&id, client, at.saturating_duration_since(*started), json)],
                None => {
                    self.early.entry(id).or_default().push((client, at));
                    Vec::new()
                }
            },
            Event::Failed(_) => Vec::new(),
        }
    }
}

fn arrival(id: &str, client: &str, after: Duration, json: bool) -> String {
    if json {
        return json!({"event": "arrived", "id": id, "client": client}).to_string();
    }
    format!("{:25}└─▶ {client:<30} after {:.1} ms", "", after.as_secs_f64() * 1e3)
}

/// The time of day of an RFC 3339 timestamp.
fn clock(timestamp: &str) -> &str {
    timestamp.get(11..23).unwrap_or(timestamp)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topic::{Pattern, Topic};

    #[test]
    fn every_topic_of_the_story_reaches_someone() {
        for number in 0..6 {
            let (_, Some(topic), _) = scene(number) else { continue };
            let topic = Topic::parse(topic).expect("a topic");
            let readers = CLIENTS.iter().filter(|(_, _, patterns)| {
                patterns.iter().any(|pattern| Pattern::parse(pattern).expect("a pattern").matches(&topic))
            });
            assert!(readers.count() > 0, "{topic}");
        }
    }

    #[test]
    fn an_arrival_is_shown_after_its_message_even_if_heard_of_first() {
        let mut stage = Stage::default();
        assert!(stage.lines(Event::Arrived { id: "1".into(), at: Instant::now(), client: "b" }, false).is_empty());
        let started = Instant::now();
        let sent = Event::Sent { id: "1".into(), started, sender: "a", topic: Some("t"), message: json!(1) };
        let lines = stage.lines(sent, false);
        assert!(lines.len() == 2 && lines[0].contains("──▶ t") && lines[1].contains("└─▶ b"), "{lines:?}");
    }
}
