//! The cases of `tests/cases`: read, turned into requests, and compared with answers. The format is in `tests/cases/README.md`.

use std::{collections::BTreeMap, fs, path::PathBuf};

use byok_gate::{
    domain::request::Request,
    grpc::convert::{self, pb},
};
use serde::{Deserialize, Serialize};
use serde_yaml::Value;

use super::vendor_rows::Row;

/// One file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct File {
    #[serde(rename = "about")]
    _about: String,
    #[serde(default)]
    pub(crate) vendor: Vec<Row>,
    pub(crate) cases: Vec<Case>,
}

/// One case.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Case {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) config: Option<Value>,
    #[serde(default)]
    pub(crate) vendor: Vec<Row>,
    #[serde(default)]
    pub(crate) spec: Option<Spec>,
    #[serde(default)]
    pub(crate) max_liveness_age: Option<f64>,
    #[serde(default)]
    pub(crate) calibrates: bool,
    pub(crate) expect: Vec<Expect>,
}

/// The workspace.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Spec {
    pub(crate) runtime: Option<String>,
    pub(crate) model: String,
    pub(crate) workspace_id: String,
    pub(crate) organization_id: String,
    pub(crate) workspace: BTreeMap<String, Option<String>>,
    pub(crate) organization: BTreeMap<String, Option<String>>,
    pub(crate) credentials: Vec<RawCredential>,
    pub(crate) unreadable_scopes: Vec<Word>,
    pub(crate) operator_override: Word,
    pub(crate) platform_proxy: Word,
    pub(crate) tenant_base_url_env: Vec<String>,
}

/// A credential, field by field.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RawCredential {
    pub(crate) env_name: String,
    pub(crate) scope: Word,
    pub(crate) value: String,
    pub(crate) unreadable: bool,
}

/// An enum's value: by its wire name without the prefix, or by its number.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum Word {
    Number(i32),
    Name(String),
}

/// What is expected at these checkpoints.
#[derive(Debug, Clone, Deserialize)]
#[serde(try_from = "BTreeMap<String, Value>")]
pub(crate) struct Expect {
    pub(crate) at: Vec<Word>,
    pub(crate) asked: Option<usize>,
    pub(crate) says: Vec<String>,
    pub(crate) invalid: Vec<String>,
    pub(crate) record: Record,
}

/// A decision as cases have it. Absent is empty.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Record {
    pub(crate) decision: String,
    pub(crate) code: String,
    pub(crate) provider: String,
    pub(crate) billing_mode: String,
    pub(crate) source: String,
    pub(crate) matched_by: String,
    pub(crate) credential_env: String,
    pub(crate) credential_scope: String,
    pub(crate) shadows_organization: bool,
    pub(crate) verdict: String,
    pub(crate) upstream_status: u32,
    pub(crate) probe: String,
    pub(crate) served_from: String,
    pub(crate) warnings: Vec<String>,
    pub(crate) warned_env: Vec<String>,
    pub(crate) missing_env: Vec<String>,
    pub(crate) alternative_models: Vec<String>,
    pub(crate) retryable: bool,
}

/// The result of a request: a decision, or the invalid fields.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Answered {
    Decision(Box<Record>, Said),
    Invalid(Vec<String>),
}

/// A denial's words. Equal to any: `says` looks into them.
#[derive(Debug, Clone)]
pub(crate) struct Said(pub(crate) String);

impl PartialEq for Said {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// All cases, with the files that they come from.
pub(crate) fn all() -> Vec<(String, Case)> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let mut cases = Vec::new();
    for path in paths {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if !name.ends_with(".yaml") || name == "registry.yaml" || name == "catalogue.yaml" {
            continue;
        }
        let mut document: Value = serde_yaml::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        document.apply_merge().unwrap();
        let file: File = serde_yaml::from_value(document).unwrap_or_else(|fault| panic!("{name}: {fault}"));
        for mut case in file.cases {
            case.vendor.extend(file.vendor.clone());
            cases.push((format!("{name}: {}", case.name), case));
        }
    }
    cases
}

/// The cases' registry and catalogue for a vendor on this port.
pub(crate) fn documents(port: u16) -> (String, String) {
    let read = |name| fs::read_to_string(folder().join(name)).unwrap().replace("__PORT__", &port.to_string());
    (read("registry.yaml"), read("catalogue.yaml"))
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/cases")
}

impl Case {
    pub(crate) fn request(&self, at: &Word) -> pb::DecideRequest {
        pb::DecideRequest {
            workspace_spec: self.spec.as_ref().map(Spec::message),
            checkpoint: at.number(|name| pb::Checkpoint::from_str_name(&format!("CHECKPOINT_{name}")).map(|value| value as i32)),
            max_liveness_age: self
                .max_liveness_age
                .map(|seconds| prost_types::Duration { seconds: seconds.trunc() as i64, nanos: (seconds.fract() * 1e9) as i32 }),
            explain: false,
            report_only: false,
        }
    }
}

impl Spec {
    /// Every value in it.
    pub(crate) fn values(&self) -> Vec<&str> {
        let maps = self.workspace.values().chain(self.organization.values()).flatten();
        maps.map(String::as_str).chain(self.credentials.iter().map(|credential| credential.value.as_str())).collect()
    }

    /// The request of a create, which wants everything explained.
    pub(crate) fn request(&self) -> Request {
        let message = pb::DecideRequest {
            workspace_spec: Some(self.message()),
            checkpoint: pb::Checkpoint::Create as i32,
            explain: true,
            ..Default::default()
        };
        convert::request(message).unwrap()
    }

    pub(crate) fn message(&self) -> pb::WorkspaceSpec {
        let scope = |name: &str| pb::Scope::from_str_name(&format!("SCOPE_{name}")).map(|value| value as i32);
        let mut credentials = Vec::new();
        for (number, rows) in [(pb::Scope::Workspace, &self.workspace), (pb::Scope::Organization, &self.organization)] {
            credentials.extend(rows.iter().map(|(name, value)| pb::Credential {
                env_name: name.clone(),
                scope: number as i32,
                value: value.clone().unwrap_or_default(),
                unreadable: value.is_none(),
            }));
        }
        credentials.extend(self.credentials.iter().map(|raw| pb::Credential {
            env_name: raw.env_name.clone(),
            scope: raw.scope.number(scope),
            value: raw.value.clone(),
            unreadable: raw.unreadable,
        }));
        pb::WorkspaceSpec {
            workspace_id: self.workspace_id.clone(),
            organization_id: self.organization_id.clone(),
            runtime: self.runtime.clone().unwrap_or_else(|| "agent".into()),
            model: self.model.clone(),
            credentials,
            unreadable_scopes: self.unreadable_scopes.iter().map(|word| word.number(scope)).collect(),
            operator_override: self.operator_override.number(|name| {
                pb::OperatorOverride::from_str_name(&format!("OPERATOR_OVERRIDE_{name}")).map(|value| value as i32)
            }),
            platform_proxy: self
                .platform_proxy
                .number(|name| pb::PlatformProxy::from_str_name(&format!("PLATFORM_PROXY_{name}")).map(|value| value as i32)),
            tenant_base_url_env: self.tenant_base_url_env.clone(),
        }
    }
}

impl TryFrom<BTreeMap<String, Value>> for Expect {
    type Error = serde_yaml::Error;

    /// By hand, since serde's `flatten` lets unknown keys pass: a typing error must not expect nothing.
    fn try_from(mut keys: BTreeMap<String, Value>) -> Result<Self, Self::Error> {
        let mut take = |name| keys.remove(name).unwrap_or(Value::Null);
        let (at, asked, says, invalid) = (take("at"), take("asked"), take("says"), take("invalid"));
        Ok(Self {
            at: serde_yaml::from_value(at)?,
            asked: serde_yaml::from_value(asked)?,
            says: serde_yaml::from_value::<Option<_>>(says)?.unwrap_or_default(),
            invalid: serde_yaml::from_value::<Option<_>>(invalid)?.unwrap_or_default(),
            record: serde_yaml::from_value(serde_yaml::to_value(keys)?)?,
        })
    }
}

impl Default for Word {
    fn default() -> Self {
        Self::Number(0)
    }
}

impl Word {
    fn number(&self, of: impl Fn(&str) -> Option<i32>) -> i32 {
        match self {
            Self::Number(number) => *number,
            Self::Name(name) => of(name).unwrap_or_else(|| panic!("`{name}` is no wire name")),
        }
    }
}

impl Expect {
    /// Nothing, or what is not as expected: both whole values.
    pub(crate) fn fault(&self, answered: &Answered, asked: usize) -> Option<String> {
        let expected = if self.invalid.is_empty() {
            let mut record = self.record.clone();
            if record.source.is_empty() {
                record.source = "DERIVED".into();
            }
            Answered::Decision(Box::new(record), Said(String::new()))
        } else {
            Answered::Invalid(self.invalid.clone())
        };
        if *answered != expected {
            return Some(format!("answered\n  {answered:?}\nexpected\n  {expected:?}"));
        }
        if let Answered::Decision(_, Said(text)) = answered
            && let Some(says) = self.says.iter().find(|says| !text.contains(says.as_str()))
        {
            return Some(format!("{text:?} does not say {says:?}"));
        }
        let expected = self.asked.unwrap_or(asked);
        (asked != expected).then(|| format!("{asked} requests carried the tenant's credential, expected {expected}"))
    }
}

impl Answered {
    /// A decision, read from the wire. What every decision owes is checked on the way.
    #[track_caller]
    pub(crate) fn decision(response: &pb::DecideResponse) -> Self {
        let word = |name: &str, prefix: &str| {
            let word = name.strip_prefix(prefix).unwrap();
            if word == "UNSPECIFIED" { String::new() } else { word.to_owned() }
        };
        let resolution = response.resolution.clone().unwrap();
        let liveness = response.liveness.clone().unwrap_or_default();
        let deny = match response.decision.clone().unwrap() {
            pb::decide_response::Decision::Allow(allow) => {
                assert_ne!(allow.billing_mode(), pb::BillingMode::Unspecified, "an allow says who pays: {response:?}");
                assert_eq!(allow.billing_mode(), resolution.billing_mode(), "{response:?}");
                None
            }
            pb::decide_response::Decision::Deny(deny) => Some(deny),
        };
        assert!(
            !response.decision_id.is_empty() && !response.registry_revision.is_empty() && !response.catalogue_revision.is_empty()
        );
        let said = deny.as_ref().map_or_else(String::new, |deny| format!("{}\n{}", deny.message, deny.remedy));
        if let Some(deny) = &deny {
            assert!(!deny.message.is_empty() && !deny.remedy.is_empty(), "{deny:?}");
            assert_eq!(deny.retryable, deny.retry_after.is_some_and(|after| after.seconds > 0 || after.nanos > 0), "{deny:?}");
            if deny.code() != pb::DenyCode::CredentialScopeUnreadable && deny.retryable {
                assert!(response.liveness.is_some(), "{response:?}");
            }
        }
        let deny = deny.unwrap_or_default();
        let decision = if said.is_empty() { "ALLOW" } else { "DENY" };
        let warnings = &response.warnings;
        Self::Decision(
            Box::new(Record {
                decision: decision.into(),
                code: word(deny.code().as_str_name(), "DENY_CODE_"),
                billing_mode: word(resolution.billing_mode().as_str_name(), "BILLING_MODE_"),
                source: word(resolution.source().as_str_name(), "RESOLUTION_SOURCE_"),
                matched_by: word(resolution.matched_by().as_str_name(), "MATCHED_BY_"),
                credential_scope: word(resolution.credential_scope().as_str_name(), "SCOPE_"),
                provider: resolution.provider,
                credential_env: resolution.credential_env,
                shadows_organization: resolution.shadows_organization,
                verdict: word(liveness.verdict().as_str_name(), "VERDICT_"),
                served_from: word(liveness.served_from().as_str_name(), "SERVED_FROM_"),
                upstream_status: liveness.upstream_status,
                probe: liveness.probe,
                warnings: warnings.iter().map(|warning| word(warning.code().as_str_name(), "WARNING_CODE_")).collect(),
                warned_env: warnings.iter().flat_map(|warning| warning.env_names.clone()).collect(),
                missing_env: deny.missing_env,
                alternative_models: deny.alternative_models,
                retryable: deny.retryable,
            }),
            Said(said),
        )
    }
}
