//! G4 exchanges.

use std::collections::BTreeMap;
use std::time::Duration;

use backbone::broker::{PullMode, Queue, Target};
use backbone::topic::{Pattern, Topic};

use crate::support::env::{bodies, message, numbers};
use crate::support::{BrokerEnv, stays_pending};

broker_tests! {
    async fn g4_every_matching_inbox_gets_one_copy(env: &mut BrokerEnv) {
        let sender = env.client("sender", &[]).await;
        let patterns: [(&str, &[&str]); 9] = [
            ("all", &["#"]),
            ("noc", &["soar.noc.#"]),
            ("noc-units", &["soar.noc.*.*"]),
            ("one", &["soar.noc.slocum.unit-397"]),
            ("overlapping", &["soar.#", "#.unit-397", "soar.noc.*.unit-397", "soar.noc.slocum.unit-397"]),
            ("two-words", &["*.*"]),
            ("middle", &["#.slocum.#"]),
            ("other", &["rutgers.#"]),
            ("none", &[]),
        ];
        let mut inboxes = BTreeMap::new();
        for (name, patterns) in patterns {
            inboxes.insert(name, env.client(name, patterns).await);
        }
        let topics = ["soar.noc.slocum.unit-397", "soar.noc", "soar", "slocum", "rutgers.a.b.c", "soar.noc.slocum.x"];
        let messages: Vec<_> = topics.iter().map(|topic| message(&sender, Some(topic), &format!("\"{topic}\""))).collect();
        env.publish(&Queue::Publish, messages).await;
        env.forward(&Queue::Publish, Target::Topic, topics.len()).await;
        for (name, patterns) in patterns {
            let matching: Vec<String> = topics
                .iter()
                .filter(|topic| {
                    let topic = Topic::parse(topic).expect("a topic");
                    patterns.iter().any(|pattern| Pattern::parse(pattern).expect("a pattern").matches(&topic))
                })
                .map(|topic| format!("\"{topic}\""))
                .collect();
            let came = env.pull_exactly(&inboxes[name], matching.len(), PullMode::Auto).await;
            assert_eq!(bodies(&came), matching, "{name}");
            assert!(env.drain(&inboxes[name]).await.is_empty(), "{name} got more");
        }
        assert_eq!(env.internal_depth("soar-unrouted").await, 0);
    }

    async fn g4_what_matches_nobody_is_kept_as_unrouted(env: &mut BrokerEnv) {
        let a = env.client("a", &["x.y"]).await;
        env.route(&a, "x", &["0"]).await;
        env.route(&a, "x.y.z", &["1"]).await;
        env.route(&a, "x.y", &["2"]).await;
        assert_eq!(bodies(&env.pull_exactly(&a, 1, PullMode::Auto).await), ["2"]);
        let mut consumer = env.consume(&Queue::Unrouted, 10).await;
        let kept = crate::support::env::next_exactly(&mut consumer, 2).await;
        assert_eq!(crate::support::env::delivered_bodies(&kept), ["0", "1"]);
        stays_pending("what was routed is unrouted too", consumer.next(1)).await;
    }

    async fn g4_a_broadcast_reaches_every_inbox_once(env: &mut BrokerEnv) {
        let sender = env.client("sender", &[]).await;
        let mut inboxes = vec![sender.clone()];
        for (name, patterns) in [("deaf", &[][..]), ("one", &["x"]), ("all", &["#", "*"])] {
            inboxes.push(env.client(name, patterns).await);
        }
        let notify = Queue::Notify(sender.clone());
        env.publish(&notify, (0..3).map(|n| message(&sender, None, &n.to_string())).collect()).await;
        env.forward(&notify, Target::Broadcast, 3).await;
        for inbox in &inboxes {
            let came = env.pull_exactly(inbox, 3, PullMode::Auto).await;
            assert_eq!(bodies(&came), numbers(3), "{inbox}");
            assert!(came.iter().all(|pulled| pulled.message.topic.is_none() && pulled.message.sender == sender));
            assert!(env.drain(inbox).await.is_empty(), "{inbox} got more");
        }
        assert_eq!(env.internal_depth("soar-unrouted").await, 0);
    }

    async fn g4_bindings_count_from_when_they_are_made_to_when_they_are_gone(env: &mut BrokerEnv) {
        let a = env.client("a", &["x.*"]).await;
        env.route(&a, "x.1", &["0"]).await;
        env.bind(&a, &["y.*", "z.*"]).await;
        env.route(&a, "x.1", &["1"]).await;
        env.route(&a, "y.1", &["2"]).await;
        env.bind(&a, &["z.*"]).await;
        env.route(&a, "y.1", &["3"]).await;
        env.route(&a, "z.1", &["4"]).await;
        env.bind(&a, &[]).await;
        env.route(&a, "z.1", &["5"]).await;
        assert_eq!(bodies(&env.pull_exactly(&a, 3, PullMode::Auto).await), ["0", "2", "4"]);
        assert!(env.drain(&a).await.is_empty());
        assert_eq!(env.internal_depth("soar-unrouted").await, 3);
    }

    async fn g4_copies_live_and_die_apart(env: &mut BrokerEnv) {
        let (a, b) = (env.client("a", &["x"]).await, env.client("b", &["x"]).await);
        env.route(&a, "x", &["0", "1"]).await;
        assert_eq!(env.pull_exactly(&a, 2, PullMode::Auto).await.len(), 2);
        env.restart().await;
        assert!(env.pull(&a, 10, Duration::ZERO, PullMode::Auto).await.is_empty());
        let theirs = env.pull_exactly(&b, 2, PullMode::Auto).await;
        assert_eq!(bodies(&theirs), ["0", "1"]);
        env.broker().delete_client(&a).await.expect("deletes");
        env.route(&b, "x", &["2"]).await;
        assert_eq!(bodies(&env.pull_exactly(&b, 1, PullMode::Auto).await), ["2"]);
    }

    async fn g4_the_same_message_has_the_same_id_in_every_inbox(env: &mut BrokerEnv) {
        let sent = message(&env.client("a", &["x"]).await, Some("x"), r#"{"n":1}"#);
        let b = env.client("b", &["#"]).await;
        env.publish(&Queue::Publish, vec![sent.clone()]).await;
        env.forward(&Queue::Publish, Target::Topic, 1).await;
        for inbox in [&sent.sender, &b] {
            let came = env.pull_exactly(inbox, 1, PullMode::Auto).await.remove(0);
            assert_eq!(*came.message, sent);
        }
    }
}
