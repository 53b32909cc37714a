//! The values of the shared tier as JSON, before they are sealed. A value that cannot be parsed counts as none.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use strum::VariantArray;

use crate::{
    core::classify::Finding,
    domain::{
        protocol::HeaderFamily,
        verdict::{Cause, MadeUpKey, Unreached, Verdict},
    },
    liveness::breaker::is_failure,
    telemetry::cause::unreached,
};

/// The longest that a TIMEOUT or UNREACHABLE is shared: the cause may be this replica alone.
const MAX_UNANSWERED: Duration = Duration::from_secs(3);

/// An observation, with what a decision needs of earlier ones. Times are the store's own, in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ObservationRecord {
    pub(crate) finding: Finding,
    pub(crate) at: u64,
    /// How long it is fresh. It expires on all replicas together, and the lease lets one of them probe.
    pub(crate) fresh_for: Duration,
    /// The last VALID, unless this is one or the credential was refused since.
    pub(crate) earlier_valid: Option<(Finding, u64)>,
    /// When the credential was last refused.
    pub(crate) refused_at: Option<u64>,
}

/// A replica's open breaker: the finding that opened it, when it opened, and until when. Times are the store's own, in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BreakerRecord {
    pub(super) finding: Finding,
    pub(super) at: u64,
    pub(super) until: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BreakerJson<'w> {
    #[serde(borrow)]
    finding: FindingJson<'w>,
    opened_at: u64,
    until: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ObservationJson<'w> {
    #[serde(borrow)]
    finding: FindingJson<'w>,
    at: u64,
    fresh_ms: u64,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    valid: Option<(FindingJson<'w>, u64)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    refused_at: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FindingJson<'w> {
    verdict: &'w str,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cause: Option<&'w str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    probe: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    family: Option<&'w str>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    wrong_header: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    made_up: Option<(&'w str, Option<u16>)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    about_model: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    cost_money: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    unreached: Option<&'w str>,
}

// === impl ObservationRecord ===

impl ObservationRecord {
    /// `None` if the verdict is not shared.
    pub(super) fn to_bytes(&self) -> Option<Vec<u8>> {
        let Self { finding, at, fresh_for, earlier_valid, refused_at } = self;
        let longest = match finding.verdict {
            Verdict::Timeout | Verdict::Unreachable => MAX_UNANSWERED,
            _ => Duration::MAX,
        };
        let written = ObservationJson {
            finding: write(finding)?,
            at: *at,
            fresh_ms: millis(*fresh_for.min(&longest)),
            valid: match earlier_valid {
                Some((finding, at)) => Some((write(finding)?, *at)),
                None => None,
            },
            refused_at: *refused_at,
        };
        serde_json::to_vec(&written).ok()
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let ObservationJson { finding, at, fresh_ms, valid, refused_at } = serde_json::from_slice(bytes).ok()?;
        let earlier_valid = match valid {
            Some((finding, at)) => Some((read(finding).filter(|finding| finding.verdict == Verdict::Valid)?, at)),
            None => None,
        };
        Some(Self { finding: read(finding)?, at, fresh_for: Duration::from_millis(fresh_ms), earlier_valid, refused_at })
    }
}

// === impl BreakerRecord ===

impl BreakerRecord {
    pub(super) fn to_bytes(&self) -> Option<Vec<u8>> {
        let Self { finding, at, until } = self;
        serde_json::to_vec(&BreakerJson { finding: write(finding)?, opened_at: *at, until: *until }).ok()
    }

    /// `None` if the finding is not a failure of the provider: only a failure opens a breaker.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let BreakerJson { finding, opened_at, until } = serde_json::from_slice(bytes).ok()?;
        let finding = read(finding).filter(|finding| is_failure(finding) == Some(true))?;
        Some(Self { finding, at: opened_at, until })
    }
}

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

fn write(finding: &Finding) -> Option<FindingJson<'_>> {
    let Finding { verdict, cause, status, probe, family, wrong_header, made_up, retry_after, .. } = finding;
    may_be_shared(*verdict).then(|| FindingJson {
        verdict: verdict.as_str(),
        cause: cause.map(Cause::as_str),
        status: *status,
        probe: probe.clone(),
        family: family.map(HeaderFamily::as_str),
        wrong_header: *wrong_header,
        made_up: write_made_up(*made_up),
        retry_after_ms: retry_after.map(millis),
        about_model: finding.about_model,
        cost_money: finding.cost_money,
        unreached: finding.unreached.map(unreached),
    })
}

fn read(written: FindingJson<'_>) -> Option<Finding> {
    let FindingJson { verdict, cause, status, probe, family, wrong_header, made_up, retry_after_ms, .. } = written;
    // An unknown word, as from a newer replica, makes the whole value unreadable.
    let cause = match cause {
        Some(word) => Some(word.parse::<Cause>().ok()?),
        None => None,
    };
    let family = match family {
        Some(word) => Some(word.parse::<HeaderFamily>().ok()?),
        None => None,
    };
    let unreached = match written.unreached {
        Some(word) => Some(read_unreached(word)?),
        None => None,
    };
    let made_up = match made_up {
        Some((word, status)) => read_made_up(word, status)?,
        None => MadeUpKey::NotAsked,
    };
    Some(Finding {
        verdict: verdict.parse().ok().filter(|verdict| may_be_shared(*verdict))?,
        cause,
        status,
        probe,
        family,
        wrong_header,
        made_up,
        retry_after: retry_after_ms.map(Duration::from_millis),
        about_model: written.about_model,
        cost_money: written.cost_money,
        withheld: None,
        used_up: None,
        cut_short: None,
        unreached,
    })
}

/// Whether the verdict comes from a request to the provider. A verdict without a request is not shared.
const fn may_be_shared(verdict: Verdict) -> bool {
    match verdict {
        Verdict::Valid
        | Verdict::Invalid
        | Verdict::Forbidden
        | Verdict::QuotaExhausted
        | Verdict::RateLimited
        | Verdict::ProviderError
        | Verdict::UnexpectedResponse
        | Verdict::Timeout
        | Verdict::Unreachable
        | Verdict::NotCalibrated => true,
        Verdict::NotAttempted | Verdict::NoServerSurface | Verdict::ProbeDisabled => false,
    }
}

const fn write_made_up(got: MadeUpKey) -> Option<(&'static str, Option<u16>)> {
    match got {
        MadeUpKey::NotAsked => None,
        MadeUpKey::NotWaitedFor => Some(("NOT_WAITED_FOR", None)),
        MadeUpKey::NoAnswer => Some(("NO_ANSWER", None)),
        MadeUpKey::Inconclusive(status) => Some(("INCONCLUSIVE", Some(status))),
        MadeUpKey::Refused(status) => Some(("REFUSED", Some(status))),
        MadeUpKey::Accepted => Some(("ACCEPTED", None)),
    }
}

fn read_made_up(word: &str, status: Option<u16>) -> Option<MadeUpKey> {
    match (word, status) {
        ("NOT_WAITED_FOR", None) => Some(MadeUpKey::NotWaitedFor),
        ("NO_ANSWER", None) => Some(MadeUpKey::NoAnswer),
        ("INCONCLUSIVE", Some(status)) => Some(MadeUpKey::Inconclusive(status)),
        ("REFUSED", Some(status)) => Some(MadeUpKey::Refused(status)),
        ("ACCEPTED", None) => Some(MadeUpKey::Accepted),
        _ => None,
    }
}

fn read_unreached(word: &str) -> Option<Unreached> {
    Unreached::VARIANTS.iter().copied().find(|why| unreached(*why) == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(finding: Finding) -> ObservationRecord {
        let refused_at = (finding.verdict == Verdict::Invalid).then_some(7);
        ObservationRecord { finding, at: 7, fresh_for: Duration::from_millis(2_999), earlier_valid: None, refused_at }
    }

    /// With every field at its longest, the value still fits.
    #[test]
    fn a_written_record_is_read_back_unchanged() {
        let full = |verdict, made_up, unreached| Finding {
            verdict,
            cause: Some(Cause::MadeUpKeyUntold),
            status: Some(599),
            probe: "a-probe-with-a-name-of-thirty-two".into(),
            family: Some(HeaderFamily::XGoogApiKey),
            wrong_header: true,
            made_up,
            retry_after: Some(Duration::from_millis(60_000)),
            about_model: true,
            cost_money: true,
            withheld: None,
            used_up: None,
            cut_short: None,
            unreached: Some(unreached),
        };
        let made_up = [
            MadeUpKey::NotAsked,
            MadeUpKey::NotWaitedFor,
            MadeUpKey::NoAnswer,
            MadeUpKey::Inconclusive(503),
            MadeUpKey::Refused(401),
            MadeUpKey::Accepted,
        ];
        for verdict in Verdict::VARIANTS.iter().filter(|verdict| may_be_shared(**verdict)) {
            for made_up in made_up {
                for &unreached in Unreached::VARIANTS {
                    let mut record = record(full(*verdict, made_up, unreached));
                    record.earlier_valid = Some((full(Verdict::Valid, made_up, unreached), 1_800_000_000_000));
                    let bytes = record.to_bytes().unwrap();
                    assert!(bytes.len() <= super::super::keys::PLAIN_BYTES, "{} bytes", bytes.len());
                    assert_eq!(ObservationRecord::from_bytes(&bytes), Some(record));
                }
            }
            let bare = record(Finding::bare(*verdict));
            assert_eq!(ObservationRecord::from_bytes(&bare.to_bytes().unwrap()), Some(bare));
        }
    }

    #[test]
    fn a_verdict_without_a_request_is_not_shared() {
        for verdict in [Verdict::NotAttempted, Verdict::NoServerSurface, Verdict::ProbeDisabled] {
            assert_eq!(record(Finding::bare(verdict)).to_bytes(), None, "{verdict}");
        }
    }

    #[test]
    fn a_provider_without_an_answer_is_shared_for_three_seconds_at_most() {
        for (verdict, longest) in [(Verdict::Timeout, 3), (Verdict::Unreachable, 3), (Verdict::Valid, 30)] {
            let record = ObservationRecord { fresh_for: Duration::from_secs(30), ..record(Finding::bare(verdict)) };
            let read = ObservationRecord::from_bytes(&record.to_bytes().unwrap()).unwrap();
            assert_eq!(read.fresh_for, Duration::from_secs(longest), "{verdict}");
        }
    }

    #[test]
    fn only_a_failure_of_the_provider_opens_a_breaker() {
        for verdict in Verdict::VARIANTS.iter().copied().filter(|verdict| may_be_shared(*verdict)) {
            let open = BreakerRecord { finding: Finding::bare(verdict), at: 7, until: 9 };
            let fails = matches!(verdict, Verdict::Timeout | Verdict::Unreachable | Verdict::ProviderError);
            let bytes = open.to_bytes().unwrap();
            assert_eq!(BreakerRecord::from_bytes(&bytes), fails.then_some(open), "{verdict}");
            assert_eq!(ObservationRecord::from_bytes(&bytes), None, "it is no observation");
        }
        let of_model = Finding { about_model: true, ..Finding::bare(Verdict::Timeout) };
        let bytes = BreakerRecord { finding: of_model, at: 7, until: 9 }.to_bytes().unwrap();
        assert_eq!(BreakerRecord::from_bytes(&bytes), None, "a tenant's own model says nothing of the provider");
        assert_eq!(BreakerRecord::from_bytes(&record(Finding::bare(Verdict::Timeout)).to_bytes().unwrap()), None);
    }

    #[test]
    fn a_changed_record_is_not_read() {
        let valid = r#"{"finding":{"verdict":"VALID","probe":"p"},"at":7,"fresh_ms":1}"#;
        assert!(ObservationRecord::from_bytes(valid.as_bytes()).is_some());
        for (from, to) in [
            ("VALID", "VALIDATED"),
            ("VALID", "NOT_ATTEMPTED"),
            ("VALID", "NO_SERVER_SURFACE"),
            (r#""probe":"p""#, r#""probe":"p","cause":"NEW""#),
            (r#""probe":"p""#, r#""probe":"p","family":"cookie""#),
            (r#""probe":"p""#, r#""probe":"p","made_up":["REFUSED",null]"#),
            (r#""probe":"p""#, r#""probe":"p","unreached":"NEW""#),
            (r#""at":7"#, r#""at":-7"#),
            (r#""at":7"#, r#""at":7,"new":1"#),
            (r#""at":7"#, r#""at":7,"valid":[{"verdict":"INVALID","probe":"p"},6]"#),
            ("}", ""),
        ] {
            let bent = valid.replacen(from, to, 1);
            assert_ne!(bent, valid);
            assert_eq!(ObservationRecord::from_bytes(bent.as_bytes()), None, "{bent}");
        }
    }
}
