//! What is asked: one attention problem, built once and checked once.

use super::element::Format;
use super::keys::{KeyLengths, KeyRow, Keys, PackedRows};
use super::layout::Strides;
use super::mask::MaskSpec;
use super::operand::{OperandSpec, Role};
use super::score::{Score, ScoreStep};
use super::shape::Shape;
use super::varlen::Boundaries;
use super::visibility::Visibility;
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
    /// Its index.
    pub(crate) index: usize,
    /// Batch index that strides of Q, O, mask and log-sum-exp apply to (0 when packed).
    pub(crate) batch: usize,
    /// First row among the packed queries (0 when not packed).
    pub(crate) q_start: usize,
    /// Batch index that strides of K and V apply to (0 when packed; without a meaning for pages).
    key_batch: usize,
    /// First row among the packed keys (0 when not packed).
    k_start: usize,
}

/// A checked attention problem: `O = softmax(softcap(scale * Q K^T) + mask) V` over the visible
/// keys, with everything that decides its result and its memory.
///
/// Built by [`Problem::builder`], [`Problem::varlen`] or [`Problem::varlen_queries`]; immutable afterwards.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    pub(super) shape: Shape,
    pub(super) dtype: DType,
    pub(super) key_format: Format,
    pub(super) value_format: Format,
    pub(super) score: Score,
    pub(super) offset: QueryOffset,
    /// Whether the builder was given the offset.
    pub(super) offset_stated: bool,
    pub(super) reach: Reach,
    /// The largest count of keys that [`Problem::with_key_len`] takes: what the operands were stated to
    /// have room for.
    pub(super) most_keys: usize,
    pub(super) q: Strides,
    pub(super) k: Strides,
    pub(super) v: Strides,
    pub(super) o: Strides,
    pub(super) tile_classes: bool,
    pub(super) sinks: bool,
    pub(super) lse: bool,
    pub(super) packed_queries: Option<Boundaries>,
    pub(super) keys: Keys,
    pub(super) key_lengths: KeyLengths,
    pub(super) elements: Elements,
}

/// How far a query sees, whatever its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Reach {
    pub(super) causal: bool,
    pub(super) window: Option<usize>,
    pub(super) window_right: Option<usize>,
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
    pub(super) block_table: usize,
}

impl Problem {
    /// The sizes; for packed sequences their count and the longest lengths.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Element type of Q and O.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Element type of the buffer of K, and of V where it has the same: `U8` where elements lie in blocks.
    pub fn kv_dtype(&self) -> DType {
        self.key_format.storage()
    }

    /// How the elements of K are stored.
    pub fn key_format(&self) -> Format {
        self.key_format
    }

    /// How the elements of V are stored.
    pub fn value_format(&self) -> Format {
        self.value_format
    }

    /// Where the rows of K and V lie.
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    /// How many keys each sequence has.
    pub fn key_lengths(&self) -> &KeyLengths {
        &self.key_lengths
    }

    /// What happens to a score, in order.
    pub fn score_steps(&self) -> impl Iterator<Item = ScoreStep> {
        self.score.steps()
    }

    /// What scores are multiplied by.
    pub fn scale(&self) -> f32 {
        // `Score::check` set it.
        self.score.scale.unwrap_or(1.0)
    }

    /// The softcap `c` of `c * tanh(s / c)`, if any.
    pub fn softcap(&self) -> Option<f32> {
        self.score.softcap
    }

    /// Where query row 0 stands among the keys.
    pub fn query_offset(&self) -> QueryOffset {
        self.offset
    }

    /// The mask operand, if any.
    pub fn mask(&self) -> Option<MaskSpec> {
        self.score.mask
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
        self.score.alibi
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

    /// Cumulative lengths of queries and keys, if both are packed.
    pub fn cu_seqlens(&self) -> Option<(&[u32], &[u32])> {
        match (&self.packed_queries, &self.keys) {
            (Some(q), Keys::Packed(PackedRows(k))) => Some((q.cu(), k.cu())),
            _ => None,
        }
    }

    /// Cumulative lengths of the queries, if they are packed.
    pub fn cu_seqlens_q(&self) -> Option<&[u32]> {
        self.packed_queries.as_ref().map(Boundaries::cu)
    }

    /// Whether sequences may differ in their counts of queries or keys, so that a bottom-right offset is each one's own.
    pub(crate) fn has_own_lengths(&self) -> bool {
        self.packed_queries.is_some() || self.key_lengths != KeyLengths::All
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
            QueryOffset::BottomRight => {
                let [keys, queries] =
                    [key_len, query_len].map(|n| i64::try_from(n).unwrap_or(i64::MAX));
                keys - queries
            }
        };
        let Reach {
            causal,
            window,
            window_right,
        } = self.reach;
        Visibility {
            q_offset,
            causal,
            window,
            window_right,
        }
    }

    /// Sequence `b` of the batch or of the packed sequences; `b < shape().batch`. With [`KeyLengths::Device`] the
    /// host does not know the sequence's count of keys and kL stands for it; [`Problem::sequence_of`] takes the count.
    pub fn sequence(&self, b: usize) -> Sequence {
        let key_len = match &self.keys {
            Keys::Packed(PackedRows(k)) => k.len(b),
            Keys::Dense | Keys::Paged(_) => self.key_lengths.of(b, self.shape.key_len),
        };
        self.sequence_of(b, key_len)
    }

    /// As [`Problem::sequence`], with `key_len` keys.
    pub fn sequence_of(&self, b: usize, key_len: usize) -> Sequence {
        let (query_len, batch, q_start) = match &self.packed_queries {
            None => (self.shape.query_len, b, 0),
            Some(q) => (q.len(b), 0, q.start(b)),
        };
        let (key_batch, k_start) = match &self.keys {
            Keys::Packed(PackedRows(k)) => (0, k.start(b)),
            Keys::Dense | Keys::Paged(_) => (b, 0),
        };
        Sequence {
            query_len,
            key_len,
            visibility: self.visibility(query_len, key_len),
            index: b,
            batch,
            q_start,
            key_batch,
            k_start,
        }
    }

    /// Offset of row `i` of head `h` in Q, in elements.
    #[inline]
    pub fn q_at(&self, s: &Sequence, h: usize, i: usize) -> usize {
        self.q.at(s.batch, h, s.q_start + i)
    }

    /// Where the rows of a sequence's keys begin; for pages, the first slot of the first page of the pool.
    pub(crate) fn first_key_row(&self, s: &Sequence) -> KeyRow {
        match &self.keys {
            Keys::Paged(_) => KeyRow {
                batch: 0,
                position: 0,
            },
            Keys::Dense | Keys::Packed(_) => KeyRow {
                batch: s.key_batch,
                position: s.k_start,
            },
        }
    }

    /// Where key `j` lies; `block_table` is that of paged keys, and `None` is given where it names no page.
    pub fn key_row(&self, s: &Sequence, j: usize, block_table: Option<&[i32]>) -> Option<KeyRow> {
        match &self.keys {
            Keys::Paged(pages) => pages.row(block_table?, s.index, j),
            Keys::Dense | Keys::Packed(_) => Some(KeyRow {
                batch: s.key_batch,
                position: s.k_start + j,
            }),
        }
    }

    /// Offset of a row of key/value head `h` in K, in elements.
    #[inline]
    pub fn k_of(&self, row: KeyRow, h: usize) -> usize {
        self.k.at(row.batch, h, row.position)
    }

    /// Offset of a row of key/value head `h` in V, in elements.
    #[inline]
    pub fn v_of(&self, row: KeyRow, h: usize) -> usize {
        self.v.at(row.batch, h, row.position)
    }

    /// Offset of key row `j` of key/value head `h` in K, in elements; for keys that are not paged.
    #[inline]
    pub fn k_at(&self, s: &Sequence, h: usize, j: usize) -> usize {
        self.k.at(s.key_batch, h, s.k_start + j)
    }

    /// Offset of key row `j` of key/value head `h` in V, in elements; for keys that are not paged.
    #[inline]
    pub fn v_at(&self, s: &Sequence, h: usize, j: usize) -> usize {
        self.v.at(s.key_batch, h, s.k_start + j)
    }

    /// Offset of row `i` of head `h` in O, in elements.
    #[inline]
    pub fn o_at(&self, s: &Sequence, h: usize, i: usize) -> usize {
        self.o.at(s.batch, h, s.q_start + i)
    }

    /// Offset of row `i` of head `h` in the mask, in elements; 0 without a mask.
    #[inline]
    pub fn mask_at(&self, s: &Sequence, h: usize, i: usize) -> usize {
        self.score.mask.map_or(0, |m| {
            s.batch * m.batch_stride + h * m.head_stride + (s.q_start + i) * m.row_stride
        })
    }

    /// Offset of row `i` of head `h` in the log-sum-exp output.
    #[inline]
    pub fn lse_at(&self, s: &Sequence, h: usize, i: usize) -> usize {
        (s.batch * self.shape.heads + h) * self.query_rows() + s.q_start + i
    }

    /// Batches that strides of Q, O, mask and log-sum-exp step over: 1 for packed queries.
    pub(super) fn query_batches(&self) -> usize {
        match self.packed_queries {
            Some(_) => 1,
            None => self.shape.batch,
        }
    }

    /// Query rows of one head: qL, or all packed rows.
    pub fn query_rows(&self) -> usize {
        self.packed_queries
            .as_ref()
            .map_or(self.shape.query_len, Boundaries::total)
    }

    /// What the problem requires of an operand; `None` where it takes none.
    pub fn operand(&self, role: Role) -> Option<OperandSpec> {
        let e = &self.elements;
        let heads = self.shape.heads;
        let (taken, dtype, elements) = match role {
            Role::Query => (true, self.dtype, e.q),
            Role::Key => (true, self.key_format.storage(), e.k),
            Role::Value => (true, self.value_format.storage(), e.v),
            Role::Output => (true, self.dtype, e.o),
            Role::Mask => {
                let mask = self.score.mask?;
                (true, mask.dtype, e.mask)
            }
            Role::TileClasses => (self.tile_classes, DType::U8, e.tile_classes),
            Role::Sinks => (self.sinks, DType::F32, heads),
            Role::AlibiSlopes => (self.score.alibi, DType::F32, heads),
            Role::Lse => (self.lse, DType::F32, e.lse),
            Role::BlockTable => {
                let paged = matches!(self.keys, Keys::Paged(_));
                (paged, DType::I32, e.block_table)
            }
            Role::KeyLengths => {
                let asked = self.key_lengths == KeyLengths::Device;
                (asked, DType::U32, self.shape.batch)
            }
        };
        taken.then_some(OperandSpec { dtype, elements })
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
        let packed = self.packed_queries.as_ref();
        Some(Self {
            shape: Shape {
                key_len: 1,
                ..self.shape
            },
            key_format: self.dtype.into(),
            value_format: self.dtype.into(),
            // The last row stands before the only key.
            reach: Reach {
                causal: true,
                ..Reach::default()
            },
            offset: QueryOffset::At(-i64::try_from(self.shape.query_len).unwrap_or(i64::MAX)),
            score: Score {
                scale: self.score.scale,
                ..Score::default()
            },
            most_keys: 0,
            k: row(qk_dim),
            v: row(v_dim),
            tile_classes: false,
            sinks: false,
            keys: packed.map_or(Keys::Dense, |q| {
                Keys::Packed(PackedRows(Boundaries::one_row(q.count())))
            }),
            key_lengths: KeyLengths::All,
            elements: Elements {
                k: qk_dim,
                v: v_dim,
                mask: 0,
                tile_classes: 0,
                block_table: 0,
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
