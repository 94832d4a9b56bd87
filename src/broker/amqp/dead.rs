//! Dead letters, in each client's `-dead` queue.
//!
//! A queue can only be read from its front, so listing reads up to the page and gives everything back; that is for
//! people, who look at the first pages.
//!
//! Ids need not ascend in the queue: somebody else may have put something there, what was moved from another broker has
//! kept its id, and what dies at once on two lanes overtakes. And what was shown may be gone before the next page is asked
//! for. So a cursor does not say where a page ended, but where the next one begins; see [`Start`].

use std::collections::HashSet;
use std::hash::{Hash, Hasher as _};
use std::sync::Arc;

use super::Shared;
use super::clients::Client;
use super::error::broker_error;
use super::harvest::Harvest;
use super::settle::refused;
use super::topology;
use super::window::{Outgoing, Refusal};
use super::wire::{self, Counts, short};
use crate::broker::{BrokerError, BrokerErrorKind, DeadLetter, DeadPage, Origin, Queue};
use crate::client::ClientId;
use crate::time::Timestamp;

/// Dead letters read at a time.
const CHUNK: usize = 500;

/// Bytes of a page; beyond that it ends early.
const PAGE_BYTES_MAX: usize = 16 << 20;

impl Shared {
    fn dead_of(&self, id: &ClientId, action: &str) -> Result<Arc<Client>, BrokerError> {
        self.session(action)?;
        self.clients.get(id).ok_or_else(|| BrokerError::new(BrokerErrorKind::NotFound, action))
    }

    /// How many there are. Their queue, when somebody else has deleted it, is declared again.
    async fn count_dead(&self, client: &Client) -> Result<u64, BrokerError> {
        let queue = topology::dead(&client.id);
        match self.count_ready(&queue).await {
            Err(error) if error.kind == BrokerErrorKind::NotFound => {
                log::warn!("queue {queue} was deleted by somebody else; it is declared again");
                self.repair(Some(client)).await;
                self.count_ready(&queue).await
            }
            counted => counted,
        }
    }

    /// See [`crate::broker::Broker::dead_letters`].
    pub(super) async fn dead_letters(
        self: Arc<Self>,
        id: ClientId,
        after: Option<String>,
        limit: usize,
    ) -> Result<DeadPage, BrokerError> {
        let action = format!("list dead letters of {id}");
        let client = self.dead_of(&id, &action)?;
        let _turn = client.dead_turn.acquire().await;
        if self.count_dead(&client).await? == 0 {
            return Ok(DeadPage::default());
        }
        let queue = topology::dead(&id);
        if let Some(after) = &after
            && let Some(page) = self.dead_page(&queue, Some(after), limit).await?
        {
            return Ok(page);
        }
        // The letter that the page was to begin with is gone, and others in front of it. Some may be shown twice now, but
        // none is passed over.
        Ok(self.dead_page(&queue, None, limit).await?.unwrap_or_default())
    }

    /// One page; none when the queue has no such place.
    async fn dead_page(&self, queue: &str, after: Option<&str>, limit: usize) -> Result<Option<DeadPage>, BrokerError> {
        let mut harvest = Harvest::new(self, queue.to_owned());
        let mut listing = Listing::new(after, limit);
        loop {
            let (chunk, _) = harvest.next(CHUNK).await?;
            let is_end = chunk.is_empty();
            let mut letters = chunk.into_iter().map(|one| wire::read_dead(&one.properties, one.data));
            if is_end || !letters.all(|dead| listing.add(dead)) {
                harvest.finish().await;
                return Ok(listing.end());
            }
        }
    }

    /// See [`crate::broker::Broker::replay_dead`].
    pub(super) async fn replay_dead(
        self: Arc<Self>,
        id: ClientId,
        ids: Option<Vec<String>>,
    ) -> Result<u64, BrokerError> {
        let action = format!("replay dead letters of {id}");
        self.open_session(&action)?;
        let client = self.dead_of(&id, &action)?;
        let _turn = client.dead_turn.acquire().await;
        let mut wanted: Option<HashSet<String>> = ids.map(|ids| ids.into_iter().collect());
        // Those that are there now: what dies again meanwhile stays.
        let mut left = self.count_dead(&client).await?;
        let mut harvest = Harvest::new(&self, topology::dead(&id));
        let mut replayed = 0;
        while left > 0 && wanted.as_ref().is_none_or(|wanted| !wanted.is_empty()) {
            let (chunk, channel) = harvest.next(usize::try_from(left).unwrap_or(CHUNK).min(CHUNK)).await?;
            if chunk.is_empty() {
                break;
            }
            left = left.saturating_sub(chunk.len() as u64);
            let mut chosen = Vec::new();
            for delivery in chunk {
                let tag = delivery.delivery_tag;
                let dead = wire::read_dead(&delivery.properties, delivery.data);
                if wanted.as_mut().is_none_or(|wanted| wanted.remove(&dead.id)) {
                    chosen.push((tag, dead));
                }
            }
            let messages: Vec<Outgoing> = chosen.iter().map(|(_, dead)| self.revived(&id, dead)).collect();
            let fates = self.publish_on(self.relay(&topology::inbox(&id)), messages).await;
            let mut refusal = None;
            let mut done = Vec::with_capacity(chosen.len());
            for ((tag, dead), fate) in chosen.into_iter().zip(fates) {
                match fate {
                    Ok(()) => done.push(tag),
                    Err(why) => refusal = Some((why, dead.origin)),
                }
            }
            harvest.acknowledge(&channel, &done);
            replayed += done.len() as u64;
            if let Some((why, origin)) = refusal {
                if matches!(why, Refusal::Unroutable) {
                    self.repair(Some(&client)).await;
                }
                return Err(refused(&action, &why, &home(&id, origin).to_string()));
            }
        }
        harvest.finish().await;
        Ok(replayed)
    }

    /// A dead letter as it is put back into the queue that it died in.
    fn revived(&self, client: &ClientId, dead: &DeadLetter) -> Outgoing {
        Outgoing {
            exchange: topology::default_exchange(),
            key: short(&home(client, dead.origin).to_string()),
            properties: wire::properties(&dead.payload, Counts::fresh(), self.user()),
            body: wire::body(&dead.payload),
        }
    }

    /// See [`crate::broker::Broker::purge_dead`].
    pub(super) async fn purge_dead(
        self: Arc<Self>,
        id: ClientId,
        before: Option<Timestamp>,
    ) -> Result<u64, BrokerError> {
        let action = format!("purge dead letters of {id}");
        let client = self.dead_of(&id, &action)?;
        let _turn = client.dead_turn.acquire().await;
        let queue = topology::dead(&id);
        let mut left = self.count_dead(&client).await?;
        let Some(before) = before else {
            let session = self.session(&action)?;
            let purged = session.control(async |channel| topology::purge(channel, &queue).await).await;
            return purged.map_err(|error| broker_error(action, error));
        };
        let mut harvest = Harvest::new(&self, queue);
        let mut purged = 0;
        while left > 0 {
            let (chunk, channel) = harvest.next(usize::try_from(left).unwrap_or(CHUNK).min(CHUNK)).await?;
            if chunk.is_empty() {
                break;
            }
            left = left.saturating_sub(chunk.len() as u64);
            let mut old = Vec::with_capacity(chunk.len());
            let mut is_end = false;
            for delivery in chunk {
                let tag = delivery.delivery_tag;
                let dead = wire::read_dead(&delivery.properties, delivery.data);
                if dead.died_at < before {
                    old.push(tag);
                } else {
                    // They are in the order in which they died, but for the few milliseconds that publishing takes.
                    is_end |= dead.died_at > before.plus_millis(60_000);
                }
            }
            harvest.acknowledge(&channel, &old);
            purged += old.len() as u64;
            if is_end {
                break;
            }
        }
        harvest.finish().await;
        Ok(purged)
    }
}

fn home(client: &ClientId, origin: Origin) -> Queue {
    match origin {
        Origin::Inbox => Queue::Inbox(client.clone()),
        Origin::Outbox => Queue::Outbox(client.clone()),
        Origin::Notify => Queue::Notify(client.clone()),
    }
}

/// Where a page begins: what a cursor says. It does so by digests, as the ids of others may be anything.
struct Start {
    /// Behind letters with just these ids: exact as long as none of them is gone, even among letters with the same id.
    behind: Option<u64>,
    /// With the first letter that has this id: right whatever has gone from in front of it. Only where that was the first
    /// when the cursor was made.
    first: Option<u64>,
    /// After the letter with this id: the id of a letter is a cursor, too.
    last: u64,
}

impl Start {
    fn parse(cursor: &str) -> Self {
        let (behind, first) = cursor.split_once('-').unwrap_or((cursor, ""));
        let digest = |text| u64::from_str_radix(text, 16).ok();
        Self { behind: digest(behind), first: digest(first), last: digest_of(cursor) }
    }
}

/// A page while the queue is read from its front.
struct Listing {
    limit: usize,
    page: DeadPage,
    bytes: usize,
    /// Where the page begins, until that is reached.
    start: Option<Start>,
    /// Digest of the ids that were read, in their order.
    behind: u64,
    /// A digest of each of them.
    read: HashSet<u64>,
}

impl Listing {
    fn new(after: Option<&str>, limit: usize) -> Self {
        let start = after.map(Start::parse);
        Self { limit, page: DeadPage::default(), bytes: 0, start, behind: 0, read: HashSet::new() }
    }

    /// Takes the next letter of the queue; false when the page was full without it.
    fn add(&mut self, dead: DeadLetter) -> bool {
        let id = digest_of(&dead.id);
        self.start.take_if(|start| start.behind == Some(self.behind) || start.first == Some(id));
        let is_shown = self.start.is_none();
        if is_shown && (self.page.dead_letters.len() == self.limit || self.bytes >= PAGE_BYTES_MAX) {
            self.page.next = Some(self.cursor(id));
            return false;
        }
        self.start.take_if(|start| start.last == id);
        self.behind = digest_of((self.behind, id));
        self.read.insert(id);
        if is_shown {
            self.bytes += wire::body(&dead.payload).len();
            self.page.dead_letters.push(dead);
        }
        true
    }

    /// The place in front of the letter with this id, behind all that were read.
    fn cursor(&self, id: u64) -> String {
        let behind = self.behind;
        if self.read.contains(&id) { format!("{behind:016x}") } else { format!("{behind:016x}-{id:016x}") }
    }

    /// The page, when its beginning was found; that may be the end of the queue.
    fn end(self) -> Option<DeadPage> {
        self.start.is_none_or(|start| start.behind == Some(self.behind)).then_some(self.page)
    }
}

/// The same in each process, so that a cursor outlives a restart.
fn digest_of(what: impl Hash) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::{DeadReason, Foreign, Payload};

    fn letter(id: &str) -> DeadLetter {
        let foreign = Foreign { body: "x".into(), message_id: None, traceparent: None };
        DeadLetter {
            id: id.to_owned(),
            origin: Origin::Inbox,
            reason: DeadReason::InvalidMessage,
            attempts: 0,
            died_at: Timestamp::from_millis(0),
            payload: Payload::Foreign(foreign),
        }
    }

    /// The ids on a page, and the next cursor.
    fn page(queue: &[&str], after: Option<&str>, limit: usize) -> (Vec<String>, Option<String>) {
        let list = |after| {
            let mut listing = Listing::new(after, limit);
            let _ = queue.iter().all(|id| listing.add(letter(id)));
            listing.end()
        };
        let page = after.and_then(|after| list(Some(after))).or_else(|| list(None)).expect("the beginning is there");
        (page.dead_letters.into_iter().map(|dead| dead.id).collect(), page.next)
    }

    /// The pages one after the other; `meanwhile` is told what was on each, and may change the queue.
    fn walk(queue: &[&str], limit: usize, meanwhile: impl Fn(&mut Vec<&str>, &[String])) -> Vec<String> {
        let (mut queue, mut all, mut after) = (queue.to_vec(), Vec::new(), None);
        for _ in 0..20 {
            let (ids, next) = page(&queue, after.as_deref(), limit);
            meanwhile(&mut queue, &ids);
            all.extend(ids);
            if next.is_none() {
                return all;
            }
            after = next;
        }
        panic!("it does not end: {all:?}");
    }

    /// Takes a letter with this id away, as a replay does: the first one.
    fn take(queue: &mut Vec<&str>, id: &str) {
        queue.remove(queue.iter().position(|other| *other == id).expect("it is there"));
    }

    const ORDERS: [[&str; 6]; 4] = [
        ["1", "2", "3", "4", "5", "6"],
        ["6", "5", "4", "3", "2", "1"],
        ["foreign-0", "0195-a", "0195-b", "", "0195-d", "0195-e"],
        ["0195-b", "0195-a", "0195-d", "0195-c", "0000000000000002", "0000000000000001"],
    ];

    #[test]
    fn each_is_shown_once_whatever_the_ids() {
        let alike = [["a"; 6], ["a", "b", "a", "c", "a", "b"], ["a", "b", "c", "a", "b", "c"]];
        for queue in ORDERS.iter().chain(&alike) {
            for limit in 1..=7 {
                assert_eq!(walk(queue, limit, |_, _| ()), queue, "by {limit}");
            }
        }
    }

    #[test]
    fn what_was_shown_may_go_between_two_pages() {
        for (queue, limit) in ORDERS.iter().flat_map(|queue| (1..=4).map(move |limit| (queue, limit))) {
            // Any of each page, the last one and all of them included.
            for which in 1..1_usize << limit {
                let shown = walk(queue, limit, |queue, ids| {
                    let chosen = ids.iter().enumerate().filter(|(at, _)| which >> at & 1 == 1);
                    chosen.for_each(|(_, id)| take(queue, id));
                });
                assert_eq!(shown, queue, "by {limit}, {which:b} of each page");
            }
        }
    }

    #[test]
    fn what_was_not_shown_may_go_as_well() {
        let queue = ["6", "5", "4", "3", "2", "1"];
        let (_, next) = page(&queue, None, 3);
        let rest = |queue: &[&str]| page(queue, next.as_deref(), 3).0;
        assert_eq!(rest(&["6", "5", "4", "2", "1"]), ["2", "1"]);
        assert_eq!(rest(&["3"]), ["3"]);
        assert_eq!(rest(&["6", "5", "4"]), [""; 0]);
        assert_eq!(rest(&[]), [""; 0]);
        // Nothing says any more how far it had come: better twice than never.
        assert_eq!(rest(&["6", "2", "1"]), ["6", "2", "1"]);
    }

    #[test]
    fn what_has_the_same_id_hides_no_other() {
        let queue = ["a", "1", "a", "2", "a", "3", "a", "4"];
        for limit in 1..=4 {
            let mut shown = walk(&queue, limit, |queue, ids| ids.iter().for_each(|id| take(queue, id)));
            shown.sort();
            assert_eq!(shown, ["1", "2", "3", "4", "a", "a", "a", "a"], "by {limit}");
        }
    }

    #[test]
    fn an_id_is_a_cursor() {
        let queue = ["6", "5", "4", "3"];
        assert_eq!(page(&queue, Some("5"), 3).0, ["4", "3"]);
        assert_eq!(page(&queue, Some("3"), 3).0, [""; 0]);
        assert_eq!(page(&queue, Some("7"), 3).0, ["6", "5", "4"]);
    }
}
