//! Where the elements of an operand lie. Strides are in elements; the head dimension is contiguous.

use crate::error::{MlxError, Result};

/// The two common orders of an attention operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Layout {
    /// `[B, H, L, D]`.
    #[default]
    HeadMajor,
    /// `[B, L, H, D]`, as a linear projection leaves it.
    SeqMajor,
}

/// Distances between neighbours along batch, head and sequence, in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Strides {
    /// From one batch to the next.
    pub batch: usize,
    /// From one head to the next.
    pub head: usize,
    /// From one position to the next.
    pub seq: usize,
}

/// The sizes that strides step over: how many batches, heads and positions, and the row's length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) len: usize,
    pub(crate) row: usize,
}

impl Extent {
    /// Whether there is no element.
    fn is_empty(&self) -> bool {
        [self.batch, self.heads, self.len, self.row].contains(&0)
    }
}

impl Layout {
    /// Strides of a dense operand of `heads` heads, room for `capacity` positions and rows of `row`
    /// elements; `None` where a product does not fit in `usize`.
    pub fn strides(self, heads: usize, capacity: usize, row: usize) -> Option<Strides> {
        let batch = heads.checked_mul(capacity)?.checked_mul(row)?;
        Some(match self {
            Self::HeadMajor => Strides {
                batch,
                head: capacity.checked_mul(row)?,
                seq: row,
            },
            Self::SeqMajor => Strides {
                batch,
                head: row,
                seq: heads.checked_mul(row)?,
            },
        })
    }
}

impl Strides {
    /// Offset of the first element of a row; callers stay inside a checked extent.
    #[inline(always)]
    pub(crate) fn at(&self, batch: usize, head: usize, pos: usize) -> usize {
        batch * self.batch + head * self.head + pos * self.seq
    }

    /// Elements from the first to one past the last, 0 where there are none; refuses what does not fit `isize` in bytes, and
    /// strides that do not, even those that nothing steps over: kernels get them all as `i64`.
    pub(crate) fn span(&self, operand: &str, extent: Extent) -> Result<usize> {
        let most = isize::MAX as usize / 8;
        let last = |count: usize, stride: usize| {
            count
                .saturating_sub(1)
                .checked_mul(stride)
                .filter(|_| stride <= most)
        };
        (|| {
            last(extent.batch, self.batch)?
                .checked_add(last(extent.heads, self.head)?)?
                .checked_add(last(extent.len, self.seq)?)?
                .checked_add(extent.row)
                .filter(|elements| *elements <= most)
        })()
        .map(|elements| if extent.is_empty() { 0 } else { elements })
        .ok_or_else(|| {
            MlxError::InvalidArgument(format!(
                "{operand}: the last element's offset overflows with strides {self:?} over {extent:?}"
            ))
        })
    }

    /// Refuses an output in which two rows share an element.
    pub(crate) fn check_disjoint(&self, operand: &str, extent: Extent) -> Result<()> {
        if extent.is_empty() {
            return Ok(());
        }
        let mut axes = [
            (self.batch, extent.batch),
            (self.head, extent.heads),
            (self.seq, extent.len),
        ];
        axes.sort_unstable();
        let mut inner = extent.row;
        for (stride, count) in axes {
            if count == 1 {
                continue;
            }
            if stride < inner {
                return Err(MlxError::expected(
                    operand,
                    format!("output rows that do not overlap (a stride of at least {inner})"),
                    format!("a stride of {stride} in {self:?}"),
                ));
            }
            inner = stride.saturating_mul(count - 1).saturating_add(inner);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Extent, Layout, Strides};

    const E: Extent = Extent {
        batch: 2,
        heads: 3,
        len: 5,
        row: 8,
    };

    #[test]
    fn dense_layouts_fill_their_extent() {
        for layout in [Layout::HeadMajor, Layout::SeqMajor] {
            let s = layout.strides(E.heads, E.len, E.row).unwrap();
            assert_eq!(s.span("q", E).unwrap(), 2 * 3 * 5 * 8);
            s.check_disjoint("out", E).unwrap();
        }
    }

    #[test]
    fn overlapping_outputs_are_refused() {
        for strides in [
            Strides {
                batch: 0,
                head: 40,
                seq: 8,
            },
            Strides {
                batch: 120,
                head: 0,
                seq: 8,
            },
            Strides {
                batch: 120,
                head: 40,
                seq: 7,
            },
            Strides {
                batch: 119,
                head: 40,
                seq: 8,
            },
        ] {
            assert!(strides.check_disjoint("out", E).is_err(), "{strides:?}");
        }
    }

    #[test]
    fn an_empty_extent_has_no_elements_and_no_overlap() {
        let strides = Strides {
            batch: 0,
            head: 40,
            seq: 8,
        };
        for empty in [
            Extent { batch: 0, ..E },
            Extent { len: 0, ..E },
            Extent { row: 0, ..E },
        ] {
            assert_eq!(strides.span("out", empty).unwrap(), 0);
            strides.check_disjoint("out", empty).unwrap();
        }
    }

    #[test]
    fn overflowing_strides_are_refused() {
        let s = Strides {
            batch: usize::MAX,
            head: 1,
            seq: 1,
        };
        assert!(s.span("k", E).is_err());
        // Also where there is one batch alone: the stride still goes to the kernel.
        assert!(s.span("k", Extent { batch: 1, ..E }).is_err());
        assert!(Layout::HeadMajor.strides(usize::MAX, 2, 2).is_none());
    }
}
