//! The micro-kernel: `MR` rows of A times `NR` vectors of B, held in registers. Both matrix products
//! use it; only where A's words lie differs.
//!
//! A word is four bytes: one f32, or two neighbouring bf16 under a kernel with dot products. Where an
//! instruction multiplies small matrices, it takes `SIDE` rows of A at once, and `SIDE` words of each;
//! B and the sums then lie in its own order while the micro-kernel runs. Where there are registers for
//! whole tiles, they take the place of all of it.

use std::mem::MaybeUninit;

use super::simd::{Row, Simd};

/// Most rows of a micro-kernel.
pub(super) const MOST_ROWS: usize = 16;

/// How words are multiplied, on top of an instruction set's vectors.
pub(super) trait Kernel: Copy + 'static {
    type S: Simd;
    /// Elements in a word.
    const PAIR: usize;
    /// Rows of A that a multiplication takes, and words of each: 1, or 2 with products of matrices.
    const SIDE: usize = 1;
    /// Rows of A in a tile, and words of each, where there are tiles; `MR` is then the same. Or 0.
    const TILE: usize = 0;
    /// Degree of exp2's polynomial for probabilities.
    const DEGREE: usize;

    fn simd(self) -> Self::S;
    /// `acc + a * b`, the word at `a` taken for every lane, `b` being `LANES` words.
    fn multiply(self, a: Vector<Self>, b: Vector<Self>, acc: Vector<Self>) -> Vector<Self>;
    /// The word at `at` in every lane.
    #[inline(always)]
    unsafe fn broadcast(self, at: *const u32) -> Vector<Self> {
        // SAFETY: the caller's address is a word's.
        self.simd().splat(f32::from_bits(unsafe { *at }))
    }
    /// As [`Self::multiply`], with `a` from [`Self::rows_at`].
    #[inline(always)]
    fn multiply_rows(self, a: Vector<Self>, b: Vector<Self>, acc: Vector<Self>) -> Vector<Self> {
        self.multiply(a, b, acc)
    }
    /// `SIDE` words of each of `SIDE` rows, one `row` words after the other.
    #[inline(always)]
    unsafe fn rows_at(self, at: *const u32, _row: usize) -> Vector<Self> {
        // SAFETY: as promised by the caller.
        unsafe { self.broadcast(at) }
    }
    /// Vectors of B for two words, one after the other, as [`Self::multiply_rows`] takes them. Only
    /// for a `SIDE` of 2, as the next.
    #[inline(always)]
    fn interleave(self, words: [Vector<Self>; 2]) -> [Vector<Self>; 2] {
        words
    }
    /// Sums of two rows from the order of [`Self::multiply_rows`].
    #[inline(always)]
    fn separate_rows(self, sums: [Vector<Self>; 2]) -> [Vector<Self>; 2] {
        sums
    }
    /// Makes tiles ready on this thread, before [`Self::product_of_tiles`].
    #[inline(always)]
    fn open_tiles(self) {}
    /// Lets go of them, after it.
    #[inline(always)]
    fn close_tiles(self) {}
    /// As [`product`], written to `sums`, `NV` vectors for each of `TILE` rows. Only where there are
    /// tiles.
    #[inline(always)]
    unsafe fn product_of_tiles<const NV: usize>(
        self,
        _steps: usize,
        _row: usize,
        _a: *const u32,
        _b: *const u32,
        _sums: *mut f32,
    ) {
        const {
            assert!(
                Self::TILE == 0,
                "a kernel with tiles says how they multiply"
            )
        }
    }
    /// The first `count` of the `LANES` words from word `first` on of a row of Q or K, zeros after them.
    unsafe fn row_words<T: Row>(self, row: *const T, first: usize, count: usize) -> Vector<Self>;
    /// `LANES` columns of V from `column` on as words of `PAIR` keys; `rows` null where there is no key.
    unsafe fn value_words<T: Row>(self, rows: [*const T; 2], column: usize) -> Vector<Self>;
    /// Stores `NR * LANES` probabilities as words.
    unsafe fn store_probabilities<const NR: usize>(self, at: *mut u32, p: [Vector<Self>; NR]);
}

pub(super) type Vector<K> = <<K as Kernel>::S as Simd>::V;

/// Plain f32 multiply-add.
#[derive(Debug, Clone, Copy)]
pub(super) struct MultiplyAdd<S>(pub(super) S);

impl<S: Simd> Kernel for MultiplyAdd<S> {
    type S = S;
    const PAIR: usize = 1;
    const DEGREE: usize = 5;

    #[inline(always)]
    fn simd(self) -> S {
        self.0
    }
    #[inline(always)]
    fn multiply(self, a: S::V, b: S::V, acc: S::V) -> S::V {
        self.0.fma(a, b, acc)
    }
    #[inline(always)]
    unsafe fn row_words<T: Row>(self, row: *const T, first: usize, _: usize) -> S::V {
        // SAFETY: kernels are chosen for head dims that are a multiple of `LANES` (`Kernels::for_dim`).
        unsafe { T::load_at(self.0, row, first) }
    }
    #[inline(always)]
    unsafe fn value_words<T: Row>(self, rows: [*const T; 2], column: usize) -> S::V {
        if rows[0].is_null() {
            return self.0.splat(0.0);
        }
        // SAFETY: a row that is there covers `LANES` columns.
        unsafe { T::load_at(self.0, rows[0], column) }
    }
    #[inline(always)]
    unsafe fn store_probabilities<const NR: usize>(self, at: *mut u32, p: [S::V; NR]) {
        for (i, p) in p.into_iter().enumerate() {
            // SAFETY: the caller's address covers `NR` vectors.
            unsafe { self.0.store(at.cast::<f32>().add(i * S::LANES), p) };
        }
    }
}

/// Brings vectors of B, of words one after another, into the order in which [`product`] reads them.
#[inline(always)]
pub(super) fn interleave<K: Kernel>(kernel: K, words: &mut [Vector<K>]) {
    if K::SIDE == 2 {
        for pair in words.chunks_exact_mut(2) {
            [pair[0], pair[1]] = kernel.interleave([pair[0], pair[1]]);
        }
    }
}

/// Sums out of the order of [`Kernel::multiply_rows`].
#[inline(always)]
fn separate_rows<K: Kernel, const NR: usize>(kernel: K, acc: &mut [[Vector<K>; NR]]) {
    if K::SIDE == 2 {
        for pair in acc.chunks_exact_mut(2) {
            if let [upper, lower] = pair {
                for (upper, lower) in upper.iter_mut().zip(lower) {
                    [*upper, *lower] = kernel.separate_rows([*upper, *lower]);
                }
            }
        }
    }
}

/// What the rows of [`product`] must be a multiple of.
pub(super) const fn side<K: Kernel>() -> usize {
    if K::TILE > 0 { K::TILE } else { K::SIDE }
}

/// The product over `steps` words: row `r`'s word `k` is `a[r * row + k]`, and `b` holds `NR` vectors
/// for each step, brought into order by [`interleave`]. [`side`] divides `MR` and `steps`.
#[inline(always)]
pub(super) unsafe fn product<K: Kernel, const MR: usize, const NR: usize>(
    kernel: K,
    steps: usize,
    row: usize,
    mut a: *const u32,
    mut b: *const u32,
) -> [[Vector<K>; NR]; MR] {
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    if K::TILE > 0 {
        let mut sums = MaybeUninit::<[[Vector<K>; NR]; MR]>::uninit();
        // SAFETY: the caller's addresses cover `steps` steps; `MR` is `TILE`, and all sums are written.
        return unsafe {
            kernel.product_of_tiles::<NR>(steps, row, a, b, sums.as_mut_ptr().cast());
            sums.assume_init()
        };
    }
    let mut acc = [[s.splat(0.0); NR]; MR];
    for _ in 0..steps / K::SIDE {
        for part in 0..K::SIDE {
            // SAFETY: the caller's addresses cover `steps` steps.
            unsafe {
                let mut column = [s.splat(0.0); NR];
                for (j, column) in column.iter_mut().enumerate() {
                    *column = s.load(b.cast::<f32>().add(j * lanes));
                }
                for (i, rows) in acc.chunks_exact_mut(K::SIDE).enumerate() {
                    let words = kernel.rows_at(a.add(i * K::SIDE * row), row);
                    for (acc, column) in rows[part].iter_mut().zip(column) {
                        *acc = kernel.multiply_rows(words, column, *acc);
                    }
                }
                b = b.add(NR * lanes);
            }
        }
        a = a.wrapping_add(K::SIDE);
    }
    separate_rows(kernel, &mut acc);
    acc
}
