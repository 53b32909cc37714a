//! How much and how long a caller may ask: the limits of messages and calls, and the deadlines.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::domain::{duration, problem::Review};

/// The largest count or size that a limit may have: far above any use, far below where arithmetic ends.
const MAX_COUNT: usize = 1 << 30;
/// A token of 4 KiB beside the usual headers must pass.
const MIN_HEADER_LIST_BYTES: u32 = 8 * 1024;
/// The smallest request with a key has some hundred bytes; one that holds a PEM or a JSON credential has some KiB.
const MIN_MESSAGE_BYTES: usize = 4 * 1024;
/// Less, and no answer could be made and sent.
const MIN_DEADLINE: Duration = Duration::from_millis(100);

/// How much.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Bytes of one Decide request, and of every other but a batch.
    pub message_bytes: usize,
    /// Bytes of one batch request.
    pub batch_message_bytes: usize,
    /// Bytes of all requests that are being read or decided.
    pub request_bytes: usize,
    /// Bytes of one request's headers.
    pub header_list_bytes: u32,
    /// Open connections of one listener.
    pub connections: usize,
    /// Calls at a time of one connection.
    pub streams_per_connection: u32,
    /// Calls at a time of callers that nobody knows: health checks without a token, and whatever else has no name.
    pub unknown_calls: usize,
    /// Health watches at a time.
    pub watches: usize,
    /// Decisions that wait for a provider at a time.
    pub decisions: usize,
    /// Of these, how many may wait for one provider.
    pub decisions_per_provider: usize,
    /// Decisions that may wait for such a place.
    pub decisions_waiting: usize,
    /// How long one may wait for it.
    #[serde(with = "duration")]
    pub decision_wait: Duration,
    /// Items of one batch.
    pub batch_items: usize,
    /// Items of one batch that are decided at a time.
    pub batch_concurrency: usize,
    /// Credentials of one spec.
    pub credentials: usize,
    /// Bytes of one credential's value.
    pub credential_bytes: usize,
    /// Bytes of an id or a name.
    pub name_bytes: usize,
    /// Bytes of a model's id.
    pub model_bytes: usize,
    /// Base-URL variables of one spec.
    pub base_url_names: usize,
    /// Credential names of one ResolveProvider.
    pub resolve_names: usize,
}

/// How long.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Deadlines {
    /// One Decide, whatever the caller allows; and every other call but a batch and a health watch.
    #[serde(with = "duration")]
    pub decide: Duration,
    /// One batch.
    #[serde(with = "duration")]
    pub batch: Duration,
    /// From a connection's first byte to the end of its TLS handshake and HTTP/2 preface.
    #[serde(with = "duration")]
    pub handshake: Duration,
}

// === impl Limits ===

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_bytes: 256 * 1024,
            batch_message_bytes: 4 * 1024 * 1024,
            request_bytes: 16 * 1024 * 1024,
            header_list_bytes: 16 * 1024,
            connections: 1024,
            streams_per_connection: 1024,
            unknown_calls: 128,
            watches: 128,
            decisions: 4096,
            decisions_per_provider: 1024,
            decisions_waiting: 256,
            decision_wait: Duration::from_millis(20),
            batch_items: 256,
            batch_concurrency: 32,
            credentials: 64,
            credential_bytes: 64 * 1024,
            name_bytes: 128,
            model_bytes: 512,
            base_url_names: 16,
            resolve_names: 256,
        }
    }
}

impl Limits {
    /// What is wrong with them.
    pub fn review(&self, review: &mut Review<'_>) {
        let Self { message_bytes, batch_message_bytes, request_bytes, .. } = *self;
        for (key, count) in [
            ("connections", self.connections),
            ("streams_per_connection", self.streams_per_connection as usize),
            ("unknown_calls", self.unknown_calls),
            ("watches", self.watches),
            ("decisions", self.decisions),
            ("decisions_per_provider", self.decisions_per_provider),
            ("batch_items", self.batch_items),
            ("batch_concurrency", self.batch_concurrency),
            ("credentials", self.credentials),
            ("credential_bytes", self.credential_bytes),
            ("name_bytes", self.name_bytes),
            ("model_bytes", self.model_bytes),
            ("resolve_names", self.resolve_names),
        ] {
            review.number(key, count, 1, MAX_COUNT);
        }
        review.number("message_bytes", message_bytes, MIN_MESSAGE_BYTES, MAX_COUNT);
        review.number("batch_message_bytes", batch_message_bytes, MIN_MESSAGE_BYTES, MAX_COUNT);
        review.number("request_bytes", request_bytes, MIN_MESSAGE_BYTES, MAX_COUNT);
        if request_bytes < message_bytes.max(batch_message_bytes) {
            review
                .error("request_bytes", "must not be less than message_bytes and batch_message_bytes: none of those would pass");
        }
        if self.header_list_bytes < MIN_HEADER_LIST_BYTES {
            review.error(
                "header_list_bytes",
                format!("must be at least {MIN_HEADER_LIST_BYTES}: a token and a trace need that much"),
            );
        }
        if self.decisions_per_provider > self.decisions {
            review
                .warning("decisions_per_provider", "is more than limits.decisions: one provider that hangs can take every place");
        }
    }
}

// === impl Deadlines ===

impl Default for Deadlines {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { decide: seconds(5), batch: seconds(60), handshake: seconds(5) }
    }
}

impl Deadlines {
    /// What is wrong with them.
    pub fn review(&self, review: &mut Review<'_>) {
        for (key, length) in [("decide", self.decide), ("batch", self.batch), ("handshake", self.handshake)] {
            review.length(key, length, MIN_DEADLINE, duration::MAX);
        }
        if self.batch < self.decide {
            review.warning("batch", "is less than deadlines.decide: an item of a batch has less time than a call of its own");
        }
    }
}
