//! Who may call what: credentials in every form, and the answers to wrong ones.

use reqwest::Method;
use serde_json::json;

use crate::support::fixture::{BrokerKind, Fixture};
use crate::support::{TestApp, eventually};

broker_tests! {
    async fn a_client_shows_itself_by_secret_token_or_query(app: &mut TestApp) {
        let client = app.onboard("client", &["x"]).await;
        let answer = client.post("/token").send().await.ok(200);
        let token = answer["token"].as_str().expect("a token").to_owned();
        app.note_secret(&token);
        assert!(token.starts_with("v4.local."), "PASETO v4.local: {token}");
        let expires: jiff::Timestamp = answer["expires_at"].as_str().expect("a time").parse().expect("RFC 3339");
        let hours = expires.duration_since(jiff::Timestamp::now()).as_secs() / 60;
        assert!((23 * 60..=24 * 60).contains(&hours), "{hours} minutes");
        app.api.get("/receive").bearer(&token).send().await.ok(200);
        let query = format!("client_id=client&secret={}", client.secret);
        app.api.get(&format!("/receive?{query}")).send().await.ok(200);
        let body = json!({"topic": "x", "message": 1});
        app.api.post(&format!("/send?{query}")).json(&body).send().await.ok(202);
        app.api.post("/send").bearer(&token).json(&body).send().await.ok(202);
        // A token of a token would never end.
        let again = app.api.post("/token").bearer(&token).send().await;
        assert!(again.status == 200 || again.status == 401 || again.status == 403, "{again:?}");
        assert_eq!(client.receive_exactly(2, "").await.len(), 2);
    }

    async fn credentials_in_the_query_can_be_switched_off(kind: &mut BrokerKind) {
        let mut app = TestApp::start_with(*kind, &[("SOAR_QUERY_AUTH", "false")]).await;
        let client = app.onboard("client", &[]).await;
        let path = format!("/receive?client_id=client&secret={}", client.secret);
        app.api.get(&path).send().await.problem(401, "unauthorized");
        client.get("/receive").send().await.ok(200);
        app.finish().await;
    }

    async fn wrong_credentials_get_one_answer_whether_or_not_the_client_exists(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        let refused = async |call: crate::support::http::Call| {
            let mut problem = call.send().await.problem(401, "unauthorized");
            problem["request_id"].take();
            problem
        };
        let wrong_secret = refused(app.api.get("/receive").basic("client", "wrong")).await;
        let unknown = refused(app.api.get("/receive").basic("nobody", "wrong")).await;
        assert_eq!(wrong_secret, unknown);
        let query = refused(app.api.get("/receive?client_id=client&secret=wrong")).await;
        assert_eq!(query, refused(app.api.get("/receive?client_id=nobody&secret=wrong")).await);
        refused(app.api.get("/receive")).await;
        refused(app.api.get("/receive").basic("client", "")).await;
        refused(app.api.get("/receive").basic("", &client.secret)).await;
        refused(app.api.get("/receive").basic("CLIENT", &client.secret)).await;
        refused(app.api.get("/receive").bearer("v4.local.nonsense")).await;
        refused(app.api.get("/receive").bearer(&client.secret)).await;
        for header in ["Basic", "Basic !!!", "Basic Og==", "Bearer", "Digest x", "\u{e4}", ""] {
            refused(app.api.get("/receive").header("authorization", header)).await;
        }
        refused(app.api.get("/clients").bearer("wrong")).await;
        refused(app.api.get("/clients")).await;
        refused(app.api.get("/clients/client")).await;
        refused(app.api.get("/clients/nobody")).await;
        refused(app.api.get("/metrics")).await;
    }

    async fn each_keeps_to_its_own(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        app.onboard("other", &[]).await;
        let forbidden = async |call: crate::support::http::Call| drop(call.send().await.problem(403, "forbidden"));
        // Whether or not it exists.
        for id in ["other", "nobody"] {
            forbidden(client.get(&format!("/clients/{id}"))).await;
            forbidden(client.post(&format!("/clients/{id}/secret"))).await;
            forbidden(client.post(&format!("/clients/{id}/webhook-secret"))).await;
            forbidden(client.get(&format!("/clients/{id}/dead-letters"))).await;
            forbidden(client.get(&format!("/clients/{id}/attempts"))).await;
        }
        // A client's credentials on the administrator's calls, its own record included.
        forbidden(client.get("/clients")).await;
        forbidden(client.post("/clients").json(&json!({"client_id": "x"}))).await;
        forbidden(client.call(Method::PATCH, "/clients/client").json(&json!({"paused": true}))).await;
        forbidden(client.call(Method::DELETE, "/clients/client")).await;
        forbidden(client.get("/metrics")).await;
        // The administrator's on a client's.
        for (method, path) in [(Method::GET, "/receive"), (Method::POST, "/token"), (Method::POST, "/send"), (Method::POST, "/notify"), (Method::POST, "/ack"), (Method::POST, "/nack")] {
            forbidden(app.admin(method, path).json(&json!({}))).await;
        }
        client.get("/clients/client").send().await.ok(200);
    }

    async fn a_token_outlives_a_rotation_and_a_restart(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        let token = client.post("/token").send().await.ok(200)["token"].as_str().expect("a token").to_owned();
        app.note_secret(&token);
        let rotated = client.post("/clients/client/secret?overlap_s=0").send().await.ok(200);
        app.note_secret(rotated["secret"].as_str().expect("a secret"));
        client.get("/receive").send().await.problem(401, "unauthorized");
        app.api.get("/receive").bearer(&token).send().await.ok(200);
        app.restart().await;
        app.api.get("/receive").bearer(&token).send().await.ok(200);
    }

    async fn who_guesses_is_told_to_wait_and_locks_nobody_out(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        let mut n = 0;
        eventually("wrong credentials are throttled", crate::support::wait::SOON, async || {
            n += 1;
            let answer = app.api.get("/receive").basic("client", &format!("guess-{n}")).send().await;
            match answer.status {
                401 => None,
                _ => Some(answer.problem(429, "rate_limited")),
            }
        })
        .await;
        client.get("/receive").send().await.ok(200);
        assert_eq!(app.admin(Method::GET, "/clients").send().await.status, 200);
    }

    async fn the_admin_token_is_made_once_and_kept_private(app: &mut TestApp) {
        use std::os::unix::fs::PermissionsExt as _;
        let path = app.directory().join("data").join("admin-token");
        let mode = std::fs::metadata(&path).expect("there is a token").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(app.admin_token().len() >= 32);
        app.restart().await;
        assert_eq!(app.router.admin_token(), app.admin_token());
        app.admin(Method::GET, "/clients").send().await.ok(200);
    }
}
