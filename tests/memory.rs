//! Memory that attention takes besides its operands. The system counts the peak of a whole process,
//! so each test wants one of its own, as nextest gives it; sharing one, the later shows less than
//! it took, for what the earlier kept is there already.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::sync::Mutex;

use half::bf16;
use mlx_flash_attn::attention::{Problem, Shape};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{CpuOptions, DType, MlxDevice};

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

/// More than most machines have: each thread has working memory of its own.
const THREADS: usize = 16;

fn extra(len: usize) -> usize {
    let device = MlxDevice::cpu(CpuOptions {
        threads: Some(THREADS),
        ..CpuOptions::default()
    })
    .unwrap();
    let (heads, dim) = (8, 64);
    let shape = Shape {
        batch: 1,
        heads,
        kv_heads: heads,
        query_len: len,
        key_len: len,
        qk_dim: dim,
        v_dim: dim,
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
    let mut encoder = device.command_encoder().unwrap();
    let operands = Operands::new(&q, &k, &v, &out);
    ops::attention(&mut encoder, &problem, &operands).unwrap();
    // Forgets the peak so far.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
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

fn assert_extra(len: usize, most: usize) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock();
    let bytes = extra(len);
    println!(
        "S={len}, H=8, D=64, causal bf16, {THREADS} threads: {:.1} MB over the operands",
        bytes as f64 / 1e6
    );
    assert!(bytes < most, "{bytes} bytes");
}

#[test]
fn a_length_of_8192_takes_under_16_mb() {
    assert_extra(8_192, 16_000_000);
}

#[test]
fn a_length_of_32768_takes_under_100_mb() {
    assert_extra(32_768, 100_000_000);
}
