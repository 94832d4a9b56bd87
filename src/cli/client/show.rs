//! Records and webhook attempts, as tables.

use std::collections::BTreeMap;

use comfy_table::Table;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::cli::error::CliError;
use crate::cli::output::{grouped, pairs, printable, table};

/// Patterns shown in a row of the list; the rest is counted.
const PATTERNS_LISTED: usize = 3;

/// Characters of an endpoint's answer shown in a row.
const ANSWER_SHOWN: usize = 60;

/// Queues and actors in the order in which a message meets them.
const QUEUES: [&str; 4] = ["outbox", "notify", "inbox", "dead"];
const ACTORS: [&str; 4] = ["forwarder", "broadcaster", "subscriber", "pusher"];

/// A page of `GET /clients`, its records as they came.
#[derive(Debug, Deserialize)]
pub(crate) struct Page {
    pub(crate) clients: Vec<Box<RawValue>>,
    pub(crate) next: Option<String>,
}

/// A page of `GET /clients/{id}/attempts`.
#[derive(Debug, Deserialize)]
pub(crate) struct AttemptPage {
    pub(crate) attempts: Vec<Box<RawValue>>,
}

/// A client as the API shows it. Lenient, so that a newer router's record can still be shown.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Record {
    pub(crate) client_id: String,
    name: Option<String>,
    pub(crate) subscriptions: Vec<String>,
    webhook: Option<WebhookShown>,
    limits: BTreeMap<String, Value>,
    pub(crate) paused: bool,
    created_at: String,
    pub(crate) queues: BTreeMap<String, u64>,
    pub(crate) actors: BTreeMap<String, Value>,
    pub(crate) secret: Option<String>,
    webhook_secret: Option<String>,
}

#[derive(Debug, Deserialize)]
struct WebhookShown {
    #[serde(default)]
    url: String,
    #[serde(default = "yes")]
    enabled: bool,
    disabled_reason: Option<String>,
    #[serde(default)]
    breaker: Value,
    #[serde(flatten)]
    rest: BTreeMap<String, Value>,
}

fn yes() -> bool {
    true
}

/// Reads a record.
///
/// # Errors
/// When it is none.
pub(crate) fn read(json: &[u8]) -> Result<Record, CliError> {
    serde_json::from_slice(json)
        .map_err(|error| CliError::failed(format!("the router's answer is no client record: {error}")))
}

/// The table of one client.
pub(crate) fn record_table(record: &Record) -> Table {
    let mut rows = vec![("client_id", record.client_id.clone())];
    let mut add = |name, value: Option<String>| rows.extend(value.map(|value| (name, value)));
    add("name", record.name.clone());
    add("secret", record.secret.clone());
    add("webhook_secret", record.webhook_secret.clone());
    add("subscriptions", Some(or_dash(record.subscriptions.join("\n"))));
    add("delivery", Some(delivery(record)));
    if let Some(webhook) = &record.webhook {
        let settings = webhook.rest.iter().filter(|(_, value)| !is_empty(value)).map(named);
        add("webhook", Some(settings.collect::<Vec<_>>().join("\n")));
        add("breaker", (!webhook.breaker.is_null()).then(|| state(&webhook.breaker)));
    }
    let limits: Vec<String> = record.limits.iter().filter(|(_, value)| !value.is_null()).map(named).collect();
    add("limits", Some(or_dash(limits.join("\n"))));
    add("paused", record.paused.then(|| "yes".into()));
    add("created_at", Some(record.created_at.clone()));
    let queues = in_flow_order(&record.queues, &QUEUES, |depth| grouped(*depth));
    add("queues", (!queues.is_empty()).then_some(queues));
    let actors = in_flow_order(&record.actors, &ACTORS, state);
    add("actors", (!actors.is_empty()).then_some(actors));
    pairs(rows)
}

/// `name value` for each, those of `order` first and in it.
fn in_flow_order<T>(all: &BTreeMap<String, T>, order: &[&str], shown: impl Fn(&T) -> String) -> String {
    let known = order.iter().filter_map(|name| Some((*name, all.get(*name)?)));
    let others = all.iter().map(|(name, value)| (name.as_str(), value)).filter(|(name, _)| !order.contains(name));
    known.chain(others).map(|(name, value)| format!("{name} {}", shown(value))).collect::<Vec<_>>().join(", ")
}

/// The heads of the list.
pub(crate) fn list_table() -> Table {
    table(["client_id", "name", "subscriptions", "delivery", "created_at"])
}

/// One row of the list.
pub(crate) fn add_to_list(list: &mut Table, record: &Record) {
    let mut patterns = record.subscriptions.iter().take(PATTERNS_LISTED).cloned().collect::<Vec<_>>().join(" ");
    if record.subscriptions.len() > PATTERNS_LISTED {
        patterns += &format!(" +{}", record.subscriptions.len() - PATTERNS_LISTED);
    }
    let row = [
        record.client_id.clone(),
        or_dash(record.name.clone().unwrap_or_default()),
        or_dash(patterns),
        delivery(record),
        record.created_at.clone(),
    ];
    list.add_row(row.map(|cell| printable(&cell)));
}

/// How messages reach the client.
fn delivery(record: &Record) -> String {
    let how = match &record.webhook {
        None => "pull".to_owned(),
        Some(webhook) if webhook.enabled => format!("push to {}", webhook.url),
        Some(webhook) => {
            let why = webhook.disabled_reason.as_ref().map_or(String::new(), |why| format!(": {why}"));
            format!("pull (webhook {} is off{why})", webhook.url)
        }
    };
    if record.paused { format!("{how}, paused") } else { how }
}

/// The table of one attempt.
///
/// # Errors
/// When `json` is none.
pub(crate) fn attempt_table(json: &[u8]) -> Result<Table, CliError> {
    let attempt: Attempt = read_attempt(json)?;
    Ok(pairs([
        ("status", attempt.status.map_or("-".into(), |status| status.to_string())),
        ("error", or_dash(attempt.error.unwrap_or_default())),
        ("latency", format!("{} ms", attempt.latency_ms)),
        ("response", or_dash(attempt.response.unwrap_or_default())),
    ]))
}

/// Whether the endpoint took the message; else why not.
///
/// # Errors
/// When `json` is no attempt.
pub(crate) fn attempt_outcome(json: &[u8]) -> Result<Result<(), String>, CliError> {
    let attempt = read_attempt(json)?;
    Ok(match (attempt.status, attempt.error) {
        (Some(200..=299), _) => Ok(()),
        (_, Some(error)) => Err(error),
        (Some(status), None) => Err(format!("it answered {status}, not 2xx")),
        (None, None) => Err("it did not answer".into()),
    })
}

/// The table of many attempts.
///
/// # Errors
/// When one is none.
pub(crate) fn attempts_table(page: &AttemptPage) -> Result<Table, CliError> {
    let mut rows = table(["at", "message_id", "status", "latency", "error", "response"]);
    for attempt in &page.attempts {
        let attempt = read_attempt(attempt.get().as_bytes())?;
        let response: String = attempt.response.unwrap_or_default().chars().take(ANSWER_SHOWN).collect();
        rows.add_row(
            [
                attempt.at,
                attempt.message_id,
                attempt.status.map_or("-".into(), |status| status.to_string()),
                format!("{} ms", attempt.latency_ms),
                or_dash(attempt.error.unwrap_or_default()),
                or_dash(response.replace('\n', " ")),
            ]
            .map(|cell| printable(&cell)),
        );
    }
    Ok(rows)
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Attempt {
    message_id: String,
    at: String,
    status: Option<u16>,
    error: Option<String>,
    latency_ms: f64,
    response: Option<String>,
}

fn read_attempt(json: &[u8]) -> Result<Attempt, CliError> {
    serde_json::from_slice(json)
        .map_err(|error| CliError::failed(format!("the router's answer is no webhook attempt: {error}")))
}

fn named((name, value): (&String, &Value)) -> String {
    format!("{name} {}", state(value))
}

/// A JSON value as a person writes it: strings without quotation marks.
pub(crate) fn state(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty)
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".into() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(json: &str) -> String {
        record_table(&read(json.as_bytes()).expect("a record")).to_string()
    }

    #[test]
    fn a_record_is_shown_with_what_matters_and_nothing_else() {
        let text = shown(
            r#"{"client_id":"noc-c2","name":null,"subscriptions":["a.#","b.*"],"webhook":null,"limits":{"send_per_s":5},
            "paused":false,"created_at":"2026-11-23T18:09:00.123Z","queues":{"dead":0,"inbox":1200,"outbox":1},"actors":{"pusher":"stopped"},
            "secret":"s3cret","new_member":[1]}"#,
        );
        for part in [
            "noc-c2",
            "s3cret",
            "a.#",
            "b.*",
            "pull",
            "send_per_s 5",
            "outbox 1, inbox 1,200, dead 0",
            "pusher stopped",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains("paused") && !text.contains("null"), "{text}");
    }

    #[test]
    fn a_webhook_that_is_off_says_why() {
        let text = shown(
            r#"{"client_id":"a","webhook":{"url":"https://x/","enabled":false,"disabled_reason":"answered 410"}}"#,
        );
        assert!(text.contains("pull (webhook https://x/ is off: answered 410)"), "{text}");
    }

    #[test]
    fn an_attempt_is_a_success_only_with_2xx() {
        let outcome = |json: &str| attempt_outcome(json.as_bytes()).expect("an attempt");
        assert_eq!(outcome(r#"{"status":204,"error":null,"latency_ms":3}"#), Ok(()));
        assert_eq!(outcome(r#"{"status":500,"error":null,"latency_ms":3}"#), Err("it answered 500, not 2xx".into()));
        assert_eq!(outcome(r#"{"status":null,"error":"timed out","latency_ms":3}"#), Err("timed out".into()));
    }
}
