//! The server: bind, then run until told to stop. Who may call, limits, health, reflection, and the order of leaving.

mod auth;
mod connection;
mod health;
mod listen;
mod reload;
pub mod shutdown;
mod tls;

use std::{convert::Infallible, error::Error, io, net::SocketAddr, panic::AssertUnwindSafe, path::PathBuf, pin::Pin, sync::Arc};

use futures_util::FutureExt;
use tokio::{
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::service::Routes;
use tonic_health::pb::{FILE_DESCRIPTOR_SET as HEALTH_DESCRIPTORS, health_server::HealthServer};

pub use self::listen::Address;
use self::{
    auth::Callers,
    connection::{Core, turn_away},
    health::{HealthService, Phase},
    listen::{Listener, Peer},
    reload::{Source, keep_fresh},
    tls::{Tls, TlsFiles},
};
use crate::{
    config::settings::{self, Settings},
    engine::Engine,
    service::{
        PolicyDecision,
        convert::{self, pb::policy_decision_service_server::PolicyDecisionServiceServer},
    },
    telemetry::journal::Journal,
};

/// A refusal of connections is logged once for so many.
const LOG_EVERY_REFUSED: usize = 1000;

/// A server that has its sockets and its files.
pub struct Bound {
    listeners: Vec<Listener>,
    callers: Arc<Callers>,
    tls: Option<Arc<Tls>>,
    settings: Settings,
    journal: Journal,
    supervised: Vec<Task>,
}

/// Work in the background, by name. It ends only if it fails.
type Task = (&'static str, Pin<Box<dyn Future<Output = ()> + Send>>);

/// The server could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// An address does not parse.
    #[error("server.listen: {0}")]
    Address(String),
    /// Credentials would cross a network in the clear.
    #[error(
        "listening on {0} is beyond loopback, where credentials would cross the network in the clear; give tls.certificate and \
         tls.key, listen on loopback or unix:PATH, or say --insecure-listen where the network is trusted"
    )]
    Exposed(Address),
    /// Everybody on a network could call.
    #[error(
        "listening on {0} with TLS would take calls from everybody; give tls.client_ca or callers.token_file, or say \
         --allow-anonymous"
    )]
    Anonymous(Address),
    /// The socket could not be had.
    #[error("could not listen on {address}")]
    Listen {
        /// What was asked for.
        address: Address,
        /// The fault.
        #[source]
        source: io::Error,
    },
    /// A configured file could not be read.
    #[error("{}: could not be read: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The fault.
        source: io::Error,
    },
    /// A configured file does not stand.
    #[error("{}: {message}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong; never what it holds.
        message: String,
    },
    /// Reflection could not be built from the descriptors.
    #[error("reflection could not be set up")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// Work in the background ended, which it never should.
    #[error("the background task `{0}` ended; the server drained and left")]
    TaskEnded(&'static str),
}

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
        let addresses: Vec<Address> =
            settings.server.listen.iter().map(|text| text.parse().map_err(ServerError::Address)).collect::<Result<_, _>>()?;
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
            let bound = Listener::bind(&address, &settings.socket).await;
            listeners.push(bound.map_err(|source| ServerError::Listen { address, source })?);
        }
        Ok(Self { listeners, callers, tls, settings, journal: Journal::off(), supervised: Vec::new() })
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
        let Self { listeners, callers, tls, settings, journal, supervised } = self;
        let journal = Arc::new(journal);
        let Settings { server, limits, deadlines, shutdown: stop, .. } = settings;
        let (phase, phases) = watch::channel(Phase::Starting);
        let service = PolicyDecision::new(engine, limits.clone(), deadlines.clone(), Arc::clone(&journal));
        let limited = |bytes| PolicyDecisionServiceServer::new(service.clone()).max_decoding_message_size(bytes);
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(convert::DESCRIPTORS)
                .register_encoded_file_descriptor_set(HEALTH_DESCRIPTORS)
        };
        let routes = Routes::new(HealthServer::new(HealthService(phases.clone())))
            .add_service(reflection().build_v1()?)
            .add_service(reflection().build_v1alpha()?)
            .prepare();
        let (decisions, batches) = (limited(limits.message_bytes), limited(limits.batch_message_bytes));
        let mut tasks = JoinSet::new();
        let sources: Vec<Arc<dyn Source>> = tls
            .iter()
            .map(|tls| Arc::clone(tls) as Arc<dyn Source>)
            .chain(callers.tokens().map(|tokens| Arc::clone(tokens) as Arc<dyn Source>))
            .collect();
        if !sources.is_empty() {
            spawn(&mut tasks, ("reload", Box::pin(keep_fresh(sources, server.reload_interval.0))));
        }
        let core = Arc::new(Core { callers, tls, decisions, batches, routes, limits, deadlines, server, journal, phase: phases });
        // Every connection holds a sender; when the last one is dropped, all are gone.
        let (open, mut all_gone) = mpsc::channel::<Infallible>(1);
        for listener in listeners {
            spawn(&mut tasks, ("accept", Box::pin(accept(listener, Arc::clone(&core), open.clone()))));
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
            tracing::error!(event = "background_task_ended", task = name, "it never should; stopping");
        }
        phase.send_replace(Phase::Leaving);
        sleep(stop.notice.0).await;
        phase.send_replace(Phase::Draining);
        // With the tasks go the sockets.
        tasks.shutdown().await;
        let drained = timeout(stop.drain.0, all_gone.recv()).await;
        phase.send_replace(Phase::Cut);
        match (ended, drained) {
            (Some(name), _) => Err(ServerError::TaskEnded(name)),
            (None, Ok(_)) => Ok(Ended::Drained),
            (None, Err(_)) => Ok(Ended::CutOff),
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
async fn accept(listener: Listener, core: Arc<Core>, open: mpsc::Sender<Infallible>) {
    let limit = core.limits.connections;
    let places = Arc::new(Semaphore::new(limit));
    let mut refused = 0_usize;
    loop {
        let accepted = listener.accept().await;
        match Arc::clone(&places).try_acquire_owned() {
            Ok(place) => {
                let (core, open) = (Arc::clone(&core), open.clone());
                tokio::spawn(async move {
                    core.serve(accepted).await;
                    drop((place, open));
                });
            }
            Err(_) => {
                if refused.is_multiple_of(LOG_EVERY_REFUSED) {
                    tracing::warn!(event = "connection_limit", address = %listener.address(), limit, refused);
                }
                refused = refused.wrapping_add(1);
                let is_plain = core.tls.is_none() || matches!(accepted.peer, Peer::Unix { .. });
                if is_plain {
                    tokio::spawn(turn_away(accepted.io, limit));
                }
            }
        }
    }
}

/// A fault with all its causes, in one line.
fn chain(fault: &dyn Error) -> String {
    let mut out = fault.to_string();
    let mut cause = fault.source();
    while let Some(fault) = cause {
        let said = fault.to_string();
        if !out.contains(&said) {
            out.push_str(": ");
            out.push_str(&said);
        }
        cause = fault.source();
    }
    out
}
