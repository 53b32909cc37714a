//! Vendors' answers to a verdict: any row, any status, any headers, any body, in any order.
#![no_main]

use std::{sync::LazyLock, time::Duration};

use byok_gate::{
    core::{
        classify::{Answer, Calibration, ProbeResponse, calibration_of, is_page, read},
        endpoint::{Target, target},
        endpoint_facts::EndpointFacts,
        probe_plan::{Client, Next, ProbePlan, Requests},
        response_shape::ResponseShape,
    },
    domain::verdict::{Unreached, Verdict},
};
use byok_gate_fuzz::{CASES, EMBEDDED, byte};
use libfuzzer_sys::fuzz_target;

const KEY: &str = "made-up-canary-0123456789";

/// Every endpoint of both registries.
static TARGETS: LazyLock<Vec<Target>> = LazyLock::new(|| {
    let of = |snapshot: &'static byok_gate::core::snapshot::Snapshot| {
        snapshot.registry.providers().iter().filter_map(|it| target(it, &snapshot.catalogue, "m").ok())
    };
    of(&CASES).chain(of(&EMBEDDED)).collect()
});

/// One answer of the input's: two bytes for the status, one of flags, the rest for headers and body.
struct Given<'i> {
    status: u16,
    flags: u8,
    body: &'i [u8],
}

impl Given<'_> {
    fn response(&self, call: &byok_gate::core::endpoint::Call) -> ProbeResponse {
        match self.flags & 7 {
            6 => return ProbeResponse::TimedOut,
            7 => return ProbeResponse::Unreachable(Unreached::Closed),
            _ => {}
        }
        let mut headers = http::HeaderMap::new();
        let (line, body) = match (self.flags & 8, self.body.iter().position(|byte| *byte == b'\n')) {
            (8, Some(end)) => self.body.split_at(end),
            _ => (&b"application/json"[..], self.body),
        };
        if let Ok(value) = http::HeaderValue::from_bytes(line) {
            let name = if self.flags & 16 == 0 { "content-type" } else { "cf-mitigated" };
            headers.insert(name, value);
        }
        let retry_after = (self.flags & 32 != 0).then_some(Duration::from_secs(u64::from(self.status)));
        let answer = Answer { status: self.status, body, truncated: self.flags & 64 != 0, page: is_page(&headers), retry_after };
        ProbeResponse::Answer { reading: read(answer, &call.probe), shape: ResponseShape::of(answer, KEY), retry_after }
    }
}

fuzz_target!(|input: &[u8]| {
    let mut input = input;
    let (which, order, same) = (byte(&mut input), byte(&mut input), byte(&mut input) & 1 == 0);
    let Some(target) = TARGETS.get(usize::from(which) % TARGETS.len()) else { return };
    let answers: Vec<Given<'_>> = input
        .split(|byte| *byte == 0)
        .take(4)
        .map(|part| {
            let mut part = part;
            let status = 100 + (u16::from(byte(&mut part)) << 2 | u16::from(byte(&mut part)) & 3) % 500;
            Given { status, flags: byte(&mut part), body: part }
        })
        .collect();
    let nth = |number: usize| &answers[number.wrapping_mul(usize::from(order) | 1) % answers.len()];
    let client = Client { preference: target.preference, usual_header: target.endpoint.client_header, ..Client::default() };
    let facts = EndpointFacts::default();
    let mut plan = ProbePlan::new(&target.calls, client, &facts, Requests::UNKNOWN);
    let (mut steps, mut accepted, mut last) = (0, false, 0);
    let finding = loop {
        steps += 1;
        assert!(steps < 100, "no end");
        match plan.proceed() {
            Next::Done(finding) => break finding,
            Next::Ask { call, .. } => {
                last = steps;
                let response = nth(steps).response(call);
                if let ProbeResponse::Answer { reading, .. } = &response {
                    accepted |= format!("{:?}", reading.classification) == "Accepted";
                }
                plan.take_response(response);
            }
            // A made-up key gets what the real one got, or something else.
            Next::Calibrate { call, .. } => {
                let response = nth(if same { last } else { steps }).response(call);
                plan.take_calibration(&match response {
                    ProbeResponse::Answer { reading, shape, .. } => calibration_of(&reading, &shape),
                    ProbeResponse::TimedOut | ProbeResponse::Unreachable(_) | ProbeResponse::Exhausted => {
                        Calibration::Inconclusive(None)
                    }
                });
            }
            Next::Keyless { call, .. } => match nth(if same { last } else { steps }).response(call) {
                ProbeResponse::Answer { shape, .. } => plan.take_keyless(Some(&shape)),
                ProbeResponse::TimedOut | ProbeResponse::Unreachable(_) | ProbeResponse::Exhausted => plan.take_keyless(None),
            },
        }
    };
    if finding.verdict == Verdict::Valid {
        assert!(accepted, "VALID without a yes: {finding:?}");
        assert!(!same, "VALID where a made-up key gets the same: {finding:?}");
    }
    assert!(!finding.why().contains(KEY), "{}", finding.why());
    drop(plan.into_lessons());
});
