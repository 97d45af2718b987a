//! Makes the calls of lowered steps on a target.

use std::any::Any;

use objc2::runtime::ProtocolObject;
use objc2_metal::{MTLBuffer, MTLComputePipelineState, MTLDevice, MTLResource, MTLSize};

use super::launch::Step;
use super::library::Built;
use super::lowering::{self, Op};
use super::memory::MetalMemory;
use super::target::ComputeTarget;
use crate::backend::access::Access;
use crate::backend::{Kernel, Memory};
use crate::error::{MlxError, Result};

/// A buffer for bytes that are too many to go inline; it must live until the command has completed.
pub(crate) type Temporary = MetalMemory;

/// A call with its Metal objects.
enum Call<'a> {
    Pipeline(&'a ProtocolObject<dyn MTLComputePipelineState>),
    Buffer(usize, &'a ProtocolObject<dyn MTLBuffer>, usize, Access),
    Temporary(usize, usize),
    Bytes(usize, &'a [u8]),
    Dispatch(&'a str, MTLSize, MTLSize),
    Barrier,
}

/// Encodes `steps` into `target`; on an error nothing was encoded.
pub(crate) fn encode_into(
    device: &ProtocolObject<dyn MTLDevice>,
    steps: &[Step],
    target: &mut dyn ComputeTarget,
) -> Result<Vec<Temporary>> {
    let mut temporaries = Vec::new();
    let calls = lowering::lower(steps)?
        .into_iter()
        .map(|op| {
            Ok(match op {
                Op::Pipeline(kernel) => {
                    Call::Pipeline(pipeline(device, kernel).ok_or_else(|| foreign(&kernel.name))?)
                }
                Op::Buffer {
                    index,
                    memory,
                    offset,
                    access,
                } => {
                    let buffer = buffer(device, memory).ok_or_else(|| foreign("a buffer"))?;
                    Call::Buffer(index, buffer, offset, access)
                }
                Op::Inline { index, bytes } => Call::Bytes(index, bytes),
                Op::Staged { index, bytes } => {
                    temporaries.push(staged(device, bytes)?);
                    Call::Temporary(index, temporaries.len() - 1)
                }
                Op::Dispatch {
                    kernel,
                    grid,
                    threadgroup,
                } => Call::Dispatch(kernel, size(grid), size(threadgroup)),
                Op::Barrier => Call::Barrier,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    for call in calls {
        match call {
            Call::Pipeline(state) => target.set_pipeline(state),
            Call::Buffer(index, buffer, offset, access) => {
                target.set_buffer(index, buffer, offset, access);
            }
            Call::Temporary(index, at) => {
                if let Some(memory) = temporaries.get(at) {
                    target.set_buffer(index, memory.buffer(), 0, Access::Read);
                }
            }
            Call::Bytes(index, bytes) => target.set_bytes(index, bytes),
            Call::Dispatch(kernel, grid, threadgroup) => {
                target.dispatch(kernel, grid, threadgroup);
            }
            Call::Barrier => target.barrier(),
        }
    }
    Ok(temporaries)
}

/// The pipeline of a kernel that was built for `device`; `None` for one of another GPU.
pub(super) fn pipeline<'a>(
    device: &ProtocolObject<dyn MTLDevice>,
    kernel: &'a Kernel,
) -> Option<&'a ProtocolObject<dyn MTLComputePipelineState>> {
    let built = kernel.state.downcast_ref::<Built>()?;
    (*built.pipeline.device() == *device).then_some(&*built.pipeline)
}

/// The buffer of memory of `device`'s; `None` for that of another GPU.
pub(super) fn buffer<'a>(
    device: &ProtocolObject<dyn MTLDevice>,
    memory: &'a dyn Memory,
) -> Option<&'a ProtocolObject<dyn MTLBuffer>> {
    let memory = (memory as &dyn Any).downcast_ref::<MetalMemory>()?;
    (*memory.buffer().device() == *device).then(|| memory.buffer())
}

fn foreign(what: &str) -> MlxError {
    MlxError::CommandBufferError(format!("{what} was made for another device"))
}

fn staged(device: &ProtocolObject<dyn MTLDevice>, bytes: &[u8]) -> Result<Temporary> {
    let memory = MetalMemory::allocate(device, bytes.len())?;
    let to = memory.host(Access::Write)?;
    // SAFETY: the memory is new, unshared and as long as `bytes`.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    Ok(memory)
}

fn size([width, height, depth]: [usize; 3]) -> MTLSize {
    MTLSize {
        width,
        height,
        depth,
    }
}
