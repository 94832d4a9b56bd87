//! Whoever looks on while the router works: a console with its feed, and Prometheus.

use std::io;
use std::time::Duration;

use tokio::io::AsyncReadExt as _;
use tokio::task::AbortHandle;

use super::target::Target;
use crate::cli::error::CliError;

/// How often the metrics are asked for: three times as often as Prometheus does unless told otherwise.
const SCRAPED_EVERY: Duration = Duration::from_secs(5);

/// Looks on until it is dropped.
pub(super) struct Watchers([AbortHandle; 2]);

impl Watchers {
    /// A console that follows all messages under `tail`, and a scrape of the metrics now and then.
    ///
    /// # Errors
    /// When the router does not let them.
    pub(super) async fn start(target: &Target, tail: &str) -> Result<Self, CliError> {
        let mut feed = target.console_feed(tail).await?;
        let console = async move {
            let mut bytes = vec![0; 64 * 1024];
            // Ends with the router.
            while feed.read(&mut bytes).await? > 0 {}
            Ok::<_, io::Error>(())
        };
        let mut scraper = target.scraper();
        // The first at once, so that a router that refuses is noticed.
        scrape(&mut scraper).await?;
        let scraping = async move {
            loop {
                tokio::time::sleep(SCRAPED_EVERY).await;
                scrape(&mut scraper).await?;
            }
            #[expect(unreachable_code, reason = "it gives the task its type")]
            Ok::<_, CliError>(())
        };
        Ok(Self([tokio::task::spawn_local(console).abort_handle(), tokio::task::spawn_local(scraping).abort_handle()]))
    }

    /// Whether they are still there.
    ///
    /// # Errors
    /// When one of them has ended: what was measured was not watched.
    pub(super) fn check(&self) -> Result<(), CliError> {
        if self.0.iter().any(AbortHandle::is_finished) {
            return Err(CliError::failed(
                "the console's feed or the scrape of the metrics ended before the measurement",
            ));
        }
        Ok(())
    }
}

impl Drop for Watchers {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

async fn scrape(scraper: &mut super::target::Caller) -> Result<(), CliError> {
    let answer = scraper.call(&[]).await?;
    match answer.status {
        200 => Ok(()),
        _ => Err(super::target::unexpected(&answer)),
    }
}
