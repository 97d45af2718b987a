//! What a mask hides, read off it once for all heads and tiles: for each of its rows and each strip
//! of keys, the panels in which some key is left, and those where something must be added.

use half::{bf16, f16};

use super::call::Call;
use super::schedule::Shared;
use super::simd::{Cell, Simd, load_first};
use super::team::Team;
use super::tile::Row;
use crate::DType;
use crate::attention::Sequence;

/// Panels of a strip, a bit for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Panels {
    /// Some cell is above `-inf`.
    pub(super) live: u32,
    /// Some cell is not 0.
    pub(super) masked: u32,
}

/// Rows of the mask that one task reads.
const ROWS: usize = 32;

/// The panels of every row of a mask.
#[derive(Debug)]
pub(super) struct MaskMap {
    /// `[row][strip]`
    panels: Vec<Panels>,
    strips: usize,
    rows: Rows,
}

impl MaskMap {
    /// Reads the call's mask, unless its tile classes tell enough.
    pub(super) fn of(call: &Call<'_>, team: Team<'_>) -> Option<Self> {
        call.mask?;
        if !call.at.tile_classes.is_null() {
            return None;
        }
        let rows = Rows::of(call);
        let keys = call.problem.shape().key_len;
        let strips = keys.div_ceil(call.strip);
        let mut panels = vec![Panels::default(); rows.count() * strips];
        let to = Shared(panels.as_mut_ptr());
        team.for_each(rows.count().div_ceil(ROWS), |task| {
            for row in task * ROWS..((task + 1) * ROWS).min(rows.count()) {
                // SAFETY: the mask has this row; its panels are this task's. The kernels suit this
                // machine.
                unsafe {
                    let to = to.get().add(row * strips);
                    (call.kernels.map)(call, rows.offset(row), to);
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
        self.dims.iter().map(|(size, _)| size).product()
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

/// Reads the row of the mask at cell `offset`.
///
/// # Safety
/// The mask has this row, and `to` room for its strips.
#[inline(always)]
pub(super) unsafe fn map<S: Simd, const NR: usize>(
    s: S,
    call: &Call<'_>,
    offset: usize,
    to: *mut Panels,
) {
    // SAFETY: as promised by the caller; the dtype is the mask's.
    unsafe {
        match call.mask.map(|m| m.dtype) {
            Some(DType::BF16) => map_row::<S, bf16, NR>(s, call, offset, to),
            Some(DType::F16) => map_row::<S, f16, NR>(s, call, offset, to),
            Some(DType::F32) => map_row::<S, f32, NR>(s, call, offset, to),
            _ => map_row::<S, u8, NR>(s, call, offset, to),
        }
    }
}

#[inline(always)]
unsafe fn map_row<S: Simd, T: Cell, const NR: usize>(
    s: S,
    call: &Call<'_>,
    offset: usize,
    to: *mut Panels,
) {
    let lanes = S::LANES;
    let (hidden, zero) = (s.splat(f32::NEG_INFINITY), s.splat(0.0));
    let count = call.problem.shape().key_len;
    let cells = call.at.mask.cast::<T>();
    for (strip, start) in (0..count).step_by(call.strip).enumerate() {
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
            panels.live |= u32::from(s.gt(v, hidden) & there != 0) << panel;
            panels.masked |= u32::from(s.ne(v, zero) & there != 0) << panel;
        }
        // SAFETY: as promised by the caller.
        unsafe { to.add(strip).write(panels) };
    }
}
