//! Reads masks: which panels of a strip a row of the mask leaves visible, and where a cell must be added.

use std::ops::Range;

use super::buffer::room;
use super::call::Call;
use super::mask_map::{MaskMap, MaskRows, Panels};
use super::simd::{Cell, Simd, load_first};
use super::team::{Shared, Team};
use super::types::{Cells, Float, with_cells, with_float};

/// Rows of the mask that one task reads.
const ROWS: usize = 32;

/// The largest map, in bytes. It is a thirty-second of a mask whose rows lie apart, and much more than
/// the mask where they overlap; without one each row is read again for each strip.
const MOST_BYTES: usize = 128 << 20;

impl MaskMap {
    /// Reads the call's mask, unless its tile classes tell enough or the map would be too large.
    pub(super) fn of(call: &Call<'_>, team: Team<'_>) -> Option<Self> {
        let mask = call.mask?;
        if !call.at.tile_classes.is_null() {
            return None;
        }
        let rows = MaskRows::new(call.problem, &mask);
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
                // SAFETY: the mask has this row, whose panels no other task writes; the kernels suit
                // this machine.
                unsafe {
                    let to = to.get().add(row * strips);
                    (call.scan_mask)(call, rows.offset(row), 0..strips, to);
                }
            }
        });
        Some(Self {
            panels,
            strips,
            rows,
        })
    }
}

/// Reads some strips of the row of the mask at cell `offset`.
///
/// # Safety
/// The mask has this row, and `to` room for the strips.
#[inline(always)]
pub(super) unsafe fn scan<S: Simd, const NR: usize>(
    s: S,
    call: &Call<'_>,
    offset: usize,
    strips: Range<usize>,
    to: *mut Panels,
) {
    let Some(cells) = call.cells else { return };
    // SAFETY: as promised by the caller; the type is the mask's.
    unsafe { with_cells!(cells, T => scan_row::<S, T, NR>(s, call, offset, strips, to)) }
}

#[inline(always)]
unsafe fn scan_row<S: Simd, T: Cell, const NR: usize>(
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
            let inside = if left < lanes {
                (1 << left) - 1
            } else {
                u32::MAX
            };
            let panel = (column - start) / (NR * lanes);
            panels.live |= u32::from(s.ne(v, hidden) & inside != 0) << panel;
            panels.masked |= u32::from(s.ne(v, zero) & inside != 0) << panel;
        }
        // SAFETY: as promised by the caller.
        unsafe { to.add(i).write(panels) };
    }
}
