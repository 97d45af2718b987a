//! CUDA objects in and out: an engine's own memory and stream, kernels compiled ahead of their first
//! use, and images compiled without a GPU.
//!
//! An engine that already drives the GPU keeps its buffers and its stream:
//! [`MlxDevice::cuda_wrap`] takes device memory without a copy, and
//! [`CommandEncoder::encode_into_stream`] puts what was recorded on the engine's own stream. Both are
//! of the GPU's primary context, the one that the CUDA runtime and its users share.

use std::any::Any;
use std::borrow::Cow;
use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::buffer::{MlxBuffer, PendingWrite};
use super::device::{DeviceHandle, MlxDevice, check_fits};
use super::encoder::CommandEncoder;
use crate::attention::Problem;
use crate::attention::plan::{Plan, PlanOptions};
use crate::backend::cuda::{self, Cuda, CudaMemory, Enqueued, Images, Key, Nvrtc};
use crate::backend::{Backend, DeviceKind};
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// A command on the caller's stream. While it lives, host access to what the command writes, and
/// exclusive access to what it reads, is refused. Dropping it waits for the command.
#[must_use = "dropping it waits for the command"]
pub struct InFlight {
    // Dropped first: it waits.
    enqueued: Enqueued,
    _writes: Vec<PendingWrite>,
}

impl InFlight {
    /// Blocks until the command has run.
    ///
    /// # Errors
    /// `CommandBufferError` where it failed.
    pub fn wait(&self) -> Result<()> {
        self.enqueued.wait()
    }
}

impl fmt::Debug for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InFlight").finish_non_exhaustive()
    }
}

fn backend(handle: &DeviceHandle) -> Result<&Cuda> {
    (&*handle.backend as &dyn Any)
        .downcast_ref()
        .ok_or_else(|| {
            let kind = handle.backend.kind();
            MlxError::expected("device", DeviceKind::Cuda, kind)
        })
}

impl MlxDevice {
    /// The NVIDIA GPU of this number.
    ///
    /// # Errors
    /// `DeviceUnavailable` with the reason: no driver, no such GPU, one too old, no compiler.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Self::from_backend(Arc::new(Cuda::open_ordinal(ordinal)?)))
    }

    /// The NVIDIA GPU of this number, whose kernels are taken from `images` (a file of [`pack_images`],
    /// as `include_bytes!` gives it) where they are there. A machine that has a driver and no NVRTC can
    /// run those.
    ///
    /// # Errors
    /// As for [`Self::cuda`], without the compiler, and `InvalidArgument` for what is no such file.
    /// A dispatch whose kernel is not in it reports that there is no compiler.
    ///
    /// # Safety
    /// [`pack_images`] wrote the bytes: the driver trusts an image's contents.
    pub unsafe fn cuda_with_images(
        ordinal: usize,
        images: impl Into<Cow<'static, [u8]>>,
    ) -> Result<Self> {
        let images = Images::read(images.into())?;
        let cuda = Cuda::open_with(ordinal, Some(images))?;
        Ok(Self::from_backend(Arc::new(cuda)))
    }

    /// Compiles and loads what these problems will run, on all cores, so that their first dispatch
    /// does not wait for the compiler.
    ///
    /// # Errors
    /// `InvalidArgument` where this is no CUDA device or a problem has no kernel, and what building a
    /// kernel reports.
    pub fn cuda_warm_up<'a>(&self, problems: impl IntoIterator<Item = &'a Problem>) -> Result<()> {
        let cuda = backend(self.metal_device())?;
        let plans = problems
            .into_iter()
            .filter(|problem| !problem.has_no_rows() && problem.shape().key_len > 0)
            .map(|problem| {
                let plan = Plan::new(problem, cuda.family(), PlanOptions::default())?;
                Ok((problem, plan.variant.kernel, plan.constants))
            })
            .collect::<Result<Vec<_>>>()?;
        cuda.warm_up(&plans)
    }

    /// The caller's device memory as an operand, without a copy; [`MlxBuffer::slice_view`] gives its
    /// parts.
    ///
    /// # Errors
    /// `InvalidArgument` where this is no CUDA device or `shape` does not fit.
    ///
    /// # Safety
    /// `byte_len` bytes at `device_address` are memory of this GPU while any handle on the result
    /// lives, or until the stream that its last command is on frees them. Commands outside this crate
    /// do not write it while this crate's commands or slices use it, nor use it while this crate's
    /// commands write it, unless the same stream orders them. What is written through one wrapping is
    /// not used through another in one command.
    pub unsafe fn cuda_wrap(
        &self,
        device_address: u64,
        byte_len: usize,
        dtype: DType,
        shape: Vec<usize>,
    ) -> Result<MlxBuffer> {
        let cuda = backend(self.metal_device())?;
        check_fits("byte_len", byte_len, dtype, &shape)?;
        // SAFETY: promised by the caller.
        let memory = unsafe { CudaMemory::wrap(cuda.gpu(), device_address, byte_len) };
        Ok(MlxBuffer::new(
            Arc::new(memory),
            DeviceKind::Cuda,
            dtype,
            shape,
        ))
    }
}

impl CommandEncoder {
    /// Puts what was recorded on the caller's stream (a `CUstream` or `cudaStream_t`; null is the
    /// default stream) instead of committing it; afterwards nothing is recorded. It runs after what
    /// this device's own commands have done, and those that come later run after it. The stream must
    /// not be capturing a graph.
    ///
    /// # Errors
    /// What a commit would report, and `InvalidArgument` where this is no CUDA device. Dispatches
    /// before the one that failed may have run then.
    ///
    /// # Safety
    /// The stream is one of this GPU's primary context, and lives until the result is dropped.
    pub unsafe fn encode_into_stream(&mut self, stream: *mut c_void) -> Result<InFlight> {
        let handle = self.device().clone();
        let cuda = backend(&handle)?;
        let (steps, writes) = self.take_steps();
        // SAFETY: promised by the caller.
        let enqueued = unsafe { cuda.enqueue(steps?, stream)? };
        Ok(InFlight {
            enqueued,
            _writes: writes,
        })
    }
}

/// A kernel's image, compiled without a GPU.
#[derive(Debug, Clone)]
pub struct Image {
    /// Entry point and macros.
    pub name: String,
    /// The image.
    pub cubin: Vec<u8>,
    /// What the compiler said: registers, shared memory, spills, warnings.
    pub log: String,
    key: Key,
}

/// Compiles the kernels for `arch` (such as `sm_80`) whose names `select` takes, on all cores, and
/// never from the disk. `progress` hears how many are done, and of how many, from any thread.
///
/// # Errors
/// `InvalidArgument` for a name that is none, `DeviceUnavailable` where no NVRTC is found,
/// `ShaderCompilationError` where a kernel does not compile.
pub fn compile_images(
    arch: &str,
    select: impl Fn(&str) -> bool,
    progress: impl Fn(usize, usize) + Sync + Send,
) -> Result<Vec<Image>> {
    let gpu = cuda::Capability::of_arch(arch)
        .ok_or_else(|| MlxError::expected("arch", "a name such as `sm_80`", arch))?;
    let nvrtc = Nvrtc::find(None)?;
    let mut specs = cuda::every_spec(gpu);
    specs.retain(|spec| select(&spec.name()));
    let done = AtomicUsize::new(0);
    cuda::in_parallel(&specs, |spec| {
        let compiled = cuda::compile(&nvrtc, spec, arch, false)?;
        progress(done.fetch_add(1, Ordering::Relaxed) + 1, specs.len());
        Ok(Image {
            name: spec.name(),
            cubin: compiled.cubin,
            log: compiled.log.unwrap_or_default(),
            key: cuda::key(spec, arch),
        })
    })
}

/// Images in one file, which [`MlxDevice::cuda_with_images`] and the variable `MLX_FLASH_CUDA_IMAGES`
/// take. They are of this version of the crate: another one's kernels are not found in it.
pub fn pack_images<'a>(images: impl IntoIterator<Item = &'a Image>) -> Vec<u8> {
    Images::write(images.into_iter().map(|image| (image.key, &*image.cubin)))
}
