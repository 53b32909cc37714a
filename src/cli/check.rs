//! `byok-gate check`

use clap::Args;
use serde_json::json;

use super::{EngineArgs, Exit, Format, print};
use crate::{config::ConfigError, problem::Problem};

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// Take warnings for errors.
    #[arg(long)]
    strict: bool,
    /// How the answer is written.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    #[command(flatten)]
    engine: EngineArgs,
}

pub(super) fn run(args: CheckArgs) -> anyhow::Result<Exit> {
    let CheckArgs { strict, format, engine } = args;
    let (document, problems, warnings, revisions) = match engine.load(None) {
        Ok(setup) => {
            let snapshot = setup.snapshot;
            let revisions = Some((snapshot.registry.revision().to_owned(), snapshot.catalogue.revision().to_owned()));
            (String::new(), Vec::new(), setup.warnings, revisions)
        }
        Err(ConfigError::Content(problems)) => (problems.document, problems.list, Vec::new(), None),
        Err(fault @ ConfigError::Read { .. }) => return Err(fault.into()),
    };
    let valid = problems.is_empty() && (warnings.is_empty() || !strict);
    match format {
        Format::Json => {
            let rows = |list: &[Problem]| {
                list.iter().map(|problem| json!({"place": problem.place, "message": problem.message})).collect::<Vec<_>>()
            };
            let whole = json!({
                "valid": valid,
                "document": document,
                "problems": rows(&problems),
                "warnings": rows(&warnings),
                "registry_revision": revisions.as_ref().map(|(registry, _)| registry),
                "catalogue_revision": revisions.as_ref().map(|(_, catalogue)| catalogue),
            });
            print(&format!("{}\n", serde_json::to_string_pretty(&whole)?))?;
        }
        Format::Text => {
            let mut out = String::new();
            for problem in &problems {
                out.push_str(&format!("error: {document}: {problem}\n"));
            }
            for problem in &warnings {
                out.push_str(&format!("{}: {problem}\n", if strict { "error" } else { "warning" }));
            }
            if let Some((registry, catalogue)) = revisions.filter(|_| valid) {
                out.push_str(&format!("ok: registry {registry}, catalogue {catalogue}\n"));
            }
            print(&out)?;
        }
    }
    Ok(if valid { Exit::Ok } else { Exit::Invalid })
}
