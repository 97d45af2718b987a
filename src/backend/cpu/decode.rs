//! Decode on the CPU. The attention kernels already split the keys over the threads, so the first
//! of each head's partial results holds all keys and the others none; the join treats them as it treats
//! a GPU's.

use super::job::{Job, Pointers};
use super::kernels;
use super::processors::Cpu;
use crate::attention::Role;
use crate::backend::command::{DecodePartials, JoinPartials, Slot, Span, Task};
use crate::error::{MlxError, Result};

/// Writes each head's partial results.
pub(super) fn partials(cpu: &Cpu, decode: &DecodePartials, task: &Task<Span>) -> Result<()> {
    let problem = &*decode.problem;
    let (heads, dim) = (problem.shape().heads, problem.shape().qk_dim);
    let per_head = decode.splits as usize * (dim + 2);
    // SAFETY: the CPU's memory is this process's own, operands were found aligned when the task was made, and
    // nobody else uses written ones while it runs.
    let partials = unsafe { task.slice_mut::<f32>(Slot::Partials, heads * per_head)? };
    let zeros = |count: usize| {
        let mut zeros = kernels::room(count)?;
        zeros.resize(count, 0.0f32);
        Ok::<_, MlxError>(zeros)
    };
    let mut o = zeros(heads.saturating_mul(dim))?;
    let mut lse = zeros(heads)?;
    let at = Pointers {
        o: o.as_mut_ptr().cast(),
        lse: lse.as_mut_ptr(),
        ..task.pointers()?
    };
    kernels::run(&Job { problem, at }, cpu.isa, cpu.team())?;
    for (h, partials) in partials.chunks_exact_mut(per_head).enumerate() {
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
pub(super) fn join(join: &JoinPartials, task: &Task<Span>) -> Result<()> {
    let (heads, dim) = (join.heads as usize, join.head_dim as usize);
    let per_head = join.splits as usize * (dim + 2);
    // SAFETY: the CPU's memory is this process's own, operands were found aligned when the task was made, and
    // nobody else writes them while it runs.
    let (partials, out) = unsafe {
        (
            task.slice::<f32>(Slot::Partials, heads * per_head)?,
            task.slice_mut::<f32>(Slot::Operand(Role::Output), heads * dim)?,
        )
    };
    for (partials, o) in partials
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
