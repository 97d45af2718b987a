//! What a mask hides, kept for all heads and tiles: for each row of the mask and each strip of keys, the
//! panels in which some key is visible, and those where a cell must be added. [`super::mask_scan`] fills
//! the map.

use crate::attention::{MaskSpec, Problem};

/// Panels of a strip, a bit for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Panels {
    /// Some cell is not `-inf`.
    pub(super) live: u32,
    /// Some cell is not 0.
    pub(super) masked: u32,
}

/// The panels of every row of a mask.
#[derive(Debug)]
pub(super) struct MaskMap {
    /// `[row][strip]`
    pub(super) panels: Vec<Panels>,
    pub(super) strips: usize,
    pub(super) rows: MaskRows,
}

impl MaskMap {
    /// The panels of row `row` of Q in a strip, as that head of that batch entry sees them.
    pub(super) fn at(&self, batch: usize, head: usize, row: usize, strip: usize) -> Panels {
        self.panels[self.rows.index(batch, head, row) * self.strips + strip]
    }
}

/// The distinct rows of a mask: a dimension along which it is broadcast counts once.
#[derive(Debug, Clone, Copy)]
pub(super) struct MaskRows {
    /// Sizes and strides of batch, head and query row.
    dims: [(usize, usize); 3],
}

impl MaskRows {
    pub(super) fn new(problem: &Problem, mask: &MaskSpec) -> Self {
        let shape = problem.shape();
        let dim = |size: usize, stride: usize| (if stride == 0 { 1 } else { size }, stride);
        Self {
            dims: [
                dim(shape.batch, mask.batch_stride),
                dim(shape.heads, mask.head_stride),
                dim(problem.query_rows(), mask.row_stride),
            ],
        }
    }

    pub(super) fn count(&self) -> usize {
        self.dims
            .iter()
            .fold(1, |count, (size, _)| count.saturating_mul(*size))
    }

    fn index(&self, batch: usize, head: usize, row: usize) -> usize {
        let at = |i: usize, x: usize| if self.dims[i].0 == 1 { 0 } else { x };
        (at(0, batch) * self.dims[1].0 + at(1, head)) * self.dims[2].0 + at(2, row)
    }

    /// Where a row begins, in cells.
    pub(super) fn offset(&self, index: usize) -> usize {
        let [(_, batch), (heads, head), (rows, row)] = self.dims;
        index / rows / heads * batch + index / rows % heads * head + index % rows * row
    }
}
