//! `backbone serve`, the default command.

use std::io::{Read as _, Write as _};
use std::process::ExitCode;

use clap::Args;

use crate::config::Config;

/// Start the router
///
/// Configured by environment variables and .env: see .env.example.
#[derive(Debug, Default, Args)]
pub(crate) struct Serve {
    /// Shut down when stdin ends: a router that was started as a child does not outlive its parent
    #[arg(long, hide = true)]
    until_stdin_ends: bool,
}

impl Serve {
    pub(crate) fn run(&self) -> ExitCode {
        if self.until_stdin_ends {
            end_with_stdin();
        }
        let config = match Config::from_env() {
            Ok(config) => config,
            // Every wrong variable on a line of its own.
            Err(errors) => return say(&errors),
        };
        match crate::app::serve(config) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => say(&error),
        }
    }
}

fn say(error: &dyn std::fmt::Display) -> ExitCode {
    // Nobody can be told when stderr is closed; the exit code still says it.
    let _ = writeln!(std::io::stderr(), "{error}");
    ExitCode::FAILURE
}

/// Ends this process, as an operator would, once stdin ends: for children, whose parent holds the other end and may
/// be killed at any time.
pub(crate) fn end_with_stdin() {
    // Detached on purpose: it lives as long as the process.
    std::thread::spawn(|| {
        let mut scrap = [0; 256];
        while std::io::stdin().read(&mut scrap).is_ok_and(|n| n > 0) {}
        // The process itself always exists.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM);
    });
}
