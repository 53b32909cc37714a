//! What a caller asks about: parsed once at the door, then trusted.

use std::{fmt, net::SocketAddr, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use strum::{IntoStaticStr, VariantArray};

use crate::domain::secret::Secret;

/// The moment at which a decision is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum Checkpoint {
    /// A new workspace, before its row is written.
    Create,
    /// Start, restart or resume.
    Provision,
    /// A change of model, runtime or secret, before it is saved.
    Update,
    /// A running workspace is looked at again.
    Audit,
}

/// Where a credential is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum Scope {
    /// The workspace's own secrets.
    Workspace,
    /// The organization's secrets.
    Organization,
}

impl Checkpoint {
    /// The wire name, without the enum's own name as a prefix.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

impl Scope {
    /// The wire name, without the enum's own name as a prefix.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// What a credential's row holds.
#[derive(Debug, Clone)]
pub enum CredentialValue {
    /// Its value, which may be blank.
    Readable(Arc<Secret>),
    /// The row exists and could not be read. Never taken for "no secret there".
    Unreadable,
}

/// One available credential.
#[derive(Debug, Clone)]
pub struct Credential {
    /// The environment variable's name.
    pub env_name: String,
    /// Where it is stored. A name stands at most once in each scope.
    pub scope: Scope,
    /// What its row holds.
    pub value: CredentialValue,
}

/// The operator's escape hatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OperatorOverride {
    /// No override: derive.
    Derive,
    /// Bill the platform, whatever the model derives to.
    PlatformManaged,
    /// Require the tenant's own credential.
    Byok,
    /// No model calls are expected.
    Disabled,
}

/// Whether the platform's metered proxy can serve the workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum PlatformProxy {
    /// It can.
    Available,
    /// There is none.
    #[default]
    Absent,
}

/// The workspace as it would start.
#[derive(Debug, Clone)]
pub struct WorkspaceSpec {
    /// The platform's id for the workspace; may be empty at create.
    pub workspace_id: String,
    /// The platform's id for the tenant; may be empty.
    pub organization_id: String,
    /// The effective runtime, as given.
    pub runtime: String,
    /// The effective model, trimmed of Unicode white space.
    pub model: String,
    /// The available credentials.
    pub credentials: Vec<Credential>,
    /// Scopes that could not be listed.
    pub unreadable_scopes: Vec<Scope>,
    /// The operator's override.
    pub operator_override: OperatorOverride,
    /// Whether the proxy is there; `None` is the configured default.
    pub platform_proxy: Option<PlatformProxy>,
    /// Base-URL variables that the tenant set.
    pub tenant_base_url_env: Vec<String>,
}

/// One question.
#[derive(Debug, Clone)]
pub struct Request {
    /// The workspace.
    pub spec: WorkspaceSpec,
    /// The moment.
    pub checkpoint: Checkpoint,
    /// How old an observation may be; `None` is the service's own ages.
    pub max_liveness_age: Option<Duration>,
    /// Whether the steps are to be told.
    pub explain: bool,
    /// The caller does not act on the answer: it is recorded and counted apart.
    pub report_only: bool,
    /// Who asks.
    pub caller: CalledBy,
}

/// Who asks, as far as limits tell callers apart.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CalledBy {
    /// The name that the edge knows it by; empty where callers have none.
    pub name: String,
    /// It is a workspace, beside a tenant's code, and no platform.
    pub is_workspace: bool,
}

/// Who is at the other end of a connection, as far as the kernel knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// From this address.
    Tcp(SocketAddr),
    /// Of these ids, on this machine.
    Unix {
        /// The user's.
        uid: u32,
        /// The group's.
        gid: u32,
    },
}

impl fmt::Display for Peer {
    /// Without the port, which changes with each connection.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.ip().to_canonical().fmt(f),
            Self::Unix { uid, gid } => write!(f, "unix uid {uid} gid {gid}"),
        }
    }
}

/// Nothing but printable ASCII, which nearly every text is: told several bytes at a time.
pub fn is_plain(text: &str) -> bool {
    text.bytes().fold(true, |plain, byte| plain & matches!(byte, b' '..=b'~'))
}

/// A variable's name as every shell takes it: letters, digits and `_`, not beginning with a digit, at most 128 bytes.
pub fn is_env_name(name: &str) -> bool {
    name.len() <= 128
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && name.bytes().next().is_some_and(|first| !first.is_ascii_digit())
}
