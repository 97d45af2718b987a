//! Memory of a device, as the runtime sees it.

use std::any::Any;
use std::fmt;
use std::ops::Range;

use crate::backend::access::Access;
use crate::error::Result;

/// A device's memory, visible to the host.
pub(crate) trait Memory: Any + Send + Sync + fmt::Debug {
    /// Size in bytes.
    fn len(&self) -> usize;

    /// Address at which the host sees the memory as the device last left it. With an `access` that
    /// writes, what the host leaves there is what the device sees next.
    fn host(&self, access: Access) -> Result<*mut u8>;

    /// Whether the host sees a copy, which is brought up to date as a whole, instead of the memory.
    fn is_mirrored(&self) -> bool {
        false
    }

    /// As [`Self::host`], without bringing the host's view up to date: a guard lends it.
    fn host_as_it_stands(&self, access: Access) -> Result<*mut u8> {
        self.host(access)
    }

    /// Copies bytes of the host's to byte `at` and those after it.
    ///
    /// # Safety
    /// `at + bytes.len()` bytes are inside the memory, and until this returns no command, no guard and no
    /// other copy uses those that are written.
    unsafe fn upload(&self, at: usize, bytes: &[u8]) -> Result<()> {
        let to = self.host(Access::Write)?;
        // SAFETY: the caller promises that the bytes are inside the memory and that nobody else uses them.
        // `copy` takes a source that overlaps them, as memory of the caller's may.
        unsafe { std::ptr::copy(bytes.as_ptr(), to.add(at), bytes.len()) };
        Ok(())
    }

    /// Copies byte `at` and those after it to the host.
    ///
    /// # Safety
    /// `at + into.len()` bytes are inside the memory, and until this returns no command, no guard and no
    /// other copy writes those that are read.
    unsafe fn download(&self, at: usize, into: &mut [u8]) -> Result<()> {
        let from = self.host(Access::Read)?;
        // SAFETY: the caller promises that the bytes are inside the memory and that nobody writes them.
        unsafe { std::ptr::copy(from.add(at), into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies bytes of memory of the same kind of device to byte `at` and those after it.
    ///
    /// # Safety
    /// As for [`Self::upload`] of the bytes that are written, and for [`Self::download`] of those that are
    /// read. The two share no byte.
    unsafe fn copy_from(&self, at: usize, source: &dyn Memory, range: Range<usize>) -> Result<()> {
        let (to, from) = (self.host(Access::Write)?, source.host(Access::Read)?);
        // SAFETY: the caller promises that both ranges are inside their memory and that nobody else uses
        // them. `copy` takes ranges that overlap, as two wrappings of one memory of the caller's may.
        unsafe { std::ptr::copy(from.add(range.start), to.add(at), range.len()) };
        Ok(())
    }

    /// Address at which the device's own kernels see the memory.
    fn address(&self, access: Access) -> Result<*mut u8> {
        self.host(access)
    }
}
