//! Dispatches that bind buffers and bytes, as free functions; each is the encoder's method of its name.

use crate::compat::registry::Pipeline;
use crate::runtime::encoder::{CommandEncoder, MTLSize};
pub use crate::runtime::encoder::{KernelArg, as_bytes};

/// [`CommandEncoder::encode_with_args`]: the grid counts threads.
pub fn encode_with_args(
    encoder: &mut CommandEncoder,
    pipeline: &Pipeline,
    bindings: &[(u64, KernelArg<'_>)],
    grid_size: MTLSize,
    threadgroup_size: MTLSize,
) {
    encoder.encode_with_args(pipeline, bindings, grid_size, threadgroup_size);
}

/// [`CommandEncoder::encode_threadgroups_with_args`]: the grid counts threadgroups.
pub fn encode_threadgroups_with_args(
    encoder: &mut CommandEncoder,
    pipeline: &Pipeline,
    bindings: &[(u64, KernelArg<'_>)],
    threadgroups: MTLSize,
    threadgroup_size: MTLSize,
) {
    encoder.encode_threadgroups_with_args(pipeline, bindings, threadgroups, threadgroup_size);
}

/// [`CommandEncoder::encode_threadgroups_with_args_and_shared`]: with threadgroup memory.
pub fn encode_threadgroups_with_args_and_shared(
    encoder: &mut CommandEncoder,
    pipeline: &Pipeline,
    bindings: &[(u64, KernelArg<'_>)],
    threadgroup_mem: &[(u64, u64)],
    threadgroups: MTLSize,
    threadgroup_size: MTLSize,
) {
    encoder.encode_threadgroups_with_args_and_shared(
        pipeline,
        bindings,
        threadgroup_mem,
        threadgroups,
        threadgroup_size,
    );
}
