//! What replicas of equal trust remember together, in Redis or Valkey: asked when this replica's memory has nothing, before the provider is.
//!
//! It spares calls and decides nothing. A fault of it means "as if there were none": the question goes to the provider at once, and after a few
//! faults in a row the tier is left alone for a time. All times are the store's own. Its lease guards what a call costs, and not that an
//! answer is right; so one server is enough, and what it loses is asked for again.

mod background;
mod faults;
mod keys;
mod place;
mod record;
mod store;

use std::{
    num::NonZeroU32,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use futures_util::StreamExt;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, sleep_until};

use self::{
    background::Background,
    keys::{Name, Names, News},
    place::Place,
    record::OpenBreaker,
    store::{Looked, State, Store, Unheard},
};
pub use self::{keys::TierKeys, store::Connect};
pub(crate) use self::{
    keys::{Allowance, Id, Model, Whose},
    record::Record,
};
use crate::{
    core::classify::Finding,
    domain::{duration, problem::Review, secret::Secret},
    liveness::breaker::{Opened, Shift},
    telemetry::metrics::{Collect, Counter, Page},
};

/// How often a lease is renewed: two renewals may be lost.
const RENEWAL: Duration = Duration::from_millis(300);
/// The longest that a lease is renewed, and waited for: longer than any question waits and is asked.
const MAX_HELD: Duration = Duration::from_secs(30);
/// How long who waits for another's answer looks away, at random: from a tenth of this to the whole of it at first, and later up to a part of what
/// it has waited, so that a crowd that waits long does not keep the store busy.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
const PART_OF_WAIT: u32 = 4;
/// However long that was: a holder that dies is found out.
const MAX_LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How often what is found may not do: it is old at first, and may be replaced by what is too old for this caller.
const MAX_FRUITLESS: u32 = 3;
/// How long who listens for refusals waits before it connects anew.
const RECONNECT: Duration = Duration::from_secs(5);
/// How many answers are on their way to the store at a time: more come only while it is slow, and are asked for again.
const MAX_STORING: usize = 1024;
/// Less is no time for a question to another machine, and more is longer than a caller should wait for a store.
const TIMEOUTS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Where the shared tier is, and how long it may take. None without an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TierSettings {
    /// `rediss://HOST:PORT`, or `redis://` on loopback.
    pub address: Option<String>,
    /// The user of its access list; the store's default user if not set.
    pub user: Option<String>,
    /// Holds the user's password.
    pub password_file: Option<PathBuf>,
    /// Whom to trust for TLS, in PEM, in place of the system's authorities.
    pub ca_file: Option<PathBuf>,
    /// Holds the keys of names and seals.
    pub key_file: Option<PathBuf>,
    /// Of one question.
    #[serde(with = "duration")]
    pub timeout: Duration,
}

/// What the settings name, read.
#[derive(Debug)]
pub struct TierAccess {
    /// Where it is.
    pub address: String,
    /// Of one question.
    pub timeout: Duration,
    /// The user of its access list.
    pub user: Option<String>,
    /// The user's password.
    pub password: Option<Secret>,
    /// Whom to trust for TLS, in PEM.
    pub ca: Option<Vec<u8>>,
    /// The keys of names and seals.
    pub keys: TierKeys,
}

/// The tier could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("the shared tier could not be set up: {0}")]
pub struct TierSetupError(String);

/// The shared tier.
pub struct Tier {
    store: Store,
    keys: TierKeys,
    looks: Looks,
    storing: Background,
    leases_lost: Counter,
    damaged: Counter,
    /// For pauses.
    random: Mutex<StdRng>,
}

/// How it went with those who looked.
#[derive(Debug, Default)]
struct Looks {
    /// An observation was there, or came from another replica.
    hit: Counter,
    /// Another replica's breaker is open.
    breaker: Counter,
    /// This replica asks for all.
    lease: Counter,
    /// Its organization's new credentials are spent.
    new_keys: Counter,
    /// Another replica had the lease for longer than anybody may; or nothing that was found would do.
    gave_up: Counter,
    /// The tier failed.
    fault: Counter,
    /// The tier is left alone.
    left_alone: Counter,
}

/// An observation of the tier, in this replica's time.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    pub(crate) finding: Finding,
    pub(crate) at: Instant,
    pub(crate) wall: SystemTime,
    pub(crate) fresh_for: Duration,
    pub(crate) earlier_valid: Option<(Finding, Instant, SystemTime)>,
    pub(crate) refused_at: Option<Instant>,
    /// It stands under the second name: it is about one model.
    pub(crate) about_model: bool,
}

/// What came of looking for an observation.
pub(crate) enum Sought<T> {
    /// It is there.
    Known(T),
    /// Another replica's breaker is open.
    Open(Opened),
    /// Its organization's new credentials are spent, over all replicas; another may come after this time.
    Withheld(Duration),
    /// This replica asks the provider: for all, if it has the lease.
    Ask(Option<Lease>),
}

/// The right to store an answer, and the duty to ask for it.
pub(crate) struct Lease {
    tier: Arc<Tier>,
    names: Vec<Names>,
    token: String,
    /// The store's time, in milliseconds, and this replica's when it was told so.
    clock: (u64, Instant),
}

/// A place in the tier for what is found: where a credential's observations stand.
pub(crate) struct Seat {
    tier: Arc<Tier>,
    names: Vec<Names>,
}

// === impl TierSettings ===

impl Default for TierSettings {
    fn default() -> Self {
        let timeout = Duration::from_millis(350);
        Self { address: None, user: None, password_file: None, ca_file: None, key_file: None, timeout }
    }
}

impl TierSettings {
    /// What is wrong with them. `workspaces`: where the settings name callers that are workspaces, if they do.
    pub fn review(&self, workspaces: Option<&str>, review: &mut Review<'_>) {
        let Self { address, user, password_file, ca_file, key_file, timeout } = self;
        review.length("timeout", *timeout, TIMEOUTS.0, TIMEOUTS.1);
        let Some(address) = address else {
            let of_it = [("password_file", password_file), ("ca_file", ca_file), ("key_file", key_file)];
            let set =
                of_it.into_iter().filter(|(_, file)| file.is_some()).map(|(key, _)| key).chain(user.as_ref().map(|_| "user"));
            for key in set {
                review.error(key, "is set, and tier.address is not: without an address there is no shared tier");
            }
            return;
        };
        let place = Place::parse(address).inspect_err(|message| review.error("address", message)).ok();
        if key_file.is_none() {
            review.error("key_file", "is required with tier.address; make one with `openssl rand -hex 32`");
        }
        if user.is_some() && password_file.is_none() {
            review.error("password_file", "is required with tier.user");
        }
        if ca_file.is_some() && place.is_some_and(|place| !place.tls) {
            review.error("ca_file", "is for rediss://; redis:// has no certificates");
        }
        if let Some(workspaces) = workspaces {
            let message = format!(
                "is set beside a `workspace` caller ({workspaces}): the tier is for replicas of equal trust, and a workspace's own gate may not \
                 hold its key; leave one of them out"
            );
            review.error("address", message);
        }
    }
}

// === impl Tier ===

impl Tier {
    /// The tier of these settings. Nothing is connected yet.
    pub fn new(access: TierAccess) -> Result<Arc<Self>, TierSetupError> {
        let place = Place::parse(&access.address).map_err(TierSetupError)?;
        let store = Store::at(&place, &access).map_err(|fault| TierSetupError(fault.to_string()))?;
        Ok(Self::of(store, access.keys, rand::random()))
    }

    /// The tier that these connections lead to, with pauses that follow from a seed.
    pub fn over(connect: Box<dyn Connect>, timeout: Duration, keys: TierKeys, seed: u64) -> Arc<Self> {
        Self::of(Store::new(connect, timeout), keys, seed)
    }

    fn of(store: Store, keys: TierKeys, seed: u64) -> Arc<Self> {
        let (looks, leases_lost, damaged) = (Looks::default(), Counter::new(), Counter::new());
        let (storing, random) = (Background::new(MAX_STORING), Mutex::new(StdRng::seed_from_u64(seed)));
        Arc::new(Self { store, keys, looks, storing, leases_lost, damaged, random })
    }

    /// The end: waits until then for answers that are on their way to the store. Tells how many never came there.
    pub async fn finish(&self, by: Instant) -> u64 {
        self.storing.finish(by).await
    }

    /// Where this credential's observations stand.
    pub(crate) fn seat(self: &Arc<Self>, whose: &Whose<'_>) -> Seat {
        Seat { tier: Arc::clone(self), names: self.keys.names(whose) }
    }

    /// What this organization may ask, over all replicas.
    pub(crate) fn allowance(&self, organization: &str, per_minute: NonZeroU32) -> Option<Allowance> {
        self.keys.allowance(organization, per_minute)
    }

    /// Tells of refusals that other replicas have met, for ever. What is missed is no worse than without it.
    pub(crate) async fn listen(self: Arc<Self>, refused: impl Fn(Id) + Send + Sync) {
        loop {
            if let Ok(news) = self.store.news().await {
                let mut news = std::pin::pin!(news);
                while let Some(message) = news.next().await {
                    match self.keys.open_news(&message) {
                        Some(News { id, refused: true }) => refused(id),
                        Some(_) => {}
                        None => self.damaged.inc(),
                    }
                }
            }
            // Not all replicas at one moment.
            let pause = self.between(RECONNECT / 2, RECONNECT);
            sleep(pause).await;
        }
    }

    /// What a value says; one that is none of ours is counted.
    fn read<T>(&self, key: usize, name: &Name, value: &[u8], parse: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
        let read = self.keys.open(key, name, value).and_then(|plain| parse(&plain));
        if read.is_none() {
            self.damaged.inc();
        }
        read
    }

    fn between(&self, least: Duration, most: Duration) -> Duration {
        self.random.lock().unwrap_or_else(PoisonError::into_inner).random_range(least..=most)
    }
}

impl Collect for Tier {
    fn collect(&self, page: &mut Page) {
        let Looks { hit, breaker, lease, new_keys, gave_up, fault, left_alone } = &self.looks;
        let mut looks = page.counter("byokgate_tier_lookups", "Lookups in the shared tier");
        for (result, count) in [
            ("hit", hit),
            ("breaker", breaker),
            ("lease", lease),
            ("new_keys", new_keys),
            ("gave_up", gave_up),
            ("fault", fault),
            ("left_alone", left_alone),
        ] {
            looks.add(&[("result", result)], count);
        }
        if let Some(took) = self.store.took.value() {
            page.histogram("byokgate_tier_duration_seconds", "One request to the shared tier").add(&[], took);
        }
        page.counter("byokgate_tier_faults", "Requests to the shared tier that failed").add(&[], &self.store.faulty);
        page.gauge("byokgate_tier_in_use", "1 while the shared tier is in use, 0 while it is suspended")
            .add(&[], u64::from(self.store.is_in_use()));
        page.counter(
            "byokgate_tier_stores_dropped",
            "Results that were not sent to the shared tier, since too many were already waiting",
        )
        .add(&[], &self.storing.dropped);
        page.counter("byokgate_tier_leases_lost", "Results that were not stored, since the lease had ended")
            .add(&[], &self.leases_lost);
        page.counter("byokgate_tier_damaged", "Values and messages of the shared tier that are not ours").add(&[], &self.damaged);
    }
}

// === impl Seat ===

impl Seat {
    /// The observations' names: what is published of one names it so.
    pub(crate) fn ids(&self) -> impl Iterator<Item = (Id, bool)> {
        self.names.iter().flat_map(|names| names.observations.iter().enumerate().map(|(index, name)| (name.id, index > 0)))
    }

    /// Looks for an observation that will do, as `take` sees it, or else for another replica's open breaker, which counts for `longest` at
    /// most. Waits for another replica's answer as long as it asks.
    /// With an allowance, a credential that no replica knows is counted.
    pub(crate) async fn seek<T>(
        self,
        longest: Duration,
        allowance: Option<&Allowance>,
        mut take: impl FnMut(Vec<Shared>) -> Option<T>,
    ) -> Sought<T> {
        let Self { tier, names } = self;
        let Some(lease) = names.first().map(|names| names.lease.clone()) else { return Sought::Ask(None) };
        let placed: Vec<(usize, bool, &Name)> = names
            .iter()
            .enumerate()
            .flat_map(|(key, names)| names.observations.iter().enumerate().map(move |(index, name)| (key, index > 0, name)))
            .collect();
        let breakers = names.iter().map(|names| &names.breaker).enumerate();
        let texts: Vec<&str> = placed
            .iter()
            .map(|(_, _, name)| *name)
            .chain(breakers.clone().map(|(_, name)| name))
            .map(|name| name.text.as_str())
            .collect();
        let token = token();
        let mut passed_over: Vec<Vec<u8>> = Vec::new();
        let mut fruitless = 0;
        let looks = &tier.looks;
        // The first looks together have the time of one: no caller waits for a slow store any longer.
        let (began, first) = (Instant::now(), tier.store.deadline());
        let mut deadline = first;
        loop {
            let asked = Instant::now();
            let looked = match tier.store.look((&lease, &token), (&texts, &passed_over), allowance, deadline).await {
                Ok(looked) => looked,
                Err(unheard) => {
                    let count = if unheard == Unheard::LeftAlone { &looks.left_alone } else { &looks.fault };
                    count.inc();
                    return Sought::Ask(None);
                }
            };
            let Looked { at, state, damaged, values } = looked;
            tier.damaged.inc_by(damaged);
            match state {
                State::Found => {
                    let found = placed.iter().zip(&values).filter(|(_, value)| !value.is_empty());
                    let shared = found.filter_map(|((key, about_model, name), value)| {
                        let record = tier.read(*key, name, value, Record::from_bytes);
                        in_our_time(record?, *about_model, at, asked)
                    });
                    if let Some(taken) = take(shared.collect()) {
                        looks.hit.inc();
                        return Sought::Known(taken);
                    }
                    let of_breakers = values.iter().skip(placed.len());
                    let mut open = breakers.clone().zip(of_breakers).filter(|(_, value)| !value.is_empty());
                    if let Some(opened) = open.find_map(|((key, name), value)| {
                        let breaker = tier.read(key, name, value, OpenBreaker::from_bytes);
                        open_in_our_time(breaker?, longest, at, asked)
                    }) {
                        looks.breaker.inc();
                        return Sought::Open(opened);
                    }
                    // None of these: the next look takes one that is newer, the lease, or waits. A store that goes on giving what will not do
                    // is none.
                    fruitless += 1;
                    if fruitless > MAX_FRUITLESS {
                        looks.gave_up.inc();
                        return Sought::Ask(None);
                    }
                    passed_over = values;
                }
                State::Leased => {
                    looks.lease.inc();
                    let clock = (at, Instant::now());
                    return Sought::Ask(Some(Lease { tier: Arc::clone(&tier), names, token, clock }));
                }
                State::Withheld(wait) => {
                    looks.new_keys.inc();
                    return Sought::Withheld(wait);
                }
                State::Wait => {
                    let waited = began.elapsed();
                    if waited >= MAX_HELD {
                        looks.gave_up.inc();
                        return Sought::Ask(None);
                    }
                    let most = (waited / PART_OF_WAIT).clamp(LOOK_AGAIN, MAX_LOOK_AGAIN);
                    let pause = tier.between(most / 10, most);
                    sleep(pause).await;
                    deadline = tier.store.deadline();
                }
            }
        }
    }
}

/// A record as this replica has it. `None` if it is of the future, as after a step of the store's clock: nothing is known of its age.
fn in_our_time(record: Record, about_model: bool, told: u64, asked: Instant) -> Option<Shared> {
    let Record { finding, at, fresh_for, earlier_valid, refused_at } = record;
    let (now, wall) = (Instant::now(), SystemTime::now());
    // From when the question was sent: never younger than it is.
    let since = now - asked;
    let ours = |at: u64| {
        let age = Duration::from_millis(told.checked_sub(at)?) + since;
        Some((now.checked_sub(age)?, wall.checked_sub(age)?))
    };
    let (at, wall) = ours(at)?;
    let earlier_valid = earlier_valid.and_then(|(finding, at)| ours(at).map(|(at, wall)| (finding, at, wall)));
    // Of the future or not, it was refused.
    let refused_at = refused_at.map(|refused_at| ours(refused_at).map_or(now, |(at, _)| at));
    Some(Shared { finding, at, wall, fresh_for, earlier_valid, refused_at, about_model })
}

/// Another replica's open breaker as this replica has it. `None` if it is not open any more, or of the future.
fn open_in_our_time(breaker: OpenBreaker, longest: Duration, told: u64, asked: Instant) -> Option<Opened> {
    let OpenBreaker { finding, at, until } = breaker;
    let left = until.min(at.saturating_add(millis(longest))).checked_sub(told).filter(|left| *left > 0)?;
    let age = Duration::from_millis(told.checked_sub(at)?);
    // From when the question was sent: never open for longer than it is.
    let (at, until) = (asked.checked_sub(age)?, asked.checked_add(Duration::from_millis(left))?);
    Some(Opened { finding: Arc::new(finding), at, wall: SystemTime::now().checked_sub(at.elapsed())?, until, shared: true })
}

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

fn token() -> String {
    let token: u128 = rand::random();
    format!("{token:032x}")
}

// === impl Lease ===

impl Lease {
    /// Does the work, and renews the lease meanwhile: others wait as long as somebody asks for them.
    pub(crate) async fn held<T>(&self, work: impl Future<Output = T>) -> T {
        tokio::select! {
            biased;
            done = work => done,
            never = self.renew() => match never {},
        }
    }

    async fn renew(&self) -> std::convert::Infallible {
        let ends = Instant::now() + MAX_HELD;
        let mut next = Instant::now() + RENEWAL;
        while next < ends {
            sleep_until(next).await;
            next += RENEWAL;
            match self.tier.store.renew(self.own()).await {
                Ok(true) | Err(Unheard::Fault) => {}
                // It is another's, or nobody's: storing finds that out too, and counts it.
                Ok(false) | Err(Unheard::LeftAlone) => break,
            }
        }
        std::future::pending().await
    }

    /// The store's time of a moment of this replica's, in milliseconds; never later than it was.
    pub(crate) fn time_of(&self, at: Instant) -> u64 {
        let (told, when) = self.clock;
        match at.checked_duration_since(when) {
            Some(since) => told.saturating_add(millis(since)),
            // A millisecond more: what is cut off may not make it younger.
            None => told.saturating_sub(millis(when - at).saturating_add(1)),
        }
    }

    /// Tells the other replicas that this one's breaker has opened, or has closed. Nobody waits for that, and no lease guards it: it only
    /// spares calls, and what is not heard of there ends with the cool-down.
    pub(crate) fn tell(&self, shift: &Shift) {
        let (tier, names) = (Arc::clone(&self.tier), self.names.clone());
        let breaker = match shift {
            Shift::Closed => None,
            Shift::Opened(Opened { finding, at, until, .. }) => {
                let (finding, keep) = ((**finding).clone(), until.saturating_duration_since(*at));
                Some((OpenBreaker { finding, at: self.time_of(*at), until: self.time_of(*until) }, keep))
            }
        };
        self.tier.storing.run(async move {
            let Some((breaker, keep)) = breaker else {
                let names: Vec<&str> = names.iter().map(|names| names.breaker.text.as_str()).collect();
                return tier.store.delete(&names).await;
            };
            if let Some(name) = names.first().map(|names| &names.breaker)
                && let Some(value) = breaker.to_bytes().and_then(|plain| tier.keys.seal(name, &plain))
            {
                tier.store.set(&name.text, &value, keep).await;
            }
        });
    }

    /// Stores what was found, if the lease is still this replica's; nobody waits for that but the process's end. What is nobody's to share
    /// ends the lease alone.
    pub(crate) fn leave(self, record: Option<Record>, keep: Duration) {
        let tier = Arc::clone(&self.tier);
        tier.storing.run(self.store(record, keep));
    }

    async fn store(self, record: Option<Record>, keep: Duration) {
        let Self { tier, names, token, .. } = &self;
        let sealed = record.as_ref().and_then(|record| {
            let index = usize::from(record.finding.about_model);
            let first = names.first()?;
            // Where all is about one model, there is no second name.
            let (index, name) = match first.observations.get(index) {
                Some(name) => (index, name),
                None => (0, first.observations.first()?),
            };
            let value = tier.keys.seal(name, &record.to_bytes()?)?;
            let news = tier.keys.seal_news(News { id: name.id, refused: record.refused_at == Some(record.at) })?;
            // Under the key that goes, it is not left to say otherwise.
            let others: Vec<&str> =
                names.iter().skip(1).filter_map(|names| names.observations.get(index)).map(|name| name.text.as_str()).collect();
            Some((name, value, news, others))
        });
        let stored = match &sealed {
            None => tier.store.release(self.own()).await.map(|()| true),
            Some((name, value, news, others)) => {
                tier.store.store((self.own().0, token), (&name.text, value, keep), others, news).await
            }
        };
        if stored == Ok(false) {
            tier.leases_lost.inc();
        }
    }

    fn own(&self) -> (&str, &str) {
        (self.names.first().map_or("", |names| names.lease.as_str()), &self.token)
    }
}
