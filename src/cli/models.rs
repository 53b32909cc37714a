//! `byok-gate models`: lists the models of runtimes.

use clap::Args;
use serde_json::json;

use super::{
    args::{EngineArgs, ProbeArgs},
    exit::{Exit, Format, UsageError, print},
    report::word_of,
};
use crate::{
    domain::denial::Refusal,
    grpc::convert::{self, pb},
};

#[derive(Debug, Args)]
pub(super) struct ModelsArgs {
    /// Only this runtime.
    #[arg(long)]
    runtime: Option<String>,
    /// The output format.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    #[command(flatten)]
    engine: EngineArgs,
}

pub(super) fn run(args: ModelsArgs) -> anyhow::Result<Exit> {
    let ModelsArgs { runtime, format, engine } = args;
    let snapshot = engine.load(ProbeArgs::default())?.snapshot;
    if let Some(runtime) = runtime.as_deref().filter(|runtime| snapshot.registry.runtime(runtime).is_none()) {
        let known = snapshot.registry.runtimes().map(|(name, _)| name.to_owned()).collect();
        return Err(UsageError(Refusal::RuntimeUnsupported { runtime: runtime.to_owned(), known }.message()).into());
    }
    let pb::ListModelsResponse { models, registry_revision, open_providers: _ } =
        convert::models(&snapshot, runtime.as_deref(), false);
    match format {
        Format::Json => {
            let rows: Vec<_> = models
                .iter()
                .map(|model| {
                    json!({
                        "runtime": model.runtime,
                        "model": model.model,
                        "provider": model.provider,
                        "provider_display_name": model.provider_display_name,
                        "billing_mode": word_of::<pb::BillingMode>(model.billing_mode),
                        "accepted_env": model.accepted_env,
                        "withdrawn": model.withdrawn,
                    })
                })
                .collect();
            let whole = json!({"models": rows, "registry_revision": registry_revision});
            print(&format!("{}\n", serde_json::to_string_pretty(&whole)?))?;
        }
        Format::Text => {
            let width = |of: fn(&pb::OfferedModel) -> &str| models.iter().map(|model| of(model).len()).max().unwrap_or(0);
            let (runtimes, ids) = (width(|model| &model.runtime), width(|model| &model.model));
            let providers = width(|model| &model.provider);
            let lines: String = models
                .iter()
                .map(|model| {
                    format!(
                        "{:runtimes$}  {:ids$}  {:providers$}  {:16}  {}{}\n",
                        model.runtime,
                        model.model,
                        model.provider,
                        word_of::<pb::BillingMode>(model.billing_mode),
                        if model.withdrawn { "(withdrawn) " } else { "" },
                        model.accepted_env.join(" or ")
                    )
                })
                .collect();
            print(&lines)?;
        }
    }
    Ok(Exit::Ok)
}
