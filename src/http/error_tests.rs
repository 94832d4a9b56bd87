use super::*;

fn shown(problem: &Problem) -> serde_json::Value {
    serde_json::from_slice(&problem.to_json("r-1")).expect("a problem is JSON")
}

#[test]
fn a_problem_has_every_member_that_rfc_9457_and_the_contract_name() {
    let mut errors = Errors::default();
    errors.add("/1/topic", "is required");
    let body = shown(&Problem::invalid(errors));
    for (member, value) in [("type", "about:blank"), ("code", "invalid"), ("request_id", "r-1")] {
        assert_eq!(body[member], value);
    }
    assert_eq!(body["status"], 422);
    assert!(body["title"].is_string() && body["detail"].is_string());
    assert_eq!(body["errors"], serde_json::json!([{"pointer": "/1/topic", "detail": "is required"}]));
}

#[test]
fn a_server_error_says_nothing_of_the_inside() {
    let cause = std::io::Error::other("secret path /var/lib");
    let error = BrokerError::new(BrokerErrorKind::Internal, "append to queue a-outbox").caused_by(cause);
    let problem = Problem::from(error);
    assert_eq!(problem.cause(), Some("append to queue a-outbox: secret path /var/lib"));
    let text = shown(&problem).to_string();
    assert!(!text.contains("outbox") && !text.contains("/var/lib"), "{text}");
}

#[test]
fn every_429_and_503_says_when_to_try_again() {
    for problem in [
        Problem::rate_limited("x", Duration::from_millis(1)),
        Problem::new(Code::RateLimited, "x"),
        Problem::broker_unavailable(),
        Problem::shutting_down(),
    ] {
        let retry = problem.headers().into_iter().find(|(name, _)| *name == "retry-after");
        assert!(retry.is_some_and(|(_, value)| value.parse::<u64>().is_ok_and(|s| s >= 1)), "{problem}");
    }
    let wait = Problem::rate_limited("x", Duration::from_millis(2100)).headers();
    assert_eq!(wait, [("retry-after", "3".to_owned())]);
}

#[test]
fn junk_by_the_million_is_counted_not_listed() {
    let mut errors = Errors::default();
    for n in 0..ERRORS_MAX + 5 {
        errors.add(format!("/{n}"), "must be an object");
    }
    let body = shown(&Problem::invalid(errors));
    assert_eq!(body["errors"].as_array().map(Vec::len), Some(ERRORS_MAX));
    assert!(body["detail"].as_str().is_some_and(|detail| detail.contains("there are 5 more")), "{body}");
}

#[test]
fn a_401_carries_a_challenge() {
    let names: Vec<_> = Problem::unauthorized(Challenge::BasicOrBearer).headers();
    assert_eq!(names.iter().filter(|(name, _)| *name == "www-authenticate").count(), 2);
}
