//! How many bytes of messages pushers hold in memory, so that long messages and endpoints that hang do not add up.
//!
//! Each pusher may hold some megabytes. When all together hold much, each is down to little, and to one message at the
//! least, however long it is: nobody waits for somebody else's endpoint.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What one pusher may hold, in bytes.
const OWN_MAX: usize = 8 << 20;
/// What all may hold before each is down to [`OWN_MIN`].
const ALL_MAX: usize = 64 << 20;
/// What each may hold then.
const OWN_MIN: usize = 256 << 10;
/// What a message is taken for before there was one.
const SIZE_ASSUMED: usize = 64 << 10;
/// What a message costs besides its bytes, about.
const OVERHEAD: usize = 512;

/// The bytes that all pushers hold.
#[derive(Debug, Default)]
pub struct AllHands(AtomicUsize);

impl AllHands {
    /// The bytes held now.
    pub fn bytes(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// What one pusher holds. Stays on its thread.
#[derive(Debug)]
pub struct Hand {
    all: Arc<AllHands>,
    own: Rc<Cell<usize>>,
    /// The mean size of its messages, as of late; `None` before the first.
    mean: Option<usize>,
    /// Whether it is down to [`OWN_MIN`]; until all hold half of what brought it there, so that it does not go to and fro.
    is_cramped: Cell<bool>,
}

/// One message in hand; given back when dropped.
#[derive(Debug)]
pub struct Held {
    all: Arc<AllHands>,
    own: Rc<Cell<usize>>,
    bytes: usize,
}

impl Hand {
    /// An empty one.
    pub fn new(all: Arc<AllHands>) -> Self {
        Self { all, own: Rc::default(), mean: None, is_cramped: Cell::new(false) }
    }

    /// Takes a message of so many bytes in hand.
    pub fn take(&mut self, bytes: usize) -> Held {
        let bytes = bytes + OVERHEAD;
        // Moves an eighth of the way; up at once, so that long messages are noticed by the first of them.
        let mean = self.mean.map_or(bytes, |mean| (mean - mean / 8 + bytes / 8).max(bytes / 2));
        self.mean = Some(mean);
        self.own.set(self.own.get() + bytes);
        self.all.0.fetch_add(bytes, Ordering::Relaxed);
        Held { all: Arc::clone(&self.all), own: Rc::clone(&self.own), bytes }
    }

    /// How many messages it may hold, by their mean size; `most` at the most, 1 at the least. A power of two below
    /// `most`, so that it does not change with every message.
    pub fn fitting(&self, most: u32) -> u32 {
        let allowance = self.allowance();
        let assumed = if allowance == OWN_MIN { OWN_MIN } else { SIZE_ASSUMED };
        let fitting = allowance / self.mean.unwrap_or(assumed).max(1);
        let fitting = u32::try_from(fitting).unwrap_or(u32::MAX);
        if fitting >= most { most } else { 1 << fitting.max(1).ilog2() }
    }

    /// Whether it holds as much as it may.
    pub fn is_full(&self) -> bool {
        self.own.get() > 0 && self.own.get() >= self.allowance()
    }

    fn allowance(&self) -> usize {
        let all = self.all.bytes();
        self.is_cramped.set(all >= ALL_MAX || (self.is_cramped.get() && all >= ALL_MAX / 2));
        if self.is_cramped.get() { OWN_MIN } else { OWN_MAX }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.own.set(self.own.get() - self.bytes);
        self.all.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_messages_are_held_as_many_as_wanted_and_long_ones_as_fit() {
        let mut hand = Hand::new(Arc::default());
        assert_eq!((hand.fitting(16), hand.fitting(512)), (16, 128), "before the first");
        let held: Vec<Held> = (0..100).map(|_| hand.take(1000)).collect();
        assert_eq!((hand.fitting(16), hand.fitting(512), hand.is_full()), (16, 512, false));
        drop(held);
        let held: Vec<Held> = (0..8).map(|_| hand.take(1 << 20)).collect();
        assert!(hand.fitting(512) <= 8 && hand.is_full(), "{hand:?}");
        drop(held);
        assert_eq!((hand.is_full(), hand.all.bytes()), (false, 0));
    }

    #[test]
    fn when_all_hold_much_each_is_down_to_one_message_at_the_least() {
        let all = Arc::<AllHands>::default();
        let mut hands: Vec<Hand> = (0..200).map(|_| Hand::new(Arc::clone(&all))).collect();
        let mut held = Vec::new();
        for hand in &mut hands {
            while held.is_empty() || !hand.is_full() {
                held.push(hand.take(1 << 20));
            }
            assert!(hand.fitting(16) >= 1);
        }
        // A few that came first hold all that they may, the others one message.
        assert!(held.len() >= 200 && held.len() <= 200 + 64, "{}", held.len());
        drop(held);
        assert_eq!(all.bytes(), 0);
    }
}
