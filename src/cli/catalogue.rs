//! `byok-gate catalogue verify`: checks whether endpoints still refuse made-up keys as the catalogue says. It is for a weekly job in the operator's
//! own network, and needs no real key.

use std::{collections::BTreeSet, time::Duration};

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use url::Url;

use super::{
    args::{EngineArgs, ProbeArgs},
    exit::{Exit, Format, UsageError, print},
};
use crate::{
    app,
    core::{
        catalogue::Catalogue,
        classify::{Calibration, Classification, ProbeResponse, calibration_of},
        endpoint::{self, Call},
        registry::Registry,
    },
    domain::protocol::HeaderFamily,
};

/// The model in requests, if no runtime lists one for the provider.
const SOME_MODEL: &str = "made-up-model";

#[derive(Debug, Args)]
pub(super) struct CatalogueArgs {
    #[command(subcommand)]
    command: CatalogueCommand,
}

#[derive(Debug, Subcommand)]
enum CatalogueCommand {
    /// Send a made-up key to every endpoint once in each header, slowly, and show which do not refuse it as the catalogue says.
    Verify(VerifyArgs),
}

/// Exits 0 if all endpoints answer as the catalogue says, and 12 if one does not. Endpoints that cannot be reached do not count.
#[derive(Debug, Args)]
struct VerifyArgs {
    /// Check only this provider of the registry.
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    /// Seconds between two requests.
    #[arg(long, default_value_t = 2.0)]
    pause: f64,
    /// The output format.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    probe: ProbeArgs,
}

/// One request to send with a made-up key.
struct MadeUpRequest {
    host: String,
    key_prefix: Option<String>,
    call: Call,
    family: HeaderFamily,
}

pub(super) async fn run(args: CatalogueArgs) -> anyhow::Result<Exit> {
    let CatalogueCommand::Verify(VerifyArgs { provider, pause, format, engine, probe }) = args.command;
    let pause =
        Duration::try_from_secs_f64(pause).map_err(|_| UsageError(format!("--pause {pause}: a number of seconds, 0 or more")))?;
    let mut setup = engine.load(probe)?;
    let (registry, catalogue) = (&setup.snapshot.registry, &setup.snapshot.catalogue);
    let requests = match &provider {
        Some(name) if !registry.providers().iter().any(|provider| provider.name == *name) => {
            return Err(UsageError(format!("--provider {name}: the registry has no such provider")).into());
        }
        _ => requests(registry, catalogue, provider.as_deref()),
    };
    // Each request is sent once, so no calibration is needed.
    setup.settings.probe.calibrate = false;
    let prober = app::prober(&setup)?;
    let (mut rows, mut drifted) = (Vec::new(), 0_usize);
    for (index, MadeUpRequest { host, key_prefix, call, family }) in requests.iter().enumerate() {
        if index > 0 {
            tokio::time::sleep(pause).await;
        }
        let response = prober.control(call, &[*family], key_prefix.as_deref()).await;
        let (result, status, code) = result_of(&response);
        let drift = call.probe.refuses_bad_keys && matches!(result, "ACCEPTED" | "REFUSED_ODDLY");
        drifted += usize::from(drift);
        let row = json!({
            "host": host,
            "probe": call.probe.name,
            "request": format!("{} {}", call.probe.method.as_str(), call.url.path()),
            "header": family.as_str(),
            "documented": call.probe.refuses_bad_keys,
            "result": result,
            "status": status,
            "code": code,
            "drift": drift,
        });
        if format == Format::Text {
            print(&text(&row))?;
        }
        rows.push(row);
    }
    match format {
        Format::Json => {
            let whole = json!({"asked": rows.len(), "drifted": drifted, "endpoints": rows});
            print(&format!("{}\n", serde_json::to_string_pretty(&whole)?))?;
        }
        Format::Text => print(&format!("{} requests, {drifted} not as the catalogue says\n", rows.len()))?,
    }
    Ok(if drifted == 0 { Exit::Ok } else { Exit::Drift })
}

/// The requests: every endpoint once in each of its headers. These are the endpoints of the registry's providers, and of catalogue rows that no
/// provider uses.
fn requests(registry: &Registry, catalogue: &Catalogue, only: Option<&str>) -> Vec<MadeUpRequest> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    let mut add = |host: &str, key_prefix: Option<&str>, call: Call| {
        for family in call.probe.auth.clone() {
            if seen.insert((call.url.to_string(), call.probe.method.as_str(), family)) {
                let key_prefix = key_prefix.map(str::to_owned);
                found.push(MadeUpRequest { host: host.to_owned(), key_prefix, call: call.clone(), family });
            }
        }
    };
    for provider in registry.providers().iter().filter(|provider| only.is_none_or(|only| provider.name == only)) {
        let offers = registry.runtimes().flat_map(|(_, runtime)| &runtime.offers);
        let mut listed = offers.filter(|offer| registry.provider(offer).name == provider.name).flat_map(|offer| &offer.models);
        let model = listed.next().map_or(SOME_MODEL, String::as_str);
        let Ok(target) = endpoint::target(provider, catalogue, model) else { continue };
        for call in target.calls {
            add(&target.endpoint.host, target.endpoint.key_prefix.as_deref(), call);
        }
    }
    if only.is_some() {
        return found;
    }
    for (host, rows) in catalogue.hosts() {
        for row in rows {
            // Skip host patterns, which are not addresses, and paths below an unknown base URL.
            let Ok(base) = Url::parse(&format!("https://{host}{}", row.path_prefix)) else { continue };
            for probe in row.probes.iter().filter(|probe| probe.path.starts_with('/') && !host.contains('*')) {
                if let Some(call) = endpoint::call(&base, probe, SOME_MODEL, false, None) {
                    add(host, catalogue.key_prefix_of(&row.vendor), call);
                }
            }
        }
    }
    found
}

fn result_of(response: &ProbeResponse) -> (&'static str, Option<u16>, Option<&str>) {
    let ProbeResponse::Answer { reading, shape, .. } = response else { return ("NO_ANSWER", None, None) };
    let code = Some(shape.code.as_str()).filter(|code| !code.is_empty());
    let result = match calibration_of(reading, shape) {
        Calibration::Refuses { in_words: true, .. } => "REFUSED",
        // A 403, or "alive" by a row, is a refusal too, but not in the words for a dead key.
        Calibration::Refuses { .. } if matches!(reading.classification, Classification::Forbidden(_)) => "REFUSED",
        Calibration::Refuses { .. } => "REFUSED_ODDLY",
        Calibration::AcceptsAnyone => "ACCEPTED",
        Calibration::Inconclusive(_) | Calibration::SameForEveryKey(_) | Calibration::NotWaitedFor | Calibration::NotAsked => {
            "UNTOLD"
        }
    };
    (result, Some(shape.status), code)
}

fn text(row: &Value) -> String {
    let of = |name: &str| row[name].as_str().map_or_else(|| row[name].to_string(), str::to_owned);
    let says = if row["drift"] == true { "DRIFT" } else { "ok   " };
    let documented = if row["documented"] == true { "documented to refuse" } else { "calibrated" };
    let answer = match (&row["status"], &row["code"]) {
        (Value::Null, _) => String::new(),
        (status, Value::Null) => format!(" HTTP {status}"),
        (status, _) => format!(" HTTP {status} {}", of("code")),
    };
    format!(
        "{says} {} `{}` {} ({}): {}{answer}, {documented}\n",
        of("host"),
        of("probe"),
        of("request"),
        of("header"),
        of("result")
    )
}
