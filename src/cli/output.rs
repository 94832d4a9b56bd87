//! What goes to stdout: tables for people, JSON lines for programs. Nothing else ever does.

use std::io::{self, IsTerminal as _, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;

use super::error::CliError;

/// Bytes held back before they are written, so that a thousand messages are not a thousand system calls.
const BUFFER_BYTES: usize = 64 * 1024;

/// Where a command writes its data.
pub(crate) struct Output {
    /// Whether `--json` was given.
    pub(crate) json: bool,
    sink: Box<dyn Write + Send>,
    buffer: Vec<u8>,
}

impl Output {
    /// Writes to stdout.
    pub(crate) fn stdout(json: bool) -> Self {
        Self::to(json, Box::new(io::stdout()))
    }

    /// Writes to `sink`.
    pub(crate) fn to(json: bool, sink: Box<dyn Write + Send>) -> Self {
        Self { json, sink, buffer: Vec::new() }
    }

    /// One line of text or of ready JSON.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub(crate) fn line(&mut self, line: impl AsRef<[u8]>) -> Result<(), CliError> {
        self.buffer.extend_from_slice(line.as_ref());
        self.buffer.push(b'\n');
        if self.buffer.len() >= BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    /// One value as one line of JSON.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub(crate) fn json_line(&mut self, value: &impl Serialize) -> Result<(), CliError> {
        let line = serde_json::to_vec(value)
            .map_err(|error| CliError::failed(format!("cannot print the answer as JSON: {error}")))?;
        self.line(line)
    }

    /// A JSON document as it came, on one line: line breaks between its tokens become blanks (strings have none).
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub(crate) fn json_as_is(&mut self, document: &[u8]) -> Result<(), CliError> {
        let one_line = document.trim_ascii().iter().map(|&b| if matches!(b, b'\n' | b'\r') { b' ' } else { b });
        self.line(one_line.collect::<Vec<u8>>())
    }

    /// A table, without lines around it: it reads well, and `grep` and `awk` can take it apart.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub(crate) fn table(&mut self, table: &Table) -> Result<(), CliError> {
        for line in table.lines() {
            self.line(line.trim_end())?;
        }
        Ok(())
    }

    /// Writes what is held back.
    ///
    /// # Errors
    /// When stdout cannot be written.
    pub(crate) fn flush(&mut self) -> Result<(), CliError> {
        let written = self.sink.write_all(&self.buffer).and_then(|()| self.sink.flush());
        self.buffer.clear();
        written.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => CliError::StdoutClosed,
            _ => CliError::failed(format!("cannot write to stdout: {error}")),
        })
    }

    /// Something for a person to know, on stderr. Programs that asked for `--json` are not bothered.
    pub(crate) fn note(&self, text: impl AsRef<str>) {
        if !self.json {
            // Best effort: a note nobody can read is no failure.
            let _ = writeln!(io::stderr(), "{}", text.as_ref());
        }
    }
}

/// An empty table with these column heads.
pub(crate) fn table<const N: usize>(heads: [&str; N]) -> Table {
    let mut table = plain_table();
    table.set_header(heads.map(str::to_uppercase));
    trim_left(&mut table);
    table
}

/// A table of names and values, one pair a row.
pub(crate) fn pairs<'a>(rows: impl IntoIterator<Item = (&'a str, String)>) -> Table {
    let mut table = plain_table();
    for (name, value) in rows {
        table.add_row([name.to_owned(), printable(&value)]);
    }
    trim_left(&mut table);
    table
}

fn plain_table() -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    // Fit a terminal; never wrap what another program reads.
    let fit = io::stdout().is_terminal();
    table.set_content_arrangement(if fit { ContentArrangement::Dynamic } else { ContentArrangement::Disabled });
    table
}

/// No blank before the first column, so that lines start with their content.
fn trim_left(table: &mut Table) {
    if let Some(first) = table.column_mut(0) {
        first.set_padding((0, 1));
    }
}

/// `text` without control characters: what a client chose must not drive a terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// The same on one line.
pub(crate) fn on_one_line(text: &str) -> String {
    printable(&text.replace(['\n', '\r', '\t'], " "))
}

/// A number with thin groups of three: `1,234,567`.
pub(crate) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 message`, `2 messages`.
pub(crate) fn count(number: u64, one: &str) -> String {
    format!("{} {one}{}", grouped(number), if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_closed_stdout_is_told_apart_from_a_failure() {
        let mut out = Output::to(false, Box::new(Closed));
        assert!(out.line("x").is_ok(), "held back");
        assert!(matches!(out.flush(), Err(CliError::StdoutClosed)));
    }

    #[test]
    fn tables_start_at_the_left_edge_and_have_no_trailing_blanks() {
        let mut t = table(["id", "state"]);
        t.add_row(["noc-c2", "running"]);
        let lines: Vec<String> = t.lines().map(|line| line.trim_end().to_owned()).collect();
        assert_eq!(lines, ["ID      STATE", "noc-c2  running"]);
    }

    #[test]
    fn numbers_are_grouped() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number), text);
        }
        assert_eq!(count(1, "message"), "1 message");
        assert_eq!(count(2000, "message"), "2,000 messages");
    }

    #[test]
    fn nothing_printed_can_drive_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\u{9b}c"), "a\u{fffd}[2Jb\u{fffd}c");
    }
}
