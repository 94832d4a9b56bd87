//! Progress bars: on stderr, and only when it is a terminal.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// How often a bar is drawn again while nothing happens.
const TICK: Duration = Duration::from_millis(120);

/// A bar over `total` units, or a spinner with a count when the total is not known. Hidden unless stderr is a
/// terminal, and for programs.
pub(crate) fn bar(total: Option<u64>, what: &'static str, json: bool) -> ProgressBar {
    if json || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let (bar, template) = match total {
        Some(total) => (ProgressBar::new(total), "{msg} [{bar:30}] {human_pos}/{human_len} ({per_sec}, {eta} left)"),
        None => (ProgressBar::new_spinner(), "{spinner} {msg} {human_pos} ({per_sec})"),
    };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = bar.with_style(style.progress_chars("=> ")).with_message(what);
    bar.enable_steady_tick(TICK);
    bar
}

/// A bar over the bytes of a file.
pub(crate) fn bytes(total: u64, what: &'static str, json: bool) -> ProgressBar {
    let bar = bar(Some(total), what, json);
    let template = "{msg} [{bar:30}] {bytes}/{total_bytes} ({bytes_per_sec}, {eta} left)";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}
