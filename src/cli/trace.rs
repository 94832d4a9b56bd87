//! `backbone trace ID`: where a message has been.

use clap::Args;
use reqwest::Method;
use serde::Deserialize;

use super::api::Call;
use super::context::Context;
use super::error::CliError;
use super::output::{pairs, printable, table};

/// Show the way of a recent message through the backbone
///
/// Every step with its time, the inboxes it landed in, and the pattern that brought it there.
#[derive(Debug, Args)]
pub(crate) struct Trace {
    /// The message's id
    id: String,
}

#[derive(Debug, Deserialize)]
struct Way {
    id: String,
    #[serde(default)]
    sender: String,
    topic: Option<String>,
    #[serde(default)]
    state: String,
    #[serde(default)]
    hops: Vec<Hop>,
}

#[derive(Debug, Deserialize)]
struct Hop {
    #[serde(default)]
    at: String,
    #[serde(default)]
    step: String,
    inbox: Option<String>,
    pattern: Option<String>,
}

impl Trace {
    pub(crate) async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let who = context.admin_or_client()?;
        let answer = context.api()?.call(&Call::new(Method::GET, &["messages", &self.id], &who)).await?;
        if context.out.json {
            return context.out.json_as_is(&answer);
        }
        let way: Way = serde_json::from_slice(&answer)
            .map_err(|error| CliError::failed(format!("the router's answer cannot be read: {error}")))?;
        context.out.table(&pairs([
            ("id", way.id),
            ("sender", way.sender),
            ("topic", way.topic.unwrap_or_else(|| "(broadcast)".into())),
            ("state", way.state),
        ]))?;
        context.out.line("")?;
        let mut rows = table(["at", "after", "step", "inbox", "pattern"]);
        let start = way.hops.first().map(|hop| hop.at.clone()).unwrap_or_default();
        for hop in way.hops {
            let dash = |text: Option<String>| printable(&text.unwrap_or_else(|| "-".into()));
            let after = since(&start, &hop.at);
            rows.add_row([printable(&hop.at), after, printable(&hop.step), dash(hop.inbox), dash(hop.pattern)]);
        }
        context.out.table(&rows)
    }
}

/// From `start` to `at`, both RFC 3339.
fn since(start: &str, at: &str) -> String {
    match (start.parse::<jiff::Timestamp>(), at.parse::<jiff::Timestamp>()) {
        (Ok(start), Ok(at)) => format!("{} ms", at.as_millisecond() - start.as_millisecond()),
        _ => "-".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hops_are_timed_from_the_first() {
        assert_eq!(since("2026-11-23T18:09:00.123Z", "2026-11-23T18:09:01.125Z"), "1002 ms");
        assert_eq!(since("", "2026-11-23T18:09:01.125Z"), "-");
    }
}
