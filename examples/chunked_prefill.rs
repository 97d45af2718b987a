//! Prefill in chunks: each chunk's queries attend to all keys so far, and the result is that of one
//! call over the whole prompt.
//!
//! ```sh
//! cargo run --release --example chunked_prefill
//! ```
#![allow(clippy::print_stdout)]

use half::bf16;
use mlx_flash_attn::attention::{Problem, QueryOffset, Shape};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, MlxDevice, Result};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const LEN: usize = 200;
const CHUNK: usize = 64;
const DIM: usize = 64;

fn shape(query_len: usize, key_len: usize) -> Shape {
    Shape {
        batch: 1,
        heads: HEADS,
        kv_heads: KV_HEADS,
        query_len,
        key_len,
        qk_dim: DIM,
        v_dim: DIM,
    }
}

fn main() -> Result<()> {
    let device = MlxDevice::new()?;
    let data = |heads: usize, phase: f32| -> Vec<bf16> {
        let value = |i: usize| bf16::from_f32((i as f32 * 0.47 + phase).sin());
        (0..heads * LEN * DIM).map(value).collect()
    };
    let queries = data(HEADS, 0.0);
    let buffer = |data: &[bf16], heads: usize, len: usize| {
        device.buffer_from_slice(data, DType::BF16, vec![1, heads, len, DIM])
    };
    // The cache has room for all keys from the start; a chunk sees those that are there.
    let k = buffer(&data(KV_HEADS, 1.0), KV_HEADS, LEN)?;
    let v = buffer(&data(KV_HEADS, 2.0), KV_HEADS, LEN)?;

    let attend = |problem: &Problem, q: &[bf16], len: usize| -> Result<Vec<bf16>> {
        let q = buffer(q, HEADS, len)?;
        let out = device.alloc_buffer(q.byte_len(), DType::BF16, q.shape().to_vec())?;
        let mut encoder = device.command_encoder()?;
        let operands = Operands::new(&q, &k, &v, &out);
        ops::attention(&mut encoder, problem, &operands)?;
        encoder.commit_and_wait()?;
        Ok(out.as_slice::<bf16>()?.to_vec())
    };

    let whole = Problem::builder(DType::BF16, shape(LEN, LEN))
        .causal(true)
        .build()?;
    let whole = attend(&whole, &queries, LEN)?;

    let mut largest: f32 = 0.0;
    for start in (0..LEN).step_by(CHUNK) {
        let end = (start + CHUNK).min(LEN);
        let rows = end - start;
        // The last query of the chunk sees the last key so far.
        let problem = Problem::builder(DType::BF16, shape(rows, end))
            .causal(true)
            .query_offset(QueryOffset::BottomRight)
            .key_capacity(LEN)
            .build()?;
        let of_chunk = |h: usize| (h * LEN + start) * DIM..(h * LEN + end) * DIM;
        let chunk: Vec<bf16> = (0..HEADS)
            .flat_map(|h| queries[of_chunk(h)].iter().copied())
            .collect();
        let out = attend(&problem, &chunk, rows)?;
        for h in 0..HEADS {
            let pairs = out[h * rows * DIM..].iter().zip(&whole[of_chunk(h)]);
            let error = pairs.map(|(a, b)| (a.to_f32() - b.to_f32()).abs());
            largest = error.fold(largest, f32::max);
        }
        println!("queries {start}..{end} over {end} keys");
    }
    println!("chunks and one call differ by at most {largest}");
    // The order of tiles may differ, so the last bit of a bf16 may.
    assert!(largest <= 0.01);
    Ok(())
}
