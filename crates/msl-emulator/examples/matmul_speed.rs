//! How fast the emulator runs a tiled matrix product, unchecked and checked.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use msl_emulator::{Binding, CompileOptions, Dispatch, DispatchOptions, Library};

fn main() -> msl_emulator::Result<()> {
    let source = include_str!("../tests/kernels/matmul.metal");
    let start = Instant::now();
    let library = Library::compile(source, &CompileOptions::named("matmul.metal"))?;
    println!(
        "compile (or find in the cache): {:.2} s",
        start.elapsed().as_secs_f64()
    );
    for (check, n) in [(false, 512usize), (true, 128)] {
        let a = vec![0u8; n * n * 2];
        let b = vec![0u8; n * n * 2];
        let mut c = vec![0u8; n * n * 4];
        let shape: Vec<u8> = [n as u32; 3].iter().flat_map(|v| v.to_ne_bytes()).collect();
        let mut options = DispatchOptions::default();
        options.check = check;
        let mut dispatch = Dispatch::new("matmul_half_bk16")
            .bind(0, Binding::read_only(&a))
            .bind(1, Binding::read_only(&b))
            .bind(2, Binding::read_write(&mut c))
            .bytes(3, shape)
            .threadgroups([(n / 32) as u32, (n / 32) as u32, 1])
            .threads([128, 1, 1]);
        for round in 0..2 {
            let start = Instant::now();
            // SAFETY: the text is part of this crate, and the bindings are slices of the right sizes.
            let counters = unsafe { library.dispatch(&mut dispatch, &options) }?;
            let seconds = start.elapsed().as_secs_f64();
            // A load for every other multiply.
            let lane_operations = counters.matrix_multiplies as f64 * 2.0 * 32.0;
            println!(
                "check {check}, {n}x{n}x{n}, round {round}: {:.1} ms, {} multiplies, {:.0} M lane operations/s",
                seconds * 1e3,
                counters.matrix_multiplies,
                lane_operations / seconds / 1e6
            );
        }
    }
    Ok(())
}
