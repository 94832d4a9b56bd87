//! Talking to a router as its users do: over HTTP, with what the contract says and nothing else.

use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use reqwest::Method;
use reqwest::header::HeaderMap;
use serde_json::{Value, json};

use super::wait::{SOON, eventually};

/// An HTTP client that goes where it is told: no proxies, no redirects.
pub(crate) fn client() -> reqwest::Client {
    static PROVIDER: OnceLock<()> = OnceLock::new();
    PROVIDER.get_or_init(|| {
        // An error means that the router's own code, in this process, was first.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    let builder = reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none());
    builder.timeout(Duration::from_secs(60)).build().expect("an HTTP client")
}

/// A router's HTTP interface, without credentials.
#[derive(Clone)]
pub(crate) struct Api {
    base: String,
    http: reqwest::Client,
}

impl Api {
    /// The one at `http://{address}`.
    pub(crate) fn new(address: std::net::SocketAddr) -> Self {
        Self { base: format!("http://{address}"), http: client() }
    }

    /// The URL of a path.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// A call that is not sent yet.
    pub(crate) fn call(&self, method: Method, path: &str) -> Call {
        Call(self.http.request(method, format!("{}{path}", self.base)))
    }

    /// `GET`.
    pub(crate) fn get(&self, path: &str) -> Call {
        self.call(Method::GET, path)
    }

    /// `POST`.
    pub(crate) fn post(&self, path: &str) -> Call {
        self.call(Method::POST, path)
    }
}

/// A call that is not sent yet.
pub(crate) struct Call(reqwest::RequestBuilder);

impl Call {
    /// HTTP Basic.
    pub(crate) fn basic(self, id: &str, secret: &str) -> Self {
        Self(self.0.basic_auth(id, Some(secret)))
    }

    /// `Authorization: Bearer`.
    pub(crate) fn bearer(self, token: &str) -> Self {
        Self(self.0.bearer_auth(token))
    }

    /// A header.
    pub(crate) fn header(self, name: &str, value: &str) -> Self {
        Self(self.0.header(name, value))
    }

    /// A JSON body.
    pub(crate) fn json(self, body: &Value) -> Self {
        self.body("application/json", body.to_string())
    }

    /// Any body.
    pub(crate) fn body(self, content_type: &str, body: impl Into<reqwest::Body>) -> Self {
        Self(self.0.header("content-type", content_type).body(body))
    }

    /// Sends it.
    ///
    /// # Panics
    /// When there is no answer.
    pub(crate) async fn send(self) -> Answer {
        self.try_send().await.expect("the router answers")
    }

    /// Sends it; an error when there is no whole answer.
    pub(crate) async fn try_send(self) -> Result<Answer, reqwest::Error> {
        let answer = self.0.send().await?;
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        Ok(Answer { status, headers, body: answer.bytes().await? })
    }
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The status code.
    pub(crate) status: u16,
    /// The headers.
    pub(crate) headers: HeaderMap,
    /// The body.
    pub(crate) body: Bytes,
}

impl Answer {
    /// A header as text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("a header of text"))
    }

    /// The body as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The JSON of an answer with this status.
    pub(crate) fn ok(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        let content_type = self.header("content-type").unwrap_or_default();
        assert!(content_type.starts_with("application/json"), "{self:?}");
        self.assert_request_id();
        self.json()
    }

    /// The body of a refusal, held against RFC 9457 and the contract.
    pub(crate) fn problem(&self, status: u16, code: &str) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        let content_type = self.header("content-type").unwrap_or_default();
        assert!(content_type.starts_with("application/problem+json"), "{self:?}");
        let problem = self.json();
        for member in ["type", "title", "detail", "code", "request_id"] {
            let text = problem[member].as_str().unwrap_or_default();
            assert!(!text.is_empty(), "a problem has {member}: {self:?}");
        }
        assert_eq!(problem["status"], status, "{self:?}");
        assert_eq!(problem["code"], code, "{self:?}");
        assert_eq!(problem["request_id"].as_str(), Some(self.assert_request_id()), "{self:?}");
        if status == 429 || status == 503 {
            let seconds: u64 = self.header("retry-after").and_then(|s| s.parse().ok()).expect("Retry-After in seconds");
            assert!((1..=3600).contains(&seconds), "{self:?}");
        }
        if status == 401 {
            assert!(self.headers.contains_key("www-authenticate"), "RFC 9110, section 11.6.1: {self:?}");
        }
        if status == 422 {
            assert!(!self.errors(&problem).is_empty(), "a 422 names what is wrong: {self:?}");
        }
        problem
    }

    /// A 422 that names exactly these, in any order.
    pub(crate) fn names(&self, pointers: &[&str]) {
        let problem = self.problem(422, "invalid");
        let mut named = self.errors(&problem);
        let mut expected: Vec<String> = pointers.iter().map(|&pointer| pointer.to_owned()).collect();
        named.sort();
        expected.sort();
        assert_eq!(named, expected, "{self:?}");
    }

    fn errors(&self, problem: &Value) -> Vec<String> {
        let errors = problem["errors"].as_array().unwrap_or_else(|| panic!("a 422 has errors: {self:?}"));
        errors
            .iter()
            .map(|error| {
                assert!(error["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{self:?}");
                error["pointer"].as_str().unwrap_or_else(|| panic!("{self:?}")).to_owned()
            })
            .collect()
    }

    fn assert_request_id(&self) -> &str {
        let id = self.header("x-request-id").unwrap_or_default();
        assert!(!id.is_empty(), "every answer has a request id: {self:?}");
        id
    }
}

/// A party on the backbone, with its credentials.
#[derive(Clone)]
pub(crate) struct Client {
    pub(crate) api: Api,
    pub(crate) id: String,
    pub(crate) secret: String,
}

impl Client {
    /// A call with its credentials.
    pub(crate) fn call(&self, method: Method, path: &str) -> Call {
        self.api.call(method, path).basic(&self.id, &self.secret)
    }

    /// `GET` with its credentials.
    pub(crate) fn get(&self, path: &str) -> Call {
        self.call(Method::GET, path)
    }

    /// `POST` with its credentials.
    pub(crate) fn post(&self, path: &str) -> Call {
        self.call(Method::POST, path)
    }

    /// Sends one message and returns its id.
    pub(crate) async fn send(&self, topic: &str, message: Value) -> String {
        let answer = self.send_all(json!({"topic": topic, "message": message})).await;
        answer["ids"][0].as_str().expect("an id").to_owned()
    }

    /// Sends a body of `/send`, which is taken, and returns the answer.
    pub(crate) async fn send_all(&self, body: Value) -> Value {
        self.post("/send").json(&body).send().await.ok(202)
    }

    /// Broadcasts one message and returns its id.
    pub(crate) async fn notify(&self, message: Value) -> String {
        let answer = self.post("/notify").json(&json!({ "message": message })).send().await.ok(202);
        answer["ids"][0].as_str().expect("an id").to_owned()
    }

    /// One `GET /receive` with this query.
    pub(crate) async fn receive(&self, query: &str) -> Vec<Value> {
        let answer = self.get(&format!("/receive?{query}")).send().await.ok(200);
        answer["messages"].as_array().expect("messages").clone()
    }

    /// The next `count` messages, waiting for them; with `ack=auto` unless `query` says otherwise.
    pub(crate) async fn receive_exactly(&self, count: usize, query: &str) -> Vec<Value> {
        let until = std::time::Instant::now() + SOON;
        let mut all = Vec::new();
        while all.len() < count {
            let max = (count - all.len()).min(1000);
            let more = self.receive(&format!("max={max}&wait=5&{query}")).await;
            assert!(more.len() <= max, "asked {} for {max}, got {}", self.id, more.len());
            all.extend(more);
            assert!(
                all.len() == count || std::time::Instant::now() < until,
                "{}: {} of {count} messages came",
                self.id,
                all.len()
            );
        }
        all
    }

    /// Settles receipts with `/ack` or `/nack` and returns the answer.
    pub(crate) async fn settle(&self, path: &str, receipts: &[String]) -> Value {
        self.post(path).json(&json!({ "receipts": receipts })).send().await.ok(200)
    }

    /// Its record.
    pub(crate) async fn record(&self) -> Value {
        self.get(&format!("/clients/{}", self.id)).send().await.ok(200)
    }

    /// Waits until its queue `name` holds `depth` messages.
    pub(crate) async fn wait_for_depth(&self, name: &str, depth: u64) {
        let what = format!("{}-{name} holds {depth}", self.id);
        eventually(&what, SOON, async || (self.record().await["queues"][name] == depth).then_some(())).await;
    }

    /// The first page of its dead letters, of this length.
    pub(crate) async fn dead_letters_up_to(&self, limit: usize) -> Vec<Value> {
        let path = format!("/clients/{}/dead-letters?limit={limit}", self.id);
        let page = self.get(&path).send().await.ok(200);
        page["dead_letters"].as_array().expect("dead letters").clone()
    }

    /// Its dead letters, once there are `count`.
    pub(crate) async fn dead_letters(&self, count: usize) -> Vec<Value> {
        eventually(&format!("{} has {count} dead letters", self.id), SOON, async || {
            let path = format!("/clients/{}/dead-letters", self.id);
            let page = self.get(&path).send().await.ok(200);
            let letters = page["dead_letters"].as_array().expect("dead letters").clone();
            (letters.len() == count).then_some(letters)
        })
        .await
    }
}

/// The `message` of each envelope.
pub(crate) fn messages(envelopes: &[Value]) -> Vec<Value> {
    envelopes.iter().map(|envelope| envelope["message"].clone()).collect()
}

/// The receipt of each envelope.
pub(crate) fn receipts(envelopes: &[Value]) -> Vec<String> {
    envelopes.iter().map(|envelope| envelope["receipt"].as_str().expect("a receipt").to_owned()).collect()
}
