//! The tensors of a safetensors file, held against what attention takes. Every refusal names the
//! tensor, what was expected and what was found.

use anyhow::{Result, anyhow, bail};
use mlx_flash_attn::DType;
use mlx_flash_attn::attention::{MaskSpec, Pages, Shape};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::args::LayoutArg;
use crate::packed::{Packed, check_last};
use crate::score::mask_spec;
use crate::sequences::{BLOCK_TABLE, KEY_LENGTHS, Sequences};
use crate::tensors::{Tensor, optional, required, tensor};

/// The tensors this program knows.
const KNOWN: [&str; 10] = [
    "q",
    "k",
    "v",
    "mask",
    "sinks",
    "alibi_slopes",
    "cu_seqlens_q",
    "cu_seqlens_k",
    BLOCK_TABLE,
    KEY_LENGTHS,
];

/// What a file holds.
#[derive(Debug)]
pub(crate) struct Input<'a> {
    /// The sizes; for packed queries a batch of 1, and all rows.
    pub(crate) shape: Shape,
    /// Keys of a sequence that there is room for.
    pub(crate) capacity: usize,
    pub(crate) packed: Option<Packed>,
    pub(crate) sequences: Sequences<'a>,
    pub(crate) pages: Option<Pages>,
    pub(crate) q: Tensor<'a>,
    pub(crate) k: Tensor<'a>,
    pub(crate) v: Tensor<'a>,
    pub(crate) mask: Option<(Tensor<'a>, MaskSpec)>,
    pub(crate) sinks: Option<Tensor<'a>>,
    pub(crate) alibi_slopes: Option<Tensor<'a>>,
    /// Names of tensors that nothing reads.
    pub(crate) unused: Vec<String>,
}

/// How the axes of q, k and v are read.
#[derive(Debug, Clone, Copy)]
enum Axes {
    Dense(LayoutArg),
    /// [rows, H, D].
    Packed,
    /// A page in place of a batch entry.
    Pages(LayoutArg),
}

impl Axes {
    fn rank(self) -> usize {
        self.names().split(',').count()
    }

    fn names(self) -> &'static str {
        match self {
            Self::Dense(layout) => layout.axes(),
            Self::Packed => "[rows, H, D]",
            Self::Pages(LayoutArg::HeadMajor) => "[pages, Hkv, page_size, D]",
            Self::Pages(LayoutArg::SeqMajor) => "[pages, page_size, Hkv, D]",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Dense(layout) => layout.name(),
            Self::Packed => "packed, as `cu_seqlens_q` is there",
            Self::Pages(_) => "in pages, as `block_table` is there",
        }
    }
}

impl<'a> Input<'a> {
    /// Takes the operands out of `tensors`, whose axes are in the order of `layout`; of `k` and `v`
    /// the first `key_len` rows, if given, are keys.
    pub(crate) fn new(
        tensors: &SafeTensors<'a>,
        layout: LayoutArg,
        key_len: Option<usize>,
    ) -> Result<Self> {
        let packed = Packed::of(tensors)?;
        if packed.is_some() {
            return Self::read(tensors, layout, key_len, packed);
        }
        let read = |layout| Self::read(tensors, layout, key_len, None);
        read(layout).map_err(|error| {
            // Axes taken for one another are the usual reason why shapes disagree.
            match read(layout.other()) {
                Ok(_) => anyhow!(
                    "{error} (with `--layout {}` the shapes fit)",
                    layout.other().name()
                ),
                Err(_) => error,
            }
        })
    }

    fn read(
        tensors: &SafeTensors<'a>,
        layout: LayoutArg,
        key_len: Option<usize>,
        packed: Option<Packed>,
    ) -> Result<Self> {
        let sequences = Sequences::of(tensors)?;
        let [q, k, v] = [
            required(tensors, "q")?,
            required(tensors, "k")?,
            required(tensors, "v")?,
        ];
        let views = [&q, &k, &v];
        let sizes = Sizes::new(views, layout, key_len, packed.as_ref(), &sequences)?;
        let Shape {
            batch,
            heads,
            query_len,
            key_len,
            ..
        } = sizes.shape;
        let columns = packed.as_ref().map_or(key_len, Packed::longest_keys);
        let q = tensor("q", &q, &FLOATS)?;
        // Half-precision caches under float32 queries are usual.
        let kv: &[Dtype] = match q.dtype {
            DType::F32 => &[Dtype::F32, Dtype::F16],
            DType::F16 => &[Dtype::F16],
            _ => &[Dtype::BF16],
        };
        let k_dtype = [k.dtype()];
        let per_head = |name| {
            optional(tensors, name)
                .map(|view| self::per_head(name, &view, heads))
                .transpose()
        };
        Ok(Self {
            shape: sizes.shape,
            capacity: sizes.capacity,
            packed,
            sequences,
            pages: sizes.pages,
            k: tensor("k", &k, kv)?,
            v: tensor("v", &v, &k_dtype)?,
            mask: optional(tensors, "mask")
                .map(|view| mask(&view, [batch, heads, query_len, columns]))
                .transpose()?,
            sinks: per_head("sinks")?,
            alibi_slopes: per_head("alibi_slopes")?,
            unused: unused(tensors),
            q,
        })
    }

    /// Numbers of queries and keys of each sequence.
    pub(crate) fn lengths(&self) -> Vec<(usize, usize)> {
        match &self.packed {
            None => {
                let Shape {
                    batch,
                    query_len,
                    key_len,
                    ..
                } = self.shape;
                self.sequences.lengths(batch, query_len, key_len)
            }
            Some(packed) => packed.lengths(),
        }
    }
}

/// Sizes that the shapes of `q`, `k` and `v` agree on.
struct Sizes {
    shape: Shape,
    capacity: usize,
    pages: Option<Pages>,
}

impl Sizes {
    fn new(
        [q, k, v]: [&TensorView<'_>; 3],
        layout: LayoutArg,
        key_len: Option<usize>,
        packed: Option<&Packed>,
        sequences: &Sequences<'_>,
    ) -> Result<Self> {
        let [q_order, order] = match (packed, sequences) {
            (Some(_), _) => [Axes::Packed; 2],
            (None, Sequences { queries, table, .. }) => [
                queries
                    .as_ref()
                    .map_or(Axes::Dense(layout), |_| Axes::Packed),
                table
                    .as_ref()
                    .map_or(Axes::Dense(layout), |_| Axes::Pages(layout)),
            ],
        };
        let [batch, heads, query_len, head_dim] = axes("q", q, q_order)?;
        let [k_batch, kv_heads, k_rows, k_dim] = axes("k", k, order)?;
        let count = sequences.batch(batch)?;
        let pages = sequences.pages(k_batch, k_rows)?;
        if pages.is_none() {
            let of = sequences.queries.as_ref().map_or("q", |_| "cu_seqlens_q");
            same("k", "batch size", count, k_batch, of, k)?;
        }
        let capacity = pages.map_or(k_rows, |p| p.per_sequence.saturating_mul(p.page_size));
        same("k", "head dim", head_dim, k_dim, "q", k)?;
        axes("v", v, order)?;
        if v.shape() != k.shape() {
            bail!(
                "tensor `v`: expected shape {:?} as `k`, found {:?}",
                k.shape(),
                v.shape()
            );
        }
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            bail!(
                "tensor `k`: expected a number of heads that divides the {heads} of `q`, \
                 found {kv_heads} (shape {:?}, {})",
                k.shape(),
                order.names()
            );
        }
        if key_len.is_some() && packed.is_some() {
            bail!("--key-len: `cu_seqlens_k` says already which rows are keys");
        }
        let key_len = key_len.unwrap_or(capacity);
        if key_len > capacity {
            bail!(
                "--key-len: expected at most the {capacity} rows of {}, found {key_len} (shape {:?}, {})",
                pages.map_or("`k`", |_| "the pages in a row of `block_table`"),
                k.shape(),
                order.names()
            );
        }
        sequences.check(key_len)?;
        if let Some(packed) = packed {
            packed.check(query_len, capacity)?;
        }
        if let Some(boundaries) = &sequences.queries {
            check_last("cu_seqlens_q", boundaries, query_len)?;
        }
        let shape = Shape {
            batch,
            heads,
            kv_heads,
            query_len,
            key_len,
            qk_dim: head_dim,
            v_dim: head_dim,
        };
        Ok(Self {
            shape,
            capacity,
            pages,
        })
    }
}

const FLOATS: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];
const MASKS: [Dtype; 5] = [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::BOOL, Dtype::U8];

fn unused(tensors: &SafeTensors<'_>) -> Vec<String> {
    let mut unused: Vec<String> = tensors
        .names()
        .into_iter()
        .filter(|name| !KNOWN.contains(name))
        .map(str::to_owned)
        .collect();
    unused.sort();
    unused
}

/// Batch, heads, length and head dim of an operand; a batch of 1 where sequences are packed, and of pages.
fn axes(name: &str, view: &TensorView<'_>, order: Axes) -> Result<[usize; 4]> {
    Ok(match (order, view.shape()) {
        (Axes::Dense(LayoutArg::HeadMajor), &[batch, heads, len, dim])
        | (Axes::Dense(LayoutArg::SeqMajor), &[batch, len, heads, dim])
        | (Axes::Pages(LayoutArg::HeadMajor), &[batch, heads, len, dim])
        | (Axes::Pages(LayoutArg::SeqMajor), &[batch, len, heads, dim]) => [batch, heads, len, dim],
        (Axes::Packed, &[len, heads, dim]) => [1, heads, len, dim],
        (_, shape) => bail!(
            "tensor `{name}`: expected rank {} {} ({}), found rank {} {shape:?}",
            order.rank(),
            order.names(),
            order.name(),
            shape.len()
        ),
    })
}

fn same(
    name: &str,
    what: &str,
    expected: usize,
    found: usize,
    other: &str,
    view: &TensorView<'_>,
) -> Result<()> {
    if expected != found {
        bail!(
            "tensor `{name}`: expected {what} {expected} as `{other}`, found {found} (shape {:?})",
            view.shape()
        );
    }
    Ok(())
}

fn mask<'a>(view: &TensorView<'a>, full: [usize; 4]) -> Result<(Tensor<'a>, MaskSpec)> {
    let tensor = tensor("mask", view, &MASKS)?;
    let sizes = match *view.shape() {
        [q, k] => Some([1, 1, q, k]),
        [b, h, q, k] => Some([b, h, q, k]),
        _ => None,
    };
    let [batch, heads, rows, keys] = full;
    let fits = |sizes: &[usize; 4]| {
        let mut pairs = sizes.iter().zip(full);
        sizes[3] == keys && pairs.all(|(found, full)| *found == 1 || *found == full)
    };
    match sizes.filter(fits) {
        Some(sizes) => {
            let spec = mask_spec(tensor.dtype, sizes);
            Ok((tensor, spec))
        }
        None => bail!(
            "tensor `mask`: expected shape [{2}, {keys}] or [{0}, {1}, {2}, {keys}], found {3:?}",
            or_one(batch),
            or_one(heads),
            or_one(rows),
            view.shape()
        ),
    }
}

/// A size that may broadcast.
fn or_one(size: usize) -> String {
    match size {
        1 => "1".into(),
        n => format!("{n} or 1"),
    }
}

fn per_head<'a>(name: &str, view: &TensorView<'a>, heads: usize) -> Result<Tensor<'a>> {
    if view.shape() != [heads] {
        bail!(
            "tensor `{name}`: expected shape [{heads}], one for each head of `q`, found {:?}",
            view.shape()
        );
    }
    tensor(name, view, &[Dtype::F32])
}
