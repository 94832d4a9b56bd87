//! The OpenAPI document against the live server, by `schemathesis`: every documented call, with every kind of input that
//! the document allows or forbids, answered as the document says. That the router's routes and the document name the
//! same calls is a unit test beside the document.

use std::process::Stdio;

use reqwest::Method;
use serde_json::json;

use crate::support::TestApp;
use crate::support::endpoint::FakeEndpoint;
use crate::support::fixture::BrokerKind;
use crate::support::http::receipts;

/// What is run against the server, and how much of it.
struct Run<'a> {
    /// How schemathesis says who calls, as a table of its configuration.
    credentials: String,
    /// Operations that are left out or kept, as its options say it.
    selection: &'a [&'a str],
    /// More of its configuration: operations that need something to be there.
    operations: String,
    phases: &'a str,
    examples: u32,
}

/// What the document cannot say, with the reason for each.
const COMMON: &str = r#"
seed = 20261125
hooks = "openapi_hooks"

# What a URL may be depends on SOAR_WEBHOOK_ALLOW as well: one that is well-formed may still be a 422.
[[operations]]
include-name = ["POST /clients", "PATCH /clients/{id}"]
[operations.checks.positive_data_acceptance]
expected-statuses = ["2xx", "404", "409", "422"]

# Without the headers of a WebSocket's handshake, which belong to HTTP and not to this API, nothing fits.
[[operations]]
include-name = "GET /ws"
[operations.checks.positive_data_acceptance]
expected-statuses = ["422"]

# A purge leaves an empty list, which is still there.
[[operations]]
include-path = "/clients/{id}/dead-letters"
[operations.checks.use_after_free]
enabled = false
"#;

/// Runs it, and fails with its report when it finds anything.
async fn hold(app: &TestApp, run: Run<'_>) {
    let config = app.directory().join("schemathesis.toml");
    let text = format!("{COMMON}\n{}\n{}\n", run.operations, run.credentials);
    std::fs::write(&config, text).expect("the directory is writable");
    #[expect(clippy::disallowed_methods, reason = "set by scripts/test.sh, for the tests only")]
    let python = std::env::var("BACKBONE_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let mut command = std::process::Command::new(python);
    command
        .args(["-m", "schemathesis.cli", "--config-file"])
        .arg(&config)
        .args(["run", &app.api.url("/openapi.json"), "--checks", "all", "--no-color", "--phases", run.phases])
        .args(["--max-examples", &run.examples.to_string(), "--request-timeout", "20", "--generation-database", "none"])
        // Of wrong credentials only the check for them sends some: the router slows down whoever sends more.
        .args(["--generation-with-security-parameters", "false"])
        .args(run.selection)
        // The hooks are found from here; what it writes goes where the test's files go.
        .env("PYTHONPATH", concat!(env!("CARGO_MANIFEST_DIR"), "/tests"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .current_dir(app.directory())
        .stdin(Stdio::null());
    let output = actix_rt::task::spawn_blocking(move || command.output()).await.expect("no panic");
    let output = output.expect("there is a Python with schemathesis: run scripts/test.sh");
    let report = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "schemathesis found something:\n{report}\n{errors}");
    let counted = |line: &str| line.trim().split_once(" generated, ").and_then(|(cases, _)| cases.parse::<u32>().ok());
    let cases = report.lines().find_map(counted).unwrap_or_else(|| panic!("no count:\n{report}"));
    assert!(cases > 100, "it did not do much:\n{report}");
    assert!(!report.contains("returned only 401/403"), "its credentials are wrong:\n{report}");
}

/// Messages in every place where a call may look for one.
async fn fill(app: &mut TestApp) -> (crate::support::http::Client, String) {
    let tester = app.onboard("tester", &["soar.#"]).await;
    let mut last = String::new();
    for n in 0..5 {
        last = tester.send("soar.x", json!(n)).await;
    }
    let taken = tester.receive_exactly(2, "ack=manual").await;
    tester.post("/nack").json(&json!({"receipts": receipts(&taken), "dead": true})).send().await.ok(200);
    (tester, last)
}

async fn as_admin(app: &mut TestApp, message: &str, phases: &str, examples: u32) {
    let endpoint = FakeEndpoint::healthy();
    let hooked = json!({"client_id": "hooked", "webhook": {"url": endpoint.url()}});
    app.onboard_with(hooked).await;
    let operations = format!(
        r#"
[[operations]]
include-name = ["POST /clients/{{id}}/webhook-secret", "POST /clients/{{id}}/webhook/test"]
parameters = {{ "path.id" = "hooked" }}

[[operations]]
include-name = "GET /messages/{{id}}"
parameters = {{ "path.id" = "{message}" }}
"#
    );
    let credentials = format!("[auth.openapi.admin]\nbearer = \"{}\"", app.admin_token());
    // A client's calls are for the clients' run; the feed of the console does not end.
    let selection = [
        "--include-tag",
        "clients",
        "--include-tag",
        "webhooks",
        "--include-tag",
        "dead letters",
        "--include-tag",
        "operation",
        "--include-tag",
        "pages",
        "--include-path",
        "/messages/{id}",
        "--exclude-path",
        "/console/feed",
    ];
    hold(app, Run { credentials, selection: &selection, operations, phases, examples }).await;
    assert!(!endpoint.hits().is_empty(), "a test of the webhook went out");
}

async fn as_client(app: &mut TestApp, message: &str, phases: &str, examples: u32) {
    let hooked = app.admin(Method::GET, "/clients/tester").send().await;
    assert_eq!(hooked.status, 200, "the client is still there: {hooked:?}");
    // The token outlives what the run does to the secret.
    let rotated = app.admin(Method::POST, "/clients/tester/secret").send().await.ok(200);
    let secret = rotated["secret"].as_str().expect("a secret").to_owned();
    app.note_secret(&secret);
    let token = app.api.post("/token").basic("tester", &secret).send().await.ok(200);
    let token = token["token"].as_str().expect("a token");
    let operations = format!(
        r#"
[[operations]]
include-path-regex = "^/clients/.id.*"
parameters = {{ "path.id" = "tester" }}

[[operations]]
include-name = "GET /messages/{{id}}"
parameters = {{ "path.id" = "{message}" }}

# Long polls have tests of their own; here they would only take time.
[[operations]]
include-name = "GET /receive"
parameters = {{ "query.wait" = 0 }}
"#
    );
    let credentials = format!("[auth.openapi.token]\nbearer = \"{token}\"");
    let selection = [
        "--include-tag",
        "messages",
        "--include-tag",
        "dead letters",
        "--include-name",
        "GET /clients/{id}",
        "--include-name",
        "POST /clients/{id}/secret",
        "--include-name",
        "GET /clients/{id}/attempts",
    ];
    hold(app, Run { credentials, selection: &selection, operations, phases, examples }).await;
}

#[actix_rt::test]
async fn schemathesis_finds_nothing_with_the_admins_credentials() {
    let mut app = TestApp::start_with(BrokerKind::Embedded, &[]).await;
    let (_, message) = fill(&mut app).await;
    as_admin(&mut app, &message, "examples,coverage,fuzzing,stateful", 8).await;
    crate::support::fixture::Fixture::finish(app).await;
}

#[actix_rt::test]
async fn schemathesis_finds_nothing_with_a_clients_credentials() {
    let mut app = TestApp::start_with(BrokerKind::Embedded, &[]).await;
    let (_, message) = fill(&mut app).await;
    as_client(&mut app, &message, "examples,coverage,fuzzing", 10).await;
    crate::support::fixture::Fixture::finish(app).await;
}

/// A small run: the surface is the same, what is behind it is not.
#[actix_rt::test]
async fn schemathesis_finds_nothing_on_rabbitmq_either() {
    for admin in [false, true] {
        // Routers of their own, so that the wrong credentials of the one are not counted against the other.
        let mut app = TestApp::start_with(BrokerKind::RabbitmqQuorum, &[]).await;
        let (_, message) = fill(&mut app).await;
        if admin {
            as_admin(&mut app, &message, "examples,coverage", 2).await;
        } else {
            as_client(&mut app, &message, "examples,coverage", 2).await;
        }
        crate::support::fixture::Fixture::finish(app).await;
    }
}
