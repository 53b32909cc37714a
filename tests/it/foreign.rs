//! A secret that is not an LLM key is never sent, and every vendor's own key is: both for everything in the embedded catalogue.

use std::{collections::BTreeSet, fs};

use byok_gate::{
    core::{
        catalogue::{AcceptsKeysOf, Catalogue},
        endpoint::Endpoint,
        key_shape::why_unsendable,
        registry::Registry,
    },
    domain::secret::Secret,
};
use serde::Deserialize;

#[derive(Deserialize)]
pub(crate) struct Document {
    #[serde(default)]
    pub(crate) foreign_secrets: Vec<Kind>,
    #[serde(default)]
    key_shapes: Vec<Shape>,
}

#[derive(Deserialize)]
pub(crate) struct Kind {
    pub(crate) what: String,
    #[serde(default)]
    prefix: String,
    #[serde(default)]
    infixes: Vec<String>,
    length: Option<usize>,
    min_length: Option<usize>,
    letters: Option<String>,
    key_of: Option<String>,
}

#[derive(Deserialize)]
struct Shape {
    prefix: String,
    vendor: String,
    kind: Option<String>,
}

pub(crate) fn document(name: &str) -> Document {
    serde_yaml::from_str(&fs::read_to_string(format!("src/core/catalogue/{name}")).unwrap()).unwrap()
}

/// Random letters.
fn letters(kind: Option<&str>, count: usize) -> String {
    let from = match kind {
        Some("hexadecimal") => "3f9ab0c17d2e58",
        Some("upper_and_digits") => "MADEUP3Q7ZK9",
        _ => "madeUp0Qz7Kw4",
    };
    from.chars().cycle().take(count).collect()
}

impl Kind {
    /// A value of this kind.
    pub(crate) fn canary(&self) -> String {
        let of = self.letters.as_deref();
        let mut value = self.prefix.clone();
        for infix in &self.infixes {
            value.push_str(&letters(of, 3));
            value.push_str(infix);
        }
        let length = self.length.or(self.min_length).unwrap_or(0).max(value.len() + usize::from(self.length.is_none()) * 12);
        value.push_str(&letters(of, length.saturating_sub(value.len())));
        value
    }
}

/// A value of every kind of the data is kept from a host of which nothing is known and from a gateway that takes every vendor's keys, and told
/// as what it is.
#[test]
fn a_canary_of_every_kind_is_sendable_nowhere() {
    let catalogue = Catalogue::embedded().unwrap().value;
    let hosts = ["eu9.models.example", "api.portkey.ai"].map(str::to_owned).into();
    let kinds = document("foreign-secrets.yaml").foreign_secrets;
    assert!(kinds.len() >= 120, "{} kinds", kinds.len());
    for endpoint in endpoints(&catalogue, &hosts) {
        for kind in &kinds {
            let canary = kind.canary();
            let told = why_unsendable(&catalogue, &endpoint, "SOME_API_KEY", &Secret::new(canary.clone()), false);
            assert!(format!("{told:?}").contains(&kind.what), "{canary} at {}: {told:?}", endpoint.host);
        }
    }
}

/// What follows a vendor's prefix: all forms and lengths that vendors use.
fn tails() -> Vec<String> {
    let alphabets = ["madeUp0Qz7Kw4", "3f9ab0c17d2e58", "MADEUP3Q7ZK9", "made-Up_0Qz-7Kw_4", "0123456789", "madeUp+Q/z7Kw4"];
    let lengths = [16, 20, 24, 28, 32, 35, 36, 40, 43, 46, 48, 50, 51, 56, 60, 64, 84, 88, 93, 100, 132, 164];
    let tail = |alphabet: &str, length: usize| alphabet.chars().cycle().take(length).collect::<String>();
    alphabets.iter().flat_map(|alphabet| lengths.iter().map(move |length| tail(alphabet, *length))).collect()
}

/// Keys of vendors whose own have no prefix of theirs, by the form that their documentation shows.
const FORMS: &[&str] = &[
    "3f9ab0c17d2e583f9ab0c17d2e583f9a",
    "3f9ab0c1-7d2e-483f-9ab0-c17d2e583f9a",
    "3f9ab0c1-7d2e-483f-9ab0-c17d2e583f9a:3f9ab0c17d2e583f9ab0c17d2e583f9a",
    "3f9ab0c17d2e583f9ab0c17d2e583f9a.madeUp0Qz7Kw4mad",
    "madeUp0Q.z7Kw4madeUp0Qz7Kw4madeUp0Qz7Kw4m",
    "madeUp0Qz7Kw4madeUp0Qz7Kw4madeUp0Qz7Kw4m",
    "madeUp0Qz7Kw4madeUp0Qz7Kw4madeUp0Qz7Kw4madeUp0Qz7Kw4madeUp0Qz7Kw4madeUp0Qz7Kw4mad",
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJtYWRlIjoidXAifQ.madeUp0Qz7Kw4madeUp0Qz7Kw4",
    "bWFkZS11cC1rZXktb2YtYS12ZW5kb3ItaW4tYmFzZTY0LW1hZGUtdXA=",
    "bWFkZS11cC1rZXktb2YtYS12ZW5kb3ItaW4tYmFzZTY0LW1hZGUt==",
    "flp_madeUp0Qz7Kw4madeUp0Qz7Kw4",
    "up_madeUp0Qz7Kw4madeUp0Qz7Kw4",
    "sk_madeUp0Qz7Kw4madeUp0Qz7Kw4madeUp0",
    "sk-1234",
    "sk-litellm-made-up",
    "pk-madeUp0Qz7Kw4",
    "dapi3f9ab0c17d2e583f9ab0c17d2e583f9a",
    "EMPTY",
    "dummy",
    "ollama",
];

/// One provider at each of these hosts.
fn endpoints(catalogue: &Catalogue, hosts: &BTreeSet<String>) -> Vec<Endpoint> {
    let mut text = "schema_version: 1\nproviders:\n".to_owned();
    let mut offers = String::new();
    for (index, host) in hosts.iter().enumerate() {
        text.push_str(&format!(
            "  - {{name: p{index}, display_name: P{index}, protocol: openai, auth_mode: anthropic_api, base_url_template: \
             \"https://{host}/v1\", base_url_anthropic: null, auth_env: [P{index}_KEY], auth_token_env: P{index}_KEY, \
             model_prefix_match: '^p{index}/'}}\n"
        ));
        offers.push_str(&format!("      - {{name: p{index}}}\n"));
    }
    text.push_str(&format!(
        "  - {{name: platform, display_name: Platform, protocol: anthropic, auth_mode: third_party_anthropic_compat, base_url_template: \
         \"https://platform.example/v1\", base_url_anthropic: \"https://platform.example/v1\", auth_env: [PLATFORM_TOKEN], \
         auth_token_env: PLATFORM_TOKEN, model_prefix_match: '^platform/'}}\nruntimes:\n  agent:\n    providers:\n{offers}"
    ));
    let registry =
        Registry::parse("registry", text.as_bytes(), &|_| None).unwrap_or_else(|problems| panic!("{problems:?}")).value;
    let own = registry.providers().iter().filter(|provider| !provider.is_platform());
    own.filter_map(|provider| Endpoint::of(provider, catalogue).ok()).collect()
}

/// A key of every vendor that has a known beginning is sent where it is good for: at the vendor's own hosts, at a regional host that has no row,
/// and at a gateway that takes it. No kind of foreign secret takes it for one of its own.
#[test]
fn every_vendors_own_key_passes_at_its_hosts_at_a_region_of_them_and_at_a_gateway() {
    let catalogue = Catalogue::embedded().unwrap().value;
    let shapes = document("default.yaml").key_shapes;
    let is_key = |shape: &&Shape| matches!(shape.kind.as_deref(), None | Some("api_key"));
    let vendors: BTreeSet<&str> = shapes.iter().filter(is_key).map(|shape| shape.vendor.as_str()).collect();
    assert!(vendors.len() > 18, "{vendors:?}");
    let hosts_of = |takes: &dyn Fn(&str, &AcceptsKeysOf) -> bool| -> BTreeSet<String> {
        let rows = catalogue.hosts().flat_map(|(host, rows)| rows.iter().map(move |row| (host, row)));
        let fitting = rows.filter(|(_, row)| takes(&row.vendor, &row.accepts_keys_of));
        fitting.map(|(host, row)| format!("{}{}", host.replace('*', "eu1"), row.path_prefix)).collect()
    };
    let elsewhere = endpoints(&catalogue, &["eu9.models.example".to_owned()].into());
    let tails = tails();
    let mut tried = 0;
    for vendor in vendors {
        let hosts = hosts_of(&|owner, accepts| owner == vendor || *accepts == AcceptsKeysOf::Any);
        let own = endpoints(&catalogue, &hosts);
        assert!(own.iter().any(|endpoint| endpoint.vendor.as_deref() == Some(vendor)), "{vendor} has no host");
        assert!(own.iter().any(|endpoint| endpoint.accepts_keys_of == AcceptsKeysOf::Any), "there is no gateway");
        for shape in shapes.iter().filter(is_key).filter(|shape| shape.vendor == vendor) {
            for tail in &tails {
                let key = Secret::new(format!("{}{tail}", shape.prefix));
                for endpoint in own.iter().chain(&elsewhere) {
                    tried += 1;
                    let told = why_unsendable(&catalogue, endpoint, "SOME_API_KEY", &key, false);
                    assert!(told.is_none(), "{} of {vendor} at {}: {told:?}", key.expose(), endpoint.host);
                }
            }
        }
    }
    let mut hosts = hosts_of(&|_, _| true);
    hosts.insert("eu9.models.example".to_owned());
    for endpoint in endpoints(&catalogue, &hosts) {
        for form in FORMS {
            let told = why_unsendable(&catalogue, &endpoint, "SOME_API_KEY", &Secret::new((*form).to_owned()), false);
            assert!(told.is_none(), "{form} at {}: {told:?}", endpoint.host);
        }
    }
    assert!(tried > 5000, "{tried}");
}

/// A source host's token is a key where that host serves models, and nowhere else.
#[test]
fn what_is_a_key_at_one_vendors_hosts_passes_there_alone() {
    let catalogue = Catalogue::embedded().unwrap().value;
    let kinds: Vec<Kind> =
        document("foreign-secrets.yaml").foreign_secrets.into_iter().filter(|kind| kind.key_of.is_some()).collect();
    assert!(kinds.iter().any(|kind| kind.prefix == "ghp_"));
    let hosts = ["models.github.ai", "api.openai.com"].map(str::to_owned).into();
    for endpoint in endpoints(&catalogue, &hosts) {
        for kind in &kinds {
            let told = why_unsendable(&catalogue, &endpoint, "SOME_API_KEY", &Secret::new(kind.canary()), false);
            assert_eq!(told.is_none(), endpoint.vendor == kind.key_of, "{} at {}: {told:?}", kind.what, endpoint.host);
        }
    }
}

/// Login tokens are never sent: neither to their own vendor nor to an unknown one; elsewhere the message names what they are.
#[test]
fn a_logins_tokens_are_sent_nowhere() {
    let catalogue = Catalogue::embedded().unwrap().value;
    let hosts =
        ["generativelanguage.googleapis.com", "api.anthropic.com", "eu9.models.example", "api.portkey.ai", "api.openai.com"];
    for endpoint in endpoints(&catalogue, &hosts.map(str::to_owned).into()) {
        for (prefix, vendor) in [("ya29.", "google"), ("sk-ant-oat01-", "anthropic")] {
            let token = Secret::new(format!("{prefix}{}", letters(None, 90)));
            let told = format!("{:?}", why_unsendable(&catalogue, &endpoint, "SOME_API_KEY", &token, true));
            let expected = match endpoint.vendor.as_deref() {
                None | Some("portkey") => "NoSurface(OAuthShaped)",
                Some(owner) if owner == vendor => "NoSurface(OAuthShaped)",
                Some(_) => "is_oauth: true",
            };
            assert!(told.contains(expected), "{prefix} at {}: {told}", endpoint.host);
        }
        // A login's file, too: where its vendor is asked it is told from a key, and elsewhere it is no key.
        for (file, told_at) in [(r#"{"access_token": "made-up"}"#, &["google", "openai"][..]), (r#"{"type": "made-up"}"#, &[])] {
            let told =
                format!("{:?}", why_unsendable(&catalogue, &endpoint, "SOME_API_KEY", &Secret::new(file.to_owned()), true));
            let is_of_vendor = endpoint.vendor.as_deref().is_some_and(|vendor| told_at.contains(&vendor));
            let expected = if is_of_vendor { "NoSurface(OAuthShaped)" } else { "Malformed(Json)" };
            assert!(told.contains(expected), "{file} at {}: {told}", endpoint.host);
        }
        for prefix in ["1//0", "rt_", "sk-ant-ort01-"] {
            let token = Secret::new(format!("{prefix}{}", letters(None, 90)));
            let told = format!("{:?}", why_unsendable(&catalogue, &endpoint, "SOME_API_KEY", &token, true));
            assert!(told.contains("RefreshTokenForKey"), "{prefix} at {}: {told}", endpoint.host);
        }
    }
}
