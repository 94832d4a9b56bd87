//! `backbone dead …`: look at dead letters, put them back, or throw them away.

use base64::Engine as _;
use clap::{Args, Subcommand};
use comfy_table::Table;
use reqwest::Method;
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use super::api::{Api, Call, Who};
use super::context::Context;
use super::error::CliError;
use super::input::confirm;
use super::output::{count, printable, table};
use super::progress;

/// Dead letters asked for, or put back, at once.
const PAGE: u64 = 1000;

/// Characters of a message shown in a row.
const MESSAGE_SHOWN: usize = 60;

#[derive(Debug, Subcommand)]
pub(crate) enum DeadCommand {
    /// List a client's dead letters, with their reasons
    List(List),
    /// Put dead letters back into the queue they came from
    Replay(Replay),
    /// Delete a client's dead letters
    Purge(Purge),
}

impl DeadCommand {
    pub(crate) async fn run(self, context: &mut Context) -> Result<(), CliError> {
        match self {
            Self::List(command) => command.run(context).await,
            Self::Replay(command) => command.run(context).await,
            Self::Purge(command) => command.run(context).await,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct List {
    /// Whose [default: the client given by --as]
    client: Option<String>,
    /// At most this many
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
}

/// Put dead letters back into the queue they came from
///
/// All of them, or those named by --id.
#[derive(Debug, Args)]
pub(crate) struct Replay {
    /// Whose [default: the client given by --as]
    client: Option<String>,
    /// The id of a dead letter, as `dead list` shows it; repeatable
    #[arg(long = "id", value_name = "ID")]
    ids: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Purge {
    /// Whose [default: the client given by --as]
    client: Option<String>,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

#[derive(Deserialize)]
struct Page {
    dead_letters: Vec<Box<RawValue>>,
    next: Option<String>,
}

/// A dead letter, as far as it is shown.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct DeadLetter {
    id: String,
    queue: String,
    reason: String,
    attempts: u64,
    died_at: String,
    envelope: Option<Envelope>,
    raw: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Envelope {
    #[serde(default)]
    id: String,
    topic: Option<String>,
    #[serde(default)]
    sender: String,
    message: Option<Box<RawValue>>,
}

#[derive(Deserialize)]
struct Replayed {
    replayed: u64,
}

#[derive(Deserialize)]
struct Purged {
    purged: u64,
}

#[derive(Deserialize)]
struct Depths {
    queues: std::collections::BTreeMap<String, u64>,
}

impl List {
    async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let (client, who) = context.owner_or_admin(self.client.as_deref())?;
        let api = context.api()?;
        let (mut listed, mut after) = (0, None);
        let mut rows =
            table(["id", "queue", "reason", "attempts", "died_at", "message_id", "sender", "topic", "message"]);
        loop {
            let page = page(&api, &who, &client, (self.limit - listed).min(PAGE), after.as_deref()).await?;
            for letter in &page.dead_letters {
                if context.out.json {
                    context.out.json_as_is(letter.get().as_bytes())?;
                } else {
                    add_row(&mut rows, read(letter)?);
                }
            }
            listed += page.dead_letters.len() as u64;
            after = page.next;
            if after.is_none() || listed >= self.limit || page.dead_letters.is_empty() {
                break;
            }
        }
        if listed > 0 && !context.out.json {
            context.out.table(&rows)?;
            context.out.flush()?;
        }
        match (listed, after) {
            (0, _) => context.out.note(format!("{client} has no dead letters")),
            (_, Some(_)) => context.out.note(format!("and more: only the first {listed} are shown, see --limit")),
            _ => {}
        }
        Ok(())
    }
}

impl Replay {
    async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let (client, who) = context.owner_or_admin(self.client.as_deref())?;
        let api = context.api()?;
        let replayed = if self.ids.is_empty() {
            let depths: Depths = api.fetch(&Call::new(Method::GET, &["clients", &client], &who)).await?;
            let total = depths.queues.get("dead").copied().unwrap_or(0);
            replay_all(&api, &who, &client, total, context.out.json).await?
        } else {
            let mut replayed = 0;
            for ids in self.ids.chunks(PAGE as usize) {
                replayed += replay(&api, &who, &client, ids).await?;
            }
            replayed
        };
        if replayed < self.ids.len() as u64 {
            context
                .out
                .note(format!("{} of these ids are no dead letters of {client}", self.ids.len() as u64 - replayed));
        }
        if context.out.json {
            return context.out.json_line(&json!({"replayed": replayed}));
        }
        context.out.line(format!("replayed {}", count(replayed, "dead letter")))
    }
}

/// Puts the `total` dead letters that there are now back, page by page, so that there is progress to see. What dies
/// again meanwhile is left alone.
async fn replay_all(api: &Api, who: &Who, client: &str, total: u64, json: bool) -> Result<u64, CliError> {
    let bar = progress::bar(Some(total), "replaying", json);
    let (mut replayed, mut after) = (0, None);
    while replayed < total {
        let page = page(api, who, client, (total - replayed).min(PAGE), after.as_deref()).await?;
        let ids = page.dead_letters.iter().map(|letter| read(letter).map(|letter| letter.id));
        let ids: Vec<String> = ids.collect::<Result<_, _>>()?;
        if ids.is_empty() {
            break;
        }
        let done = replay(api, who, client, &ids).await?;
        replayed += done;
        bar.inc(done);
        match page.next {
            Some(next) => after = Some(next),
            None => break,
        }
    }
    bar.finish_and_clear();
    Ok(replayed)
}

async fn replay(api: &Api, who: &Who, client: &str, ids: &[String]) -> Result<u64, CliError> {
    let call = Call::new(Method::POST, &["clients", client, "dead-letters", "replay"], who);
    let answer: Replayed = api.fetch(&call.json(json!({"ids": ids}).to_string())).await?;
    Ok(answer.replayed)
}

impl Purge {
    async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let (client, who) = context.owner_or_admin(self.client.as_deref())?;
        let api = context.api()?;
        if !self.yes {
            confirm(&format!("Delete the dead letters of {client} for good?"))?;
        }
        let answer = api.call(&Call::new(Method::DELETE, &["clients", &client, "dead-letters"], &who)).await?;
        if context.out.json {
            return context.out.json_as_is(&answer);
        }
        let answer: Purged = serde_json::from_slice(&answer)
            .map_err(|error| CliError::failed(format!("the router's answer cannot be read: {error}")))?;
        context.out.line(format!("purged {}", count(answer.purged, "dead letter")))
    }
}

async fn page(api: &Api, who: &Who, client: &str, limit: u64, after: Option<&str>) -> Result<Page, CliError> {
    let mut call = Call::new(Method::GET, &["clients", client, "dead-letters"], who).query("limit", limit);
    if let Some(after) = after {
        call = call.query("after", after);
    }
    Ok(api.fetch(&call).await?)
}

fn read(letter: &RawValue) -> Result<DeadLetter, CliError> {
    serde_json::from_str(letter.get())
        .map_err(|error| CliError::failed(format!("the router sent a dead letter that cannot be read: {error}")))
}

fn add_row(rows: &mut Table, letter: DeadLetter) {
    let (message_id, sender, topic, message) = match letter.envelope {
        Some(envelope) => (
            envelope.id,
            envelope.sender,
            envelope.topic.unwrap_or_else(|| "(broadcast)".into()),
            envelope.message.map_or(String::new(), |message| message.get().to_owned()),
        ),
        None => ("-".into(), "-".into(), "-".into(), raw_shown(letter.raw.as_deref().unwrap_or_default())),
    };
    let attempts = letter.attempts.to_string();
    let row = [
        letter.id,
        letter.queue,
        letter.reason,
        attempts,
        letter.died_at,
        message_id,
        sender,
        topic,
        shortened(&message.replace(['\n', '\r'], " ")),
    ];
    rows.add_row(row.map(|cell| printable(&cell)));
}

/// What could not be read as an envelope: as text if it is text, for that is mostly how one finds the mistake.
fn raw_shown(base64: &str) -> String {
    match base64::engine::general_purpose::STANDARD.decode(base64) {
        Ok(bytes) => String::from_utf8(bytes).unwrap_or_else(|error| format!("{} bytes", error.as_bytes().len())),
        Err(_) => base64.to_owned(),
    }
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(MESSAGE_SHOWN) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(json: &str) -> String {
        let mut rows = Table::new();
        rows.load_preset(comfy_table::presets::NOTHING);
        add_row(&mut rows, read(serde_json::from_str(json).expect("JSON")).expect("a dead letter"));
        rows.to_string()
    }

    #[test]
    fn a_dead_letter_is_shown_with_what_it_was_and_why_it_died() {
        let text = row(r#"{"id":"7","queue":"inbox","reason":"expired","attempts":3,"died_at":"T",
            "envelope":{"id":"m1","topic":"a.b","sender":"noc-c2","sent_at":"T","message":{"x":1}}}"#);
        for part in ["7", "inbox", "expired", "3", "m1", "a.b", "noc-c2", "{\"x\":1}"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        let text = row(
            r#"{"id":"8","queue":"outbox","reason":"invalid_message","attempts":0,"died_at":"T","raw":"bm90IGpzb24="}"#,
        );
        assert!(text.contains("not json"), "{text}");
    }

    #[test]
    fn long_messages_are_cut_at_a_character() {
        assert_eq!(shortened("short"), "short");
        assert_eq!(shortened(&"é".repeat(70)), "é".repeat(60) + "…");
    }
}
