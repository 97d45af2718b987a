//! The other methods by which programs for `mlx-native` encode and commit, over
//! [`CommandEncoder::encode_threadgroups_with_args`]: a dispatch that cannot be recorded is reported by the
//! commit, which then runs nothing.

use super::registry::Pipeline;
use crate::error::{MlxError, Result};
use crate::runtime::buffer::MlxBuffer;
use crate::runtime::encoder::{CommandEncoder, KernelArg, MTLSize};

/// Buffers as arguments.
fn args<'a>(buffers: &[(u64, &'a MlxBuffer)]) -> Vec<(u64, KernelArg<'a>)> {
    buffers
        .iter()
        .map(|(index, buffer)| (*index, KernelArg::Buffer(buffer)))
        .collect()
}

/// How many threadgroups make up a grid of threads.
fn threadgroups(pipeline: &Pipeline, threads: MTLSize, size: MTLSize) -> Result<MTLSize> {
    let mut groups = [0; 3];
    let sides = threads.to_array().into_iter().zip(size.to_array());
    for (group, (threads, size)) in groups.iter_mut().zip(sides) {
        if size == 0 || !threads.is_multiple_of(size) {
            return Err(MlxError::expected(
                &format!("{}: a grid of threads", pipeline.label()),
                format!("a multiple of the threadgroup, {size} threads"),
                threads,
            ));
        }
        *group = threads / size;
    }
    Ok(groups.into())
}

impl CommandEncoder {
    /// Records one dispatch over a grid of threads that binds buffers alone. The grid must be whole
    /// threadgroups: this crate's kernels need all threads of each.
    pub fn encode(
        &mut self,
        pipeline: &Pipeline,
        buffers: &[(u64, &MlxBuffer)],
        grid_size: MTLSize,
        threadgroup_size: MTLSize,
    ) {
        self.encode_with_args(pipeline, &args(buffers), grid_size, threadgroup_size);
    }

    /// As [`Self::encode`], and binds bytes and buffers with offsets, too.
    pub fn encode_with_args(
        &mut self,
        pipeline: &Pipeline,
        bindings: &[(u64, KernelArg<'_>)],
        grid_size: MTLSize,
        threadgroup_size: MTLSize,
    ) {
        match threadgroups(pipeline, grid_size, threadgroup_size) {
            Ok(groups) => {
                self.encode_threadgroups_with_args(pipeline, bindings, groups, threadgroup_size);
            }
            Err(error) => self.refuse(error),
        }
    }

    /// Records one dispatch over threadgroups that binds buffers alone.
    pub fn encode_threadgroups(
        &mut self,
        pipeline: &Pipeline,
        buffers: &[(u64, &MlxBuffer)],
        threadgroups: MTLSize,
        threadgroup_size: MTLSize,
    ) {
        self.encode_threadgroups_with_args(
            pipeline,
            &args(buffers),
            threadgroups,
            threadgroup_size,
        );
    }

    /// As [`Self::encode_threadgroups`], with lengths of threadgroup memory, as
    /// [`Self::encode_threadgroups_with_args_and_shared`] takes them.
    pub fn encode_threadgroups_with_shared(
        &mut self,
        pipeline: &Pipeline,
        buffers: &[(u64, &MlxBuffer)],
        threadgroup_mem: &[(u64, u64)],
        threadgroups: MTLSize,
        threadgroup_size: MTLSize,
    ) {
        self.encode_threadgroups_with_args_and_shared(
            pipeline,
            &args(buffers),
            threadgroup_mem,
            threadgroups,
            threadgroup_size,
        );
    }

    /// As [`Self::encode_threadgroups_with_args`], with lengths of threadgroup memory, in bytes by index.
    /// This crate's kernels declare all their threadgroup memory, so that the lengths change nothing. For
    /// a text of the caller's own, lengths are refused: its kernels must declare theirs, too.
    pub fn encode_threadgroups_with_args_and_shared(
        &mut self,
        pipeline: &Pipeline,
        bindings: &[(u64, KernelArg<'_>)],
        threadgroup_mem: &[(u64, u64)],
        threadgroups: MTLSize,
        threadgroup_size: MTLSize,
    ) {
        if pipeline.kernel().foreign && !threadgroup_mem.is_empty() {
            return self.refuse(MlxError::expected(
                &format!("{}: threadgroup memory", pipeline.label()),
                "an array that the kernel declares",
                format!("lengths by index {threadgroup_mem:?}"),
            ));
        }
        self.encode_threadgroups_with_args(pipeline, bindings, threadgroups, threadgroup_size);
    }

    /// The same as [`Self::encode_threadgroups`]: the encoder finds barriers from the bindings of every
    /// dispatch, so that `reads` and `writes` add nothing.
    pub fn dispatch_tracked_threadgroups(
        &mut self,
        pipeline: &Pipeline,
        buffers: &[(u64, &MlxBuffer)],
        _reads: &[&MlxBuffer],
        _writes: &[&MlxBuffer],
        threadgroups: MTLSize,
        threadgroup_size: MTLSize,
    ) {
        self.encode_threadgroups(pipeline, buffers, threadgroups, threadgroup_size);
    }

    /// The same as [`Self::encode_threadgroups_with_shared`]; `reads` and `writes` as for
    /// [`Self::dispatch_tracked_threadgroups`].
    #[allow(clippy::too_many_arguments)]
    pub fn dispatch_tracked_threadgroups_with_shared(
        &mut self,
        pipeline: &Pipeline,
        buffers: &[(u64, &MlxBuffer)],
        threadgroup_mem: &[(u64, u64)],
        _reads: &[&MlxBuffer],
        _writes: &[&MlxBuffer],
        threadgroups: MTLSize,
        threadgroup_size: MTLSize,
    ) {
        self.encode_threadgroups_with_shared(
            pipeline,
            buffers,
            threadgroup_mem,
            threadgroups,
            threadgroup_size,
        );
    }

    /// The same as [`Self::encode_threadgroups_with_args`]; `reads` and `writes` as for
    /// [`Self::dispatch_tracked_threadgroups`].
    pub fn dispatch_tracked_threadgroups_with_args(
        &mut self,
        pipeline: &Pipeline,
        bindings: &[(u64, KernelArg<'_>)],
        _reads: &[&MlxBuffer],
        _writes: &[&MlxBuffer],
        threadgroups: MTLSize,
        threadgroup_size: MTLSize,
    ) {
        self.encode_threadgroups_with_args(pipeline, bindings, threadgroups, threadgroup_size);
    }

    /// The same as [`Self::encode_threadgroups_with_args_and_shared`]; `reads` and `writes` as for
    /// [`Self::dispatch_tracked_threadgroups`].
    #[allow(clippy::too_many_arguments)]
    pub fn dispatch_tracked_threadgroups_with_args_and_shared(
        &mut self,
        pipeline: &Pipeline,
        bindings: &[(u64, KernelArg<'_>)],
        threadgroup_mem: &[(u64, u64)],
        _reads: &[&MlxBuffer],
        _writes: &[&MlxBuffer],
        threadgroups: MTLSize,
        threadgroup_size: MTLSize,
    ) {
        self.encode_threadgroups_with_args_and_shared(
            pipeline,
            bindings,
            threadgroup_mem,
            threadgroups,
            threadgroup_size,
        );
    }

    /// The same as [`Self::encode_with_args`]; `reads` and `writes` as for
    /// [`Self::dispatch_tracked_threadgroups`].
    pub fn dispatch_tracked_threads_with_args(
        &mut self,
        pipeline: &Pipeline,
        bindings: &[(u64, KernelArg<'_>)],
        _reads: &[&MlxBuffer],
        _writes: &[&MlxBuffer],
        grid_size: MTLSize,
        threadgroup_size: MTLSize,
    ) {
        self.encode_with_args(pipeline, bindings, grid_size, threadgroup_size);
    }

    /// The same as [`Self::memory_barrier`], which also starts [`Self::mem_ranges_len`] at 0 again.
    pub fn force_barrier_and_reset_tracker(&mut self) {
        self.memory_barrier();
    }

    /// The same as [`Self::commit`]: this crate keeps no profiles in which the label would appear.
    pub fn commit_labeled(&mut self, _label: &str) {
        self.commit();
    }

    /// As [`Self::commit_and_wait`]; the text of a `CommandBufferError`, or of what a driver refused, starts with
    /// the label.
    ///
    /// # Errors
    /// As for [`Self::commit_and_wait`].
    pub fn commit_and_wait_labeled(&mut self, label: &str) -> Result<()> {
        self.commit_and_wait().map_err(|error| match error {
            MlxError::CommandBufferError(what) => {
                MlxError::CommandBufferError(format!("{label}: {what}"))
            }
            MlxError::Driver { what, source } => MlxError::Driver {
                what: format!("{label}: {what}"),
                source,
            },
            other => other,
        })
    }
}
