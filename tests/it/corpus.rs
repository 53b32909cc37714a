//! The corpus of vendors' answers in `tests/fixtures/answers`, read without a network.
//!
//! One line is one answer and what it means: `case`, `host`, `request`, `status`, `headers`, `body`, `truncated`, and under
//! `expect` the classification and the verdict while nothing is known of how the endpoint treats bad keys. The bodies are made up
//! after what vendors document and what people report; no key in them ever existed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::PathBuf,
    sync::LazyLock,
};

use byok_gate::{
    core::{
        catalogue::{Catalogue, Probe},
        classify::{Answer, Classification, ReadBy, classify, is_page, read},
    },
    domain::{protocol::Protocol, verdict::Verdict},
};
use http::HeaderMap;
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::Value;

/// How often a models list misleads: a false "yes", and a false "no".
const TRAPS: [(&str, usize); 2] = [("fv", 12), ("fi", 15)];

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Line {
    pub(crate) case: String,
    pub(crate) host: String,
    pub(crate) request: String,
    pub(crate) status: u16,
    #[serde(default)]
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Value,
    #[serde(default)]
    pub(crate) truncated: bool,
    pub(crate) expect: Expect,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Expect {
    pub(crate) reading: String,
    pub(crate) verdict: String,
}

pub(crate) fn files() -> Vec<PathBuf> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/answers");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

pub(crate) fn lines(file: &PathBuf) -> Vec<Line> {
    let text = fs::read_to_string(file).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|fault| panic!("{fault}: {line}"))).collect()
}

pub(crate) fn corpus() -> Vec<Line> {
    files().iter().flat_map(lines).collect()
}

static EMBEDDED: LazyLock<Catalogue> = LazyLock::new(|| Catalogue::embedded().unwrap().value);

#[test]
fn the_corpus_is_wide_enough() {
    let (corpus, catalogue) = (corpus(), &*EMBEDDED);
    let names: BTreeSet<&str> = corpus.iter().map(|line| line.case.as_str()).collect();
    assert_eq!(names.len(), corpus.len(), "a case's name appears twice");
    assert!(corpus.len() >= 460, "{} rows", corpus.len());
    let vendors: BTreeSet<&str> =
        corpus.iter().flat_map(|line| catalogue.rows_of(&line.host)).map(|row| row.vendor.as_str()).collect();
    assert!(vendors.len() >= 45, "{vendors:?}");
    for (kind, count) in TRAPS {
        for number in 1..=count {
            let trap = format!("trap-{kind}-{number}-");
            assert!(names.iter().any(|name| name.starts_with(&trap)), "no row for {trap}");
        }
    }
    // Some answer matches every signal of every row, so that none is untested. Hosts share rows.
    let mut met = BTreeSet::new();
    for line in &corpus {
        let body = body_of(line);
        let Line { status, truncated, .. } = *line;
        for probe in catalogue.rows_of(&line.host).iter().flat_map(|row| &row.probes) {
            let answer = Answer { status, body: &body, truncated, page: false, retry_after: None };
            if let ReadBy::Signal(position) = read(answer, probe).by {
                met.insert(format!("{:?}", probe.signals[position]));
            }
        }
    }
    let unmet: Vec<String> = catalogue
        .hosts()
        .flat_map(|(_, rows)| rows)
        .flat_map(|row| &row.probes)
        .flat_map(|probe| &probe.signals)
        .map(|signal| format!("{signal:?}"))
        .filter(|signal| !met.contains(signal))
        .collect();
    assert!(unmet.is_empty(), "no answer of the corpus meets these:\n{}", unmet.join("\n"));
    // So does some answer with each text that many servers share.
    let document: Value = serde_yaml::from_str(include_str!("../../src/core/catalogue/default.yaml")).unwrap();
    let mut known = 0;
    for listed in document["common_codes"]["texts"].as_array().unwrap() {
        for text in listed["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()) {
            let holds = |line: &&Line| String::from_utf8_lossy(&body_of(line)).to_lowercase().contains(text);
            let is_met = corpus.iter().filter(holds).any(|line| listed["verdict"] == *line.expect.reading);
            assert!(is_met, "no answer of the corpus holds `{text}`");
            known += 1;
        }
    }
    assert!(known > 25, "{known}");
}

/// The probe that sends this line's request: of the host's rows, or of the default ones where it has none.
fn probe_of<'c>(line: &Line, catalogue: &'c Catalogue) -> Option<&'c Probe> {
    let (method, path) = line.request.split_once(' ').unwrap();
    let protocols = [Protocol::OpenAi, Protocol::Anthropic];
    let rows = catalogue.rows_of(&line.host);
    let nearest = protocols.iter().filter_map(|protocol| catalogue.row(&line.host, path, *protocol));
    let own = nearest.chain(rows).flat_map(|row| &row.probes);
    let default = protocols.iter().flat_map(|protocol| catalogue.default_probes(*protocol));
    let default = default.filter(|_| rows.iter().all(|row| row.probes.is_empty()));
    let without_query = |path: &'c str| path.split('?').next().unwrap();
    own.chain(default).find(|probe| {
        let fits = match without_query(&probe.path).strip_prefix("{base}") {
            Some(behind) => path.ends_with(behind),
            None => path == without_query(&probe.path),
        };
        fits && probe.method.as_str() == method
    })
}

/// The probes that send the corpus's requests read their answers as it says.
#[test]
fn every_probe_reads_its_answers() {
    let (mut met, mut wrong) = (0, Vec::new());
    for line in corpus() {
        // `byok-gate classify` knows what is like a probe's request, too: `classify_reads_every_answer`.
        let Some(probe) = probe_of(&line, &EMBEDDED) else { continue };
        let (body, headers) = (body_of(&line), HeaderMap::try_from(&line.headers.clone().into_iter().collect::<HashMap<_, _>>()));
        let page = is_page(&headers.unwrap());
        let answer = Answer { status: line.status, body: &body, truncated: line.truncated, page, retry_after: None };
        let found = match read(answer, probe).classification {
            Classification::Accepted => "ACCEPTED",
            Classification::Restricted => "RESTRICTED",
            Classification::Forbidden(_) => Verdict::Forbidden.as_str(),
            Classification::Unread => Verdict::UnexpectedResponse.as_str(),
            Classification::Verdict(verdict) => verdict.as_str(),
        };
        if found != line.expect.reading {
            wrong.push(format!("{} at {}: expected {}, found {found}", line.case, line.host, line.expect.reading));
        }
        met += 1;
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(met >= 480, "{met}");
}

proptest! {
    /// Any answer can be classified; and a malformed one is never a "yes".
    #[test]
    fn any_answer_is_read(status in 100_u16..=999, body in any_body(), truncated: bool, page: bool) {
        let answer = Answer { status, body: &body, truncated, page, retry_after: None };
        for probe in EMBEDDED.hosts().flat_map(|(_, rows)| rows).flat_map(|row| &row.probes) {
            let accepted = classify(answer, probe) == Classification::Accepted;
            prop_assert!(!accepted || (200..=299).contains(&status) || status == 400 && probe.name == "search");
        }
    }
}

/// Bytes, and JSON with the values that rows test.
fn any_body() -> impl Strategy<Value = Vec<u8>> {
    const WORDS: [&str; 16] = [
        "data",
        "error",
        "code",
        "base_resp",
        "status_code",
        "balance",
        "valid",
        "auth",
        "query",
        "1004",
        "choices",
        "content",
        "limit_remaining",
        "is_available",
        "usage",
        "id",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(WORDS.as_slice()).prop_map(Value::from),
    ];
    let json = leaf.prop_recursive(4, 24, 4, |inner| {
        let key = prop::sample::select(WORDS.as_slice()).prop_map(str::to_owned);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key, inner, 0..4).prop_map(|fields| fields.into_iter().collect::<Value>()),
        ]
    });
    prop_oneof![prop::collection::vec(any::<u8>(), 0..200), json.prop_map(|json| json.to_string().into_bytes())]
}

pub(crate) fn body_of(line: &Line) -> Vec<u8> {
    match &line.body {
        Value::String(text) => text.clone().into_bytes(),
        json => json.to_string().into_bytes(),
    }
}
