//! What the shared tier holds of one credential, as it is written before it is sealed. What cannot be read is no observation.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use strum::VariantArray;

use crate::{
    core::classify::Finding,
    domain::{
        protocol::HeaderFamily,
        verdict::{Cause, MadeUpKey, Unreached, Verdict},
    },
    liveness::breaker::failed,
    telemetry::cause::unreached,
};

/// The longest that a failure to hear from a provider is shared: it may be this replica's own.
const MAX_UNANSWERED: Duration = Duration::from_secs(3);

/// An observation with what a decision needs of those before it. Times are the tier's own, in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) finding: Finding,
    pub(crate) at: u64,
    /// How long it counts: all replicas ask again at one time, and the lease lets one of them.
    pub(crate) fresh_for: Duration,
    /// The last VALID, unless this is one or it was refused since.
    pub(crate) earlier_valid: Option<(Finding, u64)>,
    /// When it was last refused.
    pub(crate) refused_at: Option<u64>,
}

/// The verdict that opened a replica's breaker, when, and until when. Times are the tier's own, in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OpenBreaker {
    pub(super) finding: Finding,
    pub(super) at: u64,
    pub(super) until: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenBreaker<'w> {
    #[serde(borrow)]
    finding: WrittenFinding<'w>,
    opened_at: u64,
    until: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written<'w> {
    #[serde(borrow)]
    finding: WrittenFinding<'w>,
    at: u64,
    fresh_ms: u64,
    #[serde(borrow, default, skip_serializing_if = "Option::is_none")]
    valid: Option<(WrittenFinding<'w>, u64)>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    refused_at: Option<u64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenFinding<'w> {
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

// === impl Record ===

impl Record {
    /// As it is sealed. `None` for what is not shared: nothing was asked.
    pub(super) fn to_bytes(&self) -> Option<Vec<u8>> {
        let Self { finding, at, fresh_for, earlier_valid, refused_at } = self;
        let longest = match finding.verdict {
            Verdict::Timeout | Verdict::Unreachable => MAX_UNANSWERED,
            _ => Duration::MAX,
        };
        let written = Written {
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

    /// The same, read.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let Written { finding, at, fresh_ms, valid, refused_at } = serde_json::from_slice(bytes).ok()?;
        let earlier_valid = match valid {
            Some((finding, at)) => Some((read(finding).filter(|finding| finding.verdict == Verdict::Valid)?, at)),
            None => None,
        };
        Some(Self { finding: read(finding)?, at, fresh_for: Duration::from_millis(fresh_ms), earlier_valid, refused_at })
    }
}

// === impl OpenBreaker ===

impl OpenBreaker {
    /// As it is sealed.
    pub(super) fn to_bytes(&self) -> Option<Vec<u8>> {
        let Self { finding, at, until } = self;
        serde_json::to_vec(&WrittenBreaker { finding: write(finding)?, opened_at: *at, until: *until }).ok()
    }

    /// The same, read. What does not show that a provider fails opened no breaker.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let WrittenBreaker { finding, opened_at, until } = serde_json::from_slice(bytes).ok()?;
        let finding = read(finding).filter(|finding| failed(finding) == Some(true))?;
        Some(Self { finding, at: opened_at, until })
    }
}

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}

fn write(finding: &Finding) -> Option<WrittenFinding<'_>> {
    let Finding { verdict, cause, status, probe, family, wrong_header, made_up, retry_after, .. } = finding;
    may_be_shared(*verdict).then(|| WrittenFinding {
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

fn read(written: WrittenFinding<'_>) -> Option<Finding> {
    let WrittenFinding { verdict, cause, status, probe, family, wrong_header, made_up, retry_after_ms, .. } = written;
    // A word that this version does not know is no observation: a newer replica may have written it.
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
        unreached,
    })
}

/// What a provider said, or did not say in time. What nobody asked is nobody's to share.
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

    fn record(finding: Finding) -> Record {
        let refused_at = (finding.verdict == Verdict::Invalid).then_some(7);
        Record { finding, at: 7, fresh_for: Duration::from_millis(2_999), earlier_valid: None, refused_at }
    }

    /// Every field, at its longest: what is read is what was written, and it fits.
    #[test]
    fn what_is_read_is_what_was_written() {
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
                    assert_eq!(Record::from_bytes(&bytes), Some(record));
                }
            }
            let bare = record(Finding::bare(*verdict));
            assert_eq!(Record::from_bytes(&bare.to_bytes().unwrap()), Some(bare));
        }
    }

    #[test]
    fn what_nobody_asked_is_not_shared() {
        for verdict in [Verdict::NotAttempted, Verdict::NoServerSurface, Verdict::ProbeDisabled] {
            assert_eq!(record(Finding::bare(verdict)).to_bytes(), None, "{verdict}");
        }
    }

    #[test]
    fn a_failure_to_hear_is_shared_for_three_seconds_at_most() {
        for (verdict, longest) in [(Verdict::Timeout, 3), (Verdict::Unreachable, 3), (Verdict::Valid, 30)] {
            let record = Record { fresh_for: Duration::from_secs(30), ..record(Finding::bare(verdict)) };
            let read = Record::from_bytes(&record.to_bytes().unwrap()).unwrap();
            assert_eq!(read.fresh_for, Duration::from_secs(longest), "{verdict}");
        }
    }

    #[test]
    fn only_a_failure_of_the_provider_opens_a_breaker() {
        for verdict in Verdict::VARIANTS.iter().copied().filter(|verdict| may_be_shared(*verdict)) {
            let open = OpenBreaker { finding: Finding::bare(verdict), at: 7, until: 9 };
            let fails = matches!(verdict, Verdict::Timeout | Verdict::Unreachable | Verdict::ProviderError);
            let bytes = open.to_bytes().unwrap();
            assert_eq!(OpenBreaker::from_bytes(&bytes), fails.then_some(open), "{verdict}");
            assert_eq!(Record::from_bytes(&bytes), None, "it is no observation");
        }
        let of_model = Finding { about_model: true, ..Finding::bare(Verdict::Timeout) };
        let bytes = OpenBreaker { finding: of_model, at: 7, until: 9 }.to_bytes().unwrap();
        assert_eq!(OpenBreaker::from_bytes(&bytes), None, "a tenant's own model says nothing of the provider");
        assert_eq!(OpenBreaker::from_bytes(&record(Finding::bare(Verdict::Timeout)).to_bytes().unwrap()), None);
    }

    #[test]
    fn what_says_anything_else_is_no_observation() {
        let valid = r#"{"finding":{"verdict":"VALID","probe":"p"},"at":7,"fresh_ms":1}"#;
        assert!(Record::from_bytes(valid.as_bytes()).is_some());
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
            assert_eq!(Record::from_bytes(bent.as_bytes()), None, "{bent}");
        }
    }
}
