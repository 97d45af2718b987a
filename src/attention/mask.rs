//! The mask operand, and the classes of its tiles.

use std::ops::Range;

use crate::dtype::DType;

/// What a kernel does with one tile of the mask, exactly that tile, whatever the mask holds there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum TileClass {
    /// Every cell is masked: the tile is skipped, as if each cell were -inf.
    Skip = 0,
    /// Some cells are masked or biased: the mask is added.
    Mixed = 1,
    /// No cell is masked or biased: computed without the mask, as if each cell were 0.
    Free = 2,
}

/// Mask cells at or below this count as masked when tiles are classified. Without classes only -inf
/// hides a key, so that the two agree on every row where masked cells are -inf.
pub const MASKED_AT_OR_BELOW: f32 = -1.0e30;

impl TileClass {
    /// Class of a tile of an additive mask of `query_len x key_len` cells, `cell(q, k)` giving a
    /// cell's value: a tile that starts at or past `key_len` is skipped; one that reaches past it
    /// is mixed; then all masked is skipped, all zero (either sign) is free, anything else mixed.
    /// Rows past `query_len` do not count.
    pub fn of_mask(
        rows: Range<usize>,
        keys: Range<usize>,
        query_len: usize,
        key_len: usize,
        cell: impl Fn(usize, usize) -> f32,
    ) -> Self {
        if keys.start >= key_len {
            return Self::Skip;
        }
        if keys.end > key_len {
            return Self::Mixed;
        }
        let (mut masked, mut zero) = (true, true);
        for q in rows.start..rows.end.min(query_len) {
            for k in keys.clone() {
                let value = cell(q, k);
                masked &= value <= MASKED_AT_OR_BELOW;
                zero &= value == 0.0;
                if !masked && !zero {
                    return Self::Mixed;
                }
            }
        }
        match (masked, zero) {
            (true, _) => Self::Skip,
            (_, true) => Self::Free,
            _ => Self::Mixed,
        }
    }
}

/// A mask operand: its dtype and how it broadcasts. Columns (keys) are contiguous.
///
/// A float mask is added to the scaled scores in natural-log units, `-inf` hiding a key; every finite
/// value, however low, leaves its key visible. A `U8` mask is boolean, nonzero attending.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MaskSpec {
    /// `BF16`, `F16` or `F32` (additive) or `U8` (bool).
    pub dtype: DType,
    /// Elements from one batch to the next; 0 shares one plane.
    pub batch_stride: usize,
    /// Elements from one head to the next; 0 shares one plane.
    pub head_stride: usize,
    /// Elements from one query row to the next; 0 shares one row (a padding mask over keys).
    pub row_stride: usize,
}

impl MaskSpec {
    /// A `[qL, kL]` mask shared by all batches and heads.
    pub fn plane(dtype: DType, key_len: usize) -> Self {
        Self {
            dtype,
            batch_stride: 0,
            head_stride: 0,
            row_stride: key_len,
        }
    }

    /// A dense `[masks_b, masks_h, qL, kL]` mask in which a leading size of 1 broadcasts.
    pub fn broadcast(dtype: DType, shape: [usize; 4]) -> Self {
        let [batch, heads, rows, keys] = shape;
        let plane = rows.saturating_mul(keys);
        Self {
            dtype,
            batch_stride: if batch > 1 {
                heads.saturating_mul(plane)
            } else {
                0
            },
            head_stride: if heads > 1 { plane } else { 0 },
            row_stride: keys,
        }
    }

    /// Whether the mask is boolean.
    pub fn is_bool(&self) -> bool {
        self.dtype == DType::U8
    }

    /// Whether one plane serves all batches and heads, as tile classes require.
    pub fn is_shared_plane(&self) -> bool {
        self.batch_stride == 0 && self.head_stride == 0
    }
}

/// A tile of query rows by keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Query rows.
    pub bq: usize,
    /// Keys.
    pub bk: usize,
}

impl Tile {
    /// How many tiles cover `query_len x key_len`, along each side.
    pub const fn count(self, query_len: usize, key_len: usize) -> (usize, usize) {
        // Without rows or keys, a tile is as one of a single row or key.
        const fn tiles(len: usize, size: usize) -> usize {
            len.div_ceil(if size == 0 { 1 } else { size })
        }
        (tiles(query_len, self.bq), tiles(key_len, self.bk))
    }
}

/// The tile that classes are computed over.
pub const fn class_tile(head_dim: usize) -> Tile {
    if head_dim >= 512 {
        Tile { bq: 8, bk: 64 }
    } else {
        Tile { bq: 32, bk: 16 }
    }
}

#[cfg(test)]
mod tests {
    use super::TileClass;

    #[test]
    fn mask_tiles_follow_the_first_rule_that_fits() {
        let ninf = f32::NEG_INFINITY;
        let class = |keys: std::ops::Range<usize>, f: &dyn Fn(usize, usize) -> f32| {
            TileClass::of_mask(0..8, keys, 6, 100, f)
        };
        assert_eq!(class(128..192, &|_, _| 0.0), TileClass::Skip);
        assert_eq!(class(64..128, &|_, _| ninf), TileClass::Mixed);
        assert_eq!(class(0..64, &|_, _| ninf), TileClass::Skip);
        assert_eq!(class(0..64, &|_, _| -1.0e30), TileClass::Skip);
        assert_eq!(class(0..64, &|_, _| -0.0), TileClass::Free);
        assert_eq!(
            class(0..64, &|q, k| if (q, k) == (5, 63) { 0.0 } else { ninf }),
            TileClass::Mixed
        );
        assert_eq!(
            class(0..64, &|q, _| if q == 6 { 0.0 } else { ninf }),
            TileClass::Skip
        );
        assert_eq!(class(0..64, &|_, _| f32::NAN), TileClass::Mixed);
    }

    #[test]
    fn a_tile_without_rows_or_keys_counts_as_one_of_a_single_row_or_key() {
        let empty = super::Tile { bq: 0, bk: 0 };
        assert_eq!(empty.count(3, 5), (3, 5));
    }
}
