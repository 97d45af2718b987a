//! NEON with bf16 products of small matrices.

use std::arch::aarch64::*;
use std::arch::asm;

use super::micro::{Kernel, Vector};
use super::neon::Neon;
use super::simd::{Row, Simd};

/// bf16 products: a word is two bf16, and a multiplication takes two words of two rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bf16Matrix(Neon);

impl Bf16Matrix {
    /// # Safety
    /// The processor has NEON and BF16.
    #[inline(always)]
    pub(super) unsafe fn assume() -> Self {
        // SAFETY: as promised by the caller.
        Self(unsafe { Neon::assume() })
    }
}

/// An instruction whose intrinsic is not stable yet: `acc` and products of bf16 in `a` and `b`.
macro_rules! accumulate {
    ($name:literal, $acc:ident, $a:ident, $b:ident) => {{
        let mut sum = $acc;
        // SAFETY: the token proves the features; registers are all it touches.
        unsafe {
            asm!(concat!($name, " {0:v}.4s, {1:v}.8h, {2:v}.8h"),
                inout(vreg) sum, in(vreg) $a, in(vreg) $b,
                options(pure, nomem, nostack, preserves_flags));
        }
        sum
    }};
}

impl Kernel for Bf16Matrix {
    type S = Neon;
    const PAIR: usize = 2;
    const SIDE: usize = 2;
    const DEGREE: usize = 4;

    #[inline(always)]
    fn simd(self) -> Self::S {
        self.0
    }
    #[inline(always)]
    fn multiply(self, a: Vector<Self>, b: Vector<Self>, acc: Vector<Self>) -> Vector<Self> {
        accumulate!("bfdot", acc, a, b)
    }
    #[inline(always)]
    fn multiply_rows(self, a: Vector<Self>, b: Vector<Self>, acc: Vector<Self>) -> Vector<Self> {
        accumulate!("bfmmla", acc, a, b)
    }
    #[inline(always)]
    unsafe fn rows_at(self, at: *const u32, row: usize) -> Vector<Self> {
        // SAFETY: two words of each row are there.
        unsafe { vcombine_f32(vld1_f32(at.cast()), vld1_f32(at.add(row).cast())) }
    }
    #[inline(always)]
    fn interleave(self, [first, second]: [Vector<Self>; 2]) -> [Vector<Self>; 2] {
        // SAFETY: the token proves the features.
        unsafe { [vzip1q_f32(first, second), vzip2q_f32(first, second)] }
    }
    #[inline(always)]
    fn separate_rows(self, [upper, lower]: [Vector<Self>; 2]) -> [Vector<Self>; 2] {
        // SAFETY: the token proves the features.
        unsafe {
            let (upper, lower) = (vreinterpretq_f64_f32(upper), vreinterpretq_f64_f32(lower));
            [
                vreinterpretq_f32_f64(vzip1q_f64(upper, lower)),
                vreinterpretq_f32_f64(vzip2q_f64(upper, lower)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn row_words<T: Row>(self, row: *const T, first: usize, _: usize) -> Vector<Self> {
        // SAFETY: head dims are multiples of 8, so the eight elements are there. T is bf16.
        unsafe { vreinterpretq_f32_u16(vld1q_u16(row.cast::<u16>().add(2 * first))) }
    }
    #[inline(always)]
    unsafe fn value_words<T: Row>(self, rows: [*const T; 2], column: usize) -> Vector<Self> {
        // SAFETY: a row that is there covers 4 columns of bf16.
        unsafe {
            let columns = |row: *const T| {
                if row.is_null() {
                    vdup_n_u16(0)
                } else {
                    vld1_u16(row.cast::<u16>().add(column))
                }
            };
            let (even, odd) = (columns(rows[0]), columns(rows[1]));
            let words = vcombine_u16(vzip1_u16(even, odd), vzip2_u16(even, odd));
            vreinterpretq_f32_u16(words)
        }
    }
    #[inline(always)]
    unsafe fn store_probabilities<const NR: usize>(self, at: *mut u32, p: [Vector<Self>; NR]) {
        for (i, p) in p.into_iter().enumerate() {
            // SAFETY: the caller's address covers `NR / 2` vectors of words; the token proves the
            // features.
            unsafe {
                let narrow: uint16x4_t;
                asm!("bfcvtn {0:v}.4h, {1:v}.4s", out(vreg) narrow, in(vreg) p,
                    options(pure, nomem, nostack, preserves_flags));
                vst1_u16(at.cast::<u16>().add(i * Neon::LANES), narrow);
            }
        }
    }
}
