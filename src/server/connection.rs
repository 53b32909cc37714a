//! Serves one connection: TLS handshake, HTTP/2 preface, HTTP/2. For each call it finds the caller, applies limits and the deadline, and calls
//! the service.
//!
//! It uses hyper directly, without tonic's transport. tonic's transport answers an expired grpc-timeout with CANCELLED, does not end a client
//! that never reads, and reads certificates only once.

use std::{
    convert::Infallible,
    future::poll_fn,
    io,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderMap, Request, Response};
use hyper::{
    body::{Bytes, Frame, Incoming},
    server::conn::http2,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rand::Rng;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};
use tonic::{Code, Status, body::Body, service::Routes};
use tower_service::Service;

use super::{
    call_limit::CallPermit,
    callers::{Callers, Identity},
    connections::{CallGuard, ConnectionCounts, ConnectionState, Place},
    health::Phase,
    inline_executor::InlineExecutor,
    listen::{Accepted, Stream},
    refused::{HandshakeFault, Refusal, handshake, is_port_check},
    request_body::{ByteBudget, CallBytes, CountedBody},
    settings::ServerSettings,
    tls::{Tls, names_of},
};
use crate::{
    domain::request::Peer,
    grpc::{
        NAME,
        authorize::{Authorizer, Caller, Role},
        call_record::{CallRecord, Recorder},
        convert::{
            Violations,
            pb::{ErrorReason, policy_decision_service_server::PolicyDecisionServiceServer},
        },
        deadline::Deadline,
        errors::{bad_request, draining, error, with_standard_details},
        limits::{Deadlines, Limits},
        service::{AnswerLength, PolicyDecision},
    },
    telemetry::metrics::calls::{BATCH_DECIDE, known_method},
};

/// The first bytes of an HTTP/2 client.
pub(super) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The first bytes of a TLS client: a handshake record of TLS 1.
const TLS_RECORD: [u8; 2] = [0x16, 0x03];
/// An empty SETTINGS frame, which a server must send first.
const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
/// GOAWAY's code for a peer that asks for too much.
const ENHANCE_YOUR_CALM: u8 = 0x0b;
/// The answer to a client without TLS on a TLS port: a fatal alert, `unexpected_message`. A GOAWAY would be easier to read, but gRPC clients
/// lose its text: grpc-go reports a draining connection, and retries for ever.
const TLS_ALERT: [u8; 7] = [0x15, 0x03, 0x03, 0, 2, 2, 10];
/// The answer to a client that speaks TLS or HTTP/1.1 on a port that does not. A TLS client does not show the text, but reports that the server
/// does not speak TLS.
const NEEDS_HTTP2: &str =
    "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\nthis port speaks gRPC over HTTP/2";
/// The answer to a client that speaks HTTP/2 but not gRPC.
const NOT_GRPC: &str = "the content type must be application/grpc or application/grpc+proto: this port speaks gRPC\n";
/// The first bytes of an HTTP/1.1 request.
const METHODS: [&[u8]; 6] = [b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS "];
/// How many bytes a peer may send before any are read, for one call and for all calls of a connection.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 256 * 1024;
/// How many bytes of one answer may wait for a client that does not read.
const SEND_BUFFER: usize = 64 * 1024;
/// After the end of a call, its answer is dropped if the client has not read it within this time.
const ANSWER_READ_TIME: Duration = Duration::from_secs(1);
/// How long the statuses of calls that are cut off at the end of a drain may take to be sent.
pub(super) const CUT_OFF_GRACE: Duration = Duration::from_millis(100);
/// How long a connection that ignores GOAWAY is kept beyond the longest deadline of a call.
const GOAWAY_GRACE: Duration = Duration::from_secs(2);
/// What an answer of reflection counts for: it holds the whole contract.
const REFLECTION_BYTES: usize = 64 * 1024;
/// The health service. Callers need no credentials for it: a kubelet has neither certificate nor token.
const HEALTH_PREFIX: &str = "/grpc.health.v1.Health/";
const HEALTH_WATCH: &str = "/grpc.health.v1.Health/Watch";

/// What all connections share.
pub(super) struct ConnectionContext {
    pub(super) callers: Arc<Callers>,
    pub(super) authorizer: Arc<Authorizer>,
    pub(super) tls: Option<Arc<Tls>>,
    /// Called directly: routing to it would make each call a tenth slower.
    pub(super) service: PolicyDecision,
    /// Health and reflection.
    pub(super) routes: Routes,
    pub(super) settings: ServerSettings,
    pub(super) limits: Limits,
    pub(super) deadlines: Deadlines,
    pub(super) recorder: Arc<Recorder>,
    pub(super) phase: watch::Receiver<Phase>,
    pub(super) bytes: Arc<ByteBudget>,
    pub(super) answers: Arc<ByteBudget>,
    pub(super) counts: Arc<ConnectionCounts>,
}

/// One connection that speaks HTTP/2.
struct Connection {
    context: Arc<ConnectionContext>,
    identity: Identity,
    state: Arc<ConnectionState>,
    inline: InlineExecutor,
}

// === impl ConnectionContext ===

impl ConnectionContext {
    /// Serves a connection until it ends.
    pub(super) async fn serve(self: Arc<Self>, accepted: Accepted, place: &Place) {
        let handshake_by = Instant::now() + self.deadlines.handshake;
        let mut phase = self.phase.clone();
        let peer = accepted.peer;
        let started = tokio::select! {
            started = timeout_at(handshake_by, self.begin(accepted)) => started,
            () = wait_for_phase(&mut phase, Phase::Draining) => return,
            () = place.state.evicted() => return,
        };
        let (io, identity) = match started {
            Ok(Ok(started)) => started,
            Ok(Err(None)) => return,
            Ok(Err(Some(refusal))) => return self.refuse(peer, refusal),
            Err(_) => return self.refuse(peer, Refusal::of(HandshakeFault::TooSlow)),
        };
        place.state.set_handshake_done();
        let inline = InlineExecutor::default();
        let connection = Arc::new(Connection { context: self, identity, state: Arc::clone(&place.state), inline });
        connection.serve(io).await;
    }

    /// Does the TLS handshake if TLS is configured, then reads the HTTP/2 preface. Any other protocol is refused.
    async fn begin(&self, accepted: Accepted) -> Result<(Rewind, Identity), Option<Refusal>> {
        let Accepted { io, peer } = accepted;
        let (mut io, names, is_plain): (Box<dyn Stream>, _, _) = match (&self.tls, peer) {
            (Some(tls), Peer::Tcp(_)) => {
                let io = expect_tls(io).await?;
                let stream = handshake(tls.acceptor().accept(io)).await?;
                let names = stream.get_ref().1.peer_certificates().and_then(<[_]>::first).map(names_of);
                // The handshake has verified the certificate, so it parses.
                let unread = || Some(Refusal::of(HandshakeFault::CertificateBad));
                let names = names.map(|names| names.ok_or_else(unread)).transpose()?;
                (Box::new(stream), names, false)
            }
            (_, _) => (io, None, true),
        };
        let mut preface = [0; PREFACE.len()];
        io.read_exact(&mut preface).await.map_err(broken_connection)?;
        if preface != *PREFACE {
            let is_tls = is_plain && preface.starts_with(&TLS_RECORD);
            // Other bytes get no answer: they may be noise of a bad network, and the client would take the text for another server's answer.
            if is_tls || METHODS.iter().any(|method| preface.starts_with(method)) {
                send_last_bytes(io, format!("{NEEDS_HTTP2}{}\n", if is_plain { ", without TLS" } else { "" }).as_bytes()).await;
            }
            let fault = if is_tls { HandshakeFault::TlsUnexpected } else { HandshakeFault::NoHttp2 };
            return Err(Some(Refusal::of(fault)));
        }
        Ok((Rewind { io, prefix: Bytes::from_static(PREFACE) }, Identity { peer, names }))
    }

    fn refuse(&self, peer: Peer, refusal: Refusal) {
        self.counts.handshake_failed.inc();
        self.counts.refusals.add(peer, refusal);
    }

    fn http(&self, inline: &InlineExecutor) -> http2::Builder<InlineExecutor> {
        let streams = self.limits.streams_per_connection;
        let mut http = http2::Builder::new(inline.clone());
        http.max_concurrent_streams(streams)
            .max_header_list_size(self.limits.header_list_bytes)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            // The limit of calls that are reset before they are accepted. An honest client resets at most all its streams at once, when all its
            // calls reach their deadline. A client that resets more is disconnected.
            .max_pending_accept_reset_streams(Some(streams as usize))
            // No gRPC client reads the date.
            .auto_date_header(false);
        http
    }

    /// The maximum age of a connection, varied by a tenth, so that connections made together do not end together.
    fn max_age(&self) -> Duration {
        self.settings.max_connection_age.mul_f64(rand::rng().random_range(0.9..=1.1))
    }
}

// === impl Connection ===

impl Connection {
    async fn serve(self: Arc<Self>, io: Rewind) {
        let mut phase = self.context.phase.clone();
        let ends_at = Instant::now() + self.context.max_age();
        let service = service_fn(|request| self.call(request));
        let mut connection = pin!(self.context.http(&self.inline).serve_connection(TokioIo::new(io), service));
        macro_rules! running {
            () => {
                poll_fn(|context| {
                    let polled = connection.as_mut().poll(context);
                    self.inline.poll_once();
                    polled
                })
            };
        }
        let ended = |ended: hyper::Result<()>| {
            if let Err(fault) = ended {
                tracing::debug!(event = "connection_failed", fault = %fault);
            }
        };
        tokio::select! {
            done = running!() => return ended(done),
            () = wait_for_phase(&mut phase, Phase::Draining) => {}
            () = sleep_until(ends_at) => {}
            () = self.state.idle(self.context.settings.max_connection_idle) => {}
            () = self.state.evicted() => return,
        }
        // Send GOAWAY: calls in flight are finished, and no new call begins.
        connection.as_mut().graceful_shutdown();
        let Deadlines { decide, batch, .. } = self.context.deadlines;
        tokio::select! {
            done = running!() => return ended(done),
            () = wait_for_phase(&mut phase, Phase::Cut) => {}
            () = sleep(decide.max(batch) + GOAWAY_GRACE) => {}
        }
        // Send the statuses of calls that were cut off.
        drop(timeout(CUT_OFF_GRACE, running!()).await);
    }

    /// Answers one call. Caller, limits and deadline are checked at once, and only the rest is in the returned future. So that future, which is
    /// allocated for every call, stays small.
    fn call(self: &Arc<Self>, request: Request<Incoming>) -> impl Future<Output = CallResult> + Send + use<> {
        let method = method_of(request.uri().path()).map(known_method);
        let record = Arc::new(CallRecord::begin(
            &self.context.recorder,
            self.identity.peer,
            method.unwrap_or_default(),
            request.headers(),
        ));
        let started = self.start(request, method, &record);
        let end = started.as_ref().map_or_else(|_| Some(Instant::now()), |started| started.end);
        self.inline.set_next_end(end.map(|end| end + ANSWER_READ_TIME));
        let (context, call_guard) = (Arc::clone(&self.context), self.state.begin_call());
        async move {
            let response = context.finish(started, call_guard).await;
            // The headers say how the call ended: a failure, of the library or of this service, has its code there and no body before it.
            let code = response.headers().get(Status::GRPC_STATUS).map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()));
            let reason = response.extensions().get::<Status>().map(Status::message);
            record.end(code, reason.unwrap_or_default());
            Ok(response)
        }
    }

    fn start(
        &self,
        request: Request<Incoming>,
        method: Option<&'static str>,
        record: &Arc<CallRecord>,
    ) -> Result<CallInFlight, Box<Response<Body>>> {
        if !is_grpc(request.headers()) {
            record.end(Code::InvalidArgument, NOT_GRPC);
            return Err(Box::new(not_grpc_response()));
        }
        self.begin(request, method, record).map_err(|status| Box::new(status.into_http()))
    }

    fn begin(
        &self,
        mut request: Request<Incoming>,
        method: Option<&'static str>,
        record: &Arc<CallRecord>,
    ) -> Result<CallInFlight, Status> {
        let Self { context, identity, state, .. } = self;
        if method == Some("") {
            return Err(error(ErrorReason::Unsupported, "the service has no such method"));
        }
        let path = request.uri().path();
        let (is_health, is_watch) = (path.starts_with(HEALTH_PREFIX), path == HEALTH_WATCH);
        let caller = match context.callers.identify(identity, request.headers()) {
            Ok(caller) => Some(caller),
            Err(_) if is_health => None,
            Err(status) => return Err(status),
        };
        if let Some(caller) = caller.as_ref().filter(|_| !is_health) {
            record.set_caller(caller);
            context.authorizer.call(caller, method)?;
            state.set_known();
        }
        // The token has been checked. No later code may see it.
        request.headers_mut().remove(http::header::AUTHORIZATION);
        let (counts, peer) = (&context.counts, identity.peer);
        let unknown = caller.is_none().then(|| counts.unknown_calls.enter(peer)).transpose()?;
        let watch = is_watch.then(|| counts.watches.enter(peer)).transpose()?;
        let bytes = context.bytes.call(caller.is_some());
        let request = request.map(|body| CountedBody::new(body, Arc::clone(&bytes)));
        let is_platform = caller.as_ref().is_some_and(|caller| caller.role == Role::Platform);
        // Reflection does not say how long its answer will be.
        let answer = (caller.is_some() && !is_health && method.is_none())
            .then(|| context.answers.take(is_platform, REFLECTION_BYTES))
            .transpose()?;
        let permits = CallPermits { unknown, is_platform, answer, _watch: watch, _bytes: bytes };
        match (method, caller) {
            (Some(method), Some(caller)) => context.service_call(request, method, caller, record, permits),
            (_, _) => context.route(request, !is_watch, permits),
        }
    }
}

impl ConnectionContext {
    /// Calls the decision service.
    fn service_call(
        &self,
        request: Request<CountedBody>,
        method: &'static str,
        caller: Arc<Caller>,
        record: &Arc<CallRecord>,
        permits: CallPermits,
    ) -> Result<CallInFlight, Status> {
        let is_batch = method == BATCH_DECIDE;
        let (cap, limit) = if is_batch {
            (self.deadlines.batch, self.limits.batch_message_bytes)
        } else {
            (self.deadlines.decide, self.limits.message_bytes)
        };
        let given = Deadline::given(request.headers()).filter(|given| *given < cap);
        given.into_iter().for_each(|given| record.set_caller_time(given));
        let deadline = Deadline::within(given, cap).ok_or_else(deadline_exceeded)?;
        let service = PolicyDecisionServiceServer::new(self.service.to(caller, deadline, Arc::clone(record)));
        let response = service.max_decoding_message_size(limit).call(request);
        Ok(CallInFlight { response, end: Some(deadline.end), limit, is_batch, permits, holds_permits: is_batch })
    }

    /// Calls health or reflection. They have a deadline like every call, but a health watch has none.
    fn route(&self, request: Request<CountedBody>, ends: bool, permits: CallPermits) -> Result<CallInFlight, Status> {
        let deadline =
            || Deadline::within(Deadline::given(request.headers()), self.deadlines.decide).ok_or_else(deadline_exceeded);
        let end = if ends { Some(deadline()?.end) } else { None };
        let limit = self.limits.message_bytes;
        let response = Box::pin(self.routes.clone().call(request));
        // An unknown caller that reads no answer holds its place until the answer is read, or cut off; so does reflection.
        let holds_permits = !ends || permits.unknown.is_some() || permits.answer.is_some();
        Ok(CallInFlight { response, end, limit, is_batch: false, permits, holds_permits })
    }

    async fn finish(&self, started: Result<CallInFlight, Box<Response<Body>>>, call_guard: CallGuard) -> Response<Body> {
        let CallInFlight { mut response, end, limit, is_batch, mut permits, holds_permits } = match started {
            Ok(started) => started,
            Err(response) => return *response,
        };
        // Most calls are ready at once and need no timer.
        let answered = match (futures_util::poll!(&mut response), end) {
            (Poll::Ready(answered), _) => answered,
            (Poll::Pending, None) => response.await,
            (Poll::Pending, Some(end)) => {
                let mut phase = self.phase.clone();
                tokio::select! {
                    // The deadline covers reading the body too, so a caller that sends it byte by byte holds its permits no longer.
                    answered = timeout_at(end, response) => match answered {
                        Ok(answered) => answered,
                        // Dropping the future tells the service that the call was given up.
                        Err(_) => return deadline_exceeded().into_http(),
                    },
                    () = wait_for_phase(&mut phase, Phase::Cut) => return draining().into_http(),
                }
            }
        };
        let Ok(mut response) = answered;
        if let Some(status) = contract_error(&response, limit, is_batch) {
            return status.into_http();
        }
        if let Some(AnswerLength(length)) = response.extensions_mut().remove() {
            match self.answers.take(permits.is_platform, length) {
                Ok(answer) => permits.answer = Some(answer),
                Err(status) => return status.into_http(),
            }
        }
        if holds_permits || permits.answer.is_some() {
            return response.map(|body| Body::new(GuardedBody { body, _permits: permits, _call_guard: call_guard }));
        }
        response
    }
}

/// Whether the content type is gRPC with Protocol Buffers.
fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(http::header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim_ascii();
    ["application/grpc", "application/grpc+proto"].iter().any(|known| kind.eq_ignore_ascii_case(known))
}

/// The answer to a client that does not speak gRPC. gRPC's specification asks for this HTTP status. The body is for a person with curl.
fn not_grpc_response() -> Response<Body> {
    let mut response = Response::new(Body::new(NOT_GRPC.to_owned()));
    *response.status_mut() = http::StatusCode::UNSUPPORTED_MEDIA_TYPE;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("text/plain"));
    response
}

/// The service's method that a path names.
fn method_of(path: &str) -> Option<&str> {
    path.strip_prefix('/')?.strip_prefix(NAME)?.strip_prefix('/')
}

/// The result of a call.
type CallResult = Result<Response<Body>, Infallible>;
type CallFuture = Pin<Box<dyn Future<Output = CallResult> + Send>>;

/// A call in flight.
struct CallInFlight {
    response: CallFuture,
    end: Option<Instant>,
    /// The maximum length of its message.
    limit: usize,
    is_batch: bool,
    permits: CallPermits,
    /// Whether it holds its permits until its answer has been sent.
    holds_permits: bool,
}

/// What a call takes from the limits over all connections. It is given back when the call is answered, or when its answer has been sent.
struct CallPermits {
    unknown: Option<CallPermit>,
    is_platform: bool,
    /// The bytes of an answer that somebody may leave unread.
    answer: Option<Arc<CallBytes>>,
    _watch: Option<CallPermit>,
    _bytes: Arc<CallBytes>,
}

/// The body of an answer that holds the call's permits until it has been sent.
struct GuardedBody {
    body: Body,
    _permits: CallPermits,
    _call_guard: CallGuard,
}

impl hyper::body::Body for GuardedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

fn deadline_exceeded() -> Status {
    error(ErrorReason::Deadline, "no decision was made before the call's deadline")
}

/// Replaces an error of the gRPC library by the contract's error: bad input is INVALID_ARGUMENT with a field, and every error has a reason.
fn contract_error(response: &Response<Body>, limit: usize, is_batch: bool) -> Option<Status> {
    const UNDECODABLE: &str = "failed to decode Protobuf message";
    let setting = if is_batch { "limits.batch_message_bytes" } else { "limits.message_bytes" };
    let status = response.extensions().get::<Status>()?;
    let (reason, description) = match (status.code(), status.message()) {
        (Code::Ok, _) => return None,
        (Code::OutOfRange, message) => {
            // The gRPC library's text: "... too large: found N bytes, the limit is: ...".
            let found = message.split_once("found ").and_then(|(_, rest)| rest.split_once(' ')).map(|(length, _)| length);
            let length = found.and_then(|length| length.parse::<u64>().ok());
            let length = length.map_or_else(|| "too".to_owned(), |length| format!("{length} bytes"));
            (ErrorReason::RequestTooLarge, format!("is {length} long; the limit is {limit} ({setting})"))
        }
        (Code::Internal, message) if message.starts_with(UNDECODABLE) => {
            (ErrorReason::RequestUnreadable, "is not this call's message".to_owned())
        }
        _ => return status.details().is_empty().then(|| with_standard_details(status.clone())),
    };
    Some(bad_request(reason, Violations(vec![("request".to_owned(), description)])))
}

/// Waits until the server reaches this phase.
pub(super) async fn wait_for_phase(phase: &mut watch::Receiver<Phase>, wanted: Phase) {
    // A closed sender means that the server has ended.
    drop(phase.wait_for(|phase| *phase >= wanted).await);
}

/// Refuses a connection with GOAWAY, because there are too many.
pub(super) async fn reject_over_limit(io: Box<dyn Stream>, limit: usize) {
    send_last_bytes(io, &goaway(ENHANCE_YOUR_CALM, &format!("limits.connections ({limit}) is reached"))).await;
}

/// Reads a client's first bytes and checks that they are TLS. A client that speaks plain HTTP/2 gets a TLS alert.
async fn expect_tls(mut io: Box<dyn Stream>) -> Result<Rewind, Option<Refusal>> {
    let mut first = [0; TLS_RECORD.len()];
    io.read_exact(&mut first).await.map_err(broken_connection)?;
    if first == TLS_RECORD {
        return Ok(Rewind { io, prefix: Bytes::from_static(&TLS_RECORD) });
    }
    if PREFACE.starts_with(&first) {
        send_last_bytes(io, &TLS_ALERT).await;
    }
    Err(Some(Refusal::of(HandshakeFault::NoTls)))
}

/// The refusal for a connection that broke before its preface. `None` if the peer only checked the port.
fn broken_connection(fault: io::Error) -> Option<Refusal> {
    (!is_port_check(&fault)).then(|| Refusal::of(HandshakeFault::Failed))
}

/// The SETTINGS frame that a server must send first, then a GOAWAY frame with this code and text.
fn goaway(code: u8, why: &str) -> Vec<u8> {
    let mut frames = SETTINGS.to_vec();
    let length = u8::try_from(8 + why.len()).unwrap_or(u8::MAX);
    frames.extend([0, 0, length, 7, 0, 0, 0, 0, 0]);
    frames.extend([0, 0, 0, 0, 0, 0, 0, code]);
    frames.extend(why.bytes().take(usize::from(length) - 8));
    frames
}

/// Sends these bytes and closes the connection, as far as that works within the timeout. It also reads what the client has sent: with unread
/// bytes the kernel would send a reset, and the client would lose the answer.
pub(super) async fn send_last_bytes(mut io: Box<dyn Stream>, bytes: &[u8]) {
    const TIMEOUT: Duration = Duration::from_millis(100);
    const MAX_DISCARDED_BYTES: u64 = 64 * 1024;
    let sending = async {
        io.write_all(bytes).await?;
        io.shutdown().await?;
        tokio::io::copy(&mut io.take(MAX_DISCARDED_BYTES), &mut tokio::io::sink()).await
    };
    drop(timeout(TIMEOUT, sending).await);
}

/// A stream whose first bytes were read already and are returned again to the next reader.
pub(super) struct Rewind {
    pub(super) io: Box<dyn Stream>,
    pub(super) prefix: Bytes,
}

impl AsyncRead for Rewind {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.prefix.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buffer);
        }
        let length = self.prefix.len().min(buffer.remaining());
        buffer.put_slice(&self.prefix.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Rewind {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, cx: &mut Context<'_>, parts: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
