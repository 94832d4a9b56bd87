//! `backbone serve`, the default command.

use std::io::Read as _;
use std::process::ExitCode;

use clap::Args;

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
        crate::app::serve()
    }
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
