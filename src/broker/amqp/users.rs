//! Broker users: keeps those of RabbitMQ what the clients' secrets say.
//!
//! A change is made at once, by whoever asks for it. Besides, all of them are compared with what RabbitMQ has, in two
//! calls, whenever there is a new session and from time to time: so users are back after RabbitMQ has lost them, and
//! those of clients that were there before the management API was known are made. Only then, and when one differs, is
//! anything written.
//!
//! RabbitMQ knows one password for a user: the one before a rotation ends at once for AMQP, whatever its overlap. Only a
//! salted hash is known here, never the secret.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{RwLock, watch};

use super::Shared;
use super::link::{Link, wait_up};
use super::management::Management;
use crate::broker::BrokerError;
use crate::client::ClientId;
use crate::secret::SaltedHash;

/// How often all users are compared although nothing has happened: somebody else may have changed them.
const COMPARE_EVERY: Duration = Duration::from_secs(300);

/// Time before a comparison that failed is tried again; doubled up to the second.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// See the module.
pub(super) struct Users {
    management: Management,
    /// By client.
    wanted: Mutex<HashMap<ClientId, SaltedHash>>,
    /// Whether all clients are known: before that, users would be taken for those of clients that are gone.
    complete: watch::Sender<bool>,
    /// Shared by changes of single users; taken whole for each step of a comparison, so that it does not undo one.
    turn: RwLock<()>,
}

impl Users {
    pub(super) fn new(management: Management) -> Self {
        Self { management, wanted: Mutex::default(), complete: watch::Sender::new(false), turn: RwLock::new(()) }
    }

    /// Takes in what the clients' passwords are.
    pub(super) fn expect(&self, passwords: Vec<(ClientId, SaltedHash)>) {
        self.wanted.lock().extend(passwords);
        self.complete.send_replace(true);
    }

    /// Makes a client's user, or changes its password.
    pub(super) async fn set(&self, client: &ClientId, password: &SaltedHash) -> Result<(), BrokerError> {
        let _turn = self.turn.read().await;
        self.management.put_user(client, password).await?;
        self.wanted.lock().insert(client.clone(), *password);
        Ok(())
    }

    /// Deletes a client's user, if it has one, and ends its connections with it.
    pub(super) async fn remove(&self, client: &ClientId) -> Result<(), BrokerError> {
        let _turn = self.turn.read().await;
        // First: nobody is to make it anew, whether or not it can be deleted now.
        self.wanted.lock().remove(client);
        self.management.delete_user(client).await
    }

    /// Makes RabbitMQ's users what they should be. Returns how many were changed.
    async fn compare(&self, shared: &Shared) -> Result<usize, BrokerError> {
        let mut found = self.management.users().await?;
        let wanted: Vec<(ClientId, SaltedHash)> =
            self.wanted.lock().iter().map(|(client, password)| (client.clone(), *password)).collect();
        let mut changed = 0;
        for (client, password) in wanted {
            let is_there = found.remove(client.as_str()).is_some_and(|user| user.is_as_wanted(&client, &password));
            if is_there {
                continue;
            }
            let _turn = self.turn.write().await;
            // It may have been changed or deleted since, and then it is right.
            if self.wanted.lock().get(&client) == Some(&password) {
                self.put_one(&client, &password).await?;
                changed += 1;
            }
        }
        for name in found.into_keys() {
            let Ok(client) = ClientId::parse(&name) else { continue };
            let _turn = self.turn.write().await;
            let is_somebodys = self.wanted.lock().contains_key(&client) || shared.clients.get(&client).is_some();
            if !is_somebodys {
                self.management.delete_user(&client).await?;
                log::info!("the broker user {name} was deleted: there is no such client");
                changed += 1;
            }
        }
        Ok(changed)
    }

    /// One client's trouble is not everybody's.
    async fn put_one(&self, client: &ClientId, password: &SaltedHash) -> Result<(), BrokerError> {
        match self.management.put_user(client, password).await {
            Err(error) if error.kind == crate::broker::BrokerErrorKind::Conflict => {
                log::warn!("{client} cannot log in at RabbitMQ: {error}");
                Ok(())
            }
            put => put,
        }
    }
}

/// Compares until the broker is closed.
pub(super) async fn keep(shared: &Arc<Shared>) {
    let Some(users) = &shared.users else { return std::future::pending().await };
    let (mut link, mut complete) = (shared.link.subscribe(), users.complete.subscribe());
    let mut failures: u32 = 0;
    loop {
        // The sender is there as long as this is.
        let _ = complete.wait_for(|complete| *complete).await;
        let Some(session) = wait_up(&mut link).await else { return };
        let wait = match users.compare(shared).await {
            Ok(changed) => {
                if changed > 0 {
                    log::info!("{changed} broker users were made, changed or deleted");
                }
                failures = 0;
                COMPARE_EVERY
            }
            Err(error) => {
                let level = if failures == 0 { log::Level::Warn } else { log::Level::Debug };
                let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
                log::log!(level, "clients may not be able to log in at RabbitMQ: {error}{cause}; trying again");
                failures += 1;
                RETRY_MIN.saturating_mul(1 << (failures - 1).min(10)).min(RETRY_MAX)
            }
        };
        let is_new = |link: &Link| match link {
            Link::Up(present) => !Arc::ptr_eq(present, &session),
            Link::Down(_) => false,
            Link::Closed => true,
        };
        // Either way everything is looked at again.
        let _ = tokio::time::timeout(wait, link.wait_for(is_new)).await;
    }
}
