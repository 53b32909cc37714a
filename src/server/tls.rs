//! TLS: the server's certificate and key, and the authority of client certificates. They are reloaded without a restart.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, ring},
    server::{
        NoServerSessionStorage, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use zeroize::Zeroizing;

use super::{
    callers::Callers,
    error::{Review, ServerError, chain},
    refused::record_presented_names,
};
use crate::{
    domain::{duration, secret::with_stack_wiped},
    telemetry::{
        metrics::{Collect, Page},
        status::{CERTIFICATE_NEAR_END, CertificateEnd, certificate_remedy},
    },
    watch::{Fault, Reloaded, Source, files},
};

/// The maximum size of a file of certificates. A bundle of all public authorities is a quarter of it.
const MAX_PEM_BYTES: u64 = 1024 * 1024;

/// The paths of certificates and keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TlsFiles {
    /// The server's certificate chain.
    pub(super) certificate: PathBuf,
    /// Its key.
    pub(super) key: PathBuf,
    /// The authority of client certificates. If set, a client certificate is required.
    pub(super) client_ca: Option<PathBuf>,
}

/// All certificates whose expiry is shown.
#[derive(Default)]
pub(super) struct Certificates {
    /// Those of the listeners.
    pub(super) tls: Option<Arc<Tls>>,
    /// Those that are read at the start.
    pub(super) others: Vec<CertificateEnd>,
}

/// The TLS files and the configuration made of them.
pub(super) struct Tls {
    files: TlsFiles,
    callers: Arc<Callers>,
    active: ArcSwap<ActiveConfig>,
    last: Mutex<blake3::Hash>,
}

/// The last valid content of the files.
struct ActiveConfig {
    config: Arc<ServerConfig>,
    /// When the server's certificate expires, in seconds of Unix time.
    certificate_ends: Option<i64>,
    /// When the first of the client authorities expires.
    client_ca_ends: Option<i64>,
}

/// The files' content.
struct Content {
    certificate: Zeroizing<Vec<u8>>,
    key: Zeroizing<Vec<u8>>,
    client_ca: Option<Zeroizing<Vec<u8>>>,
}

// === impl Tls ===

impl Tls {
    /// Reads the files at the start. Any fault in them is an error.
    pub(super) fn load(files: TlsFiles, callers: Arc<Callers>) -> Result<Self, ServerError> {
        let content = Content::read(&files)?;
        let active = content.load(&files, &callers)?;
        Ok(Self { last: Mutex::new(content.hash()), active: ArcSwap::from_pointee(active), files, callers })
    }

    /// Adds every fault of these files to `found`, and certificates that expire soon.
    pub(super) fn review(files: &TlsFiles, callers: &Arc<Callers>, found: &mut Review) {
        let TlsFiles { certificate, key, client_ca } = files;
        let named = [Some(certificate), Some(key), client_ca.as_ref()].into_iter().flatten();
        let unreadable: Vec<ServerError> = named.filter_map(|path| read(path).err()).collect();
        if !unreadable.is_empty() {
            return found.faults.extend(unreadable);
        }
        let content = match Content::read(files) {
            Ok(content) => content,
            Err(fault) => return found.faults.push(fault),
        };
        match content.load(files, callers) {
            Ok(active) => found.near_ends.extend(active.ends(files).into_iter().filter_map(near_end_warning)),
            Err(fault) => found.faults.push(fault),
        }
        // A fault of the server's certificate hides one of the authority's file. Report that too.
        if let (Some(pem), Some(path)) = (&content.client_ca, client_ca)
            && let Err(message) = client_verifier(pem, Arc::new(ring::default_provider()), callers)
            && !found.faults.iter().any(|fault| matches!(fault, ServerError::Content { path: other, .. } if other == path))
        {
            found.faults.push(ServerError::Content { path: path.clone(), message });
        }
    }

    fn refresh(&self) -> Result<Reloaded, ServerError> {
        let content = Content::read(&self.files)?;
        let hash = content.hash();
        if *self.last.lock().unwrap_or_else(PoisonError::into_inner) == hash {
            return Ok(Reloaded::Unchanged);
        }
        self.active.store(Arc::new(content.load(&self.files, &self.callers)?));
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = hash;
        Ok(Reloaded::Taken)
    }

    /// The acceptor for a new connection, with the active configuration.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(Arc::clone(&self.active.load().config))
    }

    /// The expiry of the active certificates.
    pub(super) fn ends(&self) -> Vec<CertificateEnd> {
        self.active.load().ends(&self.files)
    }
}

// === impl ActiveConfig ===

impl ActiveConfig {
    /// The setting, its file, and when the certificate expires in seconds of Unix time.
    fn ends(&self, TlsFiles { certificate, client_ca, .. }: &TlsFiles) -> Vec<CertificateEnd> {
        [
            ("tls.certificate", Some(certificate), self.certificate_ends),
            ("tls.client_ca", client_ca.as_ref(), self.client_ca_ends),
        ]
        .into_iter()
        .filter_map(|(setting, file, end)| Some((setting, file?.display().to_string(), end?)))
        .collect()
    }
}

// === impl Certificates ===

impl Certificates {
    /// The expiry of each.
    pub(super) fn ends(&self) -> Vec<CertificateEnd> {
        self.tls.iter().flat_map(|tls| tls.ends()).chain(self.others.clone()).collect()
    }
}

/// The setting and a warning, if this certificate expires soon.
pub(crate) fn near_end_warning((setting, file, end): CertificateEnd) -> Option<(&'static str, String)> {
    let (left, ends_at) = near_end(end)?;
    Some((setting, format!("{file} expires at {ends_at}, left: {left}; {}", certificate_remedy(setting))))
}

/// The time left and the expiry of a certificate that expires soon or has expired.
fn near_end(end: i64) -> Option<(String, String)> {
    let left = end.saturating_sub(now());
    if left >= i64::try_from(CERTIFICATE_NEAR_END.as_secs()).unwrap_or(i64::MAX) {
        return None;
    }
    let ends_at = jiff::Timestamp::from_second(end).map_or_else(|_| end.to_string(), |at| at.to_string());
    let left =
        if left > 0 { duration::text(Duration::from_secs(left.unsigned_abs())) } else { "none: it has expired".to_owned() };
    Some((left, ends_at))
}

/// Warns at the start, after a change and once a day about certificates that expire soon or have expired.
pub(super) async fn watch_ends(certificates: Arc<Certificates>) {
    const CHECK_EVERY: Duration = Duration::from_secs(60);
    const WARN_EVERY: Duration = Duration::from_secs(24 * 3600);
    let mut last_warned: Option<(Vec<CertificateEnd>, Instant)> = None;
    loop {
        let ends = certificates.ends();
        let is_due = last_warned.as_ref().is_none_or(|(earlier, at)| *earlier != ends || at.elapsed() >= WARN_EVERY);
        if is_due {
            ends.iter().for_each(|(setting, file, end)| warn_near_end(setting, file, *end));
            last_warned = Some((ends, Instant::now()));
        }
        tokio::time::sleep(CHECK_EVERY).await;
    }
}

fn warn_near_end(setting: &str, file: &str, end: i64) {
    let Some((left, ends_at)) = near_end(end) else { return };
    tracing::warn!(
        event = "certificate_near_end",
        setting,
        file,
        ends_at,
        left,
        "{setting} expires soon: {}",
        certificate_remedy(setting)
    );
}

impl Collect for Certificates {
    fn collect(&self, page: &mut Page) {
        for (setting, _, end) in self.ends() {
            page.gauge(
                "byokgate_tls_certificate_expires_seconds",
                "Until the first certificate of that file expires; negative after that",
            )
            .add(&[("setting", setting)], end.saturating_sub(now()) as f64);
        }
    }
}

impl Source for Arc<Tls> {
    fn name(&self) -> &'static str {
        "tls"
    }

    fn files(&self) -> Vec<PathBuf> {
        let TlsFiles { certificate, key, client_ca } = &self.files;
        [Some(certificate), Some(key), client_ca.as_ref()].into_iter().flatten().cloned().collect()
    }

    fn secrets(&self) -> Vec<PathBuf> {
        vec![self.files.key.clone()]
    }

    fn reload(&mut self) -> Result<Reloaded, Fault> {
        self.refresh().map_err(|fault| Fault(chain(&fault)))
    }
}

// === impl Content ===

impl Content {
    fn read(files: &TlsFiles) -> Result<Self, ServerError> {
        Ok(Self {
            certificate: read(&files.certificate)?,
            key: read(&files.key)?,
            client_ca: files.client_ca.as_deref().map(read).transpose()?,
        })
    }

    fn hash(&self) -> blake3::Hash {
        with_stack_wiped(|| {
            let mut hasher = blake3::Hasher::new();
            for part in [Some(&self.certificate), Some(&self.key), self.client_ca.as_ref()] {
                let part = part.map(|part| part.as_slice()).unwrap_or_default();
                hasher.update(&part.len().to_le_bytes()).update(part);
            }
            hasher.finalize()
        })
    }

    fn load(&self, files: &TlsFiles, callers: &Arc<Callers>) -> Result<ActiveConfig, ServerError> {
        let ends = |pem: &Zeroizing<Vec<u8>>| first_end(&certificates(pem).ok()?);
        Ok(ActiveConfig {
            config: Arc::new(self.config(files, callers)?),
            certificate_ends: ends(&self.certificate),
            client_ca_ends: self.client_ca.as_ref().and_then(ends),
        })
    }

    fn config(&self, files: &TlsFiles, callers: &Arc<Callers>) -> Result<ServerConfig, ServerError> {
        let fault = |path: &Path, message: String| ServerError::Content { path: path.to_owned(), message };
        let chain = certificates(&self.certificate).map_err(|message| fault(&files.certificate, message))?;
        if let Some(expired) = expired(&chain) {
            return Err(fault(&files.certificate, expired));
        }
        // The parser's own message might quote the file.
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|_| fault(&files.key, "holds no private key in PEM (PKCS#8, PKCS#1 or SEC1)".to_owned()))?;
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
            .map_err(|failed| fault(&files.certificate, failed.to_string()))?;
        let builder = match (&self.client_ca, &files.client_ca) {
            (Some(pem), Some(path)) => {
                let verifier = client_verifier(pem, provider, callers).map_err(|message| fault(path, message))?;
                builder.with_client_cert_verifier(verifier)
            }
            (_, _) => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|failed| {
            // The library's words add nothing to a mismatch.
            let failed = if matches!(failed, rustls::Error::InconsistentKeys(_)) { String::new() } else { format!(": {failed}") };
            fault(&files.certificate, format!("does not match the key in {}{failed}", files.key.display()))
        })?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session is not verified again, so a client could keep one after its authority or name was removed.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }
}

pub(super) fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, ServerError> {
    let bytes = files::read(path, MAX_PEM_BYTES).map_err(|source| ServerError::File { path: path.to_owned(), source })?;
    if bytes.len() as u64 > MAX_PEM_BYTES {
        return Err(ServerError::Content { path: path.to_owned(), message: format!("is over {MAX_PEM_BYTES} bytes long") });
    }
    Ok(bytes)
}

/// All certificates of a PEM file. There must be one.
fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    // The parser's own message might quote the file, byte by byte.
    let cut = |_| "holds no certificate in PEM, or one that is cut short".to_owned();
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(cut)?;
    if found.is_empty() { Err("holds no certificate in PEM".to_owned()) } else { Ok(found) }
}

/// The authorities in a PEM file. There must be one.
pub(crate) fn authorities(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for authority in certificates(pem)? {
        roots.add(authority).map_err(|fault| format!("holds a certificate that cannot be an authority: {fault}"))?;
    }
    Ok(roots)
}

/// When the chain of a PEM file expires, in seconds of Unix time. An error if its own certificate, the first, has expired.
pub(crate) fn end_of_own(pem: &[u8]) -> Result<Option<i64>, String> {
    let chain = certificates(pem)?;
    match expired(&chain) {
        Some(expired) => Err(expired),
        None => Ok(first_end(&chain)),
    }
}

/// When the first of these certificates expires, and with it a chain, in seconds of Unix time.
fn first_end(certificates: &[CertificateDer<'_>]) -> Option<i64> {
    certificates.iter().filter_map(end_of_validity).min()
}

/// The message, if the first certificate of a chain has expired.
fn expired(chain: &[CertificateDer<'_>]) -> Option<String> {
    let end = chain.first().and_then(end_of_validity).filter(|end| *end <= now())?;
    let ended = jiff::Timestamp::from_second(end).map_or_else(|_| end.to_string(), |at| at.to_string());
    Some(format!("the certificate expired at {ended}"))
}

fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs().try_into().unwrap_or(i64::MAX)
}

/// When a certificate expires, in seconds of Unix time. It reads `notAfter`, six fields into the DER. The library that verifies chains does not
/// expose it, and a full X.509 parser is a large dependency for one date.
fn end_of_validity(certificate: &CertificateDer<'_>) -> Option<i64> {
    const SEQUENCE: u8 = 0x30;
    const EXPLICIT_VERSION: u8 = 0xa0;
    const UTC_TIME: u8 = 0x17;
    const GENERALIZED_TIME: u8 = 0x18;
    let (_, certificate, _) = element(certificate)?;
    let (_, signed, _) = element(certificate)?;
    let mut rest = signed;
    if rest.first() == Some(&EXPLICIT_VERSION) {
        rest = element(rest)?.2;
    }
    // Skip serial number, signature algorithm and issuer.
    for _ in 0..3 {
        rest = element(rest)?.2;
    }
    let (tag, validity, _) = element(rest)?;
    let (_, _, rest) = element(validity).filter(|_| tag == SEQUENCE)?;
    let (tag, text, _) = element(rest)?;
    let text = std::str::from_utf8(text).ok()?;
    // Two-digit years mean 1950 to 2049.
    let text = match tag {
        UTC_TIME if text.as_bytes().first()? < &b'5' => format!("20{text}"),
        UTC_TIME => format!("19{text}"),
        GENERALIZED_TIME => text.to_owned(),
        _ => return None,
    };
    let parsed = jiff::civil::DateTime::strptime("%Y%m%d%H%M%SZ", text).ok()?;
    Some(parsed.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().as_second())
}

/// The first DER element: its tag, its content, and the bytes after it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, first], rest) = der.split_first_chunk::<2>()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x84 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

// === clients ===

/// Accepts a client only if the authority signed its certificate and its name is on the list of callers. Both are checked in the handshake, so
/// that no other client gets to send HTTP.
#[derive(Debug)]
struct ListedClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    callers: CallersOnly,
}

struct CallersOnly(Arc<Callers>);

fn client_verifier(
    pem: &[u8],
    provider: Arc<CryptoProvider>,
    callers: &Arc<Callers>,
) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let chain = WebPkiClientVerifier::builder_with_provider(Arc::new(authorities(pem)?), provider)
        .build()
        .map_err(|fault| format!("cannot verify clients: {fault}"))?;
    Ok(Arc::new(ListedClientVerifier { chain, callers: CallersOnly(Arc::clone(callers)) }))
}

/// The names in a certificate: URIs, then DNS names. `None` if it does not parse.
pub(super) fn names_of(certificate: &CertificateDer<'_>) -> Option<Vec<String>> {
    let parsed = webpki::EndEntityCert::try_from(certificate).ok()?;
    Some(parsed.valid_uri_names().chain(parsed.valid_dns_names()).map(str::to_owned).collect())
}

impl ClientCertVerifier for ListedClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let names = names_of(end_entity);
        record_presented_names(names.as_deref().unwrap_or_default());
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        let names = names.ok_or(CertificateError::BadEncoding)?;
        if self.callers.0.allows_names(&names) {
            Ok(verified)
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

impl std::fmt::Debug for CallersOnly {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Callers(..)")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;
    use crate::server::settings::CallerSettings;

    /// A self-signed certificate that expires on the first of January of the given year, and its key.
    fn certificate(end: i32) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.not_before = date_time_ymd(2001, 1, 1);
        params.not_after = date_time_ymd(end, 1, 1);
        (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
    }

    #[test]
    fn the_end_of_validity_is_read_in_both_notations() {
        for (end, expect) in [(2002, 1_009_843_200), (2049, 2_493_072_000), (2060, 2_840_140_800)] {
            let der = certificates(certificate(end).0.as_bytes()).unwrap().remove(0);
            assert_eq!(end_of_validity(&der), Some(expect), "{end}");
            for length in 0..der.len().min(200) {
                // A certificate that is cut off anywhere gives nothing, and no panic.
                assert_eq!(end_of_validity(&CertificateDer::from(&der[..length])), None, "{length}");
            }
        }
    }

    #[test]
    fn a_reload_takes_valid_files_and_otherwise_keeps_the_last_valid_ones() {
        let folder = tempfile::tempdir().unwrap();
        let files = TlsFiles { certificate: folder.path().join("c"), key: folder.path().join("k"), client_ca: None };
        let write = |pair: &(String, String)| {
            fs::write(&files.certificate, &pair.0).unwrap();
            fs::write(&files.key, &pair.1).unwrap();
        };
        let (first, second, expired) = (certificate(2060), certificate(2060), certificate(2002));
        write(&first);
        let callers = Arc::new(Callers::new(&CallerSettings::default(), None, &Arc::default()).unwrap());
        let tls = Tls::load(files.clone(), callers).unwrap();
        let active = Arc::as_ptr(&tls.active.load_full());
        let stays = |why: &str, fault: &str| {
            let said = super::chain(&tls.refresh().unwrap_err());
            assert!(said.contains(fault), "{why}: {said}");
            assert_eq!(Arc::as_ptr(&tls.active.load_full()), active, "{why}");
        };
        assert_eq!(tls.refresh().unwrap(), Reloaded::Unchanged);
        fs::write(&files.certificate, &second.0).unwrap();
        stays("certificate first", "does not match the key");
        write(&first);
        assert_eq!(tls.refresh().unwrap(), Reloaded::Unchanged);
        fs::write(&files.key, &second.1).unwrap();
        stays("key first", "does not match the key");
        write(&(first.0.clone(), "made-up-canary".to_owned()));
        stays("malformed key", "holds no private key");
        write(&("-----BEGIN CERTIFICATE-----\n".to_owned(), first.1.clone()));
        stays("half-written certificate", "cut short");
        write(&(String::new(), first.1.clone()));
        stays("empty certificate", "holds no certificate");
        write(&expired);
        stays("expired", "expired at 2002-01-01T00:00:00Z");
        fs::remove_file(&files.key).unwrap();
        stays("gone", "could not be read");
        write(&second);
        assert_eq!(tls.refresh().unwrap(), Reloaded::Taken);
        assert_ne!(Arc::as_ptr(&tls.active.load_full()), active);
    }
}
