//! A page of the table of clients: searched, sorted and cut here, so that a browser never holds ten thousand rows.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::sync::Arc;

use serde::Serialize;
use utoipa::ToSchema;

use crate::actors::registry::{ActorState, ActorStates};
use crate::broker::Depths;
use crate::client::{ClientId, ClientRecord};
use crate::directory::{ClientEntry, Directory};
use crate::telemetry::Board;
use crate::telemetry::observer::{ClientStats, Overview};
use crate::webhook::{BreakerState, Breakers};

/// What the clients are sorted by. Equals are in order of their ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ToSchema)]
#[schema(as = ClientSort, rename_all = "snake_case")]
pub(crate) enum Sort {
    ClientId,
    State,
    Inbox,
    Outbox,
    Dead,
    Sent,
    Received,
}

impl Sort {
    /// Every column by its name.
    pub(crate) const ALL: [(&'static str, Self); 7] = [
        ("client_id", Self::ClientId),
        ("state", Self::State),
        ("inbox", Self::Inbox),
        ("outbox", Self::Outbox),
        ("dead", Self::Dead),
        ("sent", Self::Sent),
        ("received", Self::Received),
    ];
}

/// A client's state in a word; worse is greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum State {
    Ok,
    Paused,
    Starting,
    BreakerOpen,
    WebhookOff,
    Restarting,
    Failing,
}

impl State {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Paused => "paused",
            Self::Starting => "starting",
            Self::BreakerOpen => "breaker open",
            Self::WebhookOff => "webhook off",
            Self::Restarting => "restarting",
            Self::Failing => "failing",
        }
    }
}

/// The worst that is known of a client.
pub(super) fn state(record: &ClientRecord, actors: Option<&ActorStates>, breaker: Option<BreakerState>) -> State {
    let of_actor = |state: ActorState| match state {
        ActorState::Failing => State::Failing,
        ActorState::Restarting => State::Restarting,
        ActorState::Starting => State::Starting,
        ActorState::Running | ActorState::Paused | ActorState::Stopped => State::Ok,
    };
    let of_actors = actors.map_or(State::Ok, |actors| {
        let ActorStates { forwarder, broadcaster, subscriber, pusher } = *actors;
        [forwarder, broadcaster, subscriber, pusher].map(of_actor).into_iter().max().unwrap_or(State::Ok)
    });
    let of_webhook = match &record.webhook {
        Some(webhook) if !webhook.enabled => State::WebhookOff,
        // Probed, it is not well yet.
        Some(_) if matches!(breaker, Some(BreakerState::Open | BreakerState::HalfOpen)) => State::BreakerOpen,
        _ => State::Ok,
    };
    let of_pause = if record.paused { State::Paused } else { State::Ok };
    of_actors.max(of_webhook).max(of_pause)
}

/// Which page of which clients.
#[derive(Debug)]
pub(super) struct Page {
    /// Lower case; empty for all.
    pub(super) search: String,
    pub(super) sort: Sort,
    pub(super) descending: bool,
    pub(super) offset: usize,
    pub(super) limit: usize,
}

/// What is sent.
#[derive(Debug, Serialize)]
pub(super) struct Shown {
    total: usize,
    matched: usize,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    client_id: ClientId,
    name: Option<String>,
    state: &'static str,
    queues: Option<Depths>,
    sent_per_s: f64,
    received_per_s: f64,
}

/// A client with what it is sorted by.
struct Candidate {
    entry: Arc<ClientEntry>,
    stats: ClientStats,
    state: State,
}

impl Page {
    /// Makes the page. Takes a few milliseconds for ten thousand clients.
    pub(super) fn show(&self, directory: &Directory, board: &Board, overview: &Overview, breakers: &Breakers) -> Shown {
        let troubled: HashMap<&ClientId, &ActorStates> =
            overview.actors.troubled.iter().map(|(id, states)| (id, states)).collect();
        let all = directory.page(None, usize::MAX);
        let total = all.len();
        let mut candidates: Vec<Candidate> = board.with_clients(|stats| {
            let found = all.into_iter().filter(|entry| self.finds(&entry.record));
            found
                .map(|entry| {
                    let id = &entry.record.client_id;
                    let (stats, actors) = (stats.get(id).copied().unwrap_or_default(), troubled.get(id).copied());
                    let state = state(&entry.record, actors, breakers.get(id));
                    Candidate { entry, stats, state }
                })
                .collect()
        });
        let matched = candidates.len();
        // The directory is in order of the ids already, and the sort is stable.
        if self.sort != Sort::ClientId {
            candidates.sort_by(|a, b| if self.descending { self.compare(b, a) } else { self.compare(a, b) });
        } else if self.descending {
            candidates.reverse();
        }
        let rows = candidates.into_iter().skip(self.offset).take(self.limit).map(Candidate::into_row).collect();
        Shown { total, matched, rows }
    }

    fn finds(&self, record: &ClientRecord) -> bool {
        self.search.is_empty()
            || record.client_id.as_str().contains(&self.search)
            || record.name.as_ref().is_some_and(|name| name.to_lowercase().contains(&self.search))
    }

    fn compare(&self, a: &Candidate, b: &Candidate) -> Ordering {
        let depth = |of: fn(&Depths) -> u64| a.stats.depths.as_ref().map(of).cmp(&b.stats.depths.as_ref().map(of));
        match self.sort {
            Sort::ClientId => Ordering::Equal,
            Sort::State => a.state.cmp(&b.state),
            Sort::Inbox => depth(|depths| depths.inbox),
            Sort::Outbox => depth(|depths| depths.outbox + depths.notify),
            Sort::Dead => depth(|depths| depths.dead),
            Sort::Sent => a.stats.sent_per_s.total_cmp(&b.stats.sent_per_s),
            Sort::Received => a.stats.received_per_s.total_cmp(&b.stats.received_per_s),
        }
    }
}

impl Candidate {
    fn into_row(self) -> Row {
        Row {
            client_id: self.entry.record.client_id.clone(),
            name: self.entry.record.name.clone(),
            state: self.state.as_str(),
            queues: self.stats.depths,
            sent_per_s: self.stats.sent_per_s,
            received_per_s: self.stats.received_per_s,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::SecretSlots;

    fn directory(records: impl IntoIterator<Item = (&'static str, Option<&'static str>, bool)>) -> Directory {
        let directory = Directory::default();
        for (id, name, paused) in records {
            let record = ClientRecord {
                client_id: ClientId::parse(id).expect("test client"),
                name: name.map(str::to_owned),
                subscriptions: Vec::new(),
                webhook: None,
                limits: crate::client::Limits::default(),
                paused,
                created_at: crate::time::Timestamp::from_millis(0),
            };
            let secrets = SecretSlots::nobody();
            let (gate, replaced) = Default::default();
            directory.put(ClientEntry { record, secrets, incarnation: 1, send_limiter: None, gate, replaced });
        }
        directory
    }

    fn ids(page: &Page, directory: &Directory) -> Vec<String> {
        let breakers = Breakers::new(crate::telemetry::new(0));
        let shown = page.show(directory, &Board::default(), &Overview::default(), &breakers);
        shown.rows.iter().map(|row| row.client_id.to_string()).collect()
    }

    #[test]
    fn clients_are_searched_sorted_and_cut() {
        let directory = directory([("a", None, false), ("b", Some("Anna"), true), ("c", None, false)]);
        let page = |search: &str, sort, descending, offset, limit| Page {
            search: search.into(),
            sort,
            descending,
            offset,
            limit,
        };
        assert_eq!(ids(&page("", Sort::ClientId, true, 0, 2), &directory), ["c", "b"]);
        assert_eq!(ids(&page("an", Sort::ClientId, false, 0, 9), &directory), ["b"]);
        assert_eq!(ids(&page("", Sort::State, true, 0, 9), &directory), ["b", "a", "c"]);
        assert_eq!(ids(&page("", Sort::Inbox, false, 1, 1), &directory), ["b"]);
        assert!(ids(&page("", Sort::Inbox, false, 7, 1), &directory).is_empty());
    }

    #[test]
    fn a_client_is_as_well_as_its_worst_actor() {
        let directory = directory([("a", None, true)]);
        let record = &directory.get("a").expect("there").record;
        let running = ActorState::Running;
        let mut actors =
            ActorStates { forwarder: running, broadcaster: running, subscriber: running, pusher: ActorState::Stopped };
        assert_eq!(state(record, Some(&actors), None).as_str(), "paused");
        actors.subscriber = ActorState::Failing;
        assert_eq!(state(record, Some(&actors), None).as_str(), "failing");
    }

    #[test]
    fn a_breaker_that_is_not_closed_is_shown_of_a_webhook_that_is_on() {
        let directory = directory([("a", None, false)]);
        let mut record = directory.get("a").expect("there").record.clone();
        let open = Some(BreakerState::Open);
        assert_eq!(state(&record, None, open).as_str(), "ok", "what is left of a webhook that was removed");
        record.webhook = serde_json::from_str(r#"{"url": "https://example.org/"}"#).expect("a webhook");
        assert_eq!(state(&record, None, open).as_str(), "breaker open");
        assert_eq!(state(&record, None, Some(BreakerState::HalfOpen)).as_str(), "breaker open");
        assert_eq!(state(&record, None, Some(BreakerState::Closed)).as_str(), "ok");
    }
}
