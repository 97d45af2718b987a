//! Single cells of a mask and its tile classes: whether they leave a row a key.

use std::ops::Range;

use half::{bf16, f16};

use super::call::Call;
use super::query_row::QueryRow;
use super::types::{Cells, Float, with_cells, with_float};
use crate::attention::TileClass;

/// First class of a row's tiles.
#[inline(always)]
pub(super) fn classes(call: &Call<'_>, row: &QueryRow, key_len: usize) -> *const u8 {
    let tile = call.class_tile;
    let first = row.position / tile.bq * key_len.div_ceil(tile.bk);
    call.at.tile_classes.wrapping_add(first)
}

/// Whether mask and tile classes leave a row a key that causality, window and key length leave it.
///
/// # Safety
/// The job's promises hold, and the key is below `key_len`.
pub(super) unsafe fn is_shown(call: &Call<'_>, row: &QueryRow, key_len: usize, key: usize) -> bool {
    let Some(cells) = call.cells else {
        return true;
    };
    if !call.at.tile_classes.is_null() {
        // SAFETY: there is a class for each tile.
        let class = unsafe { *classes(call, row, key_len).add(key / call.class_tile.bk) };
        if class != TileClass::Mixed as u8 {
            return class != TileClass::Skip as u8;
        }
    }
    // SAFETY: the mask has this cell, of its type.
    with_cells!(cells, T => unsafe {
        <T as Shown>::shown(*call.at.mask.cast::<T>().add(row.mask + key))
    })
}

/// Whether mask and tile classes may leave a row any of `keys`: not where the mask alone hides all.
///
/// # Safety
/// The job's promises hold, and the keys are below `key_len`.
pub(super) unsafe fn may_show(call: &Call<'_>, row: &QueryRow, keys: Range<usize>) -> bool {
    // A class of 2 shows what the mask hides.
    let Some(cells) = call.cells.filter(|_| call.at.tile_classes.is_null()) else {
        return true;
    };
    // SAFETY: the mask has these cells, of its type.
    with_cells!(cells, T => unsafe {
        let at = call.at.mask.cast::<T>().add(row.mask + keys.start);
        // An early exit would keep the compiler from vectorising the loop.
        std::slice::from_raw_parts(at, keys.len()).iter().fold(false, |any, cell| any | cell.shown())
    })
}

/// A mask cell that leaves a key visible or not.
trait Shown: Copy {
    fn shown(self) -> bool;
}
impl Shown for u8 {
    fn shown(self) -> bool {
        self != 0
    }
}
impl Shown for bf16 {
    fn shown(self) -> bool {
        self != Self::NEG_INFINITY
    }
}
impl Shown for f16 {
    fn shown(self) -> bool {
        self != Self::NEG_INFINITY
    }
}
impl Shown for f32 {
    fn shown(self) -> bool {
        self != Self::NEG_INFINITY
    }
}
