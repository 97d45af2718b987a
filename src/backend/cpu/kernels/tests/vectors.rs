//! The vector functions of each instruction set against f64.

use half::{bf16, f16};

use super::harness::isas;
use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::kernels::math;
use crate::backend::cpu::kernels::portable::Portable;
use crate::backend::cpu::kernels::simd::{Elem, Simd};

/// Something to do with vectors.
trait Task {
    fn run<S: Simd>(&self, s: S);
}

/// Runs a task for each instruction set here.
/// Every how many-th value of a sweep is taken: all, but few where they are interpreted, which takes hours.
const APART: usize = if cfg!(miri) { 97 } else { 1 };

fn everywhere(task: &impl Task) {
    for isa in isas() {
        // SAFETY: this machine has the instruction set.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 => task.run(crate::backend::cpu::kernels::avx2::Avx2::assume()),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => task.run(crate::backend::cpu::kernels::avx512::Avx512::assume()),
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512Bf16 | Isa::AmxBf16 => {}
                #[cfg(target_arch = "aarch64")]
                Isa::NeonBf16 => {}
                #[cfg(target_arch = "aarch64")]
                Isa::Neon => task.run(crate::backend::cpu::kernels::neon::Neon::assume()),
                _ => task.run(Portable),
            }
        }
    }
}

fn lanes<S: Simd>(s: S, v: S::V) -> Vec<f32> {
    let mut out = vec![0.0f32; S::LANES];
    // SAFETY: `out` has room for a vector.
    unsafe { s.store(out.as_mut_ptr(), v) };
    out
}

/// Largest error in units of the last place of the exact value.
fn ulps(got: f32, exact: f64) -> f64 {
    let ulp = (exact.abs().log2().floor() - 23.0).exp2();
    (f64::from(got) - exact).abs() / ulp
}

struct Exp2;
impl Task for Exp2 {
    fn run<S: Simd>(&self, s: S) {
        let (mut worst, mut coarse) = (0.0f64, 0.0f64);
        let mut t = 0.0f32;
        while t > -125.9 {
            let (fine, rough) = (
                lanes(s, s.exp2::<5>(s.splat(t)))[0],
                lanes(s, s.exp2::<4>(s.splat(t)))[0],
            );
            let exact = f64::from(t).exp2();
            worst = worst.max(ulps(fine, exact));
            coarse = coarse.max((f64::from(rough) / exact - 1.0).abs());
            t -= 0.000_37 * APART as f32;
        }
        assert!(worst <= 3.0, "{worst} ulp");
        assert!(coarse <= 2.9e-6, "{coarse}");
        for zero in [-200.0, -1e9, -f32::MAX, f32::NEG_INFINITY] {
            assert_eq!(
                lanes(s, s.exp2::<5>(s.splat(zero)))[0].to_bits(),
                0,
                "{zero}"
            );
            assert_eq!(
                lanes(s, s.exp2::<4>(s.splat(zero)))[0].to_bits(),
                0,
                "{zero}"
            );
        }
        for nan in [
            0x7fc0_0000,
            0xffc0_0000,
            0x7fff_ffff,
            0xff80_0001,
            0x7f81_0155,
        ] {
            let nan = s.splat(f32::from_bits(nan));
            assert!(lanes(s, s.exp2::<5>(nan)).iter().all(|x| x.is_nan()));
            assert!(lanes(s, s.exp2::<4>(nan)).iter().all(|x| x.is_nan()));
        }
        for tiny in [-126.0, -127.5, -149.0, -151.0] {
            let got = f64::from(lanes(s, s.exp2::<5>(s.splat(tiny)))[0]);
            assert!(
                (0.0..=f64::from(tiny).exp2() * 1.01 + 2e-45).contains(&got),
                "{tiny} {got}"
            );
        }
    }
}

#[test]
fn exp2_is_within_three_ulps_and_vanishes_at_minus_infinity() {
    everywhere(&Exp2);
}

struct Tanh;
impl Task for Tanh {
    fn run<S: Simd>(&self, s: S) {
        let mut worst = 0.0f64;
        for i in (-40_000..40_000).step_by(APART) {
            let x = i as f32 * 0.000_5;
            let got = lanes(s, math::tanh(s, s.splat(x)))[0];
            let exact = f64::from(x).tanh();
            if exact != 0.0 {
                worst = worst.max((f64::from(got) / exact - 1.0).abs());
            }
        }
        assert!(worst <= 4e-7, "{worst}");
        for (x, y) in [(1e30, 1.0), (-1e30, -1.0), (0.0, 0.0), (f32::INFINITY, 1.0)] {
            assert_eq!(lanes(s, math::tanh(s, s.splat(x)))[0], y);
        }
        assert_eq!(lanes(s, math::tanh(s, s.splat(1e-20)))[0], 1e-20);
    }
}

#[test]
fn tanh_is_accurate_everywhere() {
    everywhere(&Tanh);
}

struct Conversions;
impl Task for Conversions {
    fn run<S: Simd>(&self, s: S) {
        for start in (0..=u16::MAX).step_by(S::LANES).step_by(APART) {
            let bits: Vec<u16> = (0..S::LANES as u16).map(|i| start + i).collect();
            let (b, h): (Vec<bf16>, Vec<f16>) = bits
                .iter()
                .map(|x| (bf16::from_bits(*x), f16::from_bits(*x)))
                .unzip();
            // SAFETY: each slice holds a vector.
            let (from_b, from_h) = unsafe { (s.load_bf16(b.as_ptr()), s.load_f16(h.as_ptr())) };
            let (mut to_b, mut to_h) = (b.clone(), h.clone());
            // SAFETY: as above.
            unsafe {
                bf16::store(s, to_b.as_mut_ptr(), from_b);
                f16::store(s, to_h.as_mut_ptr(), from_h);
            }
            for i in 0..S::LANES {
                let (x, y) = (lanes(s, from_b)[i], lanes(s, from_h)[i]);
                if !x.is_nan() {
                    assert_eq!((x, to_b[i].to_bits()), (b[i].to_f32(), b[i].to_bits()));
                }
                if !y.is_nan() {
                    assert_eq!((y, to_h[i].to_bits()), (h[i].to_f32(), h[i].to_bits()));
                }
            }
        }
        // Ties, overflow and subnormals.
        let cases = [
            257.0 / 256.0,
            259.0 / 256.0,
            65_519.9,
            65_520.0,
            3e-8,
            2.98e-8,
            1e-40,
            -0.0,
        ];
        for x in cases {
            let (mut b, mut h) = (vec![bf16::ZERO; S::LANES], vec![f16::ZERO; S::LANES]);
            // SAFETY: each slice holds a vector.
            unsafe {
                s.store_bf16(b.as_mut_ptr(), s.splat(x));
                s.store_f16(h.as_mut_ptr(), s.splat(x));
            }
            assert_eq!(b[0].to_bits(), bf16::from_f32(x).to_bits(), "{x}");
            assert_eq!(h[0].to_bits(), f16::from_f32(x).to_bits(), "{x}");
        }
        // A NaN of any bits stays one: all of the fraction, its last bit, either sign.
        for bits in [
            0x7fff_ffff,
            0xffff_ffff,
            0x7fff_8000,
            0x7f80_0001,
            0xffc0_0000,
        ] {
            let mut b = vec![bf16::ZERO; S::LANES];
            // SAFETY: the slice holds a vector.
            unsafe { s.store_bf16(b.as_mut_ptr(), s.splat(f32::from_bits(bits))) };
            assert!(b.iter().all(|x| x.is_nan()), "{bits:x}: {}", b[0]);
        }
    }
}

#[test]
fn conversions_are_exact_and_round_to_even() {
    everywhere(&Conversions);
}

struct Lanes;
impl Task for Lanes {
    fn run<S: Simd>(&self, s: S) {
        let n = S::LANES;
        let mut block = s.zeros();
        for (r, v) in block.as_mut().iter_mut().enumerate() {
            *v = s.add(s.iota(), s.splat((100 * r) as f32));
        }
        for (r, v) in s.transpose(block).as_ref().iter().enumerate() {
            let expected: Vec<f32> = (0..n).map(|i| (100 * i + r) as f32).collect();
            assert_eq!(lanes(s, *v), expected);
        }
        let (up, half) = (s.iota(), s.splat(1.5));
        let all = (1u32 << n) - 1;
        assert_eq!(s.gt(up, half), all & !3);
        assert_eq!(s.ne(up, s.splat(2.0)), all & !4);
        assert_eq!(s.gt(half, s.splat(f32::NEG_INFINITY)), all);
        let picked = lanes(s, s.pick(0b0101, up, half));
        assert_eq!(picked[..4], [0.0, 1.5, 2.0, 1.5]);
        assert_eq!(
            (s.hmax(up), s.hsum(up)),
            ((n - 1) as f32, (n * (n - 1) / 2) as f32)
        );
        let bools: Vec<u8> = (0..n as u8).map(|i| (i % 3) * 77).collect();
        // SAFETY: the slice holds a vector.
        let got = lanes(s, unsafe { s.load_bool(bools.as_ptr()) });
        for (b, x) in bools.iter().zip(got) {
            assert_eq!(
                x.to_bits(),
                if *b == 0 {
                    f32::NEG_INFINITY.to_bits()
                } else {
                    0
                }
            );
        }
    }
}

#[test]
fn lanes_move_where_they_should() {
    everywhere(&Lanes);
}
