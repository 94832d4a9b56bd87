//! A real browser: headless Chromium, driven over WebDriver (<https://www.w3.org/TR/webdriver2/>), with what an operator
//! has: eyes (screenshots, kept under `target/screenshots`), a pointer, a keyboard; and the developer's console.
//!
//! Everything that the console logs and every request that a page makes is collected; [`Browser::finish`] fails the
//! test when something was logged that it did not expect, or when a request left the router's origin.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::wait::{SOON, eventually};

/// Debian's; `scripts/setup.sh` installs both.
const CHROMIUM: &str = "/usr/bin/chromium";
const DRIVER: &str = "/usr/bin/chromedriver";

/// The window that a page is shown in unless a test says otherwise.
const WINDOW: (u32, u32) = (1280, 900);

/// The name of an element's reference in the answers (WebDriver, section 12.3).
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";

/// Keys that are no characters (WebDriver, section 17.4.2).
#[derive(Debug, Clone, Copy)]
pub(crate) enum Key {
    Tab,
    BackTab,
    Enter,
    Escape,
    Space,
    ArrowLeft,
}

impl Key {
    /// The key, and whether Shift is held.
    const fn code(self) -> (char, bool) {
        match self {
            Self::Tab => ('\u{e004}', false),
            Self::BackTab => ('\u{e004}', true),
            Self::Enter => ('\u{e007}', false),
            Self::Escape => ('\u{e00c}', false),
            Self::Space => (' ', false),
            Self::ArrowLeft => ('\u{e012}', false),
        }
    }
}

/// A browser with one tab. Gone when dropped.
pub(crate) struct Browser {
    driver: Child,
    chromium: Option<Pid>,
    session: String,
    http: reqwest::Client,
    /// The router's origin: the only one that may be asked for anything.
    origin: String,
    /// Before the screenshots' names.
    name: String,
    /// What was logged and not expected.
    complaints: Vec<String>,
    /// The URL of every request.
    requests: Vec<String>,
    _profile: TempDir,
}

impl Browser {
    /// Starts one that looks at the router at `origin`. `name` stands before the names of its screenshots.
    pub(crate) async fn start(name: &str, origin: &str) -> Self {
        let profile = tempfile::tempdir().expect("a temporary directory");
        let (driver, port) = start_driver();
        let http = super::http::client();
        let switches: Vec<String> = [
            "--headless=new",
            "--no-sandbox", // the sandbox does not work for root, which tests in containers are
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-default-apps",
            "--hide-scrollbars",
            "--lang=en-GB",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.*", // there is no internet
        ]
        .into_iter()
        .map(str::to_owned)
        .chain([
            format!("--user-data-dir={}", profile.path().display()),
            format!("--window-size={},{}", WINDOW.0, WINDOW.1),
        ])
        .collect();
        let wanted = json!({"capabilities": {"alwaysMatch": {
            "browserName": "chrome",
            "goog:chromeOptions": {"binary": CHROMIUM, "args": switches},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }}});
        let mut browser = Self {
            driver,
            chromium: None,
            session: format!("http://127.0.0.1:{port}/session"),
            http,
            origin: origin.to_owned(),
            name: name.to_owned(),
            complaints: Vec::new(),
            requests: Vec::new(),
            _profile: profile,
        };
        let made = browser.command(reqwest::Method::POST, "", Some(wanted)).await.expect("a session");
        let pid = made["capabilities"]["goog:processID"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        browser.chromium = pid.and_then(Pid::from_raw);
        browser.session = format!("{}/{}", browser.session, made["sessionId"].as_str().expect("a session"));
        browser
    }

    /// Ends it, and fails the test for what it saw: see the module.
    pub(crate) async fn finish(mut self) {
        self.assert_clean().await;
        self.command(reqwest::Method::DELETE, "", None).await.expect("the browser closes");
        self.chromium = None;
    }

    /// Goes to a path of the router. Within one page only the fragment may change.
    pub(crate) async fn open(&mut self, path: &str) {
        let url = format!("{}{path}", self.origin);
        self.post("/url", json!({ "url": url })).await;
    }

    /// Loads the page again.
    pub(crate) async fn reload(&mut self) {
        self.post("/refresh", json!({})).await;
    }

    /// Runs the body of a function in the page, and returns what it returns. A promise is awaited.
    pub(crate) async fn eval(&mut self, script: &str) -> Value {
        self.try_eval(script).await.unwrap_or_else(|error| panic!("{script}: {error}"))
    }

    async fn try_eval(&mut self, script: &str) -> Result<Value, String> {
        self.command(reqwest::Method::POST, "/execute/sync", Some(json!({"script": script, "args": []}))).await
    }

    /// Waits until the body of a function returns something true, and returns that.
    pub(crate) async fn until(&mut self, what: &str, script: &str) -> Value {
        let found = eventually(what, SOON, async || {
            let value = self.try_eval(script).await.ok()?;
            (!matches!(&value, Value::Null | Value::Bool(false)) && value != "" && value != 0).then_some(value)
        });
        found.await
    }

    /// Waits until an element that CSS selects is there and holds this text.
    pub(crate) async fn sees(&mut self, css: &str, text: &str) {
        let script = format!(
            "return [...document.querySelectorAll({})].some((e) => e.checkVisibility() && e.textContent.includes({}))",
            json!(css),
            json!(text)
        );
        self.until(&format!("{css} says “{text}”"), &script).await;
    }

    /// The text of the first element that CSS selects.
    pub(crate) async fn text(&mut self, css: &str) -> String {
        let script = format!("return document.querySelector({})?.textContent ?? ''", json!(css));
        self.eval(&script).await.as_str().expect("text").to_owned()
    }

    /// Clicks, once it is there, what CSS selects, or XPath that starts with `//`.
    pub(crate) async fn click(&mut self, selector: &str) {
        eventually(&format!("{selector} can be clicked"), SOON, async || {
            let element = self.find(selector).await?;
            // Refused while something lies over it, or when it was drawn anew in between.
            self.command(reqwest::Method::POST, &format!("/element/{element}/click"), Some(json!({}))).await.ok()
        })
        .await;
    }

    /// Clicks the button that says exactly this.
    pub(crate) async fn press_button(&mut self, label: &str) {
        self.click(&format!("//button[normalize-space()='{label}']")).await;
    }

    /// The same inside of the element with this id.
    pub(crate) async fn press_button_in(&mut self, id: &str, label: &str) {
        self.click(&format!("//*[@id='{id}']//button[normalize-space()='{label}']")).await;
    }

    /// Empties a field and types into it.
    pub(crate) async fn fill(&mut self, css: &str, text: &str) {
        let element = eventually(&format!("{css} is there"), SOON, async || self.find(css).await).await;
        self.post(&format!("/element/{element}/clear"), json!({})).await;
        self.post(&format!("/element/{element}/value"), json!({ "text": text })).await;
    }

    /// Presses a key, wherever the focus is.
    pub(crate) async fn key(&mut self, key: Key) {
        let (code, shift) = key.code();
        let code = code.to_string();
        let mut actions = vec![json!({"type": "keyDown", "value": code}), json!({"type": "keyUp", "value": code})];
        if shift {
            actions.insert(0, json!({"type": "keyDown", "value": "\u{e008}"}));
            actions.push(json!({"type": "keyUp", "value": "\u{e008}"}));
        }
        self.post("/actions", json!({"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})).await;
    }

    /// Types characters, wherever the focus is.
    pub(crate) async fn type_text(&mut self, text: &str) {
        let actions: Vec<Value> = (text.chars())
            .flat_map(|key| ["keyDown", "keyUp"].map(|what| json!({"type": what, "value": key.to_string()})))
            .collect();
        self.post("/actions", json!({"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})).await;
    }

    /// A command of the DevTools protocol (<https://chromedevtools.github.io/devtools-protocol/>).
    pub(crate) async fn devtools(&mut self, command: &str, parameters: Value) -> Value {
        self.post("/goog/cdp/execute", json!({"cmd": command, "params": parameters})).await
    }

    /// What the system prefers: `light` or `dark`, and whether it prefers less motion.
    pub(crate) async fn prefer(&mut self, scheme: &str, less_motion: bool) {
        let motion = if less_motion { "reduce" } else { "no-preference" };
        let features = json!([
            {"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": motion},
        ]);
        self.devtools("Emulation.setEmulatedMedia", json!({ "features": features })).await;
    }

    /// The size of the window in CSS pixels; below 700 wide it is a phone.
    pub(crate) async fn resize(&mut self, width: u32, height: u32) {
        let phone = width < 700;
        let metrics =
            json!({"width": width, "height": height, "deviceScaleFactor": if phone { 2 } else { 1 }, "mobile": phone});
        self.devtools("Emulation.setDeviceMetricsOverride", metrics).await;
    }

    /// Keeps the whole page as a picture.
    pub(crate) async fn screenshot(&mut self, name: &str) {
        let size = self.eval("return [innerWidth, Math.max(innerHeight, document.documentElement.scrollHeight)]").await;
        let clip = json!({"x": 0, "y": 0, "width": size[0], "height": size[1].as_f64().unwrap_or(0.0).min(6000.0), "scale": 1});
        let shot = json!({"format": "png", "captureBeyondViewport": true, "clip": clip});
        let shot = self.devtools("Page.captureScreenshot", shot).await;
        let png = STANDARD.decode(shot["data"].as_str().expect("a picture")).expect("base64");
        let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).with_file_name("screenshots");
        std::fs::create_dir_all(&directory).expect("makes the directory");
        std::fs::write(directory.join(format!("{}-{name}.png", self.name)), png).expect("writes the picture");
    }

    /// Takes from the console's log what was logged since, which is to be this and only this; say, a 401 that the test
    /// provoked. Each entry holds one of `expected`, and each of them is there.
    pub(crate) async fn expect_complaints(&mut self, expected: &[&str]) {
        eventually("the console's log has what is expected", SOON, async || {
            self.collect().await;
            expected.iter().all(|text| self.complaints.iter().any(|entry| entry.contains(text))).then_some(())
        })
        .await;
        self.complaints.retain(|entry| !expected.iter().any(|text| entry.contains(text)));
    }

    /// Forgets what was logged and holds this; what a router that goes away makes a browser say depends on the moment.
    pub(crate) async fn forgive_complaints(&mut self, text: &str) {
        self.collect().await;
        self.complaints.retain(|entry| !entry.contains(text));
    }

    /// Asserts that nothing was logged that was not expected, and that every request went to the router.
    pub(crate) async fn assert_clean(&mut self) {
        self.collect().await;
        assert!(self.complaints.is_empty(), "the browser's console says:\n{}", self.complaints.join("\n"));
        for request in &self.requests {
            let own = request.strip_prefix(&self.origin).is_some_and(|path| path.starts_with('/'));
            assert!(own || request.starts_with("data:"), "a request to another origin: {request}");
        }
    }

    /// The URLs of all requests so far.
    pub(crate) async fn requests(&mut self) -> &[String] {
        self.collect().await;
        &self.requests
    }

    async fn collect(&mut self) {
        // Each answer has what came since the one before.
        for entry in self.log("browser").await {
            // Errors, warnings and violations of the policy; what a page logs on purpose would be a mistake, too.
            let text = |name: &str| entry[name].as_str().unwrap_or_default().to_owned();
            // What the browser would recommend (of somebody else's page, /docs) is no fault.
            if (text("level").as_str(), text("source").as_str()) == ("DEBUG", "recommendation") {
                continue;
            }
            self.complaints.push(format!("{} {}: {}", text("level"), text("source"), text("message")));
        }
        for entry in self.log("performance").await {
            let message: Value = serde_json::from_str(entry["message"].as_str().expect("text")).expect("JSON");
            let event = &message["message"];
            // Not what the browser shows before it is sent anywhere.
            let of_browser = event["params"]["documentURL"].as_str().is_some_and(|url| url.starts_with("chrome:"));
            if event["method"] == "Network.requestWillBeSent" && !of_browser {
                let request = &event["params"]["request"];
                // Where an operator was is nobody's business, not even the router's log.
                if let Some(from) = request["headers"]["Referer"].as_str().filter(|from| !from.is_empty()) {
                    self.complaints.push(format!("a request says that it comes from {from}: {}", request["url"]));
                }
                self.requests.push(event["params"]["request"]["url"].as_str().expect("a URL").to_owned());
            }
        }
    }

    async fn log(&mut self, kind: &str) -> Vec<Value> {
        let entries = self.post("/se/log", json!({ "type": kind })).await;
        entries.as_array().expect("entries").clone()
    }

    async fn find(&mut self, selector: &str) -> Option<String> {
        let using = if selector.starts_with("//") { "xpath" } else { "css selector" };
        let found = self.command(reqwest::Method::POST, "/element", Some(json!({"using": using, "value": selector})));
        found.await.ok()?[ELEMENT].as_str().map(str::to_owned)
    }

    async fn post(&mut self, path: &str, body: Value) -> Value {
        let answer = self.command(reqwest::Method::POST, path, Some(body.clone())).await;
        answer.unwrap_or_else(|error| panic!("{path} {body}: {error}"))
    }

    async fn command(&mut self, method: reqwest::Method, path: &str, body: Option<Value>) -> Result<Value, String> {
        let mut request = self.http.request(method, format!("{}{path}", self.session));
        if let Some(body) = body {
            request = request.body(body.to_string()).header("content-type", "application/json; charset=utf-8");
        }
        let answer = request.send().await.map_err(|error| format!("the driver does not answer: {error}"))?;
        let fine = answer.status().is_success();
        let answer: Value = answer.json().await.map_err(|error| error.to_string())?;
        if fine { Ok(answer["value"].clone()) } else { Err(answer["value"]["message"].to_string()) }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // A test that failed may leave it in any state; what matters is that nothing is left behind.
        let _ = self.driver.kill();
        let _ = self.driver.wait();
        if let Some(pid) = self.chromium {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// How often the driver is started. It looks for a port that is free on 127.0.0.1 and then needs the same on ::1: when
/// somebody has that it ends.
const DRIVER_STARTS: usize = 5;

/// Starts the driver on a port that it finds, and tells which.
fn start_driver() -> (Child, u16) {
    let started = (0..DRIVER_STARTS).find_map(|_| try_driver());
    started.expect("the driver ended before it listened, again and again")
}

#[expect(clippy::zombie_processes, reason = "who has it waits for it")]
fn try_driver() -> Option<(Child, u16)> {
    let mut command = Command::new(DRIVER);
    command.arg("--port=0").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut driver = command.spawn().unwrap_or_else(|error| panic!("{DRIVER}: {error}; scripts/setup.sh installs it"));
    let mut said = BufReader::new(driver.stdout.take().expect("a pipe"));
    let mut line = String::new();
    loop {
        line.clear();
        if said.read_line(&mut line).expect("reads what the driver says") == 0 {
            let status = driver.wait().expect("the driver can be waited for");
            eprintln!("the driver ended before it listened: {status}");
            return None;
        }
        // "ChromeDriver was started successfully on port 40123."
        if let Some((_, port)) = line.split_once("successfully on port ") {
            let port = port.trim().trim_end_matches('.').parse().expect("a port");
            // It says little more; what it says is read, so that it never waits for a reader.
            std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
            return Some((driver, port));
        }
    }
}
