//! Servers without a row, each with its own way to refuse: the real engine, prober and cache against real sockets.
//!
//! `tests/fixtures/dialects.yaml` says how each server answers and what a decision must make of it. `BYOK_GATE_DIALECTS=FILE` runs another file of the
//! same form; `BYOK_GATE_CALLS=1` prints what each verdict cost the server in calls.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    env, fs,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use byok_gate::{
    core::engine::{Decided, Engine},
    grpc::convert::{self, pb},
    liveness::prober::ProbeSettings,
};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::{net::TcpListener, task::JoinSet, time::Instant};

use crate::support::{
    case::Spec,
    gate::Files,
    vendor::{Row, Vendor},
};

/// Longer than any dialect takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many dialects run at a time: they wait for timers more than for a core.
const AT_ONCE: usize = 8;

#[derive(Debug, Deserialize)]
struct File {
    dialects: Vec<Dialect>,
}

#[derive(Debug, Clone, Deserialize)]
struct Dialect {
    name: String,
    #[serde(default = "openai")]
    protocol: String,
    header: Vec<String>,
    #[serde(default)]
    list: Option<Answers>,
    #[serde(default)]
    completion: Option<Answers>,
    expect: Expect,
    #[serde(default)]
    warm: bool,
    #[serde(default)]
    cause: Option<String>,
    #[serde(default)]
    header_is_wrong: bool,
    #[serde(default)]
    list_checks_the_form: bool,
    /// What a request gets while another one is under way.
    #[serde(default)]
    one_at_a_time: Option<Answer>,
    #[serde(default)]
    limit: Option<Limit>,
    #[serde(default)]
    ban: Option<Ban>,
    /// The list that a good key got is served to everybody from then on.
    #[serde(default)]
    list_is_cached: bool,
    /// Several credentials in one request are refused.
    #[serde(default)]
    one_header: bool,
    /// The key has to be in each of its headers.
    #[serde(default)]
    in_all_headers: bool,
    /// This model is served to everybody.
    #[serde(default)]
    free_model: Option<String>,
    /// Nothing is known of the server's refusals before a good key was accepted, so no bad key comes first.
    #[serde(default)]
    good_key_first: bool,
    /// The time for one probe. Without it, so much that a busy machine makes no difference.
    #[serde(default)]
    budget_ms: Option<u64>,
}

/// More requests than these get that.
#[derive(Debug, Clone, Deserialize)]
struct Limit {
    requests: usize,
    per_ms: u64,
    answer: Answer,
}

/// After this many requests with an unknown key everybody gets that.
#[derive(Debug, Clone, Deserialize)]
struct Ban {
    after: usize,
    answer: Answer,
}

fn openai() -> String {
    "openai".into()
}

#[derive(Debug, Clone, Deserialize)]
struct Expect {
    good: String,
    bad: String,
    #[serde(default)]
    restricted: Option<String>,
    #[serde(default)]
    unpaid: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
struct Answers {
    good: Answer,
    bad: Answer,
    none: Answer,
    /// What a key gets that may not do this.
    #[serde(default)]
    restricted: Option<Answer>,
    /// What a key gets whose account is out of money or quota.
    #[serde(default)]
    unpaid: Option<Answer>,
    /// What a tenant's dead key gets, if the server remembers it. A made-up key gets `bad`.
    #[serde(default)]
    withdrawn: Option<Answer>,
}

impl Answers {
    fn for_key(&self, key: &str) -> &Answer {
        match tenant_of(key) {
            Some(who) if who.starts_with("nar") => self.restricted.as_ref().unwrap_or(&self.good),
            Some(who) if who.starts_with("unp") => self.unpaid.as_ref().unwrap_or(&self.good),
            Some(who) if who.starts_with("good") => &self.good,
            Some(who) if who.starts_with("bad") => self.withdrawn.as_ref().unwrap_or(&self.bad),
            _ => &self.bad,
        }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum Answer {
    Ok(String),
    Plain(u16, String, String),
    More(u16, String, String, More),
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct More {
    headers: BTreeMap<String, String>,
    delay_ms: u64,
}

/// What the server saw of keys: the tenant's own, made-up ones, none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Calls {
    own: usize,
    made_up: usize,
    keyless: usize,
}

struct Server {
    address: SocketAddr,
    state: Arc<State>,
    calls: Arc<Mutex<Calls>>,
    _tasks: JoinSet<()>,
}

struct State {
    dialect: Dialect,
    /// What the server has become.
    later: Mutex<Option<Dialect>>,
    calls: Arc<Mutex<Calls>>,
    now: AtomicU64,
    under_way: AtomicUsize,
    wrong: AtomicUsize,
    is_cached: AtomicBool,
    lately: Mutex<Vec<Instant>>,
}

impl State {
    /// What comes before the check of the key.
    fn barred(&self, is_wrong: bool, under_way: usize) -> Option<Answer> {
        let Dialect { one_at_a_time, limit, ban, .. } = &self.dialect;
        if let (Some(answer), 1..) = (one_at_a_time, under_way) {
            return Some(answer.clone());
        }
        if let Some(Limit { requests, per_ms, answer }) = limit {
            let mut lately = self.lately.lock().unwrap();
            lately.retain(|at| at.elapsed() < Duration::from_millis(*per_ms));
            if lately.len() >= *requests {
                return Some(answer.clone());
            }
            lately.push(Instant::now());
        }
        if let Some(Ban { after, answer }) = ban {
            if self.wrong.load(Ordering::SeqCst) >= *after {
                return Some(answer.clone());
            }
            self.wrong.fetch_add(usize::from(is_wrong), Ordering::SeqCst);
        }
        None
    }
}

impl Server {
    async fn start(dialect: Dialect) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let calls = Arc::new(Mutex::new(Calls::default()));
        let state = Arc::new(State {
            dialect,
            later: Mutex::default(),
            calls: Arc::clone(&calls),
            now: AtomicU64::new(100_000),
            under_way: AtomicUsize::new(0),
            wrong: AtomicUsize::new(0),
            is_cached: AtomicBool::new(false),
            lately: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        let own = Arc::clone(&state);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let state = Arc::clone(&state);
                connections.spawn(async move {
                    let service = hyper::service::service_fn(|request| answer(request, Arc::clone(&state)));
                    drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
                });
            }
        });
        Self { address, state: own, calls, _tasks: tasks }
    }

    /// From now on it answers like this.
    fn becomes(&self, dialect: &str) {
        *self.state.later.lock().unwrap() = Some(dialect_of(dialect));
    }

    /// The calls since the last look, once those on their way have come.
    async fn calls(&self) -> Calls {
        let mut before = *self.calls.lock().unwrap();
        // A made-up key is sent beside the real one, and nobody waits for its answer if it is not needed.
        loop {
            tokio::time::sleep(Duration::from_millis(60)).await;
            let now = *self.calls.lock().unwrap();
            if now == before {
                return std::mem::take(&mut self.calls.lock().unwrap());
            }
            before = now;
        }
    }
}

/// How every tenant's key ends, and no made-up one.
const TAIL: &str = "0123456789abcdefghij";

/// Whose key this is. The whole key counts, as for a real server: a made-up one may begin like a tenant's by chance.
fn tenant_of(key: &str) -> Option<&str> {
    key.strip_prefix("tenant-")?.strip_suffix(TAIL)
}

/// Of the length and the alphabet of the tenants' keys.
fn is_well_formed(key: &str) -> bool {
    key.strip_prefix("tenant-")
        .is_some_and(|rest| rest.len() == 26 && rest.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9')))
}

fn key_in<'h>(headers: &'h HeaderMap, family: &str) -> Option<&'h str> {
    let value = match family {
        "bearer" => headers.get("authorization")?.to_str().ok()?.strip_prefix("Bearer ")?,
        name => headers.get(name)?.to_str().ok()?,
    };
    Some(value).filter(|value| !value.is_empty())
}

async fn answer(request: Request<Incoming>, state: Arc<State>) -> Result<Response<Full<Bytes>>, Infallible> {
    let State { calls, now, .. } = &*state;
    let dialect = &state.later.lock().unwrap().clone().unwrap_or_else(|| state.dialect.clone());
    let families = ["bearer", "x-api-key", "api-key", "x-goog-api-key"];
    let any = families.iter().find_map(|family| key_in(request.headers(), family));
    {
        let mut calls = calls.lock().unwrap();
        match any {
            None => calls.keyless += 1,
            Some(key) if tenant_of(key).is_some() => calls.own += 1,
            Some(_) => calls.made_up += 1,
        }
    }
    let key = dialect.header.iter().find_map(|family| key_in(request.headers(), family));
    let chat = if dialect.protocol == "openai" { "/v1/chat/completions" } else { "/v1/messages" };
    let (answers, good) = match (request.method().as_str(), request.uri().path()) {
        ("GET", "/v1/models") => (&dialect.list, r#"{"object":"list","data":[{"id":"m-1","object":"model"}]}"#),
        ("POST", path) if path == chat && dialect.protocol == "openai" => {
            (&dialect.completion, r#"{"id":"c-1","choices":[{"index":0,"message":{"role":"assistant","content":"."}}]}"#)
        }
        ("POST", path) if path == chat => (&dialect.completion, r#"{"type":"message","content":[{"type":"text","text":"."}]}"#),
        _ => (&None, ""),
    };
    let missing = Answer::Plain(404, "json".into(), r#"{"error":{"message":"no such route"}}"#.into());
    let is_list = request.method() == "GET";
    let tenant = key.and_then(tenant_of).unwrap_or_default();
    let is_good = tenant.starts_with("good");
    let is_known = ["good", "nar", "unp"].iter().any(|known| tenant.starts_with(known));
    let under_way = state.under_way.fetch_add(1, Ordering::SeqCst);
    let barred = state.barred(key.is_some() && !is_known, under_way);
    if dialect.one_at_a_time.is_some() {
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    state.under_way.fetch_sub(1, Ordering::SeqCst);
    let key = key.map(str::to_owned);
    let in_headers = families.iter().filter(|family| key_in(request.headers(), family).is_some()).count();
    let is_free = match &dialect.free_model {
        Some(free) if !is_list => {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            String::from_utf8_lossy(&body).contains(free.as_str())
        }
        _ => false,
    };
    if dialect.list_is_cached && is_list && is_good {
        state.is_cached.store(true, Ordering::SeqCst);
    }
    let key = key.as_deref();
    let answer = match (answers, key) {
        _ if dialect.one_header && in_headers > 1 => {
            Answer::Plain(400, "json".into(), r#"{"error":"several credentials"}"#.into())
        }
        (Some(answers), Some(_)) if dialect.in_all_headers && in_headers < dialect.header.len() => answers.bad.clone(),
        _ if barred.is_some() => barred.unwrap(),
        _ if is_free || is_list && state.is_cached.load(Ordering::SeqCst) => Answer::Ok("OK".into()),
        (None, _) => missing,
        (Some(answers), None) => answers.none.clone(),
        (Some(answers), Some(key)) if dialect.list_checks_the_form && is_list && is_well_formed(key) => answers.good.clone(),
        (Some(answers), Some(key)) => answers.for_key(key).clone(),
    };
    let (status, kind, body, More { headers, delay_ms }) = match answer {
        Answer::Ok(word) => {
            assert_eq!(word, "OK");
            (200, "json".to_owned(), good.to_owned(), More::default())
        }
        Answer::Plain(status, kind, body) => (status, kind, body, More::default()),
        Answer::More(status, kind, body, more) => (status, kind, body, more),
    };
    tokio::time::sleep(Duration::from_millis(delay_ms)).await;
    let id = format!("req_{:016x}", rand::random::<u64>());
    let now = now.fetch_add(7_919, Ordering::SeqCst).to_string();
    let body = body.replace("{key}", key.unwrap_or("-")).replace("{id}", &id).replace("{now}", &now);
    let kind = match kind.as_str() {
        "json" => "application/json",
        "text" => "text/plain; charset=utf-8",
        "html" => "text/html; charset=utf-8",
        "xml" => "application/xml",
        "none" => "",
        other => other,
    };
    let mut response = Response::builder().status(status);
    if !kind.is_empty() {
        response = response.header("content-type", kind);
    }
    for (name, value) in &headers {
        response = response.header(name, value);
    }
    Ok(response.body(Full::from(body)).unwrap())
}

/// A long-running gate in front of this server.
fn gate(dialect: &Dialect, server: &Server) -> (Files, Arc<Engine>) {
    gate_at(dialect, server.address)
}

fn gate_at(dialect: &Dialect, address: SocketAddr) -> (Files, Arc<Engine>) {
    let base = match dialect.protocol.as_str() {
        "openai" => format!("base_url_template: \"http://{address}/v1\""),
        _ => format!("base_url_anthropic: \"http://{address}\""),
    };
    let registry = format!(
        "schema_version: 1\nproviders:\n  - {{name: house, display_name: House, protocol: {}, auth_mode: third_party_anthropic_compat, \
         {base}, auth_env: [HOUSE_KEY], model_prefix_match: '^house'}}\nruntimes:\n  agent:\n    providers:\n      - {{name: house}}\n",
        dialect.protocol
    );
    let files = Files::new(&registry, "catalogue_version: 1\n", None);
    let budget = dialect.budget_ms.map_or(Duration::from_secs(30), Duration::from_millis);
    let engine = files.engine_with(ProbeSettings { budget, allow_loopback_http: true, ..ProbeSettings::default() });
    (files, engine)
}

async fn decide(engine: &Engine, key: &str, organization: &str) -> Decided {
    decide_for(engine, key, organization, "house-large").await
}

async fn decide_for(engine: &Engine, key: &str, organization: &str, model: &str) -> Decided {
    let spec = Spec {
        model: model.into(),
        workspace: BTreeMap::from([("HOUSE_KEY".into(), Some(key.into()))]),
        organization_id: organization.into(),
        ..Spec::default()
    };
    let message = pb::DecideRequest { workspace_spec: Some(spec.message()), checkpoint: 1, explain: true, ..Default::default() };
    *engine.decide(&convert::request(message).unwrap(), Instant::now() + PATIENCE).await
}

fn verdict(decided: &Decided) -> String {
    decided.decision.liveness.as_ref().unwrap().verdict.as_str().to_owned()
}

fn said(decided: &Decided) -> String {
    let steps = decided.decision.trace.iter().filter(|step| step.step == "liveness");
    steps.map(|step| step.detail.clone()).collect::<Vec<_>>().join("; ")
}

/// The result of one dialect: its faults, and the cost of each verdict.
async fn run(dialect: Dialect) -> (Vec<String>, String) {
    let mut faults = Vec::new();
    let Expect { good, bad, restricted, unpaid } = dialect.expect.clone();
    let mut check = |what: &str, decided: &Decided, wanted: &[&str]| {
        let found = verdict(decided);
        let fits = |wanted: &&str| match *wanted {
            "NEVER_VALID" => found != "VALID",
            "NEVER_DENIED" => !matches!(found.as_str(), "INVALID" | "FORBIDDEN"),
            wanted => found == wanted,
        };
        if !wanted.iter().any(fits) {
            faults.push(format!("{}, {what}: {found}, expected {}: {}", dialect.name, wanted.join(" or "), said(decided)));
        }
    };
    let key = |who: &str| format!("tenant-{who:x<6}{TAIL}");
    let mut costs = BTreeMap::new();
    // Good key first: cold, again, another tenant's bad key, and a second bad one.
    {
        let server = Server::start(dialect.clone()).await;
        let (_files, engine) = gate(&dialect, &server);
        let first = decide(&engine, &key("good1"), "org-1").await;
        check("a good key, cold", &first, &[&good]);
        if dialect.header_is_wrong && !said(&first).contains("another header") {
            check(&format!("no word of the wrong header in `{}`", said(&first)), &first, &[]);
        }
        costs.insert("cold good", server.calls().await);
        check("a good key, again", &decide(&engine, &key("good1"), "org-1").await, &[&good]);
        check("a good key, from a neighbour", &decide(&engine, &key("good1"), "org-2").await, &[&good]);
        server.calls().await;
        let refused = decide(&engine, &key("bad1"), "org-3").await;
        check("a bad key after a good one", &refused, &[&bad]);
        if let Some(cause) = &dialect.cause
            && !said(&refused).contains(cause)
        {
            check(&format!("no word of {cause} in `{}`", said(&refused)), &refused, &[]);
        }
        costs.insert("warm bad", server.calls().await);
        check("a second good key", &decide(&engine, &key("good2"), "org-4").await, &[&good]);
        costs.insert("warm good", server.calls().await);
        if let Some(free) = &dialect.free_model {
            for who in ["bad4", "good3"] {
                let free = decide_for(&engine, &key(who), "org-5", &format!("house-{free}")).await;
                check(&format!("a {who} key for a free model"), &free, &["NOT_CALIBRATED"]);
            }
        }
    }
    // Bad key first.
    if !dialect.good_key_first {
        let server = Server::start(dialect.clone()).await;
        let (_files, engine) = gate(&dialect, &server);
        let cold: &[&str] = if dialect.warm { &["UNEXPECTED_RESPONSE", "NOT_CALIBRATED"] } else { &[&bad] };
        let first = decide(&engine, &key("bad1"), "org-1").await;
        check("a bad key, cold", &first, cold);
        costs.insert("cold bad", server.calls().await);
        if costs["cold bad"].made_up > 0 && said(&first).contains("made-up keys: not asked") {
            check("a made-up key was sent", &first, &[]);
        }
        check("a bad key, again", &decide(&engine, &key("bad1"), "org-1").await, cold);
        check("a bad key, from a neighbour", &decide(&engine, &key("bad2"), "org-2").await, cold);
        check("a good key after bad ones", &decide(&engine, &key("good1"), "org-3").await, &[&good]);
        check("a bad key after all", &decide(&engine, &key("bad3"), "org-4").await, &[&bad]);
        for (who, wanted) in [("nar1", &restricted), ("unp1", &unpaid)] {
            if let Some(wanted) = wanted {
                check(&format!("a {who} key after all"), &decide(&engine, &key(who), "org-6").await, &[wanted]);
            }
        }
        check("a good key after all", &decide(&engine, &key("good2"), "org-1").await, &[&good]);
    }
    // A restricted key, or one of an account without money, before the others and after them.
    for (kind, wanted) in [("nar", &restricted), ("unp", &unpaid)] {
        let Some(wanted) = wanted else { continue };
        let server = Server::start(dialect.clone()).await;
        let (_files, engine) = gate(&dialect, &server);
        let (first, second) = (format!("{kind}1"), format!("{kind}2"));
        let cold = if wanted.starts_with("NEVER") || !dialect.header_is_wrong { wanted } else { "NEVER_VALID" };
        check(&format!("{first}, cold"), &decide(&engine, &key(&first), "org-1").await, &[cold]);
        check(&format!("a good key after {first}"), &decide(&engine, &key("good1"), "org-2").await, &[&good]);
        check(&format!("a bad key after {first}"), &decide(&engine, &key("bad1"), "org-3").await, &[&bad]);
        check(&second, &decide(&engine, &key(&second), "org-4").await, &[wanted]);
    }
    let cell = |what: &str| {
        costs.get(what).map_or_else(String::new, |Calls { own, made_up, keyless }| format!("{own}+{made_up}+{keyless}"))
    };
    let cells: Vec<String> = ["cold good", "cold bad", "warm good", "warm bad"].map(cell).to_vec();
    (faults, format!("| {} | {} |", dialect.name, cells.join(" | ")))
}

fn dialect_of(text: &str) -> Dialect {
    serde_yaml::from_str(&format!("{{name: a-server, expect: {{good: VALID, bad: INVALID}}, {text}}}")).unwrap()
}

fn key_of(who: &str) -> String {
    format!("tenant-{who:x<6}{TAIL}")
}

/// A front answers every key with a 403 for a while, where a model is called. A made-up key gets it too, so no key is called restricted.
#[tokio::test]
async fn a_403_that_made_up_keys_get_by_now_is_no_restriction() {
    let refusals =
        r#"bad: [401, json, '{"error":{"code":"invalid_api_key"}}'], none: [401, json, '{"error":{"code":"missing_key"}}']"#;
    let list = "header: [bearer], list: {good: OK, bad: OK, none: OK}";
    let usual = format!(
        "{list}, completion: {{good: OK, {refusals}, restricted: [403, json, '{{\"error\":{{\"code\":\"no_inference\"}}}}']}}"
    );
    let dialect = dialect_of(&usual);
    let server = Server::start(dialect.clone()).await;
    let (_files, engine) = gate(&dialect, &server);
    for (who, expect) in [("good1", "VALID"), ("bad1", "INVALID")] {
        let decided = decide(&engine, &key_of(who), who).await;
        assert_eq!(verdict(&decided), expect, "{who}: {}", said(&decided));
    }
    let denied = r#"[403, json, '{"error":{"code":"edge_denied"}}']"#;
    server.becomes(&format!("{list}, completion: {{good: {denied}, bad: {denied}, none: [401, json, '{{}}']}}"));
    for who in ["good2", "good3"] {
        let decided = decide(&engine, &key_of(who), who).await;
        assert_eq!(verdict(&decided), "UNEXPECTED_RESPONSE", "{who}: {}", said(&decided));
    }
    server.becomes(&usual);
    for (who, expect) in [("good4", "VALID"), ("nar2", "FORBIDDEN"), ("bad2", "INVALID")] {
        let decided = decide(&engine, &key_of(who), who).await;
        assert_eq!(verdict(&decided), expect, "{who}: {}", said(&decided));
    }
}

/// A server that tells one tenant's dead key otherwise than keys that it does not know. That changes nothing for the neighbours, whoever comes first.
#[tokio::test]
async fn a_dead_key_that_is_told_otherwise_is_no_other_tenants_matter() {
    let unauthorized = r#"[401, json, '{"error":"Unauthorized"}']"#;
    let no_such_key = r#"[400, json, '{"error":{"type":"no_db_connection"}}']"#;
    let pairs = [
        ("[401, text, expired]", unauthorized),
        ("[401, text, expired]", no_such_key),
        (r#"[401, json, '{"status":401}']"#, "[401, text, '']"),
        ("[403, text, revoked]", "[401, text, Unauthorized]"),
    ];
    for (dead, bad) in pairs {
        let answers = format!("{{good: OK, bad: {bad}, none: {bad}, unpaid: {dead}}}");
        let dialect = dialect_of(&format!("header: [bearer], list: {answers}, completion: {answers}"));
        let in_order = [
            ["good1", "bad1", "unp1", "bad2", "good2", "bad3"],
            ["unp1", "unp2", "good1", "bad1", "good2", "bad2"],
            ["unp1", "bad4", "good1", "bad1", "good2", "bad2"],
        ];
        for order in in_order {
            let server = Server::start(dialect.clone()).await;
            let (_files, engine) = gate(&dialect, &server);
            for (index, who) in order.into_iter().enumerate() {
                let decided = decide(&engine, &key_of(who), who).await;
                let is_cold = !order[..=index].contains(&"good1");
                let wanted = if who.starts_with("good") { "VALID" } else { "INVALID" };
                let fits = who.starts_with("unp") || is_cold || verdict(&decided) == wanted;
                assert!(fits, "{dead} beside {bad}, {order:?}, {who}: {}: {}", verdict(&decided), said(&decided));
            }
        }
    }
}

/// No list, and a model that is not there: "no such path" twice. But a made-up key is refused, so there is an API.
#[tokio::test]
async fn an_api_that_refuses_made_up_keys_is_there() {
    let not_found = r#"[404, json, '{"detail":"Not Found"}']"#;
    let refused = r#"[401, json, '{"error":{"code":"invalid_api_key"}}']"#;
    let no_model = r#"[404, json, '{"error":{"message":"The deployment does not exist"}}']"#;
    let dialect = dialect_of(&format!(
        "header: [bearer], list: {{good: {not_found}, bad: {not_found}, none: {not_found}}}, \
         completion: {{good: OK, bad: {refused}, none: {refused}, unpaid: {no_model}}}"
    ));
    let server = Server::start(dialect.clone()).await;
    let (_files, engine) = gate(&dialect, &server);
    let decided = decide(&engine, &key_of("unp1"), "org-1").await;
    assert_eq!(verdict(&decided), "UNEXPECTED_RESPONSE", "{}", said(&decided));
    assert!(!said(&decided).contains("NO_API_AT_BASE_URL"), "{}", said(&decided));
}

/// A server with two kinds of keys, each in a header of its own. The first that is accepted is not in the client's header; keys of the client's are good
/// all the same, and dead ones of both are dead.
#[tokio::test]
async fn two_kinds_of_keys_are_accepted_each_in_its_header() {
    // One kind has capital letters, so its form is another.
    let kinds = [("api-key", "tenant"), ("authorization", "house-LIVE")];
    let of = |kind: &str, who: &str| format!("{kind}-{who:x<6}{TAIL}");
    let answer = |path: &str, header: &str, key: String, body: &str| Row {
        path: Some(path.into()),
        header: Some(header.into()),
        key: Some(key),
        status: Some(200),
        body: body.into(),
        ..Row::default()
    };
    let mut rows = Vec::new();
    for (header, kind) in kinds {
        for who in ["good1", "good2"] {
            rows.push(answer("/v1/models", header, of(kind, who), r#"{"data":[{"id":"m"}]}"#));
            rows.push(answer(
                "/v1/chat/completions",
                header,
                of(kind, who),
                r#"{"choices":[{"index":0,"message":{"content":"."}}]}"#,
            ));
        }
    }
    rows.push(Row { status: Some(401), body: r#"{"error":{"code":"invalid_api_key"}}"#.into(), ..Row::default() });
    let vendor = Vendor::start(rows).await;
    let (_files, engine) = gate_at(&dialect_of("header: [bearer]"), vendor.address);
    for who in ["good1", "good2"] {
        for (_, kind) in kinds {
            let decided = decide(&engine, &of(kind, who), kind).await;
            assert_eq!(verdict(&decided), "VALID", "{kind} {who}: {}", said(&decided));
            assert_eq!(said(&decided).contains("another header"), kind == "tenant", "{kind} {who}: {}", said(&decided));
        }
    }
    for (_, kind) in kinds {
        let decided = decide(&engine, &of(kind, "bad1"), kind).await;
        assert_eq!(verdict(&decided), "INVALID", "{kind}: {}", said(&decided));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_dialect_is_read_right() {
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/dialects.yaml").to_owned();
    let file = env::var("BYOK_GATE_DIALECTS").unwrap_or(own);
    let File { dialects } = serde_yaml::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    let (mut faults, mut costs) = (Vec::new(), Vec::new());
    let mut running = JoinSet::new();
    for dialect in dialects {
        if running.len() >= AT_ONCE {
            let (fault, cost) = running.join_next().await.unwrap().unwrap();
            faults.extend(fault);
            costs.push(cost);
        }
        running.spawn(run(dialect));
    }
    while let Some(ended) = running.join_next().await {
        let (fault, cost) = ended.unwrap();
        faults.extend(fault);
        costs.push(cost);
    }
    costs.sort();
    if env::var_os("BYOK_GATE_CALLS").is_some() {
        println!("| dialect | cold good | cold bad | warm good | warm bad |\n|---|---|---|---|---|\n{}", costs.join("\n"));
    }
    faults.sort();
    assert!(faults.is_empty(), "{} faults in {} dialects:\n{}", faults.len(), costs.len(), faults.join("\n"));
}
