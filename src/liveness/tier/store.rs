//! The client of the store: one connection, which is replaced after a fault, four scripts, and a timeout for every command.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{Stream, StreamExt};
use redis::{Cmd, FromRedisValue};
use tokio::time::{Instant, timeout_at};

use super::{
    faults::{Change, Faults, StoreFault},
    keys::{Allowance, BEGINNING, CHANNEL, SEALED_BYTES, Starts},
    remote::{Commands, Connect, Listening, timed_out},
};
use crate::{
    liveness::{
        new_keys::KeyLimit,
        provider_limits::StartLimit,
        retry_schedule::{KEEP_AFTER, MAX_WAIT},
    },
    telemetry::metrics::{Counter, Histogram},
};

/// How long a lease lasts without a renewal.
pub(super) const LEASE: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const SECOND: Duration = Duration::from_secs(1);

/// Reads the count of a provider's starts: `full`, when a second's worth may start at once again, and `turns`, the next free retry time, in
/// microseconds. A count that this service did not write counts as none.
///
/// KEYS[starts]: the count. `us`: the store's time. `interval`, `second`: of the limit. `latest`, `last_turn`: no start and no retry time is later.
macro_rules! read_starts {
    () => {
        "\
local count = redis.pcall('GET', KEYS[starts])
local full, turns = string.match(type(count) == 'string' and count or '', '^(%d+) (%d+)$')
full, turns = tonumber(full) or us, tonumber(turns) or us
if full < us or full > us + second + latest then full = us end
if turns < us or turns > us + last_turn + interval then turns = us end
local function set_starts()
  local left = math.ceil((math.max(full, turns) - us) / 1000)
  redis.call('SET', KEYS[starts], string.format('%.0f %.0f', full, turns), 'PX', math.max(1, left))
end
"
    };
}

/// Looks for values, and takes the lease if there is none.
///
/// KEYS: the lease; the names of observations and of open breakers. ARGV: the caller's token; the lease's milliseconds; the bytes of a sealed
/// value; the number of names; for each name, the first bytes of a value that is unsuitable, or nothing. Returns: the store's time; 0 a value was
/// found, 1 the caller has the lease, 2 another replica has it, 3 the credential is withheld as a new one, 4 it is withheld from the provider; how
/// many values are damaged; the values; a time in milliseconds; which limit withholds it.
///
/// A value of another type or length counts as none. So does a lease without an end, or with one that is too late: this service sets none like it.
///
/// ARGV goes on with the number of limits of new credentials and, for each, the cost of one credential and the most that may be spent, in
/// microseconds. KEYS goes on with their counts. A credential is new if no value is stored, not even an unsuitable one. A count is the time when
/// the limit is wholly free again, as governor counts. One over the limit was not written by this service, and counts as none.
///
/// With two more keys, the count of the provider's starts and the credential's retry time, the lease comes with a start: it is in so many
/// milliseconds. ARGV then ends with the interval between two starts, a second, the latest start, the last retry time, the time before it at which
/// the credential comes back, how long the retry time is kept after it, the longest wait for a start, and the same for a credential without a
/// retry time while others have one, all in microseconds. A credential that would wait longer gets the next free retry time, or keeps its own.
///
/// Nothing is counted unless the lease is given.
const LOOKUP: &str = concat!(
    "\
local now = redis.call('TIME')
local us = now[1] * 1000000 + now[2]
local ms = math.floor(us / 1000)
local values, damaged, found, known, named = {}, 0, false, false, tonumber(ARGV[4])
for i = 2, named + 1 do
  local value = ''
  local length = redis.pcall('STRLEN', KEYS[i])
  if type(length) ~= 'number' or length ~= 0 and length ~= tonumber(ARGV[3]) then
    damaged = damaged + 1
  elseif length ~= 0 then
    value = redis.call('GET', KEYS[i])
    known = true
    if string.sub(value, 1, string.len(ARGV[i + 3])) ~= ARGV[i + 3] or ARGV[i + 3] == '' then found = true end
  end
  values[i - 1] = value
end
if found then return {ms, 0, damaged, values, 0, 0} end
local left = redis.call('PTTL', KEYS[1])
if left >= 0 and left <= tonumber(ARGV[2]) then return {ms, 2, damaged, values, 0, 0} end
local limits, spent = tonumber(ARGV[named + 5]), {}
for i = 1, known and 0 or limits do
  local cost, most = tonumber(ARGV[named + 4 + 2 * i]), tonumber(ARGV[named + 5 + 2 * i])
  local count = tonumber(redis.pcall('GET', KEYS[named + 1 + i])) or 0
  if count < us or count > us + most then count = us end
  spent[i] = count + cost
  if spent[i] > us + most then return {ms, 3, damaged, values, math.ceil((spent[i] - us - most) / 1000), i} end
end
local starts, wait = named + limits + 2, 0
if KEYS[starts] then
  local settings = {}
  for i = named + 2 * limits + 6, #ARGV do settings[#settings + 1] = tonumber(ARGV[i]) end
  local interval, second, latest, last_turn, head_start, keep, longest, longest_for_new = unpack(settings)
",
    read_starts!(),
    "  local turn = tonumber(redis.pcall('GET', KEYS[starts + 1])) or 0
  if turn > us + last_turn then turn = 0 end
  if turns > us and (turn == 0 or turn > us + head_start) then longest = longest_for_new end
  wait = math.max(0, full - us - second + interval)
  if wait > longest then
    if turn <= us then
      turn = math.min(math.max(us + wait, turns), us + last_turn)
      turns = turn + interval
      redis.call('SET', KEYS[starts + 1], string.format('%.0f', turn), 'PX', math.ceil((turn - us + keep) / 1000))
      set_starts()
    end
    return {ms, 4, damaged, values, math.ceil((turn - us) / 1000), 0}
  end
  full = full + interval
  set_starts()
  if turn ~= 0 then redis.call('DEL', KEYS[starts + 1]) end
end
for i, count in ipairs(spent) do
  local left = math.max(1, math.ceil((count - us) / 1000))
  redis.call('SET', KEYS[named + 1 + i], string.format('%.0f', count), 'PX', left)
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {ms, 1, damaged, values, math.ceil(wait / 1000), 0}"
);

/// Stores an observation and ends the lease, if the token holds it.
///
/// KEYS: the lease; the observation; names to delete. ARGV: the token; the value; its milliseconds; the channel; the notice.
const STORE: &str = "\
if redis.pcall('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[3])
redis.call('DEL', KEYS[1])
for i = 3, #KEYS do redis.call('DEL', KEYS[i]) end
redis.call('PUBLISH', ARGV[4], ARGV[5])
return 1";

/// KEYS: the lease. ARGV: the token; the lease's milliseconds from now on.
const RENEW: &str = "\
if redis.pcall('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])";

/// Ends the lease, and gives back the start that came with it and was not used.
///
/// KEYS: the lease; the count of the provider's starts. ARGV: the token; the interval between two starts, a second, the latest start, and the last
/// retry time, in microseconds.
const RELEASE: &str = concat!(
    "\
if redis.pcall('GET', KEYS[1]) ~= ARGV[1] then return 0 end
local starts = 2
if KEYS[starts] then
  local now = redis.call('TIME')
  local us = now[1] * 1000000 + now[2]
  local interval, second, latest, last_turn = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
",
    read_starts!(),
    "  full = math.max(us, full - interval)
  set_starts()
end
return redis.call('DEL', KEYS[1])"
);

/// Logs a fault of the store.
macro_rules! warn_of {
    ($event:literal, $fault:expr, $what:literal) => {{
        let fault: &StoreFault = &$fault;
        let (kind, code, error) = (fault.kind(), fault.code(), fault.text());
        tracing::warn!(event = $event, kind, code, server = fault.server, error, $what)
    }};
}

/// The client of the store.
pub(super) struct Store {
    connect: Box<dyn Connect>,
    timeout: Duration,
    /// The connection, and its number. A fault ends only the connection that it came from.
    connection: Mutex<(u64, Option<Commands>)>,
    /// Held while connecting, so that one caller connects for all.
    connecting: tokio::sync::Mutex<()>,
    faults: Mutex<Faults>,
    /// False since notices could not be subscribed to.
    listening: AtomicBool,
    /// False since the store refused the right to store a result or to announce it.
    storing: AtomicBool,
    pub(super) took: Histogram,
    pub(super) failures: Counter,
}

/// Why a command has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StoreError {
    /// It was not sent: the store failed several times in a row.
    LeftAlone,
    /// It failed, or timed out.
    Fault,
}

/// What a lookup asks.
pub(super) struct Question<'a> {
    /// The name of the lease, and the caller's token.
    pub(super) lease: (&'a str, &'a str),
    /// The names of observations and of open breakers.
    pub(super) names: &'a [&'a str],
    /// For each name, a value that is unsuitable, or nothing.
    pub(super) unsuitable_values: &'a [Vec<u8>],
    /// The limits that a new credential counts for.
    pub(super) allowances: &'a [Allowance],
    /// The limit of starts at the provider, and the name of the credential's retry time.
    pub(super) starts: Option<(&'a Starts, &'a str)>,
}

/// The reply to a lookup.
#[derive(Debug)]
pub(super) struct StoreLookup {
    /// The store's time, in milliseconds.
    pub(super) at: u64,
    pub(super) state: LookupState,
    /// How many values have a wrong type or length.
    pub(super) damaged: u64,
    /// The values in the order of the names. An empty one was not found.
    pub(super) values: Vec<Vec<u8>>,
}

/// The state of the credential in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LookupState {
    /// A value was found.
    Found,
    /// The caller now has the lease, and may start after this time.
    Leased(Duration),
    /// Another replica has the lease.
    Wait,
    /// This limit of new credentials is reached. The next one may come after this time.
    Withheld(KeyLimit, Duration),
    /// The provider's starts are used up. This credential has the next free one after this time.
    Later(Duration),
}

// === impl Store ===

impl Store {
    /// A client over these connections.
    pub(super) fn new(connect: Box<dyn Connect>, timeout: Duration) -> Self {
        Self {
            connect,
            timeout,
            connection: Mutex::default(),
            connecting: tokio::sync::Mutex::default(),
            faults: Mutex::default(),
            listening: AtomicBool::new(true),
            storing: AtomicBool::new(true),
            took: Histogram::default(),
            failures: Counter::new(),
        }
    }

    /// The deadline of a command that is sent now.
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.timeout
    }

    /// False while nothing is sent, after faults.
    pub(super) fn is_in_use(&self) -> bool {
        unpoisoned(&self.faults).is_in_use()
    }

    /// False since other replicas' notices cannot be heard.
    pub(super) fn is_listening(&self) -> bool {
        self.listening.load(Ordering::Relaxed)
    }

    /// False since results cannot be stored or announced.
    pub(super) fn is_storing(&self) -> bool {
        self.storing.load(Ordering::Relaxed)
    }

    /// Looks for values. If there is no suitable one and no lease, it takes the lease.
    pub(super) async fn look_up(&self, question: &Question<'_>, deadline: Instant) -> Result<StoreLookup, StoreError> {
        let Question { lease: (lease, token), names, unsuitable_values, allowances, starts } = question;
        let mut command = script(LOOKUP, 1 + names.len() + allowances.len() + if starts.is_some() { 2 } else { 0 });
        command.arg(lease).arg(names);
        for Allowance { name, .. } in *allowances {
            command.arg(name);
        }
        if let Some((Starts { name, .. }, turn)) = starts {
            command.arg(name).arg(turn);
        }
        command.arg(token).arg(millis(LEASE)).arg(SEALED_BYTES).arg(names.len());
        for index in 0..names.len() {
            let beginning = unsuitable_values.get(index).and_then(|value| value.get(..BEGINNING)).unwrap_or_default();
            command.arg(beginning);
        }
        command.arg(allowances.len());
        for Allowance { per_minute, .. } in *allowances {
            let cost = MINUTE / per_minute.get();
            command.arg(micros(cost)).arg(micros(cost * per_minute.get()));
        }
        if let Some((Starts { limit, .. }, _)) = starts {
            let StartLimit { longest, longest_for_new, head_start, .. } = limit;
            settings_of(&mut command, limit);
            command.arg(micros(*head_start)).arg(micros(KEEP_AFTER)).arg(micros(*longest)).arg(micros(*longest_for_new));
        }
        let reply: (u64, u64, u64, Vec<Vec<u8>>, u64, usize) = self.send(&command, deadline).await?;
        let (at, state, damaged, values, time, which) = reply;
        let time = Duration::from_millis(time).min(MAX_WAIT);
        let withholds = which.checked_sub(1).and_then(|index| allowances.get(index));
        let state = match (state, withholds) {
            (0, _) => LookupState::Found,
            // However the store replies, no slot is held for longer.
            (1, _) => LookupState::Leased(time.min(starts.map_or(Duration::ZERO, |(starts, _)| starts.limit.longest))),
            (3, Some(Allowance { limit, .. })) => LookupState::Withheld(*limit, time),
            (4, _) => LookupState::Later(time),
            _ => LookupState::Wait,
        };
        Ok(StoreLookup { at, state, damaged, values })
    }

    /// Stores a value and ends the lease. `false` if the token does not hold the lease.
    pub(super) async fn store(
        &self,
        (lease, token): (&str, &str),
        (name, value, keep): (&str, &[u8], Duration),
        others: &[&str],
        notice: &[u8],
    ) -> Result<bool, StoreError> {
        let mut command = script(STORE, 2 + others.len());
        command.arg(lease).arg(name).arg(others).arg(token).arg(value).arg(millis(keep)).arg(CHANNEL).arg(notice);
        let stored = self.ask::<u64>(&command, self.deadline()).await;
        match &stored {
            // Lookups go on, and so this never comes to a pause.
            Err(Some(fault)) if fault.code() == "NOPERM" => {
                if self.storing.swap(false, Ordering::Relaxed) {
                    warn_of!(
                        "tier_not_storing",
                        fault,
                        "results cannot be stored in the shared tier, or not announced to other replicas"
                    );
                }
            }
            Err(_) => {}
            Ok(_) => {
                if !self.storing.swap(true, Ordering::Relaxed) {
                    tracing::info!(event = "tier_storing", "results are stored in the shared tier again");
                }
            }
        }
        stored.map(|done| done == 1).map_err(StoreError::of)
    }

    /// Renews the lease. `false` if the token does not hold it.
    pub(super) async fn renew(&self, (lease, token): (&str, &str)) -> Result<bool, StoreError> {
        let mut command = script(RENEW, 1);
        command.arg(lease).arg(token).arg(millis(LEASE));
        self.send::<u64>(&command, self.deadline()).await.map(|done| done == 1)
    }

    /// Ends the lease, so that other replicas do not wait for it, and gives back the start that came with it, if it was not used.
    pub(super) async fn release(&self, (lease, token): (&str, &str), unused: Option<&Starts>) -> Result<(), StoreError> {
        let mut command = script(RELEASE, 1 + usize::from(unused.is_some()));
        command.arg(lease).arg(unused.map(|starts| starts.name.as_str())).arg(token);
        if let Some(Starts { limit, .. }) = unused {
            settings_of(&mut command, limit);
        }
        self.send::<u64>(&command, self.deadline()).await.map(drop)
    }

    /// Sets a value for a time, without a lease. A fault is ignored.
    pub(super) async fn set(&self, name: &str, value: &[u8], keep: Duration) {
        let mut command = redis::cmd("SET");
        command.arg(name).arg(value).arg("PX").arg(millis(keep));
        self.send(&command, self.deadline()).await.unwrap_or_default()
    }

    /// Deletes values. A fault is ignored.
    pub(super) async fn delete(&self, names: &[&str]) {
        let mut command = redis::cmd("DEL");
        command.arg(names);
        self.send(&command, self.deadline()).await.map_or((), |_: u64| ())
    }

    /// Receives notices until the connection ends, or commands get another one. `None` after a fault, which is logged once.
    pub(super) async fn subscribe(&self) -> Option<impl Stream<Item = Vec<u8>> + use<>> {
        let connecting = async {
            let mut listening = self.connect.listen().await?;
            listening.connection.subscribe(CHANNEL).await.map_err(|error| self.connect.fault(error))?;
            Ok(listening)
        };
        // Nobody waits for it, and it takes more connections.
        match self.in_time(Instant::now() + self.timeout * 2, connecting).await {
            Ok(Listening { connection, moved }) => {
                if !self.listening.swap(true, Ordering::Relaxed) {
                    tracing::info!(event = "tier_listening", "refusals of other replicas are heard again");
                }
                Some(connection.into_on_message().map(|message| message.get_payload_bytes().to_vec()).take_until(moved))
            }
            Err(fault) => {
                if self.listening.swap(false, Ordering::Relaxed) {
                    warn_of!("tier_not_listening", fault, "refusals that other replicas see cannot be heard");
                }
                None
            }
        }
    }

    async fn send<T: FromRedisValue>(&self, command: &Cmd, deadline: Instant) -> Result<T, StoreError> {
        self.ask(command, deadline).await.map_err(StoreError::of)
    }

    /// Sends one command. It connects if needed, counts a fault, and logs the first fault and the start and the end of a pause. Without a fault it
    /// was not sent.
    async fn ask<T: FromRedisValue>(&self, command: &Cmd, deadline: Instant) -> Result<T, Option<StoreFault>> {
        if !unpoisoned(&self.faults).may_send(Instant::now()) {
            return Err(None);
        }
        let began = Instant::now();
        let mut used = None;
        let sending = self.in_time(deadline, async {
            let (number, mut commands) = self.connected().await?;
            used = Some(number);
            command.query_async::<T>(&mut commands.connection).await.map_err(|error| self.connect.fault(error))
        });
        let answer = sending.await;
        self.took.observe(began.elapsed());
        match answer {
            Ok(answer) => {
                if unpoisoned(&self.faults).succeeded() == Some(Change::InUse) {
                    tracing::info!(event = "tier_in_use", "the shared tier answers");
                }
                Ok(answer)
            }
            Err(fault) => {
                self.failures.inc();
                let change = unpoisoned(&self.faults).failed(Instant::now());
                if fault.ends_connection() {
                    self.disconnect(used);
                }
                match change {
                    Some(Change::NeverWorked) => {
                        warn_of!(
                            "tier_fault",
                            fault,
                            "the first request to the shared tier failed; without it this replica decides by itself"
                        );
                    }
                    Some(Change::LeftAlone) => warn_of!(
                        "tier_left_alone",
                        fault,
                        "the shared tier failed several times in a row; until it answers again, this replica decides without it"
                    ),
                    Some(Change::InUse) | None => {}
                }
                Err(Some(fault))
            }
        }
    }

    async fn in_time<T>(&self, deadline: Instant, work: impl Future<Output = Result<T, StoreFault>>) -> Result<T, StoreFault> {
        timeout_at(deadline, work).await.unwrap_or_else(|_| Err(self.connect.fault(timed_out())))
    }

    /// Returns the connection, and makes it if there is none.
    async fn connected(&self) -> Result<(u64, Commands), StoreFault> {
        if let Some(connected) = self.open_connection() {
            return Ok(connected);
        }
        let _connecting = self.connecting.lock().await;
        if let Some(connected) = self.open_connection() {
            return Ok(connected);
        }
        let made = self.connect.connect().await?;
        let mut current = unpoisoned(&self.connection);
        current.0 += 1;
        current.1 = Some(made.clone());
        Ok((current.0, made))
    }

    fn open_connection(&self) -> Option<(u64, Commands)> {
        let current = unpoisoned(&self.connection);
        Some((current.0, current.1.clone()?))
    }

    fn disconnect(&self, used: Option<u64>) {
        let mut current = unpoisoned(&self.connection);
        if used == Some(current.0) {
            current.1 = None;
        }
    }
}

// === impl StoreError ===

impl StoreError {
    fn of(fault: Option<StoreFault>) -> Self {
        if fault.is_some() { Self::Fault } else { Self::LeftAlone }
    }
}

/// The settings that `read_starts` needs.
fn settings_of(command: &mut Cmd, StartLimit { per_second, queue_time, .. }: &StartLimit) {
    command.arg(micros(SECOND / per_second.get())).arg(micros(SECOND)).arg(micros(*queue_time)).arg(micros(MAX_WAIT));
}

fn script(text: &str, keys: usize) -> Cmd {
    // Sent as text and not by its hash, which a restarted server does not know.
    let mut command = redis::cmd("EVAL");
    command.arg(text).arg(keys);
    command
}

fn micros(length: Duration) -> u64 {
    u64::try_from(length.as_micros()).unwrap_or(u64::MAX)
}

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

/// A panic cannot leave the state behind these locks inconsistent: every change is one call or assignment.
fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
