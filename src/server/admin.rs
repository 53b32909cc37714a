//! Numbers for Prometheus and the status for people, over HTTP/1.1 on a socket of its own: names, codes and counts, no secret, so they are
//! open to whoever reaches it.

use std::{
    convert::Infallible,
    fmt, io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::{
    body::{Body as _, Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{io::AsyncReadExt, sync::Semaphore, task::JoinSet, time::timeout};
use tonic::body::Body;

use super::{
    connection::{PREFACE, Prefaced, say},
    connections::ConnectionCounts,
    listen::{Accepted, Listener, Stream},
    refused::{HandshakeFault, Refusal},
    status_page::html,
    tls::Tls,
};
use crate::{
    core::engine::Engine,
    telemetry::{
        lately::Lately,
        metrics::{CONTENT_TYPE, Collect, Page, loaded, reloads::Reloads},
        status::{self, SAMPLE_EVERY, Sources, Status, Totals, Window},
    },
};

/// Scrapers at a time: a pair of Prometheus servers and a person or two.
const MAX_CONNECTIONS: usize = 8;
/// A scraper sends its few headers at once.
const HEADER_TIME: Duration = Duration::from_secs(5);
/// One request and its answer: what Prometheus waits at most, as it is set by default.
const CONNECTION_TIME: Duration = Duration::from_secs(10);
/// A scraper's headers are under 1 KiB; this is the least that the HTTP library takes.
const MAX_HEADER_BYTES: usize = 8 * 1024;

/// How the answer to a gRPC client begins.
pub(crate) const ADMIN_SAYS: &str = "this is byok-gate's admin listener, for pages and numbers";

const ROOT: &str = "/";
const METRICS: &str = "/metrics";
const STATUS: &str = "/status";
const STATUS_JSON: &str = "/status.json";
/// No script, no image, no frame, nothing from elsewhere: whatever a name in it holds, a browser does nothing with it.
const CONTENT_SECURITY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Everything that has something to show.
pub(super) struct Shown {
    engine: Arc<Engine>,
    sources: Vec<Arc<dyn Collect>>,
    followed: Vec<Arc<Reloads>>,
    lately: Arc<Lately>,
    tls: Option<Arc<Tls>>,
    connections: Arc<ConnectionCounts>,
    window: Window,
    started: SystemTime,
    /// Where gRPC is spoken.
    addresses: Vec<String>,
}

// === impl Shown ===

impl Shown {
    /// From now on.
    pub(super) fn new(
        engine: Arc<Engine>,
        sources: Vec<Arc<dyn Collect>>,
        followed: Vec<Arc<Reloads>>,
        lately: Arc<Lately>,
        tls: Option<Arc<Tls>>,
        connections: Arc<ConnectionCounts>,
        addresses: Vec<String>,
    ) -> Self {
        let started = SystemTime::now();
        Self { engine, sources, followed, lately, tls, connections, window: Window::since(started), started, addresses }
    }

    /// What is counted, as of now.
    fn page(&self) -> Page {
        let snapshot = self.engine.snapshot();
        let mut page = Page::about(snapshot.registry.providers().iter().map(|provider| provider.name.as_str()));
        loaded::collect(&snapshot, SystemTime::now(), &mut page);
        self.sources.iter().for_each(|source| source.collect(&mut page));
        page
    }

    fn status(&self) -> Status {
        let sources = Sources {
            page: &self.page(),
            snapshot: &self.engine.snapshot(),
            lately: &self.lately,
            window: &self.window,
            started: self.started,
            followed: self.followed.iter().map(|reloads| reloads.followed()).collect(),
            certificates: self.tls.as_ref().map_or_else(Vec::new, |tls| tls.ends()),
            refused_connections: self.connections.refusals.shown(),
            reached_limits: [&self.connections.unknown_calls, &self.connections.watches]
                .into_iter()
                .filter_map(|limit| limit.reached())
                .collect(),
        };
        status::status(&sources, SystemTime::now())
    }

    /// One of the pages, with its type.
    fn written(&self, path: &str) -> Result<(&'static str, String), fmt::Error> {
        Ok(match path {
            METRICS => (CONTENT_TYPE, self.page().text()?),
            STATUS => ("text/html; charset=utf-8", html(&self.status())),
            _ => ("application/json", serde_json::to_string_pretty(&self.status()).map_err(|_| fmt::Error)? + "\n"),
        })
    }
}

/// Notes every minute what is counted, for ever, so that a page can say what is recent. Nothing is counted for it.
pub(super) async fn note_counts(shown: Arc<Shown>) {
    loop {
        tokio::time::sleep(SAMPLE_EVERY).await;
        let shown = Arc::clone(&shown);
        let noting = move || shown.window.note(SystemTime::now(), Totals::of(&shown.page()));
        drop(tokio::task::spawn_blocking(noting).await);
    }
}

/// Answers scrapers for ever.
pub(super) async fn answer_scrapers(listener: Listener, shown: Arc<Shown>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        // Without a place it is closed unanswered: a scraper sees that, and the numbers are there for the next one.
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let shown = Arc::clone(&shown);
        connections.spawn(async move {
            serve(accepted, shown).await;
            drop(place);
        });
    }
}

/// One request, or none in time.
async fn serve(accepted: Accepted, shown: Arc<Shown>) {
    let Accepted { io, peer } = accepted;
    let io = match timeout(HEADER_TIME, first_bytes(io)).await {
        Ok(Ok(io)) => io,
        Ok(Err(Some(io))) => {
            shown.connections.refusals.add(peer, Refusal::of(HandshakeFault::GrpcOnAdmin));
            return say(io, grpc_is_elsewhere(&shown.addresses).as_bytes()).await;
        }
        Ok(Err(None)) | Err(_) => return,
    };
    let service = service_fn(|request| {
        let shown = Arc::clone(&shown);
        async move { Ok::<_, Infallible>(answer(&request, shown).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_buf_size(MAX_HEADER_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(io), service);
    // Its fault is a scraper's, which sees it.
    drop(timeout(CONNECTION_TIME, connection).await);
}

/// The connection with what it says first, unless that is gRPC's: then without. Nobody is there any more if there is none.
async fn first_bytes(mut io: Box<dyn Stream>) -> Result<Prefaced, Option<Box<dyn Stream>>> {
    let (mut first, mut length) = ([0; PREFACE.len()], 0);
    while let Some(free) = first.get_mut(length..).filter(|free| !free.is_empty()) {
        let read = io.read(free).await.map_err(|_| None)?;
        length += read;
        let said = first.get(..length).unwrap_or_default();
        if read == 0 || !PREFACE.starts_with(said) {
            return Ok(Prefaced { io, left: Bytes::copy_from_slice(said) });
        }
    }
    Err(Some(io))
}

/// What a gRPC client is told: its library shows it, or that it is no HTTP/2. `byok-gate health` shows the sentence alone.
fn grpc_is_elsewhere(addresses: &[String]) -> String {
    format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n{ADMIN_SAYS}: gRPC is on {}\n",
        addresses.join(" and ")
    )
}

async fn answer(request: &Request<Incoming>, shown: Arc<Shown>) -> Response<Body> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = said(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD");
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    if !request.body().is_end_stream() {
        return said(StatusCode::PAYLOAD_TOO_LARGE, "no body is taken");
    }
    let path = match request.uri().path() {
        path @ (METRICS | STATUS | STATUS_JSON) => path.to_owned(),
        ROOT => {
            let mut response = said(StatusCode::FOUND, "see /status");
            response.headers_mut().insert(header::LOCATION, HeaderValue::from_static(STATUS));
            return response;
        }
        _ => {
            let here = "here are /status, /status.json and /metrics; health is gRPC's own service, on server.listen";
            return said(StatusCode::NOT_FOUND, here);
        }
    };
    // On a thread that may wait: files are read, and no decision stands behind it.
    match tokio::task::spawn_blocking(move || shown.written(&path)).await.map_err(io::Error::other) {
        Ok(Ok((content_type, page))) => typed(StatusCode::OK, content_type, page),
        Ok(Err(_)) | Err(_) => {
            tracing::error!(event = "metrics_failed", "a page of the admin listener could not be written");
            said(StatusCode::INTERNAL_SERVER_ERROR, "the page could not be written")
        }
    }
}

fn said(status: StatusCode, words: &str) -> Response<Body> {
    typed(status, "text/plain; charset=utf-8", format!("{words}\n"))
}

fn typed(status: StatusCode, content_type: &'static str, text: String) -> Response<Body> {
    let mut response = Response::new(Body::new(text));
    *response.status_mut() = status;
    for (name, value) in [
        (header::CONTENT_TYPE, content_type),
        (header::CACHE_CONTROL, "no-store"),
        (header::CONTENT_SECURITY_POLICY, CONTENT_SECURITY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, duplex},
        time::{Instant, sleep},
    };

    use super::*;
    use crate::{
        config,
        core::{
            classify::Finding,
            engine::{Boxed, ProbeRequest, Prober},
        },
        domain::request::Peer,
    };

    struct Nobody;

    impl Prober for Nobody {
        fn probe(&self, _: ProbeRequest) -> Boxed<'static, Finding> {
            Box::pin(std::future::pending())
        }
    }

    fn shown() -> Arc<Shown> {
        let setup = config::load(&config::Paths::default(), &config::Overrides::default()).unwrap();
        let cache = crate::liveness::cache::Cache::new(Arc::new(Nobody), crate::liveness::cache::CacheSettings::default());
        let engine = Arc::new(Engine::new(setup.snapshot, Arc::new(cache), None));
        Arc::new(Shown::new(engine, Vec::new(), Vec::new(), Arc::new(Lately::new(false)), None, Arc::default(), Vec::new()))
    }

    fn accepted(io: tokio::io::DuplexStream) -> Accepted {
        Accepted { io: Box::new(io), peer: Peer::Unix { uid: 1, gid: 1 } }
    }

    /// Headers that come byte by byte, and an answer that nobody reads: each connection has its end.
    #[tokio::test(start_paused = true)]
    async fn a_slow_scraper_is_cut_off() {
        let began = Instant::now();
        let (mut slow, io) = duplex(1024);
        let serving = tokio::spawn(serve(accepted(io), shown()));
        for byte in b"GET /metrics HTTP/1.1\r\nhost: gate\r\n".iter().cycle() {
            if serving.is_finished() || slow.write_all(&[*byte]).await.is_err() {
                break;
            }
            sleep(Duration::from_millis(700)).await;
        }
        assert!(began.elapsed() <= HEADER_TIME + Duration::from_secs(1), "{:?}", began.elapsed());
        let (mut deaf, io) = duplex(64);
        let began = Instant::now();
        deaf.write_all(b"GET /metrics HTTP/1.1\r\nhost: gate\r\n\r\n").await.unwrap();
        serve(accepted(io), shown()).await;
        assert_eq!(began.elapsed(), CONNECTION_TIME);
        // In time, for comparison.
        let (mut quick, io) = duplex(64 * 1024);
        quick.write_all(b"GET /metrics HTTP/1.1\r\nhost: gate\r\n\r\n").await.unwrap();
        serve(accepted(io), shown()).await;
        let mut said = String::new();
        quick.read_to_string(&mut said).await.unwrap();
        assert!(said.starts_with("HTTP/1.1 200") && said.ends_with("# EOF\n"), "{said}");
    }
}
