//! `backbone bench`: the users' own load generator.
//!
//! It measures what a user sees, over HTTP, with 1 KiB messages and real fsyncs, and counts what arrived: a figure
//! whose messages were lost is worth nothing. Everything runs on one thread beside the router.

mod baseline;
mod latency;
mod load;
mod onboard;
mod payload;
mod report;
mod scenarios;
mod target;
mod wire;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::context::Context;
use super::error::CliError;
use super::interrupt::Interrupt;
use report::Report;
use target::Target;

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
    /// Onboarding clients with a pattern each
    Onboard,
    /// A bare durable handler under the load of `send`: the limit to compare with
    Baseline,
    /// All but the baseline
    All,
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
/// what arrived, and exits 1 if anything is missing or double.
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
    /// Sending connections [default: send 64, pipe 4, fanout 2, latency and onboard 16]
    #[arg(long, value_name = "N", value_parser = connections)]
    connections: Option<usize>,
    /// Bytes of a message
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = message_bytes)]
    bytes: usize,
    /// Messages in a request (pipe, fanout)
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    batch: u64,
    /// Inboxes (fanout)
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    inboxes: u32,
    /// Messages a second (latency)
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    rate: u64,
    /// Clients (onboard)
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    clients: u64,
    /// Measure the baseline before and after `send`, and say how near it comes
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
        use Scenario::{All, Fanout, Latency, Onboard, Pipe, Send};
        let chosen = self.scenarios.iter().flat_map(|scenario| match scenario {
            All => vec![Send, Pipe, Fanout, Latency, Onboard],
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

    /// Each scenario gets a router that has not worked yet: one's backlog is not another's load.
    async fn scenario(
        &self,
        context: &Context,
        scenario: Scenario,
        mut interrupt: Interrupt,
    ) -> Result<Vec<Report>, CliError> {
        let options = &self.options;
        if scenario == Scenario::Baseline {
            return Ok(vec![baseline::measure(options, options.seconds, &interrupt).await?]);
        }
        let with_baseline = options.baseline && scenario == Scenario::Send;
        let mut reports = Vec::new();
        if with_baseline {
            reports.push(baseline::measure(options, options.seconds / 2.0, &interrupt).await?);
        }
        let Some(target) = interrupt.or(Target::open(context, options)).await else {
            return Err(CliError::failed("interrupted before anything was measured"));
        };
        let mut target = target?;
        let in_memory = target.router.as_ref().is_some_and(|router| router.dir().is_in_memory());
        if in_memory && options.broker.is_none() {
            context.out.note("its directory lies in memory, where an fsync costs nothing: pass --dir on a disk");
        }
        let measured = match scenario {
            Scenario::Send => scenarios::single(&target, options, &interrupt).await,
            Scenario::Pipe => scenarios::pipe(&target, options, &interrupt).await,
            Scenario::Fanout => scenarios::fanout(&target, options, &interrupt).await,
            Scenario::Latency => latency::latency(&target, options, &interrupt).await,
            Scenario::Onboard => onboard::onboard(&target, options, &interrupt).await,
            Scenario::Baseline | Scenario::All => unreachable!("dealt with before"),
        };
        let resident_bytes = target.resident_bytes();
        // Whatever happened: what was made on somebody's router goes, and the child ends.
        let tidied = target.tidy_up(options.json).await;
        if let Some(router) = target.router.take() {
            router.stop().await;
        }
        let mut report = measured?;
        tidied?;
        report.resident_bytes = resident_bytes;
        if with_baseline {
            reports.push(baseline::measure(options, options.seconds / 2.0, &interrupt).await?);
            let limit = reports.iter().map(Report::per_s).sum::<f64>() / reports.len() as f64;
            report.ratio = Some(report.per_s() / limit);
        }
        reports.push(report);
        Ok(reports)
    }
}
