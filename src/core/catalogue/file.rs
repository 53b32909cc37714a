//! The schema of the probe catalogue. The rules are in `check.rs`.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::core::{foreign_secrets::ForeignSecretFile, runtimes::RuntimeFile, yaml};

/// A whole document.
#[derive(Debug, Deserialize)]
pub(crate) struct CatalogueFile {
    pub(super) catalogue_version: Option<i64>,
    #[serde(default)]
    pub(super) hosts: Option<Vec<HostFile>>,
    #[serde(default)]
    pub(super) key_shapes: Option<Vec<KeyShapeFile>>,
    #[serde(default, deserialize_with = "yaml::unique_keys")]
    pub(super) base_url_env: Option<BTreeMap<String, String>>,
    #[serde(default, deserialize_with = "yaml::unique_keys")]
    pub(super) unprobed: Option<BTreeMap<String, UnprobedFile>>,
    #[serde(default)]
    pub(super) common_codes: Option<CommonCodesFile>,
    #[serde(default)]
    pub(super) free_models: Option<Vec<String>>,
    #[serde(default)]
    pub(super) defaults: Option<DefaultsFile>,
    #[serde(default, deserialize_with = "yaml::unique_keys")]
    pub(super) runtimes: Option<BTreeMap<String, RuntimeFile>>,
    #[serde(default)]
    pub(super) foreign_secrets: Option<Vec<ForeignSecretFile>>,
    #[serde(default, deserialize_with = "yaml::unique_keys")]
    pub(super) credential_kinds: Option<BTreeMap<String, String>>,
}

/// Error codes that many servers share.
#[derive(Debug, Default, Deserialize, serde::Serialize)]
pub(crate) struct CommonCodesFile {
    #[serde(default)]
    pub(super) paths: Option<Vec<String>>,
    #[serde(default)]
    pub(super) codes: Option<Vec<CodesFile>>,
    #[serde(default)]
    pub(super) text_paths: Option<Vec<String>>,
    #[serde(default)]
    pub(super) texts: Option<Vec<TextsFile>>,
}

/// Texts with the same meaning.
#[derive(Debug, Default, Deserialize, serde::Serialize)]
pub(crate) struct TextsFile {
    #[serde(default)]
    pub(super) status: Vec<u16>,
    #[serde(default)]
    pub(super) texts: Vec<String>,
    #[serde(default)]
    pub(super) verdict: String,
}

/// Error codes with the same meaning.
#[derive(Debug, Default, Deserialize, serde::Serialize)]
pub(crate) struct CodesFile {
    #[serde(default)]
    pub(super) status: Option<Vec<u16>>,
    #[serde(default)]
    pub(super) codes: Vec<String>,
    #[serde(default)]
    pub(super) verdict: String,
}

/// The probes for hosts without a row.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct DefaultsFile {
    #[serde(default)]
    pub(super) openai: Option<Vec<ProbeFile>>,
    #[serde(default)]
    pub(super) anthropic: Option<Vec<ProbeFile>>,
}

/// A host's row.
#[derive(Debug, Deserialize)]
pub(crate) struct HostFile {
    #[serde(default)]
    pub(super) host: String,
    #[serde(default)]
    pub(super) path_prefix: Option<String>,
    #[serde(default)]
    pub(super) protocol: Option<String>,
    #[serde(default)]
    pub(super) vendor: String,
    #[serde(default)]
    pub(super) accepts_keys_of: Option<OneOrMany<String>>,
    #[serde(default)]
    pub(super) since: Option<String>,
    #[serde(default)]
    pub(super) siblings: Option<Vec<String>>,
    #[serde(default)]
    pub(super) strip_model_prefixes: Option<Vec<String>>,
    #[serde(default)]
    pub(super) providers: Option<Vec<String>>,
    #[serde(default)]
    pub(super) base_path: Option<String>,
    #[serde(default)]
    pub(super) probes: Option<Vec<ProbeFile>>,
    #[serde(default)]
    pub(super) confidence: Option<String>,
    #[serde(default)]
    pub(super) sources: Option<Vec<String>>,
    #[serde(default)]
    pub(super) note: Option<String>,
}

/// A provider that is never asked.
#[derive(Debug, Deserialize)]
pub(crate) struct UnprobedFile {
    #[serde(default)]
    pub(super) reason: String,
    #[serde(default)]
    pub(super) note: String,
}

/// A known prefix of keys.
#[derive(Debug, Deserialize)]
pub(crate) struct KeyShapeFile {
    #[serde(default)]
    pub(super) prefix: String,
    #[serde(default)]
    pub(super) vendor: String,
    #[serde(default)]
    pub(super) kind: Option<String>,
    #[serde(default)]
    pub(super) providers: Option<Vec<String>>,
    #[serde(default)]
    pub(super) plan: Option<String>,
}

/// A probe. The fingerprint of a probe is the hash of its serialised form.
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
    #[serde(default, deserialize_with = "yaml::unique_keys")]
    pub(super) headers: Option<BTreeMap<String, String>>,
    #[serde(default)]
    pub(super) body: Option<serde_json::Value>,
    #[serde(default)]
    pub(super) thinking: Option<serde_json::Map<String, serde_json::Value>>,
    #[serde(default)]
    pub(super) budget_ms: Option<u64>,
    #[serde(default)]
    pub(super) costs_money: Option<bool>,
    #[serde(default)]
    pub(super) refuses_bad_keys: Option<bool>,
    #[serde(default)]
    pub(super) surface: Option<String>,
    #[serde(default)]
    pub(super) expect: Option<ExpectFile>,
    #[serde(default)]
    pub(super) signals: Option<Vec<SignalFile>>,
}

/// A rule about responses.
#[derive(Debug, Clone, Deserialize, serde::Serialize)]
pub(crate) struct SignalFile {
    #[serde(default)]
    pub(super) status: Option<Vec<u16>>,
    #[serde(default)]
    pub(super) contains: Option<OneOrMany<String>>,
    #[serde(default)]
    pub(super) lacks: Option<String>,
    #[serde(default)]
    pub(super) path: Option<OneOrMany<String>>,
    #[serde(default)]
    pub(super) equals: Option<serde_json::Value>,
    #[serde(default)]
    pub(super) one_of: Option<Vec<serde_json::Value>>,
    #[serde(default)]
    pub(super) at_most: Option<f64>,
    #[serde(default)]
    pub(super) verdict: String,
    #[serde(default)]
    pub(super) page: Option<bool>,
    #[serde(default)]
    pub(super) stop: Option<bool>,
    // Remarks do not change how a rule works, so the fingerprint leaves them out.
    #[serde(default, skip_serializing)]
    pub(super) confidence: Option<String>,
    #[serde(default, skip_serializing)]
    pub(super) note: Option<String>,
}

/// The paths of values in a success response.
#[derive(Debug, Clone, Deserialize, serde::Serialize)]
#[serde(untagged)]
pub(crate) enum ExpectFile {
    /// The value at the path is not null.
    Paths(Vec<String>),
    /// The value at the path has this kind.
    Kinds(BTreeMap<String, String>),
}

/// One value or a list.
#[derive(Debug, Clone, Deserialize, serde::Serialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    pub(super) fn into_vec(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}
