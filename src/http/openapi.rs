//! The OpenAPI 3.1 document, made from the handlers' own declarations: `GET /openapi.json`.

use std::collections::BTreeMap;

use actix_web::HttpResponse;
use serde::Serialize;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{Operation, Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{AllOfBuilder, ObjectBuilder, Type};
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{ContentBuilder, Header, OpenApi, Ref, RefOr, Required, Response, ResponseBuilder};
use utoipa::{IntoParams, IntoResponses, Modify, OpenApi as _, ToSchema};

use super::error::{Code, FieldError};
use super::route::{Answer, Call};
use super::{
    clients, console, dead_letters, health, messages, pages, receive, secrets, send, settle, token, webhooks, ws,
};

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Communications Backbone",
        description = "Routes messages between clients by topic. An admin onboards a client with one call; the client \
                       sends with `POST /send`, and receives with `GET /receive` or by webhook.\n\nErrors are problems \
                       (RFC 9457) with a stable `code` and a `detail` that says what to do; each answer has an \
                       `x-request-id`. Another method on a path is a 405 whose `Allow` names those that it has; `HEAD` \
                       does what `GET` does where that only looks.",
    ),
    paths(
        send::send, send::notify, receive::receive, settle::ack, settle::nack, token::token,
        clients::create, clients::list, clients::show, clients::patch, clients::delete,
        secrets::rotate_client, secrets::rotate_webhook,
        webhooks::attempts, webhooks::test,
        dead_letters::list, dead_letters::replay, dead_letters::purge,
        messages::show, ws::ws,
        health::livez, health::readyz, health::metrics, openapi,
        pages::console, pages::docs, pages::asset, console::feed,
    ),
    components(schemas(ProblemView, FieldError, Code, AckMode, SortOrder, PatternText, console::Sort, receive::EnvelopeView)),
    tags(
        (name = "messages", description = "A client's calls: send, receive, settle."),
        (name = "clients", description = "Onboarding and looking after clients."),
        (name = "webhooks", description = "How deliveries to a client's endpoint go."),
        (name = "dead letters", description = "What could not be delivered, or not be read."),
        (name = "pages", description = "For people: the operators' console, and this API's page."),
        (name = "operation", description = "Health, metrics, this document."),
    ),
    modifiers(&Everywhere),
)]
struct Document;

/// The document as it is served.
pub(crate) fn document() -> OpenApi {
    let mut document = Document::openapi();
    document.info.version = env!("CARGO_PKG_VERSION").into();
    document
}

/// This document.
#[utoipa::path(
    get, path = "/openapi.json", tag = "operation",
    responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Map<String, serde_json::Value>, content_type = "application/json")),
    security(()),
)]
pub(crate) async fn openapi(call: Call) -> Answer {
    Ok(HttpResponse::Ok().content_type("application/json").body(call.api.openapi.clone()))
}

/// A refusal (RFC 9457).
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem)]
#[allow(dead_code, reason = "describes the answer; the problem itself is rendered in error.rs")]
struct ProblemView {
    /// Always `about:blank`: `code` says which problem it is.
    r#type: String,
    /// For people, the same for every problem of this code.
    title: String,
    /// The HTTP status.
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// For people: what is wrong here, and what to do.
    detail: String,
    /// For programs; stable.
    code: Code,
    /// Also the header `x-request-id`; the log knows the request by it.
    request_id: String,
    /// With `invalid`: every wrong field.
    #[serde(skip_serializing_if = "Option::is_none")]
    errors: Option<Vec<FieldError>>,
    /// From `/readyz`: why it is not ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasons: Option<Vec<String>>,
}

/// How `GET /receive` hands over.
#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
#[allow(dead_code, reason = "names the values in the document")]
pub(crate) enum AckMode {
    Auto,
    Manual,
}

/// Which way a list is sorted.
#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
#[allow(dead_code, reason = "names the values in the document")]
pub(crate) enum SortOrder {
    Asc,
    Desc,
}

/// A pattern of topics: a topic in which a word may be `*` (exactly one word) or `#` (zero or more words; at most two
/// `#`). At most 255 bytes.
#[derive(ToSchema)]
#[schema(
    as = Pattern, value_type = String, min_length = 1, max_length = 255, example = "soar.noc.#",
    pattern = r"^([A-Za-z0-9_-]+|\*|#)(\.([A-Za-z0-9_-]+|\*|#))*$"
)]
#[allow(dead_code, reason = "describes patterns in the document; they are parsed by topic::Pattern")]
pub(crate) struct PatternText(String);

/// The header `traceparent`.
pub(crate) struct Traced;

impl IntoParams for Traced {
    fn into_params(_: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        vec![header_parameter(
            "traceparent",
            "W3C trace context; carried along with the messages when it is well-formed.",
        )]
    }
}

fn header_parameter(name: &str, description: &str) -> Parameter {
    ParameterBuilder::new()
        .name(name)
        .parameter_in(ParameterIn::Header)
        .required(Required::False)
        .description(Some(description))
        .schema(Some(ObjectBuilder::new().schema_type(Type::String)))
        .build()
}

/// Declares groups of problems that calls have in common.
macro_rules! problems {
    ($($(#[$doc:meta])* $name:ident: $($code:ident)+;)*) => { $(
        $(#[$doc])*
        pub(crate) struct $name;

        impl IntoResponses for $name {
            fn responses() -> BTreeMap<String, RefOr<Response>> {
                problem_responses(&[$(Code::$code),+])
            }
        }
    )* };
}

problems! {
    /// Of every call that a client makes.
    ClientProblems: Unauthorized Forbidden RateLimited Internal;
    /// Of every call that the admin makes.
    AdminProblems: Unauthorized Forbidden RateLimited Internal;
    /// Of calls with a body.
    BodyProblems: InvalidJson TooLarge UnsupportedMediaType Invalid;
    /// Of calls with parameters only.
    InvalidProblem: Invalid;
    /// Of calls on one client.
    NotFoundProblem: NotFound;
    /// While the id is taken.
    ExistsProblem: ClientExists;
    /// While a webhook is set.
    PulledProblem: WebhookConfigured;
    /// Of calls that need the broker.
    UnavailableProblems: BrokerUnavailable ShuttingDown;
    /// Of calls that write.
    StorageProblem: DiskFull;
}

fn problem_responses(codes: &[Code]) -> BTreeMap<String, RefOr<Response>> {
    let mut by_status: BTreeMap<u16, Vec<Code>> = BTreeMap::new();
    for code in codes {
        by_status.entry(code.status().as_u16()).or_default().push(*code);
    }
    by_status
        .into_iter()
        .map(|(status, codes)| (status.to_string(), RefOr::T(problem_response(status, &codes))))
        .collect()
}

fn problem_response(status: u16, codes: &[Code]) -> Response {
    let names: Vec<_> = codes.iter().map(|code| format!("`{}`", code.as_str())).collect();
    let code = ObjectBuilder::new().schema_type(Type::String).enum_values(Some(codes.iter().map(|code| code.as_str())));
    let narrowed = ObjectBuilder::new().property("code", code);
    let schema = AllOfBuilder::new().item(Ref::from_schema_name("Problem")).item(narrowed);
    let content = ContentBuilder::new().schema(Some(schema)).build();
    let mut response = ResponseBuilder::new()
        .description(format!("Problem with code {}", names.join(" or ")))
        .content("application/problem+json", content);
    if status == 401 {
        response = response.header("www-authenticate", text_header("How to say who calls (RFC 9110)."));
    }
    if status == 405 {
        response = response.header("allow", text_header("The methods that the path has (RFC 9110)."));
    }
    if matches!(status, 429 | 503) {
        response = response.header("retry-after", seconds_header("Seconds to wait before trying again."));
    }
    response.build()
}

fn text_header(description: &str) -> Header {
    HeaderBuilder::new()
        .schema(Some(ObjectBuilder::new().schema_type(Type::String)))
        .description(Some(description))
        .build()
}

fn seconds_header(description: &str) -> Header {
    let seconds = ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(1));
    HeaderBuilder::new().schema(Some(seconds)).description(Some(description)).build()
}

/// What is the same everywhere: request ids, and how to say who calls.
struct Everywhere;

impl Modify for Everywhere {
    fn modify(&self, document: &mut OpenApi) {
        for item in document.paths.paths.values_mut() {
            let operations = [&mut item.get, &mut item.post, &mut item.patch, &mut item.delete];
            for operation in operations.into_iter().flatten() {
                with_request_id(operation);
            }
        }
        let bearer = |format: &str, description: &str| {
            let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format(format);
            SecurityScheme::Http(scheme.description(Some(description)).build())
        };
        let query = |name: &str| {
            let description = "Deprecated; can be switched off (SOAR_QUERY_AUTH).";
            SecurityScheme::ApiKey(ApiKey::Query(ApiKeyValue::with_description(name, description)))
        };
        let basic = HttpBuilder::new().scheme(HttpAuthScheme::Basic).description(Some("Client id and secret.")).build();
        let components = document.components.get_or_insert_default();
        for (name, scheme) in [
            ("admin", bearer("token", "The admin token.")),
            ("token", bearer("PASETO v4.local", "A client's token, from `POST /token`.")),
            ("basic", SecurityScheme::Http(basic)),
            ("query_id", query("client_id")),
            ("query_secret", query("secret")),
        ] {
            components.add_security_scheme(name, scheme);
        }
        // Of no operation, because it is of what is none.
        let code = Code::MethodNotAllowed;
        let refused = problem_response(code.status().as_u16(), &[code]);
        components.responses.insert("MethodNotAllowed".into(), refused.into());
    }
}

fn with_request_id(operation: &mut Operation) {
    let parameter = header_parameter("x-request-id", "The caller's own id for this request; one is made without it.");
    operation.parameters.get_or_insert_default().push(parameter.into());
    for response in operation.responses.responses.values_mut() {
        if let RefOr::T(response) = response {
            let header = text_header("Names this request in the log; the caller's own, when it sent a harmless one.");
            response.headers.insert("x-request-id".into(), header.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use actix_web::http::Method;
    use serde_json::Value;

    use super::*;

    fn shown() -> Value {
        serde_json::to_value(document()).expect("the document is JSON")
    }

    #[test]
    fn the_document_and_the_routes_name_the_same_calls() {
        let served: BTreeSet<(String, String)> = crate::http::routes()
            .iter()
            .flat_map(|at| at.operations())
            .filter(|(method, _)| *method != Method::HEAD)
            .map(|(method, path)| (method.as_str().to_lowercase(), path.to_owned()))
            .collect();
        let mut documented = BTreeSet::new();
        for (path, item) in shown()["paths"].as_object().expect("paths") {
            for method in item.as_object().expect("operations").keys() {
                documented.insert((method.clone(), path.clone()));
            }
        }
        assert_eq!(served, documented);
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_answer_has_a_request_id() {
        let document = shown();
        let mut references = Vec::new();
        collect(&document, &mut references);
        assert!(references.len() > 20, "{}", references.len());
        for reference in references {
            let pointer = reference.strip_prefix('#').expect("references are local");
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
        for (path, item) in document["paths"].as_object().expect("paths") {
            for (method, operation) in item.as_object().expect("operations") {
                for (status, response) in operation["responses"].as_object().expect("responses") {
                    assert!(response["headers"]["x-request-id"].is_object(), "{method} {path} {status}");
                }
            }
        }
    }

    #[test]
    fn operations_have_names_of_their_own() {
        let mut seen = BTreeSet::new();
        for (path, item) in shown()["paths"].as_object().expect("paths") {
            for (method, operation) in item.as_object().expect("operations") {
                let name = operation["operationId"].as_str().expect("a name").to_owned();
                assert!(seen.insert(name), "{method} {path}");
            }
        }
    }

    #[test]
    fn every_refusal_has_its_code_and_the_headers_that_go_with_it() {
        let document = shown();
        let mut problems = Vec::new();
        for (path, item) in document["paths"].as_object().expect("paths") {
            for (method, operation) in item.as_object().expect("operations") {
                for (status, response) in operation["responses"].as_object().expect("responses") {
                    problems.push((format!("{method} {path} {status}"), status.clone(), response));
                }
            }
        }
        let refused = &document["components"]["responses"]["MethodNotAllowed"];
        problems.push(("elsewhere".into(), "405".into(), refused));
        let mut named = BTreeSet::new();
        for (at, status, response) in problems.into_iter().filter(|(_, status, _)| status.as_str() >= "400") {
            let schema = &response["content"]["application/problem+json"]["schema"]["allOf"];
            assert_eq!(schema[0]["$ref"], "#/components/schemas/Problem", "{at}");
            let codes = schema[1]["properties"]["code"]["enum"].as_array().unwrap_or_else(|| panic!("{at}: no codes"));
            named.extend(codes.iter().map(|code| code.as_str().expect("a code").to_owned()));
            let header = match status.as_str() {
                "401" => "www-authenticate",
                "405" => "allow",
                "429" | "503" => "retry-after",
                _ => continue,
            };
            assert!(response["headers"][header].is_object(), "{at}: {header}");
        }
        assert_eq!(named.len(), 15, "{named:?}");
    }

    #[test]
    fn it_is_openapi_3_1_and_names_every_code() {
        let document = shown();
        assert!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.1")));
        let codes = &document["components"]["schemas"]["ProblemCode"]["enum"];
        assert_eq!(codes.as_array().map(Vec::len), Some(15), "{codes}");
    }

    fn collect(value: &Value, into: &mut Vec<String>) {
        match value {
            Value::Object(object) => {
                for (name, value) in object {
                    match value {
                        Value::String(reference) if name == "$ref" => into.push(reference.clone()),
                        _ => collect(value, into),
                    }
                }
            }
            Value::Array(values) => values.iter().for_each(|value| collect(value, into)),
            _ => {}
        }
    }
}
