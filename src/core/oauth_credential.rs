//! Checks login credentials, which this service never sends. A damaged one would otherwise be noticed only in the running workspace.

use std::{borrow::Cow, collections::BTreeMap};

use serde_json::value::RawValue;
use strum::{EnumString, IntoStaticStr, VariantArray};

use crate::domain::{denial::Malformation, secret::Secret};

/// The kind of login credential that a variable holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, EnumString, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "kebab-case")]
pub enum CredentialKind {
    /// The token of a Claude subscription, as `claude setup-token` prints it.
    ClaudeOauthToken,
    /// Codex's auth.json, with the tokens of a ChatGPT login or with a key.
    CodexAuthJson,
}

/// The result of checking a value.
#[derive(Debug)]
pub enum OauthCheck {
    /// Nothing is wrong with it, as far as can be seen.
    Plausible,
    /// It cannot be a login credential.
    Malformed(Malformation),
    /// The file holds an API key, which is sent like any other key.
    Key(Secret),
}

/// A real Claude token has 108 characters. A shorter one than this was cut off.
const MIN_CLAUDE_TOKEN_BYTES: usize = 60;

// === impl CredentialKind ===

impl CredentialKind {
    /// Checks a value of this kind.
    pub fn check(self, value: &str) -> OauthCheck {
        match self {
            Self::ClaudeOauthToken => claude_token(value.trim()).map_or(OauthCheck::Plausible, OauthCheck::Malformed),
            Self::CodexAuthJson => auth_json(value),
        }
    }
}

fn claude_token(value: &str) -> Option<Malformation> {
    if let Some((at, byte)) = value.bytes().enumerate().find(|(_, byte)| byte.is_ascii_control() || !byte.is_ascii()) {
        return Some(if byte.is_ascii() {
            Malformation::ControlCharacter { at, trailing: false }
        } else {
            Malformation::NonAscii { at }
        });
    }
    if value.starts_with('{') {
        return Some(Malformation::CredentialsFile);
    }
    if value.starts_with("sk-ant-api") || value.starts_with("sk-ant-admin") {
        return Some(Malformation::KeyForToken);
    }
    if value.starts_with("sk-ant-ort") {
        return Some(Malformation::RefreshToken);
    }
    if value.split_once('#').is_some_and(|(code, state)| !code.is_empty() && !state.is_empty()) {
        return Some(Malformation::AuthorizationCode);
    }
    if value.contains(' ') {
        return Some(Malformation::BlankWithin);
    }
    (value.starts_with("sk-ant-oat") && value.len() < MIN_CLAUDE_TOKEN_BYTES).then_some(Malformation::CutOff)
}

type Members<'v> = BTreeMap<Cow<'v, str>, &'v RawValue>;

fn auth_json(value: &str) -> OauthCheck {
    let Ok(file) = serde_json::from_str::<Members<'_>>(value) else {
        return OauthCheck::Malformed(if is_key(value.trim_ascii()) { Malformation::KeyForFile } else { Malformation::NoJson });
    };
    let key = file.get("OPENAI_API_KEY").filter(|value| value.get() != "null");
    let mode = file.get("auth_mode").and_then(|mode| serde_json::from_str::<Cow<'_, str>>(mode.get()).ok());
    let is_key_mode = match mode.as_deref() {
        Some("apikey") => true,
        // Without a mode the key is used, even if there are tokens too.
        None => key.is_some(),
        Some(_) => false,
    };
    if is_key_mode {
        let key = key.and_then(|key| serde_json::from_str::<String>(key.get()).ok()).map(Secret::new);
        return match key {
            Some(key) if !key.is_blank() => OauthCheck::Key(key),
            Some(_) | None => OauthCheck::Malformed(Malformation::NoToken),
        };
    }
    let tokens = file.get("tokens").and_then(|tokens| serde_json::from_str::<Members<'_>>(tokens.get()).ok());
    let text = |name: &str| {
        let raw = tokens.as_ref()?.get(name)?.get();
        raw.strip_prefix('"')?.strip_suffix('"').filter(|text| !text.is_empty())
    };
    // The refresh token renews an access token that has expired.
    let is_whole = text("id_token").is_some_and(is_jwt) && text("access_token").is_some() && text("refresh_token").is_some();
    if is_whole { OauthCheck::Plausible } else { OauthCheck::Malformed(Malformation::NoToken) }
}

/// Whether the value is a key and not a file: only keys begin like this.
fn is_key(value: &str) -> bool {
    value.starts_with("sk-") && value.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

/// Whether the text has three parts of base64url.
fn is_jwt(text: &str) -> bool {
    let parts: Vec<&str> = text.split('.').collect();
    let is_base64 = |part: &&str| {
        !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'='))
    };
    parts.len() == 3 && parts.iter().all(is_base64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result_of(kind: CredentialKind, value: &str) -> String {
        match kind.check(value) {
            OauthCheck::Plausible => "plausible".into(),
            OauthCheck::Malformed(fault) => format!("{fault:?}"),
            OauthCheck::Key(key) => format!("key {}", key.expose()),
        }
    }

    #[test]
    fn a_claude_token_is_told_from_what_is_pasted_for_one() {
        let (one, two) = ("sk-ant-oat01-made-up-and-no-other-one-is-so", "-and-here-is-its-other-half-made-up-as-well");
        let whole = format!("{one}{two}");
        for (value, expect) in [
            (whole.clone(), "plausible"),
            (format!(" {whole}\n"), "plausible"),
            ("made-up-token-of-another-form".to_owned(), "plausible"),
            (format!("{one}\n{two}"), "ControlCharacter { at: 43, trailing: false }"),
            (format!("{one} {two}"), "BlankWithin"),
            ("sk-ant-oat".to_owned(), "CutOff"),
            (whole.chars().take(59).collect(), "CutOff"),
            (whole.chars().take(60).collect(), "plausible"),
            ("made-up-code#".to_owned(), "plausible"),
            ("#made-up-state".to_owned(), "plausible"),
            ("sk-ant-api03-made-up".to_owned(), "KeyForToken"),
            ("sk-ant-ort01-made-up".to_owned(), "RefreshToken"),
            ("made-up-code#made-up-state".to_owned(), "AuthorizationCode"),
            (r#"{"claudeAiOauth": {"accessToken": "made-up"}}"#.to_owned(), "CredentialsFile"),
        ] {
            assert_eq!(result_of(CredentialKind::ClaudeOauthToken, &value), expect, "{value}");
        }
    }

    #[test]
    fn an_auth_json_holds_a_key_or_all_three_tokens() {
        let tokens = r#"{"id_token": "e30.e30.made-up", "access_token": "made-up", "refresh_token": "made-up"}"#;
        for (value, expect) in [
            (format!(r#"{{"OPENAI_API_KEY": null, "tokens": {tokens}}}"#), "plausible"),
            (format!("{{\n  \"auth_mode\": \"chatgpt\",\n  \"tokens\": {tokens}\n}}\n"), "plausible"),
            (format!(r#"{{"OPENAI_API_KEY": "made-up-key", "tokens": {tokens}}}"#), "key made-up-key"),
            (format!(r#"{{"auth_mode": "chatgpt", "OPENAI_API_KEY": "made-up-key", "tokens": {tokens}}}"#), "plausible"),
            (r#"{"OPENAI_API_KEY": "made-up-key"}"#.to_owned(), "key made-up-key"),
            (r#"{"auth_mode": "chatgpt", "OPENAI_API_KEY": "made-up-key"}"#.to_owned(), "NoToken"),
            (r#"{"auth_mode": "apikey"}"#.to_owned(), "NoToken"),
            (r#"{"OPENAI_API_KEY": ""}"#.to_owned(), "NoToken"),
            ("{}".to_owned(), "NoToken"),
            (tokens.replace("e30.e30.made-up", "no-jwt"), "NoToken"),
            (format!(r#"{{"tokens": {}}}"#, tokens.replace("e30.e30.made-up", "no-jwt")), "NoToken"),
            (format!(r#"{{"tokens": {}}}"#, tokens.replace("e30.e30.made-up", "e30..made-up")), "NoToken"),
            (format!(r#"{{"tokens": {}}}"#, tokens.replace("e30.e30.made-up", "e30.e30.made!up")), "NoToken"),
            (format!(r#"{{"tokens": {}}}"#, tokens.replace("refresh_token", "other")), "NoToken"),
            (format!(r#"{{"tokens": {tokens}"#), "NoJson"),
            ("/configs/.codex/auth.json".to_owned(), "NoJson"),
            ("made-up-key".to_owned(), "NoJson"),
            ("sk-proj-made-up\n".to_owned(), "KeyForFile"),
            ("sk-proj-made-up {".to_owned(), "NoJson"),
        ] {
            assert_eq!(result_of(CredentialKind::CodexAuthJson, &value), expect, "{value}");
        }
    }
}
