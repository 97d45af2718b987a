//! AVX-512 with bf16 dot products.

use std::arch::x86_64::*;

use super::avx512::Avx512;
use super::micro::{Kernel, Vector};
use super::simd::{Row, Simd};

/// bf16 dot products: a word is two bf16.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bf16Dot(Avx512);

impl Bf16Dot {
    /// # Safety
    /// The processor has AVX-512 F, BW, DQ, VL and BF16.
    #[inline(always)]
    pub(super) unsafe fn assume() -> Self {
        // SAFETY: as promised by the caller.
        Self(unsafe { Avx512::assume() })
    }
}

impl Kernel for Bf16Dot {
    type S = Avx512;
    const PAIR: usize = 2;
    const DEGREE: usize = 4;

    #[inline(always)]
    fn simd(self) -> Self::S {
        self.0
    }
    #[inline(always)]
    fn multiply(self, a: Vector<Self>, b: Vector<Self>, acc: Vector<Self>) -> Vector<Self> {
        // SAFETY: the two types have the same bits; the token proves the features.
        unsafe {
            let pairs = |v: __m512| std::mem::transmute::<__m512, __m512bh>(v);
            _mm512_dpbf16_ps(acc, pairs(a), pairs(b))
        }
    }
    #[inline(always)]
    unsafe fn row_words<T: Row>(self, row: *const T, first: usize, count: usize) -> Vector<Self> {
        // SAFETY: `count` words are there; the others are not read. T is bf16.
        unsafe {
            let at = row.cast::<f32>().add(first);
            if count >= 16 {
                self.0.load(at)
            } else {
                _mm512_maskz_loadu_ps((1u16 << count) - 1, at)
            }
        }
    }
    #[inline(always)]
    unsafe fn value_words<T: Row>(self, rows: [*const T; 2], column: usize) -> Vector<Self> {
        // SAFETY: a row that is there covers 16 columns of bf16.
        unsafe {
            let wide = |row: *const T| {
                if row.is_null() {
                    _mm512_setzero_si512()
                } else {
                    _mm512_cvtepu16_epi32(_mm256_loadu_si256(row.cast::<u16>().add(column).cast()))
                }
            };
            let odd = _mm512_slli_epi32::<16>(wide(rows[1]));
            _mm512_castsi512_ps(_mm512_or_si512(wide(rows[0]), odd))
        }
    }
    #[inline(always)]
    unsafe fn store_probabilities<const NR: usize>(self, at: *mut u32, p: [Vector<Self>; NR]) {
        for i in 0..NR / 2 {
            // SAFETY: the caller's address covers `NR / 2` vectors of words; the two types have the
            // same bits.
            unsafe {
                let pairs = _mm512_cvtne2ps_pbh(p[2 * i + 1], p[2 * i]);
                self.0.store(
                    at.cast::<f32>().add(16 * i),
                    std::mem::transmute::<__m512bh, __m512>(pairs),
                );
            }
        }
    }
}
