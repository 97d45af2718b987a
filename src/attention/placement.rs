//! Where each operand's elements lie: strides, as given or of a layout, and how many elements they span.

use super::element::Format;
use super::keys::{Keys, PackedRows};
use super::layout::{Extent, Layout, Strides};
use super::mask::{MaskSpec, class_tile};
use super::operand::Role;
use super::problem::Problem;
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// How a caller places the operands.
#[derive(Debug, Clone)]
pub(super) struct Placement {
    pub(super) layout: Layout,
    /// Rows that K and V have room for, where that is more than their keys.
    pub(super) key_capacity: Option<usize>,
    /// Of Q, K, V and O, in place of the layout's.
    pub(super) strides: [Option<Strides>; 4],
    pub(super) key_format: Format,
    pub(super) value_format: Format,
}

impl Placement {
    pub(super) fn new(dtype: DType) -> Self {
        Self {
            layout: Layout::HeadMajor,
            key_capacity: None,
            strides: [None; 4],
            key_format: dtype.into(),
            value_format: dtype.into(),
        }
    }

    /// How a problem's operands lie, for as many keys as it has room for.
    pub(super) fn of(problem: &Problem) -> Self {
        Self {
            layout: Layout::HeadMajor,
            key_capacity: None,
            strides: [problem.q, problem.k, problem.v, problem.o].map(Some),
            key_format: problem.key_format,
            value_format: problem.value_format,
        }
    }

    /// The largest count of keys that a problem so placed has room for. A mask has columns for the keys that
    /// it was stated for.
    pub(super) fn most_keys(&self, problem: &Problem) -> usize {
        let key_len = problem.shape.key_len;
        match (&problem.score.mask, &problem.keys) {
            (Some(_), _) => key_len,
            (None, Keys::Paged(pages)) => pages.per_sequence.saturating_mul(pages.page_size),
            (None, _) => self.key_capacity.unwrap_or(key_len),
        }
    }

    /// Of K and of V.
    pub(super) fn formats(&self) -> [Format; 2] {
        [self.key_format, self.value_format]
    }

    /// Strides and sizes of Q, O and the log-sum-exp.
    pub(super) fn queries(&self, problem: &mut Problem) -> Result<()> {
        let (shape, rows) = (problem.shape, problem.query_rows());
        let extent = |row| Extent {
            batch: problem.query_batches(),
            heads: shape.heads,
            len: rows,
            row,
        };
        let (q, o) = (extent(shape.qk_dim), extent(shape.v_dim));
        problem.q = self.strides_of(Role::Query, q, rows)?;
        problem.o = self.strides_of(Role::Output, o, rows)?;
        problem.o.check_disjoint("out", o)?;
        problem.elements.q = problem.q.span("Q", q)?;
        problem.elements.o = problem.o.span("out", o)?;
        let lse = Strides {
            batch: shape.heads.saturating_mul(rows),
            head: rows,
            seq: 1,
        };
        problem.elements.lse = lse.span("lse", Extent { row: 1, ..o })?;
        Ok(())
    }

    /// Strides and sizes of K and V, and of the block table.
    pub(super) fn keys(&self, problem: &mut Problem) -> Result<()> {
        let shape = problem.shape;
        let (batch, len) = match &problem.keys {
            Keys::Dense => (shape.batch, shape.key_len),
            Keys::Packed(PackedRows(k)) => (1, k.total()),
            Keys::Paged(pages) => {
                if let Some(capacity) = self.key_capacity {
                    let why =
                        "none beside pages, whose block table says how many keys there is room for";
                    return Err(MlxError::expected("key_capacity", why, capacity));
                }
                problem.elements.block_table = pages.check(shape.batch, shape.key_len)?;
                (pages.count, pages.page_size)
            }
        };
        let capacity = self.key_capacity.unwrap_or(len);
        if capacity < len {
            return Err(MlxError::expected(
                "key_capacity",
                format!("at least kL = {len}"),
                capacity,
            ));
        }
        let extent = |row| Extent {
            batch,
            heads: shape.kv_heads,
            len,
            row,
        };
        let place = |role: Role, width, format: Format| {
            let strides = self.strides_of(role, extent(width), capacity)?;
            let block = format.block();
            let steps = [strides.batch, strides.head, strides.seq];
            if let Some(step) = steps.into_iter().find(|s| !s.is_multiple_of(block)) {
                return Err(MlxError::expected(
                    role.name(),
                    format!("strides of whole blocks of {block} elements of {format}"),
                    step,
                ));
            }
            let elements = strides.span(role.name(), extent(width))?;
            let stored = format.stored(elements).ok_or_else(|| {
                MlxError::InvalidArgument(format!("{}: {elements} elements overflow", role.name()))
            })?;
            Ok((strides, stored))
        };
        (problem.k, problem.elements.k) = place(Role::Key, shape.qk_dim, self.key_format)?;
        (problem.v, problem.elements.v) = place(Role::Value, shape.v_dim, self.value_format)?;
        Ok(())
    }

    /// Strides as given, or those of the layout with room for `capacity` positions.
    fn strides_of(&self, role: Role, extent: Extent, capacity: usize) -> Result<Strides> {
        if let Some(strides) = self.strides.get(role as usize).copied().flatten() {
            return Ok(strides);
        }
        let Extent { heads, row, .. } = extent;
        self.layout.strides(heads, capacity, row).ok_or_else(|| {
            MlxError::InvalidArgument(format!(
                "{}: {heads} heads x {capacity} rows x {row} elements overflow",
                role.name()
            ))
        })
    }
}

/// Elements of the mask.
pub(super) fn mask_elements(mask: &MaskSpec, problem: &Problem) -> Result<usize> {
    if !mask.dtype.is_float() && !mask.is_bool() {
        return Err(MlxError::UnsupportedDtype(format!(
            "mask: expected bf16, f16, f32 or u8 (bool), got {}",
            mask.dtype
        )));
    }
    let strides = Strides {
        batch: mask.batch_stride,
        head: mask.head_stride,
        seq: mask.row_stride,
    };
    let extent = Extent {
        batch: problem.query_batches(),
        heads: problem.shape.heads,
        len: problem.query_rows(),
        row: problem.shape.key_len,
    };
    strides.span("mask", extent)
}

/// How many tile classes the problem takes, which must be able to take some.
pub(super) fn check_tile_classes(problem: &Problem) -> Result<usize> {
    let Some(mask) = &problem.score.mask else {
        return Err(MlxError::expected(
            "blk",
            "a mask whose tiles it classifies",
            "no mask",
        ));
    };
    if problem.packed_queries.is_some() {
        return Err(MlxError::expected(
            "blk",
            "sequences that are not packed",
            "cu_seqlens",
        ));
    }
    if !mask.is_shared_plane() || mask.is_bool() {
        return Err(MlxError::expected(
            "blk",
            "an additive mask of one plane [qL, kL] for all batches and heads",
            format!("{mask:?}"),
        ));
    }
    let tile = class_tile(problem.shape.qk_dim);
    let (nq, nk) = tile.count(problem.shape.query_len, problem.shape.key_len);
    nq.checked_mul(nk)
        .ok_or_else(|| MlxError::InvalidArgument(format!("blk: {nq} x {nk} tiles overflow")))
}
