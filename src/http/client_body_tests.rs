use serde_json::json;

use super::*;
use crate::http::error::Code;
use crate::time::Timestamp;

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => panic!("a test body is an object"),
    }
}

fn pointers(problem: &Problem) -> Vec<String> {
    assert_eq!(problem.code(), Code::Invalid);
    let body: Value = serde_json::from_slice(&problem.to_json("")).expect("a problem is JSON");
    let errors = body["errors"].as_array().cloned().unwrap_or_default();
    errors.iter().map(|error| error["pointer"].as_str().expect("a string").to_owned()).collect()
}

fn wrong(body: Value) -> Vec<String> {
    pointers(&create(&object(body), &[]).expect_err("invalid"))
}

fn record(webhook: Value) -> ClientRecord {
    let body = json!({"client_id": "a", "name": "A", "subscriptions": ["x.#"], "webhook": webhook,
        "limits": {"send_per_s": 5, "inbox_ttl_s": 60}});
    let made = create(&object(body), &[]).expect("valid");
    ClientRecord {
        client_id: made.client_id,
        name: made.name,
        subscriptions: made.subscriptions,
        webhook: made.webhook,
        limits: made.limits,
        paused: false,
        created_at: Timestamp::from_millis(0),
    }
}

fn patched(record: &ClientRecord, body: Value) -> PatchClient {
    patch(record, &object(body), &[]).expect("valid")
}

#[test]
fn the_least_and_the_most_that_a_client_can_be() {
    let least = create(&object(json!({"client_id": "a", "unknown": 1})), &[]).expect("valid");
    assert_eq!((least.name, least.subscriptions.len(), least.webhook), (None, 0, None));
    assert_eq!(least.limits, Limits::default());
    let most = json!({"client_id": "noc-c2", "name": null, "subscriptions": ["a.*", "#", "a.*"],
        "webhook": {"url": "https://example.org/hook", "headers": {"x-key": "v"}, "timeout_s": 20.0,
            "retry_schedule_s": [1, 2], "concurrency": 1, "rate_limit_per_s": null, "ordered": true},
        "limits": {"send_per_s": 1, "max_inbox_messages": 2, "inbox_ttl_s": null}});
    let most = create(&object(most), &[]).expect("valid");
    assert_eq!(most.subscriptions.iter().map(Pattern::as_str).collect::<Vec<_>>(), ["a.*", "#"]);
    let webhook = most.webhook.expect("there is one");
    assert_eq!((webhook.timeout_s, webhook.concurrency, webhook.ordered, webhook.enabled), (20, 1, true, true));
    assert_eq!(webhook.retry_schedule_s, [1, 2]);
    assert_eq!(most.limits, Limits { send_per_s: Some(1), max_inbox_messages: Some(2), inbox_ttl_s: None });
}

#[test]
fn every_wrong_member_is_named() {
    let body = json!({"client_id": "Bad", "name": 7, "subscriptions": ["a..b", "ok", 3],
        "webhook": {"url": 5, "headers": {"a/b": 1}, "timeout_s": 61, "retry_schedule_s": [-1], "concurrency": "8",
            "ordered": 1},
        "limits": {"send_per_s": 0, "max_inbox_messages": -1, "inbox_ttl_s": 1.5}});
    assert_eq!(
        wrong(body),
        [
            "/client_id",
            "/name",
            "/subscriptions/0",
            "/subscriptions/2",
            "/webhook/url",
            "/webhook/concurrency",
            "/webhook/headers/a~1b",
            "/webhook/retry_schedule_s/0",
            "/webhook/ordered",
            "/webhook/timeout_s",
            "/limits/send_per_s",
            "/limits/max_inbox_messages",
            "/limits/inbox_ttl_s"
        ]
    );
    assert_eq!(wrong(json!({})), ["/client_id"]);
    assert_eq!(wrong(json!({"client_id": "soar"})), ["/client_id"]);
    assert_eq!(wrong(json!({"client_id": "a", "webhook": {}})), ["/webhook/url"]);
    assert_eq!(wrong(json!({"client_id": "a", "webhook": {"url": "http://example.org/"}})), ["/webhook/url"]);
    let lists = json!({"client_id": null, "subscriptions": "a", "webhook": [], "limits": 1});
    assert_eq!(wrong(lists), ["/client_id", "/subscriptions", "/webhook", "/limits"]);
}

#[test]
fn merge_patch_is_rfc_7396s() {
    // The cases of its appendix A.
    for (target, patch, result) in [
        (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
        (json!({"a": "b"}), json!({"b": "c"}), json!({"a": "b", "b": "c"})),
        (json!({"a": "b"}), json!({"a": null}), json!({})),
        (json!({"a": "b", "b": "c"}), json!({"a": null}), json!({"b": "c"})),
        (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
        (json!({"a": "c"}), json!({"a": ["b"]}), json!({"a": ["b"]})),
        (json!({"a": {"b": "c"}}), json!({"a": {"b": "d", "c": null}}), json!({"a": {"b": "d"}})),
        (json!({"a": [{"b": "c"}]}), json!({"a": [1]}), json!({"a": [1]})),
        (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
        (json!({"a": "b"}), json!(["c"]), json!(["c"])),
        (json!({"a": "foo"}), json!(null), json!(null)),
        (json!({"a": "foo"}), json!("bar"), json!("bar")),
        (json!({"e": null}), json!({"a": 1}), json!({"e": null, "a": 1})),
        (json!([1, 2]), json!({"a": "b", "c": null}), json!({"a": "b"})),
        (json!({}), json!({"a": {"bb": {"ccc": null}}}), json!({"a": {"bb": {}}})),
    ] {
        let mut merged = target.clone();
        merge(&mut merged, &patch);
        assert_eq!(merged, result, "{target} with {patch}");
    }
}

#[test]
fn a_patch_changes_what_it_names() {
    let record = record(Value::Null);
    let patch = patched(&record, json!({"name": null, "limits": {"send_per_s": null, "max_inbox_messages": 9}}));
    assert_eq!(patch.name, Some(None));
    assert_eq!(patch.limits, Some(Limits { send_per_s: None, max_inbox_messages: Some(9), inbox_ttl_s: Some(60) }));
    assert!(patch.subscriptions.is_none() && patch.webhook.is_none() && patch.paused.is_none());
    let patch = patched(&record, json!({"subscriptions": null, "limits": null, "paused": true}));
    assert_eq!(patch.subscriptions.as_deref(), Some(&[][..]));
    assert_eq!(patch.limits, Some(Limits::default()));
    assert_eq!(patch.paused, Some(true));
}

#[test]
fn a_record_that_was_read_can_be_sent_back() {
    let record = record(json!({"url": "https://example.org/"}));
    let mut body = serde_json::to_value(&record).expect("a record is JSON");
    body["queues"] = json!({"inbox": 3});
    body["webhook"]["breaker"] = json!("closed");
    let patch = patched(&record, body);
    assert_eq!(patch.webhook, Some(record.webhook.clone()));
    assert_eq!(patch.limits, Some(record.limits.clone()));
    let other = super::patch(&record, &object(json!({"client_id": "b"})), &[]).expect_err("fixed");
    assert_eq!(pointers(&other), ["/client_id"]);
}

#[test]
fn a_webhook_is_merged_removed_and_switched() {
    let mut record = record(json!({"url": "https://example.org/", "timeout_s": 30, "headers": {"a": "1"}}));
    let merged = patched(&record, json!({"webhook": {"headers": {"a": null, "b": "2"}, "timeout_s": null}}));
    let webhook = merged.webhook.flatten().expect("there is one");
    assert_eq!((webhook.url.as_str(), webhook.timeout_s), ("https://example.org/", 15));
    assert_eq!(webhook.headers.into_iter().collect::<Vec<_>>(), [("b".to_owned(), "2".to_owned())]);
    assert_eq!(patched(&record, json!({"webhook": null})).webhook, Some(None));

    let off = patched(&record, json!({"webhook": {"enabled": false}})).webhook.flatten().expect("there is one");
    assert_eq!(off.disabled_reason.as_deref(), Some(SWITCHED_OFF));
    record.webhook = Some(Webhook { disabled_reason: Some("answered 410".into()), ..off });
    let still = patched(&record, json!({"webhook": {"timeout_s": 5}})).webhook.flatten().expect("there is one");
    assert_eq!(still.disabled_reason.as_deref(), Some("answered 410"));
    let on = patched(&record, json!({"webhook": {"enabled": true}})).webhook.flatten().expect("there is one");
    assert!(on.enabled && on.disabled_reason.is_none());
}

#[test]
fn what_a_patch_makes_wrong_is_named() {
    let record = record(Value::Null);
    let body = object(json!({"webhook": {"timeout_s": 5}, "limits": {"send_per_s": "x"}, "paused": "no"}));
    let problem = super::patch(&record, &body, &[]).expect_err("invalid");
    assert_eq!(pointers(&problem), ["/webhook/url", "/limits/send_per_s", "/paused"]);
}
