//! The open connections of one listener, up to a limit. At the limit a new connection evicts one: first those whose caller is not known yet, and
//! among them the one that is longest without a call. A known caller's connection that is in use is never evicted.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::{sync::Notify, time::Instant};

use super::{call_limit::CallLimit, refused::Refusals};
use crate::{
    domain::request::Peer,
    grpc::limits::Limits,
    telemetry::metrics::{Collect, Counter, Page},
};

/// A known caller's connection may be evicted only after this time without a call.
const KNOWN_CALLER_MIN_IDLE: Duration = Duration::from_secs(10);
/// How many peers are named where there are too many connections.
const TOP_PEERS: usize = 3;

/// The open connections of one listener.
pub(super) struct Connections {
    limit: usize,
    began: Instant,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    next_id: u64,
    by_id: HashMap<u64, Arc<ConnectionState>>,
}

/// The state of one connection.
pub(super) struct ConnectionState {
    began: Instant,
    peer: Peer,
    /// When the last call ended, or the connection was admitted, in milliseconds since `began`.
    last_used: AtomicU64,
    calls: AtomicUsize,
    handshake_done: AtomicBool,
    /// Whether a known caller has made a call on it.
    known: AtomicBool,
    eviction: Notify,
    closed: Notify,
}

/// A new connection that was admitted.
pub(super) struct Admitted {
    pub(super) place: Place,
    /// The connection that was evicted for it, if any.
    pub(super) evicted: Option<Arc<ConnectionState>>,
}

/// A connection's place among the open ones. Dropping it frees the place.
pub(super) struct Place {
    connections: Arc<Connections>,
    id: u64,
    pub(super) state: Arc<ConnectionState>,
}

/// Counts a call in flight until it is dropped.
pub(super) struct CallGuard(Arc<ConnectionState>);

/// Counts of connections, and the background task that ended.
#[derive(Default)]
pub(super) struct ConnectionCounts {
    /// The open connections of each listener.
    pub(super) open: Vec<Arc<Connections>>,
    pub(super) accepted: Counter,
    pub(super) evicted: Counter,
    pub(super) refused: Counter,
    /// Connections that failed before their first call.
    pub(super) handshake_failed: Counter,
    /// Why they failed.
    pub(super) refusals: Refusals,
    /// The limit of calls from unknown callers.
    pub(super) unknown_calls: Arc<CallLimit>,
    /// The limit of health watches.
    pub(super) watches: Arc<CallLimit>,
    /// The background task that ended first. It stops the server.
    pub(super) task_ended: OnceLock<&'static str>,
    /// When the server began to stop.
    pub(super) stopping: OnceLock<SystemTime>,
}

// === impl Connections ===

impl Connections {
    pub(super) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, began: Instant::now(), open: Mutex::default() })
    }

    /// How many may be open.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// How many are open.
    pub(super) fn count(&self) -> usize {
        self.lock().by_id.len()
    }

    /// The calls in flight.
    pub(super) fn calls(&self) -> usize {
        self.lock().by_id.values().map(|state| state.calls.load(Ordering::Relaxed)).sum()
    }

    /// Admits a new connection, if need be by evicting another. `None` if no connection may be evicted.
    pub(super) fn admit(self: &Arc<Self>, peer: Peer) -> Option<Admitted> {
        let mut open = self.lock();
        let mut evicted = None;
        if open.by_id.len() >= self.limit {
            let id = self.least_needed(&open)?;
            evicted = open.by_id.remove(&id);
            evicted.iter().for_each(|state| state.eviction.notify_one());
        }
        let id = open.next_id;
        open.next_id += 1;
        let state = Arc::new(ConnectionState {
            began: self.began,
            peer,
            last_used: AtomicU64::new(since(self.began)),
            calls: AtomicUsize::new(0),
            handshake_done: AtomicBool::new(false),
            known: AtomicBool::new(false),
            eviction: Notify::new(),
            closed: Notify::new(),
        });
        open.by_id.insert(id, Arc::clone(&state));
        Some(Admitted { place: Place { connections: Arc::clone(self), id, state }, evicted })
    }

    /// The connection that is needed least, if any may be evicted. Only called when the limit is reached.
    fn least_needed(&self, open: &Open) -> Option<u64> {
        let now = since(self.began);
        let rank = |state: &ConnectionState| {
            let last_used = state.last_used.load(Ordering::Relaxed);
            let idle = state.calls.load(Ordering::Relaxed) == 0;
            let rank = match (state.known.load(Ordering::Relaxed), state.handshake_done.load(Ordering::Relaxed)) {
                (false, false) => 0,
                (false, true) if idle => 1,
                (false, true) => 2,
                (true, _) if idle && now.saturating_sub(last_used) >= millis(KNOWN_CALLER_MIN_IDLE) => 3,
                (true, _) => return None,
            };
            Some((rank, last_used))
        };
        let ranked = open.by_id.iter().filter_map(|(id, state)| Some((rank(state)?, *id)));
        ranked.min().map(|(_, id)| id)
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        // A panic cannot leave the map inconsistent: each change is one call.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.lock().by_id.remove(&self.id);
        self.state.closed.notify_one();
    }
}

/// The peers of these listeners that have the most open connections, and how many those are.
pub(super) fn top_peers<'c>(listeners: impl IntoIterator<Item = &'c Arc<Connections>>) -> Vec<(String, usize)> {
    // Only the addresses are copied under the lock.
    let peers = listeners.into_iter().flat_map(|connections| {
        let open = connections.lock();
        open.by_id.values().map(|state| state.peer).collect::<Vec<_>>()
    });
    let mut counts: HashMap<String, usize> = HashMap::new();
    peers.for_each(|peer| *counts.entry(peer.to_string()).or_default() += 1);
    let mut counts: Vec<(String, usize)> = counts.into_iter().collect();
    counts.sort_unstable_by(|(one, few), (other, many)| many.cmp(few).then_with(|| one.cmp(other)));
    counts.truncate(TOP_PEERS);
    counts
}

// === impl ConnectionCounts ===

impl ConnectionCounts {
    /// The calls in flight on all listeners.
    pub(super) fn calls_in_flight(&self) -> usize {
        self.open.iter().map(|connections| connections.calls()).sum()
    }

    /// Counts for these listeners.
    pub(super) fn of(open: impl Iterator<Item = Arc<Connections>>, limits: &Limits) -> Self {
        Self {
            open: open.collect(),
            unknown_calls: CallLimit::new("limits.unknown_calls", limits.unknown_calls),
            watches: CallLimit::new("limits.watches", limits.watches),
            ..Self::default()
        }
    }
}

impl Collect for ConnectionCounts {
    fn collect(&self, page: &mut Page) {
        let open: usize = self.open.iter().map(|connections| connections.count()).sum();
        page.gauge("byokgate_connections_open", "Open gRPC connections").add(&[], open);
        page.counter("byokgate_connections", "Accepted gRPC connections").add(&[], &self.accepted);
        page.counter(
            "byokgate_connections_made_room",
            "Idle connections, or connections of unknown callers, that were closed to make room for others",
        )
        .add(&[], &self.evicted);
        let mut refused = page.counter("byokgate_connections_refused", "gRPC connections that ended before a call");
        refused.add(&[("reason", "limit")], &self.refused);
        refused.add(&[("reason", "handshake")], &self.handshake_failed);
        self.refusals.collect(page);
        if let Some(task) = self.task_ended.get() {
            page.counter("byokgate_background_tasks_ended", "Background tasks that ended, which stops the server")
                .add(&[("task", task)], 1_u64);
        }
    }
}

// === impl ConnectionState ===

impl ConnectionState {
    /// Marks the handshake as done.
    pub(super) fn set_handshake_done(&self) {
        self.handshake_done.store(true, Ordering::Relaxed);
    }

    /// Marks the connection as used by a known caller.
    pub(super) fn set_known(&self) {
        self.known.store(true, Ordering::Relaxed);
    }

    /// Counts a call that begins.
    pub(super) fn begin_call(self: &Arc<Self>) -> CallGuard {
        self.calls.fetch_add(1, Ordering::Relaxed);
        CallGuard(Arc::clone(self))
    }

    /// Waits until the connection has had no call for this long.
    pub(super) async fn idle(&self, limit: Duration) {
        loop {
            let used = self.began + Duration::from_millis(self.last_used.load(Ordering::Relaxed));
            let ends = if self.calls.load(Ordering::Relaxed) == 0 { used + limit } else { Instant::now() + limit };
            if ends <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(ends).await;
        }
    }

    /// Waits until the connection is evicted.
    pub(super) async fn evicted(&self) {
        self.eviction.notified().await;
    }

    /// Waits until the connection is closed.
    pub(super) async fn closed(&self) {
        self.closed.notified().await;
    }
}

impl Drop for CallGuard {
    fn drop(&mut self) {
        self.0.last_used.store(since(self.0.began), Ordering::Relaxed);
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

fn since(began: Instant) -> u64 {
    millis(began.elapsed())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    async fn is_evicted(place: &Place) -> bool {
        tokio::time::timeout(Duration::ZERO, place.state.evicted()).await.is_ok()
    }

    fn peer(number: u8) -> Peer {
        Peer::Tcp(([192, 0, 2, number], 1).into())
    }

    #[tokio::test(start_paused = true)]
    async fn those_with_the_most_connections_are_named() {
        let (one, other) = (Connections::new(100), Connections::new(100));
        let mut open = Vec::new();
        for number in [1, 2, 2, 3, 3, 3, 4, 4, 4, 4] {
            open.extend([one.admit(peer(number)), other.admit(peer(number))]);
        }
        let expect = [("192.0.2.4".to_owned(), 8), ("192.0.2.3".to_owned(), 6), ("192.0.2.2".to_owned(), 4)];
        assert_eq!(top_peers([&one, &other]), expect);
        drop(open);
        assert_eq!(top_peers([&one, &other]), []);
    }

    #[tokio::test(start_paused = true)]
    async fn the_connection_needed_least_is_evicted_and_one_in_use_never() {
        let connections = Connections::new(4);
        let admit = || connections.admit(peer(1)).map(|admitted| admitted.place);
        let (silent, idle, asking, known) = (admit().unwrap(), admit().unwrap(), admit().unwrap(), admit().unwrap());
        for place in [&idle, &asking, &known] {
            place.state.set_handshake_done();
        }
        let _unfinished = asking.state.begin_call();
        known.state.set_known();
        let in_use = known.state.begin_call();
        let mut newer = Vec::new();
        for (place, what) in [(&silent, "no handshake"), (&idle, "no call"), (&asking, "a call of nobody's")] {
            advance(Duration::from_secs(60)).await;
            let new = admit().unwrap_or_else(|| panic!("{what}"));
            new.state.set_handshake_done();
            new.state.set_known();
            assert!(is_evicted(place).await && !is_evicted(&known).await, "{what}");
            newer.push((new.state.begin_call(), new));
        }
        assert!(admit().is_none(), "everybody is known and at work");
        drop(in_use);
        assert!(admit().is_none(), "a known caller's pause is no idleness");
        advance(KNOWN_CALLER_MIN_IDLE).await;
        assert!(admit().is_some() && is_evicted(&known).await);
        assert_eq!(connections.count(), 3, "places go with their connections");
    }

    #[tokio::test(start_paused = true)]
    async fn idle_is_counted_from_the_end_of_the_last_call() {
        let connections = Connections::new(1);
        let place = connections.admit(peer(1)).unwrap().place;
        let limit = Duration::from_secs(10);
        let began = Instant::now();
        let call = place.state.begin_call();
        let waiting = tokio::spawn({
            let state = Arc::clone(&place.state);
            async move { state.idle(limit).await }
        });
        advance(Duration::from_secs(15)).await;
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(call);
        waiting.await.unwrap();
        assert!((25..=31).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
    }
}
