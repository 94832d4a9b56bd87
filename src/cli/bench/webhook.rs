//! `webhook` and `webhook-latency`: the pusher, to one healthy receiver that checks signatures; and what to measure it
//! against, a bare client that signs and posts over as many kept-alive connections.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::Options;
use super::latency::{Due, send_due, tick};
use super::load::{Run, SHOWN_EVERY, Tasks, send};
use super::payload::{Payload, numbers};
use super::receiver::Receiver;
use super::report::Report;
use super::scenarios::{report, report_arrived};
use super::target::{Caller, Target, unexpected};
use crate::cli::error::CliError;
use crate::cli::interrupt::Interrupt;
use crate::secret::WebhookSecrets;
use crate::time::Timestamp;
use crate::webhook::signature::Signer;

/// Attempts at once: the most that a webhook can have.
const CONCURRENCY: usize = 256;

/// Messages under way to the receiver before senders wait for it.
const WINDOW: u64 = 20_000;

/// Messages a second in `webhook-latency`.
const RATE: u64 = 500;

/// A receiver that takes what comes into the ledger of the run, once that has begun.
async fn receiver(
    message_bytes: usize,
    run: Rc<RefCell<Option<Rc<Run>>>>,
    seen: impl Fn(u64) + 'static,
) -> Result<Receiver, CliError> {
    let arrived = move |body: &[u8]| {
        if let Some(run) = &*run.borrow() {
            numbers(body, message_bytes, |number| {
                seen(number);
                run.ledger.borrow_mut().arrive(0, number);
            });
            run.arrived_now();
        }
    };
    Receiver::listen(arrived).await
}

/// Onboards a client whose inbox is pushed to the receiver.
async fn onboard(target: &Target, topic: &str, receiver: &Receiver) -> Result<(), CliError> {
    let url = format!("http://{}/", receiver.address());
    let webhook = json!({"url": url, "concurrency": CONCURRENCY, "timeout_s": 30});
    let client = json!({"subscriptions": [topic], "webhook": webhook});
    let record: Value = target.onboard_as("webhook-in", client).await?.1;
    receiver.expect(record["webhook_secret"].as_str().unwrap_or_default())
}

/// Waits until everything has arrived.
async fn arrive(run: Rc<Run>) -> Result<(), CliError> {
    while !run.is_complete() && !run.is_silent() {
        let _ = tokio::time::timeout(SHOWN_EVERY, run.moved.notified()).await;
    }
    Ok(())
}

/// Webhooks a second.
pub(super) async fn rate(target: &Target, options: &Options, interrupt: &Interrupt) -> Result<Report, CliError> {
    let connections = options.connections.unwrap_or(2);
    let topic = target.topic("webhook");
    let payload = Rc::new(Payload::new(&topic, options.bytes));
    let current = Rc::default();
    let receiver = receiver(payload.message_bytes(), Rc::clone(&current), |_| ()).await?;
    onboard(target, &topic, &receiver).await?;
    let sender = target.onboard("webhook-out", &[]).await?;
    let run = Run::begin(options, options.seconds, 1, interrupt);
    current.replace(Some(Rc::clone(&run)));
    let mut tasks = Tasks::new(&run);
    for _ in 0..connections {
        let caller = target.sender(&sender);
        tasks.spawn_sender(send(Rc::clone(&run), caller, Rc::clone(&payload), options.batch, WINDOW));
    }
    tasks.spawn(arrive(Rc::clone(&run)));
    tasks.finish("pushed", options.json, |run| run.ledger.borrow().arrived()).await?;
    let what = format!("NDJSON batches of {} in, a webhook each out, {CONCURRENCY} at once", options.batch);
    let mut report = report_arrived("webhook", what, &run, "webhooks", "-");
    report.verdict = receiver.verdict(report.verdict);
    Ok(report)
}

/// From the 202 to the arrival, at a steady rate.
pub(super) async fn latency(target: &Target, options: &Options, interrupt: &Interrupt) -> Result<Report, CliError> {
    let (connections, rate) = (options.connections.unwrap_or(16), options.rate.unwrap_or(RATE));
    let topic = target.topic("webhook-latency");
    let payload = Rc::new(Payload::new(&topic, options.bytes));
    let (current, arrivals) = (Rc::default(), Rc::new(Moments::default()));
    let seen = Rc::clone(&arrivals);
    let receiver = receiver(payload.message_bytes(), Rc::clone(&current), move |number| seen.note(number)).await?;
    onboard(target, &topic, &receiver).await?;
    let sender = target.onboard("webhook-latency-out", &[]).await?;
    let (run, due) = (Run::begin(options, options.seconds, 1, interrupt), Rc::new(Due::default()));
    current.replace(Some(Rc::clone(&run)));
    let acceptances = Rc::new(Moments::default());
    let mut tasks = Tasks::new(&run);
    tasks.spawn_sender(tick(Rc::clone(&run), Rc::clone(&due), rate));
    for _ in 0..connections {
        let (caller, accepted) = (target.single_sender(&sender), Rc::clone(&acceptances));
        let accepted = move |number| accepted.note(number);
        tasks.spawn_sender(send_due(Rc::clone(&run), Rc::clone(&due), caller, Rc::clone(&payload), accepted));
    }
    tasks.spawn(arrive(Rc::clone(&run)));
    tasks.finish("at a steady rate", options.json, |run| run.ledger.borrow().arrived()).await?;
    acceptances.until(&arrivals, |time| run.times.borrow_mut().add(time));
    let took = run.last_accepted.get() - run.started;
    let what = format!("202 to webhook at {rate} messages/s over {connections} connections");
    let mut report = report("webhook-latency", what, &run, "webhooks", run.accepted.get(), took, "202 to arrival");
    report.verdict = receiver.verdict(report.verdict);
    Ok(report)
}

/// When something happened to each message.
#[derive(Default)]
struct Moments(RefCell<Vec<Option<Instant>>>);

impl Moments {
    /// Now, to this one. Again is no matter: the first time counts.
    fn note(&self, number: u64) {
        let (mut moments, at) = (self.0.borrow_mut(), number as usize);
        if moments.len() <= at {
            moments.resize(at + 1, None);
        }
        moments[at].get_or_insert_with(Instant::now);
    }

    /// From each of these moments to the other's. None when that came first: the webhook may overtake the 202.
    fn until(&self, other: &Self, mut found: impl FnMut(Duration)) {
        for moments in self.0.borrow().iter().zip(other.0.borrow().iter()) {
            if let (Some(from), Some(to)) = moments {
                found(to.saturating_duration_since(*from));
            }
        }
    }
}

/// The yardstick of `webhook`: the same receiver, and a client that does nothing but sign and post. It has a thread of
/// its own, as the router has.
pub(super) async fn bare(options: &Options, seconds: f64, interrupt: &Interrupt) -> Result<Report, CliError> {
    let payload = Payload::new("bench.bare", options.bytes);
    let run = Run::begin(options, seconds, 1, interrupt);
    let receiver = receiver(payload.message_bytes(), Rc::new(RefCell::new(Some(Rc::clone(&run)))), |_| ()).await?;
    let secrets = WebhookSecrets::generate();
    receiver.expect(secrets.current())?;
    let signer = Signer::from_texts([secrets.current()]).map_err(|error| CliError::failed(error.to_string()))?;
    let client = Client {
        address: receiver.address(),
        signer,
        payload,
        next: AtomicU64::new(0),
        limit: options.messages.unwrap_or(u64::MAX),
        is_over: AtomicBool::new(false),
    };
    let client = Arc::new(client);
    let (done, answered) = oneshot::channel();
    let posting = Arc::clone(&client);
    // Nobody waits for it after an error.
    std::thread::spawn(move || drop(done.send(posting.run())));
    let mut tasks = Tasks::new(&run);
    let (watched, clock) = (Rc::clone(&run), Arc::clone(&client));
    tasks.spawn_sender(async move {
        let mut answered = answered;
        let answered = loop {
            match tokio::time::timeout(SHOWN_EVERY / 4, &mut answered).await {
                Ok(answered) => break answered,
                Err(_) => clock.is_over.store(watched.is_over(), Ordering::Relaxed),
            }
        };
        let answered = answered.unwrap_or_else(|_| Err(CliError::failed("the bare client panicked")))?;
        watched.accept(0..answered);
        Ok(())
    });
    tasks.spawn(arrive(Rc::clone(&run)));
    tasks.finish("posted", options.json, |run| run.ledger.borrow().arrived()).await?;
    let what = format!("a bare client that signs and posts, {CONCURRENCY} kept-alive connections");
    let mut report = report_arrived("bare-webhook", what, &run, "webhooks", "-");
    report.verdict = receiver.verdict(report.verdict);
    Ok(report)
}

/// The bare client.
struct Client {
    address: String,
    signer: Signer,
    payload: Payload,
    next: AtomicU64,
    limit: u64,
    is_over: AtomicBool,
}

impl Client {
    /// Posts until it is over; returns how many were answered.
    fn run(&self) -> Result<u64, CliError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| CliError::failed(format!("cannot start the bare client: {error}")))?;
        let connections = futures_util::future::try_join_all((0..CONCURRENCY).map(|_| self.post()));
        runtime.block_on(connections).map(|_| self.next.load(Ordering::Relaxed).min(self.limit))
    }

    async fn post(&self) -> Result<(), CliError> {
        let mut caller = Caller::post(&self.address, "/", "none", "application/json");
        let (mut body, mut headers) = (Vec::new(), String::new());
        while !self.is_over.load(Ordering::Relaxed) {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            if number >= self.limit {
                break;
            }
            body.clear();
            self.payload.write(number..number + 1, &mut body);
            let id = format!("bench:{number}");
            let timestamp = (Timestamp::now().as_millis() / 1000).to_string();
            let signature = self.signer.sign(&id, &timestamp, &body);
            headers.clear();
            for part in [
                "webhook-id: ",
                &id,
                "\r\nwebhook-timestamp: ",
                &timestamp,
                "\r\nwebhook-signature: ",
                &signature,
                "\r\n",
            ] {
                headers.push_str(part);
            }
            let answer = caller.call_with(&headers, &body).await?;
            if answer.status != 200 {
                return Err(unexpected(&answer));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_from_one_moment_to_the_other_and_never_negative() {
        let (from, to) = (Moments::default(), Moments::default());
        to.note(1);
        from.note(1);
        from.note(0);
        to.note(0);
        from.note(7);
        let mut times = Vec::new();
        from.until(&to, |time| times.push(time));
        assert_eq!(times.len(), 2, "what did not arrive has no time");
        assert_eq!(times[1], Duration::ZERO);
    }
}
