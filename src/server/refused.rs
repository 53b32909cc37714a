//! Connections that came to no call, and why: told in the log once a minute for each fault and peer, counted by fault, and the last ones kept
//! for the status page. Bounded, whoever connects.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    error::Error,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use rustls::{CertificateError, InvalidMessage};
use rustls_pki_types::UnixTime;
use strum::{IntoStaticStr, VariantArray};
use tokio::time::Instant;

use crate::{
    domain::request::Peer,
    telemetry::{
        metrics::{Collect, Counter, Page},
        status::{RefusedConnection, printable, text_of},
    },
};

/// The same fault of the same peer is told again after this.
const TELL_EVERY: Duration = Duration::from_secs(60);
/// So many lines within that time, over all peers: who connects from everywhere does not push decisions out of the log.
const MAX_LINES: u32 = 30;
/// So many pairs of fault and peer are kept; the one that was seen last the longest ago goes first.
const MAX_KEPT: usize = 256;
/// So many names of a certificate, each of so many characters.
const MAX_NAMES: usize = 5;
const MAX_NAME_CHARS: usize = 200;

tokio::task_local! {
    /// The names in the certificate that the client of this handshake has shown, whether or not it was taken. The TLS library does not tell
    /// them with its refusal.
    static PRESENTED: RefCell<Vec<String>>;
}

/// Why a connection came to no call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub(super) enum HandshakeFault {
    /// No TLS where TLS is spoken.
    NoTls,
    /// TLS where none is spoken.
    TlsUnexpected,
    /// No HTTP/2.
    NoHttp2,
    /// gRPC where pages and numbers are shown.
    GrpcOnAdmin,
    /// Nothing in time.
    TooSlow,
    /// No client certificate.
    CertificateMissing,
    /// One that has expired, or is not valid yet.
    CertificateExpired,
    /// Of an authority that is not `tls.client_ca`.
    CertificateAuthority,
    /// Of a name that is on no list.
    CertificateName,
    /// Anything else about it.
    CertificateBad,
    /// The client does not take the server's certificate.
    ServerCertificateRefused,
    /// Any other fault of TLS.
    TlsFailed,
    /// Any other fault.
    Failed,
}

/// One that was refused.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) fault: HandshakeFault,
    /// The library's words.
    detail: String,
    names: Vec<String>,
}

/// Those that were refused.
#[derive(Default)]
pub(super) struct Refusals {
    counts: [Counter; HandshakeFault::VARIANTS.len()],
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    by_peer: BTreeMap<(HandshakeFault, String), Seen>,
    /// Since when lines are counted, and how many there were.
    lines: Option<(Instant, u32)>,
}

struct Seen {
    at: SystemTime,
    count: u64,
    /// Of those, how many no line has told of.
    untold: u64,
    told: Option<Instant>,
    names: Vec<String>,
}

// === impl HandshakeFault ===

impl HandshakeFault {
    fn as_str(self) -> &'static str {
        self.into()
    }

    /// What it is and what to do.
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
                "the client does not take this server's certificate: its authority, its names or its end; see tls.certificate"
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

    /// What the TLS library says, with the names that the client has shown.
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
            // Who refuses our certificate says so, and nothing else is said to us within a handshake.
            rustls::Error::AlertReceived(_) => HandshakeFault::ServerCertificateRefused,
            rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => HandshakeFault::NoTls,
            // It offers HTTP/1.1 alone.
            rustls::Error::NoApplicationProtocol => HandshakeFault::NoHttp2,
            _ => HandshakeFault::TlsFailed,
        };
        Self { fault: kind, detail: detail_of(tls), names }
    }
}

/// The library's words, with dates as people have them.
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
        other => other.to_string(),
    }
}

/// Does a handshake; `Err(None)` where the peer has only looked whether somebody listens.
pub(super) async fn handshake<T>(accepting: impl Future<Output = io::Result<T>>) -> Result<T, Option<Refusal>> {
    let shown = RefCell::default();
    PRESENTED
        .scope(shown, async {
            accepting.await.map_err(|fault| {
                let names = PRESENTED.with(RefCell::take);
                (!is_a_look(&fault) || !names.is_empty()).then(|| Refusal::of_tls(&fault, names))
            })
        })
        .await
}

/// Notes the names in a certificate that is about to be judged.
pub(super) fn presented(names: &[String]) {
    // Outside of a handshake nobody asks.
    let _is_a_handshake = PRESENTED.try_with(|presented| {
        let name = |name: &String| printable(name).chars().take(MAX_NAME_CHARS).collect();
        *presented.borrow_mut() = names.iter().take(MAX_NAMES).map(name).collect();
    });
}

/// Who connects and hangs up looks whether somebody listens, as load balancers do.
pub(super) fn is_a_look(fault: &io::Error) -> bool {
    matches!(fault.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset)
}

// === impl Refusals ===

impl Refusals {
    /// One more.
    pub(super) fn add(&self, peer: Peer, refusal: Refusal) {
        let Refusal { fault, detail, names } = refusal;
        if let Some(count) = self.counts.get(fault as usize) {
            count.inc();
        }
        let peer = peer.to_string();
        let now = Instant::now();
        let untold = {
            let mut kept = lock(&self.kept);
            let Kept { by_peer, lines } = &mut *kept;
            let key = (fault, peer.clone());
            if by_peer.len() >= MAX_KEPT && !by_peer.contains_key(&key) {
                let oldest = by_peer.iter().min_by_key(|(_, seen)| seen.at).map(|(key, _)| key.clone());
                oldest.and_then(|oldest| by_peer.remove(&oldest));
            }
            let fresh = || Seen { at: SystemTime::now(), count: 0, untold: 0, told: None, names: Vec::new() };
            let seen = by_peer.entry(key).or_insert_with(fresh);
            seen.at = SystemTime::now();
            seen.count += 1;
            seen.untold += 1;
            seen.names.clone_from(&names);
            let is_due = seen.told.is_none_or(|told| now.duration_since(told) >= TELL_EVERY);
            (is_due && may_tell(lines, now)).then(|| {
                seen.told = Some(now);
                std::mem::take(&mut seen.untold)
            })
        };
        let (fault, text, names) = (fault.as_str(), fault.text(), names.join(", "));
        match untold {
            Some(count) => tracing::warn!(event = "connection_refused", fault, peer, count, names, detail, "{text}"),
            None => tracing::debug!(event = "connection_refused", fault, peer, names, detail, "{text}"),
        }
    }

    /// The last ones, the newest first.
    pub(super) fn shown(&self) -> Vec<RefusedConnection> {
        let kept = lock(&self.kept);
        let mut all: Vec<_> = kept.by_peer.iter().collect();
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

fn may_tell(lines: &mut Option<(Instant, u32)>, now: Instant) -> bool {
    let (since, count) = lines.get_or_insert((now, 0));
    if now.duration_since(*since) >= TELL_EVERY {
        (*since, *count) = (now, 0);
    }
    *count += 1;
    *count <= MAX_LINES
}

fn lock(kept: &Mutex<Kept>) -> MutexGuard<'_, Kept> {
    // A panic cannot leave it half-changed: what changes it cannot panic.
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Collect for Refusals {
    fn collect(&self, page: &mut Page) {
        let mut refused = page.counter("byokgate_handshakes_refused", "Connections that came to no call, by why");
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
        assert_eq!(refusals.shown().len(), MAX_KEPT);
        let count = |told: bool| lock(&refusals.kept).by_peer.values().filter(|seen| seen.told.is_some() == told).count();
        assert!(count(true) <= MAX_LINES as usize);
        // And after a minute there is a line again, with what has come since.
        refusals.add(peer(9_999), Refusal::of(HandshakeFault::NoTls));
        tokio::time::advance(TELL_EVERY).await;
        refusals.add(peer(9_999), Refusal::of(HandshakeFault::NoTls));
        assert_eq!(lock(&refusals.kept).by_peer[&(HandshakeFault::NoTls, "0.0.39.15".to_owned())].untold, 0);
    }
}
