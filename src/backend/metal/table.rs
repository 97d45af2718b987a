//! The table of Metal kernels: which serves a dtype, head dim and mask kind, with its tile, its threads and
//! its threadgroup memory.

use crate::attention::mask::Tile;
use crate::attention::{HEAD_DIMS, Problem};
use crate::backend::kind::DeviceKind;
use crate::dtype::DType;
use crate::error::Unsupported;

/// Most threadgroup memory any Apple kernel may use, in bytes.
pub const APPLE_THREADGROUP_BYTES: usize = 32_768;

/// What a kernel does with a mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MaskKind {
    /// Adds it, or takes none.
    Additive,
    /// Reads it as booleans.
    Bool,
}

impl MaskKind {
    /// How a kernel for the problem reads its mask.
    pub(crate) fn of(problem: &Problem) -> Self {
        match problem.mask() {
            Some(mask) if mask.is_bool() => Self::Bool,
            _ => Self::Additive,
        }
    }
}

/// One row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variant {
    /// Entry point.
    pub kernel: &'static str,
    /// Element type of Q, K, V and O.
    pub dtype: DType,
    /// Head dimension.
    pub head_dim: usize,
    /// What it does with a mask.
    pub mask: MaskKind,
    /// The tile that grid and params are counted in.
    pub tile: Tile,
    /// Simdgroups of 32 threads in a threadgroup.
    pub simdgroups: usize,
    /// Threadgroup memory on Apple GPUs, in bytes.
    pub shared_bytes: usize,
}

impl Variant {
    /// Threads of a threadgroup.
    pub const fn threads(&self) -> usize {
        32 * self.simdgroups
    }

    /// The kernel of its pair that serves problems without a mask, which both could: the additive one.
    pub(crate) fn without_mask(&'static self) -> &'static Self {
        let twin = |v: &&Self| {
            v.mask == MaskKind::Additive
                && (v.dtype, v.head_dim) == (self.dtype, self.head_dim)
                && self.kernel.starts_with(v.kernel)
        };
        PREFILL.iter().find(twin).unwrap_or(self)
    }

    /// Whether its threadgroup memory fits an Apple GPU's.
    pub const fn fits(&self) -> bool {
        self.shared_bytes <= APPLE_THREADGROUP_BYTES
    }
}

/// Threadgroup bytes of the Metal kernels: Q, scores, weights (in place of the scores where they are
/// as wide) and a factor a row; rows are padded by 16 bytes.
const fn shared_bytes(rows: usize, chunk: usize, head_dim: usize, size: usize) -> usize {
    let q = rows * (head_dim + 16 / size) * size;
    let scores = rows * (chunk + 4) * 4;
    // Nothing uses the weights' own array then, but it cannot be empty, and 16 bytes are the unit.
    let weights = if size == 4 {
        16
    } else {
        rows * (chunk + 8) * size
    };
    q + scores + weights + rows * 4
}

const fn row(
    kernel: &'static str,
    dtype: DType,
    head_dim: usize,
    mask: MaskKind,
    wide: bool,
) -> Variant {
    let size = dtype.size_of();
    Variant {
        kernel,
        dtype,
        head_dim,
        mask,
        tile: if wide {
            Tile { bq: 8, bk: 64 }
        } else {
            Tile { bq: 32, bk: 16 }
        },
        simdgroups: if wide { 8 } else { 4 },
        shared_bytes: if wide {
            shared_bytes(8, 64, head_dim, size)
        } else {
            shared_bytes(32, 32, head_dim, size)
        },
    }
}

/// Query rows, keys of a chunk and simdgroups of a geometry, as the text has them.
macro_rules! geometry {
    (narrow) => {
        "32, 32, 4"
    };
    (wide) => {
        "8, 64, 8"
    };
}

/// Whether a geometry is `wide`: eight rows, where 32 rows of Q would not fit, or their output not stay in
/// registers.
macro_rules! is_wide {
    (narrow) => {
        false
    };
    (wide) => {
        true
    };
}

/// The table, and a line of text for each dtype and head dim that instantiates its two kernels. Of a head
/// dim: what stands before the dtype in its kernels' names, the geometry in 16 bits and in f32, and a number
/// that tells kernels apart that differ by name alone.
macro_rules! rows {
    ($($dim:literal: $stem:literal $half:ident $float:ident $alias:literal),* $(,)?) => {
        /// Every prefill kernel. At head dim 512 two names stand for one kernel: the plain one and the one
        /// that its own module dispatches.
        pub const PREFILL: &[Variant] = &[$(
            row(concat!("flash_attn_prefill_", $stem, "bf16_d", $dim), DType::BF16, $dim, MaskKind::Additive, is_wide!($half)),
            row(concat!("flash_attn_prefill_", $stem, "bf16_d", $dim, "_boolmask"), DType::BF16, $dim, MaskKind::Bool, is_wide!($half)),
            row(concat!("flash_attn_prefill_", $stem, "f16_d", $dim), DType::F16, $dim, MaskKind::Additive, is_wide!($half)),
            row(concat!("flash_attn_prefill_", $stem, "f16_d", $dim, "_boolmask"), DType::F16, $dim, MaskKind::Bool, is_wide!($half)),
            row(concat!("flash_attn_prefill_", $stem, "f32_d", $dim), DType::F32, $dim, MaskKind::Additive, is_wide!($float)),
            row(concat!("flash_attn_prefill_", $stem, "f32_d", $dim, "_boolmask"), DType::F32, $dim, MaskKind::Bool, is_wide!($float)),
        )*];

        /// The lines that follow the prefill kernels' text.
        pub(super) const INSTANTIATIONS: &str = concat!($(
            "MASKS(\"", $stem, "bf16_d", $dim, "\", bfloat, ", $dim, ", ", geometry!($half), ", ", $alias, ")\n",
            "MASKS(\"", $stem, "f16_d", $dim, "\", half, ", $dim, ", ", geometry!($half), ", ", $alias, ")\n",
            "MASKS(\"", $stem, "f32_d", $dim, "\", float, ", $dim, ", ", geometry!($float), ", ", $alias, ")\n",
        )*);
    };
}

rows!(
    32: "" narrow narrow 0,
    40: "" narrow narrow 0,
    48: "" narrow narrow 0,
    64: "" narrow narrow 0,
    72: "" narrow narrow 0,
    80: "" narrow narrow 0,
    96: "" narrow narrow 0,
    112: "" narrow narrow 0,
    128: "" narrow narrow 0,
    192: "" narrow narrow 0,
    256: "" narrow wide 0,
    512: "" wide wide 0,
    512: "llamacpp_" wide wide 1,
);

/// Finds the kernel for a problem.
///
/// # Errors
/// Where there is none, which head dims the dtype has kernels for.
pub fn select(
    dtype: DType,
    head_dim: usize,
    mask: MaskKind,
) -> std::result::Result<&'static Variant, Unsupported> {
    PREFILL
        .iter()
        .find(|v| (v.dtype, v.head_dim, v.mask) == (dtype, head_dim, mask) && v.fits())
        .ok_or_else(|| {
            let there: Vec<usize> = HEAD_DIMS
                .into_iter()
                .filter(|d| {
                    PREFILL
                        .iter()
                        .any(|v| (v.dtype, v.head_dim) == (dtype, *d) && v.fits())
                })
                .collect();
            Unsupported::new(
                DeviceKind::Metal.name(),
                format!("head_dim {head_dim} in {dtype}"),
                format!("its kernels serve {there:?}"),
            )
        })
}

/// Finds a row by its kernel name.
pub fn by_name(kernel: &str) -> Option<&'static Variant> {
    PREFILL.iter().find(|v| v.kernel == kernel)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_unique_and_every_combination_has_a_row() {
        let names: HashSet<_> = PREFILL.iter().map(|v| v.kernel).collect();
        assert_eq!(names.len(), PREFILL.len());
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            for dim in HEAD_DIMS {
                for mask in [MaskKind::Additive, MaskKind::Bool] {
                    let v = select(dtype, dim, mask).unwrap();
                    assert_eq!(by_name(v.kernel), Some(v));
                }
            }
        }
    }

    #[test]
    fn threadgroup_memory_fits_and_is_what_the_formula_gives() {
        for v in PREFILL {
            assert!(v.fits(), "{v:?}");
        }
        let bytes = |name| by_name(name).unwrap().shared_bytes;
        assert_eq!(bytes("flash_attn_prefill_bf16_d64"), 11_904);
        assert_eq!(bytes("flash_attn_prefill_bf16_d256"), 24_192);
        assert_eq!(bytes("flash_attn_prefill_llamacpp_bf16_d512"), 11_680);
        assert_eq!(bytes("flash_attn_prefill_f32_d192"), 29_840);
    }

    #[test]
    fn a_head_dim_that_is_not_there_lists_those_that_are() {
        let error = select(DType::F32, 100, MaskKind::Additive).unwrap_err();
        assert!(
            error.to_string().contains(&format!("{HEAD_DIMS:?}")),
            "{error}"
        );
    }
}
