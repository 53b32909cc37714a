//! Layers of settings: the defaults, one file, the environment, flags. Each later one wins, and every value knows its origin.

use std::{collections::BTreeMap, fmt};

use serde_json::{Map, Value};

use super::settings::Settings;
use crate::{core::yaml, domain::problem::Problem};

/// The environment's variables begin so; `__` stands between a section and a key.
pub(crate) const PREFIX: &str = "BYOK_GATE__";

/// Sections whose keys are names of the operator's choosing.
const FREE: [&str; 1] = ["providers"];

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum From {
    /// Built in.
    Default,
    /// The configuration file at this path.
    File(String),
    /// The environment variable of this name.
    Environment(String),
    /// The flag of this name.
    Flag(&'static str),
}

/// A flag's value for a key.
#[derive(Debug, Clone)]
pub struct Flag {
    /// As it is written: `--listen`.
    pub name: &'static str,
    /// `server.listen`
    pub key: &'static str,
    /// What it sets.
    pub value: Value,
}

/// Settings while they are laid over each other.
pub(super) struct Layers {
    schema: Value,
    tree: Value,
    origins: BTreeMap<String, From>,
    problems: Vec<Problem>,
}

// === impl Layers ===

impl Layers {
    /// The defaults.
    pub(super) fn new() -> Self {
        let schema = to_tree(&Settings::default());
        Self { tree: schema.clone(), schema, origins: BTreeMap::new(), problems: Vec::new() }
    }

    /// Lays a file over it.
    pub(super) fn file(&mut self, document: &str, tree: Value) {
        match tree {
            Value::Null => {}
            Value::Object(map) => self.section("", map, &From::File(document.to_owned())),
            _ => self.problems.push(Problem::at("", "must be a mapping of sections")),
        }
    }

    /// Lays the environment over it: every variable with the prefix.
    pub(super) fn environment(&mut self, variables: impl Iterator<Item = (String, String)>) {
        for (name, text) in variables {
            let Some(path) = name.strip_prefix(PREFIX) else { continue };
            let path = path.to_lowercase().replace("__", ".");
            let value = candidates(&text).into_iter().find(|value| fits(&path, value)).unwrap_or(Value::String(text));
            let value = path.rsplit('.').fold(value, |value, key| Value::Object(Map::from_iter([(key.to_owned(), value)])));
            if let Value::Object(map) = value {
                self.section("", map, &From::Environment(name));
            }
        }
    }

    /// Lays a flag over it.
    pub(super) fn flag(&mut self, Flag { name, key, value }: Flag) {
        put(&mut self.tree, key, value);
        self.origins.insert(key.to_owned(), From::Flag(name));
    }

    /// What came of it. A value that its key does not take is a problem of the layer that it came from.
    pub(super) fn finish(mut self) -> Result<(Settings, BTreeMap<String, From>), Vec<Problem>> {
        if !self.problems.is_empty() {
            return Err(self.problems);
        }
        for (path, from) in &self.origins {
            let Some(value) = get(&self.tree, path) else { continue };
            if let Some(fault) = fault_of(path, value) {
                self.problems.push(Problem::at(path, format!("{fault} (from {from})")));
            }
        }
        match serde_json::from_value(self.tree) {
            Ok(settings) if self.problems.is_empty() => Ok((settings, self.origins)),
            Ok(_) => Err(self.problems),
            Err(fault) if self.problems.is_empty() => Err(vec![Problem::at("", fault.to_string())]),
            Err(_) => Err(self.problems),
        }
    }

    fn section(&mut self, at: &str, map: Map<String, Value>, from: &From) {
        for (key, value) in map {
            let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
            let known = if at.is_empty() { Some(&self.schema) } else { get(&self.schema, at) };
            let known = known.and_then(Value::as_object);
            let is_free = FREE.contains(&at);
            match known.and_then(|known| known.get(&key)) {
                None if !is_free => {
                    let names = known.into_iter().flat_map(Map::keys).map(String::as_str);
                    let message = format!("is not a key (from {from}); {}", hint(&key, at, names));
                    self.problems.push(Problem::at(path, message));
                }
                Some(Value::Object(_)) => match value {
                    Value::Object(map) => self.section(&path, map, from),
                    // A section with all its keys commented out.
                    Value::Null => {}
                    _ => self.problems.push(Problem::at(path, format!("is a section of keys, not a value (from {from})"))),
                },
                Some(_) | None => {
                    put(&mut self.tree, &path, value);
                    self.origins.insert(path, from.clone());
                }
            }
        }
    }
}

/// Every setting with its value, in the order of their names.
pub(super) fn leaves(settings: &Settings) -> Vec<(String, Value)> {
    fn walk(at: &str, value: Value, out: &mut Vec<(String, Value)>) {
        match value {
            Value::Object(map) if !map.is_empty() && !FREE.iter().any(|free| at.starts_with(&format!("{free}."))) => {
                for (key, value) in map {
                    walk(&if at.is_empty() { key } else { format!("{at}.{key}") }, value, out);
                }
            }
            value => out.push((at.to_owned(), value)),
        }
    }
    let mut out = Vec::new();
    walk("", to_tree(settings), &mut out);
    out
}

fn to_tree(settings: &Settings) -> Value {
    // Names, numbers and lists: nothing that JSON could not hold.
    serde_json::to_value(settings).unwrap_or_default()
}

fn get<'a>(tree: &'a Value, path: &str) -> Option<&'a Value> {
    // A free key may hold a dot itself.
    if let Some((section, key)) = path.split_once('.').filter(|(section, _)| FREE.contains(section)) {
        return tree.get(section)?.get(key);
    }
    path.split('.').try_fold(tree, |tree, key| tree.get(key))
}

fn put(tree: &mut Value, path: &str, value: Value) {
    let free = path.split_once('.').filter(|(section, _)| FREE.contains(section));
    let keys: Vec<&str> = free.map_or_else(|| path.split('.').collect(), |(section, key)| vec![section, key]);
    let Some((last, sections)) = keys.split_last() else { return };
    let section = sections.iter().try_fold(tree, |tree, key| tree.get_mut(key));
    if let Some(Value::Object(map)) = section {
        map.insert((*last).to_owned(), value);
    }
}

/// What a variable's text may mean: itself, a YAML value, a list with commas.
fn candidates(text: &str) -> Vec<Value> {
    let list = || text.split(',').map(|part| Value::String(part.trim().to_owned())).collect();
    [Some(Value::String(text.to_owned())), yaml::tree(text.as_bytes()).ok(), Some(Value::Array(list()))]
        .into_iter()
        .flatten()
        .collect()
}

fn fits(path: &str, value: &Value) -> bool {
    fault_of(path, value).is_none()
}

fn fault_of(path: &str, value: &Value) -> Option<String> {
    let mut tree = to_tree(&Settings::default());
    put(&mut tree, path, value.clone());
    serde_json::from_value::<Settings>(tree).err().map(|fault| fault.to_string())
}

fn hint<'a>(key: &str, at: &str, names: impl Iterator<Item = &'a str>) -> String {
    let nearest = names.max_by(|one, other| strsim::jaro_winkler(key, one).total_cmp(&strsim::jaro_winkler(key, other)));
    match nearest {
        Some(nearest) if at.is_empty() => format!("the nearest is `{nearest}`"),
        Some(nearest) => format!("the nearest is `{at}.{nearest}`"),
        None => format!("`{at}` takes no keys"),
    }
}

impl fmt::Display for From {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(document) => write!(f, "file {document}"),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}
