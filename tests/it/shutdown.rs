//! How the server stops: health first, no accepted call lost, the deadline kept with any clients.

use std::time::Duration;

use byok_gate::{
    grpc::convert::pb::policy_decision_service_client::PolicyDecisionServiceClient,
    server::{Bound, Ended, ServerError},
};
use tokio::{io::AsyncWriteExt, net::TcpStream, task::JoinSet, time::timeout};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt;

use crate::support::{
    binary::{PATIENCE, Serving, run},
    case,
    edge::{Edge, Held, decide, is_allow, settings},
    gate::Files,
    vendor::{Behave, Row, Vendor},
};

fn nobody() -> HealthCheckRequest {
    HealthCheckRequest::default()
}

#[tokio::test]
async fn watchers_are_told_and_calls_go_on_while_it_is_noticed() {
    let mut settings = settings();
    settings.shutdown.notice = Duration::from_millis(300);
    let mut edge = Edge::start(settings, Held::new(true).engine()).await;
    let channel = edge.plain().await;
    let service = HealthCheckRequest { service: byok_gate::grpc::NAME.to_owned() };
    let mut health = HealthClient::new(channel.clone());
    let mut watched = [health.watch(nobody()).await.unwrap().into_inner(), health.watch(service).await.unwrap().into_inner()];
    for watch in &mut watched {
        assert_eq!(watch.message().await.unwrap().unwrap().status().as_str_name(), "SERVING");
    }
    edge.stop();
    for watch in &mut watched {
        assert_eq!(watch.message().await.unwrap().unwrap().status().as_str_name(), "NOT_SERVING");
    }
    assert_eq!(health.check(nobody()).await.unwrap().into_inner().status().as_str_name(), "NOT_SERVING");
    // Old and new connections are served until endpoints had their time to notice.
    for channel in [channel, edge.plain().await] {
        assert!(is_allow(&PolicyDecisionServiceClient::new(channel).decide(decide("made-up-key")).await.unwrap().into_inner()));
    }
    for watch in &mut watched {
        assert!(watch.message().await.unwrap().is_none(), "a watcher holds up the drain");
    }
    assert_eq!(edge.ended().await.unwrap(), Ended::Drained);
}

/// Every call that reached a provider was answered, and refused calls say so.
#[tokio::test]
async fn a_drain_under_load_loses_no_accepted_call() {
    let held = Held::new(true);
    let mut edge = Edge::start(settings(), held.engine()).await;
    let channel = edge.plain().await;
    let mut callers = JoinSet::new();
    for caller in 0..16 {
        let mut client = PolicyDecisionServiceClient::new(channel.clone());
        callers.spawn(async move {
            let mut allowed = 0;
            loop {
                match client.decide(decide(&format!("made-up-{caller}-{allowed}"))).await {
                    Ok(response) => {
                        assert!(is_allow(&response.into_inner()));
                        allowed += 1;
                    }
                    Err(status) => {
                        assert!(matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled), "{status:?}");
                        return allowed;
                    }
                }
            }
        });
    }
    while held.asked() < 200 {
        tokio::task::yield_now().await;
    }
    edge.stop();
    let mut allowed = 0;
    while let Some(caller) = callers.join_next().await {
        allowed += caller.unwrap();
    }
    assert_eq!(allowed, held.asked(), "asked about, and answered");
    assert_eq!(edge.ended().await.unwrap(), Ended::Drained);
}

/// Clients that are idle, that stopped in the middle of a handshake, that never read: none holds the server past its time.
#[tokio::test]
async fn no_client_holds_the_server_past_its_deadline() {
    let held = Held::new(false);
    let mut settings = settings();
    settings.shutdown.drain = Duration::from_millis(300);
    let edge = Edge::start(settings, held.engine()).await;
    let idle = edge.plain().await;
    let mut half = TcpStream::connect(edge.tcp()).await.unwrap();
    half.write_all(b"PRI * HTTP/2").await.unwrap();
    let mut silent = TcpStream::connect(edge.tcp()).await.unwrap();
    silent.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut client = PolicyDecisionServiceClient::new(edge.plain().await);
    let call = tokio::spawn(async move { client.decide(decide("made-up-key")).await });
    while held.asked() == 0 {
        tokio::task::yield_now().await;
    }
    let ended = timeout(PATIENCE, edge.ended()).await.unwrap().unwrap();
    assert_eq!(ended, Ended::CutOff);
    let cut_off = call.await.unwrap().unwrap_err();
    let reason = cut_off.get_details_error_info().unwrap().reason;
    assert_eq!((cut_off.code(), reason.as_str()), (Code::Unavailable, "DRAINING"), "{cut_off:?}");
    drop((idle, half, silent));
}

/// The same with the process: a client that never reads, exit 0 at the deadline; and a second signal at once.
#[tokio::test]
async fn a_process_ends_with_0_at_its_deadline_and_at_once_when_told_twice() {
    let folder = tempfile::tempdir().unwrap();
    for (drain, twice, expect) in [("200ms", false, 0), ("1h", true, 130)] {
        let config = folder.path().join("config.yaml");
        std::fs::write(&config, format!("shutdown: {{notice: 0s, drain: {drain}}}\n")).unwrap();
        let serving = Serving::start(&["--config", config.to_str().unwrap()]).await;
        let mut silent = TcpStream::connect(&serving.address).await.unwrap();
        silent.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        silent.readable().await.unwrap();
        serving.terminate().await;
        if twice {
            // The first one is understood when nothing new is taken.
            while TcpStream::connect(&serving.address).await.is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            serving.terminate().await;
        }
        let ended = serving.ended().await;
        assert_eq!(ended.status.code(), Some(expect), "{ended:?}");
    }
}

/// The page says that the service stops and what it waits for, until the end; a second signal leaves a line with what it cut off.
#[tokio::test]
async fn what_a_drain_waits_for_is_shown_and_a_second_signal_says_what_it_cut_off() {
    let vendor = Vendor::start(vec![Row { behave: Some(Behave::Silent), ..Row::default() }]).await;
    let (registry, catalogue) = case::documents(vendor.address.port());
    let files = Files::new(
        &registry,
        &catalogue,
        Some("shutdown: {notice: 0s, drain: 1h}\nprobe: {budget: 60s}\ndeadlines: {decide: 60s}\n"),
    );
    let flags = files.flags();
    let arguments = [&["--admin-listen", "127.0.0.1:0"][..], &flags.iter().map(String::as_str).collect::<Vec<_>>()].concat();
    let serving = Serving::start(&arguments).await;
    let admin = serving.event("admin_listening")["address"].as_str().unwrap().to_owned();
    let mut client = serving.client().await;
    let call = tokio::spawn(async move { client.decide(decide("made-up-key")).await });
    timeout(PATIENCE, async {
        while vendor.asked().is_empty() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert!(!run(&["status", "--server", &admin], &[]).await.stdout.contains("the service stops"));
    serving.terminate().await;
    serving.until("draining").await;
    let ends = tokio::time::Instant::now() + PATIENCE;
    loop {
        let told = run(&["status", "--server", &admin], &[]).await;
        if told.stdout.contains("! the service stops since 2") {
            assert!(told.stdout.contains("; 1 call in flight"), "{}", told.stdout);
            break;
        }
        assert!(tokio::time::Instant::now() < ends, "{told:?}");
    }
    // The listener for calls is closed by now, and the page is still there.
    while TcpStream::connect(&serving.address).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(run(&["status", "--server", &admin], &[]).await.stdout.contains("; 1 call in flight"));
    serving.terminate().await;
    let ended = serving.ended().await;
    assert_eq!(ended.status.code(), Some(130), "{ended:?}");
    let last: serde_json::Value = serde_json::from_str(ended.stdout.lines().last().unwrap()).unwrap();
    assert_eq!(
        [&last["event"], &last["drained"], &last["cut_off"]],
        [&"stopped".into(), &false.into(), &serde_json::json!(1)],
        "{last}"
    );
    drop(call.await.unwrap().unwrap_err());
}

#[tokio::test]
async fn a_background_task_that_ends_or_panics_ends_the_server() {
    for panics in [false, true] {
        let mut bound = Bound::open(settings().edge()).await.unwrap();
        bound.supervise("test", async move { assert!(!panics, "made to") });
        let mut edge = Edge::run(bound, Held::new(true).engine());
        let ended = timeout(PATIENCE, &mut edge.running).await.unwrap().unwrap();
        assert!(matches!(ended, Err(ServerError::TaskEnded("test"))), "{ended:?}");
    }
}
