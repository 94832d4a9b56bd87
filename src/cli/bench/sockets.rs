//! `ws`: messages in over a few WebSockets and out over a few, at the same time; `ws-latency`: how long that takes at a
//! steady rate.

use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::time::Instant;

use futures_util::FutureExt as _;
use tokio::net::TcpStream;

use super::Options;
use super::latency::{Due, RATE, tick};
use super::load::{Run, SHOWN_EVERY, Tasks};
use super::payload::{Payload, numbers};
use super::report::Report;
use super::scenarios::{report, report_arrived};
use super::target::Target;
use crate::cli::error::CliError;
use crate::cli::interrupt::Interrupt;
use crate::websocket::{Incoming, WebSocket};

/// Sockets that read the inbox.
const RECEIVERS: usize = 2;

/// Frames of a socket that wait for their `accepted`.
const FRAMES_UNDER_WAY: usize = 8;

/// Unsettled messages that a socket asks for.
const CREDIT: usize = 5_000;

/// Receipts in an `ack`, at most.
const RECEIPTS_MAX: usize = 500;

type Socket = WebSocket<TcpStream>;

/// Runs the scenario.
pub(super) async fn ws(target: &Target, options: &Options, interrupt: &Interrupt) -> Result<Report, CliError> {
    let connections = options.connections.unwrap_or(2);
    let topic = target.topic("ws");
    let receiver = target.onboard("ws-in", std::slice::from_ref(&topic)).await?;
    let sender = target.onboard("ws-out", &[]).await?;
    let payload = Rc::new(Payload::new(&topic, options.bytes));
    let (mut senders, mut receivers) = (Vec::new(), Vec::new());
    for _ in 0..connections {
        senders.push(target.socket(&sender).await?);
    }
    for _ in 0..RECEIVERS {
        receivers.push(target.socket(&receiver).await?);
    }
    let run = Run::begin(options, options.seconds, 1, interrupt);
    let mut tasks = Tasks::new(&run);
    for socket in senders {
        let window = options.window();
        tasks.spawn_sender(send(Rc::clone(&run), socket, Rc::clone(&payload), options.batch, window));
    }
    for socket in receivers {
        tasks.spawn(receive(Rc::clone(&run), socket, payload.message_bytes(), |_, _| ()));
    }
    tasks.finish("over sockets", options.json, |run| run.ledger.borrow().arrived()).await?;
    let what = format!(
        "frames of {} messages in over {connections} sockets, a frame each out over {RECEIVERS}, acknowledged",
        options.batch
    );
    Ok(report_arrived("ws", what, &run, "messages", "frame"))
}

/// Runs the scenario at a steady rate: one socket that sends and one that receives, as the bare queues have.
pub(super) async fn latency(target: &Target, options: &Options, interrupt: &Interrupt) -> Result<Report, CliError> {
    let rate = options.rate.unwrap_or(RATE);
    let topic = target.topic("ws-latency");
    let receiver = target.onboard("ws-latency-in", std::slice::from_ref(&topic)).await?;
    let sender = target.onboard("ws-latency-out", &[]).await?;
    let payload = Rc::new(Payload::new(&topic, options.bytes));
    let (source, sink) = (target.socket(&sender).await?, target.socket(&receiver).await?);
    let run = Run::begin(options, options.seconds, 1, interrupt);
    let due = Rc::new(Due::at(rate, &run));
    let mut tasks = Tasks::new(&run);
    tasks.spawn_sender(tick(Rc::clone(&run), Rc::clone(&due), rate));
    tasks.spawn_sender(send_due(Rc::clone(&run), Rc::clone(&due), source, Rc::clone(&payload)));
    let arrived = move |run: &Run, number| due.arrived(run, number);
    tasks.spawn(receive(Rc::clone(&run), sink, payload.message_bytes(), arrived));
    tasks.finish("at a steady rate", options.json, |run| run.ledger.borrow().arrived()).await?;
    let took = run.last_accepted.get() - run.started;
    let what = format!("in over a socket and out over another at {rate} messages/s, acknowledged");
    Ok(report("ws-latency", what, &run, "messages", run.accepted.get(), took, "send to receive"))
}

fn broken(error: std::io::Error) -> CliError {
    CliError::failed(format!("the WebSocket broke under load: {error}"))
}

/// Sends frame after frame, and takes their answers, which come in the same order.
async fn send(run: Rc<Run>, mut socket: Socket, payload: Rc<Payload>, batch: u64, window: u64) -> Result<(), CliError> {
    let mut under_way: VecDeque<(Range<u64>, Instant)> = VecDeque::new();
    let mut body = Vec::new();
    loop {
        while under_way.len() < FRAMES_UNDER_WAY && run.is_within(window) {
            let Some(numbers) = run.take(batch) else { break };
            queue(&mut socket, &payload, numbers.clone(), &mut body)?;
            under_way.push_back((numbers, Instant::now()));
        }
        socket.flush().await.map_err(broken)?;
        if !under_way.is_empty() {
            accepted(&next(&mut socket).await?)?;
            if let Some((numbers, since)) = under_way.pop_front() {
                run.times.borrow_mut().add(since.elapsed());
                run.accept(numbers);
            }
        } else if run.is_over() || !run.has_more() {
            return socket.close().await.map_err(broken);
        } else {
            run.wait_for_window(window).await;
        }
    }
}

/// Sends what is due, as many in a frame as have come due since the last, and takes the answers as they come.
async fn send_due(run: Rc<Run>, due: Rc<Due>, mut socket: Socket, payload: Rc<Payload>) -> Result<(), CliError> {
    let mut under_way: VecDeque<Range<u64>> = VecDeque::new();
    let mut body = Vec::new();
    loop {
        let more = due.more();
        if let Some(first) = due.take() {
            // They come due in the order of their numbers.
            let last = std::iter::from_fn(|| due.take()).last().unwrap_or(first);
            queue(&mut socket, &payload, first..last + 1, &mut body)?;
            socket.flush().await.map_err(broken)?;
            under_way.push_back(first..last + 1);
            continue;
        }
        tokio::select! {
            text = next(&mut socket), if !under_way.is_empty() => {
                accepted(&text?)?;
                under_way.pop_front().into_iter().for_each(|numbers| run.accept(numbers));
            }
            () = more, if !due.is_over() => {}
            else => return socket.close().await.map_err(broken),
        }
    }
}

/// Puts a frame with these messages in line.
fn queue(socket: &mut Socket, payload: &Payload, numbers: Range<u64>, body: &mut Vec<u8>) -> Result<(), CliError> {
    body.clear();
    body.extend_from_slice(b"{\"type\":\"send\",\"messages\":[");
    for number in numbers {
        payload.write(number..number + 1, body);
        // Over the line's end.
        body.pop();
        body.push(b',');
    }
    body.pop();
    body.extend_from_slice(b"]}");
    socket.queue(std::str::from_utf8(body).map_err(|error| CliError::failed(error.to_string()))?);
    Ok(())
}

/// Fails unless the router has accepted a frame.
fn accepted(text: &[u8]) -> Result<(), CliError> {
    if text.starts_with(b"{\"type\":\"accepted\"") { Ok(()) } else { Err(unexpected(text)) }
}

/// Receives, acknowledges what is there at once, and calls `seen` for each message.
async fn receive(
    run: Rc<Run>,
    mut socket: Socket,
    message_bytes: usize,
    seen: impl Fn(&Run, u64),
) -> Result<(), CliError> {
    socket.send(&format!("{{\"type\":\"credit\",\"credit\":{CREDIT}}}")).await.map_err(broken)?;
    let mut receipts = String::new();
    while !run.is_complete() && !run.is_silent() {
        // Looks at the clock now and then, for when nothing comes any more.
        let Ok(first) = tokio::time::timeout(SHOWN_EVERY, next(&mut socket)).await else { continue };
        let mut frame = Some(first?);
        let mut count = 0;
        receipts.clear();
        while let Some(text) = frame {
            match receipt_of(&text) {
                Some(receipt) => {
                    numbers(&text, message_bytes, |number| {
                        seen(&run, number);
                        run.ledger.borrow_mut().arrive(0, number);
                    });
                    let comma = if count > 0 { ",\"" } else { "\"" };
                    receipts.extend([comma, receipt, "\""]);
                    count += 1;
                }
                None if text.starts_with(b"{\"type\":\"settled\"") => {}
                None => return Err(unexpected(&text)),
            }
            frame = if count < RECEIPTS_MAX { next(&mut socket).now_or_never().transpose()? } else { None };
        }
        if count > 0 {
            run.arrived_now();
            socket.send(&format!("{{\"type\":\"ack\",\"receipts\":[{receipts}]}}")).await.map_err(broken)?;
        }
    }
    socket.close().await.map_err(broken)
}

async fn next(socket: &mut Socket) -> Result<bytes::Bytes, CliError> {
    match socket.next().await.map_err(broken)? {
        Incoming::Text(text) => Ok(text),
        Incoming::Closed(code, why) => {
            Err(CliError::failed(format!("the router closed the WebSocket under load: {code} {why}")))
        }
    }
}

/// The receipt of a message; it comes after the content, which may say anything.
fn receipt_of(frame: &[u8]) -> Option<&str> {
    const NAME: &[u8] = b"\"receipt\":\"";
    if !frame.starts_with(b"{\"type\":\"message\"") {
        return None;
    }
    let at = frame.windows(NAME.len()).rposition(|window| window == NAME)? + NAME.len();
    let length = frame[at..].iter().position(|byte| *byte == b'"')?;
    std::str::from_utf8(&frame[at..at + length]).ok()
}

fn unexpected(text: &[u8]) -> CliError {
    let said: String = String::from_utf8_lossy(text).chars().take(300).collect();
    CliError::failed(format!("the router sent under load: {said}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_receipt_is_the_routers() {
        let frame = br#"{"type":"message","id":"1","message":{"receipt":"x"},"receipt":"9c-1","deliveries":1}"#;
        assert_eq!(receipt_of(frame), Some("9c-1"));
        assert_eq!(receipt_of(br#"{"type":"settled","settled":1,"unknown":[]}"#), None);
    }
}
