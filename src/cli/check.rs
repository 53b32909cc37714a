//! `byok-gate check`: checks configuration, registry and catalogue, and shows what a change of them would mean for tenants.

use std::{
    env,
    path::{Path, PathBuf},
};

use clap::Args;
use jiff::civil::Date;
use serde_json::{Value, json};
use url::Url;
use zeroize::Zeroizing;

use super::{
    against::{Changes, Side},
    client::chain,
    exit::{Exit, Format, print},
    serve::ServeArgs,
};
use crate::{
    app,
    config::{self, ConfigError, Setup, TierFiles},
    core::{
        catalogue::{Catalogue, HostRow, host_of},
        classify::ProbeResponse,
        endpoint::target,
        registry::{Provider, Registry},
        snapshot::Snapshot,
        yaml,
    },
    domain::{
        problem::{Loaded, Problem, Problems},
        verdict::{Cause, Unreached},
    },
    liveness::{prober::HttpProber, tier::Tier},
    server::{self, ServerError},
    telemetry::cause,
    watch::files,
};

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// Take warnings for errors. That a row has grown old, or that a port is in use, is no mistake of a document, and stays a warning.
    #[arg(long)]
    strict: bool,
    /// Ask each provider once, without any key, whether there is an API at its base URL.
    #[arg(long)]
    probe: bool,
    /// The configuration is for another machine: leave out what is a matter of this one's files, such as certificates, tokens and the folders
    /// of sockets.
    #[arg(long)]
    elsewhere: bool,
    /// Tell what changes for people against this earlier registry.
    #[arg(long, value_name = "OLD REGISTRY")]
    against: Option<PathBuf>,
    /// The earlier probe catalogue; without it, the embedded one was in use.
    #[arg(long, value_name = "OLD CATALOGUE", requires = "against")]
    against_catalog: Option<PathBuf>,
    /// The output format.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// The same as those of `serve`: what would keep it from starting is found too.
    #[command(flatten)]
    serve: ServeArgs,
}

/// The settings that decide whether a listener is open to everybody.
const EXPOSURE: [&str; 3] = ["server", "tls", "callers"];

/// Problems and warnings, document by document.
#[derive(Default)]
struct Found {
    problems: Vec<Problems>,
    warnings: Vec<Problems>,
    /// Findings that are no mistake in a document: catalogue rows whose facts are old, and ports that are in use.
    of_today: Vec<Problems>,
}

pub(super) async fn run(args: CheckArgs) -> anyhow::Result<Exit> {
    let CheckArgs { strict, probe, elsewhere, against, against_catalog, format, serve } = args;
    let mut found = Found::default();
    let whole = found.all(serve, elsewhere);
    let whole = match whole {
        Some(setup) if probe => {
            let prober = app::prober(&setup)?;
            let answers = found.ask_without_key(&setup.snapshot, &prober).await;
            Some((setup.snapshot, Some(answers)))
        }
        other => other.map(|setup| (setup.snapshot, None)),
    };
    let (whole, asked) = whole.unzip();
    let asked: Vec<Value> = asked.flatten().unwrap_or_default();
    let old = match &against {
        None => None,
        Some(path) => {
            // Warnings about the earlier documents do not matter.
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
                "problems": rows(found.problems.iter()),
                "warnings": rows(found.warnings.iter().chain(&found.of_today)),
                "registry_revision": sides.map(|(registry, _)| registry.revision()),
                "catalogue_revision": sides.map(|(_, catalogue)| catalogue.revision()),
                "asked_without_a_key": asked,
                "not_asked": sides.map(|(registry, catalogue)| not_asked(registry, catalogue)),
                "changes": changes.as_ref().map(Changes::json),
            });
            print(&format!("{}\n", serde_json::to_string_pretty(&whole)?))?;
        }
        Format::Text => {
            let mut out = lines("error", &found.problems);
            out.push_str(&lines(if strict { "error" } else { "warning" }, &found.warnings));
            out.push_str(&lines("warning", &found.of_today));
            for answer in &asked {
                let of = |name: &str| answer[name].as_str().map_or_else(|| answer[name].to_string(), str::to_owned);
                out.push_str(&format!("asked: provider `{}` at {}: {}\n", of("provider"), of("host"), of("answer")));
            }
            if let Some((registry, catalogue)) = sides {
                out.push_str(&format!("ok: registry {}, catalogue {}\n", registry.revision(), catalogue.revision()));
            }
            out.extend(changes.as_ref().map(Changes::text));
            print(&out)?;
        }
    }
    Ok(if valid { Exit::Ok } else { Exit::Invalid })
}

/// A document's name and its content.
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
        Some(path) => Catalogue::embedded()?.value.overlaid(&document, &bytes(path)?),
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
    /// Checks everything that `serve` would start with. Returns the setup if it is valid.
    fn all(&mut self, serve: ServeArgs, elsewhere: bool) -> Option<Setup> {
        let (paths, overrides) = serve.layers();
        let loaded = config::load(&paths, &overrides);
        // Problems of the documents or of other settings must not hide those of listeners and callers.
        if let Ok((settings, problems)) = config::settings_with_problems(&paths, &overrides) {
            // An invalid value is replaced by its default here, so a fault that rests on it may not be real. A misspelt key is not in force
            // anyway, and hides nothing.
            let known: Vec<String> = config::list_settings(&settings).into_iter().map(|(key, _)| key).collect();
            let is_value = |place: &str| known.iter().any(|key| key == place || key.starts_with(&format!("{place}.")));
            let is_sure = |fault: &ServerError| match fault {
                ServerError::Exposed(_) | ServerError::Anonymous(_) => {
                    let concerns = |place: &str| EXPOSURE.iter().any(|part| place.starts_with(part)) && is_value(place);
                    !problems.iter().any(|problem| concerns(&problem.place))
                }
                ServerError::Listen { setting, .. } | ServerError::Address { setting, .. } => {
                    !problems.iter().any(|problem| problem.place == *setting)
                }
                _ => true,
            };
            let document = paths.config.as_ref().map_or_else(|| "configuration".to_owned(), |path| path.display().to_string());
            let is_of_here = |fault: &ServerError| {
                matches!(
                    fault,
                    ServerError::File { .. } | ServerError::Content { .. } | ServerError::Lines(_) | ServerError::Listen { .. }
                )
            };
            let server::Review { faults, near_ends, in_use } = server::review(&settings.edge());
            let faults = faults.into_iter().filter(|fault| is_sure(fault) && !(elsewhere && is_of_here(fault)));
            self.problems.extend(faults.map(|fault| of_server(&document, &fault)));
            let report = |of: &mut Vec<Problems>, list: Vec<(&'static str, String)>| {
                let list: Vec<Problem> = list.into_iter().map(|(setting, message)| Problem::at(setting, message)).collect();
                of.extend((!elsewhere && !list.is_empty()).then(|| Problems { document: document.clone(), list }));
            };
            report(&mut self.warnings, near_ends);
            let is_set = |(setting, _): &(&str, String)| !problems.iter().any(|problem| problem.place == *setting);
            report(&mut self.of_today, in_use.into_iter().filter(is_set).collect());
            if loaded.is_err() && !elsewhere {
                self.warnings.extend(config::readable_secrets(&settings));
            }
        }
        match loaded {
            Ok(mut setup) => {
                self.warnings.append(&mut setup.warnings);
                if !elsewhere {
                    self.tier(&setup);
                }
                self.prober(&setup);
                let Snapshot { registry, catalogue, catalogue_origin, .. } = &setup.snapshot;
                let today = jiff::Timestamp::now().to_zoned(jiff::tz::TimeZone::UTC).date();
                for (of, list) in
                    [(&mut self.warnings, unused_rows(registry, catalogue)), (&mut self.of_today, aged_rows(catalogue, today))]
                {
                    if !list.is_empty() {
                        of.push(Problems { document: catalogue_origin.source.clone(), list });
                    }
                }
                Some(setup)
            }
            Err(ConfigError(problems)) => {
                self.problems.extend(problems);
                None
            }
        }
    }

    /// Checks whether the shared tier could be set up. It does not connect to it.
    fn tier(&mut self, setup: &Setup) {
        match config::tier_access(&setup.settings) {
            Ok(TierFiles { access, certificate, warnings }) => {
                self.warnings.extend(warnings);
                if let Some((setting, message)) = certificate.and_then(server::near_end_warning) {
                    let document = config::source_of(setup.settings.tier.client_certificate_file.as_ref());
                    self.warnings.push(Problems { document, list: vec![Problem::at(setting, message)] });
                }
                if let Some(Err(fault)) = access.map(Tier::new) {
                    let document = config::source_of(setup.settings.tier.ca_file.as_ref());
                    self.problems.push(Problems { document, list: vec![Problem::at("", fault.to_string())] });
                }
            }
            Err(ConfigError(problems)) => self.problems.extend(problems),
        }
    }

    /// Checks whether the prober could be built, and which providers it may not probe.
    fn prober(&mut self, setup: &Setup) {
        match app::prober(setup) {
            Ok(prober) => self.warnings.extend(app::forbidden_destinations(&setup.snapshot, &prober)),
            Err(fault) => {
                let document = config::source_of(setup.settings.probe.ca_file.as_ref());
                self.problems.push(Problems { document, list: vec![Problem::at("", chain(&fault))] });
            }
        }
    }

    /// Sends each provider's requests without a key until an answer is one of an API. One path may be missing although there is an API.
    async fn ask_without_key(&mut self, snapshot: &Snapshot, prober: &HttpProber) -> Vec<Value> {
        let mut answers = Vec::new();
        for provider in snapshot.registry.providers() {
            let Ok(target) = target(provider, &snapshot.catalogue, "made-up-model") else { continue };
            let mut last = None;
            for call in &target.calls {
                let response = prober.control(call, &[], None).await;
                let is_missing = is_missing(&response);
                last = Some(response);
                if !is_missing {
                    break;
                }
            }
            let Some(response) = last else { continue };
            let (answer, fault, warning) = match &response {
                ProbeResponse::Answer { reading, shape, .. } if is_missing(&response) => {
                    let cause = Cause::NoApiAtBaseUrl;
                    let fault = format!(
                        "answers without a key with HTTP {}, {}: there is no API at this base URL; correct it in the registry",
                        shape.status,
                        reading.cause.text()
                    );
                    (format!("HTTP {}, {}: {cause}", shape.status, reading.cause.text()), Some(fault), None)
                }
                ProbeResponse::Answer { shape, .. } => (
                    match shape.status {
                        429 => "HTTP 429 (it limits the rate)".to_owned(),
                        status @ 500.. => format!("HTTP {status} (it fails: look at the vendor's status page)"),
                        status => format!("HTTP {status}"),
                    },
                    None,
                    None,
                ),
                ProbeResponse::TimedOut => {
                    let said = "gave no answer in time; look at egress to that host, and at the vendor's status page";
                    ("no answer in time".into(), None, Some(said.to_owned()))
                }
                // The check without a request has reported it already, since no name had to be resolved.
                ProbeResponse::Unreachable(Unreached::Address) if target.calls.iter().any(|call| !prober.may_ask(call)) => {
                    ("not dialled".into(), None, None)
                }
                ProbeResponse::Unreachable(Unreached::Address) => {
                    ("not dialled".into(), Some(unreached(Unreached::Address)), None)
                }
                ProbeResponse::Exhausted => {
                    let said = "no descriptor or memory is left here for a connection";
                    ("not asked".into(), None, Some(said.to_owned()))
                }
                ProbeResponse::Unreachable(why) => {
                    (format!("not reachable from here: {}", cause::unreached(*why)), None, Some(unreached(*why)))
                }
            };
            let problem = |text: String| {
                let place = format!("providers.{}", provider.name);
                let list = vec![Problem::at(place, format!("{}: {text}", target.endpoint.host))];
                Problems { document: snapshot.registry_origin.source.clone(), list }
            };
            self.problems.extend(fault.map(problem));
            self.warnings.extend(warning.map(problem));
            answers.push(json!({"provider": provider.name, "host": target.endpoint.host, "answer": answer}));
        }
        answers
    }

    fn take<T>(&mut self, checked: Checked<T>) -> Option<T> {
        checked.map(|(_, loaded)| loaded.value).map_err(|problems| self.problems.push(problems)).ok()
    }
}

/// The text of a failure to reach a provider, with the remedy.
fn unreached(why: Unreached) -> String {
    format!("{}; {}", cause::unreached_text(why), cause::unreached_remedy(why))
}

/// A fault that would keep a server from starting, as a problem of its setting or file.
fn of_server(configuration: &str, fault: &ServerError) -> Problems {
    let (document, problem) = match fault {
        ServerError::Address { setting, message } => (configuration.to_owned(), Problem::at(*setting, message.clone())),
        ServerError::File { path, source } => {
            (path.display().to_string(), Problem::at("", format!("could not be read: {source}")))
        }
        ServerError::Content { path, message } => (path.display().to_string(), Problem::at("", message.clone())),
        ServerError::Lines(problems) => return problems.clone(),
        ServerError::Listen { setting, address, source } => {
            (configuration.to_owned(), Problem::at(*setting, format!("could not listen on {address}: {source}")))
        }
        ServerError::Exposed(_) | ServerError::Anonymous(_) | ServerError::Reflection(_) | ServerError::TaskEnded(_) => {
            (configuration.to_owned(), Problem::at("server.listen", chain(fault)))
        }
    };
    Problems { document, list: vec![problem] }
}

/// Whether the answer is not one of an API: the path does not exist, or it is a web page.
fn is_missing(response: &ProbeResponse) -> bool {
    let ProbeResponse::Answer { reading, shape, .. } = response else { return false };
    reading.cause == Cause::NotFound || reading.cause == Cause::Page && !matches!(shape.status, 401 | 403 | 407)
}

/// The operator's catalogue rows that no provider of the registry uses, as when a host is misspelt or lacks its port.
fn unused_rows(registry: &Registry, catalogue: &Catalogue) -> Vec<Problem> {
    let bases: Vec<(&Provider, &Url)> = registry
        .providers()
        .iter()
        .filter_map(|provider| Some((provider, provider.base_url.as_ref().or_else(|| catalogue.home(&provider.name))?)))
        .collect();
    let used: Vec<*const HostRow> = bases
        .iter()
        .filter_map(|(provider, base)| {
            Some(std::ptr::from_ref(catalogue.row(&host_of(base)?, base.path(), provider.protocol)?))
        })
        .collect();
    let mut problems = Vec::new();
    for (host, rows) in catalogue.hosts() {
        for row in rows.iter().filter(|row| row.is_overlaid && !used.contains(&std::ptr::from_ref(*row))) {
            let other_port = bases
                .iter()
                .find(|(_, base)| base.host_str() == host.split(':').next() && host_of(base).as_deref() != Some(host));
            let message = match other_port {
                Some((provider, base)) => format!(
                    "matches no provider of the registry: provider `{}` is dialled at `{}`; write the port with the host",
                    provider.name,
                    host_of(base).unwrap_or_default()
                ),
                None => "matches no provider of the registry: this row is unused".to_owned(),
            };
            problems.push(Problem::at(format!("hosts.{host}{}", row.path_prefix), message));
        }
    }
    problems
}

/// Catalogue rows whose facts are older than a year. The vendor may answer differently by now.
fn aged_rows(catalogue: &Catalogue, today: Date) -> Vec<Problem> {
    let rows = catalogue.hosts().flat_map(|(host, rows)| rows.iter().map(move |row| (host, row)));
    let aged = rows.filter_map(|(host, row)| {
        let since = row.since?;
        let last_year = since.saturating_add(jiff::Span::new().years(1)) < today;
        last_year.then(|| {
            let message = format!("its facts are of {since}; `byok-gate catalogue verify` tells whether they still hold");
            Problem::at(format!("hosts.{host}{}", row.path_prefix), message)
        })
    });
    aged.collect()
}

/// The registry's providers whose credentials cannot be probed, and why. They are allowed if the credential is present.
fn not_asked(registry: &Registry, catalogue: &Catalogue) -> Vec<Value> {
    let reasons = registry.providers().iter().filter_map(|provider| {
        let reason = target(provider, catalogue, "").err()?;
        Some(json!({"provider": provider.name, "reason": reason.reason(), "note": reason.text()}))
    });
    reasons.collect()
}

fn rows<'f>(found: impl Iterator<Item = &'f Problems>) -> Vec<Value> {
    let rows = found.flat_map(|Problems { document, list }| {
        list.iter().map(move |Problem { place, line, message }| {
            json!({"document": document, "line": line, "place": place, "message": message})
        })
    });
    rows.collect()
}

/// Lines of `error: FILE:LINE: PLACE: MESSAGE`, which editors and CI systems can read.
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
