//! Which part of a strip a row needs: its visible keys, narrowed by what the mask hides wholly.

use super::call::Call;
use super::mask_lookup::classes;
use super::mask_map::Panels;
use super::query_row::QueryRow;
use crate::attention::{Sequence, TileClass};

/// The panels of a strip that a row needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) first: usize,
    /// One past the last; not above `first` where the row needs none.
    pub(super) end: usize,
    /// The panels where the mask must be added, a bit for each.
    pub(super) masked: u32,
}

impl Span {
    pub(super) const EMPTY: Self = Self {
        first: usize::MAX,
        end: 0,
        masked: 0,
    };

    pub(super) fn is_empty(&self) -> bool {
        self.first >= self.end
    }

    /// The smallest span over both.
    pub(super) fn join(self, other: Self) -> Self {
        Self {
            first: self.first.min(other.first),
            end: self.end.max(other.end),
            masked: self.masked | other.masked,
        }
    }
}

/// Span of one row in a strip, in panels of `width` keys.
///
/// # Safety
/// The job's promises hold.
#[inline(always)]
pub(super) unsafe fn of_row(
    call: &Call<'_>,
    sequence: &Sequence,
    row: &QueryRow,
    strip: usize,
    width: usize,
) -> Span {
    let start = strip * call.strip;
    let low = row.keys.start.max(start);
    let high = row.keys.end.min(start + call.strip);
    if low >= high {
        return Span::EMPTY;
    }
    let (first, end) = ((low - start) / width, (high - start).div_ceil(width));
    let panels = match &call.map {
        Some(map) => {
            let query_row = sequence.q_start + row.position;
            map.at(sequence.batch, row.head, query_row, strip)
        }
        // SAFETY: the classes cover all rows and keys.
        None if !call.at.tile_classes.is_null() => unsafe {
            by_classes(call, row, low..high, sequence.key_len, start, width)
        },
        None if call.mask.is_some() => {
            let mut panels = Panels::default();
            // SAFETY: the mask has this row; the kernels suit this machine.
            unsafe { (call.scan_mask)(call, row.mask, strip..strip + 1, &raw mut panels) };
            panels
        }
        None => {
            return Span {
                first,
                end,
                masked: 0,
            };
        }
    };
    let seen = bits(first..end);
    let live = panels.live & seen;
    if live == 0 {
        return Span::EMPTY;
    }
    Span {
        first: live.trailing_zeros() as usize,
        end: 32 - live.leading_zeros() as usize,
        masked: panels.masked & seen,
    }
}

/// A bit for each of some panels, of which a strip has at most 32.
fn bits(panels: std::ops::Range<usize>) -> u32 {
    (((1u64 << panels.end) - 1) & !((1u64 << panels.start) - 1)) as u32
}

/// The panels by the tile classes alone. A panel may hold tiles of several classes, which
/// [`super::softmax`] tells apart where the panel is masked.
#[inline(always)]
unsafe fn by_classes(
    call: &Call<'_>,
    row: &QueryRow,
    keys: std::ops::Range<usize>,
    key_len: usize,
    start: usize,
    width: usize,
) -> Panels {
    let tile = call.class_tile;
    let classes = classes(call, row, key_len);
    let mut panels = Panels::default();
    for column in keys.start / tile.bk..keys.end.div_ceil(tile.bk) {
        // SAFETY: there is a class for each tile.
        let class = unsafe { *classes.add(column) };
        let low = (column * tile.bk).max(keys.start) - start;
        let high = ((column + 1) * tile.bk).min(keys.end) - start;
        let touched = bits(low / width..high.div_ceil(width));
        if class != TileClass::Skip as u8 {
            panels.live |= touched;
        }
        if class != TileClass::Free as u8 {
            panels.masked |= touched;
        }
    }
    panels
}
