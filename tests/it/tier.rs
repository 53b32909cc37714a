//! The shared tier without a real store: the cost of its faults, and its settings. `tests/tier` uses a real one.

use std::{collections::BTreeSet, fs, net::SocketAddr, os::unix::fs::PermissionsExt, sync::Arc, time::Duration};

use byok_gate::{
    config::{self, Overrides, Paths},
    domain::verdict::{ServedFrom, Verdict},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    sync::mpsc,
    time::timeout,
};

use crate::support::{
    binary::{self, PATIENCE, Serving},
    edge::{Authority, ask_status},
    page::say,
    prober::Scripted,
    tier::{KEY, Replica, Way},
};

/// What a listener that is not a store does with a connection.
#[derive(Clone, Copy, PartialEq)]
enum Odd {
    /// Answers everything with this.
    Says(&'static [u8]),
    /// Reads everything and sends nothing.
    Silent,
    /// Hangs up.
    Closes,
}

const GIVES_FOR_EVER: &str = "values that will not do, whatever is passed over";

async fn odd_listener(odd: Odd) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut bytes = [0; 4096];
                while odd != Odd::Closes && stream.read(&mut bytes).await.is_ok_and(|read| read > 0) {
                    if let Odd::Says(garbage) = odd
                        && stream.write_all(garbage).await.is_err()
                    {
                        break;
                    }
                }
            });
        }
    });
    port
}

/// With anything at the tier's address, each answer comes from the provider, with one call each; after five faults the tier is suspended.
#[tokio::test]
async fn a_tier_that_is_none_costs_no_call_and_changes_no_answer() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let mut ports = vec![("nothing listens", closed)];
    for (what, odd) in [
        ("garbage", Odd::Says(b"garbage\r\n")),
        ("an HTTP server", Odd::Says(b"HTTP/1.1 400 Bad Request\r\n\r\n")),
        ("a length that never comes", Odd::Says(b"$999999999\r\nx")),
        ("every answer is 1", Odd::Says(b":1\r\n")),
        ("an empty reply", Odd::Says(b"*0\r\n")),
        (GIVES_FOR_EVER, Odd::Says(b"*6\r\n:1\r\n:0\r\n:0\r\n*2\r\n$1\r\nx\r\n$1\r\nx\r\n:0\r\n:0\r\n")),
        ("an error", Odd::Says(b"-WRONGPASS invalid username-password pair\r\n")),
        ("silence", Odd::Silent),
        ("it hangs up", Odd::Closes),
    ] {
        ports.push((what, odd_listener(odd).await));
    }
    for (what, port) in ports {
        let prober = Scripted::new(Verdict::Valid);
        let replica = Replica::new(&Way { timeout: Duration::from_millis(60), ..Way::to(port) }, &prober);
        for index in 0..8 {
            let value = format!("made-up-{index}");
            assert_eq!(replica.ask(&value).await, (Verdict::Valid, ServedFrom::Probe), "{what}");
            assert_eq!(replica.ask(&value).await, (Verdict::Valid, ServedFrom::Cache), "{what}");
        }
        prober.verdict(Verdict::Invalid);
        assert_eq!(replica.ask("made-up-dead").await, (Verdict::Invalid, ServedFrom::Probe), "{what}");
        assert_eq!(prober.asked(), 9, "{what}");
        assert!(!replica.explained("made-up-dead").await.contains("shared"), "{what}");
        let looks = |result: &str| replica.looks(result);
        assert_eq!((looks("hit"), looks("lease")), (0.0, 0.0), "{what}");
        if what == GIVES_FOR_EVER {
            // It answers in time and in form: its replies are checked each time.
            assert_eq!(looks("gave_up"), 9.0, "{}", replica.page().text);
            continue;
        }
        // A pause may end meanwhile: then there was a trial.
        assert!(looks("fault") >= 5.0 && looks("fault") + looks("left_alone") == 9.0, "{what}: {}", replica.page().text);
        replica.page().is("byokgate_tier_in_use", 0.0);
    }
}

/// A store that replies to a command and then publishes a notice, both without end, tells for each connection how many bytes were taken.
async fn endless_store() -> (u16, mpsc::UnboundedReceiver<(&'static str, usize)>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (taken, told) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let taken = taken.clone();
            tokio::spawn(async move {
                let mut bytes = [0; 16 * 1024];
                while let Ok(read @ 1..) = stream.read(&mut bytes).await {
                    let said = String::from_utf8_lossy(&bytes[..read]).into_owned();
                    let (what, begins) = if said.contains("HELLO") {
                        stream.write_all(b"*0\r\n").await.unwrap();
                        continue;
                    } else if said.contains("SUBSCRIBE") {
                        let subscribed = "*3\r\n$9\r\nsubscribe\r\n$8\r\nbg1:news\r\n:1\r\n";
                        ("notice", format!("{subscribed}*3\r\n$7\r\nmessage\r\n$8\r\nbg1:news\r\n$536870912\r\n"))
                    } else {
                        ("reply", "$536870912\r\n".to_owned())
                    };
                    stream.write_all(begins.as_bytes()).await.unwrap();
                    let (mut sent, part) = (0, vec![b'x'; 1 << 20]);
                    while sent < MUCH && stream.write_all(&part).await.is_ok() {
                        sent += part.len();
                    }
                    if taken.send((what, sent)).is_err() {
                        return;
                    }
                }
            });
        }
    });
    (port, told)
}

/// More than fits into a socket's buffers.
const MUCH: usize = 64 << 20;

/// Whoever may write to the store, or publish, cannot fill the memory of the replicas.
#[tokio::test]
async fn replies_and_notices_without_end_are_not_taken_in() {
    let (port, mut told) = endless_store().await;
    let prober = Scripted::new(Verdict::Valid);
    let replica = Replica::new(&Way { timeout: PATIENCE, ..Way::to(port) }, &prober);
    assert_eq!(replica.ask("made-up-1").await, (Verdict::Valid, ServedFrom::Probe));
    let mut seen = BTreeSet::new();
    while seen.len() < 2 {
        let (what, taken) = timeout(PATIENCE, told.recv()).await.unwrap().unwrap();
        assert!(taken < MUCH, "{what}");
        seen.insert(what);
    }
}

/// No answer waits for the tier twice, and concurrent callers wait in parallel.
#[tokio::test]
async fn a_storm_meets_a_silent_tier_once() {
    let prober = Scripted::new(Verdict::Valid);
    let replica = Arc::new(Replica::new(&Way::to(odd_listener(Odd::Silent).await), &prober));
    let calls: Vec<_> = (0..200)
        .map(|index| {
            let replica = Arc::clone(&replica);
            tokio::spawn(async move { replica.ask(&format!("made-up-{}", index / 2)).await })
        })
        .collect();
    for call in calls {
        assert_eq!(call.await.unwrap().0, Verdict::Valid);
    }
    assert_eq!(prober.asked(), 100);
}

/// A store that refuses the right to subscribe: the page says what that means, and which right is missing.
#[tokio::test]
async fn refusals_that_cannot_be_heard_are_under_attention() {
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    fs::write(&key, KEY).unwrap();
    let address = format!("redis://127.0.0.1:{}", odd_listener(Odd::Says(b"-NOPERM this user has no permissions\r\n")).await);
    let environment = [("BYOK_GATE__TIER__ADDRESS", address.as_str()), ("BYOK_GATE__TIER__KEY_FILE", key.to_str().unwrap())];
    let serving = Serving::start_in(&["--admin-listen", "127.0.0.1:0"], &environment).await;
    let event = serving.until("tier_not_listening").await;
    assert_eq!((&event["level"], &event["code"], &event["kind"]), (&"WARN".into(), &"NOPERM".into(), &"no permission".into()));
    assert!(address.ends_with(event["server"].as_str().unwrap()), "{event}");
    let admin = serving.event("admin_listening")["address"].as_str().unwrap().parse().unwrap();
    let status = say(admin, "GET /status.json HTTP/1.1\r\nhost: gate\r\n\r\n").await.body;
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let attention = status["attention"].to_string();
    assert!(attention.contains("refusals that other replicas see are not heard"), "{attention}");
    assert!(attention.contains("+subscribe") && attention.contains("&bg1:*"), "{attention}");
}

fn settled(text: &str) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.yaml");
    fs::write(&path, text).unwrap();
    let paths = Paths { config: Some(path), ..Paths::default() };
    config::settings_of(&paths, &Overrides::default(), std::iter::empty()).map(drop).map_err(|fault| fault.to_string())
}

#[test]
fn a_tier_needs_an_encrypted_address_a_key_and_callers_of_equal_trust() {
    for good in [
        "tier: {address: 'rediss://valkey:6380', key_file: /k, ca_file: /c, user: gate, password_file: /p}",
        "tier: {address: 'redis://127.0.0.1', key_file: /k}",
        "tier: {address: 'rediss://valkey', key_file: /k, client_certificate_file: /c, client_key_file: /d}",
        "tier: {sentinel: {service: s, addresses: ['rediss://s1', 'rediss://s2:26380']}, key_file: /k}",
        "tier: {sentinel: {service: s, addresses: ['rediss://s'], user: u, password_file: /p}, key_file: /k, ca_file: /c}",
        "tier: {cluster: {addresses: ['rediss://n1', 'rediss://n2:6380']}, key_file: /k, ca_file: /c}",
        "tier: {timeout: 100ms}",
        "callers: {unix_peers: [{uid: 1, role: workspace, workspaces: [w]}]}",
        "tier: {address: 'rediss://valkey', key_file: /k}\ncallers: {unix_peers: [{uid: 1}]}",
    ] {
        assert_eq!(settled(good), Ok(()), "{good}");
    }
    for (wrong, what) in [
        (
            "tier: {address: 'redis://valkey', key_file: /k}",
            "tier.address: is beyond this machine and not encrypted; use rediss://",
        ),
        ("tier: {address: valkey, key_file: /k}", "tier.address: is no URL"),
        ("tier: {address: 'rediss://valkey'}", "tier.key_file: is required with tier.address"),
        ("tier: {address: 'rediss://valkey', key_file: /k, user: gate}", "tier.password_file: is required with tier.user"),
        ("tier: {address: 'redis://[::1]', key_file: /k, ca_file: /c}", "tier.ca_file: is for rediss://"),
        (
            "tier: {address: 'redis://[::1]', key_file: /k, client_certificate_file: /c, client_key_file: /d}",
            "tier.client_certificate_file: is for rediss://",
        ),
        (
            "tier: {address: 'rediss://valkey', key_file: /k, client_certificate_file: /c}",
            "tier.client_key_file: is required with tier.client_certificate_file",
        ),
        (
            "tier: {address: 'rediss://valkey', key_file: /k, client_key_file: /c}",
            "tier.client_certificate_file: is required with tier.client_key_file",
        ),
        ("tier: {client_key_file: /k}", "tier.client_key_file: is set, and none of tier.address, tier.sentinel and tier.cluster"),
        ("tier: {key_file: /k}", "tier.key_file: is set, and none of tier.address, tier.sentinel and tier.cluster"),
        ("tier: {user: gate}", "tier.user: is set, and none of tier.address, tier.sentinel and tier.cluster"),
        ("tier: {sentinel: {user: u}}", "tier.sentinel.user: is set, and none of tier.address, tier.sentinel and tier.cluster"),
        ("tier: {sentinel: {service: s}, key_file: /k}", "tier.sentinel.addresses: is required with tier.sentinel.service"),
        ("tier: {sentinel: {addresses: ['rediss://s']}, key_file: /k}", "tier.sentinel.service: is required with"),
        ("tier: {sentinel: {service: s, addresses: ['rediss://s']}}", "tier.key_file: is required with tier.sentinel"),
        (
            "tier: {sentinel: {service: s, addresses: ['rediss://s'], user: u}, key_file: /k}",
            "tier.sentinel.password_file: is required with tier.sentinel.user",
        ),
        (
            "tier: {address: 'rediss://v', sentinel: {service: s, addresses: ['rediss://s']}, key_file: /k}",
            "tier.sentinel: is set beside tier.address",
        ),
        (
            "tier: {sentinel: {service: s, addresses: ['rediss://s', 'redis://s']}, key_file: /k}",
            "tier.sentinel.addresses[1]: is beyond this machine and not encrypted",
        ),
        (
            "tier: {sentinel: {service: s, addresses: ['rediss://s', 'redis://[::1]']}, key_file: /k}",
            "tier.sentinel.addresses: mixes rediss:// and redis://",
        ),
        (
            "tier: {sentinel: {service: s, addresses: ['rediss://s/1']}, key_file: /k}",
            "tier.sentinel.addresses[0]: selects a database; here it is 0",
        ),
        (
            "tier: {sentinel: {service: s, addresses: [a,b,c,d,e,f,g,h,i,j,k,l,m,n,o,p,q]}, key_file: /k}",
            "tier.sentinel.addresses: holds 17 addresses; 16 are enough",
        ),
        (
            "tier: {sentinel: {service: s, addresses: ['redis://[::1]']}, key_file: /k, ca_file: /c}",
            "tier.ca_file: is for rediss://",
        ),
        ("tier: {cluster: {addresses: ['rediss://n']}}", "tier.key_file: is required with tier.cluster"),
        ("tier: {cluster: {addresses: ['redis://n']}, key_file: /k}", "tier.cluster.addresses[0]: is beyond this machine"),
        (
            "tier: {cluster: {addresses: ['rediss://n/1']}, key_file: /k}",
            "tier.cluster.addresses[0]: selects a database; here it is 0",
        ),
        (
            "tier: {address: 'rediss://v', cluster: {addresses: ['rediss://n']}, key_file: /k}",
            "tier.cluster: is set beside tier.address",
        ),
        (
            "tier: {cluster: {addresses: ['rediss://n']}, sentinel: {service: s, addresses: ['rediss://s']}, key_file: /k}",
            "tier.cluster: is set beside tier.sentinel",
        ),
        (
            "tier: {address: 'rediss://v', sentinel: {user: u}, key_file: /k}",
            "tier.sentinel.user: is set without tier.sentinel.addresses",
        ),
        (
            "tier: {cluster: {addresses: ['rediss://n']}, sentinel: {password_file: /p}, key_file: /k}",
            "tier.sentinel.password_file: is set without tier.sentinel.addresses",
        ),
        ("tier: {address: 'rediss://v', user: '', password_file: /p, key_file: /k}", "tier.user: is empty: leave it out for the"),
        (
            "tier: {sentinel: {service: s, addresses: ['rediss://s'], user: '', password_file: /p}, key_file: /k}",
            "tier.sentinel.user: is empty: leave it out for the",
        ),
        (
            "tier: {address: 'rediss://v', password_file: /k, key_file: /k}",
            "tier.password_file: is the same file as tier.key_file",
        ),
        (
            "tier: {sentinel: {service: s, addresses: ['rediss://s'], password_file: /k}, key_file: /k}",
            "tier.sentinel.password_file: is the same file as tier.key_file",
        ),
        ("tier: {sentinel: {adresses: []}}", "the nearest is `tier.sentinel.addresses`"),
        (
            "tier: {sentinel: {service: s, addresses: ['rediss://s']}, key_file: /k}\n\
             callers: {unix_peers: [{uid: 1, role: workspace, workspaces: [w]}]}",
            "tier.sentinel: is set beside a `workspace` caller (callers.unix_peers)",
        ),
        ("tier: {timeout: 10ms}", "tier.timeout: is 10ms; it must be 50ms to 2s"),
        ("tier: {addres: 'rediss://valkey'}", "the nearest is `tier.address`"),
        (
            "tier: {address: 'rediss://valkey', key_file: /k}\ncallers: {unix_peers: [{uid: 1, role: workspace, workspaces: [w]}]}",
            "tier.address: is set beside a `workspace` caller (callers.unix_peers)",
        ),
        (
            "tier: {address: 'rediss://valkey', key_file: /k}\ntls: {certificate: /c, key: /k, client_ca: /a}\n\
             callers: {certificates: [{san: a.example, role: workspace, workspaces: [w]}]}",
            "tier.address: is set beside a `workspace` caller (callers.certificates)",
        ),
    ] {
        let fault = settled(wrong).unwrap_err();
        assert!(fault.contains(what), "{wrong}: {fault}");
    }
}

/// Only `serve` and `check` read the files of these settings, and errors name the file.
#[tokio::test]
async fn serve_and_check_read_its_files_and_exec_refuses_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (key, password) = (path("key"), path("password"));
    let environment = [
        ("BYOK_GATE__TIER__ADDRESS", "rediss://valkey.example:6380"),
        ("BYOK_GATE__TIER__KEY_FILE", key.as_str()),
        ("BYOK_GATE__TIER__USER", "gate"),
        ("BYOK_GATE__TIER__PASSWORD_FILE", password.as_str()),
    ];
    fs::write(&password, "made-up-canary-password\n").unwrap();
    for (text, what) in [
        (None, "tier.key_file: could not be read"),
        (Some(""), "is empty, and has to hold a secret"),
        (Some("made-up-canary"), "key 1 is shorter than 32 characters"),
    ] {
        if let Some(text) = text {
            fs::write(&key, text).unwrap();
        }
        for command in [&["serve", "--listen", "127.0.0.1:0"][..], &["check"]] {
            let ended = binary::run(command, &environment).await;
            let said = format!("{}{}", ended.stdout, ended.stderr);
            assert!(!ended.status.success() && said.contains(what) && said.contains(&key), "{command:?} {text:?}: {said}");
            assert!(!said.contains("canary"), "{said}");
        }
    }
    fs::write(&key, KEY).unwrap();
    client_certificates_are_checked(&folder, &environment).await;
    let ended = binary::run(&["check"], &environment).await;
    assert!(ended.status.success(), "{ended:?}");
    let readable = format!("warning: {key}: tier.key_file: holds a secret, and every user of this machine can read it");
    assert!(ended.stdout.contains(&readable), "{ended:?}");
    fs::write(&password, "made-up-canary-password\nmade-up-canary-older\n").unwrap();
    for command in [&["serve", "--listen", "127.0.0.1:0"][..], &["check"]] {
        let ended = binary::run(command, &environment).await;
        let said = format!("{}{}", ended.stdout, ended.stderr);
        let what = "tier.password_file: holds more than one line";
        assert!(!ended.status.success() && said.contains(what) && said.contains(&password) && !said.contains("canary"), "{said}");
    }
    fs::write(&password, "made-up-canary-password\n").unwrap();
    let of_sentinels = path("sentinel-password");
    let by_sentinels = [
        ("BYOK_GATE__TIER__SENTINEL__SERVICE", "made-up"),
        ("BYOK_GATE__TIER__SENTINEL__ADDRESSES", "rediss://s1.example, rediss://s2.example:26380"),
        ("BYOK_GATE__TIER__SENTINEL__PASSWORD_FILE", of_sentinels.as_str()),
        ("BYOK_GATE__TIER__KEY_FILE", key.as_str()),
    ];
    let ended = binary::run(&["check"], &by_sentinels).await;
    let said = format!("{}{}", ended.stdout, ended.stderr);
    assert!(said.contains(&of_sentinels) && said.contains("tier.sentinel.password_file: could not be read"), "{said}");
    fs::write(&of_sentinels, "made-up-canary-password\n").unwrap();
    let ended = binary::run(&["check"], &by_sentinels).await;
    assert!(ended.status.success(), "{ended:?}");
    // Where the files are not, they are not looked for.
    fs::remove_file(&key).unwrap();
    let ended = binary::run(&["check", "--elsewhere"], &environment).await;
    assert!(ended.status.success(), "{ended:?}");
    let ended =
        binary::run(&["exec", "--runtime", "claude-code", "--model", "claude-opus-4-8", "--", "true"], &environment).await;
    assert!(
        !ended.status.success() && ended.stderr.contains("tier.address: is set: the shared tier is for `serve`"),
        "{ended:?}"
    );
}

/// A client certificate that cannot be used is an error at start, which names the setting and the file.
async fn client_certificates_are_checked(folder: &TempDir, environment: &[(&str, &str)]) {
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (certificate, key) = (path("client.pem"), path("client-key.pem"));
    let environment: Vec<(&str, &str)> = environment
        .iter()
        .copied()
        .chain([
            ("BYOK_GATE__TIER__CLIENT_CERTIFICATE_FILE", certificate.as_str()),
            ("BYOK_GATE__TIER__CLIENT_KEY_FILE", key.as_str()),
        ])
        .collect();
    let [signed, other] = [(), ()].map(|()| rcgen::generate_simple_self_signed(vec!["gate.example".to_owned()]).unwrap());
    let (good, right, wrong) = (signed.cert.pem(), signed.signing_key.serialize_pem(), other.signing_key.serialize_pem());
    let past = Authority::new().sign_until("gate.example", 2002);
    for (of_certificate, of_key, what) in [
        (None, Some(&right), "tier.client_certificate_file: could not be read"),
        (Some(&good), None, "tier.client_key_file: could not be read"),
        (
            Some(&past.certificate),
            Some(&past.key),
            "tier.client_certificate_file: the certificate expired at 2002-01-01T00:00:00Z",
        ),
        (Some(&right), Some(&right), "tier.client_certificate_file: holds no certificate in PEM"),
        (Some(&good), Some(&good), "tier.client_key_file: holds no private key in PEM"),
        (Some(&good), Some(&wrong), "tier.client_key_file: is not the key of the certificate in tier.client_certificate_file"),
    ] {
        for (path, text) in [(&certificate, of_certificate), (&key, of_key)] {
            match text {
                Some(text) => fs::write(path, text).unwrap(),
                None => drop(fs::remove_file(path)),
            }
        }
        for command in [&["serve", "--listen", "127.0.0.1:0"][..], &["check"]] {
            let ended = binary::run(command, &environment).await;
            let said = format!("{}{}", ended.stdout, ended.stderr);
            let file = if what.starts_with("tier.client_key_file") { &key } else { &certificate };
            assert!(!ended.status.success() && said.contains(what) && said.contains(file), "{command:?} {what}: {said}");
            assert!(right.lines().all(|line| line.starts_with("-----") || !said.contains(line)), "{said}");
        }
    }
    fs::write(&key, &right).unwrap();
    let ended = binary::run(&["check"], &environment).await;
    assert!(ended.status.success() && ended.stdout.contains("every user of this machine can read it"), "{ended:?}");
}

/// A file that its owner alone may read.
fn private(folder: &TempDir, name: &str, text: &str) -> String {
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A process that holds the tier's key serves no workspace, whichever list names it: neither from the start nor after a reload.
#[tokio::test]
async fn a_workspace_token_and_a_tier_exclude_each_other() {
    const PLATFORM: &str = "made-up-platform-token-0123456789";
    const WORKSPACE: &str = "made-up-workspace-canary-0123456789";
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| private(&folder, name, text);
    let both = format!("{PLATFORM}\n{WORKSPACE} workspace w\n");
    let (key, tokens) = (put("key", KEY), put("tokens", &both));
    let environment = [
        ("BYOK_GATE__TIER__ADDRESS", "redis://127.0.0.1:1"),
        ("BYOK_GATE__TIER__KEY_FILE", key.as_str()),
        ("BYOK_GATE__CALLERS__TOKEN_FILE", tokens.as_str()),
        ("BYOK_GATE__ADMIN__LISTEN", "127.0.0.1:0"),
        ("BYOK_GATE__SERVER__RELOAD_INTERVAL", "100ms"),
    ];
    let wrong = "names a `workspace` caller beside tier.address";
    for command in [&["serve", "--listen", "127.0.0.1:0"][..], &["check"], &["check", "--strict"]] {
        let ended = binary::run(command, &environment).await;
        let said = format!("{}{}", ended.stdout, ended.stderr);
        assert!(!ended.status.success() && said.contains(wrong) && said.contains(&tokens), "{command:?}: {said}");
        assert!(!said.contains("canary"), "{said}");
    }
    // Without the tier the same tokens are good.
    let ended = binary::run(&["check", "--strict"], &environment[2..]).await;
    assert!(ended.status.success(), "{ended:?}");
    put("tokens", &format!("{PLATFORM}\n"));
    let serving = Serving::start_in(&[], &environment).await;
    let admin: SocketAddr = serving.event("admin_listening")["address"].as_str().unwrap().parse().unwrap();
    put("tokens", &both);
    let failed = serving.until("reload_failed").await;
    assert!(failed["what"] == "tokens" && failed["fault"].as_str().unwrap().contains(wrong), "{failed}");
    let ask = async |token: &str| ask_status(serving.channel().await, Some(&format!("Bearer {token}"))).await;
    assert_eq!((ask(PLATFORM).await, ask(WORKSPACE).await), (tonic::Code::Ok, tonic::Code::Unauthenticated));
    let page = say(admin, "GET /status.json HTTP/1.1\r\nhost: gate\r\n\r\n").await.body;
    assert!(page.contains(wrong) && !page.contains("canary"), "{page}");
}

/// A file of authorities that holds none is an error at start, which names the setting and the file, and not one of the first connection.
#[tokio::test]
async fn a_file_of_authorities_holds_certificates() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| private(&folder, name, text);
    let authority = Authority::new();
    let (pem, server) = (authority.pem(), authority.sign("localhost"));
    let (key, certificate, of_server) = (put("key", KEY), put("server.pem", &server.certificate), put("server.key", &server.key));
    let file = put("authorities", &pem);
    let environment = |setting: &'static str| {
        let tls = setting == "BYOK_GATE__TLS__CLIENT_CA";
        let of_tls = [("BYOK_GATE__TLS__CERTIFICATE", certificate.as_str()), ("BYOK_GATE__TLS__KEY", of_server.as_str())];
        let of_tier = [("BYOK_GATE__TIER__ADDRESS", "rediss://valkey.example"), ("BYOK_GATE__TIER__KEY_FILE", key.as_str())];
        let always = [("BYOK_GATE__CALLERS__CERTIFICATES", "anyone"), (setting, file.as_str())];
        (if tls { of_tls } else { of_tier }).into_iter().chain(always.into_iter().skip(usize::from(!tls))).collect::<Vec<_>>()
    };
    for (variable, setting) in [
        ("BYOK_GATE__TIER__CA_FILE", "tier.ca_file: "),
        ("BYOK_GATE__PROBE__CA_FILE", "probe.ca_file: "),
        ("BYOK_GATE__TRACING__CA_FILE", "tracing.ca_file: "),
        ("BYOK_GATE__TLS__CLIENT_CA", ""),
    ] {
        let environment = environment(variable);
        put("authorities", &pem);
        let ended = binary::run(&["check", "--strict"], &environment).await;
        assert!(ended.status.success(), "{variable}: {ended:?}");
        let half = &pem[..pem.len() / 2];
        for text in ["", "made-up-canary", &server.key, half, &format!("{pem}{half}")] {
            put("authorities", text);
            for command in [&["serve", "--listen", "127.0.0.1:0"][..], &["check", "--strict"]] {
                let ended = binary::run(command, &environment).await;
                let said = format!("{}{}", ended.stdout, ended.stderr);
                let what = format!("{setting}holds no certificate in PEM");
                assert!(!ended.status.success() && said.contains(&what) && said.contains(&file), "{command:?} {text:?}: {said}");
                assert!(!said.contains("canary") && !said.contains("[45, 45"), "{said}");
            }
        }
    }
}

/// The end of the client certificate is shown as the server's own is.
#[tokio::test]
async fn the_end_of_the_client_certificate_is_shown() {
    let folder = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| private(&folder, name, text);
    let soon = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).date().saturating_add(jiff::Span::new().days(3));
    let (month, day) = (u8::try_from(soon.month()).unwrap(), u8::try_from(soon.day()).unwrap());
    let pair = Authority::new().sign_until_day("gate.example", soon.year().into(), month, day);
    let (key, certificate, of_client) = (put("key", KEY), put("client.pem", &pair.certificate), put("client.key", &pair.key));
    let environment = [
        ("BYOK_GATE__TIER__ADDRESS", "rediss://127.0.0.1:1"),
        ("BYOK_GATE__TIER__KEY_FILE", key.as_str()),
        ("BYOK_GATE__TIER__CLIENT_CERTIFICATE_FILE", certificate.as_str()),
        ("BYOK_GATE__TIER__CLIENT_KEY_FILE", of_client.as_str()),
        ("BYOK_GATE__ADMIN__LISTEN", "127.0.0.1:0"),
    ];
    let ended = binary::run(&["check"], &environment).await;
    assert!(ended.status.success() && ended.stdout.contains(&format!("{certificate} expires at {soon}T00:00:00Z")), "{ended:?}");
    let serving = Serving::start_in(&[], &environment).await;
    let admin: SocketAddr = serving.event("admin_listening")["address"].as_str().unwrap().parse().unwrap();
    let near = serving.until("certificate_near_end").await;
    assert!(near["setting"] == "tier.client_certificate_file" && near["message"].as_str().unwrap().contains("restart"), "{near}");
    let of = async |path: &str| say(admin, &format!("GET {path} HTTP/1.1\r\nhost: gate\r\n\r\n")).await.body;
    let status: serde_json::Value = serde_json::from_str(&of("/status.json").await).unwrap();
    assert_eq!(status["certificates"][0]["setting"], "tier.client_certificate_file", "{status}");
    let metric = "byokgate_tls_certificate_expires_seconds{setting=\"tier.client_certificate_file\"} ";
    assert!(of("/metrics").await.contains(metric));
}
