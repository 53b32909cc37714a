//! The admin listener: metrics for Prometheus and the status page for people, over HTTP/1.1 on a socket of its own. The pages hold names, codes
//! and counts but no secret, so everybody who reaches the socket may read them.

use std::{
    collections::VecDeque,
    convert::Infallible,
    fmt, io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::{
    body::{Body as _, Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::AsyncReadExt,
    task::{AbortHandle, JoinSet},
    time::timeout,
};
use tonic::body::Body;

use super::{
    connection::{PREFACE, Rewind, send_last_bytes},
    connections::{ConnectionCounts, top_peers},
    listen::{Accepted, Listener, Stream},
    refused::{HandshakeFault, Refusal},
    status_page::html,
    tls::Certificates,
};
use crate::{
    core::{engine::Engine, snapshot::Snapshot},
    telemetry::{
        metrics::{CONTENT_TYPE, Collect, Page, loaded, reloads::Reloads},
        recent_changes::RecentChanges,
        recent_decisions::RecentDecisions,
        status::{self, ForbiddenProvider, SAMPLE_EVERY, Sources, Status, Totals, Window},
    },
};

/// The limit of connections: enough for two Prometheus servers and a few people. One that asks nothing gives way to the next.
const MAX_CONNECTIONS: usize = 8;
/// The time for a request's headers. A client sends its few headers at once.
const HEADER_TIME: Duration = Duration::from_secs(5);
/// The time for one request and its answer: the default scrape timeout of Prometheus.
const CONNECTION_TIME: Duration = Duration::from_secs(10);
/// The buffer for headers. They are under 1 KiB; this is the HTTP library's minimum.
const MAX_HEADER_BYTES: usize = 8 * 1024;

/// How the answer to a gRPC client begins.
pub(crate) const ADMIN_SAYS: &str = "this is byok-gate's admin listener, for pages and numbers";

const ROOT: &str = "/";
const METRICS: &str = "/metrics";
const STATUS: &str = "/status";
const STATUS_JSON: &str = "/status.json";
/// Forbids scripts, images, frames and anything from other sites, so that no name on the page can make a browser do anything.
const CONTENT_SECURITY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// What the admin pages are made of.
pub(super) struct AdminPages {
    pub(super) engine: Arc<Engine>,
    pub(super) sources: Vec<Arc<dyn Collect>>,
    pub(super) followed: Vec<Arc<Reloads>>,
    pub(super) recent_decisions: Arc<RecentDecisions>,
    pub(super) changes: Arc<RecentChanges>,
    pub(super) certificates: Arc<Certificates>,
    pub(super) connections: Arc<ConnectionCounts>,
    pub(super) window: Window,
    pub(super) started: SystemTime,
    /// Where gRPC is spoken.
    pub(super) addresses: Vec<String>,
    pub(super) forbidden: Box<FindForbidden>,
}

/// Finds the providers that the configuration does not allow to be called.
pub type FindForbidden = dyn Fn(&Snapshot) -> Vec<ForbiddenProvider> + Send + Sync;

// === impl AdminPages ===

impl AdminPages {
    /// The metrics as they are now.
    fn page(&self) -> Page {
        let snapshot = self.engine.snapshot();
        let mut page = Page::about(snapshot.registry.providers().iter().map(|provider| provider.name.as_str()));
        loaded::collect(&snapshot, SystemTime::now(), &mut page);
        self.sources.iter().for_each(|source| source.collect(&mut page));
        page
    }

    fn status(&self) -> Status {
        let snapshot = self.engine.snapshot();
        let sources = Sources {
            page: &self.page(),
            snapshot: &snapshot,
            recent_decisions: &self.recent_decisions,
            window: &self.window,
            started: self.started,
            followed: self.followed.iter().map(|reloads| reloads.followed()).collect(),
            certificates: self.certificates.ends(),
            refused_connections: self.connections.refusals.recent(),
            reached_limits: [&self.connections.unknown_calls, &self.connections.watches]
                .into_iter()
                .filter_map(|limit| limit.reached())
                .collect(),
            forbidden: (self.forbidden)(&snapshot),
            changes: self.changes.newest_first(),
            stopping: self.connections.stopping.get().map(|since| (*since, self.connections.calls_in_flight())),
            top_peers: top_peers(&self.connections.open),
        };
        status::status(&sources, SystemTime::now())
    }

    /// Renders the page at this path. Returns its content type and its text.
    fn render(&self, path: &str) -> Result<(&'static str, String), fmt::Error> {
        Ok(match path {
            METRICS => (CONTENT_TYPE, self.page().text()?),
            STATUS => ("text/html; charset=utf-8", html(&self.status())),
            _ => ("application/json", serde_json::to_string_pretty(&self.status()).map_err(|_| fmt::Error)? + "\n"),
        })
    }
}

/// Stores the counts every minute, for ever, so that the status page can say which are recent. Decisions count nothing extra for this.
pub(super) async fn sample_counts(pages: Arc<AdminPages>) {
    loop {
        tokio::time::sleep(SAMPLE_EVERY).await;
        let pages = Arc::clone(&pages);
        let sampling = move || pages.window.note(SystemTime::now(), Totals::of(&pages.page()));
        drop(tokio::task::spawn_blocking(sampling).await);
    }
}

/// Serves the admin pages for ever.
pub(super) async fn serve_admin(listener: Listener, pages: Arc<AdminPages>) {
    let mut connections = JoinSet::new();
    // In the order of arrival.
    let mut open: VecDeque<Open> = VecDeque::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        open.retain(|connection| !connection.task.is_finished());
        if open.len() >= MAX_CONNECTIONS {
            let silent = open.iter().position(|connection| !connection.has_asked.load(Ordering::Relaxed));
            // If all are being answered, the new one is closed without an answer. The client notices, and may come again.
            let Some(silent) = silent.and_then(|at| open.remove(at)) else { continue };
            silent.task.abort();
        }
        let has_asked = Arc::new(AtomicBool::new(false));
        let task = connections.spawn(serve(accepted, Arc::clone(&pages), Arc::clone(&has_asked)));
        open.push_back(Open { task, has_asked });
    }
}

/// A connection.
struct Open {
    task: AbortHandle,
    /// Whether its request has come.
    has_asked: Arc<AtomicBool>,
}

/// Serves one request, or closes the connection when its time is over.
async fn serve(accepted: Accepted, pages: Arc<AdminPages>, has_asked: Arc<AtomicBool>) {
    let Accepted { io, peer } = accepted;
    let io = match timeout(HEADER_TIME, first_bytes(io)).await {
        Ok(Ok(io)) => io,
        Ok(Err(Some(io))) => {
            pages.connections.refusals.add(peer, Refusal::of(HandshakeFault::GrpcOnAdmin));
            return send_last_bytes(io, grpc_is_elsewhere(&pages.addresses).as_bytes()).await;
        }
        Ok(Err(None)) | Err(_) => return,
    };
    let service = service_fn(|request| {
        has_asked.store(true, Ordering::Relaxed);
        let pages = Arc::clone(&pages);
        async move { Ok::<_, Infallible>(answer(&request, pages).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_buf_size(MAX_HEADER_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(io), service);
    // A fault here is the client's, and the client sees it.
    drop(timeout(CONNECTION_TIME, connection).await);
}

/// Reads the client's first bytes and returns a stream that repeats them. `Err` holds the stream of a client that speaks gRPC, or `None` if the
/// client has gone.
async fn first_bytes(mut io: Box<dyn Stream>) -> Result<Rewind, Option<Box<dyn Stream>>> {
    let (mut first, mut length) = ([0; PREFACE.len()], 0);
    while let Some(free) = first.get_mut(length..).filter(|free| !free.is_empty()) {
        let read = io.read(free).await.map_err(|_| None)?;
        length += read;
        let said = first.get(..length).unwrap_or_default();
        if read == 0 || !PREFACE.starts_with(said) {
            return Ok(Rewind { io, prefix: Bytes::copy_from_slice(said) });
        }
    }
    Err(Some(io))
}

/// The answer to a gRPC client. Its library shows this text, or that the answer is not HTTP/2. `byok-gate health` shows the sentence alone.
fn grpc_is_elsewhere(addresses: &[String]) -> String {
    format!(
        "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n{ADMIN_SAYS}: gRPC is on {}\n",
        addresses.join(" and ")
    )
}

async fn answer(request: &Request<Incoming>, pages: Arc<AdminPages>) -> Response<Body> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut response = plain_response(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD");
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    if !request.body().is_end_stream() {
        return plain_response(StatusCode::PAYLOAD_TOO_LARGE, "no body is taken");
    }
    let path = match request.uri().path() {
        path @ (METRICS | STATUS | STATUS_JSON) => path.to_owned(),
        ROOT => {
            let mut response = plain_response(StatusCode::FOUND, "see /status");
            response.headers_mut().insert(header::LOCATION, HeaderValue::from_static(STATUS));
            return response;
        }
        _ => {
            let here = "here are /status, /status.json and /metrics; health is gRPC's own service, on server.listen";
            return plain_response(StatusCode::NOT_FOUND, here);
        }
    };
    // On a blocking thread: it reads files under /proc, and decisions must not wait for it.
    match tokio::task::spawn_blocking(move || pages.render(&path)).await.map_err(io::Error::other) {
        Ok(Ok((content_type, page))) => response_of_type(StatusCode::OK, content_type, page),
        Ok(Err(_)) | Err(_) => {
            tracing::error!(event = "metrics_failed", "a page of the admin listener could not be written");
            plain_response(StatusCode::INTERNAL_SERVER_ERROR, "the page could not be written")
        }
    }
}

fn plain_response(status: StatusCode, words: &str) -> Response<Body> {
    response_of_type(status, "text/plain; charset=utf-8", format!("{words}\n"))
}

fn response_of_type(status: StatusCode, content_type: &'static str, text: String) -> Response<Body> {
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

    struct PendingProber;

    impl Prober for PendingProber {
        fn probe(&self, _: ProbeRequest) -> Boxed<'static, Finding> {
            Box::pin(std::future::pending())
        }
    }

    fn pages() -> Arc<AdminPages> {
        let setup = config::load(&config::Paths::default(), &config::Overrides::default()).unwrap();
        let cache = crate::liveness::cache::Cache::new(Arc::new(PendingProber), crate::liveness::cache::CacheSettings::default());
        let engine = Arc::new(Engine::new(setup.snapshot, Arc::new(cache), None));
        let recent_decisions = Arc::new(RecentDecisions::new(false));
        let started = SystemTime::now();
        Arc::new(AdminPages {
            engine,
            sources: Vec::new(),
            followed: Vec::new(),
            recent_decisions,
            changes: Arc::default(),
            certificates: Arc::default(),
            connections: Arc::default(),
            window: Window::since(started),
            started,
            addresses: Vec::new(),
            forbidden: Box::new(|_| Vec::new()),
        })
    }

    fn accepted(io: tokio::io::DuplexStream) -> Accepted {
        Accepted { io: Box::new(io), peer: Peer::Unix { uid: 1, gid: 1 } }
    }

    /// A connection ends even if headers arrive byte by byte or the answer is not read.
    #[tokio::test(start_paused = true)]
    async fn a_slow_scraper_is_cut_off() {
        let began = Instant::now();
        let (mut slow, io) = duplex(1024);
        let serving = tokio::spawn(serve(accepted(io), pages(), Arc::default()));
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
        serve(accepted(io), pages(), Arc::default()).await;
        assert_eq!(began.elapsed(), CONNECTION_TIME);
        // For comparison, a client that is fast enough.
        let (mut quick, io) = duplex(64 * 1024);
        quick.write_all(b"GET /metrics HTTP/1.1\r\nhost: gate\r\n\r\n").await.unwrap();
        serve(accepted(io), pages(), Arc::default()).await;
        let mut said = String::new();
        quick.read_to_string(&mut said).await.unwrap();
        assert!(said.starts_with("HTTP/1.1 200") && said.ends_with("# EOF\n"), "{said}");
    }
}
