//! Topics, patterns, and the trie that matches one against all the others.
//!
//! The API admits less than the matcher can do: [`Topic`] and [`Pattern`] refuse empty words, the trie does not, because
//! it must agree with RabbitMQ's topic exchange to the letter.

mod trie;

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use trie::Trie;

/// Longest topic or pattern in bytes: AMQP 0-9-1's short string, which carries a routing key.
pub const MAX_TOPIC_BYTES: usize = 255;

/// Most `#` in one pattern: each may match any number of words, so they multiply the work of a match.
pub const MAX_HASHES: usize = 2;

/// A topic: dot-separated words of `A-Z a-z 0-9 _ -`, at most 255 bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Topic(Arc<str>);

/// A topic in which a word may be `*` (exactly one word) or `#` (zero or more words).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Pattern(Arc<str>);

/// Why a string is not a [`Topic`] or not a [`Pattern`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// It is empty or longer than [`MAX_TOPIC_BYTES`].
    #[error("must be 1 to {MAX_TOPIC_BYTES} bytes long, is {0}")]
    Length(usize),
    /// Two dots in a row, or a dot at an end.
    #[error("must not have an empty word (a dot at an end, or two in a row)")]
    EmptyWord,
    /// A character outside `A-Z a-z 0-9 _ -`.
    #[error("has '{0}'; a word is made of A-Z a-z 0-9 _ -")]
    Character(char),
    /// `*` or `#` as part of a longer word, where RabbitMQ would take it literally.
    #[error("has '{0}' inside a word; a wildcard stands alone between dots")]
    WildcardInWord(char),
    /// More than [`MAX_HASHES`] words are `#`.
    #[error("has more than {MAX_HASHES} '#'")]
    TooManyHashes,
}

fn check(text: &str, wildcards: bool) -> Result<(), TopicError> {
    if text.is_empty() || text.len() > MAX_TOPIC_BYTES {
        return Err(TopicError::Length(text.len()));
    }
    let mut hashes = 0;
    for word in text.split('.') {
        if word.is_empty() {
            return Err(TopicError::EmptyWord);
        }
        if wildcards && (word == "*" || word == "#") {
            hashes += usize::from(word == "#");
            continue;
        }
        if let Some(bad) = word.chars().find(|c| !(c.is_ascii_alphanumeric() || *c == '_' || *c == '-')) {
            let wildcard = wildcards && (bad == '*' || bad == '#');
            return Err(if wildcard { TopicError::WildcardInWord(bad) } else { TopicError::Character(bad) });
        }
    }
    if hashes > MAX_HASHES { Err(TopicError::TooManyHashes) } else { Ok(()) }
}

macro_rules! checked_text {
    ($name:ident, $wildcards:expr) => {
        impl $name {
            /// Parses it.
            ///
            /// # Errors
            /// [`TopicError`] says which rule is broken.
            pub fn parse(text: &str) -> Result<Self, TopicError> {
                check(text, $wildcards)?;
                Ok(Self(text.into()))
            }

            /// As text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                Self::parse(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
            }
        }
    };
}

checked_text!(Topic, false);
checked_text!(Pattern, true);

impl Pattern {
    /// Whether it matches `topic`, by RabbitMQ's rules. For one pattern; [`Trie`] matches many at once.
    pub fn matches(&self, topic: &Topic) -> bool {
        let mut trie = Trie::new();
        trie.insert(self, ());
        let mut found = false;
        trie.for_each_match(topic.as_str(), |_, ()| found = true);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_are_words_between_dots() {
        for good in ["a", "soar.noc.slocum.unit-397", "A_b.0", &"x".repeat(255)] {
            assert!(Topic::parse(good).is_ok(), "{good}");
        }
        for (bad, why) in [
            ("", TopicError::Length(0)),
            (".a", TopicError::EmptyWord),
            ("a..b", TopicError::EmptyWord),
            ("a.", TopicError::EmptyWord),
            ("a b", TopicError::Character(' ')),
            ("a.*", TopicError::Character('*')),
            ("é", TopicError::Character('é')),
        ] {
            assert_eq!(Topic::parse(bad), Err(why), "{bad}");
        }
        assert_eq!(Topic::parse(&"x".repeat(256)), Err(TopicError::Length(256)));
    }

    #[test]
    fn patterns_take_wildcards_as_whole_words() {
        for good in ["#", "*", "a.*.#", "#.a.#"] {
            assert!(Pattern::parse(good).is_ok(), "{good}");
        }
        assert_eq!(Pattern::parse("a.b*"), Err(TopicError::WildcardInWord('*')));
        assert_eq!(Pattern::parse("#.#.#"), Err(TopicError::TooManyHashes));
    }
}
