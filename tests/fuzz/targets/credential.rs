//! Values in a credential's place, of every runtime, model and name: keys, `auth.json`, what people paste by mistake.
#![no_main]

use std::sync::LazyLock;

use byok_gate::{core::snapshot::Snapshot, grpc::convert::pb};
use byok_gate_fuzz::{CASES, EMBEDDED, VERDICTS, byte, decide, question};
use libfuzzer_sys::fuzz_target;

/// Each runtime with each of its models, and the names that count for that one.
static MENU: LazyLock<Vec<(&'static Snapshot, String, String, Vec<String>)>> = LazyLock::new(|| {
    let mut menu = Vec::new();
    for snapshot in [&*CASES, &*EMBEDDED] {
        let names: Vec<String> = snapshot.registry.providers().iter().flat_map(|it| it.auth_env.iter().cloned()).collect();
        for runtime in byok_gate::grpc::convert::models(snapshot, None, true).models {
            menu.push((snapshot, runtime.runtime, runtime.model, names.clone()));
        }
    }
    menu
});

fuzz_target!(|input: &[u8]| {
    let mut input = input;
    let place = usize::from(byte(&mut input)) << 8 | usize::from(byte(&mut input));
    let choice = byte(&mut input);
    let Some((snapshot, runtime, model, names)) = MENU.get(place % MENU.len()) else { return };
    let mut credentials: Vec<pb::Credential> = Vec::new();
    // Values are set apart by a byte that no UTF-8 has, each behind a byte that chooses its name.
    for (index, part) in input.split(|byte| *byte == 0xff).take(8).enumerate() {
        let mut part = part;
        let name = usize::from(byte(&mut part)) + index;
        let Ok(value) = std::str::from_utf8(part) else { continue };
        let scope = if choice >> (index & 7) & 1 == 0 { pb::Scope::Workspace } else { pb::Scope::Organization };
        let Some(name) = names.get(name % names.len().max(1)) else { continue };
        if !credentials.iter().any(|it| it.env_name == *name && it.scope == scope as i32) {
            let value = value.to_owned();
            credentials.push(pb::Credential { env_name: name.clone(), scope: scope as i32, value, unreadable: false });
        }
    }
    decide(snapshot, VERDICTS[usize::from(choice) % VERDICTS.len()], question(runtime, model, credentials));
});
