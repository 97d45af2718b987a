//! Buffers in this machine's memory.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use crate::attention::bindings::Access;
use crate::backend::Memory;
use crate::error::{MlxError, Result};

/// Alignment of every buffer: a cache line, and the widest vector.
const ALIGN: usize = 64;

/// Zeroed memory on cache lines.
#[derive(Debug)]
pub(crate) struct HostMemory {
    ptr: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory belongs to this value alone; who reads and writes it is ordered by the runtime.
unsafe impl Send for HostMemory {}
// SAFETY: as above; no method reads or writes the memory itself.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    pub(crate) fn zeroed(bytes: usize) -> Result<Self> {
        let failed = || MlxError::BufferAllocationError { bytes };
        let layout = Layout::from_size_align(bytes.max(1), ALIGN).map_err(|_| failed())?;
        // SAFETY: the layout's size is at least 1.
        let ptr = unsafe { alloc_zeroed(layout) };
        Ok(Self {
            ptr: NonNull::new(ptr).ok_or_else(failed)?,
            layout,
        })
    }
}

impl Memory for HostMemory {
    fn len(&self) -> usize {
        self.layout.size()
    }

    fn host(&self, _access: Access) -> Result<*mut u8> {
        Ok(self.ptr.as_ptr())
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: `ptr` came from `alloc_zeroed` with this layout and is freed once.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
    }
}
