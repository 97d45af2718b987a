//! Few query rows over many keys: chunks of keys are worked on apart, and their partial results
//! merged in order. Where chunks begin depends on the problem alone, and so do the result's bits.

use super::buffer::room;
use super::call::{Call, HeadTask};
use super::careful;
use super::running::rescale_factor;
use super::tile::Tile;
use crate::error::Result;

/// Keys of a chunk.
const CHUNK: usize = 1024;

/// Most rows of a head task that is split.
const MOST_ROWS: usize = 64;

/// A split of every head task.
#[derive(Debug)]
pub(super) struct Split {
    /// Strips of a chunk.
    pub(super) strips: usize,
    /// First chunk of each head task; at the end, their number.
    pub(super) first: Vec<usize>,
    /// Rows that each chunk has room for.
    rows: usize,
    /// Words of a partial row: the maximum and the sum, O, and what reached it, a byte for each column.
    width: usize,
}

impl Split {
    /// Splits the head tasks, if they are to be split.
    pub(super) fn plan(call: &Call<'_>, tasks: &[HeadTask]) -> Result<Option<Self>> {
        let most = |size: &dyn Fn(&HeadTask) -> usize| tasks.iter().map(size).max().unwrap_or(0);
        let rows = most(&|u| u.rows(call));
        let strips = CHUNK / call.strip;
        if rows > MOST_ROWS || most(&|u| u.strips.len()) <= strips {
            return Ok(None);
        }
        let width = 2 + call.dim + call.dim / 4;
        let split = Self {
            strips,
            first: Vec::new(),
            rows,
            width,
        };
        split.of(call, tasks).map(Some)
    }

    /// The same split of some of its head tasks.
    pub(super) fn of(&self, call: &Call<'_>, tasks: &[HeadTask]) -> Result<Self> {
        debug_assert!(tasks.iter().all(|u| u.rows(call) <= self.rows));
        let mut first = room(tasks.len() + 1)?;
        first.push(0);
        let mut chunks = 0;
        for task in tasks {
            // A head task without a visible key has rows to write all the same.
            chunks += task.strips.len().div_ceil(self.strips);
            first.push(chunks);
        }
        Ok(Self { first, ..*self })
    }

    /// How many chunks there are.
    pub(super) fn chunks(&self) -> usize {
        self.first.last().copied().unwrap_or(0)
    }

    /// Words of a partial result.
    pub(super) fn slot(&self) -> usize {
        self.rows * self.width
    }

    pub(super) fn slot_bytes(&self) -> usize {
        4 * self.slot()
    }

    /// Task of a chunk.
    pub(super) fn task_of(&self, chunk: usize) -> usize {
        self.first.partition_point(|first| *first <= chunk) - 1
    }

    /// Saves a tile's rows as a partial result, with what `reached` them.
    ///
    /// # Safety
    /// `to` has room for [`Split::slot`] words, which are nobody else's.
    pub(super) unsafe fn save(&self, tile: &Tile<'_>, reached: Option<&[u8]>, to: *mut u32) {
        let dim = tile.call.dim;
        for r in 0..tile.rows.len() {
            // SAFETY: as promised by the caller; the tile has this row.
            unsafe {
                let to: *mut f32 = to.add(r * self.width).cast();
                (*to, *to.add(1)) = tile.running.get(r);
                let outputs = tile.outputs.add(r * dim);
                outputs.copy_to_nonoverlapping(to.add(2), dim);
                if let Some(reached) = reached {
                    let from = reached[r * dim..(r + 1) * dim].as_ptr();
                    from.copy_to_nonoverlapping(to.add(2 + dim).cast(), dim);
                }
            }
        }
    }

    /// Sets a tile's rows to a partial result.
    ///
    /// # Safety
    /// `from` holds what [`Split::save`] wrote, with what reached the rows if `reached` is given.
    pub(super) unsafe fn load(
        &self,
        tile: &mut Tile<'_>,
        reached: Option<&mut [u8]>,
        from: *const u32,
    ) {
        let dim = tile.call.dim;
        for r in 0..tile.rows.len() {
            // SAFETY: as promised by the caller; the tile has this row.
            unsafe {
                let from: *const f32 = from.add(r * self.width).cast();
                tile.running.set(r, *from, *from.add(1));
                from.add(2)
                    .copy_to_nonoverlapping(tile.outputs.add(r * dim), dim);
            }
        }
        if let Some(reached) = reached {
            // SAFETY: as promised by the caller.
            unsafe { self.merge_reached(dim, reached, from) };
        }
    }

    /// Merges a partial result into a tile's rows.
    ///
    /// # Safety
    /// As for [`Self::load`].
    pub(super) unsafe fn merge(
        &self,
        tile: &mut Tile<'_>,
        reached: Option<&mut [u8]>,
        from: *const u32,
    ) {
        let dim = tile.call.dim;
        if let Some(reached) = reached {
            // SAFETY: as promised by the caller.
            unsafe { self.merge_reached(dim, reached, from) };
        }
        for r in 0..tile.rows.len() {
            // SAFETY: as promised by the caller; the tile has this row.
            let (from, outputs, (before, sum)) = unsafe {
                let from: *const f32 = from.add(r * self.width).cast();
                (
                    std::slice::from_raw_parts(from, 2 + dim),
                    std::slice::from_raw_parts_mut(tile.outputs.add(r * dim), dim),
                    tile.running.get(r),
                )
            };
            let (max, ours, theirs) = match (before, from[0]) {
                (_, f32::NEG_INFINITY) => continue,
                (f32::NEG_INFINITY, part) => {
                    outputs.fill(0.0);
                    (part, 1.0, 1.0)
                }
                (before, part) => {
                    let max = before.max(part);
                    (max, rescale_factor(before, max), rescale_factor(part, max))
                }
            };
            for (o, p) in outputs.iter_mut().zip(&from[2..]) {
                *o = *o * ours + p * theirs;
            }
            // SAFETY: the tile has this row.
            unsafe { tile.running.set(r, max, sum * ours + from[1] * theirs) };
        }
    }

    unsafe fn merge_reached(&self, dim: usize, reached: &mut [u8], from: *const u32) {
        for (r, reached) in reached.chunks_exact_mut(dim).enumerate() {
            // SAFETY: as promised by the caller; a byte for each column follows the row's outputs.
            let more = unsafe {
                let at = from.add(r * self.width + 2 + dim).cast::<u8>();
                std::slice::from_raw_parts(at, dim)
            };
            careful::merge_kinds(reached, more);
        }
    }
}
