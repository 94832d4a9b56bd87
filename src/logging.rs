//! The log: env_logger on stderr, one line per event, and panics among them.

use std::sync::Once;

/// What is put before the configured filter: these crates tell at `info` what is not worth waking up for. The filter
/// itself comes later and so can ask for them again. A caller that does not speak HTTP is an error of its own, which it
/// must not be able to fill the log with.
const QUIET: &str = "lapin=warn,actix_server=warn,actix_http=warn,actix_http::h1::dispatcher=off,hyper=warn,\
                     reqwest=warn,rustls=warn,tracing=warn";

static PANIC_HOOK: Once = Once::new();

/// Starts the log with env_logger's `filter` (`RUST_LOG`). A second call changes nothing: tests start many routers in
/// one process.
pub fn init(filter: &str) {
    let started = env_logger::Builder::new()
        .parse_filters(&format!("{QUIET},{filter}"))
        .format_timestamp_millis()
        .target(env_logger::Target::Stderr)
        .try_init();
    if started.is_ok() {
        // Without this a panic would be a line of another shape on stderr, and be missing where the log goes.
        PANIC_HOOK.call_once(|| std::panic::set_hook(Box::new(|panic| log::error!("{panic}"))));
    }
}
