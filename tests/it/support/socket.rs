//! A client's WebSocket: JSON in and out, each with a deadline.

use backbone::websocket::{ConnectError, Incoming, WebSocket};
use serde_json::{Value, json};

use super::http::Client;
use super::wait::{soon, stays_pending};

/// A connection of a client.
pub(crate) struct Socket(WebSocket);

impl Socket {
    /// Connects with the client's id and secret.
    pub(crate) async fn open(client: &Client) -> Self {
        let request = super::http::client().get(client.api.url("/ws")).basic_auth(&client.id, Some(&client.secret));
        Self::over(request).await.unwrap_or_else(|error| panic!("{} gets a connection: {error}", client.id))
    }

    /// Connects by this request.
    pub(crate) async fn over(request: reqwest::RequestBuilder) -> Result<Self, ConnectError> {
        soon("the handshake", WebSocket::connect(request)).await.map(Self)
    }

    /// Sends a frame.
    pub(crate) async fn send(&mut self, frame: Value) {
        self.send_text(&frame.to_string()).await;
    }

    /// Sends a frame that need not be JSON.
    pub(crate) async fn send_text(&mut self, text: &str) {
        soon("a frame is sent", self.0.send(text)).await.expect("the connection is there");
    }

    /// Writes a frame that goes out with the next.
    pub(crate) fn queue(&mut self, frame: &Value) {
        self.0.queue(&frame.to_string());
    }

    /// The next frame.
    pub(crate) async fn next(&mut self) -> Value {
        match soon("a frame comes", self.0.next()).await.expect("the connection is there") {
            Incoming::Text(text) => serde_json::from_slice(&text).expect("every frame is JSON"),
            Incoming::Closed(code, reason) => panic!("closed: {code} {reason}"),
        }
    }

    /// The next frame as it came.
    pub(crate) async fn next_text(&mut self) -> String {
        match soon("a frame comes", self.0.next()).await.expect("the connection is there") {
            Incoming::Text(text) => String::from_utf8(text.to_vec()).expect("UTF-8"),
            Incoming::Closed(code, reason) => panic!("closed: {code} {reason}"),
        }
    }

    /// The next frame, however long it takes: whoever asks has a deadline of its own.
    pub(crate) async fn next_at_last(&mut self) -> Value {
        match self.0.next().await.expect("the connection is there") {
            Incoming::Text(text) => serde_json::from_slice(&text).expect("every frame is JSON"),
            Incoming::Closed(code, reason) => panic!("closed: {code} {reason}"),
        }
    }

    /// The next frame, which is of this type.
    pub(crate) async fn expect(&mut self, kind: &str) -> Value {
        let frame = self.next().await;
        assert_eq!(frame["type"], kind, "{frame}");
        frame
    }

    /// The next frames, which are messages.
    pub(crate) async fn messages(&mut self, count: usize) -> Vec<Value> {
        let mut messages = Vec::with_capacity(count);
        while messages.len() < count {
            messages.push(self.expect("message").await);
        }
        messages
    }

    /// Sends a frame and returns the answer.
    pub(crate) async fn ask(&mut self, frame: Value) -> Value {
        self.send(frame).await;
        self.next().await
    }

    /// Sends a frame that is refused with this status and code, and returns the problem.
    pub(crate) async fn refused(&mut self, text: &str, status: u16, code: &str) -> Value {
        self.send_text(text).await;
        let frame = self.expect("error").await;
        let problem = &frame["problem"];
        assert_eq!(
            (problem["status"].as_u64(), problem["code"].as_str()),
            (Some(status.into()), Some(code)),
            "{frame}"
        );
        assert!(problem["request_id"].as_str().is_some_and(|id| !id.is_empty()), "{frame}");
        frame
    }

    /// Asks for messages.
    pub(crate) async fn credit(&mut self, credit: u32) {
        self.send(json!({"type": "credit", "credit": credit})).await;
    }

    /// Settles, and returns the answer, which is the next frame.
    pub(crate) async fn settle(&mut self, kind: &str, receipts: &[String]) -> Value {
        self.send(json!({"type": kind, "receipts": receipts})).await;
        self.expect("settled").await
    }

    /// Nothing comes for a while.
    pub(crate) async fn is_silent(&mut self) {
        stays_pending("nothing comes", self.0.next()).await;
    }

    /// The code that the server closes with, whatever else comes before.
    pub(crate) async fn closed(&mut self) -> u16 {
        loop {
            match soon("the server closes", self.0.next()).await {
                Ok(Incoming::Text(_)) => {}
                Ok(Incoming::Closed(code, _)) => return code,
                Err(error) => panic!("cut off without a close frame: {error}"),
            }
        }
    }

    /// Closes properly.
    pub(crate) async fn close(self) {
        soon("the server answers a close", self.0.close()).await.expect("the connection is there");
    }
}
