//! y = a x + y on the emulated GPU, checked.
#![allow(clippy::print_stdout)]

use msl_emulator::{Binding, CompileOptions, Dispatch, DispatchOptions, Library};

const SOURCE: &str = r"
#include <metal_stdlib>
using namespace metal;

kernel void saxpy(device const float* x [[buffer(0)]],
                  device float* y [[buffer(1)]],
                  constant float& a [[buffer(2)]],
                  uint i [[thread_position_in_grid]]) {
  y[i] = fma(a, x[i], y[i]);
}
";

fn main() -> msl_emulator::Result<()> {
    let library = Library::compile(SOURCE, &CompileOptions::named("saxpy.metal"))?;
    let x: Vec<u8> = (0..1024).flat_map(|i| (i as f32).to_ne_bytes()).collect();
    let mut y = vec![0u8; x.len()];
    let mut dispatch = Dispatch::new("saxpy")
        .bind(0, Binding::read_only(&x))
        .bind(1, Binding::read_write(&mut y))
        .bytes(2, 2.0f32.to_ne_bytes())
        .threadgroups([8, 1, 1])
        .threads([128, 1, 1]);
    // SAFETY: the text above is trusted, and the bindings are slices.
    let counters = unsafe { library.dispatch(&mut dispatch, &DispatchOptions::checked()) }?;
    drop(dispatch);
    println!(
        "y[3] = {}",
        f32::from_ne_bytes([y[12], y[13], y[14], y[15]])
    );
    println!("{counters:?}");
    Ok(())
}
