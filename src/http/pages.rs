//! What a browser is shown: the operators' console at `/`, the API's page at `/docs`, and their files, all inside the
//! binary. Nothing comes from another origin, and nothing is inline: the policy forbids both.

use actix_web::HttpResponse;
use actix_web::http::header::{ETAG, IF_NONE_MATCH};

use super::error::Problem;
use super::route::{Answer, Call};

/// What pages may load and do: their own files and calls of this origin (Content Security Policy, level 3). Trusted
/// types make the browser refuse to parse text as HTML in scripts.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// A file of a page.
struct Asset {
    name: &'static str,
    media: &'static str,
    body: &'static str,
}

macro_rules! assets {
    ($($media:ident $directory:literal: $($name:literal)+;)*) => {
        &[$($(Asset { name: $name, media: $media, body: include_str!(concat!($directory, "/", $name)) }),+),*]
    };
}

const CONSOLE_INDEX: Asset = Asset { name: "index.html", media: HTML, body: include_str!("console/assets/index.html") };
const DOCS_INDEX: Asset = Asset { name: "docs.html", media: HTML, body: include_str!("console/assets/docs.html") };

const ASSETS: &[Asset] = assets! {
    CSS "console/assets": "console.css" "docs.css";
    SVG "console/assets": "icon.svg";
    SCRIPT "console/assets": "api.js" "client.js" "clients.js" "docs.js" "dom.js" "flow.js" "main.js" "message.js"
        "overview.js" "plots.js" "secrets.js" "tail.js";
};

/// The operators' console.
///
/// A page for people. It asks for the admin token and keeps it for the browser tab only.
#[utoipa::path(
    get, path = "/", tag = "pages",
    responses((status = 200, description = "The page", body = String, content_type = "text/html; charset=utf-8")),
    security(()),
)]
pub(crate) async fn console(call: Call) -> Answer {
    Ok(answer(&call, &CONSOLE_INDEX))
}

/// This API for people, with calls to try.
#[utoipa::path(
    get, path = "/docs", tag = "pages",
    responses((status = 200, description = "The page", body = String, content_type = "text/html; charset=utf-8")),
    security(()),
)]
pub(crate) async fn docs(call: Call) -> Answer {
    Ok(answer(&call, &DOCS_INDEX))
}

/// A file of these pages.
#[utoipa::path(
    get, path = "/console/{file}", operation_id = "page_file", tag = "pages",
    params(("file" = String, Path, description = "As the pages name it", example = "console.css")),
    responses(
        (status = 200, description = "The file", content(
            (String = "text/javascript; charset=utf-8"), (String = "text/css; charset=utf-8"), (String = "image/svg+xml"),
        )),
        super::openapi::NotFoundProblem,
    ),
    security(()),
)]
pub(crate) async fn asset(call: Call) -> Answer {
    let name = call.path("file");
    match ASSETS.iter().find(|asset| asset.name == name) {
        Some(asset) => Ok(answer(&call, asset)),
        None => Err(Problem::not_found("there is no such file")),
    }
}

fn answer(call: &Call, asset: &Asset) -> HttpResponse {
    // Files change with the program only, and its versions may share a number while they are made: so by content.
    let tag = format!("\"{:016x}\"", fnv1a(asset.body.as_bytes()));
    let known = call.request.headers().get(IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes());
    let mut answer = if known { HttpResponse::NotModified() } else { HttpResponse::Ok() };
    answer
        .insert_header((ETAG, tag))
        .insert_header(("cache-control", "no-cache"))
        .insert_header(("content-security-policy", POLICY))
        .insert_header(("cross-origin-opener-policy", "same-origin"))
        .insert_header(("cross-origin-resource-policy", "same-origin"))
        .insert_header(("permissions-policy", "camera=(), geolocation=(), microphone=()"))
        .insert_header(("referrer-policy", "no-referrer"))
        .insert_header(("x-content-type-options", "nosniff"))
        .insert_header(("x-frame-options", "DENY"));
    if known { answer.finish() } else { answer.content_type(asset.media).body(asset.body) }
}

/// FNV-1a, 64 bits (RFC 9923): tells versions of a file apart.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_name_only_files_that_are_there_and_no_other_origin() {
        let is_there = |name: &str| ASSETS.iter().any(|asset| asset.name == name);
        for page in [&CONSOLE_INDEX, &DOCS_INDEX].into_iter().chain(ASSETS) {
            for quoted in page.body.split(['"', '\'', '`']) {
                if let Some(name) = quoted.strip_prefix("/console/").filter(|name| !name.starts_with("feed")) {
                    assert!(is_there(name), "{} names {quoted}", page.name);
                }
                if let Some(name) = quoted.strip_prefix("./").filter(|_| page.media == SCRIPT) {
                    assert!(is_there(name), "{} imports {quoted}", page.name);
                }
                // A scheme alone names no origin: it is what a field for an endpoint shows while it is empty.
                let foreign = quoted != "https://" && (quoted.starts_with("http:") || quoted.starts_with("https:/"));
                assert!(!foreign || quoted == "http://www.w3.org/2000/svg", "{}: {quoted}", page.name);
            }
        }
    }

    #[test]
    fn pages_hold_nothing_inline() {
        for page in [&CONSOLE_INDEX, &DOCS_INDEX] {
            assert!(!page.body.contains("<style") && !page.body.contains(" style="), "{}", page.name);
            assert!(!page.body.contains(" onclick=") && !page.body.contains("javascript:"), "{}", page.name);
            for script in page.body.split("<script").skip(1) {
                assert!(script.contains("src=") && script.contains("></script>"), "{}: {script}", page.name);
            }
        }
        for script in ASSETS.iter().filter(|asset| asset.media == SCRIPT) {
            for sink in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
                assert!(!script.body.contains(sink), "{} uses {sink}", script.name);
            }
        }
    }
}
