//! A dispatch that a caller put together, read back into work over buffers. Sizes, bindings and grid are
//! checked against each other here, before any device has them.

mod masks;

use std::sync::Arc;

use super::args::Args;
use super::decode::DecodeStep;
use super::params::params;
use crate::attention::layout::Strides;
use crate::attention::{
    KeyLengths, MaskSpec, Pages, Problem, ProblemBuilder, QueryOffset, Role, Shape,
};
use crate::backend::access::Access;
use crate::backend::command::{DecodePartials, Hint, JoinPartials, Slot, Task, Work};
use crate::backend::metal::bindings::{coded_dtype, constant, names, other, prefill};
use crate::backend::metal::params::{
    AttnExtraParamsGpu, AttnMaskParamsGpu, AttnPagesParamsGpu, AttnParamsGpu,
};
use crate::backend::metal::plan;
use crate::backend::metal::table::{self, MaskKind, Variant};
use crate::backend::shared_params::VecParamsGpu;
use crate::compat::registry::Pipeline;
use crate::dtype::DType;
use crate::error::{MlxError, Result};
use crate::runtime::buffer::MlxBuffer;
use crate::runtime::capture::{CapturedBinding, RawDispatch, Run};
use crate::runtime::device::DeviceHandle;
use crate::runtime::encoder::{CommandEncoder, KernelArg, MTLSize, from_offset};

/// Most bytes that are copied into a command; what is larger is bound as a buffer.
const MOST_BYTES: usize = 1 << 30;

impl CommandEncoder {
    /// Records one dispatch of `pipeline` over `grid` threadgroups. What cannot be recorded (a view
    /// out of bounds, a buffer of another device, an output that overlaps another binding, params that
    /// say more than what is bound holds) is reported by the commit, which then runs nothing.
    ///
    /// A dispatch of this crate's kernels is read back into the work that it states, and the device runs
    /// that work by its own kernels and tiles. The grid must be the one that the named kernel takes; its
    /// threadgroup may have as many simdgroups as any kernel of that name had.
    ///
    /// Params may lie in a buffer. The commit reads them once, after it has run what was encoded before
    /// them, and checks them then.
    pub fn encode_threadgroups_with_args(
        &mut self,
        pipeline: &Pipeline,
        args: &[(u64, KernelArg<'_>)],
        grid: MTLSize,
        threadgroup: MTLSize,
    ) {
        let encoded = bind(pipeline, args, grid, threadgroup).and_then(|raw| self.raw(raw));
        if let Err(error) = encoded {
            self.refuse(error);
        }
    }

    fn raw(&mut self, raw: RawDispatch) -> Result<()> {
        self.check_raw(&raw)?;
        let raw = Arc::new(raw);
        let run = if raw.kernel.foreign {
            Run::Foreign(Arc::clone(&raw))
        } else {
            let in_buffers = |index: &usize| raw.buffers().any(|(i, ..)| i == *index);
            let stated = params(&raw.kernel).map(|param| param.index);
            let late: Vec<usize> = stated.filter(in_buffers).collect();
            if late.is_empty() {
                Run::Task(read(self.device(), &raw)?)
            } else {
                Run::Late(Arc::clone(&raw), late, read_late)
            }
        };
        self.record_raw(run, raw);
        Ok(())
    }
}

fn bind(
    pipeline: &Pipeline,
    args: &[(u64, KernelArg<'_>)],
    grid: MTLSize,
    threadgroup: MTLSize,
) -> Result<RawDispatch> {
    let kernel = Arc::clone(pipeline.kernel());
    let mut bindings = Vec::with_capacity(args.len());
    for (index, arg) in args {
        let index = usize::try_from(*index)
            .map_err(|_| MlxError::expected(&kernel.name, "a buffer index", index))?;
        let buffer = |buffer| CapturedBinding::Buffer(buffer, kernel.accesses.of(index));
        let binding = match arg {
            KernelArg::Buffer(b) => buffer((*b).clone()),
            KernelArg::BufferWithOffset(b, offset) => buffer(from_offset(b, *offset)?),
            KernelArg::Bytes(bytes) if bytes.len() > MOST_BYTES => {
                return Err(MlxError::expected(
                    &format!("{}: bytes {index}", kernel.name),
                    format!("at most {MOST_BYTES}"),
                    bytes.len(),
                ));
            }
            KernelArg::Bytes(bytes) => CapturedBinding::Bytes((*bytes).into()),
        };
        bindings.push((index, binding));
    }
    Ok(RawDispatch {
        kernel,
        bindings,
        grid,
        threadgroup,
    })
}

/// Reads a dispatch whose params lie in buffers: they are copied into the command first, so that what is
/// checked is what is used.
fn read_late(device: &DeviceHandle, raw: &RawDispatch) -> Result<Task<MlxBuffer>> {
    let mut raw = raw.clone();
    for param in params(&raw.kernel) {
        let stated = raw.bindings.iter().find_map(|(i, b)| match b {
            CapturedBinding::Bytes(bytes) if *i == param.count_in? => Some(&**bytes),
            _ => None,
        });
        let len = param.bytes(stated);
        let bound = raw.bindings.iter_mut().find(|(i, _)| *i == param.index);
        let Some((_, binding)) = bound else {
            continue;
        };
        let CapturedBinding::Buffer(buffer, _) = &*binding else {
            continue;
        };
        let range = buffer.range();
        let range = range.start..range.start + range.len().min(len);
        let bytes = buffer.storage().copy_for_command(range)?;
        *binding = CapturedBinding::Bytes(bytes.into());
    }
    read(device, &raw)
}

/// The work that a dispatch of one of this crate's kernels states, over what it binds.
fn read(device: &DeviceHandle, raw: &RawDispatch) -> Result<Task<MlxBuffer>> {
    let args = Args::new(device, raw);
    let (work, operands) = match raw.kernel() {
        names::MASK_FILL => masks::fill(&args, raw, DType::BF16),
        names::MASK_FILL_F16 => masks::fill(&args, raw, DType::F16),
        names::MASK_FILL_BLOCKS => masks::fill_blocks(&args, raw),
        names::BLK => masks::classify(&args, raw, DType::BF16),
        names::BLK_F16 => masks::classify(&args, raw, DType::F16),
        name @ (names::VEC_F32 | names::VEC_F16) => partials(&args, name),
        names::VEC_REDUCE => join(&args),
        name => match table::by_name(name) {
            Some(variant) => attention(&args, raw, variant),
            None => Err(args.fail("is no kernel of this crate")),
        },
    }?;
    let planned = device.plan(work).map_err(|e| args.fail(e))?;
    Ok(Task {
        planned,
        operands: operands.into(),
    })
}

type Read = Result<(Work, Vec<(Slot, MlxBuffer)>)>;

fn overflow(args: &Args<'_>) -> MlxError {
    args.fail("a product of sizes overflows")
}

/// Elements of the partial results: per head and split D values, then a maximum and a sum.
fn partials_len(args: &Args<'_>, p: &VecParamsGpu) -> Result<usize> {
    let per_head = (p.head_dim as usize + 2).checked_mul(p.splits as usize);
    let total = per_head.and_then(|n| n.checked_mul(p.num_heads as usize));
    total
        .filter(|_| p.splits > 0)
        .ok_or_else(|| args.fail("sizes in the params do not fit"))
}

fn partials(args: &Args<'_>, name: &str) -> Read {
    let p: VecParamsGpu = args.params(other::VEC_PARAMS)?;
    let total = partials_len(args, &p)?;
    let tmp = args.operand(other::VEC_TMP, total, DType::F32, Access::Write)?;
    let kv_dtype = if name == names::VEC_F16 {
        DType::F16
    } else {
        DType::F32
    };
    let problem = Arc::new(step(&p, kv_dtype).problem().map_err(|e| args.fail(e))?);
    let operand = |role, index| {
        let spec = problem.operand(role);
        let elements = spec.map_or(0, |spec| spec.elements);
        let dtype = spec.map_or(kv_dtype, |spec| spec.dtype);
        let buffer = args.operand(index, elements, dtype, Access::Read)?;
        Ok::<_, MlxError>((Slot::Operand(role), buffer))
    };
    let operands = vec![
        operand(Role::Query, other::VEC_Q)?,
        operand(Role::Key, other::VEC_K)?,
        operand(Role::Value, other::VEC_V)?,
        (Slot::Partials, tmp),
    ];
    args.grid([p.splits.into(), p.num_heads.into(), 1])?;
    args.threadgroup(&[1])?;
    let splits = p.splits;
    Ok((
        Work::DecodePartials(DecodePartials { problem, splits }),
        operands,
    ))
}

/// The decode step that the kernel's params state.
fn step(p: &VecParamsGpu, kv_dtype: DType) -> DecodeStep {
    let windowed = p.kv_start > 0;
    DecodeStep {
        heads: p.num_heads,
        kv_heads: p.num_kv_heads,
        head_dim: p.head_dim,
        key_len: p.kv_seq_len,
        capacity: p.kv_capacity,
        kv_dtype,
        scale: p.scale,
        softcap: p.softcap,
        window: windowed.then(|| p.kv_seq_len.saturating_sub(p.kv_start)),
    }
}

fn join(args: &Args<'_>) -> Read {
    let p: VecParamsGpu = args.params(other::REDUCE_PARAMS)?;
    let total = partials_len(args, &p)?;
    let tmp = args.operand(other::REDUCE_TMP, total, DType::F32, Access::Read)?;
    let elements = p.num_heads as usize * p.head_dim as usize;
    let out = args.operand(other::REDUCE_OUT, elements, DType::F32, Access::Write)?;
    args.grid([p.num_heads.into(), 1, 1])?;
    args.threadgroup(&[1])?;
    let work = Work::JoinPartials(JoinPartials {
        heads: p.num_heads,
        head_dim: p.head_dim,
        splits: p.splits,
    });
    let operands = vec![(Slot::Partials, tmp), (Slot::Operand(Role::Output), out)];
    Ok((work, operands))
}

fn attention(args: &Args<'_>, raw: &RawDispatch, variant: &'static Variant) -> Read {
    let problem = Arc::new(problem(args, raw, variant)?);
    let mut operands = Vec::new();
    for role in Role::ALL {
        if let Some(spec) = problem.operand(role) {
            let access = if role.is_output() {
                Access::Write
            } else {
                Access::Read
            };
            let index = prefill::index(role);
            let buffer = args.operand(index, spec.elements, spec.dtype, access)?;
            operands.push((Slot::Operand(role), buffer));
        }
    }
    let shape = problem.shape();
    let tiles = variant.tile.count(shape.query_len, shape.key_len).0;
    args.grid([tiles as u64, shape.heads as u64, shape.batch as u64])?;
    let given = raw.constants().int(constant::NSG);
    let mut hint = Hint {
        kernel: Some(variant.kernel),
        simdgroups: None,
    };
    if variant.head_dim == 512 {
        // One simdgroup is how the plain kernels were dispatched at first.
        args.threadgroup(&[1, 4, 8])?;
        // A negative one is no 4 or 8 either.
        hint.simdgroups = given.map(|n| u32::try_from(n).unwrap_or(0));
        plan::simdgroups(variant, hint.simdgroups).map_err(|e| args.fail(e))?;
    } else {
        args.threadgroup(&[variant.simdgroups as u64])?;
        if let Some(n) = given {
            args.same("simdgroups", variant.simdgroups as i64, n.into())?;
        }
    }
    if problem.has_lse() {
        let extra: AttnExtraParamsGpu = args.params(prefill::EXTRA_PARAMS)?;
        let packed = problem.cu_seqlens_q().is_some();
        let rows = problem.query_rows() as i64;
        let strides = [if packed { 0 } else { shape.heads as i64 * rows }, rows];
        args.same("strides of the log-sum-exp", strides, extra.lse_strides)?;
    }
    Ok((Work::Attention(problem, hint), operands))
}

/// The numbers of params, checked.
fn size(args: &Args<'_>, n: i32) -> Result<usize> {
    usize::try_from(n).map_err(|_| args.fail("a negative size in the params"))
}

fn stride(args: &Args<'_>, n: i64) -> Result<usize> {
    usize::try_from(n).map_err(|_| args.fail("a negative stride in the params"))
}

fn strides(args: &Args<'_>, [batch, head, seq]: [i64; 3]) -> Result<Strides> {
    Ok(Strides {
        batch: stride(args, batch)?,
        head: stride(args, head)?,
        seq: stride(args, seq)?,
    })
}

/// The problem that a prefill states. Building it checks sizes, strides and overlap.
fn problem(args: &Args<'_>, raw: &RawDispatch, variant: &Variant) -> Result<Problem> {
    let constants = raw.constants();
    let flag = |index| constants.bool(index);
    let dtype = |index, what| {
        coded_dtype(constants.int(index).unwrap_or(0), variant.dtype).ok_or_else(|| args.fail(what))
    };
    let p: AttnParamsGpu = args.params(prefill::PARAMS)?;
    let (packed, packs_queries) = (flag(constant::IS_VARLEN), flag(constant::PACKS_QUERIES));
    let mut builder = start(args, &p, variant, packed, packs_queries)?
        .kv_dtype(dtype(
            constant::KV_DTYPE,
            "an unknown code of K and V's dtype",
        )?)
        .scale(p.scale)
        .causal(flag(constant::DO_CAUSAL))
        .query_offset(QueryOffset::At(i64::from(p.ql_off)))
        .strides(Role::Query, strides(args, p.q_strides)?)
        .strides(Role::Key, strides(args, p.k_strides)?)
        .strides(Role::Value, strides(args, p.v_strides)?)
        .strides(Role::Output, strides(args, p.o_strides)?)
        .tile_classes(flag(constant::HAS_BLK))
        .sinks(flag(constant::HAS_SINKS))
        .alibi(flag(constant::HAS_ALIBI))
        .lse(flag(constant::HAS_LSE));
    if flag(constant::HAS_SOFTCAP) {
        builder = builder.softcap(p.softcapping);
    }
    if flag(constant::HAS_MASK) {
        let dtype = match variant.mask {
            MaskKind::Bool => DType::U8,
            MaskKind::Additive => {
                dtype(constant::MASK_DTYPE, "an unknown code of the mask's dtype")?
            }
        };
        builder = builder.mask(mask(args, dtype)?);
    }
    if flag(constant::IS_PAGED) {
        builder = builder.pages(pages(args)?);
    }
    let own_lengths = flag(constant::HAS_KEY_LENGTHS);
    if own_lengths {
        builder = builder.key_lengths(KeyLengths::Device);
    }
    if flag(constant::HAS_WINDOW) || packed || packs_queries || own_lengths {
        builder = with_bounds(args, builder)?;
    }
    let problem = builder.refuse_empty().build();
    problem.map_err(|e| args.fail(e))
}

/// The builder for the params' sizes, and the boundaries of packed rows.
fn start(
    args: &Args<'_>,
    p: &AttnParamsGpu,
    variant: &Variant,
    packed: bool,
    packs_queries: bool,
) -> Result<ProblemBuilder> {
    let (heads, group) = (size(args, p.h)?, size(args, p.gqa_factor)?);
    let (dtype, dim) = (variant.dtype, variant.head_dim);
    if group == 0 || !heads.is_multiple_of(group) || size(args, p.d)? != dim {
        let what = "head counts or head dim in the params do not fit the kernel";
        return Err(args.fail(what));
    }
    let kv_heads = heads / group;
    if !(packed || packs_queries) {
        let shape = Shape {
            batch: size(args, p.b)?,
            heads,
            kv_heads,
            query_len: size(args, p.ql)?,
            key_len: size(args, p.kl)?,
            qk_dim: dim,
            v_dim: dim,
        };
        return Ok(Problem::builder(dtype, shape));
    }
    let count = size(args, p.b)?.saturating_add(1);
    let cu_q: Vec<u32> = args.elements(prefill::CU_SEQLENS_Q, count)?;
    Ok(if packed {
        let cu_k: Vec<u32> = args.elements(prefill::CU_SEQLENS_K, count)?;
        Problem::varlen(dtype, heads, kv_heads, dim, &cu_q, &cu_k)
    } else {
        Problem::varlen_queries(dtype, heads, kv_heads, size(args, p.kl)?, dim, &cu_q)
    })
}

fn mask(args: &Args<'_>, dtype: DType) -> Result<MaskSpec> {
    let m: AttnMaskParamsGpu = args.params(prefill::MASK_PARAMS)?;
    let [batch_stride, head_stride, row_stride] = m.m_strides;
    Ok(MaskSpec {
        dtype,
        batch_stride: stride(args, batch_stride)?,
        head_stride: stride(args, head_stride)?,
        row_stride: stride(args, row_stride)?,
    })
}

fn pages(args: &Args<'_>) -> Result<Pages> {
    let pages: AttnPagesParamsGpu = args.params(prefill::PAGES_PARAMS)?;
    let page_size = u32::try_from(pages.shift).ok();
    Ok(Pages {
        count: size(args, pages.count)?,
        page_size: page_size.and_then(|n| 1usize.checked_shl(n)).unwrap_or(0),
        per_sequence: stride(args, pages.per_sequence)?,
    })
}

fn with_bounds(args: &Args<'_>, mut builder: ProblemBuilder) -> Result<ProblemBuilder> {
    let extra: AttnExtraParamsGpu = args.params(prefill::EXTRA_PARAMS)?;
    if let Ok(window) = usize::try_from(extra.window) {
        builder = builder.window(window);
    }
    if let Ok(window_right) = usize::try_from(extra.window_right) {
        builder = builder.window_right(window_right);
    }
    if extra.bottom_right != 0 {
        builder = builder.query_offset(QueryOffset::BottomRight);
    }
    Ok(builder)
}
