//! The encoder that dispatches go into: ours, or a caller's.

use std::ptr::NonNull;

use objc2::runtime::ProtocolObject;
use objc2_foundation::NSString;
use objc2_metal::{
    MTLBarrierScope, MTLBuffer, MTLCommandEncoder, MTLComputeCommandEncoder,
    MTLComputePipelineState, MTLSize,
};

use crate::backend::access::Access;

/// Takes the calls of recorded dispatches, in order, and makes them on a compute encoder.
///
/// Implement it for an engine's own encoder, so that the engine sees every buffer and how it is used.
/// Bindings stay in force from one dispatch to the next, as Metal's do.
pub trait ComputeTarget {
    /// Uses `pipeline` from now on.
    fn set_pipeline(&mut self, pipeline: &ProtocolObject<dyn MTLComputePipelineState>);

    /// Binds `buffer` from byte `offset` on; the next dispatch uses it as `access` says.
    fn set_buffer(
        &mut self,
        index: usize,
        buffer: &ProtocolObject<dyn MTLBuffer>,
        offset: usize,
        access: Access,
    );

    /// Binds a copy of `bytes`: 1 to 4096 of them.
    fn set_bytes(&mut self, index: usize, bytes: &[u8]);

    /// Makes what follows wait for what came before and see its writes. An engine that finds
    /// hazards itself from [`ComputeTarget::set_buffer`] may do nothing here.
    fn barrier(&mut self);

    /// Runs `kernel`, whose pipeline was set, over `grid` threadgroups.
    fn dispatch(&mut self, kernel: &str, grid: MTLSize, threadgroup: MTLSize);
}

/// Makes the calls on a Metal encoder, each dispatch in a debug group with its kernel's name.
#[derive(Debug)]
pub struct DirectTarget<'a>(&'a ProtocolObject<dyn MTLComputeCommandEncoder>);

impl<'a> DirectTarget<'a> {
    /// Encodes into `encoder`, of either dispatch type.
    ///
    /// # Safety
    /// As long as the target is used: the encoder has not ended and no other thread uses it, and
    /// each dispatch finds bound what its kernel reads, inside its buffer. Buffers must live until
    /// the command has completed; a command buffer retains them unless made not to.
    pub unsafe fn new(encoder: &'a ProtocolObject<dyn MTLComputeCommandEncoder>) -> Self {
        Self(encoder)
    }
}

impl ComputeTarget for DirectTarget<'_> {
    fn set_pipeline(&mut self, pipeline: &ProtocolObject<dyn MTLComputePipelineState>) {
        self.0.setComputePipelineState(pipeline);
    }

    fn set_buffer(
        &mut self,
        index: usize,
        buffer: &ProtocolObject<dyn MTLBuffer>,
        offset: usize,
        _access: Access,
    ) {
        // SAFETY: the buffer's lifetime and the range are what `new` asks for.
        unsafe {
            self.0.setBuffer_offset_atIndex(Some(buffer), offset, index);
        }
    }

    fn set_bytes(&mut self, index: usize, bytes: &[u8]) {
        let start = NonNull::from(bytes).cast();
        // SAFETY: the bytes are readable and copied at once; the index is what `new` asks for.
        unsafe {
            self.0.setBytes_length_atIndex(start, bytes.len(), index);
        }
    }

    fn barrier(&mut self) {
        self.0.memoryBarrierWithScope(MTLBarrierScope::Buffers);
    }

    fn dispatch(&mut self, kernel: &str, grid: MTLSize, threadgroup: MTLSize) {
        self.0.pushDebugGroup(&NSString::from_str(kernel));
        self.0
            .dispatchThreadgroups_threadsPerThreadgroup(grid, threadgroup);
        self.0.popDebugGroup();
    }
}
