//! The options that describe a webhook and limits, and what they are in the API's JSON.

use std::str::FromStr;

use clap::Args;
use serde_json::{Map, Value, json};

use crate::cli::error::CliError;

/// A webhook's settings (docs/contract.md, section 5). The router judges the values.
#[derive(Debug, Args)]
pub(crate) struct WebhookArgs {
    /// Push its inbox to this URL
    #[arg(long, value_name = "URL")]
    webhook: Option<String>,
    /// A header sent with every call, 'Name: value'; repeatable
    #[arg(long, value_name = "HEADER")]
    webhook_header: Vec<String>,
    /// Seconds for one attempt, 1 to 60
    #[arg(long, value_name = "SECONDS")]
    webhook_timeout_s: Option<u32>,
    /// Seconds to wait before each retry, such as 5,300,1800; '' for no retries
    #[arg(long, value_name = "SECONDS,…")]
    webhook_retry_schedule_s: Option<String>,
    /// Attempts in flight at once, 1 to 256
    #[arg(long, value_name = "N")]
    webhook_concurrency: Option<u32>,
    /// Attempts a second at most, or none
    #[arg(long, value_name = "N")]
    webhook_rate_limit_per_s: Option<Limit>,
    /// One message at a time, in order
    #[arg(long, value_name = "true|false", num_args = 0..=1, default_missing_value = "true")]
    webhook_ordered: Option<bool>,
}

impl WebhookArgs {
    /// The members that are given; `None` when none is.
    ///
    /// # Errors
    /// Wrong usage: a header or a schedule that is none.
    pub(crate) fn to_json(&self) -> Result<Option<Map<String, Value>>, CliError> {
        let mut webhook = Map::new();
        if let Some(url) = &self.webhook {
            webhook.insert("url".into(), json!(url));
        }
        if !self.webhook_header.is_empty() {
            let headers: Result<Map<String, Value>, CliError> = self.webhook_header.iter().map(|h| header(h)).collect();
            webhook.insert("headers".into(), Value::Object(headers?));
        }
        if let Some(timeout_s) = self.webhook_timeout_s {
            webhook.insert("timeout_s".into(), json!(timeout_s));
        }
        if let Some(schedule) = &self.webhook_retry_schedule_s {
            webhook.insert("retry_schedule_s".into(), json!(seconds(schedule)?));
        }
        if let Some(concurrency) = self.webhook_concurrency {
            webhook.insert("concurrency".into(), json!(concurrency));
        }
        if let Some(limit) = self.webhook_rate_limit_per_s {
            webhook.insert("rate_limit_per_s".into(), limit.to_json());
        }
        if let Some(ordered) = self.webhook_ordered {
            webhook.insert("ordered".into(), json!(ordered));
        }
        Ok((!webhook.is_empty()).then_some(webhook))
    }
}

fn header(text: &str) -> Result<(String, Value), CliError> {
    match text.split_once(':') {
        Some((name, value)) if !name.trim().is_empty() => Ok((name.trim().to_owned(), json!(value.trim()))),
        _ => Err(CliError::usage(format!("--webhook-header wants 'Name: value', not '{text}'"))),
    }
}

fn seconds(text: &str) -> Result<Vec<u32>, CliError> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts.map(str::parse).collect::<Result<_, _>>().map_err(|_| {
        CliError::usage(format!("--webhook-retry-schedule-s wants seconds such as 5,300,1800, not '{text}'"))
    })
}

/// A client's limits.
#[derive(Debug, Args)]
pub(crate) struct LimitArgs {
    /// Messages a second that it may send, or none
    #[arg(long, value_name = "N")]
    send_per_s: Option<Limit>,
    /// Messages that its inbox may hold, or none; past it the oldest become dead letters
    #[arg(long, value_name = "N")]
    max_inbox_messages: Option<Limit>,
    /// Seconds that a message may wait in its inbox, or none; then it becomes a dead letter
    #[arg(long, value_name = "SECONDS")]
    inbox_ttl_s: Option<Limit>,
}

impl LimitArgs {
    /// The limits that are given; `None` when none is.
    pub(crate) fn to_json(&self) -> Option<Value> {
        let given = [
            ("send_per_s", self.send_per_s),
            ("max_inbox_messages", self.max_inbox_messages),
            ("inbox_ttl_s", self.inbox_ttl_s),
        ];
        let limits: Map<String, Value> =
            given.iter().filter_map(|(name, limit)| Some(((*name).to_owned(), (*limit)?.to_json()))).collect();
        (!limits.is_empty()).then_some(Value::Object(limits))
    }
}

/// A limit as typed: a number, or `none` to lift it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limit(Option<u64>);

impl FromStr for Limit {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "none" {
            return Ok(Self(None));
        }
        text.parse().map(|number| Self(Some(number))).map_err(|_| "a number, or none")
    }
}

impl Limit {
    fn to_json(self) -> Value {
        self.0.map_or(Value::Null, Value::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_schedules_are_read() {
        assert_eq!(header("X-A:  b:c ").expect("valid"), ("X-A".into(), json!("b:c")));
        assert!(header("no colon").is_err() && header(": x").is_err());
        assert_eq!(seconds("5, 300").expect("valid"), [5, 300]);
        assert_eq!(seconds("").expect("valid"), [] as [u32; 0]);
        assert!(seconds("5,soon").is_err());
    }

    #[test]
    fn none_lifts_a_limit() {
        assert_eq!("none".parse::<Limit>(), Ok(Limit(None)));
        assert_eq!("7".parse::<Limit>(), Ok(Limit(Some(7))));
        assert!("-1".parse::<Limit>().is_err());
    }
}
