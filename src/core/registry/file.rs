//! The schema of `providers.yaml`, as the platform writes it. The rules are in `check.rs`.

use std::collections::BTreeMap;

use serde::{Deserialize, de::IgnoredAny};

use crate::core::{catalogue::file::ProbeFile, yaml};

/// A whole document.
#[derive(Debug, Deserialize)]
#[serde(expecting = "a map with schema_version, providers and runtimes")]
pub(super) struct RegistryFile {
    pub(super) schema_version: Option<i64>,
    #[serde(default)]
    pub(super) providers: Option<Vec<ProviderFile>>,
    #[serde(default, deserialize_with = "yaml::unique_keys")]
    pub(super) runtimes: Option<BTreeMap<String, RuntimeFile>>,
}

/// The parts that can be counted in a document that does not fit the schema.
#[derive(Debug, Deserialize)]
pub(super) struct Skeleton {
    #[serde(default)]
    pub(super) providers: Option<Vec<IgnoredAny>>,
    #[serde(default, deserialize_with = "yaml::unique_keys")]
    pub(super) runtimes: Option<BTreeMap<String, IgnoredAny>>,
}

/// A provider.
#[derive(Debug, Default, Deserialize)]
#[serde(expecting = "a map that describes a provider")]
pub(super) struct ProviderFile {
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) display_name: String,
    #[serde(default)]
    pub(super) protocol: String,
    #[serde(default)]
    pub(super) auth_mode: String,
    #[serde(default)]
    pub(super) base_url_template: Option<String>,
    #[serde(default)]
    pub(super) base_url_anthropic: Option<String>,
    #[serde(default, deserialize_with = "yaml::unique_keys")]
    pub(super) endpoint_vars: Option<BTreeMap<String, EndpointVarFile>>,
    #[serde(default)]
    pub(super) wire_model_prefix: Option<String>,
    #[serde(default)]
    pub(super) auth_env: Option<Vec<String>>,
    #[serde(default)]
    pub(super) auth_token_env: Option<String>,
    #[serde(default)]
    pub(super) model_prefix_match: String,
    #[serde(default)]
    pub(super) upstream_vendor: Option<String>,
    #[serde(default)]
    pub(super) thinking_policy: Option<String>,
    #[serde(default)]
    pub(super) probe: Option<Vec<ProbeFile>>,
    #[serde(default)]
    pub(super) deprecated: Option<bool>,
    // Keys that only the platform uses. They are named here so that they are not reported as unknown.
    #[serde(default, rename = "model_aliases")]
    pub(super) _model_aliases: Option<Vec<String>>,
    #[serde(default, rename = "vendor_logo")]
    pub(super) _vendor_logo: Option<String>,
    /// The provider could not be read. Only its name is set.
    #[serde(skip)]
    pub(super) unread: bool,
}

/// The source of a placeholder's value: an environment variable, or else the default.
#[derive(Debug, Deserialize)]
pub(super) struct EndpointVarFile {
    pub(super) env: String,
    #[serde(default)]
    pub(super) default: Option<String>,
}

/// A runtime.
#[derive(Debug, Deserialize)]
#[serde(expecting = "a map with the runtime's providers")]
pub(super) struct RuntimeFile {
    #[serde(default)]
    pub(super) providers: Option<Vec<OfferFile>>,
    #[serde(default)]
    pub(super) display_name: Option<String>,
}

/// A provider of a runtime.
#[derive(Debug, Deserialize)]
#[serde(expecting = "a map with a provider's name, and its models if it lists any")]
pub(super) struct OfferFile {
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) models: Option<Vec<String>>,
    #[serde(default)]
    pub(super) withdrawn_models: Option<Vec<String>>,
}
