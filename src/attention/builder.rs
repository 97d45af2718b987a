//! Collects and checks a problem's parts.

use super::layout::{Extent, Layout, Strides};
use super::mask::MaskSpec;
use super::mask::class_tile;
use super::operand::Role;
use super::problem::{Elements, Problem, QueryOffset};
use super::shape::{HEAD_DIMS, Shape};
use super::varlen::Boundaries;
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// Cumulative lengths of packed queries and keys, not yet checked.
type CuSeqlens = (Box<[u32]>, Box<[u32]>);

/// Collects a problem's parts; [`ProblemBuilder::build`] checks them all.
#[derive(Debug, Clone)]
pub struct ProblemBuilder {
    shape: Shape,
    dtype: DType,
    kv_dtype: DType,
    scale: Option<f32>,
    softcap: Option<f32>,
    offset: Option<QueryOffset>,
    causal: bool,
    window: Option<u32>,
    window_right: Option<u32>,
    layout: Layout,
    key_capacity: Option<usize>,
    strides: [Option<Strides>; 4],
    mask: Option<MaskSpec>,
    tile_classes: bool,
    sinks: bool,
    alibi: bool,
    lse: bool,
    packed: Option<CuSeqlens>,
    refuse_empty: bool,
}

impl ProblemBuilder {
    pub(super) fn new(dtype: DType, shape: Shape, packed: Option<CuSeqlens>) -> Self {
        Self {
            shape,
            dtype,
            kv_dtype: dtype,
            scale: None,
            softcap: None,
            offset: None,
            causal: false,
            window: None,
            window_right: None,
            layout: Layout::HeadMajor,
            key_capacity: None,
            strides: [None; 4],
            mask: None,
            tile_classes: false,
            sinks: false,
            alibi: false,
            lse: false,
            packed,
            refuse_empty: false,
        }
    }

    /// Score scale; `1 / sqrt(D)` when not given. Not premultiplied by log2(e).
    pub fn scale(mut self, scale: f32) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Caps scores: `s = c * tanh(s / c)` for a normal number `c` above 0, after the scale and before any mask.
    pub fn softcap(mut self, c: f32) -> Self {
        self.softcap = Some(c);
        self
    }

    /// Hides keys after each query's own position (see [`ProblemBuilder::query_offset`], which must be
    /// called where qL and kL differ).
    pub fn causal(mut self, causal: bool) -> Self {
        self.causal = causal;
        self
    }

    /// Where query row 0 stands among the keys: `QueryOffset::At(0)` aligns the top left corners of
    /// queries and keys, `QueryOffset::BottomRight` the bottom right ones. With a causal bound, a window
    /// or ALiBi it must be given wherever qL and kL differ, in any packed sequence, too: an
    /// implementation that assumes the one is wrong for callers who mean the other. Where they are the
    /// same, both choices are.
    pub fn query_offset(mut self, offset: QueryOffset) -> Self {
        self.offset = Some(offset);
        self
    }

    /// A query sees exactly `window` keys up to and including its own position.
    pub fn window(mut self, window: u32) -> Self {
        self.window = Some(window);
        self
    }

    /// A query sees at most `keys` keys after its own position (encoders).
    pub fn window_right(mut self, keys: u32) -> Self {
        self.window_right = Some(keys);
        self
    }

    /// Order of the dense operands. Packed rows are `[total, H, D]` by default, and head-major
    /// `[H, total, D]`.
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }

    /// Rows that K and V have room for, at least kL (packed: at least all of them): a cache that is not
    /// full.
    pub fn key_capacity(mut self, rows: usize) -> Self {
        self.key_capacity = Some(rows);
        self
    }

    /// Strides of Q, K, V or O in elements, instead of a dense layout; other roles are ignored.
    /// Inputs may overlap or broadcast (stride 0); rows of O may not.
    pub fn strides(mut self, role: Role, strides: Strides) -> Self {
        if let Some(slot) = self.strides.get_mut(role as usize) {
            *slot = Some(strides);
        }
        self
    }

    /// Elements of a row of V and of O, where rows of Q and K have another width.
    pub fn v_dim(mut self, width: usize) -> Self {
        self.shape.v_dim = width;
        self
    }

    /// Element type of K and V where it differs: `F16` under `F32` queries.
    pub fn kv_dtype(mut self, dtype: DType) -> Self {
        self.kv_dtype = dtype;
        self
    }

    /// A mask operand.
    pub fn mask(mut self, mask: MaskSpec) -> Self {
        self.mask = Some(mask);
        self
    }

    /// Tile classes of the mask are given too, of tiles of [`class_tile`](super::mask::class_tile): for an
    /// additive mask of one plane `[qL, kL]` for all batches and heads, and dense sequences.
    /// [`crate::ops::flash_attn_prefill_blk`] makes them of a bf16 mask. They are
    /// obeyed tile by tile, whatever the mask holds there: class 0 skips exactly its tile, as if each
    /// cell were -inf; class 2 adds no mask exactly there, as if each cell were 0; class 1 adds the mask.
    ///
    /// For a mask whose masked cells are -inf, the device's own classes give the same bits as the mask
    /// without classes. A finite cell of -1e30 or lower also counts as masked when tiles are classified,
    /// while without classes it is a bias like any other, which leaves its key visible: a row that holds
    /// nothing else is then weighed by it, and zero with classes.
    pub fn tile_classes(mut self, given: bool) -> Self {
        self.tile_classes = given;
        self
    }

    /// Each head has a sink logit, which joins the softmax's denominator.
    pub fn sinks(mut self, given: bool) -> Self {
        self.sinks = given;
        self
    }

    /// Each head has an ALiBi slope: `-slope * |p - j|` is added to the capped score, `p` being the
    /// query's position (Press et al. 2022, section 3; symmetric for encoders). Distance and product
    /// are f32, so keys further than 2^24 from the query are not told apart.
    pub fn alibi(mut self, given: bool) -> Self {
        self.alibi = given;
        self
    }

    /// The log-sum-exp of each row is written too.
    pub fn lse(mut self, wanted: bool) -> Self {
        self.lse = wanted;
        self
    }

    /// Refuses a problem without batches, queries or keys, as the established entry points do.
    pub(crate) fn refuse_empty(mut self) -> Self {
        self.refuse_empty = true;
        self
    }

    /// Checks everything and gives the problem.
    pub fn build(self) -> Result<Problem> {
        let packed = match &self.packed {
            None => None,
            Some((q, k)) => Some((
                Boundaries::new("cu_seqlens_q", q)?,
                Boundaries::new("cu_seqlens_k", k)?,
            )),
        };
        let mut shape = self.shape;
        if let Some((q, k)) = &packed {
            if q.count() != k.count() {
                return Err(MlxError::expected(
                    "cu_seqlens_k",
                    format!("{} sequences as in cu_seqlens_q", q.count()),
                    k.count(),
                ));
            }
            shape.batch = q.count();
            shape.query_len = q.longest();
            shape.key_len = k.longest();
        }
        if self.refuse_empty {
            check_not_empty(&shape, packed.as_ref())?;
        }
        check_shape(&shape)?;
        check_dtypes(self.dtype, self.kv_dtype)?;
        let scale = self.scale.unwrap_or(1.0 / (shape.qk_dim as f32).sqrt());
        if !scale.is_finite() {
            return Err(MlxError::expected("scale", "a finite number", scale));
        }
        // Scores are divided by it: a subnormal one would make that infinite.
        if let Some(c) = self.softcap.filter(|c| !(c.is_normal() && *c > 0.0)) {
            return Err(MlxError::expected("softcap", "a normal number above 0", c));
        }
        if let Some(w) = self
            .window
            .filter(|w| *w == 0 || i32::try_from(*w).is_err())
        {
            return Err(MlxError::expected("window", "1 to 2147483647 keys", w));
        }
        if let Some(w) = self.window_right.filter(|w| i32::try_from(*w).is_err()) {
            return Err(MlxError::expected(
                "window_right",
                "0 to 2147483647 keys",
                w,
            ));
        }
        let offset = self.offset(&shape, packed.as_ref())?;
        if let QueryOffset::At(offset) = offset
            && i32::try_from(offset).is_err()
        {
            return Err(MlxError::expected("q_offset", "a 32-bit offset", offset));
        }

        let (rows_q, rows_k, batch) = match &packed {
            None => (shape.query_len, shape.key_len, shape.batch),
            Some((q, k)) => (q.total(), k.total(), 1),
        };
        let capacity = self.key_capacity.unwrap_or(rows_k);
        if capacity < rows_k {
            return Err(MlxError::expected(
                "key_capacity",
                format!("at least kL = {rows_k}"),
                capacity,
            ));
        }
        let queries = |row| Extent {
            batch,
            heads: shape.heads,
            len: rows_q,
            row,
        };
        let keys = |row| Extent {
            batch,
            heads: shape.kv_heads,
            len: rows_k,
            row,
        };
        let Shape { qk_dim, v_dim, .. } = shape;
        let q = self.strides_of(Role::Query, shape.heads, rows_q, qk_dim)?;
        let k = self.strides_of(Role::Key, shape.kv_heads, capacity, qk_dim)?;
        let v = self.strides_of(Role::Value, shape.kv_heads, capacity, v_dim)?;
        let o = self.strides_of(Role::Output, shape.heads, rows_q, v_dim)?;
        o.check_disjoint("out", queries(v_dim))?;
        let mut elements = Elements {
            q: q.span("Q", queries(qk_dim))?,
            k: k.span("K", keys(qk_dim))?,
            v: v.span("V", keys(v_dim))?,
            o: o.span("out", queries(v_dim))?,
            ..Elements::default()
        };
        elements.lse = (Strides {
            batch: shape.heads.saturating_mul(rows_q),
            head: rows_q,
            seq: 1,
        })
        .span(
            "lse",
            Extent {
                batch,
                heads: shape.heads,
                len: rows_q,
                row: 1,
            },
        )?;
        if let Some(mask) = &self.mask {
            check_mask(mask)?;
            let strides = Strides {
                batch: mask.batch_stride,
                head: mask.head_stride,
                seq: mask.row_stride,
            };
            let extent = Extent {
                batch,
                heads: shape.heads,
                len: rows_q,
                row: shape.key_len,
            };
            elements.mask = strides.span("mask", extent)?;
        }
        if self.tile_classes {
            elements.tile_classes = self.check_tile_classes(&shape)?;
        }
        Ok(Problem {
            shape,
            dtype: self.dtype,
            kv_dtype: self.kv_dtype,
            scale,
            softcap: self.softcap,
            offset,
            causal: self.causal,
            window: self.window,
            window_right: self.window_right,
            q,
            k,
            v,
            o,
            mask: self.mask,
            tile_classes: self.tile_classes,
            sinks: self.sinks,
            alibi: self.alibi,
            lse: self.lse,
            packed,
            elements,
        })
    }

    /// The offset as given; 0 where none is and none is needed.
    fn offset(
        &self,
        shape: &Shape,
        packed: Option<&(Boundaries, Boundaries)>,
    ) -> Result<QueryOffset> {
        if let Some(offset) = self.offset {
            return Ok(offset);
        }
        let position_matters =
            self.causal || self.window.is_some() || self.window_right.is_some() || self.alibi;
        let lengths = |b: usize| match packed {
            None => (shape.query_len, shape.key_len),
            Some((q, k)) => (q.len(b), k.len(b)),
        };
        // All batches of a dense problem have the same lengths.
        let sequences = packed.map_or(shape.batch.min(1), |(q, _)| q.count());
        let unlike = (0..sequences)
            .map(lengths)
            .find(|(q, k)| q != k && *q > 0 && *k > 0);
        match unlike {
            Some((q, k)) if position_matters => Err(MlxError::expected(
                "query_offset",
                "a choice where qL and kL differ: `query_offset(QueryOffset::At(0))` (top left, query 0 \
                 at key 0) or `query_offset(QueryOffset::BottomRight)` (the last query at the last key)",
                format!("none, with {q} queries over {k} keys"),
            )),
            _ => Ok(QueryOffset::At(0)),
        }
    }

    fn strides_of(
        &self,
        role: Role,
        heads: usize,
        capacity: usize,
        width: usize,
    ) -> Result<Strides> {
        if let Some(strides) = self.strides.get(role as usize).copied().flatten() {
            return Ok(strides);
        }
        let dense = self.layout.strides(heads, capacity, width);
        dense.ok_or_else(|| {
            MlxError::InvalidArgument(format!(
                "{}: {heads} heads x {capacity} rows x {width} elements overflow",
                role.name()
            ))
        })
    }

    fn check_tile_classes(&self, shape: &Shape) -> Result<usize> {
        let Some(mask) = &self.mask else {
            return Err(MlxError::expected(
                "blk",
                "a mask whose tiles it classifies",
                "no mask",
            ));
        };
        if self.packed.is_some() {
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
        let tile = class_tile(shape.qk_dim);
        let (nq, nk) = tile.count(shape.query_len, shape.key_len);
        nq.checked_mul(nk)
            .ok_or_else(|| MlxError::InvalidArgument(format!("blk: {nq} x {nk} tiles overflow")))
    }
}

fn check_not_empty(shape: &Shape, packed: Option<&(Boundaries, Boundaries)>) -> Result<()> {
    if let Some((q, k)) = packed {
        for (name, boundaries) in [("cu_seqlens_q", q), ("cu_seqlens_k", k)] {
            if boundaries.longest() == 0 {
                return Err(MlxError::expected(
                    name,
                    "at least one row",
                    "only empty sequences",
                ));
            }
        }
    }
    let sizes = [
        ("batch", shape.batch),
        ("seq_len_q", shape.query_len),
        ("seq_len_k", shape.key_len),
    ];
    match sizes.into_iter().find(|(_, size)| *size == 0) {
        Some((name, _)) => Err(MlxError::expected(name, "a size from 1 to 2147483647", 0)),
        None => Ok(()),
    }
}

/// What kernels hold of a size: 31 bits.
const MOST: usize = i32::MAX as usize;

/// The same of a sequence's rows, which kernels count to the end of a tile.
const LONGEST: usize = MOST - 1023;

fn check_shape(shape: &Shape) -> Result<()> {
    // No batch, no queries and no keys are empty work; no heads and no head dim are mistakes.
    let sizes = [
        ("batch", shape.batch, 0, MOST),
        ("n_heads", shape.heads, 1, MOST),
        ("n_kv_heads", shape.kv_heads, 1, MOST),
        ("seq_len_q", shape.query_len, 0, LONGEST),
        ("seq_len_k", shape.key_len, 0, LONGEST),
    ];
    for (name, size, least, most) in sizes {
        if !(least..=most).contains(&size) {
            let range = format!("a size from {least} to {most}");
            return Err(MlxError::expected(name, range, size));
        }
    }
    if !shape.heads.is_multiple_of(shape.kv_heads) {
        return Err(MlxError::InvalidArgument(format!(
            "n_heads ({}) must be divisible by n_kv_heads ({})",
            shape.heads, shape.kv_heads
        )));
    }
    let widths = match shape.head_dim() {
        Some(head_dim) => [("head_dim", head_dim); 2],
        None => [("qk_dim", shape.qk_dim), ("v_dim", shape.v_dim)],
    };
    match widths.into_iter().find(|(_, w)| !HEAD_DIMS.contains(w)) {
        Some((name, width)) => {
            let dims = format!("one of {HEAD_DIMS:?}");
            Err(MlxError::expected(name, dims, width))
        }
        None => Ok(()),
    }
}

fn check_dtypes(dtype: DType, kv_dtype: DType) -> Result<()> {
    if !dtype.is_float() {
        return Err(MlxError::UnsupportedDtype(format!(
            "Q: expected f32, f16 or bf16, got {dtype}"
        )));
    }
    if kv_dtype != dtype && (dtype, kv_dtype) != (DType::F32, DType::F16) {
        return Err(MlxError::UnsupportedDtype(format!(
            "K and V: expected {dtype} as Q{}, got {kv_dtype}",
            if dtype == DType::F32 { " or f16" } else { "" }
        )));
    }
    Ok(())
}

fn check_mask(mask: &MaskSpec) -> Result<()> {
    if mask.dtype.is_float() || mask.is_bool() {
        return Ok(());
    }
    Err(MlxError::UnsupportedDtype(format!(
        "mask: expected bf16, f16, f32 or u8 (bool), got {}",
        mask.dtype
    )))
}
