//! One connection, and each of its calls: handshake, preface, HTTP/2; then caller, deadline, service.

use std::{
    convert::Infallible,
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    sync::watch,
    time::{Instant, timeout, timeout_at},
};
use tonic::{Code, Status, body::Body, service::Routes};
use tower_service::Service;

use super::{
    auth::{Callers, Connected},
    health::Phase,
    inline_executor::InlineExecutor,
    listen::{Accepted, Peer, Stream},
    tls::{Tls, names_of},
};
use crate::{
    config::settings::{Deadlines, Limits},
    grpc::{
        NAME, PolicyDecision,
        convert::{
            Violations,
            pb::{ErrorReason, policy_decision_service_server::PolicyDecisionServiceServer},
        },
        deadline::Deadline,
        errors::{bad_request, draining, error, explained},
    },
    telemetry::{
        events::{Journal, Undecided},
        metrics::{
            Counter,
            calls::{BATCH_DECIDE, Calls, DECIDE, known_method, word_of},
        },
    },
};

/// What an HTTP/2 client says first.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// An empty SETTINGS frame, with which a server must begin.
const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
/// GOAWAY's code for a peer that asks too much.
const ENHANCE_YOUR_CALM: u8 = 0x0b;
/// Streams that a peer has reset and that are still being worked on: a rapid reset is cut off here.
const MAX_RESET_STREAMS: usize = 20;

/// How long the calls that are cut off at the end of a drain have to be told so.
pub(super) const LAST_WORDS: Duration = Duration::from_millis(100);

/// What every connection shares.
pub(super) struct ConnectionContext {
    pub(super) callers: Arc<Callers>,
    pub(super) tls: Option<Arc<Tls>>,
    /// Called as it is: routing one service to itself would cost each call a tenth.
    pub(super) service: PolicyDecision,
    /// Health and reflection.
    pub(super) routes: Routes,
    pub(super) limits: Limits,
    pub(super) deadlines: Deadlines,
    pub(super) journal: Arc<Journal>,
    pub(super) phase: watch::Receiver<Phase>,
    pub(super) calls: Arc<Calls>,
    /// Connections that never came to HTTP/2 by their own fault or ours.
    pub(super) failed: Arc<Counter>,
}

// === impl ConnectionContext ===

impl ConnectionContext {
    /// Serves a connection to its end.
    pub(super) async fn serve(self: Arc<Self>, accepted: Accepted) {
        let handshake_by = Instant::now() + self.deadlines.handshake.0;
        let mut phase = self.phase.clone();
        let began = tokio::select! {
            began = timeout_at(handshake_by, self.begin(accepted)) => began,
            () = reached(&mut phase, Phase::Draining) => return,
        };
        let (io, connected) = match began {
            Ok(Ok(began)) => began,
            Ok(Err(fault)) => {
                // Who connects and hangs up looks whether somebody listens, as load balancers do.
                if !matches!(fault.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) {
                    self.failed.one();
                }
                tracing::debug!(event = "connection_refused", fault = %fault);
                return;
            }
            Err(_) => {
                self.failed.one();
                tracing::debug!(event = "connection_refused", fault = "no HTTP/2 preface in time");
                return;
            }
        };
        let service = service_fn(|request| self.call(&connected, request));
        let inline = InlineExecutor::default();
        let mut connection = std::pin::pin!(self.http(&inline).serve_connection(TokioIo::new(io), service));
        for stage in [Phase::Draining, Phase::Cut] {
            tokio::select! {
                ended = poll_fn(|context| {
                    let polled = connection.as_mut().poll(context);
                    inline.poll_once();
                    polled
                }) => {
                    if let Err(fault) = ended {
                        tracing::debug!(event = "connection_failed", fault = %fault);
                    }
                    return;
                }
                () = reached(&mut phase, stage) => {
                    // GOAWAY: what is under way is finished, nothing new begins.
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
        // What was cut off is told so.
        drop(timeout(LAST_WORDS, connection).await);
    }

    /// TLS where it is configured, then the preface: whoever does not speak HTTP/2 goes no further.
    async fn begin(&self, accepted: Accepted) -> io::Result<(Prefaced, Connected)> {
        let Accepted { io, peer } = accepted;
        let (mut io, connected): (Box<dyn Stream>, _) = match (&self.tls, peer) {
            (Some(tls), Peer::Tcp(_)) => {
                let stream = tls.acceptor().accept(io).await?;
                let connected = match stream.get_ref().1.peer_certificates().and_then(<[_]>::first) {
                    None => self.callers.by_peer(peer),
                    // Looked up in the handshake already; a list that has no such name now has changed in between.
                    Some(certificate) => names_of(certificate)
                        .and_then(|names| self.callers.by_names(names.iter().map(String::as_str)))
                        .map_or_else(
                            || Connected::Refused("the certificate names nobody who may call".to_owned()),
                            Connected::Caller,
                        ),
                };
                (Box::new(stream), connected)
            }
            (_, _) => (io, self.callers.by_peer(peer)),
        };
        let mut preface = [0; PREFACE.len()];
        io.read_exact(&mut preface).await?;
        if preface != *PREFACE {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "no HTTP/2 preface"));
        }
        Ok((Prefaced { io, left: PREFACE }, connected))
    }

    fn http(&self, inline: &InlineExecutor) -> http2::Builder<InlineExecutor> {
        let mut http = http2::Builder::new(inline.clone());
        http.max_concurrent_streams(self.limits.streams_per_connection)
            .max_header_list_size(self.limits.header_list_bytes)
            .max_pending_accept_reset_streams(MAX_RESET_STREAMS)
            // No gRPC client reads it.
            .auto_date_header(false);
        http
    }

    /// One call: who, until when, then the service. Its future goes to the heap: it is small, since what can be told at once has
    /// been told before.
    fn call(
        self: &Arc<Self>,
        connected: &Connected,
        request: Request<Incoming>,
    ) -> impl Future<Output = Answered> + Send + use<> {
        let method = method_of(request.uri().path()).map(known_method);
        let started = self.begin_call(connected, request, method);
        let context = Arc::clone(self);
        async move {
            let call = context.calls.begin(method.unwrap_or_default());
            let Ok(response) = context.finish(started).await;
            // How it ended, as far as its headers tell: a failure of the library's or ours has no body before its code.
            let code = response.headers().get(Status::GRPC_STATUS).map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()));
            call.ended(code as i32);
            Ok(response)
        }
    }

    async fn finish(&self, started: StartedCall) -> Answered {
        let (mut answering, limits) = match started {
            Ok(started) => started,
            Err(response) => return Ok(*response),
        };
        let Some(CallLimits { end, limit, decision_method }) = limits else { return answering.await };
        // Most calls wait for nothing, and need no timer.
        let answered = match futures_util::poll!(&mut answering) {
            Poll::Ready(answered) => Ok(answered),
            Poll::Pending => {
                let mut phase = self.phase.clone();
                tokio::select! {
                    // The body is read within this as well: a caller that sends it byte by byte holds nothing for longer.
                    answered = timeout_at(end, answering) => answered,
                    // The service notices that its call was given up.
                    () = reached(&mut phase, Phase::Cut) => return Ok(draining().into_http()),
                }
            }
        };
        match answered {
            Ok(Ok(response)) => Ok(match explanation(&response, limit) {
                Some(status) => undecided(&self.journal, decision_method, status),
                None => response,
            }),
            // The service has noticed that its call was given up.
            Err(_) => Ok(late().into_http()),
        }
    }

    fn begin_call(&self, connected: &Connected, mut request: Request<Incoming>, method: Option<&'static str>) -> StartedCall {
        let is_batch = method.map(|method| method == BATCH_DECIDE);
        // Of the calls that ask for a decision, the journal knows.
        let decision_method = method.filter(|method| [DECIDE, BATCH_DECIDE].contains(method));
        if method == Some("") {
            let status = error(ErrorReason::Unsupported, "the service has no such method");
            return Err(Box::new(status.into_http()));
        }
        let caller = match self.callers.admit(connected, request.uri().path(), request.headers()) {
            Ok(caller) => caller,
            Err(status) => return Err(Box::new(undecided(&self.journal, decision_method, status))),
        };
        // It has been read, and nothing behind this line is to know it.
        request.headers_mut().remove(http::header::AUTHORIZATION);
        let (Some(is_batch), Some(caller)) = (is_batch, caller) else {
            return Ok((Box::pin(self.routes.clone().call(request)), None));
        };
        let (cap, limit) = if is_batch {
            (self.deadlines.batch, self.limits.batch_message_bytes)
        } else {
            (self.deadlines.decide, self.limits.message_bytes)
        };
        let deadline = Deadline::of(request.headers(), cap.0);
        let deadline = deadline.ok_or_else(|| Box::new(undecided(&self.journal, decision_method, late())))?;
        let service = PolicyDecisionServiceServer::new(self.service.to(caller, deadline));
        let answering = service.max_decoding_message_size(limit).call(request);
        Ok((answering, Some(CallLimits { end: deadline.end, limit, decision_method })))
    }
}

/// Which of the service's calls a path names.
fn method_of(path: &str) -> Option<&str> {
    path.strip_prefix('/')?.strip_prefix(NAME)?.strip_prefix('/')
}

/// A call that never comes to the service.
fn undecided(journal: &Journal, decision_method: Option<&'static str>, status: Status) -> Response<Body> {
    if let Some(method) = decision_method {
        let (grpc_code, reason) = (word_of(status.code() as i32), status.message());
        journal.undecided(Undecided { method, grpc_code, reason, request: None, trace_id: None });
    }
    status.into_http()
}

/// What comes of a call.
type Answered = Result<Response<Body>, Infallible>;
/// A call that is being answered, or was refused at once.
type StartedCall = Result<(Answering, Option<CallLimits>), Box<Response<Body>>>;
type Answering = Pin<Box<dyn Future<Output = Answered> + Send>>;

/// Of a call with a deadline.
struct CallLimits {
    end: Instant,
    /// How long its message may be.
    limit: usize,
    /// Its method, if it asks for a decision.
    decision_method: Option<&'static str>,
}

fn late() -> Status {
    error(ErrorReason::Deadline, "no decision was made before the call's deadline")
}

/// What the library finds wrong with a message, in the contract's words: bad input is INVALID_ARGUMENT with a field. And every error says
/// its reason.
fn explanation(response: &Response<Body>, limit: usize) -> Option<Status> {
    const UNDECODABLE: &str = "failed to decode Protobuf message";
    let status = response.extensions().get::<Status>()?;
    let (reason, description) = match (status.code(), status.message()) {
        (Code::Ok, _) => return None,
        (Code::OutOfRange, _) => (ErrorReason::RequestTooLarge, format!("is longer than {limit} bytes, the limit")),
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

/// Tells a client that there are too many connections. Best effort: a fresh socket takes these few bytes at once.
pub(super) async fn turn_away(mut io: Box<dyn Stream>, limit: usize) {
    const PATIENCE: Duration = Duration::from_millis(100);
    let why = format!("limits.connections ({limit}) is reached");
    let mut frames = SETTINGS.to_vec();
    let length = u8::try_from(8 + why.len()).unwrap_or(u8::MAX);
    frames.extend([0, 0, length, 7, 0, 0, 0, 0, 0]);
    frames.extend([0, 0, 0, 0, 0, 0, 0, ENHANCE_YOUR_CALM]);
    frames.extend(why.bytes().take(usize::from(length) - 8));
    let telling = async {
        io.write_all(&frames).await?;
        io.shutdown().await
    };
    drop(timeout(PATIENCE, telling).await);
}

/// A connection whose preface has been read, and is read again by the HTTP/2 library.
struct Prefaced {
    io: Box<dyn Stream>,
    left: &'static [u8],
}

impl AsyncRead for Prefaced {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.left.is_empty() {
            return Pin::new(&mut self.io).poll_read(cx, buffer);
        }
        let (now, later) = self.left.split_at(self.left.len().min(buffer.remaining()));
        buffer.put_slice(now);
        self.left = later;
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
