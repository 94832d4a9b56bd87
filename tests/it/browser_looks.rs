//! The console and the API's page for everybody: from the keyboard alone, in light and dark, on a phone, to a screen
//! reader.

use serde_json::{Value, json};

use crate::support::browser::{Browser, Key};
use crate::support::console::{Console, Traffic};
use crate::support::endpoint::{FakeEndpoint, Reply};
use crate::support::fixture::{BrokerKind, Fixture};

/// Every page of the console, with a text that is there once it is drawn.
const PAGES: [(&str, &str, &str); 6] = [
    ("overview", "/#/overview", "Memory of the router"),
    ("clients", "/#/clients", "glider-ops"),
    ("client", "/#/client/glider-ops", "delivery failed"),
    ("message", "/#/message", "most recent messages"),
    ("tail", "/#/tail", "soar.noc.slocum"),
    ("unknown", "/#/client/nobody", "There is no client nobody"),
];

/// A console with something to look at on every page.
async fn furnished(name: &str) -> (Console, Traffic, FakeEndpoint) {
    let endpoint = FakeEndpoint::start(|_, _| Reply::Status(500));
    let mut console = Console::open(BrokerKind::Embedded, name).await;
    let sender = console.app.onboard("noc-c2", &[]).await;
    let webhook = json!({"url": endpoint.url(), "retry_schedule_s": []});
    let body = json!({"client_id": "glider-ops", "name": "Glider operations", "subscriptions": ["soar.alarm"], "webhook": webhook});
    let receiver = console.app.onboard_with(body).await;
    console.app.onboard(&"x".repeat(63), &[]).await;
    console.app.onboard("off", &[]).await;
    console.app.patch("off", json!({"paused": true, "name": "Somebody on leave"})).await;
    sender.send("soar.alarm", json!({"text": "an alarm"})).await;
    receiver.dead_letters(1).await;
    let reader = console.app.onboard("reader", &["soar.noc.#"]).await;
    (console, Traffic::between(&sender, "soar.noc.slocum", &[&reader]), endpoint)
}

/// Opens every page, and a dialog over one; `check` is given the name of each.
async fn on_every_page(browser: &mut Browser, check: impl AsyncFn(&mut Browser, &str)) {
    for (name, path, text) in PAGES {
        browser.open(path).await;
        browser.sees("main", text).await;
        check(browser, name).await;
    }
    browser.open("/#/clients").await;
    browser.press_button("Onboard a client").await;
    browser.sees("dialog h1", "Onboard").await;
    check(browser, "dialog").await;
    browser.key(Key::Escape).await;
}

/// What has the focus: its name as assistive technology would read it, and whether it is seen that it has the focus.
async fn focused(browser: &mut Browser) -> (String, bool) {
    let script = "
        const node = document.activeElement;
        if (!node || node === document.body) return ['', true];
        const style = getComputedStyle(node);
        const box = node.getBoundingClientRect();
        const ring = style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2;
        const name = node.getAttribute('aria-label') ?? node.labels?.[0]?.textContent ?? node.textContent;
        return [name.trim(), ring && box.width > 0 && box.height > 0 && node.checkVisibility()]";
    let found = browser.eval(script).await;
    (found[0].as_str().expect("text").to_owned(), found[1] == true)
}

/// Presses Tab until this has the focus; every stop on the way is seen and has a name.
async fn tab_to(browser: &mut Browser, wanted: &str) {
    let mut seen = Vec::new();
    for _ in 0..60 {
        browser.key(Key::Tab).await;
        let (name, visible) = focused(browser).await;
        assert!(visible, "the focus on “{name}” is not seen");
        if name == wanted {
            return;
        }
        seen.push(name);
    }
    panic!("“{wanted}” is not reached: {seen:?}");
}

#[actix_rt::test]
async fn everything_is_reached_and_done_from_the_keyboard() {
    let mut console = Console::closed(BrokerKind::Embedded, "keyboard").await;
    console.app.onboard("glider-ops", &["soar.#"]).await;
    let browser = &mut console.browser;
    browser.sees("h1", "Backbone console").await;
    // The field has the focus from the start.
    browser.type_text(console.app.admin_token()).await;
    browser.key(Key::Enter).await;
    browser.sees("h1", "Overview").await;
    browser.sees("[role=status] .pill", "ready").await;
    // Backwards out of the page into the bar, and by the tabs to another page.
    browser.key(Key::BackTab).await;
    assert_eq!(focused(browser).await.0, "Sign out");
    // A plot is read with the arrow keys, once it has samples.
    browser.until("there are samples", "return document.querySelector('.plot .s1').hasAttribute('d')").await;
    tab_to(browser, "Messages a second").await;
    browser
        .until("a sample is read off", "return /ms|MiB|[0-9]/.test(document.querySelector('.legend').textContent)")
        .await;
    browser.key(Key::ArrowLeft).await;
    browser.sees(".sheet header .hint", "UTC").await;
    browser.screenshot("plot").await;
    // By number to another page, by slash to its search, by Tab to what was found.
    browser.type_text("2").await;
    browser.sees("tr", "glider-ops").await;
    browser.type_text("/").await;
    assert_eq!(focused(browser).await.0, "Search clients");
    browser.type_text("glider").await;
    browser.until("searched", "return location.hash.includes('q=glider')").await;
    tab_to(browser, "glider-ops").await;
    browser.screenshot("row").await;
    // A push draws the table anew; the focus stays.
    let pushes = "window.pushes = 0; new MutationObserver(() => window.pushes++).observe(document.querySelector('tbody'), {subtree: true, childList: true, characterData: true})";
    browser.eval(pushes).await;
    console.app.patch("glider-ops", json!({"name": "Renamed meanwhile"})).await;
    let browser = &mut console.browser;
    browser.sees("tr", "Renamed meanwhile").await;
    assert_eq!(focused(browser).await.0, "glider-ops");
    browser.key(Key::Enter).await;
    browser.sees("h1", "glider-ops").await;
    browser.sees(".facts", "soar.#").await;
    // A dialog is left with Escape, and the focus is where it was.
    tab_to(browser, "Rotate secret").await;
    browser.key(Key::Enter).await;
    browser.sees("dialog h1", "Rotate the secret").await;
    browser
        .until("the focus is in the dialog", "return document.querySelector('dialog').contains(document.activeElement)")
        .await;
    browser.key(Key::Escape).await;
    browser.until("it is closed", "return !document.querySelector('dialog').open").await;
    assert_eq!(focused(browser).await, ("Rotate secret".to_owned(), true));
    // And through one: paused with Space, deleted with Enter, which asks first and has Cancel under the finger.
    browser.key(Key::BackTab).await;
    assert_eq!(focused(browser).await.0, "Pause");
    browser.key(Key::Space).await;
    browser.sees("main .pill", "paused").await;
    tab_to(browser, "Delete").await;
    browser.key(Key::Enter).await;
    browser.sees("dialog h1", "Delete glider-ops?").await;
    assert_eq!(focused(browser).await.0, "Cancel");
    tab_to(browser, "Delete").await;
    browser.key(Key::Enter).await;
    browser.sees("td", "No clients yet").await;
    console.finish().await;
}

#[actix_rt::test]
async fn every_page_can_be_read_in_light_and_dark() {
    let (mut console, traffic, _endpoint) = furnished("looks").await;
    let browser = &mut console.browser;
    for scheme in ["light", "dark"] {
        browser.prefer(scheme, false).await;
        on_every_page(browser, async |browser, name| assert_readable(browser, scheme, name).await).await;
    }
    // Less motion where it is preferred.
    browser.prefer("light", true).await;
    browser.open("/#/overview").await;
    let moving = "const on = document.querySelector('.pulse.on'); return on && getComputedStyle(on).animationName";
    assert_eq!(browser.until("the flow is drawn", moving).await, "none");
    drop(traffic);
    console.finish().await;
}

async fn assert_readable(browser: &mut Browser, scheme: &str, name: &str) {
    browser.screenshot(&format!("{scheme}-{name}")).await;
    let poor = browser.eval(include_str!("support/contrast.js")).await;
    assert_eq!(poor, json!([]), "{name} in {scheme}: contrast below WCAG AA");
}

#[actix_rt::test]
async fn every_page_fits_a_phone() {
    let (mut console, traffic, _endpoint) = furnished("phone").await;
    let browser = &mut console.browser;
    browser.resize(360, 740).await;
    on_every_page(browser, assert_fits).await;
    browser.press_button("Sign out").await;
    browser.sees("h1", "Backbone console").await;
    assert_fits(browser, "sign-in").await;
    browser.open("/docs").await;
    browser.sees("main", "/receive").await;
    assert_fits(browser, "docs").await;
    drop(traffic);
    console.finish().await;
}

async fn assert_fits(browser: &mut Browser, name: &str) {
    browser.screenshot(name).await;
    let widths = browser.eval("return [document.scrollingElement.scrollWidth, innerWidth]").await;
    assert_eq!(widths, json!([360, 360]), "{name} is wider than the screen");
}

#[actix_rt::test]
async fn every_page_has_landmarks_headings_and_names() {
    let (mut console, traffic, _endpoint) = furnished("structure").await;
    let browser = &mut console.browser;
    on_every_page(browser, async |browser, name| {
        assert_structure(browser, name).await;
        if name == "dialog" {
            let named = "const dialog = document.querySelector('dialog'); return document.getElementById(dialog.getAttribute('aria-labelledby'))?.textContent";
            assert_eq!(browser.eval(named).await, "Onboard a client");
        }
    })
    .await;
    browser.open("/docs").await;
    browser.sees("main", "/receive").await;
    assert_structure(browser, "docs").await;
    drop(traffic);
    console.finish().await;
}

async fn assert_structure(browser: &mut Browser, name: &str) {
    let script = "
        const all = (css) => [...document.querySelectorAll(css)].filter((node) => node.checkVisibility());
        const wrong = [];
        const say = (nodes, what) => nodes.forEach((node) => wrong.push(`${what}: ${node.outerHTML.slice(0, 120)}`));
        for (const landmark of ['header', 'main', 'nav']) {
            const found = landmark === 'header' ? all('body > header') : all(landmark);
            if (found.length !== 1) wrong.push(`${found.length} of ${landmark}`);
        }
        if (all('main h1').length < 1) wrong.push('no heading');
        if (!document.documentElement.lang) wrong.push('no language');
        if (!document.title) wrong.push('no title');
        say(all('nav').filter((node) => !node.ariaLabel), 'a nav without a name');
        say(all('input, textarea, select').filter((node) => !node.ariaLabel && !node.labels?.length), 'a field without a label');
        say(all('button, a').filter((node) => !node.textContent.trim() && !node.ariaLabel), 'a control without a name');
        say(all('th').filter((node) => !node.scope), 'a header of nothing');
        say(all('img').filter((node) => !node.hasAttribute('alt')), 'a picture without a text');
        say(all('svg[role=img]').filter((node) => !node.ariaLabel && !node.querySelector('title')), 'a drawing without a name');
        say(all('[role=group], [role=log]').filter((node) => !node.ariaLabel), 'a group without a name');
        const ids = [...document.querySelectorAll('[id]')].map((node) => node.id);
        wrong.push(...ids.filter((id, i) => ids.indexOf(id) !== i).map((id) => `two of #${id}`));
        return wrong";
    let wrong = browser.eval(script).await;
    assert_eq!(wrong, Value::Array(vec![]), "{name}");
}

#[actix_rt::test]
async fn the_api_s_page_is_drawn_from_the_router_alone_and_its_calls_can_be_tried() {
    let mut console = Console::closed(BrokerKind::Embedded, "docs").await;
    let document = console.app.api.get("/openapi.json").send().await.json();
    let methods = ["get", "post", "patch", "delete"];
    let paths = document["paths"].as_object().expect("paths").values();
    let calls: usize = paths.map(|path| methods.iter().filter(|method| path.get(**method).is_some()).count()).sum();
    let token = console.app.admin_token().to_owned();
    let browser = &mut console.browser;
    browser.open("/docs").await;
    browser.until("every call", &format!("return document.querySelectorAll('section.call').length === {calls}")).await;
    browser.screenshot("page").await;
    browser.click("//*[@id='get-clients']//summary[.='Try it']").await;
    browser.press_button_in("get-clients", "Send").await;
    browser.sees("#get-clients .result", "401").await;
    browser.expect_complaints(&["401"]).await;
    browser.click("//option[.='the admin, or a client by token']").await;
    browser.fill(".who input[type=password]", &token).await;
    browser.press_button_in("get-clients", "Send").await;
    browser.sees("#get-clients .result", "200").await;
    browser.sees("#get-clients .result", "\"clients\": []").await;
    browser.screenshot("tried").await;
    for scheme in ["light", "dark"] {
        browser.prefer(scheme, false).await;
        assert_readable(browser, scheme, "page").await;
    }
    let kept = browser.eval("return sessionStorage.length + localStorage.length + document.cookie.length").await;
    assert_eq!(kept, 0, "credentials are in this page's memory only");
    console.finish().await;
}
