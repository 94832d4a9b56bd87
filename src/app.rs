//! Composition root.

/// Placeholder: replaced by the composition root.
pub fn serve() -> std::process::ExitCode {
    std::process::ExitCode::FAILURE
}
