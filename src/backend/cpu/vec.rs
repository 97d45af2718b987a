//! Decode on the CPU. The attention kernels already split the keys over the threads, so the first
//! of each head's partial results holds all keys and the others none; the reduce joins them as it
//! joins a GPU's.

use super::Cpu;
use super::job::{Job, Pointers};
use super::kernels;
use crate::backend::Dispatch;
use crate::backend::checked::{Partials, Reduce};
use crate::error::Result;

/// Writes each head's partial results.
pub(crate) fn partials(cpu: &Cpu, dispatch: &Dispatch) -> Result<()> {
    let Partials {
        params: p,
        problem,
        q,
        k,
        v,
        tmp,
        per_head,
    } = Partials::read(dispatch)?;
    // SAFETY: the CPU's memory is this process's own; written operands overlap nothing else, and
    // nobody else uses them while the dispatch runs.
    let tmp = unsafe { tmp.slice_mut() };
    let (heads, dim) = (p.num_heads as usize, p.head_dim as usize);
    let zeros = |count: usize| {
        let mut zeros = kernels::room(count)?;
        zeros.resize(count, 0.0f32);
        Ok(zeros)
    };
    let mut o = zeros(heads.saturating_mul(dim))?;
    let mut lse = zeros(heads)?;
    let at = Pointers {
        q,
        k,
        v,
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
        cpu.team(),
    )?;
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
    let Reduce {
        params: p,
        tmp,
        per_head,
        out,
    } = Reduce::read(dispatch)?;
    // SAFETY: the CPU's memory is this process's own; written operands overlap nothing else, and
    // nobody else uses them while the dispatch runs.
    let (tmp, out) = unsafe { (tmp.slice(), out.slice_mut()) };
    let dim = p.head_dim as usize;
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
        // A log-sum-exp of NaN is a visible NaN, and reaches the output.
        if sum != 0.0 {
            for split in splits().filter(|s| s[dim] != f32::NEG_INFINITY) {
                let w = weight(split) / sum;
                if w != 0.0 {
                    o.iter_mut().zip(split).for_each(|(o, x)| *o += w * x);
                }
            }
        }
    }
    Ok(())
}
