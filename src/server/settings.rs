//! The settings of the edge: where it listens, who may call, how it stops.

use std::{collections::BTreeSet, num::NonZeroU32, path::PathBuf, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{
    domain::{duration, problem::Review},
    grpc::limits::{Deadlines, Limits},
};

/// More threads than that help nobody.
const MAX_WORKER_THREADS: usize = 256;
/// The kernel's own bounds for TCP keepalive: whole seconds, in 15 bits.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(32_400));
/// Less, and a connection would end before its first call.
const MIN_CONNECTION_TIME: Duration = Duration::from_secs(1);
/// The mode's bits for everybody.
const EVERYBODY: u32 = 0o007;

/// All that a server is set up with.
#[derive(Debug, Clone, Default)]
pub struct EdgeSettings {
    /// Where it listens and how it runs.
    pub server: ServerSettings,
    /// Where its numbers are shown.
    pub admin: AdminSettings,
    /// Of Unix sockets.
    pub socket: SocketSettings,
    /// Certificates and the key.
    pub tls: TlsSettings,
    /// Who may call.
    pub callers: CallerSettings,
    /// How much.
    pub limits: Limits,
    /// How long.
    pub deadlines: Deadlines,
    /// How it stops.
    pub shutdown: ShutdownSettings,
}

/// Where it listens and how it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServerSettings {
    /// `HOST:PORT` or `unix:PATH`.
    pub listen: Vec<String>,
    /// TCP beyond loopback is allowed without TLS.
    pub insecure_listen: bool,
    /// TLS is allowed without client certificates and tokens.
    pub allow_anonymous: bool,
    /// Threads that do the work; 0 takes what the machine or the container's CPU quota gives.
    pub worker_threads: usize,
    /// How often files are looked at: documents, certificates, keys, tokens. Where the file system tells of changes, they are seen at once.
    #[serde(with = "duration")]
    pub reload_interval: Duration,
    /// After how long a silence the kernel asks a TCP peer whether it is still there, in whole seconds.
    #[serde(with = "duration")]
    pub keepalive_interval: Duration,
    /// How long it may take to say so, in whole seconds.
    #[serde(with = "duration")]
    pub keepalive_timeout: Duration,
    /// How long a connection may be without a call.
    #[serde(with = "duration")]
    pub max_connection_idle: Duration,
    /// How long a connection may be used, within a tenth; calls under way are finished.
    #[serde(with = "duration")]
    pub max_connection_age: Duration,
    /// How many replicas share what may be asked of providers, and what a platform may ask: each takes its part of it.
    pub replicas: NonZeroU32,
}

/// Where its numbers are shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct AdminSettings {
    /// `HOST:PORT` or `unix:PATH`; nowhere if not set.
    pub listen: Option<String>,
    /// The status page's lists of decisions name workspaces.
    pub show_workspace_ids: bool,
}

/// Of Unix sockets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SocketSettings {
    /// File mode, octal digits.
    pub mode: String,
    /// Numeric user id; the process's own if not set.
    pub owner: Option<u32>,
    /// Numeric group id; the process's own if not set.
    pub group: Option<u32>,
}

/// Certificates and the key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct TlsSettings {
    /// The server's certificate chain.
    pub certificate: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
    /// Who signs clients' certificates. Set, it makes one required.
    pub client_ca: Option<PathBuf>,
}

/// Who may call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CallerSettings {
    /// One token a line.
    pub token_file: Option<PathBuf>,
    /// Client certificates by name.
    pub certificates: CallerList<CertificateCaller>,
    /// Peers of Unix sockets.
    pub unix_peers: CallerList<UnixCaller>,
    /// How often one `workspace` caller may call.
    pub workspace_calls_per_minute: NonZeroU32,
}

/// A list of callers. Without entries everybody whom the client CA, or the socket's mode, lets in is a platform. A list that has had entries
/// is only ever emptied by the word `anyone`, so that a file that lost its end opens nothing.
#[derive(Debug, Clone, PartialEq)]
pub enum CallerList<T> {
    /// `anyone`: everybody, and that is meant.
    Anyone,
    /// These; everybody if there is none.
    Only(Vec<T>),
}

/// A client certificate's caller.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateCaller {
    /// `spiffe://..` (or another URI), or a DNS name. A URI that ends in `/*` covers everything below.
    pub san: String,
    /// What it may do.
    #[serde(default)]
    pub role: RoleWord,
    /// Whose decisions a `workspace` may ask for.
    #[serde(default)]
    pub workspaces: BTreeSet<String>,
}

/// A Unix peer's caller. Where both ids are given, both must match.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnixCaller {
    /// Numeric user id.
    #[serde(default)]
    pub uid: Option<u32>,
    /// Numeric group id.
    #[serde(default)]
    pub gid: Option<u32>,
    /// What it may do.
    #[serde(default)]
    pub role: RoleWord,
    /// Whose decisions a `workspace` may ask for.
    #[serde(default)]
    pub workspaces: BTreeSet<String>,
}

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum RoleWord {
    /// Everything.
    #[default]
    Platform,
    /// Decide at PROVISION, for its own ids.
    Workspace,
    /// Status only.
    Operator,
}

/// How it stops.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ShutdownSettings {
    /// Between NOT_SERVING and the end of accepting.
    #[serde(with = "duration")]
    pub notice: Duration,
    /// For calls under way.
    #[serde(with = "duration")]
    pub drain: Duration,
}

// === defaults ===

impl Default for ServerSettings {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            listen: vec!["127.0.0.1:50051".to_owned()],
            insecure_listen: false,
            allow_anonymous: false,
            worker_threads: 0,
            reload_interval: seconds(1),
            keepalive_interval: seconds(30),
            keepalive_timeout: seconds(10),
            max_connection_idle: seconds(300),
            max_connection_age: seconds(600),
            replicas: NonZeroU32::MIN,
        }
    }
}

impl Default for SocketSettings {
    fn default() -> Self {
        Self { mode: "0660".to_owned(), owner: None, group: None }
    }
}

impl Default for CallerSettings {
    fn default() -> Self {
        Self {
            token_file: None,
            certificates: CallerList::default(),
            unix_peers: CallerList::default(),
            workspace_calls_per_minute: const { NonZeroU32::new(12).unwrap() },
        }
    }
}

impl Default for ShutdownSettings {
    fn default() -> Self {
        Self { notice: Duration::from_millis(500), drain: Duration::from_secs(10) }
    }
}

// === reviews ===

impl ServerSettings {
    /// What is wrong with them.
    pub fn review(&self, review: &mut Review<'_>) {
        if self.listen.is_empty() {
            review.error("listen", "names no address: give at least one HOST:PORT or unix:PATH");
        }
        for (index, address) in self.listen.iter().enumerate() {
            if address.trim() != address || address.is_empty() {
                review.error(format_args!("listen[{index}]"), "is empty or padded: write HOST:PORT or unix:PATH");
            }
        }
        review.length("reload_interval", self.reload_interval, Duration::from_millis(100), duration::MAX);
        review.length("keepalive_interval", self.keepalive_interval, KEEPALIVE.0, KEEPALIVE.1);
        review.length("keepalive_timeout", self.keepalive_timeout, KEEPALIVE.0, KEEPALIVE.1);
        review.length("max_connection_idle", self.max_connection_idle, MIN_CONNECTION_TIME, duration::MAX);
        review.length("max_connection_age", self.max_connection_age, MIN_CONNECTION_TIME, duration::MAX);
        if self.worker_threads > MAX_WORKER_THREADS {
            review.error("worker_threads", format!("must be at most {MAX_WORKER_THREADS}; 0 takes what the CPU quota gives"));
        }
    }
}

impl SocketSettings {
    /// What is wrong with them.
    pub fn review(&self, review: &mut Review<'_>) {
        match u32::from_str_radix(&self.mode, 8) {
            Ok(mode) if (3..=4).contains(&self.mode.len()) => {
                if mode & EVERYBODY != 0 {
                    review.warning(
                        "mode",
                        format!("{} lets every user of the machine connect; 0660 lets owner and group", self.mode),
                    );
                }
            }
            _ => review.error("mode", format!("`{}` is not a file mode in octal digits, such as \"0660\"", self.mode)),
        }
    }
}

impl TlsSettings {
    /// What is wrong with them.
    pub fn review(&self, review: &mut Review<'_>) {
        match (&self.certificate, &self.key) {
            (Some(_), None) => review.error("key", "is required with tls.certificate"),
            (None, Some(_)) => review.error("certificate", "is required with tls.key"),
            (None, None) if self.client_ca.is_some() => review.error("certificate", "is required with tls.client_ca"),
            _ => {}
        }
    }
}

impl CallerSettings {
    /// The list that names callers that are workspaces, if one does.
    pub fn workspaces(&self) -> Option<&'static str> {
        let of_certificates = self.certificates.entries().iter().any(|caller| caller.role == RoleWord::Workspace);
        let of_peers = self.unix_peers.entries().iter().any(|caller| caller.role == RoleWord::Workspace);
        [("callers.certificates", of_certificates), ("callers.unix_peers", of_peers)]
            .into_iter()
            .find_map(|(list, names)| names.then_some(list))
    }

    /// What is wrong with them, given the certificates.
    pub fn review(&self, tls: &TlsSettings, review: &mut Review<'_>) {
        if !self.certificates.entries().is_empty() && tls.client_ca.is_none() {
            review.error("certificates", "needs tls.client_ca: a certificate that nobody vouches for proves no name");
        }
        if tls.client_ca.is_some() && matches!(&self.certificates, CallerList::Only(entries) if entries.is_empty()) {
            review.warning(
                "certificates",
                "is not set: every certificate of tls.client_ca may ask as `platform`; list the names that may, or write `anyone`",
            );
        }
        for (index, CertificateCaller { san, role, workspaces }) in self.certificates.entries().iter().enumerate() {
            let place = format!("certificates[{index}]");
            review_workspaces(&place, *role, workspaces, review);
            if san.trim() != san || san.is_empty() {
                review.error(format_args!("{place}.san"), "is empty or padded: write a URI or a DNS name");
            }
        }
        for (index, UnixCaller { uid, gid, role, workspaces }) in self.unix_peers.entries().iter().enumerate() {
            let place = format!("unix_peers[{index}]");
            review_workspaces(&place, *role, workspaces, review);
            if uid.is_none() && gid.is_none() {
                review.error(&place, "needs a uid, a gid or both");
            }
        }
    }
}

fn review_workspaces(place: &str, role: RoleWord, workspaces: &BTreeSet<String>, review: &mut Review<'_>) {
    match role {
        RoleWord::Workspace if workspaces.is_empty() => {
            review.error(place, "names no workspaces: a `workspace` caller needs its ids");
        }
        RoleWord::Platform | RoleWord::Operator if !workspaces.is_empty() => {
            review.error(place, "names workspaces: only a `workspace` caller has them");
        }
        RoleWord::Workspace | RoleWord::Platform | RoleWord::Operator => {}
    }
    if workspaces.iter().any(|id| id.trim() != id || id.is_empty()) {
        review.error(format_args!("{place}.workspaces"), "holds an id that is empty or padded");
    }
}

impl ShutdownSettings {
    /// What is wrong with them.
    pub fn review(&self, review: &mut Review<'_>) {
        review.length("notice", self.notice, Duration::ZERO, duration::MAX);
        review.length("drain", self.drain, Duration::ZERO, duration::MAX);
    }
}

// === impl CallerList ===

/// The word for everybody.
const ANYONE: &str = "anyone";

impl<T> CallerList<T> {
    /// Its entries.
    pub fn entries(&self) -> &[T] {
        match self {
            Self::Anyone => &[],
            Self::Only(entries) => entries,
        }
    }
}

impl<T> Default for CallerList<T> {
    fn default() -> Self {
        Self::Only(Vec::new())
    }
}

impl<T: Serialize> Serialize for CallerList<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Anyone => serializer.serialize_str(ANYONE),
            Self::Only(entries) => entries.serialize(serializer),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for CallerList<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> de::Visitor<'de> for Visitor<T> {
            type Value = CallerList<T>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of callers, or the word `anyone`")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Self::Value, E> {
                if word == ANYONE { Ok(CallerList::Anyone) } else { Err(E::invalid_value(de::Unexpected::Str(word), &self)) }
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
                Deserialize::deserialize(de::value::SeqAccessDeserializer::new(seq)).map(CallerList::Only)
            }
        }
        deserializer.deserialize_any(Visitor(std::marker::PhantomData))
    }
}
