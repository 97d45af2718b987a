//! A program as one writes it for the crate `mlx-native`, with the dependency renamed: its names,
//! signatures and habits (`&mut out`, encode now and commit later), and results that are right.
//! Every kernel of that crate runs here.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use common::{Plain, Qkv, assert_close, seen, shape};
use half::bf16;
use mlx_flash_attn as mlx_native;
use mlx_native::encoder::{CapturedOpKind, KernelArg, MTLSize, as_bytes};
use mlx_native::ops::flash_attn_prefill::{
    self, AttnMaskParamsGpu, AttnParamsGpu, FlashAttnPrefillLayout, FlashAttnPrefillParams,
    dispatch_flash_attn_prefill_bf16_d64, dispatch_flash_attn_prefill_bf16_d64_boolmask,
    dispatch_flash_attn_prefill_bf16_d256, dispatch_flash_attn_prefill_bf16_d256_boolmask,
    dispatch_flash_attn_prefill_bf16_d256_with_blk, dispatch_flash_attn_prefill_f16_d64,
    dispatch_flash_attn_prefill_f16_d64_boolmask, dispatch_flash_attn_prefill_f16_d256,
    dispatch_flash_attn_prefill_f16_d256_boolmask, dispatch_flash_attn_prefill_f16_d256_with_blk,
};
use mlx_native::ops::flash_attn_prefill_blk::{
    self, BlkParams, alloc_blk_buffer, blk_buffer_byte_len, dispatch_flash_attn_prefill_blk,
};
use mlx_native::ops::flash_attn_prefill_d512::{
    self, FC_IDX_NSG, NCPSG_D512, NQPSG_D512, NSG_D512, dispatch_flash_attn_prefill_bf16_d512,
    dispatch_flash_attn_prefill_bf16_d512_boolmask, dispatch_flash_attn_prefill_bf16_d512_with_blk,
    dispatch_flash_attn_prefill_bf16_d512_with_nsg,
    dispatch_flash_attn_prefill_bf16_d512_with_nsg_and_blk, dispatch_flash_attn_prefill_f16_d512,
    dispatch_flash_attn_prefill_f16_d512_boolmask,
    dispatch_flash_attn_prefill_f16_d512_with_nsg_and_blk,
};
use mlx_native::ops::flash_attn_prefill_mask::{
    self, K_FILL_BF16, SdpaMaskParams, build_sdpa_mask_bf16,
};
use mlx_native::ops::flash_attn_vec::{self, FlashAttnVecParams, flash_attn_vec, tmp_buffer_bytes};
use mlx_native::{DType, KernelRegistry, MlxBuffer, MlxDevice, Result};

type Encoder = mlx_native::CommandEncoder;

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

/// How a kernel is called, for the table below.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mask {
    None,
    /// `[qL, kL]`, in Q's dtype or of booleans.
    Plane,
    /// `[B, H, qL, kL]`.
    PerHead,
}

/// Runs one call of every kind that a dispatcher allows, and holds each against plain attention.
fn check(
    what: &str,
    dtype: DType,
    dim: usize,
    bools: bool,
    kinds: &[Mask],
    seq_major: bool,
    call: &dyn Fn(&mut Encoder, &MlxDevice, &mut KernelRegistry, Call<'_>) -> Result<()>,
) {
    for device in common::devices() {
        for (mask, causal) in kinds.iter().flat_map(|m| [false, true].map(|c| (*m, c))) {
            let (batch, heads, kv_heads, ql, kl) = (1, 4, 2, 37, 45);
            let data = Qkv::new(60, dtype, shape([batch, heads, kv_heads], (ql, kl), dim));
            let visible = |h: usize, i: usize, j: usize| {
                let h = if mask == Mask::PerHead { h } else { 0 };
                mask == Mask::None || (h + 2 * i + 3 * j) % 5 < 3
            };
            let planes = if mask == Mask::PerHead { heads } else { 1 };
            let cells: Vec<f32> = (0..planes * ql * kl)
                .map(|c| {
                    let seen = visible(c / (ql * kl), c / kl % ql, c % kl);
                    match (bools, seen) {
                        (true, seen) => f32::from(u8::from(seen)),
                        (false, true) => 0.0,
                        (false, false) => f32::NEG_INFINITY,
                    }
                })
                .collect();
            let mask_dtype = if bools { DType::U8 } else { dtype };
            let rank = match mask {
                Mask::PerHead => vec![batch, heads, ql, kl],
                _ => vec![ql, kl],
            };
            let mask_buffer =
                (mask != Mask::None).then(|| common::upload(&device, &cells, mask_dtype, &rank));
            let swap = |x: &[f32], heads: usize, len: usize| -> Vec<f32> {
                if !seq_major {
                    return x.to_vec();
                }
                (0..len * heads)
                    .flat_map(|n| x[(n % heads * len + n / heads) * dim..][..dim].to_vec())
                    .collect()
            };
            let moved = Qkv {
                q: swap(&data.q, heads, ql),
                k: swap(&data.k, kv_heads, kl),
                v: swap(&data.v, kv_heads, kl),
                ..data
            };
            let [q, k, v, mut out] = moved.buffers(&device);
            let params = FlashAttnPrefillParams {
                n_heads: heads as u32,
                n_kv_heads: kv_heads as u32,
                head_dim: dim as u32,
                seq_len_q: ql as u32,
                seq_len_k: kl as u32,
                batch: batch as u32,
                scale: 1.0 / (dim as f32).sqrt(),
                do_causal: causal,
            };
            let mut encoder = device.command_encoder().unwrap();
            let mut registry = registry();
            let args = Call {
                q: &q,
                k: &k,
                v: &v,
                mask: mask_buffer.as_ref(),
                out: &mut out,
                params: &params,
            };
            call(&mut encoder, &device, &mut registry, args)
                .unwrap_or_else(|error| panic!("{what} {mask:?} causal {causal}: {error}"));
            encoder.commit_and_wait().unwrap();
            let want = data_of(&data.shape, dtype).plain(&Plain::new(&|h, i, j| {
                seen(visible(h, i, j) && (!causal || j <= i))
            }));
            let want: Vec<f64> = {
                let want: Vec<f32> = want.iter().map(|x| *x as f32).collect();
                swap(&want, heads, ql)
                    .iter()
                    .map(|x| f64::from(*x))
                    .collect()
            };
            let what = format!("{what} {mask:?} causal {causal}");
            assert_close(&what, &common::download(&out), &want, dtype);
        }
    }
}

fn data_of(shape: &mlx_native::attention::Shape, dtype: DType) -> Qkv {
    Qkv::new(60, dtype, *shape)
}

struct Call<'a> {
    q: &'a MlxBuffer,
    k: &'a MlxBuffer,
    v: &'a MlxBuffer,
    mask: Option<&'a MlxBuffer>,
    out: &'a mut MlxBuffer,
    params: &'a FlashAttnPrefillParams,
}

const ALL: [Mask; 3] = [Mask::None, Mask::Plane, Mask::PerHead];

#[test]
fn head_dim_64_in_both_layouts() {
    type Dispatch = fn(
        &mut Encoder,
        &MlxDevice,
        &mut KernelRegistry,
        &MlxBuffer,
        &MlxBuffer,
        &MlxBuffer,
        Option<&MlxBuffer>,
        &MlxBuffer,
        &FlashAttnPrefillParams,
        FlashAttnPrefillLayout,
    ) -> Result<()>;
    let table: [(DType, bool, Dispatch); 4] = [
        (DType::BF16, false, dispatch_flash_attn_prefill_bf16_d64),
        (
            DType::BF16,
            true,
            dispatch_flash_attn_prefill_bf16_d64_boolmask,
        ),
        (DType::F16, false, dispatch_flash_attn_prefill_f16_d64),
        (
            DType::F16,
            true,
            dispatch_flash_attn_prefill_f16_d64_boolmask,
        ),
    ];
    for (dtype, bools, dispatch) in table {
        for (layout, seq_major) in [
            (FlashAttnPrefillLayout::HeadMajor, false),
            (FlashAttnPrefillLayout::SeqMajor, true),
        ] {
            let what = format!("d64 {dtype} bools {bools} {layout:?}");
            check(&what, dtype, 64, bools, &ALL, seq_major, &|e, d, r, c| {
                dispatch(e, d, r, c.q, c.k, c.v, c.mask, c.out, c.params, layout)
            });
        }
    }
}

#[test]
fn head_dims_256_and_512() {
    type Dispatch = fn(
        &mut Encoder,
        &MlxDevice,
        &mut KernelRegistry,
        &MlxBuffer,
        &MlxBuffer,
        &MlxBuffer,
        Option<&MlxBuffer>,
        &MlxBuffer,
        &FlashAttnPrefillParams,
    ) -> Result<()>;
    let table: [(DType, usize, bool, Dispatch); 8] = [
        (
            DType::BF16,
            256,
            false,
            dispatch_flash_attn_prefill_bf16_d256,
        ),
        (
            DType::BF16,
            256,
            true,
            dispatch_flash_attn_prefill_bf16_d256_boolmask,
        ),
        (DType::F16, 256, false, dispatch_flash_attn_prefill_f16_d256),
        (
            DType::F16,
            256,
            true,
            dispatch_flash_attn_prefill_f16_d256_boolmask,
        ),
        (
            DType::BF16,
            512,
            false,
            dispatch_flash_attn_prefill_bf16_d512,
        ),
        (
            DType::BF16,
            512,
            true,
            dispatch_flash_attn_prefill_bf16_d512_boolmask,
        ),
        (DType::F16, 512, false, dispatch_flash_attn_prefill_f16_d512),
        (
            DType::F16,
            512,
            true,
            dispatch_flash_attn_prefill_f16_d512_boolmask,
        ),
    ];
    for (dtype, dim, bools, dispatch) in table {
        let what = format!("d{dim} {dtype} bools {bools}");
        check(&what, dtype, dim, bools, &ALL, false, &|e, d, r, c| {
            dispatch(e, d, r, c.q, c.k, c.v, c.mask, c.out, c.params)
        });
    }
    for nsg in [4, 8] {
        check(
            "nsg",
            DType::BF16,
            512,
            false,
            &ALL,
            false,
            &|e, d, r, c| {
                dispatch_flash_attn_prefill_bf16_d512_with_nsg(
                    e, d, r, c.q, c.k, c.v, c.mask, c.out, c.params, nsg,
                )
            },
        );
        check("nsg", DType::F16, 512, false, &ALL, false, &|e, d, r, c| {
            dispatch_flash_attn_prefill_f16_d512_with_nsg_and_blk(
                e, d, r, c.q, c.k, c.v, c.mask, None, c.out, c.params, nsg,
            )
        });
    }
}

/// Tile classes of the call's mask, from the pre-pass on the same encoder.
fn classes(
    encoder: &mut Encoder,
    device: &MlxDevice,
    registry: &mut KernelRegistry,
    call: &Call<'_>,
) -> Result<Option<MlxBuffer>> {
    let Some(mask) = call.mask else {
        return Ok(None);
    };
    let wide = call.params.head_dim == 512;
    let params = BlkParams {
        seq_len_q: call.params.seq_len_q,
        seq_len_k: call.params.seq_len_k,
        bq: if wide { NQPSG_D512 } else { 32 },
        bk: if wide { NCPSG_D512 } else { 16 },
    };
    let blk = alloc_blk_buffer(device, &params)?;
    dispatch_flash_attn_prefill_blk(encoder, device, registry, mask, &blk, &params)?;
    Ok(Some(blk))
}

#[test]
fn tile_classes_at_256_and_512() {
    let kinds = [Mask::None, Mask::Plane];
    check(
        "blk",
        DType::BF16,
        256,
        false,
        &kinds,
        false,
        &|e, d, r, c| {
            let blk = classes(e, d, r, &c)?;
            let blk = blk.as_ref();
            dispatch_flash_attn_prefill_bf16_d256_with_blk(
                e, d, r, c.q, c.k, c.v, c.mask, blk, c.out, c.params,
            )
        },
    );
    check(
        "blk",
        DType::BF16,
        512,
        false,
        &kinds,
        false,
        &|e, d, r, c| {
            let blk = classes(e, d, r, &c)?;
            let blk = blk.as_ref();
            dispatch_flash_attn_prefill_bf16_d512_with_blk(
                e, d, r, c.q, c.k, c.v, c.mask, blk, c.out, c.params,
            )
        },
    );
    check(
        "blk",
        DType::BF16,
        512,
        false,
        &kinds,
        false,
        &|e, d, r, c| {
            let blk = classes(e, d, r, &c)?;
            let blk = blk.as_ref();
            dispatch_flash_attn_prefill_bf16_d512_with_nsg_and_blk(
                e, d, r, c.q, c.k, c.v, c.mask, blk, c.out, c.params, 4,
            )
        },
    );
    // The pre-pass reads bf16 masks; classes go with any mask that says the same.
    check(
        "blk",
        DType::F16,
        256,
        false,
        &kinds,
        false,
        &|e, d, r, c| {
            let twin = c.mask.map(|mask| {
                let cells = common::download(mask);
                common::upload(d, &cells, DType::BF16, mask.shape())
            });
            let blk = classes(
                e,
                d,
                r,
                &Call {
                    mask: twin.as_ref(),
                    out: c.out,
                    ..c
                },
            )?;
            let blk = blk.as_ref();
            dispatch_flash_attn_prefill_f16_d256_with_blk(
                e, d, r, c.q, c.k, c.v, c.mask, blk, c.out, c.params,
            )
        },
    );
}

/// The four kernels that have a name but no dispatcher, encoded by hand as the crate's own
/// dispatchers do it.
#[test]
fn head_dim_512_encoded_by_name() {
    for (name, dtype, bools) in [
        ("flash_attn_prefill_bf16_d512", DType::BF16, false),
        ("flash_attn_prefill_bf16_d512_boolmask", DType::BF16, true),
        ("flash_attn_prefill_f16_d512", DType::F16, false),
        ("flash_attn_prefill_f16_d512_boolmask", DType::F16, true),
    ] {
        check(
            name,
            dtype,
            512,
            bools,
            &[Mask::Plane],
            false,
            &|e, d, r, c| {
                let p = c.params;
                let (h, hkv) = (i64::from(p.n_heads), i64::from(p.n_kv_heads));
                let (ql, kl, dim) = (
                    i64::from(p.seq_len_q),
                    i64::from(p.seq_len_k),
                    i64::from(p.head_dim),
                );
                let (bq, bk) = (NQPSG_D512, NCPSG_D512);
                let q_strides = [h * ql * dim, ql * dim, dim];
                let k_strides = [hkv * kl * dim, kl * dim, dim];
                let params = AttnParamsGpu {
                    b: p.batch as i32,
                    h: p.n_heads as i32,
                    d: p.head_dim as i32,
                    ql: p.seq_len_q as i32,
                    kl: p.seq_len_k as i32,
                    gqa_factor: (p.n_heads / p.n_kv_heads) as i32,
                    scale: p.scale,
                    softcapping: 1.0,
                    nq: p.seq_len_q.div_ceil(bq) as i32,
                    nk: p.seq_len_k.div_ceil(bk) as i32,
                    nq_aligned: (p.seq_len_q / bq) as i32,
                    nk_aligned: (p.seq_len_k / bk) as i32,
                    ql_rem: (p.seq_len_q % bq) as i32,
                    kl_rem: (p.seq_len_k % bk) as i32,
                    ql_off: 0,
                    _pad: 0,
                    q_strides,
                    k_strides,
                    v_strides: k_strides,
                    o_strides: q_strides,
                };
                let mask_params = AttnMaskParamsGpu {
                    m_strides: [0, 0, kl],
                };
                let pipeline = r.get_pipeline_with_constants(
                    name,
                    d.metal_device(),
                    &[
                        (200, p.seq_len_q.is_multiple_of(bq)),
                        (201, p.seq_len_k.is_multiple_of(bk)),
                        (300, true),
                        (301, p.do_causal),
                        (303, false),
                    ],
                    &[(FC_IDX_NSG, NSG_D512 as i32)],
                )?;
                e.set_op_kind(CapturedOpKind::Sdpa);
                e.encode_threadgroups_with_args(
                    pipeline,
                    &[
                        (0, KernelArg::Buffer(c.q)),
                        (1, KernelArg::BufferWithOffset(c.k, 0)),
                        (2, KernelArg::Buffer(c.v)),
                        (3, KernelArg::Buffer(c.out)),
                        (4, KernelArg::Bytes(as_bytes(&params))),
                        (5, KernelArg::Bytes(as_bytes(&mask_params))),
                        (6, KernelArg::Buffer(c.mask.unwrap())),
                    ],
                    MTLSize::new(
                        u64::from(p.seq_len_q.div_ceil(bq)),
                        u64::from(p.n_heads),
                        u64::from(p.batch),
                    ),
                    MTLSize::new(32, u64::from(NSG_D512), 1),
                );
                Ok(())
            },
        );
    }
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
