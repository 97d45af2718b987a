//! One step of some rows over one strip of keys: scores, softmax, and the weighted sum of V.

use std::ops::Range;

use super::call::{Call, FEW_ROWS, STRIP};
use super::in_place::InPlace;
use super::kv_rows::StripRows;
use super::micro::{self, Kernel, MOST_ROWS};
use super::packed::Packed;
use super::products::{Products, Strip};
use super::query_row::QueryRow;
use super::running::{GROUP, Lanes};
use super::simd::Simd;
use super::softmax::{self, Place};
use super::span::{self, Span};
use super::tile::{self, Tile};

const _: () = assert!(MOST_ROWS <= GROUP);

/// Takes all rows of a tile one strip further.
///
/// # Safety
/// The job's promises hold, and `packed` is the task's strip.
#[inline(always)]
pub(super) unsafe fn step<K: Kernel, const MR: usize, const NR: usize>(
    kernel: K,
    tile: &mut Tile<'_>,
    packed: Packed,
) {
    kernel.open_tiles();
    // SAFETY: as promised by the caller.
    unsafe { step_through::<K, Packed, MR, NR>(kernel, tile, packed.strip, packed) }
    kernel.close_tiles();
}

/// As [`step`], with K and V as they lie in memory.
///
/// # Safety
/// The job's promises hold, and `keys` has a row of K and of V for each key of the strip.
#[inline(always)]
pub(super) unsafe fn step_in_place<K: Kernel, const NR: usize>(
    kernel: K,
    tile: &mut Tile<'_>,
    strip: usize,
    keys: StripRows,
) {
    // SAFETY: as promised by the caller.
    unsafe { step_through::<K, InPlace, FEW_ROWS, NR>(kernel, tile, strip, InPlace(keys)) }
}

#[inline(always)]
unsafe fn step_through<K: Kernel, P: Strip, const MR: usize, const NR: usize>(
    kernel: K,
    tile: &mut Tile<'_>,
    strip: usize,
    from: P,
) {
    let rows = tile.rows.len();
    for first in (0..rows).step_by(MR) {
        let end = (first + MR).min(rows);
        from.prefetch_next(kernel.simd(), tile.call, first..end, rows);
        // SAFETY: as promised by the caller; the rows are the tile's.
        unsafe {
            step_rows::<K, P, MR, NR>(kernel, tile, strip, from, first..end);
            if tile.last == Some(strip) {
                // The outputs are still in the first-level cache, and the stores overlap with the work on the
                // next rows.
                let tainted = tile::write(kernel, tile, first..end);
                tile.tainted |= tainted;
            }
        }
    }
}

/// Runs a method of [`Strip`] with the smallest size of micro-kernel that holds `rows`.
macro_rules! by_rows {
    ($rows:expr, $strip:ident.$method:ident($kernel:ident, $of:expr)) => {
        match $rows.next_multiple_of(P::side::<K>()) {
            1 => $strip.$method::<K, 1, NR>($kernel, $of),
            2 => $strip.$method::<K, 2, NR>($kernel, $of),
            3 | 4 if MR > 4 => $strip.$method::<K, 4, NR>($kernel, $of),
            5..=8 if MR > 8 => $strip.$method::<K, 8, NR>($kernel, $of),
            _ => $strip.$method::<K, MR, NR>($kernel, $of),
        }
    };
}

#[inline(always)]
unsafe fn step_rows<K: Kernel, P: Strip, const MR: usize, const NR: usize>(
    kernel: K,
    tile: &mut Tile<'_>,
    strip: usize,
    from: P,
    rows: Range<usize>,
) {
    let call = tile.call;
    let keys = tile.task.strip_keys(call, strip);
    let s = kernel.simd();
    let width = NR * <K::S as Simd>::LANES;
    let key_len = tile.task.sequence.key_len;
    let mut spans = [Span::EMPTY; MOST_ROWS];
    let mut all = Span::EMPTY;
    for (i, r) in rows.clone().enumerate() {
        let row = &tile.rows[r];
        // A row with the same visible keys and the same row of the mask as the row before it reuses that
        // row's span, so that the mask is looked up once for both.
        spans[i] = if i > 0 && row.sees_as(&tile.rows[r - 1], call) {
            spans[i - 1]
        } else {
            // SAFETY: the job's promises hold.
            unsafe { span::of_row(call, &tile.task.sequence, row, strip, width) }
        };
        all = all.join(spans[i]);
    }
    if all.is_empty() {
        return;
    }
    // SAFETY: the tile holds these rows, and room up to the next size of micro-kernel; what is
    // computed for rows past them is not used.
    unsafe {
        let (queries, query_row) = tile.queries_at(rows.start);
        let mut products = Products {
            call,
            all,
            keys: visible_words::<K>(&tile.rows[rows.clone()], keys.start, all, width),
            queries,
            query_row,
            scores: tile.scores,
            outputs: tile.outputs.add(rows.start * call.dim),
            rescale: None,
        };
        by_rows!(rows.len(), from.scores(kernel, &products));
        let plain = softmax::are_plain(call, &tile.rows[rows.clone()], keys.start, all, width);
        let place = |i: usize| Place {
            start: keys.start,
            key_len,
            own: spans[i],
            all,
            plain,
        };
        let mut maxima = [f32::NEG_INFINITY; GROUP];
        for (i, r) in rows.clone().enumerate() {
            let at = products.scores.add(i * STRIP);
            maxima[i] = softmax::row_max::<K, NR>(kernel, call, &tile.rows[r], at, place(i));
        }
        let lowest = maxima[..rows.len()]
            .iter()
            .fold(f32::INFINITY, |a, b| a.min(*b));
        if lowest == f32::NEG_INFINITY {
            recheck_row_maxima(
                call,
                &tile.rows[rows.clone()],
                products.scores,
                place,
                width,
                &mut maxima,
            );
        }
        let update = tile.running.update_max(s, rows.clone(), &maxima);
        let mut sums = [0.0; GROUP];
        for (i, sum) in sums[..rows.len()].iter_mut().enumerate() {
            let at = products.scores.add(i * STRIP);
            *sum = softmax::probabilities::<K, NR>(kernel, at, place(i), update.maxima[i]);
        }
        tile.running.add_sums(s, rows.clone(), &update, &sums);
        products.rescale = (!update.first).then_some(&update.factors);
        by_rows!(rows.len(), from.values(kernel, &products));
    }
}

/// Looks again at rows whose largest score is `-inf`. Not inlined: the loop over rows would spill its
/// registers around this rare case.
#[cold]
#[inline(never)]
unsafe fn recheck_row_maxima(
    call: &Call<'_>,
    rows: &[QueryRow],
    scores: *mut f32,
    place: impl Fn(usize) -> Place,
    width: usize,
    maxima: &mut Lanes,
) {
    for (i, (row, max)) in rows.iter().zip(maxima).enumerate() {
        if *max == f32::NEG_INFINITY {
            // SAFETY: as promised by the caller, whose rows' scores are at `scores`.
            unsafe {
                let at = scores.add(i * STRIP);
                *max = softmax::recheck_row_max(call, row, at, place(i), width);
            }
        }
    }
}

/// The words (first, one past the last) that cover every key of a strip that some row sees; the strip
/// begins at key `start`. Both ends are rounded outward to what the micro-kernel takes at once.
fn visible_words<K: Kernel>(
    rows: &[QueryRow],
    start: usize,
    all: Span,
    width: usize,
) -> [usize; 2] {
    let side = micro::side::<K>();
    let panels = all.first * width..all.end * width;
    let low = rows.iter().map(|row| row.keys.start).min().unwrap_or(0);
    let high = rows.iter().map(|row| row.keys.end).max().unwrap_or(0);
    let inside = |key: usize| key.saturating_sub(start).clamp(panels.start, panels.end);
    let word = |key: usize| key / (K::PAIR * side) * side;
    [word(inside(low)), word(inside(high) + K::PAIR * side - 1)]
}
