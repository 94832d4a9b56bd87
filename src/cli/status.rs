//! `backbone status`: is the router well, what has it done, and whose queues are filling.

use clap::Args;
use futures_util::{StreamExt as _, stream};
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::api::{Api, Call, Failure, Who};
use super::client;
use super::context::Context;
use super::error::CliError;
use super::output::{grouped, pairs, printable, table};

/// Clients whose depths are shown unless `--clients` says otherwise.
const CLIENTS_SHOWN: u32 = 20;

/// Clients asked for at once.
const ASKED_AT_ONCE: usize = 8;

/// Counters shown, by their names in the metrics, without their prefix.
const COUNTERS: [(&str, &str); 6] = [
    ("accepted", "messages_accepted_total"),
    ("duplicates", "messages_duplicates_total"),
    ("routed", "messages_routed_total"),
    ("delivered", "messages_delivered_total"),
    ("unrouted", "messages_unrouted_total"),
    ("dead", "messages_dead_total"),
];

/// Show whether the router is well, and what it has done
///
/// Readiness needs no credentials; counters and queue depths need the admin token. Exits 1 unless the router is ready.
#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Show the queues of at most this many clients
    #[arg(long, value_name = "N", default_value_t = CLIENTS_SHOWN, value_parser = clap::value_parser!(u32).range(0..=1000))]
    clients: u32,
}

impl Status {
    pub(crate) async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let api = context.api()?;
        api.call(&Call::new(Method::GET, &["livez"], &Who::Anyone)).await?;
        let why_not_ready = match api.call(&Call::new(Method::GET, &["readyz"], &Who::Anyone)).await {
            Ok(_) => None,
            Err(Failure::Refused(problem)) if problem.status == 503 => Some(problem.to_string()),
            Err(failure) => return Err(failure.into()),
        };
        let admin = match context.admin() {
            Ok(who) => Some(inside(&api, &who, self.clients).await?),
            Err(error) => {
                context.out.note(format!("{error}; without it only readiness is shown"));
                None
            }
        };
        print(context, api.url().as_str(), why_not_ready.as_deref(), admin.as_ref())?;
        context.out.flush()?;
        match why_not_ready {
            None => Ok(()),
            Some(why) => Err(CliError::failed(format!("the router is up but not ready: {why}"))),
        }
    }
}

/// What only an operator may see.
struct Inside {
    counters: Vec<(&'static str, u64)>,
    clients: Vec<client::Record>,
    /// Whether there are more clients than these.
    more: bool,
}

async fn inside(api: &Api, who: &Who, clients: u32) -> Result<Inside, CliError> {
    let metrics = api.call(&Call::new(Method::GET, &["metrics"], who)).await?;
    let counters = counters(&String::from_utf8_lossy(&metrics));
    if clients == 0 {
        return Ok(Inside { counters, clients: Vec::new(), more: false });
    }
    let page: client::Page = api.fetch(&Call::new(Method::GET, &["clients"], who).query("limit", clients)).await?;
    let ids: Vec<String> = page
        .clients
        .iter()
        .map(|record| client::read(record.get().as_bytes()).map(|record| record.client_id))
        .collect::<Result<_, _>>()?;
    let records = stream::iter(ids)
        .map(|id| async move { api.call(&Call::new(Method::GET, &["clients", &id], who)).await })
        .buffered(ASKED_AT_ONCE);
    let answers: Vec<Result<bytes::Bytes, Failure>> = records.collect().await;
    let mut clients = Vec::with_capacity(answers.len());
    for answer in answers {
        match answer {
            Ok(answer) => clients.push(client::read(&answer)?),
            // Removed since it was listed.
            Err(failure) if failure.is("not_found") => {}
            Err(failure) => return Err(failure.into()),
        }
    }
    Ok(Inside { counters, clients, more: page.next.is_some() })
}

/// Sums the samples of each counter, over its labels, from the Prometheus text format.
fn counters(metrics: &str) -> Vec<(&'static str, u64)> {
    let sum_of = |name: &str| {
        let samples = metrics.lines().filter_map(|line| {
            let rest = line.strip_prefix("backbone_")?.strip_prefix(name)?;
            if !rest.starts_with([' ', '{']) {
                return None;
            }
            rest.rsplit(' ').next()?.parse::<f64>().ok()
        });
        samples.sum::<f64>() as u64
    };
    COUNTERS.iter().map(|(shown, name)| (*shown, sum_of(name))).collect()
}

fn print(
    context: &mut Context,
    url: &str,
    why_not_ready: Option<&str>,
    inside: Option<&Inside>,
) -> Result<(), CliError> {
    if context.out.json {
        let mut line = json!({"url": url, "live": true, "ready": why_not_ready.is_none(), "reason": why_not_ready});
        if let Some(inside) = inside {
            let counters = inside.counters.iter().map(|(name, n)| ((*name).to_owned(), json!(n)));
            line["counters"] = Value::Object(counters.collect::<Map<_, _>>());
            let clients = inside.clients.iter().map(|record| {
                json!({"client_id": record.client_id, "paused": record.paused, "queues": record.queues,
                       "actors": record.actors})
            });
            line["clients"] = clients.collect();
            line["more_clients"] = json!(inside.more);
        }
        return context.out.json_line(&line);
    }
    let mut rows = vec![("url", url.trim_end_matches('/').to_owned())];
    rows.push(("ready", why_not_ready.map_or("yes".into(), |why| format!("no: {why}"))));
    rows.extend(inside.iter().flat_map(|inside| inside.counters.iter().map(|(name, n)| (*name, grouped(*n)))));
    context.out.table(&pairs(rows))?;
    let Some(inside) = inside.filter(|inside| !inside.clients.is_empty()) else { return Ok(()) };
    context.out.line("")?;
    let mut clients = table(["client_id", "outbox", "notify", "inbox", "dead", "actors"]);
    for record in &inside.clients {
        let depth = |queue: &str| record.queues.get(queue).map_or("-".into(), |depth| grouped(*depth));
        clients.add_row([
            printable(&record.client_id),
            depth("outbox"),
            depth("notify"),
            depth("inbox"),
            depth("dead"),
            actors(record),
        ]);
    }
    context.out.table(&clients)?;
    if inside.more {
        context.out.note("and more clients: see --clients");
    }
    Ok(())
}

/// Only what is not as it should be: `ok`, or the actors that do not run.
fn actors(record: &client::Record) -> String {
    let off: Vec<String> = record
        .actors
        .iter()
        .map(|(name, state)| (name, client::state(state)))
        .filter(|(_, state)| !matches!(state.as_str(), "running" | "stopped"))
        .map(|(name, state)| format!("{name} {state}"))
        .collect();
    match (off.is_empty(), record.paused) {
        (true, true) => "paused".into(),
        (true, false) => "ok".into(),
        (false, _) => printable(&off.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_summed_over_their_labels() {
        let metrics = "# TYPE backbone_messages_dead_total counter\n\
            backbone_messages_dead_total{reason=\"expired\"} 2\n\
            backbone_messages_dead_total{reason=\"rejected\"} 3\n\
            backbone_messages_accepted_total 1.5e3\n\
            backbone_messages_accepted_total_created 9\n";
        let found = counters(metrics);
        assert!(found.contains(&("dead", 5)) && found.contains(&("accepted", 1500)), "{found:?}");
        assert!(found.contains(&("routed", 0)));
    }
}
