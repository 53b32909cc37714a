//! Checks a registry document and builds a `Registry`. Reports all problems at once.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use regex::{Regex, RegexBuilder};
use regex_automata::nfa::thompson::NFA;
use url::Url;

use super::{
    Auth, Offer, Provider, Registry, Runtime,
    file::{EndpointVarFile, OfferFile, ProviderFile, RegistryFile, RuntimeFile, Skeleton},
    overlap::{Comparable, Overlap},
};
use crate::{
    core::{catalogue, yaml},
    domain::{
        problem::{Loaded, Problem, Problems},
        protocol::{PLATFORM, Protocol},
        request::is_env_name,
        similar::most_similar,
    },
};

/// The version of the schema that this service reads.
const SCHEMA_VERSION: i64 = 1;

/// The known values of `auth_mode`. Any other means a key in a header, with a warning.
const KNOWN_AUTH_MODES: [&str; 5] =
    ["anthropic_api", "oauth", "third_party_anthropic_compat", "wif_adc", "openai_compat_responses"];
/// The only known value of `thinking_policy`.
const THINKING_REQUIRED: &str = "require_enabled";

/// The most credential names that may matter to one model. A request has room for twice as many credentials, one for each scope.
const MAX_RELEVANT_NAMES: usize = 32;
/// The most pairs of patterns of one runtime that are compared at a load, and the most of which an overlap is told one by one. Only patterns that may
/// begin with anything, or with the same text, come to so many.
const MAX_COMPARED_PAIRS: usize = 20_000;
const MAX_OVERLAP_WARNINGS: usize = 100;
/// The most memory of one compiled pattern, and of all. `^gpt-` needs 300 bytes, `^\w+[:/]` 50 KB, `^\w{150}` 7 MB.
const MAX_PATTERN_BYTES: usize = 1024 * 1024;
const MAX_PATTERNS_BYTES: usize = 8 * 1024 * 1024;
/// The longest answer to ListModels. gRPC clients accept 4 MiB.
const MAX_LIST_MODELS_BYTES: usize = 3 * 1024 * 1024;
/// The size of an entry of that answer without its texts: tags, lengths, two numbers.
const LIST_MODELS_ENTRY_BYTES: usize = 32;

const SIMPLER_PATTERN: &str = "write a simpler one, such as `[a-z0-9]` in place of `\\w`, and repeat less";

/// Looks up an environment variable.
type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Problems and warnings so far.
#[derive(Default)]
struct Findings {
    problems: Vec<Problem>,
    warnings: Vec<Problem>,
}

pub(super) fn check(document: &str, bytes: &[u8], env: Env<'_>) -> Result<Loaded<Registry>, Problems> {
    let mut found = Findings::default();
    let mut unknown_keys = Vec::new();
    let file = match yaml::parse::<RegistryFile>(bytes) {
        Ok(Loaded { value, warnings }) => {
            unknown_keys = warnings.into_iter().map(with_nearest_key).collect();
            found.warnings.clone_from(&unknown_keys);
            value
        }
        Err(problem) => match part_by_part(bytes, &mut found.problems) {
            Some(file) => {
                // A problem between the parts, such as a repeated key, does not show in any of them.
                if !found.problems.contains(&problem) {
                    found.problems.push(problem);
                }
                file
            }
            None => return Err(Problems { document: document.to_owned(), list: vec![problem] }),
        },
    };
    let value = check_file(file, bytes, env, &mut found);
    let Findings { problems, warnings } = found;
    match value {
        Some(value) if problems.is_empty() => Ok(Loaded { value, warnings: yaml::with_lines(bytes, warnings) }),
        _ => {
            // An unknown key may be a misspelt one that is missing elsewhere, so it is listed too.
            let unknown_keys = unknown_keys
                .into_iter()
                .map(|problem| Problem { message: problem.message.replacen(yaml::IGNORED, "", 1), ..problem });
            let list = yaml::with_lines(bytes, problems.into_iter().chain(unknown_keys).collect());
            Err(Problems { document: document.to_owned(), list })
        }
    }
}

/// Reads a document that does not fit the schema part by part, so that a problem in one provider does not hide those of another. `None` if the parts
/// cannot be told apart or are too many.
fn part_by_part(bytes: &[u8], problems: &mut Vec<Problem>) -> Option<RegistryFile> {
    let mut parts = yaml::Parts::of(bytes)?;
    let Skeleton { providers, runtimes } = parts.read::<Skeleton>("").ok()??;
    let (providers, runtimes) = (providers.unwrap_or_default().len(), runtimes.unwrap_or_default());
    // A provider with a problem is read a second time for its name.
    if !parts.can_read(2 * providers + runtimes.len() + 1) {
        return None;
    }
    fn keep<T>(read: Result<Option<T>, Problem>, problems: &mut Vec<Problem>) -> Option<T> {
        read.unwrap_or_else(|problem| {
            problems.push(problem);
            None
        })
    }
    let schema_version = keep(parts.read("schema_version"), problems);
    let mut read_providers = Vec::new();
    for index in 0..providers {
        let place = format!("providers[{index}]");
        let read = keep(parts.read::<ProviderFile>(&place), problems).unwrap_or_else(|| {
            let name = parts.read::<String>(&format!("{place}.name")).ok().flatten().unwrap_or_default();
            ProviderFile { name, unread: true, ..ProviderFile::default() }
        });
        read_providers.push(read);
    }
    let mut read_runtimes = BTreeMap::new();
    for name in runtimes.into_keys() {
        if let Some(read) = keep(parts.read::<RuntimeFile>(&format!("runtimes.{name}")), problems) {
            read_runtimes.insert(name, read);
        }
    }
    Some(RegistryFile { schema_version, providers: Some(read_providers), runtimes: Some(read_runtimes) })
}

fn check_file(file: RegistryFile, bytes: &[u8], env: Env<'_>, found: &mut Findings) -> Option<Registry> {
    let faulty_version = found.problems.iter().any(|problem| problem.place == "schema_version");
    if file.schema_version != Some(SCHEMA_VERSION) && !faulty_version {
        let version = file.schema_version.map_or_else(|| "nothing".to_owned(), |version| version.to_string());
        found.problems.push(Problem::at("schema_version", format!("must be {SCHEMA_VERSION}, found {version}")));
    }
    let providers = check_providers(file.providers.unwrap_or_default(), env, found);
    let runtimes = check_runtimes(file.runtimes.unwrap_or_default(), &providers, found);
    check_list_models_size(&runtimes, &providers, found);
    // Offers hold positions in this list. If a provider could not be built, there are problems and nothing is built.
    let providers: Vec<Provider> = providers.into_iter().filter_map(|(_, provider)| provider).collect();
    if !found.problems.is_empty() {
        return None;
    }
    let credential_names = providers.iter().flat_map(|provider| provider.auth_env.iter().cloned()).collect();
    let revision = yaml::revision(bytes);
    let sha256 = ring::digest::digest(&ring::digest::SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let mut runtimes = runtimes;
    for (index, offer) in runtimes.values_mut().flat_map(|runtime: &mut Runtime| &mut runtime.offers).enumerate() {
        offer.index = index;
    }
    Some(Registry { revision, sha256, providers, runtimes, credential_names })
}

/// The problem of an unknown key, with the key that was probably meant.
fn with_nearest_key(mut problem: Problem) -> Problem {
    /// Keys less similar than this are not suggested.
    const SIMILAR: f64 = 0.92;
    let fields = [
        yaml::fields_of::<RegistryFile>(),
        yaml::fields_of::<ProviderFile>(),
        yaml::fields_of::<EndpointVarFile>(),
        yaml::fields_of::<RuntimeFile>(),
        yaml::fields_of::<OfferFile>(),
    ];
    let key = problem.place.rsplit('.').next().unwrap_or_default();
    let nearest = most_similar(fields.into_iter().flatten().copied(), |field| strsim::jaro_winkler(key, field));
    if let Some((nearest, _)) = nearest.filter(|(nearest, likeness)| *likeness >= SIMILAR && *nearest != key) {
        problem.message.push_str(&format!("; the nearest is `{nearest}`"));
    }
    problem
}

/// Each provider's name, and the provider if it could be built. The positions are those of the document.
fn check_providers(files: Vec<ProviderFile>, env: Env<'_>, found: &mut Findings) -> Vec<(String, Option<Provider>)> {
    if files.is_empty() {
        found.problems.push(Problem::at("providers", "no providers; declare at least one"));
    } else if !files.iter().any(|file| file.name == PLATFORM) {
        found.warnings.push(Problem::at("providers", "none is named `platform`: nothing can be billed to the platform"));
    }
    let mut names = BTreeMap::new();
    let mut vendors = BTreeMap::new();
    let (mut providers, mut pattern_bytes) = (Vec::new(), 0);
    for (index, file) in files.into_iter().enumerate() {
        let place = format!("providers[{index}]");
        if let Some(first) = names.insert(file.name.clone(), index).filter(|_| !file.name.is_empty()) {
            found.problems.push(Problem::at(
                format!("{place}.name"),
                format!("duplicate provider name `{}`, first used by providers[{first}]; rename one", file.name),
            ));
        }
        if let Some(vendor) = file.upstream_vendor.clone().filter(|vendor| !vendor.is_empty())
            && let Some(first) = vendors.insert(vendor.clone(), index)
        {
            found.problems.push(Problem::at(
                format!("{place}.upstream_vendor"),
                format!("upstream_vendor `{vendor}` must be unique; providers[{first}] has it too"),
            ));
        }
        let name = file.name.clone();
        let provider = if file.unread { None } else { check_provider(file, &place, env, found) };
        pattern_bytes += provider.as_ref().map_or(0, |provider| compiled_bytes(&provider.pattern));
        providers.push((name, provider));
        if pattern_bytes > MAX_PATTERNS_BYTES {
            let message = format!("with it the compiled patterns need more than {MAX_PATTERNS_BYTES} bytes; {SIMPLER_PATTERN}");
            found.problems.push(Problem::at(format!("{place}.model_prefix_match"), message));
            // Each further one could need as much.
            break;
        }
    }
    providers
}

fn check_provider(mut file: ProviderFile, place: &str, env: Env<'_>, found: &mut Findings) -> Option<Provider> {
    let Findings { problems, warnings } = found;
    let before = problems.len();
    let suffix = if file.name.is_empty() { String::new() } else { format!(" (provider `{}`)", file.name) };
    let mut problem =
        |field: &str, message: String| problems.push(Problem::at(format!("{place}.{field}"), format!("{message}{suffix}")));
    let mut warning =
        |field: &str, message: String| warnings.push(Problem::at(format!("{place}.{field}"), format!("{message}{suffix}")));
    check_words(&file, &mut problem, &mut warning);
    let protocol = check_protocol(&file.protocol, &mut problem);
    let auth_env = check_auth_env(file.auth_env.take().unwrap_or_default(), &mut problem);
    let auth_token_env = file.auth_token_env.take().filter(|name| !name.is_empty());
    if let Some(name) = auth_token_env.as_ref().filter(|name| !is_env_name(name)) {
        problem("auth_token_env", not_a_variable(name));
    }
    let pattern = check_pattern(&file.model_prefix_match, &mut problem);
    let Bases { openai, anthropic, is_per_tenant } = check_bases(&mut file, env, &mut problem, &mut warning);
    let mut probes = Vec::new();
    for (index, probe) in file.probe.unwrap_or_default().into_iter().enumerate() {
        match catalogue::check_probe(probe, &format!("{place}.probe[{index}]")) {
            Ok(probe) => probes.push(probe),
            Err(list) => problems.extend(list),
        }
    }
    if problems.len() > before {
        return None;
    }
    let protocol = protocol?;
    Some(Provider {
        name: file.name,
        display_name: file.display_name,
        protocol,
        auth: match file.auth_mode.as_str() {
            "oauth" => Auth::OAuth,
            "wif_adc" => Auth::Ambient,
            _ => Auth::Key,
        },
        base_url: match protocol {
            Protocol::OpenAi => openai.or_else(|| anthropic.clone()),
            Protocol::Anthropic => anthropic.clone().or(openai),
        },
        anthropic_base_url: anthropic,
        is_per_tenant,
        auth_env: auth_env.into(),
        auth_token_env,
        pattern: pattern?,
        wire_model_prefix: file.wire_model_prefix.unwrap_or_default(),
        thinking_required: file.thinking_policy.as_deref() == Some(THINKING_REQUIRED),
        probes,
        deprecated: file.deprecated.unwrap_or_default(),
    })
}

/// Reports a problem or a warning about a field.
type Report<'a> = &'a mut dyn FnMut(&str, String);

/// Checks a provider's names and words.
fn check_words(file: &ProviderFile, problem: Report<'_>, warning: Report<'_>) {
    for (field, value) in [("name", &file.name), ("display_name", &file.display_name), ("auth_mode", &file.auth_mode)] {
        if value.trim().is_empty() {
            problem(field, "is required".into());
        } else if value.chars().any(char::is_control) {
            problem(field, "holds a control character; remove it".into());
        }
    }
    if !file.auth_mode.trim().is_empty() && !KNOWN_AUTH_MODES.contains(&file.auth_mode.as_str()) {
        let known = KNOWN_AUTH_MODES.join(", ");
        warning("auth_mode", format!("`{}` is none of {known}; taken for a key in a header", file.auth_mode));
    }
    if let Some(policy) = file.thinking_policy.as_ref().filter(|policy| *policy != THINKING_REQUIRED) {
        warning("thinking_policy", format!("`{policy}` is not known here and changes nothing; `{THINKING_REQUIRED}` is"));
    }
}

fn check_protocol(word: &str, problem: Report<'_>) -> Option<Protocol> {
    match word {
        "openai" => Some(Protocol::OpenAi),
        "anthropic" => Some(Protocol::Anthropic),
        other => {
            problem("protocol", format!("protocol must be `openai` or `anthropic`, found `{other}`"));
            None
        }
    }
}

fn check_pattern(text: &str, problem: Report<'_>) -> Option<Regex> {
    if text.is_empty() {
        problem("model_prefix_match", "is required: a pattern for the models that no list names".into());
        return None;
    }
    let faulty = |fault: regex::Error| {
        let message = match fault {
            regex::Error::CompiledTooBig(limit) => format!("needs more than {limit} bytes once compiled; {SIMPLER_PATTERN}"),
            fault => format!("does not compile: {}", last_line(&fault.to_string())),
        };
        problem("model_prefix_match", message);
    };
    RegexBuilder::new(text).size_limit(MAX_PATTERN_BYTES).build().map_err(faulty).ok()
}

/// About how much memory a compiled pattern needs.
fn compiled_bytes(pattern: &Regex) -> usize {
    NFA::new(pattern.as_str()).map_or(0, |automaton| automaton.memory_usage())
}

/// Where a provider is called.
struct Bases {
    openai: Option<Url>,
    anthropic: Option<Url>,
    /// One of them depends on the tenant.
    is_per_tenant: bool,
}

fn check_bases(file: &mut ProviderFile, env: Env<'_>, problem: Report<'_>, warning: Report<'_>) -> Bases {
    let vars = file.endpoint_vars.take().unwrap_or_default();
    for (name, EndpointVarFile { env, .. }) in &vars {
        if !is_env_name(env) {
            problem(&format!("endpoint_vars.{name}.env"), not_a_variable(env));
        }
        let placeholder = format!("{{{name}}}");
        let used = |template: &Option<String>| template.as_ref().is_some_and(|template| template.contains(&placeholder));
        if !used(&file.base_url_template) && !used(&file.base_url_anthropic) {
            warning(&format!("endpoint_vars.{name}"), format!("no base URL holds `{placeholder}`"));
        }
    }
    let mut is_per_tenant = false;
    let mut base = |field: &str, template: &Option<String>| {
        let template = template.as_deref().filter(|template| !template.is_empty())?;
        let url = match resolve(template, &vars, env) {
            Ok(url) => url,
            Err(Unresolved::Wrong(message)) => {
                problem(field, message);
                return None;
            }
            Err(Unresolved::PerTenant(message)) => {
                is_per_tenant = true;
                warning(field, message);
                return None;
            }
        };
        if url.scheme() == "http" && !is_loopback(&url) {
            warning(
                field,
                format!(
                    "`{url}` is plain http beyond loopback, which is dialled only if `egress.allow_plain_http` names the host; use https"
                ),
            );
        }
        Some(url)
    };
    let openai = base("base_url_template", &file.base_url_template);
    let anthropic = base("base_url_anthropic", &file.base_url_anthropic);
    // If one of the two is unknown, it is unknown which would be called.
    let (openai, anthropic) = if is_per_tenant { (None, None) } else { (openai, anthropic) };
    Bases { openai, anthropic, is_per_tenant }
}

fn check_auth_env(names: Vec<String>, problem: Report<'_>) -> Vec<String> {
    if names.is_empty() {
        problem("auth_env", "is required: name at least one variable".into());
    }
    for (index, name) in names.iter().enumerate() {
        if !is_env_name(name) {
            problem(&format!("auth_env[{index}]"), not_a_variable(name));
        } else if names.iter().take(index).any(|earlier| earlier == name) {
            problem(&format!("auth_env[{index}]"), format!("`{name}` appears twice; remove one"));
        }
    }
    names
}

fn not_a_variable(name: &str) -> String {
    format!("{name:?} is not a variable's name (A-Z a-z 0-9 _, not beginning with a digit)")
}

fn check_runtimes(
    files: BTreeMap<String, RuntimeFile>,
    providers: &[(String, Option<Provider>)],
    found: &mut Findings,
) -> BTreeMap<String, Runtime> {
    // Runtimes that could not be read have already left their problems.
    if files.is_empty() && !found.problems.iter().any(|problem| problem.place.starts_with("runtimes.")) {
        found.problems.push(Problem::at("runtimes", "no runtimes; declare at least one"));
    }
    // Of two with one name, which is a problem, the first counts.
    let mut positions: HashMap<&str, usize> = HashMap::new();
    for (position, (name, _)) in providers.iter().enumerate() {
        positions.entry(name).or_insert(position);
    }
    let mut runtimes = BTreeMap::new();
    for (name, file) in files {
        let place = format!("runtimes.{name}");
        if name.trim().is_empty() || name.chars().any(char::is_control) {
            found.problems.push(Problem::at(&place, "a runtime's name is blank or holds a control character; rename it"));
        }
        let offers = file.providers.unwrap_or_default();
        if offers.is_empty() {
            found
                .problems
                .push(Problem::at(format!("{place}.providers"), "empty native provider set; name at least one provider"));
        }
        let mut seen = BTreeSet::new();
        let mut built = Vec::new();
        for (index, offer) in offers.into_iter().enumerate() {
            let place = format!("{place}.providers[{index}]");
            if !seen.insert(offer.name.clone()) {
                let message = format!("provider `{}` is named twice in this runtime; remove one", offer.name);
                found.problems.push(Problem::at(&place, message));
            }
            built.extend(check_offer(offer, &place, &positions, found));
        }
        check_patterns(&place, &built, providers, found);
        check_listings(&place, &built, providers, found);
        runtimes.insert(name, Runtime::new(file.display_name.unwrap_or_default(), built));
    }
    runtimes
}

fn check_offer(offer: OfferFile, place: &str, positions: &HashMap<&str, usize>, found: &mut Findings) -> Option<Offer> {
    let models = offer.models.unwrap_or_default();
    let withdrawn = offer.withdrawn_models.unwrap_or_default();
    let are_withdrawn: BTreeSet<&String> = withdrawn.iter().collect();
    for (field, list) in [("models", &models), ("withdrawn_models", &withdrawn)] {
        let mut seen = BTreeSet::new();
        for (index, model) in list.iter().enumerate() {
            let place = format!("{place}.{field}[{index}]");
            if model.trim() != model || model.is_empty() || model.chars().any(char::is_control) {
                let message = format!("model id {model:?} is blank, padded or holds a control character; write the bare id");
                found.problems.push(Problem::at(&place, message));
            } else if !seen.insert(model) {
                found.problems.push(Problem::at(&place, format!("model id `{model}` appears twice; remove one")));
            } else if field == "models" && are_withdrawn.contains(model) {
                let message = format!("model id `{model}` is withdrawn too, and so not offered; take it off one of the lists");
                found.warnings.push(Problem::at(&place, message));
            }
        }
    }
    if offer.name == PLATFORM && models.is_empty() && withdrawn.is_empty() {
        found.problems.push(Problem::at(
            place,
            "the platform needs a list of models: by pattern alone it could own, and be billed for, an unlisted model",
        ));
    }
    let Some(position) = positions.get(offer.name.as_str()).copied() else {
        let message = format!("unknown provider `{}`; declare it under `providers`, or correct the name", offer.name);
        found.problems.push(Problem::at(place, message));
        return None;
    };
    Some(Offer { provider: position, index: 0, models, withdrawn })
}

/// Warns about patterns that match the same model, because its owner may then be ambiguous. Also checks how many credential names matter to a model
/// of each pattern.
fn check_patterns(place: &str, offers: &[Offer], providers: &[(String, Option<Provider>)], found: &mut Findings) {
    let owners: Vec<&Provider> = offers.iter().filter_map(|offer| providers.get(offer.provider)?.1.as_ref()).collect();
    let patterns: Vec<Comparable> = owners.iter().map(|provider| Comparable::of(provider.pattern.as_str())).collect();
    // The credential names of every provider that may match the same model.
    let mut names: Vec<BTreeSet<&str>> =
        owners.iter().map(|provider| provider.auth_env.iter().map(String::as_str).collect()).collect();
    let (pairs, are_all) = Comparable::pairs(&patterns, MAX_COMPARED_PAIRS);
    let mut overlaps = 0_usize;
    for (index, at) in &pairs {
        let (Some(one), Some(two)) = (owners.get(*index), owners.get(*at)) else { continue };
        let (Some(pattern), Some(other)) = (patterns.get(*index), patterns.get(*at)) else { continue };
        let common = pattern.common(other);
        if common == Overlap::None {
            continue;
        }
        for (own, theirs) in [(*index, two), (*at, one)] {
            if let Some(names) = names.get_mut(own) {
                names.extend(theirs.auth_env.iter().map(String::as_str));
            }
        }
        if let Overlap::At(model) = common {
            overlaps += 1;
            if overlaps <= MAX_OVERLAP_WARNINGS {
                let both = format!("the patterns of providers `{}` and `{}` overlap", one.name, two.name);
                found.warnings.push(Problem::at(place, format!("{both}: both match `{model}`; make them disjoint")));
            }
        }
    }
    if overlaps > MAX_OVERLAP_WARNINGS {
        let more = overlaps - MAX_OVERLAP_WARNINGS;
        found.warnings.push(Problem::at(place, format!("{more} more pairs of patterns overlap; make them disjoint")));
    }
    if !are_all {
        let message = format!(
            "only {MAX_COMPARED_PAIRS} pairs of patterns were compared, and more may overlap; begin each pattern with `^` and a text of its own"
        );
        found.warnings.push(Problem::at(place, message));
    }
    for (one, names) in owners.iter().zip(&names).filter(|(_, names)| names.len() > MAX_RELEVANT_NAMES) {
        let what = format!("a model that the pattern of provider `{}` matches", one.name);
        found.problems.push(Problem::at(place, too_many_names(&what, names.len())));
    }
}

/// Checks how many credential names matter to each model that is listed.
fn check_listings(place: &str, offers: &[Offer], providers: &[(String, Option<Provider>)], found: &mut Findings) {
    let mut names: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for offer in offers {
        let Some(provider) = providers.get(offer.provider).and_then(|(_, provider)| provider.as_ref()) else { continue };
        for model in offer.models.iter().chain(&offer.withdrawn) {
            names.entry(model).or_default().extend(provider.auth_env.iter().map(String::as_str));
        }
    }
    for (model, names) in names.iter().filter(|(_, names)| names.len() > MAX_RELEVANT_NAMES) {
        found.problems.push(Problem::at(place, too_many_names(&format!("model `{model}`"), names.len())));
    }
}

fn too_many_names(what: &str, count: usize) -> String {
    format!("{count} credential names matter to {what}; a request has room for {MAX_RELEVANT_NAMES}: shorten `auth_env`")
}

/// Checks that an answer to ListModels can hold the whole registry.
fn check_list_models_size(runtimes: &BTreeMap<String, Runtime>, providers: &[(String, Option<Provider>)], found: &mut Findings) {
    let mut bytes = 0;
    for (name, runtime) in runtimes {
        for offer in &runtime.offers {
            let Some(provider) = providers.get(offer.provider).and_then(|(_, provider)| provider.as_ref()) else { continue };
            let names: usize = provider.auth_env.iter().map(|name| name.len() + 2).sum();
            let around = LIST_MODELS_ENTRY_BYTES
                + name.len()
                + runtime.display_name.len()
                + provider.name.len()
                + provider.display_name.len()
                + names;
            if offer.models.is_empty() {
                bytes += around + provider.pattern.as_str().len();
            }
            bytes += offer.models.iter().chain(&offer.withdrawn).map(|model| around + model.len()).sum::<usize>();
        }
    }
    if bytes > MAX_LIST_MODELS_BYTES {
        let message = format!(
            "ListModels would answer with about {bytes} bytes, and gRPC clients take 4 MiB; list fewer models, or own them by pattern \
             (at most {MAX_LIST_MODELS_BYTES} bytes)"
        );
        found.problems.push(Problem::at("runtimes", message));
    }
}

/// Why a template does not give a URL.
enum Unresolved {
    /// The template is wrong.
    Wrong(String),
    /// A placeholder has no value here.
    PerTenant(String),
}

impl From<String> for Unresolved {
    fn from(message: String) -> Self {
        Self::Wrong(message)
    }
}

/// The template with its placeholders filled, as a URL without a trailing slash.
fn resolve(template: &str, vars: &BTreeMap<String, EndpointVarFile>, env: Env<'_>) -> Result<Url, Unresolved> {
    let mut text = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        let (name, tail) = after.split_once('}').ok_or_else(|| format!("`{template}` has a `{{` without a `}}`"))?;
        text.push_str(before);
        let var = vars.get(name).ok_or_else(|| format!("placeholder `{{{name}}}` has no entry in endpoint_vars"))?;
        let value = env(&var.env).filter(|value| !value.trim().is_empty()).or_else(|| var.default.clone()).ok_or_else(|| {
            Unresolved::PerTenant(format!(
                "placeholder `{{{name}}}`: {} is not set here and there is no default; keys of this provider cannot be checked",
                var.env
            ))
        })?;
        // The first placeholder may stand for a whole base URL, up to a slash. Any other must be one label or one segment, so that it cannot change
        // the host.
        let whole = text.is_empty() && (tail.is_empty() || tail.starts_with('/'));
        let label = !value.is_empty() && value.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        if !(whole || label) {
            let message = "could change the host: it may hold only letters, digits, `-` and `_`";
            return Err(format!("the value of {} for `{{{name}}}` {message}", var.env).into());
        }
        text.push_str(if whole { value.trim_end_matches('/') } else { &value });
        rest = tail;
    }
    text.push_str(rest);
    let url = Url::parse(text.trim_end_matches('/')).map_err(|fault| format!("`{text}` is not a URL: {fault}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("base URL must be http(s), and https beyond loopback; `{text}` is neither").into());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("a base URL must not hold user information; credentials come from auth_env".to_owned().into());
    }
    if url.query().is_some() || url.fragment().is_some() || url.host().is_none() {
        // A query may hold a key, so the URL is not shown.
        return Err("must be a base URL: a host and a path, no query, no fragment".to_owned().into());
    }
    Ok(url)
}

/// Whether the host is this machine, by name or by address.
pub(crate) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

fn last_line(text: &str) -> &str {
    text.lines().last().unwrap_or(text).trim_start_matches("error: ")
}
