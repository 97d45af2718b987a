//! What a device does for the runtime: hold memory, build kernels, run dispatches. Each backend
//! knows only this seam and the pure attention core.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use self::command::{Span, Task, Work};
use self::metal::bindings::{self, Accesses, Constants};
use crate::attention::Problem;
use crate::backend::access::Access;
use crate::dtype::DType;
use crate::error::{MlxError, Result, Unsupported};

pub(crate) mod abilities;
pub(crate) mod access;
pub(crate) mod command;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "emulator")]
pub(crate) mod emulator;
pub(crate) mod gpu_struct;
pub(crate) mod host_memory;
pub(crate) mod metal;
pub(crate) mod score;
pub(crate) mod shared_params;

/// Kinds of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum DeviceKind {
    /// This machine's processors.
    Cpu,
    /// An Apple GPU.
    Metal,
    /// An NVIDIA GPU.
    Cuda,
    /// The Metal kernels, run on this machine's processors.
    Emulator,
}

impl DeviceKind {
    /// Every kind.
    pub const ALL: [DeviceKind; 4] = [Self::Cpu, Self::Metal, Self::Cuda, Self::Emulator];

    /// Name as `MLX_FLASH_DEVICE` takes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Metal => "metal",
            Self::Cuda => "cuda",
            Self::Emulator => "emulator",
        }
    }

    /// Finds a kind by name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

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

/// What a built kernel allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) thread_execution_width: u64,
    pub(crate) max_threads: u64,
    pub(crate) static_threadgroup_bytes: u64,
}

/// A kernel with its constants, built for one device.
// Devices that run texts read it.
#[cfg_attr(
    not(any(feature = "emulator", all(feature = "metal", target_vendor = "apple"))),
    allow(dead_code)
)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) constants: Constants,
    pub(crate) limits: Limits,
    pub(crate) accesses: Accesses,
    /// Whether the text is not this crate's: nothing is known of what it does with what is bound.
    pub(crate) foreign: bool,
    /// The backend's own.
    pub(crate) state: Box<dyn Any + Send + Sync>,
}

impl Kernel {
    #[allow(dead_code)] // Devices that run texts build kernels.
    pub(crate) fn new(
        name: &str,
        constants: &Constants,
        limits: Limits,
        state: impl Any + Send + Sync,
    ) -> Self {
        Self::with_state(name, constants, limits, Box::new(state))
    }

    pub(crate) fn with_state(
        name: &str,
        constants: &Constants,
        limits: Limits,
        state: Box<dyn Any + Send + Sync>,
    ) -> Self {
        Self {
            name: name.into(),
            constants: constants.clone(),
            limits,
            accesses: bindings::accesses(name),
            foreign: false,
            state,
        }
    }

    /// A kernel of a text that is not this crate's.
    #[allow(dead_code)] // Not every device runs texts.
    pub(crate) fn into_foreign(mut self) -> Self {
        self.foreign = true;
        self.accesses = Accesses::UNKNOWN;
        self
    }
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel")
            .field("name", &self.name)
            .field("constants", &self.constants)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// What is bound at an index.
#[derive(Debug, Clone)]
// Devices that run texts read it.
#[cfg_attr(
    not(any(feature = "emulator", all(feature = "metal", target_vendor = "apple"))),
    allow(dead_code)
)]
pub(crate) enum Arg {
    /// Part of a device's memory, inside its bounds.
    Memory {
        memory: Arc<dyn Memory>,
        offset: usize,
        len: usize,
    },
    /// Bytes copied into the command.
    Bytes(Arc<[u8]>),
}

/// One kernel over one grid: a caller's own text, or what the Metal family makes of a task.
#[derive(Debug, Clone)]
// Devices that run texts read it.
#[cfg_attr(
    not(any(feature = "emulator", all(feature = "metal", target_vendor = "apple"))),
    allow(dead_code)
)]
pub(crate) struct Dispatch {
    pub(crate) kernel: Arc<Kernel>,
    pub(crate) args: Vec<(usize, Arg)>,
    pub(crate) grid: [u64; 3],
    pub(crate) threadgroup: [u64; 3],
    /// The attention that it computes, if that is what it does.
    pub(crate) problem: Option<Arc<Problem>>,
}

/// One step of a command: tasks between two barriers do not depend on each other.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Task(Task<Span>),
    /// A kernel of a caller's own text, on devices that run texts.
    Foreign(Dispatch),
    Barrier,
}

/// When a command ran, in seconds on the device's clock.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Timing {
    pub(crate) start: f64,
    pub(crate) end: f64,
}

/// A submitted command.
pub(crate) trait Pending: Send + Sync {
    /// Blocks until it has run; the same answer every time.
    fn wait(&self) -> Result<Timing>;
}

/// A command that ran while it was submitted.
pub(crate) struct Done(pub(crate) Result<Timing>);

impl Pending for Done {
    fn wait(&self) -> Result<Timing> {
        self.0.clone()
    }
}

/// A device.
pub(crate) trait Backend: Any + Send + Sync {
    fn kind(&self) -> DeviceKind;
    fn name(&self) -> String;
    /// What it can do, a line each.
    fn details(&self) -> Vec<(&'static str, String)>;
    /// Operations a second of the multiply-add units in `dtype`, measured now, where that can be.
    fn measured_peak(&self, _dtype: DType) -> Option<f64> {
        None
    }
    /// Zeroed memory of at least 1 byte.
    fn allocate(&self, bytes: usize) -> Result<Arc<dyn Memory>>;
    /// Whether it can do what the problem asks; the error says what it cannot.
    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported>;
    /// Prepares work for any operands; an attention only where [`Self::supports`] takes its problem.
    fn prepare(&self, work: &Work) -> Result<Box<dyn Any + Send + Sync>>;
    /// Whether it runs the kernels' text, and so a caller's own.
    fn runs_text(&self) -> bool {
        false
    }
    /// The kernel of this name in a text, on a device that runs texts.
    fn build(&self, kernel: &str, _source: &str, _constants: &Constants) -> Result<Arc<Kernel>> {
        Err(runs_no_text(self.kind(), kernel))
    }
    /// What a kernel that is only named holds on a device that runs no texts.
    fn named_kernel(&self) -> Box<dyn Any + Send + Sync> {
        Box::new(())
    }
    /// Whether its kernels can use `memory` of a device of its kind: for a GPU, memory of that very
    /// GPU. Host memory serves every device of a kind.
    fn owns_memory(&self, _memory: &dyn Memory) -> bool {
        true
    }
    /// Whether it can run a kernel that was built for a device of its kind: for a GPU, one built for
    /// that very GPU.
    fn owns_kernel(&self, _kernel: &Kernel) -> bool {
        true
    }
    fn submit(&self, steps: Vec<Step>) -> Arc<dyn Pending>;
}

/// Why a caller's own text does not run on a device.
pub(crate) fn runs_no_text(device: DeviceKind, kernel: &str) -> MlxError {
    MlxError::ShaderCompilationError {
        name: kernel.into(),
        message: format!("the {device} device runs this crate's own kernels only"),
    }
}
