//! The device: opened, described, asked for memory, kernels and work.

use std::any::Any;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use super::compile::in_parallel;
use super::driver::Stream;
use super::gpu::Gpu;
use super::images::{self, Images};
use super::memory::CudaMemory;
use super::options::CudaOptions;
use super::prepared::{Attention, Prefill, Prepared};
use super::submit::{self, Enqueued};
use super::table::Needs;
use crate::attention::Problem;
use crate::backend::abilities::Abilities;
use crate::backend::command::{Planned, Work};
use crate::backend::{Backend, DeviceKind, Kernel, Memory, Pending, Step};
use crate::error::{Result, Unsupported};

/// One NVIDIA GPU.
pub(crate) struct Cuda {
    gpu: Arc<Gpu>,
    /// The attention kernels by what a problem needs of them.
    attentions: Mutex<HashMap<Needs, Arc<Attention>>>,
}

impl Cuda {
    /// Opens a GPU, with the images that the program trusts, if there are any.
    pub(crate) fn open(options: CudaOptions) -> Result<Self> {
        Self::open_with(options, images::trusted())
    }

    /// Opens a GPU, with images compiled ahead.
    pub(crate) fn open_with(options: CudaOptions, images: Option<Arc<Images>>) -> Result<Self> {
        let gpu = Gpu::open(options, images)?;
        // With images, a compiler is needed where one is missing, and looked for then.
        if gpu.modules.images.is_none() {
            gpu.modules.nvrtc(&gpu.context)?;
        }
        Ok(Self {
            gpu: Arc::new(gpu),
            attentions: Mutex::default(),
        })
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Compiles and loads, side by side, what these problems run.
    pub(crate) fn warm_up(&self, problems: &[&Problem]) -> Result<()> {
        in_parallel(problems, |problem| {
            self.supports(problem)?;
            Prefill::new(self.attention(problem)?).warm_up(&self.gpu, problem)
        })
        .map(|_| ())
    }

    fn attention(&self, problem: &Problem) -> std::result::Result<Arc<Attention>, Unsupported> {
        let needs = Needs::of(problem);
        let mut attentions = self
            .attentions
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(attention) = attentions.get(&needs) {
            return Ok(Arc::clone(attention));
        }
        // Its kernels are compiled when they are first launched.
        let attention = Arc::new(Attention::new(needs, &self.gpu)?);
        attentions.insert(needs, Arc::clone(&attention));
        Ok(attention)
    }

    /// Puts steps on the caller's stream.
    ///
    /// # Safety
    /// The stream is one of this GPU's primary context, and lives until the result is dropped.
    pub(crate) unsafe fn enqueue(&self, steps: Vec<Step>, stream: *mut c_void) -> Result<Enqueued> {
        // SAFETY: promised by the caller.
        submit::enqueue(&self.gpu, steps, &unsafe { Stream::of_caller(stream) })
    }
}

/// What the table's rows may say beside Q's own element type.
const ABILITIES: Abilities = Abilities {
    kv_dtype: true,
    pages: true,
    queries_packed_alone: true,
    host_lengths: true,
    device_lengths: true,
    ..Abilities::ALIKE
};

impl Backend for Cuda {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Cuda
    }

    fn name(&self) -> String {
        self.gpu.context.name.clone()
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        let c = &self.gpu.context;
        let images = self.gpu.modules.images.as_ref();
        let compiler = match self.gpu.modules.nvrtc(c) {
            Ok(nvrtc) => {
                let (major, minor) = nvrtc.version();
                format!("NVRTC {major}.{minor} ({})", nvrtc.path().display())
            }
            Err(error) => error.to_string(),
        };
        vec![
            (
                "compute capability",
                format!("{}.{}", c.capability.0, c.capability.1),
            ),
            (
                "kernels for compute capability",
                format!("{}.{}", self.gpu.rows.0, self.gpu.rows.1),
            ),
            ("multiprocessors", c.processors.to_string()),
            ("memory", format!("{} bytes", c.memory_bytes)),
            ("second-level cache", format!("{} bytes", c.l2_bytes)),
            (
                "shared memory of a threadblock",
                format!("{} bytes", c.shared_bytes),
            ),
            ("driver", format!("CUDA {}.{}", c.driver.0, c.driver.1)),
            ("compiler", compiler),
            (
                "kernels compiled ahead",
                images.map_or(0, |images| images.len()).to_string(),
            ),
        ]
    }

    fn allocate(&self, bytes: usize) -> Result<Arc<dyn Memory>> {
        Ok(Arc::new(CudaMemory::zeroed(&self.gpu, bytes)?))
    }

    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported> {
        ABILITIES.check(self.kind(), problem)?;
        self.attention(problem).map(|_| ())
    }

    fn prepare(&self, work: &Work) -> Result<Box<dyn Any + Send + Sync>> {
        let prepared = Prepared::new(&self.gpu, work, |problem| self.attention(problem))?;
        Ok(Box::new(prepared))
    }

    fn prepare_again(&self, work: &Work, before: &Planned) -> Result<Box<dyn Any + Send + Sync>> {
        let kernels = before.state.downcast_ref().and_then(Prepared::kernels);
        let prepared = Prepared::new(&self.gpu, work, |problem| match kernels {
            Some(kernels) => Ok(Arc::clone(kernels)),
            None => self.attention(problem),
        })?;
        Ok(Box::new(prepared))
    }

    fn named_kernel(&self) -> Box<dyn Any + Send + Sync> {
        Box::new(Arc::clone(&self.gpu))
    }

    fn owns_memory(&self, memory: &dyn Memory) -> bool {
        CudaMemory::of(memory, &self.gpu).is_some()
    }

    fn owns_kernel(&self, kernel: &Kernel) -> bool {
        let gpu = kernel.state.downcast_ref::<Arc<Gpu>>();
        gpu.is_some_and(|gpu| Arc::ptr_eq(gpu, &self.gpu))
    }

    fn submit(&self, steps: Vec<Step>) -> Arc<dyn Pending> {
        submit::submit(&self.gpu, steps)
    }
}
