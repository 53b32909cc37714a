//! `byok-gate check`: do configuration, registry and catalogue stand, and what would a change of them do to people?

use std::{
    env,
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::{Value, json};

use super::{
    against::{Changes, Side},
    args::{EngineArgs, ProbeArgs},
    exit::{Exit, Format, print},
};
use crate::{
    config::{self, ConfigError, Setup},
    core::{catalogue::Catalogue, endpoint::target, registry::Registry, snapshot::Snapshot, yaml},
    domain::problem::{Loaded, Problem, Problems},
    watch,
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

/// What was found in the documents, each with the document that it stands in.
#[derive(Default)]
struct Found {
    problems: Vec<(String, Problem)>,
    warnings: Vec<(String, Problem)>,
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
            let sides = (quiet.take(registry_of(path)), quiet.take(self::catalogue(against_catalog.as_ref())));
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

fn registry(path: Option<&PathBuf>) -> Checked<Registry> {
    match path {
        Some(path) => registry_of(path),
        None => Registry::embedded(&|name| env::var(name).ok()).map(|loaded| (config::source_of(None), loaded)),
    }
}

fn registry_of(path: &PathBuf) -> Checked<Registry> {
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

fn bytes(path: &Path) -> Result<Vec<u8>, Problems> {
    config::read(path, yaml::MAX_DOCUMENT_BYTES as u64).map_err(|fault| match fault {
        ConfigError::Read { path, source } => watch::unreadable(&path, &source),
        ConfigError::Content(problems) => problems,
    })
}

// === impl Found ===

impl Found {
    /// All that there is to say of the documents that a service would be started with; and they themselves, if they stand.
    fn all(&mut self, engine: EngineArgs) -> Option<Snapshot> {
        let stand = (registry(engine.registry.as_ref()), catalogue(engine.probe_catalog.as_ref()));
        if let (Ok(_), Ok(_)) = stand {
            // The configuration names providers of the registry, and may name other documents, so it is read with them.
            return match engine.load(ProbeArgs::default()) {
                Ok(Setup { snapshot, warnings, .. }) => {
                    self.warnings = warnings.into_iter().map(|warning| told_apart(warning, &snapshot)).collect();
                    Some(snapshot)
                }
                Err(ConfigError::Content(problems)) => {
                    self.refuse(problems);
                    None
                }
                Err(ConfigError::Read { path, source }) => {
                    self.refuse(watch::unreadable(&path, &source));
                    None
                }
            };
        }
        self.take(stand.0);
        self.take(stand.1);
        None
    }

    fn take<T>(&mut self, checked: Checked<T>) -> Option<T> {
        match checked {
            Ok((document, Loaded { value, warnings })) => {
                self.warnings.extend(warnings.into_iter().map(|problem| (document.clone(), problem)));
                Some(value)
            }
            Err(problems) => {
                self.refuse(problems);
                None
            }
        }
    }

    fn refuse(&mut self, problems: Problems) {
        let Problems { document, list } = problems;
        self.problems.extend(list.into_iter().map(|problem| (document.clone(), problem)));
    }
}

/// A warning of the whole, and the document that its place begins with.
fn told_apart(warning: Problem, snapshot: &Snapshot) -> (String, Problem) {
    let documents = [&snapshot.registry_origin.source, &snapshot.catalogue_origin.source];
    let found = documents.into_iter().find_map(|document| {
        Some((document.clone(), warning.place.strip_prefix(document.as_str())?.strip_prefix(": ")?.to_owned()))
    });
    match found {
        Some((document, place)) => (document, Problem { place, ..warning }),
        None => (String::new(), warning),
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

fn rows(list: &[(String, Problem)]) -> Vec<Value> {
    let row = |(document, Problem { place, line, message }): &(String, Problem)| json!({"document": document, "line": line, "place": place, "message": message});
    list.iter().map(row).collect()
}

/// `error: FILE:LINE: PLACE: MESSAGE`, as editors and CI systems read it.
fn lines(level: &str, list: &[(String, Problem)]) -> String {
    let line = |(document, problem): &(String, Problem)| {
        let at = problem.line.map_or_else(String::new, |line| format!(":{line}"));
        let document = if document.is_empty() { String::new() } else { format!("{document}{at}: ") };
        let problem = Problem { line: None, ..problem.clone() };
        format!("{level}: {document}{problem}\n")
    };
    list.iter().map(line).collect()
}
