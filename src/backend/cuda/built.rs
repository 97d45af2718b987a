//! What a kernel of the runtime stands for on a GPU: the kernels that may serve it, and what its last
//! dispatch left for the next.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::fit;
use super::gpu::Gpu;
use super::maps::{self, Maps};
use super::modules::Function;
use super::spec::{self, Spec};
use super::table::{self, Needs, Row};
use crate::attention::Problem;
use crate::attention::bindings::{Constants, names};
use crate::attention::params::CudaParams;
use crate::attention::variant;
use crate::backend::Kernel;
use crate::backend::checked::Pointers;
use crate::error::{MlxError, Result};

/// What a kernel of the runtime holds: its GPU, on which alone it may be launched, and what it runs
/// there.
pub(super) struct Pipeline {
    pub(super) gpu: Arc<Gpu>,
    pub(super) built: Built,
}

impl Pipeline {
    /// What a kernel that was built for `gpu` runs; `None` for one of another device.
    pub(super) fn of<'a>(kernel: &'a Kernel, gpu: &Arc<Gpu>) -> Option<&'a Built> {
        kernel
            .state
            .downcast_ref::<Self>()
            .filter(|pipeline| Arc::ptr_eq(&pipeline.gpu, gpu))
            .map(|pipeline| &pipeline.built)
    }
}

/// What a kernel runs.
#[derive(Debug)]
pub(super) enum Built {
    Prefill(Attention),
    Fill(Arc<Function>),
    /// For any mask and tile, and for those that the wide kernel takes.
    Classes(Kept, Kept),
    /// Compiled for the head dim of the first dispatch, and kept.
    Decode(Mutex<Option<Arc<Function>>>),
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
    /// Joins partial results.
    pub(super) combine: Kept,
    ready: Mutex<Option<Arc<Ready>>>,
}

/// What a dispatch hands to its kernel, but for memory. It is kept for the next one, which mostly has
/// the same problem.
pub(super) struct Ready {
    pub(super) problem: Arc<Problem>,
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
            .field("problem", &self.problem)
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

    /// What the last dispatch handed over, where this one has the same problem and addresses as round,
    /// else what `make` gives.
    pub(super) fn ready(
        &self,
        problem: &Arc<Problem>,
        at: &Pointers,
        make: impl FnOnce(bool) -> Result<Ready>,
    ) -> Result<Arc<Ready>> {
        let round = maps::round(at);
        let mut kept = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ready) = &*kept
            && Arc::ptr_eq(&ready.problem, problem)
            && ready.round == round
        {
            return Ok(Arc::clone(ready));
        }
        let ready = Arc::new(make(round)?);
        *kept = Some(Arc::clone(&ready));
        Ok(ready)
    }
}

impl Built {
    /// Whether no dispatch has compiled anything yet.
    pub(super) fn is_fresh(&self) -> bool {
        match self {
            Self::Prefill(attention) => {
                let ready = attention.ready.lock();
                ready.unwrap_or_else(PoisonError::into_inner).is_none()
            }
            _ => false,
        }
    }

    /// Compiles what a problem will run.
    pub(super) fn warm_up(&self, gpu: &Gpu, problem: &Problem) -> Result<()> {
        if let Self::Prefill(attention) = self
            && let Some(form) = attention.choose(problem, true, gpu)
        {
            attention.forms[form].1.function(gpu)?;
        }
        Ok(())
    }
}

/// Prepares what the kernel of this name and these constants runs.
pub(super) fn built(gpu: &Arc<Gpu>, kernel: &str, constants: &Constants) -> Result<Built> {
    let unknown = |message: &str| MlxError::ShaderCompilationError {
        name: kernel.into(),
        message: message.into(),
    };
    match kernel {
        names::MASK_FILL => Ok(Built::Fill(gpu.function(&spec::fill())?)),
        names::BLK => {
            let [any, wide] = [false, true].map(|wide| Kept::new(spec::classify(wide)));
            Ok(Built::Classes(any, wide))
        }
        names::VEC_F32 | names::VEC_F16 | names::VEC_REDUCE => Ok(Built::Decode(Mutex::default())),
        _ => {
            let variant = variant::by_name(kernel)
                .ok_or_else(|| unknown("the CUDA device runs this crate's own kernels only"))?;
            let needs = Needs::of(variant, constants)
                .ok_or_else(|| unknown("an unknown code of a dtype"))?;
            let forms: Vec<_> = table::attention(needs, gpu.context.capability)
                .map(|row| (row, Kept::new(row.spec(needs))))
                .collect();
            if forms.is_empty() {
                return Err(unknown("no CUDA kernel has this dtype and head dim"));
            }
            Ok(Built::Prefill(Attention {
                needs,
                forms,
                combine: Kept::new(spec::combine(needs.head_dim, needs.dtype)),
                ready: Mutex::default(),
            }))
        }
    }
}
