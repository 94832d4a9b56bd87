//! What to measure a router on RabbitMQ against: the same queues in bare lapin, in the same run. And `amqp` and
//! `amqp-latency`: the same load from AMQP clients, with the router where the bare pipeline has its relays.

use std::rc::Rc;
use std::time::Instant;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;

use super::Options;
use super::latency::{Due, RATE, tick};
use super::load::{Run, Tasks};
use super::onboard;
use super::payload::{Payload, numbers};
use super::report::Report;
use super::scenarios::{report, report_arrived};
use super::target::Target;
use crate::broker::BrokerError;
use crate::broker::amqp::bare::{Client, Declarer, Entry, Exit, Grounds, Pipeline};
use crate::cli::error::CliError;
use crate::cli::interrupt::Interrupt;
use crate::config::QueueType;

/// Messages a second, as many as go through, under the window of `pipe`.
pub(super) async fn rate(options: &Options, seconds: f64, interrupt: &Interrupt) -> Result<Report, CliError> {
    let run = Run::begin(options, seconds, 1, interrupt);
    let payload = Rc::new(Payload::new("bare.message", options.bytes));
    let (pipeline, entry, exit) = open(options).await?;
    freely(&run, options, entry, exit, payload, pipeline.close()).await?;
    let what = "a bare lapin pipeline of three queues, without a router".to_owned();
    Ok(report_arrived("bare", what, &run, "messages", "-"))
}

/// Times at a steady rate, from when a message is due to its arrival.
pub(super) async fn latency(options: &Options, seconds: f64, interrupt: &Interrupt) -> Result<Report, CliError> {
    let payload = Rc::new(Payload::new("bare.message", options.bytes));
    let (pipeline, entry, exit) = open(options).await?;
    let run = Run::begin(options, seconds, 1, interrupt);
    let rate = options.rate.unwrap_or(RATE);
    steadily(&run, options, rate, entry, exit, payload, pipeline.close()).await?;
    let took = run.last_accepted.get() - run.started;
    let what = format!("a bare lapin pipeline of three queues at {rate} messages/s");
    Ok(report("bare-latency", what, &run, "messages", run.accepted.get(), took, "publish to delivery"))
}

/// Messages a second from one AMQP client to another, under the window of `pipe`.
pub(super) async fn clients_rate(
    target: &Target,
    options: &Options,
    interrupt: &Interrupt,
) -> Result<Report, CliError> {
    let (client, entry, exit, payload) = clients(target, options, "amqp").await?;
    let run = Run::begin(options, options.seconds, 1, interrupt);
    freely(&run, options, entry, exit, payload, client.close()).await?;
    let what = "published to an outbox and consumed from an inbox by AMQP clients".to_owned();
    Ok(report_arrived("amqp", what, &run, "messages", "-"))
}

/// The same at a steady rate, from when a message is due to its arrival.
pub(super) async fn clients_latency(
    target: &Target,
    options: &Options,
    interrupt: &Interrupt,
) -> Result<Report, CliError> {
    let (client, entry, exit, payload) = clients(target, options, "amqp-latency").await?;
    let run = Run::begin(options, options.seconds, 1, interrupt);
    let rate = options.rate.unwrap_or(RATE);
    steadily(&run, options, rate, entry, exit, payload, client.close()).await?;
    let took = run.last_accepted.get() - run.started;
    let what = format!("published to an outbox and consumed from an inbox by AMQP clients at {rate} messages/s");
    Ok(report("amqp-latency", what, &run, "messages", run.accepted.get(), took, "publish to delivery"))
}

/// Clients' queues a second, over as many channels as `onboard` has connections.
pub(super) async fn onboard(options: &Options, seconds: f64, interrupt: &Interrupt) -> Result<Report, CliError> {
    let channels = options.connections.unwrap_or(onboard::CONNECTIONS);
    let (url, kind, name) = place(options);
    let grounds = Grounds::open(url, kind, &name).await.map_err(|error| failed(&error))?;
    let mut declarers = Vec::new();
    for _ in 0..channels {
        declarers.push(grounds.declarer().await.map_err(|error| failed(&error))?);
    }
    let run = onboard::begin(options, seconds, interrupt);
    let mut tasks = Tasks::new(&run);
    for declarer in declarers {
        tasks.spawn_sender(declare(Rc::clone(&run), declarer));
    }
    let outcome = tasks.finish("declaring bare queues", options.json, |run| run.accepted.get()).await;
    let (took, count) = (run.last_accepted.get() - run.started, run.accepted.get());
    let closed = grounds.close(run.taken()).await.map_err(|error| failed(&error));
    outcome.and(closed)?;
    let what = format!("four queues of a client in bare lapin over {channels} channels, without a router");
    let mut report = report("bare-onboard", what, &run, "clients", count, took, "client");
    report.verdict = Ok("each was declared and bound".to_owned());
    Ok(report)
}

async fn declare(run: Rc<Run>, declarer: Declarer) -> Result<(), CliError> {
    while let Some(numbers) = run.take(1) {
        let asked = Instant::now();
        declarer.declare(numbers.start).await.map_err(|error| failed(&error))?;
        run.times.borrow_mut().add(asked.elapsed());
        run.accept(numbers);
    }
    Ok(())
}

/// Where bare queues are made, of what type, and with what their names begin.
fn place(options: &Options) -> (&str, QueueType, String) {
    let kind = match options.queue_type.as_deref() {
        Some("classic") => QueueType::Classic,
        _ => QueueType::Quorum,
    };
    (options.broker.as_deref().unwrap_or_default(), kind, format!("backbone-bench-{:08x}", rand::random::<u32>()))
}

/// Publishes and takes as fast as it goes, and then closes what is between.
async fn freely(
    run: &Rc<Run>,
    options: &Options,
    entry: Entry,
    exit: Exit,
    payload: Rc<Payload>,
    close: impl Future<Output = Result<(), BrokerError>>,
) -> Result<(), CliError> {
    let mut tasks = Tasks::new(run);
    tasks.spawn_sender(produce(Rc::clone(run), entry, Rc::clone(&payload), options.window()));
    tasks.spawn(take(Rc::clone(run), exit, payload.message_bytes(), |_, _| ()));
    finish(tasks, "through queues", options, close).await
}

/// Publishes and takes at a steady rate, and then closes what is between.
async fn steadily(
    run: &Rc<Run>,
    options: &Options,
    rate: u64,
    entry: Entry,
    exit: Exit,
    payload: Rc<Payload>,
    close: impl Future<Output = Result<(), BrokerError>>,
) -> Result<(), CliError> {
    let due = Rc::new(Due::at(rate, run));
    let mut tasks = Tasks::new(run);
    tasks.spawn_sender(tick(Rc::clone(run), Rc::clone(&due), rate));
    tasks.spawn_sender(produce_due(Rc::clone(run), Rc::clone(&due), entry, Rc::clone(&payload)));
    tasks.spawn(take(Rc::clone(run), exit, payload.message_bytes(), move |run, number| due.arrived(run, number)));
    finish(tasks, "at a steady rate", options, close).await
}

/// Waits for the tasks, and closes whatever became of them.
async fn finish(
    tasks: Tasks,
    what: &'static str,
    options: &Options,
    close: impl Future<Output = Result<(), BrokerError>>,
) -> Result<(), CliError> {
    let outcome = tasks.finish(what, options.json, |run| run.ledger.borrow().arrived()).await;
    let closed = close.await.map_err(|error| failed(&error));
    outcome.and(closed)
}

/// A client that publishes and one that consumes, on the router.
async fn clients(
    target: &Target,
    options: &Options,
    name: &'static str,
) -> Result<(Client, Entry, Exit, Rc<Payload>), CliError> {
    let topic = target.topic(name);
    let receiver = target.onboard(&format!("{name}-in"), std::slice::from_ref(&topic)).await?;
    let sender = target.onboard(&format!("{name}-out"), &[]).await?;
    let (url, outbox, inbox) = (place(options).0, format!("{}-outbox", sender.id), format!("{}-inbox", receiver.id));
    let opened = Client::open(url, &outbox, &inbox).await;
    let (client, entry, exit) = opened.map_err(|error| failed(&error))?;
    Ok((client, entry, exit, Rc::new(Payload::new(&topic, options.bytes))))
}

async fn open(options: &Options) -> Result<(Pipeline, Entry, Exit), CliError> {
    let (url, kind, name) = place(options);
    Pipeline::open(url, kind, &name).await.map_err(|error| failed(&error))
}

fn failed(error: &BrokerError) -> CliError {
    CliError::failed(format!("bare queues: {}", crate::actors::describe(error)))
}

/// Publishes as fast as the window and the backlog allow.
async fn produce(run: Rc<Run>, entry: Entry, payload: Rc<Payload>, backlog: u64) -> Result<(), CliError> {
    let mut under_way = FuturesUnordered::new();
    loop {
        while under_way.len() < entry.window() && run.is_within(backlog) {
            let Some(numbers) = run.take(1) else { break };
            under_way.push(publish(&entry, &payload, numbers.start));
        }
        if let Some(confirmed) = under_way.next().await {
            let number = confirmed.map_err(|error| failed(&error))?;
            run.accept(number..number + 1);
        } else if run.is_over() || !run.has_more() {
            return Ok(());
        } else {
            run.wait_for_window(backlog).await;
        }
    }
}

/// Publishes what is due.
async fn produce_due(run: Rc<Run>, due: Rc<Due>, entry: Entry, payload: Rc<Payload>) -> Result<(), CliError> {
    let mut under_way = FuturesUnordered::new();
    loop {
        let more = due.more();
        while let Some(number) = due.take() {
            under_way.push(publish(&entry, &payload, number));
        }
        tokio::select! {
            Some(confirmed) = under_way.next(), if !under_way.is_empty() => {
                let number = confirmed.map_err(|error: BrokerError| failed(&error))?;
                run.accept(number..number + 1);
            }
            () = more, if !due.is_over() => {}
            else => return Ok(()),
        }
    }
}

fn publish(entry: &Entry, payload: &Payload, number: u64) -> impl Future<Output = Result<u64, BrokerError>> + use<> {
    let mut body = Vec::new();
    payload.write(number..number + 1, &mut body);
    let confirmed = entry.publish(body);
    async move { confirmed.await.map(|()| number) }
}

/// Takes what arrives into the ledger, until everything is here.
async fn take(run: Rc<Run>, mut exit: Exit, message_bytes: usize, seen: impl Fn(&Run, u64)) -> Result<(), CliError> {
    while !run.is_complete() && !run.is_silent() {
        // Looks at the clock now and then, for when nothing comes any more.
        let Ok(batch) = tokio::time::timeout(super::load::SHOWN_EVERY, exit.next()).await else { continue };
        for body in batch.map_err(|error| failed(&error))? {
            numbers(&body, message_bytes, |number| {
                seen(&run, number);
                run.ledger.borrow_mut().arrive(0, number);
            });
        }
        run.arrived_now();
    }
    Ok(())
}
