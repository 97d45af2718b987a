//! A call together with the kernels that run it.

use std::ops::Deref;

use super::call::Call;
use super::table::Kernels;
use crate::backend::cpu::job::Job;
use crate::error::Result;

/// A [`Call`] laid out for the micro-kernel of `kernels`. No other kernels may run it.
#[derive(Debug)]
pub(super) struct BoundCall<'a> {
    pub(super) call: Call<'a>,
    pub(super) kernels: &'static Kernels,
}

impl<'a> BoundCall<'a> {
    /// Refuses kernels that do not take the problem's elements; narrower ones take head dims that are no
    /// whole vectors.
    pub(super) fn new(job: &Job<'a>, kernels: &'static Kernels) -> Result<Self> {
        let kernels = kernels.for_dim(job.problem.shape().qk_dim);
        let call = Call::new(job, kernels.shape, kernels.scan_mask)?;
        Ok(Self { call, kernels })
    }
}

impl<'a> Deref for BoundCall<'a> {
    type Target = Call<'a>;

    fn deref(&self) -> &Call<'a> {
        &self.call
    }
}
