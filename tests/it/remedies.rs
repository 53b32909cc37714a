//! Every remedy works. For every runtime, model and variable of the embedded documents: a tenant who follows a denial's remedy with a good
//! value is not denied, and the runtime reads the variable that the value was put into.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use byok_gate::{
    core::{
        catalogue::Catalogue,
        classify::Finding,
        credential::LivenessQuery,
        derive::derive,
        engine::{Boxed, Engine, LivenessSource, Observed},
        policy::Policy,
        registry::{Auth, Registry, Runtime},
        snapshot::{Origin, Snapshot},
    },
    domain::{
        decision::{Decision, Outcome},
        protocol::HeaderFamily,
        verdict::{ServedFrom, Verdict, WarningCode},
    },
};
use tokio::time::Instant;

use crate::support::case::Spec;

const TOKEN: &str = "sk-ant-oat01-made-up-and-no-other-one-is-so-and-here-is-its-other-half-made-up";
const DEAD: &str = "made-up-dead-key";

/// Every vendor refuses one key, and accepts every other.
struct Vendors;

impl LivenessSource for Vendors {
    fn observe<'a>(&'a self, query: LivenessQuery<'a>, _: Option<Duration>, _: Instant) -> Boxed<'a, Observed> {
        let verdict = if query.secret.expose() == DEAD { Verdict::Invalid } else { Verdict::Valid };
        let observed = Observed {
            shared: false,
            finding: Arc::new(Finding::bare(verdict)),
            observed_at: SystemTime::UNIX_EPOCH,
            age: Duration::ZERO,
            served_from: ServedFrom::Probe,
            retry_after: Duration::ZERO,
            earlier_valid: None,
        };
        Box::pin(async move { observed })
    }
}

/// The embedded documents, and a runtime for every other program of which something is known.
fn engine() -> Engine {
    let more = "  google-adk: {providers: [{name: google}]}\n  gemini-cli: {providers: [{name: google}]}\n  \
                opencode: {providers: [{name: anthropic-api}, {name: openai-api}, {name: google}, {name: openrouter}, {name: groq}]}\n";
    let registry = format!("{}{more}", include_str!("../../src/core/registry/default.yaml"));
    let registry = Registry::parse("registry", registry.as_bytes(), &|_| None).unwrap().value;
    let catalogue = Catalogue::embedded().unwrap().value;
    let origin = Origin::new(String::new(), SystemTime::UNIX_EPOCH);
    let snapshot = Snapshot::new(Arc::new(registry), Arc::new(catalogue), Arc::new(Policy::default()), origin.clone(), origin);
    Engine::new(snapshot, Arc::new(Vendors), None)
}

type Values = BTreeMap<String, String>;

async fn decide(engine: &Engine, runtime: &str, model: &str, values: &Values) -> Decision {
    let spec = Spec {
        runtime: Some(runtime.into()),
        model: model.into(),
        organization_id: "org-1".into(),
        workspace: values.iter().map(|(name, value)| (name.clone(), Some(value.clone()))).collect(),
        ..Spec::default()
    };
    engine.decide(&spec.request(), Instant::now() + Duration::from_secs(5)).await.decision
}

/// A good value for this variable.
fn good(name: &str) -> String {
    match name {
        "CLAUDE_CODE_OAUTH_TOKEN" => TOKEN.to_owned(),
        "CODEX_AUTH_JSON" | "CODEX_CHATGPT_AUTH_JSON" => r#"{"OPENAI_API_KEY": "made-up-good-key"}"#.to_owned(),
        _ => "made-up-good-key".to_owned(),
    }
}

/// One option of a remedy.
#[derive(Debug, Default, Clone)]
struct Way {
    set: Vec<String>,
    remove: Vec<String>,
    /// The first is to be replaced by what the second holds.
    replace: Vec<String>,
    model: Option<String>,
    /// A model of this provider's, by its name for people.
    model_of: Option<String>,
}

/// The options of a remedy: `; or` separates them, names after `remove` are removed, and all others are set.
fn ways(remedy: &str, names: &BTreeSet<String>) -> Vec<Way> {
    let split = remedy.replace(", or choose ", "; or choose ");
    let mut ways = Vec::new();
    for alternative in split.split("; or ") {
        let mut way = Way::default();
        let mut verb = "set";
        for word in alternative.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
            match word {
                "save" | "set" | "choose" | "remove" | "replace" => verb = word,
                name if names.contains(name) => match verb {
                    "remove" => way.remove.push(name.to_owned()),
                    "replace" => way.replace.push(name.to_owned()),
                    // Of what is within a file, the file's own variable is the one that is set.
                    _ if alternative.contains(&format!("\"{name}\":")) => {}
                    _ => way.set.push(name.to_owned()),
                },
                _ => {}
            }
        }
        way.model = alternative.split("such as `").nth(1).and_then(|rest| rest.split('`').next()).map(str::to_owned);
        let owner = alternative.split("choose a model of ").nth(1).and_then(|rest| rest.split([',', ';']).next());
        way.model_of = owner.filter(|_| way.model.is_none()).map(str::to_owned);
        ways.push(way);
    }
    ways
}

/// The values after this option, once for each name that is set.
fn gone(values: &Values, way: &Way) -> Vec<(Option<String>, Values)> {
    let mut left = values.clone();
    left.retain(|name, _| !way.remove.contains(name));
    if let [into, from] = way.replace.as_slice() {
        let value = values.get(from).unwrap_or_else(|| panic!("{from} is named and not set: {way:?}"));
        left.insert(into.clone(), value.clone());
    }
    if way.set.is_empty() {
        return vec![(None, left)];
    }
    let each = way.set.iter().map(|name| {
        let mut values = left.clone();
        values.insert(name.clone(), good(name));
        (Some(name.clone()), values)
    });
    each.collect()
}

/// Models of each provider that takes a credential, listed and by pattern, with the provider's name for people.
fn models(registry: &Registry, runtime: &str, found: &Runtime) -> Vec<(String, String)> {
    let mut models = Vec::new();
    for offer in &found.offers {
        let provider = registry.provider(offer);
        if provider.is_platform() || provider.auth == Auth::Ambient {
            continue;
        }
        let name = &provider.name;
        let forms = [format!("{name}/made-up"), format!("{name}:made-up")];
        let more = ["glm-made-up", "mimo-made-up", "deepseek-made-up", "gemini-made-up", "gemini/made-up", "anthropic/made-up"];
        let more =
            more.into_iter().chain(["openai:made-up", "claude-made-up", "qwen-made-up", "minimax:made-up"]).map(str::to_owned);
        let owned = |model: &String| derive(registry, runtime, model, &|_| false).is_ok_and(|one| one.provider.name == *name);
        let listed = offer.models.iter().find(|model| !offer.has_withdrawn(model)).cloned();
        let by_pattern = forms.into_iter().chain(more).find(owned);
        models.extend(listed.into_iter().chain(by_pattern).map(|model| (provider.display_name.clone(), model)));
    }
    models
}

const VALUES: [&str; 12] = [
    DEAD,
    "made-up-good-key",
    "sk-ant-api03-made-up",
    "sk-or-made-up",
    "sk-proj-made-up-made-up-made-up-made-up",
    "sk-ant-admin01-made-up",
    "sk-ant-ort01-made-up",
    TOKEN,
    "ghp_madeUp0madeUp0madeUp0madeUp0madeUp01",
    "Bearer made-up-key",
    "{\"tokens\": {}}",
    "your-api-key",
];

#[tokio::test]
async fn who_follows_a_remedy_is_allowed_and_the_runtime_reads_what_was_set() {
    let engine = engine();
    let snapshot = engine.snapshot();
    let names = snapshot.credential_names().clone();
    let (mut denied, mut followed) = (0, 0);
    let mut faults = BTreeMap::<String, usize>::new();
    for (runtime, found) in snapshot.registry.runtimes() {
        let all = models(&snapshot.registry, runtime, found);
        for (_, model) in &all {
            let model = model.clone();
            let relevant = snapshot.relevant_names(found, &model);
            let single = names.iter().flat_map(|name| VALUES.iter().map(move |value| vec![(name.clone(), (*value).to_owned())]));
            let pairs = relevant.iter().flat_map(|one| relevant.iter().map(move |other| (one, other)));
            let pairs = pairs.filter(|(one, other)| one != other).flat_map(|(one, other)| {
                VALUES.iter().map(|value| vec![(one.clone(), (*value).to_owned()), (other.clone(), good(other))])
            });
            for values in std::iter::once(Vec::new()).chain(single).chain(pairs) {
                // Names of no provider here are covered by one value.
                if values.len() == 1 && !relevant.contains(&values[0].0) && values[0].1 != VALUES[1] {
                    continue;
                }
                let values: Values = values.into_iter().collect();
                let decision = decide(&engine, runtime, &model, &values).await;
                let Outcome::Deny(deny) = &decision.outcome else { continue };
                denied += 1;
                let remedy = deny.refusal.remedy();
                for way in ways(&remedy, &names) {
                    if way.set.is_empty() && way.remove.is_empty() && way.replace.is_empty() {
                        continue;
                    }
                    for (set, values_then) in gone(&values, &way) {
                        followed += 1;
                        let of_owner = way.model_of.as_ref().map(|owner| {
                            let theirs = all.iter().find(|(of, _)| of == owner);
                            theirs.map(|(_, model)| model.as_str()).unwrap_or_else(|| panic!("{runtime} has no {owner}"))
                        });
                        let chosen = way.model.as_deref().or(of_owner).unwrap_or(&model);
                        let then = decide(&engine, runtime, chosen, &values_then).await;
                        let unread = then.warnings.iter().any(|warning| {
                            warning.code == WarningCode::UnusedCredential
                                && set.as_ref().is_none_or(|set| warning.env_names.contains(set))
                        });
                        let fault = match &then.outcome {
                            // A tenant who only removed something may lack a credential now; that is another denial.
                            Outcome::Deny(next) if set.is_some() || next.refusal.code() == deny.refusal.code() => {
                                format!("{}: {}", next.refusal.code(), next.refusal.message())
                            }
                            Outcome::Allow(_) if unread && set.is_some() => format!("{set:?} is not read"),
                            _ => continue,
                        };
                        let held: Vec<&String> = values.keys().collect();
                        *faults.entry(format!("{runtime} {model} {held:?}\n  {remedy}\n  -> {fault}")).or_default() += 1;
                    }
                }
            }
        }
    }
    let told = faults.keys().take(400).cloned().collect::<Vec<_>>().join("\n");
    assert!(faults.is_empty(), "{} remedies of {denied} lead nowhere:\n{told}", faults.len());
    assert!(denied > 1000 && followed > 1000, "{denied} denials, {followed} ways");
}

/// The words, where a remedy has to name another model, another variable, or the form of a file.
#[tokio::test]
async fn a_remedy_says_which_variable_in_which_form_and_with_which_model() {
    let engine = engine();
    let sk = "sk-ant-api03-made-up";
    for (runtime, model, values, remedy) in [
        (
            "claude-code",
            "opus",
            &[("CLAUDE_CODE_OAUTH_TOKEN", sk)][..],
            "save the token that `claude setup-token` prints as CLAUDE_CODE_OAUTH_TOKEN; or save the key as ANTHROPIC_API_KEY, remove \
             CLAUDE_CODE_OAUTH_TOKEN, and choose a model of Anthropic API, such as `claude-sonnet-4-6`",
        ),
        (
            "claude-code",
            "claude-opus-4-8",
            &[("ANTHROPIC_API_KEY", TOKEN)],
            "make an API key in the provider's console and save it as ANTHROPIC_API_KEY; or save the token as \
             CLAUDE_CODE_OAUTH_TOKEN, remove ANTHROPIC_API_KEY, and choose a model of Claude subscription (OAuth), such as `sonnet`",
        ),
        (
            "claude-code",
            "sonnet",
            &[("ANTHROPIC_API_KEY", sk)],
            "set CLAUDE_CODE_OAUTH_TOKEN as a secret of the workspace or of the organization, and remove ANTHROPIC_API_KEY, which the \
             runtime sends in its place; or choose a model of Anthropic API, such as `claude-sonnet-4-6`, which uses the ANTHROPIC_API_KEY \
             that is set",
        ),
        (
            "claude-code",
            "opus",
            &[("CLAUDE_CODE_OAUTH_TOKEN", TOKEN), ("ANTHROPIC_API_KEY", TOKEN)],
            "remove ANTHROPIC_API_KEY from the workspace's secrets",
        ),
        (
            "hermes",
            "kimi-coding/kimi-k2",
            &[("ANTHROPIC_API_KEY", sk)],
            "save a key of provider `kimi-coding` as KIMI_API_KEY; or choose a model of vendor `anthropic`",
        ),
        (
            "hermes",
            "kimi-coding/kimi-k2",
            &[("ANTHROPIC_API_KEY", DEAD)],
            "check that the key is active; make a new one if it is not, and save it as KIMI_API_KEY; a key for api.moonshot.cn is \
             refused here too",
        ),
        (
            "codex",
            "gpt-5.5",
            &[],
            "set CODEX_AUTH_JSON or CODEX_CHATGPT_AUTH_JSON as a secret of the workspace or of the organization; or save a key of OpenAI \
             API as CODEX_AUTH_JSON, in the form `{\"OPENAI_API_KEY\": \"THE KEY\"}`",
        ),
        (
            "codex",
            "gpt-5.5",
            &[("OPENAI_API_KEY", DEAD)],
            "check that the key is active; make a new one if it is not, and save it as CODEX_AUTH_JSON, in the form \
             `{\"OPENAI_API_KEY\": \"THE KEY\"}`; a key for us.api.openai.com, eu.api.openai.com or ae.api.openai.com is refused here too",
        ),
        (
            "codex",
            "gpt-5.5",
            &[("CODEX_AUTH_JSON", "sk-proj-made-up")],
            "save it as CODEX_AUTH_JSON, in the form `{\"OPENAI_API_KEY\": \"THE KEY\"}`, or save there the whole file auth.json that a \
             login writes",
        ),
        (
            "codex",
            "gpt-5.5",
            &[("CODEX_AUTH_JSON", "{\"OPENAI_API_KEY\": \"sk-proj-made-up \"}")],
            "save the key as CODEX_AUTH_JSON, in the form `{\"OPENAI_API_KEY\": \"THE KEY\"}`, without blanks or line breaks around it",
        ),
        (
            "hermes",
            "ai-gateway/made-up",
            &[("AI_GATEWAY_API_KEY", DEAD)],
            "choose a model of another provider: the runtime reads no key of this one",
        ),
    ] {
        let values: Values = values.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let decision = decide(&engine, runtime, model, &values).await;
        let Outcome::Deny(deny) = decision.outcome else { panic!("{runtime} {model} {values:?} is allowed") };
        assert_eq!(deny.refusal.remedy(), remedy, "{runtime} {model} {values:?}");
    }
    let unread = [("OPENAI_API_KEY".to_owned(), good("OPENAI_API_KEY"))].into();
    let decision = decide(&engine, "codex", "gpt-5.5", &unread).await;
    assert_eq!(
        decision.warnings[0].message,
        "runtime `codex` does not read OPENAI_API_KEY; save the key as CODEX_AUTH_JSON, in the form `{\"OPENAI_API_KEY\": \"THE KEY\"}`"
    );
}

/// Some versions of a program send the variable in the one header, some in the other: a host that takes the second alone takes the workspace's own.
#[tokio::test]
async fn a_header_of_another_version_is_no_other_header() {
    struct BearerOnly;
    impl LivenessSource for BearerOnly {
        fn observe<'a>(&'a self, query: LivenessQuery<'a>, max_age: Option<Duration>, deadline: Instant) -> Boxed<'a, Observed> {
            Box::pin(async move {
                let observed = Vendors.observe(query, max_age, deadline).await;
                let finding = Finding { family: Some(HeaderFamily::Bearer), wrong_header: true, ..Finding::bare(Verdict::Valid) };
                Observed { finding: Arc::new(finding), ..observed }
            })
        }
    }
    let engine = Engine::new((*engine().snapshot()).clone(), Arc::new(BearerOnly), None);
    for (runtime, model, env_name, is_own) in [
        ("claude-code", "claude-opus-4-8", "ANTHROPIC_API_KEY", true),
        ("opencode", "claude-made-up", "ANTHROPIC_API_KEY", false),
    ] {
        let values = [(env_name.to_owned(), good(env_name))].into();
        let decision = decide(&engine, runtime, model, &values).await;
        let told = format!("{:?} {:?}", decision.trace, decision.warnings);
        assert!(matches!(decision.outcome, Outcome::Allow(_)), "{told}");
        assert_eq!(told.contains("another header"), !is_own, "{runtime}: {told}");
        assert_eq!(
            decision.warnings.iter().any(|warning| warning.code == WarningCode::WrongHeader),
            !is_own,
            "{runtime}: {told}"
        );
    }
}
