//! Problems: every refusal of the API as `application/problem+json` (RFC 9457).
//!
//! Handlers return a [`Problem`]; the [`super::edge`] middleware renders it, because only there the request id is known.
//! The only place, with the handlers' own 2xx, that knows status codes.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use actix_web::http::StatusCode;
use actix_web::{HttpResponse, ResponseError};
use serde::Serialize;
use utoipa::ToSchema;

use crate::actors::registry::RegistryError;
use crate::broker::{BrokerError, BrokerErrorKind};

/// Most wrong fields that one answer names; the rest is counted. Bounds the answer to a batch of junk.
const ERRORS_MAX: usize = 10_000;

/// The stable, machine-readable kinds of refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = ProblemCode)]
pub(crate) enum Code {
    InvalidJson,
    UnsupportedMediaType,
    TooLarge,
    Unauthorized,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    ClientExists,
    WebhookConfigured,
    Invalid,
    RateLimited,
    BrokerUnavailable,
    ShuttingDown,
    DiskFull,
    Internal,
}

impl Code {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::InvalidJson => "invalid_json",
            Self::UnsupportedMediaType => "unsupported_media_type",
            Self::TooLarge => "too_large",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::ClientExists => "client_exists",
            Self::WebhookConfigured => "webhook_configured",
            Self::Invalid => "invalid",
            Self::RateLimited => "rate_limited",
            Self::BrokerUnavailable => "broker_unavailable",
            Self::ShuttingDown => "shutting_down",
            Self::DiskFull => "disk_full",
            Self::Internal => "internal",
        }
    }

    pub(crate) const fn status(self) -> StatusCode {
        match self {
            Self::InvalidJson => StatusCode::BAD_REQUEST,
            Self::UnsupportedMediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::ClientExists | Self::WebhookConfigured => StatusCode::CONFLICT,
            Self::Invalid => StatusCode::UNPROCESSABLE_ENTITY,
            Self::RateLimited => StatusCode::TOO_MANY_REQUESTS,
            Self::BrokerUnavailable | Self::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
            Self::DiskFull => StatusCode::INSUFFICIENT_STORAGE,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    const fn title(self) -> &'static str {
        match self {
            Self::InvalidJson => "The body is not JSON",
            Self::UnsupportedMediaType => "Unsupported media type",
            Self::TooLarge => "Too large",
            Self::Unauthorized => "Unauthorized",
            Self::Forbidden => "Forbidden",
            Self::NotFound => "Not found",
            Self::MethodNotAllowed => "Method not allowed",
            Self::ClientExists => "The client id is taken",
            Self::WebhookConfigured => "A webhook is configured",
            Self::Invalid => "The request is well-formed but invalid",
            Self::RateLimited => "Too many requests",
            Self::BrokerUnavailable => "The broker is not available",
            Self::ShuttingDown => "Shutting down",
            Self::DiskFull => "The disk is full",
            Self::Internal => "Internal error",
        }
    }

    /// What `Retry-After` says when the problem itself does not know, in seconds.
    const fn retry_after_s(self) -> Option<u64> {
        match self {
            Self::RateLimited => Some(1),
            Self::BrokerUnavailable => Some(2),
            Self::ShuttingDown => Some(5),
            _ => None,
        }
    }
}

/// One wrong field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct FieldError {
    /// JSON pointer into the body (RFC 6901; `/1/topic` for the second message), or the parameter's name.
    #[schema(examples("/1/topic"))]
    pub(crate) pointer: String,
    /// What is wrong with it.
    #[schema(examples("must not have an empty word (a dot at an end, or two in a row)"))]
    pub(crate) detail: String,
}

/// Wrong fields, collected: the answer names every one, up to [`ERRORS_MAX`].
#[derive(Debug, Default)]
pub(crate) struct Errors {
    named: Vec<FieldError>,
    unnamed: usize,
}

impl Errors {
    pub(crate) fn add(&mut self, pointer: impl Into<String>, detail: impl Into<String>) {
        if self.named.len() < ERRORS_MAX {
            self.named.push(FieldError { pointer: pointer.into(), detail: detail.into() });
        } else {
            self.unnamed += 1;
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    #[cfg(test)]
    pub(crate) fn pointers(&self) -> Vec<&str> {
        self.named.iter().map(|error| error.pointer.as_str()).collect()
    }

    /// `Ok` when nothing was wrong.
    pub(crate) fn into_result(self) -> Result<(), Problem> {
        if self.is_empty() { Ok(()) } else { Err(Problem::invalid(self)) }
    }
}

/// Which challenge a 401 carries (RFC 9110, section 11.6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Challenge {
    /// The admin token only. No `Basic`, so that a browser does not open its own password dialogue over the console.
    Bearer,
    /// A client's id and secret, or a token.
    BasicOrBearer,
}

/// A refusal. Boxed, so that a `Result` of it stays small.
#[derive(Debug)]
pub(crate) struct Problem(Box<Parts>);

#[derive(Debug)]
struct Parts {
    code: Code,
    detail: Cow<'static, str>,
    errors: Errors,
    reasons: Vec<String>,
    retry_after_s: Option<u64>,
    challenge: Option<Challenge>,
    allow: Option<String>,
    cause: Option<String>,
}

#[derive(Serialize)]
struct Body<'a> {
    r#type: &'static str,
    title: &'static str,
    status: u16,
    detail: &'a str,
    code: Code,
    request_id: &'a str,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    errors: &'a [FieldError],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    reasons: &'a [String],
}

impl Problem {
    pub(crate) fn new(code: Code, detail: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Parts {
            code,
            detail: detail.into(),
            errors: Errors::default(),
            reasons: Vec::new(),
            retry_after_s: code.retry_after_s(),
            challenge: None,
            allow: None,
            cause: None,
        }))
    }

    pub(crate) fn invalid_json(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::InvalidJson, detail)
    }

    pub(crate) fn too_large(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::TooLarge, detail)
    }

    pub(crate) fn forbidden(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::Forbidden, detail)
    }

    pub(crate) fn not_found(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::NotFound, detail)
    }

    pub(crate) fn shutting_down() -> Self {
        Self::new(Code::ShuttingDown, "the backbone is shutting down; try again, with the same message ids")
    }

    pub(crate) fn broker_unavailable() -> Self {
        Self::new(
            Code::BrokerUnavailable,
            "the broker cannot be reached or takes no messages now; try again, with the same message ids",
        )
    }

    /// The answer says nothing of the cause, the log does.
    pub(crate) fn internal(cause: impl Into<String>) -> Self {
        let mut problem = Self::new(
            Code::Internal,
            "something went wrong inside the backbone; its log has more under this request_id",
        );
        problem.0.cause = Some(cause.into());
        problem
    }

    pub(crate) fn invalid(errors: Errors) -> Self {
        let detail = match errors.unnamed {
            0 => "see `errors` for each wrong field".into(),
            more => Cow::from(format!("see `errors` for the first {ERRORS_MAX} wrong fields; there are {more} more")),
        };
        let mut problem = Self::new(Code::Invalid, detail);
        problem.0.errors = errors;
        problem
    }

    pub(crate) fn unauthorized(challenge: Challenge) -> Self {
        let detail = match challenge {
            Challenge::Bearer => "send `Authorization: Bearer <admin token>`",
            Challenge::BasicOrBearer => {
                "send HTTP Basic with client id and secret, or `Authorization: Bearer <token from POST /token>`"
            }
        };
        let mut problem = Self::new(Code::Unauthorized, format!("no credentials, or wrong ones; {detail}"));
        problem.0.challenge = Some(challenge);
        problem
    }

    pub(crate) fn rate_limited(detail: impl Into<Cow<'static, str>>, wait: Duration) -> Self {
        Self::new(Code::RateLimited, detail).retry_after(wait)
    }

    pub(crate) fn method_not_allowed(allow: &str) -> Self {
        let mut problem = Self::new(Code::MethodNotAllowed, format!("this path takes {allow}"));
        problem.0.allow = Some(allow.to_owned());
        problem
    }

    /// `Retry-After`, rounded up to whole seconds, at least 1.
    pub(crate) fn retry_after(mut self, wait: Duration) -> Self {
        self.0.retry_after_s = Some(wait.as_secs_f64().ceil().max(1.0) as u64);
        self
    }

    /// Not ready, for these reasons, which are shown to whoever asks.
    pub(crate) fn not_ready(reasons: Vec<String>) -> Self {
        Self::new(Code::BrokerUnavailable, "not ready; see `reasons`").reasons(reasons)
    }

    pub(crate) fn reasons(mut self, reasons: Vec<String>) -> Self {
        self.0.reasons = reasons;
        self
    }

    #[cfg(test)]
    pub(crate) fn code(&self) -> Code {
        self.0.code
    }

    /// What the log should know and the answer must not say.
    pub(crate) fn cause(&self) -> Option<&str> {
        self.0.cause.as_deref()
    }

    /// The body, as JSON.
    pub(crate) fn to_json(&self, request_id: &str) -> Vec<u8> {
        let parts = &self.0;
        let body = Body {
            r#type: "about:blank",
            title: parts.code.title(),
            status: parts.code.status().as_u16(),
            detail: &parts.detail,
            code: parts.code,
            request_id,
            errors: &parts.errors.named,
            reasons: &parts.reasons,
        };
        serde_json::to_vec(&body).expect("strings and numbers always serialise")
    }

    /// What is in its headers: `(name, value)`, besides content type and request id.
    pub(crate) fn headers(&self) -> Vec<(&'static str, String)> {
        let mut headers = Vec::new();
        if let Some(seconds) = self.0.retry_after_s {
            headers.push(("retry-after", seconds.to_string()));
        }
        if let Some(allow) = &self.0.allow {
            headers.push(("allow", allow.clone()));
        }
        match self.0.challenge {
            Some(Challenge::BasicOrBearer) => {
                headers.push(("www-authenticate", r#"Basic realm="backbone", charset="UTF-8""#.into()));
                headers.push(("www-authenticate", r#"Bearer realm="backbone""#.into()));
            }
            Some(Challenge::Bearer) => headers.push(("www-authenticate", r#"Bearer realm="backbone""#.into())),
            None => {}
        }
        headers
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.0.code.as_str(), self.0.detail)
    }
}

impl ResponseError for Problem {
    fn status_code(&self) -> StatusCode {
        self.0.code.status()
    }

    /// Bare: the middleware puts the body in.
    fn error_response(&self) -> HttpResponse {
        HttpResponse::new(self.status_code())
    }
}

/// An error and its causes on one line, for the log.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(deeper) = cause {
        text.push_str(": ");
        text.push_str(&deeper.to_string());
        cause = deeper.source();
    }
    text
}

impl From<BrokerError> for Problem {
    fn from(error: BrokerError) -> Self {
        match error.kind {
            BrokerErrorKind::Unavailable | BrokerErrorKind::Blocked => Self::broker_unavailable(),
            BrokerErrorKind::DiskFull => {
                Self::new(Code::DiskFull, "the disk is full: nothing was taken; try again once there is room")
            }
            // The client was deleted while its call was under way: its credentials are no longer any.
            BrokerErrorKind::NotFound => Self::unauthorized(Challenge::BasicOrBearer),
            BrokerErrorKind::Closed => Self::shutting_down(),
            BrokerErrorKind::Conflict | BrokerErrorKind::Internal => Self::internal(chain(&error)),
        }
    }
}

impl From<RegistryError> for Problem {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::Exists(id) => {
                Self::new(Code::ClientExists, format!("there is a client {id} already; PATCH /clients/{id} changes it"))
            }
            // Whoever merges a patch does it again, and so nobody else sees it.
            RegistryError::Changed(_) => Self::internal(chain(&error)),
            RegistryError::NotFound(id) => Self::not_found(format!("there is no client {id}")),
            RegistryError::NoWebhook(id) => Self::not_found(format!("client {id} has no webhook, so no secret of one")),
            RegistryError::ShuttingDown => Self::shutting_down(),
            RegistryError::Broker(error) if error.kind == BrokerErrorKind::Conflict => {
                // The text names the queue and the way out; only the admin, who can take it, gets here.
                Self::new(Code::ClientExists, error.action)
            }
            RegistryError::Broker(error) if error.kind == BrokerErrorKind::NotFound => Self::internal(chain(&error)),
            RegistryError::Broker(error) => error.into(),
            RegistryError::Store { ref source, .. } => match source.kind {
                crate::db::DbErrorKind::Full => {
                    Self::new(Code::DiskFull, "the disk is full: nothing was changed; try again once there is room")
                }
                crate::db::DbErrorKind::Closed => Self::shutting_down(),
                crate::db::DbErrorKind::Locked | crate::db::DbErrorKind::Internal => Self::internal(chain(&error)),
            },
        }
    }
}

#[cfg(test)]
#[path = "error_tests.rs"]
mod tests;
