//! placeholder
use std::collections::BTreeMap;
/// All patterns, shared by their words.
#[derive(Debug)]
pub struct Trie<K> {
    all: BTreeMap<String, Vec<K>>,
}
impl<K: Clone + Ord> Trie<K> {
    /// An empty trie.
    pub fn new() -> Self {
        Self { all: BTreeMap::new() }
    }
    /// Adds.
    pub fn insert(&mut self, pattern: &str, key: K) {
        self.all.entry(pattern.into()).or_default().push(key);
    }
    /// Removes.
    pub fn remove(&mut self, pattern: &str, key: &K) -> bool {
        if let Some(v) = self.all.get_mut(pattern) {
            let n = v.len();
            v.retain(|k| k != key);
            return v.len() != n;
        }
        false
    }
    /// Calls `found` once for each (pattern, key) whose pattern matches.
    pub fn for_each_match(&self, topic: &str, mut found: impl FnMut(K)) {
        fn m(p: &[&str], t: &[&str]) -> bool {
            match p.split_first() {
                None => t.is_empty(),
                Some((&"#", r)) => (0..=t.len()).any(|i| m(r, &t[i..])),
                Some((&"*", r)) => !t.is_empty() && m(r, &t[1..]),
                Some((w, r)) => t.first() == Some(w) && m(r, &t[1..]),
            }
        }
        let t: Vec<&str> = topic.split('.').collect();
        for (p, keys) in &self.all {
            let p: Vec<&str> = p.split('.').collect();
            if m(&p, &t) {
                for k in keys {
                    found(k.clone())
                }
            }
        }
    }
}
