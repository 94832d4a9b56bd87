//! `backbone listen`: a small webhook receiver, to try things out. Verifies what comes as a receiver should, prints it,
//! and only then answers, so that nothing that was answered is lost to a closed stdout.

use std::borrow::Cow;
use std::collections::{HashSet, VecDeque};
use std::io::Write as _;
use std::net::SocketAddr;

use actix_web::http::StatusCode;
use actix_web::{App, HttpRequest, HttpResponse, HttpServer, web};
use bytes::Bytes;
use clap::Args;
use serde::Serialize;
use serde_json::value::RawValue;
use tokio::sync::{mpsc, oneshot};

use super::child::ANNOUNCEMENT;
use super::context::{Context, from_file_if_asked};
use super::error::CliError;
use super::interrupt::Interrupt;
use super::output::{Output, count, on_one_line};
use super::receive::Shown;
use crate::time::Timestamp;
use crate::webhook::signature::{SigningSecret, verify};

/// Longest body that is read; a router's default is far below it.
const BODY_BYTES_MAX: usize = 64 << 20;

/// Requests that may wait to be printed.
const WAITING_MAX: usize = 64;

/// Ids that are remembered, to tell what comes again.
const IDS_MAX: usize = 10_000;

/// Receive webhooks, verify their signatures, and print what arrives
///
/// A receiver to try things out with: set a client's webhook to the URL that it prints. The router refuses addresses
/// that are not public unless SOAR_WEBHOOK_ALLOW lists them (127.0.0.1/32 for this machine). Answers 200 to what is
/// signed with one of the secrets and 401 to everything else; without a secret nothing is verified. Ends with Ctrl-C.
#[derive(Debug, Args)]
pub(crate) struct Listen {
    /// Where to listen; port 0 takes a free one
    #[arg(value_name = "ADDRESS", default_value = "127.0.0.1:9000")]
    address: SocketAddr,
    /// A webhook secret, whsec_…; `@FILE` reads it from a file. Repeatable: during a rotation either will do
    #[arg(
        long = "webhook-secret",
        env = "SOAR_WEBHOOK_SECRET",
        hide_env_values = true,
        value_name = "SECRET",
        value_delimiter = ','
    )]
    secrets: Vec<String>,
    /// Answer with this status to what is verified, to see what the router does then
    #[arg(long, value_name = "CODE", default_value_t = 200, value_parser = clap::value_parser!(u16).range(200..=599))]
    status: u16,
    /// Answer with this Retry-After as well: seconds, or an HTTP date
    #[arg(long, value_name = "WHEN")]
    retry_after: Option<String>,
    /// End after this many messages
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max: Option<u64>,
}

/// What came, and who waits to be told how to answer.
struct Arrival {
    id: String,
    timestamp_s: String,
    signatures: String,
    body: Bytes,
    answer: oneshot::Sender<u16>,
}

/// One arrival for programs.
#[derive(Serialize)]
struct Line<'a> {
    webhook_id: &'a str,
    webhook_timestamp: &'a str,
    /// `null` when there is no secret to verify with.
    verified: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// Whether this id came before.
    again: bool,
    answered: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    envelope: Option<&'a RawValue>,
    /// The body, when it is not JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    raw: Option<Cow<'a, str>>,
}

impl Listen {
    pub(crate) async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let secrets = self.secrets.iter().filter(|text| !text.is_empty()).map(|text| secret(text));
        let mut receiver = Receiver {
            secrets: secrets.collect::<Result<_, _>>()?,
            status: self.status,
            seen: HashSet::new(),
            order: VecDeque::new(),
        };
        let (arrivals, mut waiting) = mpsc::channel::<Arrival>(WAITING_MAX);
        let retry_after = self.retry_after.clone();
        let server = HttpServer::new(move || {
            App::new()
                .app_data(web::Data::new((arrivals.clone(), retry_after.clone())))
                .app_data(web::PayloadConfig::new(BODY_BYTES_MAX))
                .default_service(web::post().to(take))
        });
        let server = server.workers(1).disable_signals().shutdown_timeout(1).bind(self.address).map_err(|error| {
            CliError::failed(format!("cannot listen on {}: {error}; name another ADDRESS", self.address))
        })?;
        let mut interrupt = Interrupt::listen()?;
        announce(&server.addrs(), &receiver);
        let server = server.run();
        let handle = server.handle();
        let mut server = std::pin::pin!(server);
        let mut taken = 0;
        while self.max.is_none_or(|max| taken < max) {
            tokio::select! {
                () = interrupt.wait() => break,
                end = &mut server => {
                    let why = end.err().map_or_else(|| "unasked".to_owned(), |error| error.to_string());
                    return Err(CliError::failed(format!("the receiver ended: {why}")));
                }
                Some(arrival) = waiting.recv() => taken += u64::from(receiver.receive(&mut context.out, arrival)?),
            }
        }
        // What waits is answered by nobody, and so comes again.
        drop(waiting);
        let ((), _) = tokio::join!(handle.stop(true), server);
        context.out.flush()?;
        context.out.note(format!("{} taken", count(taken, "message")));
        Ok(())
    }
}

fn secret(text: &str) -> Result<SigningSecret, CliError> {
    let text = from_file_if_asked(text, "--webhook-secret")?;
    SigningSecret::parse(text.trim())
        .map_err(|error| CliError::usage(format!("--webhook-secret is no webhook secret: it {error}")))
}

/// Says where it listens, to scripts as well: they cannot know a port that was taken freely.
fn announce(addresses: &[SocketAddr], receiver: &Receiver) {
    let mut stderr = std::io::stderr();
    for address in addresses {
        let how = match receiver.secrets.len() {
            0 => "verifies nothing (no --webhook-secret)",
            _ => "verifies signatures",
        };
        // Best effort, like every note.
        let _ = writeln!(stderr, "{ANNOUNCEMENT}http://{address}/ and {how}; Ctrl-C ends it");
    }
}

/// Hands a request to the loop that prints, and answers as that says.
async fn take(
    request: HttpRequest,
    body: Bytes,
    shared: web::Data<(mpsc::Sender<Arrival>, Option<String>)>,
) -> HttpResponse {
    let (arrivals, retry_after) = &**shared;
    let header =
        |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let (answer, answered) = oneshot::channel();
    let arrival = Arrival {
        id: header("webhook-id"),
        timestamp_s: header("webhook-timestamp"),
        signatures: header("webhook-signature"),
        body,
        answer,
    };
    if arrivals.send(arrival).await.is_err() {
        return HttpResponse::ServiceUnavailable().finish();
    }
    let Ok(status) = answered.await else { return HttpResponse::ServiceUnavailable().finish() };
    let mut response = HttpResponse::build(StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR));
    if status != StatusCode::UNAUTHORIZED.as_u16()
        && let Some(when) = retry_after
    {
        response.insert_header(("retry-after", when.as_str()));
    }
    response.finish()
}

struct Receiver {
    secrets: Vec<SigningSecret>,
    status: u16,
    /// The newest ids, and their order.
    seen: HashSet<String>,
    order: VecDeque<String>,
}

impl Receiver {
    /// Verifies, prints, answers. Whether it was taken.
    fn receive(&mut self, out: &mut Output, arrival: Arrival) -> Result<bool, CliError> {
        let verified = self.verify(&arrival, Timestamp::now());
        let (error, answered) = match &verified {
            Some(Err(error)) => (Some(error.to_string()), StatusCode::UNAUTHORIZED.as_u16()),
            _ => (None, self.status),
        };
        let again = error.is_none() && self.came_before(&arrival.id);
        let verified = verified.map(|verified| verified.is_ok());
        if out.json {
            let envelope = serde_json::from_slice::<&RawValue>(&arrival.body).ok();
            out.json_line(&Line {
                webhook_id: &arrival.id,
                webhook_timestamp: &arrival.timestamp_s,
                verified,
                error,
                again,
                answered,
                envelope,
                raw: envelope.is_none().then(|| String::from_utf8_lossy(&arrival.body)),
            })?;
        } else if let Some(error) = error {
            out.note(format!("refused with {answered}: {error}"));
        } else {
            out.line(line(&arrival.body, verified.is_some(), again))?;
        }
        out.flush()?;
        // Whoever asked may have gone by now.
        let _ = arrival.answer.send(answered);
        Ok(verified != Some(false))
    }

    /// `None` when there is nothing to verify with.
    fn verify(&self, arrival: &Arrival, now: Timestamp) -> Option<Result<(), crate::webhook::signature::VerifyError>> {
        let check = |secret| verify(secret, &arrival.id, &arrival.timestamp_s, &arrival.signatures, &arrival.body, now);
        let results: Vec<_> = self.secrets.iter().map(check).collect();
        results.iter().find(|result| result.is_ok()).or(results.first()).copied()
    }

    fn came_before(&mut self, id: &str) -> bool {
        if !self.seen.insert(id.to_owned()) {
            return true;
        }
        self.order.push_back(id.to_owned());
        if self.order.len() > IDS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.seen.remove(&oldest);
        }
        false
    }
}

/// One message for people, on one line: when, from whom, on what, and what.
fn line(body: &[u8], verified: bool, again: bool) -> String {
    let mark = match (verified, again) {
        (true, false) => "",
        (true, true) => "  (again)",
        (false, false) => "  (not verified)",
        (false, true) => "  (again, not verified)",
    };
    match serde_json::from_slice::<Shown<'_>>(body) {
        Ok(shown) => shown.line(mark),
        Err(_) => format!("no envelope{mark}  {}", on_one_line(&String::from_utf8_lossy(body))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::WebhookSecrets;
    use crate::webhook::signature::Signer;

    fn arrival(signer: &Signer, id: &str, body: &'static str) -> (Arrival, oneshot::Receiver<u16>) {
        let (answer, answered) = oneshot::channel();
        let timestamp_s = (Timestamp::now().as_millis() / 1000).to_string();
        let signatures = signer.sign(id, &timestamp_s, body.as_bytes());
        (
            Arrival { id: id.into(), timestamp_s, signatures, body: Bytes::from_static(body.as_bytes()), answer },
            answered,
        )
    }

    fn receiver(secrets: &[&str]) -> Receiver {
        let secrets = secrets.iter().map(|text| secret(text).expect("made to be one")).collect();
        Receiver { secrets, status: 204, seen: HashSet::new(), order: VecDeque::new() }
    }

    #[test]
    fn what_fits_one_of_the_secrets_is_taken_and_the_rest_refused() {
        let (old, new) = (WebhookSecrets::generate(), WebhookSecrets::generate());
        let mut receiver = receiver(&[old.current(), new.current()]);
        let mut out = Output::to(true, Box::new(std::io::sink()));
        for (secrets, status) in [(&old, 204), (&new, 204), (&WebhookSecrets::generate(), 401)] {
            let signer = Signer::from_texts([secrets.current()]).expect("a secret");
            let (arrival, mut answered) = arrival(&signer, "a", "{}");
            assert_eq!(receiver.receive(&mut out, arrival).expect("written"), status == 204);
            assert_eq!(answered.try_recv(), Ok(status));
        }
    }

    #[test]
    fn ids_are_remembered_up_to_a_bound() {
        let mut receiver = receiver(&[]);
        assert!(!receiver.came_before("first") && receiver.came_before("first"));
        (0..IDS_MAX).for_each(|n| assert!(!receiver.came_before(&n.to_string())));
        assert_eq!((receiver.seen.len(), receiver.order.len()), (IDS_MAX, IDS_MAX));
        assert!(!receiver.came_before("first"), "forgotten by now");
    }

    #[test]
    fn a_message_is_one_line() {
        let body =
            b"{\"id\":\"1\",\"topic\":\"a.b\",\"sender\":\"noc-c2\",\"sent_at\":\"T\",\"message\":{\n\"n\": 1.0}}";
        assert_eq!(line(body, true, false), "T  noc-c2  a.b  { \"n\": 1.0}");
        assert_eq!(line(body, false, true), "T  noc-c2  a.b  (again, not verified)  { \"n\": 1.0}");
        let broadcast = br#"{"id":"1","sender":"s","sent_at":"T","broadcast":true,"message":"x"}"#;
        assert_eq!(line(broadcast, true, false), "T  s  (broadcast)  \"x\"");
        assert_eq!(line(b"\x1b[2J\nno", true, false), "no envelope  \u{fffd}[2J no");
    }
}
