//! Buffer indices and function constants of every kernel: what the host binds and what the kernels
//! read are both taken from here.

use crate::attention::Role;
pub use crate::backend::access::{Access, Accesses};
pub use crate::backend::kernel::Constants;

/// Buffer indices of the prefill kernels.
pub mod prefill {
    use super::Role;

    /// [`super::super::params::AttnParamsGpu`].
    pub const PARAMS: usize = 4;
    /// [`super::super::params::AttnMaskParamsGpu`]; bound with a mask.
    pub const MASK_PARAMS: usize = 5;
    /// [`super::super::params::AttnExtraParamsGpu`]; bound where a constant needs it.
    pub const EXTRA_PARAMS: usize = 8;
    /// Cumulative query lengths, `u32[B + 1]`; bound for packed queries.
    pub const CU_SEQLENS_Q: usize = 12;
    /// Cumulative key lengths, `u32[B + 1]`; bound for packed keys.
    pub const CU_SEQLENS_K: usize = 13;
    /// [`super::super::params::AttnPagesParamsGpu`]; bound with a block table.
    pub const PAGES_PARAMS: usize = 16;

    /// Whether what is bound there says what is asked, and is no operand.
    pub const fn is_params(index: usize) -> bool {
        matches!(
            index,
            PARAMS | MASK_PARAMS | EXTRA_PARAMS | CU_SEQLENS_Q | CU_SEQLENS_K | PAGES_PARAMS
        )
    }

    /// Index of an operand.
    pub const fn index(role: Role) -> usize {
        match role {
            Role::Query => 0,
            Role::Key => 1,
            Role::Value => 2,
            Role::Output => 3,
            Role::Mask => 6,
            Role::TileClasses => 7,
            Role::Sinks => 9,
            Role::AlibiSlopes => 10,
            Role::Lse => 11,
            Role::BlockTable => 14,
            Role::KeyLengths => 15,
        }
    }
}

/// Function-constant indices. 304 and 305 are left free: later versions of `mlx-native` give them to its
/// sinks.
pub mod constant {
    /// bool: `qL % bq == 0`.
    pub const ALIGN_Q: usize = 200;
    /// bool: `kL % bk == 0`.
    pub const ALIGN_K: usize = 201;
    /// bool: a mask is bound.
    pub const HAS_MASK: usize = 300;
    /// bool: causal visibility.
    pub const DO_CAUSAL: usize = 301;
    /// bool: sink logits are bound.
    pub const HAS_SINKS: usize = 302;
    /// bool: tile classes are bound.
    pub const HAS_BLK: usize = 303;
    /// bool: ALiBi slopes are bound.
    pub const HAS_ALIBI: usize = 306;
    /// bool: the log-sum-exp is written.
    pub const HAS_LSE: usize = 307;
    /// bool: queries and keys are packed; cumulative lengths of both are bound.
    pub const IS_VARLEN: usize = 308;
    /// int: element type of an additive mask; see [`super::dtype_code`]. 0: as Q.
    pub const MASK_DTYPE: usize = 309;
    /// int: element type of K and V, coded as the mask's. 0: as Q.
    pub const KV_DTYPE: usize = 310;
    /// bool: a window on either side; bounds in the extra params.
    pub const HAS_WINDOW: usize = 311;
    /// bool: `softcapping` in the params is a softcap.
    pub const HAS_SOFTCAP: usize = 312;
    /// bool: K and V lie in pages; a block table is bound.
    pub const IS_PAGED: usize = 313;
    /// bool: a number of keys for each sequence is bound.
    pub const HAS_KEY_LENGTHS: usize = 314;
    /// bool: queries are packed and keys are not; cumulative lengths of the queries are bound.
    pub const PACKS_QUERIES: usize = 315;
    /// int: simdgroups of the head-dim-512 kernels, 4 or 8.
    pub const NSG: usize = 322;
    /// int: query rows of a class tile.
    pub const BLK_BQ: usize = 400;
    /// int: keys of a class tile.
    pub const BLK_BK: usize = 401;
}

/// Kernels besides prefill.
pub mod names {
    /// Fills a bf16 mask.
    pub const MASK_FILL: &str = "flash_attn_prefill_mask_fill_bf16";
    /// Fills an f16 mask.
    pub const MASK_FILL_F16: &str = "flash_attn_prefill_mask_fill_f16";
    /// Fills a bf16 mask of several sequences.
    pub const MASK_FILL_BLOCKS: &str = "flash_attn_prefill_mask_fill_blockdiag_bf16";
    /// Classifies tiles of a bf16 mask.
    pub const BLK: &str = "flash_attn_prefill_blk_bf16";
    /// Classifies tiles of an f16 mask.
    pub const BLK_F16: &str = "flash_attn_prefill_blk_f16";
    /// Decode: one partial result for each of 32 key splits; K and V in f32.
    pub const VEC_F32: &str = "flash_attn_vec_f32";
    /// Decode: as [`VEC_F32`], K and V in f16.
    pub const VEC_F16: &str = "flash_attn_vec_f16kv";
    /// Decode: joins the partial results.
    pub const VEC_REDUCE: &str = "flash_attn_vec_reduce";

    /// The mask fills and the tile classes.
    pub(crate) const MASKS: [&str; 5] = [MASK_FILL, MASK_FILL_F16, MASK_FILL_BLOCKS, BLK, BLK_F16];
    /// The decode kernels.
    pub(crate) const DECODE: [&str; 3] = [VEC_F32, VEC_F16, VEC_REDUCE];
}

/// Buffer indices of the mask-fill, tile-class and decode kernels.
pub mod other {
    /// Mask fill: the mask.
    pub const FILL_OUT: usize = 0;
    /// Mask fill: [`crate::abi::params::MaskFillParamsGpu`].
    pub const FILL_PARAMS: usize = 1;
    /// Block-diagonal mask fill: the mask.
    pub const BLOCKS_OUT: usize = 0;
    /// Block-diagonal mask fill: [`crate::abi::params::BlockFillParamsGpu`].
    pub const BLOCKS_PARAMS: usize = 1;
    /// Block-diagonal mask fill: each token's sequence, `u32[T]`.
    pub const BLOCKS_IDS: usize = 2;
    /// Block-diagonal mask fill: each token's position in its sequence, `u32[T]`.
    pub const BLOCKS_POSITIONS: usize = 3;
    /// Tile classes: the mask.
    pub const BLK_MASK: usize = 0;
    /// Tile classes: the classes.
    pub const BLK_OUT: usize = 1;
    /// Tile classes: [`crate::abi::params::BlkParamsGpu`].
    pub const BLK_PARAMS: usize = 2;
    /// Decode: Q.
    pub const VEC_Q: usize = 0;
    /// Decode: K.
    pub const VEC_K: usize = 1;
    /// Decode: V.
    pub const VEC_V: usize = 2;
    /// Decode: partial results.
    pub const VEC_TMP: usize = 3;
    /// Decode: [`crate::abi::params::VecParamsGpu`].
    pub const VEC_PARAMS: usize = 4;
    /// Reduce: partial results.
    pub const REDUCE_TMP: usize = 0;
    /// Reduce: the output.
    pub const REDUCE_OUT: usize = 1;
    /// Reduce: [`crate::abi::params::VecParamsGpu`].
    pub const REDUCE_PARAMS: usize = 2;
}

/// How `kernel` uses its buffers.
pub fn accesses(kernel: &str) -> Accesses {
    let written: &[usize] = match kernel {
        names::MASK_FILL | names::MASK_FILL_F16 => &[other::FILL_OUT],
        names::MASK_FILL_BLOCKS => &[other::BLOCKS_OUT],
        names::BLK | names::BLK_F16 => &[other::BLK_OUT],
        names::VEC_F32 | names::VEC_F16 => &[other::VEC_TMP],
        names::VEC_REDUCE => &[other::REDUCE_OUT],
        _ if super::table::by_name(kernel).is_some() => {
            const { &[prefill::index(Role::Output), prefill::index(Role::Lse)] }
        }
        _ => &[],
    };
    Accesses::writing(written)
}

/// Whether a kernel of this crate has that name.
pub fn is_own(kernel: &str) -> bool {
    accesses(kernel).is_known()
}

/// Code of an operand's element type for [`constant::MASK_DTYPE`] and [`constant::KV_DTYPE`].
pub const fn dtype_code(operand: crate::DType, query: crate::DType) -> i32 {
    use crate::DType;
    match operand {
        _ if operand as u8 == query as u8 => 0,
        DType::F32 => 1,
        DType::F16 => 2,
        DType::BF16 => 3,
        _ => 0,
    }
}

/// The element type behind a code of [`dtype_code`].
pub const fn coded_dtype(code: i32, query: crate::DType) -> Option<crate::DType> {
    use crate::DType;
    match code {
        0 => Some(query),
        1 => Some(DType::F32),
        2 => Some(DType::F16),
        3 => Some(DType::BF16),
        _ => None,
    }
}
