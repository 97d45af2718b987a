//! Every prefill dispatcher in every way it can be called, and the kernels of head dim 512 that have a
//! name alone.

use mlx_flash_attn as mlx_native;
// Names of this crate's own, for kernels that 0.6.3 names without a dispatcher.
use mlx_flash_attn::ops::flash_attn_prefill::{
    dispatch_flash_attn_prefill_bf16_d64_boolmask, dispatch_flash_attn_prefill_bf16_d256_boolmask,
    dispatch_flash_attn_prefill_f16_d64, dispatch_flash_attn_prefill_f16_d64_boolmask,
    dispatch_flash_attn_prefill_f16_d256, dispatch_flash_attn_prefill_f16_d256_boolmask,
};
use mlx_flash_attn::ops::flash_attn_prefill_d512::{
    dispatch_flash_attn_prefill_bf16_d512_boolmask, dispatch_flash_attn_prefill_f16_d512,
    dispatch_flash_attn_prefill_f16_d512_boolmask,
};
use mlx_native::ops::encode_helpers::as_bytes;
use mlx_native::ops::flash_attn_prefill::{
    AttnMaskParamsGpu, AttnParamsGpu, FlashAttnPrefillLayout, dispatch_flash_attn_prefill_bf16_d64,
    dispatch_flash_attn_prefill_bf16_d256, dispatch_flash_attn_prefill_bf16_d256_with_blk,
};
use mlx_native::ops::flash_attn_prefill_blk::{
    BlkParams, alloc_blk_buffer, dispatch_flash_attn_prefill_blk,
};
use mlx_native::ops::flash_attn_prefill_d512::{
    NCPSG_D512, NQPSG_D512, dispatch_flash_attn_prefill_bf16_d512,
    dispatch_flash_attn_prefill_bf16_d512_with_blk, dispatch_flash_attn_prefill_bf16_d512_with_nsg,
    dispatch_flash_attn_prefill_bf16_d512_with_nsg_and_blk,
};
use mlx_native::{DType, KernelArg, MTLSize, MlxBuffer, MlxDevice, Result};

use crate::call::{Call, Dispatcher, Mask, Program, params, swapped};
use crate::common::{self, Plain, Qkv, assert_close, seen, shape};

/// How calls of a dispatcher differ from plain ones.
#[derive(Clone, Copy)]
pub(crate) struct Form<'a> {
    pub(crate) dtype: DType,
    pub(crate) dim: usize,
    pub(crate) bools: bool,
    pub(crate) masks: &'a [Mask],
    pub(crate) layout: FlashAttnPrefillLayout,
}

impl Form<'_> {
    pub(crate) const fn head_major(dtype: DType, dim: usize) -> Self {
        Self {
            dtype,
            dim,
            bools: false,
            masks: &[Mask::None, Mask::Plane, Mask::PerHead],
            layout: FlashAttnPrefillLayout::HeadMajor,
        }
    }

    /// Runs one call of every kind, and holds each against plain attention.
    pub(crate) fn check(
        &self,
        what: &str,
        encode: &dyn Fn(&mut Program<'_>, &Call<'_>) -> Result<()>,
    ) {
        for device in common::devices() {
            for (mask, causal) in self.masks.iter().flat_map(|m| [(*m, false), (*m, true)]) {
                let what = format!("{what} {mask:?} causal {causal} on {}", device.kind());
                self.check_one(&what, &device, mask, causal, encode);
            }
        }
    }

    fn check_one(
        &self,
        what: &str,
        device: &MlxDevice,
        mask: Mask,
        causal: bool,
        encode: &dyn Fn(&mut Program<'_>, &Call<'_>) -> Result<()>,
    ) {
        let Self { dtype, dim, .. } = *self;
        let (heads, kv_heads, ql, kl) = (4, 2, 37, 45);
        let data = Qkv::new(60, dtype, shape([1, heads, kv_heads], (ql, kl), dim));
        let params = params(&data, causal);
        let mask_dtype = if self.bools { DType::U8 } else { dtype };
        let mask_buffer = mask.upload(device, &data, mask_dtype);
        let swap = self.layout == FlashAttnPrefillLayout::SeqMajor;
        let moved = Qkv {
            q: swapped(swap, &data.q, [heads, ql, dim]),
            k: swapped(swap, &data.k, [kv_heads, kl, dim]),
            v: swapped(swap, &data.v, [kv_heads, kl, dim]),
            ..data
        };
        let buffers = moved.buffers(device);
        let call = Call {
            mask: mask_buffer.as_ref(),
            layout: self.layout,
            ..Call::new(buffers.each_ref(), &params)
        };
        let mut program = Program::new(device);
        encode(&mut program, &call).unwrap_or_else(|error| panic!("{what}: {error}"));
        program.encoder.commit_and_wait().unwrap();
        let visible = |h, i, j| seen(mask.shows(heads, h, i, j) && (!causal || j <= i));
        let want = Qkv::new(60, dtype, data.shape).plain(&Plain::new(&visible));
        let want: Vec<f32> = want.iter().map(|x| *x as f32).collect();
        let want = swapped(swap, &want, [heads, ql, dim]);
        let want: Vec<f64> = want.iter().map(|x| f64::from(*x)).collect();
        assert_close(what, &common::download(&buffers[3]), &want, dtype);
    }
}

#[test]
fn head_dim_64_in_both_layouts() {
    use Dispatcher::MaskLayout;
    let table = [
        (
            DType::BF16,
            false,
            MaskLayout(dispatch_flash_attn_prefill_bf16_d64),
        ),
        (
            DType::BF16,
            true,
            MaskLayout(dispatch_flash_attn_prefill_bf16_d64_boolmask),
        ),
        (
            DType::F16,
            false,
            MaskLayout(dispatch_flash_attn_prefill_f16_d64),
        ),
        (
            DType::F16,
            true,
            MaskLayout(dispatch_flash_attn_prefill_f16_d64_boolmask),
        ),
    ];
    for (dtype, bools, dispatcher) in table {
        for layout in [
            FlashAttnPrefillLayout::HeadMajor,
            FlashAttnPrefillLayout::SeqMajor,
        ] {
            let form = Form {
                bools,
                layout,
                ..Form::head_major(dtype, 64)
            };
            let what = format!("d64 {dtype} bools {bools} {layout:?}");
            form.check(&what, &|program, call| program.prefill(dispatcher, call));
        }
    }
}

#[test]
fn head_dims_256_and_512() {
    use Dispatcher::{Mask, MaskNsg};
    let (bf16, f16) = (DType::BF16, DType::F16);
    let table = [
        (
            bf16,
            256,
            false,
            Mask(dispatch_flash_attn_prefill_bf16_d256),
        ),
        (
            bf16,
            256,
            true,
            Mask(dispatch_flash_attn_prefill_bf16_d256_boolmask),
        ),
        (f16, 256, false, Mask(dispatch_flash_attn_prefill_f16_d256)),
        (
            f16,
            256,
            true,
            Mask(dispatch_flash_attn_prefill_f16_d256_boolmask),
        ),
        (
            bf16,
            512,
            false,
            Mask(dispatch_flash_attn_prefill_bf16_d512),
        ),
        (
            bf16,
            512,
            true,
            Mask(dispatch_flash_attn_prefill_bf16_d512_boolmask),
        ),
        (f16, 512, false, Mask(dispatch_flash_attn_prefill_f16_d512)),
        (
            f16,
            512,
            true,
            Mask(dispatch_flash_attn_prefill_f16_d512_boolmask),
        ),
        (
            bf16,
            512,
            false,
            MaskNsg(dispatch_flash_attn_prefill_bf16_d512_with_nsg, 4),
        ),
        (
            bf16,
            512,
            false,
            MaskNsg(dispatch_flash_attn_prefill_bf16_d512_with_nsg, 8),
        ),
    ];
    for (row, (dtype, dim, bools, dispatcher)) in table.into_iter().enumerate() {
        let form = Form {
            bools,
            ..Form::head_major(dtype, dim)
        };
        let what = format!("row {row}, d{dim} {dtype} bools {bools}");
        form.check(&what, &|program, call| program.prefill(dispatcher, call));
    }
}

/// Tile classes of the call's mask, from the pre-pass on the same encoder.
fn classes(program: &mut Program<'_>, call: &Call<'_>) -> Result<Option<MlxBuffer>> {
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
    let blk = alloc_blk_buffer(program.device, &params)?;
    let (encoder, registry) = (&mut program.encoder, &mut program.registry);
    dispatch_flash_attn_prefill_blk(encoder, program.device, registry, mask, &blk, &params)?;
    Ok(Some(blk))
}

#[test]
fn tile_classes_at_256_and_512() {
    use Dispatcher::{MaskBlk, MaskBlkNsg};
    let table = [
        (256, MaskBlk(dispatch_flash_attn_prefill_bf16_d256_with_blk)),
        (512, MaskBlk(dispatch_flash_attn_prefill_bf16_d512_with_blk)),
        (
            512,
            MaskBlkNsg(dispatch_flash_attn_prefill_bf16_d512_with_nsg_and_blk, 4),
        ),
    ];
    for (row, (dim, dispatcher)) in table.into_iter().enumerate() {
        let form = Form {
            masks: &[Mask::None, Mask::Plane],
            ..Form::head_major(DType::BF16, dim)
        };
        form.check(&format!("row {row}, d{dim}"), &|program, call| {
            let blk = classes(program, call)?;
            let blk = blk.as_ref();
            program.prefill(dispatcher, &Call { blk, ..*call })
        });
    }
}

/// The four kernels that have a name but no dispatcher, encoded by hand with the original's tile of 8x8 and
/// its 32 threads. Every device takes them, and runs the work by its own tile.
#[test]
fn head_dim_512_encoded_by_name() {
    for (name, dtype, bools) in [
        ("flash_attn_prefill_bf16_d512", DType::BF16, false),
        ("flash_attn_prefill_bf16_d512_boolmask", DType::BF16, true),
        ("flash_attn_prefill_f16_d512", DType::F16, false),
        ("flash_attn_prefill_f16_d512_boolmask", DType::F16, true),
    ] {
        let form = Form {
            bools,
            masks: &[Mask::Plane],
            ..Form::head_major(dtype, 512)
        };
        form.check(name, &|program, c| {
            let (e, d, r) = (&mut program.encoder, program.device, &mut program.registry);
            let p = c.params;
            let (h, hkv) = (i64::from(p.n_heads), i64::from(p.n_kv_heads));
            let (ql, kl, dim) = (
                i64::from(p.seq_len_q),
                i64::from(p.seq_len_k),
                i64::from(p.head_dim),
            );
            let (bq, bk) = (8, 8);
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
            let bools = [
                (200, p.seq_len_q.is_multiple_of(bq)),
                (201, p.seq_len_k.is_multiple_of(bk)),
                (300, true),
                (301, p.do_causal),
                (303, false),
            ];
            let pipeline = r.get_pipeline_with_bool_constants(name, d.metal_device(), &bools)?;
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
                MTLSize::new(32, 1, 1),
            );
            Ok(())
        });
    }
}
