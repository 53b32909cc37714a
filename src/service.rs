//! The gRPC service: convert, decide, convert, record once.

pub mod convert;

use std::{
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{FutureExt, Stream, StreamExt, stream};
use prost::Message;
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Request, Response, Status, metadata::MetadataMap};
use tonic_types::{ErrorDetails, StatusExt};

use self::convert::{Violations, pb};
use crate::{
    config::{BATCH_CONCURRENCY, MAX_BATCH_ITEMS, MAX_BATCH_TIME, MAX_DECIDE_BYTES, MAX_DECIDE_TIME},
    engine::Engine,
    refusal::Refusal,
    telemetry,
};

/// The service's name on the wire, as health checks name it.
pub const NAME: &str = "byokgate.v1.PolicyDecisionService";

/// The part of a caller's time that is kept back, so that the answer arrives before the caller gives up: a tenth, within
/// these bounds.
const MIN_MARGIN: Duration = Duration::from_millis(5);
const MAX_MARGIN: Duration = Duration::from_millis(100);

/// The service.
#[derive(Clone)]
pub struct PolicyDecision {
    engine: Arc<Engine>,
}

// === impl PolicyDecision ===

impl PolicyDecision {
    /// A service over this engine.
    pub fn new(engine: Arc<Engine>) -> Self {
        Self { engine }
    }

    /// One item: bad input and faults of ours are statuses, everything else is a decision.
    async fn decide_one(engine: &Engine, message: pb::DecideRequest, deadline: Instant) -> Result<pb::DecideResponse, Status> {
        let size = message.encoded_len();
        if size > MAX_DECIDE_BYTES {
            return Err(bad_request(Violations(vec![(
                "workspace_spec".to_owned(),
                format!("the request is {size} bytes long; the limit is {MAX_DECIDE_BYTES}"),
            )])));
        }
        let request = convert::request(message).map_err(bad_request)?;
        let began = Instant::now();
        // A panic in one decision is that decision's end, not the connection's.
        let deciding = AssertUnwindSafe(engine.decide(&request, deadline)).catch_unwind();
        let decided = deciding.await.map_err(|_| {
            tracing::error!(event = "decision_panicked", "a decision panicked; no decision was made");
            Status::internal("no decision was made: an internal error")
        })?;
        telemetry::record(&request, &decided, began.elapsed());
        Ok(convert::response(decided))
    }
}

#[tonic::async_trait]
impl pb::policy_decision_service_server::PolicyDecisionService for PolicyDecision {
    type BatchDecideStream = Pin<Box<dyn Stream<Item = Result<pb::BatchDecideResponse, Status>> + Send>>;

    async fn decide(&self, request: Request<pb::DecideRequest>) -> Result<Response<pb::DecideResponse>, Status> {
        let deadline = deadline(request.metadata(), MAX_DECIDE_TIME);
        Self::decide_one(&self.engine, request.into_inner(), deadline).await.map(Response::new)
    }

    async fn batch_decide(&self, request: Request<pb::BatchDecideRequest>) -> Result<Response<Self::BatchDecideStream>, Status> {
        let deadline = deadline(request.metadata(), MAX_BATCH_TIME);
        let requests = request.into_inner().requests;
        if requests.is_empty() || requests.len() > MAX_BATCH_ITEMS {
            let found = format!("holds {}; it must hold 1 to {MAX_BATCH_ITEMS}", requests.len());
            return Err(bad_request(Violations(vec![("requests".to_owned(), found)])));
        }
        let engine = Arc::clone(&self.engine);
        let decisions = stream::iter((0_u32..).zip(requests))
            .map(move |(index, message)| {
                let engine = Arc::clone(&engine);
                async move {
                    // An item's own time is a Decide's, within the batch's.
                    let own = deadline.min(Instant::now() + MAX_DECIDE_TIME);
                    let decided = timeout_at(deadline, Self::decide_one(&engine, message, own)).await;
                    let late = || Status::deadline_exceeded("no decision was made before the batch's deadline");
                    Ok(item(index, decided.unwrap_or_else(|_| Err(late()))))
                }
            })
            .buffer_unordered(BATCH_CONCURRENCY);
        Ok(Response::new(Box::pin(decisions)))
    }

    async fn resolve_provider(
        &self,
        request: Request<pb::ResolveProviderRequest>,
    ) -> Result<Response<pb::ResolveProviderResponse>, Status> {
        let (runtime, model, names) = convert::resolve_request(request.into_inner()).map_err(bad_request)?;
        let (result, snapshot) = self.engine.resolve(&runtime, &model, &names);
        Ok(Response::new(convert::resolve_response(result, &model, &snapshot)))
    }

    async fn list_models(&self, request: Request<pb::ListModelsRequest>) -> Result<Response<pb::ListModelsResponse>, Status> {
        let runtime = convert::list_request(request.into_inner()).map_err(bad_request)?;
        let snapshot = self.engine.snapshot();
        if let Some(name) = runtime.as_deref()
            && snapshot.registry.runtime(name).is_none()
        {
            let known = snapshot.registry.runtimes().map(|(name, _)| name.to_owned()).collect();
            return Err(Status::not_found(Refusal::RuntimeUnsupported { runtime: name.to_owned(), known }.message()));
        }
        Ok(Response::new(convert::models(&snapshot, runtime.as_deref())))
    }

    async fn get_registry_status(
        &self,
        _request: Request<pb::GetRegistryStatusRequest>,
    ) -> Result<Response<pb::GetRegistryStatusResponse>, Status> {
        Ok(Response::new(convert::status(&self.engine.snapshot(), SystemTime::now())))
    }
}

fn item(index: u32, decided: Result<pb::DecideResponse, Status>) -> pb::BatchDecideResponse {
    let result = match decided {
        Ok(response) => pb::batch_decide_response::Result::Response(Box::new(response)),
        Err(status) => {
            let code = status.code() as i32;
            pb::batch_decide_response::Result::Status(pb::ItemStatus { code, message: status.message().to_owned() })
        }
    };
    pb::BatchDecideResponse { index, result: Some(result) }
}

/// INVALID_ARGUMENT: the first violation in words, all of them as details.
fn bad_request(violations: Violations) -> Status {
    let Violations(list) = violations;
    let first = list.first().map_or_else(String::new, |(field, description)| format!("{field}: {description}"));
    let mut details = ErrorDetails::new();
    for (field, description) in list {
        details.add_bad_request_violation(field, description);
    }
    Status::with_error_details(Code::InvalidArgument, first, details)
}

/// When a caller's answer is due: its own `grpc-timeout` less a margin, capped.
fn deadline(metadata: &MetadataMap, cap: Duration) -> Instant {
    let given = metadata.get("grpc-timeout").and_then(|value| grpc_timeout(value.to_str().ok()?));
    let time = given.unwrap_or(cap).min(cap);
    let margin = (time / 10).clamp(MIN_MARGIN, MAX_MARGIN);
    Instant::now() + time.saturating_sub(margin)
}

/// `1` to `8` digits and a unit. Anything else is no timeout, as the gRPC library has it.
fn grpc_timeout(text: &str) -> Option<Duration> {
    let unit = text.chars().next_back()?;
    let digits = text.strip_suffix(unit)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number = digits.parse::<u64>().ok()?;
    Some(match unit {
        'H' => Duration::from_secs(number * 3600),
        'M' => Duration::from_secs(number * 60),
        'S' => Duration::from_secs(number),
        'm' => Duration::from_millis(number),
        'u' => Duration::from_micros(number),
        'n' => Duration::from_nanos(number),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts_parse_or_are_none() {
        for (text, expect) in [
            ("1n", Some(Duration::from_nanos(1))),
            ("250m", Some(Duration::from_millis(250))),
            ("4S", Some(Duration::from_secs(4))),
            ("99999999H", Some(Duration::from_secs(99_999_999 * 3600))),
            ("0S", Some(Duration::ZERO)),
            ("", None),
            ("S", None),
            ("123456789S", None),
            ("1.5S", None),
            ("4x", None),
            ("4é", None),
        ] {
            assert_eq!(grpc_timeout(text), expect, "{text:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_is_the_callers_less_a_margin_and_capped() {
        let after = |text: Option<&str>| {
            let mut metadata = MetadataMap::new();
            if let Some(text) = text {
                metadata.insert("grpc-timeout", text.parse().unwrap());
            }
            deadline(&metadata, Duration::from_secs(5)) - Instant::now()
        };
        assert_eq!(after(None), Duration::from_millis(4900));
        assert_eq!(after(Some("60S")), Duration::from_millis(4900));
        assert_eq!(after(Some("500m")), Duration::from_millis(450));
        assert_eq!(after(Some("20m")), Duration::from_millis(15));
        assert_eq!(after(Some("1n")), Duration::ZERO);
    }
}
