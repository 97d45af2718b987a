//! Which part of a strip a row needs: its visible keys, narrowed by what the mask hides wholly.

use std::ops::Range;

use half::{bf16, f16};

use super::call::Call;
use super::simd::{Cell, Simd, load_first};
use super::tile::Row;
use crate::DType;
use crate::attention::TileClass;

/// The panels of a strip that a row needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) first: usize,
    /// One past the last; not above `first` where the row needs none.
    pub(super) end: usize,
    /// Whether the mask must be added there.
    pub(super) masked: bool,
}

impl Span {
    pub(super) const EMPTY: Self = Self {
        first: usize::MAX,
        end: 0,
        masked: false,
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

/// Span of one row in the strip of `keys`, in panels of `width` keys. Cells of the mask are looked
/// at only here, once; a strip that it hides costs no more than this.
#[inline(always)]
pub(super) unsafe fn of_row<S: Simd>(
    s: S,
    call: &Call<'_>,
    row: &Row,
    keys: &Range<usize>,
    key_len: usize,
    width: usize,
) -> Span {
    let (low, high) = (row.keys.start.max(keys.start), row.keys.end.min(keys.end));
    if low >= high {
        return Span::EMPTY;
    }
    let (live, masked) = match call.mask {
        None => (low..high, false),
        // SAFETY: the classes cover all rows and keys.
        Some(_) if !call.at.tile_classes.is_null() => unsafe {
            by_classes(call, row, low..high, key_len)
        },
        // SAFETY: the mask has a row of `key_len` cells of its dtype.
        Some(mask) => unsafe {
            match mask.dtype {
                DType::BF16 => scan::<S, bf16>(s, call, row, low..high, key_len),
                DType::F16 => scan::<S, f16>(s, call, row, low..high, key_len),
                DType::F32 => scan::<S, f32>(s, call, row, low..high, key_len),
                _ => scan::<S, u8>(s, call, row, low..high, key_len),
            }
        },
    };
    if live.is_empty() {
        return Span::EMPTY;
    }
    Span {
        first: (live.start - keys.start) / width,
        end: (live.end - keys.start).div_ceil(width),
        masked,
    }
}

/// The smallest range of vectors around the cells of `keys` that are not `-inf`, and whether any
/// cell is other than 0.
#[inline(always)]
unsafe fn scan<S: Simd, T: Cell>(
    s: S,
    call: &Call<'_>,
    row: &Row,
    keys: Range<usize>,
    key_len: usize,
) -> (Range<usize>, bool) {
    let lanes = S::LANES;
    // SAFETY: the mask covers this row.
    let cells = unsafe { call.at.mask.cast::<T>().add(row.mask) };
    let hidden = s.splat(f32::NEG_INFINITY);
    let zero = s.splat(0.0);
    // Bits of live cells and of cells that are not 0, among `keys`.
    let look = |column: usize| {
        let from = keys.start.saturating_sub(column).min(lanes);
        let to = keys.end.saturating_sub(column).min(lanes);
        let asked = ((1u32 << to) - 1) & !((1u32 << from) - 1);
        // SAFETY: the row has `key_len` cells.
        let v = unsafe { load_first(s, cells.add(column), key_len - column) };
        (s.gt(v, hidden) & asked, s.ne(v, zero) & asked)
    };
    let begin = keys.start / lanes * lanes;
    let mut first = usize::MAX;
    let (mut end, mut masked) = (0, false);
    let mut column = begin;
    while column < keys.end {
        let (live, nonzero) = look(column);
        masked |= nonzero != 0;
        if live != 0 {
            first = first.min(column);
            end = column + lanes;
            if masked {
                break;
            }
        }
        column += lanes;
    }
    if first == usize::MAX {
        return (0..0, false);
    }
    if masked && column < keys.end {
        // Only the far end is left to find.
        let mut column = (keys.end - 1) / lanes * lanes;
        while column >= end {
            if look(column).0 != 0 {
                end = column + lanes;
            } else {
                column -= lanes;
            }
        }
    }
    (first.max(keys.start)..end.min(keys.end), masked)
}

/// As [`scan`], by the tile classes alone.
#[inline(always)]
unsafe fn by_classes(
    call: &Call<'_>,
    row: &Row,
    keys: Range<usize>,
    key_len: usize,
) -> (Range<usize>, bool) {
    let tile = call.class_tile;
    let first_class = row.position / tile.bq * key_len.div_ceil(tile.bk);
    let (mut first, mut end, mut masked) = (usize::MAX, 0, false);
    for column in keys.start / tile.bk..keys.end.div_ceil(tile.bk) {
        // SAFETY: there is a class for each tile.
        let class = unsafe { *call.at.tile_classes.add(first_class + column) };
        if class != TileClass::Skip as u8 {
            first = first.min(column);
            end = column + 1;
        }
        masked |= class != TileClass::Free as u8;
    }
    if first == usize::MAX {
        return (0..0, false);
    }
    (
        (first * tile.bk).max(keys.start)..(end * tile.bk).min(keys.end),
        masked,
    )
}
