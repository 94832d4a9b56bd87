//! What of a webhook's settings makes no sense (contract, section 5): checked when they are set, so that a mistake is a
//! 422 that names the field, and not a week of failed attempts.
//!
//! Whether an address may be dialled is not decided here but when connecting ([`super::address`]): an answer given
//! today says nothing about what a name resolves to tomorrow.

use std::collections::HashSet;

use ipnet::IpNet;
use reqwest::Url;
use reqwest::header::{HeaderName, HeaderValue};

use super::address::{self, Guard};
use crate::client::Webhook;

/// Longest URL in bytes.
const URL_BYTES_MAX: usize = 2048;
/// Most headers of the client's own.
const HEADERS_MAX: usize = 32;
/// Longest header value in bytes.
const HEADER_VALUE_BYTES_MAX: usize = 4096;
/// Bounds of `timeout_s`, in seconds.
const TIMEOUT_S: std::ops::RangeInclusive<u32> = 1..=60;
/// Bounds of `concurrency`.
const CONCURRENCY: std::ops::RangeInclusive<u32> = 1..=256;
/// Bounds of `rate_limit_per_s`.
const RATE_PER_S: std::ops::RangeInclusive<u32> = 1..=100_000;
/// Most retries.
const RETRIES_MAX: usize = 30;
/// Longest wait before one retry: 14 days, well inside what a broker can delay with jitter added.
pub(super) const RETRY_S_MAX: u32 = 14 * 86_400;

/// Ports that no web server listens on, because browsers do not go there: the Fetch standard's "bad ports"
/// (<https://fetch.spec.whatwg.org/#port-blocking>). A POST to a mail or IRC server is an attack, not a delivery.
const BAD_PORTS: [u16; 83] = [
    0, 1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104, 109,
    110, 111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515, 526, 530, 531,
    532, 540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060,
    5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080,
];

/// Headers that the backbone sets itself, or that say how a message is framed and where it goes, hop by hop
/// (RFC 9110, section 7.6.1). `webhook-*` are reserved besides.
const RESERVED_HEADERS: [&str; 18] = [
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "host",
    "http2-settings",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "traceparent",
    "tracestate",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "via",
];

/// One mistake: a JSON pointer inside the webhook (`/url`), and what is wrong, in words.
pub type Mistake = (String, String);

/// Every mistake in a webhook's settings; none means that it can be set. `allow` is `SOAR_WEBHOOK_ALLOW`.
pub fn validate(webhook: &Webhook, allow: &[IpNet]) -> Vec<Mistake> {
    let mut mistakes = Vec::new();
    let mut wrong = |pointer: &str, detail: String| mistakes.push((pointer.to_owned(), detail));
    if let Err(detail) = check_url(&webhook.url, &Guard::new(allow)) {
        wrong("/url", detail);
    }
    if webhook.headers.len() > HEADERS_MAX {
        wrong("/headers", format!("must not have more than {HEADERS_MAX} members, has {}", webhook.headers.len()));
    } else {
        let mut seen = HashSet::new();
        for (name, value) in &webhook.headers {
            if let Err(detail) = check_header(name, value, &mut seen) {
                wrong(&format!("/headers/{}", escape_pointer(name)), detail);
            }
        }
    }
    let mut check_range = |pointer: &str, value: u32, range: &std::ops::RangeInclusive<u32>| {
        if !range.contains(&value) {
            wrong(pointer, format!("must be {} to {}, is {value}", range.start(), range.end()));
        }
    };
    check_range("/timeout_s", webhook.timeout_s, &TIMEOUT_S);
    check_range("/concurrency", webhook.concurrency, &CONCURRENCY);
    if let Some(rate) = webhook.rate_limit_per_s {
        check_range("/rate_limit_per_s", rate, &RATE_PER_S);
    }
    for (n, wait_s) in webhook.retry_schedule_s.iter().enumerate().take(RETRIES_MAX) {
        check_range(&format!("/retry_schedule_s/{n}"), *wait_s, &(0..=RETRY_S_MAX));
    }
    if webhook.retry_schedule_s.len() > RETRIES_MAX {
        let n = webhook.retry_schedule_s.len();
        wrong("/retry_schedule_s", format!("must not have more than {RETRIES_MAX} entries, has {n}"));
    }
    mistakes
}

fn check_url(text: &str, guard: &Guard) -> Result<(), String> {
    if text.len() > URL_BYTES_MAX {
        return Err(format!("must not be longer than {URL_BYTES_MAX} bytes, is {}", text.len()));
    }
    // The URL parser drops these silently; whoever wrote them meant something else.
    if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err("must not have spaces or control characters".into());
    }
    // So does an empty user name, as in `https://@host`.
    let authority = text.split_once("://").map_or("", |(_, rest)| rest);
    if authority.split(['/', '?', '#', '\\']).next().is_some_and(|authority| authority.contains('@')) {
        return Err("must not have a user name or password; send credentials in a header".into());
    }
    let url = Url::parse(text).map_err(|error| format!("is not an absolute URL: {error}"))?;
    if !matches!(url.scheme(), "https" | "http") {
        return Err(format!("must be an https URL, its scheme is {}", url.scheme()));
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err("must have a host".into());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("must not have a user name or password; send credentials in a header".into());
    }
    if url.fragment().is_some() {
        return Err("must not have a fragment; it would never be sent".into());
    }
    let literal = address::literal(&url);
    let is_http = url.scheme() == "http";
    // http to a name reaches listed addresses only, or nothing: that is judged when connecting.
    let is_listed = literal.map_or(is_http && guard.lists_any(), |literal| guard.lists(literal));
    if is_http && !is_listed {
        return Err("must be an https URL; http is for addresses in SOAR_WEBHOOK_ALLOW only".into());
    }
    match url.port() {
        Some(0) => Err("must not have the port 0".into()),
        // Where the operator let webhooks in, they may knock at any door.
        Some(port) if BAD_PORTS.binary_search(&port).is_ok() && !is_listed => {
            Err(format!("must not have the port {port}; no web server listens there"))
        }
        _ => Ok(()),
    }
}

fn check_header(name: &str, value: &str, seen: &mut HashSet<HeaderName>) -> Result<(), String> {
    let parsed = HeaderName::from_bytes(name.as_bytes())
        .map_err(|_| "is not a header name: letters, digits and !#$%&'*+-.^_`|~ only".to_owned())?;
    if RESERVED_HEADERS.contains(&parsed.as_str()) || parsed.as_str().starts_with("webhook-") {
        return Err("is set by the backbone itself, or governs the connection".into());
    }
    if !seen.insert(parsed) {
        return Err("is there twice: header names do not differ by case".into());
    }
    if value.len() > HEADER_VALUE_BYTES_MAX {
        return Err(format!("must not be longer than {HEADER_VALUE_BYTES_MAX} bytes, is {}", value.len()));
    }
    if !value.is_ascii() || HeaderValue::from_str(value).is_err() || value.trim() != value {
        return Err("must be visible ASCII, with spaces only inside".into());
    }
    Ok(())
}

/// A member's name as a reference token of a JSON pointer (RFC 6901, section 3).
fn escape_pointer(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn webhook(url: &str) -> Webhook {
        serde_json::from_value(serde_json::json!({ "url": url })).expect("defaults for the rest")
    }

    fn allow(nets: &[&str]) -> Vec<IpNet> {
        nets.iter().map(|net| net.parse().expect("a CIDR")).collect()
    }

    fn pointers(webhook: &Webhook) -> Vec<String> {
        validate(webhook, &[]).into_iter().map(|(pointer, _)| pointer).collect()
    }

    #[test]
    fn bad_ports_are_sorted_for_the_search() {
        assert!(BAD_PORTS.is_sorted());
    }

    #[test]
    fn https_urls_are_taken() {
        for good in [
            "https://example.com",
            "https://example.com:8443/hook?key=a%20b",
            "https://example.com/@name?who=a@b",
            "https://8.8.8.8/",
            "https://[2606:4700::1]:444/",
            "https://bücher.example/",
            // Refused when connecting, not before.
            "https://127.0.0.1/",
            "https://localhost/",
        ] {
            assert_eq!(pointers(&webhook(good)), [""; 0], "{good}");
        }
    }

    #[test]
    fn urls_that_make_no_sense_are_named() {
        for bad in [
            "",
            "example.com",
            "/hook",
            "https://",
            "https:///",
            "ftp://example.com/",
            "file:///etc/passwd",
            "gopher://example.com/",
            "https://user@example.com/",
            "https://user:password@example.com/",
            "https://@example.com/",
            "https://:@example.com/",
            "https://example.com/#part",
            "https://example.com:0/",
            "https://example.com:22/",
            "https://example.com:25/",
            "https://example.com:65536/",
            "https://example.com:x/",
            "https://exa mple.com/",
            "https://example.com/a b",
            "https://example.com/\n",
            " https://example.com/",
            "https://[fe80::1%25eth0]/",
            "https://1.2.3.4.5/",
            "http://example.com/",
            "http://127.0.0.1/",
            &format!("https://example.com/{}", "x".repeat(URL_BYTES_MAX)),
        ] {
            assert_eq!(pointers(&webhook(bad)), ["/url"], "{bad}");
        }
    }

    #[test]
    fn http_is_for_listed_literals_and_for_names_while_anything_is_listed() {
        let listed = allow(&["127.0.0.0/8", "::1/128"]);
        for (url, taken) in [
            ("http://127.0.0.1:9999/", true),
            ("http://0x7f.1/", true),
            ("http://[::1]/", true),
            ("http://[::ffff:127.0.0.1]/", true),
            ("http://hooks.example/", true),
            ("http://127.0.0.1:9/", true),
            ("http://127.0.0.1:0/", false),
            ("http://localhost:9/", true),
            ("https://8.8.8.8:25/", false),
            ("https://example.com:25/", false),
            ("http://10.0.0.1/", false),
            ("http://8.8.8.8/", false),
            ("http://[::2]/", false),
        ] {
            assert_eq!(validate(&webhook(url), &listed).is_empty(), taken, "{url}");
        }
    }

    #[test]
    fn headers_that_make_no_sense_are_named() {
        let mut webhook = webhook("https://example.com");
        for (name, value) in [
            ("authorization", "Bearer x y"),
            ("X-Tenant", ""),
            ("user-agent", "ours"),
            // From here on, each is a mistake.
            ("Host", "x"),
            ("Content-Length", "1"),
            ("Transfer-Encoding", "chunked"),
            ("connection", "close"),
            ("Webhook-Signature", "v1,x"),
            ("webhook-anything", "x"),
            ("a b", "x"),
            ("a:b", "x"),
            ("", "x"),
            ("ä", "x"),
            ("x-tenant", "twice"),
            ("x-break", "a\r\nb: c"),
            ("x-nul", "\0"),
            ("x-space", " a"),
            ("x-utf8", "ä"),
            ("x/~y", "x"),
            ("x-long", &"x".repeat(HEADER_VALUE_BYTES_MAX + 1)),
        ] {
            webhook.headers.insert(name.into(), value.into());
        }
        let mut wrong = pointers(&webhook);
        wrong.sort();
        let mut expected = vec![
            "/headers/",
            "/headers/Content-Length",
            "/headers/Host",
            "/headers/Transfer-Encoding",
            "/headers/Webhook-Signature",
            "/headers/a b",
            "/headers/a:b",
            "/headers/connection",
            "/headers/webhook-anything",
            "/headers/x-break",
            "/headers/x-long",
            "/headers/x-nul",
            "/headers/x-space",
            "/headers/x-tenant",
            "/headers/x-utf8",
            "/headers/x~1~0y",
            "/headers/ä",
        ];
        expected.sort_unstable();
        assert_eq!(wrong, expected);
    }

    #[test]
    fn every_number_out_of_bounds_is_named() {
        let mut webhook = webhook("https://example.com");
        (webhook.timeout_s, webhook.concurrency, webhook.rate_limit_per_s) = (0, 257, Some(0));
        webhook.retry_schedule_s = vec![5, RETRY_S_MAX + 1, 0];
        assert_eq!(pointers(&webhook), ["/timeout_s", "/concurrency", "/rate_limit_per_s", "/retry_schedule_s/1"]);
        webhook.retry_schedule_s = vec![1; RETRIES_MAX + 1];
        (webhook.timeout_s, webhook.concurrency, webhook.rate_limit_per_s) = (61, 0, None);
        assert_eq!(pointers(&webhook), ["/timeout_s", "/concurrency", "/retry_schedule_s"]);
    }
}
