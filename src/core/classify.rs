//! Reads a response by the catalogue's rows, and says what it means for the credential. Pure functions.

use std::time::Duration;

use serde_json::Value;

pub use crate::core::answer::{Answer, Body};
use crate::{
    core::{
        answer::{any_at, body_of, contains, error_code, explains_a_401},
        catalogue::{BodyTest, Expected, Kind, Probe, Signal, SignalOutcome},
        response_shape::ResponseShape,
    },
    domain::{
        protocol::HeaderFamily,
        verdict::{Cause, MadeUpKey, Unreached, Verdict, Withheld},
    },
};

/// What one response says about the credential.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Classification {
    /// A success response. It counts only if the endpoint refuses bad keys.
    Accepted,
    /// The key is alive but may not use this endpoint.
    Restricted,
    /// A 403 with this error code. The key is dead if a made-up key gets the same, restricted if a made-up key gets a 401, and forbidden otherwise.
    Forbidden(String),
    /// No meaning by itself. It is a refusal if a made-up key gets the same response.
    Unread,
    /// This verdict, which is never VALID.
    Verdict(Verdict),
}

/// What the reading of a response is based on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadBy {
    /// The probe's signal at this position.
    Signal(usize),
    /// The list of codes that many servers share.
    CommonCode,
    /// The list of texts that many servers share.
    CommonText,
    /// Only the status and the kind of body.
    Shape,
}

/// What a response says about the credential, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// The meaning.
    pub classification: Classification,
    /// What the meaning is based on.
    pub by: ReadBy,
    /// The reason, for logs and answers.
    pub cause: Cause,
    /// The catalogue's row says that no other endpoint will tell more.
    pub stop: bool,
}

/// The result of one request, as the probe plan takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeResponse {
    /// The provider answered.
    Answer {
        /// What the response says.
        reading: Reading,
        /// The response in comparable form.
        shape: ResponseShape,
        /// The wait that the provider asks for.
        retry_after: Option<Duration>,
    },
    /// No response within the time budget.
    TimedOut,
    /// No connection could be made, or it broke.
    Unreachable(Unreached),
    /// This machine had no file descriptor or memory left for a connection. That says nothing about the provider.
    Exhausted,
}

/// How an endpoint treats made-up keys in one header.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Calibration {
    /// It refuses them.
    Refuses {
        /// The shape of the refusal.
        shape: ResponseShape,
        /// The refusal says so itself: INVALID by a signal or a code, or a 401.
        in_words: bool,
        /// A signal or a common code says that the refusal is about the key. So it is no rate limit.
        by_code: bool,
        /// A real key was accepted right before and again right after. So the refusal is no response that every key gets, whatever it looks like.
        confirmed: bool,
    },
    /// It accepts them, so a success response proves nothing.
    AcceptsAnyone,
    /// The response says nothing about made-up keys. Holds its status, if there was a response.
    Inconclusive(Option<u16>),
    /// A made-up key got this response, and so does every key: it is a rate limit, a ban, an outage, or a quota that all callers share. It says nothing
    /// about any key.
    SameForEveryKey(ResponseShape),
    /// A made-up key has been sent, but this probe does not wait for the response.
    NotWaitedFor,
    /// No made-up key was sent.
    #[default]
    NotAsked,
}

/// The result of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What is known about the credential.
    pub verdict: Verdict,
    /// The reason. `None` for VALID, and where no response came.
    pub cause: Option<Cause>,
    /// The status of the provider's response, if there was one.
    pub status: Option<u16>,
    /// The name of the probe that was conclusive; empty if none was.
    pub probe: String,
    /// The header that carried the credential. For VALID: the one in which it was accepted.
    pub family: Option<HeaderFamily>,
    /// Only for VALID: the workspace's client sends the credential in another header.
    pub wrong_header: bool,
    /// How a made-up key was answered.
    pub made_up: MadeUpKey,
    /// The wait that the provider asks for.
    pub retry_after: Option<Duration>,
    /// The finding holds for this model only, and not for the credential with any model.
    pub about_model: bool,
    /// The probe has cost the tenant money.
    pub cost_money: bool,
    /// Why no request was sent, if none was.
    pub withheld: Option<Withheld>,
    /// Only for NEW_KEYS: the setting that is used up, such as `new_keys.per_caller`.
    pub used_up: Option<&'static str>,
    /// What kept a request from reaching the provider, if something did.
    pub unreached: Option<Unreached>,
    /// Only for TIMEOUT: the decision's deadline passed before the provider had its usual time. Holds the time that it had.
    pub cut_short: Option<Duration>,
}

impl Finding {
    /// A finding with a verdict and nothing else, for when no response came.
    pub const fn bare(verdict: Verdict) -> Self {
        Self {
            verdict,
            cause: None,
            status: None,
            probe: String::new(),
            family: None,
            wrong_header: false,
            made_up: MadeUpKey::NotAsked,
            retry_after: None,
            about_model: false,
            cost_money: false,
            withheld: None,
            used_up: None,
            unreached: None,
            cut_short: None,
        }
    }

    /// The reasons in words: the cause, the header, and how a made-up key was answered. Holds nothing of the provider's own text.
    pub fn why(&self) -> String {
        let cause = self.cause.map_or_else(String::new, |cause| format!(", {cause}: {}", cause.text()));
        let header = match (self.family, self.wrong_header) {
            (None, _) => String::new(),
            (Some(family), false) => format!(", key in {}", family.header()),
            (Some(family), true) => format!(", key in {}: another header than the workspace's client uses", family.header()),
        };
        let made_up = if self.status.is_none() { String::new() } else { format!(", made-up keys: {}", self.made_up.text()) };
        format!("{cause}{header}{made_up}")
    }

    /// A finding for a credential that is one new one too many. `setting`: the limit.
    pub fn one_too_many(setting: &'static str) -> Self {
        Self { used_up: Some(setting), ..Self::withheld(Withheld::NewKeys) }
    }

    /// A finding for a provider that this service did not ask.
    pub fn withheld(why: Withheld) -> Self {
        Self { withheld: Some(why), ..Self::bare(Verdict::NotAttempted) }
    }
}

// === reading an answer ===

/// What this response says.
pub fn classify(answer: Answer<'_>, probe: &Probe) -> Classification {
    read(answer, probe).classification
}

/// What this response says, and why. The row's signals come first, then the codes and texts that many servers share, then status and kind of body.
pub fn read(answer: Answer<'_>, probe: &Probe) -> Reading {
    let json = answer.json();
    let body = body_of(answer, json.as_ref());
    let page = body == Body::Page;
    let signal = probe.signals.iter().enumerate().find(|(_, signal)| matches(signal, answer, json.as_ref(), page));
    if let Some((position, signal)) = signal {
        return Reading {
            classification: outcome(signal.outcome),
            by: ReadBy::Signal(position),
            cause: Cause::RowSignal,
            stop: signal.stop,
        };
    }
    let success =
        if matches!(answer.status, 200..=299) { check_success(answer, json.as_ref(), &probe.expect) } else { Err(Cause::Status) };
    if success.is_ok() {
        return Reading { classification: Classification::Accepted, by: ReadBy::Shape, cause: Cause::Status, stop: false };
    }
    // A failing server says nothing about a key, whatever its body repeats. A 429 is a rate limit, unless its code says otherwise.
    if answer.status < 500
        && let Some(found) = json.as_ref().and_then(|json| probe.common.outcome(answer.status, json))
    {
        // The code says that this network is refused, so no other endpoint tells more.
        let stop = found == SignalOutcome::Verdict(Verdict::UnexpectedResponse);
        return Reading { classification: outcome(found), by: ReadBy::CommonCode, cause: Cause::CommonCode, stop };
    }
    let in_words = match (&json, body) {
        (Some(json), _) => probe.common.outcome_of_text(answer.status, json),
        (None, Body::Text) => probe.common.outcome_of_plain_text(answer.status, answer.body),
        (None, _) => None,
    };
    // No text is listed for a failing server.
    if let Some(found) = in_words {
        return Reading { classification: outcome(found), by: ReadBy::CommonText, cause: Cause::CommonCode, stop: false };
    }
    let code = json.as_ref().and_then(error_code);
    let (classification, cause) = match (answer.status, code) {
        (401, _) if json.as_ref().is_some_and(explains_a_401) => (Classification::Verdict(Verdict::Invalid), Cause::Status),
        // This status is about money alone, whatever the body is.
        (402, _) => (Classification::Verdict(Verdict::QuotaExhausted), Cause::Status),
        (403, Some(code)) => (Classification::Forbidden(code), Cause::Status),
        (429, _) => (Classification::Verdict(Verdict::RateLimited), Cause::Status),
        (500..=599, _) => (Classification::Verdict(Verdict::ProviderError), Cause::Status),
        (status, _) => (Classification::Unread, why_unread(status, body, success.err())),
    };
    Reading { classification, by: ReadBy::Shape, cause, stop: false }
}

const fn outcome(outcome: SignalOutcome) -> Classification {
    match outcome {
        SignalOutcome::Accepted => Classification::Accepted,
        SignalOutcome::Restricted => Classification::Restricted,
        SignalOutcome::Verdict(verdict) => Classification::Verdict(verdict),
    }
}

fn why_unread(status: u16, body: Body, wrong_shape: Option<Cause>) -> Cause {
    match (status, body, wrong_shape) {
        (300..=399, _, _) => Cause::Redirect,
        (_, Body::Page, _) => Cause::Page,
        (404 | 405 | 410, _, _) => Cause::NotFound,
        (_, Body::Empty, _) => Cause::EmptyBody,
        (_, Body::Text, _) => Cause::PlainText,
        (200..=299, Body::Json, Some(cause)) => cause,
        (_, Body::Json, _) => Cause::RequestRefused,
    }
}

/// Whether the headers mark a page for people: HTML, or a challenge by the network in front of the vendor.
pub fn is_page(headers: &http::HeaderMap) -> bool {
    let kind = headers.get(http::header::CONTENT_TYPE).map(|value| value.as_bytes().to_ascii_lowercase());
    let html = kind.is_some_and(|kind| kind.starts_with(b"text/html") || kind.starts_with(b"application/xhtml"));
    html || headers.contains_key("cf-mitigated")
}

/// Whether the headers say that a cache answered. Then the provider has not checked the key.
pub fn is_from_a_cache(headers: &http::HeaderMap) -> bool {
    let values =
        |name: &str| headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok()).map(str::to_ascii_lowercase);
    // RFC 9111, section 5.1: a response with an age was not made by the origin for this request.
    let aged = values("age").any(|age| age.trim().parse::<u64>().is_ok_and(|age| age > 0));
    // The names that CloudFront, Fastly, Varnish, nginx, Cloudflare and RFC 9211 use.
    let names = ["x-cache", "x-cache-status", "x-proxy-cache", "cf-cache-status", "cache-status"];
    aged || names.iter().any(|name| {
        values(name).any(|value| value.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| matches!(word, "hit" | "stale")))
    })
}

/// The reading of a response that came from a cache, whatever it holds.
pub const fn from_a_cache() -> Reading {
    Reading {
        classification: Classification::Verdict(Verdict::UnexpectedResponse),
        by: ReadBy::Shape,
        cause: Cause::FromACache,
        stop: false,
    }
}

/// What the response to a made-up key says about the endpoint.
pub fn calibration_of(reading: &Reading, shape: &ResponseShape) -> Calibration {
    match (&reading.classification, shape.status) {
        (Classification::Accepted, _) => Calibration::AcceptsAnyone,
        (Classification::Verdict(Verdict::RateLimited | Verdict::ProviderError), status) => {
            Calibration::Inconclusive(Some(status))
        }
        // A made-up key has no account. So the quota is that of the server, and all callers share it.
        // By a code, it counts for a key at once: no made-up key is asked for.
        (Classification::Verdict(Verdict::QuotaExhausted), 429) if reading.by == ReadBy::CommonText => {
            Calibration::SameForEveryKey(shape.clone())
        }
        // These are about time, order, limits or a failing server, and not about the key.
        (_, status @ (408 | 409 | 423 | 425 | 429 | 500..=599)) => Calibration::Inconclusive(Some(status)),
        (classification, status) => Calibration::Refuses {
            shape: shape.clone(),
            in_words: *classification == Classification::Verdict(Verdict::Invalid) || status == 401,
            by_code: *classification == Classification::Verdict(Verdict::Invalid) && reading.by != ReadBy::Shape,
            confirmed: false,
        },
    }
}

fn matches(signal: &Signal, answer: Answer<'_>, json: Option<&Value>, page: bool) -> bool {
    if page && !signal.page || !signal.statuses.is_empty() && !signal.statuses.contains(&answer.status) {
        return false;
    }
    signal.tests.iter().all(|test| match test {
        BodyTest::Contains(texts) => texts.iter().any(|text| contains(answer.body, text)),
        BodyTest::Lacks(text) => !contains(answer.body, text),
        BodyTest::IsOneOf(paths, values) => json.is_some_and(|json| {
            paths.iter().any(|path| any_at(json, path, &|value| values.iter().any(|wanted| same(value, wanted))))
        }),
        BodyTest::AtMost(paths, limit) => json.is_some_and(|json| {
            paths.iter().any(|path| any_at(json, path, &|value| number(value).is_some_and(|number| number <= *limit)))
        }),
    })
}

/// Whether two values are equal. Texts are compared without case, and a number equals a string of the same digits: vendors write the same code both
/// ways.
fn same(value: &Value, wanted: &Value) -> bool {
    match (value, wanted) {
        (Value::String(text), Value::String(wanted)) => text.eq_ignore_ascii_case(wanted),
        (Value::String(text), Value::Number(number)) | (Value::Number(number), Value::String(text)) => {
            *text == number.to_string()
        }
        (value, wanted) => value == wanted,
    }
}

/// A number, or a string that holds one: vendors write balances both ways.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}

/// Whether this 2xx is a success response: an expected value is there with its kind and is not null, and there is no error beside it.
fn check_success(answer: Answer<'_>, json: Option<&Value>, expect: &[Expected]) -> Result<(), Cause> {
    let Some(json) = json else { return if begins_like_success(answer, expect) { Ok(()) } else { Err(Cause::WrongShape) } };
    if holds_error(json) {
        return Err(Cause::ErrorBeside);
    }
    let there = expect.iter().any(|Expected { path, kind }| any_at(json, path, &|value| is_of(value, *kind)));
    if there { Ok(()) } else { Err(Cause::WrongShape) }
}

fn is_of(value: &Value, kind: Kind) -> bool {
    match kind {
        Kind::Any => !value.is_null(),
        Kind::List => value.is_array(),
        Kind::Object => value.is_object(),
        Kind::Text => value.is_string(),
        Kind::Flag => value.is_boolean(),
        Kind::Number => number(value).is_some(),
    }
}

fn holds_error(json: &Value) -> bool {
    let says_no = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Bool(true) | Value::Number(_) | Value::Object(_) => true,
    };
    // Some servers write 200, as in HTTP, for "no error".
    let is_failure = |value: &Value| match value {
        Value::Number(number) => number.as_f64().is_none_or(|code| code != 0.0 && code != 200.0),
        Value::String(text) => {
            let is_good = |code: f64| code == 0.0 || code == 200.0;
            !text.is_empty()
                && !text.parse().map_or(["success", "ok"].iter().any(|word| text.eq_ignore_ascii_case(word)), is_good)
        }
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => false,
    };
    // A `status` may also be a word about something else, such as "active".
    let is_error_status = |value: &Value| match value {
        Value::String(text) => {
            ["error", "fail", "failed", "failure"].iter().any(|word| text.eq_ignore_ascii_case(word))
                || text.parse::<f64>().is_ok_and(|status| status >= 400.0)
        }
        value => value.as_f64().is_some_and(|status| status >= 400.0),
    };
    let is_false =
        |value: &Value| *value == Value::Bool(false) || value.as_str().is_some_and(|text| text.eq_ignore_ascii_case("false"));
    let mut choices = json.get("choices").and_then(Value::as_array).into_iter().flatten();
    ["error", "errors"].iter().any(|key| json.get(key).is_some_and(says_no))
        || ["code", "error_code", "errcode", "err_code"].iter().any(|key| json.get(key).is_some_and(is_failure))
        || json.get("base_resp").and_then(|base| base.get("status_code")).is_some_and(is_failure)
        || json.get("success").is_some_and(is_false)
        || json.get("status").is_some_and(is_error_status)
        || choices.any(|choice| choice.get("error").is_some_and(says_no))
}

/// The same for a body that was cut off, which cannot be parsed. It must begin as an object with an expected key, whose value has the right kind as
/// far as can be seen, and without an error before it.
fn begins_like_success(answer: Answer<'_>, expect: &[Expected]) -> bool {
    let body = answer.body.trim_ascii_start();
    answer.truncated
        && body.first() == Some(&b'{')
        && expect.iter().any(|Expected { path, kind }| {
            let (key, deeper) = path.split_once('.').map_or((path.as_str(), false), |(key, _)| (key, true));
            let quoted = format!("\"{key}\"");
            let Some(at) = body.windows(quoted.len()).position(|window| window == quoted.as_bytes()) else { return false };
            let (before, behind) = body.split_at(at);
            let value = behind.get(quoted.len()..).unwrap_or_default().trim_ascii_start();
            let first = value.strip_prefix(b":").and_then(|value| value.trim_ascii_start().first());
            let fits = match (first, deeper, kind) {
                (None, ..) | (Some(b'n'), ..) => false,
                (Some(first), false, Kind::List) => *first == b'[',
                (Some(first), true, _) | (Some(first), false, Kind::Object) => matches!(first, b'{' | b'['),
                (Some(_), false, Kind::Any | Kind::Text | Kind::Flag | Kind::Number) => true,
            };
            fits && !contains(before, "\"error\"") && !contains(before, "\"success\":false")
        })
}

#[cfg(test)]
mod tests {
    use http::{HeaderMap, HeaderName, HeaderValue};

    use super::*;

    #[test]
    fn a_key_too_many_names_its_limit() {
        let Finding { verdict, withheld, used_up, .. } = Finding::one_too_many("new_keys.per_caller");
        let expected = (Verdict::NotAttempted, Some(Withheld::NewKeys), Some("new_keys.per_caller"));
        assert_eq!((verdict, withheld, used_up), expected);
    }

    #[test]
    fn a_quota_that_a_made_up_key_is_told_in_words_is_the_servers() {
        let answer = |status| Answer { status, body: b"no quota", truncated: false, page: false, retry_after: None };
        let calibration = |by, status| {
            let classification = Classification::Verdict(Verdict::QuotaExhausted);
            let reading = Reading { classification, by, cause: Cause::CommonCode, stop: false };
            calibration_of(&reading, &ResponseShape::of(answer(status), ""))
        };
        let shape = ResponseShape::of(answer(429), "");
        assert_eq!(calibration(ReadBy::CommonText, 429), Calibration::SameForEveryKey(shape));
        // A code counts at once, so nothing depends on what a made-up key gets.
        assert_eq!(calibration(ReadBy::CommonCode, 429), Calibration::Inconclusive(Some(429)));
        assert_eq!(calibration(ReadBy::Signal(0), 429), Calibration::Inconclusive(Some(429)));
        // With another status, it may be how unknown keys are refused.
        assert!(matches!(calibration(ReadBy::CommonText, 403), Calibration::Refuses { in_words: false, by_code: false, .. }));
    }

    #[test]
    fn a_page_is_known_by_its_headers() {
        for (name, value, expected) in [
            ("content-type", "text/html; charset=utf-8", true),
            ("content-type", "Application/XHTML+xml", true),
            ("cf-mitigated", "challenge", true),
            ("content-type", "application/json", false),
            ("x-content-type", "text/html", false),
        ] {
            let headers = HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_static(value))]);
            assert_eq!(is_page(&headers), expected, "{name}: {value}");
        }
    }

    #[test]
    fn a_caches_answer_is_known_by_its_headers() {
        let is_cached = |name: &'static str, value: &'static str| {
            let name = HeaderName::from_static(name);
            is_from_a_cache(&HeaderMap::from_iter([(name, HeaderValue::from_static(value))]))
        };
        for (name, value) in [
            ("age", "7"),
            ("x-cache", "Hit from cloudfront"),
            ("x-cache", "MISS, HIT"),
            ("x-cache", "TCP_HIT from a.example"),
            ("x-cache-status", "HIT"),
            ("cf-cache-status", "STALE"),
            ("cache-status", "edge.example; hit"),
        ] {
            assert!(is_cached(name, value), "{name}: {value}");
        }
        for (name, value) in [
            ("age", "0"),
            ("age", "soon"),
            ("x-cache", "Miss from cloudfront"),
            ("cf-cache-status", "DYNAMIC"),
            ("cache-status", "edge.example; fwd=uri-miss"),
            ("x-cached-by", "hit"),
        ] {
            assert!(!is_cached(name, value), "{name}: {value}");
        }
    }
}
