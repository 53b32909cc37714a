//! A message off the wire to an answer: any bytes, any verdict.
#![no_main]

use std::{collections::BTreeSet, sync::Arc};

use byok_gate::{
    core::engine::Engine,
    grpc::{
        convert::{self, pb},
        limits::Limits,
    },
};
use byok_gate_fuzz::{CASES, EMBEDDED, VERDICTS, byte, decide};
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|input: &[u8]| {
    let mut input = input;
    let choice = byte(&mut input);
    let verdict = VERDICTS[usize::from(choice & 15) % VERDICTS.len()];
    let snapshot = if choice & 16 == 0 { &*CASES } else { &*EMBEDDED };
    match choice >> 5 {
        6 => {
            let Ok(message) = pb::ResolveProviderRequest::decode(input) else { return };
            let model = message.model.clone();
            let Ok((runtime, trimmed, names)) = convert::resolve_request(message, &Limits::default()) else { return };
            let names: BTreeSet<String> = names;
            let engine = Engine::new(snapshot.clone(), Arc::new(Nobody), None);
            let (found, by) = engine.resolve(&runtime, &trimmed, &names);
            drop(convert::resolve_response(found, model.trim(), &by).encode_to_vec());
        }
        7 => {
            let Ok(message) = pb::ListModelsRequest::decode(input) else { return };
            let Ok((runtime, details)) = convert::list_request(message, &Limits::default()) else { return };
            drop(convert::models(snapshot, runtime.as_deref(), details).encode_to_vec());
        }
        _ => {
            let Ok(message) = pb::DecideRequest::decode(input) else { return };
            decide(snapshot, verdict, message);
        }
    }
});

/// Names alone need no probe.
struct Nobody;

impl byok_gate::core::engine::LivenessSource for Nobody {
    fn observe<'a>(
        &'a self,
        _: byok_gate::core::credential::LivenessQuery<'a>,
        _: Option<std::time::Duration>,
        _: tokio::time::Instant,
    ) -> byok_gate::core::engine::Boxed<'a, byok_gate::core::engine::Observed> {
        unreachable!("names alone ask nobody")
    }
}
