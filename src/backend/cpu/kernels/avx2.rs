//! AVX2 with FMA and F16C.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::math;
use super::simd::{Simd, intrinsics};

/// Proof that the processor has AVX2, FMA and F16C.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The processor has these features.
    #[inline(always)]
    pub(super) unsafe fn assume() -> Self {
        Self(())
    }
}

impl Simd for Avx2 {
    type V = __m256;
    type Block = [__m256; 8];
    const LANES: usize = 8;

    intrinsics! {
        fn splat(self, x: f32) -> __m256 = _mm256_set1_ps(x);
        fn iota(self) -> __m256 = _mm256_setr_ps(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0);
        fn add(self, a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        fn sub(self, a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        fn mul(self, a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        fn div(self, a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        fn max(self, a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
        fn min(self, a: __m256, b: __m256) -> __m256 = _mm256_min_ps(a, b);
        fn abs(self, a: __m256) -> __m256 = _mm256_andnot_ps(_mm256_set1_ps(-0.0), a);
        fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        fn gt(self, a: __m256, b: __m256) -> u32 =
            _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_GT_OQ>(a, b)) as u32;
        fn ne(self, a: __m256, b: __m256) -> u32 =
            _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NEQ_UQ>(a, b)) as u32;
        fn pick(self, bits: u32, a: __m256, b: __m256) -> __m256 = {
            let lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
            let set = _mm256_and_si256(_mm256_set1_epi32(bits as i32), lane);
            _mm256_blendv_ps(b, a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)))
        };
        fn pick_ne(self, a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 =
            _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_NEQ_UQ>(a, b));
        fn hmax(self, a: __m256) -> f32 = {
            let half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)))
        };
        fn hsum(self, a: __m256) -> f32 = {
            let half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
        };
        fn exp2<const DEGREE>(self, t: __m256) -> __m256 = {
            // In this order NaN passes.
            let low = _mm256_max_ps(_mm256_set1_ps(math::LOWEST), t);
            let magic = _mm256_set1_ps(math::WHOLE);
            let shifted = _mm256_add_ps(low, magic);
            let fraction = _mm256_sub_ps(low, _mm256_sub_ps(shifted, magic));
            let octave = math::octave::<Self, DEGREE>(Self(()), fraction);
            let power = _mm256_slli_epi32::<23>(_mm256_castps_si256(shifted));
            _mm256_mul_ps(octave, _mm256_castsi256_ps(power))
        };
        fn transpose(self, b: [__m256; 8]) -> [__m256; 8] = transpose(b);
        fn zeros(self) -> [__m256; 8] = [_mm256_setzero_ps(); 8];
        fn prefetch(self, at: *const u8) = _mm_prefetch::<_MM_HINT_T0>(at.cast());
        fn prefetch_far(self, at: *const u8) = _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    intrinsics! { memory:
        fn load(self, at: *const f32) -> __m256 = _mm256_loadu_ps(at);
        fn store(self, at: *mut f32, v: __m256) = _mm256_storeu_ps(at, v);
        fn load_bf16(self, at: *const bf16) -> __m256 = {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        };
        fn load_f16(self, at: *const f16) -> __m256 = _mm256_cvtph_ps(_mm_loadu_si128(at.cast()));
        fn splat_f16(self, at: *const u8) -> __m256 = {
            let bits = i32::from(i16::from_le_bytes(at.cast::<[u8; 2]>().read()));
            _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)))
        };
        fn load_i8(self, at: *const i8) -> __m256 =
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast())));
        fn load_low_halves(self, at: *const u8) -> __m256 = {
            let low = _mm_and_si128(_mm_loadl_epi64(at.cast()), _mm_set1_epi8(15));
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low))
        };
        fn load_high_halves(self, at: *const u8) -> __m256 = {
            let moved = _mm_srli_epi16::<4>(_mm_loadl_epi64(at.cast()));
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_and_si128(moved, _mm_set1_epi8(15))))
        };
        fn load_bool(self, at: *const u8) -> __m256 = {
            let wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(at.cast()));
            let hidden = _mm256_cmpeq_epi32(wide, _mm256_setzero_si256());
            _mm256_and_ps(_mm256_castsi256_ps(hidden), _mm256_set1_ps(f32::NEG_INFINITY))
        };
        fn store_bf16(self, at: *mut bf16, v: __m256) = {
            let u = _mm256_castps_si256(v);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(u), _mm256_set1_epi32(1));
            let up = _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff));
            // Rounding carries a NaN's bits over into its exponent and sign; it is made quiet instead.
            let quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x0040_0000));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let top = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(up, quiet, nan));
            let low = _mm256_castsi256_si128(top);
            let packed = _mm_packus_epi32(low, _mm256_extracti128_si256::<1>(top));
            _mm_storeu_si128(at.cast(), packed)
        };
        fn store_f16(self, at: *mut f16, v: __m256) = _mm_storeu_si128(
            at.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v));
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn transpose(r: [__m256; 8]) -> [__m256; 8] {
    let mut t = r;
    for i in 0..4 {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    let mut u = t;
    for i in 0..2 {
        let a = 4 * i;
        u[a] = _mm256_shuffle_ps::<0x44>(t[a], t[a + 2]);
        u[a + 1] = _mm256_shuffle_ps::<0xee>(t[a], t[a + 2]);
        u[a + 2] = _mm256_shuffle_ps::<0x44>(t[a + 1], t[a + 3]);
        u[a + 3] = _mm256_shuffle_ps::<0xee>(t[a + 1], t[a + 3]);
    }
    let mut out = u;
    for j in 0..4 {
        out[j] = _mm256_permute2f128_ps::<0x20>(u[j], u[4 + j]);
        out[4 + j] = _mm256_permute2f128_ps::<0x31>(u[j], u[4 + j]);
    }
    out
}
