//! exp2 and tanh on vectors.
//!
//! exp2 is a minimax polynomial over one octave, centred on 0 and exact there (a row that sees one
//! key must give that key's value to the bit), and a scaling by the whole part. Of
//! degree 5 its relative error is at most 1.1e-7 before rounding (3 ulp after it), of degree 4 at
//! most 2.9e-6: far below the rounding of probabilities to bf16 (2e-3) that degree 4 serves.

use super::simd::Simd;

/// `log2(e)`.
pub(super) const LOG2_E: f32 = std::f32::consts::LOG2_E;

const DEGREE_4: [f32; 5] = [1.0, 0.693_124_2, 0.240_240_99, 0.055_906_426, 0.009_582_853];
// Fitted: near ln 2, not ln 2.
#[allow(clippy::approx_constant)]
const DEGREE_5: [f32; 6] = [
    1.0,
    0.693_147,
    0.240_222_42,
    0.055_507_336,
    0.009_671_513,
    0.001_326_472_7,
];

/// `2^f` for `f` in `[-0.5, 0.5]`.
#[inline(always)]
pub(super) fn octave<S: Simd, const DEGREE: usize>(s: S, f: S::V) -> S::V {
    let coefficients: &[f32] = if DEGREE == 4 { &DEGREE_4 } else { &DEGREE_5 };
    let mut sum = s.splat(coefficients[DEGREE]);
    let mut i = DEGREE;
    while i > 0 {
        i -= 1;
        sum = s.fma(sum, f, s.splat(coefficients[i]));
    }
    sum
}

/// What adding pushes the fraction of a small number out of an f32, leaving in the low bits its whole
/// part, and with it the bias of an f32's exponent: moved up to the exponent, they are its power of 2.
pub(super) const WHOLE: f32 = 12_582_912.0 + 127.0;

/// Exponents are cut off here: the power is then exactly 0.
pub(super) const LOWEST: f32 = -127.0;

/// `tanh(x) = x (1 + x^2 P(x^2))` near 0; P to 7e-9 of the result.
const TANH: [f32; 5] = [
    -0.333_332_65,
    0.133_309_29,
    -0.053_694_83,
    0.020_488_154,
    -0.005_533_064,
];
const TANH_POLYNOMIAL_BELOW: f32 = 0.65;

/// `tanh(x)`, to about 2e-7 of itself.
#[inline(always)]
pub(super) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let size = s.abs(x);
    let z = s.mul(x, x);
    let mut sum = s.splat(TANH[4]);
    let mut i = 4;
    while i > 0 {
        i -= 1;
        sum = s.fma(sum, z, s.splat(TANH[i]));
    }
    let near = s.fma(s.mul(sum, z), x, x);
    let e = s.exp2::<5>(s.mul(size, s.splat(-2.0 * LOG2_E)));
    let one = s.splat(1.0);
    let far = s.div(s.sub(one, e), s.add(one, e));
    let zero = s.splat(0.0);
    let far = s.pick(s.gt(zero, x), s.sub(zero, far), far);
    s.pick(s.gt(s.splat(TANH_POLYNOMIAL_BELOW), size), near, far)
}
