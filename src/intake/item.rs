//! One message as it stands in a request body, taken apart without copying and without judging it.

use std::borrow::Cow;
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// Deepest nesting of a `message`, in levels. Most JSON readers, serde_json among them, stop at about as much, so that
/// what is accepted can be read by who receives it.
const DEPTH_MAX: usize = 128;

/// The members of a message that the backbone knows, as raw JSON; or what is not an object at all.
#[derive(Debug)]
pub(crate) enum Item<'a> {
    Object(Members<'a>),
    NotAnObject,
}

/// See [`Item`]. Unknown members are ignored.
#[derive(Debug, Default)]
pub(crate) struct Members<'a> {
    pub(crate) topic: Option<&'a RawValue>,
    pub(crate) id: Option<&'a RawValue>,
    pub(crate) message: Option<&'a RawValue>,
    /// Names of known members that stand there more than once.
    pub(crate) repeated: Vec<&'static str>,
}

enum Member {
    Topic,
    Id,
    Message,
    Other,
}

impl<'de> Deserialize<'de> for Member {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;
        impl Visitor<'_> for Name {
            type Value = Member;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a member name")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Member, E> {
                Ok(match name {
                    "topic" => Member::Topic,
                    "id" => Member::Id,
                    "message" => Member::Message,
                    _ => Member::Other,
                })
            }
        }
        deserializer.deserialize_identifier(Name)
    }
}

/// Reads an [`Item`]; also used for the one message that is a whole body.
pub(crate) struct ItemVisitor;

impl<'de> Visitor<'de> for ItemVisitor {
    type Value = Item<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut members = Members::default();
        while let Some(name) = map.next_key()? {
            let (slot, name) = match name {
                Member::Topic => (&mut members.topic, "topic"),
                Member::Id => (&mut members.id, "id"),
                Member::Message => (&mut members.message, "message"),
                Member::Other => {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            if slot.replace(map.next_value()?).is_some() {
                members.repeated.push(name);
            }
        }
        members.repeated.sort_unstable();
        members.repeated.dedup();
        Ok(Item::Object(members))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Item::NotAnObject)
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Item::NotAnObject)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(Item::NotAnObject)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self::Value, E> {
        Ok(Item::NotAnObject)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self::Value, E> {
        Ok(Item::NotAnObject)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self::Value, E> {
        Ok(Item::NotAnObject)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self::Value, E> {
        Ok(Item::NotAnObject)
    }
}

impl<'de> Deserialize<'de> for Item<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ItemVisitor)
    }
}

/// The text of a raw JSON string; `None` when it is another type, or no text (a lone surrogate).
pub(crate) fn text(raw: &RawValue) -> Option<Cow<'_, str>> {
    let inner = raw.get().strip_prefix('"')?.strip_suffix('"')?;
    if inner.contains('\\') { serde_json::from_str(raw.get()).ok().map(Cow::Owned) } else { Some(Cow::Borrowed(inner)) }
}

/// Whether a JSON value is nested deeper than [`DEPTH_MAX`]. Raw values are read without recursion, so nothing else
/// would notice.
pub(crate) fn is_too_deep(json: &str) -> bool {
    // `[` and `{` differ in one bit. Few of them cannot be deep; this scan is a few instructions per 32 bytes.
    let openers = json.bytes().filter(|byte| byte | 0x20 == b'{').count();
    if openers <= DEPTH_MAX {
        return false;
    }
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'[' | b'{' => {
                depth += 1;
                if depth > DEPTH_MAX {
                    return true;
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth_counts_brackets_outside_strings() {
        let nested = |levels: usize| format!("{}1{}", "[".repeat(levels), "]".repeat(levels));
        assert!(!is_too_deep(&nested(DEPTH_MAX)));
        assert!(is_too_deep(&nested(DEPTH_MAX + 1)));
        let wide = format!("[{}]", vec!["{}"; 10_000].join(","));
        assert!(!is_too_deep(&wide));
        let quoted = format!(r#"["\"{}", "\\", {{}}]"#, "[{".repeat(500));
        assert!(!is_too_deep(&quoted));
    }

    #[test]
    fn strings_are_borrowed_unless_escaped() {
        let raw = |json: &'static str| -> &'static RawValue { serde_json::from_str(json).expect("test JSON") };
        assert!(matches!(text(raw(r#""soar.noc""#)), Some(Cow::Borrowed("soar.noc"))));
        assert_eq!(text(raw(r#""a\u002eb""#)).as_deref(), Some("a.b"));
        for other in ["7", "null", r#"["a"]"#, r#""\ud800""#] {
            assert_eq!(text(raw(other)), None, "{other}");
        }
    }
}
