//! The operands of a problem: their names, and what a problem requires of them.

use crate::dtype::DType;

/// An operand of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Q, `[B, H, qL, D]`.
    Query,
    /// K, `[B, Hkv, kL, D]`.
    Key,
    /// V, `[B, Hkv, kL, D]`.
    Value,
    /// O, `[B, H, qL, D]`.
    Output,
    /// The mask, `[B|1, H|1, qL, kL]`.
    Mask,
    /// Tile classes of the mask, `[ceil(qL/bq), ceil(kL/bk)]`, `U8`.
    TileClasses,
    /// Sink logits, `[H]`, `F32`.
    Sinks,
    /// ALiBi slopes, `[H]`, `F32`.
    AlibiSlopes,
    /// Log-sum-exp output, `[B, H, qL]` or packed `[H, total_q]`, `F32`.
    Lse,
    /// Block table of paged keys, `[B, pages of a sequence]`, `I32`.
    BlockTable,
    /// Keys of each sequence, `[B]`, `U32` or `I32`.
    KeyLengths,
}

impl Role {
    /// The operand's name, as messages give it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Query => "Q",
            Self::Key => "K",
            Self::Value => "V",
            Self::Output => "out",
            Self::Mask => "mask",
            Self::TileClasses => "blk",
            Self::Sinks => "sinks",
            Self::AlibiSlopes => "alibi_slopes",
            Self::Lse => "lse",
            Self::BlockTable => "block_table",
            Self::KeyLengths => "key_lengths",
        }
    }

    /// Whether the kernel writes this operand.
    pub const fn is_output(self) -> bool {
        matches!(self, Self::Output | Self::Lse)
    }

    /// Every role, in the order of the kernels' buffer indices.
    pub const ALL: [Role; 11] = [
        Self::Query,
        Self::Key,
        Self::Value,
        Self::Output,
        Self::Mask,
        Self::TileClasses,
        Self::Sinks,
        Self::AlibiSlopes,
        Self::Lse,
        Self::BlockTable,
        Self::KeyLengths,
    ];
}

/// What a problem requires of one operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OperandSpec {
    /// The element type.
    pub dtype: DType,
    /// Elements the operand must hold.
    pub elements: usize,
}
