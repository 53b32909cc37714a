//! Which addresses may be dialled: checked on the address that is dialled, names resolved once by the same hand.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// The rule.
#[derive(Debug, Clone, Copy)]
pub(super) struct Guard {
    allow_loopback: bool,
}

/// A name leads nowhere.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unresolved {
    /// It could not be resolved.
    #[error("the name could not be resolved")]
    Lookup(#[source] io::Error),
    /// It is only at addresses that may not be dialled.
    #[error("the name is at no address that may be dialled")]
    Refused,
}

/// Resolves names for the client and lets through only addresses that may be dialled.
struct GuardedResolver {
    guard: Guard,
    fixed: Arc<BTreeMap<String, SocketAddr>>,
}

// === impl Guard ===

impl Guard {
    pub(super) fn new(allow_loopback: bool) -> Self {
        Self { allow_loopback }
    }

    /// https anywhere public; plain http only on loopback, and only where that is allowed. An address in the URL itself is
    /// never resolved, so it is checked here.
    pub(super) fn may_ask(self, url: &Url) -> bool {
        let loopback = match url.host() {
            Some(Host::Ipv4(address)) => address.is_loopback(),
            Some(Host::Ipv6(address)) => address.is_loopback(),
            Some(Host::Domain(name)) => name == "localhost",
            None => return false,
        };
        let scheme = url.scheme() == "https" || (url.scheme() == "http" && self.allow_loopback && loopback);
        let address = match url.host() {
            Some(Host::Ipv4(address)) => self.may_dial(address.into()),
            Some(Host::Ipv6(address)) => self.may_dial(address.into()),
            Some(Host::Domain(_)) => true,
            None => false,
        };
        scheme && address
    }

    pub(super) fn resolver(self, fixed: BTreeMap<String, SocketAddr>) -> Arc<dyn Resolve> {
        Arc::new(GuardedResolver { guard: self, fixed: Arc::new(fixed) })
    }

    fn may_dial(self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        if address.is_loopback() {
            return self.allow_loopback;
        }
        match address {
            IpAddr::V4(address) => is_public_v4(address),
            IpAddr::V6(address) => is_public_v6(address),
        }
    }
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (guard, fixed) = (self.guard, Arc::clone(&self.fixed));
        Box::pin(async move {
            let found: Vec<SocketAddr> = match fixed.get(name.as_str()) {
                Some(address) => vec![*address],
                None => tokio::net::lookup_host((name.as_str(), 0)).await.map_err(Unresolved::Lookup)?.collect(),
            };
            let allowed: Vec<SocketAddr> = found.into_iter().filter(|address| guard.may_dial(address.ip())).collect();
            if allowed.is_empty() {
                return Err(Unresolved::Refused.into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

/// IANA's special-purpose registry, less what is globally reachable.
fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    !(address.is_private()
        || address.is_link_local() // cloud metadata among them
        || address.is_multicast()
        || address.is_broadcast()
        || address.is_documentation()
        || a == 0
        || a >= 240
        || (a == 100 && (64..128).contains(&b)) // carrier-grade NAT, and a metadata address
        || (a == 192 && b == 0 && c == 0)
        || (a == 198 && (b == 18 || b == 19)))
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    let [first, second, ..] = segments;
    // 2000::/3 is what is given out for the public Internet; within it, tunnels and documentation are not.
    (0x2000..0x4000).contains(&first)
        && !(first == 0x2001 && second < 0x0200) // Teredo, ORCHID, benchmarking
        && !(first == 0x2001 && second == 0x0db8)
        && !(first == 0x3fff && second < 0x1000)
        && first != 0x2002 // 6to4 carries an IPv4 address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn asked(url: &str, without: bool, with_loopback: bool) {
        let url = Url::parse(url).unwrap();
        assert_eq!(Guard::new(false).may_ask(&url), without, "{url}");
        assert_eq!(Guard::new(true).may_ask(&url), with_loopback, "{url} with loopback");
    }

    #[test]
    fn only_public_https_unless_loopback_is_allowed() {
        asked("https://api.example.com/v1", true, true);
        asked("http://api.example.com/v1", false, false);
        asked("https://93.184.215.14/", true, true);
        asked("http://93.184.215.14/", false, false);
        asked("https://[2606:2800:21f:cb07:6820:80da:af6b:8b2c]/", true, true);
        asked("http://127.0.0.1:8080/", false, true);
        asked("https://127.0.0.1/", false, true);
        asked("http://[::1]:8080/", false, true);
        asked("http://localhost:11434/v1", false, true);
        asked("http://[::ffff:127.0.0.1]/", false, false); // its spelling is not loopback's: http is refused
        asked("https://[::ffff:127.0.0.1]/", false, true);
    }

    #[test]
    fn private_and_special_addresses_are_refused_in_every_spelling() {
        for host in [
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.100.100.200",
            "100.64.0.1",
            "0.0.0.0",
            "255.255.255.255",
            "224.0.0.1",
            "192.0.0.1",
            "198.18.0.1",
            "240.0.0.1",
            "2852039166",
            "0xa9fea9fe",
            "0251.0376.0251.0376",
            "[fd00::1]",
            "[fe80::1]",
            "[::]",
            "[::ffff:10.0.0.1]",
            "[64:ff9b::a00:1]",
            "[2002:a00:1::]",
            "[2001::1]",
            "[ff02::1]",
        ] {
            asked(&format!("https://{host}/"), false, false);
        }
    }

    #[tokio::test]
    async fn names_are_checked_by_the_address_that_they_resolve_to() {
        let resolve = |allow, to: &str| {
            let fixed = BTreeMap::from([("api.example.com".to_owned(), to.parse().unwrap())]);
            Guard::new(allow).resolver(fixed).resolve("api.example.com".parse().unwrap())
        };
        assert!(resolve(false, "169.254.169.254:443").await.is_err());
        assert!(resolve(false, "127.0.0.1:443").await.is_err());
        assert!(resolve(true, "127.0.0.1:443").await.is_ok());
        assert!(resolve(true, "10.0.0.1:443").await.is_err());
        assert!(resolve(false, "93.184.215.14:443").await.is_ok());
    }
}
