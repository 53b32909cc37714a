//! What an answer means, and what to ask next: pure functions of the catalogue's rows and the facts of a response.

use std::time::Duration;

use serde_json::Value;

use crate::{
    catalogue::{BodyTest, HeaderFamily, Probe, Signal, SignalOutcome},
    decision::Verdict,
    endpoint::Call,
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
    /// When the provider wants to be asked again.
    pub retry_after: Option<Duration>,
}

/// What one answer says about the credential.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reading {
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
pub enum Heard {
    /// An answer.
    Answer {
        /// Its status.
        status: u16,
        /// What it says.
        reading: Reading,
        /// When the provider wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// None within the budget.
    TimedOut,
    /// No connection.
    Unreachable,
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
pub struct Ladder<'t> {
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

/// What this answer says. The row's signals decide first; what they leave is read by status and shape alone.
pub fn classify(answer: Answer<'_>, probe: &Probe) -> Reading {
    let json = serde_json::from_slice::<Value>(answer.body).ok();
    if let Some(signal) = probe.signals.iter().find(|signal| matches(signal, answer, json.as_ref())) {
        return match signal.outcome {
            SignalOutcome::Accepted => Reading::Accepted,
            SignalOutcome::Restricted => Reading::Restricted,
            SignalOutcome::Verdict(verdict) => Reading::Verdict(verdict),
        };
    }
    let error_code = json.as_ref().and_then(error_code);
    match (answer.status, error_code) {
        (200..=299, _) if has_expected_shape(answer, json.as_ref(), &probe.expect) => Reading::Accepted,
        (401, Some(_)) => Reading::Verdict(Verdict::Invalid),
        (402, Some(_)) => Reading::Verdict(Verdict::QuotaExhausted),
        (403, Some(code)) => Reading::Forbidden(code),
        (429, _) => Reading::Verdict(Verdict::RateLimited),
        (500..=599, _) => Reading::Verdict(Verdict::ProviderError),
        _ => Reading::Verdict(Verdict::UnexpectedResponse),
    }
}

/// What a made-up key's answer says about the endpoint.
pub fn calibrated(answer: Answer<'_>, probe: &Probe) -> Calibration {
    let refuses = || Calibration::Refuses {
        status: answer.status,
        error_code: serde_json::from_slice::<Value>(answer.body).ok().as_ref().and_then(error_code).unwrap_or_default(),
    };
    match classify(answer, probe) {
        // "Alive" said of a key that nobody issued proves as little as "accepted" does.
        Reading::Accepted | Reading::Restricted | Reading::Verdict(Verdict::QuotaExhausted) => Calibration::AcceptsAnything,
        Reading::Verdict(Verdict::Invalid) | Reading::Forbidden(_) => refuses(),
        Reading::Verdict(_) => Calibration::Unknown,
    }
}

fn matches(signal: &Signal, answer: Answer<'_>, json: Option<&Value>) -> bool {
    if !signal.statuses.is_empty() && !signal.statuses.contains(&answer.status) {
        return false;
    }
    match &signal.test {
        BodyTest::Any => true,
        BodyTest::Contains(text) => {
            let length = text.len();
            answer.body.windows(length).any(|window| window.eq_ignore_ascii_case(text.as_bytes()))
        }
        BodyTest::Equals(path, value) => json.and_then(|json| at(json, path)) == Some(value),
        BodyTest::AtMost(path, limit) => json.and_then(|json| at(json, path)?.as_f64()).is_some_and(|number| number <= *limit),
    }
}

/// The value at a dotted path of object keys.
fn at<'v>(json: &'v Value, path: &str) -> Option<&'v Value> {
    path.split('.').try_fold(json, |value, key| value.get(key))
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
    let object = json.as_object()?;
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

// === impl Ladder ===

impl<'t> Ladder<'t> {
    /// At the foot.
    pub fn new(calls: &'t [Call]) -> Self {
        Self { calls, at: 0, family: 0, fallback: None, refused: None, named_model: false, cost_money: false }
    }

    /// The next call, or the end.
    pub fn proceed(&mut self) -> Next<'t> {
        let Some(call) = self.calls.get(self.at) else {
            let nothing = || Finding {
                verdict: Verdict::UnexpectedResponse,
                status: None,
                probe: String::new(),
                retry_after: None,
                about_model: false,
                cost_money: false,
            };
            let finding = self.fallback.take().unwrap_or_else(nothing);
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
    pub fn hear(&mut self, heard: Heard, calibration: &Calibration) -> Option<Finding> {
        let call = self.calls.get(self.at)?;
        self.named_model |= call.names_model;
        self.cost_money |= call.probe.costs_money;
        let (about_model, cost_money) = (self.named_model, self.cost_money);
        let finding = |verdict, status, retry_after| Finding {
            verdict,
            status,
            probe: call.probe.name.clone(),
            retry_after,
            about_model,
            cost_money,
        };
        let (status, reading, retry_after) = match heard {
            Heard::TimedOut => return Some(self.without_answer(finding(Verdict::Timeout, None, None))),
            Heard::Unreachable => return Some(self.without_answer(finding(Verdict::Unreachable, None, None))),
            Heard::Answer { status, reading, retry_after } => (Some(status), reading, retry_after),
        };
        match reading {
            Reading::Accepted if believed(call, calibration) => Some(finding(Verdict::Valid, status, None)),
            Reading::Accepted => {
                self.fall_back_on(finding(Verdict::NotCalibrated, status, None));
                self.step();
                None
            }
            Reading::Restricted | Reading::Verdict(Verdict::UnexpectedResponse) => {
                self.fall_back_on(finding(Verdict::UnexpectedResponse, status, None));
                self.step();
                None
            }
            Reading::Forbidden(code) => {
                let as_a_made_up_one =
                    matches!(calibration, Calibration::Refuses { status: 403, error_code } if *error_code == code);
                let verdict = if as_a_made_up_one { Verdict::Invalid } else { Verdict::Forbidden };
                self.refuse(finding(verdict, status, None));
                None
            }
            Reading::Verdict(verdict @ (Verdict::Invalid | Verdict::Forbidden)) => {
                self.refuse(finding(verdict, status, None));
                None
            }
            Reading::Verdict(verdict) => Some(finding(verdict, status, retry_after)),
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
