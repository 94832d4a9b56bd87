//! `backbone completions SHELL`.

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use super::context::Context;
use super::error::CliError;

/// Print a completion script for your shell
///
/// For bash: backbone completions bash > ~/.local/share/bash-completion/completions/backbone
#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// Your shell
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(self, context: &mut Context) -> Result<(), CliError> {
        // Into memory first: the generator panics when its writer fails, which a closed stdout does.
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::Cli::command(), "backbone", &mut script);
        context.out.line(script.trim_ascii_end())
    }
}
