//! What a mask hides, read off it once for all heads and tiles: for each of its rows and each strip
//! of keys, the panels in which some key is left, and those where something must be added.

use std::ops::Range;

use super::call::Call;
use super::schedule::Shared;
use super::scratch::room;
use super::simd::{Cell, Simd, load_first};
use super::team::Team;
use super::tile::Row;
use super::types::{Cells, Float, with_cells, with_float};
use crate::attention::Sequence;

/// Panels of a strip, a bit for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Panels {
    /// Some cell is not `-inf`.
    pub(super) live: u32,
    /// Some cell is not 0.
    pub(super) masked: u32,
}

/// Rows of the mask that one task reads.
const ROWS: usize = 32;

/// The largest map, in bytes. It is a thirty-second of a mask whose rows lie apart, and much more than
/// the mask where they overlap; without one each row is read again for each strip.
const MOST_BYTES: usize = 128 << 20;

/// The panels of every row of a mask.
#[derive(Debug)]
pub(super) struct MaskMap {
    /// `[row][strip]`
    panels: Vec<Panels>,
    strips: usize,
    rows: Rows,
}

impl MaskMap {
    /// Reads the call's mask, unless its tile classes tell enough or the map would be too large.
    pub(super) fn of(call: &Call<'_>, team: Team<'_>) -> Option<Self> {
        call.mask?;
        if !call.at.tile_classes.is_null() {
            return None;
        }
        let rows = Rows::of(call);
        let keys = call.problem.shape().key_len;
        let strips = keys.div_ceil(call.strip);
        let count = rows.count().saturating_mul(strips);
        if count > MOST_BYTES / size_of::<Panels>() {
            return None;
        }
        let mut panels = room(count).ok()?;
        panels.resize(count, Panels::default());
        let to = Shared(panels.as_mut_ptr());
        team.for_each(rows.count().div_ceil(ROWS), |task| {
            for row in task * ROWS..((task + 1) * ROWS).min(rows.count()) {
                // SAFETY: the mask has this row; its panels are this task's. The kernels suit this
                // machine.
                unsafe {
                    let to = to.get().add(row * strips);
                    (call.kernels.map)(call, rows.offset(row), 0..strips, to);
                }
            }
        });
        Some(Self {
            panels,
            strips,
            rows,
        })
    }

    /// The panels of a query row in a strip.
    pub(super) fn at(&self, sequence: &Sequence, row: &Row, strip: usize) -> Panels {
        let row = self
            .rows
            .index(sequence.batch, row.head, sequence.q_start + row.position);
        self.panels[row * self.strips + strip]
    }
}

/// The distinct rows of a mask: a dimension along which it is broadcast counts once.
#[derive(Debug, Clone, Copy)]
struct Rows {
    /// Sizes and strides of batch, head and query row.
    dims: [(usize, usize); 3],
}

impl Rows {
    fn of(call: &Call<'_>) -> Self {
        let shape = call.problem.shape();
        let (batch, head, row) = call
            .mask
            .map_or((0, 0, 0), |m| (m.batch_stride, m.head_stride, m.row_stride));
        let dim = |size: usize, stride: usize| (if stride == 0 { 1 } else { size }, stride);
        Self {
            dims: [
                dim(shape.batch, batch),
                dim(shape.heads, head),
                dim(call.problem.query_rows(), row),
            ],
        }
    }

    fn count(&self) -> usize {
        self.dims
            .iter()
            .fold(1, |count, (size, _)| count.saturating_mul(*size))
    }

    fn index(&self, batch: usize, head: usize, row: usize) -> usize {
        let at = |i: usize, x: usize| if self.dims[i].0 == 1 { 0 } else { x };
        (at(0, batch) * self.dims[1].0 + at(1, head)) * self.dims[2].0 + at(2, row)
    }

    /// Where a row begins, in cells.
    fn offset(&self, index: usize) -> usize {
        let [(_, batch), (heads, head), (rows, row)] = self.dims;
        index / rows / heads * batch + index / rows % heads * head + index % rows * row
    }
}

/// Reads some strips of the row of the mask at cell `offset`.
///
/// # Safety
/// The mask has this row, and `to` room for the strips.
#[inline(always)]
pub(super) unsafe fn map<S: Simd, const NR: usize>(
    s: S,
    call: &Call<'_>,
    offset: usize,
    strips: Range<usize>,
    to: *mut Panels,
) {
    let Some(cells) = call.cells else { return };
    // SAFETY: as promised by the caller; the type is the mask's.
    unsafe { with_cells!(cells, T => map_row::<S, T, NR>(s, call, offset, strips, to)) }
}

#[inline(always)]
unsafe fn map_row<S: Simd, T: Cell, const NR: usize>(
    s: S,
    call: &Call<'_>,
    offset: usize,
    strips: Range<usize>,
    to: *mut Panels,
) {
    let lanes = S::LANES;
    let (hidden, zero) = (s.splat(f32::NEG_INFINITY), s.splat(0.0));
    let count = call.problem.shape().key_len;
    let cells = call.at.mask.cast::<T>();
    for (i, strip) in strips.enumerate() {
        let start = strip * call.strip;
        let end = (start + call.strip).min(count);
        let mut panels = Panels::default();
        for column in (start..end).step_by(lanes) {
            let left = end - column;
            // SAFETY: the row has `count` cells.
            let v = unsafe { load_first(s, cells.add(offset + column), left) };
            let there = if left < lanes {
                (1 << left) - 1
            } else {
                u32::MAX
            };
            let panel = (column - start) / (NR * lanes);
            panels.live |= u32::from(s.ne(v, hidden) & there != 0) << panel;
            panels.masked |= u32::from(s.ne(v, zero) & there != 0) << panel;
        }
        // SAFETY: as promised by the caller.
        unsafe { to.add(i).write(panels) };
    }
}
