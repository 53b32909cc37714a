//! Compiles the proto without a system `protoc` and keeps its descriptors for gRPC reflection.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message;

/// Messages that hold a credential value, and every parent through which one could be printed. `prost` does not honour
/// `debug_redact`, so their `Debug` is written by hand in `src/grpc/convert.rs`, without the value.
const HOLD_A_CREDENTIAL: [&str; 4] =
    ["byokgate.v1.Credential", "byokgate.v1.WorkspaceSpec", "byokgate.v1.DecideRequest", "byokgate.v1.BatchDecideRequest"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["byokgate/v1/policy_decision.proto"], ["proto"])?;
    let out_dir = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out_dir.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .skip_debug(HOLD_A_CREDENTIAL)
        .codec_path("crate::grpc::codec::Codec")
        // Some 500 bytes beside a short status.
        .boxed("byokgate.v1.BatchDecideResponse.result.response")
        .compile_fds(descriptors)?;
    Ok(())
}
