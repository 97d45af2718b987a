//! Query rows on their way through the strips of their keys: what is kept for each, the
//! beginning, and the end. What happens between is in [`super::step`].

use std::ops::Range;

use super::buffer::Buffer;
use super::call::{Call, FEW_ROWS, HeadTask, STRIP};
use super::micro::{Kernel, MOST_ROWS};
use super::query_row::QueryRow;
use super::running::Running;
use super::simd::{Elem, Simd};
use super::types::{Float, with_elements, with_float};

/// Rows of one head task, in a thread's scratch.
#[derive(Debug)]
pub(super) struct Tile<'a> {
    pub(super) call: &'a Call<'a>,
    pub(super) task: &'a HeadTask,
    pub(super) rows: &'a mut [QueryRow],
    /// The strip with which the rows are written out; without one [`finish`] does.
    pub(super) last: Option<usize>,
    /// The first rows of Q are read where the caller has them.
    pub(super) in_place: usize,
    /// `[row][Call::query_row]`; only the other rows are set.
    pub(super) queries: *mut u32,
    pub(super) running: Running,
    /// `[row][D]`; unspecified for rows that have seen no key.
    pub(super) outputs: *mut f32,
    /// `[MOST_ROWS][STRIP]`.
    pub(super) scores: *mut f32,
    /// Some row was written that is not finite.
    pub(super) tainted: bool,
}

impl<'a> Tile<'a> {
    /// Where the micro-kernel finds Q of some rows, from `row` on, and the words from one to the
    /// next.
    #[inline(always)]
    pub(super) fn queries_at(&self, row: usize) -> (*const u32, usize) {
        if row >= self.in_place {
            let step = self.call.query_row;
            return (self.queries.wrapping_add(row * step), step);
        }
        let q = query_at(self.call, self.task, &self.rows[row]);
        (q.cast(), self.call.query_stride / self.call.kernel.pair)
    }

    /// Rows `rows` of a head task, with no key seen yet; Q is still to be packed.
    pub(super) fn new(
        call: &'a Call<'a>,
        task: &'a HeadTask,
        rows: Range<usize>,
        last: Option<usize>,
        buffers: &'a mut TileBuffers,
    ) -> Self {
        // Micro-kernels work on rows past the last one.
        let padded = rows.len().next_multiple_of(call.kernel.rows).max(FEW_ROWS);
        let new_row = |f: usize| QueryRow::new(call, task, f);
        buffers.rows.clear();
        buffers.rows.extend(rows.map(new_row));
        let in_place = queries_in_place(call, task, &buffers.rows);
        Self {
            call,
            task,
            rows: &mut buffers.rows,
            last,
            in_place,
            queries: buffers.queries.reserve(padded * call.query_row),
            running: Running::new(&mut buffers.running, padded),
            outputs: buffers.outputs.reserve(padded * call.dim).cast(),
            scores: buffers.scores.reserve(MOST_ROWS * STRIP).cast(),
            tainted: false,
        }
    }
}

/// A thread's memory for the rows of a tile.
#[derive(Debug, Default)]
pub(super) struct TileBuffers {
    queries: Buffer,
    running: Buffer,
    outputs: Buffer,
    scores: Buffer,
    rows: Vec<QueryRow>,
}

/// Where a row of Q begins.
fn query_at(call: &Call<'_>, task: &HeadTask, row: &QueryRow) -> *const u8 {
    let at = call.problem.q_at(&task.sequence, row.head, row.position);
    call.at.q.wrapping_add(at * call.float.size_of())
}

/// How many of the first rows the micro-kernel can read where the caller has Q: none unless Q holds
/// words, one row a fixed step after the other.
fn queries_in_place(call: &Call<'_>, task: &HeadTask, rows: &[QueryRow]) -> usize {
    let Some(first) = rows.first() else {
        return 0;
    };
    let words = match call.kernel.pair {
        1 => call.float == Float::F32,
        _ => call.float == Float::Bf16,
    };
    let step = call.query_stride * call.float.size_of();
    let aligned = (query_at(call, task, first).addr() | step).is_multiple_of(4);
    // Rows that far apart would share the same few sets of the first-level cache.
    let packed = !task.in_place(call);
    let whole_tiles = call.depth == call.dim_words;
    if !words || !aligned || !packed || !whole_tiles || call.group != 1 || step.is_multiple_of(4096)
    {
        return 0;
    }
    let whole = rows.len() / call.kernel.rows * call.kernel.rows;
    // The micro-kernel reads no row past the last of these.
    let rest = match rows.len() - whole {
        rest @ (1 | 2 | 4 | 8) if rest.is_multiple_of(call.kernel.side) => rest,
        _ => 0,
    };
    whole + rest
}

/// Packs the rows of Q that are not read in place.
///
/// # Safety
/// The job's promises hold.
#[inline(always)]
pub(super) unsafe fn begin<K: Kernel>(kernel: K, tile: &mut Tile<'_>) {
    // SAFETY: as promised by the caller; the type is Q's.
    unsafe { with_elements!(K, tile.call.float, T => pack_queries::<K, T>(kernel, tile)) }
}

#[inline(always)]
unsafe fn pack_queries<K: Kernel, T: Elem>(kernel: K, tile: &mut Tile<'_>) {
    let (call, s) = (tile.call, kernel.simd());
    let lanes = <K::S as Simd>::LANES;
    for (r, row) in tile.rows.iter().enumerate().skip(tile.in_place) {
        let from = query_at(call, tile.task, row).cast::<T>();
        // SAFETY: the row of Q and its packed place are there.
        unsafe {
            let to = tile.queries.add(r * call.query_row);
            for c in (0..call.depth).step_by(lanes) {
                let words = kernel.row_words(from, c, call.dim_words.saturating_sub(c));
                s.store(to.add(c).cast(), words);
            }
        }
    }
}

/// Writes O and the log-sum-exp, if no strip did.
///
/// # Safety
/// The job's promises hold; all strips have gone by.
#[inline(always)]
pub(super) unsafe fn finish<K: Kernel>(kernel: K, tile: &mut Tile<'_>) {
    if tile.last.is_none() {
        // SAFETY: as promised by the caller.
        let tainted = unsafe { write(kernel, tile, 0..tile.rows.len()) };
        tile.tainted |= tainted;
    }
}

/// Writes O and the log-sum-exp of some of a tile's rows, and tells whether some output is not finite.
///
/// # Safety
/// The job's promises hold; all strips that these rows see have gone by.
#[inline(always)]
pub(super) unsafe fn write<K: Kernel>(kernel: K, tile: &Tile<'_>, rows: Range<usize>) -> bool {
    // SAFETY: as promised by the caller; the type is O's.
    unsafe { with_float!(tile.call.float, T => write_as::<K, T>(kernel, tile, rows)) }
}

#[inline(always)]
unsafe fn write_as<K: Kernel, T: Elem>(kernel: K, tile: &Tile<'_>, rows: Range<usize>) -> bool {
    let (call, s) = (tile.call, kernel.simd());
    let sequence = &tile.task.sequence;
    // Stays 0 as long as all are finite.
    let zero = s.splat(0.0);
    let mut taint = zero;
    for r in rows {
        let row = &tile.rows[r];
        // SAFETY: the tile has this row.
        let (max, sum) = unsafe { tile.running.get(r) };
        let hidden = max == f32::NEG_INFINITY;
        let (factor, lse) = if hidden {
            (0.0, f32::NEG_INFINITY)
        } else {
            row.close(call, max, sum)
        };
        let at = call.problem.o_at(sequence, row.head, row.position);
        // SAFETY: the row of O is there, and this tile's alone.
        unsafe {
            let (from, to) = (
                tile.outputs.add(r * call.dim),
                call.at.o.cast::<T>().add(at),
            );
            let factor = s.splat(factor);
            // Each row has a sum of its own, lest every addition wait for the one before it.
            let mut of_row = zero;
            for c in (0..call.dim).step_by(<K::S as Simd>::LANES) {
                let x = if hidden {
                    factor
                } else {
                    let x = s.load(from.add(c));
                    of_row = s.fma(x, zero, of_row);
                    s.mul(x, factor)
                };
                T::store(s, to.add(c), x);
            }
            taint = s.add(taint, of_row);
            if !call.at.lse.is_null() {
                let at = call.problem.lse_at(sequence, row.head, row.position);
                *call.at.lse.add(at) = lse;
            }
        }
    }
    s.ne(taint, taint) != 0
}
