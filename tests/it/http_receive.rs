//! `GET /receive`, `/ack`, `/nack`, dead letters, inbox limits.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::TestApp;
use crate::support::http::{Client, messages, receipts};
use crate::support::wait::{pace, soon, stays_pending};

/// A client that subscribes to `x`, with this many messages `0`, `1`, … in its inbox.
async fn with_messages(app: &mut TestApp, count: usize) -> Client {
    let client = app.onboard("client", &["x"]).await;
    put(&client, count).await;
    client
}

async fn put(client: &Client, count: usize) {
    let batch: Vec<_> = (0..count).map(|n| json!({"topic": "x", "message": n})).collect();
    client.send_all(batch.into()).await;
    client.wait_for_depth("inbox", count as u64).await;
}

fn numbers(range: std::ops::Range<usize>) -> Vec<Value> {
    range.map(Value::from).collect()
}

broker_tests! {
    async fn auto_hands_over_the_oldest_and_removes_them(app: &mut TestApp) {
        let client = with_messages(app, 250).await;
        let first = client.receive("").await;
        assert!(first.len() <= 100, "max is 100 unless asked for more");
        assert!(first.iter().all(|envelope| envelope.get("receipt").is_none() && envelope["deliveries"] == 1), "{first:?}");
        let rest = client.receive_exactly(250 - first.len(), "").await;
        let all: Vec<Value> = first.into_iter().chain(rest).collect();
        assert_eq!(messages(&all), numbers(0..250));
        assert_eq!(client.get("/receive").send().await.ok(200), json!({"messages": []}));
        client.wait_for_depth("inbox", 0).await;
    }

    async fn a_long_poll_answers_when_something_comes(app: &mut TestApp) {
        let client = app.onboard("client", &["x"]).await;
        let since = Instant::now();
        assert!(client.receive("wait=1").await.is_empty());
        assert!(since.elapsed() >= Duration::from_secs(1), "answered after {:?}", since.elapsed());
        let since = Instant::now();
        let poll = client.receive("wait=30");
        let send = client.send("x", json!(1));
        let (came, _) = futures_util::join!(poll, send);
        assert_eq!(messages(&came), [json!(1)]);
        assert!(since.elapsed() < Duration::from_secs(20), "answered after {:?}", since.elapsed());
    }

    async fn a_long_poll_whose_peer_is_gone_takes_no_batch(app: &mut TestApp) {
        let client = app.onboard("client", &["x"]).await;
        for _ in 0..10 {
            stays_pending("an empty inbox answered", client.get("/receive?wait=30").try_send()).await;
        }
        // The router may hear of a closed connection a moment later than it was closed.
        crate::support::eventually("the router knows that they are gone", Duration::from_secs(10), async || {
            let id = client.send("x", json!(1)).await;
            let came = client.receive("wait=2").await;
            came.iter().any(|envelope| envelope["id"] == json!(id)).then_some(())
        })
        .await;
        put_and_get_all(&client).await;
    }

    async fn manual_leases_until_settled(app: &mut TestApp) {
        let client = with_messages(app, 3).await;
        let leased = client.receive_exactly(3, "ack=manual&lease=3600").await;
        assert_eq!(messages(&leased), numbers(0..3));
        assert!(leased.iter().all(|envelope| envelope["deliveries"] == 1), "{leased:?}");
        assert!(client.receive("").await.is_empty(), "leased ones are not handed out again");
        let receipts = receipts(&leased);
        let answer = client.settle("/ack", &receipts[..2]).await;
        assert_eq!(answer, json!({"settled": 2, "unknown": []}));
        let answer = client.settle("/ack", &receipts[1..]).await;
        assert_eq!(answer, json!({"settled": 1, "unknown": [receipts[1]]}));
        client.wait_for_depth("inbox", 0).await;
    }

    async fn what_is_not_settled_in_time_comes_back(app: &mut TestApp) {
        let client = with_messages(app, 2).await;
        let since = Instant::now();
        let first = client.receive_exactly(2, "ack=manual&lease=1").await;
        let again = client.receive_exactly(2, "ack=manual&lease=3600").await;
        assert!(since.elapsed() >= Duration::from_secs(1), "came back after {:?}", since.elapsed());
        assert_eq!(messages(&again), numbers(0..2));
        assert!(again.iter().all(|envelope| envelope["deliveries"] == 2), "{again:?}");
        assert_eq!(first[0]["id"], again[0]["id"]);
        let late = receipts(&first);
        assert_eq!(client.settle("/ack", &late).await, json!({"settled": 0, "unknown": late}));
        assert_eq!(client.settle("/ack", &receipts(&again)).await["settled"], 2);
    }

    async fn nack_brings_it_back_at_once_later_or_never(app: &mut TestApp) {
        let client = with_messages(app, 1).await;
        let mut leased = client.receive_exactly(1, "ack=manual").await;
        assert_eq!(client.settle("/nack", &receipts(&leased)).await, json!({"settled": 1, "unknown": []}));
        leased = client.receive_exactly(1, "ack=manual").await;
        assert_eq!(leased[0]["deliveries"], 2);
        let since = Instant::now();
        let body = json!({"receipts": receipts(&leased), "delay_s": 1});
        assert_eq!(client.post("/nack").json(&body).send().await.ok(200)["settled"], 1);
        assert!(client.receive("").await.is_empty(), "it is delayed");
        leased = client.receive_exactly(1, "ack=manual").await;
        assert!(since.elapsed() >= Duration::from_secs(1), "came back after {:?}", since.elapsed());
        assert_eq!(leased[0]["deliveries"], 3);
        let body = json!({"receipts": receipts(&leased), "dead": true});
        assert_eq!(client.post("/nack").json(&body).send().await.ok(200)["settled"], 1);
        let dead = client.dead_letters(1).await;
        assert_eq!((&dead[0]["reason"], &dead[0]["queue"]), (&json!("rejected"), &json!("inbox")));
        assert_eq!((&dead[0]["envelope"]["id"], &dead[0]["attempts"]), (&leased[0]["id"], &json!(3)));
        client.wait_for_depth("inbox", 0).await;
    }

    async fn receipts_are_good_for_their_own_client_only(app: &mut TestApp) {
        let client = with_messages(app, 1).await;
        let other = app.onboard("other", &["x"]).await;
        let mine = receipts(&client.receive_exactly(1, "ack=manual").await);
        for path in ["/ack", "/nack"] {
            assert_eq!(other.settle(path, &mine).await, json!({"settled": 0, "unknown": mine}));
        }
        let made_up: Vec<String> = ["", "x", "0-0", "{}", "\u{1F600}"].map(str::to_owned).into();
        assert_eq!(client.settle("/ack", &made_up).await, json!({"settled": 0, "unknown": made_up}));
        assert_eq!(client.settle("/ack", &mine).await["settled"], 1);
    }

    async fn wrong_parameters_are_all_named(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        let receive = async |query: &str| client.get(&format!("/receive?{query}")).send().await;
        for max in ["0", "1001", "-1", "x", "1.5", "", "99999999999999999999"] {
            receive(&format!("max={max}")).await.names(&["max"]);
        }
        for wait in ["31", "-1", "x"] {
            receive(&format!("wait={wait}")).await.names(&["wait"]);
        }
        for lease in ["0", "3601", "x"] {
            receive(&format!("ack=manual&lease={lease}")).await.names(&["lease"]);
        }
        receive("max=0&wait=31&ack=perhaps&lease=0").await.names(&["max", "wait", "ack", "lease"]);
        receive("max=1&wait=0&ack=auto&lease=60&unknown=1").await.ok(200);
    }

    async fn wrong_bodies_of_ack_and_nack_are_named(app: &mut TestApp) {
        let client = app.onboard("client", &[]).await;
        let call = async |path: &str, body: Value| client.post(path).json(&body).send().await;
        for path in ["/ack", "/nack"] {
            call(path, json!({})).await.names(&["/receipts"]);
            call(path, json!({"receipts": "x"})).await.names(&["/receipts"]);
            call(path, json!({"receipts": ["x", 1, null]})).await.names(&["/receipts/1", "/receipts/2"]);
            call(path, json!([])).await.problem(422, "invalid");
            client.post(path).body("application/json", "{").send().await.problem(400, "invalid_json");
            client.post(path).body("text/plain", "{}").send().await.problem(415, "unsupported_media_type");
        }
        call("/nack", json!({"receipts": ["x"], "delay_s": -1, "dead": "yes"})).await.names(&["/delay_s", "/dead"]);
    }

    async fn a_long_poll_ends_when_a_webhook_is_set_and_takes_nothing_from_it(app: &mut TestApp) {
        let client = app.onboard("client", &["x"]).await;
        let polls = ["wait=30", "wait=30&ack=manual"].map(|query| client.get(&format!("/receive?{query}")).send());
        let mut polls = std::pin::pin!(futures_util::future::join_all(polls));
        stays_pending("an empty inbox answered", &mut polls).await;
        // Paused, nothing is pushed: what is sent then stays.
        app.patch("client", json!({"paused": true, "webhook": {"url": "http://127.0.0.1:47999/"}})).await;
        client.send("x", json!(1)).await;
        for answer in soon("the polls end", polls).await {
            answer.problem(409, "webhook_configured");
        }
        app.patch("client", json!({"webhook": null, "paused": false})).await;
        assert_eq!(messages(&client.receive_exactly(1, "").await), [json!(1)]);
    }

    async fn pulling_is_refused_while_a_webhook_is_set(app: &mut TestApp) {
        let client = with_messages(app, 1).await;
        // Nobody listens there, and nothing is retried within the test.
        let webhook = json!({"url": "http://127.0.0.1:47999/", "retry_schedule_s": [86400]});
        app.patch("client", json!({ "webhook": webhook })).await;
        client.get("/receive").send().await.problem(409, "webhook_configured");
        app.patch("client", json!({"webhook": {"enabled": false}})).await;
        assert!(client.receive("").await.len() <= 1, "switched off, it may be read");
        app.patch("client", json!({"webhook": null})).await;
        client.receive("").await;
    }

    async fn dead_letters_are_listed_replayed_and_purged(app: &mut TestApp) {
        let client = with_messages(app, 5).await;
        let other = app.onboard("other", &[]).await;
        let leased = client.receive_exactly(5, "ack=manual").await;
        let body = json!({"receipts": receipts(&leased), "dead": true});
        assert_eq!(client.post("/nack").json(&body).send().await.ok(200)["settled"], 5);
        let dead = client.dead_letters(5).await;
        assert_eq!(dead.iter().map(|dead| dead["envelope"]["message"].clone()).collect::<Vec<_>>(), numbers(0..5));
        for letter in &dead {
            assert!(letter["died_at"].as_str().is_some_and(|at| at.parse::<jiff::Timestamp>().is_ok()), "{letter}");
            assert!(letter["attempts"].is_u64() && letter.get("raw").is_none_or(Value::is_null), "{letter}");
        }
        let path = "/clients/client/dead-letters";
        let page = client.get(&format!("{path}?limit=2")).send().await.ok(200);
        assert_eq!(page["dead_letters"].as_array().map(Vec::len), Some(2));
        let next = page["next"].as_str().expect("there is more");
        let page = app.admin(Method::GET, &format!("{path}?limit=1000&after={next}")).send().await.ok(200);
        assert_eq!((page["dead_letters"].as_array().map(Vec::len), &page["next"]), (Some(3), &Value::Null));
        for limit in ["0", "1001", "x"] {
            client.get(&format!("{path}?limit={limit}")).send().await.names(&["limit"]);
        }
        other.get(path).send().await.problem(403, "forbidden");
        other.post(&format!("{path}/replay")).send().await.problem(403, "forbidden");
        other.call(Method::DELETE, path).send().await.problem(403, "forbidden");

        let ids = json!({"ids": [dead[1]["id"], dead[3]["id"], "no such id"]});
        let answer = client.post(&format!("{path}/replay")).json(&ids).send().await.ok(200);
        assert_eq!(answer, json!({"replayed": 2}));
        let mut back = messages(&client.receive_exactly(2, "").await);
        back.sort_by_key(Value::as_u64);
        assert_eq!(back, [json!(1), json!(3)]);
        assert_eq!(client.dead_letters(3).await.len(), 3);
        // Without a body: all of them.
        let answer = app.admin(Method::POST, &format!("{path}/replay")).send().await.ok(200);
        assert_eq!(answer, json!({"replayed": 3}));
        let leased = client.receive_exactly(3, "ack=manual").await;
        let body = json!({"receipts": receipts(&leased), "dead": true});
        client.post("/nack").json(&body).send().await.ok(200);
        client.dead_letters(3).await;
        assert_eq!(client.call(Method::DELETE, path).send().await.ok(200), json!({"purged": 3}));
        assert_eq!(client.call(Method::DELETE, path).send().await.ok(200), json!({"purged": 0}));
        client.wait_for_depth("dead", 0).await;
    }

    async fn order_holds_whatever_each_pull_asks_for(app: &mut TestApp) {
        let client = with_messages(app, 400).await;
        // Apart, as a client that looks now and then: what was read ahead for one pull goes back before the next.
        let mut rest = pace(Duration::from_millis(400));
        let mut next = 0;
        for max in [100, 10, 10, 60, 5, 200, 10] {
            rest.tick().await;
            let came = messages(&client.receive(&format!("max={max}")).await);
            assert_eq!(came, numbers(next..next + came.len()), "a pull of {max}");
            next += came.len();
        }
        assert_eq!(messages(&client.receive_exactly(400 - next, "").await), numbers(next..400));
    }

    async fn dead_letters_keep_their_order_however_they_are_listed(app: &mut TestApp) {
        let client = with_messages(app, 600).await;
        let leased = client.receive_exactly(600, "ack=manual").await;
        for some in receipts(&leased).chunks(200) {
            client.post("/nack").json(&json!({"receipts": some, "dead": true})).send().await.ok(200);
        }
        let mut place = HashMap::new();
        for dead in client.dead_letters_up_to(1000).await {
            place.insert(dead["id"].clone(), place.len());
        }
        assert_eq!(place.len(), 600);
        let places = async |limit: usize| -> Vec<usize> {
            client.dead_letters_up_to(limit).await.iter().map(|dead| place[&dead["id"]]).collect()
        };
        for limit in [10, 300, 10, 1000, 150, 10] {
            assert_eq!(places(limit).await, (0..limit.min(600)).collect::<Vec<_>>(), "a page of {limit}");
        }
        // And when some of them are gone from the middle.
        let path = "/clients/client/dead-letters";
        let middle: Vec<&Value> = place.iter().filter(|(_, at)| (100..150).contains(*at)).map(|(id, _)| id).collect();
        client.post(&format!("{path}/replay")).json(&json!({ "ids": middle })).send().await.ok(200);
        let left: Vec<usize> = (0..100).chain(150..600).collect();
        for limit in [120, 10, 1000] {
            assert_eq!(places(limit).await, left[..limit.min(550)], "a page of {limit}, later");
        }
    }

    async fn past_the_inbox_limit_the_oldest_become_dead_letters(app: &mut TestApp) {
        let sender = app.onboard("sender", &[]).await;
        let body = json!({"client_id": "small", "subscriptions": ["x"], "limits": {"max_inbox_messages": 3}});
        let small = app.onboard_with(body).await;
        let batch: Vec<_> = (0..10).map(|n| json!({"topic": "x", "message": n})).collect();
        sender.send_all(batch.into()).await;
        let dead = small.dead_letters(7).await;
        assert!(dead.iter().all(|dead| dead["reason"] == "inbox_full"), "{dead:?}");
        assert_eq!(dead.iter().map(|dead| dead["envelope"]["message"].clone()).collect::<Vec<_>>(), numbers(0..7));
        assert_eq!(messages(&small.receive_exactly(3, "").await), numbers(7..10));
    }

    async fn what_waits_too_long_expires(app: &mut TestApp) {
        let body = json!({"client_id": "client", "subscriptions": ["x"], "limits": {"inbox_ttl_s": 1}});
        let client = app.onboard_with(body).await;
        client.send("x", json!("too late")).await;
        let dead = client.dead_letters(1).await;
        assert_eq!((&dead[0]["reason"], &dead[0]["envelope"]["message"]), (&json!("expired"), &json!("too late")));
        assert!(client.receive("").await.is_empty());
        app.patch("client", json!({"limits": {"inbox_ttl_s": null}})).await;
        put(&client, 1).await;
        assert_eq!(client.receive_exactly(1, "").await.len(), 1);
    }
}

/// Nothing is held by anyone else.
async fn put_and_get_all(client: &Client) {
    while !client.receive("").await.is_empty() {}
    put(client, 20).await;
    assert_eq!(messages(&client.receive_exactly(20, "").await), numbers(0..20));
}
