//! The integration tests: one binary, so that it links once.

mod answers;
mod cases;
mod catalogue;
mod invariants;
mod secrets;
mod support;
mod tidy;
mod vectors;
mod wire;
