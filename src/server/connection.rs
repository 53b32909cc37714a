//! One connection, and each of its calls: handshake, preface, HTTP/2; then caller, limits, deadline, service.
//!
//! hyper is used as it is, without tonic's transport in between: that answers an expired grpc-timeout with CANCELLED, ends no client that
//! never reads, and reads certificates once.

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
    call_limit::Counted,
    callers::{Callers, Identity},
    connections::{ConnectionCounts, ConnectionState, Place, Using},
    health::Phase,
    inline_executor::InlineExecutor,
    listen::{Accepted, Stream},
    refused::{HandshakeFault, Refusal, handshake, is_a_look},
    request_body::{ByteBudget, CountedBody},
    settings::ServerSettings,
    tls::{Tls, names_of},
};
use crate::{
    domain::request::Peer,
    grpc::{
        NAME,
        authorize::{Authorizer, Caller},
        call_record::{CallRecord, Recorder},
        convert::{
            Violations,
            pb::{ErrorReason, policy_decision_service_server::PolicyDecisionServiceServer},
        },
        deadline::Deadline,
        errors::{bad_request, draining, error, explained},
        limits::{Deadlines, Limits},
        service::PolicyDecision,
    },
    telemetry::metrics::calls::{BATCH_DECIDE, known_method},
};

/// What an HTTP/2 client says first.
pub(super) const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// How a TLS client begins: a handshake record of TLS 1.
const TLS_RECORD: [u8; 2] = [0x16, 0x03];
/// An empty SETTINGS frame, with which a server must begin.
const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
/// GOAWAY's code for a peer that asks too much.
const ENHANCE_YOUR_CALM: u8 = 0x0b;
/// What whoever speaks without TLS is told where TLS is spoken: a fatal alert, `unexpected_message`. A GOAWAY would be easier to read for a
/// person, and gRPC's clients lose its text: grpc-go tells of a connection that is draining, and tries again for ever.
const TLS_ALERT: [u8; 7] = [0x15, 0x03, 0x03, 0, 2, 2, 10];
/// What is said to whoever speaks TLS or HTTP/1.1 where neither is spoken. A TLS client shows none of it, but knows from it what is wrong.
const SPEAKS_HTTP2: &str =
    "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\nthis port speaks gRPC over HTTP/2";
/// What is said to whoever speaks HTTP/2 and no gRPC.
const NOT_GRPC: &str = "the content type must be application/grpc or application/grpc+proto: this port speaks gRPC\n";
/// How a request of HTTP/1.1 begins.
const METHODS: [&[u8]; 6] = [b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"OPTIONS "];
/// What a peer may send of one call, and of all calls of a connection, before any of it has been read.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 256 * 1024;
/// What may wait to be sent of one answer that is not read.
const SEND_BUFFER: usize = 64 * 1024;
/// An answer that has not been read so long after its call's end is not read any more.
const READ_TIME: Duration = Duration::from_secs(1);
/// How long the calls that are cut off at the end of a drain have to be told so.
pub(super) const LAST_WORDS: Duration = Duration::from_millis(100);
/// Beyond the longest deadline of a call: how long a connection that ignores GOAWAY is kept.
const AFTER_LAST_CALL: Duration = Duration::from_secs(2);
/// Health, which everybody may ask: a kubelet has neither certificate nor token.
const HEALTH_PREFIX: &str = "/grpc.health.v1.Health/";
const HEALTH_WATCH: &str = "/grpc.health.v1.Health/Watch";

/// What every connection shares.
pub(super) struct ConnectionContext {
    pub(super) callers: Arc<Callers>,
    pub(super) authorizer: Arc<Authorizer>,
    pub(super) tls: Option<Arc<Tls>>,
    /// Called as it is: routing one service to itself would cost each call a tenth.
    pub(super) service: PolicyDecision,
    /// Health and reflection.
    pub(super) routes: Routes,
    pub(super) settings: ServerSettings,
    pub(super) limits: Limits,
    pub(super) deadlines: Deadlines,
    pub(super) recorder: Arc<Recorder>,
    pub(super) phase: watch::Receiver<Phase>,
    pub(super) bytes: Arc<ByteBudget>,
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
    /// Serves a connection to its end.
    pub(super) async fn serve(self: Arc<Self>, accepted: Accepted, place: &Place) {
        let handshake_by = Instant::now() + self.deadlines.handshake;
        let mut phase = self.phase.clone();
        let peer = accepted.peer;
        let started = tokio::select! {
            started = timeout_at(handshake_by, self.begin(accepted)) => started,
            () = reached(&mut phase, Phase::Draining) => return,
            () = place.state.told_to_make_room() => return,
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

    /// TLS where it is configured, then the preface: whoever does not speak HTTP/2 goes no further.
    async fn begin(&self, accepted: Accepted) -> Result<(Prefaced, Identity), Option<Refusal>> {
        let Accepted { io, peer } = accepted;
        let (mut io, names, is_plain): (Box<dyn Stream>, _, _) = match (&self.tls, peer) {
            (Some(tls), Peer::Tcp(_)) => {
                let io = speaks_tls(io).await?;
                let stream = handshake(tls.acceptor().accept(io)).await?;
                let names = stream.get_ref().1.peer_certificates().and_then(<[_]>::first).map(names_of);
                // Verified in the handshake: it parses.
                let unread = || Some(Refusal::of(HandshakeFault::CertificateBad));
                let names = names.map(|names| names.ok_or_else(unread)).transpose()?;
                (Box::new(stream), names, false)
            }
            (_, _) => (io, None, true),
        };
        let mut preface = [0; PREFACE.len()];
        io.read_exact(&mut preface).await.map_err(broken)?;
        if preface != *PREFACE {
            let is_tls = is_plain && preface.starts_with(&TLS_RECORD);
            // Noise on a bad network is told nothing: its client would take the text for another server's.
            if is_tls || METHODS.iter().any(|method| preface.starts_with(method)) {
                say(io, format!("{SPEAKS_HTTP2}{}\n", if is_plain { ", without TLS" } else { "" }).as_bytes()).await;
            }
            let fault = if is_tls { HandshakeFault::TlsUnexpected } else { HandshakeFault::NoHttp2 };
            return Err(Some(Refusal::of(fault)));
        }
        Ok((Prefaced { io, left: Bytes::from_static(PREFACE) }, Identity { peer, names }))
    }

    fn refuse(&self, peer: Peer, refusal: Refusal) {
        self.counts.failed.inc();
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
            // Calls that were reset before they were looked at. An honest client whose calls all reach their deadline at once resets as many
            // as it may have; who goes on resetting is cut off.
            .max_pending_accept_reset_streams(Some(streams as usize))
            // No gRPC client reads it.
            .auto_date_header(false);
        http
    }

    /// How old a connection gets: within a tenth, so that those made together do not end together.
    fn max_age(&self) -> Duration {
        self.settings.max_connection_age.mul_f64(rand::rng().random_range(0.9..=1.1))
    }
}

// === impl Connection ===

impl Connection {
    async fn serve(self: Arc<Self>, io: Prefaced) {
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
            () = reached(&mut phase, Phase::Draining) => {}
            () = sleep_until(ends_at) => {}
            () = self.state.idle(self.context.settings.max_connection_idle) => {}
            () = self.state.told_to_make_room() => return,
        }
        // GOAWAY: what is under way is finished, nothing new begins.
        connection.as_mut().graceful_shutdown();
        let Deadlines { decide, batch, .. } = self.context.deadlines;
        tokio::select! {
            done = running!() => return ended(done),
            () = reached(&mut phase, Phase::Cut) => {}
            () = sleep(decide.max(batch) + AFTER_LAST_CALL) => {}
        }
        // What was cut off is told so.
        drop(timeout(LAST_WORDS, running!()).await);
    }

    /// One call: who, how much, until when, then the service. Its future goes to the heap: it is small, since what can be told at once has
    /// been told before.
    fn call(self: &Arc<Self>, request: Request<Incoming>) -> impl Future<Output = Answered> + Send + use<> {
        let method = method_of(request.uri().path()).map(known_method);
        let record = Arc::new(CallRecord::begin(
            &self.context.recorder,
            self.identity.peer,
            method.unwrap_or_default(),
            request.headers(),
        ));
        let started = self.start(request, method, &record);
        let end = started.as_ref().map_or_else(|_| Some(Instant::now()), |started| started.end);
        self.inline.set_next_end(end.map(|end| end + READ_TIME));
        let (context, using) = (Arc::clone(&self.context), self.state.begin_call());
        async move {
            let response = context.finish(started, using).await;
            // How it ended, as far as its headers tell: a failure of the library's or ours has no body before its code.
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
    ) -> Result<Started, Box<Response<Body>>> {
        if !is_grpc(request.headers()) {
            record.end(Code::InvalidArgument, NOT_GRPC);
            return Err(Box::new(no_grpc()));
        }
        self.begin(request, method, record).map_err(|status| Box::new(status.into_http()))
    }

    fn begin(
        &self,
        mut request: Request<Incoming>,
        method: Option<&'static str>,
        record: &Arc<CallRecord>,
    ) -> Result<Started, Status> {
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
            context.authorizer.call(caller, method)?;
            state.set_known();
        }
        // It has been read, and nothing behind this line is to know it.
        request.headers_mut().remove(http::header::AUTHORIZATION);
        let (counts, peer) = (&context.counts, identity.peer);
        let unknown = caller.is_none().then(|| counts.unknown_calls.enter(peer)).transpose()?;
        let watch = is_watch.then(|| counts.watches.enter(peer)).transpose()?;
        let bytes = context.bytes.call(caller.is_some());
        let request = request.map(|body| CountedBody::new(body, Arc::clone(&bytes)));
        let held = Held { _unknown: unknown, _watch: watch, _bytes: bytes };
        match (method, caller) {
            (Some(method), Some(caller)) => context.service_call(request, method, caller, record, held),
            (_, _) => context.route(request, !is_watch, held),
        }
    }
}

impl ConnectionContext {
    /// A call of the service.
    fn service_call(
        &self,
        request: Request<CountedBody>,
        method: &'static str,
        caller: Arc<Caller>,
        record: &Arc<CallRecord>,
        held: Held,
    ) -> Result<Started, Status> {
        let is_batch = method == BATCH_DECIDE;
        let (cap, limit) = if is_batch {
            (self.deadlines.batch, self.limits.batch_message_bytes)
        } else {
            (self.deadlines.decide, self.limits.message_bytes)
        };
        let given = Deadline::given(request.headers()).filter(|given| *given < cap);
        given.into_iter().for_each(|given| record.set_caller_time(given));
        let deadline = Deadline::within(given, cap).ok_or_else(late)?;
        let service = PolicyDecisionServiceServer::new(self.service.to(caller, deadline, Arc::clone(record)));
        let answering = service.max_decoding_message_size(limit).call(request);
        Ok(Started { answering, end: Some(deadline.end), limit, is_batch, held, streams: is_batch })
    }

    /// Health and reflection, which have a deadline as any call, but for a watch.
    fn route(&self, request: Request<CountedBody>, ends: bool, held: Held) -> Result<Started, Status> {
        let deadline = || Deadline::within(Deadline::given(request.headers()), self.deadlines.decide).ok_or_else(late);
        let end = if ends { Some(deadline()?.end) } else { None };
        let limit = self.limits.message_bytes;
        Ok(Started { answering: Box::pin(self.routes.clone().call(request)), end, limit, is_batch: false, held, streams: !ends })
    }

    async fn finish(&self, started: Result<Started, Box<Response<Body>>>, using: Using) -> Response<Body> {
        let Started { mut answering, end, limit, is_batch, held, streams } = match started {
            Ok(started) => started,
            Err(response) => return *response,
        };
        // Most calls wait for nothing, and need no timer.
        let answered = match (futures_util::poll!(&mut answering), end) {
            (Poll::Ready(answered), _) => answered,
            (Poll::Pending, None) => answering.await,
            (Poll::Pending, Some(end)) => {
                let mut phase = self.phase.clone();
                tokio::select! {
                    // The body is read within this as well: a caller that sends it byte by byte holds nothing for longer.
                    answered = timeout_at(end, answering) => match answered {
                        Ok(answered) => answered,
                        // The service has noticed that its call was given up.
                        Err(_) => return late().into_http(),
                    },
                    () = reached(&mut phase, Phase::Cut) => return draining().into_http(),
                }
            }
        };
        let Ok(response) = answered;
        match explanation(&response, limit, is_batch) {
            Some(status) => status.into_http(),
            None if streams => response.map(|body| Body::new(HoldingBody { body, _held: held, _using: using })),
            None => response,
        }
    }
}

/// Whether this is gRPC with Protocol Buffers, by the content type.
fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(http::header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim_ascii();
    ["application/grpc", "application/grpc+proto"].iter().any(|known| kind.eq_ignore_ascii_case(known))
}

/// What other peers are told: gRPC's specification has this status of HTTP for it, and a body is for who reads it with curl.
fn no_grpc() -> Response<Body> {
    let mut response = Response::new(Body::new(NOT_GRPC.to_owned()));
    *response.status_mut() = http::StatusCode::UNSUPPORTED_MEDIA_TYPE;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("text/plain"));
    response
}

/// Which of the service's calls a path names.
fn method_of(path: &str) -> Option<&str> {
    path.strip_prefix('/')?.strip_prefix(NAME)?.strip_prefix('/')
}

/// What comes of a call.
type Answered = Result<Response<Body>, Infallible>;
type Answering = Pin<Box<dyn Future<Output = Answered> + Send>>;

/// A call that is being answered.
struct Started {
    answering: Answering,
    end: Option<Instant>,
    /// How long its message may be.
    limit: usize,
    is_batch: bool,
    held: Held,
    /// It goes on after its first answer.
    streams: bool,
}

/// The shares of the limits over all connections that a call holds until it is answered.
struct Held {
    _unknown: Option<Counted>,
    _watch: Option<Counted>,
    _bytes: Arc<super::request_body::CallBytes>,
}

/// The answers of a call that goes on, which holds what it has to its end.
struct HoldingBody {
    body: Body,
    _held: Held,
    _using: Using,
}

impl hyper::body::Body for HoldingBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

fn late() -> Status {
    error(ErrorReason::Deadline, "no decision was made before the call's deadline")
}

/// What the library finds wrong with a message, in the contract's words: bad input is INVALID_ARGUMENT with a field. And every error says
/// its reason.
fn explanation(response: &Response<Body>, limit: usize, is_batch: bool) -> Option<Status> {
    const UNDECODABLE: &str = "failed to decode Protobuf message";
    let setting = if is_batch { "limits.batch_message_bytes" } else { "limits.message_bytes" };
    let status = response.extensions().get::<Status>()?;
    let (reason, description) = match (status.code(), status.message()) {
        (Code::Ok, _) => return None,
        (Code::OutOfRange, _) => (ErrorReason::RequestTooLarge, format!("is longer than {limit} bytes, the limit ({setting})")),
        (Code::Internal, message) if message.starts_with(UNDECODABLE) => {
            (ErrorReason::RequestUnreadable, "is not this call's message".to_owned())
        }
        _ => return status.details().is_empty().then(|| explained(status.clone())),
    };
    Some(bad_request(reason, Violations(vec![("request".to_owned(), description)])))
}

/// Waits until the server is that far.
pub(super) async fn reached(phase: &mut watch::Receiver<Phase>, wanted: Phase) {
    // A sender that is gone means that the server is.
    drop(phase.wait_for(|phase| *phase >= wanted).await);
}

/// Tells a client that there are too many connections.
pub(super) async fn turn_away(io: Box<dyn Stream>, limit: usize) {
    say(io, &goaway(ENHANCE_YOUR_CALM, &format!("limits.connections ({limit}) is reached"))).await;
}

/// A client's first bytes have been read, and are those of TLS. One that speaks HTTP without it is told so.
async fn speaks_tls(mut io: Box<dyn Stream>) -> Result<Prefaced, Option<Refusal>> {
    let mut first = [0; TLS_RECORD.len()];
    io.read_exact(&mut first).await.map_err(broken)?;
    if first == TLS_RECORD {
        return Ok(Prefaced { io, left: Bytes::from_static(&TLS_RECORD) });
    }
    if PREFACE.starts_with(&first) {
        say(io, &TLS_ALERT).await;
    }
    Err(Some(Refusal::of(HandshakeFault::NoTls)))
}

/// A connection that broke before it had said what it wants.
fn broken(fault: io::Error) -> Option<Refusal> {
    (!is_a_look(&fault)).then(|| Refusal::of(HandshakeFault::Failed))
}

/// What a server must begin with, and the end with its reason.
fn goaway(code: u8, why: &str) -> Vec<u8> {
    let mut frames = SETTINGS.to_vec();
    let length = u8::try_from(8 + why.len()).unwrap_or(u8::MAX);
    frames.extend([0, 0, length, 7, 0, 0, 0, 0, 0]);
    frames.extend([0, 0, 0, 0, 0, 0, 0, code]);
    frames.extend(why.bytes().take(usize::from(length) - 8));
    frames
}

/// Some last bytes. Best effort: a fresh socket takes these few at once. What the client has sent is read, or the kernel would answer with a
/// reset that takes them away again.
pub(super) async fn say(mut io: Box<dyn Stream>, words: &[u8]) {
    const PATIENCE: Duration = Duration::from_millis(100);
    const MOST: u64 = 64 * 1024;
    let telling = async {
        io.write_all(words).await?;
        io.shutdown().await?;
        tokio::io::copy(&mut io.take(MOST), &mut tokio::io::sink()).await
    };
    drop(timeout(PATIENCE, telling).await);
}

/// A connection whose first bytes have been read, and are read again by the library behind it.
pub(super) struct Prefaced {
    pub(super) io: Box<dyn Stream>,
    pub(super) left: Bytes,
}

impl AsyncRead for Prefaced {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.left.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buffer);
        }
        let length = self.left.len().min(buffer.remaining());
        buffer.put_slice(&self.left.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Prefaced {
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
