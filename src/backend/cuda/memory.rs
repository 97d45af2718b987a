//! Buffers on the GPU. A buffer gets a host copy (its mirror) at the first host access. Whichever side is older
//! is brought up to date as a whole when it is needed: the mirror before the host reads it, the GPU's bytes before
//! the next kernel that uses the buffer.

use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{result, sys};

use super::driver::{Stream, failed};
use super::gpu::Gpu;
use crate::backend::Memory;
use crate::backend::access::Access;
use crate::backend::host_memory::HostMemory;
use crate::error::{MlxError, Result};

/// Most bytes that are handed to the driver at once where they go through memory of our own.
const STAGED: usize = 4 << 20;

/// Room for so many bytes.
fn room(bytes: usize) -> Result<Vec<u8>> {
    let mut room = Vec::new();
    let reserved = room.try_reserve_exact(bytes);
    reserved.map_err(|_| MlxError::BufferAllocationError { bytes })?;
    Ok(room)
}

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
        let _submitting = gpu.submitting_own()?;
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

    /// `memory` as CUDA memory where it belongs to this very `Gpu`. Memory of another `Gpu` is refused, even of the
    /// same card: this one's stream does not wait for the commands of the other's.
    pub(super) fn of<'a>(memory: &'a dyn Memory, gpu: &Arc<Gpu>) -> Option<&'a Self> {
        (memory as &dyn Any)
            .downcast_ref::<Self>()
            .filter(|memory| Arc::ptr_eq(&memory.gpu, gpu))
    }

    /// The GPU's address of a byte.
    fn at(&self, byte: usize) -> sys::CUdeviceptr {
        self.device + byte as sys::CUdeviceptr
    }

    /// Puts bytes inside the memory on the device's own stream.
    fn send(&self, at: usize, bytes: &[u8]) -> Result<()> {
        self.gpu.context.enter()?;
        // An asynchronous copy from pageable memory has read its source when the call returns; from pinned memory
        // the GPU may read later. `bytes` may be pinned and change after this returns, so they are staged in `own`.
        let mut own = room(bytes.len().min(STAGED))?;
        for (i, bytes) in bytes.chunks(STAGED).enumerate() {
            own.clear();
            own.extend_from_slice(bytes);
            // SAFETY: as many bytes on either side, inside the memory; `own` is pageable.
            unsafe {
                result::memcpy_htod_async(self.at(at + i * STAGED), &own, self.gpu.stream.raw())
            }
            .map_err(failed("copying to the GPU"))?;
        }
        self.finish_foreign()
    }

    /// Waits for a copy of the caller's memory: the caller may free it, or use it on another stream, once
    /// no handle is left.
    fn finish_foreign(&self) -> Result<()> {
        if self.foreign {
            self.gpu.stream.synchronize()?;
        }
        Ok(())
    }

    /// Uploads the mirror on `stream` where the host's side is newer, before a kernel on `stream` uses the memory.
    /// From here on the upload counts as done for every command, so the caller holds [`Gpu::submitting`] until later
    /// commands are known to come after what `stream` has.
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
        // Before the mirror is locked, which a command that is submitted does later.
        self.gpu.join()?;
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

    /// Puts the bytes on the device's own stream. They are written there after every command that was
    /// submitted before, also on a caller's stream, since the device's own waits for that, and before every
    /// command that is submitted later, since a caller's stream waits for the device's own. The host does
    /// not wait for the copy, but for one of the caller's memory.
    unsafe fn upload(&self, at: usize, bytes: &[u8]) -> Result<()> {
        // Taken before the mirror is locked: `prepare` on a caller's stream marks the mirror as uploaded before the
        // device's own stream waits for that upload. Without this lock the copy below could run before the upload.
        let _submitting = self.gpu.submitting_own()?;
        let mut mirror = self.mirror();
        if mirror.newer != Newer::Host {
            // Some of the bytes may have gone before one failed: the host's side is no longer the same.
            self.send(at, bytes)
                .inspect_err(|_| mirror.newer = Newer::Device)?;
        }
        match &mirror.host {
            // The same as the GPU's side, and it stays so; or newer, and goes to the GPU as a whole with the
            // next command that uses the memory.
            Some(host) if mirror.newer != Newer::Device => {
                // SAFETY: the mirror has `len` bytes, among which the caller promises these to be, and
                // that no guard lends them and no other copy uses them. `prepare`, which reads all of the
                // mirror, does so under the lock that is held here.
                unsafe { host.upload(at, bytes)? };
            }
            _ => mirror.newer = Newer::Device,
        }
        Ok(())
    }

    /// Brings the bytes alone to the host, where its side is not as new as the GPU's.
    unsafe fn download(&self, at: usize, into: &mut [u8]) -> Result<()> {
        self.gpu.join()?;
        let mirror = self.mirror();
        let current = match mirror.newer {
            Newer::Host => true,
            // Nobody says when the caller's memory is written.
            Newer::Same => !self.foreign,
            Newer::Device => false,
        };
        if let Some(host) = mirror.host.as_ref().filter(|_| current) {
            // SAFETY: the mirror has `len` bytes, among which the caller promises these to be, and that
            // nobody writes them.
            return unsafe { host.download(at, into) };
        }
        self.gpu.context.enter()?;
        // The commands that wrote the bytes have been waited for, but not the copies and the zeroing that
        // this stream was given.
        self.gpu.stream.synchronize()?;
        // SAFETY: the caller promises that the bytes are inside the memory and that no command writes them;
        // the driver has copied them when it returns.
        unsafe { result::memcpy_dtoh_sync(into, self.at(at)) }
            .map_err(failed("copying from the GPU"))
    }

    /// Copies on the GPU, ordered as an [`upload`](Memory::upload) is. Where the host's side of either is
    /// newer than the GPU's, the bytes go through the host.
    unsafe fn copy_from(&self, at: usize, source: &dyn Memory, range: Range<usize>) -> Result<()> {
        let source = Self::of(source, &self.gpu)
            .ok_or_else(|| MlxError::expected("copy_from", "memory of this GPU", "another's"))?;
        {
            let _submitting = self.gpu.submitting_own()?;
            // The mirrors are locked one after the other: `self` and `source` may be the same memory. Neither mirror
            // becomes newer than its GPU bytes meanwhile, since no guard is given out during a copy.
            let on_host = |memory: &Self| memory.mirror().newer == Newer::Host;
            if !on_host(source) && !on_host(self) {
                self.gpu.context.enter()?;
                let from = source.at(range.start);
                // SAFETY: the caller promises that both ranges are inside their memory, share no byte
                // and are in no command that still runs. Either memory outlives the copy: freeing what
                // `cuMemAlloc` gave waits for the GPU, and the caller's memory is waited for below.
                unsafe {
                    result::memcpy_dtod_async(self.at(at), from, range.len(), self.gpu.stream.raw())
                }
                .map_err(failed("copying on the GPU"))?;
                self.mirror().newer = Newer::Device;
                source.finish_foreign()?;
                return self.finish_foreign();
            }
        }
        let mut bytes = room(range.len())?;
        bytes.resize(range.len(), 0);
        // SAFETY: promised by the caller.
        unsafe {
            source.download(range.start, &mut bytes)?;
            self.upload(at, &bytes)
        }
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
