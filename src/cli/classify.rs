//! `byok-gate classify`: which verdict would this answer get, by which row, and what would be asked next? Nothing is sent.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read},
    path::PathBuf,
    time::SystemTime,
};

use anyhow::Context;
use clap::Args;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde::Deserialize;
use serde_json::{Value, json};
use url::Url;

use super::{
    check,
    exit::{Exit, Format, UsageError, print},
};
use crate::{
    config::ConfigError,
    core::{
        catalogue::{Catalogue, HostRow, Probe, Signal},
        classify::{Answer, Calibration, Classification, Classified, Next, ProbePlan, ProbeResponse, classified, is_page},
        endpoint::{Call, MODEL, call},
    },
    domain::{problem::Loaded, protocol::Protocol, verdict::Verdict},
    liveness::prober::{MAX_BODY_BYTES, retry_after},
};

/// The longest line of a batch: the body that is read, twice as long in JSON's escapes, and a little.
const MAX_LINE_BYTES: u64 = 2 * MAX_BODY_BYTES as u64 + 16 * 1024;
/// What stands for a model where a request has to be shown.
const SOME_MODEL: &str = "MODEL";

#[derive(Debug, Args)]
pub(super) struct ClassifyArgs {
    /// The host that answered, with its port if that is not the scheme's own.
    #[arg(long, required_unless_present = "batch")]
    host: Option<String>,
    /// The request that it answered, such as `GET /v1/models`.
    #[arg(long, value_name = "METHOD PATH", required_unless_present = "batch")]
    request: Option<String>,
    /// The answer's status.
    #[arg(long, required_unless_present = "batch")]
    status: Option<u16>,
    /// A header of the answer (repeatable).
    #[arg(long = "header", value_name = "NAME: VALUE")]
    headers: Vec<String>,
    /// The answer's body: text, `@FILE`, or `@-` for standard input.
    #[arg(long, default_value = "")]
    body: String,
    /// Classify a file of JSON lines `{host, request, status, headers, body}`, or `-` for standard input: one line of JSON each.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["host", "request", "status", "headers", "body", "format"])]
    batch: Option<PathBuf>,
    /// How the answer is written.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// A probe catalogue to lay over the embedded one, host by host.
    #[arg(long, value_name = "FILE")]
    probe_catalog: Option<PathBuf>,
}

/// One answer that a vendor gave.
#[derive(Debug, Deserialize)]
struct Given {
    host: String,
    request: String,
    status: u16,
    #[serde(default)]
    headers: serde_json::Map<String, Value>,
    /// Text, or JSON as it stands.
    #[serde(default)]
    body: Value,
    /// There was more of the body.
    #[serde(default)]
    truncated: bool,
}

pub(super) fn run(args: ClassifyArgs) -> anyhow::Result<Exit> {
    let ClassifyArgs { host, request, status, headers, body, batch, format, probe_catalog } = args;
    let (_, Loaded { value: catalogue, .. }) =
        check::catalogue(probe_catalog.as_ref()).map_err(|problems| ConfigError(vec![problems]))?;
    let (host, request, status) = match (batch, host, request, status) {
        (Some(path), ..) => return run_batch(&catalogue, &path),
        (None, Some(host), Some(request), Some(status)) => (host, request, status),
        (None, ..) => return Err(UsageError("--host, --request and --status go together".into()).into()),
    };
    let mut given = serde_json::Map::new();
    for line in headers {
        let (name, value) =
            line.split_once(':').ok_or_else(|| UsageError(format!("--header `{line}` is not of the form `NAME: VALUE`")))?;
        given.insert(name.trim().to_owned(), value.trim().into());
    }
    let body = match body.strip_prefix('@') {
        None => body.into_bytes(),
        Some("-") => capped(io::stdin())?,
        Some(path) => capped(fs::File::open(path).with_context(|| format!("{path}: could not be read"))?)?,
    };
    let report =
        report(&catalogue, &Given { host, request, status, headers: given, body: Value::Null, truncated: false }, &body)?;
    match format {
        Format::Json => print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?,
        Format::Text => print(&text(&report))?,
    }
    Ok(Exit::Ok)
}

/// One line of JSON for each line of the file; a line that says nothing classifiable gets its fault, and the others go on.
fn run_batch(catalogue: &Catalogue, path: &PathBuf) -> anyhow::Result<Exit> {
    let mut lines: Box<dyn BufRead> = match path.to_str() {
        Some("-") => Box::new(BufReader::new(io::stdin())),
        _ => Box::new(BufReader::new(fs::File::open(path).with_context(|| format!("{}: could not be read", path.display()))?)),
    };
    let mut all_good = true;
    for number in 1_usize.. {
        let mut line = Vec::new();
        if lines.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line)? == 0 {
            break;
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let given = serde_json::from_slice::<Given>(&line).map_err(|fault| fault.to_string());
        let told = given.and_then(|given| {
            let body = match &given.body {
                Value::Null => Vec::new(),
                Value::String(text) => text.clone().into_bytes(),
                json => json.to_string().into_bytes(),
            };
            report(catalogue, &given, &body).map_err(|fault| fault.to_string())
        });
        let told = told.unwrap_or_else(|error| {
            all_good = false;
            json!({"line": number, "error": error})
        });
        print(&format!("{told}\n"))?;
    }
    Ok(if all_good { Exit::Ok } else { Exit::Usage })
}

fn capped(from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(MAX_BODY_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// What is known of this answer.
fn report(catalogue: &Catalogue, given: &Given, body: &[u8]) -> Result<Value, UsageError> {
    let (method, path) = given
        .request
        .split_once(' ')
        .filter(|(_, path)| path.starts_with('/'))
        .ok_or_else(|| UsageError(format!("request `{}` is not of the form `GET /v1/models`", given.request)))?;
    if !(200..=599).contains(&given.status) {
        return Err(UsageError(format!("status {} is not an HTTP answer's", given.status)));
    }
    let host = given.host.to_ascii_lowercase();
    let Asked { row, probes, at, base } = asked(catalogue, &host, method, path)?;
    let headers = header_map(&given.headers)?;
    let answer = Answer {
        status: given.status,
        body: body.get(..MAX_BODY_BYTES).unwrap_or(body),
        truncated: given.truncated || body.len() > MAX_BODY_BYTES,
        page: is_page(&headers),
        retry_after: headers.get(header::RETRY_AFTER).and_then(|value| retry_after(value, SystemTime::now())),
    };
    let calls: Vec<Call> = probes.iter().skip(at).filter_map(|probe| call(&base, probe, SOME_MODEL, false, None)).collect();
    let Some(probe) = probes.get(at) else {
        return Err(UsageError(format!("host `{host}` has no such probe")));
    };
    let Classified { classification, signal } = classified(answer, probe);
    // So a calibration that tells would have been answered: as this answer was, where it is a refusal.
    let refusing = Calibration::Refuses { status: given.status, error_code: code_of(&classification).to_owned() };
    let (verdict, once_calibrated) = (verdict(&classification, probe.refuses_bad_keys), told_by(&classification));
    let next = next(&calls, given.status, &classification, answer.retry_after, &refusing);
    let signal = signal.and_then(|position| Some((position, probe.signals.get(position)?)));
    Ok(json!({
        "host": host,
        "request": given.request,
        "status": given.status,
        "asked_by": if row.is_some() { "row" } else { "default" },
        "probe": probe.name,
        "reading": word(&classification),
        "signal": signal.map(|(position, signal)| shown(position, signal)),
        "verdict": verdict.as_str(),
        "once_calibrated": once_calibrated.filter(|calibrated| *calibrated != verdict).map(Verdict::as_str),
        "next": next,
        "confidence": row.and_then(|row| row.confidence).map(|confidence| confidence.as_str()),
        "sources": row.map(|row| row.sources.as_slice()).unwrap_or_default(),
    }))
}

/// The rung of a ladder that sends a request.
struct Asked<'c> {
    row: Option<&'c HostRow>,
    probes: &'c [Probe],
    at: usize,
    base: Url,
}

fn asked<'c>(catalogue: &'c Catalogue, host: &str, method: &str, path: &str) -> Result<Asked<'c>, UsageError> {
    let path = path.split('?').next().unwrap_or(path);
    let rows = catalogue.hosts().find(|(name, _)| *name == host).map(|(_, rows)| rows).unwrap_or_default();
    let nearest = catalogue.row(host, path);
    let by_row = nearest.into_iter().chain(rows).map(|row| (Some(row), row.probes.as_slice()));
    // A host without a ladder of its own is asked by its protocol's.
    let with_ladder = rows.iter().any(|row| !row.probes.is_empty());
    let defaults = [Protocol::OpenAi, Protocol::Anthropic].map(|protocol| (nearest, catalogue.default_probes(protocol)));
    let ladders: Vec<_> = by_row.chain(defaults.into_iter().filter(|_| !with_ladder)).collect();
    for (row, probes) in &ladders {
        for (at, probe) in probes.iter().enumerate() {
            if let Some(base_path) = (probe.method.as_str() == method).then(|| base_path(&probe.path, path)).flatten() {
                let base = Url::parse(&format!("https://{host}{base_path}"))
                    .map_err(|fault| UsageError(format!("`{host}` is not a host: {fault}")))?;
                return Ok(Asked { row: *row, probes, at, base });
            }
        }
    }
    let mut known: Vec<String> = Vec::new();
    for probe in ladders.iter().flat_map(|(_, probes)| probes.iter()) {
        let request = format!("`{} {}`", probe.method.as_str(), probe.path);
        if !known.contains(&request) {
            known.push(request);
        }
    }
    Err(UsageError(format!("host `{host}` is not asked `{method} {path}`; it is asked {}", known.join(", "))))
}

/// The path of the base URL that makes this request of a probe's path; `None` if none does.
fn base_path<'p>(template: &str, path: &'p str) -> Option<&'p str> {
    let template = template.split('?').next().unwrap_or(template);
    let tail = template.strip_prefix("{base}");
    let wanted: Vec<&str> = tail.unwrap_or(template).split('/').skip(1).collect();
    let mut rest = path;
    for segment in wanted.iter().rev() {
        let (before, found) = rest.rsplit_once('/')?;
        if *segment != MODEL && *segment != found {
            return None;
        }
        rest = before;
    }
    (tail.is_some() || rest.is_empty()).then_some(rest)
}

fn header_map(given: &serde_json::Map<String, Value>) -> Result<HeaderMap, UsageError> {
    let mut headers = HeaderMap::new();
    for (name, value) in given {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let pair = HeaderName::from_bytes(name.as_bytes()).ok().zip(HeaderValue::from_str(&value).ok());
        let (name, value) = pair.ok_or_else(|| UsageError(format!("`{name}` is not a header")))?;
        headers.append(name, value);
    }
    Ok(headers)
}

/// What this answer makes, if nothing that is heard later says otherwise.
fn verdict(classification: &Classification, refuses_bad_keys: bool) -> Verdict {
    match classification {
        Classification::Accepted if refuses_bad_keys => Verdict::Valid,
        Classification::Accepted => Verdict::NotCalibrated,
        Classification::Restricted => Verdict::UnexpectedResponse,
        Classification::Forbidden(_) => Verdict::Forbidden,
        Classification::Verdict(verdict) => *verdict,
    }
}

/// What it makes once the endpoint was seen to refuse a made-up key, in the same way where this is a refusal.
fn told_by(classification: &Classification) -> Option<Verdict> {
    match classification {
        Classification::Accepted => Some(Verdict::Valid),
        Classification::Forbidden(_) => Some(Verdict::Invalid),
        Classification::Restricted | Classification::Verdict(_) => None,
    }
}

fn code_of(classification: &Classification) -> &str {
    match classification {
        Classification::Forbidden(code) => code,
        Classification::Accepted | Classification::Restricted | Classification::Verdict(_) => "",
    }
}

fn word(classification: &Classification) -> &'static str {
    match classification {
        Classification::Accepted => "ACCEPTED",
        Classification::Restricted => "RESTRICTED",
        Classification::Forbidden(_) => Verdict::Forbidden.as_str(),
        Classification::Verdict(verdict) => verdict.as_str(),
    }
}

/// What the ladder asks after this answer, the endpoint's calibration being known and good.
fn next(
    calls: &[Call],
    status: u16,
    classification: &Classification,
    retry_after: Option<std::time::Duration>,
    calibration: &Calibration,
) -> Option<Value> {
    let mut plan = ProbePlan::new(calls);
    let Next::Ask(..) = plan.proceed() else { return None };
    let response = ProbeResponse::Answer { status, classification: classification.clone(), retry_after };
    if plan.record(response, calibration).is_some() {
        return None;
    }
    match plan.proceed() {
        Next::Done(_) => None,
        Next::Ask(call, family) => Some(json!({
            "probe": call.probe.name,
            "request": format!("{} {}", call.probe.method.as_str(), call.url.path()),
            "header": family.header(),
        })),
    }
}

fn shown(position: usize, signal: &Signal) -> Value {
    json!({
        "position": position,
        "verdict": signal.outcome.as_str(),
        "confidence": signal.confidence.map(|confidence| confidence.as_str()),
        "note": signal.note,
    })
}

fn text(report: &Value) -> String {
    let of = |pointer: &str| match report.pointer(pointer) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(items)) => items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("; "),
        Some(other) => other.to_string(),
    };
    let mut out = format!("{}\n", of("/verdict"));
    let mut line = |label: &str, value: String| {
        if !value.is_empty() {
            out.push_str(&format!("  {label:14}{value}\n"));
        }
    };
    let calibrated = of("/once_calibrated");
    if !calibrated.is_empty() {
        line("calibrated", format!("{calibrated}, once the endpoint was seen to refuse a made-up key so"));
    }
    line(
        "host",
        format!("{}, asked by {}", of("/host"), if of("/asked_by") == "row" { "its row" } else { "the default ladder" }),
    );
    line("probe", format!("{} ({})", of("/probe"), of("/request")));
    line("reading", of("/reading"));
    let position = of("/signal/position");
    let by = if position.is_empty() {
        "no signal: status and shape".to_owned()
    } else {
        let confidence = of("/signal/confidence");
        let known = if confidence.is_empty() { String::new() } else { format!(" (confidence {confidence})") };
        format!("signals[{position}] -> {}{known}", of("/signal/verdict"))
    };
    line("by", by);
    line("note", of("/signal/note"));
    line("sources", of("/sources"));
    let probe = of("/next/probe");
    let next = format!("{probe}: {}, key in {}", of("/next/request"), of("/next/header"));
    line("next", if probe.is_empty() { "nothing: this ends the ladder".into() } else { next });
    out
}
