//! The rest of the contract's table of answers: what every path says to what it cannot do.

use reqwest::Method;
use serde_json::json;

use crate::support::TestApp;
use crate::support::http::{Answer, Call, Client};

/// Every path, with the methods it has.
const PATHS: [(&str, &[&str]); 19] = [
    ("/clients", &["GET", "POST"]),
    ("/clients/client", &["GET", "PATCH", "DELETE"]),
    ("/clients/client/secret", &["POST"]),
    ("/clients/client/webhook-secret", &["POST"]),
    ("/clients/client/dead-letters", &["GET", "DELETE"]),
    ("/clients/client/dead-letters/replay", &["POST"]),
    ("/clients/client/attempts", &["GET"]),
    ("/clients/client/webhook/test", &["POST"]),
    ("/messages/x", &["GET"]),
    ("/token", &["POST"]),
    ("/send", &["POST"]),
    ("/notify", &["POST"]),
    ("/receive", &["GET"]),
    ("/ack", &["POST"]),
    ("/nack", &["POST"]),
    ("/livez", &["GET"]),
    ("/readyz", &["GET"]),
    ("/metrics", &["GET"]),
    ("/openapi.json", &["GET"]),
];

/// Every call with who may make it: `a` the admin, `c` a client, `o` either; and whether it reads a body.
const CALLS: [(&str, &str, char, bool); 20] = [
    ("GET", "/clients", 'a', false),
    ("POST", "/clients", 'a', true),
    ("GET", "/clients/client", 'o', false),
    ("PATCH", "/clients/client", 'a', true),
    ("DELETE", "/clients/client", 'a', false),
    ("POST", "/clients/client/secret", 'o', false),
    ("POST", "/clients/client/webhook-secret", 'o', false),
    ("GET", "/clients/client/dead-letters", 'o', false),
    ("DELETE", "/clients/client/dead-letters", 'o', false),
    ("POST", "/clients/client/dead-letters/replay", 'o', true),
    ("GET", "/clients/client/attempts", 'o', false),
    ("POST", "/clients/client/webhook/test", 'o', false),
    ("GET", "/messages/x", 'o', false),
    ("POST", "/token", 'c', false),
    ("POST", "/send", 'c', true),
    ("POST", "/notify", 'c', true),
    ("GET", "/receive", 'c', false),
    ("POST", "/ack", 'c', true),
    ("POST", "/nack", 'c', true),
    ("GET", "/metrics", 'a', false),
];

/// A refusal that tells a person what to do: in words of more than one, or by naming each wrong field.
fn helps(answer: &Answer, status: u16, code: &str) {
    let problem = answer.problem(status, code);
    let detail = problem["detail"].as_str().expect("a detail");
    assert!(detail.split(' ').count() >= 3, "{detail:?} helps nobody");
    assert_ne!(detail, problem["title"].as_str().expect("a title"), "the detail says more than the title");
}

/// A call of the table with the credentials of somebody who may make it.
fn allowed(app: &TestApp, client: &Client, method: &str, path: &str, who: char) -> Call {
    let method = Method::from_bytes(method.as_bytes()).expect("a method");
    if who == 'c' { client.call(method, path) } else { app.admin(method, path) }
}

broker_tests! {
    async fn a_method_that_a_path_has_not_is_refused_with_those_it_has(app: &mut TestApp) {
        app.onboard("client", &[]).await;
        for (path, methods) in PATHS {
            for method in ["GET", "POST", "PUT", "PATCH", "DELETE"] {
                if methods.contains(&method) {
                    continue;
                }
                let verb = Method::from_bytes(method.as_bytes()).expect("a method");
                let answer = app.admin(verb, path).send().await;
                answer.problem(405, "method_not_allowed");
                let allow = answer.header("allow").expect("405 carries Allow");
                for method in methods {
                    assert!(allow.split(", ").any(|allowed| allowed == *method), "{path}: Allow: {allow}");
                }
                assert!(!allow.split(", ").any(|allowed| allowed == method), "{path}: {method} is refused, yet allowed");
            }
        }
    }

    async fn paths_that_are_not_there_are_not_found(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        for path in ["/nothing", "/clients/client/nothing", "/send/x", "//", "/clients/", "/..%2f..%2fetc/passwd", "/%00"] {
            app.admin(Method::GET, path).send().await.problem(404, "not_found");
            client.get(path).send().await.problem(404, "not_found");
        }
        // No client can have such an id.
        for id in ["A", "a.b", "%20", "x%2fy", &"x".repeat(64)] {
            app.admin(Method::GET, &format!("/clients/{id}")).send().await.problem(404, "not_found");
        }
    }

    async fn a_request_id_is_given_back_and_a_strange_one_is_not(app: &mut TestApp) {
        let first = app.api.get("/livez").send().await;
        let second = app.api.get("/livez").send().await;
        assert_ne!(first.header("x-request-id").expect("an id"), second.header("x-request-id").expect("an id"));
        let answer = app.api.get("/nothing").header("x-request-id", "<script>\u{e9}").send().await;
        let problem = answer.problem(404, "not_found");
        assert!(!problem.to_string().contains("script"), "{problem}");
    }

    async fn whoever_may_not_is_told_who_may(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        let other = app.onboard("other", &[]).await;
        for (method, path, who, _) in CALLS {
            let verb = || Method::from_bytes(method.as_bytes()).expect("a method");
            helps(&app.api.call(verb(), path).send().await, 401, "unauthorized");
            let half = format!("{path}?client_id=client");
            helps(&app.api.call(verb(), &half).send().await, 401, "unauthorized");
            if who == 'a' {
                helps(&client.call(verb(), path).send().await, 403, "forbidden");
            }
            if who == 'c' {
                helps(&app.admin(verb(), path).send().await, 403, "forbidden");
            }
            if path.starts_with("/clients/") {
                helps(&other.call(verb(), path).send().await, 403, "forbidden");
                let gone = path.replacen("/clients/client", "/clients/gone", 1);
                helps(&other.call(verb(), &gone).send().await, 403, "forbidden");
            }
        }
        // Wrong ones are counted against the address, so not on every path.
        for header in ["Basic", "Basic !!!", "Bearer", "Bearer v4.local.nonsense", "Digest username=\"client\"", "client:secret"] {
            helps(&app.api.get("/receive").header("authorization", header).send().await, 401, "unauthorized");
        }
        for (id, secret) in [("client", ""), ("", "x"), ("nobody", "x"), ("client", "x"), ("other", &client.secret)] {
            helps(&app.api.get("/receive").basic(id, secret).send().await, 401, "unauthorized");
        }
        helps(&app.api.get("/receive?client_id=client&secret=x").send().await, 401, "unauthorized");
    }

    async fn a_body_of_another_kind_is_refused_with_the_kind_that_is_taken(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        for (method, path, who, _) in CALLS.into_iter().filter(|(.., reads)| *reads) {
            let call = || allowed(app, &client, method, path, who);
            let mut answers = Vec::new();
            for content_type in ["text/plain", "application/xml", "application/x-www-form-urlencoded", "json", "application/json; charset=latin1"] {
                answers.push(call().body(content_type, "{}").send().await);
            }
            answers.push(call().header("content-encoding", "gzip").body("application/json", "{}").send().await);
            for answer in answers {
                helps(&answer, 415, "unsupported_media_type");
            }
            let mut broken = vec!["{", "nope", "{'topic':1}", "{\"a\":1,}", "{\"a\":1}}", "\u{feff}{}"];
            if !path.ends_with("replay") {
                broken.push("");
            }
            for body in broken {
                helps(&call().body("application/json", body).send().await, 400, "invalid_json");
            }
            helps(&call().body("application/json", b"{\"a\":\"\xff\"}".to_vec()).send().await, 400, "invalid_json");
            for body in ["7", "\"text\"", "true", "[[]]", "[7]"] {
                helps(&call().body("application/json", body).send().await, 422, "invalid");
            }
        }
    }

    async fn every_wrong_member_of_every_body_is_named(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        for (method, path, who, body, named) in [
            ("POST", "/clients", 'a', json!({}), &["/client_id"][..]),
            ("POST", "/clients", 'a', json!({"client_id": "No", "name": 7, "subscriptions": ["a..b", 7], "limits": {"send_per_s": 0}}),
                &["/client_id", "/name", "/subscriptions/0", "/subscriptions/1", "/limits/send_per_s"]),
            ("POST", "/clients", 'a', json!({"client_id": "x", "webhook": {"url": "ftp://x", "timeout_s": 0, "concurrency": 1000}}),
                &["/webhook/url", "/webhook/timeout_s", "/webhook/concurrency"]),
            ("POST", "/clients", 'a', json!({"client_id": "soar"}), &["/client_id"]),
            ("PATCH", "/clients/client", 'a', json!({"paused": "yes", "subscriptions": "a", "limits": []}), &["/paused", "/subscriptions", "/limits"]),
            ("PATCH", "/clients/client", 'a', json!({"client_id": "other"}), &["/client_id"]),
            ("PATCH", "/clients/client", 'a', json!({"webhook": {"ordered": true}}), &["/webhook/url"]),
            ("POST", "/send", 'c', json!({}), &["/topic", "/message"]),
            ("POST", "/send", 'c', json!({"topic": 7, "message": 1, "id": ""}), &["/topic", "/id"]),
            ("POST", "/send", 'c', json!({"topic": "a.*", "message": 1}), &["/topic"]),
            ("POST", "/send", 'c', json!([]), &[""]),
            ("POST", "/notify", 'c', json!({}), &["/message"]),
            ("POST", "/notify", 'c', json!([{"message": 1}, {"id": "a b"}]), &["/1/message", "/1/id"]),
            ("POST", "/ack", 'c', json!({}), &["/receipts"]),
            ("POST", "/ack", 'c', json!({"receipts": "r"}), &["/receipts"]),
            ("POST", "/nack", 'c', json!({"receipts": [1], "delay_s": -1, "dead": 1}), &["/receipts/0", "/delay_s", "/dead"]),
            ("POST", "/clients/client/dead-letters/replay", 'a', json!({"ids": [1]}), &["/ids/0"]),
            ("POST", "/clients/client/dead-letters/replay", 'a', json!({"ids": "all"}), &["/ids"]),
        ] {
            let answer = allowed(app, &client, method, path, who).json(&body).send().await;
            helps(&answer, 422, "invalid");
            answer.names(named);
        }
        for (method, path, who, named) in [
            ("GET", "/clients?limit=0&after=No", 'a', &["limit", "after"][..]),
            ("GET", "/clients?limit=1001", 'a', &["limit"]),
            ("GET", "/clients?limit=1&limit=2", 'a', &["limit"]),
            ("GET", "/receive?max=0&wait=31&ack=maybe&lease=0", 'c', &["max", "wait", "ack", "lease"]),
            ("GET", "/receive?max=ten", 'c', &["max"]),
            ("POST", "/clients/client/secret?overlap_s=604801", 'a', &["overlap_s"]),
            ("POST", "/clients/client/webhook-secret?overlap_s=-1", 'a', &["overlap_s"]),
            ("GET", "/clients/client/dead-letters?limit=x", 'a', &["limit"]),
            ("GET", "/clients/client/attempts?limit=0&after=nonsense", 'a', &["limit", "after"]),
            ("GET", "/messages/x?sender=No", 'a', &["sender"]),
        ] {
            let answer = allowed(app, &client, method, path, who).send().await;
            helps(&answer, 422, "invalid");
            answer.names(named);
        }
    }

    async fn what_is_too_long_or_not_there_says_so(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        let long = |bytes: usize| format!("{{\"topic\":\"x\",\"message\":\"{}\"}}", "x".repeat(bytes));
        for (path, body) in [
            ("/send", long((1 << 20) + 1)),
            ("/notify", long((1 << 20) + 1)),
            ("/ack", long(2 << 20)),
            ("/nack", long(2 << 20)),
        ] {
            helps(&client.post(path).body("application/json", body).send().await, 413, "too_large");
        }
        for (method, path) in [(Method::POST, "/clients"), (Method::PATCH, "/clients/client")] {
            helps(&app.admin(method, path).body("application/json", long(4 << 20)).send().await, 413, "too_large");
        }
        for (method, path) in [
            ("GET", "/clients/gone"), ("PATCH", "/clients/gone"), ("DELETE", "/clients/gone"),
            ("POST", "/clients/gone/secret"), ("POST", "/clients/gone/webhook-secret"),
            ("POST", "/clients/client/webhook-secret"), ("POST", "/clients/client/webhook/test"),
            ("GET", "/clients/gone/attempts"), ("GET", "/clients/gone/dead-letters"),
            ("GET", "/messages/gone"), ("GET", "/nothing"), ("POST", "/sned"), ("GET", "/console/gone.js"),
        ] {
            helps(&allowed(app, &client, method, path, 'a').json(&json!({})).send().await, 404, "not_found");
        }
        let taken = app.admin(Method::POST, "/clients").json(&json!({"client_id": "client"})).send().await;
        helps(&taken, 409, "client_exists");
        app.patch("client", json!({"webhook": {"url": "http://127.0.0.1:18098/"}})).await;
        helps(&client.get("/receive").send().await, 409, "webhook_configured");
    }

    async fn no_answer_tells_of_the_inside(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        let strange = [
            app.admin(Method::GET, "/clients?after=%FF%FE&limit=1").send().await,
            client.get("/messages/%27%20OR%201=1").send().await,
            client.get("/clients/client/dead-letters?after=nonsense").send().await,
            client.get("/clients/client/attempts?after=nonsense").send().await,
            app.admin(Method::GET, "/clients/client/dead-letters?after=-1").send().await,
            client.post("/clients/client/dead-letters/replay").json(&json!({"ids": ["-1", "'", "99999999999999999999"]})).send().await,
        ];
        for answer in strange {
            assert!(answer.status < 500, "{answer:?}");
            let text = String::from_utf8_lossy(&answer.body).to_lowercase();
            for word in ["sqlite", "panicked", ".rs:", "rusqlite", "lapin", "/src/"] {
                assert!(!text.contains(word), "{answer:?}");
            }
        }
    }

    async fn answers_that_carry_secrets_are_not_kept_by_anyone(app: &mut TestApp) {
        let created = app.admin(Method::POST, "/clients").json(&json!({"client_id": "client"})).send().await;
        assert_eq!(created.header("cache-control"), Some("no-store"));
        let body = created.ok(201);
        let secret = body["secret"].as_str().expect("a secret").to_owned();
        app.note_secret(&secret);
        let token = app.api.post("/token").basic("client", &secret).send().await;
        assert_eq!(token.header("cache-control"), Some("no-store"));
        app.note_secret(token.ok(200)["token"].as_str().expect("a token"));
    }
}
