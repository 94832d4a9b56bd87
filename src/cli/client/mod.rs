//! `backbone client …`: onboard, look at, change and remove clients.

mod settings;
mod show;

use bytes::Bytes;
use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::api::{Api, Call, Who};
use super::context::Context;
use super::error::CliError;
use super::input::confirm;
pub(crate) use show::{Page, Record, read, state};

use settings::{LimitArgs, WebhookArgs};

/// Records asked for at once.
const PAGE: usize = 1000;

#[derive(Debug, Subcommand)]
pub(crate) enum ClientCommand {
    /// Onboard a client; its secret is shown now and never again
    Add(Add),
    /// List all clients
    List(List),
    /// Show a client: record, queue depths, actor states
    Show(Show),
    /// Change a client's name, subscriptions, webhook or limits; pause or resume it
    Update(Update),
    /// Remove a client with its queues and dead letters
    Remove(Remove),
    /// Make a new secret; the one before stays valid for a while
    RotateSecret(RotateSecret),
    /// Send a signed example to a client's webhook and show the answer
    TestWebhook(TestWebhook),
    /// List recent webhook attempts of a client, newest first
    Attempts(Attempts),
}

impl ClientCommand {
    pub(crate) async fn run(self, context: &mut Context) -> Result<(), CliError> {
        match self {
            Self::Add(command) => command.run(context).await,
            Self::List(command) => command.run(context).await,
            Self::Show(command) => command.run(context).await,
            Self::Update(command) => command.run(context).await,
            Self::Remove(command) => command.run(context).await,
            Self::RotateSecret(command) => command.run(context).await,
            Self::TestWebhook(command) => command.run(context).await,
            Self::Attempts(command) => command.run(context).await,
        }
    }
}

/// Onboard a client
///
/// Its secret is shown now and never again (`rotate-secret` makes a new one).
#[derive(Debug, Args)]
pub(crate) struct Add {
    /// Its id: a DNS label, such as noc-c2
    id: String,
    /// A name for people
    #[arg(long)]
    name: Option<String>,
    /// What lands in its inbox: a pattern such as 'soar.noc.#' (`*` is one word, `#` any number); repeatable
    #[arg(long = "subscribe", value_name = "PATTERN")]
    subscriptions: Vec<String>,
    #[command(flatten)]
    webhook: WebhookArgs,
    #[command(flatten)]
    limits: LimitArgs,
    /// Print shell variables for the client's own commands instead: eval "$(backbone client add ID --export)"
    #[arg(long, conflicts_with = "json")]
    export: bool,
}

impl Add {
    fn body(&self) -> Result<Value, CliError> {
        let mut body = Map::from_iter([("client_id".to_owned(), json!(self.id))]);
        if let Some(name) = &self.name {
            body.insert("name".into(), json!(name));
        }
        if !self.subscriptions.is_empty() {
            body.insert("subscriptions".into(), json!(self.subscriptions));
        }
        if let Some(webhook) = self.webhook.to_json()? {
            if !webhook.contains_key("url") {
                return Err(CliError::usage("the --webhook-… options need --webhook URL"));
            }
            body.insert("webhook".into(), Value::Object(webhook));
        }
        if let Some(limits) = self.limits.to_json() {
            body.insert("limits".into(), limits);
        }
        Ok(Value::Object(body))
    }

    async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let body = self.body()?.to_string();
        let answer = context.api()?.call(&Call::new(Method::POST, &["clients"], &context.admin()?).json(body)).await?;
        if context.out.json {
            return context.out.json_as_is(&answer);
        }
        let record = show::read(&answer)?;
        if self.export {
            // Ids and secrets consist of characters that no shell interprets.
            context.out.line(format!("export SOAR_CLIENT_ID={}", record.client_id))?;
            return context.out.line(format!("export SOAR_CLIENT_SECRET={}", record.secret.unwrap_or_default()));
        }
        context.out.table(&show::record_table(&record))?;
        context.out.flush()?;
        context.out.note("keep the secret now: it is not shown again");
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(crate) struct List {}

impl List {
    async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let (api, who) = (context.api()?, context.admin()?);
        let mut after: Option<String> = None;
        let mut table = show::list_table();
        loop {
            let mut call = Call::new(Method::GET, &["clients"], &who).query("limit", PAGE);
            if let Some(after) = &after {
                call = call.query("after", after);
            }
            let page: show::Page = api.fetch(&call).await?;
            for record in &page.clients {
                if context.out.json {
                    context.out.json_as_is(record.get().as_bytes())?;
                } else {
                    show::add_to_list(&mut table, &show::read(record.get().as_bytes())?);
                }
            }
            match page.next {
                Some(next) => after = Some(next),
                None => break,
            }
        }
        if context.out.json {
            return Ok(());
        }
        if table.is_empty() {
            context.out.note("no clients yet; onboard one with `backbone client add ID --subscribe PATTERN`");
            return Ok(());
        }
        context.out.table(&table)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// Whose [default: the client given by --as]
    id: Option<String>,
}

impl Show {
    async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let (id, who) = context.owner_or_admin(self.id.as_deref())?;
        let answer = context.api()?.call(&Call::new(Method::GET, &["clients", &id], &who)).await?;
        print_record(context, &answer)
    }
}

/// Change a client
///
/// What is not named stays as it is; `none` lifts a limit.
#[derive(Debug, Args)]
pub(crate) struct Update {
    /// Its id
    id: String,
    /// A new name; '' for none
    #[arg(long)]
    name: Option<String>,
    /// Add a pattern; repeatable
    #[arg(long = "subscribe", value_name = "PATTERN")]
    subscribe: Vec<String>,
    /// Remove a pattern; repeatable
    #[arg(long = "unsubscribe", value_name = "PATTERN")]
    unsubscribe: Vec<String>,
    #[command(flatten)]
    webhook: WebhookArgs,
    /// Remove the webhook: the client reads its inbox itself
    #[arg(long, conflicts_with_all = ["webhook", "enable_webhook", "disable_webhook"])]
    no_webhook: bool,
    /// Switch the webhook on (again)
    #[arg(long, conflicts_with = "disable_webhook")]
    enable_webhook: bool,
    /// Switch the webhook off: messages wait in the inbox, and the client may read them
    #[arg(long)]
    disable_webhook: bool,
    #[command(flatten)]
    limits: LimitArgs,
    /// Forward and push nothing for the client; its queues fill
    #[arg(long, conflicts_with = "resume")]
    pause: bool,
    /// End a pause
    #[arg(long)]
    resume: bool,
}

impl Update {
    async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let (api, who) = (context.api()?, context.admin()?);
        let mut patch = self.patch()?;
        if !self.subscribe.is_empty() || !self.unsubscribe.is_empty() {
            patch.insert("subscriptions".into(), json!(self.new_subscriptions(&api, &who).await?));
        }
        if patch.is_empty() {
            return Err(CliError::usage("nothing to change; see `backbone client update --help`"));
        }
        let body = Value::Object(patch).to_string();
        let answer = api.call(&Call::new(Method::PATCH, &["clients", &self.id], &who).json(body)).await?;
        print_record(context, &answer)
    }

    /// The merge patch (RFC 7396), but for the subscriptions.
    fn patch(&self) -> Result<Map<String, Value>, CliError> {
        let mut patch = Map::new();
        if let Some(name) = &self.name {
            patch.insert("name".into(), if name.is_empty() { Value::Null } else { json!(name) });
        }
        let mut webhook = self.webhook.to_json()?.unwrap_or_default();
        if self.enable_webhook || self.disable_webhook {
            webhook.insert("enabled".into(), json!(self.enable_webhook));
        }
        if self.no_webhook {
            if !webhook.is_empty() {
                return Err(CliError::usage("--no-webhook leaves nothing for the other --webhook-… options to change"));
            }
            patch.insert("webhook".into(), Value::Null);
        } else if !webhook.is_empty() {
            patch.insert("webhook".into(), Value::Object(webhook));
        }
        if let Some(limits) = self.limits.to_json() {
            patch.insert("limits".into(), limits);
        }
        if self.pause || self.resume {
            patch.insert("paused".into(), json!(self.pause));
        }
        Ok(patch)
    }

    async fn new_subscriptions(&self, api: &Api, who: &Who) -> Result<Vec<String>, CliError> {
        let record = show::read(&api.call(&Call::new(Method::GET, &["clients", &self.id], who)).await?)?;
        let mut subscriptions = record.subscriptions;
        for pattern in &self.unsubscribe {
            let before = subscriptions.len();
            subscriptions.retain(|known| known != pattern);
            if subscriptions.len() == before {
                return Err(CliError::failed(format!(
                    "{} is not subscribed to {pattern}; `backbone client show {}` lists its patterns",
                    self.id, self.id
                )));
            }
        }
        for pattern in &self.subscribe {
            if !subscriptions.contains(pattern) {
                subscriptions.push(pattern.clone());
            }
        }
        Ok(subscriptions)
    }
}

#[derive(Debug, Args)]
pub(crate) struct Remove {
    /// Its id
    id: String,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

impl Remove {
    async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let (api, who) = (context.api()?, context.admin()?);
        if !self.yes {
            confirm(&format!("Remove {} with its inbox and dead letters?", self.id))?;
        }
        api.call(&Call::new(Method::DELETE, &["clients", &self.id], &who)).await?;
        if context.out.json {
            return context.out.json_line(&json!({"removed": self.id}));
        }
        context.out.line(format!("removed {}", self.id))
    }
}

/// Make a new secret
///
/// It is shown now and never again. The one before stays valid for the overlap, so that nobody is cut off.
/// When it has leaked, `--overlap 0` ends it, and all before, at once.
#[derive(Debug, Args)]
pub(crate) struct RotateSecret {
    /// Whose [default: the client given by --as]
    id: Option<String>,
    /// The secret that signs its webhooks, instead of the client's own
    #[arg(long)]
    webhook: bool,
    /// Seconds for which the one before stays valid, 0 to 604800 [default: 86400]
    #[arg(long = "overlap", value_name = "SECONDS")]
    overlap_s: Option<u32>,
}

impl RotateSecret {
    async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let (id, who) = context.owner_or_admin(self.id.as_deref())?;
        let kind = if self.webhook { "webhook-secret" } else { "secret" };
        let mut call = Call::new(Method::POST, &["clients", &id, kind], &who);
        if let Some(overlap_s) = self.overlap_s {
            call = call.query("overlap_s", overlap_s);
        }
        let answer = context.api()?.call(&call).await?;
        if context.out.json {
            return context.out.json_as_is(&answer);
        }
        let answer: Value = serde_json::from_slice(&answer)
            .map_err(|error| CliError::failed(format!("the router's answer cannot be read: {error}")))?;
        let member = |name: &str| answer[name].as_str().unwrap_or("-").to_owned();
        let table = super::output::pairs([
            ("client_id", id),
            ("secret", member("secret")),
            ("previous_valid_until", member("previous_valid_until")),
        ]);
        context.out.table(&table)?;
        context.out.flush()?;
        context.out.note("keep the secret now: it is not shown again");
        Ok(())
    }
}

#[derive(Debug, Args)]
pub(crate) struct TestWebhook {
    /// Whose [default: the client given by --as]
    id: Option<String>,
}

impl TestWebhook {
    async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let (id, who) = context.owner_or_admin(self.id.as_deref())?;
        let call = Call::new(Method::POST, &["clients", &id, "webhook", "test"], &who);
        let answer = context.api()?.call(&call).await?;
        if context.out.json {
            context.out.json_as_is(&answer)?;
        } else {
            context.out.table(&show::attempt_table(&answer)?)?;
        }
        context.out.flush()?;
        match show::attempt_outcome(&answer)? {
            Ok(()) => Ok(()),
            Err(why) => Err(CliError::failed(format!("the webhook of {id} did not take the example: {why}"))),
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Attempts {
    /// Whose [default: the client given by --as]
    id: Option<String>,
    /// At most this many, newest first
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
}

impl Attempts {
    async fn run(self, context: &mut Context) -> Result<(), CliError> {
        let (id, who) = context.owner_or_admin(self.id.as_deref())?;
        let call = Call::new(Method::GET, &["clients", &id, "attempts"], &who).query("limit", self.limit);
        let page: show::AttemptPage = context.api()?.fetch(&call).await?;
        if context.out.json {
            return page.attempts.iter().try_for_each(|attempt| context.out.json_as_is(attempt.get().as_bytes()));
        }
        if page.attempts.is_empty() {
            context.out.note(format!("no webhook attempts of {id}"));
            return Ok(());
        }
        context.out.table(&show::attempts_table(&page)?)
    }
}

fn print_record(context: &mut Context, answer: &Bytes) -> Result<(), CliError> {
    if context.out.json {
        return context.out.json_as_is(answer);
    }
    context.out.table(&show::record_table(&show::read(answer)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(arguments: &[&str]) -> Result<Map<String, Value>, CliError> {
        use clap::Parser as _;
        let all = ["backbone", "client", "update", "noc-c2"].iter().chain(arguments);
        match crate::cli::Cli::try_parse_from(all).expect("parses").command {
            Some(crate::cli::Command::Client(ClientCommand::Update(update))) => update.patch(),
            other => panic!("parsed as {other:?}"),
        }
    }

    #[test]
    fn a_patch_names_only_what_changes() {
        assert_eq!(Value::Object(update(&[]).expect("valid")), json!({}));
        let patch = update(&["--name", "", "--pause", "--send-per-s", "none", "--inbox-ttl-s", "60"]);
        assert_eq!(
            Value::Object(patch.expect("valid")),
            json!({"name": null, "paused": true, "limits": {"send_per_s": null, "inbox_ttl_s": 60}})
        );
        let patch = update(&["--disable-webhook", "--webhook-ordered", "true"]);
        assert_eq!(Value::Object(patch.expect("valid")), json!({"webhook": {"enabled": false, "ordered": true}}));
        assert_eq!(Value::Object(update(&["--no-webhook"]).expect("valid")), json!({"webhook": null}));
        assert!(matches!(update(&["--no-webhook", "--webhook-timeout-s", "3"]), Err(CliError::Usage(_))));
    }
}
