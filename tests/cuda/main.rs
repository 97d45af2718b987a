//! What only the CUDA device has: an engine's own memory and stream, host views that follow the
//! device, splits of the keys, kernels compiled ahead. Without a GPU each test says that it is
//! skipped, but for those that need none.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod agreement;
#[path = "../common/mod.rs"]
mod common;
mod compiled;
mod copies;
mod device;
mod extremes;
mod figures;
mod large;
mod others;
mod poison;
mod splits;
mod streams;

use mlx_flash_attn::attention::Problem;
use mlx_flash_attn::encoder::CommandEncoder;
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, DeviceKind, MlxBuffer, MlxDevice};

const BF16: DType = DType::BF16;

fn cuda() -> Option<MlxDevice> {
    MlxDevice::open(DeviceKind::Cuda)
        .inspect_err(|error| eprintln!("SKIPPED: {error}"))
        .ok()
}

fn record(encoder: &mut CommandEncoder, problem: &Problem, b: &[MlxBuffer; 4]) {
    let [q, k, v, out] = b;
    let operands = Operands::new(q, k, v, out);
    ops::attention(encoder, problem, &operands).unwrap();
}

/// Relative Frobenius distance.
fn distance(got: &[f32], want: &[f32]) -> f64 {
    let square = |x: f32| f64::from(x) * f64::from(x);
    let off: f64 = got.iter().zip(want).map(|(a, b)| square(a - b)).sum();
    let norm: f64 = want.iter().map(|x| square(*x)).sum();
    assert_eq!(got.len(), want.len());
    (off / norm).sqrt()
}

fn upload_bytes(device: &MlxDevice, bytes: &[u8]) -> MlxBuffer {
    device
        .buffer_from_slice(
            bytemuck::cast_slice::<u8, u16>(bytes),
            BF16,
            vec![bytes.len() / 2],
        )
        .unwrap()
}
