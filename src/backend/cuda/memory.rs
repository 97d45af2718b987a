//! Buffers on the GPU, with a view of the host's made when it is asked for and kept coherent: it is
//! brought up to date before the host looks, and brought back before the GPU does.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{result, sys};

use super::driver::{Stream, failed};
use super::gpu::Gpu;
use crate::backend::Memory;
use crate::backend::access::Access;
use crate::backend::host_memory::HostMemory;
use crate::error::{MlxError, Result};

/// Which side was written last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Newer {
    /// Neither: both are the same, or the host's side is not there and the GPU's is all zeros.
    Same,
    Host,
    Device,
}

#[derive(Debug)]
struct Mirror {
    host: Option<HostMemory>,
    newer: Newer,
}

/// Memory of the GPU.
#[derive(Debug)]
pub(crate) struct CudaMemory {
    gpu: Arc<Gpu>,
    device: sys::CUdeviceptr,
    len: usize,
    /// The caller's memory: not freed here, and written by others too.
    foreign: bool,
    mirror: Mutex<Mirror>,
}

impl CudaMemory {
    /// Zeroed memory.
    pub(super) fn zeroed(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self> {
        let memory = Self {
            gpu: Arc::clone(gpu),
            device: gpu.context.allocate(bytes)?,
            len: bytes,
            foreign: false,
            mirror: Mutex::new(Mirror {
                host: None,
                newer: Newer::Same,
            }),
        };
        // SAFETY: the memory has these bytes, and all its uses come after this on the same stream or
        // on one that waits for it.
        unsafe { result::memset_d8_async(memory.device, 0, bytes, gpu.stream.raw()) }
            .map_err(failed("zeroing memory"))?;
        Ok(memory)
    }

    /// Memory of the caller's.
    ///
    /// # Safety
    /// `bytes` bytes at `device` are memory of this GPU while the result lives.
    pub(crate) unsafe fn wrap(gpu: &Arc<Gpu>, device: u64, bytes: usize) -> Self {
        Self {
            gpu: Arc::clone(gpu),
            device,
            len: bytes,
            foreign: true,
            mirror: Mutex::new(Mirror {
                host: None,
                newer: Newer::Device,
            }),
        }
    }

    fn mirror(&self) -> MutexGuard<'_, Mirror> {
        self.mirror.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory, where it is this device's: its GPU, opened once. Another device of the same GPU has
    /// another stream, which knows nothing of the commands that use the memory.
    pub(super) fn of<'a>(memory: &'a dyn Memory, gpu: &Arc<Gpu>) -> Option<&'a Self> {
        (memory as &dyn Any)
            .downcast_ref::<Self>()
            .filter(|memory| Arc::ptr_eq(&memory.gpu, gpu))
    }

    /// Before a kernel on `stream` uses it: what the host wrote is brought to the GPU. The caller holds
    /// [`Gpu::submitting`] until the device's own stream waits for `stream`: from here on the memory
    /// counts as uploaded for every command.
    pub(super) fn prepare(&self, stream: &Stream, access: Access) -> Result<()> {
        let mut mirror = self.mirror();
        if mirror.newer == Newer::Host {
            if let Some(host) = &mirror.host {
                let from = host.host(Access::Read)?;
                // SAFETY: the mirror has `len` bytes, which nobody writes: what is lent to the host for
                // writing cannot be in a command.
                let bytes = unsafe { std::slice::from_raw_parts(from, self.len) };
                // SAFETY: as many bytes on either side. The driver has copied pageable memory when
                // it returns, and the kernel follows on the same stream.
                unsafe { result::memcpy_htod_async(self.device, bytes, stream.raw()) }
                    .map_err(failed("copying to the GPU"))?;
            }
            mirror.newer = Newer::Same;
        }
        if access.writes() {
            mirror.newer = Newer::Device;
        }
        Ok(())
    }
}

impl Memory for CudaMemory {
    fn len(&self) -> usize {
        self.len
    }

    fn host(&self, access: Access) -> Result<*mut u8> {
        let mut mirror = self.mirror();
        if self.foreign && mirror.newer == Newer::Same {
            mirror.newer = Newer::Device;
        }
        let host = match mirror.host.take() {
            Some(host) => host,
            None => HostMemory::zeroed(self.len)?,
        };
        let at = host.host(access)?;
        let newer = mirror.newer;
        mirror.host = Some(host);
        if newer == Newer::Device {
            self.gpu.context.enter()?;
            self.gpu.stream.synchronize()?;
            // SAFETY: the mirror has `len` bytes, and none of them is lent: while one is, the runtime
            // asks for `host_as_it_stands`.
            let bytes = unsafe { std::slice::from_raw_parts_mut(at, self.len) };
            // SAFETY: as many bytes on either side, and no command that writes them is running.
            unsafe { result::memcpy_dtoh_sync(bytes, self.device) }
                .map_err(failed("copying from the GPU"))?;
            mirror.newer = Newer::Same;
        }
        if access.writes() {
            mirror.newer = Newer::Host;
        }
        Ok(at)
    }

    fn is_mirrored(&self) -> bool {
        true
    }

    fn host_as_it_stands(&self, access: Access) -> Result<*mut u8> {
        let mirror = self.mirror();
        let host = mirror.host.as_ref();
        host.ok_or_else(|| MlxError::CommandBufferError("nothing is lent".into()))?
            .host(access)
    }

    fn address(&self, _access: Access) -> Result<*mut u8> {
        // An address of the GPU's: the host never follows it.
        Ok(std::ptr::without_provenance_mut(
            usize::try_from(self.device).unwrap_or(0),
        ))
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        if !self.foreign && self.gpu.context.enter().is_ok() {
            // SAFETY: allocated once, freed once. Commands hold a handle until they have run.
            let _ = unsafe { result::free_sync(self.device) };
        }
    }
}
