//! What is asked: one attention problem, built once and checked once.

use super::builder::ProblemBuilder;
use super::layout::{Layout, Strides};
use super::mask::{MaskSpec, Visibility};
use super::operand::{OperandSpec, Role};
use super::shape::Shape;
use super::varlen::Boundaries;
use crate::dtype::DType;

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

/// One sequence of a problem: a batch entry, or one of the packed sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// Its query rows.
    pub query_len: usize,
    /// Its keys.
    pub key_len: usize,
    /// Which of its keys each row sees by position, this sequence's offset included. A mask hides
    /// more.
    pub visibility: Visibility,
    /// Batch index that strides apply to (0 when packed).
    pub(crate) batch: usize,
    /// First row among the packed queries (0 when not packed).
    pub(crate) q_start: usize,
    /// First row among the packed keys (0 when not packed).
    k_start: usize,
}

/// A checked attention problem: `O = softmax(softcap(scale * Q K^T) + mask) V` over the visible
/// keys, with everything that decides its result and its memory.
///
/// Built by [`Problem::builder`] or [`Problem::varlen`]; immutable afterwards.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    pub(super) shape: Shape,
    pub(super) dtype: DType,
    pub(super) kv_dtype: DType,
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    pub(super) offset: QueryOffset,
    pub(super) causal: bool,
    pub(super) window: Option<u32>,
    pub(super) window_right: Option<u32>,
    pub(super) q: Strides,
    pub(super) k: Strides,
    pub(super) v: Strides,
    pub(super) o: Strides,
    pub(super) mask: Option<MaskSpec>,
    pub(super) tile_classes: bool,
    pub(super) sinks: bool,
    pub(super) alibi: bool,
    pub(super) lse: bool,
    pub(super) packed: Option<(Boundaries, Boundaries)>,
    pub(super) elements: Elements,
}

/// Elements that each operand must hold, worked out once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Elements {
    pub(super) q: usize,
    pub(super) k: usize,
    pub(super) v: usize,
    pub(super) o: usize,
    pub(super) mask: usize,
    pub(super) tile_classes: usize,
    pub(super) lse: usize,
}

impl Problem {
    /// Starts a problem over dense `[B, H, L, D]` operands of `dtype`.
    pub fn builder(dtype: DType, shape: Shape) -> ProblemBuilder {
        ProblemBuilder::new(dtype, shape, None)
    }

    /// Starts a problem over packed sequences: Q and O `[total_q, H, D]`, K and V
    /// `[total_k, Hkv, D]`, sequence `b` owning query rows `cu_seqlens_q[b]..cu_seqlens_q[b + 1]`
    /// and key rows likewise. A mask has a row for each packed query row and columns local to the
    /// sequence; a log-sum-exp is `[H, total_q]`. The oracle's rows are head-major: hold them against a
    /// device's by [`Problem::o_at`] and [`reference_row`](super::oracle::reference_row). In [`Problem::shape`] the batch is the count of sequences, the lengths are the longest
    /// ones. Sequences may be empty, and so may all of them.
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
            qk_dim: head_dim,
            v_dim: head_dim,
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

    /// Which keys a sequence of these lengths shows its rows by position: a bottom-right offset, which
    /// the lengths decide, is worked out for them.
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

    /// Whether there is no output: no batch, or no query in any sequence.
    pub fn has_no_rows(&self) -> bool {
        self.shape.batch == 0 || self.shape.query_len == 0
    }

    /// A problem of the same results where this one has no keys at all: one key, which no row sees, so
    /// that every row is zero. Its K and V have one row of the dtype of Q, which is never read into a
    /// result.
    pub(crate) fn without_keys(&self) -> Option<Self> {
        if self.shape.key_len > 0 || self.has_no_rows() {
            return None;
        }
        let row = |width| Strides {
            batch: 0,
            head: 0,
            seq: width,
        };
        let Shape { qk_dim, v_dim, .. } = self.shape;
        let packed = self.packed.as_ref();
        Some(Self {
            shape: Shape {
                key_len: 1,
                ..self.shape
            },
            kv_dtype: self.dtype,
            // The last row stands before the only key.
            causal: true,
            offset: QueryOffset::At(-i64::try_from(self.shape.query_len).unwrap_or(i64::MAX)),
            window: None,
            window_right: None,
            softcap: None,
            k: row(qk_dim),
            v: row(v_dim),
            mask: None,
            tile_classes: false,
            sinks: false,
            alibi: false,
            packed: packed.map(|(q, _)| (q.clone(), Boundaries::one_row(q.count()))),
            elements: Elements {
                k: qk_dim,
                v: v_dim,
                mask: 0,
                tile_classes: 0,
                ..self.elements
            },
            ..self.clone()
        })
    }

    /// Floating-point operations over the visible pairs: `2 * (qk_dim + v_dim)` each.
    pub fn flops(&self) -> f64 {
        let pairs: f64 = (0..self.shape.batch)
            .map(|b| {
                let s = self.sequence(b);
                (0..s.query_len)
                    .map(|i| s.visibility.keys(i as i64, s.key_len).len() as f64)
                    .sum::<f64>()
            })
            .sum();
        let width = (self.shape.qk_dim + self.shape.v_dim) as f64;
        2.0 * pairs * self.shape.heads as f64 * width
    }
}
