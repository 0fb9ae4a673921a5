//! Walks TOML tables, checks values and collects every problem instead of stopping at the first.

use std::cell::RefCell;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::camera::source::mask;

/// One thing that is wrong, with the key's path, the value and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// `camera[0].queue`; empty for the file as a whole.
    pub path: String,
    /// Reads on from the path.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path.as_str() {
            "" => f.write_str(&self.message),
            path => write!(f, "{path} {}", self.message),
        }
    }
}

/// A key that the configuration may hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// `camera.queue`
    pub path: String,
    /// What it may hold, in words.
    pub allowed: String,
    /// What it is when left out; `None` = required, or off when left out.
    pub default: Option<String>,
}

/// What all sections share.
pub(super) struct Reader<'a> {
    base: &'a Path,
    problems: RefCell<Vec<Problem>>,
    keys: RefCell<Vec<Key>>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(base: &'a Path) -> Self {
        Self { base, problems: RefCell::default(), keys: RefCell::default() }
    }

    pub(super) fn root<'t>(&'t self, table: &'t Table) -> Section<'t, 'a> {
        Section { reader: self, table: Some(table), path: String::new(), known: Vec::new() }
    }

    pub(super) fn finish(self) -> Result<(), Vec<Problem>> {
        let problems = self.problems.into_inner();
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    pub(super) fn into_keys(self) -> Vec<Key> {
        self.keys.into_inner()
    }
}

/// One table. Each getter notes its key; `finish` reports what the file holds beyond those.
pub(super) struct Section<'t, 'a> {
    reader: &'t Reader<'a>,
    table: Option<&'t Table>,
    path: String,
    known: Vec<String>,
}

impl<'t, 'a> Section<'t, 'a> {
    fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    pub(super) fn problem(&self, key: &str, message: &str) {
        let problem = Problem { path: self.path_of(key), message: message.to_owned() };
        self.reader.problems.borrow_mut().push(problem);
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.table.is_some_and(|t| t.contains_key(key))
    }

    fn value(&mut self, key: &str) -> Option<&'t Value> {
        self.known.push(key.to_owned());
        self.table.and_then(|t| t.get(key))
    }

    fn setting(&mut self, key: &str, allowed: &str, default: Option<String>) -> Option<&'t Value> {
        // `camera[3].url` and `camera[0].url` are one key.
        let path =
            self.path_of(key).replace(|c: char| c == '[' || c == ']' || c.is_ascii_digit(), "");
        let note = Key { path, allowed: allowed.to_owned(), default };
        let mut keys = self.reader.keys.borrow_mut();
        if !keys.contains(&note) {
            keys.push(note);
        }
        drop(keys);
        self.value(key)
    }

    /// The value has the wrong type or lies outside what is allowed.
    fn refuse<T>(&self, key: &str, value: &Value, allowed: &str) -> Option<T> {
        self.problem(key, &format!("= {}: must be {allowed}", mask(&value.to_string())));
        None
    }

    fn missing<T>(&self, key: &str, allowed: &str) -> Option<T> {
        self.problem(key, &format!("is missing: must be {allowed}"));
        None
    }

    pub(super) fn finish(self) {
        for key in self.table.into_iter().flat_map(Table::keys) {
            if self.known.iter().any(|k| k == key) {
                continue;
            }
            let hint = match self.known.iter().map(|k| (distance(k, key), k)).min() {
                Some((d, near)) if d <= 2 => format!("did you mean {near}?"),
                _ => format!("known here: {}", self.known.join(", ")),
            };
            self.problem(key, &format!("is not a known key; {hint}"));
        }
    }

    pub(super) fn table(&mut self, key: &str) -> Option<Section<'t, 'a>> {
        match self.value(key) {
            Some(Value::Table(table)) => Some(self.section(key, Some(table))),
            Some(other) => self.refuse(key, other, &format!("a section [{key}]")),
            None => self.missing(key, &format!("a section [{key}]")),
        }
    }

    pub(super) fn table_or_empty(&mut self, key: &str) -> Section<'t, 'a> {
        let table = if self.has(key) {
            return self.table(key).unwrap_or_else(|| self.section(key, None));
        } else {
            None
        };
        self.known.push(key.to_owned());
        self.section(key, table)
    }

    pub(super) fn tables(&mut self, key: &str) -> Vec<Section<'t, 'a>> {
        let what = format!("one or more sections [[{key}]]");
        let Some(value) = self.value(key) else { return Vec::new() };
        let Value::Array(items) = value else {
            self.refuse::<()>(key, value, &what);
            return Vec::new();
        };
        let named = items.iter().enumerate().map(|(i, item)| (format!("{key}[{i}]"), item));
        named
            .filter_map(|(name, item)| match item {
                Value::Table(table) => Some(self.section(&name, Some(table))),
                other => self.refuse(&name, other, &what),
            })
            .collect()
    }

    fn section(&self, key: &str, table: Option<&'t Table>) -> Section<'t, 'a> {
        Section { reader: self.reader, table, path: self.path_of(key), known: Vec::new() }
    }

    pub(super) fn string(&mut self, key: &str, allowed: &str) -> Option<String> {
        match self.setting(key, allowed, None)? {
            Value::String(s) if !s.is_empty() => Some(s.clone()),
            other => self.refuse(key, other, allowed),
        }
    }

    pub(super) fn required_string(&mut self, key: &str, allowed: &str) -> Option<String> {
        let had = self.has(key);
        let value = self.string(key, allowed);
        if !had { self.missing(key, allowed) } else { value }
    }

    /// A topic level: `[a-z0-9][a-z0-9_-]{0,31}`, required.
    pub(super) fn slug(&mut self, key: &str) -> Option<String> {
        let allowed = "1 to 32 of a-z, 0-9, _ and -, starting with a letter or digit";
        match self.setting(key, allowed, None) {
            None => self.missing(key, allowed),
            Some(Value::String(s)) if is_slug(s) => Some(s.clone()),
            Some(other) => self.refuse(key, other, allowed),
        }
    }

    pub(super) fn matching(
        &mut self,
        key: &str,
        default: &str,
        allowed: &str,
        accepts: impl Fn(&str) -> bool,
    ) -> Option<String> {
        match self.setting(key, allowed, Some(format!("{default:?}"))) {
            None => Some(default.to_owned()),
            Some(Value::String(s)) if accepts(s) => Some(s.clone()),
            Some(other) => self.refuse(key, other, allowed),
        }
    }

    /// A path, taken from the configuration's folder when relative.
    pub(super) fn path(&mut self, key: &str, default: Option<&str>) -> Option<PathBuf> {
        let allowed = "a path";
        match self.setting(key, allowed, default.map(|d| format!("{d:?}"))) {
            None => default.map(PathBuf::from),
            Some(Value::String(s)) if !s.is_empty() => Some(self.reader.base.join(s)),
            Some(other) => self.refuse(key, other, allowed),
        }
    }

    pub(super) fn flag(&mut self, key: &str, default: bool) -> Option<bool> {
        let allowed = "true or false";
        match self.setting(key, allowed, Some(default.to_string())) {
            None => Some(default),
            Some(Value::Boolean(b)) => Some(*b),
            Some(other) => self.refuse(key, other, allowed),
        }
    }

    pub(super) fn integer(
        &mut self,
        key: &str,
        range: RangeInclusive<i64>,
        default: Option<i64>,
    ) -> Option<i64> {
        let allowed = format!("a whole number from {} to {}", range.start(), range.end());
        match self.setting(key, &allowed, default.map(|d| d.to_string())) {
            None => default,
            Some(Value::Integer(n)) if range.contains(n) => Some(*n),
            Some(other) => self.refuse(key, other, &allowed),
        }
    }

    pub(super) fn integers(&mut self, key: &str, range: RangeInclusive<i64>) -> Option<Vec<i64>> {
        let allowed =
            format!("a list of different whole numbers from {} to {}", range.start(), range.end());
        let value = self.setting(key, &allowed, None)?;
        let list: Option<Vec<i64>> = value.as_array().and_then(|items| {
            items.iter().map(|v| v.as_integer().filter(|n| range.contains(n))).collect()
        });
        match list {
            Some(list)
                if !list.is_empty() && (1..list.len()).all(|i| !list[..i].contains(&list[i])) =>
            {
                Some(list)
            }
            _ => self.refuse(key, value, &allowed),
        }
    }

    pub(super) fn number(
        &mut self,
        key: &str,
        range: RangeInclusive<f64>,
        default: Option<f64>,
    ) -> Option<f64> {
        let allowed = format!("a number from {} to {}", range.start(), range.end());
        let Some(value) = self.setting(key, &allowed, default.map(|d| d.to_string())) else {
            return default;
        };
        let number = value.as_float().or_else(|| value.as_integer().map(|n| n as f64));
        match number {
            Some(n) if range.contains(&n) => Some(n),
            _ => self.refuse(key, value, &allowed),
        }
    }

    pub(super) fn strings(&mut self, key: &str, allowed: &str) -> Option<Vec<String>> {
        self.parsed(key, allowed, |s| Some(s.to_owned()).filter(|s| !s.is_empty()))
    }

    /// A list of strings that each mean something.
    pub(super) fn parsed<T>(
        &mut self,
        key: &str,
        allowed: &str,
        parse: impl Fn(&str) -> Option<T>,
    ) -> Option<Vec<T>> {
        let value = self.setting(key, allowed, None)?;
        let list: Option<Vec<T>> = value
            .as_array()
            .and_then(|items| items.iter().map(|v| v.as_str().and_then(&parse)).collect());
        match list {
            Some(list) if !list.is_empty() => Some(list),
            _ => self.refuse(key, value, allowed),
        }
    }

    pub(super) fn choice<T: Copy + PartialEq>(
        &mut self,
        key: &str,
        choices: &[(&str, T)],
        default: T,
    ) -> Option<T> {
        let name = choices.iter().find(|(_, t)| *t == default).map(|(n, _)| format!("{n:?}"));
        self.chosen(key, choices, name, Some(default))
    }

    pub(super) fn optional_choice<T: Copy>(
        &mut self,
        key: &str,
        choices: &[(&str, T)],
    ) -> Option<T> {
        self.chosen(key, choices, None, None)
    }

    fn chosen<T: Copy>(
        &mut self,
        key: &str,
        choices: &[(&str, T)],
        name: Option<String>,
        default: Option<T>,
    ) -> Option<T> {
        let names: Vec<_> = choices.iter().map(|(n, _)| format!("{n:?}")).collect();
        let allowed = format!("one of {}", names.join(", "));
        let Some(value) = self.setting(key, &allowed, name) else { return default };
        let found = value.as_str().and_then(|s| choices.iter().find(|(n, _)| *n == s));
        found.map(|(_, t)| *t).or_else(|| self.refuse(key, value, &allowed))
    }
}

/// One level of a topic: `[a-z0-9][a-z0-9_-]{0,31}`.
pub fn is_slug(s: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=32).contains(&s.len())
        && plain(s.as_bytes()[0])
        && s.bytes().all(|b| plain(b) || b == b'_' || b == b'-')
}

/// Levenshtein's edit distance, for "did you mean".
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let next = (diagonal + usize::from(ca != *cb)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], next);
        }
    }
    row[b.len()]
}
