//! What a fake vendor answers, as data: the rows of the cases.

use std::collections::BTreeMap;

use serde::Deserialize;

/// One row: what it fits, and the answer.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Row {
    pub(crate) method: Option<String>,
    pub(crate) path: Option<String>,
    pub(crate) key: Option<String>,
    /// The key stands in this header, lower case.
    pub(crate) header: Option<String>,
    pub(crate) status: Option<u16>,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
    pub(crate) behave: Option<Behave>,
    pub(crate) delay_ms: u64,
}

/// What a vendor can do instead of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Behave {
    Silent,
    Reset,
}

/// One request, as it came.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
}

impl Asked {
    /// What stands in the headers that carry credentials.
    pub(crate) fn keys(&self) -> Vec<&str> {
        let bearer = self.headers.get("authorization").map(|value| value.strip_prefix("Bearer ").unwrap_or(value));
        let others = ["x-api-key", "x-goog-api-key", "api-key"].into_iter().filter_map(|name| self.headers.get(name));
        bearer.into_iter().chain(others.map(String::as_str)).collect()
    }
}

impl Row {
    /// The answer to this key at this path; without one, the answer to all others.
    pub(crate) fn at(path: &str, key: Option<&str>, status: u16, body: &str) -> Self {
        let (path, key) = (Some(path.to_owned()), key.map(str::to_owned));
        Self { path, key, status: Some(status), body: body.into(), ..Self::default() }
    }

    /// The answer where no row fits.
    pub(crate) fn no_such_path() -> Self {
        let body = r#"{"error": {"code": "not_found", "message": "no such path"}}"#.into();
        Self { status: Some(404), body, ..Self::default() }
    }

    pub(crate) fn fits(&self, asked: &Asked) -> bool {
        let path = asked.path.split('?').next().unwrap_or_default();
        self.method.as_ref().is_none_or(|method| *method == asked.method)
            && self.path.as_ref().is_none_or(|expected| expected == path)
            && self.key.as_deref().is_none_or(|key| asked.keys().contains(&key))
            && self.header.as_deref().is_none_or(|header| asked.headers.contains_key(header))
    }
}
