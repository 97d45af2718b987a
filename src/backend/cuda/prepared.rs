//! What a GPU prepares for some work: the kernels that may serve it, and what its last launch left for the
//! next.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::abi::CudaParams;
use super::fit;
use super::gpu::Gpu;
use super::maps::{self, Maps};
use super::modules::Function;
use super::spec::{self, Spec};
use super::table::{self, Needs, Row};
use crate::attention::{HEAD_DIMS, Problem};
use crate::backend::DeviceKind;
use crate::backend::command::{Pointers, Work};
use crate::error::{MlxError, Result, Unsupported};

/// What serves some work.
#[derive(Debug)]
pub(super) enum Prepared {
    Attention(Prefill),
    Fill(Arc<Function>),
    /// For any mask and tile, and for those that the wide kernel takes.
    Classes(Kept, Kept),
    Partials(Kept),
    Join(Kept),
}

/// An attention with its kernels, and what its last launch handed over.
#[derive(Debug)]
pub(super) struct Prefill {
    pub(super) kernels: Arc<Attention>,
    ready: Mutex<Option<Arc<Ready>>>,
}

/// A kernel, compiled when it is first taken, and kept.
#[derive(Debug)]
pub(super) struct Kept {
    spec: Spec,
    function: OnceLock<Result<Arc<Function>>>,
}

impl Kept {
    fn new(spec: Spec) -> Self {
        let function = OnceLock::new();
        Self { spec, function }
    }

    pub(super) fn function(&self, gpu: &Gpu) -> Result<&Arc<Function>> {
        self.function
            .get_or_init(|| gpu.function(&self.spec))
            .as_ref()
            .map_err(Clone::clone)
    }
}

/// The kernels of a prefill.
#[derive(Debug)]
pub(super) struct Attention {
    pub(super) needs: Needs,
    /// Those that may serve it, best first.
    pub(super) forms: Vec<(&'static Row, Kept)>,
}

/// What a launch hands to its kernel, but for memory. It is kept for the next launch of the same work.
pub(super) struct Ready {
    /// Whether the addresses are [`maps::round`].
    pub(super) round: bool,
    /// Index of the kernel.
    pub(super) form: usize,
    pub(super) params: CudaParams,
    pub(super) maps: Option<Maps>,
}

impl std::fmt::Debug for Ready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ready")
            .field("round", &self.round)
            .field("form", &self.form)
            .finish_non_exhaustive()
    }
}

impl Attention {
    /// The first kernel that takes the problem.
    pub(super) fn choose(&self, problem: &Problem, round: bool, gpu: &Gpu) -> Option<usize> {
        let machine = gpu.machine();
        let takes = |(row, _): &(&Row, Kept)| fit::takes(row, problem, round, machine);
        self.forms.iter().position(takes)
    }

    /// The kernels for what a problem needs; an error where there is none.
    pub(super) fn new(needs: Needs, gpu: &Gpu) -> std::result::Result<Self, Unsupported> {
        let rows = table::attention(needs, gpu.rows);
        let forms: Vec<_> = rows.map(|row| (row, Kept::new(row.spec(needs)))).collect();
        if forms.is_empty() {
            let capability = gpu.rows;
            return Err(Unsupported::new(
                DeviceKind::Cuda.name(),
                format!(
                    "head_dim {} with {} queries over {} keys and values",
                    needs.head_dim, needs.dtype, needs.kv_dtype
                ),
                format!(
                    "no kernel for compute capability {}.{} serves it",
                    capability.0, capability.1
                ),
            ));
        }
        Ok(Self { needs, forms })
    }
}

impl Prefill {
    pub(super) fn new(kernels: Arc<Attention>) -> Self {
        Self {
            kernels,
            ready: Mutex::default(),
        }
    }

    /// What the last launch handed over, where this one's addresses are round as its were, else what
    /// `make` gives.
    pub(super) fn ready(
        &self,
        at: &Pointers,
        make: impl FnOnce(bool) -> Result<Ready>,
    ) -> Result<Arc<Ready>> {
        let round = maps::round(at);
        let mut kept = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ready) = &*kept
            && ready.round == round
        {
            return Ok(Arc::clone(ready));
        }
        let ready = Arc::new(make(round)?);
        *kept = Some(Arc::clone(&ready));
        Ok(ready)
    }

    /// Whether no launch has compiled anything yet.
    pub(super) fn is_fresh(&self) -> bool {
        let ready = self.ready.lock();
        ready.unwrap_or_else(PoisonError::into_inner).is_none()
    }

    /// Compiles what a problem will run.
    pub(super) fn warm_up(&self, gpu: &Gpu, problem: &Problem) -> Result<()> {
        match self.kernels.choose(problem, true, gpu) {
            Some(form) => self.kernels.forms[form].1.function(gpu).map(|_| ()),
            None => Ok(()),
        }
    }
}

impl Prepared {
    /// The kernels of an attention: they do not depend on lengths, but which of them a launch takes does.
    pub(super) fn kernels(&self) -> Option<&Arc<Attention>> {
        match self {
            Self::Attention(prefill) => Some(&prefill.kernels),
            _ => None,
        }
    }

    /// Prepares work; `attention` gives the kernels for what a problem needs.
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        work: &Work,
        attention: impl FnOnce(&Problem) -> std::result::Result<Arc<Attention>, Unsupported>,
    ) -> Result<Self> {
        let served = |dim: usize| match HEAD_DIMS.contains(&dim) {
            true => Ok(dim),
            false => Err(MlxError::expected(
                "head_dim",
                format!("one of {HEAD_DIMS:?}"),
                dim,
            )),
        };
        Ok(match work {
            Work::Attention(problem, _) => Self::Attention(Prefill::new(attention(problem)?)),
            Work::FillMask(fill) => Self::Fill(gpu.function(&spec::fill(fill.dtype))?),
            Work::FillBlocks(_) => Self::Fill(gpu.function(&spec::fill_blocks())?),
            Work::ClassifyTiles(classify) => {
                let kept = |wide| Kept::new(spec::classify(classify.dtype, wide));
                let [any, wide] = [false, true].map(kept);
                Self::Classes(any, wide)
            }
            Work::DecodePartials(decode) => {
                let (problem, dim) = (&decode.problem, decode.problem.shape().qk_dim);
                Self::Partials(Kept::new(spec::decode(served(dim)?, problem.kv_dtype())))
            }
            Work::JoinPartials(join) => {
                let dim = served(join.head_dim as usize)?;
                Self::Join(Kept::new(spec::combine(dim)))
            }
        })
    }
}
