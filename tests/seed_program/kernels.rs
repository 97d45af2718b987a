//! Every prefill dispatcher in every way it can be called, and the kernels of head dim 512 that have a
//! name alone.

use mlx_flash_attn as mlx_native;
use mlx_flash_attn::DeviceKind;
use mlx_flash_attn::attention::Shape;
use mlx_native::ops::encode_helpers::as_bytes;
use mlx_native::ops::flash_attn_prefill::{
    AttnMaskParamsGpu, AttnParamsGpu, FlashAttnPrefillLayout, FlashAttnPrefillParams,
    dispatch_flash_attn_prefill_bf16_d64, dispatch_flash_attn_prefill_bf16_d64_boolmask,
    dispatch_flash_attn_prefill_bf16_d256, dispatch_flash_attn_prefill_bf16_d256_boolmask,
    dispatch_flash_attn_prefill_bf16_d256_with_blk, dispatch_flash_attn_prefill_f16_d64,
    dispatch_flash_attn_prefill_f16_d64_boolmask, dispatch_flash_attn_prefill_f16_d256,
    dispatch_flash_attn_prefill_f16_d256_boolmask, dispatch_flash_attn_prefill_f16_d256_with_blk,
};
use mlx_native::ops::flash_attn_prefill_blk::{
    BlkParams, alloc_blk_buffer, dispatch_flash_attn_prefill_blk,
};
use mlx_native::ops::flash_attn_prefill_d512::{
    FC_IDX_NSG, NCPSG_D512, NQPSG_D512, NSG_D512, dispatch_flash_attn_prefill_bf16_d512,
    dispatch_flash_attn_prefill_bf16_d512_boolmask, dispatch_flash_attn_prefill_bf16_d512_with_blk,
    dispatch_flash_attn_prefill_bf16_d512_with_nsg,
    dispatch_flash_attn_prefill_bf16_d512_with_nsg_and_blk, dispatch_flash_attn_prefill_f16_d512,
    dispatch_flash_attn_prefill_f16_d512_boolmask,
    dispatch_flash_attn_prefill_f16_d512_with_nsg_and_blk,
};
use mlx_native::{DType, KernelArg, KernelRegistry, MTLSize, MlxBuffer, MlxDevice, Result};

use crate::common::{self, Plain, Qkv, assert_close, seen, shape};
use crate::registry;

type Encoder = mlx_native::CommandEncoder;

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

fn data_of(shape: &Shape, dtype: DType) -> Qkv {
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

/// The four kernels that have a name but no dispatcher, encoded by hand: with the original's tile of 8x8
/// and 32 threads, which the CPU and CUDA take, or where this crate's Metal text runs with its own tile.
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
                let (bq, bk, simdgroups) = match d.kind() {
                    DeviceKind::Cpu | DeviceKind::Cuda => (8, 8, 1),
                    _ => (NQPSG_D512, NCPSG_D512, NSG_D512),
                };
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
                    match simdgroups {
                        1 => &[],
                        _ => &[(FC_IDX_NSG, NSG_D512 as i32)],
                    },
                )?;
                e.encode_threadgroups_with_args(
                    pipeline,
                    &[
                        (0, KernelArg::Buffer(c.q)),
                        (1, KernelArg::Buffer(c.k)),
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
                    MTLSize::new(32, u64::from(simdgroups), 1),
                );
                Ok(())
            },
        );
    }
}
