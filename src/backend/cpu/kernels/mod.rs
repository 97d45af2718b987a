//! Attention on the CPU. The keys and values of a head are packed once, in strips; query rows take
//! them strip by strip with an online softmax, in f32. Everything is written once, over the vectors
//! of [`simd::Simd`] and the words of [`micro::Kernel`], and made for each instruction set in
//! [`table`].

#[cfg(target_arch = "x86_64")]
mod amxbf16;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512bf16;
mod blocks;
mod bound_call;
mod buffer;
mod call;
mod careful;
mod chunks;
mod flush;
mod in_place;
mod kv_rows;
mod mask_lookup;
mod mask_map;
mod mask_scan;
mod math;
mod micro;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neonbf16;
mod pack;
mod packed;
mod pass;
mod peak;
mod portable;
mod products;
mod query_row;
mod running;
mod schedule;
mod scratch;
mod sequences;
mod simd;
mod softmax;
mod span;
mod split;
mod step;
mod table;
mod team;
#[cfg(test)]
mod tests;
mod tile;
mod types;

use super::isa::Isa;
use super::job::Job;
use crate::DType;
use crate::attention::{Format, Problem};
use crate::error::Result;
use bound_call::BoundCall;
pub(crate) use buffer::room;
use mask_map::MaskMap;
pub(crate) use team::Team;
use types::Float;

/// Computes O, and the log-sum-exp where it is asked for. The bits of the result depend on `isa` but
/// not on the threads. Fails where there is no memory for it.
pub(crate) fn run(job: &Job<'_>, isa: Isa, team: Team<'_>) -> Result<()> {
    run_with(job, kernels_for(job.problem, isa)?, team)
}

/// The kernels for a problem: those of bf16 where all of Q, K and V are.
fn kernels_for(problem: &Problem, isa: Isa) -> Result<&'static table::Kernels> {
    let formats = [problem.key_format(), problem.value_format()];
    let alike = formats.iter().all(|f| *f == Format::Plain(problem.dtype()));
    let float = if alike { problem.dtype() } else { DType::F32 };
    Ok(table::select(isa, Float::of(float)?))
}

fn run_with(job: &Job<'_>, kernels: &'static table::Kernels, team: Team<'_>) -> Result<()> {
    let mut call = BoundCall::new(job, kernels)?;
    call.call.map = MaskMap::of(&call, team);
    schedule::run(&call, team)
}

/// Operations a second that the micro-kernel for K and V of `dtype` reaches at best, on all threads
/// of the current rayon pool; nothing where there are no kernels for them.
pub(crate) fn peak(isa: Isa, dtype: DType) -> Option<f64> {
    let float = Float::of(dtype).ok()?;
    let kernels = table::select(isa, float);
    // SAFETY: `select` gives only kernels that this processor runs.
    Some(unsafe { peak::measure(kernels.rounds) })
}
