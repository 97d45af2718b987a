//! Decode: the problem of a step, and its partial results.

use super::{Args, Span};
use crate::attention::bindings::{Access, names, other};
use crate::attention::layout::Layout;
use crate::attention::params::VecParamsGpu;
use crate::attention::{Problem, QueryOffset, Role, Shape};
use crate::backend::Dispatch;
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// Elements of one head's partial results: per split D values, then a maximum and a sum.
fn partials_len(dispatch: &Dispatch, p: &VecParamsGpu) -> Result<(usize, usize)> {
    let per_split = p.head_dim as usize + 2;
    let per_head = per_split.checked_mul(p.splits as usize);
    let total = per_head.and_then(|n| n.checked_mul(p.num_heads as usize));
    match (per_head, total) {
        (Some(per_head), Some(total)) if p.splits > 0 => Ok((per_head, total)),
        _ => Err(MlxError::CommandBufferError(format!(
            "{}: sizes in the params do not fit",
            dispatch.kernel.name
        ))),
    }
}

/// The first pass of a decode step, read back.
pub(crate) struct Partials<'a> {
    pub(crate) params: VecParamsGpu,
    pub(crate) problem: Problem,
    pub(crate) q: *const u8,
    pub(crate) k: *const u8,
    pub(crate) v: *const u8,
    /// The partial results, `per_head` elements a head.
    pub(crate) tmp: Span<'a, f32>,
    pub(crate) per_head: usize,
}

impl<'a> Partials<'a> {
    pub(crate) fn read(dispatch: &'a Dispatch) -> Result<Self> {
        let args = Args::new(dispatch);
        args.check_aliasing()?;
        let p: VecParamsGpu = args.params(other::VEC_PARAMS)?;
        let (per_head, total) = partials_len(dispatch, &p)?;
        let tmp = args.span(other::VEC_TMP, total, Access::Write)?;
        let (heads, dim) = (p.num_heads as usize, p.head_dim as usize);
        let shape = Shape {
            batch: 1,
            heads,
            kv_heads: p.num_kv_heads as usize,
            query_len: 1,
            key_len: p.kv_seq_len as usize,
            head_dim: dim,
        };
        let kv_dtype = if dispatch.kernel.name == names::VEC_F16 {
            DType::F16
        } else {
            DType::F32
        };
        let mut builder = Problem::builder(DType::F32, shape)
            .kv_dtype(kv_dtype)
            .layout(Layout::HeadMajor)
            .key_capacity(p.kv_capacity as usize)
            .query_offset(QueryOffset::BottomRight)
            .scale(p.scale)
            .lse(true);
        if p.softcap != 0.0 {
            builder = builder.softcap(p.softcap);
        }
        if p.kv_start > 0 {
            builder = builder.window(p.kv_seq_len.saturating_sub(p.kv_start));
        }
        let problem = builder
            .refuse_empty()
            .build()
            .map_err(|e| MlxError::CommandBufferError(format!("{}: {e}", dispatch.kernel.name)))?;
        let kv = problem.operand(Role::Key).map_or(0, |s| s.elements);
        Ok(Self {
            q: args.pointer(other::VEC_Q, heads * dim, 4, Access::Read)?,
            k: args.pointer(other::VEC_K, kv, kv_dtype.size_of(), Access::Read)?,
            v: args.pointer(other::VEC_V, kv, kv_dtype.size_of(), Access::Read)?,
            params: p,
            problem,
            tmp,
            per_head,
        })
    }
}

/// The second pass of a decode step, read back.
pub(crate) struct Reduce<'a> {
    pub(crate) params: VecParamsGpu,
    pub(crate) tmp: Span<'a, f32>,
    pub(crate) per_head: usize,
    pub(crate) out: Span<'a, f32>,
}

impl<'a> Reduce<'a> {
    pub(crate) fn read(dispatch: &'a Dispatch) -> Result<Self> {
        let args = Args::new(dispatch);
        args.check_aliasing()?;
        let p: VecParamsGpu = args.params(other::REDUCE_PARAMS)?;
        let (per_head, total) = partials_len(dispatch, &p)?;
        Ok(Self {
            tmp: args.span(other::REDUCE_TMP, total, Access::Read)?,
            out: args.span(
                other::REDUCE_OUT,
                p.num_heads as usize * p.head_dim as usize,
                Access::Write,
            )?,
            params: p,
            per_head,
        })
    }
}
