//! Attention on the CPU. The keys and values of a head are packed once, in strips; query rows take
//! them strip by strip with an online softmax, in f32. Everything is written once, over the vectors
//! of [`simd::Simd`] and the units of [`micro::Kernel`], and made for each instruction set in
//! [`table`].

#[cfg(target_arch = "x86_64")]
mod amxbf16;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512bf16;
mod call;
mod in_place;
mod mask_map;
mod math;
mod micro;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "aarch64")]
mod neonbf16;
mod pack;
mod peak;
mod portable;
mod running;
mod schedule;
mod scratch;
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

use super::isa::Isa;
use super::job::Job;
use crate::DType;
#[cfg(all(target_arch = "x86_64", not(miri)))]
pub(crate) use amxbf16::available as tiles_available;
use mask_map::MaskMap;
pub(crate) use team::Team;

/// Computes O, and the log-sum-exp where it is asked for. The bits of the result depend on `isa` but
/// not on the threads.
pub(crate) fn run(job: &Job<'_>, isa: Isa, team: Team<'_>) {
    run_with(job, table::select(isa, job.problem.kv_dtype()), team);
}

fn run_with(job: &Job<'_>, kernels: &'static table::Kernels, team: Team<'_>) {
    let mut call = call::Call::new(job, kernels);
    call.map = MaskMap::of(&call, team);
    schedule::run(&call, team);
}

/// Operations a second that the micro-kernel for K and V of `dtype` reaches at best, on all threads
/// of the current rayon pool.
pub(crate) fn peak(isa: Isa, dtype: DType) -> f64 {
    peak::measure(table::select(isa, dtype))
}
