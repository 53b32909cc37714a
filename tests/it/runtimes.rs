//! The facts about runtimes, over the embedded registry and catalogue: every pair of relevant variables, in every scope.

use std::sync::Arc;

use byok_gate::{
    core::{
        catalogue::Catalogue,
        credential::LivenessQuery,
        evaluate::{Next, evaluate},
        policy::{Facts, Policy},
        registry::{Auth, Registry},
        snapshot::{Origin, Snapshot},
    },
    domain::{
        decision::ChosenBecause,
        denial::Refusal,
        protocol::HeaderFamily,
        request::{Request, Scope},
        verdict::{DenyCode, WarningCode},
    },
};

use crate::support::case::Spec;

fn snapshot() -> Snapshot {
    let (registry, catalogue) = (Registry::embedded(&|_| None).unwrap().value, Catalogue::embedded().unwrap().value);
    let origin = Origin::new(String::new(), std::time::SystemTime::UNIX_EPOCH);
    Snapshot::new(Arc::new(registry), Arc::new(catalogue), Arc::new(Policy::default()), origin.clone(), origin)
}

fn request(runtime: &str, model: &str, credentials: &[(&str, Scope, Option<&str>)]) -> Request {
    let of = |wanted: Scope| {
        let rows = credentials.iter().filter(|(_, scope, _)| *scope == wanted);
        rows.map(|(name, _, value)| ((*name).to_owned(), value.map(str::to_owned))).collect()
    };
    Spec {
        runtime: Some(runtime.into()),
        model: model.into(),
        organization_id: "org-1".into(),
        workspace: of(Scope::Workspace),
        organization: of(Scope::Organization),
        ..Spec::default()
    }
    .request()
}

/// What comes of it, in words: `asks NAME in HEADER at HOST`, or the code of the refusal, then the warnings.
fn summary(snapshot: &Snapshot, request: &Request) -> String {
    let evaluation = evaluate(snapshot, request, 0, &|_| String::new());
    let asks = |query: &LivenessQuery<'_>| {
        let header = query.preference.family.map_or("any header", HeaderFamily::as_str);
        format!("asks {} in {header} at {}", query.env_name, query.endpoint.host)
    };
    let first = match &evaluation.next {
        Next::Ask(questions) => {
            let then = questions.fallbacks.iter().map(|(query, _)| format!(", then {}", asks(query))).collect::<String>();
            format!("{}{then}", asks(&questions.first))
        }
        Next::Rule(Facts::Refused(refusal)) => {
            let (file, right) = match &**refusal {
                Refusal::Malformed { save_as, right_place, .. } => {
                    (save_as.as_ref().is_some_and(|place| place.in_auth_json), right_place.as_ref())
                }
                _ => (false, None),
            };
            let right = right.map_or_else(String::new, |place| format!(", right in {}", place.env_name));
            format!("{}{}{right}", refusal.code(), if file { ", save it in auth.json" } else { "" })
        }
        Next::Rule(Facts::NotValid { evidence, .. }) => {
            assert_eq!(evidence.model, request.spec.model);
            format!("{} of {}", evidence.verdict, evidence.env_name)
        }
        Next::Rule(other) => format!("{other:?}"),
    };
    let warnings = evaluation.log.warnings.iter().map(|warning| format!(" {}:{}", warning.code, warning.env_names.join("+")));
    first + &warnings.collect::<String>()
}

/// The facts, one by one: who sends what. Each was seen at a recording server or read in the launcher (the catalogue has the sources).
#[test]
fn the_launchers_and_programs_of_november_2026() {
    use Scope::{Organization, Workspace};
    let snapshot = snapshot();
    for (runtime, model, credentials, expected) in TABLE {
        let credentials: Vec<_> = credentials
            .iter()
            .map(|(name, scope, value)| (*name, if *scope == 'w' { Workspace } else { Organization }, *value))
            .collect();
        assert_eq!(summary(&snapshot, &request(runtime, model, &credentials)), *expected, "{runtime} {model} {credentials:?}");
    }
}

/// A decision says why it judged this value and no other.
#[test]
fn the_choice_has_a_reason() {
    let snapshot = snapshot();
    let set = |name| (name, Scope::Workspace, Some(name));
    for (runtime, model, credentials, expected) in [
        ("claude-code", "kimi-for-coding", &[set("KIMI_API_KEY")][..], ChosenBecause::Sent),
        ("codex", "gpt-5.5", &[set("OPENAI_API_KEY")], ChosenBecause::Unread),
        (
            "claude-code",
            "claude-opus-4-8",
            &[set("ANTHROPIC_API_KEY"), set("ANTHROPIC_AUTH_TOKEN")],
            ChosenBecause::SentInPlaceOf("ANTHROPIC_AUTH_TOKEN".into()),
        ),
        (
            "hermes",
            "minimax-cn/made-up",
            &[set("MINIMAX_CN_API_KEY"), set("MINIMAX_API_KEY")],
            ChosenBecause::SentBefore("MINIMAX_API_KEY".into()),
        ),
    ] {
        let request = request(runtime, model, credentials);
        let judged = evaluate(&snapshot, &request, 0, &|_| String::new()).log.resolution.credential;
        let judged = judged.map(|judged| judged.chosen_because);
        assert_eq!(judged, Some(expected), "{runtime} {model}");
    }
}

/// A key in a token's place is right at a provider of the same API, whichever is offered first.
#[test]
fn a_misplaced_key_is_sent_to_no_other_api() {
    let more = "  other: {providers: [{name: openai-api}, {name: anthropic-oauth, models: [opus]}, {name: anthropic-api}]}\n";
    let registry = format!("{}{more}", include_str!("../../src/core/registry/default.yaml"));
    let registry = Registry::parse("registry", registry.as_bytes(), &|_| None).unwrap().value;
    let known = snapshot();
    let origin = known.registry_origin.clone();
    let snapshot =
        Snapshot::new(Arc::new(registry), Arc::clone(&known.catalogue), Arc::clone(&known.policy), origin.clone(), origin);
    let token = [("CLAUDE_CODE_OAUTH_TOKEN", Scope::Workspace, Some("sk-ant-api03-made-up"))];
    let summary = summary(&snapshot, &request("other", "opus", &token));
    assert_eq!(summary, "MALFORMED_BYOK_CREDENTIAL, right in ANTHROPIC_API_KEY");
}

type Row = (&'static str, &'static str, &'static [(&'static str, char, Option<&'static str>)], &'static str);

const TABLE: &[Row] = &[
    // A source host's token that travels along.
    (
        "claude-code",
        "kimi-for-coding",
        &[
            ("KIMI_API_KEY", 'w', Some("made-up-k")),
            ("ANTHROPIC_AUTH_TOKEN", 'w', Some("ghp_madeUp0madeUp0madeUp0madeUp0madeUp01")),
        ],
        "asks KIMI_API_KEY in x-api-key at api.kimi.com EXPOSED_CREDENTIAL:ANTHROPIC_AUTH_TOKEN",
    ),
    (
        "claude-code",
        "kimi-for-coding",
        &[("KIMI_API_KEY", 'w', Some("made-up-k"))],
        "asks KIMI_API_KEY in x-api-key at api.kimi.com",
    ),
    (
        "claude-code",
        "kimi-for-coding",
        &[("KIMI_API_KEY", 'w', Some("made-up-k")), ("ANTHROPIC_API_KEY", 'o', Some("sk-ant-api03-made-up"))],
        "SHADOWED_BYOK_CREDENTIAL",
    ),
    (
        "claude-code",
        "kimi-for-coding",
        &[("KIMI_API_KEY", 'w', Some("made-up-k")), ("ANTHROPIC_API_KEY", 'w', Some("made-up-k"))],
        "asks ANTHROPIC_API_KEY in x-api-key at api.kimi.com",
    ),
    (
        "claude-code",
        "kimi-for-coding",
        &[("KIMI_API_KEY", 'w', Some("made-up-k")), ("ANTHROPIC_AUTH_TOKEN", 'w', Some("sk-ant-api03-made-up"))],
        "asks KIMI_API_KEY in x-api-key at api.kimi.com EXPOSED_CREDENTIAL:ANTHROPIC_AUTH_TOKEN",
    ),
    (
        "claude-code",
        "kimi-for-coding",
        &[("KIMI_API_KEY", 'w', Some("made-up-k")), ("ANTHROPIC_API_KEY", 'w', None)],
        "CREDENTIAL_SCOPE_UNREADABLE",
    ),
    (
        "claude-code",
        "kimi-for-coding",
        &[("KIMI_API_KEY", 'w', Some(" made-up-k\n"))],
        "asks KIMI_API_KEY in x-api-key at api.kimi.com TRIMMED_CREDENTIAL:KIMI_API_KEY",
    ),
    (
        "claude-code",
        "claude-opus-4-8",
        &[("ANTHROPIC_API_KEY", 'w', Some("made-up-a"))],
        "asks ANTHROPIC_API_KEY in x-api-key at api.anthropic.com",
    ),
    (
        "claude-code",
        "claude-opus-4-8",
        &[("ANTHROPIC_AUTH_TOKEN", 'w', Some("made-up-a"))],
        "asks ANTHROPIC_AUTH_TOKEN in x-api-key at api.anthropic.com",
    ),
    // Both are sent; the vendor reads the one in x-api-key.
    (
        "claude-code",
        "claude-opus-4-8",
        &[("ANTHROPIC_API_KEY", 'w', Some("made-up-a")), ("ANTHROPIC_AUTH_TOKEN", 'w', Some("made-up-b"))],
        "asks ANTHROPIC_API_KEY in x-api-key at api.anthropic.com",
    ),
    (
        "claude-code",
        "claude-opus-4-8",
        &[("ANTHROPIC_API_KEY", 'o', Some("made-up-a"))],
        "asks ANTHROPIC_API_KEY in x-api-key at api.anthropic.com",
    ),
    (
        "claude-code",
        "claude-opus-4-8",
        &[("ANTHROPIC_API_KEY", 'w', Some("sk-ant-oat01-made-up-and-no-other-one-is-so-and-here-is-its-other-half-made-up"))],
        "MALFORMED_BYOK_CREDENTIAL, right in CLAUDE_CODE_OAUTH_TOKEN",
    ),
    (
        "claude-code",
        "opus",
        &[(
            "CLAUDE_CODE_OAUTH_TOKEN",
            'w',
            Some("sk-ant-oat01-made-up-and-no-other-one-is-so-and-here-is-its-other-half-made-up"),
        )],
        "NO_SERVER_SURFACE of CLAUDE_CODE_OAUTH_TOKEN",
    ),
    (
        "claude-code",
        "opus",
        &[
            (
                "CLAUDE_CODE_OAUTH_TOKEN",
                'w',
                Some("sk-ant-oat01-made-up-and-no-other-one-is-so-and-here-is-its-other-half-made-up"),
            ),
            ("ANTHROPIC_API_KEY", 'w', Some("made-up-a")),
        ],
        "SHADOWED_BYOK_CREDENTIAL",
    ),
    (
        "claude-code",
        "opus",
        &[("CLAUDE_CODE_OAUTH_TOKEN", 'w', Some("sk-ant-api03-made-up"))],
        "MALFORMED_BYOK_CREDENTIAL, right in ANTHROPIC_API_KEY",
    ),
    (
        "claude-code",
        "MiniMax-M2.7",
        &[("MINIMAX_API_KEY", 'w', Some("made-up-m"))],
        "asks MINIMAX_API_KEY in bearer at api.minimax.io",
    ),
    (
        "claude-code",
        "MiniMax-M2.7",
        &[("MINIMAX_API_KEY", 'w', Some("made-up-m")), ("ANTHROPIC_API_KEY", 'w', Some("sk-ant-api03-made-up"))],
        "asks MINIMAX_API_KEY in bearer at api.minimax.io EXPOSED_CREDENTIAL:ANTHROPIC_API_KEY",
    ),
    (
        "claude-code",
        "MiniMax-M2.7",
        &[("MINIMAX_API_KEY", 'w', Some("made-up-m")), ("ANTHROPIC_API_KEY", 'o', Some("sk-ant-api03-made-up"))],
        "asks MINIMAX_API_KEY in bearer at api.minimax.io EXPOSED_CREDENTIAL:ANTHROPIC_API_KEY",
    ),
    (
        "codex",
        "gpt-5.5",
        &[("OPENAI_API_KEY", 'w', Some("made-up-o"))],
        "asks OPENAI_API_KEY in bearer at api.openai.com UNUSED_CREDENTIAL:OPENAI_API_KEY",
    ),
    (
        "codex",
        "gpt-5.5",
        &[("CODEX_AUTH_JSON", 'w', Some("{\"OPENAI_API_KEY\": \"made-up-o\"}"))],
        "asks CODEX_AUTH_JSON in bearer at api.openai.com",
    ),
    ("codex", "gpt-5.5", &[("CODEX_AUTH_JSON", 'w', Some("{\"tokens\":"))], "MALFORMED_BYOK_CREDENTIAL"),
    (
        "codex",
        "gpt-5.5",
        &[("CODEX_AUTH_JSON", 'w', Some("ghp_madeUp0madeUp0madeUp0madeUp0madeUp01"))],
        "INVALID_BYOK_CREDENTIAL",
    ),
    (
        "codex",
        "gpt-5.5",
        &[("CODEX_AUTH_JSON", 'w', Some("{}")), ("OPENAI_API_KEY", 'w', Some("made-up-o"))],
        "MALFORMED_BYOK_CREDENTIAL",
    ),
    (
        "hermes",
        "kimi-coding/kimi-k2",
        &[("KIMI_API_KEY", 'w', Some("made-up-k"))],
        "asks KIMI_API_KEY in bearer at api.moonshot.ai",
    ),
    (
        "hermes",
        "kimi-coding/kimi-k2",
        &[("KIMI_API_KEY", 'w', Some("sk-kimi-made-up"))],
        "asks KIMI_API_KEY in x-api-key at api.kimi.com",
    ),
    (
        "hermes",
        "openrouter/made/up",
        &[("OPENROUTER_API_KEY", 'w', Some("made-up-r")), ("OPENAI_API_KEY", 'w', Some("made-up-o"))],
        "asks OPENROUTER_API_KEY in bearer at openrouter.ai",
    ),
    (
        "hermes",
        "minimax-cn/made-up",
        &[("MINIMAX_CN_API_KEY", 'w', Some("made-up-c"))],
        "asks MINIMAX_CN_API_KEY in bearer at api.minimaxi.com",
    ),
    (
        "hermes",
        "minimax-cn/made-up",
        &[("MINIMAX_CN_API_KEY", 'w', Some("made-up-c")), ("MINIMAX_API_KEY", 'w', Some("made-up-m"))],
        "asks MINIMAX_CN_API_KEY in bearer at api.minimax.io, then asks MINIMAX_API_KEY in bearer at api.minimax.io",
    ),
    (
        "hermes",
        "deepseek/made-up",
        &[("DEEPSEEK_API_KEY", 'w', Some("made-up-d"))],
        "asks DEEPSEEK_API_KEY in bearer at api.deepseek.com",
    ),
    (
        "openclaw",
        "moonshot:kimi-k2.6",
        &[("KIMI_API_KEY", 'w', Some("made-up-k"))],
        "asks KIMI_API_KEY in bearer at api.moonshot.ai",
    ),
];

/// Whatever is set: what is asked about is a value under one of the provider's own names, it is one of those that were given, and no
/// other provider's key is sent.
#[test]
fn only_values_under_the_providers_own_names_are_ever_asked_about() {
    let snapshot = snapshot();
    let (mut requests, mut asked) = (0, 0);
    for (runtime, found) in snapshot.registry.runtimes() {
        for offer in &found.offers {
            let provider = snapshot.registry.provider(offer);
            let Some(model) = offer.models.iter().find(|model| !offer.withdrawn.contains(model)) else { continue };
            if provider.is_platform() || provider.auth == Auth::Ambient {
                continue;
            }
            let names = snapshot.relevant_names(found, model);
            for (one, other) in names.iter().flat_map(|one| names.iter().map(move |other| (one, other))) {
                for (scope, second) in [
                    (Scope::Workspace, Scope::Workspace),
                    (Scope::Organization, Scope::Workspace),
                    (Scope::Workspace, Scope::Organization),
                ] {
                    for unreadable in [false, true] {
                        let value = |name: &str| format!("made-up-value-of-{name}");
                        let (first_value, second_value) = (value(one), value(other));
                        let mut rows = vec![(one.as_str(), scope, Some(first_value.as_str()))];
                        if one != other {
                            rows.push((other, second, Some(second_value.as_str()).filter(|_| !unreadable)));
                        }
                        let request = request(runtime, model, &rows);
                        requests += 1;
                        let evaluation = evaluate(&snapshot, &request, 0, &|_| String::new());
                        // Another offer may own the model by the available names.
                        let owner =
                            snapshot.registry.providers().iter().find(|known| known.name == evaluation.log.resolution.provider);
                        let Next::Ask(questions) = &evaluation.next else { continue };
                        let owner = owner.unwrap();
                        for query in std::iter::once(&questions.first).chain(questions.fallbacks.iter().map(|(query, _)| query)) {
                            asked += 1;
                            let others_own = |name: &str| {
                                let mut others = snapshot.registry.providers().iter().filter(|known| known.name != owner.name);
                                !owner.accepts(name) && others.any(|known| known.accepts(name))
                            };
                            assert!(!others_own(query.env_name), "{runtime} {model} {rows:?} asks about {}", query.env_name);
                            assert_eq!(query.secret.expose(), value(query.env_name), "{runtime} {model} {rows:?}");
                        }
                    }
                }
            }
        }
    }
    assert!(requests > 300 && asked > 200, "{requests} requests, {asked} questions");
}

/// A reported fact never denies.
#[test]
fn reports_never_deny() {
    let mut snapshot = snapshot();
    let text = "catalogue_version: 1\nruntimes: {claude-code: {version: x, sources: [x], certainty: reported, trims: both_ends, \
                sends: {ANTHROPIC_API_KEY: x-api-key, ANTHROPIC_AUTH_TOKEN: bearer}, surface: messages}}\n";
    let catalogue = Catalogue::embedded().unwrap().value.overlaid("test", text.as_bytes()).unwrap().value;
    let origin = snapshot.registry_origin.clone();
    snapshot =
        Snapshot::new(Arc::clone(&snapshot.registry), Arc::new(catalogue), Arc::clone(&snapshot.policy), origin.clone(), origin);
    let two =
        [("KIMI_API_KEY", Scope::Workspace, Some("made-up-one")), ("ANTHROPIC_API_KEY", Scope::Workspace, Some("made-up-two"))];
    let asked = request("claude-code", "kimi-for-coding", &two);
    let evaluation = evaluate(&snapshot, &asked, 0, &|_| String::new());
    assert!(
        !matches!(&evaluation.next, Next::Rule(Facts::Refused(refusal)) if refusal.code() == DenyCode::ExposedCredential),
        "{:?}",
        evaluation.next
    );
    assert!(evaluation.log.warnings.iter().any(|warning| warning.code != WarningCode::OperatorOverride));
    // Nor does one say that a value keeps another from being used.
    let two = [
        ("ANTHROPIC_API_KEY", Scope::Workspace, Some("see the vault")),
        ("ANTHROPIC_AUTH_TOKEN", Scope::Workspace, Some("made-up")),
    ];
    assert!(summary(&snapshot, &request("claude-code", "claude-opus-4-8", &two)).starts_with("MALFORMED_BYOK_CREDENTIAL"));
}
