//! Decode on the CPU. The attention kernels already split the keys over the threads, so the first
//! of each head's partial results holds all keys and the others none; the reduce joins them as it
//! joins a GPU's.

use super::Cpu;
use super::args::Args;
use super::job::{Job, Pointers};
use super::kernels;
use crate::attention::bindings::{Access, names, other};
use crate::attention::layout::Layout;
use crate::attention::params::VecParamsGpu;
use crate::attention::{Problem, QueryOffset, Shape};
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

/// Writes each head's partial results.
pub(crate) fn partials(cpu: &Cpu, dispatch: &Dispatch) -> Result<()> {
    let args = Args::new(dispatch);
    args.check_aliasing()?;
    let p: VecParamsGpu = args.params(other::VEC_PARAMS)?;
    let (per_head, total) = partials_len(dispatch, &p)?;
    let tmp: &mut [f32] = args.slice_mut(other::VEC_TMP, total)?;
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
        .build()
        .map_err(|e| MlxError::CommandBufferError(format!("{}: {e}", dispatch.kernel.name)))?;
    let (q, kv) = (
        heads * dim,
        problem
            .operand(crate::attention::Role::Key)
            .map_or(0, |s| s.elements),
    );
    let mut o = vec![0.0f32; q];
    let mut lse = vec![0.0f32; heads];
    let at = Pointers {
        q: args.pointer(other::VEC_Q, q, 4, Access::Read)?,
        k: args.pointer(other::VEC_K, kv, kv_dtype.size_of(), Access::Read)?,
        v: args.pointer(other::VEC_V, kv, kv_dtype.size_of(), Access::Read)?,
        o: o.as_mut_ptr().cast(),
        mask: std::ptr::null(),
        tile_classes: std::ptr::null(),
        sinks: std::ptr::null(),
        alibi_slopes: std::ptr::null(),
        lse: lse.as_mut_ptr(),
    };
    kernels::run(
        &Job {
            problem: &problem,
            at,
        },
        cpu.isa(),
        cpu.threads(),
    );
    for (h, partials) in tmp.chunks_exact_mut(per_head).enumerate() {
        for split in partials.chunks_exact_mut(dim + 2) {
            split.fill(0.0);
            split[dim] = f32::NEG_INFINITY;
        }
        partials[..dim].copy_from_slice(&o[h * dim..(h + 1) * dim]);
        partials[dim] = lse[h];
        partials[dim + 1] = 1.0;
    }
    Ok(())
}

/// Joins each head's partial results: values are weighted by `exp(max) * sum`.
pub(crate) fn reduce(_cpu: &Cpu, dispatch: &Dispatch) -> Result<()> {
    let args = Args::new(dispatch);
    args.check_aliasing()?;
    let p: VecParamsGpu = args.params(other::REDUCE_PARAMS)?;
    let (per_head, total) = partials_len(dispatch, &p)?;
    let (heads, dim) = (p.num_heads as usize, p.head_dim as usize);
    let tmp: &[f32] = args.slice(other::REDUCE_TMP, total)?;
    let out: &mut [f32] = args.slice_mut(other::REDUCE_OUT, heads * dim)?;
    for (partials, o) in tmp
        .chunks_exact(per_head)
        .zip(out.chunks_exact_mut(dim.max(1)))
    {
        let splits = || partials.chunks_exact(dim + 2);
        let max = splits().map(|s| s[dim]).fold(f32::NEG_INFINITY, f32::max);
        let weight = |s: &[f32]| {
            if s[dim] == f32::NEG_INFINITY {
                0.0
            } else {
                (s[dim] - max).exp() * s[dim + 1]
            }
        };
        let sum: f32 = splits().map(weight).sum();
        o.fill(0.0);
        if sum > 0.0 {
            for split in splits() {
                let w = weight(split) / sum;
                if w > 0.0 {
                    o.iter_mut().zip(split).for_each(|(o, x)| *o += w * x);
                }
            }
        }
    }
    Ok(())
}
