//! Products with a strip of K and V as they lie in memory. With few query rows, packing would cost
//! more than it saves: each key is read once, and what counts is memory bandwidth.

use std::ops::Range;

use super::call::{Call, STRIP, Values};
use super::micro::{Kernel, Vector};
use super::products::{Products, Strip};
use super::running::GROUP;
use super::simd::{Elem, Simd};
use super::types::{Float, with_elements, with_float};

/// Keys whose values are added up in registers before the next columns are.
const KEYS: usize = 32;

/// Products that a lane of a score sums up before lanes are joined: rounding grows with their number.
const RUN: usize = 32;

/// How many keys ahead memory is asked for: the processor's own prefetcher falls behind when each
/// key is worked on for several rows.
const AHEAD: usize = 32;

/// Vectors of columns that are added up together for so many rows: they stay in registers.
const fn columns_at_once(rows: usize) -> usize {
    if rows > 4 { 2 } else { 4 }
}

/// A strip of K and V where the caller has them.
#[derive(Debug, Clone, Copy)]
pub(super) struct InPlace {
    /// Elements before the strip's first key.
    pub(super) k: usize,
    pub(super) v: Values,
    /// Keys that are there.
    pub(super) count: usize,
}

impl Strip for InPlace {
    #[inline(always)]
    unsafe fn scores<K: Kernel, const MR: usize, const NR: usize>(
        self,
        kernel: K,
        of: &Products<'_>,
    ) {
        // SAFETY: as promised by the caller.
        unsafe {
            with_elements!(K, of.call.kv_float, T => scores::<K, T, MR, NR>(self, kernel, of))
        }
    }

    #[inline(always)]
    unsafe fn values<K: Kernel, const MR: usize, const NR: usize>(
        self,
        kernel: K,
        of: &Products<'_>,
    ) {
        // SAFETY: as promised by the caller.
        unsafe {
            with_elements!(K, of.call.kv_float, T => values::<K, T, MR, NR>(self, kernel, of))
        }
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
            let mut total = s.splat(0.0);
            for run in (0..call.dim_units).step_by(RUN * lanes) {
                let units = run..(run + RUN * lanes).min(call.dim_units);
                // SAFETY: as promised by the caller.
                let sums =
                    unsafe { products_with::<K, T>(kernel, of, keys, r, first, there, units) };
                total = s
                    .transpose(sums)
                    .as_ref()
                    .iter()
                    .fold(total, |t, v| s.add(t, *v));
            }
            // SAFETY: the vector lies in the strip's scores.
            unsafe { s.store(of.scores.add(r * STRIP + first), s.mul(total, scale)) };
        }
    }
}

/// Sums the products of `units` of row `r` with the `there` keys from `first` on: a vector for each
/// key, a lane for every so many units.
#[inline(always)]
unsafe fn products_with<K: Kernel, T: Elem>(
    kernel: K,
    of: &Products<'_>,
    keys: *const T,
    r: usize,
    first: usize,
    there: usize,
    units: Range<usize>,
) -> <K::S as Simd>::Block {
    let call: &Call<'_> = of.call;
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    let mut sums = s.zeros();
    for c in units.step_by(lanes) {
        if r == 0 {
            // In the order of addresses, a share with each step.
            let share = |c: usize| first + AHEAD + c.min(call.dim_units) * lanes / call.dim_units;
            for key in share(c)..share(c + lanes) {
                ask_for(s, keys.wrapping_add(key * call.key_stride), call.dim);
            }
        }
        // SAFETY: the keys are there, and so are the queries.
        unsafe {
            let query = s.load(of.queries.add(r * of.query_row + c).cast());
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
    sums
}

#[inline(always)]
unsafe fn values<K: Kernel, T: Elem, const MR: usize, const NR: usize>(
    strip: InPlace,
    kernel: K,
    of: &Products<'_>,
) {
    // SAFETY: as promised by the caller.
    unsafe {
        if columns_at_once(MR) == 4 {
            values_by::<K, T, MR, NR, 4>(strip, kernel, of)
        } else {
            values_by::<K, T, MR, NR, 2>(strip, kernel, of)
        }
    }
}

#[inline(always)]
unsafe fn values_by<K: Kernel, T: Elem, const MR: usize, const NR: usize, const NV: usize>(
    strip: InPlace,
    kernel: K,
    of: &Products<'_>,
) {
    let lanes = <K::S as Simd>::LANES;
    let width = NV * lanes;
    let dim = of.call.dim;
    let end = (of.all.end * NR * lanes).min(strip.count);
    // What is multiplied in with the first keys counts for all of them.
    let more = Products {
        keep: Some(&[1.0; GROUP]),
        ..*of
    };
    let begin = of.all.first * NR * lanes;
    for first in (begin..end).step_by(KEYS) {
        let keys = first..(first + KEYS).min(end);
        let of = if first == begin { of } else { &more };
        // SAFETY: rows, keys and columns are there.
        unsafe {
            for column in (0..dim / width * width).step_by(width) {
                columns::<K, T, MR, NV>(strip, kernel, of, keys.clone(), column);
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
    keys: Range<usize>,
    column: usize,
) {
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    let values = strip.v.first.cast::<T>().wrapping_add(column);
    let mut acc: [[Vector<K>; NV]; MR] = [[s.splat(0.0); NV]; MR];
    for key in keys.step_by(K::PAIR) {
        // SAFETY: the keys below `count` are there, and so are the columns; probabilities are set
        // in all panels.
        unsafe {
            let row = |key: usize, j: usize| {
                if key < strip.count {
                    values.add(key * strip.v.stride + j * lanes)
                } else {
                    std::ptr::null()
                }
            };
            for i in 0..K::PAIR {
                let ahead = values.wrapping_add((key + i + AHEAD) * strip.v.stride);
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
            unsafe { of.put(s, r, column + j * lanes, *x) };
        }
    }
}
