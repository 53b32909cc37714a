//! The corpus of vendors' answers in `tests/fixtures/answers`: classified by `classify`, and probed over TLS by the real prober.
//!
//! One line is one answer and what it means: `case`, `host`, `request`, `status`, `headers`, `body`, `truncated`, and under
//! `expect` the classification and the verdict while nothing is known of how the endpoint treats bad keys. The bodies are made up
//! after what vendors document and what people report; no key in them ever existed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use byok_gate::{
    core::{
        catalogue::Catalogue,
        classify::{Answer, Classification, ReadBy, classify, read},
        endpoint::{Target, target},
        registry::Registry,
    },
    domain::secret::Secret,
    liveness::prober::{HttpProber, ProbeSettings},
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::Deserialize;
use serde_json::Value;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::support::binary::run;

/// How often a models list misleads: a false "yes", and a false "no".
const TRAPS: [(&str, usize); 2] = [("fv", 12), ("fi", 15)];

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    case: String,
    host: String,
    request: String,
    status: u16,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    body: Value,
    #[serde(default)]
    truncated: bool,
    expect: Expect,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Expect {
    reading: String,
    verdict: String,
}

fn files() -> Vec<PathBuf> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/answers");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

fn lines(file: &PathBuf) -> Vec<Line> {
    let text = fs::read_to_string(file).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|fault| panic!("{fault}: {line}"))).collect()
}

fn corpus() -> Vec<Line> {
    files().iter().flat_map(lines).collect()
}

#[test]
fn the_corpus_is_wide_enough() {
    let (corpus, catalogue) = (corpus(), Catalogue::embedded().unwrap().value);
    let names: BTreeSet<&str> = corpus.iter().map(|line| line.case.as_str()).collect();
    assert_eq!(names.len(), corpus.len(), "a case's name appears twice");
    assert!(corpus.len() >= 460, "{} rows", corpus.len());
    let vendors: BTreeSet<&str> =
        corpus.iter().flat_map(|line| catalogue.rows_of(&line.host)).map(|row| row.vendor.as_str()).collect();
    assert!(vendors.len() >= 45, "{vendors:?}");
    for (kind, count) in TRAPS {
        for number in 1..=count {
            let trap = format!("trap-{kind}-{number}-");
            assert!(names.iter().any(|name| name.starts_with(&trap)), "no row for {trap}");
        }
    }
    // Some answer matches every signal of every row, so that none is untested. Hosts share rows.
    let mut met = BTreeSet::new();
    for line in &corpus {
        let body = body_of(line);
        let Line { status, truncated, .. } = *line;
        for probe in catalogue.rows_of(&line.host).iter().flat_map(|row| &row.probes) {
            let answer = Answer { status, body: &body, truncated, page: false, retry_after: None };
            if let ReadBy::Signal(position) = read(answer, probe).by {
                met.insert(format!("{:?}", probe.signals[position]));
            }
        }
    }
    let unmet: Vec<String> = catalogue
        .hosts()
        .flat_map(|(_, rows)| rows)
        .flat_map(|row| &row.probes)
        .flat_map(|probe| &probe.signals)
        .map(|signal| format!("{signal:?}"))
        .filter(|signal| !met.contains(signal))
        .collect();
    assert!(unmet.is_empty(), "no answer of the corpus meets these:\n{}", unmet.join("\n"));
    // So does some answer with each text that many servers share.
    let document: Value = serde_yaml::from_str(include_str!("../../src/core/catalogue/default.yaml")).unwrap();
    let mut known = 0;
    for listed in document["common_codes"]["texts"].as_array().unwrap() {
        for text in listed["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()) {
            let holds = |line: &&Line| String::from_utf8_lossy(&body_of(line)).to_lowercase().contains(text);
            let is_met = corpus.iter().filter(holds).any(|line| listed["verdict"] == *line.expect.reading);
            assert!(is_met, "no answer of the corpus holds `{text}`");
            known += 1;
        }
    }
    assert!(known > 25, "{known}");
}

/// `deploy/catalogue` ships a row for each self-hosted server: each is valid, and classifies its server's answers. Every signal is matched.
#[tokio::test]
async fn every_recipe_reads_its_servers_answers() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut recipes: Vec<_> = fs::read_dir(root.join("deploy/catalogue")).unwrap().map(|entry| entry.unwrap().path()).collect();
    recipes.sort();
    assert!(recipes.len() >= 9, "{recipes:?}");
    for recipe in recipes {
        let name = recipe.file_stem().unwrap().to_str().unwrap().to_owned();
        let catalogue = Catalogue::overlaid(&name, &fs::read(&recipe).unwrap()).unwrap();
        assert!(catalogue.warnings.is_empty(), "{name}: {:?}", catalogue.warnings);
        let file = root.join(format!("tests/fixtures/recipes/{name}.jsonl"));
        let ended = run(&["classify", "--batch", file.to_str().unwrap(), "--probe-catalog", recipe.to_str().unwrap()], &[]).await;
        assert!(ended.status.success(), "{ended:?}");
        let mut met = BTreeSet::new();
        for (line, told) in lines(&file).into_iter().zip(ended.stdout.lines()) {
            let told: Value = serde_json::from_str(told).unwrap();
            let word = |name: &str| told[name].as_str().unwrap().to_owned();
            assert_eq!(Expect { reading: word("reading"), verdict: word("verdict") }, line.expect, "{name}: {}", line.case);
            met.extend(told["signal"]["position"].as_u64());
        }
        let rows = catalogue.value.hosts().flat_map(|(_, rows)| rows).filter(|row| row.is_overlaid);
        for row in rows {
            assert!(row.since.is_some() && row.confidence.is_some() && !row.sources.is_empty(), "{name}");
            let signals = row.probes.iter().map(|probe| probe.signals.len() as u64).max().unwrap_or_default();
            assert!((0..signals).all(|position| met.contains(&position)), "{name}: a signal that no answer meets: {met:?}");
        }
    }
}

/// Through the command, file by file: each answer gets its classification and its verdict.
#[tokio::test]
async fn classify_reads_every_answer() {
    let mut wrong = Vec::new();
    for file in files() {
        let ended = run(&["classify", "--batch", file.to_str().unwrap()], &[]).await;
        assert!(ended.status.success(), "{ended:?}");
        let told: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let lines = lines(&file);
        assert_eq!(told.len(), lines.len());
        for (line, told) in lines.into_iter().zip(told) {
            let word = |name: &str| told[name].as_str().unwrap().to_owned();
            let found = Expect { reading: word("reading"), verdict: word("verdict") };
            if found != line.expect {
                wrong.push(format!("{}: expected {:?}, found {found:?}", line.case, line.expect));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Over TLS, from the vendors' own host names, by the probes of the embedded registry's providers: every answer that one of
/// them would request. Other probes get a 404, which says nothing.
#[tokio::test]
async fn the_prober_comes_to_the_same_verdicts() {
    let catalogue = Catalogue::embedded().unwrap().value;
    let registry = Registry::embedded(&|_| None).unwrap().value;
    let targets: Vec<Target> =
        registry.providers().iter().filter_map(|provider| target(provider, &catalogue, "made-up-model").ok()).collect();
    let vendor = TlsVendor::start(targets.iter().map(|target| target.endpoint.host.clone()).collect()).await;
    let prober = HttpProber::new(ProbeSettings {
        allow_loopback_http: true,
        calibrate: false,
        extra_roots: vendor.certificate.clone(),
        resolve: targets.iter().map(|target| (target.endpoint.host.clone(), vendor.address)).collect(),
        ..ProbeSettings::default()
    })
    .unwrap();
    let (mut asked, mut hosts) = (0, BTreeSet::new());
    for line in corpus().into_iter().filter(|line| !line.truncated) {
        let makes = |target: &&Target| {
            target.endpoint.host == line.host
                && target.calls.iter().any(|call| line.request == format!("{} {}", call.probe.method.as_str(), call.url.path()))
        };
        let Some(target) = targets.iter().find(makes) else { continue };
        vendor.answer(line.clone());
        let finding = prober.explain(target, &Secret::new("made-up-key".into())).await.0;
        assert_eq!(finding.verdict.as_str(), line.expect.verdict, "{} at {}: {finding:?}", line.case, line.host);
        assert!(vendor.was_asked(), "{}: {} was never asked {}", line.case, line.host, line.request);
        asked += 1;
        hosts.insert(line.host);
    }
    println!("{asked} answers of {} hosts", hosts.len());
    assert!(asked >= 150 && hosts.len() >= 15, "{asked} answers of {} hosts", hosts.len());
}

proptest! {
    /// Any answer can be classified; and a malformed one is never a "yes".
    #[test]
    fn any_answer_is_read(status in 100_u16..=999, body in any_body(), truncated: bool, page: bool) {
        let answer = Answer { status, body: &body, truncated, page, retry_after: None };
        let catalogue = Catalogue::embedded().unwrap().value;
        for probe in catalogue.hosts().flat_map(|(_, rows)| rows).flat_map(|row| &row.probes) {
            let accepted = classify(answer, probe) == Classification::Accepted;
            prop_assert!(!accepted || (200..=299).contains(&status) || status == 400 && probe.name == "search");
        }
    }
}

/// Bytes, and JSON with the values that rows test.
fn any_body() -> impl Strategy<Value = Vec<u8>> {
    const WORDS: [&str; 16] = [
        "data",
        "error",
        "code",
        "base_resp",
        "status_code",
        "balance",
        "valid",
        "auth",
        "query",
        "1004",
        "choices",
        "content",
        "limit_remaining",
        "is_available",
        "usage",
        "id",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(WORDS.as_slice()).prop_map(Value::from),
    ];
    let json = leaf.prop_recursive(4, 24, 4, |inner| {
        let key = prop::sample::select(WORDS.as_slice()).prop_map(str::to_owned);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key, inner, 0..4).prop_map(|fields| fields.into_iter().collect::<Value>()),
        ]
    });
    prop_oneof![prop::collection::vec(any::<u8>(), 0..200), json.prop_map(|json| json.to_string().into_bytes())]
}

/// A vendor with a certificate for many names, and one answer at a time.
struct TlsVendor {
    address: SocketAddr,
    certificate: Vec<u8>,
    now: Arc<Mutex<Option<(Line, bool)>>>,
    _tasks: JoinSet<()>,
}

impl TlsVendor {
    async fn start(names: Vec<String>) -> Self {
        drop(rustls::crypto::ring::default_provider().install_default());
        let rcgen::CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed(names).unwrap();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
        let tls = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(vec![cert.der().clone()], key).unwrap();
        let (acceptor, listener) = (TlsAcceptor::from(Arc::new(tls)), TcpListener::bind("127.0.0.1:0").await.unwrap());
        let address = listener.local_addr().unwrap();
        let now = Arc::new(Mutex::new(None));
        let state = Arc::clone(&now);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, state) = (acceptor.clone(), Arc::clone(&state));
                connections.spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let service = hyper::service::service_fn(|request| answer(request, Arc::clone(&state)));
                    drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
                });
            }
        });
        Self { address, certificate: cert.pem().into_bytes(), now, _tasks: tasks }
    }

    fn answer(&self, line: Line) {
        *self.now.lock().unwrap() = Some((line, false));
    }

    fn was_asked(&self) -> bool {
        self.now.lock().unwrap().as_ref().is_some_and(|(_, asked)| *asked)
    }
}

async fn answer(
    request: Request<Incoming>,
    state: Arc<Mutex<Option<(Line, bool)>>>,
) -> Result<Response<Full<Bytes>>, http::Error> {
    let host = request.headers()["host"].to_str().unwrap();
    let asked = format!("{} {}", request.method(), request.uri().path());
    let mut state = state.lock().unwrap();
    match state.as_mut() {
        Some((line, was_asked)) if line.host == host && line.request == asked => {
            *was_asked = true;
            let mut response = Response::builder().status(line.status);
            for (name, value) in &line.headers {
                response = response.header(name, value);
            }
            response.body(Full::from(body_of(line)))
        }
        _ => Response::builder().status(404).body(Full::from(r#"{"error": {"message": "no such path"}}"#)),
    }
}

fn body_of(line: &Line) -> Vec<u8> {
    match &line.body {
        Value::String(text) => text.clone().into_bytes(),
        json => json.to_string().into_bytes(),
    }
}
