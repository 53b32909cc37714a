//! Bytes on a connection of a running server: HTTP/2 frames and gRPC messages, whole, truncated and wrong. It goes on serving.
#![no_main]

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use byok_gate::{
    config::settings::Settings,
    core::{
        classify::Finding,
        engine::{Boxed, Engine, ProbeRequest, Prober},
    },
    domain::verdict::Verdict,
    grpc::convert::pb::{GetRegistryStatusRequest, policy_decision_service_client::PolicyDecisionServiceClient},
    liveness::cache::{Cache, CacheSettings},
    server::Bound,
};
use byok_gate_fuzz::{CASES, byte};
use libfuzzer_sys::fuzz_target;
use tokio::runtime::{Builder, Runtime};
use tonic::transport::Endpoint;

struct Good;

impl Prober for Good {
    fn probe(&self, _: ProbeRequest) -> Boxed<'static, Finding> {
        Box::pin(async { Finding::bare(Verdict::Valid) })
    }
}

static SERVER: LazyLock<(Runtime, PathBuf, tempfile::TempDir)> = LazyLock::new(|| {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let mut settings = Settings::default();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("gate.sock");
    // Not over TCP: thousands of connections a second would use its ports up.
    settings.server.listen = vec![format!("unix:{}", path.display())];
    let bound = runtime.block_on(Bound::open(settings.edge())).expect("a server");
    let cache = Arc::new(Cache::new(Arc::new(Good), CacheSettings::default()));
    let engine = Arc::new(Engine::new(CASES.clone(), cache, None));
    runtime.spawn(bound.run(engine, std::future::pending()));
    (runtime, path, folder)
});

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// HEADERS of a call of Decide: method, scheme, authority, path, content type, te; HPACK without Huffman or a table.
static CALL: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut block = vec![0x83, 0x86];
    for (name, value) in [
        (":authority", "localhost"),
        (":path", "/byokgate.v1.PolicyDecisionService/Decide"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ] {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).expect("short"));
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
});

fn frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    out.extend_from_slice(&u32::try_from(payload.len()).expect("short").to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// The input as it is, or as the payloads of frames that are well formed.
fn written(input: &[u8]) -> Vec<u8> {
    let mut input = input;
    let choice = byte(&mut input);
    if choice & 3 == 0 {
        return input.to_vec();
    }
    let mut out = PREFACE.to_vec();
    frame(&mut out, 4, 0, 0, &[]);
    if choice & 3 == 1 {
        out.extend_from_slice(input);
        return out;
    }
    let mut stream = 1;
    for part in input.split(|byte| *byte == 0xfe).take(32) {
        let mut part = part;
        match byte(&mut part) {
            // A call with this message, framed as gRPC frames it.
            b'c' => {
                frame(&mut out, 1, 4, stream, &CALL);
                let mut message = vec![0];
                message.extend_from_slice(&u32::try_from(part.len()).expect("short").to_be_bytes());
                message.extend_from_slice(part);
                frame(&mut out, 0, 1, stream, &message);
                stream += 2;
            }
            // A call with a body as it is.
            b'b' => {
                frame(&mut out, 1, 4, stream, &CALL);
                frame(&mut out, 0, 1, stream, part);
                stream += 2;
            }
            // A call with further headers.
            b'h' => {
                let block = [CALL.as_slice(), part].concat();
                frame(&mut out, 1, 5, stream, &block);
                stream += 2;
            }
            kind => {
                let flags = byte(&mut part);
                let on = u32::from(byte(&mut part));
                frame(&mut out, kind % 12, flags, on, part);
            }
        }
    }
    out
}

static RUNS: AtomicU64 = AtomicU64::new(0);

fuzz_target!(|input: &[u8]| {
    let (runtime, path, _) = &*SERVER;
    let bytes = written(input);
    let mut stream = UnixStream::connect(path).expect("it still accepts");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
    drop(stream.write_all(&bytes));
    drop(stream.shutdown(Shutdown::Write));
    let (mut chunk, mut answered) = ([0; 16 * 1024], 0);
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(size) => answered += size,
            Err(fault) if matches!(fault.kind(), std::io::ErrorKind::WouldBlock) => panic!("it neither answers nor closes"),
            Err(_) => break,
        }
    }
    assert!(answered < 1 << 20, "{answered} bytes for {}", bytes.len());
    if RUNS.fetch_add(1, Ordering::Relaxed).is_multiple_of(256) {
        runtime.block_on(async {
            let channel =
                Endpoint::from_shared(format!("unix:{}", path.display())).expect("a URL").connect().await.expect("it accepts");
            let answer = PolicyDecisionServiceClient::new(channel).get_registry_status(GetRegistryStatusRequest {}).await;
            answer.expect("it still serves");
        });
    }
});
