//! Every pattern in one trie, so that a message costs by its words and its matches, not by the number of patterns.
//!
//! The rules are those of RabbitMQ's topic exchange (`rabbit_exchange_type_topic`): words are what lies between dots,
//! the empty key has no words (and `.` has two empty ones), `*` is exactly one word, `#` is zero or more, and both are
//! wildcards only as whole words.
//!
//! A topic is matched as a nondeterministic automaton is run: a set of nodes moves on word by word, and no node is in
//! the set twice. So the work is at most words × nodes reached, however many `#` there are; following one `#` after
//! the other by recursion would multiply them instead.
//!
//! Nodes lie in one vector and all edges in one map, because a map for each node would cost more than what is in it.
//! Words are interned: a topic's word is hashed once, and one that no pattern has cannot follow an edge at all.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

use super::Pattern;

/// Index of a node.
type NodeId = u32;

/// Number of an interned word.
type WordId = u32;

/// The node of the pattern without words.
const ROOT: NodeId = 0;

/// In place of a child: there is none. The root is nobody's child.
const NONE: NodeId = ROOT;

/// All patterns with their keys, shared by their words. A (pattern, key) pair is in it once.
#[derive(Debug, Clone)]
pub struct Trie<K> {
    nodes: Vec<Node<K>>,
    /// Nodes to use again.
    free_nodes: Vec<NodeId>,
    /// From a node by a word that is no wildcard.
    edges: HashMap<(NodeId, WordId), NodeId, BuildHasherDefault<PairHasher>>,
    words: HashMap<Box<str>, Word>,
    /// Word numbers to use again.
    free_words: Vec<WordId>,
    /// Pairs of pattern and key.
    len: usize,
}

#[derive(Debug, Clone)]
struct Node<K> {
    /// Child by `*`.
    star: NodeId,
    /// Child by `#`.
    hash: NodeId,
    /// How many edges leave it by a word: none, and nothing needs to be looked up.
    literals: u32,
    /// Whether there is a `#` above it. A node without is reached at one position of a topic only.
    below_hash: bool,
    /// What ends here; boxed, because most nodes are on the way only.
    end: Option<Box<End<K>>>,
}

#[derive(Debug, Clone)]
struct End<K> {
    pattern: Pattern,
    /// Sorted, so that the 10,000th client with the same pattern is found as fast as the first.
    keys: Vec<K>,
}

#[derive(Debug, Clone, Copy)]
struct Word {
    id: WordId,
    /// Edges that carry it; it is forgotten with the last.
    edges: u32,
}

impl<K> Node<K> {
    fn new(below_hash: bool) -> Self {
        Self { star: NONE, hash: NONE, literals: 0, below_hash, end: None }
    }

    fn is_leaf(&self) -> bool {
        self.star == NONE && self.hash == NONE && self.literals == 0
    }
}

impl<K: Copy + Ord> Default for Trie<K> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: Copy + Ord> Trie<K> {
    /// An empty trie.
    pub fn new() -> Self {
        Self {
            nodes: vec![Node::new(false)],
            free_nodes: Vec::new(),
            edges: HashMap::default(),
            words: HashMap::new(),
            free_words: Vec::new(),
            len: 0,
        }
    }

    /// How many pairs of pattern and key it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a pair. False if it was there.
    pub fn insert(&mut self, pattern: &Pattern, key: K) -> bool {
        let mut at = ROOT;
        for word in split(pattern.as_str()) {
            at = self.child_or_new(at, word);
        }
        let end = self.node_mut(at).end.get_or_insert_with(|| {
            // Room for one: most patterns have one client.
            Box::new(End { pattern: pattern.clone(), keys: Vec::with_capacity(1) })
        });
        let Err(place) = end.keys.binary_search(&key) else { return false };
        end.keys.insert(place, key);
        self.len += 1;
        true
    }

    /// Removes a pair and what only it needed. False if it was not there.
    pub fn remove(&mut self, pattern: &Pattern, key: &K) -> bool {
        let mut path = Vec::new();
        let mut at = ROOT;
        for word in split(pattern.as_str()) {
            let Some(child) = self.child(at, word) else { return false };
            path.push((at, word, child));
            at = child;
        }
        let node = self.node_mut(at);
        let Some(end) = &mut node.end else { return false };
        let Ok(place) = end.keys.binary_search(key) else { return false };
        end.keys.remove(place);
        if end.keys.is_empty() {
            node.end = None;
        }
        self.len -= 1;
        if self.len == 0 {
            // Hands the memory back as well.
            *self = Self::new();
            return true;
        }
        for (parent, word, child) in path.into_iter().rev() {
            let node = self.node(child);
            if node.end.is_some() || !node.is_leaf() {
                break;
            }
            self.cut(parent, word);
            self.free_nodes.push(child);
        }
        true
    }

    /// Calls `found` once for each pair whose pattern matches `topic`. A key that several patterns have is found with
    /// each of them: only the caller knows cheaply which of its keys it has seen for a message.
    pub fn for_each_match(&self, topic: &str, found: impl FnMut(&Pattern, K)) {
        self.run(topic, found);
    }

    /// As [`Trie::for_each_match`]; returns how many nodes were looked at, over all positions.
    fn run(&self, topic: &str, found: impl FnMut(&Pattern, K)) -> usize {
        let mut run = Run { trie: self, found, here: Vec::new(), hashes: Vec::new(), entered: HashSet::default() };
        let mut looked_at = 1;
        run.enter(ROOT);
        let mut before = Vec::new();
        for word in split(topic) {
            std::mem::swap(&mut before, &mut run.here);
            run.here.clear();
            let word = self.words.get(word).map(|word| word.id);
            // Those that this very word reaches do not consume it again.
            let hashes = run.hashes.len();
            looked_at += before.len() + hashes;
            if before.is_empty() && hashes == 0 {
                return looked_at;
            }
            for &from in &before {
                run.follow(from, word);
            }
            for index in 0..hashes {
                run.follow(run.hashes[index], word);
            }
        }
        for index in 0..run.here.len() {
            run.report(run.here[index]);
        }
        looked_at + run.here.len()
    }

    fn node(&self, id: NodeId) -> &Node<K> {
        &self.nodes[id as usize]
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node<K> {
        &mut self.nodes[id as usize]
    }

    fn child(&self, parent: NodeId, word: &str) -> Option<NodeId> {
        match word {
            "*" => Some(self.node(parent).star).filter(|&child| child != NONE),
            "#" => Some(self.node(parent).hash).filter(|&child| child != NONE),
            _ => self.edges.get(&(parent, self.words.get(word)?.id)).copied(),
        }
    }

    fn child_or_new(&mut self, parent: NodeId, word: &str) -> NodeId {
        if let Some(child) = self.child(parent, word) {
            return child;
        }
        let node = Node::new(self.node(parent).below_hash || word == "#");
        let child = match self.free_nodes.pop() {
            Some(id) => {
                *self.node_mut(id) = node;
                id
            }
            None => {
                let id = NodeId::try_from(self.nodes.len()).expect("2^32 nodes would not fit into memory");
                self.nodes.push(node);
                id
            }
        };
        match word {
            "*" => self.node_mut(parent).star = child,
            "#" => self.node_mut(parent).hash = child,
            _ => {
                let word = self.intern(word);
                self.edges.insert((parent, word), child);
                self.node_mut(parent).literals += 1;
            }
        }
        child
    }

    /// Number of a word that one more edge will carry.
    fn intern(&mut self, word: &str) -> WordId {
        if let Some(known) = self.words.get_mut(word) {
            known.edges += 1;
            return known.id;
        }
        let id = self.free_words.pop().unwrap_or_else(|| {
            // Without free numbers, exactly those below the count are taken.
            WordId::try_from(self.words.len()).expect("2^32 words would not fit into memory")
        });
        self.words.insert(word.into(), Word { id, edges: 1 });
        id
    }

    /// Takes away the edge from `parent` by `word`.
    fn cut(&mut self, parent: NodeId, word: &str) {
        match word {
            "*" => self.node_mut(parent).star = NONE,
            "#" => self.node_mut(parent).hash = NONE,
            _ => {
                let known = self.words.get_mut(word).expect("an edge's word is interned");
                let id = known.id;
                known.edges -= 1;
                if known.edges == 0 {
                    self.words.remove(word);
                    self.free_words.push(id);
                }
                self.edges.remove(&(parent, id));
                self.node_mut(parent).literals -= 1;
            }
        }
    }
}

/// The words of a topic or a pattern, as RabbitMQ splits them: none in the empty one.
fn split(text: &str) -> impl Iterator<Item = &str> {
    text.split('.').filter(move |_| !text.is_empty())
}

/// One topic on its way through the trie.
struct Run<'a, K, F> {
    trie: &'a Trie<K>,
    found: F,
    /// Nodes reached by exactly the words so far. None twice: each has one parent, and one edge from it.
    here: Vec<NodeId>,
    /// Nodes of a `#` with children: once entered they stay, for they take any word.
    hashes: Vec<NodeId>,
    /// Nodes of a `#` below another one that were entered: only these can be entered at several positions.
    entered: HashSet<NodeId, BuildHasherDefault<PairHasher>>,
}

impl<K: Copy + Ord, F: FnMut(&Pattern, K)> Run<'_, K, F> {
    /// Moves on from a node by a word (`None`: one that no pattern has).
    fn follow(&mut self, from: NodeId, word: Option<WordId>) {
        let node = self.trie.node(from);
        if let Some(word) = word.filter(|_| node.literals > 0)
            && let Some(&child) = self.trie.edges.get(&(from, word))
        {
            self.enter(child);
        }
        if node.star != NONE {
            self.enter(node.star);
        }
    }

    /// Arrives at a node, and at the `#` after it, which may be zero words.
    fn enter(&mut self, id: NodeId) {
        self.here.push(id);
        let mut parent = self.trie.node(id);
        while parent.hash != NONE {
            let id = parent.hash;
            if parent.below_hash && !self.entered.insert(id) {
                return;
            }
            // Whatever words follow, it takes them: it has matched.
            self.report(id);
            parent = self.trie.node(id);
            if !parent.is_leaf() {
                self.hashes.push(id);
            }
        }
    }

    fn report(&mut self, id: NodeId) {
        if let Some(end) = &self.trie.node(id).end {
            for &key in &end.keys {
                (self.found)(&end.pattern, key);
            }
        }
    }
}

/// Hashes the few `u32`s of an edge. They are numbers that the trie itself gives out, so nobody can choose colliding
/// ones, and the keyed hash of the standard library would be most of a lookup's cost.
#[derive(Default)]
struct PairHasher(u64);

impl Hasher for PairHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u32(byte.into()));
    }

    fn write_u32(&mut self, number: u32) {
        // Multiplication by an odd constant (2^64 divided by the golden ratio) spreads the low bits upwards…
        self.0 = (self.0.rotate_left(32) ^ u64::from(number)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn finish(&self) -> u64 {
        // …and the map takes its bucket from the low ones.
        self.0 ^ (self.0 >> 32)
    }
}

#[cfg(test)]
mod tests;
