//! Members of a JSON object, read one by one, so that every wrong one is named.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::Errors;

/// An object's members, and where what is wrong with them is noted.
pub(crate) struct Fields<'a> {
    object: &'a Map<String, Value>,
    at: &'a str,
    errors: &'a mut Errors,
}

impl<'a> Fields<'a> {
    /// The members of the object that the JSON pointer `at` points to.
    pub(crate) fn new(object: &'a Map<String, Value>, at: &'a str, errors: &'a mut Errors) -> Self {
        Self { object, at, errors }
    }

    pub(crate) fn errors(&mut self) -> &mut Errors {
        self.errors
    }

    pub(crate) fn wrong(&mut self, name: &str, detail: impl Into<String>) {
        self.errors.add(format!("{}/{name}", self.at), detail);
    }

    /// The member as it stands.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name)
    }

    /// The member, which must be there.
    pub(crate) fn required(&mut self, name: &str) -> Option<&'a Value> {
        let value = self.object.get(name);
        if value.is_none() {
            self.wrong(name, "is required");
        }
        value
    }

    /// A text of at most `chars_max` characters, when it is there.
    pub(crate) fn text(&mut self, name: &str, chars_max: usize) -> Option<&'a str> {
        match self.object.get(name)? {
            Value::String(text) if text.chars().count() <= chars_max => Some(text),
            Value::String(_) => {
                self.wrong(name, format!("must not be longer than {chars_max} characters"));
                None
            }
            _ => {
                self.wrong(name, "must be a string");
                None
            }
        }
    }

    pub(crate) fn boolean(&mut self, name: &str) -> Option<bool> {
        let value = self.object.get(name)?;
        let boolean = value.as_bool();
        if boolean.is_none() {
            self.wrong(name, "must be true or false");
        }
        boolean
    }

    /// A whole number within bounds, when it is there.
    pub(crate) fn integer(&mut self, name: &str, range: RangeInclusive<u64>) -> Option<u64> {
        let value = self.object.get(name)?;
        let number = whole(value).filter(|number| range.contains(number));
        if number.is_none() {
            self.wrong(name, format!("must be a whole number, {} to {}", range.start(), range.end()));
        }
        number
    }
}

/// A whole number, also written as `1.0` or `1e3`, which JSON Schema calls an integer too.
pub(crate) fn whole(value: &Value) -> Option<u64> {
    /// Up to here every whole number has its own `f64`.
    const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
    value.as_u64().or_else(|| {
        let number = value.as_f64()?;
        (number.fract() == 0.0 && (0.0..=EXACT_MAX).contains(&number)).then_some(number as u64)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn whole_numbers_come_in_several_spellings() {
        for (value, number) in [(json!(7), Some(7)), (json!(7.0), Some(7)), (json!(1e3), Some(1000))] {
            assert_eq!(whole(&value), number, "{value}");
        }
        for value in [json!(-1), json!(1.5), json!("7"), json!(1e300), json!(null), json!([7]), json!(true)] {
            assert_eq!(whole(&value), None, "{value}");
        }
    }
}
