//! Bodies of `POST /clients` and `PATCH /clients/{id}`: from JSON to valid settings, naming every wrong member.
//!
//! Unknown members are ignored, and so are those that only the backbone sets (`created_at`, a webhook's `breaker`…), so
//! that a record that was read can be sent back.

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::error::{Errors, Problem};
use super::fields::{Fields, whole};
use crate::actors::registry::{CreateClient, PatchClient};
use crate::client::{ClientId, ClientRecord, Limits, Webhook};
use crate::topic::Pattern;

/// Longest name, in characters.
const NAME_CHARS_MAX: usize = 200;

/// Most subscriptions of one client.
pub(crate) const SUBSCRIPTIONS_MAX: usize = 10_000;

/// Bounds of the limits. A year is longer than anyone wants a message to wait; 2^53 is exact in every JSON reader.
const SEND_PER_S_MAX: u64 = 1_000_000;
const INBOX_MESSAGES_MAX: u64 = 1 << 53;
const INBOX_TTL_S_MAX: u64 = 31_536_000;

/// What a webhook that the admin switched off shows as its reason.
const SWITCHED_OFF: &str = "switched off by the admin";

/// Passes where a URL is missing or of another type, so that only that is reported of it.
const ANY_URL: &str = "https://example.org/";

/// Reads the body of `POST /clients`. `allow` is `SOAR_WEBHOOK_ALLOW`.
pub(crate) fn create(body: &Map<String, Value>, allow: &[IpNet]) -> Result<CreateClient, Problem> {
    let mut errors = Errors::default();
    let mut fields = Fields::new(body, "", &mut errors);
    let client_id = client_id(&mut fields);
    let name = name(&mut fields);
    let subscriptions = subscriptions(&mut fields);
    let webhook = webhook(&mut fields, allow).map(|webhook| with_reason(webhook, None));
    let limits = limits(&mut fields);
    errors.into_result()?;
    let client_id = client_id.ok_or_else(|| Problem::internal("a client id is neither right nor wrong"))?;
    Ok(CreateClient { client_id, name, subscriptions, webhook, limits })
}

/// Reads the body of `PATCH /clients/{id}`: a JSON merge patch (RFC 7396) of `record`. Only what it names changes, and
/// only that is checked.
pub(crate) fn patch(record: &ClientRecord, body: &Map<String, Value>, allow: &[IpNet]) -> Result<PatchClient, Problem> {
    let mut patched = json!({
        "name": record.name,
        "subscriptions": record.subscriptions,
        "webhook": record.webhook,
        "limits": record.limits,
        "paused": record.paused,
    });
    merge(&mut patched, &Value::Object(body.clone()));
    let Value::Object(patched) = patched else {
        return Err(Problem::internal("an object merged with an object is none"));
    };
    let names = |name: &str| body.contains_key(name);

    let mut errors = Errors::default();
    let mut fields = Fields::new(&patched, "", &mut errors);
    if body.get("client_id").is_some_and(|id| id.as_str() != Some(record.client_id.as_str())) {
        fields.wrong("client_id", "cannot be changed; create another client");
    }
    let patch = PatchClient {
        client_id: Some(record.client_id.clone()),
        merged_with: Some(record.clone()),
        name: names("name").then(|| name(&mut fields)),
        subscriptions: names("subscriptions").then(|| subscriptions(&mut fields)),
        webhook: names("webhook")
            .then(|| webhook(&mut fields, allow).map(|webhook| with_reason(webhook, record.webhook.as_ref()))),
        limits: names("limits").then(|| limits(&mut fields)),
        paused: names("paused").then(|| fields.boolean("paused").unwrap_or(false)),
    };
    errors.into_result()?;
    Ok(patch)
}

/// RFC 7396, section 2, to the letter.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    if let Value::Object(target) = target {
        for (name, value) in patch {
            if value.is_null() {
                target.remove(name);
            } else {
                merge(target.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
    }
}

fn client_id(fields: &mut Fields<'_>) -> Option<ClientId> {
    match fields.required("client_id")? {
        Value::String(text) => match ClientId::parse(text) {
            Ok(id) => return Some(id),
            Err(error) => fields.wrong("client_id", error.to_string()),
        },
        _ => fields.wrong("client_id", "must be a string"),
    }
    None
}

fn name(fields: &mut Fields<'_>) -> Option<String> {
    match fields.get("name") {
        None | Some(Value::Null) => None,
        Some(_) => fields.text("name", NAME_CHARS_MAX).map(str::to_owned),
    }
}

fn subscriptions(fields: &mut Fields<'_>) -> Vec<Pattern> {
    let values = match fields.get("subscriptions") {
        None => return Vec::new(),
        Some(Value::Array(values)) if values.len() <= SUBSCRIPTIONS_MAX => values,
        Some(Value::Array(_)) => {
            fields.wrong("subscriptions", format!("must not have more than {SUBSCRIPTIONS_MAX} patterns"));
            return Vec::new();
        }
        Some(_) => {
            fields.wrong("subscriptions", "must be an array of patterns");
            return Vec::new();
        }
    };
    let mut seen = std::collections::HashSet::with_capacity(values.len());
    let mut patterns = Vec::with_capacity(values.len());
    for (index, value) in values.iter().enumerate() {
        match value.as_str().map(Pattern::parse) {
            Some(Ok(pattern)) if seen.insert(pattern.clone()) => patterns.push(pattern),
            Some(Ok(_)) => {}
            Some(Err(error)) => fields.wrong(&format!("subscriptions/{index}"), error.to_string()),
            None => fields.wrong(&format!("subscriptions/{index}"), "must be a string"),
        }
    }
    patterns
}

fn limits(fields: &mut Fields<'_>) -> Limits {
    let object = match fields.get("limits") {
        None | Some(Value::Null) => return Limits::default(),
        Some(Value::Object(object)) => without_nulls(object),
        Some(_) => {
            fields.wrong("limits", "must be an object");
            return Limits::default();
        }
    };
    let mut limits = Fields::new(&object, "/limits", fields.errors());
    Limits {
        send_per_s: limits.integer("send_per_s", 1..=SEND_PER_S_MAX).and_then(|n| u32::try_from(n).ok()),
        max_inbox_messages: limits.integer("max_inbox_messages", 1..=INBOX_MESSAGES_MAX),
        inbox_ttl_s: limits.integer("inbox_ttl_s", 1..=INBOX_TTL_S_MAX),
    }
}

/// `null` is how a record, and whoever sends it back, says that there is none.
fn without_nulls(object: &Map<String, Value>) -> Map<String, Value> {
    object.iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn webhook(fields: &mut Fields<'_>, allow: &[IpNet]) -> Option<Webhook> {
    let mut object = match fields.get("webhook") {
        None | Some(Value::Null) => return None,
        Some(Value::Object(object)) => object.clone(),
        Some(_) => {
            fields.wrong("webhook", "must be an object");
            return None;
        }
    };
    if object.get("rate_limit_per_s").is_some_and(Value::is_null) {
        object.remove("rate_limit_per_s");
    }
    let errors = fields.errors();
    let mut fields = Fields::new(&object, "/webhook", errors);
    let url = match fields.required("url") {
        Some(Value::String(url)) => Some(url.clone()),
        Some(_) => {
            fields.wrong("url", "must be a string");
            None
        }
        None => None,
    };
    let small = 0..=u64::from(u32::MAX);
    let mut number = |name: &str| fields.integer(name, small.clone()).and_then(|n| u32::try_from(n).ok());
    let timeout_s = number("timeout_s").unwrap_or_else(Webhook::default_timeout_s);
    let concurrency = number("concurrency").unwrap_or_else(Webhook::default_concurrency);
    let rate_limit_per_s = number("rate_limit_per_s");
    let webhook = Webhook {
        url: url.unwrap_or_else(|| ANY_URL.to_owned()),
        headers: headers(&mut fields),
        timeout_s,
        retry_schedule_s: retry_schedule(&mut fields),
        concurrency,
        rate_limit_per_s,
        ordered: fields.boolean("ordered").unwrap_or(false),
        enabled: fields.boolean("enabled").unwrap_or(true),
        disabled_reason: None,
    };
    for (pointer, detail) in crate::webhook::validate(&webhook, allow) {
        fields.wrong(pointer.trim_start_matches('/'), detail);
    }
    Some(webhook)
}

fn headers(fields: &mut Fields<'_>) -> BTreeMap<String, String> {
    let object = match fields.get("headers") {
        None => return BTreeMap::new(),
        Some(Value::Object(object)) => object,
        Some(_) => {
            fields.wrong("headers", "must be an object of strings");
            return BTreeMap::new();
        }
    };
    let mut headers = BTreeMap::new();
    for (name, value) in object {
        match value {
            Value::String(value) => drop(headers.insert(name.clone(), value.clone())),
            // RFC 6901, section 3: `~` and `/` are escaped in a pointer.
            _ => fields.wrong(&format!("headers/{}", name.replace('~', "~0").replace('/', "~1")), "must be a string"),
        }
    }
    headers
}

fn retry_schedule(fields: &mut Fields<'_>) -> Vec<u32> {
    let values = match fields.get("retry_schedule_s") {
        None => return Webhook::default_retry_schedule_s(),
        Some(Value::Array(values)) => values,
        Some(_) => {
            fields.wrong("retry_schedule_s", "must be an array of whole seconds");
            return Vec::new();
        }
    };
    let mut schedule = Vec::with_capacity(values.len().min(64));
    for (index, value) in values.iter().enumerate() {
        match whole(value).and_then(|seconds| u32::try_from(seconds).ok()) {
            Some(seconds) => schedule.push(seconds),
            None => fields.wrong(&format!("retry_schedule_s/{index}"), "must be a whole number of seconds"),
        }
    }
    schedule
}

/// Off, it says why: for the reason that it was off for before, or because the admin says so now.
fn with_reason(mut webhook: Webhook, before: Option<&Webhook>) -> Webhook {
    if !webhook.enabled {
        let reason = before.filter(|before| !before.enabled).and_then(|before| before.disabled_reason.clone());
        webhook.disabled_reason = Some(reason.unwrap_or_else(|| SWITCHED_OFF.to_owned()));
    }
    webhook
}

#[cfg(test)]
#[path = "client_body_tests.rs"]
mod tests;
