//! Runs one step of a decision inside the process, without gRPC: `inside STEP TIMES` prints how many nanoseconds each took. `inside` alone
//! names the steps.
//!
//! `benches/gate` runs it under callgrind, since instructions are the same on a busy machine.

#![expect(clippy::expect_used, clippy::print_stdout, reason = "a measurement that cannot be made ends with its reason")]

use std::{env, time::Instant};

use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [wanted, times] = arguments.as_slice() else {
        steps::steps().iter().for_each(|(name, ..)| println!("{name}"));
        return;
    };
    let (_, make, size) = steps::steps().into_iter().find(|(name, ..)| name == wanted).expect("no such step");
    let (mut step, times): (_, u32) = (make(size), times.parse().expect("how many times?"));
    let began = Instant::now();
    for _ in 0..times {
        step();
    }
    println!("{}", began.elapsed().as_nanos() / u128::from(times));
}
