//! `backbone trace ID`: where a message has been.

use clap::Args;
use reqwest::Method;
use serde::Deserialize;

use super::api::Call;
use super::context::Context;
use super::error::CliError;
use super::output::{count, pairs, printable, table};

/// Show the way of a recent message through the backbone
///
/// Every step with its time, the inboxes it landed in, and the pattern that brought it there.
#[derive(Debug, Args)]
pub(crate) struct Trace {
    /// The message's id
    id: String,
    /// Whose message, where several clients have chosen the same id (admin)
    #[arg(long, value_name = "CLIENT")]
    sender: Option<String>,
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
    #[serde(default)]
    hops_left_out: u64,
    #[serde(default)]
    others: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Hop {
    #[serde(default)]
    at: String,
    #[serde(default)]
    step: String,
    inbox: Option<String>,
    pattern: Option<String>,
    reason: Option<String>,
}

impl Trace {
    pub(crate) async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let who = context.admin_or_client()?;
        let mut call = Call::new(Method::GET, &["messages", &self.id], &who);
        if let Some(sender) = &self.sender {
            call = call.query("sender", sender);
        }
        let answer = context.api()?.call(&call).await?;
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
        let mut rows = table(["at", "after", "step", "inbox", "pattern", "reason"]);
        let start = way.hops.first().map(|hop| hop.at.clone()).unwrap_or_default();
        for hop in way.hops {
            let dash = |text: Option<String>| printable(&text.unwrap_or_else(|| "-".into()));
            let after = since(&start, &hop.at);
            let step = printable(&hop.step);
            rows.add_row([printable(&hop.at), after, step, dash(hop.inbox), dash(hop.pattern), dash(hop.reason)]);
        }
        context.out.table(&rows)?;
        if way.hops_left_out > 0 {
            context.out.line(format!("and {} that were counted only", count(way.hops_left_out, "step")))?;
        }
        if !way.others.is_empty() {
            let others = printable(&way.others.join(", "));
            context.out.line(format!("also sent with this id by {others}: see --sender"))?;
        }
        Ok(())
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
