//! A collector for traces: a real OTLP receiver over gRPC, which keeps what it is sent.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value},
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use tokio::{
    net::TcpListener,
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::JoinSet,
    time::timeout,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Request, Response, Status,
    transport::{Identity, Server, ServerTlsConfig},
};

use super::{binary::PATIENCE, edge::Pair};

/// Runs until it is dropped.
pub(crate) struct Collector {
    pub(crate) address: SocketAddr,
    /// Everything that came, headers included, for looking through.
    pub(crate) raw: String,
    /// Of the resources that sent.
    pub(crate) resource: BTreeMap<String, String>,
    spans: Vec<Seen>,
    sent: UnboundedReceiver<Sent>,
    _tasks: JoinSet<()>,
}

/// One span, for people.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) trace: String,
    pub(crate) id: String,
    pub(crate) parent: String,
    pub(crate) state: String,
    pub(crate) name: String,
    pub(crate) kind: SpanKind,
    pub(crate) failed: bool,
    pub(crate) attributes: BTreeMap<String, String>,
    pub(crate) events: usize,
    pub(crate) took: Duration,
}

struct Sent {
    headers: String,
    export: ExportTraceServiceRequest,
}

struct Keep(UnboundedSender<Sent>);

#[tonic::async_trait]
impl TraceService for Keep {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let headers = format!("{:?}", request.metadata());
        drop(self.0.send(Sent { headers, export: request.into_inner() }));
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    pub(crate) async fn start() -> Self {
        Self::run(Server::builder()).await
    }

    /// The same over TLS.
    pub(crate) async fn start_with(pair: &Pair) -> Self {
        let tls = ServerTlsConfig::new().identity(Identity::from_pem(&pair.certificate, &pair.key));
        Self::run(Server::builder().tls_config(tls).unwrap()).await
    }

    async fn run(mut server: Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (keep, sent) = unbounded_channel();
        let mut tasks = JoinSet::new();
        let serving =
            server.add_service(TraceServiceServer::new(Keep(keep))).serve_with_incoming(TcpListenerStream::new(listener));
        tasks.spawn(async move { serving.await.unwrap() });
        Self { address, raw: String::new(), resource: BTreeMap::new(), spans: Vec::new(), sent, _tasks: tasks }
    }

    /// The spans so far, once they are as wanted.
    pub(crate) async fn until(&mut self, wanted: impl Fn(&[Seen]) -> bool) -> Vec<Seen> {
        while !wanted(&self.spans) {
            let sent = timeout(PATIENCE, self.sent.recv()).await;
            self.take(sent.unwrap_or_else(|_| panic!("they do not come; so far {:#?}", self.spans)).unwrap());
        }
        self.spans.clone()
    }

    /// The spans that came, once nobody is left to send more.
    pub(crate) fn all(&mut self) -> Vec<Seen> {
        while let Ok(sent) = self.sent.try_recv() {
            self.take(sent);
        }
        self.spans.clone()
    }

    fn take(&mut self, Sent { headers, export }: Sent) {
        self.raw.push_str(&format!("{headers}\n{export:?}\n"));
        for resource in export.resource_spans {
            self.resource = words(&resource.resource.unwrap().attributes);
            self.spans.extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans).map(Seen::of));
        }
    }
}

impl Seen {
    fn of(span: Span) -> Self {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            trace: hex(&span.trace_id),
            id: hex(&span.span_id),
            parent: hex(&span.parent_span_id),
            kind: span.kind(),
            failed: span.status.is_some_and(|status| status.code() == StatusCode::Error),
            attributes: words(&span.attributes),
            events: span.events.len(),
            took: Duration::from_nanos(span.end_time_unix_nano - span.start_time_unix_nano),
            state: span.trace_state,
            name: span.name,
        }
    }

    /// An attribute's value, or nothing.
    pub(crate) fn get(&self, key: &str) -> &str {
        self.attributes.get(key).map_or("", String::as_str)
    }
}

fn words(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let word = |pair: &KeyValue| match pair.value.clone().unwrap().value.unwrap() {
        any_value::Value::StringValue(text) => text,
        any_value::Value::IntValue(number) => number.to_string(),
        other => panic!("{} is {other:?}", pair.key),
    };
    let found: BTreeMap<_, _> = attributes.iter().map(|pair| (pair.key.clone(), word(pair))).collect();
    assert_eq!(found.len(), attributes.len(), "a key twice: {attributes:?}");
    found
}
