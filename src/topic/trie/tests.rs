//! The trie against a matcher that is too simple to be wrong, and the work that it does.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// A pattern that the API may refuse: the trie agrees with RabbitMQ on those as well.
fn pattern(text: &str) -> Pattern {
    Pattern(text.into())
}

/// RabbitMQ's rules, written down.
fn naive(pattern: &str, topic: &str) -> bool {
    fn rest(pattern: &[&str], topic: &[&str]) -> bool {
        match pattern {
            [] => topic.is_empty(),
            ["#", after @ ..] => (0..=topic.len()).any(|skipped| rest(after, &topic[skipped..])),
            ["*", after @ ..] => !topic.is_empty() && rest(after, &topic[1..]),
            [word, after @ ..] => topic.first() == Some(word) && rest(after, &topic[1..]),
        }
    }
    let words = |text: &'static str| -> Vec<&'static str> {
        if text.is_empty() { Vec::new() } else { text.split('.').collect() }
    };
    // Leaking is the shortest way to a simple signature, and this is a test.
    let leak = |text: &str| -> &'static str { Box::leak(text.to_owned().into_boxed_str()) };
    rest(&words(leak(pattern)), &words(leak(topic)))
}

fn matches(trie: &Trie<u32>, topic: &str) -> Vec<(String, u32)> {
    let mut found = Vec::new();
    trie.for_each_match(topic, |pattern, key| found.push((pattern.to_string(), key)));
    found.sort();
    found
}

fn matches_one(text: &str, topic: &str) -> bool {
    let mut trie = Trie::new();
    trie.insert(&pattern(text), 0);
    !matches(&trie, topic).is_empty()
}

#[test]
fn rabbitmq_rules_by_example() {
    for (text, topic, expected) in [
        ("", "", true),
        ("", "a", false),
        ("", ".", false),
        ("a", "", false),
        ("#", "", true),
        ("#", ".", true),
        ("#", "a.b.c", true),
        ("*", "", false),
        ("*", "a", true),
        ("*", ".", false),
        ("*.*", ".", true),
        (".", ".", true),
        ("a.", "a.", true),
        ("a.", "a", false),
        ("a.*", "a.", true),
        ("a.#", "a", true),
        ("a.#", "a.", true),
        ("a.#", "ab", false),
        ("#.a", "a", true),
        ("#.a", "b.b.a", true),
        ("#.a", "a.b", false),
        ("#.a.#", "x.a.y", true),
        ("#.a.#", "x.y", false),
        ("*.#.*", "a", false),
        ("*.#.*", "a.b", true),
        ("#.#", "", true),
        ("a.#.b.#.c", "a.b.c", true),
        ("a.#.b.#.c", "a.x.b.y.z.c", true),
        ("a.#.b.#.c", "a.c.b", false),
        // Wildcards inside a word, and in a topic, are letters like others.
        ("a*", "ab", false),
        ("a*", "a*", true),
        ("##", "a", false),
        ("##", "##", true),
        ("a", "*", false),
        ("a", "#", false),
        ("*", "#", true),
        ("#.b", "#.b", true),
        ("é.*", "é.ü", true),
        ("A", "a", false),
    ] {
        assert_eq!(matches_one(text, topic), expected, "pattern {text:?}, topic {topic:?}");
        assert_eq!(naive(text, topic), expected, "the reference: pattern {text:?}, topic {topic:?}");
    }
}

#[test]
fn a_pair_is_held_once_and_found_once() {
    let mut trie = Trie::new();
    let text = pattern("#.a.#.a.#");
    assert!(trie.insert(&text, 1));
    assert!(!trie.insert(&text, 1));
    assert!(trie.insert(&text, 2));
    assert_eq!(trie.len(), 2);
    assert_eq!(matches(&trie, "a.a.a.a"), [("#.a.#.a.#".to_owned(), 1), ("#.a.#.a.#".to_owned(), 2)]);
    assert!(trie.remove(&text, &1));
    assert!(!trie.remove(&text, &1));
    assert!(!trie.remove(&pattern("#.a"), &2));
    assert_eq!(matches(&trie, "a.a").len(), 1);
    assert!(trie.remove(&text, &2));
    assert!(trie.is_empty());
}

#[test]
fn what_is_removed_leaves_no_node_no_edge_no_word() {
    let mut trie = Trie::new();
    trie.insert(&pattern("stays.*.here"), 0);
    let size = |trie: &Trie<u32>| (trie.nodes.len() - trie.free_nodes.len(), trie.edges.len(), trie.words.len());
    let before = size(&trie);
    let mut slots = 0;
    for round in 0..10 {
        for key in 0..100 {
            trie.insert(&pattern(&format!("stays.#.w{round}.{key}.*")), key);
        }
        for key in 0..100 {
            assert!(trie.remove(&pattern(&format!("stays.#.w{round}.{key}.*")), &key));
        }
        assert_eq!(size(&trie), before);
        assert!(round == 0 || trie.nodes.len() == slots, "freed nodes are used again");
        slots = trie.nodes.len();
    }
    assert_eq!(matches(&trie, "stays.still.here").len(), 1);
}

#[test]
fn work_does_not_grow_with_the_patterns_that_do_not_match() {
    let work = |patterns: u32| {
        let mut trie = Trie::new();
        for key in 0..patterns {
            trie.insert(&pattern(&format!("soar.noc.unit-{key}.#")), key);
            trie.insert(&pattern(&format!("#.of-{key}.*")), key);
        }
        let mut found = 0;
        let looked_at = trie.run("soar.noc.unit-7.status.of-3.now", |_, _| found += 1);
        assert_eq!(found, 2);
        looked_at
    };
    assert_eq!(work(10), work(10_000));
}

#[test]
fn many_hashes_do_not_explode() {
    let words = 60;
    let topic = vec!["a"; words].join(".");
    let hashes = pattern(&["#"; 50].join("."));
    let alternating = pattern(&["#", "a"].repeat(25).join("."));
    let missing = pattern(&format!("{}.z", ["#", "a"].repeat(25).join(".")));
    for (text, matched) in [(&hashes, 1), (&alternating, 1), (&missing, 0)] {
        let mut trie = Trie::new();
        trie.insert(text, 0);
        let mut found = 0;
        let looked_at = trie.run(&topic, |_, _| found += 1);
        assert_eq!(found, matched, "{text}");
        let bound = (words + 1) * trie.nodes.len();
        assert!(looked_at <= bound, "{text}: looked at {looked_at} nodes, at most {bound} allowed");
    }
}

#[test]
fn a_trailing_hash_costs_nothing_for_the_words_it_takes() {
    let mut trie = Trie::new();
    trie.insert(&pattern("a.#"), 0);
    let short = trie.run("a.b", |_, _| ());
    assert_eq!(trie.run(&format!("a{}", ".b".repeat(100)), |_, _| ()), short);
}

fn word() -> impl Strategy<Value = &'static str> {
    prop_oneof![3 => Just("a"), 2 => Just("b"), 1 => Just("c"), 1 => Just("")]
}

fn topic() -> impl Strategy<Value = String> {
    prop::collection::vec(word(), 0..7).prop_map(|words| words.join("."))
}

fn any_pattern() -> impl Strategy<Value = String> {
    let word = prop_oneof![3 => word(), 2 => Just("*"), 3 => Just("#")];
    prop::collection::vec(word, 0..7).prop_map(|words| words.join("."))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_pattern_matches_as_the_reference_does(text in any_pattern(), topic in topic()) {
        prop_assert_eq!(matches_one(&text, &topic), naive(&text, &topic));
    }

    /// After any sequence of insertions and removals the trie finds exactly what a plain set of pairs would.
    #[test]
    fn any_history_matches_as_a_set_of_pairs_does(
        steps in prop::collection::vec((any::<bool>(), any_pattern(), 0..3_u32), 0..60),
        topics in prop::collection::vec(topic(), 1..8),
    ) {
        let mut trie = Trie::new();
        let mut set = BTreeSet::new();
        for (insert, text, key) in steps {
            if insert {
                prop_assert_eq!(trie.insert(&pattern(&text), key), set.insert((text, key)));
            } else {
                // Half of the removals name what is there; a random pattern seldom does.
                let pair = set.iter().nth(key as usize).cloned().unwrap_or((text, key));
                prop_assert_eq!(trie.remove(&pattern(&pair.0), &pair.1), set.remove(&pair));
            }
            prop_assert_eq!(trie.len(), set.len());
        }
        for topic in topics {
            let expected: Vec<_> = set.iter().filter(|(text, _)| naive(text, &topic)).cloned().collect();
            let words = topic.split('.').count() + 1;
            prop_assert_eq!(matches(&trie, &topic), expected);
            prop_assert!(trie.run(&topic, |_, _| ()) <= words * trie.nodes.len());
        }
        for (text, key) in set {
            prop_assert!(trie.remove(&pattern(&text), &key));
        }
        prop_assert_eq!(trie.nodes.len(), 1);
        prop_assert!(trie.edges.is_empty() && trie.words.is_empty());
    }
}
