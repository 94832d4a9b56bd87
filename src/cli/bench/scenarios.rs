//! Throughput: `send`, `pipe` and `fanout`.

use std::rc::Rc;
use std::time::Duration;

use super::Options;
use super::load::{Run, Tasks, receive, send};
use super::payload::Payload;
use super::report::{Report, Times};
use super::target::{Caller, Target};
use crate::cli::error::CliError;
use crate::cli::interrupt::Interrupt;

/// Messages under way to the slowest inbox before senders wait for it: enough that nobody runs dry, few enough that
/// the end of a run is not a long drain. That of `pipe` is [`Options::window`].
const FANOUT_WINDOW: u64 = 5_000;

/// Connections that read one inbox in `pipe`.
const PIPE_RECEIVERS: usize = 2;

/// Seconds that a receiver waits for messages at a time.
const RECEIVE_WAIT_S: u32 = 1;

/// `POST /send`, one message a request, many connections, routed to one inbox. What arrived is counted afterwards.
pub(super) async fn single(target: &Target, options: &Options, interrupt: &Interrupt) -> Result<Report, CliError> {
    let connections = options.connections.unwrap_or(64);
    let topic = target.topic("send");
    let receiver = target.onboard("send-in", std::slice::from_ref(&topic)).await?;
    let sender = target.onboard("send-out", &[]).await?;
    let payload = Payload::new(&topic, options.bytes);
    let message_bytes = payload.message_bytes();
    let callers = (0..connections).map(|_| target.single_sender(&sender)).collect();
    let run = post_singly(options, options.seconds, callers, payload, interrupt).await?;
    let mut tasks = Tasks::new(&run);
    tasks.spawn(receive(Rc::clone(&run), target.receiver(&receiver, RECEIVE_WAIT_S), 0, message_bytes, |_, _| ()));
    tasks.finish("counting what arrived", options.json, |run| run.ledger.borrow().arrived()).await?;
    let took = run.last_accepted.get() - run.started;
    let what = format!("POST /send, one message a request, {connections} connections, routed to one inbox");
    Ok(report("send", what, &run, "messages", run.accepted.get(), took, "request"))
}

/// The hot loop of `single`, also for the baseline: the same load in the same way.
pub(super) async fn post_singly(
    options: &Options,
    seconds: f64,
    callers: Vec<Caller>,
    payload: Payload,
    interrupt: &Interrupt,
) -> Result<Rc<Run>, CliError> {
    let payload = Rc::new(payload);
    let run = Run::begin(options, seconds, 1, interrupt);
    let mut tasks = Tasks::new(&run);
    for caller in callers {
        tasks.spawn_sender(send(Rc::clone(&run), caller, Rc::clone(&payload), 1, u64::MAX));
    }
    tasks.finish("sending", options.json, |run| run.accepted.get()).await?;
    Ok(run)
}

/// NDJSON batches in, `receive?max=1000` out, at the same time.
pub(super) async fn pipe(target: &Target, options: &Options, interrupt: &Interrupt) -> Result<Report, CliError> {
    let connections = options.connections.unwrap_or(4);
    let topic = target.topic("pipe");
    let receiver = target.onboard("pipe-in", std::slice::from_ref(&topic)).await?;
    let sender = target.onboard("pipe-out", &[]).await?;
    let payload = Rc::new(Payload::new(&topic, options.bytes));
    let run = Run::begin(options, options.seconds, 1, interrupt);
    let mut tasks = Tasks::new(&run);
    for _ in 0..connections {
        tasks.spawn_sender(send(
            Rc::clone(&run),
            target.sender(&sender),
            Rc::clone(&payload),
            options.batch,
            options.window(),
        ));
    }
    for _ in 0..PIPE_RECEIVERS {
        let caller = target.receiver(&receiver, RECEIVE_WAIT_S);
        tasks.spawn(receive(Rc::clone(&run), caller, 0, payload.message_bytes(), |_, _| ()));
    }
    tasks.finish("through the pipe", options.json, |run| run.ledger.borrow().arrived()).await?;
    let what = format!(
        "NDJSON batches of {} in over {connections} connections, receive?max=1000 out over {PIPE_RECEIVERS}",
        options.batch
    );
    Ok(report_arrived("pipe", what, &run, "messages", "request"))
}

/// One sender, many inboxes.
pub(super) async fn fanout(target: &Target, options: &Options, interrupt: &Interrupt) -> Result<Report, CliError> {
    let connections = options.connections.unwrap_or(2);
    let topic = target.topic("fanout");
    let mut receivers = Vec::new();
    for number in 0..options.inboxes {
        receivers.push(target.onboard(&format!("fanout-in-{number}"), std::slice::from_ref(&topic)).await?);
    }
    let sender = target.onboard("fanout-out", &[]).await?;
    let payload = Rc::new(Payload::new(&topic, options.bytes));
    let run = Run::begin(options, options.seconds, receivers.len(), interrupt);
    let mut tasks = Tasks::new(&run);
    for _ in 0..connections {
        let caller = target.sender(&sender);
        tasks.spawn_sender(send(Rc::clone(&run), caller, Rc::clone(&payload), options.batch, FANOUT_WINDOW));
    }
    for (inbox, receiver) in receivers.iter().enumerate() {
        let caller = target.receiver(receiver, RECEIVE_WAIT_S);
        tasks.spawn(receive(Rc::clone(&run), caller, inbox, payload.message_bytes(), |_, _| ()));
    }
    let inboxes = receivers.len() as u64;
    tasks.finish("fanning out", options.json, move |run| run.ledger.borrow().arrived() / inboxes).await?;
    let what = format!("NDJSON batches of {} in, each message to {inboxes} inboxes, all of them read", options.batch);
    Ok(report_arrived("fanout", what, &run, "deliveries", "request"))
}

/// What a run has found: what arrived, until the last of it did.
pub(super) fn report_arrived(
    scenario: &'static str,
    what: String,
    run: &Run,
    unit: &'static str,
    timed: &'static str,
) -> Report {
    let took = run.last_arrived.get() - run.started;
    report(scenario, what, run, unit, run.ledger.borrow().arrived(), took, timed)
}

/// What a run has found; `count` is what it is about.
pub(super) fn report(
    scenario: &'static str,
    what: String,
    run: &Run,
    unit: &'static str,
    count: u64,
    took: Duration,
    timed: &'static str,
) -> Report {
    let refused = match run.refused.get() {
        0 => String::new(),
        n => format!("; {n} requests were told to wait (429 or 503) and repeated"),
    };
    Report {
        scenario,
        what: what + &refused,
        count,
        unit,
        took,
        timed,
        times: run.times.replace(Times::new()),
        verdict: run.ledger.borrow().verdict(),
        compared: None,
        resident_bytes: None,
    }
}
