//! Newline-delimited JSON in bulk: batches in order, one under way at a time, each repeated with the same ids until
//! the router has said yes or no.

use std::io::{BufReader, Read};

use indicatif::ProgressBar;
use reqwest::Method;
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use super::{Options, Outgoing, Target, read_accepted};
use crate::cli::api::{Api, Call, Failure, Problem, Who};
use crate::cli::context::Context;
use crate::cli::error::CliError;
use crate::cli::interrupt::Interrupt;
use crate::cli::lines::{Line, read_in_background};
use crate::cli::output::count;
use crate::cli::progress;
use crate::envelope::MessageId;

/// A bulk transfer.
pub(super) struct Bulk<'a> {
    pub(super) api: Api,
    pub(super) who: Who,
    pub(super) target: Target,
    pub(super) options: &'a Options,
}

/// What has been done so far.
#[derive(Debug, Default)]
struct Done {
    accepted: u64,
    duplicates: u64,
    /// Every line up to this one is settled.
    line: u64,
}

/// A line of the file when each has its own topic.
#[derive(Deserialize)]
struct Whole<'a> {
    #[serde(borrow)]
    topic: Option<std::borrow::Cow<'a, str>>,
    #[serde(borrow)]
    id: Option<std::borrow::Cow<'a, str>>,
    #[serde(borrow, default, deserialize_with = "present")]
    message: Option<&'a RawValue>,
}

/// A member that is there, even if it is `null`, which is a message like any other.
fn present<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<&'de RawValue>, D::Error> {
    Deserialize::deserialize(deserializer).map(Some)
}

impl Bulk<'_> {
    /// Sends everything that `reader` has.
    pub(super) async fn run<R: Read + Send + 'static>(
        self,
        context: &mut Context,
        reader: BufReader<R>,
        bytes: Option<u64>,
    ) -> Result<(), CliError> {
        let json = context.out.json;
        let bar = match bytes {
            Some(bytes) => progress::bytes(bytes, "sending", json),
            None => progress::bar(None, "sent", json),
        };
        let mut done = Done { line: self.options.skip, ..Done::default() };
        let outcome = self.all(context, reader, bytes.is_some(), &bar, &mut done).await;
        bar.finish_and_clear();
        if let Err(error) = outcome {
            return Err(CliError::failed(format!("{error}; {}", self.how_to_go_on(&done))));
        }
        if json {
            return context.out.json_line(&json!({"accepted": done.accepted, "duplicates": done.duplicates}));
        }
        let duplicates = match done.duplicates {
            0 => String::new(),
            n => format!(", of which {n} had been sent before"),
        };
        context.out.line(format!("accepted {}{duplicates}", count(done.accepted, "message")))
    }

    async fn all<R: Read + Send + 'static>(
        &self,
        context: &Context,
        reader: BufReader<R>,
        bar_counts_bytes: bool,
        bar: &ProgressBar,
        done: &mut Done,
    ) -> Result<(), CliError> {
        let mut interrupt = Interrupt::listen()?;
        let mut chunks = read_in_background(reader, usize::from(self.options.batch));
        while let Some(Some(chunk)) = interrupt.or(chunks.recv()).await {
            let mut chunk = chunk.map_err(CliError::Failed)?;
            chunk.lines.retain(|line| line.number > self.options.skip);
            self.batch(context, &chunk.lines, bar, done).await?;
            bar.inc(if bar_counts_bytes { chunk.bytes } else { chunk.lines.len() as u64 });
        }
        // A batch under way was finished first, so what is said about where it stopped is exact.
        if interrupt.is_set() { Err(CliError::failed("interrupted")) } else { Ok(()) }
    }

    /// Sends these lines: in one request, or in several where the router takes only shorter ones.
    async fn batch(
        &self,
        context: &Context,
        lines: &[Line],
        bar: &ProgressBar,
        done: &mut Done,
    ) -> Result<(), CliError> {
        let mut waiting = vec![lines];
        while let Some(lines) = waiting.pop() {
            let Some(last) = lines.last() else { continue };
            let mut body = Vec::with_capacity(lines.iter().map(|line| line.text.len() + 64).sum());
            for line in lines {
                self.render(line, &mut body)?;
            }
            let call = Call::new(Method::POST, &[self.target.path()], &self.who).ndjson(body);
            let on_wait = |failure: &Failure, wait: std::time::Duration| {
                bar.suspend(|| context.out.note(format!("{failure}; waiting {:.1} s", wait.as_secs_f64())));
            };
            match self.api.call_patiently(&call, self.options.retries, done.accepted > 0, on_wait).await {
                Ok(answer) => {
                    let answer = read_accepted(&answer)?;
                    done.accepted += answer.accepted;
                    done.duplicates += answer.duplicates;
                    done.line = last.number;
                }
                Err(Failure::Refused(problem)) if problem.status == 413 && lines.len() > 1 => {
                    let (first_half, second_half) = lines.split_at(lines.len() / 2);
                    waiting.extend([second_half, first_half]);
                }
                Err(Failure::Refused(problem)) => return Err(CliError::Failed(in_lines(&problem, lines))),
                Err(failure) => return Err(failure.into()),
            }
        }
        Ok(())
    }

    /// Writes a line of input as the API takes it, with an id.
    fn render(&self, line: &Line, body: &mut Vec<u8>) -> Result<(), CliError> {
        let wrong = |why: &str| CliError::failed(format!("line {}: {why}", line.number));
        let (topic, id, message) = match &self.target {
            Target::TopicOfLine => {
                let whole: Whole<'_> = serde_json::from_slice(&line.text).map_err(|error| {
                    wrong(&format!("is no {{\"topic\":…,\"message\":…}} ({error}); to send values, name a TOPIC"))
                })?;
                let Some(topic) = whole.topic else {
                    return Err(wrong("has no \"topic\"; to send the lines themselves, name a TOPIC"));
                };
                (Some(topic), whole.id, whole.message.ok_or_else(|| wrong("has no \"message\""))?)
            }
            Target::Topic(_) | Target::Everyone => {
                let message: &RawValue =
                    serde_json::from_slice(&line.text).map_err(|error| wrong(&format!("is not JSON ({error})")))?;
                let topic = if let Target::Topic(topic) = &self.target { Some(topic.as_str().into()) } else { None };
                (topic, None, message)
            }
        };
        let id = id.unwrap_or_else(|| match &self.options.id_prefix {
            Some(prefix) => format!("{prefix}-{}", line.number).into(),
            None => MessageId::generate().to_string().into(),
        });
        serde_json::to_writer(&mut *body, &Outgoing { id: &id, topic: topic.as_deref(), message })
            .map_err(|error| wrong(&format!("cannot be written as JSON: {error}")))?;
        body.push(b'\n');
        Ok(())
    }

    fn how_to_go_on(&self, done: &Done) -> String {
        match done.line {
            0 => "nothing was accepted before it".into(),
            line => format!(
                "{} accepted before it, up to line {line}: go on with --skip {line}",
                count(done.accepted, "message")
            ),
        }
    }
}

/// A refused batch, in terms of the file's lines: a pointer such as `/3/topic` is into the batch.
fn in_lines(problem: &Problem, lines: &[Line]) -> String {
    let first = problem.errors.iter().find_map(|error| {
        let (index, member) = error.pointer.strip_prefix('/')?.split_once('/').unwrap_or((&error.pointer[1..], ""));
        let line = lines.get(index.parse::<usize>().ok()?)?;
        Some(format!("line {}: {member}{}{}", line.number, if member.is_empty() { "" } else { " " }, error.detail))
    });
    match (first, lines.first(), lines.last()) {
        (Some(first), ..) if problem.errors.len() == 1 => first,
        (Some(first), ..) => format!("{first} (and {} more in its batch)", problem.errors.len() - 1),
        (None, Some(from), Some(to)) => format!("lines {} to {}: {problem}", from.number, to.number),
        (None, ..) => problem.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(arguments: &[&str]) -> Options {
        use clap::Parser as _;
        match crate::cli::Cli::try_parse_from(["backbone", "send"].iter().chain(arguments)).expect("parses").command {
            Some(crate::cli::Command::Send(send)) => send.options,
            other => panic!("parsed as {other:?}"),
        }
    }

    fn rendered(target: Target, options: &Options, text: &str) -> Result<String, CliError> {
        let api = Api::new("http://127.0.0.1:1", None).expect("a URL");
        let bulk = Bulk { api, who: Who::Anyone, target, options };
        let mut body = Vec::new();
        bulk.render(&Line { number: 7, text: text.into() }, &mut body)?;
        Ok(String::from_utf8(body).expect("UTF-8"))
    }

    #[test]
    fn a_line_keeps_its_message_byte_for_byte_and_gets_an_id() {
        let with_prefix = options(&["--id-prefix", "run1"]);
        assert_eq!(
            rendered(Target::TopicOfLine, &with_prefix, r#"{"message":{"b": 1.0},"topic":"a.b","x":0}"#)
                .expect("valid"),
            "{\"id\":\"run1-7\",\"topic\":\"a.b\",\"message\":{\"b\": 1.0}}\n"
        );
        assert_eq!(
            rendered(Target::TopicOfLine, &with_prefix, r#"{"id":"own","topic":"a","message":null}"#).expect("valid"),
            "{\"id\":\"own\",\"topic\":\"a\",\"message\":null}\n"
        );
        assert_eq!(
            rendered(Target::Everyone, &with_prefix, "[1, 2]").expect("valid"),
            "{\"id\":\"run1-7\",\"message\":[1, 2]}\n"
        );
        let generated = rendered(Target::Topic("t".into()), &options(&[]), "1").expect("valid");
        assert_eq!(generated.len(), "{\"id\":\"\",\"topic\":\"t\",\"message\":1}\n".len() + 36, "{generated}");
    }

    #[test]
    fn a_wrong_line_is_named() {
        for (text, why) in
            [("{\"message\":1}", "has no \"topic\""), ("{\"topic\":\"a\"}", "has no \"message\""), ("x", "is no")]
        {
            let error = rendered(Target::TopicOfLine, &options(&[]), text).expect_err("is wrong").to_string();
            assert!(error.starts_with("line 7: ") && error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_refusal_points_at_the_line_of_the_file() {
        let lines = [Line { number: 4, text: vec![] }, Line { number: 9, text: vec![] }];
        let problem = |json: &str| serde_json::from_str::<Problem>(json).expect("a problem");
        let one = problem(r#"{"status":422,"errors":[{"pointer":"/1/topic","detail":"has ' '"}]}"#);
        assert_eq!(in_lines(&one, &lines), "line 9: topic has ' '");
        let all = problem(r#"{"status":413,"code":"too_large","detail":"too long"}"#);
        assert_eq!(in_lines(&all, &lines), "lines 4 to 9: too long (413 too_large)");
    }
}
