//! `backbone bench`: the users' own load generator.
//!
//! It measures what a user sees, over HTTP, with 1 KiB messages and real fsyncs, and counts what arrived: a figure
//! whose messages were lost is worth nothing. Everything runs on one thread beside the router.

mod bare;
mod baseline;
mod latency;
mod load;
mod onboard;
mod payload;
mod receiver;
mod report;
mod scenarios;
mod sockets;
mod target;
mod watched;
mod webhook;
mod wire;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::context::Context;
use super::error::CliError;
use super::interrupt::Interrupt;
use report::{Compared, Report};
use target::Target;
use watched::Watchers;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scenario {
    /// POST /send, one message a request, 64 connections, routed to one inbox
    Send,
    /// NDJSON batches in, receive?max=1000 out, at the same time
    Pipe,
    /// One message to many inboxes
    Fanout,
    /// Send to long-poll receive at a steady rate
    Latency,
    /// Messages in and out over a few WebSockets
    Ws,
    /// The same at a steady rate: send to receive
    WsLatency,
    /// From one AMQP client to another, on RabbitMQ
    Amqp,
    /// The same at a steady rate: publish to delivery
    AmqpLatency,
    /// Webhooks to one healthy receiver, 256 at once
    Webhook,
    /// 202 to webhook at a steady rate
    WebhookLatency,
    /// Onboarding clients with a pattern each
    Onboard,
    /// `pipe` while a console looks on and the metrics are scraped, against the same without
    Watched,
    /// `pipe` with the ways of messages kept, against the same without
    Traced,
    /// A bare durable handler under the load of `send`: the limit to compare with
    Baseline,
    /// All but the last three; those of AMQP clients on RabbitMQ only
    All,
}

/// How the router is run, or looked at, in what is compared.
#[derive(Debug, Clone, Copy)]
struct Variant {
    /// The ways of messages are kept.
    is_traced: bool,
    /// Others look on.
    is_watched: bool,
}

impl Variant {
    /// As it comes.
    const PLAIN: Self = Self { is_traced: true, is_watched: false };
}

/// What a scenario is compared with. Measured before and after it, for half of its time each.
#[derive(Debug, Clone, Copy)]
enum Yardstick {
    /// A bare durable handler.
    Handler,
    /// The three queues in bare lapin.
    BareRate,
    /// The same at a steady rate.
    BareLatency,
    /// Clients' queues in bare lapin.
    BareOnboard,
    /// A client that only signs and posts.
    BareCaller,
    /// `pipe` on a router that is run otherwise.
    Pipe(&'static str, Variant),
}

impl Scenario {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Measure a router: throughput, latency, fan-out, onboarding
///
/// Starts a router of its own in a temporary directory and removes it afterwards. To measure one that runs, name it by
/// --url and give its admin token; the clients that the bench makes there are removed at the end. Every scenario counts
/// what arrived, and exits 1 if anything is missing or double. Latencies at a steady rate leave out the first second.
#[derive(Debug, Clone, Args)]
pub(crate) struct Bench {
    /// What to measure
    #[arg(value_enum, default_value = "all")]
    scenarios: Vec<Scenario>,
    #[command(flatten)]
    options: Options,
    /// Be the baseline's server
    #[arg(long, hide = true)]
    serve_baseline: bool,
}

/// How much load, and where.
#[derive(Debug, Clone, Args)]
struct Options {
    /// Seconds of load for each scenario
    #[arg(long, default_value_t = 10.0, value_parser = seconds)]
    seconds: f64,
    /// Messages for each scenario, if that is less
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    messages: Option<u64>,
    /// Sending connections [default: send 64, pipe 4, fanout, ws and webhook 2, latencies and onboard 16]
    #[arg(long, value_name = "N", value_parser = connections)]
    connections: Option<usize>,
    /// Bytes of a message
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = message_bytes)]
    bytes: usize,
    /// Messages in a request or frame (pipe, fanout, ws, webhook)
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    batch: u64,
    /// Inboxes (fanout)
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    inboxes: u32,
    /// Messages a second [default: latency, ws-latency and amqp-latency 1000, webhook-latency 500]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000))]
    rate: Option<u64>,
    /// Clients (onboard)
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    clients: u64,
    /// Measure a baseline before and after, and say how near it comes: for send a bare durable handler; with RabbitMQ
    /// for pipe, amqp and the latencies three queues in bare lapin, for onboard clients' queues; for webhook a bare client that signs and posts, with RabbitMQ
    /// what a client pulls
    #[arg(long)]
    baseline: bool,
    /// The broker behind the router that is started: embedded, amqp://… or amqps://…
    #[arg(long, value_name = "URL")]
    broker: Option<String>,
    /// Its queue type: quorum or classic
    #[arg(long, value_name = "TYPE")]
    queue_type: Option<String>,
    /// Where the temporary directory is made: on the disk that is to be measured
    #[arg(long, value_name = "PATH")]
    dir: Option<PathBuf>,
    #[arg(skip)]
    json: bool,
}

/// Messages under way in `pipe` and `ws` before senders wait: enough that nobody runs dry, few enough that the end of a
/// run is not a long drain.
const WINDOW: u64 = 200_000;
const WINDOW_RABBITMQ: u64 = 20_000;

impl Options {
    /// Whether RabbitMQ is behind the router, as far as is known here.
    fn is_rabbitmq(&self) -> bool {
        self.broker.as_deref().is_some_and(|broker| broker != "embedded")
    }

    /// Messages under way before senders wait.
    fn window(&self) -> u64 {
        if self.is_rabbitmq() { WINDOW_RABBITMQ } else { WINDOW }
    }

    /// What to compare a scenario with.
    fn yardstick(&self, scenario: Scenario) -> Option<Yardstick> {
        let is_rabbitmq = self.is_rabbitmq();
        match scenario {
            Scenario::Watched => Some(Yardstick::Pipe("unwatched", Variant::PLAIN)),
            Scenario::Traced => Some(Yardstick::Pipe("untraced", Variant { is_traced: false, is_watched: false })),
            _ if !self.baseline => None,
            Scenario::Send => Some(Yardstick::Handler),
            Scenario::Pipe | Scenario::Amqp if is_rabbitmq => Some(Yardstick::BareRate),
            Scenario::Latency | Scenario::WsLatency | Scenario::AmqpLatency if is_rabbitmq => {
                Some(Yardstick::BareLatency)
            }
            Scenario::Onboard if is_rabbitmq => Some(Yardstick::BareOnboard),
            Scenario::Webhook if is_rabbitmq => Some(Yardstick::Pipe("pipe", Variant::PLAIN)),
            Scenario::Webhook => Some(Yardstick::BareCaller),
            _ => None,
        }
    }
}

fn seconds(text: &str) -> Result<f64, &'static str> {
    text.parse().ok().filter(|s| (0.1..=3600.0).contains(s)).ok_or("a number from 0.1 to 3600")
}

fn connections(text: &str) -> Result<usize, &'static str> {
    text.parse().ok().filter(|n| (1..=10_000).contains(n)).ok_or("a number from 1 to 10000")
}

fn message_bytes(text: &str) -> Result<usize, String> {
    let (least, most) = (payload::MESSAGE_BYTES_MIN, 1 << 20);
    text.parse().ok().filter(|n| (least..=most).contains(n)).ok_or(format!("a number from {least} to {most}"))
}

impl Bench {
    /// Serves as the baseline, if that is what it was started for.
    pub(super) fn serve_baseline(&self) -> Option<ExitCode> {
        self.serve_baseline.then(baseline::serve)
    }

    pub(crate) async fn run(mut self, context: &mut Context) -> Result<(), CliError> {
        self.options.json = context.out.json;
        let interrupt = Interrupt::listen()?;
        tokio::task::LocalSet::new().run_until(self.measure(context, interrupt)).await
    }

    fn chosen(&self) -> Vec<Scenario> {
        use Scenario::{
            All, Amqp, AmqpLatency, Fanout, Latency, Onboard, Pipe, Send, Webhook, WebhookLatency, Ws, WsLatency,
        };
        let is_rabbitmq = self.options.is_rabbitmq();
        let all = [Send, Pipe, Fanout, Latency, Ws, WsLatency, Amqp, AmqpLatency, Webhook, WebhookLatency, Onboard];
        let chosen = self.scenarios.iter().flat_map(|scenario| match scenario {
            All => all.into_iter().filter(|one| is_rabbitmq || !matches!(one, Amqp | AmqpLatency)).collect(),
            one => vec![*one],
        });
        chosen.collect()
    }

    async fn measure(&self, context: &mut Context, interrupt: Interrupt) -> Result<(), CliError> {
        let mut reports = Vec::new();
        for scenario in self.chosen() {
            let measured = self.scenario(context, scenario, interrupt.clone()).await;
            let measured = measured.map_err(|error| match error {
                CliError::Failed(why) => CliError::Failed(format!("{}: {why}", scenario.name())),
                other => other,
            })?;
            for report in measured {
                if context.out.json {
                    context.out.json_line(&report.to_json())?;
                    context.out.flush()?;
                }
                for remark in report::remarks(&report) {
                    context.out.note(remark);
                }
                reports.push(report);
            }
        }
        if !context.out.json {
            context.out.note("");
            context.out.table(&report::to_table(&reports))?;
        }
        context.out.flush()?;
        match reports.iter().find_map(|report| Some((report.scenario, report.verdict.as_ref().err()?))) {
            None => Ok(()),
            Some((scenario, why)) => Err(CliError::failed(format!("{scenario} is not as it should be: {why}"))),
        }
    }

    /// A scenario, and before and after it what it is compared with.
    async fn scenario(
        &self,
        context: &Context,
        scenario: Scenario,
        interrupt: Interrupt,
    ) -> Result<Vec<Report>, CliError> {
        if matches!(scenario, Scenario::Amqp | Scenario::AmqpLatency) && !self.options.is_rabbitmq() {
            return Err(CliError::usage(
                "only a router on RabbitMQ has AMQP clients: name its broker, --broker amqp://…",
            ));
        }
        let variant = Variant { is_watched: scenario == Scenario::Watched, ..Variant::PLAIN };
        let Some(yardstick) = self.options.yardstick(scenario) else {
            return Ok(vec![self.measured(context, scenario, variant, &self.options, &interrupt).await?]);
        };
        if context.url_was_typed && matches!(scenario, Scenario::Traced) {
            return Err(CliError::usage("traced starts routers of its own: leave out --url"));
        }
        let half = Options { seconds: self.options.seconds / 2.0, ..self.options.clone() };
        let before = self.yardstick(context, yardstick, &half, &interrupt).await?;
        let mut report = self.measured(context, scenario, variant, &self.options, &interrupt).await?;
        let after = self.yardstick(context, yardstick, &half, &interrupt).await?;
        let mut reports = vec![before, after];
        report.compared = Some(match yardstick {
            Yardstick::BareLatency => Compared::times(&report, &reports),
            _ => Compared::rates(&report, &reports),
        });
        reports.push(report);
        Ok(reports)
    }

    async fn yardstick(
        &self,
        context: &Context,
        yardstick: Yardstick,
        options: &Options,
        interrupt: &Interrupt,
    ) -> Result<Report, CliError> {
        match yardstick {
            Yardstick::Handler => baseline::measure(options, options.seconds, interrupt).await,
            Yardstick::BareRate => bare::rate(options, options.seconds, interrupt).await,
            Yardstick::BareLatency => bare::latency(options, options.seconds, interrupt).await,
            Yardstick::BareOnboard => bare::onboard(options, options.seconds, interrupt).await,
            Yardstick::BareCaller => webhook::bare(options, options.seconds, interrupt).await,
            Yardstick::Pipe(name, variant) => {
                let report = self.measured(context, Scenario::Pipe, variant, options, interrupt).await?;
                Ok(Report { scenario: name, ..report })
            }
        }
    }

    /// Each scenario gets a router that has not worked yet: one's backlog is not another's load.
    async fn measured(
        &self,
        context: &Context,
        scenario: Scenario,
        variant: Variant,
        options: &Options,
        interrupt: &Interrupt,
    ) -> Result<Report, CliError> {
        if scenario == Scenario::Baseline {
            return baseline::measure(options, options.seconds, interrupt).await;
        }
        let Some(target) = interrupt.clone().or(Target::open(context, options, variant)).await else {
            return Err(CliError::failed("interrupted before anything was measured"));
        };
        let mut target = target?;
        let in_memory = target.router.as_ref().is_some_and(|router| router.dir().is_in_memory());
        if in_memory && !options.is_rabbitmq() {
            context.out.note("its directory lies in memory, where an fsync costs nothing: pass --dir on a disk");
        }
        let measured = run(&target, scenario, variant, options, interrupt).await;
        let resident_bytes = target.resident_bytes();
        // Whatever happened: what was made on somebody's router goes, and the child ends.
        let tidied = target.tidy_up(options.json).await;
        if let Some(router) = target.router.take() {
            router.stop().await;
        }
        let mut report = measured?;
        tidied?;
        report.resident_bytes = resident_bytes;
        Ok(report)
    }
}

/// Puts the load on the router.
async fn run(
    target: &Target,
    scenario: Scenario,
    variant: Variant,
    options: &Options,
    interrupt: &Interrupt,
) -> Result<Report, CliError> {
    let watchers = if variant.is_watched { Some(Watchers::start(target, &target.topic("#")).await?) } else { None };
    let report = match scenario {
        Scenario::Send => scenarios::single(target, options, interrupt).await,
        Scenario::Pipe => scenarios::pipe(target, options, interrupt).await,
        Scenario::Watched => {
            scenarios::pipe(target, options, interrupt).await.map(|report| Report { scenario: "watched", ..report })
        }
        Scenario::Traced => {
            scenarios::pipe(target, options, interrupt).await.map(|report| Report { scenario: "traced", ..report })
        }
        Scenario::Fanout => scenarios::fanout(target, options, interrupt).await,
        Scenario::Latency => latency::latency(target, options, interrupt).await,
        Scenario::Ws => sockets::ws(target, options, interrupt).await,
        Scenario::WsLatency => sockets::latency(target, options, interrupt).await,
        Scenario::Amqp => bare::clients_rate(target, options, interrupt).await,
        Scenario::AmqpLatency => bare::clients_latency(target, options, interrupt).await,
        Scenario::Webhook => webhook::rate(target, options, interrupt).await,
        Scenario::WebhookLatency => webhook::latency(target, options, interrupt).await,
        Scenario::Onboard => onboard::onboard(target, options, interrupt).await,
        Scenario::Baseline | Scenario::All => unreachable!("dealt with before"),
    }?;
    watchers.as_ref().map_or(Ok(()), Watchers::check)?;
    Ok(report)
}
