//! Identifies callers by client certificate, bearer token or Unix peer. The lists are consulted for each call, so that a removed caller can make
//! no further call, even on an open connection.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use arc_swap::ArcSwap;
use http::{HeaderMap, header};
use rand::Rng;
use subtle::ConstantTimeEq;
use tonic::Status;

use super::{
    error::ServerError,
    settings::{CallerSettings, CertificateCaller, RoleWord, UnixCaller},
};
use crate::{
    domain::{
        problem::{Problem, Problems},
        request::Peer,
        secret::keyed_hash,
    },
    grpc::{
        authorize::{Caller, Role},
        convert::pb::ErrorReason,
        errors::error,
    },
    telemetry::recent_changes::RecentChanges,
    watch::{Fault, Reloaded, Source, files},
};

/// The setting that names the token file.
const TOKEN_FILE: &str = "callers.token_file";
/// The maximum size of the token file.
const MAX_TOKEN_FILE_BYTES: u64 = 64 * 1024;
/// The minimum length of a token, so that it cannot be guessed: 16 characters of base64 are 96 bits.
const MIN_TOKEN_BYTES: usize = 16;

/// All known callers.
pub(super) struct Callers {
    lists: ArcSwap<CallerLists>,
    tokens: Option<Arc<Tokens>>,
    anonymous: Arc<Caller>,
    any_certificate: Arc<Caller>,
    any_unix_peer: Arc<Caller>,
}

/// The callers by certificate and by Unix peer, as the configuration lists them.
struct CallerLists {
    certificates: Vec<(String, Arc<Caller>)>,
    unix_peers: Vec<(UnixCaller, Arc<Caller>)>,
}

/// What a connection proves about its peer.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    pub(super) peer: Peer,
    /// The names of its client certificate, if it has one. The handshake has verified them.
    pub(super) names: Option<Vec<String>>,
}

/// The bearer tokens, from a file that is reloaded.
pub(super) struct Tokens {
    path: PathBuf,
    /// Each process makes a new hash key, so that memory holds neither tokens nor hashes that could be reproduced from tokens alone.
    key: [u8; 32],
    known: ArcSwap<Vec<Token>>,
    last: Mutex<[u8; 32]>,
    tier: Option<&'static str>,
    changes: Arc<RecentChanges>,
}

struct Token {
    hash: [u8; 32],
    caller: Arc<Caller>,
}

// === impl Callers ===

impl Callers {
    /// Changes of the token file are noted in `changes`. With a shared tier, which this setting names, no token may be a workspace's.
    pub(super) fn new(
        settings: &CallerSettings,
        tier: Option<&'static str>,
        changes: &Arc<RecentChanges>,
    ) -> Result<Self, ServerError> {
        let tokens = settings.token_file.as_deref().map(|path| Tokens::load(path, tier, changes));
        let named = |name: &str| Arc::new(Caller { name: name.to_owned(), role: Role::Platform });
        Ok(Self {
            lists: ArcSwap::from_pointee(CallerLists::of(settings)),
            tokens: tokens.transpose()?.map(Arc::new),
            anonymous: named("anonymous"),
            any_certificate: named("certificate"),
            any_unix_peer: named("unix peer"),
        })
    }

    /// Replaces the lists of certificates and Unix peers.
    pub(super) fn replace_lists(&self, settings: &CallerSettings) {
        self.lists.store(Arc::new(CallerLists::of(settings)));
    }

    /// The tokens, if a token file is configured.
    pub(super) fn tokens(&self) -> Option<&Arc<Tokens>> {
        self.tokens.as_ref()
    }

    /// Whether a certificate with these names may call.
    pub(super) fn allows_names(&self, names: &[String]) -> bool {
        self.by_names(names).is_some()
    }

    /// Identifies the caller of a call with these headers, on a connection with this identity.
    pub(super) fn identify(&self, identity: &Identity, headers: &HeaderMap) -> Result<Arc<Caller>, Status> {
        let refused = |message: String| error(ErrorReason::CallerUnknown, message);
        let by_connection = match (identity.peer, &identity.names) {
            (Peer::Tcp(_), Some(names)) => {
                let message = "the client certificate's names are not on the list of callers";
                Some(self.by_names(names).ok_or_else(|| refused(message.to_owned()))?)
            }
            (Peer::Tcp(_), None) if self.tokens.is_some() => None,
            (Peer::Tcp(_), None) => Some(Arc::clone(&self.anonymous)),
            (Peer::Unix { uid, gid }, _) => Some(
                self.by_unix_peer(uid, gid)
                    .ok_or_else(|| refused(format!("uid {uid} with gid {gid} is not on the list of Unix peers")))?,
            ),
        };
        let Some(tokens) = &self.tokens else { return by_connection.ok_or_else(token_missing) };
        match bearer_token(headers) {
            Err(()) => Err(error(ErrorReason::TokenMalformed, "the authorization header is not one bearer token")),
            Ok(Some(token)) => {
                tokens.caller_of(token).ok_or_else(|| error(ErrorReason::TokenUnknown, "the bearer token is not known"))
            }
            Ok(None) => by_connection.ok_or_else(token_missing),
        }
    }

    fn by_unix_peer(&self, uid: u32, gid: u32) -> Option<Arc<Caller>> {
        let lists = self.lists.load();
        if lists.unix_peers.is_empty() {
            return Some(Arc::clone(&self.any_unix_peer));
        }
        let matches = |wanted: Option<u32>, found| wanted.is_none_or(|wanted| wanted == found);
        let found = lists.unix_peers.iter().find(|(peer, _)| matches(peer.uid, uid) && matches(peer.gid, gid));
        found.map(|(_, caller)| Arc::clone(caller))
    }

    fn by_names(&self, names: &[String]) -> Option<Arc<Caller>> {
        let lists = self.lists.load();
        if lists.certificates.is_empty() {
            return Some(Arc::clone(&self.any_certificate));
        }
        let found = lists.certificates.iter().find(|(san, _)| names.iter().any(|name| covers(san, name)));
        found.map(|(_, caller)| Arc::clone(caller))
    }
}

fn token_missing() -> Status {
    error(ErrorReason::TokenMissing, "the call carries no bearer token: send `authorization: Bearer TOKEN`")
}

/// Whether a list entry covers a name. An entry covers the same text, or everything below it if it is a URI that ends in `/*`.
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

/// The bearer token of a call, if it has one. More than one, or another scheme, is an error.
fn bearer_token(headers: &HeaderMap) -> Result<Option<&[u8]>, ()> {
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

// === impl CallerLists ===

impl CallerLists {
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
            certificates: settings.certificates.entries().iter().map(certificate).collect(),
            unix_peers: settings.unix_peers.entries().iter().map(peer).collect(),
        }
    }
}

// === impl Tokens ===

impl Tokens {
    fn load(path: &Path, tier: Option<&'static str>, changes: &Arc<RecentChanges>) -> Result<Self, ServerError> {
        let mut key = [0; 32];
        rand::rng().fill(&mut key);
        let content = read(path)?;
        Ok(Self {
            path: path.to_owned(),
            known: ArcSwap::from_pointee(parse(path, &content, &key, tier)?),
            last: Mutex::new(keyed_hash(&key, content.as_bytes())),
            key,
            tier,
            changes: Arc::clone(changes),
        })
    }

    fn refresh(&self) -> Result<Reloaded, ServerError> {
        let content = read(&self.path)?;
        let hash = keyed_hash(&self.key, content.as_bytes());
        if *self.last.lock().unwrap_or_else(PoisonError::into_inner) == hash {
            return Ok(Reloaded::Unchanged);
        }
        let new = parse(&self.path, &content, &self.key, self.tier)?;
        let old = self.known.swap(Arc::new(new));
        let known = self.known.load();
        let is_removed = |token: &&Token| !known.iter().any(|other| bool::from(other.hash.ct_eq(&token.hash)));
        for Token { caller, .. } in old.iter().filter(is_removed) {
            self.changes.caller_removed(TOKEN_FILE, &format!("{} of the old file", caller.name));
        }
        for Token { hash, caller } in known.iter() {
            let earlier = old.iter().find(|other| bool::from(other.hash.ct_eq(hash)));
            let earlier = earlier.map(|earlier| &earlier.caller.role);
            let Caller { name, role } = &**caller;
            if let Some(earlier) = earlier.filter(|earlier| *earlier != role) {
                self.changes.caller_changed(TOKEN_FILE, name, &earlier.to_string(), &role.to_string());
            }
            if earlier.is_none_or(|earlier| !earlier.covers(role)) {
                let was = earlier.map_or_else(|| format!("without {name}"), |earlier| format!("with {name} as {earlier}"));
                self.changes.loosened(TOKEN_FILE, &was, &format!("with {name} as {role}"));
            }
        }
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = hash;
        Ok(Reloaded::Taken)
    }

    /// The caller with this token. It compares keyed hashes in constant time and visits every entry, so that the time does not reveal how much of
    /// a token was right.
    fn caller_of(&self, token: &[u8]) -> Option<Arc<Caller>> {
        let hash = keyed_hash(&self.key, token);
        let mut found = None;
        for known in self.known.load().iter() {
            if bool::from(known.hash.ct_eq(&hash)) {
                found = Some(Arc::clone(&known.caller));
            }
        }
        found
    }
}

impl Source for Arc<Tokens> {
    fn name(&self) -> &'static str {
        "tokens"
    }

    fn files(&self) -> Vec<PathBuf> {
        vec![self.path.clone()]
    }

    fn secrets(&self) -> Vec<PathBuf> {
        self.files()
    }

    fn reload(&mut self) -> Result<Reloaded, Fault> {
        self.refresh().map_err(|fault| Fault(super::error::chain(&fault)))
    }
}

fn read(path: &Path) -> Result<zeroize::Zeroizing<String>, ServerError> {
    files::read_text(path, MAX_TOKEN_FILE_BYTES).map_err(|source| ServerError::File { path: path.to_owned(), source })
}

/// Parses lines of `TOKEN [ROLE [ID,ID..]]`; `#` begins a comment. Reports every bad line by its number, and never by its content.
fn parse(path: &Path, content: &str, key: &[u8; 32], tier: Option<&str>) -> Result<Vec<Token>, ServerError> {
    let fault = |message: String| Err(ServerError::Content { path: path.to_owned(), message });
    if content.len() as u64 > MAX_TOKEN_FILE_BYTES {
        return fault(format!("is over {MAX_TOKEN_FILE_BYTES} bytes long"));
    }
    let (mut tokens, mut faults): (Vec<Token>, Vec<Problem>) = (Vec::new(), Vec::new());
    for (number, line) in (1..).zip(content.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let parsed = token_and_role(line).and_then(|(token, role)| {
            if let (Role::Workspace(_), Some(tier)) = (&role, tier) {
                return Err(format!(
                    "names a `workspace` caller beside {tier}: a process that holds the shared tier's key may not serve workspaces"
                ));
            }
            let hash = keyed_hash(key, token.as_bytes());
            let is_known = tokens.iter().any(|other| bool::from(other.hash.ct_eq(&hash)));
            if is_known { Err("the token appears twice".to_owned()) } else { Ok((hash, role)) }
        });
        match parsed {
            Ok((hash, role)) => {
                tokens.push(Token { hash, caller: Arc::new(Caller { name: format!("token of line {number}"), role }) })
            }
            Err(message) => faults.push(Problem { place: String::new(), line: Some(number), message }),
        }
    }
    if !faults.is_empty() {
        return Err(ServerError::Lines(Problems { document: path.display().to_string(), list: faults }));
    }
    if tokens.is_empty() {
        return fault("contains no token: no caller could connect".to_owned());
    }
    Ok(tokens)
}

/// What one line says, or what is wrong with it.
fn token_and_role(line: &str) -> Result<(&str, Role), String> {
    let mut words = line.split_ascii_whitespace();
    let token = words.next().unwrap_or_default();
    if token.len() < MIN_TOKEN_BYTES {
        return Err(format!("the token has fewer than {MIN_TOKEN_BYTES} characters"));
    }
    if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("the token holds a character that no header can carry".to_owned());
    }
    let role = match (words.next(), words.next(), words.next()) {
        (_, _, Some(_)) => Err("has too many words: TOKEN [ROLE [ID,ID..]]"),
        (None | Some("platform"), None, None) => Ok(Role::Platform),
        (Some("operator"), None, None) => Ok(Role::Operator),
        (Some("workspace"), Some(list), None) => {
            if list.split(',').any(str::is_empty) {
                Err("a workspace's id is empty: ID,ID..")
            } else {
                Ok(Role::Workspace(list.split(',').map(str::to_owned).collect()))
            }
        }
        (Some("workspace"), None, None) => Err("`workspace` needs its ids behind it: ID,ID.."),
        (Some("platform" | "operator"), Some(_), None) => Err("only `workspace` takes ids"),
        (Some(_) | None, _, _) => Err("the role must be platform, workspace or operator"),
    };
    Ok((token, role?))
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use crate::server::settings::CallerList;

    const GOOD: &str = "made-up-token-of-the-platform";

    fn parsed(content: &str) -> Result<Vec<Token>, String> {
        parse(Path::new("tokens"), content, &[7; 32], None).map_err(|fault| fault.to_string())
    }

    #[test]
    fn lines_have_roles_and_errors_never_quote_the_token() {
        let tokens =
            parsed(&format!("# ours\n\n{GOOD}\r\nmade-up-token-two-xx workspace ws-1,ws-2\nmade-up-token-three operator\n"))
                .unwrap();
        let roles: Vec<&Role> = tokens.iter().map(|token| &token.caller.role).collect();
        let ids = BTreeSet::from(["ws-1".to_owned(), "ws-2".to_owned()]);
        assert_eq!(roles, [&Role::Platform, &Role::Workspace(ids), &Role::Operator]);
        for (content, expect) in [
            ("", "contains no token"),
            ("made-up-short", "line 1: the token has fewer"),
            ("made-up-canary-0123456789 root", "line 1: the role"),
            ("made-up-canary-0123456789 workspace", "line 1: `workspace` needs"),
            ("made-up-canary-0123456789 operator ws-1", "line 1: only `workspace`"),
            ("made-up-canary-0123456789 workspace a b", "line 1: has too many"),
            ("made-up-canary-0123456789 workspace a,,b", "line 1: a workspace's id is empty"),
            ("made-up-canary-0123456789 workspace ,", "line 1: a workspace's id is empty"),
            ("made-up-canary-0123456789\nmade-up-canary-0123456789", "line 2: the token appears twice"),
            ("made-up-canary-0123456789-é", "line 1: the token holds"),
        ] {
            let Err(fault) = parsed(content) else { panic!("{content} was taken") };
            assert!(fault.contains(expect), "{fault}");
            assert!(!fault.contains("canary"), "{fault}");
        }
    }

    /// What lets through more than before is loosened, as it is for the other lists of callers.
    #[test]
    fn a_token_that_is_added_or_may_do_more_is_a_loosening() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokens");
        let changes = Arc::default();
        std::fs::write(&path, format!("{GOOD} operator\nmade-up-token-two-xx workspace a\n")).unwrap();
        let tokens = Tokens::load(&path, None, &changes).unwrap();
        let mut seen = 0;
        let mut after = |text: &str| -> Vec<String> {
            std::fs::write(&path, text).unwrap();
            assert!(matches!(tokens.refresh().unwrap(), Reloaded::Taken));
            let all = changes.newest_first();
            let new = all
                .iter()
                .take(all.len() - seen)
                .map(|change| format!("{} {} {} -> {}", change.event, change.caller, change.was, change.is).replace("  ", " "));
            let new: Vec<String> = new.collect();
            seen = all.len();
            new.into_iter().rev().collect()
        };
        let less = format!("{GOOD} operator\n");
        assert_eq!(after(&less), ["caller_removed token of line 2 of the old file -> "]);
        let raised = format!("{GOOD}\n");
        assert_eq!(
            after(&raised),
            [
                "caller_changed token of line 1 operator -> platform",
                "configuration_loosened with token of line 1 as operator -> with token of line 1 as platform",
            ]
        );
        assert_eq!(after(&less), ["caller_changed token of line 1 platform -> operator"], "the way back opens nothing");
        let added = format!("{GOOD} operator\nmade-up-token-three workspace b\n");
        assert_eq!(after(&added), ["configuration_loosened without token of line 2 -> with token of line 2 as workspace b"]);
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

    #[test]
    fn a_unix_peer_must_match_every_id_that_is_given_and_is_looked_up_for_each_call() {
        let one = |uid, gid| UnixCaller { uid, gid, role: RoleWord::Operator, workspaces: BTreeSet::new() };
        let settings = |peers| CallerSettings { unix_peers: CallerList::Only(peers), ..CallerSettings::default() };
        let callers = Callers::new(&settings(vec![one(Some(1), Some(2)), one(None, Some(9))]), None, &Arc::default()).unwrap();
        let identify = |uid, gid| {
            let identity = Identity { peer: Peer::Unix { uid, gid }, names: None };
            callers.identify(&identity, &HeaderMap::new()).map_err(|status| status.code())
        };
        for (uid, gid, allowed) in [(1, 2, true), (1, 3, false), (3, 2, false), (5, 9, true)] {
            assert_eq!(identify(uid, gid).is_ok(), allowed, "{uid} {gid}");
        }
        callers.replace_lists(&settings(vec![one(Some(1), Some(2))]));
        assert_eq!(identify(5, 9).unwrap_err(), Code::PermissionDenied);
        assert!(identify(1, 2).is_ok());
    }

    #[test]
    fn a_certificate_that_is_taken_off_the_list_makes_no_further_call() {
        let one = |san: &str| CertificateCaller { san: san.into(), role: RoleWord::Platform, workspaces: BTreeSet::new() };
        let settings = |names| CallerSettings { certificates: CallerList::Only(names), ..CallerSettings::default() };
        let callers = Callers::new(&settings(vec![one("spiffe://a/*"), one("api.example")]), None, &Arc::default()).unwrap();
        let identity =
            Identity { peer: Peer::Tcp("127.0.0.1:1".parse().unwrap()), names: Some(vec!["spiffe://a/platform".into()]) };
        assert_eq!(callers.identify(&identity, &HeaderMap::new()).unwrap().name, "certificate spiffe://a/*");
        callers.replace_lists(&settings(vec![one("api.example")]));
        assert_eq!(callers.identify(&identity, &HeaderMap::new()).unwrap_err().code(), Code::PermissionDenied);
        callers.replace_lists(&CallerSettings { certificates: CallerList::Anyone, ..CallerSettings::default() });
        assert!(callers.identify(&identity, &HeaderMap::new()).is_ok());
    }
}
