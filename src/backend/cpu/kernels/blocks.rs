//! Rows of K and V in GGML's blocks of 32 elements, read where they lie: a vector of elements is widened and
//! multiplied with its block's scale. The product is exact, since the scale has 11 bits and an element 8.

use half::f16;

use super::simd::{Row, Simd};

/// Elements of a block.
pub(super) const BLOCK: usize = 32;

/// A block: an f16 scale, then the elements as small integers.
pub(super) trait Block: Row + Copy {
    fn scale(&self) -> f16;
    /// The block with another scale.
    fn with_scale(self, scale: f16) -> Self;
    /// Element `i` before it is scaled.
    fn element(&self, i: usize) -> i8;
}

/// `q8_0`: 32 signed bytes.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Q8_0 {
    scale: [u8; 2],
    elements: [i8; BLOCK],
}

/// `q4_0`: byte `i` holds element `i` in its low half and element `i + 16` in its high half, 8 added to each.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Q4_0 {
    scale: [u8; 2],
    pairs: [u8; BLOCK / 2],
}

/// The block of a column and the column in it.
#[inline(always)]
fn block_of<B>(row: *const B, column: usize) -> (*const B, usize) {
    (row.wrapping_add(column / BLOCK), column % BLOCK)
}

impl Row for Q8_0 {
    const IN_BLOCKS: bool = true;
    #[inline(always)]
    unsafe fn load_at<S: Simd>(s: S, row: *const Self, column: usize) -> S::V {
        let (block, column) = block_of(row, column);
        // SAFETY: the block is there, and `LANES` elements from one of their multiples on lie in one block.
        unsafe {
            let scale = s.splat_f16((&raw const (*block).scale).cast());
            let elements = (&raw const (*block).elements).cast::<i8>().add(column);
            s.mul(s.load_i8(elements), scale)
        }
    }
    fn bytes(columns: usize) -> usize {
        columns.div_ceil(BLOCK) * size_of::<Self>()
    }
}

impl Block for Q8_0 {
    fn scale(&self) -> f16 {
        f16::from_le_bytes(self.scale)
    }
    fn with_scale(self, scale: f16) -> Self {
        let scale = scale.to_le_bytes();
        Self { scale, ..self }
    }
    fn element(&self, i: usize) -> i8 {
        self.elements[i]
    }
}

impl Row for Q4_0 {
    const IN_BLOCKS: bool = true;
    #[inline(always)]
    unsafe fn load_at<S: Simd>(s: S, row: *const Self, column: usize) -> S::V {
        let (block, column) = block_of(row, column);
        // SAFETY: the block is there; `LANES` divides 16, so that these elements lie in one half of their bytes.
        unsafe {
            let scale = s.splat_f16((&raw const (*block).scale).cast());
            let pairs = (&raw const (*block).pairs).cast::<u8>();
            let elements = if column < BLOCK / 2 {
                s.load_low_halves(pairs.add(column))
            } else {
                s.load_high_halves(pairs.add(column - BLOCK / 2))
            };
            s.mul(s.sub(elements, s.splat(8.0)), scale)
        }
    }
    fn bytes(columns: usize) -> usize {
        columns.div_ceil(BLOCK) * size_of::<Self>()
    }
}

impl Block for Q4_0 {
    fn scale(&self) -> f16 {
        f16::from_le_bytes(self.scale)
    }
    fn with_scale(self, scale: f16) -> Self {
        let scale = scale.to_le_bytes();
        Self { scale, ..self }
    }
    fn element(&self, i: usize) -> i8 {
        let byte = self.pairs[i % (BLOCK / 2)];
        let half = if i < BLOCK / 2 { byte & 15 } else { byte >> 4 };
        half as i8 - 8
    }
}
