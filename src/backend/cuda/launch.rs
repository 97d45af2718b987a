//! Dispatches, read back and checked, as launches on a stream.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::driver::Stream;
use super::fit::{self, Machine};
use super::gpu::Gpu;
use super::maps;
use super::memory::CudaMemory;
use super::modules::Function;
use super::params::params;
use super::scratch::Scratch;
use super::spec::{self, Spec};
use super::table::{self, Needs, Row};
use crate::attention::Problem;
use crate::attention::bindings::{self, Constants, names};
use crate::attention::params::CudaParams;
use crate::attention::variant;
use crate::backend::checked::{Classes, Fill, Partials, Pointers, Prefill, Reduce};
use crate::backend::{Arg, Dispatch, Memory, Step};
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// What a command needs until it has run.
pub(crate) type Temporary = Scratch;

/// What a built kernel holds.
#[derive(Debug)]
pub(super) enum Built {
    Prefill {
        needs: Needs,
        /// The kernels that may serve it, best first, compiled when one is first taken.
        forms: Vec<Form>,
    },
    Fill(Arc<Function>),
    /// Which of two kernels is taken is seen at each dispatch.
    Classes,
    /// Compiled for the head dim of the first dispatch, and kept.
    Decode(Mutex<Option<Arc<Function>>>),
}

/// A kernel that may serve a prefill.
#[derive(Debug)]
pub(super) struct Form {
    row: &'static Row,
    spec: Spec,
    function: OnceLock<Result<Arc<Function>>>,
}

impl Form {
    fn function(&self, gpu: &Gpu) -> Result<&Arc<Function>> {
        self.function
            .get_or_init(|| gpu.function(&self.spec))
            .as_ref()
            .map_err(Clone::clone)
    }
}

impl Built {
    /// Compiles what a problem will run.
    pub(super) fn warm_up(&self, gpu: &Gpu, problem: &Problem) -> Result<()> {
        if let Self::Prefill { forms, .. } = self
            && let Some(form) = choose(forms, problem, None, gpu.machine())
        {
            form.function(gpu)?;
        }
        Ok(())
    }
}

/// The first kernel that takes the problem.
fn choose<'a>(
    forms: &'a [Form],
    problem: &Problem,
    at: Option<&Pointers>,
    machine: Machine,
) -> Option<&'a Form> {
    forms
        .iter()
        .find(|form| fit::takes(form.row, problem, at, machine))
}

/// Prepares what the kernel of this name and these constants runs.
pub(super) fn built(gpu: &Arc<Gpu>, kernel: &str, constants: &Constants) -> Result<Built> {
    let unknown = |message: &str| MlxError::ShaderCompilationError {
        name: kernel.into(),
        message: message.into(),
    };
    match kernel {
        names::MASK_FILL => Ok(Built::Fill(gpu.function(&spec::fill())?)),
        names::BLK => Ok(Built::Classes),
        names::VEC_F32 | names::VEC_F16 | names::VEC_REDUCE => Ok(Built::Decode(Mutex::default())),
        _ => {
            let variant = variant::by_name(kernel)
                .ok_or_else(|| unknown("the CUDA device runs this crate's own kernels only"))?;
            let needs = Needs::of(variant, constants)
                .ok_or_else(|| unknown("an unknown code of a dtype"))?;
            let forms: Vec<Form> = table::attention(needs, gpu.context.capability)
                .map(|row| Form {
                    row,
                    spec: row.spec(needs),
                    function: OnceLock::new(),
                })
                .collect();
            if forms.is_empty() {
                return Err(unknown("no CUDA kernel has this dtype and head dim"));
            }
            Ok(Built::Prefill { needs, forms })
        }
    }
}

/// Puts the steps on a stream. What is returned is kept until they have run. Dispatches of one
/// stream run one after another, so barriers hold by themselves.
pub(crate) fn encode(gpu: &Arc<Gpu>, steps: &[Step], stream: &Stream) -> Result<Vec<Temporary>> {
    gpu.context.enter()?;
    let mut temporaries = Vec::new();
    for step in steps {
        if let Step::Dispatch(dispatch) = step {
            let mut launch = Launch {
                gpu,
                stream,
                dispatch,
                temporaries: &mut temporaries,
            };
            launch.run()?;
        }
    }
    Ok(temporaries)
}

/// An argument of a kernel.
fn arg<T>(value: &mut T) -> *mut c_void {
    std::ptr::from_mut(value).cast()
}

struct Launch<'a> {
    gpu: &'a Arc<Gpu>,
    stream: &'a Stream,
    dispatch: &'a Dispatch,
    temporaries: &'a mut Vec<Temporary>,
}

impl Launch<'_> {
    fn fail(&self, what: impl std::fmt::Display) -> MlxError {
        MlxError::CommandBufferError(format!("{}: {what}", self.dispatch.kernel.name))
    }

    fn run(&mut self) -> Result<()> {
        let Some(built) = self.dispatch.kernel.state.downcast_ref::<Built>() else {
            return Err(self.fail("was built for another device"));
        };
        match built {
            Built::Prefill { needs, forms } => self.prefill(*needs, forms),
            Built::Fill(function) => self.fill(function),
            Built::Classes => self.classes(),
            Built::Decode(kept) => match self.dispatch.kernel.name.as_str() {
                names::VEC_REDUCE => self.reduce(kept),
                _ => self.partials(kept),
            },
        }
    }

    /// Brings what is bound up to date on the GPU. Called once the dispatch has been read and found
    /// right.
    fn prepare(&self) -> Result<()> {
        let access = bindings::accesses(&self.dispatch.kernel.name);
        for (index, arg) in &self.dispatch.args {
            if let Arg::Memory { memory, .. } = arg {
                let memory: &dyn Memory = &**memory;
                let memory = (memory as &dyn std::any::Any)
                    .downcast_ref::<CudaMemory>()
                    .filter(|memory| memory.is_of(self.gpu))
                    .ok_or_else(|| self.fail(format!("buffer {index}: is not this GPU's")))?;
                memory.prepare(self.stream, access(*index))?;
            }
        }
        Ok(())
    }

    fn prefill(&mut self, needs: Needs, forms: &[Form]) -> Result<()> {
        let Prefill { problem, at } = Prefill::read(self.dispatch)?;
        if (problem.dtype(), problem.kv_dtype()) != (needs.dtype, needs.kv_dtype) {
            return Err(self.fail("params and constants disagree"));
        }
        let machine = self.gpu.machine();
        let form = choose(forms, &problem, Some(&at), machine)
            .ok_or_else(|| self.fail("no kernel takes a problem of this shape"))?;
        let function = form.function(self.gpu)?;
        let mut p = params(&problem, &at, form.row, machine).map_err(|e| self.fail(e))?;
        let mut maps = if form.row.maps() {
            Some(maps::maps(&problem, &at, form.row)?)
        } else {
            None
        };
        self.prepare()?;
        let splits = p.splits.unsigned_abs() as usize;
        let rows = p.rows.unsigned_abs() as usize
            * p.heads.unsigned_abs() as usize
            * p.result_batch.unsigned_abs() as usize;
        if splits > 1 {
            let bytes = (needs.head_dim + 2)
                .checked_mul(4 * splits)
                .and_then(|n| n.checked_mul(rows))
                .ok_or_else(|| self.fail("the partial results overflow"))?;
            p.partials = self.reused(bytes)?;
        }
        if let Some((q, k)) = problem.cu_seqlens() {
            let cu = [q, k].concat();
            let copy = Scratch::copy_of(self.gpu, bytemuck::cast_slice(&cu), self.stream)?;
            p.cu_q = copy.at();
            p.cu_k = p.cu_q + size_of_val(q) as u64;
            self.temporaries.push(copy);
        }
        let mut blocks = p.tiles.unsigned_abs() as u64 * splits as u64 * form.row.ctas() as u64;
        if form.row.shares(needs, problem.shape().query_len) {
            blocks = blocks.min(machine.processors as u64);
        }
        let mut args: Vec<*mut c_void> = maps.iter_mut().flatten().map(arg).collect();
        args.push(arg(&mut p));
        // SAFETY: the kernel takes these maps and parameters, whose pointers and strides were checked
        // against the problem; the scratch memory is as large as it takes it to be and kept.
        unsafe { function.launch(self.stream, blocks, &mut args)? };
        if splits > 1 {
            let spec = spec::combine(needs.head_dim, needs.dtype);
            let combine = self.gpu.function(&spec)?;
            self.combine(&combine, p, rows)?;
        }
        Ok(())
    }

    /// The address of at least `bytes` bytes: an earlier dispatch's of this command where those are
    /// enough, for on one stream it has run by then. Asked for before this dispatch has other memory.
    fn reused(&mut self, bytes: usize) -> Result<u64> {
        if let Some(kept) = self.temporaries.iter().find(|kept| kept.len() >= bytes) {
            return Ok(kept.at());
        }
        let taken = Scratch::take(self.gpu, bytes)?;
        let at = taken.at();
        self.temporaries.push(taken);
        Ok(at)
    }

    fn combine(&self, function: &Function, mut p: CudaParams, rows: usize) -> Result<()> {
        let blocks = rows.div_ceil(4) as u64;
        // SAFETY: as for the launch that wrote the partial results.
        unsafe { function.launch(self.stream, blocks, &mut [arg(&mut p)]) }
    }

    fn fill(&self, function: &Function) -> Result<()> {
        let Fill { mut params, mask } = Fill::read(self.dispatch)?;
        self.prepare()?;
        let mut mask = mask.ptr();
        let args = &mut [arg(&mut mask), arg(&mut params)];
        // SAFETY: the kernel's parameters, and a mask of rows by keys cells.
        unsafe { function.launch(self.stream, params.seq_len_q.into(), args) }
    }

    fn classes(&self) -> Result<()> {
        let Classes {
            mut params,
            tile,
            mask,
            classes,
            ..
        } = Classes::read(self.dispatch)?;
        self.prepare()?;
        let (mut mask, mut classes) = (mask.ptr(), classes.ptr());
        let wide = [8, 16, 32, 64].contains(&tile.bk)
            && params.row_stride % 8 == 0
            && mask.addr().is_multiple_of(16);
        let (nq, nk) = tile.count(params.seq_len_q as usize, params.seq_len_k as usize);
        let across = if wide {
            (params.seq_len_k as u64).div_ceil(1024)
        } else {
            nk as u64
        };
        let blocks = (nq as u64).saturating_mul(across);
        params.nk = u32::try_from(nk).map_err(|_| self.fail("too many tiles"))?;
        let side = |n: usize| i32::try_from(n).map_err(|_| self.fail("a tile too large"));
        let (mut bq, mut bk) = (side(tile.bq)?, side(tile.bk)?);
        let args = &mut [
            arg(&mut mask),
            arg(&mut classes),
            arg(&mut params),
            arg(&mut bq),
            arg(&mut bk),
        ];
        let function = self.gpu.function(&spec::classify(wide))?;
        // SAFETY: the kernel's parameters; mask and classes are as large as they say.
        unsafe { function.launch(self.stream, blocks, args) }
    }

    /// The kernel of `spec`, kept from one dispatch to the next.
    fn kept(&self, kept: &Mutex<Option<Arc<Function>>>, spec: &Spec) -> Result<Arc<Function>> {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        match &*kept {
            Some(function) if function.spec == *spec => Ok(Arc::clone(function)),
            _ => {
                let function = self.gpu.function(spec)?;
                *kept = Some(Arc::clone(&function));
                Ok(function)
            }
        }
    }

    fn partials(&self, kept: &Mutex<Option<Arc<Function>>>) -> Result<()> {
        let Partials {
            mut params,
            q,
            k,
            v,
            tmp,
            ..
        } = Partials::read(self.dispatch)?;
        let kv = if self.dispatch.kernel.name == names::VEC_F16 {
            DType::F16
        } else {
            DType::F32
        };
        let function = self.kept(kept, &spec::decode(params.head_dim as usize, kv))?;
        self.prepare()?;
        let (mut q, mut k, mut v, mut tmp) = (q, k, v, tmp.ptr());
        let blocks = u64::from(params.splits) * u64::from(params.num_heads);
        let args = &mut [
            arg(&mut q),
            arg(&mut k),
            arg(&mut v),
            arg(&mut tmp),
            arg(&mut params),
        ];
        // SAFETY: the kernel's parameters; what they point to was checked against them.
        unsafe { function.launch(self.stream, blocks, args) }
    }

    fn reduce(&self, kept: &Mutex<Option<Arc<Function>>>) -> Result<()> {
        let Reduce {
            params, tmp, out, ..
        } = Reduce::read(self.dispatch)?;
        let dim = params.head_dim as usize;
        if !variant::HEAD_DIMS.contains(&dim) {
            return Err(self.fail(format!("head_dim: {dim} is not served")));
        }
        let function = self.kept(kept, &spec::combine(dim, DType::F32))?;
        self.prepare()?;
        let size = |n: u32| i32::try_from(n).map_err(|_| self.fail("a size too large"));
        let p = CudaParams {
            batch: 1,
            heads: size(params.num_heads)?,
            o: out.ptr().addr() as u64,
            o_strides: [0, i64::from(params.head_dim), 0],
            partials: tmp.ptr().addr() as u64,
            rows: 1,
            splits: size(params.splits)?,
            result_batch: 1,
            ..bytemuck::Zeroable::zeroed()
        };
        self.combine(&function, p, params.num_heads as usize)
    }
}
