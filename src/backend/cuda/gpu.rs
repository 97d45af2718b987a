//! The device: opened, described, asked for memory, kernels and work.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::built::{Pipeline, built};
use super::compile::in_parallel;
use super::driver::{Context, Event, Stream, unavailable};
use super::fit::Machine;
use super::images::{self, Images};
use super::memory::CudaMemory;
use super::modules::{Function, Modules};
use super::scratch::Pool;
use super::spec::Spec;
use super::submit::{self, Enqueued};
use crate::attention::Problem;
use crate::attention::bindings::Constants;
use crate::attention::variant::{self, Family};
use crate::backend::{Backend, DeviceKind, Kernel, Limits, Memory, Pending, Step};
use crate::error::Result;

/// The variable that names the GPU, a number from 0.
const VARIABLE: &str = "MLX_FLASH_CUDA_DEVICE";

/// What everything of one GPU shares.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub(super) modules: Modules,
    pub(super) pool: Pool,
    /// Events to use again.
    events: Mutex<Vec<Event>>,
    /// Held while a command is put on a stream and that stream is ordered with [`Self::stream`], so
    /// that commands follow each other whole, and what a command uploads on a caller's stream counts
    /// as uploaded only where others wait for it.
    submitting: Mutex<()>,
    /// When the clock that timings are read from began.
    pub(super) epoch: Event,
    pub(super) stream: Stream,
    pub(super) context: Arc<Context>,
}

impl Gpu {
    pub(super) fn event(&self) -> Result<Event> {
        let kept = self
            .events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        kept.map_or_else(|| Event::create(&self.context), Ok)
    }

    pub(super) fn give_back(&self, event: Event) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.len() < 64 {
            events.push(event);
        }
    }

    /// The right to put a command on a stream of this GPU.
    pub(super) fn submitting(&self) -> MutexGuard<'_, ()> {
        self.submitting
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn machine(&self) -> Machine {
        Machine {
            processors: self.context.processors as usize,
            l2_bytes: self.context.l2_bytes,
        }
    }

    pub(super) fn function(&self, spec: &Spec) -> Result<Arc<Function>> {
        self.modules.get(&self.context, spec)
    }
}

/// One NVIDIA GPU.
pub(crate) struct Cuda(Arc<Gpu>);

impl Cuda {
    /// The GPU that the environment names, else the first.
    pub(crate) fn open() -> Result<Self> {
        match std::env::var(VARIABLE) {
            Ok(n) if !n.is_empty() => match n.parse() {
                Ok(ordinal) => Self::open_ordinal(ordinal),
                Err(_) => Err(unavailable(format!(
                    "{VARIABLE}: expected the number of a GPU, got {n}"
                ))),
            },
            _ => Self::open_ordinal(0),
        }
    }

    /// A GPU by its number, with the images that the program trusts, if there are any.
    pub(crate) fn open_ordinal(ordinal: usize) -> Result<Self> {
        Self::open_with(ordinal, images::trusted())
    }

    /// A GPU by its number, with images compiled ahead.
    pub(crate) fn open_with(ordinal: usize, images: Option<Arc<Images>>) -> Result<Self> {
        let context = Context::open(ordinal)?;
        let stream = Stream::create(&context)?;
        let epoch = Event::create(&context)?;
        epoch.record(&stream)?;
        let gpu = Gpu {
            modules: Modules::new(images),
            pool: Pool::default(),
            events: Mutex::default(),
            submitting: Mutex::default(),
            epoch,
            stream,
            context,
        };
        // With images, a compiler is needed where one is missing, and looked for then.
        if gpu.modules.images.is_none() {
            gpu.modules.nvrtc(&gpu.context)?;
        }
        Ok(Self(Arc::new(gpu)))
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.0
    }

    /// Compiles and loads, side by side, what these problems run, each with its kernel's name and
    /// constants.
    pub(crate) fn warm_up(&self, plans: &[(&Problem, &str, Constants)]) -> Result<()> {
        in_parallel(plans, |(problem, kernel, constants)| {
            built(&self.0, kernel, constants)?.warm_up(&self.0, problem)
        })
        .map(|_| ())
    }

    /// Puts steps on the caller's stream.
    ///
    /// # Safety
    /// The stream is one of this GPU's primary context, and lives until the result is dropped.
    pub(crate) unsafe fn enqueue(&self, steps: Vec<Step>, stream: *mut c_void) -> Result<Enqueued> {
        // SAFETY: promised by the caller.
        submit::enqueue(&self.0, steps, &unsafe { Stream::of_caller(stream) })
    }
}

impl Backend for Cuda {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Cuda
    }

    fn family(&self) -> Family {
        Family::Nvidia
    }

    fn name(&self) -> String {
        self.0.context.name.clone()
    }

    fn details(&self) -> Vec<(&'static str, String)> {
        let c = &self.0.context;
        let images = self.0.modules.images.as_ref();
        let compiler = match self.0.modules.nvrtc(c) {
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
        Ok(Arc::new(CudaMemory::zeroed(&self.0, bytes)?))
    }

    fn build(&self, kernel: &str, _source: &str, constants: &Constants) -> Result<Kernel> {
        let built = Pipeline {
            gpu: Arc::clone(&self.0),
            built: built(&self.0, kernel, constants)?,
        };
        let threads = variant::by_name(kernel).map_or(1024, |v| v.threads() as u64);
        let limits = Limits {
            thread_execution_width: 32,
            max_threads: threads.max(32),
            static_threadgroup_bytes: 0,
        };
        Ok(Kernel::new(kernel, constants, limits, built))
    }

    fn owns_memory(&self, memory: &dyn Memory) -> bool {
        CudaMemory::of(memory, &self.0).is_some()
    }

    fn owns_kernel(&self, kernel: &Kernel) -> bool {
        Pipeline::of(kernel, &self.0).is_some()
    }

    fn submit(&self, steps: Vec<Step>) -> Arc<dyn Pending> {
        submit::submit(&self.0, steps)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // What is still on the stream may use what is freed next.
        if self.context.enter().is_ok() {
            let _: Result<()> = self.stream.synchronize();
        }
    }
}
