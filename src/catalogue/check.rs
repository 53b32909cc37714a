//! From the schema's words to a `Catalogue`: every rule, and every problem at once.

use std::{collections::BTreeMap, time::Duration};

use super::{
    BodyTest, Catalogue, HeaderFamily, HostRow, KeyKind, KeyShape, Method, Probe, Signal, SignalOutcome,
    file::{CatalogueFile, HostFile, KeyShapeFile, ProbeFile, SignalFile},
};
use crate::{
    decision::Verdict,
    problem::{Loaded, Problem, Problems},
    registry::Protocol,
    yaml,
};

/// The version of the schema that this service reads.
const CATALOGUE_VERSION: i64 = 1;
/// The longest that one row may give a slow vendor.
const MAX_BUDGET_MS: u64 = 10_000;
/// Headers that a row may not set: the credential has its own way, and these change where or how a request goes.
const RESERVED_HEADERS: [&str; 9] = [
    "authorization",
    "x-api-key",
    "x-goog-api-key",
    "api-key",
    "host",
    "content-length",
    "transfer-encoding",
    "cookie",
    "connection",
];

pub(super) fn check(document: &str, bytes: &[u8]) -> Result<Loaded<Catalogue>, Problems> {
    let failed = |list| Problems { document: document.to_owned(), list };
    let Loaded { value: file, warnings } = yaml::parse::<CatalogueFile>(bytes).map_err(|problem| failed(vec![problem]))?;
    let mut problems = Vec::new();
    if file.catalogue_version != Some(CATALOGUE_VERSION) {
        problems.push(Problem::at("catalogue_version", format!("must be {CATALOGUE_VERSION}")));
    }
    let mut hosts: BTreeMap<String, Vec<HostRow>> = BTreeMap::new();
    for (index, host) in file.hosts.unwrap_or_default().into_iter().enumerate() {
        let place = format!("hosts[{index}]");
        if let Some((name, row)) = check_host(host, &place, &mut problems) {
            let rows = hosts.entry(name.clone()).or_default();
            if rows.iter().any(|other| other.path_prefix == row.path_prefix) {
                problems.push(Problem::at(&place, format!("host `{name}` with path_prefix `{}` stands twice", row.path_prefix)));
            }
            rows.push(row);
            rows.sort_by_key(|row| std::cmp::Reverse(row.path_prefix.len()));
        }
    }
    let key_shapes = file
        .key_shapes
        .unwrap_or_default()
        .into_iter()
        .enumerate()
        .filter_map(|(index, shape)| check_key_shape(shape, &format!("key_shapes[{index}]"), &mut problems))
        .collect();
    let mut base_url_env = BTreeMap::new();
    for (name, surface) in file.base_url_env.unwrap_or_default() {
        match surface.as_str() {
            "anthropic" => drop(base_url_env.insert(name, Protocol::Anthropic)),
            "openai" => drop(base_url_env.insert(name, Protocol::OpenAi)),
            other => problems
                .push(Problem::at(format!("base_url_env.{name}"), format!("must be `anthropic` or `openai`, found `{other}`"))),
        }
    }
    let defaults = file.defaults.unwrap_or_default();
    let openai = check_probes(defaults.openai, "defaults.openai", &mut problems);
    let anthropic = check_probes(defaults.anthropic, "defaults.anthropic", &mut problems);
    if !problems.is_empty() {
        return Err(failed(problems));
    }
    let revision = blake3::hash(bytes).to_hex().chars().take(16).collect();
    Ok(Loaded { value: Catalogue { revision, hosts, key_shapes, base_url_env, openai, anthropic }, warnings })
}

fn check_host(file: HostFile, place: &str, problems: &mut Vec<Problem>) -> Option<(String, HostRow)> {
    let before = problems.len();
    let name = file.host.to_ascii_lowercase();
    let bare = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | ':' | '[' | ']');
    if name.is_empty() || !name.chars().all(bare) {
        problems.push(Problem::at(
            format!("{place}.host"),
            format!("`{}` must be a host, with `:PORT` if that is not the scheme's own; no scheme, no path", file.host),
        ));
    }
    if file.vendor.trim().is_empty() {
        problems.push(Problem::at(format!("{place}.vendor"), "is required: whose host this is"));
    }
    let path_prefix = file.path_prefix.unwrap_or_default().trim_end_matches('/').to_owned();
    if !path_prefix.is_empty() && !path_prefix.starts_with('/') {
        problems.push(Problem::at(format!("{place}.path_prefix"), "must begin with `/`"));
    }
    let probes = check_probes(file.probes, &format!("{place}.probes"), problems);
    let row = HostRow {
        path_prefix,
        vendor: file.vendor,
        siblings: file.siblings.unwrap_or_default(),
        strip_model_prefixes: file.strip_model_prefixes.unwrap_or_default(),
        probes,
    };
    (problems.len() == before).then_some((name, row))
}

fn check_key_shape(file: KeyShapeFile, place: &str, problems: &mut Vec<Problem>) -> Option<KeyShape> {
    if file.prefix.is_empty() || file.vendor.is_empty() {
        problems.push(Problem::at(place, "needs a prefix and a vendor"));
        return None;
    }
    let kind = match file.kind.as_deref() {
        None | Some("api_key") => KeyKind::ApiKey,
        Some("oauth") => KeyKind::OAuth,
        Some(other) => {
            problems.push(Problem::at(format!("{place}.kind"), format!("must be `api_key` or `oauth`, found `{other}`")));
            return None;
        }
    };
    Some(KeyShape { prefix: file.prefix, vendor: file.vendor, kind })
}

fn check_probes(files: Option<Vec<ProbeFile>>, place: &str, problems: &mut Vec<Problem>) -> Vec<Probe> {
    let mut probes = Vec::new();
    for (index, file) in files.unwrap_or_default().into_iter().enumerate() {
        match check_probe(file, &format!("{place}[{index}]")) {
            Ok(probe) => probes.push(probe),
            Err(list) => problems.extend(list),
        }
    }
    probes
}

/// One probe, or all that is wrong with it.
pub(crate) fn check_probe(file: ProbeFile, place: &str) -> Result<Probe, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut problem = |field: &str, message: String| problems.push(Problem::at(format!("{place}.{field}"), message));
    let fingerprint = *blake3::hash(&serde_json::to_vec(&file).unwrap_or_default()).as_bytes();
    if file.name.is_empty() || !file.name.bytes().all(|byte| byte.is_ascii_lowercase() || matches!(byte, b'-' | b'_')) {
        problem("name", "is required: lower-case letters, `-` and `_`".into());
    }
    let method = match file.method.as_deref() {
        None | Some("GET") => Method::Get,
        Some("POST") => Method::Post,
        Some(other) => {
            problem("method", format!("must be GET or POST, found `{other}`"));
            Method::Get
        }
    };
    let tail = file.path.strip_prefix("{base}").unwrap_or(&file.path);
    if !tail.starts_with('/') || tail.starts_with("//") || tail.contains(['\\', '#']) || tail.contains("..") {
        problem("path", format!("`{}` must begin with `/` or `{{base}}/` and stay on the host", file.path));
    }
    if method == Method::Get && file.body.is_some() {
        problem("body", "goes with POST only".into());
    }
    let mut auth = Vec::new();
    for word in file.auth.unwrap_or_default() {
        match HeaderFamily::ALL.into_iter().find(|family| family.as_str() == word) {
            Some(family) => auth.push(family),
            None => problem("auth", format!("`{word}` is none of bearer, x-api-key, x-goog-api-key, api-key")),
        }
    }
    if auth.is_empty() {
        problem("auth", "is required: at least one of bearer, x-api-key, x-goog-api-key, api-key".into());
    }
    let mut headers = Vec::new();
    for (name, value) in file.headers.unwrap_or_default() {
        let name = name.to_ascii_lowercase();
        let token = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
        if !token || RESERVED_HEADERS.contains(&name.as_str()) || !value.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            problem("headers", format!("`{name}` is not a header that a row may set, or its value is not plain ASCII"));
        }
        headers.push((name, value));
    }
    if file.budget_ms.is_some_and(|budget| budget == 0 || budget > MAX_BUDGET_MS) {
        problem("budget_ms", format!("must be 1 to {MAX_BUDGET_MS}"));
    }
    let expect = file.expect.unwrap_or_default();
    if expect.is_empty() {
        problem("expect", "is required: JSON paths of which a good answer has one; a bare 2xx proves nothing".into());
    }
    let mut signals = Vec::new();
    for (index, signal) in file.signals.unwrap_or_default().into_iter().enumerate() {
        match check_signal(signal) {
            Ok(signal) => signals.push(signal),
            Err(message) => problem(&format!("signals[{index}]"), message),
        }
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok(Probe {
        name: file.name,
        method,
        path: file.path,
        auth,
        headers,
        body: file.body,
        budget: file.budget_ms.map(Duration::from_millis),
        costs_money: file.costs_money.unwrap_or(false),
        refuses_bad_keys: file.refuses_bad_keys.unwrap_or(false),
        expect,
        signals,
        fingerprint,
    })
}

fn check_signal(file: SignalFile) -> Result<Signal, String> {
    let SignalFile { status, contains, path, equals, at_most, verdict, _confidence, _note } = file;
    let outcome = match verdict.as_str() {
        "ACCEPTED" => SignalOutcome::Accepted,
        "RESTRICTED" => SignalOutcome::Restricted,
        word => match Verdict::from_word(word) {
            Some(
                verdict @ (Verdict::Invalid
                | Verdict::Forbidden
                | Verdict::QuotaExhausted
                | Verdict::RateLimited
                | Verdict::ProviderError
                | Verdict::UnexpectedResponse),
            ) => SignalOutcome::Verdict(verdict),
            // VALID is earned by calibration, and the rest are not things that an answer can say.
            _ => {
                return Err(format!(
                    "verdict `{word}` is none of ACCEPTED, RESTRICTED, INVALID, FORBIDDEN, QUOTA_EXHAUSTED, RATE_LIMITED, \
                     PROVIDER_ERROR, UNEXPECTED_RESPONSE"
                ));
            }
        },
    };
    let statuses = status.unwrap_or_default();
    if let Some(status) = statuses.iter().find(|status| !(200..=599).contains(*status)) {
        return Err(format!("status {status} is not an HTTP answer's"));
    }
    let test = match (contains, path, equals, at_most) {
        (None, None, None, None) => BodyTest::Any,
        (Some(text), None, None, None) if !text.is_empty() => BodyTest::Contains(text.to_ascii_lowercase()),
        (None, Some(path), Some(value), None) => BodyTest::Equals(path, value),
        (None, Some(path), None, Some(limit)) => BodyTest::AtMost(path, limit),
        _ => return Err("needs nothing, `contains`, `path` with `equals`, or `path` with `at_most`".into()),
    };
    if statuses.is_empty() && test == BodyTest::Any {
        return Err("matches every answer; give it a status or a test of the body".into());
    }
    Ok(Signal { statuses, test, outcome })
}
