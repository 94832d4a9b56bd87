//! A partner's AMQP client: Python's pika in a process of its own, `tests/peers/amqp.py`.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::wait::soon;

/// A client with one connection and one channel. Killed when dropped, like a client that loses its network.
pub(crate) struct Peer {
    child: Child,
    orders: ChildStdin,
    answers: mpsc::Receiver<Value>,
}

/// What RabbitMQ did to a client that it refused something.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Broken {
    /// `channel`, `connection` or `message`.
    pub(crate) of: String,
    /// AMQP's reply code; 0 when there is none.
    pub(crate) code: u16,
    /// What it said.
    pub(crate) text: String,
}

/// A message as a client read it.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Received {
    /// Whether RabbitMQ says that it came back.
    pub(crate) redelivered: bool,
    /// Its properties, those that are set; `headers` always.
    pub(crate) properties: Value,
    #[serde(deserialize_with = "from_base64")]
    pub(crate) body: Vec<u8>,
}

impl Received {
    /// The body as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("JSON")
    }
}

fn from_base64<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    STANDARD.decode(text).map_err(serde::de::Error::custom)
}

/// A message to publish.
pub(crate) fn outgoing(exchange: &str, key: &str, body: impl AsRef<[u8]>, properties: Value) -> Value {
    json!({"exchange": exchange, "key": key, "body": STANDARD.encode(body), "properties": properties})
}

impl Peer {
    /// Logs in at `amqp://…`.
    ///
    /// # Panics
    /// When it may not.
    pub(crate) async fn connect(url: &str) -> Self {
        Self::try_connect(url).await.expect("logs in")
    }

    /// Logs in, or tells why it may not.
    pub(crate) async fn try_connect(url: &str) -> Result<Self, Broken> {
        #[expect(clippy::disallowed_methods, reason = "set by scripts/test.sh, for the tests only")]
        let python = std::env::var("BACKBONE_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/amqp.py");
        let mut child = Command::new(python)
            .args([script, url])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("there is a Python with pika: run scripts/test.sh");
        let orders = child.stdin.take().expect("piped");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let (sender, answers) = mpsc::channel(1);
        std::thread::spawn(move || {
            for line in lines {
                let Ok(answer) = line.map(|line| serde_json::from_str(&line).expect("the peer answers JSON")) else {
                    return;
                };
                if sender.blocking_send(answer).is_err() {
                    return;
                }
            }
        });
        let mut peer = Self { child, orders, answers };
        peer.answer().await.map(|_| peer)
    }

    async fn answer(&mut self) -> Result<Value, Broken> {
        let mut answer = soon("an answer of the AMQP peer", self.answers.recv()).await.expect("the peer runs");
        match answer.get_mut("error") {
            Some(error) => Err(serde_json::from_value(error.take()).expect("an error")),
            None => Ok(answer["ok"].take()),
        }
    }

    /// A method of pika's channel, or one of the script's own.
    pub(crate) async fn call(&mut self, name: &str, args: Value) -> Result<Value, Broken> {
        let order = json!({"call": name, "args": args});
        writeln!(self.orders, "{order}").expect("the peer runs");
        self.answer().await
    }

    /// Publishes one message with a confirm.
    pub(crate) async fn publish(&mut self, message: Value) -> Result<(), Broken> {
        self.call("publish", json!({"messages": [message]})).await.map(drop)
    }

    /// Publishes messages in this order, each with a confirm.
    ///
    /// # Panics
    /// When RabbitMQ does not take them.
    pub(crate) async fn publish_all(&mut self, messages: Vec<Value>) {
        let count = messages.len();
        let published = self.call("publish", json!({ "messages": messages })).await.expect("publishes");
        assert_eq!(published, json!(count));
    }

    /// Publishes `body` into a queue through the default exchange.
    pub(crate) async fn put(&mut self, queue: &str, body: impl AsRef<[u8]>) {
        self.publish_all(vec![outgoing("", queue, body, json!({}))]).await;
    }

    /// Consumes and acknowledges the next `count` messages of a queue.
    pub(crate) async fn receive(&mut self, queue: &str, count: usize) -> Vec<Received> {
        let came = self.call("receive", json!({"queue": queue, "count": count})).await.expect("consumes");
        let came: Vec<Received> = serde_json::from_value(came).expect("messages");
        assert_eq!(came.len(), count, "messages of {queue}");
        came
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended; what matters is that nothing is left behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
