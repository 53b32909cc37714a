//! What a value looks like, before any of it is sent: fit for a header, whose key, and of which kind.

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

/// The longest value that could be a key: the longest real ones are JWTs of 1 to 3 KiB, and common front ends close a whole HTTP/2
/// connection over headers of 8 KiB, which would cost everybody who shares it.
pub const MAX_KEY_BYTES: usize = 6 * 1024;
/// The shortest OAuth token: those of vendors are of 100 bytes and more.
const MIN_OAUTH_TOKEN_BYTES: usize = 40;
/// The members by which OAuth credentials in JSON are known, as agent programs save them.
const OAUTH_MEMBERS: [&str; 6] = ["access_token", "refresh_token", "id_token", "accessToken", "refreshToken", "token_uri"];
/// How deep they may lie: programs wrap them once or twice.
const OAUTH_MEMBER_DEPTH: usize = 4;

/// Why a value is not sent.
#[derive(Debug)]
pub enum Unfit {
    /// It cannot be a key.
    Malformed(Malformation),
    /// It is one of another kind, or somebody else's.
    Refused(Box<Refusal>),
    /// It is never sent.
    NoSurface(NoSurface),
}

/// Why this value is not one to send to this endpoint: its characters, its length, or whose key it looks like. `takes_oauth`: an OAuth token
/// may be of use in a key's place, as far as is known.
pub fn unfit(catalogue: &Catalogue, endpoint: &Endpoint, env_name: &str, secret: &Secret, takes_oauth: bool) -> Option<Unfit> {
    let value = secret.expose();
    let shapes = catalogue.shapes_of(value.trim_ascii_start());
    let oauth = shapes.iter().find(|shape| shape.kind == KeyKind::OAuth && endpoint.vendor.as_deref() == Some(&shape.vendor));
    // JSON may have line breaks, and be longer than any key.
    if value.trim_ascii_start().starts_with('{') {
        return Some(match oauth {
            Some(_) if holds_oauth_members(value) => Unfit::NoSurface(NoSurface::OAuthShaped),
            Some(_) | None => Unfit::Malformed(if value.contains("{{") { Malformation::Template } else { Malformation::Json }),
        });
    }
    if let Some(fault) = malformation(value).or_else(|| pasted(value, env_name)) {
        return Some(Unfit::Malformed(fault));
    }
    if let Some(shape) = oauth {
        return Some(if value.len() < MIN_OAUTH_TOKEN_BYTES.max(shape.prefix.len()) {
            Unfit::Malformed(Malformation::CutOff)
        } else if takes_oauth {
            Unfit::NoSurface(NoSurface::OAuthShaped)
        } else {
            Unfit::Malformed(Malformation::TokenForKey)
        });
    }
    let place = || Some(Place::of(env_name));
    let (env_name, provider) = (|| env_name.to_owned(), || endpoint.provider.clone());
    let refused = |refusal| Some(Unfit::Refused(Box::new(refusal)));
    match shapes.first() {
        Some(KeyShape { kind: KeyKind::RefreshToken, .. }) => return Some(Unfit::Malformed(Malformation::RefreshTokenForKey)),
        Some(KeyShape { kind: KeyKind::Administrative, vendor, .. }) => {
            let vendor = vendor.clone();
            return refused(Refusal::AdministrativeKey { env_name: env_name(), provider: provider(), vendor, save_as: place() });
        }
        Some(KeyShape { vendor, kind, .. }) => {
            if let Some(host) = &endpoint.vendor
                && shapes.iter().all(|shape| shape.vendor == *vendor)
                && host != vendor
                && !endpoint.accepts_keys_of.takes(vendor)
            {
                let (host, vendor) = (endpoint.host.clone(), vendor.clone());
                return refused(Refusal::ForeignKey {
                    env_name: env_name(),
                    provider: provider(),
                    host,
                    vendor,
                    is_oauth: *kind == KeyKind::OAuth,
                    save_as: place(),
                });
            }
        }
        None => {}
    }
    let what = catalogue.foreign_secrets.what(value)?;
    refused(Refusal::ForeignSecret { env_name: env_name(), provider: provider(), what: what.to_owned(), save_as: place() })
}

fn malformation(value: &str) -> Option<Malformation> {
    if value.len() > MAX_KEY_BYTES {
        return Some(Malformation::TooLong { length: value.len(), limit: MAX_KEY_BYTES });
    }
    if is_plain(value) {
        return None;
    }
    let (at, byte) = value.bytes().enumerate().find(|(_, byte)| byte.is_ascii_control() || !byte.is_ascii())?;
    if !byte.is_ascii() {
        return Some(Malformation::NonAscii { at });
    }
    let trailing = value.bytes().skip(at).all(|byte| byte.is_ascii_control() || byte == b' ');
    Some(Malformation::ControlCharacter { at, trailing })
}

/// What people save by mistake in place of a key. No vendor's keys look like any of it.
fn pasted(value: &str, env_name: &str) -> Option<Malformation> {
    let first = value.bytes().next()?;
    let around = |open: &str, close: &str| value.len() > 1 && value.starts_with(open) && value.ends_with(close);
    match first {
        b'"' | b'\'' | b'`' if value.len() > 1 && value.bytes().next_back() == Some(first) => return Some(Malformation::Quoted),
        b'$' if around("${", "}") || is_name(value.trim_start_matches('$')) => return Some(Malformation::VariableName),
        b'%' if around("%", "%") && is_name(value.trim_matches('%')) => return Some(Malformation::VariableName),
        b'<' if around("<", ">") => {
            return Some(if around("<%", "%>") { Malformation::Template } else { Malformation::Placeholder });
        }
        b'b' | b'B' if value.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("bearer ")) => {
            return Some(Malformation::BearerInFront);
        }
        _ => {}
    }
    if value.contains("{{") && value.contains("}}") {
        return Some(Malformation::Template);
    }
    if value.contains("****") {
        return Some(Malformation::Masked);
    }
    if let Some((name, rest)) = value.trim_start_matches("export ").split_once('=')
        && !rest.trim_matches('=').is_empty()
        && (name == env_name || is_name(name) && (name.ends_with("_KEY") || name.ends_with("_TOKEN")))
    {
        return Some(Malformation::NameInFront);
    }
    is_placeholder(value).then_some(Malformation::Placeholder)
}

/// A variable's name, as shells have it.
fn is_name(word: &str) -> bool {
    let is_of_name = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
    word.bytes().next().is_some_and(|byte| !byte.is_ascii_digit()) && word.bytes().all(is_of_name)
}

/// What vendors' documentation and `.env.example` files have in a key's place.
fn is_placeholder(value: &str) -> bool {
    const WORDS: [&str; 6] = ["changeme", "change-me", "change_me", "replace-me", "replace_me", "placeholder"];
    // Keys are longer than any of it, but for those that say what they are.
    if value.len() > 64 {
        return false;
    }
    let lower = value.to_ascii_lowercase();
    let words = lower.trim_start_matches("sk-");
    WORDS.contains(&words)
        || words.ends_with("...")
        || (words.starts_with("your") && ["key", "token", "here"].iter().any(|word| words.contains(word)))
}

/// JSON that parses, and has a member by which OAuth credentials are known. Nothing of it is copied but names.
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
            // Keys, however odd.
            ("made-up-key", None),
            ("\"", None),
            ("$", None),
            ("b", None),
            ("MADE_UP_BASE64_KEY=", None),
            ("MADE_UP_TOKEN==", None),
            ("made=up", None),
            ("$made-up-lower", None),
            ("sk-youra-made-up-account", None),
            (long.as_str(), None),
        ] {
            assert_eq!(pasted(value, "ACME_API_KEY"), expect, "{value}");
        }
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
    }
}
