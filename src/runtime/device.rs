//! Devices: found, opened by name, and asked for buffers and encoders.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::Pod;

use super::buffer::MlxBuffer;
use crate::attention::Problem;
use crate::backend::command::{Hint, Planned, Work};
use crate::backend::cpu::{Cpu, CpuOptions};
use crate::backend::devices::{self, BY_DEFAULT};
#[cfg(feature = "emulator")]
use crate::backend::emulator::{Emulator, EmulatorOptions};
use crate::backend::{Backend, DeviceKind};
use crate::dtype::DType;
use crate::error::{MlxError, Result, Unsupported};

/// An opaque reference to a device, for [`KernelRegistry`](crate::KernelRegistry).
#[derive(Clone)]
pub struct DeviceHandle {
    pub(crate) backend: Arc<dyn Backend>,
    /// Tells devices apart in pipeline caches.
    pub(crate) id: u64,
    /// The last few attentions that were planned, the latest first: those that follow are mostly among
    /// them.
    planned: Arc<Mutex<VecDeque<Arc<Planned>>>>,
}

/// Most attentions that are remembered: the kinds of layer of a few models.
const REMEMBERED: usize = 16;

impl DeviceHandle {
    /// Has the device prepare some work, or gives what it prepared for the same attention before.
    pub(crate) fn plan(&self, work: Work) -> Result<Arc<Planned>> {
        match &work {
            Work::Attention(problem, hint) => self.plan_attention(problem, *hint),
            _ => self.prepare(work, None),
        }
    }

    fn prepare(&self, work: Work, before: Option<&Planned>) -> Result<Arc<Planned>> {
        if let Work::Attention(problem, _) = &work {
            self.backend.supports(problem)?;
        }
        let state = match before {
            Some(before) => self.backend.prepare_again(&work, before)?,
            None => self.backend.prepare(&work)?,
        };
        Ok(Arc::new(Planned {
            device: self.id,
            work,
            state,
        }))
    }

    /// Prepares work that differs in lengths alone from what this device prepared before.
    pub(crate) fn plan_again(&self, before: &Planned, work: Work) -> Result<Arc<Planned>> {
        self.prepare(work, Some(before))
    }

    /// As [`Self::plan`] for attention; the problem is copied where it is new.
    pub(crate) fn plan_attention(&self, problem: &Problem, hint: Hint) -> Result<Arc<Planned>> {
        let remembered = || self.planned.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |planned: &&Arc<Planned>| match &planned.work {
            Work::Attention(p, h) => *h == hint && **p == *problem,
            _ => false,
        };
        if let Some(found) = remembered().iter().find(same) {
            return Ok(Arc::clone(found));
        }
        // The lock is not held meanwhile: the device may compile a kernel.
        let planned = self.prepare(Work::Attention(Arc::new(problem.clone()), hint), None)?;
        let mut remembered = remembered();
        remembered.truncate(REMEMBERED - 1);
        remembered.push_front(Arc::clone(&planned));
        Ok(planned)
    }
}

impl fmt::Debug for DeviceHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceHandle({} #{})", self.backend.kind(), self.id)
    }
}

/// A device that runs this crate's kernels. Clones share it.
#[derive(Debug, Clone)]
pub struct MlxDevice(DeviceHandle);

impl MlxDevice {
    /// The device that `MLX_FLASH_DEVICE` names, else the best of this machine: Metal, CUDA, CPU.
    ///
    /// # Errors
    /// `InvalidArgument` where the variable names no kind of device, `DeviceUnavailable` where the one that it names
    /// does not open, `DeviceNotFound` where none does.
    pub fn new() -> Result<Self> {
        match std::env::var("MLX_FLASH_DEVICE") {
            Ok(name) if !name.is_empty() && name != "auto" => match DeviceKind::by_name(&name) {
                Some(kind) => Self::open(kind),
                None => Err(MlxError::expected(
                    "MLX_FLASH_DEVICE",
                    format!(
                        "auto or one of {}",
                        DeviceKind::ALL.map(DeviceKind::name).join(", ")
                    ),
                    name,
                )),
            },
            _ => BY_DEFAULT
                .into_iter()
                .find_map(|kind| Self::open(kind).ok())
                .ok_or(MlxError::DeviceNotFound),
        }
    }

    /// Opens a device by kind; the CPU as `MLX_FLASH_CPU_ISA` and `MLX_FLASH_THREADS` say.
    ///
    /// # Errors
    /// `DeviceUnavailable` with the reason where this build or this machine has no such device, `InvalidArgument`
    /// where one of the variables makes no sense.
    pub fn open(kind: DeviceKind) -> Result<Self> {
        devices::open(kind).map(Self::from_backend)
    }

    /// Opens the CPU with given options.
    ///
    /// # Errors
    /// `DeviceUnavailable` where the processor lacks the instruction set, or the threads cannot be started.
    pub fn cpu(options: CpuOptions) -> Result<Self> {
        Ok(Self::from_backend(Arc::new(Cpu::open(options)?)))
    }

    /// Opens the emulator with given options.
    ///
    /// # Errors
    /// `DeviceUnavailable` where there is no clang++ that compiles the kernels.
    #[cfg(feature = "emulator")]
    pub fn emulator(options: EmulatorOptions) -> Result<Self> {
        Ok(Self::from_backend(Arc::new(Emulator::open(options)?)))
    }

    /// What the emulator counted since this was last asked; `None` on other devices.
    #[cfg(feature = "emulator")]
    pub fn take_emulator_counters(&self) -> Option<msl_emulator::Counters> {
        let backend: &dyn std::any::Any = &*self.0.backend;
        backend
            .downcast_ref::<Emulator>()
            .map(Emulator::take_counters)
    }

    pub(crate) fn from_backend(backend: Arc<dyn Backend>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(DeviceHandle {
            backend,
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            planned: Arc::default(),
        })
    }

    pub(crate) fn from_handle(handle: DeviceHandle) -> Self {
        Self(handle)
    }

    /// Whether the device can do what a problem asks.
    ///
    /// # Errors
    /// What it cannot do and why: what [`MlxError::Unsupported`] of a call would hold.
    pub fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported> {
        self.0.backend.supports(problem)
    }

    /// What kind of device this is.
    pub fn kind(&self) -> DeviceKind {
        self.0.backend.kind()
    }

    /// Name for people.
    pub fn name(&self) -> String {
        self.0.backend.name()
    }

    /// What the device can do, as (what, value) pairs for people.
    pub fn details(&self) -> Vec<(&'static str, String)> {
        self.0.backend.details()
    }

    /// Floating-point operations a second that the device's multiply-add units reach at best in
    /// `dtype`, measured now (a fraction of a second); `None` where that is not measured.
    pub fn measured_peak(&self, dtype: DType) -> Option<f64> {
        self.0.backend.measured_peak(dtype)
    }

    /// A reference that [`KernelRegistry`](crate::KernelRegistry) takes; callers only pass it on.
    pub fn metal_device(&self) -> &DeviceHandle {
        &self.0
    }

    /// A zeroed buffer of `byte_len` bytes, which must hold `shape`.
    ///
    /// # Errors
    /// `InvalidArgument` for 0 bytes and for a shape that needs more than `byte_len`, `BufferAllocationError` where
    /// the device has no room.
    pub fn alloc_buffer(
        &self,
        byte_len: usize,
        dtype: DType,
        shape: Vec<usize>,
    ) -> Result<MlxBuffer> {
        if byte_len == 0 {
            return Err(MlxError::expected("byte_len", "at least 1 byte", 0));
        }
        check_fits("byte_len", byte_len, dtype, &shape)?;
        let memory = self.0.backend.allocate(byte_len)?;
        Ok(MlxBuffer::new(memory, self.kind(), dtype, shape))
    }

    /// A buffer that holds a copy of `data`, whose element size must be `dtype`'s. Without data and with
    /// a shape of no elements it is a view of no bytes, for operands of empty work.
    ///
    /// # Errors
    /// `InvalidArgument` where the element sizes differ, and as for [`Self::alloc_buffer`].
    pub fn buffer_from_slice<T: Pod>(
        &self,
        data: &[T],
        dtype: DType,
        shape: Vec<usize>,
    ) -> Result<MlxBuffer> {
        if size_of::<T>() != dtype.size_of() {
            return Err(MlxError::expected(
                "data",
                format!("{}-byte elements of {dtype}", dtype.size_of()),
                format!("{}-byte elements", size_of::<T>()),
            ));
        }
        if data.is_empty() && shape.contains(&0) {
            return Ok(self.alloc_buffer(dtype.size_of(), dtype, shape)?.emptied());
        }
        let mut buffer = self.alloc_buffer(size_of_val(data), dtype, shape)?;
        buffer.as_mut_slice::<T>()?.copy_from_slice(data);
        Ok(buffer)
    }
}

/// Refuses a shape that needs more than `byte_len` bytes.
pub(crate) fn check_fits(what: &str, byte_len: usize, dtype: DType, shape: &[usize]) -> Result<()> {
    let needed = shape
        .iter()
        .try_fold(dtype.size_of(), |bytes, size| bytes.checked_mul(*size));
    match needed {
        Some(bytes) if bytes <= byte_len => Ok(()),
        _ => Err(MlxError::expected(
            what,
            format!("room for {shape:?} elements of {dtype}"),
            format!("{byte_len} bytes"),
        )),
    }
}
