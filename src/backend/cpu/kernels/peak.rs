//! How fast the micro-kernel runs when its operands stay in the first-level cache: the ceiling that
//! benchmarks are held against.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::buffer::Buffer;
use super::micro::{self, Kernel};
use super::simd::Simd;

/// Words of the inner loop: A and B together take well under 32 KiB.
const STEPS: usize = 128;

/// How long one measurement takes, and how many there are.
const LENGTH: Duration = Duration::from_millis(25);
const REPEATS: usize = 5;

/// Runs the micro-kernel `rounds` times and gives the operations done.
#[inline(always)]
pub(super) unsafe fn rounds<K: Kernel, const MR: usize, const NR: usize>(
    kernel: K,
    rounds: usize,
) -> f64 {
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    let (mut a, mut b) = (Buffer::default(), Buffer::default());
    let (a, b) = (a.reserve(MR * STEPS), b.reserve(STEPS * NR * lanes));
    let mut totals = [[s.splat(0.0); NR]; MR];
    kernel.open_tiles();
    for _ in 0..rounds {
        // SAFETY: A holds `MR` rows of `STEPS` words, B `NR` vectors for each step.
        let sums = unsafe { micro::product::<K, MR, NR>(kernel, STEPS, STEPS, black_box(a), b) };
        for (totals, sums) in totals.iter_mut().zip(sums) {
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total = s.add(*total, sum);
            }
        }
    }
    kernel.close_tiles();
    for total in totals.iter().flatten() {
        black_box(s.hsum(*total));
    }
    2.0 * (rounds * STEPS * K::PAIR * MR * NR * lanes) as f64
}

/// Operations a second on all threads of the current rayon pool: the best of a few measurements.
///
/// # Safety
/// `rounds` is [`rounds`] for an instruction set that this processor has.
pub(super) unsafe fn measure(rounds: unsafe fn(usize) -> f64) -> f64 {
    let once = || {
        let begun = Instant::now();
        let mut operations = 0.0;
        while begun.elapsed() < LENGTH {
            // SAFETY: as promised by the caller.
            operations += unsafe { rounds(256) };
        }
        operations / begun.elapsed().as_secs_f64()
    };
    (0..REPEATS)
        .map(|_| rayon::broadcast(|_| once()).into_iter().sum())
        .fold(0.0, f64::max)
}
