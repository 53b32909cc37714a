//! A configuration file and the environment: a valid one can be shown, and lets no dead key through.
#![no_main]

use std::{fs, path::PathBuf, sync::LazyLock};

use byok_gate::{
    config::{self, Overrides, Paths},
    domain::verdict::Verdict,
};
use byok_gate_fuzz::{byte, decided, question};
use libfuzzer_sys::fuzz_target;

static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

fuzz_target!(|input: &[u8]| {
    let mut input = input;
    let choice = byte(&mut input);
    let path: PathBuf = FOLDER.path().join("config.yaml");
    let (file, environment) = if choice & 1 == 0 { (input, &[][..]) } else { (&b"{}"[..], input) };
    fs::write(&path, file).expect("a file");
    let lines = String::from_utf8_lossy(environment);
    let variables = lines.lines().filter_map(|line| line.split_once('='));
    let variables = variables.map(|(name, value)| (format!("BYOK_GATE__{name}"), value.to_owned()));
    let paths = Paths { config: Some(path), ..Paths::default() };
    let Ok((settings, _)) = config::settings_of(&paths, &Overrides::default(), variables) else { return };
    assert!(!config::list_settings(&settings).is_empty());
    // Loading reads the embedded documents too, a hundred times as much work. So one in eight is loaded, whatever the fuzzer comes to prefer.
    if !input.iter().fold(0_u8, |sum, byte| sum.wrapping_mul(31).wrapping_add(*byte)).is_multiple_of(8) {
        return;
    }
    let Ok(setup) = config::load(&paths, &Overrides::default()) else { return };
    if setup.settings.providers.is_empty() {
        let credential = byok_gate::grpc::convert::pb::Credential {
            env_name: "ANTHROPIC_API_KEY".into(),
            scope: 1,
            value: "sk-ant-api03-made-up-canary-0123456789".into(),
            unreadable: false,
        };
        let message = question("claude-code", "claude-sonnet-4-6", vec![credential]);
        let request = byok_gate::grpc::convert::request(message).expect("a good request");
        let response = decided(&setup.snapshot, Verdict::Invalid, &request);
        let by_hand = setup.settings.exempt_runtimes.contains("claude-code");
        let allowed = matches!(response.decision, Some(byok_gate::grpc::convert::pb::decide_response::Decision::Allow(_)));
        assert!(!allowed || by_hand, "a dead key was let through: {response:?}");
    }
});
