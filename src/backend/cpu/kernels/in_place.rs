//! Products with a strip of K and V as they lie in memory. With few query rows, packing would cost
//! more than it saves: each key is read once, and what counts is memory bandwidth.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::call::{Call, STRIP};
use super::kv_rows::{KvRows, StripRows};
use super::micro::{Kernel, Vector};
use super::products::{Products, Strip};
use super::running::GROUP;
use super::simd::{Row, Simd};
use super::types::{Float, Stored, with_float, with_rows, with_stored};
use crate::attention::HEAD_DIMS;

/// The widest head dim.
const WIDEST: usize = HEAD_DIMS[HEAD_DIMS.len() - 1];

/// Keys whose values are added up in registers before the next columns are.
const KEYS: usize = 32;

/// Products that a lane of a score sums up before lanes are joined: rounding grows with their number.
const CHAIN: usize = 32;

/// How many keys ahead memory is prefetched: the processor's own prefetcher falls behind when each
/// key is worked on for several rows.
const AHEAD: usize = 32;

/// Vectors of columns that are added up together for so many rows: they stay in registers.
const fn columns_at_once(rows: usize) -> usize {
    if rows > 4 { 2 } else { 4 }
}

/// A strip of K and V where the caller has them.
#[derive(Debug, Clone, Copy)]
pub(super) struct InPlace(pub(super) StripRows);

impl Strip for InPlace {
    #[inline(always)]
    unsafe fn scores<K: Kernel, const MR: usize, const NR: usize>(
        self,
        kernel: K,
        of: &Products<'_>,
    ) {
        // SAFETY: as promised by the caller.
        unsafe { with_rows!(K, of.call.k, T => scores::<K, T, MR, NR>(self.0.k, kernel, of)) }
    }

    #[inline(always)]
    unsafe fn values<K: Kernel, const MR: usize, const NR: usize>(
        self,
        kernel: K,
        of: &Products<'_>,
    ) {
        // SAFETY: as promised by the caller.
        unsafe { with_rows!(K, of.call.v, T => values::<K, T, MR, NR>(self.0.v, kernel, of)) }
    }
}

/// Prefetches the cache lines of `count` elements from `column` on of the row of `key`, which may lie past the
/// last row.
#[inline(always)]
fn prefetch<S: Simd, T: Row>(s: S, rows: KvRows, key: usize, column: usize, count: usize) {
    let row = rows.prefetch_address(key).wrapping_add(T::bytes(column));
    for byte in (0..T::bytes(count)).step_by(64) {
        s.prefetch(row.wrapping_add(byte));
    }
}

#[inline(always)]
unsafe fn scores<K: Kernel, T: Row, const MR: usize, const NR: usize>(
    keys: KvRows,
    kernel: K,
    of: &Products<'_>,
) {
    let call: &Call<'_> = of.call;
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    let scale = s.splat(call.scale);
    for first in (of.all.first * NR..of.all.end * NR).map(|vector| vector * lanes) {
        let mut room = MaybeUninit::<[f32; 16 * WIDEST]>::uninit();
        let held = if T::IN_BLOCKS && MR > 1 {
            // SAFETY: as promised by the caller; there is room for 16 rows of the widest head dim.
            Some(unsafe { hold::<K, T>(kernel, call, keys, first, room.as_mut_ptr().cast()) })
        } else {
            None
        };
        for r in 0..MR {
            let mut total = s.splat(0.0);
            for chain in (0..call.dim_words).step_by(CHAIN * lanes) {
                let words = chain..(chain + CHAIN * lanes).min(call.dim_words);
                // SAFETY: as promised by the caller; rows that are held are of f32.
                let sums = unsafe {
                    match held {
                        Some(held) => products_with::<K, f32>(kernel, of, held, None, r, 0, words),
                        None => {
                            let ahead = (r == 0).then_some(keys);
                            products_with::<K, T>(kernel, of, keys, ahead, r, first, words)
                        }
                    }
                };
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

/// The rows of a vector of keys from `first` on as f32, so that several rows of Q need not each read blocks.
#[inline(always)]
unsafe fn hold<K: Kernel, T: Row>(
    kernel: K,
    call: &Call<'_>,
    keys: KvRows,
    first: usize,
    room: *mut f32,
) -> KvRows {
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    let there = keys.len().saturating_sub(first).min(lanes);
    for key in 0..there {
        prefetch::<_, T>(s, keys, first + key + AHEAD, 0, call.dim);
        let row = keys.row::<T>(first + key);
        for column in (0..call.dim).step_by(lanes) {
            // SAFETY: the key and its columns are there; the caller has room for them.
            unsafe {
                s.store(
                    room.add(key * call.dim + column),
                    T::load_at(s, row, column),
                )
            };
        }
    }
    KvRows::strided(room.cast_const().cast(), call.dim * size_of::<f32>(), there)
}

/// Sums the products of `words` of row `r` with a vector of keys from `first` on, as far as they are
/// there: a vector for each key, a lane for every so many words. Keys of `ahead` are prefetched meanwhile.
#[inline(always)]
unsafe fn products_with<K: Kernel, T: Row>(
    kernel: K,
    of: &Products<'_>,
    keys: KvRows,
    ahead: Option<KvRows>,
    r: usize,
    first: usize,
    words: Range<usize>,
) -> <K::S as Simd>::Block {
    let call: &Call<'_> = of.call;
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    let there = keys.len().saturating_sub(first).min(lanes);
    let run = keys.run_of(first, lanes);
    let mut sums = s.zeros();
    for c in words.step_by(lanes) {
        if let Some(ahead) = ahead {
            // In the order of addresses, a share with each step.
            let share = |c: usize| first + AHEAD + c.min(call.dim_words) * lanes / call.dim_words;
            for key in share(c)..share(c + lanes) {
                prefetch::<_, T>(s, ahead, key, 0, call.dim);
            }
        }
        // SAFETY: the keys are there, and so are the queries.
        unsafe {
            let query = s.load(of.queries.add(r * of.query_row + c).cast());
            let add = |row: *const T, sum: &mut Vector<K>| {
                let key = kernel.row_words(row, c, call.dim_words - c);
                *sum = kernel.multiply(query, key, *sum);
            };
            if let Some(run) = run {
                for (i, sum) in sums.as_mut().iter_mut().enumerate() {
                    add(run.row(i), sum);
                }
            } else {
                for (i, sum) in sums.as_mut().iter_mut().take(there).enumerate() {
                    add(keys.row(first + i), sum);
                }
            }
        }
    }
    sums
}

#[inline(always)]
unsafe fn values<K: Kernel, T: Row, const MR: usize, const NR: usize>(
    values: KvRows,
    kernel: K,
    of: &Products<'_>,
) {
    // SAFETY: as promised by the caller.
    unsafe {
        if columns_at_once(MR) == 4 {
            values_by::<K, T, MR, NR, 4>(values, kernel, of)
        } else {
            values_by::<K, T, MR, NR, 2>(values, kernel, of)
        }
    }
}

#[inline(always)]
unsafe fn values_by<K: Kernel, T: Row, const MR: usize, const NR: usize, const NV: usize>(
    values: KvRows,
    kernel: K,
    of: &Products<'_>,
) {
    let lanes = <K::S as Simd>::LANES;
    let width = NV * lanes;
    let dim = of.call.dim;
    let end = (of.all.end * NR * lanes).min(values.len());
    // The first block of keys rescales the outputs; the others add to them.
    let more = Products {
        rescale: Some(&[1.0; GROUP]),
        ..*of
    };
    let begin = of.all.first * NR * lanes;
    for first in (begin..end).step_by(KEYS) {
        let keys = first..(first + KEYS).min(end);
        let of = if first == begin { of } else { &more };
        // SAFETY: rows, keys and columns are there.
        unsafe {
            for column in (0..dim / width * width).step_by(width) {
                columns::<K, T, MR, NV>(values, kernel, of, keys.clone(), column);
            }
            for column in (dim / width * width..dim).step_by(lanes) {
                columns::<K, T, MR, 1>(values, kernel, of, keys.clone(), column);
            }
        }
    }
}

/// Adds the products of the probabilities of `keys` with `NV` vectors of columns of V.
#[inline(always)]
unsafe fn columns<K: Kernel, T: Row, const MR: usize, const NV: usize>(
    values: KvRows,
    kernel: K,
    of: &Products<'_>,
    keys: Range<usize>,
    column: usize,
) {
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    let mut acc: [[Vector<K>; NV]; MR] = [[s.splat(0.0); NV]; MR];
    let mut key = keys.start;
    while key < keys.end {
        let run = values.run(key);
        // Keys of this run that fill whole words of probabilities.
        let whole = (keys.end - key).min(run.len() / K::PAIR * K::PAIR);
        // SAFETY: the keys are there, and so are the columns; rows that are there have an address;
        // probabilities are set in all panels.
        unsafe {
            for i in (0..whole).step_by(K::PAIR) {
                let rows = [run.row::<T>(i), run.row(i + 1)];
                std::hint::assert_unchecked(rows[..K::PAIR].iter().all(|row| !row.is_null()));
                add_keys(values, kernel, of, key + i, rows, column, &mut acc);
            }
            key += whole;
            // The two keys of this word lie in two runs, or the second is past the last key.
            if K::PAIR > 1 && whole == 0 {
                let rows = [values.row::<T>(key), values.row_or_null(key + 1)];
                add_keys(values, kernel, of, key, rows, column, &mut acc);
                key += K::PAIR;
            }
        }
    }
    for (r, row) in acc.iter().enumerate() {
        for (j, x) in row.iter().enumerate() {
            // SAFETY: the outputs are there.
            unsafe { of.accumulate(s, r, column + j * lanes, *x) };
        }
    }
}

/// Adds the product of one word of probabilities, that of `key` and the keys after it, with V to `acc`.
/// `rows` is V of these keys, null past the last key.
#[inline(always)]
unsafe fn add_keys<K: Kernel, T: Row, const MR: usize, const NV: usize>(
    values: KvRows,
    kernel: K,
    of: &Products<'_>,
    key: usize,
    rows: [*const T; 2],
    column: usize,
    acc: &mut [[Vector<K>; NV]; MR],
) {
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    for i in 0..K::PAIR {
        prefetch::<_, T>(s, values, key + i + AHEAD, column, NV * lanes);
    }
    // SAFETY: the keys are there, and so are the columns; probabilities are set in all panels.
    unsafe {
        let p = of.scores.cast::<u32>().add(key / K::PAIR);
        let p: [Vector<K>; MR] = std::array::from_fn(|r| kernel.broadcast(p.add(r * STRIP)));
        for j in 0..NV {
            // Where a word is one key, the second row may lie past the last one: it is not read.
            let words = kernel.value_words(rows, column + j * lanes);
            for (acc, p) in acc.iter_mut().zip(p) {
                acc[j] = kernel.multiply(p, words, acc[j]);
            }
        }
    }
}
