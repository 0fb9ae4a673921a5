//! JSON from outside: bounded in length and depth, and without duplicate keys, which two readers
//! may understand differently.

use std::fmt;

use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::manifest::{ID, is_id};
use crate::text::brief;

/// Nesting that is read: the deepest that is used is 5.
const DEPTH_MAX: usize = 16;

/// Fields without a meaning that are named.
const UNKNOWN_MAX: usize = 10;

/// Reads one object of at most `max` bytes; nothing may follow it.
pub(super) fn object(bytes: &[u8], max: usize) -> Result<Map<String, Value>, String> {
    if bytes.len() > max {
        return Err(format!("has {} bytes: {max} are allowed", bytes.len()));
    }
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = Strict(0).deserialize(&mut reader).and_then(|value| reader.end().map(|()| value));
    match value.map_err(|e| format!("is not the JSON that is wanted: {e}"))? {
        Value::Object(map) => Ok(map),
        _ => Err("is no JSON object".to_owned()),
    }
}

/// Reads a value at this depth.
#[derive(Clone, Copy)]
struct Strict(usize);

impl Strict {
    fn deeper<E: serde::de::Error>(self) -> Result<Self, E> {
        match self.0 {
            DEPTH_MAX => Err(E::custom(format!("nested more than {DEPTH_MAX} deep"))),
            depth => Ok(Self(depth + 1)),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let deeper = self.deeper()?;
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(deeper)? {
            list.push(item);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let deeper = self.deeper()?;
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(deeper)?;
            if map.contains_key(&key) {
                return Err(A::Error::custom(format!(
                    "the key \"{}\" stands twice",
                    brief(&key, 60)
                )));
            }
            map.insert(key, value);
        }
        Ok(map.into())
    }
}

/// Reads the fields of an object and keeps a list of those that nobody asked for.
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    asked: Vec<&'static str>,
    /// The first thing that is wrong.
    pub(super) wrong: Option<String>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, asked: Vec::new(), wrong: None }
    }

    /// The value of a field, unless it is missing or null.
    pub(super) fn value(&mut self, key: &'static str) -> Option<&'a Value> {
        self.asked.push(key);
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// A field as `read` understands it; `wanted` says what that is.
    pub(super) fn get<T>(
        &mut self,
        key: &'static str,
        wanted: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.value(key)?;
        let read = read(value);
        if read.is_none() {
            self.problem(format!("{key} = {}: must be {wanted}", excerpt(value)));
        }
        read
    }

    pub(super) fn problem(&mut self, text: String) {
        self.wrong.get_or_insert(text);
    }

    /// Notes that a field is missing, unless what stands there is wrong.
    pub(super) fn lacks<T>(&mut self, key: &str) -> Option<T> {
        self.problem(format!("{key} is missing"));
        None
    }

    /// A text of 1 to `max` bytes without control characters.
    pub(super) fn text(&mut self, key: &'static str, max: usize) -> Option<String> {
        self.get(key, &format!("a text of 1 to {max} bytes"), |v| text(v, max))
    }

    pub(super) fn id(&mut self, key: &'static str) -> Option<String> {
        self.get(key, ID, |v| v.as_str().filter(|id| is_id(id)).map(str::to_owned))
    }

    pub(super) fn flag(&mut self, key: &'static str) -> bool {
        self.get(key, "true or false", Value::as_bool).unwrap_or(false)
    }

    pub(super) fn texts(&mut self, key: &'static str, max: usize) -> Option<Vec<String>> {
        self.get(key, &format!("a list of at most {max} texts"), |v| {
            let list = v.as_array().filter(|l| l.len() <= max)?;
            list.iter().map(|v| text(v, 128)).collect()
        })
    }

    /// The fields that nobody asked for, sorted, as far as they fit into a log.
    pub(super) fn unknown(&self) -> Vec<String> {
        let unknown = self.map.keys().filter(|k| !self.asked.contains(&k.as_str()));
        let mut unknown: Vec<String> = unknown.map(|k| brief(k, 60)).collect();
        unknown.sort();
        let more = unknown.len().saturating_sub(UNKNOWN_MAX);
        if more > 0 {
            unknown.truncate(UNKNOWN_MAX);
            unknown.push(format!("… and {more} more"));
        }
        unknown
    }
}

/// A text of 1 to `max` bytes without control characters.
pub(super) fn text(value: &Value, max: usize) -> Option<String> {
    let text = value.as_str()?;
    let fits = (1..=max).contains(&text.len()) && !text.chars().any(char::is_control);
    fits.then(|| text.to_owned())
}

/// Enough of a value to recognise it by.
fn excerpt(value: &Value) -> String {
    brief(&value.to_string(), 60)
}
