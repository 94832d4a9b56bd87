//! Query parameters: every wrong one is named; unknown ones are ignored.

use std::ops::RangeInclusive;

use actix_web::web;

use super::error::{Errors, Problem};

/// A request's query parameters, being read.
pub(crate) struct Query {
    pairs: Vec<(String, String)>,
    errors: Errors,
}

impl Query {
    /// Takes a query string apart (`application/x-www-form-urlencoded`).
    pub(crate) fn new(query: &str) -> Self {
        let pairs = if query.is_empty() {
            Vec::new()
        } else {
            web::Query::<Vec<(String, String)>>::from_query(query).map(web::Query::into_inner).unwrap_or_default()
        };
        Self { pairs, errors: Errors::default() }
    }

    /// The parameter's value; given twice, it is wrong.
    fn take(&mut self, name: &str) -> Option<String> {
        let mut values = self.pairs.iter().filter(|(given, _)| given == name).map(|(_, value)| value.clone());
        let first = values.next();
        if values.next().is_some() {
            self.errors.add(name, "is given more than once");
            return None;
        }
        first
    }

    /// A whole number within bounds.
    pub(crate) fn integer(&mut self, name: &str, range: RangeInclusive<u32>, default: u32) -> u32 {
        let Some(text) = self.take(name) else { return default };
        let number = text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten();
        match number {
            Some(number) if range.contains(&number) => number,
            _ => {
                self.errors.add(name, format!("must be a whole number, {} to {}", range.start(), range.end()));
                default
            }
        }
    }

    /// One of a few words.
    pub(crate) fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)], default: T) -> T {
        let Some(text) = self.take(name) else { return default };
        match choices.iter().find(|(word, _)| *word == text) {
            Some((_, value)) => *value,
            None => {
                let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
                self.errors.add(name, format!("must be {}", words.join(" or ")));
                default
            }
        }
    }

    /// Text as it is.
    pub(crate) fn text(&mut self, name: &str) -> Option<String> {
        self.take(name)
    }

    /// Text that must be read as something.
    pub(crate) fn parsed<T>(&mut self, name: &str, read: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        match read(&self.take(name)?) {
            Ok(value) => Some(value),
            Err(detail) => {
                self.errors.add(name, detail);
                None
            }
        }
    }

    /// A paging cursor, as a former page gave it.
    pub(crate) fn cursor(&mut self, name: &str, is_one: impl Fn(&str) -> bool) -> Option<String> {
        let text = self.take(name)?;
        if is_one(&text) {
            return Some(text);
        }
        self.errors.add(name, "must be the `next` of a former page");
        None
    }

    /// `Ok` when nothing was wrong.
    pub(crate) fn finish(self) -> Result<(), Problem> {
        self.errors.into_result()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(query: &str) -> Vec<String> {
        let mut query = Query::new(query);
        let max = query.integer("max", 1..=1000, 100);
        let mode = query.choice("ack", &[("auto", 'a'), ("manual", 'm')], 'a');
        assert!((1..=1000).contains(&max) && "am".contains(mode));
        query.errors.pointers().into_iter().map(str::to_owned).collect()
    }

    #[test]
    fn every_wrong_parameter_is_named() {
        assert_eq!(wrong("max=0&ack=Auto"), ["max", "ack"]);
        for text in ["max=1001", "max=", "max=-1", "max=%2B5", "max=1.5", "max=99999999999", "max=1&max=1", "max=a"] {
            assert_eq!(wrong(text), ["max"], "{text}");
        }
        for text in ["", "max=1", "max=1000&ack=manual", "other=x&other=y", "%ff=%ff&max=7"] {
            assert!(wrong(text).is_empty(), "{text}");
        }
    }
}
