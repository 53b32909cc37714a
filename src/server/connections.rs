//! The open connections of one listener: so many, and when there are as many as may be, which of them makes room. Whoever has not said who
//! it is goes first, the longest without a call before the others; a connection of a known caller that is in use is never closed for another.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use super::{call_limit::CallLimit, refused::Refusals};
use crate::{
    grpc::limits::Limits,
    telemetry::metrics::{Collect, Counter, Page},
};

/// A known caller's connection may make room only after so long without a call.
const KNOWN_IDLE: Duration = Duration::from_secs(10);

/// The connections that are open.
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

/// What is known of one connection.
pub(super) struct ConnectionState {
    began: Instant,
    /// Milliseconds from then to the last time that a call began or ended.
    last_used: AtomicU64,
    calls: AtomicUsize,
    /// Its handshake is over.
    speaks: AtomicBool,
    /// A caller that is known has made a call.
    known: AtomicBool,
    make_room: Notify,
    gone: Notify,
}

/// A connection that has come in.
pub(super) struct Entered {
    pub(super) place: Place,
    /// The one that had to go for it.
    pub(super) made_room: Option<Arc<ConnectionState>>,
}

/// A connection's place. Dropped with the connection.
pub(super) struct Place {
    connections: Arc<Connections>,
    id: u64,
    pub(super) state: Arc<ConnectionState>,
}

/// A call under way.
pub(super) struct Using(Arc<ConnectionState>);

/// Numbers about connections, and about what takes them.
#[derive(Default)]
pub(super) struct ConnectionCounts {
    /// Each listener's.
    pub(super) open: Vec<Arc<Connections>>,
    pub(super) taken: Counter,
    pub(super) made_room: Counter,
    pub(super) refused: Counter,
    /// Connections that never came to HTTP/2 by their own fault or ours.
    pub(super) failed: Counter,
    /// Why.
    pub(super) refusals: Refusals,
    /// Calls of callers that nobody knows.
    pub(super) unknown_calls: Arc<CallLimit>,
    /// Health watches.
    pub(super) watches: Arc<CallLimit>,
    /// Work in the background that ended.
    pub(super) task_ended: OnceLock<&'static str>,
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

    /// A place for a new connection. `None`: every one is in use by a caller that is known.
    pub(super) fn enter(self: &Arc<Self>) -> Option<Entered> {
        let mut open = self.lock();
        let mut made_room = None;
        if open.by_id.len() >= self.limit {
            let id = self.least_needed(&open)?;
            made_room = open.by_id.remove(&id);
            made_room.iter().for_each(|state| state.make_room.notify_one());
        }
        let id = open.next_id;
        open.next_id += 1;
        let state = Arc::new(ConnectionState {
            began: self.began,
            last_used: AtomicU64::new(since(self.began)),
            calls: AtomicUsize::new(0),
            speaks: AtomicBool::new(false),
            known: AtomicBool::new(false),
            make_room: Notify::new(),
            gone: Notify::new(),
        });
        open.by_id.insert(id, Arc::clone(&state));
        Some(Entered { place: Place { connections: Arc::clone(self), id, state }, made_room })
    }

    /// The connection that is missed least, if any may go. Looked for only when there is no room.
    fn least_needed(&self, open: &Open) -> Option<u64> {
        let now = since(self.began);
        let rank = |state: &ConnectionState| {
            let last_used = state.last_used.load(Ordering::Relaxed);
            let idle = state.calls.load(Ordering::Relaxed) == 0;
            let rank = match (state.known.load(Ordering::Relaxed), state.speaks.load(Ordering::Relaxed)) {
                (false, false) => 0,
                (false, true) if idle => 1,
                (false, true) => 2,
                (true, _) if idle && now.saturating_sub(last_used) >= millis(KNOWN_IDLE) => 3,
                (true, _) => return None,
            };
            Some((rank, last_used))
        };
        let ranked = open.by_id.iter().filter_map(|(id, state)| Some((rank(state)?, *id)));
        ranked.min().map(|(_, id)| id)
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        // No panic can leave it half-changed: each change is one call.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.lock().by_id.remove(&self.id);
        self.state.gone.notify_one();
    }
}

// === impl ConnectionCounts ===

impl ConnectionCounts {
    /// Of these, which have no connection yet.
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
        page.gauge("byokgate_connections_open", "Connections that are open").add(&[], open);
        page.counter("byokgate_connections", "Connections that were taken").add(&[], &self.taken);
        page.counter("byokgate_connections_made_room", "Connections that were closed to make room for others")
            .add(&[], &self.made_room);
        let mut refused = page.counter("byokgate_connections_refused", "Connections that came to no call");
        refused.add(&[("reason", "limit")], &self.refused);
        refused.add(&[("reason", "handshake")], &self.failed);
        self.refusals.collect(page);
        if let Some(task) = self.task_ended.get() {
            page.counter("byokgate_background_tasks_ended", "Work in the background that ended: the server is stopping")
                .add(&[("task", task)], 1_u64);
        }
    }
}

// === impl ConnectionState ===

impl ConnectionState {
    /// Its handshake is over.
    pub(super) fn set_handshake_done(&self) {
        self.speaks.store(true, Ordering::Relaxed);
    }

    /// A caller that is known has made a call.
    pub(super) fn set_known(&self) {
        self.known.store(true, Ordering::Relaxed);
    }

    /// A call begins.
    pub(super) fn begin_call(self: &Arc<Self>) -> Using {
        self.calls.fetch_add(1, Ordering::Relaxed);
        Using(Arc::clone(self))
    }

    /// Waits until it has been without a call for this long.
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

    /// Waits until it has to make room for another.
    pub(super) async fn told_to_make_room(&self) {
        self.make_room.notified().await;
    }
}

impl ConnectionState {
    /// Waits until it is closed.
    pub(super) async fn gone(&self) {
        self.gone.notified().await;
    }
}

impl Drop for Using {
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

    async fn makes_room(place: &Place) -> bool {
        tokio::time::timeout(Duration::ZERO, place.state.told_to_make_room()).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_known_least_makes_room_and_who_is_in_use_never() {
        let connections = Connections::new(4);
        let enter = || connections.enter().map(|entered| entered.place);
        let (silent, idle, asking, known) = (enter().unwrap(), enter().unwrap(), enter().unwrap(), enter().unwrap());
        for place in [&idle, &asking, &known] {
            place.state.set_handshake_done();
        }
        let _unfinished = asking.state.begin_call();
        known.state.set_known();
        let in_use = known.state.begin_call();
        let mut newer = Vec::new();
        for (place, what) in [(&silent, "no handshake"), (&idle, "no call"), (&asking, "a call of nobody's")] {
            advance(Duration::from_secs(60)).await;
            let new = enter().unwrap_or_else(|| panic!("{what}"));
            new.state.set_handshake_done();
            new.state.set_known();
            assert!(makes_room(place).await && !makes_room(&known).await, "{what}");
            newer.push((new.state.begin_call(), new));
        }
        assert!(enter().is_none(), "everybody is known and at work");
        drop(in_use);
        assert!(enter().is_none(), "a known caller's pause is no idleness");
        advance(KNOWN_IDLE).await;
        assert!(enter().is_some() && makes_room(&known).await);
        assert_eq!(connections.count(), 3, "places go with their connections");
    }

    #[tokio::test(start_paused = true)]
    async fn idle_is_counted_from_the_end_of_the_last_call() {
        let connections = Connections::new(1);
        let place = connections.enter().unwrap().place;
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
