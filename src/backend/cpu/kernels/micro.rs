//! The micro-kernel: `MR` rows of A times `NR` vectors of B, held in registers. Both matrix products
//! use it; only where A's units lie differs.
//!
//! A unit is four bytes: one f32, or two neighbouring bf16 under a kernel with dot products.

use super::simd::{Elem, Simd};

/// How units are multiplied, on top of an instruction set's vectors.
pub(super) trait Kernel: Copy + 'static {
    type S: Simd;
    /// Elements in a unit.
    const PAIR: usize;
    /// Degree of exp2's polynomial for probabilities.
    const DEGREE: usize;

    fn simd(self) -> Self::S;
    /// `acc + a * b`, the unit at `a` taken for every lane, `b` being `LANES` units.
    fn multiply(self, a: Vector<Self>, b: Vector<Self>, acc: Vector<Self>) -> Vector<Self>;
    /// The unit at `at` in every lane.
    unsafe fn broadcast(self, at: *const u32) -> Vector<Self>;
    /// The first `count` of `LANES` units of a row of Q or K, zeros after them.
    unsafe fn row_units<T: Elem>(self, at: *const T, count: usize) -> Vector<Self>;
    /// `LANES` columns of V as units of `PAIR` keys; `rows` null where there is no key.
    unsafe fn value_units<T: Elem>(self, rows: [*const T; 2]) -> Vector<Self>;
    /// Stores `NR * LANES` probabilities as units.
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
    unsafe fn broadcast(self, at: *const u32) -> S::V {
        // SAFETY: the caller's address is a unit's.
        self.0.splat(f32::from_bits(unsafe { *at }))
    }
    #[inline(always)]
    unsafe fn row_units<T: Elem>(self, at: *const T, _: usize) -> S::V {
        // SAFETY: head dimensions are multiples of 16, so of `LANES`.
        unsafe { T::load(self.0, at) }
    }
    #[inline(always)]
    unsafe fn value_units<T: Elem>(self, rows: [*const T; 2]) -> S::V {
        if rows[0].is_null() {
            return self.0.splat(0.0);
        }
        // SAFETY: a row that is there covers `LANES` columns.
        unsafe { T::load(self.0, rows[0]) }
    }
    #[inline(always)]
    unsafe fn store_probabilities<const NR: usize>(self, at: *mut u32, p: [S::V; NR]) {
        for (i, p) in p.into_iter().enumerate() {
            // SAFETY: the caller's address covers `NR` vectors.
            unsafe { self.0.store(at.cast::<f32>().add(i * S::LANES), p) };
        }
    }
}

/// Multiplies on top of `acc` over `steps` units: row `r`'s unit `k` is `a[r * row + k]`, and `b`
/// holds `NR` vectors for each step.
#[inline(always)]
pub(super) unsafe fn product<K: Kernel, const MR: usize, const NR: usize>(
    kernel: K,
    steps: usize,
    row: usize,
    mut a: *const u32,
    mut b: *const u32,
    mut acc: [[Vector<K>; NR]; MR],
) -> [[Vector<K>; NR]; MR] {
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    for _ in 0..steps {
        // SAFETY: the caller's addresses cover `steps` steps.
        unsafe {
            let mut column = [s.splat(0.0); NR];
            for (j, column) in column.iter_mut().enumerate() {
                *column = s.load(b.cast::<f32>().add(j * lanes));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let unit = kernel.broadcast(a.add(r * row));
                for (acc, column) in acc.iter_mut().zip(column) {
                    *acc = kernel.multiply(unit, column, *acc);
                }
            }
            a = a.add(1);
            b = b.add(NR * lanes);
        }
    }
    acc
}
