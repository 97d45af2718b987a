//! One attention call as the CPU kernels see it: a checked problem and where its operands lie.

use crate::attention::Problem;
pub(crate) use crate::backend::command::Pointers;

/// A problem with its operands.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Job<'a> {
    pub(crate) problem: &'a Problem,
    pub(crate) at: Pointers,
}
