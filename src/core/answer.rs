//! One HTTP response as plain data, and helpers that read its body.

use std::time::Duration;

use serde_json::{Map, Value};

/// One HTTP response.
#[derive(Debug, Clone, Copy)]
pub struct Answer<'a> {
    /// The HTTP status.
    pub status: u16,
    /// The body, as far as it was read.
    pub body: &'a [u8],
    /// The body was longer than the part that was read.
    pub truncated: bool,
    /// The headers mark a page for people, or a challenge by the network in front of the vendor.
    pub page: bool,
    /// The wait that the provider asks for.
    pub retry_after: Option<Duration>,
}

/// The kind of a response's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    /// JSON.
    Json,
    /// A page for people: HTML, or a challenge.
    Page,
    /// Any other text.
    Text,
    /// No body.
    Empty,
}

impl Answer<'_> {
    /// The body, if it is JSON. A byte order mark before it is no part of it, but some servers send one.
    pub(super) fn json(self) -> Option<Value> {
        serde_json::from_slice(self.body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(self.body)).ok()
    }

    /// The kind of body, and the error code; empty if there is none.
    pub(super) fn body_and_code(self) -> (Body, String) {
        let json = self.json();
        (body_of(self, json.as_ref()), json.as_ref().and_then(error_code).unwrap_or_default())
    }
}

/// The kind of body. A login page, a captive portal or a challenge is a page, whatever its status and words: the vendor's API did not answer.
pub(super) fn body_of(answer: Answer<'_>, json: Option<&Value>) -> Body {
    let body = answer.body.trim_ascii_start();
    let xml = body.starts_with(b"<?xml") && !contains(body, "<html");
    match (json, body.first()) {
        (Some(_), _) => Body::Json,
        (None, first) if answer.page || (first == Some(&b'<') && !xml) => Body::Page,
        (None, None) => Body::Empty,
        // The body was cut off and cannot be parsed, so its beginning decides.
        (None, Some(b'{' | b'[')) if answer.truncated => Body::Json,
        (None, Some(_)) => Body::Text,
    }
}

/// Whether the body holds this text, compared without case.
pub(super) fn contains(body: &[u8], text: &str) -> bool {
    // Comparing the first byte rules out nearly every place, at a tenth of the cost of comparing the whole text.
    let text = text.as_bytes();
    let begins = |window: &[u8]| window.iter().zip(text).next().is_some_and(|(one, other)| one.eq_ignore_ascii_case(other));
    body.windows(text.len()).any(|window| begins(window) && window.eq_ignore_ascii_case(text))
}

/// Whether a value at a path satisfies `is`. A path has object keys and list positions, separated by dots; `*` stands for every entry of a list.
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

/// The error code of a machine-readable error: an object with one of the usual members, in any case. Empty if the error has no code, `None` if it is no
/// error.
pub(super) fn error_code(json: &Value) -> Option<String> {
    // One vendor's OpenAI-compatible API wraps its errors in a list.
    let object = match json {
        Value::Array(items) => items.first()?.as_object()?,
        json => json.as_object()?,
    };
    let text = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
    };
    let inner = member(object, "error").filter(|error| !error.is_null());
    let code = inner
        .and_then(Value::as_object)
        .into_iter()
        .chain([object])
        .find_map(|fields| ["code", "type", "status", "reason"].iter().find_map(|key| member(fields, key).and_then(text)));
    let says_error = inner.is_some()
        || ["errors", "code", "message", "detail", "msg", "title"].iter().any(|key| member(object, key).is_some());
    says_error.then(|| code.unwrap_or_default().chars().take(64).collect())
}

/// The member of this name. AWS and .NET write `Message`, so if none has the same case, another case will do.
fn member<'j>(object: &'j Map<String, Value>, name: &str) -> Option<&'j Value> {
    let in_another_case = || object.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value);
    object.get(name).or_else(in_another_case)
}

/// Whether a 401 with this body is a machine-readable error. The status says already that it is about the credential, so any object will do that holds
/// more than nulls and lists: gateways name their members as they like.
pub(super) fn explains_a_401(json: &Value) -> bool {
    let holds_something = |value: &Value| !matches!(value, Value::Null | Value::Array(_));
    error_code(json).is_some() || json.as_object().is_some_and(|object| object.values().any(holds_something))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(body: &str, truncated: bool, page: bool) -> Body {
        Answer { status: 401, body: body.as_bytes(), truncated, page, retry_after: None }.body_and_code().0
    }

    #[test]
    fn the_kind_of_a_body_is_told_by_its_beginning() {
        for (body, expected) in [
            ("", Body::Empty),
            (" \r\n", Body::Empty),
            (" {\"detail\":\"no\"}", Body::Json),
            ("\u{feff}{}", Body::Json),
            ("null", Body::Json),
            ("{\"detail\":", Body::Text),
            ("unauthorized", Body::Text),
            ("a <html> of words", Body::Text),
            ("<html>no</html>", Body::Page),
            ("\n<!doctype html><p>no", Body::Page),
            ("<p>no</p>", Body::Page),
            ("<?xml version=\"1.0\"?><Error><Code>no</Code></Error>", Body::Text),
            ("<?xml version=\"1.0\"?>\n<HTML xmlns=\"x\">no</HTML>", Body::Page),
        ] {
            assert_eq!(kind(body, false, false), expected, "{body}");
        }
        // As far as it was read.
        assert_eq!(kind("{\"detail\":", true, false), Body::Json);
        assert_eq!(kind("[{\"detail\":", true, false), Body::Json);
        assert_eq!(kind("unauth", true, false), Body::Text);
        // The headers say that it is a page. JSON is for a program whatever they say.
        assert_eq!(kind("", false, true), Body::Page);
        assert_eq!(kind("unauthorized", false, true), Body::Page);
        assert_eq!(kind("{}", false, true), Body::Json);
    }
}
