//! What a caller asks. Checked once when a call arrives, and trusted from then on.

use std::{fmt, net::SocketAddr, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use strum::{IntoStaticStr, VariantArray};

use crate::domain::secret::Secret;

/// The moment in a workspace's life at which a decision is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum Checkpoint {
    /// A new workspace, before it is stored.
    Create,
    /// A start, a restart or a resume.
    Provision,
    /// A change of model, runtime or secret, before it is stored.
    Update,
    /// A check of a running workspace.
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
    /// The name on the wire, without the enum's name as a prefix.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

impl Scope {
    /// The name on the wire, without the enum's name as a prefix.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// The value of a stored credential.
#[derive(Debug, Clone)]
pub enum CredentialValue {
    /// The value, which may be blank.
    Readable(Arc<Secret>),
    /// There is a credential, but it could not be read. Never taken for a missing one.
    Unreadable,
}

/// A stored credential.
#[derive(Debug, Clone)]
pub struct Credential {
    /// The environment variable.
    pub env_name: String,
    /// Where it is stored. A variable appears at most once in each scope.
    pub scope: Scope,
    /// The value.
    pub value: CredentialValue,
}

/// An operator's override of the decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OperatorOverride {
    /// No override: the owner of the model decides.
    Derive,
    /// The platform pays, whoever owns the model.
    PlatformManaged,
    /// The tenant's own credential is required.
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

/// The workspace that would start.
#[derive(Debug, Clone)]
pub struct WorkspaceSpec {
    /// The platform's id for the workspace. May be empty at CREATE.
    pub workspace_id: String,
    /// The platform's id for the tenant. May be empty.
    pub organization_id: String,
    /// The runtime.
    pub runtime: String,
    /// The model, trimmed of Unicode white space.
    pub model: String,
    /// The stored credentials.
    pub credentials: Vec<Credential>,
    /// Scopes that could not be listed.
    pub unreadable_scopes: Vec<Scope>,
    /// The operator's override.
    pub operator_override: OperatorOverride,
    /// Whether the proxy is available; `None` means the configured default.
    pub platform_proxy: Option<PlatformProxy>,
    /// The base-URL variables that the tenant has set.
    pub tenant_base_url_env: Vec<String>,
}

/// A request for a decision.
#[derive(Debug, Clone)]
pub struct Request {
    /// The workspace.
    pub spec: WorkspaceSpec,
    /// The moment in the workspace's life.
    pub checkpoint: Checkpoint,
    /// The oldest observation that the caller accepts; `None` means the configured ages.
    pub max_liveness_age: Option<Duration>,
    /// Whether the answer lists the steps of the decision.
    pub explain: bool,
    /// The caller does not act on the answer. It is recorded and counted separately.
    pub report_only: bool,
    /// The caller.
    pub caller: CalledBy,
}

/// The caller, as far as limits distinguish callers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CalledBy {
    /// The name under which the server knows the caller; empty if callers have no names.
    pub name: String,
    /// The caller is a workspace, which runs a tenant's code, and not the platform.
    pub is_workspace: bool,
}

impl CalledBy {
    /// The organization whose limits this caller's request counts for. A workspace may name any, and so counts for itself alone.
    pub fn organization<'a>(&'a self, named: &'a str) -> &'a str {
        if self.is_workspace { &self.name } else { named }
    }
}

/// The other end of a connection, as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// A TCP connection from this address.
    Tcp(SocketAddr),
    /// A Unix socket on this machine.
    Unix {
        /// The user's id.
        uid: u32,
        /// The group's id.
        gid: u32,
    },
}

impl fmt::Display for Peer {
    /// Leaves out the port, which differs for each connection.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.ip().to_canonical().fmt(f),
            Self::Unix { uid, gid } => write!(f, "unix uid {uid} gid {gid}"),
        }
    }
}

/// Whether the text has only printable ASCII. A fold without early exit checks several bytes at a time.
pub fn is_plain(text: &str) -> bool {
    text.bytes().fold(true, |plain, byte| plain & matches!(byte, b' '..=b'~'))
}

/// Whether every shell accepts the name of a variable: letters, digits and `_`, no digit first, at most 128 bytes.
pub fn is_env_name(name: &str) -> bool {
    name.len() <= 128
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && name.bytes().next().is_some_and(|first| !first.is_ascii_digit())
}
