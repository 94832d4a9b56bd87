//! The rest of the contract's table of answers: what every path says to what it cannot do.

use reqwest::Method;
use serde_json::json;

use crate::support::TestApp;

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
