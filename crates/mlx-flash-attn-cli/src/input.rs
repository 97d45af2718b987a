//! The tensors of a safetensors file, held against what attention takes. Every refusal names the
//! tensor, what was expected and what was found.

use anyhow::{Result, anyhow, bail};
use mlx_flash_attn::DType;
use mlx_flash_attn::attention::{MaskSpec, Shape};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::args::LayoutArg;

/// The tensors this program knows.
const KNOWN: [&str; 5] = ["q", "k", "v", "mask", "sinks"];

/// One operand: its element type and its bytes, dense.
#[derive(Debug)]
pub(crate) struct Tensor<'a> {
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: &'a [u8],
}

/// What a file holds.
#[derive(Debug)]
pub(crate) struct Input<'a> {
    pub(crate) shape: Shape,
    pub(crate) q: Tensor<'a>,
    pub(crate) k: Tensor<'a>,
    pub(crate) v: Tensor<'a>,
    pub(crate) mask: Option<(Tensor<'a>, MaskSpec)>,
    pub(crate) sinks: Option<Tensor<'a>>,
    /// Names of tensors that nothing reads.
    pub(crate) unused: Vec<String>,
}

impl<'a> Input<'a> {
    /// Takes the operands out of `tensors`, whose axes are in the order of `layout`.
    pub(crate) fn new(tensors: &SafeTensors<'a>, layout: LayoutArg) -> Result<Self> {
        Self::in_layout(tensors, layout).map_err(|error| {
            // Axes taken for one another are the usual reason why shapes disagree.
            match Self::in_layout(tensors, layout.other()) {
                Ok(_) => anyhow!(
                    "{error} (with `--layout {}` the shapes fit)",
                    layout.other().name()
                ),
                Err(_) => error,
            }
        })
    }

    fn in_layout(tensors: &SafeTensors<'a>, layout: LayoutArg) -> Result<Self> {
        let [q, k, v] = [
            required(tensors, "q")?,
            required(tensors, "k")?,
            required(tensors, "v")?,
        ];
        let [batch, heads, query_len, head_dim] = axes("q", &q, layout)?;
        let [k_batch, kv_heads, key_len, k_dim] = axes("k", &k, layout)?;
        same("k", "batch size", batch, k_batch, "q", &k)?;
        same("k", "head dim", head_dim, k_dim, "q", &k)?;
        axes("v", &v, layout)?;
        if v.shape() != k.shape() {
            bail!(
                "tensor `v`: expected shape {:?} as `k`, found {:?}",
                k.shape(),
                v.shape()
            );
        }
        if !heads.is_multiple_of(kv_heads) {
            bail!(
                "tensor `k`: expected a number of heads that divides the {heads} of `q`, \
                 found {kv_heads} (shape {:?}, {})",
                k.shape(),
                layout.axes()
            );
        }
        let shape = Shape {
            batch,
            heads,
            kv_heads,
            query_len,
            key_len,
            head_dim,
        };
        let q = tensor("q", &q, &FLOATS)?;
        // Half-precision caches under float32 queries are usual.
        let kv: &[Dtype] = match q.dtype {
            DType::F32 => &[Dtype::F32, Dtype::F16],
            DType::F16 => &[Dtype::F16],
            _ => &[Dtype::BF16],
        };
        let k_dtype = [k.dtype()];
        Ok(Self {
            shape,
            k: tensor("k", &k, kv)?,
            v: tensor("v", &v, &k_dtype)?,
            mask: optional(tensors, "mask")
                .map(|view| mask(&view, &shape))
                .transpose()?,
            sinks: optional(tensors, "sinks")
                .map(|view| sinks(&view, heads))
                .transpose()?,
            unused: unused(tensors),
            q,
        })
    }
}

const FLOATS: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];
const MASKS: [Dtype; 4] = [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::BOOL];

fn optional<'a>(tensors: &SafeTensors<'a>, name: &str) -> Option<TensorView<'a>> {
    tensors.tensor(name).ok()
}

fn required<'a>(tensors: &SafeTensors<'a>, name: &str) -> Result<TensorView<'a>> {
    optional(tensors, name).ok_or_else(|| {
        let mut there: Vec<String> = tensors.names().iter().map(|n| format!("`{n}`")).collect();
        there.sort();
        let there = match there.len() {
            0 => "no tensors".into(),
            1..=8 => there.join(", "),
            n => format!("{} and {} more", there[..8].join(", "), n - 8),
        };
        anyhow!("tensor `{name}`: expected to be there, found {there}")
    })
}

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

/// Batch, heads, length and head dim of an operand of rank 4, none of them 0.
fn axes(name: &str, view: &TensorView<'_>, layout: LayoutArg) -> Result<[usize; 4]> {
    let shape = view.shape();
    let &[batch, a, b, dim] = shape else {
        bail!(
            "tensor `{name}`: expected rank 4 {} ({}), found rank {} {shape:?}",
            layout.axes(),
            layout.name(),
            shape.len()
        );
    };
    if shape.contains(&0) {
        bail!("tensor `{name}`: expected sizes of at least 1, found shape {shape:?}");
    }
    Ok(match layout {
        LayoutArg::HeadMajor => [batch, a, b, dim],
        LayoutArg::SeqMajor => [batch, b, a, dim],
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

fn tensor<'a>(name: &str, view: &TensorView<'a>, allowed: &[Dtype]) -> Result<Tensor<'a>> {
    let dtype = match view.dtype() {
        Dtype::BF16 => Some(DType::BF16),
        Dtype::F16 => Some(DType::F16),
        Dtype::F32 => Some(DType::F32),
        Dtype::BOOL => Some(DType::U8),
        _ => None,
    };
    match dtype.filter(|_| allowed.contains(&view.dtype())) {
        Some(dtype) => Ok(Tensor {
            dtype,
            shape: view.shape().to_vec(),
            bytes: view.data(),
        }),
        None => {
            let allowed: Vec<String> = allowed.iter().map(ToString::to_string).collect();
            bail!(
                "tensor `{name}`: expected dtype {}, found {}",
                allowed.join(" or "),
                view.dtype()
            )
        }
    }
}

fn mask<'a>(view: &TensorView<'a>, shape: &Shape) -> Result<(Tensor<'a>, MaskSpec)> {
    let tensor = tensor("mask", view, &MASKS)?;
    let (rows, keys) = (shape.query_len, shape.key_len);
    let broadcasts = |found: usize, full: usize| found == 1 || found == full;
    let spec = match *view.shape() {
        [q, k] if [q, k] == [rows, keys] => MaskSpec::plane(tensor.dtype, keys),
        [b, h, q, k]
            if broadcasts(b, shape.batch)
                && broadcasts(h, shape.heads)
                && [q, k] == [rows, keys] =>
        {
            MaskSpec::broadcast(tensor.dtype, [b, h, q, k])
        }
        _ => bail!(
            "tensor `mask`: expected shape [{rows}, {keys}] or [{}, {}, {rows}, {keys}], found {:?}",
            or_one(shape.batch),
            or_one(shape.heads),
            view.shape()
        ),
    };
    Ok((tensor, spec))
}

/// A size that may broadcast.
fn or_one(size: usize) -> String {
    match size {
        1 => "1".into(),
        n => format!("{n} or 1"),
    }
}

fn sinks<'a>(view: &TensorView<'a>, heads: usize) -> Result<Tensor<'a>> {
    if view.shape() != [heads] {
        bail!(
            "tensor `sinks`: expected shape [{heads}], one for each head of `q`, found {:?}",
            view.shape()
        );
    }
    tensor("sinks", view, &[Dtype::F32])
}
