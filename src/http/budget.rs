//! What large bodies, large answers and long polls may take of the router, in all and per client, so that memory stays
//! bounded and one client's load is not another's wait (promises 4 and 6).
//!
//! Small bodies and small answers are free: a connection's own buffers are about as large. Shares are per client, so a
//! client that uses up its own waits, and is then told 429, while the others go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::Problem;
use crate::client::ClientId;

/// Bytes of a body, or of an answer, that are free.
pub(crate) const FREE_BYTES: usize = 64 << 10;

/// What a body costs while it is read, checked and published, in bytes per byte: itself, the envelopes made from it, and
/// what each small message takes besides.
const COST_PER_BYTE: usize = 8;

/// Where that stops growing: body and envelopes, and [`super::batch::MESSAGES_MAX`] messages' own overhead.
const MESSAGES_OVERHEAD_BYTES: usize = 40 << 20;

/// A client's share of bodies, at the least; it holds at least one request of the greatest length.
const BODY_SHARE_BYTES_MIN: usize = 64 << 20;

/// All bodies together, in shares.
const BODY_SHARES: usize = 4;

/// How long a body waits for its share.
const BODY_WAIT: Duration = Duration::from_secs(10);

/// Pulls under way at once: each may come back with about 16 MiB.
const PULLS_PER_CLIENT: usize = 4;
const PULLS_MAX: usize = 64;

/// How long a pull waits for its turn.
const PULL_WAIT: Duration = Duration::from_secs(10);

/// Bytes of large answers that were not yet read by their callers.
const ANSWERS_PER_CLIENT_BYTES: usize = 64 << 20;
const ANSWERS_MAX_BYTES: usize = 256 << 20;

/// Long polls that wait at once.
const POLLS_PER_CLIENT: usize = 1_000;
const POLLS_MAX: usize = 10_000;

/// How often whoever waits for the end of long polls looks.
const POLLS_LOOK_EVERY: Duration = Duration::from_millis(5);

/// Shares kept before idle ones are looked for; more when more are in use.
const SHARES_KEPT: usize = 1_024;

/// See the module.
pub(crate) struct Budget {
    shares: DashMap<ClientId, Arc<Share>>,
    /// How many shares there may be before idle ones are looked for: twice as many as were in use the last time, so
    /// that looking costs the same for each new share however many there are.
    shares_kept: AtomicUsize,
    share_kib: usize,
    request_bytes_max: usize,
    bodies: Arc<Semaphore>,
    pulls: Arc<Semaphore>,
    answers: AtomicUsize,
    polls: AtomicUsize,
}

/// One client's.
struct Share {
    bodies: Arc<Semaphore>,
    pulls: Arc<Semaphore>,
    answers: AtomicUsize,
    polls: AtomicUsize,
}

impl Budget {
    /// A budget for requests of at most `request_bytes_max`.
    pub(crate) fn new(request_bytes_max: usize) -> Self {
        let share_kib = BODY_SHARE_BYTES_MIN.max(worst_cost(request_bytes_max)).div_ceil(1024);
        Self {
            shares: DashMap::new(),
            shares_kept: AtomicUsize::new(SHARES_KEPT),
            share_kib,
            request_bytes_max,
            bodies: Arc::new(Semaphore::new((share_kib * BODY_SHARES).min(Semaphore::MAX_PERMITS))),
            pulls: Arc::new(Semaphore::new(PULLS_MAX)),
            answers: AtomicUsize::new(0),
            polls: AtomicUsize::new(0),
        }
    }

    fn share(&self, client: &ClientId) -> Arc<Share> {
        if let Some(share) = self.shares.get(client) {
            return Arc::clone(&share);
        }
        if self.shares.len() >= self.shares_kept.load(Ordering::Relaxed) {
            // Only the map holds an idle one. A client whose share goes just now gets a fresh, empty one.
            self.shares.retain(|_, share| Arc::strong_count(share) > 1);
            self.shares_kept.store(SHARES_KEPT.max(self.shares.len() * 2), Ordering::Relaxed);
        }
        let fresh = || {
            Arc::new(Share {
                bodies: Arc::new(Semaphore::new(self.share_kib)),
                pulls: Arc::new(Semaphore::new(PULLS_PER_CLIENT)),
                answers: AtomicUsize::new(0),
                polls: AtomicUsize::new(0),
            })
        };
        Arc::clone(&self.shares.entry(client.clone()).or_insert_with(fresh))
    }

    /// Room for a body of `bytes`; waits a while for it. Held until dropped.
    pub(crate) async fn body(&self, client: &ClientId, bytes: usize) -> Result<BodyRoom, Problem> {
        let share = self.share(client);
        let cost = bytes.saturating_mul(COST_PER_BYTE).min(worst_cost(self.request_bytes_max));
        let kib = u32::try_from(cost.div_ceil(1024).min(self.share_kib)).unwrap_or(u32::MAX);
        let take = async {
            // Always in this order: whoever waits for the common room holds only its own.
            let own = Arc::clone(&share.bodies).acquire_many_owned(kib).await.ok()?;
            let common = Arc::clone(&self.bodies).acquire_many_owned(kib).await.ok()?;
            Some(BodyRoom { _own: own, _common: common, _share: Arc::clone(&share) })
        };
        match tokio::time::timeout(BODY_WAIT, take).await {
            Ok(Some(room)) => Ok(room),
            Ok(None) | Err(_) => {
                Err(Problem::rate_limited("too many large requests at once; send fewer side by side", BODY_WAIT / 5))
            }
        }
    }

    /// A turn to pull. Refused while the client's (or all) answers that were not read yet are too large.
    pub(crate) async fn pull(&self, client: &ClientId) -> Result<PullTurn, Problem> {
        let share = self.share(client);
        let unread = || Problem::rate_limited("too much was handed out and not read yet", Duration::from_secs(1));
        if share.answers.load(Ordering::Relaxed) >= ANSWERS_PER_CLIENT_BYTES
            || self.answers.load(Ordering::Relaxed) >= ANSWERS_MAX_BYTES
        {
            return Err(unread());
        }
        let take = async {
            let own = Arc::clone(&share.pulls).acquire_owned().await.ok()?;
            let common = Arc::clone(&self.pulls).acquire_owned().await.ok()?;
            Some(PullTurn { _own: own, _common: common, _share: Arc::clone(&share) })
        };
        match tokio::time::timeout(PULL_WAIT, take).await {
            Ok(Some(turn)) => Ok(turn),
            Ok(None) | Err(_) => Err(Problem::rate_limited("too many pulls at once", Duration::from_secs(1))),
        }
    }

    /// Notes an answer of `bytes` that is on its way, until the note is dropped.
    pub(crate) fn answer(self: &Arc<Self>, client: &ClientId, bytes: usize) -> AnswerNote {
        let share = self.share(client);
        share.answers.fetch_add(bytes, Ordering::Relaxed);
        self.answers.fetch_add(bytes, Ordering::Relaxed);
        AnswerNote { budget: Arc::clone(self), share, bytes }
    }

    /// A place for a long poll.
    pub(crate) fn poll(self: &Arc<Self>, client: &ClientId) -> Result<PollPlace, Problem> {
        let share = self.share(client);
        let own = share.polls.fetch_add(1, Ordering::Relaxed);
        let all = self.polls.fetch_add(1, Ordering::Relaxed);
        // Counted first, so that dropping the place takes back what was counted, also when it is refused.
        let place = PollPlace { budget: Arc::clone(self), share };
        if own >= POLLS_PER_CLIENT || all >= POLLS_MAX {
            return Err(Problem::rate_limited("too many long polls at once; use wait=0", Duration::from_secs(1)));
        }
        Ok(place)
    }

    /// Waits until the client has no long poll left.
    pub(crate) async fn polls_ended(&self, client: &ClientId) {
        let share = self.share(client);
        while share.polls.load(Ordering::Relaxed) > 0 {
            tokio::time::sleep(POLLS_LOOK_EVERY).await;
        }
    }
}

fn worst_cost(request_bytes_max: usize) -> usize {
    request_bytes_max.saturating_mul(2).saturating_add(MESSAGES_OVERHEAD_BYTES)
}

/// Room for a body; see [`Budget::body`].
pub(crate) struct BodyRoom {
    _own: OwnedSemaphorePermit,
    _common: OwnedSemaphorePermit,
    /// Keeps the share in the map while some of it is in use.
    _share: Arc<Share>,
}

/// A turn to pull; see [`Budget::pull`].
pub(crate) struct PullTurn {
    _own: OwnedSemaphorePermit,
    _common: OwnedSemaphorePermit,
    _share: Arc<Share>,
}

/// An answer on its way; see [`Budget::answer`].
pub(crate) struct AnswerNote {
    budget: Arc<Budget>,
    share: Arc<Share>,
    bytes: usize,
}

impl Drop for AnswerNote {
    fn drop(&mut self) {
        self.share.answers.fetch_sub(self.bytes, Ordering::Relaxed);
        self.budget.answers.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A long poll's place; see [`Budget::poll`].
pub(crate) struct PollPlace {
    budget: Arc<Budget>,
    share: Arc<Share>,
}

impl Drop for PollPlace {
    fn drop(&mut self) {
        self.share.polls.fetch_sub(1, Ordering::Relaxed);
        self.budget.polls.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn id(text: &str) -> ClientId {
        ClientId::parse(text).expect("test client")
    }

    #[test]
    fn one_clients_long_polls_leave_places_for_others() {
        let budget = Arc::new(Budget::new(1 << 24));
        let places: Vec<_> = (0..POLLS_PER_CLIENT).map(|_| budget.poll(&id("a")).expect("has a place")).collect();
        assert!(budget.poll(&id("a")).is_err());
        assert!(budget.poll(&id("b")).is_ok());
        drop(places);
        assert!(budget.poll(&id("a")).is_ok());
        assert_eq!(budget.polls.load(Ordering::Relaxed), 0);
    }

    #[actix_rt::test]
    async fn one_clients_bodies_leave_room_for_others_and_come_back() {
        let budget = Budget::new(16 << 20);
        let first = budget.body(&id("a"), 16 << 20).now_or_never().expect("there is room").expect("granted");
        assert!(budget.body(&id("a"), 16 << 20).now_or_never().is_none(), "the share is used up");
        assert!(budget.body(&id("b"), 16 << 20).now_or_never().is_some());
        drop(first);
        assert!(budget.body(&id("a"), 16 << 20).now_or_never().is_some());
    }

    #[actix_rt::test]
    async fn a_client_that_does_not_read_is_refused_before_more_is_pulled() {
        let budget = Arc::new(Budget::new(16 << 20));
        let note = budget.answer(&id("a"), ANSWERS_PER_CLIENT_BYTES);
        assert!(budget.pull(&id("a")).await.is_err());
        assert!(budget.pull(&id("b")).await.is_ok());
        drop(note);
        assert!(budget.pull(&id("a")).await.is_ok());
    }

    #[test]
    fn idle_shares_are_forgotten() {
        let budget = Arc::new(Budget::new(1 << 20));
        let kept = budget.poll(&id("kept")).expect("has a place");
        for n in 0..SHARES_KEPT * 2 {
            drop(budget.poll(&id(&format!("c{n}"))));
        }
        assert!(budget.shares.len() <= SHARES_KEPT + 1, "{}", budget.shares.len());
        assert!(budget.shares.contains_key("kept"));
        drop(kept);
    }
}
