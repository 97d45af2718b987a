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

use super::buffer::MlxBuffer;
use super::device::{DeviceHandle, MlxDevice, check_fits};
use super::encoder::CommandEncoder;
use super::submit::params_are_written;
use super::uses::Hold;
use crate::attention::Problem;
use crate::backend::DeviceKind;
use crate::backend::cuda::{
    self, Cuda, CudaKernels, CudaMemory, CudaOptions, Enqueued, Images, Key, Nvrtc, Spec,
};
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// A command on the caller's stream. While it lives, host access to what the command writes, and
/// exclusive access to what it reads, is refused. Dropping it waits for the command.
#[must_use = "dropping it waits for the command"]
pub struct InFlight {
    // Dropped first: it waits.
    enqueued: Enqueued,
    _holds: Vec<Hold>,
}

impl InFlight {
    /// Blocks until the command has run.
    ///
    /// # Errors
    /// `CommandBufferError` where it failed.
    pub fn wait(&self) -> Result<()> {
        self.enqueued.wait()
    }

    /// Whether the command has run; never blocks. What it touches is held until this is dropped.
    pub fn is_done(&self) -> bool {
        self.enqueued.is_done()
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
    /// The NVIDIA GPU of this number. Its kernels are compiled here, or taken from the images that
    /// [`trust_images`] was given.
    ///
    /// # Errors
    /// `DeviceUnavailable` with the reason: no driver, no such GPU, one too old, no compiler.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        let kernels = CudaKernels::Own;
        Self::cuda_with(CudaOptions { ordinal, kernels })
    }

    /// The same with other options.
    ///
    /// # Errors
    /// As for [`Self::cuda`], and `DeviceUnavailable` where the GPU cannot run the kernels that are asked for.
    pub fn cuda_with(options: CudaOptions) -> Result<Self> {
        Ok(Self::from_backend(Arc::new(Cuda::open(options)?)))
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
        let kernels = CudaKernels::Own;
        let cuda = Cuda::open_with(CudaOptions { ordinal, kernels }, Some(Arc::new(images)))?;
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
        let problems: Vec<&Problem> = problems
            .into_iter()
            .filter(|problem| !problem.has_no_rows() && problem.shape().key_len > 0)
            .collect();
        cuda.warm_up(&problems)
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
        Ok(MlxBuffer::of_caller(
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
        let (enqueued, holds) = self.submit_with(
            |_| Err(params_are_written("encode_into_stream")),
            // SAFETY: promised by the caller.
            |steps| unsafe { cuda.enqueue(steps, stream) },
        );
        Ok(InFlight {
            enqueued: enqueued?,
            _holds: holds,
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

/// A kernel that can be compiled without a GPU.
#[derive(Debug, Clone)]
pub struct ImageSource {
    spec: Spec,
    arch: String,
}

impl ImageSource {
    /// Every kernel that a GPU of `arch` (such as `sm_80`) may be asked to run.
    ///
    /// # Errors
    /// `InvalidArgument` for a name that is no architecture.
    pub fn all(arch: &str) -> Result<Vec<Self>> {
        let gpu = cuda::Capability::of_arch(arch)
            .ok_or_else(|| MlxError::expected("arch", "a name such as `sm_80`", arch))?;
        let source = |spec| Self {
            spec,
            arch: arch.into(),
        };
        Ok(cuda::every_spec(gpu).into_iter().map(source).collect())
    }

    /// Entry point and macros.
    pub fn name(&self) -> String {
        self.spec.name()
    }

    /// The architecture that it is compiled for.
    pub fn arch(&self) -> &str {
        &self.arch
    }

    /// Whether it fills all registers by design, and spills a few rather than have smaller tiles.
    pub fn may_spill(&self) -> bool {
        self.spec.may_spill()
    }

    /// A hash of the text alone: kernels that differ by their macros share it.
    pub fn text(&self) -> String {
        cuda::text_id(&self.spec)
    }

    /// A hash of the text and the compiler's options. One compiler makes one image of it.
    pub fn fingerprint(&self) -> String {
        cuda::fingerprint(&self.spec, &self.arch)
    }
}

/// NVRTC, for images that no GPU of this machine will run.
pub struct Compiler(Nvrtc);

impl fmt::Debug for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Compiler").field(&self.version()).finish()
    }
}

impl Compiler {
    /// The one that `MLX_FLASH_NVRTC` names, else the first that is found.
    ///
    /// # Errors
    /// `DeviceUnavailable` where there is none.
    pub fn find() -> Result<Self> {
        Nvrtc::find(None).map(Self)
    }

    /// Major and minor version.
    pub fn version(&self) -> (u32, u32) {
        self.0.version()
    }

    /// Compiles a kernel; never taken from the disk.
    ///
    /// # Errors
    /// `ShaderCompilationError` with what the compiler said.
    pub fn compile(&self, source: &ImageSource) -> Result<Image> {
        let ImageSource { spec, arch } = source;
        let compiled = cuda::compile(&self.0, spec, arch, false)?;
        Ok(Image {
            name: spec.name(),
            cubin: compiled.cubin,
            log: compiled.log.unwrap_or_default(),
            key: cuda::key(spec, arch),
        })
    }
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
    let mut sources = ImageSource::all(arch)?;
    let compiler = Compiler::find()?;
    sources.retain(|source| select(&source.name()));
    let done = AtomicUsize::new(0);
    cuda::in_parallel(&sources, |source| {
        let image = compiler.compile(source)?;
        progress(done.fetch_add(1, Ordering::Relaxed) + 1, sources.len());
        Ok(image)
    })
}

/// Gives every CUDA device that this process opens from now on the images of a file of
/// [`pack_images`], for programs that open their devices elsewhere. [`MlxDevice::cuda_with_images`]
/// gives them to one device.
///
/// No safe function loads images that were compiled elsewhere, and the library reads no variable that
/// names them.
///
/// # Errors
/// `InvalidArgument` for what is no such file.
///
/// # Safety
/// [`pack_images`] wrote the bytes: the driver trusts an image's contents.
pub unsafe fn trust_images(images: impl Into<Cow<'static, [u8]>>) -> Result<()> {
    let images = Images::read(images.into())?;
    // SAFETY: promised by the caller.
    unsafe { cuda::trust(images) };
    Ok(())
}

/// Images in one file, which [`MlxDevice::cuda_with_images`] and [`trust_images`] take. They are of this version of the crate: another one's kernels are not found in it.
pub fn pack_images<'a>(images: impl IntoIterator<Item = &'a Image>) -> Vec<u8> {
    Images::write(images.into_iter().map(|image| (image.key, &*image.cubin)))
}
