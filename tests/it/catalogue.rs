//! The embedded catalogue as a whole: which providers it covers, where each call goes, and the errors of a faulty document.

use std::{collections::BTreeSet, fs, path::PathBuf};
use strum::VariantArray;

use byok_gate::{
    core::{
        catalogue::{AcceptsKeysOf, Catalogue},
        classify::{Answer, Classification, classify},
        endpoint::{NoSurface, target},
        registry::{Provider, Registry},
    },
    domain::{
        problem::Problems,
        protocol::{HeaderFamily, Protocol, Surface},
        verdict::Verdict,
    },
};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn embedded() -> (Registry, Catalogue) {
    (Registry::embedded(&|_| None).unwrap().value, Catalogue::embedded().unwrap().value)
}

/// A model of this provider's, as a workspace would name it: a listed one, else one by its pattern.
fn some_model(registry: &Registry, provider: &Provider) -> String {
    let offers = registry.runtimes().flat_map(|(_, runtime)| &runtime.offers);
    let listed = offers.filter(|offer| registry.provider(offer).name == provider.name).flat_map(|offer| &offer.models).next();
    let forms = [format!("{}:acme/made-up 1", provider.name), format!("{}/made-up", provider.name), "glm-made-up".into()];
    let more = ["mimo-made-up", "deepseek-made-up", "gemini-made-up", "gemini/made-up", "anthropic/made-up", "openai:made-up"]
        .map(String::from);
    let by_pattern = || forms.into_iter().chain(more).find(|model| provider.pattern.is_match(model));
    listed.cloned().or_else(by_pattern).unwrap_or_else(|| panic!("no model for {}", provider.name))
}

/// Every provider and probe of the embedded registry: the final request, or why there is none. To change the table on
/// purpose, look at the difference and write the new one: `BLESS=1 cargo test --test it the_final_request`.
#[test]
fn the_final_request_of_every_provider_and_probe() {
    let (registry, catalogue) = embedded();
    let mut table = String::new();
    for provider in registry.providers() {
        let model = some_model(&registry, provider);
        table.push_str(&format!("{} ({model})\n", provider.name));
        match target(provider, &catalogue, &model) {
            Err(reason) => table.push_str(&format!("  not asked: {}\n", reason.reason())),
            Ok(target) => {
                for call in &target.calls {
                    let families: Vec<&str> = call.probe.auth.iter().map(|family| family.as_str()).collect();
                    let proven = if call.probe.refuses_bad_keys { "" } else { ", calibrated" };
                    table.push_str(&format!("  {} {}", call.probe.method.as_str(), call.url));
                    table.push_str(&format!("  [{}] {}{proven}\n", families.join(", "), call.probe.name));
                    if let Some(body) = &call.body {
                        table.push_str(&format!("    {body}\n"));
                    }
                }
            }
        }
    }
    let file = fixture("probe-urls.txt");
    if std::env::var_os("BLESS").is_some() {
        fs::write(&file, &table).unwrap();
    }
    assert_eq!(table, fs::read_to_string(&file).unwrap(), "see the test's own words for how to change the table");
}

/// No provider is left to the protocol's default probes, and none is without an address for no reason.
#[test]
fn every_provider_is_asked_by_a_row_of_its_own_or_says_why_not() {
    let (registry, catalogue) = embedded();
    for provider in registry.providers() {
        match target(provider, &catalogue, "made-up") {
            Ok(target) => {
                let base = provider.base_url.as_ref().or(catalogue.home(&provider.name)).unwrap();
                let row = catalogue
                    .row(&target.endpoint.host, base.path(), provider.protocol)
                    .unwrap_or_else(|| panic!("no row for {}", provider.name));
                assert!(!row.probes.is_empty(), "{} is asked by the default ladder", provider.name);
                assert!(row.probes.iter().all(|probe| probe.auth.iter().all(|family| HeaderFamily::VARIANTS.contains(family))));
                assert!(target.calls.iter().all(|call| call.url.host_str() == base.host_str()), "{}", provider.name);
            }
            Err(NoSurface::NoEndpoint) => panic!("{} has neither an address nor a reason", provider.name),
            Err(reason) => assert!(!reason.text().is_empty()),
        }
    }
}

#[test]
fn every_row_says_how_well_it_is_known_and_where_from() {
    let (_, catalogue) = embedded();
    for (host, rows) in catalogue.hosts() {
        for row in rows {
            assert!(row.confidence.is_some() && row.since.is_some() && !row.sources.is_empty(), "{host}");
            for probe in &row.probes {
                assert!(probe.signals.iter().all(|signal| signal.confidence.is_some()), "{host} {}", probe.name);
            }
        }
    }
}

/// No row can make these answers a "yes": a failing server, a web page, an empty body, a redirect.
#[test]
fn no_row_takes_a_failure_for_a_yes() {
    let (_, catalogue) = embedded();
    let bodies: [&[u8]; 6] =
        [b"", b"{}", b"<html>data choices content</html>", b"null", b"[]", b"{\"error\":{\"code\":\"query\"}}"];
    for (host, rows) in catalogue.hosts() {
        for probe in rows.iter().flat_map(|row| &row.probes) {
            for status in 200..=599 {
                for body in bodies {
                    let answer = Answer { status, body, truncated: false, page: false, retry_after: None };
                    let classification = classify(answer, probe);
                    // The only row where a refusal of the request shows that the key was checked first.
                    let empty_search = host == "ollama.com" && status == 400 && body.ends_with(b"}}");
                    assert!(
                        classification != Classification::Accepted || empty_search,
                        "{host} {} {status} {body:?}",
                        probe.name
                    );
                    assert_ne!(classification, Classification::Verdict(Verdict::Valid));
                }
            }
        }
    }
}

/// A row for a pattern of hosts is a row for each of them, and for no other; a host's own row wins; a row about one API is for that.
#[test]
fn patterns_name_hosts_and_nobody_elses() {
    let document = "catalogue_version: 1\nhosts:\n\
        \u{20} - {host: \"*.llm.acme.example\", vendor: acme}\n\
        \u{20} - {host: own.llm.acme.example, vendor: own}\n\
        \u{20} - {host: \"run-*.acme.example\", vendor: run}\n\
        \u{20} - {host: \"{eu,us}.acme.example\", vendor: regional}\n\
        \u{20} - {host: both.acme.example, protocol: anthropic, vendor: messages}\n\
        \u{20} - {host: both.acme.example, protocol: openai, vendor: chat}\n\
        \u{20} - {host: half.acme.example, protocol: openai, vendor: half}\n";
    let catalogue = Catalogue::embedded().unwrap().value.overlaid("test", document.as_bytes()).unwrap().value;
    let vendor = |host: &str, protocol| catalogue.row(host, "/v1", protocol).map(|row| row.vendor.clone());
    for (host, expected) in [
        ("a.llm.acme.example", Some("acme")),
        ("own.llm.acme.example", Some("own")),
        ("llm.acme.example", None),
        (".llm.acme.example", None),
        ("a.b.llm.acme.example", None),
        ("a.llm.acme.example:8443", None),
        ("a.llm.acme.example.evil.example", None),
        ("run-1.acme.example", Some("run")),
        ("run-.acme.example", None),
        ("eu.acme.example", Some("regional")),
        ("us.acme.example", Some("regional")),
        ("ap.acme.example", None),
        ("both.acme.example", Some("chat")),
        ("made-up.openai.azure.com", Some("azure")),
        ("openai.azure.com", None),
        ("europe-west1-aiplatform.googleapis.com", Some("google")),
    ] {
        assert_eq!(vendor(host, Protocol::OpenAi).as_deref(), expected, "{host}");
    }
    assert_eq!(vendor("both.acme.example", Protocol::Anthropic).as_deref(), Some("messages"));
    assert_eq!(vendor("half.acme.example", Protocol::Anthropic), None);
    for host in ["*.com", "*", "api.*", "a.*.example", "**.acme.example", "a.b*c*d.acme.example"] {
        let document = format!("catalogue_version: 1\nhosts:\n  - {{host: \"{host}\", vendor: acme}}\n");
        assert_eq!(problems(&document).len(), 1, "{host}: {:?}", problems(&document));
    }
}

/// Each pair of braces multiplies the hosts: thirty pairs would be a thousand million.
#[test]
fn a_row_stands_for_few_hosts() {
    let row = |host: &str| format!("catalogue_version: 1\nhosts:\n  - {{host: \"{host}\", vendor: acme}}\n");
    let most = row(&format!("{}.{{a,b}}-{{c,d}}.acme.example", "{e,f}".repeat(4)));
    let catalogue = Catalogue::embedded().unwrap().value.overlaid("test", most.as_bytes()).unwrap().value;
    let is_named = |host: &str| catalogue.row(host, "", Protocol::OpenAi).is_some();
    assert!(is_named("eeee.a-c.acme.example") && is_named("ffff.b-d.acme.example") && !is_named("eeee.a-e.acme.example"));
    for pairs in [7, 30, 180] {
        let found = problems(&row(&format!("{}.acme.example", "{a,b}".repeat(pairs))));
        let said = format!("{found:?}");
        assert!(found.len() == 1 && said.contains("hosts[0].host") && said.contains("stands for more than 64 hosts"), "{said}");
    }
    let long = format!("{:?}", problems(&row(&format!("{}{{a,b}}.example", "x".repeat(2000)))));
    assert!(long.contains("is 2013 bytes long; the limit is 1024"), "{long}");
    // A fault of many names is told once.
    assert_eq!(problems(&row("{a,b,c d,e f,g h}.acme.example")).len(), 1);
}

/// The embedded catalogue knows the vendors of 2026, free probes come before paid ones, and only gateways accept keys of others.
#[test]
fn the_embedded_catalogue_is_wide_and_cheap() {
    let (_, catalogue) = embedded();
    let rows: Vec<_> = catalogue.hosts().flat_map(|(host, rows)| rows.iter().map(move |row| (host, row))).collect();
    let vendors: BTreeSet<&str> = rows.iter().map(|(_, row)| row.vendor.as_str()).collect();
    assert!(vendors.len() >= 45, "{}: {vendors:?}", vendors.len());
    for (host, row) in &rows {
        let paid: Vec<bool> = row.probes.iter().map(|probe| probe.costs_money).collect();
        assert!(paid.is_sorted(), "{host}: a probe that costs money stands before a free one");
        let gateway = row.accepts_keys_of != AcceptsKeysOf::Nobody;
        assert_eq!(
            gateway,
            ["portkey", "cloudflare", "helicone"].contains(&row.vendor.as_str()) && host.contains("gateway")
                || host.contains("helicone")
                || *host == "api.portkey.ai",
            "{host}"
        );
    }
    for surface in [
        Surface::Models,
        Surface::KeyInformation,
        Surface::ChatCompletions,
        Surface::Responses,
        Surface::Messages,
        Surface::GenerateContent,
    ] {
        assert!(rows.iter().any(|(_, row)| row.probes.iter().any(|probe| probe.surface == surface)), "{}", surface.as_str());
    }
}

#[track_caller]
fn problems(document: &str) -> Vec<String> {
    let Err(Problems { list, .. }) = Catalogue::embedded().unwrap().value.overlaid("test", document.as_bytes()) else {
        panic!("it stands: {document}")
    };
    list.iter().map(ToString::to_string).collect()
}

/// A faulty document beside all of its problems.
#[test]
fn faulty_documents_are_told_all_their_problems() {
    let folder = fixture("catalogues/bad");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "yaml"));
    files.sort();
    assert!(!files.is_empty());
    for file in files {
        let expected = file.with_extension("txt");
        let found = problems(&fs::read_to_string(&file).unwrap()).join("\n") + "\n";
        if std::env::var_os("BLESS").is_some() {
            fs::write(&expected, &found).unwrap();
        }
        assert_eq!(found, fs::read_to_string(&expected).unwrap(), "{}", file.display());
    }
}

fn home_of(document: &str, provider: &str) -> Option<String> {
    let catalogue = Catalogue::embedded().unwrap().value.overlaid("test", document.as_bytes()).unwrap().value;
    catalogue.home(provider).map(ToString::to_string)
}

#[test]
fn an_overlay_moves_a_provider_and_takes_its_home_away() {
    let row = |host: &str, more: &str| format!("catalogue_version: 1\nhosts:\n  - {{host: {host}, vendor: alibaba{more}}}\n");
    assert_eq!(home_of("catalogue_version: 1\n", "alibaba").unwrap(), "https://dashscope-intl.aliyuncs.com/compatible-mode/v1");
    let moved = row("dashscope.aliyuncs.com", ", providers: [alibaba], base_path: /compatible-mode/v1");
    assert_eq!(home_of(&moved, "alibaba").unwrap(), "https://dashscope.aliyuncs.com/compatible-mode/v1");
    // A host's rows are replaced as a whole: without `providers`, none is left.
    assert_eq!(home_of(&row("dashscope-intl.aliyuncs.com", ""), "alibaba"), None);
    let unprobed = "catalogue_version: 1\nunprobed:\n  arcee: {reason: TENANT_ENDPOINT, note: x}\n";
    assert_eq!(home_of(unprobed, "arcee"), None);
    let document = row("llm.acme.example", ", providers: [ollama]");
    let catalogue = Catalogue::embedded().unwrap().value.overlaid("test", document.as_bytes()).unwrap().value;
    assert!(catalogue.unprobed("ollama").is_none() && catalogue.home("ollama").is_some());
}

/// Never a host for `custom`: its address is the tenant's own.
#[test]
fn custom_and_the_platform_get_no_host() {
    for name in ["custom", "platform"] {
        let document = format!("catalogue_version: 1\nhosts:\n  - {{host: a.example, vendor: a, providers: [{name}]}}\n");
        assert_eq!(
            problems(&document),
            [format!("line 3: hosts[0].providers[0]: `{name}` has no host of a vendor's; a row must not give it one")]
        );
    }
}

/// The registry decides: with its own URL `custom` is probed, and a keyless server is not.
#[test]
fn what_is_not_asked_follows_from_both_files() {
    let (_, catalogue) = embedded();
    let reason = |name: &str, url: &str, more: &str| {
        let document = format!(
            "schema_version: 1\nproviders:\n  - {{name: {name}, display_name: x, protocol: openai, auth_mode: x, auth_env: [X], \
             model_prefix_match: x{url}{more}}}\nruntimes: {{r: {{providers: [{{name: {name}}}]}}}}\n"
        );
        let registry = Registry::parse("test", document.as_bytes(), &|_| None).unwrap().value;
        target(&registry.providers()[0], &catalogue, "m")
            .map(|target| target.endpoint.host.clone())
            .map_err(|reason| reason.reason())
    };
    let url = ", base_url_template: \"https://llm.acme.example/v1\"";
    let inline = ", probe: [{name: own, path: /v1/models, auth: [bearer], expect: [data]}]";
    assert_eq!(reason("custom", "", ""), Err("TENANT_ENDPOINT"));
    assert_eq!(reason("custom", url, ""), Ok("llm.acme.example".into()));
    assert_eq!(reason("ollama", url, ""), Err("KEYLESS"));
    assert_eq!(reason("ollama", url, inline), Ok("llm.acme.example".into()));
    assert_eq!(reason("acme", "", ""), Err("NO_ENDPOINT"));
    assert_eq!(reason("arcee", url, ""), Ok("llm.acme.example".into()), "the registry's URL beats the row's");
    assert_eq!(reason("arcee", "", ""), Ok("api.arcee.ai".into()));
}
