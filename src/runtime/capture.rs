//! What an encoder writes down: work over buffers, dispatches of a caller's own text, barriers.

use std::sync::Arc;

use super::buffer::MlxBuffer;
use super::device::DeviceHandle;
use super::size::MTLSize;
use crate::backend::access::Access;
use crate::backend::command::{Slot, Task};
use crate::backend::{Constants, Kernel};
use crate::error::Result;

/// What a dispatch computes, for whoever rearranges a capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum CapturedOpKind {
    /// Scaled dot-product attention.
    Sdpa,
    /// Softmax.
    Softmax,
    /// RMS normalisation.
    RmsNorm,
    /// Element-wise product.
    ElemMul,
    /// Element-wise sum.
    ElemAdd,
    /// Anything else.
    #[default]
    Other,
}

impl CapturedOpKind {
    /// Whether a graph optimiser may move other dispatches past this one: not past attention and softmax.
    pub fn is_reorderable(&self) -> bool {
        !matches!(self, Self::Sdpa | Self::Softmax)
    }
}

/// What was bound at an index.
#[derive(Debug, Clone)]
pub enum CapturedBinding {
    /// A buffer, and how the kernel uses it.
    Buffer(MlxBuffer, Access),
    /// Bytes copied into the command.
    Bytes(Arc<[u8]>),
}

/// A dispatch as a caller put it together.
#[derive(Debug, Clone)]
pub struct RawDispatch {
    pub(crate) kernel: Arc<Kernel>,
    pub(crate) bindings: Vec<(usize, CapturedBinding)>,
    pub(crate) grid: MTLSize,
    pub(crate) threadgroup: MTLSize,
}

impl RawDispatch {
    /// The kernel's name.
    pub fn kernel(&self) -> &str {
        &self.kernel.name
    }

    /// Its function constants.
    pub fn constants(&self) -> &Constants {
        &self.kernel.constants
    }

    /// What is bound, in the order it was given.
    pub fn bindings(&self) -> &[(usize, CapturedBinding)] {
        &self.bindings
    }

    /// Threadgroups.
    pub fn grid(&self) -> MTLSize {
        self.grid
    }

    /// Threads of a threadgroup.
    pub fn threadgroup(&self) -> MTLSize {
        self.threadgroup
    }

    /// The buffers that are bound.
    pub(crate) fn buffers(&self) -> impl Iterator<Item = (usize, &MlxBuffer, Access)> + Clone {
        self.bindings
            .iter()
            .filter_map(|(index, binding)| match binding {
                CapturedBinding::Buffer(buffer, access) => Some((*index, buffer, *access)),
                CapturedBinding::Bytes(_) => None,
            })
    }

    /// The buffers that are bound, with what messages call them.
    pub(crate) fn named(&self) -> impl Iterator<Item = (Name<'_>, &MlxBuffer, Access)> + Clone {
        let bound = |index| Name::Bound(self.kernel(), index);
        self.buffers()
            .map(move |(index, buffer, access)| (bound(index), buffer, access))
    }
}

/// The buffers of a task, with what messages call them and how they are used.
pub(crate) fn named(
    task: &Task<MlxBuffer>,
) -> impl Iterator<Item = (Name<'_>, &MlxBuffer, Access)> + Clone {
    let operands = task.operands.iter();
    operands.map(|(slot, buffer)| (Name::Operand(*slot), buffer, task.work().access(*slot)))
}

/// What messages call a buffer.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Name<'a> {
    Operand(Slot),
    /// By the kernel it is bound to, and the index.
    Bound(&'a str, usize),
}

impl std::fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Operand(slot) => f.write_str(slot.name()),
            Self::Bound(kernel, index) => write!(f, "{kernel}: buffer {index}"),
        }
    }
}

/// Reads a dispatch whose params lie in a buffer, once what precedes it has run.
pub(crate) type ReadLate = fn(&DeviceHandle, &RawDispatch) -> Result<Task<MlxBuffer>>;

/// What one node runs.
#[derive(Debug, Clone)]
pub(crate) enum Run {
    /// Checked work over checked operands.
    Task(Task<MlxBuffer>),
    /// A dispatch of this crate's kernels whose params lie in buffers, at the indices given.
    Late(Arc<RawDispatch>, Vec<usize>, ReadLate),
    /// A kernel of the caller's own text.
    Foreign(Arc<RawDispatch>),
}

/// One dispatch.
#[derive(Debug, Clone)]
pub struct CapturedDispatch {
    pub(crate) run: Run,
    pub(crate) op_kind: CapturedOpKind,
    /// The dispatch that a caller put together, if one did.
    pub(crate) raw: Option<Arc<RawDispatch>>,
}

impl CapturedDispatch {
    /// The name of the kernel that a caller asked for, else of the work.
    pub fn kernel(&self) -> &str {
        match (&self.raw, &self.run) {
            (Some(raw), _) | (None, Run::Late(raw, ..) | Run::Foreign(raw)) => raw.kernel(),
            (None, Run::Task(task)) => task.work().name(),
        }
    }

    /// What it computes.
    pub fn op_kind(&self) -> CapturedOpKind {
        self.op_kind
    }

    /// The dispatch as a caller put it together; `None` for work that was asked for as such.
    pub fn raw(&self) -> Option<&RawDispatch> {
        self.raw.as_deref()
    }

    /// The buffers that it uses, and how.
    pub fn buffers(&self) -> impl Iterator<Item = (&MlxBuffer, Access)> {
        self.named().map(|(_, buffer, access)| (buffer, access))
    }

    /// Its buffers, with what messages call them.
    pub(crate) fn named(&self) -> impl Iterator<Item = (Name<'_>, &MlxBuffer, Access)> {
        let (task, raw) = match &self.run {
            Run::Task(task) => (Some(task), None),
            Run::Late(raw, ..) | Run::Foreign(raw) => (None, Some(raw)),
        };
        let of_task = task.into_iter().flat_map(named);
        of_task.chain(raw.into_iter().flat_map(|raw| raw.named()))
    }
}

/// One step of a captured command.
#[derive(Debug, Clone)]
pub enum CapturedNode {
    /// A dispatch.
    Dispatch(CapturedDispatch),
    /// What follows waits for what came before: asked for by [`memory_barrier`], or put in where a
    /// dispatch touches what an earlier one wrote.
    ///
    /// [`memory_barrier`]: super::encoder::CommandEncoder::memory_barrier
    Barrier,
}
