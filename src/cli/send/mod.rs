//! `backbone send` and `backbone notify`: one message, or many from newline-delimited JSON.

mod bulk;

use clap::Args;
use reqwest::Method;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::api::{Api, Call, Failure, Who};
use super::context::Context;
use super::error::CliError;
use super::input::{self, Given, Input};
use crate::envelope::MessageId;

/// Most messages in a batch: more do not make it faster, and cost a refused batch more.
const BATCH_MAX: u16 = 1000;

/// How messages are sent, one or many.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Send MESSAGE as a JSON string even if it is JSON
    #[arg(long, conflicts_with = "ndjson")]
    text: bool,
    /// Many messages, one a line; implied when the first line is a whole JSON value and more follow
    #[arg(long)]
    ndjson: bool,
    /// Messages in one request, 1 to 1000 (NDJSON)
    #[arg(long, default_value_t = 500, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(BATCH_MAX)))]
    batch: u16,
    /// Leave out this many lines at the start: goes on where another run stopped (NDJSON)
    #[arg(long, default_value_t = 0, value_name = "LINES")]
    skip: u64,
    /// Lines without an id get PREFIX-<line number>, so that a run can be repeated and nothing is doubled (NDJSON)
    #[arg(long, value_name = "PREFIX")]
    id_prefix: Option<String>,
    /// How often to try again while the router is busy or away (429, 503, a cut connection)
    #[arg(long, default_value_t = 8, value_name = "N")]
    retries: u32,
}

/// Send a message to a topic, or many from NDJSON
///
/// MESSAGE is any JSON value, sent byte for byte; what is not JSON is sent as a JSON string, so that `backbone send
/// a.b hello` sends "hello". `-` reads it from stdin, `@FILE` from a file; a literal string that starts with @ is
/// written '"@home"'.
///
/// Many at once: `backbone send @FILE` or `-` reads a whole message a line, {"topic":…,"message":…,"id"?:…};
/// `backbone send TOPIC @FILE` reads a value a line, all for TOPIC. They are sent in their order, in batches, and each
/// gets an id here before it goes out, so that a repeated batch is routed once.
#[derive(Debug, Args)]
pub(crate) struct Send {
    /// Where to: dot-separated words, such as soar.noc.slocum.unit-397
    topic: Option<String>,
    /// What: JSON, or text, or - for stdin, or @FILE
    #[arg(allow_negative_numbers = true)]
    message: Option<String>,
    /// The message's id, for you to recognise it and to send it again without harm [default: a fresh UUIDv7]
    #[arg(long)]
    id: Option<String>,
    #[command(flatten)]
    options: Options,
}

/// Send a message to every client, yourself included
///
/// MESSAGE is as with `send`. NDJSON has a value a line.
#[derive(Debug, Args)]
pub(crate) struct Notify {
    /// What: JSON, or text, or - for stdin, or @FILE
    #[arg(allow_negative_numbers = true)]
    message: Option<String>,
    /// The message's id [default: a fresh UUIDv7]
    #[arg(long)]
    id: Option<String>,
    #[command(flatten)]
    options: Options,
}

/// Where messages go.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Target {
    /// `/send`, all to one topic.
    Topic(String),
    /// `/send`, each line to its own.
    TopicOfLine,
    /// `/notify`.
    Everyone,
}

impl Target {
    fn path(&self) -> &'static str {
        if *self == Self::Everyone { "notify" } else { "send" }
    }
}

/// A message as the API takes it.
#[derive(Debug, Serialize)]
struct Outgoing<'a> {
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    topic: Option<&'a str>,
    message: &'a RawValue,
}

/// The 202.
#[derive(Debug, Deserialize)]
struct Accepted {
    accepted: u64,
    duplicates: u64,
}

impl Send {
    pub(crate) async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let (target, given) = self.what()?;
        deliver(context, target, given, self.id.as_deref(), &self.options).await
    }

    fn what(&self) -> Result<(Target, Given), CliError> {
        let ndjson = self.options.ndjson;
        Ok(match (self.topic.as_deref(), self.message.as_deref()) {
            (Some(topic), Some(message)) if ndjson && input::is_elsewhere(message) => {
                (Target::Topic(topic.into()), Given::Lines(input::open(message)?))
            }
            (Some(topic), Some(message)) if !ndjson => {
                (Target::Topic(topic.into()), input::message(message, self.options.text)?)
            }
            (Some(source), None) if input::is_elsewhere(source) && !self.options.text => {
                (Target::TopicOfLine, Given::Lines(input::open(source)?))
            }
            (Some(topic), None) if ndjson => (Target::Topic(topic.into()), Given::Lines(input::open("-")?)),
            (None, None) if ndjson => (Target::TopicOfLine, Given::Lines(input::open("-")?)),
            (Some(_), Some(_)) => return Err(CliError::usage("--ndjson reads from - (stdin) or @FILE")),
            _ => {
                return Err(CliError::usage(
                    "what to send? backbone send TOPIC MESSAGE, or backbone send @FILE with a message a line",
                ));
            }
        })
    }
}

impl Notify {
    pub(crate) async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let given = match self.message.as_deref() {
            Some(message) if self.options.ndjson && input::is_elsewhere(message) => Given::Lines(input::open(message)?),
            None if self.options.ndjson => Given::Lines(input::open("-")?),
            Some(message) if !self.options.ndjson => input::message(message, self.options.text)?,
            Some(_) => return Err(CliError::usage("--ndjson reads from - (stdin) or @FILE")),
            None => return Err(CliError::usage("what to say? backbone notify MESSAGE")),
        };
        deliver(context, Target::Everyone, given, self.id.as_deref(), &self.options).await
    }
}

async fn deliver(
    context: &mut Context,
    target: Target,
    given: Given,
    id: Option<&str>,
    options: &Options,
) -> Result<(), CliError> {
    let (api, who) = (context.api()?, context.client()?);
    match given {
        Given::One(message) => send_one(context, &api, &who, &target, &message, id, options.retries).await,
        Given::Lines(_) if id.is_some() => Err(CliError::usage(
            "--id is for one message; with NDJSON, put an \"id\" into each line or use --id-prefix",
        )),
        Given::Lines(Input { reader, bytes }) => {
            bulk::Bulk { api, who, target, options }.run(context, reader, bytes).await
        }
    }
}

async fn send_one(
    context: &mut Context,
    api: &Api,
    who: &Who,
    target: &Target,
    message: &RawValue,
    id: Option<&str>,
    retries: u32,
) -> Result<(), CliError> {
    // Our own id from the start: a try whose answer is lost can then be repeated without doubling the message.
    let id = id.map_or_else(|| MessageId::generate().to_string(), str::to_owned);
    let topic = match target {
        Target::Topic(topic) => Some(topic.as_str()),
        Target::TopicOfLine | Target::Everyone => None,
    };
    let body = serde_json::to_vec(&Outgoing { id: &id, topic, message })
        .map_err(|error| CliError::failed(format!("the message cannot be written as JSON: {error}")))?;
    let call = Call::new(Method::POST, &[target.path()], who).json(body);
    let answer = api
        .call_patiently(&call, retries, false, |failure, wait| {
            context.out.note(format!("{failure}; waiting {:.1} s", wait.as_secs_f64()));
        })
        .await?;
    if context.out.json {
        return context.out.json_as_is(&answer);
    }
    if read_accepted(&answer)?.duplicates > 0 {
        context.out.note("this id had been sent before: the message is routed once");
    }
    context.out.line(format!("accepted {id}"))
}

fn read_accepted(answer: &[u8]) -> Result<Accepted, Failure> {
    serde_json::from_slice(answer)
        .map_err(|error| Failure::Broken(format!("the router's answer cannot be read: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser as _;

    fn what(arguments: &[&str]) -> Result<(Target, Given), CliError> {
        match Cli::try_parse_from(["backbone", "send"].iter().chain(arguments)).expect("parses").command {
            Some(Command::Send(send)) => send.what(),
            other => panic!("parsed as {other:?}"),
        }
    }

    #[test]
    fn one_message_goes_to_its_topic() {
        for (argument, json) in [("hello", "\"hello\""), ("{\"a\": 1}", "{\"a\": 1}"), ("-1", "-1")] {
            let arguments = ["a.b", argument];
            let Ok((target, Given::One(message))) = what(&arguments) else { panic!("{argument}") };
            assert_eq!((target, message.get()), (Target::Topic("a.b".into()), json));
        }
        let Ok((_, Given::One(message))) = what(&["a.b", "1", "--text"]) else { panic!("text") };
        assert_eq!(message.get(), "\"1\"");
    }

    #[test]
    fn many_come_from_a_file_with_or_without_a_topic() {
        let file = concat!("@", env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        for (arguments, target) in [
            (vec![file], Target::TopicOfLine),
            (vec!["--ndjson", file], Target::TopicOfLine),
            (vec!["a.b", file, "--ndjson"], Target::Topic("a.b".into())),
        ] {
            let Ok((found, Given::Lines(_))) = what(&arguments) else { panic!("{arguments:?}") };
            assert_eq!(found, target, "{arguments:?}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_wrong_usage() {
        for arguments in [vec![], vec!["a.b"], vec!["a.b", "hello", "--ndjson"]] {
            assert!(matches!(what(&arguments), Err(CliError::Usage(_))), "{arguments:?}");
        }
    }
}
