//! The facts of one response, and how its body is looked into.

use std::time::Duration;

use serde_json::Value;

/// The facts of one response.
#[derive(Debug, Clone, Copy)]
pub struct Answer<'a> {
    /// The status.
    pub status: u16,
    /// The body, as far as it was read.
    pub body: &'a [u8],
    /// There was more of it than is read.
    pub truncated: bool,
    /// It is a page for people by its own account, or a challenge of the network before the vendor.
    pub page: bool,
    /// When the provider wants to be asked again.
    pub retry_after: Option<Duration>,
}

/// What kind of body an answer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// JSON.
    Json,
    /// A page for people: HTML, or a challenge.
    Page,
    /// Anything else that is there.
    Text,
    /// Nothing.
    Empty,
}

impl Answer<'_> {
    /// The kind of its body, and its error code.
    pub(super) fn body_and_code(self) -> (Body, String) {
        let json = serde_json::from_slice::<Value>(self.body).ok();
        (body_of(self, json.as_ref()), json.as_ref().and_then(error_code).unwrap_or_default())
    }
}

/// A login page, a captive portal or a challenge is not the vendor's API speaking, whatever its status and its words.
pub(super) fn body_of(answer: Answer<'_>, json: Option<&Value>) -> Body {
    let body = answer.body.trim_ascii_start();
    let xml = body.starts_with(b"<?xml") && !contains(body, "<html");
    match (json, body.first()) {
        (Some(_), _) => Body::Json,
        (None, first) if answer.page || (first == Some(&b'<') && !xml) => Body::Page,
        (None, None) => Body::Empty,
        // It was cut off: its beginning must do.
        (None, Some(b'{' | b'[')) if answer.truncated => Body::Json,
        (None, Some(_)) => Body::Text,
    }
}

/// Compared without case.
pub(super) fn contains(body: &[u8], text: &str) -> bool {
    // The first byte rules nearly every place out, at a tenth of what comparing all of them costs.
    let text = text.as_bytes();
    let begins = |window: &[u8]| window.iter().zip(text).next().is_some_and(|(one, other)| one.eq_ignore_ascii_case(other));
    body.windows(text.len()).any(|window| begins(window) && window.eq_ignore_ascii_case(text))
}

/// Whether a value at a dotted path of object keys and list positions is so; `*` is every entry of a list.
pub(super) fn any_at(json: &Value, path: &str, is: &dyn Fn(&Value) -> bool) -> bool {
    let mut value = json;
    let mut rest = path;
    loop {
        let (key, more) = rest.split_once('.').map_or((rest, None), |(key, more)| (key, Some(more)));
        if let (Value::Array(items), "*") = (value, key) {
            return items.iter().any(|item| more.map_or_else(|| is(item), |more| any_at(item, more, is)));
        }
        let found = match value {
            Value::Array(items) => key.parse::<usize>().ok().and_then(|position| items.get(position)),
            value => value.get(key),
        };
        match (found, more) {
            (None, _) => return false,
            (Some(found), None) => return is(found),
            (Some(found), Some(more)) => (value, rest) = (found, more),
        }
    }
}

/// The error's code, if the body is a machine-readable error: an object with one of the usual members.
pub(super) fn error_code(json: &Value) -> Option<String> {
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
        inner.is_some() || ["errors", "code", "message", "detail", "msg", "title"].iter().any(|key| object.contains_key(*key));
    says_error.then(|| code.unwrap_or_default().chars().take(64).collect())
}
