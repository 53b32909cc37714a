//! Single flight: one piece of work runs per key, however many callers wait for it. It runs detached from all of them.
//!
//! Written by hand. In moka's own single flight the first caller does the work, and the work ends when that caller leaves. Here it outlives all
//! callers, waits in a queue, and is started again if a caller wants a younger answer.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{sync::watch, time::Instant};

use crate::{core::engine::ProbeStarted, telemetry::metrics::Counter};

/// The work in flight, by key.
#[derive(Debug)]
pub(crate) struct SingleFlight<K, V> {
    under_way: Mutex<UnderWay<K, V>>,
    limit: usize,
    group_limit: usize,
    lost: Counter,
}

/// The work in flight, and how many flights each group has.
#[derive(Debug)]
struct UnderWay<K, V> {
    by_key: HashMap<K, InFlight<V>>,
    by_group: HashMap<K, usize>,
}

/// One piece of work in flight.
#[derive(Debug, Clone)]
pub(crate) struct InFlight<V> {
    result: watch::Receiver<Option<V>>,
    started: ProbeStarted,
}

/// What the first caller of a key does.
#[derive(Debug)]
pub(crate) enum Start<V, R, F> {
    /// Nothing: the value is known already.
    Known(V),
    /// Nothing: the work is not allowed.
    Rejected(R),
    /// It runs this work.
    Run(F),
}

/// The result of joining.
#[derive(Debug)]
pub(crate) enum Join<V, R> {
    /// The value is known, and no work was started.
    Known(V),
    /// The work is not allowed.
    Rejected(R),
    /// The flight to wait for.
    InFlight(InFlight<V>),
    /// The limit of flights is reached.
    Full,
}

/// The result of waiting.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FlightEnd<V> {
    /// The value.
    Completed(V),
    /// The waiter's deadline passed. The flight goes on.
    TimedOut {
        /// Whether the probe had started.
        started: bool,
        /// When its answer was expected, if that is known.
        answer_at: Option<Instant>,
    },
    /// The flight panicked, and there is no value.
    Lost,
}

// === impl SingleFlight ===

impl<K, V> SingleFlight<K, V>
where
    K: Eq + Hash + Copy + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Allows `limit` flights at a time, and `group_limit` of one group.
    pub(crate) fn new(limit: usize, group_limit: usize) -> Arc<Self> {
        let under_way = UnderWay { by_key: HashMap::new(), by_group: HashMap::new() };
        Arc::new(Self { under_way: Mutex::new(under_way), limit, group_limit, lost: Counter::new() })
    }

    /// Joins the flight of this key, or starts one. `launch` runs under the lock, so that it sees what a flight stored that ended since the
    /// caller's own lookup, and no second flight starts.
    ///
    /// The work must store its value before it returns, and must limit its own time. It runs to its end even if no caller waits any more.
    pub(crate) fn join<R, F>(
        self: &Arc<Self>,
        group: K,
        key: K,
        launch: impl FnOnce(ProbeStarted) -> Start<V, R, F>,
    ) -> Join<V, R>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let mut under_way = self.lock();
        if let Some(flight) = under_way.by_key.get(&key) {
            return Join::InFlight(flight.clone());
        }
        let of_group = under_way.by_group.get(&group).copied().unwrap_or(0);
        if under_way.by_key.len() >= self.limit || of_group >= self.group_limit {
            return Join::Full;
        }
        let started = ProbeStarted::default();
        let work = match launch(started.clone()) {
            Start::Known(value) => return Join::Known(value),
            Start::Rejected(reason) => return Join::Rejected(reason),
            Start::Run(work) => work,
        };
        let (fetched, result) = watch::channel(None);
        let flight = InFlight { result, started };
        under_way.by_key.insert(key, flight.clone());
        under_way.by_group.insert(group, of_group + 1);
        drop(under_way);
        let guard = FlightGuard { flights: Arc::clone(self), group, key };
        tokio::spawn(async move {
            // Frees the key however the work ends. After a panic, the waiters see that the sender is closed.
            let guard = guard;
            let value = work.await;
            fetched.send_replace(Some(value));
            drop(guard);
        });
        Join::InFlight(flight)
    }

    /// How many flights panicked.
    pub(crate) fn lost(&self) -> &Counter {
        &self.lost
    }

    fn lock(&self) -> MutexGuard<'_, UnderWay<K, V>> {
        // A panic elsewhere cannot leave the maps inconsistent: every change is one call.
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for a flight until the deadline.
pub(crate) async fn wait<V: Clone>(flight: InFlight<V>, deadline: Instant) -> FlightEnd<V> {
    let InFlight { mut result, started } = flight;
    match tokio::time::timeout_at(deadline, result.wait_for(Option::is_some)).await {
        Ok(Ok(value)) => value.clone().map_or(FlightEnd::Lost, FlightEnd::Completed),
        Ok(Err(_)) => FlightEnd::Lost,
        Err(_) => FlightEnd::TimedOut { started: started.is_set(), answer_at: started.answer_at() },
    }
}

/// Frees the key when it is dropped.
struct FlightGuard<K, V>
where
    K: Eq + Hash + Copy + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    flights: Arc<SingleFlight<K, V>>,
    group: K,
    key: K,
}

impl<K, V> Drop for FlightGuard<K, V>
where
    K: Eq + Hash + Copy + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.flights.lost.inc();
        }
        let mut under_way = self.flights.lock();
        under_way.by_key.remove(&self.key);
        match under_way.by_group.get_mut(&self.group) {
            Some(count) if *count > 1 => *count -= 1,
            Some(_) | None => drop(under_way.by_group.remove(&self.group)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::atomic::{AtomicU32, Ordering},
        thread,
        time::Duration,
    };

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(1)
    }

    fn fly<F: Future<Output = u8>>(work: F) -> impl FnOnce(ProbeStarted) -> Start<u8, Infallible, F> {
        |_| Start::Run(work)
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_releases_every_waiter_and_the_key() {
        let flights = SingleFlight::<u8, u8>::new(1, 1);
        let mut waiters = Vec::new();
        for _ in 0..3 {
            let Join::InFlight(flight) = flights.join(0, 1, fly(async { panic!("made to") })) else { panic!("not full") };
            waiters.push(flight);
        }
        for waiter in waiters {
            assert_eq!(wait(waiter, soon()).await, FlightEnd::Lost);
        }
        assert_eq!(flights.lost().get(), 1);
        let Join::InFlight(flight) = flights.join(0, 1, fly(async { 7 })) else { panic!("the key was not freed") };
        assert_eq!(wait(flight, soon()).await, FlightEnd::Completed(7));
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiter_that_leaves_does_not_end_the_flight() {
        let flights = SingleFlight::<u8, u8>::new(1, 1);
        let work = |started: ProbeStarted| {
            Start::<_, Infallible, _>::Run(async move {
                started.expect_answer_at(Instant::now() + Duration::from_secs(4));
                tokio::time::sleep(Duration::from_secs(2)).await;
                started.set();
                tokio::time::sleep(Duration::from_secs(2)).await;
                9
            })
        };
        let Join::InFlight(flight) = flights.join(0, 1, work) else { panic!("not full") };
        let answer_at = Some(Instant::now() + Duration::from_secs(4));
        assert_eq!(wait(flight, soon()).await, FlightEnd::TimedOut { started: false, answer_at });
        let Join::InFlight(flight) = flights.join(0, 1, fly(async { 0 })) else { panic!("not under way") };
        let later = Instant::now() + Duration::from_secs(2);
        assert_eq!(wait(flight.clone(), later).await, FlightEnd::TimedOut { started: true, answer_at });
        assert_eq!(wait(flight, Instant::now() + Duration::from_secs(2)).await, FlightEnd::Completed(9));
    }

    #[tokio::test(start_paused = true)]
    async fn one_group_has_its_share_and_gives_it_back() {
        let flights = SingleFlight::<u8, u8>::new(4, 2);
        let held = || {
            fly(async {
                tokio::time::sleep(Duration::from_secs(1)).await;
                0
            })
        };
        let mut of_one = Vec::new();
        for key in [1, 2] {
            let Join::InFlight(flight) = flights.join(7, key, held()) else { panic!("not full") };
            of_one.push(flight);
        }
        assert!(matches!(flights.join(7, 3, held()), Join::Full));
        assert!(matches!(flights.join(8, 3, held()), Join::InFlight(_)), "another group has places");
        for flight in of_one {
            assert_eq!(wait(flight, soon() + Duration::from_secs(1)).await, FlightEnd::Completed(0));
        }
        tokio::task::yield_now().await;
        assert!(matches!(flights.join(7, 4, held()), Join::InFlight(_)));
    }

    /// Callers on several threads that meet a flight as it begins and as it ends: never two at once for a key, and nobody is left waiting.
    /// `tests/miri/run` runs it in many orders.
    #[test]
    fn threads_that_meet_share_one_flight_at_a_time() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_time().build().unwrap();
        let flights = SingleFlight::<u8, u32>::new(1, 1);
        let (under_way, flown) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let caller = || {
            let (flights, under_way, flown) = (Arc::clone(&flights), Arc::clone(&under_way), Arc::clone(&flown));
            let runtime = runtime.handle().clone();
            thread::spawn(move || {
                let _entered = runtime.enter();
                let mut seen = 0;
                for _ in 0..4 {
                    let (under_way, flown) = (Arc::clone(&under_way), Arc::clone(&flown));
                    let work = async move {
                        assert_eq!(under_way.fetch_add(1, Ordering::Relaxed), 0, "two flights of one key at once");
                        tokio::task::yield_now().await;
                        let flight = flown.fetch_add(1, Ordering::Relaxed) + 1;
                        under_way.fetch_sub(1, Ordering::Relaxed);
                        flight
                    };
                    let joined = flights.join(0, 1, |_| Start::<_, Infallible, _>::Run(work));
                    let Join::InFlight(flight) = joined else { panic!("a key's own flight takes the only place") };
                    let far = Instant::now() + Duration::from_secs(3600);
                    let FlightEnd::Completed(flight) = runtime.block_on(wait(flight, far)) else { panic!("a flight was lost") };
                    assert!(flight >= seen, "an older flight's result after a younger one's");
                    seen = flight;
                }
            })
        };
        let callers: Vec<_> = (0..3).map(|_| caller()).collect();
        callers.into_iter().for_each(|caller| caller.join().unwrap());
        assert!((1..=12).contains(&flown.load(Ordering::Relaxed)));
        runtime.shutdown_timeout(Duration::from_secs(3600));
        assert!(flights.lock().by_key.is_empty() && flights.lock().by_group.is_empty());
        assert_eq!(flights.lost().get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_limit_holds_and_known_or_rejected_values_start_no_flight() {
        let flights = SingleFlight::<u8, u8>::new(1, 1);
        let nothing = |launch: Start<u8, &'static str, std::future::Pending<u8>>| |_: ProbeStarted| launch;
        assert!(matches!(flights.join(0, 2, nothing(Start::Known(4))), Join::Known(4)));
        assert!(matches!(flights.join(0, 2, nothing(Start::Rejected("no"))), Join::Rejected("no")));
        assert!(matches!(flights.join(0, 1, fly(std::future::pending())), Join::InFlight(_)));
        assert!(matches!(flights.join(0, 2, fly(async { 0 })), Join::Full));
    }
}
