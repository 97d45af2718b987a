//! Classes of the tiles of a score matrix, row of tiles by row of tiles, so that even a matrix of
//! 2^31 x 2^31 scores is classified without visiting each tile.

use std::ops::Range;

use mlx_flash_attn::attention::variant::Tile;
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

    fn add(&mut self, row: &RowSpan, tiles: &Range<usize>) {
        let overlap = |r: &Range<usize>| {
            r.end
                .min(tiles.end)
                .saturating_sub(r.start.max(tiles.start)) as u64
        };
        let (computed, free) = (overlap(&row.computed), overlap(&row.free));
        self.free += free;
        self.mixed += computed - free;
        self.skip += tiles.len() as u64 - computed;
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
        let (_, across) = self.tiles();
        let first = row * self.tile.bq;
        let rows = first..(first + self.tile.bq).min(self.query_len);
        let class = |column: usize| {
            let keys = column * self.tile.bk..(column + 1) * self.tile.bk;
            self.visibility.tile_class(rows.clone(), keys, self.key_len)
        };
        // Some column that is computed, or none: where the row's keys begin.
        let seen = self.visibility.keys_any(rows.clone(), self.key_len);
        if seen.is_empty() {
            return RowSpan {
                computed: 0..0,
                free: 0..0,
            };
        }
        let start = seen.start / self.tile.bk;
        let end = partition(start, across, |c| class(c) != TileClass::Skip);
        // Free tiles lie together: after a masked left edge, before a masked right edge.
        let all = self.visibility.keys_all(rows.clone(), self.key_len);
        let free_start = all.start.div_ceil(self.tile.bk).max(start);
        let free_end = partition(free_start, end.max(free_start), |c| {
            class(c) == TileClass::Free
        });
        RowSpan {
            computed: start..end,
            free: free_start.min(free_end)..free_end,
        }
    }

    /// Counts over cells of `down` x `across` tiles, row by row; the last ones may be smaller.
    pub(crate) fn cells(&self, down: usize, across: usize) -> Vec<Vec<Counts>> {
        let (rows, columns) = self.tiles();
        let cells = columns.div_ceil(across);
        (0..rows)
            .step_by(down)
            .map(|first| {
                let mut line = vec![Counts::default(); cells];
                for row in first..(first + down).min(rows) {
                    let span = self.row(row);
                    for (c, counts) in line.iter_mut().enumerate() {
                        counts.add(&span, &(c * across..((c + 1) * across).min(columns)));
                    }
                }
                line
            })
            .collect()
    }
}

/// The first of `start..end` for which `holds` fails, where it holds for a first part only.
fn partition(start: usize, end: usize, holds: impl Fn(usize) -> bool) -> usize {
    let (mut low, mut high) = (start, end);
    while low < high {
        let middle = low + (high - low) / 2;
        if holds(middle) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low
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
