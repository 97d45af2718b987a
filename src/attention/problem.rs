//! What is asked: one attention problem, built once and checked once.

use super::layout::{Extent, Layout, Strides};
use super::mask::{MaskSpec, Visibility};
use super::variant;
use super::varlen::Boundaries;
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// The sizes of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Batch size B.
    pub batch: usize,
    /// Query heads H.
    pub heads: usize,
    /// Key/value heads Hkv; divides H (GQA, MQA).
    pub kv_heads: usize,
    /// Query length qL.
    pub query_len: usize,
    /// Key/value length kL.
    pub key_len: usize,
    /// Head dimension D.
    pub head_dim: usize,
}

/// Where query row 0 stands among the keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QueryOffset {
    /// At key position `0 + offset`; `At(0)` aligns the top left corners.
    At(i64),
    /// At `kL - qL`, per sequence: the last query sees the last key, as in chunked prefill.
    BottomRight,
}

impl Default for QueryOffset {
    fn default() -> Self {
        Self::At(0)
    }
}

/// An operand of a problem.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Q, `[B, H, qL, D]`.
    Query,
    /// K, `[B, Hkv, kL, D]`.
    Key,
    /// V, `[B, Hkv, kL, D]`.
    Value,
    /// O, `[B, H, qL, D]`.
    Output,
    /// The mask, `[B|1, H|1, qL, kL]`.
    Mask,
    /// Tile classes of the mask, `[ceil(qL/bq), ceil(kL/bk)]`, `U8`.
    TileClasses,
    /// Sink logits, `[H]`, `F32`.
    Sinks,
    /// ALiBi slopes, `[H]`, `F32`.
    AlibiSlopes,
    /// Log-sum-exp output, `[B, H, qL]` or packed `[H, total_q]`, `F32`.
    Lse,
}

impl Role {
    /// The operand's name, as messages give it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Query => "Q",
            Self::Key => "K",
            Self::Value => "V",
            Self::Output => "out",
            Self::Mask => "mask",
            Self::TileClasses => "blk",
            Self::Sinks => "sinks",
            Self::AlibiSlopes => "alibi_slopes",
            Self::Lse => "lse",
        }
    }

    /// Whether the kernel writes this operand.
    pub const fn is_output(self) -> bool {
        matches!(self, Self::Output | Self::Lse)
    }

    /// Every role, in the order of the kernels' buffer indices.
    pub const ALL: [Role; 9] = [
        Self::Query,
        Self::Key,
        Self::Value,
        Self::Output,
        Self::Mask,
        Self::TileClasses,
        Self::Sinks,
        Self::AlibiSlopes,
        Self::Lse,
    ];
}

/// What a problem requires of one operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OperandSpec {
    /// The element type.
    pub dtype: DType,
    /// Elements the operand must hold.
    pub elements: usize,
}

/// One sequence of a problem: a batch entry, or one of the packed sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// Its query rows.
    pub query_len: usize,
    /// Its keys.
    pub key_len: usize,
    /// Which of its keys each row sees.
    pub visibility: Visibility,
    /// Batch index that strides apply to (0 when packed).
    batch: usize,
    /// First row among the packed queries (0 when not packed).
    q_start: usize,
    /// First row among the packed keys (0 when not packed).
    k_start: usize,
}

/// A checked attention problem: `O = softmax(softcap(scale * Q K^T) + mask) V` over the visible
/// keys, with everything that decides its result and its memory.
///
/// Built by [`Problem::builder`] or [`Problem::varlen`]; immutable afterwards.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    shape: Shape,
    dtype: DType,
    kv_dtype: DType,
    scale: f32,
    softcap: Option<f32>,
    offset: QueryOffset,
    causal: bool,
    window: Option<u32>,
    window_right: Option<u32>,
    q: Strides,
    k: Strides,
    v: Strides,
    o: Strides,
    mask: Option<MaskSpec>,
    tile_classes: bool,
    sinks: bool,
    alibi: bool,
    lse: bool,
    packed: Option<(Boundaries, Boundaries)>,
    elements: Elements,
}

/// Elements that each operand must hold, worked out once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Elements {
    q: usize,
    k: usize,
    v: usize,
    o: usize,
    mask: usize,
    tile_classes: usize,
    lse: usize,
}

impl Problem {
    /// Starts a problem over dense `[B, H, L, D]` operands of `dtype`.
    pub fn builder(dtype: DType, shape: Shape) -> ProblemBuilder {
        ProblemBuilder::new(dtype, shape, None)
    }

    /// Starts a problem over packed sequences: Q and O `[total_q, H, D]`, K and V
    /// `[total_k, Hkv, D]`, sequence `b` owning query rows `cu_seqlens_q[b]..cu_seqlens_q[b + 1]`
    /// and key rows likewise. A mask has a row for each packed query row and columns local to the
    /// sequence. `shape` gives heads and head dim; its batch and lengths are set from the
    /// boundaries.
    pub fn varlen(
        dtype: DType,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        cu_seqlens_q: &[u32],
        cu_seqlens_k: &[u32],
    ) -> ProblemBuilder {
        let shape = Shape {
            batch: 0,
            heads,
            kv_heads,
            query_len: 0,
            key_len: 0,
            head_dim,
        };
        let packed = Some((cu_seqlens_q.into(), cu_seqlens_k.into()));
        ProblemBuilder::new(dtype, shape, packed).layout(Layout::SeqMajor)
    }

    /// The sizes; for packed sequences their count and the longest lengths.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Element type of Q and O.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Element type of K and V.
    pub fn kv_dtype(&self) -> DType {
        self.kv_dtype
    }

    /// What scores are multiplied by.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The softcap `c` of `c * tanh(s / c)`, if any.
    pub fn softcap(&self) -> Option<f32> {
        self.softcap
    }

    /// Where query row 0 stands among the keys.
    pub fn query_offset(&self) -> QueryOffset {
        self.offset
    }

    /// The mask operand, if any.
    pub fn mask(&self) -> Option<MaskSpec> {
        self.mask
    }

    /// Whether tile classes of the mask are given.
    pub fn has_tile_classes(&self) -> bool {
        self.tile_classes
    }

    /// Whether each head has a sink logit.
    pub fn has_sinks(&self) -> bool {
        self.sinks
    }

    /// Whether each head has an ALiBi slope.
    pub fn has_alibi(&self) -> bool {
        self.alibi
    }

    /// Whether the log-sum-exp is written.
    pub fn has_lse(&self) -> bool {
        self.lse
    }

    /// Strides of Q, K, V or O.
    pub fn strides(&self, role: Role) -> Option<Strides> {
        match role {
            Role::Query => Some(self.q),
            Role::Key => Some(self.k),
            Role::Value => Some(self.v),
            Role::Output => Some(self.o),
            _ => None,
        }
    }

    /// Cumulative lengths of packed queries and keys, if packed.
    pub fn cu_seqlens(&self) -> Option<(&[u32], &[u32])> {
        self.packed.as_ref().map(|(q, k)| (q.cu(), k.cu()))
    }

    /// Query heads that share one key/value head.
    pub fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    /// Visibility apart from the offset, which may differ by sequence.
    pub fn visibility(&self, query_len: usize, key_len: usize) -> Visibility {
        let q_offset = match self.offset {
            QueryOffset::At(offset) => offset,
            QueryOffset::BottomRight => key_len as i64 - query_len as i64,
        };
        Visibility {
            q_offset,
            causal: self.causal,
            window: self.window,
            window_right: self.window_right,
        }
    }

    /// Sequence `b` of the batch or of the packed sequences; `b < shape().batch`.
    pub fn sequence(&self, b: usize) -> Sequence {
        let (query_len, key_len, batch, q_start, k_start) = match &self.packed {
            None => (self.shape.query_len, self.shape.key_len, b, 0, 0),
            Some((q, k)) => (q.len(b), k.len(b), 0, q.start(b), k.start(b)),
        };
        let visibility = self.visibility(query_len, key_len);
        Sequence {
            query_len,
            key_len,
            visibility,
            batch,
            q_start,
            k_start,
        }
    }

    /// Offset of row `i` of head `h` in Q, in elements.
    #[inline]
    pub fn q_at(&self, s: &Sequence, h: usize, i: usize) -> usize {
        self.q.at(s.batch, h, s.q_start + i)
    }

    /// Offset of key row `j` of key/value head `h` in K, in elements.
    #[inline]
    pub fn k_at(&self, s: &Sequence, h: usize, j: usize) -> usize {
        self.k.at(s.batch, h, s.k_start + j)
    }

    /// Offset of key row `j` of key/value head `h` in V, in elements.
    #[inline]
    pub fn v_at(&self, s: &Sequence, h: usize, j: usize) -> usize {
        self.v.at(s.batch, h, s.k_start + j)
    }

    /// Offset of row `i` of head `h` in O, in elements.
    #[inline]
    pub fn o_at(&self, s: &Sequence, h: usize, i: usize) -> usize {
        self.o.at(s.batch, h, s.q_start + i)
    }

    /// Offset of row `i` of head `h` in the mask, in elements; 0 without a mask.
    #[inline]
    pub fn mask_at(&self, s: &Sequence, h: usize, i: usize) -> usize {
        self.mask.map_or(0, |m| {
            s.batch * m.batch_stride + h * m.head_stride + (s.q_start + i) * m.row_stride
        })
    }

    /// Offset of row `i` of head `h` in the log-sum-exp output.
    #[inline]
    pub fn lse_at(&self, s: &Sequence, h: usize, i: usize) -> usize {
        (s.batch * self.shape.heads + h) * self.query_rows() + s.q_start + i
    }

    /// Query rows of one head: qL, or all packed rows.
    pub fn query_rows(&self) -> usize {
        self.packed
            .as_ref()
            .map_or(self.shape.query_len, |(q, _)| q.total())
    }

    /// What the problem requires of an operand; `None` where it takes none.
    pub fn operand(&self, role: Role) -> Option<OperandSpec> {
        let e = &self.elements;
        let spec = |dtype, elements| Some(OperandSpec { dtype, elements });
        match role {
            Role::Query => spec(self.dtype, e.q),
            Role::Key => spec(self.kv_dtype, e.k),
            Role::Value => spec(self.kv_dtype, e.v),
            Role::Output => spec(self.dtype, e.o),
            Role::Mask => self.mask.and_then(|m| spec(m.dtype, e.mask)),
            Role::TileClasses => self
                .tile_classes
                .then_some(())
                .and(spec(DType::U8, e.tile_classes)),
            Role::Sinks => self
                .sinks
                .then_some(())
                .and(spec(DType::F32, self.shape.heads)),
            Role::AlibiSlopes => self
                .alibi
                .then_some(())
                .and(spec(DType::F32, self.shape.heads)),
            Role::Lse => self.lse.then_some(()).and(spec(DType::F32, e.lse)),
        }
    }

    /// Floating-point operations over the visible pairs: `4 * D` each.
    pub fn flops(&self) -> f64 {
        let pairs: f64 = (0..self.shape.batch)
            .map(|b| {
                let s = self.sequence(b);
                (0..s.query_len)
                    .map(|i| s.visibility.keys(i as i64, s.key_len).len() as f64)
                    .sum::<f64>()
            })
            .sum();
        4.0 * pairs * self.shape.heads as f64 * self.shape.head_dim as f64
    }
}

/// Collects a problem's parts; [`ProblemBuilder::build`] checks them all.
#[derive(Debug, Clone)]
pub struct ProblemBuilder {
    shape: Shape,
    dtype: DType,
    kv_dtype: DType,
    scale: Option<f32>,
    softcap: Option<f32>,
    offset: QueryOffset,
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
    packed: Option<(Box<[u32]>, Box<[u32]>)>,
}

impl ProblemBuilder {
    fn new(dtype: DType, shape: Shape, packed: Option<(Box<[u32]>, Box<[u32]>)>) -> Self {
        Self {
            shape,
            dtype,
            kv_dtype: dtype,
            scale: None,
            softcap: None,
            offset: QueryOffset::At(0),
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
        }
    }

    /// Score scale; `1 / sqrt(D)` when not given. Not premultiplied by log2(e).
    pub fn scale(mut self, scale: f32) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Caps scores: `s = c * tanh(s / c)`, after the scale and before any mask.
    pub fn softcap(mut self, c: f32) -> Self {
        self.softcap = Some(c);
        self
    }

    /// Hides keys after each query's own position (see [`ProblemBuilder::query_offset`]).
    pub fn causal(mut self, causal: bool) -> Self {
        self.causal = causal;
        self
    }

    /// Where query row 0 stands among the keys; `At(0)` when not given.
    pub fn query_offset(mut self, offset: QueryOffset) -> Self {
        self.offset = offset;
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

    /// Order of the dense operands.
    pub fn layout(mut self, layout: Layout) -> Self {
        self.layout = layout;
        self
    }

    /// Rows that K and V have room for, at least kL: a cache that is not full.
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

    /// Tile classes of the mask are given too (see [`crate::ops::flash_attn_prefill_blk`]).
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
    /// query's position (Press et al. 2022, section 3; symmetric for encoders).
    pub fn alibi(mut self, given: bool) -> Self {
        self.alibi = given;
        self
    }

    /// The log-sum-exp of each row is written too.
    pub fn lse(mut self, wanted: bool) -> Self {
        self.lse = wanted;
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
        check_shape(&shape)?;
        check_dtypes(self.dtype, self.kv_dtype)?;
        let scale = self.scale.unwrap_or(1.0 / (shape.head_dim as f32).sqrt());
        if !scale.is_finite() {
            return Err(MlxError::expected("scale", "a finite number", scale));
        }
        if let Some(c) = self.softcap.filter(|c| !(c.is_finite() && *c > 0.0)) {
            return Err(MlxError::expected("softcap", "a finite number above 0", c));
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
        if let QueryOffset::At(offset) = self.offset
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
        let extent = |heads, len| Extent {
            batch,
            heads,
            len,
            row: shape.head_dim,
        };
        let (eq, ek) = (extent(shape.heads, rows_q), extent(shape.kv_heads, rows_k));
        let q = self.strides_of(Role::Query, shape.heads, rows_q)?;
        let k = self.strides_of(Role::Key, shape.kv_heads, capacity)?;
        let v = self.strides_of(Role::Value, shape.kv_heads, capacity)?;
        let o = self.strides_of(Role::Output, shape.heads, rows_q)?;
        o.check_disjoint("out", eq)?;
        let mut elements = Elements {
            q: q.span("Q", eq)?,
            k: k.span("K", ek)?,
            v: v.span("V", ek)?,
            o: o.span("out", eq)?,
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
            offset: self.offset,
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

    fn strides_of(&self, role: Role, heads: usize, capacity: usize) -> Result<Strides> {
        match self.strides.get(role as usize).copied().flatten() {
            Some(strides) => Ok(strides),
            None => self
                .layout
                .strides(heads, capacity, self.shape.head_dim)
                .ok_or_else(|| {
                    MlxError::InvalidArgument(format!(
                        "{}: {heads} heads x {capacity} rows x {} elements overflow",
                        role.name(),
                        self.shape.head_dim
                    ))
                }),
        }
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
        let tile = variant::class_tile(shape.head_dim);
        let (nq, nk) = tile.count(shape.query_len, shape.key_len);
        nq.checked_mul(nk)
            .ok_or_else(|| MlxError::InvalidArgument(format!("blk: {nq} x {nk} tiles overflow")))
    }
}

fn check_shape(shape: &Shape) -> Result<()> {
    let sizes = [
        ("batch", shape.batch),
        ("n_heads", shape.heads),
        ("n_kv_heads", shape.kv_heads),
        ("seq_len_q", shape.query_len),
        ("seq_len_k", shape.key_len),
        ("head_dim", shape.head_dim),
    ];
    for (name, size) in sizes {
        if size == 0 || i32::try_from(size).is_err() {
            return Err(MlxError::expected(
                name,
                "a size from 1 to 2147483647",
                size,
            ));
        }
    }
    if !shape.heads.is_multiple_of(shape.kv_heads) {
        return Err(MlxError::InvalidArgument(format!(
            "n_heads ({}) must be divisible by n_kv_heads ({})",
            shape.heads, shape.kv_heads
        )));
    }
    if !variant::HEAD_DIMS.contains(&shape.head_dim) {
        return Err(MlxError::expected(
            "head_dim",
            format!("one of {:?}", variant::HEAD_DIMS),
            shape.head_dim,
        ));
    }
    Ok(())
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
