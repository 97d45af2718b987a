//! Prefill on the CPU.

use super::Cpu;
use super::job::Job;
use super::kernels;
use crate::backend::Dispatch;
use crate::backend::checked::Prefill;
use crate::error::Result;

/// Runs a prefill kernel.
pub(crate) fn run(cpu: &Cpu, dispatch: &Dispatch) -> Result<()> {
    let Prefill { problem, at } = Prefill::read(dispatch)?;
    kernels::run(
        &Job {
            problem: &problem,
            at,
        },
        cpu.isa(),
        cpu.team(),
    )
}
