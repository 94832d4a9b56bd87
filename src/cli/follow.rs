//! `backbone receive --follow`: an inbox read over the WebSocket, so that a message is printed the moment it is routed.
//!
//! What was printed is acknowledged; what was not comes back when the connection ends, however it ends. A router that goes
//! away is waited for.

use std::borrow::Cow;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use super::api::{Api, Failure, Problem, Who, wait_before};
use super::context::Context;
use super::error::CliError;
use super::interrupt::Interrupt;
use super::output::count;
use super::receive::{passes, print};
use crate::websocket::{Incoming, WebSocket};

/// Messages that the router may hand over before the first is acknowledged.
const CREDIT: usize = 256;

/// After this long without a word the router is asked whether it is there; it answers, or is gone, within the second.
const QUIET_MAX: Duration = Duration::from_secs(20);
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// How long the router has for its last words.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// What every message frame begins with. Without it, it is what `GET /receive` gives.
const MESSAGE_FRAME: &[u8] = br#"{"type":"message","#;

/// What of a frame decides what is done with it.
#[derive(Deserialize)]
struct Frame<'a> {
    #[serde(borrow)]
    r#type: Cow<'a, str>,
    receipt: Option<String>,
    problem: Option<Problem>,
    #[serde(default)]
    unknown: Vec<String>,
}

/// Prints and acknowledges what comes, until an interrupt; returns how many. Waits for a router that is away, once it has
/// been there.
pub(super) async fn follow(
    api: &Api,
    who: &Who,
    context: &mut Context,
    interrupt: &mut Interrupt,
) -> Result<u64, CliError> {
    let (mut taken, mut failed) = (0, 0);
    let mut reached = false;
    while !interrupt.is_set() {
        let Some(connected) = interrupt.or(api.websocket(who)).await else { break };
        let failure = match connected {
            Ok(mut socket) => {
                if failed > 0 {
                    context.out.note("the router is back");
                }
                (reached, failed) = (true, 0);
                match read(&mut socket, context, interrupt, &mut taken).await? {
                    Some(failure) => failure,
                    None => {
                        // What was acknowledged is settled before the router answers the close.
                        let _ = tokio::time::timeout(CLOSE_TIMEOUT, socket.close()).await;
                        break;
                    }
                }
            }
            Err(failure) => failure,
        };
        if !passes(&failure, reached) {
            return Err(failure.into());
        }
        if failed == 0 {
            context.out.note(format!("{failure}; waiting for it"));
        }
        let wait = wait_before(failed, &failure);
        failed += 1;
        interrupt.or(tokio::time::sleep(wait)).await;
    }
    Ok(taken)
}

/// Reads one connection until it ends, which is a failure, or until an interrupt.
async fn read(
    socket: &mut WebSocket,
    context: &mut Context,
    interrupt: &mut Interrupt,
    taken: &mut u64,
) -> Result<Option<Failure>, CliError> {
    socket.queue(&json!({"type": "credit", "credit": CREDIT}).to_string());
    let mut asked = false;
    loop {
        if let Err(error) = socket.flush().await {
            return Ok(Some(lost(&error)));
        }
        let patience = if asked { ANSWER_MAX } else { QUIET_MAX };
        let Some(next) = interrupt.or(tokio::time::timeout(patience, socket.next())).await else { return Ok(None) };
        let mut next = match next {
            Ok(next) => next,
            Err(_) if asked => return Ok(Some(Failure::Broken("the router does not answer".into()))),
            Err(_) => {
                // Settles nothing, and is answered.
                socket.queue(&json!({"type": "ack", "receipts": []}).to_string());
                asked = true;
                continue;
            }
        };
        asked = false;
        // What has come already is printed together and acknowledged together.
        let mut receipts = Vec::new();
        let end = loop {
            match next {
                Ok(Incoming::Text(text)) => {
                    if let Some(failure) = heed(context, &text, &mut receipts)? {
                        break Some(failure);
                    }
                }
                Ok(Incoming::Closed(code, reason)) => break Some(closed(code, &reason)?),
                Err(error) => break Some(lost(&error)),
            }
            match socket.next().now_or_never() {
                // Bounded by the credit: nothing is acknowledged meanwhile.
                Some(more) => next = more,
                None => break None,
            }
        };
        // Only what is seen through to stdout is acknowledged.
        context.out.flush()?;
        *taken += receipts.len() as u64;
        if !receipts.is_empty() {
            socket.queue(&json!({"type": "ack", "receipts": receipts}).to_string());
        }
        if end.is_some() {
            // The connection is done for, most likely; an acknowledgement that gets through saves a repetition.
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, socket.flush()).await;
            return Ok(end);
        }
    }
}

/// Does what a frame asks for; a failure ends the connection.
fn heed(context: &mut Context, text: &Bytes, receipts: &mut Vec<String>) -> Result<Option<Failure>, CliError> {
    let unreadable =
        |error: serde_json::Error| CliError::failed(format!("the router sent a frame that cannot be read: {error}"));
    let frame: Frame<'_> = serde_json::from_slice(text).map_err(unreadable)?;
    match (&*frame.r#type, frame.receipt, frame.problem) {
        ("message", Some(receipt), _) => {
            let bare = match text.strip_prefix(MESSAGE_FRAME) {
                Some(members) => [b"{", members].concat(),
                None => text.to_vec(),
            };
            let message: &RawValue = serde_json::from_slice(&bare).map_err(unreadable)?;
            print(&mut context.out, message)?;
            receipts.push(receipt);
        }
        ("error", _, Some(problem)) => return Ok(Some(Failure::of_a_client(problem))),
        ("settled", ..) if !frame.unknown.is_empty() => {
            let many = count(frame.unknown.len() as u64, "message");
            context.out.note(format!("{many} came too late to be acknowledged: may come again"));
        }
        _ => {}
    }
    Ok(None)
}

fn lost(error: &std::io::Error) -> Failure {
    Failure::Broken(format!("the connection to the router broke: {error}"))
}

/// What a close frame means; an error when there is nothing to come back to.
fn closed(code: u16, reason: &str) -> Result<Failure, CliError> {
    let reason = if reason.is_empty() { "without a reason" } else { reason };
    match code {
        1008 => Err(CliError::failed(format!("the router closed the connection: {reason}"))),
        _ => Ok(Failure::Broken(format!("the router closed the connection: {reason} ({code})"))),
    }
}
