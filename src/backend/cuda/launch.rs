//! Tasks as launches on a stream.

use std::ffi::c_void;
use std::sync::Arc;

use super::abi::CudaParams;
use super::driver::Stream;
use super::fit::MERGED;
use super::gpu::Gpu;
use super::maps;
use super::memory::CudaMemory;
use super::modules::Function;
use super::params;
use super::prepared::{Attention, Kept, Prefill, Prepared, Ready};
use super::scratch::Scratch;
use crate::attention::{KeyLengths, Problem, Role};
use crate::backend::command::{
    ClassifyTiles, DecodePartials, FillBlocks, FillMask, JoinPartials, Pointers, Slot, Span, Task,
    Work,
};
use crate::backend::{DeviceKind, Step, runs_no_text};
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
    steps.iter().try_for_each(|step| match step {
        Step::Barrier => Ok(()),
        Step::Foreign(dispatch) => Err(runs_no_text(DeviceKind::Cuda, &dispatch.kernel.name)),
        Step::Task(task) => {
            let mut launch = Launch {
                gpu,
                stream,
                task,
                temporaries,
            };
            launch.run()
        }
    })
}

/// Compiles what the steps run and no earlier launch has compiled, so that encoding, which one
/// thread does at a time, seldom waits for the compiler. What fails here fails there again and is
/// reported there.
pub(super) fn compile_first(gpu: &Arc<Gpu>, steps: &[Step]) {
    for step in steps {
        if let Step::Task(task) = step
            && let Work::Attention(problem, _) = task.work()
            && let Some(Prepared::Attention(prefill)) = task.planned.state.downcast_ref()
            && prefill.is_fresh()
        {
            let _ = prefill.warm_up(gpu, problem);
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
    task: &'a Task<Span>,
    temporaries: &'a mut Vec<Temporary>,
}

impl Launch<'_> {
    fn fail(&self, what: impl std::fmt::Display) -> MlxError {
        MlxError::CommandBufferError(format!("{}: {what}", self.task.work().name()))
    }

    fn run(&mut self) -> Result<()> {
        let task = self.task;
        let Some(prepared) = task.planned.state.downcast_ref::<Prepared>() else {
            return Err(self.fail("was prepared for another device"));
        };
        match (task.work(), prepared) {
            (Work::Attention(problem, _), Prepared::Attention(prefill)) => {
                self.attention(problem, prefill)
            }
            (Work::FillMask(fill), Prepared::Fill(function)) => self.fill(fill, function),
            (Work::FillBlocks(fill), Prepared::Fill(function)) => self.fill_blocks(fill, function),
            (Work::ClassifyTiles(classify), Prepared::Classes(any, wide)) => {
                self.classify(classify, any, wide)
            }
            (Work::DecodePartials(decode), Prepared::Partials(kept)) => self.partials(decode, kept),
            (Work::JoinPartials(join), Prepared::Join(kept)) => self.join(join, kept),
            _ => Err(self.fail("was prepared for other work")),
        }
    }

    /// Brings the operands up to date on the GPU.
    fn bring(&self) -> Result<()> {
        for (slot, span) in self.task.operands.iter() {
            let memory = CudaMemory::of(&*span.memory, self.gpu)
                .ok_or_else(|| self.fail(format!("{}: is not this GPU's", slot.name())))?;
            memory.prepare(self.stream, self.task.work().access(*slot))?;
        }
        Ok(())
    }

    /// The address of an operand as a kernel's argument.
    fn pointer(&self, slot: Slot) -> Result<u64> {
        Ok(self.task.address(slot)?.addr() as u64)
    }

    fn make_ready(
        &self,
        attention: &Attention,
        problem: &Problem,
        at: &Pointers,
        round: bool,
    ) -> Result<Ready> {
        let form = attention
            .choose(problem, round, self.gpu)
            .ok_or_else(|| self.fail("no kernel takes a problem of this shape"))?;
        let row = attention.forms[form].0;
        let params = params::params(problem, row, self.gpu.machine());
        Ok(Ready {
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

    fn attention(&mut self, problem: &Problem, prefill: &Prefill) -> Result<()> {
        let attention = &*prefill.kernels;
        let at = self.task.pointers()?;
        let ready = prefill.ready(&at, |round| self.make_ready(attention, problem, &at, round))?;
        let (row, kernel) = &attention.forms[ready.form];
        let function = kernel.function(self.gpu)?;
        let (mut p, mut maps) = (ready.params, ready.maps);
        params::point(&mut p, &at);
        if let Some(maps) = &mut maps {
            maps::point(maps, &at)?;
        }
        self.bring()?;
        let needs = attention.needs;
        let splits = p.splits.unsigned_abs() as usize;
        let tiles = p.tiles.unsigned_abs() as usize;
        if splits > 1 {
            let rows = p.rows.unsigned_abs() as usize
                * p.heads.unsigned_abs() as usize
                * p.result_batch.unsigned_abs() as usize;
            let groups = splits.div_ceil(MERGED);
            let bytes = (4 * (needs.head_dim + 2))
                .checked_mul(splits)
                .and_then(|n| n.checked_add(8 * groups)?.checked_mul(rows))
                .ok_or_else(|| self.fail("the partial results overflow"))?;
            p.partials = self.reused(bytes, false)?;
            p.counters = self.reused(4 * tiles * (1 + groups), true)?;
        }
        self.send_lengths(problem, &mut p)?;
        let mut blocks = tiles as u64 * splits as u64 * row.ctas() as u64;
        if row.shares(needs, problem.shape().query_len) {
            blocks = blocks.min(self.gpu.machine().processors as u64);
        }
        let mut args: Vec<*mut c_void> = maps.iter_mut().flatten().map(arg).collect();
        args.push(arg(&mut p));
        // SAFETY: the kernel takes these maps and parameters, whose pointers and strides were checked
        // against the problem; the scratch memory is as large as it takes it to be and kept.
        unsafe { function.launch(self.stream, blocks, &mut args) }
    }

    /// Sends what the host knows of each sequence to the GPU.
    fn send_lengths(&mut self, problem: &Problem, p: &mut CudaParams) -> Result<()> {
        let lengths = match problem.key_lengths() {
            KeyLengths::Host(lengths) => Some(&lengths[..]),
            _ => None,
        };
        let mut lists = [
            (problem.cu_seqlens_q(), &mut p.cu_q),
            (problem.cu_seqlens().map(|(_, k)| k), &mut p.cu_k),
            (lengths, &mut p.key_lengths),
        ];
        let all: Vec<u32> = lists
            .iter()
            .flat_map(|(list, _)| list.iter().copied().flatten())
            .copied()
            .collect();
        if all.is_empty() {
            return Ok(());
        }
        let copy = Scratch::copy_of(self.gpu, bytemuck::cast_slice(&all), self.stream)?;
        let mut at = copy.at();
        for (list, address) in &mut lists {
            if let Some(list) = list {
                **address = at;
                at += size_of_val(*list) as u64;
            }
        }
        self.temporaries.push(copy);
        Ok(())
    }

    /// The address of at least `bytes` bytes, all zeros or of any content: an earlier dispatch's of this command where
    /// those are enough, for on one stream it has run by then. Asked for before this dispatch has other memory.
    fn reused(&mut self, bytes: usize, zeros: bool) -> Result<u64> {
        let fits = |kept: &&Temporary| kept.is_zeros() == zeros && kept.len() >= bytes;
        if let Some(kept) = self.temporaries.iter().find(fits) {
            return Ok(kept.at());
        }
        let taken = if zeros {
            Scratch::zeros(self.gpu, bytes)?
        } else {
            Scratch::take(self.gpu, bytes)?
        };
        let at = taken.at();
        self.temporaries.push(taken);
        Ok(at)
    }

    fn fill(&self, fill: &FillMask, function: &Function) -> Result<()> {
        self.bring()?;
        let mut params = fill.params();
        let mut mask = self.pointer(Slot::Operand(Role::Mask))?;
        let args = &mut [arg(&mut mask), arg(&mut params)];
        // SAFETY: the kernel's parameters, and a mask of rows by keys cells.
        unsafe { function.launch(self.stream, fill.query_len.into(), args) }
    }

    fn fill_blocks(&self, fill: &FillBlocks, function: &Function) -> Result<()> {
        self.bring()?;
        let mut params = fill.params();
        let mut mask = self.pointer(Slot::Operand(Role::Mask))?;
        let mut ids = self.pointer(Slot::SequenceIds)?;
        let mut positions = self.pointer(Slot::Positions)?;
        let args = &mut [
            arg(&mut mask),
            arg(&mut ids),
            arg(&mut positions),
            arg(&mut params),
        ];
        // SAFETY: the kernel's parameters: `len` ids and positions, and a mask of as many rows and columns.
        unsafe { function.launch(self.stream, fill.len.into(), args) }
    }

    fn classify(&self, classify: &ClassifyTiles, any: &Kept, for_wide: &Kept) -> Result<()> {
        self.bring()?;
        let mut params = classify.params()?;
        let mut mask = self.pointer(Slot::Operand(Role::Mask))?;
        let mut classes = self.pointer(Slot::Operand(Role::TileClasses))?;
        let tile = classify.tile;
        let wide = [8, 16, 32, 64].contains(&tile.bk)
            && classify.row_stride.is_multiple_of(8)
            && mask.is_multiple_of(16);
        let across = if wide {
            u64::from(classify.key_len).div_ceil(1024)
        } else {
            u64::from(params.nk)
        };
        let blocks = u64::from(params.nq).saturating_mul(across);
        let (mut bq, mut bk) = classify.sides()?;
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

    fn partials(&self, decode: &DecodePartials, kept: &Kept) -> Result<()> {
        let function = kept.function(self.gpu)?;
        self.bring()?;
        let mut params = decode.params()?;
        let operand = |role| self.pointer(Slot::Operand(role));
        let mut q = operand(Role::Query)?;
        let mut k = operand(Role::Key)?;
        let mut v = operand(Role::Value)?;
        let mut partials = self.pointer(Slot::Partials)?;
        let blocks = u64::from(params.splits) * u64::from(params.num_heads);
        let args = &mut [
            arg(&mut q),
            arg(&mut k),
            arg(&mut v),
            arg(&mut partials),
            arg(&mut params),
        ];
        // SAFETY: the kernel's parameters; what they point to was checked against them.
        unsafe { function.launch(self.stream, blocks, args) }
    }

    fn join(&self, join: &JoinPartials, kept: &Kept) -> Result<()> {
        let function = kept.function(self.gpu)?;
        self.bring()?;
        let size = |n: u32| i32::try_from(n).map_err(|_| self.fail("a size too large"));
        let mut p = CudaParams {
            batch: 1,
            heads: size(join.heads)?,
            o: self.pointer(Slot::Operand(Role::Output))?,
            o_strides: [0, i64::from(join.head_dim), 0],
            partials: self.pointer(Slot::Partials)?,
            rows: 1,
            splits: size(join.splits)?,
            result_batch: 1,
            ..bytemuck::Zeroable::zeroed()
        };
        let blocks = u64::from(join.heads).div_ceil(4);
        // SAFETY: the kernel's parameters, and partial results and an output of as many heads as they say.
        unsafe { function.launch(self.stream, blocks, &mut [arg(&mut p)]) }
    }
}
