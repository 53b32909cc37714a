//! The shared tier without a real store: the cost of its faults, and its settings. `tests/tier` uses a real one.

use std::{fs, sync::Arc, time::Duration};

use byok_gate::{
    config::{self, Overrides, Paths},
    domain::verdict::{ServedFrom, Verdict},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use crate::support::{
    binary,
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
    for (of_certificate, of_key, what) in [
        (None, Some(&right), "tier.client_certificate_file: could not be read"),
        (Some(&good), None, "tier.client_key_file: could not be read"),
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
