//! `/clients`: onboarding, changing, listing, rotating, deleting.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::TestApp;
use crate::support::http::Answer;

async fn create(app: &TestApp, body: Value) -> Answer {
    app.admin(Method::POST, "/clients").json(&body).send().await
}

async fn patch(app: &TestApp, body: Value) -> Answer {
    let call = app.admin(Method::PATCH, "/clients/client");
    call.body("application/merge-patch+json", body.to_string()).send().await
}

/// Nobody listens there.
const WEBHOOK: &str = "http://127.0.0.1:47999/hook";

broker_tests! {
    async fn creation_answers_with_the_record_and_the_secret(app: &mut TestApp) {
        let body = json!({
            "client_id": "noc-c2", "name": "NOC", "subscriptions": ["soar.#", "x.*"],
            "limits": {"send_per_s": 100, "max_inbox_messages": 1000, "inbox_ttl_s": 60},
        });
        let answer = create(app, body).await;
        assert_eq!(answer.header("location"), Some("/clients/noc-c2"));
        let created = answer.ok(201);
        let secret = created["secret"].as_str().expect("a secret").to_owned();
        app.note_secret(&secret);
        assert!(secret.len() >= 32, "256 random bits");
        assert_eq!((&created["client_id"], &created["name"]), (&json!("noc-c2"), &json!("NOC")));
        assert_eq!(created["subscriptions"], json!(["soar.#", "x.*"]));
        assert_eq!(created["limits"], json!({"send_per_s": 100, "max_inbox_messages": 1000, "inbox_ttl_s": 60}));
        assert_eq!((&created["webhook"], &created["paused"]), (&Value::Null, &json!(false)));
        let created_at = created["created_at"].as_str().expect("a time");
        assert!(created_at.ends_with('Z') && created_at.parse::<jiff::Timestamp>().is_ok(), "{created_at}");
        assert!(created.get("webhook_secret").is_none_or(Value::is_null), "there is no webhook");
        let record = app.admin(Method::GET, "/clients/noc-c2").send().await;
        assert!(!String::from_utf8_lossy(&record.body).contains(&secret), "shown once");
        assert!(record.ok(200).get("secret").is_none());
    }

    async fn the_least_that_a_client_needs_is_its_id(app: &mut TestApp) {
        let client = app.onboard_with(json!({"client_id": "a"})).await;
        let record = client.record().await;
        assert_eq!((&record["name"], &record["subscriptions"]), (&Value::Null, &json!([])));
        app.onboard_with(json!({"client_id": "x".repeat(63), "unknown": "member"})).await;
    }

    async fn an_id_is_taken_once(app: &mut TestApp) {
        let first = app.onboard("client", &["x"]).await;
        create(app, json!({"client_id": "client"})).await.problem(409, "client_exists");
        // Nothing of the first has changed.
        assert_eq!(first.record().await["subscriptions"], json!(["x"]));
        let body = json!({"client_id": "race"});
        let creations = (0..8).map(|_| create(app, body.clone()));
        let answers = futures_util::future::join_all(creations).await;
        let created: Vec<_> = answers.iter().filter(|answer| answer.status == 201).collect();
        assert_eq!(created.len(), 1);
        let secret = created[0].json()["secret"].as_str().expect("a secret").to_owned();
        let record = app.api.get("/clients/race").basic("race", &secret).send().await;
        record.ok(200);
        answers.iter().filter(|answer| answer.status != 201).for_each(|answer| drop(answer.problem(409, "client_exists")));
    }

    async fn every_wrong_field_of_a_creation_is_named(app: &mut TestApp) {
        for id in ["", "-a", "a-", "A", "a.b", "a_b", "ä", "soar", &"x".repeat(64)] {
            create(app, json!({"client_id": id})).await.names(&["/client_id"]);
        }
        create(app, json!({})).await.names(&["/client_id"]);
        create(app, json!({"client_id": 5, "name": [], "subscriptions": "x", "limits": 3, "webhook": 1}))
            .await
            .names(&["/client_id", "/name", "/subscriptions", "/limits", "/webhook"]);
        let subscriptions = json!(["ok", "", "a..b", "a*", "#.#.#", 7, "x".repeat(256)]);
        create(app, json!({"client_id": "a", "subscriptions": subscriptions}))
            .await
            .names(&["/subscriptions/1", "/subscriptions/2", "/subscriptions/3", "/subscriptions/4", "/subscriptions/5", "/subscriptions/6"]);
        let limits = json!({"send_per_s": 0, "max_inbox_messages": -1, "inbox_ttl_s": "60"});
        create(app, json!({"client_id": "a", "limits": limits}))
            .await
            .names(&["/limits/send_per_s", "/limits/max_inbox_messages", "/limits/inbox_ttl_s"]);
        let webhook = json!({"url": "ftp://x", "timeout_s": 61, "concurrency": 0, "retry_schedule_s": [-1], "ordered": 1});
        create(app, json!({"client_id": "a", "webhook": webhook})).await.problem(422, "invalid");
        assert!(app.client_ids().await.is_empty(), "nothing was created");
    }

    async fn a_list_comes_in_pages(app: &mut TestApp) {
        let empty = app.admin(Method::GET, "/clients").send().await.ok(200);
        assert_eq!(empty, json!({"clients": [], "next": null}));
        let ids = ["a", "b", "b-2", "c", "d", "e", "f"];
        for id in ids {
            app.onboard(id, &[]).await;
        }
        let (mut all, mut after) = (Vec::new(), String::new());
        for size in [3, 3, 1] {
            let page = app.admin(Method::GET, &format!("/clients?limit=3{after}")).send().await.ok(200);
            let clients = page["clients"].as_array().expect("clients");
            assert_eq!(clients.len(), size);
            assert!(clients.iter().all(|client| client.get("secret").is_none() && client["created_at"].is_string()));
            all.extend(clients.iter().map(|client| client["client_id"].as_str().expect("an id").to_owned()));
            match page["next"].as_str() {
                Some(next) => after = format!("&after={next}"),
                None => assert_eq!(all.len(), ids.len()),
            }
        }
        assert_eq!(all, ids);
        for query in ["limit=0", "limit=1001", "limit=x"] {
            app.admin(Method::GET, &format!("/clients?{query}")).send().await.names(&["limit"]);
        }
    }

    async fn a_patch_changes_what_it_names_and_null_clears(app: &mut TestApp) {
        let body = json!({"client_id": "client", "name": "N", "subscriptions": ["x"], "limits": {"send_per_s": 5, "inbox_ttl_s": 60}});
        let client = app.onboard_with(body).await;
        let before = client.record().await;
        let same = app.patch("client", json!({})).await;
        for member in ["name", "subscriptions", "webhook", "limits", "paused", "created_at"] {
            assert_eq!(same[member], before[member], "{member}");
        }
        assert_eq!(app.patch("client", json!({"name": null})).await["name"], Value::Null);
        assert_eq!(app.patch("client", json!({"name": "M"})).await["name"], "M");
        assert_eq!(app.patch("client", json!({"subscriptions": ["y", "z.#"]})).await["subscriptions"], json!(["y", "z.#"]));
        // Objects are merged (RFC 7396).
        let limits = app.patch("client", json!({"limits": {"send_per_s": null, "max_inbox_messages": 7}})).await["limits"].clone();
        assert_eq!(limits, json!({"max_inbox_messages": 7, "inbox_ttl_s": 60}));
        assert_eq!(app.patch("client", json!({"limits": null})).await["limits"], json!({}));
        assert_eq!(app.patch("client", json!({"paused": true})).await["paused"], true);
        assert_eq!(client.record().await["paused"], true);
        let plain = app.admin(Method::PATCH, "/clients/client").json(&json!({"paused": false})).send().await.ok(200);
        assert_eq!(plain["paused"], false);
    }

    async fn patches_at_the_same_time_lose_nothing_of_one_another(app: &mut TestApp) {
        app.onboard_with(json!({"client_id": "client", "webhook": {"url": WEBHOOK, "enabled": false}})).await;
        let limits = ["send_per_s", "max_inbox_messages", "inbox_ttl_s"];
        let members = limits.map(|limit| json!({"limits": {limit: 5000}})).into_iter();
        let headers = (0..8).map(|n| json!({"webhook": {"headers": {format!("x-{n}"): "y"}}}));
        let patches = members.chain(headers).map(|body| app.patch("client", body));
        futures_util::future::join_all(patches).await;
        let record = app.admin(Method::GET, "/clients/client").send().await.ok(200);
        assert_eq!(record["limits"].as_object().map(serde_json::Map::len), Some(limits.len()), "{record}");
        assert_eq!(record["webhook"]["headers"].as_object().map(serde_json::Map::len), Some(8), "{record}");
        assert_eq!(record["webhook"]["enabled"], false, "{record}");
    }

    async fn a_wrong_patch_changes_nothing(app: &mut TestApp) {
        let client = app.onboard("client", &["x"]).await;
        let before = client.record().await;
        let wrong = json!({"name": 5, "subscriptions": ["a..b"], "limits": {"send_per_s": 0}, "paused": "yes"});
        patch(app, wrong).await.names(&["/name", "/subscriptions/0", "/limits/send_per_s", "/paused"]);
        patch(app, json!({"name": "new", "subscriptions": 3})).await.names(&["/subscriptions"]);
        patch(app, json!([])).await.problem(422, "invalid");
        let call = || app.admin(Method::PATCH, "/clients/client");
        call().body("application/merge-patch+json", "{").send().await.problem(400, "invalid_json");
        call().body("text/plain", "{}").send().await.problem(415, "unsupported_media_type");
        assert_eq!(client.record().await, before);
        app.admin(Method::PATCH, "/clients/nobody").json(&json!({})).send().await.problem(404, "not_found");
    }

    async fn a_first_webhook_answers_with_its_secret(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        client.post("/clients/client/webhook-secret").send().await.problem(404, "not_found");
        let patched = app.patch("client", json!({"webhook": {"url": WEBHOOK}})).await;
        let secret = patched["webhook_secret"].as_str().expect("a webhook secret").to_owned();
        app.note_secret(&secret);
        assert!(secret.starts_with("whsec_"), "{patched}");
        let webhook = &patched["webhook"];
        assert_eq!((&webhook["url"], &webhook["enabled"]), (&json!(WEBHOOK), &json!(true)));
        assert_eq!((&webhook["timeout_s"], &webhook["concurrency"], &webhook["ordered"]), (&json!(15), &json!(8), &json!(false)));
        assert_eq!(webhook["retry_schedule_s"], json!([5, 300, 1800, 7200, 18_000, 36_000, 36_000]));
        let changed = app.patch("client", json!({"webhook": {"timeout_s": 20}})).await;
        assert_eq!((&changed["webhook"]["timeout_s"], &changed["webhook"]["url"]), (&json!(20), &json!(WEBHOOK)));
        assert!(changed.get("webhook_secret").is_none_or(Value::is_null), "only with the first");
        assert!(!client.record().await.to_string().contains("whsec_"));
        let rotated = client.post("/clients/client/webhook-secret").send().await.ok(200);
        let second = rotated["secret"].as_str().expect("a secret").to_owned();
        app.note_secret(&second);
        assert!(second.starts_with("whsec_") && second != secret);
        assert!(rotated["previous_valid_until"].is_string(), "{rotated}");
    }

    async fn a_rotated_secret_is_valid_as_long_as_it_overlaps(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        let first = client.secret.clone();
        let rotate = async |app: &mut TestApp, query: &str| {
            let path = format!("/clients/client/secret{query}");
            let answer = app.admin(Method::POST, &path).send().await.ok(200);
            let secret = answer["secret"].as_str().expect("a secret").to_owned();
            app.note_secret(&secret);
            let until: jiff::Timestamp = answer["previous_valid_until"].as_str().expect("a time").parse().expect("RFC 3339");
            (secret, until.duration_since(jiff::Timestamp::now()).as_secs())
        };
        let works = async |app: &TestApp, secret: &str| {
            app.api.get("/clients/client").basic("client", secret).send().await.status == 200
        };
        let (second, overlap_s) = rotate(app, "").await;
        assert!((86_000..=86_400).contains(&overlap_s), "a day, says {overlap_s} s");
        assert!(works(app, &first).await && works(app, &second).await);
        let (third, overlap_s) = rotate(app, "?overlap_s=604800").await;
        assert!((604_000..=604_800).contains(&overlap_s), "{overlap_s}");
        assert!(works(app, &first).await, "it was promised a day");
        assert!(works(app, &second).await && works(app, &third).await);
        let (fourth, _) = rotate(app, "?overlap_s=0").await;
        for ended in [&first, &second, &third] {
            assert!(!works(app, ended).await, "all before are ended");
        }
        assert!(works(app, &fourth).await);
        app.restart().await;
        assert!(!works(app, &third).await && works(app, &fourth).await, "after a restart as before");
        let (fifth, _) = rotate(app, "?overlap_s=2").await;
        assert!(works(app, &fifth).await);
        crate::support::eventually("the overlap ends", crate::support::wait::SOON, async || {
            (!works(app, &fourth).await).then_some(())
        })
        .await;
        // A client rotates its own.
        let mine = crate::support::http::Client { secret: fifth, ..client };
        let answer = mine.post("/clients/client/secret?overlap_s=0").send().await.ok(200);
        let sixth = answer["secret"].as_str().expect("a secret").to_owned();
        app.note_secret(&sixth);
        assert!(works(app, &sixth).await);
        for overlap in ["-1", "604801", "x"] {
            let path = format!("/clients/client/secret?overlap_s={overlap}");
            app.admin(Method::POST, &path).send().await.names(&["overlap_s"]);
        }
        app.admin(Method::POST, "/clients/nobody/secret").send().await.problem(404, "not_found");
    }

    async fn attempts_of_a_client_without_webhook_are_none(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        let attempts = client.get("/clients/client/attempts").send().await.ok(200);
        assert_eq!(attempts, json!({"attempts": [], "next": null}));
        app.admin(Method::GET, "/clients/nobody/attempts").send().await.problem(404, "not_found");
    }

    async fn a_client_is_deleted_with_all_it_has(app: &mut TestApp) {
        let client = app.onboard("client", &["x"]).await;
        client.send("x", json!(1)).await;
        client.wait_for_depth("inbox", 1).await;
        app.delete("client").await;
        assert!(app.client_ids().await.is_empty());
        app.admin(Method::GET, "/clients/client/dead-letters").send().await.problem(404, "not_found");
        app.restart().await;
        assert!(app.client_ids().await.is_empty());
    }
}
