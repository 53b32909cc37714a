//! Merges the layers of settings: defaults, one file, the environment, flags. A later layer wins, and the origin of every value is kept.

use std::{collections::BTreeMap, fmt};

use serde_json::{Map, Value};

use super::{plain_words::plainly, settings::Settings};
use crate::{
    core::yaml,
    domain::{problem::Problem, similar::most_similar},
};

/// The prefix of environment variables. `__` separates a section from a key.
pub(crate) const PREFIX: &str = "BYOK_GATE__";

/// Sections whose keys are names that the operator chooses.
const FREE_FORM_SECTIONS: [&str; 1] = ["providers"];
/// The lists that `callers: anyone` sets.
const CALLER_LISTS: [&str; 2] = ["callers.certificates", "callers.unix_peers"];

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
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
    /// The flag, such as `--listen`.
    pub name: &'static str,
    /// The key that it sets, such as `server.listen`.
    pub key: &'static str,
    /// The key's value.
    pub value: Value,
}

/// Settings while layers are merged.
pub(super) struct Layers {
    schema: Value,
    tree: Value,
    origins: BTreeMap<String, Origin>,
    problems: Vec<Problem>,
}

/// The merged settings. A value with a problem is replaced by its default, so that the rest can still be checked.
pub(super) struct MergedSettings {
    pub(super) settings: Settings,
    pub(super) origins: BTreeMap<String, Origin>,
    pub(super) problems: Vec<Problem>,
}

// === impl Layers ===

impl Layers {
    /// Starts with the defaults.
    pub(super) fn new() -> Self {
        let schema = to_tree(&Settings::default());
        Self { tree: schema.clone(), schema, origins: BTreeMap::new(), problems: Vec::new() }
    }

    /// Adds the file. An empty file is a problem, since a full disk or an interrupted write leaves one.
    pub(super) fn file(&mut self, document: &str, tree: Value) {
        match tree {
            Value::Null => self.problems.push(Problem::at("", "is empty; write `{}` if every default is meant")),
            Value::Object(map) => self.section("", map, &Origin::File(document.to_owned())),
            _ => self.problems.push(Problem::at("", "must be a mapping of sections")),
        }
    }

    /// Adds every environment variable with the prefix.
    pub(super) fn environment(&mut self, variables: impl Iterator<Item = (String, String)>) {
        for (name, text) in variables {
            let Some(path) = name.strip_prefix(PREFIX) else { continue };
            let path = path.to_lowercase().replace("__", ".");
            let value = candidates(&text).into_iter().find(|value| fits(&path, value)).unwrap_or(Value::String(text));
            let value = path.rsplit('.').fold(value, |value, key| Value::Object(Map::from_iter([(key.to_owned(), value)])));
            if let Value::Object(map) = value {
                self.section("", map, &Origin::Environment(name));
            }
        }
    }

    /// Adds a flag.
    pub(super) fn flag(&mut self, Flag { name, key, value }: Flag) {
        put(&mut self.tree, key, value);
        self.origins.insert(key.to_owned(), Origin::Flag(name));
    }

    /// Merges the layers. The problem of a wrong value names the layer that it came from.
    pub(super) fn finish(self) -> MergedSettings {
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
        MergedSettings { settings, origins, problems }
    }

    fn section(&mut self, at: &str, map: Map<String, Value>, from: &Origin) {
        for (key, value) in map {
            let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
            let known = if at.is_empty() { Some(&self.schema) } else { get(&self.schema, at) };
            let known = known.and_then(Value::as_object);
            let is_free_form = FREE_FORM_SECTIONS.contains(&at);
            match known.and_then(|known| known.get(&key)) {
                None if !is_free_form => {
                    let names = known.into_iter().flat_map(Map::keys).map(String::as_str);
                    let message = format!("is not a key (from {from}); {}", hint(&key, at, names));
                    self.problems.push(Problem::at(path, message));
                }
                Some(Value::Object(_)) => match value {
                    Value::Object(map) => self.section(&path, map, from),
                    // All keys of the section are commented out.
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

    fn set(&mut self, path: String, value: Value, from: &Origin) {
        put(&mut self.tree, &path, value);
        self.origins.insert(path, from.clone());
    }
}

/// Every setting with its value, sorted by name.
pub(super) fn leaves(settings: &Settings) -> Vec<(String, Value)> {
    fn walk(at: &str, value: Value, out: &mut Vec<(String, Value)>) {
        match value {
            Value::Object(map)
                if !map.is_empty() && !FREE_FORM_SECTIONS.iter().any(|free| at.starts_with(&format!("{free}."))) =>
            {
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
    // Settings are names, numbers and lists, so serializing them cannot fail.
    serde_json::to_value(settings).unwrap_or_default()
}

/// The keys of a path. A key that the operator chose may contain a dot.
fn keys(path: &str) -> Vec<&str> {
    match path.split_once('.').filter(|(section, _)| FREE_FORM_SECTIONS.contains(section)) {
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

/// The section that holds the path's last key, and that key.
fn section_of<'t>(tree: &'t mut Value, path: &str) -> Option<(&'t mut Map<String, Value>, String)> {
    let keys = keys(path);
    let (last, sections) = keys.split_last()?;
    let section = sections.iter().try_fold(tree, |tree, key| tree.get_mut(*key))?;
    Some((section.as_object_mut()?, (*last).to_owned()))
}

/// The possible meanings of a variable's text: the text itself, a YAML value, or a comma-separated list. An empty text means "none".
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
    match most_similar(names, |name| strsim::jaro_winkler(key, name)) {
        Some((nearest, _)) if at.is_empty() => format!("the nearest is `{nearest}`"),
        Some((nearest, _)) => format!("the nearest is `{at}.{nearest}`"),
        None => format!("`{at}` takes no keys"),
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(document) => write!(f, "file {document}"),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}
