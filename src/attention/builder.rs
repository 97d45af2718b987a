//! Collects and checks a problem's parts.

use super::element::Format;
use super::keys::{KeyLengths, Keys, PackedRows, Pages};
use super::layout::{Layout, Strides};
use super::mask::MaskSpec;
use super::operand::Role;
use super::placement::{Placement, check_tile_classes, mask_elements};
use super::problem::{Elements, Problem, QueryOffset, Reach};
use super::score::Score;
use super::shape::{HEAD_DIMS, Shape};
use super::varlen::Boundaries;
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// Collects a problem's parts; [`ProblemBuilder::build`] checks them all.
#[derive(Debug, Clone)]
pub struct ProblemBuilder {
    shape: Shape,
    dtype: DType,
    score: Score,
    offset: Option<QueryOffset>,
    reach: Reach,
    placement: Placement,
    tile_classes: bool,
    sinks: bool,
    lse: bool,
    packed_queries: Option<Box<[u32]>>,
    packed_keys: Option<Box<[u32]>>,
    pages: Option<Pages>,
    key_lengths: KeyLengths,
    refuse_empty: bool,
}

impl Problem {
    /// Starts a problem over dense `[B, H, L, D]` operands of `dtype`.
    pub fn builder(dtype: DType, shape: Shape) -> ProblemBuilder {
        ProblemBuilder::new(dtype, shape)
    }

    /// Starts a problem over packed sequences: Q and O `[total_q, H, D]`, K and V
    /// `[total_k, Hkv, D]`, sequence `b` owning query rows `cu_seqlens_q[b]..cu_seqlens_q[b + 1]`
    /// and key rows likewise. A mask has a row for each packed query row and columns local to the
    /// sequence; a log-sum-exp is `[H, total_q]`. The oracle's rows are head-major: hold them against a
    /// device's by [`Problem::o_at`] and [`reference_row`](super::oracle::reference_row). In
    /// [`Problem::shape`] the batch is the count of sequences, the lengths are the longest
    /// ones. Sequences may be empty, and so may all of them.
    pub fn varlen(
        dtype: DType,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        cu_seqlens_q: &[u32],
        cu_seqlens_k: &[u32],
    ) -> ProblemBuilder {
        Self::varlen_queries(dtype, heads, kv_heads, 0, head_dim, cu_seqlens_q)
            .packed_keys(cu_seqlens_k)
    }

    /// Starts a problem of packed queries, as [`Problem::varlen`] has them, over keys that each sequence has
    /// for itself: at most `key_len` of them in K and V `[B, Hkv, kL, D]`, or in pages.
    pub fn varlen_queries(
        dtype: DType,
        heads: usize,
        kv_heads: usize,
        key_len: usize,
        head_dim: usize,
        cu_seqlens_q: &[u32],
    ) -> ProblemBuilder {
        let shape = Shape {
            batch: 0,
            heads,
            kv_heads,
            query_len: 0,
            key_len,
            qk_dim: head_dim,
            v_dim: head_dim,
        };
        ProblemBuilder::new(dtype, shape)
            .packed_queries(cu_seqlens_q)
            .layout(Layout::SeqMajor)
    }
}

impl ProblemBuilder {
    pub(super) fn new(dtype: DType, shape: Shape) -> Self {
        Self {
            shape,
            dtype,
            score: Score::default(),
            offset: None,
            reach: Reach::default(),
            placement: Placement::new(dtype),
            tile_classes: false,
            sinks: false,
            lse: false,
            packed_queries: None,
            packed_keys: None,
            pages: None,
            key_lengths: KeyLengths::All,
            refuse_empty: false,
        }
    }

    pub(super) fn packed_queries(mut self, cu_seqlens_q: &[u32]) -> Self {
        self.packed_queries = Some(cu_seqlens_q.into());
        self
    }

    pub(super) fn packed_keys(mut self, cu_seqlens_k: &[u32]) -> Self {
        self.packed_keys = Some(cu_seqlens_k.into());
        self
    }

    /// Score scale; `1 / sqrt(qk_dim)` when not given. Not premultiplied by log2(e).
    pub fn scale(mut self, scale: f32) -> Self {
        self.score.scale = Some(scale);
        self
    }

    /// Caps scores: `s = c * tanh(s / c)` for a normal number `c` above 0, after the scale and before any mask.
    pub fn softcap(mut self, c: f32) -> Self {
        self.score.softcap = Some(c);
        self
    }

    /// A mask operand.
    pub fn mask(mut self, mask: MaskSpec) -> Self {
        self.score.mask = Some(mask);
        self
    }

    /// Each head has an ALiBi slope: `-slope * |p - j|` is added to the capped score, `p` being the
    /// query's position (Press et al. 2022, section 3; symmetric for encoders). Distance and product
    /// are f32, so keys further than 2^24 from the query are not told apart.
    pub fn alibi(mut self, given: bool) -> Self {
        self.score.alibi = given;
        self
    }

    /// Hides keys after each query's own position (see [`ProblemBuilder::query_offset`], which must be
    /// called where qL and kL differ).
    pub fn causal(mut self, causal: bool) -> Self {
        self.reach.causal = causal;
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

    /// A query sees exactly `window` keys up to and including its own position, and later ones where neither
    /// [`Self::causal`] nor [`Self::window_right`] hides them.
    pub fn window(mut self, window: usize) -> Self {
        self.reach.window = Some(window);
        self
    }

    /// A query sees at most `keys` keys after its own position (encoders).
    pub fn window_right(mut self, keys: usize) -> Self {
        self.reach.window_right = Some(keys);
        self
    }

    /// Order of the dense operands. Packed rows are `[total, H, D]` by default, and head-major
    /// `[H, total, D]`.
    pub fn layout(mut self, layout: Layout) -> Self {
        self.placement.layout = layout;
        self
    }

    /// Rows that K and V have room for, at least kL (packed: at least all of them): a cache that is not
    /// full.
    pub fn key_capacity(mut self, rows: usize) -> Self {
        self.placement.key_capacity = Some(rows);
        self
    }

    /// Strides of Q, K, V or O in elements, instead of a dense layout; other roles are ignored.
    /// Inputs may overlap or broadcast (stride 0); rows of O may not.
    pub fn strides(mut self, role: Role, strides: Strides) -> Self {
        if let Some(slot) = self.placement.strides.get_mut(role as usize) {
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
    pub fn kv_dtype(self, dtype: DType) -> Self {
        self.key_format(dtype).value_format(dtype)
    }

    /// How the elements of K are stored, where that is not the element type of Q. Blocks lie along a row.
    pub fn key_format(mut self, format: impl Into<Format>) -> Self {
        self.placement.key_format = format.into();
        self
    }

    /// How the elements of V are stored, where that is not the element type of Q.
    pub fn value_format(mut self, format: impl Into<Format>) -> Self {
        self.placement.value_format = format.into();
        self
    }

    /// K and V lie in pages of a pool, which a block table names for each sequence
    /// ([`Role::BlockTable`]). Their layout is that of a page: `[pages, Hkv, page_size, D]` head-major,
    /// `[pages, page_size, Hkv, D]` seq-major.
    pub fn pages(mut self, pages: Pages) -> Self {
        self.pages = Some(pages);
        self
    }

    /// How many keys each sequence has, where not all have kL. Bottom-right offsets follow each length.
    pub fn key_lengths(mut self, lengths: KeyLengths) -> Self {
        self.key_lengths = lengths;
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
    ///
    /// # Errors
    /// `InvalidArgument`, or `UnsupportedDtype`, names the first part that is wrong, what was expected and
    /// what came.
    pub fn build(self) -> Result<Problem> {
        let (packed_queries, keys) = self.rows()?;
        let mut shape = self.shape;
        if let Some(q) = &packed_queries {
            (shape.batch, shape.query_len) = (q.count(), q.longest());
        }
        if let Keys::Packed(PackedRows(k)) = &keys {
            shape.key_len = k.longest();
        }
        if self.refuse_empty {
            check_not_empty(&shape)?;
        }
        check_shape(&shape)?;
        self.key_lengths.check(shape.batch, shape.key_len)?;
        check_formats(self.dtype, self.placement.formats(), &shape)?;
        let score = self.score.check(shape.qk_dim)?;
        self.reach.check()?;
        let mut problem = Problem {
            shape,
            dtype: self.dtype,
            key_format: self.placement.key_format,
            value_format: self.placement.value_format,
            score,
            offset: QueryOffset::default(),
            offset_stated: self.offset.is_some(),
            reach: self.reach,
            most_keys: 0,
            q: Strides::default(),
            k: Strides::default(),
            v: Strides::default(),
            o: Strides::default(),
            tile_classes: self.tile_classes,
            sinks: self.sinks,
            lse: self.lse,
            packed_queries,
            keys,
            key_lengths: self.key_lengths.clone(),
            elements: Elements::default(),
        };
        problem.offset = self.offset(&problem)?;
        self.placement.queries(&mut problem)?;
        self.placement.keys(&mut problem)?;
        problem.most_keys = self.placement.most_keys(&problem).min(LONGEST);
        if let Some(mask) = &problem.score.mask {
            problem.elements.mask = mask_elements(mask, &problem)?;
        }
        if self.tile_classes {
            problem.elements.tile_classes = check_tile_classes(&problem)?;
        }
        Ok(problem)
    }

    /// The boundaries of packed queries, and where keys lie.
    fn rows(&self) -> Result<(Option<Boundaries>, Keys)> {
        let packed = |name, cu: &Option<Box<[u32]>>| {
            cu.as_ref().map(|cu| Boundaries::new(name, cu)).transpose()
        };
        let queries = packed("cu_seqlens_q", &self.packed_queries)?;
        let keys = match (packed("cu_seqlens_k", &self.packed_keys)?, self.pages) {
            (None, None) => return Ok((queries, Keys::Dense)),
            (None, Some(pages)) => return Ok((queries, Keys::Paged(pages))),
            (Some(k), None) => k,
            (Some(_), Some(_)) => {
                let why = "no cu_seqlens_k, which `Problem::varlen_queries` leaves out";
                return Err(MlxError::expected("pages", why, "both"));
            }
        };
        if self.key_lengths != KeyLengths::All {
            return Err(MlxError::expected(
                "key_lengths",
                "keys that are not packed: cu_seqlens_k has their lengths",
                "both",
            ));
        }
        match &queries {
            Some(q) if q.count() != keys.count() => Err(MlxError::expected(
                "cu_seqlens_k",
                format!("{} sequences as in cu_seqlens_q", q.count()),
                keys.count(),
            )),
            _ => Ok((queries, Keys::Packed(PackedRows(keys)))),
        }
    }

    /// The offset as given; 0 where none is and none is needed.
    fn offset(&self, problem: &Problem) -> Result<QueryOffset> {
        if let Some(offset) = self.offset {
            return match offset {
                QueryOffset::At(n) if i32::try_from(n).is_err() => {
                    Err(MlxError::expected("q_offset", "a 32-bit offset", n))
                }
                _ => Ok(offset),
            };
        }
        check_no_offset(problem)?;
        Ok(QueryOffset::At(0))
    }
}

/// Refuses a problem whose query offset was not stated and makes a difference.
pub(super) fn check_no_offset(problem: &Problem) -> Result<()> {
    if problem.reach == Reach::default() && !problem.score.alibi {
        return Ok(());
    }
    let of_device = problem.key_lengths == KeyLengths::Device;
    // Where no sequence has lengths of its own, the first stands for all.
    let own =
        problem.packed_queries.is_some() || matches!(problem.key_lengths, KeyLengths::Host(_));
    let sequences = if own {
        problem.shape.batch
    } else {
        problem.shape.batch.min(1)
    };
    let unlike = (0..sequences)
        .map(|b| problem.sequence(b))
        .map(|s| (s.query_len, s.key_len))
        .find(|(q, k)| (q != k || of_device) && *q > 0 && *k > 0);
    match unlike {
        Some((q, k)) => Err(MlxError::expected(
            "query_offset",
            "a choice where qL and kL differ: `query_offset(QueryOffset::At(0))` (top left, query 0 \
             at key 0) or `query_offset(QueryOffset::BottomRight)` (the last query at the last key)",
            format!("none, with {q} queries over {k} keys"),
        )),
        None => Ok(()),
    }
}

impl Reach {
    fn check(&self) -> Result<()> {
        let narrow = |w: &usize| i32::try_from(*w).is_ok();
        if let Some(w) = self.window.filter(|w| *w == 0 || !narrow(w)) {
            return Err(MlxError::expected("window", "1 to 2147483647 keys", w));
        }
        match self.window_right.filter(|w| !narrow(w)) {
            Some(w) => Err(MlxError::expected(
                "window_right",
                "0 to 2147483647 keys",
                w,
            )),
            None => Ok(()),
        }
    }
}

fn check_not_empty(shape: &Shape) -> Result<()> {
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

fn check_formats(dtype: DType, formats: [Format; 2], shape: &Shape) -> Result<()> {
    if !dtype.is_float() {
        return Err(MlxError::UnsupportedDtype(format!(
            "Q: expected f32, f16 or bf16, got {dtype}"
        )));
    }
    let widths = [("K", shape.qk_dim), ("V", shape.v_dim)];
    for (format, (name, width)) in formats.into_iter().zip(widths) {
        let narrower = (dtype, format) == (DType::F32, Format::Plain(DType::F16));
        match format {
            Format::Plain(plain) if plain != dtype && !narrower => {
                return Err(MlxError::UnsupportedDtype(format!(
                    "K and V: expected {dtype} as Q{}, got {plain}",
                    if dtype == DType::F32 { " or f16" } else { "" }
                )));
            }
            _ if !width.is_multiple_of(format.block()) => {
                return Err(MlxError::expected(
                    name,
                    format!("rows of whole blocks of {} elements", format.block()),
                    format!("{width} elements of {format}"),
                ));
            }
            _ => {}
        }
    }
    Ok(())
}
