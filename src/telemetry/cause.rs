//! Why a credential was not found VALID: one word for programs, one sentence for people. It never contains the provider's own text.

use crate::{
    core::classify::Finding,
    domain::{
        duration::seconds,
        verdict::{MadeUpKey, Unreached, Verdict, Withheld},
    },
};

/// What failed on the way to the provider, as a log word.
pub const fn unreached(why: Unreached) -> &'static str {
    match why {
        Unreached::Dns => "DNS",
        Unreached::Address => "ADDRESS",
        Unreached::Connect => "CONNECT",
        Unreached::ConnectTimeout => "CONNECT_TIMEOUT",
        Unreached::Tls => "TLS",
        Unreached::TlsExpired => "TLS_EXPIRED",
        Unreached::TlsName => "TLS_NAME",
        Unreached::TlsIssuer => "TLS_ISSUER",
        Unreached::Closed => "CLOSED",
        Unreached::Protocol => "PROTOCOL",
        Unreached::Proxy => "PROXY",
    }
}

/// Why no probe was sent, as a log word.
pub const fn withheld(why: Withheld) -> &'static str {
    match why {
        Withheld::Queue => "QUEUE",
        Withheld::Budget => "BUDGET",
        Withheld::NewKeys => "NEW_KEYS",
        Withheld::Fault => "FAULT",
    }
}

/// How the endpoint answered a made-up key, as a log word.
pub const fn made_up(got: MadeUpKey) -> &'static str {
    match got {
        MadeUpKey::NotAsked => "NOT_ASKED",
        MadeUpKey::NotWaitedFor => "NOT_WAITED_FOR",
        MadeUpKey::NoAnswer => "NO_ANSWER",
        MadeUpKey::Inconclusive(_) => "INCONCLUSIVE",
        MadeUpKey::Refused(_) => "REFUSED",
        MadeUpKey::Accepted => "ACCEPTED",
    }
}

/// One sentence for a person: what the host answered, and how the answer was classified.
pub fn sentence(host: &str, finding: &Finding) -> String {
    let Finding { verdict, status, probe, .. } = finding;
    if let Some(why) = finding.withheld {
        return format!(
            "{host} was not asked: {}",
            finding.used_up.map_or_else(|| withheld_text(why).to_owned(), |setting| format!("{setting} is used up"))
        );
    }
    if let Some(why) = finding.unreached {
        return format!("{host}: {}", unreached_text(why));
    }
    match (status, verdict) {
        (Some(status), _) => format!("{host} answered `{probe}` with HTTP {status}{}", finding.why()),
        (None, Verdict::Timeout) => match finding.cut_short {
            Some(time) => format!("the call left {host} {} to answer, which was too little", seconds(time)),
            None => format!("{host} gave no usable answer in time"),
        },
        (None, _) => format!("{host} was not asked"),
    }
}

/// The remedy when the cause is not known.
pub const LOOK_OUTSIDE: &str = "look at the vendor's status page; where several providers fail, at DNS and egress";
/// What to do about a caller that gives a provider too little time.
pub const GIVE_TIME: &str = "give the caller 4 s: a provider has 3 s (`probe.budget`)";

/// What to do about a provider whose probes are inconclusive.
pub const fn remedy(finding: &Finding) -> &'static str {
    let Finding { verdict, unreached, withheld, cut_short, .. } = finding;
    match (verdict, unreached, withheld) {
        (_, Some(why), _) => unreached_remedy(*why),
        (_, None, Some(Withheld::Queue)) => {
            "see why the provider is slow; else raise `provider_limits.in_flight` or `provider_limits.queue_time`"
        }
        (_, None, Some(Withheld::Budget)) => "raise `provider_limits.per_second`, if the vendor allows more",
        (_, None, Some(Withheld::NewKeys)) => "find out who tries so many keys, or raise the limit",
        (_, None, Some(Withheld::Fault)) => "look for `panicked` in the log, and report it",
        (Verdict::Timeout, None, None) if cut_short.is_some() => GIVE_TIME,
        (Verdict::RateLimited, None, None) => "nothing, if short; else lower `provider_limits.per_second`",
        (Verdict::UnexpectedResponse | Verdict::NotCalibrated, None, None) => {
            "`byok-gate probe --provider P --env NAME --calibrate --explain` shows each call; correct the base URL or the host's row"
        }
        _ => LOOK_OUTSIDE,
    }
}

/// What to do about what failed on the way.
pub const fn unreached_remedy(why: Unreached) -> &'static str {
    match why {
        Unreached::Address => {
            "use https and a public address, or allow it with egress.allow or egress.allow_plain_http and restart byok-gate (a machine's \
             metadata address is never dialled)"
        }
        Unreached::Tls => {
            "correct the base URL if the port has no TLS; otherwise look at the certificate, and at a proxy that breaks TLS open"
        }
        Unreached::TlsExpired => "whoever runs the host has to renew the certificate; this machine's clock may also be wrong",
        Unreached::TlsName => {
            "correct the host in the base URL, or look for a proxy or a wrong DNS entry that answers in its place"
        }
        Unreached::TlsIssuer => {
            "set probe.ca_file if the authority is your own; otherwise look for a proxy that breaks TLS open, or an incomplete chain of certificates"
        }
        Unreached::Dns => "check the cluster's DNS, and the base URL's spelling",
        Unreached::Proxy => "check egress.proxy, its log and its credentials",
        Unreached::ConnectTimeout => {
            "look for a firewall or a NetworkPolicy that drops the packets to that host and port; the host may also be down"
        }
        Unreached::Connect | Unreached::Closed | Unreached::Protocol => {
            "look at egress to that host and port, and at the vendor's status page"
        }
    }
}

/// What failed on the way to the provider, for a person.
pub const fn unreached_text(why: Unreached) -> &'static str {
    match why {
        Unreached::Dns => "the name could not be resolved (DNS)",
        Unreached::Address => "this configuration does not allow calls to the address, or over plain http",
        Unreached::Connect => "no connection: nothing is listening there, or a firewall is in the way",
        Unreached::ConnectTimeout => {
            "no connection came about in time, and nothing refused one: a firewall or NetworkPolicy drops the packets, or the host is down"
        }
        Unreached::Tls => "connected, but TLS failed: the port has no TLS, or its certificate cannot be used",
        Unreached::TlsExpired => "connected, but TLS failed: the certificate has expired, or is not valid yet",
        Unreached::TlsName => "connected, but TLS failed: the certificate is for another name",
        Unreached::TlsIssuer => "connected, but TLS failed: the certificate is not from an authority that this service trusts",
        Unreached::Closed => "the connection was closed without an answer",
        Unreached::Protocol => "what answers there does not speak HTTP",
        Unreached::Proxy => "the forward proxy (egress.proxy) could not be reached, or did not let the call through",
    }
}

const fn withheld_text(why: Withheld) -> &'static str {
    match why {
        Withheld::Queue => "too many checks are waiting for this provider",
        Withheld::Budget => "the limit of calls to this provider per second is reached",
        Withheld::NewKeys => "too many new credentials came from this organization or caller within a minute",
        Withheld::Fault => "byok-gate failed while it checked the key",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::verdict::Cause;

    #[test]
    fn a_sentence_names_the_host_and_the_cause() {
        let host = "api.acme.example";
        let bare = Finding::bare;
        for (finding, expect) in [
            (
                Finding { unreached: Some(Unreached::Dns), ..bare(Verdict::Unreachable) },
                "api.acme.example: the name could not be resolved (DNS)",
            ),
            (bare(Verdict::Timeout), "api.acme.example gave no usable answer in time"),
            (Finding::withheld(Withheld::Queue), "api.acme.example was not asked: too many checks are waiting for this provider"),
            (
                Finding {
                    status: Some(200),
                    probe: "models".into(),
                    cause: Some(Cause::Page),
                    ..bare(Verdict::UnexpectedResponse)
                },
                "api.acme.example answered `models` with HTTP 200, PAGE: a web page, made-up keys: not asked",
            ),
            // Nothing was refused: made-up keys get the page, too.
            (
                Finding {
                    status: Some(200),
                    probe: "models".into(),
                    made_up: MadeUpKey::Refused(200),
                    ..bare(Verdict::UnexpectedResponse)
                },
                "api.acme.example answered `models` with HTTP 200, made-up keys: HTTP 200 too, and not accepted",
            ),
            (
                Finding { cut_short: Some(std::time::Duration::from_millis(139)), ..bare(Verdict::Timeout) },
                "the call left api.acme.example 0.14 s to answer, which was too little",
            ),
        ] {
            assert_eq!(sentence(host, &finding), expect);
        }
    }
}
