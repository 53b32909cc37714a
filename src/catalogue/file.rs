//! The schema of the probe catalogue. Words only; `check.rs` has the rules.

use std::collections::BTreeMap;

use serde::Deserialize;

/// The document.
#[derive(Debug, Deserialize)]
pub(crate) struct CatalogueFile {
    pub(super) catalogue_version: Option<i64>,
    #[serde(default)]
    pub(super) hosts: Option<Vec<HostFile>>,
    #[serde(default)]
    pub(super) key_shapes: Option<Vec<KeyShapeFile>>,
    #[serde(default)]
    pub(super) base_url_env: Option<BTreeMap<String, String>>,
    #[serde(default)]
    pub(super) defaults: Option<DefaultsFile>,
}

/// The ladders for hosts without a row.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct DefaultsFile {
    #[serde(default)]
    pub(super) openai: Option<Vec<ProbeFile>>,
    #[serde(default)]
    pub(super) anthropic: Option<Vec<ProbeFile>>,
}

/// One host.
#[derive(Debug, Deserialize)]
pub(crate) struct HostFile {
    #[serde(default)]
    pub(super) host: String,
    #[serde(default)]
    pub(super) path_prefix: Option<String>,
    #[serde(default)]
    pub(super) vendor: String,
    #[serde(default)]
    pub(super) siblings: Option<Vec<String>>,
    #[serde(default)]
    pub(super) strip_model_prefixes: Option<Vec<String>>,
    #[serde(default)]
    pub(super) probes: Option<Vec<ProbeFile>>,
    // For the reader of the document.
    #[serde(default, rename = "confidence")]
    pub(super) _confidence: Option<String>,
    #[serde(default, rename = "sources")]
    pub(super) _sources: Option<Vec<String>>,
    #[serde(default, rename = "note")]
    pub(super) _note: Option<String>,
}

/// What a kind of key begins with.
#[derive(Debug, Deserialize)]
pub(crate) struct KeyShapeFile {
    #[serde(default)]
    pub(super) prefix: String,
    #[serde(default)]
    pub(super) vendor: String,
    #[serde(default)]
    pub(super) kind: Option<String>,
}

/// One call. Serialised again, it is what the probe's fingerprint is taken of.
#[derive(Debug, Clone, Deserialize, serde::Serialize)]
pub(crate) struct ProbeFile {
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) method: Option<String>,
    #[serde(default)]
    pub(super) path: String,
    #[serde(default)]
    pub(super) auth: Option<Vec<String>>,
    #[serde(default)]
    pub(super) headers: Option<BTreeMap<String, String>>,
    #[serde(default)]
    pub(super) body: Option<serde_json::Value>,
    #[serde(default)]
    pub(super) budget_ms: Option<u64>,
    #[serde(default)]
    pub(super) costs_money: Option<bool>,
    #[serde(default)]
    pub(super) refuses_bad_keys: Option<bool>,
    #[serde(default)]
    pub(super) expect: Option<Vec<String>>,
    #[serde(default)]
    pub(super) signals: Option<Vec<SignalFile>>,
}

/// One row of meaning.
#[derive(Debug, Clone, Deserialize, serde::Serialize)]
pub(crate) struct SignalFile {
    #[serde(default)]
    pub(super) status: Option<Vec<u16>>,
    #[serde(default)]
    pub(super) contains: Option<String>,
    #[serde(default)]
    pub(super) path: Option<String>,
    #[serde(default)]
    pub(super) equals: Option<serde_json::Value>,
    #[serde(default)]
    pub(super) at_most: Option<f64>,
    #[serde(default)]
    pub(super) verdict: String,
    #[serde(default, rename = "confidence", skip_serializing)]
    pub(super) _confidence: Option<String>,
    #[serde(default, rename = "note", skip_serializing)]
    pub(super) _note: Option<String>,
}
