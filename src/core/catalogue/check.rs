//! Checks a catalogue document and builds a `Catalogue`. Reports all problems at once.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use strum::VariantArray;
use url::Url;

use super::{
    AcceptsKeysOf, BodyTest, Catalogue, CommonCodes, CommonTexts, Confidence, Expected, HostRow, KeyKind, KeyShape, Kind,
    Meaning, Probe, Signal, SignalOutcome, Unprobed, UnprobedReason,
    file::{
        CatalogueFile, CodesFile, CommonCodesFile, ExpectFile, HostFile, KeyShapeFile, OneOrMany, ProbeFile, SignalFile,
        TextsFile, UnprobedFile,
    },
};
use crate::{
    core::{foreign_secrets, oauth_credential::CredentialKind, runtimes, yaml},
    domain::{
        problem::{Loaded, Problem, Problems},
        protocol::{HeaderFamily, Method, PLATFORM, Protocol, Surface},
        verdict::Verdict,
    },
};

/// The version of the schema that this service reads.
const CATALOGUE_VERSION: i64 = 1;
/// The longest time budget that a row may give a slow vendor.
const MAX_BUDGET_MS: u64 = 10_000;
/// A shorter part of a text could be met by chance.
const MIN_TEXT: usize = 4;
/// The longest name of a row's host, braces included, and how many hosts it may stand for.
const MAX_HOST_BYTES: usize = 1024;
const MAX_HOSTS_OF_A_ROW: usize = 64;
/// The placeholder for the workspace's model in a path or a body.
const MODEL: &str = "{model}";
/// The provider whose endpoint is the tenant's own. No row may give it a host.
const CUSTOM: &str = "custom";
/// Headers that a row may not set. The credential's headers are set by the prober; the others change where or how a request goes.
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
    let failed = |list| Problems { document: document.to_owned(), list: yaml::with_lines(bytes, list) };
    let Loaded { value: file, warnings } = yaml::parse::<CatalogueFile>(bytes).map_err(|problem| failed(vec![problem]))?;
    let CatalogueFile {
        catalogue_version,
        hosts: host_files,
        key_shapes,
        base_url_env,
        unprobed,
        common_codes,
        free_models,
        defaults,
        runtimes,
        foreign_secrets,
        credential_kinds,
    } = file;
    let mut problems = Vec::new();
    if catalogue_version != Some(CATALOGUE_VERSION) {
        let found = catalogue_version.map_or_else(|| "nothing".to_owned(), |version| version.to_string());
        problems.push(Problem::at("catalogue_version", format!("must be {CATALOGUE_VERSION}, found {found}")));
    }
    let (hosts, homes) = check_hosts(host_files.unwrap_or_default(), &mut problems);
    let unprobed = check_unprobed(unprobed.unwrap_or_default(), &homes, &mut problems);
    let key_shapes = key_shapes
        .unwrap_or_default()
        .into_iter()
        .enumerate()
        .filter_map(|(index, shape)| check_key_shape(index, shape, &mut problems))
        .collect();
    let base_url_env = check_base_url_env(base_url_env.unwrap_or_default(), &mut problems);
    let runtimes = runtimes::check(runtimes.unwrap_or_default(), &mut problems);
    let foreign_secrets = foreign_secrets::check(foreign_secrets.unwrap_or_default(), &mut problems);
    let credential_kinds = check_credential_kinds(credential_kinds.unwrap_or_default(), &mut problems);
    let common_codes = check_common_codes(common_codes.unwrap_or_default(), &mut problems);
    if free_models.iter().flatten().any(|end| end.trim().is_empty()) {
        problems.push(Problem::at("free_models", "holds a blank, which every model ends in"));
    }
    let defaults = defaults.unwrap_or_default();
    let openai = check_probes(defaults.openai, "defaults.openai", &mut problems);
    let anthropic = check_probes(defaults.anthropic, "defaults.anthropic", &mut problems);
    if !problems.is_empty() {
        return Err(failed(problems));
    }
    let revision = yaml::revision(bytes);
    let common_codes = Arc::new(common_codes);
    let free_models = free_models.unwrap_or_default().into();
    let mut value = Catalogue {
        revision,
        hosts,
        homes,
        unprobed,
        key_shapes,
        base_url_env,
        common_codes,
        free_models,
        openai,
        anthropic,
        runtimes,
        foreign_secrets,
        credential_kinds,
    };
    value.share_codes();
    Ok(Loaded { value, warnings })
}

/// The rows by host, and the base URLs of providers that have none in the registry.
fn check_hosts(files: Vec<HostFile>, problems: &mut Vec<Problem>) -> (BTreeMap<String, Vec<HostRow>>, BTreeMap<String, Url>) {
    let mut hosts: BTreeMap<String, Vec<HostRow>> = BTreeMap::new();
    let mut homes = BTreeMap::new();
    for (index, mut host) in files.into_iter().enumerate() {
        let place = format!("hosts[{index}]");
        check_home(&mut host, &place, &mut homes, problems);
        let Some((names, row)) = check_host(host, &place, problems) else { continue };
        for name in names {
            let rows = hosts.entry(name.clone()).or_default();
            if rows.iter().any(|other| other.path_prefix == row.path_prefix && other.protocol == row.protocol) {
                let message = format!("host `{name}` with path_prefix `{}` appears twice", row.path_prefix);
                problems.push(Problem::at(&place, message));
            }
            rows.push(row.clone());
            // A row for one API comes before a row for both.
            rows.sort_by_key(|row| (std::cmp::Reverse(row.path_prefix.len()), row.protocol.is_none()));
        }
    }
    (hosts, homes)
}

fn check_base_url_env(file: BTreeMap<String, String>, problems: &mut Vec<Problem>) -> BTreeMap<String, Protocol> {
    let protocols = file.into_iter().filter_map(|(name, word)| {
        let protocol =
            check_protocol(&word).map_err(|message| problems.push(Problem::at(format!("base_url_env.{name}"), message)));
        Some((name, protocol.ok()?))
    });
    protocols.collect()
}

fn check_protocol(word: &str) -> Result<Protocol, String> {
    match word {
        "openai" => Ok(Protocol::OpenAi),
        "anthropic" => Ok(Protocol::Anthropic),
        other => Err(format!("must be `openai` or `anthropic`, found `{other}`")),
    }
}

fn check_credential_kinds(file: BTreeMap<String, String>, problems: &mut Vec<Problem>) -> BTreeMap<String, CredentialKind> {
    let kinds = file.into_iter().filter_map(|(name, word)| {
        let kind = word.parse().ok();
        if kind.is_none() {
            let known = CredentialKind::VARIANTS.iter().map(|kind| <&str>::from(*kind)).collect::<Vec<_>>().join(", ");
            problems.push(Problem::at(format!("credential_kinds.{name}"), format!("must be one of {known}, found `{word}`")));
        }
        Some((name, kind?))
    });
    kinds.collect()
}

fn check_common_codes(file: CommonCodesFile, problems: &mut Vec<Problem>) -> CommonCodes {
    let fingerprint = *blake3::hash(&serde_json::to_vec(&file).unwrap_or_default()).as_bytes();
    let CommonCodesFile { paths, codes: files, text_paths, texts: text_files } = file;
    let mut codes: HashMap<String, Vec<Meaning>> = HashMap::new();
    for (index, CodesFile { status, codes: names, verdict }) in files.unwrap_or_default().into_iter().enumerate() {
        let place = format!("common_codes.codes[{index}]");
        let statuses = status.unwrap_or_default();
        if let Some(status) = statuses.iter().find(|status| !(200..500).contains(*status)) {
            problems.push(Problem::at(format!("{place}.status"), format!("status {status} is not one of 200 to 499")));
        }
        let Some(outcome) = check_common_outcome(&verdict, &place, problems) else { continue };
        for name in names {
            let meanings = codes.entry(CommonCodes::normal_form(&name)).or_default();
            // The same code in another spelling may only have the same meaning.
            let taken = meanings.iter().any(|Meaning { code, statuses: other, outcome: known }| {
                let overlaps = other.is_empty() || other.iter().any(|status| statuses.contains(status));
                overlaps && (*known != outcome || code.eq_ignore_ascii_case(&name))
            });
            if taken {
                problems.push(Problem::at(&place, format!("`{name}` has a meaning already")));
            }
            meanings.push(Meaning { code: name, statuses: statuses.clone(), outcome });
        }
    }
    let mut texts = Vec::new();
    for (index, TextsFile { status, texts: parts, verdict }) in text_files.unwrap_or_default().into_iter().enumerate() {
        let place = format!("common_codes.texts[{index}]");
        if status.is_empty() || status.iter().any(|status| !(200..500).contains(status)) {
            problems.push(Problem::at(format!("{place}.status"), "list the statuses that it applies to, each from 200 to 499"));
        }
        if let Some(text) = parts.iter().find(|text| text.chars().count() < MIN_TEXT) {
            problems.push(Problem::at(format!("{place}.texts"), format!("`{text}` has fewer than {MIN_TEXT} characters")));
        }
        if let Some(outcome) = check_common_outcome(&verdict, &place, problems) {
            texts.push(CommonTexts { statuses: status, texts: parts, outcome });
        }
    }
    CommonCodes { paths: paths.unwrap_or_default(), codes, text_paths: text_paths.unwrap_or_default(), texts, fingerprint }
}

fn check_common_outcome(verdict: &str, place: &str, problems: &mut Vec<Problem>) -> Option<SignalOutcome> {
    match check_outcome(verdict) {
        Ok(SignalOutcome::Accepted) => {
            problems.push(Problem::at(format!("{place}.verdict"), "a code or a text is never a `yes`"))
        }
        Ok(outcome) => return Some(outcome),
        Err(message) => problems.push(Problem::at(format!("{place}.verdict"), message)),
    }
    None
}

/// Moves the providers that a host's row lists into `homes`.
fn check_home(file: &mut HostFile, place: &str, homes: &mut BTreeMap<String, Url>, problems: &mut Vec<Problem>) {
    let (providers, base_path) = (file.providers.take(), file.base_path.take());
    let Some(providers) = providers else {
        if base_path.is_some() {
            problems.push(Problem::at(format!("{place}.base_path"), "goes with `providers`, which it is the base path of"));
        }
        return;
    };
    let base_path = base_path.unwrap_or_default();
    let base_path = base_path.trim_end_matches('/');
    let plain = |path: &str| path.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'-' | b'_' | b'.'));
    if !(base_path.is_empty() || base_path.starts_with('/') && plain(base_path) && !base_path.contains("..")) {
        problems.push(Problem::at(format!("{place}.base_path"), format!("`{base_path}` must be a plain path such as `/api/v1`")));
        return;
    }
    if file.host.contains(['*', '{']) {
        problems.push(Problem::at(format!("{place}.providers"), "goes with one host; a pattern is no address"));
        return;
    }
    let Ok(home) = Url::parse(&format!("https://{}{base_path}", file.host)) else {
        return; // the host is at fault, and is reported as such
    };
    for (index, provider) in providers.into_iter().enumerate() {
        let place = format!("{place}.providers[{index}]");
        if provider == CUSTOM || provider == PLATFORM {
            problems.push(Problem::at(&place, format!("`{provider}` has no host of a vendor's; a row must not give it one")));
        } else if homes.insert(provider.clone(), home.clone()).is_some() {
            problems.push(Problem::at(&place, format!("provider `{provider}` has a home already; it has one host")));
        }
    }
}

/// The host names that a row applies to, and the row.
fn check_host(file: HostFile, place: &str, problems: &mut Vec<Problem>) -> Option<(Vec<String>, HostRow)> {
    let before = problems.len();
    let HostFile {
        host,
        path_prefix,
        protocol,
        vendor,
        accepts_keys_of,
        since,
        siblings,
        strip_model_prefixes,
        providers: _,
        base_path: _,
        probes,
        confidence,
        sources,
        note,
    } = file;
    let mut problem = |field: &str, message: String| problems.push(Problem::at(format!("{place}.{field}"), message));
    let names = check_host_names(&host, &mut problem);
    let protocol = protocol.and_then(|word| check_protocol(&word).map_err(|message| problem("protocol", message)).ok());
    let accepts_keys_of = check_accepts_keys_of(accepts_keys_of, &mut problem);
    let since = since.and_then(|text| {
        let faulty = |_| problem("since", format!("`{text}` must be a date such as 2026-11-26"));
        text.parse().map_err(faulty).ok()
    });
    if vendor.trim().is_empty() {
        problem("vendor", "is required: whose host this is".into());
    }
    let path_prefix = path_prefix.unwrap_or_default().trim_end_matches('/').to_owned();
    if !path_prefix.is_empty() && !path_prefix.starts_with('/') {
        problem("path_prefix", "must begin with `/`".into());
    }
    let siblings = siblings.unwrap_or_default();
    for (index, sibling) in siblings.iter().enumerate().filter(|(_, sibling)| !is_host(sibling)) {
        problem(&format!("siblings[{index}]"), format!("`{sibling}` must be a host in lower case"));
    }
    let sources = sources.unwrap_or_default();
    for (index, _) in sources.iter().enumerate().filter(|(_, source)| source.trim().is_empty()) {
        problem(&format!("sources[{index}]"), "is blank; say where the row is known from".into());
    }
    let confidence = confidence.and_then(|word| check_confidence(&word).map_err(|message| problem("confidence", message)).ok());
    let probes = check_probes(probes, &format!("{place}.probes"), problems);
    let row = HostRow {
        path_prefix,
        protocol,
        vendor,
        siblings,
        accepts_keys_of,
        strip_model_prefixes: strip_model_prefixes.unwrap_or_default(),
        probes,
        confidence,
        since,
        sources,
        note: note.filter(|note| !note.trim().is_empty()),
        is_overlaid: false,
    };
    (problems.len() == before).then_some((names, row))
}

/// The host names that the row applies to.
fn check_host_names(host: &str, problem: &mut dyn FnMut(&str, String)) -> Vec<String> {
    if host.len() > MAX_HOST_BYTES {
        problem("host", format!("is {} bytes long; the limit is {MAX_HOST_BYTES}", host.len()));
        return Vec::new();
    }
    let Some(names) = expand_braces(&host.to_ascii_lowercase()) else {
        problem("host", format!("stands for more than {MAX_HOSTS_OF_A_ROW} hosts; use a `*`, or more rows"));
        return Vec::new();
    };
    // One name of many shows what is wrong.
    if names.iter().any(|name| !is_host(&name.replace('*', "x"))) {
        problem("host", format!("`{host}` must be a host, with `:PORT` if that is not the scheme's own; no scheme, no path"));
    } else if !names.iter().all(|name| is_single_vendor_pattern(name)) {
        problem("host", format!("`{host}`: a `*` stands for a part of one label, once in it, and never for one of the last two"));
    }
    names
}

fn check_accepts_keys_of(file: Option<OneOrMany<String>>, problem: &mut dyn FnMut(&str, String)) -> AcceptsKeysOf {
    match file.map(OneOrMany::into_vec) {
        None => AcceptsKeysOf::Nobody,
        Some(words) if words == ["any"] => AcceptsKeysOf::Any,
        Some(vendors) => {
            if vendors.is_empty() || vendors.iter().any(|vendor| vendor.trim().is_empty() || vendor == "any") {
                let message = "must be `any`, or the names of vendors whose keys the host takes beside its own";
                problem("accepts_keys_of", message.into());
            }
            AcceptsKeysOf::Vendors(vendors)
        }
    }
}

/// Every host that a name with braces stands for: `{a,b}.example.com` is two. `None` if these are too many: each pair of braces multiplies them.
fn expand_braces(host: &str) -> Option<Vec<String>> {
    let (mut names, mut left) = (vec![String::new()], host);
    while let Some((before, rest)) = left.split_once('{')
        && let Some((choices, behind)) = rest.split_once('}')
    {
        let choices: Vec<&str> = choices.split(',').collect();
        if names.len() * choices.len() > MAX_HOSTS_OF_A_ROW {
            return None;
        }
        names = names.iter().flat_map(|name| choices.iter().map(move |choice| format!("{name}{before}{choice}"))).collect();
        left = behind;
    }
    names.iter_mut().for_each(|name| name.push_str(left));
    Some(names)
}

/// Whether the pattern can only match hosts of one vendor: there is no `*` in the last two labels.
fn is_single_vendor_pattern(pattern: &str) -> bool {
    let labels: Vec<&str> = pattern.split('.').collect();
    let last_two = labels.len().saturating_sub(2);
    labels.iter().enumerate().all(|(index, label)| label.matches('*').count() <= usize::from(index < last_two))
}

/// Whether the name is a host in lower case, with a port only if that is not the scheme's default.
fn is_host(name: &str) -> bool {
    let known = |url: Url| url.path() == "/" && url.query().is_none() && url.fragment().is_none() && url.username().is_empty();
    let spelled = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | ':' | '[' | ']');
    !name.is_empty() && name.chars().all(spelled) && Url::parse(&format!("https://{name}")).is_ok_and(known)
}

fn check_confidence(word: &str) -> Result<Confidence, String> {
    Confidence::ALL.into_iter().find(|confidence| confidence.as_str() == word).ok_or_else(|| {
        format!(
            "`{word}` is none of D (documented), C (published code relies on it), L (reported from a live call), I (inferred)"
        )
    })
}

fn check_unprobed(
    files: BTreeMap<String, UnprobedFile>,
    homes: &BTreeMap<String, Url>,
    problems: &mut Vec<Problem>,
) -> BTreeMap<String, Unprobed> {
    let mut unprobed = BTreeMap::new();
    for (provider, UnprobedFile { reason, note }) in files {
        let place = format!("unprobed.{provider}");
        if homes.contains_key(&provider) {
            problems.push(Problem::at(&place, "a host's row says where this provider is; it cannot be both"));
        }
        if note.trim().is_empty() {
            problems.push(Problem::at(format!("{place}.note"), "is required: say to a person why this provider is not asked"));
        }
        match UnprobedReason::ALL.into_iter().find(|known| known.as_str() == reason) {
            Some(reason) => drop(unprobed.insert(provider, Unprobed { reason, note })),
            None => problems
                .push(Problem::at(format!("{place}.reason"), format!("must be KEYLESS or TENANT_ENDPOINT, found `{reason}`"))),
        }
    }
    unprobed
}

fn check_key_shape(declared: usize, file: KeyShapeFile, problems: &mut Vec<Problem>) -> Option<KeyShape> {
    let place = &format!("key_shapes[{declared}]");
    if file.prefix.is_empty() || file.vendor.is_empty() {
        problems.push(Problem::at(place, "needs a prefix and a vendor"));
        return None;
    }
    let kind = match file.kind.as_deref() {
        None | Some("api_key") => KeyKind::ApiKey,
        Some("oauth") => KeyKind::OAuth,
        Some("refresh_token") => KeyKind::RefreshToken,
        Some("administrative") => KeyKind::Administrative,
        Some(other) => {
            let message = format!("must be `api_key`, `oauth`, `refresh_token` or `administrative`, found `{other}`");
            problems.push(Problem::at(format!("{place}.kind"), message));
            return None;
        }
    };
    Some(KeyShape {
        prefix: file.prefix,
        vendor: file.vendor,
        kind,
        plan: file.plan,
        providers: file.providers.unwrap_or_default(),
        declared,
    })
}

fn check_probes(files: Option<Vec<ProbeFile>>, place: &str, problems: &mut Vec<Problem>) -> Vec<Probe> {
    let mut probes: Vec<Probe> = Vec::new();
    for (index, file) in files.unwrap_or_default().into_iter().enumerate() {
        let place = format!("{place}[{index}]");
        match check_probe(file, &place) {
            Ok(probe) if probes.iter().any(|other| other.name == probe.name) => {
                problems.push(Problem::at(format!("{place}.name"), format!("`{}` appears twice in this ladder", probe.name)));
            }
            Ok(probe) => probes.push(probe),
            Err(list) => problems.extend(list),
        }
    }
    probes
}

/// Checks one probe. Returns all of its problems.
pub(crate) fn check_probe(file: ProbeFile, place: &str) -> Result<Probe, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut problem = |field: &str, message: String| problems.push(Problem::at(format!("{place}.{field}"), message));
    let fingerprint = *blake3::hash(&serde_json::to_vec(&file).unwrap_or_default()).as_bytes();
    if file.name.is_empty() || !file.name.bytes().all(|byte| byte.is_ascii_lowercase() || matches!(byte, b'-' | b'_')) {
        problem("name", "is required: lower-case letters, `-` and `_`".into());
    }
    let method = file.method.as_deref().map_or(Ok(Method::Get), str::parse).unwrap_or_else(|_| {
        problem("method", format!("must be GET or POST, found `{}`", file.method.as_deref().unwrap_or_default()));
        Method::Get
    });
    check_path(&file.path, &mut problem);
    match (method, &file.body) {
        (Method::Get, Some(_)) => problem("body", "goes with POST only".into()),
        (_, Some(body)) => {
            if let Some(text) = misspelt_placeholder(body) {
                problem("body", format!("`{text}` is no placeholder; the only one is the whole string `{{model}}`"));
            }
        }
        (_, None) => {}
    }
    if file.thinking.is_some() && !file.body.as_ref().is_some_and(serde_json::Value::is_object) {
        problem("thinking", "is laid over the body, which must be an object".into());
    }
    let auth = check_auth(file.auth.unwrap_or_default(), &mut problem);
    let headers = check_headers(file.headers.unwrap_or_default(), &mut problem);
    if file.budget_ms.is_some_and(|budget| budget == 0 || budget > MAX_BUDGET_MS) {
        problem("budget_ms", format!("must be 1 to {MAX_BUDGET_MS}"));
    }
    let expect = check_expect(file.expect, &mut problem);
    let surface = match file.surface.as_deref() {
        None => Surface::of_path(&file.path),
        Some(word) => word.parse().unwrap_or_else(|_| {
            let known: Vec<&str> = Surface::VARIANTS.iter().map(|surface| surface.as_str()).collect();
            problem("surface", format!("`{word}` is none of {}", known.join(", ")));
            Surface::KeyInformation
        }),
    };
    let signals = check_signals(file.signals.unwrap_or_default(), &mut problem);
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
        thinking: file.thinking,
        budget: file.budget_ms.map(Duration::from_millis),
        costs_money: file.costs_money.unwrap_or(false),
        refuses_bad_keys: file.refuses_bad_keys.unwrap_or(false),
        surface,
        expect,
        signals,
        common: Arc::default(),
        fingerprint,
    })
}

fn check_path(path: &str, problem: &mut dyn FnMut(&str, String)) {
    let tail = path.strip_prefix("{base}").unwrap_or(path);
    if !tail.starts_with('/') || tail.starts_with("//") || tail.contains(['\\', '#']) || tail.contains("..") {
        problem("path", format!("`{path}` must begin with `/` or `{{base}}/` and stay on the host"));
    }
    if tail.replace(MODEL, "").contains(['{', '}']) {
        problem("path", format!("`{path}` may hold `{{model}}` and, at its beginning, `{{base}}`; nothing else in braces"));
    }
}

fn check_headers(
    file: impl IntoIterator<Item = (String, String)>,
    problem: &mut dyn FnMut(&str, String),
) -> Vec<(String, String)> {
    let mut headers = Vec::new();
    for (name, value) in file {
        let name = name.to_ascii_lowercase();
        let token = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'));
        if !token || RESERVED_HEADERS.contains(&name.as_str()) || !value.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            problem("headers", format!("`{name}` is not a header that a row may set, or its value is not plain ASCII"));
        }
        headers.push((name, value));
    }
    headers
}

fn check_signals(file: Vec<SignalFile>, problem: &mut dyn FnMut(&str, String)) -> Vec<Signal> {
    let mut signals: Vec<(usize, Signal)> = Vec::new();
    for (index, signal) in file.into_iter().enumerate() {
        match check_signal(signal) {
            Ok(signal) => {
                if let Some((earlier, _)) = signals.iter().find(|(_, earlier)| covers(earlier, &signal)) {
                    problem(&format!("signals[{index}]"), format!("can never match: signals[{earlier}] takes its every answer"));
                }
                signals.push((index, signal));
            }
            Err(message) => problem(&format!("signals[{index}]"), message),
        }
    }
    signals.into_iter().map(|(_, signal)| signal).collect()
}

fn check_expect(file: Option<ExpectFile>, problem: &mut dyn FnMut(&str, String)) -> Vec<Expected> {
    let pairs: Vec<(String, String)> = match file {
        None => Vec::new(),
        Some(ExpectFile::Paths(paths)) => paths.into_iter().map(|path| (path, "any".to_owned())).collect(),
        Some(ExpectFile::Kinds(kinds)) => kinds.into_iter().collect(),
    };
    if pairs.is_empty() || pairs.iter().any(|(path, _)| path.trim().is_empty()) {
        problem("expect", "is required: JSON paths of which a good answer has one; a bare 2xx proves nothing".into());
    }
    let mut expect = Vec::new();
    for (path, word) in pairs {
        match word.parse::<Kind>() {
            Ok(kind) => expect.push(Expected { path, kind }),
            Err(_) => {
                let known: Vec<&str> = Kind::VARIANTS.iter().map(|kind| (*kind).into()).collect();
                problem("expect", format!("`{path}: {word}` is none of {}", known.join(", ")));
            }
        }
    }
    expect
}

fn check_auth(words: Vec<String>, problem: &mut dyn FnMut(&str, String)) -> Vec<HeaderFamily> {
    if words.is_empty() {
        problem("auth", "is required: at least one of bearer, x-api-key, x-goog-api-key, api-key".into());
    }
    let mut auth = Vec::new();
    for word in words {
        match word.parse::<HeaderFamily>() {
            Ok(family) if auth.contains(&family) => problem("auth", format!("`{word}` appears twice")),
            Ok(family) => auth.push(family),
            Err(_) => problem("auth", format!("`{word}` is none of bearer, x-api-key, x-goog-api-key, api-key")),
        }
    }
    auth
}

/// A string in a body that looks like a placeholder but is not `{model}`.
fn misspelt_placeholder(body: &serde_json::Value) -> Option<&str> {
    use serde_json::Value;
    match body {
        Value::String(text) => (text.starts_with('{') && text.ends_with('}') && text != MODEL).then_some(text),
        Value::Array(items) => items.iter().find_map(misspelt_placeholder),
        Value::Object(fields) => fields.values().find_map(misspelt_placeholder),
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    }
}

fn check_signal(file: SignalFile) -> Result<Signal, String> {
    let SignalFile { status, contains, lacks, path, equals, one_of, at_most, verdict, page, stop, confidence, note } = file;
    let outcome = check_outcome(&verdict)?;
    let statuses = status.unwrap_or_default();
    if let Some(status) = statuses.iter().find(|status| !(200..=599).contains(*status)) {
        return Err(format!("status {status} is not an HTTP answer's"));
    }
    let mut tests = Vec::new();
    if let Some(texts) = contains.map(OneOrMany::into_vec) {
        if texts.is_empty() || texts.iter().any(String::is_empty) {
            return Err("`contains` is empty, and so would match every body".into());
        }
        tests.push(BodyTest::Contains(texts.iter().map(|text| text.to_ascii_lowercase()).collect()));
    }
    if let Some(text) = lacks {
        if text.is_empty() {
            return Err("`lacks` is empty, and so would match no body".into());
        }
        tests.push(BodyTest::Lacks(text.to_ascii_lowercase()));
    }
    let values = match (equals, one_of) {
        (Some(value), None) => Some(vec![value]),
        (None, values) => values,
        (Some(_), Some(_)) => return Err("takes `equals` or `one_of`, not both".into()),
    };
    let paths = path.map(OneOrMany::into_vec).filter(|paths| !paths.is_empty() && paths.iter().all(|path| !path.is_empty()));
    match (paths, values, at_most) {
        (None, None, None) => {}
        (Some(paths), Some(values), None) if !values.is_empty() => tests.push(BodyTest::IsOneOf(paths, values)),
        (Some(paths), None, Some(limit)) => tests.push(BodyTest::AtMost(paths, limit)),
        _ => return Err("`path` goes with `equals`, `one_of` or `at_most`, and they with `path`".into()),
    }
    let positive = tests.iter().any(|test| !matches!(test, BodyTest::Lacks(_)));
    if statuses.is_empty() && !positive {
        return Err("matches every answer; give it a status or a test of the body".into());
    }
    // A status alone does not prove that a key was accepted, and neither does a body that only lacks a text. A failing server says nothing about
    // keys.
    let says_yes = matches!(outcome, SignalOutcome::Accepted);
    if says_yes && (!positive || statuses.is_empty() || statuses.iter().any(|status| *status >= 500)) {
        return Err("ACCEPTED needs statuses below 500 and a test of what the body says".into());
    }
    let page = page.unwrap_or(false);
    if page && says_yes {
        return Err("ACCEPTED does not go with `page`: a page for people is never a `yes`".into());
    }
    let stop = stop.unwrap_or(false);
    let confidence = confidence.map(|word| check_confidence(&word)).transpose()?;
    Ok(Signal { statuses, tests, outcome, page, stop, confidence, note })
}

fn check_outcome(word: &str) -> Result<SignalOutcome, String> {
    match word {
        "ACCEPTED" => Ok(SignalOutcome::Accepted),
        "RESTRICTED" => Ok(SignalOutcome::Restricted),
        word => match word.parse::<Verdict>().ok() {
            Some(
                verdict @ (Verdict::Invalid
                | Verdict::Forbidden
                | Verdict::QuotaExhausted
                | Verdict::RateLimited
                | Verdict::ProviderError
                | Verdict::UnexpectedResponse),
            ) => Ok(SignalOutcome::Verdict(verdict)),
            // VALID needs a calibration, and the other verdicts are not about the content of a response.
            _ => Err(format!(
                "verdict `{word}` is none of ACCEPTED, RESTRICTED, INVALID, FORBIDDEN, QUOTA_EXHAUSTED, RATE_LIMITED, \
                 PROVIDER_ERROR, UNEXPECTED_RESPONSE"
            )),
        },
    }
}

/// Whether the earlier signal matches every response that the later one matches.
fn covers(earlier: &Signal, later: &Signal) -> bool {
    let statuses = BTreeSet::from_iter(&earlier.statuses);
    let wider =
        statuses.is_empty() || (!later.statuses.is_empty() && later.statuses.iter().all(|status| statuses.contains(status)));
    wider && earlier.tests.iter().all(|test| later.tests.contains(test))
}
