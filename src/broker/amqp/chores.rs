//! What is done from time to time: limits, forgetting what counts no more, and looking after what somebody else may have
//! deleted.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};

use super::error::with_cause;
use super::link::{Link, wait_up};
use super::{Shared, limits, state, users};
use crate::time::Timestamp;

/// How often old ids and past delays are forgotten.
const FORGET_EVERY: Duration = Duration::from_secs(5);

/// Clients whose things are declared again in a second at most, one after the other: what was deleted by somebody else,
/// and nothing else shows, is back after a round.
const AUDITS_PER_SECOND: u32 = 5;

/// How long a round takes at least.
const AUDIT_ROUND: Duration = Duration::from_secs(30);

/// Runs until the broker is closed.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut link = shared.link.subscribe();
    tokio::select! {
        _ = link.wait_for(Link::is_closed) => {}
        () = sweep(&shared) => {}
        () = forget(&shared) => {}
        () = audit(&shared) => {}
        () = refresh(&shared) => {}
        () = mend(&shared) => {}
        () = users::keep(&shared) => {}
    }
}

async fn sweep(shared: &Arc<Shared>) {
    let mut ticks = every(limits::SWEEP_EVERY);
    let mut link = shared.link.subscribe();
    loop {
        ticks.tick().await;
        match wait_up(&mut link).await {
            // Nothing can be moved while it takes no messages.
            Some(session) if session.blocked().is_none() => limits::sweep(shared).await,
            Some(_) => {}
            None => return,
        }
    }
}

async fn forget(shared: &Arc<Shared>) {
    let mut ticks = every(FORGET_EVERY);
    loop {
        ticks.tick().await;
        let now_s = Timestamp::now().as_millis().div_euclid(1000);
        let forgotten = match state::forget_due(&shared.db, now_s).await {
            Ok(()) => shared.dedup.forget_old().await,
            failed => failed,
        };
        if let Err(error) = forgotten {
            log::warn!("what counts no more is forgotten later: {error}");
        }
    }
}

async fn audit(shared: &Arc<Shared>) {
    let mut ticks = every(Duration::from_secs(1) / AUDITS_PER_SECOND);
    let mut link = shared.link.subscribe();
    loop {
        let begun = Instant::now();
        for client in shared.clients.all() {
            ticks.tick().await;
            if wait_up(&mut link).await.is_none() {
                return;
            }
            shared.repair(Some(&client)).await;
        }
        tokio::time::sleep_until(begun + AUDIT_ROUND).await;
    }
}

/// Looks at the deliveries that RabbitMQ waits for. See [`super::HELD_FOR`].
async fn refresh(shared: &Arc<Shared>) {
    let mut ticks = every(shared.options.look_every());
    loop {
        ticks.tick().await;
        shared.standing_consumers().iter().for_each(|core| core.refresh());
        for client in shared.clients.all() {
            client.consumers().iter().for_each(|core| core.refresh());
        }
    }
}

/// Declares everything again when an exchange was found missing: with it went its bindings. Nothing is moved on
/// meanwhile, so that no message finds the exchange without them.
async fn mend(shared: &Arc<Shared>) {
    let mut link = shared.link.subscribe();
    loop {
        let Some(session) = wait_up(&mut link).await else { return };
        let mut suspect = session.suspicions();
        tokio::select! {
            true = async { suspect.wait_for(|suspect| *suspect).await.is_ok() } => {
                log::warn!("an exchange was deleted by somebody else; everything is declared again");
                match shared.declare_everything(&session).await {
                    Ok(()) => session.set_suspect(false),
                    Err(error) => {
                        log::warn!("{}; trying again", with_cause(&error));
                        tokio::time::sleep(Duration::from_secs(1)).await;
                    }
                }
            }
            _ = link.changed() => {}
        }
    }
}

fn every(period: Duration) -> tokio::time::Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
