//! Vectors as arrays, in plain Rust: for processors without a kernel of their own, and for Miri.

use std::array::from_fn;

use half::{bf16, f16};

use super::math;
use super::simd::Simd;

const LANES: usize = 4;

/// Plain Rust is everywhere.
#[derive(Debug, Clone, Copy)]
pub(super) struct Portable;

type V = [f32; LANES];

#[inline(always)]
fn bits(f: impl Fn(usize) -> bool) -> u32 {
    (0..LANES).fold(0, |m, i| m | u32::from(f(i)) << i)
}

#[inline(always)]
unsafe fn read<T: Copy>(at: *const T) -> [T; LANES] {
    // SAFETY: the caller's address covers a vector.
    from_fn(|i| unsafe { *at.add(i) })
}

#[inline(always)]
unsafe fn write<T: Copy>(at: *mut T, values: [T; LANES]) {
    for (i, value) in values.into_iter().enumerate() {
        // SAFETY: the caller's address covers a vector.
        unsafe { *at.add(i) = value };
    }
}

impl Simd for Portable {
    type V = V;
    type Block = [V; LANES];
    const LANES: usize = LANES;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    fn iota(self) -> V {
        from_fn(|i| i as f32)
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn abs(self, a: V) -> V {
        a.map(f32::abs)
    }
    // Not `mul_add`: without the instruction that is a library call.
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn gt(self, a: V, b: V) -> u32 {
        bits(|i| a[i] > b[i])
    }
    #[inline(always)]
    fn ne(self, a: V, b: V) -> u32 {
        bits(|i| a[i] != b[i])
    }
    #[inline(always)]
    fn pick(self, bits: u32, a: V, b: V) -> V {
        from_fn(|i| if bits >> i & 1 == 1 { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn pick_ne(self, a: V, b: V, x: V, y: V) -> V {
        from_fn(|i| if a[i] != b[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn hmax(self, a: V) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn hsum(self, a: V) -> f32 {
        a.into_iter().sum()
    }
    #[inline(always)]
    fn exp2<const DEGREE: usize>(self, t: V) -> V {
        // In this order NaN passes.
        let low = self.max([math::LOWEST; LANES], t);
        let shifted = self.add(low, [math::WHOLE; LANES]);
        let fraction = self.sub(low, self.sub(shifted, [math::WHOLE; LANES]));
        let octave = math::octave::<Self, DEGREE>(self, fraction);
        from_fn(|i| octave[i] * f32::from_bits(shifted[i].to_bits() << 23))
    }
    #[inline(always)]
    fn transpose(self, block: [V; LANES]) -> [V; LANES] {
        from_fn(|i| from_fn(|j| block[j][i]))
    }
    #[inline(always)]
    fn zeros(self) -> [V; LANES] {
        [[0.0; LANES]; LANES]
    }
    #[inline(always)]
    unsafe fn load(self, at: *const f32) -> V {
        // SAFETY: as promised by the caller.
        unsafe { read(at) }
    }
    #[inline(always)]
    unsafe fn store(self, at: *mut f32, v: V) {
        // SAFETY: as promised by the caller.
        unsafe { write(at, v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, at: *const bf16) -> V {
        // SAFETY: as promised by the caller.
        unsafe { read(at) }.map(|x| f32::from_bits(u32::from(x.to_bits()) << 16))
    }
    #[inline(always)]
    unsafe fn load_f16(self, at: *const f16) -> V {
        // SAFETY: as promised by the caller.
        unsafe { read(at) }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn load_bool(self, at: *const u8) -> V {
        // SAFETY: as promised by the caller.
        unsafe { read(at) }.map(|x| if x == 0 { f32::NEG_INFINITY } else { 0.0 })
    }
    #[inline(always)]
    unsafe fn store_bf16(self, at: *mut bf16, v: V) {
        // SAFETY: as promised by the caller.
        unsafe { write(at, v.map(bf16::from_f32)) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, at: *mut f16, v: V) {
        // SAFETY: as promised by the caller.
        unsafe { write(at, v.map(f16::from_f32)) }
    }
}
