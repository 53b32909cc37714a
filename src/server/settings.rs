//! The settings of the server's edge: where it listens, who may call, and how it stops.

use std::{collections::BTreeSet, num::NonZeroU32, path::PathBuf, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{
    domain::{duration, problem::Review},
    grpc::limits::{Deadlines, Limits},
};

/// More threads than this do not help.
const MAX_WORKER_THREADS: usize = 256;
/// The kernel's bounds for TCP keepalive: whole seconds in 15 bits.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(32_400));
/// With less, a connection would end before its first call.
const MIN_CONNECTION_TIME: Duration = Duration::from_secs(1);
/// The mode bits for all users.
const EVERYBODY: u32 = 0o007;

/// All settings of a server.
#[derive(Debug, Clone, Default)]
pub struct EdgeSettings {
    /// Where it listens and how it runs.
    pub server: ServerSettings,
    /// The admin listener.
    pub admin: AdminSettings,
    /// The files of Unix sockets.
    pub socket: SocketSettings,
    /// TLS files.
    pub tls: TlsSettings,
    /// Who may call.
    pub callers: CallerSettings,
    /// Limits of calls.
    pub limits: Limits,
    /// Deadlines of calls.
    pub deadlines: Deadlines,
    /// How it stops.
    pub shutdown: ShutdownSettings,
    /// The setting of the shared tier, if there is one. A process that holds its key serves no `workspace` caller.
    pub tier: Option<&'static str>,
}

/// Where it listens and how it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServerSettings {
    /// `HOST:PORT` or `unix:PATH`.
    pub listen: Vec<String>,
    /// Allows TCP beyond loopback without TLS.
    pub insecure_listen: bool,
    /// Allows TLS without client certificates and tokens.
    pub allow_anonymous: bool,
    /// The number of worker threads. 0 uses one for each CPU of the machine or of the container's quota.
    pub worker_threads: usize,
    /// How often files are checked for changes: documents, certificates, keys, tokens. File system events make it check at once.
    #[serde(with = "duration")]
    pub reload_interval: Duration,
    /// After how much silence the kernel probes a TCP peer, in whole seconds.
    #[serde(with = "duration")]
    pub keepalive_interval: Duration,
    /// How long the peer may take to acknowledge, in whole seconds.
    #[serde(with = "duration")]
    pub keepalive_timeout: Duration,
    /// How long a connection may have no call.
    #[serde(with = "duration")]
    pub max_connection_idle: Duration,
    /// The maximum age of a connection, varied by a tenth. Calls in flight are finished.
    #[serde(with = "duration")]
    pub max_connection_age: Duration,
    /// How many replicas share the limits of each provider and of a platform. Each replica takes its part.
    pub replicas: NonZeroU32,
}

/// The admin listener.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct AdminSettings {
    /// `HOST:PORT` or `unix:PATH`; nowhere if not set.
    pub listen: Option<String>,
    /// Shows workspace ids on the status page.
    pub show_workspace_ids: bool,
}

/// The files of Unix sockets.
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

/// TLS files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct TlsSettings {
    /// The server's certificate chain.
    pub certificate: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
    /// The authority of client certificates. If set, a client certificate is required.
    pub client_ca: Option<PathBuf>,
}

/// Who may call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CallerSettings {
    /// The file of bearer tokens, one per line.
    pub token_file: Option<PathBuf>,
    /// Client certificates by name.
    pub certificates: CallerList<CertificateCaller>,
    /// Peers of Unix sockets.
    pub unix_peers: CallerList<UnixCaller>,
    /// How often one `workspace` caller may call.
    pub workspace_calls_per_minute: NonZeroU32,
}

/// A list of callers. Without entries, everybody whom the client CA or the socket's mode lets in is a platform. A reload empties a list that has
/// had entries only if it says `anyone`, so that a truncated file lets nobody in.
#[derive(Debug, Clone, PartialEq)]
pub enum CallerList<T> {
    /// `anyone`: everybody, on purpose.
    Anyone,
    /// These callers. If the list is empty, everybody.
    Only(Vec<T>),
}

/// A client certificate's caller.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateCaller {
    /// A URI such as `spiffe://..`, or a DNS name. A URI that ends in `/*` covers everything below it.
    pub san: String,
    /// What it may do.
    #[serde(default)]
    pub role: RoleWord,
    /// The workspaces that a `workspace` caller may ask about.
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
    /// The workspaces that a `workspace` caller may ask about.
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
    /// The time between NOT_SERVING and the end of accepting.
    #[serde(with = "duration")]
    pub notice: Duration,
    /// The time for calls in flight.
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
    /// Reports every problem of these settings.
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
    /// Reports every problem of these settings.
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
    /// Reports every problem of these settings.
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
    /// The setting of the list that names `workspace` callers, if one does.
    pub fn workspaces(&self) -> Option<&'static str> {
        let of_certificates = self.certificates.entries().iter().any(|caller| caller.role == RoleWord::Workspace);
        let of_peers = self.unix_peers.entries().iter().any(|caller| caller.role == RoleWord::Workspace);
        [("callers.certificates", of_certificates), ("callers.unix_peers", of_peers)]
            .into_iter()
            .find_map(|(list, names)| names.then_some(list))
    }

    /// Reports every problem, given the TLS settings.
    pub fn review(&self, tls: &TlsSettings, review: &mut Review<'_>) {
        if !self.certificates.entries().is_empty() && tls.client_ca.is_none() {
            review.error("certificates", "needs tls.client_ca: an unverified certificate proves no name");
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
    /// Reports every problem of these settings.
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
