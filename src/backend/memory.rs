//! Memory of a device, as the runtime sees it.

use std::any::Any;
use std::fmt;

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

    /// Address at which the device's own kernels see the memory.
    fn address(&self, access: Access) -> Result<*mut u8> {
        self.host(access)
    }
}
