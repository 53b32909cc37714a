//! The settings for how much and how long a caller may ask: limits of messages and calls, and deadlines.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::domain::{duration, problem::Review};

/// The largest value of a limit: far above any use, and small enough that arithmetic cannot overflow.
const MAX_COUNT: usize = 1 << 30;
/// A token of 4 KiB must fit beside the usual headers.
const MIN_HEADER_LIST_BYTES: u32 = 8 * 1024;
/// A request with a key has some hundred bytes, and one with a PEM or JSON credential has a few KiB.
const MIN_MESSAGE_BYTES: usize = 4 * 1024;
/// The longest list of models has 3 MiB and must pass for an operator, who has half of the limit.
const MIN_ANSWER_BYTES: usize = 8 * 1024 * 1024;
/// With less time, no answer could be made and sent.
const MIN_DEADLINE: Duration = Duration::from_millis(100);

/// The limits of messages, connections and calls.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Bytes of a Decide request and of any other request but a batch.
    pub message_bytes: usize,
    /// Bytes of a batch request.
    pub batch_message_bytes: usize,
    /// Bytes of all requests that are being read or decided.
    pub request_bytes: usize,
    /// Bytes of all answers to questions that were not read yet. Callers that are no platform get half of it.
    pub answer_bytes: usize,
    /// Bytes of a request's headers.
    pub header_list_bytes: u32,
    /// Open connections of a listener.
    pub connections: usize,
    /// Concurrent calls of a connection. More of them wait in the client, unseen, and those that need no provider wait with them.
    pub streams_per_connection: u32,
    /// Concurrent calls of unknown callers, such as health checks without a token.
    pub unknown_calls: usize,
    /// Concurrent health watches.
    pub watches: usize,
    /// Decisions that wait for a provider.
    pub decisions: usize,
    /// Decisions that wait for the same provider.
    pub decisions_per_provider: usize,
    /// Decisions that may wait for a permit.
    pub decisions_waiting: usize,
    /// How long a decision may wait for a permit.
    #[serde(with = "duration")]
    pub decision_wait: Duration,
    /// Items of a batch.
    pub batch_items: usize,
    /// Items of a batch that are decided at the same time.
    pub batch_concurrency: usize,
    /// Credentials in a request.
    pub credentials: usize,
    /// Bytes of a credential's value.
    pub credential_bytes: usize,
    /// Bytes of an id or a name.
    pub name_bytes: usize,
    /// Bytes of a model's id.
    pub model_bytes: usize,
    /// Base-URL variables in a request.
    pub base_url_names: usize,
    /// Credential names in a ResolveProvider request.
    pub resolve_names: usize,
}

/// The time limits of calls.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Deadlines {
    /// For Decide, and for every other call but a batch and a health watch. A caller can set less, and not more.
    #[serde(with = "duration")]
    pub decide: Duration,
    /// For a batch.
    #[serde(with = "duration")]
    pub batch: Duration,
    /// From the first byte of a connection to the end of its TLS handshake and HTTP/2 preface.
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
            answer_bytes: 8 * 1024 * 1024,
            header_list_bytes: 16 * 1024,
            connections: 1024,
            streams_per_connection: 9216,
            unknown_calls: 128,
            watches: 128,
            decisions: 8192,
            decisions_per_provider: 2048,
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
    /// Reports what is wrong with these settings.
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
        review.number("answer_bytes", self.answer_bytes, MIN_ANSWER_BYTES, MAX_COUNT);
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
        if self.streams_per_connection as usize <= self.decisions {
            review.warning(
                "streams_per_connection",
                "is not more than limits.decisions: while so many decisions of one connection wait for providers, its other calls wait in the client",
            );
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
    /// Reports what is wrong with these settings.
    pub fn review(&self, review: &mut Review<'_>) {
        for (key, length) in [("decide", self.decide), ("batch", self.batch), ("handshake", self.handshake)] {
            review.length(key, length, MIN_DEADLINE, duration::MAX);
        }
        if self.batch < self.decide {
            review.warning("batch", "is less than deadlines.decide: an item of a batch has less time than a call of its own");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warned(limits: &Limits) -> Vec<String> {
        let (mut problems, mut warnings) = (Vec::new(), Vec::new());
        limits.review(&mut Review::of("limits", &mut problems, &mut warnings));
        assert!(problems.is_empty(), "{problems:?}");
        warnings.iter().map(|warning| warning.place.clone()).collect()
    }

    /// A call without a stream waits in its client, where no limit and no log line shows it, and a platform's own models wait with it.
    #[test]
    fn decisions_that_wait_for_providers_leave_their_connection_a_stream() {
        let limits = Limits::default();
        assert!(limits.streams_per_connection as usize > limits.decisions + limits.decisions_waiting);
        assert!(warned(&limits).is_empty());
        assert_eq!(warned(&Limits { streams_per_connection: 8192, ..limits.clone() }), ["limits.streams_per_connection"]);
        assert_eq!(warned(&Limits { decisions_per_provider: 8193, ..limits }), ["limits.decisions_per_provider"]);
    }
}
