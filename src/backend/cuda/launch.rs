//! Dispatches, read back and checked, as launches on a stream.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use super::built::{Attention, Built, Kept, Pipeline, Ready};
use super::driver::Stream;
use super::gpu::Gpu;
use super::maps;
use super::memory::CudaMemory;
use super::modules::Function;
use super::params;
use super::scratch::Scratch;
use super::spec::{self, Spec};
use crate::attention::Problem;
use crate::attention::bindings::names;
use crate::attention::params::CudaParams;
use crate::attention::variant;
use crate::backend::checked::{Classes, Fill, Partials, Pointers, Prefill, Reduce};
use crate::backend::{Arg, Dispatch, Step};
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// What a command needs until it has run.
pub(crate) type Temporary = Scratch;

/// Puts the steps on a stream. What lands in `temporaries` is kept until they have run, also where
/// this fails: dispatches before the one that failed are on the stream. Dispatches of one stream run
/// one after another, so barriers hold by themselves.
pub(super) fn encode(
    gpu: &Arc<Gpu>,
    steps: &[Step],
    stream: &Stream,
    temporaries: &mut Vec<Temporary>,
) -> Result<()> {
    gpu.context.enter()?;
    for step in steps {
        if let Step::Dispatch(dispatch) = step {
            let mut launch = Launch {
                gpu,
                stream,
                dispatch,
                temporaries,
            };
            launch.run()?;
        }
    }
    Ok(())
}

/// Compiles what the steps run and no earlier dispatch has compiled, so that encoding, which one
/// thread does at a time, seldom waits for the compiler. What fails here fails there again and is
/// reported there; params that lie in a buffer may not be written yet and are not read.
pub(super) fn compile_first(gpu: &Arc<Gpu>, steps: &[Step]) {
    for step in steps {
        if let Step::Dispatch(dispatch) = step
            && let Some(built) = Pipeline::of(&dispatch.kernel, gpu)
            && built.is_fresh()
            && dispatch
                .args
                .iter()
                .any(|(_, arg)| matches!(arg, Arg::Bytes(_)))
            && let Ok(Prefill { problem, .. }) = Prefill::read(dispatch)
        {
            let _ = built.warm_up(gpu, &problem);
        }
    }
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
        let Some(built) = Pipeline::of(&self.dispatch.kernel, self.gpu) else {
            return Err(self.fail("was built for another device"));
        };
        match built {
            Built::Prefill(attention) => self.prefill(attention),
            Built::Fill(function) => self.fill(function),
            Built::Classes(any, wide) => self.classes(any, wide),
            Built::Decode(kept) => match self.dispatch.kernel.name.as_str() {
                names::VEC_REDUCE => self.reduce(kept),
                _ => self.partials(kept),
            },
        }
    }

    /// Brings what is bound up to date on the GPU. Called once the dispatch has been read and found
    /// right.
    fn prepare(&self) -> Result<()> {
        let accesses = self.dispatch.kernel.accesses;
        for (index, arg) in &self.dispatch.args {
            if let Arg::Memory { memory, .. } = arg {
                let memory = CudaMemory::of(&**memory, self.gpu)
                    .ok_or_else(|| self.fail(format!("buffer {index}: is not this GPU's")))?;
                memory.prepare(self.stream, accesses.of(*index))?;
            }
        }
        Ok(())
    }

    fn make_ready(
        &self,
        attention: &Attention,
        problem: &Arc<Problem>,
        at: &Pointers,
        round: bool,
    ) -> Result<Ready> {
        let needs = attention.needs;
        if (problem.dtype(), problem.kv_dtype()) != (needs.dtype, needs.kv_dtype) {
            return Err(self.fail("params and constants disagree"));
        }
        let form = attention
            .choose(problem, round, self.gpu)
            .ok_or_else(|| self.fail("no kernel takes a problem of this shape"))?;
        let row = attention.forms[form].0;
        let params = params::params(problem, row, self.gpu.machine());
        Ok(Ready {
            problem: Arc::clone(problem),
            round,
            form,
            params: params.map_err(|e| self.fail(e))?,
            maps: if row.maps() {
                Some(maps::maps(problem, at, row)?)
            } else {
                None
            },
        })
    }

    fn prefill(&mut self, attention: &Attention) -> Result<()> {
        let Prefill { problem, at } = Prefill::read(self.dispatch)?;
        let make = |round| self.make_ready(attention, &problem, &at, round);
        let ready = attention.ready(&problem, &at, make)?;
        let (row, kernel) = &attention.forms[ready.form];
        let function = kernel.function(self.gpu)?;
        let (mut p, mut maps) = (ready.params, ready.maps);
        params::point(&mut p, &at);
        if let Some(maps) = &mut maps {
            maps::point(maps, &at)?;
        }
        self.prepare()?;
        let needs = attention.needs;
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
        let mut blocks = p.tiles.unsigned_abs() as u64 * splits as u64 * row.ctas() as u64;
        if row.shares(needs, problem.shape().query_len) {
            blocks = blocks.min(self.gpu.machine().processors as u64);
        }
        let mut args: Vec<*mut c_void> = maps.iter_mut().flatten().map(arg).collect();
        args.push(arg(&mut p));
        // SAFETY: the kernel takes these maps and parameters, whose pointers and strides were checked
        // against the problem; the scratch memory is as large as it takes it to be and kept.
        unsafe { function.launch(self.stream, blocks, &mut args)? };
        if splits > 1 {
            self.combine(attention.combine.function(self.gpu)?, p, rows)?;
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

    fn classes(&self, any: &Kept, for_wide: &Kept) -> Result<()> {
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
        let function = if wide { for_wide } else { any }.function(self.gpu)?;
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
