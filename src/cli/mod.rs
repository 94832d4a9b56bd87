//! The command line, `backbone` (docs/contract.md, section 9): one file per group of commands, all of them over the
//! HTTP API and nothing else, but for `serve` and `migrate`.
//!
//! # Layout
//! - [`run`] parses the arguments, dispatches, and turns the outcome into an exit code: 0 done, 1 refused or failed
//!   with one line on stderr, 2 wrong usage.
//! - `context` finds the router and the credentials; `api` speaks HTTP; `output` prints tables or JSON lines.
//! - `client`, `send`, `receive`, `dead`, `trace`, `token`, `status`, `listen`, `completions`: the commands.
//! - `migrate` moves what lies in one broker to the other; works on the data directory of a stopped router.
//! - `child` starts a router of its own for `demo` and `bench`.
//!
//! Data goes to stdout and only data; everything said to a person goes to stderr. A closed stdout (`| head`) ends a
//! command quietly.

mod api;
mod bench;
mod child;
mod client;
mod completions;
mod context;
mod dead;
mod demo;
mod error;
mod follow;
mod input;
mod interrupt;
mod lines;
mod listen;
mod migrate;
mod output;
mod progress;
mod receive;
mod send;
mod serve;
mod status;
#[cfg(test)]
mod tests;
mod token;
mod trace;

use std::process::ExitCode;

use clap::parser::ValueSource;
use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use context::{Context, Globals};
use error::CliError;

/// A message router between the command-and-control systems of partner organisations.
///
/// Without a command it starts the router, as `serve` does.
#[derive(Debug, Parser)]
#[command(name = "backbone", version, disable_help_subcommand = true)]
#[command(after_help = "Exit codes: 0 done, 1 refused or failed (one line on stderr says why), 2 wrong usage.\n\
    Settings are also read from a .env file in this directory or one above it.")]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start the router (the default); configured by environment variables, see .env.example
    Serve(serve::Serve),
    /// Onboard, list, change and remove clients (admin)
    #[command(subcommand)]
    Client(client::ClientCommand),
    /// Send a message to a topic, or many from NDJSON
    Send(send::Send),
    /// Send a message to every client
    Notify(send::Notify),
    /// Read messages from your inbox
    Receive(receive::Receive),
    /// List, replay and purge dead letters
    #[command(subcommand)]
    Dead(dead::DeadCommand),
    /// Show the way of a recent message through the backbone
    Trace(trace::Trace),
    /// Get a bearer token that stands for your client id and secret
    Token(token::Token),
    /// Print a fresh key for SOAR_TOKEN_SECRET
    TokenKey(token::TokenKey),
    /// Show whether the router is well, and what it has done
    Status(status::Status),
    /// Move all queues from the embedded broker to RabbitMQ, or back (while the router is stopped)
    Migrate(migrate::Migrate),
    /// Receive webhooks, verify their signatures, and print what arrives
    Listen(listen::Listen),
    /// Measure a router: throughput, latency, fan-out, onboarding
    Bench(bench::Bench),
    /// Watch a router at work: three clients and live traffic in a temporary directory
    Demo(demo::Demo),
    /// Print a completion script for your shell
    Completions(completions::Completions),
}

/// Runs the command line of this process: the whole of `main`.
pub fn run() -> ExitCode {
    // Before the arguments, since some of them default to variables that the file may set.
    if let Err(error) = dotenvy::dotenv()
        && !error.not_found()
    {
        return CliError::failed(format!("cannot read .env: {error}; mend the line or remove it")).report();
    }
    let parsed = Cli::command().try_get_matches().and_then(|matches| {
        let url_was_typed = matches.value_source("url") == Some(ValueSource::CommandLine);
        Cli::from_arg_matches(&matches).map(|cli| (cli, url_was_typed))
    });
    let (cli, url_was_typed) = match parsed {
        Ok(parsed) => parsed,
        Err(answer) => {
            // Help and version are "errors" of code 0. That nobody reads them is no failure.
            let _ = answer.print();
            return ExitCode::from(u8::try_from(answer.exit_code()).unwrap_or(2));
        }
    };
    let command = cli.command.unwrap_or_else(|| Command::Serve(serve::Serve::default()));
    match &command {
        Command::Serve(serve) => return serve.run(),
        Command::Bench(bench) => {
            if let Some(code) = bench.serve_baseline() {
                return code;
            }
        }
        _ => {}
    }
    match execute(Context::new(cli.globals, url_was_typed), command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}

fn execute(mut context: Context, command: Command) -> Result<(), CliError> {
    // One thread: the commands wait for the network, and the load generator shares two cores with the router.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| CliError::failed(format!("cannot start: {error}")))?;
    let result = runtime.block_on(async {
        match command {
            Command::Serve(_) => unreachable!("run() has dispatched it"),
            Command::Client(command) => command.run(&mut context).await,
            Command::Send(command) => command.run(&mut context).await,
            Command::Notify(command) => command.run(&mut context).await,
            Command::Receive(command) => command.run(&mut context).await,
            Command::Dead(command) => command.run(&mut context).await,
            Command::Trace(command) => command.run(&mut context).await,
            Command::Token(command) => command.run(&mut context).await,
            Command::TokenKey(command) => command.run(&mut context),
            Command::Status(command) => command.run(&mut context).await,
            Command::Migrate(command) => command.run(&mut context).await,
            Command::Listen(command) => command.run(&mut context).await,
            Command::Bench(command) => command.run(&mut context).await,
            Command::Demo(command) => command.run(&mut context).await,
            Command::Completions(command) => command.run(&mut context),
        }
    });
    // A thread may still wait for stdin: it must not hold the process back.
    runtime.shutdown_background();
    result.and_then(|()| context.out.flush())
}
