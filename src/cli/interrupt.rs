//! Ctrl-C and SIGTERM for commands that must tidy up before they end.

use std::future::Future;
use std::pin::pin;

use futures_util::future::{Either, select};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::error::CliError;

/// Set by the first Ctrl-C or SIGTERM. The second ends the process at once, for those who do not want to wait.
#[derive(Clone)]
pub(crate) struct Interrupt {
    is_set: watch::Receiver<bool>,
}

impl Interrupt {
    /// Listens from now on.
    ///
    /// # Errors
    /// When the system does not let it.
    pub(crate) fn listen() -> Result<Self, CliError> {
        let cannot = |error: std::io::Error| CliError::failed(format!("cannot listen for Ctrl-C: {error}"));
        let mut interrupts = signal(SignalKind::interrupt()).map_err(cannot)?;
        let mut terminations = signal(SignalKind::terminate()).map_err(cannot)?;
        let (set, is_set) = watch::channel(false);
        tokio::spawn(async move {
            loop {
                select(pin!(interrupts.recv()), pin!(terminations.recv())).await;
                if set.send_replace(true) {
                    // 128 + SIGINT, as a shell reports a process that the signal ended.
                    std::process::exit(130);
                }
            }
        });
        Ok(Self { is_set })
    }

    /// Whether it came.
    pub(crate) fn is_set(&self) -> bool {
        *self.is_set.borrow()
    }

    /// Returns when it comes.
    pub(crate) async fn wait(&mut self) {
        // The sender lives in a task that only ends with the process.
        let _ = self.is_set.wait_for(|set| *set).await;
    }

    /// What `work` brings, or `None` when the interrupt comes first; `work` is then dropped.
    pub(crate) async fn or<F: Future>(&mut self, work: F) -> Option<F::Output> {
        match select(pin!(self.wait()), pin!(work)).await {
            Either::Left(_) => None,
            Either::Right((output, _)) => Some(output),
        }
    }
}
