//! The operators' console in a real browser: everything that an operator does with it, once, with a picture of it kept.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::Signal;
use serde_json::json;

use crate::support::console::{Console, Traffic};
use crate::support::endpoint::{FakeEndpoint, Reply};
use crate::support::fixture::{BrokerKind, Fixture};
use crate::support::process::signal;

/// Cells of the row of the client in the table of clients.
fn cells(client: &str) -> String {
    format!("[...document.querySelectorAll('tr[data-id={client}] td')].map((cell) => cell.textContent)")
}

#[actix_rt::test]
async fn the_admin_token_opens_the_console_and_a_wrong_one_says_so() {
    let mut console = Console::closed(BrokerKind::Embedded, "sign-in").await;
    let browser = &mut console.browser;
    browser.sees("h1", "Backbone console").await;
    browser.screenshot("asks").await;
    browser.fill("#token", "not-the-token").await;
    browser.press_button("Sign in").await;
    browser.sees("[role=alert]", "not the admin token").await;
    browser.screenshot("refused").await;
    browser.expect_complaints(&["401"]).await;

    console.sign_in().await;
    let browser = &mut console.browser;
    browser.sees("h1", "Overview").await;
    // Kept for the tab: across a reload, and nowhere else.
    browser.reload().await;
    browser.sees("h1", "Overview").await;
    let kept = browser.eval("return [Object.values({...sessionStorage}), {...localStorage}, document.cookie]").await;
    assert_eq!(kept, json!([[console.app.admin_token()], {}, ""]));

    browser.press_button("Sign out").await;
    browser.sees("h1", "Backbone console").await;
    assert_eq!(browser.eval("return sessionStorage.length").await, 0);
    console.finish().await;
}

#[actix_rt::test]
async fn the_flow_and_the_plots_move_with_the_traffic_and_a_jam_is_seen_where_it_is() {
    let mut console = Console::open(BrokerKind::Embedded, "overview").await;
    console.browser.sees("main a", "No clients yet").await;
    console.browser.screenshot("empty").await;
    let sender = console.app.onboard("noc-c2", &[]).await;
    let receiver = console.app.onboard("glider-ops", &["soar.noc.#"]).await;
    let traffic = Traffic::between(&sender, "soar.noc.slocum", &[&receiver]);
    let browser = &mut console.browser;

    // Every edge on the way of a topic has its rate.
    let moving = "return document.querySelectorAll('.flow .rate:not(.idle)').length >= 6";
    browser.until("the way of the messages moves", moving).await;
    browser.until("a median is measured", "return /ms/.test(document.querySelector('.figures').textContent)").await;
    // A sample comes every five seconds; two make a line.
    let plotted =
        "return [...document.querySelectorAll('.plot .s1')].every((path) => path.getAttribute('d').includes('L'))";
    browser.until("the plots have lines", plotted).await;
    browser.screenshot("flowing").await;

    // A client that is paused: what it sends stays in its outbox.
    console.app.patch("noc-c2", json!({"paused": true})).await;
    let browser = &mut console.browser;
    let jam = "return document.querySelector('.flow .jam')?.textContent.includes('outboxes')";
    browser.until("the outboxes are marked", jam).await;
    browser.sees("a .pill.warn", "outboxes").await;
    browser.screenshot("jam").await;
    // From the jam to the client that has it.
    browser.click("//a[contains(., 'outboxes')]").await;
    browser
        .until("its client stands first", "return document.querySelector('tbody tr')?.dataset.id === 'noc-c2'")
        .await;
    browser.sees("tr[data-id=noc-c2]", "paused").await;
    drop(traffic);
    console.app.patch("noc-c2", json!({"paused": false})).await;
    console.finish().await;
}

#[actix_rt::test]
async fn clients_are_listed_with_states_depths_and_rates_live() {
    let mut console = Console::open(BrokerKind::Embedded, "clients").await;
    console.browser.click("//a[.='Clients']").await;
    console.browser.sees("td", "No clients yet").await;
    console.browser.screenshot("empty").await;
    let sender = console.app.onboard("noc-c2", &[]).await;
    let reader = console.app.onboard("reader", &["soar.#"]).await;
    let _piling = console.app.onboard("piling-up", &["soar.#"]).await;
    let off = json!({"client_id": "off", "webhook": {"url": "http://127.0.0.1:9/", "enabled": false}});
    console.app.onboard_with(off).await;
    console.app.onboard("on-leave", &[]).await;
    console.app.patch("on-leave", json!({"paused": true, "name": "On leave until Monday"})).await;
    let traffic = Traffic::between(&sender, "soar.x", &[&reader]);
    let browser = &mut console.browser;
    // Pushed: nothing was reloaded or clicked since the list was empty.
    let live = format!(
        "const sent = {}; const piled = {}; return Number(sent[5]) > 0 && Number(piled[2]) > 0 && Number({}[6]) > 0",
        cells("noc-c2"),
        cells("piling-up"),
        cells("reader")
    );
    browser.until("rates and depths are shown", &live).await;
    browser.sees("tr[data-id=on-leave]", "paused").await;
    browser.sees("tr[data-id=on-leave]", "On leave until Monday").await;
    browser.sees("tr[data-id=off]", "webhook off").await;
    browser.screenshot("live").await;

    // The fullest inbox first, then the emptiest.
    browser.press_button("Inbox").await;
    browser.until("sorted", "return document.querySelector('tbody tr').dataset.id === 'piling-up'").await;
    browser.sees("th[aria-sort=descending]", "Inbox").await;
    browser.press_button("Inbox ↓").await;
    browser
        .until("the other way", "return [...document.querySelectorAll('tbody tr')].at(-1).dataset.id === 'piling-up'")
        .await;
    browser.fill("#search", "leave").await;
    browser.until("found by its name", "return document.querySelectorAll('tbody tr').length === 1").await;
    browser.sees("tr", "on-leave").await;
    browser.sees(".pager", "1–1 of 1 (5 in all)").await;
    browser.fill("#search", "nobody").await;
    browser.sees("td", "No client matches").await;
    drop(traffic);
    console.finish().await;
}

#[actix_rt::test]
async fn a_client_is_onboarded_its_secret_is_shown_once_and_rotated() {
    let mut console = Console::open(BrokerKind::Embedded, "onboarding").await;
    let browser = &mut console.browser;
    browser.click("//a[.='Clients']").await;
    browser.press_button("Onboard a client").await;
    browser.sees("dialog h1", "Onboard a client").await;
    // What is wrong is named where it was typed.
    browser.fill("dialog [name=client_id]", "glider-ops").await;
    browser.fill("dialog textarea", "soar.noc.#\nsoar..x").await;
    browser.press_button("Onboard").await;
    browser.sees("dialog [role=alert]", "/subscriptions/1").await;
    browser.screenshot("refused").await;
    browser.expect_complaints(&["422"]).await;
    browser.fill("dialog textarea", "soar.noc.#\nsoar.ship.position").await;
    browser.fill("dialog [name=name]", "Glider operations").await;
    browser.fill("dialog [name=url]", "http://127.0.0.1:9/hook").await;
    browser.press_button("Onboard").await;
    browser.sees("dialog h1", "glider-ops is on the backbone").await;
    let secret = browser.text("dialog .once code").await;
    browser.screenshot("secret").await;
    browser.press_button("Done").await;
    browser.sees("h1", "glider-ops").await;
    browser.sees(".facts", "soar.ship.position").await;
    let left = browser.eval("return document.documentElement.outerHTML + JSON.stringify({...sessionStorage})").await;
    assert!(!left.as_str().expect("text").contains(&secret), "the secret stays in the page");
    console.app.note_secret(&secret);
    assert_eq!(authorized(&console, &secret).await, 200);

    // Rotated, and the one before no longer valid.
    let browser = &mut console.browser;
    browser.press_button("Rotate secret").await;
    browser.sees("dialog h1", "Rotate the secret of glider-ops").await;
    browser.click("dialog option[value='0']").await;
    browser.screenshot("rotate").await;
    browser.press_button("Rotate").await;
    browser.sees("dialog h1", "New secret of glider-ops").await;
    let second = browser.text("dialog .once code").await;
    browser.screenshot("rotated").await;
    browser.press_button("Done").await;
    assert_ne!(secret, second);
    console.app.note_secret(&second);
    assert_eq!((authorized(&console, &secret).await, authorized(&console, &second).await), (401, 200));

    let browser = &mut console.browser;
    browser.press_button("Rotate its secret").await;
    browser.sees("dialog h1", "webhook secret").await;
    browser.press_button("Rotate").await;
    browser
        .until(
            "a webhook secret",
            "return document.querySelector('dialog .once code')?.textContent.startsWith('whsec_')",
        )
        .await;
    browser.press_button("Done").await;

    browser.press_button("Delete").await;
    browser.sees("dialog", "Its inbox and its dead letters are deleted with it").await;
    browser.screenshot("delete").await;
    browser.click("dialog button.risk").await;
    browser.sees("td", "No clients yet").await;
    assert!(console.app.client_ids().await.is_empty());
    console.finish().await;
}

/// The status of a call as `glider-ops` with this secret.
async fn authorized(console: &Console, secret: &str) -> u16 {
    console.app.api.get("/clients/glider-ops").basic("glider-ops", secret).send().await.status
}

#[actix_rt::test]
async fn a_client_s_page_shows_its_webhook_its_attempts_and_its_dead_letters_which_are_replayed() {
    let healthy = Arc::new(AtomicBool::new(false));
    let mended = Arc::clone(&healthy);
    let endpoint = FakeEndpoint::start(move |_, _| {
        if mended.load(Ordering::SeqCst) {
            return Reply::Status(204);
        }
        Reply::Full { status: 500, headers: vec![], body: b"database is down".to_vec() }
    });
    let mut console = Console::open(BrokerKind::Embedded, "client").await;
    let sender = console.app.onboard("noc-c2", &[]).await;
    let webhook = json!({"url": endpoint.url(), "retry_schedule_s": [0]});
    let body = json!({"client_id": "glider-ops", "name": "Glider operations", "subscriptions": ["soar.noc.#", "soar.*.position"],
        "webhook": webhook, "limits": {"send_per_s": 50, "max_inbox_messages": 1000}});
    let receiver = console.app.onboard_with(body).await;
    for n in 0..3 {
        sender.send("soar.noc.slocum", json!({ "n": n })).await;
    }
    receiver.dead_letters(3).await;
    let browser = &mut console.browser;
    browser.open("/#/client/glider-ops").await;
    browser.sees("h1", "glider-ops").await;
    for text in ["soar.*.position", "50 messages a second", "forwarder running", "pusher running"] {
        browser.sees(".facts", text).await;
    }
    browser.sees("#attempts td", "500").await;
    browser.sees("#attempts td", "database is down").await;
    browser.sees("#dead-letters td", "delivery failed").await;
    browser.sees("#dead-letters td", "soar.noc.slocum").await;
    browser.screenshot("dead-letters").await;

    // One is replayed by its box, then the others.
    healthy.store(true, Ordering::SeqCst);
    let before = endpoint.count();
    browser.click("#dead-letters tbody input").await;
    browser.press_button("Replay chosen").await;
    browser.sees("#toasts", "1 message put back").await;
    endpoint.wait_for(before + 1).await;
    browser.until("two are left", "return document.querySelectorAll('#dead-letters tbody input').length === 2").await;
    browser.press_button("Replay all").await;
    browser.sees("#toasts", "2 messages put back").await;
    endpoint.wait_for(before + 3).await;
    browser.sees("#dead-letters td", "None.").await;
    browser.sees("#attempts td", "204").await;
    browser.screenshot("replayed").await;

    browser.press_button("Send a test").await;
    browser.sees("#toasts", "answered 204").await;
    // From an attempt to the way of its message.
    browser.click("#attempts tbody tr:nth-child(2) a").await;
    browser.sees(".way", "received").await;
    browser.sees(".way", "because of soar.noc.#").await;
    browser.screenshot("way").await;
    console.finish().await;
}

#[actix_rt::test]
async fn a_webhook_that_only_fails_is_seen_on_its_client_and_in_the_flow() {
    let endpoint = FakeEndpoint::start(|_, _| Reply::Status(503));
    let mut console = Console::open(BrokerKind::Embedded, "breaker").await;
    let sender = console.app.onboard("noc-c2", &[]).await;
    let webhook = json!({"url": endpoint.url(), "retry_schedule_s": [1, 1, 1, 1]});
    console.app.onboard_with(json!({"client_id": "glider-ops", "subscriptions": ["soar.#"], "webhook": webhook})).await;
    let batch: Vec<_> = (0..300).map(|n| json!({"topic": "soar.x", "message": n})).collect();
    sender.send_all(json!(batch)).await;
    let browser = &mut console.browser;
    browser.open("/#/client/glider-ops").await;
    browser.sees("#webhook .pill.warn", "breaker open").await;
    browser.screenshot("client").await;
    browser.click("//a[.='Clients']").await;
    browser.sees("tr[data-id=glider-ops] .pill", "breaker open").await;
    browser.click("//a[.='Overview']").await;
    let jam = "return document.querySelector('.flow .jam')?.textContent.includes('inboxes')";
    browser.until("the inboxes are marked", jam).await;
    browser.screenshot("overview").await;
    console.app.delete("glider-ops").await;
    console.finish().await;
}

#[actix_rt::test]
async fn a_message_is_found_by_its_id_and_its_way_is_shown() {
    let mut console = Console::open(BrokerKind::Embedded, "message").await;
    let sender = console.app.onboard("noc-c2", &[]).await;
    let receiver = console.app.onboard("glider-ops", &["soar.noc.#"]).await;
    console.app.onboard("ship-ops", &["soar.*.slocum"]).await;
    let id = sender.send("soar.noc.slocum", json!({"depth_m": 120.5})).await;
    receiver.receive_exactly(1, "").await;
    let lost = sender.send("nobody.listens", json!(1)).await;
    let browser = &mut console.browser;
    browser.click("//a[.='Find a message']").await;
    browser.sees("main", "The most recent messages are remembered").await;
    browser.type_text(&id).await;
    browser.press_button("Find").await;
    for text in ["accepted", "in an inbox", "because of soar.noc.#", "because of soar.*.slocum", "received"] {
        browser.sees(".way", text).await;
    }
    browser.sees(".facts", "2, of which 1 received it").await;
    browser.screenshot("way").await;
    browser.fill("#message-id", &lost).await;
    browser.press_button("Find").await;
    browser.sees(".way", "nobody subscribed").await;
    browser.fill("#message-id", "no-such-id").await;
    browser.press_button("Find").await;
    browser.sees("main [role=alert]", "no message with this id is remembered").await;
    browser.screenshot("unknown").await;
    browser.expect_complaints(&["404"]).await;
    console.finish().await;
}

#[actix_rt::test]
async fn messages_are_watched_by_pattern_as_they_pass() {
    let mut console = Console::open(BrokerKind::Embedded, "tail").await;
    let sender = console.app.onboard("noc-c2", &[]).await;
    let browser = &mut console.browser;
    browser.click("//a[.='Live tail']").await;
    browser.sees("main", "Waiting for messages").await;
    browser.screenshot("waiting").await;
    browser.fill("#pattern", "soar.noc.*").await;
    browser.press_button("Watch").await;
    browser.until("it is watched", "return location.hash.endsWith(encodeURIComponent('soar.noc.*'))").await;
    browser.sees("main", "Waiting for messages").await;
    // Whether the watch has begun is not shown: so until it has.
    let shown = crate::support::eventually("a message is seen", crate::support::wait::SOON, async || {
        sender.send("soar.noc.slocum", json!({"depth_m": 120.5})).await;
        sender.send("soar.ship.position", json!("not watched")).await;
        let rows = browser.eval("return document.querySelectorAll('.tail tbody tr td.preview').length").await;
        rows.as_u64().filter(|rows| *rows > 2)
    });
    shown.await;
    browser.sees(".tail td", "soar.noc.slocum").await;
    browser.sees(".tail td", r#"{"depth_m":120.5}"#).await;
    assert!(!browser.text(".tail").await.contains("soar.ship.position"), "only what the pattern matches");
    browser.screenshot("watching").await;
    browser.press_button("Pause").await;
    browser.sees("button", "Go on").await;
    browser.fill("#pattern", "soar..x").await;
    browser.press_button("Watch").await;
    browser.sees("#notice", "empty word").await;
    browser.screenshot("wrong-pattern").await;
    browser.expect_complaints(&["422"]).await;
    console.finish().await;
}

#[actix_rt::test]
async fn a_router_that_stops_is_told_and_come_back_to() {
    let mut console = Console::open(BrokerKind::Embedded, "lost").await;
    console.app.router.kill();
    let browser = &mut console.browser;
    browser.sees("#notice[role=alert]", "connection to the router is lost").await;
    browser.sees("[role=status] .pill.bad", "no connection").await;
    browser.screenshot("notice").await;
    console.app.router.restart().await;
    back(&mut console).await;
    console.browser.forgive_complaints("net::ERR").await;

    // One that hangs, or whose machine is gone, closes no connection: its silence is noticed.
    signal(console.app.router.pid(), Signal::STOP);
    console.browser.sees("#notice[role=alert]", "connection to the router is lost").await;
    signal(console.app.router.pid(), Signal::CONT);
    back(&mut console).await;
    console.finish().await;
}

async fn back(console: &mut Console) {
    let browser = &mut console.browser;
    browser.until("it is back by itself", "return document.querySelector('#notice').hidden").await;
    browser.sees("[role=status] .pill", "ready").await;
}
