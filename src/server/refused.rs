//! Connections that failed before their first call. Each fault of each peer is logged once a minute. Faults are counted, and the last ones are kept
//! for the status page. Log and memory stay bounded whoever connects.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    error::Error,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use rustls::{CertificateError, InvalidMessage};
use rustls_pki_types::UnixTime;
use strum::{IntoStaticStr, VariantArray};
use tokio::time::Instant;

use super::unreported::{REPORT_EVERY, Unreported};
use crate::{
    domain::request::Peer,
    telemetry::{
        metrics::{Collect, Counter, Page},
        status::{RefusedConnection, printable, text_of},
    },
};

/// The limit of log lines within that time for all peers, so that connections from many addresses do not push decisions out of the log.
const MAX_LINES: u32 = 30;
/// How many pairs of fault and peer are kept. At the limit, the one that was seen least recently is dropped.
const MAX_ENTRIES: usize = 256;
/// How many names of a certificate are kept, and how many characters of each.
const MAX_NAMES: usize = 5;
const MAX_NAME_CHARS: usize = 200;

tokio::task_local! {
    /// The names in the certificate that the client of this handshake presented, even if it was refused. The TLS library does not return them with
    /// its error.
    static PRESENTED_NAMES: RefCell<Vec<String>>;
}

/// Why a connection failed before its first call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum HandshakeFault {
    /// The client does not speak TLS on a TLS port.
    NoTls,
    /// The client speaks TLS on a port without it.
    TlsUnexpected,
    /// The client does not speak HTTP/2.
    NoHttp2,
    /// gRPC where pages and numbers are shown.
    GrpcOnAdmin,
    /// The handshake took too long.
    TooSlow,
    /// No client certificate.
    CertificateMissing,
    /// The client certificate has expired, or is not valid yet.
    CertificateExpired,
    /// The client certificate's authority is not in `tls.client_ca`.
    CertificateAuthority,
    /// No name of the client certificate is on the list of callers.
    CertificateName,
    /// Another fault of the client certificate.
    CertificateBad,
    /// The client refuses the server's certificate.
    ServerCertificateRefused,
    /// Another TLS fault.
    TlsFailed,
    /// Another fault.
    Failed,
}

/// A connection that was refused.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) fault: HandshakeFault,
    /// The TLS library's message.
    detail: String,
    names: Vec<String>,
}

/// The connections that were refused.
#[derive(Default)]
pub(super) struct Refusals {
    counts: [Counter; HandshakeFault::VARIANTS.len()],
    recent: Mutex<Recent>,
}

#[derive(Default)]
struct Recent {
    by_peer: BTreeMap<(HandshakeFault, String), Seen>,
    /// When the present interval of log lines began, and how many it has.
    lines: Option<(Instant, u32)>,
}

struct Seen {
    at: SystemTime,
    count: u64,
    unreported: Unreported,
    names: Vec<String>,
}

// === impl HandshakeFault ===

impl HandshakeFault {
    fn as_str(self) -> &'static str {
        self.into()
    }

    /// What is wrong, and what to do.
    const fn text(self) -> &'static str {
        match self {
            Self::NoTls => "the client speaks no TLS and this port does: give the client TLS",
            Self::TlsUnexpected => {
                "the client speaks TLS and this port does not: give the server tls.certificate and tls.key, or the client none"
            }
            Self::NoHttp2 => {
                "the client does not speak HTTP/2, which gRPC needs: an HTTP/1.1 health check, or a browser? Health is gRPC's own service; the page for people is on the admin listener"
            }
            Self::GrpcOnAdmin => {
                "the client speaks gRPC and this is the admin listener, which has pages and numbers alone: give the client an address of server.listen"
            }
            Self::TooSlow => "no handshake within deadlines.handshake",
            Self::CertificateMissing => {
                "the client showed no certificate, which tls.client_ca asks for: give the client its certificate"
            }
            Self::CertificateExpired => {
                "the client's certificate has expired or is not valid yet: renew it, or compare the clocks"
            }
            Self::CertificateAuthority => {
                "the client's certificate is signed by no authority of tls.client_ca: put its authority into that file, beside the old one"
            }
            Self::CertificateName => {
                "the client's certificate has no name that callers.certificates lists: list the name, or issue the right one"
            }
            Self::CertificateBad => "the client's certificate is not taken",
            Self::ServerCertificateRefused => {
                "the client does not take this server's certificate: its authority, names or expiry date; see tls.certificate"
            }
            Self::TlsFailed => "the TLS handshake failed",
            Self::Failed => "the connection failed before its first call",
        }
    }
}

// === impl Refusal ===

impl Refusal {
    pub(super) fn of(fault: HandshakeFault) -> Self {
        Self { fault, detail: String::new(), names: Vec::new() }
    }

    /// The refusal for an error of the TLS library, with the names that the client presented.
    fn of_tls(fault: &io::Error, names: Vec<String>) -> Self {
        let Some(tls) = fault.get_ref().and_then(|inner| (inner as &(dyn Error + 'static)).downcast_ref::<rustls::Error>())
        else {
            return Self { detail: fault.to_string(), ..Self::of(HandshakeFault::Failed) };
        };
        let kind = match tls {
            rustls::Error::NoCertificatesPresented => HandshakeFault::CertificateMissing,
            rustls::Error::InvalidCertificate(why) => match why {
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. } => HandshakeFault::CertificateExpired,
                CertificateError::UnknownIssuer | CertificateError::BadSignature => HandshakeFault::CertificateAuthority,
                CertificateError::ApplicationVerificationFailure => HandshakeFault::CertificateName,
                _ => HandshakeFault::CertificateBad,
            },
            // Within a handshake, a client only sends an alert to refuse the server's certificate.
            rustls::Error::AlertReceived(_) => HandshakeFault::ServerCertificateRefused,
            rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => HandshakeFault::NoTls,
            // The client offers only HTTP/1.1.
            rustls::Error::NoApplicationProtocol => HandshakeFault::NoHttp2,
            _ => HandshakeFault::TlsFailed,
        };
        Self { fault: kind, detail: detail_of(tls), names }
    }
}

/// The library's words, with dates as people have them, where they add something to the fault.
fn detail_of(fault: &rustls::Error) -> String {
    let date = |at: &UnixTime| {
        let seconds = i64::try_from(at.as_secs()).ok();
        seconds.and_then(|at| jiff::Timestamp::from_second(at).ok()).map_or_else(|| at.as_secs().to_string(), |at| at.to_string())
    };
    match fault {
        rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { time, not_after }) => {
            format!("the certificate ended at {}, and it is {}", date(not_after), date(time))
        }
        rustls::Error::InvalidCertificate(CertificateError::NotValidYetContext { time, not_before }) => {
            format!("the certificate begins at {}, and it is {}", date(not_before), date(time))
        }
        // The fault says it already.
        rustls::Error::InvalidCertificate(
            CertificateError::ApplicationVerificationFailure | CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => String::new(),
        other => other.to_string(),
    }
}

/// Runs a handshake. `Err(None)` if the peer only checked whether the port is open.
pub(super) async fn handshake<T>(accepting: impl Future<Output = io::Result<T>>) -> Result<T, Option<Refusal>> {
    let shown = RefCell::default();
    PRESENTED_NAMES
        .scope(shown, async {
            accepting.await.map_err(|fault| {
                let names = PRESENTED_NAMES.with(RefCell::take);
                (!is_port_check(&fault) || !names.is_empty()).then(|| Refusal::of_tls(&fault, names))
            })
        })
        .await
}

/// Stores the names of a certificate before it is verified.
pub(super) fn record_presented_names(names: &[String]) {
    // Outside of a handshake nobody reads them.
    let _is_a_handshake = PRESENTED_NAMES.try_with(|presented| {
        let name = |name: &String| printable(name).chars().take(MAX_NAME_CHARS).collect();
        *presented.borrow_mut() = names.iter().take(MAX_NAMES).map(name).collect();
    });
}

/// Whether the peer connected and closed, as load balancers do to check whether the port is open.
pub(super) fn is_port_check(fault: &io::Error) -> bool {
    matches!(fault.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
}

// === impl Refusals ===

impl Refusals {
    /// Records a refused connection.
    pub(super) fn add(&self, peer: Peer, refusal: Refusal) {
        let Refusal { fault, detail, names } = refusal;
        if let Some(count) = self.counts.get(fault as usize) {
            count.inc();
        }
        let peer = peer.to_string();
        let now = Instant::now();
        let unreported = {
            let mut recent = lock(&self.recent);
            let Recent { by_peer, lines } = &mut *recent;
            let key = (fault, peer.clone());
            if by_peer.len() >= MAX_ENTRIES && !by_peer.contains_key(&key) {
                let oldest = by_peer.iter().min_by_key(|(_, seen)| seen.at).map(|(key, _)| key.clone());
                oldest.and_then(|oldest| by_peer.remove(&oldest));
            }
            let fresh = || Seen { at: SystemTime::now(), count: 0, unreported: Unreported::default(), names: Vec::new() };
            let seen = by_peer.entry(key).or_insert_with(fresh);
            seen.at = SystemTime::now();
            seen.count += 1;
            seen.names.clone_from(&names);
            seen.unreported.add(now, || may_log(lines, now))
        };
        let (fault, text, names) = (fault.as_str(), fault.text(), names.join(", "));
        match unreported {
            Some(count) => tracing::warn!(event = "connection_refused", fault, peer, count, names, detail, "{text}"),
            None => tracing::debug!(event = "connection_refused", fault, peer, names, detail, "{text}"),
        }
    }

    /// The last refused connections, newest first.
    pub(super) fn recent(&self) -> Vec<RefusedConnection> {
        let recent = lock(&self.recent);
        let mut all: Vec<_> = recent.by_peer.iter().collect();
        all.sort_by_key(|(_, seen)| std::cmp::Reverse(seen.at));
        let shown = all.into_iter().map(|((fault, peer), Seen { at, count, names, .. })| RefusedConnection {
            at: text_of(*at),
            fault: fault.as_str().to_owned(),
            peer: peer.clone(),
            count: *count,
            names: names.clone(),
            meaning: fault.text().to_owned(),
        });
        shown.collect()
    }
}

fn may_log(lines: &mut Option<(Instant, u32)>, now: Instant) -> bool {
    let (since, count) = lines.get_or_insert((now, 0));
    if now.duration_since(*since) >= REPORT_EVERY {
        (*since, *count) = (now, 0);
    }
    *count += 1;
    *count <= MAX_LINES
}

fn lock(recent: &Mutex<Recent>) -> MutexGuard<'_, Recent> {
    // A panic cannot leave it inconsistent: the code that changes it cannot panic.
    recent.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Collect for Refusals {
    fn collect(&self, page: &mut Page) {
        let mut refused = page.counter("byokgate_handshakes_refused", "Handshakes that failed, by fault");
        for (fault, count) in HandshakeFault::VARIANTS.iter().zip(&self.counts) {
            refused.add_if_any(&[("fault", fault.as_str())], count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn peers_from_everywhere_fill_neither_the_memory_nor_the_log() {
        let refusals = Refusals::default();
        let peer = |number: u32| Peer::Tcp((std::net::Ipv4Addr::from(number), 1).into());
        for number in 0..10_000 {
            refusals.add(peer(number), Refusal::of(HandshakeFault::NoTls));
        }
        assert_eq!(refusals.recent().len(), MAX_ENTRIES);
        let count = |is_reported: bool| {
            lock(&refusals.recent).by_peer.values().filter(|seen| seen.unreported.reported_at.is_some() == is_reported).count()
        };
        assert!(count(true) <= MAX_LINES as usize);
        // After the interval there is a line again, with the count since the last one.
        refusals.add(peer(9_999), Refusal::of(HandshakeFault::NoTls));
        tokio::time::advance(REPORT_EVERY).await;
        refusals.add(peer(9_999), Refusal::of(HandshakeFault::NoTls));
        assert_eq!(lock(&refusals.recent).by_peer[&(HandshakeFault::NoTls, "0.0.39.15".to_owned())].unreported.count, 0);
    }
}
