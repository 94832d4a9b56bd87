//! How a command ends badly: one line on stderr, and an exit code.

use std::io::Write as _;
use std::process::ExitCode;

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// The arguments make no sense together. Exit 2.
    #[error("{0}")]
    Usage(String),
    /// Refused or failed. Exit 1.
    #[error("{0}")]
    Failed(String),
    /// Nobody reads stdout any more (`| head`). Quiet, exit 0.
    #[error("stdout is closed")]
    StdoutClosed,
}

impl CliError {
    /// Wrong usage: says what, and what to write instead.
    pub(crate) fn usage(text: impl Into<String>) -> Self {
        Self::Usage(text.into())
    }

    /// Refused or failed: says why, and what to do next.
    pub(crate) fn failed(text: impl Into<String>) -> Self {
        Self::Failed(text.into())
    }

    /// Writes the one line to stderr and gives the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        let code = match self {
            Self::StdoutClosed => return ExitCode::SUCCESS,
            Self::Failed(_) => 1,
            Self::Usage(_) => 2,
        };
        // There is nobody to tell when stderr is closed; the exit code still says it.
        let _ = writeln!(std::io::stderr(), "error: {}", one_line(&self.to_string()));
        ExitCode::from(code)
    }
}

/// `text` on one line, without control characters, which could drive a terminal.
pub(crate) fn one_line(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join("; ").chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_one_line_whatever_it_says() {
        assert_eq!(one_line("a\n\n  b\r\nc\u{1b}[31m"), "a; b; c\u{fffd}[31m");
    }
}
