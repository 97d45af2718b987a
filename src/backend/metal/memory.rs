//! Buffers that CPU and GPU share.

use std::ptr::NonNull;

use objc2::rc::Retained;
use objc2::runtime::ProtocolObject;
use objc2_foundation::ns_string;
use objc2_metal::{MTLBuffer, MTLDevice, MTLResource, MTLResourceOptions, MTLStorageMode};

use crate::backend::Memory;
use crate::backend::access::Access;
use crate::error::{MlxError, Result};

/// A Metal buffer.
#[derive(Debug)]
pub(crate) struct MetalMemory {
    buffer: Retained<ProtocolObject<dyn MTLBuffer>>,
    len: usize,
    /// `None` where the GPU alone sees it.
    host: Option<NonNull<u8>>,
}

// SAFETY: reference counts are atomic, the address and length are read once and never change, and
// a buffer may be bound from any thread; who touches the bytes is ordered by the runtime.
unsafe impl Send for MetalMemory {}
// SAFETY: as above; no method changes the buffer.
unsafe impl Sync for MetalMemory {}

impl MetalMemory {
    /// Zeroed memory. Metal zeroes it, and rounds it to pages itself.
    ///
    /// Hazards within one command are ours, by barriers. Tracking is kept on because it orders
    /// commands: two that touch one buffer may come from two encoders that know nothing of each
    /// other.
    pub(crate) fn allocate(device: &ProtocolObject<dyn MTLDevice>, bytes: usize) -> Result<Self> {
        let failed = || MlxError::BufferAllocationError { bytes };
        if bytes > device.maxBufferLength() {
            return Err(failed());
        }
        let options =
            MTLResourceOptions::StorageModeShared | MTLResourceOptions::HazardTrackingModeTracked;
        let buffer = device
            .newBufferWithLength_options(bytes.max(1), options)
            .ok_or_else(failed)?;
        buffer.setLabel(Some(ns_string!("mlx-flash-attn")));
        Ok(Self {
            len: bytes,
            ..Self::wrap(buffer)
        })
    }

    /// The caller's buffer, whole.
    pub(crate) fn wrap(buffer: Retained<ProtocolObject<dyn MTLBuffer>>) -> Self {
        // Only shared memory has an address that always shows what the GPU wrote.
        let shared = buffer.storageMode() == MTLStorageMode::Shared;
        Self {
            len: buffer.length(),
            host: shared.then(|| buffer.contents().cast()),
            buffer,
        }
    }

    pub(super) fn buffer(&self) -> &ProtocolObject<dyn MTLBuffer> {
        &self.buffer
    }
}

impl Memory for MetalMemory {
    fn len(&self) -> usize {
        self.len
    }

    fn host(&self, _access: Access) -> Result<*mut u8> {
        self.host.map(NonNull::as_ptr).ok_or_else(|| {
            MlxError::expected(
                "buffer",
                "memory in Metal's shared storage mode",
                "memory that the host cannot see",
            )
        })
    }

    fn address(&self, _access: Access) -> Result<*mut u8> {
        // An address of the GPU's, which memory has that the host cannot see too: the host never follows
        // it.
        let at = usize::try_from(self.buffer.gpuAddress()).unwrap_or(0);
        Ok(std::ptr::without_provenance_mut(at))
    }
}
