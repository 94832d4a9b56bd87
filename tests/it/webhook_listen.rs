//! `backbone listen` and `backbone client test-webhook`: trying webhooks out by hand, with the real program on both ends.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Stdio};

use reqwest::Method;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::http::Client;
use crate::support::process::signal;
use crate::support::wait::SOON;
use crate::support::{TestApp, eventually};

/// `backbone listen` as a child, on a free port.
struct Listener {
    child: Child,
    url: String,
    stderr: BufReader<std::process::ChildStderr>,
    stdout: std::process::ChildStdout,
}

/// What it wrote, and how it ended.
struct Listened {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Listened {
    fn json_lines(&self) -> Vec<Value> {
        self.stdout.lines().map(|line| serde_json::from_str(line).expect("a JSON document")).collect()
    }
}

impl Listener {
    /// Starts it and waits until it says where it listens.
    fn start(app: &TestApp, secret: Option<&str>, arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_backbone"));
        command.env_clear().current_dir(app.directory()).args(["listen", "127.0.0.1:0"]).args(arguments);
        if let Some(secret) = secret {
            command.env("SOAR_WEBHOOK_SECRET", secret);
        }
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.expect("the program starts");
        let mut stderr = BufReader::new(child.stderr.take().expect("piped"));
        let stdout = child.stdout.take().expect("piped");
        let mut line = String::new();
        stderr.read_line(&mut line).expect("says where it listens");
        let url = line.split_whitespace().find(|word| word.starts_with("http://"));
        let url = url.unwrap_or_else(|| panic!("no URL: {line}")).to_owned();
        Self { child, url, stderr, stdout }
    }

    fn interrupt(&self) {
        signal(self.child.id(), Signal::INT);
    }

    /// Waits for its end.
    async fn end(mut self) -> Listened {
        let ended = eventually("the receiver ends", SOON, async || self.child.try_wait().expect("a child")).await;
        let (mut stdout, mut stderr) = (String::new(), String::new());
        self.stdout.read_to_string(&mut stdout).expect("text");
        self.stderr.read_to_string(&mut stderr).expect("text");
        Listened { code: ended.code(), stdout, stderr }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // It may have ended; what matters is that nothing is left behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A sender, and a receiver of everything under `x` whose webhook is at `url`; its webhook secret.
async fn onboard(app: &mut TestApp, url: &str) -> (Client, String) {
    let webhook = json!({"url": url, "timeout_s": 5, "retry_schedule_s": [1, 1]});
    let body = json!({"client_id": "receiver", "subscriptions": ["x.#"], "webhook": webhook});
    let created = app.admin(Method::POST, "/clients").json(&body).send().await.ok(201);
    let secret = created["webhook_secret"].as_str().expect("a webhook secret").to_owned();
    app.note_secret(&secret);
    (app.onboard("sender", &[]).await, secret)
}

/// Points the receiver's webhook at another URL.
async fn point(app: &TestApp, url: &str) {
    app.patch("receiver", json!({"webhook": {"url": url}})).await;
}

async fn send(sender: &Client, message: Value) {
    sender.call(Method::POST, "/send").json(&json!({"topic": "x.y", "message": message})).send().await.ok(202);
}

/// Runs `backbone client test-webhook receiver`.
async fn test_webhook(app: &TestApp, arguments: &[&str]) -> Listened {
    let mut command = Command::new(env!("CARGO_BIN_EXE_backbone"));
    command
        .env_clear()
        .env("SOAR_URL", format!("http://{}", app.router.address()))
        .env("SOAR_ADMIN_TOKEN", app.admin_token())
        .current_dir(app.directory())
        .args(["client", "test-webhook", "receiver"])
        .args(arguments)
        .stdin(Stdio::null());
    let output = actix_rt::task::spawn_blocking(move || command.output()).await.expect("no panic").expect("starts");
    Listened {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("text"),
        stderr: String::from_utf8(output.stderr).expect("text"),
    }
}

broker_tests! {
    async fn what_arrives_is_verified_printed_and_taken(app: &mut TestApp) {
        let (sender, secret) = onboard(app, "http://127.0.0.1:9/").await;
        let listener = Listener::start(app, Some(&secret), &["--max", "3", "--json"]);
        point(app, &listener.url).await;
        let tested = test_webhook(app, &[]).await;
        assert_eq!((tested.code, tested.stderr.as_str()), (Some(0), ""), "{}", tested.stdout);
        assert!(tested.stdout.contains("200"), "{}", tested.stdout);
        send(&sender, json!({"depth": 12.5})).await;
        sender.call(Method::POST, "/notify").json(&json!({"message": "to all"})).send().await.ok(202);
        let listened = listener.end().await;
        assert_eq!(listened.code, Some(0), "{}", listened.stderr);
        let lines = listened.json_lines();
        assert_eq!(lines.len(), 3, "{}", listened.stdout);
        for line in &lines {
            assert_eq!((&line["verified"], &line["answered"], &line["again"]), (&json!(true), &json!(200), &json!(false)));
            assert_eq!(line["webhook_id"], line["envelope"]["id"]);
        }
        assert_eq!(lines[0]["envelope"]["message"]["test"], true);
        let of = |message: Value| lines.iter().find(|line| line["envelope"]["message"] == message).expect("came");
        assert_eq!(of(json!({"depth": 12.5}))["envelope"]["sender"], "sender");
        assert_eq!(of(json!("to all"))["envelope"]["broadcast"], true);
        assert!(!listened.stdout.contains(&secret) && !listened.stderr.contains(&secret));
    }

    async fn what_is_signed_with_another_secret_is_refused(app: &mut TestApp) {
        let (sender, secret) = onboard(app, "http://127.0.0.1:9/").await;
        let rotated = app.admin(Method::POST, "/clients/receiver/webhook-secret?overlap_s=0").send().await.ok(200);
        let new = rotated["secret"].as_str().expect("a secret").to_owned();
        app.note_secret(&new);
        // It knows the old secret only, which signs no longer.
        let old = Listener::start(app, Some(&secret), &[]);
        point(app, &old.url).await;
        let tested = test_webhook(app, &[]).await;
        assert_eq!(tested.code, Some(1));
        assert!(tested.stderr.contains("did not take the example") && tested.stderr.contains("401"), "{}", tested.stderr);
        old.interrupt();
        let listened = old.end().await;
        assert_eq!((listened.code, listened.stdout.as_str()), (Some(0), ""));
        assert!(listened.stderr.contains("no signature in webhook-signature fits the secret"), "{}", listened.stderr);
        // It knows both, as a receiver does that is being moved to the new one.
        let both = Listener::start(app, Some(&format!("{secret},{new}")), &["--max", "1"]);
        point(app, &both.url).await;
        send(&sender, json!("line\nbreak")).await;
        let listened = both.end().await;
        assert_eq!(listened.code, Some(0), "{}", listened.stderr);
        assert!(listened.stdout.contains("sender  x.y  \"line\\nbreak\"\n"), "{}", listened.stdout);
    }

    async fn a_refusing_receiver_shows_what_retries_do(app: &mut TestApp) {
        let (sender, secret) = onboard(app, "http://127.0.0.1:9/").await;
        let listener = Listener::start(app, Some(&secret), &["--status", "503", "--retry-after", "1", "--max", "3", "--json"]);
        point(app, &listener.url).await;
        send(&sender, json!(7)).await;
        let listened = listener.end().await;
        let lines = listened.json_lines();
        let seen: Vec<_> = lines.iter().map(|line| (line["answered"].as_u64(), line["again"].as_bool())).collect();
        assert_eq!(seen, [(Some(503), Some(false)), (Some(503), Some(true)), (Some(503), Some(true))]);
        assert!(lines.iter().all(|line| line["webhook_id"] == lines[0]["webhook_id"]));
        let page = app.admin(Method::GET, "/clients/receiver/attempts").send().await.ok(200);
        assert!(page["attempts"][0]["error"].as_str().is_some_and(|words| words.contains("Retry-After: 1")), "{page}");
    }
}

#[actix_rt::test]
async fn without_a_secret_nothing_is_verified_and_that_is_said() {
    use crate::support::fixture::{BrokerKind, Fixture};
    let mut app = TestApp::start(BrokerKind::Embedded).await;
    let (sender, _) = onboard(&mut app, "http://127.0.0.1:9/").await;
    let listener = Listener::start(&app, None, &["--max", "1"]);
    point(&app, &listener.url).await;
    send(&sender, json!(1)).await;
    let listened = listener.end().await;
    assert!(listened.stdout.contains("(not verified)"), "{}", listened.stdout);
    for (arguments, words) in [
        (&["--webhook-secret", "whsec_"][..], "no webhook secret"),
        (&["--webhook-secret", "@/nowhere"], "cannot read"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_backbone"));
        command.env_clear().current_dir(app.directory()).args(["listen", "127.0.0.1:0"]).args(arguments);
        let output = command.output().expect("starts");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && stderr.contains(words), "{stderr}");
    }
    app.finish().await;
}
