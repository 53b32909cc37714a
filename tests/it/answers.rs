//! The corpus of vendors' answers: classified by `classify`, and probed over TLS by the real prober.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use byok_gate::{
    core::{
        catalogue::Catalogue,
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
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::Value;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::{
    corpus::{Expect, Line, body_of, corpus, files, lines},
    support::binary::run,
};

/// `deploy/catalogue` ships a row for each self-hosted server: each is valid, and classifies its server's answers. Every signal is matched.
#[tokio::test]
async fn every_recipe_reads_its_servers_answers() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let mut recipes: Vec<_> = fs::read_dir(root.join("deploy/catalogue")).unwrap().map(|entry| entry.unwrap().path()).collect();
    recipes.sort();
    assert!(recipes.len() >= 9, "{recipes:?}");
    for recipe in recipes {
        let name = recipe.file_stem().unwrap().to_str().unwrap().to_owned();
        let catalogue = Catalogue::embedded().unwrap().value.overlaid(&name, &fs::read(&recipe).unwrap()).unwrap();
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
