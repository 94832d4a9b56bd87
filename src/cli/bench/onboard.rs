//! `onboard`: clients a second, each with a pattern of its own; afterwards some of them are put to use.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Instant;

use serde::Deserialize;

use super::Options;
use super::load::{Run, Tasks};
use super::payload::{Payload, numbers};
use super::report::Report;
use super::scenarios::report;
use super::target::{Caller, Party, Target, unexpected};
use crate::cli::error::CliError;
use crate::cli::interrupt::Interrupt;

/// Connections, unless told otherwise.
pub(super) const CONNECTIONS: usize = 16;

/// Every how many-th client is kept in mind, to send and receive a message afterwards.
const SAMPLED_EVERY: u64 = 50;

/// Bytes of such a message.
const SAMPLE_BYTES: usize = 100;

/// Seconds to wait for it.
const SAMPLE_WAIT_S: u32 = 10;

/// The part of a 201 that is of use.
#[derive(Deserialize)]
struct Created<'a> {
    client_id: &'a str,
    secret: &'a str,
}

/// Clients to try out, with their numbers.
type Samples = Rc<RefCell<Vec<(u64, Party)>>>;

/// Begins now, for so many clients or seconds.
pub(super) fn begin(options: &Options, seconds: f64, interrupt: &Interrupt) -> Rc<Run> {
    let limited = Options { messages: Some(options.clients), ..options.clone() };
    Run::begin(&limited, seconds, 0, interrupt)
}

/// Runs the scenario.
pub(super) async fn onboard(target: &Target, options: &Options, interrupt: &Interrupt) -> Result<Report, CliError> {
    let connections = options.connections.unwrap_or(CONNECTIONS);
    let samples = Samples::default();
    let run = begin(options, options.seconds, interrupt);
    let mut tasks = Tasks::new(&run);
    let made: Rc<RefCell<Vec<String>>> = Rc::default();
    for _ in 0..connections {
        let (caller, id) = (target.onboarder(), target.run.clone());
        tasks.spawn_sender(create(Rc::clone(&run), caller, id, Rc::clone(&samples), Rc::clone(&made)));
    }
    let outcome = tasks.finish("onboarding", options.json, |run| run.accepted.get()).await;
    made.take().into_iter().for_each(|id| target.note_made(id));
    outcome?;
    let took = run.last_accepted.get() - run.started;
    let created = run.accepted.get();
    let what = format!("POST /clients over {connections} connections, a pattern each");
    let mut report = report("onboard", what, &run, "clients", created, took, "request");
    report.verdict = try_out(target, &samples.take()).await;
    Ok(report)
}

async fn create(
    run: Rc<Run>,
    mut caller: Caller,
    name: String,
    samples: Samples,
    made: Rc<RefCell<Vec<String>>>,
) -> Result<(), CliError> {
    while let Some(numbers) = run.take(1) {
        let number = numbers.start;
        let body =
            format!(r#"{{"client_id":"bench-{name}-{number}","subscriptions":["bench.{name}.onboard.{number}"]}}"#);
        let asked = Instant::now();
        let answer = caller.call(body.as_bytes()).await?;
        if answer.status != 201 {
            return Err(unexpected(&answer));
        }
        run.times.borrow_mut().add(asked.elapsed());
        let created: Created<'_> = serde_json::from_slice(answer.body)
            .map_err(|error| CliError::failed(format!("the router's 201 cannot be read: {error}")))?;
        made.borrow_mut().push(created.client_id.to_owned());
        if number.is_multiple_of(SAMPLED_EVERY) {
            samples.borrow_mut().push((number, Party::new(created.client_id.to_owned(), created.secret)));
        }
        run.accept(numbers);
    }
    Ok(())
}

/// Lets every sampled client send a message to itself and read it.
async fn try_out(target: &Target, samples: &[(u64, Party)]) -> Result<String, String> {
    let failed = |party: &Party, why: &dyn std::fmt::Display| format!("client {} is of no use: {why}", party.id);
    for (number, party) in samples {
        let payload = Payload::new(&target.topic(&format!("onboard.{number}")), SAMPLE_BYTES);
        let mut body = Vec::new();
        payload.write(*number..*number + 1, &mut body);
        let mut sender = target.single_sender(party);
        let status = sender.call(&body).await.map_err(|error| failed(party, &error))?.status;
        if status != 202 {
            return Err(failed(party, &format!("its message was answered {status}")));
        }
        let mut receiver = target.receiver(party, SAMPLE_WAIT_S);
        let answer = receiver.call(&[]).await.map_err(|error| failed(party, &error))?;
        let mut found = Vec::new();
        numbers(answer.body, payload.message_bytes(), |n| found.push(n));
        if found != [*number] {
            return Err(failed(party, &format!("it received {found:?} instead of its own message {number}")));
        }
    }
    Ok(format!("{} of them have each sent themselves a message and received it alone", samples.len()))
}
