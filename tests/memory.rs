//! Memory that attention takes besides its operands. A process of its own, for the system counts
//! the peak of a whole process.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use half::bf16;
use mlx_flash_attn::attention::{Problem, Shape};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{CpuOptions, DType, KernelRegistry, MlxDevice};

/// Peak resident memory of this process so far, in bytes.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    line.split_whitespace()
        .next()
        .unwrap()
        .parse::<usize>()
        .unwrap()
        * 1024
}

fn extra(len: usize) -> usize {
    let device = MlxDevice::cpu(CpuOptions::default()).unwrap();
    let (heads, dim) = (8, 64);
    let shape = Shape {
        batch: 1,
        heads,
        kv_heads: heads,
        query_len: len,
        key_len: len,
        head_dim: dim,
    };
    let problem = Problem::builder(DType::BF16, shape)
        .causal(true)
        .build()
        .unwrap();
    // Every page of every operand is there before the run.
    let buffer = |fill: f32| {
        let dims = vec![1, heads, len, dim];
        let mut buffer = device
            .alloc_buffer(heads * len * dim * 2, DType::BF16, dims)
            .unwrap();
        let cells: &mut [bf16] = buffer.as_mut_slice().unwrap();
        for (i, cell) in cells.iter_mut().enumerate() {
            *cell = bf16::from_f32(fill * ((i % 61) as f32 - 30.0) / 17.0);
        }
        buffer
    };
    let (q, k, v, out) = (buffer(1.0), buffer(0.7), buffer(1.3), buffer(f32::NAN));
    let mut registry = KernelRegistry::new();
    let mut encoder = device.command_encoder().unwrap();
    let operands = Operands::new(&q, &k, &v, &out);
    ops::attention(&mut encoder, &device, &mut registry, &problem, &operands).unwrap();
    let before = peak();
    encoder.commit_and_wait().unwrap();
    let after = peak();
    assert!(
        out.as_slice::<bf16>()
            .unwrap()
            .iter()
            .all(|x| x.is_finite())
    );
    after - before
}

#[test]
fn extra_memory_does_not_grow_with_the_square_of_the_length() {
    let short = extra(8_192);
    println!(
        "S=8192, H=8, D=64, causal bf16: {:.1} MB over the operands",
        short as f64 / 1e6
    );
    assert!(short < 16_000_000, "{short} bytes");
    let long = extra(32_768);
    println!(
        "S=32768, H=8, D=64, causal bf16: {:.1} MB over the operands",
        long as f64 / 1e6
    );
    assert!(long < 100_000_000, "{long} bytes");
}
