//! Tiled prefill at head dims 64 and 256, by the entry points of `mlx-native`: its names, layouts and errors.
//!
//! Each dispatcher encodes into the given encoder without committing. Buffers are dense with a
//! contiguous head dimension:
//!
//! | operand | shape |
//! |---|---|
//! | `q`, `out` | `[B, H, qL, D]` (head-major) or `[B, qL, H, D]` (seq-major) |
//! | `k`, `v` | `[B, Hkv, kL, D]` or `[B, kL, Hkv, D]` |
//! | `mask` | `[qL, kL]`, shared by all batches and heads, `[B, qL, kL]`, shared by a batch's heads, or `[B, H, qL, kL]` |
//!
//! A float mask is added to the scaled scores, `-inf` masking a key; a bool mask is `U8`, nonzero
//! attending. `do_causal` shows query `i` the keys `k <= i`, whatever the lengths. `scale` is what
//! scores are multiplied by, usually `1 / sqrt(D)`. A row that sees no key comes out as zeros.
//!
//! # Errors
//! `InvalidArgument` names the argument, what was expected and what was given: head dim, zero or
//! inconsistent sizes, dtype, a buffer too small, an output that overlaps an input, tile classes
//! without a mask or of another tile. Nothing is encoded then.

use crate::attention::{Layout, Shape};
pub use crate::backend::metal::params::{AttnMaskParamsGpu, AttnParamsGpu};
use crate::backend::metal::sources;
use crate::compat::prefill::{dispatchers, resumed};
use crate::compat::registry::KernelRegistry;

mod names;
use names::*;

/// Text of the prefill kernels.
pub static FLASH_ATTN_PREFILL_SHADER_SOURCE: &str = sources::PREFILL_TEXT;

/// Registers this module's kernels. A new registry knows them already.
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
    pub(super) fn shape(&self) -> Shape {
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

/// Sizes and options of a prefill whose queries follow keys of earlier calls (a name of version 0.15.16).
/// K and V are `[B, Hkv, kv_capacity, D]`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FlashAttnPrefillResumeParams {
    /// Query heads H.
    pub n_heads: u32,
    /// Key/value heads Hkv; divides H.
    pub n_kv_heads: u32,
    /// Head dimension D; the dispatcher's own.
    pub head_dim: u32,
    /// Query length qL, of this call alone.
    pub seq_len_q: u32,
    /// Keys kL that are valid, those of this call included.
    pub seq_len_k: u32,
    /// Batch size B.
    pub batch: u32,
    /// Score scale, usually `1 / sqrt(D)`; not premultiplied by log2(e).
    pub scale: f32,
    /// Shows query `i` only the keys `k <= i + q_offset_in_k`.
    pub do_causal: bool,
    /// Position of query 0 among the keys; `q_offset_in_k + seq_len_q` is at most `seq_len_k`.
    pub q_offset_in_k: u32,
    /// Rows that K and V have room for, at least `seq_len_k`.
    pub kv_capacity: u32,
}

impl FlashAttnPrefillResumeParams {
    /// The same sizes of a call whose first query stands at position 0.
    pub(super) fn fresh(&self) -> FlashAttnPrefillParams {
        FlashAttnPrefillParams {
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            seq_len_q: self.seq_len_q,
            seq_len_k: self.seq_len_k,
            batch: self.batch,
            scale: self.scale,
            do_causal: self.do_causal,
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

dispatchers! {
    /// bf16, head dim 64, additive bf16 mask, in either layout.
    dispatch_flash_attn_prefill_bf16_d64("flash_attn_prefill_bf16_d64", layout: layout);
    /// bf16, head dim 64, bool mask, in either layout.
    /// `mlx-native` has no dispatcher of this kernel: the name is this crate's own.
    dispatch_flash_attn_prefill_bf16_d64_boolmask("flash_attn_prefill_bf16_d64_boolmask", layout: layout);
    /// f16, head dim 64, additive f16 mask, in either layout.
    /// `mlx-native` has no dispatcher of this kernel: the name is this crate's own.
    dispatch_flash_attn_prefill_f16_d64("flash_attn_prefill_f16_d64", layout: layout);
    /// f16, head dim 64, bool mask, in either layout.
    /// `mlx-native` has no dispatcher of this kernel: the name is this crate's own.
    dispatch_flash_attn_prefill_f16_d64_boolmask("flash_attn_prefill_f16_d64_boolmask", layout: layout);
    /// bf16, head dim 256, additive bf16 mask.
    dispatch_flash_attn_prefill_bf16_d256("flash_attn_prefill_bf16_d256");
    /// bf16, head dim 256, additive bf16 mask with the classes of its 32x16 tiles: the same bits as
    /// without them where masked cells are -inf, and masked tiles cost nothing.
    dispatch_flash_attn_prefill_bf16_d256_with_blk("flash_attn_prefill_bf16_d256", blk: blk);
    /// bf16, head dim 256, bool mask.
    /// `mlx-native` has no dispatcher of this kernel: the name is this crate's own.
    dispatch_flash_attn_prefill_bf16_d256_boolmask("flash_attn_prefill_bf16_d256_boolmask");
    /// f16, head dim 256, additive f16 mask.
    /// `mlx-native` has no dispatcher of this kernel: the name is this crate's own.
    dispatch_flash_attn_prefill_f16_d256("flash_attn_prefill_f16_d256");
    /// f16, head dim 256, additive f16 mask with the classes of its 32x16 tiles.
    /// A name of version 0.15.16.
    dispatch_flash_attn_prefill_f16_d256_with_blk("flash_attn_prefill_f16_d256", blk: blk);
    /// f16, head dim 256, bool mask.
    /// `mlx-native` has no dispatcher of this kernel: the name is this crate's own.
    dispatch_flash_attn_prefill_f16_d256_boolmask("flash_attn_prefill_f16_d256_boolmask");
}

resumed! {
    /// bf16, head dim 256, no mask: queries at an offset among the keys of a cache.
    dispatch_flash_attn_prefill_bf16_d256_resume("flash_attn_prefill_bf16_d256");
    /// f16, head dim 256, no mask: queries at an offset among the keys of a cache.
    dispatch_flash_attn_prefill_f16_d256_resume("flash_attn_prefill_f16_d256");
}

/// The unit tests of `mlx-native`'s own module, unchanged, which `scripts/seed-tests` takes from a copy
/// of its text: they are not this crate's to publish.
#[cfg(all(test, mlx_flash_seed_tests))]
mod seed_tests {
    use super::*;
    use crate::MlxError;

    include!(env!("MLX_FLASH_SEED_TESTS"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::metal::table;

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
