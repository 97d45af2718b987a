//! Buffers in this machine's memory.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use crate::backend::Memory;
use crate::backend::access::Access;
use crate::error::{MlxError, Result};

/// Alignment of every buffer: a cache line, and the widest vector.
const ALIGN: usize = 64;

/// Alignment that is asked of the allocator. It gets zeroed pages from the system untouched up to
/// here; for a wider one it would write the zeros itself, and so make large buffers resident.
const BASE_ALIGN: usize = 8;

/// Zeroed memory on cache lines.
#[derive(Debug)]
pub(crate) struct HostMemory {
    base: NonNull<u8>,
    layout: Layout,
    /// From `base` to the first cache line.
    skip: usize,
    len: usize,
}

// SAFETY: the memory belongs to this value alone; who reads and writes it is ordered by the runtime.
unsafe impl Send for HostMemory {}
// SAFETY: as above; no method reads or writes the memory itself.
unsafe impl Sync for HostMemory {}

impl HostMemory {
    pub(crate) fn zeroed(bytes: usize) -> Result<Self> {
        let failed = || MlxError::BufferAllocationError { bytes };
        let len = bytes.max(1);
        let size = len.checked_add(ALIGN - BASE_ALIGN).ok_or_else(failed)?;
        let layout = Layout::from_size_align(size, BASE_ALIGN).map_err(|_| failed())?;
        // SAFETY: the layout's size is at least 1.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(failed)?;
        let skip = base.as_ptr().addr().wrapping_neg() % ALIGN;
        Ok(Self {
            base,
            layout,
            skip,
            len,
        })
    }
}

impl Memory for HostMemory {
    fn len(&self) -> usize {
        self.len
    }

    fn host(&self, _access: Access) -> Result<*mut u8> {
        // SAFETY: `base` lies on 8 bytes, so `skip` is at most 56, which the layout has to spare.
        Ok(unsafe { self.base.as_ptr().add(self.skip) })
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: `base` came from `alloc_zeroed` with this layout and is freed once.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

/// Memory of the caller's.
#[derive(Debug)]
pub(crate) struct CallersMemory {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: who reads and writes the memory, and when, is what `wrap` asks of the caller.
unsafe impl Send for CallersMemory {}
// SAFETY: as above; no method reads or writes the memory itself.
unsafe impl Sync for CallersMemory {}

impl CallersMemory {
    /// # Safety
    /// While the result lives, `len` bytes at `base` are the caller's to lend: readable, and writable
    /// if a command writes them.
    pub(crate) unsafe fn wrap(base: NonNull<u8>, len: usize) -> Self {
        Self { base, len }
    }
}

impl Memory for CallersMemory {
    fn len(&self) -> usize {
        self.len
    }

    fn host(&self, _access: Access) -> Result<*mut u8> {
        Ok(self.base.as_ptr())
    }
}

#[cfg(test)]
mod tests {
    use super::{ALIGN, HostMemory};
    use crate::backend::Memory;
    use crate::backend::access::Access;

    #[test]
    fn memory_is_zeroed_on_cache_lines_and_as_long_as_asked() {
        for len in [1, 7, 64, 1000] {
            let memory = HostMemory::zeroed(len).unwrap();
            let ptr = memory.host(Access::ReadWrite).unwrap();
            assert!(ptr.addr().is_multiple_of(ALIGN));
            assert_eq!(memory.len(), len);
            // SAFETY: `len` bytes at `ptr` belong to `memory`.
            let bytes = unsafe { std::slice::from_raw_parts_mut(ptr, len) };
            assert!(bytes.iter().all(|b| *b == 0));
            bytes.fill(1);
        }
    }

    #[test]
    fn sizes_that_no_allocator_has_are_errors() {
        for len in [usize::MAX, isize::MAX as usize, usize::MAX - 10] {
            assert!(HostMemory::zeroed(len).is_err());
        }
    }
}
