//! The `byok-gate` command.

use byok_gate::cli::{Cli, Exit};
use clap::Parser;

fn main() -> Exit {
    Cli::parse().run()
}
