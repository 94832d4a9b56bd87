//! How attempts end: what their results mean for message, endpoint and webhook, and the settling.

use std::time::{Duration, Instant};

use futures_util::{FutureExt as _, StreamExt as _};

use super::job::{Finished, class_of};
use super::notes::failing_since;
use super::probe::Look;
use super::{Condition, Head, Host, IDLE_CHECK_EVERY, Push, Settling, Waiting, key_of, roll};
use crate::broker::{self, BrokerError, DeadReason, Outcome};
use crate::telemetry::Step;
use crate::time::Timestamp;
use crate::webhook::breaker::{BreakerState, FAILURES_TO_OPEN, Fault, Ticket};
use crate::webhook::verdict::{self, OffReason, Verdict};

impl<H: Host> Push<H> {
    /// Takes what has ended, and what else has by now, so that it is settled together.
    pub(super) fn finish_all(&mut self, first: Finished) {
        self.finish(first);
        while let Some(Some(next)) = self.under_way.next().now_or_never() {
            self.finish(next);
        }
        self.look_past_failed();
        self.settle_outcomes();
        self.idle_check_at.get_or_insert_with(|| Instant::now() + IDLE_CHECK_EVERY);
    }

    pub(super) fn check_idle(&mut self) {
        self.idle_check_at = self.endpoint.close_idle().then(|| Instant::now() + IDLE_CHECK_EVERY);
    }

    fn finish(&mut self, finished: Finished) {
        let Finished { waiting, ticket, attempt, latency, result } = finished;
        let attempts = waiting.attempts.saturating_add(1);
        let metrics = &self.means.telemetry.metrics;
        metrics.webhook_attempts.with_label_values(&[class_of(&result)]).inc();
        metrics.webhook_latency.observe(latency.as_secs_f64());
        let words = attempt.error.clone();
        self.means.log.note(&self.client, attempt);
        let (now, clock) = (Instant::now(), Timestamp::now());
        let verdict = verdict::of(&result, &self.webhook.retry_schedule_s, attempts, clock, roll());
        if verdict == Verdict::Delivered {
            self.note_success(ticket);
            self.outcomes.push((waiting.consumer, waiting.delivery, Outcome::Complete));
            return;
        }
        if self.means.telemetry.traces.is_on() {
            self.means.telemetry.traces.record(&waiting.message, Step::AttemptFailed(self.client.clone()));
        }
        let fault = if result.is_ok() { Fault::Refused } else { Fault::Silent };
        self.note_failure((ticket, fault), now, clock, words.as_deref().unwrap_or("no answer"));
        match verdict {
            Verdict::Delivered => {}
            Verdict::Retry { wait, asked } => {
                if let Some(asked) = asked {
                    self.throttle.asked(now, asked);
                }
                if self.webhook.ordered {
                    self.hold(waiting, attempts, wait, now, clock);
                } else {
                    let outcome = Outcome::Delay { delay: wait, attempts };
                    self.outcomes.push((waiting.consumer, waiting.delivery, outcome));
                }
            }
            Verdict::Dead => {
                log::debug!("message {} to {} is dead after {attempts} attempts", waiting.message.id, self.client);
                if self.webhook.ordered {
                    self.head = None;
                }
                let outcome = Outcome::Dead { reason: DeadReason::DeliveryFailed, attempts };
                self.outcomes.push((waiting.consumer, waiting.delivery, outcome));
            }
            Verdict::SwitchOff => {
                self.outcomes.push((waiting.consumer, waiting.delivery, Outcome::Requeue));
                self.end_with(OffReason::Gone);
            }
        }
    }

    /// Keeps the head of an ordered webhook in hand until its retry is due.
    fn hold(&mut self, waiting: Waiting, attempts: u32, wait: Duration, now: Instant, clock: Timestamp) {
        let wait_ms = i64::try_from(wait.as_millis()).unwrap_or(i64::MAX);
        let key = key_of(&waiting.message);
        self.head = Some(Head { key, attempts, due: clock.plus_millis(wait_ms), due_at: now + wait });
        if !self.is_ending() && self.consumer.is_some() && waiting.consumer == self.consumers {
            self.held_since = Some(now);
            self.waiting.push_front(Waiting { attempts, ..waiting });
        }
    }

    fn note_success(&mut self, ticket: Ticket) {
        if self.breaker.state() != BreakerState::Closed {
            log::info!("webhook of {} answers again", self.client);
        }
        self.breaker.succeeded(ticket);
        self.shown.set(self.breaker.state());
        self.throttle.succeeded();
        self.failing_since = None;
        if self.webhook.ordered {
            self.head = None;
        }
    }

    fn note_failure(&mut self, (ticket, fault): (Ticket, Fault), now: Instant, clock: Timestamp, words: &str) {
        let before = self.breaker.state();
        self.breaker.failed(ticket, fault, now, roll());
        let after = self.breaker.state();
        if before != after {
            // It has opened: each opening has a search of its own.
            self.look = Look::default();
        }
        self.shown.set(after);
        if (before, after) == (BreakerState::Closed, BreakerState::Open) {
            log::warn!(
                "webhook of {} failed {FAILURES_TO_OPEN} times in a row ({words}); it is probed until it answers",
                self.client
            );
        }
        let since = failing_since(self.failing_since, self.last_failure, clock);
        (self.failing_since, self.last_failure) = (Some(since), Some(clock));
        let failing_ms = clock.as_millis().saturating_sub(since.as_millis());
        if u128::try_from(failing_ms).unwrap_or(0) >= self.means.disable_after.as_millis() {
            self.end_with(OffReason::Failing);
        }
    }

    fn end_with(&mut self, reason: OffReason) {
        self.switch_off.get_or_insert(reason);
        self.let_go();
    }

    pub(super) fn settle_outcomes(&mut self) {
        while let Some(consumer) = self.outcomes.first().map(|(consumer, ..)| *consumer) {
            let (own, others): (Vec<_>, Vec<_>) =
                std::mem::take(&mut self.outcomes).into_iter().partition(|(of, ..)| *of == consumer);
            self.outcomes = others;
            let own = own.into_iter().map(|(_, delivery, outcome)| (delivery, outcome)).collect();
            let mut settle: Settling = Box::pin(broker::settle(own));
            // Most often there is nothing to wait for.
            match (&mut settle).now_or_never() {
                Some(settled) => self.note_settled(settled),
                None => self.settling.push(settle),
            }
        }
    }

    pub(super) fn note_settled(&mut self, settled: Result<(), BrokerError>) {
        self.look_on();
        if let Err(error) = settled
            && !self.is_ending()
        {
            // What was not settled comes again, and so that all comes in order, all goes back.
            self.log_broker("settle what was delivered", &error);
            self.reopen_later(Condition::Waiting);
        }
    }
}
