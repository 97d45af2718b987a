//! Prefill: the problem that a dispatch states, and where its operands lie.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Args, Pointers};
use crate::attention::bindings::{Access, coded_dtype, constant, prefill};
use crate::attention::layout::Strides;
use crate::attention::mask::MaskSpec;
use crate::attention::params::{AttnExtraParamsGpu, AttnMaskParamsGpu, AttnParamsGpu};
use crate::attention::variant::{self, MaskKind};
use crate::attention::{Problem, QueryOffset, Role, Shape};
use crate::backend::{Arg, Dispatch};
use crate::dtype::DType;
use crate::error::{MlxError, Result};

/// A prefill, read back.
pub(crate) struct Prefill {
    pub(crate) problem: Arc<Problem>,
    pub(crate) at: Pointers,
}

/// The problem that a kernel's last dispatch stated, with the bytes that stated it: the next dispatch
/// mostly states the same.
#[derive(Debug, Default)]
pub(crate) struct Stated(Mutex<Option<(Params, Arc<Problem>)>>);

type Params = Vec<(usize, Arc<[u8]>)>;

/// What a dispatch states in bytes.
fn params(dispatch: &Dispatch) -> impl Iterator<Item = (usize, &Arc<[u8]>)> {
    dispatch.args.iter().filter_map(|(index, arg)| match arg {
        Arg::Bytes(bytes) if prefill::is_params(*index) => Some((*index, bytes)),
        _ => None,
    })
}

impl Stated {
    fn problem(&self, dispatch: &Dispatch, args: &Args<'_>) -> Result<Arc<Problem>> {
        let kept = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = kept().as_ref().and_then(|(stated, problem)| {
            let same = stated.iter().map(|(i, bytes)| (*i, bytes));
            same.eq(params(dispatch)).then(|| Arc::clone(problem))
        });
        if let Some(problem) = last {
            return Ok(problem);
        }
        let problem = Arc::new(problem(dispatch, args)?);
        // What a buffer says may change.
        let all = |(index, arg): &(usize, Arg)| {
            matches!(arg, Arg::Bytes(_)) || !prefill::is_params(*index)
        };
        if dispatch.args.iter().all(all) {
            let params = params(dispatch).map(|(i, bytes)| (i, Arc::clone(bytes)));
            *kept() = Some((params.collect(), Arc::clone(&problem)));
        }
        Ok(problem)
    }
}

impl Prefill {
    pub(crate) fn read(dispatch: &Dispatch) -> Result<Self> {
        let args = Args::new(dispatch);
        args.check_aliasing()?;
        let problem = dispatch.kernel.stated.problem(dispatch, &args)?;
        let at = pointers(&problem, &args)?;
        Ok(Self { problem, at })
    }
}

/// The problem that a dispatch states. Building it checks sizes, strides and overlap once more, for
/// the params may come from any caller of the encoder.
fn problem(dispatch: &Dispatch, args: &Args<'_>) -> Result<Problem> {
    let fail =
        |what: &str| MlxError::CommandBufferError(format!("{}: {what}", dispatch.kernel.name));
    let variant =
        variant::by_name(&dispatch.kernel.name).ok_or_else(|| fail("is no prefill kernel"))?;
    let constants = &dispatch.kernel.constants;
    let dtype = |index, what| {
        coded_dtype(constants.int(index).unwrap_or(0), variant.dtype).ok_or_else(|| fail(what))
    };
    let p: AttnParamsGpu = args.params(prefill::PARAMS)?;
    let size = |n: i32| usize::try_from(n).map_err(|_| fail("a negative size in the params"));
    let stride = |n: i64| usize::try_from(n).map_err(|_| fail("a negative stride in the params"));
    let strides = |s: [i64; 3]| -> Result<Strides> {
        Ok(Strides {
            batch: stride(s[0])?,
            head: stride(s[1])?,
            seq: stride(s[2])?,
        })
    };
    let (heads, group) = (size(p.h)?, size(p.gqa_factor)?);
    if group == 0 || !heads.is_multiple_of(group) || size(p.d)? != variant.head_dim {
        return Err(fail(
            "head counts or head dim in the params do not fit the kernel",
        ));
    }
    let flag = |index| constants.bool(index);
    let packed = flag(constant::IS_VARLEN);
    let builder = if packed {
        let count = size(p.b)?.saturating_add(1);
        let cu_q: Vec<u32> = args.elements(prefill::CU_SEQLENS_Q, count)?;
        let cu_k: Vec<u32> = args.elements(prefill::CU_SEQLENS_K, count)?;
        Problem::varlen(
            variant.dtype,
            heads,
            heads / group,
            variant.head_dim,
            &cu_q,
            &cu_k,
        )
    } else {
        let shape = Shape {
            batch: size(p.b)?,
            heads,
            kv_heads: heads / group,
            query_len: size(p.ql)?,
            key_len: size(p.kl)?,
            head_dim: variant.head_dim,
        };
        Problem::builder(variant.dtype, shape)
    };
    let mut builder = builder
        .kv_dtype(dtype(
            constant::KV_DTYPE,
            "an unknown code of K and V's dtype",
        )?)
        .scale(p.scale)
        .causal(flag(constant::DO_CAUSAL))
        .query_offset(QueryOffset::At(i64::from(p.ql_off)))
        .strides(Role::Query, strides(p.q_strides)?)
        .strides(Role::Key, strides(p.k_strides)?)
        .strides(Role::Value, strides(p.v_strides)?)
        .strides(Role::Output, strides(p.o_strides)?)
        .tile_classes(flag(constant::HAS_BLK))
        .sinks(flag(constant::HAS_SINKS))
        .alibi(flag(constant::HAS_ALIBI))
        .lse(flag(constant::HAS_LSE));
    if flag(constant::HAS_SOFTCAP) {
        builder = builder.softcap(p.softcapping);
    }
    if flag(constant::HAS_MASK) {
        let m: AttnMaskParamsGpu = args.params(prefill::MASK_PARAMS)?;
        let [batch_stride, head_stride, row_stride] = m.m_strides;
        builder = builder.mask(MaskSpec {
            dtype: match variant.mask {
                MaskKind::Bool => DType::U8,
                MaskKind::Additive => {
                    dtype(constant::MASK_DTYPE, "an unknown code of the mask's dtype")?
                }
            },
            batch_stride: stride(batch_stride)?,
            head_stride: stride(head_stride)?,
            row_stride: stride(row_stride)?,
        });
    }
    if flag(constant::HAS_WINDOW) || packed {
        let extra: AttnExtraParamsGpu = args.params(prefill::EXTRA_PARAMS)?;
        if let Ok(window) = u32::try_from(extra.window) {
            builder = builder.window(window);
        }
        if let Ok(window_right) = u32::try_from(extra.window_right) {
            builder = builder.window_right(window_right);
        }
        if extra.bottom_right != 0 {
            builder = builder.query_offset(QueryOffset::BottomRight);
        }
    }
    let problem = builder.refuse_empty().build();
    problem.map_err(|e| fail(&e.to_string()))
}

fn pointers(problem: &Problem, args: &Args<'_>) -> Result<Pointers> {
    let pointer = |role: Role| match problem.operand(role) {
        None => Ok(std::ptr::null_mut()),
        Some(spec) => {
            let access = if role.is_output() {
                Access::Write
            } else {
                Access::Read
            };
            args.pointer(
                prefill::index(role),
                spec.elements,
                spec.dtype.size_of(),
                access,
            )
        }
    };
    Ok(Pointers {
        q: pointer(Role::Query)?,
        k: pointer(Role::Key)?,
        v: pointer(Role::Value)?,
        o: pointer(Role::Output)?,
        mask: pointer(Role::Mask)?,
        tile_classes: pointer(Role::TileClasses)?,
        sinks: pointer(Role::Sinks)?.cast(),
        alibi_slopes: pointer(Role::AlibiSlopes)?.cast(),
        lse: pointer(Role::Lse)?.cast(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::plan::{Plan, PlanArg, PlanOptions};
    use crate::attention::variant::Family;
    use crate::backend::host_memory::HostMemory;
    use crate::backend::{Kernel, Limits, Memory};

    fn memory(bytes: &[u8]) -> Arg {
        let memory = HostMemory::zeroed(bytes.len()).unwrap();
        let to = memory.host(Access::Write).unwrap();
        // SAFETY: the memory has as many bytes, and nobody else uses it yet.
        unsafe { std::slice::from_raw_parts_mut(to, bytes.len()) }.copy_from_slice(bytes);
        Arg::Memory {
            memory: Arc::new(memory),
            offset: 0,
            len: bytes.len(),
        }
    }

    /// The scales that two dispatches of one kernel are read to have, their params bound by `bind`.
    fn scales(bind: fn(&[u8]) -> Arg) -> [f32; 2] {
        let shape = Shape {
            batch: 1,
            heads: 2,
            kv_heads: 1,
            query_len: 3,
            key_len: 5,
            head_dim: 64,
        };
        let mut kernel = None;
        [0.25, 0.5].map(|scale| {
            let problem = Problem::builder(DType::F32, shape).scale(scale);
            let problem = problem.build().unwrap();
            let plan = Plan::new(&problem, Family::Cpu, PlanOptions::default()).unwrap();
            let limits = Limits {
                thread_execution_width: 32,
                max_threads: 1024,
                static_threadgroup_bytes: 0,
            };
            let kernel = kernel.get_or_insert_with(|| {
                Arc::new(Kernel::new(
                    plan.variant.kernel,
                    &plan.constants,
                    limits,
                    (),
                ))
            });
            let args = plan.args.iter().map(|(index, arg)| match arg {
                PlanArg::Bytes(bytes) => (*index, bind(bytes)),
                PlanArg::Operand(role) => {
                    let spec = problem.operand(*role).unwrap();
                    let bytes = spec.elements * spec.dtype.size_of();
                    (*index, memory(&vec![0; bytes]))
                }
            });
            let dispatch = Dispatch {
                kernel: Arc::clone(kernel),
                args: args.collect(),
                grid: plan.grid,
                threadgroup: plan.threadgroup,
            };
            Prefill::read(&dispatch).unwrap().problem.scale()
        })
    }

    #[test]
    fn each_dispatch_is_read_by_what_it_states_in_bytes_or_in_a_buffer() {
        assert_eq!(scales(|bytes| Arg::Bytes(bytes.into())), [0.25, 0.5]);
        assert_eq!(scales(memory), [0.25, 0.5]);
    }
}
