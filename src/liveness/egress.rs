//! Decides which addresses probes may connect to, directly or through a forward proxy. The check is made on the address that is connected to:
//! the resolver that resolves a name also filters its addresses, and the name is not resolved a second time.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use ipnet::IpNet;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use serde::{Deserialize, Serialize};
use url::{Host, Url};

use crate::domain::{problem::Review, secret::Secret};

/// Where probes may go, besides public addresses over https.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct EgressSettings {
    /// Networks (CIDR) and host names that are allowed over https, whatever their addresses. `*.NAME` covers every name below NAME.
    pub allow: Vec<String>,
    /// The same, over https and plain http.
    pub allow_plain_http: Vec<String>,
    /// A forward proxy for everything else.
    pub proxy: ProxySettings,
}

/// A forward proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default)]
pub struct ProxySettings {
    /// Its URL: `http://HOST:PORT` or `https://HOST:PORT`. It is never read from the environment.
    pub url: Option<String>,
    /// A file with one line, `USER:PASSWORD`.
    pub credentials_file: Option<PathBuf>,
}

/// A forward proxy with its credentials.
#[derive(Debug, Clone)]
pub struct ForwardProxy {
    /// Its URL.
    pub url: Url,
    /// User and password.
    pub credentials: Option<(String, Arc<Secret>)>,
}

/// The rules for outgoing connections.
#[derive(Debug, Clone, Default)]
pub struct Egress {
    allow_loopback_http: bool,
    https: AllowList,
    plain_http: AllowList,
    proxy: Option<Url>,
}

/// Hosts and networks.
#[derive(Debug, Clone, Default)]
struct AllowList {
    networks: Vec<IpNet>,
    names: Vec<String>,
}

/// A name gave no address to connect to.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unresolved {
    /// It could not be resolved.
    #[error("the name could not be resolved")]
    Lookup(#[source] io::Error),
    /// All its addresses are refused by the rules.
    #[error("the name is at no address that may be dialled")]
    Refused,
}

/// Resolves names for the HTTP client, and returns only allowed addresses.
struct GuardedResolver {
    egress: Egress,
    fixed: Arc<BTreeMap<String, SocketAddr>>,
}

// === impl EgressSettings ===

impl EgressSettings {
    /// Reports every entry and URL that is invalid.
    pub fn review(&self, review: &mut Review<'_>) {
        for (key, list) in [("allow", &self.allow), ("allow_plain_http", &self.allow_plain_http)] {
            for (index, entry) in list.iter().enumerate() {
                if let Err(message) = AllowEntry::of(entry) {
                    review.error(format!("{key}[{index}]"), message);
                }
            }
        }
        if let Some(url) = &self.proxy.url
            && let Err(message) = proxy_url(url)
        {
            review.error("proxy.url", message);
        }
        if self.proxy.credentials_file.is_some() && self.proxy.url.is_none() {
            review.error("proxy.credentials_file", "goes with proxy.url, which is not set");
        }
    }

    /// The proxy, with the content of its credentials file.
    pub fn forward_proxy(&self, credentials: Option<&str>) -> Result<Option<ForwardProxy>, String> {
        let Some(url) = &self.proxy.url else { return Ok(None) };
        let url = proxy_url(url)?;
        let credentials = match credentials.map(str::trim) {
            None => None,
            Some(line) => match line.split_once(':') {
                Some((user, password)) if !user.is_empty() && !line.contains(['\n', '\r']) => {
                    Some((user.to_owned(), Arc::new(Secret::new(password.to_owned()))))
                }
                _ => return Err("must hold one line, `USER:PASSWORD`".into()),
            },
        };
        Ok(Some(ForwardProxy { url, credentials }))
    }
}

fn proxy_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|fault| format!("`{text}` is not a URL: {fault}"))?;
    let is_plain = url.username().is_empty() && url.password().is_none();
    if !is_plain {
        return Err("must not hold a user or a password; they come from proxy.credentials_file".into());
    }
    if !matches!(url.scheme(), "http" | "https")
        || url.host().is_none()
        || !matches!(url.path(), "" | "/")
        || url.query().is_some()
    {
        return Err(format!("`{text}` must be http://HOST:PORT or https://HOST:PORT"));
    }
    Ok(url)
}

/// One entry of a list.
enum AllowEntry {
    Network(IpNet),
    Name(String),
}

impl AllowEntry {
    fn of(entry: &str) -> Result<Self, String> {
        if let Ok(network) = entry.parse::<IpNet>() {
            return Ok(Self::Network(network.trunc()));
        }
        if let Ok(address) = entry.parse::<IpAddr>() {
            return Ok(Self::Network(address.into()));
        }
        let name = entry.strip_prefix("*.").unwrap_or(entry);
        let is_plain =
            name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'.' | b'-' | b'_'));
        match Host::parse(name) {
            Ok(Host::Domain(host)) if is_plain && host == name && !host.ends_with('.') => Ok(Self::Name(entry.to_owned())),
            _ => Err(format!(
                "`{entry}` must be a network such as 10.0.0.0/8, or a host name in lower case, without scheme and port"
            )),
        }
    }
}

// === impl AllowList ===

impl AllowList {
    fn of(entries: &[String]) -> Self {
        let mut list = Self::default();
        for entry in entries {
            match AllowEntry::of(entry) {
                Ok(AllowEntry::Network(network)) => list.networks.push(network),
                Ok(AllowEntry::Name(name)) => list.names.push(name),
                // The review has reported it.
                Err(_) => {}
            }
        }
        list
    }

    fn has_address(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|network| network.contains(&address))
    }

    fn has_name(&self, name: &str) -> bool {
        let name = name.strip_suffix('.').unwrap_or(name);
        self.names.iter().any(|known| match known.strip_prefix('*') {
            Some(below) => name.len() > below.len() && name.ends_with(below),
            None => name == known,
        })
    }
}

// === impl Egress ===

impl Egress {
    /// Builds the rules. `allow_loopback_http` allows loopback addresses, over plain http too.
    pub fn new(allow_loopback_http: bool, settings: &EgressSettings, proxy: Option<&ForwardProxy>) -> Self {
        let EgressSettings { allow, allow_plain_http, proxy: _ } = settings;
        Self {
            allow_loopback_http,
            https: AllowList::of(allow),
            plain_http: AllowList::of(allow_plain_http),
            proxy: proxy.map(|proxy| proxy.url.clone()),
        }
    }

    /// Whether this URL may be requested. https is allowed to any public address, and plain http and other addresses only if a setting allows
    /// them. An address in the URL itself never reaches the resolver, so it is checked here.
    pub fn may_ask(&self, url: &Url) -> bool {
        let plain = match url.scheme() {
            "https" => false,
            "http" => true,
            _ => return false,
        };
        match address_of(url) {
            None => match url.host() {
                Some(Host::Domain(name)) => {
                    !plain || self.plain_http.has_name(name) || (self.allow_loopback_http && name == "localhost")
                }
                _ => false,
            },
            Some(address) => {
                let allowed = self.plain_http.has_address(address.to_canonical());
                // For plain http the address must be written as loopback itself, and not as a mapped address.
                let loopback = self.allow_loopback_http && address.is_loopback();
                (!plain || allowed || loopback) && self.may_dial(None, address)
            }
        }
    }

    /// Whether requests to this URL do not use the proxy. An allowed name or network belongs to the operator's own network.
    fn bypasses_proxy(&self, url: &Url) -> bool {
        match (address_of(url), url.host()) {
            (Some(address), _) => {
                let address = address.to_canonical();
                address.is_loopback() || self.https.has_address(address) || self.plain_http.has_address(address)
            }
            (None, Some(Host::Domain(name))) => {
                name == "localhost" || self.https.has_name(name) || self.plain_http.has_name(name)
            }
            (None, _) => false,
        }
    }

    /// The proxy for this URL, if it goes through one.
    pub(super) fn proxy_for(&self, url: &Url) -> Option<&Url> {
        self.proxy.as_ref().filter(|_| !self.bypasses_proxy(url))
    }

    pub(super) fn resolver(&self, fixed: BTreeMap<String, SocketAddr>) -> Arc<dyn Resolve> {
        Arc::new(GuardedResolver { egress: self.clone(), fixed: Arc::new(fixed) })
    }

    /// Whether this address may be connected to. `name` is the host name that resolved to it.
    fn may_dial(&self, name: Option<&str>, address: IpAddr) -> bool {
        let address = address.to_canonical();
        let is_proxy = || self.proxy.as_ref().and_then(Url::host_str).is_some_and(|host| Some(host) == name);
        let is_named = || name.is_some_and(|name| self.https.has_name(name) || self.plain_http.has_name(name));
        if is_metadata(address) {
            return false;
        }
        if self.https.has_address(address) || self.plain_http.has_address(address) || is_named() || is_proxy() {
            return true;
        }
        if address.is_loopback() {
            return self.allow_loopback_http;
        }
        match address {
            IpAddr::V4(address) => is_public_v4(address),
            IpAddr::V6(address) => is_public_v6(address),
        }
    }
}

fn address_of(url: &Url) -> Option<IpAddr> {
    match url.host()? {
        Host::Ipv4(address) => Some(address.into()),
        Host::Ipv6(address) => Some(address.into()),
        Host::Domain(_) => None,
    }
}

/// Whether a cloud serves the machine's own credentials at this address. It is refused whatever the settings allow. These are link-local
/// addresses, and the others of AWS, Google, Alibaba and Oracle (their documentation, 2026-11).
fn is_metadata(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            let others = [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(192, 0, 0, 192)];
            address.is_link_local() || others.contains(&address)
        }
        IpAddr::V6(address) => {
            let others = [Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254)];
            let eks = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23);
            let carried = carried_v4(address).is_some_and(|address| is_metadata(address.into()));
            address.is_unicast_link_local() || address == eks || others.contains(&address) || carried
        }
    }
}

/// The IPv4 address that a translator or a tunnel reaches by this one: NAT64 (RFC 6052, and RFC 8215 with a prefix of 96 bits), 6to4 (RFC 3056), and
/// the old form without a prefix.
fn carried_v4(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let [a, b, c, d, e, f, high, low] = address.segments();
    let (high, low) = match [a, b, c, d, e, f] {
        [0x64, 0xff9b, 0, 0, 0, 0] | [0x64, 0xff9b, 1, ..] | [0, 0, 0, 0, 0, 0] => (high, low),
        [0x2002, high, low, ..] => (high, low),
        _ => return None,
    };
    Some(Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)))
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (egress, fixed) = (self.egress.clone(), Arc::clone(&self.fixed));
        Box::pin(async move {
            let found: Vec<SocketAddr> = match fixed.get(name.as_str()) {
                Some(address) => vec![*address],
                None => tokio::net::lookup_host((name.as_str(), 0)).await.map_err(Unresolved::Lookup)?.collect(),
            };
            let allowed: Vec<SocketAddr> =
                found.into_iter().filter(|address| egress.may_dial(Some(name.as_str()), address.ip())).collect();
            if allowed.is_empty() {
                return Err(Unresolved::Refused.into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

/// False for IANA's special-purpose networks that are not globally reachable.
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
    // The public Internet uses 2000::/3. Within it, tunnels and documentation networks are not public.
    (0x2000..0x4000).contains(&first)
        && !(first == 0x2001 && second < 0x0200) // Teredo, ORCHID, benchmarking
        && !(first == 0x2001 && second == 0x0db8)
        && !(first == 0x3fff && second < 0x1000)
        && first != 0x2002 // 6to4 carries an IPv4 address
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(allow_loopback_http: bool) -> Egress {
        Egress::new(allow_loopback_http, &EgressSettings::default(), None)
    }

    #[track_caller]
    fn asked(url: &str, without: bool, with_loopback: bool) {
        let url = Url::parse(url).unwrap();
        assert_eq!(guard(false).may_ask(&url), without, "{url}");
        assert_eq!(guard(true).may_ask(&url), with_loopback, "{url} with loopback");
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
        asked("http://[::ffff:127.0.0.1]/", false, false); // a mapped address, for which plain http is refused
        asked("ftp://api.example.com/", false, false);
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
            guard(allow).resolver(fixed).resolve("api.example.com".parse().unwrap())
        };
        assert!(resolve(false, "169.254.169.254:443").await.is_err());
        assert!(resolve(false, "127.0.0.1:443").await.is_err());
        assert!(resolve(true, "127.0.0.1:443").await.is_ok());
        assert!(resolve(true, "10.0.0.1:443").await.is_err());
        assert!(resolve(false, "93.184.215.14:443").await.is_ok());
    }

    fn allowing(allow: &[&str], allow_plain_http: &[&str]) -> Egress {
        let owned = |list: &[&str]| list.iter().map(|entry| (*entry).to_owned()).collect();
        let settings =
            EgressSettings { allow: owned(allow), allow_plain_http: owned(allow_plain_http), proxy: ProxySettings::default() };
        let (mut problems, mut warnings) = (Vec::new(), Vec::new());
        settings.review(&mut Review::of("egress", &mut problems, &mut warnings));
        assert!(problems.is_empty(), "{problems:?}");
        Egress::new(false, &settings, None)
    }

    fn asks(egress: &Egress, url: &str) -> bool {
        egress.may_ask(&Url::parse(url).unwrap())
    }

    #[tokio::test]
    async fn allowed_destinations_are_allowed_in_their_scheme_and_metadata_never() {
        let egress =
            allowing(&["10.1.0.0/16", "fd12::/16", "llm.corp.example", "*.svc.example"], &["10.2.0.7", "vllm.corp.example"]);
        for (url, may) in [
            ("https://10.1.2.3/v1", true),
            ("http://10.1.2.3/v1", false),
            ("https://[::ffff:10.1.2.3]/v1", true),
            ("https://10.9.2.3/v1", false),
            ("https://[fd12::1]/v1", true),
            ("https://[64:ff9b::10.1.2.3]/v1", false),
            ("https://10.2.0.7/v1", true),
            ("http://10.2.0.7:8000/v1", true),
            ("http://10.2.0.8:8000/v1", false),
            ("http://llm.corp.example/v1", false),
            ("http://vllm.corp.example:8000/v1", true),
            ("http://other.corp.example/v1", false),
        ] {
            assert_eq!(asks(&egress, url), may, "{url}");
        }
        let resolves = |name: &str, to: &str| {
            let fixed = BTreeMap::from([(name.to_owned(), to.parse().unwrap())]);
            egress.resolver(fixed).resolve(name.parse().unwrap())
        };
        for (name, to, may) in [
            ("llm.corp.example", "192.168.7.7:443", true),
            ("a.svc.example", "192.168.7.7:443", true),
            ("svc.example", "192.168.7.7:443", false),
            ("asvc.example", "192.168.7.7:443", false),
            ("vllm.corp.example", "127.0.0.1:8000", true),
            ("other.example", "10.1.7.7:443", true),
            ("other.example", "10.7.7.7:443", false),
            ("llm.corp.example", "169.254.169.254:443", false),
            ("llm.corp.example", "100.100.100.200:443", false),
            ("llm.corp.example", "[fd00:ec2::254]:443", false),
        ] {
            assert_eq!(resolves(name, to).await.is_ok(), may, "{name} at {to}");
        }
        let all = allowing(&["0.0.0.0/0", "::/0"], &["0.0.0.0/0", "::/0"]);
        for address in [
            "169.254.169.254",
            "169.254.170.2",
            "100.100.100.200",
            "192.0.0.192",
            "[fd00:ec2::254]",
            "[fd20:ce::254]",
            "[fe80::1]",
            "[::ffff:169.254.169.254]",
            "[::169.254.169.254]",
            "[64:ff9b::169.254.169.254]",
            "[64:ff9b::100.100.100.200]",
            "[64:ff9b:1:2::169.254.169.254]",
            "[2002:a9fe:a9fe::1]",
        ] {
            assert!(!asks(&all, &format!("https://{address}/")) && !asks(&all, &format!("http://{address}/")), "{address}");
        }
    }

    #[test]
    fn an_entry_that_is_neither_network_nor_name_is_refused() {
        for entry in
            ["", "10.0.0.0/33", "https://llm.corp.example", "llm.corp.example:443", "LLM.corp.example", "a b", "*", "*.", "[::1]"]
        {
            assert!(AllowEntry::of(entry).is_err(), "{entry}");
        }
    }

    #[test]
    fn a_proxy_is_a_url_without_a_password() {
        for (url, valid) in [
            ("http://proxy.example:3128", true),
            ("https://proxy.example", true),
            ("http://user:made-up@proxy.example:3128", false),
            ("socks5://proxy.example", false),
            ("http://proxy.example/path", false),
            ("proxy.example:3128", false),
        ] {
            assert_eq!(proxy_url(url).is_ok(), valid, "{url}");
        }
        let settings = EgressSettings {
            allow: vec!["llm.corp.example".into()],
            proxy: ProxySettings { url: Some("http://proxy.example:3128".into()), credentials_file: None },
            ..EgressSettings::default()
        };
        let proxy = settings.forward_proxy(Some("user:made:up\n")).unwrap().unwrap();
        assert_eq!(
            proxy.credentials.as_ref().map(|(user, password)| (user.as_str(), password.expose())),
            Some(("user", "made:up"))
        );
        for torn in ["", "user", ":made-up", "a:b\nc:d"] {
            assert!(settings.forward_proxy(Some(torn)).is_err(), "{torn:?}");
        }
        let egress = Egress::new(true, &settings, Some(&proxy));
        let proxied = |url: &str| egress.proxy_for(&Url::parse(url).unwrap()).is_some();
        assert!(proxied("https://api.example.com/v1") && proxied("https://93.184.215.14/"));
        assert!(
            !proxied("https://llm.corp.example/v1") && !proxied("http://127.0.0.1:8000/v1") && !proxied("http://localhost/v1")
        );
    }
}
