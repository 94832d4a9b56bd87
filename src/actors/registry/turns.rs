//! Turns: operations on one client follow one another, those on different clients run side by side.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use tokio::sync::{Mutex, Notify, OwnedMutexGuard};

use crate::client::ClientId;

/// Who waits for which client. An entry lives as long as somebody holds or waits for its turn.
#[derive(Debug, Default)]
pub(super) struct Turns {
    taken: Rc<RefCell<HashMap<ClientId, Waiting>>>,
    idle: Rc<Notify>,
}

#[derive(Debug, Default)]
struct Waiting {
    turn: std::sync::Arc<Mutex<()>>,
    /// Holder and waiters.
    count: usize,
}

/// One's turn; dropped, it is the next one's.
#[derive(Debug)]
pub(super) struct Turn {
    // Fields are dropped in order: the turn is passed on before the entry is looked at.
    _guard: Option<OwnedMutexGuard<()>>,
    _place: Place,
}

/// A place in the queue, whether waiting or served: counts down also when a waiter gives up.
#[derive(Debug)]
struct Place {
    client: ClientId,
    taken: Rc<RefCell<HashMap<ClientId, Waiting>>>,
    idle: Rc<Notify>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.taken.borrow_mut();
        if let Some(waiting) = taken.get_mut(&self.client) {
            waiting.count -= 1;
            if waiting.count == 0 {
                taken.remove(&self.client);
            }
        }
        if taken.is_empty() {
            self.idle.notify_waiters();
        }
    }
}

impl Turns {
    /// Waits for a turn on this client; first come, first served.
    pub(super) async fn take(&self, client: &ClientId) -> Turn {
        let turn = {
            let mut taken = self.taken.borrow_mut();
            let waiting = taken.entry(client.clone()).or_default();
            waiting.count += 1;
            std::sync::Arc::clone(&waiting.turn)
        };
        let place = Place { client: client.clone(), taken: Rc::clone(&self.taken), idle: Rc::clone(&self.idle) };
        let guard = turn.lock_owned().await;
        Turn { _guard: Some(guard), _place: place }
    }

    /// Waits until nobody holds a turn.
    pub(super) async fn idle(&self) {
        loop {
            let idle = self.idle.notified();
            if self.taken.borrow().is_empty() {
                return;
            }
            idle.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[actix_rt::test]
    async fn turns_on_one_client_follow_one_another_and_leave_nothing_behind() {
        let turns = Rc::new(Turns::default());
        let (a, b) = (ClientId::parse("a").expect("test id"), ClientId::parse("b").expect("test id"));
        let first = turns.take(&a).await;
        let other = turns.take(&b).await;
        let second = {
            let (turns, a) = (Rc::clone(&turns), a.clone());
            actix_rt::spawn(async move { turns.take(&a).await })
        };
        let given_up = {
            let (turns, a) = (Rc::clone(&turns), a.clone());
            actix_rt::spawn(async move { drop(turns.take(&a).await) })
        };
        tokio::task::yield_now().await;
        assert!(!second.is_finished());
        given_up.abort();
        drop(first);
        let second = second.await.expect("its turn came");
        drop((second, other));
        turns.idle().await;
        assert!(turns.taken.borrow().is_empty());
    }
}
