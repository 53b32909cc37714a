//! Writes two kinds of events as JSON lines: one for every decision, and one for a call that ended without a decision.
//! `docs/decision-event.schema.json` describes them. They hold names, codes and numbers, but no credential's value, no body and no header.
//!
//! Lines are written by hand. A serializer checks each byte of each name for JSON escapes, which took 10,900 of a call's 80,600 instructions
//! (docs/performance.md).

use std::{
    borrow::Cow,
    num::{NonZeroU32, NonZeroU64},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use serde::{Deserialize, Serialize};
use tracing::Level;
use uuid::{Uuid, fmt::Hyphenated};

use super::{
    cause,
    log_writer::{LogWriter, put_timestamp},
    traces::TraceId,
};
use crate::{
    core::{classify::Finding, engine::Decided},
    domain::problem::Review,
    domain::{
        decision::{Decision, Liveness, Outcome},
        protocol::HeaderFamily,
        request::{self, Peer, Request},
        verdict::{Cause, Verdict},
    },
};

/// The version of the events' schema. It rises when a field is removed or changes its meaning, but not when one is added.
const SCHEMA_VERSION: &str = ",\"schema_version\":1";
/// How many calls without a decision are logged per second. Further ones are only counted, so that a flood of refusals does not push decisions
/// out of the log.
const UNDECIDED_PER_SECOND: NonZeroU32 = NonZeroU32::MIN.saturating_add(19);
/// Longer reasons are cut.
const MAX_REASON_CHARS: usize = 500;

/// The start of a JSON member: a comma, its name and a colon. Names need no escapes.
macro_rules! key {
    ($name:literal) => {
        concat!(",\"", $name, "\":")
    };
}

/// The same for a member with a string value, with the opening quote.
macro_rules! text {
    ($name:literal) => {
        concat!(",\"", $name, "\":\"")
    };
}

/// What is logged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogSettings {
    /// The share of plain allows that are logged, from 0 to 1. Everything else is always logged.
    pub plain_allow_ratio: f64,
}

/// Writes the events of decisions to the log.
pub struct Journal {
    lines: Option<LogWriter>,
    /// Whether the log's filter lets WARN and INFO through.
    warn: bool,
    info: bool,
    plain_allow_ratio: f64,
    undecided: DefaultDirectRateLimiter,
    suppressed: AtomicU64,
}

/// A call, or an item of a batch, that ended without a decision.
#[derive(Debug, Clone, Copy)]
pub struct Undecided<'a> {
    /// The call's method.
    pub method: &'static str,
    /// gRPC's name of the status: `RESOURCE_EXHAUSTED`.
    pub grpc_code: &'static str,
    /// The status's message.
    pub reason: &'a str,
    /// The peer of its connection.
    pub peer: Peer,
    /// The caller; empty if it is not known.
    pub caller: &'a str,
    /// The checkpoint; empty if it is not known. The same for the next two.
    pub checkpoint: &'static str,
    /// The workspace.
    pub workspace_id: &'a str,
    /// The organization.
    pub organization_id: &'a str,
    /// Whether the caller only wanted a report, and no workspace was to start.
    pub report_only: bool,
    /// What the caller gave it, in microseconds, where that is less than it may have.
    pub caller_time: Option<NonZeroU64>,
    /// The trace that the call belongs to.
    pub trace_id: Option<TraceId>,
}

// === impl LogSettings ===

impl Default for LogSettings {
    fn default() -> Self {
        Self { plain_allow_ratio: 1.0 }
    }
}

impl LogSettings {
    /// Reports a ratio that is out of bounds.
    pub fn review(&self, review: &mut Review<'_>) {
        review.number("plain_allow_ratio", self.plain_allow_ratio, 0.0, 1.0);
    }
}

// === impl Journal ===

impl Journal {
    /// Writes events to this log. Only this share of plain allows is written, from 0 to 1; everything else always is.
    pub fn to(lines: LogWriter, plain_allow_ratio: f64) -> Self {
        // The filter does not change, so it is asked once. Asking without writing an event would also leave the answer in the thread's filter
        // state, where the next span would use it.
        let warn = tracing::enabled!(target: "byok_gate::decision", Level::WARN);
        let info = tracing::enabled!(target: "byok_gate::decision", Level::INFO);
        Self { lines: Some(lines), warn, info, plain_allow_ratio, ..Self::off() }
    }

    /// Writes nothing.
    pub fn off() -> Self {
        Self {
            lines: None,
            warn: false,
            info: false,
            plain_allow_ratio: 0.0,
            undecided: RateLimiter::direct(Quota::per_second(UNDECIDED_PER_SECOND)),
            suppressed: AtomicU64::new(0),
        }
    }

    /// Writes the event of a decision. Denials and unverified allows are at WARN. They are at INFO if the provider has nothing to probe by design,
    /// or if the caller does not act on the answer.
    pub fn decision(
        &self,
        request: &Request,
        decided: &Decided,
        took: Duration,
        caller_time: Option<NonZeroU64>,
        trace_id: Option<TraceId>,
    ) {
        let Some(lines) = &self.lines else { return };
        let Decided { id, decision, registry_revision, catalogue_revision, finding } = decided;
        let Decision { outcome, resolution, liveness, warnings, trace: _, relevant: _ } = decision;
        let is_plain = is_plain(decision);
        if is_plain && !is_sampled(*id, self.plain_allow_ratio) {
            return;
        }
        // With report_only, the caller does not act on the answer, so nothing was refused.
        let warns = is_warning(decision) && !request.report_only;
        let (level, passes) = if warns { ("WARN", self.warn) } else { ("INFO", self.info) };
        if !passes {
            return;
        }
        let Request { spec, checkpoint, caller, .. } = request;
        let (word, code) = match outcome {
            Outcome::Allow(_) => ("ALLOW", ""),
            Outcome::Deny(deny) => ("DENY", deny.refusal.code().as_str()),
        };
        let mut line = Line::begin("decision", level);
        line.plain(text!("decision_id"), id.hyphenated().encode_lower(&mut [0; Hyphenated::LENGTH]));
        line.trace(trace_id);
        line.word(text!("checkpoint"), checkpoint.as_str());
        if request.report_only {
            line.flag(key!("report_only"));
        }
        line.optional_text(text!("workspace_id"), &spec.workspace_id);
        line.optional_text(text!("organization_id"), &spec.organization_id);
        line.optional_text(text!("caller"), &caller.name);
        line.text(text!("runtime"), &spec.runtime);
        line.text(text!("model"), &spec.model);
        line.word(text!("outcome"), word);
        line.word(text!("code"), code);
        if let Outcome::Deny(deny) = outcome {
            line.text(text!("reason"), &printable(&deny.message));
            line.optional_text(text!("operator_hint"), &printable(&deny.operator_hint));
            let unreadable = deny.refusal.unreadable_scopes();
            if !unreadable.is_empty() {
                line.words(key!("unreadable_scopes"), unreadable.iter().map(|scope| scope.as_str()));
            }
        }
        line.optional_text(text!("provider"), &resolution.provider);
        line.word(text!("billing_mode"), resolution.billing_mode.map_or("", |mode| mode.as_str()));
        line.word(text!("source"), resolution.source.as_str());
        if let Some(credential) = &resolution.credential {
            line.text(text!("credential_env"), &credential.env_name);
            line.word(text!("credential_scope"), credential.scope.as_str());
            line.optional_text(text!("credential_fingerprint"), &credential.fingerprint);
        }
        if let Some(liveness) = liveness {
            line.word(text!("verdict"), liveness.verdict.as_str());
            if let Some(status) = liveness.upstream_status {
                line.number(key!("upstream_status"), u64::from(status));
            }
            if let Some(seen) = liveness.seen {
                line.word(text!("served_from"), seen.served_from.as_str());
                line.number(key!("age_ms"), u64::try_from(seen.age.as_millis()).unwrap_or(u64::MAX));
            }
            // Plain allows are most of the log, so they leave these out.
            if !is_plain {
                line.optional_text(text!("endpoint_host"), &liveness.endpoint_host);
                line.optional_text(text!("probe"), &liveness.probe);
            }
        }
        if let Some(finding) = finding.as_ref().filter(|_| !is_plain) {
            line.cause(finding, liveness.as_ref());
        }
        line.number(key!("duration_us"), u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        if !is_plain {
            line.caller_time(caller_time);
        }
        if !warnings.is_empty() {
            line.words(key!("warnings"), warnings.iter().map(|warning| warning.code.as_str()));
        }
        line.plain(text!("registry_revision"), registry_revision);
        line.plain(text!("catalogue_revision"), catalogue_revision);
        lines.push(&line.end());
    }

    /// Writes the event of a call that ended without a decision, at WARN.
    pub fn undecided(&self, undecided: Undecided<'_>) {
        let Some(lines) = &self.lines else { return };
        if !self.warn {
            return;
        }
        if self.undecided.check().is_err() {
            self.suppressed.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let Undecided { method, grpc_code, reason, peer, caller, checkpoint, report_only, caller_time, trace_id, .. } = undecided;
        let mut line = Line::begin("undecided", "WARN");
        line.trace(trace_id);
        line.text(text!("method"), method);
        line.word(text!("checkpoint"), checkpoint);
        line.optional_text(text!("workspace_id"), undecided.workspace_id);
        line.optional_text(text!("organization_id"), undecided.organization_id);
        line.optional_text(text!("caller"), caller);
        line.plain(text!("peer"), &peer.to_string());
        if report_only {
            line.flag(key!("report_only"));
        }
        line.text(text!("grpc_code"), grpc_code);
        line.text(text!("reason"), &printable(reason));
        line.caller_time(caller_time);
        // How many were not logged since the last one.
        let suppressed = self.suppressed.swap(0, Ordering::Relaxed);
        if suppressed > 0 {
            line.number(key!("suppressed"), suppressed);
        }
        lines.push(&line.end());
    }
}

/// The line of an event, written member by member.
struct Line(Vec<u8>);

// === impl Line ===

impl Line {
    fn begin(event: &'static str, level: &'static str) -> Self {
        let mut line = Vec::with_capacity(1024);
        line.extend_from_slice(b"{\"timestamp\":\"");
        put_timestamp(&mut line);
        line.push(b'"');
        let mut line = Self(line);
        line.word(text!("level"), level);
        line.word(text!("event"), event);
        line.0.extend_from_slice(SCHEMA_VERSION.as_bytes());
        line
    }

    fn trace(&mut self, id: Option<TraceId>) {
        if let Some(id) = id {
            self.plain(text!("trace_id"), &id.to_string());
        }
    }

    /// Adds one of this service's own words, which need no escapes. An empty one is left out.
    fn word(&mut self, key: &str, word: &'static str) {
        if !word.is_empty() {
            self.plain(key, word);
        }
    }

    /// Adds a text that needs no escapes, such as hexadecimal digits and dashes.
    fn plain(&mut self, key: &str, text: &str) {
        let Self(line) = self;
        line.extend_from_slice(key.as_bytes());
        line.extend_from_slice(text.as_bytes());
        line.push(b'"');
    }

    fn text(&mut self, key: &str, text: &str) {
        if text.bytes().fold(true, |plain, byte| plain & matches!(byte, b' ' | b'!' | b'#'..=b'[' | b']'..=b'~')) {
            return self.plain(key, text);
        }
        let Self(line) = self;
        // The serializer writes the opening quote itself.
        line.extend_from_slice(key.trim_end_matches('"').as_bytes());
        drop(serde_json::to_writer(line, text));
    }

    /// Adds a text, unless it is empty.
    fn optional_text(&mut self, key: &str, text: &str) {
        if !text.is_empty() {
            self.text(key, text);
        }
    }

    fn flag(&mut self, key: &str) {
        self.0.extend_from_slice(key.as_bytes());
        self.0.extend_from_slice(b"true");
    }

    /// Adds the cause of the verdict.
    fn cause(&mut self, finding: &Finding, liveness: Option<&Liveness>) {
        self.word(text!("header"), finding.family.map_or("", HeaderFamily::as_str));
        self.word(text!("cause"), finding.cause.map_or("", Cause::as_str));
        self.word(text!("unreached"), finding.unreached.map_or("", cause::unreached));
        self.word(text!("withheld"), finding.withheld.map_or("", cause::withheld));
        // Without an answer, the result of made-up keys does not matter.
        self.word(text!("made_up_keys"), if finding.status.is_some() { cause::made_up(finding.made_up) } else { "" });
        if liveness.is_some_and(|liveness| liveness.verdict != finding.verdict) {
            // The decision rests on an earlier VALID. This is the verdict of the new probe.
            self.word(text!("verdict_now"), finding.verdict.as_str());
        }
    }

    fn caller_time(&mut self, time: Option<NonZeroU64>) {
        if let Some(time) = time {
            self.number(key!("caller_time_us"), time.get());
        }
    }

    fn number(&mut self, key: &str, number: u64) {
        self.0.extend_from_slice(key.as_bytes());
        drop(serde_json::to_writer(&mut self.0, &number));
    }

    fn words(&mut self, key: &str, words: impl Iterator<Item = &'static str>) {
        let Self(line) = self;
        line.extend_from_slice(key.as_bytes());
        line.push(b'[');
        for (at, word) in words.enumerate() {
            line.extend_from_slice(if at > 0 { b",\"" } else { b"\"" });
            line.extend_from_slice(word.as_bytes());
            line.push(b'"');
        }
        line.push(b']');
    }

    fn end(self) -> Vec<u8> {
        let Self(mut line) = self;
        line.extend_from_slice(b"}\n");
        line
    }
}

fn is_warning(decision: &Decision) -> bool {
    let by_design = decision.liveness.as_ref().is_some_and(|liveness| liveness.verdict == Verdict::NoServerSurface);
    match decision.outcome {
        Outcome::Deny(_) => true,
        Outcome::Allow(_) => decision.is_unverified_allow() && !by_design,
    }
}

/// Whether the decision is a verified allow without warnings.
fn is_plain(decision: &Decision) -> bool {
    match decision.outcome {
        Outcome::Deny(_) => false,
        Outcome::Allow(_) => decision.warnings.is_empty() && !decision.is_unverified_allow(),
    }
}

/// Whether the decision with this id is in the sampled share. The last bits of an id are random.
fn is_sampled(id: Uuid, ratio: f64) -> bool {
    let [.., a, b, c, d] = id.into_bytes();
    f64::from(u32::from_be_bytes([a, b, c, d])) < ratio * 2_f64.powi(32)
}

/// Replaces control characters and cuts the text. A reason may repeat what a caller sent, and control characters could move a terminal's cursor.
fn printable(text: &str) -> Cow<'_, str> {
    if text.len() <= MAX_REASON_CHARS && request::is_plain(text) {
        return Cow::Borrowed(text);
    }
    text.chars().take(MAX_REASON_CHARS).map(|letter| if letter.is_control() { '\u{fffd}' } else { letter }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_ids_is_sampled_and_the_bounds_are_all_and_none() {
        let ids: Vec<Uuid> = (0..10_000).map(|_| Uuid::now_v7()).collect();
        let share = |ratio| ids.iter().filter(|id| is_sampled(**id, ratio)).count();
        assert_eq!((share(0.0), share(1.0)), (0, ids.len()));
        assert!((800..1200).contains(&share(0.1)), "{}", share(0.1));
        assert!(is_sampled(Uuid::max(), 1.0) && !is_sampled(Uuid::nil(), 0.0));
    }

    #[test]
    fn a_line_is_json_whatever_it_holds() {
        let texts = ["", "plain", "quo\"te", "back\\slash", "line\nbreak", "\u{1b}[2J", "é", "\u{7f}", "</script>"];
        let mut line = Line::begin("decision", "INFO");
        for text in texts {
            line.text(text!("text"), text);
            line.optional_text(text!("given"), text);
        }
        line.number(key!("number"), u64::MAX);
        line.words(key!("none"), std::iter::empty());
        line.words(key!("words"), ["ONE", "TWO"].into_iter());
        let line = line.end();
        let (rest, end) = line.split_at(line.len() - 2);
        let expect: Vec<_> = texts
            .iter()
            .flat_map(|text| ["text", "given"].map(|name| (name, text)))
            .filter(|(name, text)| *name == "text" || !text.is_empty())
            .map(|(name, text)| format!(",\"{name}\":{}", serde_json::to_string(text).unwrap()))
            .collect();
        let expect = format!("{},\"number\":{},\"none\":[],\"words\":[\"ONE\",\"TWO\"]", expect.concat(), u64::MAX);
        assert!(std::str::from_utf8(rest).unwrap().ends_with(&expect), "{rest:?}");
        assert_eq!(end, b"}\n");
        let parsed: serde_json::Value = serde_json::from_slice(&line).unwrap();
        assert!(parsed["timestamp"].as_str().unwrap().parse::<jiff::Timestamp>().is_ok(), "{parsed}");
    }

    #[test]
    fn a_reason_moves_no_cursor_and_ends() {
        assert_eq!(printable("a\u{1b}[2J\nb\u{9b}c"), "a\u{fffd}[2J\u{fffd}b\u{fffd}c");
        assert_eq!(printable(&"é".repeat(1000)).chars().count(), MAX_REASON_CHARS);
    }
}
