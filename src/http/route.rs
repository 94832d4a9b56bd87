//! A path and its methods: what the route table is made of.
//!
//! Every handler is an `async fn(Call) -> Answer`. A path answers other methods with 405 and `Allow`, `OPTIONS` with
//! `Allow` alone, and `HEAD` as `GET` where a `GET` only looks.

use std::any::Any;
use std::future::{Future, Ready, ready};
use std::panic::AssertUnwindSafe;

use actix_web::dev::Payload;
use actix_web::http::Method;
use actix_web::http::header::ALLOW;
use actix_web::{FromRequest, HttpRequest, HttpResponse, Route, web};
use futures_util::FutureExt;
use prometheus::IntCounterVec;

use super::Api;
use super::edge::RouteCounters;
use super::error::Problem;

/// What a handler returns.
pub(crate) type Answer = Result<HttpResponse, Problem>;

/// One call: everything that a handler gets.
pub(crate) struct Call {
    /// Method, path, headers, peer.
    pub(crate) request: HttpRequest,
    /// The body, not read yet.
    pub(crate) payload: Payload,
    /// What all calls share.
    pub(crate) api: web::Data<Api>,
}

impl Call {
    /// A part of the path: `{id}`, percent-decoded. Empty when the pattern has no such part.
    pub(crate) fn path(&self, name: &str) -> &str {
        self.request.match_info().get(name).unwrap_or_default()
    }

    /// The same for what may hold any character: actix leaves `/`, `+` and `%` encoded, so that a path keeps its parts.
    pub(crate) fn path_decoded(&self, name: &str) -> String {
        let [slash, plus] = [["%2F", "%2f"], ["%2B", "%2b"]];
        let text = self.path(name).replace(slash[0], "/").replace(slash[1], "/");
        text.replace(plus[0], "+").replace(plus[1], "+").replace("%25", "%")
    }
}

impl FromRequest for Call {
    type Error = actix_web::Error;
    type Future = Ready<Result<Self, Self::Error>>;

    fn from_request(request: &HttpRequest, payload: &mut Payload) -> Self::Future {
        ready(match request.app_data::<web::Data<Api>>() {
            Some(api) => Ok(Self { request: request.clone(), payload: payload.take(), api: api.clone() }),
            None => Err(Problem::internal("an App was built without its Api").into()),
        })
    }
}

/// One path of the API.
pub(crate) struct At {
    path: &'static str,
    methods: Vec<(Method, Route)>,
}

/// Starts a path's entry in the route table.
pub(crate) fn at(path: &'static str) -> At {
    At { path, methods: Vec::new() }
}

impl At {
    /// A `GET` that changes nothing, so that `HEAD` may do the same.
    pub(crate) fn get<F, Fut>(self, handler: F) -> Self
    where
        F: Fn(Call) -> Fut + Clone + 'static,
        Fut: Future<Output = Answer> + 'static,
    {
        self.on(Method::GET, handler.clone()).on(Method::HEAD, handler)
    }

    /// A `GET` that takes something: no `HEAD`, which would take it and throw it away.
    pub(crate) fn take<F, Fut>(self, handler: F) -> Self
    where
        F: Fn(Call) -> Fut + Clone + 'static,
        Fut: Future<Output = Answer> + 'static,
    {
        self.on(Method::GET, handler)
    }

    pub(crate) fn post<F, Fut>(self, handler: F) -> Self
    where
        F: Fn(Call) -> Fut + Clone + 'static,
        Fut: Future<Output = Answer> + 'static,
    {
        self.on(Method::POST, handler)
    }

    pub(crate) fn patch<F, Fut>(self, handler: F) -> Self
    where
        F: Fn(Call) -> Fut + Clone + 'static,
        Fut: Future<Output = Answer> + 'static,
    {
        self.on(Method::PATCH, handler)
    }

    pub(crate) fn delete<F, Fut>(self, handler: F) -> Self
    where
        F: Fn(Call) -> Fut + Clone + 'static,
        Fut: Future<Output = Answer> + 'static,
    {
        self.on(Method::DELETE, handler)
    }

    fn on<F, Fut>(mut self, method: Method, handler: F) -> Self
    where
        F: Fn(Call) -> Fut + Clone + 'static,
        Fut: Future<Output = Answer> + 'static,
    {
        let route = web::method(method.clone()).to(move |call: Call| guarded(handler(call)));
        self.methods.push((method, route));
        self
    }

    /// `(method, path)` of everything in it, for holding the OpenAPI document against it.
    #[cfg(test)]
    pub(crate) fn operations(&self) -> Vec<(Method, &'static str)> {
        self.methods.iter().map(|(method, _)| (method.clone(), self.path)).collect()
    }

    /// Puts the path into an app, counted under its pattern.
    pub(crate) fn register(self, app: &mut web::ServiceConfig, requests: &IntCounterVec) {
        let mut allow: Vec<&str> = self.methods.iter().map(|(method, _)| method.as_str()).collect();
        allow.push("OPTIONS");
        let allow = allow.join(", ");
        let mut resource = web::resource(self.path).app_data(RouteCounters::new(self.path, requests.clone()));
        for (_, route) in self.methods {
            resource = resource.route(route);
        }
        app.service(
            resource.default_service(web::to(move |request: HttpRequest| ready(other_method(&request, &allow)))),
        );
    }
}

fn other_method(request: &HttpRequest, allow: &str) -> Answer {
    if request.method() == Method::OPTIONS {
        Ok(HttpResponse::NoContent().insert_header((ALLOW, allow)).finish())
    } else {
        Err(Problem::method_not_allowed(allow))
    }
}

/// A bug in one handler is one 500 with a line in the log, not a connection that breaks without a word.
async fn guarded(answer: impl Future<Output = Answer>) -> Answer {
    match AssertUnwindSafe(answer).catch_unwind().await {
        Ok(answer) => answer,
        Err(panic) => Err(Problem::internal(format!("handler panicked: {}", panic_text(&*panic)))),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_in_a_handler_is_an_internal_problem() {
        let answer = futures_util::FutureExt::now_or_never(guarded(async { panic!("boom") }));
        let problem = answer.expect("it does not wait").expect_err("it panicked");
        assert_eq!(problem.code(), super::super::error::Code::Internal);
        assert_eq!(problem.cause(), Some("handler panicked: boom"));
    }
}
