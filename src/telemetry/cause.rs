//! Why a credential was not found VALID: one word for programs, one sentence for people. It never contains the provider's own text.

use crate::{
    core::classify::Finding,
    domain::verdict::{MadeUpKey, Unreached, Verdict, Withheld},
};

/// What failed on the way to the provider, as a log word.
pub const fn unreached(why: Unreached) -> &'static str {
    match why {
        Unreached::Dns => "DNS",
        Unreached::Address => "ADDRESS",
        Unreached::Connect => "CONNECT",
        Unreached::Tls => "TLS",
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
        return format!("{host} was not asked: {}", withheld_text(why));
    }
    if let Some(why) = finding.unreached {
        return format!("{host}: {}", unreached_text(why));
    }
    match (status, verdict) {
        (Some(status), _) => format!("{host} answered `{probe}` with HTTP {status}{}", finding.why()),
        (None, Verdict::Timeout) => format!("{host} gave no usable answer in time"),
        (None, _) => format!("{host} was not asked"),
    }
}

/// The remedy when the cause is not known.
pub const CLOSES_BY_ITSELF: &str =
    "look at the vendor's status page; where several are open, at DNS and egress. It closes by itself once the provider answers";

/// What to do about a provider whose probes are inconclusive.
pub const fn remedy(finding: &Finding) -> &'static str {
    match finding.unreached {
        Some(Unreached::Connect | Unreached::Closed | Unreached::Protocol) => {
            "look at egress to that host and port, and at the vendor's status page; it closes by itself once the provider answers"
        }
        Some(why) => unreached_remedy(why),
        None => CLOSES_BY_ITSELF,
    }
}

/// What to do about what failed on the way.
pub const fn unreached_remedy(why: Unreached) -> &'static str {
    match why {
        Unreached::Address => {
            "use https and a public address, or allow it with egress.allow or egress.allow_plain_http (a machine's metadata address is \
             never dialled); it does not heal by itself"
        }
        Unreached::Tls => {
            "look at the certificate's expiry date and names; set probe.ca_file for a private authority; if the port has no TLS, correct the base URL"
        }
        Unreached::Dns => "check the cluster's DNS, and the base URL's spelling",
        Unreached::Proxy => "check egress.proxy, its log and its credentials",
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
        Unreached::Tls => {
            "connected, but TLS failed: the certificate is not trusted (expired, another name, unknown authority), or the port has no TLS"
        }
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
        ] {
            assert_eq!(sentence(host, &finding), expect);
        }
    }
}
