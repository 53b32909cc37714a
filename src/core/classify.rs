//! What an answer means, and what to ask next: pure functions of the catalogue's rows and the facts of a response.

use std::time::Duration;

use serde_json::Value;

use crate::{
    core::{
        catalogue::{BodyTest, Probe, Signal, SignalOutcome},
        endpoint::Call,
    },
    domain::{
        protocol::HeaderFamily,
        verdict::{Unreached, Verdict, Withheld},
    },
};

/// The facts of one response.
#[derive(Debug, Clone, Copy)]
pub struct Answer<'a> {
    /// The status.
    pub status: u16,
    /// The body, as far as it was read.
    pub body: &'a [u8],
    /// There was more of it than is read.
    pub truncated: bool,
    /// It is a page for people, not an API's answer: HTML by its own account, or a challenge.
    pub page: bool,
    /// When the provider wants to be asked again.
    pub retry_after: Option<Duration>,
}

/// What one answer says about the credential.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Classification {
    /// A "yes", worth as much as the endpoint's refusal of bad keys.
    Accepted,
    /// Alive, but not for this endpoint.
    Restricted,
    /// A 403 with this error code: dead if a made-up key gets the same, else forbidden.
    Forbidden(String),
    /// This verdict; never VALID.
    Verdict(Verdict),
}

/// What came of one call, as the ladder needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeResponse {
    /// An answer.
    Answer {
        /// Its status.
        status: u16,
        /// What it says.
        classification: Classification,
        /// When the provider wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// None within the budget.
    TimedOut,
    /// No connection, or none that lasted.
    Unreachable(Unreached),
}

/// What is known of an endpoint's way with made-up keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Calibration {
    /// It refuses them, so.
    Refuses {
        /// The status.
        status: u16,
        /// The error code in the body, if there is one.
        error_code: String,
    },
    /// It accepts them: its "yes" proves nothing.
    AcceptsAnything,
    /// Not known: not asked, or no answer that tells.
    Unknown,
}

/// The end of a ladder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The verdict.
    pub verdict: Verdict,
    /// The provider's status, if it answered.
    pub status: Option<u16>,
    /// The conclusive probe.
    pub probe: String,
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
            status: None,
            probe: String::new(),
            retry_after: None,
            about_model: false,
            cost_money: false,
            withheld: None,
            unreached: None,
        }
    }

    /// Nothing was asked, by our own doing.
    pub fn withheld(why: Withheld) -> Self {
        Self { withheld: Some(why), ..Self::bare(Verdict::NotAttempted) }
    }
}

/// What to do next.
#[derive(Debug)]
pub enum Next<'t> {
    /// Ask this, with the credential in this header.
    Ask(&'t Call, HeaderFamily),
    /// Done.
    Done(Finding),
}

/// The walk through a target's calls: pure, so that every path can be tested without a network.
#[derive(Debug)]
pub struct ProbePlan<'t> {
    calls: &'t [Call],
    at: usize,
    family: usize,
    /// The best that was heard without being conclusive: NOT_CALIBRATED beats UNEXPECTED_RESPONSE.
    fallback: Option<Finding>,
    /// Every header family tried so far was refused, first so.
    refused: Option<Finding>,
    /// A call so far named the model, or cost money: what is found then rests on it.
    named_model: bool,
    cost_money: bool,
}

// === reading an answer ===

/// What an answer says, and which of the probe's signals said it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Classified {
    /// What it says.
    pub classification: Classification,
    /// The position of the signal that matched; none where status and shape alone were read.
    pub signal: Option<usize>,
}

/// What this answer says. The row's signals decide first; what they leave is read by status and shape alone.
pub fn classify(answer: Answer<'_>, probe: &Probe) -> Classification {
    classified(answer, probe).classification
}

/// What this answer says, and by which signal.
pub fn classified(answer: Answer<'_>, probe: &Probe) -> Classified {
    let json = serde_json::from_slice::<Value>(answer.body).ok();
    // A login page, a captive portal or a challenge is not the vendor's API speaking, whatever its status and its words.
    let page = json.is_none() && (answer.page || answer.body.trim_ascii_start().first() == Some(&b'<'));
    let signal = if page { None } else { probe.signals.iter().position(|signal| matches(signal, answer, json.as_ref())) };
    let classification = match signal.and_then(|at| probe.signals.get(at)).map(|signal| signal.outcome) {
        Some(SignalOutcome::Accepted) => Classification::Accepted,
        Some(SignalOutcome::Restricted) => Classification::Restricted,
        Some(SignalOutcome::Verdict(verdict)) => Classification::Verdict(verdict),
        None => by_shape(answer, json.as_ref(), probe),
    };
    Classified { classification, signal }
}

/// What status and shape alone say.
fn by_shape(answer: Answer<'_>, json: Option<&Value>, probe: &Probe) -> Classification {
    match (answer.status, json.and_then(error_code)) {
        (200..=299, _) if has_expected_shape(answer, json, &probe.expect) => Classification::Accepted,
        (401, Some(_)) => Classification::Verdict(Verdict::Invalid),
        (402, Some(_)) => Classification::Verdict(Verdict::QuotaExhausted),
        (403, Some(code)) => Classification::Forbidden(code),
        (429, _) => Classification::Verdict(Verdict::RateLimited),
        (500..=599, _) => Classification::Verdict(Verdict::ProviderError),
        _ => Classification::Verdict(Verdict::UnexpectedResponse),
    }
}

/// Whether the headers say that this is a page for people: HTML, or a challenge of the network before the vendor.
pub fn is_page(headers: &http::HeaderMap) -> bool {
    let kind = headers.get(http::header::CONTENT_TYPE).map(|value| value.as_bytes().to_ascii_lowercase());
    let html = kind.is_some_and(|kind| kind.starts_with(b"text/html") || kind.starts_with(b"application/xhtml"));
    html || headers.contains_key("cf-mitigated")
}

/// What a made-up key's answer says about the endpoint.
pub fn calibrated(answer: Answer<'_>, probe: &Probe) -> Calibration {
    let refuses = || Calibration::Refuses {
        status: answer.status,
        error_code: serde_json::from_slice::<Value>(answer.body).ok().as_ref().and_then(error_code).unwrap_or_default(),
    };
    match classify(answer, probe) {
        // "Alive" said of a key that nobody issued proves as little as "accepted" does.
        Classification::Accepted | Classification::Restricted | Classification::Verdict(Verdict::QuotaExhausted) => {
            Calibration::AcceptsAnything
        }
        Classification::Verdict(Verdict::Invalid) | Classification::Forbidden(_) => refuses(),
        Classification::Verdict(_) => Calibration::Unknown,
    }
}

fn matches(signal: &Signal, answer: Answer<'_>, json: Option<&Value>) -> bool {
    if !signal.statuses.is_empty() && !signal.statuses.contains(&answer.status) {
        return false;
    }
    signal.tests.iter().all(|test| match test {
        BodyTest::Contains(texts) => texts.iter().any(|text| contains(answer.body, text)),
        BodyTest::Lacks(text) => !contains(answer.body, text),
        BodyTest::IsOneOf(paths, values) => found(json, paths).any(|value| values.iter().any(|wanted| same(value, wanted))),
        BodyTest::AtMost(paths, limit) => found(json, paths).filter_map(number).any(|number| number <= *limit),
    })
}

/// Compared without case.
fn contains(body: &[u8], text: &str) -> bool {
    // The first byte rules nearly every place out, at a tenth of what comparing all of them costs.
    let text = text.as_bytes();
    let begins = |window: &[u8]| window.iter().zip(text).next().is_some_and(|(one, other)| one.eq_ignore_ascii_case(other));
    body.windows(text.len()).any(|window| begins(window) && window.eq_ignore_ascii_case(text))
}

fn found<'v>(json: Option<&'v Value>, paths: &[String]) -> impl Iterator<Item = &'v Value> {
    json.into_iter().flat_map(move |json| paths.iter().filter_map(move |path| at(json, path)))
}

/// Equal, or a number and a string of the same digits: vendors write one code now so, now so.
fn same(value: &Value, wanted: &Value) -> bool {
    match (value, wanted) {
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

/// The value at a dotted path of object keys and list positions.
fn at<'v>(json: &'v Value, path: &str) -> Option<&'v Value> {
    path.split('.').try_fold(json, |value, key| match value {
        Value::Array(items) => items.get(key.parse::<usize>().ok()?),
        value => value.get(key),
    })
}

/// A body that was cut off cannot be parsed; then its beginning must be JSON's and hold an expected key by name.
fn has_expected_shape(answer: Answer<'_>, json: Option<&Value>, expect: &[String]) -> bool {
    if let Some(json) = json {
        return expect.iter().any(|path| at(json, path).is_some());
    }
    let begins_as_object = answer.body.trim_ascii_start().first() == Some(&b'{');
    answer.truncated
        && begins_as_object
        && expect.iter().any(|path| {
            let quoted = format!("\"{}\"", path.split('.').next().unwrap_or(path));
            answer.body.windows(quoted.len()).any(|window| window == quoted.as_bytes())
        })
}

/// The error's code, if the body is a machine-readable error: an object with one of the usual members.
fn error_code(json: &Value) -> Option<String> {
    // One vendor's compatible surface wraps its errors in a list.
    let object = match json {
        Value::Array(items) => items.first()?.as_object()?,
        json => json.as_object()?,
    };
    let text = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    };
    let inner = object.get("error").filter(|error| !error.is_null());
    let code = inner
        .and_then(Value::as_object)
        .into_iter()
        .chain([object])
        .find_map(|fields| ["code", "type", "status", "reason"].iter().find_map(|key| fields.get(*key).and_then(text)));
    let says_error =
        inner.is_some() || ["errors", "code", "message", "detail", "msg"].iter().any(|key| object.contains_key(*key));
    says_error.then(|| code.unwrap_or_default().chars().take(64).collect())
}

// === impl ProbePlan ===

impl<'t> ProbePlan<'t> {
    /// At the foot.
    pub fn new(calls: &'t [Call]) -> Self {
        Self { calls, at: 0, family: 0, fallback: None, refused: None, named_model: false, cost_money: false }
    }

    /// The next call, or the end.
    pub fn proceed(&mut self) -> Next<'t> {
        let Some(call) = self.calls.get(self.at) else {
            let finding = self.fallback.take().unwrap_or_else(|| Finding::bare(Verdict::UnexpectedResponse));
            return Next::Done(Finding { about_model: self.named_model, cost_money: self.cost_money, ..finding });
        };
        match call.probe.auth.get(self.family) {
            Some(family) => Next::Ask(call, *family),
            // Every family was refused: only now may the credential be called dead.
            None => match self.refused.take() {
                Some(finding) => Next::Done(finding),
                None => {
                    self.step();
                    self.proceed()
                }
            },
        }
    }

    /// Takes in what was heard to the last `Ask`. `calibration` is what is known of that endpoint now. Some is the end.
    pub fn record(&mut self, response: ProbeResponse, calibration: &Calibration) -> Option<Finding> {
        let call = self.calls.get(self.at)?;
        self.named_model |= call.names_model;
        self.cost_money |= call.probe.costs_money;
        let (about_model, cost_money) = (self.named_model, self.cost_money);
        let finding = |verdict, status, retry_after| Finding {
            status,
            probe: call.probe.name.clone(),
            retry_after,
            about_model,
            cost_money,
            ..Finding::bare(verdict)
        };
        let (status, classification, retry_after) = match response {
            ProbeResponse::TimedOut => return Some(self.without_answer(finding(Verdict::Timeout, None, None))),
            ProbeResponse::Unreachable(why) => {
                let finding = Finding { unreached: Some(why), ..finding(Verdict::Unreachable, None, None) };
                return Some(self.without_answer(finding));
            }
            ProbeResponse::Answer { status, classification, retry_after } => (Some(status), classification, retry_after),
        };
        match classification {
            Classification::Accepted if believed(call, calibration) => Some(finding(Verdict::Valid, status, None)),
            Classification::Accepted => {
                self.fall_back_on(finding(Verdict::NotCalibrated, status, None));
                self.step();
                None
            }
            Classification::Restricted | Classification::Verdict(Verdict::UnexpectedResponse) => {
                self.fall_back_on(finding(Verdict::UnexpectedResponse, status, None));
                self.step();
                None
            }
            Classification::Forbidden(code) => {
                let as_a_made_up_one =
                    matches!(calibration, Calibration::Refuses { status: 403, error_code } if *error_code == code);
                let verdict = if as_a_made_up_one { Verdict::Invalid } else { Verdict::Forbidden };
                self.refuse(finding(verdict, status, None));
                None
            }
            Classification::Verdict(verdict @ (Verdict::Invalid | Verdict::Forbidden)) => {
                self.refuse(finding(verdict, status, None));
                None
            }
            Classification::Verdict(verdict) => Some(finding(verdict, status, retry_after)),
        }
    }

    /// No answer from a later rung takes nothing away from an earlier "yes" that could not be shown to prove anything.
    fn without_answer(&mut self, finding: Finding) -> Finding {
        match self.fallback.take() {
            Some(earlier) if earlier.verdict == Verdict::NotCalibrated => Finding { cost_money: finding.cost_money, ..earlier },
            Some(_) | None => finding,
        }
    }

    /// Refused in one header family: the next one is tried.
    fn refuse(&mut self, finding: Finding) {
        self.family += 1;
        // The milder reading stands: a 403 in one header and a 401 in another do not add up to "dead".
        match &self.refused {
            Some(earlier) if earlier.verdict == Verdict::Forbidden => {}
            _ => self.refused = Some(finding),
        }
    }

    fn fall_back_on(&mut self, finding: Finding) {
        let better = match &self.fallback {
            None => true,
            Some(earlier) => earlier.verdict != Verdict::NotCalibrated || finding.verdict == Verdict::NotCalibrated,
        };
        if better {
            self.fallback = Some(finding);
        }
    }

    fn step(&mut self) {
        self.at += 1;
        self.family = 0;
        self.refused = None;
    }
}

/// A "yes" of this endpoint counts: it was seen to refuse a made-up key, or is documented to and was not seen to accept one.
fn believed(call: &Call, calibration: &Calibration) -> bool {
    match calibration {
        Calibration::Refuses { .. } => true,
        Calibration::AcceptsAnything => false,
        Calibration::Unknown => call.probe.refuses_bad_keys,
    }
}
