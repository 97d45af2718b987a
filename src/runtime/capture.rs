//! What a capturing encoder writes down instead of running it.

use std::sync::Arc;

use super::buffer::MlxBuffer;
use super::encoder::MTLSize;
use crate::attention::bindings::{Access, Constants};
use crate::backend::Kernel;

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

/// One dispatch.
#[derive(Debug, Clone)]
pub struct CapturedDispatch {
    pub(crate) kernel: Arc<Kernel>,
    pub(crate) op_kind: CapturedOpKind,
    pub(crate) bindings: Vec<(usize, CapturedBinding)>,
    pub(crate) grid: MTLSize,
    pub(crate) threadgroup: MTLSize,
    /// Whether sizes, bindings and grid are known to be right: made of a checked problem, or checked.
    pub(crate) checked: bool,
}

impl CapturedDispatch {
    /// The kernel's name.
    pub fn kernel(&self) -> &str {
        &self.kernel.name
    }

    /// Its function constants.
    pub fn constants(&self) -> &Constants {
        &self.kernel.constants
    }

    /// What it computes.
    pub fn op_kind(&self) -> CapturedOpKind {
        self.op_kind
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
