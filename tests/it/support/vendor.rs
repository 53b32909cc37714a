//! The fake vendor: a real HTTP server on a real port whose answers are data.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;

use tokio::{net::TcpListener, task::JoinSet};

pub(crate) use super::vendor_rows::{Asked, Behave, Row};

/// A vendor that answers by rows. Stops when it is dropped.
pub(crate) struct Vendor {
    pub(crate) address: SocketAddr,
    state: Arc<State>,
    _tasks: JoinSet<()>,
}

struct State {
    rows: Vec<Row>,
    asked: Mutex<Vec<Asked>>,
    connections: AtomicUsize,
    at_once: AtomicUsize,
    most_at_once: AtomicUsize,
}

impl Vendor {
    pub(crate) async fn start(rows: Vec<Row>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            rows,
            asked: Mutex::default(),
            connections: AtomicUsize::new(0),
            at_once: AtomicUsize::new(0),
            most_at_once: AtomicUsize::new(0),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, Arc::clone(&state)));
        Self { address, state, _tasks: tasks }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.state.asked.lock().unwrap().clone()
    }

    /// The most requests that it had under way at a time.
    pub(crate) fn most_at_once(&self) -> usize {
        self.state.most_at_once.load(Ordering::SeqCst)
    }

    /// Connections that were opened to it, used or not.
    pub(crate) fn connections(&self) -> usize {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// Requests that carried this key.
    pub(crate) fn asked_with(&self, key: &str) -> usize {
        self.asked().iter().filter(|asked| asked.keys().contains(&key)).count()
    }
}

async fn serve(listener: TcpListener, state: Arc<State>) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        state.connections.fetch_add(1, Ordering::SeqCst);
        let state = Arc::clone(&state);
        connections.spawn(async move {
            let service = hyper::service::service_fn(|request| answer(request, Arc::clone(&state)));
            // An error is the client's hanging up, or ours on purpose.
            drop(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await);
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    state: Arc<State>,
) -> Result<Response<Full<Bytes>>, Box<dyn std::error::Error + Send + Sync>> {
    let (head, body) = request.into_parts();
    let asked = Asked {
        method: head.method.to_string(),
        path: head.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
        headers: head.headers.iter().map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect(),
        body: String::from_utf8(body.collect().await?.to_bytes().to_vec())?,
    };
    let row = state.rows.iter().find(|row| row.fits(&asked)).cloned();
    state.asked.lock().unwrap().push(asked);
    let row = row.unwrap_or_else(Row::no_such_path);
    let at_once = state.at_once.fetch_add(1, Ordering::SeqCst) + 1;
    state.most_at_once.fetch_max(at_once, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(row.delay_ms)).await;
    state.at_once.fetch_sub(1, Ordering::SeqCst);
    match row.behave {
        Some(Behave::Silent) => std::future::pending::<Result<_, Infallible>>().await?,
        // hyper closes the connection when the service fails.
        Some(Behave::Reset) => Err("reset on purpose".into()),
        None => {
            let mut response = Response::builder().status(row.status.unwrap_or(200));
            for (name, value) in &row.headers {
                response = response.header(name, value);
            }
            Ok(response.body(Full::from(row.body))?)
        }
    }
}
