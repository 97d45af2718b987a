//! Classes of the tiles of a score matrix, row of tiles by row of tiles, so that even a matrix of
//! 2^31 x 2^31 scores is classified without visiting each tile.

use std::ops::Range;

use mlx_flash_attn::attention::Tile;
use mlx_flash_attn::attention::{TileClass, Visibility};

/// The tiles of one score matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    pub(crate) visibility: Visibility,
    pub(crate) tile: Tile,
    pub(crate) query_len: usize,
    pub(crate) key_len: usize,
}

/// How many tiles are of each class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Counts {
    pub(crate) skip: u64,
    pub(crate) mixed: u64,
    pub(crate) free: u64,
}

impl Counts {
    pub(crate) fn total(&self) -> u64 {
        self.skip + self.mixed + self.free
    }

    /// The class that all tiles share; mixed where they differ.
    pub(crate) fn class(&self) -> TileClass {
        let total = self.total();
        if self.skip == total {
            TileClass::Skip
        } else if self.free == total {
            TileClass::Free
        } else {
            TileClass::Mixed
        }
    }
}

/// The tiles of one row that are not skipped, and those among them that need no mask. Both are
/// intervals, as the keys that a row sees are.
#[derive(Debug, Clone, PartialEq, Eq)]
struct RowSpan {
    computed: Range<usize>,
    free: Range<usize>,
}

impl Grid {
    /// Tiles down and across.
    pub(crate) fn tiles(&self) -> (usize, usize) {
        self.tile.count(self.query_len, self.key_len)
    }

    fn row(&self, row: usize) -> RowSpan {
        let Tile { bq, bk } = self.tile;
        let first = row * bq;
        let rows = first..(first + bq).min(self.query_len);
        let any = self.visibility.keys_any(rows.clone(), self.key_len);
        let all = self.visibility.keys_all(rows, self.key_len);
        // The last tile may be cut short by the keys' end.
        let free_end = match all.end == self.key_len {
            true => all.end.div_ceil(bk),
            false => all.end / bk,
        };
        let free_start = all.start.div_ceil(bk);
        RowSpan {
            computed: match any.is_empty() {
                true => 0..0,
                false => any.start / bk..any.end.div_ceil(bk),
            },
            free: free_start.min(free_end)..free_end,
        }
    }

    /// Counts over cells of `down` x `across` tiles, row by row; the last ones may be smaller.
    pub(crate) fn cells(&self, down: usize, across: usize) -> Vec<Vec<Counts>> {
        let (rows, columns) = self.tiles();
        let cells = columns.div_ceil(across);
        let line = |first: usize| {
            let here = first..(first + down).min(rows);
            let (mut computed, mut free) = (Edges::new(cells, across), Edges::new(cells, across));
            for span in here.clone().map(|row| self.row(row)) {
                computed.add(&span.computed);
                free.add(&span.free);
            }
            let (computed, free) = (computed.sums(), free.sums());
            let counts = computed.into_iter().zip(free).enumerate();
            counts
                .map(|(c, (computed, free))| {
                    let width = across.min(columns - c * across);
                    Counts {
                        skip: (here.len() * width) as u64 - computed,
                        mixed: computed - free,
                        free,
                    }
                })
                .collect()
        };
        (0..rows).step_by(down).map(line).collect()
    }
}

/// Sums how many tiles of many intervals lie in each cell of `across` tiles, at a cost that does not
/// grow with the intervals or the cells: each end of an interval touches the cell that it lies in.
#[derive(Debug)]
struct Edges {
    across: usize,
    /// By cell: ends in it less starts in it, and the same weighted by their place in the cell.
    ends: Vec<(i64, i64)>,
}

impl Edges {
    fn new(cells: usize, across: usize) -> Self {
        Self {
            across,
            // Intervals end one past the last tile.
            ends: vec![(0, 0); cells + 1],
        }
    }

    fn add(&mut self, tiles: &Range<usize>) {
        for (tile, sign) in [(tiles.start, -1), (tiles.end, 1)] {
            if let Some((count, weight)) = self.ends.get_mut(tile / self.across) {
                *count += sign;
                *weight += sign * (tile % self.across) as i64;
            }
        }
    }

    fn sums(&self) -> Vec<u64> {
        let across = self.across as i64;
        let mut later = 0;
        let mut sums: Vec<u64> = self
            .ends
            .iter()
            .rev()
            .map(|(count, weight)| {
                // An interval that ends in a later cell has all of this one.
                let sum = weight + later * across;
                later += count;
                sum.unsigned_abs()
            })
            .collect();
        sums.reverse();
        sums.pop();
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_those_of_single_tiles() {
        for (query_len, key_len) in [(1, 1), (33, 100), (64, 64), (70, 300), (200, 33)] {
            for q_offset in [-70, -5, 0, 31, 64, 250] {
                for (causal, window) in [
                    (true, None),
                    (false, None),
                    (true, Some(1)),
                    (true, Some(40)),
                    (false, Some(17)),
                ] {
                    let grid = Grid {
                        visibility: Visibility {
                            q_offset,
                            causal,
                            window,
                            window_right: None,
                        },
                        tile: Tile { bq: 32, bk: 16 },
                        query_len,
                        key_len,
                    };
                    for (r, line) in grid.cells(1, 1).iter().enumerate() {
                        for (c, counts) in line.iter().enumerate() {
                            let rows = r * 32..((r + 1) * 32).min(query_len);
                            let keys = c * 16..(c + 1) * 16;
                            let class = grid.visibility.tile_class(rows, keys, key_len);
                            assert_eq!(counts.class(), class, "{grid:?} {r} {c}");
                        }
                    }
                    let (down, across) = grid.tiles();
                    let whole = grid.cells(down, across);
                    let total = grid.cells(3, 2).into_iter().flatten();
                    let total = total.fold(Counts::default(), |a, b| Counts {
                        skip: a.skip + b.skip,
                        mixed: a.mixed + b.mixed,
                        free: a.free + b.free,
                    });
                    assert_eq!(whole, [[total]]);
                    assert_eq!(total.total(), (down * across) as u64);
                }
            }
        }
    }
}
