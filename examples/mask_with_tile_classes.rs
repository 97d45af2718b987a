//! The seed's pipeline of a windowed layer: fill a mask on the device, classify its tiles, and let
//! prefill skip those that are wholly masked. The bits are the same as without the classes.
//!
//! ```sh
//! cargo run --release --example mask_with_tile_classes
//! ```
#![allow(clippy::print_stdout)]

use half::bf16;
use mlx_flash_attn::ops::flash_attn_prefill::{
    FlashAttnPrefillParams, dispatch_flash_attn_prefill_bf16_d256_with_blk,
};
use mlx_flash_attn::ops::flash_attn_prefill_blk::{
    BlkParams, alloc_blk_buffer, dispatch_flash_attn_prefill_blk,
};
use mlx_flash_attn::ops::flash_attn_prefill_mask::{SdpaMaskParams, build_sdpa_mask_bf16};
use mlx_flash_attn::{DType, KernelRegistry, MlxDevice, Result};

const LEN: u32 = 300;
const DIM: usize = 256;

fn main() -> Result<()> {
    let device = MlxDevice::new()?;
    let mut registry = KernelRegistry::new();
    let mut encoder = device.command_encoder()?;

    let window = SdpaMaskParams {
        seq_len_q: LEN,
        seq_len_k: LEN,
        window_size: Some(64),
        causal: true,
        q_abs_offset: 0,
    };
    let mask = build_sdpa_mask_bf16(&device, &mut registry, &mut encoder, &window)?;

    // 32 x 16 is the tile of every head dim up to 256.
    let tiles = BlkParams {
        seq_len_q: LEN,
        seq_len_k: LEN,
        bq: 32,
        bk: 16,
    };
    let blk = alloc_blk_buffer(&device, &tiles)?;
    dispatch_flash_attn_prefill_blk(&mut encoder, &device, &mut registry, &mask, &blk, &tiles)?;

    let params = FlashAttnPrefillParams {
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: DIM as u32,
        seq_len_q: LEN,
        seq_len_k: LEN,
        batch: 1,
        scale: 1.0 / (DIM as f32).sqrt(),
        do_causal: false,
    };
    let operand = |heads: usize, phase: f32| {
        let n = heads * LEN as usize * DIM;
        let data: Vec<bf16> = (0..n)
            .map(|i| bf16::from_f32((i as f32 * 0.29 + phase).sin()))
            .collect();
        device.buffer_from_slice(&data, DType::BF16, vec![1, heads, LEN as usize, DIM])
    };
    let (q, k, v) = (operand(2, 0.0)?, operand(1, 1.0)?, operand(1, 2.0)?);
    let new_out = || device.alloc_buffer(q.byte_len(), DType::BF16, q.shape().to_vec());
    let (with, without) = (new_out()?, new_out()?);

    // One command for everything: the encoder finds by itself what has to wait for what.
    for (blk, out) in [(Some(&blk), &with), (None, &without)] {
        dispatch_flash_attn_prefill_bf16_d256_with_blk(
            &mut encoder,
            &device,
            &mut registry,
            &q,
            &k,
            &v,
            Some(&mask),
            blk,
            out,
            &params,
        )?;
    }
    encoder.commit_and_wait()?;

    let tiles = blk.shape().iter().product();
    let classes = &blk.as_slice::<u8>()?[..tiles];
    let count = |class: u8| classes.iter().filter(|c| **c == class).count();
    println!(
        "{tiles} tiles: {} skipped, {} masked, {} free",
        count(0),
        count(1),
        count(2)
    );
    assert_eq!(with.as_slice::<u8>()?, without.as_slice::<u8>()?);
    println!("the same bits with and without the classes");
    Ok(())
}
