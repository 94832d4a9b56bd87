use serde_json::json;

use super::*;
use crate::http::error::Code;
use crate::topic::Topic;

const MESSAGE_BYTES_MAX: usize = 1000;

fn batch(kind: Kind) -> Batch {
    let sender = ClientId::parse("noc-c2").expect("test client");
    Batch::new(sender, kind, Timestamp::from_millis(0), None, MESSAGE_BYTES_MAX)
}

fn read(body: &str) -> Result<Checked, Problem> {
    let mut batch = batch(Kind::Topic);
    batch.json(body.as_bytes())?;
    batch.finish()
}

fn read_lines(body: &[u8]) -> Result<Checked, Problem> {
    let (mut batch, mut lines) = (batch(Kind::Topic), Lines::default());
    for chunk in body.chunks(7) {
        lines.feed(chunk, |line| batch.line(line))?;
    }
    lines.finish(|line| batch.line(line))?;
    batch.finish()
}

/// The pointers of a 422.
fn wrong(body: &str) -> Vec<String> {
    let problem = read(body).expect_err(body);
    assert_eq!(problem.code(), Code::Invalid, "{body}");
    pointers(&problem)
}

fn pointers(problem: &Problem) -> Vec<String> {
    let body: serde_json::Value = serde_json::from_slice(&problem.to_json("")).expect("a problem is JSON");
    let errors = body["errors"].as_array().cloned().unwrap_or_default();
    errors.iter().map(|error| error["pointer"].as_str().expect("a string").to_owned()).collect()
}

fn bodies(checked: &Checked) -> Vec<String> {
    checked.messages.iter().map(|m| String::from_utf8(m.body().to_vec()).expect("UTF-8")).collect()
}

#[test]
fn one_message_is_taken_byte_for_byte() {
    let checked = read(r#" {"x":[{}], "message" : {"b":1.0e0,  "a":[1 ,2]} ,"topic":"soar.noc"} "#).expect("valid");
    assert_eq!(bodies(&checked), [r#"{"b":1.0e0,  "a":[1 ,2]}"#]);
    assert_eq!(checked.messages[0].topic.as_ref().map(Topic::as_str), Some("soar.noc"));
    assert_eq!(checked.ids, format!("\"{}\"", checked.messages[0].id));
}

#[test]
fn an_array_keeps_its_order_and_its_ids() {
    let checked = read(r#"[{"topic":"a","message":1,"id":"x"},{"topic":"b","message":null,"id":"\"\\"}]"#);
    let checked = checked.expect("valid");
    assert_eq!(bodies(&checked), ["1", "null"]);
    let ids: Vec<String> = serde_json::from_str(&format!("[{}]", checked.ids)).expect("ids are JSON");
    assert_eq!(ids, ["x", "\"\\"]);
}

#[test]
fn ndjson_is_read_across_chunks_with_or_without_a_last_line_feed() {
    let text = "{\"topic\":\"a\",\"message\":\"ä\"}\r\n\n{\"topic\":\"b\",\"message\": [ 1 ]}";
    for body in [text.to_owned(), format!("{text}\n"), format!("\n{text}\n \n")] {
        assert_eq!(bodies(&read_lines(body.as_bytes()).expect("valid")), ["\"ä\"", "[ 1 ]"]);
    }
}

#[test]
fn every_wrong_field_is_named() {
    assert_eq!(wrong(r#"{}"#), ["/topic", "/message"]);
    assert_eq!(wrong(r#"{"topic":"a..b","id":"x.y"}"#), ["/topic", "/id", "/message"]);
    assert_eq!(wrong(r#"{"topic":7,"id":null,"message":1}"#), ["/topic", "/id"]);
    assert_eq!(wrong(r#"{"topic":["a"],"id":{},"message":1}"#), ["/topic", "/id"]);
    assert_eq!(wrong(r#"{"topic":"a","topic":"b","message":1}"#), ["/topic"]);
    assert_eq!(wrong(r#"[{"topic":"a","message":1},{"message":1},3,{"topic":"a"}]"#), ["/1/topic", "/2", "/3/message"]);
    let lines = b"{\"topic\":\"a\",\"message\":1}\n{\"topic\":\"\",\"message\":1}\n[]\n";
    assert_eq!(pointers(&read_lines(lines).expect_err("invalid")), ["/1/topic", "/2"]);
}

#[test]
fn wrong_json_types_are_invalid_and_an_empty_batch_too() {
    for body in ["[]", "null", "7", "-7", "1.5", "true", "\"x\"", "\"\\u0078\""] {
        assert_eq!(wrong(body), [""], "{body}");
    }
    assert_eq!(pointers(&read_lines(b"\n \n").expect_err("empty")), [""]);
}

#[test]
fn what_is_not_json_is_a_400() {
    for body in ["", " ", "{", "[{}", "{\"topic\":\"a\",\"message\":}", "[1,]", "{} {}", "{'a':1}", "[nul]"] {
        assert_eq!(read(body).expect_err(body).code(), Code::InvalidJson, "{body}");
    }
    let mut invalid_utf8 = b"{\"topic\":\"a\",\"x\":\"\xff\",\"message\":1}".to_vec();
    assert_eq!(batch(Kind::Topic).json(&invalid_utf8).expect_err("not UTF-8").code(), Code::InvalidJson);
    invalid_utf8.push(b'\n');
    assert_eq!(read_lines(&invalid_utf8).expect_err("not UTF-8").code(), Code::InvalidJson);
    assert_eq!(read_lines(b"{\"topic\":\"a\",\"message\":1}\n{\n").expect_err("cut").code(), Code::InvalidJson);
}

#[test]
fn a_message_at_the_limit_passes_and_one_beyond_is_413() {
    let of = |bytes: usize| json!({"topic": "a", "message": "x".repeat(bytes - 2)}).to_string();
    assert!(read(&of(MESSAGE_BYTES_MAX)).is_ok());
    for body in [of(MESSAGE_BYTES_MAX + 1), format!("[{},{{}}]", of(MESSAGE_BYTES_MAX + 1))] {
        assert_eq!(read(&body).expect_err("too long").code(), Code::TooLarge);
    }
}

#[test]
fn more_messages_than_a_request_may_have_are_413() {
    let body = format!("[{}]", vec![r#"{"topic":"a","message":1}"#; MESSAGES_MAX + 1].join(","));
    assert_eq!(read(&body).expect_err("too many").code(), Code::TooLarge);
    // What is wrong with them is the more useful answer.
    let junk = format!("[{}]", vec!["{}"; MESSAGES_MAX + 1].join(","));
    assert_eq!(read(&junk).expect_err("junk").code(), Code::Invalid);
}

#[test]
fn hostile_depth_is_refused_without_a_deep_stack() {
    let deep = |levels: usize| format!("{}{}", "[".repeat(levels), "]".repeat(levels));
    let of = |message: &str| format!(r#"{{"topic":"a","message":{message}}}"#);
    assert!(read(&of(&deep(128))[..]).is_ok());
    let mut big = batch(Kind::Topic);
    big.message_bytes_max = usize::MAX;
    let refused = big.json(of(&deep(2_000_000)).as_bytes()).expect_err("too deep");
    assert_eq!(refused.code(), Code::InvalidJson);
    // Where nothing is kept, nothing needs to be refused for its depth.
    let ignored = format!(r#"{{"topic":"a","message":1,"x":{}}}"#, deep(100_000));
    assert!(read(&ignored).is_ok());
    assert_eq!(read(&deep(100_000)).expect_err("not objects").code(), Code::Invalid);
}

#[test]
fn a_broadcast_has_no_topic_and_ignores_one() {
    let mut notify = batch(Kind::Broadcast);
    notify.json(br#"[{"message":1},{"message":2,"topic":7}]"#).expect("valid");
    let checked = notify.finish().expect("valid");
    assert!(checked.messages.iter().all(|message| message.topic.is_none()));
}
