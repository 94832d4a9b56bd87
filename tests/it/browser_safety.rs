//! What a hostile client, page or network could do to an operator through the console, and does not.

use serde_json::json;

use crate::support::console::Console;
use crate::support::endpoint::{FakeEndpoint, Reply};
use crate::support::fixture::{BrokerKind, Fixture};

/// Markup that would tell that it was parsed.
const MARKUP: &str = "<img src=x onerror='window.parsed=1'><script>window.parsed=1</script>";

#[actix_rt::test]
async fn what_clients_write_is_shown_as_text_wherever_it_is_shown() {
    let endpoint =
        FakeEndpoint::start(|_, _| Reply::Full { status: 500, headers: vec![], body: MARKUP.as_bytes().to_vec() });
    let mut console = Console::open(BrokerKind::Embedded, "hostile").await;
    let sender = console.app.onboard_with(json!({"client_id": "evil", "name": MARKUP})).await;
    let webhook = json!({"url": format!("{}?<b>", endpoint.url()), "retry_schedule_s": []});
    let body = json!({"client_id": "victim", "name": MARKUP, "subscriptions": ["x"], "webhook": webhook});
    let victim = console.app.onboard_with(body).await;
    let id = r#""><img/src=x/onerror=window['parsed']=1>"#;
    sender.send_all(json!({"topic": "x", "id": id, "message": MARKUP})).await;
    victim.dead_letters(1).await;
    let browser = &mut console.browser;
    browser.open("/#/clients").await;
    browser.sees("td", MARKUP).await;
    browser.open("/#/client/victim").await;
    browser.sees("main .head .sub", MARKUP).await;
    browser.sees("#dead-letters td", id).await;
    browser.click("#dead-letters summary").await;
    browser.sees("#dead-letters pre", MARKUP).await;
    browser.sees("#attempts td", MARKUP).await;
    browser.screenshot("client").await;
    browser.press_button("Change").await;
    browser
        .until(
            "the name is in its field",
            &format!("return document.querySelector('dialog input').value === {}", json!(MARKUP)),
        )
        .await;
    browser.press_button("Cancel").await;
    // Its way, by the link of the dead letter: the id has every character that an address must not have.
    browser.click("#dead-letters td a").await;
    browser.sees("main h2", id).await;
    browser.sees(".way", "attempt failed").await;
    browser.open("/#/tail?pattern=x").await;
    crate::support::eventually("the message is seen", crate::support::wait::SOON, async || {
        sender.send("x", json!({ "text": MARKUP })).await;
        let shown = browser.eval("return document.querySelector('.tail td.preview')?.textContent ?? ''").await;
        shown.as_str().is_some_and(|text| text.contains("<img src=x")).then_some(())
    })
    .await;
    // Addresses that somebody may have sent to an operator.
    for (hash, shows) in [
        ("#/client/%3Cimg%20src=x%20onerror=window.parsed=1%3E", "#notice"),
        ("#/message/%3Cscript%3Ewindow.parsed=1%3C%2Fscript%3E", "main [role=alert]"),
        ("#/client/%E0%A4%A", "#notice"),
        ("#/__proto__/x", "svg.flow"),
        ("#/constructor", "svg.flow"),
        ("#/clients?sort=%3Cb%3E&offset=-1", "tr[data-id=victim]"),
    ] {
        browser.open(&format!("/{hash}")).await;
        browser.sees(shows, "").await;
    }
    let parsed =
        browser.eval("return [window.parsed ?? null, document.querySelectorAll('main img, main script').length]").await;
    assert_eq!(parsed, json!([null, 0]));
    browser.expect_complaints(&["404", "422"]).await;
    console.finish().await;
}

#[actix_rt::test]
async fn pages_load_nothing_foreign_parse_nothing_and_are_framed_by_nobody() {
    let mut console = Console::open(BrokerKind::Embedded, "policy").await;
    for path in ["/", "/docs", "/console/main.js", "/console/console.css"] {
        let answer = console.app.api.get(path).header("origin", "https://elsewhere.example").send().await;
        assert_eq!(answer.status, 200, "{path}");
        let policy = answer.header("content-security-policy").expect("a policy");
        for rule in [
            "default-src 'none'",
            "script-src 'self'",
            "connect-src 'self'",
            "frame-ancestors 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        ] {
            assert!(policy.contains(rule), "{path}: {rule} is not in {policy}");
        }
        assert!(!policy.contains("unsafe"), "{policy}");
        assert_eq!(answer.header("referrer-policy"), Some("no-referrer"), "{path}");
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"), "{path}");
        assert_eq!(answer.header("x-frame-options"), Some("DENY"), "{path}");
        assert_eq!(answer.header("set-cookie"), None, "{path}");
    }
    // The policy is enforced, not only sent: text is not parsed as HTML, inline script does not run, nothing foreign loads.
    let browser = &mut console.browser;
    let sink = "try { document.createElement('div').innerHTML = '<b>x</b>'; return 'parsed' } catch (error) { return error.name }";
    assert_eq!(browser.eval(sink).await, "TypeError");
    browser.expect_complaints(&["TrustedHTML"]).await;
    let fetched = "return fetch('https://elsewhere.example/').then(() => 'sent', (error) => error.name)";
    assert_eq!(browser.eval(fetched).await, "TypeError");
    browser.expect_complaints(&["elsewhere.example"]).await;
    let frame = "const frame = document.createElement('iframe'); frame.src = '/'; document.body.append(frame); return new Promise((done) => setTimeout(() => { frame.remove(); done('asked') }, 200))";
    assert_eq!(browser.eval(frame).await, "asked");
    browser.expect_complaints(&["frame"]).await;
    console.finish().await;
}

/// A foreign page can make a browser send requests, but not with the token, which no browser adds by itself.
#[actix_rt::test]
async fn a_foreign_page_cannot_call_the_api_as_the_operator() {
    let console = Console::open(BrokerKind::Embedded, "csrf").await;
    let elsewhere = "https://elsewhere.example";
    let body = json!({"client_id": "made-elsewhere"});
    let call = console.app.api.post("/clients").header("origin", elsewhere).header("cookie", "backbone-admin-token=x");
    let answer = call.json(&body).send().await;
    answer.problem(401, "unauthorized");
    // What answers a preflight allows no origin and no header; so neither may a page set the header, nor read answers.
    let preflight = console.app.api.call(reqwest::Method::OPTIONS, "/clients").header("origin", elsewhere);
    let preflight = preflight.header("access-control-request-method", "POST");
    let preflight = preflight.header("access-control-request-headers", "authorization").send().await;
    let fine = console.app.admin(reqwest::Method::GET, "/clients").header("origin", elsewhere).send().await;
    assert_eq!(fine.status, 200);
    for answer in [&answer, &preflight, &fine] {
        assert!(!answer.headers.keys().any(|name| name.as_str().starts_with("access-control-")), "{answer:?}");
        assert_eq!(answer.header("set-cookie"), None, "{answer:?}");
    }
    assert!(console.app.client_ids().await.is_empty());
    console.finish().await;
}
