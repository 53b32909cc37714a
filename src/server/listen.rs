//! Listening sockets, TCP and Unix. A Unix socket is bound with its owner and mode, and accepting goes on after every fault.

use std::{
    fmt, fs,
    io::{self, ErrorKind},
    net::{SocketAddr, ToSocketAddrs},
    os::unix::{
        fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt, chown},
        net::UnixStream as StdUnixStream,
    },
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
};

use super::settings::{ServerSettings, SocketSettings};
use crate::{domain::request::Peer, watch::files};

/// The pause after an accept failed because the machine lacks descriptors or memory. Meanwhile some calls end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// An address to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// An IP address and a port.
    Tcp(SocketAddr),
    /// A socket file.
    Unix(PathBuf),
}

/// A bound socket.
pub(super) enum Listener {
    Tcp(TcpListener, SocketAddr),
    Unix(UnixListener, SocketFile),
}

/// The file of a Unix socket. It is removed when this is dropped, unless another process has replaced the file.
pub(super) struct SocketFile {
    path: PathBuf,
    inode: u64,
}

/// A new connection, before its handshake.
pub(super) struct Accepted {
    pub(super) io: Box<dyn Stream>,
    pub(super) peer: Peer,
}

/// A byte stream in both directions.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

// === impl Address ===

impl Address {
    /// Checks whether the address can be had. A port is bound and released at once, without listening. A socket file is not made.
    pub(super) fn may_be_bound(&self) -> io::Result<()> {
        let path = match self {
            Self::Unix(path) => path,
            Self::Tcp(address) => {
                let socket = Socket::new(Domain::for_address(*address), Type::STREAM, None)?;
                // As the server binds it: what only waits for its last packets is no hindrance.
                socket.set_reuse_address(true)?;
                return socket.bind(&(*address).into());
            }
        };
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => return Err(not_a_socket()),
            Ok(_) if StdUnixStream::connect(path).is_ok() => return Err(in_use()),
            Ok(_) => {}
            Err(fault) if fault.kind() == ErrorKind::NotFound => {}
            Err(fault) => return Err(fault),
        }
        let folder = path.parent().filter(|folder| *folder != Path::new("")).unwrap_or(Path::new("."));
        if fs::metadata(folder)?.is_dir() { Ok(()) } else { Err(ErrorKind::NotADirectory.into()) }
    }

    /// It is the same one whenever it is bound: port 0 is another each time.
    pub(super) fn is_one(&self) -> bool {
        !matches!(self, Self::Tcp(address) if address.port() == 0)
    }

    /// Whether only processes of this machine can connect to it.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().is_loopback(),
            Self::Unix(_) => true,
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => Ok(Self::Unix(PathBuf::from(path))),
            Some(_) => Err("`unix:` needs a path behind it".to_owned()),
            None => match text.parse() {
                Ok(address) => Ok(Self::Tcp(address)),
                Err(_) => resolved(text).map(Self::Tcp),
            },
        }
    }
}

/// Resolves a name with a port to one address. It prefers IPv4, since `localhost` has both kinds.
fn resolved(text: &str) -> Result<SocketAddr, String> {
    let wrong = || format!("`{text}` is neither HOST:PORT, such as 127.0.0.1:50051 or localhost:50051, nor unix:PATH");
    let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let is_name = !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_'));
    // Only digits and dots: a wrong address and not a name.
    let is_number = host.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    if !is_name || is_number || port.parse::<u16>().is_err() {
        return Err(wrong());
    }
    let asked = text.to_owned();
    let found = files::in_time(move || asked.to_socket_addrs().map(Iterator::collect::<Vec<_>>)).and_then(|found| found);
    let found = found.map_err(|fault| format!("`{text}` could not be resolved: {fault}"))?;
    let first = found.iter().find(|address| address.is_ipv4()).or_else(|| found.first());
    first.copied().ok_or_else(|| format!("`{text}` has no address"))
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

// === impl Listener ===

impl Listener {
    pub(super) async fn bind(address: &Address, server: &ServerSettings, socket: &SocketSettings) -> io::Result<Self> {
        match address {
            Address::Tcp(address) => {
                let listener = TcpListener::bind(address).await?;
                keep_alive(&listener, server)?;
                let address = listener.local_addr()?;
                Ok(Self::Tcp(listener, address))
            }
            Address::Unix(path) => bind_unix(path, socket),
        }
    }

    pub(super) fn address(&self) -> Address {
        match self {
            Self::Tcp(_, address) => Address::Tcp(*address),
            Self::Unix(_, file) => Address::Unix(file.path.clone()),
        }
    }

    /// Waits for the next connection. It goes on after a fault of one connection, and pauses after a fault of the machine.
    pub(super) async fn accept(&self) -> Accepted {
        loop {
            let accepted = match self {
                Self::Tcp(listener, _) => listener.accept().await.map(|(stream, from)| {
                    // This fails only if the connection is closed already; the first read then reports that.
                    drop(stream.set_nodelay(true));
                    Accepted { io: Box::new(stream), peer: Peer::Tcp(from) }
                }),
                Self::Unix(listener, _) => listener.accept().await.and_then(|(stream, _)| {
                    let credentials = stream.peer_cred()?;
                    let peer = Peer::Unix { uid: credentials.uid(), gid: credentials.gid() };
                    Ok(Accepted { io: Box::new(stream), peer })
                }),
            };
            match accepted {
                Ok(accepted) => return accepted,
                Err(fault) if is_of_one_connection(&fault) => {
                    tracing::debug!(event = "accept_failed", fault = %fault, "a connection was gone before it was accepted");
                }
                Err(fault) => {
                    tracing::error!(event = "accept_failed", address = %self.address(), fault = %fault, "waiting a little");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

/// Sets TCP keepalive on the listener; accepted sockets inherit it. The kernel probes a silent peer, and closes the connection if the peer
/// acknowledges or reads nothing. HTTP/2 pings would add nothing here: deadlines limit calls, the number of connections is limited, and a proxy
/// answers pings for the client behind it. Pings would also cost every frame of a call a clock read and a lock.
fn keep_alive(listener: &TcpListener, server: &ServerSettings) -> io::Result<()> {
    const PROBES: u32 = 4;
    let (silent, timeout) = (server.keepalive_interval, server.keepalive_timeout);
    let every = (timeout / PROBES).max(Duration::from_secs(1));
    let socket = SockRef::from(listener);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(silent).with_interval(every).with_retries(PROBES))?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(silent + timeout))?;
    Ok(())
}

/// Whether the fault is of one connection and not of the listening socket.
fn is_of_one_connection(fault: &io::Error) -> bool {
    matches!(
        fault.kind(),
        ErrorKind::ConnectionAborted
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionRefused
            | ErrorKind::BrokenPipe
            | ErrorKind::Interrupted
            | ErrorKind::NotConnected
    )
}

// === Unix ===

/// Binds in a private folder, sets owner and mode there, and moves the socket into place. So it can never be reached with wider rights than
/// configured. The move also replaces a stale socket, but no other kind of file.
fn bind_unix(path: &Path, socket: &SocketSettings) -> io::Result<Listener> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(not_a_socket());
        }
        Ok(_) if StdUnixStream::connect(path).is_ok() => {
            return Err(in_use());
        }
        Ok(_) => {}
        Err(fault) if fault.kind() == ErrorKind::NotFound => {}
        Err(fault) => return Err(fault),
    }
    let folder = PathBuf::from(format!("{}.{}", path.display(), std::process::id()));
    let inside = folder.join("s");
    // A killed process with the same id may have left these.
    drop(fs::remove_file(&inside));
    drop(fs::remove_dir(&folder));
    fs::DirBuilder::new().mode(0o700).create(&folder)?;
    let bound = (|| {
        let listener = UnixListener::bind(&inside)?;
        // The settings' review has checked that these are octal digits.
        let mode = u32::from_str_radix(&socket.mode, 8).unwrap_or(0o600);
        fs::set_permissions(&inside, fs::Permissions::from_mode(mode))?;
        if socket.owner.is_some() || socket.group.is_some() {
            chown(&inside, socket.owner, socket.group)?;
        }
        let inode = fs::symlink_metadata(&inside)?.ino();
        fs::rename(&inside, path)?;
        Ok(Listener::Unix(listener, SocketFile { path: path.to_owned(), inode }))
    })();
    drop(fs::remove_file(&inside));
    drop(fs::remove_dir(&folder));
    bound
}

fn in_use() -> io::Error {
    io::Error::new(ErrorKind::AddrInUse, "another process listens on this socket")
}

fn not_a_socket() -> io::Error {
    io::Error::new(ErrorKind::AlreadyExists, "the path exists and is not a socket; it is left alone")
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_ours = fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode);
        if is_ours {
            // An error means that another process has removed it.
            drop(fs::remove_file(&self.path));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_parse_or_say_what_is_wrong() {
        let parsed = |text: &str| text.parse::<Address>();
        assert_eq!(parsed("127.0.0.1:1"), Ok(Address::Tcp("127.0.0.1:1".parse().unwrap())));
        assert_eq!(parsed("[::1]:1"), Ok(Address::Tcp("[::1]:1".parse().unwrap())));
        assert_eq!(parsed("unix:/run/x.sock"), Ok(Address::Unix("/run/x.sock".into())));
        // A name resolves to one of its addresses.
        assert!(matches!(parsed("localhost:1"), Ok(Address::Tcp(address)) if address.ip().is_loopback() && address.port() == 1));
        for text in ["unix:", "localhost", "localhost:x", "127.0.0.1", "127.0.0.300:1", ":1", "a b:1", ""] {
            assert!(parsed(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn only_this_machine_is_local() {
        for (text, local) in
            [("127.0.0.1:1", true), ("[::1]:1", true), ("0.0.0.0:1", false), ("[::]:1", false), ("unix:/x", true)]
        {
            assert_eq!(text.parse::<Address>().unwrap().is_local(), local, "{text}");
        }
    }

    #[tokio::test]
    async fn silent_peers_are_probed() {
        let server = ServerSettings { keepalive_interval: Duration::from_secs(21), ..ServerSettings::default() };
        let address = Address::Tcp("127.0.0.1:0".parse().unwrap());
        let Listener::Tcp(listener, address) = Listener::bind(&address, &server, &SocketSettings::default()).await.unwrap()
        else {
            unreachable!()
        };
        let (_client, accepted) = tokio::join!(tokio::net::TcpStream::connect(address), listener.accept());
        let (accepted, _) = accepted.unwrap();
        let accepted = SockRef::from(&accepted);
        assert!(accepted.keepalive().unwrap());
        assert_eq!(accepted.tcp_keepalive_time().unwrap(), Duration::from_secs(21));
        #[cfg(target_os = "linux")]
        assert_eq!(accepted.tcp_user_timeout().unwrap(), Some(Duration::from_secs(31)));
    }

    #[test]
    fn a_full_descriptor_table_is_no_fault_of_one_connection() {
        const EMFILE: i32 = 24;
        const ECONNABORTED: i32 = 103;
        assert!(!is_of_one_connection(&io::Error::from_raw_os_error(EMFILE)));
        assert!(is_of_one_connection(&io::Error::from_raw_os_error(ECONNABORTED)));
    }
}
