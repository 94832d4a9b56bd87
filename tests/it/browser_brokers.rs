//! The console shows and does the same on every broker; `browser` has everything in detail.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;

use crate::support::console::{Console, Traffic};
use crate::support::endpoint::{FakeEndpoint, Reply};
use crate::support::http::Client;

broker_tests! {
    async fn the_console_shows_and_does_what_it_is_for(console: &mut Console) {
        let healthy = Arc::new(AtomicBool::new(false));
        let mended = Arc::clone(&healthy);
        let endpoint = FakeEndpoint::start(move |_, _| Reply::Status(if mended.load(Ordering::SeqCst) { 204 } else { 500 }));
        // A client is onboarded, and its queues and actors are there.
        let browser = &mut console.browser;
        browser.open("/#/clients").await;
        browser.press_button("Onboard a client").await;
        browser.fill("dialog [name=client_id]", "glider-ops").await;
        browser.fill("dialog textarea", "soar.noc.#").await;
        browser.press_button("Onboard").await;
        browser.sees("dialog h1", "glider-ops is on the backbone").await;
        let secret = browser.text("dialog .once code").await;
        browser.press_button("Done").await;
        browser.sees(".facts", "subscriber running").await;
        console.app.note_secret(&secret);
        let reader = Client { api: console.app.api.clone(), id: "glider-ops".into(), secret };
        let sender = console.app.onboard("noc-c2", &[]).await;
        let webhook = json!({"url": endpoint.url(), "retry_schedule_s": []});
        let body = json!({"client_id": "pushed", "subscriptions": ["soar.alarm"], "webhook": webhook});
        let pushed = console.app.onboard_with(body).await;
        // The flow moves, and the table of clients has rates.
        let traffic = Traffic::between(&sender, "soar.noc.slocum", &[&reader]);
        let browser = &mut console.browser;
        browser.open("/#/overview").await;
        browser.until("the way of the messages moves", "return document.querySelectorAll('.flow .rate:not(.idle)').length >= 6").await;
        browser.screenshot("overview").await;
        browser.open("/#/clients").await;
        let rated = "return Number(document.querySelector('tr[data-id=noc-c2]')?.children[5].textContent) > 0";
        browser.until("a rate", rated).await;
        // A message is seen as it passes, and its way is found.
        browser.open("/#/tail?pattern=soar.%23").await;
        browser.sees(".tail td", "soar.noc.slocum").await;
        browser.click(".tail tbody tr:last-child a[href*='message']").await;
        browser.sees(".way", "because of soar.noc.#").await;
        drop(traffic);
        // Paused by the operator, what it sends waits in its outbox.
        browser.open("/#/client/noc-c2").await;
        browser.press_button("Pause").await;
        browser.sees("main .head .pill", "paused").await;
        sender.send("soar.noc.slocum", json!(1)).await;
        let waits = "return [...document.querySelectorAll('.figures div')].some((one) => one.textContent === 'Outbox1')";
        browser.until("it waits", waits).await;
        browser.press_button("Resume").await;
        browser.until("it goes on", &waits.replace("Outbox1", "Outbox0")).await;
        // A dead letter is replayed.
        sender.send("soar.alarm", json!({"text": "an alarm"})).await;
        pushed.dead_letters(1).await;
        browser.open("/#/client/pushed").await;
        browser.sees("#dead-letters td", "delivery failed").await;
        browser.screenshot("client").await;
        healthy.store(true, Ordering::SeqCst);
        let before = endpoint.count();
        browser.press_button("Replay all").await;
        endpoint.wait_for(before + 1).await;
        browser.sees("#dead-letters td", "None.").await;
        browser.sees("#attempts td", "204").await;
    }
}
