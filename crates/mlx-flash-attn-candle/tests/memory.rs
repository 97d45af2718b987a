//! Memory that a call takes: operands are read in place, and nothing grows with `qL * kL`.
#![allow(clippy::unwrap_used)]

mod common;

use candle_core::{DType, Device, Tensor};
use mlx_flash_attn_candle::{Options, QueryOffset, attention};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Bytes at the peak of `work` above those before it.
fn extra(work: impl Fn()) -> usize {
    // Threads and pipelines are there from the first call on.
    work();
    MEMORY.reset_peak_usage();
    let before = MEMORY.current_usage();
    work();
    MEMORY.peak_usage() - before
}

// One test, for the allocator counts the whole process.
#[test]
fn calls_take_little_besides_their_output() {
    let device = &Device::Cpu;
    let causal = Options {
        causal: true,
        offset: Some(QueryOffset::BottomRight),
        ..Options::default()
    };
    // A token over a cache of 64 MiB, as a view of one that has more room.
    let cache = Tensor::zeros((1, 4, 40_000, 128), DType::F32, device).unwrap();
    let kv = cache.narrow(2, 0, 32_768).unwrap();
    let q = Tensor::ones((1, 8, 1, 128), DType::F32, device).unwrap();
    let token = extra(|| drop(attention(&q, &kv, &kv, &causal).unwrap()));
    assert!(token < 4 << 20, "a token took {token} bytes");

    let prefill = |len: usize| {
        let x = Tensor::ones((1, 2, len, 64), DType::F32, device).unwrap();
        extra(|| drop(attention(&x, &x, &x, &causal).unwrap())) as f64 / len as f64
    };
    let (short, long) = (prefill(1024), prefill(8192));
    assert!(
        long < 1.5 * short,
        "{short:.0} bytes a row at 1,024, {long:.0} at 8,192"
    );
}
