//! Every setting with its default: the shape of the configuration file. `deploy/byok-gate.yaml` says why each default is what it is.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    num::NonZeroU32,
    path::PathBuf,
    time::Duration,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::{
    core::policy::{Action, Group, Policy},
    domain::request::Checkpoint,
    liveness::{
        breaker::BreakerSettings,
        cache::Ages,
        provider_limits::{NewKeyLimits, ProviderLimits},
    },
};

/// A length of time, written as a whole number and a unit: `500ms`, `10s`, `5m`, `1h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// The whole document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Settings {
    /// Where it listens and how it runs.
    pub server: Server,
    /// Where its numbers are shown.
    pub admin: Admin,
    /// Of Unix sockets.
    pub socket: Socket,
    /// Certificates and the key.
    pub tls: Tls,
    /// Who may call.
    pub callers: Callers,
    /// How much.
    pub limits: Limits,
    /// How long.
    pub deadlines: Deadlines,
    /// How it stops.
    pub shutdown: Shutdown,
    /// What is logged.
    pub log: Log,
    /// How long observations count.
    pub cache: CacheAges,
    /// How providers are asked.
    pub probe: Probe,
    /// How much is asked of each provider.
    pub provider_limits: PerProvider,
    /// How many new credentials may be judged.
    pub new_keys: NewKeys,
    /// When a provider's breaker opens.
    pub breaker: Breaker,
    /// Who owns what.
    pub registry: Document,
    /// How hosts are asked.
    pub catalogue: Document,
    /// Of credential fingerprints.
    pub fingerprints: Fingerprints,
    /// Of distributed traces.
    pub tracing: Tracing,
    /// What a spec that does not say means.
    pub platform_proxy: ProxyWord,
    /// Whether operator overrides count.
    pub operator_overrides: OverridesWord,
    /// Runtimes that are allowed without any check.
    pub exempt_runtimes: BTreeSet<String>,
    /// What is done about verdicts that settle nothing.
    pub policy: PolicyGroups,
    /// Providers whose verdicts are taken less seriously for a time.
    pub providers: BTreeMap<String, ProviderException>,
}

/// Where it listens and how it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Server {
    /// `HOST:PORT` or `unix:PATH`.
    pub listen: Vec<String>,
    /// TCP beyond loopback is allowed without TLS.
    pub insecure_listen: bool,
    /// TLS is allowed without client certificates and tokens.
    pub allow_anonymous: bool,
    /// Threads that do the work; 0 takes what the machine or the container's CPU quota gives.
    pub worker_threads: usize,
    /// How often certificates, keys and tokens are read again.
    pub reload_interval: Span,
    /// After how long a silence the kernel asks a TCP peer whether it is still there, in whole seconds.
    pub keepalive_interval: Span,
    /// How long it may take to say so, in whole seconds.
    pub keepalive_timeout: Span,
}

/// Where its numbers are shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Admin {
    /// `HOST:PORT` or `unix:PATH`; nowhere if not set.
    pub listen: Option<String>,
}

/// Of Unix sockets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Socket {
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
pub struct Tls {
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
pub struct Callers {
    /// One token a line.
    pub token_file: Option<PathBuf>,
    /// Client certificates by name; empty takes every one that the client CA signed for a platform.
    pub certificates: Vec<CertificateCaller>,
    /// Peers of Unix sockets; empty takes everyone whom the socket's mode lets in for a platform.
    pub unix_peers: Vec<UnixCaller>,
    /// How often one `workspace` caller may call.
    pub workspace_calls_per_minute: u32,
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

/// How much.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Bytes of one Decide request, and of every other but a batch.
    pub message_bytes: usize,
    /// Bytes of one batch request.
    pub batch_message_bytes: usize,
    /// Bytes of one request's headers.
    pub header_list_bytes: u32,
    /// Open connections of one listener.
    pub connections: usize,
    /// Calls at a time of one connection.
    pub streams_per_connection: u32,
    /// Decisions at a time.
    pub decisions: usize,
    /// Decisions that may wait for their turn.
    pub decisions_waiting: usize,
    /// How long one may wait.
    pub decision_wait: Span,
    /// Items of one batch.
    pub batch_items: usize,
    /// Items of one batch that are decided at a time.
    pub batch_concurrency: usize,
    /// Credentials of one spec.
    pub credentials: usize,
    /// Bytes of one credential's value.
    pub credential_bytes: usize,
    /// Bytes of an id or a name.
    pub name_bytes: usize,
    /// Bytes of a model's id.
    pub model_bytes: usize,
    /// Base-URL variables of one spec.
    pub base_url_names: usize,
    /// Credential names of one ResolveProvider.
    pub resolve_names: usize,
}

/// How long.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Deadlines {
    /// One Decide, whatever the caller allows.
    pub decide: Span,
    /// One batch.
    pub batch: Span,
    /// From a connection's first byte to the end of its TLS handshake and HTTP/2 preface.
    pub handshake: Span,
}

/// What is logged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Log {
    /// The share, from 0 to 1, of plain allows that are logged. Everything else always is.
    pub plain_allow_ratio: f64,
}

/// How it stops.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Shutdown {
    /// Between NOT_SERVING and the end of accepting.
    pub notice: Span,
    /// For calls under way.
    pub drain: Span,
}

/// How long observations count, per verdict.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CacheAges {
    /// VALID.
    pub valid: Span,
    /// VALID, where a probe costs money.
    pub valid_paid: Span,
    /// INVALID and FORBIDDEN.
    pub refused: Span,
    /// TIMEOUT and UNREACHABLE.
    pub unanswered: Span,
    /// PROVIDER_ERROR, UNEXPECTED_RESPONSE and QUOTA_EXHAUSTED.
    pub inconclusive: Span,
    /// The least that a Retry-After counts.
    pub rate_limited_min: Span,
    /// The most.
    pub rate_limited_max: Span,
    /// A VALID still counts at PROVISION up to this.
    pub hard_maximum: Span,
    /// The least that `max_liveness_age` counts.
    pub floor: Span,
    /// The same, where a probe costs money.
    pub floor_paid: Span,
    /// How much of an age is left to chance, in per cent.
    pub jitter_percent: u32,
}

/// How providers are asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Probe {
    /// Of one walk up the ladder.
    pub budget: Span,
    /// Endpoints are tested with made-up keys.
    pub calibrate: bool,
    /// Loopback may be dialled, over plain http too.
    pub allow_loopback_http: bool,
    /// Further certificate authorities.
    pub ca_file: Option<PathBuf>,
}

/// How much is asked of each provider.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PerProvider {
    /// Probes at a time.
    pub in_flight: usize,
    /// Probes that wait for their turn.
    pub queue: usize,
    /// How long one may wait.
    pub queue_time: Span,
    /// Calls begun per second.
    pub per_second: NonZeroU32,
}

/// How many new credentials may be judged per minute.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NewKeys {
    /// For each organization.
    pub per_organization: NonZeroU32,
    /// For each caller.
    pub per_caller: NonZeroU32,
}

/// When a provider's breaker opens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Breaker {
    /// Failures in a row.
    pub failures: u32,
    /// How long it stays open at first.
    pub cool_down: Span,
    /// And at most.
    pub max_cool_down: Span,
    /// How long one trial may take.
    pub trial: Span,
}

/// A document of its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Document {
    /// Where it is; embedded if not set.
    pub file: Option<PathBuf>,
}

/// Of credential fingerprints.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct Fingerprints {
    /// Holds their key; none are made without it.
    pub key_file: Option<PathBuf>,
}

/// Of distributed traces.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tracing {
    /// The OTLP collector over gRPC; no traces without it.
    pub otlp_endpoint: Option<String>,
    /// Whom to trust for an https collector, in place of the system's authorities.
    pub ca_file: Option<PathBuf>,
    /// The part of the calls without a trace of their own that is traced.
    pub sample_ratio: f64,
    /// Of one batch of spans, tries again included.
    pub export_timeout: Span,
    /// How long a span waits to be sent.
    pub export_interval: Span,
    /// Spans that are held at a time.
    pub queue_spans: usize,
}

/// Whether the platform's metered proxy is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum ProxyWord {
    /// It is.
    Available,
    /// It is not.
    #[default]
    Absent,
}

/// Whether operator overrides count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum OverridesWord {
    /// They do.
    #[default]
    Honour,
    /// They are refused.
    Refuse,
}

/// The policy, per checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PolicyGroups {
    /// CREATE.
    pub create: Groups,
    /// PROVISION.
    pub provision: Groups,
    /// UPDATE.
    pub update: Groups,
}

/// What is done about each group of verdicts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Groups {
    /// FORBIDDEN.
    pub forbidden: ActionWord,
    /// TIMEOUT, UNREACHABLE, NOT_ATTEMPTED.
    pub unanswered: ActionWord,
    /// RATE_LIMITED, PROVIDER_ERROR, UNEXPECTED_RESPONSE, QUOTA_EXHAUSTED.
    pub inconclusive: ActionWord,
    /// NO_SERVER_SURFACE, NOT_CALIBRATED, PROBE_DISABLED.
    pub unverifiable: ActionWord,
}

/// What is done about a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActionWord {
    /// Allow, with a warning.
    Allow,
    /// Allow, with a warning, if it was VALID within the hard maximum age; else deny.
    AllowIfRecentlyValid,
    /// Deny.
    Deny,
}

/// How seriously one provider's verdicts are taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProviderException {
    /// How.
    pub probe: ProbeWord,
    /// Until when.
    #[serde(default)]
    pub until: Option<String>,
}

/// How seriously.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProbeWord {
    /// As the policy says.
    Enforce,
    /// Judged and shown, never denied for it.
    Report,
    /// Not asked.
    Off,
}

// === defaults ===

const fn seconds(seconds: u64) -> Span {
    Span(Duration::from_secs(seconds))
}

const fn millis(millis: u64) -> Span {
    Span(Duration::from_millis(millis))
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: vec!["127.0.0.1:50051".to_owned()],
            insecure_listen: false,
            allow_anonymous: false,
            worker_threads: 0,
            reload_interval: seconds(10),
            keepalive_interval: seconds(30),
            keepalive_timeout: seconds(10),
        }
    }
}

impl Default for Socket {
    fn default() -> Self {
        Self { mode: "0660".to_owned(), owner: None, group: None }
    }
}

impl Default for Callers {
    fn default() -> Self {
        Self { token_file: None, certificates: Vec::new(), unix_peers: Vec::new(), workspace_calls_per_minute: 12 }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_bytes: 256 * 1024,
            batch_message_bytes: 4 * 1024 * 1024,
            header_list_bytes: 16 * 1024,
            connections: 1024,
            streams_per_connection: 1024,
            decisions: 1_024,
            decisions_waiting: 256,
            decision_wait: millis(20),
            batch_items: 256,
            batch_concurrency: 32,
            credentials: 64,
            credential_bytes: 64 * 1024,
            name_bytes: 128,
            model_bytes: 512,
            base_url_names: 16,
            resolve_names: 256,
        }
    }
}

impl Default for Deadlines {
    fn default() -> Self {
        Self { decide: seconds(5), batch: seconds(60), handshake: seconds(5) }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { plain_allow_ratio: 1.0 }
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Self { notice: millis(500), drain: seconds(10) }
    }
}

impl Default for CacheAges {
    fn default() -> Self {
        let Ages {
            valid,
            valid_paid,
            refused,
            unanswered,
            inconclusive,
            rate_limited: (rate_limited_min, rate_limited_max),
            hard_maximum,
            floor,
            floor_paid,
            jitter_percent,
        } = Ages::default();
        Self {
            valid: Span(valid),
            valid_paid: Span(valid_paid),
            refused: Span(refused),
            unanswered: Span(unanswered),
            inconclusive: Span(inconclusive),
            rate_limited_min: Span(rate_limited_min),
            rate_limited_max: Span(rate_limited_max),
            hard_maximum: Span(hard_maximum),
            floor: Span(floor),
            floor_paid: Span(floor_paid),
            jitter_percent,
        }
    }
}

impl From<&CacheAges> for Ages {
    fn from(ages: &CacheAges) -> Self {
        Self {
            valid: ages.valid.0,
            valid_paid: ages.valid_paid.0,
            refused: ages.refused.0,
            unanswered: ages.unanswered.0,
            inconclusive: ages.inconclusive.0,
            rate_limited: (ages.rate_limited_min.0, ages.rate_limited_max.0),
            hard_maximum: ages.hard_maximum.0,
            floor: ages.floor.0,
            floor_paid: ages.floor_paid.0,
            jitter_percent: ages.jitter_percent,
        }
    }
}

impl Default for Probe {
    fn default() -> Self {
        Self { budget: seconds(3), calibrate: true, allow_loopback_http: false, ca_file: None }
    }
}

impl Default for PerProvider {
    fn default() -> Self {
        let ProviderLimits { in_flight, queue, queue_time, per_second } = ProviderLimits::default();
        Self { in_flight, queue, queue_time: Span(queue_time), per_second }
    }
}

impl From<&PerProvider> for ProviderLimits {
    fn from(limits: &PerProvider) -> Self {
        let PerProvider { in_flight, queue, queue_time, per_second } = limits;
        Self { in_flight: *in_flight, queue: *queue, queue_time: queue_time.0, per_second: *per_second }
    }
}

impl Default for NewKeys {
    fn default() -> Self {
        let NewKeyLimits { per_organization, per_caller } = NewKeyLimits::default();
        Self { per_organization, per_caller }
    }
}

impl From<&NewKeys> for NewKeyLimits {
    fn from(limits: &NewKeys) -> Self {
        let NewKeys { per_organization, per_caller } = limits;
        Self { per_organization: *per_organization, per_caller: *per_caller }
    }
}

impl Default for Breaker {
    fn default() -> Self {
        let BreakerSettings { failures, cool_down, max_cool_down, trial } = BreakerSettings::default();
        Self { failures, cool_down: Span(cool_down), max_cool_down: Span(max_cool_down), trial: Span(trial) }
    }
}

impl From<&Breaker> for BreakerSettings {
    fn from(breaker: &Breaker) -> Self {
        let Breaker { failures, cool_down, max_cool_down, trial } = breaker;
        Self { failures: *failures, cool_down: cool_down.0, max_cool_down: max_cool_down.0, trial: trial.0 }
    }
}

impl Default for Tracing {
    fn default() -> Self {
        Self {
            otlp_endpoint: None,
            ca_file: None,
            sample_ratio: 0.01,
            export_timeout: seconds(10),
            export_interval: seconds(5),
            queue_spans: 2048,
        }
    }
}

impl Default for PolicyGroups {
    fn default() -> Self {
        let policy = Policy::default();
        let groups = |checkpoint| Groups {
            forbidden: policy.action(checkpoint, Group::Forbidden).into(),
            unanswered: policy.action(checkpoint, Group::Unanswered).into(),
            inconclusive: policy.action(checkpoint, Group::Inconclusive).into(),
            unverifiable: policy.action(checkpoint, Group::Unverifiable).into(),
        };
        Self { create: groups(Checkpoint::Create), provision: groups(Checkpoint::Provision), update: groups(Checkpoint::Update) }
    }
}

impl From<Action> for ActionWord {
    fn from(action: Action) -> Self {
        match action {
            Action::Allow => Self::Allow,
            Action::AllowIfRecentlyValid => Self::AllowIfRecentlyValid,
            Action::Deny => Self::Deny,
        }
    }
}

impl From<ActionWord> for Action {
    fn from(word: ActionWord) -> Self {
        match word {
            ActionWord::Allow => Self::Allow,
            ActionWord::AllowIfRecentlyValid => Self::AllowIfRecentlyValid,
            ActionWord::Deny => Self::Deny,
        }
    }
}

// === impl Span ===

/// Longer than any setting needs, and far from where arithmetic on instants ends.
const MAX_SPAN: Duration = Duration::from_secs(7 * 24 * 3600);

impl Span {
    fn parse(text: &str) -> Option<Self> {
        let digits = text.len() - text.trim_start_matches(|letter: char| letter.is_ascii_digit()).len();
        let (number, unit) = text.split_at_checked(digits)?;
        let number = number.parse::<u64>().ok()?;
        let span = Duration::from_millis(number.checked_mul(match unit {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return None,
        })?);
        (span <= MAX_SPAN).then_some(Self(span))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.0.as_millis();
        if millis.is_multiple_of(1000) { write!(f, "{}s", millis / 1000) } else { write!(f, "{millis}ms") }
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text)
            .ok_or_else(|| de::Error::custom("must be a whole number with a unit (ms, s, m or h), at most 168h: 500ms, 10s, 5m"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_parse_and_print() {
        for (text, expect) in [
            ("500ms", Some("500ms")),
            ("10s", Some("10s")),
            ("5m", Some("300s")),
            ("1h", Some("3600s")),
            ("0s", Some("0s")),
            ("1500ms", Some("1500ms")),
            ("169h", None),
            ("99999999999999999999s", None),
            ("10", None),
            ("s", None),
            ("", None),
            ("-1s", None),
            ("1.5s", None),
            ("1 s", None),
            ("1é", None),
        ] {
            assert_eq!(Span::parse(text).map(|span| span.to_string()).as_deref(), expect, "{text:?}");
        }
    }
}
