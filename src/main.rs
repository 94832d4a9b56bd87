//! `backbone`: the program. Everything is in the library; see `backbone::cli`.

use std::process::ExitCode;

/// Returns memory to the system sooner than the platform's allocator, and is quicker at many small messages.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    backbone::cli::run()
}
