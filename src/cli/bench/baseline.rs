//! The limit to measure against: a bare actix handler that appends each body to one file and answers after the fsync,
//! shared by all that wait for it (group commit). Nothing that promises durability over HTTP can be faster here.

use std::fs::File;
use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;

use actix_web::{App, HttpResponse, HttpServer, web};
use bytes::Bytes;
use tokio::sync::oneshot;

use super::Options;
use super::payload::Payload;
use super::report::Report;
use super::scenarios::{post_singly, report};
use super::target::Caller;
use crate::cli::child::{ANNOUNCEMENT, Process, TemporaryDir};
use crate::cli::error::CliError;
use crate::cli::interrupt::Interrupt;
use crate::cli::serve::end_with_stdin;

/// Bodies that one sync takes at most.
const BODIES_PER_SYNC_MAX: usize = 1024;

/// Bodies that may wait.
const BODIES_WAITING_MAX: usize = 16_384;

/// Threads that speak HTTP: as many as the router's on the machine that the figures are quoted for.
const WORKERS: usize = 2;

/// The file it appends to, in its working directory.
const FILE: &str = "baseline.log";

/// A body, and who waits for its sync.
type Job = (Bytes, oneshot::Sender<io::Result<()>>);

/// Runs the server until stdin ends: the hidden half, in a process of its own as the router is.
pub(super) fn serve() -> ExitCode {
    end_with_stdin();
    let served = File::create(FILE).and_then(|file| {
        let (jobs, waiting) = mpsc::sync_channel::<Job>(BODIES_WAITING_MAX);
        std::thread::spawn(move || append(file, &waiting));
        actix_web::rt::System::new().block_on(async {
            let server = HttpServer::new(move || {
                App::new().app_data(web::Data::new(jobs.clone())).route("/send", web::post().to(accept))
            });
            let server = server.workers(WORKERS).bind((Ipv4Addr::LOCALHOST, 0))?;
            for address in server.addrs() {
                writeln!(io::stdout(), "{ANNOUNCEMENT}http://{address}")?;
            }
            server.run().await
        })
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => CliError::failed(format!("the baseline stopped: {error}")).report(),
    }
}

async fn accept(body: Bytes, jobs: web::Data<mpsc::SyncSender<Job>>) -> HttpResponse {
    let (done, synced) = oneshot::channel();
    // A full queue is no matter for the few connections of a bench: refused, it would show as an error.
    if jobs.try_send((body, done)).is_err() {
        return HttpResponse::ServiceUnavailable().finish();
    }
    match synced.await {
        Ok(Ok(())) => HttpResponse::Accepted().content_type("application/json").body("{\"accepted\":1}"),
        Ok(Err(_)) | Err(_) => HttpResponse::InternalServerError().finish(),
    }
}

fn append(mut file: File, waiting: &mpsc::Receiver<Job>) {
    let mut bytes = Vec::new();
    let mut done = Vec::new();
    while let Ok(first) = waiting.recv() {
        let more = std::iter::from_fn(|| waiting.try_recv().ok());
        for (body, waits) in std::iter::once(first).chain(more).take(BODIES_PER_SYNC_MAX) {
            bytes.extend_from_slice(&body);
            done.push(waits);
        }
        let synced = file.write_all(&bytes).and_then(|()| file.sync_data());
        for waits in done.drain(..) {
            // Whoever has hung up does not want to know.
            let _ = waits.send(synced.as_ref().copied().map_err(|error| io::Error::from(error.kind())));
        }
        bytes.clear();
    }
}

/// Measures it: the same load as `send`, in the same way, on the same disk.
pub(super) async fn measure(options: &Options, seconds: f64, interrupt: &Interrupt) -> Result<Report, CliError> {
    let connections = options.connections.unwrap_or(64);
    let dir = TemporaryDir::create(options.dir.as_deref(), "baseline")?;
    let arguments = ["bench", "baseline", "--serve-baseline"];
    let mut process = Process::start(&arguments, &[], &dir.path().join("server.log"))?;
    let outcome = match process.url().await {
        Ok(url) => load(url.trim_start_matches("http://"), dir.path(), options, seconds, connections, interrupt).await,
        Err(error) => Err(error),
    };
    process.stop().await;
    outcome
}

async fn load(
    address: &str,
    dir: &Path,
    options: &Options,
    seconds: f64,
    connections: usize,
    interrupt: &Interrupt,
) -> Result<Report, CliError> {
    let payload = Payload::new("bench.baseline", options.bytes);
    let mut one = Vec::new();
    payload.write(0..1, &mut one);
    let callers = (0..connections).map(|_| Caller::post(address, "/send", "none", "application/json")).collect();
    let run = post_singly(options, seconds, callers, payload, interrupt).await?;
    let count = run.accepted.get();
    let took = run.last_accepted.get() - run.started;
    let what = format!("a bare handler that appends to a file and answers after the fsync, {connections} connections");
    let mut report = report("baseline", what, &run, "messages", count, took, "request");
    let written = std::fs::metadata(dir.join(FILE)).map_or(0, |file| file.len());
    let expected = count * one.len() as u64;
    report.verdict = if written == expected {
        Ok(format!("all {count} answered are in its file"))
    } else {
        Err(format!("its file has {written} bytes, not {expected}"))
    };
    Ok(report)
}
