//! What a device does for the runtime: hold memory, build kernels, run dispatches. Each backend
//! knows only this seam and the pure attention core.

use std::any::Any;
use std::sync::Arc;

use self::command::{Planned, Span, Task, Work};
pub(crate) use self::kernel::{Arg, Constants, Dispatch, Kernel, Limits};
pub use self::kind::DeviceKind;
pub(crate) use self::memory::Memory;
use crate::attention::Problem;
use crate::dtype::DType;
use crate::error::{MlxError, Result, Unsupported};

pub(crate) mod abilities;
pub(crate) mod access;
pub(crate) mod command;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod devices;
#[cfg(feature = "emulator")]
pub(crate) mod emulator;
pub(crate) mod gpu_struct;
pub(crate) mod host_memory;
pub(crate) mod kernel;
pub(crate) mod kind;
pub(crate) mod memory;
pub(crate) mod metal;
pub(crate) mod score;
pub(crate) mod shared_params;

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

    /// Whether it has run, so that [`Self::wait`] returns at once. Never blocks.
    fn is_done(&self) -> bool;
}

/// A command that ran while it was submitted.
pub(crate) struct Done(pub(crate) Result<Timing>);

impl Pending for Done {
    fn wait(&self) -> Result<Timing> {
        self.0.clone()
    }

    fn is_done(&self) -> bool {
        true
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
    /// As [`Self::prepare`], for work that differs from `before` in lengths alone: what does not depend on
    /// them may be taken from what `before` holds.
    fn prepare_again(&self, work: &Work, _before: &Planned) -> Result<Box<dyn Any + Send + Sync>> {
        self.prepare(work)
    }
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
