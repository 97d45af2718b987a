//! Programs as one writes them for version 0.6.3 of the crate `mlx-native`, with the dependency renamed:
//! its names, signatures and habits (`&mut out`, encode now and commit later), and results that are
//! right. What is imported as `mlx_native::` is there in 0.6.3, too: names of the crate root, and of the
//! modules in `ops`. What is imported as `mlx_flash_attn::` belongs to the test, not to the program.
//!
//! `main` has a layer's prefill and decode steps, `kernels` every prefill dispatcher, `names` what else
//! such a program can name. `later` has the names of version 0.15.16 that this crate has beside them. What
//! either version has and this crate has not stands in `docs/guide.md`.
#![allow(clippy::unwrap_used, clippy::panic)]
// The original takes `&mut out`, and programs pass it.
#![allow(clippy::unnecessary_mut_passed)]

mod call;
#[path = "../common/mod.rs"]
mod common;
mod kernels;
mod later;
mod names;

use common::{Plain, Qkv, assert_close, seen, shape};
use half::bf16;
use mlx_flash_attn as mlx_native;
use mlx_native::ops::flash_attn_prefill::{
    self, FlashAttnPrefillParams, dispatch_flash_attn_prefill_bf16_d256_with_blk,
};
use mlx_native::ops::flash_attn_prefill_blk::{
    self, BlkParams, alloc_blk_buffer, blk_buffer_byte_len, dispatch_flash_attn_prefill_blk,
};
use mlx_native::ops::flash_attn_prefill_d512;
use mlx_native::ops::flash_attn_prefill_mask::{
    self, K_FILL_BF16, SdpaMaskParams, build_sdpa_mask_bf16,
};
use mlx_native::ops::flash_attn_vec::{self, FlashAttnVecParams, flash_attn_vec, tmp_buffer_bytes};
use mlx_native::{DType, KernelRegistry, MlxBuffer, MlxDevice, Result};

fn registry() -> KernelRegistry {
    let mut registry = KernelRegistry::new();
    let known = registry.source_count();
    flash_attn_prefill::register(&mut registry);
    flash_attn_prefill_d512::register(&mut registry);
    flash_attn_prefill_mask::register(&mut registry);
    flash_attn_prefill_blk::register(&mut registry);
    flash_attn_vec::register(&mut registry);
    assert_eq!(registry.source_count(), known, "all of them were known");
    registry
}

#[test]
fn a_layer_of_a_gemma_like_model() -> Result<()> {
    let device = MlxDevice::new()?;
    assert!(!device.name().is_empty());
    let mut registry = registry();
    let (n_heads, n_kv_heads, seq_len, head_dim) = (4u32, 2u32, 45u32, 256u32);
    let data = Qkv::new(50, DType::BF16, shape([1, 4, 2], (45, 45), 256));

    let alloc = |heads: u32| -> Result<MlxBuffer> {
        let shape = [1, heads, seq_len, head_dim].map(|n| n as usize);
        device.alloc_buffer(
            shape.iter().product::<usize>() * 2,
            DType::BF16,
            shape.to_vec(),
        )
    };
    let fill = |buffer: &mut MlxBuffer, values: &[f32]| -> Result<()> {
        let slice: &mut [bf16] = buffer.as_mut_slice()?;
        slice
            .iter_mut()
            .zip(values)
            .for_each(|(to, x)| *to = bf16::from_f32(*x));
        Ok(())
    };
    let (mut q, mut k, mut v) = (alloc(n_heads)?, alloc(n_kv_heads)?, alloc(n_kv_heads)?);
    let mut out = alloc(n_heads)?;
    fill(&mut q, &data.q)?;
    fill(&mut k, &data.k)?;
    fill(&mut v, &data.v)?;
    assert_eq!(q.element_count() * 2, q.byte_len());
    assert_eq!((q.dtype(), q.byte_offset()), (DType::BF16, 0));
    assert!(!q.contents_ptr().is_null());

    let mut encoder = device.command_encoder()?;
    let mask = build_sdpa_mask_bf16(
        &device,
        &mut registry,
        &mut encoder,
        &SdpaMaskParams {
            seq_len_q: seq_len,
            seq_len_k: seq_len,
            window_size: Some(16),
            causal: true,
            q_abs_offset: 0,
        },
    )?;
    assert_eq!(
        (mask.byte_len(), mask.shape()),
        (45 * 45 * 2, &[45, 45][..])
    );
    let blk_params = BlkParams {
        seq_len_q: seq_len,
        seq_len_k: seq_len,
        bq: 32,
        bk: 16,
    };
    let blk = alloc_blk_buffer(&device, &blk_params)?;
    assert_eq!(
        (blk.shape(), blk_buffer_byte_len(&blk_params)?),
        (&[2, 3][..], 32)
    );
    dispatch_flash_attn_prefill_blk(
        &mut encoder,
        &device,
        &mut registry,
        &mask,
        &blk,
        &blk_params,
    )?;
    encoder.memory_barrier();
    let params = FlashAttnPrefillParams {
        n_heads,
        n_kv_heads,
        head_dim,
        seq_len_q: seq_len,
        seq_len_k: seq_len,
        batch: 1,
        scale: 1.0 / (head_dim as f32).sqrt(),
        do_causal: false,
    };
    dispatch_flash_attn_prefill_bf16_d256_with_blk(
        &mut encoder,
        &device,
        &mut registry,
        &q,
        &k,
        &v,
        Some(&mask),
        Some(&blk),
        &mut out,
        &params,
    )?;
    encoder.commit_and_wait()?;

    let got: Vec<f32> = out.as_slice::<bf16>()?.iter().map(|x| x.to_f32()).collect();
    let want = data.plain(&Plain::new(&|_, i, j| seen(j <= i && i - j < 16)));
    assert_close("layer", &got, &want, DType::BF16);
    assert!(registry.is_cached(K_FILL_BF16));
    Ok(())
}

#[test]
fn decode_steps_over_a_growing_cache() -> Result<()> {
    let device = MlxDevice::new()?;
    let mut registry = registry();
    let (heads, kv_heads, dim, capacity) = (4usize, 2usize, 256usize, 12usize);
    let tmp_bytes = tmp_buffer_bytes(heads as u32, dim as u32);
    assert_eq!(tmp_bytes, heads * 32 * (dim + 2) * 4);
    let tmp = device.alloc_buffer(tmp_bytes, DType::F32, vec![tmp_bytes / 4])?;
    let (k, v) = (
        common::normal(2, kv_heads * capacity * dim, DType::F16),
        common::normal(3, kv_heads * capacity * dim, DType::F16),
    );
    for kv_dtype in [DType::F32, DType::F16] {
        let [kb, vb] =
            [&k, &v].map(|x| common::upload(&device, x, kv_dtype, &[kv_heads, capacity, dim]));
        for len in 1..=capacity {
            let q = common::normal(len as u64, heads * dim, DType::F32);
            let qb = common::upload(&device, &q, DType::F32, &[heads, dim]);
            let mut out = device.alloc_buffer(heads * dim * 4, DType::F32, vec![heads, dim])?;
            for (mask_type, sliding_window) in [(0, 0), (1, 0), (2, 5), (2, 0)] {
                let params = FlashAttnVecParams {
                    num_heads: heads as u32,
                    num_kv_heads: kv_heads as u32,
                    head_dim: dim as u32,
                    kv_seq_len: len as u32,
                    kv_capacity: capacity as u32,
                    scale: 1.0 / (dim as f32).sqrt(),
                    mask_type,
                    sliding_window,
                    softcap: 0.0,
                };
                let mut encoder = device.command_encoder()?;
                flash_attn_vec(
                    &mut encoder,
                    &mut registry,
                    &device,
                    &qb,
                    &kb,
                    &vb,
                    &mut out,
                    &tmp,
                    &params,
                )?;
                let (start, end) = encoder.commit_wait_with_gpu_time()?;
                assert!(start <= end);
                let valid = |x: &[f32]| -> Vec<f32> {
                    x.chunks(capacity * dim)
                        .flat_map(|h| h[..len * dim].to_vec())
                        .collect()
                };
                let data = Qkv {
                    dtype: DType::F32,
                    shape: shape([1, heads, kv_heads], (1, len), dim),
                    q: q.clone(),
                    k: valid(&k),
                    v: valid(&v),
                };
                let first = match sliding_window {
                    0 => 0,
                    w => len.saturating_sub(w as usize),
                };
                let want = data.plain(&Plain::new(&|_, _, j| seen(j >= first)));
                let what = format!("{kv_dtype} step {len} mask {mask_type} {sliding_window}");
                assert_close(&what, out.as_slice()?, &want, DType::F32);
            }
        }
    }
    Ok(())
}
