//! The address of the store. Outside of this machine it must use TLS.

use std::{fmt, net::IpAddr};

use redis::{ErrorKind, RedisError};
use url::{Host, Url};

/// The default port of Redis and Valkey.
pub(super) const STORE_PORT: u16 = 6379;
/// The default port of Sentinel.
pub(super) const SENTINEL_PORT: u16 = 26379;

/// A parsed address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StoreAddress {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) tls: bool,
    pub(super) database: i64,
}

// === impl StoreAddress ===

impl StoreAddress {
    /// Parses `rediss://HOST:PORT`, or `redis://HOST:PORT` on loopback. `/N` at the end selects a database.
    pub(super) fn parse(text: &str, default_port: u16) -> Result<Self, String> {
        let wanted = "write rediss://HOST:PORT, or redis://127.0.0.1:PORT on this machine";
        let url = Url::parse(text).map_err(|fault| format!("is no URL ({fault}); {wanted}"))?;
        let tls = match url.scheme() {
            "rediss" => true,
            "redis" => false,
            other => return Err(format!("has the scheme `{other}`; {wanted}")),
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err("holds a user or a password; write them as `user` and `password_file`".to_owned());
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(format!("holds more than an address; {wanted}"));
        }
        let Some(host) = url.host().filter(|host| !host.to_string().is_empty()) else {
            return Err(format!("names no host; {wanted}"));
        };
        // For schemes other than http(s), the `url` crate parses an IPv4 address as a name.
        let host = match host {
            Host::Domain(name) => Host::parse(name).map_err(|fault| format!("names no host ({fault}); {wanted}"))?,
            Host::Ipv4(address) => Host::Ipv4(address),
            Host::Ipv6(address) => Host::Ipv6(address),
        };
        let host = match host {
            Host::Domain(name) => name,
            Host::Ipv4(address) => address.to_string(),
            Host::Ipv6(address) => address.to_string(),
        };
        if !tls && !is_here(&host) {
            return Err("is beyond this machine and not encrypted; use rediss://".to_owned());
        }
        let database = match url.path().trim_start_matches('/') {
            "" => 0,
            number => number
                .parse::<u16>()
                .map_err(|_| format!("names no database by `{number}`; write a number, as in rediss://HOST:PORT/0"))?,
        };
        Ok(Self { host, port: url.port().unwrap_or(default_port), tls, database: i64::from(database) })
    }

    /// The server that this one names. It is spoken to as this one is, so that nothing goes over a network unencrypted.
    pub(super) fn named(&self, host: &str, port: u16) -> Result<Self, RedisError> {
        if !self.tls && !is_here(host) {
            let what = "the server that was named is beyond this machine, and the connection would not be encrypted";
            return Err((ErrorKind::InvalidClientConfig, what).into());
        }
        Ok(Self { host: host.to_owned(), port, ..*self })
    }

    /// The server that this one refers to, as `HOST:PORT`. Without a host it is this one's.
    pub(super) fn referred(&self, address: &str) -> Result<Self, RedisError> {
        let parsed = address.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
        let (host, port) = parsed.ok_or((ErrorKind::Parse, "the server refers to no address"))?;
        self.named(if host.is_empty() { &self.host } else { host }, port)
    }
}

impl fmt::Display for StoreAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port, .. } = self;
        if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
    }
}

/// Whether this host, a name or an address, is this machine.
fn is_here(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(host: &str, port: u16, tls: bool, database: i64) -> StoreAddress {
        StoreAddress { host: host.to_owned(), port, tls, database }
    }

    #[test]
    fn an_address_uses_tls_or_loopback() {
        for (text, expect) in [
            ("rediss://valkey.byok-gate.svc:6380", address("valkey.byok-gate.svc", 6380, true, 0)),
            ("rediss://10.1.2.3/7", address("10.1.2.3", 6379, true, 7)),
            ("rediss://[2001:db8::1]:6380/", address("2001:db8::1", 6380, true, 0)),
            ("redis://127.0.0.1", address("127.0.0.1", 6379, false, 0)),
            ("redis://[::1]:1", address("::1", 1, false, 0)),
            ("redis://localhost:1/15", address("localhost", 1, false, 15)),
        ] {
            assert_eq!(StoreAddress::parse(text, STORE_PORT), Ok(expect), "{text}");
        }
        for (text, what) in [
            ("redis://valkey:6379", "use rediss://"),
            ("redis://10.1.2.3", "use rediss://"),
            ("redis://localhost.example.org", "use rediss://"),
            ("redis://127.0.0.1.example.org", "use rediss://"),
            ("valkey:6379", "has the scheme `valkey`"),
            ("http://localhost", "has the scheme `http`"),
            ("valkey", "is no URL"),
            ("rediss://", "host"),
            ("rediss://user:secret@valkey", "password_file"),
            ("rediss://:secret@valkey", "password_file"),
            ("rediss://valkey/#insecure", "more than an address"),
            ("rediss://valkey?protocol=resp3", "more than an address"),
            ("rediss://valkey/one", "no database by `one`"),
            ("rediss://valkey/-1", "no database by `-1`"),
        ] {
            let fault = StoreAddress::parse(text, STORE_PORT).unwrap_err();
            assert!(fault.contains(what) && !fault.contains("secret@"), "{text}: {fault}");
        }
    }

    #[test]
    fn a_server_that_is_named_is_spoken_to_in_the_same_way() {
        let (plain, tls) = (address("127.0.0.1", 1, false, 0), address("sentinel", 1, true, 0));
        for host in ["10.1.2.3", "valkey-1.valkey", "2001:db8::1"] {
            assert_eq!(tls.named(host, 6380).ok(), Some(address(host, 6380, true, 0)), "{host}");
            assert_eq!(plain.named(host, 6380).map_err(|fault| fault.kind()), Err(ErrorKind::InvalidClientConfig), "{host}");
        }
        for host in ["127.0.0.1", "::1", "localhost"] {
            assert_eq!(plain.named(host, 6380).ok(), Some(address(host, 6380, false, 0)), "{host}");
        }
    }

    #[test]
    fn a_node_refers_to_another_by_host_and_port() {
        let node = address("valkey-0", 6379, true, 0);
        for (text, host, port) in [
            ("10.1.2.3:6380", "10.1.2.3", 6380),
            ("valkey-1:1", "valkey-1", 1),
            ("2001:db8::1:6380", "2001:db8::1", 6380),
            (":7", "valkey-0", 7),
        ] {
            let referred = node.referred(text).unwrap();
            assert_eq!(referred, address(host, port, true, 0), "{text}");
            assert_eq!(referred.to_string().contains('['), host.contains(':'), "{referred}");
        }
        for wrong in ["", "valkey-1", "valkey-1:", "valkey-1:65536", "valkey-1:x"] {
            assert_eq!(node.referred(wrong).map_err(|fault| fault.kind()), Err(ErrorKind::Parse), "{wrong}");
        }
        assert!(address("127.0.0.1", 1, false, 0).referred("10.1.2.3:6380").is_err(), "not encrypted");
    }
}
