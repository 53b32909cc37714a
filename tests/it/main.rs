//! The integration tests: one binary, so that it links once.

mod cases;
mod invariants;
mod secrets;
mod support;
mod tidy;
mod vectors;
mod wire;
