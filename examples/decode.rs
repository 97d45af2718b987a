//! Decoding: one query a step over a growing key/value cache with room to spare.
//!
//! ```sh
//! cargo run --release --example decode
//! ```
#![allow(clippy::print_stdout)]

use half::f16;
use mlx_flash_attn::ops::flash_attn_vec::{FlashAttnVecParams, flash_attn_vec, tmp_buffer_bytes};
use mlx_flash_attn::{DType, KernelRegistry, MlxDevice, Result};

const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const DIM: usize = 128;
const CAPACITY: usize = 64;

fn main() -> Result<()> {
    let device = MlxDevice::new()?;
    let mut registry = KernelRegistry::new();
    let cache = || {
        let bytes = KV_HEADS * CAPACITY * DIM * 2;
        device.alloc_buffer(bytes, DType::F16, vec![KV_HEADS, CAPACITY, DIM])
    };
    let (k, v) = (cache()?, cache()?);
    let tmp_bytes = tmp_buffer_bytes(HEADS as u32, DIM as u32);
    let tmp = device.alloc_buffer(tmp_bytes, DType::F32, vec![tmp_bytes / 4])?;
    let out = device.alloc_buffer(HEADS * DIM * 4, DType::F32, vec![HEADS, DIM])?;

    for step in 0..8 {
        // The new token's key and value go behind the others; rows past them are never read.
        for (cache, phase) in [(&k, 1.0), (&v, 2.0)] {
            let mut rows = cache.write::<f16>()?;
            for head in 0..KV_HEADS {
                let start = (head * CAPACITY + step) * DIM;
                for (d, x) in rows[start..start + DIM].iter_mut().enumerate() {
                    *x = f16::from_f32(((step * 31 + head * 7 + d) as f32 * 0.17 + phase).sin());
                }
            }
        }
        let query: Vec<f32> = (0..HEADS * DIM)
            .map(|i| ((i + step) as f32 * 0.23).sin())
            .collect();
        let q = device.buffer_from_slice(&query, DType::F32, vec![HEADS, DIM])?;

        let params = FlashAttnVecParams {
            num_heads: HEADS as u32,
            num_kv_heads: KV_HEADS as u32,
            head_dim: DIM as u32,
            kv_seq_len: step as u32 + 1,
            kv_capacity: CAPACITY as u32,
            scale: 1.0 / (DIM as f32).sqrt(),
            mask_type: 1,
            sliding_window: 0,
            softcap: 0.0,
        };
        let mut encoder = device.command_encoder()?;
        flash_attn_vec(
            &mut encoder,
            &mut registry,
            &device,
            &q,
            &k,
            &v,
            &out,
            &tmp,
            &params,
        )?;
        encoder.commit_and_wait()?;
        let o = out.read::<f32>()?;
        println!("step {step}: head 0 gives {:+.4} {:+.4} ...", o[0], o[1]);
        if step == 0 {
            // With one key, the result is its value.
            let first = v.read::<f16>()?[0].to_f32();
            assert!((o[0] - first).abs() < 1e-6);
        }
    }
    Ok(())
}
