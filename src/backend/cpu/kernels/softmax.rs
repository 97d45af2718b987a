//! The softmax of one row over one strip, in place: softcap, mask and ALiBi change its scores, then their
//! maximum is taken, then they become probabilities.

use std::ops::Range;

use super::call::Call;
use super::mask_lookup::{self, classes};
use super::math::{self, LOG2_E};
use super::micro::{Kernel, Vector};
use super::query_row::QueryRow;
use super::simd::{Cell, Simd, load_first};
use super::span::Span;
use super::types::{Cells, Float, with_cells, with_float};
use crate::attention::TileClass;

/// Where a row stands in its strip.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// First key of the strip.
    pub(super) start: usize,
    pub(super) key_len: usize,
    /// What the row itself needs.
    pub(super) own: Span,
    /// The panels that some row of the same micro-kernel call needs. The product with V reads all of
    /// these, so this row's probabilities are set to 0 in the panels outside `own`.
    pub(super) all: Span,
    /// Every row of the call sees every key of `all`, and no softcap, mask or ALiBi changes a score: the
    /// steps that modify and hide scores are left out.
    pub(super) plain: bool,
}

/// Whether all of some rows are plain in `all` of their panels, of a strip that begins at key `start`.
#[inline(always)]
pub(super) fn are_plain(
    call: &Call<'_>,
    rows: &[QueryRow],
    start: usize,
    all: Span,
    width: usize,
) -> bool {
    let keys = start + all.first * width..start + all.end * width;
    let sees_all = |row: &QueryRow| row.keys.start <= keys.start && row.keys.end >= keys.end;
    let modified = all.masked != 0 || call.softcap.is_some() || !call.at.alibi_slopes.is_null();
    !modified && rows.iter().all(sees_all)
}

/// Applies softcap, mask and ALiBi to the scores at `at`, hides those that the row does not see, and gives
/// their maximum.
#[inline(always)]
pub(super) unsafe fn row_max<K: Kernel, const NR: usize>(
    kernel: K,
    call: &Call<'_>,
    row: &QueryRow,
    at: *mut f32,
    place: Place,
) -> f32 {
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    let own = place.own;
    if own.is_empty() {
        return f32::NEG_INFINITY;
    }
    // SAFETY: the span lies in the strip, whose scores are at `at`.
    unsafe {
        if !place.plain {
            if own.masked != 0 || call.softcap.is_some() || row.slope != 0.0 {
                modify_scores::<K, NR>(kernel, call, row, at, place);
            }
            hide_edges::<K, NR>(kernel, row, at, place);
        }
        let mut largest = [s.splat(f32::NEG_INFINITY); NR];
        for panel in own.first..own.end {
            for (j, largest) in largest.iter_mut().enumerate() {
                let x = s.load(at.add((panel * NR + j) * lanes));
                *largest = s.max(x, *largest);
            }
        }
        s.hmax(
            largest
                .into_iter()
                .reduce(|a, b| s.max(a, b))
                .unwrap_or(largest[0]),
        )
    }
}

/// The maximum of a row for which [`row_max`] gave `-inf`. Either the row sees no key of the span (the
/// maximum stays `-inf`), or a score is NaN, or all visible scores overflowed to `-inf`. Overflowed scores
/// are replaced by the lowest finite number; otherwise the row would count as one that sees no key and
/// its output would be 0. Panels are `width` keys.
///
/// # Safety
/// The job's promises hold, and the row's span of the strip is at `at`.
pub(super) unsafe fn recheck_row_max(
    call: &Call<'_>,
    row: &QueryRow,
    at: *mut f32,
    place: Place,
    width: usize,
) -> f32 {
    if place.own.is_empty() {
        return f32::NEG_INFINITY;
    }
    let span = place.own.first * width..place.own.end * width;
    // An early exit would keep the compiler from vectorising the loop.
    let any_nan = span.clone().fold(false, |any, i| {
        // SAFETY: the span lies in the strip.
        any | unsafe { *at.add(i) }.is_nan()
    });
    if any_nan {
        // The row sees keys: any maximum makes their probabilities NaN.
        return 0.0;
    }
    let keys =
        (place.start + span.start).max(row.keys.start)..(place.start + span.end).min(row.keys.end);
    // SAFETY: the keys are the row's own; the mask has them.
    if keys.is_empty() || !unsafe { mask_lookup::may_show(call, row, keys.clone()) } {
        return f32::NEG_INFINITY;
    }
    let mut largest = f32::NEG_INFINITY;
    for key in keys {
        // SAFETY: the key is the row's own; its score lies in the span.
        unsafe {
            if mask_lookup::is_shown(call, row, place.key_len, key) {
                *at.add(key - place.start) = f32::MIN;
                largest = f32::MIN;
            }
        }
    }
    largest
}

/// Turns the scores at `at` into probabilities relative to the row's largest score so far, and gives
/// their sum.
#[inline(always)]
pub(super) unsafe fn probabilities<K: Kernel, const NR: usize>(
    kernel: K,
    at: *mut f32,
    place: Place,
    max: f32,
) -> f32 {
    let s = kernel.simd();
    let Place { own, all, .. } = place;
    // SAFETY: the spans lie in the strip, whose scores are at `at`.
    unsafe {
        if own.is_empty() || max == f32::NEG_INFINITY {
            zero_probabilities::<K, NR>(kernel, at, all.first..all.end);
            return 0.0;
        }
        // Panels past `own` are zeroed last: probabilities may be half as wide as scores, so those zeros may
        // overwrite scores of `own`, which must have been read before.
        zero_probabilities::<K, NR>(kernel, at, all.first..own.first);
        // The maximum is subtracted before the product with log2(e), so that the exponent of the largest
        // score is exactly 0. A score that overflowed to infinity counts as `f32::MAX`, so that its
        // probability is finite.
        let (log2_e, top) = (s.splat(LOG2_E), s.splat(max));
        let sum = if max == f32::MAX {
            let finite = s.splat(f32::MAX);
            exponentials::<K, NR>(kernel, at, own, |x| {
                // In this order NaN passes.
                s.mul(s.sub(s.min(finite, x), top), log2_e)
            })
        } else {
            exponentials::<K, NR>(kernel, at, own, |x| s.mul(s.sub(x, top), log2_e))
        };
        zero_probabilities::<K, NR>(kernel, at, own.end..all.end);
        sum
    }
}

/// Stores the probabilities of a span and gives their sum before rounding.
#[inline(always)]
unsafe fn exponentials<K: Kernel, const NR: usize>(
    kernel: K,
    at: *mut f32,
    span: Span,
    exponent: impl Fn(Vector<K>) -> Vector<K>,
) -> f32 {
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    let mut sums = [s.splat(0.0); NR];
    for panel in span.first..span.end {
        // SAFETY: the span lies in the strip. A panel's probabilities take its own place or, being
        // smaller, that of a panel which has been read.
        unsafe {
            let mut p = [s.splat(0.0); NR];
            for (j, p) in p.iter_mut().enumerate() {
                let x = s.load(at.add((panel * NR + j) * lanes));
                *p = if K::DEGREE == 4 {
                    s.exp2::<4>(exponent(x))
                } else {
                    s.exp2::<5>(exponent(x))
                };
            }
            for (sum, p) in sums.iter_mut().zip(p) {
                *sum = s.add(*sum, p);
            }
            let to = at.cast::<u32>().add(panel * NR * lanes / K::PAIR);
            kernel.store_probabilities::<NR>(to, p);
        }
    }
    s.hsum(
        sums.into_iter()
            .reduce(|a, b| s.add(a, b))
            .unwrap_or(sums[0]),
    )
}

/// Sets the probabilities of some panels to 0.
#[inline(always)]
unsafe fn zero_probabilities<K: Kernel, const NR: usize>(
    kernel: K,
    at: *mut f32,
    panels: Range<usize>,
) {
    let width = NR * <K::S as Simd>::LANES / K::PAIR;
    for panel in panels {
        // SAFETY: the panel lies in the strip.
        unsafe {
            let to = at.cast::<u32>().add(panel * width);
            kernel.store_probabilities::<NR>(to, [kernel.simd().splat(0.0); NR]);
        }
    }
}

/// Sets scores of the row's span that lie outside its visible keys to `-inf`.
#[inline(always)]
unsafe fn hide_edges<K: Kernel, const NR: usize>(
    kernel: K,
    row: &QueryRow,
    at: *mut f32,
    place: Place,
) {
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    let (first, end) = (place.own.first * NR, place.own.end * NR);
    let low = row.keys.start.saturating_sub(place.start);
    let high = row.keys.end.saturating_sub(place.start);
    // Vectors wholly inside are between these two.
    let inside = low.div_ceil(lanes).clamp(first, end)..(high / lanes).clamp(first, end);
    for vector in (first..inside.start).chain(inside.end.max(inside.start)..end) {
        let base = vector * lanes;
        let from = low.saturating_sub(base).min(lanes);
        let to = high.saturating_sub(base).min(lanes);
        let visible = ((1u32 << to) - 1) & !((1u32 << from) - 1);
        // SAFETY: the vector lies in the row's span.
        unsafe {
            let x = s.load(at.add(base));
            s.store(at.add(base), s.pick(visible, x, s.splat(f32::NEG_INFINITY)));
        }
    }
}

/// From this cap on, a score divided by it may be subnormal, and flushing it would change the result.
const HUGE_CAP: f32 = 1e30;

/// While `|s| / c` is at most this, `c * tanh(s / c)` rounds to `s` in f32: a huge cap leaves the score as it is.
const LINEAR: f32 = 1.0 / 8192.0;

/// Applies the softcap, then the mask and ALiBi.
#[inline(always)]
unsafe fn modify_scores<K: Kernel, const NR: usize>(
    kernel: K,
    call: &Call<'_>,
    row: &QueryRow,
    at: *mut f32,
    place: Place,
) {
    // SAFETY: the mask holds cells of its type.
    unsafe {
        match call.cells.filter(|_| place.own.masked != 0) {
            None => modify_vectors::<K, f32, NR>(kernel, call, row, at, place, false),
            Some(cells) => {
                with_cells!(cells, T => modify_vectors::<K, T, NR>(kernel, call, row, at, place, true))
            }
        }
    }
}

#[inline(always)]
unsafe fn modify_vectors<K: Kernel, T: Cell, const NR: usize>(
    kernel: K,
    call: &Call<'_>,
    row: &QueryRow,
    at: *mut f32,
    place: Place,
    masked: bool,
) {
    let s = kernel.simd();
    let lanes = <K::S as Simd>::LANES;
    let (cap, uncap) = call.softcap.map_or((0.0, 0.0), |c| (c, 1.0 / c));
    let hidden = s.splat(f32::NEG_INFINITY);
    let everywhere = call.softcap.is_some() || row.slope != 0.0;
    let classed = masked && !call.at.tile_classes.is_null();
    let classes = classes(call, row, place.key_len);
    for vector in place.own.first * NR..place.own.end * NR {
        let mut masked = masked && place.own.masked >> (vector / NR) & 1 != 0;
        if !masked && !everywhere {
            continue;
        }
        let column = place.start + vector * lanes;
        if masked && classed && column < place.key_len {
            // A vector's keys are in one tile.
            // SAFETY: there is a class for each tile; the vector lies in the row's span.
            unsafe {
                let class = *classes.add(column / call.class_tile.bk);
                if class == TileClass::Skip as u8 {
                    s.store(at.add(vector * lanes), hidden);
                    continue;
                }
                masked = class != TileClass::Free as u8;
            }
        }
        // SAFETY: the vector lies in the row's span; of the mask's row, no more is read than it
        // holds.
        unsafe {
            let mut x = s.load(at.add(vector * lanes));
            if call.softcap.is_some() {
                let capped = s.mul(math::tanh(s, s.mul(x, s.splat(uncap))), s.splat(cap));
                // Below a cap this large usual scores, divided by it, are flushed to 0.
                x = if cap < HUGE_CAP {
                    capped
                } else {
                    s.pick(s.gt(s.abs(x), s.splat(cap * LINEAR)), capped, x)
                };
            }
            if masked {
                let left = place.key_len.saturating_sub(column);
                let cells = call.at.mask.cast::<T>().wrapping_add(row.mask + column);
                let cells = load_first(s, cells, left);
                // `-inf` is selected, not added, for a hidden key: a NaN score plus `-inf` is NaN.
                x = s.pick_ne(cells, hidden, s.add(x, cells), hidden);
            }
            if row.slope != 0.0 {
                // In integers before f32, which is exact up to 2^24 keys of distance.
                let nearest = (column as i64 - row.diagonal) as f32;
                let distance = s.abs(s.add(s.iota(), s.splat(nearest)));
                let biased = s.fma(s.splat(-row.slope), distance, x);
                // A bias that overflows leaves what is hidden hidden.
                x = s.pick_ne(x, hidden, biased, hidden);
            }
            s.store(at.add(vector * lanes), x);
        }
    }
}
