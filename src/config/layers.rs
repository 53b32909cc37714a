//! Layers of settings: the defaults, one file, the environment, flags. Each later one wins, and every value knows its origin.

use std::{collections::BTreeMap, fmt};

use serde_json::{Map, Value};

use super::{plain_words::plainly, settings::Settings};
use crate::{core::yaml, domain::problem::Problem};

/// The environment's variables begin so; `__` stands between a section and a key.
pub(crate) const PREFIX: &str = "BYOK_GATE__";

/// Sections whose keys are names of the operator's choosing.
const FREE: [&str; 1] = ["providers"];
/// What `callers: anyone` says, key by key.
const CALLER_LISTS: [&str; 2] = ["callers.certificates", "callers.unix_peers"];

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

/// What came of all layers. With problems, what is at fault has its default in the settings, so that the rest can still be looked at.
pub(super) struct Layered {
    pub(super) settings: Settings,
    pub(super) origins: BTreeMap<String, From>,
    pub(super) problems: Vec<Problem>,
}

// === impl Layers ===

impl Layers {
    /// The defaults.
    pub(super) fn new() -> Self {
        let schema = to_tree(&Settings::default());
        Self { tree: schema.clone(), schema, origins: BTreeMap::new(), problems: Vec::new() }
    }

    /// Lays a file over it. An empty one says nothing on purpose: it is what a full disk or a torn write leaves.
    pub(super) fn file(&mut self, document: &str, tree: Value) {
        match tree {
            Value::Null => self.problems.push(Problem::at("", "is empty; write `{}` if every default is meant")),
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
    pub(super) fn finish(self) -> Layered {
        let Self { schema, mut tree, origins, mut problems } = self;
        for (path, from) in &origins {
            let Some(value) = get(&tree, path) else { continue };
            let Some(fault) = fault_of(path, value) else { continue };
            problems.push(Problem::at(path, format!("{fault} (from {from})")));
            match get(&schema, path).cloned() {
                Some(default) => put(&mut tree, path, default),
                None => remove(&mut tree, path),
            }
        }
        let settings = serde_json::from_value(tree).unwrap_or_else(|fault| {
            problems.push(Problem::at("", fault.to_string()));
            Settings::default()
        });
        Layered { settings, origins, problems }
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
                    Value::String(word) if path == "callers" && word == "anyone" => {
                        CALLER_LISTS.into_iter().for_each(|list| self.set(list.to_owned(), Value::from("anyone"), from));
                    }
                    _ => self.problems.push(Problem::at(path, format!("is a section of keys, not a value (from {from})"))),
                },
                Some(_) | None => self.set(path, value, from),
            }
        }
    }

    fn set(&mut self, path: String, value: Value, from: &From) {
        put(&mut self.tree, &path, value);
        self.origins.insert(path, from.clone());
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

/// The keys of a path. A free key may hold a dot itself.
fn keys(path: &str) -> Vec<&str> {
    match path.split_once('.').filter(|(section, _)| FREE.contains(section)) {
        Some((section, key)) => vec![section, key],
        None => path.split('.').collect(),
    }
}

fn get<'a>(tree: &'a Value, path: &str) -> Option<&'a Value> {
    keys(path).into_iter().try_fold(tree, |tree, key| tree.get(key))
}

fn put(tree: &mut Value, path: &str, value: Value) {
    if let Some((section, last)) = section_of(tree, path) {
        section.insert(last, value);
    }
}

fn remove(tree: &mut Value, path: &str) {
    if let Some((section, last)) = section_of(tree, path) {
        section.remove(&last);
    }
}

/// The section that a path leads into, and the key within it.
fn section_of<'t>(tree: &'t mut Value, path: &str) -> Option<(&'t mut Map<String, Value>, String)> {
    let keys = keys(path);
    let (last, sections) = keys.split_last()?;
    let section = sections.iter().try_fold(tree, |tree, key| tree.get_mut(*key))?;
    Some((section.as_object_mut()?, (*last).to_owned()))
}

/// What a variable's text may mean: itself, a YAML value, a list with commas. An empty one means "none".
fn candidates(text: &str) -> Vec<Value> {
    if text.trim().is_empty() {
        return vec![Value::Null, Value::Array(Vec::new())];
    }
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
    serde_json::from_value::<Settings>(tree).err().map(|fault| plainly(&fault.to_string(), value))
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
