//! Errors of calls that end without a decision: a gRPC code, a text, and details that a program can read.

use std::{collections::HashMap, time::Duration};

use prost::Message;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::convert::{
    Violations,
    pb::{self, ErrorReason},
};

/// The domain in google.rpc.ErrorInfo.
pub(crate) const ERROR_DOMAIN: &str = "byok-gate";
/// How long a refused caller should wait: long enough to spread callers out, short for a person.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// An error with this reason and text.
pub(crate) fn error(reason: ErrorReason, message: impl Into<String>) -> Status {
    with_details(reason, message, ErrorDetails::new(), HashMap::new())
}

/// RESOURCE_EXHAUSTED for a call that asks for a decision, with the name of the limit and the time to wait.
pub(crate) fn limit_reached(limit: &str, words: &str, retry_after: Duration) -> Status {
    refused_by(limit, words, retry_after, "no decision was made: ")
}

/// The same for any call. The text begins with `prefix`.
pub(crate) fn refused_by(limit: &str, words: &str, retry_after: Duration, prefix: &str) -> Status {
    let mut details = ErrorDetails::with_retry_info(Some(retry_after));
    details.add_quota_failure_violation(limit, words);
    let message = format!("{prefix}the limit `{limit}` is reached ({words}); try again in {} s", retry_after.as_secs().max(1));
    with_details(ErrorReason::LimitReached, message, details, HashMap::from([("limit".to_owned(), limit.to_owned())]))
}

/// UNAVAILABLE: the service stops before the call is answered.
pub(crate) fn draining() -> Status {
    let details = ErrorDetails::with_retry_info(Some(RETRY_AFTER));
    with_details(ErrorReason::Draining, "no decision was made: the service is stopping", details, HashMap::new())
}

/// INVALID_ARGUMENT: the first violation as the text, all of them as details.
pub(crate) fn bad_request(reason: ErrorReason, violations: Violations) -> Status {
    let Violations(list) = violations;
    let first = list.first().map_or_else(String::new, |(field, description)| format!("{field}: {description}"));
    let mut details = ErrorDetails::new();
    for (field, description) in list {
        details.add_bad_request_violation(field, description);
    }
    with_details(reason, first, details, HashMap::new())
}

/// INVALID_ARGUMENT for these fields.
pub(super) fn invalid(violations: Violations) -> Status {
    bad_request(ErrorReason::BadRequest, violations)
}

/// The same error with the details that every error of this service has. Errors of the gRPC library have none.
pub(crate) fn with_standard_details(status: Status) -> Status {
    /// How the gRPC library begins its text for a body that ends too early or has no valid frame.
    const BROKEN: [&str; 3] = ["Unexpected EOF", "Missing request message", "protocol error: received message with invalid"];
    if !status.details().is_empty() {
        return status;
    }
    if status.code() == Code::Internal && BROKEN.iter().any(|words| status.message().starts_with(words)) {
        let found = "is cut off, or is not framed as gRPC's messages are".to_owned();
        return bad_request(ErrorReason::RequestUnreadable, Violations(vec![("request".to_owned(), found)]));
    }
    let reason = match status.code() {
        Code::InvalidArgument | Code::OutOfRange | Code::FailedPrecondition => ErrorReason::BadRequest,
        Code::Unauthenticated => ErrorReason::TokenMissing,
        Code::PermissionDenied => ErrorReason::MethodNotAllowed,
        Code::ResourceExhausted => ErrorReason::LimitReached,
        Code::DeadlineExceeded | Code::Cancelled | Code::Aborted => ErrorReason::Deadline,
        Code::Unavailable => ErrorReason::Draining,
        // The health service does not know the name, or there is no such method.
        Code::NotFound | Code::Unimplemented => ErrorReason::Unsupported,
        Code::Ok | Code::Unknown | Code::AlreadyExists | Code::Internal | Code::DataLoss => ErrorReason::Internal,
    };
    let code = match status.code() {
        // The health protocol requires this code.
        Code::NotFound => Code::NotFound,
        // A caller that has cancelled did not run out of time.
        Code::Cancelled | Code::Aborted => Code::Cancelled,
        _ => code_of(reason),
    };
    with_code(code, reason, status.message(), ErrorDetails::new(), HashMap::new())
}

/// The status of an item of a batch. It is the same as that of a call.
pub(super) fn item_status(status: &Status) -> pb::ItemStatus {
    // These details were encoded by this service, so they can be decoded.
    let details = tonic_types::Status::decode(status.details()).map(|status| status.details).unwrap_or_default();
    pb::ItemStatus { code: status.code() as i32, message: status.message().to_owned(), details }
}

fn with_details(
    reason: ErrorReason,
    message: impl Into<String>,
    details: ErrorDetails,
    metadata: HashMap<String, String>,
) -> Status {
    with_code(code_of(reason), reason, message, details, metadata)
}

fn with_code(
    code: Code,
    reason: ErrorReason,
    message: impl Into<String>,
    mut details: ErrorDetails,
    metadata: HashMap<String, String>,
) -> Status {
    let name = reason.as_str_name().trim_start_matches("ERROR_REASON_");
    details.set_error_info(name, ERROR_DOMAIN, metadata);
    Status::with_error_details(code, message, details)
}

fn code_of(reason: ErrorReason) -> Code {
    match reason {
        ErrorReason::BadRequest | ErrorReason::RequestTooLarge | ErrorReason::RequestUnreadable => Code::InvalidArgument,
        ErrorReason::TokenMissing | ErrorReason::TokenMalformed | ErrorReason::TokenUnknown => Code::Unauthenticated,
        ErrorReason::CallerUnknown | ErrorReason::MethodNotAllowed | ErrorReason::RequestNotAllowed => Code::PermissionDenied,
        ErrorReason::LimitReached => Code::ResourceExhausted,
        ErrorReason::Deadline => Code::DeadlineExceeded,
        ErrorReason::Draining => Code::Unavailable,
        ErrorReason::UnknownRuntime => Code::NotFound,
        ErrorReason::Unsupported => Code::Unimplemented,
        ErrorReason::Unspecified | ErrorReason::Internal => Code::Internal,
    }
}
