//! Rows of K and V in GGML's blocks of 32 elements, read where they lie: a vector of elements is widened and
//! multiplied with its block's scale. The product is exact, since the scale has 11 bits and an element 8.

use half::f16;

use super::simd::{Row, Simd};

/// Elements of a block.
pub(super) const BLOCK: usize = 32;

/// An f16 scale, then the elements as small integers.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Scaled<E> {
    scale: [u8; 2],
    elements: E,
}

/// `q8_0`: 32 signed bytes.
pub(super) type Q8_0 = Scaled<[i8; BLOCK]>;

/// `q4_0`: byte `i` holds element `i` in its low half and element `i + 16` in its high half, 8 added to each.
pub(super) type Q4_0 = Scaled<[u8; BLOCK / 2]>;

/// The elements of a block, before they are scaled.
pub(super) trait Elements: Copy + 'static {
    fn get(&self, i: usize) -> i8;
    /// `LANES` of the elements at `at` from `first` on, a multiple of `LANES`.
    unsafe fn load<S: Simd>(s: S, at: *const Self, first: usize) -> S::V;
}

impl Elements for [i8; BLOCK] {
    fn get(&self, i: usize) -> i8 {
        self[i]
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, at: *const Self, first: usize) -> S::V {
        // SAFETY: `LANES` divides 32, so that all of them are the block's.
        unsafe { s.load_i8(at.cast::<i8>().add(first)) }
    }
}

impl Elements for [u8; BLOCK / 2] {
    fn get(&self, i: usize) -> i8 {
        let byte = self[i % (BLOCK / 2)];
        let half = if i < BLOCK / 2 { byte & 15 } else { byte >> 4 };
        half as i8 - 8
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, at: *const Self, first: usize) -> S::V {
        let bytes = at.cast::<u8>();
        // SAFETY: `LANES` divides 16, so that these elements lie in one half of their bytes.
        let halves = unsafe {
            if first < BLOCK / 2 {
                s.load_low_halves(bytes.add(first))
            } else {
                s.load_high_halves(bytes.add(first - BLOCK / 2))
            }
        };
        s.sub(halves, s.splat(8.0))
    }
}

impl<E: Elements> Row for Scaled<E> {
    const IN_BLOCKS: bool = true;
    #[inline(always)]
    unsafe fn load_at<S: Simd>(s: S, row: *const Self, column: usize) -> S::V {
        let block = row.wrapping_add(column / BLOCK);
        // SAFETY: the block is there.
        unsafe {
            let scale = s.splat_f16((&raw const (*block).scale).cast());
            s.mul(
                E::load(s, &raw const (*block).elements, column % BLOCK),
                scale,
            )
        }
    }
    fn bytes(columns: usize) -> usize {
        columns.div_ceil(BLOCK) * size_of::<Self>()
    }
}

impl<E: Elements> Scaled<E> {
    pub(super) fn scale(&self) -> f16 {
        f16::from_le_bytes(self.scale)
    }

    /// The block with another scale.
    pub(super) fn with_scale(self, scale: f16) -> Self {
        let scale = scale.to_le_bytes();
        Self { scale, ..self }
    }

    /// Element `i` before it is scaled.
    pub(super) fn element(&self, i: usize) -> i8 {
        self.elements.get(i)
    }
}
