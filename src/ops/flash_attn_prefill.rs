//! Tiled prefill at head dims 64 and 256: the seed's names, layouts and errors.
//!
//! Each dispatcher encodes into the given encoder without committing. Buffers are dense with a
//! contiguous head dimension:
//!
//! | operand | shape |
//! |---|---|
//! | `q`, `out` | `[B, H, qL, D]` (head-major) or `[B, qL, H, D]` (seq-major) |
//! | `k`, `v` | `[B, Hkv, kL, D]` or `[B, kL, Hkv, D]` |
//! | `mask` | `[qL, kL]`, shared by all batches and heads, or `[B, H, qL, kL]` |
//!
//! A float mask is added to the scaled scores, `-inf` masking a key; a bool mask is `U8`, nonzero
//! attending. `do_causal` shows query `i` the keys `k <= i`, whatever the lengths. `scale` is what
//! scores are multiplied by, usually `1 / sqrt(D)`. A row that sees no key comes out as zeros.
//!
//! # Errors
//! `InvalidArgument` names the argument, what was expected and what was given: head dim, zero or
//! inconsistent sizes, dtype, a buffer too small, an output that overlaps an input, tile classes
//! without a mask or of another tile. Nothing is encoded then.

use crate::attention::{Layout, MaskSpec, Problem, QueryOffset, Shape};
pub use crate::backend::metal::params::{AttnMaskParamsGpu, AttnParamsGpu};
use crate::backend::metal::plan::{self, PlanOptions};
use crate::backend::metal::sources;
use crate::backend::metal::table::{self, MaskKind, Variant};
use crate::error::{MlxError, Result};
use crate::ops::{Operands, check_buffer};
use crate::runtime::buffer::MlxBuffer;
use crate::runtime::device::MlxDevice;
use crate::runtime::encoder::CommandEncoder;
use crate::runtime::registry::KernelRegistry;

mod names;
use names::*;

/// Text of the prefill kernels.
pub static FLASH_ATTN_PREFILL_SHADER_SOURCE: &str = sources::PREFILL_TEXT;

/// Registers the seed's twelve kernels. A new registry knows them already.
pub fn register(registry: &mut KernelRegistry) {
    for name in ALL_KERNEL_NAMES.iter().copied() {
        registry.register_source(name, FLASH_ATTN_PREFILL_SHADER_SOURCE);
    }
}

/// Sizes and options of a prefill.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FlashAttnPrefillParams {
    /// Query heads H.
    pub n_heads: u32,
    /// Key/value heads Hkv; divides H.
    pub n_kv_heads: u32,
    /// Head dimension D; the dispatcher's own.
    pub head_dim: u32,
    /// Query length qL.
    pub seq_len_q: u32,
    /// Key/value length kL.
    pub seq_len_k: u32,
    /// Batch size B.
    pub batch: u32,
    /// Score scale, usually `1 / sqrt(D)`; not premultiplied by log2(e).
    pub scale: f32,
    /// Shows query `i` only the keys `k <= i`; combines with a mask.
    pub do_causal: bool,
}

impl FlashAttnPrefillParams {
    fn shape(&self) -> Shape {
        Shape {
            batch: self.batch as usize,
            heads: self.n_heads as usize,
            kv_heads: self.n_kv_heads as usize,
            query_len: self.seq_len_q as usize,
            key_len: self.seq_len_k as usize,
            qk_dim: self.head_dim as usize,
            v_dim: self.head_dim as usize,
        }
    }
}

/// Order of the operands' axes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlashAttnPrefillLayout {
    /// `[B, H, L, D]`.
    HeadMajor,
    /// `[B, L, H, D]`, as linear projections leave it.
    SeqMajor,
}

impl From<FlashAttnPrefillLayout> for Layout {
    fn from(layout: FlashAttnPrefillLayout) -> Self {
        match layout {
            FlashAttnPrefillLayout::HeadMajor => Self::HeadMajor,
            FlashAttnPrefillLayout::SeqMajor => Self::SeqMajor,
        }
    }
}

/// What a seed dispatcher takes besides encoder, device and registry.
pub(crate) struct SeedCall<'a> {
    /// The dispatcher's kernel.
    pub(crate) kernel: &'static str,
    pub(crate) q: &'a MlxBuffer,
    pub(crate) k: &'a MlxBuffer,
    pub(crate) v: &'a MlxBuffer,
    pub(crate) mask: Option<&'a MlxBuffer>,
    pub(crate) blk: Option<&'a MlxBuffer>,
    pub(crate) out: &'a MlxBuffer,
    pub(crate) params: &'a FlashAttnPrefillParams,
    pub(crate) layout: Layout,
    pub(crate) nsg: Option<u32>,
}

impl SeedCall<'_> {
    /// Checks and encodes the call.
    pub(crate) fn encode(
        &self,
        encoder: &mut CommandEncoder,
        device: &MlxDevice,
        registry: &mut KernelRegistry,
    ) -> Result<()> {
        let variant = table::by_name(self.kernel)
            .ok_or_else(|| MlxError::KernelNotFound(self.kernel.into()))?;
        plan::simdgroups(variant, self.nsg)?;
        let problem = self.problem(variant)?;
        let operands = Operands {
            mask: self.mask,
            tile_classes: self.blk,
            ..Operands::new(self.q, self.k, self.v, self.out)
        };
        let options = PlanOptions {
            nsg: self.nsg,
            variant: Some(variant),
        };
        match super::encode(encoder, &problem, &operands, options)? {
            Some(planned) => registry.note(device.metal_device(), &planned),
            None => Ok(()),
        }
    }

    fn problem(&self, variant: &Variant) -> Result<Problem> {
        let p = self.params;
        if p.head_dim as usize != variant.head_dim {
            return Err(MlxError::expected("head_dim", variant.head_dim, p.head_dim));
        }
        let shape = p.shape();
        let mut problem = Problem::builder(variant.dtype, shape)
            .scale(p.scale)
            .causal(p.do_causal)
            .query_offset(QueryOffset::At(0))
            .layout(self.layout)
            .tile_classes(self.blk.is_some())
            .refuse_empty();
        if let Some(mask) = self.mask {
            let dtype = match variant.mask {
                MaskKind::Additive => variant.dtype,
                MaskKind::Bool => crate::DType::U8,
            };
            check_buffer("mask", mask, dtype, 0)?;
            problem = problem.mask(mask_spec(dtype, is_plane(mask.shape(), &shape), &shape)?);
        }
        problem.build()
    }
}

/// Whether a mask is one plane: of rank 2, or for a single batch and head.
fn is_plane(mask: &[usize], shape: &Shape) -> bool {
    mask.len() == 2 || (shape.batch, shape.heads) == (1, 1)
}

/// A mask of one plane is for all batches and heads; any other is dense `[B, H, qL, kL]`.
fn mask_spec(dtype: crate::DType, plane: bool, shape: &Shape) -> Result<MaskSpec> {
    if plane {
        return Ok(MaskSpec::plane(dtype, shape.key_len));
    }
    let row_stride = shape.key_len;
    let head_stride = shape.query_len.checked_mul(row_stride);
    let batch_stride = head_stride.and_then(|plane| plane.checked_mul(shape.heads));
    match (head_stride, batch_stride) {
        (Some(head_stride), Some(batch_stride)) => Ok(MaskSpec {
            dtype,
            batch_stride,
            head_stride,
            row_stride,
        }),
        _ => Err(MlxError::InvalidArgument(format!(
            "mask: [B, H, qL, kL] of {shape:?} overflows"
        ))),
    }
}

/// Declares the public dispatchers: the variation between them is a kernel's name and which of
/// blk, layout and nsg the signature has.
macro_rules! dispatchers {
    ($(
        $(#[$meta:meta])*
        $name:ident($kernel:literal $(, blk: $blk:ident)? $(, layout: $layout:ident)? $(, nsg: $nsg:ident)?);
    )*) => {$(
        $(#[$meta])*
        #[doc = ""]
        #[doc = concat!("Encodes `", $kernel, "`; see the [module](self) for operands and errors.")]
        #[allow(clippy::too_many_arguments)]
        pub fn $name(
            encoder: &mut $crate::runtime::encoder::CommandEncoder,
            device: &$crate::runtime::device::MlxDevice,
            registry: &mut $crate::runtime::registry::KernelRegistry,
            q: &$crate::runtime::buffer::MlxBuffer,
            k: &$crate::runtime::buffer::MlxBuffer,
            v: &$crate::runtime::buffer::MlxBuffer,
            mask: Option<&$crate::runtime::buffer::MlxBuffer>,
            $($blk: Option<&$crate::runtime::buffer::MlxBuffer>,)?
            out: &$crate::runtime::buffer::MlxBuffer,
            params: &$crate::ops::flash_attn_prefill::FlashAttnPrefillParams,
            $($layout: $crate::ops::flash_attn_prefill::FlashAttnPrefillLayout,)?
            $($nsg: u32,)?
        ) -> $crate::error::Result<()> {
            #[allow(unused_mut, unused_assignments)]
            let mut call = $crate::ops::flash_attn_prefill::SeedCall {
                kernel: $kernel,
                q,
                k,
                v,
                mask,
                blk: None,
                out,
                params,
                layout: $crate::attention::Layout::HeadMajor,
                nsg: None,
            };
            $(call.blk = $blk;)?
            $(call.layout = $layout.into();)?
            $(call.nsg = Some($nsg);)?
            call.encode(encoder, device, registry)
        }
    )*};
}
pub(crate) use dispatchers;

dispatchers! {
    /// bf16, head dim 64, additive bf16 mask, in either layout.
    dispatch_flash_attn_prefill_bf16_d64("flash_attn_prefill_bf16_d64", layout: layout);
    /// bf16, head dim 64, bool mask, in either layout.
    dispatch_flash_attn_prefill_bf16_d64_boolmask("flash_attn_prefill_bf16_d64_boolmask", layout: layout);
    /// f16, head dim 64, additive f16 mask, in either layout.
    dispatch_flash_attn_prefill_f16_d64("flash_attn_prefill_f16_d64", layout: layout);
    /// f16, head dim 64, bool mask, in either layout.
    dispatch_flash_attn_prefill_f16_d64_boolmask("flash_attn_prefill_f16_d64_boolmask", layout: layout);
    /// bf16, head dim 256, additive bf16 mask.
    dispatch_flash_attn_prefill_bf16_d256("flash_attn_prefill_bf16_d256");
    /// bf16, head dim 256, additive bf16 mask with the classes of its 32x16 tiles: the same bits as
    /// without them where masked cells are -inf, and masked tiles cost nothing.
    dispatch_flash_attn_prefill_bf16_d256_with_blk("flash_attn_prefill_bf16_d256", blk: blk);
    /// bf16, head dim 256, bool mask.
    dispatch_flash_attn_prefill_bf16_d256_boolmask("flash_attn_prefill_bf16_d256_boolmask");
    /// f16, head dim 256, additive f16 mask.
    dispatch_flash_attn_prefill_f16_d256("flash_attn_prefill_f16_d256");
    /// f16, head dim 256, additive f16 mask with the classes of its 32x16 tiles.
    dispatch_flash_attn_prefill_f16_d256_with_blk("flash_attn_prefill_f16_d256", blk: blk);
    /// f16, head dim 256, bool mask.
    dispatch_flash_attn_prefill_f16_d256_boolmask("flash_attn_prefill_f16_d256_boolmask");
}

/// The unit tests of `mlx-native`'s own module, unchanged, which `scripts/seed-tests` takes from a copy
/// of its text: they are not this crate's to publish.
#[cfg(all(test, mlx_flash_seed_tests))]
mod seed_tests {
    use super::*;

    include!(env!("MLX_FLASH_SEED_TESTS"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_kernel_of_the_seed_is_f32() {
        for name in ALL_KERNEL_NAMES {
            let variant = table::by_name(name).unwrap();
            assert_ne!(variant.dtype, crate::DType::F32);
        }
    }

    #[test]
    fn tiles_are_the_seeds() {
        for name in ALL_KERNEL_NAMES {
            let v = table::by_name(name).unwrap();
            let expected = if v.head_dim == 512 {
                (8, 64, 256)
            } else {
                (32, 16, 128)
            };
            assert_eq!((v.tile.bq, v.tile.bk, v.threads()), expected, "{name}");
        }
    }

    #[test]
    fn structs_have_the_seeds_sizes() {
        assert_eq!(size_of::<AttnParamsGpu>(), 160);
        assert_eq!(size_of::<AttnMaskParamsGpu>(), 24);
    }
}
