//! From the schema's words to a `Registry`: every guard, and every problem at once.

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;
use url::Url;

use super::{
    Arm, Auth, PLATFORM, Protocol, Provider, Registry, Runtime,
    file::{ArmFile, EndpointVarFile, ProviderFile, RegistryFile, RuntimeFile},
};
use crate::{
    catalogue,
    problem::{Loaded, Problem, Problems},
    spec::is_env_name,
    yaml,
};

/// The version of the schema that this service reads.
const SCHEMA_VERSION: i64 = 1;

/// Answers for a variable of the environment.
type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

pub(super) fn check(document: &str, bytes: &[u8], env: Env<'_>) -> Result<Loaded<Registry>, Problems> {
    let failed = |list| Problems { document: document.to_owned(), list };
    let Loaded { value: file, mut warnings } = yaml::parse::<RegistryFile>(bytes).map_err(|problem| failed(vec![problem]))?;
    let mut problems = Vec::new();
    if file.schema_version != Some(SCHEMA_VERSION) {
        let found = file.schema_version.map_or_else(|| "nothing".to_owned(), |version| version.to_string());
        problems.push(Problem::at("schema_version", format!("must be {SCHEMA_VERSION}, found {found}")));
    }
    let providers = check_providers(file.providers.unwrap_or_default(), env, &mut problems);
    let runtimes = check_runtimes(file.runtimes.unwrap_or_default(), &providers, &mut problems, &mut warnings);
    // A provider that could not be built leaves problems behind, and then nothing is built from positions in this list.
    let providers: Vec<Provider> = providers.into_iter().filter_map(|(_, provider)| provider).collect();
    if !problems.is_empty() {
        return Err(failed(problems));
    }
    let credential_names = providers.iter().flat_map(|provider| provider.auth_env.iter().cloned()).collect();
    let revision = blake3::hash(bytes).to_hex().chars().take(16).collect();
    let value = Registry { revision, providers, runtimes, credential_names };
    Ok(Loaded { value, warnings })
}

/// Each with its name, at its position, whether or not it could be built.
fn check_providers(files: Vec<ProviderFile>, env: Env<'_>, problems: &mut Vec<Problem>) -> Vec<(String, Option<Provider>)> {
    if files.is_empty() {
        problems.push(Problem::at("providers", "no providers; declare at least one"));
    }
    let mut names = BTreeMap::new();
    let mut vendors = BTreeMap::new();
    let mut providers = Vec::new();
    for (index, file) in files.into_iter().enumerate() {
        let place = format!("providers[{index}]");
        if let Some(first) = names.insert(file.name.clone(), index).filter(|_| !file.name.is_empty()) {
            problems.push(Problem::at(
                format!("{place}.name"),
                format!("duplicate provider name `{}`, first used by providers[{first}]", file.name),
            ));
        }
        if let Some(vendor) = file.upstream_vendor.clone().filter(|vendor| !vendor.is_empty())
            && let Some(first) = vendors.insert(vendor.clone(), index)
        {
            problems.push(Problem::at(
                format!("{place}.upstream_vendor"),
                format!("upstream_vendor `{vendor}` must be unique; providers[{first}] has it too"),
            ));
        }
        providers.push((file.name.clone(), check_provider(file, &place, env, problems)));
    }
    providers
}

fn check_provider(file: ProviderFile, place: &str, env: Env<'_>, problems: &mut Vec<Problem>) -> Option<Provider> {
    let before = problems.len();
    let name = file.name.clone();
    let mut problem = |field: &str, message: String| {
        let named = if name.is_empty() { String::new() } else { format!(" (provider `{name}`)") };
        problems.push(Problem::at(format!("{place}.{field}"), format!("{message}{named}")));
    };
    for (field, value) in [("name", &file.name), ("display_name", &file.display_name), ("auth_mode", &file.auth_mode)] {
        if value.trim().is_empty() {
            problem(field, "is required".into());
        } else if value.chars().any(char::is_control) {
            problem(field, "holds a control character".into());
        }
    }
    let protocol = match file.protocol.as_str() {
        "openai" => Some(Protocol::OpenAi),
        "anthropic" => Some(Protocol::Anthropic),
        other => {
            problem("protocol", format!("protocol must be `openai` or `anthropic`, found `{other}`"));
            None
        }
    };
    let auth_env = file.auth_env.unwrap_or_default();
    if auth_env.is_empty() {
        problem("auth_env", "is required: name at least one variable".into());
    }
    for name in &auth_env {
        if !is_env_name(name) {
            problem("auth_env", format!("`{name}` is not a variable's name (A-Z a-z 0-9 _, not beginning with a digit)"));
        }
    }
    let pattern = match file.model_prefix_match.as_str() {
        "" => {
            problem("model_prefix_match", "is required".into());
            None
        }
        text => Regex::new(text)
            .map_err(|fault| problem("model_prefix_match", format!("does not compile: {}", last_line(&fault.to_string()))))
            .ok(),
    };
    let vars = file.endpoint_vars.unwrap_or_default();
    let mut base = |field: &str, template: &Option<String>| {
        let template = template.as_deref().filter(|template| !template.is_empty())?;
        resolve(template, &vars, env).map_err(|message| problem(field, message)).ok()
    };
    let openai = base("base_url_template", &file.base_url_template);
    let anthropic = base("base_url_anthropic", &file.base_url_anthropic);
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
        has_anthropic_surface: anthropic.is_some(),
        base_url: match protocol {
            Protocol::OpenAi => openai.or(anthropic),
            Protocol::Anthropic => anthropic.or(openai),
        },
        auth_env,
        auth_token_env: file.auth_token_env.filter(|name| !name.is_empty()),
        pattern: pattern?,
        wire_model_prefix: file.wire_model_prefix.unwrap_or_default(),
        probes,
    })
}

fn check_runtimes(
    files: BTreeMap<String, RuntimeFile>,
    providers: &[(String, Option<Provider>)],
    problems: &mut Vec<Problem>,
    warnings: &mut Vec<Problem>,
) -> BTreeMap<String, Runtime> {
    if files.is_empty() {
        problems.push(Problem::at("runtimes", "no runtimes; declare at least one"));
    }
    let mut runtimes = BTreeMap::new();
    for (name, file) in files {
        let place = format!("runtimes.{name}");
        if name.trim().is_empty() || name.chars().any(char::is_control) {
            problems.push(Problem::at(&place, "a runtime's name is blank or holds a control character"));
        }
        let arms = file.providers.unwrap_or_default();
        if arms.is_empty() {
            problems.push(Problem::at(format!("{place}.providers"), "empty native provider set; name at least one provider"));
        }
        let mut seen = BTreeSet::new();
        let mut built = Vec::new();
        for (index, arm) in arms.into_iter().enumerate() {
            let place = format!("{place}.providers[{index}]");
            if !seen.insert(arm.name.clone()) {
                problems.push(Problem::at(&place, format!("provider `{}` is named twice", arm.name)));
            }
            built.extend(check_arm(arm, &place, providers, problems));
        }
        warn_of_overlaps(&place, &built, providers, warnings);
        runtimes.insert(name, Runtime::new(built));
    }
    runtimes
}

fn check_arm(arm: ArmFile, place: &str, providers: &[(String, Option<Provider>)], problems: &mut Vec<Problem>) -> Option<Arm> {
    let models = arm.models.unwrap_or_default();
    let withdrawn = arm.withdrawn_models.unwrap_or_default();
    let mut seen = BTreeSet::new();
    for model in models.iter().chain(&withdrawn) {
        if model.trim() != model || model.is_empty() || model.chars().any(char::is_control) {
            problems.push(Problem::at(place, format!("model id {model:?} is blank, padded or holds a control character")));
        }
    }
    for model in &models {
        if !seen.insert(model) {
            problems.push(Problem::at(place, format!("model id `{model}` stands twice; remove one")));
        }
    }
    if arm.name == PLATFORM && models.is_empty() && withdrawn.is_empty() {
        problems.push(Problem::at(
            place,
            "the platform needs a list of models: by pattern alone it could own, and be billed for, a model that nobody listed",
        ));
    }
    let Some(position) = providers.iter().position(|(name, _)| *name == arm.name) else {
        problems.push(Problem::at(place, format!("unknown provider `{}`", arm.name)));
        return None;
    };
    Some(Arm { provider: position, models, withdrawn })
}

/// Two patterns that match one another's models, or one another's literal beginning, can make a model ambiguous.
fn warn_of_overlaps(place: &str, arms: &[Arm], providers: &[(String, Option<Provider>)], warnings: &mut Vec<Problem>) {
    let of = |arm: &Arm| providers.get(arm.provider).and_then(|(_, provider)| provider.as_ref());
    for (index, left) in arms.iter().enumerate() {
        for right in arms.iter().skip(index + 1) {
            let (Some(one), Some(two)) = (of(left), of(right)) else { continue };
            if one.pattern.as_str() == two.pattern.as_str() {
                warnings.push(Problem::at(
                    place,
                    format!(
                        "providers `{}` and `{}` have one and the same pattern; models by it are ambiguous",
                        one.name, two.name
                    ),
                ));
                continue;
            }
            let witness =
                left.models.iter().chain(&right.models).find(|model| one.pattern.is_match(model) && two.pattern.is_match(model));
            if let Some(model) = witness {
                warnings.push(Problem::at(
                    place,
                    format!("the patterns of providers `{}` and `{}` overlap: both match `{model}`", one.name, two.name),
                ));
            }
        }
    }
}

/// The template with its placeholders filled, as a URL without a trailing slash.
fn resolve(template: &str, vars: &BTreeMap<String, EndpointVarFile>, env: Env<'_>) -> Result<Url, String> {
    let mut text = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        let (name, tail) = after.split_once('}').ok_or_else(|| format!("`{template}` has a `{{` without a `}}`"))?;
        text.push_str(before);
        let var = vars.get(name).ok_or_else(|| format!("placeholder `{{{name}}}` has no entry in endpoint_vars"))?;
        let value = env(&var.env)
            .filter(|value| !value.trim().is_empty())
            .or_else(|| var.default.clone())
            .ok_or_else(|| format!("placeholder `{{{name}}}`: {} is not set and there is no default", var.env))?;
        // A whole base URL may stand first; anything else is one label or segment, so that it cannot change the host.
        let whole = text.is_empty();
        let label = !value.is_empty() && value.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        if !(whole || label) {
            return Err(format!("the value of {} for `{{{name}}}` may hold only letters, digits, `-` and `_`", var.env));
        }
        text.push_str(if whole { value.trim_end_matches('/') } else { &value });
        rest = tail;
    }
    text.push_str(rest);
    let url = Url::parse(text.trim_end_matches('/')).map_err(|fault| format!("`{text}` is not a URL: {fault}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("`{text}` must be an https URL"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("a base URL must not hold user information; credentials come from auth_env".into());
    }
    if url.query().is_some() || url.fragment().is_some() || url.host().is_none() {
        return Err(format!("`{text}` must be a base URL: a host and a path, no query, no fragment"));
    }
    Ok(url)
}

fn last_line(text: &str) -> &str {
    text.lines().last().unwrap_or(text).trim_start_matches("error: ")
}
