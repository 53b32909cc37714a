//! Sockets: what they may replace, who may reach them, and where plain text is refused.

use std::{
    fs,
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::UnixListener,
    },
    sync::Arc,
};

use byok_gate::{
    core::engine::Engine,
    server::{Address, Bound, ServerError},
};
use tonic::Code;

use crate::support::{
    binary, case,
    edge::{Edge, ask_status, settings},
    gate::Files,
};

fn engine() -> Arc<Engine> {
    let (registry, catalogue) = case::documents(1);
    Files::new(&registry, &catalogue, None).engine()
}

#[tokio::test]
async fn one_server_listens_on_several_addresses_and_takes_its_socket_along() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("gate.sock");
    let mut settings = settings();
    settings.server.listen = vec!["127.0.0.1:0".into(), format!("unix:{}", path.display()), "127.0.0.1:0".into()];
    let edge = Edge::start(settings, engine()).await;
    assert!(matches!(&edge.addresses[..], [Address::Tcp(one), Address::Unix(_), Address::Tcp(other)] if one != other));
    assert_eq!(ask_status(edge.plain().await, None).await, Code::Ok);
    assert_eq!(ask_status(edge.over_unix().await, None).await, Code::Ok);
    edge.ended().await.unwrap();
    assert!(!path.exists(), "the socket file was left behind");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "something was left behind");
}

#[tokio::test]
async fn a_socket_has_its_rights_and_replaces_nothing_but_a_stale_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("gate.sock");
    let mut settings = settings();
    settings.server.listen = vec![format!("unix:{}", path.display())];
    // A regular file in its place is not removed.
    fs::write(&path, "precious").unwrap();
    let fault = Bound::open(settings.edge()).await.map(drop).unwrap_err();
    assert!(matches!(&fault, ServerError::Listen { source, .. } if source.to_string().contains("not a socket")), "{fault:?}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    fs::remove_file(&path).unwrap();
    // A live server keeps its socket; a dead one's is replaced.
    let alive = UnixListener::bind(&path).unwrap();
    let fault = Bound::open(settings.edge()).await.map(drop).unwrap_err();
    assert!(matches!(&fault, ServerError::Listen { source, .. } if source.to_string().contains("another process")), "{fault:?}");
    drop(alive);
    for mode in ["0660", "600"] {
        settings.socket.mode = mode.into();
        let bound = Bound::open(settings.edge()).await.unwrap();
        let found = fs::symlink_metadata(&path).unwrap();
        assert!(found.file_type().is_socket());
        assert_eq!(found.permissions().mode() & 0o777, u32::from_str_radix(mode, 8).unwrap());
        // Another server has replaced it: that one's stays.
        drop(fs::remove_file(&path));
        let other = UnixListener::bind(&path).unwrap();
        drop(bound);
        assert!(path.exists(), "another server's socket was removed");
        drop(other);
    }
}

/// The command refuses what would be open to a network, with the exit code of an invalid command line.
#[tokio::test]
async fn beyond_loopback_something_must_be_said() {
    for (listen, said) in [
        ("0.0.0.0:0", "--insecure-listen"),
        ("[::]:0", "--insecure-listen"),
        ("localhost", "neither HOST:PORT"),
        ("unix:", "needs a path"),
    ] {
        let ended = binary::run(&["serve", "--listen", listen], &[]).await;
        assert_eq!(ended.status.code(), Some(2), "{listen}: {ended:?}");
        assert!(ended.stderr.contains(said), "{listen}: {}", ended.stderr);
    }
    let mut settings = settings();
    settings.server.listen = vec!["0.0.0.0:0".into()];
    settings.server.insecure_listen = true;
    assert!(Bound::open(settings.edge()).await.is_ok());
}

/// The commands that call a server reach it over a socket as well.
#[tokio::test]
async fn health_and_decide_ask_over_a_socket() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = settings();
    settings.server.listen = vec![format!("unix:{}/gate.sock", folder.path().display())];
    let edge = Edge::start(settings, engine()).await;
    let server = format!("unix:{}", edge.unix().display());
    let health = binary::run(&["health", "--server", &server], &[]).await;
    assert_eq!((health.status.code(), health.stdout.as_str()), (Some(0), "SERVING\n"), "{health:?}");
    let decided = binary::run(&["decide", "--server", &server, "--runtime", "agent", "--model", "acme-large"], &[]).await;
    assert_eq!(decided.status.code(), Some(10), "{decided:?}");
    let nobody = binary::run(&["health", "--server", "unix:/nowhere/at/all"], &[]).await;
    assert_eq!(nobody.status.code(), Some(1), "{nobody:?}");
}
