//! Checks the shape of a value before it is sent: whether it fits into a header, whose key it is, and of which kind.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use crate::{
    core::{
        catalogue::{Catalogue, KeyKind, KeyShape},
        endpoint::{Endpoint, NoSurface},
    },
    domain::{
        denial::{Malformation, Place, Refusal},
        request::is_plain,
        secret::Secret,
    },
};

/// The longest value that is sent. The longest real keys are JWTs of 1 to 3 KiB. Common front ends close the whole HTTP/2 connection over headers of
/// 8 KiB, and so would end the requests of other callers.
pub const MAX_KEY_BYTES: usize = 6 * 1024;
/// The shortest OAuth token that is taken for a whole one. Real ones have 100 bytes and more.
const MIN_OAUTH_TOKEN_BYTES: usize = 40;
/// Members that mark JSON as an OAuth credential, in the way agent programs save it.
const OAUTH_MEMBERS: [&str; 6] = ["access_token", "refresh_token", "id_token", "accessToken", "refreshToken", "token_uri"];
/// How deep these members may be nested. Programs wrap them once or twice.
const OAUTH_MEMBER_DEPTH: usize = 4;

/// Why a value is not sent.
#[derive(Debug)]
pub enum Unsendable {
    /// It cannot be a key.
    Malformed(Malformation),
    /// It is another kind of secret, or the key of another vendor.
    Refused(Box<Refusal>),
    /// It is of a kind that is never sent.
    NoSurface(NoSurface),
}

/// Why a value is not a credential.
#[derive(Debug)]
pub enum Mistake<'c> {
    /// It cannot be a credential.
    Malformed(Malformation),
    /// It is this other kind of secret, named with its article.
    Foreign(&'c str),
}

/// Why this value is not sent to this endpoint, by its characters, its length or its vendor. `takes_oauth`: the runtime may use an OAuth token
/// instead of a key.
pub fn why_unsendable(
    catalogue: &Catalogue,
    endpoint: &Endpoint,
    env_name: &str,
    secret: &Secret,
    takes_oauth: bool,
) -> Option<Unsendable> {
    let value = secret.expose();
    let shapes = catalogue.shapes_of(value.trim_ascii_start());
    let vendor = endpoint.vendor.as_deref();
    let place = || Some(Place::of(env_name));
    let (env, provider) = (|| env_name.to_owned(), || endpoint.provider.clone());
    let refused = |refusal| Some(Unsendable::Refused(Box::new(refusal)));
    let foreign = |what: &str| {
        refused(Refusal::ForeignSecret { env_name: env(), provider: provider(), what: what.to_owned(), save_as: place() })
    };
    // JSON may have line breaks and be longer than a key.
    if value.trim_ascii_start().starts_with('{') {
        if let Some(what) = catalogue.foreign_secrets.what(value.trim_ascii(), vendor) {
            return foreign(what);
        }
        let is_oauth = shapes.iter().any(|shape| shape.kind == KeyKind::OAuth && vendor == Some(&shape.vendor));
        return Some(if is_oauth && holds_oauth_members(value) {
            Unsendable::NoSurface(NoSurface::OAuthShaped)
        } else {
            Unsendable::Malformed(if value.contains("{{") { Malformation::Template } else { Malformation::Json })
        });
    }
    match mistake(catalogue, vendor, env_name, value) {
        None => {}
        Some(Mistake::Malformed(fault)) => return Some(Unsendable::Malformed(fault)),
        Some(Mistake::Foreign(what)) => return foreign(what),
    }
    let shape @ KeyShape { vendor: owner, kind, .. } = shapes.first()?;
    let host_takes_it =
        vendor.is_none_or(|host| shapes.iter().any(|shape| shape.vendor == host)) || endpoint.accepts_keys_of.takes(owner);
    match kind {
        KeyKind::RefreshToken => Some(Unsendable::Malformed(Malformation::RefreshTokenForKey)),
        KeyKind::Administrative => {
            refused(Refusal::AdministrativeKey { env_name: env(), provider: provider(), vendor: owner.clone(), save_as: place() })
        }
        KeyKind::OAuth if host_takes_it => Some(if value.len() < MIN_OAUTH_TOKEN_BYTES.max(shape.prefix.len()) {
            Unsendable::Malformed(Malformation::CutOff)
        } else if takes_oauth || vendor != Some(owner) {
            Unsendable::NoSurface(NoSurface::OAuthShaped)
        } else {
            Unsendable::Malformed(Malformation::TokenForKey)
        }),
        KeyKind::ApiKey | KeyKind::OAuth => {
            // A prefix that several vendors use does not tell whose key it is.
            let is_telling = !host_takes_it && shapes.iter().all(|shape| shape.vendor == *owner);
            let (host, vendor, is_oauth) = (endpoint.host.clone(), owner.clone(), *kind == KeyKind::OAuth);
            let foreign =
                || Refusal::ForeignKey { env_name: env(), provider: provider(), host, vendor, is_oauth, save_as: place() };
            if is_telling { refused(foreign()) } else { None }
        }
    }
}

/// Why this value is not a credential, if it is none. `vendor` is the vendor of the host.
pub fn mistake<'c>(catalogue: &'c Catalogue, vendor: Option<&str>, env_name: &str, value: &str) -> Option<Mistake<'c>> {
    let is_key = |rest: &str| !catalogue.shapes_of(rest).is_empty();
    let fault = fault(value, env_name, &is_key);
    // A foreign secret may also be malformed, as a private key has line breaks. Its kind says more.
    let value = if fault.is_some() { value.trim_ascii() } else { value };
    let foreign = catalogue.foreign_secrets.what(value, vendor).map(Mistake::Foreign);
    foreign.or_else(|| fault.map(Mistake::Malformed))
}

fn fault(value: &str, env_name: &str, is_key: &dyn Fn(&str) -> bool) -> Option<Malformation> {
    if value.len() > MAX_KEY_BYTES {
        return Some(Malformation::TooLong { length: value.len(), limit: MAX_KEY_BYTES });
    }
    // Most keys need no further check.
    if has_only_key_characters(value) {
        return simple_placeholder(value);
    }
    unprintable(value).or_else(|| paste_mistake(value, env_name, is_key))
}

/// Whether the value has only the characters of nearly every key. A fold without early exit checks several bytes at a time.
fn has_only_key_characters(value: &str) -> bool {
    let is_usual = |byte| matches!(byte, b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.');
    value.bytes().fold(true, |simple, byte| simple & is_usual(byte))
}

fn unprintable(value: &str) -> Option<Malformation> {
    if is_plain(value) {
        return None;
    }
    // Consoles show a key like this after its creation.
    if value.contains(['…', '•']) {
        return Some(Malformation::Masked);
    }
    let (at, byte) = value.bytes().enumerate().find(|(_, byte)| byte.is_ascii_control() || !byte.is_ascii())?;
    if !byte.is_ascii() {
        return Some(Malformation::NonAscii { at });
    }
    let (one, other) = value.trim_ascii().split_once(['\n', '\r', '\t']).unwrap_or_default();
    if are_two_keys(one, other) {
        return Some(Malformation::TwoValues);
    }
    let trailing = value.bytes().skip(at).all(|byte| byte.is_ascii_control() || byte == b' ');
    Some(Malformation::ControlCharacter { at, trailing })
}

/// What people save by mistake instead of a key, for values with unusual characters. No vendor's keys look like this.
fn paste_mistake(value: &str, env_name: &str, is_key: &dyn Fn(&str) -> bool) -> Option<Malformation> {
    let first = value.bytes().next()?;
    let around = |open: &str, close: &str| value.starts_with(open) && value.ends_with(close);
    if value.contains("{{") && value.contains("}}") {
        return Some(Malformation::Template);
    }
    match first {
        b'"' | b'\'' | b'`' if value.len() > 1 && value.bytes().next_back() == Some(first) => return Some(Malformation::Quoted),
        b'$' if around("${", "}") || is_name(value.trim_start_matches('$')) => return Some(Malformation::VariableName),
        b'%' if around("%", "%") && is_name(value.trim_matches('%')) => return Some(Malformation::VariableName),
        b'<' if around("<", ">") => {
            return Some(if around("<%", "%>") { Malformation::Template } else { Malformation::Placeholder });
        }
        b'[' if value == "[object Object]" => return Some(Malformation::NoValue),
        b'b' | b'B' if starts_with_any_case(value, "bearer ") => return Some(Malformation::BearerInFront),
        _ => {}
    }
    if HEADERS.iter().any(|header| starts_with_any_case(value, header)) {
        return Some(Malformation::HeaderInFront);
    }
    if REFERENCES.iter().any(|reference| starts_with_any_case(value, reference))
        || starts_with_any_case(value, "projects/") && value.contains("/secrets/")
    {
        return Some(Malformation::Reference);
    }
    if starts_with_any_case(value, "https://") || starts_with_any_case(value, "http://") {
        return Some(Malformation::WebAddress);
    }
    if is_email(value) {
        return Some(Malformation::Email);
    }
    if value.contains("****") || value.contains("...") {
        let ends = value.ends_with("...");
        return Some(if ends { Malformation::Placeholder } else { Malformation::Masked });
    }
    if has_name_in_front(value, env_name, is_key) {
        return Some(Malformation::NameInFront);
    }
    if is_placeholder(value) {
        return Some(Malformation::Placeholder);
    }
    if let Some(rest) = value.strip_suffix([',', ';']) {
        return Some(if rest.is_empty() { Malformation::Placeholder } else { Malformation::Punctuation });
    }
    let (one, other) = value.trim_ascii().split_once([',', ';', ' ']).unwrap_or_default();
    if are_two_keys(one, other) {
        return Some(Malformation::TwoValues);
    }
    value.trim_ascii().contains(' ').then_some(Malformation::BlankWithin)
}

/// The beginning of a line that was copied from a request.
const HEADERS: [&str; 6] = ["authorization:", "proxy-authorization:", "x-api-key:", "x-goog-api-key:", "api-key:", "apikey:"];

/// How secret stores, clouds and orchestrators refer to a secret.
const REFERENCES: [&str; 20] = [
    "op://",
    "vault:",
    "arn:aws:",
    "arn:aws-cn:",
    "arn:aws-us-gov:",
    "ssm://",
    "secretsmanager:",
    "awssm://",
    "gcpsm://",
    "gsm://",
    "sm://",
    "akv://",
    "azurekeyvault:",
    "@microsoft.keyvault(",
    "doppler://",
    "infisical://",
    "secretref:",
    "ref+",
    "file:",
    "/run/secrets/",
];

/// Whether the value begins with this text, compared without case.
fn starts_with_any_case(value: &str, with: &str) -> bool {
    value.get(..with.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(with))
}

/// Whether both are as long as keys and have only their characters.
fn are_two_keys(one: &str, other: &str) -> bool {
    const SHORTEST: usize = 16;
    let other = other.trim_ascii().split([',', ';', ' ', '\n', '\r', '\t']).next().unwrap_or_default();
    [one.trim_ascii(), other].iter().all(|key| key.len() >= SHORTEST && has_only_key_characters(key))
}

fn is_email(value: &str) -> bool {
    let is_word = |text: &str| {
        !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'+'))
    };
    let Some((name, host)) = value.split_once('@') else { return false };
    let ends = host.rsplit_once('.').is_some_and(|(_, end)| end.len() >= 2 && end.bytes().all(|byte| byte.is_ascii_alphabetic()));
    is_word(name) && is_word(host) && ends
}

/// Whether the value is `NAME=...` or `NAME: ...`, as in a file. If the name is that of a key, the rest need not look like one.
fn has_name_in_front(value: &str, env_name: &str, is_key: &dyn Fn(&str) -> bool) -> bool {
    let line = value.strip_prefix("export ").or_else(|| value.strip_prefix("set ")).unwrap_or(value);
    let Some(at) = line.find(['=', ':']) else { return false };
    let (name, rest) = (line.get(..at).unwrap_or_default().trim_ascii(), line.get(at + 1..).unwrap_or_default());
    // `==` at the end belongs to base64.
    let rest = rest.trim_matches(['=', ' ', '"', '\'']);
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let begins_a_name = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
    if rest.is_empty() || !begins_a_name || !name.bytes().all(is_word) {
        return false;
    }
    let is_of_a_key = is_name(name) && (name.ends_with("_KEY") || name.ends_with("_TOKEN"));
    name == env_name || is_of_a_key || line.len() < value.len() || is_key(rest)
}

/// Whether the word is the name of a variable in upper case.
fn is_name(word: &str) -> bool {
    let is_of_name = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
    word.bytes().next().is_some_and(|byte| !byte.is_ascii_digit()) && word.bytes().all(is_of_name)
}

/// What programs write if they have no value.
const NO_VALUES: [&str; 5] = ["undefined", "null", "none", "nil", "nan"];
/// What people write for a value that is still missing.
const PLACEHOLDER_WORDS: [&str; 10] =
    ["todo", "tbd", "fixme", "changeme", "change-me", "change_me", "replaceme", "replace-me", "replace_me", "placeholder"];
/// Longer values are not checked for placeholders, except for repeated letters.
const LONGEST_PLACEHOLDER: usize = 64;

/// Checks a value that has only the characters of a key for placeholders.
fn simple_placeholder(value: &str) -> Option<Malformation> {
    let last = value.bytes().next_back()?;
    // Most keys have no dot, and one character is found faster than a text.
    if value.contains('.') && value.contains("...") {
        return Some(if value.ends_with("...") { Malformation::Placeholder } else { Malformation::Masked });
    }
    // `sk-xxxxxxxx` of any length.
    if matches!(last, b'x' | b'X') {
        let rest = value.trim_end_matches(['x', 'X']);
        if value.len() - rest.len() >= 4 && (rest.is_empty() || rest.ends_with(['-', '_'])) {
            return Some(Malformation::Placeholder);
        }
    }

    if value.len() <= 9 && NO_VALUES.iter().any(|word| value.eq_ignore_ascii_case(word)) {
        return Some(Malformation::NoValue);
    }
    is_placeholder(value).then_some(Malformation::Placeholder)
}

/// Whether the value is a placeholder as in documentation or an `.env.example` file.
fn is_placeholder(value: &str) -> bool {
    if value.len() > LONGEST_PLACEHOLDER {
        return false;
    }
    let words = value.strip_prefix("sk-").unwrap_or(value);
    if words.len() <= 11 && PLACEHOLDER_WORDS.iter().any(|word| words.eq_ignore_ascii_case(word)) {
        return true;
    }
    let says = |of: &str| words.to_ascii_lowercase().contains(of);
    (starts_with_any_case(words, "your")
        || starts_with_any_case(words, "my-api")
        || starts_with_any_case(words, "my_api")
        || starts_with_any_case(words, "insert"))
        && ["key", "token", "here"].iter().any(|word| says(word))
}

/// Whether the value is JSON with a member that marks an OAuth credential. Only names of members are copied.
fn holds_oauth_members(value: &str) -> bool {
    fn has(text: &str, depth: usize) -> bool {
        let Ok(members) = serde_json::from_str::<BTreeMap<String, &RawValue>>(text) else { return false };
        let is_token = |(name, value): (&String, &&RawValue)| {
            OAUTH_MEMBERS.contains(&name.as_str()) && value.get().starts_with('"') && value.get() != "\"\""
        };
        members.iter().any(is_token) || depth > 0 && members.values().any(|value| has(value.get(), depth - 1))
    }
    has(value, OAUTH_MEMBER_DEPTH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_save_by_mistake_is_named() {
        use Malformation::*;
        let long = "made-up-key".repeat(8);
        let (short_enough, too_long) = (format!("your-key-{}", "m".repeat(55)), format!("your-key-{}", "m".repeat(56)));
        for (value, expect) in [
            ("Bearer made-up-key", Some(BearerInFront)),
            ("bearer made-up-key", Some(BearerInFront)),
            ("ACME_API_KEY=made-up-key", Some(NameInFront)),
            ("export OTHER_API_KEY=made-up-key", Some(NameInFront)),
            ("\"made-up-key\"", Some(Quoted)),
            ("'made-up-key'", Some(Quoted)),
            ("${ACME_API_KEY}", Some(VariableName)),
            ("$ACME_API_KEY", Some(VariableName)),
            ("%ACME_API_KEY%", Some(VariableName)),
            ("key-{{ secrets.ACME }}", Some(Template)),
            ("<%= acme %>", Some(Template)),
            ("sk-made************up", Some(Masked)),
            ("<your key>", Some(Placeholder)),
            ("your-api-key-here", Some(Placeholder)),
            ("YOUR_API_KEY", Some(Placeholder)),
            ("sk-your-key", Some(Placeholder)),
            ("sk-...", Some(Placeholder)),
            ("changeme", Some(Placeholder)),
            // Unusual, but possible keys.
            ("made-up-key", None),
            ("\"", None),
            ("$", None),
            ("b", None),
            ("MADE_UP_BASE64_KEY=", None),
            ("MADE_UP_TOKEN==", None),
            ("K=sk-made-up", Some(NameInFront)),
            ("export K=made-up", Some(NameInFront)),
            ("key: \"sk-made-up\"", Some(NameInFront)),
            ("ACME_API_KEY: made-up", Some(NameInFront)),
            ("Authorization: Bearer made-up", Some(HeaderInFront)),
            ("authorization:made-up", Some(HeaderInFront)),
            ("x-api-key: made-up", Some(HeaderInFront)),
            ("sk-made-up-made-up-1,sk-made-up-made-up-2", Some(TwoValues)),
            ("sk-made-up-made-up-1; sk-made-up-made-up-2", Some(TwoValues)),
            ("sk-made-up-made-up-1 sk-made-up-made-up-2", Some(TwoValues)),
            ("sk-made-up-made-up-1\nsk-made-up-made-up-2", Some(TwoValues)),
            ("sk-made-up-made-up-1\r\nsk-made-up-made-up-2\n", Some(TwoValues)),
            ("see the vault", Some(BlankWithin)),
            ("made-up-key,", Some(Punctuation)),
            ("made-up-key;", Some(Punctuation)),
            ("undefined", Some(NoValue)),
            ("null", Some(NoValue)),
            ("None", Some(NoValue)),
            ("nil", Some(NoValue)),
            ("NaN", Some(NoValue)),
            ("[object Object]", Some(NoValue)),
            (concat!("TO", "DO"), Some(Placeholder)),
            ("sk-xxxxxxxxxxxxxxxx", Some(Placeholder)),
            (concat!("sk-made-api03-", "XX", "XX"), Some(Placeholder)),
            ("xxxx", Some(Placeholder)),
            ("my-api-key", Some(Placeholder)),
            ("INSERT_YOUR_KEY_HERE", Some(Placeholder)),
            ("op://vault/item/key", Some(Reference)),
            ("vault:secret/data/acme#key", Some(Reference)),
            ("arn:aws:secretsmanager:eu-west-1:1:secret:acme", Some(Reference)),
            ("projects/made-up/secrets/acme/versions/1", Some(Reference)),
            ("${{ secrets.ACME }}", Some(Template)),
            ("{{ .Values.acme }}", Some(Template)),
            ("https://console.acme.example/settings/keys", Some(WebAddress)),
            ("someone@acme.example", Some(Email)),
            ("sk-made...abcd", Some(Masked)),
            ("sk-made\u{2026}abcd", Some(Masked)),
            ("sk-\u{2022}\u{2022}\u{2022}\u{2022}abcd", Some(Masked)),
            ("made=up", None),
            ("$made-up-lower", None),
            ("made-up:made-up", None),
            ("made-up-id.made-up-secret", None),
            ("made,up", None),
            ("none-made-up", None),
            ("made-up-max", None),
            ("made@up", None),
            ("insert", None),
            ("\u{e9}", Some(NonAscii { at: 0 })),
            ("made-up\nx-other: 1", Some(ControlCharacter { at: 7, trailing: false })),
            ("sk-youra-made-up-account", None),
            // One end of a pair, or a word that is not alone.
            ("<made-up", None),
            ("%made-up", None),
            ("%made-up%", None),
            ("[made-up", None),
            ("\"made-up", None),
            ("projects/made-up", None),
            ("made@up.e", None),
            ("made@up.11", None),
            ("@acme.example", None),
            ("made:up@acme.example", None),
            ("OTHER=made-up", None),
            ("made-up=sk-made-up", None),
            ("1K=sk-made-up", None),
            ("made{{up", None),
            ("made}}up", None),
            ("made-up-x", None),
            ("made-up-xx", None),
            ("made-upxxxx", None),
            ("OTHER_TOKEN=made-up", Some(NameInFront)),
            ("_KEY=made-up", Some(NameInFront)),
            ("made-up\n", Some(ControlCharacter { at: 7, trailing: true })),
            ("made-up\n ", Some(ControlCharacter { at: 7, trailing: true })),
            (long.as_str(), None),
            // A placeholder is short.
            (short_enough.as_str(), Some(Placeholder)),
            (too_long.as_str(), None),
        ] {
            assert_eq!(fault(value, "ACME_API_KEY", &|rest| rest.starts_with("sk-")), expect, "{value}");
        }
    }

    #[test]
    fn a_value_has_6_kib_at_most() {
        let of = |length| fault(&"m".repeat(length), "ACME_API_KEY", &|_| false);
        assert_eq!((of(6_144), of(6_145)), (None, Some(Malformation::TooLong { length: 6_145, limit: 6_144 })));
    }

    #[test]
    fn only_json_with_a_token_is_an_oauth_credential() {
        for (value, expect) in [
            (r#"{"access_token": "made-up"}"#, true),
            (r#"{"OPENAI_API_KEY": null, "tokens": {"id_token": "made-up", "refresh_token": "made-up"}}"#, true),
            (r#"{"claudeAiOauth": {"accessToken": "made-up"}}"#, true),
            (r#"{"tokens": {"access_token": ""}}"#, false),
            (r#"{"access_token": "made-up""#, false),
            (r#"{"OPENAI_API_KEY": "made-up"}"#, false),
            ("{}", false),
            ("{", false),
            ("{{ secrets.X }}", false),
        ] {
            assert_eq!(holds_oauth_members(value), expect, "{value}");
        }
        // Programs wrap a token once or twice. Deeper, it is not looked for.
        let wrapped =
            |times| (0..times).fold(r#"{"access_token": "made-up"}"#.to_owned(), |inner, _| format!(r#"{{"m": {inner}}}"#));
        assert_eq!((holds_oauth_members(&wrapped(4)), holds_oauth_members(&wrapped(5))), (true, false));
    }
}
