//! Packing a strip of K and V into the order in which the micro-kernel reads them, converted on the
//! way. K: panels of `NR` vectors of keys, `[panel][word of D][keys]`. V: panels of `NR` vectors of
//! columns, then single vectors for what is left, `[panel][word of keys][columns]`. Words that one
//! multiplication takes together are interleaved. Keys that are not there are zeros up to the end of their
//! panel, so that nothing past the last key is read.

use std::ops::Range;

use super::call::Call;
use super::kv_rows::{KvRows, StripRows};
use super::micro::{Kernel, interleave};
use super::simd::{Row, Simd};
use super::types::{Float, Stored, with_float, with_rows, with_stored};

/// Packs the strip of `rows`.
///
/// # Safety
/// The job's promises hold; `rows` has a row of K and of V for each key of a strip; `k` and `v` have room
/// for [`Call::strip_words`].
#[inline(always)]
pub(super) unsafe fn pack<K: Kernel, const NR: usize>(
    kernel: K,
    call: &Call<'_>,
    rows: StripRows,
    k: *mut u32,
    v: *mut u32,
) {
    // SAFETY: as promised by the caller; the type is the operands'.
    unsafe {
        with_rows!(K, call.k, T => pack_keys::<K, T, NR>(kernel, call, rows.k, k.cast()));
        with_rows!(K, call.v, T => pack_values::<K, T, NR>(kernel, call, rows.v, v.cast()));
    }
}

/// Prefetches K and V of some keys of a strip.
#[inline(always)]
pub(super) fn prefetch<S: Simd>(s: S, call: &Call<'_>, rows: StripRows, keys: Range<usize>) {
    for key in keys {
        for (rows, stored) in [(rows.k, call.k), (rows.v, call.v)] {
            let row = rows.row::<u8>(key);
            for line in (0..stored.bytes(call.dim)).step_by(64) {
                s.prefetch_far(row.wrapping_add(line));
            }
        }
    }
}

#[inline(always)]
unsafe fn pack_keys<K: Kernel, T: Row, const NR: usize>(
    kernel: K,
    call: &Call<'_>,
    rows: KvRows,
    to: *mut f32,
) {
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    let width = NR * lanes;
    let (depth, count) = (call.depth, rows.len());
    for block in 0..count.div_ceil(width) * NR {
        let first = block * lanes;
        let there = count.saturating_sub(first).min(lanes);
        // SAFETY: block `block` lies in a panel of this strip.
        let panel = unsafe { to.add(first / width * depth * width + first % width) };
        let run = rows.run_of(first, lanes);
        for c in (0..depth).step_by(lanes) {
            let columns = (depth - c).min(lanes);
            let held = call.dim_words.saturating_sub(c).min(lanes);
            let mut tile = s.zeros();
            // SAFETY: rows below `there` and words below `depth` exist.
            unsafe {
                if let Some(run) = run {
                    for (r, v) in tile.as_mut().iter_mut().enumerate() {
                        let ahead = run.row::<u8>(r + lanes);
                        s.prefetch_far(ahead.wrapping_add(T::bytes(c * K::PAIR)));
                        *v = kernel.row_words(run.row::<T>(r), c, held);
                    }
                } else {
                    for (r, v) in tile.as_mut().iter_mut().take(there).enumerate() {
                        *v = kernel.row_words(rows.row::<T>(first + r), c, held);
                    }
                }
                let mut tile = s.transpose(tile);
                interleave(kernel, tile.as_mut());
                for (i, v) in tile.as_ref().iter().take(columns).enumerate() {
                    s.store(panel.add((c + i) * width), *v);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn pack_values<K: Kernel, T: Row, const NR: usize>(
    kernel: K,
    call: &Call<'_>,
    rows: KvRows,
    to: *mut f32,
) {
    let lanes = <K::S as Simd>::LANES;
    let width = NR * lanes;
    let height = call.strip / K::PAIR;
    let panelled = call.dim / width * width;
    let row = |key: usize| rows.row_or_null::<T>(key);
    for step in (0..rows.len().div_ceil(width) * width / K::PAIR).step_by(K::SIDE) {
        let keys = [step, step + 1].map(|step| [row(step * K::PAIR), row(step * K::PAIR + 1)]);
        // SAFETY: the steps lie in the strip, and the columns exist.
        unsafe {
            for column in (0..panelled).step_by(width) {
                let to = to.add(column * height + step * width);
                pack_columns::<K, T, NR>(kernel, keys, column, to);
            }
            for column in (panelled..call.dim).step_by(lanes) {
                let to = to.add(column * height + step * lanes);
                pack_columns::<K, T, 1>(kernel, keys, column, to);
            }
        }
    }
}

/// Packs `NV` vectors of columns of `SIDE` words of keys; null where there is no key.
#[inline(always)]
unsafe fn pack_columns<K: Kernel, T: Row, const NV: usize>(
    kernel: K,
    keys: [[*const T; 2]; 2],
    column: usize,
    to: *mut f32,
) {
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    for j in 0..NV {
        let mut block = s.zeros();
        let words = &mut block.as_mut()[..K::SIDE];
        // SAFETY: as promised by the caller.
        unsafe {
            for (words, keys) in words.iter_mut().zip(keys) {
                *words = kernel.value_words(keys, column + j * lanes);
            }
            interleave(kernel, words);
            for (i, words) in words.iter().enumerate() {
                s.store(to.add((i * NV + j) * lanes), *words);
            }
        }
    }
}
