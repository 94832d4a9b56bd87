//! The edge of the API, around every route: gives each answer its `x-request-id`, renders problems, counts requests.

use std::cell::RefCell;
use std::future::{Ready, ready};

use actix_web::HttpMessage as _;
use actix_web::body::{BoxBody, EitherBody, MessageBody};
use actix_web::dev::{Service, ServiceRequest, ServiceResponse, Transform, forward_ready};
use actix_web::http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, UPGRADE};
use actix_web::http::{Method, StatusCode};
use futures_util::future::LocalBoxFuture;
use prometheus::{IntCounter, IntCounterVec};

use super::error::{Code, Problem};

/// Correlates an answer, its problem and the log. A caller may bring its own.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest request id taken over from a caller, in characters.
const REQUEST_ID_CHARS_MAX: usize = 128;

const PROBLEM_JSON: HeaderValue = HeaderValue::from_static("application/problem+json");

/// The counters of one route, by status: resolved once, so that a request adds to an integer and allocates nothing.
pub(crate) struct RouteCounters {
    route: &'static str,
    requests: IntCounterVec,
    /// A route answers with a handful of statuses, the usual one first.
    by_status: RefCell<Vec<(StatusCode, IntCounter)>>,
}

impl RouteCounters {
    pub(crate) fn new(route: &'static str, requests: IntCounterVec) -> Self {
        Self { route, requests, by_status: RefCell::default() }
    }

    fn count(&self, status: StatusCode) {
        let mut by_status = self.by_status.borrow_mut();
        if let Some((_, counter)) = by_status.iter().find(|(known, _)| *known == status) {
            counter.inc();
        } else {
            let counter = self.requests.with_label_values(&[self.route, status.as_str()]);
            counter.inc();
            by_status.push((status, counter));
        }
    }
}

/// The id of a request that becomes a connection, in its extensions.
pub(crate) struct RequestId(pub(crate) HeaderValue);

/// The middleware. See the module.
pub(crate) struct Edge {
    requests: IntCounterVec,
}

impl Edge {
    pub(crate) fn new(requests: IntCounterVec) -> Self {
        Self { requests }
    }
}

impl<S, B> Transform<S, ServiceRequest> for Edge
where
    S: Service<ServiceRequest, Response = ServiceResponse<B>, Error = actix_web::Error> + 'static,
    B: MessageBody + 'static,
{
    type Response = ServiceResponse<EitherBody<B>>;
    type Error = actix_web::Error;
    type Transform = EdgeService<S>;
    type InitError = ();
    type Future = Ready<Result<Self::Transform, ()>>;

    fn new_transform(&self, service: S) -> Self::Future {
        let unmatched = RouteCounters::new("unmatched", self.requests.clone());
        ready(Ok(EdgeService { service, unmatched: std::rc::Rc::new(unmatched) }))
    }
}

/// One worker's instance of [`Edge`].
pub(crate) struct EdgeService<S> {
    service: S,
    unmatched: std::rc::Rc<RouteCounters>,
}

impl<S, B> Service<ServiceRequest> for EdgeService<S>
where
    S: Service<ServiceRequest, Response = ServiceResponse<B>, Error = actix_web::Error> + 'static,
    B: MessageBody + 'static,
{
    type Response = ServiceResponse<EitherBody<B>>;
    type Error = actix_web::Error;
    type Future = LocalBoxFuture<'static, Result<Self::Response, Self::Error>>;

    forward_ready!(service);

    fn call(&self, request: ServiceRequest) -> Self::Future {
        let request_id = request_id(request.headers());
        if request.headers().contains_key(UPGRADE) {
            // A connection that stays tells of its troubles later, under the same id.
            request.extensions_mut().insert(RequestId(request_id.clone()));
        }
        let unmatched = std::rc::Rc::clone(&self.unmatched);
        let answer = self.service.call(request);
        Box::pin(async move { Ok(finish(answer.await?, request_id, &unmatched)) })
    }
}

/// The caller's own request id, when it is harmless wherever it is shown, or a fresh one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    if let Some(own) = headers.get(&REQUEST_ID) {
        let text = own.as_bytes();
        if (1..=REQUEST_ID_CHARS_MAX).contains(&text.len())
            && text.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.:+/=".contains(b))
        {
            return own.clone();
        }
    }
    let mut buffer = uuid::Uuid::encode_buffer();
    let text = uuid::Uuid::now_v7().hyphenated().encode_lower(&mut buffer);
    HeaderValue::from_str(text).expect("a UUID is visible ASCII")
}

fn finish<B: MessageBody>(
    answer: ServiceResponse<B>,
    request_id: HeaderValue,
    unmatched: &RouteCounters,
) -> ServiceResponse<EitherBody<B>> {
    let counters = answer.request().app_data::<RouteCounters>().unwrap_or(unmatched);
    counters.count(answer.status());
    let method = answer.request().method();
    log::debug!("{method} {} {} (request {request_id:?})", counters.route, answer.status().as_u16());

    let failed = answer.status().is_client_error() || answer.status().is_server_error();
    let mut answer = if failed {
        log_cause(&answer, counters.route, &request_id);
        render(answer, &request_id).map_into_right_body()
    } else {
        answer.map_into_left_body()
    };
    answer.headers_mut().insert(REQUEST_ID, request_id);
    answer
}

fn problem_of<B>(answer: &ServiceResponse<B>) -> Option<&Problem> {
    answer.response().error().and_then(actix_web::Error::as_error::<Problem>)
}

/// The one place where what a 5xx hides is logged.
fn log_cause<B>(answer: &ServiceResponse<B>, route: &str, request_id: &HeaderValue) {
    let method: &Method = answer.request().method();
    let id = request_id.to_str().unwrap_or_default();
    match problem_of(answer) {
        Some(problem) => {
            if let Some(cause) = problem.cause() {
                log::error!("{method} {route} failed: {cause} (request {id})");
            }
        }
        None if answer.status().is_server_error() => {
            let cause = answer.response().error().map(ToString::to_string).unwrap_or_default();
            log::error!("{method} {route} failed: {cause} (request {id})");
        }
        None => {}
    }
}

fn render<B: MessageBody>(answer: ServiceResponse<B>, request_id: &HeaderValue) -> ServiceResponse<BoxBody> {
    // What actix itself refuses has no problem of ours yet.
    let foreign;
    let problem = match problem_of(&answer) {
        Some(problem) => problem,
        None => {
            foreign = Problem::new(
                match answer.status() {
                    StatusCode::NOT_FOUND => Code::NotFound,
                    StatusCode::METHOD_NOT_ALLOWED => Code::MethodNotAllowed,
                    StatusCode::PAYLOAD_TOO_LARGE => Code::TooLarge,
                    StatusCode::UNSUPPORTED_MEDIA_TYPE => Code::UnsupportedMediaType,
                    status if status.is_server_error() => Code::Internal,
                    _ => Code::InvalidJson,
                },
                "the request could not be read",
            );
            &foreign
        }
    };
    let body = problem.to_json(request_id.to_str().unwrap_or_default());
    let headers = problem.headers();
    let mut answer = answer.map_body(|_, _| BoxBody::new(body));
    answer.headers_mut().insert(CONTENT_TYPE, PROBLEM_JSON);
    for (name, value) in headers {
        if let Ok(value) = HeaderValue::from_str(&value) {
            answer.headers_mut().append(HeaderName::from_static(name), value);
        }
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_callers_own_request_id_is_kept_when_it_is_harmless() {
        let mut headers = HeaderMap::new();
        headers.insert(REQUEST_ID, HeaderValue::from_static("my-id_7"));
        assert_eq!(request_id(&headers), "my-id_7");
        for harmful in ["", "two words", "<script>", "\"", &"x".repeat(129)] {
            headers.insert(REQUEST_ID, HeaderValue::from_str(harmful).expect("a header value"));
            assert_eq!(request_id(&headers).len(), 36, "{harmful}");
        }
    }

    #[test]
    fn requests_are_counted_by_route_and_status() {
        let telemetry = crate::telemetry::new(0);
        let counters = RouteCounters::new("/send", telemetry.metrics.requests.clone());
        for status in [StatusCode::ACCEPTED, StatusCode::ACCEPTED, StatusCode::BAD_REQUEST] {
            counters.count(status);
        }
        let text = telemetry.metrics.render();
        assert!(text.contains(r#"backbone_requests_total{route="/send",status="202"} 2"#), "{text}");
        assert!(text.contains(r#"backbone_requests_total{route="/send",status="400"} 1"#), "{text}");
    }
}
