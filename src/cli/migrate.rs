//! `backbone migrate`: moves what lies in one broker to the other. The one command besides `serve` that works on the
//! data directory itself, because it runs while no router does.

use clap::Args;
use indicatif::ProgressBar;
use serde_json::{Map, Value, json};

use super::context::Context;
use super::error::CliError;
use super::interrupt::Interrupt;
use super::output::{count, grouped, table};
use super::progress;
use crate::broker::stock::Kind;
use crate::config::{BrokerChoice, Config};
use crate::migrate::{self, Event, Move, Summary};

/// Move all queues from the embedded broker to RabbitMQ, or back
///
/// Stop the router first. Works on DATA_DIR, with SOAR_QUEUE_TYPE and the other settings of the router. Clients, their
/// secrets and settings stay where they are. Interrupted at any moment, it goes on when it is run again.
#[derive(Debug, Args)]
pub(crate) struct Migrate {
    /// Where to: `amqp://…`, `amqps://…` or `embedded`; `@FILE` reads a URL from a file, out of sight of the process
    /// list
    #[arg(long, value_name = "BROKER")]
    to: String,
    /// Where from [default: embedded when moving to RabbitMQ, else SOAR_BROKER_URL]
    #[arg(long, value_name = "BROKER")]
    from: Option<String>,
    /// Add to what the target holds already, instead of refusing
    #[arg(long)]
    append: bool,
}

impl Migrate {
    pub(crate) async fn run(self, context: &mut Context) -> Result<(), CliError> {
        // Every wrong variable, on one line.
        let config = Config::from_env().map_err(|errors| CliError::failed(errors.to_string()))?;
        let plan = self.plan(&config)?;
        // As the router does: messages and hashes are the owner's alone.
        rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
        let mut interrupt = Interrupt::listen()?;
        let mut teller = Teller { context, bar: ProgressBar::hidden() };
        let moved = interrupt.or(migrate::run(&config, &plan, |event| teller.tell(&event))).await;
        teller.bar.finish_and_clear();
        match moved {
            Some(Ok(summary)) => say(context, &plan, &summary),
            Some(Err(error)) => Err(CliError::failed(error.to_string())),
            None => Err(CliError::failed("interrupted; nothing is lost: run the same command again to go on")),
        }
    }

    fn plan(&self, config: &Config) -> Result<Move, CliError> {
        let to = broker(&self.to, "--to")?;
        let from = match (&self.from, &to) {
            (Some(from), _) => broker(from, "--from")?,
            (None, BrokerChoice::Amqp(_)) => BrokerChoice::Embedded,
            (None, BrokerChoice::Embedded) => match &config.broker {
                BrokerChoice::Amqp(url) => BrokerChoice::Amqp(url.clone()),
                BrokerChoice::Embedded => {
                    return Err(CliError::usage(
                        "where from? pass --from amqp://…, or set SOAR_BROKER_URL to the RabbitMQ that has the queues",
                    ));
                }
            },
        };
        if matches!((&from, &to), (BrokerChoice::Embedded, BrokerChoice::Embedded))
            || matches!((&from, &to), (BrokerChoice::Amqp(_), BrokerChoice::Amqp(_)))
        {
            return Err(CliError::usage(
                "messages move between `embedded` and `amqp://…`: --from and --to must be one of each",
            ));
        }
        Ok(Move { from, to, append: self.append })
    }
}

/// Reads a broker argument. It is not repeated in an error: it may hold a password.
fn broker(text: &str, option: &str) -> Result<BrokerChoice, CliError> {
    let text = super::context::from_file_if_asked(text, option)?;
    BrokerChoice::parse(&text).ok_or_else(|| {
        CliError::usage(format!("{option} must be `embedded`, or a URL that begins with amqp:// or amqps://"))
    })
}

/// Tells how far it is: a bar on a terminal, lines otherwise, JSON lines for programs.
struct Teller<'a> {
    context: &'a mut Context,
    bar: ProgressBar,
}

impl Teller<'_> {
    fn tell(&mut self, event: &Event<'_>) {
        let is_json = self.context.out.json;
        match event {
            Event::Begun { messages, resumed } => {
                self.line(&json!({"event": "begun", "messages": messages, "resumed": resumed}));
                let verb = if *resumed { "going on with" } else { "moving" };
                self.note(&format!("{verb} {}", count(*messages, "message")));
                self.bar = progress::bar(Some(*messages), "moving", is_json);
            }
            Event::Progress { moved, shelf } => {
                self.line(&json!({"event": "progress", "moved": moved, "queue": shelf.to_string()}));
                self.bar.set_position(*moved);
            }
            Event::ShelfDone { shelf, messages } => {
                self.line(&json!({"event": "queue_moved", "queue": shelf.to_string(), "messages": messages}));
                self.note(&format!("{shelf}: {} moved", count(*messages, "message")));
            }
        }
    }

    /// A line for programs, at once.
    fn line(&mut self, value: &Value) {
        if self.context.out.json {
            // Whoever read it may be gone; the move is not to stop for that.
            let _ = self.context.out.json_line(value).and_then(|()| self.context.out.flush());
        }
    }

    /// A line for people, unless they look at a bar.
    fn note(&self, text: &str) {
        if self.bar.is_hidden() {
            self.context.out.note(text);
        }
    }
}

fn say(context: &mut Context, plan: &Move, summary: &Summary) -> Result<(), CliError> {
    let total: u64 = summary.moved.iter().map(|(_, messages)| messages).sum();
    if context.out.json {
        let moved: Map<String, Value> =
            summary.moved.iter().map(|(kind, messages)| (kind.as_str().to_owned(), json!(messages))).collect();
        return context.out.json_line(&json!({
            "event": "done", "from": summary.from, "to": summary.to, "clients": summary.clients,
            "moved": moved, "total": total, "was_done": summary.was_done,
        }));
    }
    if summary.was_done {
        context.out.note(format!("everything was moved to {} before; this was", summary.to));
    }
    let mut rows = table(["messages", "moved"]);
    for (kind, messages) in &summary.moved {
        rows.add_row([title(*kind).to_owned(), grouped(*messages)]);
    }
    rows.add_row(["total".to_owned(), grouped(total)]);
    context.out.table(&rows)?;
    context.out.note(format!(
        "{} moved from {} to {}, of {}",
        count(total, "message"),
        summary.from,
        summary.to,
        count(summary.clients as u64, "client")
    ));
    context.out.note(match plan.to {
        BrokerChoice::Embedded => {
            "now set SOAR_BROKER_URL=embedded and start the router; RabbitMQ keeps its queues, which are empty"
        }
        BrokerChoice::Amqp(_) => "now set SOAR_BROKER_URL to that URL and start the router",
    });
    Ok(())
}

fn title(kind: Kind) -> &'static str {
    match kind {
        Kind::Outbox => "in outboxes",
        Kind::Notify => "in notify queues",
        Kind::Inbox => "in inboxes",
        Kind::Delayed => "delayed",
        Kind::Dead => "dead letters",
        Kind::Publish => "in soar-publish",
        Kind::Unrouted => "in soar-unrouted",
    }
}
