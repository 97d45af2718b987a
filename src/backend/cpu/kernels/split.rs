//! Few query rows over many keys: chunks of keys are worked on apart, and their partial results
//! joined in order. Where chunks begin depends on the problem alone, and so do the result's bits.

use super::call::{Call, Unit};
use super::running::factor;
use super::tile::Tile;

/// Keys of a chunk.
const CHUNK: usize = 1024;

/// Most rows of a unit that is split.
const MOST_ROWS: usize = 64;

/// A split of every unit.
#[derive(Debug)]
pub(super) struct Split {
    /// Strips of a chunk.
    pub(super) strips: usize,
    /// First chunk of each unit; at the end, their number.
    pub(super) first: Vec<usize>,
    /// Rows that each chunk has room for.
    rows: usize,
    /// Elements of a partial row: O, the maximum and the sum.
    width: usize,
}

impl Split {
    /// Splits the units, if they are to be split.
    pub(super) fn plan(call: &Call<'_>, units: &[Unit]) -> Option<Self> {
        let rows = units.iter().map(|u| u.rows(call)).max()?;
        let longest = units.iter().map(|u| u.strips.len()).max()?;
        let strips = CHUNK / call.strip;
        if rows > MOST_ROWS || longest <= strips {
            return None;
        }
        let mut first = vec![0];
        for unit in units {
            let last = first.last().copied().unwrap_or(0);
            // A unit without a visible key has rows to write all the same.
            first.push(last + unit.strips.len().div_ceil(strips));
        }
        Some(Self {
            strips,
            first,
            rows,
            width: call.dim + 2,
        })
    }

    /// How many chunks there are.
    pub(super) fn chunks(&self) -> usize {
        self.first.last().copied().unwrap_or(0)
    }

    /// Elements of all partial results.
    pub(super) fn elements(&self) -> usize {
        self.chunks() * self.rows * self.width
    }

    /// Unit of a chunk.
    pub(super) fn unit_of(&self, chunk: usize) -> usize {
        self.first.partition_point(|first| *first <= chunk) - 1
    }

    /// Keeps a tile's rows as the partial result of `chunk`.
    ///
    /// # Safety
    /// `partials` has room for [`Split::elements`], and this chunk's are nobody else's.
    pub(super) unsafe fn keep(&self, chunk: usize, tile: &Tile<'_>, partials: *mut f32) {
        for r in 0..tile.rows.len() {
            // SAFETY: as promised by the caller; the tile has this row.
            unsafe {
                let to = partials.add((chunk * self.rows + r) * self.width);
                (*to, *to.add(1)) = tile.running.get(r);
                let outputs = tile.outputs.add(r * tile.call.dim);
                outputs.copy_to_nonoverlapping(to.add(2), tile.call.dim);
            }
        }
    }

    /// Joins the partial result of `chunk` to a tile's rows.
    ///
    /// # Safety
    /// `partials` holds what [`Split::keep`] wrote.
    pub(super) unsafe fn join(&self, chunk: usize, tile: &mut Tile<'_>, partials: *const f32) {
        let dim = tile.call.dim;
        for r in 0..tile.rows.len() {
            // SAFETY: as promised by the caller; the tile has this row.
            let (from, outputs, (before, sum)) = unsafe {
                let from = partials.add((chunk * self.rows + r) * self.width);
                (
                    std::slice::from_raw_parts(from, self.width),
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
                    (max, factor(before, max), factor(part, max))
                }
            };
            for (o, p) in outputs.iter_mut().zip(&from[2..]) {
                *o = *o * ours + p * theirs;
            }
            // SAFETY: the tile has this row.
            unsafe { tile.running.set(r, max, sum * ours + from[1] * theirs) };
        }
    }
}
