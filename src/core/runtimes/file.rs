//! The schema of `runtimes:`. The rules are in `check.rs`.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::core::yaml;

/// A runtime.
#[derive(Debug, Deserialize)]
pub(crate) struct RuntimeFile {
    #[serde(default)]
    pub(super) version: String,
    #[serde(default)]
    pub(super) sources: Vec<String>,
    #[serde(default)]
    pub(super) certainty: Option<String>,
    #[serde(default)]
    pub(super) trims: Option<String>,
    #[serde(default)]
    pub(super) organization_loses: Option<Vec<String>>,
    #[serde(default)]
    pub(super) falls_back: bool,
    /// Variables that are sent to every provider, each with its header.
    #[serde(default, deserialize_with = "yaml::unique_keys")]
    pub(super) sends: Option<BTreeMap<String, String>>,
    #[serde(default)]
    pub(super) surface: Option<String>,
    #[serde(default)]
    pub(super) base_url_env: Option<Vec<String>>,
    #[serde(default, deserialize_with = "yaml::unique_keys")]
    pub(super) providers: Option<BTreeMap<String, RouteFile>>,
}

/// How the credential of one provider is sent.
#[derive(Debug, Deserialize)]
pub(crate) struct RouteFile {
    #[serde(default)]
    pub(super) certainty: Option<String>,
    #[serde(default)]
    pub(super) reads: Option<Vec<String>>,
    #[serde(default)]
    pub(super) beaten_by: Option<Vec<String>>,
    #[serde(default)]
    pub(super) header: Option<OneOrMany>,
    #[serde(default)]
    pub(super) surface: Option<String>,
    #[serde(default)]
    pub(super) base: Option<String>,
    #[serde(default, deserialize_with = "yaml::unique_keys")]
    pub(super) by_prefix: Option<BTreeMap<String, DeliveryFile>>,
    #[serde(default, deserialize_with = "yaml::unique_keys")]
    pub(super) by_env: Option<BTreeMap<String, String>>,
    #[serde(default, deserialize_with = "yaml::unique_keys")]
    pub(super) also_sends: Option<BTreeMap<String, String>>,
    #[serde(default)]
    pub(super) base_url_env: Option<Vec<String>>,
}

/// How one kind of value is sent.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct DeliveryFile {
    #[serde(default)]
    pub(super) header: Option<OneOrMany>,
    #[serde(default)]
    pub(super) surface: Option<String>,
    #[serde(default)]
    pub(super) base: Option<String>,
}

/// One word or a list.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}
