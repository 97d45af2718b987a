//! From tensors and options to a checked problem over tensors that the kernels can read in place.

use candle_core::{DType, Error, Result, Shape, Tensor};
use mlx_flash_attn::attention::{
    self as core, Layout, MaskSpec, Problem, ProblemBuilder, QueryOffset, Role,
};

use crate::{Mask, Options};

/// Cumulative lengths of packed queries and keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packed<'a> {
    pub(crate) cu_seqlens_q: &'a [u32],
    pub(crate) cu_seqlens_k: &'a [u32],
}

/// A checked problem with the tensors it is about.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) problem: Problem,
    pub(crate) q: Tensor,
    pub(crate) k: Tensor,
    pub(crate) v: Tensor,
    pub(crate) mask: Option<Tensor>,
    pub(crate) sinks: Option<Tensor>,
    pub(crate) alibi_slopes: Option<Tensor>,
    /// Shape of the output: Q's.
    pub(crate) shape: Shape,
    /// Shape of the log-sum-exp: `[B, H, qL]`, packed `[H, total_q]`.
    pub(crate) lse_shape: Shape,
    /// Query rows past the last boundary, which `q` and the shapes above leave out.
    pub(crate) padding: usize,
}

/// The sizes of Q or of K and V, with their strides.
struct Operand {
    batch: usize,
    heads: usize,
    len: usize,
    dim: usize,
    strides: core::Strides,
}

pub(crate) fn refused(
    operand: &str,
    expected: impl std::fmt::Display,
    got: impl std::fmt::Debug,
) -> Error {
    Error::msg(format!(
        "attention: {operand}: expected {expected}, got {got:?}"
    ))
}

pub(crate) fn failed(error: mlx_flash_attn::MlxError) -> Error {
    Error::msg(format!("attention: {error}"))
}

pub(crate) fn dtype_of(operand: &str, dtype: DType) -> Result<mlx_flash_attn::DType> {
    match dtype {
        DType::F32 => Ok(mlx_flash_attn::DType::F32),
        DType::F16 => Ok(mlx_flash_attn::DType::F16),
        DType::BF16 => Ok(mlx_flash_attn::DType::BF16),
        DType::U8 => Ok(mlx_flash_attn::DType::U8),
        other => Err(refused(operand, "dtype bf16, f16 or f32", other)),
    }
}

/// The tensor itself where its rows are contiguous, else a copy.
fn readable(x: &Tensor) -> Result<Tensor> {
    match (x.stride().last(), x.dims().last()) {
        (Some(1), _) | (_, Some(1)) => Ok(x.clone()),
        _ => x.contiguous(),
    }
}

impl Operand {
    fn new(name: &str, x: &Tensor, layout: Layout, packed: bool) -> Result<Self> {
        let (dims, strides) = (x.dims(), x.stride());
        match (dims, strides, packed) {
            (&[len, heads, dim], &[seq, head, _], true) => Ok(Self {
                batch: 1,
                heads,
                len,
                dim,
                strides: core::Strides {
                    batch: 0,
                    head,
                    seq,
                },
            }),
            (_, _, true) => Err(refused(name, "the shape [rows, heads, head_dim]", dims)),
            (&[batch, a, b, dim], &[sb, sa, ss, _], false) => {
                let ((heads, len), (head, seq)) = match layout {
                    Layout::HeadMajor => ((a, b), (sa, ss)),
                    Layout::SeqMajor => ((b, a), (ss, sa)),
                };
                Ok(Self {
                    batch,
                    heads,
                    len,
                    dim,
                    strides: core::Strides {
                        batch: sb,
                        head,
                        seq,
                    },
                })
            }
            _ => {
                let order = match layout {
                    Layout::HeadMajor => "[batch, heads, len, head_dim]",
                    Layout::SeqMajor => "[batch, len, heads, head_dim]",
                };
                Err(refused(name, format!("the shape {order}"), dims))
            }
        }
    }
}

impl Request {
    pub(crate) fn new(
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        options: &Options,
        packed: Option<Packed<'_>>,
        lse: bool,
    ) -> Result<Self> {
        let (q, k, v) = (readable(q)?, readable(k)?, readable(v)?);
        let layout = options.layout;
        let operand = |name, x: &Tensor| Operand::new(name, x, layout, packed.is_some());
        let (mut oq, ok, ov) = (operand("q", &q)?, operand("k", &k)?, operand("v", &v)?);
        check_operands([&q, &k, &v], [&oq, &ok], options)?;

        let mut visible = None;
        if let Some(mask) = &options.mask {
            let full = match packed {
                None => [oq.batch, oq.heads, oq.len, ok.len],
                Some(p) => [1, oq.heads, oq.len, longest(p.cu_seqlens_k)],
            };
            visible = Some(mask.spread(&full)?);
        }
        let (mask, mask_spec) = visible.unzip();

        let mut padding = 0;
        if let Some(p) = packed {
            let rows = used_rows("q", p.cu_seqlens_q, oq.len)?;
            used_rows("k", p.cu_seqlens_k, ok.len)?;
            padding = oq.len - rows;
            oq.len = rows;
        }
        let q = match padding {
            0 => q,
            _ => q.narrow(0, 0, oq.len)?,
        };

        let dense = (oq.batch > 0).then_some((oq.len, ok.len));
        let dtype = dtype_of("q", q.dtype())?;
        let mut builder = start(dtype, [&oq, &ok], layout, packed)
            .kv_dtype(dtype_of("k", k.dtype())?)
            .strides(Role::Query, oq.strides)
            .strides(Role::Key, ok.strides)
            .strides(Role::Value, ov.strides)
            .causal(options.causal)
            .query_offset(offset(options, packed, dense)?)
            .sinks(options.sinks.is_some())
            .alibi(options.alibi_slopes.is_some())
            .lse(lse);
        builder = with_bounds(builder, options);
        if let Some(spec) = mask_spec {
            builder = builder.mask(spec);
        }
        let lse_shape = match packed {
            None => Shape::from((oq.batch, oq.heads, oq.len)),
            Some(_) => Shape::from((oq.heads, oq.len)),
        };
        Ok(Self {
            problem: builder.build().map_err(failed)?,
            mask,
            sinks: per_head("sinks", options.sinks.as_ref(), oq.heads)?,
            alibi_slopes: per_head("alibi_slopes", options.alibi_slopes.as_ref(), oq.heads)?,
            shape: q.shape().clone(),
            lse_shape,
            padding,
            q,
            k,
            v,
        })
    }

    /// Whether no query sees a key for want of queries or keys, so that there is nothing to run.
    pub(crate) fn is_empty(&self) -> bool {
        let shape = self.problem.shape();
        self.shape.elem_count() == 0 || shape.batch == 0 || shape.key_len == 0
    }
}

/// Whether K and V are like each other, fit Q, and lie on its device, and so all other operands.
fn check_operands(
    [q, k, v]: [&Tensor; 3],
    [oq, ok]: [&Operand; 2],
    options: &Options,
) -> Result<()> {
    if k.dims() != v.dims() || k.dtype() != v.dtype() {
        let expected = format!("{:?} of {:?} as k", k.dims(), k.dtype());
        return Err(refused("v", expected, (v.dims(), v.dtype())));
    }
    if (ok.batch, ok.dim) != (oq.batch, oq.dim) {
        let expected = format!("batch {} and head dim {} as in q", oq.batch, oq.dim);
        return Err(refused("k", expected, k.dims()));
    }
    for (name, x) in [("k", Some(k)), ("v", Some(v))].into_iter().chain([
        ("mask", options.mask.as_ref().map(Mask::tensor)),
        ("sinks", options.sinks.as_ref()),
        ("alibi_slopes", options.alibi_slopes.as_ref()),
    ]) {
        if let Some(x) = x.filter(|x| !x.device().same_device(q.device())) {
            let expected = format!("a tensor on {:?} as q", q.device().location());
            return Err(refused(name, expected, x.device().location()));
        }
    }
    Ok(())
}

/// The builder for the operands' sizes and the boundaries of packed rows.
fn start(
    dtype: mlx_flash_attn::DType,
    [oq, ok]: [&Operand; 2],
    layout: Layout,
    packed: Option<Packed<'_>>,
) -> ProblemBuilder {
    match packed {
        None => {
            let shape = core::Shape {
                batch: oq.batch,
                heads: oq.heads,
                kv_heads: ok.heads,
                query_len: oq.len,
                key_len: ok.len,
                qk_dim: oq.dim,
                v_dim: oq.dim,
            };
            Problem::builder(dtype, shape).layout(layout)
        }
        Some(p) => Problem::varlen(
            dtype,
            oq.heads,
            ok.heads,
            oq.dim,
            p.cu_seqlens_q,
            p.cu_seqlens_k,
        ),
    }
}

/// The caller's choice; any, where none can make a difference. `dense` are the numbers of queries and
/// keys of each batch, if there is one.
fn offset(
    options: &Options,
    packed: Option<Packed<'_>>,
    dense: Option<(usize, usize)>,
) -> Result<QueryOffset> {
    if let Some(offset) = options.offset {
        return Ok(offset);
    }
    let by_position = options.causal
        || options.window.is_some()
        || options.window_right.is_some()
        || options.alibi_slopes.is_some();
    let differ = |&(queries, keys): &(usize, usize)| queries != keys && queries > 0 && keys > 0;
    let unequal = match packed {
        None => dense.filter(differ),
        Some(p) => lengths(p.cu_seqlens_q)
            .zip(lengths(p.cu_seqlens_k))
            .find(differ),
    };
    match unequal.filter(|_| by_position) {
        None => Ok(QueryOffset::default()),
        Some((queries, keys)) => Err(Error::msg(format!(
            "attention: offset: expected a choice where {queries} queries stand among {keys} keys, \
             got None: Some(QueryOffset::BottomRight) lets the last query see the last key, \
             Some(QueryOffset::At(0)) puts the first query at the first key"
        ))),
    }
}

/// Rows of each packed sequence; boundaries that fall are refused with the problem.
fn lengths(boundaries: &[u32]) -> impl Iterator<Item = usize> {
    boundaries
        .windows(2)
        .map(|w| w[1].saturating_sub(w[0]) as usize)
}

fn longest(boundaries: &[u32]) -> usize {
    lengths(boundaries).max().unwrap_or(0)
}

fn with_bounds(mut builder: ProblemBuilder, options: &Options) -> ProblemBuilder {
    if let Some(scale) = options.scale {
        builder = builder.scale(scale);
    }
    if let Some(cap) = options.softcap {
        builder = builder.softcap(cap);
    }
    if let Some(n) = options.window {
        builder = builder.window(n);
    }
    if let Some(n) = options.window_right {
        builder = builder.window_right(n);
    }
    builder
}

/// The last boundary, of at most `rows`. What else boundaries must be is checked with the problem.
fn used_rows(name: &str, boundaries: &[u32], rows: usize) -> Result<usize> {
    match boundaries.last() {
        Some(last) if *last as usize <= rows => Ok(*last as usize),
        last => {
            let operand = format!("cu_seqlens_{name}");
            let expected = format!("a last boundary of at most {rows}, the rows of {name}");
            Err(refused(&operand, expected, last))
        }
    }
}

impl Mask {
    fn tensor(&self) -> &Tensor {
        match self {
            Self::Attend(mask) | Self::Hide(mask) | Self::Add(mask) => mask,
        }
    }

    /// The cells in a dtype that the kernels take: u8, nonzero attending, or floats.
    fn cells(&self) -> Result<Tensor> {
        let integers = "integers (floats are for `Mask::Add`)";
        match self {
            Self::Attend(mask) if mask.dtype() == DType::U8 => Ok(mask.clone()),
            Self::Attend(mask) if mask.dtype().is_int() => mask.ne(0_f64),
            Self::Hide(mask) if mask.dtype().is_int() => mask.eq(0_f64),
            Self::Attend(mask) | Self::Hide(mask) => Err(refused("mask", integers, mask.dtype())),
            Self::Add(mask) => match mask.dtype() {
                DType::BF16 | DType::F16 | DType::F32 => Ok(mask.clone()),
                DType::F64 => {
                    // A finite number that f32 does not hold must not become one that hides.
                    let finite = mask.abs()?.le(f64::MAX)?;
                    let held = mask.clamp(f64::from(f32::MIN), f64::from(f32::MAX))?;
                    finite.where_cond(&held, mask)?.to_dtype(DType::F32)
                }
                other => Err(refused(
                    "mask",
                    "bf16, f16, f32 or f64 (integers are for `Mask::Attend` and `Mask::Hide`)",
                    other,
                )),
            },
        }
    }

    /// The mask as the kernels read it, broadcast over `full` = `[B, H, qL, kL]` by its strides.
    fn spread(&self, full: &[usize; 4]) -> Result<(Tensor, MaskSpec)> {
        let given = self.tensor();
        let wrong = |_| {
            let expected = format!("a shape that broadcasts to {full:?}");
            refused("mask", expected, given.dims())
        };
        given.broadcast_as(full).map_err(wrong)?;
        let mut mask = self.cells()?;
        let stride = mask.broadcast_as(full).map_err(wrong)?.stride().to_vec();
        if full[3] != 1 && stride[3] != 1 {
            // Rows of their own, but as few of them as the mask has.
            let mut dims = mask.dims().to_vec();
            match dims.last_mut() {
                Some(keys) => *keys = full[3],
                None => dims.push(full[3]),
            }
            mask = mask.broadcast_as(dims)?.contiguous()?;
        }
        let spread = mask.broadcast_as(full).map_err(wrong)?;
        let stride = spread.stride();
        let spec = MaskSpec {
            dtype: dtype_of("mask", mask.dtype())?,
            batch_stride: stride[0],
            head_stride: stride[1],
            row_stride: stride[2],
        };
        Ok((spread, spec))
    }
}

/// One f32 for each head.
fn per_head(name: &str, x: Option<&Tensor>, heads: usize) -> Result<Option<Tensor>> {
    let Some(x) = x else { return Ok(None) };
    if x.dims() != [heads] {
        return Err(refused(name, format!("the shape [{heads}]"), x.dims()));
    }
    if !x.dtype().is_float() {
        return Err(refused(name, "a float dtype", x.dtype()));
    }
    x.to_dtype(DType::F32)?.contiguous().map(Some)
}
