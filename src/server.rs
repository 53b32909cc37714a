//! The server. It binds its sockets, then serves until it is told to stop. It holds callers, limits, health, reflection and the order of
//! shutdown.

mod accept;
mod admin;
mod call_limit;
mod callers;
mod connection;
mod connections;
mod error;
mod health;
mod inline_executor;
mod listen;
mod refused;
mod request_body;
pub mod settings;
pub mod shutdown;
mod status_page;
mod tls;
mod unreported;

use std::{convert::Infallible, io, net::SocketAddr, panic::AssertUnwindSafe, pin::Pin, sync::Arc, time::SystemTime};

use futures_util::FutureExt;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::service::Routes;
use tonic_health::pb::{FILE_DESCRIPTOR_SET as HEALTH_DESCRIPTORS, health_server::HealthServer};

use self::{
    accept::{accept, affordable_connections},
    admin::{AdminPages, sample_counts, serve_admin},
    callers::Callers,
    connection::{CUT_OFF_GRACE, ConnectionContext},
    connections::{ConnectionCounts, Connections},
    health::{HealthService, Phase},
    listen::Listener,
    request_body::ByteBudget,
    settings::{CallerSettings, EdgeSettings},
    tls::{Certificates, Tls, TlsFiles, watch_ends},
};
pub(crate) use self::{
    admin::ADMIN_SAYS,
    tls::{authorities, end_of_own, near_end_warning},
};
pub use self::{
    admin::FindForbidden,
    error::{Review, ServerError},
    listen::Address,
};
use crate::{
    core::{engine::Engine, snapshot::Snapshot},
    grpc::{authorize::Authorizer, call_record::Recorder, convert, service::PolicyDecision},
    telemetry::{
        events::Journal,
        metrics::{Collect, process::Process, reloads::Reloads},
        recent_changes::RecentChanges,
        recent_decisions::RecentDecisions,
        status::{CertificateEnd, Window},
    },
    watch::{Source, Watcher, files},
};

/// A server that has opened its sockets and read its files.
pub struct Bound {
    listeners: Vec<Listener>,
    admin: Option<Listener>,
    collectors: Vec<Arc<dyn Collect>>,
    followed: Vec<Arc<Reloads>>,
    callers: Arc<Callers>,
    tls: Option<Arc<Tls>>,
    /// Certificates besides those of `tls` whose expiry is shown.
    other_certificates: Vec<CertificateEnd>,
    settings: EdgeSettings,
    journal: Journal,
    counts: Arc<ConnectionCounts>,
    forbidden: Box<FindForbidden>,
    changes: Arc<RecentChanges>,
    tasks: Vec<Task>,
    /// Makes all file watchers check their files at once.
    recheck: watch::Sender<()>,
}

/// The setting of the listeners, and of the admin listener.
const LISTEN: &str = "server.listen";
const ADMIN_LISTEN: &str = "admin.listen";

/// A background task and its name. It ends only if it fails.
type Task = (&'static str, Pin<Box<dyn Future<Output = ()> + Send>>);

/// How a server ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// All calls were answered and all connections closed.
    Drained,
    /// Some calls or connections were still open at the drain deadline.
    CutOff,
}

// === impl Bound ===

impl Bound {
    /// Opens the sockets and reads the files. It accepts no connection yet.
    pub async fn open(settings: EdgeSettings) -> Result<Self, ServerError> {
        let (addresses, admin) = addresses(&settings)?;
        let changes = Arc::default();
        let (callers, tls) = load_callers_and_tls(&settings, &changes)?;
        let mut listeners = Vec::new();
        for address in addresses {
            listeners.push(listener(LISTEN, address, &settings).await?);
        }
        let admin = match admin {
            None => None,
            Some(address) => Some(listener(ADMIN_LISTEN, address, &settings).await?),
        };
        let limit = affordable_connections(settings.limits.connections, listeners.len());
        let counts = Arc::new(ConnectionCounts::of(listeners.iter().map(|_| Connections::new(limit)), &settings.limits));
        let collectors: Vec<Arc<dyn Collect>> = vec![Arc::new(Process::started()), changes.clone(), counts.clone()];
        let (recheck, _) = watch::channel(());
        let (journal, followed, tasks) = (Journal::off(), Vec::new(), Vec::new());
        let forbidden = Box::new(|_: &Snapshot| Vec::new());
        let mut bound = Self {
            listeners,
            admin,
            collectors,
            followed,
            callers,
            tls,
            other_certificates: Vec::new(),
            settings,
            journal,
            counts,
            forbidden,
            changes,
            tasks,
            recheck,
        };
        if let Some(tls) = bound.tls.clone() {
            bound.follow(tls);
        }
        if let Some(tokens) = bound.callers.tokens().cloned() {
            bound.follow(tokens);
        }
        Ok(bound)
    }

    /// The addresses that it listens on, with the port that the system chose for port 0.
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

    /// The address of the admin listener, if there is one, with the port that the system chose for port 0.
    pub fn admin_address(&self) -> Option<Address> {
        self.admin.as_ref().map(Listener::address)
    }

    /// Logs decisions to this journal. Without one they are not logged.
    pub fn set_journal(&mut self, journal: Journal) {
        self.journal = journal;
    }

    /// A function that counts the calls in flight.
    pub fn calls_in_flight(&self) -> impl Fn() -> usize + Send + use<> {
        let counts = Arc::clone(&self.counts);
        move || counts.calls_in_flight()
    }

    /// The list that keeps the last changes of configuration and callers.
    pub fn changes(&self) -> Arc<RecentChanges> {
        Arc::clone(&self.changes)
    }

    /// Sets how the status page finds the providers that the configuration does not allow to be called.
    pub fn set_forbidden(&mut self, forbidden: Box<FindForbidden>) {
        self.forbidden = forbidden;
    }

    /// Shows the expiry of a certificate that is read at the start, as that of the listeners' is.
    pub fn show_certificate(&mut self, end: CertificateEnd) {
        self.other_certificates.push(end);
    }

    /// Adds a source of metrics.
    pub fn register(&mut self, source: Arc<dyn Collect>) {
        self.collectors.push(source);
    }

    /// Runs a background task. If it ends, the server drains and fails.
    pub fn supervise(&mut self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push((name, Box::pin(work)));
    }

    /// Watches a source's files, and reloads it when they change.
    pub fn follow(&mut self, source: impl Source) {
        let name = source.name();
        let watcher = Watcher::new(source);
        self.register(watcher.counts());
        self.followed.push(watcher.counts());
        self.supervise(name, watcher.run(self.settings.server.reload_interval, self.recheck.subscribe()));
    }

    /// A sender that makes all watchers check their files at once.
    pub fn recheck_files(&self) -> watch::Sender<()> {
        self.recheck.clone()
    }

    /// A function that replaces the lists of callers.
    pub fn replace_callers(&self) -> impl Fn(&CallerSettings) + Send + Sync + use<> {
        let callers = Arc::clone(&self.callers);
        move |settings| callers.replace_lists(settings)
    }

    /// Serves until `shutdown`, then stops in this order: it reports NOT_SERVING, waits until that is noticed, accepts no more connections, sends
    /// GOAWAY, and finishes calls in flight until the drain deadline.
    pub async fn run(self, engine: Arc<Engine>, shutdown: impl Future<Output = ()> + Send) -> Result<Ended, ServerError> {
        let Self { listeners, admin, mut collectors, followed, callers, tls, other_certificates, settings, journal, .. } = self;
        let Self { counts, forbidden, changes, tasks: supervised, recheck, .. } = self;
        let (phase, phases) = watch::channel(Phase::Starting);
        let recent_decisions = Arc::new(RecentDecisions::new(settings.admin.show_workspace_ids));
        let recorder = Arc::new(Recorder::new(journal, Arc::clone(&recent_decisions)));
        let context = context(&settings, callers, tls.clone(), Arc::clone(&engine), &recorder, phases, &counts)?;
        let certificates = Arc::new(Certificates { tls, others: other_certificates });
        collectors.extend([Arc::new(context.service.clone()) as Arc<dyn Collect>, recorder.clone(), certificates.clone()]);
        // The pages stay until the end: they show what the drain waits for.
        let (mut tasks, mut admin_tasks) = (JoinSet::new(), JoinSet::new());
        if let Some(listener) = admin {
            let started = SystemTime::now();
            let addresses = listeners.iter().map(|listener| listener.address().to_string()).collect();
            let pages = Arc::new(AdminPages {
                engine,
                sources: collectors,
                followed,
                recent_decisions,
                changes,
                certificates: Arc::clone(&certificates),
                connections: Arc::clone(&counts),
                window: Window::since(started),
                started,
                addresses,
                forbidden,
            });
            spawn(&mut admin_tasks, ("status counts", Box::pin(sample_counts(Arc::clone(&pages)))));
            spawn(&mut admin_tasks, ("admin", Box::pin(serve_admin(listener, pages))));
        }
        // Every connection holds a sender. When the last one is dropped, all connections are closed.
        let (open, mut all_closed) = mpsc::channel::<Infallible>(1);
        let context = Arc::new(context);
        for (listener, connections) in listeners.into_iter().zip(counts.open.clone()) {
            let accepting = accept(listener, connections, Arc::clone(&context), Arc::clone(&counts), open.clone());
            spawn(&mut tasks, ("accept", Box::pin(accepting)));
        }
        spawn(&mut tasks, ("certificates", Box::pin(watch_ends(certificates))));
        for task in supervised {
            spawn(&mut tasks, task);
        }
        drop((open, context));
        phase.send_replace(Phase::Serving);
        let ended = tokio::select! {
            () = shutdown => None,
            Some(ended) = tasks.join_next() => Some(ended.unwrap_or("unknown")),
            Some(ended) = admin_tasks.join_next() => Some(ended.unwrap_or("unknown")),
        };
        counts.stopping.get_or_init(SystemTime::now);
        if let Some(name) = ended {
            // Only the first task that ends is recorded: the server stops because of it.
            let _is_first = counts.task_ended.set(name);
            tracing::error!(event = "background_task_ended", task = name, "it never should; stopping");
        }
        phase.send_replace(Phase::Leaving);
        sleep(settings.shutdown.notice).await;
        phase.send_replace(Phase::Draining);
        // The tasks own the sockets, so this closes them.
        tasks.shutdown().await;
        drop(recheck);
        let drained = timeout(settings.shutdown.drain, all_closed.recv()).await;
        recorder.set_cut_off();
        phase.send_replace(Phase::Cut);
        if drained.is_err() {
            // Wait until the calls that are cut off have sent their statuses.
            drop(timeout(CUT_OFF_GRACE * 2, all_closed.recv()).await);
        }
        admin_tasks.shutdown().await;
        match (ended, drained) {
            (Some(name), _) => Err(ServerError::TaskEnded(name)),
            (None, Ok(_)) => Ok(Ended::Drained),
            (None, Err(_)) => Ok(Ended::CutOff),
        }
    }
}

/// Parses the addresses to listen on and the admin address.
fn addresses(settings: &EdgeSettings) -> Result<(Vec<Address>, Option<Address>), ServerError> {
    let EdgeSettings { server, admin, .. } = settings;
    let parsed = |setting, text: &String| text.parse().map_err(|message| ServerError::Address { setting, message });
    let addresses: Vec<Address> = server.listen.iter().map(|text| parsed(LISTEN, text)).collect::<Result<_, _>>()?;
    let admin = admin.listen.as_ref().map(|text| parsed(ADMIN_LISTEN, text)).transpose()?;
    match addresses.iter().find_map(|address| exposure_fault(address, settings)) {
        Some(fault) => Err(fault),
        None => Ok((addresses, admin)),
    }
}

/// The fault, if these settings would expose the service on this address.
fn exposure_fault(address: &Address, EdgeSettings { server, tls, callers, .. }: &EdgeSettings) -> Option<ServerError> {
    let has_tls = tls.certificate.is_some();
    let knows_callers = tls.client_ca.is_some() || callers.token_file.is_some();
    if !address.is_local() && !has_tls && !server.insecure_listen {
        return Some(ServerError::Exposed(address.clone()));
    }
    // With TLS the operator expects calls over a network, even on a loopback address.
    let is_tcp = matches!(address, Address::Tcp(_));
    (is_tcp && has_tls && !knows_callers && !server.allow_anonymous).then(|| ServerError::Anonymous(address.clone()))
}

/// Reads the files of callers and of TLS, within the time limit for files.
fn load_callers_and_tls(
    settings: &EdgeSettings,
    changes: &Arc<RecentChanges>,
) -> Result<(Arc<Callers>, Option<Arc<Tls>>), ServerError> {
    let EdgeSettings { tls, callers, tier, .. } = settings.clone();
    let token_file = callers.token_file.clone();
    let changes = Arc::clone(changes);
    let read = move || {
        let callers = Arc::new(Callers::new(&callers, tier, &changes)?);
        let (Some(certificate), Some(key)) = (tls.certificate, tls.key) else { return Ok((callers, None)) };
        let files = TlsFiles { certificate, key, client_ca: tls.client_ca };
        let tls = Tls::load(files, Arc::clone(&callers))?;
        Ok((callers, Some(Arc::new(tls))))
    };
    files::in_time(read).unwrap_or_else(|source| {
        let path = token_file.or_else(|| settings.tls.certificate.clone()).unwrap_or_default();
        Err(ServerError::File { path, source })
    })
}

/// Checks addresses, certificates and tokens of these settings. A port is bound and released at once.
pub fn review(settings: &EdgeSettings) -> Review {
    let (mut faults, mut addresses_of, mut in_use) = (Vec::new(), Vec::<(_, Address)>::new(), Vec::new());
    let EdgeSettings { server, admin, tls, callers, tier, .. } = settings;
    let listed = server.listen.iter().map(|text| (LISTEN, text));
    for (setting, text) in listed.chain(admin.listen.iter().map(|text| (ADMIN_LISTEN, text))) {
        match text.parse::<Address>() {
            Ok(address) if address.is_one() && addresses_of.iter().any(|(_, other)| *other == address) => {
                let source = io::Error::new(io::ErrorKind::AddrInUse, "the configuration names this address twice");
                faults.push(ServerError::Listen { setting, address, source });
            }
            Ok(address) => addresses_of.push((setting, address)),
            Err(message) => faults.push(ServerError::Address { setting, message }),
        }
    }
    for (setting, address) in addresses_of {
        if setting == LISTEN {
            faults.extend(exposure_fault(&address, settings));
        }
        match address.may_be_bound() {
            Ok(()) => {}
            // The user who checks need not be the service's user.
            Err(source) if matches!(source.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied) => {
                in_use.push((setting, not_to_be_had(&address, &source)));
            }
            Err(source) => faults.push(ServerError::Listen { setting, address, source }),
        }
    }
    let (tls, callers, tier) = (tls.clone(), callers.clone(), *tier);
    let read = move || {
        let mut found = Review::default();
        let known = Callers::new(&callers, tier, &Arc::default()).map_err(|fault| found.faults.push(fault)).ok();
        // A fault of the token file must not hide one of the certificates.
        let unlisted = CallerSettings { token_file: None, ..callers };
        let known = known.or_else(|| Callers::new(&unlisted, tier, &Arc::default()).ok());
        match (tls.certificate, tls.key, known) {
            (Some(certificate), Some(key), Some(callers)) => {
                let files = TlsFiles { certificate, key, client_ca: tls.client_ca };
                Tls::review(&files, &Arc::new(callers), &mut found);
            }
            (certificate, key, _) => {
                let named = [certificate, key, tls.client_ca];
                found.faults.extend(named.iter().flatten().filter_map(|path| tls::read(path).err()));
            }
        }
        found
    };
    let found = files::in_time(read).unwrap_or_else(|source| {
        let path = settings.tls.certificate.clone().or_else(|| settings.callers.token_file.clone()).unwrap_or_default();
        Review { faults: vec![ServerError::File { path, source }], ..Review::default() }
    });
    faults.extend(found.faults);
    Review { faults, in_use, ..found }
}

/// The text for an address that cannot be bound now.
fn not_to_be_had(address: &Address, fault: &io::Error) -> String {
    if fault.kind() == io::ErrorKind::PermissionDenied {
        return format!("{address}: the user who checks may not bind it ({fault}); `serve` as that user would not start");
    }
    format!(
        "{address} is in use ({fault}): by byok-gate, if it runs here already; else by another process, and `serve` would not start"
    )
}

async fn listener(setting: &'static str, address: Address, settings: &EdgeSettings) -> Result<Listener, ServerError> {
    let bound = Listener::bind(&address, &settings.server, &settings.socket).await;
    bound.map_err(|source| ServerError::Listen { setting, address, source })
}

/// Builds what all connections share.
fn context(
    settings: &EdgeSettings,
    callers: Arc<Callers>,
    tls: Option<Arc<Tls>>,
    engine: Arc<Engine>,
    recorder: &Arc<Recorder>,
    phase: watch::Receiver<Phase>,
    counts: &Arc<ConnectionCounts>,
) -> Result<ConnectionContext, ServerError> {
    let EdgeSettings { server, limits, deadlines, .. } = settings.clone();
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(convert::DESCRIPTORS)
            .register_encoded_file_descriptor_set(HEALTH_DESCRIPTORS)
    };
    let routes = Routes::new(HealthServer::new(HealthService(phase.clone())))
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .prepare();
    let authorizer = Arc::new(Authorizer::new(settings.callers.workspace_calls_per_minute));
    let service = PolicyDecision::new(engine, Arc::clone(&authorizer), limits.clone(), deadlines.clone());
    Ok(ConnectionContext {
        callers,
        authorizer,
        tls,
        service,
        routes,
        bytes: ByteBudget::of_requests(limits.request_bytes),
        answers: ByteBudget::of_unread_answers(limits.answer_bytes),
        settings: server,
        limits,
        deadlines,
        recorder: Arc::clone(recorder),
        phase,
        counts: Arc::clone(counts),
    })
}

/// Starts a background task. A panic ends it like any other end.
fn spawn(tasks: &mut JoinSet<&'static str>, (name, work): Task) {
    tasks.spawn(async move {
        drop(AssertUnwindSafe(work).catch_unwind().await);
        name
    });
}
