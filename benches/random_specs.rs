//! Random workspace specs, and what must hold for every answer to one.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use byok_gate::grpc::convert::pb::{
    self, decide_response::Decision, policy_decision_service_client::PolicyDecisionServiceClient,
};
use fastrand::Rng;
use prost::Message;
use tonic::transport::Channel;

use crate::{BATCH, Failed, is_live, live_key};

/// In every value that a spec holds, and so in no answer.
const CANARY: &str = "made-up-canary";
/// How many different values of each kind there are: enough for probes, few enough for results from the cache.
const VALUES: u32 = 3_000;

/// What the registry offers, and the names that take part.
struct Offers {
    names: Vec<String>,
    models: Vec<pb::OfferedModel>,
    /// Providers whose models the platform pays for.
    platform: BTreeSet<String>,
    /// Runtimes and models that no such provider lists.
    own_key: HashSet<(String, String)>,
}

/// Sends this many specs in batches, and checks each answer. Returns how many there were of each outcome, and prints the first faults.
pub(crate) async fn run(
    gate: &mut PolicyDecisionServiceClient<Channel>,
    seed: u64,
    count: u32,
) -> Result<BTreeMap<String, u32>, Failed> {
    let offers = Offers::ask(gate).await?;
    let mut random = Rng::with_seed(seed);
    let mut outcomes = BTreeMap::new();
    for first in (0..count).step_by(BATCH as usize) {
        let requests: Vec<_> = (first..count.min(first + BATCH)).map(|_| offers.request(&mut random)).collect();
        let mut results = gate.batch_decide(pb::BatchDecideRequest { requests: requests.clone() }).await?.into_inner();
        let mut open: BTreeSet<usize> = (0..requests.len()).collect();
        while let Some(answer) = results.message().await? {
            let index = answer.index as usize;
            let request = requests.get(index).filter(|_| open.remove(&index)).ok_or("an answer to no item, or a second one")?;
            let outcome = offers.check(request, &answer).map_err(|fault| format!("{fault}\n{request:?}\n{answer:?}"))?;
            *outcomes.entry(outcome).or_default() += 1;
        }
        if !open.is_empty() {
            return Err(format!("no answer to {} items", open.len()).into());
        }
    }
    Ok(outcomes)
}

impl Offers {
    async fn ask(gate: &mut PolicyDecisionServiceClient<Channel>) -> Result<Self, Failed> {
        let status = gate.get_registry_status(pb::GetRegistryStatusRequest {}).await?.into_inner();
        let listed = gate.list_models(pb::ListModelsRequest { details: true, ..Default::default() }).await?.into_inner();
        let paid = pb::BillingMode::PlatformManaged as i32;
        let offered = listed.models.iter().map(|model| (model.billing_mode, &model.provider));
        let open = listed.open_providers.iter().map(|provider| (provider.billing_mode, &provider.provider));
        let platform = offered.chain(open).filter(|(mode, _)| *mode == paid).map(|(_, provider)| provider.clone()).collect();
        let pair = |model: &pb::OfferedModel| (model.runtime.clone(), model.model.clone());
        let mut own_key: HashSet<_> = listed.models.iter().map(pair).collect();
        for model in listed.models.iter().filter(|model| model.billing_mode == paid) {
            own_key.remove(&pair(model));
        }
        Ok(Self { names: status.credential_names, models: listed.models, platform, own_key })
    }

    fn request(&self, random: &mut Rng) -> pb::DecideRequest {
        let offered = self.offered(random);
        let (runtime, model) = match random.u8(..12) {
            0 => (text(random), text(random)),
            1 => (String::new(), offered.model.clone()),
            2 => (offered.runtime.clone(), String::new()),
            3 => (offered.runtime.clone(), self.offered(random).model),
            4 => (offered.runtime.clone(), format!("{}-{}", offered.model, random.u8(..))),
            _ => (offered.runtime.clone(), offered.model.clone()),
        };
        let spec = pb::WorkspaceSpec {
            workspace_id: format!("workspace-{}", random.u32(..)),
            organization_id: format!("organization-{}", random.u16(..10_000)),
            runtime,
            model,
            credentials: (0..random.u8(..4)).map(|_| self.credential(&offered.accepted_env, random)).collect(),
            unreadable_scopes: (0..random.u8(..20).saturating_sub(18)).map(|_| random.i32(0..3)).collect(),
            operator_override: if random.u8(..8) == 0 { random.i32(0..5) } else { 0 },
            platform_proxy: random.i32(0..3),
            tenant_base_url_env: (0..random.u8(..12).saturating_sub(10)).map(|_| text(random)).collect(),
        };
        pb::DecideRequest {
            workspace_spec: (random.u8(..50) > 0).then_some(spec),
            checkpoint: if random.u8(..30) == 0 { random.i32(..) } else { random.i32(1..5) },
            max_liveness_age: (random.u8(..20) == 0).then(|| prost_types::Duration { seconds: random.i64(-1..100), nanos: 0 }),
            explain: random.u8(..20) == 0,
            report_only: random.u8(..20) == 0,
        }
    }

    fn offered(&self, random: &mut Rng) -> pb::OfferedModel {
        random.choice(&self.models).cloned().unwrap_or_default()
    }

    fn credential(&self, accepted: &[String], random: &mut Rng) -> pb::Credential {
        let name = match random.u8(..40) {
            0 => text(random),
            1..15 => random.choice(&self.names).cloned().unwrap_or_default(),
            _ => random.choice(if accepted.is_empty() { &self.names } else { accepted }).cloned().unwrap_or_default(),
        };
        let number = random.u32(..VALUES);
        let live = live_key(&format!("canary-{number:08}"));
        let value = match random.u8(..20) {
            0 => String::new(),
            1 => "  ".into(),
            2 => format!("Bearer {live}"),
            3 => format!(" {live}\n"),
            4 => format!("{CANARY}-{}", "k".repeat(random.usize(..7_000))),
            5 => format!("{CANARY}\u{0}\u{e9}{}", text(random)),
            6 => format!(r#"{{"OPENAI_API_KEY": "{live}"}}"#),
            7 => format!("sk-ant-oat01-{CANARY}-{number:080}"),
            8 => format!("ghp_{number:09}{CANARY}"),
            9..12 => format!("{CANARY}-dead-{number:08}"),
            _ => live,
        };
        let unreadable = random.u8(..15) == 0;
        pb::Credential {
            env_name: name,
            scope: random.i32(1..3),
            value: if unreadable { String::new() } else { value },
            unreadable,
        }
    }

    /// What must hold whatever was asked. Returns the outcome's name.
    fn check(&self, request: &pb::DecideRequest, answer: &pb::BatchDecideResponse) -> Result<String, Failed> {
        if answer.encode_to_vec().windows(CANARY.len()).any(|part| part == CANARY.as_bytes()) {
            return Err("a credential's value is in an answer".into());
        }
        match answer.result.as_ref().ok_or("an answer without a result")? {
            pb::batch_decide_response::Result::Status(status) => {
                let invalid = status.code == tonic::Code::InvalidArgument as i32;
                if invalid && !status.message.is_empty() { Ok("invalid".into()) } else { Err("an unexpected status".into()) }
            }
            pb::batch_decide_response::Result::Response(response) => match response.decision.as_ref().ok_or("no decision")? {
                Decision::Deny(deny) => {
                    if deny.message.is_empty() || deny.remedy.is_empty() {
                        return Err("a denial without its texts".into());
                    }
                    Ok(pb::DenyCode::try_from(deny.code)?.as_str_name().into())
                }
                Decision::Allow(allow) => self.check_allow(request, response, allow.billing_mode),
            },
        }
    }

    fn check_allow(
        &self,
        request: &pb::DecideRequest,
        response: &pb::DecideResponse,
        billing_mode: i32,
    ) -> Result<String, Failed> {
        let spec = request.workspace_spec.as_ref().ok_or("a request without a spec is allowed")?;
        let resolution = response.resolution.as_ref().ok_or("an allow without a resolution")?;
        let overridden = spec.operator_override == pb::OperatorOverride::PlatformManaged as i32;
        let mode = pb::BillingMode::try_from(billing_mode)?;
        match mode {
            pb::BillingMode::Unspecified => return Err("an allow without a billing mode".into()),
            pb::BillingMode::None if spec.operator_override != pb::OperatorOverride::Disabled as i32 => {
                return Err("nobody pays, and nobody said so".into());
            }
            pb::BillingMode::PlatformManaged if !overridden => {
                let own_key = self.own_key.contains(&(spec.runtime.clone(), spec.model.clone()));
                if own_key || !self.platform.contains(&resolution.provider) {
                    return Err("a model that needs the tenant's key is billed to the platform".into());
                }
            }
            pb::BillingMode::PlatformManaged | pb::BillingMode::None => {}
            pb::BillingMode::Byok => check_own_key(spec, response, resolution)?,
        }
        Ok(mode.as_str_name().into())
    }
}

/// An allow on the tenant's key names it, has seen it alive, or warns.
fn check_own_key(spec: &pb::WorkspaceSpec, response: &pb::DecideResponse, resolution: &pb::Resolution) -> Result<(), Failed> {
    let liveness = response.liveness.as_ref().ok_or("an allow on a key that was not judged")?;
    let named = |credential: &&pb::Credential| {
        credential.env_name == resolution.credential_env
            && credential.scope == resolution.credential_scope
            && !credential.unreadable
    };
    let used = spec.credentials.iter().find(named).ok_or("an allow on a key that the spec does not hold")?;
    let unverified = [pb::WarningCode::CredentialUnverified, pb::WarningCode::StaleLiveness, pb::WarningCode::ReportOnly];
    let warned = response.warnings.iter().any(|warning| unverified.iter().any(|code| warning.code == *code as i32));
    match pb::Verdict::try_from(liveness.verdict)? {
        pb::Verdict::Valid if is_live(used.value.trim()) => Ok(()),
        pb::Verdict::Valid => Err("a key that the provider refuses is VALID".into()),
        pb::Verdict::Invalid | pb::Verdict::Forbidden | pb::Verdict::Unspecified => Err("an allow on a dead key".into()),
        _ if warned => Ok(()),
        _ => Err("an unverified allow without a warning".into()),
    }
}

/// Letters that names have, and some that they do not.
fn text(random: &mut Rng) -> String {
    (0..random.u8(..24))
        .map(|_| *random.choice(&['a', 'Z', '9', '_', '-', '/', ':', '.', ' ', '\u{7f}', '\u{e9}', '"']).unwrap_or(&'a'))
        .collect()
}
