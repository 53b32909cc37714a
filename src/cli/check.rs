//! `byok-gate check`: do configuration, registry and catalogue stand, and what would a change of them do to people?

use std::{
    env,
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::{
    against::{Changes, Side},
    args::{EngineArgs, ProbeArgs},
    exit::{Exit, Format, print},
};
use crate::{
    config::{self, ConfigError, Setup},
    core::{catalogue::Catalogue, endpoint::target, registry::Registry, snapshot::Snapshot, yaml},
    domain::problem::{Loaded, Problem, Problems},
    watch::files,
};

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// Take warnings for errors.
    #[arg(long)]
    strict: bool,
    /// Tell what changes for people against this earlier registry.
    #[arg(long, value_name = "OLD REGISTRY")]
    against: Option<PathBuf>,
    /// The earlier probe catalogue; without it, the embedded one was in use.
    #[arg(long, value_name = "OLD CATALOGUE", requires = "against")]
    against_catalog: Option<PathBuf>,
    /// How the answer is written.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    #[command(flatten)]
    engine: EngineArgs,
}

/// What was found in the documents, document by document.
#[derive(Default)]
struct Found {
    problems: Vec<Problems>,
    warnings: Vec<Problems>,
}

pub(super) fn run(args: CheckArgs) -> anyhow::Result<Exit> {
    let CheckArgs { strict, against, against_catalog, format, engine } = args;
    let mut found = Found::default();
    let whole = found.all(engine);
    let old = match &against {
        None => None,
        Some(path) => {
            // What was odd about the earlier documents is nobody's concern now.
            let mut quiet = Found::default();
            let sides = (quiet.take(registry(path)), quiet.take(catalogue(against_catalog.as_ref())));
            found.problems.extend(quiet.problems);
            sides.0.zip(sides.1)
        }
    };
    let valid = found.problems.is_empty() && (found.warnings.is_empty() || !strict);
    let sides = whole.as_ref().map(|snapshot| (&*snapshot.registry, &*snapshot.catalogue)).filter(|_| valid);
    let changes = sides.zip(old.as_ref()).map(|((registry, catalogue), (old_registry, old_catalogue))| {
        let old = Side { registry: old_registry, catalogue: old_catalogue };
        Changes::between(old, Side { registry, catalogue })
    });
    match format {
        Format::Json => {
            let whole = json!({
                "valid": valid,
                "problems": rows(&found.problems),
                "warnings": rows(&found.warnings),
                "registry_revision": sides.map(|(registry, _)| registry.revision()),
                "catalogue_revision": sides.map(|(_, catalogue)| catalogue.revision()),
                "not_asked": sides.map(|(registry, catalogue)| not_asked(registry, catalogue)),
                "changes": changes.as_ref().map(Changes::json),
            });
            print(&format!("{}\n", serde_json::to_string_pretty(&whole)?))?;
        }
        Format::Text => {
            let mut out = lines("error", &found.problems);
            out.push_str(&lines(if strict { "error" } else { "warning" }, &found.warnings));
            if let Some((registry, catalogue)) = sides {
                out.push_str(&format!("ok: registry {}, catalogue {}\n", registry.revision(), catalogue.revision()));
            }
            out.extend(changes.as_ref().map(Changes::text));
            print(&out)?;
        }
    }
    Ok(if valid { Exit::Ok } else { Exit::Invalid })
}

/// A document's name with what it says.
type Checked<T> = Result<(String, Loaded<T>), Problems>;

fn registry(path: &PathBuf) -> Checked<Registry> {
    let (document, bytes) = (config::source_of(Some(path)), bytes(path)?);
    Registry::parse(&document, &bytes, &|name| env::var(name).ok()).map(|loaded| (document, loaded))
}

/// The embedded catalogue, with the document at this path laid over it.
pub(super) fn catalogue(path: Option<&PathBuf>) -> Checked<Catalogue> {
    let document = config::source_of(path);
    match path {
        None => Catalogue::embedded(),
        Some(path) => Catalogue::overlaid(&document, &bytes(path)?),
    }
    .map(|loaded| (document, loaded))
}

fn bytes(path: &Path) -> Result<Zeroizing<Vec<u8>>, Problems> {
    let owned = path.to_owned();
    let read = files::in_time(move || files::read(&owned, yaml::MAX_DOCUMENT_BYTES as u64)).and_then(|read| read);
    read.map_err(|fault| config::unreadable(path, &fault))
}

// === impl Found ===

impl Found {
    /// All that there is to say of what a service would be started with; and its documents, if they are good.
    fn all(&mut self, engine: EngineArgs) -> Option<Snapshot> {
        match engine.load(ProbeArgs::default()) {
            Ok(Setup { snapshot, warnings, .. }) => {
                self.warnings = warnings;
                Some(snapshot)
            }
            Err(ConfigError(problems)) => {
                self.problems = problems;
                None
            }
        }
    }

    fn take<T>(&mut self, checked: Checked<T>) -> Option<T> {
        checked.map(|(_, loaded)| loaded.value).map_err(|problems| self.problems.push(problems)).ok()
    }
}

/// The registry's providers whose credentials cannot be checked, and why: presence alone governs them.
fn not_asked(registry: &Registry, catalogue: &Catalogue) -> Vec<Value> {
    let reasons = registry.providers().iter().filter_map(|provider| {
        let reason = target(provider, catalogue, "").err()?;
        Some(json!({"provider": provider.name, "reason": reason.reason(), "note": reason.text()}))
    });
    reasons.collect()
}

fn rows(found: &[Problems]) -> Vec<Value> {
    let rows = found.iter().flat_map(|Problems { document, list }| {
        list.iter().map(move |Problem { place, line, message }| {
            json!({"document": document, "line": line, "place": place, "message": message})
        })
    });
    rows.collect()
}

/// `error: FILE:LINE: PLACE: MESSAGE`, as editors and CI systems read it.
fn lines(level: &str, found: &[Problems]) -> String {
    let lines = found.iter().flat_map(|Problems { document, list }| {
        list.iter().map(move |problem| {
            let at = problem.line.map_or_else(String::new, |line| format!(":{line}"));
            let problem = Problem { line: None, ..problem.clone() };
            format!("{level}: {document}{at}: {problem}\n")
        })
    });
    lines.collect()
}
