//! The driver: a context, its stream, events and device memory, with errors of this crate.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys;
use cudarc::driver::{DriverError, result};

use super::table::Capability;
use crate::error::{self, MlxError, Result};

/// The first driver whose functions are used here, as the driver counts versions.
const OLDEST_DRIVER: i32 = 12_000;

pub(super) fn unavailable(reason: impl Into<String>) -> MlxError {
    MlxError::DeviceUnavailable {
        device: "cuda".into(),
        reason: reason.into(),
    }
}

/// What the driver has to say of an error.
fn reported(error: DriverError) -> error::DriverError {
    let part = |text: std::result::Result<&std::ffi::CStr, DriverError>| {
        text.map_or_else(|_| "?".into(), |t| t.to_string_lossy().into_owned())
    };
    error::DriverError {
        code: error.0 as i64,
        name: part(error.error_name()),
        message: part(error.error_string()),
    }
}

/// Names what failed.
pub(super) fn failed(what: &str) -> impl Fn(DriverError) -> MlxError + '_ {
    move |error| reported(error).while_doing(format!("CUDA: {what}"))
}

/// A GPU's primary context, which is the one that other libraries of this process use too.
#[derive(Debug)]
pub(super) struct Context {
    raw: sys::CUcontext,
    device: sys::CUdevice,
    /// CUDA version of the driver: 12, 4 for 12.4.
    pub(super) driver: (u32, u32),
    pub(super) capability: Capability,
    pub(super) name: String,
    pub(super) processors: u32,
    pub(super) l2_bytes: usize,
    pub(super) shared_bytes: usize,
    pub(super) memory_bytes: usize,
}

// SAFETY: a context may be current on any number of threads at once.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks what it must.
unsafe impl Sync for Context {}

/// Whether this machine has NVIDIA's driver. cudarc cannot be asked: its answer is there only where
/// it loads the driver itself, and not where another crate of the program has it linked.
fn driver_is_there() -> bool {
    ["libcuda.so.1", "libcuda.so", "nvcuda.dll"]
        .into_iter()
        // SAFETY: loads NVIDIA's driver library by its name, and nothing else.
        .any(|name| unsafe { libloading::Library::new(name) }.is_ok())
}

impl Context {
    /// The GPU of this number.
    pub(super) fn open(ordinal: usize) -> Result<Arc<Self>> {
        if !driver_is_there() {
            return Err(unavailable(
                "there is no NVIDIA driver (libcuda) on this machine",
            ));
        }
        let refused = |what: &'static str| {
            move |error: DriverError| unavailable(format!("{what}: {}", reported(error)))
        };
        let mut version = 0;
        // SAFETY: `version` is an integer; the function needs no initialised driver.
        unsafe { sys::cuDriverGetVersion(&mut version) }
            .result()
            .map_err(refused("the driver's version"))?;
        if version < OLDEST_DRIVER {
            return Err(unavailable(format!(
                "the driver is for CUDA {}.{}; 12.0 or later is needed",
                version / 1000,
                version % 1000 / 10
            )));
        }
        result::init().map_err(refused("the driver does not start"))?;
        let count = result::device::get_count().map_err(refused("the count of GPUs"))?;
        let ordinal = i32::try_from(ordinal)
            .ok()
            .filter(|n| *n < count)
            .ok_or_else(|| unavailable(format!("there are {count} GPUs, got number {ordinal}")))?;
        let device = result::device::get(ordinal).map_err(refused("the GPU"))?;
        let attribute = |attribute| {
            // SAFETY: the device came from the driver.
            unsafe { result::device::get_attribute(device, attribute) }
                .map(i32::unsigned_abs)
                .map_err(refused("an attribute of the GPU"))
        };
        use sys::CUdevice_attribute as A;
        let capability = Capability(
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let name = result::device::get_name(device).map_err(refused("the GPU's name"))?;
        if capability < Capability::OLDEST {
            return Err(unavailable(format!(
                "{name} has compute capability {}.{}; 8.0 or later is needed",
                capability.0, capability.1
            )));
        }
        let processors = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let l2_bytes = attribute(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize;
        let shared_bytes =
            attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        // SAFETY: the device came from the driver; released when dropped.
        let raw = unsafe { result::primary_ctx::retain(device) }.map_err(refused("its context"))?;
        // SAFETY: as above.
        let memory_bytes = unsafe { result::device::total_mem(device) }.unwrap_or(0);
        let version = version.unsigned_abs();
        Ok(Arc::new(Self {
            raw,
            device,
            driver: (version / 1000, version % 1000 / 10),
            capability,
            name,
            processors,
            l2_bytes,
            shared_bytes,
            memory_bytes,
        }))
    }

    /// Makes it this thread's context; every call below needs that.
    pub(super) fn enter(&self) -> Result<()> {
        // SAFETY: retained for as long as this value lives.
        unsafe { result::ctx::set_current(self.raw) }.map_err(failed("entering the context"))
    }

    /// Device memory, not initialised.
    pub(super) fn allocate(&self, bytes: usize) -> Result<sys::CUdeviceptr> {
        self.enter()?;
        // SAFETY: plain memory of at least a byte; whoever gets it frees it.
        unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => MlxError::BufferAllocationError { bytes },
            _ => failed("allocating memory")(error),
        })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once, released once.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// A stream: ours, destroyed when dropped, or the caller's.
#[derive(Debug)]
pub(crate) struct Stream {
    raw: sys::CUstream,
    owner: Option<Arc<Context>>,
}

// SAFETY: streams may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above; the driver locks what it must.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn create(context: &Arc<Context>) -> Result<Self> {
        context.enter()?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("making a stream"))?;
        Ok(Self {
            raw,
            owner: Some(Arc::clone(context)),
        })
    }

    /// A stream of the caller's, null being the default stream.
    ///
    /// # Safety
    /// It is a stream of the same GPU's primary context, for as long as this value is used.
    pub(crate) unsafe fn of_caller(raw: *mut c_void) -> Self {
        Self {
            raw: raw.cast(),
            owner: None,
        }
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(self.raw) }.map_err(failed("waiting for a stream"))
    }

    /// A number that no other stream has or had.
    pub(super) fn id(&self) -> Result<u64> {
        let mut id = 0;
        // SAFETY: the stream lives, and the driver writes one number.
        unsafe { sys::cuStreamGetId(self.raw, &raw mut id) }
            .result()
            .map_err(failed("asking for a stream's id"))?;
        Ok(id)
    }

    /// Makes what follows on this stream wait for the event.
    pub(super) fn wait(&self, event: &Event) -> Result<()> {
        use sys::CUevent_wait_flags_enum::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both live.
        unsafe { result::stream::wait_event(self.raw, event.raw, CU_EVENT_WAIT_DEFAULT) }
            .map_err(failed("ordering two streams"))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(context) = &self.owner
            && context.enter().is_ok()
        {
            // SAFETY: made by `create`, destroyed once; the driver finishes its work first.
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}

/// A point on a stream.
#[derive(Debug)]
pub(super) struct Event {
    raw: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above; the driver locks what it must.
unsafe impl Sync for Event {}

impl Event {
    /// One that knows when it happened.
    pub(super) fn create(context: &Arc<Context>) -> Result<Self> {
        Self::with(context, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    /// One that streams and the host wait for: the GPU notes no time.
    pub(super) fn without_time(context: &Arc<Context>) -> Result<Self> {
        Self::with(context, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    fn with(context: &Arc<Context>, flags: sys::CUevent_flags) -> Result<Self> {
        context.enter()?;
        let raw = result::event::create(flags).map_err(failed("making an event"))?;
        Ok(Self {
            raw,
            context: Arc::clone(context),
        })
    }

    pub(super) fn record(&self, stream: &Stream) -> Result<()> {
        // SAFETY: both live.
        unsafe { result::event::record(self.raw, stream.raw) }.map_err(failed("recording an event"))
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        self.context.enter()?;
        // SAFETY: it lives.
        unsafe { result::event::synchronize(self.raw) }.map_err(failed("the command"))
    }

    /// Whether what was on the stream before it has run, or has failed, which [`Self::synchronize`] then
    /// reports at once.
    pub(super) fn has_happened(&self) -> bool {
        // SAFETY: it lives.
        let asked = self
            .context
            .enter()
            .map(|()| unsafe { result::event::query(self.raw) });
        !matches!(asked, Ok(Err(error)) if error.0 == sys::CUresult::CUDA_ERROR_NOT_READY)
    }

    /// Seconds from this event to a later one; both have happened.
    pub(super) fn seconds_to(&self, later: &Event) -> Result<f64> {
        // SAFETY: both live.
        unsafe { result::event::elapsed(self.raw, later.raw) }
            .map(|ms| f64::from(ms) * 1e-3)
            .map_err(failed("reading the GPU's clock"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made by `create`, destroyed once.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}
