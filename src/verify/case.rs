//! One case of the matrix: what it asks, and its name.

use super::sequences::{Sequences, joined};
use crate::attention::{Format, Layout, MaskSpec, Problem, QueryOffset, Role, Shape, Strides};
use crate::dtype::DType;
use crate::error::Result;
use crate::hash::fnv1a;

/// How operands lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Placement {
    HeadMajor,
    SeqMajor,
    /// Gaps between rows, between heads and after the valid keys.
    Strided,
}

/// What kind of mask, by how it broadcasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum MaskKind {
    None,
    /// `[qL, kL]` in Q's dtype.
    Plane,
    /// `[qL, kL]` in f32.
    PlaneF32,
    /// `[qL, kL]` of booleans.
    PlaneBool,
    /// `[B, H, qL, kL]`.
    PerHead,
    /// `[1, H, qL, kL]` or `[B, 1, qL, kL]`.
    Broadcast,
    /// One row over the keys for each batch: row stride 0.
    Padding,
}

impl MaskKind {
    pub(super) const ALL: [Self; 7] = [
        Self::None,
        Self::Plane,
        Self::PlaneF32,
        Self::PlaneBool,
        Self::PerHead,
        Self::Broadcast,
        Self::Padding,
    ];
}

/// Causal bound and windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Bounds {
    pub(super) label: &'static str,
    pub(super) causal: bool,
    pub(super) offset: QueryOffset,
    pub(super) window: Option<usize>,
    pub(super) window_right: Option<usize>,
}

/// Which of the crate's entry points a case calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    /// `ops::attention`.
    Attention,
    /// `ops::flash_attn_vec`, the window as its `mask_type` 2.
    Decode,
    /// `ops::flash_attn_prefill_d512`, with so many simdgroups.
    D512 { nsg: u32 },
}

/// One case of the matrix.
#[derive(Debug, Clone)]
pub struct Case {
    pub(super) head_dim: usize,
    pub(super) dtype: DType,
    /// K and V's dtype, where it differs.
    pub(super) kv_dtype: DType,
    /// K and V in blocks: their formats.
    pub(super) blocks: Option<[Format; 2]>,
    pub(super) batch: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) query_len: usize,
    pub(super) key_len: usize,
    /// Lengths of packed queries and keys; they replace batch and lengths.
    pub(super) packed: Option<(Vec<u32>, Vec<u32>)>,
    pub(super) sequences: Sequences,
    pub(super) placement: Placement,
    pub(super) mask: MaskKind,
    pub(super) mask_dtype: DType,
    /// The device fills the mask, as these bounds say, instead of the host.
    pub(super) built: Option<Bounds>,
    /// The device classifies the mask's tiles first.
    pub(super) tile_classes: bool,
    pub(super) bounds: Bounds,
    pub(super) softcap: Option<f32>,
    pub(super) sinks: bool,
    pub(super) alibi: bool,
    pub(super) lse: bool,
    /// The scale times `sqrt(D)`: about how far scores deviate.
    pub(super) gain: f32,
    pub(super) entry: Entry,
}

impl Case {
    /// A plain case, dense and unmasked.
    pub(super) fn new(head_dim: usize, dtype: DType, lengths: (usize, usize)) -> Self {
        Self {
            head_dim,
            dtype,
            kv_dtype: dtype,
            blocks: None,
            batch: 1,
            heads: 2,
            kv_heads: 1,
            query_len: lengths.0,
            key_len: lengths.1,
            packed: None,
            sequences: Sequences::default(),
            placement: Placement::HeadMajor,
            mask: MaskKind::None,
            mask_dtype: dtype,
            built: None,
            tile_classes: false,
            bounds: Bounds {
                label: "full",
                ..Bounds::default()
            },
            softcap: None,
            sinks: false,
            alibi: false,
            lse: false,
            gain: 1.0,
            entry: Entry::Attention,
        }
    }

    /// A name for people, unique within the matrix.
    pub fn name(&self) -> String {
        let lengths = match (&self.packed, &self.sequences.queries) {
            (Some((q, k)), _) => format!("q{}-k{}", joined(q), joined(k)),
            (None, Some(q)) => format!("q{}-k{}", joined(q), self.key_len),
            (None, None) => format!("b{}-q{}-k{}", self.batch, self.query_len, self.key_len),
        };
        let mut name = format!(
            "{}-d{}-{}-{}-h{}x{}-{lengths}-{}",
            self.dtype,
            self.head_dim,
            self.mask(),
            self.layout(),
            self.heads,
            self.kv_heads,
            self.bounds.label,
        );
        name += &self.sequences.label();
        if self.mask != MaskKind::None && self.mask_dtype != self.dtype {
            name += &format!("-mask.{}", self.mask_dtype);
        }
        if let Some(bounds) = self.built {
            name += &format!("-built.{}", bounds.label);
        }
        if let Some(c) = self.softcap {
            name += &format!("-softcap{c}");
        }
        if self.gain != 1.0 {
            name += &format!("-gain{}", self.gain);
        }
        if self.kv_dtype != self.dtype {
            name += &format!("-kv.{}", self.kv_dtype);
        }
        if let Some([k, v]) = self.blocks {
            name += &format!("-k.{k}-v.{v}");
        }
        if let Entry::D512 { nsg } = self.entry {
            name += &format!("-nsg{nsg}");
        }
        for (given, what) in [
            (self.tile_classes, "blk"),
            (self.sinks, "sinks"),
            (self.alibi, "alibi"),
            (self.lse, "lse"),
            (self.entry == Entry::Decode, "vec"),
        ] {
            if given {
                name = name + "-" + what;
            }
        }
        name
    }

    /// The head dimension.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Element type of Q and O.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The mask's kind.
    pub fn mask(&self) -> &'static str {
        match self.mask {
            MaskKind::None => "none",
            MaskKind::Plane => "additive",
            MaskKind::PlaneF32 => "additive-f32",
            MaskKind::PlaneBool => "bool",
            MaskKind::PerHead => "per-head",
            MaskKind::Broadcast => "broadcast",
            MaskKind::Padding => "padding",
        }
    }

    /// How the operands lie.
    pub fn layout(&self) -> &'static str {
        match self.placement {
            Placement::HeadMajor => "head-major",
            Placement::SeqMajor => "seq-major",
            Placement::Strided => "strided",
        }
    }

    /// What else the case exercises.
    pub fn features(&self) -> Vec<&'static str> {
        let packed = self.packed.as_ref();
        // Each batch entry has as many queries.
        let dense = packed.is_none() && self.sequences.queries.is_none();
        let Sequences {
            queries,
            keys,
            pages,
        } = &self.sequences;
        let in_blocks = |format| self.blocks.is_some_and(|of| of.contains(&format));
        let all = [
            (self.bounds.label != "full", self.bounds.label),
            (self.softcap.is_some(), "softcap"),
            (self.sinks, "sinks"),
            (self.alibi, "alibi"),
            (self.lse, "lse"),
            (self.kv_heads == 1 && self.heads > 1, "mqa"),
            (self.kv_heads > 1 && self.heads > self.kv_heads, "gqa"),
            (packed.is_none() && self.batch > 1, "batch"),
            (packed.is_some(), "varlen"),
            (
                packed.is_some_and(|(q, k)| q.contains(&0) || k.contains(&0)),
                "varlen-empty",
            ),
            (self.tile_classes, "blk"),
            (self.built.is_some(), "built-mask"),
            (self.kv_dtype != self.dtype, "kv-f16"),
            (in_blocks(Format::Q8_0), "q8_0"),
            (in_blocks(Format::Q4_0), "q4_0"),
            (dense && self.query_len == 1, "decode"),
            (self.entry == Entry::Decode, "vec"),
            (matches!(self.entry, Entry::D512 { .. }), "nsg"),
            (dense && self.query_len > self.key_len, "q>k"),
            (dense && self.query_len < self.key_len, "q<k"),
            (self.gain > 1.0, "gain"),
            (queries.is_some(), "packed-queries"),
            (keys.as_ref().is_some_and(|k| !k.on_device), "lens"),
            (keys.as_ref().is_some_and(|k| k.on_device), "lens.device"),
            (pages.is_some(), "paged"),
        ];
        all.into_iter().filter(|f| f.0).map(|f| f.1).collect()
    }

    /// The problem that the case states.
    ///
    /// # Errors
    /// As for [`ProblemBuilder::build`](crate::attention::ProblemBuilder::build).
    pub fn problem(&self) -> Result<Problem> {
        let d = self.head_dim;
        let sum = |n: &[u32]| n.iter().map(|n| *n as usize).sum::<usize>();
        let pool = self.sequences.pool(self.batch, self.key_len);
        let rows = match (&self.packed, &self.sequences.queries) {
            (Some((q, _)), _) | (None, Some(q)) => sum(q),
            (None, None) => self.query_len,
        };
        // Rows of K and V at one index of their batch axis, and the most keys of a sequence.
        let (keys, longest) = match (&self.packed, &pool) {
            (Some((_, k)), _) => (sum(k), k.iter().max().map_or(0, |n| *n as usize)),
            (None, Some(pages)) => (pages.page_size, self.key_len),
            (None, None) => (self.key_len, self.key_len),
        };
        let mut builder = match (&self.packed, &self.sequences.queries) {
            (None, Some(q)) => {
                let (heads, kv_heads) = (self.heads, self.kv_heads);
                Problem::varlen_queries(self.dtype, heads, kv_heads, longest, d, &cumulative(q))
            }
            (None, None) => {
                let shape = Shape {
                    batch: self.batch,
                    heads: self.heads,
                    kv_heads: self.kv_heads,
                    query_len: self.query_len,
                    key_len: self.key_len,
                    qk_dim: d,
                    v_dim: d,
                };
                Problem::builder(self.dtype, shape)
            }
            (Some((q, k)), _) => {
                let (q, k) = (cumulative(q), cumulative(k));
                Problem::varlen(self.dtype, self.heads, self.kv_heads, d, &q, &k)
            }
        };
        builder = match self.placement {
            Placement::HeadMajor => builder.layout(Layout::HeadMajor),
            Placement::SeqMajor => builder.layout(Layout::SeqMajor),
            Placement::Strided => builder
                // Rows with gaps; heads with gaps; room for more keys than there are.
                .strides(Role::Query, gapped(self.heads, rows, d, 8, 0))
                .strides(Role::Key, gapped(self.kv_heads, keys, d, 0, 7))
                .strides(Role::Value, gapped(self.kv_heads, keys, d, 3, 2))
                .strides(Role::Output, gapped(self.heads, rows, d, 5, 1)),
        };
        if let Some(mask) = self.mask_spec(rows, longest) {
            builder = builder.mask(mask);
        }
        if let Some(c) = self.softcap {
            builder = builder.softcap(c);
        }
        if let Some(w) = self.bounds.window {
            builder = builder.window(w);
        }
        if let Some(w) = self.bounds.window_right {
            builder = builder.window_right(w);
        }
        if let Some(pages) = pool {
            builder = builder.pages(pages);
        }
        if self.entry == Entry::Decode {
            builder = builder.key_capacity(keys + 9);
        }
        let [key_format, value_format] = self.blocks.unwrap_or([self.kv_dtype.into(); 2]);
        builder
            .key_format(key_format)
            .value_format(value_format)
            .key_lengths(self.sequences.key_lengths())
            .scale(self.gain / (d as f32).sqrt())
            .causal(self.bounds.causal)
            .query_offset(self.bounds.offset)
            .tile_classes(self.tile_classes)
            .sinks(self.sinks)
            .alibi(self.alibi)
            .lse(self.lse)
            .build()
    }

    fn mask_spec(&self, rows: usize, keys: usize) -> Option<MaskSpec> {
        // Tile classes and the mask fill know dense rows only.
        let dense = self.tile_classes || self.built.is_some();
        let row = if self.placement == Placement::Strided && !dense {
            keys + 5
        } else {
            keys
        };
        let plane = rows * row;
        let packed = self.packed.is_some() || self.sequences.queries.is_some();
        let batch = |stride| if packed { 0 } else { stride };
        let (batch_stride, head_stride, row_stride) = match self.mask {
            MaskKind::None => return None,
            MaskKind::Plane | MaskKind::PlaneF32 | MaskKind::PlaneBool => (0, 0, row),
            MaskKind::PerHead => (batch(self.heads * plane), plane, row),
            MaskKind::Broadcast if self.batch > 1 && !packed => (plane, 0, row),
            MaskKind::Broadcast => (0, plane, row),
            MaskKind::Padding => (batch(row), 0, 0),
        };
        Some(MaskSpec {
            dtype: self.mask_dtype,
            batch_stride,
            head_stride,
            row_stride,
        })
    }

    /// A seed for the case's operands, from its name.
    pub(super) fn seed(&self) -> u64 {
        fnv1a(self.name().bytes())
    }
}

/// Strides of `[B, H, L, D]` with `row_gap` elements after a row and `rows_gap` rows after a head.
fn gapped(heads: usize, len: usize, dim: usize, row_gap: usize, rows_gap: usize) -> Strides {
    let seq = dim + row_gap;
    let head = (len + rows_gap) * seq;
    Strides {
        batch: heads * head,
        head,
        seq,
    }
}

fn cumulative(lengths: &[u32]) -> Vec<u32> {
    let mut at = 0;
    let ends = lengths.iter().map(|n| {
        at += n;
        at
    });
    std::iter::once(0).chain(ends).collect()
}
