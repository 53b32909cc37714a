//! Criterion's times of the steps of a decision inside the process: `cargo bench --package byok-gate-benches`.

use criterion::Criterion;
use mimalloc::MiMalloc;

#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for (name, make, size) in steps::steps() {
        // Each is made when its turn comes, so that it does not affect the others.
        criterion.bench_function(&name, |bencher| {
            let mut step = make(size);
            bencher.iter(&mut step);
        });
    }
    criterion.final_summary();
}
