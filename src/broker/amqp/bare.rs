//! The yardstick: a message's way through three queues in bare lapin, with the router's promises and without a router.
//!
//! ```text
//!  Entry ──► queue A ──► relay ──► queue B ──► relay ──► topic exchange ──► queue C ──► Exit
//! ```
//!
//! Persistent messages, mandatory, confirmed within a window; a relay acknowledges what it took when the next queue has
//! confirmed it, as many as it can at once; connections for publishing and for consuming apart. Everything that a
//! router adds is left out: HTTP, clients, envelopes, own ids, traces, and what mends a break. For `backbone bench`.
//!
//! And clients' queues, declared and bound without a router: what onboarding is measured against. And clients that have
//! the router between their queues, where the bare pipeline has its relays.

use std::pin::Pin;
use std::task::Poll;

use futures_util::stream::FuturesOrdered;
use futures_util::{FutureExt as _, StreamExt as _};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    ExchangeDeclareOptions, ExchangeDeleteOptions, QueueDeleteOptions,
};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection, Consumer, ExchangeKind};

use super::address::Addresses;
use super::error::{broker_error, unavailable};
use super::session;
use super::topology;
use super::wire::short;
use crate::broker::BrokerError;
use crate::config::QueueType;

/// Messages that a relay may have taken and not acknowledged, and that may be on their way to a confirm.
const WINDOW: u16 = 1024;

/// Survives a restart.
const PERSISTENT: u8 = 2;

/// What an error says was being done.
const ACTION: &str = "measure bare queues";

/// Resolves when a message is confirmed.
pub type Confirmed = Pin<Box<dyn Future<Output = Result<(), BrokerError>> + Send>>;

/// Where messages go in.
#[derive(Debug)]
pub struct Entry(Out);

/// Where they come out.
#[derive(Debug)]
pub struct Exit {
    channel: Channel,
    consumer: Consumer,
}

/// What is between.
#[derive(Debug)]
pub struct Pipeline {
    connections: Vec<Connection>,
    control: Channel,
    /// Kept until their connection is closed: lapin closes a channel that is dropped, and when the queue of its consumer
    /// is deleted just then, it breaks the connection off.
    channels: Vec<Channel>,
    queues: [String; 3],
    exchange: String,
    relays: Vec<tokio::task::JoinHandle<Result<(), BrokerError>>>,
}

/// An AMQP client of a router. See the module.
#[derive(Debug)]
pub struct Client {
    connections: [Connection; 2],
    /// As in [`Pipeline`].
    channels: [Channel; 2],
}

/// A channel with confirms, and where to.
#[derive(Debug, Clone)]
struct Out {
    channel: Channel,
    exchange: ShortString,
    key: ShortString,
    properties: BasicProperties,
}

impl Pipeline {
    /// Declares queues and an exchange whose names begin with `name`, and starts the relays on this runtime.
    ///
    /// # Errors
    /// When the URL cannot be read, or what RabbitMQ says.
    pub async fn open(url: &str, kind: QueueType, name: &str) -> Result<(Self, Entry, Exit), BrokerError> {
        // For amqps; a second call, by whoever, changes nothing.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let addresses = Addresses::parse(url)?;
        let opened = async {
            let uri = addresses.nth(0);
            let connect = ["in", "take", "relay", "out"].map(|part| session::connect(uri, part));
            let connections = futures_util::future::try_join_all(connect).await?;
            let control = connections[0].create_channel().await?;
            let queues = ["a", "b", "c"].map(|part| format!("{name}-{part}"));
            let exchange = format!("{name}-topic");
            for queue in &queues {
                topology::declare_queue(&control, queue, kind).await?;
            }
            let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
            control.exchange_declare(short(&exchange), ExchangeKind::Topic, durable, FieldTable::default()).await?;
            topology::bind(&control, &queues[2], &exchange, "bare.#").await?;
            let entry = Out::open(&connections[0], "", &queues[0]).await?;
            let (mut relays, mut channels) = (Vec::new(), vec![entry.channel.clone()]);
            for (from, exchange, key) in [(0, "", queues[1].as_str()), (1, exchange.as_str(), "bare.message")] {
                let out = Out::open(&connections[2], exchange, key).await?;
                let (channel, consumer) = consume(&connections[1], &queues[from]).await?;
                channels.extend([out.channel.clone(), channel.clone()]);
                relays.push(tokio::spawn(relay(channel, consumer, out)));
            }
            let (channel, consumer) = consume(&connections[3], &queues[2]).await?;
            channels.push(channel.clone());
            let pipeline = Self { connections, control, channels, queues, exchange, relays };
            Ok((pipeline, Entry(entry), Exit { channel, consumer }))
        };
        opened.await.map_err(|error| broker_error(ACTION, error))
    }

    /// Deletes everything, whatever became of it.
    ///
    /// # Errors
    /// What ended a relay before this; else what RabbitMQ says.
    pub async fn close(self) -> Result<(), BrokerError> {
        let mut ended = Ok(());
        for relay in self.relays {
            relay.abort();
            ended = ended.and(relay.await.unwrap_or(Ok(())));
        }
        // The first one is that of `control`.
        let closes = self.connections.iter().skip(1).map(|connection| connection.close(200, short("bye")));
        let closed = futures_util::future::join_all(closes).await.into_iter().collect::<Result<(), _>>();
        let deleted = async {
            for queue in &self.queues {
                self.control.queue_delete(short(queue), QueueDeleteOptions::default()).await?;
            }
            self.control.exchange_delete(short(&self.exchange), ExchangeDeleteOptions::default()).await?;
            self.connections[0].close(200, short("bye")).await
        };
        let deleted = deleted.await;
        drop(self.channels);
        ended.and(closed.and(deleted).map_err(|error| broker_error(ACTION, error)))
    }
}

impl Client {
    /// Publishes to one queue and consumes from another, over a connection each. Both must be there.
    ///
    /// # Errors
    /// When the URL cannot be read, or what RabbitMQ says.
    pub async fn open(url: &str, outbox: &str, inbox: &str) -> Result<(Self, Entry, Exit), BrokerError> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let addresses = Addresses::parse(url)?;
        let opened = async {
            let connect = ["in", "out"].map(|part| session::connect(addresses.nth(0), part));
            let connections: [Connection; 2] =
                futures_util::future::try_join_all(connect).await?.try_into().expect("two");
            let mut entry = Out::open(&connections[0], "", outbox).await?;
            // The router would take it for the same message again and again.
            entry.properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
            let (channel, consumer) = consume(&connections[1], inbox).await?;
            let channels = [entry.channel.clone(), channel.clone()];
            Ok((Self { connections, channels }, Entry(entry), Exit { channel, consumer }))
        };
        opened.await.map_err(|error| broker_error(ACTION, error))
    }

    /// Closes its connections.
    ///
    /// # Errors
    /// What RabbitMQ says.
    pub async fn close(self) -> Result<(), BrokerError> {
        let closes = self.connections.iter().map(|connection| connection.close(200, short("bye")));
        let closed = futures_util::future::try_join_all(closes).await;
        drop(self.channels);
        closed.map(drop).map_err(|error| broker_error(ACTION, error))
    }
}

/// Clients' queues. See the module.
#[derive(Debug)]
pub struct Grounds {
    connection: Connection,
    name: String,
    kind: QueueType,
}

/// Declares them, one client after the other.
#[derive(Debug)]
pub struct Declarer {
    channel: Channel,
    name: String,
    kind: QueueType,
}

impl Grounds {
    /// Declares exchanges whose names begin with `name`.
    ///
    /// # Errors
    /// When the URL cannot be read, or what RabbitMQ says.
    pub async fn open(url: &str, kind: QueueType, name: &str) -> Result<Self, BrokerError> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let addresses = Addresses::parse(url)?;
        let opened = async {
            let connection = session::connect(addresses.nth(0), "onboarding").await?;
            let channel = connection.create_channel().await?;
            let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
            for (exchange, kind) in exchanges(name) {
                channel.exchange_declare(short(&exchange), kind, durable, FieldTable::default()).await?;
            }
            Ok(Self { connection, name: name.to_owned(), kind })
        };
        opened.await.map_err(|error| broker_error(ACTION, error))
    }

    /// One with a channel of its own.
    ///
    /// # Errors
    /// What RabbitMQ says.
    pub async fn declarer(&self) -> Result<Declarer, BrokerError> {
        let channel = self.connection.create_channel().await.map_err(|error| broker_error(ACTION, error))?;
        Ok(Declarer { channel, name: self.name.clone(), kind: self.kind })
    }

    /// Deletes the queues of the first `clients`, and the exchanges.
    ///
    /// # Errors
    /// What RabbitMQ says.
    pub async fn close(self, clients: u64) -> Result<(), BrokerError> {
        let deleted = async {
            let channel = self.connection.create_channel().await?;
            for client in 0..clients {
                let queues = queues(&self.name, client);
                let deletes =
                    queues.iter().map(|queue| channel.queue_delete(short(queue), QueueDeleteOptions::default()));
                futures_util::future::try_join_all(deletes).await?;
            }
            for (exchange, _) in exchanges(&self.name) {
                channel.exchange_delete(short(&exchange), ExchangeDeleteOptions::default()).await?;
            }
            self.connection.close(200, short("bye")).await
        };
        deleted.await.map_err(|error| broker_error(ACTION, error))
    }
}

impl Declarer {
    /// Declares a client's four queues, and binds the last of them as an inbox is bound.
    ///
    /// # Errors
    /// What RabbitMQ says.
    pub async fn declare(&self, client: u64) -> Result<(), BrokerError> {
        let declared = async {
            let queues = queues(&self.name, client);
            let declares = queues.iter().map(|queue| topology::declare_queue(&self.channel, queue, self.kind));
            futures_util::future::try_join_all(declares).await?;
            for (exchange, _) in exchanges(&self.name) {
                topology::bind(&self.channel, &queues[3], &exchange, &format!("client.{client}")).await?;
            }
            Ok(())
        };
        declared.await.map_err(|error| broker_error(ACTION, error))
    }
}

/// As the router has them: one for broadcasts and one for topics.
fn exchanges(name: &str) -> [(String, ExchangeKind); 2] {
    [(format!("{name}-broadcast"), ExchangeKind::Fanout), (format!("{name}-topic"), ExchangeKind::Topic)]
}

fn queues(name: &str, client: u64) -> [String; 4] {
    ["dead", "notify", "outbox", "inbox"].map(|queue| format!("{name}-{client}-{queue}"))
}

impl Entry {
    /// Puts a message in line; what is returned resolves when it is confirmed.
    pub fn publish(&self, body: Vec<u8>) -> Confirmed {
        self.0.publish(body)
    }

    /// Messages that should be on their way to a confirm at most.
    pub fn window(&self) -> usize {
        usize::from(WINDOW)
    }
}

impl Exit {
    /// Waits for messages, and takes all that are there. They are acknowledged at once.
    ///
    /// # Errors
    /// When there will be no more.
    pub async fn next(&mut self) -> Result<Vec<Vec<u8>>, BrokerError> {
        let batch = next_batch(&mut self.consumer, usize::from(WINDOW)).await?;
        if let Some(last) = batch.last() {
            acknowledge(&self.channel, last.delivery_tag)?;
        }
        Ok(batch.into_iter().map(|delivery| delivery.data).collect())
    }
}

impl Out {
    async fn open(connection: &Connection, exchange: &str, key: &str) -> Result<Self, lapin::Error> {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let properties = BasicProperties::default()
            .with_delivery_mode(PERSISTENT)
            .with_content_type(short("application/json"))
            // As long as the id of a real message.
            .with_message_id(short("01a20ac4-3710-77d1-a307-da459b74f89b"));
        Ok(Self { channel, exchange: short(exchange), key: short(key), properties })
    }

    fn publish(&self, body: Vec<u8>) -> Confirmed {
        let Self { channel, exchange, key, properties } = self.clone();
        let mut sent = Box::pin(async move {
            let options = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
            let confirm = channel.basic_publish(exchange, key, options, &body, properties).await;
            let confirmation = confirm.map_err(|error| broker_error(ACTION, error))?;
            let confirmation = confirmation.await.map_err(|error| broker_error(ACTION, error))?;
            if confirmation.is_nack() || confirmation.take_message().is_some() {
                return Err(unavailable(format!("{ACTION}: a message was refused or found no queue")));
            }
            Ok(())
        });
        // The first poll puts its frames in line.
        match sent.as_mut().now_or_never() {
            Some(result) => Box::pin(std::future::ready(result)),
            None => sent,
        }
    }
}

async fn consume(connection: &Connection, queue: &str) -> Result<(Channel, Consumer), lapin::Error> {
    let channel = connection.create_channel().await?;
    channel.basic_qos(WINDOW, BasicQosOptions::default()).await?;
    let (tag, options) = (short(&format!("{queue}-consumer")), BasicConsumeOptions::default());
    let consumer = channel.basic_consume(short(queue), tag, options, FieldTable::default()).await?;
    Ok((channel, consumer))
}

/// Waits for a delivery, and takes what is there with it, up to `max`.
async fn next_batch(consumer: &mut Consumer, max: usize) -> Result<Vec<Delivery>, BrokerError> {
    let ended = || unavailable(format!("{ACTION}: a consumer was ended"));
    let mut batch = Vec::new();
    std::future::poll_fn(|context| {
        loop {
            match consumer.poll_next_unpin(context) {
                Poll::Ready(Some(Ok(delivery))) => {
                    batch.push(delivery);
                    if batch.len() >= max {
                        return Poll::Ready(Ok(()));
                    }
                }
                Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(broker_error(ACTION, error))),
                Poll::Ready(None) => return Poll::Ready(Err(ended())),
                Poll::Pending if batch.is_empty() => return Poll::Pending,
                Poll::Pending => return Poll::Ready(Ok(())),
            }
        }
    })
    .await?;
    Ok(batch)
}

/// Acknowledges everything up to this tag: a channel has one consumer, which takes in order.
fn acknowledge(channel: &Channel, tag: u64) -> Result<(), BrokerError> {
    match channel.basic_ack(tag, BasicAckOptions { multiple: true }).now_or_never() {
        Some(Err(error)) => Err(broker_error(ACTION, error)),
        Some(Ok(())) | None => Ok(()),
    }
}

async fn relay(channel: Channel, mut consumer: Consumer, out: Out) -> Result<(), BrokerError> {
    let mut window = FuturesOrdered::new();
    loop {
        let room = usize::from(WINDOW) - window.len();
        tokio::select! {
            Some(first) = window.next(), if !window.is_empty() => {
                let mut last: u64 = first?;
                while let Some(Some(next)) = window.next().now_or_never() {
                    last = next?;
                }
                acknowledge(&channel, last)?;
            }
            batch = next_batch(&mut consumer, room), if room > 0 => {
                for delivery in batch? {
                    let (tag, confirmed) = (delivery.delivery_tag, out.publish(delivery.data));
                    window.push_back(async move { confirmed.await.map(|()| tag) });
                }
            }
        }
    }
}
