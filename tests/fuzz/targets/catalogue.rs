//! A catalogue file, laid over the embedded one: a valid one makes requests only to the registry's own hosts.
#![no_main]

use std::sync::Arc;

use byok_gate::{core::endpoint::target, domain::verdict::Verdict};
use byok_gate_fuzz::{CASES, EMBEDDED, decide, question, snapshot};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Ok(loaded) = EMBEDDED.catalogue.overlaid("catalogue", input) else { return };
    let snapshot = snapshot(Arc::clone(&CASES.registry), Arc::new(loaded.value));
    for provider in snapshot.registry.providers() {
        let Ok(target) = target(provider, &snapshot.catalogue, "acme-large/../x?y#z@evil.example") else { continue };
        for call in &target.calls {
            let host = call.url.host_str().unwrap_or_default();
            assert!(target.endpoint.host.starts_with(host), "{} goes to {}", target.endpoint.host, call.url);
            assert!(call.url.username().is_empty() && call.url.password().is_none(), "{}", call.url);
        }
    }
    let credentials = vec![byok_gate::grpc::convert::pb::Credential {
        env_name: "ACME_API_KEY".into(),
        scope: 1,
        value: "made-up-canary-0123456789".into(),
        unreadable: false,
    }];
    for verdict in [Verdict::Valid, Verdict::Invalid] {
        decide(&snapshot, verdict, question("agent", "acme-large", credentials.clone()));
    }
});
