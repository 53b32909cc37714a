//! What an answer means: pure functions of the catalogue's rows and the facts of a response.

use std::time::Duration;

use serde_json::Value;

pub use crate::core::answer::{Answer, Body};
use crate::{
    core::{
        answer::{any_at, body_of, contains, error_code},
        catalogue::{BodyTest, Expected, Kind, Probe, Signal, SignalOutcome},
        response_shape::ResponseShape,
    },
    domain::{
        protocol::HeaderFamily,
        verdict::{Cause, MadeUpKey, Unreached, Verdict, Withheld},
    },
};

/// What one answer says about the credential.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Classification {
    /// A "yes", worth as much as the endpoint's refusal of bad keys.
    Accepted,
    /// Alive, but not for this endpoint.
    Restricted,
    /// A 403 with this error code: dead if a made-up key gets the same, restricted if that gets a 401, else forbidden.
    Forbidden(String),
    /// Nothing, by itself: a refusal if a made-up key gets the same, else an answer that does not tell.
    Unread,
    /// This verdict; never VALID.
    Verdict(Verdict),
}

/// What said so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadBy {
    /// The signal at this position of the probe's.
    Signal(usize),
    /// The list of codes that many servers share.
    CommonCode,
    /// Status and shape alone.
    Shape,
}

/// What an answer says, and what said so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// What it says.
    pub classification: Classification,
    /// What said so.
    pub by: ReadBy,
    /// Why it is read so.
    pub cause: Cause,
    /// A row's word that no other endpoint will tell more.
    pub stop: bool,
}

/// What came of one call, as the plan needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeResponse {
    /// An answer.
    Answer {
        /// What it says.
        reading: Reading,
        /// What it looks like.
        shape: ResponseShape,
        /// When the provider wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// None within the budget.
    TimedOut,
    /// No connection, or none that lasted.
    Unreachable(Unreached),
    /// This machine had no descriptor or memory left for a connection: that says nothing of the provider.
    Exhausted,
}

/// What is known of an endpoint's way with made-up keys in one header.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Calibration {
    /// It refuses them, so.
    Refuses {
        /// What the refusal looks like.
        shape: ResponseShape,
        /// It is one by its own words: INVALID by a signal, a code, or a 401.
        in_words: bool,
        /// A signal or a common code says that it is about the key: no limit on calls is said so.
        by_code: bool,
        /// A real key was accepted there right before it, and right after it again: whatever it looks like, it is no answer for everybody.
        in_contrast: bool,
    },
    /// It accepts them: its "yes" proves nothing.
    AcceptsAnyone,
    /// It was asked, and the answer tells nothing: the status, if there was one.
    Inconclusive(Option<u16>),
    /// It got this, and so does a key that is accepted there: a limit, a ban, an outage. The answer says nothing of any key.
    SameForEveryKey(ResponseShape),
    /// It is on its way, and nobody waits for it.
    NotWaitedFor,
    /// It was not asked.
    #[default]
    NotAsked,
}

/// The end of a probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The verdict.
    pub verdict: Verdict,
    /// Why; none where VALID, or where nothing was heard.
    pub cause: Option<Cause>,
    /// The provider's status, if it answered.
    pub status: Option<u16>,
    /// The conclusive probe.
    pub probe: String,
    /// In which header the credential was, where the provider was asked. Of a VALID: the one that was accepted.
    pub family: Option<HeaderFamily>,
    /// Of a VALID: the workspace's client sends the credential in another header.
    pub wrong_header: bool,
    /// What a made-up key got there.
    pub made_up: MadeUpKey,
    /// When the provider wants to be asked again.
    pub retry_after: Option<Duration>,
    /// It is about the workspace's model alone, not about the credential with any model.
    pub about_model: bool,
    /// The conclusive probe costs the tenant money.
    pub cost_money: bool,
    /// Why nothing was asked, where nothing was.
    pub withheld: Option<Withheld>,
    /// What failed on the way, where something did.
    pub unreached: Option<Unreached>,
}

impl Finding {
    /// Nothing was heard: the verdict is all there is.
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
            unreached: None,
        }
    }

    /// Why, for a person: the cause, the header, and what a made-up key got. Nothing of the provider's own text.
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

    /// Nothing was asked, by our own doing.
    pub fn withheld(why: Withheld) -> Self {
        Self { withheld: Some(why), ..Self::bare(Verdict::NotAttempted) }
    }
}

// === reading an answer ===

/// What this answer says.
pub fn classify(answer: Answer<'_>, probe: &Probe) -> Classification {
    read(answer, probe).classification
}

/// What this answer says, and what said so. The row's signals decide first, then the codes that many servers share; what they leave is
/// read by status and shape alone.
pub fn read(answer: Answer<'_>, probe: &Probe) -> Reading {
    let json = serde_json::from_slice::<Value>(answer.body).ok();
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
        if matches!(answer.status, 200..=299) { says_yes(answer, json.as_ref(), &probe.expect) } else { Err(Cause::Status) };
    if success.is_ok() {
        return Reading { classification: Classification::Accepted, by: ReadBy::Shape, cause: Cause::Status, stop: false };
    }
    // A failing server says nothing of a key, whatever it repeats; and a limit is a limit, unless its code says more.
    if answer.status < 500
        && let Some(found) = json.as_ref().and_then(|json| probe.common.outcome(answer.status, json))
    {
        // Where the network is what is not wanted, no other endpoint tells more.
        let stop = found == SignalOutcome::Verdict(Verdict::UnexpectedResponse);
        return Reading { classification: outcome(found), by: ReadBy::CommonCode, cause: Cause::CommonCode, stop };
    }
    let code = json.as_ref().and_then(error_code);
    let (classification, cause) = match (answer.status, code) {
        (401, Some(_)) => (Classification::Verdict(Verdict::Invalid), Cause::Status),
        (402, Some(_)) => (Classification::Verdict(Verdict::QuotaExhausted), Cause::Status),
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

/// Whether the headers say that this is a page for people: HTML, or a challenge of the network before the vendor.
pub fn is_page(headers: &http::HeaderMap) -> bool {
    let kind = headers.get(http::header::CONTENT_TYPE).map(|value| value.as_bytes().to_ascii_lowercase());
    let html = kind.is_some_and(|kind| kind.starts_with(b"text/html") || kind.starts_with(b"application/xhtml"));
    html || headers.contains_key("cf-mitigated")
}

/// Whether the headers say that a cache on the way had the answer, so that nobody looked at the key for it.
pub fn is_from_a_cache(headers: &http::HeaderMap) -> bool {
    let values =
        |name: &str| headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok()).map(str::to_ascii_lowercase);
    // RFC 9111, section 5.1: an answer with an age was not asked of the origin for this request.
    let aged = values("age").any(|age| age.trim().parse::<u64>().is_ok_and(|age| age > 0));
    // As CloudFront, Fastly, Varnish, nginx, Cloudflare and RFC 9211 say it.
    let names = ["x-cache", "x-cache-status", "x-proxy-cache", "cf-cache-status", "cache-status"];
    aged || names.iter().any(|name| {
        values(name).any(|value| value.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| matches!(word, "hit" | "stale")))
    })
}

/// What an answer says that a cache had, whatever it holds.
pub const fn from_a_cache() -> Reading {
    Reading {
        classification: Classification::Verdict(Verdict::UnexpectedResponse),
        by: ReadBy::Shape,
        cause: Cause::FromACache,
        stop: false,
    }
}

/// What a made-up key's answer says about the endpoint.
pub fn calibration_of(reading: &Reading, shape: &ResponseShape) -> Calibration {
    match (&reading.classification, shape.status) {
        (Classification::Accepted, _) => Calibration::AcceptsAnyone,
        (Classification::Verdict(Verdict::RateLimited | Verdict::ProviderError), status) => {
            Calibration::Inconclusive(Some(status))
        }
        // Nothing of a key: too slow, too early, too many, a server that fails.
        (_, status @ (408 | 409 | 423 | 425 | 429 | 500..=599)) => Calibration::Inconclusive(Some(status)),
        (classification, status) => Calibration::Refuses {
            shape: shape.clone(),
            in_words: *classification == Classification::Verdict(Verdict::Invalid) || status == 401,
            by_code: *classification == Classification::Verdict(Verdict::Invalid) && reading.by != ReadBy::Shape,
            in_contrast: false,
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

/// Equal, texts without case; or a number and a string of the same digits: vendors write one code now so, now so.
fn same(value: &Value, wanted: &Value) -> bool {
    match (value, wanted) {
        (Value::String(text), Value::String(wanted)) => text.eq_ignore_ascii_case(wanted),
        (Value::String(text), Value::Number(number)) | (Value::Number(number), Value::String(text)) => {
            *text == number.to_string()
        }
        (value, wanted) => value == wanted,
    }
}

/// A number, or a string that is one: balances come as both.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.as_str()?.parse().ok())
}

/// Whether this 2xx is a "yes": something that was expected is there, is not null and is of its kind, and no error stands beside it.
fn says_yes(answer: Answer<'_>, json: Option<&Value>, expect: &[Expected]) -> Result<(), Cause> {
    let Some(json) = json else { return if begins_well(answer, expect) { Ok(()) } else { Err(Cause::WrongShape) } };
    if has_error_beside(json) {
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

fn has_error_beside(json: &Value) -> bool {
    let says_no = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Bool(true) | Value::Number(_) | Value::Object(_) => true,
    };
    let not_zero = |value: &Value| match value {
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => {
            !text.is_empty() && text.parse::<f64>().map_or(!text.eq_ignore_ascii_case("success"), |code| code != 0.0)
        }
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => false,
    };
    json.get("error").is_some_and(says_no)
        || json.get("errors").is_some_and(says_no)
        || json.get("success") == Some(&Value::Bool(false))
        || json.get("code").is_some_and(not_zero)
        || json.get("base_resp").and_then(|base| base.get("status_code")).is_some_and(not_zero)
}

/// A body that was cut off cannot be parsed: it must begin as an object that holds an expected key, of its kind as far as that shows, and
/// no error before it.
fn begins_well(answer: Answer<'_>, expect: &[Expected]) -> bool {
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
