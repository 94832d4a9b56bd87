//! The console with ten thousand clients while messages flow. The bounds are generous, because a debug build on a busy
//! machine is slow; CONTRIBUTING says what a release build does.

use futures_util::StreamExt;
use futures_util::stream;
use reqwest::Method;
use serde_json::json;

use crate::support::browser::Browser;
use crate::support::console::{Console, Traffic};
use crate::support::fixture::{BrokerKind, Fixture};

const CLIENTS: usize = 10_000;

/// From the request to the first paint.
const PAINT_MS: f64 = 5000.0;

/// From a key or a click to what it asks for.
const INTERACTION_MS: f64 = 2000.0;

/// Milliseconds from `action` in the page until `done` is true when it is about to be painted.
async fn takes(browser: &mut Browser, action: &str, done: &str) -> f64 {
    let script = format!(
        "return new Promise((resolve) => {{
            const begun = performance.now();
            const look = () => (({done}) ? resolve(performance.now() - begun) : requestAnimationFrame(look));
            {action};
            look();
        }})"
    );
    browser.eval(&script).await.as_f64().expect("milliseconds")
}

#[actix_rt::test]
async fn heavy_ten_thousand_clients_are_sorted_searched_and_opened_at_once() {
    let mut console = Console::open(BrokerKind::Embedded, "scale").await;
    let sender = console.app.onboard("a-sender", &[]).await;
    let reader = console.app.onboard("a-reader", &["soar.noc.#"]).await;
    let app = &console.app;
    let made = stream::iter(2..CLIENTS).map(async |n| {
        let body = json!({"client_id": format!("unit-{n:05}"), "name": format!("Unit number {n}"), "subscriptions": [format!("soar.unit-{n}.#")]});
        app.admin(Method::POST, "/clients").json(&body).send().await.status
    });
    let made = made.buffer_unordered(32).all(async |status| status == 201).await;
    assert!(made, "every client is onboarded");
    let _traffic = Traffic::between(&sender, "soar.noc.slocum", &[&reader]);

    let browser = &mut console.browser;
    browser.open("/#/clients").await;
    browser.reload().await;
    browser.sees(".pager", "1–50 of 10,000").await;
    let painted = "return performance.getEntriesByName('first-contentful-paint')[0]?.startTime";
    let painted = browser.until("painted", painted).await.as_f64().expect("milliseconds");
    browser.screenshot("clients").await;

    let first = |id: &str| format!("document.querySelector('tbody tr')?.dataset.id === '{id}'");
    let header = |n: usize| format!("document.querySelectorAll('th button')[{n}].click()");
    let sorted = takes(browser, &header(0), &first("unit-09999")).await;
    let searching = "const field = document.querySelector('#search'); field.value = 'number 7777'; field.dispatchEvent(new Event('input'))";
    let searched = takes(browser, searching, &first("unit-07777")).await;
    browser.sees(".pager", "1–1 of 1 (10,000 in all)").await;
    browser.screenshot("searched").await;
    let opening = "document.querySelector('tbody a').click()";
    let opened =
        takes(browser, opening, "document.querySelector('.facts')?.textContent.includes('soar.unit-7777.#')").await;
    browser.open("/#/clients?sort=sent&desc=1").await;
    browser.until("the busiest stands first", &format!("return {}", first("a-sender"))).await;
    browser.open("/#/overview").await;
    browser.sees(".figures", "10.0 k").await;
    browser.screenshot("overview").await;

    println!("first paint {painted:.0} ms, sort {sorted:.0} ms, search {searched:.0} ms, open {opened:.0} ms");
    assert!(painted < PAINT_MS, "first paint after {painted:.0} ms");
    for (what, took) in [("sort", sorted), ("search", searched), ("open a client", opened)] {
        assert!(took < INTERACTION_MS, "{what} took {took:.0} ms");
    }
    console.finish().await;
}
