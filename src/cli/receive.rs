//! `backbone receive`: read an inbox without losing what was read.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use reqwest::Method;
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use super::api::{Api, Call, Failure, Who, wait_before};
use super::context::Context;
use super::error::CliError;
use super::follow;
use super::interrupt::Interrupt;
use super::output::{Output, count, on_one_line, printable};

/// Messages taken when `--max` does not say.
const MAX_DEFAULT: u64 = 100;

/// Most messages and longest wait of one call (docs/contract.md, section 4).
const CALL_MESSAGES_MAX: u64 = 1000;
const CALL_WAIT_MAX: Duration = Duration::from_secs(30);

/// Tries to acknowledge what has been printed, before it is given up and comes back.
const ACK_RETRIES: u32 = 5;

/// When a message counts as received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Ack {
    /// Once it is printed: what is not printed comes back
    After,
    /// When the router hands it over: faster, but what a kill or a cut connection swallows is gone
    Auto,
    /// Not at all: printed with its receipt, to be settled by POST /ack or /nack, or it comes back
    Never,
}

/// Read messages from your inbox
///
/// Messages are printed first and acknowledged then: a kill at any time loses none (but may repeat some, with the same
/// id). Reads what is there and ends; --wait waits for the first, --follow goes on until Ctrl-C, over a WebSocket, and
/// waits for a router that restarts.
#[derive(Debug, Args)]
pub(crate) struct Receive {
    /// At most this many [default: 100; without end with --follow]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max: Option<u64>,
    /// Wait up to this many seconds for the first message
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u64,
    /// Go on until Ctrl-C (or --max messages)
    #[arg(long, short)]
    follow: bool,
    /// When a message counts as received
    #[arg(long, value_enum, default_value_t = Ack::After)]
    ack: Ack,
    /// Seconds to settle a message in before it comes back, 1 to 3600
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=3600))]
    lease: u32,
}

/// The answer of `GET /receive`, its messages as they came.
#[derive(Deserialize)]
struct Batch<'a> {
    #[serde(borrow)]
    messages: Vec<&'a RawValue>,
}

/// What people are shown of a message.
#[derive(Deserialize)]
pub(super) struct Shown<'a> {
    #[serde(borrow)]
    topic: Option<Cow<'a, str>>,
    #[serde(borrow)]
    sender: Cow<'a, str>,
    #[serde(borrow)]
    sent_at: Cow<'a, str>,
    message: &'a RawValue,
    #[serde(default)]
    deliveries: u64,
}

#[derive(Deserialize)]
struct WithReceipt {
    receipt: Option<String>,
}

#[derive(Deserialize)]
struct Settled {
    #[serde(default)]
    unknown: Vec<String>,
}

impl Receive {
    pub(crate) async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let inbox = Inbox { api: context.api()?, who: context.client()?, ack: self.ack, lease: self.lease };
        let max = self.max.unwrap_or(if self.follow { u64::MAX } else { MAX_DEFAULT });
        let mut interrupt = Interrupt::listen()?;
        let taken = if self.follow && self.ack == Ack::After && self.max.is_none() {
            follow::follow(&inbox.api, &inbox.who, context, &mut interrupt).await?
        } else if self.follow {
            inbox.follow(context, max, &mut interrupt).await?
        } else {
            inbox.take(context, max, Duration::from_secs(self.wait), &mut interrupt).await?
        };
        if taken == 0 {
            context.out.note("no messages");
        } else if self.ack == Ack::Never {
            context.out.note(format!("{} not acknowledged: back in {} s", count(taken, "message"), self.lease));
        }
        Ok(())
    }
}

/// An inbox, and how it is read.
struct Inbox {
    api: Api,
    who: Who,
    ack: Ack,
    lease: u32,
}

impl Inbox {
    /// Takes what is there, up to `max`; waits for the first message.
    async fn take(
        &self,
        context: &mut Context,
        max: u64,
        wait: Duration,
        interrupt: &mut Interrupt,
    ) -> Result<u64, CliError> {
        let deadline = Instant::now() + wait;
        let mut taken = 0;
        while taken < max && !interrupt.is_set() {
            let left = if taken == 0 { deadline.saturating_duration_since(Instant::now()) } else { Duration::ZERO };
            let call = self.next(max - taken, left);
            let Some(answer) = interrupt.or(self.api.call(&call)).await else { break };
            let got = self.print_and_settle(context, &answer?).await?;
            taken += got;
            // Whole seconds are what can be asked for; less than one left is none.
            if got == 0 && (taken > 0 || left < Duration::from_secs(1)) {
                break;
            }
        }
        Ok(taken)
    }

    /// Takes what comes, until `max` or an interrupt, by long polls: a socket's credit cannot end at a number, and its
    /// receipts do not outlive it. Waits for a router that is away, once it has been there.
    async fn follow(&self, context: &mut Context, max: u64, interrupt: &mut Interrupt) -> Result<u64, CliError> {
        let (mut taken, mut failed) = (0, 0);
        let mut reached = false;
        while taken < max && !interrupt.is_set() {
            let call = self.next(max - taken, CALL_WAIT_MAX);
            let Some(answer) = interrupt.or(self.api.call(&call)).await else { break };
            match answer {
                Ok(answer) => {
                    if failed > 0 {
                        context.out.note("the router is back");
                    }
                    (reached, failed) = (true, 0);
                    taken += self.print_and_settle(context, &answer).await?;
                }
                Err(failure) if passes(&failure, reached) => {
                    if failed == 0 {
                        context.out.note(format!("{failure}; waiting for it"));
                    }
                    let wait = wait_before(failed, &failure);
                    failed += 1;
                    interrupt.or(tokio::time::sleep(wait)).await;
                }
                Err(failure) => return Err(failure.into()),
            }
        }
        Ok(taken)
    }

    fn next(&self, max: u64, wait: Duration) -> Call {
        let wait = Duration::from_secs(wait.min(CALL_WAIT_MAX).as_secs());
        let call = Call::new(Method::GET, &["receive"], &self.who)
            .query("max", max.min(CALL_MESSAGES_MAX))
            .query("wait", wait.as_secs())
            .waiting(wait);
        match self.ack {
            Ack::Auto => call.query("ack", "auto"),
            Ack::After | Ack::Never => call.query("ack", "manual").query("lease", self.lease),
        }
    }

    /// Prints a batch, sees it through to stdout, and only then acknowledges it. What nobody reads goes back.
    async fn print_and_settle(&self, context: &mut Context, answer: &[u8]) -> Result<u64, CliError> {
        let batch: Batch<'_> = serde_json::from_slice(answer)
            .map_err(|error| CliError::failed(format!("the router's answer cannot be read: {error}")))?;
        let printed = batch
            .messages
            .iter()
            .try_for_each(|message| print(&mut context.out, message))
            .and_then(|()| context.out.flush());
        if self.ack == Ack::After && !batch.messages.is_empty() {
            let verb = if printed.is_ok() { "ack" } else { "nack" };
            let settled = self.settle(context, verb, &batch.messages).await;
            // A closed stdout is what the caller must hear of; what could not be sent back comes back by itself.
            printed?;
            settled?;
        }
        Ok(batch.messages.len() as u64)
    }

    async fn settle(&self, context: &Context, verb: &str, messages: &[&RawValue]) -> Result<(), CliError> {
        let receipts: Vec<String> = messages
            .iter()
            .filter_map(|message| serde_json::from_str::<WithReceipt>(message.get()).ok()?.receipt)
            .collect();
        let call = Call::new(Method::POST, &[verb], &self.who).json(json!({"receipts": receipts}).to_string());
        // Settling twice does no harm: the second time the receipts are unknown.
        let answer = self.api.call_patiently(&call, ACK_RETRIES, true, |_, _| ()).await.map_err(|failure| {
            let many = count(receipts.len() as u64, "message");
            CliError::failed(format!("{many} printed but not acknowledged, and will come back: {failure}"))
        })?;
        let unknown = serde_json::from_slice::<Settled>(&answer).map_or(0, |settled| settled.unknown.len());
        if unknown > 0 && verb == "ack" {
            context.out.note(format!(
                "{} came too late to be acknowledged (the router restarted, or the lease of {} s was over): may come again",
                count(unknown as u64, "message"),
                self.lease
            ));
        }
        Ok(())
    }
}

/// Whether a failure is worth waiting for.
pub(super) fn passes(failure: &Failure, reached: bool) -> bool {
    match failure {
        Failure::Unreachable(_) => reached,
        Failure::Broken(_) => true,
        Failure::Refused(problem) => matches!(problem.status, 429 | 503),
    }
}

pub(super) fn print(out: &mut Output, message: &RawValue) -> Result<(), CliError> {
    if out.json {
        return out.json_as_is(message.get().as_bytes());
    }
    let shown: Shown<'_> = serde_json::from_str(message.get())
        .map_err(|error| CliError::failed(format!("the router sent a message that cannot be read: {error}")))?;
    let again = if shown.deliveries > 1 { format!(" (delivery {})", shown.deliveries) } else { String::new() };
    out.line(shown.line(&again))
}

impl Shown<'_> {
    /// One message for people, on one line: when, from whom, on what (and a mark), and what.
    pub(super) fn line(&self, mark: &str) -> String {
        let topic = printable(self.topic.as_deref().unwrap_or("(broadcast)"));
        let (at, sender) = (printable(&self.sent_at), printable(&self.sender));
        format!("{at}  {sender}  {topic}{mark}  {}", on_one_line(self.message.get()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::Arc;

    use parking_lot::Mutex;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn printed(json: bool, message: &str) -> String {
        let sink = Sink::default();
        let mut out = Output::to(json, Box::new(sink.clone()));
        let message: &RawValue = serde_json::from_str(message).expect("JSON");
        print(&mut out, message).expect("written");
        out.flush().expect("written");
        String::from_utf8(sink.0.lock().clone()).expect("UTF-8")
    }

    #[test]
    fn a_message_is_one_line_for_people_and_for_programs() {
        let message = "{\"id\":\"1\",\"topic\":\"a.b\",\"sender\":\"noc-c2\",\"sent_at\":\"T\",\
            \"message\":{\n\"n\": 1.0},\"receipt\":\"r\",\"deliveries\":2}";
        assert_eq!(printed(false, message), "T  noc-c2  a.b (delivery 2)  { \"n\": 1.0}\n");
        assert_eq!(printed(true, message), message.replace('\n', " ") + "\n");
        let broadcast = r#"{"id":"1","sender":"s","sent_at":"T","broadcast":true,"message":"x","deliveries":1}"#;
        assert_eq!(printed(false, broadcast), "T  s  (broadcast)  \"x\"\n");
    }
}
