//! The command line as a person or a script meets it: the real program against a real router.

use std::io::Write as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::http::{Client, messages, receipts};
use crate::support::wait::SOON;
use crate::support::{TestApp, eventually};

/// What a run of the program ended with.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ran {
    /// It did what was asked.
    fn ok(&self) -> &str {
        assert_eq!(self.code, Some(0), "{self:?}");
        &self.stdout
    }

    /// One JSON document a line.
    fn json_lines(&self) -> Vec<Value> {
        self.ok().lines().map(|line| serde_json::from_str(line).expect("a line is a JSON document")).collect()
    }

    /// It refused or failed, said why on one line of stderr, and nothing on stdout.
    fn refused(&self) -> &str {
        assert_eq!(self.code, Some(1), "{self:?}");
        assert_eq!((self.stdout.as_str(), self.stderr.lines().count()), ("", 1), "{self:?}");
        &self.stderr
    }
}

/// The program, told where the router is, and who asks.
struct Cli {
    command: Command,
}

impl Cli {
    fn new(app: &TestApp, arguments: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_backbone"));
        command
            .env_clear()
            .env("SOAR_URL", format!("http://{}", app.router.address()))
            .env("SOAR_ADMIN_TOKEN", app.admin_token())
            .env("TMPDIR", app.directory())
            // No .env of whoever runs the tests.
            .current_dir(app.directory())
            .args(arguments);
        Self { command }
    }

    fn by(mut self, client: &Client) -> Self {
        self.command.env("SOAR_CLIENT_ID", &client.id).env("SOAR_CLIENT_SECRET", &client.secret);
        self
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    fn spawn(mut self) -> Child {
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        self.command.spawn().expect("the program starts")
    }

    async fn run(self) -> Ran {
        self.run_with("").await
    }

    /// Runs it with this on stdin.
    async fn run_with(self, stdin: &str) -> Ran {
        let mut child = self.spawn();
        let mut pipe = child.stdin.take().expect("a pipe");
        let stdin = stdin.to_owned();
        // On a thread of its own: the program may write before it has read everything.
        let writer = std::thread::spawn(move || {
            // A program that does not read to the end is no failure of the test.
            let _ = pipe.write_all(stdin.as_bytes());
        });
        let ran = end_of(child).await;
        writer.join().expect("the writer does not panic");
        ran
    }
}

async fn end_of(child: Child) -> Ran {
    let output = actix_rt::task::spawn_blocking(move || child.wait_with_output()).await;
    let output = output.expect("no panic").expect("a child can be waited for");
    Ran {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("stdout is text"),
        stderr: String::from_utf8(output.stderr).expect("stderr is text"),
    }
}

fn interrupt(child: &Child) {
    crate::support::process::signal(child.id(), rustix::process::Signal::INT);
}

broker_tests! {
    async fn two_clients_are_onboarded_and_talk(app: &mut TestApp) {
        let shown = Cli::new(app, &["client", "add", "noc-c2", "--name", "Operations"]).run().await;
        let secret = shown.ok().lines().find_map(|line| line.strip_prefix("secret")).expect("shown once").trim();
        let sender = Client { api: app.api.clone(), id: "noc-c2".into(), secret: secret.into() };
        app.note_secret(secret);
        let added =
            Cli::new(app, &["client", "add", "ship-ops", "--subscribe", "soar.#", "--json"]).run().await.json_lines();
        let receiver = Client {
            api: app.api.clone(),
            id: "ship-ops".into(),
            secret: added[0]["secret"].as_str().expect("shown once").into(),
        };
        app.note_secret(&receiver.secret);
        let sent = Cli::new(app, &["send", "soar.x", "{\"depth\": 12.50}", "--json"]).by(&sender).run().await.json_lines();
        Cli::new(app, &["send", "soar.y", "plain words"]).by(&sender).run().await.ok();
        Cli::new(app, &["send", "soar.z", "-"]).by(&sender).run_with("[1,\n2]").await.ok();
        // A broadcast goes another way, and may overtake them.
        receiver.wait_for_depth("inbox", 3).await;
        Cli::new(app, &["notify", "-7"]).by(&sender).run().await.ok();
        let came = Cli::new(app, &["receive", "--wait", "5", "--max", "3", "--json"]).by(&receiver).run().await;
        assert!(came.ok().contains("\"message\":{\"depth\": 12.50}"), "byte for byte: {came:?}");
        let came = came.json_lines();
        assert_eq!(messages(&came), [json!({"depth": 12.5}), json!("plain words"), json!([1, 2])]);
        assert_eq!(came[0]["id"], sent[0]["ids"][0]);
        let text = Cli::new(app, &["receive", "--wait", "5", "--max", "1"]).by(&receiver).run().await;
        assert!(text.ok().ends_with("  noc-c2  (broadcast)  -7\n"), "{text:?}");
        let empty = Cli::new(app, &["receive"]).by(&receiver).run().await;
        assert_eq!((empty.ok(), empty.stderr.as_str()), ("", "no messages\n"), "what was printed is acknowledged");
        let list = Cli::new(app, &["client", "list"]).run().await;
        assert!(["noc-c2", "Operations", "soar.#"].iter().all(|part| list.ok().contains(part)), "{list:?}");
        assert!(!list.stdout.contains(secret), "{list:?}");
    }

    async fn client_is_changed_shown_and_removed(app: &mut TestApp) {
        let client = app.onboard("ship-ops", &["a.#"]).await;
        let update = ["client", "update", "ship-ops", "--subscribe", "b.*", "--unsubscribe", "a.#", "--pause", "--json"];
        let record = &Cli::new(app, &update).run().await.json_lines()[0];
        assert_eq!((&record["subscriptions"], &record["paused"]), (&json!(["b.*"]), &json!(true)));
        let limited = ["client", "update", "ship-ops", "--resume", "--inbox-ttl-s", "60", "--name", "Ship", "--json"];
        let record = &Cli::new(app, &limited).run().await.json_lines()[0];
        assert_eq!((&record["limits"]["inbox_ttl_s"], &record["name"]), (&json!(60), &json!("Ship")));
        let lifted = ["client", "update", "ship-ops", "--inbox-ttl-s", "none", "--name", "", "--json"];
        let record = &Cli::new(app, &lifted).run().await.json_lines()[0];
        assert!(record["limits"]["inbox_ttl_s"].is_null() && record["name"].is_null(), "{record}");
        // A client may look at itself without the operator's token, and rotate its secret.
        let own = Cli::new(app, &["client", "show"]).by(&client).env("SOAR_ADMIN_TOKEN", "").env("DATA_DIR", "/nonexistent").run().await;
        assert!(own.ok().contains("outbox 0, notify 0, inbox 0, dead 0"), "{own:?}");
        let rotated = Cli::new(app, &["client", "rotate-secret", "--overlap", "0", "--json"]).by(&client).run().await;
        app.note_secret(rotated.json_lines()[0]["secret"].as_str().expect("shown once"));
        let refused = Cli::new(app, &["send", "b.x", "1"]).by(&client).run().await;
        assert!(refused.refused().contains("backbone client rotate-secret ship-ops"), "{refused:?}");
        Cli::new(app, &["client", "remove", "ship-ops"]).run().await.ok();
        let gone = Cli::new(app, &["client", "show", "ship-ops"]).run().await;
        assert!(gone.refused().contains("404 not_found"), "{gone:?}");
    }

    async fn refusal_is_one_line_and_exit_code_1(app: &mut TestApp) {
        let client = app.onboard("noc-c2", &[]).await;
        for (arguments, says) in [
            (&["client", "add", "noc-c2"][..], "client_exists"),
            (&["client", "add", "Bad", "--subscribe", "a..b"], "/client_id"),
            (&["send", "a b", "1"], "/topic"),
            (&["send", "a.b", "@there/is/no/such/file"], "there/is/no/such/file"),
            (&["send", "a.b", "1", "--secret", "wrong"], "401"),
            (&["trace", "nobody-sent-this"], "404"),
            (&["client", "list", "--admin-token", "wrong"], "admin token"),
            (&["status", "--url", "http://127.0.0.1:1"], "backbone serve"),
        ] {
            let ran = Cli::new(app, arguments).by(&client).run().await;
            assert!(ran.refused().contains(says), "{arguments:?}: {ran:?}");
        }
        let wrong = [
            &["bogus"][..],
            &["send"],
            &["client", "update", "noc-c2"],
            &["receive", "--max", "0"],
            &["bench", "amqp-latency"],
        ];
        for wrong in wrong {
            let ran = Cli::new(app, wrong).by(&client).run().await;
            assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{wrong:?}: {ran:?}");
        }
        let nobody = Cli::new(app, &["receive"]).run().await;
        assert!(nobody.code == Some(2) && nobody.stderr.contains("SOAR_CLIENT_ID"), "{nobody:?}");
    }

    async fn lines_in_bulk_arrive_in_order_and_a_repeated_run_doubles_nothing(app: &mut TestApp) {
        let sender = app.onboard("noc-c2", &[]).await;
        let receiver = app.onboard("ship-ops", &["bulk.#"]).await;
        let lines: String =
            (0..2500).map(|n| format!("{{\"topic\":\"bulk.{}\",\"message\":{n}}}\n", n % 7)).collect();
        for duplicates in [0, 2500] {
            let arguments = ["send", "-", "--id-prefix", "run", "--batch", "400", "--json"];
            let ran = Cli::new(app, &arguments).by(&sender).run_with(&lines).await;
            assert_eq!(ran.json_lines(), [json!({"accepted": 2500, "duplicates": duplicates})]);
        }
        let came = Cli::new(app, &["receive", "--wait", "10", "--max", "2500", "--json"]).by(&receiver).run().await;
        let mut came = came.json_lines();
        while came.len() < 2500 {
            came.extend(receiver.receive("wait=10").await);
        }
        assert_eq!(messages(&came), (0..2500).map(Value::from).collect::<Vec<_>>());
        assert!(receiver.receive("").await.is_empty());
        // A value a line, all to one topic; and the first wrong line is named as an editor counts.
        Cli::new(app, &["send", "bulk.values", "-"]).by(&sender).run_with("1\n\n{\"a\":\n 2}").await.refused();
        Cli::new(app, &["send", "bulk.values", "-"]).by(&sender).run_with("1\n\n2\n").await.ok();
        let wrong = "{\"topic\":\"bulk.a\",\"message\":1}\n\n{\"topic\":\"bulk..a\",\"message\":2}\n";
        let ran = Cli::new(app, &["send", "-"]).by(&sender).run_with(wrong).await;
        assert!(ran.refused().contains("line 3: topic"), "{ran:?}");
        assert_eq!(messages(&receiver.receive_exactly(2, "").await), [1, 2]);
    }

    async fn bulk_goes_on_by_itself_when_the_router_is_back(app: &mut TestApp) {
        let sender = app.onboard("noc-c2", &[]).await;
        let receiver = app.onboard("ship-ops", &["bulk.#"]).await;
        let mut child = Cli::new(app, &["send", "bulk.x", "--ndjson", "--retries", "100"]).by(&sender).spawn();
        let mut stdin = child.stdin.take().expect("a pipe");
        let write = |stdin: &mut std::process::ChildStdin, from: u32, to: u32| {
            let lines: String = (from..to).map(|n| format!("{n}\n")).collect();
            stdin.write_all(lines.as_bytes()).expect("the program reads");
        };
        write(&mut stdin, 0, 100);
        receiver.wait_for_depth("inbox", 100).await;
        app.router.kill();
        write(&mut stdin, 100, 200);
        app.router.restart().await;
        write(&mut stdin, 200, 300);
        drop(stdin);
        let ran = end_of(child).await;
        // A batch whose answer was cut off was sent again, and is told apart by its ids.
        assert!(ran.ok().starts_with("accepted 300 messages"), "{ran:?}");
        // RabbitMQ hands out again what had just been forwarded when the router was killed, with the same id.
        let (mut came, mut ids) = (Vec::new(), std::collections::HashSet::new());
        eventually("everything has come", SOON, async || {
            for envelope in receiver.receive("wait=1").await {
                if ids.insert(envelope["id"].to_string()) {
                    came.push(envelope);
                }
            }
            (came.len() >= 300).then_some(())
        })
        .await;
        assert_eq!(messages(&came), (0..300).map(Value::from).collect::<Vec<_>>());
    }

    async fn what_nobody_reads_from_the_command_line_stays_in_the_inbox(app: &mut TestApp) {
        let client = app.onboard("noc-c2", &["a.#"]).await;
        let mut child = Cli::new(app, &["receive", "--follow"]).by(&client).spawn();
        drop(child.stdout.take());
        client.send_all(json!([{"topic": "a.b", "message": 1}, {"topic": "a.b", "message": 2}])).await;
        let ran = end_of(child).await;
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "a closed stdout is no failure");
        let mut came = messages(&client.receive_exactly(2, "").await);
        came.sort_by_key(Value::as_u64);
        assert_eq!(came, [1, 2]);
        // Printed but not settled: they come back when their lease is over.
        client.send("a.b", json!(3)).await;
        let seen = Cli::new(app, &["receive", "--ack", "never", "--lease", "1", "--wait", "5", "--json"]).by(&client).run().await;
        assert!(seen.json_lines()[0]["receipt"].is_string());
        let came = client.receive_exactly(1, "").await;
        assert_eq!((&came[0]["message"], &came[0]["deliveries"]), (&json!(3), &json!(2)));
    }

    async fn following_ends_well_with_an_interrupt(app: &mut TestApp) {
        let client = app.onboard("noc-c2", &["a.#"]).await;
        let child = Cli::new(app, &["receive", "--follow", "--json"]).by(&client).spawn();
        client.send("a.b", json!("one")).await;
        eventually("it is printed and acknowledged", SOON, async || {
            let metric = app.metric("backbone_messages_delivered_total").await;
            (metric >= 1.0).then_some(())
        })
        .await;
        interrupt(&child);
        let ran = end_of(child).await;
        assert_eq!(messages(&ran.json_lines()), ["one"]);
        assert!(client.receive("").await.is_empty());
    }

    async fn following_goes_on_when_the_router_is_back(app: &mut TestApp) {
        let client = app.onboard("noc-c2", &["a.#"]).await;
        let child = Cli::new(app, &["receive", "--follow", "--json"]).by(&client).spawn();
        let send_and_wait = async |body: &str| {
            let id = client.send("a.b", json!(body)).await;
            eventually("it is printed and acknowledged", SOON, async || {
                let way = client.get(&format!("/messages/{id}")).send().await;
                (way.status == 200 && way.json()["state"] == "delivered").then_some(())
            })
            .await;
        };
        send_and_wait("one").await;
        app.restart().await;
        send_and_wait("two").await;
        app.kill_and_restart().await;
        send_and_wait("three").await;
        interrupt(&child);
        let ran = end_of(child).await;
        // What was acknowledged just before the kill may come again, under the same id.
        let mut ids = std::collections::HashSet::new();
        let came: Vec<_> = ran.json_lines().into_iter().filter(|one| ids.insert(one["id"].to_string())).collect();
        assert_eq!(messages(&came), ["one", "two", "three"]);
        // The same members as `receive` without --follow prints.
        let members: Vec<_> = came[0].as_object().expect("an envelope").keys().cloned().collect();
        assert_eq!(members, ["deliveries", "id", "message", "receipt", "sender", "sent_at", "topic"]);
        assert!(client.receive("").await.iter().all(|copy| copy["message"] == "two"));
    }

    async fn dead_letters_are_listed_replayed_and_purged(app: &mut TestApp) {
        let client = app.onboard("noc-c2", &["a.#"]).await;
        client.send_all(json!([{"topic": "a.b", "message": 1}, {"topic": "a.b", "message": 2}, {"topic": "a.b", "message": 3}])).await;
        let taken = client.receive_exactly(3, "ack=manual").await;
        let body = json!({"receipts": receipts(&taken), "dead": true});
        client.post("/nack").json(&body).send().await.ok(200);
        client.dead_letters(3).await;
        let listed = Cli::new(app, &["dead", "list", "noc-c2", "--json"]).run().await.json_lines();
        assert_eq!(listed.iter().map(|letter| &letter["envelope"]["message"]).collect::<Vec<_>>(), [1, 2, 3]);
        let table = Cli::new(app, &["dead", "list"]).by(&client).run().await;
        assert!(table.ok().contains("rejected") && table.stdout.contains("a.b"), "{table:?}");
        let second = listed[1]["id"].as_str().expect("an id");
        let one = Cli::new(app, &["dead", "replay", "noc-c2", "--id", second]).run().await;
        assert_eq!(one.ok(), "replayed 1 dead letter\n");
        assert_eq!(messages(&client.receive_exactly(1, "").await), [2]);
        let rest = Cli::new(app, &["dead", "replay", "noc-c2", "--json"]).run().await;
        assert_eq!(rest.json_lines(), [json!({"replayed": 2})]);
        let taken = client.receive_exactly(2, "ack=manual").await;
        let body = json!({"receipts": receipts(&taken), "dead": true});
        client.post("/nack").json(&body).send().await.ok(200);
        client.dead_letters(2).await;
        assert_eq!(Cli::new(app, &["dead", "purge", "noc-c2"]).run().await.ok(), "purged 2 dead letters\n");
        assert_eq!(Cli::new(app, &["dead", "list", "noc-c2"]).run().await.ok(), "");
    }

    async fn way_token_and_status_are_shown(app: &mut TestApp) {
        let client = app.onboard("noc-c2", &["a.#"]).await;
        Cli::new(app, &["send", "a.b", "1", "--id", "my-own"]).by(&client).run().await.ok();
        client.receive_exactly(1, "").await;
        let way = eventually("the way is known to its end", SOON, async || {
            let way = Cli::new(app, &["trace", "my-own"]).run().await;
            // The hop before may be noted a moment later.
            (way.ok().contains("delivered") && way.stdout.contains("a.#")).then_some(way)
        })
        .await;
        assert!(["accepted", "noc-c2", "a.#", "a.b"].iter().all(|part| way.stdout.contains(part)), "{way:?}");
        let other = app.onboard("other", &[]).await;
        Cli::new(app, &["send", "a.b", "2", "--id", "my-own"]).by(&other).run().await.ok();
        let taken = client.receive_exactly(1, "ack=manual").await;
        client.post("/nack").json(&json!({"receipts": receipts(&taken), "dead": true})).send().await.ok(200);
        eventually("the other's way is known to its end", SOON, async || {
            let way = Cli::new(app, &["trace", "my-own", "--sender", "other"]).run().await;
            (way.ok().contains("rejected") && way.stdout.contains("by noc-c2: see --sender")).then_some(())
        })
        .await;
        let token = Cli::new(app, &["token"]).by(&client).run().await;
        let token = token.ok().trim();
        app.api.get("/receive").bearer(token).send().await.ok(200);
        let status = &Cli::new(app, &["status", "--json"]).run().await.json_lines()[0];
        assert_eq!((&status["ready"], &status["counters"]["accepted"]), (&json!(true), &json!(2)));
        assert_eq!(status["clients"][0]["client_id"], "noc-c2");
        let without_token = Cli::new(app, &["status"]).env("SOAR_ADMIN_TOKEN", "").env("DATA_DIR", "/nonexistent").run().await;
        assert!(without_token.ok().contains("ready  yes"), "{without_token:?}");
        assert!(Cli::new(app, &["token-key"]).run().await.ok().starts_with("k4.local."));
        assert!(Cli::new(app, &["completions", "bash"]).run().await.ok().contains("_backbone"));
    }

    async fn bench_verifies_what_it_measures_and_leaves_nothing_behind(app: &mut TestApp) {
        let url = format!("http://{}", app.router.address());
        let mut arguments = vec!["bench", "send", "pipe", "fanout", "latency", "ws", "onboard", "--json", "--url", &url];
        arguments.extend(["--messages", "300", "--seconds", "20", "--inboxes", "5", "--clients", "60", "--batch", "50"]);
        let ran = Cli::new(app, &arguments).run().await;
        let counts = [("send", 300), ("pipe", 300), ("fanout", 1500), ("latency", 300), ("ws", 300), ("onboard", 60)];
        let reports = ran.json_lines();
        assert_eq!(reports.len(), counts.len(), "{ran:?}");
        for (report, (scenario, count)) in reports.iter().zip(counts) {
            assert_eq!((&report["scenario"], &report["count"]), (&json!(scenario), &json!(count)), "{report}");
            assert_eq!(report["verified"], json!(true), "{report}");
            assert!(report["per_s"].as_f64().is_some_and(|rate| rate > 0.0), "{report}");
        }
        assert_eq!(Cli::new(app, &["client", "list", "--json"]).run().await.ok(), "", "its clients are gone");
    }
}

#[actix_rt::test]
async fn demo_shows_traffic_and_tidies_up() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut command = Command::new(env!("CARGO_BIN_EXE_backbone"));
    command.env_clear().env("TMPDIR", directory.path()).current_dir(directory.path());
    command.args(["demo", "--every-ms", "50", "--json"]);
    let mut cli = Cli { command };
    let mut child = cli.command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    let mut stdout = std::io::BufReader::new(child.stdout.take().expect("a pipe"));
    let seen = actix_rt::task::spawn_blocking(move || {
        use std::io::BufRead as _;
        let mut seen = Vec::new();
        while !(seen.contains(&json!("sent")) && seen.contains(&json!("arrived"))) {
            let mut line = String::new();
            assert!(stdout.read_line(&mut line).expect("readable") > 0, "it ended early; seen {seen:?}");
            seen.push(serde_json::from_str::<Value>(&line).expect("a line is a JSON document")["event"].clone());
        }
        stdout
    });
    let stdout = actix_rt::time::timeout(SOON, seen).await.expect("within seconds").expect("no panic");
    interrupt(&child);
    let ran = actix_rt::time::timeout(Duration::from_secs(60), end_of(child)).await.expect("it stops");
    assert_eq!(ran.code, Some(0), "{ran:?}");
    drop(stdout);
    assert_eq!(std::fs::read_dir(directory.path()).expect("readable").count(), 0, "nothing is left behind");
}

/// Runs a bench with a router of its own; what it reports, by the names of the scenarios.
async fn bench_with_a_router_of_its_own(arguments: &[&str], expected: &[(&str, u64)]) -> Vec<Value> {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut command = Command::new(env!("CARGO_BIN_EXE_backbone"));
    command.env_clear().env("TMPDIR", directory.path()).current_dir(directory.path());
    command.arg("bench").args(arguments).args(["--seconds", "20", "--json"]);
    let ran = Cli { command }.run().await;
    let reports = ran.json_lines();
    let found: Vec<_> = reports.iter().map(|report| (report["scenario"].as_str(), report["count"].as_u64())).collect();
    let expected: Vec<_> = expected.iter().map(|(name, count)| (Some(*name), Some(*count))).collect();
    assert_eq!(found, expected, "{ran:?}");
    assert!(reports.iter().all(|report| report["verified"] == true), "{reports:?}");
    assert_eq!(std::fs::read_dir(directory.path()).expect("readable").count(), 0, "nothing is left behind");
    reports
}

#[actix_rt::test]
async fn bench_pushes_webhooks_and_checks_them_against_a_bare_client() {
    let arguments = ["webhook", "webhook-latency", "--baseline", "--messages", "300"];
    let expected = [("bare-webhook", 300), ("bare-webhook", 300), ("webhook", 300), ("webhook-latency", 300)];
    let reports = bench_with_a_router_of_its_own(&arguments, &expected).await;
    assert!(reports[2]["ratio_to_baseline"].as_f64().is_some_and(|ratio| ratio > 0.0), "{reports:?}");
    assert!(reports[3]["p99_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{reports:?}");
    let verdict = reports[2]["verdict"].as_str().expect("a text");
    assert!(verdict.contains("signatures checked") && !verdict.contains(" 0 signatures"), "{verdict}");
}

#[actix_rt::test]
async fn bench_measures_what_watching_and_tracing_cost() {
    let expected = [("unwatched", 300), ("unwatched", 300), ("watched", 300)];
    let reports = bench_with_a_router_of_its_own(&["watched", "--messages", "300"], &expected).await;
    assert!(reports[2]["ratio_to_baseline"].as_f64().is_some_and(|ratio| ratio > 0.0), "{reports:?}");
    let expected = [("untraced", 300), ("untraced", 300), ("traced", 300)];
    bench_with_a_router_of_its_own(&["traced", "--messages", "300"], &expected).await;
}

/// In its path `rabbitmq`, because it starts a broker.
mod rabbitmq {
    use super::*;
    use crate::support::rabbitmq::VirtualHost;

    #[actix_rt::test]
    async fn bench_compares_with_bare_queues_and_leaves_none_behind() {
        let host = VirtualHost::create().await;
        let url = host.url();
        let arguments = [
            "pipe",
            "latency",
            "ws-latency",
            "amqp",
            "amqp-latency",
            "--baseline",
            "--broker",
            &url,
            "--queue-type",
            "classic",
            "--messages",
            "300",
        ];
        let expected = [
            "bare",
            "bare",
            "pipe",
            "bare-latency",
            "bare-latency",
            "latency",
            "bare-latency",
            "bare-latency",
            "ws-latency",
            "bare",
            "bare",
            "amqp",
            "bare-latency",
            "bare-latency",
            "amqp-latency",
        ]
        .map(|name| (name, 300));
        let reports = bench_with_a_router_of_its_own(&arguments, &expected).await;
        for report in [&reports[2], &reports[11]] {
            assert!(report["ratio_to_baseline"].as_f64().is_some_and(|ratio| ratio > 0.0), "{reports:?}");
        }
        for report in [&reports[5], &reports[8], &reports[14]] {
            assert!(report["p99_ratio_to_baseline"].as_f64().is_some_and(|ratio| ratio > 0.0), "{reports:?}");
        }
        let arguments = ["onboard", "--clients", "20", "--baseline", "--broker", &url, "--queue-type", "classic"];
        let expected = ["bare-onboard", "bare-onboard", "onboard"].map(|name| (name, 20));
        let reports = bench_with_a_router_of_its_own(&arguments, &expected).await;
        assert!(reports[2]["ratio_to_baseline"].as_f64().is_some_and(|ratio| ratio > 0.0), "{reports:?}");
        let left = host.manage(reqwest::Method::GET, &format!("queues/{}", host.name()), None).await;
        let left: Vec<_> = left.as_array().expect("a list").iter().filter_map(|queue| queue["name"].as_str()).collect();
        assert!(left.iter().all(|name| name.starts_with("soar-")), "{left:?}");
    }
}

#[actix_rt::test]
async fn bench_runs_the_baseline_and_a_router_of_its_own() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut command = Command::new(env!("CARGO_BIN_EXE_backbone"));
    command.env_clear().env("TMPDIR", directory.path()).current_dir(directory.path());
    command.args(["bench", "send", "--baseline", "--messages", "200", "--json"]);
    let ran = Cli { command }.run().await;
    let reports = ran.json_lines();
    assert_eq!(reports.iter().map(|r| &r["scenario"]).collect::<Vec<_>>(), ["baseline", "baseline", "send"]);
    assert!(reports.iter().all(|report| report["verified"] == true && report["count"] == 200), "{reports:?}");
    assert!(reports[2]["ratio_to_baseline"].as_f64().is_some_and(|ratio| ratio > 0.0), "{reports:?}");
    assert_eq!(std::fs::read_dir(directory.path()).expect("readable").count(), 0, "nothing is left behind");
}
