//! Names, and how queues, exchanges and bindings are declared (contract, section 6).
//!
//! Everything is durable, and every argument explicit, because the defaults differ between RabbitMQ 3.10 and 4.

use std::time::{Duration, Instant};

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, ExchangeKind};

use super::wire::short;
use crate::client::ClientId;
use crate::config::QueueType;

/// Between forwarders and publishers.
pub(super) const PUBLISH: &str = "soar-publish";
/// Topic exchange, and everything's way into inboxes but broadcasts'.
pub(super) const TOPIC: &str = "soar-topic";
/// Fanout exchange, bound to every inbox.
pub(super) const BROADCAST: &str = "soar-broadcast";
/// Fanout exchange for what no pattern matched, and the queue behind it.
pub(super) const UNROUTED: &str = "soar-unrouted";

/// Messages that `soar-unrouted` keeps; the oldest make room.
const UNROUTED_MESSAGES_MAX: i64 = 100_000;
/// Bytes that it keeps.
const UNROUTED_BYTES_MAX: i64 = 256 << 20;

/// Returns after which a quorum queue would drop a message. Practically never: the backbone counts for itself. It must
/// be set, because RabbitMQ 4 has a limit of 20 by default, and because with a limit a returned message goes to the
/// front of the queue, without one to its end.
const DELIVERY_LIMIT: i64 = 1_000_000;

/// The four queues of a client, in the order in which they are declared.
pub(super) fn client_queues(client: &ClientId) -> [String; 4] {
    ["dead", "notify", "outbox", "inbox"].map(|kind| format!("{client}-{kind}"))
}

/// A client's dead letters.
pub(super) fn dead(client: &ClientId) -> String {
    format!("{client}-dead")
}

/// A client's inbox.
pub(super) fn inbox(client: &ClientId) -> String {
    format!("{client}-inbox")
}

/// The exchange through which a client that has a broker user of its own sends.
pub(super) fn entrance(client: &ClientId) -> String {
    format!("{client}-exchange")
}

/// The queue that holds messages for this long, and the exchange in front of it.
pub(super) fn retry(seconds: u64) -> String {
    format!("soar-retry-{seconds}")
}

/// Whether that is the exchange in front of a retry queue.
pub(super) fn is_retry(exchange: &str) -> bool {
    exchange.starts_with("soar-retry-")
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

fn table<const N: usize>(entries: [(&str, AMQPValue); N]) -> FieldTable {
    let mut table = FieldTable::default();
    for (key, value) in entries {
        table.insert(short(key), value);
    }
    table
}

/// Arguments of an ordinary queue.
fn queue_arguments(kind: QueueType) -> FieldTable {
    match kind {
        QueueType::Quorum => {
            table([("x-queue-type", text("quorum")), ("x-delivery-limit", AMQPValue::LongLongInt(DELIVERY_LIMIT))])
        }
        QueueType::Classic => table([("x-queue-type", text("classic"))]),
    }
}

/// Declares an ordinary queue.
pub(super) async fn declare_queue(channel: &Channel, name: &str, kind: QueueType) -> Result<(), lapin::Error> {
    declare(channel, name, queue_arguments(kind)).await
}

async fn declare(channel: &Channel, name: &str, arguments: FieldTable) -> Result<(), lapin::Error> {
    channel.queue_declare(short(name), QueueDeclareOptions::durable(), arguments).await.map(|_| ())
}

async fn exchange(
    channel: &Channel,
    name: &str,
    kind: ExchangeKind,
    arguments: FieldTable,
) -> Result<(), lapin::Error> {
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    channel.exchange_declare(short(name), kind, options, arguments).await
}

/// Binds a queue to an exchange.
pub(super) async fn bind(channel: &Channel, queue: &str, exchange: &str, key: &str) -> Result<(), lapin::Error> {
    let options = QueueBindOptions::default();
    channel.queue_bind(short(queue), short(exchange), short(key), options, FieldTable::default()).await
}

/// Takes a binding away; succeeds when there is none.
pub(super) async fn unbind(channel: &Channel, queue: &str, exchange: &str, key: &str) -> Result<(), lapin::Error> {
    channel.queue_unbind(short(queue), short(exchange), short(key), FieldTable::default()).await
}

/// Declares what belongs to no client.
pub(super) async fn declare_internal(channel: &Channel, kind: QueueType) -> Result<(), lapin::Error> {
    exchange(channel, UNROUTED, ExchangeKind::Fanout, FieldTable::default()).await?;
    let mut bounded = queue_arguments(kind);
    bounded.insert(short("x-max-length"), AMQPValue::LongLongInt(UNROUTED_MESSAGES_MAX));
    bounded.insert(short("x-max-length-bytes"), AMQPValue::LongLongInt(UNROUTED_BYTES_MAX));
    bounded.insert(short("x-overflow"), text("drop-head"));
    declare(channel, UNROUTED, bounded).await?;
    bind(channel, UNROUTED, UNROUTED, "").await?;
    exchange(channel, TOPIC, ExchangeKind::Topic, table([("alternate-exchange", text(UNROUTED))])).await?;
    exchange(channel, BROADCAST, ExchangeKind::Fanout, FieldTable::default()).await?;
    declare_queue(channel, PUBLISH, kind).await
}

/// Declares a client's queues, and binds its inbox to the broadcast exchange.
pub(super) async fn declare_client(channel: &Channel, client: &ClientId, kind: QueueType) -> Result<(), lapin::Error> {
    // Put in line one behind the other without waiting for each answer: a channel works in order.
    let queues = client_queues(client);
    let declares = queues.iter().map(|name| declare_queue(channel, name, kind));
    futures_util::future::try_join_all(declares).await?;
    bind(channel, &inbox(client), BROADCAST, "").await
}

/// Declares the exchange of a client's own, through which its broker user writes to its outbox and its notify queue.
pub(super) async fn declare_entrance(channel: &Channel, client: &ClientId) -> Result<(), lapin::Error> {
    let name = entrance(client);
    exchange(channel, &name, ExchangeKind::Direct, FieldTable::default()).await?;
    for kind in ["outbox", "notify"] {
        let queue = format!("{client}-{kind}");
        // By the short key or by the queue's name, whichever the client's author thought of.
        bind(channel, &queue, &name, kind).await?;
        bind(channel, &queue, &name, &queue).await?;
    }
    Ok(())
}

/// Deletes a client's queues and its exchange; succeeds when they are gone.
pub(super) async fn delete_client(channel: &Channel, client: &ClientId) -> Result<(), lapin::Error> {
    for name in client_queues(client) {
        delete_queue(channel, &name).await?;
    }
    let options = lapin::options::ExchangeDeleteOptions::default();
    channel.exchange_delete(short(&entrance(client)), options).await
}

/// Declares the queue for a delay and the exchange in front of it. The exchange keeps the routing key free to name the
/// queue that the message goes back to: the default exchange would take it for the name of the retry queue.
///
/// A quorum queue whatever the type of the others, because only those dead-letter with confirms: a message is in the
/// inbox before it leaves the retry queue, even when the broker is killed in between.
pub(super) async fn declare_retry(channel: &Channel, seconds: u64) -> Result<(), lapin::Error> {
    let name = retry(seconds);
    let ttl_ms = i64::try_from(seconds * 1000).expect("at most 30 days");
    exchange(channel, &name, ExchangeKind::Fanout, FieldTable::default()).await?;
    let arguments = table([
        ("x-queue-type", text("quorum")),
        ("x-message-ttl", AMQPValue::LongLongInt(ttl_ms)),
        ("x-dead-letter-exchange", text("")),
        ("x-dead-letter-strategy", text("at-least-once")),
        // At-least-once asks for it; without a length limit it rejects nothing.
        ("x-overflow", text("reject-publish")),
        ("x-delivery-limit", AMQPValue::LongLongInt(DELIVERY_LIMIT)),
    ]);
    declare(channel, &name, arguments).await?;
    bind(channel, &name, &name, "").await
}

/// Empties a queue of what is ready in it; returns how much that was.
pub(super) async fn purge(channel: &Channel, name: &str) -> Result<u64, lapin::Error> {
    channel.queue_purge(short(name), lapin::options::QueuePurgeOptions::default()).await.map(u64::from)
}

/// Fails when there is no such exchange.
pub(super) async fn check_exchange(channel: &Channel, name: &str) -> Result<(), lapin::Error> {
    let options = ExchangeDeclareOptions { passive: true, durable: true, ..ExchangeDeclareOptions::default() };
    channel.exchange_declare(short(name), ExchangeKind::Fanout, options, FieldTable::default()).await
}

/// Registers one more quorum queue, and deletes it. See `seal`.
pub(super) async fn declare_seal(channel: &Channel, name: &str) -> Result<(), lapin::Error> {
    let mut arguments = queue_arguments(QueueType::Quorum);
    // Should it ever be left over.
    arguments.insert(short("x-expires"), AMQPValue::LongLongInt(60_000));
    declare(channel, name, arguments).await?;
    delete_queue(channel, name).await
}

/// Deletes a queue; succeeds when it is gone.
pub(super) async fn delete_queue(channel: &Channel, name: &str) -> Result<(), lapin::Error> {
    channel.queue_delete(short(name), QueueDeleteOptions::default()).await.map(|_| ())
}

/// Declares a stand-in for the inbox of a client that is gone: what is still delayed for it must find a queue when it
/// is due, or RabbitMQ would hold it, and after some of them everything behind it, for ever. It keeps nothing, and
/// expires.
pub(super) async fn declare_stand_in(channel: &Channel, client: &ClientId, expires_s: u64) -> Result<(), lapin::Error> {
    let expires_ms = i64::try_from(expires_s.saturating_mul(1000)).unwrap_or(i64::MAX);
    let arguments = table([
        ("x-queue-type", text("classic")),
        ("x-max-length", AMQPValue::LongLongInt(0)),
        ("x-overflow", text("drop-head")),
        ("x-expires", AMQPValue::LongLongInt(expires_ms)),
    ]);
    declare(channel, &inbox(client), arguments).await
}

/// Fails when there is no such queue.
pub(super) async fn check_queue(channel: &Channel, name: &str) -> Result<(), lapin::Error> {
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::durable() };
    channel.queue_declare(short(name), options, FieldTable::default()).await.map(drop)
}

/// RabbitMQ waits this long for the leader of a quorum queue to say how many messages it has, and then says that there
/// are none. A little less, to be on the safe side.
const LEADER_ANSWERS_WITHIN: Duration = Duration::from_millis(200);

/// How often a queue is asked that seems to have no leader just now.
const COUNTS_MAX: u32 = 20;

/// Messages that are ready in a queue.
pub(super) async fn count(channel: &Channel, name: &str) -> Result<u64, lapin::Error> {
    look_at(channel, name).await.map(|(messages, _)| messages)
}

/// Messages that are ready in a queue, and how many consume it.
pub(super) async fn look_at(channel: &Channel, name: &str) -> Result<(u64, u32), lapin::Error> {
    for _ in 0..COUNTS_MAX {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::durable() };
        let asked = Instant::now();
        let queue = channel.queue_declare(short(name), options, FieldTable::default()).await?;
        let count = queue.message_count();
        // None, said late, is what RabbitMQ says when it does not know.
        if count > 0 || asked.elapsed() < LEADER_ANSWERS_WITHIN {
            return Ok((u64::from(count), queue.consumer_count()));
        }
    }
    Err(std::io::Error::new(std::io::ErrorKind::TimedOut, format!("queue {name} does not answer")).into())
}

/// The default exchange, which routes by queue name.
pub(super) fn default_exchange() -> ShortString {
    short("")
}
