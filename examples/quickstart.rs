//! Causal attention with grouped heads, and its log-sum-exp.
//!
//! ```sh
//! cargo run --release --example quickstart
//! ```
#![allow(clippy::print_stdout)]

use half::bf16;
use mlx_flash_attn::attention::{Problem, Shape};
use mlx_flash_attn::ops::{self, Operands};
use mlx_flash_attn::{DType, MlxDevice};

fn main() -> mlx_flash_attn::Result<()> {
    // What is asked, checked once: 8 query heads share 2 key/value heads.
    let shape = Shape {
        batch: 1,
        heads: 8,
        kv_heads: 2,
        query_len: 256,
        key_len: 256,
        qk_dim: 64,
        v_dim: 64,
    };
    let problem = Problem::builder(DType::BF16, shape)
        .causal(true)
        .lse(true)
        .build()?;

    // Metal, else CUDA, else the CPU; `MLX_FLASH_DEVICE` chooses another.
    let device = MlxDevice::new()?;
    let operand = |heads: usize, phase: f32| {
        let n = heads * 256 * 64;
        let data: Vec<bf16> = (0..n)
            .map(|i| bf16::from_f32((i as f32 * 0.61 + phase).sin()))
            .collect();
        device.buffer_from_slice(&data, DType::BF16, vec![1, heads, 256, 64])
    };
    let (q, k, v) = (operand(8, 0.0)?, operand(2, 1.0)?, operand(2, 2.0)?);
    let out = device.alloc_buffer(q.byte_len(), DType::BF16, vec![1, 8, 256, 64])?;
    let lse = device.alloc_buffer(8 * 256 * 4, DType::F32, vec![1, 8, 256])?;

    let mut encoder = device.command_encoder()?;
    let operands = Operands {
        lse: Some(&lse),
        ..Operands::new(&q, &k, &v, &out)
    };
    ops::attention(&mut encoder, &problem, &operands)?;
    let (start, end) = encoder.commit_wait_with_gpu_time()?;

    println!("{}: {:.2} ms", device.name(), (end - start) * 1e3);
    let (o, lse) = (out.as_slice::<bf16>()?, lse.as_slice::<f32>()?);
    println!("head 0, last row: {:?} ...", &o[255 * 64..255 * 64 + 4]);
    println!("its log-sum-exp: {:.4}", lse[255]);
    // Row 0 sees key 0 alone, so it is V's row 0.
    assert_eq!(o[..64], v.as_slice::<bf16>()?[..64]);
    Ok(())
}
