//! Products with a strip of K and V as they lie in memory. With few query rows, packing would cost
//! more than it saves: each key is read once, and what counts is memory bandwidth.

use half::{bf16, f16};

use super::call::{Call, STRIP};
use super::micro::{Kernel, Vector};
use super::simd::{Elem, Simd};
use super::step::{Products, QUERY_ROW, Strip};
use crate::DType;

/// Most query rows of a unit whose K and V are not packed.
pub(super) const FEW_ROWS: usize = 8;

/// Most query rows that go over a strip together.
pub(super) const ROWS_AT_ONCE: usize = 4;

/// Keys whose values are added up in registers before the next columns are.
const KEYS: usize = 32;

/// How many keys ahead memory is asked for: the processor's own prefetcher falls behind when each
/// key is worked on for several rows.
const AHEAD: usize = 32;

/// Vectors of columns that are added up together.
const COLUMNS: usize = 4;

/// A strip of K and V where the caller has them.
#[derive(Debug, Clone, Copy)]
pub(super) struct InPlace {
    /// Elements before the strip's first key, and before its values.
    pub(super) k: usize,
    pub(super) v: usize,
    /// Keys that are there.
    pub(super) count: usize,
}

/// Runs a function with the type of K and V.
macro_rules! by_dtype {
    ($call:expr, $kernel:ty, $run:ident::<$($arg:tt),*>($($value:expr),*)) => {
        match $call.problem.kv_dtype() {
            DType::BF16 => $run::<$kernel, bf16, $($arg),*>($($value),*),
            // Units of two elements exist for bf16 only.
            DType::F16 if <$kernel>::PAIR == 1 => $run::<$kernel, f16, $($arg),*>($($value),*),
            _ if <$kernel>::PAIR == 1 => $run::<$kernel, f32, $($arg),*>($($value),*),
            _ => {}
        }
    };
}

impl Strip for InPlace {
    #[inline(always)]
    unsafe fn scores<K: Kernel, const MR: usize, const NR: usize>(
        self,
        kernel: K,
        of: &Products<'_>,
    ) {
        // SAFETY: as promised by the caller.
        unsafe { by_dtype!(of.call, K, scores::<MR, NR>(self, kernel, of)) }
    }

    #[inline(always)]
    unsafe fn values<K: Kernel, const MR: usize, const NR: usize>(
        self,
        kernel: K,
        of: &Products<'_>,
    ) {
        // SAFETY: as promised by the caller.
        unsafe { by_dtype!(of.call, K, values::<MR, NR>(self, kernel, of)) }
    }
}

/// Asks for the cache lines of `count` elements.
#[inline(always)]
fn ask_for<S: Simd, T>(s: S, at: *const T, count: usize) {
    for i in (0..count).step_by(64 / size_of::<T>()) {
        s.prefetch(at.wrapping_add(i).cast());
    }
}

#[inline(always)]
unsafe fn scores<K: Kernel, T: Elem, const MR: usize, const NR: usize>(
    strip: InPlace,
    kernel: K,
    of: &Products<'_>,
) {
    let call: &Call<'_> = of.call;
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    let keys = call.at.k.cast::<T>().wrapping_add(strip.k);
    let scale = s.splat(call.scale);
    for first in (of.all.first * NR..of.all.end * NR).map(|vector| vector * lanes) {
        let there = strip.count.saturating_sub(first).min(lanes);
        for r in 0..MR {
            let mut sums = s.zeros();
            for c in (0..call.dim_units).step_by(lanes) {
                if r == 0 {
                    // In the order of addresses, a share with each step.
                    let share =
                        |c: usize| first + AHEAD + c.min(call.dim_units) * lanes / call.dim_units;
                    for key in share(c)..share(c + lanes) {
                        ask_for(s, keys.wrapping_add(key * call.key_stride), call.dim);
                    }
                }
                // SAFETY: the keys are there, and so are the queries.
                unsafe {
                    let query = s.load(of.queries.add(r * QUERY_ROW + c).cast());
                    let add = |i: usize, sum: &mut Vector<K>| {
                        let at = keys.add((first + i) * call.key_stride + c * K::PAIR);
                        let key = kernel.row_units(at, call.dim_units - c);
                        *sum = kernel.multiply(query, key, *sum);
                    };
                    if there == lanes {
                        for (i, sum) in sums.as_mut().iter_mut().enumerate() {
                            add(i, sum);
                        }
                    } else {
                        for (i, sum) in sums.as_mut().iter_mut().take(there).enumerate() {
                            add(i, sum);
                        }
                    }
                }
            }
            let sum = s
                .transpose(sums)
                .as_ref()
                .iter()
                .fold(s.splat(0.0), |sum, v| s.add(sum, *v));
            // SAFETY: the vector lies in the strip's scores.
            unsafe { s.store(of.scores.add(r * STRIP + first), s.mul(sum, scale)) };
        }
    }
}

#[inline(always)]
unsafe fn values<K: Kernel, T: Elem, const MR: usize, const NR: usize>(
    strip: InPlace,
    kernel: K,
    of: &Products<'_>,
) {
    let lanes = <K::S as Simd>::LANES;
    let width = COLUMNS * lanes;
    let dim = of.call.dim;
    let end = (of.all.end * NR * lanes).min(strip.count);
    for first in (of.all.first * NR * lanes..end).step_by(KEYS) {
        let keys = first..(first + KEYS).min(end);
        // SAFETY: rows, keys and columns are there.
        unsafe {
            for column in (0..dim / width * width).step_by(width) {
                columns::<K, T, MR, COLUMNS>(strip, kernel, of, keys.clone(), column);
            }
            for column in (dim / width * width..dim).step_by(lanes) {
                columns::<K, T, MR, 1>(strip, kernel, of, keys.clone(), column);
            }
        }
    }
}

#[inline(always)]
unsafe fn columns<K: Kernel, T: Elem, const MR: usize, const NV: usize>(
    strip: InPlace,
    kernel: K,
    of: &Products<'_>,
    keys: std::ops::Range<usize>,
    column: usize,
) {
    let call: &Call<'_> = of.call;
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    let values = call.at.v.cast::<T>().wrapping_add(strip.v + column);
    let mut acc: [[Vector<K>; NV]; MR] = [[s.splat(0.0); NV]; MR];
    for key in keys.step_by(K::PAIR) {
        // SAFETY: the keys below `count` are there, and so are the columns; probabilities are set
        // in all panels.
        unsafe {
            let row = |key: usize, j: usize| {
                if key < strip.count {
                    values.add(key * call.value_stride + j * lanes)
                } else {
                    std::ptr::null()
                }
            };
            for i in 0..K::PAIR {
                let ahead = values.wrapping_add((key + i + AHEAD) * call.value_stride);
                ask_for(s, ahead, NV * lanes);
            }
            let p = of.scores.cast::<u32>().add(key / K::PAIR);
            let p: [Vector<K>; MR] = std::array::from_fn(|r| kernel.broadcast(p.add(r * STRIP)));
            for j in 0..NV {
                let units = kernel.value_units([row(key, j), row(key + 1, j)]);
                for (acc, p) in acc.iter_mut().zip(p) {
                    acc[j] = kernel.multiply(p, units, acc[j]);
                }
            }
        }
    }
    for (r, row) in acc.iter().enumerate() {
        for (j, x) in row.iter().enumerate() {
            // SAFETY: the outputs are there.
            unsafe {
                let at = of.outputs.add(r * call.dim + column + j * lanes);
                s.store(at, s.add(s.load(at), *x));
            }
        }
    }
}
