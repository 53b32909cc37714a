//! Single flight: one run of a piece of work per key, however many wait for it, detached from every one of them.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{sync::watch, time::Instant};

use crate::{core::engine::Begun, telemetry::metrics::Counter};

/// The work under way, by key.
#[derive(Debug)]
pub(crate) struct Flights<K, V> {
    under_way: Mutex<HashMap<K, Flight<V>>>,
    limit: usize,
    lost: Counter,
}

/// One piece of work under way.
#[derive(Debug, Clone)]
pub(crate) struct Flight<V> {
    result: watch::Receiver<Option<V>>,
    begun: Begun,
}

/// What a caller that would be the first does.
#[derive(Debug)]
pub(crate) enum Launch<V, R, F> {
    /// Nothing: the value is there.
    Already(V),
    /// Nothing: it may not.
    Withheld(R),
    /// This work.
    Fly(F),
}

/// What came of joining.
#[derive(Debug)]
pub(crate) enum Joined<V, R> {
    /// There was no need to fly.
    Already(V),
    /// It may not.
    Withheld(R),
    /// Wait for this.
    Flight(Flight<V>),
    /// As many are under way as may be.
    Full,
}

/// What came of waiting.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Landing<V> {
    /// The result.
    Landed(V),
    /// It did not come by the waiter's own deadline. The flight goes on.
    TimedOut {
        /// It had come to the point where it asks somebody else.
        begun: bool,
    },
    /// The flight ended without a result: it panicked.
    Lost,
}

// === impl Flights ===

impl<K, V> Flights<K, V>
where
    K: Eq + Hash + Copy + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// At most `limit` keys at a time.
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { under_way: Mutex::new(HashMap::new()), limit, lost: Counter::new() })
    }

    /// Joins the flight of this key, or launches it. `launch` runs under the lock: a flight that has landed since the caller
    /// last looked is then seen, and no second one starts.
    ///
    /// The work must store what it found before it returns, must bound its own time, and runs to its end whoever waits.
    pub(crate) fn join<R, F>(self: &Arc<Self>, key: K, launch: impl FnOnce(Begun) -> Launch<V, R, F>) -> Joined<V, R>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let mut under_way = self.lock();
        if let Some(flight) = under_way.get(&key) {
            return Joined::Flight(flight.clone());
        }
        if under_way.len() >= self.limit {
            return Joined::Full;
        }
        let begun = Begun::default();
        let work = match launch(begun.clone()) {
            Launch::Already(value) => return Joined::Already(value),
            Launch::Withheld(reason) => return Joined::Withheld(reason),
            Launch::Fly(work) => work,
        };
        let (landed, result) = watch::channel(None);
        let flight = Flight { result, begun };
        under_way.insert(key, flight.clone());
        drop(under_way);
        let slot = Slot { flights: Arc::clone(self), key };
        tokio::spawn(async move {
            // Frees the key when the work ends in any way, a panic included; waiters then see the sender gone.
            let slot = slot;
            let value = work.await;
            landed.send_replace(Some(value));
            drop(slot);
        });
        Joined::Flight(flight)
    }

    /// How many have panicked.
    pub(crate) fn lost(&self) -> &Counter {
        &self.lost
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, Flight<V>>> {
        // A panic elsewhere cannot leave the map half-changed: every change to it is one call.
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for a flight until the deadline.
pub(crate) async fn wait<V: Clone>(flight: Flight<V>, deadline: Instant) -> Landing<V> {
    let Flight { mut result, begun } = flight;
    match tokio::time::timeout_at(deadline, result.wait_for(Option::is_some)).await {
        Ok(Ok(value)) => value.clone().map_or(Landing::Lost, Landing::Landed),
        Ok(Err(_)) => Landing::Lost,
        Err(_) => Landing::TimedOut { begun: begun.is_so() },
    }
}

/// A key's place in the map.
struct Slot<K, V>
where
    K: Eq + Hash + Copy + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    flights: Arc<Flights<K, V>>,
    key: K,
}

impl<K, V> Drop for Slot<K, V>
where
    K: Eq + Hash + Copy + Send + 'static,
    V: Clone + Send + Sync + 'static,
{
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.flights.lost.one();
        }
        self.flights.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, time::Duration};

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(1)
    }

    fn fly<F: Future<Output = u8>>(work: F) -> impl FnOnce(Begun) -> Launch<u8, Infallible, F> {
        |_| Launch::Fly(work)
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_releases_every_waiter_and_the_key() {
        let flights = Flights::<u8, u8>::new(1);
        let mut waiters = Vec::new();
        for _ in 0..3 {
            let Joined::Flight(flight) = flights.join(1, fly(async { panic!("made to") })) else { panic!("not full") };
            waiters.push(flight);
        }
        for waiter in waiters {
            assert_eq!(wait(waiter, soon()).await, Landing::Lost);
        }
        assert_eq!(flights.lost().get(), 1);
        let Joined::Flight(flight) = flights.join(1, fly(async { 7 })) else { panic!("the key was not freed") };
        assert_eq!(wait(flight, soon()).await, Landing::Landed(7));
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiter_that_leaves_does_not_end_the_flight() {
        let flights = Flights::<u8, u8>::new(1);
        let work = |begun: Begun| {
            Launch::<_, Infallible, _>::Fly(async move {
                tokio::time::sleep(Duration::from_secs(2)).await;
                begun.now();
                tokio::time::sleep(Duration::from_secs(2)).await;
                9
            })
        };
        let Joined::Flight(flight) = flights.join(1, work) else { panic!("not full") };
        assert_eq!(wait(flight, soon()).await, Landing::TimedOut { begun: false });
        let Joined::Flight(flight) = flights.join(1, fly(async { 0 })) else { panic!("not under way") };
        assert_eq!(wait(flight.clone(), Instant::now() + Duration::from_secs(2)).await, Landing::TimedOut { begun: true });
        assert_eq!(wait(flight, Instant::now() + Duration::from_secs(2)).await, Landing::Landed(9));
    }

    #[tokio::test(start_paused = true)]
    async fn the_limit_holds_and_what_is_there_or_withheld_does_not_fly() {
        let flights = Flights::<u8, u8>::new(1);
        let nothing = |launch: Launch<u8, &'static str, std::future::Pending<u8>>| |_: Begun| launch;
        assert!(matches!(flights.join(2, nothing(Launch::Already(4))), Joined::Already(4)));
        assert!(matches!(flights.join(2, nothing(Launch::Withheld("no"))), Joined::Withheld("no")));
        assert!(matches!(flights.join(1, fly(std::future::pending())), Joined::Flight(_)));
        assert!(matches!(flights.join(2, fly(async { 0 })), Joined::Full));
    }
}
