//! What a Metal kernel does for each score (query row x key), counted by the emulator, next to the
//! same figures of other kernels from their geometry. `docs/perf/metal.md` explains both.
//!
//! ```sh
//! cargo run --release --features emulator --example metal_counters
//! ```
#![allow(clippy::print_stdout)]

use mlx_flash_attn::abi::table::{self, MaskKind};
use mlx_flash_attn::attention::HEAD_DIMS;
use mlx_flash_attn::attention::{Problem, ProblemBuilder, Shape};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, EmulatorCounters, EmulatorOptions, MlxDevice, Result};

/// Query rows and keys: whole tiles of every kernel.
const LEN: usize = 512;

/// Adds to a problem.
type With = fn(ProblemBuilder) -> ProblemBuilder;

/// Figures of one kernel, those from `multiplies` on for each score.
struct Figures {
    name: String,
    shared: usize,
    /// Registers of a lane that hold O.
    o_registers: usize,
    multiplies: f64,
    shared_read: f64,
    shared_written: f64,
    device_read: f64,
    /// For each thousand scores.
    barriers: f64,
}

fn main() -> Result<()> {
    let device = MlxDevice::emulator(EmulatorOptions {
        check: true,
        ..EmulatorOptions::default()
    })?;
    println!(
        "| kernel | threadgroup bytes | O registers | multiplies | threadgroup read | written | device read | barriers / 1000 |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for dim in HEAD_DIMS {
        for dtype in [DType::BF16, DType::F32] {
            print(&ours(&device, dtype, dim)?);
        }
        if dim <= 256 {
            let keys = if dim < 128 { 32 } else { 16 };
            print(&staged(&format!("MLX steel d{dim}, 32x{keys}"), dim, keys));
        }
        if dim == 64 {
            print(&staged("mlx-native d64, 32x16", dim, 16));
        }
        if dim == 512 {
            print(&rows_of_eight("mlx-native d512, 8x64"));
        }
    }
    println!("\nwhat is ruled out (bf16 d64, {LEN}x{LEN}), against the full problem:");
    let full = count(&device, DType::BF16, 64, |b| b)?;
    let bounded: [(&str, With); 3] = [
        ("causal", |b| b.causal(true)),
        ("causal, window 64", |b| b.causal(true).window(64)),
        ("causal, window 1", |b| b.causal(true).window(1)),
    ];
    for (name, with) in bounded {
        let counters = count(&device, DType::BF16, 64, with)?;
        println!(
            "{name}: multiplies {:.4}, device bytes read {:.4}, barriers {:.4}",
            ratio(counters.matrix_multiplies, full.matrix_multiplies),
            ratio(counters.device_bytes_read, full.device_bytes_read),
            ratio(counters.threadgroup_barriers, full.threadgroup_barriers),
        );
    }
    Ok(())
}

fn ratio(part: u64, whole: u64) -> f64 {
    part as f64 / whole as f64
}

/// Runs one head and gives what the emulator counted.
fn count(
    device: &MlxDevice,
    dtype: DType,
    head_dim: usize,
    with: With,
) -> Result<EmulatorCounters> {
    let shape = Shape {
        batch: 1,
        heads: 1,
        kv_heads: 1,
        query_len: LEN,
        key_len: LEN,
        qk_dim: head_dim,
        v_dim: head_dim,
    };
    let problem = with(Problem::builder(dtype, shape)).build()?;
    let elements = LEN * head_dim;
    let buffer = || device.alloc_buffer(elements * dtype.size_of(), dtype, vec![elements]);
    let (q, k, v, out) = (buffer()?, buffer()?, buffer()?, buffer()?);
    let mut encoder = device.command_encoder()?;
    let operands = Operands::new(&q, &k, &v, &out);
    ops::attention(&mut encoder, &problem, &operands)?;
    device.take_emulator_counters();
    encoder.commit_and_wait()?;
    Ok(device.take_emulator_counters().unwrap_or_default())
}

fn ours(device: &MlxDevice, dtype: DType, dim: usize) -> Result<Figures> {
    let variant = table::select(dtype, dim, MaskKind::Additive)?;
    let counters = count(device, dtype, dim, |b| b)?;
    let each = |n: u64| n as f64 / (LEN * LEN) as f64;
    let rows = if variant.tile.bq == 8 { 8 } else { 32 };
    Ok(Figures {
        name: format!("ours {dtype} d{dim}"),
        shared: variant.shared_bytes,
        // The simdgroups divide the columns, in blocks of 8.
        o_registers: rows / 8 * (dim / 8).div_ceil(variant.simdgroups) * 2,
        multiplies: each(counters.matrix_multiplies),
        shared_read: each(counters.threadgroup_bytes_read),
        shared_written: each(counters.threadgroup_bytes_written),
        device_read: each(counters.device_bytes_read),
        barriers: 1000.0 * each(counters.threadgroup_barriers),
    })
}

/// 16-bit kernels that stage K and V in one threadgroup buffer: 32 rows, 4 simdgroups of 8 rows each,
/// S and O in registers, 4 barriers a key tile.
fn staged(name: &str, dim: usize, keys: usize) -> Figures {
    let (d, bk, len) = (dim as f64, keys as f64, LEN as f64);
    let scores = 32.0 * bk;
    Figures {
        name: name.into(),
        shared: (32 * (dim + 8) + ((keys + 8) * dim).max(keys * (dim + 8))) * 2,
        o_registers: dim / 4,
        multiplies: 2.0 * d / 512.0,
        // Each simdgroup reads its own rows of Q, and all of K and V.
        shared_read: (32.0 * d + 2.0 * 4.0 * bk * d) * 2.0 / scores,
        shared_written: 2.0 * bk * d * 2.0 / scores + d * 2.0 / len,
        device_read: 2.0 * bk * d * 2.0 / scores + d * 2.0 / len,
        barriers: 1000.0 * 4.0 / scores,
    }
}

/// 8 rows, 64 keys, 8 simdgroups, head dim 512: O is 16-bit threadgroup memory, loaded and stored
/// once a chunk (at least); S is f32, P 16-bit; K and V come from device memory.
fn rows_of_eight(name: &str) -> Figures {
    let (d, keys, groups, rows, len) = (512.0, 64.0, 8.0, 8.0, LEN as f64);
    let o = d * 2.0 / keys;
    Figures {
        name: name.into(),
        shared: 28_672,
        o_registers: 16,
        multiplies: 2.0 * d / 512.0,
        shared_read: groups * d * 2.0 / keys + 4.0 + groups * 2.0 + o,
        shared_written: 4.0 + 2.0 + o + d * 2.0 / len,
        device_read: 2.0 * d * 2.0 / rows + d * 2.0 / len,
        // S, P and O each pass from some simdgroups to others.
        barriers: 1000.0 * 3.0 / (rows * keys),
    }
}

fn print(f: &Figures) {
    println!(
        "| {} | {} | {} | {:.2} | {:.1} | {:.1} | {:.1} | {:.2} |",
        f.name,
        f.shared,
        f.o_registers,
        f.multiplies,
        f.shared_read,
        f.shared_written,
        f.device_read,
        f.barriers
    );
}
