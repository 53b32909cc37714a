//! Compiles the proto without a system `protoc`, keeps its descriptors for gRPC reflection, and sets the version with its commit.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

/// Messages that hold a credential's value, and their parents. `prost` ignores `debug_redact`, so `src/grpc/convert.rs` implements `Debug` for them
/// without the value.
const HOLD_A_CREDENTIAL: [&str; 4] =
    ["byokgate.v1.Credential", "byokgate.v1.WorkspaceSpec", "byokgate.v1.DecideRequest", "byokgate.v1.BatchDecideRequest"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    println!("cargo:rerun-if-env-changed=BYOK_GATE_REVISION");
    // Only the scripts that build a release set it, so that other builds do not depend on the state of the repository.
    let revision = env::var("BYOK_GATE_REVISION").ok().filter(|revision| !revision.is_empty());
    let version = env::var("CARGO_PKG_VERSION")?;
    println!("cargo:rustc-env=BYOK_GATE_VERSION={version}{}", revision.map(|it| format!(" ({it})")).unwrap_or_default());
    let descriptors = protox::compile(["byokgate/v1/policy_decision.proto"], ["proto"])?;
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out_dir.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .skip_debug(HOLD_A_CREDENTIAL)
        .codec_path("crate::grpc::codec::Codec")
        // It has about 500 bytes, and the other variant is a short status.
        .boxed("byokgate.v1.BatchDecideResponse.result.response")
        .compile_fds(descriptors)?;
    Ok(())
}
