//! A registry file: a valid one decides, and never flips.
#![no_main]

use std::sync::Arc;

use byok_gate::{
    core::registry::Registry,
    domain::verdict::Verdict,
    grpc::convert::{self, pb},
};
use byok_gate_fuzz::{EMBEDDED, decide, question, snapshot};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let environment = |name: &str| (!name.starts_with('X')).then(|| "https://llm.example".to_owned());
    let Ok(loaded) = Registry::parse("registry", input, &environment) else { return };
    let snapshot = snapshot(Arc::new(loaded.value), Arc::clone(&EMBEDDED.catalogue));
    let offers = convert::models(&snapshot, None, true).models;
    for (index, offer) in offers.iter().take(16).enumerate() {
        let names = snapshot.registry.providers().iter().flat_map(|it| it.auth_env.iter());
        let credentials = names.take(4).fold(Vec::<pb::Credential>::new(), |mut all, name| {
            if all.iter().all(|it| it.env_name != *name) {
                all.push(pb::Credential {
                    env_name: name.clone(),
                    scope: 1,
                    value: "made-up-canary-0123456789".into(),
                    unreadable: false,
                });
            }
            all
        });
        let verdict = if index % 2 == 0 { Verdict::Valid } else { Verdict::Invalid };
        decide(&snapshot, verdict, question(&offer.runtime, &offer.model, credentials));
        decide(&snapshot, verdict, question(&offer.runtime, &offer.model, vec![]));
    }
});
