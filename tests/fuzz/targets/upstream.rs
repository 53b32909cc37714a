//! A vendor that answers with any bytes: the HTTP client, the cap on bodies, and the classification. Nothing is ever VALID, because no made-up
//! key was refused.
#![no_main]

use std::{
    collections::BTreeMap,
    io::{Read, Write},
    net::{Shutdown, TcpListener},
    sync::{LazyLock, Mutex},
    thread,
    time::Duration,
};

use byok_gate::{
    core::{
        catalogue::Catalogue,
        endpoint::{Target, target},
        registry::Registry,
    },
    domain::{secret::Secret, verdict::Verdict},
    liveness::prober::{HttpProber, ProbeSettings},
};
use libfuzzer_sys::fuzz_target;
use tokio::runtime::{Builder, Runtime};

static ANSWER: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct World {
    runtime: Runtime,
    prober: HttpProber,
    target: Target,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("an address").port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            thread::spawn(move || {
                let (mut head, mut chunk) = (Vec::new(), [0; 4096]);
                while !head.windows(4).any(|window| window == b"\r\n\r\n") {
                    match stream.read(&mut chunk) {
                        Ok(0) | Err(_) => return,
                        Ok(size) => head.extend_from_slice(&chunk[..size]),
                    }
                }
                let answer = ANSWER.lock().expect("nobody panics under it").clone();
                drop(stream.write_all(&answer));
                drop(stream.shutdown(Shutdown::Write));
            });
        }
    });
    let registry = format!(
        "schema_version: 1\nproviders:\n  - {{name: house, display_name: x, protocol: openai, auth_mode: x, auth_env: [X], \
         model_prefix_match: x, base_url_template: \"http://127.0.0.1:{port}/v1\"}}\nruntimes: {{r: {{providers: [{{name: house}}]}}}}\n"
    );
    let registry = Registry::parse("test", registry.as_bytes(), &|_| None).expect("it stands").value;
    let catalogue = Catalogue::embedded().expect("it stands").value;
    let target = target(&registry.providers()[0], &catalogue, "m").expect("it can be asked");
    let settings = ProbeSettings {
        budget: Duration::from_millis(500),
        allow_loopback_http: true,
        calibrate: false,
        extra_roots: Vec::new(),
        resolve: BTreeMap::new(),
        ..ProbeSettings::default()
    };
    let prober = HttpProber::new(settings).expect("a prober");
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    World { runtime, prober, target }
});

fuzz_target!(|input: &[u8]| {
    let World { runtime, prober, target } = &*WORLD;
    let whole = if input.first() == Some(&b'H') {
        input.to_vec()
    } else {
        // A head that is right, with the input's status and body.
        let status = 200 + u16::from(input.first().copied().unwrap_or_default()) % 400;
        let body = input.get(1..).unwrap_or_default();
        [format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n", body.len()).as_bytes(), body].concat()
    };
    *ANSWER.lock().expect("nobody panics under it") = whole;
    let secret = Secret::new("made-up-canary-0123456789".into());
    let (finding, attempts) = runtime.block_on(prober.explain(target, &secret));
    assert_ne!(finding.verdict, Verdict::Valid, "VALID without a made-up key refused: {finding:?}");
    assert!(attempts.len() < 40);
    assert!(!finding.why().contains("canary"));
});
