//! The HTTP API as the commands see it: calls, credentials, and refusals turned into one line that says what to do.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use reqwest::{Method, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::error::CliError;
use crate::websocket::{ConnectError, WebSocket};

/// How long a connection may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a call may take, unless it waits by design. Deleting a client first forwards what its queues hold.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the handshake of a WebSocket may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(15);

/// Waits before a repeated call, when the answer names none: doubling from the first to the second.
const BACKOFF_FIRST: Duration = Duration::from_millis(250);
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// The longest `Retry-After` that is waited for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// Wrong fields that the one line about a refusal names; the rest is counted.
const ERRORS_SHOWN: usize = 5;

/// Who makes a call.
#[derive(Clone)]
pub(crate) enum Who {
    /// Nobody in particular.
    Anyone,
    /// The operator, by the admin token.
    Admin(String),
    /// A client.
    Client {
        /// Its id.
        id: String,
        /// Its secret.
        secret: String,
    },
}

/// A call, ready to be made any number of times.
#[derive(Clone)]
pub(crate) struct Call {
    method: Method,
    path: Vec<String>,
    query: Vec<(&'static str, String)>,
    who: Who,
    body: Option<(&'static str, Bytes)>,
    timeout: Duration,
}

impl Call {
    /// A call to the path made of `segments`; each is percent-encoded.
    pub(crate) fn new(method: Method, segments: &[&str], who: &Who) -> Self {
        let path = segments.iter().map(|&segment| segment.to_owned()).collect();
        Self { method, path, query: Vec::new(), who: who.clone(), body: None, timeout: CALL_TIMEOUT }
    }

    /// Adds a query parameter.
    #[must_use]
    pub(crate) fn query(mut self, name: &'static str, value: impl ToString) -> Self {
        self.query.push((name, value.to_string()));
        self
    }

    /// With a JSON body.
    #[must_use]
    pub(crate) fn json(self, body: impl Into<Bytes>) -> Self {
        self.body("application/json", body)
    }

    /// With a body of newline-delimited JSON.
    #[must_use]
    pub(crate) fn ndjson(self, body: impl Into<Bytes>) -> Self {
        self.body("application/x-ndjson", body)
    }

    fn body(mut self, content_type: &'static str, body: impl Into<Bytes>) -> Self {
        self.body = Some((content_type, body.into()));
        self
    }

    /// For a call that waits at the router for as long as `wait`.
    #[must_use]
    pub(crate) fn waiting(mut self, wait: Duration) -> Self {
        self.timeout += wait;
        self
    }
}

/// A router, by its URL.
#[derive(Clone)]
pub(crate) struct Api {
    http: reqwest::Client,
    base: Url,
}

/// Why a call did not bring what was asked.
#[derive(Debug)]
pub(crate) enum Failure {
    /// There was no connection: the router has not seen the call.
    Unreachable(String),
    /// The connection broke or the time was up: the router may have acted.
    Broken(String),
    /// The router said no.
    Refused(Box<Problem>),
}

/// A refusal (RFC 9457).
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Problem {
    /// The HTTP status.
    pub(crate) status: u16,
    /// What kind of refusal, stable, for programs.
    pub(crate) code: String,
    title: String,
    detail: String,
    /// Every wrong field.
    pub(crate) errors: Vec<FieldError>,
    /// Why the router is not ready.
    reasons: Vec<String>,
    request_id: String,
    /// How long to wait before the next try.
    #[serde(skip)]
    pub(crate) retry_after: Option<Duration>,
    #[serde(skip)]
    hint: String,
}

/// One wrong field.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct FieldError {
    /// JSON pointer into the body, or the parameter's name.
    pub(crate) pointer: String,
    /// What is wrong with it.
    pub(crate) detail: String,
}

impl Api {
    /// A client for the router at `url`.
    ///
    /// # Errors
    /// Wrong usage, when the URL is none or the certificate file cannot be read.
    pub(crate) fn new(url: &str, ca_cert: Option<&Path>) -> Result<Self, CliError> {
        let base = Url::parse(url).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let Some(base) = base else {
            return Err(CliError::usage(format!("not a URL like http://127.0.0.1:3000: {url}")));
        };
        // Someone else in this process may have chosen a provider before, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = reqwest::Client::builder()
            .no_proxy()
            .tcp_nodelay(true)
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("backbone/", env!("CARGO_PKG_VERSION")));
        if let Some(path) = ca_cert {
            let unreadable = |error: &dyn std::fmt::Display| {
                CliError::failed(format!("cannot read certificates from {}: {error}", path.display()))
            };
            let pem = std::fs::read(path).map_err(|error| unreadable(&error))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| unreadable(&error))?;
            builder = builder.tls_certs_merge(certificates);
        }
        let http = builder.build().map_err(|error| CliError::failed(format!("cannot set up HTTP: {error}")))?;
        Ok(Self { http, base })
    }

    /// The router's address.
    pub(crate) fn url(&self) -> &Url {
        &self.base
    }

    /// Makes a call and gives the body of its 2xx answer.
    ///
    /// # Errors
    /// [`Failure`]: no connection, no answer, or a refusal.
    pub(crate) async fn call(&self, call: &Call) -> Result<Bytes, Failure> {
        let mut url = self.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(&call.path);
        }
        if !call.query.is_empty() {
            url.query_pairs_mut().extend_pairs(&call.query);
        }
        let mut request = self.http.request(call.method.clone(), url).timeout(call.timeout);
        request = with_credentials(request, &call.who);
        if let Some((content_type, body)) = &call.body {
            request = request.header(reqwest::header::CONTENT_TYPE, *content_type).body(body.clone());
        }
        let response = request.send().await.map_err(|error| self.no_answer(&error))?;
        if !response.status().is_success() {
            return Err(self.refusal(response, &call.who, call.path.first().map_or("", String::as_str)).await);
        }
        response.bytes().await.map_err(|error| self.no_answer(&error))
    }

    /// Opens a client's WebSocket.
    ///
    /// # Errors
    /// [`Failure`], as for a call.
    pub(crate) async fn websocket(&self, who: &Who) -> Result<WebSocket, Failure> {
        let mut url = self.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().push("ws");
        }
        let request = with_credentials(self.http.get(url), who);
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, WebSocket::connect(request)).await {
            Ok(Ok(socket)) => Ok(socket),
            Ok(Err(ConnectError::Unreachable(error))) => Err(self.no_answer(&error)),
            Ok(Err(ConnectError::Refused(answer))) => Err(self.refusal(*answer, who, "ws").await),
            Ok(Err(error @ ConnectError::NotAWebSocket(_))) => Err(Failure::Broken(format!("{}: {error}", self.base))),
            Err(_) => Err(Failure::Broken(format!("{} did not answer in time", self.base))),
        }
    }

    async fn refusal(&self, response: reqwest::Response, who: &Who, resource: &str) -> Failure {
        let status = response.status();
        let retry_after = response.headers().get(reqwest::header::RETRY_AFTER).and_then(|value| {
            value.to_str().ok()?.trim().parse().ok().map(|seconds| Duration::from_secs(seconds).min(RETRY_AFTER_MAX))
        });
        let body = match response.bytes().await {
            Ok(body) => body,
            Err(error) => return self.no_answer(&error),
        };
        // What is no problem document did not come from a backbone; say so, rather than show a web page.
        let mut problem: Problem = serde_json::from_slice(&body).unwrap_or_else(|_| Problem {
            detail: format!("{} answered {status}, and not as a backbone does", self.base),
            hint: "is the URL right?".into(),
            ..Problem::default()
        });
        problem.status = status.as_u16();
        problem.retry_after = retry_after;
        if problem.hint.is_empty() {
            problem.hint = hint(&problem, who, resource);
        }
        Failure::Refused(Box::new(problem))
    }

    /// Makes a call and reads its answer.
    ///
    /// # Errors
    /// As [`Api::call`]; an answer of another shape counts as broken.
    pub(crate) async fn fetch<T: DeserializeOwned>(&self, call: &Call) -> Result<T, Failure> {
        let body = self.call(call).await?;
        serde_json::from_slice(&body)
            .map_err(|error| Failure::Broken(format!("{} sent an answer that cannot be read: {error}", self.base)))
    }

    /// Makes a call again and again, at most `retries` times more, while the router is busy or away: for calls that
    /// may be repeated without harm. `on_wait` hears why and for how long it waits. A router that has never been
    /// reached is not waited for.
    ///
    /// # Errors
    /// The last [`Failure`].
    pub(crate) async fn call_patiently(
        &self,
        call: &Call,
        retries: u32,
        reached_before: bool,
        mut on_wait: impl FnMut(&Failure, Duration),
    ) -> Result<Bytes, Failure> {
        let mut tried = 0;
        loop {
            let failure = match self.call(call).await {
                Ok(body) => return Ok(body),
                Err(failure) => failure,
            };
            let again = match &failure {
                Failure::Unreachable(_) => reached_before || tried > 0,
                Failure::Broken(_) => true,
                Failure::Refused(problem) => matches!(problem.status, 429 | 503),
            };
            if !again || tried >= retries {
                return Err(failure);
            }
            let wait = wait_before(tried, &failure);
            on_wait(&failure, wait);
            tokio::time::sleep(wait).await;
            tried += 1;
        }
    }

    fn no_answer(&self, error: &reqwest::Error) -> Failure {
        let mut cause: &dyn std::error::Error = error;
        while let Some(deeper) = cause.source() {
            cause = deeper;
        }
        let base = self.base.as_str().trim_end_matches('/');
        if error.is_connect() {
            Failure::Unreachable(format!(
                "cannot reach {base}: {cause}; start a router with `backbone serve`, or name another by --url or \
                 SOAR_URL"
            ))
        } else if error.is_timeout() {
            Failure::Broken(format!("{base} did not answer in time; `backbone status` may say why"))
        } else {
            Failure::Broken(format!("the connection to {base} broke: {cause}; try again"))
        }
    }
}

/// How long to wait after `tried` tries that ended in `failure`.
pub(crate) fn wait_before(tried: u32, failure: &Failure) -> Duration {
    match failure {
        Failure::Refused(problem) if problem.retry_after.is_some() => problem.retry_after.unwrap_or_default(),
        _ => BACKOFF_FIRST.saturating_mul(1 << tried.min(8)).min(BACKOFF_MAX),
    }
}

fn with_credentials(request: reqwest::RequestBuilder, who: &Who) -> reqwest::RequestBuilder {
    match who {
        Who::Anyone => request,
        Who::Admin(token) => request.bearer_auth(token),
        Who::Client { id, secret } => request.basic_auth(id, Some(secret)),
    }
}

impl Failure {
    /// A refusal that a client was told otherwise than by the answer to a call.
    pub(crate) fn of_a_client(mut problem: Problem) -> Self {
        problem.hint = hint(&problem, &Who::Anyone, "ws");
        Self::Refused(Box::new(problem))
    }

    /// Whether it is this refusal.
    pub(crate) fn is(&self, code: &str) -> bool {
        matches!(self, Self::Refused(problem) if problem.code == code)
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unreachable(text) | Self::Broken(text) => f.write_str(text),
            Self::Refused(problem) => problem.fmt(f),
        }
    }
}

impl From<Failure> for CliError {
    fn from(failure: Failure) -> Self {
        Self::failed(failure.to_string())
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Where fields are named, the detail only says so; where there is a hint, it speaks of commands instead of calls.
        let said = match (self.detail.as_str(), self.hint.is_empty()) {
            _ if !self.errors.is_empty() || self.detail.is_empty() => self.title.as_str(),
            (detail, true) => detail,
            (detail, false) => detail.split("; ").next().unwrap_or_default(),
        };
        write!(f, "{} ({}", said.trim_end_matches('.'), self.status)?;
        if !self.code.is_empty() {
            write!(f, " {}", self.code)?;
        }
        f.write_str(")")?;
        for error in self.errors.iter().take(ERRORS_SHOWN) {
            write!(f, "; {}: {}", error.pointer, error.detail)?;
        }
        if self.errors.len() > ERRORS_SHOWN {
            write!(f, "; and {} more", self.errors.len() - ERRORS_SHOWN)?;
        }
        for reason in self.reasons.iter().take(ERRORS_SHOWN) {
            write!(f, "; {reason}")?;
        }
        if !self.hint.is_empty() {
            write!(f, "; {}", self.hint)?;
        }
        if self.status >= 500 && !self.request_id.is_empty() {
            write!(f, "; request {}", self.request_id)?;
        }
        Ok(())
    }
}

/// What to do about a refusal by a call under `/{resource}`.
fn hint(problem: &Problem, who: &Who, resource: &str) -> String {
    let wait = || match problem.retry_after {
        Some(wait) => format!("try again in {} s", wait.as_secs()),
        None => "try again later".into(),
    };
    match problem.code.as_str() {
        "unauthorized" => match who {
            Who::Client { id, .. } => format!(
                "check --as and --secret; an operator can make a new secret with `backbone client rotate-secret {id}`"
            ),
            _ => "it is not this router's admin token: see admin-token in its DATA_DIR".into(),
        },
        "client_exists" => "take another id, or see `backbone client update --help`".into(),
        "webhook_configured" => {
            "its messages go to its webhook; `backbone client update ID --disable-webhook` lets it read them here"
                .into()
        }
        "not_found" if resource == "clients" && problem.detail.contains("no webhook") => {
            "`backbone client update ID --webhook URL` sets one".into()
        }
        "not_found" if resource == "clients" => "`backbone client list` shows the clients there are".into(),
        "not_found" if resource == "messages" => {
            "the SOAR_TRACE_MESSAGES most recent messages are remembered, until a restart".into()
        }
        "too_large" => "SOAR_MAX_MESSAGE_BYTES sets the limit at the router".into(),
        "rate_limited" | "broker_unavailable" | "shutting_down" => wait(),
        "disk_full" => "nothing was taken; make room on the router's disk".into(),
        "internal" => "the router's log says more".into(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(json: &str) -> Problem {
        let mut problem: Problem = serde_json::from_str(json).expect("a problem document");
        problem.hint = hint(&problem, &Who::Anyone, "clients");
        problem
    }

    #[test]
    fn a_refusal_names_every_wrong_field_and_what_to_do() {
        let shown = problem(
            r#"{"type":"about:blank","title":"Invalid","status":422,"detail":"2 fields are invalid.","code":"invalid",
                "errors":[{"pointer":"/client_id","detail":"is reserved"},{"pointer":"/subscriptions/0","detail":"has ' '"}]}"#,
        );
        assert_eq!(shown.to_string(), "Invalid (422 invalid); /client_id: is reserved; /subscriptions/0: has ' '");
        let shown = problem(r#"{"title":"Full","status":507,"code":"disk_full","request_id":"r-1"}"#);
        assert_eq!(
            shown.to_string(),
            "Full (507 disk_full); nothing was taken; make room on the router's disk; request r-1"
        );
    }

    #[test]
    fn a_wait_is_the_routers_or_doubles() {
        let named = Problem { retry_after: Some(Duration::from_secs(7)), ..Problem::default() };
        assert_eq!(wait_before(0, &Failure::Refused(Box::new(named))), Duration::from_secs(7));
        let waits: Vec<u128> = (0..8).map(|n| wait_before(n, &Failure::Broken(String::new())).as_millis()).collect();
        assert_eq!(waits, [250, 500, 1000, 2000, 4000, 5000, 5000, 5000]);
    }

    #[test]
    fn a_url_must_be_one() {
        for bad in ["", "localhost:3000", "ftp://x", "http://"] {
            assert!(matches!(Api::new(bad, None), Err(CliError::Usage(_))), "{bad}");
        }
        assert!(Api::new("http://127.0.0.1:3000/base/", None).is_ok());
    }
}
