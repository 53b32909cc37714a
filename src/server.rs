//! The server: bind, then run until told to stop. Who may call, limits, health, reflection, and the order of leaving.

mod admin;
mod auth;
mod connection;
mod error;
mod health;
mod inline_executor;
mod listen;
mod reload;
pub mod shutdown;
mod tls;

use std::{
    convert::Infallible,
    net::SocketAddr,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{Arc, OnceLock},
};

use futures_util::FutureExt;
use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::service::Routes;
use tonic_health::pb::{FILE_DESCRIPTOR_SET as HEALTH_DESCRIPTORS, health_server::HealthServer};

use self::{
    admin::{Shown, answer_scrapers},
    auth::Callers,
    connection::{ConnectionContext, LAST_WORDS, turn_away},
    health::{HealthService, Phase},
    listen::{Listener, Peer},
    reload::{Source, keep_fresh},
    tls::{Tls, TlsFiles},
};
pub use self::{error::ServerError, listen::Address};
use crate::{
    config::settings::{self, Settings},
    core::engine::Engine,
    grpc::{PolicyDecision, convert},
    telemetry::{
        events::Journal,
        metrics::{Counter, Measured, Page, calls::Calls, process::Process, reloads::Reloads},
    },
};

/// A refusal of connections is logged once for so many.
const LOG_EVERY_REFUSED: usize = 1000;

/// A server that has its sockets and its files.
pub struct Bound {
    listeners: Vec<Listener>,
    admin: Option<Listener>,
    sources: Vec<Arc<dyn Measured>>,
    callers: Arc<Callers>,
    tls: Option<Arc<Tls>>,
    settings: Settings,
    journal: Journal,
    supervised: Vec<Task>,
}

/// Work in the background, by name. It ends only if it fails.
type Task = (&'static str, Pin<Box<dyn Future<Output = ()> + Send>>);

/// How a server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Every call was answered and every connection closed.
    Drained,
    /// Some calls or connections were still open at the drain deadline.
    CutOff,
}

// === impl Bound ===

impl Bound {
    /// Takes one TCP address, with the default settings. Nothing is accepted yet.
    pub async fn bind(address: SocketAddr) -> Result<Self, ServerError> {
        let mut settings = Settings::default();
        settings.server.listen = vec![address.to_string()];
        Self::open(settings).await
    }

    /// Takes the sockets and reads the files. Nothing is accepted yet.
    pub async fn open(settings: Settings) -> Result<Self, ServerError> {
        let parsed = |setting, text: &String| text.parse().map_err(|message| ServerError::Address { setting, message });
        let addresses: Vec<Address> =
            settings.server.listen.iter().map(|text| parsed("server.listen", text)).collect::<Result<_, _>>()?;
        let admin = settings.admin.listen.as_ref().map(|text| parsed("admin.listen", text)).transpose()?;
        let has_tls = settings.tls.certificate.is_some();
        let knows_callers = settings.tls.client_ca.is_some() || settings.callers.token_file.is_some();
        for address in &addresses {
            if !address.is_local() && !has_tls && !settings.server.insecure_listen {
                return Err(ServerError::Exposed(address.clone()));
            }
            // Whoever sets up TLS expects a network, on whatever address it arrives.
            let is_tcp = matches!(address, Address::Tcp(_));
            if is_tcp && has_tls && !knows_callers && !settings.server.allow_anonymous {
                return Err(ServerError::Anonymous(address.clone()));
            }
        }
        let callers = Arc::new(Callers::new(&settings.callers)?);
        let tls = match (&settings.tls.certificate, &settings.tls.key) {
            (Some(certificate), Some(key)) => {
                let client_ca = settings.tls.client_ca.clone();
                let files = TlsFiles { certificate: certificate.clone(), key: key.clone(), client_ca };
                Some(Arc::new(Tls::load(files, Arc::clone(&callers))?))
            }
            (_, _) => None,
        };
        let mut listeners = Vec::new();
        for address in addresses {
            listeners.push(listener(address, &settings).await?);
        }
        let admin = match admin {
            None => None,
            Some(address) => Some(listener(address, &settings).await?),
        };
        let sources: Vec<Arc<dyn Measured>> = vec![Arc::new(Process::started())];
        Ok(Self { listeners, admin, sources, callers, tls, settings, journal: Journal::off(), supervised: Vec::new() })
    }

    /// Shows these numbers too.
    pub fn show(&mut self, source: Arc<dyn Measured>) {
        self.sources.push(source);
    }

    /// Where numbers are shown, if they are: with the port that was given for port 0.
    pub fn admin_address(&self) -> Option<Address> {
        self.admin.as_ref().map(Listener::address)
    }

    /// Takes the lists of callers anew, from the configuration as it is by then.
    pub fn relist(&self) -> impl Fn(&settings::Callers) + Send + Sync + use<> {
        let callers = Arc::clone(&self.callers);
        move |settings| callers.relist(settings)
    }

    /// Where it listens: with the port that was given for port 0.
    pub fn addresses(&self) -> Vec<Address> {
        self.listeners.iter().map(Listener::address).collect()
    }

    /// The first TCP address.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.addresses().into_iter().find_map(|address| match address {
            Address::Tcp(address) => Some(address),
            Address::Unix(_) => None,
        })
    }

    /// Writes decisions down there. Without it, nowhere.
    pub fn keep(&mut self, journal: Journal) {
        self.journal = journal;
    }

    /// Runs this beside the server. It is not to end by itself: the server then drains and fails.
    pub fn supervise(&mut self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        self.supervised.push((name, Box::pin(work)));
    }

    /// Serves until `shutdown`, then leaves: NOT_SERVING, a moment for that to be noticed, no new connections, GOAWAY, calls
    /// under way to the drain deadline.
    pub async fn run(self, engine: Arc<Engine>, shutdown: impl Future<Output = ()> + Send) -> Result<Ended, ServerError> {
        let Self { listeners, admin, mut sources, callers, tls, settings, journal, supervised } = self;
        let journal = Arc::new(journal);
        let Settings { server, limits, deadlines, shutdown: stop, .. } = settings;
        let (phase, phases) = watch::channel(Phase::Starting);
        let calls = Arc::new(Calls::default());
        let counted = (Arc::clone(&journal), Arc::clone(&calls));
        let service = PolicyDecision::new(Arc::clone(&engine), limits.clone(), deadlines.clone(), counted);
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(convert::DESCRIPTORS)
                .register_encoded_file_descriptor_set(HEALTH_DESCRIPTORS)
        };
        let routes = Routes::new(HealthServer::new(HealthService(phases.clone())))
            .add_service(reflection().build_v1()?)
            .add_service(reflection().build_v1alpha()?)
            .prepare();
        let mut tasks = JoinSet::new();
        let files: Vec<(Arc<dyn Source>, Arc<Reloads>)> = tls
            .iter()
            .map(|tls| Arc::clone(tls) as Arc<dyn Source>)
            .chain(callers.tokens().map(|tokens| Arc::clone(tokens) as Arc<dyn Source>))
            .map(|source| (Arc::clone(&source), Arc::new(Reloads::of(source.name()))))
            .collect();
        let connections = Arc::new(Connections::new(listeners.len(), limits.connections));
        sources.extend([Arc::new(service.clone()) as Arc<dyn Measured>, calls.clone(), connections.clone()]);
        sources.extend(files.iter().map(|(_, counts)| Arc::clone(counts) as Arc<dyn Measured>));
        if !files.is_empty() {
            spawn(&mut tasks, ("reload", Box::pin(keep_fresh(files, server.reload_interval.0))));
        }
        if let Some(listener) = admin {
            spawn(&mut tasks, ("admin", Box::pin(answer_scrapers(listener, Arc::new(Shown { engine, sources })))));
        }
        let failed = Arc::clone(&connections.failed);
        let context =
            ConnectionContext { callers, tls, service, routes, limits, deadlines, journal, phase: phases, calls, failed };
        let context = Arc::new(context);
        // Every connection holds a sender; when the last one is dropped, all are gone.
        let (open, mut all_gone) = mpsc::channel::<Infallible>(1);
        for (listener, places) in listeners.into_iter().zip(connections.places.clone()) {
            let accepting = accept(listener, places, Arc::clone(&context), Arc::clone(&connections), open.clone());
            spawn(&mut tasks, ("accept", Box::pin(accepting)));
        }
        for task in supervised {
            spawn(&mut tasks, task);
        }
        drop(open);
        phase.send_replace(Phase::Serving);
        let ended = tokio::select! {
            () = shutdown => None,
            Some(ended) = tasks.join_next() => Some(ended.unwrap_or("unknown")),
        };
        if let Some(name) = ended {
            // The first one alone: the server stops with it.
            let _is_first = connections.task_ended.set(name);
            tracing::error!(event = "background_task_ended", task = name, "it never should; stopping");
        }
        phase.send_replace(Phase::Leaving);
        sleep(stop.notice.0).await;
        phase.send_replace(Phase::Draining);
        // With the tasks go the sockets.
        tasks.shutdown().await;
        let drained = timeout(stop.drain.0, all_gone.recv()).await;
        phase.send_replace(Phase::Cut);
        if drained.is_err() {
            // Calls that are cut off are told so, if their callers listen.
            drop(timeout(LAST_WORDS * 2, all_gone.recv()).await);
        }
        match (ended, drained) {
            (Some(name), _) => Err(ServerError::TaskEnded(name)),
            (None, Ok(_)) => Ok(Ended::Drained),
            (None, Err(_)) => Ok(Ended::CutOff),
        }
    }
}

async fn listener(address: Address, settings: &Settings) -> Result<Listener, ServerError> {
    Listener::bind(&address, &settings.server, &settings.socket).await.map_err(|source| ServerError::Listen { address, source })
}

/// Numbers about connections, and about what takes them.
struct Connections {
    limit: usize,
    /// Each listener's.
    places: Vec<Arc<Semaphore>>,
    taken: Counter,
    refused: Counter,
    failed: Arc<Counter>,
    task_ended: OnceLock<&'static str>,
}

// === impl Connections ===

impl Connections {
    fn new(listeners: usize, limit: usize) -> Self {
        let places = (0..listeners).map(|_| Arc::new(Semaphore::new(limit))).collect();
        Self {
            limit,
            places,
            taken: Counter::new(),
            refused: Counter::new(),
            failed: Arc::default(),
            task_ended: OnceLock::new(),
        }
    }
}

impl Measured for Connections {
    fn tell(&self, page: &mut Page) {
        let open: usize = self.places.iter().map(|places| self.limit.saturating_sub(places.available_permits())).sum();
        page.gauge("byokgate_connections_open", "Connections that are open").add(&[], open);
        page.counter("byokgate_connections", "Connections that were taken").add(&[], &self.taken);
        let mut refused = page.counter("byokgate_connections_refused", "Connections that came to no call");
        refused.add(&[("reason", "limit")], &self.refused);
        refused.add(&[("reason", "handshake")], &*self.failed);
        if let Some(task) = self.task_ended.get() {
            page.counter("byokgate_background_tasks_ended", "Work in the background that ended: the server is stopping")
                .add(&[("task", task)], 1_u64);
        }
    }
}

/// Starts work in the background; a panic in it is an end like any other.
fn spawn(tasks: &mut JoinSet<&'static str>, (name, work): Task) {
    tasks.spawn(async move {
        drop(AssertUnwindSafe(work).catch_unwind().await);
        name
    });
}

/// Takes connections for ever. Past the limit they are turned away at once, and not left waiting in the kernel's queue.
async fn accept(
    listener: Listener,
    places: Arc<Semaphore>,
    context: Arc<ConnectionContext>,
    connections: Arc<Connections>,
    open: mpsc::Sender<Infallible>,
) {
    let limit = context.limits.connections;
    let mut refused = 0_usize;
    loop {
        let accepted = listener.accept().await;
        match Arc::clone(&places).try_acquire_owned() {
            Ok(place) => {
                connections.taken.one();
                let (context, open) = (Arc::clone(&context), open.clone());
                tokio::spawn(async move {
                    context.serve(accepted).await;
                    drop((place, open));
                });
            }
            Err(_) => {
                connections.refused.one();
                if refused.is_multiple_of(LOG_EVERY_REFUSED) {
                    tracing::warn!(event = "connection_limit", address = %listener.address(), limit, refused);
                }
                refused = refused.wrapping_add(1);
                let is_plain = context.tls.is_none() || matches!(accepted.peer, Peer::Unix { .. });
                if is_plain {
                    tokio::spawn(turn_away(accepted.io, limit));
                }
            }
        }
    }
}
