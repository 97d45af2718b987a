//! Three sequences of different lengths in one call, packed end to end without padding.
//!
//! ```sh
//! cargo run --release --example varlen
//! ```
#![allow(clippy::print_stdout)]

use half::bf16;
use mlx_flash_attn::attention::{Layout, Problem, Shape};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, MlxBuffer, MlxDevice, Result};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 64;

struct Engine {
    device: MlxDevice,
}

impl Engine {
    fn attend(&self, problem: &Problem, q: &[bf16], k: &[bf16], v: &[bf16]) -> Result<MlxBuffer> {
        let device = &self.device;
        let buffer = |data: &[bf16]| device.buffer_from_slice(data, DType::BF16, vec![data.len()]);
        let (q, k, v) = (buffer(q)?, buffer(k)?, buffer(v)?);
        let out = device.alloc_buffer(q.byte_len(), DType::BF16, q.shape().to_vec())?;
        let mut encoder = device.command_encoder()?;
        let operands = Operands::new(&q, &k, &v, &out);
        ops::attention(&mut encoder, problem, &operands)?;
        encoder.commit_and_wait()?;
        Ok(out)
    }
}

fn main() -> Result<()> {
    let engine = Engine {
        device: MlxDevice::new()?,
    };
    let lengths = [37, 5, 120];
    // Sequence b owns rows cu[b]..cu[b + 1] of the packed tensors [total, heads, D].
    let cu = [0u32, 37, 42, 162];
    let total = 162;
    let data = |heads: usize, phase: f32| -> Vec<bf16> {
        let value = |i: usize| bf16::from_f32((i as f32 * 0.53 + phase).sin());
        (0..total * heads * DIM).map(value).collect()
    };
    let (q, k, v) = (data(HEADS, 0.0), data(KV_HEADS, 1.0), data(KV_HEADS, 2.0));

    let problem = Problem::varlen(DType::BF16, HEADS, KV_HEADS, DIM, &cu, &cu)
        .causal(true)
        .build()?;
    let packed = engine.attend(&problem, &q, &k, &v)?;
    let packed = packed.as_slice::<bf16>()?;

    // Each sequence by itself gives the same.
    for (b, len) in lengths.into_iter().enumerate() {
        let shape = Shape {
            batch: 1,
            heads: HEADS,
            kv_heads: KV_HEADS,
            query_len: len,
            key_len: len,
            qk_dim: DIM,
            v_dim: DIM,
        };
        let single = Problem::builder(DType::BF16, shape)
            .layout(Layout::SeqMajor)
            .causal(true)
            .build()?;
        let start = cu[b] as usize;
        let rows = |heads: usize| start * heads * DIM..(start + len) * heads * DIM;
        let (own, own_kv) = (rows(HEADS), rows(KV_HEADS));
        let (q, k, v) = (&q[own.clone()], &k[own_kv.clone()], &v[own_kv]);
        let alone = engine.attend(&single, q, k, v)?;
        let error = largest_difference(alone.as_slice()?, &packed[own]);
        assert!(error <= 0.01, "sequence {b}: {error}");
        println!("sequence {b}: {len} tokens, packed and alone differ by at most {error}");
    }
    Ok(())
}

fn largest_difference(a: &[bf16], b: &[bf16]) -> f32 {
    a.iter()
        .zip(b)
        .map(|(a, b)| (a.to_f32() - b.to_f32()).abs())
        .fold(0.0, f32::max)
}
