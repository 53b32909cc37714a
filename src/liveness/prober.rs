//! Probes over HTTPS. A probe has one budget for all its requests, follows no redirect, uses no proxy but the configured one, and connects only
//! to allowed addresses. Bodies are limited, and credential headers are marked sensitive.

mod endpoints;

use http::{HeaderName, HeaderValue, header};
use rand::Rng;
use std::{
    collections::BTreeMap,
    io::ErrorKind,
    net::SocketAddr,
    sync::{Arc, Once},
    time::{Duration, SystemTime},
};
use tokio::time::{Instant, timeout_at};
use tracing::Instrument;

use self::endpoints::{BUDGET as CALIBRATION_BUDGET, CalibrationRequest, Endpoints, header_of};
use crate::{
    core::{
        classify::{
            Answer, Body, Calibration, Classification, Finding, ProbeResponse, from_a_cache, is_from_a_cache, is_page, read,
        },
        endpoint::{Call, Target},
        endpoint_facts::{CalibrationQuestion, EndpointFacts},
        engine::{Boxed, ProbeRequest, Prober},
        made_up_key::{KeyForm, can_be_imitated, made_up_key},
        probe_plan::{Client, Lesson, Next, ProbePlan, Requests, outcome_of},
        response_shape::ResponseShape,
    },
    domain::{
        causes::causes,
        protocol::{HeaderFamily, Method},
        secret::Secret,
        verdict::{MadeUpKey, Unreached, Verdict},
    },
    liveness::egress::{Egress, EgressSettings, ForwardProxy, Unresolved},
    telemetry::{
        metrics::{Collect, Page},
        traces,
    },
};

/// How many bytes of a body are read. An error is under 1 KiB, and the start of a list is enough to recognize its shape.
pub(crate) const MAX_BODY_BYTES: usize = 64 * 1024;
/// It is stable and says what it is, so that vendors can recognize these requests.
const USER_AGENT: &str = concat!("byok-gate/", env!("CARGO_PKG_VERSION"), " (credential liveness check)");
/// How long an idle connection is kept. A burst of creates reuses it, and an idle service does not hold it for long.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// How many idle connections are kept for each host.
const MAX_IDLE_CONNECTIONS: usize = 16;

/// How providers are probed.
#[derive(Debug, Clone)]
pub struct ProbeSettings {
    /// The time for all requests of a probe, connecting included, if the catalogue row sets none.
    pub budget: Duration,
    /// Allows loopback addresses, over plain http too. For tests and providers on the same host.
    pub allow_loopback_http: bool,
    /// Which other addresses are allowed.
    pub egress: EgressSettings,
    /// The proxy for everything outside the operator's own network.
    pub proxy: Option<ForwardProxy>,
    /// Whether endpoints are tested with made-up keys. One-shot commands switch it off and rely on the catalogue.
    pub calibrate: bool,
    /// Further certificate authorities, in PEM.
    pub extra_roots: Vec<u8>,
    /// Fixed addresses of host names, like curl's `--resolve`.
    pub resolve: BTreeMap<String, SocketAddr>,
}

/// Probes providers over HTTPS.
pub struct HttpProber {
    http: Arc<Http>,
    /// What is known of endpoints. `None` if made-up keys must not be sent.
    endpoints: Option<Endpoints>,
    budget: Duration,
}

/// The client could not be built.
#[derive(Debug, thiserror::Error)]
#[error("the probe's HTTPS client could not be built")]
pub struct ProbeSetupError(#[source] reqwest::Error);

/// The HTTPS client with its rules. Probes and calibrations share it.
struct Http {
    client: reqwest::Client,
    egress: Egress,
}

/// The result of one request.
enum Exchange {
    Answered(Box<Response>),
    TimedOut,
    Unreachable(Unreached),
    Exhausted,
}

/// One request of a probe, for `--explain`. It holds no credential and none of the provider's text.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// The probe's name.
    pub probe: String,
    /// Its method.
    pub method: Method,
    /// Its URL. The model may be part of it.
    pub url: String,
    /// The header or headers that carried the credential.
    pub header: String,
    /// The response.
    pub response: ProbeResponse,
    /// How the endpoint answered a made-up key, if that is known.
    pub calibration: Calibration,
    /// How long the request took.
    pub took: Duration,
}

/// The facts of a response.
struct Response {
    status: u16,
    body: Vec<u8>,
    truncated: bool,
    page: bool,
    is_from_a_cache: bool,
    retry_after: Option<Duration>,
}

impl Default for ProbeSettings {
    fn default() -> Self {
        Self {
            budget: Duration::from_secs(3),
            allow_loopback_http: false,
            egress: EgressSettings::default(),
            proxy: None,
            calibrate: true,
            extra_roots: Vec::new(),
            resolve: BTreeMap::new(),
        }
    }
}

// === impl HttpProber ===

impl HttpProber {
    /// Builds a prober with these settings.
    pub fn new(settings: ProbeSettings) -> Result<Self, ProbeSetupError> {
        let ProbeSettings { budget, allow_loopback_http, egress, proxy, calibrate, extra_roots, resolve } = settings;
        let egress = Egress::new(allow_loopback_http, &egress, proxy.as_ref());
        // Less than the budget, so that a connection that never comes about is told apart from a slow answer.
        let connect_timeout = budget * 3 / 4;
        let client = client(&egress, proxy, resolve, &extra_roots, connect_timeout).map_err(ProbeSetupError)?;
        let http = Arc::new(Http { client, egress });
        let endpoints = calibrate.then(|| Endpoints::new(Arc::clone(&http)));
        Ok(Self { http, endpoints, budget })
    }

    /// Probes once, and returns every request too.
    pub async fn explain(&self, target: &Target, secret: &Secret) -> (Finding, Vec<Attempt>) {
        let deadline = Instant::now() + target.endpoint.budget.unwrap_or(self.budget);
        let mut attempts = Vec::new();
        let finding = run_plan(&self.http, self.endpoints.as_ref(), target, secret, deadline, &mut attempts).await;
        (finding, attempts)
    }

    /// Whether the configuration allows the request's scheme and address. A host name is not resolved for this.
    pub fn may_ask(&self, call: &Call) -> bool {
        self.http.egress.may_ask(&call.url)
    }

    /// Sends one request with a made-up key that begins like this vendor's keys. With no headers, it sends no key. For commands that look for
    /// changes at endpoints.
    pub async fn control(&self, call: &Call, families: &[HeaderFamily], key_prefix: Option<&str>) -> ProbeResponse {
        let made_up = made_up_key(key_prefix, |below| rand::rng().random_range(0..below));
        ask(&self.http, call, families, &made_up, Instant::now() + CALIBRATION_BUDGET).await
    }
}

impl Collect for HttpProber {
    fn collect(&self, page: &mut Page) {
        self.endpoints.iter().for_each(|endpoints| endpoints.collect(page));
    }
}

impl Prober for HttpProber {
    fn probe(&self, request: ProbeRequest) -> Boxed<'static, Finding> {
        let ProbeRequest { target, secret, started, credential: _, source: _ } = request;
        let budget = target.endpoint.budget.unwrap_or(self.budget);
        let (http, endpoints) = (Arc::clone(&self.http), self.endpoints.clone());
        Box::pin(async move {
            started.set();
            run_plan(&http, endpoints.as_ref(), &target, &secret, Instant::now() + budget, &mut Vec::new()).await
        })
    }
}

/// Runs the plan to its end. The deadline ends a request that is in flight.
async fn run_plan(
    http: &Http,
    endpoints: Option<&Endpoints>,
    target: &Target,
    secret: &Secret,
    deadline: Instant,
    attempts: &mut Vec<Attempt>,
) -> Finding {
    let facts = endpoints.map_or_else(EndpointFacts::default, |endpoints| endpoints.facts_of(&target.endpoint));
    let requests = Requests {
        is_pointless: &|call, family| endpoints.is_some_and(|endpoints| endpoints.is_uninformative(call, family)),
        has_accepted: &|call, family| endpoints.is_some_and(|endpoints| endpoints.has_accepted(call, family)),
        refusals: &|call, family| endpoints.map(|endpoints| endpoints.refusals(call, family)).unwrap_or_default(),
    };
    // A key whose form cannot be imitated is compared with a made-up key of the usual form.
    let can_be_imitated = can_be_imitated(secret, target.endpoint.key_prefix.as_deref());
    let client = Client {
        preference: target.preference,
        usual_header: target.endpoint.client_header,
        key_form: can_be_imitated.then(|| KeyForm::of(secret)),
    };
    let mut plan = ProbePlan::new(&target.calls, client, &facts, requests);
    let mut asked: Vec<(&Call, Vec<HeaderFamily>)> = Vec::new();
    let finding = loop {
        match plan.proceed() {
            Next::Done(finding) => break finding,
            Next::Ask { call, families, is_second } => {
                let began = Instant::now();
                let response = ask(http, call, &families, secret, deadline).await;
                if let (ProbeResponse::Answer { reading, shape, .. }, Some(endpoints)) = (&response, endpoints) {
                    match &reading.classification {
                        Classification::Accepted if is_second => endpoints.record_second_answer(call, &families, None),
                        Classification::Accepted => endpoints.record_acceptance(call, &families),
                        Classification::Verdict(Verdict::RateLimited | Verdict::ProviderError) => {}
                        _ if is_second => endpoints.record_second_answer(call, &families, Some(shape.clone())),
                        Classification::Verdict(Verdict::Invalid) | Classification::Unread
                            if shape.status == 401 && shape.body != Body::Page =>
                        {
                            endpoints.record_refusal(call, &families, secret, shape);
                        }
                        _ => {}
                    }
                }
                attempts.push(Attempt {
                    probe: call.probe.name.clone(),
                    method: call.probe.method,
                    url: call.url.to_string(),
                    header: header_of(&families),
                    response: response.clone(),
                    calibration: Calibration::NotAsked,
                    took: began.elapsed(),
                });
                asked.push((call, families));
                plan.take_response(response);
            }
            // The made-up key is sent after the real one and never at the same time: a server that allows one request at a time would refuse one
            // because of the other. The first caller at an endpoint waits for the answer.
            Next::Calibrate { call, families, question } => {
                let ask = CalibrationRequest { call, families: &families, target, secret, question };
                let calibration = match (endpoints, question) {
                    (None, _) => Calibration::NotAsked,
                    (Some(endpoints), CalibrationQuestion::Acceptance(_)) => {
                        endpoints.calibrate(ask, three_quarters_of(deadline)).await
                    }
                    (Some(endpoints), CalibrationQuestion::Refusal | CalibrationQuestion::RefusalNow) => {
                        endpoints.calibrate(ask, half_of(deadline)).await
                    }
                    // The documentation is trusted for now, and checked in the background for the next probe.
                    (Some(endpoints), CalibrationQuestion::Check) => endpoints.calibrate_in_background(ask),
                };
                if let Some(attempt) = attempts.last_mut() {
                    attempt.calibration = calibration.clone();
                }
                plan.take_calibration(&calibration);
            }
            Next::Keyless { call, now: true } => {
                let no_key = Secret::new(String::new());
                let response = match endpoints {
                    None => ProbeResponse::TimedOut,
                    Some(_) => ask(http, call, &[], &no_key, half_of(deadline)).await,
                };
                plan.take_keyless(match &response {
                    ProbeResponse::Answer { shape, .. } => Some(shape),
                    _ => None,
                });
            }
            Next::Keyless { call, now: false } => {
                let calibration = match endpoints {
                    None => Calibration::NotAsked,
                    Some(endpoints) => {
                        let question = CalibrationQuestion::Refusal;
                        let ask = CalibrationRequest { call, families: &[], target, secret, question };
                        endpoints.calibrate(ask, half_of(deadline)).await
                    }
                };
                plan.take_keyless(match &calibration {
                    Calibration::Refuses { shape, .. } => Some(shape),
                    _ => None,
                });
            }
        }
    };
    // A clear answer needs no calibration, but the result of an earlier one may be known.
    for (attempt, (call, families)) in attempts.iter_mut().zip(&asked) {
        if attempt.calibration == Calibration::NotAsked {
            attempt.calibration =
                endpoints.map(|endpoints| endpoints.known(call, families, CalibrationQuestion::Refusal)).unwrap_or_default();
        }
    }
    let decisive = |attempt: &&Attempt| {
        attempt.probe == finding.probe && Some(attempt.header.as_str()) == finding.family.map(HeaderFamily::as_str)
    };
    // Report how a made-up key fared at the decisive request, or else at another request of this probe, so that "not asked" is never wrong.
    let there = attempts.iter().rev().find(decisive).into_iter().chain(attempts.iter().rev());
    let finding = match there.map(|attempt| outcome_of(&attempt.calibration)).find(|got| *got != MadeUpKey::NotAsked) {
        Some(made_up) if finding.made_up == MadeUpKey::NotAsked => Finding { made_up, ..finding },
        _ => finding,
    };
    if let Some(endpoints) = endpoints {
        let lessons = plan.into_lessons();
        // The last request that carried the key in several headers at once.
        let in_several = asked.iter().rev().find(|(_, families)| families.len() > 1);
        for lesson in &lessons {
            if let (Lesson::Family { right, .. }, Some((call, several))) = (lesson, in_several)
                && several.contains(right)
            {
                endpoints.copy_facts(call, several, *right);
            }
        }
        endpoints.learn(&target.endpoint, lessons);
        endpoints.record_finding(&target.endpoint, &finding);
    }
    finding
}

/// Half of the time left: the next request needs time too.
fn half_of(deadline: Instant) -> Instant {
    Instant::now() + deadline.saturating_duration_since(Instant::now()) / 2
}

/// Three quarters of the time left: the accepted key may have to be sent once more.
fn three_quarters_of(deadline: Instant) -> Instant {
    Instant::now() + deadline.saturating_duration_since(Instant::now()) * 3 / 4
}

/// Sends one request and reads its answer.
async fn ask(http: &Http, call: &Call, families: &[HeaderFamily], secret: &Secret, deadline: Instant) -> ProbeResponse {
    match http.exchange_with_retry(call, families, secret, deadline).await {
        Exchange::TimedOut => ProbeResponse::TimedOut,
        Exchange::Unreachable(why) => ProbeResponse::Unreachable(why),
        Exchange::Exhausted => ProbeResponse::Exhausted,
        Exchange::Answered(response) => ProbeResponse::Answer {
            // Only a GET can be answered by an HTTP cache.
            reading: if response.is_from_a_cache && call.probe.method == Method::Get {
                from_a_cache()
            } else {
                read(response.facts(), &call.probe)
            },
            shape: ResponseShape::of(response.facts(), secret.expose()),
            retry_after: response.retry_after,
        },
    }
}

/// The client of all probes.
fn client(
    egress: &Egress,
    proxy: Option<ForwardProxy>,
    resolve: BTreeMap<String, SocketAddr>,
    extra_roots: &[u8],
    connect_timeout: Duration,
) -> reqwest::Result<reqwest::Client> {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| {
        // An error means that the process has a provider already, which is as good.
        drop(rustls::crypto::ring::default_provider().install_default());
    });
    let mut builder = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .referer(false)
        .user_agent(USER_AGENT)
        // Every provider speaks HTTP/1.1. Over HTTP/2 a tenant's own host can send interim answers and other frames without end; the library
        // keeps them until the request looks, 130 MiB within three seconds.
        .http1_only()
        .pool_idle_timeout(POOL_IDLE_TIMEOUT)
        .pool_max_idle_per_host(MAX_IDLE_CONNECTIONS)
        .connect_timeout(connect_timeout)
        .dns_resolver(egress.resolver(resolve));
    if let Some(ForwardProxy { credentials, .. }) = proxy {
        let rule = egress.clone();
        let mut proxy = reqwest::Proxy::custom(move |url| rule.proxy_for(url).cloned());
        if let Some((user, password)) = credentials {
            proxy = proxy.basic_auth(&user, password.expose());
        }
        builder = builder.proxy(proxy);
    }
    if !extra_roots.is_empty() {
        builder = builder.tls_certs_merge(reqwest::Certificate::from_pem_bundle(extra_roots)?);
    }
    builder.build()
}

// === impl Http ===

impl Http {
    /// Sends one request, and sends it once more if the connection was closed before any byte of an answer. Idle connections and restarting
    /// proxies close like that. It never retries after an answer.
    async fn exchange_with_retry(&self, call: &Call, families: &[HeaderFamily], secret: &Secret, deadline: Instant) -> Exchange {
        match self.exchange(call, families, secret, deadline).await {
            Exchange::Unreachable(Unreached::Closed) => self.exchange(call, families, secret, deadline).await,
            exchange => exchange,
        }
    }

    /// Sends one request with this credential in these headers, and waits for the answer until the deadline.
    async fn exchange(&self, call: &Call, families: &[HeaderFamily], secret: &Secret, deadline: Instant) -> Exchange {
        let span = traces::request_span(call, &header_of(families));
        let exchange = self.send(call, families, secret, deadline).instrument(span.clone()).await;
        traces::record_reply(
            &span,
            match &exchange {
                Exchange::Answered(response) => Ok(response.status),
                Exchange::TimedOut => Err(None),
                Exchange::Unreachable(why) => Err(Some(*why)),
                Exchange::Exhausted => Err(Some(Unreached::Connect)),
            },
        );
        exchange
    }

    async fn send(&self, call: &Call, families: &[HeaderFamily], secret: &Secret, deadline: Instant) -> Exchange {
        if !self.egress.may_ask(&call.url) {
            return Exchange::Unreachable(Unreached::Address);
        }
        let Some(request) = self.request(call, families, secret) else { return Exchange::Unreachable(Unreached::Address) };
        match timeout_at(deadline, self.client.execute(request)).await {
            Err(_) => Exchange::TimedOut,
            Ok(Err(fault)) if fault.is_timeout() && !fault.is_connect() => Exchange::TimedOut,
            Ok(Err(fault)) if is_resource_exhaustion(&fault) => Exchange::Exhausted,
            Ok(Err(fault)) => Exchange::Unreachable(match unreached(&fault) {
                // The proxy failed, not the provider: it could not be reached, or it refused the request.
                Unreached::Connect | Unreached::ConnectTimeout | Unreached::Closed | Unreached::Dns
                    if fault.is_connect() && self.egress.proxy_for(&call.url).is_some() =>
                {
                    Unreached::Proxy
                }
                why => why,
            }),
            Ok(Ok(response)) => Exchange::Answered(Box::new(receive(response, deadline).await)),
        }
    }

    /// `None` if the credential cannot be a header value. The shape check has ruled that out before.
    fn request(&self, call: &Call, families: &[HeaderFamily], secret: &Secret) -> Option<reqwest::Request> {
        let method = match call.probe.method {
            Method::Get => reqwest::Method::GET,
            Method::Post => reqwest::Method::POST,
        };
        let mut request = reqwest::Request::new(method, call.url.clone());
        let headers = request.headers_mut();
        for (name, value) in &call.probe.headers {
            headers.insert(HeaderName::from_bytes(name.as_bytes()).ok()?, HeaderValue::from_str(value).ok()?);
        }
        headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        // Without this header a server may compress (RFC 9110, section 12.5.3), and a compressed body is not read.
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        for family in families {
            let (name, value) = credential_header(*family, secret)?;
            headers.insert(name, value);
        }
        if let Some(body) = &call.body {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
            *request.body_mut() = Some(body.to_string().into());
        }
        Some(request)
    }
}

/// Whether this machine had no descriptor, buffer or memory left.
fn is_resource_exhaustion(fault: &(dyn std::error::Error + 'static)) -> bool {
    let exhaustion_codes = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
    let code = |error: &(dyn std::error::Error + 'static)| error.downcast_ref::<std::io::Error>()?.raw_os_error();
    causes(fault).filter_map(code).any(|code| exhaustion_codes.contains(&code))
}

/// What failed before an answer, as far as the chain of causes says.
fn unreached(fault: &reqwest::Error) -> Unreached {
    if fault.is_timeout() {
        return Unreached::ConnectTimeout;
    }
    for error in causes(fault) {
        if let Some(unresolved) = error.downcast_ref::<Unresolved>() {
            return match unresolved {
                Unresolved::Lookup(_) => Unreached::Dns,
                Unresolved::Refused => Unreached::Address,
            };
        }
        if let Some(error) = error.downcast_ref::<rustls::Error>() {
            return of_tls(error);
        }
        if error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_parse) {
            return Unreached::Protocol;
        }
        if let Some(error) = error.downcast_ref::<hyper::Error>()
            && (error.is_incomplete_message() || error.is_closed() || error.is_canceled())
        {
            return Unreached::Closed;
        }
        let io = error.downcast_ref::<std::io::Error>();
        if io.is_some_and(|io| matches!(io.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof))
        {
            // While connecting, a peer that does not speak TLS ends the handshake like this.
            return if fault.is_connect() { Unreached::Tls } else { Unreached::Closed };
        }
    }
    Unreached::Connect
}

/// What is wrong with the certificate, if that is what failed.
fn of_tls(fault: &rustls::Error) -> Unreached {
    use rustls::CertificateError as Fault;
    match fault {
        rustls::Error::InvalidCertificate(
            Fault::Expired | Fault::ExpiredContext { .. } | Fault::NotValidYet | Fault::NotValidYetContext { .. },
        ) => Unreached::TlsExpired,
        rustls::Error::InvalidCertificate(Fault::NotValidForName | Fault::NotValidForNameContext { .. }) => Unreached::TlsName,
        rustls::Error::InvalidCertificate(Fault::UnknownIssuer) => Unreached::TlsIssuer,
        _ => Unreached::Tls,
    }
}

/// The header with the credential. It is marked sensitive, so that no client prints it and no HPACK table stores it.
fn credential_header(family: HeaderFamily, secret: &Secret) -> Option<(HeaderName, HeaderValue)> {
    let (name, mut value) = match family {
        HeaderFamily::Bearer => {
            let value = zeroize::Zeroizing::new(format!("Bearer {}", secret.expose()));
            (header::AUTHORIZATION, HeaderValue::from_str(&value).ok()?)
        }
        HeaderFamily::XApiKey => (HeaderName::from_static("x-api-key"), HeaderValue::from_str(secret.expose()).ok()?),
        HeaderFamily::XGoogApiKey => (HeaderName::from_static("x-goog-api-key"), HeaderValue::from_str(secret.expose()).ok()?),
        HeaderFamily::ApiKey => (HeaderName::from_static("api-key"), HeaderValue::from_str(secret.expose()).ok()?),
    };
    value.set_sensitive(true);
    Some((name, value))
}

/// Reads the status, and the body up to the limit. If the body stalls, breaks off or is too long, the part that was read is used.
async fn receive(mut response: reqwest::Response, deadline: Instant) -> Response {
    let status = response.status().as_u16();
    let retry_after = response.headers().get(header::RETRY_AFTER).and_then(|value| retry_after(value, SystemTime::now()));
    let page = is_page(response.headers());
    let is_from_a_cache = is_from_a_cache(response.headers());
    let mut body = Vec::new();
    let truncated = loop {
        match timeout_at(deadline, response.chunk()).await {
            Ok(Ok(Some(chunk))) => {
                let room = MAX_BODY_BYTES.saturating_sub(body.len());
                body.extend(chunk.iter().take(room));
                if chunk.len() > room {
                    break true;
                }
            }
            Ok(Ok(None)) => break false,
            Ok(Err(_)) | Err(_) => break true,
        }
    };
    Response { status, body, truncated, page, is_from_a_cache, retry_after }
}

/// Seconds, or an HTTP date.
pub(crate) fn retry_after(value: &HeaderValue, now: SystemTime) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let at = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
    Some(SystemTime::from(at).duration_since(now).unwrap_or_default())
}

// === impl Response ===

impl Response {
    fn facts(&self) -> Answer<'_> {
        let Self { status, ref body, truncated, page, is_from_a_cache: _, retry_after } = *self;
        Answer { status, body, truncated, page, retry_after }
    }
}

#[cfg(test)]
mod tests {
    use strum::VariantArray;

    use super::*;

    #[test]
    fn a_lack_of_descriptors_here_is_not_the_providers_fault() {
        for (code, own) in [(libc::EMFILE, true), (libc::ENFILE, true), (libc::ENOMEM, true), (libc::ECONNREFUSED, false)] {
            let bare = std::io::Error::from_raw_os_error(code);
            assert_eq!(is_resource_exhaustion(&bare), own, "{code}");
            // The same, wrapped by the resolver and once more.
            let looked_up = Unresolved::Lookup(std::io::Error::from_raw_os_error(code));
            assert_eq!(is_resource_exhaustion(&std::io::Error::other(looked_up)), own, "{code}");
        }
    }

    #[test]
    fn every_credential_header_is_sensitive() {
        let secret = Secret::new("made-up-canary".into());
        for &family in HeaderFamily::VARIANTS {
            let (name, value) = credential_header(family, &secret).unwrap();
            assert!(value.is_sensitive(), "{name}");
            assert_eq!(format!("{value:?}"), "Sensitive", "{name}");
        }
    }

    #[test]
    fn retry_after_takes_seconds_and_dates() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777); // Sun, 06 Nov 1994 08:49:37 GMT
        let parse = |text| retry_after(&HeaderValue::from_static(text), now);
        assert_eq!(parse("7"), Some(Duration::from_secs(7)));
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:47 GMT"), Some(Duration::from_secs(10)));
        assert_eq!(parse("Sun, 06 Nov 1994 08:49:27 GMT"), Some(Duration::ZERO));
        assert_eq!(parse("soon"), None);
        assert_eq!(parse("-1"), None);
    }
}
