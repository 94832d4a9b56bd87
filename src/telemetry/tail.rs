//! The live tail: messages as they are published, for whoever watches a pattern of topics.
//!
//! Bounded on every side: a few watchers, a bounded channel each, a preview instead of the whole message, and at most
//! [`EVENTS_PER_S`] a second to one watcher. What a watcher is too slow for, or what exceeds its rate, is counted, not
//! kept: a tail is a look at the stream, not a subscription. Without watchers it costs one relaxed load a message.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::mpsc;

use crate::client::ClientId;
use crate::envelope::{Message, MessageId};
use crate::time::Timestamp;
use crate::topic::{Pattern, Topic, Trie};

/// Watchers at once; more are refused.
pub const WATCHERS_MAX: usize = 16;

/// Events a second that one watcher is shown.
pub const EVENTS_PER_S: u32 = 200;

/// Bytes of a message's JSON that a watcher is shown.
pub const PREVIEW_BYTES: usize = 1024;

/// Events that wait for one watcher.
const QUEUED_MAX: usize = 512;

/// A message that passed.
#[derive(Debug, Clone)]
pub struct TailEvent {
    /// Its id.
    pub id: MessageId,
    /// Who sent it.
    pub sender: ClientId,
    /// Its topic; `None` for a broadcast.
    pub topic: Option<Topic>,
    /// When it was accepted.
    pub sent_at: Timestamp,
    /// The start of the sender's JSON, at most [`PREVIEW_BYTES`] bytes, cut at a character.
    pub preview: Bytes,
    /// Length of the sender's JSON in bytes.
    pub bytes: usize,
}

/// Who watches what.
#[derive(Debug, Default)]
pub struct Tail {
    count: AtomicUsize,
    watchers: RwLock<Vec<Arc<Watcher>>>,
}

#[derive(Debug)]
struct Watcher {
    pattern: Trie<()>,
    /// Broadcasts have no topic; who watches everything sees them too.
    everything: bool,
    events: mpsc::Sender<TailEvent>,
    skipped: AtomicU64,
    /// The second under way (Unix time) and what it has been shown in it.
    shown: Mutex<(i64, u32)>,
}

/// A running watch. Dropped, it ends.
#[derive(Debug)]
pub struct Watch {
    tail: Arc<Tail>,
    watcher: Arc<Watcher>,
    events: mpsc::Receiver<TailEvent>,
}

impl Tail {
    /// Watches the messages whose topic matches `pattern`; with `#` the broadcasts too. `None` when
    /// [`WATCHERS_MAX`] are watching already.
    pub fn watch(self: &Arc<Self>, pattern: &Pattern) -> Option<Watch> {
        let mut trie = Trie::new();
        trie.insert(pattern, ());
        let (sender, events) = mpsc::channel(QUEUED_MAX);
        let watcher = Arc::new(Watcher {
            pattern: trie,
            everything: pattern.as_str() == "#",
            events: sender,
            skipped: AtomicU64::new(0),
            shown: Mutex::new((0, 0)),
        });
        let mut watchers = self.watchers.write();
        if watchers.len() >= WATCHERS_MAX {
            return None;
        }
        watchers.push(Arc::clone(&watcher));
        self.count.store(watchers.len(), Ordering::Relaxed);
        drop(watchers);
        Some(Watch { tail: Arc::clone(self), watcher, events })
    }

    /// Whether anyone watches.
    pub fn is_on(&self) -> bool {
        self.count.load(Ordering::Relaxed) > 0
    }

    /// Shows a message to those who watch its topic. Never waits.
    pub fn offer(&self, message: &Message, now: Timestamp) {
        if !self.is_on() {
            return;
        }
        for watcher in self.watchers.read().iter() {
            watcher.offer(message, now);
        }
    }
}

impl Watcher {
    fn offer(&self, message: &Message, now: Timestamp) {
        let matches = match &message.topic {
            None => self.everything,
            Some(topic) => {
                let mut found = false;
                self.pattern.for_each_match(topic.as_str(), |_, ()| found = true);
                found
            }
        };
        if !matches {
            return;
        }
        if !self.has_room(now) || self.events.try_send(event(message)).is_err() {
            self.skipped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn has_room(&self, now: Timestamp) -> bool {
        let second = now.as_millis().div_euclid(1000);
        let mut shown = self.shown.lock();
        if shown.0 != second {
            *shown = (second, 0);
        }
        shown.1 += 1;
        shown.1 <= EVENTS_PER_S
    }
}

fn event(message: &Message) -> TailEvent {
    let body = message.body();
    let mut end = body.len().min(PREVIEW_BYTES);
    // JSON is UTF-8: a byte of the form 10xxxxxx continues a character (RFC 3629, section 3).
    while end > 0 && end < body.len() && body[end] & 0xC0 == 0x80 {
        end -= 1;
    }
    TailEvent {
        id: message.id.clone(),
        sender: message.sender.clone(),
        topic: message.topic.clone(),
        sent_at: message.sent_at,
        // Copied: a slice would keep the whole message in memory for as long as it waits here.
        preview: Bytes::copy_from_slice(&body[..end]),
        bytes: body.len(),
    }
}

impl Watch {
    /// Waits for the next message. `None` never comes while the tail lives. Safe to drop.
    pub async fn next(&mut self) -> Option<TailEvent> {
        self.events.recv().await
    }

    /// The next message if one is waiting.
    pub fn try_next(&mut self) -> Option<TailEvent> {
        self.events.try_recv().ok()
    }

    /// How many matching messages were not shown since the last call.
    pub fn take_skipped(&self) -> u64 {
        self.watcher.skipped.swap(0, Ordering::Relaxed)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watchers = self.tail.watchers.write();
        watchers.retain(|watcher| !Arc::ptr_eq(watcher, &self.watcher));
        self.tail.count.store(watchers.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::super::traces::tests::message;
    use super::*;

    fn watch(tail: &Arc<Tail>, pattern: &str) -> Watch {
        tail.watch(&Pattern::parse(pattern).expect("a pattern")).expect("room for a watcher")
    }

    #[test]
    fn a_watcher_sees_what_matches_its_pattern_until_it_goes() {
        let tail = Arc::new(Tail::default());
        assert!(!tail.is_on());
        let (mut some, mut all) = (watch(&tail, "a.*"), watch(&tail, "#"));
        let now = Timestamp::from_millis(1);
        tail.offer(&message("x", Some("a.b")), now);
        tail.offer(&message("x", Some("b.b")), now);
        tail.offer(&message("x", None), now);
        assert_eq!(some.try_next().expect("it matches").topic.expect("a topic").as_str(), "a.b");
        assert!(some.try_next().is_none());
        assert_eq!(std::iter::from_fn(|| all.try_next()).count(), 3);
        drop(some);
        assert!(tail.is_on());
        drop(all);
        assert!(!tail.is_on());
    }

    #[test]
    fn what_exceeds_the_rate_is_counted_and_the_next_second_is_fresh() {
        let tail = Arc::new(Tail::default());
        let mut watch = watch(&tail, "#");
        for _ in 0..EVENTS_PER_S + 50 {
            tail.offer(&message("x", Some("a")), Timestamp::from_millis(5000));
        }
        assert_eq!(std::iter::from_fn(|| watch.try_next()).count(), EVENTS_PER_S as usize);
        assert_eq!((watch.take_skipped(), watch.take_skipped()), (50, 0));
        tail.offer(&message("x", Some("a")), Timestamp::from_millis(6000));
        assert!(watch.try_next().is_some());
    }

    #[test]
    fn watchers_are_bounded() {
        let tail = Arc::new(Tail::default());
        let watches: Vec<Watch> = (0..WATCHERS_MAX).map(|_| watch(&tail, "#")).collect();
        assert!(tail.watch(&Pattern::parse("#").expect("a pattern")).is_none());
        drop(watches);
        assert!(tail.watch(&Pattern::parse("#").expect("a pattern")).is_some());
    }
}
