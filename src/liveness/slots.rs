//! The slots of one provider, shared fairly by organizations. A free slot goes to the one that has the fewest, and the last free slot only to one that
//! has none. So an organization whose probes hang, for instance because its own model does, cannot take all of them.
//!
//! Written by hand: a semaphore gives its permits in the order of arrival, whoever has how many.

use std::{
    collections::{BTreeMap, HashMap},
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::oneshot;

/// An organization, as a keyed hash; without one, a credential.
pub(super) type Source = [u8; 32];

/// The slots, who has them, and who waits for one.
#[derive(Debug)]
pub(super) struct FairSlots(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    free: usize,
    /// How many slots each source has. Those without one are not here.
    taken: HashMap<Source, usize>,
    /// Who waits, in the order of arrival. Sources that do not wait are not here.
    waiting: HashMap<Source, BTreeMap<u64, oneshot::Sender<()>>>,
    next_number: u64,
}

/// A slot. Dropping it frees it.
#[derive(Debug)]
pub(super) struct Slot<'s> {
    slots: &'s FairSlots,
    source: Source,
}

/// A place in the queue. Dropping it leaves the queue, or frees the slot that nobody took.
struct Waiter<'s> {
    slots: &'s FairSlots,
    source: Source,
    number: u64,
    taken: bool,
}

// === impl FairSlots ===

impl FairSlots {
    pub(super) fn new(free: usize) -> Self {
        Self(Mutex::new(State { free, ..State::default() }))
    }

    /// Waits for a slot.
    pub(super) async fn acquire(&self, source: Source) -> Slot<'_> {
        let (mut waiter, granted) = {
            let mut state = self.lock();
            if state.may_take(&source) {
                state.take(source);
                return Slot { slots: self, source };
            }
            let number = state.next_number;
            state.next_number += 1;
            let (sender, granted) = oneshot::channel();
            state.waiting.entry(source).or_default().insert(number, sender);
            (Waiter { slots: self, source, number, taken: false }, granted)
        };
        // The sender is dropped only after it sent, or with the waiter.
        drop(granted.await);
        waiter.taken = true;
        Slot { slots: self, source }
    }

    /// How many are before a probe of this source that comes now. Of another source, those that get their turn before it has had its own.
    pub(super) fn ahead_of(&self, source: &Source) -> usize {
        let state = self.lock();
        let own = state.waiting.get(source).map_or(0, BTreeMap::len);
        let others = state.waiting.iter().filter(|(other, _)| *other != source);
        own + others.map(|(_, waiting)| waiting.len().min(own + 1)).sum::<usize>()
    }

    /// How many slots this source could take now.
    pub(super) fn free_for(&self, source: &Source) -> usize {
        let state = self.lock();
        state.free.saturating_sub(usize::from(state.taken.contains_key(source)))
    }

    pub(super) fn free(&self) -> usize {
        self.lock().free
    }

    /// Adds slots.
    pub(super) fn add(&self, number: usize) {
        let mut state = self.lock();
        state.free += number;
        state.grant();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl State ===

impl State {
    fn may_take(&self, source: &Source) -> bool {
        self.free > usize::from(self.taken.contains_key(source))
    }

    fn take(&mut self, source: Source) {
        self.free -= 1;
        *self.taken.entry(source).or_default() += 1;
    }

    fn give_back(&mut self, source: &Source) {
        if let Some(taken) = self.taken.get_mut(source) {
            *taken -= 1;
            if *taken == 0 {
                self.taken.remove(source);
            }
        }
    }

    /// Gives the free slots to those that wait: the source with the fewest first, of several the one that has waited longest.
    fn grant(&mut self) {
        loop {
            let heads = self.waiting.iter().filter_map(|(source, waiting)| {
                let (number, _) = waiting.first_key_value()?;
                Some((self.taken.get(source).copied().unwrap_or_default(), *number, *source))
            });
            let Some((_, _, source)) = heads.min() else { return };
            if !self.may_take(&source) {
                return;
            }
            let granted = self.waiting.get_mut(&source).and_then(BTreeMap::pop_first);
            if self.waiting.get(&source).is_some_and(BTreeMap::is_empty) {
                self.waiting.remove(&source);
            }
            self.take(source);
            // A waiter that leaves at this moment finds that it is not in the queue, and frees the slot.
            granted.map(|(_, sender)| sender.send(()));
        }
    }
}

// === impl Slot ===

impl Slot<'_> {
    /// Removes this slot for good.
    pub(super) fn forget(self) {
        self.slots.lock().give_back(&self.source);
        mem::forget(self);
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let mut state = self.slots.lock();
        state.give_back(&self.source);
        state.free += 1;
        state.grant();
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let mut state = self.slots.lock();
        let waiting = state.waiting.get_mut(&self.source);
        let was_waiting = waiting.is_some_and(|waiting| waiting.remove(&self.number).is_some());
        if state.waiting.get(&self.source).is_some_and(BTreeMap::is_empty) {
            state.waiting.remove(&self.source);
        }
        if !was_waiting {
            state.give_back(&self.source);
            state.free += 1;
            state.grant();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::Future,
        pin::pin,
        task::{Context, Poll, Waker},
    };

    use super::*;

    const ONE: Source = [1; 32];
    const TWO: Source = [2; 32];

    fn poll<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
        match std::pin::Pin::new(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        }
    }

    #[test]
    fn the_last_slot_is_for_a_source_that_has_none() {
        let slots = FairSlots::new(3);
        let taken: Vec<_> = (0..2).map(|_| poll(&mut pin!(slots.acquire(ONE))).unwrap()).collect();
        let mut third = Box::pin(slots.acquire(ONE));
        assert!(poll(&mut third).is_none());
        assert_eq!((slots.free_for(&ONE), slots.free_for(&TWO)), (0, 1));
        let other = poll(&mut pin!(slots.acquire(TWO))).unwrap();
        // It comes back, and still is not for the first.
        drop(other);
        assert!(poll(&mut third).is_none());
        drop(taken);
        assert!(poll(&mut third).is_some());
        assert_eq!(slots.free(), 3);
    }

    #[test]
    fn a_slot_goes_to_the_source_that_has_the_fewest_and_then_in_order() {
        let slots = FairSlots::new(2);
        let (one, two) = (poll(&mut pin!(slots.acquire(ONE))).unwrap(), poll(&mut pin!(slots.acquire(TWO))).unwrap());
        let mut waiting: Vec<_> = [ONE, ONE, ONE, [3; 32], TWO].map(|source| Box::pin(slots.acquire(source))).into();
        waiting.iter_mut().for_each(|waiter| assert!(poll(waiter).is_none()));
        assert_eq!([ONE, TWO, [3; 32], [4; 32]].map(|source| slots.ahead_of(&source)), [5, 4, 4, 3]);
        drop(one);
        // The first and the third have none now. The first has waited longer.
        let first = poll(&mut waiting[0]).unwrap();
        drop(two);
        // The first has one again.
        let third = poll(&mut waiting[3]).unwrap();
        assert!(poll(&mut waiting[1]).is_none());
        drop(third);
        let second = poll(&mut waiting[4]).unwrap();
        drop((first, second));
        // Alone again, it may not have the last one.
        let _next = poll(&mut waiting[1]).unwrap();
        assert!(poll(&mut waiting[2]).is_none());
        assert_eq!(slots.free(), 1);
    }

    #[test]
    fn who_leaves_takes_no_slot_along() {
        let slots = FairSlots::new(1);
        let taken = poll(&mut pin!(slots.acquire(ONE))).unwrap();
        let (mut leaves, mut granted) = (Box::pin(slots.acquire(ONE)), Box::pin(slots.acquire(TWO)));
        assert!(poll(&mut leaves).is_none() && poll(&mut granted).is_none());
        drop(leaves);
        drop(taken);
        // It has a slot, and goes before it looks.
        assert_eq!(slots.free(), 0);
        drop(granted);
        assert_eq!(slots.free(), 1);
        poll(&mut pin!(slots.acquire(ONE))).unwrap().forget();
        assert_eq!(slots.free(), 0);
        let mut waits = Box::pin(slots.acquire(TWO));
        assert!(poll(&mut waits).is_none());
        slots.add(1);
        assert!(poll(&mut waits).is_some());
        let state = slots.lock();
        assert!(state.taken.is_empty() && state.waiting.is_empty() && state.free == 1);
    }
}
