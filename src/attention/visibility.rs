//! Which keys a query sees by position. [`Visibility::attended`] is the one predicate; every range and tile
//! class here follows from it, and the tests hold them against it.

use std::ops::Range;

use super::mask::TileClass;

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
    pub window: Option<usize>,
    /// How many keys after its own position a query sees.
    pub window_right: Option<usize>,
}

/// A number of keys in the width of positions, which may be negative.
#[inline(always)]
fn signed(keys: usize) -> i64 {
    i64::try_from(keys).unwrap_or(i64::MAX)
}

impl Visibility {
    /// Whether query row `q` sees key `k`.
    #[inline(always)]
    pub fn attended(&self, q: i64, k: i64) -> bool {
        let p = self.position(q);
        (!self.causal || k <= p)
            && self.window.is_none_or(|w| p.saturating_sub(k) < signed(w))
            && self
                .window_right
                .is_none_or(|r| k.saturating_sub(p) <= signed(r))
    }

    /// Where row `q` stands among the keys.
    #[inline(always)]
    fn position(&self, q: i64) -> i64 {
        q.saturating_add(self.q_offset)
    }

    /// The keys of `0..key_len` that row `q` sees: they are always one interval.
    #[inline]
    pub fn keys(&self, q: i64, key_len: usize) -> Range<usize> {
        let len = signed(key_len);
        // One past the last key at or before position `p + right`, limited to `0..=len`.
        let p = self.position(q);
        let after = |right: i64| p.saturating_add(right).saturating_add(1).clamp(0, len);
        let start = self.window.map_or(0, |w| after(-signed(w)));
        let mut end = if self.causal { after(0) } else { len };
        if let Some(r) = self.window_right {
            end = end.min(after(signed(r)));
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
    fn offsets_and_lengths_of_any_size_overflow_nothing() {
        let ends = [i64::MIN, -1, 0, 1, i64::MAX];
        for q_offset in ends {
            for window in [None, Some(1), Some(usize::MAX)] {
                let v = Visibility {
                    q_offset,
                    causal: true,
                    window,
                    window_right: Some(usize::MAX),
                };
                for (q, k) in ends.into_iter().flat_map(|q| ends.map(|k| (q, k))) {
                    let _ = v.attended(q, k);
                    let _ = v.keys(q, usize::MAX);
                }
                let _ = v.tile_class(0..usize::MAX, 0..usize::MAX, usize::MAX);
                let _ = v.tile_class(usize::MAX - 1..usize::MAX, 5..5, 7);
            }
        }
    }
}
