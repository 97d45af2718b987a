//! NEON (aarch64).

use std::arch::aarch64::*;
use std::arch::asm;

use half::{bf16, f16};

use super::math;
use super::simd::{Simd, intrinsics};

/// Proof that the processor has NEON.
#[derive(Debug, Clone, Copy)]
pub(super) struct Neon(());

impl Neon {
    /// # Safety
    /// The processor has NEON.
    #[inline(always)]
    pub(super) unsafe fn assume() -> Self {
        Self(())
    }
}

/// One bit for each lane.
const LANE_BITS: [u32; 4] = [1, 2, 4, 8];

impl Simd for Neon {
    type V = float32x4_t;
    type Block = [float32x4_t; 4];
    const LANES: usize = 4;

    intrinsics! {
        fn splat(self, x: f32) -> float32x4_t = vdupq_n_f32(x);
        fn iota(self) -> float32x4_t = vld1q_f32([0.0, 1.0, 2.0, 3.0].as_ptr());
        fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t = vaddq_f32(a, b);
        fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t = vsubq_f32(a, b);
        fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t = vmulq_f32(a, b);
        fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t = vdivq_f32(a, b);
        fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t = vmaxq_f32(a, b);
        fn min(self, a: float32x4_t, b: float32x4_t) -> float32x4_t = vminq_f32(a, b);
        fn abs(self, a: float32x4_t) -> float32x4_t = vabsq_f32(a);
        fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t =
            vfmaq_f32(c, a, b);
        fn gt(self, a: float32x4_t, b: float32x4_t) -> u32 =
            vaddvq_u32(vandq_u32(vcgtq_f32(a, b), vld1q_u32(LANE_BITS.as_ptr())));
        fn ne(self, a: float32x4_t, b: float32x4_t) -> u32 =
            vaddvq_u32(vbicq_u32(vld1q_u32(LANE_BITS.as_ptr()), vceqq_f32(a, b)));
        fn pick(self, bits: u32, a: float32x4_t, b: float32x4_t) -> float32x4_t =
            vbslq_f32(vtstq_u32(vdupq_n_u32(bits), vld1q_u32(LANE_BITS.as_ptr())), a, b);
        fn pick_ne(self, a: float32x4_t, b: float32x4_t, x: float32x4_t, y: float32x4_t)
            -> float32x4_t = vbslq_f32(vceqq_f32(a, b), y, x);
        fn hmax(self, a: float32x4_t) -> f32 = vmaxvq_f32(a);
        fn hsum(self, a: float32x4_t) -> f32 = vaddvq_f32(a);
        fn exp2<const DEGREE>(self, t: float32x4_t) -> float32x4_t = {
            let low = vmaxq_f32(t, vdupq_n_f32(math::LOWEST));
            let magic = vdupq_n_f32(math::WHOLE);
            let shifted = vaddq_f32(low, magic);
            let fraction = vsubq_f32(low, vsubq_f32(shifted, magic));
            let octave = math::octave::<Self, DEGREE>(Self(()), fraction);
            let power = vshlq_n_u32::<23>(vreinterpretq_u32_f32(shifted));
            vmulq_f32(octave, vreinterpretq_f32_u32(power))
        };
        fn transpose(self, b: [float32x4_t; 4]) -> [float32x4_t; 4] = {
            let pairs = |x, y| {
                let (x, y) = (vreinterpretq_f64_f32(x), vreinterpretq_f64_f32(y));
                (
                    vreinterpretq_f32_f64(vtrn1q_f64(x, y)),
                    vreinterpretq_f32_f64(vtrn2q_f64(x, y)),
                )
            };
            let (even, odd) = (vtrn1q_f32(b[0], b[1]), vtrn2q_f32(b[0], b[1]));
            let (even_low, odd_low) = (vtrn1q_f32(b[2], b[3]), vtrn2q_f32(b[2], b[3]));
            let ((r0, r2), (r1, r3)) = (pairs(even, even_low), pairs(odd, odd_low));
            [r0, r1, r2, r3]
        };
        fn zeros(self) -> [float32x4_t; 4] = [vdupq_n_f32(0.0); 4];
    }
    intrinsics! { memory:
        fn load(self, at: *const f32) -> float32x4_t = vld1q_f32(at);
        fn store(self, at: *mut f32, v: float32x4_t) = vst1q_f32(at, v);
        fn load_bf16(self, at: *const bf16) -> float32x4_t =
            vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(at.cast())));
        // The conversions as instructions: their intrinsics are not stable yet.
        fn load_f16(self, at: *const f16) -> float32x4_t = {
            let wide: float32x4_t;
            asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) wide, in(vreg) vld1_u16(at.cast()),
                options(pure, nomem, nostack, preserves_flags));
            wide
        };
        fn load_bool(self, at: *const u8) -> float32x4_t = {
            let bytes = vcreate_u8(u64::from(at.cast::<u32>().read_unaligned()));
            let wide = vmovl_u16(vget_low_u16(vmovl_u8(bytes)));
            let hidden = vdupq_n_u32(f32::NEG_INFINITY.to_bits());
            vreinterpretq_f32_u32(vandq_u32(vceqzq_u32(wide), hidden))
        };
        fn store_bf16(self, at: *mut bf16, v: float32x4_t) = {
            let u = vreinterpretq_u32_f32(v);
            let odd = vandq_u32(vshrq_n_u32::<16>(u), vdupq_n_u32(1));
            let up = vaddq_u32(vaddq_u32(u, odd), vdupq_n_u32(0x7fff));
            // Rounding carries a NaN's bits over into its exponent and sign; it is made quiet instead.
            let quiet = vorrq_u32(u, vdupq_n_u32(0x0040_0000));
            vst1_u16(at.cast(), vshrn_n_u32::<16>(vbslq_u32(vceqq_f32(v, v), up, quiet)))
        };
        fn store_f16(self, at: *mut f16, v: float32x4_t) = {
            let narrow: uint16x4_t;
            asm!("fcvtn {0:v}.4h, {1:v}.4s", out(vreg) narrow, in(vreg) v,
                options(pure, nomem, nostack, preserves_flags));
            vst1_u16(at.cast(), narrow)
        };
    }
}
