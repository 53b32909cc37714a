//! `byok-gate classify`: shows which verdict an answer would get, by which catalogue row, and which request would come next. It sends nothing.

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
        classify::{Answer, Calibration, Classification, ProbeResponse, ReadBy, Reading, is_page, read},
        endpoint::{Call, MODEL, call},
        endpoint_facts::EndpointFacts,
        probe_plan::{Client, Next, ProbePlan, Requests},
        response_shape::ResponseShape,
    },
    domain::{
        problem::Loaded,
        protocol::{HeaderFamily, Method, Protocol, Surface},
        verdict::Verdict,
    },
    liveness::prober::{MAX_BODY_BYTES, retry_after},
};

/// The maximum length of a batch line: the body limit, doubled for JSON escapes, and some room for the rest.
const MAX_LINE_BYTES: u64 = 2 * MAX_BODY_BYTES as u64 + 16 * 1024;
/// The model in the requests that are shown.
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
    /// The output format.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// A probe catalogue to lay over the embedded one, host by host.
    #[arg(long, value_name = "FILE")]
    probe_catalog: Option<PathBuf>,
}

/// One answer that a vendor gave.
#[derive(Debug, Deserialize)]
struct RecordedAnswer {
    host: String,
    request: String,
    status: u16,
    #[serde(default)]
    headers: serde_json::Map<String, Value>,
    /// A JSON string with the text, or any other JSON value.
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
        Some("-") => read_limited(io::stdin())?,
        Some(path) => read_limited(fs::File::open(path).with_context(|| format!("{path}: could not be read"))?)?,
    };
    let report = report(
        &catalogue,
        &RecordedAnswer { host, request, status, headers: given, body: Value::Null, truncated: false },
        &body,
    )?;
    match format {
        Format::Json => print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?,
        Format::Text => print(&text(&report))?,
    }
    Ok(Exit::Ok)
}

/// Writes one line of JSON for each line of the file. A line that cannot be classified gets an error, and the others go on.
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
        let given = serde_json::from_slice::<RecordedAnswer>(&line).map_err(|fault| fault.to_string());
        let line_out = given.and_then(|given| {
            let body = match &given.body {
                Value::Null => Vec::new(),
                Value::String(text) => text.clone().into_bytes(),
                json => json.to_string().into_bytes(),
            };
            report(catalogue, &given, &body).map_err(|fault| fault.to_string())
        });
        let line_out = line_out.unwrap_or_else(|error| {
            all_good = false;
            json!({"line": number, "error": error})
        });
        print(&format!("{line_out}\n"))?;
    }
    Ok(if all_good { Exit::Ok } else { Exit::Usage })
}

fn read_limited(from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(MAX_BODY_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Classifies this answer.
fn report(catalogue: &Catalogue, given: &RecordedAnswer, body: &[u8]) -> Result<Value, UsageError> {
    let (method, path) = given
        .request
        .split_once(' ')
        .filter(|(_, path)| path.starts_with('/'))
        .ok_or_else(|| UsageError(format!("request `{}` is not of the form `GET /v1/models`", given.request)))?;
    if !(200..=599).contains(&given.status) {
        return Err(UsageError(format!("status {} is not an HTTP answer's", given.status)));
    }
    let host = given.host.to_ascii_lowercase();
    let MatchedProbe { row, probe, ladder, base, is_nearest } = match_probe(catalogue, &host, method, path)?;
    let headers = header_map(&given.headers)?;
    let answer = Answer {
        status: given.status,
        body: body.get(..MAX_BODY_BYTES).unwrap_or(body),
        truncated: given.truncated || body.len() > MAX_BODY_BYTES,
        page: is_page(&headers),
        retry_after: headers.get(header::RETRY_AFTER).and_then(|value| retry_after(value, SystemTime::now())),
    };
    let reading = read(answer, &probe);
    let calls: Vec<Call> = ladder.iter().filter_map(|probe| call(&base, probe, SOME_MODEL, false, None)).collect();
    let is_last = !calls.iter().skip(1).any(|call| call.probe.surface.is_inference());
    let at_last = probe.surface.is_inference() && (is_nearest || is_last);
    let verdict = verdict(&reading.classification, probe.refuses_bad_keys, at_last);
    let once_calibrated = verdict_if_calibrated(&reading.classification).filter(|calibrated| *calibrated != verdict);
    let next = if is_nearest { None } else { next(&calls, &reading, answer) };
    let signal = match reading.by {
        ReadBy::Signal(position) => probe.signals.get(position).map(|signal| (position, signal)),
        ReadBy::CommonCode | ReadBy::CommonText | ReadBy::Shape => None,
    };
    Ok(json!({
        "host": host,
        "request": given.request,
        "status": given.status,
        "asked_by": match (is_nearest, row) { (true, _) => "nearest", (false, Some(_)) => "row", (false, None) => "default" },
        "probe": probe.name,
        "surface": probe.surface.as_str(),
        "reading": classification_word(&reading.classification),
        "cause": reading.cause.as_str(),
        "signal": signal.map(|(position, signal)| signal_json(position, signal)),
        "verdict": verdict.as_str(),
        "once_calibrated": once_calibrated.map(Verdict::as_str),
        "next": next,
        "confidence": row.and_then(|row| row.confidence).map(|confidence| confidence.as_str()),
        "since": row.and_then(|row| row.since).map(|since| since.to_string()),
        "sources": row.map(|row| row.sources.as_slice()).unwrap_or_default(),
    }))
}

/// The probe that sends a request, or the nearest one.
struct MatchedProbe<'c> {
    row: Option<&'c HostRow>,
    probe: Probe,
    /// The probe with the later ones of its row.
    ladder: &'c [Probe],
    base: Url,
    is_nearest: bool,
}

fn match_probe<'c>(catalogue: &'c Catalogue, host: &str, method: &str, path: &str) -> Result<MatchedProbe<'c>, UsageError> {
    let path = path.split('?').next().unwrap_or(path);
    let base = |path: &str| {
        Url::parse(&format!("https://{host}{path}")).map_err(|fault| UsageError(format!("`{host}` is not a host: {fault}")))
    };
    let method: Method =
        method.parse().map_err(|_| UsageError(format!("`{method}` is no method of a probe; these are GET and POST")))?;
    let rows = catalogue.rows_of(host);
    let protocols = [Protocol::OpenAi, Protocol::Anthropic];
    let nearest: Vec<&HostRow> = protocols.iter().filter_map(|protocol| catalogue.row(host, path, *protocol)).collect();
    // A host without probes of its own uses its protocol's default probes.
    let with_ladder = rows.iter().any(|row| !row.probes.is_empty());
    let default = nearest.first().copied();
    let defaults = protocols.map(|protocol| (default, catalogue.default_probes(protocol)));
    let by_row = nearest.iter().copied().chain(rows).map(|row| (Some(row), row.probes.as_slice()));
    let ladders: Vec<(Option<&HostRow>, &[Probe])> = by_row.chain(defaults.into_iter().filter(|_| !with_ladder)).collect();
    for (row, probes) in &ladders {
        for (at, probe) in probes.iter().enumerate() {
            if let Some(base_path) = (probe.method == method).then(|| base_path(&probe.path, path)).flatten() {
                let ladder = probes.get(at..).unwrap_or_default();
                return Ok(MatchedProbe { row: *row, probe: probe.clone(), ladder, base: base(base_path)?, is_nearest: false });
            }
        }
    }
    // No probe sends this request; it may be a tenant's own completion. Use the signals of the nearest probe, and the answer shape of the request's
    // own surface.
    let surface = Surface::of_path(path);
    let rungs = || ladders.iter().flat_map(|(row, probes)| probes.iter().map(move |probe| (*row, probe)));
    let kind = |probe: &Probe| {
        (probe.surface == surface, probe.surface.is_inference() == surface.is_inference(), probe.method == method)
    };
    let Some((row, probe)) = rungs().max_by_key(|(_, probe)| kind(probe)) else {
        return Err(UsageError(format!("host `{host}` is asked nothing")));
    };
    let shapes = protocols.iter().flat_map(|protocol| catalogue.default_probes(*protocol));
    let expect =
        shapes.chain(rungs().map(|(_, probe)| probe)).find(|probe| probe.surface == surface).map(|probe| probe.expect.clone());
    let probe = Probe { surface, expect: expect.unwrap_or_else(|| probe.expect.clone()), ..probe.clone() };
    Ok(MatchedProbe { row, probe, ladder: &[], base: base("")?, is_nearest: true })
}

/// The base URL's path with which a probe's path gives this request path. `None` if there is none.
fn base_path<'p>(template: &str, path: &'p str) -> Option<&'p str> {
    let template = template.split('?').next().unwrap_or(template);
    let tail = template.strip_prefix("{base}");
    let wanted: Vec<&str> = tail.unwrap_or(template).split('/').skip(1).collect();
    let mut rest = path;
    for segment in wanted.iter().rev() {
        let (before, found) = rest.rsplit_once('/')?;
        // The placeholder stands for a model. Text may follow it.
        let fits = segment.strip_prefix(MODEL).map_or(*segment == found, |behind| found.ends_with(behind));
        if !fits {
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

/// The verdict of this answer, if no later answer changes it. `at_last`: the request calls a model, and no other probe follows.
fn verdict(classification: &Classification, refuses_bad_keys: bool, at_last: bool) -> Verdict {
    match classification {
        Classification::Accepted if refuses_bad_keys => Verdict::Valid,
        Classification::Accepted => Verdict::NotCalibrated,
        Classification::Restricted if at_last => Verdict::Forbidden,
        Classification::Restricted | Classification::Unread => Verdict::UnexpectedResponse,
        Classification::Forbidden(_) => Verdict::Forbidden,
        Classification::Verdict(verdict) => *verdict,
    }
}

/// The verdict once the endpoint is known to refuse a made-up key. If this answer is a refusal, the made-up key got the same one.
fn verdict_if_calibrated(classification: &Classification) -> Option<Verdict> {
    match classification {
        Classification::Accepted => Some(Verdict::Valid),
        Classification::Forbidden(_) | Classification::Unread => Some(Verdict::Invalid),
        Classification::Restricted | Classification::Verdict(_) => None,
    }
}

fn classification_word(classification: &Classification) -> &'static str {
    match classification {
        Classification::Accepted => "ACCEPTED",
        Classification::Restricted => "RESTRICTED",
        Classification::Forbidden(_) => Verdict::Forbidden.as_str(),
        Classification::Unread => Verdict::UnexpectedResponse.as_str(),
        Classification::Verdict(verdict) => verdict.as_str(),
    }
}

/// The request that follows this answer, if the endpoint refuses made-up keys. If this answer is a 403, they got the same one.
fn next(calls: &[Call], reading: &Reading, answer: Answer<'_>) -> Option<Value> {
    let mut plan = ProbePlan::new(calls, Client::default(), &EndpointFacts::default(), Requests::UNKNOWN);
    let shape = ResponseShape::of(answer, "");
    let calibration = match reading.classification {
        Classification::Accepted | Classification::Forbidden(_) => {
            Calibration::Refuses { shape: shape.clone(), in_words: true, by_code: true, confirmed: false }
        }
        Classification::Restricted | Classification::Unread | Classification::Verdict(_) => Calibration::NotAsked,
    };
    let mut response = Some(ProbeResponse::Answer { reading: reading.clone(), shape, retry_after: answer.retry_after });
    loop {
        match (plan.proceed(), response.take()) {
            (Next::Ask { .. }, Some(response)) => plan.take_response(response),
            (Next::Calibrate { .. }, _) => plan.take_calibration(&calibration),
            (Next::Keyless { .. }, _) => plan.take_keyless(None),
            (Next::Done(_), _) => return None,
            (Next::Ask { call, families, .. }, None) => {
                let headers: Vec<&str> = families.iter().map(|family: &HeaderFamily| family.header()).collect();
                return Some(json!({
                    "probe": call.probe.name,
                    "request": format!("{} {}", call.probe.method.as_str(), call.url.path()),
                    "header": headers.join(", "),
                }));
            }
        }
    }
}

fn signal_json(position: usize, signal: &Signal) -> Value {
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
        line("calibrated", format!("{calibrated}, once a made-up key was seen to be refused there; so, where this is a refusal"));
    }
    line(
        "host",
        format!(
            "{}, {}",
            of("/host"),
            match of("/asked_by").as_str() {
                "row" => "asked by its row",
                "default" => "asked by the default ladder",
                _ => "which no probe asks this: read by the nearest probe's signals",
            }
        ),
    );
    line("probe", format!("{} ({})", of("/probe"), of("/request")));
    line("reading", of("/reading"));
    line("cause", of("/cause"));
    let position = of("/signal/position");
    let by = if position.is_empty() {
        if of("/cause") == "COMMON_CODE" {
            "no signal: a common code".to_owned()
        } else {
            "no signal: status and shape".to_owned()
        }
    } else {
        let confidence = of("/signal/confidence");
        let known = if confidence.is_empty() { String::new() } else { format!(" (confidence {confidence})") };
        format!("signals[{position}] -> {}{known}", of("/signal/verdict"))
    };
    line("by", by);
    line("note", of("/signal/note"));
    line("since", of("/since"));
    line("sources", of("/sources"));
    let probe = of("/next/probe");
    let next = format!("{probe}: {}, key in {}", of("/next/request"), of("/next/header"));
    line("next", if probe.is_empty() { "nothing: this ends the ladder".into() } else { next });
    out
}
