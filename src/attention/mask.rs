//! Which keys a query sees. [`Visibility::attended`] is the one predicate; every range and tile
//! class here follows from it, and the tests hold them against it.

use std::ops::Range;

use super::layout::Strides;
use crate::dtype::DType;

/// Causal and window visibility of one sequence.
///
/// Query row `i` stands at position `p = i + q_offset` among the keys. Key `j` is visible when
/// `j <= p` (if causal), `p - j < window` (if a window is set: exactly `window` keys, self
/// included) and `j - p <= window_right` (if a right bound is set).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Visibility {
    /// Position of query row 0 among the keys.
    pub q_offset: i64,
    /// Whether keys after a query's own position are hidden.
    pub causal: bool,
    /// How many keys up to and including its own position a query sees.
    pub window: Option<u32>,
    /// How many keys after its own position a query sees.
    pub window_right: Option<u32>,
}

impl Visibility {
    /// Whether query row `q` sees key `k`.
    #[inline(always)]
    pub fn attended(&self, q: i64, k: i64) -> bool {
        let p = self.position(q);
        (!self.causal || k <= p)
            && self
                .window
                .is_none_or(|w| p.saturating_sub(k) < i64::from(w))
            && self
                .window_right
                .is_none_or(|r| k.saturating_sub(p) <= i64::from(r))
    }

    /// Where row `q` stands among the keys.
    #[inline(always)]
    fn position(&self, q: i64) -> i64 {
        q.saturating_add(self.q_offset)
    }

    /// The keys of `0..key_len` that row `q` sees: they are always one interval.
    #[inline]
    pub fn keys(&self, q: i64, key_len: usize) -> Range<usize> {
        let len = i64::try_from(key_len).unwrap_or(i64::MAX);
        // Of the key after the last one that a bound shows, which `len` may be.
        let p = self.position(q);
        let after = |right: i64| p.saturating_add(right).saturating_add(1).clamp(0, len);
        let start = self.window.map_or(0, |w| after(-i64::from(w)));
        let mut end = if self.causal { after(0) } else { len };
        if let Some(r) = self.window_right {
            end = end.min(after(i64::from(r)));
        }
        start as usize..end.max(start) as usize
    }

    /// The keys that at least one row of `rows` sees, as one interval (empty where none does).
    pub fn keys_any(&self, rows: Range<usize>, key_len: usize) -> Range<usize> {
        if rows.is_empty() {
            return 0..0;
        }
        // Both ends of `keys` grow with the row, so the outer rows bound the union.
        let first = self.keys(rows.start as i64, key_len);
        let last = self.keys((rows.end - 1) as i64, key_len);
        let start = first.start.min(last.start);
        start..first.end.max(last.end).max(start)
    }

    /// The keys that every row of `rows` sees (empty where there is no such key).
    pub fn keys_all(&self, rows: Range<usize>, key_len: usize) -> Range<usize> {
        if rows.is_empty() {
            return 0..0;
        }
        let first = self.keys(rows.start as i64, key_len);
        let last = self.keys((rows.end - 1) as i64, key_len);
        let start = first.start.max(last.start);
        start..first.end.min(last.end).max(start)
    }

    /// Class of the tile `rows` x `keys` as these bounds alone decide it.
    pub fn tile_class(&self, rows: Range<usize>, keys: Range<usize>, key_len: usize) -> TileClass {
        let keys = keys.start.min(key_len)..keys.end.min(key_len);
        let any = self.keys_any(rows.clone(), key_len);
        if keys.is_empty() || any.is_empty() || keys.end <= any.start || any.end <= keys.start {
            return TileClass::Skip;
        }
        let all = self.keys_all(rows, key_len);
        if all.start <= keys.start && keys.end <= all.end {
            TileClass::Free
        } else {
            TileClass::Mixed
        }
    }

    /// Whether every query sees every key.
    pub fn is_unbounded(&self) -> bool {
        !self.causal && self.window.is_none() && self.window_right.is_none()
    }
}

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

    /// Its strides, as those of other operands.
    pub(super) fn strides(&self) -> Strides {
        Strides {
            batch: self.batch_stride,
            head: self.head_stride,
            seq: self.row_stride,
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
    use super::{TileClass, Visibility};

    fn all_visibilities() -> impl Iterator<Item = Visibility> {
        let offsets = [-7, -1, 0, 1, 4, 30];
        let windows = [None, Some(1), Some(3), Some(64)];
        let rights = [None, Some(0), Some(2)];
        offsets.into_iter().flat_map(move |q_offset| {
            windows.into_iter().flat_map(move |window| {
                rights.into_iter().flat_map(move |window_right| {
                    [false, true].map(|causal| Visibility {
                        q_offset,
                        causal,
                        window,
                        window_right,
                    })
                })
            })
        })
    }

    #[test]
    fn intervals_are_what_the_predicate_says() {
        for v in all_visibilities() {
            for kl in [1, 5, 16] {
                for q in 0..20 {
                    let range = v.keys(q, kl);
                    for k in 0..kl {
                        assert_eq!(range.contains(&k), v.attended(q, k as i64), "{v:?} {q} {k}");
                    }
                }
            }
        }
    }

    #[test]
    fn tile_classes_are_what_the_predicate_says() {
        for v in all_visibilities() {
            for kl in [5, 16] {
                for q0 in [0, 3, 8] {
                    for k0 in [0, 4, 12, 16] {
                        let cells: Vec<bool> = (q0..q0 + 4)
                            .flat_map(|q| (k0..(k0 + 4).min(kl)).map(move |k| (q, k)))
                            .map(|(q, k)| v.attended(q as i64, k as i64))
                            .collect();
                        let class = v.tile_class(q0..q0 + 4, k0..k0 + 4, kl);
                        match class {
                            TileClass::Skip => assert!(!cells.contains(&true), "{v:?} {q0} {k0}"),
                            TileClass::Free => assert!(!cells.contains(&false), "{v:?} {q0} {k0}"),
                            TileClass::Mixed => {}
                        }
                        // A narrow window can leave a hole between the outer rows' intervals, so
                        // `Mixed` may be cautious, but never for a tile that is wholly visible.
                        if !cells.is_empty() && !cells.contains(&false) {
                            assert_eq!(class, TileClass::Free, "{v:?} {q0} {k0}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn window_keeps_exactly_w_keys() {
        let v = Visibility {
            causal: true,
            window: Some(4),
            ..Default::default()
        };
        assert_eq!(v.keys(9, 100), 6..10);
        assert_eq!(v.keys(1, 100), 0..2);
    }

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
    fn offsets_and_lengths_of_any_size_overflow_nothing() {
        let ends = [i64::MIN, -1, 0, 1, i64::MAX];
        for q_offset in ends {
            for window in [None, Some(1), Some(u32::MAX)] {
                let v = Visibility {
                    q_offset,
                    causal: true,
                    window,
                    window_right: Some(u32::MAX),
                };
                for (q, k) in ends.into_iter().flat_map(|q| ends.map(|k| (q, k))) {
                    let _ = v.attended(q, k);
                    let _ = v.keys(q, usize::MAX);
                }
                let _ = v.tile_class(0..usize::MAX, 0..usize::MAX, usize::MAX);
                let _ = v.tile_class(usize::MAX - 1..usize::MAX, 5..5, 7);
            }
        }
        let empty = super::Tile { bq: 0, bk: 0 };
        assert_eq!(empty.count(3, 5), (3, 5));
    }
}
