//! Who is calling: by client certificate, by bearer token, by Unix peer; and which calls that one may make.

use std::{
    collections::BTreeSet,
    io::Read,
    num::NonZeroU32,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use arc_swap::ArcSwap;
use governor::{Quota, RateLimiter, clock::Clock, middleware::NoOpMiddleware, state::keyed::HashMapStateStore};
use http::{HeaderMap, header};
use rand::Rng;
use subtle::ConstantTimeEq;
use tonic::Status;
use zeroize::Zeroizing;

use super::{
    error::ServerError,
    listen::Peer,
    reload::{Refreshed, Source},
};
use crate::{
    config::settings::{Callers as CallerSettings, CertificateCaller, RoleWord, UnixCaller},
    grpc::{
        NAME,
        caller::{Caller, Role},
        convert::pb::ErrorReason,
        errors::{error, limit_reached},
    },
    liveness::provider_limits::TokioClock,
};

/// The largest file of tokens.
const MAX_TOKEN_FILE_BYTES: u64 = 64 * 1024;
/// A token that can be guessed keeps nobody out: 16 characters of base64 are 96 bits.
const MIN_TOKEN_BYTES: usize = 16;
/// Health, which everybody may ask: a kubelet has neither certificate nor token.
const HEALTH_PREFIX: &str = "/grpc.health.v1.Health/";

/// Everybody who may call.
pub(super) struct Callers {
    listed: ArcSwap<Listed>,
    tokens: Option<Arc<Tokens>>,
    anonymous: Arc<Caller>,
    any_certificate: Arc<Caller>,
    any_unix_peer: Arc<Caller>,
    rates: Rates,
    per_minute: NonZeroU32,
}

/// Who may call by certificate or by Unix peer, as the configuration lists them.
struct Listed {
    certificates: Vec<(String, Arc<Caller>)>,
    unix_peers: Vec<(UnixCaller, Arc<Caller>)>,
}

/// What a connection says about its caller.
#[derive(Debug, Clone)]
pub(super) enum Connected {
    /// It is this one.
    Caller(Arc<Caller>),
    /// Nothing; a token can.
    Unknown,
    /// It may not call at all.
    Refused(String),
}

/// Tokens, from a file that is read again.
pub(super) struct Tokens {
    path: PathBuf,
    /// Made anew by every process: neither tokens nor anything that is made of them alone stays in memory.
    key: [u8; 32],
    known: ArcSwap<Vec<Token>>,
    last: Mutex<[u8; 32]>,
}

struct Token {
    hash: [u8; 32],
    caller: Arc<Caller>,
}

/// Calls of each caller whose rate is low, by its name: of as many as are configured.
type Rates = RateLimiter<String, HashMapStateStore<String>, TokioClock, NoOpMiddleware<Duration>>;

// === impl Callers ===

impl Callers {
    pub(super) fn new(settings: &CallerSettings) -> Result<Self, ServerError> {
        // Checked with the settings: it is not 0.
        let per_minute = NonZeroU32::new(settings.workspace_calls_per_minute).unwrap_or(NonZeroU32::MIN);
        let named = |name: &str| Arc::new(Caller { name: name.to_owned(), role: Role::Platform });
        Ok(Self {
            listed: ArcSwap::from_pointee(Listed::of(settings)),
            tokens: settings.token_file.as_deref().map(Tokens::load).transpose()?.map(Arc::new),
            anonymous: named("anonymous"),
            any_certificate: named("certificate"),
            any_unix_peer: named("unix peer"),
            rates: RateLimiter::new(Quota::per_minute(per_minute), HashMapStateStore::default(), TokioClock::new()),
            per_minute,
        })
    }

    /// Takes the lists of certificates and Unix peers anew. Connections that stand keep the caller that they are.
    pub(super) fn relist(&self, settings: &CallerSettings) {
        self.listed.store(Arc::new(Listed::of(settings)));
    }

    /// The tokens, if they are how callers are known.
    pub(super) fn tokens(&self) -> Option<&Arc<Tokens>> {
        self.tokens.as_ref()
    }

    /// Who a connection without a client's certificate is.
    pub(super) fn by_peer(&self, peer: Peer) -> Connected {
        let listed = self.listed.load();
        match peer {
            Peer::Tcp(_) if self.tokens.is_some() => Connected::Unknown,
            Peer::Tcp(_) => Connected::Caller(Arc::clone(&self.anonymous)),
            Peer::Unix { .. } if listed.unix_peers.is_empty() => Connected::Caller(Arc::clone(&self.any_unix_peer)),
            Peer::Unix { uid, gid } => {
                let matches = |wanted: Option<u32>, found| wanted.is_none_or(|wanted| wanted == found);
                let found = listed.unix_peers.iter().find(|(peer, _)| matches(peer.uid, uid) && matches(peer.gid, gid));
                found.map_or_else(
                    || Connected::Refused(format!("uid {uid} with gid {gid} is not on the list of Unix peers")),
                    |(_, caller)| Connected::Caller(Arc::clone(caller)),
                )
            }
        }
    }

    /// Who a certificate with these names is. None: nobody who may call.
    pub(super) fn by_names<'a>(&self, names: impl Iterator<Item = &'a str>) -> Option<Arc<Caller>> {
        let listed = self.listed.load();
        if listed.certificates.is_empty() {
            return Some(Arc::clone(&self.any_certificate));
        }
        let names: Vec<&str> = names.collect();
        let found = listed.certificates.iter().find(|(san, _)| names.iter().any(|name| covers(san, name)));
        found.map(|(_, caller)| Arc::clone(caller))
    }

    /// Who makes this call, if that one may. None: somebody unknown who asks for health.
    pub(super) fn admit(&self, connected: &Connected, path: &str, headers: &HeaderMap) -> Result<Option<Arc<Caller>>, Status> {
        if path.starts_with(HEALTH_PREFIX) {
            return Ok(None);
        }
        let caller = self.known(connected, headers)?;
        let method = path.strip_prefix('/').and_then(|path| path.strip_prefix(NAME)).and_then(|path| path.strip_prefix('/'));
        match (&caller.role, method) {
            (Role::Platform, _) => {}
            (Role::Operator, Some("Decide" | "BatchDecide")) => {
                return Err(error(ErrorReason::MethodNotAllowed, "an `operator` caller may not ask for decisions"));
            }
            (Role::Operator, _) => {}
            (Role::Workspace(_), Some("Decide")) => self.take(&caller.name)?,
            (Role::Workspace(_), _) => {
                return Err(error(ErrorReason::MethodNotAllowed, "a `workspace` caller may call Decide only"));
            }
        }
        Ok(Some(caller))
    }

    fn known(&self, connected: &Connected, headers: &HeaderMap) -> Result<Arc<Caller>, Status> {
        if let Connected::Refused(why) = connected {
            return Err(error(ErrorReason::CallerUnknown, why));
        }
        if let Some(tokens) = &self.tokens {
            match bearer(headers) {
                Err(()) => return Err(error(ErrorReason::TokenMalformed, "the authorization header is not one bearer token")),
                Ok(Some(token)) => {
                    let caller = tokens.caller_of(token);
                    return caller.ok_or_else(|| error(ErrorReason::TokenUnknown, "the bearer token is not known"));
                }
                Ok(None) => {}
            }
        }
        match connected {
            Connected::Caller(caller) => Ok(Arc::clone(caller)),
            Connected::Unknown | Connected::Refused(_) => {
                Err(error(ErrorReason::TokenMissing, "the call carries no bearer token: send `authorization: Bearer TOKEN`"))
            }
        }
    }

    /// One call of a caller whose rate is low.
    fn take(&self, name: &str) -> Result<(), Status> {
        let over = |spent: governor::NotUntil<Duration>| {
            let words = format!("{} calls a minute", self.per_minute);
            limit_reached("callers.workspace_calls_per_minute", &words, spent.wait_time_from(self.rates.clock().now()))
        };
        self.rates.check_key(&name.to_owned()).map_err(over)
    }
}

/// Whether an entry of the list covers a name: the same text, or everything below a URI that ends in `/*`.
fn covers(entry: &str, name: &str) -> bool {
    match entry.strip_suffix('*') {
        Some(below) if below.ends_with('/') && below.contains("://") => name.len() > below.len() && name.starts_with(below),
        Some(_) | None => entry == name,
    }
}

fn role_of(word: RoleWord, workspaces: BTreeSet<String>) -> Role {
    match word {
        RoleWord::Platform => Role::Platform,
        RoleWord::Workspace => Role::Workspace(workspaces),
        RoleWord::Operator => Role::Operator,
    }
}

/// The bearer token of a call, if it has one. More than one, or another scheme, is a fault.
fn bearer(headers: &HeaderMap) -> Result<Option<&[u8]>, ()> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => {
            let (scheme, token) = value.as_bytes().split_at_checked(7).ok_or(())?;
            if scheme.eq_ignore_ascii_case(b"bearer ") { Ok(Some(token)) } else { Err(()) }
        }
        (Some(_), Some(_)) => Err(()),
    }
}

// === impl Listed ===

impl Listed {
    fn of(settings: &CallerSettings) -> Self {
        let certificate = |caller: &CertificateCaller| {
            let CertificateCaller { san, role, workspaces } = caller;
            (san.clone(), Arc::new(Caller { name: format!("certificate {san}"), role: role_of(*role, workspaces.clone()) }))
        };
        let peer = |caller: &UnixCaller| {
            let of = |id: Option<u32>| id.map_or_else(|| "any".to_owned(), |id| id.to_string());
            let name = format!("unix uid {} gid {}", of(caller.uid), of(caller.gid));
            (caller.clone(), Arc::new(Caller { name, role: role_of(caller.role, caller.workspaces.clone()) }))
        };
        Self {
            certificates: settings.certificates.iter().map(certificate).collect(),
            unix_peers: settings.unix_peers.iter().map(peer).collect(),
        }
    }
}

// === impl Tokens ===

impl Tokens {
    fn load(path: &Path) -> Result<Self, ServerError> {
        let mut key = [0; 32];
        rand::rng().fill(&mut key);
        let content = read(path)?;
        Ok(Self {
            path: path.to_owned(),
            known: ArcSwap::from_pointee(parse(path, &content, &key)?),
            last: Mutex::new(*blake3::keyed_hash(&key, content.as_bytes()).as_bytes()),
            key,
        })
    }

    /// Who has this token. Both sides are hashed under a key of this process, and every entry is looked at: the time tells
    /// nothing about how much of a token was right.
    fn caller_of(&self, token: &[u8]) -> Option<Arc<Caller>> {
        let hash = blake3::keyed_hash(&self.key, token);
        let mut found = None;
        for known in self.known.load().iter() {
            if bool::from(known.hash.ct_eq(hash.as_bytes())) {
                found = Some(Arc::clone(&known.caller));
            }
        }
        found
    }
}

impl Source for Tokens {
    fn name(&self) -> &'static str {
        "tokens"
    }

    fn refresh(&self) -> Result<Refreshed, ServerError> {
        let content = read(&self.path)?;
        let hash = *blake3::keyed_hash(&self.key, content.as_bytes()).as_bytes();
        if *self.last.lock().unwrap_or_else(PoisonError::into_inner) == hash {
            return Ok(Refreshed::Unchanged);
        }
        self.known.store(Arc::new(parse(&self.path, &content, &self.key)?));
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = hash;
        Ok(Refreshed::Changed)
    }
}

fn read(path: &Path) -> Result<Zeroizing<String>, ServerError> {
    // The whole size at once: a buffer that grows leaves its smaller selves behind.
    let mut content = Zeroizing::new(String::with_capacity(usize::try_from(MAX_TOKEN_FILE_BYTES).unwrap_or_default() + 1));
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_TOKEN_FILE_BYTES + 1).read_to_string(&mut content))
        .map_err(|source| ServerError::File { path: path.to_owned(), source })?;
    Ok(content)
}

/// `TOKEN [ROLE [ID,ID..]]` a line; `#` begins a comment. What is wrong is told by line, never by content.
fn parse(path: &Path, content: &str, key: &[u8; 32]) -> Result<Vec<Token>, ServerError> {
    let fault = |line: usize, message: &str| ServerError::Content {
        path: path.to_owned(),
        message: if line == 0 { message.to_owned() } else { format!("line {line}: {message}") },
    };
    if content.len() as u64 > MAX_TOKEN_FILE_BYTES {
        return Err(fault(0, &format!("is over {MAX_TOKEN_FILE_BYTES} bytes long")));
    }
    let mut tokens: Vec<Token> = Vec::new();
    for (number, line) in (1..).zip(content.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut words = line.split_ascii_whitespace();
        let token = words.next().unwrap_or_default();
        if token.len() < MIN_TOKEN_BYTES {
            return Err(fault(number, &format!("the token has less than {MIN_TOKEN_BYTES} characters")));
        }
        if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(fault(number, "the token holds a character that no header can carry"));
        }
        let ids: BTreeSet<String>;
        let role = match (words.next(), words.next(), words.next()) {
            (_, _, Some(_)) => return Err(fault(number, "has too many words: TOKEN [ROLE [ID,ID..]]")),
            (None | Some("platform"), None, None) => Role::Platform,
            (Some("operator"), None, None) => Role::Operator,
            (Some("workspace"), Some(list), None) => {
                ids = list.split(',').filter(|id| !id.is_empty()).map(str::to_owned).collect();
                Role::Workspace(ids)
            }
            (Some("workspace"), None, None) => return Err(fault(number, "`workspace` needs its ids behind it: ID,ID..")),
            (Some("platform" | "operator"), Some(_), None) => return Err(fault(number, "only `workspace` takes ids")),
            (Some(_) | None, _, _) => return Err(fault(number, "the role must be platform, workspace or operator")),
        };
        let hash = *blake3::keyed_hash(key, token.as_bytes()).as_bytes();
        if tokens.iter().any(|other| bool::from(other.hash.ct_eq(&hash))) {
            return Err(fault(number, "the token stands twice"));
        }
        tokens.push(Token { hash, caller: Arc::new(Caller { name: format!("token of line {number}"), role }) });
    }
    if tokens.is_empty() {
        return Err(fault(0, "holds no token: nobody could call"));
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tonic::Code;

    use super::*;

    const GOOD: &str = "made-up-token-of-the-platform";

    fn parsed(content: &str) -> Result<Vec<Token>, String> {
        parse(Path::new("tokens"), content, &[7; 32]).map_err(|fault| fault.to_string())
    }

    #[test]
    fn lines_have_roles_and_faults_are_told_without_the_token() {
        let tokens =
            parsed(&format!("# ours\n\n{GOOD}\r\nmade-up-token-two-xx workspace ws-1,ws-2\nmade-up-token-three operator\n"))
                .unwrap();
        let roles: Vec<&Role> = tokens.iter().map(|token| &token.caller.role).collect();
        let ids = BTreeSet::from(["ws-1".to_owned(), "ws-2".to_owned()]);
        assert_eq!(roles, [&Role::Platform, &Role::Workspace(ids), &Role::Operator]);
        for (content, expect) in [
            ("", "holds no token"),
            ("made-up-short", "line 1: the token has less"),
            ("made-up-canary-0123456789 root", "line 1: the role"),
            ("made-up-canary-0123456789 workspace", "line 1: `workspace` needs"),
            ("made-up-canary-0123456789 operator ws-1", "line 1: only `workspace`"),
            ("made-up-canary-0123456789 workspace a b", "line 1: has too many"),
            ("made-up-canary-0123456789\nmade-up-canary-0123456789", "line 2: the token stands twice"),
            ("made-up-canary-0123456789-é", "line 1: the token holds"),
        ] {
            let Err(fault) = parsed(content) else { panic!("{content} was taken") };
            assert!(fault.contains(expect), "{fault}");
            assert!(!fault.contains("canary"), "{fault}");
        }
    }

    #[test]
    fn an_entry_covers_its_own_name_or_everything_below_a_uri() {
        for (entry, name, expect) in [
            ("spiffe://a/api", "spiffe://a/api", true),
            ("spiffe://a/api", "spiffe://a/api/b", false),
            ("spiffe://a/*", "spiffe://a/api/b", true),
            ("spiffe://a/*", "spiffe://a/", false),
            ("spiffe://a/*", "spiffe://ab/c", false),
            ("spiffe://a/api*", "spiffe://a/api-2", false),
            ("*", "api.example", false),
            ("*.example", "api.example", false),
            ("api.example", "api.example", true),
        ] {
            assert_eq!(covers(entry, name), expect, "{entry} {name}");
        }
    }

    fn callers(settings: CallerSettings) -> Callers {
        Callers::new(&settings).unwrap()
    }

    #[test]
    fn a_unix_peer_must_match_every_id_that_is_given() {
        let one = |uid, gid| UnixCaller { uid, gid, role: RoleWord::Operator, workspaces: BTreeSet::new() };
        let callers =
            callers(CallerSettings { unix_peers: vec![one(Some(1), Some(2)), one(None, Some(9))], ..CallerSettings::default() });
        for (uid, gid, allowed) in [(1, 2, true), (1, 3, false), (3, 2, false), (5, 9, true)] {
            let connected = callers.by_peer(Peer::Unix { uid, gid });
            assert_eq!(matches!(connected, Connected::Caller(_)), allowed, "{uid} {gid}");
            if !allowed {
                let refused = callers.admit(&connected, &format!("/{NAME}/Decide"), &HeaderMap::new()).unwrap_err();
                assert_eq!(refused.code(), Code::PermissionDenied);
                assert_eq!(callers.admit(&connected, "/grpc.health.v1.Health/Check", &HeaderMap::new()).unwrap(), None);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn roles_rule_over_methods_and_a_workspace_has_a_low_rate() {
        let callers = callers(CallerSettings { workspace_calls_per_minute: 2, ..CallerSettings::default() });
        let known = |role| Connected::Caller(Arc::new(Caller { name: "test".into(), role }));
        let may = |connected: &Connected, method: &str| {
            callers
                .admit(connected, &format!("/{NAME}/{method}"), &HeaderMap::new())
                .map_or_else(|status| status.code(), |_| Code::Ok)
        };
        let operator = known(Role::Operator);
        let platform = known(Role::Platform);
        for method in ["Decide", "BatchDecide", "ResolveProvider", "ListModels", "GetRegistryStatus"] {
            assert_eq!(may(&platform, method), Code::Ok);
            let expect = if method.ends_with("Decide") { Code::PermissionDenied } else { Code::Ok };
            assert_eq!(may(&operator, method), expect, "{method}");
        }
        let workspace = known(Role::Workspace(BTreeSet::from(["ws-1".to_owned()])));
        for method in ["BatchDecide", "ResolveProvider", "ListModels", "GetRegistryStatus"] {
            assert_eq!(may(&workspace, method), Code::PermissionDenied, "{method}");
        }
        assert_eq!([may(&workspace, "Decide"), may(&workspace, "Decide")], [Code::Ok; 2]);
        assert_eq!(may(&workspace, "Decide"), Code::ResourceExhausted);
        tokio::time::advance(Duration::from_secs(30)).await;
        assert_eq!([may(&workspace, "Decide"), may(&workspace, "Decide")], [Code::Ok, Code::ResourceExhausted]);
    }
}
