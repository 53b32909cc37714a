//! A store in the test's own process and with its clock. It speaks the protocol of Redis and runs the scripts in Redis's Lua; each link has a
//! "weather" that simulates network faults and a busy server.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use byok_gate::{
    core::engine::Boxed,
    liveness::tier::{Commands, Connect, Listening, StoreFault},
};
use mlua::{Function, Lua, Value, Variadic};
use rand::{Rng, SeedableRng, rngs::StdRng};
use redis::{
    AsyncConnectionConfig, RedisConnectionInfo, RedisError,
    aio::{MultiplexedConnection, PubSub},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    sync::{mpsc, watch},
    time::{Instant, sleep},
};

/// The store's clock at the start, in milliseconds: not the machine's.
const EPOCH: u64 = 1_900_000_000_000;

/// The state of a replica's link to the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weather {
    /// All comes within milliseconds.
    Calm,
    /// Connections break before or after a request is read; requests and answers come late.
    Stormy,
    /// Nothing is read until it ends, and then everything.
    Frozen,
    /// No connection.
    Down,
}

/// What happened at the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// This replica took a lease.
    Leased { at: Instant, by: usize, lease: String, token: String },
    /// The lease's holder stored what it found.
    Stored { at: Instant, token: String },
    /// The lease's holder had nothing to store.
    Released { token: String },
    /// The store refused it: the lease was not the writer's any more.
    Refused,
    /// The message about this many of those that were stored came to a replica.
    Delivered { at: Instant, to: usize, message: usize },
}

#[derive(Clone)]
pub(crate) struct LuaStore(Arc<Inner>);

struct Inner {
    lua: Lua,
    scripts: Mutex<HashMap<Vec<u8>, Function>>,
    shelf: Arc<Mutex<Shelf>>,
    listeners: Mutex<Vec<mpsc::UnboundedSender<Message>>>,
    events: Mutex<Vec<Event>>,
}

/// What was published, and as which of all messages.
type Message = (usize, Vec<u8>);

/// What it holds.
struct Shelf {
    began: Instant,
    entries: BTreeMap<Vec<u8>, (Vec<u8>, Option<Instant>)>,
    published: Vec<Vec<u8>>,
    messages: usize,
}

enum Reply {
    Number(i64),
    Bytes(Vec<u8>),
    Nothing,
    Done,
    List(Vec<Vec<u8>>),
}

/// A replica's way to the store.
pub(crate) struct Link {
    store: LuaStore,
    replica: usize,
    weather: watch::Receiver<Weather>,
    random: Arc<Mutex<StdRng>>,
}

/// The fate of a request.
enum Fate {
    /// Delays before the request is read, and before the answer.
    Heard { before: u64, after: u64 },
    /// The connection ends: before it is heard, or after.
    Cut { heard: bool },
}

// === impl Shelf ===

impl Shelf {
    fn get(&mut self, key: &[u8]) -> Option<&(Vec<u8>, Option<Instant>)> {
        if self.entries.get(key).is_some_and(|(_, ends)| ends.is_some_and(|ends| ends <= Instant::now())) {
            self.entries.remove(key);
        }
        self.entries.get(key)
    }

    /// The commands that the scripts use, as Redis documents them.
    fn run(&mut self, words: &[Vec<u8>]) -> Result<Reply, String> {
        let number = |word: &[u8]| String::from_utf8_lossy(word).parse::<u64>().map_err(|fault| fault.to_string());
        let words: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
        Ok(match *words {
            [b"TIME"] => {
                let now = EPOCH * 1000 + u64::try_from(self.began.elapsed().as_micros()).unwrap();
                Reply::List([now / 1_000_000, now % 1_000_000].map(|part| part.to_string().into_bytes()).into())
            }
            [b"STRLEN", key] => Reply::Number(self.get(key).map_or(0, |(value, _)| value.len()).try_into().unwrap()),
            [b"GET", key] => self.get(key).map_or(Reply::Nothing, |(value, _)| Reply::Bytes(value.clone())),
            [b"SET", key, value, b"PX", millis] => {
                let ends = Instant::now() + Duration::from_millis(number(millis)?);
                self.entries.insert(key.to_vec(), (value.to_vec(), Some(ends)));
                Reply::Done
            }
            [b"DEL", key] => {
                let was = self.get(key).is_some();
                self.entries.remove(key);
                Reply::Number(was.into())
            }
            [b"PTTL", key] => Reply::Number(match self.get(key) {
                None => -2,
                Some((_, None)) => -1,
                Some((_, Some(ends))) => (*ends - Instant::now()).as_millis().try_into().unwrap(),
            }),
            [b"PEXPIRE", key, millis] => {
                let ends = Instant::now() + Duration::from_millis(number(millis)?);
                let is_there = self.get(key).is_some();
                if let Some(entry) = self.entries.get_mut(key) {
                    entry.1 = Some(ends);
                }
                Reply::Number(is_there.into())
            }
            [b"PUBLISH", _, message] => {
                self.published.push(message.to_vec());
                Reply::Number(1)
            }
            ref other => {
                return Err(format!("the store does not know {:?}", other.first().map(|word| String::from_utf8_lossy(word))));
            }
        })
    }
}

// === impl LuaStore ===

impl LuaStore {
    pub(crate) fn new() -> Self {
        let (lua, began) = (Lua::new(), Instant::now());
        let shelf = Shelf { began, entries: BTreeMap::new(), published: Vec::new(), messages: 0 };
        let shelf = Arc::new(Mutex::new(shelf));
        let (redis, calling) = (lua.create_table().unwrap(), Arc::clone(&shelf));
        let call = lua.create_function(move |lua, words: Variadic<mlua::String>| {
            let words: Vec<Vec<u8>> = words.iter().map(|word| word.as_bytes().to_vec()).collect();
            Ok(match calling.lock().unwrap().run(&words).map_err(mlua::Error::runtime)? {
                Reply::Number(number) => Value::Number(number as f64),
                Reply::Bytes(bytes) => Value::String(lua.create_string(bytes)?),
                Reply::Nothing => Value::Boolean(false),
                Reply::Done => Value::Table(lua.create_table_from([("ok", "OK")])?),
                Reply::List(list) => {
                    let list: Result<Vec<_>, _> = list.iter().map(|part| lua.create_string(part)).collect();
                    Value::Table(lua.create_sequence_from(list?)?)
                }
            })
        });
        let call = call.unwrap();
        // No value of this store is of another type: what pcall would catch does not happen.
        redis.set("call", &call).unwrap();
        redis.set("pcall", call).unwrap();
        lua.globals().set("redis", redis).unwrap();
        let (scripts, listeners, events) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self(Arc::new(Inner { lua, scripts, shelf, listeners, events }))
    }

    pub(crate) fn link(&self, replica: usize, weather: watch::Receiver<Weather>, seed: u64) -> Link {
        Link { store: self.clone(), replica, weather, random: Arc::new(Mutex::new(StdRng::seed_from_u64(seed))) }
    }

    pub(crate) fn events(&self) -> Vec<Event> {
        self.0.events.lock().unwrap().clone()
    }

    /// A request, and the store's answer.
    fn asked(&self, by: usize, words: &[Vec<u8>]) -> Vec<u8> {
        // What an open breaker is told by.
        if words[0] == b"SET" || words[0] == b"DEL" {
            return match self.0.shelf.lock().unwrap().run(words) {
                Ok(Reply::Number(number)) => format!(":{number}\r\n").into_bytes(),
                Ok(_) => b"+OK\r\n".to_vec(),
                Err(fault) => panic!("{fault}"),
            };
        }
        let [name, script, keys, arguments @ ..] = words else { return b"-ERR too few words\r\n".to_vec() };
        if name != b"EVAL" {
            return b"-ERR unknown command\r\n".to_vec();
        }
        let (keys, arguments) = arguments.split_at(String::from_utf8_lossy(keys).parse().unwrap());
        let mut said = Vec::new();
        match self.eval(script, keys, arguments) {
            Ok(value) => {
                self.note(by, keys, arguments, &value);
                encode(&value, &mut said);
            }
            Err(fault) => panic!("the script failed: {fault}"),
        }
        let published = {
            let mut shelf = self.0.shelf.lock().unwrap();
            let first = shelf.messages;
            let published = std::mem::take(&mut shelf.published);
            shelf.messages += published.len();
            (first..).zip(published).collect::<Vec<_>>()
        };
        for message in published {
            self.0.listeners.lock().unwrap().retain(|listener| listener.send(message.clone()).is_ok());
        }
        said
    }

    fn eval(&self, script: &[u8], keys: &[Vec<u8>], arguments: &[Vec<u8>]) -> mlua::Result<Value> {
        let Inner { lua, scripts, .. } = &*self.0;
        let function = {
            let mut scripts = scripts.lock().unwrap();
            match scripts.get(script) {
                Some(function) => function.clone(),
                None => {
                    let function = lua.load(script).into_function()?;
                    scripts.insert(script.to_vec(), function.clone());
                    function
                }
            }
        };
        for (name, words) in [("KEYS", keys), ("ARGV", arguments)] {
            let words: mlua::Result<Vec<_>> = words.iter().map(|word| lua.create_string(word)).collect();
            lua.globals().set(name, lua.create_sequence_from(words?)?)?;
        }
        function.call(())
    }

    /// What a script has done, as its answer shows it.
    fn note(&self, by: usize, keys: &[Vec<u8>], arguments: &[Vec<u8>], value: &Value) {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let (at, lease, token) = (Instant::now(), text(&keys[0]), text(&arguments[0]));
        // A lease is released alone, or with the start that came with it.
        let event = match (value, keys.len(), arguments.len()) {
            (Value::Table(looked), ..) if looked.get::<i64>(2).unwrap() == 1 => Event::Leased { at, by, lease, token },
            (Value::Table(_), ..) => return,
            (value, 1, 1) | (value, 2, 5) if text(keys.last().unwrap()).ends_with(":starts") || keys.len() == 1 => {
                if as_number(value) != Some(1) {
                    return;
                }
                Event::Released { token }
            }
            (value, _, 5) if as_number(value) == Some(1) => Event::Stored { at, token },
            (_, _, 5) => Event::Refused,
            _ => return,
        };
        self.0.events.lock().unwrap().push(event);
    }
}

fn as_number(value: &Value) -> Option<i64> {
    match value {
        Value::Integer(number) => Some(*number),
        Value::Number(number) => Some(*number as i64),
        _ => None,
    }
}

/// As Redis turns what a script gives into what it sends.
fn encode(value: &Value, said: &mut Vec<u8>) {
    match value {
        Value::String(text) => bulk(&text.as_bytes(), said),
        Value::Table(list) => {
            let list: Vec<Value> = list.sequence_values().collect::<mlua::Result<_>>().unwrap();
            said.extend(format!("*{}\r\n", list.len()).into_bytes());
            list.iter().for_each(|value| encode(value, said));
        }
        value => match as_number(value) {
            Some(number) => said.extend(format!(":{number}\r\n").into_bytes()),
            None => said.extend(b"$-1\r\n"),
        },
    }
}

fn bulk(bytes: &[u8], said: &mut Vec<u8>) {
    said.extend(format!("${}\r\n", bytes.len()).into_bytes());
    said.extend(bytes);
    said.extend(b"\r\n");
}

// === impl Link ===

impl Link {
    async fn stream(&self) -> Result<DuplexStream, RedisError> {
        if *self.weather.borrow() == Weather::Down {
            return Err(io::Error::from(io::ErrorKind::ConnectionRefused).into());
        }
        let (near, far) = tokio::io::duplex(1 << 20);
        let link = Self { store: self.store.clone(), weather: self.weather.clone(), random: Arc::clone(&self.random), ..*self };
        // It ends with the connection.
        tokio::spawn(async move { link.serve(far).await });
        Ok(near)
    }

    async fn serve(mut self, mut stream: DuplexStream) -> Option<()> {
        let (mut weather, mut unread) = (self.weather.clone(), Vec::new());
        loop {
            let words = tokio::select! {
                biased;
                _ = weather.wait_for(|weather| *weather == Weather::Down) => return None,
                words = next_question(&mut stream, &mut unread) => words?,
            };
            if words.first().is_some_and(|word| word == b"SUBSCRIBE") {
                return self.tell(stream, &words[1]).await;
            }
            let said = match self.fate() {
                Fate::Cut { heard: false } => return None,
                Fate::Cut { heard: true } => {
                    self.store.asked(self.replica, &words);
                    return None;
                }
                Fate::Heard { before, after } => {
                    sleep(Duration::from_millis(before)).await;
                    self.thawed().await;
                    let said = self.store.asked(self.replica, &words);
                    sleep(Duration::from_millis(after)).await;
                    self.thawed().await;
                    said
                }
            };
            stream.write_all(&said).await.ok()?;
        }
    }

    /// Tells what is published.
    async fn tell(mut self, mut stream: DuplexStream, channel: &[u8]) -> Option<()> {
        let (listener, mut news) = mpsc::unbounded_channel();
        self.store.0.listeners.lock().unwrap().push(listener);
        let mut said = b"*3\r\n".to_vec();
        bulk(b"subscribe", &mut said);
        bulk(channel, &mut said);
        said.extend(b":1\r\n");
        stream.write_all(&said).await.ok()?;
        let (mut weather, mut byte) = (self.weather.clone(), [0]);
        loop {
            let (message, payload) = tokio::select! {
                biased;
                _ = weather.wait_for(|weather| *weather == Weather::Down) => return None,
                _ = stream.read(&mut byte) => return None,
                news = news.recv() => news?,
            };
            let Fate::Heard { before, .. } = self.fate() else { return None };
            sleep(Duration::from_millis(before)).await;
            self.thawed().await;
            let mut said = b"*3\r\n".to_vec();
            bulk(b"message", &mut said);
            bulk(channel, &mut said);
            bulk(&payload, &mut said);
            stream.write_all(&said).await.ok()?;
            self.store.0.events.lock().unwrap().push(Event::Delivered { at: Instant::now(), to: self.replica, message });
        }
    }

    async fn thawed(&mut self) {
        drop(self.weather.wait_for(|weather| *weather != Weather::Frozen).await);
    }

    fn fate(&self) -> Fate {
        let (random, weather) = (&mut *self.random.lock().unwrap(), *self.weather.borrow());
        if weather != Weather::Stormy {
            return Fate::Heard { before: random.random_range(0..3), after: random.random_range(0..3) };
        }
        match random.random_range(0..100) {
            0..8 => Fate::Cut { heard: false },
            8..16 => Fate::Cut { heard: true },
            16..24 => Fate::Heard { before: random.random_range(400..3_000), after: 1 },
            24..32 => Fate::Heard { before: 1, after: random.random_range(360..1_500) },
            _ => Fate::Heard { before: random.random_range(0..30), after: random.random_range(0..30) },
        }
    }
}

/// The words of the next question. `None` once the other side has gone.
async fn next_question(stream: &mut DuplexStream, unread: &mut Vec<u8>) -> Option<Vec<Vec<u8>>> {
    loop {
        if let Some((words, length)) = question(unread) {
            unread.drain(..length);
            return Some(words);
        }
        if stream.read_buf(unread).await.ok()? == 0 {
            return None;
        }
    }
}

fn question(bytes: &[u8]) -> Option<(Vec<Vec<u8>>, usize)> {
    let number = |at: usize, sign: u8| {
        let line = bytes.get(at..)?;
        let ends = line.iter().position(|byte| *byte == b'\r')?;
        assert_eq!(line[0], sign, "no list of words");
        Some((String::from_utf8_lossy(&line[1..ends]).parse::<usize>().unwrap(), at + ends + 2))
    };
    let (many, mut at) = number(0, b'*')?;
    let mut words = Vec::with_capacity(many);
    for _ in 0..many {
        let (length, begins) = number(at, b'$')?;
        words.push(bytes.get(begins..begins + length)?.to_vec());
        at = begins + length + 2;
    }
    (bytes.len() >= at).then_some((words, at))
}

impl Connect for Link {
    fn connect(&self) -> Boxed<'_, Result<Commands, StoreFault>> {
        Box::pin(async {
            let config = AsyncConnectionConfig::new().set_response_timeout(None);
            let (connection, driver) = MultiplexedConnection::new_with_config(&settings(), self.stream().await?, config).await?;
            Ok(Commands::new(connection, driver))
        })
    }

    fn listen(&self) -> Boxed<'_, Result<Listening, StoreFault>> {
        Box::pin(async {
            let connection = PubSub::new(&settings(), self.stream().await?).await?;
            // There is one server.
            Ok(Listening { connection, moved: Box::pin(std::future::pending()) })
        })
    }
}

fn settings() -> RedisConnectionInfo {
    RedisConnectionInfo::default().set_skip_set_lib_name()
}
