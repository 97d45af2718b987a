//! AVX-512 F, BW, DQ and VL.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::math;
use super::simd::{Simd, intrinsics};

/// Proof that the processor has AVX-512 F, BW, DQ and VL.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The processor has these features.
    #[inline(always)]
    pub(super) unsafe fn assume() -> Self {
        Self(())
    }
}

impl Simd for Avx512 {
    type V = __m512;
    type Block = [__m512; 16];
    const LANES: usize = 16;

    intrinsics! {
        fn splat(self, x: f32) -> __m512 = _mm512_set1_ps(x);
        fn iota(self) -> __m512 = _mm512_cvtepi32_ps(
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        fn add(self, a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        fn sub(self, a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        fn mul(self, a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        fn div(self, a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        fn max(self, a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        fn min(self, a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
        fn abs(self, a: __m512) -> __m512 = _mm512_abs_ps(a);
        fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        fn gt(self, a: __m512, b: __m512) -> u32 =
            u32::from(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b));
        fn ne(self, a: __m512, b: __m512) -> u32 =
            u32::from(_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(a, b));
        fn pick(self, bits: u32, a: __m512, b: __m512) -> __m512 =
            _mm512_mask_blend_ps(bits as u16, b, a);
        fn pick_ne(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 =
            _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(a, b), y, x);
        fn hmax(self, a: __m512) -> f32 = _mm512_reduce_max_ps(a);
        fn hsum(self, a: __m512) -> f32 = _mm512_reduce_add_ps(a);
        fn exp2<const DEGREE>(self, t: __m512) -> __m512 = {
            // The fraction of -inf comes as 0.
            let fraction = _mm512_reduce_ps::<_MM_FROUND_TO_NEAREST_INT>(t);
            let whole = _mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(t);
            let octave = math::octave::<Self, DEGREE>(Self(()), fraction);
            _mm512_scalef_ps(octave, whole)
        };
        fn transpose(self, b: [__m512; 16]) -> [__m512; 16] = transpose(b);
        fn zeros(self) -> [__m512; 16] = [_mm512_setzero_ps(); 16];
        fn prefetch(self, at: *const u8) = _mm_prefetch::<_MM_HINT_T0>(at.cast());
        fn prefetch_far(self, at: *const u8) = _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    intrinsics! { memory:
        fn load(self, at: *const f32) -> __m512 = _mm512_loadu_ps(at);
        fn store(self, at: *mut f32, v: __m512) = _mm512_storeu_ps(at, v);
        fn load_bf16(self, at: *const bf16) -> __m512 = {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        };
        fn load_f16(self, at: *const f16) -> __m512 =
            _mm512_cvtph_ps(_mm256_loadu_si256(at.cast()));
        fn splat_f16(self, at: *const u8) -> __m512 = {
            let bits = i32::from(i16::from_le_bytes(at.cast::<[u8; 2]>().read()));
            _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)))
        };
        fn load_i8(self, at: *const i8) -> __m512 =
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast())));
        fn load_low_halves(self, at: *const u8) -> __m512 = {
            let low = _mm_and_si128(_mm_loadu_si128(at.cast()), _mm_set1_epi8(15));
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(low))
        };
        fn load_high_halves(self, at: *const u8) -> __m512 = {
            let moved = _mm_srli_epi16::<4>(_mm_loadu_si128(at.cast()));
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_and_si128(moved, _mm_set1_epi8(15))))
        };
        fn load_bool(self, at: *const u8) -> __m512 = {
            let hidden = _mm_testn_epi8_mask(_mm_loadu_si128(at.cast()), _mm_set1_epi8(-1));
            _mm512_maskz_mov_ps(hidden, _mm512_set1_ps(f32::NEG_INFINITY))
        };
        // Not `vcvtneps2bf16`, which flushes subnormals.
        fn store_bf16(self, at: *mut bf16, v: __m512) = {
            let u = _mm512_castps_si512(v);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(u), _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff));
            // Rounding carries a NaN's bits over into its exponent and sign; it is made quiet instead.
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let top = _mm512_mask_or_epi32(up, nan, u, _mm512_set1_epi32(0x0040_0000));
            _mm256_storeu_si256(at.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(top)))
        };
        fn store_f16(self, at: *mut f16, v: __m512) = _mm256_storeu_si256(
            at.cast(), _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v));
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: [__m512; 16]) -> [__m512; 16] {
    let d = _mm512_castps_pd;
    let s = _mm512_castpd_ps;
    let mut t = r;
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    // Lane quads: `u[4 i + j]` holds columns `j`, `j + 4`, .. of rows `4 i .. 4 i + 4`.
    let mut u = t;
    for i in 0..4 {
        let (a, b) = (4 * i, 4 * i + 2);
        u[4 * i] = s(_mm512_unpacklo_pd(d(t[a]), d(t[b])));
        u[4 * i + 1] = s(_mm512_unpackhi_pd(d(t[a]), d(t[b])));
        u[4 * i + 2] = s(_mm512_unpacklo_pd(d(t[a + 1]), d(t[b + 1])));
        u[4 * i + 3] = s(_mm512_unpackhi_pd(d(t[a + 1]), d(t[b + 1])));
    }
    let mut out = u;
    for j in 0..4 {
        let (a, b, c, e) = (u[j], u[4 + j], u[8 + j], u[12 + j]);
        let (ab_low, ab_high) = (
            _mm512_shuffle_f32x4::<0x88>(a, b),
            _mm512_shuffle_f32x4::<0xdd>(a, b),
        );
        let (ce_low, ce_high) = (
            _mm512_shuffle_f32x4::<0x88>(c, e),
            _mm512_shuffle_f32x4::<0xdd>(c, e),
        );
        out[j] = _mm512_shuffle_f32x4::<0x88>(ab_low, ce_low);
        out[8 + j] = _mm512_shuffle_f32x4::<0xdd>(ab_low, ce_low);
        out[4 + j] = _mm512_shuffle_f32x4::<0x88>(ab_high, ce_high);
        out[12 + j] = _mm512_shuffle_f32x4::<0xdd>(ab_high, ce_high);
    }
    out
}
