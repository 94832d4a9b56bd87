//! How a source publishes on without waiting for each result, and keeps its order.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::oneshot;

/// Handed over with a batch; the broker drops it when the batch has its place in the queue, or will have none.
#[derive(Debug, Default)]
pub struct Turn {
    given_on: Option<oneshot::Sender<()>>,
}

/// Resolves when the turn was given on: the next batch may be published. Again and again, once it was.
#[derive(Debug)]
pub struct GivenOn(oneshot::Receiver<()>);

impl Turn {
    /// One, and what tells that it was given on.
    pub fn new() -> (Self, GivenOn) {
        let (sender, receiver) = oneshot::channel();
        (Self { given_on: Some(sender) }, GivenOn(receiver))
    }

    /// Whether somebody waits for it, to publish behind what it came with.
    pub fn is_awaited(&self) -> bool {
        self.given_on.is_some()
    }
}

impl Future for GivenOn {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.0.is_terminated() {
            return Poll::Ready(());
        }
        // Nothing is ever sent: dropping the other end is the sign.
        Pin::new(&mut self.0).poll(context).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn it_is_given_on_when_it_is_dropped() {
        let (turn, mut given_on) = Turn::new();
        assert_eq!((&mut given_on).now_or_never(), None);
        drop(turn);
        assert_eq!((&mut given_on).now_or_never(), Some(()));
        assert_eq!((&mut given_on).now_or_never(), Some(()), "it stays given on");
    }
}
