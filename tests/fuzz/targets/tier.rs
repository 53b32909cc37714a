//! A shared store that answers anything: sealed values as they are, moved, cut, changed, of another key, of other types, and any bytes. A replica
//! comes to its own probe's verdict or to one that was sealed for this credential, and forgets nothing but by a notice that was sealed.
#![no_main]

use std::{
    collections::BTreeSet,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use byok_gate::{
    core::{
        classify::Finding,
        engine::{Boxed, Engine, ProbeRequest, Prober},
    },
    domain::{request::Request, verdict::Verdict},
    grpc::convert::{self, pb},
    liveness::{
        cache::{Cache, CacheSettings},
        tier::{Commands, Connect, Listening, StoreFault, Tier, TierKeys},
    },
};
use byok_gate_fuzz::{CASES, VERDICTS, byte, holds, question};
use libfuzzer_sys::fuzz_target;
use redis::{
    AsyncConnectionConfig, RedisConnectionInfo,
    aio::{MultiplexedConnection, PubSub},
};
use ring::{aead, hmac};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    runtime::Builder,
    sync::Notify,
    time::{Instant, sleep},
};

const KEY: &str = "made-up-tier-key-0123456789abcdef0123456789abcdef";
const OLD_KEY: &str = "made-up-tier-key-fedcba9876543210fedcba9876543210";
const STRANGERS_KEY: &str = "made-up-tier-key-of-somebody-else-0123456789abcdef";
const CHANNEL: &str = "bg1:news";
/// The store's time, in milliseconds.
const NOW: u64 = 1_800_000_000_000;

/// A provider with one verdict, which counts how often it is asked.
struct Says {
    verdict: Verdict,
    asked: AtomicUsize,
}

/// The store. Its answers are made of the input as they are needed.
#[derive(Clone)]
struct Store {
    /// Those of the replica.
    keys: &'static [&'static str],
    state: Arc<Mutex<State>>,
    /// Publishes the rest of the input as a notice.
    publish: Arc<Notify>,
}

#[derive(Default)]
struct State {
    input: Vec<u8>,
    /// Lookups are answered by the input as it is.
    raw: bool,
    /// Every verdict that was in a value which was sealed for the name that it was given for.
    sealed: BTreeSet<Verdict>,
    /// The first part of the names of observations.
    ids: Vec<String>,
    /// Whether a notice that was sealed says that one of them was refused.
    refused: bool,
}

/// Takes this many bytes off the front, or those that there are.
fn take<'i>(input: &mut &'i [u8], length: usize) -> &'i [u8] {
    let (taken, rest) = input.split_at(length.min(input.len()));
    *input = rest;
    taken
}

/// A number that is likely to be at an edge.
fn number(input: &mut &[u8]) -> u64 {
    match byte(input) % 7 {
        0 => NOW,
        1 => NOW - u64::from(byte(input)) * 100,
        2 => NOW + u64::from(byte(input)),
        3 => 0,
        4 => i64::MAX as u64,
        5 => u64::MAX,
        _ => take(input, 8).iter().fold(0, |number, byte| number << 8 | u64::from(*byte)),
    }
}

/// Seals as replicas do. `TRUSTED` checks that they take it.
fn seal(key: &str, name: &str, plain: &[u8]) -> Vec<u8> {
    let derived = blake3::derive_key("byok-gate shared tier v1: keys that seal observations", key.as_bytes());
    let key = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &derived), name.as_bytes());
    let key = aead::LessSafeKey::new(aead::UnboundKey::new(&aead::AES_256_GCM, key.as_ref()).expect("32 bytes"));
    let (nonce, mut sealed) = ([7; 12], plain.to_vec());
    key.seal_in_place_append_tag(aead::Nonce::assume_unique_for_key(nonce), aead::Aad::from(name), &mut sealed).expect("short");
    [&nonce[..], &sealed].concat()
}

/// A value as replicas write it, of an observation or an open breaker.
fn record(input: &mut &[u8]) -> Vec<u8> {
    let finding = |input: &mut &[u8]| {
        let verdict = VERDICTS[usize::from(byte(input)) % VERDICTS.len()];
        format!(r#"{{"verdict":"{verdict}","status":200,"probe":"models"}}"#)
    };
    let shape = byte(input);
    let (found, at, other) = (finding(input), number(input), number(input));
    let mut plain = match shape % 4 {
        0 => format!(r#"{{"finding":{found},"at":{at},"fresh_ms":{other}}}"#),
        1 => format!(r#"{{"finding":{found},"at":{at},"fresh_ms":{other},"refused_at":{}}}"#, number(input)),
        2 => format!(r#"{{"finding":{found},"at":{at},"fresh_ms":{other},"valid":[{},{}]}}"#, finding(input), number(input)),
        _ => format!(r#"{{"finding":{found},"opened_at":{at},"until":{other}}}"#),
    }
    .into_bytes();
    plain.resize(plain.len().max(1024), b' ');
    plain
}

fn bulk(bytes: &[u8]) -> Vec<u8> {
    [format!("${}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat()
}

/// A value for this name, and what it holds if it was sealed for it.
fn value(input: &mut &[u8], name: &str, key: &str) -> (Vec<u8>, Option<Vec<u8>>) {
    let kind = byte(input) % 12;
    let plain = match kind {
        0 | 1 => return (bulk(b""), None),
        2 => return (bulk(take(input, 64)), None),
        3 => return (b":7\r\n".to_vec(), None),
        4 => return (b"$-1\r\n".to_vec(), None),
        5 => return (b"*1\r\n$1\r\nx\r\n".to_vec(), None),
        6 => {
            let length = usize::from(byte(input));
            take(input, length).to_vec()
        }
        _ => record(input),
    };
    let mut sealed = seal(key, name, &plain);
    match kind {
        8 => sealed = seal(STRANGERS_KEY, name, &plain),
        9 => sealed = seal(key, &format!("{name}:breaker"), &plain),
        10 => {
            let place = (usize::from(byte(input)) << 8 | usize::from(byte(input))) % sealed.len();
            sealed[place] ^= 1 << (byte(input) & 7);
        }
        11 => {
            let length = (usize::from(byte(input)) << 8 | usize::from(byte(input))) % sealed.len();
            sealed.truncate(length);
        }
        _ => return (bulk(&sealed), Some(plain)),
    }
    (bulk(&sealed), None)
}

impl State {
    fn lookup(&mut self, names: &[String], keys: &[&str]) -> Vec<u8> {
        self.ids =
            names.iter().filter_map(|name| name.strip_prefix("bg1:")).filter(|id| id.len() == 64).map(str::to_owned).collect();
        if self.raw {
            return std::mem::take(&mut self.input);
        }
        let all = std::mem::take(&mut self.input);
        let mut input = all.as_slice();
        let choice = byte(&mut input);
        // At the end of the input: the lease.
        let state = [1, 0, 0, 0, 2, 3, 4, 5][usize::from(choice & 7)];
        let at = if choice & 8 == 0 { NOW } else { number(&mut input) };
        let shown = if choice & 16 == 0 { names.len() } else { usize::from(byte(&mut input)) % 8 };
        // The observations of each key, and then each key's breaker.
        let observations = names.len() - keys.len();
        let mut values = Vec::new();
        for index in 0..shown {
            let name = names.get(index).map_or("", String::as_str);
            let of_key = if index < observations { index / (observations / keys.len()) } else { index - observations };
            let (said, plain) = value(&mut input, name, keys.get(of_key).unwrap_or(&STRANGERS_KEY));
            values.extend(said);
            let plain = plain.unwrap_or_default();
            let is_in = |word: &str| plain.windows(word.len()).any(|window| window == word.as_bytes());
            self.sealed.extend(VERDICTS.iter().filter(|verdict| is_in(&format!("\"{verdict}\""))));
        }
        let time = if choice & 32 == 0 { 1 } else { number(&mut input) };
        let (damaged, which) = (choice >> 6, byte(&mut input));
        let head = format!("*6\r\n:{at}\r\n:{state}\r\n:{damaged}\r\n*{shown}\r\n");
        self.input = input.to_vec();
        [head.as_bytes(), &values, format!(":{time}\r\n:{which}\r\n").as_bytes()].concat()
    }

    /// A notice for whoever listens.
    fn notice(&mut self, keys: &[&str]) -> Vec<u8> {
        let all = std::mem::take(&mut self.input);
        let mut input = all.as_slice();
        if self.raw {
            return all;
        }
        let (kind, which) = (byte(&mut input), usize::from(byte(&mut input)));
        let id = self.ids.get(which % self.ids.len().max(1)).map_or("", String::as_str);
        let mut plain: Vec<u8> =
            (0..id.len() / 2).filter_map(|at| u8::from_str_radix(id.get(2 * at..2 * at + 2)?, 16).ok()).collect();
        plain.push(byte(&mut input));
        if kind & 8 != 0 {
            plain = input.to_vec();
        }
        let key = keys[which % keys.len()];
        let mut payload = seal(key, CHANNEL, &plain);
        match kind & 7 {
            0 => payload = seal(STRANGERS_KEY, CHANNEL, &plain),
            1 => payload = seal(key, "bg1:other", &plain),
            2 => payload = input.to_vec(),
            3 => {
                let place = usize::from(byte(&mut input)) % payload.len();
                payload[place] ^= 1;
            }
            4 => payload.truncate(which % payload.len()),
            _ => self.refused = plain.len() == 33 && plain.last() == Some(&1),
        }
        [&b"*3\r\n"[..], &bulk(b"message"), &bulk(CHANNEL.as_bytes()), &bulk(&payload)].concat()
    }
}

/// The words of the next command. `None` once the replica has gone.
async fn command(stream: &mut DuplexStream, unread: &mut Vec<u8>) -> Option<Vec<String>> {
    fn parse(bytes: &[u8]) -> Option<(Vec<String>, usize)> {
        let number = |at: usize| {
            let line = bytes.get(at + 1..)?;
            let length = line.iter().position(|byte| *byte == b'\r')?;
            Some((std::str::from_utf8(&line[..length]).ok()?.parse::<usize>().ok()?, at + length + 3))
        };
        let (many, mut at) = number(0)?;
        let mut words = Vec::new();
        for _ in 0..many {
            let (length, begins) = number(at)?;
            words.push(String::from_utf8_lossy(bytes.get(begins..begins + length)?).into_owned());
            at = begins + length + 2;
        }
        (bytes.len() >= at).then_some((words, at))
    }
    loop {
        if let Some((words, length)) = parse(unread) {
            unread.drain(..length);
            return Some(words);
        }
        if stream.read_buf(unread).await.ok()? == 0 {
            return None;
        }
    }
}

impl Store {
    fn new(choice: u8, input: &[u8]) -> Self {
        let keys: &[&str] = if choice & 2 == 0 { &[KEY] } else { &[KEY, OLD_KEY] };
        let state = State { input: input.to_vec(), raw: choice & 1 != 0, ..State::default() };
        Self { keys, state: Arc::new(Mutex::new(state)), publish: Arc::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics under it")
    }

    fn stream(&self) -> DuplexStream {
        let (near, far) = tokio::io::duplex(1 << 16);
        tokio::spawn(self.clone().serve(far));
        near
    }

    async fn serve(self, mut stream: DuplexStream) -> Option<()> {
        let mut unread = Vec::new();
        loop {
            let words = command(&mut stream, &mut unread).await?;
            let said = match words.first().map(String::as_str) {
                Some("SUBSCRIBE") => {
                    let said = [&b"*3\r\n"[..], &bulk(b"subscribe"), &bulk(CHANNEL.as_bytes()), b":1\r\n"].concat();
                    stream.write_all(&said).await.ok()?;
                    self.publish.notified().await;
                    let notice = self.state().notice(self.keys);
                    stream.write_all(&notice).await.ok()?;
                    return std::future::pending().await;
                }
                Some("EVAL") if words[1].contains("STRLEN") => {
                    let names = words[2].parse::<usize>().expect("a number");
                    let said = self.state().lookup(&words[4..3 + names], self.keys);
                    stream.write_all(&said).await.ok()?;
                    if self.state().raw {
                        return None;
                    }
                    continue;
                }
                Some("EVAL" | "DEL") => &b":1\r\n"[..],
                _ => b"+OK\r\n",
            };
            stream.write_all(said).await.ok()?;
        }
    }

    /// A replica of this store.
    fn replica(&self, prober: &Arc<Says>) -> (Engine, Arc<Cache>) {
        let keys = TierKeys::parse(&self.keys.join("\n")).expect("good keys");
        let tier = Tier::over(Box::new(self.clone()), Duration::from_millis(350), keys, 1);
        let cache = Arc::new(Cache::new(prober.clone(), CacheSettings::default()).with_tier(Some(tier)));
        (Engine::new(CASES.clone(), cache.clone(), None), cache)
    }
}

impl Connect for Store {
    fn connect(&self) -> Boxed<'_, Result<Commands, StoreFault>> {
        Box::pin(async {
            let config = AsyncConnectionConfig::new().set_response_timeout(None);
            let settings = RedisConnectionInfo::default().set_skip_set_lib_name();
            let (connection, driver) = MultiplexedConnection::new_with_config(&settings, self.stream(), config).await?;
            Ok(Commands::new(connection, driver))
        })
    }

    fn listen(&self) -> Boxed<'_, Result<Listening, StoreFault>> {
        Box::pin(async {
            let settings = RedisConnectionInfo::default().set_skip_set_lib_name();
            let connection = PubSub::new(&settings, self.stream()).await?;
            Ok(Listening { connection, moved: Box::pin(std::future::pending()) })
        })
    }
}

impl Prober for Says {
    fn probe(&self, request: ProbeRequest) -> Boxed<'static, Finding> {
        request.started.set();
        self.asked.fetch_add(1, Ordering::Relaxed);
        let finding = Finding::bare(self.verdict);
        Box::pin(async move { finding })
    }
}

fn says(verdict: Verdict) -> Arc<Says> {
    Arc::new(Says { verdict, asked: AtomicUsize::new(0) })
}

fn request(at_provision: bool) -> Request {
    let value = "made-up-canary-0123456789".to_owned();
    let credential = pb::Credential { env_name: "ACME_API_KEY".into(), scope: 1, value, unreadable: false };
    let mut message = question("agent", "acme-large", vec![credential]);
    if at_provision {
        message.checkpoint = pb::Checkpoint::Provision as i32;
    }
    convert::request(message).expect("a good request")
}

async fn decide(engine: &Engine, request: &Request) -> pb::DecideResponse {
    convert::response(engine.decide(request, Instant::now() + Duration::from_secs(5)).await)
}

/// The verdict of a replica that looks into this store.
async fn looked_up(store: &Store, prober: Verdict, at_provision: bool) -> pb::Verdict {
    let (engine, _) = store.replica(&says(prober));
    let request = request(at_provision);
    let response = decide(&engine, &request).await;
    let sealed = store.state().sealed.clone();
    let best = if sealed.contains(&Verdict::Valid) { Verdict::Valid } else { prober };
    holds(&request, best, &response);
    let found = response.liveness.as_ref().map(pb::Liveness::verdict).expect("it says what it knows");
    // Withheld, or another replica's lease does not end in time.
    let unasked = [pb::Verdict::NotAttempted, pb::Verdict::Timeout];
    let may_be = sealed.iter().chain([&prober]).any(|verdict| found.as_str_name() == format!("VERDICT_{verdict}"));
    assert!(may_be || unasked.contains(&found), "nobody sealed {found:?}, but {sealed:?}");
    found
}

/// A replica forgets what it has found only by a notice that was sealed. Returns how often it probed.
async fn noticed(store: &Store) -> usize {
    let prober = says(Verdict::Valid);
    let (engine, cache) = store.replica(&prober);
    let request = request(false);
    let waiting = std::mem::take(&mut store.state().input);
    let raw = std::mem::take(&mut store.state().raw);
    tokio::spawn(cache.refusal_listener().expect("it has a tier"));
    sleep(Duration::from_millis(1)).await;
    decide(&engine, &request).await;
    (store.state().input, store.state().raw) = (waiting, raw);
    store.publish.notify_one();
    sleep(Duration::from_millis(1)).await;
    store.state().raw = false;
    store.state().input.clear();
    decide(&engine, &request).await;
    let asked = prober.asked.load(Ordering::Relaxed);
    let refused = store.state().refused;
    assert!(asked == 1 || refused, "it forgot by a notice that nobody sealed");
    asked
}

/// What this target seals is read, so its changed values are not refused for another reason.
static TRUSTED: LazyLock<()> = LazyLock::new(|| {
    in_time(async {
        // An observation that is found: kind 7, VALID of now.
        let found = looked_up(&Store::new(0, &[1, 7, 0, 0, 0, 4]), Verdict::Invalid, false).await;
        assert_eq!(found, pb::Verdict::Valid, "the seal of this target is not the service's");
        // A refusal of the first observation: kind 5.
        let store = Store::new(0, &[5, 0, 1]);
        assert_eq!(noticed(&store).await, 2, "the notice of this target is not the service's");
    });
});

fn in_time<T>(work: impl Future<Output = T>) -> T {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    runtime.block_on(work)
}

fuzz_target!(|input: &[u8]| {
    LazyLock::force(&TRUSTED);
    let mut input = input;
    let (choice, prober) = (byte(&mut input), byte(&mut input));
    in_time(async {
        let store = Store::new(choice, input);
        if choice & 4 == 0 {
            // All that a probe can come to but VALID.
            looked_up(&store, VERDICTS[1 + usize::from(prober) % 8], choice & 8 != 0).await;
        } else {
            noticed(&store).await;
        }
    });
});
