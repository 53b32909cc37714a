//! The tier behind Sentinels: they say which server is the primary, and after a failover another one is.

use std::sync::atomic::{AtomicU16, Ordering};

use super::*;

const SERVICE: &str = "made-up-service";
/// A user of the Sentinels, with the rights that docs/scale.md gives to it.
const SENTINEL_USER: &str = "gate-of-sentinels";
pub(super) const SENTINEL_RIGHTS: &str = "-@all +sentinel|get-master-addr-by-name";
const SENTINEL_PASSWORD: &str = "made-up-sentinels-4e1b";

/// A Sentinel of its own, which watches one primary. Killed when it is dropped.
struct Sentinel {
    process: Store,
}

impl Sentinel {
    /// It knows its primary by this name.
    async fn start(service: &str, host: &str, primary: u16, more: &str) -> Self {
        let (port, folder) = (free_port(), tempfile::tempdir().unwrap());
        let path = folder.path().join("sentinel.conf");
        let text = format!(
            "port {port}\nbind 127.0.0.1\nuser default on >{ADMIN} ~* &* +@all\n\
             user {SENTINEL_USER} on >{SENTINEL_PASSWORD} {SENTINEL_RIGHTS}\n\
             sentinel resolve-hostnames yes\nsentinel announce-hostnames yes\n{more}\
             sentinel monitor {service} {host} {primary} 1\nsentinel auth-pass {service} {ADMIN}\n\
             sentinel down-after-milliseconds {service} 300\nsentinel failover-timeout {service} 2000\n"
        );
        fs::write(&path, text).unwrap();
        Self { process: Store::spawn(port, folder, &[path.to_str().unwrap().to_owned(), "--sentinel".to_owned()]).await }
    }

    /// The replicas that it has seen and that answer.
    async fn replicas(&self) -> usize {
        let replicas: Vec<std::collections::HashMap<String, String>> =
            self.process.does(&[b"SENTINEL", b"REPLICAS", SERVICE.as_bytes()]).await;
        replicas.iter().filter(|replica| replica["flags"] == "slave" && replica["master-link-status"] == "ok").count()
    }
}

/// A server that replicates another, or may have to.
async fn server(primary: Option<u16>) -> Store {
    let mut options = vec!["--masterauth".to_owned(), ADMIN.to_owned()];
    options.extend(primary.into_iter().flat_map(|port| ["--replicaof".to_owned(), "127.0.0.1".to_owned(), port.to_string()]));
    Store::start_at(free_port(), &options).await
}

/// `master`, `slave`, or nothing while it does not answer.
async fn role(store: &Store) -> String {
    let role: redis::RedisResult<Vec<redis::Value>> = store.tries(&[b"ROLE"]).await;
    role.map_or_else(|_| String::new(), |role| redis::from_redis_value_ref(&role[0]).unwrap())
}

/// The way by these Sentinels, with the usual timeout of a request.
fn way(store: &Store, sentinels: Vec<u16>) -> Way {
    let login = (SENTINEL_USER.to_owned(), SENTINEL_PASSWORD.to_owned());
    let sentinels = Some((sentinels, SERVICE.to_owned(), login));
    Way { sentinels, timeout: Duration::from_millis(350), ..store.way() }
}

/// The primary dies, or hangs without an end of its connections: the replicas go to the next one, for commands and for notices.
#[tokio::test(flavor = "multi_thread")]
async fn a_failover_is_followed() {
    for signal in ["-KILL", "-STOP"] {
        let first = server(None).await;
        let second = server(Some(first.port)).await;
        let closed = free_port();
        let frozen = Sentinel::start(SERVICE, "127.0.0.1", closed, "").await;
        frozen.process.signal("-STOP");
        // It names a primary that is away.
        let stale = Sentinel::start(SERVICE, "127.0.0.1", closed, "").await;
        let stranger = Sentinel::start("another-service", "127.0.0.1", first.port, "").await;
        let knows = Sentinel::start(SERVICE, "127.0.0.1", first.port, "").await;
        until("it knows the second", async || knows.replicas().await == 1).await;
        let sentinels = vec![closed, frozen.process.port, stale.process.port, stranger.process.port, knows.process.port];
        let prober = Scripted::new(Verdict::Valid);
        let [one, other] = [(), ()].map(|()| Replica::new(&way(&first, sentinels.clone()), &prober));
        assert_eq!(one.ask("made-up-known").await, ASKED);
        until("it is stored", async || first.observations().await.len() == 1).await;
        assert_eq!(other.ask("made-up-known").await, SHARED, "{signal}");
        until("both listen", async || first.listeners().await == 2).await;
        first.signal(signal);
        until_they_share("failover", &one, &other, &prober).await;
        assert!(role(&second).await == "master" && !second.observations().await.is_empty(), "{signal}");
        until("both listen to the second", async || second.listeners().await == 2).await;
        let last = "made-up-last";
        assert_eq!(other.ask(last).await.0, Verdict::Valid);
        prober.verdict(Verdict::Invalid);
        // Its VALID would count for 30 seconds. A refusal that a fault kept from the store is found again.
        until("the other hears of it", async || {
            one.ask_no_older(last, Some(Duration::ZERO)).await;
            other.ask(last).await.0 == Verdict::Invalid
        })
        .await;
    }
}

/// The primary gives its place to another and lives on as a replica, which writes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_primary_that_is_one_no_more_is_left() {
    let first = server(None).await;
    let second = server(Some(first.port)).await;
    let sentinel = Sentinel::start(SERVICE, "127.0.0.1", first.port, "").await;
    until("it knows the second", async || sentinel.replicas().await == 1).await;
    let prober = Scripted::new(Verdict::Valid);
    let [one, other] = [(), ()].map(|()| Replica::new(&way(&first, vec![sentinel.process.port]), &prober));
    until_they_share("first", &one, &other, &prober).await;
    until("both listen", async || first.listeners().await == 2).await;
    sentinel.process.does::<()>(&[b"SENTINEL", b"FAILOVER", SERVICE.as_bytes()]).await;
    until("the second is the primary", async || role(&second).await == "master").await;
    until("the first is a replica", async || role(&first).await == "slave").await;
    until_they_share("second", &one, &other, &prober).await;
    until("both listen to the second", async || second.listeners().await == 2).await;
    // The address of the settings may lead to a replica too, as a name whose entry changes late. No connection to one is kept.
    let target = Arc::new(AtomicU16::new(first.port));
    let direct = Replica::new(&Way { port: leading_to(&target).await, ..first.way() }, &prober);
    assert_eq!(direct.ask("made-up-direct-1").await, ASKED);
    assert_eq!((direct.looks("fault"), direct.looks("lease")), (1.0, 0.0));
    target.store(second.port, Ordering::Relaxed);
    assert_eq!(direct.ask("made-up-direct-2").await, ASKED);
    assert_eq!((direct.looks("fault"), direct.looks("lease")), (1.0, 1.0));
}

/// A port whose new connections go to the server at this one.
async fn leading_to(target: &Arc<AtomicU16>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, target) = (listener.local_addr().unwrap().port(), Arc::clone(target));
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut server = TcpStream::connect((Ipv4Addr::LOCALHOST, target.load(Ordering::Relaxed))).await.unwrap();
            tokio::spawn(async move { drop(tokio::io::copy_bidirectional(&mut client, &mut server).await) });
        }
    });
    port
}

/// Another server is behind the address, while the first one lives on: notices are heard from the one that commands go to.
#[tokio::test(flavor = "multi_thread")]
async fn notices_are_heard_from_the_server_that_is_behind_the_address_now() {
    let (first, second) = (server(None).await, server(None).await);
    let target = Arc::new(AtomicU16::new(first.port));
    let replica = Replica::new(&Way { port: leading_to(&target).await, ..first.way() }, &Scripted::new(Verdict::Valid));
    until("it listens to the first", async || first.listeners().await == 1).await;
    assert_eq!(replica.ask("made-up-0").await, ASKED);
    target.store(second.port, Ordering::Relaxed);
    first.does::<u64>(&[b"CLIENT", b"KILL", b"TYPE", b"normal"]).await;
    let mut index = 0;
    until("it listens to the second", async || {
        index += 1;
        assert_eq!(replica.ask(&format!("made-up-{index}")).await, ASKED);
        second.listeners().await == 1
    })
    .await;
    assert_eq!(first.listeners().await, 0);
}

/// A Sentinel that knows nothing but that this is the primary, and is faster than any other.
async fn saying(primary: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let named = format!("*2\r\n$9\r\n127.0.0.1\r\n${}\r\n{primary}\r\n", primary.to_string().len());
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let named = named.clone();
            tokio::spawn(async move {
                let mut bytes = vec![0; 4096];
                while let Ok(read @ 1..) = client.read(&mut bytes).await {
                    let words = String::from_utf8_lossy(&bytes[..read]).into_owned();
                    let reply = match words.as_str() {
                        words if words.contains("SENTINEL") => &named,
                        words if words.contains("HELLO") => "-ERR unknown command 'HELLO'\r\n",
                        _ => "+OK\r\n",
                    };
                    client.write_all(reply.as_bytes()).await.unwrap();
                }
            });
        }
    });
    port
}

/// The first answer is of a Sentinel that names a primary which gave its place up and lives.
#[tokio::test]
async fn a_sentinel_that_is_out_of_date_is_passed_over() {
    let second = server(None).await;
    let first = server(Some(second.port)).await;
    until("the first is a replica", async || role(&first).await == "slave").await;
    let sentinel = Sentinel::start(SERVICE, "127.0.0.1", second.port, "").await;
    let prober = Scripted::new(Verdict::Valid);
    let late = slowed(sentinel.process.port, [0, 20]).await;
    let stale = saying(first.port).await;
    let replica = Replica::new(&Way { timeout: Duration::from_secs(2), ..way(&first, vec![stale, late]) }, &prober);
    for index in 0..3 {
        assert_eq!(replica.ask(&format!("made-up-{index}")).await, ASKED);
    }
    assert_eq!((replica.looks("lease"), replica.looks("fault")), (3.0, 0.0));
    until("it is stored", async || !second.observations().await.is_empty()).await;
    until("it listens", async || second.listeners().await == 1).await;
    // Alone it is a fault that says so, and not one that is left alone for being the last.
    let log = Log::start();
    let replica = Replica::new(&way(&first, vec![stale, free_port()]), &prober);
    assert_eq!((replica.ask("made-up").await, replica.looks("fault")), (ASKED, 1.0));
    let events = log.events("tier_fault");
    assert!(events[0]["error"].as_str().unwrap().contains("no primary"), "{events:?}");
    assert_eq!(events[0]["server"], format!("127.0.0.1:{}", first.port));
}

/// Without a primary, or Sentinels that know it or take the password, there is as good as no tier.
#[tokio::test]
async fn sentinels_that_name_no_primary_are_as_no_store() {
    let store = server(None).await;
    let stranger = Sentinel::start("another-service", "127.0.0.1", store.port, "").await;
    let knows = Sentinel::start(SERVICE, "127.0.0.1", store.port, "").await;
    let prober = Scripted::new(Verdict::Valid);
    let mut refused = way(&store, vec![knows.process.port]);
    if let Some((_, _, (_, password))) = &mut refused.sentinels {
        *password = "made-up-wrong".to_owned();
    }
    let (known, closed) = (knows.process.port, free_port());
    let locked = Way { login: Some((USER.to_owned(), "made-up-wrong".to_owned())), ..way(&store, vec![known]) };
    for (way, kind, server) in [
        (way(&store, vec![stranger.process.port, closed]), "master name not found by sentinel", stranger.process.port),
        (way(&store, vec![closed]), "I/O error", closed),
        (refused, "authentication failed", known),
        (locked, "authentication failed", store.port),
        (
            Way { login: Some((SENTINEL_USER.to_owned(), SENTINEL_PASSWORD.to_owned())), ..Way::to(known) },
            "invalid client config",
            known,
        ),
    ] {
        let log = Log::start();
        let replica = Replica::new(&way, &prober);
        for index in 0..6 {
            assert_eq!(replica.ask(&format!("made-up-{index}")).await, ASKED);
        }
        assert_eq!((replica.looks("fault"), replica.looks("left_alone")), (5.0, 1.0));
        let events = log.events("tier_left_alone");
        assert_eq!((&events[0]["kind"], &events[0]["server"]), (&kind.into(), &format!("127.0.0.1:{server}").into()));
    }
    assert!(store.keys().await.is_empty());
    let replica = Replica::new(&way(&store, vec![knows.process.port]), &prober);
    assert_eq!((replica.ask("made-up").await, replica.looks("lease")), (ASKED, 1.0));
}

/// Sentinels and primary ask for a certificate, and show one for the name that the Sentinels give.
#[tokio::test]
async fn sentinels_are_asked_over_tls() {
    let (folder, clients) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (trusted, _) = certificate(folder.path());
    let identity = certificate(clients.path());
    let tls = free_port();
    let store = Store::start_at(free_port(), &tls_options(folder.path(), tls, Some(clients.path()))).await;
    // The Sentinel has one certificate, for clients and to the primary: the primary takes the replicas' own.
    let sentinel_port = free_port();
    let path = |folder: &Path, name: &str| folder.join(name).to_str().unwrap().to_owned();
    let more = format!(
        "tls-port {sentinel_port}\ntls-replication yes\ntls-cert-file {}\ntls-key-file {}\ntls-ca-cert-file {}\n\
         tls-client-cert-file {}\ntls-client-key-file {}\n",
        path(folder.path(), "cert.pem"),
        path(folder.path(), "key.pem"),
        path(clients.path(), "cert.pem"),
        path(clients.path(), "cert.pem"),
        path(clients.path(), "key.pem"),
    );
    let _sentinel = Sentinel::start(SERVICE, "localhost", tls, &more).await;
    let prober = Scripted::new(Verdict::Valid);
    let with = |identity| {
        let way = Way { ca: Some(trusted.clone()), identity, ..way(&store, vec![sentinel_port]) };
        Replica::new(&Way { timeout: Duration::from_secs(2), ..way }, &prober)
    };
    assert_eq!(with(Some(identity.clone())).ask("made-up").await, ASKED);
    until("it is stored", async || store.observations().await.len() == 1).await;
    assert_eq!(with(Some(identity)).ask("made-up").await, SHARED);
    let stranger = with(None);
    assert_eq!((stranger.ask("made-up").await, stranger.looks("fault")), (ASKED, 1.0));
}
