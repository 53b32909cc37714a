//! What must hold of every decision: exhaustively over a bounded space, by properties over the rest.

use std::{
    sync::{Arc, LazyLock},
    time::{Duration, SystemTime},
};
use strum::VariantArray;

use byok_gate::{
    core::{
        catalogue::Catalogue,
        evaluate::{Next, evaluate},
        policy::{Action, Enforcement, Exception, Facts, Group, Policy, Ruling, apply},
        registry::Registry,
        snapshot::{Origin, Snapshot},
    },
    domain::{
        decision::{Grounds, Outcome},
        denial::LivenessEvidence,
        request::{
            CalledBy, Checkpoint, Credential, CredentialValue, OperatorOverride, PlatformProxy, Request, Scope, WorkspaceSpec,
        },
        secret::Secret,
        verdict::{BillingMode, DenyCode, ServedFrom, Verdict, WarningCode, Withheld},
    },
    grpc::convert::{self, pb},
};
use proptest::prelude::*;
use prost::Message;

use crate::support::case;

/// Those that have a policy of their own; AUDIT has PROVISION's.
const CHECKPOINTS: [Checkpoint; 3] = [Checkpoint::Create, Checkpoint::Provision, Checkpoint::Update];
const GROUPS: [Group; 6] =
    [Group::Forbidden, Group::Unanswered, Group::Inconclusive, Group::Unverifiable, Group::TenantEndpoint, Group::Exposure];
const OVERRIDES: [OperatorOverride; 4] =
    [OperatorOverride::Derive, OperatorOverride::PlatformManaged, OperatorOverride::Byok, OperatorOverride::Disabled];

/// By the default policy.
static DEFAULT: LazyLock<Snapshot> = LazyLock::new(|| snapshot(Policy::default()));

fn snapshot(policy: Policy) -> Snapshot {
    let (registry, catalogue) = case::documents(1);
    let origin = Origin::new("test".into(), SystemTime::UNIX_EPOCH);
    Snapshot::new(
        Arc::new(Registry::parse("registry", registry.as_bytes(), &|_| None).unwrap().value),
        Arc::new(Catalogue::embedded().unwrap().value.overlaid("catalogue", catalogue.as_bytes()).unwrap().value),
        Arc::new(policy),
        origin.clone(),
        origin,
    )
}

/// The ruling on a request, with this verdict wherever the provider has to be asked.
fn rule(snapshot: &Snapshot, request: &Request, verdict: Verdict, recently_valid: bool) -> (Ruling, Option<String>) {
    let evaluation = evaluate(snapshot, request, 0, &|_| String::new());
    let facts = match evaluation.next {
        Next::Rule(facts) => facts,
        Next::Ask(_) if verdict == Verdict::Valid => Facts::Valid,
        Next::Ask(queries) => Facts::NotValid {
            evidence: Box::new(evidence(verdict, &queries.first.endpoint.provider, queries.first.env_name)),
            served_from: Some(ServedFrom::Probe),
            recently_valid,
            enforcement: queries.first.enforcement,
        },
    };
    (apply(facts, request.checkpoint, &snapshot.policy), Some(evaluation.log.resolution.provider).filter(|name| !name.is_empty()))
}

fn evidence(verdict: Verdict, provider: &str, env_name: &str) -> LivenessEvidence {
    LivenessEvidence {
        host: "127.0.0.1".into(),
        retry_after: Duration::from_secs(1),
        model: "acme-large".into(),
        ..LivenessEvidence::of(verdict, provider, env_name)
    }
}

/// Every form of a credential's row.
const ROWS: [Option<Option<&str>>; 4] = [None, Some(None), Some(Some(" ")), Some(Some("made-up-key"))];

fn credential(name: &str, scope: Scope, row: Option<&str>) -> Credential {
    let value = row.map_or(CredentialValue::Unreadable, |value| CredentialValue::Readable(Arc::new(Secret::new(value.into()))));
    Credential { env_name: name.into(), scope, value }
}

/// Every selection of a bounded space: runtime, model, override, proxy, a credential row in each scope, unreadable scopes,
/// checkpoint.
fn every_request() -> impl Iterator<Item = Request> {
    let models = [
        "",
        "acme-large",
        "acme-old",
        "beta-1",
        "sub-1",
        "ambient:m",
        "dark/m",
        "twin-1",
        "over-1",
        "platform-small",
        "platform-old",
        "nobody",
    ];
    let scopes: [&[Scope]; 4] = [&[], &[Scope::Workspace], &[Scope::Organization], &[Scope::Workspace, Scope::Organization]];
    let mut requests = Vec::new();
    for runtime in ["", "agent", "bare", "exempt", "nowhere"] {
        for model in models {
            for operator_override in OVERRIDES {
                for platform_proxy in [None, Some(PlatformProxy::Available), Some(PlatformProxy::Absent)] {
                    for name in ["ACME_API_KEY", "TWIN_B_KEY", "SUBSCRIPTION_TOKEN"] {
                        for (workspace, organization) in ROWS.iter().flat_map(|w| ROWS.iter().map(move |o| (w, o))) {
                            for unreadable_scopes in scopes {
                                let rows = [(Scope::Workspace, workspace), (Scope::Organization, organization)];
                                let credentials =
                                    rows.iter().filter_map(|(scope, row)| row.map(|row| credential(name, *scope, row))).collect();
                                requests.push(WorkspaceSpec {
                                    workspace_id: String::new(),
                                    organization_id: String::new(),
                                    runtime: runtime.into(),
                                    model: model.into(),
                                    credentials,
                                    unreadable_scopes: unreadable_scopes.to_vec(),
                                    operator_override,
                                    platform_proxy,
                                    tenant_base_url_env: vec![],
                                });
                            }
                        }
                    }
                }
            }
        }
    }
    requests.into_iter().flat_map(|spec| {
        Checkpoint::VARIANTS.iter().map(move |checkpoint| Request {
            spec: spec.clone(),
            checkpoint: *checkpoint,
            max_liveness_age: None,
            explain: false,
            report_only: false,
            caller: CalledBy::default(),
        })
    })
}

/// INVARIANT (never-flip), and no allow beyond the contract.
#[test]
fn never_flip_exhaustively() {
    let mut policy = Policy::default();
    policy.exempt_runtimes.insert("exempt".to_owned());
    let mut strict = policy.clone();
    strict.honour_overrides = false;
    policy.platform_proxy = PlatformProxy::Available;
    let (mut rulings, mut allows) = (0_u32, 0_u32);
    for (honoured, snapshot) in [(true, snapshot(policy)), (false, snapshot(strict))] {
        for request in every_request() {
            for &verdict in Verdict::VARIANTS {
                let (ruling, owner) = rule(&snapshot, &request, verdict, false);
                rulings += 1;
                let Ok(allow) = ruling.outcome else { continue };
                allows += 1;
                let spec = &request.spec;
                let proxy = spec.platform_proxy.unwrap_or(snapshot.policy.platform_proxy);
                let byok_asked = spec.operator_override == OperatorOverride::Byok;
                match allow.grounds() {
                    Grounds::OverrideDisabled => assert_eq!(spec.operator_override, OperatorOverride::Disabled),
                    Grounds::OverridePlatformManaged => assert_eq!(spec.operator_override, OperatorOverride::PlatformManaged),
                    Grounds::ExemptRuntime => assert_eq!(spec.runtime, "exempt"),
                    Grounds::PlatformOwnsModel => assert!(owner.as_deref() == Some("platform") && !byok_asked),
                    Grounds::Credential(_) => assert!(owner.as_deref().is_some_and(|owner| owner != "platform")),
                }
                assert!(honoured || spec.operator_override == OperatorOverride::Derive, "{request:?}");
                let by_name = allow.grounds() == Grounds::OverridePlatformManaged;
                if allow.billing_mode() == BillingMode::PlatformManaged {
                    assert!(by_name || owner.as_deref() == Some("platform"), "flipped: {request:?}");
                    assert_eq!(proxy, PlatformProxy::Available, "{request:?}");
                }
                if owner.as_deref().is_some_and(|owner| owner != "platform") {
                    assert_eq!(allow.billing_mode(), BillingMode::Byok, "flipped: {request:?}");
                }
                if let Grounds::Credential(found) = allow.grounds() {
                    // An unverified allow has a warning.
                    assert!(found == Verdict::Valid || !ruling.warnings.is_empty(), "silent: {request:?}");
                    assert!(!matches!(found, Verdict::Invalid | Verdict::Forbidden), "{request:?}");
                    let values = spec.credentials.iter().filter(
                        |credential| matches!(&credential.value, CredentialValue::Readable(secret) if !secret.is_blank()),
                    );
                    assert!(values.count() > 0, "without a value: {request:?}");
                }
            }
        }
    }
    assert!(rulings > 4_000_000 && allows > 100_000, "{rulings} rulings, {allows} allows");
}

/// The whole policy table: the result of each verdict at each checkpoint, under every action of its group.
#[test]
fn the_policy_table() {
    use DenyCode as Code;
    use Verdict as V;
    let group = |verdict, tenant_endpoint| match verdict {
        V::NoServerSurface if tenant_endpoint => Some(Group::TenantEndpoint),
        V::Valid | V::Invalid => None,
        V::Forbidden => Some(Group::Forbidden),
        V::Timeout | V::Unreachable | V::NotAttempted => Some(Group::Unanswered),
        V::RateLimited | V::ProviderError | V::UnexpectedResponse | V::QuotaExhausted => Some(Group::Inconclusive),
        V::NoServerSurface | V::NotCalibrated | V::ProbeDisabled => Some(Group::Unverifiable),
    };
    let code = |verdict| match verdict {
        V::Valid => None,
        V::Invalid | V::Forbidden => Some(Code::InvalidByokCredential),
        V::Timeout => Some(Code::ByokProbeTimeout),
        V::Unreachable => Some(Code::ByokProviderUnreachable),
        V::NotAttempted => Some(Code::ByokProbeNotAttempted),
        V::RateLimited => Some(Code::ByokProviderRateLimited),
        V::ProviderError => Some(Code::ByokProviderError),
        V::UnexpectedResponse => Some(Code::ByokUnexpectedResponse),
        V::QuotaExhausted => Some(Code::ByokQuotaExhausted),
        V::NoServerSurface | V::NotCalibrated | V::ProbeDisabled => Some(Code::ByokNotVerifiable),
    };
    let default = |group, checkpoint| match (group, checkpoint) {
        (Group::Forbidden, _) | (Group::Unanswered, Checkpoint::Create) => Action::Deny,
        (Group::Unanswered, Checkpoint::Provision | Checkpoint::Audit) => Action::AllowIfRecentlyValid,
        (Group::Unanswered, Checkpoint::Update)
        | (Group::Inconclusive | Group::Unverifiable | Group::TenantEndpoint | Group::Exposure, _) => Action::Allow,
    };
    let verdicts = V::VARIANTS.iter().map(|verdict| (*verdict, false)).chain([(V::NoServerSurface, true)]);
    for (verdict, tenant_endpoint) in verdicts {
        let group = |verdict| group(verdict, tenant_endpoint);
        for checkpoint in CHECKPOINTS {
            for action in [None, Some(Action::Allow), Some(Action::AllowIfRecentlyValid), Some(Action::Deny)] {
                for recently_valid in [false, true] {
                    for enforcement in [Enforcement::Enforce, Enforcement::Report, Enforcement::Off] {
                        let mut policy = Policy::default();
                        if let (Some(group), Some(action)) = (group(verdict), action) {
                            policy.set_action(checkpoint, group, action);
                        }
                        // Other groups and other checkpoints have no effect.
                        for other in GROUPS.into_iter().filter(|other| Some(*other) != group(verdict)) {
                            policy.set_action(checkpoint, other, Action::Allow);
                        }
                        for other in CHECKPOINTS.into_iter().filter(|other| *other != checkpoint) {
                            GROUPS.into_iter().for_each(|group| policy.set_action(other, group, Action::Allow));
                        }
                        let effective = group(verdict).map(|group| action.unwrap_or(default(group, checkpoint)));
                        let denied = match effective {
                            None => verdict == V::Invalid,
                            Some(Action::Allow) => false,
                            Some(Action::AllowIfRecentlyValid) => !recently_valid,
                            Some(Action::Deny) => true,
                        };
                        let facts = match verdict {
                            V::Valid => Facts::Valid,
                            verdict => Facts::NotValid {
                                evidence: Box::new(LivenessEvidence {
                                    tenant_endpoint,
                                    ..evidence(verdict, "acme", "ACME_API_KEY")
                                }),
                                served_from: None,
                                recently_valid,
                                enforcement,
                            },
                        };
                        if checkpoint == Checkpoint::Provision {
                            assert_eq!(
                                apply(facts.clone(), Checkpoint::Audit, &policy),
                                apply(facts.clone(), checkpoint, &policy)
                            );
                        }
                        let ruling = apply(facts, checkpoint, &policy);
                        let place = format!("{verdict} {checkpoint:?} {action:?} {recently_valid} {enforcement:?}");
                        match ruling.outcome {
                            Err(refusal) => {
                                assert!(denied && enforcement != Enforcement::Report, "{place}");
                                assert_eq!(Some(refusal.code()), code(verdict), "{place}");
                            }
                            Ok(allow) => {
                                assert!(!denied || enforcement == Enforcement::Report, "{place}");
                                assert_eq!(allow.billing_mode(), BillingMode::Byok, "{place}");
                                let on_earlier_valid = !denied && effective == Some(Action::AllowIfRecentlyValid);
                                assert_eq!(ruling.on_earlier_valid, on_earlier_valid, "{place}");
                                let warning = match (verdict, denied) {
                                    (V::Valid, _) => None,
                                    (_, true) => Some(WarningCode::ReportOnly),
                                    _ if on_earlier_valid => Some(WarningCode::StaleLiveness),
                                    _ => Some(WarningCode::CredentialUnverified),
                                };
                                let warnings: Vec<_> = ruling.warnings.iter().map(|warning| warning.code).collect();
                                assert_eq!(warnings, Vec::from_iter(warning), "{place}");
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The keys of a flood are denied although everything is allowed and reported only. A change of a workspace that runs is not.
#[test]
fn too_many_new_keys_are_denied_whatever_is_configured() {
    let mut policy = Policy::default();
    for checkpoint in CHECKPOINTS {
        GROUPS.into_iter().for_each(|group| policy.set_action(checkpoint, group, Action::Allow));
    }
    for &checkpoint in Checkpoint::VARIANTS {
        for &withheld in Withheld::VARIANTS {
            let evidence =
                LivenessEvidence { withheld: Some(withheld), ..evidence(Verdict::NotAttempted, "acme", "ACME_API_KEY") };
            let facts = Facts::NotValid {
                evidence: Box::new(evidence),
                served_from: None,
                recently_valid: true,
                enforcement: Enforcement::Report,
            };
            let denied = withheld == Withheld::NewKeys && checkpoint != Checkpoint::Update;
            assert_eq!(apply(facts, checkpoint, &policy).outcome.is_err(), denied, "{withheld:?} at {checkpoint:?}");
        }
    }
}

/// VALID has its own variant of `Facts`. As a verdict of `NotValid` it is contradictory, and is denied under any action.
#[test]
fn a_valid_among_what_was_judged_does_not_allow() {
    let mut policy = Policy::default();
    for checkpoint in CHECKPOINTS {
        GROUPS.into_iter().for_each(|group| policy.set_action(checkpoint, group, Action::Allow));
    }
    for checkpoint in CHECKPOINTS {
        let facts = Facts::NotValid {
            evidence: Box::new(evidence(Verdict::Valid, "acme", "ACME_API_KEY")),
            served_from: Some(ServedFrom::Cache),
            recently_valid: true,
            enforcement: Enforcement::Enforce,
        };
        let refusal = apply(facts, checkpoint, &policy).outcome.unwrap_err();
        assert_eq!(refusal.code(), DenyCode::ByokNotVerifiable, "{checkpoint:?}");
    }
}

/// A provider's exception ends on its date.
#[test]
fn an_exception_ends() {
    let mut policy = Policy::default();
    policy.set_exception("acme".into(), Exception { enforcement: Enforcement::Report, until: 100 });
    assert_eq!(policy.enforcement("acme", 99), Enforcement::Report);
    assert_eq!(policy.enforcement("acme", 100), Enforcement::Enforce);
    assert_eq!(policy.enforcement("beta", 0), Enforcement::Enforce);
}

// === properties ===

/// Requests at the edge of the known: names and models from the registry and near it.
fn any_spec() -> impl Strategy<Value = pb::WorkspaceSpec> {
    let names = prop::sample::select(vec![
        "ACME_API_KEY",
        "ACME_TOKEN",
        "BETA_API_KEY",
        "TWIN_A_KEY",
        "TWIN_B_KEY",
        "TWIN_SHARED_KEY",
        "PLATFORM_USAGE_TOKEN",
        "OTHER",
    ]);
    let values = prop::sample::select(vec!["", " ", "made-up-key", "beta-key-1", "acme-oauth-1", "line\n", "\u{e9}"]);
    let credential = (names, 1..=2_i32, values, any::<bool>()).prop_map(|(name, scope, value, unreadable)| pb::Credential {
        env_name: name.into(),
        scope,
        value: if unreadable { String::new() } else { value.into() },
        unreadable,
    });
    let models = prop::sample::select(vec![
        "acme-large",
        "acme/x",
        "acme-old",
        "beta-9",
        "loose/m",
        "gone/m",
        "sub-1",
        "sub-x",
        "ambient:m",
        "dark/m",
        "twin-1",
        "over-2",
        "over",
        "platform-small",
        "platform/x",
        "platform-old",
        "x",
        "",
    ]);
    (
        prop::sample::select(vec!["agent", "bare", "nowhere", ""]),
        models,
        prop::collection::vec(credential, 0..6),
        prop::collection::vec(1..=2_i32, 0..2),
        0..4_i32,
        0..3_i32,
        prop::collection::vec(prop::sample::select(vec!["ACME_BASE_URL", "BETA_BASE_URL", "X_BASE_URL"]), 0..2),
    )
        .prop_map(|(runtime, model, mut credentials, unreadable_scopes, operator_override, platform_proxy, bases)| {
            credentials.sort_by(|a, b| (&a.env_name, a.scope).cmp(&(&b.env_name, b.scope)));
            credentials.dedup_by(|a, b| (&a.env_name, a.scope) == (&b.env_name, b.scope));
            pb::WorkspaceSpec {
                runtime: runtime.into(),
                model: model.into(),
                credentials,
                unreadable_scopes,
                operator_override,
                platform_proxy,
                tenant_base_url_env: bases.into_iter().map(str::to_owned).collect(),
                ..pb::WorkspaceSpec::default()
            }
        })
}

fn any_request() -> impl Strategy<Value = Request> {
    (any_spec(), 1..=3_i32).prop_map(|(spec, checkpoint)| {
        convert::request(pb::DecideRequest {
            workspace_spec: Some(spec),
            checkpoint,
            max_liveness_age: None,
            explain: true,
            report_only: false,
        })
        .unwrap()
    })
}

fn any_verdict() -> impl Strategy<Value = Verdict> {
    prop::sample::select(Verdict::VARIANTS)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    /// INVARIANT (never-flip), over the rest of the space.
    #[test]
    fn never_flip(request in any_request(), verdict in any_verdict(), recent in any::<bool>()) {
        let (ruling, owner) = rule(&DEFAULT, &request, verdict, recent);
        if let Ok(allow) = ruling.outcome {
            let by_name = request.spec.operator_override == OperatorOverride::PlatformManaged;
            prop_assert!(allow.billing_mode() != BillingMode::PlatformManaged || by_name || owner.as_deref() == Some("platform"));
        }
    }

    #[test]
    fn the_same_request_gets_the_same_ruling(request in any_request(), verdict in any_verdict()) {
        let snapshot = &*DEFAULT;
        let (first, second) = (evaluate(snapshot, &request, 0, &|_| String::new()), evaluate(snapshot, &request, 0, &|_| String::new()));
        prop_assert_eq!((first.log.resolution, first.log.warnings, first.log.trace.into_steps()), (second.log.resolution, second.log.warnings, second.log.trace.into_steps()));
        prop_assert_eq!(rule(snapshot, &request, verdict, false), rule(snapshot, &request, verdict, false));
    }

    /// Without any credential a denial stays a denial.
    #[test]
    fn taking_every_credential_away_turns_no_denial_into_an_allow(request in any_request(), verdict in any_verdict()) {
        let snapshot = &*DEFAULT;
        let mut without = request.clone();
        without.spec.credentials.clear();
        if rule(snapshot, &request, verdict, false).0.outcome.is_err() {
            prop_assert!(rule(snapshot, &without, verdict, false).0.outcome.is_err());
        }
    }

    /// Where one verdict is denied, a worse one is: VALID, then what could not be told, then INVALID; and a memory of VALID only helps.
    #[test]
    fn a_worse_verdict_turns_no_denial_into_an_allow(request in any_request(), verdict in any_verdict()) {
        let snapshot = &*DEFAULT;
        let denied = |verdict, recent| rule(snapshot, &request, verdict, recent).0.outcome.is_err();
        prop_assert!(!denied(Verdict::Valid, false) || denied(verdict, false));
        prop_assert!(!denied(verdict, false) || denied(Verdict::Invalid, false));
        prop_assert!(!denied(verdict, true) || denied(verdict, false));
    }

    /// Any bytes: no panic, and no allow without a spec that says so.
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(message) = pb::DecideRequest::decode(bytes.as_slice())
            && let Ok(request) = convert::request(message)
        {
            rule(&DEFAULT, &request, Verdict::Valid, false);
        }
    }

    /// Any text in any field: no panic.
    #[test]
    fn no_text_panics(runtime in ".*", model in ".*", name in ".*", value in ".*", checkpoint in any::<i32>(), seconds in any::<i64>(), nanos in any::<i32>()) {
        let message = pb::DecideRequest {
            workspace_spec: Some(pb::WorkspaceSpec {
                runtime,
                model,
                credentials: vec![pb::Credential { env_name: name, scope: 1, value, unreadable: false }],
                ..pb::WorkspaceSpec::default()
            }),
            checkpoint,
            max_liveness_age: Some(prost_types::Duration { seconds, nanos }),
            explain: true,
            report_only: false,
        };
        if let Ok(request) = convert::request(message) {
            let (ruling, _) = rule(&DEFAULT, &request, Verdict::Invalid, false);
            drop(ruling.into_outcome(Vec::new));
        }
    }
}

/// An outcome of a refusal is a denial that keeps it.
#[test]
fn a_refusal_becomes_a_denial() {
    let ruling = apply(
        Facts::Refused(Box::new(byok_gate::domain::denial::Refusal::RuntimeRequired)),
        Checkpoint::Create,
        &Policy::default(),
    );
    let Outcome::Deny(deny) = ruling.into_outcome(|| vec!["m".into()]) else { panic!("allowed") };
    assert_eq!((deny.refusal.code(), deny.alternative_models), (DenyCode::RuntimeRequired, vec!["m".to_owned()]));
}
